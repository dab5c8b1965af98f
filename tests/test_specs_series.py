"""The shipped specs of time series on the files of aeon, with overrides that only shrink them."""

import importlib.util
import json
from pathlib import Path

import pytest

from glovita import main
from glovita_lib.rundir import locate
from glovita_lib.spec_check import load_checked

SPECS = Path(__file__).parent.parent / "specs"
FEW = ["task.bootstrap=0", "task.result_plot=none"]
AEON = importlib.util.find_spec("aeon")
pytestmark = [
    pytest.mark.runs,
    pytest.mark.skipif(AEON is None, reason="the files are in aeon"),
]


def accuracy(name, *overrides, file="metrics_test.json", method=None):
    """Test accuracy of a spec."""
    spec, changes = str(SPECS / f"{name}.toml"), [*FEW, *overrides]
    assert main([spec, "--override", *changes]) == 0
    content = json.loads((locate(load_checked(spec, changes)).path / file).read_text())
    content = content if method is None else content[method]["test"]
    return content["metrics"]["acc"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs go to an empty folder."""
    monkeypatch.chdir(tmp_path)


def kernels(problem, method):
    """Accuracy of a probe by kernels."""
    changes = [f"data.problem={problem}", f'task.methods=["{method}"]']
    return accuracy("series_kernels", *changes, file="metrics_probe.json", method=method)


@pytest.mark.parametrize(
    ("problem", "method", "least"),
    [
        ("GunPoint", "hydra_multirocket", 0.99),
        ("ArrowHead", "minirocket", 0.853),
        ("BasicMotions", "hydra", 0.975),
        ("JapaneseVowels", "minirocket", 0.96),
    ],
)
def test_kernels_reach_the_published_accuracy(problem, method, least):
    assert kernels(problem, method) >= least


def test_ragged_series_are_learnt():
    few = ["training.epochs=5", "model.encoder.filters=8", "optimizer.lr=4e-3"]
    assert accuracy("series_ragged", *few) > 0.8


def test_series_of_one_length_are_learnt():
    few = ["training.epochs=12", "model.encoder.filters=8", "optimizer.lr=4e-3"]
    assert accuracy("series_gunpoint", *few, "data.problem=ItalyPowerDemand") > 0.8
