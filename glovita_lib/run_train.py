"""Mode train: train a model, evaluate the best checkpoint, write results; and the dry run."""

import tempfile
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from torch import Tensor

from glovita_lib import checkpoint, dist, files
from glovita_lib.data import Data
from glovita_lib.data_splits import SPLIT_NAMES, has_folds
from glovita_lib.errors import UserError, listed
from glovita_lib.experiment import (
    Experiment,
    assemble,
    build_trainer,
    cached,
    read_data,
    record_of,
    refuse_unstable,
    resolved_of,
    samples_per_step,
    some_of,
    trained_weights,
)
from glovita_lib.loggers import (
    Logger,
    build_logger,
    logged_as,
    say,
    say_notes,
    two_columns,
    write_notes,
)
from glovita_lib.metrics import undefined, undefined_line
from glovita_lib.model import parameter_line, parameter_table
from glovita_lib.objectives import LabelledPredictions
from glovita_lib.optim import GROUP_COLUMNS, group_lines, group_rows
from glovita_lib.peft import save_adapter
from glovita_lib.plot_curves import learning_curves
from glovita_lib.prediction_files import Table, prediction_paths
from glovita_lib.resolved import (
    EncodedInputs,
    Resolved,
    check_data,
    check_targets,
    check_unchanged,
    data_taken,
    resolve_spec,
)
from glovita_lib.results import (
    SPLITS,
    plot_augmented,
    pooled_metrics,
    read_table,
    summary_lines,
    table_of,
    write_results,
    write_summary,
)
from glovita_lib.rundir import Decision, RunDir, opened, runtime_info
from glovita_lib.sampler import check_ranks
from glovita_lib.spec import Loaded, changed_keys
from glovita_lib.spec_root import Root, head_is_named
from glovita_lib.spec_samples import BaseData, FileData
from glovita_lib.spec_train import Training
from glovita_lib.trainer import Hooks, Trainer, kept_epoch

# ----------------------------------------------------------------------------------- dry run
#
# One optimizer step, one evaluation, a checkpoint and its reload; nothing is kept.


def dry_train(loaded: Loaded[Root], ranks: dist.Ranks) -> None:
    """Take a batch of the real data through everything that a training does.

    Raises:
        UserError: what training would say, or a model that a checkpoint does not restore.
    """
    started, root = time.perf_counter(), loaded.root
    training = replace(
        root.training, epochs=1, train_steps_per_epoch=1, val_steps_per_epoch=1, save_every=None
    )
    root = replace(root, training=training)
    data = read_data(root, ranks, named=head_is_named(loaded))
    resolved = resolve_spec(root, data)
    say_notes(data.report if ranks.is_main else ())
    sizes = data.sizes_text
    count = samples_per_step(root, ranks.world)
    data.splits["train"] = some_of(data.splits["train"], count, root.seed)
    if data.splits.get("val"):
        count = resolved.eval_batch_size * ranks.world
        data.splits["val"] = some_of(data.splits["val"], count, root.seed)
    experiment = assemble(root, resolved, ranks, load_weights=True)
    refuse_unstable(experiment)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="glovita-") as folder:
        path = Path(folder) / "last.pt"
        hooks = Hooks(
            log=records.append,
            save=lambda state, is_best, keep: checkpoint.save(path, state),
            say=lambda text: None,
        )
        trainer = build_trainer(*cached(experiment, data), hooks)
        trainer.fit()
        trainer.close()
        probe = some_of(data.splits.get("val") or data.splits["train"], resolved.eval_batch_size, 0)
        saved = dist.broadcast_object(ranks, path.read_bytes() if ranks.is_main else None)
        path = Path(folder) / "copy.pt"  # ranks on other machines have no file of their own
        path.write_bytes(saved)
        state = checkpoint.load(path, map_location="cpu")
        experiment.model.load_state_dict(trained_weights(state))
        before = experiment.predict(probe)
        reloaded = assemble(root, resolved, ranks, load_weights=False)
        checkpoint.load_model(reloaded.model, trained_weights(state), path)
        after = reloaded.predict(probe)
    if before is None or after is None:  # on all ranks but the first
        return
    if not np.array_equal(before.scores.ranked, after.scores.ranked):
        raise UserError(
            "the reloaded model predicts something else than the saved one: part of the model's"
            " state is not in its state dict (a custom encoder, head or PEFT method?)"
        )
    record = next(record for record in records if record["event"] == "epoch")
    shown = {k: v for k, v in record.items() if k.startswith(("train_", "val_"))}
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None)
    rows = [
        ("data", f"{resolved.dataset}: {sizes}; {len(resolved.class_names)} outputs"),
        resolved.outputs_line,
        ("model", parameter_line(experiment.model)),
        ("one step", numbers),
    ]
    if record["memory_mb"] is not None:
        rows.append(("memory", f"{record['memory_mb']:,.0f} MiB"))
    seconds = time.perf_counter() - started
    say(f"dry run passed in {seconds:.1f} s; nothing was written\n{two_columns(rows)}")
    say(group_lines(experiment.model, root.optimizer))


# -------------------------------------------------------------------------------------- runs


def run(loaded: Loaded[Root], *, dry_run: bool) -> None:
    """Train a spec, or continue its run, or report it where it is finished.

    A dry run takes one batch through everything and leaves nothing behind.
    """
    with dist.session() as ranks:
        if dry_run:
            dry_train(loaded, ranks)
        else:
            train(loaded, ranks)


def train(loaded: Loaded[Root], ranks: dist.Ranks) -> None:
    """Start or continue a run, train it to its end, evaluate it and write the results."""
    root = loaded.root
    with opened(loaded, ranks) as (run, decision):
        if decision == "finished":
            conclude(run, ranks, "was finished before; nothing to do")
            return
        data = read_data(root, ranks, named=head_is_named(loaded))
        resolved = resolve_spec(root, data)
        saved = saved_state(run, loaded, ranks) if decision == "resume" else None
        if saved is not None:
            resolved = resolved_at_start(run, root, saved, data, resolved)
        experiment = assemble(root, resolved, ranks, load_weights=saved is None)
        refuse_unstable(experiment)
        if ranks.is_main:
            introduce(run, experiment, data)
            if decision == "start" and run.metrics.is_file():
                say(f"  note: {run.path} was interrupted without a checkpoint: it starts over")
        with experiment.shared_workers(data), ExitStack() as ended:
            logger, best = learn(run, loaded, experiment, data, decision, saved, ended)
            del saved  # evaluation needs memory too
            finish(run, loaded, experiment, data, logger, best)
    conclude(run, ranks, "is finished")


def introduce(run: RunDir, experiment: Experiment, data: Data) -> None:
    """Print data, model, device and directory of the run."""
    resolved, ranks = experiment.resolved, experiment.ranks
    sizes = data.sizes_text
    what = "targets" if resolved.subtask == "regression" else "classes"
    device = f"{ranks.device}" + (f" x {ranks.world}" if ranks.world > 1 else "")
    say(
        two_columns(
            [
                ("data", f"{resolved.dataset}: {sizes}; {len(resolved.class_names)} {what}"),
                resolved.outputs_line,
                ("model", parameter_line(experiment.model)),
                ("device", f"{device}, precision {experiment.precision}"),
                ("run", str(run.path)),
            ]
        )
    )
    if experiment.root.peft.trains != "all":
        say("\n".join(f"    {share}" for share in parameter_table(experiment.model)))
    say_notes(data.report, run.notes)


# ---------------------------------------------------------------------- training


def resolved_at_start(
    run: RunDir, root: Root, saved: dict[str, Any], data: Data, resolved: Resolved
) -> Resolved:
    """What was resolved when a run was started, which it is continued, evaluated and saved with.

    Args:
        saved: the checkpoint that it is continued from.
        resolved: what the spec and the data give now.

    Raises:
        UserError: they give something else by more than rounding.
    """
    record, trained = resolved_of(saved, run.last), f"{run.last}, which is continued,"
    check_data(record, trained, data, root.data)
    check_targets(record, trained, data)
    check_unchanged(record, trained, resolved, "the data give now")
    return resolved if resolved == record else record  # the same objects are pickled alike


def learn(
    run: RunDir,
    loaded: Loaded[Root],
    experiment: Experiment,
    data: Data,
    decision: Decision,
    saved: dict[str, Any] | None,
    ended: ExitStack,
) -> tuple[Logger, dict[str, Tensor] | None]:
    """Train from the start, or from a checkpoint on. The directory stays as it is until all that
    training needs is there.

    Returns:
        The logger, which is finished with `ended`; the best weights, on the first rank, where no
        checkpoint holds them.
    """
    root, resolved, ranks = experiment.root, experiment.resolved, experiment.ranks
    best: dict[str, Tensor] = {}

    def log(record: dict[str, Any]) -> None:
        files.append_jsonl(run.metrics, record)
        logger.log(record, step=record["step"])

    def save(state: dict[str, Any], is_best: bool, keep: int | None) -> None:
        if not root.training.enable_checkpointing:
            if is_best:
                best.update({k: v.to("cpu", copy=True) for k, v in trained_weights(state).items()})
            return
        checkpoint.save(run.last, state | identity)
        if is_best:  # after last.pt: `mend_links` completes it after a kill in between
            checkpoint.link(run.last, run.best)
        if keep is not None:
            checkpoint.link(run.last, run.epoch(keep))

    step_size = None if saved is None else saved["samples"]["step"]
    trainer = build_trainer(*cached(experiment, data), Hooks(log, save, say), step_size)
    if saved is not None:
        trainer.load_state_dict(saved)
    run.clean(ranks, decision)
    dataset, of_folds = loaded.plain["data"]["dataset"], is_of_folds(root.data)
    names = logged_as(root.logger, run=run, of_folds=of_folds, dataset=dataset)
    taken = {**values_taken(experiment, trainer, data), "logger": names, "add_log": root.add_log}
    dist.main_decides(ranks, lambda: prepare(run, loaded, experiment, data, taken, saved))
    logger = build_logger(
        root.logger,
        run=run,
        config=loaded.plain,
        names=names,
        run_id=None if saved is None else saved["logger_id"],
        ranks=ranks,
    )
    ended.callback(logger.finish)
    identity = {
        "spec": loaded.plain,
        "resolved": msgspec.to_builtins(resolved),
        "logger_id": logger.run_id,
    }
    if ranks.is_main:
        for note in [*undefined_notes(resolved, trainer), *rank_notes(experiment)]:
            say(f"  note: {note}")
    if saved is not None and ranks.is_main:
        say(continuation_line(trainer, root))
    elif ranks.is_main and root.task.result_plot != "none":
        rows = trainer.train_loader.rows(0, 0)
        path = run.plots / "augmented.png"
        plot_augmented(resolved.inputs, path, data.splits["train"], rows)
    with closing(trainer):
        trainer.fit()
    return logger, best or None


def is_of_folds(data: BaseData) -> bool:
    """Whether a run of a data set is that of one of several folds; of a function of the user's
    where it is not that of fold 0."""
    folds = data.stated_folds()
    if folds is not None:
        return folds > 1
    if not isinstance(data, FileData):
        return data.fold != 0
    names = [getattr(data, f"{split}_split_name", split) for split in SPLIT_NAMES]
    return has_folds(files.on_disk(Path(data.data_root_dir) / data.split_file), names)


def undefined_notes(resolved: Resolved, trainer: Trainer) -> list[str]:
    """Lines about metrics that no model can have on the val split, as it has too few classes, or
    targets that do not vary."""
    split = None if trainer.val_loader is None else trainer.val_loader.split
    if split is None or split.targets is None:
        return []
    targets = split.targets if split.frames is None else split.frames.all_labels()[:, None]
    names = undefined(
        resolved.metrics,
        subtask=resolved.subtask,
        targets=targets,
        class_names=resolved.class_names,
    )
    lines = [undefined_line(names)]
    if resolved.best_metric in [f"val_{name}" for name in names]:
        lines.append(
            f"training.best_checkpoint_metric = {resolved.best_metric} is among them: the last"
            " epoch counts as the best"
        )
    return lines if names else []


def rank_notes(experiment: Experiment) -> list[str]:
    """A line about batch norms that each of several ranks trains by its own batches."""
    norms = dist.batch_norms(experiment.model).values()
    trained = sum(any(p.requires_grad for p in norm.parameters()) for norm in norms)
    if experiment.ranks.world == 1 or not trained or experiment.root.training.sync_batch_norm:
        return []
    size = experiment.root.dataloading.batch_size
    return [
        f"{trained} batch norms take mean and variance of each rank's own batch of {size};"
        " training.sync_batch_norm = true joins them on GPUs"
    ]


def continuation_line(trainer: Trainer, root: Root) -> str:
    """Where a run goes on and, on another number of ranks than before, how its steps stay the
    same."""
    state, order = trainer.state, trainer.order
    line = f"continuing in epoch {state.epoch + 1} after optimizer step {state.step}"
    if order.step_size == samples_per_step(root, order.world):
        return line
    size, rounds = -(-order.step_size // order.batches), order.full_rounds
    return (
        f"{line}, on another number of ranks: its {order.step_size} samples a step are now"
        f" {rounds} batch{'es'[: 2 * (rounds > 1)]} of {size} on each of {order.world}"
    )


def saved_state(run: RunDir, loaded: Loaded[Root], ranks: dist.Ranks) -> dict[str, Any]:
    """The checkpoint that a run is continued from: last.pt or, where it was taken away, the newest
    of the others, which takes its place.

    Raises:
        UserError: it is damaged, another run's, or one that this number of ranks cannot share.
    """
    found: dict[str, Any] | None = None
    for path in [run.last] if run.last.is_file() else run.kept:
        saved = checkpoint_of(path, run, loaded)
        if found is None or saved["state"]["epoch"] > found["state"]["epoch"]:
            found, source = saved, path
    assert found is not None  # else there is nothing to continue from, which `decide` says
    check_ranks(found["samples"]["step"], ranks.world)
    if source != run.last and ranks.is_main:
        say(f"  note: {run.last} is not there: the run goes on from {source.name}")
        checkpoint.link(source, run.last)
    return found


def checkpoint_of(path: Path, run: RunDir, loaded: Loaded[Root]) -> dict[str, Any]:
    """A checkpoint of this very run.

    Raises:
        UserError: it is damaged, or another run's.
    """
    others = [other.name for other in run.kept if other != path]
    try:
        saved = checkpoint.load(path, map_location="cpu")
    except UserError as error:
        hint = f"; without {path.name} the run goes on from {' or '.join(others)}" if others else ""
        raise UserError(f"{error}{hint}") from None
    if "samples" not in saved:
        raise UserError(
            f"{path} was written by a version of glovita whose training cannot be continued; mode ="
            ' infer reads it, training.on_existing = "overwrite" trains again'
        )
    changes = changed_keys(saved.get("spec", {}), loaded.plain)
    if changes:
        raise UserError(
            f"{path} is not of this run but of another spec: {listed(changes, 8, '; ')}; put"
            ' its own checkpoint back, or set training.on_existing = "overwrite" to train again'
        )
    return saved


def values_taken(experiment: Experiment, trainer: Trainer, data: Data) -> dict[str, Any]:
    """What a run takes where the spec leaves it open or says "auto", read off the objects that
    run, as builtin types by section: files that are used by default, where groups come from, the
    model, the autocast type, workers and batches of each loader, steps and warm-up."""
    order, schedule = trainer.order, trainer.schedule
    loaders = {"train": trainer.train_loader, "val": trainer.val_loader}
    return {
        "device": str(experiment.ranks.device),
        "ranks": experiment.ranks.world,
        "data": data_taken(experiment.root.data, data),
        **model_taken(experiment),
        "training": {
            "precision": trainer.precision,
            "steps_per_epoch": trainer.steps,
            "steps": schedule.total,
            "samples_per_step": order.step_size,
        },
        "optimizer": {
            "name": type(trainer.optimizer).__name__,
            "warmup_steps": schedule.warmup,
            "warmup_epochs": schedule.warmup_epochs,
            "groups": len(trainer.optimizer.param_groups),
        },
        "dataloading": {
            split: loader.facts() for split, loader in loaders.items() if loader is not None
        },
    }


def model_taken(experiment: Experiment) -> dict[str, Any]:
    """What the encoder's network and the head have, what an encoder takes of its samples, how
    tokens become vectors, and the layers that a method adapts."""
    model, inputs = experiment.model, experiment.resolved.inputs
    encoder, head = model.encoder, model.head
    names = {module: name for name, module in model.named_modules()}
    of_network: dict[str, Any] = {}
    if isinstance(inputs, EncodedInputs):
        is_patchwise = encoder.layout == 3 and encoder.has_patches
        of_network = {
            "patch_size": list(encoder.patch) if is_patchwise else None,
            "prefix_tokens": list(encoder.prefix),
            "pooling": encoder.pooling,
            "blocks": len(encoder.block_names),
            **encoder.taken(inputs.shape[1:]),
        }
    pooled = head.consumes == "pooled"
    return {
        "model": {
            "encoder": {"type": encoder.name, "width": encoder.width, **of_network},
            "head": getattr(head, "taken", dict)(),
            "feature_aggregation_method": model.aggregation if pooled else None,
        },
        "peft": {
            kind.__name__: [names[member] for member in members]
            for kind, members in model.adapters.items()
        },
    }


def prepare(
    run: RunDir,
    loaded: Loaded[Root],
    experiment: Experiment,
    data: Data,
    taken: dict[str, Any],
    saved: dict[str, Any] | None,
) -> None:
    """Write the files that describe a run; of a continued run, cut metrics.jsonl back to the
    step of its checkpoint and complete its links.

    Args:
        taken: see `values_taken`; of a continued run, which may have another machine, it stands
            with the other facts of the process in runtime_info.json.

    Raises:
        UserError: the best model of a continued run was trained with other resolved values.
    """
    if saved is None:
        run.write_spec(loaded)
        table = {share.part: share.counts() for share in parameter_table(experiment.model)}
        resolved = msgspec.to_builtins(experiment.resolved)
        files.write_json(run.resolved_config, {**resolved, "taken": taken, "parameters": table})
        rows = group_rows(experiment.model, experiment.root.optimizer)
        files.write_csv(run.parameter_groups, GROUP_COLUMNS, rows)
    else:
        step = saved["state"]["step"]
        mend_links(run, saved["state"], experiment.root.training)
        best = None
        with suppress(UserError):  # a damaged one may be renewed, else its evaluation says so
            best = record_of(run.best)
        if best is not None:
            check_unchanged(best, str(run.best), experiment.resolved, f"{run.last} holds")
        files.truncate_jsonl(run.metrics, lambda record: record["step"] <= step)
    write_notes(run.notes, data.report)
    info = runtime_info(experiment.ranks, seed=experiment.root.seed)
    run.note_start(info if saved is None else {**info, "taken": taken})


def mend_links(run: RunDir, state: dict[str, Any], training: Training) -> None:
    """Write the links best.pt and epoch_N.pt that are missing where a process was killed between
    writing last.pt and linking it, and best.pt where it was taken away and its epoch is kept.

    Raises:
        UserError: best.pt was taken away and is nowhere else.
    """
    best = state["best_epoch"]
    if not state["seen"]:
        if best == state["epoch"] - 1:
            checkpoint.link(run.last, run.best)
        kept = kept_epoch(training, state["epoch"])
        if kept is not None:
            checkpoint.link(run.last, run.epoch(kept))
    if best is None or run.best.is_file():
        return
    if not run.epoch(best).is_file():
        raise UserError(
            f"{run.best} is not there, the model of epoch {best + 1}, the best one so far: put it"
            " back, or copy last.pt to it, which then counts as that epoch"
        )
    checkpoint.link(run.epoch(best), run.best)


# ---------------------------------------------------------------------- results


def finish(
    run: RunDir,
    loaded: Loaded[Root],
    experiment: Experiment,
    data: Data,
    logger: Logger,
    best: dict[str, Tensor] | None,
) -> None:
    """Evaluate the best model on the whole of the held-out splits and write the results.

    Args:
        best: its weights, on the first rank, where no checkpoint holds them.
    """
    task, ranks = experiment.root.task, experiment.ranks
    is_kept = experiment.root.training.enable_checkpointing
    dist.barrier(ranks)  # until the first rank has written the last epoch
    if is_kept:
        best = trained_weights(checkpoint.load(run.best, map_location="cpu"))
    else:
        best = dist.broadcast_object(ranks, best)
    checkpoint.load_model(experiment.model, best, run.best)
    if ranks.is_main and is_kept and experiment.root.peft.trains != "all":
        file = run.checkpoints / "adapter.safetensors"
        save_adapter(file, experiment.model, run=description(loaded, experiment))
    written: dict[Path, LabelledPredictions] = {}
    for name, split in data.splits.items():
        if not len(split) or (name == "train" and task.result_plot != "all"):
            continue
        predictions = experiment.predict(split)
        if ranks.is_main:
            keep_batches(run, name, experiment.batches)
        if isinstance(predictions, LabelledPredictions):  # on the first rank
            plot = task.result_plot != "none"
            report = write_results(predictions, run.path, name, experiment, split=split, plot=plot)
            logger.conclude(name, report)
            if name in SPLITS:
                written[run.predictions_of(name)] = predictions
    if ranks.is_main:
        if task.result_plot != "none":
            learning_curves(files.read_jsonl(run.metrics), run.plots / "curves.png")
        write_fold_summary(run, experiment, written)
        run.mark_finished()
    dist.barrier(ranks)


def keep_batches(run: RunDir, name: str, facts: dict[str, Any] | None) -> None:
    """Put how the batches of an evaluated split were made beside those of training."""
    record = files.read_json(run.resolved_config)
    if name not in (loaders := record["taken"]["dataloading"]):
        loaders[name] = facts
        files.write_json(run.resolved_config, record)


def description(loaded: Loaded[Root], experiment: Experiment) -> dict[str, Any]:
    """What `restore` needs of a run beside its tensors, the same wherever it is run."""
    kept = ("seed", "data", "model", "peft", "task", "training")
    spec = {name: loaded.plain[name] for name in kept}
    return {"spec": spec, "resolved": msgspec.to_builtins(experiment.resolved)}


def write_fold_summary(
    run: RunDir, experiment: Experiment, written: dict[Path, LabelledPredictions]
) -> None:
    """Metrics over the folds that are finished, and of all their predictions together.

    Args:
        written: predictions of this run by their table, which need not be read; emptied.
    """
    objective = experiment.predictor

    def read(path: Path) -> Table:
        if path in written:
            return table_of(written.pop(path), experiment.resolved)
        return read_table(objective, path)

    write_summary(
        run.group,
        config=files.read_json(run.config),
        read=read,
        measure=partial(pooled_metrics, objective),
    )


def conclude(run: RunDir, ranks: dist.Ranks, what: str) -> None:
    """Print the metrics and the paths of the results."""
    if not ranks.is_main:
        return
    reports = {
        name: files.read_json(run.metrics_of(name), "loss", "metrics")
        for name in ("train", "val", "test")
        if run.metrics_of(name).is_file()
    }
    rows = summary_lines(reports)
    tables = [path for name in reports for path in prediction_paths(run.predictions_of(name))]
    rows += [
        ("best model", place(run.best) if run.last.is_file() else "no weights were kept"),
        ("predictions", ", ".join(map(place, tables))),
        ("metrics", ", ".join(str(run.metrics_of(name)) for name in reports)),
    ]
    if run.plots.is_dir():
        rows.append(("plots", f"{run.plots}/"))
    say(f"{run.path} {what}\n{two_columns(rows)}")


def place(path: Path) -> str:
    """Where a file of a run is, or that it was taken away."""
    return str(path) if path.is_file() else f"{path} (is not there any more)"
