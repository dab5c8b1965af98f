"""Mistakes and mishaps: one line, exit code 2, nothing half-written, no traceback."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from small_runs import TINY, load, snapshot

from glovita_lib.datasets import build_data
from glovita_lib.objectives import SupervisedObjective
from glovita_lib.spec_check import load_checked
from glovita_lib.trainer import Trainer

# ---------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.epoch=3", ["training.epoch", 'did you mean "epochs"']),
        ("trainig.epochs=3", ["trainig", "training"]),
        ("data.val_fractoin=0.1", ["val_fractoin", "val_fraction"]),
        ("training.epochs=many", ["training.epochs", "many", "whole number"]),
        ("training.epochs=0", ["training.epochs", "0", ">= 1"]),
        ("optimizer.lr=-1", ["optimizer.lr", "-1"]),
        ("data.augmentation.mean=0.5", ["data.augmentation.mean", "0.5"]),
        ("data.dataset=digit", ["digit", "did you mean", "digits", "cifar10"]),
        ("model.encoder.encoder_type=tim", ["tim", "timm", "torchvision"]),
        ("model.head.head_type=regresion", ["regresion", "regression"]),
        ("peft.method=lorra", ["lorra", "lora"]),
        ("optimizer.name=Adma", ["Adma", "Adam"]),
        ("model.head.head_type=regression", ["regression", "cannot predict multiclass"]),
        ("model.encoder.type=resnet81", ["resnet81", "resnet"]),
        ("optimizer.warmup_epochs=5", ["warmup_epochs", "5", "2"]),
    ],
)
def test_the_spec(refused, change, said):
    spec = TINY if "model.encoder" not in change else without_kwargs()
    line = refused(change, spec=spec)
    for part in said:
        assert part in line


def without_kwargs():
    """The tiny spec without arguments of a particular network."""
    return TINY.replace(TINY[TINY.index("model_kwargs") : TINY.index("[task]")], "")


def test_several_mistakes_are_told_at_once(refused):
    said = refused("training.epochs=0", "optimizer.lrr=1", "peft.method=lorra", lines=3)
    assert all(part in said for part in ("training.epochs", "optimizer.lrr", "peft.method"))


def test_no_such_spec(refused, tmp_path):
    assert "no such spec file" in refused(spec=tmp_path / "absent.toml")


# ---------------------------------------------------------------------- the data


def test_missing_folders_and_files(refused, folder_spec, table_spec, class_folders, tmp_path):
    assert "set2" in refused(f"data.data_root_dir={class_folders}2", spec=folder_spec)
    assert "pictures" in refused("data.images_dir=pictures", spec=folder_spec)
    spec = table_spec("multilabel")
    assert "labels2.csv" in refused("data.labels_file=labels2.csv", spec=spec)
    assert "splits.json" in refused("data.split_source=splits_json", spec=spec)
    line = refused("data.split_column=part", spec=spec)
    assert "part" in line and "split" in line
    (tmp_path / "multilabel" / "images" / "003.png").unlink()
    assert "003.png" in refused(spec=spec, lines=2)


def test_names_with_line_ends_in_split_files_and_tables(refused, table_spec, tmp_path):
    """A raw carriage return in a message overwrites what stands before it."""
    spec, folder = table_spec("multilabel"), tmp_path / "multilabel"
    ids = [f"{i:03d}.png" for i in range(90)]
    splits = {"train": [*ids[:60], "000.png\r"], "val": ids[60:75], "test": ids[75:]}
    (folder / "splits.json").write_text(json.dumps(splits))
    line = refused('data.split_source="splits_json"', spec=spec)
    assert "splits.json" in line and '"000.png\\u000d"' in line and "\r" not in line
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_bytes(text.replace("001.png", '"00\r1.png"').encode())
    line = refused(spec=spec)
    assert 'labels.csv: cells of "path"' in line and '"00\\u000d1.png"' in line


def test_missing_weights(refused):
    line = refused("model.encoder.weights=nowhere.pth")
    assert "nowhere.pth" in line


def test_no_data_set_and_no_network(refused, monkeypatch, tmp_path):
    """The data set would be downloaded; the line says how to do without."""

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    line = refused("data.dataset=cifar10", f"data.data_root_dir={tmp_path}",
                   spec=TINY.replace("data_fraction = 0.1", ""))  # fmt: skip
    assert "cifar-10-batches-py" in line and "data_root_dir" in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split(refused, folder_spec, class_folders, split):
    for path in (class_folders / "images" / split).rglob("*.png"):
        path.unlink()
    line = refused(spec=folder_spec)
    assert split in line


def test_a_label_that_is_not_in_the_list(refused, folder_spec, class_folders):
    line = refused('data.class_names=["one", "two"]', spec=folder_spec)
    assert "zero" in line and "class_names" in line


def test_another_number_of_classes(refused, folder_spec, table_spec):
    line = refused("data.num_classes=5", spec=folder_spec)
    assert "5" in line and "3" in line and "num_classes" in line
    assert "num_classes" in refused("data.num_classes=2", spec=table_spec("multilabel"))


@pytest.mark.parametrize("how", ["not an image", "half an image"])
@pytest.mark.parametrize("memory", ["in memory", "workers"])
def test_unreadable_images_are_listed_together(
    command, tmp_path, folder_spec, class_folders, how, memory
):
    images = sorted((class_folders / "images" / "train").rglob("*.png"))[:2]
    originals = [path.read_bytes() for path in images]
    for path in images:
        path.write_bytes(path.read_bytes()[:60] if how == "half an image" else b"nothing")
    changes = ["name=run", "dataloading.batch_size=64"]
    if memory == "workers":
        changes += ["dataloading.in_memory_mb=0", "dataloading.num_workers=1"]
    failed = command(*changes, spec=folder_spec, code=2)
    for path in images:
        assert path.name in failed.err
    assert "Traceback" not in failed.err and len(failed.err.splitlines()) <= 3
    assert not any(".tmp-" in name or name.endswith(".pt") for name in snapshot(tmp_path))
    for path, content in zip(images, originals, strict=True):
        path.write_bytes(content)
    assert "is finished" in command(*changes, spec=folder_spec).out


def test_unreadable_images_may_be_left_out(command, folder_spec, class_folders):
    path = sorted((class_folders / "images" / "train").rglob("*.png"))[0]
    path.write_bytes(b"nothing")
    run = command("data.strict=false", spec=folder_spec)
    assert path.name in run.out
    assert run.json("resolved_config.json")["samples"]["train"] == 29


def test_an_image_smaller_than_the_crop(command, folder_spec, class_folders):
    """Native pixels: a 64-pixel window does not fit into 8 to 12 pixels; nothing is enlarged."""
    small = ["data.augmentation.test_policy=native", "data.augmentation.image_size=12"]
    failed = command(*small, spec=folder_spec, code=2)
    names = [path.name for path in (class_folders / "images" / "val").rglob("*.png")]
    assert any(name in failed.err for name in names)
    assert "12" in failed.err and "Traceback" not in failed.err


# ---------------------------------------------------------------------- checkpoints


class Stop(BaseException):
    """Ends a run in the middle."""


@pytest.fixture
def half_done(command, monkeypatch):
    """A run that was killed behind an optimizer step, by default in its second epoch."""

    def run(*changes, at=6):
        def stop(self):
            step(self)
            if self.state.step == at:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "optimizer_step", stop)
            with pytest.raises(Stop):
                command(*changes, "name=run")
        return command(*changes, "name=run", flags=["--dry-run"])

    step = Trainer.optimizer_step
    return run


def test_a_truncated_checkpoint_is_not_continued(half_done, refused, command):
    last = half_done().path / "checkpoints" / "last.pt"
    whole = last.read_bytes()
    for size in (0, 3, 1000, len(whole) - 1):
        last.write_bytes(whole[:size])
        line = refused("name=run")
        assert str(last) in line and "truncated" in line
    last.write_bytes(whole)
    assert "continuing in epoch 2" in command("name=run").out


def test_a_truncated_best_checkpoint(half_done, command):
    """It is renewed from last.pt if that is the same epoch, else training goes on without it, and
    only the evaluation cannot be made."""
    changes = ["training.epochs=4", "optimizer.lr=1.0", "optimizer.scheduler=None",
               "optimizer.name=SGD", "training.best_checkpoint_metric=val_loss"]  # fmt: skip
    best = half_done(*changes, at=14).path / "checkpoints" / "best.pt"
    state = load(best.with_name("last.pt"))["state"]
    assert state["epoch"] == 3 and state["best_epoch"] < 2
    best.write_bytes(best.read_bytes()[:1000])
    failed = command(*changes, "name=run", code=2)
    assert str(best) in failed.err and "truncated" in failed.err
    assert len(failed.err.splitlines()) == 1 and failed.last["state"]["epoch"] == 4


def test_a_truncated_best_checkpoint_of_the_last_epoch(half_done, command):
    best = half_done().path / "checkpoints" / "best.pt"
    start = best.read_bytes()[:1000]
    best.unlink()  # it is the same file as last.pt
    best.write_bytes(start)
    assert "is finished" in command("name=run").out


def test_a_checkpoint_of_another_architecture_is_not_continued(half_done, refused, command):
    last = half_done().path / "checkpoints" / "last.pt"
    other = command("model.encoder.model_kwargs.embed_dim=24", "name=other")
    shutil.copy(other.path / "checkpoints" / "last.pt", last)
    line = refused("name=run")
    assert "model_kwargs.embed_dim: 24 -> 16" in line and "on_existing" in line


def test_a_best_checkpoint_of_another_architecture(half_done, command, monkeypatch):
    run = half_done("training.best_checkpoint_metric=val_loss")
    other = command("model.encoder.model_kwargs.embed_dim=24", "name=other")

    fit = Trainer.fit

    def swap(self):
        fit(self)
        shutil.copy(other.path / "checkpoints" / "best.pt", run.path / "checkpoints" / "best.pt")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", swap)
        failed = command("training.best_checkpoint_metric=val_loss", "name=run", code=2)
    assert "another architecture" in failed.err and len(failed.err.splitlines()) == 1


def test_weights_of_another_architecture(refused, tmp_path):
    import timm

    file = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    said = refused(f"model.encoder.weights={file}", lines=20)  # a table
    assert "resnet.pth" in said and "missing in the file   cls_token" in said


# ---------------------------------------------------------------------- the directory

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("\\nprocess 1 on elsewhere"); file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_that_a_living_process_has(command, tmp_path):
    lock = tmp_path / "runs" / "digits" / "tiny" / "0" / ".lock"
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        failed = command(code=2)
        assert "is in use by process 1 on elsewhere" in failed.err
        assert len(failed.err.splitlines()) == 1
        assert list(lock.parent.iterdir()) == [lock]
        beside = command("training.on_existing=new")
        assert f"{tmp_path}/runs/digits/tiny_2/0 is finished" in beside.out
    finally:
        holder.communicate()
    assert "is finished" in command().out  # a dead process holds nothing


def test_a_full_disk_keeps_the_last_checkpoint(command, tmp_path, monkeypatch):
    """A real failure of the system: no file may grow beyond 20 kB behind the first epoch."""
    calm = snapshot(command("name=run").path)
    shutil.rmtree(tmp_path / "runs")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    close, kept = Trainer.close_epoch, {}

    def fill(self, started):
        if self.state.epoch == 1:
            kept.update(snapshot(tmp_path / "runs"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        close(self, started)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "close_epoch", fill)
        try:
            failed = command("name=run", code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in failed.err and "last.pt" in failed.err
    assert len(failed.err.splitlines()) == 1
    after = snapshot(tmp_path / "runs")
    assert after.keys() == kept.keys()
    changed = {name.split("/")[-1] for name in after if after[name] != kept[name]}
    assert changed == {"metrics.jsonl", ".lock"} & changed
    run = command("name=run")
    assert "continuing in epoch 2 after optimizer step 4" in run.out
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", "predictions_test.csv"):
        assert snapshot(run.path)[name] == calm[name]


def test_a_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(f"exp_dir={tmp_path / 'file'}")
    assert "cannot write" in line and str(tmp_path / "file") in line


# ---------------------------------------------------------------------- NaN


def test_a_diverging_run_stops_and_names_the_samples(command):
    failed = command("optimizer.name=SGD", "optimizer.lr=1e30", "name=run", code=2)
    assert "became NaN or infinite in epoch 1, batch" in failed.err
    assert "optimizer.lr" in failed.err and len(failed.err.splitlines()) == 1
    assert not (failed.path / "checkpoints").exists()


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_nan_in_a_later_epoch_keeps_the_last_good_checkpoint(command, monkeypatch, where):
    """Of the loss in the middle of the epoch, or of the gradient of its very last batch, whose loss
    is finite."""
    changes = ["training.epochs=3", "name=run", "training.log_every=1"]
    loss, step, wanted = SupervisedObjective.loss, Trainer.optimizer_step, {}

    def spoiled_loss(self, model, batch, clock):
        value, logs = loss(self, model, batch, clock)
        if (clock.epoch, clock.place) == (1, 64):
            wanted["rows"] = batch.rows.tolist()
            value = value * float("nan")
        return value, logs

    def spoiled_step(self):
        if self.state.epoch == 1 and self.batch == 3:
            parameter = next(self.model.head.parameters())
            parameter.grad[0] = float("inf")
            wanted["rows"] = self.train_loader.rows(1, 3).tolist()
        step(self)

    with monkeypatch.context() as patch:
        if where == "loss":
            patch.setattr(SupervisedObjective, "loss", spoiled_loss)
        else:
            patch.setattr(Trainer, "optimizer_step", spoiled_step)
        failed = command(*changes, code=2)
    batch = 2 if where == "loss" else 3
    assert f"the {where} became NaN or infinite in epoch 2, batch {batch}, samples " in failed.err
    assert len(failed.err.splitlines()) == 1
    named = failed.err.split("samples ")[1].split(";")[0].split(", ")
    root = load_checked(str(failed.path / "spec.toml"), []).root
    ids = build_data(root.data, seed=root.seed).splits["train"].ids
    assert named == [ids[row] for row in wanted["rows"]]
    for name in ("last.pt", "best.pt"):
        kept = load(failed.path / "checkpoints" / name)
        assert kept["state"]["epoch"] == 1
        assert all(value.isfinite().all() for value in kept["model"].values())
    again = command(*changes)  # without the fault it goes on from there
    assert "continuing in epoch 2 after optimizer step 4" in again.out
