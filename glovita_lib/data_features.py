"""The data set of precomputed features: files or folders, labels, splits."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glovita_lib.data import (
    Asked,
    BagSamples,
    Data,
    Source,
    Split,
    VectorSamples,
    read_data_set,
    splits_needed,
)
from glovita_lib.data_labels import Encoded, encode, missing_words, untrained
from glovita_lib.data_splits import (
    fold_splits,
    folds,
    in_one_form,
    read_splits,
    refuse_shared_groups,
    refuse_shared_rows,
    strata,
)
from glovita_lib.data_subtask import LabelRules, Labels
from glovita_lib.dist import cores
from glovita_lib.errors import UserError, composed, ended, key_of, listed, with_all
from glovita_lib.files import on_disk, read_csv
from glovita_lib.read_bags import FolderBags, bag_files, check_bags, open_folder
from glovita_lib.read_features import (
    BagSource,
    FeatureFile,
    FileBags,
    Keys,
    VectorSource,
    check_finite,
    open_features,
)
from glovita_lib.spec_data import CollectionData, PrecomputedData

SomeCollection = TypeVar("SomeCollection", bound="Collection")
Table = dict[str, dict[str, str]]
"""Rows of labels_file by composed id."""

# ---------------------------------------------------------------------------------- collections
#
# The samples of a feature file or folder, with what a CSV table says of them.
#
# N samples, K label columns, D width.


@dataclass(slots=True)
class Collection:
    """The samples of one file or folder, before splits; one class a kind of samples."""

    where: str
    ids: list[str]
    rows: np.ndarray  # (N,) where they are in the file or folder
    named: bool  # whether the ids are names, that mean the same in other files
    labels: (
        np.ndarray | list[Any] | None
    )  # an array (N,) or (N, K), or cells of a table, see Labels
    groups: list[str] | None
    class_names: tuple[str, ...] | None
    subtask: str | None  # where the file says so
    split_of: list[str] | None  # from the split_column of labels_file
    stored: int  # samples of the file or folder, also those that no table lists

    def source(self, rows: np.ndarray) -> Source:
        """Source of some of the samples."""
        raise NotImplementedError


@dataclass(slots=True)
class FeatureCollection(Collection):
    """The features of one file or folder."""

    features: FeatureFile | FileBags | FolderBags  # vectors of a file, or bags

    @property
    def samples(self) -> VectorSamples | BagSamples:
        """What a sample is."""
        kind = VectorSamples if isinstance(self.features, FeatureFile) else BagSamples
        return kind(width=self.features.width)

    def source(self, rows: np.ndarray) -> Source:
        """Source of some of the samples."""
        if isinstance(self.features, FeatureFile):
            return VectorSource(self.features.rows, self.rows[rows])
        return BagSource(self.features, self.rows[rows])

    def notes(self) -> list[str]:
        """Lines about files that can only be read slowly, of those that were read so far."""
        match self.features:
            case FolderBags(proven=proven):
                slow = f"{sum(not direct for direct in proven.values())} files"
                if all(proven.values()):
                    return []
            case FileBags(file=file) | (FeatureFile() as file):
                slow = "features"
                if file.rows.direct:
                    return []
        return [f"{self.where}: {slow} read through h5py, as the direct way gave other values"]


def read_table(spec: CollectionData, labels_file: str) -> Table:
    """Rows of labels_file by composed id.

    Raises:
        UserError: no such file or column, or an id twice.
    """
    path = on_disk(Path(spec.data_root_dir) / labels_file)
    wanted = [spec.id_column, *label_columns(spec)]
    wanted += [spec.group_column] if spec.group_column else []
    wanted += [spec.split_column] if spec.split_source == "csv" else []
    rows = read_csv(path, wanted)
    table = {key_of(row[spec.id_column]): row for row in rows}
    if len(table) < len(rows):
        counts = Counter(key_of(row[spec.id_column]) for row in rows)
        twice = [repr(name) for name, count in counts.items() if count > 1]
        text = f"{path}: id {twice[0]} occurs twice; give each sample one row"
        raise UserError(ended(with_all(text, twice, 1)))
    return table


def label_columns(spec: CollectionData) -> tuple[str, ...]:
    """Label columns as a tuple."""
    return (spec.label_column,) if isinstance(spec.label_column, str) else spec.label_column


def with_table(
    spec: CollectionData, collection: SomeCollection, table: Table | None
) -> SomeCollection:
    """The samples that the CSV lists, with its labels, groups and splits, where there is one.

    Raises:
        UserError: it lists none of them, or an empty label or group.
    """
    if table is None:
        return collection
    kept = [place for place, name in enumerate(collection.ids) if key_of(name) in table]
    if not kept:
        raise UserError(
            f"{spec.labels_file}: no row for any sample of {collection.where}; its ids are"
            f" {listed(collection.ids, 3)}, in column {spec.id_column} stand"
            f" {listed((row[spec.id_column] for row in table.values()), 3)}"
        )
    ids = [collection.ids[place] for place in kept]
    rows = [table[key_of(name)] for name in ids]
    columns = label_columns(spec)
    for column in (*columns, *([spec.group_column] if spec.group_column else [])):
        blank = [row[spec.id_column] for row in rows if not row[column]]
        if blank:
            text = (
                f"{spec.labels_file}: column {column} is empty for {len(blank)} samples"
                f" ({listed(blank)}); fill it in, or remove these samples"
            )
            raise UserError(ended(with_all(text, blank)))
    group = spec.group_column
    groups = collection.groups and [collection.groups[place] for place in kept]
    return replace(
        collection,
        ids=ids,
        rows=collection.rows[kept],
        labels=[row[columns[0]] for row in rows]
        if len(columns) == 1
        else [tuple(row[column] for column in columns) for row in rows],
        class_names=None,
        groups=[row[group] for row in rows] if group else groups,
        split_of=[row[spec.split_column] for row in rows] if spec.split_source == "csv" else None,
    )


def refuse_missing(collection: Collection, classes: Sequence[str] | None) -> None:
    """Raise an error where "?", "NA" or another word for a missing value stands for a label and no
    class is named so: it is none, of which a class would be made."""
    labels: Any = () if collection.labels is None else collection.labels
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "UO":
        return
    wrong: dict[str, list[str]] = {}
    for identity, label in zip(collection.ids, labels, strict=False):
        for text in missing_words(label, classes):
            wrong.setdefault(text, []).append(identity)
    if wrong:
        told = "; ".join(f'"{text}" of {listed(own)}' for text, own in wrong.items())
        text = (
            f"{collection.where}: there is no label ({told}): fill it in or leave these samples"
            " out, or name it in data.class_names where it is a class"
        )
        each = [f'{identity} "{text}"' for text, own in wrong.items() for identity in own]
        raise UserError(ended(with_all(text, each)))


def refuse_row_numbers(collections: Sequence[Collection], table: Table | None) -> None:
    """The rows of a table belong to one file each, also where ids are the numbers of rows.

    Raises:
        UserError: files without ids count their samples from 0 alike.
    """
    seen: dict[str, Collection] = {}
    for whole in collections if table is not None else ():
        for identity in map(composed, whole.ids):
            other = seen.setdefault(identity, whole)
            if other is not whole and not (other.named and whole.named):
                bare = whole if not whole.named else other
                raise UserError(
                    f"{bare.where} has no ids, so row {identity!r} of data.labels_file would be"
                    f" that of {other.where} and that of {whole.where}: store ids in the files, or"
                    " labels"
                )


# ------------------------------------------------------------------------------ the data set
#
# N samples, K classes or targets, D width.

KINDS = ("features", "labels", "bag_ptr", "bag_lengths", "ids", "groups", "coords")
"""Datasets of a feature file; data.<kind>_key is the name of each."""


@read_data_set.register
def _(spec: PrecomputedData, *, seed: int, asked: Asked) -> Data:
    wanted = asked.wanted
    table = None if spec.labels_file is None else read_table(spec, spec.labels_file)
    files = files_of(spec)
    opened = open_all(spec, files, table, splits_needed(files, wanted))
    collections = list(opened.values())
    forms: dict[str, str] = {}
    for whole in collections:
        whole.groups = None if whole.groups is None else in_one_form(whole.groups, forms)
    refuse_mixture(collections)
    refuse_row_numbers(collections, table)
    if table is not None and spec.split_source == "csv":
        refuse_emptied(spec, table, collections[0], wanted)
    columns = None if table is None or isinstance(spec.label_column, str) else spec.label_column
    found = encode_labels(spec, collections, columns, asked)
    subtask, names, encoded, number_names = found
    targets = dict(zip(opened, encoded, strict=True))
    if spec.split_source == "files":
        rows = {name: np.arange(len(opened[file].ids)) for name, file in files.items()}
    else:
        ((file, whole),) = opened.items()
        rows = split_rows(spec, whole, targets[file], subtask, seed, wanted)
        files = dict.fromkeys(rows, file)
    splits = {
        name: make_split(opened[files[name]], targets[files[name]], rows[name]) for name in rows
    }
    refuse_shared(opened, files, rows)
    if spec.check_values:
        needed = splits_needed(rows, wanted)
        for file, whole in opened.items():
            parts = [rows[name] for name in rows if name in needed and files[name] == file]
            if parts:
                check_values(whole, np.unique(np.concatenate(parts)))
    return Data(
        name="precomputed_features",
        splits=splits,
        subtask=subtask,
        class_names=names,
        ordered=spec.class_names is not None,
        number_names=number_names,
        samples=collections[0].samples,
        report=[
            *(note for whole in collections for note in whole.notes()),
            *unused(spec, table, collections, splits),
            *shared_ids({name: splits[name] for name in splits if opened[files[name]].named}),
            *(
                untrained(targets[files["train"]][rows["train"]], names, subtask)
                if "train" in rows
                else []
            ),
        ],
    )


def encode_labels(
    spec: CollectionData,
    collections: Sequence[Collection],
    columns: tuple[str, ...] | None,
    asked: Asked,
) -> Encoded:
    """Targets of all collections.

    Args:
        columns: of the table, where there are several.
        asked: what is known of the model that the samples are for.

    Raises:
        UserError: see data_labels.encode.
    """
    rules = LabelRules(
        spec.subtask,
        spec.class_names,
        spec.num_classes,
        columns,
        trained=asked.trained,
        predicts=asked.predicts,
    )
    labels = [
        Labels(whole.labels, whole.ids, whole.where, whole.subtask, whole.class_names)
        for whole in collections
        if whole.labels is not None  # all have some: a table gives them, or a file is refused
    ]
    return encode(labels, rules)


def make_split(collection: Collection, targets: np.ndarray, rows: np.ndarray) -> Split:
    """Some samples of a collection as a split."""
    groups = collection.groups
    return Split(
        ids=[collection.ids[row] for row in rows],
        targets=targets[rows],
        source=collection.source(rows),
        groups=None if groups is None else [groups[row] for row in rows],
    )


# ---------------------------------------------------------------------- opening


def files_of(spec: PrecomputedData) -> dict[str, str]:
    """The file or folder of each split, or of "all" where the splits are drawn from one."""
    if spec.split_source != "files":
        assert spec.features_file is not None  # else it is among the missing files
        return {"all": spec.features_file}
    files = {
        "train": spec.train_features_file,
        "val": spec.val_features_file,
        "test": spec.test_features_file,
    }
    return {name: file for name, file in files.items() if file is not None}


def open_all(
    spec: PrecomputedData, files: dict[str, str], table: Table | None, needed: set[str]
) -> dict[str, FeatureCollection]:
    """The files or folders of splits. Those of splits that are not needed tell which classes there
    are; where they cannot be read, their splits are taken away.

    Args:
        table: rows of labels_file, where there is one.

    Raises:
        UserError: whatever is wrong with one that is needed.
    """
    used = used_ids(spec, table)
    opened: dict[str, FeatureCollection] = {}
    for split, file in list(files.items()):
        if file not in opened:
            try:
                opened[file] = open_collection(spec, file, table, used)
            except UserError:
                if any(files[name] == file for name in needed):
                    raise
                del files[split]
    return opened


def refuse_mixture(collections: list[FeatureCollection]) -> None:
    """The files of one data set have the same width and kind.

    Raises:
        UserError: what differs, by file.
    """
    widths = {c.where: c.samples.width for c in collections}
    kinds = {c.where: c.samples.kind for c in collections}
    for what, values, advice in (
        ("widths", widths, "use one encoder for all"),
        ("kinds", kinds, "use one kind for all"),
    ):
        if len(set(values.values())) > 1:
            each = listed(f"{where} {value}" for where, value in values.items())
            raise UserError(f"feature files of different {what}: {each}; {advice}")


def used_ids(spec: CollectionData, table: Table | None) -> Container[str] | None:
    """Composed ids of the samples that will be read, as labels_file and split_file say; None: all.

    Raises:
        UserError: see data_splits.read_splits.
    """
    if spec.split_source == "splits_json":
        content = read_splits(on_disk(Path(spec.data_root_dir) / spec.split_file), spec.fold)
        return {composed(name) for names in content.values() for name in names}
    if table is not None and spec.split_source == "csv":
        return {name for name, row in table.items() if row[spec.split_column]}
    return table


def open_collection(
    spec: PrecomputedData,
    name: str,
    table: Table | None,
    used: Container[str] | None,
) -> FeatureCollection:
    """A file or folder with its labels, checked.

    Args:
        table: rows of labels_file, where there is one.
        used: composed ids of the samples that will be read, where not all of them.

    Raises:
        UserError: whatever is wrong with it, see read_features.open_features.
    """
    path = on_disk(Path(spec.data_root_dir) / name)
    if path.is_dir() and table is None:
        raise UserError(
            f"{path} is a folder of bags without labels; give data.labels_file, a CSV with the"
            f" columns {spec.id_column} and {spec.label_column}"
        )
    collection = read_collection(path, keys(spec), labelled=table is None, listed=table, used=used)
    labelled = with_table(spec, collection, table)
    if table is not None:  # the names in a feature file are those of whoever wrote it
        refuse_missing(labelled, spec.class_names)
    return labelled


def check_values(collection: FeatureCollection, rows: np.ndarray) -> None:
    """Look at every feature of some samples of a collection once.

    Raises:
        UserError: NaN or infinity, with the samples that have them.
    """
    samples = collection.rows[rows]
    match collection.features:
        case FolderBags() as folder:
            check_bags(folder, samples, threads=cores())
        case FileBags(file=file) | (FeatureFile() as file):
            check_finite(file, samples)


def unlabelled_features(
    path: Path, spec: PrecomputedData
) -> tuple[Split, VectorSamples | BagSamples, list[str]]:
    """Features without labels, for inference, what a sample of them is, and lines about them;
    labels in the file are not read.

    Args:
        spec: the names of the datasets are its.

    Raises:
        UserError: see read_features.open_features.
    """
    path = on_disk(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder, expected a feature file, or a folder of one-bag files"
        )
    collection = read_collection(path, keys(spec), labelled=False)
    rows = np.arange(len(collection.ids))
    if spec.check_values:
        check_values(collection, rows)
    split = Split(ids=collection.ids, targets=None, source=collection.source(rows))
    return split, collection.samples, collection.notes()


def read_collection(
    path: Path,
    names: Keys,
    *,
    labelled: bool,
    listed: Container[str] | None = None,
    used: Container[str] | None = None,
) -> FeatureCollection:
    """A feature file, or a folder of one-bag files whose names without suffix are the ids.

    Args:
        listed: composed ids that a table lists, where there is one.
        used: composed ids of the samples that will be read, where not all of them.

    Raises:
        UserError: it is damaged, has no sample or, where `labelled` asks for them, no labels; or
        two samples have the same id.
    """
    features: FeatureFile | FileBags | FolderBags
    file = None
    if path.is_dir():
        paths = bag_files(path)
        ids = [bag.stem for bag in paths]
        refuse_equal(path, ids, listed)
        features = open_folder(paths, names, used)
    else:
        file = open_features(path, names, threads=cores(), labelled=labelled, used=used)
        features = file if file.ptr is None else FileBags(file, file.ptr, names)
        ids = file.ids
        refuse_equal(path, ids, listed)
    said = None if file is None else file.attributes.get("subtask")
    return FeatureCollection(
        where=str(path),
        ids=ids,
        rows=np.arange(len(ids)),
        named=file is None or file.named,
        labels=None if file is None else file.labels,
        groups=None if file is None else file.groups,
        class_names=None if file is None else file.class_names,
        subtask=None if said is None else str(said),
        split_of=None,
        stored=len(ids),
        features=features,
    )


def refuse_equal(path: Path, ids: list[str], listed: Container[str] | None) -> None:
    """There are samples, and each that a table lists (or that there is) has an id of its own.

    Raises:
        UserError: it has not.
    """
    if not ids:
        raise UserError(f"{path}: the file has no sample")
    names = map(composed, ids)
    counts = Counter(names if listed is None else [name for name in names if name in listed])
    if twice := [(name, times) for name, times in counts.most_common() if times > 1]:
        text = (
            f"{path}: id {twice[0][0]!r} is that of {twice[0][1]} samples; splits, labels and"
            " predictions go by ids: give each sample its own"
        )
        raise UserError(ended(with_all(text, (f"{name!r} ({times})" for name, times in twice), 1)))


def keys(spec: PrecomputedData) -> Keys:
    """Names of the datasets."""
    names = {kind: getattr(spec, f"{kind}_key") for kind in KINDS}
    defaults = {getattr(PrecomputedData(), f"{kind}_key") for kind in KINDS}
    named = frozenset(names.values()) - defaults
    return Keys(**names, named=named, follow_links=spec.follow_links)


# ---------------------------------------------------------------------- splits


def split_rows(
    spec: CollectionData,
    whole: Collection,
    targets: np.ndarray,
    subtask: str,
    seed: int,
    wanted: Sequence[str] | None,
) -> dict[str, np.ndarray]:
    """Rows of the splits of one collection."""
    if spec.split_source == "kfold":
        labels = strata(targets, subtask, kept=spec.stratified)
        groups = None if whole.groups is None else np.array(whole.groups)
        fold_of = folds(labels, spec.n_folds, seed=seed, groups=groups)
        return fold_splits(fold_of, int(spec.fold), spec.n_folds)
    if spec.split_source == "csv":
        return column_rows(spec, whole)
    return listed_rows(spec, whole, wanted)


def column_rows(spec: CollectionData, whole: Collection) -> dict[str, np.ndarray]:
    """Rows of each split that split_column names; rows without one are not used.

    Raises:
        UserError: another name.
    """
    assert whole.split_of is not None  # split_source csv without a labels_file is refused
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": [], "": []}
    unknown = [name for name in whole.split_of if name not in rows]
    if unknown:
        raise UserError(
            f"column {spec.split_column} of {spec.labels_file or whole.where}: {unknown[0]!r}"
            f" ({len(unknown)} samples) is no split; write train, val or test, or nothing where a"
            " sample is not to be used"
        )
    for row, name in enumerate(whole.split_of):
        rows[name].append(row)
    return {name: np.array(found) for name, found in rows.items() if name and found}


def refuse_emptied(
    spec: CollectionData, table: Table, whole: Collection, wanted: Sequence[str] | None
) -> None:
    """Each split that split_column names and that is needed has a sample.

    Raises:
        UserError: some ids of those that have none.
    """
    named: dict[str, list[str]] = {}
    for row in table.values():
        named.setdefault(row[spec.split_column], []).append(row[spec.id_column])
    named.pop("", None)
    needed, there = splits_needed(named, wanted), set(whole.split_of or ())
    lines = [
        with_all(
            f"{spec.labels_file}: {whole.where} has no sample of {name}: no {spec.id_column} of its"
            f" {len(ids)} rows ({listed(ids, 3)}) is there, it has e.g. {listed(whole.ids, 3)};"
            f" correct the ids, or leave {spec.split_column} empty in these rows",
            ids,
            most=3,
        )
        for name, ids in named.items()
        if name in needed and name not in there
    ]
    if lines:
        raise UserError("\n".join(lines))


def listed_rows(
    spec: CollectionData, whole: Collection, wanted: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Rows of the ids that split_file lists; of splits that are not needed, of those that are
    there.

    Raises:
        UserError: no such fold or split, an id that is not there or is listed twice.
    """
    path = on_disk(Path(spec.data_root_dir) / spec.split_file)
    content = read_splits(path, spec.fold)
    unknown = [name for name in content if name not in ("train", "val", "test")]
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is no split; there are train, val and test")
    place = {composed(name): row for row, name in enumerate(whole.ids)}
    content = {name: list(map(composed, ids)) for name, ids in content.items()}
    needed = splits_needed(content, wanted)
    for name, ids in list(content.items()):
        if name not in needed:
            content[name] = [identity for identity in dict.fromkeys(ids) if identity in place]
            continue
        absent = [identity for identity in ids if identity not in place]
        if absent:
            places = whole.where
            if spec.labels_file:
                places = f"both {places} and {spec.labels_file}"
            text = (
                f"{path}: {len(absent)} ids of {name} are not in {places}"
                f" ({listed(absent)}); what is there is e.g. {listed(whole.ids, 3)}"
            )
            raise UserError(ended(with_all(text, absent)))
        if again := [repr(identity) for identity, count in Counter(ids).items() if count > 1]:
            text = f"{path}: {name} lists {again[0]} twice; list each id once"
            raise UserError(ended(with_all(text, again, 1)))
    rows = {name: np.array([place[i] for i in ids], int) for name, ids in content.items()}
    return {name: found for name, found in rows.items() if name in needed or len(found)}


def refuse_shared(
    opened: Mapping[str, Collection], files: dict[str, str], rows: dict[str, np.ndarray]
) -> None:
    """No sample and no group may be in two splits; but test may be the same samples as val.

    Raises:
        UserError: one is.
    """
    ends = np.cumsum([len(whole.ids) for whole in opened.values()])
    first = dict(zip(opened, [0, *ends], strict=False))  # number of the first sample of each file
    numbers = {split: first[files[split]] + found for split, found in rows.items()}
    ids = [identity for whole in opened.values() for identity in whole.ids]
    refuse_shared_rows(ids, numbers)
    groups: list[str | None] = []
    for whole in opened.values():
        groups += [None] * len(whole.ids) if whole.groups is None else whole.groups
    refuse_shared_groups(ids, groups, numbers)


def unused(
    spec: CollectionData,
    table: Table | None,
    collections: Sequence[Collection],
    splits: dict[str, Split],
) -> list[str]:
    """Lines about rows of the table without a sample, and samples in no split."""
    lines = [
        f"{whole.stored - len(whole.ids)} of {whole.stored} samples of {whole.where} are not in"
        f" {spec.labels_file}: not used"
        for whole in collections
        if whole.stored > len(whole.ids)
    ]
    ids = {composed(identity) for whole in collections for identity in whole.ids}
    rows = table or {}
    absent = [row[spec.id_column] for name, row in rows.items() if name not in ids]
    if absent:
        lines.append(
            f"{len(absent)} rows of {spec.labels_file} have no sample, e.g. {absent[0]}: not used"
        )
    left = sum(len(whole.ids) for whole in collections) - sum(map(len, splits.values()))
    if left > 0 and spec.split_source != "files":
        lines.append(f"{left} samples of {collections[0].where} are in no split: not used")
    return lines


def shared_ids(splits: dict[str, Split]) -> list[str]:
    """Lines about ids that occur in two splits of several files."""
    lines, names = [], list(splits)
    ids = {name: set(map(composed, split.ids)) for name, split in splits.items()}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = ids[first] & ids[second]
            if both:
                example = min(both)
                lines.append(f"{len(both)} ids are in {first} and {second}, e.g. {example}")
    return lines
