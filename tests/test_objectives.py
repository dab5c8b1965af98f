"""Objectives: the rows of an evaluation, and one of another kind than the package's in the loop."""

from dataclasses import dataclass
from dataclasses import replace as with_fields

import pytest
import torch
from small_runs import TINY
from torch import nn

from glovita_lib import checkpoint, dist
from glovita_lib.errors import UserError
from glovita_lib.experiment import assemble, build_trainer, read_data
from glovita_lib.loader import Batch
from glovita_lib.objectives import Objective, gather_split
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_check import load_checked
from glovita_lib.trainer import Hooks

RANKS = dist.Ranks(0, 1, 0, torch.device("cpu"))


# ---------------------------------------------------------------------- rows of an evaluation


@dataclass
class Batches:
    """A loader of given rows, whose inputs are the row numbers."""

    rows: list

    def epoch(self, epoch):
        for rows in map(torch.tensor, self.rows):
            yield Batch(rows.float()[:, None], None, rows, False)


def test_outputs_are_in_the_order_of_the_split_and_each_sample_counts_once():
    def outputs(model, batch):
        assert not model.training and not torch.is_grad_enabled()
        return {"rows": batch.rows, "twice": model(batch.inputs), "half": batch.inputs.bfloat16()}

    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    loader = Batches([[4, 2], [0, 4, 1], [2]])
    got = gather_split(model.train(), outputs, loader, ranks=RANKS, precision="no")
    assert got["rows"].tolist() == [0, 1, 2, 4]
    assert got["twice"].tolist() == [[0.0], [2.0], [4.0], [8.0]]
    assert got["half"].dtype == torch.bfloat16 and got["half"].flatten().tolist() == [0, 1, 2, 4]
    few = gather_split(model, outputs, loader, ranks=RANKS, precision="no", max_batches=1)
    assert few["rows"].tolist() == [2, 4]


# ---------------------------------------------------------------------- without labels or scores


def barlow_twins(a, b):
    """sum_i (1 - C_ii)^2 + 0.01 sum_(i != j) C_ij^2 with C the correlation of the features (D, D)
    of two views (N, D) (Zbontar et al., Barlow Twins, ICML 2021)."""
    a, b = ((z - z.mean(0)) / (z.std(0) + 1e-6) for z in (a, b))
    c = a.t() @ b / (len(a) - 1)
    same = c.diagonal()
    return (1 - same).square().sum() + 0.01 * (c.square().sum() - same.square().sum())


class BarlowTwins(Objective):
    """Two views of an image have the same features, which do not repeat each other. Its evaluation
    is one number of the whole split: no labels, no scores, no loss of a sample."""

    def __init__(self, inputs):
        self.train_inputs = self.eval_inputs = inputs

    def views(self, model, batch, seeds):
        return [model(self.train_inputs(batch.inputs, batch.fitted, seed)) for seed in seeds]

    def loss(self, model, batch, rng):
        assert batch.targets is None
        a, b = self.views(model, batch, (rng.stream(1), rng.stream(2)))
        alike = torch.cosine_similarity(a.detach(), b.detach()).mean()
        return barlow_twins(a, b), {"similarity": alike}

    def evaluate(self, model, loader, *, ranks, precision, max_batches=None):
        def features(model, batch):
            a, b = self.views(model, batch, (0, 1))
            return {"rows": batch.rows, "a": a, "b": b}

        return gather_split(
            model, features, loader, ranks=ranks, precision=precision, max_batches=max_batches
        )

    def record(self, predictions):
        return {"loss": float(barlow_twins(predictions["a"], predictions["b"]))}


class Run:
    """A training of BarlowTwins on unlabelled digits; `states` has every checkpoint."""

    def __init__(self, tmp_path, *overrides):
        (tmp_path / "spec.toml").write_text(TINY)
        changes = ["training.best_checkpoint_metric=val_loss", "training.save_every_steps=1",
                   "data.augmentation.train_policy=default_2d_4", "optimizer.lr=0.01"]  # fmt: skip
        root = load_checked(str(tmp_path / "spec.toml"), [*changes, *overrides]).root
        data = read_data(root, RANKS)
        resolved = resolve_spec(root, data)
        unlabelled = {n: with_fields(s, targets=None) for n, s in data.splits.items()}
        experiment = assemble(root, resolved, RANKS, load_weights=False)
        experiment.objective = BarlowTwins(experiment.objective.train_inputs)
        self.folder, self.records, self.states, self.best = tmp_path, [], [], None
        hooks = Hooks(self.records.append, self.save, lambda line: None)
        self.trainer = build_trainer(experiment, with_fields(data, splits=unlabelled), hooks)

    def save(self, state, is_best, keep):
        path = self.folder / f"{len(self.states)}.pt"
        checkpoint.save(path, state)
        self.states.append(path)
        if is_best:
            self.best = path

    def epochs(self):
        """Records of the epochs without times."""
        times = ("seconds", "samples_per_s", "memory_mb")
        records = (r for r in self.records if r["event"] == "epoch")
        return [{k: v for k, v in r.items() if k not in times} for r in records]


def test_an_objective_of_another_kind_trains_keeps_the_best_and_goes_on_bit_equal(tmp_path):
    calm = Run(tmp_path)
    before = calm.trainer.evaluate(calm.trainer.val_loader, None)
    calm.trainer.fit()
    first, second = calm.epochs()
    assert (
        {k for k in first if k.startswith("val_")} == {"val_loss"} == {f"val_{k}" for k in before}
    )
    assert {"train_loss", "train_similarity"} <= first.keys()
    losses = [first["val_loss"], second["val_loss"]]
    best = losses.index(min(losses))
    assert second["best"] == losses[best] < before["loss"]
    assert len(calm.states) == 8 and calm.best == calm.states[4 * best + 3]
    for at in (1, 4):  # after two steps of the first epoch of four, after one of the second
        again = Run(tmp_path)
        again.trainer.load_state_dict(checkpoint.load(calm.states[at], map_location="cpu"))
        again.states = calm.states[: at + 1]
        bytes_before = [path.read_bytes() for path in calm.states]
        again.trainer.fit()
        assert [path.read_bytes() for path in again.states] == bytes_before
        assert again.epochs() == calm.epochs()[-len(again.epochs()) :]


def test_the_epoch_with_the_smallest_loss_is_the_best(tmp_path):
    run = Run(tmp_path)
    losses = iter([3.0, 5.0])
    run.trainer.objective.record = lambda predictions: {"loss": next(losses)}
    run.trainer.fit()
    assert [(r["val_loss"], r["best"], r["best_epoch"]) for r in run.epochs()] == [
        (3.0, 3.0, 0),
        (5.0, 3.0, 0),
    ]
    assert checkpoint.load(run.best, map_location="cpu")["state"]["epoch"] == 1


# ---------------------------------------------------------------------- what goes on must be alike


@pytest.mark.parametrize(
    ("override", "said"),
    [("training.train_steps_per_epoch=3", "scheduler.steps 8 -> 6"),
     ("optimizer.warmup_epochs=1", "scheduler.warmup 1 -> 4"), ("seed=1", "rng.seed 0 -> 1")],
)  # fmt: skip
def test_a_checkpoint_of_another_schedule_or_seed_is_refused(tmp_path, override, said):
    run = Run(tmp_path)
    run.trainer.state.step = 7
    state = run.trainer.state_dict()
    other = Run(tmp_path, override)
    with pytest.raises(UserError, match=said) as refused:
        other.trainer.load_state_dict(state)
    assert "on_existing" in str(refused.value)
    assert other.trainer.state.step == 0  # nothing was loaded


def test_a_checkpoint_of_other_samples_is_refused(tmp_path):
    run = Run(tmp_path)
    state = run.trainer.state_dict()
    state["samples"]["train"] = 118
    with pytest.raises(UserError, match="samples.train 118 -> 117; continue it with the training"):
        run.trainer.load_state_dict(state)


def test_within_an_epoch_the_order_is_that_of_its_start(tmp_path):
    """Vectors in memory are ordered otherwise than those read by windows of a file."""
    run = Run(tmp_path)
    state = run.trainer.state_dict()
    state["order"]["drawn_by"] = "blocks of 8 in windows of 7 steps"
    run.trainer.load_state_dict(state)
    state["state"]["seen"] = 32
    with pytest.raises(UserError, match="order.drawn_by .* -> samples; .*dataloading.in_memory_mb"):
        run.trainer.load_state_dict(state)
