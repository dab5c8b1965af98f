"""Embeddings of the samples of a data set, in memory, for modes that look at them.

N samples, D width, K classes or targets.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec.structs import replace

from glovita_lib import dist
from glovita_lib.datasets import Data, Split
from glovita_lib.extraction import Extractor, Readout
from glovita_lib.facts import Facts
from glovita_lib.feature_job import Job, say_main
from glovita_lib.progress import Rate
from glovita_lib.projection_source import Said
from glovita_lib.run_extract import plan_job, source_of, wanted_splits
from glovita_lib.samples import subset
from glovita_lib.skipping import skipped
from glovita_lib.spec import Loaded, UserError


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of the samples of one or several splits, one split after another."""

    features: np.ndarray  # (N, D) float32
    targets: np.ndarray | None  # (N,) int64 or (N, K) float32
    ids: list[str]
    class_names: tuple[str, ...]
    subtask: str
    said: Said | None  # predictions; None of an encoder that was not trained
    splits: dict[str, Split]  # whose samples follow one another
    notes: tuple[str, ...]  # what is to be known about them


Choice = Callable[[dict[str, Split], Data], dict[str, Split]]
"""Which samples of the splits are wanted."""


def embeddings_of(
    loaded: Loaded, ranks: dist.Ranks, split: str | None, choose: Choice
) -> Embeddings:
    """Embeddings of a split, or of all, as mode extract makes them under the spec's `extract`, of
    the samples that `choose` leaves of them, with the predictions of the same pass.

    This process does it all: `ranks` has a world of one.

    Raises:
        UserError: as mode extract.
    """
    spec = loaded.root.extract
    spec = replace(spec, output="embedding", split=split, precision=32, bag_by=None)
    spec = replace(spec, coords_file=None, use_eval_transform_for_train=True)
    root = replace(loaded.root, extract=spec)
    experiment, data = source_of(loaded, ranks)
    trained = spec.checkpoint is not None or spec.source == "run"
    extractor = Extractor(experiment, spec, predicts=trained)
    splits, parts = choose(wanted_splits(spec, data), data), []
    for name, part in splits.items():
        readouts, kept = read_split(plan_job(root, extractor, data, name, part))
        parts.append(readouts)
        splits[name] = subset(part, kept) if len(kept) < len(part) else part
    targets = [part.targets for part in splits.values()]
    facts = experiment.facts
    return Embeddings(
        features=np.concatenate([part.features for part in parts]),
        targets=None if any(t is None for t in targets) else np.concatenate(targets),
        ids=[name for part in splits.values() for name in part.ids],
        class_names=data.class_names,
        subtask=data.subtask,
        said=Said(np.concatenate([part.scores for part in parts]), facts.subtask, facts.class_names)
        if trained
        else None,
        splits=splits,
        notes=other_outputs(facts, data) if trained else (),
    )


def other_outputs(facts: Facts, data: Data) -> tuple[str, ...]:
    """A note where the data have other classes or targets than those the model was trained on."""
    if (facts.subtask, facts.class_names) == (data.subtask, data.class_names):
        return ()
    names = ", ".join(facts.class_names[:10]) + ", ..." * (len(facts.class_names) > 10)
    return (
        f"{data.name} has other classes or targets than the model was trained on"
        f" ({facts.subtask}: {names}); predictions are shown under the model's own, without"
        " mistakes",
    )


def read_split(job: Job) -> tuple[Readout, np.ndarray]:
    """Embeddings (N, D) of a split with the predictions, and the rows (N,) of it that could be
    read.

    Raises:
        UserError: a sample cannot be read and none may be left out, or all of them.
    """
    count = len(job.split)
    rate = Rate(job.name, count, shown=job.ranks.is_main)
    with TemporaryDirectory() as notes:
        split = job.readable(np.arange(count), Path(notes))
        with closing(job.readouts(split, 0, rate)) as stream:
            parts = list(stream)
        broken = skipped(Path(notes))
    rate.close()
    for line in broken.values():
        say_main(job.ranks, f"  left out: {line}")
    kept = np.delete(np.arange(count), list(broken))
    if not len(kept):
        raise UserError(f"{job.name}: none of the {count} samples could be read")
    features = np.concatenate([part.features for part in parts])[kept]
    scores = None
    if parts[0].scores is not None:
        scores = np.concatenate([part.scores for part in parts])[kept]
    return Readout(features, None, None, scores), kept
