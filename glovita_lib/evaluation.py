"""Exact evaluation: every sample of a split once, on any number of ranks, metrics on the whole.

N samples, K classes or targets.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from glovita_lib.dist import Ranks, gather_rows
from glovita_lib.loaders import Loader
from glovita_lib.objectives import Objective
from glovita_lib.precision import autocast


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model says about the samples of a split, in the split's order."""

    ids: list[str]
    scores: np.ndarray  # (N, K) float32: probabilities, or outputs in target units
    targets: np.ndarray | None  # (N,) int64, or (N, K) float32; None: unlabelled
    losses: np.ndarray | None  # (N,) float32
    rows: np.ndarray  # (N,) rows of the split

    @property
    def loss(self) -> float:
        """Mean over samples, in float64."""
        return float(self.losses.astype(np.float64).mean()) if len(self.losses) else float("nan")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    *,
    ranks: Ranks,
    precision: str,
    max_batches: int | None = None,
) -> Predictions | None:
    """Predictions of a split, gathered by row, without duplicates; None on all ranks but the first.

    The device is waited for once, at the end.
    """
    model.eval()
    parts: list[dict[str, torch.Tensor]] = []
    for batch in islice(loader.epoch(0), max_batches):
        with autocast(precision, ranks.device):
            parts.append(objective.predict(model, batch.to(ranks.device)))
    if not parts:  # a rank may have no rows
        parts = [objective.nothing(ranks.device, labelled=loader.split.targets is not None)]
    merged = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    gathered = gather_rows(ranks, merged)
    return None if gathered is None else collect(gathered, loader)


def collect(gathered: dict[str, torch.Tensor], loader: Loader) -> Predictions:
    """Sort gathered rows into the split's order and drop what came twice."""
    split = loader.split
    rows, first = np.unique(gathered["rows"].numpy(), return_index=True)
    losses = gathered.get("loss")
    return Predictions(
        ids=[split.ids[row] for row in rows],
        scores=gathered["scores"].numpy()[first],
        targets=None if split.targets is None else split.targets[rows],
        losses=None if losses is None else losses.numpy()[first],
        rows=rows,
    )
