"""Methods that train a part of the parameters that are there: BitFit, norm tuning and GPS."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glovita_lib.adapter import (
    Adapter,
    adapters,
    attach_all,
    base_weight,
    freeze,
    is_adapted,
    members_of,
    train_biases,
)
from glovita_lib.spec import UserError
from glovita_lib.spec_lora import Gps
from glovita_lib.spec_peft import Bitfit, LnTuning
from glovita_lib.structure import is_norm, trunk
from glovita_lib.targets import Target, every, resolve


def apply_bitfit(spec: Bitfit, model: nn.Module) -> None:
    """Freeze the encoder but its biases.

    Raises:
        UserError: an encoder without biases.
    """
    root = trunk(model)
    train_biases(root, "all", freeze(root))
    if not any(p.requires_grad for p in root.parameters()):
        raise UserError('peft.method = "bitfit": this encoder has no bias; use another method')


def apply_ln_tuning(spec: LnTuning, model: nn.Module) -> None:
    """Freeze the encoder but the scales and shifts of its norm layers.

    Raises:
        UserError: an encoder without such layers.
    """
    root = trunk(model)
    free = {id(p) for p in freeze(root)}
    norms = [m for m in root.modules() if is_norm(m)]
    if not norms:
        raise UserError(
            'peft.method = "ln_tuning": this encoder has no norm layer with scales; use another'
            " method"
        )
    for norm in norms:
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(id(parameter) in free)


class SelectedEntries(Adapter):
    """k entries of every row of a weight train, as a matrix of their own: whatever an optimizer
    does
    to parameters (decay, momentum), the others are none and stay as they are.

    Until `calibrate` has chosen them they are the first of each row.
    """

    def __init__(self, weight: Tensor, per_row: int) -> None:
        super().__init__()
        flat = weight.flatten(1)
        per_row = min(per_row, flat.shape[1])
        places = torch.arange(per_row, device=flat.device).expand(len(flat), per_row)
        self.register_buffer("places", places.contiguous())
        self.values = nn.Parameter(flat[:, :per_row].clone())

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with the trained entries in their places."""
        flat = weight.flatten(1).scatter(1, self.places, self.values.to(weight.dtype))
        return flat.view(weight.shape)

    @torch.no_grad()
    def choose(self, weight: Tensor, gradient: Tensor) -> None:
        """Take the entries with the largest |gradient| of every row; gradient as the weight."""
        per_row = self.places.shape[1]
        self.places.copy_(gradient.flatten(1).abs().topk(per_row, dim=1).indices)
        self.values.copy_(weight.flatten(1).gather(1, self.places))


def apply_gps(spec: Gps, model: nn.Module) -> None:
    """Freeze the encoder; entries of every row and the biases of the targets train.

    The entries are chosen by `calibrate`.
    """
    root = trunk(model)
    kinds = ("linear", "conv")
    if spec.targets is None:
        targets = every(root, kinds)
    else:
        targets = resolve(root, spec.targets, allowed=kinds)
    whole = {t.layer.name: Target(t.layer, None) for t in targets}  # rows are chosen one by one

    def make(target: Target, weight: Tensor) -> Adapter:
        return SelectedEntries(weight, spec.gps_topk_per_row)

    attach_all(root, list(whole.values()), make, "adapted")


def needs_calibration(model: nn.Module) -> bool:
    """Whether `calibrate` is to be called before the first step of a new run."""
    return any(isinstance(adapter, SelectedEntries) for _, adapter in adapters(model))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    average: Callable[[Tensor], Tensor],
) -> None:
    """Choose the entries that train by the gradient of the loss over some batches (GPS).

    Args:
        batches: training batches of this rank.
        loss: loss of the model on a batch.
        average: mean of a tensor over all ranks, so that every rank chooses the same.
    """
    layers = [m for m in model.modules() if is_adapted(m)]
    layers = [m for m in layers if isinstance(members_of(m)[0][1], SelectedEntries)]
    weights = [base_weight(layer) for layer in layers]
    chosen = [members_of(layer)[0][1] for layer in layers]
    with trained(weights):
        entries = [a.values for a in chosen]
        sums = [torch.zeros_like(w) for w in weights]
        for batch in batches:
            grads = torch.autograd.grad(loss(batch), [*weights, *entries], allow_unused=True)
            halves = grads[: len(weights)], grads[len(weights) :]
            for total, dense, part, adapter in zip(sums, *halves, chosen, strict=True):
                if dense is not None:  # the entries that train now have their gradient apart
                    total += dense
                    total.view(len(total), -1).scatter_add_(1, adapter.places, part.to(total))
    for adapter, weight, total in zip(chosen, weights, sums, strict=True):
        adapter.choose(weight, average(total))


@contextmanager
def trained(weights: list[nn.Parameter]) -> Iterator[None]:
    """The frozen weights take part in autograd for a while."""
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
