"""Names of the metrics: as written in a spec, as logged, which tasks they serve, which way is
better.

Neither torch nor numpy is imported: the spec checker needs these tables.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from glovita_lib.errors import UserError

LOGGED_NAMES: dict[str, tuple[str, ...]] = {
    "acc": ("Accuracy",),
    "balanced_acc": ("Balanced_Accuracy",),
    "f1": ("F1",),
    "f1_per_class": ("F1_*",),
    "pr": ("Precision", "Recall"),
    "top5acc": ("Accuracy_top5",),
    "auroc": ("AUROC",),
    "ap": ("AP",),
    "mcc": ("MCC",),
    "kappa": ("Kappa",),
    "quadratic_kappa": ("QWK",),
    "ece": ("ECE",),
    "brier": ("Brier",),
    "mse": ("MSE",),
    "mae": ("MAE",),
    "r2": ("R2",),
    "pearson": ("Pearson",),
    "spearman": ("Spearman",),
}
"""Name in `task.metrics` -> names it is logged under; * stands for the name of each class."""
REGRESSION = ("mse", "mae", "r2", "pearson", "spearman")
MULTICLASS = tuple(name for name in LOGGED_NAMES if name not in REGRESSION)
MULTILABEL = tuple(name for name in MULTICLASS if name not in ("top5acc", "quadratic_kappa"))
METRICS_OF: dict[str, tuple[str, ...]] = {
    "multiclass": MULTICLASS,
    "multilabel": MULTILABEL,
    "regression": REGRESSION,
}
"""Subtask -> the names in `task.metrics` that are defined for it."""
DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "multiclass": ("acc", "f1"),
    "multilabel": ("acc", "f1"),
    "regression": ("mse", "mae", "r2"),
}
"""Subtask -> what `task.metrics = none` stands for."""
LOWER_IS_BETTER = frozenset({"loss", "MSE", "MAE", "ECE", "Brier"})
"""Logged names, without their split, of which the smallest value is the best."""
SPLITS = ("val", "train", "test")  # in the order in which a name without a split is looked up


def logged_names(metrics: Iterable[str], class_names: Iterable[str] | None) -> tuple[str, ...]:
    """Names under which `metrics` are logged, without their split; * stays where no classes are
    given.

    >>> logged_names(["acc", "f1_per_class"], ["cat", "dog"])
    ('Accuracy', 'F1_cat', 'F1_dog')
    """
    names: list[str] = []
    classes = ("*",) if class_names is None else tuple(class_names)
    for metric in metrics:
        for logged in LOGGED_NAMES[metric]:
            expanded = classes if logged.endswith("*") else ("",)
            names += [logged.removesuffix("*") + name for name in expanded]
    return tuple(dict.fromkeys(names))


def split_name(name: str) -> tuple[str | None, str]:
    """Split and rest of a logged name: val_F1 -> (val, F1), F1 -> (None, F1)."""
    head, _, rest = name.partition("_")
    return (head, rest) if head in SPLITS and rest else (None, name)


def lower_is_better(logged_name: str) -> bool:
    """Whether small values of a logged metric are good; the split in front does not matter.

    >>> lower_is_better("val_MSE"), lower_is_better("val_F1"), lower_is_better("val_loss")
    (True, False, True)
    """
    return split_name(logged_name)[1] in LOWER_IS_BETTER


def canonical_metric(name: str, available: Iterable[str]) -> str:
    """The entry of `available` that a user means: a logged name, with or without split, or a short
    name.

    A name without a split means the val split. An available F1_* stands for any class.

    >>> canonical("f1", ["val_loss", "val_Accuracy", "val_F1"])
    'val_F1'

    Raises:
        UserError: if nothing fits, or several do (pr is both Precision and Recall).
    """
    available = tuple(available)
    split, wanted = split_name(name)
    candidates = [entry for entry in available if split in (None, split_name(entry)[0] or "val")]
    if split is None:
        order = {prefix: rank for rank, prefix in enumerate(SPLITS)}
        candidates.sort(key=lambda entry: order[split_name(entry)[0] or "val"])
    found = matches(wanted, candidates)
    if len(found) == 1:
        return found[0]
    raise UserError(no_such_metric(name, available, found))


def matches(wanted: str, candidates: list[str]) -> list[str]:
    """Entries that `wanted` names: the exact one, else by short name, else whatever the case."""
    by_rest: dict[str, str] = {}
    for entry in candidates:  # the first split wins
        by_rest.setdefault(split_name(entry)[1], entry)
    if wanted in by_rest:
        return [by_rest[wanted]]
    for rest, entry in by_rest.items():
        if rest.endswith("*") and wanted.startswith(rest[:-1]) and len(wanted) >= len(rest):
            return [entry[:-1] + wanted[len(rest) - 1 :]]
    logged = LOGGED_NAMES.get(wanted.lower(), ())
    prefixes = tuple(name[:-1] for name in logged if name.endswith("*"))
    short = [
        entry
        for rest, entry in by_rest.items()
        if rest in logged or (prefixes and rest.startswith(prefixes))
    ]
    return short or [e for rest, e in by_rest.items() if rest.lower() == wanted.lower()]


def no_such_metric(name: str, available: tuple[str, ...], found: list[str]) -> str:
    """The line that says which metrics there are and which one may be meant."""
    if found:
        return f"metric {name!r} has several values, name one of them: {listed(found)}"
    rest = split_name(name)[1].lower()
    for short, logged in LOGGED_NAMES.items():
        known = rest == short or rest in (entry.lower() for entry in logged)
        if known and split_name(name)[0] in (None, "val"):
            return f"metric {name!r} is not computed; add {short!r} to task.metrics"
    spelled = {split_name(entry)[1].lower(): entry for entry in reversed(available)}
    spelled |= {entry.lower(): entry for entry in available}
    close = get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    hint = f"; did you mean {spelled[close[0]]}?" if close else ""
    return f"no metric {name!r} is logged; there are {listed(available)}{hint}"


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names with commas; of very many (one per class) only the first."""
    names = tuple(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
