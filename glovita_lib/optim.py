"""Optimizer, schedule, and weights averaged over the steps."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glovita_lib.errors import UserError
from glovita_lib.model import Model
from glovita_lib.network import undecayed
from glovita_lib.spec_train import Optimizer as OptimizerSpec

# --------------------------------------------------------------------------------- optimizer
#
# The learning rate is a function of the optimizer step alone, so a run continues from any step
# without scheduler state, and what is logged is what was used.


def warmup_epochs(spec: OptimizerSpec, epochs: int) -> float:
    """Epochs of warm-up; unset: a tenth of the training, at most 10, for CosineAnneal, else 0."""
    if spec.warmup_epochs is not None:
        return spec.warmup_epochs
    return min(10.0, epochs / 10) if spec.scheduler == "CosineAnneal" else 0.0


class Schedule:
    """Learning rate at optimizer step s of S, with W warm-up steps and peak rate lr.

    - warm-up, s < W: lr (s + 1) / W
    - CosineAnneal: min_lr + (lr - min_lr) (1 + cos(pi (s - W) / (S - W))) / 2
    - Step: lr gamma^floor(4 s / S), a step each quarter of the training
    - MultiStep: lr gamma at 1/2 and gamma^2 at 3/4 of the training
    - None: lr
    """

    def __init__(self, spec: OptimizerSpec, *, epochs: int, steps_per_epoch: int) -> None:
        self.spec = spec
        self.total = epochs * steps_per_epoch
        self.warmup_epochs = warmup_epochs(spec, epochs)
        self.warmup = round(self.warmup_epochs * steps_per_epoch)

    def __call__(self, step: int) -> float:
        """Learning rate of the update that makes step into step + 1."""
        spec = self.spec
        if step < self.warmup:
            return spec.lr * (step + 1) / self.warmup
        if spec.scheduler == "CosineAnneal":
            progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
            return spec.min_lr + (spec.lr - spec.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        if spec.scheduler == "Step":
            return spec.lr * spec.gamma ** (4 * step // self.total)
        if spec.scheduler == "MultiStep":
            return spec.lr * spec.gamma ** ((2 * step >= self.total) + (4 * step >= 3 * self.total))
        return spec.lr


# ---------------------------------------------------------------------------------- groups
#
# Learning-rate factor and weight decay of each parameter. How deep one lies, and which may be
# spared, says `network`, and that asks the library first.


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter of a model and what the optimizer makes of it."""

    name: str
    parameter: nn.Parameter
    layer: int
    """Its depth: 0 the stem, the head deepest."""
    lr_scale: float
    """Factor of the learning rate."""
    weight_decay: float

    @property
    def kind(self) -> tuple[float, float]:
        """What parameters of one group share."""
        return self.weight_decay, self.lr_scale


def placed_parameters(model: Model, spec: OptimizerSpec) -> list[Placed]:
    """All parameters in the model's order, frozen ones too.

    The factor is layer_wise_lr_decay to the power of the distance from the deepest layer, the
    head's, times the parameter's own `lr_scale` where a PEFT method set one (LoRA+).
    """
    depths = model.encoder.depths()
    layers = {f"encoder.{name}": depth for name, depth in depths.of.items()}
    deepest = max(depths.head, *layers.values()) if layers else depths.head
    spared = undecayed(model, model.encoder.uses, "encoder.net.") if spec.undecay_norm else set()
    placed = []
    for name, parameter in model.named_parameters():
        layer = layers.get(name, depths.head)
        scale = (spec.layer_wise_lr_decay or 1.0) ** (deepest - layer)
        scale *= getattr(parameter, "lr_scale", 1.0)
        decay = 0.0 if name in spared else spec.weight_decay
        placed.append(Placed(name, parameter, layer, scale, decay))
    return placed


def grouped(placed: list[Placed]) -> list[list[Placed]]:
    """Those that train, by weight decay and factor."""
    groups: dict[tuple[float, float], list[Placed]] = {}
    for one in placed:
        if one.parameter.requires_grad:
            groups.setdefault(one.kind, []).append(one)
    return list(groups.values())


def parameter_groups(model: Model, spec: OptimizerSpec) -> list[dict]:
    """The optimizer's groups, with the factor of the learning rate as `lr_scale`."""
    return [
        {
            "params": [one.parameter for one in group],
            "weight_decay": group[0].weight_decay,
            "lr_scale": group[0].lr_scale,
        }
        for group in grouped(placed_parameters(model, spec))
    ]


def group_lines(model: Model, spec: OptimizerSpec) -> str:
    """The table of groups, from the stem to the head."""
    lines = ["group  layers    lr factor  weight decay  tensors        values"]
    groups = enumerate(grouped(placed_parameters(model, spec)))
    for number, group in sorted(groups, key=lambda item: min(one.layer for one in item[1])):
        first, last = (f(one.layer for one in group) for f in (min, max))
        layers = f"{first}" if first == last else f"{first} to {last}"
        values = sum(one.parameter.numel() for one in group)
        lines.append(
            f"{number:>5}  {layers:<8}  {group[0].lr_scale:>9.4g}  {group[0].weight_decay:>12g}"
            f"  {len(group):>7}  {values:>12,}"
        )
    return "\n".join(f"  {line}" for line in lines)


GROUP_COLUMNS = ("group", "layer", "lr_factor", "weight_decay", "parameter", "shape")


def group_rows(model: Model, spec: OptimizerSpec) -> list[tuple[Any, ...]]:
    """A row of GROUP_COLUMNS for each parameter; group, factor and decay of a frozen one are
    empty."""
    placed = placed_parameters(model, spec)
    numbers = {one.name: i for i, group in enumerate(grouped(placed)) for one in group}
    rows = []
    for one in placed:
        shape, trains = " x ".join(map(str, one.parameter.shape)), one.name in numbers
        made = (one.lr_scale, one.weight_decay) if trains else ("", "")
        rows.append((numbers.get(one.name, ""), one.layer, *made, one.name, shape))
    return rows


def check_groups(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Refuse the state of an optimizer whose groups are others.

    Args:
        saved: its `state_dict`.

    Raises:
        UserError: another version of timm, or of this program, counts layers otherwise.
    """

    def kinds(groups: list[dict[str, Any]]) -> list[tuple[float, float, int]]:
        return [(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in groups]

    if kinds(saved["param_groups"]) != kinds(optimizer.param_groups):
        raise UserError(
            "the run cannot go on as it began: its parameters had other learning-rate factors or"
            " weight decay, as another version of timm or glovita counts layers otherwise; continue"
            ' it with that version, or set training.on_existing = "overwrite" to train again'
        )


def build_optimizer(model: Model, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters; a step over all of them is one fused kernel
    where torch has it."""
    groups = parameter_groups(model, spec)
    if spec.name == "SGD":
        return torch.optim.SGD(
            groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=True
        )
    if spec.name == "RMSprop":
        return torch.optim.RMSprop(groups, lr=spec.lr, momentum=spec.momentum)
    adam = torch.optim.Adam if spec.name == "Adam" else torch.optim.AdamW
    return adam(groups, lr=spec.lr, betas=spec.betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate: lr times the group's lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# -------------------------------------------------------------------------- averaged weights
#
# Weights averaged over the optimizer steps.


Several = tuple[Tensor, ...] | list[Tensor]


def build_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The average w' <- decay w' + (1 - decay) w of parameters and buffers; None without a decay.

    Whole numbers (counters, the places of entries that train) are copied, as they have no mean.
    """
    if decay is None:
        return None

    @torch.no_grad()
    def update(averages: Several, values: Several, count: Tensor | int) -> None:
        if torch.is_floating_point(averages[0]) or torch.is_complex(averages[0]):
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
