"""A dry run: one optimizer step, one evaluation, a checkpoint and its reload; nothing is kept."""

import tempfile
import time
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from glovita_lib import checkpoint, dist
from glovita_lib.datasets import Data
from glovita_lib.experiment import (
    Experiment,
    assemble,
    build_trainer,
    read_data,
    resolve_facts,
    some_of,
    trained_weights,
)
from glovita_lib.frozen_cache import cached, refuse_unstable
from glovita_lib.model import count_parameters
from glovita_lib.progress import say, table
from glovita_lib.results import measure
from glovita_lib.spec import UserError
from glovita_lib.spec_root import Root
from glovita_lib.trainer import Hooks


def rehearse(root: Root, ranks: dist.Ranks) -> None:
    """Take a batch of the real data through everything that a training does.

    Raises:
        UserError: what training would say, or a model that a checkpoint does not restore.
    """
    started = time.perf_counter()
    training = replace(
        root.training, epochs=1, train_steps_per_epoch=1, val_steps_per_epoch=1, save_every=None
    )
    root = replace(root, training=training)
    data = read_data(root, ranks)
    facts = resolve_facts(root, data)
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    count = root.dataloading.batch_size * training.gradient_accumulation_steps * ranks.world
    data.splits["train"] = some_of(data.splits["train"], count, root.seed)
    experiment = assemble(root, facts, ranks, load_weights=True)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="glovita-") as folder:
        path = Path(folder) / "last.pt"
        hooks = Hooks(
            measure=lambda predictions: measure(predictions, facts),
            log=records.append,
            save=lambda state, is_best, keep: checkpoint.save(path, state),
            say=lambda text: None,
        )
        trainer = build_trainer(*seen_by_trainer(experiment, data), hooks)
        trainer.fit()
        trainer.close()
        probe = some_of(data.splits.get("val") or data.splits["train"], facts.eval_batch_size, 0)
        saved = dist.broadcast_object(ranks, path.read_bytes() if ranks.is_main else None)
        path = Path(folder) / "copy.pt"  # ranks on other machines have no file of their own
        path.write_bytes(saved)
        state = checkpoint.load(path, map_location="cpu")
        experiment.model.load_state_dict(trained_weights(state))
        before = experiment.predict(probe)
        reloaded = assemble(root, facts, ranks, load_weights=False)
        checkpoint.load_model(reloaded.model, trained_weights(state), path)
        after = reloaded.predict(probe)
    if not ranks.is_main:
        return
    if not np.array_equal(before.scores, after.scores):
        raise UserError(
            "the reloaded model predicts something else than the saved one: part of the model's"
            " state is not in its state dict (a custom encoder, head or PEFT method?)"
        )
    record = next(record for record in records if record["event"] == "epoch")
    shown = {k: v for k, v in record.items() if k.startswith(("train_", "val_"))}
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None)
    rows = [
        ("data", f"{facts.dataset}: {sizes}; {len(facts.class_names)} outputs"),
        ("model", str(count_parameters(experiment.model))),
        ("one step", numbers),
        ("memory", f"{record['memory_mb']:,.0f} MiB"),
    ]
    seconds = time.perf_counter() - started
    say(f"dry run passed in {seconds:.1f} s; nothing was written\n{table(rows)}")


def seen_by_trainer(experiment: Experiment, data: Data) -> tuple[Experiment, Data]:
    """The same experiment on what its frozen encoder gives, where the spec asks for that."""
    if not experiment.root.training.cache_frozen_features:
        return experiment, data
    refuse_unstable(experiment)
    splits = dict(data.splits)
    if splits.get("val"):
        count = experiment.facts.eval_batch_size * experiment.ranks.world
        splits["val"] = some_of(splits["val"], count, experiment.root.seed)
    return cached(experiment, with_fields(data, splits=splits))
