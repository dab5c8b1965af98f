"""Values derived at run time from the spec, the data and the encoder: in one place, saved with
every checkpoint.

B batch, C channels, S side of an image as the encoder receives it, D width of a feature, K classes
or targets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np

from glovita_lib.augment import ResolvedImageAugmentation, resolve_augmentation
from glovita_lib.data import (
    BagSamples,
    BaseSamples,
    ClipSamples,
    Data,
    ImageSamples,
    SeriesSamples,
    Split,
    Standardizer,
    VectorSamples,
    VolumeSamples,
    order_of_names,
    outputs_line,
)
from glovita_lib.dist import cores
from glovita_lib.encoder import file_facts, preprocess_of
from glovita_lib.errors import UserError, composed, listed, refuse
from glovita_lib.metric_names import check_logged, logged_names, uses_order, usual_metrics
from glovita_lib.spec import ByStruct, Spec, flattened, with_lists
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_data import VolumeData
from glovita_lib.spec_errors import shown
from glovita_lib.spec_lift import Patch
from glovita_lib.spec_root import Root
from glovita_lib.spec_samples import BaseData, Subtask
from glovita_lib.spec_series import ResolvedSeriesAugmentation
from glovita_lib.spec_train import Framewise, LabelTask, Supervised
from glovita_lib.spec_video import ResolvedClips
from glovita_lib.spec_volumes import ResolvedVolumeAugmentation

# ------------------------------------------------------------------------------------ inputs
#
# What a sample is and how it becomes the encoder's input: one Struct a modality, which adds to that
# of the data set what a run derives.
#
# To add a modality, add its samples (in data), its Struct here and to the unions, and the module
# that the samples name (`built_in`), which registers for them `resolve_inputs`, `build_inputs` of
# objectives and `build_split_loader` of experiment; and where samples are read without labels or
# shown, the functions registered for ImageInputs.


class ModelArguments(TypedDict):
    """What build_model asks of the inputs."""

    channels: int
    size: tuple[int, ...] | None
    patch_size: NotRequired[Patch | None]


class Parts(NamedTuple):
    """What evaluation sees of a sample one by one, and reduces what the model says of it."""

    name: str
    """What they are called in messages."""
    are_averaged: bool
    """Whether logits are averaged."""
    setting: str
    """What makes them averages."""
    alone: str
    """What has the model see a sample at once."""


def drawn_by(augmentation: Any, still: str) -> dict[str, str]:
    """What a train policy draws, see ImageInputs.drawn; `still` is one that draws nothing."""
    setting = f'data.augmentation.train_policy = "{still}"'
    return dict.fromkeys(augmentation.train.random(), setting)


class ImageInputs(ImageSamples, tag="images"):
    """Images, under the policies of the run."""

    parts: ClassVar[Parts | None] = None
    """What evaluation sees of a sample one by one; none where it sees all of it."""

    augmentation: ResolvedImageAugmentation
    """Policies with all their parameters, sizes, mean and std."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of a sample as the encoder receives it."""
        return (self.channels, self.augmentation.image_size, self.augmentation.image_size)

    @property
    def model_arguments(self) -> ModelArguments:
        """What the model is built with."""
        patch = self.augmentation.patch_size
        return {"channels": self.channels, "size": self.shape[1:], "patch_size": patch}

    @property
    def transform(self) -> dict[str, Any]:
        """All that makes the encoder's input of a file, as builtin types."""
        return msgspec.to_builtins(self.augmentation)

    @property
    def drawn(self) -> dict[str, str]:
        """What training draws, by the names of fields, and the setting that draws nothing."""
        return drawn_by(self.augmentation, "default_2d_1")


class VolumeInputs(VolumeSamples, tag="volumes", kw_only=True):
    """Volumes, prepared, under the policies of the run."""

    augmentation: ResolvedVolumeAugmentation
    """Policies with all their parameters and the patch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, X, Y, Z) of a sample as the encoder receives it."""
        return (self.channels, *self.augmentation.patch_size)

    @property
    def by_windows(self) -> bool:
        """Whether evaluation sees a volume window by window."""
        return self.augmentation.evaluation == "windows"

    @property
    def parts(self) -> Parts | None:
        """What evaluation sees of a volume one by one."""
        setting = 'data.augmentation.window_reduce = "mean"'
        mean = self.augmentation.window_reduce == "mean"
        alone = 'data.augmentation.evaluation = "center", or train with model.encoder.lift ='
        alone += ' "windows", whose tokens are the windows'
        return Parts("windows", mean, setting, alone) if self.by_windows else None

    @property
    def model_arguments(self) -> ModelArguments:
        """What the model is built with."""
        return {"channels": self.channels, "size": self.augmentation.patch_size}

    @property
    def transform(self) -> dict[str, Any]:
        """All that makes the encoder's input of a file, as builtin types."""
        return msgspec.to_builtins(self)

    @property
    def drawn(self) -> dict[str, str]:
        return drawn_by(self.augmentation, "default_3d_1")


class SeriesInputs(SeriesSamples, tag="series", kw_only=True):
    """Time series, prepared, under the policies of the run."""

    parts: ClassVar[Parts | None] = None
    """What evaluation sees of a sample one by one; none where it sees all of it."""

    augmentation: ResolvedSeriesAugmentation
    """Policies with all their parameters and the longest length."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, T) of the longest sample as the encoder receives it."""
        return (self.channels, self.augmentation.length)

    @property
    def model_arguments(self) -> ModelArguments:
        """What the model is built with."""
        return {"channels": self.channels, "size": (self.augmentation.length,)}

    @property
    def transform(self) -> dict[str, Any]:
        """All that makes the encoder's input of a file, as builtin types."""
        return msgspec.to_builtins(self)

    @property
    def drawn(self) -> dict[str, str]:
        return drawn_by(self.augmentation, "default_series_1")


class ClipInputs(ClipSamples, tag="videos", kw_only=True):
    """Clips of videos, under the policies of images of the run."""

    augmentation: ResolvedImageAugmentation
    """Policies with all their parameters, sizes, mean and std."""
    sampling: ResolvedClips
    """Which clips are drawn."""
    probability: Literal["softmax", "sigmoid"] | None
    """What makes probabilities of logits; none of a regression."""

    @property
    def parts(self) -> Parts | None:
        """What evaluation sees of a video one by one."""
        of = self.sampling
        if of.clips == 1 or of.combine == "bag" or self.label_level == "frame":
            return None
        setting = 'data.sampling.combine = "logits"'
        return Parts("clips", of.combine == "logits", setting, "data.sampling.clips = 1 as trained")

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, T, S, S) of a sample as the encoder receives it."""
        side, of = self.augmentation.image_size, self.sampling
        clips = of.clips if of.combine == "bag" else 1
        return (self.channels, clips * of.frames, side, side)

    @property
    def model_arguments(self) -> ModelArguments:
        """What the model is built with."""
        patch = self.augmentation.patch_size
        return {"channels": self.channels, "size": self.shape[1:], "patch_size": patch}

    @property
    def transform(self) -> dict[str, Any]:
        """All that makes the encoder's input of a file, as builtin types."""
        return msgspec.to_builtins(self)

    @property
    def drawn(self) -> dict[str, str]:
        still = {"train": "middle", "train_clips": 1}
        of_places = {
            f"sampling.{name}": f"data.sampling.{name} = {shown(value)}"
            for name, value in still.items()
            if getattr(self.sampling, name) != value
        }
        return drawn_by(self.augmentation, "default_2d_1") | of_places


class VectorInputs(VectorSamples, tag="vectors"):
    """Precomputed features."""

    mean: tuple[float, ...] | None
    """Mean of each feature over the train split, where they are standardised."""
    std: tuple[float, ...] | None
    """Standard deviation of each feature, likewise."""

    @property
    def model_arguments(self) -> ModelArguments:
        """What the model is built with."""
        return {"channels": self.width, "size": None}


class BagInputs(BagSamples, tag="bags"):
    """Bags of precomputed features."""

    mean: tuple[float, ...] | None
    """Mean of each feature over the instances of the train split, where they are standardised."""
    std: tuple[float, ...] | None
    """Standard deviation of each feature, likewise."""

    @property
    def model_arguments(self) -> ModelArguments:
        """What the model is built with."""
        return {"channels": self.width, "size": None}


EncodedInputs = ImageInputs | VolumeInputs | SeriesInputs | ClipInputs
"""Samples that an encoder reads; the others are features, which a head takes as they are."""
Inputs = EncodedInputs | VectorInputs | BagInputs


@ByStruct
def resolve_inputs(samples: BaseSamples, root: Root, data: Data) -> Inputs:
    """What a run makes of the samples of a data set.

    Raises:
        UserError: see resolve_augmentation.
    """
    raise TypeError(f"no inputs for {type(samples).__name__}")


@resolve_inputs.register
def _(samples: ImageSamples, root: Root, data: Data) -> ImageInputs:
    section = getattr(root.data, "augmentation", None)
    assert isinstance(section, ImageAugmentation), "a data set of images has data.augmentation"
    sizes = {split.source.uniform for split in data.splits.values() if len(split)}
    same = sizes.pop() if len(sizes) == 1 else None
    augmentation = resolve_augmentation(
        section,
        default_policies=root.data.default_policies,
        encoder=preprocess_of(root.model.encoder, channels=samples.channels),
        channels=samples.channels,
        native_size=None if same is None else (same[1], same[2]),
    )
    return ImageInputs(
        channels=samples.channels, bit_depth=samples.bit_depth, augmentation=augmentation
    )


# ------------------------------------------------------------------------------------- a run


class Resolved(Spec):
    """What resolved_config.json shows and a checkpoint carries."""

    dataset: str
    """Tag of the data set."""
    subtask: Subtask
    """Kind of target."""
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression, in the order of the outputs."""
    ordered: bool
    """Whether the classes are a scale in that order."""
    samples: dict[str, int]
    """Number of samples per split."""
    inputs: Inputs
    """What a sample is, and how it becomes the encoder's input."""
    metrics: tuple[str, ...]
    """Metrics of every evaluation."""
    best_metric: str | None
    """Logged name of the metric that picks the best checkpoint; none without a val split."""
    class_weights: tuple[float, ...] | None
    """Weight per class in the training loss."""
    target_mean: tuple[float, ...]
    """Mean per regression target over the train split; 0 otherwise."""
    target_std: tuple[float, ...]
    """Standard deviation per regression target over the train split; 1 otherwise."""
    eval_batch_size: int
    """Samples per batch and rank in evaluation."""
    number_names: dict[str, str] | None = None
    """What whole numbers, or columns by their place, mean in feature files that state no names."""
    encoder_facts: dict[str, Any] | None = None
    """What only a file says of the encoder's architecture, such as the plan of an nnssl checkpoint;
    evaluation does not need that file."""

    @property
    def outputs_line(self) -> tuple[str, str]:
        """Classes or targets for the console."""
        ordered = uses_order(self.metrics)
        return outputs_line(self.subtask, self.class_names, ordered=ordered)


# ------------------------------------------------------------------- what a model was trained on
#
# `Resolved` is the record of it in a checkpoint: what a sample is (kind, channels, bit depth,
# width) and the outputs (kind of target, names, their order). Every mode that asks a checkpoint
# about data compares them here.

STEPS = 1e-3  # share by which the times between values of series may differ


def read_by(inputs: Inputs) -> BaseSamples:
    """What a sample has to be for a trained model."""
    kind = type(inputs).__base__
    assert kind is not None and issubclass(kind, BaseSamples)
    return kind(**{name: getattr(inputs, name) for name in kind.__struct_fields__})


def check_samples(
    model: Resolved,
    trained: str,
    samples: BaseSamples,
    where: str,
    spec: Spec | None,
    report: list[str],
) -> None:
    """Samples are those that a trained model takes.

    Args:
        trained: what the model is called in a message.
        where: what has the samples.
        spec: the section data, where it says how they are read; none: it does not.
        report: gets a line where columns have other names than the model's.

    Raises:
        UserError: they are not.
    """
    wanted = read_by(model.inputs)
    if samples.kind != wanted.kind:
        raise UserError(
            f"{trained} was trained on {wanted.kind}, the samples of {where} are {samples.kind}"
        )
    for key, theirs, ours in differences(wanted, samples):
        if key in ("value_columns", "time_points"):
            how = order_of_names(ours, theirs, is_wide=key == "time_points")
            theirs, ours, key = listed(theirs, 6), listed(ours, 6), "value_columns"
            if how == "other":  # they say nothing of the order
                report.append(f"{where}: columns {ours} taken for {theirs} of {trained}, in order")
            if how in ("same", "other"):
                continue
        if key == "step" and (None in (theirs, ours) or abs(theirs - ours) <= STEPS * theirs):
            continue  # series without times are taken for such of the same step
        hint = f"; set data.{key}" if spec and key.split(".")[0] in spec.__struct_fields__ else ""
        raise UserError(
            f"{trained} was trained on {wanted.kind} of {key} {theirs}, {where} has {key}"
            f" {ours}{hint}"
        )


def check_kind(model: Resolved, trained: str, spec: BaseData) -> None:
    """A data set can have samples of the kind that a trained model takes, as far as the spec tells.

    Raises:
        UserError: it has others.
    """
    wanted = read_by(model.inputs)
    if spec.samples not in ("either", wanted.spec_kind):
        raise UserError(
            f"{trained} was trained on {wanted.kind}, the samples of data set"
            f" {spec.__struct_config__.tag} are {spec.samples}"
        )


def differences(one: Spec, other: Spec, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys of the second table whose values differ in the first, with both values."""
    for name in other.__struct_fields__:
        first, second = getattr(one, name), getattr(other, name)
        if isinstance(first, Spec) and isinstance(second, Spec):
            yield from differences(first, second, f"{prefix}{name}.")
        elif first != second:
            yield f"{prefix}{name}", first, second


def check_data(model: Resolved, trained: str, data: Data, spec: Spec) -> None:
    """The samples of a data set are those that a trained model takes, see `check_samples`."""
    check_samples(model, trained, data.samples, f"data set {data.name}", spec, data.report)


def has_targets_of(model: Resolved, subtask: str, names: tuple[str, ...]) -> bool:
    """Whether targets are those that a trained model predicts, in the same order."""
    same_names = list(map(composed, names)) == list(map(composed, model.class_names))
    return subtask == model.subtask and same_names


def in_order_of(model: Resolved, data: Data) -> Data:
    """A data set whose classes are those of a trained model, in their order, where its own are
    among them (targets of several columns: the same ones); else as it is. Features of several data
    sets, read out with one model, so count their classes alike."""
    place = {composed(name): index for index, name in enumerate(model.class_names)}
    names = list(map(composed, data.class_names))
    if data.subtask != model.subtask or not place.keys() >= set(names):
        return data
    if data.subtask in ("multiclass", "framewise"):
        table = np.array([place[name] for name in names], np.int64)
    elif len(names) == len(place):
        table = np.array([names.index(name) for name in place])
    else:
        return data
    splits = {}
    for name, split in data.splits.items():
        targets = split.targets
        if targets is not None:
            targets = table[targets] if targets.ndim == 1 else targets[:, table]
        frames = split.frames if split.frames is None else split.frames.recoded(table)
        splits[name] = replace(split, targets=targets, frames=frames)
    return replace(data, splits=splits, class_names=model.class_names)


def check_targets(model: Resolved, trained: str, data: Data) -> None:
    """The targets of a data set are those that a trained model predicts, in the same order.

    Raises:
        UserError: they are not.
    """
    if not has_targets_of(model, data.subtask, data.class_names):
        raise UserError(
            f"data set {data.name} is {data.subtask} of {listed(data.class_names, 8)}, {trained}"
            f" was trained for {model.subtask} of {listed(model.class_names, 8)}; set"
            " data.class_names to the latter, or use infer.input to predict without labels"
        )


def check_unchanged(model: Resolved, trained: str, other: Resolved, where: str) -> None:
    """What a run is continued with is what it was started with: all that was derived of the data
    and files then (sizes, scales, weights, counts, policies) is the same, but for `ROUNDING`.

    Args:
        trained: what has the values of the start, in a message.
        where: what has the others.

    Raises:
        UserError: it is not.
    """
    tables = (with_lists(msgspec.to_builtins(record)) for record in (model, other))
    before, after = (dict(flattened(table)) for table in tables)
    changes = []
    for key in dict.fromkeys([*before, *after]):
        deviation = before.get(f"{key.removesuffix('mean')}std") if key.endswith("mean") else None
        change = changed(before.get(key), after.get(key), deviation)
        if change is not None:
            changes.append(key + change)
    if changes:
        raise UserError(
            f"{trained} was trained with other values than {where}: {listed(changes, 8, '; ')}."
            " Put back what the run was started on to continue it, set training.on_existing ="
            ' "overwrite" to replace it or "new" to start beside it, or give this one another name'
        )


ROUNDING = 1e-6
"""Share of a number, or of its column's deviation, by which sums differ that were taken in another
order, as on another number of threads; a run is continued with the saved ones."""
MEAN_ROUNDING = 1e-12
"""The same, of a mean in float64, whose column may vary by far less than its size."""


def changed(before: Any, after: Any, deviation: Any) -> str | None:
    """How a derived value has changed, for a message after its key; None where it has not.

    Args:
        before, after: builtin types; a list of numbers has one per column.
        deviation: of the columns whose means they are; None: they are no means.
    """
    if not are_numbers(before, after):
        return None if before == after else f": {shown(before)} -> {shown(after)}"
    old, new = np.atleast_1d(before), np.atleast_1d(after)
    if old.shape != new.shape:
        return f": {shown(before)} -> {shown(after)}"
    share, least = ROUNDING, np.zeros(1)
    if deviation is not None:  # a mean of 1e9 may be far off by a millionth of it
        share, least = MEAN_ROUNDING, ROUNDING * np.abs(np.atleast_1d(deviation))
    with np.errstate(invalid="ignore"):  # inf - inf; NumPy 1.26's isclose takes one bound alone
        near = np.abs(old - new) <= least + share * np.abs(new)
    same = near & np.isfinite(new) | (old == new) | (np.isnan(old) & np.isnan(new))
    if same.all():
        return None
    first, count = int(np.argmin(same)), int((~same).sum())
    place = f"[{first}]" if isinstance(before, list) else ""
    more = f" ({count} of {len(old)} numbers differ)" if len(old) > 1 else ""
    pair = old[first].item(), new[first].item()
    was, now = (f"{number:.6g}" for number in pair)
    if was == now:
        was, now = map(shown, pair)
    return f"{place}: {was} -> {now}{more}"


def are_numbers(*values: Any) -> bool:
    """Whether all values are floating-point numbers or lists of them, which may be rounded."""
    return all(
        isinstance(number, float)
        for value in values
        for number in (value if isinstance(value, list) else [value])
    )


def check_members(models: Mapping[str, Resolved]) -> None:
    """The members of an ensemble, by what they are called in a message, predict the same and read
    the same kind of samples; images each may read in its own way.

    Raises:
        UserError: they do not.
    """
    (first, model), *others = models.items()
    for name, other in others:
        if other.inputs.kind != model.inputs.kind:
            raise UserError(
                f"{name} was trained on {other.inputs.kind}, but {first} on {model.inputs.kind}:"
                " members of an ensemble must read the same samples"
            )
        if not has_targets_of(model, other.subtask, other.class_names):
            raise UserError(
                f"{name} predicts {other.subtask} {listed(other.class_names, 8)}, but {first}"
                f" {model.subtask} {listed(model.class_names, 8)}: members of an ensemble must"
                " have the same classes, in the same order"
            )


# ---------------------------------------------------------------------------------- resolving


def resolve_spec(root: Root, data: Data) -> Resolved:
    """All resolved values of a run, from the spec, the data and the encoder's input convention.

    Raises:
        UserError: nothing to train on, a task that trains no model, class weights that do not fit
            the classes, or options that have no meaning for these targets or samples; see also
            resolve_inputs.
    """
    task = root.task
    if not isinstance(task, LabelTask):
        raise UserError(
            'task.objective = "probe" judges features and has no model: set it to "supervised", or'
            ' mode to "train"'
        )
    train = data.splits.get("train")
    if root.mode == "train" and (train is None or not len(train)):
        raise UserError(f"data set {data.name}: the train split is empty")
    if root.mode == "train":
        refuse("model.head", root.model.head.target_problems(data.subtask))
    check_task(task, data)
    refuse("model.encoder", root.model.encoder.sample_problems(data.samples.spec_kind))
    metrics = task.metrics or usual_metrics(data.subtask)
    mean, std = target_scale(task, data, train)
    return Resolved(
        dataset=data.name,
        subtask=data.subtask,
        class_names=data.class_names,
        ordered=data.has_order,
        samples={name: len(split) for name, split in data.splits.items()},
        inputs=resolve_inputs(data.samples, root, data),
        metrics=metrics,
        best_metric=best_metric(root, data, metrics),
        class_weights=class_weights(task, data, train),
        target_mean=mean,
        target_std=std,
        eval_batch_size=root.dataloading.eval_batch_size or root.dataloading.batch_size,
        number_names=data.number_names,
        encoder_facts=file_facts(root.model.encoder),
    )


def data_taken(spec: BaseData, data: Data) -> dict[str, Any]:
    """What reading a data set takes where its section leaves it open, beside what `Resolved` has:
    files by default, the processes that prepare volumes, whether samples come in groups."""
    taken = spec.paths_taken()
    if isinstance(spec, VolumeData):
        taken["preparation"]["workers"] = spec.preparation.processes(cores())
    return {**taken, "has_groups": any(s.groups is not None for s in data.splits.values())}


def check_task(task: LabelTask, data: Data) -> None:
    """The rules of the task, for data that alone tell what their targets and samples are.

    Raises:
        UserError: a metric or an option that has no meaning here, or class weights that do not fit
            the classes.
    """
    if data.subtask == "framewise" and any(s.frames is None for s in data.splits.values()):
        raise UserError(
            f"data set {data.name}: targets are framewise, but its splits do not tell which frames"
            " of which videos their clips are: give each a glovita_lib.data.VideoFrames as `frames`"
        )
    problems = [*task.target_problems(data.subtask)]
    if not problems and not data.has_order:
        problems += task.order_problems(listed(data.class_names))
    problems += task.sample_problems(data.samples.kind)
    if data.subtask != "regression":
        names = data.class_names
        problems += task.class_count_problems(len(names), f"the data ({listed(names)})")
        if isinstance(task, Framewise):
            problems += task.class_name_problems(names)
    refuse("task", problems)


def best_metric(root: Root, data: Data, metrics: tuple[str, ...]) -> str | None:
    """Logged name, with its val_ prefix, of the metric that picks the best checkpoint."""
    if not len(data.splits.get("val") or ()):
        if root.mode == "train":
            refuse("training", root.training.without_val(data.name))
        return None
    names = data.class_names
    logged = [f"val_{name}" for name in logged_names(metrics, names)]
    asked = root.training.best_checkpoint_metric or logged[0]
    check_logged(asked, ["val_loss", *logged], subtask=data.subtask, class_names=names)
    return asked


def class_weights(task: LabelTask, data: Data, train: Split | None) -> tuple[float, ...] | None:
    """Weights per class; balanced ones are N / (K n_k), those of scikit-learn, of the K classes
    that occur in train, so that their mean over the train samples is 1; none without labels, from
    which nothing is learnt.

    A class without train samples gets weight 1. Multilabel: n_k counts positive labels. Framewise:
    N and n_k count labelled frames.
    """
    if task.class_weights is None:
        return None
    classes = len(data.class_names)
    if task.class_weights != "balanced":
        return task.class_weights
    if train is None or train.targets is None:
        return None
    if data.subtask == "multilabel":
        total = (counts := train.targets.sum(0)).sum()
    else:
        labels = train.targets if train.frames is None else train.frames.all_labels()
        counts = np.bincount(labels, minlength=classes)
        total = len(labels)
    occur = counts > 0
    weights = np.where(occur, total / (occur.sum() * np.maximum(counts, 1)), 1.0)
    return tuple(float(w) for w in weights)


def target_scale(
    task: LabelTask, data: Data, train: Split | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (K,) that regression targets are standardised with; 0 and 1 for
    the rest, and without labels.

    Raises:
        UserError: targets too large for the float32 that a model calculates with.
    """
    outputs = len(data.class_names)
    scale = Standardizer(np.zeros(outputs), np.ones(outputs))
    if train is None or train.targets is None or data.subtask != "regression":
        return tuple(scale.mean.tolist()), tuple(scale.std.tolist())
    standardized = isinstance(task, Supervised) and task.standardize_targets
    if standardized:
        scale = Standardizer.of_array(train.targets)
    for name, split in data.splits.items():
        if split.targets is not None and not np.isfinite(scale.standardized(split.targets)).all():
            raise UserError(
                f"the targets of {name} reach {np.abs(split.targets).max():g}, too large for the"
                " float32 of a model: give them in another unit"
                + ("" if standardized else ", or set task.standardize_targets = true")
            )
    return tuple(scale.mean.tolist()), tuple(scale.std.tolist())
