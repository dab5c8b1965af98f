"""Attention pooling in chunks against plain autograd on whole bags, in float64."""

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

import glovita_lib.attention_pool as pooling
from glovita_lib.attention_pool import (
    Keep,
    Norm,
    PassOptions,
    Weights,
    attention_pool,
    hidden_rows,
    tanh_,
)
from glovita_lib.bags import Bags

WIDTH, HIDDEN, ATTENTION = 12, 10, 6
LENGTHS = [[1, 2, 9, 30, 3], [200], [1] * 5, [64, 70], [7] * 9, [80] * 3]


def plain(x: Tensor, bags: Bags, w: Weights, plan: PassOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (M, K), pooled (B, K, H) and hidden (M, H), without chunks."""
    rows, y = torch.arange(len(x)), x
    if w.norm is not None:
        y = F.layer_norm(x, x.shape[-1:], *w.norm, plan.eps)
        y = F.normalize(y) if plan.unit_length else y
    h = (y @ w.project.T + w.project_bias).relu()
    h = h if plan.keep_hidden is None else h * plan.keep_hidden.rows(rows)
    both = h @ w.gate.T + w.gate_bias
    gated = both[:, :ATTENTION].tanh()
    gated = gated * both[:, ATTENTION:].sigmoid() if plan.gated else gated
    gated = gated if plan.keep_gate is None else gated * plan.keep_gate.rows(rows)
    scores = gated @ w.score.T + w.score_bias
    pooled = []
    for start, stop in zip(bags.bounds, bags.bounds[1:], strict=False):
        attended = scores[start:stop]
        if plan.kept is not None:
            kept = plan.kept[start:stop].clone()
            kept[attended.argmax(0), torch.arange(kept.shape[1])] = True
            attended = attended.masked_fill(~kept, -torch.inf)
        pooled.append(attended.softmax(0).T @ h[start:stop])
    return scores, torch.stack(pooled), h


def make_weights(branches: int, prepared: bool, gated: bool) -> Weights:
    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * 0.4).requires_grad_()

    gates = ATTENTION * (2 if gated else 1)
    return Weights(
        norm=Norm(draw(WIDTH), draw(WIDTH)) if prepared else None,
        project=draw(HIDDEN, WIDTH),
        project_bias=draw(HIDDEN),
        gate=draw(gates, HIDDEN),
        gate_bias=draw(gates),
        score=draw(branches, ATTENTION),
        score_bias=draw(branches),
    )


@pytest.mark.parametrize(
    ("lengths", "branches", "preparation", "gated", "drop"),
    covering(LENGTHS, [1, 3], ["none", "norm", "unit length"], [True, False], [True, False]),
)
def test_values_and_gradients(
    lengths: list[int],
    branches: int,
    preparation: str,
    gated: bool,
    drop: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(pooling.CHUNK_ROWS, "cpu", 7)
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), WIDTH, dtype=torch.float64, requires_grad=True)
    bags, w = Bags(x, torch.tensor(lengths)), make_weights(branches, preparation != "none", gated)
    plan = PassOptions(
        gated=gated,
        unit_length=preparation == "unit length",
        eps=1e-6,
        keep_hidden=Keep(0.75, HIDDEN, 1) if drop else None,
        keep_gate=Keep(0.9, ATTENTION, 2) if drop else None,
        kept=torch.rand(len(x), branches) < 0.5 if drop else None,
    )
    rows = torch.tensor([0, len(x) - 1, 0])
    scores, pooled, h = plain(x, bags, w, plan)
    theirs = (scores, pooled, h[rows])
    ours = (*attention_pool(bags, w, plan), hidden_rows(bags, rows, w, plan))
    torch.testing.assert_close(ours, theirs)
    upstream = [torch.randn_like(value) for value in theirs]
    leaves = [x, *w.flat()]
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
    )


def test_frozen_weights_get_no_gradient() -> None:
    bags = Bags(torch.randn(9, WIDTH, dtype=torch.float64), torch.tensor([4, 5]))
    w = make_weights(2, prepared=True, gated=True)
    w.project.requires_grad_(False)
    plan = PassOptions(True, True, 1e-6, None, None, None)
    attention_pool(bags, w, plan)[1].sum().backward()
    assert w.project.grad is None and w.gate.grad is not None
    assert bags.features.grad is None


@pytest.mark.parametrize("large", [-300.0, 300.0])
def test_scores_far_apart(large: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running maximum neither overflows nor loses what came before."""
    monkeypatch.setitem(pooling.CHUNK_ROWS, "cpu", 4)
    x = torch.randn(20, WIDTH)
    w = Weights.of([t.detach().float() for t in make_weights(1, False, True).flat()])
    w = w._replace(score=w.score * large)
    bags, plan = Bags(x, torch.tensor([3, 17])), PassOptions(True, False, 0.0, None, None, None)
    scores, pooled, _ = plain(x, bags, w, plan)
    ours = attention_pool(bags, w, plan)
    torch.testing.assert_close(ours, (scores, pooled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tanh(dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-20, 20, 1001), torch.linspace(-1e-3, 1e-3, 101))).to(dtype)
    exact = x.double().tanh()
    tolerance = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 4e-3}[dtype]
    assert (tanh_(x.clone()).double() - exact).abs().max() < tolerance
