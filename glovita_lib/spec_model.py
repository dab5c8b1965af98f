"""Model section of a spec: encoder, aggregation and head."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from glovita_lib.errors import UserError, find_target
from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_if, target_problems
from glovita_lib.spec_encoders import Encoder, TimmEncoder
from glovita_lib.spec_errors import Dropout, shown
from glovita_lib.spec_lift import Aggregation
from glovita_lib.spec_samples import OnlyPrediction

# ------------------------------------------------------------------------------------- heads


HeadInput = Literal["vectors", "bags", "stages", "either"]
Prediction = Literal["classes", "numbers", "frames"]
ANYTHING: tuple[Prediction, ...] = ("classes", "numbers", "frames")


class BaseHead(Spec):
    """What other sections and the model ask every head."""

    built_in: ClassVar[str] = "heads"
    takes: ClassVar[HeadInput] = "vectors"
    """A vector a sample, its instances (or patch tokens), the encoder's stages along time, or what
    the user's module says."""
    predicts: ClassVar[tuple[Prediction, ...]] = ("classes", "numbers")
    """Kinds of targets: of a sample, or frames, a class of each."""
    mixes: ClassVar[bool] = True
    """Whether a bag becomes vectors, before a last layer, that mixup can mix."""

    def takes_features(self) -> bool:
        """Whether it takes tokens or instances, as far as can be told before it is built; of a
        head of the user's its function is looked at."""
        return self.takes in ("bags", "stages")

    @property
    def needs_classes(self) -> str | None:
        """The option that labels instances by the class of their bag, where it is on."""
        return None

    def only_predicts(self, *, named: bool) -> OnlyPrediction | None:
        """What it predicts where it cannot predict the other; of the default head only where the
        spec names it, as nobody has said anything by a default."""
        if self.needs_classes or (named and self.predicts == ("classes",)):
            return "classes"
        return "numbers" if self.predicts == ("numbers",) else None

    def target_problems(self, subtask: str) -> Iterator[tuple[str, str]]:
        """Classes need a head that predicts classes, numbers one that predicts numbers."""
        head = shown(self.__struct_config__.tag)
        if (subtask == "framewise") != ("frames" in self.predicts) and self.predicts != ANYTHING:
            yield "head_type", f"{head} {self.whole_problem(subtask)}"
        elif subtask == "regression" and "numbers" not in self.predicts:
            yield (
                "head_type",
                f'{head} cannot predict numbers, and this is a regression: set it to "regression",'
                ' or data.subtask to "multiclass" where the numbers are classes',
            )
        elif subtask not in ("regression", "framewise") and "classes" not in self.predicts:
            yield (
                "head_type",
                f'{head} cannot predict {subtask} labels: set it to "classification", or'
                ' data.subtask to "regression" where the data are numbers',
            )

    def whole_problem(self, subtask: str) -> str:
        """What is wrong where either the head or the targets are of frames."""
        if subtask == "framewise":
            return (
                "predicts whole samples, and the labels are a class of each frame: set it to"
                ' "framewise_decoder_1d"'
            )
        return (
            f"predicts a class of each frame, and the targets are {subtask} of whole samples: set"
            ' it to "classification" or "regression", or give a label a frame'
            ' (data.frames.label_level = "frame")'
        )


class BagHead(BaseHead):
    """A head on the instances of a bag."""

    built_in: ClassVar[str] = "head_mil"
    takes: ClassVar[HeadInput] = "bags"


class ClassificationHead(BaseHead, tag="classification", tag_field="head_type"):
    """Dropout and one linear layer to the classes."""

    predicts: ClassVar[tuple[Prediction, ...]] = ("classes",)

    dropout: Dropout = 0.0
    """Probability of dropping a feature before the linear layer."""
    init_std: Annotated[float, Meta(gt=0)] | None = None
    """Standard deviation of normal initial weights with bias 0; none keeps torch's default."""


class RegressionHead(BaseHead, tag="regression", tag_field="head_type"):
    """Dropout and one linear layer to the targets."""

    predicts: ClassVar[tuple[Prediction, ...]] = ("numbers",)

    dropout: Dropout = 0.0
    """Probability of dropping a feature before the linear layer."""
    out_dim: Annotated[int, Meta(ge=1)] | None = None
    """Number of targets; none takes the data's, a number is checked against it."""

    def count_problems(self, targets: int, source: str) -> Iterator[tuple[str, str]]:
        """As many outputs as targets; source is what says how many those are."""
        if self.out_dim is not None and self.out_dim != targets:
            yield "out_dim", f"{self.out_dim} outputs, but {source} says {targets} targets"


OF_INSTANCES = read_if("instance_eval", True)
OF_PREP = read_if("feature_prep", True)
OF_TOP = read_if("stochastic_topk", True)


class ClamHead(BagHead, tag="clam", tag_field="head_type"):
    """Clustering-constrained attention over the instances of a bag (Lu et al., Nature Biomedical
    Engineering 2021).

    The published method is feature_prep = false, cosine_head = false, dropout = 0.25,
    instance_eval = true, instance_loss = "svm", bag_weight = 0.7.
    """

    built_in: ClassVar[str] = "head_clam"

    variant: Literal["sb", "mb"] = "mb"
    """One attention branch for all classes (sb) or one per class, each with its own scorer (mb)."""
    gate: bool = True
    """Whether the tanh of the attention is multiplied by a sigmoid gate."""
    size_arg: Literal["tiny", "small", "big"] = "small"
    """Hidden and attention sizes: tiny 256 and 128, small 512 and 256, big 512 and 384."""
    dropout: Dropout = 0.0
    """Probability of dropping a hidden feature, and an attention feature after tanh and gate."""
    k_sample: Annotated[int, Meta(ge=1), OF_INSTANCES] = 8
    """Instances labelled at each end of the attention, at most half of the bag at either end."""
    subtyping: Annotated[bool, OF_INSTANCES] = False
    """Whether the classes exclude one another: the most attended instances of every absent class
    are labelled negative too."""
    feature_prep: bool = True
    """Whether instances pass a LayerNorm before the projection."""
    l2_normalize_features: Annotated[bool, OF_PREP] = True
    """Whether instances get length 1 after the LayerNorm."""
    layer_norm_eps: Annotated[float, Meta(gt=0), OF_PREP] = 1e-6
    """Added to the variance in the LayerNorm."""
    cosine_head: bool = True
    """Whether bag logits are scaled cosines with a vector per class instead of linear scores."""
    cosine_scale: Annotated[float, Meta(gt=0), read_if("cosine_head", True)] = 20.0
    """Logit of a bag vector that points along its class vector."""
    instance_eval: bool = False
    """Whether instances at both ends of the attention train a classifier per class."""
    instance_loss: Annotated[Literal["ce", "svm"], OF_INSTANCES] = "ce"
    """Loss of the instance classifiers: cross-entropy or smooth top-1 SVM."""
    instance_loss_weight: Annotated[float, Meta(ge=0), OF_INSTANCES] = 1.0
    """Factor of the instance loss."""
    bag_weight: Annotated[float, Meta(ge=0, le=1), OF_INSTANCES] | None = None
    """Share c of the bag loss: c bag + (1 - c) instance_loss_weight instance, 0.7 in the original;
    none is bag + instance_loss_weight instance."""
    attn_drop: Dropout = 0.0
    """Probability that training leaves an instance out of a branch's attention; the most attended
    one always stays."""
    stochastic_topk: bool = False
    """Whether the bag logits must agree with those of the noisy top instances alone."""
    topk_k: Annotated[int, Meta(ge=1), OF_TOP] = 2
    """Top instances of that comparison; all of a smaller bag."""
    topk_tau: Annotated[float, Meta(gt=0), OF_TOP] = 0.25
    """Temperature of the attention over the top instances."""
    topk_noise_std: Annotated[float, Meta(ge=0), OF_TOP] = 0.1
    """Standard deviation of the noise on their hidden features."""
    topk_consistency_weight: Annotated[float, Meta(ge=0), OF_TOP] = 1.0
    """Factor of the squared difference of the logits."""

    @property
    def needs_classes(self) -> str | None:
        return "instance_eval" if self.instance_eval else None


class AbmilHead(BagHead, tag="abmil", tag_field="head_type"):
    """Attention-based pooling of instances (Ilse et al., ICML 2018) and one linear layer."""

    gate: bool = True
    """Whether the tanh of the attention is multiplied by a sigmoid gate."""
    hidden: Annotated[int, Meta(ge=1)] = 512
    """Features of an instance after the projection."""
    attention: Annotated[int, Meta(ge=1)] = 128
    """Features of an instance in the attention."""
    dropout: Dropout = 0.0
    """Probability of dropping a hidden feature, and an attention feature after tanh and gate."""
    feature_prep: bool = False
    """Whether instances pass a LayerNorm before the projection."""


class DsmilHead(BagHead, tag="dsmil", tag_field="head_type"):
    """Dual-stream pooling (Li, Li, Eliceiri, CVPR 2021): the highest-scoring instance of each
    class, and attention by likeness to it; both are fitted to the labels, half and half."""

    mixes: ClassVar[bool] = False

    attention: Annotated[int, Meta(ge=1)] = 128
    """Features of an instance in the comparison with the highest-scoring one."""
    dropout: Dropout = 0.0
    """Probability of dropping a feature of an instance before the attention stream sums it up."""
    average: bool = True
    """Whether the prediction is the mean of both streams, as in the paper, or that of the attention
    stream alone, the default of the published code."""


class TransmilHead(BagHead, tag="transmil", tag_field="head_type"):
    """Transformer over the instances of a bag (TransMIL, Shao et al., NeurIPS 2021): two layers of
    Nystrom attention with convolutions over a square of the instances between them; instances are
    to stand in an order that means something, such as that of their coordinates."""

    hidden: Annotated[int, Meta(ge=1)] = 512
    """Features of an instance after the projection."""
    heads: Annotated[int, Meta(ge=1)] = 8
    """Attention heads; they share the hidden features."""
    landmarks: Annotated[int, Meta(ge=1)] = 256
    """Means of neighbouring instances by which attention is approximated; bags are filled up with
    zeros to a multiple of them."""
    dropout: Dropout = 0.1
    """Probability of dropping a feature of what attention adds."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Attention heads have equally many features."""
        if self.hidden % self.heads:
            yield (
                "heads",
                f"{self.heads} heads cannot share model.head.hidden = {self.hidden} features: it"
                " must divide them",
            )


class TemporalTransformerHead(BagHead, tag="temporal_transformer", tag_field="head_type"):
    """A small transformer over instances in their order, such as the frames of a clip or the slices
    of a volume: differences between them, sines of the place in the order, a class token, blocks of
    attention and MLP, and one linear layer."""

    hidden: Annotated[int, Meta(ge=2)] = 128
    """Features of an instance after the projection."""
    differences: Annotated[int, Meta(ge=0, le=16)] = 2
    """From how many of the instances behind it the absolute differences of an instance enter beside
    it (as in temporal difference networks, Wang et al., CVPR 2021): motion is hard to learn without
    them. 0 is the instance alone."""
    depth: Annotated[int, Meta(ge=1)] = 2
    """Blocks."""
    heads: Annotated[int, Meta(ge=1)] = 4
    """Attention heads; they share the hidden features."""
    mlp_ratio: Annotated[float, Meta(gt=0)] = 2.0
    """Hidden features of the MLP in proportion to those of an instance."""
    dropout: Dropout = 0.1
    """Probability of dropping a feature of what attention and MLP add."""
    feature_prep: bool = True
    """Whether instances pass a LayerNorm before the projection."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Attention heads have equally many features, and sines come with cosines."""
        if self.hidden % self.heads or self.hidden % 2:
            yield (
                "heads",
                f"model.head.hidden = {self.hidden} must be even and a multiple of the"
                f" {self.heads} heads",
            )


class MeanMilHead(BagHead, tag="mean", tag_field="head_type"):
    """Mean over the instances of a bag, then one linear layer."""

    dropout: Dropout = 0.0
    """Probability of dropping a feature of the bag before the linear layer."""


class MaxMilHead(BagHead, tag="max", tag_field="head_type"):
    """Largest value per feature over the instances of a bag, then one linear layer."""

    dropout: Dropout = 0.0
    """Probability of dropping a feature of the bag before the linear layer."""


class FramewiseHead(BaseHead, tag="framewise_decoder_1d", tag_field="head_type"):
    """A class of each frame of a clip of any length: maps of the encoder's stages, averaged over
    space, in a U-Net along time (Ronneberger et al., MICCAI 2015). The output of the encoder is
    upsampled from stage to stage, joined with it, and passes two convolutions over time."""

    built_in: ClassVar[str] = "head_framewise"
    takes: ClassVar[HeadInput] = "stages"
    predicts: ClassVar[tuple[Prediction, ...]] = ("frames",)

    stages: tuple[str, ...] | None = None
    """Stages that are joined, from the input on, by their names in the encoder, as in
    ("stem", "layer2", "layer3"); its output, as layer4, is always there. none takes the encoder's
    usual ones, [] its output alone."""
    width: Annotated[int, Meta(ge=1)] | None = None
    """Channels behind the convolutions of each level; none takes those of its stage."""
    kernel: Annotated[int, Meta(ge=1)] = 3
    """Time points that a convolution sees; an odd number."""
    dropout: Dropout = 0.0
    """Probability of dropping a feature before the last layer, the same one in all frames."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Kernels have a middle, and no stage is joined twice."""
        if self.kernel % 2 == 0:
            yield "kernel", f"{self.kernel} has no middle: use {self.kernel + 1}"
        for name in dict.fromkeys(self.stages or ()):
            if (self.stages or ()).count(name) > 1:
                yield "stages", f"{shown(name)} is named twice"


class CustomHead(BaseHead, tag="custom", tag_field="head_type", kw_only=True):
    """A head of your own: a function of your package that returns a module."""

    takes: ClassVar[HeadInput] = "either"
    predicts: ClassVar[tuple[Prediction, ...]] = ANYTHING

    target: str
    """Where the function, or class, is: "package.module:function"; called as function(width=...,
    outputs=..., **options). Its attribute consumes, or that of its module, is "pooled", vectors
    (B, D), unless it says "features"."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""

    def takes_features(self) -> bool:
        with suppress(UserError):  # no such function, which is said where the head is built
            return getattr(find_target("model.head", self.target), "consumes", None) == "features"
        return False

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from target_problems(self.target)


Head = (
    ClassificationHead
    | RegressionHead
    | ClamHead
    | AbmilHead
    | DsmilHead
    | TransmilHead
    | TemporalTransformerHead
    | MeanMilHead
    | MaxMilHead
    | FramewiseHead
    | CustomHead
)


class ModelSpec(Spec):
    """encoder -> aggregation -> head."""

    encoder: Encoder = TimmEncoder()
    """What turns a sample into features."""
    head: Head = ClassificationHead()
    """What turns features into predictions."""
    feature_aggregation_method: Aggregation | None = None
    """How tokens become one vector; pooled is the library's own pooling. none is that where more
    than picking or averaging tokens is trained into it, else cls_token where the encoder has one,
    else avg."""

    def aggregation_problems(self) -> Iterator[tuple[str, str]]:
        """A head that takes tokens or instances leaves nothing to aggregate; of a custom head its
        function or module says so."""
        if self.feature_aggregation_method is not None:
            head = shown(self.head.__struct_config__.tag)
            yield (
                "feature_aggregation_method",
                f"{shown(self.feature_aggregation_method)} is unread with this head:"
                f" model.head.head_type = {head} takes tokens or instances themselves; leave it"
                " out",
            )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Nothing is aggregated for a head that takes tokens, and no class token is pooled where
        the encoder's name says that there is none."""
        method = self.feature_aggregation_method
        if method is not None and self.head.takes_features():
            yield from self.aggregation_problems()
            return
        if method is not None and self.encoder.takes == "features":
            yield (
                "feature_aggregation_method",
                f"{shown(method)} is unread with precomputed features, which are vectors already:"
                " leave it out",
            )
        if method in ("cls_token", "joint") and self.encoder.without_class_token:
            yield (
                "feature_aggregation_method",
                f"{shown(method)} needs a class token, which {self.encoder.without_class_token}"
                ' does not have: use "avg", or leave it out',
            )
