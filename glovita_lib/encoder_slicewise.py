"""Encoders on larger samples than their networks take: of images slice by slice, or frame by frame,
of volumes window by window.

B batch, C channels, X Y Z voxels, N voxels along the axis of the slices, S slices of a volume, H W
pixels of a slice, D width. A clip (T, H, W) is a volume here whose slices along the first axis are
its frames.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recomputed

from glovita_lib.augment_patch import Volumes, WindowGrid
from glovita_lib.encoder import (
    Encoder,
    Features,
    build_encoder,
    check_channels,
    lift_encoder,
    patch_size_of,
)
from glovita_lib.encoder_aggregation import aggregate, output_width, reads_pooled, resolve_method
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import ImageEncoder
from glovita_lib.spec_lift import AXES, Axis, BaseEncoder, Inflation, Slices, Windows

if TYPE_CHECKING:
    from glovita_lib.bags import Bags  # who reads volumes need not load it

Size = tuple[int, ...]

# ------------------------------------------------------------------------------------- parts
#
# The vectors of the parts of a volume are its tokens, so that heads of bags, extraction and
# attention maps take them for instances.


class PartwiseEncoder(Encoder):
    """An encoder that reads the parts of a volume, each of which becomes a token.

    `net` is the network of the encoder of parts under its own names, so that PEFT methods, weights
    and adapters are those of it.
    """

    at_once: int
    """Parts that pass an encoder that does not train, unless the spec says."""
    inner: tuple[Encoder]
    """The encoder of parts; in a tuple, as a child would double the names of `net`."""

    def __init__(self, inner: Encoder, spec: Slices | Windows, key: str, input_shape: Size) -> None:
        self.inner, self.chunk = (inner,), spec.chunk
        self.method = part_method(spec, inner, key)
        """How the tokens of a part become its vector."""
        super().__init__(
            inner.net,
            name=inner.name,
            n_prefix=0,
            has_cls=False,
            channels_last=False,
            input_shape=input_shape,
        )
        self.load_target, self.notes, self.key = inner.load_target, inner.notes, key
        self.no_layers = f"those of {key}, not of whole volumes: leave it out"

    @property
    def of_parts(self) -> Encoder:
        return self.inner[0]

    def inspect(self, input_shape: Size) -> None:
        """Facts follow from those of the encoder of parts; layers behind a pooling that its parts
        do not pass are frozen."""
        (inner,) = self.inner
        self.layout, self.has_tokens, self.has_patches = 3, True, True
        self.has_few_tokens, self.patch = True, inner.patch
        self.pooling, self.plain = "avg", True
        self.width = self.pooled_width = output_width(inner, self.method)
        self.adopt_layers(inner)
        if not reads_pooled(self.method, inner):
            for name in inner.pooling_parameters:
                inner.net.get_parameter(name).requires_grad_(False)

    def encoded(self, count: int, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Vectors (count, D) of parts, a chunk at a time.

        Args:
            cut: numbers (n,) of parts -> inputs (n, C, ...) of the encoder of parts.
        """
        numbers = torch.arange(count)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.net.parameters())
        chunk = self.chunk or (count if trains else self.at_once)
        vectors = []
        for part in numbers.split(chunk):
            inputs = cut(part)
            if trains and chunk < count:
                contexts = partial(recomputing, self.net)
                vectors.append(
                    recomputed(self.vectors, inputs, use_reentrant=False, context_fn=contexts)
                )
            else:
                vectors.append(self.vectors(inputs))
        return torch.cat(vectors)

    def taken(self, size: Size) -> dict[str, Any]:
        """What is taken of the parts, under their key, beside what the encoder of parts takes."""
        (inner,) = self.inner
        chunks = {"training": self.chunk or "all", "evaluation": self.chunk or self.at_once}
        parts = {"aggregation": self.method, "chunk": chunks, **self.parts_of(size)}
        return {**inner.taken(inner.input_shape[2:]), self.key: parts}

    def parts_of(self, size: Size) -> dict[str, Any]:
        """Which parts a sample of this size is read in."""
        raise NotImplementedError

    def vectors(self, inputs: Tensor) -> Tensor:
        """One vector of each part, (n, D)."""
        (inner,) = self.inner
        features = inner(inputs, pooled=reads_pooled(self.method, inner))
        return aggregate(features, self.method)

    def pool(self, raw: Tensor) -> Tensor:
        """Mean of the vectors of the parts, (B, D)."""
        return raw.mean(1)


def part_method(spec: Slices | Windows, inner: Encoder, key: str) -> str:
    """How the tokens of a part become its vector.

    Raises:
        UserError: the encoder of parts cannot serve the method asked for.
    """
    try:
        return resolve_method(spec.aggregation, inner)
    except UserError as error:
        asked = "model.feature_aggregation_method"
        raise UserError(str(error).replace(asked, f"model.encoder.{key}.aggregation")) from None


def recomputing(net: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a chunk's forward pass and of its repetition, in which batch norms in training
    leave their running statistics alone: these have seen the chunk."""
    return nullcontext(), keeping_statistics(net)


@contextmanager
def keeping_statistics(net: nn.Module) -> Iterator[None]:
    """Inside, batch norms update neither running statistics nor their counters."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training]
    was = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, was, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


# ------------------------------------------------------------------------------------ slices

FRAMES = "frames"  # the stage that the vectors of all slices are


class SlicewiseEncoder(PartwiseEncoder):
    """An encoder of images that reads the slices of a volume."""

    at_once = 64

    def __init__(self, inner: Encoder, spec: Slices, input_shape: Size) -> None:
        self.axis = AXES[spec.axis]
        self.spec = spec
        super().__init__(inner, spec, "slices", input_shape)
        self.coords_text = (
            "slice: voxel along the axis that slices lie across, of the encoder's input, from 0"
        )
        if spec.axis == "t":
            self.coords_text = "frame: of the clip, from 0"
            self.no_layers = "those of frames, not of whole clips: leave it out"
        self.stage_names = (FRAMES,)

    def forward(self, x: "Tensor | Bags", *, pooled: bool = True) -> Any:
        """Features of volumes (B, C, X, Y, Z); bags of vectors, encoded before, as they are."""
        return super().forward(x, pooled=pooled) if isinstance(x, Tensor) else x

    def features_of(self, raw: Tensor, size: torch.Size, *, pooled: bool) -> Features:
        """Tokens (B, S, D), the vectors of the slices, at `places`, voxels along the axis."""
        features = super().features_of(raw, size, pooled=pooled)
        features.places = (self.places(size[self.axis]).numpy()[:, None],) * len(raw)
        if self.returned:
            along = raw.mT[..., None, None]  # (B, D, S, 1, 1)
            features.intermediates = {FRAMES: along.movedim(2, 2 + self.axis)}
        return features

    @contextmanager
    def taking_stages(self) -> Iterator[dict[str, Tensor]]:
        """Nothing to take: the stage is the output."""
        yield {}

    def stage(self, name: str) -> nn.Module:
        """The network, whose outputs for all slices are the only stage."""
        if name != FRAMES:
            raise UserError(
                f"{self.name} in slices has no stage {name!r}; its only one is {FRAMES!r}"
            )
        return self.net

    def parts_of(self, size: Size) -> dict[str, Any]:
        """Axis and, of this size, places of the slices and their sides."""
        sides = self.spec.size or [s for number, s in enumerate(size) if number != self.axis]
        places = self.places(size[self.axis]).tolist()
        return {"axis": self.spec.axis, "places": places, "size": list(sides)}

    def places(self, voxels: int) -> Tensor:
        """Voxels (S,) along the axis at which the slices of a volume lie."""
        stride, count = self.spec.stride, self.spec.count
        if stride is None:
            count = min(count or voxels, voxels)
            return (2 * torch.arange(count) + 1) * voxels // (2 * count)
        found = 1 + (voxels - 1) // stride
        count = min(count or found, found)
        first = (voxels - 1 - (count - 1) * stride) // 2
        return first + stride * torch.arange(count)

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) -> vectors of their slices (B, S, D)."""
        volumes = x.movedim(2 + self.axis, 1)  # (B, N, C, H, W)
        places = self.places(volumes.shape[1])  # (S,)

        def cut(part: Tensor) -> Tensor:
            return self.images(volumes, part // len(places), places[part % len(places)])

        vectors = self.encoded(len(x) * len(places), cut)
        return vectors.unflatten(0, (len(x), len(places)))

    def images(self, volumes: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Slices of volumes (B, N, C, H, W) at places (n,) of the volumes rows (n,), as the encoder
        of images takes them, (n, C, H', W') or (n, 3C, H', W')."""
        rows, places = (each.to(volumes.device, non_blocking=True) for each in (rows, places))
        if self.spec.adjacent:
            last = volumes.shape[1] - 1
            near = torch.stack([places - 1, places, places + 1], 1).clamp(0, last)  # (n, 3)
            images = volumes[rows[:, None], near].transpose(1, 2).flatten(1, 2)  # (n, 3C, H, W)
        else:
            images = volumes[rows, places]  # (n, C, H, W)
        if self.spec.size is None or images.shape[2:] == self.spec.size:
            return images
        return F.interpolate(images, self.spec.size, mode="bilinear", antialias=True)

    def grid(self, raw: Tensor, size: torch.Size) -> Size:
        """Number of slices."""
        return (raw.shape[1],)


@lift_encoder.register
def _(
    lift: Slices, spec: ImageEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    taken = 3 * channels if lift.adjacent else channels
    sides = None if size is None else across(size, lift.axis)
    inner = build_encoder(
        of_images(spec), channels=taken, size=lift.size or sides, load_weights=load_weights
    )
    return SlicewiseEncoder(inner, lift, (1, channels, *(size or ())))


def of_images(spec: ImageEncoder) -> ImageEncoder:
    """The section without its lift; its channels are those of a slice."""
    return replace(spec, lift=None, slices=Slices(), inflation=Inflation(), input_channels=None)


def across(size: Size, axis: Axis | None) -> Size:
    """Sides of a volume but that along an axis."""
    return tuple(side for number, side in enumerate(size) if number != AXES[axis])


# ----------------------------------------------------------------------------------- windows


class WindowsEncoder(PartwiseEncoder):
    """An encoder of volumes that reads the windows of larger ones, which may differ in size."""

    at_once = 16

    def __init__(
        self, inner: Encoder, spec: Windows, windows: WindowGrid, input_shape: Size
    ) -> None:
        self.windows, self.skip_below = windows, spec.skip_below
        super().__init__(inner, spec, "windows", input_shape)
        self.coords_text = "window: its first voxel x, y, z of the encoder's input, from 0"

    def forward(self, x: "Tensor | Volumes | Bags", *, pooled: bool = True) -> Any:
        """Features of volumes (B, C, X, Y, Z), or each of its own size: tokens (B, N, D), the
        vectors of the windows, masked where a volume has fewer, at `places`, their first voxels.
        Bags of vectors, encoded before, as they are."""
        if not isinstance(x, Tensor | Volumes):
            return x
        volumes = list(x)
        places = [self.places(volume) for volume in volumes]
        vectors = self.of_windows(volumes, places)  # (M, D)
        counts = torch.tensor([len(part) for part in places])
        most = int(counts.max())
        mask = None
        tokens = vectors
        if (counts < most).any():
            mask = (torch.arange(most) < counts[:, None]).to(vectors.device)  # (B, N)
            tokens = vectors.new_zeros(len(counts) * most, vectors.shape[1])
            tokens = tokens.masked_scatter(mask.flatten()[:, None], vectors)
        tokens = tokens.unflatten(0, (len(counts), most))
        features = Features(tokens, None, 0, False, None, self.pooling, mask, tuple(places))
        # the mean over the real tokens alone
        features.pooled = tokens.mean(1) if mask is None else aggregate(features, "avg")
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) -> vectors of all their windows (B, N, D)."""
        places = [self.windows.starts(x.shape[2:])] * len(x)
        return self.of_windows(list(x), places).unflatten(0, (len(x), -1))

    def of_windows(self, volumes: Sequence[Tensor], places: Sequence[np.ndarray]) -> Tensor:
        """Vectors (M, D) of the windows that begin at places (N, 3) of each volume."""
        wanted = [(row, at) for row, starts in enumerate(places) for at in starts.tolist()]

        def cut(part: Tensor) -> Tensor:
            chosen = (wanted[number] for number in part.tolist())
            return torch.stack([self.windows.cut(volumes[row], at) for row, at in chosen])

        return self.encoded(len(wanted), cut)

    def places(self, volume: Tensor) -> np.ndarray:
        """First voxels (N, 3) of the windows of a volume (C, X, Y, Z) that are not empty; of all
        where all are."""
        starts = self.windows.starts(volume.shape[1:])
        if self.skip_below is None:
            return starts
        highest = [self.windows.cut(volume, at).amax() for at in starts.tolist()]
        filled = (torch.stack(highest) > self.skip_below).cpu().numpy()
        return starts[filled] if filled.any() else starts

    def parts_of(self, size: Size) -> dict[str, Any]:
        """Sides and steps of the windows, and how many a volume of this size has."""
        windows = self.windows
        return {
            "size": list(windows.size),
            "stride": list(windows.stride),
            "count": windows.count(size),
        }

    def most_tokens(self, size: Size) -> int | None:
        """Windows of a volume of this size."""
        return self.windows.count(size)

    def grid(self, raw: Tensor, size: torch.Size) -> None:
        """They are no grid, as volumes have sizes of their own."""


@lift_encoder.register
def _(
    lift: Windows, spec: BaseEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    single = replace(spec, lift=None, windows=Windows())
    taken = lift.size or patch_size_of(spec)
    if taken is None:
        raise UserError("model.encoder.windows.size: name the voxels of a window, as [64, 64, 64]")
    inner = build_encoder(single, channels=channels, size=taken, load_weights=load_weights)
    x, y, z = taken
    grid = WindowGrid.overlapping((x, y, z), lift.overlap)
    if lift.stride is not None:
        grid = WindowGrid((x, y, z), lift.stride)
    return WindowsEncoder(inner, lift, grid, (1, channels, *(size or taken)))
