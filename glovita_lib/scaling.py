"""Learned factors and shifts of channels: (IA)^3, SSF and DiffFit."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from glovita_lib.adapter import (
    Adapter,
    Members,
    attach_all,
    base_bias,
    base_weight,
    call,
)
from glovita_lib.spec_lora import DiffFit, Ia3, Ssf
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, every, resolve


class OutputScale(Adapter):
    """y * gamma + beta behind the layer's bias; beta only where there is a bias to take it up."""

    def __init__(self, channels: int, *, shifts: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels)) if shifts else None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Rows times gamma."""
        return weight * self.gamma.view(-1, *[1] * (weight.ndim - 1))

    def merged_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """gamma b + beta."""
        if bias is None:
            return None
        bias = bias * self.gamma
        return bias if self.beta is None else bias + self.beta

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members) -> Tensor:
        """The frozen layer, then the factors: no gradient of the weight is formed."""
        y = call(layer, x, base_weight(layer), base_bias(layer))
        gamma = spread(layer, members, "gamma", 1.0).to(y.dtype)
        trailing = (1,) * (base_weight(layer).ndim - 2) if isinstance(layer, _ConvNd) else ()
        gamma = gamma.view(-1, *trailing)
        if members[0][1].beta is None:
            return y * gamma
        beta = spread(layer, members, "beta", 0.0).to(y.dtype)
        return torch.addcmul(beta.view(-1, *trailing), y, gamma)


def spread(layer: nn.Module, members: Members, name: str, rest: float) -> Tensor:
    """A vector of all members over the layer's outputs, `rest` where no member is."""
    if members[0][0] is None:
        return getattr(members[0][1], name)
    pieces, end = [], 0
    weight = base_weight(layer)
    for (first, last), adapter in members:
        pieces += [weight.new_full((first - end,), rest), getattr(adapter, name)]
        end = last
    return torch.cat([*pieces, weight.new_full((weight.shape[0] - end,), rest)])


class InputScale(Adapter):
    """W (x * l), for a Linear layer or a convolution of one group."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(channels))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Columns times l."""
        return weight * self.l.view(-1, *[1] * (weight.ndim - 2))

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members) -> Tensor:
        """The factors, then the frozen layer."""
        factor = members[0][1].l.to(x.dtype)
        factor = factor.view(-1, *[1] * (base_weight(layer).ndim - 2))
        return call(layer, x * factor, base_weight(layer), base_bias(layer))


def apply_ia3(spec: Ia3, model: nn.Module) -> None:
    """Freeze the encoder; factors on the outputs of the targets, on the inputs of fc2."""
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"), unset=("k", "v", "fc2"))

    def make(target: Target, weight: Tensor) -> Adapter:
        if target.role == "fc2":
            return InputScale(weight.shape[1])
        return OutputScale(len(weight), shifts=False)

    attach_all(root, targets, make, "none")


def apply_ssf(spec: Ssf | DiffFit, model: nn.Module) -> None:
    """Freeze the encoder; factors (and shifts for SSF) behind all its layers, with norms; all
    biases for DiffFit."""
    root = trunk(model)
    shifting = isinstance(spec, Ssf)

    def make(target: Target, weight: Tensor) -> Adapter:
        shifts = shifting and base_bias(target.layer.module) is not None
        return OutputScale(len(weight), shifts=shifts)

    targets = every(root, ("linear", "conv", "norm"))
    attach_all(root, targets, make, "none" if shifting else "all")
