"""Packed bags against loops over bags."""

from types import SimpleNamespace

import pytest
import torch

from glovita_lib.bags import (
    Bags,
    Chosen,
    as_bags,
    segment_max,
    segment_order,
    segment_pool,
    segment_softmax,
)
from glovita_lib.errors import UserError

LENGTHS = [[1], [5, 1, 3], [1] * 7, [200, 3, 90], [70, 65], [6] * 4, [90] * 3]


def make(lengths: list[int], width: int = 4) -> Bags:
    generator = torch.Generator().manual_seed(sum(lengths))
    features = torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64)
    return Bags(features, torch.tensor(lengths))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_layouts(lengths: list[int]) -> None:
    bags = make(lengths)
    parts = bags.split(bags.features)
    assert [len(part) for part in parts] == lengths and len(bags) == len(lengths)
    again = Bags.from_list(parts)
    assert torch.equal(again.features, bags.features) and torch.equal(again.lengths, bags.lengths)
    padded, mask = bags.to_padded()
    assert padded.shape == (len(lengths), max(lengths), bags.features.shape[1])
    for part, row, valid in zip(parts, padded, mask, strict=True):
        assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()
        assert valid.sum() == len(part) and valid[: len(part)].all()
    again = Bags.from_padded(padded, mask)
    assert torch.equal(again.features, bags.features) and torch.equal(again.lengths, bags.lengths)
    assert bags.ptr.tolist() == bags.bounds
    assert bags.index.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert bags.position.tolist() == [i for n in lengths for i in range(n)]


def test_padded_without_mask_is_a_view() -> None:
    padded = torch.randn(3, 4, 5)
    assert Bags.from_padded(padded, None).features.data_ptr() == padded.data_ptr()


def test_mask_need_not_be_a_prefix() -> None:
    padded = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[False, True, False, True], [True, False, False, False]])
    bags = Bags.from_padded(padded, mask)
    assert bags.features.flatten().tolist() == [1, 3, 4] and bags.lengths.tolist() == [2, 1]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("branches", [1, 3])
def test_segment_operations(lengths: list[int], branches: int) -> None:
    bags = make(lengths)
    scores = torch.randn(len(bags.features), branches, dtype=torch.float64)
    softmax, order = segment_softmax(scores, bags), segment_order(scores, bags)
    largest = segment_max(bags.features, bags)
    for b, (part, soft, rows, x) in enumerate(
        zip(*map(bags.split, (scores, softmax, order, bags.features)), strict=True)
    ):
        torch.testing.assert_close(soft, part.softmax(0))
        expected = part.argsort(dim=0, descending=True, stable=True) + bags.bounds[b]
        assert torch.equal(rows, expected)
        assert torch.equal(largest[b], x.max(0)[0])


def test_order_of_equal_scores_is_that_of_the_rows() -> None:
    bags = make([4, 3])
    scores = torch.tensor([[1.0], [2.0], [1.0], [2.0], [5.0], [5.0], [5.0]])
    assert segment_order(scores, bags).flatten().tolist() == [1, 3, 0, 2, 4, 5, 6]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("branches", [1, 2])
def test_pool_and_its_gradients(lengths: list[int], branches: int) -> None:
    bags = make(lengths)
    weights = torch.rand(len(bags.features), branches, dtype=torch.float64, requires_grad=True)
    rows = bags.features.clone().requires_grad_()
    pooled = segment_pool(weights, rows, bags)
    pairs = zip(bags.split(weights), bags.split(rows), strict=True)
    expected = torch.stack([w.T @ x for w, x in pairs])
    torch.testing.assert_close(pooled, expected)
    upstream = torch.randn_like(pooled)
    ours = torch.autograd.grad(pooled, (weights, rows), upstream)
    theirs = torch.autograd.grad(expected, (weights, rows), upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cut", [(0, 9), (3, 5), (4, 7), (8, 9)])
def test_span_is_a_part(cut: tuple[int, int]) -> None:
    bags = make([4, 1, 3, 1])
    span = bags.span(*cut)
    index = bags.index[slice(*cut)]
    assert (span.index + span.bags.start).tolist() == index.tolist()
    values = torch.randn(len(index), 2)
    for piece, bag in enumerate(range(span.bags.start, span.bags.stop)):
        torch.testing.assert_close(span.sum(values)[piece], values[index == bag].sum(0))
        assert torch.equal(span.max(values)[piece], values[index == bag].max(0)[0])


def test_chosen() -> None:
    bags = make([1, 4, 2])
    first = Chosen.first(bags, torch.tensor([1, 2, 0]))
    assert first.places.tolist() == [0, 1, 2] and first.bag.tolist() == [0, 1, 1]
    last = Chosen.last(bags, torch.tensor([0, 3, 1]))
    assert last.places.tolist() == [2, 3, 4, 6] and last.bag.tolist() == [1, 1, 1, 2]


def test_inputs() -> None:
    x = torch.randn(2, 5, 3)
    assert as_bags(x[0]).lengths.tolist() == [5]
    assert as_bags(x).lengths.tolist() == [5, 5]
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert as_bags({"features": x, "mask": mask}).lengths.tolist() == [2, 5]
    bags = as_bags(x)
    assert as_bags(bags) is bags
    tokens = as_bags(SimpleNamespace(tokens=x, n_prefix=2, mask=None))
    assert torch.equal(tokens.features, x[:, 2:].reshape(-1, 3))
    masked = as_bags(SimpleNamespace(tokens=x, n_prefix=1, mask=mask))
    assert masked.lengths.tolist() == [1, 4]


def wrong_bags() -> list:
    return [
        (lambda: Bags(torch.zeros(3, 2), torch.tensor([3, 0])), "bag 1 of the batch is empty"),
        (lambda: Bags(torch.zeros(3, 2), torch.tensor([2])), "2 instances in sum, but 3 rows"),
        (lambda: Bags(torch.zeros(3), torch.tensor([3])), "packed bags are"),
        (lambda: as_bags(torch.zeros(1, 2, 3, 4)), "valid are"),
        (lambda: Bags.from_padded(torch.zeros(2, 3, 4), torch.ones(2, 4)), "the mask is"),
        (lambda: as_bags(SimpleNamespace(tokens=None)), "one vector per sample"),
    ]


@pytest.mark.parametrize("make_wrong,words", wrong_bags())
def test_mistakes(make_wrong: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_wrong()


def test_moves() -> None:
    bags = make([2, 3]).to("cpu")
    assert bags.lengths.tolist() == [2, 3]
