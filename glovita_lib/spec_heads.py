"""Head section of a spec: what turns features into predictions."""

from typing import Annotated, Any

from msgspec import Meta

from glovita_lib.spec import Spec

Dropout = Annotated[float, Meta(ge=0, lt=1)]


class ClassificationHead(Spec, tag="classification", tag_field="head_type"):
    """Dropout and one linear layer to the classes."""

    dropout: Dropout = 0.0
    """Probability of dropping a feature before the linear layer."""
    init_std: Annotated[float, Meta(gt=0)] | None = None
    """Standard deviation of normal initial weights with bias 0; none keeps torch's default."""


class RegressionHead(Spec, tag="regression", tag_field="head_type"):
    """Dropout and one linear layer to the targets."""

    dropout: Dropout = 0.0
    """Probability of dropping a feature before the linear layer."""
    out_dim: Annotated[int, Meta(ge=1)] | None = None
    """Number of targets; none takes the data's, a number is checked against it."""


class CustomHead(Spec, tag="custom", tag_field="head_type", kw_only=True):
    """A head of your own: a function of your package that returns a module."""

    target: str
    """Where the function is: "package.module:function"; called as function(width=..., outputs=...,
    **options)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""


Head = ClassificationHead | RegressionHead | CustomHead
