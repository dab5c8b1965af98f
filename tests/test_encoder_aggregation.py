"""Aggregation against its formulas written out token by token."""

import numpy as np
import pytest
import torch

from glovita_lib.encoder import Features
from glovita_lib.encoder_aggregation import (
    aggregate,
    output_width,
    reads_pooled,
    resolve_method,
    served,
)
from glovita_lib.errors import UserError


class Facts:
    """What aggregation asks of an encoder."""

    name = "x"

    def __init__(self, has_cls=True, has_patches=True, pooling="cls_token", plain=True) -> None:
        self.has_cls, self.has_patches, self.pooling, self.plain = (
            has_cls, has_patches, pooling, plain,
        )  # fmt: skip
        self.width, self.pooled_width = 3, 5


def features(n_prefix: int, has_cls: bool, mask=None) -> Features:
    tokens = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    return Features(tokens, None, n_prefix, has_cls, None, None, mask)


def test_formulas_with_registers() -> None:
    tokens = features(3, True)
    t = tokens.tokens.double().numpy()
    wanted = {
        "cls_token": t[:, 0],
        "avg": t[:, 3:].mean(1),
        "patch_mean": t[:, 3:].mean(1),
        "sum": t[:, 3:].sum(1),
        "mean_all": np.concatenate([t[:, :1], t[:, 3:]], 1).mean(1),
        "joint": np.concatenate([t[:, 0], t[:, 3:].mean(1)], 1),
    }
    for method, value in wanted.items():
        np.testing.assert_allclose(aggregate(tokens, method).numpy(), value, rtol=1e-5, atol=1e-6)


def test_without_cls_mean_all_is_the_mean_of_patches() -> None:
    """Registers without a CLS token are left out as well."""
    tokens = features(2, False)
    torch.testing.assert_close(aggregate(tokens, "mean_all"), tokens.tokens[:, 2:].mean(1))


def test_masked_tokens_count_for_nothing() -> None:
    """Whatever stands in the padding, NaN too, each sample is as if it came alone."""
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    padded = features(1, True, mask)
    padded.tokens[1, 4:] = torch.nan
    for method in ("avg", "patch_mean", "sum", "mean_all", "joint", "cls_token"):
        alone = Features(padded.tokens[1:, :4], None, 1, True, None)
        torch.testing.assert_close(aggregate(padded, method)[1:], aggregate(alone, method))


def test_a_sample_without_real_patches_is_zero() -> None:
    mask = torch.tensor([[True] + [False] * 6] * 2)
    assert torch.equal(aggregate(features(1, True, mask), "avg"), torch.zeros(2, 3))


def test_the_librarys_vector_where_the_method_is_its_pooling() -> None:
    tokens = features(0, False)
    tokens.pooled, tokens.pooling = torch.ones(2, 5), "avg"
    assert torch.equal(aggregate(tokens, "avg"), torch.ones(2, 5))
    assert torch.equal(aggregate(tokens, "mean_all"), torch.ones(2, 5))
    torch.testing.assert_close(aggregate(tokens, "sum"), tokens.tokens.sum(1))


@pytest.mark.parametrize(
    ("resolved", "default"),
    [
        (Facts(), "cls_token"),
        (Facts(pooling="avg"), "cls_token"),  # DINOv3 in timm
        (Facts(pooling="avg", plain=False), "avg"),  # BEiT: norm(mean)
        (Facts(has_cls=False, pooling="avg"), "avg"),
        (Facts(has_cls=False, pooling="pooled", plain=False), "pooled"),  # SigLIP
        (Facts(has_cls=False, pooling=None, plain=False), "avg"),
        (Facts(has_cls=False, has_patches=False, pooling="pooled", plain=False), "pooled"),
    ],
)
def test_default(resolved: Facts, default: str) -> None:
    assert resolve_method(None, resolved) == default
    assert default in served(resolved)


def test_widths() -> None:
    resolved = Facts(pooling="avg")
    widths = {m: output_width(resolved, m) for m in served(resolved)}
    assert widths == {
        "cls_token": 3, "avg": 5, "patch_mean": 3, "sum": 3, "mean_all": 3, "joint": 8, "pooled": 5,
    }  # fmt: skip
    assert output_width(Facts(has_cls=False, pooling="avg"), "mean_all") == 5
    assert [reads_pooled(m, resolved) for m in ("joint", "sum", "avg")] == [True, False, True]


@pytest.mark.parametrize("method", ["cls_token", "joint"])
def test_no_cls_no_cls_token(method: str) -> None:
    with pytest.raises(
        UserError, match="has no CLS token; valid: avg, patch_mean, sum, mean_all, pooled"
    ):
        resolve_method(method, Facts(has_cls=False))
