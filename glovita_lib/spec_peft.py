"""PEFT section of a spec: which parameters train and what is added to them."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_lora import (
    Adalora,
    Boft,
    DiffFit,
    Dropout,
    Fact,
    FourierFt,
    Gps,
    Ia3,
    Loha,
    Lokr,
    Lora,
    Oft,
    Positive,
    RepAdapter,
    Ssf,
    Vera,
)

Size = Annotated[int, Meta(ge=1)]


class FullFinetuning(Spec, tag="full_finetuning", tag_field="method"):
    """Every parameter trains."""


class LinearProbing(Spec, tag="linear_probing", tag_field="method"):
    """Only the head trains; the encoder stays in eval mode and outside autograd."""


class PartialFinetuning(Spec, tag="partial_finetuning", tag_field="method"):
    """The first blocks and everything before them stay frozen."""

    num_frozen_layers: Annotated[int, Meta(ge=0)] = 6
    """Number of frozen blocks, counted from the input."""


class Bitfit(Spec, tag="bitfit", tag_field="method"):
    """Every bias of the encoder trains (Ben Zaken et al., BitFit, ACL 2022)."""


class LnTuning(Spec, tag="ln_tuning", tag_field="method"):
    """Scale and shift of every norm layer train, batch norm with its statistics held (Zhao et al.,
    LayerNorm tuning, ICLR 2024; Frankle et al., batch norm, ICLR 2021)."""


class AdaptFormer(Spec, tag="adapt_former", tag_field="method"):
    """s Up(ReLU(Down(z))) beside or behind every MLP, whose input z the block has normalised (Chen
    et al., AdaptFormer, NeurIPS 2022)."""

    mode: Literal["parallel", "sequential"] = "parallel"
    """parallel: mlp(z) + adapter(z); sequential: h + adapter(h) with h = mlp(z)."""
    bottleneck: Size = 64
    """Width between Down and Up."""
    dropout: Dropout = 0.0
    """Probability of dropping a unit of the bottleneck."""
    adapter_scalar: Positive = 1.0
    """Factor s; Up starts at 0."""
    adapter_layernorm_option: Literal["in", "out", "none"] = "none"
    """A LayerNorm of the adapter's own on its input or its output, which then starts at 0."""


class Convpass(Spec, tag="convpass", tag_field="method"):
    """Down -> GELU -> 3 x 3 convolution over the grid of patches -> GELU -> Up beside the MLP;
    prefix tokens are a grid of one (Jie and Deng, Convpass, 2022)."""

    bottleneck: Size = 64
    """Width between Down and Up."""
    dropout: Dropout = 0.0
    """Probability of dropping a unit behind the convolution."""
    scale: Positive = 1.0
    """Factor of the adapter's output; Up starts at 0."""
    places: tuple[Literal["attn", "mlp"], ...] = ("mlp",)
    """Beside which modules: attn, mlp or both, as in the paper."""


class VisualPromptTuning(Spec, tag="visual_prompt_tuning", tag_field="method"):
    """Learned tokens behind the prefix tokens, before the first block or new ones in every block
    (Jia et al., VPT, ECCV 2022); they are taken out behind the blocks."""

    num_tokens: Size = 20
    """Prompt tokens per block."""
    deep: bool = True
    """New prompts in every block; off: one set before the first block that passes all of them."""
    project_dim: Size | None = None
    """Width of the prompts before a learned projection to the encoder's; none: no projection."""
    dropout: Dropout = 0.0
    """Probability of dropping a prompt feature."""
    deep_layers: Size | None = None
    """Number of first blocks with prompts if deep; none: all."""


class CustomPeft(Spec, tag="custom", tag_field="method", kw_only=True):
    """A method of your own: a function of your package that changes the model in place."""

    target: str
    """Where the function is: "package.module:function"; called as function(model, **options)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""


Peft = (
    FullFinetuning
    | LinearProbing
    | PartialFinetuning
    | Bitfit
    | LnTuning
    | Ssf
    | DiffFit
    | Lora
    | Adalora
    | Loha
    | Lokr
    | Oft
    | Boft
    | Vera
    | Ia3
    | FourierFt
    | AdaptFormer
    | Convpass
    | RepAdapter
    | Fact
    | Gps
    | VisualPromptTuning
    | CustomPeft
)
