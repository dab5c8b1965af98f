"""The loop: what one optimizer step is, which weights move, which are evaluated and saved."""

import math
import shutil

import numpy as np
import pytest
import torch
from small_runs import RESNET, TINY

from glovita_lib import dist, experiment, run_train
from glovita_lib.data import subset
from glovita_lib.experiment import assemble, build_trainer, read_data
from glovita_lib.loggers import epoch_line
from glovita_lib.optim import build_optimizer
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_check import load_checked
from glovita_lib.trainer import Hooks, Trainer

NO_DROPOUT = TINY.replace(", proj_drop_rate = 0.1", "")
RANKS = dist.Ranks(0, 1, 0, torch.device("cpu"))


def root_of(tmp_path, text, *overrides):
    """A checked spec."""
    (tmp_path / "spec.toml").write_text(text)
    return load_checked(str(tmp_path / "spec.toml"), list(overrides)).root


def in_float64(root):
    """Weights after a training in float64, and its records: inputs and model are doubles."""
    data = read_data(root, RANKS)
    resolved = resolve_spec(root, data)
    built = assemble(root, resolved, RANKS, load_weights=False)
    built.model.double().register_forward_pre_hook(
        lambda module, arguments: (arguments[0].double(), *arguments[1:])
    )
    built.objective.criterion.double()
    records = []
    hooks = Hooks(records.append, lambda *a: None, print)
    trainer = build_trainer(built, data, hooks)
    trainer.val_loader = None
    trainer.fit()
    return built.model.state_dict(), records


@pytest.mark.parametrize("clip", ["none", "0.02"])
@pytest.mark.parametrize("loss", ["plain", "weighted"])
def test_accumulated_batches_equal_the_large_batch(tmp_path, clip, loss):
    """117 samples: 48, 48, 21 at once, or 16, 16, 16 | 16, 16, 16 | 10, 11 accumulated."""
    changes = [f"training.gradient_clip_val={clip}"]
    if loss == "weighted":
        changes += ["task.class_weights=[1,2,3,4,5,6,7,8,9,10]", "task.label_smoothing=0.1"]
    large = root_of(tmp_path, NO_DROPOUT, "dataloading.batch_size=48", *changes)
    small = root_of(
        tmp_path,
        NO_DROPOUT,
        "dataloading.batch_size=16",
        "training.gradient_accumulation_steps=3",
        *changes,
    )
    expected, before = in_float64(large)
    found, after = in_float64(small)
    assert [record["step"] for record in after] == [record["step"] for record in before] == [3, 6]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)
    for a, b in zip(after, before, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-6)  # in float32
        assert a["lr"] == b["lr"]


def test_clipping_is_once_per_step_and_bounds_the_update(tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spied(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        grads = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        norms.append((float(norm), math.sqrt(sum(grads))))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spied)
    root = root_of(tmp_path, NO_DROPOUT, "training.gradient_clip_val=0.02",
                   "training.gradient_accumulation_steps=2", "training.epochs=1")  # fmt: skip
    in_float64(root)
    assert len(norms) == 2  # 4 batches
    for before, after in norms:
        assert before > 0.02 and after == pytest.approx(0.02, rel=1e-4)


def test_logged_learning_rates_are_those_used(command, monkeypatch):
    used = []
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *arguments: used.append(optimizer.param_groups[0]["lr"])
    )
    try:
        run = command("training.log_every=1", "training.epochs=3", "optimizer.warmup_epochs=1",
                      "optimizer.min_lr=1e-5")  # fmt: skip
    finally:
        handle.remove()
    logged = [record["lr"] for record in run.records("step")]
    assert logged == used and len(used) == 12
    warm = [1e-3 * (step + 1) / 4 for step in range(4)]
    cool = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)]
    assert logged == pytest.approx(warm + cool, rel=1e-12)
    assert [record["lr"] for record in run.records()] == logged[3::4]


# ---------------------------------------------------------------------- averaged weights


def test_averaged_weights_are_the_average_and_are_what_is_evaluated(command, monkeypatch, tmp_path):
    steps = []
    step = Trainer.optimizer_step

    def spied(self):
        step(self)
        steps.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(Trainer, "optimizer_step", spied)
    run = command("training.ema_decay=0.8", "optimizer.lr=0.01", "training.epochs=2",
                  "training.best_checkpoint_metric=val_loss")  # fmt: skip
    assert run.best["state"]["epoch"] == 2
    assert run.records()[-1]["val_loss"] == run.json("metrics_val.json")["loss"]
    average = {key: value.double() for key, value in steps[0].items()}
    for weights in steps[1:]:
        average = {key: 0.8 * value + 0.2 * weights[key].double() for key, value in average.items()}
    for key, value in average.items():
        torch.testing.assert_close(run.best["ema"][key].double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(run.best["model"][key], steps[-1][key])
    best = run.path / "checkpoints" / "best.pt"
    built = experiment.restore(best, load_checked(str(tmp_path / "tiny.toml"), []).root, RANKS)
    split = read_data(built.root, RANKS).splits["test"]
    written = np.array([[float(row[f"p_{i}"]) for i in range(10)] for row in run.rows()])
    assert np.array_equal(built.predict(split).scores.values, written)
    assert built.predict(split).loss == run.json("metrics_test.json")["loss"]
    built.model.load_state_dict(run.best["model"])
    assert np.abs(built.predict(split).scores.values - written).max() > 1e-4


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])
@pytest.mark.parametrize(
    "change",
    ["label_smoothing=0.2", "class_weights=balanced", "mixup=true", "cutmix=true",
     "mixup=true cutmix=true"],
)  # fmt: skip
def test_loss_options_train_and_change_what_is_learnt(command, table_spec, subtask, change):
    spec = TINY if subtask == "multiclass" else table_spec(subtask)
    plain = command("name=plain", "training.epochs=1", spec=spec)
    changes = [f"task.{part}" for part in change.split()]
    run = command(*changes, "name=other", "training.epochs=2", spec=spec)
    assert all(math.isfinite(record["train_loss"]) for record in run.records())
    head = next(name for name in run.last["model"] if name.startswith("head."))
    assert not torch.equal(run.last["model"][head], plain.last["model"][head])
    losses = [r.json("metrics_test.json")["loss"] for r in (plain, run)]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)  # evaluated with the plain loss
    assert run.records()[0]["train_loss"] != plain.records()[0]["train_loss"]


# ---------------------------------------------------------------------- what trains


def moved(run, root_text, tmp_path, *overrides):
    """Keys of the trained model that differ from its initial weights."""
    root = root_of(tmp_path, root_text, *overrides)
    data = read_data(root, RANKS)
    initial = assemble(root, resolve_spec(root, data), RANKS, load_weights=False).model
    state = run.last["model"]
    return {k for k, v in initial.state_dict().items() if not torch.equal(v, state[k])}


@pytest.mark.parametrize("network", ["vit", "resnet"])
@pytest.mark.parametrize(
    ("method", "extra"),
    [("full_finetuning", []), ("linear_probing", []),
     ("partial_finetuning", ["peft.num_frozen_layers=1"])],
)  # fmt: skip
def test_what_trains_moves_and_what_is_frozen_does_not(command, tmp_path, network, method, extra):
    changes = [f"peft.method={method}", *extra, "optimizer.weight_decay=0.5", "optimizer.lr=0.01"]
    spec = TINY if network == "vit" else RESNET
    run = command(*changes, "training.epochs=1", "training.ema_decay=0.5", spec=spec)
    root = root_of(tmp_path, spec, *changes)
    built = assemble(
        root, resolve_spec(root, read_data(root, RANKS)), RANKS, load_weights=False
    ).model
    trains = {name for name, p in built.named_parameters() if p.requires_grad}
    found = moved(run, spec, tmp_path, *changes)
    head = {name for name in built.state_dict() if name.startswith("head.")}
    assert head and head <= trains and head <= found
    assert trains <= found
    counters = {name for name in found if "running_" in name or "num_batches" in name}
    if method == "linear_probing":
        assert found == head  # no weight decays, no batch norm statistic moves
        weight = "encoder." + next(iter(built.encoder.state_dict()))
        assert torch.equal(run.last["ema"][weight], run.last["model"][weight])
    else:
        assert found - trains == counters
    assert bool(counters) == (network == "resnet" and method != "linear_probing")
    if method == "partial_finetuning":
        still = {name for name in built.state_dict() if name.startswith("encoder.")} - found
        assert any("patch_embed" in name or "conv1" in name for name in still)
        assert any(name.startswith("encoder.") for name in found)


@pytest.mark.parametrize(
    "change",
    ["optimizer.layer_wise_lr_decay=0.5", "optimizer.undecay_norm=true", "optimizer.name=SGD",
     "optimizer.name=Adam", "optimizer.name=RMSprop", "peft.method=linear_probing"],
)  # fmt: skip
def test_the_optimizer_has_every_parameter_that_trains_once(tmp_path, change):
    root = root_of(tmp_path, TINY, change)
    built = assemble(root, resolve_spec(root, read_data(root, RANKS)), RANKS, load_weights=False)
    optimizer = build_optimizer(built.model, root.optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in built.model.parameters() if p.requires_grad}
    head = {id(p) for p in built.model.head.parameters()}
    assert head <= set(held)
    for group in optimizer.param_groups:  # the head learns at the full rate
        assert group["lr_scale"] == 1 or not head & {id(p) for p in group["params"]}


# ---------------------------------------------------------------------- small and odd


@pytest.mark.parametrize("count", [1, 2, 33])
def test_few_samples_and_a_last_batch_of_one(command, monkeypatch, count):
    """Batch norm cannot train on one sample; the loader fills such a batch up."""
    read = experiment.read_data

    def cut(root, ranks, **asked):
        data = read(root, ranks, **asked)
        data.splits["train"] = experiment.some_of(data.splits["train"], count, 0)
        return data

    monkeypatch.setattr(run_train, "read_data", cut)
    run = command("training.epochs=1", spec=TINY if count == 1 else RESNET)
    assert run.records()[0]["step"] == math.ceil(count / 32)
    assert math.isfinite(run.records()[0]["val_loss"])


@pytest.mark.parametrize("change", ["dataloading.batch_size=1", "one sample"])
def test_batch_norm_on_one_value_is_refused_before_anything_is_written(
    command, monkeypatch, change
):
    """32 x 32 pixels are a map of 1 x 1 behind five halvings."""
    spec = RESNET.replace("image_size = 16", "image_size = 32")
    spec = spec.replace("test_resnet", "resnet18")
    changes = [change] if "=" in change else []
    if not changes:
        read = experiment.read_data

        def cut(root, ranks, **asked):
            data = read(root, ranks, **asked)
            data.splits["train"] = experiment.some_of(data.splits["train"], 1, 0)
            return data

        monkeypatch.setattr(run_train, "read_data", cut)
    run = command("training.epochs=1", *changes, spec=spec, code=2)
    assert "batch norm cannot train on one value a channel" in run.err
    assert "dataloading.batch_size to 2 or more" in run.err
    assert not run.path.exists()


def test_batches_of_one_train_where_batch_norm_has_more_to_see(command):
    """And what is tried before changes nothing: the running figures are those of the training."""
    changes = ["dataloading.batch_size=1", "data.data_fraction=0.01", "training.epochs=1"]
    run = command(*changes, spec=RESNET.replace("image_size = 16", "image_size = 64"))
    counts = {v.item() for k, v in run.last["model"].items() if k.endswith("num_batches_tracked")}
    assert counts == {run.records()[0]["step"]}


def of_one_class(data):
    """The data with a val split of one class."""
    split = data.splits["val"]
    data.splits["val"] = subset(split, np.flatnonzero(split.targets == split.targets[0]))
    return data


def test_a_best_metric_that_is_never_defined(command, monkeypatch):
    """It is said before training; training goes on, and the last epoch is the best."""
    read = experiment.read_data
    monkeypatch.setattr(
        run_train, "read_data", lambda *given, **asked: of_one_class(read(*given, **asked))
    )
    changes = ["training.early_stopping_patience=1", "training.best_checkpoint_metric=val_auroc"]
    changes += ['task.metrics=["acc","auroc","f1"]', "training.epochs=3"]
    run = command(*changes)
    before, training = run.out.split("epoch 1/3")
    assert "note: the labels of val define no auroc, whatever the model predicts" in before
    assert "best_checkpoint_metric = val_auroc is among them: the last epoch counts" in before
    assert training.count("auroc was never defined") == 3
    assert [record["best_epoch"] for record in run.records()] == [0, 1, 2]
    assert all(record["best"] is None for record in run.records())
    torch.testing.assert_close(run.best["model"], run.last["model"], rtol=0, atol=0)


def test_any_number_is_better_than_an_undefined_value(tmp_path):
    root = root_of(tmp_path, TINY, "training.early_stopping_patience=2")
    data = read_data(root, RANKS)
    built = assemble(root, resolve_spec(root, data), RANKS, load_weights=False)
    trainer = build_trainer(built, data, Hooks(print, print, print))
    chosen = []
    for epoch, value in enumerate([None, math.nan, 0.2, None, 0.1, 0.3]):
        trainer.state.epoch = epoch
        record = {"epoch": epoch, "lr": 0.1, "samples_per_s": 1.0, "seconds": 1.0}
        record[trainer.best_metric] = value
        chosen.append(trainer.judge(record))
        record |= {"best": trainer.state.best, "best_epoch": trainer.state.best_epoch}
        assert ("never" in epoch_line(record, epochs=6, best_metric="val_acc")) == (epoch < 2)
        assert trainer.state.stopped == (epoch == 4)
    assert chosen == [True, True, True, False, False, True]
    assert (trainer.state.best, trainer.state.best_epoch) == (0.3, 5)


def test_the_test_images_may_be_the_val_split(command, folder_spec, class_folders):
    shutil.rmtree(class_folders / "images" / "val")
    spec = folder_spec.replace("channels = 1\n", 'channels = 1\nval_split_name = "test"\n')
    run = command(spec=spec)
    assert run.records()[0]["val_loss"] is not None
    assert run.rows("val") == run.rows("test")


def test_a_seed_fixes_everything_and_another_changes_it(command):
    runs = [command("name=a"), command("name=b"), command("name=c", "seed=1")]
    same, other = ([r.records()[1]["train_loss"] for r in pair] for pair in (runs[:2], runs[1:]))
    assert same[0] == same[1] and other[0] != other[1]
