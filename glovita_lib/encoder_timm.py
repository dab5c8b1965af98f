"""Encoders of timm: every image model it has, by name.

B batch, N tokens, D width, C channels, H W pixels.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, partial
from typing import Any

import torch
from msgspec.structs import asdict
from torch import Tensor, nn

from glovita_lib.encoder import (
    Encoder,
    Preprocess,
    build_encoder,
    check_channels,
    file_facts,
    fit_channels,
    preprocess_of,
    with_facts,
)
from glovita_lib.errors import UserError, listed, reason, refuse
from glovita_lib.spec_encoders import TimmEncoder, argument_problems
from glovita_lib.weights import (
    LoadTarget,
    Tensors,
    as_run_built,
    fit_kernel,
    handed_over,
    load_directly,
    load_file,
)


class BuiltTimm(TimmEncoder, tag="timm", kw_only=True):  # type: ignore[misc]  # frozen
    """The section of a trained run whose weights began as those of a file."""

    published: bool
    """Whether timm builds the model as for published weights: of all files but those of runs that
    began without."""


@file_facts.register
def _(spec: TimmEncoder) -> dict[str, Any] | None:
    if spec.weights is None:
        return None
    own = as_run_built(spec.weights)
    return {"published": True if own is None else own}


@with_facts.register
def _(spec: TimmEncoder, facts: dict[str, Any]) -> BuiltTimm:
    return BuiltTimm(**asdict(spec), **facts)


class TimmTrunk(Encoder):
    """A model of timm without classifier; its raw features are `forward_features`, its own vector
    is `forward_head(..., pre_logits=True)`."""

    def forward_features(self, x: Tensor) -> Any:
        """Inputs (B, C, H, W) -> what forward_features gives."""
        return self.net.forward_features(x)  # type: ignore[operator]  # a method

    def pool(self, raw: Any) -> Tensor:
        """Raw features -> pre-logits (B, D')."""
        return self.net.forward_head(raw, pre_logits=True)  # type: ignore[operator]  # a method

    raw_call = "net.forward_features(x)"
    pool_call = "net.forward_head({raw}, pre_logits=True)"

    def norm_call(self, tokens: str) -> str:
        """`fc_norm`, where that stands behind the pooling."""
        return tokens if self.norm_behind is None else f"net.fc_norm({tokens})"

    @property
    def norm_behind(self) -> nn.Module | None:
        """The norm behind the pooling of a ViT that has none before it."""
        behind = getattr(self.net, "fc_norm", None)
        is_behind = isinstance(getattr(self.net, "norm", None), nn.Identity)
        return behind if is_behind and not isinstance(behind, nn.Identity) else None

    def patch_sides(
        self, patches: int, sizes: list[tuple[int, ...]], image: tuple[int, ...]
    ) -> tuple[float, ...]:
        """Sides of a patch, as the network's own embedding has it."""
        for name in ("patch_embed", "embeds"):
            stated = getattr(getattr(self.net, name, None), "dynamic_feat_size", None)
            if stated is not None and math.prod(grid := stated(image)) == patches > 0:
                return tuple(side / n for side, n in zip(image, grid, strict=True))
        return super().patch_sides(patches, sizes, image)

    def norm(self, tokens: Tensor) -> Tensor:
        """A ViT that norms behind its pooling gives unnormed tokens: that norm, token by token."""
        return tokens if self.norm_behind is None else self.norm_behind(tokens)


@cache
def present_name(name: str) -> str:
    """The name that timm has today for a model; the name itself where it is no old one.

    Raises:
        UserError: timm has removed the model.
    """
    import timm

    model, _, tag = name.partition(".")
    old = timm.models.get_deprecated_models()
    if model not in old:
        return name
    present = old[model]
    if present is None:
        raise UserError(
            f'model.encoder.type = "{name}": timm {timm.__version__} has removed this model'
            " without a successor; timm.list_models() has all that there are"
        )
    return f"{present.partition('.')[0]}.{tag}" if tag else present


def published_timm(spec: TimmEncoder) -> Any:
    """timm's configuration of the published weights of a model.

    Raises:
        UserError: unknown model or unknown weights of it.
    """
    import timm

    present = present_name(spec.type)
    name = present.partition(".")[0]
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UserError(
            f'model.encoder.type = "{spec.type}": timm {timm.__version__} has no such model{hint};'
            " timm.list_models() has them all"
        )
    try:
        config = timm.models.get_pretrained_cfg(present)
    except RuntimeError as error:
        tags = timm.list_models(f"{name}.*", pretrained=True) or [name]
        raise UserError(
            f'model.encoder.type = "{spec.type}": no such weights; valid: {", ".join(tags)}'
        ) from error
    # a model that somebody has registered without a configuration gets timm's default
    return config or timm.models.PretrainedCfg(architecture=name)


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
        crop_mode=resolved["crop_mode"],
    )


def build_timm(
    spec: TimmEncoder, *, channels: int, size: tuple[int, ...] | None, read_weights: bool
) -> TimmTrunk:
    """The encoder of a Struct, built for its input."""
    config = published_timm(spec)
    refuse("model.encoder", argument_problems(spec.model_kwargs, spec.set_elsewhere))
    download = spec.pretrained and spec.weights is None and read_weights
    if download:
        check_published(spec, config)
    default = preprocess_timm(spec, channels=channels).image_size or config.input_size[-1]
    size = size or (default, default)
    net, loader = create_timm(spec, config, channels=channels, size=size)
    if download:
        download_timm(spec, net, loader)
    if spec.small_images:
        keep_small_images(net, spec.type)
    prefix = prefix_tokens(net)
    encoder = TimmTrunk(
        net,
        name=spec.type,
        n_prefix=len(prefix),
        has_cls="cls" in prefix,
        channels_last=getattr(net, "output_fmt", "NCHW") == "NHWC",
        input_shape=(1, channels, *size),
    )
    encoder.prefix = prefix[: encoder.n_prefix]
    encoder.load_target = timm_target(spec, config, net, loader)
    if download:
        encoder.load_target.taken["published"] = f"{config.architecture}.{config.tag}"
    if spec.weights is not None and read_weights:
        note = load_file(
            encoder.load_target, spec.weights, key=spec.weights_key, by_order=spec.weights_order
        )
        encoder.notes += () if note is None else (note,)
    if (present := present_name(spec.type)) != spec.type:
        encoder.notes += (f'model.encoder.type = "{spec.type}" is now called {present} in timm',)
    return encoder


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


Loader = partial[None]
"""timm's load_pretrained, with all that timm gives it for a model but the model."""

BUILDING_ERRORS = (AssertionError, ValueError, RuntimeError, NotImplementedError)
ARGUMENT_ERRORS = (TypeError, LookupError, AttributeError, ArithmeticError)


def create_timm(
    spec: TimmEncoder, config: Any, *, channels: int, size: tuple[int, ...]
) -> tuple[nn.Module, Loader | None]:
    """timm.create_model, its errors told in terms of the spec; the model has random weights.

    Returns:
        The model, and what loads published weights into it; None where the spec asks for none.

    Raises:
        UserError: the model does not take an argument, or the size.
    """
    import timm

    arguments = {**spec.model_kwargs, "num_classes": 0, "in_chans": channels}
    if has_fixed_size(spec, config) and tuple(size) != tuple(config.input_size[1:]):
        arguments["img_size"] = size
    loaders: list[Loader] = []
    # some models are built otherwise for published weights (fbnetc_100: another eps of BatchNorm)
    facts = {"published": spec.published} if isinstance(spec, BuiltTimm) else file_facts(spec)
    trained = spec.pretrained if facts is None else facts["published"]
    try:
        with instead_of_loading(loaders):
            net = timm.create_model(present_name(spec.type), pretrained=trained, **arguments)
            if spec.weights is not None and not loaders:  # its file is fitted by timm all the same
                with torch.random.fork_rng(devices=[]):
                    timm.create_model(present_name(spec.type), pretrained=True, **arguments)
    except BUILDING_ERRORS + ARGUMENT_ERRORS as error:
        raise refused(spec, config, arguments, error) from error
    return net, loaders[-1] if loaders else None


@contextmanager
def instead_of_loading(loaders: list[Loader]) -> Iterator[None]:
    """Inside, timm loads no published weights; what it would have called is put down. Only its
    builder knows the converter of a model, and that with the model's own arguments."""
    from timm.models import _builder

    original = _builder.load_pretrained

    def put_down(model: nn.Module, **arguments: Any) -> None:
        loaders.append(partial(original, **arguments))

    vars(_builder)["load_pretrained"] = put_down
    try:
        yield
    finally:
        vars(_builder)["load_pretrained"] = original


def refused(
    spec: TimmEncoder, config: Any, arguments: dict[str, Any], error: Exception
) -> Exception:
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
    if isinstance(error, ARGUMENT_ERRORS) and not spec.model_kwargs:
        return error
    told = [f"model.encoder.model_kwargs.{k} = {v}" for k, v in spec.model_kwargs.items()]
    takes = f"{arguments['in_chans']} channels"
    if "img_size" in arguments:
        takes += f" and {' x '.join(map(str, arguments['img_size']))} pixels"
    key = "model_kwargs" if told else "type"
    return UserError(
        f"model.encoder.{key}: timm cannot build {spec.type}{' with ' * bool(told)}"
        f"{', '.join(told)} for images of {takes}: {type(error).__name__}: {reason(error)}"
    )


def download_timm(spec: TimmEncoder, net: nn.Module, loader: Loader | None) -> None:
    """Load the published weights as timm does.

    Raises:
        UserError: they cannot be fetched, which names the way without a network; or timm leaves
            some of the network's weights random.
    """
    from glovita_lib.encoder_hub import cache_only_without_network, hub_errors

    assert loader is not None, "published weights are loaded by timm's builder"
    try:
        with cache_only_without_network():
            state = handed_over(LoadTarget(net, lambda net, _: loader(net)), Tensors())
    except hub_errors() as error:
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" cannot be downloaded'
            f' ({type(error).__name__}); offline: model.encoder.weights = "<file>" (pth, pt,'
            " safetensors), or pretrained = false"
        ) from error
    if not state:
        return  # of a format that the model reads itself
    missing = set(net.load_state_dict(state, strict=False).missing_keys)
    if random := [name for name, _ in net.named_parameters() if name in missing]:
        raise UserError(
            f'model.encoder.pretrained = true: the published weights of "{spec.type}" lack'
            f" {listed(random, 3)} for {loader.keywords['in_chans']} channels and these"
            " model_kwargs, and timm leaves them random: change the channels or model_kwargs, or"
            " set pretrained = false"
        )


A_STAGE = re.compile(r"cls_token_?\d+$")
"""Name of the CLS token of a stage."""


def prefix_tokens(net: nn.Module) -> tuple[str, ...]:
    """What each token before the patches is, in order: "cls", "distillation" (DeiT) or
    "register"."""
    token = getattr(net, "cls_token", None)
    if token is None:  # CoaT has one a stage, and gives the tokens of the last one
        stages = dict(net.named_parameters(recurse=False))
        token = next((stages[n] for n in sorted(stages, reverse=True) if A_STAGE.match(n)), None)
    has_cls = bool(getattr(net, "has_class_token", token is not None))
    many = token.shape[1] if has_cls and isinstance(token, Tensor) and token.ndim == 3 else has_cls
    distilled = getattr(net, "dist_token", None) is not None or (  # PiT: two CLS tokens
        many > 1 and getattr(net, "head_dist", None) is not None
    )
    registers = int(getattr(net, "num_prefix_tokens", many)) - has_cls - distilled
    return ("cls",) * has_cls + ("distillation",) * distilled + ("register",) * registers


def timm_target(
    spec: TimmEncoder, config: Any, net: nn.Module, loader: Loader | None
) -> LoadTarget:
    """What weights are loaded into, and by which of timm's rules."""
    import timm

    @cache
    def whole() -> frozenset[str]:
        classes = {**spec.model_kwargs, "num_classes": config.num_classes or 1000}
        try:
            with torch.device("meta"):
                model = timm.create_model(present_name(spec.type), **classes)
        except (RuntimeError, ValueError):  # a constructor that looks at values
            model = timm.create_model(present_name(spec.type), **classes)
        return frozenset(model.state_dict())

    return LoadTarget(
        net,
        loading=load_directly if loader is None else partial(load_as_timm, loader),
        classifier=names_of(config.classifier),
        whole=whole,
        first_conv=first_convolutions(net, config.first_conv),
        by_order=True,
    )


def names_of(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One name, several or none, as timm's configurations have them."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def first_convolutions(net: nn.Module, published: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the convolutions that see the input: what the network itself says, else the
    configuration of its published weights."""
    traits = getattr(net, "_traits", {})
    return names_of(traits.get("first_conv", published))


def load_as_timm(loader: Loader, net: nn.Module, tensors: Tensors) -> None:
    """Load tensors as timm loads published weights from a file.

    timm takes every file for one of RGB. First kernels of a network of other channels are fitted
    here by the same rule.
    """
    state, own = dict(tensors), net.state_dict()
    config, channels = loader.keywords["pretrained_cfg"], loader.keywords["in_chans"]
    kernels = [f"{name}.weight" for name in first_convolutions(net, config.get("first_conv"))]
    for key in (key for key in kernels if key in state and key in own):
        kernel, wanted = state[key], own[key]
        plain = kernel.ndim == wanted.ndim == 4 and wanted.shape[1] == channels  # no stacked pixels
        if plain and kernel.shape[1] not in (3, channels):
            state[key] = fit_kernel(kernel, channels)
    if all(key in state and key in own and same_channels(state[key], own[key]) for key in kernels):
        channels = 3  # in timm's words: there is nothing to fit
    elsewhere = {"file": None, "url": None, "hf_hub_id": None, "source": ""}
    loader(net, pretrained_cfg={**config, **elsewhere, "state_dict": state}, in_chans=channels)


def same_channels(kernel: Tensor, wanted: Tensor) -> bool:
    """Whether kernels (D, C, ...) differ at most in their sides, to which timm resamples those of
    patches."""
    return kernel.ndim == wanted.ndim and kernel.shape[:2] == wanted.shape[:2]


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
    return build_timm(spec, channels=channels, size=size, read_weights=load_weights)
