"""Mode extract: features of every sample of a split, in the order of the data set, as HDF5."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from glovita_lib import __version__, dist
from glovita_lib.datasets import Data, Split
from glovita_lib.experiment import (
    Experiment,
    assemble,
    read_data,
    resolve_facts,
    restore,
    some_of,
)
from glovita_lib.extraction import Extractor, Readout, weights_hash
from glovita_lib.feature_tables import Plan, bag_tables, group_order, sample_tables
from glovita_lib.feature_writer import Parts, put_together, refuse_other, size_text
from glovita_lib.loaders import Loader, build_loader
from glovita_lib.progress import Rate, say
from glovita_lib.readers import FileSource
from glovita_lib.rundir import locate, versions
from glovita_lib.samples import subset
from glovita_lib.skipping import SkippingSource, skipped
from glovita_lib.spec import Loaded, UserError
from glovita_lib.spec_data import GenericImageData
from glovita_lib.spec_features import Extract
from glovita_lib.spec_root import Root


def run(loaded: Loaded, *, dry_run: bool) -> None:
    """Extract the wanted splits; a dry run reads one batch of each and writes nothing."""
    with dist.session() as ranks:
        experiment, data = source_of(loaded, ranks)
        extractor = Extractor(experiment, loaded.root.extract)
        for name, split in wanted_splits(loaded.root.extract, data).items():
            job = plan_job(loaded.root, extractor, data, name, split)
            if dry_run:
                job.rehearse()
            else:
                job.run()


# ---------------------------------------------------------------------- what is read out


def source_of(loaded: Loaded, ranks: dist.Ranks) -> tuple[Experiment, Data]:
    """The model to read out, with its transforms, and the data.

    Raises:
        UserError: the spec's run does not exist.
    """
    root, spec = for_extraction(loaded.root), loaded.root.extract
    data = read_data(root, ranks)
    if spec.checkpoint is None and spec.source == "encoder":
        return assemble(root, resolve_facts(root, data), ranks, load_weights=True), data
    if spec.checkpoint is not None:
        path = Path(spec.checkpoint)
    else:
        run = locate(loaded)
        path = run.best if spec.use == "best" else run.last
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: train the spec first, name a file with"
                ' extract.checkpoint = "<path>", or read the untrained or pretrained encoder out'
                ' with extract.source = "encoder"'
            )
    experiment = restore(path, root, ranks)
    if experiment.facts.channels != data.channels:
        raise UserError(
            f"{path} takes {experiment.facts.channels} channels, data set {data.name} has"
            f" {data.channels}; set data.channels"
        )
    return experiment, data


def for_extraction(root: Root) -> Root:
    """All samples, in batches of the evaluation; broken ones are left out where that is asked."""
    data, spec = root.data, root.extract
    if not spec.use_data_fraction:
        data = replace(data, data_fraction=1.0)
    if spec.on_error == "skip" and isinstance(data, GenericImageData):
        data = replace(data, strict=False)
    return replace(root, data=data)


def wanted_splits(spec: Extract, data: Data) -> dict[str, Split]:
    """The split asked for, or all that have samples.

    Raises:
        UserError: there is none of that name.
    """
    there = {name: split for name, split in data.splits.items() if len(split)}
    if spec.split is None:
        return there
    if spec.split not in there:
        raise UserError(
            f'extract.split = "{spec.split}": data set {data.name} has {", ".join(there)}'
        )
    return {spec.split: there[spec.split]}


def plan_job(root: Root, extractor: Extractor, data: Data, name: str, split: Split) -> "Job":
    """The extraction of one split: file name, order of the samples, recipe."""
    spec, experiment = root.extract, extractor.experiment
    if data.report and name == "train":
        for line in data.report:
            say_main(experiment.ranks, f"  note: {line}")
    rows = np.arange(len(split)) if spec.bag_by is None else group_order(split)
    batch = experiment.facts.eval_batch_size
    plan = Plan(rows, -(-spec.block_samples // batch) * batch)  # whole batches
    augmented = name == "train" and not spec.use_eval_transform_for_train
    recipe = recipe_of(root, extractor, data, name, split, augmented)
    parts = Parts(Path(spec.output_dir) / file_name(root, extractor, name), recipe, plan.blocks)
    return Job(root, extractor, name, split, plan, parts, augmented)


def file_name(root: Root, extractor: Extractor, split: str) -> str:
    """Name of the feature file.

    Raises:
        UserError: a placeholder that does not exist.
    """
    spec, augmentation = root.extract, extractor.experiment.facts.augmentation
    pattern = spec.output_filename
    if pattern is None:
        kind = "agg_{method}" if spec.output == "embedding" else spec.output
        pattern = kind + "_{model}_{dataset}_{split}_size{imgsize}_float{precision}.h5"
    known = {
        "method": extractor.method,
        "model": extractor.model.encoder.name,
        "dataset": msgspec.to_builtins(root.data)["dataset"],
        "split": split,
        "imgsize": augmentation.image_size,
        "precision": spec.precision,
        "checkpoint": Path(spec.checkpoint).stem if spec.checkpoint else spec.use,
    }
    try:
        return pattern.format(**known)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f'extract.output_filename = "{pattern}": unknown placeholder {error}; there are'
            f" {', '.join('{' + name + '}' for name in known)}"
        ) from None


def recipe_of(
    root: Root, extractor: Extractor, data: Data, name: str, split: Split, augmented: bool
) -> dict[str, Any]:
    """What determines the content of the file: written into it, compared when blocks exist."""
    experiment, spec = extractor.experiment, root.extract
    ids = hashlib.sha256("\n".join(split.ids).encode()).hexdigest()
    return {
        "dataset": data.name,
        "split": name,
        "subtask": data.subtask,
        "class_names": list(data.class_names),
        **extractor.attributes(),
        "encoder_spec": json.dumps(msgspec.to_builtins(experiment.root.model.encoder)),
        "peft_spec": json.dumps(msgspec.to_builtins(experiment.root.peft)),
        "weights_sha256": weights_hash(experiment.model),
        "transform": json.dumps(msgspec.to_builtins(experiment.facts.augmentation)),
        "policy": "train" if augmented else "test",
        "seed": root.seed if augmented else 0,
        "ids_sha256": ids,
        "bag_by": spec.bag_by or "none",
        "coords_file": spec.coords_file or "none",
    }


def say_main(ranks: dist.Ranks, text: str) -> None:
    """A line from the first rank."""
    if ranks.is_main:
        say(text)


# ---------------------------------------------------------------------- one split


@dataclass(frozen=True)
class Job:
    """The extraction of one split."""

    root: Root
    extractor: Extractor
    name: str
    split: Split
    plan: Plan
    parts: Parts
    augmented: bool

    @property
    def ranks(self) -> dist.Ranks:
        """Ranks of the experiment."""
        return self.extractor.experiment.ranks

    def run(self) -> None:
        """Write what is missing, then the file."""
        target, recipe = self.parts.target, self.parts.recipe
        if dist.main_decides(self.ranks, lambda: refuse_other(target, recipe)):
            say_main(self.ranks, f"{self.name}: {target} is complete; nothing to do")
            return
        dist.main_decides(self.ranks, self.parts.open)
        pending = dist.broadcast_object(self.ranks, self.parts.pending())
        mine = pending[self.ranks.rank :: self.ranks.world]
        done = self.plan.blocks - len(pending)
        if done:
            say_main(self.ranks, f"{self.name}: {done} of {self.plan.blocks} blocks were finished")
        total = sum(len(self.plan.rows_of(block)) for block in mine)
        rate = Rate(self.name, total, shown=self.ranks.is_main)
        for block, readouts in self.read(mine, rate):
            self.parts.write(block, self.plan.rows_of(block), readouts)
        rate.close()
        dist.barrier(self.ranks)
        dist.main_decides(self.ranks, self.finish)

    def finish(self) -> None:
        """Put the blocks together and say what came out."""
        spec = self.root.extract
        broken = skipped(self.parts.folder)
        keep = ~np.isin(self.plan.rows, list(broken))
        rows = self.plan.rows[keep]
        if not len(rows):
            raise UserError(f"{self.name}: none of the {len(keep)} samples could be read")
        tables = (
            sample_tables(self.split, rows)
            if spec.bag_by is None
            else bag_tables(self.split, rows, spec.coords_file)
        )
        found = versions()
        notes = {"glovita": __version__} | {k: str(found[k]) for k in ("torch", "timm")}
        shape = put_together(
            self.parts, tables=tables, compression=spec.compression, keep=keep, notes=notes
        )
        size = size_text(self.parts.target)
        say(f"{self.name}: {len(rows):,} samples, features {shape}, {size}: {self.parts.target}")
        for line in broken.values():
            say(f"  left out: {line}")

    def rehearse(self) -> None:
        """Read one batch out and write nothing."""
        count = self.extractor.experiment.facts.eval_batch_size
        batch = next(iter(self.loader(some_of(self.split, count, 0), 0).epoch(0)))
        shape = self.extractor(batch, augment=None).features.shape
        say_main(self.ranks, f"{self.name}: one batch gives features {shape}; nothing was written")

    def read(self, blocks: list[int], rate: "Rate") -> Iterator[tuple[int, list[Readout]]]:
        """Blocks one after another, each with the readouts of its batches.

        One loader serves all blocks, so that decoding never pauses; under a train policy each
        block has its own, as its random draws must not depend on the blocks before it.
        """
        groups = [[block] for block in blocks] if self.augmented else [blocks] if blocks else []
        for group in groups:
            rows = np.concatenate([self.plan.rows_of(block) for block in group])
            loader = self.loader(self.readable(rows), group[0])
            batches = enumerate(loader.epoch(0))
            for block in group:
                yield block, self.read_block(block, batches, rate)
            loader.close()

    def read_block(self, block: int, batches: Iterator[Any], rate: "Rate") -> list[Readout]:
        """Readouts of the batches of a block."""
        readouts, missing = [], len(self.plan.rows_of(block))
        while missing > 0:
            index, batch = next(batches)
            seed = dist.mix(self.root.seed, block, index) if self.augmented else None
            try:
                readouts.append(self.extractor(batch, augment=seed))
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from None
            missing -= len(batch.rows)
            rate.add(len(batch.rows))
        return readouts

    def readable(self, rows: np.ndarray) -> Split:
        """Some rows of the split, its broken files replaced where they are to be left out."""
        if self.root.extract.on_error == "skip" and isinstance(self.split.source, FileSource):
            source = SkippingSource(self.split.source, rows, self.parts.folder)
            return with_fields(subset(self.split, rows), source=source)
        return subset(self.split, rows)

    def loader(self, split: Split, block: int) -> Loader:
        """Batches of a split, in order, decoded while the encoder computes."""
        experiment, spec = self.extractor.experiment, self.root.dataloading
        if isinstance(split.source, FileSource | SkippingSource):
            spec = replace(spec, in_memory_mb=0)  # every sample is needed once
        objective = experiment.objective
        fit = objective.train_inputs.fit if self.augmented else objective.eval_inputs.fit
        alone = with_fields(self.ranks, rank=0, world=1)  # the rows are shared out already
        return build_loader(
            split,
            spec,
            fit=fit,
            train=False,
            seed=dist.mix(self.root.seed, block),
            ranks=alone,
            batch_size=experiment.facts.eval_batch_size,
        )
