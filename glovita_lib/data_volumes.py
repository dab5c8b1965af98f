"""Data sets of volumes: NIfTI, NumPy and blosc2 files and DICOM folders with labels from folder
names, JSON or CSV, prepared and cached; and new volumes without labels.

A sample is known by its id: the path of its file or DICOM folder below the images folder, the
first one where several files are its channels, or what its files' names have before path_suffix.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from statistics import median_low
from typing import Any, ClassVar, get_args

import numpy as np
from msgspec.structs import replace

from glovita_lib.data import Asked, Data, Split, VolumeSamples, read_data_set
from glovita_lib.data_folder import read_folder
from glovita_lib.data_tables import Problems, SampleFolder, walk, walk_folders
from glovita_lib.dist import cores, number_of
from glovita_lib.errors import UserError, itemized, listed
from glovita_lib.files import on_disk, read_csv, read_json_table
from glovita_lib.loggers import Rate
from glovita_lib.read_dicom import (
    SLICE_SUFFIXES,
    ImageKind,
    image_kind,
    kind_of_parts,
    looks_dicom,
    series_conditions,
)
from glovita_lib.spec_data import VolumeData
from glovita_lib.spec_samples import WholeSubtask
from glovita_lib.spec_volumes import VolumePreparation
from glovita_lib.volume_cache import Entry, VolumeCache, VolumeSource

DICOM = "dcm"  # the suffix that stands for folders of DICOM files too
LOOKED_AT = 3  # largest and smallest files of a folder

# ---------------------------------------------------------------------- which volumes there are


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


def find_dicom(folder: Path, series: Sequence[str], *, apart: bool, itself: bool) -> DicomVolumes:
    """The DICOM images below a folder.

    Args:
        series: conditions of the one that is meant, see `Reading`; none: any.
        apart: whether a file with frames is a volume of its own, as is a folder of slices; else a
            study, whose series meet the conditions, is one.
        itself: whether slices in the folder itself are a series, "."; else each is on its own.
    """
    conditions = [series_conditions(each) for each in series]
    found = DicomVolumes()
    images: dict[str, Kinds] = {}
    for parent, names in walk_folders(str(folder), []):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        few = inside != "." or itself
        if kinds := image_kinds(parent, names, conditions, few=few):
            images[inside] = kinds
    images = images if itself else with_own_uids(images)
    everything = images
    found.folders.update(images)
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
        join_parts(folder, found, everything, condition, number, itself=itself)
    return found


def join_parts(
    folder: Path,
    found: DicomVolumes,
    images: dict[str, Kinds],
    series: str | None,
    number: int,
    *,
    itself: bool,
) -> None:
    """Make folders with the parts of one series one sample, the folder that they have in common;
    where that holds other samples too, each gets its line.

    Args:
        series: a condition of the ones that are meant, if any.
        number: of the condition.
    """
    of: dict[str, set[tuple[str, ...]]] = {}  # series of each sample
    for inside, kinds in images.items():
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
        if kind == "one volume" and alone:
            found.series = found.series - {*parts} | {common}
            found.others -= {*parts}
        elif kind != "volumes":
            line = f"parts of one series (SeriesInstanceUID) lie in {listed(parts, 4)}"
            line += ", some slices in several" * (kind == "overlap")
            line += ": put its slices into one folder, each once"
            found.parts |= {each: line for each in parts if each in found.series}


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
    sizes = {name: size_of(os.path.join(folder, name)) for name in names if looks_dicom(name)}
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
    return {name: kind for name in order if (kind := kinds.get(name)) is not None}


def size_of(path: str) -> int:
    """Size of a file, -1 of a link to what is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


@dataclass(slots=True)
class VolumeFolder(SampleFolder):
    """The volumes below a folder; a sample may have several files."""

    noun: ClassVar[str] = "volume"

    suffixes: tuple[str, ...] = ()
    """What follows an id in the names of its files; none: an id is a file."""
    studies: frozenset[str] = frozenset()
    """Folders with DICOM images at any depth, which a table may name: a series of theirs is a
    sample."""
    dicom: bool = False
    """Whether a table may name any DICOM file with frames."""
    notes: tuple[str, ...] = ()
    """Lines about what else there is."""
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Ids of all files of a sample, where a table names several."""

    def find(self, name: str) -> str | None:
        """Id of the volume at a path below the folder; also of a study."""
        path = str(PurePosixPath(name))
        found = path if path in self.studies else SampleFolder.find(self, name)
        if found is None and self.dicom and looks_dicom(path):
            kind = image_kind(str(self.folder / path), [])
            found = path if kind is not None and kind.frames > 1 else None
        return found

    def unused(self) -> list[str]:
        """See `SampleFolder.unused`; what lies in a study that a table names is used with it."""
        return [each for each in self.ids if self.named.isdisjoint(lineage(each))]

    def hint(self, name: str) -> str:
        """See `SampleFolder.hint`; of a slice the folder of its series."""
        parent = str(PurePosixPath(name).parent)
        if (parent in self.studies or parent in self.known) and (self.folder / name).is_file():
            return f'; a slice is no volume: name the folder of its series, "{parent}"'
        return SampleFolder.hint(self, name)

    def find_row(self, names: tuple[str, ...]) -> tuple[str | None, str]:
        """Id of the sample of these files, that of the first, or the first name without a file."""
        found = [self.find(name) for name in names]
        ids = tuple(identity for identity in found if identity is not None)
        self.named.update(ids)
        if None in found:
            return None, names[found.index(None)]
        if len(ids) > 1 and self.rows.setdefault(ids[0], ids) != ids:
            raise UserError(
                f"{ids[0]} stands beside {listed(self.rows[ids[0]][1:])} and beside"
                f" {listed(ids[1:])}: the first file of a sample must be its own"
            )
        return ids[0], names[0]

    def files(self, identity: str) -> tuple[str, ...]:
        """Paths of all files or DICOM folders of a sample."""
        names = self.rows.get(identity, (identity,))
        return tuple(
            str(self.folder / f"{name}{suffix}")
            for name in names
            for suffix in self.suffixes or ("",)
        )

    def path(self, identity: str) -> str:
        """First file of a sample, of a DICOM folder too."""
        first = self.files(identity)[0]
        inside = ((parent, min(names)) for parent, _, names in os.walk(first) if names)
        return os.path.join(*next(inside, (first,)))


def open_folder(
    folder: Path,
    data: VolumeData,
    series: Sequence[str],
    report: list[str] | None,
    *,
    itself: bool = False,
) -> tuple[VolumeFolder, dict[str, str]]:
    """The volumes below a folder, and for samples that lack one of their files the line that says
    so.

    Args:
        data: the data set whose file names are meant.
        series: conditions of DICOM series, see `Reading`.
        report: see `walk`.
        itself: whether the folder may be a DICOM series too.

    Raises:
        UserError: no such folder, or one that cannot be listed.
    """
    files = walk(folder, data.allowed_exts, report=report)
    suffixes = data.path_suffix
    dicom = DicomVolumes()
    if is_dicom := DICOM in (ext.lower().lstrip(".") for ext in data.allowed_exts):
        apart = len(series) < 2 or data.files_a_sample > 1
        meant = series if len(series) == 1 or not apart else ()  # else each file has its own
        dicom = find_dicom(folder, meant, apart=apart, itself=itself)
    if suffixes:
        known = {*files, *dicom.folders, *dicom.files, *dicom.others}
        starts = sorted({f.removesuffix(s) for s in suffixes for f in known if f.endswith(s)})
        lacking = {i: [s for s in suffixes if i + s not in known] for i in starts}
        broken = {i: f"no file {i}{missing[0]}" for i, missing in lacking.items() if missing}
        return VolumeFolder(folder, starts, suffixes=suffixes), broken
    parent = {file: str(PurePosixPath(file).parent) for file in files}
    files = [
        file
        for file in files
        if parent[file] not in dicom.folders or not file.lower().endswith(SLICE_SUFFIXES)
    ]
    beside = [file for file in files if parent[file] in dicom.series]
    above = {str(parent) for each in dicom.folders for parent in PurePosixPath(each).parents}
    samples = VolumeFolder(
        folder,
        sorted({*files, *dicom.files, *dicom.series}),
        studies=frozenset((above | dicom.folders) - {"."} - dicom.series),
        dicom=is_dicom,
        notes=tuple(dicom_notes(beside, sorted(dicom.others))),
    )
    return samples, dicom.parts


def dicom_notes(beside: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    """Lines about volume files in folders of DICOM slices, and about files of other series."""
    if beside:
        yield (
            f"{len(beside)} volume files lie beside the slices of a DICOM series"
            f" ({listed(beside, 3)}): each counts as a volume of its own"
        )
    if others:
        yield itemized(
            f"{len(others)} other DICOM series do not meet data.reading.series: not used, unless a"
            " table names them:",
            others,
        )


# ---------------------------------------------------------------------- preparing them


def prepare_samples(cache: VolumeCache, samples: Sequence[tuple[str, ...]]) -> list[Entry | str]:
    """The cache file of each sample, or the line that says why there is none, with a progress bar
    on the first rank."""
    rate = Rate("preparing volumes", len(samples), shown=number_of("RANK", 0) == 0)
    workers = cache.preparation.processes(cores())
    try:
        return cache.fill(samples, workers=workers, advance=rate.add)
    finally:
        rate.close()


def usual_channels(entries: Sequence[Entry | str]) -> int | None:
    """The number of channels that most files have, the smaller of two that are as frequent; None
    without files."""
    counts = Counter(entry.channels for entry in entries if isinstance(entry, Entry))
    return min(counts, key=lambda number: (-counts[number], number), default=None)


def broken_samples(
    entries: Sequence[Entry | str], samples: Sequence[tuple[str, ...]], channels: int | None
) -> dict[int, str]:
    """Samples that cannot be used, by number, and why.

    Args:
        channels: that files must have; None: those that most have.
    """
    wanted = usual_channels(entries) if channels is None else channels
    broken = {}
    for number, (entry, paths) in enumerate(zip(entries, samples, strict=True)):
        if isinstance(entry, str):
            broken[number] = entry.removeprefix(f"{paths[0]}: ")
        elif entry.channels != wanted:
            of = "most have" if channels is None else "data.channels says"
            broken[number] = f"{entry.channels} channels, {of} {wanted}"
    return broken


def spacing_line(entries: Sequence[Entry]) -> list[str]:
    """A line on the spacings of the files, where they differ and nothing brings them to one."""
    spacings = np.array([entry.spacing for entry in entries])
    if not len(spacings) or np.allclose(spacings, spacings[0], rtol=0.01):
        return []
    low, middle, high = (
        " x ".join(f"{side:.3g}" for side in sides)
        for sides in (spacings.min(0), np.median(spacings, 0), spacings.max(0))
    )
    return [
        f"volumes of different spacings, {low} to {high} mm, are not resampled:"
        f" data.preparation.spacing would bring them to one (median {middle})"
    ]


# ---------------------------------------------------------------------- the data set


def with_facts(spec: VolumeData) -> VolumeData:
    """The spec with the subtask, the number and the names of the classes that dataset.json states,
    where the spec does not.

    Raises:
        UserError: it states another subtask than there are, or something else than a number and
            names.
    """
    path = on_disk(Path(spec.data_root_dir) / "dataset.json")
    facts = read_json_table(path) if path.is_file() else {}
    facts = facts if isinstance(facts, dict) else {}
    subtask, count, names = (facts.get(k) for k in ("subtask", "num_classes", "class_names"))
    if spec.stated_subtask() is None and subtask is not None:
        if subtask not in get_args(WholeSubtask):
            raise UserError(
                f'{path}: subtask "{subtask}": valid are {listed(get_args(WholeSubtask))}'
            )
        spec = replace(spec, subtask=subtask)
    if spec.num_classes is None and spec.class_names is None:
        if not isinstance(count, int | None) or isinstance(count, bool):
            raise UserError(f"{path}: num_classes {count!r} must be a whole number")
        if not (names is None or (isinstance(names, list) and all(map(is_text, names)))):
            raise UserError(f"{path}: class_names {names!r} must be a list of names")
        spec = replace(spec, num_classes=count, class_names=None if names is None else tuple(names))
    return spec


def is_text(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


@read_data_set.register
def _(spec: VolumeData, *, seed: int, asked: Asked) -> Data:
    """A folder of volumes."""
    spec = with_facts(spec)
    base = Path(spec.data_root_dir)
    report: list[str] = []
    folder, lacking = open_folder(
        on_disk(base / spec.images_dir),
        spec,
        spec.reading.series,
        None if spec.strict else report,
    )
    report += folder.notes
    if not folder.ids:
        exts = ", ".join(spec.path_suffix or spec.allowed_exts)
        raise UserError(f"{folder.folder}: no volume with a suffix of {exts}; see data.images_dir")
    cache = VolumeCache(
        Path(spec.preparation.cache_folder(str(base))), spec.reading, spec.preparation
    )

    def look(ids: list[str]) -> tuple[list[Entry | str], dict[int, str]]:
        whole = [identity for identity in ids if identity not in lacking]
        samples = [folder.files(identity) for identity in whole]
        prepared = dict(zip(whole, prepare_samples(cache, samples), strict=True))
        entries = [prepared.get(i) or lacking[i] for i in ids]
        return entries, broken_samples(entries, [folder.files(i) for i in ids], spec.channels)

    subtask = spec.stated_subtask() or "multiclass"
    table = read_folder(spec, subtask, folder, look, report, seed=seed, asked=asked)
    report += table.untrained()
    if spec.preparation.spacing is None:
        report += spacing_line(table.found)

    def source(rows: np.ndarray) -> VolumeSource:
        return VolumeSource([table.found[row] for row in rows], spec.preparation.dtype)

    return Data(
        name="generic_3d_dataset",
        splits={name: table.split(name, source) for name in table.rows},
        subtask=table.subtask,
        class_names=table.class_names,
        ordered=spec.class_names is not None,
        samples=VolumeSamples(
            channels=table.found[0].shape[0],
            reading=spec.reading,
            preparation=settled(spec.preparation),
        ),
        report=report,
    )


def settled(preparation: VolumePreparation) -> VolumePreparation:
    """What of a preparation a trained model depends on."""
    return replace(preparation, cache_dir=None, workers=None)


# -------------------------------------------------------------------------------- new volumes


def unlabelled_volumes(
    path: str, samples: VolumeSamples, data: VolumeData
) -> tuple[Split, list[str]]:
    """New volumes without labels, prepared as a model takes them: of a folder and all below it in
    sorted order, of a CSV file with the column or columns of data.path_column (`path`, relative to
    the CSV file's folder) in its order, or a single file or DICOM folder.

    Args:
        samples: what the model takes.
        data: the data set whose file names and cache are meant.

    Raises:
        UserError: nothing there, no volume, or, unless data.strict is false, volumes that are
            missing, broken or have another number of channels, all together.
    """
    if samples.reading is None or samples.preparation is None:
        raise UserError(
            "infer.input: the model was trained on volumes of a data set of your own, whose files"
            " glovita does not know how to prepare; give it as data with a split to predict"
        )
    where = on_disk(Path(path))
    notes: list[str] = []
    ids, files, lacking = new_files(where, data, samples.reading.series, notes)
    if not ids:
        raise UserError(f"{path}: no volume with a suffix of {', '.join(data.allowed_exts)}")
    itself = where.is_dir() and (str(where),) in files  # DICOM, to which nothing is added
    beside = where if where.is_dir() and not itself else where.absolute().parent
    own = data.preparation
    how = replace(samples.preparation, cache_dir=own.cache_dir, workers=own.workers)
    where = Path(own.cache_folder(str(beside)))
    whole = [each for identity, each in zip(ids, files, strict=True) if identity not in lacking]
    prepared = iter(prepare_samples(VolumeCache(where, samples.reading, how), whole))
    entries = [lacking.get(identity) or next(prepared) for identity in ids]
    broken = broken_samples(entries, files, None)
    for number, entry in enumerate(entries):
        if isinstance(entry, Entry) and entry.shape[0] != samples.channels:
            broken[number] = f"{entry.shape[0]} channels, the model takes {samples.channels}"
    problems = Problems(data.strict, noun="volume")
    for number, line in sorted(broken.items()):
        problems.add(ids[number], line)
    notes += problems.of_new(len(ids))
    kept = [number for number in range(len(ids)) if number not in broken]
    found = [entries[number] for number in kept]
    source = VolumeSource([entry for entry in found if isinstance(entry, Entry)], how.dtype)
    return Split(ids=[ids[number] for number in kept], targets=None, source=source), notes


def new_files(
    where: Path, data: VolumeData, series: Sequence[str], notes: list[str]
) -> tuple[list[str], list[tuple[str, ...]], dict[str, str]]:
    """Ids and files of new samples, and for those that lack a file the line that says so.

    Args:
        series: conditions of DICOM series, see `Reading`.
        notes: takes lines worth showing, also about what is left out unless data.strict.

    Raises:
        UserError: there is nothing, or a folder that cannot be listed.
    """
    if where.suffix.lower() == ".csv":
        rows = read_csv(where, data.path_columns)
        named = [tuple(row[column] for column in data.path_columns) for row in rows]
        suffixes = data.path_suffix or ("",)
        files = [
            tuple(str(on_disk(where.parent / f"{name}{s}")) for name in names for s in suffixes)
            for names in named
        ]
        return [names[0] for names in named], files, {}
    if where.is_dir():
        report = None if data.strict else notes
        folder, lacking = open_folder(where, data, series, report, itself=True)
        notes += folder.notes
        files = [folder.files(identity) for identity in folder.ids]
        return [where.name if i == "." else i for i in folder.ids], files, lacking
    if where.exists():
        return [where.name], [(str(where),)], {}
    raise UserError(f"{where}: no such file or folder, expected volumes, or a CSV of their paths")
