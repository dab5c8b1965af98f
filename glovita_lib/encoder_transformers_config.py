"""Configurations of Hugging Face's transformers: what the files beside the weights of a model say,
which sizes and channels its network is built for, and what preprocessor_config.json says of inputs.

B batch, T H W frames, rows and columns.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from glovita_lib.encoder import (
    Preprocess,
    check_channels,
    file_facts,
    fit_channels,
    preprocess_of,
    with_facts,
)
from glovita_lib.encoder_hub import (
    completed,
    interpolation,
    normalisation,
    read_json,
    read_preprocessor,
    resizing,
)
from glovita_lib.encoder_torchvision import IMAGENET
from glovita_lib.errors import UserError, meant, reason, refuse
from glovita_lib.spec_encoders import TransformerEncoder, argument_problems
from glovita_lib.weights import beside_tensors, read_networks

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
CHANNELS = ("num_channels", "in_chans")
SIDES = ("image_size", "crop_size")
FRAMES = ("num_frames", "frames_per_clip")
OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
OF_BACKBONES = {"out_features", "out_indices", "stage_names"}  # which name layers that may be fewer


# -------------------------------------------------------------------------------- what files say


class BuiltTransformer(TransformerEncoder, tag="transformer", kw_only=True):
    """The section of a trained run, with what the files of its model say."""

    config: dict[str, Any]
    """Content of config.json, of a model of text and images that of the images."""
    preprocessor: dict[str, Any] | None
    """Content of preprocessor_config.json."""
    weights_size: list[int] | None
    """Sides of the inputs that its weights were of when the run began, so far as they are known."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the files beside the weights of a model say."""

    config: Values
    preprocessor: Values | None
    size: Size | None
    """(T, H, W) or (H, W) of the inputs that the weights are of; None: unknown, or no weights."""

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
        size = None if spec.weights_size is None else tuple(spec.weights_size)
        return ModelFiles(spec.config, spec.preprocessor, size)
    if is_kind(spec.type):
        return sized(spec, {"model_type": spec.type}, None)
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
    return sized(spec, config, read_preprocessor(spec.type, clips=config["model_type"] in CLIPS))


def is_kind(name: str) -> bool:
    """Whether a name is that of a kind of model, and no folder."""
    return name in (*IMAGES, *CLIPS) and not Path(name).is_dir()


def kinds_meant(spec: TransformerEncoder) -> str:
    """The kind of model that a name may have meant, as the end of a message."""
    return meant(spec.type, [*IMAGES, *CLIPS]) if "/" not in spec.type else ""


@file_facts.register
def _(spec: TransformerEncoder) -> dict[str, Any] | None:
    files = files_of(spec)
    size = None if files.size is None else list(files.size)
    return {"config": files.config, "preprocessor": files.preprocessor, "weights_size": size}


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
        stated = {key: value for key, value in values.items() if key not in OF_BACKBONES}
        return kind.from_dict({**stated, **spec.model_kwargs, **OUTPUTS})
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


def check_size(spec: TransformerEncoder, config: Any, size: Size, of_weights: Size | None) -> None:
    """Inputs are whole numbers of tokens, and clips are of the size of the weights.

    Args:
        of_weights: size of the inputs that the weights are of.

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
    if kind in FIXED and of_weights is not None and size != of_weights:
        raise UserError(
            f"{place}: its weights are of clips of {' x '.join(map(str, of_weights))} frames, rows"
            f" and columns, and transformers fits no positions of {kind} to {told};"
            f" {set_size(of_weights)}"
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


def fitted_values(config: Any, *, channels: int, size: Size, of_weights: Size | None) -> Values:
    """Values of a configuration that follow from the input. Where weights are of a known size,
    positions keep their number and the forward pass fits them to other sizes."""
    values: Values = {}
    if (key := key_of(config, CHANNELS)) is not None:
        values[key] = channels
    kind, free, square = config.model_type, of_weights is None, size[-2] == size[-1]
    if kind == "vjepa2" or kind in FIXED or (free and (square or kind in CLIPS)):
        values |= size_values(config, size)
    return values


def size_values(config: Any, size: Size) -> Values:
    """A size (T, H, W) or (H, W) as the values of a configuration that state it."""
    values: Values = {}
    sides = size[-2:]
    if len(size) == 3 and (frames_key := key_of(config, FRAMES)) is not None:
        values[frames_key] = size[0]
    if (side_key := key_of(config, SIDES)) is not None:
        # those of TimeSformer are of squares, which its forward pass fits to other frames
        square = sides[0] == sides[1] or config.model_type == "timesformer"
        values[side_key] = sides[1] if square else sides
    return values


# --------------------------------------------------------------------------- sizes of weights

POSITIONS = re.compile(
    r"(^|\.)(position_embeddings|position_embedding\.weight|time_embeddings|"
    r"relative_position_bias_table)$"
)
"""Names of the tensors whose rows are positions."""


def sized(spec: TransformerEncoder, values: Values, preprocessor: Values | None) -> ModelFiles:
    """What files say, the configuration with the size of the inputs that the weights are of."""
    if not has_weights(spec):
        return ModelFiles(values, preprocessor, None)
    config = configuration(spec, values)
    size = weights_size(spec, config)
    if size is not None:
        values = {**values, **size_values(config, size)}
    return ModelFiles(values, preprocessor, size)


def weights_size(spec: TransformerEncoder, config: Any) -> Size | None:
    """Size of the inputs that weights are of. Those of a file are of the size that its positions
    have; where they tell none, of that of the run that wrote it, or that config.json states."""
    stated = None if is_kind(spec.type) else stated_size(config)
    if spec.weights is None:
        return stated
    kind, rows = config.model_type, rows_of_positions(spec.weights)
    of_places = rows.get("position_embeddings", set()) | rows.get("weight", set())
    if kind in FIXED:  # rows are of cells of all frames, or none, as they follow from a formula
        size = run_size(spec.weights) or stated
        fits = size is None or not of_places or math.prod(grid_of(config, size)) + 1 in of_places
        return size if fits else None
    if stated is not None and kind in PATCHED:
        cells = math.prod(grid_of(config, stated))
        if of_places & {cells, cells + 1, cells + 2}:
            return stated
    found = {side for count in of_places if (side := side_of_square(count)) is not None}
    if not of_places and kind in ("beit", "data2vec-vision"):
        found = {
            (math.isqrt(count - 3) + 1) // 2  # (2 h - 1)(2 w - 1) differences, and three of CLS
            for count in rows.get("relative_position_bias_table", ())
            if count > 3 and math.isqrt(count - 3) ** 2 == count - 3
        }
    if len(found) != 1:
        return None if of_places else stated
    (side,) = found
    sides = tuple(side * step for step in cell_of(config)[-2:])
    if kind != "timesformer":
        return sides
    frames = [*rows.get("time_embeddings", ())]
    return (frames[0], *sides) if len(frames) == 1 else None


def grid_of(config: Any, size: Size) -> Size:
    """Cells along each axis of an input."""
    return tuple(side // step for side, step in zip(size, cell_of(config), strict=True))


def side_of_square(count: int) -> int | None:
    """Side of the square of patches of so many positions, which are of up to two tokens more."""
    side = math.isqrt(count)
    return side if side and count - side**2 <= 2 else None


def rows_of_positions(path: str) -> dict[str, set[int]]:
    """How many positions the tensors of a file have, by the last word of their names."""
    try:
        about = Path(path).stat()
    except OSError:
        return {}  # who loads it says so
    return rows_in(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4)
def rows_in(path: str, changed: int, size: int) -> dict[str, set[int]]:
    """See `rows_of_positions`; of a file that has changed anew."""
    rows: dict[str, set[int]] = {}
    for network in read_networks(path):
        for name, tensor in network.tensors.items():
            of_text = re.search(r"(^|[._])text_", name) is not None
            if POSITIONS.search(name) and not of_text and tensor.ndim > 1:
                rows.setdefault(name.rpartition(".")[2], set()).add(tensor.shape[-2])
    return rows


def run_size(path: str) -> Size | None:
    """(T, H, W) of the clips of the run that wrote a file; None of files of others."""
    try:
        inputs = beside_tensors(path)["resolved"]["inputs"]
        side = inputs["augmentation"]["image_size"]
        return (inputs["sampling"]["frames"], side, side) if inputs["kind"] == "videos" else None
    except (KeyError, TypeError):  # another's file
        return None


# --------------------------------------------------------------------------------------- input


@preprocess_of.register
def _(spec: TransformerEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    files = files_of(spec)
    sides = sides_of(configuration(spec, files.config)) or (224, 224)
    stated = files.preprocessor
    values = {} if stated is None else completed(files.kind, stated)
    side, crop, mode = resizing(values, sides[0])
    fixed = files.kind in FIXED and files.size is not None
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
