"""Encoders: the input they expect, the output they give, aggregation of tokens, building."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib import network
from glovita_lib.errors import UserError, reason, refuse
from glovita_lib.spec import ByStruct
from glovita_lib.spec_augment import CropMode
from glovita_lib.spec_lift import BaseEncoder
from glovita_lib.weights import LoadTarget

# ------------------------------------------------------------------------------------ inputs
#
# What an encoder expects of its input images.


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The input convention of an encoder: that of its published weights, else that of its
    architecture.

    Sizes in pixels. mean and std refer to values in 0..1, one per input channel.
    """

    image_size: int | None
    """Side of the square input; none where nothing asks for a certain one."""
    crop_pct: float | Fraction
    """Share of the shorter side that the centre crop keeps, e.g. 0.875 of 256 pixels."""
    interpolation: str
    """nearest, bilinear, bicubic or lanczos."""
    mean: tuple[float, ...]
    """Subtracted from each channel."""
    std: tuple[float, ...]
    """Divides each channel after that."""
    fixed_size: bool
    """Whether the encoder must be built for its input size and accepts no other."""
    crop_mode: CropMode = "center"
    """What is resized before the centre crop, as in data.augmentation."""


def fit_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of RGB for another number of channels, as its first kernel is fitted: one channel
    takes their mean, more repeat them."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(float(values[i % len(values)]) for i in range(channels))


# ------------------------------------------------------------------------------------ output
#
# What an encoder gives: one type for every family.
#
# B batch, N tokens, D width, H W grid of patches, also X Y Z or any number of axes.


@dataclass(slots=True)
class Features:
    """The output of an encoder.

    tokens are final-normed, prefix tokens (CLS first, then others) before patch tokens, which
    run over the grid in the order of its axes (row by row). Feature maps (B, D, *grid) or (B,
    *grid, D) come as the tokens of their places, as the library pools them. pooled is the library's
    own vector before the classifier, and pooling says what it is:

    - "cls_token": the CLS token and the layers trained behind it
    - "avg": the mean of the patch tokens and the layers trained behind it
    - "pooled": anything else, e.g. attention pooling, or a flattened map (VGG)
    """

    tokens: Tensor | None  # (B, N, D); None for encoders that give one vector only
    grid: tuple[int, ...] | None  # of the N - n_prefix patch tokens
    n_prefix: int  # CLS, distillation and registers
    has_cls: bool
    pooled: Tensor | None  # (B, D'); None where not asked for
    pooling: str | None = None
    mask: Tensor | None = None  # (B, N) bool, True where a token is real; None: all are
    places: tuple[np.ndarray, ...] | None = None
    """Where the tokens of each sample lie, (n, axes) whole numbers: voxels of slices and windows of
    a volume; None: in the grid, counted from 0."""
    intermediates: dict[str, Tensor] | None = None
    """Maps (B, C, *grid) of inner stages by their names, from the input on; None: not asked for."""

    @property
    def patches(self) -> Tensor:
        """Patch tokens (B, N - n_prefix, D)."""
        assert self.tokens is not None, "a vector has no patches"
        return self.tokens[:, self.n_prefix :]


# --------------------------------------------------------------------- networks of libraries
#
# Features out of a library's own network. Facts about a network (width, layout of its maps, kind of
# pooling, blocks) are read off the network itself: shapes from a pass without data, the kind of
# pooling from what the pooling does to random features. B batch, N tokens, D width, C channels, H W
# pixels, or X Y Z voxels: `size` has any number of axes.


class Encoder(nn.Module):
    """A network without its classifier, kept under `net` with the library's own names.

    A subclass makes raw features (`forward_features`), pools (`pool`) and norms them (`norm`).
    """

    patch: tuple[float, ...] = ()
    """Sides of a patch, pixels or in proportion; empty for vectors and parts."""

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        n_prefix: int,
        has_cls: bool,
        channels_last: bool,
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.net, self.name = net, name
        self.n_prefix, self.has_cls, self.channels_last = n_prefix, has_cls, channels_last
        self.prefix = ("cls",) * has_cls + ("register",) * (n_prefix - has_cls)
        """What each token before the patches is."""
        self.load_target = LoadTarget(net)
        """What is known about weights from files."""
        self.notes: tuple[str, ...] = ()
        """What the user should know about how it was built, a line each."""
        self.has_few_tokens = False
        """Whether tokens are so few that those of all samples may be kept in memory."""
        self.no_layers: str | None = None  # what they are that extract.layers cannot read
        self.coords_text: str | None = None
        """What the coordinates of its tokens mean, behind their axes; None: places in a grid along
        the axes of the samples."""
        self.input_shape = input_shape
        """Of the input that it was built for, (1, C, *size)."""
        self.stage_names: tuple[str, ...] = ()
        """Its inner stages from the input on."""
        self.returned: tuple[str, ...] = ()
        """Stages whose maps every pass gives, see `return_stages`."""
        with evaluating(self):
            self.inspect(input_shape)

    # ------------------------------------------------------------------ forward

    def forward_features(self, x: Tensor) -> Any:
        """Inputs (B, C, *size) -> raw features: tokens (B, N, D), a map (B, D, *grid) or (B, *grid,
        D) of two or more axes, a vector or several."""
        raise NotImplementedError

    def pool(self, raw: Any) -> Tensor:
        """Raw features -> the library's own vector before the classifier, (B, D')."""
        raise NotImplementedError

    def norm(self, tokens: Tensor) -> Tensor:
        """Final norm of tokens (B, N, D) where the raw ones lack it."""
        return tokens

    def forward(self, x: Tensor, *, pooled: bool = True) -> Features:
        """Features of inputs (B, C, *size), with the maps of the stages that `return_stages` has
        named; without the library's own vector if not asked for."""
        if not self.returned:
            return self.features_of(self.forward_features(x), x.shape[2:], pooled=pooled)
        with self.taking_stages() as found:
            features = self.features_of(self.forward_features(x), x.shape[2:], pooled=pooled)
        if found:
            features.intermediates = {name: found[name] for name in self.returned if name in found}
        return features

    def return_stages(self, names: Sequence[str]) -> None:
        """From now on every pass gives the maps of these stages.

        Raises:
            UserError: there is no such stage.
        """
        for name in names:
            self.stage(name)
        self.returned = tuple(names)

    @contextmanager
    def taking_stages(self) -> Iterator[dict[str, Tensor]]:
        """Inside, a pass puts the maps (B, C, *grid) of the stages that are returned there."""
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, object, Any], None]:
            return lambda module, inputs, output: found.update({name: self.stage_map(name, output)})

        hooks = [self.stage(name).register_forward_hook(note(name)) for name in self.returned]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def stage(self, name: str) -> nn.Module:
        """The module that gives the map of a stage.

        Raises:
            UserError: there is no such stage.
        """
        raise UserError(f"{self.name} has no stage {name!r}, as it has none at all")

    def stage_map(self, name: str, output: Any) -> Tensor:
        """What the module of a stage gives as a map (B, C, *grid)."""
        raise NotImplementedError

    def stage_shapes(self) -> dict[str, tuple[int, ...]]:
        """(C, *grid) of the stages that are returned, for inputs that it was built for, without
        computing them where that is possible."""

        def maps(encoder: Encoder, device: str) -> dict[str, Tensor]:
            x = torch.zeros(self.input_shape, device=device)
            return encoder(x, pooled=False).intermediates or {}

        with torch.no_grad(), evaluating(self):
            try:
                found = maps(without_data(self), "meta")
            except WITHOUT_SHAPES:
                found = maps(self, "cpu")
        return {name: tuple(value.shape[1:]) for name, value in found.items()}

    def features_of(self, raw: Any, size: torch.Size, *, pooled: bool) -> Features:
        """Features from raw ones of inputs of a spatial size."""
        if self.layout is None:
            return Features(None, None, 0, False, self.pool(raw), self.pooling)
        vector = self.pool(raw) if pooled and self.pooling else None  # (B, D')
        tokens, grid = self.placed(raw, size)  # (B, N, D)
        return Features(self.norm(tokens), grid, self.n_prefix, self.has_cls, vector, self.pooling)

    def placed(self, raw: Tensor, size: torch.Size) -> tuple[Tensor, tuple[int, ...] | None]:
        """Raw features, also a block's, of inputs of a size -> tokens and grid in their order."""
        return self.to_tokens(raw), self.grid(raw, size)

    @property
    def of_parts(self) -> "Encoder | None":
        """The encoder of the parts that it reads a sample in, where it does."""
        return None

    def most_tokens(self, size: tuple[int, ...]) -> int | None:
        """Most tokens of a sample up to this size, where their number differs; else None."""
        return None

    def token_mask(self, x: Tensor) -> Tensor | None:
        """Which tokens of inputs count, (B, N) bool, where their number varies; None: all."""
        return None

    def of_block(self, output: Any) -> Any:
        """What a block gives as a map or tokens, where that is hidden in it."""
        return output

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Raw tokens or map -> (B, N, D)."""
        if raw.ndim == 3:
            return raw
        return raw.flatten(1, -2) if self.channels_last else raw.flatten(2).transpose(1, 2)

    def grid(self, raw: Tensor, size: torch.Size) -> tuple[int, ...] | None:
        """Sides of the grid of the patch tokens, such as rows and columns, for inputs of a spatial
        size; None where tokens are no grid."""
        if raw.ndim > 3:
            return tuple(raw.shape[1:-1] if self.channels_last else raw.shape[2:])
        patches = raw.shape[1] - self.n_prefix
        if not patches:
            return None
        # patches of one shape: as many on each axis as their sides there allow
        sides = [side / patch for side, patch in zip(size, self.patch, strict=True)]
        share = (patches / math.prod(sides)) ** (1 / len(sides))
        rows, *others = (round(side * share) for side in sides)
        if rows * math.prod(others) == patches:
            return (rows, *others)
        if len(size) > 2:
            return None
        return (rows, patches // rows) if rows and patches % rows == 0 else None

    # ------------------------------------------------------------------ facts

    def inspect(self, input_shape: tuple[int, ...]) -> None:
        """Read the facts off the network."""
        given, sizes, self.uses = self.raw_shape(input_shape)
        """What a forward pass reads of the network's own parameters, in that order."""
        self.check_output(given, input_shape)
        raw = random_like(given)
        self.layout = raw.ndim if isinstance(raw, Tensor) and raw.ndim >= 3 else None
        self.has_tokens = self.layout is not None
        patches = given.shape[1] - self.n_prefix if self.layout == 3 else 0
        self.patch = self.patch_sides(patches, sizes, input_shape[2:])
        if not self.has_tokens:
            self.n_prefix, self.has_cls, self.prefix = 0, False, ()
        self.has_patches = self.has_tokens and self.to_tokens(raw).shape[1] > self.n_prefix
        pooled = self.pool(raw)
        self.pooling: str | None = None
        self.plain, self.pooled_width = False, 0  # where the user switched the pooling off
        if pooled.ndim == 2:
            self.pooling, self.plain = self.kind_of_pooling(raw, pooled)
            self.pooled_width = pooled.shape[1]
        self.width = self.to_tokens(raw).shape[2] if self.has_tokens else self.pooled_width
        if not self.width:
            raise UserError(
                f"encoder {self.name} gives neither tokens, nor a map, nor one vector per sample:"
                " leave its pooling on or name another encoder"
            )
        self.pooling_parameters = self.only_pooling(raw, pooled)
        self.block_names = network.block_names(self.net, self.pooling_parameters, self.uses)

    def adopt_layers(self, inner: "Encoder") -> None:
        """Take over the layers of an encoder with the same network."""
        self.pooling_parameters = frozenset()
        self.block_names, self.uses = inner.block_names, inner.uses

    def raw_shape(
        self, input_shape: tuple[int, ...]
    ) -> tuple[Any, list[tuple[int, ...]], network.Uses]:
        """Raw features of an input of this shape, without computing them where that is possible,
        the spatial sizes of the outputs of the convolutions, and the order in which the parameters
        were read.

        Raises:
            UserError: the network does not take inputs of this shape.
        """
        try:
            with torch.no_grad():
                copy = without_data(self)
                with (
                    network.convolution_sizes(copy.net) as sizes,
                    network.noting_uses(copy.net) as uses,
                ):
                    raw = copy.forward_features(torch.zeros(input_shape, device="meta"))
            if not isinstance(raw, Tensor) or raw.numel():  # torch 2.6 lets too small inputs pass
                return raw, sizes, uses
        except WITHOUT_SHAPES:
            pass  # tensors that are no buffers, operators without shapes: compute it
        try:
            watched = network.noting_uses(self.net)
            with torch.no_grad(), network.convolution_sizes(self.net) as sizes, watched as uses:
                raw = self.forward_features(torch.zeros(input_shape))
            return raw, sizes, uses
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            _, channels, *sides = input_shape
            kind = {1: "series", 2: "images", 3: "volumes or clips"}[len(sides)]
            key = "patch_size, of clips data.sampling.frames and data.augmentation.image_size,"
            key = key if len(sides) > 2 else "image_size"
            cure = f"; set data.augmentation.{key} otherwise" if len(sides) > 1 else ""
            raise UserError(
                f"encoder {self.name} does not take {kind} of {' x '.join(map(str, sides))} with"
                f" {channels} channels ({reason(error)}){cure}"
            ) from error

    # ------------------------------------------------------------------ what outputs equal

    raw_call = "encoder(x)"
    """The raw features of inputs x, as a call of the library on the network `net`."""
    pool_call = "the own vector of {raw}"
    """The library's own vector, as a call on raw features."""

    def norm_call(self, tokens: str) -> str:
        """What `norm` does, as a call on tokens."""
        return tokens

    @property
    def tokens_call(self) -> str:
        """The tokens (B, N, D), as a call of the library."""
        tokens = self.raw_call
        if self.layout != 3:
            tokens += ".flatten(1, -2)" if self.channels_last else ".flatten(2).transpose(1, 2)"
        return self.norm_call(tokens)

    def vector_call(self, method: str) -> str:
        """The vector (B, D) of an aggregation method, as a call of the library."""
        if method == "joint":
            parts = self.vector_call("cls_token"), self.vector_call("avg")
            return f"torch.cat([{', '.join(parts)}], 1)"
        if method == "mean_all" and not self.has_cls:
            method = "avg"
        if method in ("pooled", self.pooling):
            return self.pool_call.format(raw=self.raw_call)
        return vector_of_tokens(method, self.tokens_call, self.n_prefix, self.has_cls)

    @torch.no_grad()
    def last_norm(self, x: Tensor, *, pooled: bool = False) -> str:
        """The norm that the tokens end in: one whose output the library's own forward pass gives,
        or one that follows token by token; x are random inputs, by which it is told.

        Args:
            pooled: whether the library's own vector is asked about instead, of which those of the
                tokens is the last where it is one of them or their mean.
        """
        if self.norm_call("") != "":
            return f"{self.norm_call('tokens')}, which the library applies behind its pooling"
        last: deque[tuple[str, Any]] = deque(maxlen=LAST_NORMS)

        def note(name: str) -> Callable[[nn.Module, object, Any], None]:
            # a copy, as an addition or activation behind the norm may work in place
            return lambda module, inputs, output: last.append((name, deepcopy(output)))

        hooks = [
            part.register_forward_hook(note(name))
            for name, part in self.net.named_modules()
            if [inner for inner in part.modules() if is_norm(inner)] == [part]  # no ConvNormAct
        ]
        try:
            raw = self.forward_features(x)
            ends = raw if isinstance(raw, list | tuple) else [raw]
            found = [name for end in ends for name, out in last if self.is_output(out, end)]
            if pooled:
                vector = self.pool(raw)
                behind = [name for name, out in last if self.is_output(out, vector)]
                if behind:
                    return f"net.{behind[0]}, in the library's pooling"
                found = found if is_of_tokens(vector, ends, self) else []
        finally:
            for hook in hooks:
                hook.remove()
        names = ", ".join(f"net.{name}" for name in found[-len(ends) :])
        return f"{names}, the last of the forward pass" if found else "none at the end"

    def is_output(self, output: Any, raw: Any) -> bool:
        """Whether raw features, or a vector, are the output of a layer, be it as a map or as
        tokens, the channels behind the places or before them."""
        if not isinstance(raw, Tensor) or not isinstance(output, Tensor):
            return False
        if raw.ndim < 3 or output.ndim < 3:
            return torch.equal(output.flatten(1), raw.flatten(1))
        layouts = output.flatten(1, -2), output.flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = self.to_tokens(raw)
        return any(torch.equal(layout, tokens) for layout in layouts)

    def check_output(self, raw: Any, input_shape: tuple[int, ...]) -> None:
        """Raise a UserError where raw features are not what `forward_features` may give."""

    def patch_sides(
        self, patches: int, sizes: list[tuple[int, ...]], image: tuple[int, ...]
    ) -> tuple[float, ...]:
        """Sides of a patch: the first convolution whose output has as many places as there are
        patches makes them; without one they are taken for squares, or cubes.

        Args:
            patches: how many patch tokens there are; 0 where there are none.
            sizes: of the outputs of the convolutions.
            image: sides of the input.
        """
        for size in sizes:
            if len(size) == len(image) and math.prod(size) == patches > 0:
                return tuple(side / n for side, n in zip(image, size, strict=True))
        return (1.0,) * len(image)

    @torch.no_grad()
    def kind_of_pooling(self, raw: Any, pooled: Tensor) -> tuple[str, bool]:
        """What the library's own vector is, and whether it is just that, without layers behind.

        A vector that does not change with any other token is the CLS token's (that of a distilled
        DeiT is the mean of two); one that changes neither with the prefix tokens nor when every
        patch token is replaced by their mean is the mean's.
        """
        if not self.has_tokens:
            return "pooled", False
        tokens = self.to_tokens(raw)
        n = self.n_prefix
        if self.has_cls and same(self.pool(torch.cat([raw[:, :1], -raw[:, 1:]], 1)), pooled):
            return "cls_token", same(self.norm(tokens)[:, 0], pooled)
        mean = tokens[:, n:].mean(1, keepdim=True)  # (2, 1, D)
        if n and not same(self.pool(torch.cat([-raw[:, :n], raw[:, n:]], 1)), pooled):
            return "pooled", False
        if same(self.pool(self.with_patches(raw, mean.expand_as(tokens[:, n:]))), pooled):
            return "avg", same(self.norm(tokens)[:, n:].mean(1), pooled)
        return "pooled", False

    def with_patches(self, raw: Tensor, patches: Tensor) -> Tensor:
        """Raw features with other patch tokens (B, N - n_prefix, D)."""
        if raw.ndim == 3:
            return torch.cat([raw[:, : self.n_prefix], patches], dim=1)
        if self.channels_last:
            return patches.reshape(raw.shape)
        return patches.transpose(1, 2).reshape(raw.shape)

    def only_pooling(self, raw: Any, pooled: Tensor) -> frozenset[str]:
        """Names, below `net`, of the parameters that only the library's own vector depends on."""
        behind = network.dependencies(self.net, pooled)
        if self.has_tokens:
            behind -= network.dependencies(self.net, self.norm(self.to_tokens(raw)))
        return behind

    def taken(self, size: tuple[int, ...]) -> dict[str, Any]:
        """What it takes of inputs (C, *size) where its section leaves that open, by the names of
        the section's fields where they have some, as builtin types."""
        drops = [part.p for part in self.net.modules() if isinstance(part, DROPOUTS)]
        paths = [
            float(getattr(part, "drop_prob", None) or getattr(part, "p", None) or 0)
            for part in self.net.modules()
            if type(part).__name__ in ("DropPath", "StochasticDepth")
        ]
        kernels = [part for part in self.net.modules() if network.is_conv(part)]
        return {
            "input_channels": self.input_shape[1],
            "input_shape": list(self.input_shape[2:]),
            "dropout": max(drops, default=None),
            "drop_path": max(paths, default=None),
            "stem_channels": kernels[0].weight.shape[0] if kernels else None,
            "intermediates": list(self.returned),
            "notes": list(self.notes),
            **self.load_target.taken,
        }

    def blocks(self) -> list[nn.Module]:
        """Blocks in order from the input, as `network` defines them."""
        return network.blocks(self)

    def depths(self) -> network.Depths:
        """Depth of every parameter by its name in the encoder; of one beside the network, which a
        PEFT method shares among its layers, that of a head."""
        found = network.depths_of(self.net, self.block_names, self.uses)
        of = {f"net.{name}": depth for name, depth in found.of.items()}
        of |= {name: found.head for name, _ in self.named_parameters() if name not in of}
        return network.Depths(of, found.layers, found.head)


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is called a norm, as also some that hold one."""
    return "norm" in type(module).__name__.lower()


def is_of_tokens(vector: Tensor, ends: Sequence[Any], encoder: Encoder) -> bool:
    """Whether a vector (B, D) is the first of the tokens of each end of a network, or the mean of
    its tokens, or of those that are patches."""
    if not all(isinstance(end, Tensor) and end.ndim > 2 for end in ends):
        return False
    tokens = [encoder.to_tokens(end) for end in ends]
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda own: own[:, 0],
        lambda own: own.mean(1),
        lambda own: own[:, encoder.n_prefix :].mean(1),
    ]
    made = [torch.cat([way(own) for own in tokens], 1) for way in ways]
    return any(v.shape == vector.shape and torch.allclose(v, vector, 1e-4, 1e-5) for v in made)


LAST_NORMS = 4
"""Norms of a forward pass, from the last one on, whose outputs are kept and compared with it."""
WITHOUT_SHAPES = (RuntimeError, AssertionError, ValueError, IndexError, TypeError)
"""What a pass without data raises where it needs them."""
Network = TypeVar("Network", bound=nn.Module)


def without_data(module: Network) -> Network:
    """A copy of a module with the shapes of its tensors only; what it caches stays in the copy."""
    tensors: dict[int, Tensor] = {}
    for parameter in module.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        tensors[id(buffer)] = buffer.to("meta")
    return deepcopy(module, tensors)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former modes afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    yield
    for part, mode in modes:
        part.training = mode


def random_like(raw: Any) -> Any:
    """Random features of the same shape for two samples, grids of at least 2 x 2; own stream."""
    if isinstance(raw, dict):
        return {key: random_like(value) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return type(raw)(random_like(value) for value in raw)
    shape = [2, *raw.shape[1:]]
    if len(shape) > 3:
        shape = [2, *(max(2, side) for side in shape[1:])]
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding in float32."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.std()))


def vector_of_tokens(method: str, tokens: str, n_prefix: int, has_cls: bool) -> str:
    """The vector of a method, as a call on tokens."""
    if method == "joint":
        parts = (vector_of_tokens(m, tokens, n_prefix, has_cls) for m in ("cls_token", "avg"))
        return f"torch.cat([{', '.join(parts)}], 1)"
    patches = f"{tokens}[:, {n_prefix}:]" if n_prefix else tokens
    if method == "cls_token":
        return f"{tokens}[:, 0]"
    if method == "sum":
        return f"{patches}.sum(1)"
    if method == "mean_all" and has_cls:
        whole = tokens if n_prefix == 1 else f"torch.cat([{tokens}[:, :1], {patches}], 1)"
        return f"{whole}.mean(1)"
    return f"{patches}.mean(1)"


# ---------------------------------------------------------------------------------- building
#
# One function that says what an encoder expects and one that builds it per Struct.
#
# B batch, N tokens, D width, C channels, H W pixels, X Y Z voxels.


def check_channels(spec: BaseEncoder, channels: int) -> None:
    """The spec may state the channels, but the data have them."""
    refuse("model.encoder", spec.channel_problems(channels))


@ByStruct
def preprocess_of(spec: BaseEncoder, *, channels: int) -> Preprocess:
    """What the encoder of a Struct expects of images with so many channels; builds nothing.

    Raises:
        UserError: unknown model.
    """
    raise TypeError(f"no encoder for {type(spec).__name__}")


@ByStruct
def patch_size_of(spec: BaseEncoder) -> tuple[int, ...] | None:
    """Voxels (X, Y, Z) that the encoder of a Struct was made for, the default of the patch; None
    where nothing asks for certain ones. Builds nothing."""
    return None


@ByStruct
def clip_size_of(spec: BaseEncoder) -> tuple[int, int, int] | None:
    """Frames, height and width (T, H, W) of the clips that the weights of a Struct were trained on;
    None where nothing says so. Builds nothing."""
    return None


@ByStruct
def file_facts(spec: BaseEncoder) -> dict[str, Any] | None:
    """What only a file says of the architecture of the encoder of a Struct, as plain values that a
    run keeps with its checkpoints; None where the Struct says all."""
    return None


@ByStruct
def with_facts(spec: BaseEncoder, facts: dict[str, Any]) -> Any:
    """The Struct with what `file_facts` has found, whose encoder needs no file but for weights."""
    raise TypeError(f"no facts of files for {type(spec).__name__}")


@ByStruct
def build_encoder(
    spec: BaseEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> Encoder:
    """The encoder of a Struct for inputs (C, *size), none: of its own size.

    Args:
        load_weights: False where a checkpoint is loaded over it; then no file is read or fetched.

    Raises:
        UserError: unknown model or argument, weights that are not there or do not fit, a size it
        does not take.
    """
    raise TypeError(f"no encoder for {type(spec).__name__}")


@ByStruct
def lift_encoder(
    lift: Any,
    spec: BaseEncoder,
    *,
    channels: int,
    size: tuple[int, ...] | None,
    load_weights: bool,
) -> Encoder:
    """An encoder for volumes (C, *size) that are more than its network takes, lifted as a Struct
    says; else as build_encoder.

    Raises:
        UserError: see build_encoder, or the encoder cannot be lifted.
    """
    raise TypeError(f"no lift for {type(lift).__name__}")


def any_encoder(
    spec: BaseEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> Encoder:
    """The encoder of a Struct, lifted where that says so; else as build_encoder."""
    arguments: dict[str, Any] = {"channels": channels, "size": size, "load_weights": load_weights}
    if (lift := spec.lifting) is None:
        return build_encoder(spec, **arguments)
    try:
        return lift_encoder(lift, spec, **arguments)
    except UserError as error:
        raise UserError(lift.renamed(str(error))) from error
