"""Attention of every instance of a split, written to HDF5 beside the predictions.

Scores are taken from the passes that make the predictions, go to a file of each rank and member as
they come, and are put together at the end, so that no more than a block of them is in memory.

The file, for B bags of M instances in all:

- attention (M, K) float32: softmax over the instances of a bag, per branch; 1 in sum
- raw (M, K) float32: the same before the softmax
- ids (B,), bag_ptr (B + 1,): instances bag_ptr[b]..bag_ptr[b + 1] are bag b, in the order of the
  feature file
- coords (M, 2 or more) float64, where there are some; NaN in bags without them
- instance_ids (M,), where the feature file has them: which tile an instance is
- attributes: class_names, branches (what the K columns are), coords (their axes), checkpoints ...

Of an ensemble both are means over its members. B bags, M instances, K branches, W ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from glovita_lib import dist, files
from glovita_lib.bags import as_bags
from glovita_lib.datasets import Split
from glovita_lib.extraction import grid_places
from glovita_lib.facts import Facts
from glovita_lib.layers import Features
from glovita_lib.spec import UserError

BLOCK = 2**18  # instances that are put together at once
ALL_CLASSES = "all classes"  # the branch of a head that has only one


def pays_attention(head: nn.Module) -> bool:
    """Whether a head has attention: its method attention(inputs) gives raw scores and softmax."""
    return hasattr(head, "attention")


class Listener:
    """Writes the raw scores of all bags that pass a head to a file, and notes their sizes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.lengths: list[torch.Tensor] = []  # (b,) each
        self.branches = 0
        self.grid: tuple[int, ...] | None = None  # of tokens

    def __call__(self, head: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook. Heads that return their scores are not asked a second time."""
        known = isinstance(output, dict) and "scores" in output
        scores = output["scores"] if known else head.attention(inputs[0])[0]  # (m, K)
        self.branches = scores.shape[1]
        self.lengths.append(as_bags(inputs[0]).lengths)
        if isinstance(inputs[0], Features):
            self.grid = inputs[0].grid
        try:
            self.file.write(scores.float().cpu().numpy().tobytes())
        except OSError as error:
            raise files.write_error(self.file.name, error) from None


@dataclass(frozen=True)
class Sizes:
    """What all ranks have heard."""

    lengths: np.ndarray  # (B,) int64
    branches: int
    grid: tuple[int, ...] | None


class Recorder:
    """The attention of the members of an ensemble, or of a single model, to one file."""

    def __init__(self, target: Path, ranks: dist.Ranks, *, wanted: bool) -> None:
        self.target, self.ranks, self.wanted = target, ranks, wanted
        self.folder = target.with_name(f"{target.name}.parts")
        self.members: list[Sizes | None] = []  # None: a head without attention, or not rank 0
        self.own: list[Path] = []

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.own:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # the last rank finds it empty
            self.folder.rmdir()

    def listening(self, head: nn.Module) -> Any:
        """Context in which the passes of a head over its shard of the split are written down."""
        if self.wanted and pays_attention(head):
            return self._listening(head)
        self.members.append(None)
        return nullcontext()

    @contextmanager
    def _listening(self, head: nn.Module) -> Iterator[None]:
        path = self.part(len(self.members), self.ranks.rank)
        files.make_folder(self.folder)
        self.own.append(path)
        with open(path, "wb") as file:
            listener = Listener(file)
            handle = head.register_forward_hook(listener)
            try:
                yield
            finally:
                handle.remove()
        self.members.append(self.gathered(listener))

    def part(self, member: int, rank: int) -> Path:
        """File of a member's scores on a rank: (m, K) float32."""
        return self.folder / f"{member:03d}-{rank:05d}.f32"

    def gathered(self, listener: Listener) -> Sizes | None:
        """Sizes on the first rank, None on the others; a rank without bags knows no branches."""
        numbers = [listener.branches, *(listener.grid or ())]
        lengths = torch.cat([torch.empty(0, dtype=torch.int64), *listener.lengths])
        shape = torch.tensor([numbers] if listener.branches else [], dtype=torch.int64)
        got = dist.gather_rows(self.ranks, {"lengths": lengths, "shape": shape})
        if got is None:
            return None
        branches, *grid = got["shape"][0].tolist()
        return Sizes(got["lengths"].numpy(), branches, tuple(grid) or None)

    def write(self, split: Split, facts: Facts, notes: dict[str, Any]) -> Path | None:
        """Put the parts together; the path of the file, None if no member has attention. All ranks
        must call it.

        Raises:
            UserError: members with different branches, disk full ...
        """
        dist.barrier(self.ranks)  # all parts are complete

        def put_together() -> Path | None:
            if not self.members or not all(self.members):
                return None
            sizes = self.one_size()
            tables = {"ids": np.array(split.ids, object), "bag_ptr": pointers(sizes.lengths)}
            with files.atomic_path(self.target) as temporary:
                self.assemble(temporary, split, sizes, tables, described(facts, sizes) | notes)
            return self.target

        return dist.main_decides(self.ranks, put_together)  # the parts go after it

    def one_size(self) -> Sizes:
        """The sizes of all members.

        Raises:
            UserError: one has other branches, so that there is no mean.
        """
        branches = [sizes.branches for sizes in self.members]
        if len(set(branches)) > 1:
            raise UserError(
                f"the members of the ensemble have {', '.join(map(str, branches))} attention"
                " branches, which have no mean: name members of one kind (sb or mb), or set"
                " infer.attention = false"
            )
        return self.members[0]

    def assemble(
        self,
        path: Path,
        split: Split,
        sizes: Sizes,
        tables: dict[str, np.ndarray],
        notes: dict[str, Any],
    ) -> None:
        """Write the file block by block."""
        import h5py

        ptr, shape = tables["bag_ptr"], (int(tables["bag_ptr"][-1]), sizes.branches)
        with h5py.File(path, "w") as file:
            for name, values in tables.items():
                file[name] = values.astype(h5py.string_dtype()) if name == "ids" else values
            for name in ("raw", "attention"):
                file.create_dataset(name, shape, np.float32)
            places = Places(split, sizes)
            scores = [self.read(member, sizes) for member in range(len(self.members))]
            for first, end in blocks(sizes.lengths):
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
        for first, end in blocks(sizes.lengths):
            wanted = int(sizes.lengths[first:end].sum())
            while len(left) < wanted:
                if not len(file):
                    file = mapped(self.part(member, next(ranks)), sizes.branches)
                take = wanted - len(left)
                left, file = np.concatenate([left, file[:take]]), file[take:]
            yield left[:wanted]
            left = left[wanted:]


def mapped(path: Path, branches: int) -> np.ndarray:
    """Scores (m, K) of a part, mapped; an empty file cannot be."""
    if not path.stat().st_size:
        return np.empty((0, branches), np.float32)
    return np.memmap(path, np.float32, "r").reshape(-1, branches)


def pointers(lengths: np.ndarray) -> np.ndarray:
    """(B + 1,) positions where bags begin and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def blocks(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
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

    def __init__(self, split: Split, sizes: Sizes) -> None:
        source = split.source
        self.lengths = sizes.lengths
        self.read = getattr(source, "coords", None)
        self.names = getattr(source, "instance_ids", None)
        self.axes = axes_of(source)
        if sizes.grid is not None:  # patch tokens of images
            places = grid_places(sizes.grid, 0, int(sizes.lengths[0]))
            self.read, self.axes = (lambda row: places), "row,column"

    def write(self, file: Any, first: int, end: int, ptr: np.ndarray) -> None:
        """Coordinates of the bags [first, end) to the dataset coords, names to instance_ids, made
        when the first appear.

        Raises:
            UserError: a bag with other axes than those before.
        """
        self.write_names(file, first, end, ptr)
        for bag in range(first, end if self.read is not None else first):
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
        for bag in range(first, end if self.names is not None else first):
            names = self.names(bag)
            if names is None:
                return
            if "instance_ids" not in file:
                file.create_dataset("instance_ids", (int(ptr[-1]),), file["ids"].dtype)
            file["instance_ids"][int(ptr[bag]) : int(ptr[bag + 1])] = names


def axes_of(source: Any) -> str:
    """Axes of a source's coordinates; extracted tokens have rows and columns of their grid."""
    file = getattr(getattr(source, "reader", None), "file", None)
    tokens = file is not None and file.attributes.get("output") == "tokens"
    return "row,column" if tokens else "x,y"


def described(facts: Facts, sizes: Sizes) -> dict[str, Any]:
    """Attributes of the file that follow from the model."""
    names = list(facts.class_names)
    branches = names if sizes.branches == len(names) > 1 else list(map(str, range(sizes.branches)))
    return {
        "dataset": facts.dataset,
        "subtask": facts.subtask,
        "class_names": names,
        "branches": [ALL_CLASSES] if sizes.branches == 1 else branches,
    }
