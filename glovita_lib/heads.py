"""Heads: from the vector of a sample, or its tokens or instances, to predictions.

A head's attribute `consumes` says what it takes: "pooled", vectors (B, D), "features", a
`Features`, or "stages", one with the maps of the stages that its attribute `stages` names, and the
number of frames T. It gives logits (B, K), of each frame (B, T, K), or a dict: "logits", auxiliary
losses () to add under "aux" and, unless the loss is that of the logits, under "fitted" pairs of a
weight and the logits whose loss it weighs. A head on bags whose last layer takes a vector a bag,
(B, ...), names that layer in `mixed_before`, so that mixup can mix what it takes. B batch, D width,
K classes or targets.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from glovita_lib.errors import UserError, call_target, find_target, refuse
from glovita_lib.spec import ByStruct
from glovita_lib.spec_model import BaseHead, ClassificationHead, CustomHead, RegressionHead


class LinearHead(nn.Module):
    """logits = W dropout(x) + b."""

    consumes = "pooled"

    def __init__(self, width: int, outputs: int, *, dropout: float, init_std: float | None) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(width, outputs)
        if init_std is not None:
            nn.init.normal_(self.linear.weight, std=init_std)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, D) -> logits (B, K)."""
        return self.linear(self.drop(x))


@ByStruct
def build_head(
    spec: BaseHead, *, width: int, outputs: int, stages: Mapping[str, int] | None = None
) -> nn.Module:
    """The head of a Struct for vectors or tokens of `width`, with `outputs` classes or targets.

    Args:
        stages: widths of the stages that a head along time joins, by name.
    """
    raise TypeError(f"no head for {type(spec).__name__}")


@build_head.register
def _(spec: ClassificationHead, *, width: int, outputs: int) -> nn.Module:
    return LinearHead(width, outputs, dropout=spec.dropout, init_std=spec.init_std)


@build_head.register
def _(spec: RegressionHead, *, width: int, outputs: int) -> nn.Module:
    refuse("model.head", spec.count_problems(outputs, "the data set"))
    return LinearHead(width, outputs, dropout=spec.dropout, init_std=None)


def build_fitting_head(spec: BaseHead, *, pooled: int, features: int, outputs: int) -> nn.Module:
    """The head of a Struct for the width of what it takes, built once.

    A custom head whose function does not say what its module consumes is asked with the width of
    the vectors; where it then takes tokens of another width, it is built again from the same state
    of torch's random numbers, so that it has drawn once.

    Args:
        pooled: width of the vectors that the aggregation gives.
        features: width of tokens and instances.
    """
    widths = {"pooled": pooled, "features": features}
    expected = consumed(spec)
    state = torch.get_rng_state()
    head = build_head(spec, width=widths[expected or "pooled"], outputs=outputs)
    width = widths[str(head.consumes)]
    if expected is None and width != pooled:
        torch.set_rng_state(state)
        head = build_head(spec, width=width, outputs=outputs)
    return head


def consumed(spec: BaseHead) -> str | None:
    """What the head of a Struct consumes, before it is built; None: only its module tells."""
    if isinstance(spec, CustomHead):
        stated = getattr(find_target("model.head", spec.target), "consumes", None)
        return stated if stated in ("pooled", "features") else None
    return "features" if spec.takes == "bags" else "pooled"


@build_head.register
def _(spec: CustomHead, *, width: int, outputs: int) -> nn.Module:
    head = call_target("model.head", spec.target, width=width, outputs=outputs, **spec.options)
    if not isinstance(head, nn.Module):
        raise UserError(
            f'model.head.target = "{spec.target}" returned a {type(head).__name__}: it must return'
            " a torch.nn.Module"
        )
    if not hasattr(head, "consumes"):
        vars(head)["consumes"] = "pooled"
    if head.consumes not in ("pooled", "features"):
        raise UserError(
            f'model.head.target = "{spec.target}": attribute consumes is {head.consumes!r}; valid:'
            ' "pooled", "features"'
        )
    if head.consumes == "pooled":
        check_outputs(head, spec.target, width, outputs)
    return head


def check_outputs(head: nn.Module, target: str, width: int, outputs: int) -> None:
    """A custom head must give as many logits as the data have outputs."""
    was, _ = head.training, head.eval()
    with torch.no_grad():
        logits = head(torch.zeros(2, width))
    head.train(was)
    logits = logits["logits"] if isinstance(logits, dict) else logits
    if logits.shape != (2, outputs):
        raise UserError(
            f'model.head.target = "{target}": gives {tuple(logits.shape)} for 2 samples, the data'
            f" have {outputs} classes or targets: it must give (2, {outputs})"
        )
