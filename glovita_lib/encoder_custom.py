"""Encoders without a network of this program: a user's own module, and features as they are.

B batch, C channels, N tokens, D width, T time points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.encoder import (
    Encoder,
    Features,
    Preprocess,
    build_encoder,
    check_channels,
    fit_channels,
    preprocess_of,
    without_data,
)
from glovita_lib.encoder_aggregation import aggregate
from glovita_lib.encoder_series import divided, only
from glovita_lib.errors import UserError, call_target, listed
from glovita_lib.spec_encoders import CustomEncoder, PrecomputedEncoder
from glovita_lib.weights import LIBRARY_ERRORS

# -------------------------------------------------------------------- a user's own


class CustomTrunk(Encoder):
    """A user's module: gives a vector (B, D), tokens (B, N, D) or a map (B, D, *grid).

    The module's attributes n_prefix and has_cls say how many of its tokens are prefix tokens and
    whether the first is a CLS token; without them none is.
    """

    def check_output(self, raw: Any, input_shape: tuple[int, ...]) -> None:
        """One tensor: vectors, tokens or a map."""
        if isinstance(raw, Tensor) and raw.ndim in (2, 3, len(input_shape)):
            return
        given = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else kind_of(raw)
        raise UserError(
            f'model.encoder.target = "{self.name}": its module gives {given}; valid: one tensor,'
            " vectors (B, D), tokens (B, N, D) or maps (B, D, *size), so wrap it in a module that"
            " picks one"
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Inputs (B, C, *size) -> the module's output."""
        return self.net(x)

    def pool(self, raw: Tensor) -> Tensor:
        """The vector itself, the CLS token, or the mean of patch tokens, (B, D)."""
        if raw.ndim == 2:
            return raw
        tokens = self.to_tokens(raw)
        return tokens[:, 0] if self.has_cls else tokens[:, self.n_prefix :].mean(1)


def kind_of(raw: Any) -> str:
    """What a module gives that gives no tensor, in words."""
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} of {listed(raw, 5)}"
    if isinstance(raw, list | tuple):
        return f"a {type(raw).__name__} of {len(raw)}"
    return f"a {type(raw).__name__}"


# ------------------------------------------------------------- a user's own, of series
#
# Which axis of what a module gives is time, and which time points a token is of, is told by what it
# gives for series of other lengths.

Shape = tuple[int, ...]
MOST_LENGTHS = 2  # times the length of the data, up to which a module is asked


@dataclass(frozen=True, slots=True)
class Steps:
    """A module gives (T - first) // step + 1 tokens for T time points, none for fewer than `first`:
    with 1 and 1 one of each, with k and k one of every k, with 1 and k one of the rest too."""

    first: int
    step: int

    def count(self, length: int) -> int:
        """Number of tokens."""
        return max(0, (length - self.first) // self.step + 1)

    def of_tokens(self, mask: Tensor) -> Tensor:
        """Which tokens count, (B, N) bool, where these time points (B, T) do: those that the series
        up to its last one has by itself, of whose `step` time points any counts. Where none would,
        the first one does."""
        if self == Steps(1, 1):
            return mask
        length, device = mask.shape[1], mask.device
        count, start = self.count(length), max(0, (self.first - self.step) // 2)
        own = F.pad(mask, (0, max(0, start + count * self.step - length)))
        own = own[:, start : start + count * self.step].unflatten(1, (count, self.step))
        ends = (mask * torch.arange(1, length + 1, device=device)).amax(1, keepdim=True)  # (B, 1)
        reached = self.first + self.step * torch.arange(count, device=device) <= ends
        found = own.any(2) & reached
        first = found[:, :1] | ~found.any(1, keepdim=True)
        return torch.cat([first, found[:, 1:]], dim=1)


def steps_of(count: Callable[[int], int], length: int) -> Steps | None:
    """The rule by which a module gives `count` tokens for a number of time points, found by asking
    for those up to some times a length that it takes; None where there is no such rule."""
    shorter = (length // 2, length // 2 - 1)  # an even one and an odd one
    if count(length) == length and all(count(n) in (0, n) for n in shorter):
        return Steps(1, 1)  # also of one that takes a single length, or some of them
    most = MOST_LENGTHS * length
    first = least(count, 1, 1, length)
    step = least(count, 2, first + 1, most) - first
    found = Steps(first, step)
    near = {first, first + step - 1, first + step, first + 2 * step - 1, first + 2 * step}
    for n in near | {length, length - 1, length // 2, 2 * length // 3, 3 * length // 2, most}:
        refused = not count(n) and (n > length or n < first)
        if 0 < n <= most and not refused and count(n) != found.count(n):
            return None
    return found


def least(count: Callable[[int], int], wanted: int, low: int, high: int) -> int:
    """Fewest time points from `low` on for which so many tokens are given; `high` where no fewer
    are enough."""
    step = 1
    while low + step < high and count(low + step) < wanted:
        step *= 2
    last = min(low + step, high)
    while low < last:
        middle = (low + last) // 2
        low, last = (low, middle) if count(middle) >= wanted else (middle + 1, last)
    return last


class SeriesModule(CustomTrunk):
    """A user's module on series: gives a vector (B, D), tokens (B, N, D) or a map (B, D, N).

    It is called with series (B, C, T), and where its forward has an argument `mask` with which of
    their time points count, (B, T) bool.
    """

    def __init__(self, net: nn.Module, *, input_shape: tuple[int, ...], **facts: Any) -> None:
        self.channels, self.takes_mask = input_shape[1], "mask" in arguments_of(net)
        self.is_map, self.all_count = False, False
        self.steps: Steps | None = Steps(1, 1)
        super().__init__(net, input_shape=input_shape, **facts)
        step = 1 if self.steps is None else self.steps.step
        of = "time point" if step == 1 else f"token of {step} time points"
        self.coords_text = "token: its number, from 0"
        if not self.all_count:
            self.coords_text = f"time: {of} of the prepared series, from 0"
        self.no_layers = "those of a module of your own on series: let it give that layer's output"

    def inspect(self, input_shape: tuple[int, ...]) -> None:
        """Besides the rest which axis is time, and which time points tokens are of."""
        length, shape = input_shape[2], shapes_of(self)
        if len(shape(length)) == 3:
            axis, told = self.time_axis(length, shape)
            self.is_map = axis == 2

            def count(n: int) -> int:
                found = shape(n) if n > 0 else ()
                return max(0, found[axis] - self.n_prefix) if len(found) == 3 else 0

            self.all_count = not told and any(shape(n) for n in others_than(length))
            self.steps = None if self.all_count else steps_of(count, length)
        super().inspect(input_shape)

    def time_axis(self, length: int, shape: Callable[[int], Shape]) -> tuple[int, bool]:
        """The axis of the tokens in outputs, and whether other lengths tell it, for which that axis
        has another size; else the module says it by its attributes.

        Args:
            shape: of the output for a number of time points.

        Raises:
            UserError: both axes follow the length; or none does, and the module does not say.
        """
        own = shape(length)
        gives = (
            f'model.encoder.target = "{self.name}": its module gives (B, {own[1]}, {own[2]}) for'
            f" series of {length} time points"
        )
        for other in others_than(length):
            found = shape(other)
            if len(found) != 3:
                continue
            changed = [axis for axis in (1, 2) if found[axis] != own[axis]]
            if len(changed) == 2:
                raise UserError(
                    f"{gives} and (B, {found[1]}, {found[2]}) for those of {other}: the width must"
                    " be the same for all lengths, in tokens (B, N, D) or maps (B, D, N)"
                )
            if changed:
                return changed[0], True
        last = getattr(self.net, "channels_last", True if self.n_prefix else None)
        if last is None:
            raise UserError(
                f"{gives}, and other lengths do not tell which of both is the width: give it an"
                " attribute channels_last, True for tokens (B, N, D) or False for maps (B, D, N)"
            )
        return 1 if last else 2, False

    def forward_features(self, x: Tensor) -> Tensor:
        """Series (B, C or C + 1, T) -> the module's output.

        Raises:
            UserError: some time points do not count, and the module is not told which.
        """
        x, mask = divided(x, self.channels)
        if not self.takes_mask:
            if mask is not None:
                raise UserError(
                    f'model.encoder.target = "{self.name}": series of a batch differ in length or'
                    " lack values, and the forward of its module has no argument `mask`: write"
                    " forward(self, x, mask), where mask (B, T) is True where a time point of x"
                    " (B, C, T) counts"
                )
            return self.net(x)
        if mask is None:
            mask = torch.ones_like(x[:, 0], dtype=torch.bool)
        return self.net(only(x, mask), mask=mask)

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Map or tokens -> (B, N, D)."""
        return raw.transpose(1, 2) if self.is_map else raw

    def with_patches(self, raw: Tensor, patches: Tensor) -> Tensor:
        """Raw features with other patch tokens."""
        return patches.transpose(1, 2) if self.is_map else super().with_patches(raw, patches)

    def grid(self, raw: Tensor, size: torch.Size) -> tuple[int, ...]:
        """Number of patch tokens."""
        return (self.to_tokens(raw).shape[1] - self.n_prefix,)

    def patch_sides(
        self, patches: int, sizes: list[tuple[int, ...]], image: tuple[int, ...]
    ) -> tuple[float, ...]:
        """Time points of a token."""
        return (1.0 if self.steps is None else float(self.steps.step),)

    def token_mask(self, x: Tensor) -> Tensor | None:
        """Which tokens count, (B, N) bool; None: all."""
        _, mask = divided(x, self.channels)
        if mask is None or self.all_count or not self.has_tokens:
            return None
        if self.steps is None:
            raise UserError(
                f'model.encoder.target = "{self.name}": series of a batch differ in length or lack'
                " values, and the number of tokens that its module gives says not which time"
                " points they are of: give one of every time point, or of every k of them"
            )
        own = self.steps.of_tokens(mask)
        return F.pad(own, (self.n_prefix, 0), value=True)

    def forward(self, x: Tensor, *, pooled: bool = True) -> Features:
        """Features of series, with the mask of their tokens; means are over those that count."""
        features = super().forward(x, pooled=pooled)
        features.mask = self.token_mask(x)
        if features.pooled is not None and features.mask is not None and not self.has_cls:
            features.pooled = aggregate(features, "avg")
        return features


def others_than(length: int) -> list[int]:
    """Numbers of time points that a module is asked for besides its own."""
    return [n for n in (length // 2, 2 * length, length // 4) if n]


def arguments_of(net: nn.Module) -> set[str]:
    """Names of the arguments of a module's forward."""
    scripted = getattr(net.forward, "schema", None)
    if scripted is not None:
        return {argument.name for argument in scripted.arguments}
    return set(signature(net.forward).parameters)


def shapes_of(encoder: SeriesModule) -> Callable[[int], Shape]:
    """Shapes of what a module gives for a series of a number of time points, without computing it
    where that is possible; empty where it does not take so many, or gives no tensor."""

    def shape_in(own: SeriesModule, device: str, length: int) -> Shape:
        try:
            with torch.no_grad():
                raw = own.forward_features(torch.zeros(1, own.channels, length, device=device))
        except LIBRARY_ERRORS:
            return ()
        return tuple(raw.shape) if isinstance(raw, Tensor) else ()

    copy = without_data(encoder)
    recurrent = any(isinstance(part, nn.RNNBase) for part in copy.modules())  # slow without data
    if not recurrent and shape_in(copy, "meta", encoder.input_shape[2]):
        return cache(partial(shape_in, copy, "meta"))
    return cache(partial(shape_in, encoder, "cpu"))


@preprocess_of.register
def _(spec: CustomEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    return Preprocess(
        image_size=None,
        crop_pct=0.875,
        interpolation="bilinear",
        mean=fit_channels((0.485, 0.456, 0.406), channels),
        std=fit_channels((0.229, 0.224, 0.225), channels),
        fixed_size=False,
    )


@build_encoder.register
def _(
    spec: CustomEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    net = call_target("model.encoder", spec.target, input_channels=channels, **spec.options)
    if not isinstance(net, nn.Module):
        raise UserError(
            f'model.encoder.target = "{spec.target}" returned a {type(net).__name__}: it must'
            " return a torch.nn.Module"
        )
    has_cls = bool(getattr(net, "has_cls", False))
    kind = SeriesModule if size is not None and len(size) == 1 else CustomTrunk
    return kind(
        net,
        name=spec.target,
        n_prefix=int(getattr(net, "n_prefix", has_cls)),
        has_cls=has_cls,
        channels_last=False,
        input_shape=(1, channels, *(size or (224, 224))),
    )


# ---------------------------------------------------------------------- precomputed features
#
# The encoder of precomputed features returns its input, so that aggregation, head and loop are the
# same as for images.
#
# B batch, D width.


class Identity(Encoder):
    """Vectors (B, D) or bags of them, as they are."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Identity(),
            name="precomputed",
            n_prefix=0,
            has_cls=False,
            channels_last=False,
            input_shape=(1, width),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """The vectors."""
        return x

    def pool(self, raw: Tensor) -> Tensor:
        """The vectors."""
        return raw

    def forward(self, x: Any, *, pooled: bool = True) -> Any:
        """Vectors become features; bags are for heads that take instances."""
        return super().forward(x) if isinstance(x, Tensor) else x


@build_encoder.register
def _(
    spec: PrecomputedEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> Encoder:
    if spec.feature_dim is not None and spec.feature_dim != channels:
        raise UserError(
            f"model.encoder.feature_dim = {spec.feature_dim}: the features have width {channels};"
            f" set feature_dim = {channels} or leave it out"
        )
    return Identity(channels)
