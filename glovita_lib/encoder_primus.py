"""Primus, the transformer of volumes.

Modules have the names of dynamic-network-architectures, so that weights trained there load. B
batch, C channels, X Y Z voxels, N tokens of patches, R registers, D width, D_h width of a head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.encoder import Encoder, build_encoder, check_channels, patch_size_of
from glovita_lib.encoder_volume import (
    Origin,
    Size,
    VolumeTrunk,
    initialise,
    origin_of,
    spread_channels,
)
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import ArrayEncoder, PrimusEncoder
from glovita_lib.weights import LoadTarget, load_file

# ------------------------------------------------------------------------------- the network
#
# Wald et al. 2025, "Primus: Enforcing attention usage for 3D medical image segmentation": EVA-02
# blocks (timm's) over patches of voxels. The channels of a head are rotated by the place of the
# token, a third of them by that along each axis.

WIDTHS = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
LAYER_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class PrimusShape:
    """What a Primus is built from."""

    width: int
    depth: int
    heads: int
    patch: tuple[int, int, int]
    """Voxels of a token."""
    drop_path: float
    """Probability of skipping the last block, from 0 on in even steps."""
    patch_drop: float = 0.0
    """Share of the tokens that training leaves out."""
    registers: int = 0
    layer_scale: float | None = LAYER_SCALE
    norm_attention: bool = True
    """Whether attention norms what it hands to its output projection."""
    absolute: bool = True
    """Whether there is a learned position embedding."""
    rotary: bool = True

    @property
    def rotated(self) -> int:
        """Channels of a head that two axes rotate: two thirds, the dim of timm, which knows two."""
        return self.width // self.heads * 2 // 3

    def problem(self) -> str | None:
        """Why no such network exists."""
        if self.width % self.heads:
            return f"{self.width} channels, which {self.heads} heads cannot share"
        if self.rotary and self.width // self.heads % 6:
            return (
                f"{self.width // self.heads} channels a head, of which rotary position embeddings"
                " need a multiple of 6"
            )
        return None


class PatchEmbed(nn.Module):
    """Voxels of a patch -> its token."""

    def __init__(self, channels: int, shape: PrimusShape) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, shape.width, shape.patch, shape.patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, D, *grid)."""
        return self.proj(x)


class Eva(nn.Module):
    """Position embeddings, blocks and final norm."""

    rope: Tensor  # (N, 2 D_h)

    def __init__(self, shape: PrimusShape, grid: Size) -> None:
        super().__init__()
        from timm.layers import trunc_normal_
        from timm.models.eva import EvaBlock

        self.grid, self.registers, self.rotated = grid, shape.registers, shape.rotated
        self.rotary = shape.rotary
        tokens = shape.registers + math.prod(grid)
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, tokens, shape.width)) if shape.absolute else None
        )
        self.patch_drop = shape.patch_drop
        rates = np.linspace(0, shape.drop_path, shape.depth)
        self.blocks = nn.ModuleList(
            EvaBlock(
                shape.width,
                shape.heads,
                qkv_fused=False,
                mlp_ratio=8 / 3,
                swiglu_mlp=True,
                scale_mlp=True,
                scale_attn_inner=shape.norm_attention,
                num_prefix_tokens=shape.registers,
                drop_path=float(rate),
                init_values=shape.layer_scale,
                norm_layer=nn.LayerNorm,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(shape.width)
        self.apply(initialise_linear)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        with torch.no_grad():
            for depth, block in enumerate(self.blocks, 1):  # deeper blocks begin smaller
                for name in ("attn.proj", "mlp.fc2"):
                    block.get_parameter(f"{name}.weight").div_(math.sqrt(2 * depth))
        if self.rotary:
            self.register_buffer("rope", rotation(grid, self.rotated), persistent=False)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """Tokens (B, R + N, D) of a grid -> final-normed tokens, fewer where patches are
        dropped."""
        if self.pos_embed is not None:
            x = x + resample(self.pos_embed, self.grid, grid)
        rope = None
        if self.rotary:
            same = grid == self.grid
            rope = self.rope if same else rotation(grid, self.rotated, x.device)
        if self.training and self.patch_drop:
            kept = self.kept(x)  # (B, kept)
            patches = x[:, self.registers :].gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, : self.registers], patches], dim=1)
            rope = None if rope is None else rope[kept].unsqueeze(1)  # (B, 1, kept, 2 D_h)
        for block in self.blocks:
            x = block(x, rope=rope)
        return self.norm(x)

    def kept(self, x: Tensor) -> Tensor:
        """Random patches that training keeps, for each sample its own, (B, kept)."""
        patches = x.shape[1] - self.registers
        count = max(1, int(patches * (1 - self.patch_drop)))
        return torch.randn(len(x), patches, device=x.device).argsort(dim=1)[:, :count]


def initialise_linear(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, cut at 2, and no bias."""
    from timm.layers import trunc_normal_

    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rotation(grid: Size, rotated: int, device: torch.device | None = None) -> Tensor:
    """Sine and cosine by which the places of a grid rotate the channels of a head, (N, 2 D_h)."""
    from timm.layers import build_rotary_pos_embed

    sine, cosine = build_rotary_pos_embed(
        list(grid), dim=rotated, in_pixels=False, ref_feat_shape=list(grid), device=device
    )
    return torch.cat([sine, cosine], dim=-1)


def resample(positions: Tensor, old: Size, new: Size) -> Tensor:
    """Position embedding (1, R + N, D) of a grid for another one, trilinear; registers keep
    theirs."""
    if old == new:
        return positions
    prefix = positions.shape[1] - math.prod(old)
    grid = positions[:, prefix:].mT.unflatten(2, old).float()  # (1, D, *old)
    fitted = F.interpolate(grid, new, mode="trilinear", align_corners=False)
    return torch.cat([positions[:, :prefix], fitted.flatten(2).mT.to(positions.dtype)], dim=1)


class PrimusNetwork(nn.Module):
    """Patch embedding and transformer: inputs (B, C, X, Y, Z) -> tokens (B, R + N, D)."""

    def __init__(self, shape: PrimusShape, channels: int, grid: Size) -> None:
        super().__init__()
        self.down_projection = PatchEmbed(channels, shape)
        self.eva = Eva(shape, grid)
        self.down_projection.apply(initialise)
        if shape.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
            nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Final-normed tokens, registers first."""
        patches = self.down_projection(x)  # (B, D, *grid)
        tokens = patches.flatten(2).mT  # (B, N, D)
        if hasattr(self, "register_tokens"):
            first = self.register_tokens.expand(len(x), -1, -1)  # (B, R, D)
            tokens = torch.cat([first, tokens], dim=1)
        return self.eva(tokens, tuple(patches.shape[2:]))


class PrimusTrunk(VolumeTrunk):
    """A Primus: tokens over a grid of patches, averaged; inputs of any whole number of patches."""

    def pool(self, raw: Tensor) -> Tensor:
        """Tokens -> the mean of those of patches, (B, D)."""
        return raw[:, self.n_prefix :].mean(1)

    def grid(self, raw: Tensor, size: torch.Size) -> Size | None:
        """Patches along each axis, of the network as the size; None where some are dropped."""
        projection = self.net.get_submodule("down_projection.proj")
        assert isinstance(projection, nn.Conv3d), "it is what `PatchEmbed` makes of it"
        grid = grid_of(tuple(size), projection.kernel_size)
        return grid if math.prod(grid) == raw.shape[1] - self.n_prefix else None


def build_primus(
    shape: PrimusShape,
    spec: ArrayEncoder,
    *,
    name: str,
    channels: int,
    size: Size,
    stated: Size | None = None,
    told: Sequence[Size] = (),
) -> PrimusTrunk:
    """A Primus with initial weights.

    Args:
        shape: of the network, in the order of its axes.
        spec: says which order that is.
        size: voxels of the input along X, Y and Z.
        stated: voxels of the input that weights were trained with, as the spec says, in the order
            of the network's axes.
        told: the same, as files say, the likeliest first.

    Raises:
        UserError: the input is no whole number of patches.
    """
    token = spec.turned(shape.patch)
    if any(side % step for side, step in zip(size, token, strict=True)):
        fitting = [max(1, round(s / p)) * p for s, p in zip(size, token, strict=True)]
        raise UserError(
            f"data.augmentation.patch_size: {name} takes whole numbers of patches of"
            f" {' x '.join(map(str, token))} voxels, not {' x '.join(map(str, size))};"
            f" nearest {' x '.join(map(str, fitting))}"
        )
    grid = grid_of(spec.turned(size), shape.patch)
    encoder = PrimusTrunk(
        PrimusNetwork(shape, channels, grid),
        order=spec.array_order,
        name=name,
        n_prefix=shape.registers,
        has_cls=False,
        channels_last=False,
        input_shape=(1, channels, *size),
    )
    first = "down_projection.proj"
    trained = Trained(
        None if stated is None else grid_of(stated, shape.patch),
        [grid_of(patch, shape.patch) for patch in told],
    )
    taken: dict[str, Any] = {}
    loading = partial(load_primus, shape=shape, grid=grid, trained=trained, taken=taken)
    encoder.load_target = LoadTarget(encoder.net, loading, first_conv=(first,), taken=taken)
    return encoder


def grid_of(size: Size, patch: Size) -> Size:
    """Patches along each axis."""
    return tuple(side // step for side, step in zip(size, patch, strict=True))


@dataclass(frozen=True, slots=True)
class Trained:
    """Grids of patches that weights may have been trained with."""

    stated: Size | None
    """As the spec says."""
    told: list[Size]
    """As files say, the likeliest first."""

    def grid(self, patches: int, grid: Size) -> Size:
        """The grid of a position embedding of so many patches: that which is stated or told, else
        a cube.

        Args:
            grid: of the input; where it has as many patches and is no cube, nothing says whether
                the embedding is of it, of the same sides in another order, or of a cube.

        Raises:
            ValueError: it is not known.
        """
        asked = "name the voxels it was trained with in model.encoder.weights_shape"
        of = f"its position embedding is of {patches} patches"
        if self.stated is not None and math.prod(self.stated) != patches:
            count = math.prod(self.stated)
            raise ValueError(f"{of}, and model.encoder.weights_shape has {count}: leave it out")
        told = [self.stated] if self.stated is not None else self.told
        cube = (round(patches ** (1 / 3)),) * 3
        is_cube = math.prod(cube) == patches
        if found := [old for old in told if math.prod(old) == patches]:
            return found[0]
        if math.prod(grid) == patches and grid != cube:
            or_cube = f", or of a cube of {cube[0]}" if is_cube else ""
            raise ValueError(
                f"{of}, which may be of the input's {' x '.join(map(str, grid))}, in this or"
                f" another order{or_cube}: {asked}"
            )
        if not is_cube:
            raise ValueError(f"{of}, which are no cube: {asked}")
        return cube


BESIDE = ("mask_token", "eva.cls_token", "up_projection.")
"""What files hold beside the encoder: read in pretraining or segmentation alone."""


def load_primus(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    shape: PrimusShape,
    grid: Size,
    trained: Trained,
    taken: dict[str, Any],
) -> None:
    """Load tensors under the names of dynamic-network-architectures into a Primus.

    Args:
        shape, grid: of the network.
        trained: what is known of the grid of the tensors.
        taken: gets weights_shape, the voxels that the position embedding is of.

    Raises:
        ValueError: see Trained.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(BESIDE)}
    named = spread_channels(own, net, "down_projection.proj")
    key = "eva.pos_embed"
    if key in named and key in net.state_dict():
        positions = named[key][:, 1:] if "eva.cls_token" in tensors else named[key]
        old = trained.grid(positions.shape[1] - shape.registers, grid)
        named[key] = resample(positions, old, grid)
        taken["weights_shape"] = [n * side for n, side in zip(old, shape.patch, strict=True)]
    net.load_state_dict(named)


def shape_of(spec: PrimusEncoder) -> PrimusShape:
    """What the Primus of a Struct is built from."""
    width, depth, heads = WIDTHS[spec.variant]
    return PrimusShape(
        width,
        depth,
        heads,
        spec.patch_embed_size,
        drop_path=spec.drop_path_rate,
        patch_drop=spec.patch_drop_rate,
    )


def input_size(asked: Size | None, size: Size | None, default: Size) -> Size:
    """Voxels of the input, where the encoder's section may state them too.

    Raises:
        UserError: the data say otherwise.
    """
    if asked is not None and size is not None and asked != size:
        raise UserError(
            f"model.encoder.input_shape = {list(asked)}: the data come in {list(size)}"
            " (data.augmentation.patch_size); leave one of them out"
        )
    return size or asked or default


@patch_size_of.register
def _(spec: PrimusEncoder) -> Size | None:
    return spec.input_shape


@build_encoder.register
def _(spec: PrimusEncoder, *, channels: int, size: Size | None, load_weights: bool) -> Encoder:
    check_channels(spec, channels)
    default = spec.turned(tuple(16 * side for side in spec.patch_embed_size))
    origin = origin_of(spec.weights) if load_weights and spec.weights else Origin()
    encoder = build_primus(
        shape_of(spec),
        spec,
        name=f"primus {spec.variant}",
        channels=channels,
        size=input_size(spec.input_shape, size, default),
        stated=spec.weights_shape,
        told=() if origin.shape is None else (origin.shape,),
    )
    if load_weights and spec.weights is not None:
        note = load_file(encoder.load_target, spec.weights, key=spec.weights_key)
        encoder.notes += () if note is None else (note,)
        encoder.notes += origin.order_notes(spec.weights, spec)
    return encoder
