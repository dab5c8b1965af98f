"""Low-rank changes whose matrices all layers share: VeRA and FacT.

The shared tensors are a child of the encoder, so that they are stored once.
"""

import torch
from torch import Tensor, nn

from glovita_lib.adapter import Adapter, Shared, attach_all, base_weight
from glovita_lib.lora import LowRank
from glovita_lib.spec_lora import Fact, Vera
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, resolve


class Projections(Shared):
    """Random A (r, widest input) and B (widest output, r), of which a layer takes the first columns
    or rows."""

    def __init__(self, spec: Vera, out: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(spec.projection_prng_key)
        for name, shape in (("A", (spec.rank, width)), ("B", (out, spec.rank))):
            tensor = nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
            self.register_buffer(name, tensor)


class VeraAdapter(LowRank):
    """diag(b) B diag(d) A; starts at b = 0."""

    def __init__(self, spec: Vera, weight: Tensor, shared: Projections) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.d = nn.Parameter(torch.full((spec.rank,), spec.d_initial))
        self.b = nn.Parameter(torch.zeros(len(weight)))
        self.shared = (shared,)  # in a tuple: it is the encoder's child, not this one's

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """diag(d) A and diag(b) B, cut to the layer's size."""
        (shared,) = self.shared
        down = shared.A[:, : weight[0].numel()]
        return self.d[:, None] * down, self.b[:, None] * shared.B[: len(weight)]


def apply_vera(spec: Vera, model: nn.Module) -> None:
    """Freeze the encoder, add the shared projections and a pair of vectors to every target."""
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"))
    shapes = [base_weight(t.layer.module, t.rows).flatten(1).shape for t in targets]
    shared = Projections(spec, max(s[0] for s in shapes), max(s[1] for s in shapes))
    shared.to(base_weight(targets[0].layer.module).device)

    def make(target: Target, weight: Tensor) -> Adapter:
        return VeraAdapter(spec, weight, shared)

    attach_all(root, targets, make, "none")
    root.shared = shared


class FactTensors(Shared):
    """U (D, r), V (D, r) per width D of layers; for the Tucker form also the core C (r, r, r)."""

    def __init__(self, spec: Fact, widths: set[int]) -> None:
        super().__init__()
        for width in sorted(widths):
            u = nn.init.kaiming_uniform_(torch.empty(width, spec.r), a=5**0.5)
            self.register_parameter(f"U_{width}", nn.Parameter(u))
            self.register_parameter(f"V_{width}", nn.Parameter(torch.zeros(width, spec.r)))
        if spec.decomposition == "tk":
            self.C = nn.Parameter(torch.empty(spec.r, spec.r, spec.r))
            nn.init.xavier_uniform_(self.C)


class FactAdapter(LowRank):
    """s U Sigma V' for every slice (D, D) of the weight, cut to its size; starts at V = 0.

    A weight (b D, a D) has b a slices with a Sigma (r, r) each; one of a and b is 1, since D is the
    smaller side.
    """

    def __init__(self, spec: Fact, weight: Tensor, shared: FactTensors) -> None:
        super().__init__()
        self.dropout, self.scale, self.shared = spec.dropout, spec.scale, (shared,)
        self.width = min(weight.shape)
        slices = -(-max(weight.shape) // self.width)  # rounded up
        shape = (slices, spec.r, spec.r) if spec.decomposition == "tt" else (slices, spec.r)
        self.sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))

    def cores(self) -> Tensor:
        """Sigma of every slice (slices, r, r): output side, input side."""
        if self.sigma.ndim == 3:
            return self.sigma
        return torch.einsum("sk,ijk->sij", self.sigma, self.shared[0].C)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        out, inside = weight.shape
        u = getattr(self.shared[0], f"U_{self.width}")
        v = getattr(self.shared[0], f"V_{self.width}") * self.scale
        if out >= inside:  # slices below each other: B = [V Sigma_1; V Sigma_2; ...], A = U'
            return u.t(), (v @ self.cores()).flatten(0, 1)[:out]
        down = (self.cores() @ u.t()).transpose(0, 1).flatten(1)  # (r, slices * D)
        return down[:, :inside], v


def apply_fact(spec: Fact, model: nn.Module) -> None:
    """Freeze the encoder, add the shared factors and the cores of every target."""
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear",))
    widths = {min(base_weight(t.layer.module, t.rows).shape) for t in targets}
    shared = FactTensors(spec, widths).to(base_weight(targets[0].layer.module).device)

    def make(target: Target, weight: Tensor) -> Adapter:
        return FactAdapter(spec, weight, shared)

    attach_all(root, targets, make, "none")
    root.shared = shared
