"""Volumes on their way to an encoder: what a run derives of them, and their augmentation.

A run on other samples does not load this module.
"""

import math
from collections.abc import Iterable

import numpy as np
from msgspec.structs import asdict, replace

from glovita_lib.augment_patch import Size, held_axes, reach
from glovita_lib.augment_volumes import AXES, INTERPOLATED, VolumeAugmenter
from glovita_lib.data import Data, Split, VolumeSamples
from glovita_lib.encoder import patch_size_of
from glovita_lib.errors import UserError, refuse
from glovita_lib.objectives import build_inputs
from glovita_lib.resolved import VolumeInputs, resolve_inputs
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_data import CustomVolumes
from glovita_lib.spec_errors import shown
from glovita_lib.spec_lift import Slices, Windows
from glovita_lib.spec_root import Root
from glovita_lib.spec_volumes import (
    VOLUME_TEST,
    VOLUME_TRAIN,
    ResolvedVolumeAugmentation,
    VolumeAugmentation,
)
from glovita_lib.volume_preparation import thick_axis

TURNED = ("mirror_p", "rot90_p", "transpose_p")  # switches of what mirror_axes restrict
ACROSS = ("rotate_p", "scale_p", "elastic_p", "low_resolution_p", "rot90_p", "transpose_p")
"""Switches of what is not done across thick slices."""
OTHER_SPACING = 0.1  # relative difference of spacings that is worth a line
PATIENT = ("left to right", "back to front", "foot to head")


@resolve_inputs.register
def _(samples: VolumeSamples, root: Root, data: Data) -> VolumeInputs:
    section, policies = getattr(root.data, "augmentation", None), root.data.default_policies
    if not isinstance(section, VolumeAugmentation):  # dataset = "custom"
        if section != ImageAugmentation():
            raise UserError(
                "data.augmentation is that of images here, and the samples are volumes: set"
                ' data.dataset = "custom_3d_dataset"'
            )
        section, policies = VolumeAugmentation(), CustomVolumes.default_policies
    sizes = {split.source.uniform for split in data.splits.values() if len(split)}
    shape = sizes.pop() if len(sizes) == 1 else None
    of_any_size = isinstance(root.model.encoder.lifting, Windows)
    asked = None if of_any_size else patch_size_of(root.model.encoder)
    train = data.splits["train"]
    affines = stored_affines(train)
    available = largest_size([train])
    augmentation = resolve_volume_augmentation(
        section,
        default_policies=policies,
        encoder_size=None if asked is None else (asked[0], asked[1], asked[2]),
        native_size=None if shape is None else (shape[1], shape[2], shape[3]),
        available=available,
        largest=largest_size(data.splits.values()) if of_any_size else None,
        spacing=None if affines is None else typical_spacing(affines),
    )
    if affines is not None and root.mode == "train":
        flat = flat_axis(augmentation.patch_size, section.anisotropy, available)
        thick = common_thick_axis(train, affines, augmentation, section, data.report)
        augmentation = replace(
            augmentation,
            thick_axis=flat if thick is None else thick,
            flat_axis=None if thick in (None, flat) else flat,
            mirror_axes=stored_mirrors(train, affines, augmentation),
        )
        augmentation = with_margin(augmentation, section.margin, available)
        if isinstance(root.model.encoder.lifting, Slices):
            data.report += slices_line(affines, root.model.encoder.lifting, "train volumes")
    return VolumeInputs(**asdict(samples), augmentation=augmentation)


def resolve_volume_augmentation(
    aug: VolumeAugmentation,
    *,
    default_policies: tuple[str, str],
    encoder_size: Size | None,
    native_size: Size | None,
    available: Size | None = None,
    largest: Size | None = None,
    spacing: tuple[float, float, float] | None,
) -> ResolvedVolumeAugmentation:
    """The augmentation of a run: spec before encoder before data.

    Args:
        aug: the section of the spec.
        default_policies: train and test policy of the data set.
        encoder_size: patch that the encoder asks for.
        native_size: voxels of the prepared volumes where all have the same, else none.
        available: the most voxels of a train volume along each axis; none: unknown.
        largest: the most voxels along each axis, where the encoder takes volumes of any size; else
            none.
        spacing: of the prepared volumes, a typical one where they differ; none: unknown, the same
            along all axes.

    Raises:
        UserError: no patch size known, parameters that nothing reads.
    """
    refuse("data.augmentation", list(aug.unread_kwargs(default_policies)))
    size = aug.patch_size or largest or encoder_size or native_size
    if size is None:
        raise UserError(
            "data.augmentation.patch_size: none given, the encoder asks for none and the volumes"
            " differ in size: set it, e.g. patch_size = [96, 96, 96], or bring them to one size"
            " with data.preparation.size"
        )
    spacing = spacing or (1.0, 1.0, 1.0)
    thick = thick_axis(spacing, aug.anisotropy)
    flat = flat_axis(size, aug.anisotropy, available)
    names = aug.train_policy or default_policies[0], aug.test_policy or default_policies[1]
    resolved = ResolvedVolumeAugmentation(
        train_policy=names[0],
        test_policy=names[1],
        patch_size=size,
        whole=aug.patch_size is None and largest is not None,
        evaluation=aug.evaluation or "center",
        window_overlap=aug.window_overlap,
        window_reduce=aug.window_reduce,
        window_chunk=aug.window_chunk,
        margin=(0, 0, 0),
        mirror_axes=aug.mirror_axes,
        spacing=spacing,
        thick_axis=flat if thick is None else thick,
        flat_axis=None if thick in (None, flat) else flat,
        train=replace(VOLUME_TRAIN[names[0]], **aug.train_kwargs.given()),
        test=replace(VOLUME_TEST[names[1]], **aug.test_kwargs.given()),
    )
    return with_margin(resolved, aug.margin, available)


def with_margin(
    resolved: ResolvedVolumeAugmentation, share: float | None, available: Size | None
) -> ResolvedVolumeAugmentation:
    """The same with the margin that a spec asks for, or, with none, its policy and the volumes."""
    ops, size = resolved.train, resolved.patch_size
    if resolved.whole or not any(map(ops.draws, INTERPOLATED)):
        margin = 0, 0, 0
    elif share is not None:
        x, y, z = (math.ceil(side * share) for side in size)
        margin = x, y, z
    else:
        margin = reach(
            size,
            resolved.spacing,
            held_axes(size, resolved.thick_axis, resolved.flat_axis),
            angle=ops.rotate_radians * ops.draws("rotate_p"),
            factor=max(1.0, ops.scale[1]) if ops.draws("scale_p") else 1.0,
            shift=ops.elastic_strength[1] / ops.elastic_points * ops.draws("elastic_p"),
            available=available,
        )
    return replace(resolved, margin=margin)


def largest_size(splits: Iterable[Split]) -> tuple[int, int, int] | None:
    """The most voxels along each axis over some splits; None where their sizes are not known before
    they are read, or there are none."""
    sizes = []
    for split in splits:
        source = split.source
        if len(split) and source.sizes is not None:
            sizes.append(source.sizes.max(0))
        elif len(split) and source.uniform is not None:
            sizes.append(np.array(source.uniform[1:]))
        elif len(split):
            return None
    if not sizes:
        return None
    x, y, z = np.max(sizes, 0).tolist()
    return x, y, z


def stored_affines(split: Split) -> np.ndarray | None:
    """Affines (N, 4, 4) of the prepared volumes of a split, one file open at a time; None where
    their files do not tell, or there are none."""
    windows = split.source.windows
    if windows is None or not len(split):
        return None
    return np.stack([windows(np.array([row]))[0].affine for row in range(len(split))])


def spacings_of(affines: np.ndarray) -> np.ndarray:
    """Spacings (N, 3) of affines (N, 4, 4), mm."""
    return np.linalg.norm(affines[:, :3, :3], axis=1)


def typical_spacing(affines: np.ndarray) -> tuple[float, float, float]:
    """Median spacing along each axis, mm."""
    x, y, z = np.median(spacings_of(affines), 0).tolist()
    return x, y, z


def flat_axis(size: Size, limit: float, available: Size | None) -> int | None:
    """The axis of a patch across which nothing is turned, as it would show what no one has cut.

    It is the one with a single voxel, in the patch or in every volume (`available`, the most of
    them), else the one that the longest side is more than `limit` times as long as: nnU-Net's
    do_dummy_2d_data_aug. Where two are so short it is the long one, about which the patch still
    turns. None where there is none.
    """
    single = [axis for axis in range(3) if 1 in (size[axis], (available or size)[axis])]
    if single:
        return single[0] if max(size) > 1 else None
    short = [axis for axis in range(3) if max(size) > limit * size[axis]]
    if len(short) > 1:
        return size.index(max(size))
    return short[0] if short else None


def common_thick_axis(
    split: Split,
    affines: np.ndarray,
    augmentation: ResolvedVolumeAugmentation,
    section: VolumeAugmentation,
    report: list[str],
) -> int | None:
    """The axis across whose slices nothing is interpolated in any volume: the one that is thick in
    some of them. What it means for the others is said in a line of the report.

    Raises:
        UserError: volumes are thick across different axes, and the policy would turn them.
    """
    if not any(map(augmentation.train.draws, ACROSS)):
        return thick_axis(augmentation.spacing, section.anisotropy)
    axes = [thick_axis(spacing, section.anisotropy) for spacing in spacings_of(affines).tolist()]
    found = sorted({axis for axis in axes if axis is not None})
    if len(found) > 1:
        counts = ", ".join(
            f"{AXES[axis]} in {axes.count(axis)} ({split.ids[axes.index(axis)]})" for axis in found
        )
        raise UserError(
            f"data.augmentation: train volumes have slices more than {section.anisotropy:g} times"
            f" as thick as a voxel is wide across different axes, {counts}, and"
            f" {augmentation.train_policy} rotates or interpolates: bring them to one spacing with"
            ' data.preparation.spacing, take train_policy = "default_3d_1", or raise'
            " data.augmentation.anisotropy"
        )
    if found and None in axes:
        report.append(
            f"{axes.count(found[0])} of {len(axes)} train volumes have thick slices across"
            f" {AXES[found[0]]}: nothing is rotated or interpolated across {AXES[found[0]]} in any;"
            " data.preparation.spacing would bring them to one spacing"
        )
    return found[0] if found else None


def stored_axes(affine: np.ndarray) -> list[int]:
    """The axis of a volume that runs from left to right, or back; that of back and front; that of
    foot and head."""
    from nibabel.orientations import io_orientation

    return [int(axis) for axis in np.argsort(io_orientation(affine)[:, 0])]


def stored_mirrors(
    split: Split, affines: np.ndarray, augmentation: ResolvedVolumeAugmentation
) -> tuple[str, ...]:
    """mirror_axes, which are those of the patient, as axes of the arrays: others where volumes are
    not in canonical orientation.

    Raises:
        UserError: volumes are stored in different orders of axes.
    """
    names = augmentation.mirror_axes
    drawn = any(map(augmentation.train.draws, TURNED))
    if len(names) in (0, len(AXES)) or not drawn:
        return names
    orders = [stored_axes(affine) for affine in affines]
    found = [tuple(sorted(order[AXES.index(name)] for name in names)) for order in orders]
    others = [number for number, axes in enumerate(found) if axes != found[0]]
    if others:
        (one,) = names if len(names) == 1 else set(AXES) - set(names)
        first, other = (orders[number][AXES.index(one)] + 1 for number in (0, others[0]))
        raise UserError(
            f"data.augmentation.mirror_axes: {shown(names)} are axes of the patient, and {one} is"
            f" axis {first} of {split.ids[0]}, axis {other} of {split.ids[others[0]]} as they are"
            " stored: set data.reading.canonical = true, or mirror_axes = []"
        )
    return tuple(AXES[axis] for axis in found[0])


def slices_line(affines: np.ndarray, slices: Slices, noun: str) -> list[str]:
    """A line where slices along a stored axis are not those that its name means in volumes in
    canonical orientation."""
    axis = slices.axis or "z"
    wanted = AXES.index(axis)
    others = sum(stored_axes(affine)[wanted] != wanted for affine in affines)
    if not others:
        return []
    return [
        f"model.encoder.slices.axis: {axis} is axis {wanted + 1} as volumes are stored, which does"
        f" not run {PATIENT[wanted]} in {others} of {len(affines)} {noun};"
        " data.reading.canonical = true turns them"
    ]


def spacing_line(affines: np.ndarray, inputs: VolumeInputs) -> list[str]:
    """A line where volumes of another spacing than those of training are not resampled to one."""
    trained = np.array(inputs.augmentation.spacing)
    spacings = spacings_of(affines)
    others = (np.abs(spacings / trained - 1) > OTHER_SPACING).any(1)
    if not others.any() or (inputs.preparation is not None and inputs.preparation.spacing):
        return []
    low, high, usual = (
        " x ".join(f"{side:.3g}" for side in sides)
        for sides in (spacings[others].min(0), spacings[others].max(0), trained)
    )
    return [
        f"{others.sum()} of {len(affines)} volumes asked about have a spacing of {low} to {high} mm"
        f" and are not resampled, and the model was trained on a median of {usual} mm"
        " (data.preparation.spacing of training would bring all to one)"
    ]


@build_inputs.register
def _(inputs: VolumeInputs, *, train: bool) -> VolumeAugmenter:
    return VolumeAugmenter(inputs.augmentation, train=train)
