"""Rules between the sections of a spec, checked before any data is read.

A rule yields one line for each mistake, opened by the key to change. What only the data or the
built model can tell (classes that are there, tokens that an encoder has) is checked by them.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence

from glovita_lib import spec_rules
from glovita_lib.errors import UserError
from glovita_lib.metric_names import check_logged, logged_names, metrics_of, usual_metrics
from glovita_lib.spec import Loaded, load_spec
from glovita_lib.spec_errors import one_of, shown
from glovita_lib.spec_model import (
    ClamHead,
    RegressionHead,
    TimmEncoder,
    TorchvisionEncoder,
    TransmilHead,
)
from glovita_lib.spec_root import Root
from glovita_lib.spec_rules import ignored_options, is_regression, umap_options
from glovita_lib.spec_train import Probe, Supervised

WITHOUT_CLASS_TOKEN = (
    r"(wide_)?res(net|nex)t?|seresnet|convnext|vgg|(tf_)?efficientnet|(tf_)?mobilenet|densenet"
    r"|regnet|swin|alexnet|squeezenet|googlenet|inception|mnasnet|shufflenet"
)
"""Opening of the names of encoders of timm and torchvision that have no class token."""
SET_ELSEWHERE = {
    "pretrained": "model.encoder.pretrained",
    "in_chans": "model.encoder.input_channels",
    "num_classes": "the data",
    "checkpoint_path": "model.encoder.weights",
    "weights": "model.encoder.weights",
    "dropout": "model.encoder.dropout",
    "stochastic_depth_prob": "model.encoder.stochastic_depth_prob",
}
"""Keys of model_kwargs that have, or follow from, a key of their own."""


def load_checked(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Loaded:
    """A spec that is free of mistakes in its keys and between its sections.

    Raises:
        UserError: one line for each mistake.
    """
    loaded = load_spec(path, overrides, Root)
    if problems := check(loaded.root):
        raise UserError("\n".join(f"{loaded.path}: {problem}" for problem in problems))
    return loaded


def check_files(paths: Sequence[str], overrides: Sequence[str]) -> int:
    """Check all specs and print a line for each good one; 2 if any has a mistake, else 0."""
    code = 0
    for path in paths:
        try:
            load_checked(path, overrides)
            print(f"{path}: ok")
        except UserError as error:
            print(error, file=sys.stderr)
            code = 2
    return code


def check(root: Root) -> list[str]:
    """All contradictions of a spec, one line each; empty if it holds together."""
    rules = (
        run_name,
        *spec_rules.DATA_RULES,
        *spec_rules.PEFT_RULES,
        head_fits_targets,
        head_size,
        instances_have_classes,
        heads_share_hidden,
        metrics_exist,
        metrics_fit_targets,
        probes_have_choices,
        features_are_not_mixed,
        best_metric_is_logged,
        class_weights_fit,
        classification_only_options,
        features_have_their_encoder,
        encoder_channels,
        normalisation_fits_channels,
        encoder_arguments,
        pooling_is_possible,
        custom_targets,
        warmup_fits,
        rates_fit,
        nesterov_needs_momentum,
        infer_source,
        infer_folds,
        extract_source,
        umap_options,
        ignored_options,
    )
    return [line for rule in rules for line in rule(root)]


def run_name(root: Root) -> Iterator[str]:
    """The name becomes a directory."""
    name = root.name
    if name is not None and (not name.strip(" .") or re.search(r'[/\\:*?"<>|\x00-\x1f]', name)):
        yield f"name: {shown(name)} cannot name a directory: use letters, digits and . , = + - _"


# ------------------------------------------------------------------ head and metrics


def head_fits_targets(root: Root) -> Iterator[str]:
    """Classes need a classification head, numbers a regression head."""
    subtask, head = root.data.stated_subtask(), root.model.head
    if subtask == "regression" and "numbers" not in head.predicts:
        yield (
            'model.head.head_type: "classification" cannot predict the numbers of data.subtask ='
            ' "regression": set it to "regression"'
        )
    if subtask in ("multiclass", "multilabel") and "classes" not in head.predicts:
        yield (
            f'model.head.head_type: "regression" cannot predict {subtask} labels: set it to'
            ' "classification", or data.subtask to "regression" where the data are numbers'
        )


def head_size(root: Root) -> Iterator[str]:
    """A stated number of outputs agrees with the stated number of targets."""
    head, stated = root.model.head, root.data.stated_outputs()
    if isinstance(head, RegressionHead) and head.out_dim and stated:
        key, count = stated[0]
        if head.out_dim != count:
            yield f"model.head.out_dim: {head.out_dim} outputs, but {key} says {count} targets"


def instances_have_classes(root: Root) -> Iterator[str]:
    """Instances are labelled by the class of their bag."""
    head = root.model.head
    if isinstance(head, ClamHead) and head.instance_eval and is_regression(root):
        yield "model.head.instance_eval: true needs classes, and this is a regression: drop it"


def heads_share_hidden(root: Root) -> Iterator[str]:
    """Attention heads have equally many features."""
    head = root.model.head
    if isinstance(head, TransmilHead) and head.hidden % head.heads:
        yield (
            f"model.head.heads: {head.heads} heads cannot share model.head.hidden = {head.hidden}"
            " features: it must divide them"
        )


def metrics_exist(root: Root) -> Iterator[str]:
    """At least one metric, each once."""
    metrics = getattr(root.task, "metrics", None)
    if metrics == ():
        yield "task.metrics: [] names none: leave it out for the usual ones, or name one at least"
    for name in dict.fromkeys(metrics or ()):
        if metrics.count(name) > 1:
            yield f"task.metrics: {shown(name)} is named {metrics.count(name)} times: name it once"


def metrics_fit_targets(root: Root) -> Iterator[str]:
    """Each metric is defined for the kind of targets."""
    subtask = root.data.stated_subtask()
    for name in dict.fromkeys(getattr(root.task, "metrics", None) or ()):
        if subtask and name not in metrics_of(subtask):
            valid = ", ".join(metrics_of(subtask))
            yield f"task.metrics: {shown(name)} is not defined for {subtask}; valid are {valid}"


def probes_have_choices(root: Root) -> Iterator[str]:
    """Probes choose between something."""
    if isinstance(root.task, Probe):
        for name in ("methods", "k", "l2"):
            if not getattr(root.task, name):
                yield f"task.{name}: [] names none: leave it out for the usual ones, or name one"


def features_are_not_mixed(root: Root) -> Iterator[str]:
    """Mixup and CutMix mix images."""
    if root.data.samples == "features" and isinstance(root.task, Supervised):
        mixing = {"mixup": root.task.mixup, "cutmix": root.task.cutmix}
        for name in (name for name, value in mixing.items() if value):
            yield f"task.{name}: it mixes images, and the samples are features: drop it"


def best_metric_is_logged(root: Root) -> Iterator[str]:
    """The metric that picks best.pt is the loss or one of task.metrics."""
    asked = root.training.best_checkpoint_metric
    if asked is None or not isinstance(root.task, Supervised):
        return
    kind = root.data.stated_subtask() or ("regression" if is_regression(root) else "multiclass")
    names = logged_names(root.task.metrics or usual_metrics(kind), known_class_names(root))
    try:
        check_logged(asked, ["val_loss", *(f"val_{name}" for name in names)])
    except UserError as error:
        yield f"training.best_checkpoint_metric: {error}"


def known_class_names(root: Root) -> tuple[str, ...] | None:
    """Class names that the spec states."""
    return getattr(root.data, "class_names", None)


def class_weights_fit(root: Root) -> Iterator[str]:
    """One weight a class, where the spec says how many classes there are."""
    weights = getattr(root.task, "class_weights", None)
    stated = root.data.stated_outputs()
    if is_regression(root) or not isinstance(weights, tuple) or not stated:
        return
    if len(weights) != stated[0][1]:
        key, count = stated[0]
        yield f"task.class_weights: {len(weights)} numbers, but {key} says {count} classes"


def classification_only_options(root: Root) -> Iterator[str]:
    """What blends or weights classes has no meaning for numbers."""
    task = root.task
    if not isinstance(task, Supervised) or not is_regression(root):
        return
    asked = {
        "mixup": task.mixup,
        "cutmix": task.cutmix,
        "label_smoothing": task.label_smoothing,
        "class_weights": task.class_weights,
    }
    for name in (name for name, value in asked.items() if value):
        yield f"task.{name}: {shown(asked[name])} is for classes, and this is a regression: drop it"


# ------------------------------------------------------------------ encoder


def features_have_their_encoder(root: Root) -> Iterator[str]:
    """Features pass by the encoder, images do not."""
    samples, takes = root.data.samples, root.model.encoder.takes
    if samples == "features" and takes != "features":
        yield (
            'model.encoder.encoder_type: data.dataset = "precomputed_features" are features'
            ' already: set it to "precomputed"'
        )
    if takes == "features" and samples == "images":
        yield (
            'model.encoder.encoder_type: "precomputed" takes features: set data.dataset to'
            ' "precomputed_features", or name an encoder for images, e.g. "timm"'
        )


def encoder_channels(root: Root) -> Iterator[str]:
    """The encoder takes the channels that the data have."""
    asked, channels = input_channels(root), root.data.stated_channels()
    if asked and channels and asked != channels:
        yield (
            f"model.encoder.input_channels: {asked}, but the images have {channels} channels:"
            " leave it out"
        )


def input_channels(root: Root) -> int | None:
    """Channels that the encoder section states."""
    return getattr(root.model.encoder, "input_channels", None)


def normalisation_fits_channels(root: Root) -> Iterator[str]:
    """Mean and std have a number for each channel."""
    augmentation = getattr(root.data, "augmentation", None)
    if augmentation is None:
        return
    channels = root.data.stated_channels() or input_channels(root)
    for name in ("mean", "std"):
        numbers = getattr(augmentation, name, None)
        if numbers is not None and channels and len(numbers) != channels:
            yield (
                f"data.augmentation.{name}: {len(numbers)} numbers, but the images have"
                f" {channels} channels: give one a channel"
            )


def encoder_arguments(root: Root) -> Iterator[str]:
    """model_kwargs leave alone what has a key of its own."""
    encoder = root.model.encoder
    for name in getattr(encoder, "model_kwargs", ()):
        if name in encoder.own_arguments:
            yield (
                f"model.encoder.model_kwargs.{name}: it comes from {SET_ELSEWHERE[name]}:"
                " set it there"
            )


def pooling_is_possible(root: Root) -> Iterator[str]:
    """No class token is pooled where the encoder's name says that there is none."""
    encoder, method = root.model.encoder, root.model.feature_aggregation_method
    if method not in ("cls_token", "joint") or not isinstance(
        encoder, TimmEncoder | TorchvisionEncoder
    ):
        return
    if re.match(WITHOUT_CLASS_TOKEN, encoder.type):
        yield (
            f"model.feature_aggregation_method: {shown(method)} needs a class token, which"
            f' {encoder.type} does not have: use "avg", or leave it out'
        )


def custom_targets(root: Root) -> Iterator[str]:
    """A function is named as package.module:function."""
    sections = {
        "data": root.data,
        "model.encoder": root.model.encoder,
        "model.head": root.model.head,
        "peft": root.peft,
    }
    for key, section in sections.items():
        target = getattr(section, "target", None)
        if isinstance(target, str) and not re.fullmatch(r"\w+(\.\w+)*:\w+", target):
            yield f'{key}.target: {shown(target)} must read "package.module:function"'


# ------------------------------------------------------------------ training


def warmup_fits(root: Root) -> Iterator[str]:
    """The warm-up ends within the training."""
    warmup, epochs = root.optimizer.warmup_epochs, root.training.epochs
    if warmup is not None and warmup > epochs:
        yield (
            f"optimizer.warmup_epochs: {warmup:g} is longer than the training"
            f" (training.epochs = {epochs}): at most {epochs}"
        )


def rates_fit(root: Root) -> Iterator[str]:
    """The last learning rate is not above the first."""
    if root.optimizer.min_lr > root.optimizer.lr:
        yield (
            f"optimizer.min_lr: {root.optimizer.min_lr:g} is above optimizer.lr ="
            f" {root.optimizer.lr:g}"
        )


def nesterov_needs_momentum(root: Root) -> Iterator[str]:
    """Nesterov's step uses the momentum."""
    optimizer = root.optimizer
    if optimizer.nesterov and optimizer.name == "SGD" and optimizer.momentum == 0:
        yield "optimizer.nesterov: true needs optimizer.momentum above 0, e.g. 0.9"


# ------------------------------------------------------------------ infer


def infer_source(root: Root) -> Iterator[str]:
    """One source of weights and one of samples."""
    infer = root.infer
    if infer.checkpoint is not None and infer.folds is not None:
        yield "infer.folds: the folds of this spec's own run, but infer.checkpoint is set: drop one"
    if infer.input is not None and infer.split is not None:
        yield f"infer.split: {shown(infer.split)} is replaced by infer.input: drop one of them"
    if infer.checkpoint == ():
        yield "infer.checkpoint: [] names none: leave it out for this spec's own run"


def extract_source(root: Root) -> Iterator[str]:
    """One source of weights; bags are made of vectors."""
    extract = root.extract
    if extract.checkpoint is not None and extract.source == "encoder":
        yield (
            'extract.source: "encoder" is the model of the spec, but extract.checkpoint is set:'
            " drop one of them"
        )
    if extract.bag_by is not None and extract.output != "embedding":
        yield (
            f"extract.bag_by: bags are made of one vector a sample, not of"
            f' {shown(extract.output)}: set extract.output = "embedding"'
        )


def infer_folds(root: Root) -> Iterator[str]:
    """The folds of an ensemble exist, each once."""
    folds = root.infer.folds
    if folds is None:
        return
    if not folds:
        yield "infer.folds: [] names none: leave it out for data.fold alone"
    if len(set(folds)) < len(folds):
        yield f"infer.folds: {shown(folds)} names a fold twice"
    count = root.data.stated_folds()
    unknown = [fold for fold in folds if count is not None and fold >= count]
    if unknown:
        known = one_of(range(count))
        yield f"infer.folds: {shown(unknown)} do not exist: this data has the folds {known}"
