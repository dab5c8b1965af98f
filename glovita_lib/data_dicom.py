"""DICOM images below a folder: which folders of slices and files with frames are volumes, which are
other series of a study, and which hold a part of a series.

Folders go by their path below the one that is looked at, "." being itself.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from statistics import median_low
from typing import Literal

import numpy as np

from glovita_lib.data_tables import walk_folders
from glovita_lib.errors import UserError, listed
from glovita_lib.read_dicom import (
    DAMAGED,
    SAME,
    ImageKind,
    Slice,
    at_one_place,
    dicom_headers,
    image_kind,
    is_dicom,
    looks_dicom,
    name_pattern,
    series_conditions,
    slices_of,
)

OTHER_SUFFIXES = (".nii", ".gz", ".npy", ".npz", ".b2nd", ".json", ".csv", ".txt", ".png", ".jpg")
"""Suffixes of files that are never DICOM."""
MISSING = 4.5  # gaps that may lie between the parts of a series
LOOKED_AT = 3  # largest and smallest files of a folder

Kinds = dict[str, ImageKind]
"""DICOM images of a folder by their names."""


@dataclass(slots=True)
class DicomVolumes:
    """DICOM images below a folder."""

    folders: set[str] = field(default_factory=set)
    """Folders that hold images themselves."""
    series: set[str] = field(default_factory=set)
    """Those of them that hold slices: a sample each."""
    files: set[str] = field(default_factory=set)
    """Files with frames, which are volumes of their own, and damaged ones."""
    others: set[str] = field(default_factory=set)
    """Files with frames and folders of slices of other series of a study than the one that is
    meant."""
    parts: dict[str, str] = field(default_factory=dict)
    """Folders with a part of a series, each with the line that says so."""
    images: dict[str, Kinds] = field(default_factory=dict)
    """All images, by folder."""


def find_dicom(folder: Path, series: Sequence[str], *, apart: bool, itself: bool) -> DicomVolumes:
    """The DICOM images below a folder.

    Args:
        series: conditions of the one that is meant, see `Reading`; none: any.
        apart: whether a file with frames is a volume of its own, as is a folder of slices, where
            each of several conditions is that of one file of a sample; else a study, whose series
            meet the conditions, is one.
        itself: whether slices in the folder itself are a series, "."; else each is on its own.
    """
    conditions = [series_conditions(each) for each in series]
    found = DicomVolumes()
    images: dict[str, Kinds] = {}
    rest: dict[str, Sequence[str]] = {}
    for parent, names in walk_folders(str(folder), []):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        few = inside != "." or itself
        if kinds := image_kinds(parent, names, conditions, few=few):
            images[inside] = kinds
        else:
            rest[inside] = names
    images |= lost_images(folder, images, rest)
    found.images = images = images if itself else with_own_uids(images)
    found.folders.update(images)
    if apart and len(series) > 1:
        series = ()
        images = {
            inside: {n: dataclasses.replace(kind, met=frozenset()) for n, kind in kinds.items()}
            for inside, kinds in images.items()
        }
    if not apart:
        found.series, found.others = study_folders(images, len(conditions), itself=itself)
        images = {inside: kinds for inside, kinds in images.items() if inside == "." and not itself}
    met = [(inside, kind) for inside, kinds in images.items() for kind in kinds.values()]
    used = [(inside, kind.study) for inside, kind in met if kind.met]
    studies = Studies(images, used, itself=itself)
    for inside, kinds in images.items():
        start = "" if inside == "." else f"{inside}/"
        framed = {name for name, kind in kinds.items() if kind.frames > 1}
        meant = {  # and what no other series of its study is, so that whoever reads it says so
            name
            for name, kind in kinds.items()
            if kind.met or not kind.frames or not studies.hold(inside, kind)
        }
        if inside == "." and not itself:
            files = {name for name in meant if kinds[name].frames != 1} | (set(kinds) - framed)
        elif any(kinds[name].frames == 1 for name in meant):
            found.series.add(inside)  # with the damaged ones among its slices
            files = meant & framed
        else:
            files = {name for name in meant if kinds[name].frames != 1}
            slices = any(kind.frames == 1 for kind in kinds.values())
            found.others |= {inside} if slices and not files else set()
        found.files |= {start + name for name in files}
        found.others |= {start + name for name in framed - meant}
    for number, condition in enumerate(series or (None,)):
        join_parts(folder, found, condition, number, itself=itself)
    return found


def lost_images(
    folder: Path, images: dict[str, Kinds], rest: dict[str, Sequence[str]]
) -> dict[str, Kinds]:
    """Folders below one without an image whose files are named as images of other folders are: all
    of theirs have lost their beginnings, and are no reports. Of slices one stands for all."""
    framed: dict[str, bool] = {}
    for kinds in images.values():
        framed |= {name_pattern(name): each.frames > 1 for name, each in kinds.items()}
    found: dict[str, Kinds] = {}
    for inside, names in rest.items():
        named = [name for name in sorted(names) if name_pattern(name) in framed]
        lost = [each for each in named if not begins_as_dicom(str(folder / inside / each))]
        if lost:
            every = framed[name_pattern(lost[0])]
            found[inside] = dict.fromkeys(lost if every else lost[:1], DAMAGED)
    return found


def join_parts(
    folder: Path, found: DicomVolumes, series: str | None, number: int, *, itself: bool
) -> None:
    """Make folders with the parts of one series one sample, the folder that they have in common;
    where that holds other samples too, each gets its line.

    Args:
        series: a condition of the ones that are meant, if any.
        number: of the condition.
    """
    for parts in parts_of_series(folder, found, series, number, itself=itself):
        if parts.kind == "one volume" and parts.alone:
            found.series = found.series - {*parts.folders} | {parts.common}
            found.others -= {*parts.folders}
        elif parts.kind != "volumes":
            line = f"{parts.text(parts.folders)}: put its slices into one folder, each once"
            found.parts |= {each: line for each in parts.folders if each in found.series}


def kind_of_parts(
    folders: Sequence[str], series: str | None, *, known: bool
) -> Literal["one volume", "overlap", "volumes"]:
    """Whether the slices of some folders, of one SeriesInstanceUID, are one volume: of one size and
    orientation, each at a place of its own, with gaps as between neighbours or a few missing.

    Folders of which that is not so, as where all files carry one UID, are volumes of their own; no
    more of them are read than tell so. Where the UID is known to tell series apart, folders of
    which some places are in several and others in one overlap.
    """
    slices: list[Slice] = []
    for folder in folders:
        try:
            headers = dicom_headers(folder, series)
            slices += [each for file, header in headers for each in slices_of(file, header)]
        except UserError:  # whoever reads it says so
            return "volumes"
        like = [(*each.size, *each.cosines, *each.pixel) for each in slices]
        if not np.allclose(like, like[0], rtol=SAME, atol=SAME):
            return "volumes"
        normal = np.cross(slices[0].cosines[:3], slices[0].cosines[3:])
        places = np.array([float(each.position @ normal) for each in slices])
        gaps = np.diff(np.sort(places))
        if len(gaps) and gaps.min() < 0.5 * np.median(gaps):
            return "overlap" if known and share_some(slices, places) else "volumes"
    return "one volume" if gaps.max() < MISSING * np.median(gaps) else "volumes"


def share_some(slices: Sequence[Slice], places: np.ndarray) -> bool:
    """Whether some places (K,), mm, are in several folders and others are not, as those of several
    volumes of one grid are not: those of time points or echoes are in all."""
    order = np.argsort(places)
    numbers = np.empty(len(places), int)
    numbers[order] = np.append(0, np.cumsum(~at_one_place(np.diff(places[order]))))
    of: dict[str, set[int]] = {}
    for each, number in zip(slices, numbers.tolist(), strict=True):
        of.setdefault(os.path.dirname(each.file), set()).add(number)
    held = Counter(number for found in of.values() for number in found)
    return max(held.values()) > 1 and min(map(len, of.values())) < len(held)


@dataclass(frozen=True, slots=True)
class Parts:
    """Folders with images of one SeriesInstanceUID, some of them samples."""

    folders: list[str]
    common: str
    """The folder that they have in common."""
    alone: bool
    """Whether it holds no other sample."""
    kind: Literal["one volume", "overlap", "volumes"]
    """See `kind_of_parts`."""

    def text(self, names: Sequence[str]) -> str:
        """Where the parts lie, as a line begins."""
        twice = ", some slices in several" * (self.kind == "overlap")
        return f"parts of one series (SeriesInstanceUID) lie in {listed(names, 4)}{twice}"


def parts_of_series(
    folder: Path, found: DicomVolumes, series: str | None, number: int, *, itself: bool
) -> Iterator[Parts]:
    """The series of which there are images in several folders, with one sample among them at least;
    see `join_parts`."""
    of: dict[str, set[tuple[str, ...]]] = {}  # series of each sample
    for inside, kinds in found.images.items():
        beside = {inside} - ({"."} if not itself else set())  # perhaps a part beside a study
        for each in found.series.intersection(lineage(inside)) or beside:
            meant = (k for k in kinds.values() if series is None or number in k.met)
            of.setdefault(each, set()).update((k.series, *k.of) for k in meant if k.frames == 1)
    groups: dict[tuple[str, ...], list[str]] = {}
    for inside in sorted(of):
        if len(of[inside]) == 1 and (key := next(iter(of[inside])))[0]:
            groups.setdefault(key, []).append(inside)
    for key, parts in groups.items():
        if len(parts) < 2 or found.series.isdisjoint(parts):
            continue
        highest = [str(folder / e) for e in parts if {*parts}.isdisjoint(lineage(e)[1:])]
        common = os.path.commonpath(parts) or "."
        below = {each for each in found.series | found.files if common in lineage(each)}
        alone = below <= {*parts} and (common != "." or itself)
        told = any(key[1:]) and (itself or len({other[1:] for other in groups}) > 1)
        kind = kind_of_parts(highest, series, known=told or (alone and len(groups) > 1))
        yield Parts(parts, common, alone, kind)


def parts_in_table(
    folder: Path,
    images: dict[str, Kinds],
    samples: Sequence[tuple[str, ...]],
    series: Sequence[str],
    whole: Collection[str] = (),
) -> dict[int, str]:
    """Samples of a table that are a part of a series, or one that another sample holds too, by
    number, each with the line that says so.

    Args:
        images: all that there are in the samples and near them, by folder.
        samples: folders of each sample: its channels.
        series: conditions of the ones that are meant: one for all, one for each folder of a sample,
            or several for its one folder.
        whole: folders of which each is known to be one sample.
    """
    broken: dict[int, str] = {}
    for number, condition in enumerate(series or (None,)):
        named: dict[str, list[int]] = {}
        for row, paths in enumerate(samples):
            own = paths if len(paths) == 1 or len(series) < 2 else paths[number : number + 1]
            for path in own:
                named.setdefault(path, []).append(row)
        found = DicomVolumes(series=set(named), images=images)
        for parts in parts_of_series(folder, found, condition, number, itself=False):
            cure = "put its slices into one folder, each once, and name that"
            if parts.common in whole and parts.kind == "one volume":
                cure = f"name the folder of all its slices once, {parts.common}"
            line = f"{parts.text(parts.folders)}: {cure}"
            rows = (row for each in parts.folders for row in named.get(each, ()))
            broken |= dict.fromkeys(rows, line) if parts.kind != "volumes" else {}
    return broken


def parts_among(samples: Sequence[tuple[str, ...]], series: Sequence[str]) -> dict[int, str]:
    """See `parts_in_table`, of samples with files and folders anywhere."""
    conditions = [series_conditions(each) for each in series]
    own = [tuple(os.path.abspath(path) for path in paths) for paths in samples]
    images = {
        parent: kinds
        for path in sorted({path for paths in own for path in paths if os.path.isdir(path)})
        for parent, names in walk_folders(path, [])
        if (kinds := image_kinds(parent, names, conditions, few=True))
    }
    return parts_in_table(Path(), with_own_uids(images), own, series)


def with_own_uids(images: dict[str, Kinds]) -> dict[str, Kinds]:
    """The images of a data set without StudyInstanceUID where all have one, as anonymisation may
    write it: it tells no studies apart."""
    if len({kind.study for kinds in images.values() for kind in kinds.values() if kind.frames}) > 1:
        return images
    return {
        inside: {n: dataclasses.replace(kind, of=("", kind.of[1])) for n, kind in kinds.items()}
        for inside, kinds in images.items()
    }


class Studies:
    """Studies of which something is used, to tell their other series from those of a study that
    lacks what is meant.

    Another PatientID is another study. StudyInstanceUID tells a study, unless each series has its
    own. Without it a folder belongs to what is used in it; beside it, unless most used folders hold
    several series and so are studies themselves; or alone in the folders above, as far up as most
    of what is used is alone.
    """

    def __init__(
        self, images: dict[str, Kinds], used: Sequence[tuple[str, str]], *, itself: bool
    ) -> None:
        """
        Args:
            images: all there are, by folder.
            used: folders of what is used, each with the StudyInstanceUID that tells its study, or
                nothing.
            itself: whether all may be one study.
        """
        self.folders = {inside for inside, _ in used}
        series = {inside: series_of(kinds) for inside, kinds in images.items()}
        count = Counter(uid for found in series.values() for _, _, uid in found if uid)
        joined = max(count.values(), default=0) > 1
        self.uids = {uid for _, uid in used if uid and joined}
        self.patients = {
            kind.of[1]
            for inside, kinds in images.items()
            for kind in (() if self.folders.isdisjoint(lineage(inside)) else kinds.values())
            if kind.met
        }
        beside = Counter(each for inside in self.folders for each in lineage(inside)[1:2])
        mixed = sum(len(series.get(inside, ())) > 1 for inside in self.folders)
        each_a_study = 2 * mixed > len(self.folders) and max(beside.values(), default=0) > 1
        self.parents = set() if each_a_study else set(beside)
        number = Counter(each for inside in self.folders for each in lineage(inside))
        number["."] += not itself
        own = [[f for f in lineage(each) if number[f] == 1] for each in self.folders] or [[]]
        height = median_low(map(len, own)) if itself or len(own) > 1 else 1
        self.alone = {each for above in own for each in above[:height]}

    def hold(self, inside: str, kind: ImageKind) -> bool:
        """Whether an unused image in this folder is of a study of which something is used."""
        patient = kind.of[1]
        if patient and self.patients and self.patients.isdisjoint(["", patient]):
            return False
        if kind.met or (kind.study and self.uids):  # met: one of its series once more
            return kind.study in self.uids
        above = lineage(inside)
        beside = not self.folders.isdisjoint(above[:1]) or not self.parents.isdisjoint(above[1:2])
        return beside or not self.alone.isdisjoint(above)


def series_of(kinds: Kinds) -> set[tuple[str, frozenset[int], str]]:
    """The series of a folder, each file with frames one, each with its StudyInstanceUID."""
    return {
        (name if kind.frames > 1 else kind.series, kind.met, kind.study)
        for name, kind in kinds.items()
        if kind.frames
    }


def lineage(inside: str) -> list[str]:
    """A folder and those above it, up to "."."""
    return [inside, *map(str, PurePosixPath(inside).parents)]


def study_folders(
    images: dict[str, Kinds], conditions: int, *, itself: bool
) -> tuple[set[str], set[str]]:
    """The lowest folders that hold a series for each condition, with all other folders with images
    that are not known to be of the same studies; and those that are.

    Where no StudyInstanceUID tells a study its series lie no deeper than those of most others, as
    else the folder of two patients would be one where each lacks a series.
    """
    below: dict[str, dict[tuple[str, str], set[int]]] = {}
    depth: Counter[str] = Counter()
    for inside, kinds in images.items():
        for kind in kinds.values():
            for up, each in enumerate(lineage(inside) if kind.met else ()):
                below.setdefault(each, {}).setdefault(kind.of, set()).update(kind.met)
                depth[each] = max(depth[each], up)
    if not itself:
        below.pop(".", None)
    whole = {inside: complete_study(series, conditions) for inside, series in below.items()}
    complete = {inside for inside, uid in whole.items() if uid is not None}
    found = complete - {each for inside in complete for each in lineage(inside)[1:]}
    usual = median_low([depth[inside] for inside in found] or [0])
    found = {inside for inside in found if whole[inside] or depth[inside] <= usual}
    count = Counter(whole[inside] for inside in found)  # of which one stands for one study
    used = [(each, uid if (uid := whole[each]) and count[uid] == 1 else "") for each in found]
    studies = Studies(images, used, itself=itself)
    others: set[str] = set()
    for inside, kinds in images.items():
        if found.isdisjoint(lineage(inside)) and (inside != "." or itself):
            known = [kind for kind in kinds.values() if kind.frames]
            held = known and all(studies.hold(inside, kind) for kind in known)
            others |= {inside} if held else set()
    single = {each for each in images if found.isdisjoint(lineage(each))} - others
    return found | (single if itself else single - {"."}), others


def complete_study(series: dict[tuple[str, str], set[int]], conditions: int) -> str | None:
    """StudyInstanceUID, which may be empty, of a study among some series that has one for each of
    so many conditions; None: there is none.

    Args:
        series: conditions that are met, by StudyInstanceUID and PatientID; series that differ in
            one of them are of two studies.
    """
    for own in series:
        study = {
            other: met
            for other, met in series.items()
            if all(a == b or not a or not b for a, b in zip(own, other, strict=True))
        }
        if len(set().union(*study.values())) == conditions:
            return max(uid for uid, _ in study)
    return None


def image_kinds(
    folder: str,
    names: Sequence[str],
    conditions: Sequence[list[tuple[str, str]]],
    *,
    few: bool,
) -> Kinds:
    """The DICOM images among the files of a folder.

    Args:
        few: whether a few are enough where all are slices, which may be hundreds: the largest and
            the smallest show a file with frames, the first and the last most often another series.
            Where they meet no condition all are looked at.
    """
    sizes = {name: size_of(os.path.join(folder, name)) for name in dicom_names(folder, names)}
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    kinds: dict[str, ImageKind | None] = {}

    def look(some: Sequence[str], most: int) -> None:
        images = 0
        for name in some:
            if name not in kinds:
                kinds[name] = image_kind(os.path.join(folder, name), conditions)
            kind = kinds[name]
            images += kind is not None and kind.frames > 0
            if images == most:
                return

    look(order, LOOKED_AT if few else len(order))
    look(order[::-1], LOOKED_AT)
    look([min(order), max(order)] if conditions and order else [], len(order))
    known = [kind for kind in kinds.values() if kind is not None]
    unmet = conditions and not any(kind.met for kind in known)
    if unmet or any(kind.frames > 1 for kind in known):
        look(order, len(order))
    framed = {name_pattern(name) for name, kind in kinds.items() if kind and kind.frames > 1}
    for name in order:  # no DICOM any more: its beginning is lost
        is_named = kinds.get(name, DAMAGED) is None and name_pattern(name) in framed
        if is_named and not begins_as_dicom(os.path.join(folder, name)):
            kinds[name] = DAMAGED
    return {name: kind for name in order if (kind := kinds.get(name)) is not None}


def dicom_names(folder: str, names: Iterable[str]) -> list[str]:
    """Those of the files of a folder that may be DICOM: by their names, or with another suffix
    (E1S1I1.MR) with which one at least is DICOM by its first bytes."""
    found, others = [], dict[str, list[str]]()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if looks_dicom(name):
            found.append(name)
        elif suffix not in OTHER_SUFFIXES:
            others.setdefault(suffix, []).append(name)
    for alike in others.values():
        if any(begins_as_dicom(os.path.join(folder, name)) for name in sorted(alike)):
            found += alike
    return found


def begins_as_dicom(file: str) -> bool:
    """Whether a file can be read and is DICOM by its first bytes."""
    try:
        return os.path.isfile(file) and is_dicom(file)
    except OSError:
        return False


def size_of(path: str) -> int:
    """Size of a file, -1 of a link to what is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
