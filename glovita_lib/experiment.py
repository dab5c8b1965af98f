"""What every mode builds from a spec: data, resolved values, model, objective, loaders."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, Unpack, get_args

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from glovita_lib import checkpoint, dist, peft_base
from glovita_lib.data import ArraySource, Data, Outputs, Source, Split, subset
from glovita_lib.data_splits import WHOLE_COHORT
from glovita_lib.datasets import build_data
from glovita_lib.dist import WorkerPool, resolve_precision
from glovita_lib.encoder import Encoder, Features, with_facts
from glovita_lib.encoder_aggregation import output_width
from glovita_lib.errors import UserError
from glovita_lib.heads import LinearHead
from glovita_lib.loader import Batch, Loader, LoaderOptions, announce, build_loader
from glovita_lib.loggers import Rate, say
from glovita_lib.model import BaseWeights, Model, build_model
from glovita_lib.objectives import (
    LabelObjective,
    Objective,
    Predictions,
    as_loaded,
    build_objective,
    gather_split,
)
from glovita_lib.peft import AdapterFile, is_adapter, load_adapter, read_adapter
from glovita_lib.resolved import (
    BagInputs,
    EncodedInputs,
    Inputs,
    Resolved,
    VectorInputs,
    VolumeInputs,
)
from glovita_lib.spec import ByStruct, Spec, expand, with_paths
from glovita_lib.spec_errors import shown
from glovita_lib.spec_model import Head
from glovita_lib.spec_root import Root
from glovita_lib.spec_volumes import VolumeAugmentation
from glovita_lib.trainer import Hooks, Trainer

if TYPE_CHECKING:
    from glovita_lib.bags import Bags


EVALUATION_KEYS = ("evaluation", "window_overlap", "window_reduce", "window_chunk")
"""What of data.augmentation a checkpoint is asked anew, where the spec names the first of them."""


def check_instances(spec: Head, head: nn.Module, encoder: Encoder, resolved: Resolved) -> None:
    """What the data are must fit the head: bags one that takes instances, and the other way round.

    Args:
        spec: the head's Struct.

    Raises:
        UserError: they do not fit, or instance_eval on a regression, whose targets label nothing.
    """
    inputs = resolved.inputs
    if isinstance(inputs, BagInputs) and head.consumes == "pooled":
        others = ", ".join(f'"{tag(kind)}"' for kind in get_args(Head) if kind.takes == "bags")
        raise UserError(
            f'model.head.head_type = "{tag(spec)}": the samples are bags of instances, and this'
            f" head takes one vector a sample; heads for bags are {others}"
        )
    if spec.takes != "bags":
        return
    of_vectors = isinstance(inputs, VectorInputs)
    if of_vectors or not (isinstance(inputs, BagInputs) or encoder.has_patches):
        one = "the features hold" if of_vectors else "the encoder gives"
        raise UserError(
            f'model.head.head_type = "{tag(spec)}" takes bags of instances, but {one} one vector a'
            ' sample: set it to "classification" or "regression", or give bags (bag_ptr in the'
            " feature file) or an encoder with patch tokens"
        )
    if spec.needs_classes and resolved.subtask == "regression":
        raise UserError(
            f"model.head.{spec.needs_classes} = true labels instances by the class of their bag,"
            " but the targets are numbers: set it to false"
        )


def tag(spec: Spec | type[Spec]) -> str:
    """What the spec file calls a Struct, or the kind of one."""
    return str(spec.__struct_config__.tag)


# ------------------------------------------------------------------------------- experiments


@dataclass
class Experiment:
    """A model with its spec, its resolved values and its objective, to be trained or evaluated."""

    root: Root
    resolved: Resolved
    model: Model  # on the device of this rank
    objective: Objective
    ranks: dist.Ranks
    checkpoint: Path | None = None
    """File that the weights come from; None: from the encoder's own, or the seed."""
    pool: WorkerPool | None = None
    """Worker processes of all its loaders; None: each has its own."""
    batches: dict[str, Any] | None = None
    """How those of the last prediction were made, see Loader.facts."""

    @property
    def predictor(self) -> LabelObjective:
        """The objective, of which modes ask scores.

        Raises:
            UserError: it gives none.
        """
        if isinstance(self.objective, LabelObjective):
            return self.objective
        raise UserError(
            f'task.objective = "{tag(self.root.task)}" predicts no scores: only features can be'
            " read out of its model"
        )

    @property
    def precision(self) -> str:
        """Autocast type on this device: no, bf16 or fp16."""
        return resolve_precision(self.root.training.precision, self.ranks.device)

    def loader(self, split: Split, *, train: bool, step_size: int | None = None) -> Loader:
        """Batches of a split, with the geometry of the policy that it is used with.

        Args:
            step_size: samples of an optimizer step over all ranks; none: as the spec says.
        """
        objective, spec = self.objective, self.root.dataloading
        return build_split_loader(
            self.resolved.inputs,
            as_loaded(self.resolved.inputs, split, train=train),
            self.root,
            fit=(objective.train_inputs if train else objective.eval_inputs).fit,
            train=train,
            seed=self.root.seed if train else 0,  # evaluation draws nothing
            ranks=self.ranks,
            batch_size=spec.batch_size if train else self.resolved.eval_batch_size,
            scale=objective.target_scale,
            pool=self.pool,
            step_size=step_size,
            accumulation=self.root.training.gradient_accumulation_steps,
        )

    @contextmanager
    def shared_workers(self, data: Data) -> Iterator[None]:
        """The same worker processes for all loaders of the block: those of training, and those that
        predict the splits afterwards."""
        self.pool = WorkerPool(self.root.dataloading, self.ranks.device)
        fit = self.objective.eval_inputs.fit
        for split in data.splits.values():
            announce(
                as_loaded(self.resolved.inputs, split, train=False),
                self.root.dataloading,
                fit=fit,
                seed=0,
                ranks=self.ranks,
                scale=self.objective.target_scale,
                pool=self.pool,
            )
        try:
            yield
        finally:
            self.pool.close()
            self.pool = None

    def single_pass(
        self, split: Split, *, augmented: bool, seed: int, ranks: dist.Ranks, here: bool = False
    ) -> Loader:
        """Batches of a split of images, in its order, that are read once: nothing is kept decoded.

        Args:
            augmented: whether the geometry is that of the train policy.
            seed: of the draws of a train policy.
            here: whether this process reads them, as for a few samples.
        """
        objective, spec = self.objective, self.root.dataloading
        split = as_loaded(self.resolved.inputs, split, train=augmented, once=True)
        if not isinstance(split.source, ArraySource):
            spec = replace(spec, in_memory_mb=0)
        if here:
            spec = replace(spec, num_workers=0)
        return build_loader(
            split,
            spec,
            fit=(objective.train_inputs if augmented else objective.eval_inputs).fit,
            train=False,
            seed=seed,
            ranks=ranks,
            batch_size=self.resolved.eval_batch_size,
            pool=self.pool,
        )

    def predict(self, split: Split) -> Predictions | None:
        """Predictions of a whole split on the first rank, None on the others.

        Never compiled: results are the same after training, in mode infer and on other machines.
        """
        if self.root.training.compile:
            self.model.compile(disable=True)
        loader = self.loader(split, train=False)
        self.batches = loader.facts()
        try:
            return self.objective.evaluate(
                self.model, loader, ranks=self.ranks, precision=self.precision
            )
        finally:
            loader.close()


@ByStruct
def build_split_loader(
    inputs: Inputs, split: Split, root: Root, **options: Unpack[LoaderOptions]
) -> Loader:
    """Loader of a split of the inputs of a run; options are those of build_loader."""
    return build_loader(split, root.dataloading, **options)


def read_data(
    root: Root,
    ranks: dist.Ranks,
    *,
    named: bool = False,
    model: Resolved | None = None,
    wanted: Sequence[str] = (),
) -> Data:
    """The data of a spec; the first rank reads (and downloads) before the others, and alone looks
    at all values of features. Only training needs a train split.

    Args:
        named: whether the spec names its head, which then says what labels are that may be either.
        model: what a trained model has resolved, where it is asked about the labels.
        wanted: names of splits, of which the first that is there is needed; empty: all that are
            there. Training needs all.
    """
    spec = root.data if ranks.is_main else root.data.unchecked()
    trained = (
        None if model is None else Outputs(model.subtask, model.class_names, model.number_names)
    )
    with dist.main_first(ranks):
        return build_data(
            spec,
            seed=root.seed,
            trains=root.mode == "train",
            trained=trained,
            wanted=None if root.mode == "train" else wanted,
            predicts=root.model.head.only_predicts(named=named),
        )


def assemble(
    root: Root, resolved: Resolved, ranks: dist.Ranks, *, load_weights: bool
) -> Experiment:
    """Model and objective on this rank's device; initial weights follow from the seed alone.

    Args:
        load_weights: False where a checkpoint is loaded over it.
    """
    base = merged_base(root, ranks) if load_weights else None
    spec, facts = root.model, resolved.encoder_facts
    if facts is not None:
        spec = replace(spec, encoder=with_facts(spec.encoder, facts))
    dist.seed_everything(root.seed)
    spec = replace(spec, encoder=spec.encoder.of_samples(resolved.inputs.spec_kind))
    model = build_model(
        spec,
        root.peft,
        outputs=len(resolved.class_names),
        load_weights=load_weights,
        base=base,
        **resolved.inputs.model_arguments,
    ).to(ranks.device)
    for note in model.encoder.notes if ranks.is_main else ():
        say(f"  note: {note}")
    check_instances(root.model.head, model.head, model.encoder, resolved)
    objective = build_objective(root.task, resolved, ranks.device)
    return Experiment(root, resolved, model, objective, ranks)


def samples_per_step(root: Root, world: int) -> int:
    """Samples of an optimizer step of a run that is started on so many ranks."""
    return root.dataloading.batch_size * root.training.gradient_accumulation_steps * world


def build_trainer(
    experiment: Experiment, data: Data, hooks: Hooks, step_size: int | None = None
) -> Trainer:
    """The loop over the train split, with evaluations of the val split where there is one.

    Args:
        step_size: samples of an optimizer step over all ranks, of a run that is continued; none:
            as the spec says.
    """
    root, resolved, ranks = experiment.root, experiment.resolved, experiment.ranks
    val, steps = data.splits.get("val"), root.training.val_steps_per_epoch
    if val is not None and steps is not None:
        world = ranks.world if step_size is None else step_size // samples_per_step(root, 1)
        val = some_of(val, steps * resolved.eval_batch_size * world, root.seed)
    trainer = Trainer(
        experiment.model,
        experiment.objective,
        train_loader=experiment.loader(data.splits["train"], train=True, step_size=step_size),
        val_loader=experiment.loader(val, train=False) if val is not None and len(val) else None,
        training=root.training,
        optimizer=root.optimizer,
        best_metric=resolved.best_metric,
        calibration_batches=root.peft.calibration_batches,
        seed=root.seed,
        ranks=ranks,
        hooks=hooks,
    )
    trainer.refuse_lone_values()
    return trainer


def some_of(split: Split, count: int, seed: int) -> Split:
    """At most `count` samples of a split, drawn from the seed, in the split's order."""
    if count >= len(split):
        return split
    rows = np.random.default_rng(seed).permutation(len(split))[:count]
    return subset(split, np.sort(rows))


def restore(path: Path, root: Root, ranks: dist.Ranks) -> Experiment:
    """The model of a checkpoint, or of a PEFT run's adapter file over its base, with its own
    transforms, to be asked as `root` says: data, batches, metrics, intervals and plots are those of
    the present spec.

    Raises:
        UserError: no such file, not a checkpoint of glovita, or of another model or base.
    """
    adapter = read_adapter(path) if path.suffix == ".safetensors" else None
    saved = checkpoint.load(path, map_location="cpu") if adapter is None else adapter.run
    own, resolved = spec_of(saved, path), resolved_of(saved, path)
    if ranks.is_main:
        for line in split_notes(own, root):
            say(f"  note: {path} was trained with {line}: it may know samples of this split")
        for line in cohort_notes(own, root):
            say(f"  note: {line}")
        for line in transform_notes(own, root):
            say(f"  note: {line} has no effect: {path} keeps the transforms it was trained with")
    size = root.dataloading.eval_batch_size or root.dataloading.batch_size
    resolved = replace(
        resolved,
        eval_batch_size=size,
        metrics=root.task.metrics or resolved.metrics,
        inputs=evaluated_as(resolved.inputs, root),
    )
    task = replace(own.task, bootstrap=root.task.bootstrap, result_plot=root.task.result_plot)
    own = replace(own, data=root.data, dataloading=root.dataloading, task=task)
    if adapter is None:
        experiment = assemble(own, resolved, ranks, load_weights=False)
        checkpoint.load_model(experiment.model, trained_weights(saved), path)
    else:
        experiment = over_base(adapter, with_base_of(own, root), resolved, ranks)
    experiment.checkpoint = path
    if root.mode == "infer" and root.infer.merge:
        peft_base.merge(experiment.model)
        experiment.model.refresh()
    return experiment


def evaluated_as(inputs: Inputs, root: Root) -> Inputs:
    """Inputs with the windows that a spec asks for where it says itself what evaluation sees."""
    asked = getattr(root.data, "augmentation", None)
    if not isinstance(asked, VolumeAugmentation) or not isinstance(inputs, VolumeInputs):
        return inputs
    if asked.evaluation is None or inputs.augmentation.whole:
        return inputs
    changed = {key: getattr(asked, key) for key in EVALUATION_KEYS}
    return replace(inputs, augmentation=replace(inputs.augmentation, **changed))


def over_base(adapter: AdapterFile, own: Root, resolved: Resolved, ranks: dist.Ranks) -> Experiment:
    """The model that a PEFT run has trained, from its adapter file and its base.

    Raises:
        UserError: the base cannot be had, or is another one.
    """
    try:
        experiment = assemble(own, resolved, ranks, load_weights=True)
    except UserError as error:
        raise UserError(
            f"{adapter.path} is laid over its base, {adapter.base}, which cannot be had: {error}"
        ) from None
    load_adapter(adapter, experiment.model)
    return experiment


def with_base_of(own: Root, root: Root) -> Root:
    """A run's spec whose base file lies where the present spec has it, for the same encoder."""
    here, there = (msgspec.to_builtins(spec.model.encoder) for spec in (root, own))
    same = all(here.get(key) == there.get(key) for key in ("encoder_type", "type"))
    if not (same and here.get("weights") and there.get("weights")):
        return replace(own, model=with_paths(own.model))
    given = {"weights": here["weights"], "weights_key": here["weights_key"]}
    encoder = replace(own.model.encoder, **given)
    return replace(own, model=replace(own.model, encoder=encoder))


def merged_base(root: Root, ranks: dist.Ranks) -> BaseWeights | None:
    """The tensors of the encoder that a PEFT run has made of its base, where model.encoder.weights
    is that run's adapter file; None where it is no such file.

    Raises:
        UserError: the base cannot be had, or the method's change is more than other weights.
    """
    weights = msgspec.to_builtins(root.model.encoder).get("weights")
    if weights is None or not is_adapter(weights):
        return None
    adapter, path = read_adapter(weights), Path(weights)
    if msgspec.to_builtins(root.model.encoder)["weights_key"] is not None:
        raise UserError(f"model.encoder.weights_key: {path} holds one network; leave it out")
    own, resolved = spec_of(adapter.run, path), resolved_of(adapter.run, path)
    own = replace(own, model=with_paths(own.model))
    base = msgspec.to_builtins(own.model.encoder).get("weights")
    if base is not None and Path(base).resolve() == path.resolve():
        raise UserError(f"{path} has replaced the very file that it is to be laid over")
    cpu = with_fields(ranks, device=torch.device("cpu"))
    model = over_base(adapter, own, resolved, cpu).model
    if own.model.encoder.takes == "features":
        raise UserError(f'model.encoder.weights = "{path}": a run on features, without an encoder')
    if any(isinstance(module, peft_base.Insert) for module in model.modules()):
        raise UserError(
            f'model.encoder.weights = "{path}": {tag(own.peft)} computes something beside the'
            " weights and cannot be folded into them; infer.checkpoint and extract.checkpoint read"
            " the file as it is"
        )
    peft_base.merge(model)
    return BaseWeights(weights, model.encoder.net.state_dict())


def record_of(path: Path) -> Resolved:
    """What a model was trained on, from its checkpoint or adapter file, of which the tensors of a
    checkpoint are not read.

    Raises:
        UserError: no such file, or not a checkpoint of glovita.
    """
    if path.suffix == ".safetensors":
        saved = read_adapter(path).run
    else:
        saved = checkpoint.load(path, map_location="cpu", mapped=True)
    spec_of(saved, path)  # it is there and of this version
    return resolved_of(saved, path)


def transform_notes(own: Root, root: Root) -> list[str]:
    """What a spec says of augmentation and sampling, other than when a model was trained; of one
    that names a checkpoint, which may be another run's, what is no default."""
    theirs, found = msgspec.to_builtins(own.data), []
    named = (root.infer if root.mode == "infer" else root.extract).checkpoint
    for name in ("augmentation", "sampling"):
        section = getattr(root.data, name, None)
        said = {} if section is None else msgspec.to_builtins(section)
        default = {} if named is None or section is None else msgspec.to_builtins(type(section)())
        trained = theirs.get(name) or {}
        found += [
            f"data.{name}.{key} = {shown(value)}"
            for key, value in said.items()
            if value not in (default.get(key, ...), trained.get(key)) and key not in EVALUATION_KEYS
        ]
    return found


def cohort_notes(own: Root, root: Root) -> list[str]:
    """Folds of other data than a model was trained on, where it is asked about a split: there is
    nothing that they would keep apart."""
    if root.mode not in ("infer", "extract") or (root.mode == "infer" and root.infer.input):
        return []
    ours, theirs = msgspec.to_builtins(root.data), msgspec.to_builtins(own.data)
    with suppress(UserError):
        theirs["data_root_dir"] = expand(theirs["data_root_dir"])
    places = ("dataset", "data_root_dir", "images_dir", "features_file")
    is_own = all(ours.get(key) == theirs.get(key) for key in places)
    if is_own or ours.get("split_source") != "kfold":
        return []
    return [
        f'data.split_source = "kfold" takes one of {ours["n_folds"]} folds of data that the model'
        f" was not trained on; {WHOLE_COHORT} takes all of them"
    ]


def split_notes(own: Root, root: Root) -> list[str]:
    """What divides the samples of one data set in another way than when a model was trained, where
    it is asked about a split."""
    if root.mode not in ("infer", "extract") or (root.mode == "infer" and root.infer.input):
        return []
    ours, theirs = msgspec.to_builtins(root.data), msgspec.to_builtins(own.data)
    with suppress(UserError):  # of a checkpoint: as it was written
        theirs["data_root_dir"] = expand(theirs["data_root_dir"])
    if any(ours[key] != theirs.get(key) for key in ("dataset", "data_root_dir")):
        return []
    split = root.extract.split if root.mode == "extract" else root.infer.split or "test"
    keys = root.data.split_fields
    drawn = ours.get("split_source") == "kfold"
    if "val_fraction" in ours:  # val is drawn, test is always the same
        drawn = split != "test"
        keys = keys if drawn else ("test_fraction",)
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


def resolved_of(saved: dict[str, Any], path: Path) -> Resolved:
    """The run-time values inside a checkpoint."""
    return part(saved, "resolved", Resolved, path)


Saved = TypeVar("Saved", Root, Resolved)


def part(saved: dict[str, Any], key: str, kind: type[Saved], path: Path) -> Saved:
    """A Struct inside a checkpoint."""
    try:
        return msgspec.convert(saved[key], kind)
    except (KeyError, msgspec.ValidationError) as error:
        raise UserError(
            f"{path} holds no {key} that this version of glovita reads ({error}); give a"
            " checkpoint that glovita wrote"
        ) from None


# ---------------------------------------------------------------------- a split in memory
#
# What an encoder gives for every sample of a split, computed once.
#
# B batch, N samples, D width.


def embed_split(
    experiment: Experiment,
    name: str,
    split: Split,
    outputs: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    *,
    augmented: bool = False,
) -> dict[str, torch.Tensor]:
    """Outputs for the samples of a split of images, in its order, the same on every rank: CPU
    tensors (N, ...) by name.

    Args:
        name: of the progress bar.
        outputs: the encoder's input (B, C, H, W) -> tensors (B, ...) by name.
        augmented: whether the input is that of the train policy, which must draw nothing.
    """
    ranks, objective = experiment.ranks, experiment.objective
    prepare = objective.train_inputs if augmented else objective.eval_inputs
    rate = Rate(name, len(split) // ranks.world, shown=ranks.is_main)

    def of_batch(_: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        rate.add(len(batch.rows))
        return {"rows": batch.rows, **outputs(prepare(batch.inputs, batch.fitted, 0))}

    seed, precision = experiment.root.seed, experiment.precision
    with closing(
        experiment.single_pass(split, augmented=augmented, seed=seed, ranks=ranks)
    ) as loader:
        gathered = gather_split(
            experiment.model, of_batch, loader, ranks=ranks, precision=precision
        )
    rate.close()
    return dist.broadcast_object(ranks, gathered)


@dataclass(frozen=True)
class EncodedBags(Source):
    """Vectors (n, D) of the parts of each sample, in memory."""

    samples: list[np.ndarray]
    uniform: ClassVar[None] = None

    @property
    def collate(self) -> "Callable[[Any], Bags]":
        return packed

    def fetch(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self.samples[row] for row in rows]

    def nbytes(self) -> int:
        return sum(sample.nbytes for sample in self.samples)

    def select(self, rows: np.ndarray) -> "EncodedBags":
        return EncodedBags(self.fetch(rows))


def packed(samples: list[np.ndarray]) -> "Bags":
    """Samples (n, D) as bags."""
    from glovita_lib.bags import Bags  # runs on images do not load it

    lengths = torch.tensor([len(sample) for sample in samples])
    return Bags(torch.from_numpy(np.concatenate(samples)), lengths)


def cached(experiment: Experiment, data: Data) -> tuple[Experiment, Data]:
    """Experiment and data that training sees: where training.cache_frozen_features is set, the
    train and val splits are the vectors that the encoder and the aggregation give, or bags of its
    tokens for a head that takes them; else unchanged.

    `refuse_unstable` checks that they are the same in every epoch.
    """
    if not experiment.root.training.cache_frozen_features:
        return experiment, data
    model = experiment.model
    encoded = experiment.resolved.inputs
    assert isinstance(encoded, EncodedInputs), "refuse_unstable lets encoded samples pass only"
    most = model.encoder.most_tokens(encoded.shape[1:])

    def vectors(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if model.head.consumes == "pooled":
            return {"vectors": model.embed(inputs, model.aggregation).float()}  # (B, D)
        features = model.features(inputs)
        assert isinstance(features, Features), "refuse_unstable lets encoded samples pass only"
        tokens = features.patches.float()  # (B, N, D)
        if most is None:
            return {"vectors": tokens}
        counts = torch.tensor([len(places) for places in features.places or ()])
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, most - tokens.shape[1]))
        return {"vectors": padded, "counts": counts}  # (B, most, D), (B,)

    splits = {}
    wanted = {name: s for name, s in data.splits.items() if name in ("train", "val") and len(s)}
    for name, split in wanted.items():
        augmented = name == "train"
        found = embed_split(experiment, f"encoding {name}", split, vectors, augmented=augmented)
        source: Source = ArraySource(found["vectors"].numpy(), np.arange(len(split)))
        if "counts" in found:
            parts = zip(found["vectors"], found["counts"].tolist(), strict=True)
            source = EncodedBags([vectors[:count].numpy() for vectors, count in parts])
        splits[name] = with_fields(split, source=source)
    inputs: Inputs = BagInputs(width=model.encoder.width, mean=None, std=None)
    if model.head.consumes == "pooled":
        width = output_width(model.encoder, model.aggregation)
        inputs = VectorInputs(width=width, mean=None, std=None)
    resolved = replace(experiment.resolved, inputs=inputs)
    objective = build_objective(experiment.root.task, resolved, experiment.ranks.device)
    small = with_fields(experiment, resolved=resolved, objective=objective)
    return small, with_fields(data, splits={**data.splits, **splits})


def refuse_unstable(experiment: Experiment) -> None:
    """Where training.cache_frozen_features is set, the vectors of every epoch must be the same.

    Raises:
        UserError: the samples are features, the encoder trains, the head takes tokens that are too
            many to be kept, or the train policy draws something.
    """
    if not experiment.root.training.cache_frozen_features:
        return
    key = "training.cache_frozen_features = true"
    model, inputs = experiment.model, experiment.resolved.inputs
    if not isinstance(inputs, EncodedInputs):
        raise UserError(f"{key}: the samples are features already; leave it out")
    takes = model.head.consumes
    kept = takes == "pooled" or (takes == "features" and model.encoder.has_few_tokens)
    if not model.encoder_is_frozen or not kept:
        raise UserError(
            f"{key}: the encoder trains, or the head reads its tokens; set peft.method ="
            ' "linear_probing" with head_type classification or regression, or leave it out'
        )
    parts = inputs.parts
    if parts is not None and not (isinstance(model.head, LinearHead) and parts.are_averaged):
        raise UserError(
            f"{key}: the logits of the {parts.name} of a sample are not those of their mean vector;"
            f" set {parts.setting} and head_type classification or regression, or leave it out"
        )
    task = experiment.root.task
    mixed = [name for name in ("mixup", "cutmix") if getattr(task, name)]
    drawn = inputs.drawn | {f"task.{name}": f"task.{name} = false" for name in mixed}
    if drawn:
        cure = ", ".join(dict.fromkeys(drawn.values()))
        raise UserError(
            f"{key}: training draws {', '.join(drawn)}, so no two epochs are alike; set {cure},"
            " or leave it out"
        )
