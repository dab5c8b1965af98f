"""Encoders of torchvision: every image classification model it has, by name.

All but the ViT are a chain of children, then a classifier: what stands before the pooling makes the
map, the rest without its last layer the library's own vector. B batch, N tokens, D width, C
channels, H W pixels.
"""

import hashlib
import inspect
import sys
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from msgspec.structs import asdict
from torch import Tensor, nn
from torch.nn import functional as F

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
from glovita_lib.errors import UserError, reason
from glovita_lib.network import is_conv
from glovita_lib.spec_encoders import TorchvisionEncoder, TorchvisionVideoEncoder
from glovita_lib.weights import (
    LoadTarget,
    Tensors,
    as_run_built,
    fit_kernel,
    load_file,
    load_tensors,
)

TAIL = ("avgpool", "flatten", "dropout", "classifier", "fc", "head")  # pooling and classifier
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # classifiers for training GoogLeNet and Inception
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = {  # arguments of torchvision that other keys of the spec decide
    "num_classes": "the data",
    "weights": "model.encoder.pretrained or model.encoder.weights",
    "weights_backbone": "model.encoder.pretrained",
    "pretrained": "model.encoder.pretrained",
    "image_size": "data.augmentation.image_size",
    "input_size": "data.augmentation.image_size",
    "dropout": "model.encoder.dropout",
    "stochastic_depth_prob": "model.encoder.stochastic_depth_prob",
    "aux_logits": "nothing: auxiliary classifiers are left out",
    "transform_input": "model.encoder.pretrained",
}


class BuiltTorchvision(  # type: ignore[misc]  # a Struct is frozen as its parents are
    TorchvisionEncoder, tag="torchvision", kw_only=True
):
    """The section of a trained run whose weights began as those of a file."""

    published: bool
    """Whether these are torchvision's published ones, before which GoogLeNet and Inception bring
    their input to another mean."""


@file_facts.register
def _(spec: TorchvisionEncoder) -> dict[str, Any] | None:
    if spec.weights is None or "aux_logits" not in accepted(builder_of(spec)):
        return None
    own = as_run_built(spec.weights)
    return {"published": is_published(spec) if own is None else own}


@with_facts.register
def _(spec: TorchvisionEncoder, facts: dict[str, Any]) -> BuiltTorchvision:
    return BuiltTorchvision(**asdict(spec), **facts)


def is_published(spec: TorchvisionEncoder) -> bool:
    """Whether the file of the spec is one of torchvision's, whose names end in the first digits of
    their SHA-256."""
    import torchvision

    path = Path(spec.weights or "")
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    published = torchvision.models.get_model_weights(spec.type)
    starts = [Path(entry.url).stem.rpartition("-")[2] for entry in published]
    return digest.startswith(tuple(starts))


class ChainTrunk(Encoder):
    """A model that is a chain of children with pooling and classifier at the end."""

    raw_call = "the map of net before its pooling"
    pool_call = "what net gives its last layer for x"

    def forward_features(self, x: Tensor) -> Tensor:
        """Inputs (B, C, H, W) -> the last map (B, D, h, w)."""
        if getattr(self.net, "transform_input", False):
            x = self.net._transform_input(x)  # type: ignore[operator]  # a method
        for name, child in self.net.named_children():
            if name not in TAIL and name not in AUXILIARY:
                for part in child if isinstance(child, nn.ModuleList) else (child,):
                    x = part(x)
        # DenseNet's last activation is no module
        return F.relu(x) if type(self.net).__name__ == "DenseNet" else x

    def pool(self, raw: Tensor) -> Tensor:
        """The last map -> what the model gives its last layer, (B, D')."""
        parts = dict(self.net.named_children())
        x = parts["avgpool"](raw) if "avgpool" in parts else raw  # (B, D, h, w)
        classifier = parts.get("classifier", nn.Identity())
        if any(isinstance(part, nn.AdaptiveAvgPool2d) for part in classifier.modules()):
            return classifier(x).flatten(1)
        if "avgpool" not in parts:
            x = F.adaptive_avg_pool2d(x, 1)
        if not any(isinstance(part, nn.Flatten) for part in classifier.modules()):
            x = x.flatten(1)  # (B, D h w)
        x = parts["dropout"](x) if "dropout" in parts else x
        return classifier(x)


class VitTrunk(Encoder):
    """torchvision's VisionTransformer: a CLS token before the patch tokens."""

    raw_call = (
        "net.encoder(torch.cat([net.class_token.expand(len(x), -1, -1), net._process_input(x)], 1))"
    )
    pool_call = "net.heads({raw}[:, 0])"

    def forward_features(self, x: Tensor) -> Tensor:
        """Inputs (B, C, H, W) -> final-normed tokens (B, 1 + N, D)."""
        patches = self.net._process_input(x)  # type: ignore[operator]  # a method
        cls = self.net.get_parameter("class_token").expand(len(x), -1, -1)  # (B, 1, D)
        return self.net.get_submodule("encoder")(torch.cat([cls, patches], dim=1))

    def pool(self, raw: Tensor) -> Tensor:
        """Tokens -> what the model gives its last layer, (B, D')."""
        return self.net.get_submodule("heads")(raw[:, 0])


def builder_of(spec: TorchvisionEncoder) -> Any:
    """torchvision's function that builds a model.

    Raises:
        UserError: no such image classification model.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if spec.type not in names:
        close = get_close_matches(spec.type, names, n=3)
        hint = f"nearest: {', '.join(close)}" if close else f"valid: {', '.join(names)}"
        raise UserError(
            f'model.encoder.type = "{spec.type}": torchvision {torchvision.__version__} has no such'
            f" image classification model; {hint}"
        )
    return torchvision.models.get_model_builder(spec.type)


def published_torchvision(spec: TorchvisionEncoder | TorchvisionVideoEncoder) -> Any:
    """The default published weights of a model (an enum member), None where there are none."""
    import torchvision

    return getattr(torchvision.models.get_model_weights(spec.type), "DEFAULT", None)


def size_argument(spec: TorchvisionEncoder) -> str | None:
    """The argument that tells a model of fixed input size that size; None for the others."""
    if spec.type.startswith("vit_"):
        return "image_size"
    return "input_size" if spec.type.startswith("maxvit") else None


def preprocess_torchvision(spec: TorchvisionEncoder, *, channels: int) -> Preprocess:
    """Input convention of the published weights; the size only where weights or the architecture
    ask for one."""
    builder_of(spec)
    weights = published_torchvision(spec)
    fixed = size_argument(spec) is not None
    sized = fixed or spec.pretrained or spec.weights is not None
    if weights is None:
        means, stds, size, resize, interpolation = *IMAGENET, 224, 256, "bilinear"
    else:
        preset = weights.transforms()
        means, stds = preset.mean, preset.std
        size, resize = preset.crop_size[0], preset.resize_size[0]
        interpolation = preset.interpolation.value
    if fixed and not spec.pretrained:  # the size of some weights is not that of the architecture
        size, resize = 224, 256
    return Preprocess(
        image_size=size if sized else None,
        crop_pct=Fraction(size, resize),
        interpolation=interpolation,
        mean=fit_channels(means, channels),
        std=fit_channels(stds, channels),
        fixed_size=fixed,
    )


def build_torchvision(
    spec: TorchvisionEncoder, *, channels: int, size: tuple[int, ...] | None, read_weights: bool
) -> Encoder:
    """The encoder of a Struct, built for its input."""
    default = preprocess_torchvision(spec, channels=channels).image_size or 224
    size = size or (default, default)
    net = create_torchvision(spec, size=size)
    first = fit_first_conv(net, channels)
    classifier = take_off_classifier(net)
    is_vit = hasattr(net, "class_token")
    encoder = (VitTrunk if is_vit else ChainTrunk)(
        net,
        name=spec.type,
        n_prefix=int(is_vit),
        has_cls=is_vit,
        channels_last=False,
        input_shape=(1, channels, *size),
    )
    encoder.load_target = LoadTarget(
        net, load_as_torchvision, (classifier, *AUXILIARY), first_conv=(first,)
    )
    if read_weights:
        note = load_torchvision_file(encoder.load_target, spec)
        encoder.notes += () if note is None else (note,)
    return encoder


def create_torchvision(spec: TorchvisionEncoder, *, size: tuple[int, ...]) -> nn.Module:
    """Build the model with the arguments of the spec.

    Raises:
        UserError: an argument that the model does not have, a size it does not take.
    """
    builder = builder_of(spec)
    arguments = dict(spec.model_kwargs)
    for key in arguments:
        if key in OURS:
            raise UserError(f"model.encoder.model_kwargs.{key}: {OURS[key]} decides this")
    for key in ("dropout", "stochastic_depth_prob"):
        if getattr(spec, key) is not None:
            arguments[key] = getattr(spec, key)
    known = accepted(builder)
    for key in arguments:
        if known and key not in known:
            where = "" if key in ("dropout", "stochastic_depth_prob") else "model_kwargs."
            raise UserError(
                f"model.encoder.{where}{key}: {spec.type} has no such argument; it has"
                f" {', '.join(sorted(known - set(OURS)))}"
            )
    if (sized := size_argument(spec)) is not None:
        arguments[sized] = side_of(spec, size) if sized == "image_size" else size
    if "aux_logits" in known:
        uses_published = spec.pretrained
        if isinstance(spec, BuiltTorchvision):
            uses_published = spec.published
        elif (facts := file_facts(spec)) is not None:
            uses_published = facts["published"]
        arguments |= {"aux_logits": False, "transform_input": uses_published, "init_weights": True}
    return construct(builder, arguments, spec)


def side_of(spec: TorchvisionEncoder, size: tuple[int, ...]) -> int:
    """Side of a square input, for models that take no other."""
    if len(set(size)) > 1:
        raise UserError(
            f"model.encoder.type: {spec.type} takes square inputs, not"
            f" {' x '.join(map(str, size))}: make them square or name another encoder"
        )
    return size[0]


def construct(
    builder: Any, arguments: dict[str, Any], spec: TorchvisionEncoder | TorchvisionVideoEncoder
) -> nn.Module:
    """Call torchvision's function, its errors told in terms of the spec."""
    try:
        return builder(weights=None, **arguments)
    except TypeError as error:
        culprit = next((k for k in arguments if f"'{k}'" in str(error)), None)
        if culprit is None and not spec.model_kwargs:
            raise
        place = "model_kwargs" if culprit is None else f"model_kwargs.{culprit}"
        if culprit in ("dropout", "stochastic_depth_prob"):
            place = culprit
        raise UserError(
            f"model.encoder.{place}: {spec.type} does not take it ({reason(error)})"
        ) from error
    except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"model.encoder: {spec.type}: {reason(error)}") from error
    except (LookupError, AttributeError, ArithmeticError) as error:
        if not spec.model_kwargs:
            raise
        raise UserError(
            f"model.encoder.model_kwargs: {spec.type} does not take them"
            f" ({type(error).__name__}: {reason(error)})"
        ) from error


def accepted(builder: Any) -> frozenset[str]:
    """Arguments of the class that a function of torchvision builds, found by its module."""
    module = inspect.unwrap(builder).__module__
    classes = [
        value
        for value in vars(sys.modules[module]).values()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module
        and "num_classes" in inspect.signature(value).parameters
        and "in_channels" not in inspect.signature(value).parameters
    ]
    keys = {key for c in classes for key in inspect.signature(c).parameters}
    return frozenset(keys - {"kwargs"})  # what a class swallows unread is not accepted


def first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that sees the input, and its name."""
    return next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))


def fit_first_conv(net: nn.Module, channels: int) -> str:
    """Give the first convolution the input's channels, with new weights; its name."""
    name, conv = first_convolution(net)
    if conv.in_channels != channels:
        conv.in_channels = channels
        conv.weight = nn.Parameter(torch.empty(conv.out_channels, channels, *conv.kernel_size))
        conv.reset_parameters()
        if getattr(net, "transform_input", False):
            vars(net)["transform_input"] = False  # it renormalises RGB
    return name


def take_off_classifier(net: nn.Module) -> str:
    """Replace the last layer, and what only follows it, by identities; its name."""
    tail = next(name for name in ("heads", "head", "fc", "classifier") if hasattr(net, name))
    layers = [
        (name, module)
        for name, module in getattr(net, tail).named_modules(prefix=tail)
        if isinstance(module, nn.Linear) or is_conv(module)
    ]
    name = layers[-1][0]
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())
    if type(net).__name__ == "SqueezeNet":  # the activation of the logits
        setattr(net.get_submodule(parent), str(int(last) + 1), nn.Identity())
    return name


def load_as_torchvision(net: nn.Module, tensors: Tensors) -> None:
    """Load tensors as torchvision loads published weights, which renames those of a DenseNet.

    Position embeddings are fitted to the grid by torchvision's function for that, first kernels to
    the channels as timm does.
    """
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if isinstance(net, VisionTransformer) and "encoder.pos_embedding" in tensors:
        tensors = interpolate_embeddings(net.image_size, net.patch_size, tensors)
    name, conv = first_convolution(net)
    kernel = tensors.get(f"{name}.weight")
    if kernel is not None and kernel.shape != conv.weight.shape and kernel.ndim == 4:
        tensors[f"{name}.weight"] = fit_kernel(kernel, conv.in_channels)
    renaming = getattr(sys.modules[type(net).__module__], "_load_state_dict", None)
    if renaming is None:
        net.load_state_dict(tensors)
    else:
        given = SimpleNamespace(get_state_dict=lambda **_: tensors)  # as an enum of weights has it
        renaming(model=net, weights=given, progress=False)


def load_torchvision_file(
    target: LoadTarget, spec: TorchvisionEncoder | TorchvisionVideoEncoder
) -> str | None:
    """Load the file of the spec, or the published weights; a note on what was taken.

    Raises:
        UserError: they do not exist or cannot be fetched; names the way without a network.
    """
    if spec.weights is not None:
        return load_file(target, spec.weights, key=spec.weights_key)
    if not spec.pretrained:
        return None
    weights = published_torchvision(spec)
    if weights is None:
        raise UserError(
            f'model.encoder.pretrained = true: torchvision has no weights of "{spec.type}"; set'
            ' pretrained = false or weights = "<file>"'
        )
    try:
        tensors = weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:  # URLError is one
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" cannot be downloaded'
            f' ({type(error).__name__}); offline: model.encoder.weights = "<file>" (pth, pt,'
            " safetensors), or pretrained = false"
        ) from error
    load_tensors(target, tensors, source=f"{weights}")
    target.taken["published"] = f"{weights}"
    return None


@preprocess_of.register
def _(spec: TorchvisionEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    return preprocess_torchvision(spec, channels=channels)


@build_encoder.register
def _(
    spec: TorchvisionEncoder, *, channels: int, size: tuple[int, ...] | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    return build_torchvision(spec, channels=channels, size=size, read_weights=load_weights)
