"""What all encoders share: features out of a library's own network.

Facts about a network (width, layout of its maps, kind of pooling, blocks) are read off the network
itself: shapes from a pass without data, the kind of pooling from what the pooling does to random
features. B batch, N tokens, D width, C channels, H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from glovita_lib import depth
from glovita_lib.layers import Features
from glovita_lib.plugins import reason
from glovita_lib.preprocess import Preprocess
from glovita_lib.spec import UserError


class Encoder(nn.Module):
    """A network without its classifier, kept under `net` with the library's own names.

    A subclass says how raw features are made (`trunk`), pooled (`pool`) and normed (`norm`).
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        preprocess: Preprocess,
        n_prefix: int,
        has_cls: bool,
        channels_last: bool,
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.net, self.name, self.preprocess = net, name, preprocess
        self.n_prefix, self.has_cls, self.channels_last = n_prefix, has_cls, channels_last
        with evaluating(self):
            self.inspect(input_shape)

    # ------------------------------------------------------------------ forward

    def trunk(self, x: Tensor) -> Any:
        """Inputs (B, C, H, W) -> raw features: tokens (B, N, D), a map, a vector or several."""
        raise NotImplementedError

    def pool(self, raw: Any) -> Tensor:
        """Raw features -> the library's own vector before the classifier, (B, D')."""
        raise NotImplementedError

    def norm(self, tokens: Tensor) -> Tensor:
        """Final norm of tokens (B, N, D) where the raw ones lack it."""
        return tokens

    def forward(self, x: Tensor, *, pooled: bool = True) -> Features:
        """Features of inputs (B, C, H, W); without the library's own vector if not asked for."""
        raw = self.trunk(x)
        if self.layout is None:
            return Features(None, None, 0, False, self.pool(raw), self.pooling)
        vector = self.pool(raw) if pooled and self.pooling else None
        tokens = self.norm(self.to_tokens(raw))
        grid = self.grid(raw, x.shape[-2:])
        return Features(tokens, grid, self.n_prefix, self.has_cls, vector, self.pooling)

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Raw tokens or map -> (B, N, D)."""
        if raw.ndim == 3:
            return raw
        return raw.flatten(1, 2) if self.channels_last else raw.flatten(2).transpose(1, 2)

    def grid(self, raw: Tensor, size: torch.Size) -> tuple[int, ...] | None:
        """Rows and columns of the patch tokens; None where tokens are no grid."""
        if raw.ndim == 4:
            return tuple(raw.shape[1:3] if self.channels_last else raw.shape[2:])
        patches = raw.shape[1] - self.n_prefix
        rows = round((patches * size[0] / size[1]) ** 0.5)
        return (rows, patches // rows) if rows and patches % rows == 0 else None

    # ------------------------------------------------------------------ facts

    def inspect(self, input_shape: tuple[int, ...]) -> None:
        """Read the facts off the network."""
        raw = random_like(self.raw_shape(input_shape))
        self.layout = raw.ndim if isinstance(raw, Tensor) and raw.ndim in (3, 4) else None
        self.has_tokens = self.layout is not None
        if not self.has_tokens:
            self.n_prefix, self.has_cls = 0, False
        self.has_patches = self.has_tokens and self.to_tokens(raw).shape[1] > self.n_prefix
        pooled = self.pool(raw)
        if pooled.ndim != 2:  # the user switched the library's pooling off
            self.pooling, self.plain, self.pooled_width = None, False, None
        else:
            self.pooling, self.plain = self.kind_of_pooling(raw, pooled)
            self.pooled_width = pooled.shape[1]
        self.width = self.to_tokens(raw).shape[2] if self.has_tokens else self.pooled_width
        self.pooling_parameters = self.only_pooling(raw, pooled)
        self.block_names = depth.block_names(self.net, self.pooling_parameters)

    def raw_shape(self, input_shape: tuple[int, ...]) -> Any:
        """Raw features of an input of this shape, without computing them where that is possible.

        Raises:
            UserError: the network does not take inputs of this shape.
        """
        try:
            with torch.no_grad():
                return without_data(self).trunk(torch.zeros(input_shape, device="meta"))
        except (RuntimeError, NotImplementedError, AssertionError, ValueError, IndexError):
            pass  # tensors that are no buffers, operators without shapes: compute it
        try:
            with torch.no_grad():
                return self.trunk(torch.zeros(input_shape))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            raise UserError(
                f"encoder {self.name} does not take images of {input_shape[-1]} pixels with"
                f" {input_shape[1]} channels ({reason(error)}); set"
                " data.augmentation.image_size to a size it takes"
            ) from error

    @torch.no_grad()
    def kind_of_pooling(self, raw: Any, pooled: Tensor) -> tuple[str, bool]:
        """What the library's own vector is, and whether it is just that, without layers behind.

        A vector that does not change with the patch tokens is the CLS token's; one that does not
        change when every patch token is replaced by their mean is the mean's.
        """
        if not self.has_tokens:
            return "pooled", False
        tokens = self.to_tokens(raw)
        n = self.n_prefix
        if self.has_cls and same(self.pool(self.with_patches(raw, -tokens[:, n:])), pooled):
            return "cls_token", same(self.norm(tokens)[:, 0], pooled)
        mean = tokens[:, n:].mean(1, keepdim=True)
        if same(self.pool(self.with_patches(raw, mean.expand_as(tokens[:, n:]))), pooled):
            return "avg", same(self.norm(tokens)[:, n:].mean(1), pooled)
        return "pooled", False

    def with_patches(self, raw: Tensor, patches: Tensor) -> Tensor:
        """Raw features with other patch tokens (B, N - n_prefix, D)."""
        if raw.ndim == 3:
            return torch.cat([raw[:, : self.n_prefix], patches], dim=1)
        if self.channels_last:
            return patches.reshape(raw.shape)
        return patches.transpose(1, 2).reshape(raw.shape)

    def only_pooling(self, raw: Any, pooled: Tensor) -> frozenset[str]:
        """Names, below `net`, of the parameters that only the library's own vector depends on."""
        behind = dependencies(self.net, pooled)
        if self.has_tokens:
            behind -= dependencies(self.net, self.norm(self.to_tokens(raw)))
        return behind

    def blocks(self) -> list[nn.Module]:
        """Blocks in order from the input, as `depth` defines them."""
        return [self.net.get_submodule(name) for name in self.block_names]

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter by its name in the encoder: 0 before the first block, i + 1 in
        block i, one more behind the last."""
        depths = depth.layer_ids(self.net, self.block_names)
        return {f"net.{name}": number for name, number in depths.items()}


def without_data(module: nn.Module) -> nn.Module:
    """A copy of a module with the shapes of its tensors only; what it caches stays in the copy."""
    tensors: dict[int, Tensor] = {}
    for parameter in module.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        tensors[id(buffer)] = buffer.to("meta")
    return deepcopy(module, tensors)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former modes afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    yield
    for part, mode in modes:
        part.training = mode


def random_like(raw: Any) -> Any:
    """Random features of the same shape for two samples, grids of at least 2 x 2; own stream."""
    if isinstance(raw, dict):
        return {key: random_like(value) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return type(raw)(random_like(value) for value in raw)
    shape = [2, *raw.shape[1:]]
    if len(shape) == 4:
        shape = [2, *(max(2, side) for side in shape[1:])]
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding in float32."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.std()))


def dependencies(net: nn.Module, output: Tensor) -> frozenset[str]:
    """Names of the parameters that an output was computed with."""
    if not output.requires_grad:
        return frozenset()
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    return frozenset(name for name, grad in zip(names, grads, strict=True) if grad is not None)
