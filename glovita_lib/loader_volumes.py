"""Volumes on their way to an encoder: what a run derives of them, and their augmentation.

A run on other samples does not load this module.
"""

import numpy as np
from msgspec.structs import asdict

from glovita_lib.augment_volumes import VolumeAugmenter, resolve_volume_augmentation
from glovita_lib.data import Data, Split, VolumeSamples
from glovita_lib.encoder import patch_size_of
from glovita_lib.errors import UserError
from glovita_lib.objectives import build_inputs
from glovita_lib.resolved import VolumeInputs, resolve_inputs
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_data import CustomVolumes
from glovita_lib.spec_lift import Windows
from glovita_lib.spec_root import Root
from glovita_lib.spec_volumes import VolumeAugmentation

SPACINGS = 32  # volumes whose spacing is looked at


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
    augmentation = resolve_volume_augmentation(
        section,
        default_policies=policies,
        encoder_size=None if asked is None else (asked[0], asked[1], asked[2]),
        native_size=None if shape is None else (shape[1], shape[2], shape[3]),
        largest=largest_size(data) if of_any_size else None,
        spacing=typical_spacing(data.splits["train"]),
    )
    return VolumeInputs(**asdict(samples), augmentation=augmentation)


def largest_size(data: Data) -> tuple[int, int, int] | None:
    """The most voxels along each axis over all splits; None where their sizes are not known before
    they are read."""
    sizes = []
    for split in data.splits.values():
        source = split.source
        if len(split) and source.sizes is not None:
            sizes.append(source.sizes.max(0))
        elif len(split) and source.uniform is not None:
            sizes.append(np.array(source.uniform[1:]))
        elif len(split):
            return None
    x, y, z = np.max(sizes, 0).tolist()
    return x, y, z


def typical_spacing(split: Split) -> tuple[float, float, float] | None:
    """Median spacing along each axis of the first volumes of a split, mm; None where their files do
    not tell."""
    if split.source.windows is None:
        return None
    volumes = split.source.windows(np.arange(min(len(split), SPACINGS)))
    x, y, z = np.median([volume.spacing for volume in volumes], 0)
    return float(x), float(y), float(z)


@build_inputs.register
def _(inputs: VolumeInputs, *, train: bool) -> VolumeAugmenter:
    return VolumeAugmenter(inputs.augmentation, train=train)
