"""Runs on videos do not depend on how they are carried out: killed and continued, in memory or by
workers, on two ranks, in mode infer, with broken files left out; every mode takes them."""

import csv
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from children import glovita, run_ranks
from killed_runs import (
    KILLED,
    arguments,
    assert_equal_results,
    assert_killed_run_goes_on,
    results,
)
from small_runs import Result
from video_files import number_of, numbered, write_frames, write_video

from glovita_lib import figures

pytest.importorskip("av")
pytest.importorskip("decord")

SPEC = """
[data]
dataset = "generic_video_dataset"
data_root_dir = "ROOT"
label_source = "csv"
split_source = "csv"
strict = false
[data.sampling]
frames = 4
stride = 2
train_clips = 2
clips = 3
[data.augmentation]
image_size = 16
train_policy = "default_2d_5"
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = 1
strides = [1, 2]
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 2
save_every_steps = 1
log_every = 1
[dataloading]
batch_size = 3
num_workers = 0
[logger]
backend = "none"
"""
BAG = """
[model.head]
head_type = "abmil"
hidden = 8
attention = 4
"""
WINDOWS = ["lift=windows", "windows.size=[4, 16, 16]", "windows.stride=[4, 16, 16]"]
BAGS = ["data.sampling.combine=bag", *(f"model.encoder.{change}" for change in WINDOWS)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Twelve videos in two classes and three splits, one of them shorter than a clip, some read in
    order, one a folder of frames; and two that are broken."""
    folder = tmp_path_factory.mktemp("set")
    rows = []
    for i in range(12):
        frames = numbered(3 if i == 1 else 9 + i, seed=i)
        name, codec = (f"{i:02d}.mp4", "libx264") if i % 3 else (f"{i:02d}.mpg", "mpeg1video")
        if i == 4:
            name = "04"
            write_frames(folder / "videos" / name, frames)
        else:
            write_video(folder / "videos" / name, frames, codec=codec)
        split = "train" if i < 6 else "val" if i < 9 else "test"
        rows.append((name, ("slow", "fast")[i % 2], split))
    (folder / "videos" / "empty.mp4").touch()
    (folder / "videos" / "sound.mp4").write_bytes(b"ftyp" * 9)
    rows += [("empty.mp4", "slow", "train"), ("sound.mp4", "fast", "test")]
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return folder


@pytest.fixture
def spec(root) -> str:
    return SPEC.replace("ROOT", str(root))


@pytest.mark.runs
@pytest.mark.parametrize("memory", ["in memory", "by workers"])
def test_a_killed_run_goes_on_bit_for_bit(command, tmp_path, monkeypatch, spec, memory):
    """Within an epoch; clips and their augmentation follow from seed, epoch and batch."""
    changes = ["dataloading.in_memory_mb=0", "dataloading.num_workers=2"] * (memory == "by workers")
    said = "2 videos left out:"
    assert_killed_run_goes_on(command, tmp_path, monkeypatch, spec, said, *changes)


@pytest.mark.runs
def test_memory_and_workers_change_nothing(command, tmp_path, spec):
    """Weights and predictions are equal whether videos are in memory, read by this process or by
    others."""
    found = []
    for number, (memory, workers) in enumerate([(1000, 0), (0, 0), (0, 2), (0, 1)]):
        changes = [f"dataloading.in_memory_mb={memory}", f"dataloading.num_workers={workers}"]
        run = command(f"name=run{number}", *changes, spec=spec)
        found.append((run.last["model"], run.rows()))
    for weights, rows in found[1:]:
        assert rows == found[0][1]
        assert all(torch.equal(weights[name], tensor) for name, tensor in found[0][0].items())


@pytest.mark.runs
def test_a_patch_size_is_that_of_the_frames_encoder(command, spec):
    """Trained with it and read back with it."""
    vit = """encoder_type = "timm"
type = "test_vit"
pretrained = false
lift = "slices"
"""
    start, end = spec.index('encoder_type = "residual'), spec.index("[task]")
    spec = (spec[:start] + vit + spec[end:]).replace("epochs = 2", "epochs = 1")
    asked = ["name=run", "data.augmentation.patch_size=[8, 4]"]
    run = command(*asked, spec=spec)
    shapes = [tensor.shape[-2:] for name, tensor in run.last["model"].items()
              if name.endswith("patch_embed.proj.weight")]  # fmt: skip
    assert shapes == [(8, 4)]
    command(*asked, "mode=infer", spec=spec)
    name = "predictions_test.csv"
    assert (run.path / "infer" / name).read_bytes() == (run.path / name).read_bytes()


@pytest.mark.runs
def test_what_a_run_keeps_is_said_where_features_are_read_out_otherwise(command, tmp_path, spec):
    """Also a default that the run was trained without; of the same spec nothing is said."""
    out = ["name=run", "mode=extract", "extract.split=test", f"extract.output_dir={tmp_path}"]
    command("name=run", "data.sampling.clips=3", "training.epochs=1", spec=spec)
    told = command(*out, "data.sampling.clips=3", spec=spec).out
    assert "has no effect" not in told
    told = command(*out, "data.sampling.clips=1", spec=spec).out
    assert "note: data.sampling.clips = 1 has no effect: " in told
    told = command(*out, "data.sampling.clips=1", "extract.output=tokens", spec=spec, code=2).err
    assert "data.sampling.clips = 1 as trained" in told


@pytest.mark.runs
def test_features_of_another_frame_rate_are_others(command, tmp_path, spec):
    """Clips are cut by it, and files tell the times of their frames."""
    out = ["mode=extract", "extract.source=encoder", f"extract.output_dir={tmp_path}"]
    for split, code in (("train", 2), ("test", 0)):  # folders of frames are in train alone
        asked = [*out, f"extract.split={split}", "data.sampling.stride=1", "data.sampling.fps=5"]
        command(*asked, spec=spec)
        assert "nothing to do" in command(*asked, spec=spec).out
        again = command(*asked, "data.reading.frame_rate=10", spec=spec, code=code)
        assert ("another frame_times_sha256" in again.err) == (code == 2)


@pytest.mark.runs
@pytest.mark.parametrize("how", ["logits", "probabilities", "bag"])
def test_every_mode(command, tmp_path, root, spec, how):
    changes = [f"data.sampling.combine={how}"] if how != "bag" else BAGS
    spec = spec + BAG if how == "bag" else spec
    run = command("name=run", *changes, spec=spec)
    assert [row["id"] for row in run.rows()] == ["09.mpg", "10.mp4", "11.mp4"]
    command("name=run", "mode=infer", *changes, spec=spec)
    for file in ("predictions_test.csv", "metrics_test.json"):
        assert (run.path / "infer" / file).read_bytes() == (run.path / file).read_bytes()
    best = f"infer.checkpoint={run.path}/checkpoints/best.pt"
    told = command("mode=infer", best, *changes, "data.sampling.frames=3", spec=spec).out
    assert "note: data.sampling.frames = 3 has no effect: " in told
    new = tmp_path / "new"
    write_video(new / "deep" / "a.mp4", numbered(9, seed=3))
    write_video(new / "b.mpg", numbered(30, seed=4), codec="mpeg1video")
    command("name=run", "mode=infer", f"infer.input={new}", *changes, spec=spec)
    with open(run.path / "infer" / "predictions_new.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["b.mpg", "deep/a.mp4"]
    out = f"extract.output_dir={tmp_path}"
    command("name=run", "mode=extract", "extract.split=test", out, *changes, spec=spec)
    (path,) = tmp_path.glob("*.h5")
    with h5py.File(path) as file:
        assert file["features"].shape == (3, 8) and np.isfinite(file["features"][:]).all()
        assert [name.decode() for name in file["ids"][:]] == ["09.mpg", "10.mp4", "11.mp4"]
    command("name=run", "mode=umap", "umap.method=pca", *changes, spec=spec)
    assert (run.path / "umap" / "pca.csv").is_file()


@pytest.mark.runs
@pytest.mark.parametrize("how", ["logits", "bag"])
def test_sheets_show_frames_of_augmented_and_of_the_worst_clips(command, spec, how, monkeypatch):
    """Four frames of each, by their numbers, of the very videos; every video once."""
    seen = {}

    def note(name, draw):
        def drawn(images, *rest, **options):
            seen[name] = (images, rest, options)
            draw(images, *rest, **options)

        monkeypatch.setattr(figures, name, drawn)

    for name in ("augmented_sheet", "worst_sheet"):
        note(name, getattr(figures, name))
    spec = spec.replace('result_plot = "none"', "") + (BAG if how == "bag" else "")
    run = command("training.epochs=1", *(BAGS if how == "bag" else []), spec=spec)
    for name in ("augmented", "worst_test", "worst_val"):
        assert (run.path / "plots" / f"{name}.png").is_file()
    stored, (augmented,), options = seen["augmented_sheet"]
    videos = len(set(options["captions"]))
    assert augmented.shape == (7, videos, 3, 33, 33) and videos == len(stored) >= 2
    assert all(image.shape[0] == 3 for image in stored)
    worst, _, options = seen["worst_sheet"]
    assert len(worst) == 3
    for image, name in zip(worst, options["ids"], strict=True):
        shown = [number_of(part.transpose(1, 2, 0)) for part in quarters(image)]
        last = 9 + int(name.partition(".")[0])
        assert shown == sorted(set(shown)) and shown[0] < 3 and last - 4 < shown[-1] < last


def quarters(image):
    """The four frames (C, H, W) of a picture, with a line between them."""
    (height, width), gap = image.shape[1:], 1
    tall, wide = (height - gap) // 2, (width - gap) // 2
    for top in (0, tall + gap):
        for left in (0, wide + gap):
            yield image[:, top : top + tall, left : left + wide]


@pytest.mark.runs
def test_vectors_of_a_frozen_encoder_are_kept(command, spec):
    """Training on kept vectors is training on the clips themselves, where they are in the middle
    and nothing is drawn."""
    still = [
        "peft.method=linear_probing",
        "data.sampling.train=middle",
        "data.sampling.train_clips=1",
        "data.augmentation.train_policy=default_2d_1",
    ]
    kept = command("name=kept", *still, "training.cache_frozen_features=true", spec=spec)
    plain = command("name=plain", *still, spec=spec)
    for a, b in zip(kept.rows(), plain.rows(), strict=True):
        assert float(a["p_slow"]) == pytest.approx(float(b["p_slow"]), abs=1e-5)
    cache = ["name=no", "training.cache_frozen_features=true", "peft.method=linear_probing"]
    refused = command(*cache, spec=spec, code=2)
    assert 'train_policy = "default_2d_1", data.sampling.train = "middle", data' in refused.err
    again = command(*cache, *still[:2], still[3], spec=spec, code=2).err
    assert "set data.sampling.train_clips = 1, or leave it out" in again
    refused = command(*still, *cache[:2], "data.sampling.combine=probabilities", spec=spec, code=2)
    assert 'set data.sampling.combine = "logits"' in refused.err


@pytest.mark.runs
def test_attention_of_frames_says_which_they_are(command, spec):
    """Of the middle of a video, and of one that is shorter than a clip."""
    changes = ["model.encoder.lift=slices", "data.sampling.clips=1", "name=frames"]
    encoder = ["encoder_type=timm", "type=test_resnet", "pretrained=false"]
    dropped = ("features_per_stage", "n_blocks_per_stage", "strides", "encoder_type")
    lines = [line for line in (spec + BAG).splitlines() if not line.startswith(dropped)]
    changes += [f"model.encoder.{change}" for change in encoder]
    spec = "\n".join(lines)
    run = command(*changes, spec=spec)
    command("mode=infer", "infer.attention=true", "infer.split=train", *changes, spec=spec)
    with h5py.File(next(run.path.glob("infer/attention_train.h5"))) as file:
        ids, ptr = file["ids"].asstr()[:].tolist(), file["bag_ptr"][:]
        assert file.attrs["coords"] == "frame"
        for video, count in (("00.mpg", 9), ("01.mp4", 3)):
            own = slice(*ptr[ids.index(video) :][:2])
            first = max(count - 1 - 6, 0) // 2
            expected = np.minimum(first + 2 * np.arange(4), count - 1)
            assert file["frames"][own].tolist() == expected.tolist()
            np.testing.assert_allclose(file["times"][own], expected / 25)


@pytest.mark.processes
def test_two_ranks_learn_what_one_learns(command, tmp_path, spec):
    """Two ranks that are killed within an epoch and continued equal two that are left alone, bit
    for bit; and one process that accumulates two batches, up to the order of sums. Each video is
    predicted once."""
    changes = ["optimizer.name=SGD", "optimizer.lr=0.01", "dataloading.batch_size=2"]
    ranks = arguments(tmp_path / "ranks", spec, *changes)
    glovita(*ranks, ranks=2)
    expected = results(tmp_path / "ranks" / "runs")
    os.rename(tmp_path / "ranks" / "runs", tmp_path / "calm")
    assert {one.code for one in run_ranks(KILLED, 4, *ranks)} == {9}
    assert "after optimizer step 4" in glovita(*ranks, ranks=2)
    assert_equal_results(results(tmp_path / "ranks" / "runs"), expected)
    (path,) = (tmp_path / "calm").glob("**/run/0")
    two = Result(0, "", "", path)
    one = command(*changes, "training.gradient_accumulation_steps=2", spec=spec)
    losses = ([r["train_loss"] for r in run.records("step")] for run in (two, one))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for key, value in one.last["model"].items():
        torch.testing.assert_close(two.last["model"][key], value, rtol=1e-3, atol=2e-5)
    assert [row["id"] for row in two.rows()] == [row["id"] for row in one.rows()]


@pytest.mark.processes
@pytest.mark.parametrize("how", ["logits", "bag"])
def test_two_ranks_read_out(command, tmp_path, spec, how):
    """Predictions and features of videos are those of one process, byte for byte, where its batches
    are the same."""
    changes = ["training.epochs=1", "dataloading.eval_batch_size=1"]
    changes += BAGS if how == "bag" else []
    spec = spec + BAG if how == "bag" else spec
    best = command(*changes, spec=spec).path / "checkpoints" / "best.pt"
    infer = ["mode=infer", f"infer.checkpoint={best}"]
    extract = ["mode=extract", "extract.split=test", "extract.output_filename='{split}.h5'"]
    extract += [f"extract.checkpoint={best}"]
    one, two = tmp_path / "one", tmp_path / "two"
    for mode, key in ((infer, "infer.output_dir"), (extract, "extract.output_dir")):
        command(*changes, *mode, f"{key}={one}", spec=spec)
        glovita(*arguments(tmp_path / "ranks", spec, *changes, *mode, f"{key}={two}"), ranks=2)
    for name in ("predictions_test.csv", "test.h5"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("changes", [(), ("data.sampling.clips=1", "name=one")])
def test_vectors_are_read_out_of_the_frames_that_are_predicted_with(
    command, spec, tmp_path, changes
):
    """Resized where they are decoded: the head on the vectors gives the predictions."""
    run = command(*changes, spec=spec)
    out = [f"extract.output_dir={tmp_path}", "extract.output_filename='{split}.h5'"]
    out += ["mode=extract", "extract.split=test", "extract.precision=32"]
    command(*changes, *out, spec=spec)
    head = torch.load(run.path / "checkpoints" / "best.pt", weights_only=True)["model"]
    (weight,) = (value for key, value in head.items() if key.startswith("head") and value.ndim == 2)
    (bias,) = (value for key, value in head.items() if key.startswith("head") and value.ndim == 1)
    with h5py.File(tmp_path / "test.h5") as file:
        logits = torch.from_numpy(file["features"][:]) @ weight.T + bias
    with open(run.path / "predictions_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    told = np.array([[float(row["p_fast"]), float(row["p_slow"])] for row in rows])
    np.testing.assert_allclose(logits.softmax(1), told, atol=2e-5)
