"""Names of metrics: what a user may write, and what the tables promise."""

import subprocess
import sys

import pytest

from glovita_lib.errors import UserError
from glovita_lib.metric_names import (
    DEFAULT_METRICS,
    LOGGED_NAMES,
    METRICS_OF,
    canonical_metric,
    logged_names,
    lower_is_better,
    split_name,
)
from glovita_lib.metrics import FUNCTIONS
from glovita_lib.metrics_classification import MULTICLASS_FUNCTIONS, MULTILABEL_FUNCTIONS

LOGGED = ["train_loss", "val_loss", "val_Accuracy", "val_F1", "val_Precision", "val_Recall"]


def test_every_name_has_a_formula_and_every_formula_a_name() -> None:
    assert set(METRICS_OF["multiclass"]) == set(MULTICLASS_FUNCTIONS)
    assert set(METRICS_OF["multilabel"]) == set(MULTILABEL_FUNCTIONS)
    assert set(logged_names(METRICS_OF["regression"], [])) == set(FUNCTIONS)
    assert set().union(*METRICS_OF.values()) == set(LOGGED_NAMES)
    assert all(set(names) <= set(METRICS_OF[task]) for task, names in DEFAULT_METRICS.items())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("F1", "val_F1"),
        ("val_F1", "val_F1"),
        ("f1", "val_F1"),
        ("acc", "val_Accuracy"),
        ("accuracy", "val_Accuracy"),
        ("loss", "val_loss"),
        ("val_loss", "val_loss"),
        ("train_loss", "train_loss"),
        ("Precision", "val_Precision"),
    ],
)
def test_names_a_user_may_write(written: str, meant: str) -> None:
    assert canonical_metric(written, LOGGED) == meant


def test_names_without_split() -> None:
    available = ("loss", "Accuracy", "F1", "F1_cat", "F1_*")
    assert canonical_metric("val_F1", available) == "F1"
    assert canonical_metric("F1_cat", available) == "F1_cat"
    assert canonical_metric("val_F1_dog", ("F1", "F1_*")) == "F1_dog"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("pr", "several values, name one of them: val_Precision, val_Recall"),
        ("auroc", "add 'auroc' to task.metrics"),
        ("val_AUROC", "add 'auroc' to task.metrics"),
        ("Acuracy", "did you mean val_Accuracy"),
        ("train_F1", "no metric 'train_F1' is logged"),
        ("zzz", "there are train_loss, val_loss"),
    ],
)
def test_names_that_fit_nothing(written: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        canonical_metric(written, LOGGED)


def test_a_long_list_of_classes_is_cut() -> None:
    with pytest.raises(UserError, match="and 980 more") as error:
        canonical_metric("nonsense", [f"F1_{k}" for k in range(1000)])
    assert len(str(error.value)) < 400


def test_direction() -> None:
    down = {name for names in LOGGED_NAMES.values() for name in names if lower_is_better(name)}
    assert down == {"MSE", "MAE", "ECE", "Brier"}
    assert lower_is_better("val_loss") and lower_is_better("test_MAE")
    assert not lower_is_better("F1_loss")  # a class may have any name


def test_split_and_logged_names() -> None:
    assert split_name("val_F1_cat") == ("val", "F1_cat") and split_name("F1_val") == (
        None,
        "F1_val",
    )
    assert logged_names(["pr", "f1_per_class", "pr"], None) == ("Precision", "Recall", "F1_*")
    assert logged_names(["f1_per_class"], ["a", "b"]) == ("F1_a", "F1_b")


def test_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, glovita_lib.metric_names;"
        "raise SystemExit({'torch', 'numpy'} & set(sys.modules) and 'heavy' or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measuring_an_epoch_does_not_load_sklearn_or_scipy() -> None:
    code = (
        "import sys, numpy as np; from glovita_lib.metrics import compute;"
        "compute(('acc', 'auroc'), subtask='multiclass', targets=np.array([0, 1]),"
        " scores=np.eye(2), class_names=('a', 'b'));"
        "import glovita_lib.plots;"
        "raise SystemExit({'sklearn', 'scipy', 'matplotlib'} & set(sys.modules) and 'heavy' or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
