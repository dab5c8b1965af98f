"""A run is continued on what it was started on: what is derived of the data is compared, and the
saved values train, are saved and evaluate."""

import csv
import os

import h5py
import numpy as np
import pytest
from killed_runs import assert_equal_results, results, stopped
from small_runs import FEATURES, TINY, digits, snapshot, write_png
from volume_files import affine_of, blob, write_nifti

from glovita_lib import checkpoint, loader_features
from glovita_lib.data import Standardizer

COMMON = TINY[TINY.index("[task]") :]
VECTORS = f"""{FEATURES}
standardize = true
{COMMON}"""
NUMBERS = f"""{VECTORS}
[model.head]
head_type = "regression"
"""
BALANCED = VECTORS.replace("[task]", '[task]\nclass_weights = "balanced"')
IMAGES = f"""
[data]
dataset = "generic_image_dataset"
data_root_dir = "ROOT"
split_source = "subdirs"
label_source = "folder"
channels = 1
[model.encoder]
type = "test_resnet"
pretrained = false
{COMMON}"""
FROZEN = (
    IMAGES.replace("[data]", '[data]\naugmentation = { train_policy = "default_2d_1" }')
    .replace("[task]", '[peft]\nmethod = "linear_probing"\n[task]')
    .replace("[training]", "[training]\ncache_frozen_features = true")
)
VOLUMES = f"""
[data]
dataset = "generic_3d_dataset"
data_root_dir = "ROOT"
split_source = "csv"
label_source = "csv"
preparation = {{ workers = 1 }}
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = 1
strides = [1, 2]
{COMMON}"""
SERIES = f"""
[data]
dataset = "generic_series_dataset"
data_root_dir = "ROOT"
train_file = "train.ts"
test_file = "test.ts"
val_fraction = 0.25
[model.encoder]
encoder_type = "inception_time"
filters = 4
depth = 3
{COMMON}"""


def write_features(root, *, numbers=False, shift=0.0, ones=None, dropped=0):
    """Three feature files of 8 columns; shift: of half of the training values; ones: how many of
    the first training labels are 1; dropped: of the test samples."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 24), ("test", 24)):
        features = rng.normal(size=(count, 8)).astype(np.float32)
        labels = features @ np.arange(8) if numbers else (features[:, 0] > 0).astype(np.int64)
        if split == "train":
            features[:32] += 0 if numbers else shift
            labels = labels + shift if numbers else labels
            labels[:ones] = 1 if ones is not None else labels[:ones]
        end = count - dropped * (split == "test")
        with h5py.File(root / f"{split}.h5", "w") as file:
            file["features"], file["labels"] = features[:end], labels[:end]


def write_images(root, side=8):
    """Digits 0 and 1 in folders, all of one size."""
    images, labels = digits(120)
    chosen = [row for row in range(len(labels)) if labels[row] < 2]
    for place, row in enumerate(chosen):
        split = ("train", "train", "val", "test")[place % 4]
        file = root / "images" / split / "ab"[labels[row]] / f"{row}.png"
        write_png(file, images[row], side=side)


def write_volumes(root, spacing=(1, 1, 1), shape=(8, 8, 8)):
    """Eight volumes of two classes."""
    rows = []
    for number in range(8):
        voxels = blob(shape, seed=number) + 5
        write_nifti(root / "images" / f"{number}.nii", voxels, affine_of(spacing))
        split = ("train", "train", "val", "test")[number // 2]
        rows.append((f"{number}.nii", "ab"[number % 2], split))
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])


def write_series(root, length=24):
    """Waves of two classes."""
    root.mkdir(exist_ok=True)
    for name, count in (("train", 16), ("test", 8)):
        lines = ["@timestamps false", "@classLabel true a b", "@data"]
        for number in range(count):
            wave = np.sin(np.arange(length) * (0.4 if number % 2 else 1.2) + number)
            lines.append(",".join(f"{value:.5f}" for value in wave) + ":" + "ab"[number % 2])
        (root / f"{name}.ts").write_text("\n".join(lines) + "\n")


CHANGES = {
    "standardised features": (VECTORS, write_features, {}, {"shift": 3.0},
                              "inputs.mean[0]: ", "inputs.std[0]: "),
    "a count": (VECTORS, write_features, {}, {"dropped": 4}, "samples.test: 24 -> 20",
                "last.pt, which is continued,"),
    "class weights": (BALANCED, write_features, {}, {"ones": 32}, "class_weights[0]: ",
                      "(2 of 2 numbers differ)"),
    "targets of features": (NUMBERS, write_features, {"numbers": True},
                            {"numbers": True, "shift": 50.0}, "target_mean[0]: ", "last.pt"),
    "size of images": (IMAGES, write_images, {}, {"side": 16},
                       "inputs.augmentation.image_size: 8 -> 16", "last.pt"),
    "size of images once encoded": (FROZEN, write_images, {}, {"side": 16},
                                    "inputs.augmentation.image_size: 8 -> 16", "last.pt"),
    "spacing": (VOLUMES, write_volumes, {}, {"spacing": (1, 1, 2)},
                "inputs.augmentation.spacing[2]: 1 -> 2", "last.pt"),
    "size of volumes": (VOLUMES, write_volumes, {}, {"shape": (8, 8, 12)},
                        "inputs.augmentation.patch_size: [8, 8, 8] -> [8, 8, 12]", "last.pt"),
    "length of series": (SERIES, write_series, {}, {"length": 32},
                         "inputs.augmentation.length: 24 -> 32", "last.pt"),
}  # fmt: skip


@pytest.fixture
def killed(command, monkeypatch):
    """Runs a command that is killed in its second epoch."""

    def run(*changes, **options):
        with stopped(monkeypatch, lambda state: state.epoch == 1):
            command(*changes, **options)

    return run


@pytest.mark.parametrize("case", CHANGES)
def test_other_data_than_at_the_start_are_refused(command, killed, tmp_path, case):
    """Whatever is derived of them; with the first data back the run goes on, and ends as if
    nothing had happened."""
    text, write, first, second, *said = CHANGES[case]
    root = tmp_path / "set"
    spec = text.replace("ROOT", str(root))
    write(root, **first)
    command(spec=spec)
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    killed(spec=spec)
    write(root, **second)
    before = snapshot(tmp_path / "runs")
    line = command(spec=spec, code=2).err
    assert len(line.splitlines()) == 1 and snapshot(tmp_path / "runs") == before
    ways = ("Put back", 'training.on_existing = "overwrite" to replace it', '"new"')
    for part in (*said, *ways):
        assert part in line
    write(root, **first)
    assert "continuing in epoch 2" in command(spec=spec).out
    assert_equal_results(results(tmp_path / "runs"), expected)
    write(root, **second)
    assert "was finished before" in command(spec=spec).out
    command("training.on_existing=overwrite", "name=tiny", spec=spec)


def test_sums_in_another_order_continue_with_the_saved_ones(command, killed, tmp_path, monkeypatch):
    """As on another number of threads: the saved values train, are saved and evaluate."""
    spec = VECTORS.replace("ROOT", str(tmp_path / "set"))
    write_features(tmp_path / "set", shift=1e3)
    command(spec=spec)
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    killed(spec=spec)
    whole, calls = loader_features.feature_scale, []

    def rounded(source):
        scale = whole(source)
        calls.append(scale)
        return Standardizer(scale.mean + 1e-9 * scale.std, scale.std * (1 + 1e-9))

    monkeypatch.setattr(loader_features, "feature_scale", rounded)
    run = command(spec=spec)
    assert calls and "continuing in epoch 2" in run.out
    assert_equal_results(results(tmp_path / "runs"), expected)
    assert run.best["resolved"] == run.last["resolved"]
    assert run.json("resolved_config.json")["inputs"]["mean"] == calls[0].mean.tolist()


def test_the_best_model_of_a_continued_run_has_its_values(command, killed, tmp_path):
    """Else it would be evaluated with others than it was trained with."""
    spec = VECTORS.replace("ROOT", str(tmp_path / "set"))
    write_features(tmp_path / "set")
    changes = ["training.epochs=3", "name=run"]
    run = command(*changes, spec=spec)
    (run.path / "runtime_info.json").write_text('{"finished": null}')  # as after a kill
    best = run.best
    best["resolved"]["inputs"]["std"] = [2.0] * 8
    best["state"]["epoch"] = 1
    (run.path / "checkpoints" / "best.pt").unlink()
    checkpoint.save(run.path / "checkpoints" / "best.pt", best)
    last = run.last
    last["state"]["best_epoch"] = 0
    checkpoint.save(run.path / "checkpoints" / "last.pt", last)
    line = command(*changes, spec=spec, code=2).err
    assert "best.pt was trained with other values than" in line and "inputs.std[0]: 2 -> " in line
    assert "last.pt holds" in line
