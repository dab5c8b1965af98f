"""Mode train: what a run leaves, which model it keeps, how it may be started again."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from small_runs import snapshot

from glovita_lib import run_train
from glovita_lib.errors import UserError
from glovita_lib.objectives import SupervisedObjective
from glovita_lib.spec_check import load_checked

DESCRIPTION = {"spec.toml", "config.json", "resolved_config.json", "runtime_info.json"}
DESCRIPTION |= {"parameter_groups.csv"}


def folders_and_files(folder):
    """Relative paths of everything below a folder, hidden lock files left out."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(path) for path in paths if not path.name.endswith(".lock")}


# ---------------------------------------------------------------------- the run directory


def test_the_directory_holds_what_is_documented_and_nothing_else(command):
    changes = ("task.result_plot=val", "task.bootstrap=20", "training.save_every=1")
    run = command(*changes, "name=tiny")
    group = run.path.parent
    assert run.path.parts[-3:] == ("digits", "tiny", "0")
    plots = {name for name in folders_and_files(run.path) if name.startswith("plots/")}
    assert {f"plots/{name}.png" for name in ("curves", "augmented", "worst_test")} < plots
    assert not any("train" in name for name in plots)
    assert folders_and_files(run.path) - plots == DESCRIPTION | {
        "metrics.jsonl",
        "notes.txt",
        *(f"predictions_{split}.csv" for split in ("val", "test")),
        *(f"metrics_{split}.json" for split in ("val", "test")),
        "plots",
        "checkpoints",
        *(f"checkpoints/{name}.pt" for name in ("last", "best", "epoch_0000", "epoch_0001")),
    }
    assert {path.name for path in group.iterdir()} == {"0", "summary.json", ".summary.lock"}
    report = run.json("metrics_test.json")
    assert report["n"] == len(run.rows()) == 359
    low, high = report["ci95"]["acc"]
    assert low <= report["metrics"]["acc"] <= high and low < high


def test_what_is_on_disk_is_what_ran(command, monkeypatch):
    """Compared with the running objects, in a spec that states nothing and one that states it."""
    trainers, trackers = [], []
    build, tracker = run_train.build_trainer, run_train.build_logger
    monkeypatch.setattr(
        run_train, "build_trainer", lambda *a: trainers.append(build(*a)) or trainers[-1]
    )
    monkeypatch.setattr(
        run_train, "build_logger", lambda *a, **k: trackers.append(k["names"]) or tracker(*a, **k)
    )
    stated = ["training.precision=bf16", "dataloading.num_workers=1", "dataloading.in_memory_mb=0",
              "optimizer.warmup_epochs=0.5", "peft.method=lora", "model.encoder.type=test_vit",
              "model.feature_aggregation_method=joint", "data.augmentation.image_size=32",
              "training.gradient_accumulation_steps=2"]  # fmt: skip
    for number, changes in enumerate(([], stated)):
        run = command("training.epochs=1", f"name=run{number}", *changes)
        taken, trainer = run.json("resolved_config.json")["taken"], trainers[-1]
        model, encoder = trainer.model, trainer.model.encoder
        assert taken["training"] == {
            "precision": trainer.precision,
            "steps_per_epoch": trainer.steps,
            "steps": trainer.schedule.total,
            "samples_per_step": trainer.order.step_size,
        }
        assert taken["optimizer"]["warmup_steps"] == trainer.schedule.warmup
        assert taken["optimizer"]["name"] == type(trainer.optimizer).__name__
        assert taken["model"]["feature_aggregation_method"] == model.aggregation
        patch = list(encoder.patch) if encoder.layout == 3 else None
        assert taken["model"]["encoder"]["patch_size"] == patch
        assert taken["model"]["encoder"]["prefix_tokens"] == list(encoder.prefix)
        adapted = [name for names in taken["peft"].values() for name in names]
        assert [type(model.get_submodule(name)).__name__ for name in adapted] == [
            kind.__name__ for kind, members in model.adapters.items() for _ in members
        ]
        for split, loader in (("train", trainer.train_loader), ("val", trainer.val_loader)):
            told = taken["dataloading"][split]
            assert told["num_workers"] == (loader.workers if loader.uses_processes else 0)
            assert told["batches"] == len(loader) and told["in_memory"] == loader.held
        assert taken["logger"] == trackers[-1]
    assert taken["dataloading"]["train"]["num_workers"] == 1 and adapted
    assert taken["training"]["precision"] == "bf16"
    assert taken["model"]["feature_aggregation_method"] == "joint"
    assert taken["model"]["encoder"]["prefix_tokens"] == ["cls"]


def test_a_run_without_checkpoints_leaves_the_same_results(command, refused, monkeypatch):
    """Metrics and predictions of the best epoch, no weights; interrupted it starts over."""
    changes = ("task.bootstrap=20", "optimizer.lr=0.05", "training.epochs=3")
    kept = command(*changes, "name=kept")
    off = "training.enable_checkpointing=false"
    run = command(*changes, "name=off", off)
    assert not list(run.path.rglob("*.pt")) and "no weights were kept" in run.out
    for name in ("predictions_test.csv", "predictions_val.csv"):
        assert (run.path / name).read_bytes() == (kept.path / name).read_bytes()
    assert run.json("metrics_test.json") == kept.json("metrics_test.json")
    assert "nothing to do" in command(*changes, "name=off", off).out
    assert "keeps no model for mode infer" in refused(*changes, "name=off", off, "mode=infer")

    def stop(*arguments):
        raise UserError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(run_train, "finish", stop)
        command(*changes, "name=cut", off, code=2)
    again = command(*changes, "name=cut", off)
    assert "was interrupted without a checkpoint: it starts over" in again.out
    assert (again.path / "predictions_test.csv").read_bytes() == (
        run.path / "predictions_test.csv"
    ).read_bytes()


def test_train_results_and_plots_only_if_asked(command, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "glovita_lib.results.plots.plot_results", lambda path, *a, **k: drawn.append(a[0])
    )
    for name in ("results.plot_worst", "run_train.plot_augmented", "run_train.learning_curves"):
        monkeypatch.setattr(f"glovita_lib.{name}", lambda *arguments, **options: None)
    run = command("task.result_plot=all", "training.epochs=1")
    assert len(run.rows("train")) == run.json("metrics_train.json")["n"] == 117
    assert drawn == ["train", "val", "test"]
    command("task.result_plot=val", "training.epochs=1", "name=held_out")
    assert drawn[3:] == ["val", "test"]


def test_lines_of_metrics(command):
    run = command("training.log_every=3", "training.epochs=2")
    epochs, steps = run.records(), run.records("step")
    assert [record["step"] for record in steps] == [3, 6]
    assert [record["epoch"] for record in steps] == [0, 1]
    assert [record["step"] for record in epochs] == [4, 8]  # ceil(117 / 32) steps an epoch
    for record in steps:
        assert record.keys() == {
            *("event", "epoch", "step", "samples", "train_loss", "train_acc"),
            *("lr", "samples_per_s", "memory_mb"),
        }
    for record in epochs:
        assert {"val_loss", "val_acc", "val_f1", "best", "best_epoch", "lr"} < record.keys()
        assert record["samples_per_s"] > 0 and 0 < record["memory_mb"] < 1e6
    best = max(epochs, key=lambda record: record["val_acc"])
    assert epochs[-1]["best"] == best["val_acc"]


def test_predictions_are_those_of_the_best_epoch(command):
    run = command(
        "training.epochs=4", "optimizer.lr=0.03", "training.best_checkpoint_metric=val_acc"
    )
    epochs = run.records()
    values = [record["val_acc"] for record in epochs]
    assert run.json("metrics_val.json")["metrics"]["acc"] == max(values)
    right = [row["label"] == row["prediction"] for row in run.rows("val")]
    assert np.mean(right) == pytest.approx(max(values), abs=1e-12)
    ids = [row["id"] for row in run.rows("val")]
    assert len(set(ids)) == len(ids) == 270


def test_the_written_spec_runs_again_and_finds_its_run(command):
    run = command("optimizer.lr=0.002")
    before = snapshot(run.path)
    again = command(spec=run.path / "spec.toml")
    assert "was finished before" in again.out
    assert again.path == run.path and snapshot(run.path) == before
    accuracy = run.json("metrics_test.json")["metrics"]["acc"]
    assert f"{accuracy:.4f}" in again.out and str(run.path / "checkpoints" / "best.pt") in again.out
    assert load_checked(str(run.path / "spec.toml"), []).plain == {
        **run.json("config.json"),
        "name": "tiny,optimizer.lr=0.002",
    }


def test_the_written_spec_trains_the_same_model_elsewhere(command, tmp_path):
    run = command("optimizer.lr=0.002")
    copy = tmp_path / "copy.toml"
    shutil.copy(run.path / "spec.toml", copy)
    other = command("name=elsewhere", spec=copy)
    assert other.path != run.path
    for key, value in run.best["model"].items():
        assert torch.equal(value, other.best["model"][key]), key
    assert other.rows() == run.rows()


# ---------------------------------------------------------------------- which model is kept


def test_regression_keeps_the_model_of_the_lowest_error(command, table_spec):
    run = command(
        "training.epochs=6",
        "optimizer.lr=0.05",
        'task.metrics=["mae", "mse", "r2"]',
        "training.best_checkpoint_metric=val_mae",
        spec=table_spec("regression"),
    )
    errors = [record["val_mae"] for record in run.records()]
    assert int(np.argmin(errors)) != int(np.argmax(errors))
    assert (
        run.best["state"]["epoch"] - 1 == int(np.argmin(errors)) == run.records()[-1]["best_epoch"]
    )
    assert run.json("metrics_val.json")["metrics"]["mae"] == min(errors)
    rows = run.rows("val")
    mae = np.mean([[abs(float(r[f"label_{t}"]) - float(r[f"prediction_{t}"]))
                    for t in ("bright", "top")] for r in rows])  # fmt: skip
    assert mae == pytest.approx(min(errors), rel=1e-6)


@pytest.mark.parametrize(("logged", "pick"), [("val_f1", max), ("val_loss", min)])
def test_the_best_metric_by_its_logged_name(command, logged, pick):
    run = command(
        f"training.best_checkpoint_metric={logged}", "training.epochs=5", "optimizer.lr=0.1"
    )
    values = [record[logged] for record in run.records()]
    assert run.best["state"]["epoch"] - 1 == values.index(pick(values))
    assert run.best["state"]["best"] == pick(values)
    assert run.last["state"]["epoch"] == 5


def test_a_run_moves_between_machines_whose_folders_differ(command, monkeypatch):
    """Paths are kept as written: another value of their variable is no other experiment."""
    monkeypatch.setenv("PLACE", "/here")
    run = command("data.data_root_dir=$PLACE/x", "training.epochs=1", "name=r")
    assert run.json("config.json")["data"]["data_root_dir"] == "$PLACE/x"
    assert 'data_root_dir = "$PLACE/x"' in (run.path / "spec.toml").read_text()
    assert run.last["spec"]["data"]["data_root_dir"] == "$PLACE/x"
    monkeypatch.setenv("PLACE", "/there")
    again = command(spec=run.path / "spec.toml")
    assert again.path == run.path and "was finished before" in again.out
    asked = command("mode=infer", "data.val_fraction=0.2", spec=run.path / "spec.toml", code=2)
    assert "data.val_fraction: 0.15 -> 0.2" in asked.err and "data_root_dir" not in asked.err
    split = ["infer.split=val", "data.val_fraction=0.2", f"infer.checkpoint={run.path}"]
    split[-1] += "/checkpoints/best.pt"
    noted = command("mode=infer", *split, "data.data_root_dir=$PLACE/x")
    assert "was trained with data.val_fraction" in noted.out  # the same data, cut otherwise


def test_an_unknown_metric_is_refused_before_training(refused):
    line = refused("training.best_checkpoint_metric=val_f2")
    assert "val_f2" in line and "val_f1" in line


def test_early_stopping(command):
    patient = ["training.early_stopping_patience=2", "training.early_stopping_min_delta=0.9"]
    run = command(*patient, "training.epochs=9")
    assert [record["epoch"] for record in run.records()] == [0, 1, 2]
    assert run.last["state"]["stopped"] and run.json("runtime_info.json")["finished"]
    calm = command("training.early_stopping_patience=2", "training.epochs=2")
    assert not calm.last["state"]["stopped"]


def test_kept_epochs(command):
    run = command("training.save_every=2", "training.epochs=5")
    names = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert names == {"last.pt", "best.pt", "epoch_0001.pt", "epoch_0003.pt"}
    kept = torch.load(run.path / "checkpoints" / "epoch_0003.pt", weights_only=True)
    assert kept["state"]["epoch"] == 4


# ---------------------------------------------------------------------- how long, how much


def test_step_caps_and_a_whole_final_evaluation(command):
    caps = ["training.train_steps_per_epoch=2", "training.val_steps_per_epoch=1"]
    run = command(*caps, "training.gradient_accumulation_steps=1", "training.epochs=3")
    assert [record["step"] for record in run.records()] == [2, 4, 6]
    assert run.json("metrics_val.json")["n"] == len(run.rows("val")) == 270
    for record in run.records():  # 32 samples: accuracies are multiples of 1/32
        assert (record["val_acc"] * 32) == pytest.approx(round(record["val_acc"] * 32))
    assert run.json("resolved_config.json")["samples"]["val"] == 270


@pytest.mark.parametrize("asked", [0, 2])
def test_sanity_batches_come_first(command, monkeypatch, asked):
    calls = []

    def spied(*arguments, max_batches=None, **options):
        calls.append(max_batches)
        return evaluate(*arguments, max_batches=max_batches, **options)

    evaluate = SupervisedObjective.evaluate
    monkeypatch.setattr(SupervisedObjective, "evaluate", spied)
    command(f"training.num_sanity_val_steps={asked}", "training.epochs=2")
    held_out = 2  # val and test with the best model
    assert calls == [asked] * (asked > 0) + [None, None] + [None] * held_out


def test_bf16_on_the_cpu(command):
    half = command("training.precision=bf16", "name=half")
    full = command("training.precision=no", "name=full")
    assert half.records()[0]["train_loss"] != full.records()[0]["train_loss"]
    assert half.records()[0]["train_loss"] == pytest.approx(
        full.records()[0]["train_loss"], rel=0.02
    )
    assert {value.dtype for value in half.best["model"].values()} == {torch.float32}
    again = command("mode=infer", "training.precision=bf16", "name=half")
    assert (again.path / "infer" / "predictions_test.csv").read_bytes() == (
        half.path / "predictions_test.csv"
    ).read_bytes()


def test_fp16_is_refused_on_the_cpu(refused):
    assert "needs a GPU" in refused("training.precision=fp16")


@pytest.mark.compiles
def test_compiled_training_has_the_same_keys_and_results(command):
    changes = ["training.epochs=1", "training.train_steps_per_epoch=1", "training.ema_decay=0.5"]
    changes += ["model.encoder.encoder_type=custom", "model.encoder.target=small_runs:one_layer"]
    changes += ["dataloading.eval_batch_size=270"]
    plain = command(*changes, "name=plain")
    changes += ["training.compile=true", "name=compiled"]
    compiled = command(*changes)
    assert compiled.best["model"].keys() == plain.best["model"].keys()
    assert compiled.records()[0]["val_loss"] == pytest.approx(
        plain.records()[0]["val_loss"], rel=1e-5
    )
    command("mode=infer", *changes)
    assert (compiled.path / "infer" / "predictions_test.csv").read_bytes() == (
        compiled.path / "predictions_test.csv"
    ).read_bytes()
    assert "dry run passed" in command(*changes, flags=["--dry-run"]).out


def test_a_dry_run_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run = command("task.result_plot=val", flags=["--dry-run"])
    assert "dry run passed" in run.out
    assert snapshot(tmp_path) == {"temporary/": b""}


def test_parameter_groups_are_printed_and_saved(command):
    changes = ("optimizer.layer_wise_lr_decay=0.5", "optimizer.undecay_norm=true")
    changes += ("peft.method=partial_finetuning", "peft.num_frozen_layers=1", "training.epochs=1")
    dry = command(*changes, flags=["--dry-run"])
    run = command(*changes, "name=groups")
    with (run.path / "parameter_groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    model = run.best["model"]
    assert [row["parameter"] for row in rows] == [
        n for n in model if n in {r["parameter"] for r in rows}
    ]
    for row in rows:
        assert row["shape"] == " x ".join(map(str, model[row["parameter"]].shape))
    trained = [row for row in rows if row["group"]]
    assert {row["layer"] for row in trained} == {"2", "3"}
    assert {row["layer"] for row in rows if not row["group"]} == {"0", "1"}
    saved = run.last["optimizer"]["param_groups"]
    for number, group in enumerate(saved):
        own = [row for row in trained if int(row["group"]) == number]
        assert len(own) == len(group["params"])
        assert {float(row["lr_factor"]) for row in own} == {group["lr_scale"]}
        assert {float(row["weight_decay"]) for row in own} == {group["weight_decay"]}
    table = dry.out[dry.out.index("group  layers") :].splitlines()[1:]
    printed = [line.split() for line in table[: len(saved)]]
    assert [float(line[2]) for line in printed] == [0.5, 0.5, 1, 1]
    assert sum(int(line[4]) for line in printed) == len(trained)


# ---------------------------------------------------------------------- starting again


def test_resume_overwrite_new(command):
    first = command()
    before = snapshot(first.path)
    assert "was finished before" in command("training.on_existing=resume").out
    assert snapshot(first.path) == before
    command("training.on_existing=overwrite", "optimizer.lr=0.01", "name=tiny")
    assert first.json("config.json")["optimizer"]["lr"] == 0.01
    assert len(first.records()) == 2 and first.json("runtime_info.json")["continued"] == []
    kept = snapshot(first.path)
    command("training.on_existing=new", "name=tiny")
    beside = first.path.parent.with_name("tiny_2") / "0"
    assert json.loads((beside / "config.json").read_text())["optimizer"]["lr"] == 0.001
    assert snapshot(first.path) == kept
    command("training.on_existing=new", "name=tiny")
    assert (beside.parent.with_name("tiny_3") / "0" / "predictions_test.csv").is_file()
    again = command(spec=beside / "spec.toml")  # the written spec finds its own run
    assert f"{beside} was finished before" in again.out
    assert not beside.parent.with_name("tiny_4").exists()


def test_a_finished_run_says_what_was_taken_away(command):
    first = command()
    gone = [first.path / name for name in ("checkpoints/best.pt", "predictions_test.csv")]
    assert "is not there" not in command().out
    for path in gone:
        path.unlink()
    again = command()
    assert "was finished before" in again.out
    for path in gone:
        assert f"{path} (is not there any more)" in again.out
    assert again.out.count("is not there") == len(gone)


def test_overwriting_leaves_nothing_of_the_old_run_and_others_files_alone(command):
    run = command("training.save_every=1", "training.epochs=3", "name=tiny")
    for stale in ("plots/old.png", "predictions_train.csv", "metrics_train.json", "notes.txt"):
        (run.path / stale).parent.mkdir(exist_ok=True)
        (run.path / stale).write_text("{}")
    command("training.on_existing=overwrite", "name=tiny", "training.epochs=1")
    names = folders_and_files(run.path)
    assert not any("train" in name or "epoch_" in name for name in names)
    assert "notes.txt" in names and "plots" not in names


def test_a_changed_spec_lists_its_keys(command, refused):
    run = command()
    line = refused("name=tiny", "optimizer.lr=0.5", "training.epochs=7", "seed=3")
    for part in ("seed: 0 -> 3", "optimizer.lr: 0.001 -> 0.5", "training.epochs: 2 -> 7",
                 str(run.path), 'on_existing = "overwrite"', '"new"', "another name"):  # fmt: skip
        assert part in line


def test_what_is_not_the_experiment_may_change(command):
    command()
    again = command("training.log_every=1", "dataloading.num_workers=0", "add_log.note=x")
    assert "was finished before" in again.out


def test_overrides_fill_their_own_directories(command):
    paths = [command(f"optimizer.lr={lr}").path for lr in ("1e-3", "1e-2")]
    assert [path.parent.name for path in paths] == [
        "tiny,optimizer.lr=0.001",
        "tiny,optimizer.lr=0.01",
    ]
    for lr, path in zip(("1e-3", "1e-2"), paths, strict=True):
        before = (path / "predictions_test.csv").read_bytes()
        found = command(f"optimizer.lr={lr}", "mode=infer")
        assert found.path == path
        assert (path / "infer" / "predictions_test.csv").read_bytes() == before
    assert "was finished before" in command("optimizer.lr=0.001").out


def test_the_console_says_where_everything_is(command):
    run = command()
    for path in ("checkpoints/best.pt", "predictions_test.csv", "metrics_test.json"):
        assert str(run.path / path) in run.out
    assert "epoch 1/2" in run.out and "epoch 2/2" in run.out and "is finished" in run.out


# ---------------------------------------------------------------------- folds


def test_folds_differ_are_disjoint_and_are_summarised(command, table_spec):
    spec = table_spec(
        "multilabel", split_source='"kfold"', n_folds="3", group_column='"patient"'
    ).replace('label_column = ["odd", "big", "zero"]', 'label_column = ["odd", "big"]')
    runs = [command(f"data.fold={fold}", "training.epochs=1", spec=spec) for fold in range(3)]
    assert [run.path.name for run in runs] == ["0", "1", "2"]
    tests = [{row["id"] for row in run.rows()} for run in runs]
    assert sum(map(len, tests)) == len(set.union(*tests)) == 90  # disjoint, and every image once
    patients = [{int(name.split(".")[0]) // 2 for name in names} for names in tests]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 45
    for run, test in zip(runs, tests, strict=True):
        assert not test & {row["id"] for row in run.rows("val")}
    values = [run.json("metrics_test.json")["metrics"]["f1"] for run in runs]
    summary = json.loads((runs[0].path.parent / "summary.json").read_text())
    assert summary["test"]["folds"] == ["0", "1", "2"]
    assert summary["test"]["metrics"]["f1"]["mean"] == pytest.approx(np.mean(values))
    assert summary["test"]["metrics"]["f1"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert summary["test"]["samples"] == 90 and summary["test"]["repeated_ids"] == 0
    rows = [row for run in runs for row in run.rows()]
    right = [row["label_odd"] == row["prediction_odd"] for row in rows]
    right += [row["label_big"] == row["prediction_big"] for row in rows]
    assert summary["test"]["pooled"]["acc"] == pytest.approx(np.mean(right))
    assert len({run.records()[0]["train_loss"] for run in runs}) == 3


def test_data_of_one_split_have_no_second_fold(refused):
    assert "fold" in refused("data.fold=1")


def test_class_folders(command, folder_spec):
    run = command(spec=folder_spec)
    assert run.json("resolved_config.json")["class_names"] == ["one", "two", "zero"]
    assert {row["label"] for row in run.rows()} == {"one", "two", "zero"}
    assert all(row["id"].startswith("test/") for row in run.rows())
