"""Grad-CAM: where in a sample the evidence for a class or a target lies.

Of a score y and the activations A of the last map or tokens, K channels at N places,

    alpha_k = 1/N sum_i dy/dA_ik,    L_i = max(0, sum_k alpha_k A_ik)

(Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", ICCV 2017). y is the logit of a class, or a target of a regression in its units.

B batch, C channels, H W pixels, X Y Z voxels, D width, N places of a map, S slices of a volume.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib import figures, figures_volumes
from glovita_lib.attention_maps import caption, chosen_samples
from glovita_lib.augment import ManyClips
from glovita_lib.augment_patch import PatchCut, WholeVolumes, WindowedVolumes, overlap
from glovita_lib.data import Split, subset
from glovita_lib.encoder import Encoder, Features, evaluating
from glovita_lib.encoder_aggregation import aggregate, reads_pooled
from glovita_lib.encoder_slicewise import PartwiseEncoder, SlicewiseEncoder, WindowsEncoder
from glovita_lib.errors import UserError, composed, file_name, listed
from glovita_lib.experiment import Experiment
from glovita_lib.figures import displayed, window
from glovita_lib.files import write_bytes
from glovita_lib.model import Model
from glovita_lib.objectives import HeadOutput, Predictions
from glovita_lib.resolved import ClipInputs, ImageInputs, Inputs, Resolved, VolumeInputs
from glovita_lib.spec_train import Infer
from glovita_lib.volume_maps import map_titles, part_affine, write_map

OFF = "set infer.heat_maps = 0"

# ------------------------------------------------------------------------------- the formula


@dataclass(frozen=True, slots=True)
class Activations:
    """The last map or tokens of a pass, and what becomes of them."""

    leaves: list[Tensor]
    """Raw features, of which gradients are asked."""
    patches: Callable[[Tensor], Tensor]
    """The patch tokens (n, N, D) of such a tensor, or of its gradient."""
    features: Features
    grid: tuple[int, ...]
    """Sides of the N places."""


def grad_cam(model: Model, x: Tensor, output: int) -> tuple[np.ndarray, float]:
    """Grad-CAM (*grid) in float64 of one sample (1, C, *size) for one output of a model, and that
    output, a logit; where it reads parts of the sample (S, *grid), each part a map of its own.

    It is computed in the precision of the weights. Weights get no gradient.

    Raises:
        UserError: the encoder gives no map, or the output does not depend on it.
    """
    with torch.enable_grad(), evaluating(model), without_gradients(model):
        if isinstance(model.encoder, PartwiseEncoder):
            found = part_activations(model.encoder, x)
        else:
            method = model.aggregation if model.head.consumes == "pooled" else "avg"
            found = activations(model.encoder, x, method)
        logits = HeadOutput.of(model.head_output(found.features)).logits  # (1, K)
        gradients = torch.autograd.grad(logits[0, output], found.leaves, allow_unused=True)
    maps = []
    for leaf, gradient in zip(found.leaves, gradients, strict=True):
        if gradient is None:
            raise UserError(
                f"infer.heat_maps: the prediction does not depend on the last map of"
                f" {model.encoder.name}; {OFF}"
            )
        kept, slope = (found.patches(part.detach()).double() for part in (leaf, gradient))
        alpha = slope.mean(1, keepdim=True)  # (n, 1, D)
        maps.append((alpha * kept).sum(2).clamp(min=0))  # (n, N)
    return torch.cat(maps).reshape(found.grid).cpu().numpy(), float(logits[0, output].detach())


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: the graph begins at the activations."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def activations(encoder: Encoder, x: Tensor, method: str) -> Activations:
    """The last map or tokens of inputs (n, C, *size).

    Where the CLS token enters the vector, what it has read stands in it alone: the tokens are those
    that enter the last block.

    Args:
        method: how tokens become a vector.

    Raises:
        UserError: the encoder gives no map and no tokens of a grid.
    """
    check_places(encoder)
    pooled = reads_pooled(method, encoder)
    leaves: list[Tensor] = []
    from_cls = reads_cls(encoder, method)
    if from_cls:
        with taking_tokens(encoder, leaves):
            features = encoder(x, pooled=pooled)
    else:
        raw = encoder.forward_features(x).detach().requires_grad_()
        leaves.append(raw)
        # a copy, as layers may work in place
        features = encoder.features_of(raw.clone(), x.shape[2:], pooled=pooled)
    count = features.patches.shape[1]
    entering = leaves[-1].shape[1] if from_cls and leaves else count
    if features.grid is None or not leaves or entering < count:
        raise UserError(
            f"infer.heat_maps: {encoder.name} has no tokens of a grid that its prediction is read"
            f" from; {OFF}"
        )

    def patches(part: Tensor) -> Tensor:
        tokens = part if from_cls else encoder.placed(part, x.shape[2:])[0]
        return tokens[:, -count:]  # behind any prefix

    return Activations(leaves[-1:], patches, features, features.grid)


def reads_cls(encoder: Encoder, method: str) -> bool:
    """Whether a way to make a vector of tokens reads the CLS token."""
    parts = ("cls_token", "joint", "mean_all")
    of_library = method == "pooled" and encoder.pooling == "cls_token"
    return encoder.has_cls and (method in parts or of_library)


@contextmanager
def taking_tokens(encoder: Encoder, leaves: list[Tensor]) -> Iterator[None]:
    """Inside, the tokens (B, N, D) that enter the last block are put to `leaves`."""

    def take(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 3:
            leaves.append(inputs[0].detach().requires_grad_())
            return (leaves[-1].clone(), *inputs[1:])
        return inputs

    handle = encoder.blocks()[-1].register_forward_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()


def part_activations(encoder: PartwiseEncoder, x: Tensor) -> Activations:
    """The last maps or tokens of the parts of one volume (1, C, X, Y, Z)."""
    (inner,) = encoder.inner
    places, cut = parts_of(encoder, x)
    found = []
    for numbers in torch.arange(len(places)).split(encoder.chunk or encoder.at_once):
        found.append(activations(inner, cut(numbers), encoder.method))
    tokens = torch.cat([aggregate(part.features, encoder.method) for part in found])[None]
    grid = None if isinstance(encoder, WindowsEncoder) else (len(places),)
    mean = tokens.mean(1)  # (1, D)
    features = Features(tokens, grid, 0, False, mean, encoder.pooling, places=(places,))
    leaves = [leaf for part in found for leaf in part.leaves]
    return Activations(leaves, found[0].patches, features, (len(places), *found[0].grid))


def parts_of(encoder: PartwiseEncoder, x: Tensor) -> tuple[np.ndarray, Callable[[Tensor], Tensor]]:
    """Where the parts of one volume (1, C, X, Y, Z) lie, (S, axes), and what makes inputs
    (n, C, ...) of the encoder of parts of their numbers (n,)."""
    if isinstance(encoder, WindowsEncoder):
        starts, windows = encoder.places(x[0]), encoder.windows
        return starts, lambda part: torch.stack(
            [windows.cut(x[0], starts[number].tolist()) for number in part]
        )
    assert isinstance(encoder, SlicewiseEncoder)
    slices = encoder
    volumes = x.movedim(2 + slices.axis, 1)  # (1, N, C, H, W)
    places = slices.places(volumes.shape[1])  # (S,)
    return places.numpy()[:, None], lambda part: slices.images(
        volumes, torch.zeros_like(part), places[part]
    )


def check_places(encoder: Encoder) -> None:
    """An encoder says something of places.

    Raises:
        UserError: it gives vectors alone.
    """
    (inner,) = encoder.inner if isinstance(encoder, PartwiseEncoder) else (encoder,)
    if not inner.has_patches:
        raise UserError(
            f"infer.heat_maps: {inner.name} gives one vector a sample, no map that Grad-CAM could"
            f" weigh; {OFF}"
        )


# ------------------------------------------------------------------------- on pixels and voxels


def on_input(cells: np.ndarray, encoder: Encoder, size: Sequence[int]) -> np.ndarray:
    """A map of places as one of pixels or voxels (*size): linear between the middles of places,
    constant beyond the outer ones. Places divide the input evenly, but slices lie at theirs."""
    of_slices = encoder if isinstance(encoder, SlicewiseEncoder) else None
    if of_slices is not None:
        cells = np.moveaxis(cells, 0, of_slices.axis)
    for axis, (count, side) in enumerate(zip(cells.shape, size, strict=True)):
        middles = (np.arange(count) + 0.5) * side / count - 0.5
        if of_slices is not None and axis == of_slices.axis:
            middles = of_slices.places(side).numpy()
        weights = [np.interp(np.arange(side), middles, one) for one in np.eye(count)]
        cells = np.moveaxis(np.tensordot(weights, cells, (0, axis)), 0, axis)
    return cells


def heat_values(
    model: Model, x: Tensor, output: int, windowed: WindowedVolumes | None = None
) -> np.ndarray:
    """Grad-CAM of one sample (C, *size) on its pixels or voxels, (*size).

    Maps of windows are put together, their mean where they overlap, 0 where there is none.

    Args:
        windowed: how an evaluation by windows goes; the map of a window is that of the mean or the
            maximum over all of them.
    """
    encoder, size = model.encoder, x.shape[1:]
    if windowed is not None:
        starts, sides = windowed.grid.starts(size), windowed.grid.size
        found = [
            grad_cam(model, windowed.grid.cut(x, start)[None], output) for start in starts.tolist()
        ]
        shares = np.full(len(found), 1 / len(found))
        if windowed.how == "max":
            shares = np.eye(len(found))[np.argmax([logit for _, logit in found])]
        maps = [
            on_input(cells * w, encoder, sides) for (cells, _), w in zip(found, shares, strict=True)
        ]
        return joined(maps, starts, size)
    cells, _ = grad_cam(model, x[None], output)
    if isinstance(encoder, WindowsEncoder):
        (inner,), starts = encoder.inner, encoder.places(x)
        return joined([on_input(c, inner, encoder.windows.size) for c in cells], starts, size)
    return on_input(cells, encoder, size)


def joined(maps: Sequence[np.ndarray], starts: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Maps (x, y, z) of windows that begin at voxels (N, 3), as one (X, Y, Z)."""
    total, count = np.zeros(tuple(size)), np.zeros(tuple(size))
    for values, start in zip(maps, starts.tolist(), strict=True):
        there, inside = overlap(start, values.shape, size)
        total[tuple(there)] += values[tuple(inside)]
        count[tuple(there)] += 1
    return total / np.maximum(count, 1)


# ------------------------------------------------------------------------- maps of a split


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The map of one sample and what is said about it."""

    title: str
    caption: str
    """Truth and prediction."""
    output: str
    """The class or target."""
    inputs: np.ndarray  # (C, *size) as the encoder sees it
    values: np.ndarray  # (*size)
    affine: np.ndarray | None = None
    """(4, 4) voxel to world mm, of volumes whose files tell."""
    name: str = ""
    """What the files of a volume's map are called."""


def check_heat_maps(experiment: Experiment, spec: Infer) -> None:
    """The model can be asked for the maps that the spec wants.

    Raises:
        UserError: it reads features or gives no map, or has no such class.
    """
    resolved = experiment.resolved
    if resolved.subtask == "framewise":
        raise UserError(
            f"infer.heat_maps: every frame of a video has a prediction of its own; {OFF}"
        )
    if not isinstance(resolved.inputs, ImageInputs | VolumeInputs | ClipInputs):
        raise UserError(
            f"infer.heat_maps: the samples are {resolved.inputs.kind}, which have no places in an"
            f" image or a volume; {OFF}: heads with attention write that of every instance"
        )
    check_places(experiment.model.encoder)
    names = list(map(composed, resolved.class_names))
    if spec.heat_map_class is not None and composed(spec.heat_map_class) not in names:
        raise UserError(
            f'infer.heat_map_class = "{spec.heat_map_class}": the model predicts'
            f" {listed(resolved.class_names, 20)}"
        )


def write_heat_maps(
    experiment: Experiment,
    spec: Infer,
    split: Split,
    predictions: Predictions,
    folder: Path,
    name: str,
) -> list[tuple[str, str]]:
    """Maps of some samples of a split, drawn below plots/ and of volumes as NIfTI too, where those
    of an earlier start go; lines on where they are.

    Args:
        name: of the split in file names.
    """
    resolved = experiment.resolved
    pictures, volumes = folder / "plots" / f"heat_maps_{name}", folder / f"heat_maps_{name}"
    for old in [*pictures.glob("*.png"), *pictures.glob("*.gif"), *volumes.glob("*.nii.gz")]:
        old.unlink()
    chosen = chosen_samples(predictions, resolved.subtask, spec.heat_maps)
    part = subset(split, predictions.rows[chosen])
    names = map_titles(predictions.ids)
    alone = with_fields(experiment.ranks, rank=0, world=1)
    with closing(
        experiment.single_pass(
            part, augmented=False, seed=experiment.root.seed, ranks=alone, here=True
        )
    ) as loader:
        for batch in loader.epoch(0):
            moved = batch.to(alone.device)
            inputs = experiment.objective.eval_inputs(moved.inputs, moved.fitted, 0)
            windowed = inputs if isinstance(inputs, WindowedVolumes) else None
            samples = inputs.volumes if windowed is not None else inputs
            if isinstance(inputs, ManyClips):
                samples = inputs.clips
            for x, row in zip(samples, batch.rows.tolist(), strict=True):
                found = heat_map(experiment, spec, part, row, x, windowed, predictions, chosen[row])
                found = with_fields(found, name=names[chosen[row]])
                show(resolved.inputs, found, pictures, volumes, resolved)
    rows = [("heat maps", f"{pictures}/")]
    return [*rows, ("maps as NIfTI", f"{volumes}/")] if volumes.is_dir() else rows


def heat_map(
    experiment: Experiment,
    spec: Infer,
    split: Split,
    row: int,
    x: Tensor,
    windowed: WindowedVolumes | None,
    predictions: Predictions,
    number: int,
) -> HeatMap:
    """The map of one sample.

    Args:
        row: of the sample in the split.
        x: (C, *size), the sample as the model takes it, or (V, C, T, H, W).
        windowed: see `heat_values`.
        number: of the sample in the predictions.
    """
    resolved = experiment.resolved
    output = output_of(spec, resolved, predictions.scores.ranked[number])
    if x.ndim == 5:  # several clips of a video, whose mean is predicted: one after another
        values = np.concatenate([heat_values(experiment.model, clip, output) for clip in x]) / len(
            x
        )
        x = x.transpose(0, 1).flatten(1, 2)  # (C, V T, H, W)
    else:
        values = heat_values(experiment.model, x, output, windowed)
    if resolved.subtask == "regression":
        values = values * resolved.target_std[output]  # of the target in its units
    return HeatMap(
        title=predictions.ids[number],
        caption=caption(predictions, number, resolved),
        output=resolved.class_names[output],
        inputs=x.float().cpu().numpy(),
        values=values,
        affine=affine_of(experiment, split, row),
    )


def output_of(spec: Infer, resolved: Resolved, ranked: np.ndarray) -> int:
    """The output (of K) that is asked about: the one named, else the predicted class, of labels
    the likeliest, of a regression the first target."""
    if spec.heat_map_class is not None:
        names = list(map(composed, resolved.class_names))
        return names.index(composed(spec.heat_map_class))
    return 0 if resolved.subtask == "regression" else int(ranked.argmax())


def affine_of(experiment: Experiment, split: Split, row: int) -> np.ndarray | None:
    """Affine (4, 4) of what the encoder sees of a volume of a split; None where none is known."""
    fit = experiment.objective.eval_inputs.fit
    if split.source.windows is None or not isinstance(fit, PatchCut | WholeVolumes):
        return None
    (volume,) = split.source.windows(np.array([row]))
    if isinstance(fit, WholeVolumes):
        return volume.affine
    box = fit.boxes(np.array([volume.shape[1:]]), None)[0]  # the centre, in which nothing is drawn
    return part_affine(volume.affine, fit.start(volume, box))


@singledispatch
def show(inputs: Inputs, found: HeatMap, pictures: Path, volumes: Path, resolved: Resolved) -> None:
    """Write a map to the folder of pictures, and one of a volume to that of volumes too."""
    raise TypeError(f"no picture of {inputs.kind}")


@show.register
def _(
    inputs: ImageInputs, found: HeatMap, pictures: Path, volumes: Path, resolved: Resolved
) -> None:
    pixels = as_pixels(found.inputs, inputs) * (2**inputs.bit_depth - 1)
    pixels = displayed(pixels, *window(pixels, inputs.bit_depth))
    image_map(found, pixels, pictures / f"{file_name(found.title)}.png")


def as_pixels(inputs: np.ndarray, kind: ImageInputs | ClipInputs) -> np.ndarray:
    """Values 0..1 of inputs (C, ...) of an encoder."""
    mean, std = (
        np.array(v).reshape(-1, *(1,) * (inputs.ndim - 1))
        for v in (kind.augmentation.mean, kind.augmentation.std)
    )
    return np.clip(inputs * std + mean, 0, 1)


@show.register
def _(
    inputs: ClipInputs, found: HeatMap, pictures: Path, volumes: Path, resolved: Resolved
) -> None:
    frames = as_pixels(found.inputs, inputs).transpose(1, 0, 2, 3) * 255  # (T, C, H, W)
    clip = np.stack([displayed(frame, 0, 255) for frame in frames])  # (T, H, W, 3)
    clip_map(found, clip, pictures / f"{file_name(found.title)}.gif")


@show.register
def _(
    inputs: VolumeInputs, found: HeatMap, pictures: Path, volumes: Path, resolved: Resolved
) -> None:
    name = file_name(found.name)
    spacing = np.diag([*inputs.augmentation.spacing, 1.0])
    affine = spacing if found.affine is None else found.affine
    write_map(volumes / f"{name}.nii.gz", found.values, affine)
    volume_map(found, affine, pictures / f"{name}.png")


# ------------------------------------------------------------------------------- the pictures
#
# A map lies over the sample, the clearer the higher its values are; 0 is not seen.

SHADES = ("#7f0000", "#d7301f", "#fc8d59", "#ffd92f")  # low to high
SCALE = 1.25  # inches beside the slices of a volume for the colours and what they mean
MOST = 0.75  # opacity of the highest value
NOWHERE = "nothing in the sample speaks for it"


def draw_over(axes: Any, values: np.ndarray, highest: float, **place: Any) -> Any:
    """A map (rows, columns) over what axes show."""
    from matplotlib.colors import LinearSegmentedColormap

    shares = np.clip(values / highest, 0, 1) if highest > 0 else np.zeros_like(values)
    colours = LinearSegmentedColormap.from_list("map", SHADES)
    return axes.imshow(shares, cmap=colours, vmin=0, vmax=1, alpha=MOST * shares, **place)


def add_scale(figure: Any, drawn: Any, axes: Any, found: HeatMap) -> None:
    """Colours of a map, in shares of its highest value, and what it is a map of."""
    from matplotlib.cm import ScalarMappable

    highest = float(found.values.max())
    bar = figure.colorbar(
        ScalarMappable(drawn.norm, drawn.cmap), ax=axes, ticks=[0, 0.5, 1], shrink=0.8, aspect=25
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7)
    bar.set_ticklabels([f"{share * highest:.2g}" for share in (0, 0.5, 1)])
    name = f"Grad-CAM of {figures.short(found.output, 40)}"
    bar.set_label(name if highest > 0 else f"{name}: {NOWHERE}")
    figure.suptitle(f"{figures.short(found.title, 60)}   {found.caption}".rstrip())


FRAME_MS = 200  # how long a frame is shown
SHORT_SIDE = 192  # pixels that small frames are enlarged to


def clip_map(found: HeatMap, clip: np.ndarray, path: Path) -> None:
    """The frames of a clip (T, H, W, 3), and the map over them on their right, as an animation
    that begins again at its end; its comment says what it is a map of.

    Args:
        path: of the GIF.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from PIL import Image

    highest = float(found.values.max())
    shares = np.clip(found.values / highest, 0, 1) if highest > 0 else found.values * 0.0
    colours = (
        LinearSegmentedColormap.from_list("map", SHADES)(shares)[..., :3] * 255
    )  # (T, H, W, 3)
    seen = MOST * shares[..., None]
    both = np.concatenate([clip, (1 - seen) * clip + seen * colours], axis=2)
    factor = max(1, -(-SHORT_SIDE // min(clip.shape[1:3])))
    pixels = both.round().astype(np.uint8).repeat(factor, 1).repeat(factor, 2)
    first, *others = (Image.fromarray(frame) for frame in pixels)
    output = f"Grad-CAM of {found.output}" if highest > 0 else f"{found.output}: {NOWHERE}"
    content = io.BytesIO()
    first.save(
        content,
        "GIF",
        save_all=True,
        append_images=others,
        duration=FRAME_MS,
        loop=0,
        comment=f"{found.title}; {found.caption}; {output}".encode(),
    )
    write_bytes(path, content.getbuffer())


def image_map(found: HeatMap, pixels: np.ndarray, path: Path) -> None:
    """The image (H, W, 3), and the map over it.

    Args:
        path: of the PNG.
    """
    high, wide = pixels.shape[:2]
    side = 3.2  # inches
    with figures.drawing(path, 2 * side + 0.9, side * high / wide + 0.5) as figure:
        figure.set_layout_engine("compressed", h_pad=0.06, w_pad=0.06)
        left, right = figure.subplots(1, 2)
        smooth = "nearest" if max(high, wide) <= figures.SMALL else "antialiased"
        for axes in (left, right):
            axes.imshow(pixels, interpolation=smooth)
            figures.bare(axes)
        drawn = draw_over(right, found.values, float(found.values.max()), interpolation="bilinear")
        add_scale(figure, drawn, [left, right], found)


def volume_map(found: HeatMap, affine: np.ndarray, path: Path) -> None:
    """The three slices of a volume through the highest value of its map: a row for each channel,
    then the first one with the map.

    Args:
        path: of the PNG.
    """
    volume, values, spacing = figures_volumes.upright(found.inputs, found.values, affine)
    highest = [int(place) for place in np.unravel_index(values.argmax(), values.shape)]
    sides = np.array(values.shape) * spacing  # mm
    planes = [figures_volumes.plane_sides(sides, axis) for axis in figures_volumes.PLANES]
    wide, high = sum(side for side, _ in planes), max(side for _, side in planes)
    shown = volume[: figures_volumes.CHANNELS]
    rows = len(shown) + 1
    scale = min((figures.WIDTH - SCALE) / wide, (figures.HEIGHT - 1) / (rows * high))  # inches a mm
    voxel = np.unravel_index(found.values.argmax(), found.values.shape)
    place = ", ".join(f"{mm:.0f}" for mm in (affine @ [*voxel, 1])[:3])  # of the world
    known = found.affine is not None
    with figures.drawing(path, wide * scale + SCALE, rows * high * scale + 0.6) as figure:
        figure.set_layout_engine("compressed", h_pad=0.03, w_pad=0.03)
        cells = figure.subplots(rows, 3, squeeze=False, width_ratios=[side for side, _ in planes])
        for row, channel in zip(cells, [*shown, shown[0]], strict=True):
            cut = {
                axis: figures_volumes.plane(channel, axis, highest[axis])
                for axis in figures_volumes.PLANES
            }
            limits = figures_volumes.limits_of(cut)
            for axis, axes in zip(cut, row, strict=True):
                figures_volumes.draw_plane(
                    axes, channel, axis, highest[axis], spacing, limits, lettered=known
                )
        for axis, axes in zip(figures_volumes.PLANES, cells[-1], strict=True):
            part = figures_volumes.plane(values, axis, highest[axis])
            drawn = draw_over(axes, part, values.max(), extent=axes.images[0].get_extent())
        for row, name in zip(cells[:-1], figures_volumes.channel_names(len(volume)), strict=True):
            row[0].set_ylabel(name, fontsize=7.5, color=figures.GREY)
            for axis, axes in zip(figures_volumes.PLANES, row, strict=True):
                figures_volumes.draw_cross(axes, highest, values.shape, spacing, axis)
        for name, axes in zip(figures_volumes.PLANES.values(), cells[0], strict=True):
            axes.set_title(name)
        add_scale(figure, drawn, list(cells.flat), found)
        if known:
            figure.supxlabel(f"slices through the highest value, at {place} mm", fontsize=8)
