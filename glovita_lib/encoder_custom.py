"""Encoders without a network of this program: a user's own module, and features as they are.

B batch, C channels, N tokens, D width.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from glovita_lib.encoder import (
    Encoder,
    Preprocess,
    build_encoder,
    check_channels,
    fit_channels,
    preprocess_of,
)
from glovita_lib.errors import UserError, call_target, listed
from glovita_lib.spec_encoders import CustomEncoder, PrecomputedEncoder

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
    return CustomTrunk(
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
