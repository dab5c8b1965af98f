"""A real data set that needs no download: pieces of ICBM152, the average brain of 152 people, whose
T1 image and maps of grey and white matter lie in the package nilearn (1 mm voxels; Fonov et al.
2011). Specs name the functions of this module as `data.target`.

The left half of the brain trains and validates, the right half tests. Validation takes one of five
blocks from back to front; no piece of one split shares a voxel with a piece of another.

M pieces, N pieces of a split, C channels, X Y Z voxels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from glovita_lib.data import Data, Source, Split, VolumeSamples
from glovita_lib.data_splits import VAL
from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError
from glovita_lib.spec import expand
from glovita_lib.spec_data import OwnData
from glovita_lib.spec_samples import Subtask
from glovita_lib.volume_cache import PreparedVolume

MAPS = ("t1", "gm", "wm")
FILE = "package:nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
GREY, WHITE = 200, 230  # of 255; at a higher value of its map a place is of this tissue
NEITHER = 127  # of 255; where both maps together are lower, it is none of the two
HALF = 127  # of 255; above it a voxel is more than half of a tissue
NEAR = 6.0  # mm
TISSUES = ("grey", "white", "other")
FOREGROUND_STEP = 8  # of the voxels of the brain in a piece one in so many stands for all
BLOCKS = 5  # from back to front, one of them for validation
SHARES = {"train": 0.5, "val": 0.15, "test": 0.35}  # of the pieces that are asked for


# -------------------------------------------------------------------------------- the brain


@dataclass(frozen=True)
class Brain:
    """ICBM152; axes run from left to right, back to front and foot to head."""

    t1: np.ndarray  # (X, Y, Z) uint8, 0 outside the brain
    gm: np.ndarray  # (X, Y, Z) uint8, 255: all of the voxel is grey matter
    wm: np.ndarray  # (X, Y, Z) uint8, likewise white matter
    affine: np.ndarray  # (4, 4) float64, voxel to world mm


@cache
def read_brain() -> Brain:
    """The maps, read once a process.

    Raises:
        UserError: the package or a file of it is missing.
    """
    import nibabel

    paths = [expand(FILE.format(name)) for name in MAPS]
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise UserError(
            f"data.target: the volumes of ICBM152 are in the package nilearn, {missing[0]} is not"
            " there: pip install --no-deps nilearn"
        )
    t1, gm, wm = (nibabel.Nifti1Image.from_filename(path) for path in paths)
    maps = [np.asarray(image.dataobj) for image in (t1, gm, wm)]
    return Brain(maps[0], maps[1], maps[2], np.asarray(t1.affine, np.float64))


# ----------------------------------------------------------------------------- where pieces lie


def regions(middles: np.ndarray, size: int, seed: int) -> dict[str, np.ndarray]:
    """Which middles (M, 3) of pieces that lie wholly inside may be drawn for a split, (M,) bool.

    Pieces of two splits share no voxel: those of the halves keep to their side of the middle plane,
    and from back to front the middles of train and val are a piece apart.
    """
    brain = read_brain()
    first, last = np.flatnonzero(brain.t1.any((0, 2)))[[0, -1]]
    x, y = middles[:, 0], middles[:, 1]
    half = len(brain.t1) // 2
    block = hash_seed(seed, VAL) % BLOCKS
    start, stop = first + (last + 1 - first) * np.array([block, block + 1]) // BLOCKS
    left, inside = x - size // 2 + size <= half, (y >= start) & (y < stop)
    return {
        "train": left & ((y <= start - size) | (y >= stop + size - 1)),
        "val": left & inside,
        "test": x - size // 2 > half,
    }


def middles_of(found: np.ndarray, size: int) -> np.ndarray:
    """Voxels (M, 3) of a mask (X, Y, Z) around which a piece lies wholly inside, in their order."""
    middles = np.argwhere(found)
    start = middles - size // 2
    return middles[((start >= 0) & (start + size <= found.shape)).all(1)]


def draw(
    found: np.ndarray, size: int, counts: Mapping[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Middles (N, 3) of the pieces of each split, drawn from a mask without repetition.

    Args:
        found: (X, Y, Z), voxels that may be the middle of a piece.
        size: side of the pieces, voxels.
        counts: pieces of each split.
        seed: of the block of validation; all else is the same for every seed.

    Raises:
        UserError: there are not so many.
    """
    middles = middles_of(found, size)
    drawn = {}
    for split, allowed in regions(middles, size, seed).items():
        rows = np.flatnonzero(allowed)
        if len(rows) < counts[split]:
            raise UserError(
                f"data.options: {counts[split]} pieces of {size} voxels asked for the {split}"
                f" split, there are {len(rows)}: ask for fewer or smaller ones"
            )
        chosen = np.random.default_rng(0).choice(rows, counts[split], replace=False)
        drawn[split] = middles[np.sort(chosen)]
    return drawn


# ------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class Pieces(Source):
    """Pieces of volumes in memory, each with its place in the world."""

    voxels: np.ndarray  # (N, C, X, Y, Z)
    affines: np.ndarray  # (N, 4, 4)

    @property
    def uniform(self) -> tuple[int, ...]:
        return self.voxels.shape[1:]

    @property
    def sizes(self) -> np.ndarray:
        return np.tile(self.voxels.shape[2:], (len(self.voxels), 1))

    def windows(self, rows: np.ndarray) -> list[PreparedVolume]:
        """Pieces that are cut where they are read."""
        return [self.one(row) for row in rows]

    def one(self, row: int) -> PreparedVolume:
        """A piece; its foreground are voxels of the brain."""
        voxels = self.voxels[row]
        inside = np.argwhere(voxels[0] > -1)[::FOREGROUND_STEP].astype(np.int32)
        fill = voxels.min((1, 2, 3))
        return PreparedVolume(voxels, affine=self.affines[row], fill=fill, foreground=inside)

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        return self.voxels[rows]

    def nbytes(self) -> int:
        return self.voxels.nbytes

    def select(self, rows: np.ndarray) -> "Pieces":
        return Pieces(self.voxels[rows], self.affines[rows])


def cut(middles: np.ndarray, size: int) -> Pieces:
    """Pieces of the T1 image around voxels (N, 3): (N, 1, size, size, size) float32, black -1 and
    white 1."""
    brain = read_brain()
    starts = middles - size // 2
    affines = np.tile(brain.affine, (len(starts), 1, 1))
    affines[:, :3, 3] += starts @ brain.affine[:3, :3].T
    voxels = around(brain.t1, starts, size)[:, None].astype(np.float32)
    return Pieces(voxels / np.float32(127.5) - 1, affines)


def around(volume: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """Cubes of a volume from voxels (N, 3) on: (N, size, size, size)."""
    cubes = np.lib.stride_tricks.sliding_window_view(volume, (size,) * 3)
    return cubes[tuple(starts.T)]


def names(middles: np.ndarray) -> list[str]:
    """Ids of pieces: the voxel in the middle, world mm (MNI)."""
    places = middles @ read_brain().affine[:3, :3].T + read_brain().affine[:3, 3]
    return ["_".join(f"{side:.0f}" for side in place) for place in places]


# ---------------------------------------------------------------------------------- data sets


def tissue(spec: OwnData, seed: int, *, pieces: int = 3000, size: int = 16) -> Data:
    """Which tissue is in the middle of a piece of the T1 image: grey matter, white matter or
    neither, each as often, by the means of their maps over the middle; borders where none of the
    three is clear are left out.

    Args:
        pieces: of all splits together.
        size: side of a piece, voxels.
    """
    brain = read_brain()
    gm, wm = over_middle(brain.gm, size), over_middle(brain.wm, size)
    neither = middles_near(size) & (gm + wm < NEITHER)
    counts = {split: round(pieces * share / 3) for split, share in SHARES.items()}
    each = [draw(mask, size, counts, seed) for mask in (gm > GREY, wm > WHITE, neither)]
    middles = {split: np.concatenate([part[split] for part in each]) for split in counts}
    targets = {split: np.repeat(np.arange(3), count) for split, count in counts.items()}
    return data_set("icbm_tissue", "multiclass", TISSUES, middles, targets, size)


def white_depth(spec: OwnData, seed: int, *, pieces: int = 3000, size: int = 16) -> Data:
    """How deep in white matter the middle of a piece of the T1 image lies: its distance to the
    surface of white matter, mm, below 0 outside, for places up to NEAR from that surface.

    Args:
        pieces: of all splits together.
        size: side of a piece, voxels.
    """
    counts = {split: round(pieces * share) for split, share in SHARES.items()}
    depth = over_middle(depth_in(read_brain().wm > HALF), size)
    middles = draw((np.abs(depth) < NEAR) & middles_near(size), size, counts, seed)
    targets = {split: depth[tuple(places.T)][:, None] for split, places in middles.items()}
    return data_set("icbm_white_depth", "regression", ("depth_mm",), middles, targets, size)


def over_middle(volume: np.ndarray, size: int) -> np.ndarray:
    """Means of a volume (X, Y, Z) over what is in the middle of a piece around each voxel: that
    voxel, or with an even side the eight up to it, so that a mirrored piece has the same middle."""
    from scipy.ndimage import uniform_filter

    return uniform_filter(volume.astype(np.float64), 2 - size % 2, mode="nearest")


def lesions(
    spec: OwnData, seed: int, *, pieces: int = 600, size: int = 24, radius: float = 3.5
) -> Data:
    """Which pieces of the T1 image have a lesion: a ball in white matter, as bright as grey matter.
    Half of them have one; all are drawn around places deep in white matter, so that how much there
    is of each tissue tells next to nothing. Ids tell where it is, world mm (MNI).

    Args:
        pieces: of all splits together.
        size: side of a piece, voxels.
        radius: of a lesion, mm.
    """
    from scipy.ndimage import distance_transform_edt

    deep = distance_transform_edt(read_brain().wm > HALF) > radius + 0.5
    counts = {split: 2 * round(pieces * share / 2) for split, share in SHARES.items()}
    splits = {
        split: planted(places, size, deep, radius)
        for split, places in draw(deep, size, counts, seed).items()
    }
    classes = ("none", "lesion")
    return Data("icbm_lesions", splits, "multiclass", classes, VolumeSamples(channels=1))


def planted(middles: np.ndarray, size: int, deep: np.ndarray, radius: float) -> Split:
    """Pieces around middles (N, 3), of which every second has a lesion.

    Args:
        deep: (X, Y, Z), where the middle of a lesion may be.
        radius: of a lesion, voxels.
    """
    brain, rng = read_brain(), np.random.default_rng(0)
    found, ids = cut(middles, size), names(middles)
    bright = np.median(brain.t1[brain.gm > GREY]) / 127.5 - 1
    edge = int(np.ceil(radius))
    inner = (slice(edge, size - edge),) * 3  # the whole lesion is in the piece
    for row in range(1, len(middles), 2):
        start = middles[row] - size // 2
        allowed = np.argwhere(around(deep, start[None], size)[0][inner]) + edge
        place = rng.choice(allowed)
        grid = np.indices((size,) * 3) - place[:, None, None, None]
        share = np.clip(radius + 0.5 - np.sqrt((grid**2).sum(0)), 0, 1)  # of each voxel
        voxels = found.voxels[row, 0]
        voxels += share.astype(np.float32) * (np.float32(bright) - voxels)
        (world,) = names((start + place)[None])
        ids[row] += f"_lesion_{world}"
    return Split(ids, np.arange(len(middles)) % 2, found)


def depth_in(mask: np.ndarray) -> np.ndarray:
    """Distance (X, Y, Z) of voxels of 1 mm to the surface of a mask, half a voxel from the middle
    of the nearest voxel on its other side, mm; below 0 outside of it."""
    from scipy.ndimage import distance_transform_edt

    return np.where(mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask))


def middles_near(size: int) -> np.ndarray:
    """Voxels (X, Y, Z) whose piece holds a voxel of the brain."""
    from scipy.ndimage import maximum_filter

    return maximum_filter(read_brain().t1, size) > 0


def data_set(
    name: str,
    subtask: Subtask,
    outputs: tuple[str, ...],
    middles: dict[str, np.ndarray],
    targets: dict[str, np.ndarray],
    size: int,
) -> Data:
    """The pieces around middles (N, 3) of each split with their targets."""
    splits = {
        split: Split(names(places), targets[split], cut(places, size))
        for split, places in middles.items()
    }
    return Data(name, splits, subtask, outputs, VolumeSamples(channels=1))
