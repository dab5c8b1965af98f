"""Bottlenecks beside whole modules: AdaptFormer and Convpass. They add a computation and do not
merge.

B batch, N tokens, D width, C channels, h bottleneck.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.adapter import Insert, freeze, insert
from glovita_lib.grid import Grid, record_grid
from glovita_lib.spec import UserError
from glovita_lib.spec_peft import AdaptFormer, Convpass
from glovita_lib.structure import attentions, feed_forwards, is_conv, trunk


def channels_first(module: nn.Module) -> bool:
    """Whether an MLP is made of convolutions, on maps (B, C, ...)."""
    return any(is_conv(child) for child in module.children())


class Bottleneck(Insert):
    """s Up(Dropout(ReLU(Down(LN z)))); starts at 0."""

    def __init__(self, spec: AdaptFormer, width: int, *, first: bool) -> None:
        super().__init__()
        self.scale, self.dropout, self.first = spec.adapter_scalar, spec.dropout, first
        self.sequential = spec.mode == "sequential"
        self.down = nn.Linear(width, spec.bottleneck)
        self.up = nn.Linear(spec.bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        place = spec.adapter_layernorm_option
        self.before = nn.LayerNorm(width) if place == "in" else nn.Identity()
        self.behind = nn.LayerNorm(width) if place == "out" else nn.Identity()
        if place == "out":
            nn.init.zeros_(self.behind.weight)  # the norm of a constant has no useful gradient
        else:
            nn.init.zeros_(self.up.weight)

    def change(self, z: Tensor) -> Tensor:
        """The adapter's output, of the shape of z."""
        z = z.movedim(1, -1) if self.first else z
        low = F.dropout(F.relu(self.down(self.before(z))), self.dropout, self.training)
        out = self.scale * self.behind(self.up(low))
        return out.movedim(-1, 1) if self.first else out

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """mlp(z) + adapter(z), or h + adapter(h) with h = mlp(z)."""
        y = forward(x, *args, **kwargs)
        return y + self.change(y if self.sequential else x)


def apply_adapt_former(spec: AdaptFormer, model: nn.Module) -> None:
    """Freeze the encoder and put an adapter at every MLP.

    Raises:
        UserError: an encoder without MLPs.
    """
    root = trunk(model)
    found = mlps(root, "adapt_former")
    freeze(root)
    for _, module, width in found:
        first = channels_first(module)
        insert(module, Bottleneck(spec, width, first=first).to(device_of(module)))


def mlps(root: nn.Module, method: str) -> list[tuple[str, nn.Module, int]]:
    """All MLPs of an encoder.

    Raises:
        UserError: there is none that is a module of its own.
    """
    found = feed_forwards(root)
    if not found:
        raise UserError(
            f'peft.method = "{method}" works on the MLPs of transformers and of ConvNeXt as timm'
            " builds it; this encoder has none; lora, ssf or rep_adapter fit every encoder"
        )
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device


class ConvBypass(Insert):
    """s Up(Dropout(GELU(Conv(GELU(Down z))))), the convolution over the grid of patches; starts at
    0.

    A prefix token is a grid of one cell: of the kernel it meets the centre only.
    """

    def __init__(self, spec: Convpass, width: int, grid: Grid, *, first: bool) -> None:
        super().__init__()
        h = spec.bottleneck
        self.scale, self.dropout, self.first, self.grid = spec.scale, spec.dropout, first, grid
        self.down, self.up = nn.Linear(width, h), nn.Linear(h, width)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[grid.dimensions - 1]
        self.conv = kind(h, h, 3, padding=1)
        nn.init.zeros_(self.conv.bias)
        nn.init.zeros_(self.conv.weight)
        with torch.no_grad():  # starts as the identity
            self.centre().copy_(torch.eye(h))

    def centre(self) -> Tensor:
        """The kernel's middle (h, h)."""
        return self.conv.weight[(..., *[1] * self.grid.dimensions)]

    def change(self, z: Tensor) -> Tensor:
        """The bypass of tokens (B, N, D) or a map, channels last."""
        low = F.gelu(self.down(z))
        if z.ndim == 3:
            prefix, size = self.grid.split(z.shape[1])
            cells = low[:, prefix:].unflatten(1, size)
            mixed = self.mix(cells).flatten(1, -2)
            if prefix:
                alone = F.linear(low[:, :prefix], self.centre(), self.conv.bias)
                mixed = torch.cat([alone, mixed], dim=1)
        else:
            mixed = self.mix(low)
        low = F.dropout(F.gelu(mixed), self.dropout, self.training)
        return self.scale * self.up(low)

    def mix(self, cells: Tensor) -> Tensor:
        """The convolution over (B, *grid, h)."""
        return self.conv(cells.movedim(-1, 1)).movedim(1, -1)

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """The module's output plus the bypass of its input."""
        y = forward(x, *args, **kwargs)
        out = self.change(x.movedim(1, -1)).movedim(-1, 1) if self.first else self.change(x)
        return (y[0] + out, *y[1:]) if isinstance(y, tuple) else y + out


def apply_convpass(spec: Convpass, model: nn.Module) -> None:
    """Freeze the encoder and put a bypass beside every MLP, every attention or both.

    Raises:
        UserError: an encoder without such modules, or attention in windows, whose tokens are not
        the
            grid.
    """
    root = trunk(model)
    found = mlps(root, "convpass") if "mlp" in spec.places else []
    if "attn" in spec.places:
        heads = attentions(root)
        windowed = any("window" in k and v for _, m, _ in heads for k, v in vars(m).items())
        if not heads or windowed:
            raise UserError(
                'peft.places: "attn" needs attention over all tokens; this encoder has'
                f' {"windows" if heads else "no attention"}; use places = ["mlp"]'
            )
        found += heads
    grid = record_grid(root, "convpass")
    freeze(root)
    for _, module, width in found:
        child = ConvBypass(spec, width, grid, first=channels_first(module))
        insert(module, child.to(device_of(module)))
