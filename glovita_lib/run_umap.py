"""Mode umap: features in two dimensions as PNG, SVG, CSV and interactive HTML."""

import re
from dataclasses import replace as with_fields
from importlib import metadata, util
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from glovita_lib import dist
from glovita_lib.coloring import Coloring, classes, of_column, of_mistakes, of_scores, of_targets
from glovita_lib.embeddings import embeddings_of
from glovita_lib.experiment import read_data
from glovita_lib.files import write_csv, write_json
from glovita_lib.plot_projection import Text, draw_points
from glovita_lib.progress import say, table
from glovita_lib.projection import MISSING, Projection, perplexity_of, project
from glovita_lib.projection_html import write_page
from glovita_lib.projection_source import (
    Images,
    Samples,
    choose_samples,
    is_features,
    open_input,
    samples_of_features,
    standardize,
)
from glovita_lib.rundir import locate, versions
from glovita_lib.samples import Split
from glovita_lib.spec import Loaded, UserError
from glovita_lib.spec_umap import Umap
from glovita_lib.tables import read_csv

DRY = 50  # samples of a dry run
SUFFIXES = {"picture": "png", "vectors": "svg", "page": "html", "table": "csv", "numbers": "json"}
NAMES = {"umap": "UMAP", "pca": "Principal components", "tsne": "t-SNE"}


def run(loaded: Loaded, *, dry_run: bool) -> None:
    """Draw the features of a file, or of the spec's own run or encoder.

    A dry run lays out a few samples and writes nothing.
    """
    spec = loaded.root.umap
    if dry_run:
        spec = replace(spec, max_samples=min(spec.max_samples, DRY))
    with dist.session() as ranks:
        # A picture of some thousand samples is work for one process; the others wait for it.
        alone = with_fields(ranks, rank=0, world=1)
        dist.main_decides(ranks, lambda: show(loaded, spec, alone, dry_run=dry_run))


def show(loaded: Loaded, spec: Umap, ranks: dist.Ranks, *, dry_run: bool) -> None:
    """Find the samples, lay them out, write everything and say where it is."""
    refuse_early(spec)
    samples = find_samples(loaded, spec, ranks)
    for note in samples.notes:
        say(f"  note: {note}")
    draw(loaded, spec, samples, ranks, dry_run=dry_run)


def refuse_early(spec: Umap) -> None:
    """Say what is missing before hours of work, not after.

    Raises:
        UserError: umap-learn or the column of colours is missing.
    """
    if spec.method == "umap" and util.find_spec("umap") is None:
        raise UserError(MISSING)
    if spec.color_file is not None:
        read_csv(Path(spec.color_file), ("id", spec.color_column))


# ---------------------------------------------------------------------- samples


def find_samples(loaded: Loaded, spec: Umap, ranks: dist.Ranks) -> Samples:
    """The chosen samples with their features."""
    seed, own = seed_of(loaded, spec), loaded.root.data
    if spec.input is not None:
        data = open_input(Path(spec.input), own)
        return samples_of_features(data.splits, data, spec, seed)
    if not is_features(own):
        return samples_of_model(loaded, spec, ranks, seed)
    data = read_data(loaded.root, ranks)
    splits = wanted(data.splits, spec.split, data.name)
    samples = samples_of_features(splits, data, spec, seed)
    return standardize(samples, data) if own.standardize else samples


def seed_of(loaded: Loaded, spec: Umap) -> int:
    """Seed of the choice and of the layout."""
    return loaded.root.seed if spec.seed is None else spec.seed


def wanted(splits: dict[str, Split], name: str | None, data: str) -> dict[str, Split]:
    """The split asked for, or all that have samples.

    Raises:
        UserError: there is none of that name.
    """
    there = {key: split for key, split in splits.items() if len(split)}
    if name is None:
        return there
    if name not in there:
        raise UserError(f'umap.split = "{name}": data set {data} has {", ".join(there)}')
    return {name: there[name]}


def samples_of_model(loaded: Loaded, spec: Umap, ranks: dist.Ranks, seed: int) -> Samples:
    """Samples of the spec's own data with what its model makes of them."""
    total, name = 0, ""

    def some(splits: dict[str, Split], data: Any) -> dict[str, Split]:
        nonlocal total, name
        total, name = sum(map(len, splits.values())), data.name
        return choose_samples(splits, data, spec, seed)

    try:
        found = embeddings_of(loaded, ranks, spec.split, some)
    except UserError as error:
        raise UserError(str(error).replace("extract.split", "umap.split")) from None
    names = [key for key, split in found.splits.items() for _ in split.ids]
    return Samples(
        features=found.features,
        ids=found.ids,
        owners=found.ids,
        targets=found.targets,
        said=found.said,
        subtask=found.subtask,
        class_names=found.class_names,
        splits=names,
        image=image_of(list(found.splits.values())),
        total=total,
        name=name,
        notes=found.notes,
    )


def image_of(splits: list[Split]) -> Images | None:
    """Images of the samples of splits that follow one another; None where they are not images."""
    places = [(split, row) for split in splits for row in range(len(split))]

    def image(i: int) -> np.ndarray:
        split, row = places[i]
        return split.source.fetch(np.array([row]))[0]

    first = image(0)
    is_image = isinstance(first, np.ndarray) and first.ndim == 3 and first.dtype.kind == "u"
    return image if is_image else None


# ---------------------------------------------------------------------- colours


def colorings_of(samples: Samples, spec: Umap) -> list[Coloring]:
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
    if spec.color_file is not None:
        ids = list(zip(samples.ids, samples.owners, strict=True))
        column = [of_column(Path(spec.color_file), spec.color_column, ids)]
    first = {"label": truth, "prediction": said, "column": column}[spec.color_by]
    if spec.color_by == "prediction" and not said:
        raise UserError(
            'umap.color_by = "prediction": nothing was trained that could predict; use "label", or'
            ' "column" with the predictions of mode infer as umap.color_file'
        )
    mistakes = [of_mistakes(truth[0], said[0])] if len(truth) == 1 and are_alike else []
    known = [*first, *truth, *said, *mistakes, *column, *splits_of(samples)]
    return distinct_titles(list({id(coloring): coloring for coloring in known}.values()))


def splits_of(samples: Samples) -> list[Coloring]:
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


def draw(loaded: Loaded, spec: Umap, samples: Samples, ranks: dist.Ranks, *, dry_run: bool) -> None:
    """Lay the samples out, write everything and say where it is."""
    colorings = colorings_of(samples, spec)
    seed = seed_of(loaded, spec)
    projection = project(samples.features, spec, seed=seed, device=ranks.device)
    for note in projection.notes:
        say(f"  note: {note}")
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
    text = words_of(spec, samples, projection)
    files = write(stem, spec, samples, projection, colorings, text)
    write_json(files["numbers"], numbers_of(spec, samples, projection, seed, loaded))
    rows = [("samples", shown), ("trustworthiness", trust)]
    say(table([*rows, *((kind, str(path)) for kind, path in files.items())]))


def output_stem(loaded: Loaded, spec: Umap) -> Path:
    """Path of the results without suffix."""
    if spec.output_dir is not None:
        folder = Path(spec.output_dir)
    elif spec.input is not None:
        path = Path(spec.input)
        folder = path.parent / "umap_plots" / path.stem
    else:
        folder = locate(loaded).path / "umap"
    colour = {"label": None, "prediction": "prediction", "column": spec.color_column}[spec.color_by]
    parts = [part for part in (spec.method, spec.split, colour) if part]
    return folder / re.sub(r"[^\w.-]+", "_", "_".join(parts))


def trust_text(projection: Projection) -> str:
    """Trustworthiness with what it was measured on."""
    if projection.trustworthiness is None:
        return "not defined for fewer than 3 different samples"
    return (
        f"{projection.trustworthiness:.3f} ({projection.trust_neighbors} neighbours,"
        f" {projection.trust_samples:,} samples)"
    )


def words_of(spec: Umap, samples: Samples, projection: Projection) -> Text:
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
    where = samples.name if spec.input is None else Path(spec.input).stem
    where += "" if spec.split is None else f", {spec.split} split"
    title = spec.title or f"{NAMES[projection.method]} of {where}"
    return Text(title, " · ".join(parts), projection.axes)


def write(
    stem: Path,
    spec: Umap,
    samples: Samples,
    projection: Projection,
    colorings: list[Coloring],
    text: Text,
) -> dict[str, Path]:
    """Pictures, table and page; the paths of all results."""
    files = {kind: stem.with_name(f"{stem.name}.{suffix}") for kind, suffix in SUFFIXES.items()}
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
    spec: Umap, samples: Samples, projection: Projection, seed: int, loaded: Loaded
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
        "standardized": samples.standardized,
        "trustworthiness": projection.trustworthiness,
        "trustworthiness_neighbors": projection.trust_neighbors,
        "trustworthiness_samples": projection.trust_samples,
        "axes": [axis for axis in projection.axes if axis],
        "notes": projection.notes,
        "umap": msgspec.to_builtins(spec),
        "versions": found,
    }
