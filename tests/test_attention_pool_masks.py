"""Counter-based dropout masks: rates, independence of the order of rows, SplitMix64's numbers."""

import numpy as np
import pytest
import torch

from glovita_lib.attention_pool import GOLDEN, Keep, random_words


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, in Python integers."""
    words, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    return words


def test_words_are_splitmix64() -> None:
    assert GOLDEN % 2**64 == 0x9E3779B97F4A7C15
    ours = random_words(torch.arange(1, 6)).numpy().astype(np.uint64)
    assert ours.tolist() == splitmix64(0, 5)


@pytest.mark.parametrize("keep", [0.75, 0.75**2, (200 / 256) ** 2, 0.9, 0.1])
def test_rate(keep: float) -> None:
    mask = Keep(keep, 500, seed=3).rows(torch.arange(2000)).double()
    error = (keep * (1 - keep) / mask.numel()) ** 0.5
    assert abs(mask.mean() - keep) < 4 * error
    # rows and columns vary as independent draws do
    assert abs(mask.mean(0).std() / (keep * (1 - keep) / 2000) ** 0.5 - 1) < 0.2
    assert abs(mask.mean(1).std() / (keep * (1 - keep) / 500) ** 0.5 - 1) < 0.2
    neighbours = np.corrcoef(mask[:, :-1].flatten(), mask[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 5e-3


def test_any_row_comes_again() -> None:
    keep = Keep(0.75, 37, seed=5)
    everything = keep.rows(torch.arange(50))
    chosen = torch.tensor([49, 3, 3, 17])
    assert torch.equal(keep.rows(chosen), everything[chosen])
    assert set(everything.unique().tolist()) == {0, 1}


def test_seed_follows_the_global_generator() -> None:
    rows = torch.arange(20)
    torch.manual_seed(1)
    first = Keep.draw(0.5, 64).rows(rows)
    second = Keep.draw(0.5, 64).rows(rows)
    torch.manual_seed(1)
    assert torch.equal(Keep.draw(0.5, 64).rows(rows), first)
    assert 0.4 < (first == second).double().mean() < 0.6
