"""Changes that turn the inputs of a layer by an orthogonal matrix R: OFT and BOFT.

y = x R W^T + b, so the changed weight is W R^T. A convolution's weight is read as the matrix
(out, in * kernel). r blocks of size n.
"""

import math

import torch
from torch import Tensor, nn

from glovita_lib.adapter import Adapter, Members, attach_all, base_bias, base_weight, call
from glovita_lib.spec import UserError
from glovita_lib.spec_lora import Boft, Oft
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, resolve


def some_identity(rotation: Tensor, share: float, *, training: bool) -> Tensor:
    """In training every block (..., n, n) is the identity with probability `share`."""
    if not training or share == 0:
        return rotation
    kept = torch.rand(rotation.shape[:-2], device=rotation.device) >= share
    eye = torch.eye(rotation.shape[-1], device=rotation.device, dtype=rotation.dtype)
    return torch.where(kept[..., None, None], rotation, eye)


def solved(skew: Tensor) -> Tensor:
    """Cayley transform (I - Q)(I + Q)^-1 of skew-symmetric matrices (..., n, n)."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def series(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 to the fourth order: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    square = skew @ skew
    cube = square @ skew
    return eye + 2 * (skew + square + cube) + cube @ skew


class OftAdapter(Adapter):
    """R = blocks of orthogonal matrices of the entries `q` above the diagonal of Q; starts at Q =
    0.

    The peft library's form: the two ways to compute R turn in opposite directions.
    """

    def __init__(self, spec: Oft, width: int) -> None:
        super().__init__()
        self.spec, self.size = spec, width // spec.r
        self.q = nn.Parameter(torch.zeros(spec.r, self.size * (self.size - 1) // 2))
        above = torch.triu_indices(self.size, self.size, 1)
        self.register_buffer("above", above, persistent=False)

    def rotation(self) -> Tensor:
        """R's blocks (r, n, n)."""
        half = self.q.new_zeros(self.spec.r, self.size, self.size)
        blocks = torch.arange(self.spec.r, device=self.q.device)
        half = half.index_put((blocks[:, None], *self.above), self.q)
        skew = half - half.transpose(1, 2)
        blocks = series(skew) if self.spec.use_cayley_neumann else solved(skew)
        return some_identity(blocks, self.spec.dropout, training=self.training)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W R^T."""
        pieces = weight.reshape(len(weight), self.spec.r, self.size)
        turned = torch.einsum("orc,rkc->ork", pieces, self.rotation().to(weight.dtype))
        return turned.reshape(weight.shape)

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members) -> Tensor:
        """A whole Linear layer turns its inputs, which spares the gradient of the weight."""
        rows, adapter = members[0]
        if rows is not None or not isinstance(layer, nn.Linear):
            return super().run(x, layer, members)
        blocks = adapter.rotation().to(x.dtype)
        pieces = x.unflatten(-1, (adapter.spec.r, adapter.size))
        turned = torch.einsum("...rk,rkc->...rc", pieces, blocks).flatten(-2)
        return call(layer, turned, base_weight(layer), base_bias(layer))

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: list[Adapter], step: int, total_steps: int) -> None:
        """coft: bring every block's Q back to |Q| <= eps / sqrt(r)."""
        for adapter in adapters:
            if not adapter.spec.coft:
                continue
            bound = adapter.spec.eps / math.sqrt(adapter.spec.r)
            norm = adapter.q.norm(dim=1, keepdim=True) * math.sqrt(2)  # both triangles of Q
            adapter.q.mul_((bound / norm.clamp(min=1e-30)).clamp(max=1.0))


class BoftAdapter(Adapter):
    """R = B_m ... B_1; factor i mixes blocks that lie 2^i apart. Starts at R = I, s = 1."""

    def __init__(self, spec: Boft, out: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        blocks = width // spec.block_size
        shape = (spec.n_butterfly, blocks, spec.block_size, spec.block_size)
        self.R = nn.Parameter(torch.zeros(shape))
        self.s = nn.Parameter(torch.ones(out))
        orders = [butterfly_order(width, i, spec.block_size) for i in range(spec.n_butterfly)]
        self.register_buffer("orders", torch.stack(orders), persistent=False)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """s W R^T, one factor after the other; R W^T = B_m (... (B_1 W^T))."""
        skew = (self.R - self.R.transpose(2, 3)) / 2
        factors = some_identity(solved(skew), self.spec.dropout, training=self.training)
        turned = weight.flatten(1).t()  # (in * kernel, out)
        for blocks, order in zip(factors.to(weight.dtype).unbind(), self.orders, strict=True):
            # B = P D P^T with P[i, order[i]] = 1: (P^T v)[order] = v, (P u) = u[order]
            mixed = torch.empty_like(turned).index_copy(0, order, turned)
            mixed = blocks @ mixed.unflatten(0, (len(blocks), -1))
            turned = mixed.flatten(0, 1)[order]
        return (self.s[:, None].to(weight.dtype) * turned.t()).reshape(weight.shape)

    def merged_bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias is not scaled."""
        return bias


def butterfly_order(width: int, level: int, block: int) -> Tensor:
    """Order (width,) that brings halves of blocks together which lie 2^level blocks apart: within
    2^level blocks first the even half-blocks, then the odd ones."""
    half = block // 2
    if level == 0:
        return torch.arange(width)
    pieces = torch.arange(width).view(-1, 2**level * 2, half)  # (group, half-block, half)
    return torch.cat([pieces[:, 0::2], pieces[:, 1::2]], dim=1).flatten()


def check_blocks(name: str, width: int, block: int) -> None:
    """Raises UserError where a layer's inputs do not divide into blocks."""
    if width % block:
        near = [n for n in range(1, min(width, 4 * block) + 1) if width % n == 0]
        raise UserError(
            f"peft.r = {block}: {name} reads {width} inputs, not a multiple of it; divisors near"
            f" it: {', '.join(map(str, near[-6:]))}; change it or leave the layer out of"
            " peft.targets"
        )


def check_butterfly(name: str, width: int, spec: Boft) -> None:
    """Raises UserError where a layer's inputs do not divide into the factors' blocks."""
    factors = spec.n_butterfly
    unit = spec.block_size * 2 ** (factors - 1)
    if width % unit == 0:
        return
    sizes = [n for n in range(1, width + 1) if width % (n * 2 ** (factors - 1)) == 0]
    sizes = [n for n in sizes if factors == 1 or n % 2 == 0]
    fewer = [n for n in range(1, factors) if width % (spec.block_size * 2 ** (n - 1)) == 0]
    mend = [f"peft.block_size one of {', '.join(map(str, sizes[-8:]))}"] if sizes else []
    mend += [f"peft.n_butterfly at most {fewer[-1]}"] if fewer else []
    raise UserError(
        f"peft.block_size = {spec.block_size} with peft.n_butterfly = {factors}: {name} reads"
        f" {width} inputs, not a multiple of block_size * 2^(n_butterfly - 1) = {unit}; possible"
        f" there: {' or '.join(mend) or 'no block size with so many factors'}; or leave the layer"
        " out of peft.targets"
    )


def apply_orthogonal(spec: Oft | Boft, model: nn.Module) -> None:
    """Freeze the encoder and put a rotation on every target.

    Raises:
        UserError: blocks that do not divide the input width of a target.
    """
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"))

    def make(target: Target, weight: Tensor) -> Adapter:
        out, width = weight.flatten(1).shape
        if isinstance(spec, Oft):
            check_blocks(target.name, width, spec.r)
            return OftAdapter(spec, width)
        check_butterfly(target.name, width, spec)
        if spec.n_butterfly > 1 and spec.block_size % 2:
            raise UserError(
                f"peft.block_size = {spec.block_size} must be even for peft.n_butterfly ="
                f" {spec.n_butterfly}; use {spec.block_size + 1} or one factor"
            )
        return BoftAdapter(spec, out, width)

    attach_all(root, targets, make, spec.bias)
