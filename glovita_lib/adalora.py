"""AdaLoRA: low-rank changes whose ranks are given to the layers that need them (Zhang et al., ICLR
2023).

W + s P diag(e) Q. The importance of entry w is I = |w dL/dw|; over the steps t
    S_t = beta1 S_(t-1) + (1 - beta1) I_t,   U_t = beta2 U_(t-1) + (1 - beta2) |I_t - S_t|
and a triplet (column of P, e, row of Q) scores S U of e plus the means of S U over its two vectors.
Of all triplets of the model the best b(t) stay, the others get e = 0; b falls with the third power
from the first to the last budget.
"""

import math

import torch
from torch import Tensor, nn

from glovita_lib.adapter import Adapter, attach_all
from glovita_lib.lora import LowRank
from glovita_lib.spec_lora import Adalora
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, resolve

TRAINED = ("P", "e", "Q")


class AdaloraAdapter(LowRank):
    """s P diag(e) Q with s = alpha / init_rank; starts at e = 0."""

    transient = tuple(f"{kind}_{name}" for kind in ("S", "U") for name in TRAINED)

    def __init__(self, spec: Adalora, weight: Tensor) -> None:
        super().__init__()
        out, width = weight.flatten(1).shape
        rank = spec.init_rank
        self.spec, self.dropout = spec, spec.dropout
        self.scale = spec.alpha / (math.sqrt(rank) if spec.use_rslora else rank)
        self.P = nn.Parameter(torch.empty(out, rank).normal_(std=0.02))
        self.e = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.empty(rank, width).normal_(std=0.02))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        for name in TRAINED:
            value = getattr(self, name).detach()
            self.register_buffer(f"S_{name}", torch.zeros_like(value))
            self.register_buffer(f"U_{name}", torch.zeros_like(value))

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """diag(e) Q and s P.

        In evaluation without the triplets that were given up: e is 0 there, but for averaged
        weights, whose e remembers former steps. In training they keep a gradient to come back by.
        """
        e = self.e if self.training else self.e * self.kept
        return e[:, None] * self.Q, self.P * self.scale

    @torch.no_grad()
    def observe(self) -> None:
        """Take this step's gradients into the importance."""
        for name in TRAINED:
            parameter = getattr(self, name)
            if parameter.grad is None:
                continue
            seen = (parameter * parameter.grad).abs()
            mean, spread = getattr(self, f"S_{name}"), getattr(self, f"U_{name}")
            mean.lerp_(seen, 1 - self.spec.beta1)
            spread.lerp_((seen - mean).abs(), 1 - self.spec.beta2)

    def scores(self) -> Tensor:
        """Importance of every triplet (r,)."""
        entry = {name: getattr(self, f"S_{name}") * getattr(self, f"U_{name}") for name in TRAINED}
        return entry["e"] + entry["P"].mean(0) + entry["Q"].mean(1)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Leave these triplets (r,), set the others to zero."""
        self.kept.copy_(kept)
        self.e.masked_fill_(~kept, 0.0)

    @classmethod
    def after_step(cls, adapters: list[Adapter], step: int, total_steps: int) -> None:
        """Follow the gradients and, when it is time, give the budget anew; in the last part of the
        training the ranks stay as they are."""
        spec = adapters[0].spec
        final = total_steps - round(spec.tfinal * total_steps)
        if step > final:
            for adapter in adapters:
                adapter.keep(adapter.kept)
            return
        for adapter in adapters:
            adapter.observe()
        start = round(spec.tinit * total_steps)
        if step > start and (step % spec.deltaT == 0 or step == final):
            allocate(adapters, budget(spec, len(adapters), step, start, final))

    @classmethod
    def auxiliary_losses(cls, adapters: list[Adapter]) -> dict[str, Tensor]:
        """orth_reg times the mean of |P'P - I| and |QQ' - I| (Frobenius) over all matrices."""
        weight = adapters[0].spec.orth_reg
        if weight == 0:
            return {}
        norms = [distance(m) for a in adapters for m in (a.P.t() @ a.P, a.Q @ a.Q.t())]
        return {"orthogonality": weight * torch.stack(norms).mean()}


def distance(gram: Tensor) -> Tensor:
    """Frobenius distance of a matrix from the identity."""
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm()


def budget(spec: Adalora, layers: int, step: int, start: int, final: int) -> int:
    """Triplets of the whole model after a step: b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f -
    t_i))^3."""
    first, last = spec.init_rank * layers, min(spec.rank, spec.init_rank) * layers
    left = 1 - min(1.0, (step - start) / max(1, final - start))
    return int(last + (first - last) * left**3)


def allocate(adapters: list[AdaloraAdapter], triplets: int) -> None:
    """Keep the best triplets of all layers together."""
    scores = torch.cat([a.scores() for a in adapters])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.topk(triplets).indices] = True
    for adapter, mine in zip(adapters, kept.split([len(a.e) for a in adapters]), strict=True):
        adapter.keep(mine)


def apply_adalora(spec: Adalora, model: nn.Module) -> None:
    """Freeze the encoder and put an AdaLoRA adapter on every target."""
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"))

    def make(target: Target, weight: Tensor) -> Adapter:
        return AdaloraAdapter(spec, weight)

    attach_all(root, targets, make, spec.lora_bias)
