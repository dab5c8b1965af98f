"""The order of an epoch against one written down without arithmetic: every sample once, steps that
do not depend on the number of ranks, wherever it changes.

G samples of a step, b samples of a batch at most, W ranks.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from glovita_lib.errors import UserError
from glovita_lib.sampler import TrainOrder, WindowOrder, check_ranks


def order(count, *, step=8, batch=8, rank=0, world=1, shuffle=True, unit=1, seed=3):
    return TrainOrder(count, batch, step, shuffle, unit, seed, rank, world)


def orders(count, *, world, **options):
    return [order(count, rank=rank, world=world, **options) for rank in range(world)]


def listed_steps(permutation, step, unit=1):
    """The samples of each optimizer step: pieces of the permutation, the last of which is never a
    single sample, unless steps are or there is but one."""
    left = list(permutation)
    for _ in range(len(left) % unit):
        left.pop()
    steps = []
    while left:
        steps.append(left[:step])
        del left[:step]
    if step > 1 and len(steps) > 1 and len(steps[-1]) == 1:
        single = steps.pop()
        if step > 2:
            single.insert(0, steps[-1].pop())
            steps.append(single)
        else:
            steps[-1] += single
    return steps


def trained(ranks, epoch, batch):
    """Rows that count of the batches of one index on all ranks, with the weight of their means."""
    found = []
    for one in ranks:
        rows, size = one.rows(epoch, batch), one.size(batch)
        assert len(rows) > 0 and size in (0, len(rows))
        assert (one.share(batch) > 0) == (size > 0)
        found.append((rows[:size], one.share(batch)))
    return found


def assert_step(ranks, epoch, step, expected):
    """One optimizer step: its samples, once each, and their weights in the gradient."""
    first, behind = (ranks[0].first_batch(s) for s in (step, step + 1))
    rows, weights = [], []
    for batch in range(first, behind):
        assert [one.step_of(batch) for one in ranks] == [step] * len(ranks)
        assert [one.ends_step(batch) for one in ranks] == [batch == behind - 1] * len(ranks)
        for part, share in trained(ranks, epoch, batch):
            rows += part.tolist()
            # a mean over the batch, then a mean over the ranks: see DistributedDataParallel
            weights += [share / max(1, len(part)) / len(ranks)] * len(part)
            # of three where a batch of one is joined to one of two
            assert step >= ranks[0].full or len(part) <= max(3, ranks[0].batch_size)
    assert rows == [int(row) for row in expected]  # also in this order
    np.testing.assert_allclose(weights, 1 / len(rows), rtol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_an_epoch_is_the_listed_steps_on_any_number_of_ranks(world):
    for count, batch in itertools.product([*range(1, 28), 117], (1, 2, 3, 4, 5, 12)):
        ranks = orders(count, world=world, step=12, batch=batch)
        expected = listed_steps(ranks[0].permutation(2), 12)
        assert {one.steps for one in ranks} == {len(expected)}
        assert len({len(one) for one in ranks}) == 1
        for step, samples in enumerate(expected):
            assert_step(ranks, 2, step, samples)
        assert ranks[0].first_batch(len(expected)) == len(ranks[0])
        seen = [row for samples in expected for row in samples]
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 20, 31])
def test_other_sizes_of_a_step(step):
    worlds = [world for world in range(1, step + 1) if step % world == 0]
    for world, count, batch in itertools.product(worlds, (1, 2, 3, 21, 41, 63), (1, 2, 7, 32)):
        ranks = orders(count, world=world, step=step, batch=batch)
        for number, samples in enumerate(listed_steps(ranks[0].permutation(0), step)):
            assert_step(ranks, 0, number, samples)


def test_the_permutation_is_that_of_the_seed_and_the_epoch_alone():
    """hash_seed(3, 101, 2), written out, is the seed of torch.randperm."""
    state, word = 0, (1 << 64) - 1
    for number in (3, 101, 2):
        state = (state + number + 0x9E3779B97F4A7C15) & word
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & word
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & word
        state ^= state >> 31
    generator = torch.Generator().manual_seed(state >> 1)
    expected = torch.randperm(50, generator=generator).tolist()
    for world, batch in ((1, 8), (2, 4), (4, 1)):
        assert order(50, world=world, batch=batch).permutation(2).tolist() == expected
    assert order(50).permutation(3).tolist() != expected
    assert order(50, seed=4).permutation(2).tolist() != expected


def test_runs_that_go_on_on_other_ranks_take_every_sample_once():
    """Random histories: a run of steps of 12 samples stops between any two steps and goes on on
    another number of ranks, again and again, over three epochs."""
    draw = random.Random(0)
    for count in (1, 2, 11, 12, 13, 25, 37, 60, 117):
        for _ in range(20):
            seen = {epoch: [] for epoch in range(3)}
            places = {epoch: [] for epoch in range(3)}
            epoch = done = 0
            while epoch < 3:
                world = draw.choice([1, 2, 3, 4, 6, 12])
                ranks = orders(count, world=world, step=12, batch=draw.choice([2, 4, 12]))
                stop = draw.randrange(ranks[0].step_behind(done) + 1, ranks[0].steps + 1)
                for batch in range(
                    ranks[0].first_batch(ranks[0].step_behind(done)), ranks[0].first_batch(stop)
                ):
                    for one in ranks:
                        size = one.size(batch)
                        seen[epoch] += one.rows(epoch, batch)[:size].tolist()
                        places[epoch] += [one.place(batch)] * bool(size)
                done = ranks[0].edge(stop)
                if stop == ranks[0].steps:
                    epoch, done = epoch + 1, 0
            for epoch, rows in seen.items():
                assert sorted(rows) == list(range(count))
                assert rows == order(count).permutation(epoch).tolist()
                assert len(set(places[epoch])) == len(places[epoch])  # no stream is drawn twice


@pytest.mark.parametrize("count", [48, 50, 53, 61])
def test_ranks_that_share_make_the_batches_of_one_that_accumulates(count):
    """With the same batch size: also the same random streams."""
    single = order(count, step=24, batch=4)
    expected = [(single.place(b), single.rows(1, b).tolist()) for b in range(len(single))]
    for world in (2, 3, 6):
        ranks = orders(count, world=world, step=24, batch=4)
        found = [
            (one.place(batch), one.rows(1, batch).tolist())
            for batch in range(len(ranks[0]))
            for one in ranks
            if one.size(batch)
        ]
        assert found == expected


def test_a_last_batch_of_one_is_avoided_for_batch_norm():
    assert [order(17).size(b) for b in range(3)] == [8, 7, 2]
    assert [order(18).size(b) for b in range(3)] == [8, 8, 2]
    assert [order(3, step=2, batch=2).size(b) for b in range(1)] == [3]
    assert order(1).size(0) == 1
    assert order(3, step=1, batch=1).size(2) == 1
    assert [order(11, step=8, batch=2).size(b) for b in range(5)] == [2, 2, 2, 2, 3]


def test_what_is_left_out_behind_the_last_whole_batch():
    assert len(order(17, unit=8)) == 2
    assert len(order(7, unit=8)) == 0
    accumulated = order(117, step=48, batch=16, unit=16)
    assert [accumulated.edge(step) for step in range(4)] == [0, 48, 96, 112]
    for world in (1, 2, 3):
        ranks = orders(117, world=world, step=48, batch=16, unit=16)
        for step, samples in enumerate(listed_steps(ranks[0].permutation(0), 48, 16)):
            assert_step(ranks, 0, step, samples)


def test_ranks_that_cannot_share_a_step_are_told_which_can():
    for world in (1, 2, 3, 4, 6, 12):
        check_ranks(12, world)
    with pytest.raises(UserError, match="12 samples .* 5 ranks .* on 1, 2, 3, 4, 6, 12 ranks"):
        check_ranks(12, 5)


def test_windows_do_not_depend_on_the_number_of_ranks():
    found = [
        WindowOrder(100, batch, 12, True, 1, 3, 0, world, block=7, window=3).permutation(4)
        for world, batch in ((1, 12), (2, 6), (3, 2))
    ]
    assert sorted(found[0]) == list(range(100))
    assert all((other == found[0]).all() for other in found)
