"""Encoders in a spec: of images, volumes and clips, and of images on the others."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from msgspec import Meta
from msgspec.structs import replace

from glovita_lib.spec_conditions import read_if, target_problems
from glovita_lib.spec_errors import PathText, SampleKind, shown
from glovita_lib.spec_lift import (
    OTHER_DATA,
    USUAL_AXES,
    Axis,
    BaseEncoder,
    Channels,
    Folding,
    Inflation,
    Lift,
    LiftedEncoder,
    Lifting,
    OwnChannels,
    Patch,
    Positive,
    Slices,
    WithoutClassToken,
    axis_problems,
)
from glovita_lib.spec_series import (
    InceptionTimeEncoder,
    SeriesResNetEncoder,
    SeriesTransformerEncoder,
)


class ImageEncoder(LiftedEncoder):
    """An encoder of images, which may be lifted to volumes."""

    lift: Lift | None = None
    """How it reads volumes: slice by slice, with kernels of three axes, or (one of volumes) window
    by window; or time series, folded to images. none reads what its network takes."""
    slices: Slices = Slices()
    """Which slices, and what becomes of them."""
    inflation: Inflation = Inflation()
    """How kernels are lifted."""
    folding: Folding = Folding()
    """How a series becomes an image."""

    windowed: ClassVar[bool] = False

    @property
    def takes(self) -> SampleKind:
        return "images" if self.lift is None else "series" if self.lift == "fold" else "volumes"

    def reads(self, samples: str) -> bool:
        """Slices and inflated kernels know no difference between a volume and a clip."""
        return super().reads(samples) or (
            samples == "videos" and self.lift in ("slices", "inflate")
        )

    def of_samples(self, samples: str) -> Self:
        """Axis of slices and of inflated kernels."""
        usual = USUAL_AXES.get(samples)
        if self.lift == "slices":
            return replace(self, slices=replace(self.slices, axis=self.slices.axis or usual))
        if self.lift == "inflate":
            axis = self.inflation.axis or usual
            return replace(self, inflation=replace(self.inflation, axis=axis))
        return self

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        yield from super().sample_problems(samples)
        yield from axis_problems("slices.axis", self.slices.axis, samples)
        yield from axis_problems("inflation.axis", self.inflation.axis, samples)

    @property
    def lifts(self) -> dict[str, tuple[str, Lifting]]:
        return {
            "slices": ("slices", self.slices),
            "inflate": ("inflation", self.inflation),
            "fold": ("folding", self.folding),
            **super().lifts,
        }

    def other_samples(self, samples: str) -> str:
        if samples == "images":
            return "; or leave model.encoder.lift out"
        lift = {"volumes": "slices", "videos": "slices", "series": "fold"}.get(samples)
        return "" if lift is None else f", or set model.encoder.lift = {shown(lift)}"


WITHOUT_CLASS_TOKEN = (
    r"(wide_)?res(net|nex)t?|seresnet|convnext|vgg|(tf_)?efficientnet|(tf_)?mobilenet|densenet"
    r"|regnet|swin|alexnet|squeezenet|googlenet|inception|mnasnet|shufflenet"
)
"""Opening of the names of encoders of timm and torchvision that have no class token."""


WITHOUT_PATCHES = (
    r"bat_|botnet|caformer|coat_small|coatne|convformer|convmixer|convnext|cpubone|crossvit|cs3"
    r"|csatv2|csp|darknet|davit|densenet|dla|dm_nfnet|dpn|eca|edgenext|efficient|ese_|fastvit|fbnet"
    r"|focalnet|gc|gernet|ghostnet|gmixer|gmlp|halo|hardcorenas|hgnet|hiera_|hrnet|iformer"
    r"|inception|lambda|lamhalo|lcnet|legacy|levit|lowformer|mambaout|max|mixer|mixnet|mnasnet"
    r"|mobile|mvit|nasnet|nextvit|nf_|nfnet|pnasnet|poolformer|pvt|rdnet|regnet|rep|res|rexnet"
    r"|sebotnet|sedarknet|sehalonet|selecsls|semnasnet|senet|sequencer|seres|shvit|skres|spnasnet"
    r"|starnet|swiftformer|test_(?!vit)|tf_|tiny_vit|tinynet|tresnet|vgg"
    r"|vit_\w+_(r\d*|resnet\d+d|mci)_|vitamin|vovnet|wide_resnet|xception"
)
"""Opening of the names of encoders of timm of which it builds no patch embedding of an asked size:
without one, behind convolutions, of several sizes (CrossViT), or of one that it states itself."""


class LibraryEncoder(OwnChannels, ImageEncoder, kw_only=True):
    """Fields of the models of a library, by their names there."""

    set_elsewhere: ClassVar[dict[str, str]] = {}
    """Keys of model_kwargs that have, or follow from, a key of their own, and which."""

    type: str
    """Model name."""
    pretrained: bool = True
    """Whether the published weights are downloaded; weights takes a file instead."""
    weights: PathText | None = None
    """File of weights (pth, pt, safetensors) to start from; nothing is downloaded then. An
    adapter.safetensors of a PEFT run stands for its base, which is needed too, with the change
    folded in."""
    weights_key: Annotated[str | None, read_if("weights")] = None
    """Where in the file the network stands, as "state_dict_ema" or "teacher.backbone"; "" is the
    top. none takes the averaged one of several, or the teacher."""
    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""
    model_kwargs: dict[str, Any] = {}
    """Further arguments of the model; an unknown one is an error."""

    @property
    def without_class_token(self) -> str | None:
        named = self.type if re.match(WITHOUT_CLASS_TOKEN, self.type) else None
        return super().without_class_token or named

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        for key, text in argument_problems(self.model_kwargs, self.set_elsewhere):
            yield key, text if self.lifting is None else self.lifting.renamed(text)


def argument_problems(
    arguments: dict[str, Any], set_elsewhere: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """model_kwargs leave alone what has a key of its own, or a mode."""
    for name in arguments:
        if name in set_elsewhere:
            place = set_elsewhere[name]
            cure = "set it there" if place.startswith(("data.", "model.")) else "leave it out"
            text = f"{place}: leave it out" if "=" in place else f"it comes from {place}: {cure}"
            yield f"model_kwargs.{name}", text


FEATURE_MAPS = (
    'mode = "extract" with extract.output = "map" and extract.layers reads maps of blocks'
)


class PatchEncoder(LibraryEncoder, kw_only=True):
    """What the models share whose patches may be of an asked size."""

    def patch_problems(self, patch: Patch, side: int | None) -> Iterator[tuple[str, str]]:
        """Patches divide the image where nothing pads it."""
        pads = self.model_kwargs.get("dynamic_img_pad", False)
        if side is not None and not pads and any(side % one for one in both_sides(patch)):
            yield (
                "patch_size",
                f"an image of {side} pixels is no whole number of patches of {shown(patch)}: change"
                " data.augmentation.image_size or patch_size",
            )

    def with_patch_size(self, patch: Patch) -> Self:
        """As the library's own argument, of which published weights are a matter."""
        size = patch if isinstance(patch, int) or patch[0] != patch[1] else patch[0]
        return replace(self, model_kwargs={**self.model_kwargs, "patch_size": size})


def both_sides(patch: Any) -> tuple[Any, ...]:
    """Height and width of a patch that may be said by one number."""
    return tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)


class TimmEncoder(PatchEncoder, tag="timm", tag_field="encoder_type"):
    """Any image model of timm by its name, e.g. resnet18.a1_in1k."""

    built_in: ClassVar[str] = "encoder_timm"
    set_elsewhere: ClassVar[dict[str, str]] = {
        "pretrained": "model.encoder.pretrained",
        "in_chans": "model.encoder.input_channels",
        "num_classes": "the data",
        "checkpoint_path": "model.encoder.weights",
        "img_size": "data.augmentation.image_size",
        "features_only": FEATURE_MAPS,
        "out_indices": FEATURE_MAPS,
    }

    type: str = "vit_base_patch16_224"
    """Model name; timm.list_models() has them all."""
    weights_order: Annotated[bool, read_if("weights")] = False
    """Whether weights is matched by the order and shape of its tensors, for files of the same
    network under other names."""
    small_images: bool = False
    """Whether a ResNet's stem of stride 4 becomes one of 3x3 convolutions of stride 1, for images
    of about 32 pixels."""

    def patch_problems(self, patch: Patch, side: int | None) -> Iterator[tuple[str, str]]:
        """The model has patches, of one size, which divide the image where nothing pads it."""
        if re.match(WITHOUT_PATCHES, self.type):
            yield (
                "patch_size",
                f"timm builds no patch embedding of an asked size in {self.type}: leave it out, or"
                " name a model that has one, e.g. vit_base_patch16_224",
            )
            return
        stated = self.model_kwargs.get("patch_size")
        if stated is not None and both_sides(stated) != both_sides(patch):
            yield (
                "patch_size",
                f"{shown(patch)}, but model.encoder.model_kwargs.patch_size = {shown(stated)}:"
                " leave one of them out",
            )
        yield from super().patch_problems(patch, side)


class TorchvisionEncoder(LibraryEncoder, tag="torchvision", tag_field="encoder_type"):
    """Any image classification model of torchvision by its name, e.g. convnext_tiny."""

    built_in: ClassVar[str] = "encoder_torchvision"
    set_elsewhere: ClassVar[dict[str, str]] = {
        "num_classes": "the data",
        "weights": "model.encoder.weights",
        "dropout": "model.encoder.dropout",
        "stochastic_depth_prob": "model.encoder.stochastic_depth_prob",
    }

    type: str = "convnext_tiny"
    """Model name; torchvision.models.list_models() has them all."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Dropout inside the model, where the model has it."""
    stochastic_depth_prob: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Probability of skipping the last block, where the model has it."""


class TransformerEncoder(PatchEncoder, tag="transformer", tag_field="encoder_type"):
    """A model of images or clips of Hugging Face's transformers: its last hidden states."""

    built_in: ClassVar[str] = "encoder_transformers"
    set_elsewhere: ClassVar[dict[str, str]] = {
        "num_labels": "the data",
        "num_channels": "model.encoder.input_channels",
        "in_chans": "model.encoder.input_channels",
        "image_size": "data.augmentation.image_size",
        "crop_size": "data.augmentation.image_size",
        "num_frames": "data.sampling.frames",
        "frames_per_clip": "data.sampling.frames",
    }

    type: str = "facebook/dinov2-base"
    """A repository of the Hugging Face hub, with @revision where that is not the main one; a folder
    with config.json and model.safetensors or pytorch_model.bin; or, without published weights, a
    kind of model, e.g. "vit", "dinov2", "videomae", "timesformer", "vivit", "vjepa2"."""
    model_kwargs: dict[str, Any] = {}
    """Values of the model's configuration in the place of those of config.json; an unknown one is
    an error."""

    @property
    def takes(self) -> SampleKind:
        """Which of both config.json says, which is read where the network is built."""
        return "either" if self.lift is None else super().takes

    def reads(self, samples: str) -> bool:
        """Images and clips, and with a lift what that makes images of."""
        if self.lift is None:
            return samples in ("images", "videos")
        return super().reads(samples)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.lift == "inflate":
            yield (
                "lift",
                '"inflate" gives kernels an axis, which a forward pass of transformers does not'
                ' take: set it to "slices", or encoder_type to "timm"',
            )

    def patch_problems(self, patch: Patch, side: int | None) -> Iterator[tuple[str, str]]:
        """A network without weights has patches of any size that divides the image."""
        if self.pretrained or self.weights is not None:
            yield (
                "patch_size",
                "weights are those of patches of their own size: leave it out, or set"
                " model.encoder.pretrained = false",
            )
        else:
            yield from super().patch_problems(patch, side)


Odd = Annotated[int, Meta(ge=1, le=31)]
Probability = Annotated[float, Meta(ge=0, lt=1)]
Voxels = tuple[Positive, Positive, Positive]
ArrayOrder = Literal["xyz", "zyx"]
Side = TypeVar("Side")


class VolumeEncoder(OwnChannels, WithoutClassToken, LiftedEncoder):
    """What the encoders of volumes (C, X, Y, Z) share; none of them has a class token."""

    lift: Literal["windows"] | None = None
    """How it reads whole volumes: window by window; none: as its network does."""

    built_in: ClassVar[str] = "encoder_volume"

    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""

    @property
    def takes(self) -> SampleKind:
        return "volumes"


class ArrayEncoder(VolumeEncoder):
    """What the encoders share whose weights may be of arrays (Z, Y, X), as nnU-Net keeps them."""

    array_order: ArrayOrder = "xyz"
    """Order of the axes in which the network sees a volume. "zyx" is that of the arrays of nnU-Net
    and nnssl; kernels, strides, patches of tokens and weights_shape are then in that order too, as
    in plans.json. All else, maps and tokens among it, stays in the order x, y, z."""

    def turned(self, sides: tuple[Side, ...]) -> tuple[Side, ...]:
        """Sides along x, y and z in the order of the network's axes, or back."""
        return sides[::-1] if self.array_order == "zyx" else sides

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        """Volumes alone have these axes."""
        yield from super().sample_problems(samples)
        if self.array_order == "zyx" and samples == "videos":
            yield "array_order", "it is of volumes, and the samples are videos: leave it out"


class ResidualEncoder(ArrayEncoder, tag="residual_encoder", tag_field="encoder_type"):
    """The residual encoder of nnU-Net (ResEnc, blocks of ResNet-D), of volumes, clips or images;
    the defaults are those of its L preset."""

    spatial_dim: Literal[2, 3] = 3
    """Axes of the input besides the channels: 3 takes volumes and clips, 2 images."""
    features_per_stage: tuple[Positive, ...] = (32, 64, 128, 256, 320, 320)
    """Channels of the stages, from the input; the last is the width."""
    kernel_sizes: Odd | tuple[Odd | tuple[Odd, ...], ...] = 3
    """Side of the kernels, odd: of all, or a number or one per axis for each stage; an axis of
    thick slices has 1 in the first stages."""
    strides: tuple[Positive | tuple[Positive, ...], ...] = (1, 2, 2, 2, 2, 2)
    """Step of the first block of each stage, a number or one per axis."""
    n_blocks_per_stage: Positive | tuple[Positive, ...] = (1, 3, 4, 6, 6, 6)
    """Residual blocks of all stages or of each."""
    conv_bias: bool = True
    """Whether convolutions have a bias, but for those of the skips."""
    norm: Literal["instance", "batch"] = "instance"
    """Normalisation behind each convolution, with scale and shift."""
    dropout_p: Probability = 0.0
    """Probability of dropping a channel behind a convolution of a stage's kernel size."""
    nonlinearity: Literal["relu", "leaky_relu", "gelu"] = "leaky_relu"
    """Activation; the leaky one has slope 0.01 below 0."""
    block_type: Literal["basic", "bottleneck"] = "basic"
    """Two convolutions a block, or three, the outer ones of one voxel."""
    bottleneck_channels: Annotated[
        Positive | tuple[Positive, ...] | None, read_if("block_type", "bottleneck")
    ] = None
    """Channels inside the blocks of all stages or of each."""
    stem_channels: Positive | None = None
    """Channels behind the first convolution; none takes those of the first stage."""
    pool_type: Literal["conv", "avg", "max"] = "conv"
    """What makes a stage's step: its first convolution, or a pooling before it."""
    stochastic_depth_p: Probability = 0.0
    """Probability that training skips a block for a sample."""
    squeeze_excitation: bool = False
    """Whether a block's channels are scaled by what a small network makes of their means."""
    squeeze_excitation_reduction_ratio: Annotated[
        float, Meta(gt=0, le=1), read_if("squeeze_excitation", True)
    ] = 0.0625
    """Hidden channels of that network in proportion to the block's, at least 8."""
    weights: PathText | None = None
    """File of weights (pth, pt, safetensors) under the names of dynamic-network-architectures;
    those of one channel are spread over the input's."""
    weights_key: Annotated[str | None, read_if("weights")] = None
    """Where in the file the network stands, as "state_dict_ema" or "teacher.backbone"; "" is the
    top. none takes the averaged one of several, or the teacher."""

    @property
    def takes(self) -> SampleKind:
        return "volumes" if self.spatial_dim == 3 else "images"

    def reads(self, samples: str) -> bool:
        """Clips too where it has three axes."""
        return super().reads(samples) or (samples == "videos" and self.takes == "volumes")

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        """It takes samples of so many axes."""
        axes = {"images": 2, "volumes": 3, "videos": 3}.get(samples, self.spatial_dim)
        if axes != self.spatial_dim:
            yield (
                "spatial_dim",
                f"{self.spatial_dim} takes {self.takes}, and the samples are {samples}:"
                f"{OTHER_DATA.get(self.takes, '')} set model.encoder.spatial_dim = {axes}",
            )
        else:
            yield from super().sample_problems(samples)

    def problems(self) -> Iterator[tuple[str, str]]:
        """There is an entry a stage and a number an axis."""
        yield from super().problems()
        if self.lift is not None and self.spatial_dim == 2:
            yield "lift", "it cuts volumes, and spatial_dim = 2 takes images: leave it out"
        if self.array_order == "zyx" and self.spatial_dim == 2:
            yield "array_order", "it is of volumes, and spatial_dim = 2 takes images: leave it out"
        stages = len(self.features_per_stage)
        if not stages:
            yield "features_per_stage", "name the channels of one stage at least"
        if self.block_type == "bottleneck" and self.bottleneck_channels is None:
            yield (
                "bottleneck_channels",
                'model.encoder.block_type = "bottleneck" needs them: a number, or one a stage',
            )
        for key in ("kernel_sizes", "strides", "n_blocks_per_stage", "bottleneck_channels"):
            given = getattr(self, key)
            entries = given if isinstance(given, tuple) else (given,) * stages
            if len(entries) != stages:
                yield (
                    key,
                    f"{len(entries)} entries, but model.encoder.features_per_stage has {stages}"
                    " stages: one for each",
                )
            if any(isinstance(e, tuple) and len(e) != self.spatial_dim for e in entries):
                yield key, f"a number, or {self.spatial_dim} for each stage, one per axis"
        sizes = self.kernel_sizes if isinstance(self.kernel_sizes, tuple) else (self.kernel_sizes,)
        sides = [side for size in sizes for side in (size if isinstance(size, tuple) else (size,))]
        if even := [side for side in sides if side % 2 == 0]:
            yield "kernel_sizes", f"{even[0]} is even: only odd kernels keep the size"


class PrimusEncoder(ArrayEncoder, tag="primus", tag_field="encoder_type"):
    """The transformer of volumes by Wald et al. (Primus, 2025): EVA blocks with learned and rotary
    position embeddings over patches of voxels."""

    built_in: ClassVar[str] = "encoder_primus"

    variant: Literal["S", "B", "M", "L"] = "S"
    """Width, blocks and heads: S 396, 12, 6; B 792, 12, 12; M 864, 16, 12; L 1056, 24, 16."""
    input_shape: Voxels | None = None
    """Voxels along x, y and z that the position embedding is made for, as
    data.augmentation.patch_size, whose default it is."""
    patch_embed_size: Voxels = (8, 8, 8)
    """Voxels of a token."""
    drop_path_rate: Probability = 0.0
    """Probability that training skips the last block for a sample; from 0 on in even steps."""
    patch_drop_rate: Probability = 0.0
    """Share of the tokens that training leaves out."""
    weights: PathText | None = None
    """File of weights (pth, pt, safetensors) under the names of dynamic-network-architectures;
    those of one channel are spread over the input's, the position embedding is resampled."""
    weights_key: Annotated[str | None, read_if("weights")] = None
    """Where in the file the network stands, as "state_dict_ema" or "teacher.backbone"; "" is the
    top. none takes the averaged one of several, or the teacher."""
    weights_shape: Annotated[Voxels | None, read_if("weights")] = None
    """Voxels that the position embedding in the file was made for; none takes those that a
    checkpoint of nnU-Net or of a run states, else a cube. Where the input has as many patches and
    is no cube, it is asked for."""

    @property
    def has_patch(self) -> bool:
        return self.input_shape is not None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Inputs are whole numbers of patches."""
        yield from super().problems()
        token = self.patch_embed_size
        for key, of_token in (("input_shape", self.turned(token)), ("weights_shape", token)):
            shape = getattr(self, key)
            if shape and any(s % p for s, p in zip(shape, of_token, strict=True)):
                fitting = [max(1, round(s / p)) * p for s, p in zip(shape, of_token, strict=True)]
                yield (
                    key,
                    f"{shown(shape)} is no whole number of tokens of {shown(of_token)} voxels;"
                    f" nearest {shown(fitting)}",
                )


class NnFoundationEncoder(ArrayEncoder, tag="nnfoundation", tag_field="encoder_type", kw_only=True):
    """A network pretrained with nnssl (nnFoundation, OpenMind): architecture and weights from its
    checkpoint, whose adaptation plan says what it is."""

    built_in: ClassVar[str] = "encoder_nnfoundation"

    array_order: ArrayOrder = "zyx"
    """Order of the axes in which the network sees a volume: "zyx", that of the arrays of nnssl, in
    which weights_shape is too, or "xyz"."""
    checkpoint_path: PathText
    """checkpoint_final.pth of nnssl; its adaptation_plan.json where pretrained = false."""
    pretrained: bool = True
    """Whether its weights are loaded; else the architecture alone is built."""
    drop_path_rate: Probability | None = None
    """Probability that training skips the last block of a Primus for a sample; none takes the
    plan's, else 0.2."""
    input_shape: Voxels | None = None
    """Voxels of the input along x, y and z, the default of data.augmentation.patch_size; none takes
    the plan's recommended downstream patch."""
    weights_shape: Annotated[Voxels | None, read_if("pretrained", True)] = None
    """Voxels that the position embedding of a Primus was made for; none takes those of the plan
    that make as many patches, else a cube. Where the input has as many and is no cube, it is asked
    for."""

    @property
    def has_patch(self) -> bool:
        return True


class ClipEncoder(VolumeEncoder):
    """What the encoders of clips (C, T, H, W) share. They read volumes too, an axis of which takes
    the place of time."""

    built_in: ClassVar[str] = "encoder_video"
    set_elsewhere: ClassVar[dict[str, str]] = {}
    """Keys of model_kwargs that have, or follow from, a key of their own, and which."""

    type: str = ""
    """Model name."""
    pretrained: bool = True
    """Whether the published weights, of Kinetics-400, are downloaded; weights takes a file
    instead."""
    weights: PathText | None = None
    """File of weights (pth, pt, pyth, safetensors) to start from; nothing is downloaded then.
    Position embeddings are resampled to the clip."""
    weights_key: Annotated[str | None, read_if("weights")] = None
    """Where in the file the network stands, as "state_dict_ema" or "teacher.backbone"; "" is the
    top. none takes the averaged one of several, or the teacher."""
    time_axis: Axis | None = None
    """Axis of a volume in the place of time; none is z, and t of clips."""
    return_intermediates: bool = False
    """Whether maps of inner stages are handed to a head that takes raw features, beside the
    output."""
    intermediate_names: Annotated[tuple[str, ...], read_if("return_intermediates", True)] = ()
    """Which of them: "stem", "layer1" ... "layer4", or modules of the network; none named: all
    stages."""
    model_kwargs: dict[str, Any] = {}
    """Further arguments of the model; an unknown one is an error."""

    @property
    def takes(self) -> SampleKind:
        return "videos"

    @property
    def of_clips_alone(self) -> bool:
        """Whether its tokens are made for time and cannot stand for an axis of a volume."""
        return self.type.startswith("mvit")

    @property
    def without_class_token(self) -> str | None:
        return None if self.of_clips_alone and self.lift is None else self.type

    def reads(self, samples: str) -> bool:
        """Clips, and volumes where another axis can stand for time."""
        return super().reads(samples) or (samples == "volumes" and not self.of_clips_alone)

    def of_samples(self, samples: str) -> Self:
        """The axis of time."""
        return replace(self, time_axis=self.time_axis or USUAL_AXES.get(samples))

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        yield from super().sample_problems(samples)
        yield from axis_problems("time_axis", self.time_axis, samples)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from argument_problems(self.model_kwargs, self.set_elsewhere)


class TorchvisionVideoEncoder(ClipEncoder, tag="torchvision_video", tag_field="encoder_type"):
    """A video model of torchvision, of clips or volumes."""

    set_elsewhere: ClassVar[dict[str, str]] = {
        "num_classes": "the data",
        "weights": "model.encoder.weights",
        "pretrained": "model.encoder.pretrained",
        "progress": "model.encoder.pretrained",
    }

    type: Literal[
        "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s",
        "swin3d_t", "swin3d_s", "swin3d_b",
    ] = "r3d_18"  # fmt: skip
    """Model name; the mvit ones read clips alone."""


class PytorchvideoEncoder(ClipEncoder, tag="pytorchvideo", tag_field="encoder_type"):
    """A model of pytorchvideo's hub, of clips or volumes."""

    built_in: ClassVar[str] = "encoder_pytorchvideo"

    set_elsewhere: ClassVar[dict[str, str]] = {
        "model_num_class": "the data",
        "head_num_classes": "the data",
        "pretrained": "model.encoder.pretrained",
        "progress": "model.encoder.pretrained",
        "input_channel": "the data",
        "input_channels": "the data",
        "input_clip_length": "the clips",
        "input_crop_size": "the clips",
        "spatial_size": "the clips",
        "temporal_size": "the clips",
        "slowfast_fusion_conv_stride": "model.encoder.slowfast_alpha",
    }

    type: Literal[
        "x3d_xs", "x3d_s", "x3d_m", "x3d_l", "slow_r50", "c2d_r50", "i3d_r50", "csn_r101",
        "r2plus1d_r50", "slowfast_r50", "slowfast_r101", "slowfast_16x8_r101_50_50",
        "mvit_base_16x4", "mvit_base_32x3",
    ] = "x3d_s"  # fmt: skip
    """Model name; the mvit ones read clips alone."""
    pathway_mode: Literal["auto", "single", "slowfast"] = "auto"
    """Whether a clip enters as it is, or as a slow and a fast pathway; auto: as the model asks."""
    slowfast_alpha: Annotated[
        Positive, read_if("has_pathways", True, words="type = a slowfast model")
    ] = 4
    """Frames of the fast pathway to one of the slow pathway."""

    @property
    def has_pathways(self) -> bool:
        """Whether the model takes a slow and a fast pathway."""
        return self.type.startswith("slowfast")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        mode = "slowfast" if self.has_pathways else "single"
        if self.pathway_mode not in ("auto", mode):
            yield "pathway_mode", f"{self.type} takes {shown(mode)}: leave it out"


class PrecomputedEncoder(BaseEncoder, tag="precomputed", tag_field="encoder_type"):
    """No network: the samples of data set precomputed_features are features already."""

    built_in: ClassVar[str] = "encoder_custom"

    feature_dim: Annotated[int, Meta(ge=1)] | None = None
    """Width of the features; none takes the file's, a number is checked."""

    @property
    def takes(self) -> SampleKind:
        return "features"


class CustomEncoder(
    OwnChannels, ImageEncoder, tag="custom", tag_field="encoder_type", kw_only=True
):
    """An encoder of your own: a function of your package that returns a module."""

    built_in: ClassVar[str] = "encoder_custom"
    windowed: ClassVar[bool] = True

    target: str
    """Where the function is: "package.module:function"; called as function(input_channels=...,
    **options). Its module gives vectors (B, D), maps (B, D, H, W), of volumes (B, D, X, Y, Z), of
    series (B, D, N), or tokens (B, N, D), of which its attributes n_prefix and has_cls say what
    comes before the patches. Series (B, C, T) that differ in length or lack values come with an
    argument mask (B, T), True where a time point counts."""
    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""

    @property
    def takes(self) -> SampleKind:
        return "either" if self.lift is None else super().takes

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from target_problems(self.target)


Encoder = (
    TimmEncoder
    | TorchvisionEncoder
    | TransformerEncoder
    | ResidualEncoder
    | PrimusEncoder
    | NnFoundationEncoder
    | TorchvisionVideoEncoder
    | PytorchvideoEncoder
    | InceptionTimeEncoder
    | SeriesResNetEncoder
    | SeriesTransformerEncoder
    | PrecomputedEncoder
    | CustomEncoder
)
