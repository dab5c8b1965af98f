"""Outputs of an encoder that are read for each sample: vectors, tokens, maps, layers."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from glovita_lib import dist
from glovita_lib.augment import Clips, ManyClips
from glovita_lib.data import Data, Split
from glovita_lib.dist import autocast
from glovita_lib.encoder import Features
from glovita_lib.encoder_aggregation import (
    Layers,
    aggregate,
    all_tokens,
    choose_layers,
    layers_call,
    reads_pooled,
    resolve_method,
)
from glovita_lib.errors import UserError, listed
from glovita_lib.experiment import Experiment, assemble, read_data, restore
from glovita_lib.loader import Batch
from glovita_lib.model import InWindows, logits_of
from glovita_lib.objectives import clips_as_samples, frames_as_samples
from glovita_lib.resolved import (
    ClipInputs,
    EncodedInputs,
    check_data,
    in_order_of,
    resolve_spec,
)
from glovita_lib.rundir import locate
from glovita_lib.spec import Loaded
from glovita_lib.spec_root import Root, head_is_named
from glovita_lib.spec_samples import FileData
from glovita_lib.spec_train import Extract
from glovita_lib.weights import weights_hash

# ---------------------------------------------------------------------------------- readouts
#
# B batch, N tokens, D width, C channels, H W grid, M instances, K classes or targets.

LAYOUTS = {
    "embedding": "(N, D)",
    "tokens": "(M, D), tokens of sample i at bag_ptr[i] to bag_ptr[i + 1]",
    "map": "(N, C, H, W)",
    "frames": "(M, D), frames of video i at bag_ptr[i] to bag_ptr[i + 1]",
    "clips": "(M, D), clips of video i at bag_ptr[i] to bag_ptr[i + 1]",
    "bags": "(M, D), samples of group i at bag_ptr[i] to bag_ptr[i + 1]",
}


@dataclass(frozen=True, slots=True)
class Instances:
    """How the rows of a batch make samples, where a sample has several."""

    lengths: np.ndarray  # (B,) instances per sample
    coords: np.ndarray | None
    """(M, 2 or 3) place of every instance in the grid; -1: prefix token. (M, 2) first and last
    frame of clips. None of frames."""
    shown: dict[str, np.ndarray] = field(default_factory=dict)
    """Of clips `frames` (M, T), their numbers in the video, and `times` (M, T), seconds."""


@dataclass(frozen=True, slots=True)
class Readout:
    """What was read out of a batch, on the CPU."""

    features: np.ndarray  # (B, D), (B, D, *grid), or (M, D) instances of B samples
    instances: Instances | None  # None: one row a sample

    @property
    def samples(self) -> int:
        """B."""
        return len(self.features if self.instances is None else self.instances.lengths)


@dataclass(frozen=True, slots=True)
class PendingReadout:
    """What is read out of a batch, while the device still computes it or copies it to the host."""

    rows: Tensor  # (B,) of the split
    read: Tensor  # values in float32, on the device, in the layout of Readout.features
    instances: Instances | None
    host: tuple[Tensor, ...]  # stored values, and whether all are finite ()
    copied: torch.cuda.Event | None  # after the copies to the host; None: they are there


class Extractor:
    """Reads embeddings, tokens or maps out of the encoder of an experiment.

    Raises:
        UserError: what is asked for, this encoder or data set does not have.
    """

    def __init__(self, experiment: Experiment, spec: Extract) -> None:
        inputs = experiment.resolved.inputs
        if not isinstance(inputs, EncodedInputs):
            raise UserError(
                f"mode extract reads features out of an encoder, and the samples are {inputs.kind}"
                " already"
            )
        self.inputs = inputs
        self.experiment, self.spec = experiment, spec
        self.model = experiment.model.eval()
        self.layers: Layers | None = None
        self.normed: tuple[int, ...] = ()  # layers that the final norm changes
        probed: list[Features] = []
        if spec.layers:
            shape = (1, *inputs.shape)
            self.layers = choose_layers(
                self.model.encoder, spec.layers, norm=spec.norm, input_shape=shape
            )
            probed, self.normed = self.layers.probe(shape)
        self.method = self.resolve_method(probed)
        self.dtype = torch.float16 if spec.precision == 16 else torch.float32
        if not self.makes_vectors:
            self.check_tokens(probed)
        if spec.output == "frames":
            self.check_frames()
        elif spec.output == "clips":
            self.check_clips()
        elif spec.output != "embedding":
            self.check_windows()

    @property
    def makes_vectors(self) -> bool:
        """Whether tokens become one vector, of a sample or of a clip."""
        return self.spec.output in ("embedding", "clips")

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the encoder's weights."""
        return weights_hash(self.model.encoder)

    @cached_property
    def sample_bytes(self) -> int:
        """Bytes of the features of a sample as they are stored: those of a black image."""
        device = self.experiment.ranks.device
        inputs = torch.zeros(1, *self.inputs.shape, device=device)
        with torch.no_grad(), autocast(self.experiment.precision, device):
            read, _ = self.read(inputs, self.features(inputs))
        each = read.numel() * self.dtype.itemsize
        if isinstance(self.inputs, ClipInputs) and self.spec.output == "clips":
            return each * (1 if self.reads_parts else self.inputs.sampling.clips)
        return each

    def resolve_method(self, probed: list[Features]) -> str:
        """How tokens become one vector.

        Args:
            probed: features of the layers, where layers are read.
        """
        model, spec = self.experiment.model, self.spec
        has_cls = all(part.has_cls for part in probed)
        if spec.method is None:
            if not probed:
                return model.aggregation
            return "cls_token" if has_cls else "avg"
        if probed:
            valid = ["avg", "patch_mean", "sum", "mean_all", *["cls_token", "joint"] * has_cls]
            if spec.method not in valid:
                what = "are not pooled" if spec.method == "pooled" else "have no CLS token"
                raise UserError(
                    f'extract.method = "{spec.method}": the layers {list(spec.layers)} of'
                    f" {model.encoder.name} {what}; valid: {', '.join(valid)}, or none for its"
                    " default"
                )
            return spec.method
        try:
            return resolve_method(spec.method, model.encoder)
        except UserError as error:
            text = str(error).replace("model.feature_aggregation_method", "extract.method")
            raise UserError(text) from None

    def check_tokens(self, probed: list[Features]) -> None:
        """Whether the encoder, or its layers, have patch tokens to write.

        Raises:
            UserError: they do not.
        """
        encoder, output = self.experiment.model.encoder, self.spec.output
        if probed:
            self.check_grids(probed)
        elif not encoder.has_patches:
            raise UserError(
                f'extract.output = "{output}": encoder {encoder.name} gives one vector per sample;'
                ' only output = "embedding" is possible'
            )

    def check_windows(self) -> None:
        """Tokens are those of whole inputs, no mean over windows or clips.

        Raises:
            UserError: evaluation goes by them.
        """
        if (parts := self.inputs.parts) is not None:
            raise UserError(
                f'extract.output = "{self.spec.output}": evaluation sees the {parts.name} of a'
                " sample one by one, which has their mean vector alone; set extract.output ="
                f' "embedding" or {parts.alone}'
            )

    def check_clips(self) -> None:
        """Samples have clips, each of which has tokens of its own.

        Raises:
            UserError: they are no videos, or clips are one input that the encoder sees as a whole.
        """
        if not isinstance(self.inputs, ClipInputs):
            raise UserError(
                'extract.output = "clips" reads clips of videos, and the samples are'
                f" {self.inputs.kind}"
            )
        if self.inputs.sampling.combine == "bag" and not self.parts_lie_in_clips:
            raise UserError(
                'extract.output = "clips": with data.sampling.combine = "bag" encoder'
                f" {self.model.encoder.name} sees all clips of a video as one input; set it to"
                ' "logits", or have parts of a clip encoded one by one with model.encoder.lift ='
                ' "slices" along t, without adjacent, or "windows", none of which reaches over two'
                ' clips; extract.output = "embedding" writes the vector of the input'
            )

    @property
    def reads_parts(self) -> bool:
        """Whether vectors of clips are means of tokens, as all clips of a video are one input."""
        of = self.inputs.sampling if isinstance(self.inputs, ClipInputs) else None
        return self.spec.output == "clips" and of is not None and of.combine == "bag"

    @property
    def parts_lie_in_clips(self) -> bool:
        """Whether the encoder makes tokens of windows or frames, none of which is of two clips."""
        from glovita_lib.encoder_slicewise import SlicewiseEncoder, WindowsEncoder  # of lifts alone

        assert isinstance(self.inputs, ClipInputs), "see check_clips"
        encoder, frames = self.model.encoder, self.inputs.sampling.frames
        if isinstance(encoder, WindowsEncoder):
            starts = encoder.windows.starts(self.inputs.shape[1:])[:, 0]  # (N,)
            return bool((starts % frames + encoder.windows.size[0] <= frames).all())
        if not isinstance(encoder, SlicewiseEncoder):
            return False
        return encoder.spec.axis == "t" and not encoder.spec.adjacent

    def check_frames(self) -> None:
        """Clips pass the encoder one by one, and its output is one over time.

        Raises:
            UserError: they are one long input.
        """
        assert isinstance(self.inputs, ClipInputs), "see spec_check.frames_are_of_videos"
        if self.inputs.sampling.combine == "bag":
            raise UserError(
                'extract.output = "frames": with data.sampling.combine = "bag" the encoder takes'
                ' all clips of a video as one input; set it to "logits"'
            )

    def __call__(self, batch: Batch, *, ids: list[str], augment: int | None) -> Readout:
        """Read a batch out and wait for it.

        Args:
            ids: of the split that the batch is from, for messages.
            augment: seed of the train policy; None is the test policy.

        Raises:
            UserError: features too large for float16, NaN or infinite ones.
        """
        return self.finish(self.start(batch, augment=augment), ids=ids)

    @torch.no_grad()
    def start(self, batch: Batch, *, augment: int | None) -> PendingReadout:
        """Let the device read a batch out and copy it to the host, without waiting for it.

        Args:
            augment: seed of the train policy; None is the test policy.
        """
        objective, device = self.experiment.objective, self.experiment.ranks.device
        moved = batch.to(device)
        prepare = objective.eval_inputs if augment is None else objective.train_inputs
        inputs = prepare(moved.inputs, moved.fitted, augment or 0)
        shown = batch.inputs if self.spec.output in ("frames", "clips") else None
        with autocast(self.experiment.precision, device):
            values, instances = self.read(inputs, self.features(inputs), shown)
        read = values.float()
        stored = read.to(self.dtype)
        host, copied = to_host((stored, torch.isfinite(stored).all()))
        return PendingReadout(batch.rows, read, instances, host, copied)

    def finish(self, running: PendingReadout, *, ids: list[str]) -> Readout:
        """Wait for what `start` began.

        Args:
            ids: of the split that the batch is from, for messages.

        Raises:
            UserError: features too large for float16, NaN or infinite ones.
        """
        if running.copied is not None:
            running.copied.synchronize()
        stored, is_finite = running.host
        if not is_finite:
            instances = running.instances
            lengths = [1] * len(running.rows) if instances is None else instances.lengths.tolist()
            per_sample = pad_sequence(running.read.split(lengths), batch_first=True)  # (B, ...)
            self.refuse_infinite(
                per_sample, [ids[row] for row in running.rows.tolist()], among="batch"
            )
        if running.copied is not None:
            # Out of page-locked memory, which is scarce and serves the next batches again.
            stored = stored.clone()
        return Readout(stored.numpy(), running.instances)

    def features(self, inputs: Any) -> list[Features]:
        """Features of the chosen layers, or of the encoder's output where tokens are asked for;
        none of windows and clips that pass the encoder one by one."""
        if isinstance(inputs, InWindows):
            return []
        if self.layers is not None:
            return self.layers(inputs)
        if self.makes_vectors and not self.reads_parts:
            return []
        return [self.model.encoder(inputs, pooled=False)]

    def read(
        self, inputs: Any, features: list[Features], shown: Clips | None = None
    ) -> tuple[Tensor, Instances | None]:
        """Values, and for tokens, frames and clips the instances.

        Args:
            shown: the clips that inputs are made of, on the CPU, for frames and clips; none: all
                frames are real, and clips tell no numbers.
        """
        if self.spec.output == "clips":
            return self.clip_vectors(inputs, features, shown)
        if isinstance(inputs, InWindows):
            return inputs.reduced(lambda x: self.vectors(x, self.features(x)), "mean"), None
        if self.spec.output == "embedding":
            return self.vectors(inputs, features), None
        if self.spec.output == "frames":
            whole = self.over_time(features[0])  # (B, T, D)
            real = np.ones(whole.shape[:2], bool) if shown is None else shown.real.numpy()
            kept = torch.from_numpy(np.flatnonzero(real)).to(whole.device, non_blocking=True)
            return whole.flatten(0, 1)[kept], Instances(real.sum(1), None)
        self.check_grids(features)
        if self.spec.output == "map":
            return torch.cat([f.patches.mT.unflatten(2, f.grid) for f in features], dim=1), None
        keep = self.spec.prefix_tokens
        tokens = torch.cat([all_tokens(f) if keep else f.patches for f in features], dim=2)
        places = token_places(features[0], features[0].n_prefix if keep else 0)
        lengths = np.array([len(part) for part in places], np.int64)
        mask = features[0].mask
        if mask is not None:
            mask = mask[:, mask.shape[1] - tokens.shape[1] :]
        rows = tokens.flatten(0, 1) if mask is None else tokens[mask]
        return rows, Instances(lengths, np.concatenate(places))

    def vectors(self, inputs: Any, features: list[Features]) -> Tensor:
        """A vector of each sample (B, D); of layers side by side."""
        if not features:
            return self.model.embed(inputs, self.method)
        return torch.cat([aggregate(part, self.method) for part in features], dim=1)

    def clip_vectors(
        self, inputs: Any, features: list[Features], shown: Clips | None
    ) -> tuple[Tensor, Instances]:
        """A vector of each clip of the videos (M, D), those that are averaged elsewhere, and which
        frames it shows."""
        assert isinstance(self.inputs, ClipInputs), "see check_clips"
        if self.reads_parts:
            rows, of = self.part_vectors(features[0])
        else:
            if isinstance(inputs, ManyClips):
                each = inputs.each(lambda x: self.vectors(x, self.features(x)))  # (B, V, D)
            else:
                each = self.vectors(inputs, features)[:, None]
            rows, of = each.flatten(0, 1), np.indices(each.shape[:2]).reshape(2, -1)
        lengths = np.bincount(of[0], minlength=len(inputs))
        if shown is None:
            return rows, Instances(lengths, None)
        several = shown.frames.ndim == 3
        place = tuple(of) if several else (of[0],)
        frames, times = (part.numpy()[place] for part in (shown.frames, shown.times))  # (M, T)
        shows = {"frames": frames, "times": times}
        return rows, Instances(lengths, frames[:, [0, -1]], shows)

    def part_vectors(self, features: Features) -> tuple[Tensor, np.ndarray]:
        """Mean vectors (M, D) of the tokens of each clip of videos that are one input, by the
        frames at which they lie, and which clip each is, (2, M): video, and number in it; a clip
        without tokens (windows that are left out) has none."""
        assert isinstance(self.inputs, ClipInputs) and features.places is not None
        assert features.tokens is not None
        of, places = self.inputs.sampling, features.places
        owners = [row * of.clips + at[:, 0] // of.frames for row, at in enumerate(places)]
        owner, index, counts = np.unique(
            np.concatenate(owners), return_inverse=True, return_counts=True
        )
        tokens, mask = features.tokens, features.mask
        tokens = (tokens.flatten(0, 1) if mask is None else tokens[mask]).float()
        sums = tokens.new_zeros(len(owner), tokens.shape[1])
        sums.index_add_(0, torch.from_numpy(index).to(tokens.device), tokens)
        divisor = torch.from_numpy(counts[:, None]).to(tokens.device)
        rows = sums if self.method == "sum" else sums / divisor
        return rows, np.stack(np.divmod(owner, of.clips))

    def over_time(self, features: Features) -> Tensor:
        """A vector (B, T, D) of each frame of clips: the stages that the encoder returns, then its
        output, side by side, averaged over space and linear between their time points, as the head
        `framewise_decoder_1d` joins them."""
        from glovita_lib.head_framewise import over_time, stretched  # of videos alone

        assert isinstance(self.inputs, ClipInputs), "see check_clips"
        stages = (features.intermediates or {}).values()
        maps = [*(part.flatten(3).mean(3) for part in stages), over_time(features)]  # (B, D, t)
        count = self.inputs.sampling.frames
        return torch.cat([stretched(each, count) for each in maps], 1).transpose(1, 2)

    def logits(self, inputs: Any, vectors: Tensor) -> Tensor:
        """Logits (B, K) of the model in float32; the encoder runs again only where its head takes
        something else than the vectors (B, D) that are read out."""
        model = self.model
        is_shared = self.layers is None and self.method == model.aggregation
        is_shared = is_shared and model.head.consumes == "pooled"
        takes = vectors if is_shared and not isinstance(inputs, InWindows) else inputs
        return logits_of(model, takes).float()

    def check_grids(self, features: list[Features]) -> None:
        """Layers of different grids cannot be put side by side.

        Raises:
            UserError: they differ, or tokens have no grid and maps are asked for.
        """
        grids = [part.grid for part in features]
        if len(set(grids)) > 1:
            sizes = ", ".join("x".join(map(str, grid or ())) for grid in grids)
            raise UserError(
                f"extract.layers = {list(self.spec.layers)} have different grids ({sizes});"
                " extract each of them to a file of its own"
            )
        if self.spec.output == "map" and (grids[0] is None or features[0].mask is not None):
            what = "are no grid" if grids[0] is None else "differ in number from sample to sample"
            raise UserError(f'extract.output = "map": the tokens of this encoder {what}')

    def refuse_infinite(self, read: Tensor, ids: list[str], *, among: str) -> None:
        """Say which samples of a batch or a split have features (B, ...) that cannot be stored.

        Args:
            among: "batch" or "split".

        Raises:
            UserError: always.
        """
        read = read.flatten(1)
        broken = ~torch.isfinite(read).all(1)
        if broken.any():
            raise UserError(
                "the encoder gives NaN or infinite features for"
                f" {samples_text(ids, broken, among)}; it computed with training.precision ="
                f" {self.experiment.precision}: fp16 may"
                ' overflow inside it, "bf16" and "no" do not; else its weights are broken'
            )
        too_large = torch.isinf(read.half()).any(1)
        largest = float(read.abs().max())
        other = f", or another extract.method than {self.method}"
        raise UserError(
            f"features up to {largest:.4g} overflow float16 (largest number 65,504) in"
            f" {samples_text(ids, too_large, among)}; set extract.precision = 32"
            f"{other if self.makes_vectors else ''}"
        )

    def attributes(self) -> dict[str, Any]:
        """How the features are made, as attributes of the file."""
        experiment, spec = self.experiment, self.spec
        return {
            "output": spec.output,
            "layout": LAYOUTS["bags" if spec.bag_by else spec.output],
            **self.coords_text(),
            "aggregation": self.method if self.makes_vectors else "none",
            "layers": json.dumps(list(self.layers.indices)) if self.layers else "encoder output",
            "equals": self.equals_text(),
            "norm": self.norm_text(),
            "prefix_tokens": self.prefix_text(),
            "encoder": experiment.model.encoder.name,
            "compute_precision": experiment.precision,
            "stored_precision": spec.precision,
        }

    def coords_text(self) -> dict[str, str]:
        """What coordinates mean, where there are some."""
        if self.spec.output == "tokens":
            kind = self.experiment.resolved.inputs.kind
            axes = token_axes(kind, {"images": 2, "series": 1}.get(kind, 3))
            places = "in the grid of patches, from 0; -1: a prefix token; 0 and a running number"
            places += " where tokens are no grid"
            return {"coords": self.model.encoder.coords_text or f"{axes}: {places}"}
        if self.spec.output == "clips":
            return {"coords": f"{CLIP_AXES}: of the clip, numbers in its video, from 0"}
        if self.spec.coords_file is not None:
            return {"coords": "x, y (and z) as in extract.coords_file"}
        return {}

    def norm_text(self) -> str:
        """The norm that the features end in, of layers which of them do."""
        if self.layers is None:
            encoder, device = self.model.encoder, self.experiment.ranks.device
            pooled = self.makes_vectors and reads_pooled(self.method, encoder)
            x = torch.randn(1, *self.inputs.shape, generator=torch.Generator().manual_seed(0))
            return encoder.last_norm(x.to(device), pooled=pooled)
        raw = [index for index in self.layers.indices if index not in self.normed]
        parts = [f"final norm on layers {list(self.normed)}"] if self.normed else []
        return ", ".join([*parts, f"raw layers {raw}"] if raw else parts)

    def equals_text(self) -> str:
        """Which calls of the library the features equal, as an expression of the network `net`
        (timm's model without classifier, where it is timm's) and inputs x; of layers with `maps`
        for what is called first."""
        encoder, spec = self.model.encoder, self.spec
        method = self.method if self.makes_vectors else None
        keep = spec.output == "tokens" and spec.prefix_tokens
        if self.layers is not None and not self.layers.is_of_timm:
            return f"outputs of the blocks {list(self.layers.indices)}; {self.norm_text()}"
        if self.layers is not None:
            gives_prefix, normed = self.layers.has_prefix, self.spec.norm and self.normed
            joined, maps = layers_call(
                encoder, self.layers.indices, spec.norm, normed or (), method, keep, gives_prefix
            )
            return f"{joined}{self.as_map}, {maps}"
        if self.makes_vectors:
            return encoder.vector_call(self.method)
        tokens = encoder.tokens_call
        if spec.output == "frames":
            joined = "".join(f"{name}, " for name in encoder.returned)
            return f"{joined}{tokens}, each averaged over space and linear over time"
        if not keep and encoder.n_prefix:
            tokens = f"{tokens}[:, {encoder.n_prefix}:]"
        return tokens + self.as_map

    @property
    def as_map(self) -> str:
        """What makes maps (B, C, H, W) of tokens, as the end of an expression, where maps are what
        is read."""
        if self.spec.output != "map":
            return ""
        zeros = torch.zeros(1, *self.inputs.shape, device=self.experiment.ranks.device)
        with torch.no_grad():
            grid = self.features(zeros)[0].grid
        return f".mT.unflatten(2, {grid})"

    def prefix_text(self) -> str:
        """Whether CLS, distillation and register tokens are among what is written, and which."""
        if self.makes_vectors:
            return "as the aggregation says; registers out"
        if self.spec.output != "tokens" or not self.spec.prefix_tokens:
            return "out"
        return f"in: {', '.join(self.model.encoder.prefix) or 'there are none'}"


def to_host(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
    """Tensors on the host, and what to wait for before they may be looked at.

    From a GPU they are copied while the host goes on, which only page-locked memory allows.
    """
    if tensors[0].device.type != "cuda":
        # A class token is a view of all tokens, which would stay in memory with it.
        return tuple(tensor.cpu().contiguous() for tensor in tensors), None
    host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for mine, theirs in zip(host, tensors, strict=True):
        mine.copy_(theirs, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return tuple(host), copied


def samples_text(ids: list[str], chosen: Tensor, among: str) -> str:
    """The chosen (B,) samples of a batch or split, in words."""
    names = [name for name, is_chosen in zip(ids, chosen.tolist(), strict=True) if is_chosen]
    return f"sample {listed(names, 1)}{f' of its {among}' * (len(names) > 1)}"


CLIP_AXES = "first frame,last frame"
TOKEN_AXES = {
    "videos": {1: "frame", 3: "frame,row,column"},
    "series": {1: "time", 3: "channel,row,column"},
}
"""Of samples that are neither images nor volumes."""


def token_axes(kind: str, count: int) -> str:
    """Axes of the places of tokens of a kind of samples, by their number."""
    others = {1: "slice", 2: "row,column", 3: "x,y,z"}
    return TOKEN_AXES.get(kind, others).get(count, others[count])


def token_places(features: Features, n_prefix: int) -> list[np.ndarray]:
    """Places (N, axes) of the tokens of each sample, after -1 for so many prefix tokens."""
    tokens = all_tokens(features)
    if features.places is not None:
        return [places.astype(np.int32) for places in features.places]
    patches = tokens.shape[1] - features.n_prefix
    places = grid_places(features.grid, n_prefix, n_prefix + patches)
    if features.mask is None:
        return [places] * len(tokens)
    mask = features.mask[:, features.n_prefix - n_prefix :]
    return [places[own] for own in mask.cpu().numpy()]


def grid_places(grid: tuple[int, ...] | None, n_prefix: int, tokens: int) -> np.ndarray:
    """Place (N, axes) of each token in the grid, such as row and column; -1, -1 for prefix tokens;
    where there is no grid row 0 and a running number."""
    grid = grid or (1, tokens - n_prefix)
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, len(grid))
    return np.concatenate([np.full((n_prefix, len(grid)), -1), places]).astype(np.int32)


# ---------------------------------------------------------------------- what is read out


def source_of(
    loaded: Loaded[Root], ranks: dist.Ranks, *, frames: bool = False
) -> tuple[Experiment, Data]:
    """The model to read out, with its transforms, and the data.

    Args:
        frames: whether samples are clips that show every frame of videos.

    Raises:
        UserError: the spec's run does not exist.
    """
    spec, asked = loaded.root.extract, loaded.root.data
    as_samples = frames_as_samples if frames else clips_as_samples
    if not spec.use_data_fraction:
        asked = replace(asked, data_fraction=1.0)
    root = replace(loaded.root, data=asked.lenient() if spec.on_error == "skip" else asked)
    head_named = head_is_named(loaded)
    if spec.checkpoint is None and spec.source == "encoder":
        data = read_data(root, ranks, named=head_named)
        experiment = assemble(root, resolve_spec(root, data), ranks, load_weights=True)
        return experiment, as_samples(experiment.resolved.inputs, data)
    split = root.umap.split if root.mode == "umap" else spec.split
    wanted = () if split is None else (split,)
    data = read_data(root, ranks, named=head_named, wanted=wanted)
    if spec.checkpoint is not None:
        path = Path(spec.checkpoint)
    else:
        run = locate(loaded)
        path = run.best if spec.use == "best" else run.last
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: train the spec first, name a file with"
                ' extract.checkpoint = "<path>", or read the untrained or pretrained encoder out'
                ' with extract.source = "encoder"'
            )
    experiment = restore(path, root, ranks)
    check_data(experiment.resolved, str(path), data, root.data)
    resolved = experiment.resolved
    named = root.data.class_names if isinstance(root.data, FileData) else None
    if named is None:
        data = in_order_of(resolved, data)
    elif sorted(named) == sorted(resolved.class_names) and named != resolved.class_names:
        data.report.append(
            f"classes are counted as data.class_names has them, not as {path} does"
            f" ({listed(resolved.class_names)})"
        )
    training = replace(experiment.root.training, precision=root.training.precision)
    experiment.root = replace(experiment.root, training=training)
    return experiment, as_samples(resolved.inputs, data)


def wanted_splits(data: Data, name: str | None, key: str) -> dict[str, Split]:
    """The split of this name, or all that have samples.

    Args:
        key: of the spec that names it.

    Raises:
        UserError: there is none of that name, or none at all.
    """
    there = {name: split for name, split in data.splits.items() if len(split)}
    if not there:
        raise UserError(f"data set {data.name} has no sample")
    if name is None:
        return there
    if name not in there:
        raise UserError(f'{key} = "{name}": data set {data.name} has {", ".join(there)}')
    return {name: there[name]}
