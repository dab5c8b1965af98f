"""Mode infer: what training wrote, to the last digit; other checkpoints, new images, ensembles."""

import csv
import json
import shutil
import subprocess
import sys

import h5py
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


@pytest.mark.runs
def test_another_spec_than_the_run_s_is_answered_with_what_helps(command, refused):
    """A named checkpoint is proposed only for what it is then evaluated with."""
    run = command("training.epochs=1", "name=run")
    asked = ["training.epochs=1", "name=run", "mode=infer"]
    offered = f'evaluate it with them by infer.checkpoint = "{checkpoint_of(run)}"'
    for changes in (["data.test_fraction=0.3"], ["data.test_fraction=0.3", "seed=1"],
                    ["data.augmentation.image_size=16"], ["optimizer.lr=0.5"]):  # fmt: skip
        line = refused(*asked, *changes)
        keys = [change.partition("=")[0] for change in changes if "fraction" not in change]
        assert (offered in line) == (not keys)
        if keys:
            assert "infer.checkpoint" not in line
            assert f"; {keys[0]} belongs to the trained model: undo the changes, or train" in line
    told = command("mode=infer", f"infer.checkpoint={checkpoint_of(run)}", "data.test_fraction=0.3")
    assert "has no effect" not in told.out


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
    (run.path / "infer").mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run.path / "infer" / f".tmp-{gone.pid}-predictions_test.csv").write_text("of a killed one")
    command("mode=infer")
    after = snapshot(run.path)
    assert set(after) - set(before) == {
        "infer/", "infer/predictions_test.csv", "infer/metrics_test.json", "infer/notes_test.txt",
        "infer/resolved_config_test.json",
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
    assert "optimizer.lr: 0.001 -> 0.5" in line and "train a new run with name" in line


def test_what_no_model_depends_on_is_no_other_spec(command, refused):
    """Keys of inference alone: the run is found without them, unless it was trained with them."""
    run = command()
    other = ("dataloading.eval_batch_size=3", "task.bootstrap=7", "task.metrics=['acc']")
    asked = command("mode=infer", *other)
    assert str(run.path / "infer" / "predictions_test.csv") in asked.out
    report = json.loads((run.path / "infer" / "metrics_test.json").read_text())
    trained = json.loads((run.path / "metrics_test.json").read_text())
    assert set(report["metrics"]) == {"acc"} != set(trained["metrics"])
    assert report["metrics"]["acc"] == trained["metrics"]["acc"]
    own = command(*other)
    assert own.path != run.path
    assert str(own.path / "infer" / "predictions_test.csv") in command("mode=infer", *other).out
    assert "does not exist" in refused("mode=infer", "dataloading.batch_size=3")


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


def test_folds_of_other_data_are_noted(command, folder_spec, class_folders):
    """Of a cohort that the model does not know all samples are worth asking about."""
    spec = folder_spec.replace('"subdirs"', '"kfold"\nimages_dir = "images/train"')
    run = command("name=one", spec=spec)
    known = ["mode=infer", f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}", "name=two"]
    cohort = class_folders / "cohort"
    shutil.copytree(class_folders / "images" / "test", cohort)
    for changes, said in {"": False, "data.images_dir=cohort": True}.items():
        out = command(*known, *changes.split(), spec=spec).out
        assert ("takes one of 5 folds of data that the model was not trained on" in out) == said
    (cohort / "splits.json").write_text(
        json.dumps({"test": sorted(f"{p.parent.name}/{p.name}" for p in cohort.glob("*/*.png"))})
    )
    changes = ["data.images_dir=cohort", "data.split_source=splits_json"]
    out = command(*known, *changes, "data.split_file=cohort/splits.json", spec=spec).out
    assert f"predicted {len(list(cohort.glob('*/*.png')))} samples of test" in out


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


def test_new_images_of_a_folder_and_a_table(command, tmp_path, monkeypatch):
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
    (tmp_path / "new" / "site.1").mkdir()
    for path, name in ((".", "site.1"), ("..", "new"), ("../", "new"), ("../../new/0", "0")):
        write_png(tmp_path / "new" / "site.1" / "x.png", images[0])
        monkeypatch.chdir(tmp_path / "new" / "site.1")
        out = command("mode=infer", f"infer.input={path}", "name=run").out
        assert f"samples of {name} with" in out
        assert (run.path / "infer" / f"predictions_{name}.csv").is_file()
    (tmp_path / "new" / "site.1" / "x.png").unlink()
    with open(tmp_path / "list.csv", "w") as file:
        file.write("path,note\n" + "".join(f"new/{i % 2}/{i:04d}.png,x\n" for i in chosen[::-1]))
    command("mode=infer", f"infer.input={tmp_path / 'list.csv'}", "name=run")
    names, listed = predictions(run.path / "infer" / "predictions_list.csv")
    assert names == [f"new/{i % 2}/{i:04d}.png" for i in chosen[::-1]]  # the order of the table
    by_id = dict(zip(ids, scores, strict=True))
    for name, row in zip(names, listed, strict=True):
        np.testing.assert_allclose(row, by_id[name.removeprefix("new/")], atol=1e-6)


def test_results_of_other_samples_of_one_name_are_kept(command, refused, tmp_path):
    images, _ = digits(1797)
    command("training.epochs=1", "name=run")
    shared = ["training.epochs=1", "name=run", "mode=infer"]
    for folder in ("a/new", "b/new", "b/test"):
        write_png(tmp_path / folder / "0.png", images[0])
    command(*shared)
    run = command(*shared, f"infer.input={tmp_path}/a/new")
    names = ("predictions_new.csv", "predictions_test.csv", "resolved_config_new.json")
    kept = [(run.path / "infer" / name).read_bytes() for name in names]
    for other, of in (("b/new", f"is of {tmp_path}/a/new"), ("b/test", "is of a split")):
        line = refused(*shared, f"infer.input={tmp_path}/{other}")
        assert of in line and "infer.output_dir" in line
    command(*shared, f"infer.input={tmp_path}/b/new", f"infer.output_dir={tmp_path}/out")
    command(*shared, f"infer.input={tmp_path}/b/../a/new")  # the same again
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    command(*shared, f"infer.input={tmp_path}/linked/new")
    assert kept == [(run.path / "infer" / name).read_bytes() for name in names]
    assert "holds a run" in refused(*shared, f"infer.output_dir={run.path}")
    assert (run.path / "metrics_test.json").is_file()
    (run.path / "infer" / "predictions_new.csv").unlink()
    command(*shared, f"infer.input={tmp_path}/b/new")


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
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = np.zeros((3, 4), np.float32)
    line = refused("mode=infer", f"infer.input={tmp_path / 'f.h5'}", "name=run")
    assert "was trained on images" in line and "is a feature file" in line


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


def test_folds_of_a_split_file_go_by_name(command, refused, table_spec, tmp_path):
    spec = table_spec("multilabel", split_source='"splits_json"')
    root = tmp_path / "multilabel"
    names = sorted(path.name for path in (root / "images").iterdir())
    sites = {"b": names[::3], "a": names[1::3], "c": names[2::3]}
    (root / "splits.json").write_text(json.dumps(sites))
    for fold in ("b", "a"):
        run = command(f"data.fold={fold}", "training.epochs=1", "name=cv", spec=spec)
        assert run.path.name == fold
        ids, _ = predictions(run.path / "predictions_test.csv")
        assert sorted(ids) == sorted(sites[fold])
    summary = json.loads((run.path.parent / "summary.json").read_text())
    assert summary["test"]["folds"] == ["a", "b"] and summary["test"]["repeated_ids"] == 0
    asked = ["mode=infer", 'infer.folds=["a", "b"]', "data.fold=b", "training.epochs=1", "name=cv"]
    line = refused(*asked, spec=spec)
    assert "trained on each other's samples" in line and "splits_json" in line
    assert "data.fold = 0, but" in refused("training.epochs=1", "name=cv", spec=spec)


# ---------------------------------------------------------------------- other data


def checkpoint_of(run):
    return str(run.path / "checkpoints" / "best.pt")


@pytest.mark.parametrize("new", [False, True])
def test_members_read_images_each_in_its_own_way(
    command, folder_spec, class_folders, tmp_path, new
):
    ways = {"grey": "1, 8", "rgb": "3, 8", "deep": "1, 16"}
    paths, alone, asked = [], [], ["mode=infer"]
    if new:
        asked.append(f"infer.input={class_folders / 'images' / 'test'}")
    name = "predictions_test.csv"
    for way, (channels, depth) in ((way, text.split(", ")) for way, text in ways.items()):
        made = [f"data.channels={channels}", f"data.bit_depth={depth}"]
        run = command(*made, f"name={way}", spec=folder_spec)
        paths.append(checkpoint_of(run))
        command(*made, *asked, f"infer.checkpoint={paths[-1]}",
                f"infer.output_dir={tmp_path / way}", spec=folder_spec)  # fmt: skip
        alone.append(predictions(tmp_path / way / name))
    command(*asked, f"infer.checkpoint={json.dumps(paths)}", f"infer.output_dir={tmp_path / 'all'}",
            "data.channels=4", spec=folder_spec)  # fmt: skip
    ids, scores = predictions(tmp_path / "all" / name)
    assert all(ids == names for names, _ in alone)
    np.testing.assert_allclose(scores, np.mean([part for _, part in alone], axis=0), rtol=1e-6)


def test_members_that_cannot_read_the_same_are_refused_first(
    command, refused, folder_spec, tmp_path
):
    spec = folder_spec.replace("epochs = 2", "epochs = 1")
    grey, rgb = (
        checkpoint_of(command(f"data.channels={c}", f"name=c{c}", spec=spec)) for c in "13"
    )
    # the images of another data set are what they are
    digit = checkpoint_of(command("name=d", "training.epochs=1"))
    changed = tmp_path / "rgb.pt"
    state = load(rgb)
    state["resolved"]["class_names"] = load(digit)["resolved"]["class_names"]
    checkpoint.save(changed, state)
    line = refused("mode=infer", f'infer.checkpoint=["{digit}", "{changed}"]')
    assert "rgb.pt was trained on images of channels 3, data set digits has channels 1" in line
    # features
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
        file["labels"] = np.arange(12) % 3
        file.attrs["class_names"] = ["one", "two", "zero"]
    features = f"""
    [data]
    dataset = "precomputed_features"
    data_root_dir = "{tmp_path}"
    train_features_file = "f.h5"
    [model.encoder]
    encoder_type = "precomputed"
    [training]
    epochs = 1
    [task]
    result_plot = "none"
    [logger]
    backend = "none"
    """
    vectors = checkpoint_of(command("name=f", spec=features))
    line = refused("mode=infer", f'infer.checkpoint=["{grey}", "{vectors}"]', spec=spec)
    assert f"{vectors} was trained on vectors, but {grey} on images" in line
    line = refused("mode=infer", f"infer.checkpoint={vectors}", spec=spec)
    assert "the checkpoint was trained on vectors, the samples of data set generic_image" in line
    line = refused("mode=infer", f"infer.checkpoint={rgb}", "data.train_features_file=none",
                   "data.test_features_file=f.h5", spec=features)  # fmt: skip
    assert "the checkpoint was trained on images, the samples of data set precomputed_f" in line
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["features"] = np.zeros((4, 7), np.float32)
    line = refused("mode=infer", f"infer.checkpoint={vectors}", f"infer.input={tmp_path}/wide.h5",
                   spec=features)  # fmt: skip
    assert f"trained on vectors of width 5, {tmp_path}/wide.h5 has width 7" in line


def test_another_way_of_reading_is_refused_in_every_mode(command, refused, folder_spec):
    run = command("data.bit_depth=16", "training.epochs=1", spec=folder_spec)
    for mode in ("infer", "extract"):
        line = refused(f"mode={mode}", f"{mode}.checkpoint={checkpoint_of(run)}", spec=folder_spec)
        assert "trained on images of bit_depth 16, data set generic_image_dataset has" in line
        assert "set data.bit_depth" in line
    told = command("mode=umap", f"extract.checkpoint={checkpoint_of(run)}", "umap.method=pca",
                   spec=folder_spec, code=2)  # fmt: skip
    assert "set data.bit_depth" in told.err and len(told.err.splitlines()) == 1


def test_transforms_that_are_asked_for_beside_a_checkpoint_are_noted(command):
    run = command("training.epochs=1")
    asked = ["mode=infer", f"infer.checkpoint={checkpoint_of(run)}"]
    assert "has no effect" not in command(*asked).out
    told = command(*asked, "data.augmentation.image_size=16",
                   "data.augmentation.train_kwargs={hflip_p = 0.5}").out  # fmt: skip
    for setting in ("image_size = 16", "train_kwargs = "):
        assert f"note: data.augmentation.{setting}" in told
    assert told.count("has no effect: ") == 2 and "keeps the transforms it was trained with" in told


def cohort_of(tmp_path, class_folders, form):
    """The test images alone, in one of the forms that splits are given in; the spec's lines."""
    root = tmp_path / "cohort"
    files = sorted((class_folders / "images" / "test").rglob("*.png"))
    rows = []
    for file in files:
        label = file.parent.name
        place = f"test/{label}/{file.name}" if form == "subdirs" else f"{label}/{file.name}"
        (root / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "images" / place)
        rows.append((place, label))
    lines = {"subdirs": 'split_source = "subdirs"\nlabel_source = "folder"'}
    lines["splits_json"] = 'split_source = "splits_json"\nlabel_source = "folder"'
    lines["csv"] = 'split_source = "csv"\nlabel_source = "csv"'
    lines["kfold"] = 'split_source = "kfold"\nlabel_source = "json"\nn_folds = 3'
    (root / "splits.json").write_text(json.dumps({"test": [place for place, _ in rows]}))
    (root / "labels.json").write_text(json.dumps(dict(rows)))
    table = "".join(f"{place},{label},test\n" for place, label in rows)
    (root / "labels.csv").write_text("path,label,split\n" + table)
    return root, lines[form]


@pytest.mark.parametrize("form", ["subdirs", "splits_json", "csv", "kfold"])
def test_a_cohort_needs_no_split_but_the_one_that_is_asked_for(
    command, folder_spec, class_folders, tmp_path, form
):
    run = command(spec=folder_spec)
    root, lines = cohort_of(tmp_path, class_folders, form)
    spec = folder_spec.replace(str(class_folders), str(root))
    spec = spec.replace('split_source = "subdirs"\nlabel_source = "folder"', lines)
    best = checkpoint_of(run)
    command("mode=infer", f"infer.checkpoint={best}", f"infer.output_dir={tmp_path / 'o'}",
            spec=spec)  # fmt: skip
    ids, scores = predictions(tmp_path / "o" / "predictions_test.csv")
    known = {row["id"].split("/")[-1]: row for row in run.rows()}
    if form != "kfold":
        assert len(ids) == len(known)
    for identity, row in zip(ids, scores, strict=True):
        told = known[identity.split("/")[-1]]
        assert row.tolist() == [float(told[f"p_{name}"]) for name in ("one", "two", "zero")]
    command("mode=extract", f"extract.checkpoint={best}", f"extract.output_dir={tmp_path / 'e'}",
            spec=spec)  # fmt: skip
    command("mode=extract", "extract.source=encoder", f"extract.output_dir={tmp_path / 'b'}",
            spec=spec)  # fmt: skip
    if form != "kfold":
        assert (
            len(list((tmp_path / "e").glob("*.h5"))) == len(list((tmp_path / "b").iterdir())) == 1
        )


def test_training_says_which_split_a_cohort_lacks(refused, folder_spec, class_folders, tmp_path):
    root, _ = cohort_of(tmp_path, class_folders, "subdirs")
    spec = folder_spec.replace(str(class_folders), str(root))
    line = refused(spec=spec)
    assert 'no split "train"; splits there: test; train needs samples of its own' in line


def test_files_of_splits_that_are_not_asked_for_may_be_gone(command, refused, tmp_path, table_spec):
    spec = table_spec("multilabel")
    run = command(spec=spec)
    images = tmp_path / "multilabel" / "images"
    for row in run.rows("val"):
        (images / row["id"]).unlink()
    (images / "000.png").write_bytes(b"broken")  # of train
    command("mode=infer", spec=spec)
    told = (run.path / "infer" / "predictions_test.csv").read_bytes()
    assert told == (run.path / "predictions_test.csv").read_bytes()
    assert "no such file" in refused("mode=infer", "infer.split=val", spec=spec, lines=19)
