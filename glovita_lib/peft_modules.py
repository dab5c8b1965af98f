"""PEFT methods that add modules or tokens: AdaptFormer, Convpass, visual prompts."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.errors import UserError
from glovita_lib.network import (
    attentions,
    blocks,
    encoder_of,
    feed_forwards,
    in_front,
    is_conv,
    layers,
)
from glovita_lib.peft_base import (
    Changed,
    Insert,
    Shared,
    apply_peft,
    base_weight,
    change_class,
    freeze,
    insert,
)
from glovita_lib.spec_peft import AdaptFormer, Convpass, VisualPromptTuning

# ----------------------------------------------------------------------- the grid of patches
#
# The grid of patches that a sequence of tokens stands for, known from the convolution that makes
# the patches.
#
# B batch, N tokens, D width.


class Grid:
    """Spatial size of the patches of the input at hand; a plain object that layers share."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.size: tuple[int, ...] = ()
        self.prefix = 0  # tokens before those of the whole grid, as the last call saw them

    def split(self, tokens: int) -> tuple[int, tuple[int, ...]]:
        """Number of prefix tokens and the grid of the others, which may be halved (Swin's stages),
        but for its first axis (time, in MViT's stages).

        Raises:
            UserError: no such grid, for example where patches were dropped.
        """
        if tokens >= math.prod(self.size):
            self.prefix = tokens - math.prod(self.size)
            return self.prefix, self.size
        for kept in (0, 1):
            size = self.size
            while math.prod(size) + self.prefix > tokens and max(size[kept:]) > 1:
                size = (*size[:kept], *(-(-side // 2) for side in size[kept:]))
            if math.prod(size) + self.prefix == tokens:
                return self.prefix, size
        raise UserError(
            f"peft.method: it needs all {' x '.join(map(str, self.size))} patches, and there"
            f" are {tokens} tokens: leave no patches out in model.encoder"
        )


class Recording(Changed):
    """A convolution that notes the spatial size of its output."""

    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        """The convolution's output (B, C, *grid)."""
        y = super().forward(x)
        self.grid.size = tuple(y.shape[2:])
        return y


def record_grid(root: nn.Module, method: str) -> Grid:
    """Let the convolution that makes the patches, the last one in front of the blocks, note its
    grid.

    Raises:
        UserError: an encoder without one.
    """
    convs = [module for module in in_front(root) if is_conv(module)]
    if not convs:
        raise UserError(
            f'peft.method = "{method}": this encoder makes its patches without a convolution, so'
            ' their grid is not known; use another method, as "lora"'
        )
    grid = Grid(len(convs[-1].kernel_size))
    change_class(convs[-1], Recording)
    vars(convs[-1])["grid"] = grid  # no child: the bypasses share it
    return grid


def sequence_width(root: nn.Module) -> int | None:
    """Width D of the one sequence of tokens (B, N, D) that the blocks pass on; None where there is
    none: one attention in every block, no windows, no convolution, no positions by the place in the
    sequence, which tokens in front would move, nor biases of pairs of places."""
    if any(name.endswith("relative_position_bias_table") for name, _ in root.named_parameters()):
        return None
    roles = {layer.module: layer.role for layer in layers(root)}
    widths = set()
    for unit in blocks(root):
        inside = list(unit.modules())
        windowed = any("window" in k and v for m in inside for k, v in vars(m).items())
        found = [roles[m] for m in inside if m in roles]
        placed = any(hasattr(m, "get_position_ids") for m in inside)
        single = found.count("q") + found.count("qkv") == 1
        if windowed or placed or any(is_conv(m) for m in inside) or not single:
            return None
        widths |= {base_weight(m).shape[0] for m in inside if roles.get(m) == "proj"}
    return widths.pop() if len(widths) == 1 else None


# ------------------------------------------------------------------------------- bottlenecks
#
# Bottlenecks beside whole modules: AdaptFormer and Convpass. They add a computation and do not
# merge.
#
# B batch, N tokens, D width, C channels, h bottleneck.


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
        if isinstance(self.behind, nn.LayerNorm):
            nn.init.zeros_(self.behind.weight)  # the norm of a constant has no useful gradient
        else:
            nn.init.zeros_(self.up.weight)

    def change(self, z: Tensor) -> Tensor:
        """The adapter's output, of the shape of z."""
        z = z.movedim(1, -1) if self.first else z
        low = F.dropout(F.relu(self.down(self.before(z))), self.dropout, self.training)  # (..., h)
        out = self.scale * self.behind(self.up(low))
        return out.movedim(-1, 1) if self.first else out

    def around(
        self, forward: Callable[..., Tensor], x: Tensor, *args: object, **options: object
    ) -> Tensor:
        """mlp(z) + adapter(z), or h + adapter(h) with h = mlp(z)."""
        y = forward(x, *args, **options)
        return y + self.change(y if self.sequential else x)


@apply_peft.register
def apply_adapt_former(spec: AdaptFormer, model: nn.Module) -> None:
    """Freeze the encoder and put an adapter at every MLP.

    Raises:
        UserError: an encoder without MLPs.
    """
    root = encoder_of(model)
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
            " builds it; this encoder has none as a module of its own; lora, ssf or rep_adapter fit"
            " every encoder"
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
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[grid.dimensions - 1]
        self.conv = kind(h, h, 3, padding=1)
        for zero in (self.down.bias, *self.up.parameters(), *self.conv.parameters()):
            nn.init.zeros_(zero)
        with torch.no_grad():  # starts as the identity
            self.centre().copy_(torch.eye(h))

    def centre(self) -> Tensor:
        """The kernel's middle (h, h)."""
        return self.conv.weight.flatten(2)[..., 3**self.grid.dimensions // 2]

    def change(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The bypass of tokens (B, N, D) or a map, channels last; of tokens that do not count by
        the mask (B, N) the kernel sees zeros, as beyond the grid."""
        low = F.gelu(self.down(z))  # (..., h)
        low = low if mask is None else low.masked_fill(~mask[..., None], 0)
        if z.ndim == 3:
            prefix, size = self.grid.split(z.shape[1])
            cells = low[:, prefix:].unflatten(1, size)  # (B, *grid, h)
            mixed = self.mix(cells).flatten(1, -2)  # (B, N - prefix, h)
            if prefix:
                alone = F.linear(low[:, :prefix], self.centre(), self.conv.bias)
                mixed = torch.cat([alone, mixed], dim=1)  # (B, N, h)
        else:
            mixed = self.mix(low)
        low = F.dropout(F.gelu(mixed), self.dropout, self.training)
        return self.scale * self.up(low)

    def mix(self, cells: Tensor) -> Tensor:
        """The convolution over (B, *grid, h)."""
        return self.conv(cells.movedim(-1, 1)).movedim(1, -1)

    def around(
        self, forward: Callable[..., Tensor], x: Tensor, *args: object, **options: object
    ) -> Tensor:
        """The module's output plus the bypass of its input."""
        y = forward(x, *args, **options)
        # our networks of series give their modules the mask of the tokens
        masks = (arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.bool)
        mask = next((arg for arg in masks if arg.shape == x.shape[:2]), None)
        out = self.change(x.movedim(1, -1)).movedim(-1, 1) if self.first else self.change(x, mask)
        return (y[0] + out, *y[1:]) if isinstance(y, tuple) else y + out


@apply_peft.register
def apply_convpass(spec: Convpass, model: nn.Module) -> None:
    """Freeze the encoder and put a bypass beside every MLP, every attention or both.

    Raises:
        UserError: an encoder without such modules, or attention in windows, whose tokens are not
        the
            grid.
    """
    root = encoder_of(model)
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


# ----------------------------------------------------------------------------------- prompts
#
# Visual prompt tuning: learned tokens beside those of the image (Jia et al., ECCV 2022).
#
# Prompts stand in front of the sequence, the place does not matter to attention. They are taken out
# behind the last block they pass, so that all that follows sees the tokens it knows.
#
# B batch, N tokens, P prompts, D width.


class PromptProjection(Shared):
    """From the prompts' own width to the encoder's, the same in all blocks."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="linear")
        nn.init.zeros_(self.linear.bias)


class Prompts(Insert):
    """Prompts that enter in front of a block, leave behind it, or both."""

    def __init__(
        self,
        spec: VisualPromptTuning,
        projection: PromptProjection | None,
        *,
        width: int,
        bound: float,
        leave: bool,
    ) -> None:
        super().__init__()
        self.dropout, self.count, self.leave = spec.dropout, spec.num_tokens, leave
        self.shared = (projection,)  # in a tuple: it is the encoder's child, not this one's
        tokens = torch.empty(1, spec.num_tokens, spec.project_dim or width)
        self.tokens = nn.Parameter(nn.init.uniform_(tokens, -bound, bound))

    def around(
        self, forward: Callable[..., Any], x: Tensor, *args: object, **options: object
    ) -> Any:
        """The block on P + N tokens."""
        tokens = self.tokens if self.shared[0] is None else self.shared[0].linear(self.tokens)
        tokens = F.dropout(tokens, self.dropout, self.training).to(x.dtype)
        x = torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)  # (B, P + N, D)
        output = forward(x, *args, **options)
        return without_front(output, self.count) if self.leave else output


def without_front(output: Any, count: int) -> Any:
    """The output of a block, tokens (B, P + N, D) or a tuple that begins with them, without the
    first `count` tokens."""
    if isinstance(output, tuple):
        return (output[0][:, count:], *output[1:])
    return output[:, count:]


class Leave(Insert):
    """Takes the prompts out behind the last block."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def around(
        self, forward: Callable[..., Any], x: Tensor, *args: object, **options: object
    ) -> Any:
        """The block's output without the prompts."""
        return without_front(forward(x, *args, **options), self.count)


def bound_of(root: nn.Module, width: int) -> float:
    """Bound of the uniform start, sqrt(6 / (inputs of a patch + D)) as in the paper."""
    embed = next((m for m in root.modules() if is_conv(m)), None)
    inputs = width if embed is None else embed.weight[0].numel()
    return math.sqrt(6 / (inputs + width))


@apply_peft.register
def apply_prompts(spec: VisualPromptTuning, model: nn.Module) -> None:
    """Freeze the encoder and add prompts to its blocks.

    Raises:
        UserError: an encoder whose blocks do not work on a sequence of tokens.
    """
    root = encoder_of(model)
    units = blocks(root)
    width = sequence_width(root)
    if width is None:
        raise UserError(
            'peft.method = "visual_prompt_tuning" needs blocks on one sequence of tokens (ViT,'
            " DINO, EVA); this encoder has windows, stages, convolutions or tokens whose place"
            " counts; lora or ssf fit every encoder"
        )
    depth = spec.deep_layers or len(units)
    if depth > len(units):
        raise UserError(
            f"peft.deep_layers = {depth}: this encoder has {len(units)} blocks; valid: 1 to"
            f" {len(units)}"
        )
    projection = None if spec.project_dim is None else PromptProjection(spec.project_dim, width)
    bound, device = bound_of(root, width), device_of(root)
    freeze(root)
    entering = units[:depth] if spec.deep else units[:1]
    for unit in entering:
        leave = spec.deep or len(units) == 1
        child = Prompts(spec, projection, width=width, bound=bound, leave=leave)
        insert(unit, child.to(device))
    if not spec.deep and len(units) > 1:
        insert(units[-1], Leave(spec.num_tokens))
    if projection is not None:
        root.shared = projection.to(device)
    for unit in entering if spec.deep else units:
        lengthen_prefix(unit, spec.num_tokens)


def lengthen_prefix(unit: nn.Module, count: int) -> None:
    """Attention that leaves its prefix tokens out of the rotary embedding leaves the prompts
    out."""
    for module in unit.modules():
        prefix = getattr(module, "num_prefix_tokens", None)
        if isinstance(prefix, int):
            vars(module)["num_prefix_tokens"] = prefix + count
