"""Model section of a spec: encoder, aggregation and head."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_heads import ClassificationHead, Head

Channels = Annotated[int, Meta(ge=1)]
Aggregation = Literal["cls_token", "avg", "sum", "mean_all", "joint", "pooled"]


class TimmEncoder(Spec, tag="timm", tag_field="encoder_type"):
    """Any image model of timm by its name, e.g. resnet18.a1_in1k."""

    type: str = "vit_base_patch16_224"
    """Model name; timm.list_models() has them all."""
    pretrained: bool = True
    """Whether the published weights are downloaded; weights takes a file instead."""
    weights: str | None = None
    """File of weights (pth, pt, safetensors) to start from; nothing is downloaded then."""
    weights_order: bool = False
    """Whether weights is matched by the order and shape of its tensors, for files of the same
    network under other names."""
    small_images: bool = False
    """Whether a ResNet's stem of stride 4 becomes one of 3x3 convolutions of stride 1, for images
    of about 32 pixels."""
    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""
    model_kwargs: dict[str, Any] = {}
    """Further arguments of timm.create_model; an unknown one is an error."""


class TorchvisionEncoder(Spec, tag="torchvision", tag_field="encoder_type"):
    """Any image classification model of torchvision by its name, e.g. convnext_tiny."""

    type: str = "convnext_tiny"
    """Model name; torchvision.models.list_models() has them all."""
    pretrained: bool = True
    """Whether the published weights are downloaded; weights takes a file instead."""
    weights: str | None = None
    """File of weights (pth, pt, safetensors) to start from; nothing is downloaded then."""
    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Dropout inside the model, where the model has it."""
    stochastic_depth_prob: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Probability of skipping the last block, where the model has it."""
    model_kwargs: dict[str, Any] = {}
    """Further arguments of the model's constructor; an unknown one is an error."""


class PrecomputedEncoder(Spec, tag="precomputed", tag_field="encoder_type"):
    """No network: the samples of data set precomputed_features are features already."""

    feature_dim: Annotated[int, Meta(ge=1)] | None = None
    """Width of the features; none takes the file's, a number is checked."""


class CustomEncoder(Spec, tag="custom", tag_field="encoder_type", kw_only=True):
    """An encoder of your own: a function of your package that returns a module."""

    target: str
    """Where the function is: "package.module:function"; called as function(input_channels=...,
    **options). Its module gives vectors (B, D), maps (B, D, H, W) or tokens (B, N, D), of which
    its attributes n_prefix and has_cls say what comes before the patches."""
    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""


Encoder = TimmEncoder | TorchvisionEncoder | PrecomputedEncoder | CustomEncoder


class Model(Spec):
    """encoder -> aggregation -> head."""

    encoder: Encoder = TimmEncoder()
    """What turns a sample into features."""
    head: Head = ClassificationHead()
    """What turns features into predictions."""
    feature_aggregation_method: Aggregation | None = None
    """How tokens become one vector; pooled is the library's own pooling. none is that where more
    than picking or averaging tokens is trained into it, else cls_token where the encoder has one,
    else avg."""
