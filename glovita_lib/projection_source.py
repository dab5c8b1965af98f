"""The samples that are drawn as points: from a feature file or a folder of bags, or from the spec's
own model.

N samples, B bags, M instances, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glovita_lib.feature_labels import Collection, encode, resolve_names, resolve_subtask
from glovita_lib.feature_sources import FileBags, FolderBags, open_folder
from glovita_lib.hdf5 import FeatureFile, Keys, open_features
from glovita_lib.loaders import cores
from glovita_lib.precomputed import keys
from glovita_lib.projection import choose
from glovita_lib.spec import UserError
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.spec_umap import Umap
from glovita_lib.splits import strata

Images = Callable[[int], np.ndarray]


@dataclass(frozen=True, slots=True)
class Samples:
    """The chosen samples and what is known of them."""

    features: np.ndarray  # (N, D) float32
    ids: list[str]
    bags: list[str] | None  # bag of each instance
    targets: np.ndarray | None  # (N,) int64 or (N, K) float32
    scores: np.ndarray | None  # (N, K) predictions
    subtask: str
    class_names: tuple[str, ...]
    splits: list[str] | None  # name of the split of each sample, where there are several
    image: Images | None  # image (C, H, W) of a sample, where there are some
    total: int  # samples that they were chosen from
    name: str  # of the data, for the heading


def from_file(path: Path, spec: Umap, data: object, *, seed: int) -> Samples:
    """Samples of a feature file in any layout, or of a folder of bags; labels are not needed.

    Args:
        data: section data of the spec; the names of the datasets are its, where it has some.

    Raises:
        UserError: no such file, damaged, empty, or with NaN among the chosen features.
    """
    names = keys(data if isinstance(data, PrecomputedData) else PrecomputedData())
    if not path.exists():
        raise UserError(f'umap.input: "{path}" does not exist')
    collection = open_collection(path, names)
    if not len(collection.ids):
        raise UserError(f"{path}: the file has no sample")
    targets, subtask, class_names = labels_of(collection)
    lengths = np.ones(len(collection.ids), np.int64)
    if collection.bags is not None and spec.bags == "instances":
        lengths = collection.bags.lengths
    chosen = choose(sampling_classes(targets, subtask), lengths, spec, seed=seed)
    owner = np.searchsorted(np.cumsum(lengths), chosen, side="right")  # sample of each row
    instances = collection.bags is not None and spec.bags == "instances"
    features, ids = read(collection, chosen, owner, instances=instances)
    if not np.isfinite(features).all():
        bad = [ids[row] for row in np.flatnonzero(~np.isfinite(features).all(1))]
        raise UserError(
            f"{path}: NaN or infinite features in {len(bad)} samples ({', '.join(bad[:10])});"
            " extract them again (extract.precision = 32 if float16 overflowed)"
        )
    return Samples(
        features=features,
        ids=ids,
        bags=[collection.ids[bag] for bag in owner] if instances else None,
        targets=None if targets is None else targets[owner],
        scores=None,
        subtask=subtask,
        class_names=class_names,
        splits=None,
        image=None,
        total=int(lengths.sum()),
        name=path.stem,
    )


def open_collection(path: Path, names: Keys) -> Collection:
    """A file or folder, its labels as stored; None where it has none."""
    file: FeatureFile | None = None
    if path.is_dir():
        bags: FileBags | FolderBags | None = open_folder(path, names)
        ids = [part.stem for part in bags.paths]
    else:
        file = open_features(path, names, threads=cores(), labelled=False)
        bags = None if file.layout == "vectors" else FileBags(file, names)
        ids = file.ids
    return Collection(
        where=str(path),
        ids=ids,
        labels=None if file is None else file.labels,
        groups=None,
        class_names=None if file is None else file.class_names,
        subtask=None if file is None else file.attributes.get("subtask"),
        split_of=None,
        vectors=file,
        bags=bags,
    )


def labels_of(collection: Collection) -> tuple[np.ndarray | None, str, tuple[str, ...]]:
    """Targets, their kind and names; None where there are no labels."""
    if collection.labels is None or not len(collection.ids):
        return None, "multiclass", ()
    spec = PrecomputedData()
    subtask = resolve_subtask(spec, [collection])
    names = resolve_names(spec, [collection], subtask)
    return encode(collection, subtask, names), subtask, names


def sampling_classes(targets: np.ndarray | None, subtask: str) -> np.ndarray | None:
    """Class by which samples are thinned out: of several labels the rarest; none of numbers."""
    if targets is None or subtask == "regression":
        return None
    return strata(targets, subtask)


def read(
    collection: Collection, chosen: np.ndarray, owner: np.ndarray, *, instances: bool
) -> tuple[np.ndarray, list[str]]:
    """Features (N, D) float32 and ids of the chosen rows.

    Args:
        chosen: (N,) rows: vectors, bags, or instances counted through all bags.
        owner: (N,) sample that each row belongs to.
        instances: whether rows are instances of bags.
    """
    if collection.bags is None:
        features = collection.vectors.rows.take(chosen).astype(np.float32)
        return features, [collection.ids[row] for row in chosen]
    if not instances:
        means = [collection.bags.read(int(bag)).mean(0, dtype=np.float64) for bag in chosen]
        features = np.array(means, np.float32).reshape(-1, collection.width)
        return features, [collection.ids[bag] for bag in chosen]
    starts = np.cumsum(collection.bags.lengths) - collection.bags.lengths
    inside = chosen - starts[owner]
    ids = [f"{collection.ids[bag]}#{i}" for bag, i in zip(owner, inside, strict=True)]
    if collection.vectors is not None and collection.vectors.layout == "ragged":
        return collection.vectors.rows.take(chosen).astype(np.float32), ids
    parts = [
        collection.bags.read(int(bag))[inside[owner == bag]].astype(np.float32)
        for bag in np.unique(owner)  # rows are sorted, so are their bags
    ]
    return np.concatenate(parts), ids
