"""Heat maps of attention over the coordinates of instances.

The colour of an instance tells its rank in the bag, as CLAM's maps do (Lu et al. 2021), because
attention itself spans orders of magnitude; on a scale that tells the first tenth and the first
hundredth apart, because the order of the many without attention is noise. The line below each map
says how concentrated the attention is. n instances of a bag, K branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.datasets import Split
from glovita_lib.evaluation import Predictions
from glovita_lib.facts import Facts
from glovita_lib.figures import GREY, drawing, number, short
from glovita_lib.sheets import displayed, window
from glovita_lib.spec import file_name

PANELS = 6  # branches shown
COLUMNS = 3
SIDE = 3.0  # inches of the longer side of a map
SHORTEST = 0.9  # of its shorter side
TILES = 5000  # instances up to which each is drawn as a square of its own
CELLS = 1500  # of the picture's longer side where they are more
PROBED = 256  # instances whose neighbours tell the size of a tile
SHADES = ("#fff4e0", "#fdd49e", "#fc8d59", "#d7301f", "#7f0000")  # low to high
MARKED = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # shares of a bag; the last has the darkest shade


@dataclass(frozen=True, slots=True)
class BagMap:
    """What is drawn of a bag."""

    title: str
    caption: str
    """Truth and prediction."""
    coords: np.ndarray  # (n, 2): to the right, down
    attention: np.ndarray  # (n, K), 1 in sum over the n
    branches: Sequence[str]
    """K names."""
    order: Sequence[int]
    """Branches by their importance, should they be too many."""
    image: np.ndarray | None = None  # (H, W, 3) uint8, what the instances are parts of


# ---------------------------------------------------------------------- which bags


def draw_bags(
    attention: Path,
    folder: Path,
    split: Split,
    predictions: Predictions,
    facts: Facts,
    *,
    count: int,
) -> int:
    """Heat maps of at most `count` bags, as <bag>.png in the folder, whose earlier ones go.

    Returns how many were drawn: bags without coordinates are not.

    Args:
        attention: the file that attention.Recorder wrote of the split.
    """
    import h5py

    for old in folder.glob("*.png"):
        old.unlink()
    with h5py.File(attention, "r") as file:
        chosen = chosen_bags(predictions, facts.subtask, count) if "coords" in file else []
        bags = [bag_map(file, bag, split, predictions, facts) for bag in chosen]
    drawn = [bag for bag in bags if np.isfinite(bag.coords).all()]
    for bag in drawn:
        attention_map(bag, folder / f"{file_name(bag.title)}.png")
    return len(drawn)


def chosen_bags(predictions: Predictions, subtask: str, count: int) -> list[int]:
    """Rows of at most `count` bags in ascending order: of classes the first bags of each, by turns;
    of other targets evenly from the lowest to the highest (of several, the first); without labels
    evenly over the split."""
    bags = len(predictions.ids)
    if predictions.targets is None:
        order = np.arange(bags)
    elif subtask == "multiclass":
        turns = [np.flatnonzero(predictions.targets == k) for k in np.unique(predictions.targets)]
        turn = np.concatenate([np.arange(len(rows)) for rows in turns])
        order = np.concatenate(turns)[np.argsort(turn, kind="stable")]
        return sorted(order[:count].tolist())
    else:
        order = np.argsort(predictions.targets[:, 0], kind="stable")
    places = np.linspace(0, bags - 1, min(count, bags)).astype(int)
    return sorted(order[places].tolist())


def bag_map(file: Any, bag: int, split: Split, predictions: Predictions, facts: Facts) -> BagMap:
    """What the file holds of a bag."""
    rows = slice(*file["bag_ptr"][bag : bag + 2].tolist())
    coords = file["coords"][rows][:, :2]
    scores = predictions.scores[bag]
    branches = [str(name) for name in file.attrs["branches"]]
    of_classes = len(branches) == len(scores)
    image = None
    if facts.kind == "images":
        (pixels,) = split.source.fetch(np.array([bag]))
        image = displayed(pixels, *window(pixels, facts.bit_depth))
    return BagMap(
        title=predictions.ids[bag],
        caption=caption(predictions, bag, facts),
        coords=coords[:, ::-1] if file.attrs["coords"] == "row,column" else coords,
        attention=file["attention"][rows],
        branches=branches,
        order=np.argsort(-scores, kind="stable") if of_classes else range(len(branches)),
        image=image,
    )


def caption(predictions: Predictions, bag: int, facts: Facts) -> str:
    """Truth and prediction of a bag in words."""
    scores, targets, names = predictions.scores[bag], predictions.targets, facts.class_names
    if facts.subtask == "multiclass":
        parts = [f"predicted {short(names[scores.argmax()], 24)} ({number(float(scores.max()))})"]
        truth = [] if targets is None else [f"label {short(names[targets[bag]], 24)}"]
    elif facts.subtask == "multilabel":
        parts = [f"predicted {listed(names, scores >= 0.5)}"]
        truth = [] if targets is None else [f"labels {listed(names, targets[bag] > 0.5)}"]
    else:
        parts = [f"predicted {numbers(scores)}"]
        truth = [] if targets is None else [f"label {numbers(targets[bag])}"]
    return ", ".join([*truth, *parts])


def numbers(values: np.ndarray) -> str:
    """The first targets of a regression."""
    return ", ".join(number(float(value)) for value in values[:4])


def listed(names: Sequence[str], chosen: np.ndarray) -> str:
    """Names of the chosen labels; a dash where there are none."""
    return (
        ", ".join(name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen) or "–"
    )


# ---------------------------------------------------------------------- one bag


def attention_map(bag: BagMap, path: Path) -> None:
    """One panel a branch; of more than six those named first by `order`.

    Args:
        path: of the PNG.
    """
    shown = sorted(bag.order[:PANELS])
    panels = len(shown) + (bag.image is not None)
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    side = tile_side(bag.coords)
    width, height = panel_size(bag.coords, side)
    with drawing(path, columns * width + 1.7, rows * (height + 0.42) + 0.45) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in axes[panels:]:
            spare.set_axis_off()
        if bag.image is not None:
            show_image(axes[0], bag.image)
        drawn = axes[panels - len(shown) : panels]
        for place, k in zip(drawn, shown, strict=True):
            tiles = draw_branch(place, bag.coords, side, bag.attention[:, k])
            place.set_title(short(bag.branches[k], 40))
        bar = figure.colorbar(tiles, ax=axes, shrink=0.6, aspect=18, ticks=-np.log10(MARKED))
        bar.outline.set_visible(False)
        bar.ax.set_yticklabels([f"{100 * share:g} %" for share in MARKED])
        bar.ax.tick_params(length=0)
        bar.set_label("rank by attention: top ... of the bag")
        figure.suptitle(f"{short(bag.title, 60)}   {bag.caption}".rstrip(), x=0.01, ha="left")


def panel_size(coords: np.ndarray, side: float) -> tuple[float, float]:
    """Width and height of a map, inches."""
    extent = np.ptp(coords, axis=0) + side
    return tuple(np.maximum(SIDE * extent / extent.max(), SHORTEST))


def draw_branch(axes: Any, coords: np.ndarray, side: float, attention: np.ndarray) -> Any:
    """A tile for every instance; its upper left corner is at its coordinates. Where tiles overlap
    the one with the highest attention is seen."""
    from matplotlib.colors import LinearSegmentedColormap

    order = np.argsort(attention, kind="stable")  # the highest on top
    colours = {
        "cmap": LinearSegmentedColormap.from_list("attention", SHADES),
        "clim": (0, -np.log10(MARKED[-1])),
    }
    draw = draw_tiles if len(coords) <= TILES else draw_cells
    values = -np.log10(top_shares(attention))
    tiles = draw(axes, coords[order], values[order], side, colours)
    low, high = coords.min(0), coords.max(0) + side
    margin = 0.02 * (high - low).max()
    axes.set(xlim=(low[0] - margin, high[0] + margin), ylim=(high[1] + margin, low[1] - margin))
    bare(axes)
    axes.set_xlabel(concentration(attention), color=GREY, fontsize=7.5)
    return tiles


def draw_tiles(
    axes: Any, coords: np.ndarray, values: np.ndarray, side: float, colours: dict[str, Any]
) -> Any:
    """Squares at exact places, in the order given."""
    from matplotlib.collections import PolyCollection

    corners = side * np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    places = coords[:, None] + corners  # (n, 4, 2)
    # without antialiasing, which would draw seams between neighbours
    tiles = PolyCollection(places, array=values, linewidths=0, antialiaseds=False, **colours)
    axes.add_collection(tiles)
    return tiles


def draw_cells(
    axes: Any, coords: np.ndarray, values: np.ndarray, side: float, colours: dict[str, Any]
) -> Any:
    """Many tiles as the cells of a picture, each at most half a tile from its place."""
    low = coords.min(0)
    side = max(side, float(np.ptp(coords, axis=0).max()) / CELLS)
    x, y = np.round((coords - low) / side).astype(int).T
    cells = np.full((y.max() + 1, x.max() + 1), np.nan)
    cells[y, x] = values  # of equal places the last one stays
    extent = (low[0], low[0] + cells.shape[1] * side, low[1] + cells.shape[0] * side, low[1])
    return axes.imshow(cells, extent=extent, interpolation="nearest", **colours)


def show_image(axes: Any, image: np.ndarray) -> None:
    """The sample that the instances are parts of."""
    axes.imshow(image, interpolation="nearest")
    axes.set_title("image")
    bare(axes)


def bare(axes: Any) -> None:
    """Equal scales, no ticks, no grid."""
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def concentration(attention: np.ndarray) -> str:
    """How few instances have half of the attention, and how far the first one stands out: colours
    are ranks, which look the same where attention is even."""
    half = int(np.searchsorted(np.cumsum(np.sort(attention)[::-1]), 0.5 - 1e-6)) + 1
    factor = attention.max() / attention.mean()
    return (
        f"{half:,} of {len(attention):,} have half of the attention,\n"
        f"the first {factor:,.{0 if factor >= 10 else 1}f} times the mean"
    )


def top_shares(values: np.ndarray) -> np.ndarray:
    """Share (n,) of the values that come before each, counted from the highest, half of it and of
    its equals included: 0.5 / n for the highest of n, 1 - 0.5 / n for the lowest."""
    _, index, counts = np.unique(-values, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - counts / 2) / len(values))[index]


def tile_side(coords: np.ndarray) -> float:
    """Side of a tile in the units of the coordinates (n, 2): the usual distance, in the larger of
    both axes, to the nearest other instance; 1 for a single one."""
    probes = np.linspace(0, len(coords) - 1, min(len(coords), PROBED)).astype(int)
    x, y = np.ascontiguousarray(coords.T)
    nearest = []
    for probe in probes:
        distance = np.maximum(np.abs(x - x[probe]), np.abs(y - y[probe]))
        nearest.append(distance[distance > 0].min(initial=np.inf))
    side = float(np.median(nearest))
    return side if np.isfinite(side) else 1.0
