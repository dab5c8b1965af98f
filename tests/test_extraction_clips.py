"""Mode extract of a vector a clip: values, frames and times beside a plain loop over the clips,
bags of clips, drawn views, kills and ranks, heads of bags on the files; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from children import glovita
from small_videos import LENGTHS, SPEC, lit

from glovita import main
from glovita_lib import dist
from glovita_lib.experiment import Experiment, restore
from glovita_lib.feature_writer import BlockFiles
from glovita_lib.spec_check import load_checked

pytestmark = pytest.mark.runs

T, STRIDE, V = 4, 2, 3
LIGHTS = (
    SPEC.partition("[model.head]")[0].replace("small_videos:colours", "small_videos:lights")
    + '[task]\nresult_plot = "none"\nbootstrap = 0\n[training]\nepochs = 1\n'
    + "[dataloading]\nbatch_size = 4\nnum_workers = 0\n[logger]\nbackend = "
    + '"none"\n'
)
SAMPLING = ["data.sampling.clips=3", "data.sampling.stride=2"]
WINDOWS = ["lift=windows", "windows.size=[4, 8, 8]", "windows.stride=[4, 8, 8]"]
WINDOWS = [f"model.encoder.{change}" for change in WINDOWS]
VOLUMES = """encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = 1
strides = [1, 2]
"""
IMAGES = """encoder_type = "timm"
type = "test_resnet"
pretrained = false
lift = "inflate"
"""
SLICES = ["model.encoder.target=small_videos:image_network", "model.encoder.lift=slices"]
BAG = ["data.sampling.combine=bag", "model.head.head_type=abmil"]


def command(folder: Path, *overrides: str, encoder: str = "") -> int:
    """glovita.py on videos with a label each, with all its files in a folder.

    Args:
        encoder: the section model.encoder; none is the small network of clips.
    """
    path = folder / "lights.toml"
    before, (_, _, after) = LIGHTS.partition("encoder_type")[0], LIGHTS.partition("[task]")
    path.write_text(f"{before}{encoder}[task]{after}" if encoder else LIGHTS)
    return main([str(path), "--override", f"exp_dir={folder}/runs", *SAMPLING, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("lights")
    assert command(folder) == 0
    return folder


def best_of(folder: Path) -> Path:
    return next((folder / "runs").glob("*/*/0")) / "checkpoints" / "best.pt"


def experiment_of(folder: Path) -> Experiment:
    """The trained model, as mode extract reads it."""
    root = load_checked(folder / "lights.toml", [f"exp_dir={folder}/runs", *SAMPLING]).root
    return restore(best_of(folder), root, dist.Ranks(0, 1, 0, torch.device("cpu")))


@pytest.fixture
def read(trained: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What mode extract writes of a split, by default of the trained run, in 32 bits."""

    def extract(
        *overrides: str, output: str = "clips", split: str = "test", encoder: str = ""
    ) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        source = any(change.startswith("extract.source") for change in overrides)
        source = source or any(change.startswith("extract.checkpoint") for change in overrides)
        asked = ["mode=extract", f"extract.output={output}", "extract.precision=32"]
        asked += [] if source else [f"extract.checkpoint={best_of(trained)}"]
        asked += [f"extract.split={split}", f"extract.output_dir={out}", *overrides]
        assert command(trained, *asked, encoder=encoder) == 0
        (path,) = out.glob("*.h5")
        with h5py.File(path) as file:
            return {**file.attrs, **{name: values[()] for name, values in file.items()}}

    return extract


def expected_frames(count: int, *, uniform: bool = False) -> np.ndarray:
    """Frames (V, T) of the clips of a video, by their definition."""
    if uniform and count > T:
        return np.array([[int((t + (2 * v + 1) / (2 * V)) * count / T) for t in range(T)]
                         for v in range(V)])  # fmt: skip
    room = 0 if uniform else max(count - 1 - STRIDE * (T - 1), 0)
    steps = np.arange(T) * (1 if uniform else STRIDE)
    starts = [round(room * v / (V - 1)) for v in range(V)]
    return np.minimum(np.array(starts)[:, None] + steps, count - 1)


def normalised(frames: np.ndarray) -> torch.Tensor:
    """Frames (..., H, W, C) of videos of the encoder's size, as the encoder receives them."""
    mean, std = (np.array(each) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return torch.from_numpy((frames / 255 - mean) / std).float()


def starts_of(found: dict[str, Any]) -> list[slice]:
    """Rows of the clips of each video."""
    return [slice(*pair) for pair in zip(found["bag_ptr"], found["bag_ptr"][1:], strict=False)]


def assert_mean_is(clips: dict[str, Any], whole: dict[str, Any]) -> None:
    """The mean of the rows of each video is its one vector."""
    assert clips["ids"].tolist() == whole["ids"].tolist()
    assert clips["labels"].tolist() == whole["labels"].tolist()
    means = [clips["features"][rows].mean(0) for rows in starts_of(clips)]
    np.testing.assert_allclose(means, whole["features"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "small", [[], ["extract.block_samples=1", "dataloading.eval_batch_size=2"]]
)
def test_vectors_of_clips_are_those_of_a_plain_loop(trained: Path, read, small) -> None:
    """Of a trained run: values, frames, times; also of a video shorter than a clip, and of one
    whose frame rate varies. Their mean is the vector of the video."""
    found = read(*small)
    assert found["bag_ptr"].tolist() == list(range(0, 3 * len(LENGTHS) + 1, V))
    encoder = experiment_of(trained).model.eval().encoder
    for video, rows in zip(lit("test"), starts_of(found), strict=True):
        numbers = expected_frames(len(video.pixels))
        assert found["frames"][rows].tolist() == numbers.tolist()
        assert found["coords"][rows].tolist() == numbers[:, [0, -1]].tolist()
        times = numbers / video.fps if video.times is None else video.times[numbers]
        np.testing.assert_allclose(found["times"][rows], times)
        for own, frames in zip(found["features"][rows], numbers, strict=True):
            clip = normalised(video.pixels[frames]).permute(3, 0, 1, 2)  # (C, T, H, W)
            with torch.no_grad():
                maps = encoder(clip[None], pooled=False)
            np.testing.assert_allclose(own, maps.patches.mean(1)[0], rtol=1e-4, atol=1e-5)
    assert_mean_is(found, read(*small, output="embedding"))


@pytest.mark.parametrize(
    "sampling",
    [
        ["data.sampling.method=uniform", "data.sampling.stride=1"],
        ["data.sampling.combine=probabilities", "data.sampling.chunk=2"],
        ["data.sampling.clips=1"],
        SLICES,
        [*BAG, *SLICES],
        ["extract.method=sum"],
    ],
)
def test_the_mean_of_clips_is_the_vector_of_the_video(read, sampling: list[str]) -> None:
    """Of an encoder alone, also where all clips of a video are one input; clips differ."""
    source = ["extract.source=encoder", *sampling]
    found = read(*source)
    assert_mean_is(found, read(*source, output="embedding"))
    clips = 1 if "data.sampling.clips=1" in sampling else V
    uniform = "data.sampling.method=uniform" in sampling
    assert len(found["features"]) == clips * len(LENGTHS)
    if clips > 1:
        expected = [expected_frames(count, uniform=uniform) for count in LENGTHS]
        assert found["frames"].tolist() == np.concatenate(expected).tolist()
        assert len(np.unique(found["features"], axis=0)) == len(found["features"]) - V + 1


@pytest.mark.parametrize("lift", [WINDOWS, SLICES])
def test_clips_that_are_one_input_are_what_they_are_one_by_one(read, lift: list[str]) -> None:
    """Windows as long as a clip, and frames, of the long input of all clips."""
    own = {"encoder": VOLUMES} if lift is WINDOWS else {}
    plain = read("extract.source=encoder", *(SLICES if lift is SLICES else []), **own)
    found = read("extract.source=encoder", *BAG, *lift, **own)
    np.testing.assert_allclose(found["features"], plain["features"], rtol=1e-4, atol=1e-5)
    for name in ("frames", "times", "coords", "bag_ptr"):
        assert found[name].tolist() == plain[name].tolist()
    whole = read("extract.source=encoder", *BAG, *lift, **own, output="embedding")
    assert_mean_is(found, whole)


def test_windows_that_are_left_out_leave_a_clip_without_a_row(read) -> None:
    """The mean over the others is that of the video."""
    skip = ["extract.source=encoder", *BAG, *WINDOWS, "model.encoder.windows.skip_below=0.3"]
    found, whole = (
        read(*skip, encoder=VOLUMES, output=output) for output in ("clips", "embedding")
    )
    assert np.diff(found["bag_ptr"]).tolist() == [V, V, V - 1, V, V, V]
    assert found["frames"][starts_of(found)[2], 0].tolist() == [6, 13]
    assert_mean_is(found, whole)


def test_drawn_views_tell_the_frames_that_were_drawn(read) -> None:
    """Of the train split under its policy: a clip a video, anywhere in it."""
    draw = ["extract.use_eval_transform_for_train=false"]
    found = read(*draw, split="train")
    assert found["bag_ptr"].tolist() == list(range(len(LENGTHS) + 1))
    assert_mean_is(found, read(*draw, split="train", output="embedding"))
    starts = found["frames"][:, 0]
    assert all(0 <= start <= max(n - 7, 0) for start, n in zip(starts, LENGTHS, strict=True))
    assert starts.tolist() != [max(n - 7, 0) // 2 for n in LENGTHS]
    np.testing.assert_allclose(found["times"][2], found["frames"][2] / 25)


def test_layers_of_clips_stand_side_by_side(read) -> None:
    layers = ["extract.source=encoder", "extract.layers=[-1, -2]"]
    layers.append("data.augmentation.image_size=32")
    assert_mean_is(*(read(*layers, encoder=IMAGES, output=out) for out in ("clips", "embedding")))


class Killed(BaseException):
    """Nothing catches it."""


def test_an_extraction_that_is_killed_goes_on(read, trained, tmp_path, monkeypatch) -> None:
    """After two of the three blocks: byte for byte the file of one that was left alone."""
    small = ["extract.block_samples=2", "dataloading.eval_batch_size=2"]
    names = ["extract.output_filename=c.h5", f"extract.checkpoint={best_of(trained)}"]
    asked = ["mode=extract", "extract.output=clips", "extract.split=val", *small, *names]
    write, out = BlockFiles.write, f"extract.output_dir={tmp_path}/killed"

    def stopping(self, block, rows, readouts):
        if block == 2:
            raise Killed
        write(self, block, rows, readouts)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BlockFiles, "write", stopping)
        command(trained, *asked, out)
    assert len(list((tmp_path / "killed" / "c.h5.parts").glob("*.npz"))) == 2
    assert command(trained, *asked, out) == 0
    assert command(trained, *asked, f"extract.output_dir={tmp_path}/calm") == 0
    assert (tmp_path / "killed" / "c.h5").read_bytes() == (tmp_path / "calm/c.h5").read_bytes()


@pytest.mark.processes
def test_two_ranks_write_the_file_of_one(trained: Path, tmp_path: Path) -> None:
    """Three blocks of two videos: byte for byte."""
    asked = ["mode=extract", "extract.output=clips", "extract.split=test", *SAMPLING]
    asked += ["extract.block_samples=2", "dataloading.eval_batch_size=2"]
    asked += [f"extract.checkpoint={best_of(trained)}", "extract.output_filename=c.h5"]
    for ranks in (1, 2):
        out = f"extract.output_dir={tmp_path}/{ranks}"
        glovita(trained / "lights.toml", "--override", *asked, out, ranks=ranks)
    assert (tmp_path / "1" / "c.h5").read_bytes() == (tmp_path / "2" / "c.h5").read_bytes()


@pytest.mark.parametrize("head", ["abmil", "clam"])
def test_heads_of_bags_learn_from_clips(trained: Path, tmp_path: Path, head: str) -> None:
    """Attention names the first and the last frame of each clip."""
    for split in ("train", "val", "test"):
        asked = ["mode=extract", "extract.output=clips", f"extract.split={split}"]
        names = [f"extract.output_dir={tmp_path}", "extract.output_filename={split}.h5"]
        assert command(trained, *asked, f"extract.checkpoint={best_of(trained)}", *names) == 0
    spec = tmp_path / "bags.toml"
    spec.write_text(
        '[data]\ndataset = "precomputed_features"\n'
        + "".join(f'{s}_features_file = "{tmp_path}/{s}.h5"\n' for s in ("train", "val", "test"))
        + '[model.encoder]\nencoder_type = "precomputed"\n'
        f'[model.head]\nhead_type = "{head}"\n[training]\nepochs = 1\n'
        '[logger]\nbackend = "none"\n[task]\nresult_plot = "none"\nbootstrap = 0\n'
    )
    asked = [str(spec), "--override", f"exp_dir={tmp_path}/runs"]
    assert main(asked) == 0
    maps = ["infer.attention=true", "infer.attention_maps=2"]
    assert main([*asked, "mode=infer", *maps]) == 0
    (path,) = tmp_path.glob("runs/**/attention_test.h5")
    with h5py.File(path) as attention, h5py.File(tmp_path / "test.h5") as features:
        assert attention["coords"][:].tolist() == features["coords"][:].tolist()
        assert attention.attrs["coords"] == "first frame,last frame"


def test_clips_of_videos_with_labels_of_frames_are_bags_of_one(tmp_path: Path) -> None:
    """They are samples of their own, with their frames and times."""
    path = tmp_path / "colours.toml"
    path.write_text(SPEC)
    asked = ["mode=extract", "extract.source=encoder", "extract.split=test"]
    asked += ["extract.output=clips", f"extract.output_dir={tmp_path}"]
    assert main([str(path), "--override", f"exp_dir={tmp_path}/runs", *asked]) == 0
    (path,) = tmp_path.glob("clips_*.h5")
    with h5py.File(path) as file:
        assert file["bag_ptr"][:].tolist() == list(range(19))
        assert list(file["ids"].asstr())[5] == "test/0:20"
        assert file["frames"][5].tolist() == [20, 21, 21, 21]
        np.testing.assert_allclose(file["times"][5], np.array([20, 21, 21, 21]) / 25)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (BAG, "sees all clips of a video as one input"),
        ([*BAG, *WINDOWS, "model.encoder.windows.size=[6, 8, 8]"], "sees all clips of a video"),
        ([*BAG, *SLICES, "model.encoder.slices.adjacent=true"], "sees all clips of a video"),
        (["extract.bag_by=group"], 'bags are made of one vector a sample, not of "clips"'),
        (["extract.method=cls_token"], "cls_token"),
    ],
)
def test_what_has_no_clips_is_refused(trained: Path, tmp_path, capsys, overrides, said) -> None:
    """In one line, with nothing written."""
    asked = ["mode=extract", "extract.output=clips", "extract.source=encoder", *overrides]
    encoder = VOLUMES if WINDOWS[0] in overrides else ""
    assert command(trained, *asked, f"extract.output_dir={tmp_path}", encoder=encoder) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.h5*"))
