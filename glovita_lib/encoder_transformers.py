"""Encoders of Hugging Face's transformers: models of images and of clips, from a repository of the
hub, a folder, or a kind of model and its configuration.

A model is built by its own class as config.json says, and loads files by transformers' own rules,
which rename what older versions have written. Its forward pass is transformers' own.

B batch, N tokens, D width, C channels, T H W frames, rows and columns, t h w of the grid.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from glovita_lib.encoder import Encoder, build_encoder, check_channels
from glovita_lib.encoder_hub import (
    cache_only_without_network,
    hub_errors,
    lack_of_preprocessor,
    place_of,
)
from glovita_lib.encoder_transformers_config import (
    CHANNELS,
    CLIPS,
    PATCHED,
    Size,
    cell_of,
    check_kind,
    check_size,
    configuration,
    files_of,
    fitted_values,
    has_weights,
    is_kind,
    key_of,
    library,
    sides_of,
    stated_size,
)
from glovita_lib.encoder_video import fit_rgb, part
from glovita_lib.errors import UserError, listed, meant, reason
from glovita_lib.network import is_conv
from glovita_lib.spec_encoders import TransformerEncoder
from glovita_lib.weights import LIBRARY_ERRORS, LoadTarget, Tensors, load_file, read_networks

OWN_POOLING = ("beit", "data2vec-vision", "swin", "swinv2")
"""Those whose pooling layer is a mean or a token and a norm; the dense one of others is trained in
few files, and no classifier of theirs reads it."""
END_NORMS = ("fc_norm.weight", "fc_norm.bias", "pooler.layernorm.weight", "pooler.layernorm.bias")
MAY_LACK = (*END_NORMS, "embeddings.mask_token")
"""What some files lack: a norm of the classifier, which begins as none, and what is not read."""
UNREAD = ("mask_token", "position_ids", "relative_position_index", "inv_freq")
"""Ends of names of what is read in pretraining alone, or follows from a formula."""
CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "decoder", "predictor")


# ------------------------------------------------------------------------------------ networks


def build_network(spec: TransformerEncoder, config: Any) -> nn.Module:
    """The network of a configuration with initial weights, without what its last hidden states do
    not need.

    Raises:
        UserError: the configuration makes none.
    """
    kind = model_class(config)
    place = f"model.encoder.{'model_kwargs' if spec.model_kwargs else 'type'}"
    activations = library().activations.ACT2FN
    for key, value in config.to_dict().items():
        if key.endswith("_act") and isinstance(value, str) and value not in activations:
            raise UserError(
                f'{place}: {config.model_type} has {key} = "{value}", which transformers lacks'
                f"{meant(value, [*activations])}; valid: {listed(activations, 99)}"
            )
    try:
        net = kind(config, **pooling_argument(kind, config))
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"{place}: transformers cannot build {config.model_type}:"
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
    """A model of transformers; its raw features are `last_hidden_state`, its own vector is the
    `pooler_output` of those whose classifier or comparison with texts reads it, else the CLS token
    or the mean of the patches, normed as its classifier has it."""

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
        """Last hidden states -> the model's own vector, (B, D)."""
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
        """What `pool` gives, as a call on hidden states {raw}."""
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


@dataclass(frozen=True, slots=True)
class LoadedState:
    """Tensors of a model under the names of its network, as transformers loads them."""

    tensors: dict[str, Tensor]
    lacking: list[str]
    """Names that weights lack, or have in another shape."""
    unexpected: list[str]
    """Names in weights that the network lacks."""


def loaded_state(
    config: Any, place: str | None, tensors: Mapping[str, Tensor] | None, **options: Any
) -> LoadedState:
    """Load weights as transformers does.

    Args:
        config: that the weights are of.
        place: folder or repository; None where the tensors are at hand.
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
    lacking = [name.removeprefix("videomae.") for name in lacking]
    return LoadedState(state, lacking, sorted(info["unexpected_keys"]))


def of_other_layers(net: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of names beyond a network's own that stand inside of its parts: layers that it lacks.
    Others are of what stands beside it in a whole model, such as a classifier or a text tower."""
    parts = {name for name, inner in net.named_children() if [*inner.parameters()]}
    front = f"{net.base_model_prefix}."
    found = []
    for name in names:
        if name.endswith(UNREAD):
            continue
        spelled = (name.removeprefix(front), name)  # a part may have the name of the whole
        found += [each for each in spelled if each.partition(".")[0] in parts][:1]
    return found


def fitted(net: nn.Module, state: LoadedState) -> Tensors:
    """Tensors of the network itself, its first kernels for its channels; without those that are
    lacking."""
    own, first = net.state_dict(), {f"{name}.weight" for name in first_convolutions(net)}
    found = Tensors()
    for name, tensor in state.tensors.items():
        if name not in own or name in state.lacking:
            continue
        refit = name in first and tensor.shape[1] != own[name].shape[1]
        found[name] = fit_rgb(tensor, own[name].shape[1]) if refit else tensor
    return found


def first_convolutions(net: nn.Module) -> tuple[str, ...]:
    """Name of the convolution that sees the input."""
    return tuple(name for name, module in net.named_modules() if is_conv(module))[:1]


def load_as_transformers(config: Any, net: nn.Module, tensors: Tensors) -> None:
    """Load tensors as transformers loads a file of this configuration, but for the channels, which
    are those of the file."""
    own = net.state_dict()
    key, channels = key_of(config, CHANNELS), channels_of(net, tensors)
    if key is not None and channels is not None:
        config = type(config).from_dict({**config.to_dict(), key: channels})
    state = loaded_state(config, None, dict(tensors))
    begun = {name: own[name] for name in MAY_LACK if name in own}
    beyond = dict.fromkeys(of_other_layers(net, state.unexpected), torch.empty(0))
    net.load_state_dict({**begun, **fitted(net, state), **beyond})


def channels_of(net: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """Channels of the input in weights, by the kernel that sees it: that of its name, else the one
    that is like it but for its channels; None where there is none or several."""
    for name in first_convolutions(net):
        own = net.get_parameter(f"{name}.weight")
        named = tensors.get(f"{name}.weight")
        alike = {
            t.shape[1] for t in ([named] if named is not None else tensors.values())
            if t.ndim == own.ndim and t[:, 0].shape == own[:, 0].shape
        }  # fmt: skip
        return alike.pop() if len(alike) == 1 else None
    return None


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


def unreadable() -> tuple[type[Exception], ...]:
    """What reading a broken file of weights raises."""
    from safetensors import SafetensorError

    return (SafetensorError, UnpicklingError, EOFError)


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
            state = loaded_state(config, place, None, **options)
    except hub_errors() + LIBRARY_ERRORS + unreadable() as error:
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" cannot be read'
            f" ({type(error).__name__}: {reason(error)}); offline: model.encoder.type ="
            ' "<folder>" with model.safetensors, model.encoder.weights = "<file>", or pretrained ='
            " false"
        ) from error
    found = fitted(net, state)
    missing = [n for n, _ in net.named_parameters() if n not in found and n not in MAY_LACK]
    if missing:
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" lack, or have in'
            f" another shape, {listed(missing, 3)}: change model_kwargs, or set pretrained = false"
        )
    if beyond := of_other_layers(net, state.unexpected):
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" hold more than the'
            f" network, {listed(beyond, 3)}: change model_kwargs or config.json, or set pretrained"
            " = false"
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
    check_size(spec, published, size, files.size)
    values = fitted_values(published, channels=channels, size=size, of_weights=files.size)
    with quiet():
        net = build_network(spec, configuration(spec, {**published.to_dict(), **values}))
    sides = sides_of(vars(net)["config"])
    if files.kind == "timesformer":  # its forward pass fits positions to what these say
        vars(net)["config"].update({"num_frames": size[0], "image_size": size[2]})
    shape = (1, channels, *size)
    encoder = TransformersTrunk(net, sides=sides, name=spec.type, input_shape=shape)
    if files.size is None:  # weights are of this size, or have no positions
        values = {key: value for key, value in values.items() if key not in CHANNELS}
        published = configuration(spec, {**published.to_dict(), **values})
    loading = partial(load_as_transformers, published)
    first = first_convolutions(net)
    encoder.load_target = LoadTarget(net, loading, CLASSIFIERS, first_conv=first)
    if read_weights and spec.weights is not None:
        note = load_file(encoder.load_target, spec.weights, key=spec.weights_key)
        encoder.notes += () if note is None else (note,)
        if encoder.end_norm == "fc_norm":
            load_end_norm(spec.weights, net)
        if files.size is None and files.kind == "videomae":
            encoder.notes += (
                f'weights = "{spec.weights}" does not say of clips of which size it is: positions'
                f" are those of {' x '.join(map(str, size))} frames, rows and columns",
            )
    elif read_weights and spec.pretrained:
        encoder.notes += load_published(spec, published, net)
    if has_weights(spec) and files.preprocessor is None:
        encoder.notes += (lack_of_preprocessor(spec.type),)
    return encoder


@build_encoder.register
def _(spec: TransformerEncoder, *, channels: int, size: Size | None, load_weights: bool) -> Encoder:
    check_channels(spec, channels)
    return build_transformer(spec, channels=channels, size=size, read_weights=load_weights)
