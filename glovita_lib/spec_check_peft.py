"""Rules for the PEFT section, checked before any data is read. What only the built encoder can tell
(the layers that are there) is checked by the methods."""

import re
from collections.abc import Iterator
from typing import Any

from glovita_lib.spec_lora import Adalora, Boft, Lokr, Oft, RepAdapter
from glovita_lib.spec_model import PrecomputedEncoder
from glovita_lib.spec_peft import (
    AdaptFormer,
    Convpass,
    CustomPeft,
    FullFinetuning,
    LinearProbing,
    VisualPromptTuning,
)
from glovita_lib.spec_root import Root
from glovita_lib.spec_types import shown

UNMERGED = (AdaptFormer, Convpass, VisualPromptTuning)
"""Methods that compute something the base cannot."""


def method_of(root: Root) -> str:
    """Tag of the method."""
    return str(type(root.peft).__struct_config__.tag)


def there_is_an_encoder(root: Root) -> Iterator[str]:
    """Features of a file have no encoder that a method could change."""
    whole = isinstance(root.peft, FullFinetuning | LinearProbing | CustomPeft)
    if isinstance(root.model.encoder, PrecomputedEncoder) and not whole:
        yield (
            f"peft.method: {shown(method_of(root))} changes an encoder, and precomputed features"
            ' have none: use "full_finetuning", which trains the head'
        )


def expressions(root: Root) -> Iterator[str]:
    """Targets and patterns of ranks are there and are regular expressions."""
    targets = getattr(root.peft, "targets", None)
    if targets == ():
        yield "peft.targets: [] names none: leave it out for the usual ones, or name one at least"
    given = [("targets", t) for t in targets or ()]
    given += [("rank_pattern", p) for p in getattr(root.peft, "rank_pattern", ())]
    for field, pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"peft.{field}: {shown(pattern)} is no regular expression: {error}"


def budget_falls(root: Root) -> Iterator[str]:
    """AdaLoRA ends with fewer ranks than it starts with, and has steps to take them away."""
    peft = root.peft
    if not isinstance(peft, Adalora):
        return
    if peft.rank > peft.init_rank:
        yield f"peft.rank: {peft.rank} is above peft.init_rank = {peft.init_rank}, the start"
    if peft.tinit + peft.tfinal >= 1:
        yield (
            f"peft.tinit: with peft.tfinal = {peft.tfinal:g} it leaves no step in which ranks are"
            " given: their sum must be below 1"
        )


def blocks_fit(root: Root) -> Iterator[str]:
    """Sizes of groups and blocks divide."""
    peft = root.peft
    if isinstance(peft, RepAdapter) and peft.bottleneck % peft.groups:
        yield f"peft.groups: {peft.groups} must divide peft.bottleneck = {peft.bottleneck}"
    if isinstance(peft, Lokr) and peft.decompose_factor == 0:
        yield "peft.decompose_factor: 0 is no size: use -1 for the usual one, or 1 and more"
    if isinstance(peft, Boft) and peft.n_butterfly > 1 and peft.block_size % 2:
        yield (
            f"peft.block_size: {peft.block_size} must be even for peft.n_butterfly ="
            f" {peft.n_butterfly}: use {peft.block_size + 1}, or one factor"
        )


def places_named(root: Root) -> Iterator[str]:
    """Convpass stands somewhere, and once."""
    if isinstance(root.peft, Convpass):
        places = root.peft.places
        if not places or len(set(places)) < len(places):
            yield 'peft.places: name "attn", "mlp" or both, each once'


def unread(root: Root) -> Iterator[str]:
    """Options that another one leaves without effect."""
    peft = root.peft
    if isinstance(peft, VisualPromptTuning) and not peft.deep and peft.deep_layers is not None:
        yield "peft.deep_layers: it is read with peft.deep = true only: leave it out"
    if isinstance(peft, Oft) and not peft.coft and peft.eps != default(peft, "eps"):
        yield "peft.eps: it is read with peft.coft = true only: leave it out"


def default(struct: Any, name: str) -> Any:
    """Default of a field."""
    return getattr(type(struct)(), name)


def merging_is_possible(root: Root) -> Iterator[str]:
    """infer.merge has something to merge, and can."""
    if not root.infer.merge or root.infer.checkpoint is not None:  # which knows its own method
        return
    if isinstance(root.peft, UNMERGED):
        yield (
            f"infer.merge: {shown(method_of(root))} computes something the base cannot, so it does"
            " not merge: leave it out"
        )


def export_is_one_file(root: Root) -> Iterator[str]:
    """infer.export is a safetensors file with the weights of one checkpoint."""
    infer = root.infer
    if infer.export is None:
        return
    if not infer.export.endswith(".safetensors"):
        yield f'infer.export: {shown(infer.export)} must end in ".safetensors", which it is'
    members = len(infer.folds or ()) if isinstance(infer.checkpoint, str | None) else 0
    members = max(members, len(infer.checkpoint) if isinstance(infer.checkpoint, tuple) else 1)
    if members > 1:
        yield (
            f"infer.export: it takes one checkpoint, and infer names {members}: export them one"
            " after another"
        )


RULES = (
    there_is_an_encoder,
    expressions,
    budget_falls,
    blocks_fit,
    places_named,
    unread,
    merging_is_possible,
    export_is_one_file,
)
