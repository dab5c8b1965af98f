"""Runs that are killed and go on on another number of ranks: learning rates, samples, weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from children import run_ranks
from small_runs import TINY, Result, snapshot

# One rank of a command that is killed before optimizer step argv[1] + 1, when step argv[1] is
# saved. Each batch is noted: its epoch, step, ids, and the factor of its mean loss in the backward
# pass, which is measured, not asked.
KILLED = """
import json, os, sys, time
import glovita, torch
from glovita_lib.trainer import Trainer

stop, notes, losses = int(sys.argv[1]), sys.argv[2], []
train_batch, scale, count = Trainer.train_batch, torch.amp.GradScaler.scale, Trainer.count

def scaled(self, loss):
    losses.append(float(loss))
    return scale(self, loss)

def counted(self, loss, logs, samples):
    losses.append(float(loss))
    count(self, loss, logs, samples)

def noted(self, batch):
    if self.state.step == stop:
        time.sleep(0 if self.ranks.is_main else 1)
        os._exit(9)
    losses.clear()
    train_batch(self, batch)
    ids = [self.train_loader.split.ids[row] for row in batch.rows.tolist()]
    note = {"epoch": self.state.epoch, "step": self.state.step, "world": self.ranks.world,
            "ids": ids, "weight": losses[0] / losses[1]}
    with open(f"{notes}.{self.ranks.rank}", "a") as file:
        print(json.dumps(note), file=file)

Trainer.train_batch, Trainer.count, torch.amp.GradScaler.scale = noted, counted, scaled
sys.exit(glovita.main(sys.argv[3:]))
"""

# No dropout and no random augmentation: all that is left of the ranks is rounding.
EXACT = TINY.replace(", proj_drop_rate = 0.1", "") + "\n[dataloading]\nbatch_size = 12\n"
CHANGES = (
    "training.epochs=3",
    "training.save_every_steps=1",
    "training.log_every=1",
    "training.ema_decay=0.9",
    "optimizer.name=SGD",  # Adam makes steps of rounding errors where a gradient is 0
    "optimizer.lr=0.01",
    "optimizer.min_lr=0.001",
    "optimizer.warmup_epochs=0.7",
    "data.augmentation.train_policy=default_2d_1",
    "name=run",
)

pytestmark = pytest.mark.processes


class Runs:
    """Commands on one run directory, on any number of ranks."""

    def __init__(self, folder: Path, spec: str, *changes: str) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "tiny.toml").write_text(spec)
        self.arguments = [folder / "tiny.toml", "--override", f"exp_dir={folder}/runs", *changes]
        self.result = Result(0, "", "", folder / "runs" / "digits" / "run" / "0")

    def run(self, world: int, stop: int = -1, code: int = 0) -> str:
        """The first rank's output of a command that is killed after `stop` steps."""
        done = run_ranks(KILLED, stop, self.folder / "notes", *self.arguments, world=world)
        assert {one.code for one in done} == {9 if stop >= 0 else code}, done
        return done[0].out

    def batches(self) -> list[dict]:
        """What all ranks have noted."""
        return [
            json.loads(line)
            for path in sorted(self.folder.glob("notes.*"))
            for line in path.read_text().splitlines()
        ]

    def steps(self) -> dict[int, tuple[int, list[str]]]:
        """Epoch and sorted ids of each optimizer step, after a check of the weights in it."""
        found = {}
        for step in sorted({batch["step"] for batch in self.batches()}):
            mine = [batch for batch in self.batches() if batch["step"] == step]
            counted = [batch for batch in mine if batch["weight"]]
            ids = [i for batch in counted for i in batch["ids"]]
            for batch in counted:  # the ranks' gradients are averaged
                share = batch["weight"] / batch["world"] / len(batch["ids"])
                assert share == pytest.approx(1 / len(ids), rel=1e-5)
            assert len({batch["epoch"] for batch in mine}) == 1
            found[step] = mine[0]["epoch"], sorted(ids)
        return found


def test_one_two_three_one_ranks_over_one_run(tmp_path):
    """117 samples, 10 steps an epoch of 12 but the last: killed within three epochs, once between
    two."""
    calm = Runs(tmp_path / "calm", EXACT, *CHANGES)
    calm.run(1)
    other = Runs(tmp_path / "other", EXACT, *CHANGES)
    other.run(1, stop=4)
    out = other.run(2, stop=13)
    assert "continuing in epoch 1 after optimizer step 4, on another number of ranks: its 12" in out
    assert "samples a step are now 1 batch of 6 on each of 2" in out
    assert "1 batch of 4 on each of 3" in other.run(3, stop=20)
    other.run(2, stop=25)
    out = other.run(1)
    assert "after optimizer step 25\n" in out and "is finished" in out

    steps = other.steps()
    assert steps == calm.steps() and len(steps) == 30
    everything = sorted(i for batch in calm.batches()[:10] for i in batch["ids"])
    assert len(set(everything)) == 117
    for epoch in range(3):
        assert sorted(sum((ids for e, ids in steps.values() if e == epoch), [])) == everything

    records = {run: run.result.records("step") for run in (calm, other)}
    for key in ("samples", "step", "lr"):
        found, expected = ([r[key] for r in records[run]] for run in (other, calm))
        assert found == expected and len(found) == 30
    assert [r["samples"] for r in records[calm]][8:11] == [108, 117, 129]
    for name in ("train_loss", "train_acc"):
        found, expected = ([r[name] for r in records[run]] for run in (other, calm))
        np.testing.assert_allclose(found, expected, rtol=2e-4)
    for name in ("model", "ema"):
        for key, value in calm.result.last[name].items():
            torch.testing.assert_close(other.result.last[name][key], value, rtol=2e-3, atol=1e-4)
    worlds = [start["world_size"] for start in other.result.json("runtime_info.json")["continued"]]
    assert worlds == [2, 3, 2, 1]


def test_a_number_of_ranks_that_cannot_share_a_step_is_refused(tmp_path):
    spec = EXACT.replace("size = 12", "size = 4")
    runs = Runs(tmp_path / "run", spec, *CHANGES[1:], "training.epochs=1")
    runs.run(1, stop=3)
    (runs.result.path / ".lock").write_text("")  # of the killed process
    before = snapshot(runs.result.path)
    out = runs.run(3, code=2)
    assert "takes 4 samples an optimizer step, which 3 ranks cannot share" in out
    assert "continue it on 1, 2, 4 ranks" in out and len(out.splitlines()) < 9
    assert snapshot(runs.result.path) == before
    assert "is finished" in runs.run(2)


RICH = (
    "data.augmentation.train_policy=default_2d_5",
    "task.mixup=true",
    "training.save_every_steps=1",
    "training.log_every=1",
    "dataloading.batch_size=8",
    "optimizer.name=SGD",
    "optimizer.lr=0.01",
    "name=run",
)
TIMES = ("samples_per_s", "seconds", "memory_mb")


def test_as_many_ranks_go_on_bit_for_bit(tmp_path):
    """Dropout, random augmentation and mixing; killed within the epoch."""
    calm, other = (Runs(tmp_path / name, TINY, *RICH) for name in ("calm", "other"))
    calm.run(2)
    other.run(2, stop=5)
    other.run(2)
    for key, value in calm.result.last["model"].items():
        assert torch.equal(other.result.last["model"][key], value), key
    for event in ("step", "epoch"):
        found, expected = (
            [{k: v for k, v in r.items() if k not in TIMES} for r in run.result.records(event)]
            for run in (other, calm)
        )
        assert found == expected and found


def test_two_ranks_do_what_one_does_that_accumulates_two_batches(tmp_path):
    """With the same batches come the same random draws: dropout, augmentation, mixing."""
    two = Runs(tmp_path / "two", TINY, *RICH)
    one = Runs(tmp_path / "one", TINY, *RICH, "training.gradient_accumulation_steps=2")
    two.run(2)
    one.run(1)
    found, expected = ([r["train_loss"] for r in run.result.records("step")] for run in (two, one))
    assert len(found) == 16
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for key, value in one.result.last["model"].items():
        torch.testing.assert_close(two.result.last["model"][key], value, rtol=1e-3, atol=2e-5)


# ---------------------------------------------------------------------- weights without gradient


@pytest.mark.parametrize("uses", [0, 2])
def test_weights_without_gradient_are_one_line(tmp_path, uses):
    """From the first batch on, and later, which torch says with the next batch."""
    start, end = EXACT.index("type = "), EXACT.index("[task]")
    encoder = f"""encoder_type = "custom"
target = "small_runs:forgetful_layer"
options = {{ uses = {uses} }}
[data.augmentation]
image_size = 8
"""
    spec = EXACT.replace(EXACT[start:end], encoder, 1).replace("image_size = 8\n", "", 1)
    spec = spec.replace("[data.augmentation]\n", "", 1)
    runs = Runs(tmp_path / "run", spec, *CHANGES[1:], "training.epochs=1")
    out = runs.run(2, code=2)
    name = "encoder.net.second.0.weight, encoder.net.second.0.bias got no gradient"
    assert (name in out) == (uses == 0) and "got no gradient" in out, out
    assert "training.ddp_find_unused_parameters = true" in out and "Traceback" not in out
    assert runs.result.path.exists()
    again = Runs(tmp_path / "again", spec, *CHANGES[1:], "training.epochs=1",
                 "training.ddp_find_unused_parameters=true")  # fmt: skip
    assert "is finished" in again.run(2)


MIXED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from glovita_lib.bags import as_bags
from glovita_lib.encoder import Features
from glovita_lib.heads import build_head
from glovita_lib.objectives import SupervisedObjective
from glovita_lib.spec_model import AbmilHead
from glovita_lib.spec_train import Supervised


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = build_head(AbmilHead(), width=8, outputs=3)

    def forward(self, inputs, targets):
        return self.head(inputs, targets)


dist.init_process_group("gloo")
torch.manual_seed(0)
whole = Whole().eval()
bags = [as_bags(Features(torch.randn(4, 6, 8), None, 0, False, None)) for _ in range(2)]
targets = [torch.tensor([0, 1, 2, 1]), torch.tensor([2, 2, 0, 1])]
objective = SupervisedObjective.__new__(SupervisedObjective)
objective.task, objective.outputs = Supervised(mixup=True, mixup_alpha=0.5), 3


def gradients(model, rank):
    model.zero_grad()
    output, soft = objective.mixed_bags(model, bags[rank], targets[rank], 5 + rank)
    (-soft * output.logits.log_softmax(1)).sum(1).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in whole.parameters()])


found = gradients(DistributedDataParallel(whole), dist.get_rank())
one, other = (gradients(whole, rank) for rank in range(2))
assert not torch.allclose(one, other, atol=1e-3)
torch.testing.assert_close(found, (one + other) / 2, rtol=1e-5, atol=1e-7)
dist.destroy_process_group()
print("equal")
"""


def test_mixup_of_bags_on_two_ranks_has_the_mean_gradient_of_both():
    """The hook before the last layer works below DistributedDataParallel: the gradient is the mean
    of those that one process computes of each rank's bags."""
    done = run_ranks(MIXED)
    assert [(one.code, one.out.split()[-1]) for one in done] == [(0, "equal")] * 2, done
