"""Volume files: NIfTI, NumPy, blosc2 and DICOM, as arrays in world orientation with their affine.

Axes: C channels; X Y Z voxels, in canonical orientation from left to right, back to front and foot
to head (RAS). The affine (4, 4) takes voxel indices to world millimetres in RAS axes.

What a file is taken for:

- NIfTI (.nii, .nii.gz): (X, Y, Z) is one channel, an RGB type is three. A fourth axis longer than 1
  is refused unless a frame is chosen, or all frames are channels. Units of metres and micrometres
  become millimetres; sform counts before qform, as in nibabel.
- NumPy and blosc2 (.npy, .npz, .b2nd): (X, Y, Z) or, as nnU-Net stores them, (C, X, Y, Z). Geometry
  stands in entries `affine` or `spacing` of a .npz, in vlmeta of a .b2nd, or is that of the
  `Reading`; without an affine the grid is that of the file beside it in a sample, or, where none
  knows its own, the axes are taken for RAS.
- DICOM: a folder of slices of one series, at any depth, or one file with many frames. Spacing
  comes from the positions of the slices, never from SliceThickness; values are those after rescale
  slope and intercept.
"""

import gzip
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from glovita_lib.errors import UserError, listed, reason
from glovita_lib.read_dicom import SLICE_SUFFIXES, Box, is_dicom, open_series, shape_text

SUFFIXES = (".nii", ".nii.gz", ".npy", ".npz", ".b2nd", ".dcm")
CANONICAL = "RAS"


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read, where they do not say it themselves."""

    canonical: bool
    """Whether axes are turned to RAS; else they stay as they are stored."""
    frame: int | Literal["channels"] | None
    """Which frame of a NIfTI file with four axes is taken; "channels": each is a channel."""
    series: tuple[str, ...]
    """Conditions of a DICOM series, "Keyword=pattern", several joined by &; each picks one."""
    array_key: str | None
    """Entry of a .npz that is the volume; None: the only one that is no geometry."""
    array_spacing: tuple[float, float, float] | None
    """Spacing of arrays that have none of their own, mm."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A volume as it lies in its file."""

    shape: tuple[int, int, int, int]
    """(C, I, J, K) in the order of the file."""
    affine: np.ndarray
    """(4, 4) float64, indices I, J, K to mm."""
    has_spacing: bool
    """Whether the lengths of the affine come from somewhere, and are not made up."""
    has_place: bool
    """Whether its directions and its origin do too."""
    load: Callable[[Box | None], np.ndarray]
    """Reads (C, i, j, k), all of it or a part."""
    files: tuple[str, ...]
    """Every file that it is read from."""
    frames: int = 1
    """How many there are to choose from."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume that is open: geometry known, voxels not yet read."""

    path: str
    stored: Stored
    axes: tuple[int, int, int]
    """Stored axis that is X, Y, Z."""
    flips: tuple[bool, bool, bool]
    """Whether X, Y, Z run against the stored axis."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, X, Y, Z)."""
        x, y, z = (self.stored.shape[1 + axis] for axis in self.axes)
        return self.stored.shape[0], x, y, z

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) float64, voxel to world mm."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for axis, (stored, flipped) in enumerate(zip(self.axes, self.flips, strict=True)):
            turn[stored, axis] = -1 if flipped else 1
            turn[stored, 3] = self.shape[1 + axis] - 1 if flipped else 0
        return self.stored.affine @ turn

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along X, Y, Z, mm."""
        return spacing_of(self.affine)

    def read(self, box: Box | None = None) -> np.ndarray:
        """Voxels (C, x, y, z), all of them or a box: integers as they are stored, else float32.

        Of uncompressed files (.nii, .npy), .b2nd and DICOM only that part is read.

        Raises:
            UserError: the file is broken; one line with the path.
        """
        with reading(self.path):
            voxels = self.stored.load(None if box is None else self.stored_box(box))
            if voxels.dtype.kind == "f" and voxels.dtype != np.float32:
                with np.errstate(over="ignore"):  # becomes infinity, which is refused later
                    voxels = voxels.astype(np.float32)
            voxels = voxels.transpose(0, *(1 + axis for axis in self.axes))
            turned = voxels[(slice(None), *(slice(None, None, -1 if f else 1) for f in self.flips))]
            return np.ascontiguousarray(turned, turned.dtype.newbyteorder("="))

    def stored_box(self, box: Box) -> Box:
        """The box in the axes of the file."""
        found = [slice(0)] * 3
        for axis, part in enumerate(box):
            size = self.shape[1 + axis]
            start, stop, _ = part.indices(size)
            ends = (size - stop, size - start) if self.flips[axis] else (start, stop)
            found[self.axes[axis]] = slice(*ends)
        return found[0], found[1], found[2]


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Lengths of the columns of an affine, mm: the distances of neighbouring voxels."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


def open_volume(path: str, how: Reading, series: str | None = None) -> Volume:
    """The geometry of a volume file or a DICOM folder.

    A file whose end is missing is found here too, without reading the voxels.

    Args:
        series: condition of the DICOM series, see `Reading`.

    Raises:
        UserError: missing, unreadable, broken, of another rank, or with an affine that places no
            voxel; one line with the path.
    """
    with reading(path):
        stored = open_stored(path, how, series)
        if 0 in stored.shape:
            raise UserError(f"no voxels: its shape is {shape_text(stored.shape)}")
        check_affine(stored.affine)
        return Volume(path, stored, *orientation(stored.affine, how))


def open_stored(path: str, how: Reading, series: str | None) -> Stored:
    """A volume by the suffix of its file, or of a folder."""
    name = path.lower()
    if os.path.isdir(path):
        return open_dicom(path, series)
    if not os.path.exists(path):
        raise FileNotFoundError
    if not os.path.getsize(path):
        raise UserError("an empty file")
    if name.endswith((".nii", ".nii.gz")):
        return open_nifti(path, how)
    if name.endswith((".npy", ".npz")):
        return open_numpy(path, how)
    if name.endswith(".b2nd"):
        return open_blosc2(path, how)
    if name.endswith(SLICE_SUFFIXES) or is_dicom(path):
        return open_dicom(path, series)
    raise UserError(f"no volume file: its suffix is none of {', '.join(SUFFIXES)}")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what goes wrong with a file into one line with its path.

    Readers raise anything on broken files, so all exceptions count as such: the block must hold
    calls of readers only.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except MemoryError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(
            f'{path}: needs {package}: pip install {package} (or "glovita[volumes]")'
        ) from None
    except Exception as error:
        raise UserError(f"{path}: broken volume file ({reason(error)})") from error


# ---------------------------------------------------------------------- orientation


def check_affine(affine: np.ndarray) -> None:
    """Refuse an affine that does not place the voxels in space.

    Raises:
        UserError: it is not finite, singular, as one of zeros is, or has another last row.
    """
    columns = affine[:3, :3]
    cure = "write the file anew with its affine (nibabel.Nifti1Image(voxels, affine))"
    if not np.isfinite(affine).all():
        raise UserError(f"its affine has NaN or infinite entries: {cure}")
    sizes = np.linalg.norm(columns, axis=0)
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        row = " ".join(f"{entry:g}" for entry in affine[3])
        raise UserError(
            f"the last row of its affine is {row}, not 0 0 0 1, as if transposed: {cure}"
        )
    if not sizes.all() or abs(np.linalg.det(columns / sizes)) < 1e-4:
        numbers = "; ".join(" ".join(f"{entry:g}" for entry in row) for row in affine[:3])
        raise UserError(f"its affine ({numbers}) is singular and places no voxel in space: {cure}")


def orientation(
    affine: np.ndarray, how: Reading
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Stored axis of X, Y, Z and whether it is reversed, as nibabel finds the closest ones."""
    if not how.canonical:
        return (0, 1, 2), (False, False, False)
    from nibabel.orientations import io_orientation

    found = io_orientation(affine)  # (3, 2): of each stored axis its world axis and direction
    order = np.argsort(found[:, 0])
    x, y, z = (int(axis) for axis in order)
    along, across, up = (bool(found[axis, 1] < 0) for axis in order)
    return (x, y, z), (along, across, up)


# ---------------------------------------------------------------------- NIfTI

UNITS = {"meter": 1000.0, "micron": 0.001}  # in mm; unknown units are taken for mm


def open_nifti(path: str, how: Reading) -> Stored:
    """A NIfTI-1 or NIfTI-2 file.

    Raises:
        UserError: cut off, complex numbers, a single axis, no distances of voxels, or several
            frames of which none is chosen.
    """
    import nibabel

    nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # it names no files: see check_header
    image: Any = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is derived from it
        raise UserError(f"no NIfTI file but {type(image).__name__}")
    proxy: Any = image.dataobj
    kind = image.get_data_dtype()
    if kind.kind == "c":
        raise UserError("complex numbers: save the magnitude")
    if len(proxy.shape) < 2:
        raise UserError(f"1-D, {shape_text(proxy.shape)}: expected axes (X, Y, Z) or (X, Y)")
    check_header(image)
    check_length(path, proxy.offset + int(np.prod(proxy.shape, dtype=np.int64)) * kind.itemsize)
    affine = image.affine.astype(np.float64)
    affine[:3] *= UNITS.get(image.header.get_xyzt_units()[0], 1.0)
    colours = len(kind.names) if kind.names else 1
    frames, chosen = chosen_frames(proxy.shape, how.frame)

    def load(box: Box | None) -> np.ndarray:
        part = (slice(None),) * 3 if box is None else box
        index = (*part[: len(proxy.shape)], *chosen)
        gz = path.lower().endswith(".gz")
        # nibabel applies slope and intercept
        voxels = checked_voxels(path, type(image), index) if gz else proxy[index]
        spatial = voxels.shape[: min(3, len(proxy.shape))]
        voxels = voxels.reshape((*spatial, 1, 1)[:3] + (-1,), order="F")
        parts = [voxels[name] for name in kind.names] if kind.names else [voxels]
        return np.concatenate([np.moveaxis(part, -1, 0) for part in parts])

    along, across, up = (*proxy.shape, 1, 1)[:3]
    shape = frames * colours, along, across, up
    every = int(np.prod(proxy.shape[3:], dtype=np.int64))
    return Stored(shape, affine, True, True, load, (path,), every)


def check_header(image: Any) -> None:
    """Refuse what nibabel takes for 1 mm or reads all the same: distances of 0 mm where no sform
    says others, and voxels that begin inside of the header.

    Args:
        image: nibabel's image of a NIfTI file.

    Raises:
        UserError: one of them.
    """
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
        header = image.header_class.from_fileobj(file, check=False)  # as it is stored
    cure = "write the file anew with its affine (nibabel.Nifti1Image(voxels, affine))"
    distances = header["pixdim"][1 : 1 + min(3, len(image.shape))]
    if not image.header["sform_code"] and not distances.all():
        numbers = " x ".join(f"{number:g}" for number in distances)
        raise UserError(f"its voxels are {numbers} mm apart and it has no sform: {cure}")
    if image.dataobj.offset < image.header_class.single_vox_offset:
        raise UserError(
            f"its voxels begin at byte {image.dataobj.offset}, inside of its header (vox_offset):"
            f" {cure}"
        )


def checked_voxels(path: str, kind: Any, index: tuple[int | slice, ...]) -> np.ndarray:
    """Voxels of a compressed NIfTI file, of which all is unpacked, so that its checksum counts.

    Args:
        kind: nibabel's class of its image.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with gzip.open(path) as file:
            voxels = kind.from_stream(file).dataobj[index]
            while file.read(2**22):  # to the checksum, which nibabel does not reach
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"truncated or damaged: {reason(error)}") from None
    return voxels


def chosen_frames(
    shape: tuple[int, ...], frame: int | Literal["channels"] | None
) -> tuple[int, tuple[int | slice, ...]]:
    """Number of frames that are taken of an array with more than three axes, and their indices
    along the axes after the third.

    Raises:
        UserError: there are several and none is chosen, or there is no such frame.
    """
    beyond = shape[3:]
    count = int(np.prod(beyond, dtype=np.int64))
    if count <= 1 or frame == "channels":
        return count, (slice(None),) * len(beyond)
    if frame is None:
        raise UserError(
            f"{len(shape)}-D, {count} frames of {shape_text(shape[:3])}: choose one with"
            ' data.reading.frame = 0, or take all as channels with data.reading.frame = "channels"'
        )
    if frame >= count:
        raise UserError(f"data.reading.frame = {frame} does not exist: frames 0 to {count - 1}")
    return 1, tuple(int(place) for place in np.unravel_index(frame, beyond, order="F"))


def check_length(path: str, needed: int) -> None:
    """Refuse a file that is shorter than its header says.

    Of a gzip file its last four bytes tell; only where they tell another length it is read.

    Raises:
        UserError: it is.
    """
    size = os.path.getsize(path)
    if not path.lower().endswith(".gz"):
        if size < needed:
            raise UserError(f"truncated: {size:,} bytes, its header announces {needed:,}")
        return
    with open(path, "rb") as file:
        file.seek(max(0, size - 4))
        tail = file.read()
    if tail == struct.pack("<I", needed % 2**32):
        return
    length = 0
    try:
        with gzip.open(path) as unpacked:
            while part := unpacked.read(2**22):
                length += len(part)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"truncated or damaged: {reason(error)}") from None
    if length < needed:
        raise UserError(f"truncated: {length:,} bytes unpacked, its header announces {needed:,}")


# ---------------------------------------------------------------------- arrays

GEOMETRY = ("affine", "spacing")  # entries beside the array that say where it lies


def open_numpy(path: str, how: Reading) -> Stored:
    """A .npy file, memory-mapped, or an entry of a .npz.

    Raises:
        UserError: no numbers, another rank, or several entries.
    """
    if path.lower().endswith(".npy"):
        try:
            return array_volume(path, np.load(path, mmap_mode="r"), {}, how)
        except ValueError as error:
            if "mmap length" not in str(error):
                raise
            size = os.path.getsize(path)
            raise UserError(f"truncated: {size:,} bytes, its header announces more") from None
    with np.load(path) as entries:
        beside = {name: entries[name] for name in GEOMETRY if name in entries.files}
        key = array_entry(entries.files, how.array_key)
        volume = entries[key]
    return array_volume(path, volume, beside, how)


def array_entry(names: Sequence[str], wanted: str | None) -> str:
    """Name of the volume among the entries of a .npz."""
    found = [name for name in names if name not in GEOMETRY]
    if wanted is not None:
        if wanted not in names:
            raise UserError(f'no entry "{wanted}" (data.reading.array_key); it has {listed(names)}')
        return wanted
    if len(found) != 1:
        raise UserError(
            f"{len(found)} arrays ({listed(found)}): name the volume with data.reading.array_key"
        )
    return found[0]


def open_blosc2(path: str, how: Reading) -> Stored:
    """A .b2nd file, of which parts are decompressed."""
    import blosc2

    array: Any = blosc2.open(path, mode="r")
    beside = {name: array.schunk.vlmeta[name] for name in GEOMETRY if name in array.schunk.vlmeta}
    return array_volume(path, array, beside, how)


def array_volume(path: str, array: Any, beside: dict[str, Any], how: Reading) -> Stored:
    """A volume that is an array (X, Y, Z) or (C, X, Y, Z) of numbers, or (X, Y), one slice."""
    if array.dtype.kind not in "biuf":
        raise UserError(f"no numbers but {array.dtype}")
    if len(array.shape) not in (2, 3, 4):
        raise UserError(
            f"{len(array.shape)}-D, {shape_text(array.shape)}: expected axes (X, Y, Z),"
            " (C, X, Y, Z) or, of a single slice, (X, Y)"
        )
    affine = array_affine(beside, how)

    def load(box: Box | None) -> np.ndarray:
        part = (slice(None),) * 3 if box is None else box
        leading = (slice(None),) if len(array.shape) == 4 else ()
        if len(array.shape) == 2:
            voxels = np.asarray(array[part[:2]])[:, :, None][:, :, part[2]]
        else:
            voxels = np.asarray(array[leading + part])
        voxels = voxels.view(np.uint8) if voxels.dtype == bool else voxels
        return voxels if leading else voxels[None]

    shape = array.shape if len(array.shape) == 4 else (1, *array.shape, 1)[:4]
    if affine is None:
        return Stored(shape, np.eye(4), False, False, load, (path,))
    return Stored(shape, affine, True, "affine" in beside, load, (path,))


def array_affine(beside: dict[str, Any], how: Reading) -> np.ndarray | None:
    """The affine of an array; None where nothing says anything."""
    affine = np.eye(4)
    if "affine" in beside:
        affine = np.asarray(beside["affine"], np.float64)
        if affine.shape != (4, 4):
            raise UserError(f"its affine has shape {shape_text(affine.shape)}, expected 4 x 4")
        return affine
    spacing = beside.get("spacing", how.array_spacing)
    if spacing is None:
        return None
    numbers = np.asarray(spacing, np.float64)
    if numbers.shape != (3,) or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise UserError(f"its spacing {numbers.tolist()} must be three positive numbers, mm")
    affine[range(3), range(3)] = numbers
    return affine


# ---------------------------------------------------------------------- DICOM


def open_dicom(path: str, series: str | None) -> Stored:
    """A series of DICOM slices, see `open_series`."""
    found = open_series(path, series)

    def load(box: Box | None) -> np.ndarray:
        return found.read(box)[None]

    return Stored((1, *found.shape), found.affine, True, True, load, found.files)


# ---------------------------------------------------------------------- samples of several files

GRID_SLACK = 0.1  # voxels by which the corners of channels may lie apart
SAME_SPACING = 0.01  # relative difference up to which spacings are the same


@dataclass(frozen=True, slots=True)
class Sample:
    """The files and series whose channels make up one sample, all on one grid."""

    volumes: tuple[Volume, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, X, Y, Z)."""
        return sum(each.shape[0] for each in self.volumes), *self.volumes[0].shape[1:]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) float64, voxel to world mm."""
        return self.volumes[0].affine

    @property
    def has_spacing(self) -> bool:
        """Whether the spacing is known."""
        return self.volumes[0].stored.has_spacing

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that it is read from."""
        return tuple(dict.fromkeys(file for each in self.volumes for file in each.stored.files))

    def read(self, box: Box | None = None) -> np.ndarray:
        """Voxels (C, x, y, z), see `Volume.read`; of mixed types the one that holds all."""
        parts = [each.read(box) for each in self.volumes]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def open_sample(paths: Sequence[str], how: Reading) -> Sample:
    """The channels of a sample: those of each file in turn, or of each series of one DICOM folder.

    Raises:
        UserError: see `open_volume`; or the files do not lie on one grid, or none has the frame
            that is asked for.
    """
    series: Sequence[str | None] = how.series or [None]
    if len(paths) == 1:
        pairs = [(paths[0], each) for each in series]
    elif len(series) == 1:
        pairs = [(path, series[0]) for path in paths]
    else:
        pairs = list(zip(paths, series, strict=True))
    volumes = placed([open_volume(path, how, each) for path, each in pairs])
    first = volumes[0]
    if isinstance(how.frame, int) and how.frame > 0 and all(v.stored.frames == 1 for v in volumes):
        raise UserError(f"{first.path}: data.reading.frame = {how.frame} does not exist: one frame")
    for other in volumes[1:]:
        if other.shape[1:] != first.shape[1:]:
            raise UserError(
                f"{other.path}: {shape_text(other.shape[1:])} voxels, but {first.path} has"
                f" {shape_text(first.shape[1:])}: resample the channels of a sample to one grid"
            )
        away = grid_distance(first, other)
        if away > GRID_SLACK * min(first.spacing):
            raise UserError(
                f"{other.path}: lies up to {away:.3g} mm away from {first.path}: resample the"
                " channels of a sample to one grid"
            )
    return Sample(volumes)


def placed(volumes: Sequence[Volume]) -> tuple[Volume, ...]:
    """Arrays that do not know where they lie on the stored grid of the first file beside them that
    does, and so turned as it is; where none does, of the first one that knows its spacing.

    Raises:
        UserError: they have another shape or spacing than that grid.
    """
    known = next((each for each in volumes if each.stored.has_place), None)
    known = known or next((each for each in volumes if each.stored.has_spacing), None)
    if known is None:
        return tuple(volumes)
    return tuple(
        each if each is known or each.stored.has_place else on_grid(each, known) for each in volumes
    )


def on_grid(volume: Volume, known: Volume) -> Volume:
    """An array on the stored grid of a file beside it."""
    own, grid = volume.stored, known.stored
    if own.shape[1:] != grid.shape[1:]:
        raise UserError(
            f"{volume.path}: {shape_text(own.shape[1:])} voxels without an affine, but {known.path}"
            f" beside it stores {shape_text(grid.shape[1:])}: resample the channels of a sample to"
            " one grid"
        )
    spacings = spacing_of(own.affine), spacing_of(grid.affine)
    if own.has_spacing and not np.allclose(spacings[0], spacings[1], rtol=SAME_SPACING):
        mine, other = (" x ".join(f"{side:g}" for side in each) for each in spacings)
        raise UserError(
            f"{volume.path}: its spacing is {mine} mm, but that of {known.path} beside it, as it is"
            f" stored, is {other}: resample the channels of a sample to one grid"
        )
    stored = replace(own, affine=grid.affine, has_spacing=True, has_place=grid.has_place)
    return replace(volume, stored=stored, axes=known.axes, flips=known.flips)


def grid_distance(one: Volume, other: Volume) -> float:
    """Largest distance of the same corner of two volumes of one shape, mm; 0 where one of them does
    not know where it lies."""
    if not (one.stored.has_spacing and other.stored.has_spacing):
        return 0.0
    ends = np.array(one.shape[1:]) - 1
    corners = np.array([[*(ends * place), 1] for place in np.ndindex(2, 2, 2)]).T  # (4, 8)
    apart = (one.affine - other.affine) @ corners
    return float(np.linalg.norm(apart[:3], axis=0).max())
