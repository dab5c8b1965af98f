"""The head along time: any numbers of time points, gradients to every stage, its formula."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glovita_lib.heads import build_head
from glovita_lib.spec_model import FramewiseHead

WIDTHS = {"stem": 4, "layer2": 6, "layer3": 8}


def features(times: tuple[int, ...], *, width: int = 10, batch: int = 2, seed: int = 0):
    """The output of an encoder of clips at times[-1] time points, and its stages before it."""
    draw = torch.Generator().manual_seed(seed)
    *inner, last = times
    maps = {
        name: torch.randn(batch, own, time, 3, 2, generator=draw, requires_grad=True)
        for (name, own), time in zip(WIDTHS.items(), inner, strict=False)
    }
    tokens = torch.randn(batch, last * 4, width, generator=draw, requires_grad=True)
    return SimpleNamespace(patches=tokens, grid=(last, 2, 2), mask=None, intermediates=maps)


def head_of(stages: dict[str, int], **fields) -> nn.Module:
    torch.manual_seed(0)
    return build_head(FramewiseHead(**fields), width=10, outputs=5, stages=stages)


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 16, 33])
@pytest.mark.parametrize("times", [(16, 8, 4, 2), (1, 1, 1, 1), (5, 5, 5, 5), (2, 3, 7, 1)])
def test_any_numbers_of_time_points_give_logits_of_each_frame(frames: int, times: tuple) -> None:
    head, given = head_of(WIDTHS), features(times)
    logits = head(given, frames)
    assert logits.shape == (2, frames, 5) and bool(logits.isfinite().all())
    logits.square().sum().backward()
    parts = [given.patches, *given.intermediates.values(), *head.parameters()]
    assert all(part.grad is not None and part.grad.isfinite().all() for part in parts)


@pytest.mark.parametrize("fields", [{}, {"width": 3}, {"kernel": 1}, {"kernel": 7, "dropout": 0.5}])
def test_an_output_alone_is_enough(fields: dict) -> None:
    """Frames of an image encoder, or time points of a series: no stage is joined."""
    head, given = head_of({}, **fields), features((6,))
    assert head(given, 6).shape == (2, 6, 5) and head(given, 11).shape == (2, 11, 5)
    given.grid, given.mask = None, torch.ones(2, 24, dtype=torch.bool)
    given.mask[1, 20:] = False
    assert head(given, 24).shape == (2, 24, 5)


def test_it_is_its_formula() -> None:
    """One clip of two stages by hand: means over space, linear interpolation, two convolutions."""
    head, given = head_of({"stem": 4}).eval(), features((6, 3))
    stem = given.intermediates["stem"].mean((3, 4))
    output = given.patches.reshape(2, 3, 4, 10).mean(2).transpose(1, 2)
    up = F.interpolate(output, 6, mode="linear")
    first = up[:, :, 0]
    assert torch.allclose(first, output[:, :, 0]) and torch.allclose(
        up[:, :, 1], 0.75 * output[:, :, 0] + 0.25 * output[:, :, 1]
    )
    x = torch.cat([up, stem], 1)
    conv1, norm1, _, conv2, norm2, _ = head.blocks[0].layers
    x = norm1(F.conv1d(x, conv1.weight, padding=1)).relu()
    x = norm2(F.conv1d(x, conv2.weight, padding=1)).relu()
    logits = torch.einsum("bdt,kd->btk", x, head.classifier.weight[:, :, 0]) + head.classifier.bias
    torch.testing.assert_close(head(given, 6), logits)


def test_what_lies_far_in_time_says_nothing_where_kernels_see_one_point() -> None:
    head, given = head_of({}, kernel=1).eval(), features((8,))
    before = head(given, 8)
    with torch.no_grad():
        given.patches[:, 4 * 7 :] += 5
    changed = (head(given, 8) - before).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 7 + [True]


def test_a_clip_of_one_frame_trains_in_a_batch_of_several() -> None:
    head = head_of(WIDTHS).train()
    head(features((1, 1, 1, 1)), 1).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_its_fields_have_bounds() -> None:
    said = [text for _, text in FramewiseHead(kernel=4, stages=("stem", "stem")).problems()]
    assert said == ["4 has no middle: use 5", '"stem" is named twice']
