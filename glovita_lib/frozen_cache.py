"""What a frozen encoder gives for the samples of a run, computed once.

N samples, D width.
"""

from dataclasses import replace as with_fields

import numpy as np
import torch
from msgspec.structs import replace

from glovita_lib import dist
from glovita_lib.aggregate import output_width
from glovita_lib.datasets import Data, Split
from glovita_lib.experiment import Experiment
from glovita_lib.objectives import build_objective
from glovita_lib.policies import random_operations
from glovita_lib.precision import autocast
from glovita_lib.progress import Rate
from glovita_lib.samples import ArraySource
from glovita_lib.spec import UserError


def cached(experiment: Experiment, data: Data) -> tuple[Experiment, Data]:
    """The same experiment on vectors: the train and val splits as the encoder and the aggregation
    give them, for a model whose encoder does not change; see `refuse_unstable`."""
    wanted = {name: split for name, split in data.splits.items() if name in ("train", "val")}
    splits = {name: embedded(experiment, name, split) for name, split in wanted.items()}
    facts = replace(experiment.facts, kind="vectors", augmentation=None)
    objective = build_objective(experiment.root.task, facts, experiment.ranks.device)
    small = with_fields(experiment, facts=facts, objective=objective)
    return small, with_fields(data, splits={**data.splits, **splits})


def refuse_unstable(experiment: Experiment) -> None:
    """The vectors of every epoch are the same.

    Raises:
        UserError: the samples are no images, the encoder trains, the head takes raw features, or
            the train policy draws something.
    """
    key = "training.cache_frozen_features = true"
    model, augmentation = experiment.model, experiment.facts.augmentation
    if augmentation is None:
        raise UserError(f"{key}: the samples are features already; leave it out")
    if not model.encoder_is_frozen or model.head.consumes != "pooled":
        raise UserError(
            f"{key}: the encoder trains, or the head reads its tokens; set peft.method ="
            ' "linear_probing" with head_type classification or regression, or leave it out'
        )
    task = experiment.root.task
    drawn = random_operations(augmentation.train)
    drawn += [name for name in ("mixup", "cutmix") if getattr(task, name)]
    if drawn:
        raise UserError(
            f"{key}: training draws {', '.join(drawn)}, so no two epochs are alike; set"
            ' data.augmentation.train_policy = "default_2d_1" without mixup and cutmix, or leave it'
            " out"
        )


@torch.no_grad()
def embedded(experiment: Experiment, name: str, split: Split) -> Split:
    """A split of vectors (N, D) float32, in its order, the same on every rank."""
    model, ranks = experiment.model.eval(), experiment.ranks
    loader = experiment.loader(split, train=False)
    objective = experiment.objective
    prepare = objective.train_inputs if name == "train" else objective.eval_inputs
    rate = Rate(f"encoding {name}", len(split) // ranks.world, shown=ranks.is_main)
    rows: list[np.ndarray] = [np.empty(0, np.int64)]
    width = output_width(model.encoder, model.aggregation)
    vectors: list[torch.Tensor] = [torch.empty(0, width, device=ranks.device)]
    for batch in loader.epoch(0):
        batch = batch.to(ranks.device)
        with autocast(experiment.precision, ranks.device):
            inputs = prepare(batch.inputs, batch.fitted, 0)
            vectors.append(model.embed(inputs, model.aggregation).float())
        rows.append(batch.rows.cpu().numpy())
        rate.add(len(batch.rows))
    rate.close()
    loader.close()
    gathered = dist.gather_rows(
        ranks, {"rows": torch.from_numpy(np.concatenate(rows)), "vectors": torch.cat(vectors).cpu()}
    )
    gathered = dist.broadcast_object(ranks, gathered)
    samples = np.empty((len(split), gathered["vectors"].shape[1]), np.float32)
    samples[gathered["rows"].numpy()] = gathered["vectors"].numpy()
    return with_fields(split, source=ArraySource(samples, np.arange(len(split))))
