"""Weights averaged over the optimizer steps."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def build_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The average w' <- decay w' + (1 - decay) w of parameters and buffers; None without a decay.

    Whole numbers (counters, the places of entries that train) are copied, as they have no mean.
    """
    if decay is None:
        return None

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        if torch.is_floating_point(averages[0]) or torch.is_complex(averages[0]):
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
