"""Policy default_nnunet on batches of two volumes, against batchgeneratorsv2 and TorchIO.

The same operations with the same probabilities and ranges, on one core, by turns in one process;
each library is measured where it is installed. TorchIO has no brightness and no contrast, and goes
without. On a GPU (--device cuda) only our own policy is measured. Prints the mean time of a batch,
on a CPU without the time of other processes, and its ratio to ours; target: at least 3 on a CPU, at
most 15 ms on a GPU.

    python -m pip install --no-deps batchgeneratorsv2 batchgenerators torchio SimpleITK
    python benchmarks/volumes.py [--sides 96 128] [--batches 40] [--device cpu]
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from glovita_lib.augment_volumes import VolumeAugmenter, resolve_volume_augmentation
from glovita_lib.spec_volumes import VOLUME_TRAIN, VolumeAugmentation

POLICY = "default_nnunet"
OPS = VOLUME_TRAIN[POLICY]
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
        p_scaling=OPS.scale_p,
        scaling=OPS.scale,
        p_synchronize_scaling_across_axes=1,
    )
    parts = [
        (OPS.noise_p, GaussianNoiseTransform(OPS.noise_std, 1, True)),
        (OPS.blur_p, GaussianBlurTransform(OPS.blur_sigma, p_per_channel=OPS.blur_channel_p)),
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
    transform = tio.Compose(
        [
            tio.RandomAffine((1, 1), degrees, isotropic=True, p=OPS.rotate_p),
            tio.RandomAffine(OPS.scale, 0, isotropic=True, p=OPS.scale_p),
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


def mean_times(runs: dict[str, Run], batch: torch.Tensor, count: int) -> dict[str, float]:
    """Mean time of a batch by name, seconds, after one that warms up."""
    clock = time.perf_counter if batch.is_cuda else time.process_time
    total = dict.fromkeys(runs, 0.0)
    for seed in range(-1, count):
        for name, run in runs.items():
            start = clock()
            run(batch, seed + 1)
            if batch.is_cuda:
                torch.cuda.synchronize()
            total[name] += (clock() - start) * (seed >= 0)
    return {name: seconds / count for name, seconds in total.items()}


def main() -> None:
    """Measure by turns, so that a busy machine slows all alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 128], help="voxels a side")
    parser.add_argument("--batches", type=int, default=40, help="batches of each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for side in arguments.sides:
        runs = {"glovita": glovita(side)}
        if arguments.device == "cpu":
            others = {"batchgeneratorsv2": batchgenerators, "torchio": torchio}
            runs |= {name: make(side) for name, make in others.items() if find_spec(name)}
        times = mean_times(runs, volumes(side).to(arguments.device), arguments.batches)
        for name, seconds in times.items():
            ratio = seconds / times["glovita"]
            print(
                f"2 x {side}^3 {name:18} {1e3 * seconds:7.1f} ms, {ratio:.2f} of ours", flush=True
            )


if __name__ == "__main__":
    main()
