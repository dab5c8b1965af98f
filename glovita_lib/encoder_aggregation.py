"""From tokens to one vector per sample, and the outputs of layers.

t_0 is the CLS token, t_1 ... t_P the patch tokens; registers are neither. B batch, D width.

- cls_token: t_0
- avg: mean of t_1 ... t_P
- patch_mean: the same, without layers trained behind it
- sum: sum of t_1 ... t_P
- mean_all: mean of t_0 ... t_P, where there is no CLS token that of t_1 ... t_P
- joint: t_0 and avg side by side, width 2D
- pooled: what the library itself gives its classifier

Where the library's own pooling is the CLS token or the mean, cls_token or avg is its vector, with
the layers it trained behind the pooling (norm, hidden layer, dropout): a ConvNeXt's avg is
norm(mean), a MobileNetV3's act(W mean + b).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from glovita_lib.encoder import Encoder, Features, evaluating, vector_of_tokens
from glovita_lib.errors import UserError


def aggregate(features: Features, method: str) -> Tensor:
    """One vector per sample, (B, D), or (B, 2D) for joint; masked tokens count for nothing."""
    if method == "pooled" or (method == features.pooling and features.mask is None):
        assert features.pooled is not None, "the encoder was not asked for it, see `reads_pooled`"
        return features.pooled
    assert features.tokens is not None, "a vector serves no other method, see `served`"
    if method == "cls_token":
        return features.tokens[:, 0]
    if method in ("avg", "patch_mean"):
        return masked_sum(features) / count(features)
    if method == "sum":
        return masked_sum(features)
    if method == "joint":
        return torch.cat([aggregate(features, "cls_token"), aggregate(features, "avg")], dim=1)
    assert method == "mean_all", method
    if not features.has_cls:
        return aggregate(features, "avg")
    total = features.tokens[:, 0] + masked_sum(features)  # (B, D)
    return total / (count(features) + 1)


def masked_sum(features: Features) -> Tensor:
    """Sum of the real patch tokens, (B, D)."""
    if features.mask is None:
        return features.patches.sum(1)
    real = features.mask[:, features.n_prefix :, None]  # (B, N - n_prefix, 1)
    return features.patches.where(real, 0).sum(1)  # not a product: padding may hold NaN


def count(features: Features) -> Tensor | int:
    """Number of real patch tokens, (B, 1) where it varies; at least 1."""
    if features.mask is None:
        return features.patches.shape[1]
    return features.mask[:, features.n_prefix :].sum(1, keepdim=True).clamp(min=1)


def layers_call(
    encoder: Encoder,
    indices: Sequence[int],
    norm: bool,
    normed: Sequence[int],
    method: str | None,
    keep: bool,
    gives_prefix: bool,
) -> tuple[str, str]:
    """What layers give, as an expression of `maps`, and the call of timm that these are.

    Args:
        indices: the layers, side by side in this order.
        norm: whether timm norms them.
        normed: those that a norm changes.
        method: how tokens become a vector; None: tokens.
        keep: whether the prefix tokens stay in front of the patches.
        gives_prefix: whether timm gives them.
    """
    wanted, n_prefix = sorted(set(indices)), encoder.n_prefix if gives_prefix else 0
    prefix = ", return_prefix_tokens=True" * gives_prefix
    parts = []
    for index in indices:
        entry = f"maps[{wanted.index(index)}]"
        tokens = f"{entry}{'[0]' * gives_prefix}.flatten(2).transpose(1, 2)"
        if gives_prefix:
            tokens = f"torch.cat([{entry}[1], {tokens}], 1)"
        tokens = encoder.norm_call(tokens) if norm and index in normed else tokens
        if method is not None:
            has_cls = encoder.has_cls and gives_prefix
            parts.append(vector_of_tokens(method, tokens, n_prefix, has_cls))
        else:
            parts.append(tokens if keep or not n_prefix else f"{tokens}[:, {n_prefix}:]")
    joined = parts[0] if len(parts) == 1 else f"torch.cat([{', '.join(parts)}], -1)"
    call = f"indices={wanted}, norm={norm}{prefix}, intermediates_only=True"
    return joined, f"maps = net.forward_intermediates(x, {call})"


def served(encoder: Encoder) -> tuple[str, ...]:
    """The methods an encoder can serve."""
    cls = ["cls_token"] if encoder.has_cls else []
    patches = ["avg", "patch_mean", "sum", "mean_all"] if encoder.has_patches else []
    joint = ["joint"] if cls and patches else []
    pooled = ["pooled"] if encoder.pooling else []
    return (*cls, *patches, *joint, *pooled)


def resolve_method(method: str | None, encoder: Encoder) -> str:
    """The method asked for; unset: the library's own pooling where layers are trained behind it or
    where it is neither CLS token nor mean, else the CLS token, else the mean.

    Raises:
        UserError: the encoder has no CLS token, or gives one vector only.
    """
    methods = served(encoder)
    if method is None:
        if encoder.pooling and not encoder.plain:
            return encoder.pooling
        return "cls_token" if encoder.has_cls else "avg"
    if method not in methods:
        why = "has no CLS token" if encoder.has_patches else "gives one vector per sample"
        raise UserError(
            f'model.feature_aggregation_method = "{method}": encoder {encoder.name} {why}; valid:'
            f" {', '.join(methods)}, or none for its default"
        )
    return method


def reads_pooled(method: str, encoder: Encoder) -> bool:
    """Whether a method reads the library's own vector."""
    parts = {"joint": ("cls_token", "avg"), "mean_all": () if encoder.has_cls else ("avg",)}
    return method == "pooled" or encoder.pooling in parts.get(method, (method,))


def output_width(encoder: Encoder, method: str) -> int:
    """Width of the vector that a method gives."""
    if method == "joint":
        return output_width(encoder, "cls_token") + output_width(encoder, "avg")
    return encoder.pooled_width if reads_pooled(method, encoder) else encoder.width


# ------------------------------------------------------------------------------------ layers
#
# Outputs of an encoder's layers, with timm's meaning of a layer where the encoder is timm's.
#
# A layer is one entry of timm's `forward_intermediates`: a block of a transformer, a stage of a
# convolutional network; of other models it is a block, as `Encoder.blocks` lists them. Without
# `norm` a layer's output is the raw residual stream, with it the network's final norm follows
# wherever its width fits: on every block of a ViT, on the last stage of a Swin, nowhere in a
# ResNet. Unlike in timm a norm behind the pooling (`fc_norm`) counts as the final norm, as it does
# for the tokens of the encoder's output. B batch, N tokens, P prefix tokens, D width, H W grid.

NORMS = ("encoder.ln", "norm")  # final norms of torchvision's ViT and Swin, by their names


@runtime_checkable
class TimmNet(Protocol):
    """A network that gives its layers by timm's own method."""

    def forward_intermediates(self, x: Tensor, **options: Any) -> Any:
        """Outputs of layers, as maps (B, D, H, W)."""


@dataclass(frozen=True)
class Layers:
    """Which layers of which encoder are read."""

    encoder: Encoder
    indices: tuple[int, ...]  # from 0
    norm: bool  # whether the final norm is applied to each

    def __call__(self, x: Tensor) -> list[Features]:
        """Features of every layer for inputs (B, C, H, W), in the order of `indices`."""
        net = self.encoder.net
        return self.by_timm(net, x) if isinstance(net, TimmNet) else self.by_hooks(x)

    @property
    def is_of_timm(self) -> bool:
        """Whether timm gives the layers."""
        return isinstance(self.encoder.net, TimmNet)

    @property
    def has_prefix(self) -> bool:
        """Whether timm gives the prefix tokens of a layer."""
        net = self.encoder.net
        if not isinstance(net, TimmNet) or not self.encoder.n_prefix:
            return False
        return "return_prefix_tokens" in signature(net.forward_intermediates).parameters

    def by_timm(self, net: TimmNet, x: Tensor) -> list[Features]:
        """Through timm, which gives maps (B, D, H, W) and, of some models, prefix tokens
        (B, P, D)."""
        wanted = sorted(set(self.indices))
        method = net.forward_intermediates
        keywords = {"return_prefix_tokens": True} if self.has_prefix else {}
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
        blocks = self.encoder.blocks()
        found: dict[int, object] = {}

        def note(index: int) -> Callable[[nn.Module, object, object], None]:
            # a copy, as an activation behind the block may work in place
            of_block = self.encoder.of_block
            return lambda module, inputs, raw: found.__setitem__(index, copied(of_block(raw)))

        hooks = [blocks[i].register_forward_hook(note(i)) for i in set(self.indices)]
        try:
            self.encoder.forward_features(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [self.hooked(found[index], index, x) for index in self.indices]

    def hooked(self, raw: object, index: int, x: Tensor) -> Features:
        """Output of a block for inputs x as tokens.

        Raises:
            UserError: it is neither a map nor tokens.
        """
        encoder = self.encoder
        if not isinstance(raw, Tensor) or raw.ndim < 3:
            shape = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
            raise UserError(
                f"extract.layers: layer {index} of {encoder.name} gives {shape}, neither a map"
                " (B, D, *grid) nor tokens (B, N, D)"
            )
        if raw.ndim == 4 and type(encoder.net).__name__ == "SwinTransformer":
            raw = raw.permute(0, 3, 1, 2)  # the only ones whose blocks are channels-last
        tokens, grid = encoder.placed(raw, x.shape[2:])
        if self.norm:
            tokens = final_norm(encoder, tokens.shape[2])(tokens)
        n_prefix = encoder.n_prefix if raw.ndim == 3 else 0
        has_cls = encoder.has_cls and bool(n_prefix)
        return Features(tokens, grid, n_prefix, has_cls, None, mask=encoder.token_mask(x))

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
        changed = {index for index, a, b in pairs if not torch.equal(all_tokens(a), all_tokens(b))}
        return features, tuple(sorted(changed))


def all_tokens(features: Features) -> Tensor:
    """Tokens (B, N, D) of a layer, or of an encoder that `check_tokens` has let pass."""
    assert features.tokens is not None
    return features.tokens


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
        UserError: it has no such layer, or none of whole samples.
    """
    if encoder.no_layers is not None:
        raise UserError(f"extract.layers: the layers of {encoder.name} are {encoder.no_layers}")
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
    if not isinstance(net, TimmNet):
        return len(encoder.blocks())
    zeros = torch.zeros(input_shape, device=next(net.parameters()).device)
    with torch.no_grad(), evaluating(encoder):
        return len(net.forward_intermediates(zeros, intermediates_only=True))
