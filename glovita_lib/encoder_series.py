"""Encoders of time series: InceptionTime, a residual network and a transformer over patches; and
encoders of images on series that are folded to images.

B batch, C channels, T time points, N tokens, D width, P time points of a patch.

Inputs are (B, C, T), or (B, C + 1, T) where samples differ in length or lack values: the last row
is 1 where a time point counts. What does not count is 0 before every convolution, as what lies
beyond the ends is, so that a series gives the same alone and padded in a batch.
"""

import math
from dataclasses import replace as dataclass_with
from typing import Any

import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor, nn

from glovita_lib.encoder import (
    Encoder,
    Features,
    build_encoder,
    check_channels,
    lift_encoder,
    preprocess_of,
)
from glovita_lib.encoder_aggregation import aggregate, output_width, reads_pooled, resolve_method
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import ImageEncoder, LibraryEncoder, TimmEncoder
from glovita_lib.spec_lift import Folding
from glovita_lib.spec_series import (
    InceptionTimeEncoder,
    SeriesEncoder,
    SeriesResNetEncoder,
    SeriesTransformerEncoder,
)
from glovita_lib.weights import LoadTarget, load_file

LENGTH = 128  # time points that an encoder is built for where nothing says how many


def divided(x: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Series (B, C, T) and what counts of them, (B, T) bool, where the input says so."""
    if x.shape[1] == channels:
        return x, None
    return x[:, :channels], x[:, channels] > 0


# --------------------------------------------------------------------------------------- layers


def only(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, D, T) with 0 where nothing counts."""
    return x if mask is None else x.masked_fill(~mask[:, None], 0)


class MaskedNorm(nn.BatchNorm1d):
    """Batch normalisation over the time points that count."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, D, T) -> the same, 0 where nothing counts."""
        if mask is None or not self.training:
            return only(super().forward(x), mask)
        weight = mask[:, None].to(torch.float32)  # (B, 1, T)
        values = x.float()
        count = weight.sum().clamp(min=1)
        mean = (values * weight).sum((0, 2)) / count  # (D,)
        centred = values - mean[:, None]
        variance = (centred.square() * weight).sum((0, 2)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.detach(), self.momentum or 0.1)
                self.running_var.lerp_(unbiased.detach(), self.momentum or 0.1)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scaled = centred * torch.rsqrt(variance + self.eps)[:, None]
        return only((scaled * self.weight[:, None] + self.bias[:, None]).to(x.dtype), mask)


def long_conv(conv: nn.Module, x: Tensor, size: int) -> Tensor:
    """A convolution of `size` time points that keeps the length: (B, C, T) -> (B, D, T)."""
    return conv(F.pad(x, ((size - 1) // 2, size // 2)))


class InceptionModule(nn.Module):
    """relu(norm([conv_s(b), conv_s/2(b), conv_s/4(b), conv_1(max_3(x))])) with b a bottleneck of x;
    one that closes a group adds what the group began with, projected, before a last relu."""

    def __init__(self, spec: InceptionTimeEncoder, taken: int, skipped: int | None) -> None:
        super().__init__()
        filters = spec.filters
        narrow = taken
        self.bottleneck: nn.Module | None = None
        if spec.bottleneck and taken > 1:
            narrow = spec.bottleneck
            self.bottleneck = nn.Conv1d(taken, narrow, 1, bias=False)
        self.sizes = [spec.kernel_size // 2**i for i in range(3)]
        self.convs = nn.ModuleList(
            nn.Conv1d(narrow, filters, size, bias=False) for size in self.sizes
        )
        self.after_pool = nn.Conv1d(taken, filters, 1, bias=False)
        self.norm = MaskedNorm(4 * filters)
        self.shortcut: nn.Module | None = None
        if skipped is not None:
            self.shortcut = nn.Conv1d(skipped, 4 * filters, 1, bias=False)
            self.shortcut_norm = MaskedNorm(4 * filters)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, skipped: Tensor | None = None
    ) -> Tensor:
        """(B, C, T) -> (B, 4 filters, T)."""
        narrow = x if self.bottleneck is None else self.bottleneck(x)
        parts = [
            long_conv(conv, narrow, size) for conv, size in zip(self.convs, self.sizes, strict=True)
        ]
        there = x if mask is None else x.masked_fill(~mask[:, None], -torch.inf)
        largest = F.max_pool1d(there, 3, stride=1, padding=1)
        parts.append(self.after_pool(only(largest, mask)))
        y = self.norm(torch.cat(parts, dim=1), mask).relu()
        if self.shortcut is None or skipped is None:
            return y
        return (y + self.shortcut_norm(self.shortcut(skipped), mask)).relu()


class InceptionTime(nn.Module):
    """Inception modules in groups of three."""

    def __init__(self, spec: InceptionTimeEncoder, channels: int) -> None:
        super().__init__()
        self.channels, width = channels, 4 * spec.filters
        self.blocks = nn.ModuleList()
        for i in range(spec.depth):
            taken = width if i else channels
            skipped = (width if i > 2 else channels) if i % 3 == 2 else None
            self.blocks.append(InceptionModule(spec, taken, skipped))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C or C + 1, T) -> (B, D, T)."""
        x, mask = divided(x, self.channels)
        x = skipped = only(x, mask)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, skipped if i % 3 == 2 else None)
            skipped = x if i % 3 == 2 else skipped
        return x


class ResidualBlock(nn.Module):
    """relu(f(x) + norm(conv_1(x))) with f three convolutions, norms and two relus between."""

    def __init__(self, taken: int, given: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        channels = [taken, given, given]
        self.convs = nn.ModuleList(
            nn.Conv1d(c, given, size, bias=False) for c, size in zip(channels, sizes, strict=True)
        )
        self.norms = nn.ModuleList(MaskedNorm(given) for _ in sizes)
        self.shortcut = nn.Conv1d(taken, given, 1, bias=False) if taken != given else None
        self.shortcut_norm = MaskedNorm(given)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, T) -> (B, D, T)."""
        y = x
        for i, (conv, norm, size) in enumerate(
            zip(self.convs, self.norms, self.sizes, strict=True)
        ):
            y = norm(long_conv(conv, y, size), mask)
            y = y.relu() if i < 2 else y
        skip = x if self.shortcut is None else self.shortcut(x)
        return (y + self.shortcut_norm(skip, mask)).relu()


class SeriesResNet(nn.Module):
    """A row of residual blocks."""

    def __init__(self, spec: SeriesResNetEncoder, channels: int) -> None:
        super().__init__()
        self.channels = channels
        taken = [channels, *spec.features[:-1]]
        self.blocks = nn.ModuleList(
            ResidualBlock(c, d, spec.kernel_sizes)
            for c, d in zip(taken, spec.features, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C or C + 1, T) -> (B, D, T)."""
        x, mask = divided(x, self.channels)
        x = only(x, mask)
        for block in self.blocks:
            x = block(x, mask)
        return x


# --------------------------------------------------------------------------------- transformer


def with_prompts(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of tokens (B, N, D) where some were put in front, which count."""
    return F.pad(mask, (x.shape[1] - mask.shape[1], 0), value=True)


class Attention(nn.Module):
    """Self-attention over the tokens that count."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None
        if mask is not None:
            seen = with_prompts(mask, x)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.drop(self.proj(y.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """W2 gelu(W1 x), of the tokens that count."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> the same, 0 where nothing counts."""
        y = self.drop(self.fc2(F.gelu(self.fc1(x))))
        if mask is None:
            return y
        return y.masked_fill(~with_prompts(mask, x)[..., None], 0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: SeriesTransformerEncoder) -> None:
        super().__init__()
        width = spec.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, spec.heads, spec.dropout)
        self.mlp = Mlp(width, round(width * spec.mlp_ratio), spec.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> the same."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x), mask)


class SeriesTransformer(nn.Module):
    """Patches, sines of their places, blocks and a norm."""

    def __init__(self, spec: SeriesTransformerEncoder, channels: int) -> None:
        super().__init__()
        self.channels, self.patch, self.width = channels, spec.patch, spec.width
        self.patch_embed = nn.Conv1d(channels, spec.width, spec.patch, stride=spec.patch)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C or C + 1, T) -> tokens (B, N, D)."""
        x, mask = divided(x, self.channels)
        x = F.pad(only(x, mask), (0, -x.shape[2] % self.patch))
        tokens = self.patch_embed(x).transpose(1, 2)  # (B, N, D)
        tokens = tokens + self.places(tokens.shape[1], x.device).to(tokens.dtype)
        there = self.token_mask(mask)
        for block in self.blocks:
            tokens = block(tokens, there)
        return self.norm(tokens)

    def token_mask(self, mask: Tensor | None) -> Tensor | None:
        """Which patches hold a time point that counts, (B, N) bool."""
        if mask is None:
            return None
        padded = F.pad(mask, (0, -mask.shape[1] % self.patch))
        return padded.unflatten(1, (-1, self.patch)).any(2)

    def places(self, count: int, device: torch.device) -> Tensor:
        """Sines and cosines (N, D) of places at frequencies from 1 to 1 / 10,000."""
        half = self.width // 2
        exponent = torch.arange(half, device=device, dtype=torch.float32) / half
        angle = torch.arange(count, device=device)[:, None] * torch.exp(
            -math.log(10_000.0) * exponent
        )
        return torch.cat([angle.sin(), angle.cos()], dim=1)


# ------------------------------------------------------------------------------------- encoders


class SeriesTrunk(Encoder):
    """A network of series whose output is a map (B, D, T), or tokens of patches (B, N, D)."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Series (B, C or C + 1, T) -> map or tokens."""
        return self.net(x)

    @property
    def is_map(self) -> bool:
        """Whether the network gives a map."""
        return not isinstance(self.net, SeriesTransformer)

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Map or tokens -> (B, N, D)."""
        return raw.transpose(1, 2) if self.is_map else raw

    def with_patches(self, raw: Tensor, patches: Tensor) -> Tensor:
        """Raw features with other tokens."""
        return patches.transpose(1, 2) if self.is_map else patches

    def pool(self, raw: Tensor) -> Tensor:
        """Mean over all tokens, (B, D); `forward` leaves out those that do not count."""
        return self.to_tokens(raw).mean(1)

    def grid(self, raw: Tensor, size: torch.Size) -> tuple[int, ...]:
        """Number of tokens."""
        return (self.to_tokens(raw).shape[1],)

    def patch_sides(
        self, patches: int, sizes: list[tuple[int, ...]], image: tuple[int, ...]
    ) -> tuple[float, ...]:
        """Time points of a patch."""
        return (float(getattr(self.net, "patch", 1)),)

    def token_mask(self, x: Tensor) -> Tensor | None:
        """Which tokens count, (B, N) bool; None: all."""
        _, mask = divided(x, int(vars(self.net)["channels"]))
        return self.net.token_mask(mask) if isinstance(self.net, SeriesTransformer) else mask

    def forward(self, x: Tensor, *, pooled: bool = True) -> Features:
        """Features of series, with the mask of their tokens."""
        features = super().forward(x, pooled=pooled)
        features.mask = self.token_mask(x)
        if features.pooled is not None and features.mask is not None:
            features.pooled = aggregate(features, "avg")
        return features


def build_series(
    spec: SeriesEncoder,
    net: nn.Module,
    *,
    channels: int,
    size: tuple[int, ...] | None,
    load_weights: bool,
) -> Encoder:
    """An encoder around a network, with the weights of a file where the spec names one."""
    encoder = SeriesTrunk(
        net,
        name=str(spec.__struct_config__.tag),
        n_prefix=0,
        has_cls=False,
        channels_last=False,
        input_shape=(1, channels, *(size or (LENGTH,))),
    )
    which = "time point" if encoder.is_map else f"patch of {net.patch} time points"
    encoder.coords_text = f"time: {which} of the prepared series, from 0"
    encoder.load_target = LoadTarget(net)
    if load_weights and spec.weights is not None:
        note = load_file(encoder.load_target, spec.weights, key=spec.weights_key)
        encoder.notes += () if note is None else (note,)
    return encoder


@build_encoder.register
def _(spec: InceptionTimeEncoder, *, channels: int, **options: Any) -> Encoder:
    check_channels(spec, channels)
    return build_series(spec, InceptionTime(spec, channels), channels=channels, **options)


@build_encoder.register
def _(spec: SeriesResNetEncoder, *, channels: int, **options: Any) -> Encoder:
    check_channels(spec, channels)
    return build_series(spec, SeriesResNet(spec, channels), channels=channels, **options)


@build_encoder.register
def _(spec: SeriesTransformerEncoder, *, channels: int, **options: Any) -> Encoder:
    check_channels(spec, channels)
    return build_series(spec, SeriesTransformer(spec, channels), channels=channels, **options)


# -------------------------------------------------------------------------------------- folding
#
# Each channel of a series becomes an image, whose vectors stand side by side: TiViT, "Time series
# representations for classification lie hidden in pretrained vision transformers", arXiv
# 2506.08641.

TINY = 1e-5  # added to the spreads that values are divided by


class FoldedEncoder(Encoder):
    """An encoder of images that reads the channels of a series as images. Tokens are the patches of
    all channels, the vector of a sample those of its channels side by side.

    `net` is the network of the encoder of images under its own names, so that PEFT methods and
    weights are those of images.
    """

    image: tuple[Encoder]
    """The encoder of images; in a tuple, as a child would double the names of `net`."""
    mean: Tensor  # (3, 1, 1)
    std: Tensor

    def __init__(
        self, inner: Encoder, spec: Folding, channels: int, side: int, scale: tuple[Any, Any]
    ) -> None:
        self.image, self.spec, self.channels, self.side = (inner,), spec, channels, side
        self.method = fold_method(spec, inner)
        super().__init__(
            inner.net,
            name=inner.name,
            n_prefix=0,
            has_cls=False,
            channels_last=False,
            input_shape=(1, channels, LENGTH),
        )
        self.load_target, self.notes = inner.load_target, inner.notes
        self.coords_text = "channel,row,column: channel, and place in the grid of its image, from 0"
        self.no_layers = (
            "those of the images that series become: leave it out; model.encoder.folding.layer"
            " keeps the first blocks alone, whose output is read then"
        )
        for name, values in zip(("mean", "std"), scale, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def inspect(self, input_shape: tuple[int, ...]) -> None:
        """Facts follow from those of the encoder of images."""
        (inner,) = self.image
        self.layout, self.has_tokens, self.has_patches = 3, inner.has_patches, inner.has_patches
        self.has_few_tokens, self.patch = False, inner.patch
        self.pooling, self.plain = "pooled", False
        self.width = inner.width
        self.pooled_width = self.channels * output_width(inner, self.method)
        self.adopt_layers(inner)
        if not reads_pooled(self.method, inner):
            for name in inner.pooling_parameters:
                inner.net.get_parameter(name).requires_grad_(False)

    def taken(self, size: tuple[int, ...]) -> dict[str, Any]:
        """Beside the rest how a series of this length, of those of different ones the longest, is
        folded."""
        (inner,) = self.image
        folding = {
            "patch": self.row_length(size[0]),
            "size": self.side,
            "layer": len(inner.block_names),
            "aggregation": self.method,
        }
        return {**inner.taken(inner.input_shape[2:]), "folding": folding}

    def row_length(self, length: int) -> int:
        """Time points of a row of a series."""
        return self.spec.patch or max(2, math.isqrt(length))

    def forward_features(self, x: Tensor) -> Features:
        """Series (B, C or C + 1, T) -> features of the images of their channels (B C, ...)."""
        (inner,) = self.image
        return inner(self.images(x), pooled=reads_pooled(self.method, inner))

    def images(self, x: Tensor) -> Tensor:
        """Series -> images (B C, 3, S, S) as the encoder of images takes them."""
        x, mask = divided(x, self.channels)
        if mask is None:
            rows = self.rows(x.flatten(0, 1))
        else:  # of one length each
            lengths = [max(2, int(own.nonzero()[-1]) + 1) if own.any() else 2 for own in mask]
            rows = torch.cat([self.rows(one[:, :n]) for one, n in zip(x, lengths, strict=True)])
        return ((rows[:, None] - self.mean) / self.std).to(x.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """Series (n, T) of one length -> values 0 to 1 of images (n, S, S). Where rows a step apart
        do not end with the series, its first value is repeated before it, so that they do."""
        x = x.float()
        quartiles = x.new_tensor([0.25, 0.5, 0.75])
        low, middle, high = torch.quantile(x, quartiles, dim=1)[:, :, None]
        x = (x - middle) / (high - low + TINY)
        patch, length = self.row_length(x.shape[1]), x.shape[1]
        step = max(1, int(patch * self.spec.stride))
        lacking = patch - length if length < patch else (patch - length) % step
        x = F.pad(x[:, None], (lacking, 0), mode="replicate")[:, 0]
        folded = x.unfold(1, patch, step)  # (n, rows, patch)
        if self.spec.stride == 1:  # stand upright in the published code
            folded = folded.mT
        least, most = folded.amin((1, 2), keepdim=True), folded.amax((1, 2), keepdim=True)
        folded = ((folded - least) / (most - least + TINY)) ** self.spec.contrast
        return F.interpolate(folded[:, None], (self.side, self.side), mode="nearest")[:, 0]

    def forward(self, x: Tensor, *, pooled: bool = True) -> Features:
        """Features of series."""
        inside = self.forward_features(x)
        vectors = aggregate(inside, self.method).unflatten(0, (len(x), -1)).flatten(1)
        if inside.tokens is None:
            return Features(None, None, 0, False, vectors, "pooled")
        tokens = inside.patches.unflatten(0, (len(x), -1)).flatten(1, 2)  # (B, C N, D)
        grid = (self.channels, *(inside.grid or (1, inside.patches.shape[1])))
        return Features(tokens, grid, 0, False, vectors, "pooled")

    def pool(self, raw: Features) -> Tensor:
        """Vectors of the images, (B C, D)."""
        return aggregate(raw, self.method)


def fold_method(spec: Folding, inner: Encoder) -> str:
    """How the tokens of an image become its vector: of inner layers the mean, where nothing says
    otherwise, as class tokens are made by the last.

    Raises:
        UserError: the encoder of images cannot serve the method asked for.
    """
    asked = spec.aggregation
    if asked is None and spec.layer is not None and inner.has_patches:
        asked = "avg"
    try:
        return resolve_method(asked, inner)
    except UserError as error:
        key = "model.feature_aggregation_method"
        raise UserError(str(error).replace(key, "model.encoder.folding.aggregation")) from None


def keep_blocks(inner: Encoder, count: int) -> None:
    """Take the blocks behind the first ones off a network whose blocks keep the shape of their
    input. Files of weights may have them all the same, which are left out.

    Raises:
        UserError: there are not so many, or they are no row of such blocks.
    """
    names, key = inner.block_names, "model.encoder.folding.layer"
    if count > len(names):
        raise UserError(f"{key} = {count}: encoder {inner.name} has {len(names)} blocks")
    parents = {name.rpartition(".")[0] for name in names}
    row = inner.net.get_submodule(next(iter(parents)))
    if len(parents) > 1 or not isinstance(row, nn.ModuleList | nn.Sequential):
        raise UserError(
            f"{key}: the blocks of {inner.name} are no row that keeps its width, as those of a"
            " transformer are: leave it out"
        )
    for name in names[count:]:  # `del row[count:]` gives those of a Sequential other names
        delattr(row, name.rpartition(".")[2])
    inner.block_names, target = names[:count], inner.load_target
    inner.load_target = dataclass_with(target, classifier=(*target.classifier, *names[count:]))


def first_blocks(spec: ImageEncoder, count: int, *, load_weights: bool, **options: Any) -> Encoder:
    """An encoder of images with its first blocks alone. A file of weights may be of the whole
    network, or of one that had lost the blocks behind these, as a run with such an encoder writes
    it.

    Raises:
        UserError: see build_encoder and `keep_blocks`; of a file the error about the whole network.
    """
    try:
        inner = build_encoder(spec, load_weights=load_weights, **options)
    except UserError as of_whole:
        if not (load_weights and isinstance(spec, LibraryEncoder) and spec.weights):
            raise
        try:
            inner = build_encoder(spec, load_weights=False, **options)
            keep_blocks(inner, count)
            load_cut(inner, spec)
        except UserError:
            raise of_whole from None
    else:
        keep_blocks(inner, count)
    return inner


def load_cut(inner: Encoder, spec: LibraryEncoder) -> None:
    """Load the file of a section into its network after blocks were taken off."""
    assert spec.weights is not None
    by_order = isinstance(spec, TimmEncoder) and spec.weights_order
    note = load_file(inner.load_target, spec.weights, key=spec.weights_key, by_order=by_order)
    inner.notes += () if note is None else (note,)


@lift_encoder.register
def _(
    lift: Folding,
    spec: ImageEncoder,
    *,
    channels: int,
    size: tuple[int, ...] | None,
    load_weights: bool,
) -> Encoder:
    stated = spec.stated_channels or 3
    images = replace(spec, lift=None, folding=Folding(), input_channels=None)
    preprocess = preprocess_of(images, channels=stated)
    side = lift.size or preprocess.image_size or 224
    options: dict[str, Any] = {"channels": stated, "size": (side, side)}
    if lift.layer is None:
        inner = build_encoder(images, load_weights=load_weights, **options)
    else:
        inner = first_blocks(images, lift.layer, load_weights=load_weights, **options)
    return FoldedEncoder(inner, lift, channels, side, (preprocess.mean, preprocess.std))
