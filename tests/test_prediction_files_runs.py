"""Runs on more than 100 classes: what is read of their files, in every mode."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from glovita_lib.metrics import compute
from glovita_lib.prediction_files import read_predictions

K = 104
NAMES = tuple(f"class {k}, ü" for k in range(K))
SPEC = """
mode = "train"
[data]
dataset = "precomputed_features"
data_root_dir = "ROOT"
features_file = "all.h5"
split_source = "kfold"
n_folds = 3
[model.encoder]
encoder_type = "precomputed"
[task]
bootstrap = 0
result_plot = "none"
metrics = ["acc", "auroc", "ap"]
[training]
epochs = 1
[dataloading]
batch_size = 64
[optimizer]
lr = 3e-2
[logger]
backend = "none"
"""


def write_features(path: Path, subtask: str, *, k: int = K, labelled: bool = True) -> None:
    """Three noisy vectors of each of k classes."""
    rng = np.random.default_rng(0)
    classes = np.tile(np.arange(k), 3)
    features = np.eye(k, dtype=np.float32)[classes] * 4 + rng.normal(size=(len(classes), k))
    with h5py.File(path, "w") as file:
        file["features"] = features.astype(np.float32)
        file["ids"] = np.array([f"s,{i}" for i in range(len(classes))], object)
        if labelled:
            labels = (np.eye(k)[classes] + np.eye(k)[classes - 1]).astype(np.uint8)
            file["labels"] = classes if subtask == "multiclass" else labels
            file.attrs["class_names"] = NAMES[:k]


@pytest.mark.runs
@pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])
def test_folds_and_inference_of_many_classes(command, tmp_path: Path, subtask: str) -> None:
    write_features(tmp_path / "all.h5", subtask)
    metrics = ("acc", "auroc", "ap")
    kind = {"subtask": subtask, "class_names": NAMES}
    spec = SPEC.replace("ROOT", str(tmp_path))
    runs = [command(f"data.fold={fold}", "name=r", spec=spec) for fold in range(3)]
    assert "predictions_test.h5" in runs[0].out
    tables = []
    for run in runs:
        for split in ("val", "test"):
            table = read_predictions(run.path / f"predictions_{split}.csv", **kind)
            rows = run.rows(split)
            assert [row["id"] for row in rows] == table.ids and len(rows[0]) < 20
            found = compute(metrics, targets=table.targets, scores=table.scores, **kind)
            assert found == pytest.approx(run.json(f"metrics_{split}.json")["metrics"])
        tables.append(table)
    summary = json.loads((runs[0].path.parent / "summary.json").read_text())
    assert summary["left_out"] == {} and summary["test"]["folds"] == ["0", "1", "2"]
    targets = np.concatenate([table.targets for table in tables])
    scores = type(tables[0].scores).joined([table.scores for table in tables])
    pooled = compute(metrics, targets=targets, scores=scores, **kind)
    assert summary["test"]["pooled"] == pooled and summary["test"]["samples"] == 3 * K
    # several checkpoints and new samples
    write_features(tmp_path / "new.h5", subtask, labelled=False)
    new = (f"infer.input={tmp_path / 'new.h5'}", "infer.folds=[0,1,2]", "name=r", "mode=infer")
    told = command(*new, spec=spec)
    path = runs[0].path / "infer" / "predictions_new.csv"
    assert f"{path}, {path.with_suffix('.h5')}" in told.out
    table = read_predictions(path, **kind)
    assert table.targets is None and table.ids == [f"s,{i}" for i in range(3 * K)]
    members = [
        command(
            f"infer.folds=[{fold}]",
            f"infer.output_dir={tmp_path / str(fold)}",
            *new[:1],
            *new[2:],
            spec=spec,
        )
        for fold in range(3)
    ]
    assert len(members) == 3
    alone = [read_predictions(tmp_path / str(fold) / path.name, **kind) for fold in range(3)]
    mean = np.mean([member.scores.values for member in alone], 0)
    np.testing.assert_allclose(table.scores.values, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.runs
def test_predictions_of_the_same_name_replace_all_that_stood_there(
    command, refused, tmp_path: Path
) -> None:
    """No plots of the first stand beside the second; those of other samples replace nothing."""
    write_features(tmp_path / "all.h5", "multiclass", k=4)
    spec = SPEC.replace("ROOT", str(tmp_path)).replace('result_plot = "none"', "")
    run = command("name=r", spec=spec)
    folder = run.path / "infer"
    command("name=r", "mode=infer", spec=spec)
    assert (folder / "metrics_test.json").is_file()
    assert (folder / "plots" / "roc_pr_test.png").is_file()
    write_features(tmp_path / "test.h5", "multiclass", k=4, labelled=False)
    new = ("name=r", "mode=infer", f"infer.input={tmp_path / 'test.h5'}")
    assert "is of a split of the data set" in refused(*new, spec=spec)
    assert (folder / "metrics_test.json").is_file()
    command("name=r", "mode=infer", "task.result_plot=none", spec=spec)
    assert not list((folder / "plots").iterdir())
    out = tmp_path / "out"
    command(*new, f"infer.output_dir={out}", spec=spec)
    assert not (out / "metrics_test.json").exists()
    assert len((out / "predictions_test.csv").read_text().splitlines()) == 13
