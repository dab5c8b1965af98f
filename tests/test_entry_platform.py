"""Runs on a system that is not POSIX: what only POSIX has is taken away in a fresh interpreter.
Worker processes that are spawned, as on macOS and Windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, Result

REPOSITORY = Path(__file__).parent.parent

# Read by every interpreter that starts with its folder on the path, worker processes too.
WITHOUT_POSIX = """
import multiprocessing, os, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None  # to import it raises ImportError
for name in (
    "O_DIRECTORY", "fork", "forkpty", "geteuid", "getuid", "link", "posix_fallocate", "pread",
    "preadv", "pwrite", "pwritev", "sched_getaffinity",
):
    delattr(os, name)
posix_open = os.open
def windows_open(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return posix_open(path, *arguments, **options)
os.open = windows_open
multiprocessing.set_start_method("spawn")
"""

RUN = """
import os, sys
import torch  # asks for it on Linux
del os.register_at_fork
import glovita
assert not hasattr(os, "fork")
for mode in ("train", "extract", "infer"):
    assert glovita.main([*sys.argv[1:], f"mode={mode}"]) == 0, mode
"""


@pytest.mark.processes
def test_train_extract_and_infer_without_posix(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    (tmp_path / "tiny.toml").write_text(TINY)
    overrides = [f"exp_dir={tmp_path / 'runs'}", "name=tiny", "training.epochs=1"]
    overrides += [f"extract.output_dir={tmp_path / 'out'}", "extract.split=val"]
    overrides += ["dataloading.in_memory_mb=0", "dataloading.num_workers=1"]
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "tiny.toml"), "--override", *overrides],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "runs" / "digits" / "tiny" / "0"
    assert (run / "checkpoints" / "best.pt").is_file() and (run / "metrics_test.json").is_file()
    assert (run / "infer" / "predictions_test.csv").read_bytes() == (
        run / "predictions_test.csv"
    ).read_bytes()
    assert len(list((tmp_path / "out").glob("*_digits_*.h5"))) == 1
    # an interpreter without fcntl takes the place of Windows, whose locks filelock knows
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 4  # of the run, its group, the feature file and the results of infer
    assert all("has no file locks" in note for note in notes)


SPAWN = """
import multiprocessing, sys
from multiprocessing.process import BaseProcess
multiprocessing.set_start_method("spawn")
start, started = BaseProcess.start, []
BaseProcess.start = lambda process: started.append(process) or start(process)
import glovita
assert glovita.main(sys.argv[1:]) == 0
print("started", len(started))
"""


def started(folder: Path, *overrides: str) -> int:
    """Processes that a run of the spec there starts, where they are spawned."""
    result = subprocess.run(
        [sys.executable, "-c", SPAWN, str(folder / "tiny.toml"), "--override", *overrides],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout.split("started ")[-1])


@pytest.mark.processes
def test_spawned_workers_start_once_a_run_and_give_the_same_results(tmp_path, command):
    """Two workers serve training, the evaluations of val after each epoch, and val and test in the
    end; the numbers are those of a run without any, to the last digits, which follow from where in
    memory a process has its tensors."""
    changes = ["dataloading.in_memory_mb=0", "training.val_steps_per_epoch=2"]
    alone = command(*changes, "dataloading.num_workers=0", "name=alone")
    overrides = [f"exp_dir={tmp_path / 'runs'}", *changes, "dataloading.num_workers=2"]
    assert started(tmp_path, *overrides) == 2
    spawned = tmp_path / "runs" / "digits" / "tiny,training.val_steps_per_epoch=2" / "0"
    for split in ("val", "test"):
        found, expected = Result(0, "", "", spawned).rows(split), alone.rows(split)
        assert len(found) == len(expected) > 100
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["id"] == theirs["id"] and ours["label"] == theirs["label"]
            scores = [(float(ours[k]), float(theirs[k])) for k in ours if k.startswith("p_")]
            assert len(scores) == 10
            assert all(one == pytest.approx(other, rel=1e-4, abs=1e-6) for one, other in scores)


@pytest.mark.processes
def test_spawned_workers_serve_all_members_of_an_ensemble_and_heat_maps(tmp_path, command):
    """They start once for both, and not again for the few samples that are drawn."""
    command("name=one")
    command("name=two", "optimizer.lr=0.02")
    runs, two = tmp_path / "runs" / "digits", ["name=two", "optimizer.lr=0.02"]
    common = [f"exp_dir={runs.parent}", "dataloading.in_memory_mb=0", "dataloading.num_workers=1"]
    both = [str(runs / name / "0" / "checkpoints" / "last.pt") for name in ("one", "two")]
    members = [f"infer.checkpoint={json.dumps(both)}", f"infer.output_dir={tmp_path / 'mean'}"]
    assert started(tmp_path, *common, "mode=infer", *members) == 1
    assert started(tmp_path, *common, "mode=infer", *two, "infer.heat_maps=2") == 1
    assert len(list((runs / "two").rglob("heat_maps_test/*.png"))) == 2
