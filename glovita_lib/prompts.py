"""Visual prompt tuning: learned tokens beside those of the image (Jia et al., ECCV 2022).

Prompts stand in front of the sequence, the place does not matter to attention. They are taken out
behind the last block they pass, so that all that follows sees the tokens it knows.

B batch, N tokens, P prompts, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.adapter import Insert, Shared, freeze, insert
from glovita_lib.grid import sequence_width
from glovita_lib.inserts import device_of
from glovita_lib.spec import UserError
from glovita_lib.spec_peft import VisualPromptTuning
from glovita_lib.structure import blocks, is_conv, trunk


class PromptProjection(Shared):
    """From the prompts' own width to the encoder's, the same in all blocks."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="linear")
        nn.init.zeros_(self.linear.bias)


class Prompts(Insert):
    """Prompts that enter in front of a block, leave behind it, or both."""

    def __init__(
        self,
        spec: VisualPromptTuning,
        projection: PromptProjection | None,
        *,
        width: int,
        bound: float,
        leave: bool,
    ) -> None:
        super().__init__()
        self.dropout, self.count, self.leave = spec.dropout, spec.num_tokens, leave
        self.shared = (projection,)  # in a tuple: it is the encoder's child, not this one's
        tokens = torch.empty(1, spec.num_tokens, spec.project_dim or width)
        self.tokens = nn.Parameter(nn.init.uniform_(tokens, -bound, bound))

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """The block on P + N tokens."""
        tokens = self.tokens if self.shared[0] is None else self.shared[0].linear(self.tokens)
        tokens = F.dropout(tokens, self.dropout, self.training).to(x.dtype)
        x = torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)  # (B, P + N, D)
        x = forward(x, *args, **kwargs)
        return x[:, self.count :] if self.leave else x


class Leave(Insert):
    """Takes the prompts out behind the last block."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def around(self, forward: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """The block's output without the prompts."""
        return forward(x, *args, **kwargs)[:, self.count :]


def bound_of(root: nn.Module, width: int) -> float:
    """Bound of the uniform start, sqrt(6 / (inputs of a patch + D)) as in the paper."""
    embed = next((m for m in root.modules() if is_conv(m)), None)
    inputs = width if embed is None else embed.weight[0].numel()
    return math.sqrt(6 / (inputs + width))


def apply_prompts(spec: VisualPromptTuning, model: nn.Module) -> None:
    """Freeze the encoder and add prompts to its blocks.

    Raises:
        UserError: an encoder whose blocks do not work on a sequence of tokens.
    """
    root = trunk(model)
    units = blocks(root)
    width = sequence_width(root)
    if width is None:
        raise UserError(
            'peft.method = "visual_prompt_tuning" needs blocks on one sequence of tokens (ViT,'
            " DINO, EVA); this encoder has windows, stages or convolutions; lora or ssf"
            " fit every encoder"
        )
    depth = spec.deep_layers or len(units)
    if depth > len(units):
        raise UserError(
            f"peft.deep_layers = {depth}: this encoder has {len(units)} blocks; valid: 1 to"
            f" {len(units)}"
        )
    projection = None if spec.project_dim is None else PromptProjection(spec.project_dim, width)
    bound, device = bound_of(root, width), device_of(root)
    freeze(root)
    entering = units[:depth] if spec.deep else units[:1]
    for unit in entering:
        leave = spec.deep or len(units) == 1
        child = Prompts(spec, projection, width=width, bound=bound, leave=leave)
        insert(unit, child.to(device))
    if not spec.deep and len(units) > 1:
        insert(units[-1], Leave(spec.num_tokens))
    if projection is not None:
        root.shared = projection.to(device)
    for unit in entering if spec.deep else units:
        lengthen_prefix(unit, spec.num_tokens)


def lengthen_prefix(unit: nn.Module, count: int) -> None:
    """Attention that leaves its prefix tokens out of the rotary embedding leaves the prompts
    out."""
    for module in unit.modules():
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            module.num_prefix_tokens += count
