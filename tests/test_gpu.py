"""What a GPU computes is what a CPU does, and no step waits for it: `python -m pytest -m gpu`.

All other tests hide the GPUs: they compare numbers to the last digit, which CPUs alone repeat.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from children import glovita
from conftest import Command
from planted_bags import plant
from small_runs import RESNET, TINY, Result
from test_attention_maps import SPEC as BAGS
from test_augment import augmenter as image_augmenter
from test_augment import photos
from test_augment_clips import augmenter as clip_augmenter
from test_augment_clips import clips
from test_augment_series import ALL, ragged
from test_augment_series import augmenter as series_augmenter
from test_augment_volumes import resolved as resolved_volumes
from test_augment_volumes import volumes
from test_data_series import made, write_ts
from test_data_volumes_runs import CONVOLUTIONS, PATCHES, SLICES, write_set
from test_data_volumes_runs import SPEC as VOLUMES
from test_encoder_series import SPEC as SERIES

from glovita_lib.augment_volumes import VolumeAugmenter
from glovita_lib.series_kernels import KernelFeatures
from glovita_lib.spec_augment import TRAIN, ImageKwargs
from glovita_lib.spec_volumes import VOLUME_TRAIN, VolumeKwargs
from glovita_lib.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not asked for by -m gpu"),
]
KINDS = ["vit", "cnn", "lora", "convolutions", "slices", "bags", "series"]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
WARM_UP = 2  # steps in which libraries choose and load kernels


@pytest.fixture(autouse=True)
def exact():
    """Products of all 24 bits."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(params=KINDS)
def kind(request, tmp_path) -> tuple[str, list[str]]:
    """A small spec and its overrides, one per kind of sample and of model."""
    return small_spec(request.param, tmp_path)


def small_spec(kind: str, folder: Path) -> tuple[str, list[str]]:
    """Data where it needs some, and the spec."""
    if kind in ("vit", "cnn", "lora"):
        more = ["peft.method=lora", "peft.rank=2"] if kind == "lora" else []
        policy = "data.augmentation.train_policy=default_2d_3"
        return (RESNET if kind == "cnn" else TINY), [policy, *more]
    if kind == "bags":
        bags = plant(folder, sizes={"train": 16, "val": 4, "test": 6})
        return BAGS.replace("HEAD", 'clam"\nsize_arg = "tiny'), bags.overrides
    if kind == "series":
        for name, count, seed in (("train", 24, 0), ("test", 12, 1)):
            series = made(count, seed, ragged=True, channels=2)
            write_ts(folder / f"{name}.ts", series, ["fast", "slow"] * (count // 2))
        return SERIES, [f"data.data_root_dir={folder}"]
    model = CONVOLUTIONS if kind == "convolutions" else SLICES
    return (VOLUMES + PATCHES + model).replace("ROOT", str(write_set(folder, broken=False))), []


def probabilities(run: Result, folder: str = "") -> np.ndarray:
    """Of a file of predictions, (N, K)."""
    rows = Result(0, "", "", run.path / folder).rows()
    return np.array([[float(r[k]) for k in r if k.startswith("p_")] for r in rows])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_is_read_out_as_it_was_trained(command: Command, kind, precision, tmp_path) -> None:
    """Mode infer gives the file of the run; without autocast a CPU gives its numbers."""
    spec, changes = kind
    changes = [*changes, f"training.precision={precision}"]
    run = command(*changes, spec=spec)
    assert f"device   cuda:0, precision {precision}" in run.out
    assert all(np.isfinite(record["train_loss"]) for record in run.records())
    command("mode=infer", *changes, spec=spec)
    found = probabilities(run)
    np.testing.assert_allclose(probabilities(run, "infer"), found, atol=1e-6)
    if precision == "no":
        arguments = [f"exp_dir={tmp_path / 'runs'}", "mode=infer", *changes]
        glovita(tmp_path / "tiny.toml", "--override", *arguments, env=NO_GPU)
        np.testing.assert_allclose(probabilities(run, "infer"), found, atol=1e-4)


def test_no_training_step_waits_for_the_gpu(command: Command, kind, monkeypatch) -> None:
    """From the batch in memory to the updated weights, as CUDA itself tells."""
    seen: list[str] = []

    def watched(method: Callable) -> Callable:
        def run(self: Trainer, *arguments) -> None:
            if self.state.step < WARM_UP:
                return method(self, *arguments)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    method(self, *arguments)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            seen.extend(
                f"{Path(each.filename).name}:{each.lineno}"
                for each in caught
                if "synchronizing CUDA operation" in str(each.message)
            )

        return run

    for name in ("train_batch", "optimizer_step"):
        monkeypatch.setattr(Trainer, name, watched(getattr(Trainer, name)))
    spec, changes = kind
    run = command(*changes, "training.precision=bf16", "training.epochs=3", spec=spec)
    assert run.records()[-1]["step"] > WARM_UP
    assert not seen, sorted(set(seen))


@pytest.mark.parametrize("policy", TRAIN)
def test_images_and_clips_are_augmented_alike(policy: str) -> None:
    """All but noise, which is drawn where it is added."""
    image = image_augmenter(train=policy, train_kwargs=ImageKwargs(noise_p=0.0))
    batch = photos(6)
    clip, frames = clip_augmenter(policy, noise_p=0.0), clips(3, 4)
    for seed in range(4):
        assert_alike(image(batch.cuda(), False, seed), image(batch, False, seed), policy)
        assert_alike(clip(frames.to("cuda"), True, seed), clip(frames, True, seed), policy)


@pytest.mark.parametrize("policy", VOLUME_TRAIN)
def test_volumes_are_augmented_alike(policy: str) -> None:
    """All but noise, which is drawn where it is added."""
    augment = VolumeAugmenter(
        resolved_volumes(policy, train_kwargs=VolumeKwargs(noise_p=0.0)), train=True
    )
    batch = volumes(6, 2)
    for seed in range(8):
        assert_alike(augment(batch.cuda(), False, seed), augment(batch, False, seed), policy)


def test_series_are_augmented_alike() -> None:
    """Every operation but jitter, which is drawn where it is added; ragged."""
    kept = {name: value for name, value in ALL.items() if "jitter" not in name}
    augment = series_augmenter(masks=1, **kept)
    batch = ragged([40, 7, 12, 33])
    for seed in range(4):
        assert_alike(augment(batch.cuda(), True, seed), augment(batch, True, seed), "all")


def assert_alike(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Close everywhere but at a few pixels that a coordinate on an edge decides."""
    assert found.is_cuda and found.shape == expected.shape and found.dtype == expected.dtype
    off = (found.cpu() - expected).abs() > 1e-3
    assert off.float().mean() < 2e-2, f"{what}: {float(off.float().mean()):.2%} differ"


def test_kernel_features_are_those_of_a_cpu() -> None:
    """Hydra and MultiRocket, ragged, scaled; a bias that lies on a value may count otherwise."""
    series = [each.astype(np.float32) for each in made(20, 0, ragged=True, channels=2)]
    made_by = [
        KernelFeatures("hydra_multirocket", series, seed=0, device=torch.device(device))
        for device in ("cuda", "cpu")
    ]
    for found, expected in zip(*(each.train for each in made_by), strict=True):
        assert found.is_cuda
        assert ((found.cpu() - expected).abs() > 1e-2).float().mean() < 1e-2


def test_features_are_those_of_a_cpu(command: Command, tmp_path) -> None:
    """Mode extract, from the images and with a trained checkpoint."""
    changes = ["training.precision=no", "training.epochs=1"]
    command(*changes)
    more = [*changes, "mode=extract", "extract.precision=32"]
    files = []
    for device, hide in (("cuda", {}), ("cpu", NO_GPU)):
        folder = tmp_path / device
        where = [f"exp_dir={tmp_path / 'runs'}", f"extract.output_dir={folder}"]
        glovita(tmp_path / "tiny.toml", "--override", *where, *more, env=hide)
        files.append(sorted(folder.rglob("*.h5")))
    assert files[0] and len(files[0]) == len(files[1])
    for first, second in zip(*files, strict=True):
        np.testing.assert_allclose(read(first), read(second), atol=1e-4)


def read(file: Path) -> np.ndarray:
    """Features of a file."""
    with h5py.File(file) as data:
        return data["features"][()]
