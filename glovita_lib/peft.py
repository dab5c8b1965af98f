"""Which parameters train, and what is added to them: one function per method.

A method changes a model in place. Parameters it freezes stay in the state dict under their names;
`Model.refresh`, called afterwards, keeps the frozen parts in eval mode.
"""

from functools import singledispatch
from typing import Any

from torch import nn

from glovita_lib.plugins import call_target
from glovita_lib.spec import UserError
from glovita_lib.spec_peft import CustomPeft, FullFinetuning, LinearProbing, PartialFinetuning


@singledispatch
def apply_peft(spec: Any, model: nn.Module) -> None:
    """Apply the method of a Struct to a model with `encoder` and `head`, in place."""
    raise TypeError(f"no PEFT method for {type(spec).__name__}")


@apply_peft.register
def _(spec: FullFinetuning, model: nn.Module) -> None:
    """Nothing to do: parameters train unless nothing reads them."""


@apply_peft.register
def _(spec: LinearProbing, model: nn.Module) -> None:
    model.encoder.requires_grad_(False)


@apply_peft.register
def _(spec: PartialFinetuning, model: nn.Module) -> None:
    blocks = len(model.encoder.blocks())
    if spec.num_frozen_layers > blocks:
        raise UserError(
            f"peft.num_frozen_layers = {spec.num_frozen_layers}: encoder {model.encoder.name} has"
            f" {blocks} blocks; valid: 0 to {blocks}"
        )
    if spec.num_frozen_layers == 0:
        return  # nothing is frozen, the stem neither
    parameters = dict(model.encoder.named_parameters())
    for name, depth in model.encoder.layer_ids().items():
        if depth <= spec.num_frozen_layers:
            parameters[name].requires_grad_(False)


@apply_peft.register
def _(spec: CustomPeft, model: nn.Module) -> None:
    call_target("peft", spec.target, model, **spec.options)
