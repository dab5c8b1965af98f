"""Names of metrics: what a user may write, and what the tables promise."""

import subprocess
import sys

import numpy as np
import pytest

from glovita_lib import metrics_segments  # noqa: F401  registers the formulas of frames
from glovita_lib.errors import UserError
from glovita_lib.metric_names import (
    CALLED,
    METRICS,
    check_logged,
    logged_names,
    lower_is_better,
    metric_name,
    metrics_of,
    split_name,
    title_of,
    usual_metrics,
)
from glovita_lib.metrics import samples_of  # registers the formulas of regressions
from glovita_lib.metrics_classification import FORMULAS, Scores

LOGGED = ["val_loss", "val_acc", "val_f1", "val_f1_per_class_cat", "val_mae"]


def test_every_metric_has_its_formulas_and_every_formula_is_of_a_metric() -> None:
    subtasks = ("multiclass", "multilabel", "regression", "framewise")
    assert {(name, task) for task in subtasks for name in metrics_of(task)} == set(FORMULAS)
    assert all(usual_metrics(task) for task in subtasks)
    subtasks = subtasks[:3]  # of rows, see test_metrics_segments for those of videos
    targets, hot = np.array([0, 1]), np.eye(2)
    found = {samples_of(task, targets if task == "multiclass" else hot, Scores(hot), ("a", "b"))
             for task in subtasks}  # fmt: skip
    assert {samples.subtask for samples in found} == set(subtasks)


def test_names_are_one_word_that_no_other_can_be_taken_for() -> None:
    """A logged name is read back to its metric: no metric is a class of another."""
    for name, metric in METRICS.items():
        assert name.isidentifier() and name == name.lower()
        assert metric_name(f"val_{name}_x" if metric.per_class else f"val_{name}") == name


def test_other_names_of_metrics_are_no_names_of_ours() -> None:
    assert set(CALLED.values()) <= set(METRICS) and not set(CALLED) & set(METRICS)


@pytest.mark.parametrize("name", LOGGED)
def test_what_is_logged_may_be_asked_for(name: str) -> None:
    check_logged(name, LOGGED)
    with pytest.raises(UserError, match=f"did you mean {name}"):
        check_logged(split_name(name)[1], LOGGED)  # the split belongs to the name


def test_a_family_stands_for_any_class() -> None:
    check_logged("val_f1_per_class_dog", ["val_loss", "val_f1_per_class_*"])
    with pytest.raises(UserError, match="did you mean val_f1_per_class_*"):
        check_logged("val_f1_per_class_", ["val_loss", "val_f1_per_class_*"])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("val_Accuracy", "did you mean val_acc?"),
        ("Accuracy", "did you mean val_acc?"),
        ("val_F1", "did you mean val_f1?"),
        ("MAE", "did you mean val_mae?"),
        ("auroc", 'add "auroc" to task.metrics'),
        ("val_Balanced_Accuracy", 'add "balanced_acc" to task.metrics'),
        ("AUC", 'add "auroc" to task.metrics'),
        ("val_top1", "did you mean val_acc?"),
        ("F1_macro", "did you mean val_f1?"),
        ("val_acx", "did you mean val_acc?"),
        ("zzz", "there are val_loss, val_acc"),
        ("F1_class_0", 'set it to "val_f1_per_class_<class name>"'),
        ("val_F1_class_cat_x", 'set it to "val_f1_per_class_cat_x"'),
    ],
)
def test_names_that_fit_nothing(written: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_logged(written, LOGGED)
    assert said in str(error.value)


def test_a_class_asked_for_where_no_class_is_logged() -> None:
    with pytest.raises(UserError, match='_<class name>" and add "f1_per_class" to task.metrics'):
        check_logged("F1_class_0", ["val_loss", "val_acc"])
    with pytest.raises(UserError, match='"val_f1_per_class_0" is not computed: add "f1_per_class"'):
        check_logged("val_f1_per_class_0", ["val_loss", "val_acc"])


def test_a_class_is_one_that_there_is() -> None:
    """By its name or its place among those that are known; numbers have no classes."""
    names = ("cat", "dog")
    for written in ("F1_class_1", "F1_class_dog", "val_f1_per_class_1", "f1_per_class_dog"):
        with pytest.raises(UserError, match='set it to "val_f1_per_class_dog" and add'):
            check_logged(written, ["val_loss", "val_acc"], class_names=names)
    with pytest.raises(UserError, match="the classes are cat, dog"):
        check_logged("F1_class_2", ["val_loss", "val_acc"], class_names=names)
    with pytest.raises(UserError, match="there are val_loss, val_mse"):
        check_logged("F1_class_0", ["val_loss", "val_mse"], subtask="regression")


def test_a_long_list_of_classes_is_cut() -> None:
    with pytest.raises(UserError, match="and 980 more") as error:
        check_logged("nonsense", [f"val_f1_per_class_{k}" for k in range(1000)])
    assert len(str(error.value)) < 600


def test_direction() -> None:
    down = {name for name in METRICS if lower_is_better(f"val_{name}")}
    assert down == {"mse", "mae", "ece", "brier"}
    assert lower_is_better("val_loss") and lower_is_better("test_mae")
    assert not lower_is_better("f1_per_class_loss")  # a class may have any name


def test_split_logged_names_and_titles() -> None:
    assert split_name("val_f1_per_class_cat") == ("val", "f1_per_class_cat")
    assert split_name("f1_val") == (None, "f1_val")
    assert logged_names(["recall", "f1_per_class", "recall"], None) == ("recall", "f1_per_class_*")
    assert logged_names(["f1_per_class"], ["a", "b"]) == ("f1_per_class_a", "f1_per_class_b")
    assert title_of("top5acc") == "top-5 accuracy" and title_of("instance_loss") == "instance loss"


@pytest.mark.processes
def test_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, glovita_lib.metric_names;"
        "raise SystemExit({'torch', 'numpy'} & set(sys.modules) and 'heavy' or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.processes
def test_measuring_an_epoch_does_not_load_sklearn_or_scipy() -> None:
    code = (
        "import sys, numpy as np; from glovita_lib.metrics import compute, Scores;"
        "compute(('acc', 'auroc'), subtask='multiclass', targets=np.array([0, 1]),"
        " scores=Scores(np.eye(2)), class_names=('a', 'b'));"
        "import glovita_lib.plots;"
        "raise SystemExit({'sklearn', 'scipy', 'matplotlib'} & set(sys.modules) and 'heavy' or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
