"""The blocks of a network from input to output, found by its structure.

A block is the largest part that is not a stem, a stage or a container: a transformer block, a
residual block, an inception module; where a network has none of them (VGG), its convolutions are
the blocks.
"""

from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STAGE_CHILDREN = {"blocks", "layers", "stages", "transformer_encoder"}
STEMS = {"patch_embed", "embeds", "stem"}


def weighted(module: nn.Module) -> int:
    """Number of weight matrices and kernels in a module: parameters of two or more axes."""
    return sum(parameter.ndim >= 2 for parameter in module.parameters())


def is_stage(module: nn.Module) -> bool:
    """Whether a module is a row of blocks rather than a block."""
    if isinstance(module, CONTAINERS):
        return True
    children = {n: c for n, c in module.named_children() if any(True for _ in c.parameters())}
    if any(are_blocks(list(children[name].children())) for name in STAGE_CHILDREN & set(children)):
        return True
    kinds = {type(child) for child in children.values()}
    alike = len(children) > 1 and len(kinds) == 1 and are_blocks(list(children.values()))
    return alike and not issubclass(kinds.pop(), CONTAINERS)  # those are branches of one block


def are_blocks(parts: list[nn.Module]) -> bool:
    """Whether every part that has weights has several."""
    counts = [weighted(part) for part in parts]
    return any(counts) and all(n != 1 for n in counts)


def units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Parts of a network in order, stages taken apart."""
    for name, child in module.named_children():
        if name in STEMS:
            continue
        if is_stage(child):
            yield from units(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def block_names(net: nn.Module, skip: frozenset[str]) -> tuple[str, ...]:
    """Names of the blocks in order from the input; parts made of parameters in `skip` are none."""
    parts = []
    for name, unit in units(net):
        own = {f"{name}.{parameter}" for parameter, _ in unit.named_parameters()}
        if own and not own <= skip:
            parts.append((name, weighted(unit)))
    blocks = [name for name, weights in parts if weights > 1]
    if len(blocks) < 2:
        blocks = [name for name, weights in parts if weights]
    return tuple(blocks)


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
