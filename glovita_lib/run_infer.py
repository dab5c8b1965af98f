"""Mode infer: predictions and metrics of trained checkpoints, with the transforms of training."""

import json
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace as with_fields
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import msgspec
from msgspec.structs import replace

from glovita_lib import dist, files
from glovita_lib.attention_maps import AttentionHead, AttentionWriter, draw_bags
from glovita_lib.data import BaseSamples, ImageSamples, Split
from glovita_lib.data_features import unlabelled_features
from glovita_lib.data_folder import build_unlabelled
from glovita_lib.data_splits import SPLIT_NAMES, read_splits
from glovita_lib.errors import UserError, listed, refuse
from glovita_lib.experiment import (
    EVALUATION_KEYS,
    Experiment,
    evaluated_as,
    read_data,
    record_of,
    restore,
    some_of,
)
from glovita_lib.loggers import say, say_notes, two_columns, write_notes
from glovita_lib.metrics_classification import Scores
from glovita_lib.objectives import LabelledPredictions, Predictions
from glovita_lib.peft_base import ADDED, Insert, contiguous_copy
from glovita_lib.prediction_files import prediction_paths
from glovita_lib.resolved import (
    BagInputs,
    ClipInputs,
    EncodedInputs,
    ImageInputs,
    Inputs,
    Resolved,
    SeriesInputs,
    VectorInputs,
    VolumeInputs,
    check_data,
    check_kind,
    check_members,
    check_samples,
    check_targets,
    read_by,
)
from glovita_lib.results import clear_results, summary_lines, write_predictions, write_results
from glovita_lib.rundir import RunDir, alone, locate
from glovita_lib.spec import Loaded, changed_keys, is_among
from glovita_lib.spec_data import GenericImageData, SeriesData, VideoData, VolumeData, features_of
from glovita_lib.spec_lift import Slices
from glovita_lib.spec_root import Root
from glovita_lib.spec_samples import BaseData, FileData

if TYPE_CHECKING:
    from glovita_lib.volume_maps import VolumeMaps


def run(loaded: Loaded[Root], *, dry_run: bool) -> None:
    """Predict a split, or new samples, with one checkpoint or an explicit ensemble.

    A dry run predicts one batch with every member and writes nothing.
    """
    with (
        dist.session() as ranks,
        closing(dist.WorkerPool(loaded.root.dataloading, ranks.device)) as pool,
    ):
        infer(loaded, ranks, pool, dry_run=dry_run)


def infer(loaded: Loaded[Root], ranks: dist.Ranks, pool: dist.WorkerPool, *, dry_run: bool) -> None:
    """Predict with every member, take the mean, write predictions, metrics and attention.

    Args:
        pool: the worker processes of all members.
    """
    root = loaded.root
    loaded = with_fields(loaded, group=dist.main_decides(ranks, lambda: trained_group(loaded)))
    paths = dist.main_decides(ranks, lambda: member_paths(loaded))
    records = {path: record_of(path) for path in paths}
    check_members({str(path): record for path, record in records.items()})
    first = restore(paths[0], root, ranks)
    if root.infer.heat_maps:
        from glovita_lib.grad_cam import check_heat_maps, write_heat_maps  # volumes come with it

        check_heat_maps(first, root.infer)
    if root.infer.export is not None and ranks.is_main and not dry_run:
        export(Path(root.infer.export), first)
    name, splits, notes = wanted_splits(root, records, ranks)
    notes += geometry_notes(first, splits[paths[0]])
    folder = Path(root.infer.output_dir or own_folder(loaded))
    dist.main_decides(ranks, lambda: refuse_others(folder, name, root.infer.input))
    noted = folder / f"notes_{name}.txt"
    say_notes(notes if ranks.is_main else (), None if dry_run else noted)
    if dry_run:
        count = first.resolved.eval_batch_size
        splits = {path: some_of(split, count, root.seed) for path, split in splits.items()}
    split = splits[paths[0]]
    target = folder / f"attention_{name}.h5"
    members: list[Predictions] = []
    by_parts = any(in_parts(evaluated_as(r.inputs, root)) for r in records.values())
    wanted = root.infer.attention and not dry_run and not by_parts
    if by_parts and root.infer.attention and isinstance(first.model.head, AttentionHead):
        say("no attention: each window or clip counts by itself")
    maps = volume_maps(folder / f"maps_{name}", ranks) if root.infer.volume_maps else None
    heard = nullcontext if maps is None or dry_run else maps.listening
    claimed = nullcontext() if dry_run else alone(folder / name, ranks)
    with claimed, AttentionWriter(target, ranks, wanted=wanted) as recorder:
        for path in paths:
            member = first if path == paths[0] else restore(path, root, ranks)
            member.pool = pool
            with recorder.listening(member.model.head), heard(member):
                predictions = member.predict(splits[path])
            if predictions is not None:
                members.append(predictions)
                say(f"predicted {len(split):,} samples of {name} with {path}")
        if dry_run:
            return
        predictions = mean_of(members, first) if ranks.is_main else None
        rows = []
        if predictions is not None:
            write_notes(noted, notes)
            taken = values_taken(first, paths, name, root.infer.input)
            files.write_json(folder / f"resolved_config_{name}.json", taken)
            rows = write_split(folder, name, split, predictions, first)
        made_of = {"split": name, "checkpoints": list(map(str, paths))}
        attention = recorder.write(split, first.resolved, made_of)
        if attention is not None and predictions is not None:
            rows += draw_attention(attention, split, predictions, first, root.infer.attention_maps)
        if root.infer.heat_maps and predictions is not None:
            rows += write_heat_maps(first, root.infer, split, predictions, folder, name)
        if maps is not None:
            rows.append(("volume maps", f"{maps.write(split)}/"))
    if ranks.is_main:
        say(two_columns(rows))


def refuse_others(folder: Path, name: str, new: str | None) -> None:
    """Keep results of another `infer.input` of the same name, and those of a split.

    Args:
        new: path of new samples; None: those of a split.

    Raises:
        UserError: they would be replaced.
    """
    if (folder / "resolved_config.json").is_file():
        raise UserError(
            f"infer.output_dir: {folder} holds a run, whose own predictions would be replaced: name"
            " another folder"
        )
    path = folder / f"resolved_config_{name}.json"
    there = path.is_file() and (folder / f"predictions_{name}.csv").is_file()
    made = files.read_json(path).get("taken", {}).get("infer", {}) if there else {}
    own = None if new is None else os.path.realpath(new)
    if "input" in made and made["input"] != own:
        of = "of a split of the data set" if made["input"] is None else f"of {made['input']}"
        raise UserError(
            f"{folder / f'predictions_{name}.csv'} is {of}, and would be replaced: set"
            " infer.output_dir to another folder"
        )


OF_INFERENCE = (
    "dataloading.eval_batch_size",
    "task.metrics",
    "task.bootstrap",
    "task.result_plot",
)
"""Keys that inference reads of the present spec, and that no model depends on."""


def free_keys(root: Root) -> list[str]:
    """Keys that may be others than in training, as they say how the samples are predicted or, of
    new ones, how their files are read."""
    new = [] if root.infer.input is None else [f"data.{name}" for name in root.data.of_new_samples]
    return [*OF_INFERENCE, *new]


def trained_group(loaded: Loaded[Root]) -> str:
    """The group of the spec's run, which was trained with the same overrides, or without those that
    are of this inference alone."""
    other = with_fields(loaded, group=loaded.group_but(free_keys(loaded.root)))
    kept = loaded.root.infer.checkpoint is not None or locate(loaded).config.is_file()
    return loaded.group if kept or not locate(other).config.is_file() else other.group


def own_folder(loaded: Loaded[Root]) -> Path:
    """Folder of the results below the spec's own run; of an ensemble of folds without that of
    data.fold, below the first of them."""
    run, folds = locate(loaded), loaded.root.infer.folds
    path = run.path if not folds or loaded.root.data.fold in folds else run.group / str(folds[0])
    return path / "infer"


def values_taken(
    experiment: Experiment, paths: Sequence[Path], name: str, new: str | None
) -> dict[str, Any]:
    """What the predictions were made with, where the spec leaves it open: what the first member was
    trained with and is asked anew, which checkpoints, which samples, and how batches are made."""
    root, resolved = experiment.root, experiment.resolved
    return {
        **msgspec.to_builtins(resolved),
        "taken": {
            "device": str(experiment.ranks.device),
            "ranks": experiment.ranks.world,
            "infer": {
                "checkpoint": [str(path) for path in paths],
                "split": name,
                "input": None if new is None else os.path.realpath(new),
            },
            "training": {"precision": experiment.precision},
            "dataloading": {name: experiment.batches},
            "model": {"feature_aggregation_method": experiment.model.aggregation},
            "add_log": root.add_log,
        },
    }


def geometry_notes(experiment: Experiment, split: Split) -> list[str]:
    """Lines where volumes that are kept as stored are not cut into the slices that the axis of the
    encoder names, or lie in another spacing than those of training."""
    inputs, slices = experiment.resolved.inputs, experiment.root.model.encoder.lifting
    if not isinstance(inputs, VolumeInputs):
        return []
    from glovita_lib.loader_volumes import slices_line, spacing_line, stored_affines

    affines = stored_affines(split)
    if affines is None:
        return []
    lines = spacing_line(affines, inputs)
    if isinstance(slices, Slices):
        lines += slices_line(affines, slices, "volumes asked about")
    return lines


def volume_maps(folder: Path, ranks: dist.Ranks) -> "VolumeMaps":
    """What writes maps of volumes, loaded where some are asked for."""
    from glovita_lib.volume_maps import VolumeMaps

    return VolumeMaps(folder, ranks)


def in_parts(inputs: Inputs) -> bool:
    """Whether a model sees volumes window by window, or videos clip by clip: its head weighs no
    instances of samples."""
    return isinstance(inputs, EncodedInputs) and inputs.parts is not None


def export(path: Path, experiment: Experiment) -> None:
    """The weights of a model as safetensors, keys encoder.* and head.*.

    Raises:
        UserError: a PEFT method has put something beside the weights, so that they alone are not
            the model; the file exists and is no export.
    """
    import safetensors.torch

    refuse_unmerged(experiment)
    refuse_foreign(path)
    # a block that is used twice is written under both its names
    state = {name: contiguous_copy(t) for name, t in experiment.model.state_dict().items()}
    resolved = experiment.resolved
    facts = {"encoder_facts": resolved.encoder_facts, "inputs": resolved.inputs}
    spec = json.dumps(msgspec.to_builtins(experiment.root.model) | msgspec.to_builtins(facts))
    files.write_bytes(path, safetensors.torch.save(state, {"format": "pt", "model": spec}))
    say(f"wrote {len(state)} tensors to {path}")


def refuse_foreign(path: Path) -> None:
    """Only an export is replaced by an export.

    Raises:
        UserError: the file exists and is something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            own = "model" in (file.metadata() or {})
    except (SafetensorError, OSError):
        own = False
    if not own:
        raise UserError(
            f"infer.export: {path} exists and is no export of glovita; name another file, or remove"
            " it"
        )


def refuse_unmerged(experiment: Experiment) -> None:
    """Another run could not start from weights whose adapters it does not have.

    Raises:
        UserError: the model has adapters.
    """
    modules = list(experiment.model.modules())
    if not any(isinstance(module, ADDED) for module in modules):
        return
    method = type(experiment.root.peft).__struct_config__.tag
    if any(isinstance(module, Insert) for module in modules):
        mend = "which cannot be folded into them: keep the checkpoint, or its adapter.safetensors"
    else:
        mend = "set infer.merge = true to fold it into them"
    raise UserError(f'infer.export: "{method}" computes something beside the weights, {mend}')


# ---------------------------------------------------------------------- which checkpoints


def member_paths(loaded: Loaded[Root]) -> list[Path]:
    """The checkpoints to use: those named, those of the folds named, or that of the spec's run.

    Raises:
        UserError: the run does not exist, was trained with another spec, is a probe, or has seen
            the samples.
    """
    spec, data = loaded.root.infer, loaded.root.data
    if spec.checkpoint is not None:
        named = (spec.checkpoint,) if isinstance(spec.checkpoint, str) else spec.checkpoint
        return [Path(name) for name in named]
    if not loaded.root.task.keeps_model:
        raise UserError(
            "a probe keeps no model to predict with: mode = train writes its metrics and"
            f" predictions, metrics_probe.json and predictions_<method>_<split>.csv in"
            f" {locate(loaded).path}"
        )
    folds = spec.folds or (data.fold,)
    if len(folds) > 1 and spec.input is None:
        refuse_seen_samples(loaded, folds)
    own = locate(loaded)
    return [member_of(RunDir(own.group / str(fold)), loaded) for fold in folds]


def member_of(run: RunDir, loaded: Loaded[Root]) -> Path:
    """The checkpoint of a run of this very spec."""
    path = run.best if loaded.root.infer.use == "best" else run.last
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: train the spec first (mode = train), give the overrides it was"
            ' trained with, or name a file with infer.checkpoint = "<path>"'
        )
    changes = changed_keys(files.read_json(run.config), loaded.plain, free_keys(loaded.root))
    if changes:
        cure = f'undo the changes, or evaluate it with them by infer.checkpoint = "{path}"'
        if own := keys_of_model(changes, path, loaded.root):
            cure = (
                f"{listed(own, 4)} {'belongs' if len(own) == 1 else 'belong'} to the trained model:"
                ' undo the changes, or train a new run with name = "<another>"'
            )
        raise UserError(
            f"{run.path} was trained with another spec: {listed(changes, 8, '; ')}; {cure}"
        )
    return path


OF_DATA = ("data", "dataloading.batch_size")
"""What a checkpoint is evaluated with as the present spec says, but for what is of the model."""
OF_TRAINING = (
    "augmentation", "sampling", "subtask", "task", "num_classes", "standardize",
    "frames.label_level",
)  # fmt: skip
"""Fields of section data that a model has learnt from, beside those that say what a sample is."""


def keys_of_model(changes: Sequence[str], path: Path, root: Root) -> list[str]:
    """Keys of changes ("key: old -> new") that the model of a checkpoint keeps as it was trained
    with, or is refused with, also where the checkpoint is named."""
    inputs = record_of(path).inputs
    free = []
    if evaluated_as(inputs, root) is not inputs:  # the windows of volumes are the spec's
        free = [f"data.augmentation.{name}" for name in EVALUATION_KEYS]
    own = [f"data.{name}" for name in (*OF_TRAINING, *read_by(inputs).__struct_fields__)]
    return [
        key
        for key in (change.partition(": ")[0] for change in changes)
        if not is_among(key, OF_DATA) or (is_among(key, own) and not is_among(key, free))
    ]


def refuse_seen_samples(loaded: Loaded[Root], folds: tuple[int | str, ...]) -> None:
    """Folds of a k-fold split have trained on each other's test samples, and so may those that a
    split file lists."""
    data, wanted = loaded.root.data, loaded.root.infer.split
    source = msgspec.to_builtins(data).get("split_source")
    seen = source == "kfold"
    if source == "splits_json" and isinstance(data, FileData):
        names = {split: getattr(data, f"{split}_split_name", split) for split in SPLIT_NAMES}
        path = files.on_disk(Path(data.data_root_dir) / data.split_file)
        first, *rest = (read_splits(path, fold, [*names.values()]) for fold in (data.fold, *folds))
        split = names[wanted or ("test" if names["test"] in first else "val")]
        trained_on = {entry for content in rest for entry in content.get(names["train"], ())}
        seen = wanted != "train" and not trained_on.isdisjoint(first.get(split, ()))
    if seen:
        raise UserError(
            f"infer.folds = {list(folds)}: with split_source = {source} the folds have trained on"
            " each other's samples, so an ensemble is for new ones: give infer.input; summary.json"
            " in the group's directory has the pooled metrics over the folds"
        )


# ---------------------------------------------------------------------- which samples


def wanted_splits(
    root: Root, records: dict[Path, Resolved], ranks: dist.Ranks
) -> tuple[str, dict[Path, Split], list[str]]:
    """What the samples to predict are called in file names, the samples for each member (each reads
    the images in its own way, where they differ in that), and what was noted about the data.

    Args:
        records: what each member was trained on.

    Raises:
        UserError: see wanted_split.
    """
    readings = {path: read_by(record.inputs) for path, record in records.items()}
    keys = {path: msgspec.json.encode(samples) for path, samples in readings.items()}
    differ = len(set(keys.values())) > 1
    name, splits = "", {}
    notes: dict[str, None] = {}  # once, whichever members read the data
    found: dict[bytes, Split] = {}
    for path, samples in readings.items():
        if (key := keys[path]) not in found:
            data = read_as(root.data, samples) if differ else root.data
            trained = str(path) if len(records) > 1 else "the checkpoint"
            own = replace(root, data=data)
            name, found[key], lines = wanted_split(own, records[path], ranks, trained)
            notes |= dict.fromkeys(lines)
        splits[path] = found[key]
    return name, splits, list(notes)


def read_as(data: BaseData, samples: BaseSamples) -> BaseData:
    """A data set whose samples are read as those of a model, as far as that can be told."""
    told = set(samples.__struct_fields__) & set(data.__struct_fields__)
    return replace(data, **{name: getattr(samples, name) for name in told})


def wanted_split(
    root: Root, record: Resolved, ranks: dist.Ranks, trained: str
) -> tuple[str, Split, list[str]]:
    """The samples to predict with a model, what they are called in file names, and what was noted
    about the data.

    Args:
        record: what it was trained on.
        trained: what it is called in a message.

    Raises:
        UserError: there is no such split or folder, or the samples or classes are others than the
            model's.
    """
    spec = root.infer
    if spec.input is not None:
        encoded = isinstance(record.inputs, EncodedInputs)
        if encoded and os.path.isfile(spec.input) and h5py.is_hdf5(spec.input):
            raise UserError(
                f"{trained} was trained on {record.inputs.kind}, and infer.input ="
                f' "{spec.input}" is a feature file'
            )
        split, samples, notes = new_samples(record.inputs, spec.input, root.data)
        check_samples(record, trained, samples, spec.input, None, notes)
        return files.stem_of(spec.input), split, notes
    wanted = ("test", "val") if spec.split is None else (spec.split,)
    check_kind(record, trained, root.data)
    data = read_data(root, ranks, model=record, wanted=wanted)
    check_data(record, trained, data, root.data)
    check_targets(record, trained, data)
    if not record.ordered:
        names = f"{listed(record.class_names)} of {trained}"
        refuse("task", root.task.order_problems(names))
    there = [name for name, split in data.splits.items() if len(split)]
    name = next((name for name in wanted if name in there), None)
    if name is None:
        raise UserError(
            f"data set {data.name} has no split {wanted[0]}; set infer.split to {', '.join(there)}"
        )
    return name, data.splits[name], data.report


@singledispatch
def new_samples(inputs: Inputs, path: str, data: BaseData) -> tuple[Split, BaseSamples, list[str]]:
    """Samples without labels, of the kind that the model takes, what one is, and lines about them.

    Raises:
        UserError: there are none.
    """
    raise TypeError(f"no reader of unlabelled {inputs.kind}")


@new_samples.register
def _(inputs: ImageInputs, path: str, data: BaseData) -> tuple[Split, BaseSamples, list[str]]:
    images = data if isinstance(data, GenericImageData) else GenericImageData()
    samples = ImageSamples(channels=inputs.channels, bit_depth=inputs.bit_depth)
    split, notes = build_unlabelled(
        path, channels=samples.channels, bit_depth=samples.bit_depth, files=images
    )
    return split, samples, notes


@new_samples.register
def _(inputs: VolumeInputs, path: str, data: BaseData) -> tuple[Split, BaseSamples, list[str]]:
    volumes = data if isinstance(data, VolumeData) else VolumeData()
    from glovita_lib.data_volumes import unlabelled_volumes

    split, notes = unlabelled_volumes(path, inputs, volumes)
    return split, read_by(inputs), notes


@new_samples.register
def _(inputs: ClipInputs, path: str, data: BaseData) -> tuple[Split, BaseSamples, list[str]]:
    from glovita_lib.data_video import unlabelled_videos

    videos = data if isinstance(data, VideoData) else VideoData()
    split, notes = unlabelled_videos(path, inputs, videos)
    return split, read_by(inputs), notes


@new_samples.register
def _(inputs: SeriesInputs, path: str, data: BaseData) -> tuple[Split, BaseSamples, list[str]]:
    from glovita_lib.data_series import unlabelled_series  # inference of others does without it

    series = data if isinstance(data, SeriesData) else SeriesData()
    split, notes = unlabelled_series(path, inputs, series)
    return split, read_by(inputs), notes


@new_samples.register
def _(
    inputs: VectorInputs | BagInputs, path: str, data: BaseData
) -> tuple[Split, BaseSamples, list[str]]:
    return unlabelled_features(Path(path), features_of(data))


# ---------------------------------------------------------------------- results


def mean_of(members: list[Predictions], experiment: Experiment) -> Predictions:
    """Mean over the members of probabilities, or of regression outputs; one member stays itself.

    The loss of an ensemble is that of its mean prediction.
    """
    first = members[0]
    if len(members) == 1:
        return first
    scores = Scores.mean([member.scores for member in members])
    if not isinstance(first, LabelledPredictions):
        return with_fields(first, scores=scores)
    losses = experiment.predictor.losses_of(scores, first.targets)
    return with_fields(first, scores=scores, losses=losses)


def write_split(
    folder: Path, name: str, split: Split, predictions: Predictions, experiment: Experiment
) -> list[tuple[str, str]]:
    """Write predictions, and of labelled samples metrics and plots too; lines on what came out and
    where it is."""
    table, report = folder / f"predictions_{name}.csv", None
    clear_results(folder, name)
    plot = experiment.root.task.result_plot != "none"
    if isinstance(predictions, LabelledPredictions):
        report = write_results(predictions, folder, name, experiment, split=split, plot=plot)
    else:
        write_predictions(predictions, table, experiment.resolved)
    rows = [] if report is None else summary_lines({name: report})
    tables = ", ".join(map(str, prediction_paths(table)))
    rows += [experiment.resolved.outputs_line, ("predictions", tables)]
    if report is not None:
        rows.append(("metrics", str(folder / f"metrics_{name}.json")))
    if report is not None and plot:
        rows.append(("plots", f"{folder / 'plots'}/"))
    return rows


def draw_attention(
    attention: Path, split: Split, predictions: Predictions, experiment: Experiment, maps: int
) -> list[tuple[str, str]]:
    """Draw heat maps of some of the bags; lines on where they and the attention of all are."""
    rows = [("attention", str(attention))]
    folder = attention.parent / "plots" / attention.stem
    if draw_bags(attention, folder, split, predictions, experiment.resolved, count=maps):
        rows.append(("attention maps", f"{folder}/"))
    return rows
