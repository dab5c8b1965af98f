"""Optimizer, schedule, and weights averaged over the steps."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glovita_lib.model import Model
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


def is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Norm weights, biases, scales, class tokens and position embeddings."""
    tokens = ("pos_embed", "cls_token", "reg_token", "dist_token", "class_token", "pos_embedding")
    return parameter.ndim <= 1 or name.split(".")[-1] in tokens or "position_bias" in name


def parameter_groups(model: Model, spec: OptimizerSpec) -> list[dict]:
    """Trainable parameters by weight decay and learning-rate factor (`lr_scale`), in the model's
    order.

    The factor is layer_wise_lr_decay to the power of the distance from the head (the head has
    factor 1) times the parameter's own `lr_scale` where a PEFT method set one (LoRA+).
    """
    depths = layer_depths(model) if spec.layer_wise_lr_decay else {}
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = spec.undecay_norm and is_undecayed(name, parameter)
        decay = 0.0 if exempt else spec.weight_decay
        scale = (spec.layer_wise_lr_decay or 1.0) ** (deepest - depths.get(name, deepest))
        scale *= getattr(parameter, "lr_scale", 1.0)
        group = groups.setdefault(
            (decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_depths(model: Model) -> dict[str, int]:
    """Depth of every parameter: the encoder's layers from the input (0), the head one above the
    deepest."""
    layers = {f"encoder.{name}": depth for name, depth in model.encoder.layer_ids().items()}
    top = max(layers.values(), default=0) + 1
    return {name: layers.get(name, top) for name, _ in model.named_parameters()}


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
