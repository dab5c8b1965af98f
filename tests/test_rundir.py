"""What happens to a run directory that exists, and what a run writes about itself."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glovita_lib import checkpoint, files, rundir
from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError
from glovita_lib.files import Lock
from glovita_lib.rundir import RunDir, decide, locate, opened, runtime_info
from glovita_lib.spec import Loaded, load_spec
from glovita_lib.spec_root import Root

ONE = Ranks(0, 1, 0, torch.device("cpu"))


def loaded(folder: Path, *overrides: str) -> Loaded:
    path = folder / "digits_resnet.toml"
    path.write_text('seed = 0\n[data]\ndataset = "digits"\n[optimizer]\nlr = 0.1\n')
    return load_spec(path, [f"exp_dir={folder / 'experiments'}", *overrides], Root)


def started(spec: Loaded, *, saved: bool = True, finished: bool = False) -> RunDir:
    with opened(spec, ONE) as (run, _):
        run.write_spec(spec)
        run.note_start(runtime_info(ONE, seed=0))
        files.append_jsonl(run.metrics, {"step": 1})
        if saved:
            checkpoint.save(run.last, {"step": 1})
            checkpoint.link(run.last, run.best)
        if finished:
            run.mark_finished()
    return run


def test_layout(tmp_path: Path) -> None:
    run = locate(loaded(tmp_path, "optimizer.lr=3e-4", "data.fold=2"))
    folder = tmp_path / "experiments" / "digits" / "digits_resnet,optimizer.lr=0.0003" / "2"
    assert run.path == folder
    assert run.last == folder / "checkpoints" / "last.pt"
    assert run.epoch(0) == folder / "checkpoints" / "epoch_0000.pt"
    assert run.predictions_of("val") == folder / "predictions_val.csv"
    assert run.metrics_of("test") == folder / "metrics_test.json"
    assert run.group == folder.parent
    assert not (tmp_path / "experiments").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "/tmp/x"])
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        locate(loaded(tmp_path, f"name={name}"))


def test_decisions_read_only(tmp_path: Path) -> None:
    spec = loaded(tmp_path)
    wanted = locate(spec)
    assert decide(wanted, spec) == "start"
    assert not (tmp_path / "experiments").exists()
    run = started(spec)
    before = sorted(map(str, run.path.rglob("*")))
    assert decide(wanted, spec) == "resume"
    assert decide(wanted, loaded(tmp_path, "training.on_existing=overwrite")) == "overwrite"
    run.mark_finished()
    assert run.is_finished
    assert decide(wanted, spec) == "finished"
    assert decide(wanted, loaded(tmp_path, "training.on_existing=overwrite")) == "overwrite"
    assert sorted(map(str, run.path.rglob("*"))) == before


@pytest.mark.parametrize("finished", [False, True])
def test_changed_spec_names_the_keys_and_the_ways_out(tmp_path: Path, finished: bool) -> None:
    run = started(loaded(tmp_path), finished=finished)
    changed = loaded(tmp_path, "optimizer.lr=0.2", "training.epochs=7")
    with pytest.raises(UserError) as caught:
        decide(run, changed)
    text = str(caught.value)
    assert "optimizer.lr: 0.1 -> 0.2" in text
    assert "training.epochs: 20 -> 7" in text
    assert all(way in text for way in ('"overwrite"', '"new"', "name"))
    assert "\n" not in text
    same = loaded(tmp_path, "mode=infer", "dataloading.num_workers=1", "logger.backend=none")
    assert decide(run, same) == ("finished" if finished else "resume")


def test_many_changes_stay_short(tmp_path: Path) -> None:
    run = started(loaded(tmp_path))
    config = json.loads(run.config.read_text())
    config["task"] = dict.fromkeys(map(str, range(30)), 1)
    files.write_json(run.config, config)
    with pytest.raises(UserError, match=r"and \d+ more\. Undo"):
        decide(run, loaded(tmp_path))


def test_run_without_checkpoint_starts_over_in_its_place(tmp_path: Path) -> None:
    run = started(loaded(tmp_path), saved=False)
    changed = loaded(tmp_path, "optimizer.lr=0.2", "name=digits_resnet")
    with opened(changed, ONE) as (found, decision):
        assert (found, decision) == (run, "start")
        assert run.metrics.exists()  # until the data are read
        run.clean(ONE, decision)
        assert not run.metrics.exists()
        assert not run.config.exists()


def test_new_runs_stand_beside(tmp_path: Path) -> None:
    spec = loaded(tmp_path, "training.on_existing=new", "data.fold=1")
    names = []
    for written in (True, True, False):
        with opened(spec, ONE) as (run, decision), opened(spec, ONE) as (other, _):
            assert decision == "start"
            names.append(f"{run.group.name}/{run.path.name}")
            names.append(f"{other.group.name}/{other.path.name}")
            if written:
                run.write_spec(spec)
    first, second, third, fourth = (f"digits_resnet{n}/1" for n in ("", "_2", "_3", "_4"))
    assert names == [first, second, second, third, third, fourth]
    assert sorted(os.listdir(locate(spec).group.parent)) == ["digits_resnet", "digits_resnet_2"]


def test_overwrite_removes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    run = started(loaded(tmp_path), finished=True)
    files.write_text(run.predictions_of("test"), "id\n")
    files.write_text(run.metrics_of("test"), "{}")
    files.write_text(run.plots / "curves.png", "x")
    files.write_text(run.path / "notes.md", "mine")
    files.write_text(run.path / f"{files.TEMPORARY}99-spec.toml", "half")
    files.write_text(run.path / f"{files.TEMPORARY}99-plots" / "curves.png", "half")
    run.clean(ONE, "resume")
    assert run.last.exists()
    assert not list(run.path.glob(f"{files.TEMPORARY}*"))
    with opened(loaded(tmp_path, "training.on_existing=overwrite"), ONE) as (_, decision):
        assert run.last.exists()  # until the data are read
        run.clean(ONE, decision)
        assert sorted(os.listdir(run.path)) == [".lock", "notes.md"]
        assert not run.is_finished
    before = sorted(map(str, run.path.rglob("*")))
    assert before == [str(run.lock), str(run.path / "notes.md")]


@pytest.mark.parametrize(
    ("removed", "expected"), [(0, "finished"), (1, "resume"), (2, "start"), (3, "start")]
)
def test_kill_while_overwriting_never_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int, expected: str
) -> None:
    """Removed in this order: runtime_info.json, checkpoints, metrics.jsonl, config.json."""
    spec = loaded(tmp_path)
    run = started(spec, finished=True)
    remove, left = rundir.remove, [removed]

    def remove_some(path: Path) -> None:
        if not left[0]:
            raise OSError(errno.EIO, "killed here")
        left[0] -= 1
        remove(path)

    monkeypatch.setattr(rundir, "remove", remove_some)
    with pytest.raises(UserError, match="killed here"):
        run.clean(ONE, "overwrite")
    assert run.config.exists()
    assert decide(run, spec) == expected


@pytest.mark.processes
def test_locked_directory(tmp_path: Path) -> None:
    spec = loaded(tmp_path)
    run = started(spec)
    script = (
        "import sys; from pathlib import Path; from glovita_lib.files import Lock;"
        "Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    env = os.environ | {"PYTHONPATH": str(Path(rundir.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run.lock)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        for on_existing in ("resume", "overwrite"):
            again = loaded(tmp_path, f"training.on_existing={on_existing}")
            with (
                pytest.raises(UserError, match=f"in use by process {process.pid} on"),
                opened(again, ONE),
            ):
                pytest.fail("opened although another process has it")
        assert run.last.exists()
        with opened(loaded(tmp_path, "training.on_existing=new"), ONE) as (other, decision):
            assert (other.group.name, decision) == ("digits_resnet_2", "start")
        process.stdin.close()
    with opened(spec, ONE) as (_, decision):
        assert decision == "resume"


def test_directory_is_free_after_an_error(tmp_path: Path) -> None:
    spec = loaded(tmp_path)
    with pytest.raises(ZeroDivisionError), opened(spec, ONE):
        raise ZeroDivisionError
    assert not (tmp_path / "experiments").exists()  # in which nothing was written
    with opened(spec, ONE) as (run, _), pytest.raises(UserError, match="this process"):
        Lock(run.lock).acquire()


def test_exp_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "experiments").write_text("a file")
    with pytest.raises(UserError, match="cannot write"), opened(loaded(tmp_path), ONE):
        pass


def test_a_finished_run_on_a_read_only_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = loaded(tmp_path)
    run = started(spec, finished=True)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(Lock, "acquire", lambda self: pytest.fail("writes"))
    with opened(spec, ONE) as found:
        assert found == (run, "finished")


def test_a_finished_run_is_free_while_it_is_reported(tmp_path: Path) -> None:
    spec = loaded(tmp_path)
    started(spec, finished=True)
    with opened(spec, ONE) as (_, first), opened(spec, ONE) as (_, second):
        assert first == second == "finished"


# ---------------------------------------------------------------------- weights are kept


@pytest.mark.parametrize("left", ["best.pt", "epoch_0003.pt"])
def test_without_last_the_run_goes_on_from_another_checkpoint(tmp_path: Path, left: str) -> None:
    spec = loaded(tmp_path)
    run = started(spec)
    run.last.rename(run.checkpoints / left)
    assert decide(run, spec) == "resume"
    run.clean(ONE, "resume")
    assert (run.checkpoints / left).is_file()
    with pytest.raises(UserError, match="holds a run of another spec"):
        decide(run, loaded(tmp_path, "optimizer.lr=0.2"))


def test_the_newest_kept_epoch(tmp_path: Path) -> None:
    run = locate(loaded(tmp_path))
    for epoch in (9999, 10000, 8):
        files.write_text(run.epoch(epoch), "x")
    assert run.kept == [run.epoch(10000)]
    files.write_text(run.best, "x")
    assert run.kept == [run.epoch(10000), run.best]


@pytest.mark.parametrize(
    "name", ["checkpoints/adapter.safetensors", "checkpoints/mine", "infer/merged.safetensors"]
)
def test_weights_that_no_run_goes_on_from_are_not_removed(tmp_path: Path, name: str) -> None:
    spec = loaded(tmp_path)
    run = started(spec, saved=False)
    files.write_text(run.path / name, "x")
    with pytest.raises(UserError, match=f"holds weights \\({Path(name).name}\\) but no"):
        decide(run, spec)
    over = loaded(tmp_path, "training.on_existing=overwrite")
    assert decide(run, over) == "overwrite"
    run.clean(ONE, "overwrite")
    assert not (run.path / name).exists() and decide(run, spec) == "start"


def test_runtime_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runtime_info(ONE, seed=3)["git"] is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert runtime_info(ONE, seed=3)["git"] is None  # no commit yet
    Path("code.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    info = runtime_info(ONE, seed=3)
    assert info["git"]["dirty"] is False
    assert len(info["git"]["commit"]) == 40
    Path("code.py").write_text("2")
    assert runtime_info(ONE, seed=3)["git"]["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime_info(ONE, seed=3)["git"] is None
    assert (info["seed"], info["device"], info["world_size"]) == (3, "cpu", 1)
    assert info["argv"] == sys.argv
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["python"] == sys.version.split()[0]


def test_continued_runs_are_noted(tmp_path: Path) -> None:
    run = started(loaded(tmp_path))
    first = files.read_json(run.runtime_info)
    assert first["finished"] is None
    run.note_start(runtime_info(ONE, seed=0))
    run.mark_finished()
    second = files.read_json(run.runtime_info)
    assert second["started"] == first["started"]
    assert [entry["pid"] for entry in second["continued"]] == [os.getpid()]
    assert second["finished"] >= second["started"]
