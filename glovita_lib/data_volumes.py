"""Data sets of volumes: NIfTI, NumPy and blosc2 files and DICOM folders with labels from folder
names, JSON or CSV, prepared and cached; and new volumes without labels.

A sample is known by its id: the path of its file or DICOM folder below the images folder, the
first one where several files are its channels, or what its files' names have before path_suffix.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, get_args

import numpy as np
from msgspec.structs import replace

from glovita_lib.data import Asked, Data, Split, VolumeSamples, read_data_set
from glovita_lib.data_folder import read_folder
from glovita_lib.data_tables import Problems, SampleFolder, walk, walk_folders
from glovita_lib.dist import cores, number_of
from glovita_lib.errors import UserError, listed
from glovita_lib.files import on_disk, read_csv, read_json_table
from glovita_lib.loggers import Rate
from glovita_lib.spec_data import VolumeData
from glovita_lib.spec_samples import WholeSubtask
from glovita_lib.spec_volumes import VolumePreparation
from glovita_lib.volume_cache import Entry, VolumeCache, VolumeSource

CACHE = "volume_cache"  # folder of the cache files, below that of the data set
DICOM = "dcm"  # the suffix that stands for folders of DICOM files too
MAGIC = b"DICM"  # bytes 128 to 131 of a DICOM file
LOOKED_AT = 3  # files of a folder

# ---------------------------------------------------------------------- which volumes there are


def dicom_folders(folder: Path) -> list[str]:
    """Ids of the folders below `folder` that hold DICOM files themselves, sorted."""
    found = []
    for parent, names in walk_folders(str(folder), []):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        if inside != "." and holds_dicom(parent, names):
            found.append(inside)
    return sorted(found)


def holds_dicom(folder: str, names: Sequence[str]) -> bool:
    """Whether a folder with these files holds DICOM files: .dcm or .ima, or without a suffix or
    named by a number, where a look at a few of them shows it."""
    names = sorted(names)
    likely = [name for name in names if name.lower().endswith((".dcm", ".ima"))]
    bare = [name for name in names if PurePosixPath(name).suffix[1:].isdecimal() or "." not in name]
    return any(True in islice(answers(folder, group), LOOKED_AT) for group in (likely, bare))


def answers(folder: str, names: Sequence[str]) -> Iterator[bool]:
    """Whether files are DICOM, by their first bytes, without those that cannot be read: whoever
    reads the folder says so."""
    for name in names:
        with suppress(OSError), open(os.path.join(folder, name), "rb") as file:
            file.seek(128)
            yield file.read(4) == MAGIC


@dataclass(slots=True)
class VolumeFolder(SampleFolder):
    """The volumes below a folder; a sample may have several files."""

    noun: ClassVar[str] = "volume"

    suffixes: tuple[str, ...] = ()
    """What follows an id in the names of its files; none: an id is a file."""
    studies: frozenset[str] = frozenset()
    """Folders of DICOM folders, which a table may name: a series of theirs is a sample."""
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Ids of all files of a sample, where a table names several."""

    def find(self, name: str) -> str | None:
        """Id of the volume at a path below the folder; also of a study."""
        path = str(PurePosixPath(name))
        return path if path in self.studies else SampleFolder.find(self, name)

    def find_row(self, names: tuple[str, ...]) -> tuple[str | None, str]:
        """Id of the sample of these files, that of the first, or the first name without a file."""
        found = [self.find(name) for name in names]
        if None in found:
            return None, names[found.index(None)]
        ids = tuple(identity for identity in found if identity is not None)
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
    folder: Path, exts: Sequence[str], suffixes: tuple[str, ...], report: list[str] | None
) -> tuple[VolumeFolder, dict[str, str]]:
    """The volumes below a folder, and for samples that lack one of their files the line that says
    so.

    Args:
        report: see `walk`.

    Raises:
        UserError: no such folder, or one that cannot be listed.
    """
    files = walk(folder, exts, report=report)
    if suffixes:
        known = {*files, *(dicom_folders(folder) if DICOM in exts else ())}
        starts = sorted({f.removesuffix(s) for s in suffixes for f in known if f.endswith(s)})
        lacking = {i: [s for s in suffixes if i + s not in known] for i in starts}
        broken = {i: f"no file {i}{missing[0]}" for i, missing in lacking.items() if missing}
        return VolumeFolder(folder, starts, suffixes=suffixes), broken
    series = dicom_folders(folder) if DICOM in exts else []
    inside = set(series)
    files = [file for file in files if str(PurePosixPath(file).parent) not in inside]
    parents = {str(parent) for each in series for parent in PurePosixPath(each).parents}
    studies = frozenset(parents - {"."} - inside)
    return VolumeFolder(folder, sorted([*files, *series]), studies=studies), {}


# ---------------------------------------------------------------------- preparing them


def cache_folder(preparation: VolumePreparation, beside: Path) -> Path:
    """Folder of the cache files: the one of the spec, or one in the folder of the data set."""
    return beside / CACHE if preparation.cache_dir is None else Path(preparation.cache_dir)


def prepare_samples(cache: VolumeCache, samples: Sequence[tuple[str, ...]]) -> list[Entry | str]:
    """The cache file of each sample, or the line that says why there is none, with a progress bar
    on the first rank."""
    rate = Rate("preparing volumes", len(samples), shown=number_of("RANK", 0) == 0)
    workers = cache.preparation.workers or cores()
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
        spec.allowed_exts,
        spec.path_suffix,
        None if spec.strict else report,
    )
    if not folder.ids:
        exts = ", ".join(spec.path_suffix or spec.allowed_exts)
        raise UserError(f"{folder.folder}: no volume with a suffix of {exts}; see data.images_dir")
    cache = VolumeCache(cache_folder(spec.preparation, base), spec.reading, spec.preparation)

    def look(ids: list[str]) -> tuple[list[Entry | str], dict[int, str]]:
        whole = [identity for identity in ids if identity not in lacking]
        samples = [folder.files(identity) for identity in whole]
        prepared = dict(zip(whole, prepare_samples(cache, samples), strict=True))
        entries = [prepared.get(i) or lacking[i] for i in ids]
        return entries, broken_samples(entries, [folder.files(i) for i in ids], spec.channels)

    subtask = spec.stated_subtask() or "multiclass"
    table = read_folder(spec, subtask, folder, look, report, seed=seed, asked=asked)
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
    ids, files = new_files(where, data, None if data.strict else notes)
    if not ids:
        raise UserError(f"{path}: no volume with a suffix of {', '.join(data.allowed_exts)}")
    beside = where if where.is_dir() else where.parent
    own = data.preparation
    how = replace(samples.preparation, cache_dir=own.cache_dir, workers=own.workers)
    entries = prepare_samples(VolumeCache(cache_folder(own, beside), samples.reading, how), files)
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
    where: Path, data: VolumeData, report: list[str] | None
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Ids and files of new samples.

    Args:
        report: see `walk`; with one, samples that lack a file are left out and listed.

    Raises:
        UserError: there is nothing, or samples lack a file.
    """
    if where.suffix.lower() == ".csv":
        rows = read_csv(where, data.path_columns)
        named = [tuple(row[column] for column in data.path_columns) for row in rows]
        suffixes = data.path_suffix or ("",)
        return [names[0] for names in named], [
            tuple(str(on_disk(where.parent / f"{name}{s}")) for name in names for s in suffixes)
            for names in named
        ]
    if where.is_dir() and not dicom_only(where, data):
        folder, lacking = open_folder(where, data.allowed_exts, data.path_suffix, report)
        left_out = Problems(data.strict, "volume", lacking).of_new(len(folder.ids))
        if report is not None:
            report += left_out
        ids = [identity for identity in folder.ids if identity not in lacking]
        return ids, [folder.files(identity) for identity in ids]
    if where.exists():
        return [where.name], [(str(where),)]
    raise UserError(f"{where}: no such file or folder, expected volumes, or a CSV of their paths")


def dicom_only(where: Path, data: VolumeData) -> bool:
    """Whether a folder holds the slices of one volume itself."""
    # a link to what is not there is a file that is missing
    names = [path.name for path in where.iterdir() if not path.is_dir() and path.name[0] != "."]
    return DICOM in data.allowed_exts and holds_dicom(str(where), names)
