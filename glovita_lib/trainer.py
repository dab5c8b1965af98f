"""One loop for every objective: train, evaluate, choose the best, continue from any step.

`step` counts optimizer steps, `seen` the samples of the current epoch over all ranks, by which a
run is continued on any number of ranks, `batch` the batches of the epoch on this rank. The device
is waited for only where a number is shown: every `log_every` steps and at the end of an epoch.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glovita_lib import dist
from glovita_lib.dist import autocast, resolve_precision
from glovita_lib.errors import UserError, listed
from glovita_lib.loader import Batch, Loader
from glovita_lib.loggers import Bar, Meter, better, epoch_line
from glovita_lib.model import Model
from glovita_lib.objectives import BatchRng, Objective
from glovita_lib.optim import Schedule, build_average, build_optimizer, check_groups, set_lr
from glovita_lib.sampler import TrainOrder
from glovita_lib.spec_train import Optimizer, Training

Record = dict[str, Any]
UNUSED = (
    "several ranks need one for each weight that trains: set training.ddp_find_unused_parameters ="
    " true, or freeze or remove what the model does not use"
)

OVERFLOW = (
    'the last checkpoint is kept; set training.precision to "bf16", where the device has it, or'
    ' "no", lower optimizer.lr, or look at the values of the inputs'
)


@dataclass
class TrainState:
    """Progress of a run, saved with every checkpoint."""

    epoch: int = 0  # the current one; equal to training.epochs at the end
    seen: int = 0  # samples of it that are done, over all ranks
    samples: int = 0  # the same since the start
    step: int = 0  # optimizer steps since the start
    best: float | None = None  # best value of the metric that picks the best checkpoint
    best_epoch: int | None = None
    mark: float | None = None  # last value that early stopping counted as better
    stale: int = 0  # epochs since then
    stopped: bool = False  # early, for want of a better value
    skipped: int = 0  # steps of fp16 without an update, as their gradient was not finite
    updates: int = 0  # of the current epoch
    sums: dict[str, Tensor] = field(default_factory=dict)  # over this rank's samples of the epoch


@dataclass(frozen=True)
class Hooks:
    """How the trainer writes: called on the first rank only."""

    log: Callable[[Record], None]  # one record to metrics.jsonl and the logger
    save: Callable[[dict[str, Any], bool, int | None], None]  # state, is it the best, epoch to keep
    say: Callable[[str], None]  # one line to the console


class Trainer:
    """Trains a model in place.

    Args:
        best_metric: logged name of the metric that picks the best checkpoint, with its val_ prefix;
            None without a val split: the last epoch is the best.
        calibration_batches: training batches that the PEFT method sees before the first step.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        *,
        train_loader: Loader,
        val_loader: Loader | None,
        training: Training,
        optimizer: Optimizer,
        best_metric: str | None,
        calibration_batches: int,
        seed: int,
        ranks: dist.Ranks,
        hooks: Hooks,
    ) -> None:
        self.model, self.objective, self.ranks, self.hooks = model, objective, ranks, hooks
        self.train_loader, self.val_loader = train_loader, val_loader
        self.spec, self.seed, self.best_metric = training, seed, best_metric
        self.calibration_batches = calibration_batches
        self.precision = resolve_precision(training.precision, ranks.device)
        assert isinstance(train_loader.order, TrainOrder)
        self.order, self.batch = train_loader.order, 0
        self.steps = min(self.order.steps, training.train_steps_per_epoch or self.order.steps)
        self.optimizer = build_optimizer(model, optimizer)
        self.schedule = Schedule(optimizer, epochs=training.epochs, steps_per_epoch=self.steps)
        # only in fp16 gradients underflow; elsewhere the scaler does nothing
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        if training.sync_batch_norm:
            dist.join_batch_norms(model, ranks)
        self.ema = build_average(model, training.ema_decay)
        # the order matters: 1 compile, 2 shard; both leave the state-dict keys of `model` alone
        if training.compile:
            model.compile()
        self.parallel = dist.wrap(model, ranks, training.ddp_find_unused_parameters)
        self.all_have_gradients = False  # known from the first step on
        self.state = TrainState()
        self.meter, self.epoch_meter = Meter(), Meter()
        self.first_bad = torch.tensor(-1, device=ranks.device)  # batch whose loss was not finite

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train from `state` to the last epoch, or until early stopping."""
        if self.calibration_batches and self.state.step == 0:
            self.calibrate()
        if self.val_loader is not None and self.spec.num_sanity_val_steps and self.state.step == 0:
            self.evaluate(self.val_loader, self.spec.num_sanity_val_steps)
        while self.state.epoch < self.spec.epochs and not self.state.stopped:
            started = time.perf_counter()
            self.train_epoch()
            self.close_epoch(started)

    def close(self) -> None:
        """End the worker processes."""
        for loader in (self.train_loader, self.val_loader):
            if loader is not None:
                loader.close()

    def train_epoch(self) -> None:
        """The rest of the current epoch."""
        state, order = self.state, self.order
        self.model.train()
        self.meter.read()
        self.epoch_meter.read()
        start = order.first_batch(order.step_behind(state.seen))
        end = order.first_batch(self.steps)
        bar = Bar(f"epoch {state.epoch + 1}", end, start, shown=self.ranks.is_main)
        batches = self.train_loader.epoch(state.epoch, start)
        for self.batch, batch in zip(range(start, end), batches, strict=False):
            self.train_batch(batch.to(self.ranks.device))
            bar.advance()
            if order.ends_step(self.batch):
                self.check_gradients()
                before = state.step
                self.optimizer_step()
                if state.step > before:
                    self.log_and_save(bar)
        bar.close()

    def train_batch(self, batch: Batch) -> None:
        """Forward and backward of one batch."""
        epoch, order = self.state.epoch, self.order
        place = order.place(self.batch)
        dist.seed_batch(self.seed, epoch, place)
        with self.synchronized(order.ends_step(self.batch)):
            with autocast(self.precision, self.ranks.device):
                rng = BatchRng(self.seed, epoch, place)
                with gradients_expected():
                    loss, logs = self.objective.loss(self.parallel, batch, rng)
                terms = self.model.auxiliary_losses()
                loss = sum(terms.values(), loss)
            self.scaler.scale(loss * order.share(self.batch)).backward()
        logs = logs | {name: term.detach() for name, term in terms.items()}
        self.count(loss, logs, order.size(self.batch))

    def refuse_lone_values(self) -> None:
        """Where batches have one sample, take one through the model: batch norm cannot train on a
        map of 1 x 1 pixels of one sample. Nothing changes by it.

        Raises:
            UserError: there is such a batch norm.
        """
        if not dist.any_rank(self.ranks, len(self.order) > 0 and self.order.size(0) == 1):
            return
        (batch,) = islice(self.train_loader.epoch(0), 1)
        batch = batch.to(self.ranks.device)
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.train()
        try:
            with torch.no_grad(), autocast(self.precision, self.ranks.device):
                self.objective.loss(self.model, batch, BatchRng(self.seed, 0, 0))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "batch norm cannot train on one value a channel, but training batches have one"
                f" sample and a map of the model 1 x 1 pixels ({error}); set"
                " dataloading.batch_size to 2 or more (of a train split of two or more), use larger"
                " images, or a model without batch norm"
            ) from None
        finally:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(kept[name])

    def calibrate(self) -> None:
        """Let the PEFT method choose what trains by the gradient of some training batches."""
        batches = islice(self.train_loader.epoch(0), self.calibration_batches)

        def loss(batch: Batch) -> Tensor:
            rng = BatchRng(self.seed, 0, self.ranks.rank)
            with autocast(self.precision, self.ranks.device):
                return self.objective.loss(self.model, batch, rng)[0]

        self.model.train()
        self.model.calibrate(
            (batch.to(self.ranks.device) for batch in batches),
            loss,
            lambda tensor: dist.all_mean(self.ranks, tensor),
        )
        self.ema = build_average(self.model, self.spec.ema_decay)  # follows what was chosen

    def optimizer_step(self) -> None:
        """Clip the gradient, update the weights, clear the gradient, update the average, and count
        the step and its samples; without an update its samples alone count."""
        state = self.state
        set_lr(self.optimizer, self.schedule(state.step))
        if self.spec.gradient_clip_val is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.gradient_clip_val)
        self.scaler.step(self.optimizer)
        if self.was_updated():
            state.step, state.updates = state.step + 1, state.updates + 1
            self.model.after_step(state.step, self.schedule.total)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        else:
            state.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        seen = self.order.edge(self.order.step_of(self.batch) + 1)
        for meter in (self.meter, self.epoch_meter):
            meter.add(seen - self.state.seen)
        state.samples += seen - state.seen
        state.seen = seen

    def was_updated(self) -> bool:
        """Let the scaler of fp16 follow the step that was made; whether the weights were updated,
        for which the device is waited for.

        Raises:
            UserError: the scale is below 1: without any scale gradients are not finite.
        """
        if not self.scaler.is_enabled():
            return True
        before = self.scaler.get_scale()
        self.scaler.update()
        scale = self.scaler.get_scale()
        if scale < 1:
            raise UserError(f"gradients in fp16 are not finite at any scale; {OVERFLOW}")
        return scale >= before

    def log_and_save(self, bar: Bar) -> None:
        """Log every `log_every` optimizer steps, save every `save_every_steps`."""
        state, every = self.state, self.spec.save_every_steps
        if state.step % self.spec.log_every == 0:
            self.check_finite(weights=False)
            record = self.record("step", self.meter)
            bar.show(loss=record["train_loss"], lr=record["lr"])
            self.log(record)
        if every and state.step % every == 0 and state.seen < self.order.edge(self.steps):
            self.check_finite(weights=True)
            self.save(is_best=False)

    def close_epoch(self, started: float) -> None:
        """Evaluate, log, decide whether this epoch is the best, save.

        Raises:
            UserError: the epoch made no update, see check_finite.
        """
        self.check_finite(weights=True)
        state = self.state
        if state.seen and not state.updates:
            raise UserError(
                f"epoch {state.epoch + 1} made no update: no gradient in fp16 was finite;"
                f" {OVERFLOW}"
            )
        record = self.record("epoch", self.epoch_meter)
        if self.val_loader is not None:
            values = self.evaluate(self.val_loader, None)
            record |= {f"val_{name}": value for name, value in values.items()}
        is_best = self.judge(record)
        record |= {"best": state.best, "best_epoch": state.best_epoch}
        record["seconds"] = time.perf_counter() - started
        self.log(record)
        if self.ranks.is_main:
            self.hooks.say(
                epoch_line(record, epochs=self.spec.epochs, best_metric=self.best_metric)
            )
        state.epoch, state.seen, state.sums, state.updates = state.epoch + 1, 0, {}, 0
        self.save(is_best=is_best)

    # ------------------------------------------------------------------ parts

    def synchronized(self, ends_step: bool) -> AbstractContextManager:
        """Context of a backward pass: ranks average gradients only in the last batch of a step."""
        if ends_step or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def count(self, loss: Tensor, logs: dict[str, Tensor], samples: int) -> None:
        """Add a batch to the epoch's sums, and note the first batch whose loss is not finite; one
        of no samples counts nothing, whatever its loss."""
        state = self.state
        loss = loss.detach()
        for name, value in {"loss": loss, **logs}.items():
            value = value * samples if samples else torch.zeros_like(value)
            total = state.sums.get(name)
            state.sums[name] = value if total is None else total + value
        bad = torch.isfinite(loss).logical_not() & (self.first_bad < 0) & bool(samples)
        self.first_bad = torch.where(bad, self.batch, self.first_bad)

    def check_finite(self, *, weights: bool) -> None:
        """Stop where a loss was NaN or infinite since the last check or, if asked, a weight is.

        Weights are checked before they are saved: the loss of a batch may be finite and its
        gradient not, and a good checkpoint must not be replaced by a useless one.

        Raises:
            UserError: with the ids of the samples of the first such batch; no checkpoint was
            written since.
        """
        what, bad = "loss", int(self.first_bad)
        if weights and bad < 0 and not self.weights_are_finite():
            what, bad = "weights", self.batch
        if not dist.any_rank(self.ranks, bad >= 0):
            return
        where = "on another rank"
        if bad >= 0:
            rows = self.train_loader.rows(self.state.epoch, bad)
            ids = ", ".join(self.train_loader.split.ids[row] for row in rows)
            where = f"in epoch {self.state.epoch + 1}, batch {bad}, samples {ids}"
        raise UserError(
            f"the {what} became NaN or infinite {where}; the last checkpoint is kept; lower"
            " optimizer.lr, set training.gradient_clip_val, try training.precision ="
            ' "no" or look at these samples'
        )

    def check_gradients(self) -> None:
        """Stop where a weight that trains got no gradient in this process's first step: the ranks
        wait for all of them before they exchange any.

        Raises:
            UserError: with the names of the weights.
        """
        if self.all_have_gradients or not isinstance(self.parallel, DistributedDataParallel):
            return
        self.all_have_gradients = True
        named = self.model.named_parameters()
        missing = [name for name, p in named if p.requires_grad and p.grad is None]
        if missing and not self.spec.ddp_find_unused_parameters:
            raise UserError(f"{listed(missing, 4)} got no gradient; {UNUSED}")

    def weights_are_finite(self) -> bool:
        """Whether all trained parameters are finite; the device is waited for once."""
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        return not trained or bool(torch.stack([p.isfinite().all() for p in trained]).all())

    def record(self, event: str, meter: Meter) -> Record:
        """What is logged of a step or an epoch: the progress, means over the samples of the epoch
        so far over all ranks, learning rate of the last update, samples per second, peak memory in
        MiB."""
        state = self.state
        names = list(state.sums)
        sums = torch.stack([state.sums[name] for name in names]).cpu().double()
        means = dist.all_sum(self.ranks, sums) / state.seen
        return {
            "event": event,
            "epoch": state.epoch,
            "step": state.step,
            "samples": state.samples,
            **{f"train_{name}": float(m) for name, m in zip(names, means, strict=True)},
            "lr": self.schedule(max(state.step - 1, 0)),
            **({"skipped_steps": state.skipped} if self.scaler.is_enabled() else {}),
            "samples_per_s": meter.read(),
            "memory_mb": dist.peak_memory_mb(self.ranks.device),
        }

    def evaluate(self, loader: Loader, max_batches: int | None) -> Record:
        """What the objective records of a split, the same on every rank; of the averaged weights
        where there are some, else of the model."""
        model = self.model if self.ema is None else self.ema.module
        dist.sync_buffers(self.ranks, model)
        predictions = self.objective.evaluate(
            model,
            loader,
            ranks=self.ranks,
            precision=self.precision,
            max_batches=max_batches,
        )
        record = self.objective.record(predictions) if self.ranks.is_main else None
        return dist.broadcast_object(self.ranks, record)

    def judge(self, record: Record) -> bool:
        """Whether this epoch is the best so far. Any number is better than an undefined value;
        until there is one, and without a val split, the last epoch is the best."""
        state, spec = self.state, self.spec
        value = math.nan
        if self.best_metric is not None and self.val_loader is not None:
            value = record[self.best_metric]
            value = math.nan if value is None else value
        if self.best_metric is None or (math.isnan(value) and state.best is None):
            state.best_epoch = state.epoch
            return True
        if better(value, state.mark, self.best_metric, spec.early_stopping_min_delta):
            state.mark, state.stale = value, 0
        else:
            state.stale += 1
        patience = spec.early_stopping_patience
        state.stopped = patience is not None and state.stale >= patience
        if better(value, state.best, self.best_metric):
            state.best, state.best_epoch = value, state.epoch
            return True
        return False

    def log(self, record: Record) -> None:
        """Write a record, on the first rank."""
        if self.ranks.is_main:
            self.hooks.log(record)

    # ------------------------------------------------------------------ state

    def save(self, *, is_best: bool) -> None:
        """Write a checkpoint, on the first rank."""
        keep = None if self.state.seen else kept_epoch(self.spec, self.state.epoch)
        saved = self.state_dict()  # on every rank: sharded parameters are gathered by all
        if self.ranks.is_main:
            self.hooks.save(saved, is_best, keep)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run is continued from: tensors and plain values."""
        ranks, state = self.ranks, self.state
        sums = {name: dist.all_sum(ranks, self.in_its_place(v)) for name, v in state.sums.items()}
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": {**vars(state), "sums": sums},
            **self.constants(),
        }

    def in_its_place(self, value: Tensor) -> Tensor:
        """A number () of this rank among zeros for the others, (W,)."""
        values = value.new_zeros(self.ranks.world)
        values[self.ranks.rank] = value
        return values

    def constants(self) -> dict[str, Any]:
        """What learning rates, random streams and the samples of a step follow from, beside the
        step: the same from the start of a run to its end, on any number of ranks."""
        order = self.order
        return {
            "scheduler": {"steps": self.schedule.total, "warmup": self.schedule.warmup},
            "rng": {"seed": self.seed},
            "samples": {"train": order.count, "step": order.step_size},
            "order": {"drawn_by": order.drawn_by},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same spec, perhaps of another number of ranks.

        Raises:
            UserError: its schedule, its random streams, its parameter groups or its samples are
                others; within an epoch the order of the samples too.
        """
        changes = [
            f"{key}.{name} {saved[key].get(name)} -> {value}"
            for key, own in self.constants().items()
            for name, value in own.items()
            if saved[key].get(name) != value and (key != "order" or saved["state"]["seen"])
        ]
        if changes:
            raise UserError(
                f"the run cannot go on as it began: {', '.join(changes)}; continue it with the"
                " training samples and the dataloading.in_memory_mb that it was started with, or"
                ' set training.on_existing = "overwrite" to train again'
            )
        check_groups(self.optimizer, saved["optimizer"])
        self.model.load_state_dict(saved["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
            self.ema.n_averaged.fill_(saved["state"]["step"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.state = TrainState(**saved["state"])
        self.state.sums = {k: self.own_part(v) for k, v in self.state.sums.items()}

    def own_part(self, parts: Tensor) -> Tensor:
        """This rank's number () of those of all ranks (W,); of as many ranks as there were then,
        else the first one takes all."""
        if len(parts) != self.ranks.world:
            total = parts.sum()
            parts = self.in_its_place(total if self.ranks.is_main else torch.zeros_like(total))
        return parts[self.ranks.rank].to(self.ranks.device)


def kept_epoch(training: Training, done: int) -> int | None:
    """The epoch whose checkpoint is kept when so many are done, if it is one of those."""
    every = training.save_every
    return None if every is None or done % every else done - 1


@contextmanager
def gradients_expected() -> Iterator[None]:
    """What DistributedDataParallel says, when the next batch comes, of weights that got no gradient
    in the one before, in one line.

    Raises:
        UserError: there are some.
    """
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise UserError(f"weights that train got no gradient in a batch; {UNUSED}") from None
