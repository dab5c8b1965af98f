"""PEFT section of a spec: which parameters train and what is added to them."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_if, target_problems
from glovita_lib.spec_errors import Dropout, Positive, shown


class PeftMethod(Spec):
    """What other sections, the model and the trainer ask every method."""

    built_in: ClassVar[str] = "peft"
    trains: ClassVar[Literal["all", "part", "head"]] = "part"
    """All parameters, a part of the encoder's (or added ones) and the head, or the head alone."""
    needs_encoder: ClassVar[bool] = True
    """Whether there must be an encoder that it changes."""
    merges: ClassVar[bool] = True
    """Whether what it has learnt can be folded into the base's weights."""
    calibration_batches = 0  # no ClassVar: a method that needs some has a field of this name
    """Training batches of each rank that it sees before the first step."""


# --------------------------------------------------------------- methods that change weights
#
# PEFT methods that change the weights of chosen layers; all merge into the base.

Rank = Annotated[int, Meta(ge=1)]
Bias = Literal["none", "all", "adapted"]


def expression_problems(name: str, patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Patterns of a field that are no regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield name, f"{shown(pattern)} is no regular expression: {error}"


class Targeted(PeftMethod):
    """A method that changes chosen layers of the encoder."""

    targets: tuple[str, ...] | None = None
    """Layers: q, k, v, qkv, proj, fc1, fc2, conv, all-linear, or regular expressions over layer
    names; none: the attention and MLP projections, in an encoder without any the convolutions of
    its blocks."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Targets are there and are regular expressions."""
        if self.targets == ():
            yield "targets", "[] names none: leave it out for the usual ones, or name one at least"
        yield from expression_problems("targets", self.targets or ())


class Ranked(Targeted):
    """A method with a rank per layer."""

    rank: Rank = 8
    """Rank of the change of a weight."""
    rank_pattern: dict[str, Rank] = {}
    """Rank by regular expression over layer names, the last match counts: {"blocks.1[01]" = 16}."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Patterns are regular expressions."""
        yield from super().problems()
        yield from expression_problems("rank_pattern", self.rank_pattern)


class Lora(Ranked, tag="lora", tag_field="method"):
    """Low-rank change W + (alpha / r) B A of frozen weights (Hu et al., LoRA, ICLR 2022); a
    convolution's weight counts as the matrix (out, in * kernel)."""

    built_in: ClassVar[str] = "peft_lora"

    alpha: Positive = 16.0
    """Scale of the change before the division by r."""
    dropout: Dropout = 0.0
    """Probability of dropping an input of A, for the whole batch where the network reads a weight
    instead of calling its layer; above 0 a second copy of every input is kept."""
    use_rslora: bool = False
    """Divide alpha by sqrt(r) instead of r (Kalajdzievski, rsLoRA, 2023)."""
    use_dora: bool = False
    """Train the norm of every row apart: m (W + B A) / |W + B A| (Liu et al., DoRA, ICML 2024)."""
    lora_plus_ratio: Annotated[float, Meta(ge=1)] = 1.0
    """Learning rate of B over that of A (Hayou et al., LoRA+, ICML 2024)."""
    init_lora_weights: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    """Start of A with B = 0, or the r main singular vectors of W for both (Meng et al., PiSSA,
    NeurIPS 2024): W + (alpha / r) (B A - B_0 A_0), with B_0 A_0 kept, so that W stays as it is."""
    lora_bias: Bias = "none"
    """Biases that train: none, all of the encoder, or those of the adapted layers; a fused qkv has
    one bias, which trains whole."""


class Adalora(Targeted, tag="adalora", tag_field="method"):
    """W + P diag(e) Q with a budget of ranks that goes from init_rank to rank per layer and is
    given to the layers that need it (Zhang et al., AdaLoRA, ICLR 2023)."""

    built_in: ClassVar[str] = "peft_lowrank"

    rank: Rank = 4
    """Mean rank per layer at the end."""
    init_rank: Rank = 12
    """Rank of every layer at the start."""
    alpha: Positive = 32.0
    """Scale of the change before the division by init_rank."""
    dropout: Dropout = 0.0
    """Probability of dropping an input of Q."""
    use_rslora: bool = False
    """Divide alpha by sqrt(init_rank) instead of init_rank."""
    lora_bias: Bias = "none"
    """Biases that train: none, all of the encoder, or those of the adapted layers; a fused qkv has
    one bias, which trains whole."""
    orth_reg: Annotated[float, Meta(ge=0)] = 0.5
    """Weight of the loss |P'P - I| + |QQ' - I|, mean over layers."""
    beta1: Annotated[float, Meta(gt=0, lt=1)] = 0.85
    """Smoothing of the sensitivity |w dL/dw| over steps."""
    beta2: Annotated[float, Meta(gt=0, lt=1)] = 0.85
    """Smoothing of the uncertainty of the sensitivity over steps."""
    tinit: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the training at the start with the full budget."""
    tfinal: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    """Share of the training at the end with the final ranks fixed."""
    deltaT: Annotated[int, Meta(ge=1)] = 1
    """Optimizer steps between two allocations."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """It ends with fewer ranks than it starts with, and has steps to take them away."""
        yield from super().problems()
        if self.rank > self.init_rank:
            yield "rank", f"{self.rank} is above peft.init_rank = {self.init_rank}, the start"
        if self.tinit + self.tfinal >= 1:
            yield (
                "tinit",
                f"with peft.tfinal = {self.tfinal:g} it leaves no step in which ranks are given:"
                " their sum must be below 1",
            )


class Loha(Ranked, tag="loha", tag_field="method"):
    """W + (alpha / r) (B1 A1) * (B2 A2), an elementwise product that has rank up to r^2 (Hyeon-Woo
    et al., FedPara, ICLR 2022)."""

    built_in: ClassVar[str] = "peft_weights"

    rank: Rank = 4
    """Rank of each factor."""
    alpha: Positive = 4.0
    """Scale of the change before the division by r."""
    rank_dropout: Dropout = 0.0
    """Probability of dropping a row of the change in a training step."""


class Lokr(Ranked, tag="lokr", tag_field="method"):
    """W + (alpha / r) kron(W1, B2 A2) (Yeh et al., LyCORIS, ICLR 2024)."""

    built_in: ClassVar[str] = "peft_weights"

    rank: Rank = 4
    """Rank of the second factor; from half its size on it is a full matrix."""
    alpha: Positive = 4.0
    """Scale of the change before the division by r."""
    rank_dropout: Dropout = 0.0
    """Probability of dropping a row of the change in a training step."""
    decompose_factor: Annotated[int, Meta(ge=-1)] = -1
    """Largest size of W1; -1: the divisor nearest to the square root."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """The size of a factor is one."""
        yield from super().problems()
        if self.decompose_factor == 0:
            yield "decompose_factor", "0 is no size: use -1 for the usual one, or 1 and more"


class Oft(Targeted, tag="oft", tag_field="method"):
    """W R with R orthogonal in r blocks (Qiu et al., OFT, NeurIPS 2023): R turns the inputs, angles
    between neurons stay."""

    built_in: ClassVar[str] = "peft_weights"

    r: Annotated[int, Meta(ge=1)] = 8
    """Number of blocks; the input width must be a multiple of it."""
    dropout: Dropout = 0.0
    """Share of blocks that are the identity in a training step."""
    coft: bool = False
    """Keep R near the identity: |Q| <= eps / sqrt(r) for each block."""
    eps: Annotated[Positive, read_if("coft", True)] = 6e-5
    """Bound of coft."""
    bias: Bias = "none"
    """Biases that train: none, all of the encoder, or those of the adapted layers; a fused qkv has
    one bias, which trains whole."""
    use_cayley_neumann: bool = True
    """R = (I + Q)(I - Q)^-1 by five terms of its series, faster; off: solved, exactly
    orthogonal."""


class Boft(Targeted, tag="boft", tag_field="method"):
    """s W R with R a product of orthogonal butterfly factors (Liu et al., BOFT, ICLR 2024)."""

    built_in: ClassVar[str] = "peft_weights"

    block_size: Annotated[int, Meta(ge=2)] = 8
    """Size of an orthogonal block; the input width must be a multiple of it, and even for more than
    one factor."""
    n_butterfly: Annotated[int, Meta(ge=1)] = 1
    """Number of factors; a product of m reaches 2^(m - 1) blocks from every input."""
    dropout: Dropout = 0.0
    """Share of blocks of one factor that are the identity in a training step."""
    bias: Bias = "none"
    """Biases that train: none, all of the encoder, or those of the adapted layers; a fused qkv has
    one bias, which trains whole."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Blocks can be halved where there are several factors."""
        yield from super().problems()
        if self.n_butterfly > 1 and self.block_size % 2:
            yield (
                "block_size",
                f"{self.block_size} must be even for peft.n_butterfly = {self.n_butterfly}: use"
                f" {self.block_size + 1}, or one factor",
            )


class Vera(Targeted, tag="vera", tag_field="method"):
    """W + diag(b) B diag(d) A with random A and B that all layers share (Kopiczko et al., VeRA,
    ICLR 2024)."""

    built_in: ClassVar[str] = "peft_lowrank"

    rank: Rank = 8
    """Rank of the change; the paper uses 256 and more, since only vectors train."""
    dropout: Dropout = 0.0
    """Probability of dropping an input of A."""
    d_initial: Positive = 0.1
    """Start of d; b starts at 0."""
    projection_prng_key: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    """Seed of A and B, which are saved with the adapter."""


class Ia3(Targeted, tag="ia3", tag_field="method"):
    """Keys, values and the hidden units of the MLP are multiplied by learned factors (Liu et al.,
    (IA)^3, NeurIPS 2022); unset targets: k, v and the input of fc2, else the convolutions."""

    built_in: ClassVar[str] = "peft_weights"


class FourierFt(Targeted, tag="fourierft", tag_field="method"):
    """W + scaling Re IDFT2(S) with a sparse spectrum S of learned coefficients (Gao et al.,
    FourierFT, ICML 2024)."""

    built_in: ClassVar[str] = "peft_weights"

    n_frequency: Annotated[int, Meta(ge=1)] = 1000
    """Coefficients per layer; as many as its weight has numbers where that is fewer."""
    scaling: Positive = 150.0
    """Scale of the change."""
    random_loc_seed: Annotated[int, Meta(ge=0)] = 777
    """Seed of the places of the coefficients, which layers of one shape share."""


class Fact(Targeted, tag="fact", tag_field="method"):
    """All changes of the encoder as one tensor in tensor-train or Tucker form (Jie and Deng, FacT,
    AAAI 2023): s U Sigma_l V' per layer l, U and V shared; wide layers are slices of the width."""

    built_in: ClassVar[str] = "peft_lowrank"

    targets: tuple[str, ...] | None = None
    """Linear layers: q, k, v, qkv, proj, fc1, fc2, all-linear, or regular expressions over layer
    names; none: the attention and MLP projections."""
    r: Rank = 4
    """Rank of the decomposition."""
    decomposition: Literal["tt", "tk"] = "tt"
    """tt: a matrix Sigma_l per slice; tk: Sigma_l mixed from r matrices that all slices share."""
    scale: Positive = 1.0
    """Factor s of the change."""
    dropout: Dropout = 0.0
    """Probability of dropping an input of the change."""


class RepAdapter(Targeted, tag="rep_adapter", tag_field="method"):
    """W (x + s U (D x)) with a dense D and a grouped U, linear and so a part of W at inference (Luo
    et al., RepAdapter, 2023); unset targets: the inputs of attention and MLP, else convolutions."""

    built_in: ClassVar[str] = "peft_lowrank"

    bottleneck: Annotated[int, Meta(ge=1)] = 8
    """Width between D and U."""
    groups: Annotated[int, Meta(ge=1)] = 2
    """Groups of U; must divide the bottleneck and the input width."""
    scale: Positive = 1.0
    """Factor s; U starts at 0."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Groups are of one size."""
        yield from super().problems()
        if self.bottleneck % self.groups:
            yield "groups", f"{self.groups} must divide peft.bottleneck = {self.bottleneck}"


class Ssf(PeftMethod, tag="ssf", tag_field="method"):
    """Learned scale and shift after every norm, Linear layer and convolution of the blocks (Lian et
    al., SSF, NeurIPS 2022); a layer without bias gets no shift."""

    built_in: ClassVar[str] = "peft_weights"


class DiffFit(PeftMethod, tag="difffit", tag_field="method"):
    """Learned scales at the places of ssf and every bias of the encoder (Xie et al., DiffFit, ICCV
    2023)."""

    built_in: ClassVar[str] = "peft_weights"


class Gps(Targeted, tag="gps", tag_field="method"):
    """Of every row of the weights the entries with the largest loss gradient train (Zhang et al.,
    GPS, CVPR 2024), with all biases of Linear layers and convolutions; unset targets: all of these
    layers. A fused qkv has one bias, which trains whole."""

    built_in: ClassVar[str] = "peft_weights"

    gps_topk_per_row: Annotated[int, Meta(ge=1)] = 1
    """Entries per row that train."""
    calibration_batches: Annotated[int, Meta(ge=1)] = 1
    """Training batches whose gradient decides, per rank."""


# ------------------------------------------------------------------------------- all methods

Size = Annotated[int, Meta(ge=1)]


class FullFinetuning(PeftMethod, tag="full_finetuning", tag_field="method"):
    """Every parameter trains."""

    trains: ClassVar[Literal["all", "part", "head"]] = "all"
    needs_encoder: ClassVar[bool] = False


class LinearProbing(PeftMethod, tag="linear_probing", tag_field="method"):
    """Only the head trains; the encoder stays in eval mode and outside autograd."""

    trains: ClassVar[Literal["all", "part", "head"]] = "head"
    needs_encoder: ClassVar[bool] = False


class PartialFinetuning(PeftMethod, tag="partial_finetuning", tag_field="method"):
    """The first layers and everything before them stay frozen."""

    num_frozen_layers: Annotated[int, Meta(ge=0)] = 6
    """Number of frozen layers, counted from the input as for optimizer.layer_wise_lr_decay: the
    norm behind the last block is of its layer."""


class Bitfit(PeftMethod, tag="bitfit", tag_field="method"):
    """Every bias of the encoder trains (Ben Zaken et al., BitFit, ACL 2022)."""

    built_in: ClassVar[str] = "peft_weights"


class LnTuning(PeftMethod, tag="ln_tuning", tag_field="method"):
    """Scale and shift of every norm layer train, batch norm with its statistics held (Zhao et al.,
    LayerNorm tuning, ICLR 2024; Frankle et al., batch norm, ICLR 2021)."""

    built_in: ClassVar[str] = "peft_weights"


class AdaptFormer(PeftMethod, tag="adapt_former", tag_field="method"):
    """s Up(ReLU(Down(z))) beside or behind every MLP, whose input z the block has normalised (Chen
    et al., AdaptFormer, NeurIPS 2022)."""

    built_in: ClassVar[str] = "peft_modules"
    merges: ClassVar[bool] = False

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


class Convpass(PeftMethod, tag="convpass", tag_field="method"):
    """Down -> GELU -> 3 x 3 convolution over the grid of patches -> GELU -> Up beside the MLP;
    prefix tokens are a grid of one (Jie and Deng, Convpass, 2022)."""

    built_in: ClassVar[str] = "peft_modules"
    merges: ClassVar[bool] = False

    bottleneck: Size = 64
    """Width between Down and Up."""
    dropout: Dropout = 0.0
    """Probability of dropping a unit behind the convolution."""
    scale: Positive = 1.0
    """Factor of the adapter's output; Up starts at 0."""
    places: tuple[Literal["attn", "mlp"], ...] = ("mlp",)
    """Beside which modules: attn, mlp or both, as in the paper."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """It stands somewhere, and once."""
        if not self.places or len(set(self.places)) < len(self.places):
            yield "places", 'name "attn", "mlp" or both, each once'


class VisualPromptTuning(PeftMethod, tag="visual_prompt_tuning", tag_field="method"):
    """Learned tokens behind the prefix tokens, before the first block or new ones in every block
    (Jia et al., VPT, ECCV 2022); they are taken out behind the blocks."""

    built_in: ClassVar[str] = "peft_modules"
    merges: ClassVar[bool] = False

    num_tokens: Size = 20
    """Prompt tokens per block."""
    deep: bool = True
    """New prompts in every block; off: one set before the first block that passes all of them."""
    project_dim: Size | None = None
    """Width of the prompts before a learned projection to the encoder's; none: no projection."""
    dropout: Dropout = 0.0
    """Probability of dropping a prompt feature."""
    deep_layers: Annotated[Size | None, read_if("deep", True)] = None
    """Number of first blocks with prompts; none: all."""


class CustomPeft(PeftMethod, tag="custom", tag_field="method", kw_only=True):
    """A method of your own: a function of your package that changes the model in place."""

    needs_encoder: ClassVar[bool] = False

    target: str
    """Where the function is: "package.module:function"; called as function(model, **options)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from target_problems(self.target)


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
