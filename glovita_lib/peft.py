"""PEFT methods that add nothing, and the file adapter.safetensors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from glovita_lib.encoder import Encoder
from glovita_lib.errors import UserError, call_target
from glovita_lib.files import write_bytes
from glovita_lib.network import encoder_of
from glovita_lib.peft_base import apply_peft, base_state, load_trained, trained_state
from glovita_lib.spec_peft import CustomPeft, FullFinetuning, LinearProbing, PartialFinetuning

# ------------------------------------------------------- methods that only choose what trains


@apply_peft.register
def _(spec: FullFinetuning, model: nn.Module) -> None:
    """Nothing to do: parameters train unless nothing reads them."""


@apply_peft.register
def _(spec: LinearProbing, model: nn.Module) -> None:
    encoder_of(model).requires_grad_(False)


@apply_peft.register
def _(spec: PartialFinetuning, model: nn.Module) -> None:
    encoder = encoder_of(model)
    assert isinstance(encoder, Encoder), "another network has no depths"
    depths = encoder.depths()
    if spec.num_frozen_layers > depths.layers:
        raise UserError(
            f"peft.num_frozen_layers = {spec.num_frozen_layers}: encoder {encoder.name} has"
            f" {depths.layers} layers; valid: 0 to {depths.layers}"
        )
    if spec.num_frozen_layers == 0:
        return  # nothing is frozen, the stem neither
    for name, depth in depths.of.items():
        if depth <= spec.num_frozen_layers:
            encoder.get_parameter(name).requires_grad_(False)


@apply_peft.register
def _(spec: CustomPeft, model: nn.Module) -> None:
    call_target("peft", spec.target, model, **spec.options)


# ----------------------------------------------------------------------- adapter.safetensors
#
# The file of a PEFT run's trained part: adapter.safetensors, to be laid over the same base.

KEY = "glovita_adapter"  # of the metadata; a single one, as safetensors writes several in any order


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What adapter.safetensors holds."""

    path: Path
    base_hash: str
    run: dict[str, Any]
    """What is needed to build the model and to ask it: the run's spec and resolved facts."""
    state: dict[str, Tensor]

    @property
    def base(self) -> str:
        """The base and where its weights come from, in words."""
        spec = self.run["spec"]
        encoder = spec["model"]["encoder"]
        if encoder.get("weights"):
            source = f'weights = "{encoder["weights"]}"'
        elif encoder.get("pretrained"):
            source = "its published weights"
        else:
            source = f"random weights of seed {spec['seed']}"
        return f"{encoder.get('type') or encoder.get('target') or 'features'} with {source}"


def base_hash(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of all tensors that the method has left alone."""
    digest = hashlib.sha256()
    for name, tensor in base_state(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(path: Path | str, model: nn.Module, *, run: dict[str, Any]) -> None:
    """Write the trained part with the hash of its base; equal states give equal bytes.

    Args:
        run: plain values {"spec": ..., "resolved": ...} to build the model from.

    Raises:
        UserError: disk full, read-only ...; the previous file is as it was.
    """
    made = json.dumps({"base_hash": base_hash(model), **run}, sort_keys=True)
    write_bytes(path, safetensors.torch.save(trained_state(model), {KEY: made}))


def is_adapter(path: Path | str) -> bool:
    """Whether a file was written by `save_adapter`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def read_adapter(path: Path | str) -> AdapterFile:
    """The content of a file of `save_adapter`.

    Raises:
        UserError: no such file, not ours, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: no safetensors file, or only a part of one: {error}") from None
    if KEY not in metadata:
        raise UserError(
            f"{path}: no adapter of glovita; weights of a whole model are read by"
            " model.encoder.weights"
        )
    try:
        made = json.loads(metadata[KEY])
        return AdapterFile(path, made.pop("base_hash"), made, state)
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: the description of the adapter is damaged ({error})") from None


def load_adapter(adapter: AdapterFile, model: nn.Module) -> None:
    """Lay a trained part over a model of the same spec, whose base weights are loaded.

    Raises:
        UserError: another base, or another method or size.
    """
    found = base_hash(model)
    load_trained(model, adapter.state, source=adapter.path)
    if adapter.base_hash != found:
        raise UserError(
            f"{adapter.path} was trained over another base: {adapter.base}, hash"
            f" {adapter.base_hash[:12]}, here {found[:12]}; load the weights it started from"
        )
