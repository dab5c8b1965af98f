"""What is read out of an encoder for each sample.

B batch, N tokens, D width, C channels, H W grid, M instances.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib.aggregate import aggregate, output_width, resolve_method
from glovita_lib.experiment import Experiment
from glovita_lib.intermediates import choose_layers
from glovita_lib.layers import Features
from glovita_lib.loaders import Batch
from glovita_lib.precision import autocast
from glovita_lib.spec import UserError
from glovita_lib.spec_features import Extract


@dataclass(frozen=True, slots=True)
class Readout:
    """What was read out of a batch, on the CPU."""

    features: np.ndarray  # (B, D), (B, D, H, W), or (M, D) instances of B samples
    lengths: np.ndarray | None  # (B,) instances per sample; None: one row a sample
    coords: np.ndarray | None  # (M, 2) grid row and column of every instance; -1: prefix token


class Extractor:
    """Reads embeddings, tokens or maps out of the encoder of an experiment."""

    def __init__(self, experiment: Experiment, spec: Extract) -> None:
        if experiment.facts.augmentation is None:
            raise UserError("mode extract reads images; data set precomputed_features is read out")
        self.experiment, self.spec = experiment, spec
        self.model = experiment.model.eval()
        facts, encoder = experiment.facts, experiment.model.encoder
        size = facts.augmentation.image_size
        self.layers = None
        if spec.layers:
            shape = (1, facts.channels, size, size)
            self.layers = choose_layers(encoder, spec.layers, norm=spec.norm, input_shape=shape)
        self.method = self.resolve_method()
        self.dtype = torch.float16 if spec.precision == 16 else torch.float32
        if spec.output != "embedding" and not encoder.has_tokens:
            raise UserError(
                f'extract.output = "{spec.output}": encoder {encoder.name} gives one vector per'
                ' sample; only output = "embedding" is possible'
            )

    def resolve_method(self) -> str:
        """How tokens become one vector."""
        model, spec = self.experiment.model, self.spec
        if spec.method is None and not self.layers:
            return model.aggregation
        if spec.method is None:
            return "cls_token" if model.encoder.has_cls else "avg"
        try:
            return resolve_method(spec.method, model.encoder)
        except UserError as error:
            text = str(error).replace("model.feature_aggregation_method", "extract.method")
            raise UserError(text) from None

    @torch.no_grad()
    def __call__(self, batch: Batch, *, augment: int | None) -> Readout:
        """Read a batch out.

        Args:
            augment: seed of the train policy; None is the test policy.

        Raises:
            UserError: features too large for float16.
        """
        objective, ranks = self.experiment.objective, self.experiment.ranks
        batch = batch.to(ranks.device)
        prepare = objective.eval_inputs if augment is None else objective.train_inputs
        inputs = prepare(batch.inputs, batch.fitted, augment or 0)
        with autocast(self.experiment.precision, ranks.device):
            features = self.features(inputs)
            read, lengths, coords = self.read(inputs, features)
        stored = read.to(self.dtype)
        if self.dtype == torch.float16:
            self.refuse_overflow(read, stored, batch, lengths)
        return Readout(stored.cpu().numpy(), lengths, coords)

    def features(self, inputs: Tensor) -> list[Features]:
        """Features of the chosen layers, or of the encoder's output where tokens are asked for."""
        if self.layers is not None:
            return self.layers(inputs)
        if self.spec.output == "embedding":
            return []
        return [self.model.encoder(inputs, pooled=False)]

    def read(
        self, inputs: Tensor, features: list[Features]
    ) -> tuple[Tensor, np.ndarray | None, np.ndarray | None]:
        """Values, and for tokens instances per sample and their places."""
        if self.spec.output == "embedding":
            if not features:
                return self.model.embed(inputs, self.method).float(), None, None
            parts = [aggregate(part, self.method) for part in features]
            return torch.cat(parts, dim=1).float(), None, None
        self.check_grids(features)
        if self.spec.output == "map":
            return torch.cat([as_map(part) for part in features], dim=1).float(), None, None
        keep = self.spec.prefix_tokens
        parts = [part.tokens if keep else part.patches for part in features]
        tokens = torch.cat(parts, dim=2).float()  # (B, N, D)
        lengths = np.full(len(tokens), tokens.shape[1], np.int64)
        places = grid_places(features[0].grid, features[0].n_prefix if keep else 0, tokens.shape[1])
        return tokens.flatten(0, 1), lengths, np.tile(places, (len(tokens), 1))

    def check_grids(self, features: list[Features]) -> None:
        """Layers of different grids cannot be put side by side.

        Raises:
            UserError: they differ, or tokens have no grid and maps are asked for.
        """
        grids = [part.grid for part in features]
        if len(set(grids)) > 1:
            listed = ", ".join("x".join(map(str, grid or ())) for grid in grids)
            raise UserError(
                f"extract.layers = {list(self.spec.layers)} have different grids ({listed});"
                " extract each of them to a file of its own"
            )
        if self.spec.output == "map" and grids[0] is None:
            raise UserError('extract.output = "map": the tokens of this encoder are no grid')

    def refuse_overflow(
        self, read: Tensor, stored: Tensor, batch: Batch, lengths: np.ndarray | None
    ) -> None:
        """float16 ends at 65,504.

        Raises:
            UserError: a feature became infinite.
        """
        bad = (torch.isinf(stored) & torch.isfinite(read)).flatten(1).any(1).cpu().numpy()
        if bad.any():
            rows = np.flatnonzero(bad) if lengths is None else np.flatnonzero(bad) // lengths[0]
            largest = float(read[torch.isfinite(read)].abs().max())
            raise UserError(
                f"features up to {largest:.4g} overflow float16 (65,504) in"
                f" {len(np.unique(rows))} samples of a batch, first row"
                f" {int(batch.rows[rows[0]])}; set extract.precision = 32, or another"
                f" extract.method than {self.method}"
            )

    def attributes(self) -> dict[str, Any]:
        """How the features are made, as attributes of the file."""
        experiment, spec = self.experiment, self.spec
        pooled = spec.output == "embedding"
        return {
            "output": spec.output,
            "aggregation": self.method if pooled else "none",
            "layers": json.dumps(list(self.layers.indices)) if self.layers else "encoder output",
            "norm": self.norm_text(),
            "prefix_tokens": "in" if not pooled and spec.prefix_tokens else "out",
            "pooling": self.pooling_text() if pooled else "none",
            "encoder": experiment.model.encoder.name,
            "compute_precision": experiment.precision,
            "stored_precision": spec.precision,
        }

    def norm_text(self) -> str:
        """Whether tokens are final-normed."""
        if self.layers is None:
            return "final norm"
        return "final norm applied to each layer" if self.spec.norm else "raw, no norm"

    def pooling_text(self) -> str:
        """Whether vectors are the library's own pre-logits, or pooled here."""
        encoder = self.experiment.model.encoder
        own = self.layers is None and self.method in ("pooled", encoder.pooling)
        return "pre_logits of the library" if own else f"{self.method} of the tokens"

    @property
    def width(self) -> int:
        """D of an embedding of the encoder's output."""
        return output_width(self.experiment.model.encoder, self.method)


def as_map(features: Features) -> Tensor:
    """Patch tokens (B, N, D) as a map (B, D, H, W)."""
    return features.patches.transpose(1, 2).unflatten(2, features.grid)


def grid_places(grid: tuple[int, ...] | None, n_prefix: int, tokens: int) -> np.ndarray:
    """Row and column (N, 2) of each token in the grid; -1, -1 for prefix tokens; a single column
    of running numbers where there is no grid."""
    if grid is None:
        return np.arange(tokens)[:, None].repeat(2, 1).astype(np.int32)
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, len(grid))
    return np.concatenate([np.full((n_prefix, len(grid)), -1), places]).astype(np.int32)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's encoder."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
