"""A run that was interrupted anywhere and started again leaves what an undisturbed one leaves."""

import os
import shutil

import pytest
from killed_runs import Killed, assert_equal_results, interrupted, results, stopped
from small_runs import TINY, load

from glovita_lib import files

# Dropout, augmentation, mixup, averaged weights, accumulation, saves within an epoch, kept epochs.
RICH = [
    "data.augmentation.train_policy=default_2d_5",
    "data.augmentation.image_size=8",
    "task.mixup=true",
    "training.epochs=2",
    "training.ema_decay=0.9",
    "training.gradient_accumulation_steps=2",
    "training.save_every_steps=2",
    "training.save_every=1",
    "training.log_every=1",
    "dataloading.batch_size=16",
    "optimizer.warmup_epochs=1",
    "name=rich",
]


class Executioner:
    """Kills a run before the n-th change of what is on the disk; None only counts.

    Everything is written under a temporary name and renamed, but for metrics.jsonl, which grows: a
    kill while it does leaves half a line, any other one leaves the temporary file.
    """

    def __init__(self, monkeypatch, victim=None):
        self.victim, self.count, self.names = victim, 0, []
        self.replace, self.append = os.replace, files.append_jsonl
        monkeypatch.setattr(os, "replace", self.renaming)
        monkeypatch.setattr(files, "append_jsonl", self.growing)

    def is_time(self, path):
        """Count a change of a file."""
        self.names.append(os.path.basename(path))
        self.count += 1
        return self.count - 1 == self.victim

    def renaming(self, source, target):
        if self.is_time(target):
            shutil.copy(source, f"{os.path.dirname(target)}/.tmp-1-left")
            raise Killed
        self.replace(source, target)

    def growing(self, path, record):
        if self.is_time(path):
            with open(path, "a") as file:
                file.write('{"event": "epoch", "st')
            raise Killed
        self.append(path, record)


def test_killed_before_any_change_of_the_disk(command, tmp_path, monkeypatch):
    """Every state that a kill can leave on the disk, one after another."""
    with monkeypatch.context() as patch:
        counted = Executioner(patch)
        calm = command(*RICH).path
    assert {"last.pt", "best.pt", "epoch_0001.pt", "metrics.jsonl"} <= set(counted.names)
    assert {"metrics_test.json", "summary.json", "runtime_info.json"} <= set(counted.names)
    assert counted.names.count("last.pt") == 4
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    for victim in range(counted.count):
        with monkeypatch.context() as patch:
            Executioner(patch, victim)
            with pytest.raises(Killed):
                command(*RICH)
        again = command(*RICH)
        assert "is finished" in again.out
        assert_equal_results(results(tmp_path / "runs"), expected)
        shutil.rmtree(tmp_path / "runs")
    assert calm.parent.name == "rich"


def test_killed_again_and_again(command, tmp_path, monkeypatch):
    """Every process gets a few changes further than the one before it."""
    command(*RICH)
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    deaths = 0
    while True:
        with monkeypatch.context() as patch:
            Executioner(patch, 9)
            try:
                run = command(*RICH)
                break
            except Killed:
                deaths += 1
        assert deaths < 20
    assert deaths >= 3
    assert_equal_results(results(tmp_path / "runs"), expected)
    info = run.json("runtime_info.json")
    assert 1 <= len(info["continued"]) <= deaths and info["finished"]


@pytest.mark.parametrize("memory", ["threads", "workers"])
def test_images_decoded_by_workers_go_on_where_they_stopped(
    command, tmp_path, monkeypatch, folder_spec, memory
):
    changes = [
        "dataloading.batch_size=4",
        "data.augmentation.train_policy=default_2d_4",
        "training.save_every_steps=3",
        "name=folder",
    ]
    if memory == "workers":
        changes += ["dataloading.in_memory_mb=0", "dataloading.num_workers=2"]
    command(*changes, spec=folder_spec)
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    # of 8 steps an epoch: in the second epoch, after a save at step 12
    with stopped(monkeypatch, lambda state: state.step == 13, behind=True):
        command(*changes, spec=folder_spec)
    again = command(*changes, spec=folder_spec)
    assert "continuing in epoch 2 after optimizer step 12" in again.out
    assert_equal_results(results(tmp_path / "runs"), expected)


@pytest.mark.parametrize(
    "change",
    ["optimizer.name=SGD", "optimizer.name=RMSprop", "training.precision=bf16",
     "peft.method=linear_probing"],
)  # fmt: skip
def test_other_optimizers_and_precisions_go_on_equally(command, tmp_path, monkeypatch, change):
    command(change, "name=other")
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    with stopped(monkeypatch, lambda state: state.step == 6, behind=True):
        command(change, "name=other")
    assert "continuing in epoch 2" in command(change, "name=other").out
    assert_equal_results(results(tmp_path / "runs"), expected)


def test_early_stopping_counts_on(command, tmp_path, monkeypatch):
    changes = ["training.early_stopping_patience=3", "training.early_stopping_min_delta=0.9",
               "training.epochs=9", "name=patient"]  # fmt: skip
    calm = command(*changes)
    assert len(calm.records()) == 4
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    with stopped(monkeypatch, lambda state: state.epoch == 3):
        command(*changes)
    command(*changes)
    assert_equal_results(results(tmp_path / "runs"), expected)


def test_interrupted_by_the_user(command, monkeypatch):
    """Ctrl-C: exit code 130, the directory is free again, the same command goes on."""
    with interrupted(monkeypatch, step=5):
        assert "interrupted" in command(code=130).err
    run = command()
    assert "continuing in epoch 2 after optimizer step 4" in run.out
    assert [record["step"] for record in run.records()] == [4, 8]


def test_a_killed_run_without_a_checkpoint_starts_over(command, monkeypatch):
    with stopped(monkeypatch, lambda state: True):
        command()
    changed = command("optimizer.lr=0.01", "name=tiny")  # nothing to continue: it may change
    assert "continuing" not in changed.out
    assert changed.json("config.json")["optimizer"]["lr"] == 0.01


def test_a_killed_run_of_another_spec_is_not_continued(command, refused, monkeypatch):
    with stopped(monkeypatch, lambda state: state.step == 5):
        command()
    assert "optimizer.lr: 0.001 -> 0.01" in refused("optimizer.lr=0.01", "name=tiny")
    assert "continuing" in command(spec=TINY).out


# ---------------------------------------------------------------------- checkpoints taken away


@pytest.mark.parametrize(
    "gone", ["last.pt", "last.pt best.pt", "last.pt epoch_0000.pt epoch_0001.pt epoch_0002.pt"]
)
def test_without_last_the_run_goes_on_from_the_newest_of_the_others(
    command, tmp_path, monkeypatch, gone
):
    """Three of four epochs are done and kept; the end is that of the undisturbed run."""
    changes = ["training.epochs=4", "training.save_every=1", "training.log_every=1", "name=kept"]
    command(*changes)
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    with stopped(monkeypatch, lambda state: state.epoch == 3):
        command(*changes)
    folder = tmp_path / "runs" / "digits" / "kept" / "0" / "checkpoints"
    there = {name: load(folder / name)["state"]["epoch"] for name in os.listdir(folder)}
    assert there["last.pt"] == there["epoch_0002.pt"] == 3
    for name in gone.split():
        (folder / name).unlink()
        del there[name]
    newest = max(sorted(there, reverse=True), key=there.get)  # of the same epoch not best.pt
    again = command(*changes)
    assert f"last.pt is not there: the run goes on from {newest}" in again.out
    assert f"continuing in epoch {there[newest] + 1} after" in again.out
    found = results(tmp_path / "runs")
    away = {name for name in expected if name.split("/")[-1] in gone.split()} - found.keys()
    assert "best.pt" not in {name.split("/")[-1] for name in away}  # its epoch was kept
    assert_equal_results(
        found, {name: value for name, value in expected.items() if name not in away}
    )


def test_a_damaged_checkpoint_names_the_others(command, refused, monkeypatch, tmp_path):
    changes = ["training.epochs=3", "name=hurt"]
    with stopped(monkeypatch, lambda state: state.epoch == 2):
        command(*changes)
    last = tmp_path / "runs" / "digits" / "hurt" / "0" / "checkpoints" / "last.pt"
    content = last.read_bytes()
    last.unlink()  # best.pt may be the same file
    last.write_bytes(content[:-100])
    said = refused(*changes)
    assert "damaged" in said and "without last.pt the run goes on from best.pt" in said
    last.write_bytes(content)
    last.with_name("best.pt").unlink()
    assert "best.pt is not there, the model of epoch" in refused(*changes)
    last.rename(tmp_path / "elsewhere.pt")
    assert "continuing" not in command(*changes).out  # nothing is left that could be lost
