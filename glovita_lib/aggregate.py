"""From tokens to one vector per sample.

t_0 is the CLS token, t_1 ... t_P the patch tokens; registers are neither. B batch, D width.

- cls_token: t_0
- avg: mean of t_1 ... t_P
- sum: sum of t_1 ... t_P
- mean_all: mean of t_0 ... t_P, where there is no CLS token that of t_1 ... t_P
- joint: t_0 and avg side by side, width 2D
- pooled: what the library itself gives its classifier

Where the library's own pooling is the CLS token or the mean, cls_token or avg is its vector, with
the layers it trained behind the pooling (norm, hidden layer, dropout): a ConvNeXt's avg is
norm(mean), a MobileNetV3's act(W mean + b).
"""

import torch
from torch import Tensor

from glovita_lib.layers import Features
from glovita_lib.spec import UserError
from glovita_lib.trunk import Encoder


def aggregate(features: Features, method: str) -> Tensor:
    """One vector per sample, (B, D), or (B, 2D) for joint; masked tokens count for nothing."""
    if method == "pooled" or (method == features.pooling and features.mask is None):
        return features.pooled
    if method == "cls_token":
        return features.tokens[:, 0]
    if method == "avg":
        return masked_sum(features) / count(features)
    if method == "sum":
        return masked_sum(features)
    if method == "joint":
        return torch.cat([aggregate(features, "cls_token"), aggregate(features, "avg")], dim=1)
    assert method == "mean_all", method
    if not features.has_cls:
        return aggregate(features, "avg")
    total = features.tokens[:, 0] + masked_sum(features)
    return total / (count(features) + 1)


def masked_sum(features: Features) -> Tensor:
    """Sum of the real patch tokens, (B, D)."""
    if features.mask is None:
        return features.patches.sum(1)
    real = features.mask[:, features.n_prefix :, None]
    return features.patches.where(real, 0).sum(1)  # not a product: padding may hold NaN


def count(features: Features) -> Tensor | int:
    """Number of real patch tokens, (B, 1) where it varies; at least 1."""
    if features.mask is None:
        return features.patches.shape[1]
    return features.mask[:, features.n_prefix :].sum(1, keepdim=True).clamp(min=1)


def served(encoder: Encoder) -> tuple[str, ...]:
    """The methods an encoder can serve."""
    cls = ["cls_token"] if encoder.has_cls else []
    patches = ["avg", "sum", "mean_all"] if encoder.has_patches else []
    joint = ["joint"] if cls and patches else []
    pooled = ["pooled"] if encoder.pooling else []
    return (*cls, *patches, *joint, *pooled)


def resolve_method(method: str | None, encoder: Encoder) -> str:
    """The method asked for; unset: the library's own pooling where layers are trained behind it or
    where it is neither CLS token nor mean, else the CLS token, else the mean.

    Raises:
        UserError: the encoder has no CLS token, or gives one vector only.
    """
    methods = served(encoder)
    if method is None:
        if encoder.pooling and not encoder.plain:
            return encoder.pooling
        return "cls_token" if encoder.has_cls else "avg"
    if method not in methods:
        why = "has no CLS token" if encoder.has_patches else "gives one vector per sample"
        raise UserError(
            f'model.feature_aggregation_method = "{method}": encoder {encoder.name} {why}; valid:'
            f" {', '.join(methods)}, or none for its default"
        )
    return method


def reads_pooled(method: str, encoder: Encoder) -> bool:
    """Whether a method reads the library's own vector."""
    parts = {"joint": ("cls_token", "avg"), "mean_all": () if encoder.has_cls else ("avg",)}
    return method == "pooled" or encoder.pooling in parts.get(method, (method,))


def output_width(encoder: Encoder, method: str) -> int:
    """Width of the vector that a method gives."""
    if method == "joint":
        return output_width(encoder, "cls_token") + output_width(encoder, "avg")
    return encoder.pooled_width if reads_pooled(method, encoder) else encoder.width
