"""The table of metrics: what each is called, which subtasks it serves, which way is better.

A metric has one name: in task.metrics, in metrics.jsonl and training.best_checkpoint_metric with
its split in front (val_acc), in metrics_<split>.json and summary.json without. To add a metric,
add its entry here and its formula, registered under the same name, in metrics_classification,
metrics_segments or metrics. Neither torch nor numpy is imported: the spec checker needs this table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from glovita_lib.errors import UserError, listed, nearest_word

CLASSES = ("multiclass", "multilabel")
COUNTED = (*CLASSES, "framewise")  # what is said by hits, predictions and labels of the classes
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Metric:
    """What a spec, a log and a plot need to know of a metric."""

    title: str
    """As people write it, over plots."""
    subtasks: tuple[str, ...]
    """Kinds of targets that it is defined for."""
    usual: bool = False
    """Whether it is computed where task.metrics is not given."""
    lower_is_better: bool = False
    """Whether the smallest value is the best."""
    ordered: bool = False
    """Whether the order of the classes is its scale."""
    per_class: bool = False
    """Whether each class or target has its own value, logged as <name>_<class>."""
    over_classes: tuple[str, ...] = ()
    """Kinds of targets for which it is a mean over the classes, or of one of them, however few
    samples it has."""
    shifts: bool = False
    """Whether samples that are there several times shift it."""


METRICS: dict[str, Metric] = {
    "acc": Metric("accuracy", COUNTED, usual=True),
    "balanced_acc": Metric("balanced accuracy", COUNTED, over_classes=COUNTED),
    "f1": Metric("F1", COUNTED, usual=True, over_classes=COUNTED, shifts=True),
    "f1_per_class": Metric("F1 per class", COUNTED, per_class=True, over_classes=COUNTED),
    "precision": Metric("precision", COUNTED, over_classes=COUNTED, shifts=True),
    "recall": Metric("recall", COUNTED, over_classes=COUNTED),
    "top5acc": Metric("top-5 accuracy", ("multiclass",)),
    "auroc": Metric("AUROC", CLASSES, over_classes=CLASSES),
    "ap": Metric("average precision", CLASSES, over_classes=CLASSES, shifts=True),
    "mcc": Metric("MCC", COUNTED, over_classes=("multilabel",)),
    "kappa": Metric("Cohen's kappa", COUNTED, over_classes=("multilabel",)),
    "quadratic_kappa": Metric("quadratic kappa", ("multiclass",), ordered=True),
    "ece": Metric("calibration error", CLASSES, lower_is_better=True, shifts=True),
    "brier": Metric("Brier score", CLASSES, lower_is_better=True),
    "edit": Metric("edit score", ("framewise",), usual=True),
    "f1_at_10": Metric("F1@10", ("framewise",), usual=True),
    "f1_at_25": Metric("F1@25", ("framewise",), usual=True),
    "f1_at_50": Metric("F1@50", ("framewise",), usual=True),
    "mse": Metric("MSE", ("regression",), usual=True, lower_is_better=True),
    "mae": Metric("MAE", ("regression",), usual=True, lower_is_better=True),
    "r2": Metric("R²", ("regression",), usual=True),
    "pearson": Metric("Pearson correlation", ("regression",)),
    "spearman": Metric("Spearman correlation", ("regression",)),
}
"""Name in a spec, in a log and in a file -> the metric."""


CALLED = {
    "accuracy": "acc",
    "top1": "acc",
    "top1acc": "acc",
    "balanced_accuracy": "balanced_acc",
    "bacc": "balanced_acc",
    "auc": "auroc",
    "roc_auc": "auroc",
    "auprc": "ap",
    "average_precision": "ap",
    "macro_f1": "f1",
    "f1_macro": "f1",
    "sensitivity": "recall",
    "qwk": "quadratic_kappa",
    "r2_score": "r2",
}
"""What metrics are called elsewhere."""


def metrics_of(subtask: str) -> tuple[str, ...]:
    """Names of the metrics that are defined for a subtask."""
    return tuple(name for name, metric in METRICS.items() if subtask in metric.subtasks)


def uses_order(metrics: Iterable[str]) -> bool:
    """Whether one of the metrics goes by the order of the classes."""
    return any(METRICS[name].ordered for name in metrics)


def usual_metrics(subtask: str) -> tuple[str, ...]:
    """What `task.metrics = none` stands for."""
    return tuple(name for name in metrics_of(subtask) if METRICS[name].usual)


def usual_metrics_text() -> str:
    """The usual metrics of every subtask, for help texts: acc, f1 (multiclass); mse ..."""
    subtasks = dict.fromkeys(name for metric in METRICS.values() for name in metric.subtasks)
    return "; ".join(f"{', '.join(usual_metrics(name))} ({name})" for name in subtasks)


if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Annotated[Literal[tuple(METRICS)], Meta(extra={"called": CALLED})]
MetricNames = Annotated[tuple[MetricName, ...], Meta(extra={"none_is": usual_metrics_text()})]
"""Type of task.metrics."""


def logged_names(metrics: Iterable[str], class_names: Iterable[str] | None) -> tuple[str, ...]:
    """Names under which `metrics` are logged, without their split; * stands where no classes are
    given.

    >>> logged_names(["acc", "f1_per_class"], ["cat", "dog"])
    ('acc', 'f1_per_class_cat', 'f1_per_class_dog')
    """
    classes = ("*",) if class_names is None else tuple(class_names)
    names: list[str] = []
    for metric in metrics:
        own = METRICS[metric].per_class
        names += [f"{metric}_{name}" for name in classes] if own else [metric]
    return tuple(dict.fromkeys(names))


def split_name(name: str) -> tuple[str | None, str]:
    """Split and rest of a logged name: val_f1 -> (val, f1), f1 -> (None, f1)."""
    head, _, rest = name.partition("_")
    return (head, rest) if head in SPLITS and rest else (None, name)


def metric_name(logged: str) -> str:
    """Name of the metric that a logged name is a value of; loss and what is no metric stay.

    >>> metric_name("val_acc"), metric_name("val_f1_per_class_cat"), metric_name("train_loss")
    ('acc', 'f1_per_class', 'loss')
    """
    name = split_name(logged)[1]
    if name in METRICS:
        return name
    families = (key for key, metric in METRICS.items() if metric.per_class)
    return next((key for key in families if name.startswith(f"{key}_")), name)


def title_of(name: str) -> str:
    """A metric, by its name, as people write it."""
    return METRICS[name].title if name in METRICS else name.replace("_", " ")


def lower_is_better(logged: str) -> bool:
    """Whether small values of a logged name are good; the split in front does not matter.

    >>> lower_is_better("val_mse"), lower_is_better("val_f1"), lower_is_better("val_loss")
    (True, False, True)
    """
    name = metric_name(logged)
    return name == "loss" or (name in METRICS and METRICS[name].lower_is_better)


def check_logged(
    name: str,
    available: Iterable[str],
    *,
    subtask: str = "multiclass",
    class_names: Sequence[str] | None = None,
) -> None:
    """Refuse a name that is not logged; an available name that ends in * stands for any class.

    Args:
        subtask: kind of target, whose metrics may be added.
        class_names: where they are known.

    Raises:
        UserError: what is logged, and what may be meant.
    """
    available = tuple(available)
    families = [entry[:-1] for entry in available if entry.endswith("*")]
    if name in available or any(name.startswith(start) and name != start for start in families):
        return
    meant = spelled(split_name(name)[1])
    for metric in metrics_of(subtask):
        refuse_class(name, metric, available, class_names)
    called = CALLED.get(meant.replace(" ", "_"))
    for metric, entry in METRICS.items():
        if metric == called or meant in (spelled(metric), spelled(entry.title)):
            logged = [found for found in available if metric_name(found) == metric]
            if logged:
                raise UserError(f'no metric is logged as "{name}"; did you mean {listed(logged)}?')
            raise UserError(f'"{name}" is not computed: add "{metric}" to task.metrics')
    by_rest = {split_name(entry)[1]: entry for entry in available}
    near = nearest_word(split_name(name)[1], by_rest, 0.5)
    hint = f"; did you mean {by_rest[near]}?" if near else ""
    raise UserError(f'no metric is logged as "{name}"; there are {listed(available, 20)}{hint}')


def refuse_class(
    name: str, metric: str, available: Sequence[str], class_names: Sequence[str] | None
) -> None:
    """Refuse a name that means the value of a class: GloViTa's F1_class_0 is val_f1_per_class_ and
    the name of the first class.

    Raises:
        UserError: what is meant.
    """
    text = split_name(name)[1]
    own = f"{spelled(metric)} "
    starts = (own, own.replace(" per class", " class")) if METRICS[metric].per_class else ()
    start = next((start for start in starts if spelled(text).startswith(start)), None)
    if start is None or len(text) == len(start) or f"val_{text}" in available:
        return
    is_there = any(metric_name(found) == metric for found in available)
    add = "" if is_there else f' and add "{metric}" to task.metrics'
    meant = class_meant(text[len(start) :], class_names, is_name=start == own)
    if meant is None:
        names = listed(class_names or (), 8)
        raise UserError(f'no metric is logged as "{name}": the classes are {names}')
    ours = f"val_{metric}_{meant}"
    if ours == name:
        raise UserError(f'"{name}" is not computed: add "{metric}" to task.metrics')
    raise UserError(f'no metric is logged as "{name}"; set it to "{ours}"{add}')


def class_meant(text: str, class_names: Sequence[str] | None, *, is_name: bool) -> str | None:
    """The class that the end of a name means, by its name or its place; None where there is none.

    Args:
        is_name: whether a number is a name, where names are not known; else it is a place.
    """
    if class_names is None:
        return text if is_name or not text.isdecimal() else "<class name>"
    if text in class_names:
        return text
    is_place = text.isdecimal() and int(text) < len(class_names)
    return class_names[int(text)] if is_place else None


def spelled(text: str) -> str:
    """A name or a title without case and with spaces: F1_per_class -> f1 per class."""
    return text.lower().replace("_", " ")
