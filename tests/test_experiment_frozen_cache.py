"""Frozen encoders that read every sample once: the same training, or a refusal before it starts."""

import h5py
import numpy as np
import pytest
import torch
from children import glovita
from killed_runs import interrupted
from small_runs import FOLDERS, RESNET, TINY, load, write_png

from glovita_lib.encoder import Encoder

PROBE = ["peft.method=linear_probing", "training.epochs=4", "optimizer.lr=0.02"]
CACHED = [*PROBE, "training.cache_frozen_features=true"]


@pytest.fixture
def passes(monkeypatch):
    """Samples of every pass through an encoder, in order."""
    seen, forward = [], Encoder.forward

    def counting(self, x, **options):
        if x.device.type != "meta":
            seen.append(len(x))
        return forward(self, x, **options)

    monkeypatch.setattr(Encoder, "forward", counting)
    return seen


@pytest.mark.parametrize(
    ("spec", "more"),
    [(TINY, []), (TINY, ["model.feature_aggregation_method=joint", "training.ema_decay=0.9"]),
     (RESNET, ["training.gradient_accumulation_steps=2"]),
     (TINY, ["model.head.dropout=0.3", "dataloading.drop_last_train=true"])],
    ids=["vit", "joint, averaged", "batch norm, accumulated", "head with dropout"],
)  # fmt: skip
def test_the_same_training(command, passes, spec, more):
    """Epoch by epoch the same numbers, and at the end the same head over the same encoder."""
    plain = command(*PROBE, *more, "name=plain", spec=spec)
    often = sum(passes)
    passes.clear()
    cached = command(*CACHED, *more, "name=cached", spec=spec)
    held_out = 270 + 359  # the best model is evaluated from the images
    assert sum(passes) == 117 + 270 + held_out < often
    for first, second in zip(plain.records(), cached.records(), strict=True):
        for name in ("train_loss", "val_loss"):
            assert second[name] == pytest.approx(first[name], rel=1e-5), name
        for name in ("train_acc", "val_acc", "val_f1"):
            assert second[name] == pytest.approx(first[name], abs=1e-9), name
        assert (second["step"], second["lr"]) == (first["step"], first["lr"])
    states = [run.best["ema"] or run.best["model"] for run in (plain, cached)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if name.startswith("encoder."):
            assert torch.equal(states[1][name], value), name
        else:
            torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)
    p = [[float(r[k]) for r in run.rows() for k in r if k.startswith("p_")]
         for run in (plain, cached)]  # fmt: skip
    np.testing.assert_allclose(p[1], p[0], atol=1e-5)


def test_the_run_is_one_as_any_other(command):
    """Files, mode infer to the last digit, a run that is finished, a dry run."""
    run = command(*CACHED)
    command(*CACHED, "mode=infer")
    for name in ("predictions_test.csv", "metrics_test.json"):
        assert (run.path / "infer" / name).read_bytes() == (run.path / name).read_bytes()
    assert "was finished before" in command(*CACHED).out
    assert "dry run passed" in command(*CACHED, "name=dry", flags=["--dry-run"]).out


def test_an_interrupted_run_goes_on_bit_for_bit(command, monkeypatch):
    more = [*CACHED, "training.save_every_steps=1"]
    calm = command(*more, "name=calm")
    with interrupted(monkeypatch, step=6):
        command(*more, "name=again", code=130)
    again = command(*more, "name=again")
    assert "continuing in epoch 2 after optimizer step 5" in again.out
    for name, value in calm.last["model"].items():
        assert torch.equal(again.last["model"][name], value), name
    assert again.rows() == calm.rows()


@pytest.mark.parametrize("memory", [0, 100])
def test_each_split_has_the_geometry_of_its_own_policy(command, tmp_path, memory):
    """Whole images in training and their centres in evaluation, decoded at once or by workers."""
    for i in range(40):
        split = "train" if i < 24 else "val" if i < 32 else "test"
        image = np.zeros((12, 20 + i % 3), np.uint8)  # of several sizes: the loader resizes them
        image[:, :4] = 255 * (i % 2)  # what tells the classes apart is outside the centre
        image[:, 8:12] = 6 * i
        write_png(tmp_path / "images" / split / "ab"[i % 2] / f"{i:02d}.png", image)
    spec = FOLDERS.replace("ROOT", str(tmp_path))
    whole = ["data.augmentation.train_policy=default_2d_1", f"dataloading.in_memory_mb={memory}"]
    whole.append("data.augmentation.train_kwargs.crop=none")
    plain = command(*PROBE, *whole, "name=plain", spec=spec)
    cached = command(*CACHED, *whole, "name=cached", spec=spec)
    for first, second in zip(plain.records(), cached.records(), strict=True):
        for name in ("train_loss", "val_loss"):
            assert second[name] == pytest.approx(first[name], rel=1e-5), name


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.augmentation.train_kwargs.hflip_p=0.5"], "hflip_p"),
        (["data.augmentation.train_policy=default_2d_3"], "crop"),
        (["task.mixup=true"], "mixup"),
        (["task.cutmix=true"], "cutmix"),
        (["peft.method=full_finetuning"], "encoder trains"),
        (["peft.method=lora"], "encoder trains"),
        (["peft.method=partial_finetuning", "peft.num_frozen_layers=1"], "encoder trains"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refused_before_anything_is_written(refused, changes, said):
    line = refused(*CACHED, *changes)
    assert "training.cache_frozen_features" in line and said in line
    assert "training.cache_frozen_features" in refused(*CACHED, *changes, flags=["--dry-run"])


def test_policies_that_draw_nothing_are_taken(command):
    changes = ["data.augmentation.train_kwargs.crop=none", "training.epochs=1"]
    assert command(*CACHED, *changes).records()


@pytest.mark.parametrize("bags", [False, True])
def test_features_and_bags_are_refused(refused, tmp_path, bags):
    rows = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    for split in ("train", "val"):
        with h5py.File(tmp_path / f"{split}.h5", "w") as file:
            file["features"] = rows
            if bags:
                file["bag_ptr"] = np.arange(0, 13, 2)
            file["labels"] = np.arange(6 if bags else 12) % 2
            file["ids"] = np.array([f"s{i}" for i in range(6 if bags else 12)], object)
            file.attrs["class_names"] = ["a", "b"]
    head = "abmil" if bags else "classification"
    spec = f"""
mode = "train"
[data]
dataset = "precomputed_features"
data_root_dir = "{tmp_path}"
train_features_file = "train.h5"
val_features_file = "val.h5"
[model.encoder]
encoder_type = "precomputed"
[model.head]
head_type = "{head}"
[training]
epochs = 1
cache_frozen_features = true
[task]
result_plot = "none"
[logger]
backend = "none"
"""
    file = tmp_path / "tiny.toml"
    file.write_text(spec)
    line = refused(spec=file)
    assert "training.cache_frozen_features" in line and "features already" in line


# ---------------------------------------------------------------------- two ranks


@pytest.mark.processes
def test_two_ranks_see_the_samples_once_and_learn_as_one(command, tmp_path):
    """117 samples on two ranks in batches of 8 are those of one rank in batches of 16 (the last one
    is filled up, so it is left out)."""
    spec = tmp_path / "tiny.toml"
    more = [*CACHED, "training.train_steps_per_epoch=7", "dataloading.drop_last_train=true"]
    one = command(*more, "name=one", "dataloading.batch_size=16")
    spec.write_text(TINY)
    two = ["name=two", "dataloading.batch_size=8", f"exp_dir={tmp_path / 'runs'}"]
    glovita(spec, "--override", *more, *two, ranks=2)
    ours = load(one.path / "checkpoints" / "last.pt")
    theirs = load(one.path.parents[1] / "two" / "0" / "checkpoints" / "last.pt")
    assert ours["state"]["step"] == theirs["state"]["step"] == 28
    for name, value in ours["model"].items():
        torch.testing.assert_close(theirs["model"][name], value, atol=1e-5, rtol=1e-4)
