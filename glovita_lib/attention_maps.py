"""Attention of every instance of a split: HDF5, and heat maps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from glovita_lib import dist, files
from glovita_lib.bags import as_bags
from glovita_lib.data import Split
from glovita_lib.encoder import Features
from glovita_lib.errors import UserError, file_name, listed
from glovita_lib.extraction import CLIP_AXES, token_axes, token_places
from glovita_lib.figures import GREY, bare, displayed, drawing, number, short, window
from glovita_lib.objectives import LabelledPredictions, Predictions, frames_shown
from glovita_lib.resolved import ImageInputs, Resolved

# ---------------------------------------------------------------------------------- the file
#
# Scores are taken from the passes that make the predictions. Each rank writes those of each member
# to a file of its own as they come; the files are put together at the end, so that no more than a
# block of scores is in memory.
#
# The file, for B bags of M instances in all:
#
# - attention (M, K) float32: softmax over the instances of a bag, per branch; 1 in sum
# - raw (M, K) float32: the same before the softmax
# - ids (B,), bag_ptr (B + 1,): instances bag_ptr[b]..bag_ptr[b + 1] are bag b, in the order of the
#   feature file
# - coords (M, 2 or more) float64, where there are some; NaN in bags without them
# - frames (M,) int64, times (M,) float64: of the frames of a clip, their numbers and their seconds
# - instance_ids (M,), where the feature file has them: which tile an instance is
# - attributes: class_names, branches (what the K columns are), coords (their axes), checkpoints ...
#
# Of an ensemble both are means over its members. B bags, M instances, K branches, W ranks.

BLOCK = 2**18  # instances that are put together at once
ALL_CLASSES = "all classes"  # the branch of a head that has only one


@runtime_checkable
class AttentionHead(Protocol):
    """A head that weighs the instances of a bag."""

    def attention(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw scores (M, K) of the instances, and their softmax over each bag."""


class AttentionHook:
    """Writes the raw scores of all bags that pass a head to a file, and notes their sizes."""

    def __init__(self, file: BinaryIO, head: AttentionHead) -> None:
        self.file, self.head = file, head
        self.lengths: list[torch.Tensor] = []  # (b,) each
        self.branches = 0
        self.places: list[np.ndarray] = []  # (n, axes) of the patch tokens of each sample

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook. Heads that return their scores are not asked a second time."""
        known = isinstance(output, dict) and "scores" in output
        scores = output["scores"] if known else self.head.attention(inputs[0])[0]  # (m, K)
        self.branches = scores.shape[1]
        self.lengths.append(as_bags(inputs[0]).lengths)
        if isinstance(inputs[0], Features):
            self.places += token_places(inputs[0], 0)
        try:
            self.file.write(scores.float().cpu().numpy().tobytes())
        except OSError as error:
            raise files.write_error(self.file.name, error) from None


@dataclass(frozen=True)
class Sizes:
    """What all ranks have heard."""

    lengths: np.ndarray  # (B,) int64
    branches: int
    places: list[np.ndarray] | None  # (n, axes) of the patch tokens of each sample

    @property
    def are_slices(self) -> bool:
        """Whether instances lie along one axis."""
        return self.places is not None and all(part.shape[1] == 1 for part in self.places)


class AttentionWriter:
    """The attention of the members of an ensemble, or of a single model, to one file."""

    def __init__(self, target: Path, ranks: dist.Ranks, *, wanted: bool) -> None:
        self.target, self.ranks, self.wanted = target, ranks, wanted
        self.folder = target.with_name(f"{target.name}.parts")
        self.members: list[Sizes | None] = []  # None: a head without attention, or not rank 0
        self.own: list[Path] = []

    def __enter__(self) -> "AttentionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.own:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # the last rank finds it empty
            self.folder.rmdir()

    def listening(self, head: nn.Module) -> Any:
        """Context in which the passes of a head over its shard of the split are written down."""
        if self.wanted and isinstance(head, AttentionHead):
            return self._listening(head, head)
        self.members.append(None)
        return nullcontext()

    @contextmanager
    def _listening(self, module: nn.Module, head: AttentionHead) -> Iterator[None]:
        path = self.part(len(self.members), self.ranks.rank)
        files.make_folder(self.folder)
        self.own.append(path)
        with open(path, "wb") as file:
            listener = AttentionHook(file, head)
            handle = module.register_forward_hook(listener)
            try:
                yield
            finally:
                handle.remove()
        self.members.append(self.gathered(listener))

    def part(self, member: int, rank: int) -> Path:
        """File of a member's scores on a rank: (m, K) float32."""
        return self.folder / f"{member:03d}-{rank:05d}.f32"

    def gathered(self, listener: AttentionHook) -> Sizes | None:
        """Sizes on the first rank, None on the others; a rank without bags knows no branches."""
        kinds = {places.tobytes(): places for places in listener.places}  # few: those of grids
        number = {key: n for n, key in enumerate(kinds)}
        which = [number[places.tobytes()] for places in listener.places]
        facts = [[listener.branches, len(kinds), len(which)]] if listener.branches else []
        stacked = np.concatenate(list(kinds.values())) if kinds else np.empty((0, 0))
        tables = {
            "lengths": torch.cat([torch.empty(0, dtype=torch.int64), *listener.lengths]),
            "facts": torch.tensor(facts, dtype=torch.int64).reshape(-1, 3),
            "which": torch.tensor(which, dtype=torch.int64),
            "sizes": torch.tensor([len(places) for places in kinds.values()], dtype=torch.int64),
            "places": torch.from_numpy(stacked.astype(np.int64)),
        }
        got = dist.gather_rows(self.ranks, tables)
        if got is None:
            return None
        facts, lengths = got["facts"].tolist(), got["lengths"].numpy()
        found = got["places"].split(got["sizes"].tolist())
        before = [sum(kinds for _, kinds, _ in facts[:rank]) for rank in range(len(facts))]
        offsets = np.repeat(before, [count for *_, count in facts])
        places = [found[n].numpy() for n in got["which"].numpy() + offsets] if len(found) else None
        return Sizes(lengths, facts[0][0], places)

    def write(self, split: Split, resolved: Resolved, notes: dict[str, Any]) -> Path | None:
        """Put the parts together; the path of the file, None if no member has attention. All ranks
        must call it.

        Raises:
            UserError: members with different branches, disk full ...
        """
        dist.barrier(self.ranks)  # all parts are complete

        def put_together() -> Path | None:
            members = [sizes for sizes in self.members if sizes is not None]
            if not members or len(members) < len(self.members):
                return None
            sizes = one_size(members)
            tables = {"ids": np.array(split.ids, object), "bag_ptr": pointers(sizes.lengths)}
            for name, rows in frames_shown(resolved.inputs, split).items():
                if sizes.are_slices and (sizes.lengths == rows.shape[1]).all():
                    tables[name] = rows.ravel()
            with files.atomic_path(self.target) as temporary:
                attributes, kind = model_attributes(resolved, sizes) | notes, resolved.inputs.kind
                self.assemble(temporary, split, sizes, tables, attributes, kind)
            return self.target

        return dist.main_decides(self.ranks, put_together)  # the parts go after it

    def assemble(
        self,
        path: Path,
        split: Split,
        sizes: Sizes,
        tables: dict[str, np.ndarray],
        notes: dict[str, Any],
        kind: str,
    ) -> None:
        """Write the file block by block; `kind` is that of the samples."""
        import h5py

        ptr, shape = tables["bag_ptr"], (int(tables["bag_ptr"][-1]), sizes.branches)
        with h5py.File(path, "w") as file:
            for name, values in tables.items():
                file[name] = values.astype(h5py.string_dtype()) if name == "ids" else values
            for name in ("raw", "attention"):
                file.create_dataset(name, shape, np.float32)
            places = Places(split, sizes, kind)
            scores = [self.read(member, sizes) for member in range(len(self.members))]
            for first, end in bag_blocks(sizes.lengths):
                rows = slice(int(ptr[first]), int(ptr[end]))
                raw = np.stack([next(member) for member in scores])  # (members, m, K)
                starts = ptr[first:end] - ptr[first]
                file["raw"][rows] = raw.mean(0)
                file["attention"][rows] = np.mean([softmax(part, starts) for part in raw], 0)
                places.write(file, first, end, ptr)
            file.attrs.update(notes | ({"coords": places.axes} if "coords" in file else {}))

    def read(self, member: int, sizes: Sizes) -> Iterator[np.ndarray]:
        """Scores (m, K) of the blocks of bags; ranks hold contiguous shards in their order."""
        ranks = iter(range(self.ranks.world))
        left = np.empty((0, sizes.branches), np.float32)
        file: Any = np.zeros((0, sizes.branches), np.float32)
        for first, end in bag_blocks(sizes.lengths):
            wanted = int(sizes.lengths[first:end].sum())
            while len(left) < wanted:
                if not len(file):
                    file = mapped(self.part(member, next(ranks)), sizes.branches)
                take = wanted - len(left)
                left, file = np.concatenate([left, file[:take]]), file[take:]
            yield left[:wanted]
            left = left[wanted:]


def one_size(members: list[Sizes]) -> Sizes:
    """The sizes of all members.

    Raises:
        UserError: one has other branches, so that there is no mean.
    """
    branches = [sizes.branches for sizes in members]
    if len(set(branches)) > 1:
        raise UserError(
            f"the members of the ensemble have {', '.join(map(str, branches))} attention"
            " branches, which have no mean: name members of one kind (sb or mb), or set"
            " infer.attention = false"
        )
    for sizes in members[1:]:
        known, others = (part.places or [] for part in (sizes, members[0]))
        same = np.array_equal(sizes.lengths, members[0].lengths) and len(known) == len(others)
        if not same or not all(map(np.array_equal, known, others)):
            raise UserError(
                "the members of the ensemble weigh different instances (patches of another grid),"
                " which have no mean: name members of one kind, or set infer.attention = false"
            )
    return members[0]


def mapped(path: Path, branches: int) -> np.ndarray:
    """Scores (m, K) of a part, mapped; an empty file cannot be."""
    if not path.stat().st_size:
        return np.empty((0, branches), np.float32)
    return np.memmap(path, np.float32, "r").reshape(-1, branches)


def pointers(lengths: np.ndarray) -> np.ndarray:
    """(B + 1,) positions where bags begin and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def bag_blocks(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """First bag of each block of at most BLOCK instances, but at least one bag, and of the next."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + BLOCK, side="right")))
        yield first, end
        first = end


def softmax(scores: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """exp(a_ik) / sum_j exp(a_jk) over the rows of each bag: (m, K), first rows (b,) -> (m, K)."""
    scores = scores.astype(np.float64)
    counts = np.diff(np.append(starts, len(scores)))
    weights = np.exp(scores - np.repeat(np.maximum.reduceat(scores, starts), counts, axis=0))
    return weights / np.repeat(np.add.reduceat(weights, starts), counts, axis=0)


class Places:
    """Coordinates and names of the instances of a split, where it has some."""

    def __init__(self, split: Split, sizes: Sizes, kind: str) -> None:
        source = split.source
        self.lengths = sizes.lengths
        self.read: Callable[[int], np.ndarray | None] | None = getattr(source, "coords", None)
        self.names: Callable[[int], np.ndarray | None] | None = getattr(
            source, "instance_ids", None
        )
        self.axes = axes_of(source)
        if sizes.places is not None:  # patch tokens, slices or windows
            self.read = sizes.places.__getitem__
            self.axes = token_axes(kind, sizes.places[0].shape[1])

    def write(self, file: Any, first: int, end: int, ptr: np.ndarray) -> None:
        """Coordinates of the bags [first, end) to the dataset coords, names to instance_ids, made
        when the first appear.

        Raises:
            UserError: a bag with other axes than those before.
        """
        self.write_names(file, first, end, ptr)
        if self.read is None:
            return
        for bag in range(first, end):
            coords = self.read(bag)  # (n, 2 or more)
            if coords is None:
                continue
            if "coords" not in file:
                shape = (int(ptr[-1]), coords.shape[1])
                file.create_dataset("coords", shape, np.float64, fillvalue=np.nan)
            if coords.shape != (self.lengths[bag], file["coords"].shape[1]):
                raise UserError(
                    f"bag {file['ids'].asstr()[bag]} has coordinates of shape {coords.shape}, the"
                    f" others {file['coords'].shape[1]} numbers an instance"
                )
            file["coords"][int(ptr[bag]) : int(ptr[bag + 1])] = coords

    def write_names(self, file: Any, first: int, end: int, ptr: np.ndarray) -> None:
        """Names of the instances of the bags [first, end)."""
        if self.names is None:
            return
        for bag in range(first, end):
            names = self.names(bag)
            if names is None:
                return
            if "instance_ids" not in file:
                file.create_dataset("instance_ids", (int(ptr[-1]),), file["ids"].dtype)
            file["instance_ids"][int(ptr[bag]) : int(ptr[bag + 1])] = names


def axes_of(source: Any) -> str:
    """Axes of a source's coordinates; those of extracted tokens their file names."""
    file = getattr(getattr(source, "reader", None), "file", None)
    if file is None or file.attributes.get("output") not in ("tokens", "clips"):
        return "x,y"
    text = file.attributes.get("coords", "")
    axes = text.partition(":")[0]
    return {"window": "x,y,z", "": "row,column"}.get(axes, axes)


def model_attributes(resolved: Resolved, sizes: Sizes) -> dict[str, Any]:
    """Attributes of the file that follow from the model."""
    names = list(resolved.class_names)
    branches = names if sizes.branches == len(names) > 1 else list(map(str, range(sizes.branches)))
    return {
        "dataset": resolved.dataset,
        "subtask": resolved.subtask,
        "class_names": names,
        "branches": [ALL_CLASSES] if sizes.branches == 1 else branches,
    }


# --------------------------------------------------------------------------------- heat maps
#
# The colour of an instance tells its rank in the bag, as CLAM's maps do (Lu et al. 2021), because
# attention itself spans orders of magnitude; on a scale that tells the first tenth and the first
# hundredth apart, because the order of the many without attention is noise. The line below each map
# says how concentrated the attention is. n instances of a bag, K branches.

PANELS = 6  # branches shown
COLUMNS = 3
SIDE = 3.0  # inches of the cell of a map
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
    ratio: float = 1.0
    """Height of an instance over its width."""


# ---------------------------------------------------------------------- which bags


def draw_bags(
    attention: Path,
    folder: Path,
    split: Split,
    predictions: Predictions,
    resolved: Resolved,
    *,
    count: int,
) -> int:
    """Heat maps of at most `count` bags, as <bag>.png in the folder, whose earlier ones go.

    Returns how many were drawn: bags without coordinates are not.

    Args:
        attention: the file that an AttentionWriter wrote of the split.
    """
    import h5py

    for old in folder.glob("*.png"):
        old.unlink()
    with h5py.File(attention, "r") as file:
        chosen = chosen_samples(predictions, resolved.subtask, count) if "coords" in file else []
        bags = [bag_map(file, bag, split, predictions, resolved) for bag in chosen]
    drawn = [bag for bag in bags if np.isfinite(bag.coords).all()]
    for bag in drawn:
        attention_map(bag, folder / f"{file_name(bag.title)}.png")
    return len(drawn)


def chosen_samples(predictions: Predictions, subtask: str, count: int) -> list[int]:
    """Rows of at most `count` samples in ascending order: of classes the first of each, by turns;
    of other targets evenly from the lowest to the highest (of several, the first); without labels
    evenly over the split."""
    samples = len(predictions.ids)
    if not isinstance(predictions, LabelledPredictions):
        order = np.arange(samples)
    elif subtask == "multiclass":
        turns = [np.flatnonzero(predictions.targets == k) for k in np.unique(predictions.targets)]
        turn = np.concatenate([np.arange(len(rows)) for rows in turns])
        order = np.concatenate(turns)[np.argsort(turn, kind="stable")]
        return sorted(order[:count].tolist())
    else:
        order = np.argsort(predictions.targets[:, 0], kind="stable")
    places = np.linspace(0, samples - 1, min(count, samples)).astype(int)
    return sorted(order[places].tolist())


def bag_map(
    file: Any, bag: int, split: Split, predictions: Predictions, resolved: Resolved
) -> BagMap:
    """What the file holds of a bag."""
    rows = slice(*file["bag_ptr"][bag : bag + 2].tolist())
    axes = str(file.attrs["coords"])
    coords = drawn_places(file["coords"][rows], axes)
    scores = predictions.scores.ranked[bag]
    branches = [str(name) for name in file.attrs["branches"]]
    of_classes = len(branches) == len(scores)
    image = None
    if isinstance(resolved.inputs, ImageInputs):
        (pixels,) = split.source.fetch(np.array([bag]))
        image = displayed(pixels, *window(pixels, resolved.inputs.bit_depth))
    ratio = 1.0
    if axes == "row,column" and len(coords):  # patches, which divide a square image evenly
        rows_of_grid, columns_of_grid = coords.max(0) + 1
        coords, ratio = coords[:, ::-1], columns_of_grid / rows_of_grid
    return BagMap(
        title=predictions.ids[bag],
        caption=caption(predictions, bag, resolved),
        coords=coords,
        attention=file["attention"][rows],
        branches=branches,
        order=np.argsort(-scores, kind="stable").tolist() if of_classes else range(len(branches)),
        image=image,
        ratio=float(ratio),
    )


def drawn_places(coords: np.ndarray, axes: str) -> np.ndarray:
    """Where instances are drawn, (n, 2), to the right and down unless they are "row,column"; those
    along one axis stand side by side, and so do grids of rows and columns."""
    if coords.shape[1] == 1 or axes == CLIP_AXES:
        return np.pad(coords[:, :1], ((0, 0), (0, 1)))
    if coords.shape[1] == 3 and axes.endswith(",row,column"):
        grid, row, column = coords.T
        return np.stack([grid * (column.max(initial=0) + 2) + column, row], 1)
    return coords[:, :2]


def caption(predictions: Predictions, bag: int, resolved: Resolved) -> str:
    """Truth and prediction of a bag in words."""
    scores, names = predictions.scores.values[bag], resolved.class_names
    (predicted,) = predictions.scores.of(np.array([bag])).predicted(resolved.subtask)
    targets = predictions.targets if isinstance(predictions, LabelledPredictions) else None
    if resolved.subtask == "multiclass":
        parts = [f"predicted {short(names[predicted], 24)} ({number(float(scores[predicted]))})"]
        truth = [] if targets is None else [f"label {short(names[targets[bag]], 24)}"]
    elif resolved.subtask == "multilabel":
        parts = [f"predicted {label_text(names, predicted)}"]
        truth = [] if targets is None else [f"labels {label_text(names, targets[bag] > 0.5)}"]
    else:
        parts = [f"predicted {target_text(scores)}"]
        truth = [] if targets is None else [f"label {target_text(targets[bag])}"]
    return ", ".join([*truth, *parts])


def target_text(values: np.ndarray) -> str:
    """The first targets of a regression."""
    return listed((number(float(value)) for value in values), 4)


def label_text(names: Sequence[str], chosen: np.ndarray) -> str:
    """Names of the chosen labels; a dash where there are none."""
    found = [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]
    return listed(found) if found else "–"


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
    # square cells, of which the layout keeps what the maps take
    size = (SIDE * columns + 1.2, SIDE * rows + 0.5)
    with drawing(path, *size) as figure:
        figure.set_layout_engine("compressed", h_pad=0.08, w_pad=0.08)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in axes[panels:]:
            spare.set_axis_off()
        if bag.image is not None:
            axes[0].imshow(bag.image, interpolation="nearest")
            axes[0].set_title("image")
            bare(axes[0])
        drawn = axes[panels - len(shown) : panels]
        for place, k in zip(drawn, shown, strict=True):
            tiles = draw_branch(place, bag.coords, side, bag.attention[:, k])
            place.set_aspect(bag.ratio)
            place.set_title(short(bag.branches[k], 40))
        wide, high = np.ptp(bag.coords, axis=0) + side
        beside = {"location": "right", "shrink": 0.7, "aspect": 30}
        if columns * wide > rows * high * bag.ratio:  # a flat page has no room for it at its side
            beside = {"location": "bottom", "shrink": 0.9, "aspect": 45}
        bar = figure.colorbar(tiles, ax=axes, ticks=-np.log10(MARKED), **beside)
        bar.outline.set_visible(False)
        bar.set_ticklabels([f"{100 * share:g} %" for share in MARKED])
        bar.ax.tick_params(length=0, labelsize=7)
        bar.set_label("rank by attention: top ... of the bag")
        figure.suptitle(f"{short(bag.title, 60)}   {bag.caption}".rstrip())


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
    below = {"xytext": (0, -5), "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate(
        concentration(attention),
        (0.5, 0),
        xycoords="axes fraction",
        color=GREY,
        fontsize=7.5,
        **below,
    )
    return tiles


def draw_tiles(
    axes: Any, coords: np.ndarray, values: np.ndarray, side: float, colours: dict[str, Any]
) -> Any:
    """Squares at exact places, in the order given."""
    from matplotlib.collections import PolyCollection

    corners = side * np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    places = coords[:, None] + corners  # (n, 4, 2)
    # without antialiasing, which would draw seams between neighbours
    tiles = PolyCollection(
        places,  # type: ignore[arg-type]  # an array is what it draws fastest
        array=values,
        linewidths=0,
        antialiaseds=False,
        **colours,
    )
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
