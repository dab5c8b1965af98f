"""Mode extract: features of every sample of a split, in the order of the data set, as HDF5."""

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from glovita_lib import dist
from glovita_lib.datasets import Data, Split
from glovita_lib.experiment import Experiment, assemble, read_data, resolve_facts, restore
from glovita_lib.extraction import Extractor
from glovita_lib.feature_job import Job
from glovita_lib.feature_recipe import (
    file_name,
    policy_of,
    recipe_of_features,
    recipe_of_tables,
)
from glovita_lib.feature_tables import Plan, group_order
from glovita_lib.feature_writer import Parts
from glovita_lib.progress import say
from glovita_lib.rundir import locate
from glovita_lib.spec import Loaded, UserError
from glovita_lib.spec_data import GenericImageData
from glovita_lib.spec_features import Extract
from glovita_lib.spec_root import Root

BLOCK_BYTES = 256 * 2**20  # of features: a block is kept in memory until it is written


def run(loaded: Loaded, *, dry_run: bool) -> None:
    """Extract the wanted splits; a dry run reads one batch of each and writes nothing."""
    with dist.session() as ranks:
        experiment, data = source_of(loaded, ranks)
        extractor = Extractor(experiment, loaded.root.extract)
        notes = data.report if ranks.is_main else []
        at_end = loaded.root.extract.on_error == "skip" and not dry_run
        for note in notes:
            say(f"  note: {heading(note) if at_end else note}")
        splits = wanted_splits(loaded.root.extract, data)
        jobs = [plan_job(loaded.root, extractor, data, *split) for split in splits.items()]
        refuse_one_name(jobs)
        for job in jobs:
            job.check()
        for job in jobs:
            if dry_run:
                job.rehearse()
            else:
                job.run()
        for note in notes if at_end else ():
            if heading(note) != note:
                say(f"  note: {note}")


def heading(note: str) -> str:
    """A note without its list of samples, which comes at the end."""
    head, newline, _ = note.partition("\n")
    return f"{head} listed at the end" if newline else head


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
    facts = experiment.facts
    for name in ("channels", "bit_depth"):
        if getattr(facts, name) != getattr(data, name):
            raise UserError(
                f"{path} was trained on images of {name} {getattr(facts, name)}, data set"
                f" {data.name} has {name} {getattr(data, name)}; set data.{name}"
            )
    training = replace(experiment.root.training, precision=root.training.precision)
    experiment.root = replace(experiment.root, training=training)
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
        UserError: there is none of that name, or none at all.
    """
    there = {name: split for name, split in data.splits.items() if len(split)}
    if not there:
        raise UserError(f"data set {data.name} has no sample")
    if spec.split is None:
        return there
    if spec.split not in there:
        raise UserError(
            f'extract.split = "{spec.split}": data set {data.name} has {", ".join(there)}'
        )
    return {spec.split: there[spec.split]}


def plan_job(root: Root, extractor: Extractor, data: Data, name: str, split: Split) -> Job:
    """The extraction of one split: file name, order of the samples, recipe."""
    spec, experiment = root.extract, extractor.experiment
    rows = np.arange(len(split)) if spec.bag_by is None else group_order(split)
    batch = experiment.facts.eval_batch_size
    plan = Plan(rows, block_size(spec, batch, extractor.sample_bytes))
    augmented = name == "train" and not spec.use_eval_transform_for_train
    features = recipe_of_features(root, extractor, data, name, split)
    features |= policy_of(root, plan, augmented=augmented, batch_size=batch)
    target = Path(spec.output_dir) / file_name(root, extractor, name)
    return Job(
        root=root,
        extractor=extractor,
        name=name,
        split=split,
        plan=plan,
        parts=Parts(target, features, plan),
        recipe=recipe_of_tables(root, data, split),
        augmented=augmented,
        report=data.report,
    )


def block_size(spec: Extract, batch: int, sample_bytes: int) -> int:
    """Samples of a block: whole batches, at least one, with at most BLOCK_BYTES of features.

    It follows from the spec and the model alone, so that all ranks, and a run that goes on after a
    kill, number the blocks alike.
    """
    wanted = -(-spec.block_samples // batch)
    return batch * max(1, min(wanted, BLOCK_BYTES // (batch * sample_bytes)))


def refuse_one_name(jobs: list[Job]) -> None:
    """Every split needs a file of its own.

    Raises:
        UserError: two have the same.
    """
    targets = [job.parts.target for job in jobs]
    if len(set(targets)) < len(targets):
        raise UserError(
            f"extract.output_filename gives {targets[0].name} to several of the splits"
            f" {', '.join(job.name for job in jobs)}: put {{split}} into it, or name one with"
            " extract.split"
        )
