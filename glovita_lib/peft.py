"""Which parameters train, and what is added to them: one function per method.

A method changes a model in place. Parameters it freezes stay in the state dict under their names;
`Model.refresh`, called afterwards, keeps the frozen parts in eval mode.
"""

from functools import singledispatch
from typing import Any

from torch import nn

from glovita_lib import spec_peft
from glovita_lib.adalora import apply_adalora
from glovita_lib.fourierft import apply_fourierft
from glovita_lib.inserts import apply_adapt_former, apply_convpass
from glovita_lib.lora import apply_lora
from glovita_lib.orthogonal import apply_orthogonal
from glovita_lib.plugins import call_target
from glovita_lib.products import apply_product
from glovita_lib.prompts import apply_prompts
from glovita_lib.rep_adapter import apply_rep_adapter
from glovita_lib.scaling import apply_ia3, apply_ssf
from glovita_lib.selective import apply_bitfit, apply_gps, apply_ln_tuning
from glovita_lib.shared_factors import apply_fact, apply_vera
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


apply_peft.register(spec_peft.Bitfit, apply_bitfit)
apply_peft.register(spec_peft.LnTuning, apply_ln_tuning)
apply_peft.register(spec_peft.Ssf, apply_ssf)
apply_peft.register(spec_peft.DiffFit, apply_ssf)
apply_peft.register(spec_peft.Lora, apply_lora)
apply_peft.register(spec_peft.Adalora, apply_adalora)
apply_peft.register(spec_peft.Loha, apply_product)
apply_peft.register(spec_peft.Lokr, apply_product)
apply_peft.register(spec_peft.Oft, apply_orthogonal)
apply_peft.register(spec_peft.Boft, apply_orthogonal)
apply_peft.register(spec_peft.Vera, apply_vera)
apply_peft.register(spec_peft.Ia3, apply_ia3)
apply_peft.register(spec_peft.FourierFt, apply_fourierft)
apply_peft.register(spec_peft.AdaptFormer, apply_adapt_former)
apply_peft.register(spec_peft.Convpass, apply_convpass)
apply_peft.register(spec_peft.RepAdapter, apply_rep_adapter)
apply_peft.register(spec_peft.Fact, apply_fact)
apply_peft.register(spec_peft.Gps, apply_gps)
apply_peft.register(spec_peft.VisualPromptTuning, apply_prompts)
