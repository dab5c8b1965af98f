"""Outputs of an encoder's layers, with timm's meaning of a layer where the encoder is timm's.

A layer is one entry of timm's `forward_intermediates`: a block of a transformer, a stage of a
convolutional network; of other models it is a block, as `Encoder.blocks` lists them. Without `norm`
a layer's output is the raw residual stream, with it the network's final norm follows wherever its
width fits: on every block of a ViT, on the last stage of a Swin, nowhere in a ResNet. Unlike in
timm a norm behind the pooling (`fc_norm`) counts as the final norm, as it does for the tokens of
the encoder's output. B batch, N tokens, P prefix tokens, D width, H W grid.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn

from glovita_lib.layers import Features
from glovita_lib.spec import UserError
from glovita_lib.trunk import Encoder, evaluating

NORMS = ("encoder.ln", "norm")  # final norms of torchvision's ViT and Swin, by their names


@dataclass(frozen=True)
class Layers:
    """Which layers of which encoder are read."""

    encoder: Encoder
    indices: tuple[int, ...]  # from 0
    norm: bool  # whether the final norm is applied to each

    def __call__(self, x: Tensor) -> list[Features]:
        """Features of every layer for inputs (B, C, H, W), in the order of `indices`."""
        if is_timm(self.encoder):
            return self.by_timm(x)
        return self.by_hooks(x)

    def by_timm(self, x: Tensor) -> list[Features]:
        """Through timm, which gives maps (B, D, H, W) and, of some models, prefix tokens
        (B, P, D)."""
        wanted = sorted(set(self.indices))
        method = self.encoder.net.forward_intermediates
        gives_prefix = "return_prefix_tokens" in signature(method).parameters
        keywords = {"return_prefix_tokens": True} if gives_prefix and self.encoder.n_prefix else {}
        outputs = method(x, indices=wanted, norm=self.norm, intermediates_only=True, **keywords)
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
        if self.norm and tokens.shape[2] == encoder.width:
            tokens = encoder.norm(tokens)  # fc_norm, which timm leaves out; else nothing
        n_prefix = 0 if prefix is None else prefix.shape[1]
        return Features(tokens, grid, n_prefix, encoder.has_cls and n_prefix > 0, None)

    def by_hooks(self, x: Tensor) -> list[Features]:
        """Through hooks on the blocks of a network that has no such method."""
        blocks, found = self.encoder.blocks(), {}

        def note(index: int) -> object:
            # a copy, as an activation behind the block may work in place
            return lambda module, inputs, output: found.__setitem__(index, copied(output))

        hooks = [blocks[i].register_forward_hook(note(i)) for i in set(self.indices)]
        try:
            self.encoder.trunk(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [self.hooked(found[index], index, x.shape[-2:]) for index in self.indices]

    def hooked(self, raw: Tensor, index: int, size: torch.Size) -> Features:
        """Output of a block as tokens.

        Raises:
            UserError: it is neither a map nor tokens.
        """
        encoder = self.encoder
        if not isinstance(raw, Tensor) or raw.ndim not in (3, 4):
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise UserError(
                f"extract.layers: layer {index} of {encoder.name} gives {shape}, neither a map"
                " (B, D, H, W) nor tokens (B, N, D)"
            )
        if raw.ndim == 4 and type(encoder.net).__name__ == "SwinTransformer":
            raw = raw.permute(0, 3, 1, 2)  # the only ones whose blocks are channels-last
        tokens = encoder.to_tokens(raw)
        if self.norm:
            tokens = final_norm(encoder, tokens.shape[2])(tokens)
        n_prefix = encoder.n_prefix if raw.ndim == 3 else 0
        grid = encoder.grid(raw, size)
        return Features(tokens, grid, n_prefix, encoder.has_cls and bool(n_prefix), None)

    def probe(self, input_shape: tuple[int, ...]) -> tuple[list[Features], tuple[int, ...]]:
        """Features of one random input, and the indices of the layers that the norm changes.

        Raises:
            UserError: the model cannot norm its layers.
        """
        device = next(self.encoder.net.parameters()).device
        x = torch.randn(input_shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad(), evaluating(self.encoder):
            try:
                features = self(x)
            except AssertionError as error:  # timm's, of Hiera and HieraDet
                if not self.norm or "norm" not in str(error):
                    raise
                raise UserError(
                    f"extract.norm = true: timm cannot norm the layers of {self.encoder.name};"
                    " set extract.norm = false"
                ) from None
            raw = Layers(self.encoder, self.indices, norm=False)(x)
        pairs = zip(self.indices, features, raw, strict=True)
        changed = {index for index, a, b in pairs if not torch.equal(a.tokens, b.tokens)}
        return features, tuple(sorted(changed))


def is_timm(encoder: Encoder) -> bool:
    """Whether layers come from timm's own method."""
    return hasattr(encoder.net, "forward_intermediates")


def copied(output: object) -> object:
    """A copy of a tensor; anything else as it is."""
    return output.clone() if isinstance(output, Tensor) else output


def final_norm(encoder: Encoder, width: int) -> nn.Module:
    """The LayerNorm behind the last block of a network without timm's method, for tokens of this
    width; else nothing."""
    modules = dict(encoder.net.named_modules())
    found = [modules[name] for name in NORMS if isinstance(modules.get(name), nn.LayerNorm)]
    fits = found and found[0].normalized_shape == (width,)
    return found[0] if fits else nn.Identity()


def choose_layers(
    encoder: Encoder, layers: tuple[int, ...], *, norm: bool, input_shape: tuple[int, ...]
) -> Layers:
    """The layers of an encoder by index, negative ones from the last, in this order.

    Raises:
        UserError: it has no such layer.
    """
    count = number_of_layers(encoder, input_shape)
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        valid = f"{count} layers, valid are {-count} to {count - 1}" if count else "no layers"
        raise UserError(
            f"extract.layers: encoder {encoder.name} has {valid}; got {', '.join(map(str, wrong))}"
        )
    return Layers(encoder, tuple(layer % count for layer in layers), norm)


def number_of_layers(encoder: Encoder, input_shape: tuple[int, ...]) -> int:
    """How many layers can be read."""
    net = encoder.net
    if not is_timm(encoder):
        return len(encoder.blocks())
    zeros = torch.zeros(input_shape, device=next(net.parameters()).device)
    with torch.no_grad(), evaluating(encoder):
        return len(net.forward_intermediates(zeros, intermediates_only=True))
