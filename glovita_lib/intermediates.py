"""Outputs of an encoder's layers, with timm's meaning of a layer where the encoder is timm's.

A layer is one entry of timm's `forward_intermediates`: a block of a transformer, a stage of a
convolutional network; of torchvision models it is a block, as `Encoder.blocks` lists them. Without
`norm` a layer's output is the raw residual stream. B batch, N tokens, D width, H W grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glovita_lib.layers import Features
from glovita_lib.spec import UserError
from glovita_lib.trunk import Encoder, evaluating


@dataclass(frozen=True)
class Layers:
    """Which layers of which encoder are read."""

    encoder: Encoder
    indices: tuple[int, ...]  # from 0
    norm: bool  # whether the final norm is applied to each

    def __call__(self, x: Tensor) -> list[Features]:
        """Features of every layer for inputs (B, C, H, W), in the order of `indices`."""
        if hasattr(self.encoder.net, "forward_intermediates"):
            return self.by_timm(x)
        return self.by_hooks(x)

    def by_timm(self, x: Tensor) -> list[Features]:
        """Through timm, which gives maps (B, D, H, W) and prefix tokens (B, P, D)."""
        wanted = sorted(set(self.indices))
        encoder = self.encoder
        keywords = {"return_prefix_tokens": True} if encoder.n_prefix else {}
        outputs = encoder.net.forward_intermediates(
            x, indices=wanted, norm=self.norm, intermediates_only=True, **keywords
        )
        found = dict(zip(wanted, outputs, strict=True))
        return [self.features(found[index]) for index in self.indices]

    def features(self, output: Tensor | tuple[Tensor, Tensor]) -> Features:
        """A map, with its prefix tokens where there are some, as tokens."""
        patches, prefix = output if isinstance(output, tuple) else (output, None)
        grid = tuple(patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        if prefix is not None:
            tokens = torch.cat([prefix, tokens], dim=1)
        encoder = self.encoder
        return Features(tokens, grid, encoder.n_prefix, encoder.has_cls, None)

    def by_hooks(self, x: Tensor) -> list[Features]:
        """Through hooks on the blocks of a network that has no such method."""
        blocks, found = self.encoder.blocks(), {}

        def note(index: int) -> object:
            return lambda module, inputs, output: found.__setitem__(index, output)

        hooks = [blocks[i].register_forward_hook(note(i)) for i in set(self.indices)]
        try:
            self.encoder.trunk(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [self.hooked(found[index], x.shape[-2:]) for index in self.indices]

    def hooked(self, raw: Tensor, size: torch.Size) -> Features:
        """Output of a block as tokens."""
        encoder = self.encoder
        tokens = encoder.to_tokens(raw)
        if self.norm:
            tokens = final_norm(encoder)(tokens)
        n_prefix = encoder.n_prefix if raw.ndim == 3 else 0
        grid = encoder.grid(raw, size)
        return Features(tokens, grid, n_prefix, encoder.has_cls and bool(n_prefix), None)


def final_norm(encoder: Encoder) -> nn.Module:
    """The LayerNorm behind the last block of a torchvision model, for tokens; else nothing."""
    places = ("encoder.ln", "norm")
    modules = dict(encoder.net.named_modules())
    found = [modules[name] for name in places if name in modules]
    return found[0] if found else nn.Identity()


def choose_layers(
    encoder: Encoder, layers: tuple[int, ...], *, norm: bool, input_shape: tuple[int, ...]
) -> Layers:
    """The layers of an encoder by index, negative ones from the last.

    Raises:
        UserError: it has no such layer.
    """
    count = number_of_layers(encoder, input_shape)
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise UserError(
            f"extract.layers: encoder {encoder.name} has {count} layers, valid are {-count} to"
            f" {count - 1}; got {', '.join(map(str, wrong))}"
        )
    return Layers(encoder, tuple(layer % count for layer in layers), norm)


def number_of_layers(encoder: Encoder, input_shape: tuple[int, ...]) -> int:
    """How many layers can be read."""
    net = encoder.net
    if not hasattr(net, "forward_intermediates"):
        return len(encoder.blocks())
    device = next(net.parameters()).device
    with torch.no_grad(), evaluating(encoder):
        return len(
            net.forward_intermediates(
                torch.zeros(input_shape, device=device), intermediates_only=True
            )
        )
