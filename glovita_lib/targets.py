"""Which weights a PEFT method changes: logical names or regular expressions over the layers."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from glovita_lib.spec import UserError
from glovita_lib.structure import Layer, Rows, blocks, is_conv, is_norm, layers, weight_names

LOGICAL = ("q", "k", "v", "qkv", "proj", "fc1", "fc2", "conv", "norm", "all-linear")
PROJECTIONS = ("q", "k", "v", "proj", "fc1", "fc2")
KINDS = {"linear": "Linear layers", "conv": "convolutions", "norm": "norm layers"}
WHOLE_KIND = {"conv": "conv", "norm": "norm", "all-linear": "linear"}


@dataclass(frozen=True, slots=True)
class Target:
    """A weight, or rows of one, that an adapter changes."""

    layer: Layer
    part: str | None
    """Name of the rows of a fused weight; None for the whole weight."""

    @property
    def name(self) -> str:
        """Key of the layer with the part, "blocks.0.attn.qkv.q"."""
        return self.layer.name if self.part is None else f"{self.layer.name}.{self.part}"

    @property
    def rows(self) -> Rows | None:
        """First row and end of the part."""
        return None if self.part is None else self.layer.parts[self.part]

    @property
    def role(self) -> str:
        """Role of the part or of the layer."""
        return self.part or self.layer.role


def resolve(
    root: nn.Module,
    wanted: tuple[str, ...] | None,
    *,
    allowed: tuple[str, ...],
    unset: tuple[str, ...] = PROJECTIONS,
) -> list[Target]:
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
    usable = [layer for layer in found if kind_of(layer) in allowed and is_read(layer)]
    if wanted is None:
        inside = {m for block in blocks(root) for m in block.modules()}
        chosen = expand(usable, unset) or [
            t for t in expand(usable, ("conv",)) if t.layer.module in inside or not inside
        ]
        if not chosen:
            raise nothing(None, usable, allowed)
        return tidy(chosen, found)
    chosen = []
    for name in wanted:
        matched = expand(usable, (name,)) if name in LOGICAL else list(search(usable, name))
        if not matched:
            raise nothing(name, usable, allowed)
        chosen += matched
    return tidy(chosen, found)


def kind_of(layer: Layer) -> str:
    """linear, conv or norm."""
    if is_conv(layer.module):
        return "conv"
    return "norm" if is_norm(layer.module) else "linear"


def is_read(layer: Layer) -> bool:
    """Whether the model reads the layer: before a method is applied only unread weights are
    frozen."""
    return layer.module._parameters[weight_names(layer.module)[0]].requires_grad


def expand(usable: list[Layer], names: Iterable[str]) -> list[Target]:
    """Targets of logical names."""
    chosen = []
    for name in names:
        for layer in usable:
            if layer.role in wanted_roles(name) or WHOLE_KIND.get(name) == kind_of(layer):
                chosen.append(Target(layer, None))
            elif name in layer.parts:
                chosen.append(Target(layer, name))
    return chosen


def wanted_roles(name: str) -> tuple[str, ...]:
    """Roles of whole layers that a logical name means; qkv also means the three where they are
    apart."""
    return ("qkv", "q", "k", "v", "kv") if name == "qkv" else (name,)


def search(usable: list[Layer], pattern: str) -> Iterator[Target]:
    """Targets whose key, or key with part, contains the regular expression."""
    expression = compile_pattern(pattern)
    for layer in usable:
        if expression.search(layer.name):
            yield Target(layer, None)
            continue
        parts = (Target(layer, part) for part in layer.parts)
        yield from (t for t in parts if expression.search(t.name))


def compile_pattern(pattern: str) -> re.Pattern:
    """A user's regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"peft: {pattern!r} is no regular expression: {error}") from None


def tidy(chosen: list[Target], found: list[Layer]) -> list[Target]:
    """Each target once, in the network's order; a whole layer covers its parts."""
    whole = {t.layer.name for t in chosen if t.part is None}
    kept = {t.name: t for t in chosen if t.part is None or t.layer.name not in whole}
    order = {layer.name: i for i, layer in enumerate(found)}
    return sorted(kept.values(), key=lambda t: (order[t.layer.name], t.rows or (0, 0)))


def nothing(offered: str | None, usable: list[Layer], allowed: tuple[str, ...]) -> UserError:
    """The error of targets that match nothing; `offered` None where they are unset."""
    if not usable:
        kinds = " and ".join(KINDS[kind] for kind in allowed)
        return UserError(
            f"peft.method changes {kinds}, and this encoder has none: use another method"
        )
    names = [layer.name for layer in usable]
    logical = [name for name in LOGICAL if expand(usable, (name,))]
    near = get_close_matches(offered or "", [*logical, *names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    what = "unset, the attention and MLP projections," if offered is None else repr(offered)
    return UserError(
        f"peft.targets: {what} matches no layer of this encoder{hint}; logical names here:"
        f" {', '.join(logical) or 'none'}; layers here: {shown}"
    )


def by_pattern(patterns: dict[str, int], targets: list[Target], default: int) -> dict[str, int]:
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
                f"peft.rank_pattern: {pattern!r} matches no target; targets are"
                f" {', '.join(list(ranks)[:12])}"
            )
        ranks |= dict.fromkeys(matched, rank)
    return ranks


def possible_rank(target: Target) -> int:
    """Rank of the weight as a matrix (out, in * kernel) at most."""
    module = target.layer.module
    weight = module._parameters[weight_names(module)[0]]
    out = weight.shape[0] if target.rows is None else target.rows[1] - target.rows[0]
    return min(out, weight[0].numel())


def every(root: nn.Module, kinds: tuple[str, ...]) -> list[Target]:
    """All layers of these kinds that the model reads."""
    return [Target(la, None) for la in layers(root) if kind_of(la) in kinds and is_read(la)]
