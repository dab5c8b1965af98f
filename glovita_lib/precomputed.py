"""The data set of precomputed features: files or folders, labels, splits.

N samples, K classes or targets, D width.
"""

from pathlib import Path

import numpy as np

from glovita_lib.feature_labels import (
    Collection,
    encode,
    read_table,
    resolve_names,
    resolve_subtask,
    with_table,
)
from glovita_lib.feature_sources import FileBags, check_bags, open_folder
from glovita_lib.files import read_json
from glovita_lib.hdf5 import Keys, check_finite, open_features
from glovita_lib.loaders import cores
from glovita_lib.samples import Data, Split, read_data
from glovita_lib.spec import UserError
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.splits import fold_splits, folds, strata


@read_data.register
def _(spec: PrecomputedData, *, seed: int) -> Data:
    collections = open_all(spec)
    widths = {c.where: c.width for c in collections.values()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{where} {width}" for where, width in widths.items())
        raise UserError(f"feature files of different widths: {listed}; use one encoder for all")
    if len({c.bags is None for c in collections.values()}) > 1:
        raise UserError("some of the feature files hold bags, others vectors; use one kind for all")
    subtask = resolve_subtask(spec, list(collections.values()))
    names = resolve_names(spec, list(collections.values()), subtask)
    targets = {name: encode(collection, subtask, names) for name, collection in collections.items()}
    if spec.split_source == "files":
        rows = {name: np.arange(len(c.ids)) for name, c in collections.items()}
        origin = {name: name for name in collections}
    else:
        rows = split_rows(spec, collections["all"], targets["all"], subtask, seed)
        origin = dict.fromkeys(rows, "all")
    splits = {
        name: make_split(collections[origin[name]], targets[origin[name]], rows[name])
        for name in rows
    }
    refuse_shared_groups(splits)
    return Data(
        name="precomputed_features",
        splits=splits,
        subtask=subtask,
        class_names=names,
        channels=next(iter(widths.values())),
        bit_depth=16,
        report=[*shared_ids(splits), *untrained(splits, names, subtask)],
    )


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


def open_all(spec: PrecomputedData) -> dict[str, Collection]:
    """Collections by split, or one named "all"."""
    if spec.split_source != "files":
        return {"all": open_collection(spec, spec.features_file)}
    files = {
        "train": spec.train_features_file,
        "val": spec.val_features_file,
        "test": spec.test_features_file,
    }
    return {name: open_collection(spec, file) for name, file in files.items() if file is not None}


def open_collection(spec: PrecomputedData, name: str) -> Collection:
    """A file or folder with its labels, checked.

    Raises:
        UserError: whatever is wrong with it, see hdf5.open_features.
    """
    path = Path(spec.data_root_dir) / name
    table = None if spec.labels_file is None else read_table(spec)
    if path.is_dir():
        return with_table(spec, open_bag_folder(spec, path), table)
    file = open_features(path, keys(spec), threads=cores(), labelled=table is None)
    if not len(file):
        raise UserError(f"{path}: the file has no sample")
    if spec.check_values:
        check_finite(file)
    collection = Collection(
        where=str(path),
        ids=file.ids,
        labels=file.labels,
        groups=file.groups,
        class_names=file.class_names,
        subtask=file.attributes.get("subtask"),
        split_of=None,
        vectors=file,
        bags=None if file.layout == "vectors" else FileBags(file, keys(spec)),
    )
    return with_table(spec, collection, table)


def keys(spec: PrecomputedData) -> Keys:
    """Names of the datasets."""
    return Keys(
        features=spec.features_key,
        labels=spec.labels_key,
        bag_ptr=spec.bag_ptr_key,
        bag_lengths=spec.bag_lengths_key,
        ids=spec.ids_key,
        groups=spec.groups_key,
        coords=spec.coords_key,
    )


def open_bag_folder(spec: PrecomputedData, path: Path) -> Collection:
    """A folder of one-bag files; their names without suffix are the ids."""
    if spec.labels_file is None:
        raise UserError(
            f"{path} is a folder of bags without labels; give data.labels_file, a CSV with the"
            f" columns {spec.id_column} and {spec.label_column}"
        )
    bags = open_folder(path, keys(spec))
    if spec.check_values:
        check_bags(bags)
    return Collection(
        where=str(path),
        ids=[file.stem for file in bags.paths],
        labels=np.zeros(len(bags.paths)),  # replaced by those of the table
        groups=None,
        class_names=None,
        subtask=None,
        split_of=None,
        vectors=None,
        bags=bags,
    )


# ---------------------------------------------------------------------- splits


def split_rows(
    spec: PrecomputedData, whole: Collection, targets: np.ndarray, subtask: str, seed: int
) -> dict[str, np.ndarray]:
    """Rows of the splits of one collection."""
    if spec.split_source == "kfold":
        labels = strata(targets, subtask) if spec.stratified else np.zeros(len(targets), np.int64)
        groups = None if whole.groups is None else np.array(whole.groups)
        fold_of = folds(labels, spec.n_folds, seed=seed, groups=groups)
        return fold_splits(fold_of, spec.fold, spec.n_folds)
    if spec.split_source == "csv":
        names = np.array(whole.split_of)
        found = {name: np.flatnonzero(names == name) for name in ("train", "val", "test")}
        return {name: rows for name, rows in found.items() if len(rows)}
    return listed_rows(spec, whole)


def listed_rows(spec: PrecomputedData, whole: Collection) -> dict[str, np.ndarray]:
    """Rows of the ids that split_file lists.

    Raises:
        UserError: no such fold, or an id that is not there.
    """
    path = Path(spec.data_root_dir) / spec.split_file
    content = read_json(path)
    if isinstance(content, list):
        if spec.fold >= len(content):
            raise UserError(f"{path}: data.fold = {spec.fold}, but it has {len(content)} folds")
        content = content[spec.fold]
    place = {name: row for row, name in enumerate(whole.ids)}
    listed = {name: content[name] for name in ("train", "val", "test") if content.get(name)}
    absent = [i for ids in listed.values() for i in ids if str(i) not in place]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} ids are not in {whole.where}"
            f" ({', '.join(map(str, absent[:10]))})"
        )
    return {name: np.array([place[str(i)] for i in ids]) for name, ids in listed.items()}


def refuse_shared_groups(splits: dict[str, Split]) -> None:
    """No group may be in two splits.

    Raises:
        UserError: one is.
    """
    owner: dict[str, str] = {}
    for name, split in splits.items():
        for group in dict.fromkeys(split.groups or ()):
            if group in owner:
                raise UserError(
                    f"group {group!r} is in the splits {owner[group]} and {name}: the samples of a"
                    " group must stay together"
                )
            owner[group] = name


def untrained(splits: dict[str, Split], names: tuple[str, ...], subtask: str) -> list[str]:
    """A line about classes that other splits have and train lacks."""
    if subtask != "multiclass" or "train" not in splits:
        return []
    others = [split.targets for name, split in splits.items() if name != "train"]
    found = np.unique(np.concatenate([np.empty(0, np.int64), *others]))
    absent = [names[number] for number in np.setdiff1d(found, splits["train"].targets)]
    if not absent:
        return []
    return [f"{len(absent)} classes have no train sample: {', '.join(absent[:10])}"]


def shared_ids(splits: dict[str, Split]) -> list[str]:
    """A line about ids that occur in two splits; row numbers as ids say nothing."""
    lines, names = [], list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            ids = [i for i in splits[second].ids if not i.isdigit()]
            both = set(splits[first].ids).intersection(ids)
            if both:
                example = min(both)
                lines.append(f"{len(both)} ids are in {first} and {second}, e.g. {example}")
    return lines
