"""Mode infer: what training wrote, to the last digit; other checkpoints, new images, ensembles."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from small_runs import TINY, digits, load, snapshot, write_png

from glovita_lib import checkpoint
from glovita_lib.dist import Ranks
from glovita_lib.rundir import alone

CHANGES = [
    "training.ema_decay=0.9",
    "task.bootstrap=50",
    "data.augmentation.train_policy=default_2d_4",
    "name=run",
]


def predictions(path):
    """Ids and scores (N, K) of a predictions file: probabilities, or outputs of a regression."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    named = [name for name in rows[0] if name.startswith("p_")]
    named = named or [name for name in rows[0] if name.startswith("prediction_")]
    return [row["id"] for row in rows], np.array([[float(row[n]) for n in named] for row in rows])


# ---------------------------------------------------------------------- the spec's own run


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_infer_reproduces_training_to_the_last_digit(command, table_spec, subtask):
    spec = TINY if subtask == "multiclass" else table_spec(subtask)
    run = command(*CHANGES, spec=spec)
    for split in ("val", "test"):
        told = command(*CHANGES, "mode=infer", f"infer.split={split}", spec=spec)
        assert str(run.path / "infer" / f"metrics_{split}.json") in told.out
        for name in (f"predictions_{split}.csv", f"metrics_{split}.json"):
            assert (run.path / "infer" / name).read_bytes() == (run.path / name).read_bytes()
    assert run.json("metrics_test.json")["ci95"]


def test_images_of_differing_sizes_and_the_train_split(command, folder_spec, monkeypatch):
    monkeypatch.setattr("glovita_lib.results.plots.plot_results", lambda *a, **k: None)
    for name in ("results.plot_worst", "run_train.plot_augmented", "run_train.learning_curves"):
        monkeypatch.setattr(f"glovita_lib.{name}", lambda *arguments, **options: None)
    changes = [*CHANGES, "task.result_plot=all"]
    run = command(*changes, spec=folder_spec)
    for split in ("train", "val", "test"):
        command(*changes, "mode=infer", f"infer.split={split}", spec=folder_spec)
        for name in (f"predictions_{split}.csv", f"metrics_{split}.json"):
            assert (run.path / "infer" / name).read_bytes() == (run.path / name).read_bytes()


def test_test_is_the_default_and_training_files_stay(command):
    run = command()
    before = snapshot(run.path)
    command("mode=infer")
    after = snapshot(run.path)
    assert set(after) - set(before) == {
        "infer/", "infer/predictions_test.csv", "infer/metrics_test.json"
    }  # fmt: skip
    assert all(after[name] == content for name, content in before.items())


def test_two_write_the_same_results_one_after_the_other(command, refused):
    """Another split's results may be written meanwhile."""
    run = command()
    with alone(run.path / "infer" / "test", Ranks(0, 1, 0, torch.device("cpu"))):
        assert "in use by this process" in refused("mode=infer")
        command("mode=infer", "infer.split=val")
    assert not list(run.path.rglob("*.lock"))[1:]  # but that of the run


def test_the_last_checkpoint_if_asked(command):
    changes = [
        "training.epochs=4", "optimizer.lr=1.0", "optimizer.scheduler=None",
        "optimizer.name=SGD", "training.best_checkpoint_metric=val_loss", "name=r",
    ]  # fmt: skip
    run = command(*changes)
    assert run.records()[-1]["best_epoch"] < 3
    command(*changes, "mode=infer", "infer.use=last", "infer.split=val")
    report = json.loads((run.path / "infer" / "metrics_val.json").read_text())
    assert report["loss"] == run.records()[-1]["val_loss"] > run.records()[-1]["best"]


def test_before_training_and_with_another_spec(command, refused):
    line = refused("mode=infer")
    assert "best.pt does not exist" in line and "train the spec first" in line
    command()
    line = refused("mode=infer", "optimizer.lr=0.5", "name=tiny")
    assert "optimizer.lr: 0.001 -> 0.5" in line and "infer.checkpoint" in line


def test_a_checkpoint_that_may_know_the_samples_is_noted(command):
    run = command("seed=1", "name=one")
    known = ["mode=infer", f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}"]
    notes = {
        "infer.split=val": ["seed = 1, not 0"],
        "infer.split=test": [],  # the same for every seed
        "infer.split=test data.test_fraction=0.3": ["data.test_fraction = 0.2, not 0.3"],
        "infer.split=val seed=1": [],
    }
    for changes, expected in notes.items():
        out = command(*known, *changes.split(), "name=two").out
        found = [line for line in out.splitlines() if "may know samples" in line]
        assert len(found) == len(expected)
        assert all(
            f"trained with {text}:" in line for text, line in zip(expected, found, strict=True)
        )


def test_no_such_split(command, refused, folder_spec, class_folders):
    run = command(spec=folder_spec)
    shutil.rmtree(class_folders / "images" / "test")
    line = refused("mode=infer", "infer.split=test", spec=folder_spec)
    assert "no split test" in line and "train, val" in line
    command("mode=infer", spec=folder_spec)  # val, where there is no test
    assert (run.path / "infer" / "predictions_val.csv").is_file()


def test_a_dry_run_writes_nothing(command, tmp_path):
    command()
    before = snapshot(tmp_path)
    command("mode=infer", flags=["--dry-run"])
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------- other checkpoints


def test_a_checkpoint_anywhere_with_its_own_transforms(command, tmp_path):
    """The present spec says another size, mean, policy and encoder; the checkpoint knows better."""
    made = ["data.augmentation.image_size=12", "data.augmentation.mean=[0.3]",
            "data.augmentation.std=[0.2]", "data.augmentation.interpolation=bilinear"]  # fmt: skip
    run = command(*made, *CHANGES)
    moved = tmp_path / "elsewhere" / "mine.pt"
    moved.parent.mkdir()
    shutil.copy(run.path / "checkpoints" / "best.pt", moved)
    shutil.rmtree(tmp_path / "runs" / "digits" / "run" / "0" / "checkpoints")
    out = tmp_path / "out"
    present = ["model.encoder.type=resnet18", "data.augmentation.mean=[0.9]", "task.bootstrap=50"]
    spec = TINY.replace(TINY[TINY.index("model_kwargs") : TINY.index("[task]")], "")
    command(*present, "mode=infer", f"infer.checkpoint={moved}", f"infer.output_dir={out}",
            spec=spec)  # fmt: skip
    for name in ("predictions_test.csv", "metrics_test.json"):
        assert (out / name).read_bytes() == (run.path / name).read_bytes()


def test_wrong_classes(command, refused, folder_spec):
    run = command()
    line = refused("mode=infer", f"infer.checkpoint={run.path}/checkpoints/best.pt",
                   spec=folder_spec)  # fmt: skip
    assert (
        '"one" (' in line and '"zero" (' in line and "0, 1, 2, 3" in line and "infer.input" in line
    )


def test_no_such_truncated_and_foreign_checkpoints(command, refused, tmp_path):
    run = command()
    best = run.path / "checkpoints" / "best.pt"
    assert "best.pt" in refused("mode=infer", f"infer.checkpoint={run.path}/checkpoints/b.pt")
    half = tmp_path / "half.pt"
    half.write_bytes(best.read_bytes()[:5000])
    assert "truncated" in refused("mode=infer", f"infer.checkpoint={half}")
    state = load(best)
    other = command("model.encoder.model_kwargs.embed_dim=24", "name=other").best
    mixed = tmp_path / "mixed.pt"
    checkpoint.save(mixed, {**state, "model": other["model"]})
    line = refused("mode=infer", f"infer.checkpoint={mixed}")
    assert "another architecture" in line and "(1, 5, 24) instead of (1, 5, 16)" in line
    bare = tmp_path / "bare.pt"
    checkpoint.save(bare, {"model": state["model"]})
    assert "holds no spec" in refused("mode=infer", f"infer.checkpoint={bare}")


# ---------------------------------------------------------------------- new images


def test_new_images_of_a_folder_and_a_table(command, tmp_path):
    """Ids are paths, there are no labels and no metrics; scores are those of the same pixels as a
    labelled sample."""
    from sklearn.datasets import load_digits

    run = command("name=run")
    images, _ = digits(1797)
    known = dict(zip(*predictions(run.path / "predictions_test.csv"), strict=True))
    chosen = [int(name) for name in list(known)[:40]]
    new = tmp_path / "new"
    for i in chosen:
        write_png(new / f"{i % 2}" / f"{i:04d}.png", images[i])
    command("mode=infer", f"infer.input={new}", "name=run")
    ids, scores = predictions(run.path / "infer" / "predictions_new.csv")
    assert ids == sorted(f"{i % 2}/{i:04d}.png" for i in chosen)
    header = (run.path / "infer" / "predictions_new.csv").read_text().splitlines()[0]
    assert "label" not in header
    assert not (run.path / "infer" / "metrics_new.json").exists()
    raw = load_digits().images  # PNGs hold 256 levels, the digits have 17
    assert np.abs(images[chosen[0]] / 255 - raw[chosen[0]] / 16).max() < 0.003
    for name, row in zip(ids, scores, strict=True):
        np.testing.assert_allclose(row, known[str(int(name[2:6]))], atol=1e-3)
    with open(tmp_path / "list.csv", "w") as file:
        file.write("path,note\n" + "".join(f"new/{i % 2}/{i:04d}.png,x\n" for i in chosen[::-1]))
    command("mode=infer", f"infer.input={tmp_path / 'list.csv'}", "name=run")
    names, listed = predictions(run.path / "infer" / "predictions_list.csv")
    assert names == [f"new/{i % 2}/{i:04d}.png" for i in chosen[::-1]]  # the order of the table
    by_id = dict(zip(ids, scores, strict=True))
    for name, row in zip(names, listed, strict=True):
        np.testing.assert_allclose(row, by_id[name.removeprefix("new/")], atol=1e-6)


def test_new_images_that_are_not_there_or_broken(command, refused, tmp_path):
    command("name=run")
    assert "no such file" in refused("mode=infer", "infer.input=nowhere", "name=run")
    (tmp_path / "empty").mkdir()
    assert "no image" in refused("mode=infer", f"infer.input={tmp_path / 'empty'}", "name=run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a png")
    line = refused("mode=infer", f"infer.input={tmp_path / 'broken'}", "name=run",
                   lines=2)  # fmt: skip
    assert "a.png" in line


# ---------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_an_ensemble_is_the_mean(command, table_spec, tmp_path, subtask):
    spec = TINY if subtask == "multiclass" else table_spec(subtask)
    runs = [command(f"seed={seed}", f"name=s{seed}", spec=spec) for seed in (0, 1, 2)]
    paths = [str(run.path / "checkpoints" / "best.pt") for run in runs]
    single = []
    for i, path in enumerate(paths):  # on the split of seed 0, which some of them did not see
        command("mode=infer", f"infer.checkpoint={path}", f"infer.output_dir={tmp_path / str(i)}",
                spec=spec)  # fmt: skip
        single.append(predictions(tmp_path / str(i) / "predictions_test.csv"))
    command("mode=infer", f"infer.checkpoint={json.dumps(paths)}",
            f"infer.output_dir={tmp_path / 'all'}", spec=spec)  # fmt: skip
    ids, scores = predictions(tmp_path / "all" / "predictions_test.csv")
    assert all(ids == names for names, _ in single)
    expected = np.mean([values for _, values in single], axis=0)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert np.abs(single[0][1] - single[1][1]).max() > 1e-3
    report = json.loads((tmp_path / "all" / "metrics_test.json").read_text())
    with open(tmp_path / "all" / "predictions_test.csv") as file:
        rows = list(csv.DictReader(file))
    if subtask == "multiclass":
        right = [row["label"] == row["prediction"] for row in rows]
        assert report["metrics"]["acc"] == pytest.approx(np.mean(right))
        labels = [int(row["label"]) for row in rows]
        loss = -np.log(expected[np.arange(len(labels)), labels]).mean()
        assert report["loss"] == pytest.approx(loss, rel=1e-5)
    if subtask == "regression":
        truth = np.array([[float(row[f"label_{t}"]) for t in ("bright", "top")] for row in rows])
        assert report["metrics"]["mae"] == pytest.approx(np.abs(truth - scores).mean(), rel=1e-5)


def test_members_must_predict_the_same(command, refused, folder_spec):
    digit = command("name=a").path / "checkpoints" / "best.pt"
    folder = command("name=a", spec=folder_spec).path / "checkpoints" / "best.pt"
    line = refused("mode=infer", f'infer.checkpoint=["{digit}", "{folder}"]')
    assert "must have the same classes" in line


def test_folds_make_an_ensemble_only_for_new_samples(command, refused, table_spec, tmp_path):
    spec = table_spec("multilabel", split_source='"kfold"', n_folds="3")
    for fold in (0, 1):
        command(f"data.fold={fold}", "training.epochs=1", "name=cv", spec=spec)
    asked = ["mode=infer", "infer.folds=[0, 1]", "training.epochs=1", "name=cv"]
    line = refused(*asked, spec=spec)
    assert "trained on each other's samples" in line and "infer.input" in line
    new = tmp_path / "multilabel" / "images"
    command(*asked, f"infer.input={new}", spec=spec)
    folder = tmp_path / "runs" / "generic_image_dataset" / "cv"
    ids, scores = predictions(folder / "0" / "infer" / "predictions_images.csv")
    assert len(ids) == 90
    parts = []
    for fold in (0, 1):
        one = ["mode=infer", f"data.fold={fold}", "training.epochs=1", "name=cv"]
        command(*one, f"infer.input={new}", f"infer.output_dir={tmp_path / str(fold)}", spec=spec)
        parts.append(predictions(tmp_path / str(fold) / "predictions_images.csv")[1])
    np.testing.assert_allclose(scores, np.mean(parts, axis=0), rtol=1e-6)
    missing = refused("mode=infer", "infer.folds=[0, 2]", "training.epochs=1", "name=cv",
                      f"infer.input={new}", spec=spec)  # fmt: skip
    assert "cv/2/checkpoints/best.pt does not exist" in missing
