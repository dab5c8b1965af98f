"""PEFT section of a spec: which parameters train and what is added to them."""

from typing import Annotated, Any

from msgspec import Meta

from glovita_lib.spec import Spec


class FullFinetuning(Spec, tag="full_finetuning", tag_field="method"):
    """Every parameter trains."""


class LinearProbing(Spec, tag="linear_probing", tag_field="method"):
    """Only the head trains; the encoder stays in eval mode and outside autograd."""


class PartialFinetuning(Spec, tag="partial_finetuning", tag_field="method"):
    """The first blocks and everything before them stay frozen."""

    num_frozen_layers: Annotated[int, Meta(ge=0)] = 6
    """Number of frozen blocks, counted from the input."""


class CustomPeft(Spec, tag="custom", tag_field="method", kw_only=True):
    """A method of your own: a function of your package that changes the model in place."""

    target: str
    """Where the function is: "package.module:function"; called as function(model, **options)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""


Peft = FullFinetuning | LinearProbing | PartialFinetuning | CustomPeft
