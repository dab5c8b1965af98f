"""The samples that are drawn as points, chosen from splits of images or features.

N samples, B bags, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path

import numpy as np

from glovita_lib.feature_labels import encode, resolve_names, resolve_subtask
from glovita_lib.feature_sources import BagSource, FileBags, feature_moments
from glovita_lib.precomputed import keys, read_collection
from glovita_lib.projection import choose
from glovita_lib.samples import Data, Split, subset
from glovita_lib.spec import Spec, UserError
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.spec_umap import Umap
from glovita_lib.splits import strata

Images = Callable[[int], np.ndarray]
"""The image (C, H, W) of a sample, uint8 or uint16."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says about samples, in terms of the data it was trained on."""

    scores: np.ndarray  # (N, K): probabilities, or outputs in target units
    subtask: str
    class_names: tuple[str, ...]  # K names


@dataclass(frozen=True, slots=True)
class Samples:
    """The chosen samples and what is known of them."""

    features: np.ndarray  # (N, D) float32
    ids: list[str]
    owners: list[str]  # bag of each instance; else the ids again
    targets: np.ndarray | None  # (N,) int64 or (N, K) float32
    said: Said | None  # predictions
    subtask: str
    class_names: tuple[str, ...]
    splits: list[str]  # name of the split of each sample
    image: Images | None
    total: int  # samples that they were chosen from
    name: str  # of the data, for the heading
    standardized: bool = False  # whether each feature has mean 0 and deviation 1 over train
    notes: tuple[str, ...] = ()  # lines for the console


# ---------------------------------------------------------------------- choice


def choose_rows(
    splits: dict[str, Split], lengths: dict[str, np.ndarray], subtask: str, spec: Umap, seed: int
) -> dict[str, np.ndarray]:
    """Sorted rows of each split that are shown; a sample has as many rows as its length says."""
    targets = [split.targets for split in splits.values()]
    classes = None
    if subtask != "regression" and all(part is not None for part in targets):
        classes = strata(np.concatenate(targets), subtask)  # of several labels the rarest
    counts = [int(lengths[name].sum()) for name in splits]
    rows = choose(classes, np.concatenate(list(lengths.values())), spec, seed=seed)
    ends = np.cumsum(counts)
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    begins = ends - counts
    return {
        name: part - begin
        for name, part, begin in zip(splits, parts, begins, strict=True)
        if len(part)
    }


def choose_samples(splits: dict[str, Split], data: Data, spec: Umap, seed: int) -> dict[str, Split]:
    """The splits with the samples that are shown; a split without any is left out."""
    lengths = {name: np.ones(len(split), np.int64) for name, split in splits.items()}
    rows = choose_rows(splits, lengths, data.subtask, spec, seed)
    return {name: subset(splits[name], part) for name, part in rows.items()}


# ---------------------------------------------------------------------- features


def samples_of_features(splits: dict[str, Split], data: Data, spec: Umap, seed: int) -> Samples:
    """Vectors, bags or instances of splits whose samples are features.

    Raises:
        UserError: NaN or infinity among the chosen ones.
    """
    lengths = {
        name: split.source.lengths()
        if isinstance(split.source, BagSource) and spec.bags == "instances"
        else np.ones(len(split), np.int64)
        for name, split in splits.items()
    }
    rows = choose_rows(splits, lengths, data.subtask, spec, seed)
    features, ids, owners, targets, names = [], [], [], [], []
    for name, chosen in rows.items():
        split = splits[name]
        ends = np.cumsum(lengths[name])
        owner = np.searchsorted(ends, chosen, side="right")  # sample of each row
        inside = chosen - (ends - lengths[name])[owner]
        if isinstance(split.source, BagSource) and spec.bags == "instances":
            features.append(instances(split.source, owner, inside))
            ids += [f"{split.ids[bag]}#{i}" for bag, i in zip(owner, inside, strict=True)]
        else:
            features.append(vectors(split, owner))
            ids += [split.ids[row] for row in owner]
        owners += [split.ids[row] for row in owner]
        targets += [] if split.targets is None else [split.targets[owner]]
        names += [name] * len(owner)
    found = Samples(
        features=np.concatenate(features).astype(np.float32, copy=False),
        ids=ids,
        owners=owners,
        targets=np.concatenate(targets) if len(targets) == len(rows) else None,
        said=None,
        subtask=data.subtask,
        class_names=data.class_names,
        splits=names,
        image=None,
        total=int(sum(part.sum() for part in lengths.values())),
        name=data.name,
    )
    refuse_nan(found)
    return found


def standardize(samples: Samples, data: Data) -> Samples:
    """The samples with features of mean 0 and deviation 1 over the train split, as a model that
    data.standardize asks for takes them; a mean of instances is that of standardised ones.

    Raises:
        UserError: there is no train split, or it has NaN or infinity.
    """
    if "train" not in data.splits:
        raise UserError(
            "data.standardize takes the mean and deviation of the train split, but there is none:"
            " name data.train_features_file, or drop data.standardize"
        )
    moments = feature_moments(data.splits["train"].source)
    mean, std = (moment.astype(np.float32) for moment in moments)
    found = with_fields(samples, features=(samples.features - mean) / std, standardized=True)
    refuse_nan(found)
    return found


def vectors(split: Split, rows: np.ndarray) -> np.ndarray:
    """Features (N, D) of samples; of a bag the mean of its instances."""
    if not isinstance(split.source, BagSource):
        return split.source.fetch(rows)
    return np.stack([
        split.source.fetch(rows[i : i + 1])[0].mean(0, dtype=np.float64) for i in range(len(rows))
    ])  # fmt: skip


def instances(source: BagSource, owner: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Features (N, D) of instances, given by their bag and place in it, sorted."""
    reader = source.reader
    if isinstance(reader, FileBags) and reader.file.layout == "ragged":
        return reader.file.rows.take(reader.file.ptr[source.index[owner]] + inside)
    return np.concatenate([
        source.fetch(np.array([bag]))[0][inside[owner == bag]] for bag in np.unique(owner)
    ])  # fmt: skip


def refuse_nan(samples: Samples) -> None:
    """All features are numbers.

    Raises:
        UserError: some are not.
    """
    finite = np.isfinite(samples.features).all(1)
    if not finite.all():
        bad = [samples.ids[row] for row in np.flatnonzero(~finite)]
        raise UserError(
            f"{samples.name}: NaN or infinite features in {len(bad)} samples"
            f" ({', '.join(bad[:10])}{' ...' if len(bad) > 10 else ''}); extract them again"
            " (extract.precision = 32 if float16 overflowed)"
        )


# ---------------------------------------------------------------------- files


def open_input(path: Path, data: Spec) -> Data:
    """A feature file in any layout, or a folder of one-bag files, as a data set of one split.

    Labels are not needed.

    Args:
        data: section data of the spec; the names of the datasets are its, where it has some.

    Raises:
        UserError: no such file, damaged, empty, or with labels that are none.
    """
    if not path.exists():
        raise UserError(f'umap.input: "{path}" does not exist')
    names = keys(data if is_features(data) else PrecomputedData())
    collection = read_collection(path, names, labelled=False)
    targets, subtask, names = None, "multiclass", ()
    if collection.labels is not None:
        subtask = resolve_subtask(PrecomputedData(), [collection])
        names = resolve_names(PrecomputedData(), [collection], subtask)
        targets = encode(collection, subtask, names)
    source = collection.source(np.arange(len(collection.ids)))
    split = Split(ids=collection.ids, targets=targets, source=source)
    return Data(str(path), {"": split}, subtask, names, channels=collection.width, bit_depth=16)


def is_features(data: Spec) -> bool:
    """Whether the data of a spec are features."""
    return isinstance(data, PrecomputedData)
