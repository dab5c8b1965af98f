"""The grid of patches that a sequence of tokens stands for, known from the convolution that makes
the patches.

B batch, N tokens, D width.
"""

from functools import cache

from torch import Tensor, nn

from glovita_lib.adapter import base_weight
from glovita_lib.spec import UserError
from glovita_lib.structure import blocks, is_conv, layers


class Grid:
    """Spatial size of the patches of the input at hand; a plain object that layers share."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.size: tuple[int, ...] = ()

    def split(self, tokens: int) -> tuple[int, tuple[int, ...]]:
        """Number of prefix tokens and the grid of the others, which may be halved (Swin's stages).

        Raises:
            RuntimeError: no such grid, for example where patches were dropped.
        """
        size = self.size
        if tokens >= volume(size):
            return tokens - volume(size), size
        while volume(size) > tokens:
            size = tuple(-(-side // 2) for side in size)
        if volume(size) != tokens:
            raise RuntimeError(f"{tokens} tokens are no grid of the {self.size} patches")
        return 0, size


def volume(size: tuple[int, ...]) -> int:
    """Number of cells of a grid."""
    cells = 1
    for side in size:
        cells *= side
    return cells


@cache
def recording_class(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a convolution that notes the spatial size of its output."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = base.forward(self, x)
        self.grid.size = tuple(y.shape[2:])
        return y

    return type(base.__name__, (base,), {"forward": forward, "plain_class": base})


def record_grid(root: nn.Module, method: str) -> Grid:
    """Let the convolution that makes the patches, the last one in front of the blocks, note its
    grid.

    Raises:
        UserError: an encoder without one.
    """
    inside = {m for block in blocks(root) for m in block.modules()}
    convs = []
    for module in root.modules():
        if module in inside:
            break
        if is_conv(module):
            convs.append(module)
    if not convs:
        raise UserError(
            f'peft.method = "{method}": this encoder makes its patches without a convolution, so'
            " their grid is not known; use another method"
        )
    conv = convs[-1]
    conv.__class__ = recording_class(type(conv))
    conv.grid = Grid(len(conv.kernel_size))
    return conv.grid


def sequence_width(root: nn.Module) -> int | None:
    """Width D of the one sequence of tokens (B, N, D) that the blocks pass on; None where there is
    none: attention in every block, no windows, no convolution."""
    roles = {layer.module: layer.role for layer in layers(root)}
    widths = set()
    for unit in blocks(root):
        inside = list(unit.modules())
        windowed = any("window" in k and v for m in inside for k, v in vars(m).items())
        found = {roles[m] for m in inside if m in roles}
        if windowed or any(is_conv(m) for m in inside) or not {"q", "qkv"} & found:
            return None
        widths |= {base_weight(m).shape[0] for m in inside if roles.get(m) == "proj"}
    return widths.pop() if len(widths) == 1 else None
