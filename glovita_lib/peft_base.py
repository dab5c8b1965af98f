"""What PEFT methods share: the layers they change, adapters of layers, the trained state."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from glovita_lib.errors import UserError, listed
from glovita_lib.network import (
    Layer,
    RowRange,
    blocks,
    encoder_of,
    is_conv,
    is_norm,
    layers,
    weight_names,
)
from glovita_lib.spec import ByStruct
from glovita_lib.spec_peft import PeftMethod

# ---------------------------------------------------------------------------------- dispatch
#
# Which parameters train, and what is added to them: one function for each method.
#
# A method changes a model in place. Parameters it freezes stay in the state dict under their names;
# `Model.refresh`, called afterwards, keeps the frozen parts in eval mode.


@ByStruct
def apply_peft(spec: PeftMethod, model: nn.Module) -> None:
    """Apply the method of a Struct to a model with `encoder` and `head`, in place."""
    raise TypeError(f"no PEFT method for {type(spec).__name__}")


# ----------------------------------------------------------------------------------- targets
#
# Which weights a PEFT method changes: logical names or regular expressions over the layers.

LOGICAL = ("q", "k", "v", "qkv", "proj", "fc1", "fc2", "conv", "norm", "all-linear")
PROJECTIONS = ("q", "k", "v", "proj", "fc1", "fc2")
KINDS = {"linear": "Linear layers", "conv": "convolutions", "norm": "norm layers"}
OF_KIND = {"linear": "lora", "conv": "lora", "norm": "ln_tuning"}  # a method that changes them
HEAD_ALONE = '"linear_probing", which trains the head alone'
WHOLE_KIND = {"conv": "conv", "norm": "norm", "all-linear": "linear"}


@dataclass(frozen=True, slots=True)
class TargetWeight:
    """A weight, or rows of one, that an adapter changes."""

    layer: Layer
    part: str | None
    """Name of the rows of a fused weight; None for the whole weight."""

    @property
    def name(self) -> str:
        """Key of the layer with the part, "blocks.0.attn.qkv.q"."""
        return self.layer.name if self.part is None else f"{self.layer.name}.{self.part}"

    @property
    def rows(self) -> RowRange | None:
        """First row and end of the part."""
        return None if self.part is None else self.layer.parts[self.part]

    @property
    def role(self) -> str:
        """Role of the part or of the layer."""
        return self.part or self.layer.role


def resolve_targets(
    root: nn.Module,
    wanted: tuple[str, ...] | None,
    *,
    allowed: tuple[str, ...],
    unset: tuple[str, ...] = PROJECTIONS,
) -> list[TargetWeight]:
    """The targets in the order of the network.

    Args:
        wanted: logical names (q, k, v, qkv, proj, fc1, fc2, conv, norm, all-linear) or regular
            expressions searched in the layers' keys; None: `unset`.
        allowed: kinds of layer the method works on ("linear", "conv", "norm").
        unset: logical names of which at least one must match, else the convolutions of
            the blocks are taken.

    Raises:
        UserError: a name or expression matches nothing; the message lists what there is.
    """
    found = layers(root)
    usable = usable_of(found, allowed)
    if wanted is None:
        inside = {m for block in blocks(root) for m in block.modules()}
        chosen = expand(usable, unset) or [
            t for t in expand(usable, ("conv",)) if t.layer.module in inside or not inside
        ]
        if not chosen:
            raise nothing(None, found, allowed)
        return tidy(chosen, found)
    chosen = []
    for name in wanted:
        matched = expand(usable, (name,)) if name in LOGICAL else list(search(usable, name))
        if not matched:
            raise nothing(name, found, allowed)
        chosen += matched
    return tidy(chosen, found)


def usable_of(found: list[Layer], allowed: tuple[str, ...]) -> list[Layer]:
    """Layers of some kinds that the model reads."""
    return [layer for layer in found if layer_kind(layer) in allowed and is_read(layer)]


def layer_kind(layer: Layer) -> str:
    """linear, conv or norm."""
    if is_conv(layer.module):
        return "conv"
    return "norm" if is_norm(layer.module) else "linear"


def is_read(layer: Layer) -> bool:
    """Whether the model reads the layer: before a method is applied only unread weights are
    frozen."""
    return base_weight(layer.module).requires_grad


def expand(usable: list[Layer], names: Iterable[str]) -> list[TargetWeight]:
    """Targets of logical names."""
    chosen = []
    for name in names:
        for layer in usable:
            # qkv also means the three where they are apart
            roles = ("qkv", "q", "k", "v", "kv") if name == "qkv" else (name,)
            if layer.role in roles or WHOLE_KIND.get(name) == layer_kind(layer):
                chosen.append(TargetWeight(layer, None))
            elif name in layer.parts:
                chosen.append(TargetWeight(layer, name))
    return chosen


def search(usable: list[Layer], pattern: str) -> Iterator[TargetWeight]:
    """Targets whose key, or key with part, contains the regular expression."""
    expression = compile_pattern(pattern)
    for layer in usable:
        if expression.search(layer.name):
            yield TargetWeight(layer, None)
            continue
        parts = (TargetWeight(layer, part) for part in layer.parts)
        yield from (t for t in parts if expression.search(t.name))


def compile_pattern(pattern: str) -> re.Pattern:
    """A user's regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"peft: {pattern!r} is no regular expression: {error}") from None


def tidy(chosen: list[TargetWeight], found: list[Layer]) -> list[TargetWeight]:
    """Each target once, in the network's order; a whole layer covers its parts."""
    whole = {t.layer.name for t in chosen if t.part is None}
    kept = {t.name: t for t in chosen if t.part is None or t.layer.name not in whole}
    order = {layer.name: i for i, layer in enumerate(found)}
    return sorted(kept.values(), key=lambda t: (order[t.layer.name], t.rows or (0, 0)))


def nothing(offered: str | None, found: list[Layer], allowed: tuple[str, ...]) -> UserError:
    """The error of targets that match none of an encoder's layers; `offered` None where they are
    unset."""
    usable = usable_of(found, allowed)
    if not usable:
        kinds = " and ".join(KINDS[kind] for kind in allowed)
        others = (kind for kind in OF_KIND if usable_of(found, (kind,)))
        told = [f'"{OF_KIND[kind]}", which changes {KINDS[kind]}' for kind in others]
        return UserError(
            f"peft.method changes {kinds}, and this encoder has none: use another method, as"
            f" {told[0] if told else HEAD_ALONE}"
        )
    names = [layer.name for layer in usable]
    logical = [name for name in LOGICAL if expand(usable, (name,))]
    near = get_close_matches(offered or "", [*logical, *names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    what = "unset, the attention and MLP projections," if offered is None else repr(offered)
    return UserError(
        f"peft.targets: {what} matches no layer of this encoder{hint}; logical names here:"
        f" {listed(logical)}; layers here: {listed(names, 12)}"
    )


def by_pattern(
    patterns: dict[str, int], targets: list[TargetWeight], default: int
) -> dict[str, int]:
    """Rank of every target by name: the last pattern of rank_pattern that its key contains.

    Raises:
        UserError: a pattern that matches no target, a rank that no target's weight can have.
    """
    ranks = {target.name: default for target in targets}
    limit = max(possible_rank(target) for target in targets)
    for rank in (default, *patterns.values()):
        if rank > limit:
            raise UserError(
                f"peft.rank = {rank}: no weight that it changes has a rank above {limit}; lower it"
            )
    for pattern, rank in patterns.items():
        expression = compile_pattern(pattern)
        matched = [name for name in ranks if expression.search(name)]
        if not matched:
            raise UserError(
                f"peft.rank_pattern: {pattern!r} matches no target; targets are {listed(ranks, 12)}"
            )
        ranks |= dict.fromkeys(matched, rank)
    return ranks


def possible_rank(target: TargetWeight) -> int:
    """Rank of the weight as a matrix (out, in * kernel) at most."""
    weight = base_weight(target.layer.module, target.rows)
    return min(len(weight), weight[0].numel())


def every(root: nn.Module, kinds: tuple[str, ...]) -> list[TargetWeight]:
    """All layers of these kinds that the model reads."""
    return [
        TargetWeight(la, None) for la in layers(root) if layer_kind(la) in kinds and is_read(la)
    ]


# ---------------------------------------------------------------------------------- adapters
#
# How a PEFT method changes layers: the weight of an adapted layer is read through its adapter.
#
# An adapted layer keeps its parameters under their keys ("attn.qkv.weight") and gets its adapter as
# a child beside them ("attn.qkv.adapter.A"). Its class is replaced by a subclass whose `weight` and
# `bias` are the changed ones for whoever reads them: code that calls the layer, code that hands its
# weight to a function (EVA's attention, torchvision's Swin, nn.MultiheadAttention) and norm layers
# with an activation inside all see the same change. Linear layers and convolutions that are called
# take a faster way with the same result.

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

    def merged_bias(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The changed bias; a layer without bias stays without."""
        return bias

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: "Members[Self]") -> Tensor:
        """Output of a called Linear layer or convolution; `members` change it together."""
        return call(layer, x, changed_weight(layer), changed_bias(layer))

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Called before the first optimizer step of a run whose method asks for training batches
        (`calibration_batches` of its Struct).

        Args:
            model: with adapters of this class.
            batches: training batches of this rank.
            loss: loss of the model on a batch, ().
            mean: mean of a tensor over all ranks, so that every rank decides the same.
        """

    @classmethod
    def after_step(cls, adapters: Sequence[Self], step: int, total_steps: int) -> None:
        """Called after optimizer step `step` = 1 ... `total_steps`, before gradients are forgotten,
        with all adapters of this class in the model."""

    @classmethod
    def auxiliary_losses(cls, adapters: Sequence[Self]) -> dict[str, Tensor]:
        """Terms of the training loss by name."""
        return {}


Member = TypeVar("Member", bound=Adapter)
Members = Sequence[tuple[RowRange | None, Member]]
"""The adapters of a layer with their rows; rows None for the whole weight."""


class PartAdapters(nn.Module):
    """Adapters of parts of a fused weight, by the parts' names (q, k, v)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, RowRange] = {}

    def add(self, part: str, rows: RowRange, adapter: Adapter) -> None:
        """Put an adapter on the part's rows."""
        self.rows[part] = rows
        self.add_module(part, adapter)

    def members(self) -> Members[Adapter]:
        """Rows and adapter of each part."""
        return [(rows, getattr(self, part)) for part, rows in self.rows.items()]


def members_of(layer: nn.Module) -> Members[Adapter]:
    """The adapters of an adapted layer."""
    adapter = layer._modules["adapter"]
    if isinstance(adapter, PartAdapters):
        return adapter.members()
    assert isinstance(adapter, Adapter), f"{type(layer).__name__} is not adapted"
    return [(None, adapter)]


def base_weight(layer: nn.Module, rows: RowRange | None = None) -> Tensor:
    """The stored, unchanged weight or rows of it."""
    weight = layer._parameters[weight_names(layer)[0]]
    assert weight is not None, "`layers` finds only layers with a weight"
    return weight if rows is None else weight[rows[0] : rows[1]]


def base_bias(layer: nn.Module, rows: RowRange | None = None) -> Tensor | None:
    """The stored, unchanged bias or rows of it."""
    bias = layer._parameters.get(weight_names(layer)[1])
    return bias if rows is None or bias is None else bias[rows[0] : rows[1]]


def changed_weight(layer: nn.Module) -> Tensor:
    """The weight as its adapters make it."""
    base = base_weight(layer)  # (out, in, *kernel)
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
    pieces: list[Tensor] = []
    end = 0
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


class Changed(nn.Module):
    """First base of a class that stands in for `plain_class`, its second base."""

    plain_class: ClassVar[type[nn.Module]]


SUBCLASSES: dict[tuple[type[Changed], type[nn.Module]], type] = {}


def change_class(module: nn.Module, change: type[Changed]) -> None:
    """Replace a module's class by its subclass with the methods of `change`, which keeps its
    name."""
    plain = type(module)
    if (change, plain) not in SUBCLASSES:
        body = {"plain_class": plain}
        SUBCLASSES[change, plain] = type(plain.__name__, (change, plain), body)
    module.__class__ = SUBCLASSES[change, plain]


class ReadLayer(Changed):
    """A layer that reads weight and bias through its adapter."""

    weight, bias = property(changed_weight), property(changed_bias)


class CalledLayer(ReadLayer):
    """A Linear layer or convolution that its adapter calls."""

    def forward(self, x: Tensor) -> Tensor:
        """Output of the changed layer."""
        members = members_of(self)
        return type(members[0][1]).run(x, self, members)


class ReadAttention(Changed):
    """nn.MultiheadAttention that reads its fused projection through the adapter."""

    in_proj_weight, in_proj_bias = property(changed_weight), property(changed_bias)


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer's weight is read through an adapter."""
    return isinstance(module._modules.get("adapter"), Adapter | PartAdapters)


def attach(target: TargetWeight, adapter: Adapter) -> None:
    """Put an adapter on a layer or on a part of its weight."""
    layer = target.layer.module
    if not is_adapted(layer):
        called = CalledLayer if type(layer).forward in PLAIN else ReadLayer
        change_class(layer, ReadAttention if isinstance(layer, nn.MultiheadAttention) else called)
    adapter.to(base_weight(layer).device).train(layer.training)
    if target.part is None:
        layer.adapter = adapter
        return
    parts = layer._modules.get("adapter")
    if not isinstance(parts, PartAdapters):
        layer.adapter = parts = PartAdapters()
    parts.add(target.part, target.layer.parts[target.part], adapter)


def attach_all(
    root: nn.Module,
    targets: list[TargetWeight],
    make: Callable[[TargetWeight, Tensor], Adapter],
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

    def around(
        self, forward: Callable[..., Tensor], x: Tensor, *args: object, **options: object
    ) -> Tensor:
        """Output of the module; `forward` is the module's own."""
        raise NotImplementedError


class WithInsert(Changed):
    """A module that calls its insert."""

    added: Insert

    def forward(self, *args: Any, **options: Any) -> Any:
        """Output of the insert around the module's own forward, whose first argument may come by
        its name."""
        if not args:
            args = (options.pop(next(iter(signature(super().forward).parameters))),)
        return self.added.around(super().forward, *args, **options)


class SequenceWithInsert(WithInsert):
    """An nn.Sequential, which would run the insert behind its other children."""

    def __iter__(self) -> Iterator[nn.Module]:
        return (m for m in self._modules.values() if m is not None and m is not self.added)


def insert(module: nn.Module, child: Insert) -> None:
    """Put an insert into a module."""
    sequential = isinstance(module, nn.Sequential)
    change_class(module, SequenceWithInsert if sequential else WithInsert)
    module.added = child


def adapters_by_class(root: nn.Module) -> dict[type[Adapter], list[Adapter]]:
    """All adapters of a network, in its order."""
    found: dict[type[Adapter], list[Adapter]] = {}
    for module in root.modules():
        if isinstance(module, Adapter):
            found.setdefault(type(module), []).append(module)
    return found


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
        layer.get_submodule("adapter").eval()  # without dropout
        weight, bias = changed_weight(layer).detach(), changed_bias(layer)
        base = base_bias(layer)
        with torch.no_grad():
            base_weight(layer).copy_(weight)
            if base is not None and bias is not None:
                base.copy_(bias.detach().clone())
        del layer.adapter
    for module in model.modules():
        while plain := getattr(type(module), "plain_class", None):
            module.__class__ = plain
    for name, child in list(encoder_of(model).named_children()):
        if isinstance(child, Shared):
            delattr(encoder_of(model), name)
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
            if not isinstance(module, HeldNorm):
                change_class(module, HeldNorm)
            module.eval()
    return free


class HeldNorm(Changed):
    """A norm layer that is always in eval mode: its statistics are the base's."""

    def train(self, mode: bool = True) -> Self:
        """Eval mode."""
        return super().train(False)


def train_biases(root: nn.Module, which: str, free: list[nn.Parameter]) -> None:
    """Let biases train: none, "all" of the network, or those of the "adapted" layers.

    Args:
        free: what `freeze` returned.
    """
    allowed = {id(p) for p in free}
    for module in root.modules() if which != "none" else ():
        for name, parameter in module.named_parameters(recurse=False):
            chosen = id(parameter) in allowed and (which == "all" or is_adapted(module))
            if chosen and parameter.ndim == 1 and name.endswith("bias"):  # in_proj_bias, q_bias too
                parameter.requires_grad_(True)


# ------------------------------------------------------------------------------- what trains
#
# What a PEFT run has trained: its state without the base, and how much it is.

ADDED = (Adapter, Insert, Shared)


def trained_names(model: nn.Module) -> list[str]:
    """Keys of the state dict that differ from the base: parameters that train, what methods have
    added, and everything outside the encoder; without what only continues a run."""
    skipped = {
        f"{name}.{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ADDED)
        for buffer in getattr(module, "transient", ())
    }
    base = base_state(model)
    return [key for key in model.state_dict() if key not in base and key not in skipped]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the encoder that the method has left alone."""
    root = encoder_of(model)
    prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is root)
    # a part that is used twice stands in the state dict under both its names
    modules = model.named_modules(remove_duplicate=False)
    added = [f"{n}." for n, m in modules if isinstance(m, ADDED)]
    training = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    owners = {n.rpartition(".")[0] for n in training}
    base = {}
    for key, tensor in model.state_dict().items():
        owner, _, name = key.rpartition(".")
        layer = model.get_submodule(owner)
        # a norm layer that trains updates its running mean and variance
        moves = owner in owners and isinstance(layer, _NormBase) and name in layer._buffers
        inside = key.startswith(prefix) and not key.startswith(tuple(added))
        if inside and key not in training and not moves:
            base[key] = tensor
    return base


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors of `trained_names` on the CPU, in memory of their own, as safetensors
    wants them."""
    state = model.state_dict()
    return {name: contiguous_copy(state[name]) for name in trained_names(model)}


def contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_trained(model: nn.Module, state: dict[str, Tensor], *, source: object) -> None:
    """Load a trained state over a model of the same spec whose base weights are loaded.

    Args:
        source: what the state comes from, for the message.

    Raises:
        UserError: the state is not of this method on this model.
    """
    wanted = set(trained_names(model))
    missing, foreign = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    wrong = sorted(k for k in wanted & state.keys() if state[k].shape != shapes[k])
    if missing or foreign or wrong:
        kinds = {"missing": missing, "unknown": foreign, "of another shape": wrong}
        told = [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names]
        raise UserError(
            f"{source} does not fit this model and PEFT method: {', '.join(told)}; use the spec of"
            " its run"
        )
    model.load_state_dict(state, strict=False)
