"""The head that predicts a class of each frame of a clip.

B clips, D width of the encoder's output, D_i width of a stage, t time points of a map, T frames of
a clip, K classes.
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.heads import build_head
from glovita_lib.spec_model import FramewiseHead


class Timed(Protocol):
    """The output of an encoder over time, see encoder.Features."""

    grid: tuple[int, ...] | None
    mask: Tensor | None

    @property
    def patches(self) -> Tensor:
        """Tokens of the output (B, N, D), over a grid whose first axis is time."""


class Staged(Timed, Protocol):
    """The same with the stages that the head joins."""

    intermediates: dict[str, Tensor]


class TimeBlock(nn.Module):
    """Two times convolution over time, batch norm and ReLU: (B, C, t) -> (B, C', t)."""

    def __init__(self, taken: int, given: int, kernel: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (taken, given):
            conv = nn.Conv1d(channels, given, kernel, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm1d(given), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, t) -> (B, C', t)."""
        return self.layers(x)


class FramewiseDecoder(nn.Module):
    """A U-Net along time over stages averaged over space.

    With y_S the encoder's output and s_i its stages from the input on, i = 1 ... S - 1,

        y_i = block_i([up(y_{i+1}), up(s_i)]),   logits = up(W dropout(y_1) + b)

    where up is linear interpolation to as many time points as the longer of both has, at the end to
    the T frames of the clip: half-way time points lie half-way, and of one everything is constant.
    Without stages the output passes a block of its own. Any numbers of time points will do, one
    included.
    """

    consumes = "stages"

    def __init__(self, spec: FramewiseHead, widths: Mapping[str, int], width: int, outputs: int):
        """
        Args:
            widths: of the stages that are joined, by name, from the input on.
            width: D, of the encoder's output.
            outputs: K.
        """
        super().__init__()
        self.stages = tuple(widths)
        skips = list(widths.values())[::-1]
        given = [spec.width or own for own in skips] or [spec.width or width]
        self.widths = tuple(given)
        below = [width, *given]
        taken = [one + other for one, other in zip(below, skips, strict=False)] or [width]
        self.blocks = nn.ModuleList(
            TimeBlock(*channels, spec.kernel) for channels in zip(taken, given, strict=True)
        )
        self.drop = nn.Dropout1d(spec.dropout)
        self.classifier = nn.Conv1d(given[-1], outputs, 1)

    def taken(self) -> dict[str, Any]:
        """Stages and widths, whether the section names them or not."""
        return {"stages": list(self.stages), "width": list(self.widths)}

    def forward(self, features: Staged, frames: int) -> Tensor:
        """Features of clips of T = `frames` frames -> logits (B, T, K)."""
        y = over_time(features)  # (B, D, t)
        for block, name in zip_longest(self.blocks, reversed(self.stages)):
            if name is not None:
                skip = features.intermediates[name].flatten(3).mean(3)  # (B, D_i, t_i)
                longest = max(y.shape[2], skip.shape[2])
                y = torch.cat([stretched(y, longest), stretched(skip, longest)], 1)
            y = block(y)
        return stretched(self.classifier(self.drop(y)), frames).transpose(1, 2)


def over_time(features: Timed) -> Tensor:
    """The output of an encoder averaged over space, (B, D, t); masked tokens are 0."""
    tokens, grid = features.patches, features.grid
    if features.mask is not None:
        tokens = tokens.where(features.mask[:, -tokens.shape[1] :, None], 0)
    time = tokens.shape[1] if grid is None else grid[0]
    return tokens.unflatten(1, (time, -1)).mean(2).transpose(1, 2)


def stretched(x: Tensor, length: int) -> Tensor:
    """Values (B, C, t) at `length` points of the same time, linear between them."""
    if x.shape[2] == length:
        return x
    return F.interpolate(x, length, mode="linear", align_corners=False)


@build_head.register
def _(
    spec: FramewiseHead, *, width: int, outputs: int, stages: Mapping[str, int]
) -> FramewiseDecoder:
    return FramewiseDecoder(spec, stages, width, outputs)
