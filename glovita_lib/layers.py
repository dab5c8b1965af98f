"""What an encoder gives: one type for every family.

B batch, N tokens, D width, H W grid of patches.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Features:
    """The output of an encoder.

    tokens are final-normed, prefix tokens (CLS first, then registers) before patch tokens, which
    run over the grid row by row. Feature maps (B, D, H, W) or (B, H, W, D) come as their H W
    tokens, as the library pools them. pooled is the library's own vector before the classifier,
    and pooling says what it is:

    - "cls_token": the CLS token and the layers trained behind it
    - "avg": the mean of the patch tokens and the layers trained behind it
    - "pooled": anything else, e.g. attention pooling, or a flattened map (VGG)
    """

    tokens: Tensor | None  # (B, N, D); None for encoders that give one vector only
    grid: tuple[int, ...] | None  # of the N - n_prefix patch tokens
    n_prefix: int  # CLS and registers
    has_cls: bool
    pooled: Tensor | None  # (B, D'); None where not asked for
    pooling: str | None = None
    mask: Tensor | None = None  # (B, N) bool, True where a token is real; None: all are

    @property
    def patches(self) -> Tensor:
        """Patch tokens (B, N - n_prefix, D)."""
        return self.tokens[:, self.n_prefix :]
