"""Multiple-instance heads besides CLAM: attention pooling, two streams, mean and max.

B bags, M instances of all bags, D width, K classes or targets.
"""

from typing import Any

import torch
from torch import Tensor, nn

from glovita_lib.bags import (
    Bags,
    as_bags,
    segment_max,
    segment_order,
    segment_pool,
    segment_softmax,
)
from glovita_lib.clam import AttentionPool
from glovita_lib.encoders_features import Identity
from glovita_lib.facts import Facts
from glovita_lib.heads import build_head
from glovita_lib.spec import UserError
from glovita_lib.spec_heads import (
    AbmilHead,
    ClamHead,
    DsmilHead,
    MaxMilHead,
    MeanMilHead,
    TransmilHead,
)
from glovita_lib.trunk import Encoder

NORM_EPS = 1e-6  # as CLAM's default
OF_BAGS = ClamHead | AbmilHead | DsmilHead | TransmilHead | MeanMilHead | MaxMilHead


def check_instances(spec: Any, head: nn.Module, encoder: Encoder, facts: Facts) -> None:
    """What the data are must fit the head: bags one that takes instances, and the other way round.

    Args:
        spec: the head's Struct.

    Raises:
        UserError: they do not fit, or instance_eval on a regression, whose targets label nothing.
    """
    if facts.kind == "bags" and head.consumes == "pooled":
        raise UserError(
            f'model.head.head_type = "{tag(spec)}": the samples are bags of instances, and this'
            ' head takes one vector a sample; heads for bags are "clam", "abmil", "dsmil",'
            ' "transmil", "mean", "max"'
        )
    if not isinstance(spec, OF_BAGS):
        return
    of_data = facts.kind == "bags" or isinstance(encoder, Identity)  # also bags of custom data
    if facts.kind == "vectors" or not (of_data or encoder.has_patches):
        one = "the features hold" if facts.kind == "vectors" else "the encoder gives"
        raise UserError(
            f'model.head.head_type = "{tag(spec)}" takes bags of instances, but {one} one vector a'
            ' sample: set it to "classification" or "regression", or give bags (bag_ptr in the'
            " feature file) or an encoder with patch tokens"
        )
    if isinstance(spec, ClamHead) and spec.instance_eval and facts.subtask == "regression":
        raise UserError(
            "model.head.instance_eval = true labels instances by the class of their bag, but the"
            " targets are numbers: set it to false"
        )


def tag(spec: Any) -> str:
    """What the spec file calls a Struct."""
    return spec.__struct_config__.tag


class Abmil(nn.Module):
    """logits = W sum_i alpha_i h_i + b, with the (gated) attention of Ilse, Tomczak, Welling, ICML
    2018; see `attention_pool`."""

    consumes = "features"

    def __init__(self, spec: AbmilHead, *, width: int, outputs: int) -> None:
        super().__init__()
        self.pool = AttentionPool(
            width,
            hidden=spec.hidden,
            attention=spec.attention,
            branches=1,
            gated=spec.gate,
            dropout=spec.dropout,
            norm_eps=NORM_EPS if spec.feature_prep else None,
            unit_length=False,
            attn_drop=0.0,
        )
        self.classifier = nn.Linear(spec.hidden, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> dict[str, Any]:
        """What `as_bags` takes -> "logits" (B, K), "scores" (M, 1) before the softmax, "aux" {}.

        Targets are given to every head on instances; this one has no auxiliary loss for them.
        """
        scores, pooled, _ = self.pool(as_bags(inputs))
        return {"logits": self.classifier(pooled.squeeze(1)), "scores": scores, "aux": {}}

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of each instance, before and after the softmax over its bag: 2 x (M, 1)."""
        bags = as_bags(inputs)
        scores, _, _ = self.pool(bags)
        return scores, segment_softmax(scores, bags)


class Dsmil(nn.Module):
    """Two streams (Li, Li, Eliceiri, "Dual-stream multiple instance learning network for whole
    slide image classification with self-supervised contrastive learning", CVPR 2021).

    With the instances x_i of a bag and m_k = argmax_i c_ik:

    - instance stream c_i = W_0 x_i + b_0, of the bag: c_{m_k, k}
    - attention stream q_i = tanh(W_2 relu(W_1 x_i + b_1) + b_2),
      alpha_ik = softmax_i(q_i . q_{m_k} / sqrt(Q)), z_k = sum_i alpha_ik dropout(x_i), and of
      the bag W (z_1, ..., z_K) + b
    - loss: half of each stream's; prediction: the mean of both, or the attention stream
    """

    consumes = "features"

    def __init__(self, spec: DsmilHead, *, width: int, outputs: int) -> None:
        super().__init__()
        self.average = spec.average
        self.instance = nn.Linear(width, outputs)
        size = spec.attention
        self.query = nn.Sequential(
            nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size), nn.Tanh()
        )
        self.drop = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(outputs * width, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> dict[str, Any]:
        """What `as_bags` takes -> "logits" (B, K), "fitted", "scores" (M, K) before the softmax,
        "aux" {}."""
        bags = as_bags(inputs)
        x = bags.features.to(self.instance.weight.dtype)  # (M, D)
        best, scores = self.streams(bags, x)
        with torch.autocast(x.device.type, enabled=False):
            pooled = segment_pool(segment_softmax(scores, bags), self.drop(x), bags)  # (B, K, D)
            attended = self.classifier(pooled.flatten(1))
        logits = (best + attended) / 2 if self.average else attended
        fitted = [(0.5, attended), (0.5, best)]
        return {"logits": logits, "fitted": fitted, "scores": scores, "aux": {}}

    def streams(self, bags: Bags, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the highest-scoring instances (B, K), raw attention (M, K)."""
        c, q = self.instance(x), self.query(x).to(x.dtype)  # (M, K), (M, Q)
        first = torch.tensor(bags.bounds[:-1]).to(x.device, non_blocking=True)
        best = segment_order(c.detach(), bags)[first]  # (B, K) rows
        pairs = zip(bags.split(q), q[best], strict=True)  # (n, Q) and (K, Q) of each bag
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.cat([own @ critical.T for own, critical in pairs])
        return c.gather(0, best).to(x.dtype), scores / q.shape[1] ** 0.5

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of each instance, before and after the softmax over its bag: 2 x (M, K)."""
        bags = as_bags(inputs)
        _, scores = self.streams(bags, bags.features.to(self.instance.weight.dtype))
        return scores, segment_softmax(scores, bags)


class PooledMil(nn.Module):
    """logits = W dropout(v) + b, v the mean or the largest value per feature over a bag."""

    consumes = "features"

    def __init__(self, width: int, outputs: int, *, pool: str, dropout: float) -> None:
        super().__init__()
        self.pool = {"mean": mean_of_bags, "max": max_of_bags}[pool]
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(width, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """What `as_bags` takes -> logits (B, K).

        Targets are given to every head on instances; this one has no auxiliary loss for them.
        """
        bags = as_bags(inputs)
        return self.linear(self.drop(self.pool(bags).to(self.linear.weight.dtype)))


def mean_of_bags(bags: Bags) -> Tensor:
    """Mean over the instances of each bag, (B, D), at least float32."""
    features = bags.features
    dtype = torch.promote_types(features.dtype, torch.float32)
    if bags.whole.long:
        return torch.stack([bag.mean(0, dtype=dtype) for bag in bags.split(features)])
    shares = (1 / bags.ptr.diff().to(dtype))[bags.index]  # (M,)
    return segment_pool(shares[:, None], features.to(dtype), bags).squeeze(1)


def max_of_bags(bags: Bags) -> Tensor:
    """Largest value per feature over the instances of each bag, (B, D)."""
    return segment_max(bags.features, bags)


@build_head.register
def _(spec: AbmilHead, *, width: int, outputs: int) -> nn.Module:
    return Abmil(spec, width=width, outputs=outputs)


@build_head.register
def _(spec: DsmilHead, *, width: int, outputs: int) -> nn.Module:
    return Dsmil(spec, width=width, outputs=outputs)


@build_head.register
def _(spec: MeanMilHead, *, width: int, outputs: int) -> nn.Module:
    return PooledMil(width, outputs, pool="mean", dropout=spec.dropout)


@build_head.register
def _(spec: MaxMilHead, *, width: int, outputs: int) -> nn.Module:
    return PooledMil(width, outputs, pool="max", dropout=spec.dropout)
