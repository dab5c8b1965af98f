"""Volumes: augmentation, preparation, waiting for data, and frozen slices.

    python -m pip install --no-deps batchgeneratorsv2 batchgenerators torchio SimpleITK
    python benchmarks/volumes.py [--what augmentation preparation waiting slices]
                                 [--sides 96 128] [--batches 40] [--device cpu] [--runs 7]

- augmentation: policy default_nnunet on batches of two volumes against batchgeneratorsv2 and
  TorchIO: the same operations with the same probabilities and ranges, on one core, by turns in one
  process, after five batches of each that warm up; each library is measured where it is installed.
  TorchIO has no brightness and no contrast, and goes without. On a GPU only our own policy is
  measured. What a batch costs depends on what is drawn, so that means over --batches are compared,
  which run by turns: medians of --runs such means, their ratio to ours, and its range, in CPU time
  (without that of other processes) and in wall time; target: at least 3 on a CPU, at most 15 ms on
  a GPU.
- preparation: the T1 image of ICBM152 (package nilearn) to 1.5 mm with zscore and float16 in one
  process against nibabel.processing.resample_from_to with scipy's Gaussian before, saved as .npy,
  CPU time by turns; then 24 such files by one worker process and by two.
- waiting: the share of a training epoch that waits for batches: patches of 48^3 voxels read from
  the cache files of 32 volumes, a small 3-D network: of 64^3 under default_3d_1, which reads the
  patch alone, and of 112^3 under default_nnunet, which reads seven times as much to have something
  to turn; target: at most 10 % on 2 cores.
- slices: a training epoch of specs/volume_tissue.toml against one of frozen slices of
  specs/volume_slicewise_lora.toml from memory; CPU time; target: at least 25.
"""

import argparse
import contextlib
import io
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel
import numpy as np
import torch

import glovita as program
from glovita_lib.augment_volumes import VolumeAugmenter
from glovita_lib.loader_volumes import resolve_volume_augmentation
from glovita_lib.spec import expand
from glovita_lib.spec_volumes import (
    VOLUME_TRAIN,
    VolumeAugmentation,
    VolumePreparation,
    VolumeReading,
)
from glovita_lib.trainer import Trainer
from glovita_lib.volume_cache import Task, VolumeCache, make_entry

POLICY = "default_nnunet"
OPS = VOLUME_TRAIN[POLICY]
WARM_UP = 5  # batches of each library before those that count
Run = Callable[[torch.Tensor, int], Any]


def glovita(side: int) -> Run:
    """Our own policy; the volumes are as large as the patch."""
    resolved = resolve_volume_augmentation(
        VolumeAugmentation(),
        default_policies=(POLICY, "shared_default_3d"),
        encoder_size=None,
        native_size=(side, side, side),
        spacing=None,
    )
    augmenter = VolumeAugmenter(resolved, train=True)
    return lambda batch, seed: augmenter(batch, False, seed)


def batchgenerators(side: int) -> Run:
    """The transforms of batchgeneratorsv2, a sample at a time as its loaders do."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    def gamma(limits: tuple[float, float], inverted: float) -> GammaTransform:
        return GammaTransform(BGContrast(limits), inverted, False, 1.0, 1.0)

    spatial = SpatialTransform(
        (side, side, side),
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=OPS.rotate_p,
        rotation=(-OPS.rotate_radians, OPS.rotate_radians),
        p_rot_per_axis=OPS.rotate_axis_p,
        p_scaling=OPS.scale_p,
        scaling=OPS.scale,
        p_synchronize_scaling_across_axes=OPS.scale_same_p,
    )
    parts = [
        (OPS.noise_p, GaussianNoiseTransform(OPS.noise_std, 1, True)),
        (
            OPS.blur_p,
            GaussianBlurTransform(
                OPS.blur_sigma, False, bool(OPS.blur_same_p), p_per_channel=OPS.blur_channel_p
            ),
        ),
        (OPS.brightness_p, MultiplicativeBrightnessTransform(BGContrast(OPS.brightness), False)),
        (OPS.contrast_p, ContrastTransform(BGContrast(OPS.contrast), True, False)),
        (
            OPS.low_resolution_p,
            SimulateLowResolutionTransform(
                OPS.low_resolution, False, True, None, p_per_channel=OPS.low_resolution_channel_p
            ),
        ),
        (OPS.gamma_inverted_p, gamma(OPS.gamma_inverted, 1.0)),
        (OPS.gamma_p, gamma(OPS.gamma, 0.0)),
    ]
    chosen = [RandomTransform(transform, apply_probability=p) for p, transform in parts]
    transform = ComposeTransforms([spatial, *chosen, MirrorTransform((0, 1, 2))])
    return lambda batch, seed: torch.stack([transform(image=x.clone())["image"] for x in batch])


def torchio(side: int) -> Run:
    """The transforms of TorchIO, a subject at a time."""
    import torchio as tio

    degrees, rate = math.degrees(OPS.rotate_radians), OPS.low_resolution_channel_p
    turn, scale = OPS.rotate_p, OPS.scale_p
    moves = {  # one interpolation, whether volumes are turned, scaled or both
        tio.RandomAffine((1, 1), degrees, isotropic=True): turn * (1 - scale),
        tio.RandomAffine(OPS.scale, 0, isotropic=True): scale * (1 - turn),
        tio.RandomAffine(OPS.scale, degrees, isotropic=True): turn * scale,
    }
    transform = tio.Compose(
        [
            tio.OneOf(moves, p=sum(moves.values())),
            tio.RandomNoise(std=OPS.noise_std, p=OPS.noise_p),
            tio.RandomBlur(OPS.blur_sigma, p=OPS.blur_p * OPS.blur_channel_p),
            tio.RandomAnisotropy(downsampling=(1, 2), p=OPS.low_resolution_p * rate),
            tio.RandomGamma((math.log(0.7), math.log(1.5)), p=OPS.gamma_p + OPS.gamma_inverted_p),
            tio.RandomFlip((0, 1, 2), flip_probability=OPS.mirror_p),
        ]
    )

    def run(batch: torch.Tensor, seed: int) -> torch.Tensor:
        subjects = [tio.Subject(image=tio.ScalarImage(tensor=x.clone())) for x in batch]
        return torch.stack([transform(subject)["image"].data for subject in subjects])

    return run


def volumes(side: int) -> torch.Tensor:
    """Two smooth volumes (2, 1, side, side, side), mean 0 and deviation 1."""
    coarse = torch.randn(2, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    batch = torch.nn.functional.interpolate(coarse, (side, side, side), mode="trilinear")
    return (batch - batch.mean()) / batch.std()


def mean_times(runs: dict[str, Run], batch: torch.Tensor, first: int, count: int) -> np.ndarray:
    """CPU and wall time of a batch of each, mean of some that run by turns, (2, R) seconds; the
    numbers of the batches begin with `first`."""
    total = np.zeros((2, len(runs)))
    for seed in range(first, first + count):
        for column, run in enumerate(runs.values()):
            start = time.process_time(), time.perf_counter()
            run(batch, seed)
            if batch.is_cuda:
                torch.cuda.synchronize()
            total[:, column] += time.process_time() - start[0], time.perf_counter() - start[1]
    return total / count


def augmentation(arguments: argparse.Namespace) -> None:
    """Measure by turns, so that a busy machine slows all alike."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for side in arguments.sides:
        runs = {"glovita": glovita(side)}
        if arguments.device == "cpu":
            others = {"batchgeneratorsv2": batchgenerators, "torchio": torchio}
            runs |= {name: make(side) for name, make in others.items() if find_spec(name)}
        batch, count = volumes(side).to(arguments.device), arguments.batches
        mean_times(runs, batch, 0, WARM_UP)
        firsts = range(WARM_UP, WARM_UP + count * arguments.runs, count)
        times = np.array([mean_times(runs, batch, first, count) for first in firsts])  # (M, 2, R)
        ratios = times / times[:, :, :1]
        for column, name in enumerate(runs):
            cpu, wall = 1e3 * np.median(times[:, :, column], 0)
            (low, _), (cpu_ratio, wall_ratio), (high, _) = np.quantile(
                ratios[:, :, column], (0, 0.5, 1), axis=0
            )
            print(
                f"2 x {side}^3 {name:18} CPU {cpu:6.1f} ms, {cpu_ratio:.2f} of ours ({low:.2f} to"
                f" {high:.2f}); wall {wall:6.1f} ms, {wall_ratio:.2f} of ours",
                flush=True,
            )


# ------------------------------------------------------------------------------- preparation

T1 = "package:nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
SPACING = 1.5  # mm
FILES = 24
TO_SPACING = VolumePreparation(spacing=(SPACING,) * 3)


def by_nibabel(path: str, target: Path) -> None:
    """The same steps with nibabel and scipy alone."""
    from nibabel.processing import resample_from_to
    from nibabel.spaces import vox2out_vox
    from scipy.ndimage import gaussian_filter

    image = nibabel.as_closest_canonical(nibabel.load(path))
    voxels = np.asarray(image.dataobj, np.float32)
    voxels = (voxels - voxels.mean()) / voxels.std()
    smooth = gaussian_filter(voxels, (SPACING - 1) / 2, mode="nearest")
    grid = vox2out_vox((voxels.shape, image.affine), (SPACING,) * 3)
    found = resample_from_to(nibabel.Nifti1Image(smooth, image.affine), grid, order=1)
    np.save(target, np.asarray(found.dataobj, np.float16))


def preparation(arguments: argparse.Namespace) -> None:
    """One file by turns, then several by one and by two processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{number}.nii.gz" for number in range(FILES)]
        for file in files:
            shutil.copy(expand(T1), file)
        ours = Task((str(files[0]),), VolumeReading(), TO_SPACING, str(folder / "one.h5"))
        times: dict[str, list[float]] = {"ours": [], "nibabel": [], "1": [], "2": []}
        for run in range(arguments.runs + 1):
            start = time.process_time()
            make_entry(ours)
            middle = time.process_time()
            by_nibabel(str(files[0]), folder / "one.npy")
            if run:
                times["ours"].append(middle - start)
                times["nibabel"].append(time.process_time() - middle)
        for run in range(arguments.runs):
            for workers in (1, 2):
                cache = VolumeCache(folder / f"{run}{workers}", VolumeReading(), TO_SPACING)
                start = time.perf_counter()
                cache.fill([(str(f),) for f in files], workers=workers, advance=lambda count: None)
                times[str(workers)].append(time.perf_counter() - start)
    ours_s, other_s, one, two = (statistics.median(each) for each in times.values())
    print(f"preparation: {1e3 * ours_s:.0f} ms, {ours_s / other_s:.2f} of nibabel and scipy")
    print(f"{FILES} volumes by two processes: {one / two:.2f} times as fast as by one")


# ------------------------------------------------------------------------------- epochs

FOLDER = """
[data]
dataset = "generic_3d_dataset"
data_root_dir = "{root}"
split_source = "subdirs"
label_source = "folder"
[data.augmentation]
patch_size = [48, 48, 48]
train_kwargs = {{ crop = "random" }}
train_policy = "{policy}"
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [8, 16, 32]
n_blocks_per_stage = 1
strides = [2, 2, 2]
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = {epochs}
[dataloading]
batch_size = 2
in_memory_mb = 0
[logger]
backend = "none"
"""


def quietly(*arguments: str) -> None:
    """A command of glovita's without its output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = program.main(list(arguments))
    if code:
        raise SystemExit(said.getvalue())


def waiting(arguments: argparse.Namespace) -> None:
    """Two policies."""
    for policy, side in (("default_3d_1", 64), (POLICY, 112)):
        wait(policy, side, arguments.runs)


def wait(policy: str, side: int, runs: int) -> None:
    """Time until a batch is there, of the time of a training epoch."""
    shares: list[float] = []
    train_epoch = Trainer.train_epoch

    def timed(self: Trainer) -> None:
        waited, epoch = [0.0], self.train_loader.epoch

        def batches(*place: int) -> Iterator[Any]:
            source = epoch(*place)
            while True:
                start = time.perf_counter()
                batch = next(source, None)
                waited[0] += time.perf_counter() - start
                if batch is None:
                    return
                yield batch

        with patch.object(type(self.train_loader), "epoch", lambda loader, *place: batches(*place)):
            start = time.perf_counter()
            train_epoch(self)
            shares.append(waited[0] / (time.perf_counter() - start))

    with tempfile.TemporaryDirectory() as name:
        generator = np.random.default_rng(0)
        for number in range(40):
            part = "train" if number < 32 else "val" if number < 36 else "test"
            path = Path(name, "images", part, "ab"[number % 2], f"{number}.nii")
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = generator.normal(size=(side, side, side)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
        spec = Path(name, "waiting.toml")
        spec.write_text(FOLDER.format(root=name, policy=policy, epochs=runs + 1))
        with patch.object(Trainer, "train_epoch", timed):
            quietly(str(spec), "--override", f"exp_dir={name}/runs")
    share = statistics.median(shares[1:])  # without the epoch in which the workers start
    print(f"waiting: {100 * share:.1f} % of a training epoch from the cache under {policy}")


def slices(arguments: argparse.Namespace) -> None:
    """CPU time of training epochs of the two specs."""
    times: list[float] = []
    train_epoch = Trainer.train_epoch

    def timed(self: Trainer) -> None:
        start = time.process_time()
        train_epoch(self)
        times.append(time.process_time() - start)

    specs = Path(__file__).parents[1] / "specs"
    frozen = ("peft.method=linear_probing", "training.cache_frozen_features=true",
              "data.augmentation.train_kwargs.mirror_p=0")  # fmt: skip
    medians = []
    with tempfile.TemporaryDirectory() as name, patch.object(Trainer, "train_epoch", timed):
        for spec, epochs, changes in (
            ("volume_tissue", 3, ()),
            ("volume_slicewise_lora", 1 + 5 * arguments.runs, frozen),
        ):
            times.clear()
            few = ("data.options.pieces=600", "task.bootstrap=0", "task.result_plot=none")
            quietly(str(specs / f"{spec}.toml"), "--override", f"exp_dir={name}", *few, *changes,
                    f"training.epochs={epochs}")  # fmt: skip
            medians.append(statistics.median(times[1:]))
    print(
        f"slices: an epoch of 300 pieces takes {1e3 * medians[0]:.0f} ms of a 3-D network,"
        f" {1e3 * medians[1]:.1f} ms of frozen slices from memory: {medians[0] / medians[1]:.0f}"
        " times as fast"
    )


PARTS = {
    "augmentation": augmentation,
    "preparation": preparation,
    "waiting": waiting,
    "slices": slices,
}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 128], help="voxels a side")
    parser.add_argument("--batches", type=int, default=40, help="batches of a mean")
    parser.add_argument("--device", default="cpu", help="of augmentation")
    parser.add_argument("--runs", type=int, default=7, help="repetitions, of which medians count")
    arguments = parser.parse_args()
    for what in arguments.what:
        torch.set_num_threads(1)
        PARTS[what](arguments)


if __name__ == "__main__":
    main()
