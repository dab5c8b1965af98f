"""Autocast types: which one a device gets and the contexts that apply it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from glovita_lib.spec import UserError


def resolve_precision(name: str, device: torch.device) -> str:
    """ "no", "bf16" or "fp16" for a spec's precision; auto is bf16 on GPUs that compute it
    natively, else "no".

    Raises:
        UserError: fp16 on a CPU, whose kernels lack it.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "no"
    if name == "fp16" and device.type == "cpu":
        raise UserError(
            'training.precision = "fp16" needs a GPU, this is a CPU; use "auto", "no" or "bf16"'
        )
    return name


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass."""
    if precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaler; it does nothing unless precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
