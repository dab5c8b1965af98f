"""Loggers: real offline W&B runs, ids that continue, failures that never stop a run."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import run as run_child
from msgspec.structs import replace

from glovita_lib import loggers
from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError, listed
from glovita_lib.loggers import (
    Logger,
    NullLogger,
    Share,
    Wandb,
    build_logger,
    epoch_line,
    logged_as,
)
from glovita_lib.metric_names import logged_names
from glovita_lib.metrics import Multiclass, without_interval
from glovita_lib.metrics_classification import Scores
from glovita_lib.results import summary_lines
from glovita_lib.run_train import is_of_folds
from glovita_lib.rundir import RunDir
from glovita_lib.spec_data import BaseData, DigitsData, GenericImageData, PrecomputedData
from glovita_lib.spec_train import NoLogger, WandbLogger

FIRST, SECOND = (Ranks(rank, 2, rank, torch.device("cpu")) for rank in (0, 1))
CONFIG = {"data": {"dataset": "digits"}, "optimizer": {"lr": 0.1}}
RECORD = {"event": "epoch", "step": 3, "train_loss": 0.5, "val_f1": None, "lr": float("nan")}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    run = RunDir(tmp_path / "digits" / "group" / "0")
    run.path.mkdir(parents=True)
    yield run
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()
    gc.collect()


def build(
    spec: Any,
    run: RunDir,
    *,
    ranks: Ranks = FIRST,
    run_id: str | None = None,
    of_folds: bool = False,
) -> Logger:
    names = logged_as(spec, run=run, of_folds=of_folds, dataset="digits")
    return build_logger(spec, run=run, config=CONFIG, names=names, run_id=run_id, ranks=ranks)


def offline_runs(run: RunDir) -> list[Path]:
    return sorted((run.path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_no_logger_and_other_ranks_leave_nothing(run: RunDir) -> None:
    for logger in (build(NoLogger(), run), build(WandbLogger(), run, ranks=SECOND)):
        assert isinstance(logger, NullLogger)
        logger.log(RECORD, step=3)
        logger.finish()
        assert logger.run_id is None
    assert not os.listdir(run.path)


@pytest.mark.parametrize(
    ("data", "tags"),
    [
        (DigitsData(), ["a"]),
        (GenericImageData(split_source="subdirs"), ["a"]),
        (GenericImageData(split_source="kfold"), ["a", "fold_site_b"]),
        (PrecomputedData(split_source="splits_json"), ["a", "fold_site_b"]),
        (PrecomputedData(split_source="splits_json", split_file="splits.txt"), ["a"]),
    ],
)
def test_a_run_of_several_folds_is_tagged(data: BaseData, tags: list[str], tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('{"site_a": ["1"], "site_b": ["2"], "c": ["3"]}')
    (tmp_path / "splits.txt").write_text('{"train": ["1"], "val": ["2"], "test": ["3"]}')
    run = RunDir(tmp_path / "set" / "group" / "site_b")
    of_folds = is_of_folds(replace(data, data_root_dir=str(tmp_path)))
    names = logged_as(WandbLogger(tags=("a",)), run=run, of_folds=of_folds, dataset="set")
    assert names["tags"] == tags and names["name"] == "group/site_b"
    assert logged_as(NoLogger(), run=run, of_folds=of_folds, dataset="set") == {}


def test_without_a_key_it_runs_offline_and_says_so(
    run: RunDir, capfd: pytest.CaptureFixture
) -> None:
    logger = build(WandbLogger(tags=("a",)), run, of_folds=True)
    assert isinstance(logger, Wandb)
    settings = logger.run.settings
    assert settings.mode == "offline"
    shown = (logger.run.project, settings.run_group, logger.run.name, logger.run.tags)
    assert shown == ("digits", "group", "group/0", ("a", "fold_0"))
    assert dict(logger.run.config)["optimizer"] == {"lr": 0.1}
    logger.log(RECORD, step=3)
    logger.finish()
    logger.log(RECORD, step=4)
    logger.finish()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "W&B runs offline (no API key: run wandb login)" in captured.err
    assert len(offline_runs(run)) == 1
    assert b"train_loss" in offline_runs(run)[0].read_bytes()
    assert list(run.path.iterdir()) == [run.path / "wandb"]


def test_a_continued_run_keeps_its_id(run: RunDir, capfd: pytest.CaptureFixture) -> None:
    spec = WandbLogger(offline=True, project="p", group="g", name="n")
    ids = []
    for run_id in (None, None, "given"):
        logger = build(spec, run, run_id=run_id)
        assert (logger.run.project, logger.run.settings.run_group, logger.run.name) == tuple("pgn")
        ids.append(logger.run_id)
        assert logger.run.id == logger.run_id
        logger.log(RECORD, step=3)
        logger.finish()
    assert ids[0] == ids[1]
    assert ids[2] == "given"
    assert capfd.readouterr() == ("", "")  # asked for, so nothing to say
    assert {path.name for path in offline_runs(run)} == {f"run-{ids[0]}.wandb", "run-given.wandb"}
    other = RunDir(run.path.with_name("1"))
    other.path.mkdir()
    logger = build(spec, other)
    logger.finish()
    assert logger.run_id != ids[0]


def test_no_answer_from_the_server(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(loggers, "INIT_TIMEOUT", 1)
    logger = build(WandbLogger(), run)
    logger.log(RECORD, step=3)
    logger.finish()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert "W&B runs offline (" in captured.err
    assert len(offline_runs(run)) == 1


def test_environment_and_key_files(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loggers.netrc_key("https://api.wandb.ai") is None
    Path(os.environ["NETRC"]).write_text("machine api.wandb.ai login user password secret\n")
    Path(os.environ["NETRC"]).chmod(0o600)
    assert loggers.netrc_key("https://api.wandb.ai") == "secret"
    assert loggers.netrc_key("https://other.org") is None
    Path(os.environ["NETRC"]).write_text("not a netrc file")
    assert loggers.netrc_key("https://api.wandb.ai") is None
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    logger = build(WandbLogger(), run)
    assert logger.run.settings.mode == "offline"
    logger.finish()


def test_disabled_by_the_environment(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = build(WandbLogger(), run)
    logger.log(RECORD, step=3)
    logger.finish()
    assert capfd.readouterr() == ("", "")
    assert not offline_runs(run)


def test_failures_never_stop_a_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fail(*args: object, **more: object) -> None:
        raise OSError("No space left on device\nand more")

    logger = build(WandbLogger(offline=True), run)
    monkeypatch.setattr(logger.run, "log", fail)
    for step in range(3):
        logger.log(RECORD, step=step)
    logger.finish()
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "W&B stopped: No space left on device; the run goes on, metrics.jsonl has everything"
    ]
    monkeypatch.setattr("wandb.init", fail)
    logger = build(WandbLogger(offline=True), run)
    logger.log(RECORD, step=3)
    logger.finish()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("W&B could not start: No space left")


def test_an_error_marks_the_run_as_failed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    logger = build(WandbLogger(offline=True), run)
    finish = logger.run.finish
    monkeypatch.setattr(
        logger.run, "finish", lambda exit_code: codes.append(exit_code) or finish(exit_code)
    )
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            logger.finish()
    assert codes == [1]


def test_missing_package(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        build(WandbLogger(), run)


@pytest.mark.processes
def test_import_leaves_wandb_alone() -> None:
    root = str(Path(loggers.__file__).parents[1])
    script = "import sys, glovita_lib.loggers; sys.exit('wandb' in sys.modules)"
    env = os.environ | {"PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == 0


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from glovita_lib.dist import Ranks
from glovita_lib.loggers import build_logger
from glovita_lib.rundir import RunDir
from glovita_lib.spec_train import WandbLogger
logger = build_logger(
    WandbLogger(offline=True), run=RunDir(Path(sys.argv[1])), config={"data": {"dataset": "d"}},
    names={"project": "d"}, run_id=None, ranks=Ranks(0, 1, 0, torch.device("cpu")),
)
logger.log({"loss": 1.0}, step=1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_leaves_no_process_behind(run: RunDir) -> None:
    run_child(KILLED, run.path, env={"MARK_OF_TEST": str(run.path)})
    assert offline_runs(run)
    for _ in range(100):
        if not processes_with(str(run.path).encode()):
            return
        time.sleep(0.1)
    pytest.fail("wandb's own process is still there 10 s after the kill")


def processes_with(mark: bytes) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"MARK_OF_TEST=" + mark in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_results_stand_in_the_summary_and_many_classes_in_a_table(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = build(WandbLogger(offline=True), run)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(logger.run, "log", lambda values, step: sent.append(values))
    many = {f"val_f1_per_class_{k}": k / 40 for k in range(40)}
    few = {f"train_f1_per_class_{k}": 0.5 for k in range(3)}
    logger.log({**RECORD, "val_acc": 0.25, **many, **few}, step=3)
    table = sent[0].pop("val_f1_per_class")
    assert table.columns == ["class", "value"]
    assert table.data == [[str(k), k / 40] for k in range(40)]
    assert set(sent[0]) == {"train_loss", "lr", "val_acc", *few}
    report = {
        "loss": 0.5,
        "metrics": {"acc": 0.75, "auroc": None},
        "ci95": {"acc": [0.7, 0.8], "auroc": [None, None]},
    }
    logger.conclude("val", report)
    logger.conclude("test", {**report, "loss": 0.6})
    assert dict(logger.run.summary) == {
        "val_acc": 0.75, "val_acc_low": 0.7, "val_acc_high": 0.8, "val_loss": 0.5,
        "test_acc": 0.75, "test_acc_low": 0.7, "test_acc_high": 0.8, "test_loss": 0.6,
    }  # fmt: skip
    logger.finish()
    logger.conclude("test", report)
    assert b"test_acc_high" in offline_runs(run)[0].read_bytes()


@pytest.mark.parametrize("defined", [0, 1, 11, 1500])
def test_the_number_of_keys_at_wandb_does_not_grow_with_the_classes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, defined: int
) -> None:
    """Nor does it depend on how many classes have a value in an epoch."""
    logger = build(WandbLogger(offline=True), run)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(logger.run, "log", lambda values, step: sent.append(values))
    values = {f"f1_per_class_{k}": k / 1500 if k < defined else None for k in range(1500)}
    logger.log({**RECORD, "val_acc": 0.5, **{f"val_{k}": v for k, v in values.items()}}, step=3)
    assert set(sent[0]) == {"train_loss", "lr", "val_acc", "val_f1_per_class"}
    expected = [[str(k), k / 1500] for k in range(defined)]
    assert sent[0]["val_f1_per_class"].data == expected
    ends = {key: [value, 1.0] if value else [None, None] for key, value in values.items()}
    few = {f"f1_per_class_{k}": 0.5 for k in range(2)}
    report = {"loss": None, "metrics": {"acc": 0.5, **values}, "ci95": {"acc": [0.4, 0.6], **ends}}
    logger.conclude("test", report)
    logger.conclude("val", {"loss": 0.1, "metrics": few, "ci95": {"f1_per_class_1": [0.4, 0.6]}})
    summary = dict(logger.run.summary)
    table = summary.pop("test_f1_per_class")
    assert summary == {
        "test_acc": 0.5, "test_acc_low": 0.4, "test_acc_high": 0.6, "val_loss": 0.1,
        "val_f1_per_class_0": 0.5, "val_f1_per_class_1": 0.5,
        "val_f1_per_class_1_low": 0.4, "val_f1_per_class_1_high": 0.6,
    }  # fmt: skip
    logger.finish()
    kept = next(run.path.glob(f"wandb/offline-run-*/files/{table['path']}"))
    content = json.loads(kept.read_text())
    assert content["columns"] == ["class", "value", "low", "high"]
    rows = [[str(k), k / 1500, *ends[f"f1_per_class_{k}"]] for k in range(defined)]
    assert content["data"] == rows


@pytest.mark.parametrize("name", ["a/b", "50%", "a?", "x" * 129, "back\\slash"])
def test_names_of_projects_that_wandb_refuses(name: str) -> None:
    from wandb import Settings, UsageError

    assert [key for key, _ in WandbLogger(project=name).problems()] == ["project"]
    with pytest.raises(UsageError):
        Settings(project=name)
    assert not list(WandbLogger(project="a b-c_d.e").problems())


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0000"), (0.12345, "0.1235"), (-12.5, "-12.5000"), (1.7e-7, "1.7e-07"),
     (1234567.8901234, "1.2346e+06"), (float("nan"), "nan"), (9999.12345, "9999.1234")],
)  # fmt: skip
def test_numbers_keep_their_digits(value: float, shown: str) -> None:
    assert loggers.decimal(value) == shown


def test_many_classes_are_a_range_on_the_console() -> None:
    record = {"epoch": 0, "train_loss": 1.0, "val_loss": 2e-7, "lr": 0.1, "samples_per_s": 1.0}
    record |= {"seconds": 1.0, "best": 0.5, "best_epoch": 0}
    many = {f"val_f1_per_class_{k}": k / 1500 for k in range(1500)} | {"val_f1_per_class_z": None}
    line = epoch_line(record | many, epochs=1, best_metric="val_f1_per_class_750")
    spread = "f1_per_class 0.4997 (0.0000 to 0.9993 of 1,500)"
    assert f"val loss 2e-07 f1_per_class_750 0.5000* {spread}" in line
    few = {f"val_f1_per_class_{k}": 0.5 for k in range(3)}
    line = epoch_line(record | few, epochs=1, best_metric="val_loss")
    assert "f1_per_class_0 0.5000 f1_per_class_1 0.5000 f1_per_class_2 0.5000" in line
    report = {
        "loss": 0.5,
        "metrics": {"mae": 3e-8, "acc": None},
        "ci95": {"mae": [1e-8, 5e-8]},
        "no_ci95": {},
    }
    report["metrics"] |= {k.removeprefix("val_"): v for k, v in many.items()}
    ((_, text),) = summary_lines({"test": report})
    assert text == (f"loss 0.5000  mae 3e-08 [1e-08, 5e-08]  acc undefined  {spread}")


@pytest.mark.parametrize("classes", [1, 2, 110, 1500])
def test_classes_without_interval_are_one_line(classes: int) -> None:
    counts = [50] + [1 + k % 4 for k in range(classes)]
    targets = np.repeat(np.arange(classes + 1), counts)
    scores = Scores(np.eye(classes + 1)[targets])
    names = tuple(f"c{k}" for k in range(classes + 1))
    samples = Multiclass(targets, scores, names)
    metrics = ("acc", "f1", "recall", "f1_per_class")
    lacks = without_interval(metrics, samples)
    assert len(lacks) == classes + 2  # the file has all
    values = dict.fromkeys(logged_names(metrics, names), 0.5)
    report = {"loss": None, "metrics": values, "ci95": {}, "no_ci95": lacks}
    lines = [text for _, text in summary_lines({"test": report})][1:]
    first = 'class "c1" has 1 of the {} samples that it takes'
    more = f", and {classes - 1} more have too few" * (classes > 1)
    assert lines[0] == f"no interval of f1, recall: {first.format(5)}{more}"
    if classes == 1:
        assert lines[1:] == [f"no interval of f1_per_class_c1: {first.format(40)}"]
        return
    named = listed((f"c{k + 1}" for k in range(classes)), 6)
    count = f"{classes:,} of {classes + 1:,} classes ({named})"
    more = f", and {classes - 1:,} more have too few"
    assert lines[1:] == [f"no interval of f1_per_class of {count}: {first.format(40)}{more}"]


def test_a_split_of_few_samples_says_so_once() -> None:
    why = "the split has 3 of the 15 samples that it takes"
    names = ("acc", *(f"f1_per_class_{k}" for k in range(30)))
    values = dict.fromkeys(names, 0.5)
    report = {"loss": None, "metrics": values, "ci95": {}, "no_ci95": dict.fromkeys(names, why)}
    (_, (_, line)) = summary_lines({"test": report})
    assert line == f"no interval of {listed(names, 6)}: {why}"


def test_a_long_computation_says_how_far_it_is(capsys, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("glovita_lib.loggers.time.perf_counter", lambda: clock[0])
    share = Share("intervals of test")
    for seconds, done in ((5, 0.1), (11, 0.25), (15, 0.3), (40, 1.0)):
        clock[0] = seconds
        share(done)
    assert capsys.readouterr().out == "intervals of test: 25% done, about 33 s left\n"
