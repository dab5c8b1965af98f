"""How a PEFT method changes layers: the weight of an adapted layer is read through its adapter.

An adapted layer keeps its parameters under their keys ("attn.qkv.weight") and gets its adapter as a
child beside them ("attn.qkv.adapter.A"). Its class is replaced by a subclass whose `weight` and
`bias` are the changed ones for whoever reads them: code that calls the layer, code that hands its
weight to a function (EVA's attention, torchvision's Swin, nn.MultiheadAttention) and norm layers
with an activation inside all see the same change. Linear layers and convolutions that are called
take a faster way with the same result.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from glovita_lib.spec import UserError
from glovita_lib.structure import Rows, trunk, weight_names
from glovita_lib.targets import Target

PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Adapter(nn.Module):
    """A change of one weight (out, in, *kernel) and its bias."""

    transient: tuple[str, ...] = ()
    """Buffers that serve only the continuation of a training run."""

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The changed weight, of the same shape."""
        raise NotImplementedError

    def read_weight(self, weight: Tensor) -> Tensor:
        """The changed weight for code that reads it instead of calling the layer."""
        return self.merged_weight(weight)

    def merged_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The changed bias; a layer without bias stays without."""
        return bias

    def delta_weight(self, weight: Tensor) -> Tensor:
        """The change itself: merged - base."""
        return self.merged_weight(weight) - weight

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: "Members") -> Tensor:
        """Output of a called Linear layer or convolution; `members` change it together."""
        return call(layer, x, layer.weight, layer.bias)

    @classmethod
    def after_step(cls, adapters: list["Adapter"], step: int, total_steps: int) -> None:
        """Called after optimizer step `step` = 1 ... `total_steps`, before gradients are forgotten,
        with all adapters of this class in the model."""

    @classmethod
    def auxiliary_losses(cls, adapters: list["Adapter"]) -> dict[str, Tensor]:
        """Terms of the training loss by name."""
        return {}


Members = list[tuple[Rows | None, Adapter]]


class Parts(nn.Module):
    """Adapters of parts of a fused weight, by the parts' names (q, k, v)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Rows] = {}

    def add(self, target: Target, adapter: Adapter) -> None:
        """Put an adapter on the part's rows."""
        self.rows[target.part] = target.rows
        self.add_module(target.part, adapter)

    def members(self) -> Members:
        """Rows and adapter of each part."""
        return [(rows, getattr(self, part)) for part, rows in self.rows.items()]


def members_of(layer: nn.Module) -> Members:
    """Adapters of an adapted layer with their rows; rows None for the whole weight."""
    adapter = layer._modules["adapter"]
    return adapter.members() if isinstance(adapter, Parts) else [(None, adapter)]


def base_weight(layer: nn.Module, rows: Rows | None = None) -> Tensor:
    """The stored, unchanged weight or rows of it."""
    weight = layer._parameters[weight_names(layer)[0]]
    return weight if rows is None else weight[rows[0] : rows[1]]


def base_bias(layer: nn.Module, rows: Rows | None = None) -> Tensor | None:
    """The stored, unchanged bias or rows of it."""
    bias = layer._parameters.get(weight_names(layer)[1])
    return bias if rows is None or bias is None else bias[rows[0] : rows[1]]


def changed_weight(layer: nn.Module) -> Tensor:
    """The weight as its adapters make it."""
    base = base_weight(layer)
    pieces, end = [], 0
    for rows, adapter in members_of(layer):
        if rows is None:
            return adapter.read_weight(base)
        pieces += [base[end : rows[0]], adapter.read_weight(base[rows[0] : rows[1]])]
        end = rows[1]
    return torch.cat([*pieces, base[end:]])


def changed_bias(layer: nn.Module) -> Tensor | None:
    """The bias as its adapters make it."""
    bias = base_bias(layer)
    if bias is None:
        return None
    pieces, end = [], 0
    for rows, adapter in members_of(layer):
        if rows is None:
            return adapter.merged_bias(base_weight(layer), bias)
        part = adapter.merged_bias(base_weight(layer, rows), bias[rows[0] : rows[1]])
        pieces += [bias[end : rows[0]], part]
        end = rows[1]
    return torch.cat([*pieces, bias[end:]])


def call(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Linear layer or convolution with another weight and bias."""
    if isinstance(layer, _ConvNd):
        return layer._conv_forward(x, weight, bias)
    return F.linear(x, weight, bias)


@cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a layer's class that reads weight and bias through the adapter."""
    weight, bias = weight_names(base.__new__(base))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        members = members_of(self)
        return type(members[0][1]).run(x, self, members)

    body = {weight: property(changed_weight), bias: property(changed_bias), "plain_class": base}
    if base.forward in PLAIN:
        body["forward"] = forward
    return type(base.__name__, (base,), body)


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer's weight is read through an adapter."""
    return isinstance(module._modules.get("adapter"), Adapter | Parts)


def attach(target: Target, adapter: Adapter) -> None:
    """Put an adapter on a layer or on a part of its weight."""
    layer = target.layer.module
    if not is_adapted(layer):
        layer.__class__ = adapted_class(type(layer))
    adapter.to(base_weight(layer).device).train(layer.training)
    if target.part is None:
        layer.adapter = adapter
        return
    if "adapter" not in layer._modules:
        layer.adapter = Parts()
    layer.adapter.add(target, adapter)


def attach_all(
    root: nn.Module,
    targets: list[Target],
    make: Callable[[Target, Tensor], Adapter],
    biases: str,
) -> None:
    """Freeze a network, attach to every target what `make(target, its base weight)` gives, and let
    biases train: "none", "all" of the network or those of the "adapted" layers."""
    free = freeze(root)
    for target in targets:
        attach(target, make(target, base_weight(target.layer.module, target.rows).detach()))
    train_biases(root, biases, free)


class Insert(nn.Module):
    """A child that changes what a whole module (an MLP, an attention, a block) computes."""

    mergeable = False

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """Output of the module; `forward` is the module's own."""
        raise NotImplementedError


@cache
def inserted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a module's class that calls its insert."""

    def forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        def own(*args, **kwargs) -> Any:
            return base.forward(self, *args, **kwargs)

        return self._modules["added"].around(own, x, *args, **kwargs)

    def steps(self: nn.Module) -> Iterator[nn.Module]:
        return (child for name, child in self._modules.items() if name != "added")

    body = {"forward": forward, "plain_class": base}
    if issubclass(base, nn.Sequential):  # which would run the insert behind its other children
        body["__iter__"] = steps
    return type(base.__name__, (base,), body)


def insert(module: nn.Module, child: Insert) -> None:
    """Put an insert into a module."""
    module.__class__ = inserted_class(type(module))
    module.added = child


def by_class(root: nn.Module) -> dict[type[Adapter], list[Adapter]]:
    """All adapters by their class."""
    found: dict[type[Adapter], list[Adapter]] = {}
    for _, adapter in adapters(root):
        found.setdefault(type(adapter), []).append(adapter)
    return found


def after_step(model: nn.Module, step: int, total_steps: int) -> None:
    """What methods do behind optimizer step `step` = 1 ... `total_steps`, while the gradients are
    still there: AdaLoRA's rank budget, OFT's constraint."""
    for kind, members in by_class(model).items():
        kind.after_step(members, step, total_steps)


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Terms that methods add to the training loss: AdaLoRA's orthogonality."""
    losses: dict[str, Tensor] = {}
    for kind, members in by_class(model).items():
        losses |= kind.auxiliary_losses(members)
    return losses


def adapters(root: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """All adapters with their keys."""
    return ((n, m) for n, m in root.named_modules() if isinstance(m, Adapter))


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its layer, in place: plain classes, keys and speed of the base.

    Raises:
        UserError: a method that computes something the base cannot (adapt_former, convpass,
            visual_prompt_tuning).
    """
    if stuck := [n for n, m in model.named_modules() if isinstance(m, Insert)]:
        kind = type(model.get_submodule(stuck[0])).__name__
        raise UserError(
            f"{kind} ({stuck[0]}) adds its own computation and cannot be merged into the base;"
            " use the checkpoint with its peft section"
        )
    for layer in [m for m in model.modules() if is_adapted(m)]:
        layer.adapter.eval()  # without dropout
        weight, bias = changed_weight(layer).detach(), changed_bias(layer)
        with torch.no_grad():
            base_weight(layer).copy_(weight)
            if bias is not None:
                base_bias(layer).copy_(bias.detach().clone())
        del layer.adapter
    for module in model.modules():
        while hasattr(type(module), "plain_class"):
            module.__class__ = type(module).plain_class
    for name, child in list(trunk(model).named_children()):
        if isinstance(child, Shared):
            delattr(trunk(model), name)
    return model


class Shared(nn.Module):
    """Tensors that all adapters of a model use together; a child of the encoder."""


def freeze(root: nn.Module) -> list[nn.Parameter]:
    """No parameter of `root` trains and no batch norm updates its statistics.

    Returns:
        the parameters that trained before; the others are ones that nothing reads.
    """
    free = [p for p in root.parameters() if p.requires_grad]
    root.requires_grad_(False)
    for module in root.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.__class__ = held_class(type(module))
            module.eval()
    return free


@cache
def held_class(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a norm layer that is always in eval mode: its statistics are the base's."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return base.train(self, False)

    return type(base.__name__, (base,), {"train": train, "plain_class": base})


def is_bias(name: str, parameter: nn.Parameter) -> bool:
    """A vector that is added: bias, in_proj_bias, q_bias."""
    return parameter.ndim == 1 and name.rsplit(".", 1)[-1].endswith("bias")


def train_biases(root: nn.Module, which: str, free: list[nn.Parameter]) -> None:
    """Let biases train: none, "all" of the network, or those of the "adapted" layers.

    Args:
        free: what `freeze` returned.
    """
    allowed = {id(p) for p in free}
    for module in root.modules() if which != "none" else ():
        for name, parameter in module.named_parameters(recurse=False):
            chosen = id(parameter) in allowed and (which == "all" or is_adapted(module))
            if chosen and is_bias(name, parameter):
                parameter.requires_grad_(True)
