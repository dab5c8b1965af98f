"""Seeds against the published generator; two gloo ranks against one process."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from children import run_ranks
from torch import nn

from glovita_lib import dist
from glovita_lib.errors import UserError

ONE = dist.Ranks(0, 1, 0, torch.device("cpu"))

# Runs on each of two ranks; every check that fails there fails the test by the exit code.
TWO_RANKS = """
import sys
import warnings
warnings.simplefilter("error")
import time
import torch
from pathlib import Path
from torch import nn
from glovita_lib import dist
from glovita_lib.errors import UserError

folder = Path(sys.argv[1])
session = dist.session()
ranks = session.__enter__()
assert (ranks.world, ranks.device.type, ranks.is_main) == (2, "cpu", ranks.rank == 0)
r = ranks.rank

def gather(*lengths):
    n = lengths[r]
    start = sum(lengths[:r])
    rows = torch.arange(start, start + n)
    return dist.gather_rows(ranks, {
        "rows": rows,
        "scores": rows[:, None].float().mul(torch.ones(3)).t().contiguous().t(),  # not contiguous
        "half": rows.bfloat16(),
        "flag": rows % 2 == 0,
        "wide": rows[:, None, None].expand(n, 2, 2).to(torch.uint8),
    })

for lengths in ((5, 3), (0, 4), (4, 0), (0, 0), (1, 1)):
    got = gather(*lengths)
    assert (got is None) == (r == 1)
    if got is not None:
        want = torch.arange(sum(lengths))
        assert torch.equal(got["rows"], want)
        assert torch.equal(got["scores"], want[:, None].float().expand(-1, 3))
        assert got["half"].dtype == torch.bfloat16 and torch.equal(got["half"], want.bfloat16())
        assert got["flag"].dtype == torch.bool and torch.equal(got["flag"], want % 2 == 0)
        assert torch.equal(got["wide"], want[:, None, None].expand(-1, 2, 2).to(torch.uint8))
# a rank without rows may not know how wide a row is
got = dist.gather_rows(ranks, {"scores": torch.zeros(0) if r == 0 else torch.ones(2, 3)})
assert r == 1 or torch.equal(got["scores"], torch.ones(2, 3))
for empty in (0, 1):  # nor what there is
    got = dist.gather_rows(ranks, {} if r == empty else {"rows": torch.arange(3)})
    assert r == 1 or torch.equal(got["rows"], torch.arange(3))

mine = torch.tensor([1.0, 2.0]) * (r + 1)
assert dist.all_sum(ranks, mine).tolist() == [3.0, 6.0]
assert dist.all_mean(ranks, mine).tolist() == [1.5, 3.0]
assert mine.tolist() == [r + 1.0, 2 * (r + 1.0)]
assert dist.all_mean(ranks, torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float64
assert dist.any_rank(ranks, r == 1) and dist.any_rank(ranks, True)
assert not dist.any_rank(ranks, False)
assert dist.broadcast_object(ranks, {"rank": r}) == {"rank": 0}

calls = []
assert dist.main_decides(ranks, lambda: calls.append(r) or "resume") == "resume"
assert calls == ([0] if r == 0 else [])

def refuse():
    raise UserError("the spec has changed")

def crash():
    raise ValueError("a bug")

def raised(block):
    try:
        block()
    except Exception as error:
        return type(error), str(error)

assert raised(lambda: dist.main_decides(ranks, refuse)) == (UserError, "the spec has changed")
def refuse_many():
    raise UserError("\\n".join(["30 files are empty:", *(f"  {n}" for n in range(30))]))

kind, text = raised(lambda: dist.main_decides(ranks, refuse_many))  # all said once
assert kind is UserError and len(text.split("\\n")) == (31 if r == 0 else 22)
assert r == 0 or text.endswith("  ... and 10 more, all in what the first rank says")
kind, text = raised(lambda: dist.main_decides(ranks, crash))
assert "a bug" in text and kind is (ValueError if r == 0 else RuntimeError)

with dist.main_first(ranks):
    if r == 0:
        time.sleep(0.3)
        (folder / "download").write_text("x")
    assert (folder / "download").exists()

def failing():
    with dist.main_first(ranks):
        refuse()

assert raised(failing) == (UserError, "the spec has changed")
dist.barrier(ranks)

dist.seed_everything(r)  # different weights: the first rank's must win
model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
keys = list(model.state_dict())
frozen = nn.Linear(2, 2).requires_grad_(False)
assert dist.wrap(frozen, ranks, False) is frozen
parallel = dist.wrap(model, ranks, False)
assert parallel is not model
x = torch.arange(32.0).view(8, 4).sin()[4 * r : 4 * r + 4]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    parallel(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
assert list(model.state_dict()) == keys
before = model[1].running_mean.clone()
dist.sync_buffers(ranks, model)
assert torch.equal(before, model[1].running_mean) == (r == 0)
torch.save(model.state_dict(), folder / f"model_{r}.pt")
del parallel  # it holds the group, whose threads would outlive the interpreter
dist.stop()
dist.stop()
"""


@pytest.mark.processes
def test_two_ranks(tmp_path: Path) -> None:
    done = run_ranks(TWO_RANKS, tmp_path)
    assert [one.code for one in done] == [0, 0], done
    first, second = (torch.load(tmp_path / f"model_{r}.pt") for r in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_mix_is_splitmix64() -> None:
    """Of one number: the first output of the generator seeded with it, without its lowest bit."""
    assert dist.hash_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert dist.hash_seed(1234567) == 6457827717110365317 >> 1
    assert dist.hash_seed(1, 2) != dist.hash_seed(2, 1)
    assert dist.hash_seed(1) != dist.hash_seed(1, 0)
    assert 0 <= dist.hash_seed(-1, 2**70) < 2**63


def test_mix_spreads_neighbouring_counters() -> None:
    words = [
        dist.hash_seed(seed, epoch, step, rank)
        for seed in range(2)
        for epoch in range(8)
        for step in range(64)
        for rank in range(4)
    ]
    assert len(set(words)) == len(words)
    bits = np.array([[word >> b & 1 for b in range(63)] for word in words])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.05  # 4,096 words: 6 standard deviations


def test_seeds_repeat() -> None:
    draws = []
    for _ in range(2):
        dist.seed_everything(3)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    streams = []
    for epoch, place in ((5, 0), (5, 0), (6, 0), (5, 1)):
        dist.seed_batch(3, epoch, place)
        streams.append(nn.functional.dropout(torch.ones(64), 0.5))
    assert torch.equal(streams[0], streams[1])
    assert not torch.equal(streams[0], streams[2])
    assert not torch.equal(streams[0], streams[3])


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = dist.start()
    assert (ranks.rank, ranks.world, ranks.local_rank) == (0, 1, 0)
    assert not torch.distributed.is_initialized()
    rows = {"x": torch.zeros(0, 3)}
    assert dist.gather_rows(ranks, rows) is rows
    model = nn.Linear(2, 2)
    assert dist.wrap(model, ranks, False) is model
    assert float(dist.all_mean(ranks, torch.tensor(2.0))) == 2.0
    assert dist.any_rank(ranks, True)
    assert not dist.any_rank(ranks, False)
    with dist.main_first(ranks):
        pass
    with pytest.raises(UserError, match="no"):
        dist.main_decides(ranks, refuse)
    dist.stop()


def refuse() -> None:
    raise UserError("no")


def test_incomplete_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="torchrun"):
        dist.start()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        dist.start()


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc-per-node 2"):
        dist.pick_device(2, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_in_mib() -> None:
    block = torch.ones(2**27, dtype=torch.uint8)  # 128 MiB
    status = Path("/proc/self/status").read_text()
    kib = int(status.split("VmHWM:")[1].split()[0])
    assert block.numel() == 2**27
    assert dist.peak_memory_mb(ONE.device) == pytest.approx(kib / 1024, rel=0.02)


def test_peak_memory_is_unknown_where_the_system_does_not_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert dist.peak_memory_mb(ONE.device) is None
