"""What a spec becomes, the same way in every mode: data, facts, model, objective, loaders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from glovita_lib import (  # modules with noqa register builders
    adapter,
    checkpoint,
    clam,  # noqa: F401
    dist,
    encoders_features,  # noqa: F401
    mil,
    precomputed,  # noqa: F401
    transmil,  # noqa: F401
)
from glovita_lib.datasets import Data, Split, build_data
from glovita_lib.encoders import describe
from glovita_lib.evaluation import Predictions, evaluate
from glovita_lib.facts import Facts, derive_facts
from glovita_lib.feature_sources import VectorSource
from glovita_lib.loaders import Loader, build_loader
from glovita_lib.model import build_model
from glovita_lib.objectives import Objective, build_objective
from glovita_lib.policies import resolve
from glovita_lib.precision import resolve_precision
from glovita_lib.progress import say
from glovita_lib.samples import subset
from glovita_lib.spec import UserError
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.spec_model import PrecomputedEncoder
from glovita_lib.spec_peft import Gps
from glovita_lib.spec_root import Root
from glovita_lib.trainer import Hooks, Trainer
from glovita_lib.windows import build_feature_loader

SPLIT_KEYS = (
    "fold", "n_folds", "split_source", "split_file", "split_column", "stratified", "group_column",
    "val_fraction", "test_fraction", "train_split_name", "val_split_name", "test_split_name",
)  # fmt: skip
"""Keys of the section data that say which sample is in which split."""


@dataclass
class Experiment:
    """A model with everything it takes to train it or to ask it for predictions."""

    root: Root
    facts: Facts
    model: nn.Module  # on the device of this rank
    objective: Objective
    ranks: dist.Ranks
    checkpoint: Path | None = None
    """File that the weights come from; None: from the encoder's own, or the seed."""

    @property
    def precision(self) -> str:
        """Autocast type on this device: no, bf16 or fp16."""
        return resolve_precision(self.root.training.precision, self.ranks.device)

    def loader(self, split: Split, *, train: bool) -> Loader:
        """Batches of a split, with the geometry of the policy that it is used with."""
        objective, spec = self.objective, self.root.dataloading
        inputs = objective.train_inputs if train else objective.eval_inputs
        arguments = {
            "fit": inputs.fit,
            "train": train,
            "seed": self.root.seed,
            "ranks": self.ranks,
            "batch_size": spec.batch_size if train else self.facts.eval_batch_size,
        }
        if isinstance(split.source, VectorSource):
            # a custom data set may give vectors too
            data = self.root.data
            window = (data if isinstance(data, PrecomputedData) else PrecomputedData()).window_mb
            return build_feature_loader(split, spec, window_mb=window, **arguments)
        return build_loader(split, spec, **arguments)

    def predict(self, split: Split) -> Predictions | None:
        """Predictions of a whole split on the first rank, None on the others.

        Never compiled: results are the same after training, in mode infer and on other machines.
        """
        if self.root.training.compile:
            self.model.compile(disable=True)
        loader = self.loader(split, train=False)
        try:
            return evaluate(
                self.model, self.objective, loader, ranks=self.ranks, precision=self.precision
            )
        finally:
            loader.close()


def read_data(root: Root, ranks: dist.Ranks) -> Data:
    """The data of a spec; the first rank reads (and downloads) before the others, and alone looks
    at all values of features. Only training needs a train split."""
    spec = root.data
    if isinstance(spec, PrecomputedData) and not ranks.is_main:
        spec = replace(spec, check_values=False)
    with dist.main_first(ranks):
        return build_data(spec, seed=root.seed, trains=root.mode == "train")


def resolve_facts(root: Root, data: Data) -> Facts:
    """Run-time values from the spec, the data and the encoder's input convention."""
    if isinstance(root.model.encoder, PrecomputedEncoder):
        return derive_facts(root, data, None)
    sizes = {split.source.uniform for split in data.splits.values() if len(split)}
    same = sizes.pop() if len(sizes) == 1 else None
    augmentation = resolve(
        root.data.augmentation,
        default_policies=root.data.default_policies,
        encoder=describe(root.model.encoder, channels=data.channels),
        channels=data.channels,
        native_size=None if same is None else same[1:],
    )
    return derive_facts(root, data, augmentation)


def assemble(root: Root, facts: Facts, ranks: dist.Ranks, *, load_weights: bool) -> Experiment:
    """Model and objective on this rank's device; initial weights follow from the seed alone."""
    dist.seed_everything(root.seed)
    augmentation = facts.augmentation
    model = build_model(
        root.model,
        root.peft,
        outputs=len(facts.class_names),
        channels=facts.channels,
        image_size=None if augmentation is None else augmentation.image_size,
        load_weights=load_weights,
    ).to(ranks.device)
    mil.check_instances(root.model.head, model.head, model.encoder, facts)
    objective = build_objective(root.task, facts, ranks.device)
    return Experiment(root, facts, model, objective, ranks)


def build_trainer(experiment: Experiment, data: Data, hooks: Hooks) -> Trainer:
    """The loop over the train split, with evaluations of the val split where there is one."""
    root, facts, ranks = experiment.root, experiment.facts, experiment.ranks
    val, steps = data.splits.get("val"), root.training.val_steps_per_epoch
    if val is not None and steps is not None:
        val = some_of(val, steps * facts.eval_batch_size * ranks.world, root.seed)
    return Trainer(
        experiment.model,
        experiment.objective,
        train_loader=experiment.loader(data.splits["train"], train=True),
        val_loader=experiment.loader(val, train=False) if val is not None and len(val) else None,
        training=root.training,
        optimizer=root.optimizer,
        best_metric=facts.best_metric,
        calibration_batches=root.peft.calibration_batches if isinstance(root.peft, Gps) else 0,
        seed=root.seed,
        ranks=ranks,
        hooks=hooks,
    )


def some_of(split: Split, count: int, seed: int) -> Split:
    """At most `count` samples of a split, drawn from the seed, in the split's order."""
    if count >= len(split):
        return split
    rows = np.random.default_rng(seed).permutation(len(split))[:count]
    return subset(split, np.sort(rows))


def restore(path: Path, root: Root, ranks: dist.Ranks) -> Experiment:
    """The model of a checkpoint with its own transforms, to be asked as `root` says: data, batches,
    metrics, intervals and plots are those of the present spec.

    Raises:
        UserError: no such file, not a checkpoint of glovita, or of another model.
    """
    saved = checkpoint.load(path, map_location="cpu")
    own, facts = spec_of(saved, path), facts_of(saved, path)
    for line in split_notes(own, root) if ranks.is_main else ():
        say(f"  note: {path} was trained with {line}: it may know samples of this split")
    size = root.dataloading.eval_batch_size or root.dataloading.batch_size
    facts = replace(facts, eval_batch_size=size, metrics=root.task.metrics or facts.metrics)
    task = replace(own.task, bootstrap=root.task.bootstrap, result_plot=root.task.result_plot)
    own = replace(own, data=root.data, dataloading=root.dataloading, task=task)
    experiment = assemble(own, facts, ranks, load_weights=False)
    checkpoint.load_model(experiment.model, trained_weights(saved), path)
    experiment.checkpoint = path
    if root.mode == "infer" and root.infer.merge:
        adapter.merge(experiment.model)
    return experiment


def split_notes(own: Root, root: Root) -> list[str]:
    """What divides the samples of one data set in another way than when a model was trained, where
    it is asked about a split."""
    if root.mode not in ("infer", "extract") or (root.mode == "infer" and root.infer.input):
        return []
    ours, theirs = msgspec.to_builtins(root.data), msgspec.to_builtins(own.data)
    if any(ours[key] != theirs.get(key) for key in ("dataset", "data_root_dir")):
        return []
    split = root.extract.split if root.mode == "extract" else root.infer.split or "test"
    keys, drawn = SPLIT_KEYS, ours.get("split_source") == "kfold"
    if "val_fraction" in ours:  # val is drawn, test is always the same
        drawn = split != "test"
        keys = SPLIT_KEYS if drawn else ("test_fraction",)
    changed = [key for key in keys if ours.get(key) != theirs.get(key)]
    notes = [f"data.{key} = {theirs.get(key)!r}, not {ours.get(key)!r}" for key in changed]
    if drawn and own.seed != root.seed:
        notes.append(f"seed = {own.seed}, not {root.seed}")
    return notes


def trained_weights(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that were evaluated: the averaged ones where the run kept an average."""
    return saved["model"] if saved["ema"] is None else saved["ema"]


def spec_of(saved: dict[str, Any], path: Path) -> Root:
    """The resolved spec inside a checkpoint."""
    return part(saved, "spec", Root, path)


def facts_of(saved: dict[str, Any], path: Path) -> Facts:
    """The run-time values inside a checkpoint."""
    return part(saved, "facts", Facts, path)


def part(saved: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    """A Struct inside a checkpoint."""
    try:
        return msgspec.convert(saved[key], kind)
    except (KeyError, msgspec.ValidationError) as error:
        raise UserError(
            f"{path} holds no {key} that this version of glovita reads ({error}); give a"
            " checkpoint that glovita wrote"
        ) from None
