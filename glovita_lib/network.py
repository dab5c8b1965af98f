"""The layers and blocks of a network, found by its structure, and how deep its parameters lie;
functions that are never compiled."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import wraps
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

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
    if len(children) == 1 and counts_heads(parent):  # what follows lies in another module
        alone = children[0][1]
        if alone.out_features == 3 * alone.in_features:
            return {alone: ("qkv", thirds(alone.out_features, alone.in_features))}
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

    Square ones are the output projections, as many as there are attentions; two that leave a width
    and come back are the MLP.
    """
    inside = [m for m in block.modules() if isinstance(m, nn.Linear)]
    free = [m for m in inside if m not in known]
    roles: Roles = {}
    known_roles = [known[m][0] for m in inside if m in known]
    attentions = known_roles.count("v") + known_roles.count("qkv")
    if attentions and "proj" not in known_roles:
        square = [m for m in free if m.in_features == m.out_features]
        roles = {m: ("proj", {}) for m in square[:attentions]}
        if attentions > 1:  # of the others one may join what two attentions give
            free = [m for m in free if m not in square]
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


# ----------------------------------------------------------------------------- forward passes
#
# What a forward pass reads, in which order, and what depends on what. Registration says nothing
# about order: a network may keep all its patch embeddings in one list and its blocks in another.

Uses = dict[str, tuple[str, ...] | None]
"""The parameters of a network in the order in which a forward pass first reads them, each with the
names of the modules that run then, the outermost first; None, at the end, for those it does not
read."""


class UseOrder(TorchFunctionMode):
    """Inside, notes what torch's functions are given of a network's parameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.running: list[str] = []
        self.uses: Uses = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The function's own result; one that asks for a shape or a type reads no value."""
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, torch.Size) and any(True for _ in tensors_in(result)):
            for tensor in tensors_in([args, kwargs]):
                name = self.names.get(id(tensor))
                if name is not None and name not in self.uses:
                    self.uses[name] = tuple(self.running)
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in a tree of lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@contextmanager
def noting_uses(net: nn.Module) -> Iterator[Uses]:
    """Inside, forward passes of a network are watched; the order is complete at the end. Where
    nothing could be seen, as of a scripted network, it is that of registration."""
    order, hooks = UseOrder(net), []

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        order.running.pop()

    for name, part in net.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue  # it takes no such hooks

        def enter(module: nn.Module, inputs: object, name: str = name) -> None:
            order.running.append(name)

        hooks.append(part.register_forward_pre_hook(enter))
        hooks.append(part.register_forward_hook(leave, always_call=True))
    try:
        with order:
            yield order.uses
    finally:
        for hook in hooks:
            hook.remove()
    unseen = None if order.uses else ()
    for name, _ in net.named_parameters():
        order.uses.setdefault(name, unseen)


@contextmanager
def convolution_sizes(net: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The spatial sizes of what the convolutions of a network give inside, in their order."""
    sizes: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        sizes.append(tuple(output.shape[2:]))

    hooks = [part.register_forward_hook(note) for part in net.modules() if is_conv(part)]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def dependencies(net: nn.Module, output: Tensor) -> frozenset[str]:
    """Names of the parameters that an output was computed with."""
    if not output.requires_grad:
        return frozenset()
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    return frozenset(name for name, grad in zip(names, grads, strict=True) if grad is not None)


# ------------------------------------------------------------------------------------ blocks
#
# The blocks of a network from input to output, found by its structure: the one meaning of the word
# for PEFT methods, for layers that are read out and, where no library says more, for depth.
#
# A block is the largest part that is not a stem, a stage or a container: a transformer block, a
# residual block, an inception module; where a network has none of them (VGG), its convolutions are
# the blocks. A part that runs inside another (a position encoding that the blocks of a stage share)
# is none.

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STAGE_CHILDREN = {"blocks", "layer", "layers", "stages", "transformer_encoder", "res_blocks"}
STEMS = {
    "patch_embed", "embeds", "embedder", "embeddings", "stem", "pos_encoding",
    "cls_positional_encoding",
}  # fmt: skip
POOLS = {"attn_pool"}  # a transformer block in all but its output, one vector


def blocks(root: nn.Module) -> list[nn.Module]:
    """Blocks from the input; an encoder knows those of its network in the order of their use."""
    known = vars(root).get("block_names")
    net, names = (root, block_names(root)) if known is None else (root.get_submodule("net"), known)
    return [net.get_submodule(name) for name in names]


def block_names(
    net: nn.Module, skip: frozenset[str] = frozenset(), uses: Uses | None = None
) -> tuple[str, ...]:
    """Names of the blocks from the input, in the order of their use where that is known, else of
    their registration; parts made of parameters in `skip` are none."""
    names = registered_blocks(net, skip)
    first: dict[str, int] = {}
    called = set()
    for place, (parameter, running) in enumerate((uses or {}).items()):
        name = part_with(parameter, names)
        if running is not None and name is not None:
            first.setdefault(name, place)
            called |= {name} if any(other in names for other in running if other != name) else set()
    place, places = -1, {}
    for name in names:
        places[name] = place = first.get(name, place)  # one that is not seen is where it stands
    return tuple(sorted((name for name in names if name not in called), key=places.__getitem__))


def in_front(root: nn.Module) -> list[nn.Module]:
    """Modules with parameters of their own that are read before the first block: in the order of
    use of an encoder's network, else of registration."""
    inside = {module for block in blocks(root) for module in block.modules()}
    uses = vars(root).get("uses")
    net = root if uses is None else root.get_submodule("net")
    found: dict[nn.Module, None] = {}
    for name in uses or [name for name, _ in net.named_parameters()]:
        module = net.get_submodule(name.rpartition(".")[0])
        if module in inside:
            break
        found[module] = None
    return list(found)


def part_with(name: str, parts: Collection[str]) -> str | None:
    """The part, of some by their names, that holds a parameter."""
    while name:
        name = name.rpartition(".")[0]
        if name in parts:
            return name
    return None


def registered_blocks(net: nn.Module, skip: frozenset[str]) -> tuple[str, ...]:
    """Names of the blocks in the order of registration, see `block_names`."""
    children = with_parameters(net)
    if len(children) == 1 and with_parameters(*children.values()):
        ((name, inner),) = children.items()  # an encoder or a user's class around a network
        inside = registered_blocks(inner, frozenset(key.removeprefix(f"{name}.") for key in skip))
        return tuple(f"{name}.{block}" for block in inside)
    weights, kinds = {}, {}
    for name, part in undivided_parts(net):
        own = {f"{name}.{parameter}" for parameter, _ in part.named_parameters()}
        if own and not own <= skip:
            weights[name], kinds[name] = count_weights(part), type(part)
    several = {kinds[name] for name, count in weights.items() if count > 1}
    found = tuple(n for n, count in weights.items() if count > 1 or (count and kinds[n] in several))
    return found if len(found) > 1 else tuple(name for name, count in weights.items() if count)


def undivided_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Parts of a network in order with their names, stages taken apart."""
    for name, child in module.named_children():
        if name in STEMS | POOLS or isinstance(child, nn.ParameterList | nn.ParameterDict):
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


# ------------------------------------------------------------------------------------- depth
#
# How deep a parameter lies: the one meaning of it for learning rates by layer and for layers that
# stay frozen. Depth 0 is the stem, then each layer is one deeper, and a head is deepest.
#
# Where the library says it, it decides: timm's networks by `group_matcher` and `no_weight_decay`.
# Else a block is a layer; what is read in front of a block (position embeddings, a downsampling)
# is as deep as that block, a norm behind the last one as deep as the last, and what the library
# applies behind its pooling as deep as a head, which is how timm counts.


@dataclass(frozen=True, slots=True)
class Depths:
    """How deep the parameters of a network lie."""

    of: dict[str, int]
    """Depth by the parameter's name."""
    layers: int
    """Depth of the last block: how many layers there are without stem and head."""
    head: int
    """Depth of a head behind the network."""


def depths_of(net: nn.Module, blocks: tuple[str, ...], uses: Uses) -> Depths:
    """Depths of all parameters of a network.

    Those that it got after it was watched, as those of PEFT methods, are as deep as the shallowest
    in the smallest part that they belong to; as a head where they belong to the whole network.
    """
    own = [name for name, _ in net.named_parameters() if name in uses]
    of, head = stated_depths(net, own) or depths_in_use(net, blocks, uses, own)
    inside = [depth for name, depth in of.items() if part_with(name, blocks) is not None]
    layers = max(inside, default=max(of.values(), default=0))
    shallowest: dict[str, int] = {}
    for name, depth in of.items():
        part = name.rpartition(".")[0]
        while part:
            shallowest[part] = min(depth, shallowest.get(part, depth))
            part = part.rpartition(".")[0]
    for name, _ in net.named_parameters():
        if name not in of:
            holder = part_with(name, shallowest)
            of[name] = head if holder is None else shallowest[holder]
    return Depths(of, layers, head)


def stated_depths(net: nn.Module, names: Iterable[str]) -> tuple[dict[str, int], int] | None:
    """Depths that a network's own `group_matcher` gives, and that of its classifier; None where it
    has none, or one that matches no parameter, as of LeViT in older versions."""
    prefix, stating = spokesman(net, "group_matcher")
    if stating is None:
        return None
    from timm.models._manipulate import group_with_matcher

    classifiers = (getattr(stating, "pretrained_cfg", None) or {}).get("classifier") or "head"
    heads = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    own = {name.removeprefix(prefix): name for name in names}
    # the classifier may have been taken off, and its group with it
    asked = [*own, *(f"{head}.weight" for head in heads)]
    found = group_with_matcher(
        ((name, None) for name in asked), stating.group_matcher(coarse=False), reverse=True
    )
    head = found[f"{heads[0]}.weight"]
    if all(found[name] == head for name in own):
        return None
    return {own[name]: found[name] for name in own}, head


def spokesman(net: nn.Module, method: str) -> tuple[str, Any]:
    """The network itself, or the only one inside, that has a method: the prefix of its parameters'
    names and the network; None for the network where there is none."""
    prefix = ""
    while not callable(getattr(net, method, None)):
        children = with_parameters(net)
        if len(children) != 1 or any(True for _ in net.parameters(recurse=False)):
            return "", None
        ((name, net),) = children.items()
        prefix += f"{name}."
    return prefix, net


def depths_in_use(
    net: nn.Module, blocks: tuple[str, ...], uses: Uses, own: Collection[str]
) -> tuple[dict[str, int], int]:
    """Depths by the order in which a forward pass reads the parameters, and that of a head."""
    numbers = {name: number for number, name in enumerate(blocks, 1)}
    last, reached, of = len(blocks), 0, {}
    # where single convolutions are the blocks, a norm between two belongs to the first
    weights = Counter(part_with(name, blocks) for name, p in net.named_parameters() if p.ndim > 1)
    ahead = int(any(weights[name] > 1 for name in blocks))
    present = set(own)
    for name, running in uses.items():
        if name not in present:
            continue  # taken off since
        around = (part for part in running or () if part in numbers)
        block = part_with(name, numbers) or next(around, None)
        if block is not None:
            of[name] = numbers[block]
            reached = max(reached, of[name])
        elif running is None:
            of[name] = last + 1
        else:
            of[name] = min(reached + ahead, last) if reached else 0
    return of, last + 1


# what a position, a token or a factor is called
UNDECAYED = {
    "bias", "biases", "embed", "embedding", "embeddings", "gain", "gamma", "latent", "latents",
    "pos", "position", "positional", "positions", "prompt", "prompts", "scale", "temperature",
    "token", "tokens",
}  # fmt: skip
POSITIONS = {"pos", "position", "positional", "positions"}
MATRICES = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention, _ConvNd)


def undecayed(root: nn.Module, uses: Uses, prefix: str = "") -> set[str]:
    """Names of the parameters that weight decay may spare: norms, biases, tokens, position
    embeddings and scales.

    Where the network says it (`no_weight_decay`), those of one axis and those that it names, as
    timm has it. Else those of one axis, embedding tables, and what is no weight of a layer and is
    a factor (one axis longer than 1) or called a token, position, bias or scale.

    Args:
        uses: parameters that the network had before a PEFT method added its own; empty for a module
            that is no library's network.
        prefix: of the names of the network in `root` that `uses` is about.
    """
    before, stating = spokesman(root.get_submodule(prefix.rstrip(".")), "no_weight_decay")
    patterns = tuple(stating.no_weight_decay()) if stating is not None else ()
    spared = set()
    for owner_name, owner in root.named_modules():
        for last, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{last}" if owner_name else last
            inside = name.removeprefix(prefix)
            if stating is not None and name.startswith(prefix) and inside in uses:
                own = inside.removeprefix(before)
                spare = parameter.ndim <= 1 or any(fnmatch(own, pattern) for pattern in patterns)
            else:
                spare = is_spared(owner, owner_name.rpartition(".")[2], last, parameter)
            spared |= {name} if spare else set()
    return spared


def is_spared(owner: nn.Module, owner_name: str, name: str, parameter: Tensor) -> bool:
    """Whether a parameter of which no library says anything is one of those of `undecayed`."""
    if parameter.ndim <= 1 or isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return True
    words = words_of(name)
    if isinstance(owner, MATRICES) and "weight" in words:
        return False
    is_factor = parameter.ndim > 2 and sum(side > 1 for side in parameter.shape) <= 1
    of_positions = POSITIONS & words_of(owner_name)
    return bool(is_factor or words & UNDECAYED or (of_positions and name != "weight"))


def words_of(name: str) -> set[str]:
    """The words of a name: pos and embed of pos_embed, posEmbed and pos.embed2."""
    return set(re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


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
