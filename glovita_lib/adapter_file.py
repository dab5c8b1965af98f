"""The file of a PEFT run's trained part: adapter.safetensors, to be laid over the same base."""

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from glovita_lib.files import write_bytes
from glovita_lib.spec import UserError
from glovita_lib.trained import base_state, load_trained, trained_state

KEY = "glovita_adapter"  # of the metadata; a single one, as safetensors writes several in any order


def base_hash(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of all tensors that the method has left alone."""
    digest = hashlib.sha256()
    for name, tensor in base_state(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(path: Path | str, model: nn.Module, *, base: str) -> None:
    """Write the trained part with the base's name and hash.

    Args:
        base: name of the base, such as "timm vit_tiny_patch16_224".

    Raises:
        UserError: disk full, read-only ...; the previous file is as it was.
    """
    facts = json.dumps({"base": base, "base_hash": base_hash(model)})
    write_bytes(path, safetensors.torch.save(trained_state(model), {KEY: facts}))


def load_adapter(path: Path | str, model: nn.Module) -> None:
    """Lay a trained part over a model of the same spec, whose base weights are loaded.

    Raises:
        UserError: no such file, not ours, another base or another method.
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
        raise UserError(f"{path}: no adapter of glovita; weights of a whole model go into weights")
    facts = json.loads(metadata[KEY])
    if facts["base_hash"] != base_hash(model):
        raise UserError(
            f"{path} was trained over another base: {facts['base']} with hash"
            f" {facts['base_hash'][:12]}, here {base_hash(model)[:12]}; load the weights it"
            " started from"
        )
    load_trained(model, state)
