"""Data sets of volumes: NIfTI, NumPy and blosc2 files and DICOM folders with labels from folder
names, JSON or CSV, prepared and cached; and new volumes without labels.

A sample is known by its id: the path of its file or DICOM folder below the images folder, the
first one where several files are its channels, or what its files' names have before path_suffix.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, get_args

import numpy as np
from msgspec.structs import replace

from glovita_lib.data import Asked, Data, Split, VolumeSamples, read_data_set
from glovita_lib.data_dicom import (
    DicomVolumes,
    dicom_names,
    find_dicom,
    lineage,
    parts_among,
    parts_in_table,
)
from glovita_lib.data_folder import read_folder
from glovita_lib.data_tables import Problems, SampleFolder, paths_of, walk
from glovita_lib.dist import cores, number_of
from glovita_lib.errors import UserError, itemized, listed, with_all
from glovita_lib.files import name_of, on_disk, read_csv, read_json_table
from glovita_lib.loggers import Rate
from glovita_lib.read_dicom import (
    SLICE_SUFFIXES,
    image_kind,
)
from glovita_lib.spec_data import VolumeData
from glovita_lib.spec_samples import WholeSubtask
from glovita_lib.spec_volumes import VolumePreparation
from glovita_lib.volume_cache import Entry, VolumeCache, VolumeSource

DICOM = "dcm"  # the suffix that stands for folders of DICOM files too

# ---------------------------------------------------------------------- which volumes there are


@dataclass(slots=True)
class VolumeFolder(SampleFolder):
    """The volumes below a folder; a sample may have several files."""

    noun: ClassVar[str] = "volume"

    suffixes: tuple[str, ...] = ()
    """What follows an id in the names of its files; none: an id is a file."""
    studies: frozenset[str] = frozenset()
    """Folders with DICOM images at any depth, which a table may name: a series of theirs is a
    sample."""
    dicom: DicomVolumes | None = None
    """DICOM images there; a table may name any file with frames. None: they do not count."""
    notes: tuple[str, ...] = ()
    """Lines about what else there is."""
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Ids of all files of a sample, where a table names several."""
    first_images: dict[str, str] = field(default_factory=dict)
    """Of each folder with DICOM images below it the first one, see `path`."""

    def find(self, name: str) -> str | None:
        """Id of the volume at a path below the folder; also of a study."""
        path = str(PurePosixPath(name))
        found = path if path in self.studies else SampleFolder.find(self, name)
        file = self.folder / path
        if found is None and self.dicom is not None and dicom_names(str(file.parent), [file.name]):
            kind = image_kind(str(file), [])
            found = path if kind is not None and kind.frames > 1 else None
        return found

    def unused(self) -> list[str]:
        """See `SampleFolder.unused`; what lies in a study that a table names is used with it, and a
        sample of which a table names a part is not unused."""
        above = {each for name in self.named for each in lineage(name)}
        return [i for i in self.ids if i not in above and self.named.isdisjoint(lineage(i))]

    def hint(self, name: str) -> str:
        """See `SampleFolder.hint`; of a slice the folder of its series."""
        parent = str(PurePosixPath(name).parent)
        if (parent in self.studies or parent in self.known) and (self.folder / name).is_file():
            return f'; a slice is no volume: name the folder of its series, "{parent}"'
        file = str(self.folder / name)
        named = name.lower().endswith(SLICE_SUFFIXES) and os.path.isfile(file)
        if named and image_kind(file, []) is None:
            return "; the file is there, and is DICOM of a class that is none of images"
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

    def inside(self, identity: str) -> tuple[str, ...]:
        """Paths below the folder of all files or DICOM folders of a sample."""
        names = self.rows.get(identity, (identity,))
        return tuple(f"{name}{suffix}" for name in names for suffix in self.suffixes or ("",))

    def files(self, identity: str) -> tuple[str, ...]:
        """Paths of all files or DICOM folders of a sample."""
        return tuple(str(self.folder / each) for each in self.inside(identity))

    def parts(self, ids: Sequence[str], series: Sequence[str]) -> dict[str, str]:
        """Samples that are a part of a DICOM series, with the line that says so; those of the
        folder itself, which a table names too, have it already."""
        samples = [self.inside(identity) for identity in ids]
        if self.dicom is None or {(each,) for each in self.ids}.issuperset(samples):
            return {}
        broken = parts_in_table(self.folder, self.dicom.images, samples, series, self.ids)
        return {ids[number]: line for number, line in broken.items()}

    def path(self, identity: str) -> str:
        """First file of a sample, of a DICOM folder its first known image: other files beside the
        slices may be the same in all."""
        first = self.inside(identity)[0]
        if not self.first_images and self.dicom is not None:
            for parent, kinds in sorted(self.dicom.images.items()):
                for folder in lineage(parent):
                    self.first_images.setdefault(folder, f"{parent}/{min(kinds)}")
        return str(self.folder / self.first_images.get(str(PurePosixPath(first)), first))


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
    counted: DicomVolumes | None = None
    if DICOM in (ext.lower().lstrip(".") for ext in data.allowed_exts):
        apart = len(series) < 2 or data.files_a_sample > 1
        counted = find_dicom(folder, series, apart=apart, itself=itself)
    dicom = counted or DicomVolumes()
    if suffixes:
        known = {*files, *dicom.folders, *dicom.files, *dicom.others}
        starts = sorted({f.removesuffix(s) for s in suffixes for f in known if f.endswith(s)})
        lacking = {i: [s for s in suffixes if i + s not in known] for i in starts}
        broken = {i: f"no file {i}{missing[0]}" for i, missing in lacking.items() if missing}
        return VolumeFolder(folder, starts, suffixes=suffixes, dicom=counted), broken
    parent = {file: str(PurePosixPath(file).parent) for file in files}
    files = [
        file
        for file in files
        if parent[file] not in dicom.folders or not file.lower().endswith(SLICE_SUFFIXES)
    ]
    reports = [  # DICOM of classes that are none of images
        file
        for file in files
        if counted is not None
        and file.lower().endswith(SLICE_SUFFIXES)
        and image_kind(str(folder / file), []) is None
    ]
    files = sorted(set(files).difference(reports))
    beside = [file for file in files if parent[file] in dicom.series]
    above = {str(parent) for each in dicom.folders for parent in PurePosixPath(each).parents}
    samples = VolumeFolder(
        folder,
        sorted({*files, *dicom.files, *dicom.series}),
        studies=frozenset((above | dicom.folders) - {"."} - dicom.series),
        dicom=counted,
        notes=tuple(dicom_notes(beside, sorted(dicom.others), reports)),
    )
    return samples, dicom.parts


def dicom_notes(
    beside: Sequence[str], others: Sequence[str], reports: Sequence[str]
) -> Iterator[str]:
    """Lines about volume files in folders of DICOM slices, about files of other series, and about
    reports, structures and plans."""
    if reports:
        text = f"{len(reports)} DICOM files are no images ({listed(reports, 3)}): not used"
        yield with_all(text, reports, 3)
    if beside:
        text = (
            f"{len(beside)} volume files lie beside the slices of a DICOM series"
            f" ({listed(beside, 3)}): each counts as a volume of its own"
        )
        yield with_all(text, beside, 3)
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
        broken = folder.parts(ids, spec.reading.series) | lacking
        whole = [identity for identity in ids if identity not in broken]
        samples = [folder.files(identity) for identity in whole]
        prepared = dict(zip(whole, prepare_samples(cache, samples), strict=True))
        entries = [prepared.get(i) or broken[i] for i in ids]
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
    beside = where if where.is_dir() and not itself else Path(os.path.abspath(where)).parent
    own = data.preparation
    how = replace(samples.preparation, cache_dir=own.cache_dir, workers=own.workers)
    where = Path(own.cache_folder(str(beside)))
    whole = [each for identity, each in zip(ids, files, strict=True) if identity not in lacking]
    prepared = iter(prepare_samples(VolumeCache(where, samples.reading, how), whole))
    entries = [lacking.get(identity) or next(prepared) for identity in ids]
    broken = broken_samples(entries, files, None)
    for number, entry in enumerate(entries):
        if isinstance(entry, Entry) and entry.shape[0] != samples.channels:
            given = f"{entry.shape[0]} channel{'s' * (entry.shape[0] > 1)}"
            broken[number] = f"{given}, the model takes {samples.channels}"
            if len(files[number]) < samples.channels:
                broken[number] += ": name the files of each in a CSV file (data.path_column)"
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
        rows = paths_of(read_csv(where, data.path_columns), data.path_columns)
        named, torn = by_first(rows)
        if again := len(rows) - len(set(rows)):
            notes.append(f"{again} rows of {where} stand there again: used once")
        suffixes = data.path_suffix or ("",)
        files = [
            tuple(str(on_disk(where.parent / f"{name}{s}")) for name in names for s in suffixes)
            for names in named.values()
        ]
        ids = list(named)
        broken = {ids[number]: line for number, line in parts_among(files, series).items()}
        return ids, files, broken | torn
    if where.is_dir():
        report = None if data.strict else notes
        folder, lacking = open_folder(where, data, series, report, itself=True)
        notes += folder.notes
        files = [folder.files(identity) for identity in folder.ids]
        return [name_of(where) if i == "." else i for i in folder.ids], files, lacking
    if where.exists():
        return [where.name], [(str(where),)], {}
    raise UserError(f"{where}: no such file or folder, expected volumes, or a CSV of their paths")


def by_first(
    rows: Sequence[tuple[str, ...]],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Paths of samples by the first one, which names them, and for those that stand in rows of
    different paths the line that says so."""
    named: dict[str, list[tuple[str, ...]]] = {}
    for paths in dict.fromkeys(rows):
        named.setdefault(paths[0], []).append(paths)
    torn = {
        name: f"stands beside {' and beside '.join(listed(paths[1:]) for paths in each)}: the first"
        " file of a sample must be its own"
        for name, each in named.items()
        if len(each) > 1
    }
    return {name: each[0] for name, each in named.items()}, torn
