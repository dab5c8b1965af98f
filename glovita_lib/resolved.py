"""Values derived at run time from the spec, the data and the encoder: in one place, saved with
every checkpoint.

K classes or targets.
"""

from typing import Literal

import numpy as np

from glovita_lib.augment import ResolvedImageAugmentation
from glovita_lib.data import Data, Split
from glovita_lib.errors import UserError
from glovita_lib.metric_names import check_logged, logged_names, metrics_of, usual_metrics
from glovita_lib.read_features import BagSource, VectorSource, feature_moments
from glovita_lib.spec import Spec
from glovita_lib.spec_data import PrecomputedData, Subtask
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Supervised


class Resolved(Spec):
    """What resolved_config.json shows and a checkpoint carries."""

    dataset: str
    """Tag of the data set."""
    subtask: Subtask
    """Kind of target."""
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression, in the order of the outputs."""
    kind: Literal["images", "vectors", "bags"]
    """What a sample is."""
    channels: int
    """Channels of an image, or width of a feature."""
    bit_depth: int
    """Bits per channel, 8 or 16."""
    samples: dict[str, int]
    """Number of samples per split."""
    augmentation: ResolvedImageAugmentation | None
    """Policies with all their parameters, sizes, mean and std; none for precomputed features."""
    feature_mean: tuple[float, ...] | None
    """Mean of each precomputed feature over the train split, where they are standardised."""
    feature_std: tuple[float, ...] | None
    """Standard deviation of each feature, likewise."""
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


def resolve_run(root: Root, data: Data, augmentation: ResolvedImageAugmentation | None) -> Resolved:
    """All resolved values of a training run.

    Raises:
        UserError: no train split, targets that do not vary, class weights that do not fit the
            classes, or options that have no meaning for these targets or samples.
    """
    train = data.splits.get("train")
    if train is None or not len(train):
        raise UserError(f"data set {data.name}: the train split is empty")
    check_metrics(root.task.metrics, data.subtask)
    check_options(root.task, data.subtask, modality_of(train))
    metrics = root.task.metrics or usual_metrics(data.subtask)
    moments = None
    if isinstance(root.data, PrecomputedData) and root.data.standardize:
        moments = feature_moments(train.source)
    mean, std = target_scale(root.task, data, train)
    return Resolved(
        dataset=data.name,
        subtask=data.subtask,
        class_names=data.class_names,
        kind=modality_of(train),
        channels=data.channels,
        bit_depth=data.bit_depth,
        samples={name: len(split) for name, split in data.splits.items()},
        augmentation=augmentation,
        feature_mean=None if moments is None else tuple(moments[0].tolist()),
        feature_std=None if moments is None else tuple(moments[1].tolist()),
        metrics=metrics,
        best_metric=best_metric(root, data, metrics),
        class_weights=class_weights(root.task, data, train),
        target_mean=mean,
        target_std=std,
        eval_batch_size=root.dataloading.eval_batch_size or root.dataloading.batch_size,
    )


def modality_of(split: Split) -> str:
    """What a sample of a split is."""
    if isinstance(split.source, BagSource):
        return "bags"
    return "vectors" if isinstance(split.source, VectorSource) else "images"


def check_metrics(metrics: tuple[str, ...] | None, subtask: str) -> None:
    """The spec's rule again, for data that alone tell what their targets are.

    Raises:
        UserError: a metric that is not defined for the subtask.
    """
    for name in metrics or ():
        if name not in metrics_of(subtask):
            raise UserError(
                f'task.metrics: "{name}" is not defined for {subtask}, which the data are; valid'
                f" are {', '.join(metrics_of(subtask))}"
            )


def check_options(task: Supervised, subtask: str, kind: str) -> None:
    """Mixing is for images, and with weights and smoothing for classes.

    Raises:
        UserError: an option that has no meaning here.
    """
    mixing = {"mixup": task.mixup, "cutmix": task.cutmix}
    softening = {"label_smoothing": task.label_smoothing, "class_weights": task.class_weights}
    if subtask == "regression":
        for name in (name for name, value in (mixing | softening).items() if value):
            raise UserError(f"task.{name} is for classes, and the data are a regression: drop it")
    if kind != "images":
        for name in (name for name, value in mixing.items() if value):
            raise UserError(f"task.{name} mixes images, and the samples are {kind}: drop it")


def best_metric(root: Root, data: Data, metrics: tuple[str, ...]) -> str | None:
    """Logged name, with its val_ prefix, of the metric that picks the best checkpoint."""
    if not len(data.splits.get("val") or ()):
        return None
    logged = [f"val_{name}" for name in logged_names(metrics, data.class_names)]
    asked = root.training.best_checkpoint_metric or logged[0]
    check_logged(asked, ["val_loss", *logged])
    return asked


def class_weights(task: Supervised, data: Data, train: Split) -> tuple[float, ...] | None:
    """Weights per class; balanced ones are N / (K n_k), so that their mean over the train samples
    is 1.

    A class without samples gets weight 1. Multilabel: n_k counts positive labels.
    """
    if task.class_weights is None:
        return None
    classes = len(data.class_names)
    if task.class_weights != "balanced":
        if len(task.class_weights) != classes:
            raise UserError(
                f"task.class_weights has {len(task.class_weights)} numbers, the data {classes}"
                f" classes ({', '.join(data.class_names)}): give one number a class"
            )
        return task.class_weights
    if data.subtask == "multilabel":
        counts = train.targets.sum(0)
        total = counts.sum()
    else:
        counts = np.bincount(train.targets, minlength=classes)
        total = len(train)
    weights = np.where(counts > 0, total / (classes * np.maximum(counts, 1)), 1.0)
    return tuple(float(w) for w in weights)


def target_scale(
    task: Supervised, data: Data, train: Split
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (K,) that regression targets are standardised with; 0 and 1 for
    the rest."""
    outputs = len(data.class_names)
    if data.subtask != "regression" or not task.standardize_targets:
        return (0.0,) * outputs, (1.0,) * outputs
    targets = train.targets.astype(np.float64)
    std = targets.std(0)
    std = np.where(std > 0, std, 1.0)  # a constant target is learnt as its mean
    return tuple(map(float, targets.mean(0))), tuple(map(float, std))
