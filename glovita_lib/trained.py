"""What a PEFT run has trained: its state without the base, and how much it is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from glovita_lib.adapter import Adapter, Insert, Shared
from glovita_lib.spec import UserError
from glovita_lib.structure import trunk

ADDED = (Adapter, Insert, Shared)


def trained_names(model: nn.Module) -> list[str]:
    """Keys of the state dict that differ from the base: parameters that train, what methods have
    added, and everything outside the encoder; without what only continues a run."""
    skipped = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, ADDED)
        for buffer in getattr(module, "transient", ())
    }
    base = base_state(model)
    return [key for key in model.state_dict() if key not in base and key not in skipped]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the encoder that the method has left alone."""
    root = trunk(model)
    prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is root)
    added = [f"{n}." for n, m in model.named_modules() if isinstance(m, ADDED)]
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    owners = {n.rpartition(".")[0] for n in training}
    base = {}
    for key, tensor in model.state_dict().items():
        owner = key.rpartition(".")[0]
        moves = owner in owners and is_statistic(model.get_submodule(owner), key)
        inside = key.startswith(prefix) and not key.startswith(tuple(added))
        if inside and key not in training and not moves:
            base[key] = tensor
    return base


def is_statistic(module: nn.Module, key: str) -> bool:
    """A running mean or variance that the layer updates in training."""
    return isinstance(module, _NormBase) and key.rpartition(".")[2] in module._buffers


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `trained_names` on the CPU."""
    state = model.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in trained_names(model)}


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a trained state over a model of the same spec whose base weights are loaded.

    Raises:
        UserError: the state is not of this method on this model.
    """
    wanted = set(trained_names(model))
    missing, foreign = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    wrong = sorted(k for k in wanted & state.keys() if state[k].shape != shapes[k])
    if missing or foreign or wrong:
        kinds = {"missing": missing, "unknown": foreign, "of another shape": wrong}
        told = [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names]
        raise UserError(
            f"the adapter does not fit this model: {', '.join(told)}; use the spec of its run"
        )
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True, slots=True)
class Share:
    """Parameters of one part of a model."""

    part: str
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable of all."""
        return self.trainable / max(1, self.total)

    def counts(self) -> dict[str, float]:
        """The numbers, to be saved."""
        return {"trainable": self.trainable, "total": self.total, "share": self.share}

    def __str__(self) -> str:
        return f"{self.part:<8} {self.trainable:>13,} of {self.total:>13,}  {self.share:8.3%}"


def parameter_table(model: nn.Module) -> list[Share]:
    """Parameters of the base, of what a method has added, of the head, and of all."""
    root = trunk(model)
    added = {id(p) for m in root.modules() if isinstance(m, ADDED) for p in m.parameters()}
    inside = {id(p) for p in root.parameters()}
    parts: dict[str, list[torch.nn.Parameter]] = {"base": [], "added": [], "head": []}
    for parameter in model.parameters():
        part = "added" if id(parameter) in added else "base"
        parts[part if id(parameter) in inside else "head"].append(parameter)
    parts["all"] = list(model.parameters())
    return [
        Share(part, sum(p.numel() for p in ps if p.requires_grad), sum(p.numel() for p in ps))
        for part, ps in parts.items()
    ]
