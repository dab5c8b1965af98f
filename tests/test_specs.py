"""The shipped specs run on small files of the format that they name, with overrides that only
shrink them; pretrained weights are left out, as they would be downloaded."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import Result, digits, publish_cifar, write_png
from torchvision.datasets import CIFAR10

from glovita import main
from glovita_lib.rundir import locate
from glovita_lib.spec_check import load_checked

TESTS = Path(__file__).parent
SPECS = TESTS.parent / "specs"
FEW_DIGITS = ["data.data_fraction=0.05", "data.val_fraction=0.05", "data.test_fraction=0.05"]
SHORT = ["training.epochs=1", "task.bootstrap=20", "task.result_plot=none"]
SMALL = ["data.augmentation.image_size=32", "model.encoder.pretrained=false"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Relative paths of the specs start in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda handle: None)


def run(name, *overrides):
    """Run a spec; its run directory."""
    changes = list(overrides)
    assert main([str(SPECS / f"{name}.toml"), "--override", *changes]) == 0
    path = locate(load_checked(str(SPECS / f"{name}.toml"), changes)).path
    return Result(0, "", "", path)


def train_and_infer(name, *overrides):
    """Train a spec, then evaluate it again; both must say the same."""
    made = run(name, *overrides)
    run(name, *overrides, "mode=infer")
    for file in ("predictions_test.csv", "metrics_test.json"):
        assert (made.path / "infer" / file).read_bytes() == (made.path / file).read_bytes()
    return made


def write_table(path, rows):
    """Rows as a CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_digits_resnet_and_what_follows_from_it():
    """The trained run, its features, a linear head and neighbours on them, a map of them."""
    changes = [*FEW_DIGITS, *SHORT, "name=digits_resnet"]
    trained = train_and_infer("digits_resnet", *changes)
    assert len(trained.rows()) == 90
    run("extract_digits", *changes)
    files = sorted(path.name for path in Path("precomputed_features").glob("*.h5"))
    assert files == ["digits_test.h5", "digits_train.h5", "digits_val.h5"]
    linear = train_and_infer("features_linear", *SHORT)
    assert [row["id"] for row in linear.rows()] == [row["id"] for row in trained.rows()]
    few = ["task.max_iterations=20", "task.bootstrap=20", "task.result_plot=none"]
    probe = run("probe_knn", *few)
    assert len(probe.rows("knn_test")) == len(probe.rows("linear_test")) == 90
    run("umap_digits", *changes, "umap.method=pca", "umap.dpi=50")  # UMAP: test_run_umap
    assert (trained.path / "umap" / "pca_test.csv").is_file()


def test_digits_vit_linear_probe():
    made = train_and_infer("digits_vit_linear_probe", *FEW_DIGITS, *SHORT)
    trained = made.json("resolved_config.json")["parameters"]
    assert trained["base"]["trainable"] == 0 < trained["head"]["trainable"]


FEW_PIECES = ["data.options.pieces=90", "dataloading.batch_size=16"]


def test_volume_tissue_and_volume_regression():
    made = train_and_infer("volume_tissue", *FEW_PIECES, *SHORT)
    assert made.json("resolved_config.json")["samples"] == {"train": 45, "val": 12, "test": 30}
    made = train_and_infer("volume_regression", *FEW_PIECES, *SHORT)
    assert {"mae", "r2"} <= made.json("metrics_test.json")["metrics"].keys()


def test_volume_slicewise_lora():
    """It trains a third of the parameters of the 3-D network at most."""
    made = train_and_infer("volume_slicewise_lora", *FEW_PIECES, *SHORT)
    of_slices = made.json("resolved_config.json")["parameters"]["all"]["trainable"]
    run("volume_slicewise_lora", *FEW_PIECES, *SHORT, "mode=infer", "infer.attention=true")
    assert (made.path / "infer" / "attention_test.h5").is_file()
    whole = run("volume_tissue", *FEW_PIECES, *SHORT).json("resolved_config.json")["parameters"]
    assert 0 < of_slices <= whole["all"]["trainable"] / 3


def test_volume_windows_bag():
    """Attention over the windows lies over the pieces in the world."""
    few = ["data.options.pieces=60", "dataloading.batch_size=16", "dataloading.num_workers=0"]
    made = train_and_infer("volume_windows_bag", *few, *SHORT)
    maps = sorted((made.path / "infer" / "maps_test").iterdir())
    assert len(maps) == 20 and sum("_lesion_" in path.name for path in maps) == 10


def test_cifar10_resnet(monkeypatch, tmp_path):
    """torchvision's files, holding 32x32 tiles of two photographs. Without a key W&B is offline."""
    from sklearn.datasets import load_sample_images

    tiles = np.concatenate([tiles_of(image) for image in load_sample_images().images])
    flat, labels = tiles[:120].reshape(120, -1), [k % 10 for k in range(20)] * 6
    names = [f"class {k}" for k in range(10)]
    publish_cifar(monkeypatch, Path("data"), CIFAR10, flat, labels, names)
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    few = ["optimizer.warmup_epochs=0", "dataloading.batch_size=16"]
    made = train_and_infer("cifar10_resnet", *SHORT, *few, "training.train_steps_per_epoch=2")
    assert made.json("resolved_config.json")["samples"] == {"train": 90, "val": 10, "test": 20}
    assert made.json("resolved_config.json")["class_names"] == names
    assert {row["label"] for row in made.rows()} == set(names)
    assert list((made.path / "wandb").glob("*offline*"))


def tiles_of(image):
    """32x32 tiles (N, 3, 32, 32) of a photograph."""
    rows, columns = (side // 32 for side in image.shape[:2])
    cut = image[: rows * 32, : columns * 32].reshape(rows, 32, columns, 32, 3)
    return cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)


def test_folder_images():
    images, labels = digits(60)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if i < 36 else "val" if i < 48 else "test"
        name = "odd" if label % 2 else "even"
        write_png(Path(f"data/my_images/images/{split}/{name}/{i}.png"), image, side=40)
    made = train_and_infer("folder_images", *SHORT, *SMALL)
    assert made.json("resolved_config.json")["class_names"] == ["even", "odd"]
    assert made.json("resolved_config.json")["best_metric"] == "val_f1"
    assert set(made.json("metrics_test.json")["metrics"]) >= {"auroc", "balanced_acc"}


def test_folder_regression():
    """Five folds of patients, each of three images."""
    images, labels = digits(60)
    rows = []
    for i, image in enumerate(images):
        write_png(Path(f"data/my_images/images/{i:02d}.png"), image, side=24)
        age = f"{20 + 6.5 * labels[i]:.1f}"
        rows.append({"path": f"{i:02d}.png", "age": age, "patient": f"patient {i // 3}"})
    write_table("data/my_images/labels.csv", rows)
    made = [train_and_infer("folder_regression", *SHORT, *SMALL, f"data.fold={k}") for k in (0, 3)]
    summary = json.loads((made[0].path.parent / "summary.json").read_text())
    assert summary["test"]["folds"] == ["0", "3"] and summary["test"]["repeated_ids"] == 0
    tested = [{row["id"] for row in run.rows()} for run in made]
    assert not tested[0] & tested[1]
    assert made[0].json("resolved_config.json")["best_metric"] == "val_mae"


def test_multilabel_csv():
    images, labels = digits(60)
    rows, splits = [], {"train": [], "val": [], "test": []}
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{i:02d}.png"
        write_png(Path("data/my_images/images") / name, image, side=40)
        found = {"edema": label % 2, "effusion": label // 5, "nodule": int(label in (0, 6, 8, 9))}
        rows.append({"path": name} | found)
        splits["train" if i < 36 else "val" if i < 48 else "test"].append(name)
    write_table("data/my_images/labels.csv", rows)
    Path("data/my_images/splits.json").write_text(json.dumps(splits))
    made = train_and_infer("multilabel_csv", *SHORT, *SMALL)
    assert made.json("resolved_config.json")["class_names"] == ["edema", "effusion", "nodule"]
    assert set(made.json("metrics_test.json")["per_class"]) == {"edema", "effusion", "nodule"}
    assert made.rows()[0]["p_edema"]


FEW_CLIPS = ["data.options.clips=80", "dataloading.batch_size=16"]


def test_video_playback_and_video_frames_attention():
    made = train_and_infer("video_playback", *FEW_CLIPS, *SHORT)
    samples = made.json("resolved_config.json")["samples"]
    assert len(made.rows()) == samples["test"] > 10
    run("video_frames_attention", *FEW_CLIPS, *SHORT)
    run("video_frames_attention", *FEW_CLIPS, *SHORT, "mode=infer", "infer.attention=true")


def test_every_shipped_spec_has_a_test_that_runs_it():
    tests = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    for path in SPECS.glob("*.toml"):
        assert f'"{path.stem}"' in tests or f"{path.stem}.toml" in tests, path
