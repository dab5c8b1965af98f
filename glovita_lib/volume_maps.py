"""Maps of volumes as NIfTI files, which lie over the original in any viewer.

X Y Z voxels, n parts of a volume (windows, slices, patch tokens), K branches, classes or targets.
"""

import gzip
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from glovita_lib import dist, files
from glovita_lib.attention_maps import AttentionHead
from glovita_lib.augment_patch import WindowGrid
from glovita_lib.augment_volumes import VolumeAugmenter
from glovita_lib.bags import as_bags, segment_softmax
from glovita_lib.data import BaseSamples, Split
from glovita_lib.encoder import Features
from glovita_lib.encoder_slicewise import SlicewiseEncoder, WindowsEncoder
from glovita_lib.errors import UserError, file_name
from glovita_lib.experiment import Experiment
from glovita_lib.extraction import token_places
from glovita_lib.loader import needed
from glovita_lib.resolved import VolumeInputs, read_by

# ---------------------------------------------------------------------------------- the file


def write_map(path: Path | str, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a map as a NIfTI-1 file of float32, whole or not at all; the same values and affine
    give the same bytes.

    Args:
        path: of the file, which is compressed where it ends in .gz.
        values: (X, Y, Z).
        affine: (4, 4), voxel to world mm, such as the one of a prepared volume.

    Raises:
        UserError: the file cannot be written.
    """
    import nibabel

    if values.ndim != 3 or affine.shape != (4, 4):
        raise ValueError(f"a map is (X, Y, Z), its affine (4, 4): {values.shape}, {affine.shape}")
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    image.set_sform(affine, "scanner")
    # a qform holds rotation, mirroring and scaling; of an affine with shear viewers take the sform
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    upright = np.allclose(columns.T @ columns, np.eye(3), atol=1e-5)
    image.set_qform(affine, "scanner" if upright else "unknown")
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if str(path).endswith(".gz"):
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as file:
            file.write(content)
        content = packed.getvalue()
    files.write_bytes(path, content)


def map_titles(ids: Sequence[str]) -> list[str]:
    """What the maps of volumes are called: their ids without the suffix of NIfTI, with it where
    that would be the name of another one too."""
    short = {identity: identity.removesuffix(".gz").removesuffix(".nii") for identity in ids}
    count = Counter(name for identity in short for name in {identity, short[identity]})
    return [short[each] if count[short[each]] == 1 else each for each in ids]


def part_affine(affine: np.ndarray, starts: Sequence[float]) -> np.ndarray:
    """Affine (4, 4) of a part of a volume that begins at a voxel (3,) of it, which may lie
    outside."""
    shift = np.eye(4)
    shift[:3, 3] = starts
    return affine @ shift


# ------------------------------------------------------------------------------- parts of volumes

TINY = 1e-300  # divides what is nowhere
Ends = tuple[np.ndarray, np.ndarray]  # (n, 3) first voxels, and those behind the last
Boxes = Callable[[np.ndarray, Sequence[int]], Ends]
"""Places (n, axes) of parts and voxels of the encoder's input -> where the parts lie in it."""
Spread = Callable[[np.ndarray, np.ndarray, Sequence[int], Sequence[int]], np.ndarray]
"""Values (n,) of parts, their places (n, axes), voxels of the encoder's input and of the volume in
whose middle it lies -> map (X, Y, Z)."""


def window_boxes(places: np.ndarray, have: Sequence[int], *, size: Sequence[int]) -> Ends:
    """Windows that begin at places (n, 3)."""
    return places, places + np.array(size)


def token_boxes(places: np.ndarray, have: Sequence[int]) -> Ends:
    """Patches at places (n, 3) of a grid that divides the input evenly."""
    sides = np.array(have) / (places.max(0) + 1)
    return np.rint(places * sides).astype(int), np.rint((places + 1) * sides).astype(int)


def mean_over(values: np.ndarray, ends: Ends, shape: Sequence[int]) -> np.ndarray:
    """Values (n,) of parts in their voxels, the mean where parts overlap and 0 where there are
    none, (X, Y, Z)."""
    total, count = np.zeros(shape), np.zeros(shape, np.int32)
    low, high = (np.clip(end, 0, shape) for end in ends)
    for value, first, last in zip(values, low, high, strict=True):
        part = tuple(slice(*pair) for pair in zip(first, last, strict=True))
        total[part] += value
        count[part] += 1
    return total / np.maximum(count, 1)


def scaled(total: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map as a density, in multiples of what an even share of all voxels would be: its mean is
    the sum of the shares."""
    return total * (values.sum() / max(total.mean(), TINY))


def box_density(values: np.ndarray, ends: Ends, shape: Sequence[int]) -> np.ndarray:
    """Shares (n,) of parts in their voxels as a density: equal shares make an even map."""
    return scaled(mean_over(values, ends, shape), values)


def window_density(
    values: np.ndarray,
    places: np.ndarray,
    have: Sequence[int],
    shape: Sequence[int],
    *,
    windows: WindowGrid,
) -> np.ndarray:
    """Shares (n,) of windows that begin at places (n, 3), each a Gaussian around its middle of half
    their distance, added up and divided by what equal shares would add up to, as a density.

    sum_i v_i g_i(x) / sum_j g_j(x), where j runs over the windows of the grid, with a share or
    without, and over more that go on beyond its ends. So equal shares make an even map, also where
    the last window is close to the one before, that falls off towards the border, where fewer
    windows look. Divided by those of the grid alone it would be largest in the corners, where the
    window with the largest share has no other beside it.
    """
    offset, starts = offset_of(have, shape), windows.starts(have)
    firsts = [np.unique(starts[:, axis]) for axis in range(3)]
    grid = np.zeros([len(each) for each in firsts])
    grid[tuple(np.searchsorted(*pair) for pair in zip(firsts, places.T, strict=True))] = values
    profiles = []
    for axis, first in enumerate(firsts):
        voxels = np.arange(shape[axis]) - offset[axis]
        inside = (voxels >= 0) & (voxels < have[axis])
        size, stride = windows.size[axis], windows.stride[axis]
        profiles.append(window_profiles(first, size, stride, voxels) * inside)
    return scaled(np.einsum("abc,ax,by,cz->xyz", grid, *profiles, optimize=True), values)


def window_profiles(first: np.ndarray, size: int, stride: int, voxels: np.ndarray) -> np.ndarray:
    """What windows that begin at first (m,) count for along one axis at voxels (N,), see
    window_density: (m, N). One that is alone tells nothing of where along the axis."""
    if len(first) == 1:
        return np.ones((1, len(voxels)))
    count = math.ceil(size / stride) + 3  # up to where a Gaussian is nothing
    beyond = stride * np.arange(1, count + 1)
    every = np.concatenate([first[0] - beyond[::-1], first, first[-1] + beyond])
    away = voxels - (every[:, None] + (size - 1) / 2)
    weights = np.exp(-0.5 * (away / (stride / 2)) ** 2)
    return weights[count:-count] / np.maximum(weights.sum(0), TINY)


def slice_density(
    values: np.ndarray, places: np.ndarray, have: Sequence[int], shape: Sequence[int], *, axis: int
) -> np.ndarray:
    """Shares (n,) of slices at places (n, 1) of an axis, linear between them and beyond the first
    and the last as there, as a density: equal shares make an even map."""
    offset = offset_of(have, shape)
    inside = [
        slice(max(0, start), min(there, start + side))
        for start, side, there in zip(offset, have, shape, strict=True)
    ]
    at = np.arange(inside[axis].start, inside[axis].stop) - offset[axis]
    line = [1, 1, 1]
    line[axis] = -1
    total = np.zeros(shape)
    total[tuple(inside)] = np.interp(at, places[:, 0], values).reshape(line)
    return scaled(total, values)


def spread_boxes(
    values: np.ndarray,
    places: np.ndarray,
    have: Sequence[int],
    shape: Sequence[int],
    *,
    boxes: Boxes,
    how: Callable[[np.ndarray, Ends, Sequence[int]], np.ndarray],
) -> np.ndarray:
    """Values (n,) of parts that are boxes, by `mean_over` or `box_density`."""
    low, high = boxes(places, have)
    offset = np.array(offset_of(have, shape))
    return how(values, (low + offset, high + offset), shape)


def offset_of(have: Sequence[int], shape: Sequence[int]) -> list[int]:
    """First voxel of an input in the middle of a volume, negative where it is larger."""
    return [(there - side) // 2 for there, side in zip(shape, have, strict=True)]


# ------------------------------------------------------------------- attention, scores of windows


@dataclass(frozen=True)
class Heard:
    """What a model gave for the parts of the volumes of this rank, in their order."""

    what: str  # attention or score
    spread: Spread
    whole: bool  # whether its input is the prepared volume, not a patch in its middle
    patch: Sequence[int]  # voxels of its input where it is not
    places: list[np.ndarray]  # (n, axes) of each volume
    values: list[np.ndarray]  # (n, K) of each


class VolumeMaps:
    """Writes where in each volume of a split a model, or the mean of several, has looked: the
    attention over its parts, or the scores of the windows of its evaluation.

    Each rank writes the volumes that it has predicted. In memory are a number a part and branch.
    """

    def __init__(self, folder: Path, ranks: dist.Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.members: list[Heard] = []
        self.readings: list[BaseSamples] = []  # how each member has its volumes read
        self.names: tuple[str, ...] = ()  # of K classes or targets

    @contextmanager
    def listening(self, experiment: Experiment) -> Iterator[None]:
        """Context in which the passes of a model over its shard of the split are noted.

        Raises:
            UserError: the model has nothing to map, or reads volumes in another way than the
                members before it.
        """
        inputs, head = experiment.resolved.inputs, experiment.model.head
        prepare = experiment.objective.eval_inputs
        if not isinstance(inputs, VolumeInputs) or not isinstance(prepare, VolumeAugmenter):
            raise UserError(
                f"infer.volume_maps: the model was trained on {inputs.kind}, not volumes"
            )
        self.names = experiment.resolved.class_names
        self.readings.append(read_by(inputs))
        if self.readings[-1] != self.readings[0]:
            raise UserError(
                "infer.volume_maps: the members read or prepare volumes in different ways, so that"
                " their maps have no mean: name one of them"
            )
        aug = inputs.augmentation
        if inputs.by_windows:
            boxes = partial(window_boxes, size=aug.patch_size)
            spread: Spread = partial(spread_boxes, boxes=boxes, how=mean_over)
            heard = Heard("score", spread, True, aug.patch_size, [], [])
            prepare.told = partial(note_scores, heard, experiment)
            try:
                yield
            finally:
                prepare.told = None
        elif isinstance(head, AttentionHead):
            encoder = experiment.model.encoder
            spread = spread_of(encoder)
            heard = Heard("attention", spread, aug.whole, aug.patch_size, [], [])
            hook = head.register_forward_hook(partial(note_attention, heard))
            try:
                yield
            finally:
                hook.remove()
        else:
            raise UserError(
                "infer.volume_maps: this model weighs no parts of a volume; it needs a head with"
                " attention (abmil, clam, dsmil, transmil), or data.augmentation.evaluation ="
                ' "windows", whose windows have scores'
            )
        self.members.append(heard)

    def write(self, split: Split) -> Path:
        """Write the maps of the volumes of this rank, after all members; the folder. All ranks must
        call it.

        Raises:
            UserError: disk full ...
        """
        if self.ranks.is_main:
            files.make_folder(self.folder)
            for old in self.folder.glob("*.nii.gz"):
                old.unlink()
        dist.barrier(self.ranks)
        first, end = needed(split, train=False, ranks=self.ranks)
        titles = map_titles(split.ids)
        for number, row in enumerate(range(first, end)):
            affine, shape = frame(split, row)
            for branch, values in self.maps(number, shape).items():
                name = f"{file_name(titles[row])}_{file_name(branch)}.nii.gz"
                write_map(self.folder / name, values, affine)
        dist.barrier(self.ranks)
        return self.folder

    def maps(self, number: int, shape: Sequence[int]) -> dict[str, np.ndarray]:
        """Maps (X, Y, Z) of a volume of this rank by branch, the mean over the members."""
        found: dict[str, list[np.ndarray]] = {}
        for member in self.members:
            have = shape if member.whole else member.patch
            columns = member.values[number].T
            for branch, values in zip(self.branches(member, number), columns, strict=True):
                spread = member.spread(values, member.places[number], have, shape)
                found.setdefault(branch, []).append(spread)
        return {branch: np.mean(parts, 0) for branch, parts in found.items()}

    def branches(self, member: Heard, number: int) -> list[str]:
        """Names of the K columns."""
        count = member.values[number].shape[1]
        if member.what == "attention" and count == 1:
            return ["attention"]
        names = self.names if count == len(self.names) else map(str, range(count))
        return [f"{member.what}_{name}" for name in names]


def spread_of(encoder: nn.Module) -> Spread:
    """How attention to the instances that an encoder gives is spread over a volume."""
    if isinstance(encoder, SlicewiseEncoder):
        return partial(slice_density, axis=encoder.axis)
    if isinstance(encoder, WindowsEncoder):
        return partial(window_density, windows=encoder.windows)
    return partial(spread_boxes, boxes=token_boxes, how=box_density)


def note_scores(
    heard: Heard, experiment: Experiment, logits: list[Tensor], places: list[np.ndarray]
) -> None:
    """Scores of the windows of each volume of a batch, from their logits (n, K)."""
    objective = experiment.predictor
    heard.values.extend(objective.scores_of(each.float()).values for each in logits)
    heard.places.extend(places)


def note_attention(heard: Heard, head: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook: attention over the parts of each volume of a batch.

    Raises:
        UserError: they have no place.
    """
    assert isinstance(head, AttentionHead)
    features = inputs[0]
    if not isinstance(features, Features) or (features.places is None and not features.grid):
        raise UserError("infer.volume_maps: the instances of this model have no place in a volume")
    bags = as_bags(features)
    known = isinstance(output, dict) and "scores" in output
    raw = output["scores"] if known else head.attention(features)[0]
    shares = segment_softmax(raw.float(), bags)
    heard.values.extend(part.cpu().numpy() for part in bags.split(shares))
    heard.places.extend(token_places(features, 0))


def frame(split: Split, row: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine and voxels X, Y, Z of a prepared volume; without an affine of its own the voxels are
    its mm."""
    rows = np.array([row])
    if split.source.windows is None:
        (volume,) = split.source.fetch(rows)
        return np.eye(4), tuple(volume.shape[1:])
    (volume,) = split.source.windows(rows)
    return volume.affine, tuple(volume.shape[1:])
