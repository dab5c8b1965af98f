"""The layers and blocks of a network, found by its structure; functions that are never compiled."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# ------------------------------------------------------------------------------------ layers
#
# Nothing here knows a library's classes: a projection is a Linear layer with a place in the flow of
# widths (a fused qkv has three times the rows that the next layer reads, an MLP goes out and comes
# back), names only settle which of three equal Linear layers is the query.
#
# D width, C channels.

RowRange = tuple[int, int]
Roles = dict[nn.Module, tuple[str, dict[str, RowRange]]]
"""Role and parts of layers, see `Layer`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with a weight."""

    name: str
    """Its key in the model, "blocks.0.attn.qkv"."""
    module: nn.Module
    role: str
    """q, k, v, qkv, kv, proj, fc1, fc2, conv, norm or linear (any other Linear)."""
    parts: dict[str, RowRange]
    """Rows of the fused projections, {"q": (0, D), ...}; empty for a layer of one role."""


def is_conv(module: nn.Module) -> TypeGuard[_ConvNd]:
    """A convolution of any dimension, not a transposed one."""
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer with a scale per channel, of torch or of any library's own."""
    weight = module._parameters.get("weight")
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase)
    return (
        weight is not None
        and weight.ndim == 1
        and (known or "norm" in type(module).__name__.lower())
    )


def layers(root: nn.Module) -> list[Layer]:
    """All Linear, convolution and norm layers in the order of registration, each with its role."""
    roles: Roles = {}
    for parent in root.modules():
        roles |= attention_roles(parent) or mlp_roles(parent)
    for block in blocks(root):
        roles |= scattered_roles(block, roles)
    found = []
    for name, module in root.named_modules():
        if module in roles:
            role, parts = roles[module]
        elif isinstance(module, nn.Linear | nn.MultiheadAttention):  # its input projection
            role, parts = "linear", {}
        elif is_conv(module) or is_norm(module):
            role, parts = ("conv" if is_conv(module) else "norm"), {}
        else:
            continue
        found.append(Layer(name, module, role, parts))
    return found


def linear_children(parent: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Direct children that are Linear layers."""
    return [(n, m) for n, m in parent.named_children() if isinstance(m, nn.Linear)]


def letter(name: str) -> str | None:
    """Query, key or value by a telling name: q_proj, to_k, wv, query, value_layer."""
    found = re.search(r"(?:^|_)(?:w_?)?([qkv])(?:_|$)|(query|key|value)", name.lower())
    return (found[1] or found[2][0]) if found else None


def attention_roles(parent: nn.Module) -> Roles:
    """Roles of the direct children of an attention module; empty for any other module.

    Attention holds a head count (an integer attribute named *head*) or three Linear layers with
    telling names, or its first Linear has three times the rows that the next one reads.
    """
    if isinstance(parent, nn.MultiheadAttention):
        if parent.in_proj_weight is None:  # key and value widths differ: three raw parameters
            return {parent.out_proj: ("proj", {})}
        return {
            parent: ("qkv", thirds(3 * parent.embed_dim, parent.embed_dim)),
            parent.out_proj: ("proj", {}),
        }
    children = linear_children(parent)
    named = {role: module for name, module in children if (role := letter(name))}
    if len(named) == 3:
        projections: Roles = {module: (role, {}) for role, module in named.items()}
        return projections | output_role(children, projections, named["v"].out_features)
    if len(children) >= 2 and counts_heads(parent):
        return positional_roles([module for _, module in children])
    if len(children) == 2:
        first, second = (module for _, module in children)
        if first.out_features == 3 * first.in_features == 3 * second.in_features:
            return fused_roles(first, second)
    return {}


def counts_heads(module: nn.Module) -> bool:
    """Whether a module holds a number of attention heads."""
    return any(type(value) is int and "head" in name for name, value in vars(module).items())


def positional_roles(linears: list[nn.Linear]) -> Roles:
    """Attention without telling names: fused qkv and out; q, fused kv and out; q, k, v and out."""
    first, second, *rest = linears
    if first.out_features > second.in_features and not rest:
        return fused_roles(first, second)
    if rest and second.out_features == 2 * rest[0].in_features:
        half = rest[0].in_features
        parts = {"k": (0, half), "v": (half, 2 * half)}
        return {first: ("q", {}), second: ("kv", parts), rest[0]: ("proj", {})}
    if len(rest) >= 2 and len({m.in_features for m in linears[:3]}) == 1:
        third, out = rest[:2]
        found: Roles = {first: ("q", {}), second: ("k", {}), third: ("v", {})}
        return found | ({out: ("proj", {})} if out.in_features == third.out_features else {})
    return {}


def fused_roles(fused: nn.Linear, out: nn.Linear) -> Roles:
    """Fused qkv, possibly with fewer keys and values than queries, and the output projection."""
    return {fused: ("qkv", thirds(fused.out_features, out.in_features)), out: ("proj", {})}


def thirds(rows: int, queries: int) -> dict[str, RowRange]:
    """Rows of q, k and v in a fused weight; keys and values share what the queries leave."""
    keys = (rows - queries) // 2
    return {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, rows)}


def output_role(
    children: list[tuple[str, nn.Linear]], taken: Iterable[nn.Module], width: int
) -> Roles:
    """The Linear that reads the values, where it lies beside them."""
    free = [m for _, m in children if m not in taken and m.in_features == width]
    return {free[-1]: ("proj", {})} if free else {}


def mlp_roles(parent: nn.Module) -> Roles:
    """fc1 (with its gate) and fc2: direct Linear children, or convolutions of one voxel, that leave
    a width and come back."""
    linears: list[tuple[nn.Module, int, int]] = [
        (m, m.in_features, m.out_features) for _, m in linear_children(parent)
    ]
    convs = [m for m in parent.children() if is_conv(m)]
    if not linears and len(convs) == 2 and all(is_pointwise(c) for c in convs):
        if convs[0].out_channels < convs[0].in_channels:
            return {}  # squeeze and excitation
        linears = [(c, c.in_channels, c.out_channels) for c in convs]
    if len(linears) < 2:
        return {}
    *wide, (back, narrow, width) = linears
    hidden = {out for _, _, out in wide}
    if any(size != width for _, size, _ in wide) or hidden not in ({narrow}, {2 * narrow}):
        return {}
    return {**{m: ("fc1", {}) for m, _, _ in wide}, back: ("fc2", {})}


def is_pointwise(conv: _ConvNd) -> bool:
    """A convolution that is a Linear layer at every position."""
    return conv.groups == 1 and all(k == 1 for k in conv.kernel_size)


def feed_forwards(root: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Modules that hold a whole MLP and no other weight but a norm: key, module, width D."""
    roles = {layer.module: layer for layer in layers(root)}
    found = []
    for name, parent in root.named_modules():
        inside = [roles[m] for m in parent.modules() if m in roles]
        own = [roles[m].role for m in parent.children() if m in roles]
        weighted = [layer.role for layer in inside if layer.role != "norm"]
        if "fc1" in own and "fc2" in own and set(weighted) == {"fc1", "fc2"}:
            back = next(m for m in parent.children() if m in roles and roles[m].role == "fc2")
            found.append((name, parent, back._parameters["weight"].shape[0]))
    return found


def attentions(root: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Modules that hold the projections of one attention: key, module, width D."""
    roles = {layer.module: layer for layer in layers(root)}
    found = []
    for name, parent in root.named_modules():
        own = [parent, *parent.children()] if parent in roles else list(parent.children())
        out = [m for m in own if m in roles and roles[m].role == "proj"]
        if out and {"q", "qkv"} & {roles[m].role for m in own if m in roles}:
            found.append((name, parent, out[0]._parameters["weight"].shape[0]))
    return found


def scattered_roles(block: nn.Module, known: Roles) -> Roles:
    """Roles of a block's Linear layers whose siblings lie in other modules.

    A square one after the values is the output projection; two that leave a width and come back
    are the MLP.
    """
    inside = [m for m in block.modules() if isinstance(m, nn.Linear)]
    free = [m for m in inside if m not in known]
    roles: Roles = {}
    if known_roles := {known[m][0] for m in inside if m in known}:
        attention = "v" in known_roles or "qkv" in known_roles
        square = [m for m in free if m.in_features == m.out_features]
        if attention and "proj" not in known_roles and square:
            roles[square[0]] = ("proj", {})
    free = [m for m in free if m not in roles]
    if len(free) == 2 and free[0].in_features == free[1].out_features:
        first, second = free
        if first.out_features in (second.in_features, 2 * second.in_features):
            roles |= {first: ("fc1", {}), second: ("fc2", {})}
    return roles


def weight_names(layer: nn.Module) -> tuple[str, str]:
    """Names of the weight and the bias."""
    if isinstance(layer, nn.MultiheadAttention):
        return "in_proj_weight", "in_proj_bias"
    return "weight", "bias"


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of an encoder with a head; any other network itself."""
    children = dict(model.named_children())
    return children["encoder"] if {"encoder", "head"} <= children.keys() else model


# ------------------------------------------------------------------------------------ blocks
#
# The blocks of a network from input to output, found by its structure: the one meaning of the word
# for PEFT methods, learning rates by layer, partial fine-tuning and layers that are read out.
#
# A block is the largest part that is not a stem, a stage or a container: a transformer block, a
# residual block, an inception module; where a network has none of them (VGG), its convolutions are
# the blocks.

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STAGE_CHILDREN = {"blocks", "layers", "stages", "transformer_encoder"}
STEMS = {"patch_embed", "embeds", "stem"}
POOLS = {"attn_pool"}  # a transformer block in all but its output, one vector


def blocks(net: nn.Module) -> list[nn.Module]:
    """Blocks from the input."""
    return [net.get_submodule(name) for name in block_names(net)]


def block_names(net: nn.Module, skip: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Names of the blocks in order from the input; parts made of parameters in `skip` are none."""
    children = with_parameters(net)
    if len(children) == 1 and with_parameters(*children.values()):
        ((name, inner),) = children.items()  # an encoder or a user's class around a network
        inside = block_names(inner, frozenset(key.removeprefix(f"{name}.") for key in skip))
        return tuple(f"{name}.{block}" for block in inside)
    weights = {}
    for name, part in undivided_parts(net):
        own = {f"{name}.{parameter}" for parameter, _ in part.named_parameters()}
        if own and not own <= skip:
            weights[name] = count_weights(part)
    several = tuple(name for name, count in weights.items() if count > 1)
    return several if len(several) > 1 else tuple(name for name, count in weights.items() if count)


def undivided_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Parts of a network in order with their names, stages taken apart."""
    for name, child in module.named_children():
        if name in STEMS | POOLS:
            continue
        if is_stage(child):
            yield from undivided_parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def is_stage(module: nn.Module) -> bool:
    """Whether a module is a row of blocks rather than a block."""
    if isinstance(module, CONTAINERS):
        return True
    children = with_parameters(module)
    if any(are_blocks(children[name].children()) for name in STAGE_CHILDREN & set(children)):
        return True
    kinds = {type(child) for child in children.values()}
    alike = len(children) > 1 and len(kinds) == 1 and are_blocks(children.values())
    return alike and not issubclass(kinds.pop(), CONTAINERS)  # those are branches of one block


def are_blocks(parts: Iterable[nn.Module]) -> bool:
    """Whether every part that has weights has several."""
    counts = [count_weights(part) for part in parts]
    return any(counts) and all(n != 1 for n in counts)


def with_parameters(module: nn.Module) -> dict[str, nn.Module]:
    """Direct children that have parameters, by name."""
    return {n: c for n, c in module.named_children() if any(True for _ in c.parameters())}


def count_weights(module: nn.Module) -> int:
    """Number of weight matrices and kernels in a module: parameters of two or more axes."""
    return sum(parameter.ndim >= 2 for parameter in module.parameters())


def layer_ids(net: nn.Module, blocks: tuple[str, ...]) -> dict[str, int]:
    """Depth of every parameter: 0 before the first block, i + 1 in block i and between it and the
    next, one more than the last block behind it."""
    depths, passed = {}, 0
    for name, _ in net.named_parameters():
        inside = next((i for i, block in enumerate(blocks) if name.startswith(block + ".")), None)
        if inside is not None:
            passed = inside + 1
            depths[name] = passed
        else:
            depths[name] = passed + 1 if passed and passed == len(blocks) else passed
    return depths


# --------------------------------------------------------------------- what is never compiled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_unprepared: list[Callable[[], None]] = []


def eager(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that torch.compile leaves as it is, once `keep_eager` was called.

    torch.compiler.disable itself imports torch._dynamo, which takes seconds. Who predicts from
    features does without; timm's networks and torch.optim import it in any case.
    """
    chosen = [function]

    @wraps(function)
    def call(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        return chosen[0](*args, **options)

    def prepare() -> None:
        chosen[0] = torch.compiler.disable(function)

    _unprepared.append(prepare)
    return call


def keep_eager() -> None:
    """Prepare the functions that are `eager` for a compilation."""
    while _unprepared:
        _unprepared.pop()()
