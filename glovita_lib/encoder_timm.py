"""Encoders of timm: every image model it has, by name.

B batch, N tokens, D width, C channels, H W pixels.
"""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import Tensor, nn

from glovita_lib import checkpoint
from glovita_lib.checkpoint import LoadTarget
from glovita_lib.encoder import (
    Encoder,
    Preprocess,
    build_encoder,
    check_channels,
    fit_channels,
    preprocess_of,
)
from glovita_lib.errors import UserError
from glovita_lib.spec_model import TimmEncoder

OURS = {  # arguments of timm that other keys of the spec decide
    "num_classes": "the data",
    "pretrained": "model.encoder.pretrained",
    "in_chans": "model.encoder.input_channels",
    "img_size": "data.augmentation.image_size",
    "checkpoint_path": "model.encoder.weights",
    "features_only": "model.feature_aggregation_method",
}


class TimmTrunk(Encoder):
    """A model of timm without classifier; its raw features are `forward_features`, its own vector
    is `forward_head(..., pre_logits=True)`."""

    def forward_features(self, x: Tensor) -> Any:
        """Inputs (B, C, H, W) -> what forward_features gives."""
        return self.net.forward_features(x)  # type: ignore[operator]  # a method

    def pool(self, raw: Any) -> Tensor:
        """Raw features -> pre-logits (B, D')."""
        return self.net.forward_head(raw, pre_logits=True)  # type: ignore[operator]  # a method

    def norm(self, tokens: Tensor) -> Tensor:
        """A ViT that norms behind its pooling gives unnormed tokens: that norm, token by token."""
        if isinstance(getattr(self.net, "norm", None), nn.Identity):
            behind = getattr(self.net, "fc_norm", None)
            return tokens if behind is None else behind(tokens)
        return tokens


def published_timm(spec: TimmEncoder) -> Any:
    """timm's configuration of the published weights of a model.

    Raises:
        UserError: unknown model or unknown weights of it.
    """
    import timm

    name = spec.type.partition(".")[0]
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UserError(
            f'model.encoder.type = "{spec.type}": timm {timm.__version__} has no such model{hint};'
            " timm.list_models() has them all"
        )
    try:
        return timm.models.get_pretrained_cfg(spec.type)
    except RuntimeError as error:
        tags = timm.list_models(f"{name}.*", pretrained=True) or [name]
        raise UserError(
            f'model.encoder.type = "{spec.type}": no such weights; valid: {", ".join(tags)}'
        ) from error


def has_fixed_size(spec: TimmEncoder, config: Any) -> bool:
    """Whether the model is built for one input size."""
    return config.fixed_input_size and not spec.model_kwargs.get("dynamic_img_size", False)


def preprocess_timm(spec: TimmEncoder, *, channels: int) -> Preprocess:
    """Input convention of the published weights; the size only where weights or the architecture
    ask for one."""
    from timm.data import resolve_data_config

    config = published_timm(spec)
    resolved = resolve_data_config(pretrained_cfg=config.to_dict())
    fixed = has_fixed_size(spec, config)
    sized = fixed or spec.pretrained or spec.weights is not None
    size = resolved["input_size"][-1]
    return Preprocess(
        image_size=size if sized else None,
        crop_pct=resolved["crop_pct"],
        interpolation=resolved["interpolation"],
        mean=fit_channels(resolved["mean"], channels),
        std=fit_channels(resolved["std"], channels),
        fixed_size=fixed,
    )


def build_timm(
    spec: TimmEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> TimmTrunk:
    """The encoder of a Struct, built for its input."""
    config = published_timm(spec)
    check_arguments(spec)
    download = spec.pretrained and spec.weights is None and load_weights
    if download:
        check_published(spec, config)
    default = preprocess_timm(spec, channels=channels).image_size or config.input_size[-1]
    size = size or (default, default)
    net = create_timm(spec, config, channels=channels, size=size, download=download)
    if spec.small_images:
        keep_small_images(net, spec.type)
    n_prefix, has_cls = prefix_tokens(net)
    encoder = TimmTrunk(
        net,
        name=spec.type,
        n_prefix=n_prefix,
        has_cls=has_cls,
        channels_last=getattr(net, "output_fmt", "NCHW") == "NHWC",
        input_shape=(1, channels, *size),
    )
    encoder.load_target = timm_target(encoder, config)
    if spec.weights is not None and load_weights:
        checkpoint.load_weights(encoder.load_target, spec.weights, by_order=spec.weights_order)
    return encoder


def check_arguments(spec: TimmEncoder) -> None:
    """Arguments that have a place of their own in the spec are not given twice."""
    for key in spec.model_kwargs:
        if key in OURS:
            raise UserError(f"model.encoder.model_kwargs.{key}: {OURS[key]} decides this")


def check_published(spec: TimmEncoder, config: Any) -> None:
    """Published weights must exist, and fit the stem."""
    if not config.has_weights:
        raise UserError(
            f'model.encoder.pretrained = true: timm has no weights of "{spec.type}"; set pretrained'
            ' = false or weights = "<file>"'
        )
    if spec.small_images:
        raise UserError(
            "model.encoder.small_images = true: published weights have the stem of stride 4; set"
            " pretrained = false, or small_images = false"
        )


def create_timm(
    spec: TimmEncoder, config: Any, *, channels: int, size: tuple[int, ...], download: bool
) -> nn.Module:
    """timm.create_model, its errors told in terms of the spec."""
    import timm

    arguments = {**spec.model_kwargs, "num_classes": 0, "in_chans": channels}
    if has_fixed_size(spec, config) and tuple(size) != tuple(config.input_size[1:]):
        arguments["img_size"] = size
    try:
        if download:
            return downloaded(spec, arguments)
        return timm.create_model(spec.type, pretrained=False, **arguments)
    except TypeError as error:
        raise refused(spec, config, error) from error


def refused(spec: TimmEncoder, config: Any, error: TypeError) -> Exception:
    """The error for an argument that a model does not take; other errors as they are."""
    message = str(error)
    if "unexpected keyword argument 'img_size'" in message:
        return UserError(
            f"data.augmentation.image_size: {spec.type} takes images of"
            f" {config.input_size[-1]} pixels only; remove image_size or name another encoder"
        )
    for key in spec.model_kwargs:
        if f"keyword argument '{key}'" in message:
            return UserError(
                f"model.encoder.model_kwargs.{key}: {spec.type} has no such argument;"
                " timm.create_model passes them to the class of the model"
            )
    return error


def downloaded(spec: TimmEncoder, arguments: dict[str, Any]) -> nn.Module:
    """The model with its published weights.

    Raises:
        UserError: they cannot be fetched; names the way without a network.
    """
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    refusals: tuple[type[Exception], ...] = (OSError, HfHubHTTPError)
    with suppress(ImportError):  # before huggingface_hub 1.0: requests, whose errors are OSErrors
        from httpx import HTTPError

        refusals += (HTTPError,)
    try:
        with cache_only_without_network():
            return timm.create_model(spec.type, pretrained=True, **arguments)
    except refusals as error:
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" cannot be downloaded'
            f' ({type(error).__name__}); offline: model.encoder.weights = "<file>" (pth, pt,'
            " safetensors), or pretrained = false"
        ) from error


@contextmanager
def cache_only_without_network() -> Iterator[None]:
    """Where the hub has no address, look into its cache alone: its own retries take 45 s and say
    so line by line. Behind a proxy addresses are the proxy's business."""
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


def prefix_tokens(net: nn.Module) -> tuple[int, bool]:
    """Number of prefix tokens, CLS and registers, and whether the first is a CLS token."""
    has_cls = getattr(net, "cls_token", None) is not None
    has_cls = bool(getattr(net, "has_class_token", has_cls))
    return int(getattr(net, "num_prefix_tokens", has_cls)), has_cls


def timm_target(encoder: TimmTrunk, config: Any) -> LoadTarget:
    """What weights are loaded into; timm's own converter knows the names of the models' authors."""
    classifier = config.classifier or ()
    first = config.first_conv
    return LoadTarget(
        encoder.net,
        classifier=(classifier,) if isinstance(classifier, str) else tuple(classifier),
        n_prefix=encoder.n_prefix,
        first_conv=first if isinstance(first, str) else None,
        converter=getattr(sys.modules[type(encoder.net).__module__], "checkpoint_filter_fn", None),
    )


def keep_small_images(net: nn.Module, name: str) -> None:
    """Replace the stem of stride 4 by one of stride 1, as He et al. (2016) do for CIFAR: a 7x7
    kernel becomes 3x3, several 3x3 kernels lose their stride, the max pooling goes.

    Raises:
        UserError: the model has no such stem.
    """
    stem, pooling = getattr(net, "conv1", None), getattr(net, "maxpool", None)
    if stem is None or pooling is None:
        raise UserError(
            f"model.encoder.small_images = true: {name} has no ResNet stem; valid for ResNets (e.g."
            " resnet18), or give the images a larger data.augmentation.image_size"
        )
    if isinstance(stem, nn.Conv2d):
        net.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    for part in (*stem.modules(), *pooling.modules()):
        if isinstance(part, nn.Conv2d):
            part.stride = (1, 1)
    if not any(True for _ in pooling.parameters()):
        net.maxpool = nn.Identity()


@preprocess_of.register
def _(spec: TimmEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    return preprocess_timm(spec, channels=channels)


@build_encoder.register
def _(
    spec: TimmEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    return build_timm(spec, channels=channels, size=size, load_weights=load_weights)
