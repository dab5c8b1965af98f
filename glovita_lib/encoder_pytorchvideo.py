"""Encoders of clips of pytorchvideo's hub: X3D, Slow, SlowFast, CSN, R(2+1)D, MViT.

Its models alone are imported: its transforms cannot be beside today's torchvision.

B batch, C channels, T H W frames, rows and columns, t h w of a map, D width.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from glovita_lib.encoder import (
    Encoder,
    Preprocess,
    build_encoder,
    check_channels,
    clip_size_of,
    fit_channels,
    preprocess_of,
)
from glovita_lib.encoder_video import (
    STAGES,
    ClipTrunk,
    MvitTrunk,
    Size,
    default_size,
    encoder_arguments,
    finished,
    fit_layers,
    load_target,
    mvit_stages,
    part,
    preprocess_of_clips,
)
from glovita_lib.errors import UserError, reason
from glovita_lib.spec_encoders import PytorchvideoEncoder
from glovita_lib.spec_lift import AXES
from glovita_lib.weights import LoadTarget, load_file, load_tensors


class SlowFastTrunk(ClipTrunk):
    """A network of two pathways (Feichtenhofer et al., "SlowFast Networks for Video Recognition",
    ICCV 2019); its map has their channels side by side, the fast ones averaged to the slow frames.

    The slow pathway sees T / alpha frames, evenly from the first to the last as pytorchvideo's
    published weights were trained: frame floor(i (T - 1) / (T / alpha - 1)) as slow frame i.
    """

    pathways: ClassVar[str] = "slowfast"

    def __init__(self, net: nn.Module, *, alpha: int, **facts: Any) -> None:
        self.alpha = alpha
        super().__init__(net, **facts)

    def run(self, x: Tensor) -> Tensor:
        """A clip (B, C, T, H, W) -> map (B, D, T / alpha, h, w)."""
        frames = x.shape[2]
        slow = torch.linspace(0, frames - 1, frames // self.alpha, device="cpu").long()
        pathways = [x[:, :, slow.tolist()], x]
        return side_by_side(*super().run(pathways))

    def of_block(self, output: Any) -> Any:
        """Both pathways side by side as in the map."""
        return side_by_side(*output) if isinstance(output, list) else output

    def map_of(self, module: nn.Module, output: Any) -> Tensor | None:
        """Both pathways side by side, the slow one repeated to the frames of the fast one."""
        if not isinstance(output, list):
            return super().map_of(module, output)
        slow, fast = output
        return torch.cat([slow.repeat_interleave(fast.shape[2] // slow.shape[2], 2), fast], dim=1)


def side_by_side(slow: Tensor, fast: Tensor) -> Tensor:
    """Maps of two pathways (B, D, t, h, w), the fast one averaged to the frames of the slow one."""
    return torch.cat([slow, fast.unflatten(2, (slow.shape[2], -1)).mean(3)], dim=1)


class Clips(NamedTuple):
    """The clips that published weights were trained on."""

    frames: int
    side: int
    """Pixels of a frame, of the centre of a frame whose shorter side is `resize`."""
    resize: int


CLIPS = {
    "x3d_xs": Clips(4, 160, 182),
    "x3d_s": Clips(13, 160, 182),
    "x3d_m": Clips(16, 224, 256),
    "x3d_l": Clips(16, 312, 356),
    "csn_r101": Clips(32, 224, 256),
    "r2plus1d_r50": Clips(16, 224, 256),
    "slowfast_r50": Clips(32, 224, 256),
    "slowfast_r101": Clips(32, 224, 256),
    "slowfast_16x8_r101_50_50": Clips(64, 224, 256),
    "mvit_base_16x4": Clips(16, 224, 256),
    "mvit_base_32x3": Clips(32, 224, 256),
}
USUAL = Clips(8, 224, 256)  # of the others
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def hub_builder(spec: PytorchvideoEncoder) -> Callable[..., nn.Module]:
    """pytorchvideo's function that builds a model.

    Raises:
        UserError: the package is not there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fvcore scripts a function at import
            from pytorchvideo.models import hub
    except ImportError as error:
        raise UserError(
            'model.encoder.encoder_type = "pytorchvideo": the package is missing'
            f' ({reason(error)}); pip install "glovita[pytorchvideo]"'
        ) from error
    return getattr(hub, spec.type)


def hub_arguments(spec: PytorchvideoEncoder, channels: int, size: Size) -> dict[str, Any]:
    """Arguments of the builder that follow from the input."""
    if spec.type.startswith("mvit"):
        return {"input_channels": channels, "temporal_size": size[0], "spatial_size": size[1:]}
    if not spec.has_pathways:
        return {"input_channel": channels}
    step = (spec.slowfast_alpha, 1, 1)
    return {"input_channels": (channels, channels), "slowfast_fusion_conv_stride": step}


def check_frames(spec: PytorchvideoEncoder, size: Size) -> None:
    """The slow pathway takes every so many frames of a clip.

    Raises:
        UserError: the clip is no multiple.
    """
    frames, alpha = size[AXES[spec.time_axis]], spec.slowfast_alpha
    if spec.has_pathways and frames % alpha:
        fitting = sorted({max(1, frames // alpha) * alpha, -(-frames // alpha) * alpha})
        raise UserError(
            f"{spec.type} takes whole multiples of model.encoder.slowfast_alpha = {alpha} frames,"
            f" not {frames}; nearest {' or '.join(map(str, fitting))}"
        )


def pytorchvideo_trunk(
    spec: PytorchvideoEncoder, net: nn.Module, facts: dict[str, Any], size: Size
) -> ClipTrunk:
    """The encoder around a network of pytorchvideo, its classifier taken off."""
    if spec.type.startswith("mvit"):
        head = part(net, "head")
        head.proj = nn.Identity()
        tail = ("head.dropout",) * (head.dropout is not None)
        chain = ("patch_embed.patch_model", "cls_positional_encoding", "blocks", "norm_embed")
        stages = mvit_stages(net.get_submodule("blocks"), chain[0])
        trunk: ClipTrunk = MvitTrunk(net, chain=chain, tail=tail, stages=stages, **facts)
        grid = tuple(part(net, chain[1]).patch_embed_shape)
        trunk.load_target = load_target(trunk, "head.proj", grid)
        return trunk
    blocks = dict(net.get_submodule("blocks").named_children())
    names = [f"blocks.{number}" for number in blocks]
    head = part(net, names[-1])
    head.proj = nn.Identity()
    fit_layers(net)
    paths = [n for n, block in zip(names[:-1], blocks.values(), strict=False) if is_stage(block)]
    arguments = {"stages": dict(zip(STAGES, paths, strict=True)), **facts}
    dropout = [f"{names[-1]}.dropout"] * (head.dropout is not None)
    if spec.has_pathways:
        tail = (f"{names[-2]}.pool.0", *dropout)
        trunk = SlowFastTrunk(
            net, alpha=spec.slowfast_alpha, chain=tuple(names[:-2]), tail=tail, **arguments
        )
    else:
        tail = (f"{names[-1]}.pool", *dropout)
        trunk = ClipTrunk(net, chain=tuple(names[:-1]), tail=tail, **arguments)
    trunk.load_target = load_target(trunk, f"{names[-1]}.proj")
    return trunk


def is_stage(block: nn.Module) -> bool:
    """Whether a block of pytorchvideo's networks has weights: no pooling between stages."""
    return any(True for _ in block.parameters())


def construct_hub(spec: PytorchvideoEncoder, arguments: dict[str, Any]) -> nn.Module:
    """The network of a Struct.

    Raises:
        UserError: an argument that the model does not have.
    """
    builder = hub_builder(spec)
    try:
        return builder(**arguments, **spec.model_kwargs)
    except (TypeError, AssertionError, ValueError, KeyError, IndexError, RuntimeError) as error:
        if not spec.model_kwargs:
            raise
        culprit = next((k for k in spec.model_kwargs if f"'{k}'" in str(error)), None)
        place = "model_kwargs" if culprit is None else f"model_kwargs.{culprit}"
        raise UserError(
            f"model.encoder.{place}: {spec.type} does not take it ({reason(error)})"
        ) from error


@build_encoder.register
def _(
    spec: PytorchvideoEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    size = size or default_size(spec)
    check_frames(spec, size)
    net = construct_hub(spec, hub_arguments(spec, channels, size))
    facts = encoder_arguments(spec, channels=channels, size=size, cls=spec.type.startswith("mvit"))
    encoder = pytorchvideo_trunk(spec, net, facts, size)
    if load_weights:
        note = load_hub_file(encoder.load_target, spec)
        encoder.notes += () if note is None else (note,)
    return finished(encoder, spec)


def load_hub_file(target: LoadTarget, spec: PytorchvideoEncoder) -> str | None:
    """Load the file of the spec, or the published weights; a note on what was taken.

    Raises:
        UserError: they cannot be fetched; names the way without a network.
    """
    if spec.weights is not None:
        return load_file(target, spec.weights, key=spec.weights_key)
    if not spec.pretrained:
        return None
    url = sys.modules[hub_builder(spec).__module__].checkpoint_paths[spec.type]
    try:
        content = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:  # URLError is one
        raise UserError(
            f'model.encoder.pretrained = true: the weights of "{spec.type}" cannot be downloaded'
            f' ({type(error).__name__}); offline: model.encoder.weights = "<file>" (pyth, pth, pt,'
            " safetensors), or pretrained = false"
        ) from error
    load_tensors(target, content["model_state"], source=url)
    return None


@preprocess_of.register
def _(spec: PytorchvideoEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    clips = CLIPS.get(spec.type, USUAL)
    return preprocess_of_clips(
        spec,
        side=clips.side,
        resize=clips.resize,
        mean=fit_channels(MEAN, channels),
        std=fit_channels(STD, channels),
    )


@clip_size_of.register
def _(spec: PytorchvideoEncoder) -> tuple[int, int, int] | None:
    clips = CLIPS.get(spec.type, USUAL)
    return (clips.frames, clips.side, clips.side)
