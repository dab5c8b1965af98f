"""RepAdapter: a linear adapter in front of a layer that becomes a part of its weight (Luo et al.,
2023).

    y = W f(x) + b,  f(x) = x + s (U (D x + d) + u),  so  W' = W + s W U D,  b' = b + s W (U d + u)

The reference system has a GroupNorm between D and U whose statistics depend on the input; there is
none here, so the equality holds. D (h, in) is dense, U (in, h) has groups.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from glovita_lib.adapter import Adapter, Members, attach_all, base_bias, base_weight, call
from glovita_lib.lora import LowRank
from glovita_lib.spec import UserError
from glovita_lib.spec_lora import RepAdapter
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, resolve


class RepAdapterLayer(LowRank):
    """The change of W is low-rank: A = D, B = s W U. Starts at U = 0.

    A layer without bias has no d and u, nor has a convolution, whose padding they would pass.
    """

    dropout = 0.0

    def __init__(self, spec: RepAdapter, weight: Tensor, *, shifts: bool) -> None:
        super().__init__()
        width = weight.shape[1]
        self.scale, self.groups = spec.scale, spec.groups
        self.D = nn.Parameter(torch.empty(spec.bottleneck, width))
        nn.init.xavier_uniform_(self.D)
        self.U = nn.Parameter(torch.zeros(width, spec.bottleneck // spec.groups))
        self.d = nn.Parameter(torch.zeros(spec.bottleneck)) if shifts else None
        self.u = nn.Parameter(torch.zeros(width)) if shifts else None

    def dense(self) -> Tensor:
        """s U with its zeros (in, h)."""
        rows = self.U.shape[0] // self.groups
        return self.scale * torch.block_diag(*self.U.split(rows))

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """D (h, in) and s W U (out, h)."""
        return self.D, weight @ self.dense().to(weight.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s W U D over the input channels."""
        change = self.dense() @ self.D  # (in, in)
        return weight + torch.einsum("oc...,ci->oi...", weight, change.to(weight.dtype))

    def merged_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """b + W (s U d + s u)."""
        if self.d is None or bias is None:
            return bias
        return bias + weight @ (self.dense() @ self.d + self.scale * self.u).to(weight.dtype)

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members) -> Tensor:
        """A convolution gets the changed input, a Linear layer the low-rank change."""
        if not isinstance(layer, _ConvNd):
            return super().run(x, layer, members)
        adapter = members[0][1]
        conv = (F.conv1d, F.conv2d, F.conv3d)[base_weight(layer).ndim - 3]
        ones = [1] * (base_weight(layer).ndim - 2)
        low = conv(x, adapter.D.view(*adapter.D.shape, *ones))
        change = conv(low, adapter.U.view(*adapter.U.shape, *ones), groups=adapter.groups)
        x = x + adapter.scale * change
        return call(layer, x, base_weight(layer), base_bias(layer))


def apply_rep_adapter(spec: RepAdapter, model: nn.Module) -> None:
    """Freeze the encoder and put an adapter in front of every target.

    Raises:
        UserError: groups that do not divide, or a grouped convolution, which cannot take up a
            mixture of its groups.
    """
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"), unset=("qkv", "fc1"))
    if spec.bottleneck % spec.groups:
        raise UserError(
            f"peft.groups = {spec.groups} must divide peft.bottleneck = {spec.bottleneck}"
        )

    def make(target: Target, weight: Tensor) -> Adapter:
        layer = target.layer.module
        if getattr(layer, "groups", 1) > 1:
            raise UserError(
                f"rep_adapter: {target.name} is a convolution of {layer.groups} groups, which"
                " cannot take up the adapter; leave it out of peft.targets"
            )
        if weight.shape[1] % spec.groups:
            raise UserError(
                f"peft.groups = {spec.groups} must divide the {weight.shape[1]} inputs of"
                f" {target.name}; {math.gcd(spec.groups, weight.shape[1])} does"
            )
        shifts = base_bias(layer) is not None and not isinstance(layer, _ConvNd)
        return RepAdapterLayer(spec, weight, shifts=shifts)

    attach_all(root, targets, make, "none")
