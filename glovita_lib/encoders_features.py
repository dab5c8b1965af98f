"""The encoder of precomputed features: it hands them on, so that everything behind it is the same.

B batch, D width.
"""

from torch import Tensor, nn

from glovita_lib.bags import Bags
from glovita_lib.encoders import build_encoder
from glovita_lib.layers import Features
from glovita_lib.spec import UserError
from glovita_lib.spec_model import PrecomputedEncoder


class Identity(nn.Module):
    """Vectors (B, D) or bags of them, as they are."""

    name = "precomputed"
    has_cls = has_patches = has_tokens = False
    n_prefix = 0
    pooling, plain = "pooled", False  # a vector is what a head takes, see layers.Features
    pooling_parameters: frozenset[str] = frozenset()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = self.pooled_width = width

    def forward(self, x: Tensor | Bags, *, pooled: bool = True) -> Features | Bags:
        """Vectors become features; bags are for heads that take instances."""
        return x if isinstance(x, Bags) else Features(None, None, 0, False, x, self.pooling)

    def blocks(self) -> list[nn.Module]:
        """None."""
        return []

    def layer_ids(self) -> dict[str, int]:
        """No parameters."""
        return {}


@build_encoder.register
def _(
    spec: PrecomputedEncoder, *, channels: int, image_size: int | None, load_weights: bool
) -> nn.Module:
    if spec.feature_dim is not None and spec.feature_dim != channels:
        raise UserError(
            f"model.encoder.feature_dim = {spec.feature_dim}: the features have width {channels};"
            f" set feature_dim = {channels} or leave it out"
        )
    return Identity(channels)
