"""Encoders of Hugging Face's transformers: models of images and of clips, from a repository of the
hub, a folder, or a kind of model and its configuration.

A model is built by its own class as config.json says, and loads files by transformers' own rules,
which rename what older versions have written. Its forward pass is transformers' own.

B batch, N tokens, D width, C channels, T H W frames, rows and columns, t h w of the grid.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from glovita_lib.encoder_hub import (
    cache_only_without_network,
    completed,
    hub_errors,
    interpolation,
    normalisation,
    place_of,
    read_json,
    read_preprocessor,
    resizing,
)
from glovita_lib.encoder_torchvision import IMAGENET
from glovita_lib.encoder_video import fit_rgb, part
from glovita_lib.errors import UserError, listed, meant, reason, refuse
from glovita_lib.network import is_conv
from glovita_lib.spec_encoders import TransformerEncoder, argument_problems
from glovita_lib.weights import LoadTarget, Tensors, load_file, read_networks

Size = tuple[int, ...]
Values = dict[str, Any]
PLACE = 'model.encoder.encoder_type = "transformer"'
OLDEST = (5, 24)
PATCHED = (
    "vit", "deit", "vit_mae", "vit_msn", "ijepa", "beit", "data2vec-vision", "dinov2",
    "dinov2_with_registers", "dinov3_vit", "clip_vision_model", "siglip_vision_model",
)  # fmt: skip
"""Kinds of models, by transformers' `model_type`, of images of whole patches."""
IMAGES = (
    *PATCHED,
    *("swin", "swinv2", "convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet"),
)
"""Kinds of models of images."""
CLIPS = ("videomae", "timesformer", "vivit", "vjepa2")
"""Kinds of models of clips (B, T, C, H, W)."""
FIXED = ("videomae", "vivit")
"""Those whose weights are of clips of one size, as positions are numbered through."""
OWN_POOLING = ("beit", "data2vec-vision", "swin", "swinv2")
"""Those whose pooling layer is a mean or a token and a norm; the dense one of others is trained in
few files, and no classifier of theirs reads it."""
END_NORMS = ("fc_norm.weight", "fc_norm.bias", "pooler.layernorm.weight", "pooler.layernorm.bias")
MAY_LACK = (*END_NORMS, "embeddings.mask_token")
"""What some files lack: a norm of the classifier, which begins as none, and what is not read."""
CHANNELS = ("num_channels", "in_chans")
SIDES = ("image_size", "crop_size")
FRAMES = ("num_frames", "frames_per_clip")
OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "decoder", "predictor")


# -------------------------------------------------------------------------------- what files say


class BuiltTransformer(TransformerEncoder, tag="transformer", kw_only=True):
    """The section of a trained run, with what the files of its model say."""

    config: dict[str, Any]
    """Content of config.json, of a model of text and images that of the images."""
    preprocessor: dict[str, Any] | None
    """Content of preprocessor_config.json."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the files beside the weights of a model say."""

    config: Values
    preprocessor: Values | None

    @property
    def kind(self) -> str:
        """transformers' `model_type`."""
        return self.config["model_type"]


def library() -> Any:
    """The package.

    Raises:
        UserError: it is not there, or older than what is known here.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{PLACE}: the package is missing ({reason(error)}); pip install"
            ' "glovita[transformers]"'
        ) from error
    if tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2]) < OLDEST:
        raise UserError(
            f"{PLACE}: transformers {transformers.__version__} is older than"
            f' {".".join(map(str, OLDEST))}; pip install -U "glovita[transformers]"'
        )
    return transformers


def files_of(spec: TransformerEncoder) -> ModelFiles:
    """What the files of a model say; of a kind of model, what its class has as defaults.

    Raises:
        UserError: no such model, no network, or one that is not known here.
    """
    if isinstance(spec, BuiltTransformer):
        return ModelFiles(spec.config, spec.preprocessor)
    if is_kind(spec.type):
        return ModelFiles({"model_type": spec.type}, None)
    config = read_json(spec.type, "config.json", kinds_meant(spec))
    if config is None:
        raise UserError(
            f'model.encoder.type = "{spec.type}": it holds no config.json of transformers'
            f"{kinds_meant(spec)}"
        )
    if "vision_config" in config:
        inner = {"model_type": f"{config.get('model_type')}_vision_model"}
        config = {**inner, **(config["vision_config"] or {})}
    if config.get("model_type") not in (*IMAGES, *CLIPS):
        raise UserError(
            f'model.encoder.type = "{spec.type}": its config.json has model_type ='
            f' "{config.get("model_type")}"; valid: {", ".join((*IMAGES, *CLIPS))}'
        )
    clips = config["model_type"] in CLIPS
    return ModelFiles(config, read_preprocessor(spec.type, clips=clips))


def is_kind(name: str) -> bool:
    """Whether a name is that of a kind of model, and no folder."""
    return name in (*IMAGES, *CLIPS) and not Path(name).is_dir()


def kinds_meant(spec: TransformerEncoder) -> str:
    """The kind of model that a name may have meant, as the end of a message."""
    return meant(spec.type, [*IMAGES, *CLIPS]) if "/" not in spec.type else ""


@file_facts.register
def _(spec: TransformerEncoder) -> dict[str, Any] | None:
    files = files_of(spec)
    return {"config": files.config, "preprocessor": files.preprocessor}


@with_facts.register
def _(spec: TransformerEncoder, facts: dict[str, Any]) -> BuiltTransformer:
    return BuiltTransformer(**asdict(spec), **facts)


# ------------------------------------------------------------------------------ configurations


def configuration(spec: TransformerEncoder, values: Values) -> Any:
    """transformers' configuration of a model with these values and those of the section.

    Raises:
        UserError: a value that it does not have or take.
    """
    from huggingface_hub.errors import StrictDataclassError

    refuse("model.encoder", argument_problems(spec.model_kwargs, spec.set_elsewhere))
    kind = library().CONFIG_MAPPING[values["model_type"]]
    known = kind().to_dict()
    for key in spec.model_kwargs:
        if key not in known:
            raise UserError(
                f"model.encoder.model_kwargs.{key}: the configuration of {values['model_type']} has"
                f" no such value{meant(key, [*known])}"
            )
    try:
        return kind.from_dict({**values, **spec.model_kwargs, **OUTPUTS})
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        place = "model_kwargs" if spec.model_kwargs else "type"
        raise UserError(
            f"model.encoder.{place}: transformers cannot configure {values['model_type']}:"
            f" {' '.join(str(error).split())}"
        ) from error


def key_of(config: Any, names: tuple[str, ...]) -> str | None:
    """The name of these that a configuration has."""
    return next((name for name in names if hasattr(config, name)), None)


def sides_of(config: Any) -> Size | None:
    """Height and width in pixels that a configuration states."""
    key = key_of(config, SIDES)
    stated = None if key is None else getattr(config, key)
    if stated is None:
        return None
    return tuple(stated) if isinstance(stated, list | tuple) else (stated, stated)


def stated_size(config: Any) -> Size | None:
    """Size of the input that a configuration states: (T, H, W) or (H, W)."""
    sides, key = sides_of(config), key_of(config, FRAMES)
    if sides is None or key is None or config.model_type not in CLIPS:
        return sides
    return (getattr(config, key), *sides)


def cell_of(config: Any) -> Size:
    """Rows and columns of a token, of a model of clips frames before them."""
    tubelet = getattr(config, "tubelet_size", 1)
    if isinstance(tubelet, list | tuple):
        return tuple(tubelet)
    patch = config.patch_size
    sides = tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)
    return (tubelet, *sides) if config.model_type in CLIPS else sides


def has_weights(spec: TransformerEncoder) -> bool:
    """Whether weights are loaded, whose shapes decide those of the network."""
    return spec.pretrained or spec.weights is not None


def check_kind(spec: TransformerEncoder, config: Any, size: Size) -> None:
    """A model of images has images, one of clips has clips.

    Raises:
        UserError: it has not.
    """
    kind = config.model_type
    if (kind in CLIPS) == (len(size) == 3):
        return
    taken, given = ("clips", "images") if kind in CLIPS else ("images", "clips")
    cure = "name a model of images"
    if kind not in CLIPS:
        cure = 'set model.encoder.lift = "slices", which reads frame by frame, or name a model of'
        cure += f" clips ({', '.join(CLIPS)})"
    raise UserError(
        f'model.encoder.type = "{spec.type}": {kind} takes {taken}, and the samples are {given}:'
        f" {cure}"
    )


def check_size(spec: TransformerEncoder, config: Any, size: Size) -> None:
    """Inputs are whole numbers of tokens, and clips are of the size of the weights.

    Raises:
        UserError: they are not.
    """
    kind, told = config.model_type, " x ".join(map(str, size))
    place = f'model.encoder.type = "{spec.type}"'
    cell = cell_of(config) if kind in (*PATCHED, *CLIPS) else (1,) * len(size)
    if any(side % step for side, step in zip(size, cell, strict=True)):
        near = [max(1, round(side / step)) * step for side, step in zip(size, cell, strict=True)]
        axes = "frames, rows and columns" if len(cell) == 3 else "pixels"
        raise UserError(
            f"{place}: inputs of {told} are no whole number of its tokens of"
            f" {' x '.join(map(str, cell))} {axes}; {set_size(near)}"
        )
    wanted = stated_size(config)
    if kind in FIXED and has_weights(spec) and wanted is not None and size != wanted:
        raise UserError(
            f"{place}: its weights are of clips of {' x '.join(map(str, wanted))} frames, rows and"
            f" columns, and transformers fits no positions of {kind} to {told}; {set_size(wanted)}"
        )
    if kind == "vjepa2" and size[1] != size[2]:
        raise UserError(f"{place}: {kind} takes square frames, not {told}")
    if getattr(config, "attention_type", None) == "space_only":
        raise UserError(
            'model.encoder.model_kwargs.attention_type: "space_only" reads every frame by itself:'
            ' name a model of images with model.encoder.lift = "slices", or take'
            ' "divided_space_time" or "joint_space_time"'
        )


def set_size(size: Sequence[int]) -> str:
    """The keys that make inputs of a size, as the end of a message."""
    frames = f"data.sampling.frames = {size[0]} and " if len(size) == 3 else ""
    return f"set {frames}data.augmentation.image_size = {size[-2]}"


def fitted_values(spec: TransformerEncoder, config: Any, *, channels: int, size: Size) -> Values:
    """Values of a configuration that follow from the input. Where there are weights, positions keep
    their number and the forward pass fits them to other sizes."""
    values: Values = {}
    kind, free = config.model_type, not has_weights(spec)
    if (key := key_of(config, CHANNELS)) is not None:
        values[key] = channels
    sides, side_key, frames_key = size[-2:], key_of(config, SIDES), key_of(config, FRAMES)
    square = sides[0] == sides[1]
    if kind == "vjepa2" or kind in FIXED or (free and kind in CLIPS):
        assert side_key is not None and frames_key is not None, "models of clips state both"
        # those of TimeSformer are of squares, which its forward pass fits to other frames
        side = sides[1] if square or kind == "timesformer" else sides
        values |= {frames_key: size[0], side_key: side}
    elif free and square and side_key is not None:
        values[side_key] = sides[0]
    return values


# ------------------------------------------------------------------------------------ networks


def build_network(config: Any) -> nn.Module:
    """The network of a configuration with initial weights, without what its last hidden states do
    not need.

    Raises:
        UserError: the configuration makes none.
    """
    kind = model_class(config)
    try:
        net = kind(config, **pooling_argument(kind, config))
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"model.encoder.model_kwargs: transformers cannot build {config.model_type}:"
            f" {type(error).__name__}: {reason(error)}"
        ) from error
    return stripped(net)


def model_class(config: Any) -> Any:
    """The class of a model without a classifier."""
    return library().MODEL_MAPPING[type(config)]


def pooling_argument(kind: type, config: Any) -> dict[str, bool]:
    """The argument about a pooling layer, where there is one: a dense one is left out."""
    if "add_pooling_layer" not in inspect.signature(kind).parameters:
        return {}
    return {"add_pooling_layer": config.model_type in OWN_POOLING}


def stripped(net: Any) -> nn.Module:
    """A model without what makes no hidden states, and with the norm behind its pooling."""
    kind = net.config.model_type
    if kind == "vjepa2":
        del net.predictor
    elif kind == "vit_mae":
        net.config.mask_ratio = 0.0  # it leaves out three quarters of the patches else
    elif kind == "videomae" and net.config.use_mean_pooling:
        net.fc_norm = nn.LayerNorm(net.config.hidden_size)  # of its classifier
    elif kind == "siglip_vision_model":
        net.use_head = False  # which `pool` calls where it is asked for
    return net


class TransformersTrunk(Encoder):
    """A model of transformers; its raw features are `last_hidden_state`, its own vector is what its
    classifier reads."""

    def __init__(self, net: nn.Module, *, sides: Size | None, **facts: Any) -> None:
        """
        Args:
            sides: height and width that its positions are of.
        """
        self.config, self.sides = vars(net)["config"], sides
        self.kind: str = self.config.model_type
        self.of_clips = self.kind in CLIPS
        taken = inspect.signature(type(net).forward).parameters
        self.interpolates = "interpolate_pos_encoding" in taken and not self.of_clips
        self.end_norm = end_norm(net, self.kind)
        prefix = prefix_tokens(net, self.kind)
        has_cls = "cls" in prefix
        super().__init__(net, n_prefix=len(prefix), has_cls=has_cls, channels_last=False, **facts)
        self.prefix = prefix[: self.n_prefix]
        self.raw_call = f"net({'x.transpose(1, 2)' if self.of_clips else 'x'}).last_hidden_state"
        self.pool_call = self.pooling_call()
        for name, parameter in net.named_parameters():
            if name.endswith("mask_token"):  # it stands for masked patches, of which there are none
                parameter.requires_grad_(False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Inputs (B, C, H, W) or (B, C, T, H, W) -> last hidden states, tokens or a map."""
        options: dict[str, Any] = {}
        if self.interpolates and self.sides not in (None, tuple(x.shape[-2:])):
            options["interpolate_pos_encoding"] = True
        if self.kind == "vjepa2":
            options["skip_predictor"] = True
        elif self.kind == "vit_mae":
            options["noise"] = self.order(x)
        return self.net(x.transpose(1, 2) if self.of_clips else x, **options).last_hidden_state

    def order(self, x: Tensor) -> Tensor:
        """Numbers of the patches of inputs, by which ViTMAE sorts them, (B, h w)."""
        patch = self.config.patch_size
        count = (x.shape[-2] // patch) * (x.shape[-1] // patch)
        return torch.arange(count, device=x.device).expand(len(x), -1)

    def pool(self, raw: Tensor) -> Tensor:
        """Last hidden states -> what the classifier of the model reads, (B, D)."""
        pooler = getattr(self.net, "pooler", None)
        if raw.ndim == 4:  # (B, D, h, w)
            if pooler is not None:
                return pooler(raw).flatten(1)
            return part(self.net, "layernorm")(raw.mean((2, 3)))
        if self.kind == "siglip_vision_model" and hasattr(self.net, "head"):
            return part(self.net, "head")(raw)
        if isinstance(pooler, nn.AdaptiveAvgPool1d):
            return pooler(raw.mT).flatten(1)
        if pooler is not None:
            return pooler(raw)
        vector = raw[:, 0] if self.has_cls else raw[:, self.n_prefix :].mean(1)
        return self.norm(vector)

    def norm(self, tokens: Tensor) -> Tensor:
        """A model that norms behind its pooling gives unnormed tokens: that norm, token by
        token."""
        return tokens if self.end_norm is None else part(self.net, self.end_norm)(tokens)

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Hidden states -> tokens (B, N, D), of TimeSformer in the order of time, rows, columns,
        which has those of all frames at a place behind one another."""
        tokens = super().to_tokens(raw)
        if self.kind != "timesformer":
            return tokens
        frames = tokens[:, 1:].unflatten(1, (-1, self.config.num_frames))  # (B, h w, t, D)
        return torch.cat([tokens[:, :1], frames.transpose(1, 2).flatten(1, 2)], 1)

    def grid(self, raw: Tensor, size: torch.Size) -> Size | None:
        """Sides of the grid of tokens; of clips (t, h, w)."""
        if not self.of_clips:
            return super().grid(raw, size)
        return tuple(side // step for side, step in zip(size, cell_of(self.config), strict=True))

    def patch_sides(
        self, patches: int, sizes: list[tuple[int, ...]], image: tuple[int, ...]
    ) -> tuple[float, ...]:
        """Sides of a token, where the configuration says them."""
        if self.kind in (*PATCHED, *CLIPS):
            return tuple(map(float, cell_of(self.config)))
        return super().patch_sides(patches, sizes, image)

    def of_block(self, output: Any) -> Any:
        """Tokens of a block that gives its attention too."""
        return output[0] if isinstance(output, tuple) else output

    # ---------------------------------------------------------------- what outputs equal

    def pooling_call(self) -> str:
        """What the classifier reads, as a call on hidden states {raw}."""
        pooler = getattr(self.net, "pooler", None)
        if self.kind == "siglip_vision_model" and hasattr(self.net, "head"):
            return "net.head({raw})"
        if isinstance(pooler, nn.AdaptiveAvgPool1d):
            return "net.pooler({raw}.mT).flatten(1)"
        if pooler is not None:
            return "net.pooler({raw})" + ".flatten(1)" * (self.layout == 4)
        if self.layout == 4:
            return "net.layernorm({raw}.mean((2, 3)))"
        return self.norm_call("{raw}[:, 0]" if self.has_cls else "{raw}.mean(1)")

    def norm_call(self, tokens: str) -> str:
        """The norm behind the pooling, where there is one."""
        return tokens if self.end_norm is None else f"net.{self.end_norm}({tokens})"


def end_norm(net: nn.Module, kind: str) -> str | None:
    """Name of a norm that the classifier reads tokens through, and hidden states lack."""
    if kind == "clip_vision_model":
        return "post_layernorm"
    if kind == "videomae" and hasattr(net, "fc_norm"):
        return "fc_norm"
    pooler = getattr(net, "pooler", None)
    return "pooler.layernorm" if getattr(pooler, "layernorm", None) is not None else None


def prefix_tokens(net: nn.Module, kind: str) -> tuple[str, ...]:
    """What each token before the patches is, in order: "cls", "distillation" or "register"."""
    named = {name.rpartition(".")[2]: parameter for name, parameter in net.named_parameters()}
    # DINOv3's ConvNeXt puts the mean of its map in front
    has_cls = kind == "dinov3_convnext" or bool({"cls_token", "class_embedding"} & named.keys())
    registers = named["register_tokens"].shape[1] if "register_tokens" in named else 0
    distilled = "distillation_token" in named
    return ("cls",) * has_cls + ("distillation",) * distilled + ("register",) * registers


# ------------------------------------------------------------------------------------- weights


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers tells nothing of what it loads, which is told here."""
    logging = library().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def loaded_state(
    config: Any, place: str | None, tensors: Mapping[str, Tensor] | None, **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a model under the names of its network, as transformers loads them.

    Args:
        config: that the weights are of.
        place: folder or repository; None where the tensors are at hand.

    Returns:
        The tensors, and the names that weights lack, or have in another shape.
    """
    kind = model_class(config)
    has_norm = config.model_type == "videomae" and config.use_mean_pooling
    if has_norm:  # the norm behind the pooling is the classifier's
        kind = library().VideoMAEForVideoClassification
    with quiet(), torch.random.fork_rng(devices=[]):
        model, info = kind.from_pretrained(
            place,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **pooling_argument(kind, config),
            **options,
        )
    state = {name.removeprefix("videomae."): t for name, t in model.state_dict().items()}
    lacking = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    return state, [name.removeprefix("videomae.") for name in lacking]


def fitted(net: nn.Module, state: dict[str, Tensor], lacking: list[str]) -> Tensors:
    """Tensors of the network itself, its first kernels for its channels; without those that are
    lacking."""
    own, first = net.state_dict(), {f"{name}.weight" for name in first_convolutions(net)}
    found = Tensors()
    for name, tensor in state.items():
        if name not in own or name in lacking:
            continue
        refit = name in first and tensor.shape[1] != own[name].shape[1]
        found[name] = fit_rgb(tensor, own[name].shape[1]) if refit else tensor
    return found


def first_convolutions(net: nn.Module) -> tuple[str, ...]:
    """Name of the convolution that sees the input."""
    return tuple(name for name, module in net.named_modules() if is_conv(module))[:1]


def load_as_transformers(config: Any, net: nn.Module, tensors: Tensors) -> None:
    """Load tensors as transformers loads a file of this configuration."""
    state, lacking = loaded_state(config, None, dict(tensors))
    own = net.state_dict()
    begun = {name: own[name] for name in MAY_LACK if name in own}
    net.load_state_dict({**begun, **fitted(net, state, lacking)})


def load_end_norm(path: str, net: nn.Module) -> None:
    """Load the norm behind the pooling of a VideoMAE, which stands beside its network in a file."""
    norm = part(net, "fc_norm")
    for network in read_networks(path):
        end = {
            k.rpartition(".")[2]: v for k, v in network.tensors.items() if ".fc_norm." in f".{k}"
        }
        if end.keys() == {"weight", "bias"} and end["bias"].shape == norm.bias.shape:
            norm.load_state_dict(end)
            return


def load_published(spec: TransformerEncoder, config: Any, net: nn.Module) -> tuple[str, ...]:
    """Load the weights of a folder or repository.

    Returns:
        What the user should know about them, a line each.

    Raises:
        UserError: there are none, they cannot be fetched, or they lack some of the network's.
    """
    place, revision = place_of(spec.type)
    options = {} if revision is None else {"revision": revision}
    try:
        with cache_only_without_network():
            state, lacking = loaded_state(config, place, None, **options)
    except hub_errors() + (ValueError, RuntimeError) as error:
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" cannot be read'
            f" ({type(error).__name__}: {reason(error)}); offline: model.encoder.type ="
            ' "<folder>" with model.safetensors, model.encoder.weights = "<file>", or pretrained ='
            " false"
        ) from error
    found = fitted(net, state, lacking)
    missing = [n for n, _ in net.named_parameters() if n not in found and n not in MAY_LACK]
    if missing:
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" lack, or have in'
            f" another shape, {listed(missing, 3)}: change model_kwargs, or set pretrained = false"
        )
    net.load_state_dict(found, strict=False)
    if all(name in found for name in net.state_dict() if name in END_NORMS):
        return ()
    return (
        f'model.encoder.type = "{spec.type}": its weights lack the norm behind the pooling that a'
        " classifier has, which begins anew",
    )


# ------------------------------------------------------------------------------------ building


def build_transformer(
    spec: TransformerEncoder, *, channels: int, size: Size | None, read_weights: bool
) -> Encoder:
    """The encoder of a Struct, built for its input."""
    library()
    files = files_of(spec)
    if spec.pretrained and spec.weights is None and is_kind(spec.type):
        raise UserError(
            f'model.encoder.type = "{spec.type}" is a kind of model without published weights: name'
            " a repository of the hub or a folder, or set pretrained = false"
        )
    published = configuration(spec, files.config)
    size = size or stated_size(published) or (224, 224)
    check_kind(spec, published, size)
    check_size(spec, published, size)
    values = fitted_values(spec, published, channels=channels, size=size)
    with quiet():
        net = build_network(configuration(spec, {**published.to_dict(), **values}))
    sides = sides_of(vars(net)["config"])
    if files.kind == "timesformer":  # its forward pass fits positions to what these say
        vars(net)["config"].update({"num_frames": size[0], "image_size": size[2]})
    shape = (1, channels, *size)
    encoder = TransformersTrunk(net, sides=sides, name=spec.type, input_shape=shape)
    loading = partial(load_as_transformers, published)
    first = first_convolutions(net)
    encoder.load_target = LoadTarget(net, loading, CLASSIFIERS, first_conv=first)
    if read_weights and spec.weights is not None:
        note = load_file(encoder.load_target, spec.weights, key=spec.weights_key)
        encoder.notes += () if note is None else (note,)
        if encoder.end_norm == "fc_norm":
            load_end_norm(spec.weights, net)
    elif read_weights and spec.pretrained:
        encoder.notes += load_published(spec, published, net)
    if has_weights(spec) and files.preprocessor is None:
        encoder.notes += (
            f'model.encoder.type = "{spec.type}" has no preprocessor_config.json: mean and'
            " deviation are ImageNet's unless data.augmentation says them",
        )
    return encoder


@build_encoder.register
def _(spec: TransformerEncoder, *, channels: int, size: Size | None, load_weights: bool) -> Encoder:
    check_channels(spec, channels)
    return build_transformer(spec, channels=channels, size=size, read_weights=load_weights)


# --------------------------------------------------------------------------------------- input


@preprocess_of.register
def _(spec: TransformerEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    files = files_of(spec)
    sides = sides_of(configuration(spec, files.config)) or (224, 224)
    stated = files.preprocessor
    values = {} if stated is None else completed(files.kind, stated)
    side, crop, mode = resizing(values, sides[0])
    fixed = files.kind in FIXED and has_weights(spec)
    mean, std = normalisation(values, IMAGENET)
    return Preprocess(
        image_size=(sides[0] if fixed else side) if has_weights(spec) else None,
        crop_pct=crop,
        interpolation=interpolation(values),
        mean=fit_channels(mean, channels),
        std=fit_channels(std, channels),
        fixed_size=fixed,
        crop_mode=mode,
    )
