"""From tokens to one vector per sample.

t_0 is the CLS token, t_1 ... t_P the patch tokens; registers are neither. B batch, D width.

- cls_token: t_0
- avg: mean of t_1 ... t_P
- patch_mean: the same, without layers trained behind it
- sum: sum of t_1 ... t_P
- mean_all: mean of t_0 ... t_P, where there is no CLS token that of t_1 ... t_P
- joint: t_0 and avg side by side, width 2D
- pooled: what the library itself gives its classifier

Where the library's own pooling is the CLS token or the mean, cls_token or avg is its vector, with
the layers it trained behind the pooling (norm, hidden layer, dropout): a ConvNeXt's avg is
norm(mean), a MobileNetV3's act(W mean + b).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glovita_lib.encoder import Encoder, Features, vector_of_tokens
from glovita_lib.errors import UserError


def aggregate(features: Features, method: str) -> Tensor:
    """One vector per sample, (B, D), or (B, 2D) for joint; masked tokens count for nothing."""
    if method == "pooled" or (method == features.pooling and features.mask is None):
        assert features.pooled is not None, "the encoder was not asked for it, see `reads_pooled`"
        return features.pooled
    assert features.tokens is not None, "a vector serves no other method, see `served`"
    if method == "cls_token":
        return features.tokens[:, 0]
    if method in ("avg", "patch_mean"):
        return masked_sum(features) / count(features)
    if method == "sum":
        return masked_sum(features)
    if method == "joint":
        return torch.cat([aggregate(features, "cls_token"), aggregate(features, "avg")], dim=1)
    assert method == "mean_all", method
    if not features.has_cls:
        return aggregate(features, "avg")
    total = features.tokens[:, 0] + masked_sum(features)  # (B, D)
    return total / (count(features) + 1)


def masked_sum(features: Features) -> Tensor:
    """Sum of the real patch tokens, (B, D)."""
    if features.mask is None:
        return features.patches.sum(1)
    real = features.mask[:, features.n_prefix :, None]  # (B, N - n_prefix, 1)
    return features.patches.where(real, 0).sum(1)  # not a product: padding may hold NaN


def count(features: Features) -> Tensor | int:
    """Number of real patch tokens, (B, 1) where it varies; at least 1."""
    if features.mask is None:
        return features.patches.shape[1]
    return features.mask[:, features.n_prefix :].sum(1, keepdim=True).clamp(min=1)


def layers_call(
    encoder: Encoder,
    indices: Sequence[int],
    norm: bool,
    normed: Sequence[int],
    method: str | None,
    keep: bool,
    gives_prefix: bool,
) -> tuple[str, str]:
    """What layers give, as an expression of `maps`, and the call of timm that these are.

    Args:
        indices: the layers, side by side in this order.
        norm: whether timm norms them.
        normed: those that a norm changes.
        method: how tokens become a vector; None: tokens.
        keep: whether the prefix tokens stay in front of the patches.
        gives_prefix: whether timm gives them.
    """
    wanted, n_prefix = sorted(set(indices)), encoder.n_prefix if gives_prefix else 0
    prefix = ", return_prefix_tokens=True" * gives_prefix
    parts = []
    for index in indices:
        entry = f"maps[{wanted.index(index)}]"
        tokens = f"{entry}{'[0]' * gives_prefix}.flatten(2).transpose(1, 2)"
        if gives_prefix:
            tokens = f"torch.cat([{entry}[1], {tokens}], 1)"
        tokens = encoder.norm_call(tokens) if norm and index in normed else tokens
        if method is not None:
            has_cls = encoder.has_cls and gives_prefix
            parts.append(vector_of_tokens(method, tokens, n_prefix, has_cls))
        else:
            parts.append(tokens if keep or not n_prefix else f"{tokens}[:, {n_prefix}:]")
    joined = parts[0] if len(parts) == 1 else f"torch.cat([{', '.join(parts)}], -1)"
    call = f"indices={wanted}, norm={norm}{prefix}, intermediates_only=True"
    return joined, f"maps = net.forward_intermediates(x, {call})"


def served(encoder: Encoder) -> tuple[str, ...]:
    """The methods an encoder can serve."""
    cls = ["cls_token"] if encoder.has_cls else []
    patches = ["avg", "patch_mean", "sum", "mean_all"] if encoder.has_patches else []
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
