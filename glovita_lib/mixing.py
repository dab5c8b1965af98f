"""Mixup and CutMix of a batch with soft targets, every sample with its own share and partner.

Mixup (Zhang et al. 2018): x = l x_i + (1 - l) x_j, l from Beta(alpha, alpha). CutMix (Yun et al.
2019): a rectangle of x_j pasted into x_i, l the share of x_i that remains visible. Targets are
mixed with the same l. B batch, C channels, H W pixels, K classes or targets.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mixup_cutmix(
    inputs: Tensor,
    targets: Tensor,
    *,
    outputs: int,
    mixup: bool,
    mixup_alpha: float,
    cutmix: bool,
    cutmix_alpha: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Mixed inputs and soft targets; where both are on, each sample draws one of them.

    Args:
        inputs: (B, C, H, W) float.
        targets: (B,) int64 class numbers, or (B, K) multilabel or regression targets.
        outputs: K.
        mixup, cutmix: which of the two are on; with neither only the targets change their form.
        mixup_alpha, cutmix_alpha: of the Beta distribution that l is drawn from.
        seed: of the parameters, which are drawn on the CPU.

    Returns:
        Inputs (B, C, H, W) and targets (B, K) float32.
    """
    soft = F.one_hot(targets, outputs).float() if targets.dim() == 1 else targets.float()
    count = len(inputs)
    if not count or not (mixup or cutmix):
        return inputs, soft
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(count, generator=generator)
    pasted = torch.full((count,), cutmix)
    if mixup and cutmix:
        pasted = torch.rand(count, generator=generator) < 0.5
    kept = torch.ones(count)  # l, the share of the sample itself
    boxes = torch.zeros(count, 4, dtype=torch.int64)
    if mixup:
        kept = torch.where(pasted, kept, beta(count, mixup_alpha, generator))
    if cutmix:
        height, width = inputs.shape[2:]
        drawn = rectangles(beta(count, cutmix_alpha, generator), height, width, generator)
        boxes = torch.where(pasted[:, None], drawn, boxes)
    moved = [t.to(inputs.device, non_blocking=True) for t in (partner, kept, boxes, pasted)]
    return mixed(inputs, soft, *moved)


def mixed(
    inputs: Tensor, soft: Tensor, partner: Tensor, kept: Tensor, boxes: Tensor, pasted: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix with given parameters: partner (B,), kept (B,), boxes (B, 4) y0 y1 x0 x1 (empty for
    mixup), pasted (B,) bool, all on the device of the inputs."""
    height, width = inputs.shape[2:]
    y0, y1, x0, x1 = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows, columns = (torch.arange(side, device=inputs.device) for side in (height, width))
    tall, wide = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    inside = tall[:, :, None] & wide[:, None, :]  # (B, H, W)
    share = torch.where(inside, 0.0, kept[:, None, None])[:, None]  # (B, 1, H, W) of the own pixel
    area = (y1 - y0) * (x1 - x0) / (height * width)  # (B, 1), what was really pasted
    kept = torch.where(pasted[:, None], 1 - area, kept[:, None])  # (B, 1)
    mixed_inputs = torch.lerp(inputs[partner], inputs, share.to(inputs.dtype))
    return mixed_inputs, torch.lerp(soft[partner], soft, kept)


def rectangles(kept: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Rectangles of share 1 - kept (B,) around random pixels, cut at the border: (B, 4) int64 y0 y1
    x0 x1."""
    side = (1 - kept).sqrt()  # of the image side
    pairs = []
    for extent in (height, width):
        length = (side * extent).round().long()
        centre = torch.randint(extent, (len(kept),), generator=generator)
        start = centre - length // 2
        pairs += [start.clamp(0, extent), (start + length).clamp(0, extent)]
    return torch.stack(pairs, 1)


def beta(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """(count,) draws of Beta(alpha, alpha), float32; torch has no seeded ones."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    draws = np.random.default_rng(seed).beta(alpha, alpha, count)
    return torch.from_numpy(draws).float()
