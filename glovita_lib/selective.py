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
from glovita_lib.structure import Rows, is_norm, trunk
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
    does to parameters (decay, momentum), the others are none and stay as they are.

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

    def make(target: Target, weight: Tensor) -> Adapter:
        return SelectedEntries(weight, spec.gps_topk_per_row)

    attach_all(root, targets, make, "adapted")


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
    with trained(weights):
        sums = [torch.zeros_like(w) for w in weights]
        for batch in batches:
            add_gradients(loss(batch), layers, sums)
    for layer, total in zip(layers, sums, strict=True):
        total = average(total)
        for rows, adapter in members_of(layer):
            adapter.choose(base_weight(layer, rows), part_of(total, rows))


def add_gradients(loss: Tensor, layers: list[nn.Module], sums: list[Tensor]) -> None:
    """Add the gradients of whole weights to `sums`."""
    weights = [base_weight(layer) for layer in layers]
    members = [(layer, *member) for layer in layers for member in members_of(layer)]
    entries = [adapter.values for _, _, adapter in members]
    found = torch.autograd.grad(loss, [*weights, *entries], allow_unused=True)
    totals = dict(zip(layers, sums, strict=True))
    for total, dense in zip(sums, found, strict=False):
        if dense is not None:
            total += dense
    # the entries that train now have their gradient apart
    for (layer, rows, adapter), own in zip(members, found[len(weights) :], strict=True):
        if own is not None:
            total = part_of(totals[layer], rows).flatten(1)  # a view
            total.scatter_add_(1, adapter.places, own.to(total))


def part_of(tensor: Tensor, rows: Rows | None) -> Tensor:
    """Rows of a tensor, or all of it."""
    return tensor if rows is None else tensor[rows[0] : rows[1]]


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
