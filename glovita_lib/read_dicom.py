"""DICOM: the slices of a series as one grid in space.

A series is known by the header of its files, which may lie at any depth below a folder, or is one
file with many frames. The spacing across comes from the positions of the slices, never from
SliceThickness; slices that make up no regular grid are refused.
"""

import fnmatch
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Never

import numpy as np

from glovita_lib.errors import UserError, listed, reason
from glovita_lib.files import open_regular
from glovita_lib.spec_volumes import CACHE

Box = tuple[slice, slice, slice]
"""A part of a volume: a slice with start and stop for each of its axes."""

POSITION_SLACK = 0.02, 0.05  # mm (a quarter of a gap at most) and share of the gap: rounding
SAME = 1e-3  # direction cosines and pixel spacings are written with few digits
UNIT = 0.02  # products of the directions of a slice may be off so far: two decimals
SLICE_SUFFIXES = (".dcm", ".ima", ".dicom")
OTHER_IMAGES = (
    "RT Dose Storage", "Segmentation Storage", "Parametric Map Storage",
    "Label Map Segmentation Storage",
)  # fmt: skip
"""Classes of images whose names do not say so."""
DECODERS = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"  # of JPEG, JPEG-LS and JPEG 2000
LONGEST_FIRST = 1024  # bytes of the first element of a file
LAST_FIRST = 0x2000  # number of the first element within its group
FIRST_GROUPS = (0x0002, 0x0008, 0x0010, 0x0018, 0x0020, 0x0028)  # that a file may begin with
TELLING = ("MediaStorageSOPClassUID", "SOPClassUID", "Rows", "Columns")  # that no other file has
CLASSES = "1.2.840.10008."  # what the UIDs of DICOM's own classes begin with
ELEMENT_HEAD = 8  # bytes of tag and length at least
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes run to left, back and head
WANTED = (
    "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Rows", "Columns", "ImageType",
    "SamplesPerPixel", "BitsAllocated", "NumberOfFrames", "ImagePositionPatient", "PixelSpacing",
    "ImageOrientationPatient", "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence", "GridFrameOffsetVector", "DoseGridScaling", "SOPClassUID",
    "SOPInstanceUID",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slice:
    """One image of a series."""

    file: str
    uid: str  # SOPInstanceUID of the file
    frame: int | None  # of a file with many
    size: tuple[int, int]  # rows, columns
    position: np.ndarray  # (3,) mm, centre of the first pixel
    cosines: np.ndarray  # (6,) directions along a row and along a column
    pixel: np.ndarray  # (2,) mm between rows, between columns
    scale: tuple[float, float] | None  # slope and intercept of a frame; None: the file's own rule


@dataclass(frozen=True, slots=True)
class Series:
    """The slices of one series, in order of their position; axes are column, row and slice."""

    slices: tuple[Slice, ...]
    affine: np.ndarray
    """(4, 4) float64, indices to mm in RAS axes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        rows, columns = self.slices[0].size
        return columns, rows, len(self.slices)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the slices, each once."""
        return tuple(dict.fromkeys(each.file for each in self.slices))

    def read(self, box: Box | None) -> np.ndarray:
        """Values (columns, rows, slices) float32 after slope and intercept, all or a box."""
        part = (slice(None),) * 3 if box is None else box
        files: dict[str, Any] = {}
        planes = [pixels(each, files)[part[1], part[0]].T for each in self.slices[part[2]]]
        return np.stack(planes, -1)


def open_series(path: str, series: str | None) -> Series:
    """The slices of one series below a folder, or of one file with many frames.

    Args:
        series: condition that picks it: "Keyword=pattern", several joined by &.

    Raises:
        UserError: no slices, several series, or slices that make up no regular grid.
    """
    headers = dicom_headers(path, series)
    return stack([each for file, header in headers for each in slices_of(file, header)])


def dicom_files(path: str) -> list[str]:
    """Files below a folder in sorted order, without hidden ones and prepared volumes; a file
    itself.

    Raises:
        UserError: a folder that cannot be listed, which may hold slices, or a link to what is not
            there.
    """
    if os.path.isfile(path):
        return [path]

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

    found = []
    for parent, folders, files in os.walk(path, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != CACHE)
        found += [os.path.join(parent, name) for name in sorted(files) if name[0] != "."]
    for file in found:
        if not os.path.exists(file):
            name = os.path.relpath(file, path)
            raise UserError(f"{name} is a link to {os.readlink(file)}, which is not there")
    return found


def dicom_headers(path: str, series: str | None) -> list[tuple[str, Any]]:
    """Files with images and their headers, of the one series that is meant.

    Raises:
        UserError: no such series or several, where the line lists those that there are; or a slice
            that is cut off.
    """
    conditions = series_conditions(series)
    images, known, others = [], set(), []
    for file in dicom_files(path):
        header = image_header(file, conditions)
        if header is None:
            others.append(file)
            continue
        known.add(name_pattern(file))
        if "Rows" in header:
            images.append((file, header))
    for file in others:  # not DICOM: a text file, a preview ... or a slice that has lost its head
        if file.lower().endswith(SLICE_SUFFIXES) or name_pattern(file) in known:
            size = os.path.getsize(file)
            raise UserError(
                f"{os.path.basename(file)} is no DICOM file but is named like one: it is"
                f" {'empty' if not size else f'damaged or cut off ({size:,} bytes)'}; restore it or"
                " move it away"
            )
    if not images:
        raise UserError("no DICOM image")
    chosen = [(file, header) for file, header in images if meets(header, conditions)]
    names = {str(header.get("SeriesInstanceUID", "")) for _, header in chosen}
    if len(names) != 1:
        cure = "choose one with data.reading.series"
        what = f"{len(names)} series" if names else f"no series with {series}"
        raise UserError(f"{what}, {cure}; there are {series_text(chosen or images)}")
    return chosen


def image_header(file: str, conditions: list[tuple[str, str]]) -> Any:
    """Header of a DICOM file, without Rows where it is no image but a report, a plan or a
    directory; None: no DICOM file.

    Raises:
        UserError: an image that is cut off, unless the conditions choose another series.
    """
    import pydicom

    tags: list[Any] = [*WANTED, *(keyword for keyword, _ in conditions)]
    name = os.path.basename(file)
    with open_regular(file) as opened:
        try:
            header = pydicom.dcmread(
                opened, stop_before_pixels=True, specific_tags=tags, force=lacks_preamble(opened)
            )
        except pydicom.errors.InvalidDicomError:
            return None
        except Exception as error:  # pydicom raises anything where bytes are missing
            raise UserError(f"{name} is truncated or damaged in its header ({error})") from None
        if "Rows" in header:
            check_pixel_bytes(file, header, opened.tell())
            return header
    elsewhere = all(keyword in header for keyword, _ in conditions) and not meets(
        header, conditions
    )
    if of_images(header) and not elsewhere:
        raise UserError(f"{name} is truncated or damaged: an image whose header lacks Rows")
    return header


def looks_dicom(name: str) -> bool:
    """Whether a file may be DICOM by its name: with a suffix for it, with a number for one, as of
    UIDs, or with none."""
    suffix = os.path.splitext(name)[1]
    return name.lower().endswith(SLICE_SUFFIXES) or not suffix or suffix[1:].isdecimal()


def is_dicom(file: str) -> bool:
    """Whether a file is DICOM by its first bytes."""
    with open_regular(file) as opened:
        return lacks_preamble(opened) or opened.read(132)[128:] == b"DICM"


def lacks_preamble(opened: BinaryIO) -> bool:
    """Whether a file begins with the elements of DICOM at once, as old exports do: pydicom reads a
    class or a size of images where its first bytes may be a tag, a type and a length."""
    head = opened.read(8)
    opened.seek(128)
    marked = opened.read(4) == b"DICM"
    opened.seek(0)
    if marked or len(head) < 8:
        return False
    group, element, length = struct.unpack("<HHL", head)
    typed = head[4:6].isalpha() and head[4:6].isupper()
    is_little = group in FIRST_GROUPS and element <= LAST_FIRST
    if is_little and (typed or length <= LONGEST_FIRST):
        return is_image_without_preamble(opened)
    (group,) = struct.unpack(">H", head[:2])  # big endian is always with types
    return typed and group in FIRST_GROUPS and is_image_without_preamble(opened)


def is_image_without_preamble(opened: BinaryIO) -> bool:
    """Whether pydicom finds elements that only DICOM has where a file begins; leaves it there."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    tags: list[Any] = [Tag(tag_for_keyword(keyword) or 0) for keyword in TELLING]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = read_partial(
                opened, lambda tag, vr, length: tag > max(tags), force=True, specific_tags=tags
            )
            told = (header.file_meta.get(TELLING[0]), *map(header.get, TELLING[:2]))
            size = [header.get(keyword) for keyword in TELLING[2:]]
    except Exception:  # pydicom raises anything where there are no elements
        return False
    finally:
        opened.seek(0)
    is_class = any(str(uid).startswith(CLASSES) for uid in told if uid)
    return is_class or all(isinstance(side, int) for side in size)


def read_image(file: str) -> Any:
    """A DICOM file with its pixels."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with open_regular(file) as opened:
        image = pydicom.dcmread(opened, force=lacks_preamble(opened))
    if "TransferSyntaxUID" not in image.file_meta:  # of a file without a head
        implicit, little = image.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return image


UIDS = ("StudyInstanceUID", "PatientID", "SeriesInstanceUID")


@dataclass(frozen=True, slots=True)
class ImageKind:
    """What the beginning of the header of a DICOM image says."""

    frames: int  # 0 of a damaged one
    met: frozenset[int]  # numbers of the conditions that it meets
    of: tuple[str, str]  # StudyInstanceUID and PatientID, empty where it has none
    series: str = ""  # SeriesInstanceUID

    @property
    def study(self) -> str:
        """StudyInstanceUID, empty where it has none."""
        return self.of[0]


DAMAGED = ImageKind(0, frozenset(), ("", ""))
"""A DICOM image whose header cannot be read."""


def image_kind(file: str, conditions: Sequence[list[tuple[str, str]]]) -> ImageKind | None:
    """What a DICOM image is; None: no DICOM image. Little of the header is read: the functional
    groups, which grow with the frames, come later."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag

    keywords = ["Rows", "NumberOfFrames", "SOPClassUID", *UIDS]
    keywords += [keyword for each in conditions for keyword, _ in each]
    tags: list[Any] = [Tag(tag_for_keyword(keyword) or 0) for keyword in keywords]
    last = max(tags)
    named = file.lower().endswith(SLICE_SUFFIXES)
    try:
        with open_regular(file) as opened:
            header = read_partial(
                opened,
                lambda tag, vr, length: tag > last,
                force=lacks_preamble(opened),
                specific_tags=tags,
            )
    except (InvalidDicomError, OSError, UserError):  # whoever reads it says so
        return DAMAGED if named else None
    except Exception:  # pydicom raises anything where bytes are missing
        return DAMAGED
    if "Rows" not in header:
        return DAMAGED if of_images(header) else None
    met = frozenset(number for number, each in enumerate(conditions) if meets(header, each))
    study, patient, series = (str(header.get(tag) or "").strip() for tag in UIDS)
    return ImageKind(int(header.get("NumberOfFrames") or 1), met, (study, patient), series)


def of_images(header: Any) -> bool:
    """Whether the class of a DICOM object is one of images, which have Rows; also where the header
    ends before it names one."""
    from pydicom.uid import UID

    whole = "TransferSyntaxUID" in header.file_meta  # which comes after the class
    uid = header.file_meta.get("MediaStorageSOPClassUID") if whole else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one that is cut off
        uid = uid or header.get("SOPClassUID")
    if not uid:
        return True
    name = UID(uid).name
    cut = name == uid and not whole
    return cut or "Image Storage" in name or name in OTHER_IMAGES


def name_pattern(file: str) -> str:
    """Folder and name of a file with a zero for each number in it, decimal or hexadecimal: the
    same for the slices of a series."""
    folder, name = os.path.split(file)
    return os.path.join(folder, re.sub(r"[a-f]*\d[\da-f]*", "0", name.lower()))


def series_conditions(series: str | None) -> list[tuple[str, str]]:
    """Keywords and patterns of a condition such as "SeriesDescription=t1*"."""
    parts = [part.partition("=") for part in series.split("&")] if series else []
    return [(keyword.strip(), pattern.strip()) for keyword, _, pattern in parts]


def meets(header: Any, conditions: list[tuple[str, str]]) -> bool:
    """Whether a header has values that match all patterns; * and ? are wild, square brackets are
    themselves, letters of either case are the same."""
    return all(
        fnmatch.fnmatchcase(
            str(header.get(keyword, "")).lower(), pattern.lower().replace("[", "[[]")
        )
        for keyword, pattern in conditions
    )


def series_text(images: list[tuple[str, Any]]) -> str:
    """The series of some files, as a user may choose them."""
    counts = Counter(
        (str(header.get("SeriesDescription", "")), str(header.get("SeriesInstanceUID", "")))
        for _, header in images
    )
    found = (
        f"SeriesDescription={name or '(none)'} SeriesInstanceUID={uid or '(none)'} ({count} files)"
        for (name, uid), count in counts.items()
    )
    return listed(found, 5, "; ")


def check_pixel_bytes(file: str, header: Any, start: int) -> None:
    """Refuse an image that is cut off before its pixels or, if uncompressed, within them.

    Args:
        start: byte of the file where the element of the pixels begins.

    Raises:
        UserError: the file is shorter than its pixels.
    """
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_deflated:
        return
    name, size = os.path.basename(file), os.path.getsize(file)
    if size < start + ELEMENT_HEAD:
        raise UserError(f"{name} is truncated: it ends before its pixels")
    if syntax is not None and syntax.is_encapsulated:
        return
    count = header.Rows * header.Columns * int(header.get("NumberOfFrames") or 1)
    needed = count * header.get("SamplesPerPixel", 1) * header.get("BitsAllocated", 16) // 8
    if size < start + needed:
        raise UserError(f"{name} is truncated: its pixels take {needed:,} bytes")


def slices_of(file: str, header: Any) -> Iterator[Slice]:
    """The images of one file.

    Raises:
        UserError: colours, mosaics, or images without a place in space.
    """
    name = os.path.basename(file)
    if header.get("SamplesPerPixel", 1) != 1:
        raise UserError(f"{name} is a colour image, no slice of a volume")
    if "MOSAIC" in list(header.get("ImageType") or []):
        raise UserError(f"{name} is a mosaic of slices: convert it to NIfTI (dcm2niix)")
    count, size = int(header.get("NumberOfFrames") or 1), (header.Rows, header.Columns)
    frames = header.get("PerFrameFunctionalGroupsSequence")
    offsets = header.get("GridFrameOffsetVector")
    if offsets is not None and not header.get("DoseGridScaling"):
        raise UserError(f"{name} is an RT Dose without DoseGridScaling: its doses are not known")
    for number in range(count):
        groups = [frames[number]] if frames else []
        groups += list(header.get("SharedFunctionalGroupsSequence") or [])
        position = numbers(header, groups, "PlanePositionSequence", "ImagePositionPatient")
        cosines = numbers(header, groups, "PlaneOrientationSequence", "ImageOrientationPatient")
        pixel = numbers(header, groups, "PixelMeasuresSequence", "PixelSpacing")
        if position is None or cosines is None or pixel is None:
            raise UserError(
                f"{name} lacks ImagePositionPatient, ImageOrientationPatient or PixelSpacing, and"
                " so has no place in space"
            )
        if count > 1 and not frames:
            if offsets is None or len(offsets) != count:
                raise UserError(f"{name} has {count} frames without positions")
            normal = np.cross(cosines[:3], cosines[3:])
            position = position + (float(offsets[number]) - float(offsets[0])) * normal
        frame = number if count > 1 or frames else None
        uid = str(header.get("SOPInstanceUID") or "")
        yield Slice(file, uid, frame, size, position, cosines, pixel, frame_scale(groups))


def numbers(header: Any, groups: Sequence[Any], sequence: str, keyword: str) -> np.ndarray | None:
    """Numbers of a frame, from the functional groups or the header itself; None: neither."""
    places = [group[sequence][0] for group in groups if group.get(sequence)]
    for place in [*places, header]:
        if place.get(keyword) is not None and len(place.get(keyword)):
            return np.array([float(number) for number in place.get(keyword)])
    return None


def frame_scale(groups: Sequence[Any]) -> tuple[float, float] | None:
    """Slope and intercept that the functional groups give a frame."""
    for group in groups:
        if found := group.get("PixelValueTransformationSequence"):
            return rescale(found[0])
    return None


def rescale(place: Any) -> tuple[float, float]:
    """Slope and intercept of a header or functional group, each alone too: 1 and 0 where they are
    missing or empty. The doses of RT Dose are scaled by DoseGridScaling (PS3.3 C.8.8.3).

    Raises:
        UserError: the slope is 0.
    """
    factors = [place.get(keyword) for keyword in ("RescaleSlope", "DoseGridScaling")]
    slope = float(np.prod([float(factor) for factor in factors if factor not in (None, "")]))
    if not slope:
        raise UserError("its RescaleSlope is 0, which makes all values equal: write the right one")
    return slope, float(place.get("RescaleIntercept") or 0)


def modality_values(stored: np.ndarray, header: Any) -> np.ndarray:
    """Values float of the stored numbers of a file, by its lookup table or slope and intercept."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, header)
    slope, intercept = rescale(header)
    return stored * slope + intercept


def pixels(each: Slice, files: dict[str, Any]) -> np.ndarray:
    """Values (rows, columns) float32 of a slice, after slope and intercept.

    Args:
        files: decoded files with many frames, which are kept for their other frames.
    """
    if each.frame is None:
        image = read_image(each.file)
        return modality_values(decoded(image), image).astype(np.float32)
    if each.file not in files:
        image = read_image(each.file)
        stack = decoded(image)
        stack = stack[None] if stack.ndim == 2 else stack
        files[each.file] = stack if each.scale else modality_values(stack, image)
    slope, intercept = each.scale or (1.0, 0.0)
    return (files[each.file][each.frame] * slope + intercept).astype(np.float32)


def decoded(image: Any) -> np.ndarray:
    """Stored numbers of a file, decompressed.

    Raises:
        UserError: no decoder is installed for its compression.
    """
    from pydicom.pixels import get_decoder

    syntax = image.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise UserError(
            f"{os.path.basename(image.filename)} is compressed ({syntax.name}), which needs a"
            f" decoder: pip install {DECODERS}"
        )
    try:
        return image.pixel_array
    except Exception as error:  # pydicom and its decoders raise anything where bytes are missing
        name = os.path.basename(image.filename)
        raise UserError(
            f"{name} is truncated or damaged: its pixels cannot be decoded ({reason(error)})"
        ) from None


def stack(slices: list[Slice]) -> Series:
    """Slices in order of their position along the normal, with the affine of the indices.

    Raises:
        UserError: sizes, orientations, pixel spacings or gaps mix; several slices at one place; or
            a single slice, which has no spacing.
    """
    first = slices[0]
    if len(slices) < 2:
        raise UserError("a single slice, which has no spacing across: expected two slices at least")
    refuse_mixed("sizes", [shape_text(each.size) for each in slices])
    refuse_mixed("orientations", classes([each.cosines for each in slices]))
    refuse_mixed("pixel spacings", classes([each.pixel for each in slices]))
    check_plane(first)
    normal = np.cross(first.cosines[:3], first.cosines[3:])
    slices = sorted(slices, key=lambda each: float(each.position @ normal))
    positions = np.stack([each.position for each in slices])  # (K, 3)
    check_gaps(slices, positions @ normal)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    straight = positions[0] + np.arange(len(slices))[:, None] * step
    away = float(np.abs(positions - straight).max())
    if away > slack(float(np.linalg.norm(step))):
        raise UserError(f"slices lie up to {away:.3g} mm beside the line from first to last")
    affine = np.eye(4)
    affine[:3, 0] = first.cosines[:3] * first.pixel[1]  # along a row, from column to column
    affine[:3, 1] = first.cosines[3:] * first.pixel[0]
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    return Series(tuple(slices), TO_RAS @ affine)


def check_plane(of: Slice) -> None:
    """Refuse directions of a slice that are no unit vectors at right angles, and pixels without
    size (PS3.3 C.7.6.2.1.1).

    Raises:
        UserError: one of these.
    """
    axes = of.cosines.reshape(2, 3)
    name = os.path.basename(of.file)
    if np.abs(axes @ axes.T - np.eye(2)).max() > UNIT:
        numbers = ", ".join(f"{number:g}" for number in of.cosines)
        raise UserError(
            f"ImageOrientationPatient of {name} is {numbers}: no directions of length 1 at right"
            " angles, so that distances are not known"
        )
    if not (of.pixel > 0).all():
        numbers = ", ".join(f"{number:g}" for number in of.pixel)
        raise UserError(f"PixelSpacing of {name} is {numbers}: it must be above 0")


def classes(values: list[np.ndarray]) -> list[str]:
    """Values as text, those that are nearly the same with the same text."""
    kinds: list[np.ndarray] = []
    found = []
    for value in values:
        near = (kind for kind in kinds if np.allclose(kind, value, rtol=SAME, atol=SAME))
        if (kind := next(near, None)) is None:
            kinds.append(kind := value)
        found.append(", ".join(f"{number:g}" for number in kind))
    return found


def refuse_mixed(what: str, values: list[str]) -> None:
    """Refuse slices that differ in something.

    Raises:
        UserError: what differs, with the number of slices of each.
    """
    counts = Counter(values)
    if len(counts) > 1:
        each = listed((f"{text} ({count} slices)" for text, count in counts.most_common()), 4, "; ")
        raise UserError(
            f"the slices' {what} mix: {each}; choose one series with data.reading.series, or move"
            " the others away"
        )


def slack(gap: float) -> float:
    """How far positions of slices so far apart may be off, mm."""
    most, share = POSITION_SLACK
    return max(min(most, 0.25 * gap), share * gap)


def at_one_place(gaps: np.ndarray) -> np.ndarray:
    """Which gaps, mm, are none but rounding: far below those that are more than zero."""
    some = gaps[gaps > SAME * gaps.max()]
    return gaps < min(POSITION_SLACK[0], 0.25 * float(np.median(some))) if len(some) else gaps == 0


def check_gaps(slices: Sequence[Slice], places: np.ndarray) -> None:
    """Refuse slices that are not evenly spaced.

    Args:
        places: (K,) mm of the slices along the normal, ascending.

    Raises:
        UserError: several slices at one place, a missing one, or gaps that mix.
    """
    gaps = np.diff(places)  # (K - 1,) mm
    if (same := at_one_place(gaps)).any():
        refuse_doubles(slices, 1 + int((~same).sum()))
    usual = float(np.median(gaps))
    wrong = np.flatnonzero(np.abs(gaps - usual) > slack(usual))
    if not len(wrong):
        return
    at = int(wrong[0])
    between = f"between {places[at]:g} and {places[at + 1]:g} mm"
    times = gaps[wrong] / usual
    if (np.abs(times - np.rint(times)) < 0.1).all() and len(wrong) < len(gaps) / 2:
        lost = int(np.rint(times - 1).sum())
        raise UserError(
            f"{lost} slice{'s' * (lost > 1)} missing: the gap is {gaps[at]:g} mm {between},"
            f" {usual:g} mm elsewhere"
        )
    raise UserError(
        f"the slices' gaps mix: {gaps[at]:g} mm {between}, {usual:g} mm for most; choose one series"
        " with data.reading.series"
    )


def refuse_doubles(slices: Sequence[Slice], places: int) -> Never:
    """Refuse several slices at one place.

    Args:
        places: at which there are slices.

    Raises:
        UserError: copies of a file, of which one is named, or a series over time or with echoes.
    """
    above = os.path.commonpath([os.path.dirname(each.file) for each in slices])
    of: dict[str, list[str]] = {}
    for each in slices:
        of.setdefault(each.uid, []).append(os.path.relpath(each.file, above))
    text = f"{len(slices)} slices at {places} places"
    if len(of) == places:  # else anonymised, all with one UID, say
        copies = max(of.values(), key=len)
        raise UserError(
            f"{text}: {listed(copies, 3)} are one image (SOPInstanceUID): remove the copies"
        )
    cure = 'choose one image a place with data.reading.series, as "AcquisitionNumber=1"'
    if len({each.file for each in slices}) == 1:  # conditions choose files
        cure = "frames of one file cannot be chosen: convert it to NIfTI (dcm2niix)"
    raise UserError(f"{text}, a series over time or with several echoes: {cure}")


def shape_text(shape: Sequence[int]) -> str:
    """Lengths of axes as one writes them."""
    return " x ".join(map(str, shape))
