"""Heads: their formula, their initial weights, what they check."""

import pytest
import torch
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.heads import build_head
from glovita_lib.spec_model import ClassificationHead, CustomHead, RegressionHead


def test_linear_formula() -> None:
    head = build_head(ClassificationHead(dropout=0.5), width=6, outputs=3).eval()
    x = torch.randn(4, 6)
    wanted = x.double() @ head.linear.weight.double().T + head.linear.bias.double()
    torch.testing.assert_close(head(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert head.consumes == "pooled"
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}


def test_dropout_drops_features_in_training_only() -> None:
    head = build_head(ClassificationHead(dropout=0.5), width=4, outputs=4)
    nn.init.eye_(head.linear.weight)
    nn.init.zeros_(head.linear.bias)
    out = head(torch.ones(2000, 4))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert float((out == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(head.eval()(torch.ones(1, 4)), torch.ones(1, 4))


def test_init_std() -> None:
    head = build_head(ClassificationHead(init_std=0.01), width=400, outputs=100)
    assert float(head.linear.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not head.linear.bias.any()


def test_regression_targets_are_the_datas() -> None:
    assert build_head(RegressionHead(), width=4, outputs=3)(torch.ones(1, 4)).shape == (1, 3)
    assert build_head(RegressionHead(out_dim=3), width=4, outputs=3).linear.out_features == 3
    with pytest.raises(UserError, match="out_dim: 2 outputs, but the data set says 3 targets"):
        build_head(RegressionHead(out_dim=2), width=4, outputs=3)


def mlp(*, width: int, outputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def stubborn(*, width: int, outputs: int) -> nn.Module:
    return nn.Linear(width, 7)


def test_custom() -> None:
    spec = CustomHead(target="tests.test_heads:mlp", options={"hidden": 5})
    head = build_head(spec, width=4, outputs=3)
    assert head.consumes == "pooled" and head.training
    assert head(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CustomHead(target="tests.test_heads:stubborn"), r"gives \(2, 7\) .* have 3 classes"),
        (CustomHead(target="tests.test_heads:mlp", options={"hiden": 5}), "hiden"),
        (CustomHead(target="tests.test_heads:torch"), "has no function torch"),
    ],
)
def test_custom_mistakes(spec: CustomHead, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(spec, width=4, outputs=3)
