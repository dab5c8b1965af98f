"""Geometry of a volume: where the patch that the encoder receives comes from.

B batch, C channels, X Y Z voxels, N voxels along one axis.

A patch is cut where a volume is read, with a margin where it will be turned. Rotation, scale,
elastic deformation, quarter turns, exchanged axes and mirroring are one map from the voxels of the
patch to those of the source, o -> A P (o + u(o)), and so one interpolation, linear along each axis;
where a map leads from voxels to voxels nothing is interpolated.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.augment_images import to

Size = tuple[int, int, int]

SAME_SPACING = 0.05  # relative difference of spacings up to which axes may be exchanged
SLAB = 2**17  # voxels of the patch interpolated at a time on a CPU: what stays in its cache


# ------------------------------------------------------------------------------ the cut of a patch


class PatchCut:
    """Cuts patches out of volumes where they are read; what lies outside a volume is filled.

    Picklable: workers use it per sample.
    """

    one_size = True

    def __init__(
        self,
        crop: str,
        foreground_share: float,
        size: Size,
        margin: Size = (0, 0, 0),
        spaced: bool = False,
    ) -> None:
        """Patches.

        Args:
            crop: as in VolumeOps, and foreground_share.
            size: of the patches, voxels.
            margin: voxels that are cut beyond a patch on either side of each axis. It is the patch
                that lies within the volume: its margin may reach beyond, and is filled there.
            spaced: whether patches come with the spacing of their volumes.
        """
        self.crop, self.foreground_share, self.size = crop, foreground_share, size
        self.margin, self.spaced = margin, spaced

    def join(self, parts: list[Tensor], samples: Sequence[Any]) -> "Tensor | Patches":
        """The patches of a batch, (B, C, *size)."""
        spacing = spacings(samples) if self.spaced else None
        return torch.stack(parts) if spacing is None else Patches(torch.stack(parts), spacing)

    def boxes(self, sizes: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Places of the patches of a batch.

        Args:
            sizes: (B, 3) voxels of each volume.
            generator: CPU generator of random places; unused (may be None) for the centre.

        Returns:
            (B, 4) float64: first voxel of the patch along each axis, which is negative where the
            volume is smaller than the patch and then centred in it; and which point of the
            foreground is to be in the middle instead, 0 to 1, or -1 for none.
        """
        room = torch.as_tensor(np.asarray(sizes).reshape(-1, 3)).double()
        room -= torch.tensor(self.size)  # (B, 3)
        start = (room / 2).floor()
        point = torch.full((len(room), 1), -1.0, dtype=torch.float64)
        if self.crop != "center":
            draws = torch.rand(room.shape, generator=generator, dtype=torch.float64)
            start = torch.where(room > 0, (draws * (room + 1)).floor(), start)
        if self.crop == "foreground":
            draws = torch.rand(2, len(room), 1, generator=generator, dtype=torch.float64)
            point = torch.where(draws[0] < self.foreground_share, draws[1], point)
        return torch.cat([start, point], 1)

    def one(self, sample: Any, box: Tensor) -> Tensor:
        """One sample in a worker: only the patch and its margin are read.

        Args:
            sample: what is sliced as (C, X, Y, Z), with `fill` (C,) and `foreground` (K, 3) voxels;
                an array has none and is filled with the minimum of each channel.
            box: (4,) of `boxes`.

        Returns:
            (C, *(size + 2 margin)) in the type of the sample, the patch in its middle.
        """
        starts = [
            at - beyond for at, beyond in zip(self.start(sample, box), self.margin, strict=True)
        ]
        size = tuple(side + 2 * beyond for side, beyond in zip(self.size, self.margin, strict=True))
        source, target = overlap(starts, size, sample.shape[1:])
        part = np.asarray(sample[(slice(None), *source)])
        if part.shape[1:] == size:
            return torch.from_numpy(np.require(part, requirements=["C", "W"]))
        fill = sample.min((1, 2, 3)) if isinstance(sample, np.ndarray) else sample.fill
        patch = np.empty((len(part), *size), part.dtype)
        patch[:] = np.asarray(fill)[:, None, None, None]
        patch[(slice(None), *target)] = part
        return torch.from_numpy(patch)

    def start(self, sample: Any, box: Tensor) -> list[int]:
        """First voxel of the patch along each axis."""
        *starts, point = box.tolist()
        foreground = () if isinstance(sample, np.ndarray) else sample.foreground
        if point < 0 or not len(foreground):
            return [int(start) for start in starts]
        middle = foreground[min(int(point * len(foreground)), len(foreground) - 1)]
        places = zip(middle, self.size, sample.shape[1:], starts, strict=True)
        return [
            min(max(int(voxel) - size // 2, 0), have - size) if have > size else int(start)
            for voxel, size, have, start in places
        ]


def held_axes(size: Size, thick: int | None, flat: int | None) -> list[int]:
    """The axes of a patch across which nothing is turned, scaled or deformed: thick ones, flat ones
    and those of one voxel, beside which a turned patch would show its fill alone."""
    return [axis for axis in range(3) if axis in (thick, flat) or size[axis] == 1]


def reach(
    size: Size,
    spacing: tuple[float, float, float],
    held: Sequence[int],
    *,
    angle: float,
    factor: float,
    shift: float,
    available: Size | None,
) -> Size:
    """Voxels that a patch shows beyond itself on either side of each axis, at most.

    As in nnU-Net's get_patch_size it is turned about one axis at a time, of which the corners reach
    furthest, and then scaled: (L cos t + M sin t) factor of sides L and M in mm, with the angle t
    of the most. Half the patch is the most that is taken, which is eight times its voxels.

    Args:
        held: axes across which nothing is done, see held_axes.
        angle: largest about each axis, radians.
        factor: largest of what is shown, 1 or more.
        shift: largest of an elastic deformation, share of the side.
        available: the most voxels of a volume along each axis, beyond which there is nothing but,
            where the volume goes on along another axis, one voxel of its fill.
    """
    moved = [a for a in range(3) if a not in held]
    length = [side * step for side, step in zip(size, spacing, strict=True)]  # mm
    length = [each * (1 + 2 * shift * (a in moved)) for a, each in enumerate(length)]
    found = [0, 0, 0]
    for a in moved:
        turns = ((length[b], min(angle, math.atan2(length[b], length[a]))) for b in moved if b != a)
        turned = [length[a] * math.cos(t) + other * math.sin(t) for other, t in turns]
        extent = factor * max([length[a], *turned])
        wanted = math.ceil((extent / spacing[a] - size[a]) / 2 - 1e-6)
        found[a] = min(wanted, math.ceil(size[a] / 2))
    if available is not None:
        room = [have - side for have, side in zip(available, size, strict=True)]
        one = int(max(room) > 0)
        found = [min(n, max(0, left) + one) for n, left in zip(found, room, strict=True)]
    return found[0], found[1], found[2]


def overlap(
    starts: Sequence[int], size: Sequence[int], have: Sequence[int]
) -> tuple[list[slice], list[slice]]:
    """Of a window of `size` from `starts` on, what lies inside `have` voxels: the slices of the
    volume and those of the window."""
    source, target = [], []
    for start, want, there in zip(starts, size, have, strict=True):
        first, end = max(0, start), max(0, start, min(there, start + want))
        source.append(slice(first, end))
        target.append(slice(first - start, end - start))
    return source, target


# --------------------------------------------------------------------- whole volumes and windows


def spacings(samples: Sequence[Any]) -> Tensor | None:
    """Spacings (B, 3) of volumes, float64, mm; None of arrays, which have none."""
    if any(isinstance(sample, np.ndarray) for sample in samples):
        return None
    return torch.tensor([sample.spacing for sample in samples], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Patches:
    """A batch of patches with the spacings of their volumes, which stay on the CPU."""

    voxels: Tensor  # (B, C, X, Y, Z)
    spacing: Tensor  # (B, 3) float64, mm

    def __len__(self) -> int:
        return len(self.voxels)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Patches":
        """The same patches on a device."""
        return Patches(self.voxels.to(device, non_blocking=non_blocking), self.spacing)

    def pin_memory(self) -> "Patches":
        """The same patches in page-locked memory."""
        return Patches(self.voxels.pin_memory(), self.spacing)


@dataclass(frozen=True, eq=False)
class Volumes:
    """A batch of volumes, each of its own size."""

    each: tuple[Tensor, ...]  # (C, X, Y, Z)
    spacing: Tensor | None = None  # (B, 3) float64, mm, on the CPU, where it is asked for and known

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.each)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Volumes":
        """The same volumes on a device."""
        each = tuple(volume.to(device, non_blocking=non_blocking) for volume in self)
        return Volumes(each, self.spacing)

    def pin_memory(self) -> "Volumes":
        """The same volumes in page-locked memory."""
        return Volumes(tuple(volume.pin_memory() for volume in self), self.spacing)


class WholeVolumes:
    """Takes volumes as they are where they are read, see PatchCut."""

    one_size = False

    def __init__(self, spaced: bool = False) -> None:
        """Volumes, with their spacings or without, see PatchCut."""
        self.spaced = spaced

    def join(self, parts: list[Tensor], samples: Sequence[Any]) -> Volumes:
        """The volumes of a batch."""
        return Volumes(tuple(parts), spacings(samples) if self.spaced else None)

    def boxes(self, sizes: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """First voxel of each volume, (B, 3)."""
        return torch.zeros(len(sizes), 3)

    def one(self, sample: Any, box: Tensor) -> Tensor:
        """A whole volume (C, X, Y, Z) in the type of the sample."""
        voxels = np.asarray(sample[(slice(None),) * 4])
        return torch.from_numpy(np.require(voxels, requirements=["C", "W"]))


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """Windows that cover volumes of any size."""

    size: Size
    stride: Size

    @classmethod
    def overlapping(cls, size: Size, overlap: float) -> "WindowGrid":
        """Windows that have a share of their side in common with the next."""
        x, y, z = (max(1, round(side * (1 - overlap))) for side in size)
        return cls(size, (x, y, z))

    def starts(self, have: Sequence[int]) -> np.ndarray:
        """First voxels (N, 3) of the windows of a volume, in the order of its axes: a stride apart,
        the last of an axis ends with the volume. On an axis that is shorter than a window, one
        begins before the volume, which is in its middle, as PatchCut has it."""
        axes = []
        for there, side, step in zip(have, self.size, self.stride, strict=True):
            room = there - side
            axes.append([*range(0, room, step), room] if room > 0 else [room // 2])
        return np.array([*product(*axes)], np.int64).reshape(-1, 3)

    def count(self, have: Sequence[int]) -> int:
        """Number of the windows of a volume."""
        rooms = [there - side for there, side in zip(have, self.size, strict=True)]
        return math.prod(
            1 + -(-max(0, room) // step) for room, step in zip(rooms, self.stride, strict=True)
        )

    def cut(self, volume: Tensor, starts: Sequence[int]) -> Tensor:
        """A window (C, *size) of a volume (C, X, Y, Z); outside is the minimum of its channel."""
        return window(volume, starts, self.size)


@dataclass(frozen=True, eq=False)
class WindowedVolumes:
    """Volumes that reach a network window by window: `reduced` is asked instead of the network."""

    volumes: Volumes
    grid: WindowGrid
    how: str  # what becomes of the windows' answers: mean or max
    chunk: int  # windows that are asked at once
    told: "Callable[[list[Tensor], list[np.ndarray]], None] | None" = None
    """Receives the answers (N, K) of the windows of every volume, and where these begin, (N, 3)."""

    def __len__(self) -> int:
        return len(self.volumes)

    def reduced(self, function: Callable[[Tensor], Tensor], how: str | None = None) -> Tensor:
        """Mean or maximum over the windows of each volume of what a function gives, (B, K).

        Args:
            function: windows (m, C, *size) -> (m, K).
            how: mean or max; none as the volumes are to be; only then `told` hears of it.
        """
        starts = [self.grid.starts(volume.shape[1:]) for volume in self.volumes]
        wanted = [(row, place) for row, places in enumerate(starts) for place in places.tolist()]
        answers = []
        for first in range(0, len(wanted), self.chunk):
            chosen = wanted[first : first + self.chunk]
            windows = [self.grid.cut(self.volumes.each[row], place) for row, place in chosen]
            found = function(torch.stack(windows))
            answers.append(found.float() if found.dtype.itemsize < 4 else found)
        each = list(torch.cat(answers).split([len(places) for places in starts]))
        if how is None and self.told is not None:
            self.told(each, starts)
        if (how or self.how) == "max":
            return torch.stack([part.amax(0) for part in each])
        return torch.stack([part.mean(0) for part in each])


# -------------------------------------------------------------------------------------- geometry


class Scratch(threading.local):
    """Memory of a thread on the CPU that is used again and again: to ask the system for it takes
    as long as to fill it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def __call__(self, *shape: int) -> Tensor:
        """A float32 tensor of any content, which lasts until the next call."""
        count = math.prod(shape)
        if self.memory.numel() < count:
            self.memory = torch.empty(count)
        return self.memory[:count].view(shape)


FRAME, SLABS = Scratch(), Scratch()


@dataclass(frozen=True, slots=True)
class Grid:
    """The patch and what may be done to its axes."""

    size: Size
    spacing: tuple[float, float, float]
    thick: int | None
    mirrors: tuple[int, ...]
    flat: int | None = None

    @property
    def held(self) -> list[int]:
        """The axes across which nothing is turned, scaled or deformed."""
        return held_axes(self.size, self.thick, self.flat)

    @property
    def equal(self) -> list[int]:
        """The axes that may be exchanged: the most that are as long, in voxels and mm.

        To exchange two axes is to mirror, and so are quarter turns together with a mirrored axis:
        only those along which a policy may mirror are among them."""
        groups = [[b for b in range(3) if self.alike(a, b)] for a in range(3) if a != self.thick]
        return max(groups, key=len)

    def alike(self, a: int, b: int) -> bool:
        """Whether two axes may be exchanged."""
        same = abs(self.spacing[a] / self.spacing[b] - 1) <= SAME_SPACING
        free = self.thick not in (a, b) and {a, b}.issubset(self.mirrors)
        return free and self.size[a] == self.size[b] and same


@dataclass(slots=True)
class Placement:
    """Where the voxels of each patch come from: o -> matrix turn (o + u(o)), both around their
    centres, in voxels."""

    grid: Grid
    room: np.ndarray  # (B, 3) voxels of the source beyond the patch
    start: Tensor  # (B, 3) int64, of the patch that nothing moves
    matrices: Tensor  # (B, 3, 3) float64, interpolated
    turns: Tensor  # (B, 3, 3) float64, signed permutations
    spacing: Tensor  # (B, 3) float64, of each volume, mm
    control: Tensor | None = None  # (B, 3, K, K, K) shifts u of control points, voxels

    @classmethod
    def centred(
        cls, grid: Grid, count: int, have: Sequence[int], spacing: Tensor | None = None
    ) -> "Placement":
        """Patches in the middle of `count` volumes of a size; their spacing is that of the grid
        unless it is given, (B, 3)."""
        room = np.tile(np.array(have) - np.array(grid.size), (count, 1))
        eye = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
        if spacing is None:
            spacing = torch.tensor(grid.spacing, dtype=torch.float64).expand(count, 3)
        return cls(grid, room, torch.from_numpy(room // 2), eye, eye.clone(), spacing)

    def equal(self, row: int) -> list[int]:
        """The axes of a volume that may be exchanged, see Grid."""
        x, y, z = self.spacing[row].tolist()
        return replace(self.grid, spacing=(x, y, z)).equal


def moved(volumes: Tensor, place: Placement) -> Tensor:
    """The patches of volumes (B, C, X, Y, Z): (B, C, *size) float32, fresh."""
    out = torch.empty(
        *volumes.shape[:2], *place.grid.size, dtype=torch.float32, device=volumes.device
    )
    eye = torch.eye(3, dtype=torch.float64)
    for row, volume in enumerate(volumes):
        matrix, turn = place.matrices[row], place.turns[row]
        control = None if place.control is None else place.control[row]
        if control is not None and not control.any():
            control = None
        if control is None and torch.equal(matrix, eye):
            out[row] = turned(window(volume, place.start[row].tolist(), place.grid.size), turn)
        else:
            source = Affine.centred(matrix @ turn, place.start[row].tolist(), place.grid.size)
            source.sample(volume, control, place.grid.thick, out[row])
    return out


def window(volume: Tensor, starts: Sequence[int], size: Size) -> Tensor:
    """Part of a volume (C, X, Y, Z), the minimum of each channel outside."""
    source, target = overlap(starts, size, volume.shape[1:])
    part = volume[(slice(None), *source)]
    if part.shape[1:] == size:
        return part
    patch = volume.amin((1, 2, 3))[:, None, None, None].repeat(1, *size)
    patch[(slice(None), *target)] = part
    return patch


def turned(volume: Tensor, turn: Tensor) -> Tensor:
    """A volume (C, X, Y, Z) with axes exchanged and backwards, by a signed permutation (3, 3)."""
    order = turn.abs().argmax(0).tolist()  # of the axis o the axis of the source
    flips = [axis + 1 for axis in range(3) if turn[order[axis], axis] < 0]
    volume = volume.permute(0, *(axis + 1 for axis in order))
    return volume.flip(flips) if flips else volume


@dataclass(frozen=True, slots=True)
class Affine:
    """Coordinates in the source of the voxels o of a patch: offset + matrix o, voxels."""

    matrix: Tensor  # (3, 3) float64
    offset: Tensor  # (3,) float64
    size: Size

    @classmethod
    def centred(cls, matrix: Tensor, starts: Sequence[int], size: Size) -> "Affine":
        """A matrix about the centre of the patch that starts at a voxel of the source."""
        middle = (torch.tensor(size, dtype=torch.float64) - 1) / 2
        return cls(matrix, torch.tensor(starts) + middle - matrix @ middle, size)

    def sample(
        self, volume: Tensor, control: Tensor | None, thick: int | None, out: Tensor
    ) -> None:
        """A volume (C, X, Y, Z) there, linear; outside is the minimum of its channel.

        Args:
            control: (3, K, K, K) of an elastic deformation.
            thick: axis along which coordinates are whole numbers.
            out: (C, *size) float32, is written.
        """
        padded = framed(volume)
        if control is None and bool((self.matrix.abs() > 1e-12).sum(1).eq(1).all()):
            self.along_axes(padded, out)
        elif thick is not None:
            out.copy_(self.in_planes(padded, control, thick))
        elif volume.device.type == "cpu":
            self.by_corners(padded, control, out)
        else:
            out.copy_(self.by_grid(padded, control))

    def lines(self) -> list[Tensor]:
        """What the voxels along each axis of the patch add to the three coordinates in the frame of
        `framed`: three of (3, N) float32."""
        columns = zip(self.size, self.matrix.unbind(1), strict=True)
        found = [column[:, None] * torch.arange(side) for side, column in columns]
        found[2] += self.offset[:, None] + 1
        return [each.float() for each in found]

    def coordinates(self, control: Tensor | None, device: torch.device) -> list[Tensor]:
        """Parts whose sum is the coordinates (3, X, Y, Z) of the patch in the frame of `framed`:
        (3, X, 1, 1) and (3, 1, Y, Z), and (3, X, Y, Z) of an elastic deformation."""
        x, y, z = to(device, *self.lines())
        found = [x[:, :, None, None], (y[:, :, None] + z[:, None])[:, None]]
        if control is not None:
            (matrix,) = to(device, self.matrix.float())
            found.append(torch.tensordot(matrix, spline(control.to(device), self.size), 1))
        return found

    def along_axes(self, padded: Tensor, out: Tensor) -> None:
        """One axis after the other, where each axis of the patch runs along one of the source; what
        lies outside of it is only filled."""
        order = self.matrix.abs().argmax(1).tolist()  # axis of the patch along each of the source
        out = out.permute(0, *(of + 1 for of in order))
        each, inside = [], [slice(None)]
        for axis, of in enumerate(order):
            last = padded.shape[axis + 1] - 1
            places = self.matrix[axis, of] * torch.arange(self.size[of]) + self.offset[axis] + 1
            there = ((places > 0) & (places < last)).nonzero()[:, 0].tolist() or [0]
            inside.append(slice(there[0], there[-1] + 1))
            each.append(cells(places[inside[-1]], last + 1))
        target = out[tuple(inside)]
        if target.numel() < out.numel():
            out.copy_(padded[:, :1, :1, :1].expand_as(out))
        (low, weight), *others = each
        step = max(1, SLAB // target[0, 0].numel()) if out.device.type == "cpu" else len(low)
        for first in range(0, len(low), step):
            rows = slice(first, first + step)
            part = between(padded, low[rows], weight[rows], 1)
            for axis, other in enumerate(others, 2):
                part = between(part, *other, axis)
            target[:, rows] = part

    def in_planes(self, padded: Tensor, control: Tensor | None, thick: int) -> Tensor:
        """Slice by slice: the same plane map in each, slices as channels of pictures."""
        a, b = (axis for axis in range(3) if axis != thick)
        backwards = bool(self.matrix[thick, thick] < 0)
        last = self.size[thick] - 1
        first = int(torch.round(self.offset[thick])) - last * backwards + 1  # in the frame
        rows = torch.arange(first, first + last + 1).clamp(0, padded.shape[thick + 1] - 1)
        rows = rows.flip(0) if backwards else rows
        slices = padded.index_select(thick + 1, rows.to(padded.device)).movedim(thick + 1, 1)
        pictures = slices.flatten(0, 1)[None]  # (1, C N, A, B)
        plane = summed(self.coordinates(control, padded.device)).select(thick + 1, 0)
        grid = torch.stack(
            [unit(plane[b], pictures.shape[3]), unit(plane[a], pictures.shape[2])], -1
        )
        found = F.grid_sample(pictures, grid[None], padding_mode="border", align_corners=True)
        return found[0].unflatten(0, slices.shape[:2]).movedim(1, thick + 1)

    def by_grid(self, padded: Tensor, control: Tensor | None) -> Tensor:
        """By torch's interpolation in three dimensions."""
        places = summed(self.coordinates(control, padded.device))
        units = [unit(*each) for each in zip(places, padded.shape[1:], strict=True)]
        grid = torch.stack(units[::-1], -1)[None]
        return F.grid_sample(padded[None], grid, padding_mode="border", align_corners=True)[0]

    def by_corners(self, padded: Tensor, control: Tensor | None, out: Tensor) -> None:
        """The eight corners of the cell around each place gathered, then mixed axis by axis.

        A CPU gathers from a line with vector instructions, and torch's interpolation of volumes
        goes voxel by voxel: five times as long (measured).
        """
        sides = padded.shape[1:]
        strides = (sides[1] * sides[2], sides[2], 1)
        x, plane, *shifts = self.coordinates(control, padded.device)
        # the last cell ends just before the last voxel, which then has no weight that counts
        ends = torch.tensor(
            [float(np.nextafter(np.float32(side - 1), np.float32(0))) for side in sides]
        )
        ends = ends[:, None, None, None]
        area = self.size[1] * self.size[2]
        step = min(max(1, SLAB // area), self.size[0])
        work = SLABS(9, step * area)
        for first in range(0, self.size[0], step):
            rows = slice(first, first + step)
            weights, cells, spare = work[:, : x[0, rows].numel() * area].split(3)
            place = weights.view(3, -1, *self.size[1:])
            torch.add(x[:, rows], plane, out=place)
            for shift in shifts:
                place.add_(shift[:, rows])
            torch.minimum(place.clamp_(min=0), ends, out=place)
            cells = cells.view(torch.int32)
            cells.copy_(weights)
            weights.frac_()
            index = cells[2].add_(cells[1], alpha=strides[1]).add_(cells[0], alpha=strides[0])
            for channel, target in zip(padded, out, strict=True):
                line, values = channel.view(-1), target[rows].view(-1)
                corners(line, index, strides, weights.unbind(), values, spare.unbind())


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of parts of coordinates, (X, Y, Z)."""
    found = parts[0] + parts[1]
    return found.add_(parts[2]) if len(parts) > 2 else found


def corners(
    line: Tensor,
    index: Tensor,
    strides: Sequence[int],
    weights: Sequence[Tensor],
    out: Tensor,
    spare: Sequence[Tensor],
) -> Tensor:
    """Values between those of a line at index (n,) and one stride on, along each axis in turn.

    Args:
        spare: as many (n,) to work in as there are axes.
    """
    if not strides:
        return torch.index_select(line, 0, index, out=out)
    beyond = line[strides[0] :]
    low = corners(line, index, strides[1:], weights[1:], out, spare[1:])
    high = corners(beyond, index, strides[1:], weights[1:], spare[0], spare[1:])
    return torch.lerp(low, high, weights[0], out=out)


def unit(places: Tensor, side: int) -> Tensor:
    """Coordinates of voxels as -1 to 1 between the centres of the first and the last."""
    return places * (2 / max(side - 1, 1)) - 1


def framed(volume: Tensor) -> Tensor:
    """A volume (C, X, Y, Z) as float32 in a frame one voxel wide of the minimum of each channel; on
    a CPU in memory that the next call uses again."""
    shape = len(volume), *(side + 2 for side in volume.shape[1:])
    on_cpu = volume.device.type == "cpu"
    padded = FRAME(*shape) if on_cpu else volume.new_empty(shape, dtype=torch.float32)
    padded[:, 1:-1, 1:-1, 1:-1] = volume
    low = volume.amin((1, 2, 3))[:, None, None]
    for axis in (1, 2, 3):
        for end in (0, -1):
            padded.select(axis, end)[:] = low
    return padded


def interpolated(x: Tensor, places: Tensor, axis: int) -> Tensor:
    """x at coordinates (N,) along one axis, linear; beyond the first and the last as there."""
    return between(x, *cells(places, x.shape[axis]), axis)


def cells(places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates (N,) along an axis of `side` voxels as the voxel below, (N,) int64, and the
    weight of the next one, (N,) float32; beyond the first and the last as there."""
    places = places.double().clamp(0, side - 1)
    low = places.floor().clamp(max=max(side - 2, 0))
    return low.long(), (places - low).float()


def between(x: Tensor, low: Tensor, weight: Tensor, axis: int) -> Tensor:
    """x along one axis between the voxels low and low + 1 (N,), with the weight (N,) of these."""
    if not weight.any():
        return picked(x, low, axis)
    (weight,) = to(x.device, weight.view(-1, *[1] * (x.dim() - 1 - axis)))
    if by_value(x, axis):
        line, index = x.contiguous().view(-1), in_line(x, low)
        shape = [*x.shape[:-1], len(low)]
        below = line.index_select(0, index).view(shape)
        above = line[1:].index_select(0, index).view(shape)
    else:
        below, above = picked(x, low, axis), picked(x, low + 1, axis)
    return torch.lerp(below, above, weight, out=below)


def picked(x: Tensor, places: Tensor, axis: int) -> Tensor:
    """x at whole coordinates (N,) along one axis."""
    if not by_value(x, axis):
        return x.index_select(axis, *to(x.device, places.long()))
    found = x.contiguous().view(-1).index_select(0, in_line(x, places))
    return found.view(*x.shape[:-1], -1)


def by_value(x: Tensor, axis: int) -> bool:
    """Whether torch selects value by value along an axis; from one long line it gathers: three
    times as fast."""
    return x.device.type == "cpu" and axis == x.dim() - 1


def in_line(x: Tensor, places: Tensor) -> Tensor:
    """Where places (N,) of the last axis of x are in the line of all its values: (M N,) int32."""
    rows = torch.arange(0, x.numel(), x.shape[-1], dtype=torch.int32)
    return (rows[:, None] + places.int()).view(-1)


def spline(control: Tensor, size: Size) -> Tensor:
    """Uniform cubic B-spline through control points: (3, K, K, K) -> (3, X, Y, Z).

    u(t) = sum over m of B3(t - m + 1) c_m, with t = 0 at the first voxel and K - 3 at the last and
    B3 the cubic B-spline around 0 (Rueckert et al. 1999): the weights of a voxel add up to 1.
    """
    for axis, side in enumerate(size):
        count = control.shape[axis + 1]
        t = torch.linspace(0, count - 3, side, dtype=torch.float64)
        distance = (t[:, None] + 1 - torch.arange(count)).abs()  # (N, K)
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = (2 - distance).clamp(min=0) ** 3 / 6
        weights = torch.where(distance < 1, near, far).float().to(control.device)
        control = torch.tensordot(control, weights, ([axis + 1], [1])).movedim(-1, axis + 1)
    return control.contiguous()
