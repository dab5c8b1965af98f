"""Encoders: what they expect and how they are built, one function of each kind per Struct.

B batch, N tokens, D width, C channels, H W pixels.
"""

from functools import singledispatch
from typing import Any

from torch import Tensor, nn

from glovita_lib.encoders_timm import build_timm, describe_timm
from glovita_lib.encoders_torchvision import build_torchvision, describe_torchvision
from glovita_lib.layers import Features
from glovita_lib.plugins import call_target
from glovita_lib.preprocess import Preprocess, fit_channels
from glovita_lib.spec import UserError
from glovita_lib.spec_model import CustomEncoder, TimmEncoder, TorchvisionEncoder
from glovita_lib.trunk import Encoder

__all__ = ["CustomTrunk", "Encoder", "Features", "build_encoder", "describe"]


def check_channels(spec: Any, channels: int) -> None:
    """The spec may state the channels, but the data have them."""
    if spec.input_channels is not None and spec.input_channels != channels:
        raise UserError(
            f"model.encoder.input_channels = {spec.input_channels}: the data have {channels};"
            " remove input_channels or change how the data are read"
        )


@singledispatch
def describe(spec: Any, *, channels: int) -> Preprocess:
    """What the encoder of a Struct expects of images with so many channels; builds nothing.

    Raises:
        UserError: unknown model.
    """
    raise TypeError(f"no encoder for {type(spec).__name__}")


@singledispatch
def build_encoder(
    spec: Any, *, channels: int, image_size: int | None, load_weights: bool
) -> Encoder:
    """The encoder of a Struct for square images of `image_size` pixels, none: of its own size.

    Args:
        load_weights: False where a checkpoint is loaded over it; then no file is read or fetched.

    Raises:
        UserError: unknown model or argument, weights that are not there or do not fit, a size it
        does not take.
    """
    raise TypeError(f"no encoder for {type(spec).__name__}")


@describe.register
def _(spec: TimmEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    return describe_timm(spec, channels=channels)


@build_encoder.register
def _(spec: TimmEncoder, *, channels: int, image_size: int | None, load_weights: bool) -> Encoder:
    check_channels(spec, channels)
    return build_timm(spec, channels=channels, image_size=image_size, load_weights=load_weights)


@describe.register
def _(spec: TorchvisionEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    return describe_torchvision(spec, channels=channels)


@build_encoder.register
def _(
    spec: TorchvisionEncoder, *, channels: int, image_size: int | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    return build_torchvision(
        spec, channels=channels, image_size=image_size, load_weights=load_weights
    )


# -------------------------------------------------------------------- a user's own


class CustomTrunk(Encoder):
    """A user's module: gives a vector (B, D), tokens (B, N, D) or a map (B, D, H, W).

    The module's attributes n_prefix and has_cls say how many of its tokens are prefix tokens and
    whether the first is a CLS token; without them none is.
    """

    def trunk(self, x: Tensor) -> Tensor:
        """Inputs (B, C, H, W) -> the module's output."""
        return self.net(x)

    def pool(self, raw: Tensor) -> Tensor:
        """The vector itself, the CLS token, or the mean of patch tokens, (B, D)."""
        if raw.ndim == 2:
            return raw
        tokens = self.to_tokens(raw)
        return tokens[:, 0] if self.has_cls else tokens[:, self.n_prefix :].mean(1)


@describe.register
def _(spec: CustomEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    return Preprocess(
        image_size=None,
        resize_size=None,
        interpolation="bilinear",
        mean=fit_channels((0.485, 0.456, 0.406), channels),
        std=fit_channels((0.229, 0.224, 0.225), channels),
        fixed_size=False,
    )


@build_encoder.register
def _(spec: CustomEncoder, *, channels: int, image_size: int | None, load_weights: bool) -> Encoder:
    check_channels(spec, channels)
    net = call_target("model.encoder", spec.target, input_channels=channels, **spec.options)
    if not isinstance(net, nn.Module):
        raise UserError(
            f'model.encoder.target = "{spec.target}" returned a {type(net).__name__}: it must'
            " return a torch.nn.Module"
        )
    has_cls = bool(getattr(net, "has_cls", False))
    size = image_size or 224
    return CustomTrunk(
        net,
        name=spec.target,
        preprocess=describe(spec, channels=channels),
        n_prefix=int(getattr(net, "n_prefix", has_cls)),
        has_cls=has_cls,
        channels_last=False,
        input_shape=(1, channels, size, size),
    )
