"""Training in fp16 whose gradients overflow, imitated on a CPU with the scaler switched on; batch
norms over ranks; options that need a val split."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from sklearn.utils.class_weight import compute_class_weight
from small_runs import TINY
from test_trainer import NO_DROPOUT, RANKS, root_of

from glovita_lib import dist
from glovita_lib.data import subset
from glovita_lib.errors import UserError
from glovita_lib.experiment import assemble, build_trainer, read_data
from glovita_lib.resolved import class_weights, resolve_spec
from glovita_lib.run_train import rank_notes
from glovita_lib.trainer import Hooks


def scaled(tmp_path, records, *changes, scale=65536.0, interval=2000):
    """A trainer whose gradients are scaled as on a GPU."""
    root = root_of(tmp_path, NO_DROPOUT, *changes)
    data = read_data(root, RANKS)
    built = assemble(root, resolve_spec(root, data), RANKS, load_weights=False)
    trainer = build_trainer(built, data, Hooks(records.append, lambda *a: None, print))
    trainer.val_loader = None
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    return trainer


def test_steps_without_an_update_advance_nothing(tmp_path):
    """The third and the fourth gradient overflow; the others train as without them."""
    records, seen = [], []
    trainer = scaled(tmp_path, records, "training.log_every=1", "training.ema_decay=0.5",
                     "training.epochs=2")  # fmt: skip
    loss = trainer.objective.loss

    def overflowing(model, batch, rng):
        value, logs = loss(model, batch, rng)
        seen.append(trainer.state.step)
        return (value * (1e38 if len(seen) in (3, 4) else 1.0)), logs

    trainer.objective.loss = overflowing
    averages, average = [], trainer.ema.update_parameters
    trainer.ema.update_parameters = lambda model: averages.append(1) or average(model)
    trainer.fit()
    assert seen == [0, 1, 2, 2, 2, 3, 4, 5]
    assert trainer.state.step == 6 and trainer.state.skipped == 2 and len(averages) == 6
    assert trainer.scaler.get_scale() == 65536.0 / 4
    epochs = [record for record in records if record["event"] == "epoch"]
    assert [record["skipped_steps"] for record in epochs] == [2, 2]
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["lr"] for record in steps] == [trainer.schedule(k) for k in range(6)]
    assert trainer.state.samples == 2 * len(trainer.train_loader.split)


def test_an_epoch_without_an_update_ends_the_run(tmp_path):
    records = []
    trainer = scaled(tmp_path, records)
    loss = trainer.objective.loss
    trainer.objective.loss = lambda *a: (loss(*a)[0] * 1e38, {})
    with pytest.raises(UserError, match=r"epoch 1 made no update.*training\.precision"):
        trainer.fit()
    assert not [record for record in records if record["event"] == "epoch"]


def test_a_scale_below_one_ends_the_run(tmp_path):
    trainer = scaled(tmp_path, [], scale=2.0)
    loss = trainer.objective.loss
    trainer.objective.loss = lambda *a: (loss(*a)[0] * 1e38, {})
    with pytest.raises(UserError, match="not finite at any scale"):
        trainer.fit()
    assert trainer.state.step == 0


# ------------------------------------------------------------------------------ other options


@pytest.mark.parametrize("absent", [(), (3, 8)])
def test_balanced_weights_are_those_of_sklearn(tmp_path, absent):
    root = root_of(tmp_path, TINY, "task.class_weights=balanced")
    data = read_data(root, RANKS)
    train = data.splits["train"]
    train = subset(train, np.flatnonzero(~np.isin(train.targets, absent)))
    found = np.array(class_weights(root.task, data, train))
    there = np.unique(train.targets)
    wanted = compute_class_weight("balanced", classes=there, y=train.targets)
    np.testing.assert_allclose(found[there], wanted, rtol=1e-12)
    assert found[train.targets].mean() == pytest.approx(1.0)
    assert all(found[k] == 1.0 for k in absent)


@pytest.mark.parametrize("change", ["early_stopping_patience=3", "best_checkpoint_metric=val_acc"])
def test_what_judges_epochs_needs_a_val_split(tmp_path, change):
    root = root_of(tmp_path, TINY, f"training.{change}")
    data = read_data(root, RANKS)
    resolve_spec(root, data)
    del data.splits["val"]
    with pytest.raises(UserError, match=rf"training\.{change.split('=')[0]}.*no val split"):
        resolve_spec(root, data)


def test_batch_norms_over_ranks_keep_their_tensors():
    class Norm(nn.BatchNorm2d):
        """One of a kind of its own."""

    from timm.layers import BatchNormAct2d, SyncBatchNormAct

    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    gpus = dist.Ranks(0, 2, 0, torch.device("cuda"))
    dist.join_batch_norms(layers, gpus)
    assert type(layers[1]) is nn.SyncBatchNorm and type(layers[2]) is SyncBatchNormAct
    assert state.keys() == layers.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in layers.state_dict().items())
    with pytest.raises(UserError, match=r"0 \(Norm\).*its own kind"):
        dist.join_batch_norms(nn.Sequential(Norm(4)), gpus)
    plain = nn.Sequential(nn.BatchNorm2d(4))
    dist.join_batch_norms(plain, RANKS)
    assert type(plain[0]) is nn.BatchNorm2d
    with pytest.raises(UserError, match="sync_batch_norm joins batch norms of GPUs"):
        dist.join_batch_norms(plain, dist.Ranks(0, 2, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("world", "joined", "frozen", "said"),
    [(2, False, False, True), (1, False, False, False), (2, True, False, False),
     (2, False, True, False)],
)  # fmt: skip
def test_batch_norms_of_several_ranks_are_told(world, joined, frozen, said):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).requires_grad_(not frozen)
    training = SimpleNamespace(sync_batch_norm=joined)
    root = SimpleNamespace(training=training, dataloading=SimpleNamespace(batch_size=8))
    ranks = dist.Ranks(0, world, 0, torch.device("cpu"))
    lines = rank_notes(SimpleNamespace(model=model, root=root, ranks=ranks))
    told = "1 batch norms take mean and variance of each rank's own batch of 8"
    assert [line.startswith(told) for line in lines] == [True] * said
