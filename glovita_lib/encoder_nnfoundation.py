"""Networks pretrained with nnssl (nnFoundation, OpenMind): architecture and weights as the
adaptation plan in a checkpoint says.

A checkpoint holds `network_weights` and a `nnssl_adaptation_plan`: the architecture, the patch it
was pretrained on, and below which names its encoder and its stem stand. Decoders stay out. Files
hold tensors and plain values only; class names in them are looked up in tables, not imported.
"""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch
from msgspec.structs import asdict
from msgspec.structs import replace as with_fields
from torch import Tensor

from glovita_lib.encoder import (
    Encoder,
    build_encoder,
    check_channels,
    file_facts,
    patch_size_of,
    with_facts,
)
from glovita_lib.encoder_primus import LAYER_SCALE, WIDTHS, PrimusShape, build_primus, input_size
from glovita_lib.encoder_volume import SLOPE, Size, build_residual
from glovita_lib.errors import UserError, listed, reason
from glovita_lib.spec_encoders import NnFoundationEncoder, ResidualEncoder
from glovita_lib.spec_errors import shown
from glovita_lib.weights import load_tensors

Voxels = tuple[int, int, int]
PLAN = "nnssl_adaptation_plan"
NEEDED = ("architecture_plans", "key_to_encoder", "key_to_stem")
PATCHES = ("pretrain_patch_size", "recommended_downstream_patchsize")
PRESETS = ("ResEncL", "NoSkipResEncL")  # one encoder with two decoders
PRIMUS_PRESETS = tuple(f"Primus{variant}" for variant in WIDTHS)
PATCH = (8, 8, 8)  # voxels of a token of those
DROP_PATH = 0.2  # where a plan names none

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "conv_op": ("spatial_dim", {"Conv3d": 3}),
    "norm_op": ("norm", {"InstanceNorm3d": "instance", "BatchNorm3d": "batch"}),
    "nonlin": ("nonlinearity", {"ReLU": "relu", "LeakyReLU": "leaky_relu", "GELU": "gelu"}),
    "block": ("block_type", {"": "basic", "BasicBlockD": "basic", "BottleneckD": "bottleneck"}),
}
"""Classes among the arguments of ResidualEncoderUNet: field of our section and its value by the
last part of the class's name."""
FIELDS = (
    "features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage", "conv_bias",
    "bottleneck_channels", "stem_channels",
)  # fmt: skip
USUAL: dict[str, dict[str, Any]] = {
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin_kwargs": {"inplace": True, "negative_slope": SLOPE},
    "dropout_op_kwargs": {"inplace": True},
}
"""The only values of arguments of those classes that our layers have."""
OF_DECODERS = ("n_conv_per_stage_decoder", "deep_supervision", "num_classes", "input_channels")


class PlannedEncoder(NnFoundationEncoder, tag="nnfoundation", kw_only=True):
    """The section of a trained run, with the plan that it was built from."""

    plan: dict[str, Any]
    """What `Plan.facts` gave."""


class Plan:
    """What a file of nnssl says of its network. Every error names the file."""

    def __init__(self, path: str, kept: dict[str, Any] | None = None) -> None:
        """Args:
        path: of the file.
        kept: the facts of one that was read before; then no file is read.
        """
        self.path = Path(path)
        content = self.read() if kept is None else kept
        plan = content.get(PLAN, content) if isinstance(content, dict) else {}
        if missing := [key for key in NEEDED if not (isinstance(plan, dict) and plan.get(key))]:
            raise self.refused(f"has no {PLAN} with {listed(missing)}: it is no file of nnssl")
        self.content: dict[str, Any] = plan
        self.weights: dict[str, Tensor] | None = content.get("network_weights")
        architecture = plan["architecture_plans"]
        self.name = str(architecture.get("arch_class_name")).rpartition(".")[2]
        self.arguments: dict[str, Any] = dict(architecture.get("arch_kwargs") or {})

    @property
    def facts(self) -> dict[str, Any]:
        """What a network is built from, as plain values."""
        pretrained = (self.content.get("pretrain_plan") or {}).get("configurations") or {}
        patches = {
            str(name): {"patch_size": self.patch((entry or {}).get("patch_size"))}
            for name, entry in pretrained.items()
        }
        return {
            "architecture_plans": {"arch_class_name": self.name, "arch_kwargs": self.arguments},
            "pretrain_plan": {"configurations": patches},
            **{key: self.content[key] for key in NEEDED[1:]},
            **{key: self.patch(self.content.get(key)) for key in PATCHES},
        }

    def refused(self, what: str) -> UserError:
        """The error about the file."""
        return UserError(f'model.encoder.checkpoint_path = "{self.path}" {what}')

    def read(self) -> Any:
        """Content of the file; tensors are read where they are used."""
        if not self.path.is_file():
            raise self.refused(
                "does not exist; without weights the adaptation_plan.json published beside the"
                " checkpoint is enough"
            )
        try:
            if self.path.suffix == ".json":
                return json.loads(self.path.read_text(encoding="utf-8"))
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError:
            raise self.refused(
                "holds other things than tensors and plain values; save network_weights and"
                f" {PLAN} alone, as torch.save({{...}}, path)"
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise self.refused(f"is damaged ({reason(error)})") from error

    # ------------------------------------------------------------------ patches

    def patch(self, value: Any) -> Voxels | None:
        """A patch in voxels."""
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise self.refused(f"names a patch of {value}, not of three numbers")
        x, y, z = (int(side) for side in value)
        return x, y, z

    @property
    def recommended(self) -> Voxels | None:
        """The patch that it advises for other data."""
        return self.patch(self.content.get("recommended_downstream_patchsize"))

    @property
    def trained(self) -> list[Voxels]:
        """Patches that it may have been trained on, the likeliest first: some plans name others
        than that of the position embedding."""
        configurations = (self.content.get("pretrain_plan") or {}).get("configurations") or {}
        named = [
            self.content.get("pretrain_patch_size"),
            *((entry or {}).get("patch_size") for entry in configurations.values()),
            self.arguments.get("input_shape"),
            self.content.get("recommended_downstream_patchsize"),
        ]
        return [patch for value in named if (patch := self.patch(value)) is not None]

    # ------------------------------------------------------------------ architecture

    @cached_property
    def architecture(self) -> ResidualEncoder | PrimusShape:
        """The network: the section of a residual encoder, or what a Primus is built from."""
        if self.name in PRESETS:
            return ResidualEncoder()
        if self.name == "ResidualEncoderUNet":
            return self.residual()
        if self.name in PRIMUS_PRESETS:
            width, depth, heads = WIDTHS[self.name.removeprefix("Primus")]
            return PrimusShape(width, depth, heads, PATCH, drop_path=DROP_PATH)
        if self.name in ("Primus", "PrimusX"):
            return self.primus()
        known = (*PRESETS, "ResidualEncoderUNet", *PRIMUS_PRESETS, "Primus", "PrimusX")
        raise self.refused(f'has the architecture "{self.name}"; valid: {listed(known)}')

    def residual(self) -> ResidualEncoder:
        """The section of a residual encoder with the plan's arguments."""
        given = {k: v for k, v in self.arguments.items() if v is not None and k not in OF_DECODERS}
        fields: dict[str, Any] = {}
        for key, (field, values) in CLASSES.items():
            name = str(given.pop(key, "")).rpartition(".")[2]
            if name not in values:
                raise self.refused(f'has {key} = "{name}"; valid: {listed(filter(None, values))}')
            fields[field] = values[name]
        if given.pop("dropout_op", None):
            fields["dropout_p"] = dict(given.get("dropout_op_kwargs") or {}).pop("p", 0.5)
        for key, usual in USUAL.items():
            for name, value in (given.pop(key, None) or {}).items():
                if name not in ("inplace", "p") and usual.get(name) != value:
                    raise self.refused(f"has {key} with {name} = {value}; valid: {usual}")
        stages = given.pop("n_stages", None)
        for key in FIELDS:
            if (value := given.pop(key, None)) is not None:
                spread = key in ("features_per_stage", "strides") and isinstance(value, int)
                fields[key] = (value,) * (stages or 1) if spread else value
        if given:
            raise self.refused(f"has arguments that this encoder does not know: {listed(given)}")
        try:
            spec = msgspec.convert(fields, ResidualEncoder)
        except msgspec.ValidationError as error:
            raise self.refused(f"has arguments that do not fit: {reason(error)}") from None
        for field, problem in spec.problems():
            raise self.refused(f"has arguments that do not fit: {field}: {problem}")
        return spec

    def primus(self) -> PrimusShape:
        """What a Primus with the plan's arguments is built from."""
        given = {key.removeprefix("encoder_"): value for key, value in self.arguments.items()}
        needed = ("embed_dim", "eva_depth", "eva_numheads", "patch_embed_size")
        if missing := [key for key in needed if given.get(key) is None]:
            raise self.refused(f"has no {listed(missing)} for its {self.name}")
        patch = self.patch(given["patch_embed_size"])
        assert patch is not None, "it is among the needed"
        if abs(given.get("mlp_ratio", 8 / 3) - 8 / 3) > 1e-6:
            raise self.refused(f"has mlp_ratio = {given['mlp_ratio']}; valid: 8/3")
        shape = PrimusShape(
            given["embed_dim"],
            given["eva_depth"],
            given["eva_numheads"],
            patch,
            drop_path=given.get("drop_path_rate", DROP_PATH),
            registers=given.get("num_register_tokens", 0),
            layer_scale=given.get("init_values", LAYER_SCALE),
            norm_attention=given.get("scale_attn_inner", True),
            absolute=given.get("use_abs_pos_embed", True),
            rotary=given.get("use_rot_pos_emb", True),
        )
        if problem := shape.problem():
            raise self.refused(f"has {problem}")
        return shape

    # ------------------------------------------------------------------ weights

    def tensors(self) -> dict[str, Tensor]:
        """Weights of stem and encoder under the names of our networks."""
        if self.weights is None:
            raise self.refused(
                "holds the plan alone: give the checkpoint itself, or set pretrained = false"
            )
        residual = isinstance(self.architecture, ResidualEncoder)
        stem, encoder = ("stem", "stages") if residual else ("down_projection", "eva")
        key = self.content["key_to_encoder"]
        places = {self.content["key_to_stem"]: stem, key: encoder}
        found = {}
        for name, tensor in self.weights.items():
            for place, ours in places.items():
                if name.startswith(f"{place}."):
                    found[f"{ours}{name.removeprefix(place)}"] = tensor
        if not found:
            raise self.refused(f"holds no tensors below {listed(places)}, as its plan says")
        registers = ".".join((*key.split(".")[:-1], "register_tokens"))
        if registers in self.weights:
            found["register_tokens"] = self.weights[registers]
        return found


def build_planned(
    spec: NnFoundationEncoder, plan: Plan, channels: int, size: Size | None
) -> Encoder:
    """The network of a plan with initial weights."""
    default = spec.turned(plan.recommended or (128, 128, 128))
    size = input_size(spec.input_shape, size, default)
    name, shape = f"nnfoundation {plan.name}", plan.architecture
    if isinstance(shape, ResidualEncoder):
        for key in ("drop_path_rate", "weights_shape"):
            if (value := getattr(spec, key)) is not None:
                raise UserError(
                    f"model.encoder.{key} = {shown(value)}: a Primus has it, and {plan.name} is a"
                    " residual encoder; leave it out"
                )
        section = with_fields(shape, array_order=spec.array_order)
        return build_residual(section, name=name, channels=channels, size=size)
    if spec.drop_path_rate is not None:
        shape = replace(shape, drop_path=spec.drop_path_rate)
    return build_primus(
        shape,
        spec,
        name=name,
        channels=channels,
        size=size,
        stated=spec.weights_shape,
        told=plan.trained,
    )


@patch_size_of.register
def _(spec: NnFoundationEncoder) -> Size | None:
    if spec.input_shape is not None:
        return spec.input_shape
    recommended = Plan(spec.checkpoint_path).recommended
    return None if recommended is None else spec.turned(recommended)


@file_facts.register
def _(spec: NnFoundationEncoder) -> dict[str, Any]:
    return Plan(spec.checkpoint_path).facts


@with_facts.register
def _(spec: NnFoundationEncoder, facts: dict[str, Any]) -> PlannedEncoder:
    return PlannedEncoder(**asdict(spec), plan=facts)


@build_encoder.register
def _(
    spec: NnFoundationEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    reads = load_weights and spec.pretrained
    kept = spec.plan if isinstance(spec, PlannedEncoder) and not reads else None
    plan = Plan(spec.checkpoint_path, kept)
    encoder = build_planned(spec, plan, channels, size)
    if reads:
        source = f'model.encoder.checkpoint_path = "{spec.checkpoint_path}"'
        load_tensors(encoder.load_target, plan.tensors(), source=source)
    return encoder
