"""Mode umap: features in two dimensions as PNG, SVG, CSV and interactive HTML."""

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from dataclasses import replace as with_fields
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from glovita_lib import dist
from glovita_lib.data import (
    Asked,
    Data,
    Images,
    Source,
    Split,
    Standardizer,
    column_means,
    outputs_line,
    skipped,
    subset,
)
from glovita_lib.data_features import encode_labels, keys, read_collection
from glovita_lib.data_splits import strata
from glovita_lib.data_subtask import float_look
from glovita_lib.errors import UserError, ended, listed, refuse, versions, with_all
from glovita_lib.experiment import embed_split, read_data
from glovita_lib.extraction import Extractor, source_of, wanted_splits
from glovita_lib.feature_writer import part_to_read
from glovita_lib.figures_volumes import middle_picture
from glovita_lib.files import read_csv, remove_killed, stem_of, write_csv, write_json
from glovita_lib.loggers import say, say_notes, two_columns
from glovita_lib.metrics_classification import Scores
from glovita_lib.plot_projection import (
    Coloring,
    Text,
    classes,
    diameter,
    draw_points,
    of_column,
    of_mistakes,
    of_scores,
    of_targets,
    write_page,
)
from glovita_lib.projection import MISSING, Projection, choose, perplexity_of, project
from glovita_lib.read_features import (
    BagSource,
    FileBags,
    VectorSource,
    feature_scale,
    flaw,
    sound_rows,
)
from glovita_lib.resolved import Inputs, Resolved, VolumeInputs, has_targets_of
from glovita_lib.rundir import alone, locate
from glovita_lib.spec import Loaded
from glovita_lib.spec_data import features_of
from glovita_lib.spec_root import Root, head_is_named
from glovita_lib.spec_train import Umap

# ----------------------------------------------------------------------------------- samples
#
# The samples that are drawn as points, chosen from splits of images or features.
#
# N samples, B bags, D width.


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says about samples, in terms of the data it was trained on."""

    scores: Scores  # (N, K)
    subtask: str
    class_names: tuple[str, ...]  # K names


@dataclass(frozen=True, slots=True)
class ChosenSamples:
    """The chosen samples and what is known of them."""

    features: np.ndarray  # (N, D) float32, or float64 as given
    ids: list[str]
    owners: list[str]  # bag of each instance; else the ids again
    targets: np.ndarray | None  # (N,) int64 or (N, K)
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
    targets = joined([split.targets for split in splits.values()])
    classes = None
    if subtask != "regression" and targets is not None:
        classes = strata(targets, subtask)  # of several labels the rarest
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


def joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    """Targets of several splits one below the other; None where a split has none."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def choose_samples(splits: dict[str, Split], data: Data, spec: Umap, seed: int) -> dict[str, Split]:
    """The splits with the samples that are shown; a split without any is left out."""
    lengths = {name: np.ones(len(split), np.int64) for name, split in splits.items()}
    rows = choose_rows(splits, lengths, data.subtask, spec, seed)
    return {name: subset(splits[name], part) for name, part in rows.items()}


# ---------------------------------------------------------------------- features


def samples_of_features(
    splits: dict[str, Split],
    data: Data,
    spec: Umap,
    seed: int,
    scale: Standardizer | None = None,
) -> ChosenSamples:
    """Vectors, bags or instances of splits whose samples are features.

    Args:
        scale: what standardises them; a mean of instances becomes that of standardised ones.

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
    features, ids, owners, names = [], [], [], []
    targets: list[np.ndarray | None] = []
    for name, chosen in rows.items():
        split = splits[name]
        ends = np.cumsum(lengths[name])
        owner = np.searchsorted(ends, chosen, side="right")  # sample of each row
        inside = chosen - (ends - lengths[name])[owner]
        if isinstance(split.source, BagSource) and spec.bags == "instances":
            features.append(instances(split.source, owner, inside))
            ids += [f"{split.ids[bag]}#{i}" for bag, i in zip(owner, inside, strict=True)]
        else:
            features.append(vectors(split.source, owner))
            ids += [split.ids[row] for row in owner]
        owners += [split.ids[row] for row in owner]
        targets.append(None if split.targets is None else split.targets[owner])
        names += [name] * len(owner)
    values = torch.from_numpy(np.concatenate(features))
    if scale is not None:
        values = scale(values)
    elif values.dtype != torch.float64:  # which the map centres before it rounds
        values = values.float()
    found = ChosenSamples(
        features=values.numpy(),
        ids=ids,
        owners=owners,
        targets=joined(targets),
        said=None,
        subtask=data.subtask,
        class_names=data.class_names,
        splits=names,
        image=None,
        total=int(sum(part.sum() for part in lengths.values())),
        name=data.name,
        standardized=scale is not None,
        notes=tuple(data.report),
    )
    refuse_nan(found)
    return found


def train_scale(data: Data) -> Standardizer:
    """What brings features to mean 0 and deviation 1 over the train split, as a model that
    data.standardize asks for takes them.

    Raises:
        UserError: there is no train split.
    """
    if "train" not in data.splits:
        raise UserError(
            "data.standardize takes the mean and deviation of the train split, but there is none:"
            " name data.train_features_file, or drop data.standardize"
        )
    source = data.splits["train"].source
    assert isinstance(source, VectorSource | BagSource)  # of a feature data set
    return feature_scale(source)


def vectors(source: Source, rows: np.ndarray) -> np.ndarray:
    """Features (N, D) of samples; of a bag the mean of its instances."""
    if isinstance(source, BagSource):
        bags = (source.fetch(rows[i : i + 1])[0] for i in range(len(rows)))
        return np.stack([column_means(bag) for bag in bags])
    return np.asarray(source.fetch(rows))


def instances(source: BagSource, owner: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Features (N, D) of instances, given by their bag and place in it, sorted."""
    reader = source.reader
    if isinstance(reader, FileBags) and reader.file.layout == "ragged":
        return reader.file.rows.take(reader.ptr[source.index[owner]] + inside)
    return np.concatenate([
        source.fetch(np.array([bag]))[0][inside[owner == bag]] for bag in np.unique(owner)
    ])  # fmt: skip


def refuse_nan(samples: ChosenSamples) -> None:
    """All features are numbers of float32.

    Raises:
        UserError: some are not.
    """
    wrong = flaw(samples.features)
    if wrong is not None:
        bad = [samples.ids[row] for row in np.flatnonzero(~sound_rows(samples.features))]
        text = (
            f"{samples.name}: {wrong} in {len(bad)} samples ({listed(bad)}); extract them again"
            " (extract.precision = 32 if float16 overflowed)"
        )
        raise UserError(ended(with_all(text, bad)))


# ---------------------------------------------------------------------- files


def open_input(path: Path, root: Root, *, named: bool) -> Data:
    """A feature file in any layout, or a folder of one-bag files, as a data set of one split.

    Labels are not needed.

    Args:
        root: the names of the datasets and of the classes, and what labels are, are those of its
            section data, where it is one of features.
        named: whether the spec names its head, which then says what whole numbers with decimals
            are.

    Raises:
        UserError: no such file, damaged, empty, or with labels that are none, or not those of a
            head that is named.
    """
    if not path.exists():
        raise UserError(f'umap.input: "{path}" does not exist')
    collection = read_collection(path, keys(features_of(root.data)), labelled=False)
    source = collection.source(np.arange(len(collection.ids)))
    split, samples = Split(collection.ids, None, source), collection.samples
    if collection.labels is None:
        return Data(str(path), {"": split}, "multiclass", (), samples, collection.notes())
    labels, notes = collection.labels, collection.notes()
    head, asked = root.model.head.only_predicts(named=named), Asked()
    if isinstance(labels, np.ndarray) and labels.dtype.kind == "f" and labels.size == len(labels):
        are_classes = names_classes(root, named, collection.class_names)
        asked = Asked(predicts="classes" if are_classes else "numbers")
        said = (collection.subtask, features_of(root.data).subtask, head)
        if not are_classes and said == (None, None, None) and float_look(labels) == "decimals":
            notes.append(
                "the labels are whole numbers with decimals and are drawn as values; where they are"
                ' classes, set model.head.head_type = "classification"'
            )
    # where the section decides that they are classes, these are its classes too
    found = encode_labels(features_of(root.data), [collection], None, asked)
    subtask, class_names, (split.targets,), _ = found
    if subtask == "regression" and head == "classes":
        refuse("model.head", root.model.head.target_problems(subtask))
    return Data(str(path), {"": split}, subtask, class_names, samples, notes)


def names_classes(root: Root, named: bool, stored: tuple[str, ...] | None) -> bool:
    """Whether whole numbers with decimals, some of which may be missing, are classes: those that a
    file names, or what a spec states of its features, or its head, where it names one that predicts
    nothing else."""
    data = root.data
    subtask = data.stated_subtask() if data.samples == "features" else None
    if subtask is not None:
        return subtask != "regression"
    counts = [count for _, count in data.stated_outputs()] if data.samples == "features" else []
    head = root.model.head.only_predicts(named=named)
    return bool(stored) or any(count > 1 for count in counts) or head == "classes"


# -------------------------------------------------------------------------------- embeddings
#
# N samples, D width, K classes or targets.


def samples_of_model(
    loaded: Loaded[Root], spec: Umap, ranks: dist.Ranks, seed: int
) -> ChosenSamples:
    """Samples of the spec's own data with their embeddings, as mode extract makes them under the
    spec's `extract`, and the predictions of the same pass.

    This process does it all: `ranks` has a world of one.

    Raises:
        UserError: as mode extract.
    """
    asked = replace(loaded.root.extract, output="embedding")
    experiment, data = source_of(loaded, ranks)
    resolved = experiment.resolved
    if resolved.subtask == "framewise":  # clips are shown
        resolved = replace(resolved, subtask="multiclass")
    extractor = Extractor(experiment, asked)
    trained = asked.checkpoint is not None or asked.source == "run"

    def outputs(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        vectors = extractor.read(inputs, extractor.features(inputs))[0]
        logits = {"logits": extractor.logits(inputs, vectors)} if trained else {}
        return {"vectors": vectors.float(), **logits}

    wanted = wanted_splits(data, spec.split, "umap.split")
    splits, parts, lines = {}, [], []
    for name, split in choose_samples(wanted, data, spec, seed).items():
        found, kept, broken = embed_readable(extractor, name, split, outputs)
        lines += [f"left out: {line}" for line in broken]
        splits[name] = subset(split, kept) if len(kept) < len(split) else split
        parts.append(found)
    features = np.concatenate([part["vectors"] for part in parts])
    ids = [name for split in splits.values() for name in split.ids]
    said = None
    if trained:
        logits = torch.from_numpy(np.concatenate([part["logits"] for part in parts]))
        said = Said(experiment.predictor.scores_of(logits), resolved.subtask, resolved.class_names)
    return ChosenSamples(
        features=features,
        ids=ids,
        owners=ids,
        targets=joined([split.targets for split in splits.values()]),
        said=said,
        subtask=data.subtask,
        class_names=data.class_names,
        splits=[name for name, split in splits.items() for _ in split.ids],
        image=image_of(list(splits.values()), resolved.inputs),
        total=sum(map(len, wanted.values())),
        name=data.name,
        notes=(*data.report, *lines, *(other_outputs(resolved, data) if trained else ())),
    )


def embed_readable(
    extractor: Extractor, name: str, split: Split, outputs: Callable[[Any], dict[str, torch.Tensor]]
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Outputs for the samples (n, ...) of a split that could be read, their rows (n,), and a line
    about each other one.

    Raises:
        UserError: a sample cannot be read and none may be left out, or all of them; NaN or infinite
            vectors.
    """
    experiment, count = extractor.experiment, len(split)
    with TemporaryDirectory() as notes:
        folder = Path(notes)
        part = part_to_read(split, np.arange(count), folder, extractor)
        found = embed_split(experiment, name, part, outputs)
        broken = skipped(folder)
    kept = np.delete(np.arange(count), list(broken))
    if not len(kept):
        raise UserError(f"{name}: none of the {count} samples could be read")
    found = {key: values[torch.from_numpy(kept)] for key, values in found.items()}
    if not torch.isfinite(found["vectors"]).all():
        extractor.refuse_infinite(found["vectors"], [split.ids[row] for row in kept], among="split")
    return {key: values.numpy() for key, values in found.items()}, kept, list(broken.values())


def other_outputs(resolved: Resolved, data: Data) -> tuple[str, ...]:
    """A note where the data have other classes or targets than those the model was trained on."""
    if has_targets_of(resolved, data.subtask, data.class_names):
        return ()
    return (
        f"{data.name} has other classes or targets than the model was trained on"
        f" ({resolved.subtask}: {listed(resolved.class_names)}); predictions are shown under the"
        " model's own, without mistakes",
    )


def image_of(splits: list[Split], inputs: Inputs) -> Images | None:
    """Images of the samples of splits that follow one another, of volumes their middle; None where
    they have none."""
    places = [(split, np.array([row])) for split in splits for row in range(len(split))]

    def image(i: int) -> np.ndarray:
        split, row = places[i]
        if not isinstance(inputs, VolumeInputs):
            return split.source.fetch(row)[0]
        if split.source.windows is None:
            affine = np.diag([*inputs.augmentation.spacing, 1.0])
            return middle_picture(split.source.fetch(row)[0], affine)
        (volume,) = split.source.windows(row)
        return middle_picture(volume, volume.affine)

    first = image(0)
    is_image = isinstance(first, np.ndarray) and first.ndim == 3 and first.dtype.kind == "u"
    return image if is_image else None


# ---------------------------------------------------------------------------------- the mode

DRY = 50  # samples of a dry run
SUFFIXES = {"picture": "png", "vectors": "svg", "page": "html", "table": "csv", "numbers": "json"}
NAMES = {"umap": "UMAP", "pca": "Principal components", "tsne": "t-SNE"}


def run(loaded: Loaded[Root], *, dry_run: bool) -> None:
    """Draw the features of a file, or of the spec's own run or encoder.

    A dry run lays out a few samples and writes nothing.
    """
    spec = loaded.root.umap
    if dry_run:
        spec = replace(spec, max_samples=min(spec.max_samples, DRY))
    with dist.session() as ranks:
        # A picture of some thousand samples is work for one process; the others wait for it.
        alone = with_fields(ranks, rank=0, world=1)
        dist.main_decides(ranks, lambda: make_map(loaded, spec, alone, dry_run=dry_run))


def make_map(loaded: Loaded[Root], spec: Umap, ranks: dist.Ranks, *, dry_run: bool) -> None:
    """Find the samples, lay them out, write everything and say where it is.

    Raises:
        UserError: umap-learn, the column of colours or the samples are missing.
    """
    # what is missing is said before hours of work, not after
    if spec.method == "umap" and util.find_spec("umap") is None:
        raise UserError(MISSING)
    if spec.color_table is not None:
        path, column = spec.color_table
        read_csv(Path(path), ("id", column))
    stem = output_stem(loaded, spec)
    with nullcontext() if dry_run else alone(stem, ranks):
        samples = find_samples(loaded, spec, ranks)
        say_notes(samples.notes, None if dry_run else files_of(stem)["numbers"])
        draw_projection(loaded, spec, samples, ranks, dry_run=dry_run)


# ---------------------------------------------------------------------- samples


def find_samples(loaded: Loaded[Root], spec: Umap, ranks: dist.Ranks) -> ChosenSamples:
    """The chosen samples with their features."""
    seed, own = seed_of(loaded, spec), loaded.root.data
    if spec.input is not None:
        data = open_input(Path(spec.input), loaded.root, named=head_is_named(loaded))
        return samples_of_features(data.splits, data, spec, seed)
    if own.samples in ("images", "volumes"):
        return samples_of_model(loaded, spec, ranks, seed)
    # features are standardised over train
    wanted = () if spec.split is None or features_of(own).standardize else (spec.split,)
    named = head_is_named(loaded)
    data = read_data(loaded.root, ranks, named=named, wanted=wanted)
    if data.samples.spec_kind != "features":  # which a user's own data set tells only now
        return samples_of_model(loaded, spec, ranks, seed)
    splits = wanted_splits(data, spec.split, "umap.split")
    scale = train_scale(data) if features_of(own).standardize else None
    return samples_of_features(splits, data, spec, seed, scale)


def seed_of(loaded: Loaded[Root], spec: Umap) -> int:
    """Seed of the choice and of the layout."""
    return loaded.root.seed if spec.seed is None else spec.seed


# ---------------------------------------------------------------------- colours


def colorings_of(samples: ChosenSamples, spec: Umap) -> list[Coloring]:
    """All that is known of the samples; what was asked for comes first.

    Raises:
        UserError: it is not known.
    """
    outputs = (samples.subtask, samples.class_names)
    truth = [] if samples.targets is None else of_targets("label", samples.targets, *outputs)
    said, are_alike = [], False
    if samples.said is not None:
        own = (samples.said.subtask, samples.said.class_names)
        said, are_alike = of_scores("prediction", samples.said.scores, *own), own == outputs
    column = []
    if spec.color_table is not None:
        path, name = spec.color_table
        ids = list(zip(samples.ids, samples.owners, strict=True))
        column = [of_column(Path(path), name, ids)]
    first = {"label": truth, "prediction": said, "column": column}[spec.color_by]
    if spec.color_by == "prediction" and not said:
        raise UserError(
            'umap.color_by = "prediction": nothing was trained that could predict; use "label", or'
            ' "column" with the predictions of mode infer as umap.color_file'
        )
    mistakes = [of_mistakes(truth[0], said[0])] if len(truth) == 1 and are_alike else []
    known = [*first, *truth, *said, *mistakes, *column, *splits_of(samples)]
    return distinct_titles(list({id(coloring): coloring for coloring in known}.values()))


def splits_of(samples: ChosenSamples) -> list[Coloring]:
    """The splits as a property of the samples, where there are several."""
    names = list(dict.fromkeys(samples.splits))
    if len(names) < 2:
        return []
    return [classes("split", np.array([names.index(name) for name in samples.splits]), names)]


def distinct_titles(colorings: list[Coloring]) -> list[Coloring]:
    """Titles as names of columns of a table that begins with id, x, y."""
    taken, named = {"id", "x", "y"}, []
    for coloring in colorings:
        title = coloring.title
        while title in taken:
            title += "_"
        taken.add(title)
        named.append(with_fields(coloring, title=title))
    return named


# ---------------------------------------------------------------------- results


def draw_projection(
    loaded: Loaded[Root], spec: Umap, samples: ChosenSamples, ranks: dist.Ranks, *, dry_run: bool
) -> None:
    """Lay the samples out, write everything and say where it is."""
    colorings = colorings_of(samples, spec)
    seed = seed_of(loaded, spec)
    projection = project(samples.features, spec, seed=seed, device=ranks.device)
    say_notes(projection.notes)
    if samples.subtask == "regression" and len(samples.class_names) > 1:
        say(f"  note: the picture shows {colorings[0].title}, the page the other targets too")
    if samples.targets is None and spec.color_by == "label":
        say("  note: the samples have no labels; umap.color_file can give them colours")
    shown = f"{len(samples.ids):,} of {samples.total:,} samples"
    trust = trust_text(projection)
    if dry_run:
        say(f"{NAMES[projection.method]} of {shown}, {trust}; nothing was written")
        return
    stem = output_stem(loaded, spec)
    remove_killed(stem)
    text = words_of(spec, samples, projection)
    files = write_map(stem, spec, samples, projection, colorings, text)
    numbers = numbers_of(spec, samples, projection, seed, loaded)
    write_json(files["numbers"], {**numbers, "title": text.title})
    rows = [("samples", shown), ("trustworthiness", trust)]
    if samples.targets is not None:
        rows.append(outputs_line(samples.subtask, samples.class_names, ordered=False))
    say(two_columns([*rows, *((kind, str(path)) for kind, path in files.items())]))


def output_stem(loaded: Loaded[Root], spec: Umap) -> Path:
    """Path of the results without suffix."""
    if spec.output_dir is not None:
        folder = Path(spec.output_dir)
    elif spec.input is not None:
        beside = Path(os.path.abspath(spec.input)).parent
        folder = beside / "umap_plots" / stem_of(spec.input)
    else:
        folder = locate(loaded).path / "umap"
    colour = {"label": None, "prediction": "prediction", "column": spec.color_column}[spec.color_by]
    parts = [part for part in (spec.method, spec.split, colour) if part]
    return folder / re.sub(r"[^\w.-]+", "_", "_".join(parts))


def files_of(stem: Path) -> dict[str, Path]:
    """Paths of the results."""
    return {kind: stem.with_name(f"{stem.name}.{suffix}") for kind, suffix in SUFFIXES.items()}


def trust_text(projection: Projection) -> str:
    """Trustworthiness with what it was measured on."""
    if projection.trustworthiness is None:
        return "not defined for fewer than 3 different samples"
    return (
        f"{projection.trustworthiness:.3f} ({projection.trust_neighbors} neighbours,"
        f" {projection.trust_samples:,} samples)"
    )


def words_of(spec: Umap, samples: ChosenSamples, projection: Projection) -> Text:
    """Heading of the picture: the data, then all that the picture depends on."""
    count, total = len(samples.ids), samples.total
    unit = "instances" if samples.owners != samples.ids else "samples"
    parts = [f"{count:,} {unit}" if count == total else f"{count:,} of {total:,} {unit}"]
    if projection.method == "umap":
        parts.append(f"{spec.n_neighbors} neighbours, min_dist {spec.min_dist:g}")
    if projection.method == "tsne":
        parts.append(f"perplexity {perplexity_of(spec, count):.3g}")
    if samples.standardized:
        parts.append("standardised features")
    parts.append(f"{spec.metric} distance")
    if spec.pca is not None and projection.method != "pca":
        parts.append(f"of {spec.pca} principal components")
    if projection.trustworthiness is not None:
        parts.append(f"trustworthiness {projection.trustworthiness:.3f}")
    where = samples.name if spec.input is None else stem_of(spec.input)
    where += "" if spec.split is None else f", {spec.split} split"
    title = spec.title or f"{NAMES[projection.method]} of {where}"
    return Text(title, " · ".join(parts), projection.axes)


def write_map(
    stem: Path,
    spec: Umap,
    samples: ChosenSamples,
    projection: Projection,
    colorings: list[Coloring],
    text: Text,
) -> dict[str, Path]:
    """Pictures, table and page; the paths of all results."""
    files = files_of(stem)
    plain = Coloring("", ("samples",), np.zeros(len(samples.ids), np.int64), None)
    unlabelled = spec.color_by == "label" and samples.targets is None
    draw_points(
        projection.points,
        plain if unlabelled else colorings[0],
        text,
        png=files["picture"],
        svg=files["vectors"],
        dpi=spec.dpi,
        point_size=spec.point_size,
    )
    write_page(
        files["page"],
        projection.points,
        ids=samples.ids,
        colorings=colorings,
        text=text,
        images=samples.image,
        thumbnail=spec.thumbnails,
    )
    columns = {"id": samples.ids, "x": projection.points[:, 0], "y": projection.points[:, 1]}
    columns |= {coloring.title: coloring.words() for coloring in colorings}
    write_csv(files["table"], columns, zip(*columns.values(), strict=True))
    return files


def numbers_of(
    spec: Umap, samples: ChosenSamples, projection: Projection, seed: int, loaded: Loaded[Root]
) -> dict[str, Any]:
    """What the picture was made with, and how far it can be trusted."""
    found = versions()
    for package in ("umap-learn", "pynndescent", "numba", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {
        "spec": loaded.path,
        "method": projection.method,
        "seed": seed,
        "samples": len(samples.ids),
        "of": samples.total,
        "width": samples.features.shape[1],
        "splits": [name for name in dict.fromkeys(samples.splits) if name],
        "point_size": spec.point_size or diameter(len(samples.ids)),
        "standardized": samples.standardized,
        "trustworthiness": projection.trustworthiness,
        "trustworthiness_neighbors": projection.trust_neighbors,
        "trustworthiness_samples": projection.trust_samples,
        "axes": [axis for axis in projection.axes if axis],
        "notes": [*samples.notes, *projection.notes],
        "umap": msgspec.to_builtins(spec),
        "versions": found,
    }
