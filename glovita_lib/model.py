"""encoder -> aggregation -> head.

B batch, C channels, H W pixels, D width, K classes or targets.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from glovita_lib.encoder import Encoder, Features, any_encoder
from glovita_lib.encoder_aggregation import aggregate, output_width, reads_pooled, resolve_method
from glovita_lib.errors import UserError, refuse
from glovita_lib.heads import build_fitting_head, build_head
from glovita_lib.network import keep_eager
from glovita_lib.peft_base import ADDED, adapters_by_class, apply_peft, encoder_of
from glovita_lib.spec_lift import Patch
from glovita_lib.spec_model import FramewiseHead, ModelSpec
from glovita_lib.spec_peft import Peft
from glovita_lib.weights import load_tensors

if TYPE_CHECKING:
    from glovita_lib.bags import Bags  # runs on images do not load it


@runtime_checkable
class InWindows(Protocol):
    """Inputs that reach a network window by window, see augment_patch.WindowedVolumes."""

    def reduced(self, function: Callable[[Tensor], Tensor], how: str | None = None) -> Tensor:
        """What a function gives for windows (m, C, ...), reduced to a row of each sample."""


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Logits (B, K) that a model gives without targets; reduced over the windows of samples that
    come in windows."""
    if isinstance(inputs, InWindows):
        return inputs.reduced(lambda windows: logits_of(model, windows))
    output = model(inputs)
    return output["logits"] if isinstance(output, dict) else output


class Model(nn.Module):
    """An encoder, an aggregation method that makes one vector of its tokens, and a head.

    Its state-dict keys are those of its two children, encoder.* and head.*.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, aggregation: str) -> None:
        super().__init__()
        self.encoder, self.head, self.aggregation = encoder, head, aggregation
        self.reads_pooled = head.consumes == "pooled" and reads_pooled(aggregation, encoder)
        self.refresh()

    def forward(self, x: "Tensor | Bags", targets: Tensor | None = None) -> Any:
        """Inputs (B, C, H, W) -> logits (B, K), clips (B, C, T, H, W) -> those of their frames
        (B, T, K), or what a head on raw features gives.

        Vectors (B, D) are what the encoder and the aggregation gave before (see experiment); the
        head takes them.

        Args:
            targets: for heads whose auxiliary losses need them.
        """
        if isinstance(x, Tensor) and x.ndim == 2 and self.head.consumes == "pooled":
            return self.head(x)
        if self.head.consumes == "stages":
            assert isinstance(x, Tensor), "bags have no frames, and no labels of them"
            return self.head(self.features(x), x.shape[2])
        return self.head_output(self.features(x), targets)

    def head_output(self, features: "Features | Bags", targets: Tensor | None = None) -> Any:
        """What the head gives for features or bags of them."""
        if self.head.consumes == "pooled":
            assert isinstance(features, Features), "such a head is refused for bags"
            return self.head(aggregate(features, self.aggregation))  # (B, D) -> (B, K)
        return self.head(features) if targets is None else self.head(features, targets)

    def features(self, x: "Tensor | Bags") -> "Features | Bags":
        """Inputs (B, C, H, W) -> features, bags of features as they are; without autograd where
        nothing of the encoder trains."""
        with torch.no_grad() if self.encoder_is_frozen else nullcontext():
            return self.encoder(x, pooled=self.reads_pooled)

    def embed(self, x: Any, method: str) -> Tensor:
        """Inputs (B, C, H, W) -> one vector each (B, D), by any method that the encoder serves; the
        mean of those of windows."""
        if isinstance(x, InWindows):
            return x.reduced(lambda windows: self.embed(windows, method), "mean")
        with torch.no_grad() if self.encoder_is_frozen else nullcontext():
            features = self.encoder(x, pooled=reads_pooled(method, self.encoder))
            return aggregate(features, method)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the forward pass, but not the functions that are `eager`; of an encoder of parts
        that of a chunk of them, as their number changes from batch to batch."""
        keep_eager()
        if self.encoder.of_parts is None:
            super().compile(*args, **options)
        else:
            self.encoder.of_parts.compile(*args, **options)

    def train(self, mode: bool = True) -> "Model":
        """Train mode for what trains; frozen parts stay in eval mode (dropout, BatchNorm)."""
        super().train(mode)
        for part in self.frozen_parts:
            part.eval()
        return self

    # ------------------------------------------------------------------ training with adapters

    def calibrate(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Let a PEFT method choose what trains, before the first optimizer step (GPS).

        Args:
            batches: training batches of this rank.
            loss: loss of this model on a batch, ().
            mean: mean of a tensor over all ranks, so that every rank chooses the same.
        """
        for kind in self.adapters:
            kind.calibrate(self, batches, loss, mean)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Terms () that a PEFT method adds to the training loss, by logged name: AdaLoRA's
        orthogonality."""
        losses: dict[str, Tensor] = {}
        for kind, members in self.adapters.items():
            losses |= kind.auxiliary_losses(members)
        return losses

    def after_step(self, step: int, total_steps: int) -> None:
        """What a PEFT method does behind optimizer step `step` = 1 ... `total_steps`, while the
        gradients are still there: AdaLoRA's rank budget, OFT's constraint."""
        for kind, members in self.adapters.items():
            kind.after_step(members, step, total_steps)

    def refresh(self) -> None:
        """Find what is frozen and the adapters; to be called when requires_grad flags or adapters
        have changed."""
        self.adapters = adapters_by_class(self)
        self.encoder_is_frozen = not any(p.requires_grad for p in self.encoder.parameters())
        self.frozen_parts = [self.encoder] if self.encoder_is_frozen else list(frozen(self))
        self.train(self.training)


def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module that have parameters, none of which trains."""
    for child in module.children():
        flags = [parameter.requires_grad for parameter in child.parameters()]
        if flags and not any(flags):
            yield child
        else:
            yield from frozen(child)


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """Tensors of an encoder's network that stand for those of a file."""

    file: str
    tensors: dict[str, Tensor]


def build_model(
    spec: ModelSpec,
    peft: Peft,
    *,
    outputs: int,
    channels: int,
    size: tuple[int, ...] | None,
    load_weights: bool,
    patch_size: Patch | None = None,
    base: BaseWeights | None = None,
) -> Model:
    """The model of a spec, with its PEFT method applied.

    Parameters that the aggregation leaves unused (the pooling layers of the library where another
    method was chosen) are frozen.

    Args:
        outputs: number of classes or targets of the data.
        size: spatial size of the input in pixels or voxels, (H, W) or (X, Y, Z); none: the
            encoder's own.
        load_weights: False where a checkpoint is loaded over it.
        patch_size: of an image encoder; none: its own.
        base: what takes the place of the encoder's file.

    Raises:
        UserError: see build_encoder, resolve_method, build_head and apply_peft.
    """
    section = spec.encoder
    if patch_size is not None:
        side = None if size is None else size[-1]
        refuse("data.augmentation", section.patch_problems(patch_size, side))
        section = section.with_patch_size(patch_size)
    encoder = any_encoder(
        section, channels=channels, size=size, load_weights=load_weights and base is None
    )
    if base is not None:
        load_tensors(encoder.load_target, base.tensors, source=f'weights = "{base.file}"')
    method = resolve_method(spec.feature_aggregation_method, encoder)
    head: nn.Module
    if isinstance(spec.head, FramewiseHead):
        stages = joined_stages(spec.head, encoder)
        head = build_head(spec.head, width=encoder.width, outputs=outputs, stages=stages)
    else:
        head = build_fitting_head(
            spec.head,
            pooled=output_width(encoder, method),
            features=encoder.width,
            outputs=outputs,
        )
    if head.consumes != "pooled":
        refuse("model", spec.aggregation_problems())
    model = Model(encoder, head, method)
    if not model.reads_pooled:
        for name in encoder.pooling_parameters:
            encoder.net.get_parameter(name).requires_grad_(False)
    apply_peft(peft, model)
    model.refresh()
    return model


def joined_stages(spec: FramewiseHead, encoder: Encoder) -> dict[str, int]:
    """Names and widths of the stages that a head along time joins with the encoder's output, which
    the encoder gives from now on; unless the head says which, all before the last, which is the
    output.

    Raises:
        UserError: the encoder gives a vector a clip, or has no such stage.
    """
    if not encoder.has_patches:
        raise UserError(
            f'model.head.head_type = "framewise_decoder_1d": encoder {encoder.name} gives one'
            " vector a clip, which says nothing of its frames; name another encoder"
        )
    names = encoder.stage_names[:-1] if spec.stages is None else spec.stages
    if not names:
        return {}
    encoder.return_stages(names)
    return {name: shape[0] for name, shape in encoder.stage_shapes().items()}


# -------------------------------------------------------------------------------- parameters


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
    root = encoder_of(model)
    added = {id(p) for m in root.modules() if isinstance(m, ADDED) for p in m.parameters()}
    inside = {id(p) for p in root.parameters()}
    parts: dict[str, list[nn.Parameter]] = {"base": [], "added": [], "head": []}
    for parameter in model.parameters():
        part = "added" if id(parameter) in added else "base"
        parts[part if id(parameter) in inside else "head"].append(parameter)
    parts["all"] = list(model.parameters())
    return [
        Share(part, sum(p.numel() for p in ps if p.requires_grad), sum(p.numel() for p in ps))
        for part, ps in parts.items()
    ]


def parameter_line(model: nn.Module) -> str:
    """The table in a line."""
    base, added, head, whole = parameter_table(model)
    return (
        f"{whole.total:,} parameters (encoder {base.total + added.total:,}, head {head.total:,}),"
        f" {whole.trainable:,} of them train ({100 * whole.share:.3g} %)"
    )
