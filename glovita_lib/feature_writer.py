"""Writing a feature file: its recipe, the tables beside the features, block by block."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import singledispatch
from glob import escape
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import msgspec
import numpy as np

from glovita_lib import __version__, files
from glovita_lib.data import ArraySource, Data, PartSource, SkippingSource, Source, Split
from glovita_lib.data_video import VideoSource
from glovita_lib.errors import UserError, ended, key_of, listed, versions, with_all
from glovita_lib.extraction import Extractor, Readout
from glovita_lib.files import read_csv
from glovita_lib.resolved import ClipInputs, ImageInputs, Inputs
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Extract

# ------------------------------------------------------------------------------------ tables
#
# What is written beside the features: ids, labels, groups, and for bags made of samples where each
# begins and where its instances lie.
#
# N samples, B bags, K classes or targets.

AXES = ("x", "y", "z")


def groups_of(split: Split) -> list[str]:
    """Group of each sample.

    Raises:
        UserError: the data set knows no groups.
    """
    if split.groups is None:
        raise UserError(
            'extract.bag_by = "group": the data set has no groups; name their column with'
            " data.group_column"
        )
    return split.groups


def group_order(split: Split) -> np.ndarray:
    """Rows (N,) with the samples of a group together: groups by their first sample, samples in the
    split's order; see groups_of."""
    groups, first = groups_of(split), dict[str, int]()
    for group in groups:
        first.setdefault(group, len(first))
    return np.argsort([first[group] for group in groups], kind="stable")


def sample_tables(split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    """ids, labels and groups of some rows, one row a sample."""
    tables = {"ids": np.array([split.ids[row] for row in rows], object)}
    if split.targets is not None:
        tables["labels"] = split.targets[rows]
    if split.groups is not None:
        tables["groups"] = np.array([split.groups[row] for row in rows], object)
    return tables


def bag_tables(split: Split, rows: np.ndarray, coords_file: str | None) -> dict[str, np.ndarray]:
    """ids, labels and bag_ptr of the groups, one row a bag; instance_ids and coords, one row a
    sample.

    Args:
        rows: of the split, the samples of a group together.

    Raises:
        UserError: a group whose samples have different labels, a sample without coordinates.
    """
    of_rows = groups_of(split)
    groups = [of_rows[row] for row in rows]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    ptr = np.array([*starts, len(rows)], np.int64)
    tables = {
        "ids": np.array([groups[start] for start in starts], object),
        "bag_ptr": ptr,
        "instance_ids": np.array([split.ids[row] for row in rows], object),
    }
    if split.targets is not None:
        targets = split.targets[rows]
        own = np.repeat(targets[starts], np.diff(ptr), axis=0)
        differs = (targets != own).reshape(len(rows), -1).any(1)
        if differs.any():
            group = groups[int(np.flatnonzero(differs)[0])]
            raise UserError(
                f"group {group!r} has samples of different labels; a bag has one label: correct the"
                " labels, or leave extract.bag_by out"
            )
        tables["labels"] = targets[starts]
    if coords_file is not None:
        tables["coords"] = read_coords(coords_file, tables["instance_ids"])
    return tables


def read_coords(path: str, ids: np.ndarray) -> np.ndarray:
    """Coordinates (N, 2 or 3) of samples, from a CSV with the columns id, x, y and perhaps z.

    Raises:
        UserError: no such file or column, a sample without a row or with two, a cell that is no
        number.
    """
    table: dict[str, list[float]] = {}
    for row in read_csv(Path(path), ("id", *AXES[:2])):
        name, cells = key_of(row["id"]), [row[axis] for axis in AXES if axis in row]
        if name in table:
            raise UserError(f"{path}: id {name!r} occurs twice; give it one row")
        try:
            table[name] = [float(cell) for cell in cells]
        except ValueError:
            table[name] = [math.nan]
        if not all(map(math.isfinite, table[name])):
            raise UserError(
                f"{path}: coordinates of {name!r} are {', '.join(map(repr, cells))}; write numbers"
            )
    absent = [name for name in ids if key_of(name) not in table]
    if absent:
        example = f"; the file has e.g. {next(iter(table))}" if table else ""
        text = f"{path}: no row for {len(absent)} samples ({listed(absent)}){example}"
        raise UserError(ended(with_all(text, absent)))
    return np.array([table[key_of(name)] for name in ids])


@dataclass(frozen=True)
class FrameRows:
    """Which rows of a file the frames of clips are: those of a video together, in their order, each
    frame once."""

    shown: np.ndarray  # (V,) the videos, by their numbers in data.VideoFrames
    order: np.ndarray  # (m,) row of the file of each frame of each clip, clip after clip
    numbers: np.ndarray  # (M,) of the frame of each row in its video
    ptr: np.ndarray  # (V + 1,) first row of each video, and M

    @classmethod
    def of(cls, split: Split) -> "FrameRows":
        """Those of a split of clips that show every frame of its videos, one video after the
        other."""
        frames = split.frames
        assert frames is not None, "see objectives.frames_as_samples"
        videos, first = np.unique(frames.video_of, return_index=True)
        order, numbers, ptr = [], [], [0]
        for clips in np.split(frames.numbers, first[1:]):  # (n, T)
            own, place = np.unique(clips[clips >= 0], return_inverse=True)
            order.append(ptr[-1] + place)
            numbers.append(own)
            ptr.append(ptr[-1] + len(own))
        return cls(videos, np.concatenate(order), np.concatenate(numbers), np.array(ptr, np.int64))

    def tables(self, split: Split) -> dict[str, np.ndarray]:
        """ids, labels, groups and bag_ptr of the videos; number, time in seconds and, where frames
        have some, label of each row."""
        frames = split.frames
        assert frames is not None, "see objectives.frames_as_samples"
        tables = sample_tables(split, np.unique(frames.video_of, return_index=True)[1]) | {
            "ids": np.array([frames.ids[video] for video in self.shown], object),
            "bag_ptr": self.ptr,
            "frames": self.numbers,
            "times": self.of_rows(frames.times),
        }
        if frames.labels is not None:
            tables["frame_labels"] = self.of_rows(frames.labels)
        return tables

    def of_rows(self, values: list[np.ndarray]) -> np.ndarray:
        """What frames of videos have, arrays (n,), of each row (M,)."""
        parts = zip(self.shown, self.ptr, self.ptr[1:], strict=False)
        return np.concatenate([values[video][self.numbers[a:b]] for video, a, b in parts])

    def videos(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Features (n, D) of one video after another, of those of frames of clips (m, D) in blocks;
        a frame of several clips has their mean."""
        video, done = 0, 0
        sums, counts = np.empty(0), np.empty(0)
        for block in blocks:
            rows = self.order[done : done + len(block)]
            done += len(block)
            of = np.searchsorted(self.ptr, rows, side="right") - 1
            for number in np.unique(of).tolist():
                if number > video:
                    yield (sums / counts[:, None]).astype(block.dtype)
                if number > video or not len(sums):
                    video, count = number, int(self.ptr[number + 1] - self.ptr[number])
                    sums, counts = np.zeros((count, block.shape[1]), np.float32), np.zeros(count)
                mine = of == number
                np.add.at(sums, rows[mine] - self.ptr[number], block[mine])
                np.add.at(counts, rows[mine] - self.ptr[number], 1)
            kind = block.dtype
        yield (sums / counts[:, None]).astype(kind)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Which samples are read in which order, and how they make blocks."""

    rows: np.ndarray  # (N,) rows of the split in the order of the file
    block: int  # samples of a block

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-len(self.rows) // self.block)

    @property
    def block_of(self) -> np.ndarray:
        """Block (N,) of each of `rows`."""
        return np.arange(len(self.rows)) // self.block

    def rows_of(self, block: int) -> np.ndarray:
        """Rows of the split in a block."""
        return self.rows[block * self.block : (block + 1) * self.block]


# ------------------------------------------------------------------------------------ recipe
#
# What a feature file is: its name, and the attributes that say how it was made.
#
# Attributes of the recipe determine the content; a file with others is another file. Notes tell
# more.


def feature_file_name(root: Root, extractor: Extractor, split: str) -> str:
    """Name of the feature file.

    Raises:
        UserError: a placeholder that does not exist.
    """
    spec = root.extract
    pattern = spec.output_filename
    if pattern is None:
        kinds = {"embedding": "agg_{method}", "clips": "clips_{method}"}
        kind = kinds.get(spec.output, spec.output)
        pattern = kind + "_{model}_{dataset}_{split}_size{imgsize}_float{precision}.h5"
    sides = extractor.inputs.shape[1:]
    known = {
        "method": extractor.method,
        "model": extractor.model.encoder.name.replace("/", "_"),
        "dataset": msgspec.to_builtins(root.data)["dataset"],
        "split": split,
        "imgsize": sides[0] if len(set(sides)) == 1 else "x".join(map(str, sides)),
        "precision": spec.precision,
        "checkpoint": checkpoint_name(spec),
    }
    try:
        return pattern.format(**known)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f'extract.output_filename = "{pattern}": unknown placeholder {error}; there are'
            f" {', '.join('{' + name + '}' for name in known)}"
        ) from None


def checkpoint_name(spec: Extract) -> str:
    """What the placeholder checkpoint stands for."""
    if spec.checkpoint is not None:
        return Path(spec.checkpoint).stem
    return spec.use if spec.source == "run" else "encoder"


def recipe_of_features(
    root: Root, extractor: Extractor, data: Data, name: str, split: Split
) -> dict[str, Any]:
    """What determines the features of the samples."""
    experiment = extractor.experiment
    encoder = msgspec.to_builtins(experiment.root.model.encoder)
    encoder.pop("weights", None)  # a path; the sum of the weights says what they are
    return {
        "dataset": data.name,
        "split": name,
        **extractor.attributes(),
        "encoder_spec": json.dumps(encoder),
        "peft_spec": json.dumps(msgspec.to_builtins(experiment.root.peft)),
        "weights_sha256": extractor.weights_sha256,
        "transform": json.dumps(extractor.inputs.transform),
        "ids_sha256": sha256("\n".join(split.ids).encode()),
        "bag_by": root.extract.bag_by or "none",
    } | when_shown(split.source)


def when_shown(source: Source) -> dict[str, str]:
    """When the frames of videos are shown, by which clips are cut; of others nothing."""
    if not isinstance(source, VideoSource):
        return {}
    each = (c.fps if c.times is None else c.times for c in source.clocks)
    content = b"|".join(np.asarray(times, np.float64).tobytes() for times in each)
    return {"frame_times_sha256": sha256(content)}


def recipe_of_tables(root: Root, data: Data, split: Split) -> dict[str, Any]:
    """What determines the rest: a corrected label makes another file of the same features.

    Raises:
        UserError: coords_file cannot be read.
    """
    spec, targets = root.extract, split.targets
    labels = b"" if targets is None else np.ascontiguousarray(targets).tobytes()
    try:
        coords = b"" if spec.coords_file is None else Path(spec.coords_file).read_bytes()
    except OSError as error:
        raise UserError(f"extract.coords_file {spec.coords_file}: {error.strerror}") from None
    return {
        "subtask": data.subtask,
        "class_names": list(data.class_names),
        "labels_sha256": sha256("\n".join(split.groups or ()).encode() + b"\n" + labels),
        "coords_sha256": sha256(coords) if coords else "none",
        "compression": spec.filters,
    }


def sha256(content: bytes) -> str:
    """A hash as text."""
    return hashlib.sha256(content).hexdigest()


def notes_of(root: Root, extractor: Extractor) -> dict[str, str]:
    """Where the features come from."""
    found, spec = versions(), msgspec.to_builtins(extractor.experiment.root)
    asked = {section: spec[section] for section in ("seed", "data", "model", "peft")}
    return {
        "weights": weights_text(root, extractor.experiment.checkpoint),
        "spec": json.dumps(asked),
        "glovita": __version__,
        **{package: str(found[package]) for package in ("torch", "torchvision", "timm")},
    }


def weights_text(root: Root, checkpoint: Path | None) -> str:
    """Where the weights come from, in words."""
    encoder = msgspec.to_builtins(root.model.encoder)
    if checkpoint is not None:
        return f"checkpoint {checkpoint}"
    if encoder.get("weights"):
        return f"file {encoder['weights']}"
    return "published" if encoder.get("pretrained") else f"random, seed {root.seed}"


# ------------------------------------------------------------------------------------ blocks
#
# A kill loses the running block only. Finished blocks lie as files of their own in `<file>.parts/`,
# beside a recipe that says what they are blocks of. When all are there they are put together, under
# a temporary name, in the order of the data set. Ranks write different blocks; the first one puts
# them together.
#
# N samples, D width, M instances.

CHUNK_BYTES = 256 * 2**10  # of a compressed chunk: large enough to inflate fast
LONGEST = 60  # characters of two values that are shown beside each other
OF_SAMPLES = ("rows", "lengths")  # what has a row a sample in a block; the rest one an instance
LOCK = ".lock"  # of the process that writes blocks


@dataclass(frozen=True)
class BlockFiles:
    """The finished blocks of one feature file."""

    target: Path
    recipe: dict[str, Any]  # what determines the features
    plan: BlockPlan

    @property
    def folder(self) -> Path:
        """Where the blocks are."""
        return self.target.with_name(f"{self.target.name}.parts")

    @property
    def lock(self) -> Path:
        """File that the running process has locked."""
        return self.folder / LOCK

    def path(self, block: int) -> Path:
        """File of a block."""
        return self.folder / f"{block:06d}.npz"

    def open(self) -> None:
        """Make the folder ready; blocks of another recipe and what a kill left are removed.

        The lock is held, so nobody else writes there.
        """
        note, recipe = self.folder / "recipe.json", self.recipe_of_parts()
        # Without its recipe a folder was being cleared when it was killed.
        if not note.is_file() or files.read_json(note) != recipe:
            self.clear()
        files.make_folder(self.folder)
        halves = list(self.folder.glob(f"{files.TEMPORARY}*"))
        halves += self.target.parent.glob(f"{files.TEMPORARY}*-{escape(self.target.name)}")
        for path in halves:
            path.unlink(missing_ok=True)
        files.write_json(note, recipe)

    def recipe_of_parts(self) -> dict[str, Any]:
        """What determines the content of the blocks: also which samples are in which."""
        order = hashlib.sha256(self.plan.rows.astype(np.int64).tobytes()).hexdigest()
        return files.as_json({**self.recipe, "block_samples": self.plan.block, "order": order})

    def pending(self) -> list[int]:
        """Blocks that are not finished."""
        return [block for block in range(self.plan.blocks) if not self.path(block).is_file()]

    def write(self, block: int, rows: np.ndarray, readouts: list[Readout]) -> None:
        """Write a finished block: rows of the split, and what was read out of them."""
        arrays = {"rows": [rows], "features": [r.features for r in readouts]}
        if instances := [r.instances for r in readouts if r.instances is not None]:
            arrays["lengths"] = [part.lengths for part in instances]
            if coords := [part.coords for part in instances if part.coords is not None]:
                arrays["coords"] = coords
            for name in instances[0].shown:
                arrays[name] = [part.shown[name] for part in instances]
        with files.atomic_path(self.path(block)) as temporary, ZipFile(temporary, "w") as archive:
            for name, pieces in arrays.items():
                write_array(archive, name, pieces)

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """The blocks in order."""
        for block in range(self.plan.blocks):
            with np.load(self.path(block)) as arrays:
                yield dict(arrays)

    def clear(self) -> None:
        """Remove all but the lock; the recipe last, lest blocks without one pass for another's."""
        paths = [path for path in self.folder.glob("*") if path.name != LOCK]
        for path in sorted(paths, key=lambda path: path.name == "recipe.json"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the blocks and their folder."""
        if not self.folder.is_dir():
            return
        self.clear()
        with suppress(OSError):  # a process that waits has just made a lock of its own there
            self.lock.unlink(missing_ok=True)
            self.folder.rmdir()


def write_array(archive: ZipFile, name: str, pieces: list[np.ndarray]) -> None:
    """Write arrays one below the other as one array of an npz file, without a copy of them all."""
    first = pieces[0]
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (sum(map(len, pieces)), *first.shape[1:]),
    }
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).data.cast("B"))


def put_together(
    parts: BlockFiles,
    *,
    tables: dict[str, np.ndarray],
    compression: str,
    keep: np.ndarray,
    notes: dict[str, Any],
    frames: FrameRows | None = None,
) -> tuple[int, ...]:
    """Put the blocks together: the feature file appears whole, the blocks stay.

    Returns the shape of the features.

    Args:
        tables: datasets beside the features, e.g. labels, ids; one row a sample or bag.
        compression: none, lzf or gzip with its level, as gzip:4.
        keep: (N,) whether each sample, in the order of the blocks, is written.
        notes: further attributes, beside those of the features' recipe.
        frames: where the frames of clips come to stand; none: samples stay in the order of the
            blocks.

    Raises:
        UserError: disk full ...
    """
    blocks = kept_samples(parts, keep)
    total = total_rows(parts, keep)
    if frames is not None:
        total = len(frames.numbers)
        blocks = ({"features": each} for each in frames.videos(b["features"] for b in blocks))
    with files.atomic_path(parts.target) as temporary, hdf5_file(temporary) as file:
        place, lengths = 0, []
        for block in blocks:
            features = block["features"]
            if "features" not in file and compression == "none":
                refuse_full_disk(parts.folder, total * features[0].nbytes)
            for name in [each for each in block if each not in OF_SAMPLES]:
                if name not in file:
                    filters = compression if name == "features" else "none"
                    create_dataset(file, name, block[name], filters, total)
                file[name][place : place + len(features)] = block[name]
            if "lengths" in block:
                lengths.append(block["lengths"])
            place += len(features)
        if lengths:
            file["bag_ptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        for name, values in tables.items():
            file[name] = as_stored(values)
        for name, value in {**parts.recipe, **notes}.items():
            file.attrs[name] = value
        shape = file["features"].shape
    return shape


def kept_samples(parts: BlockFiles, keep: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The blocks in order, without samples that are not kept."""
    done = 0
    for block in parts.read():
        kept = keep[done : done + len(block["rows"])]
        done += len(kept)
        if not kept.any():
            continue
        if not kept.all():  # a mask copies, which most blocks need not
            instances = np.repeat(kept, block["lengths"]) if "lengths" in block else kept
            block = {k: v[kept if k in OF_SAMPLES else instances] for k, v in block.items()}
        yield block


class GuardedFile:
    """A new file for h5py that remembers an error of the disk instead of raising it.

    HDF5 cannot close a file that a full disk keeps from being written; it crashes at the end of the
    process. So all goes on as if there were room, and the error is raised when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w+b", buffering=0)  # noqa: SIM115  closed by hdf5_file
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        """Write all, or remember why not."""
        done = 0
        while done < len(data) and self.error is None:
            try:
                done += self.file.write(data[done:])
            except OSError as error:
                self.error = error
        return len(data)

    def truncate(self, size: int) -> int:
        """Cut or extend, or remember why not."""
        if self.error is None:
            try:
                self.file.truncate(size)
            except OSError as error:
                self.error = error
        return size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def hdf5_file(path: Path) -> Iterator[Any]:
    """A new HDF5 file to write; attributes may be larger than 64 KiB, as many class names are.

    Raises:
        OSError: the disk is full ...
    """
    import h5py

    guarded = GuardedFile(path)
    try:
        with guarded.file, h5py.File(guarded, "w", libver=("v108", "v108")) as file:
            yield file
    except (OSError, RuntimeError):  # h5py's, where it misses what it believes to be written
        if guarded.error is None:
            raise
    if guarded.error is not None:
        raise guarded.error


def refuse_full_disk(folder: Path, size: int) -> None:
    """Look before a long writing whether there is room for it.

    Raises:
        UserError: there is not.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB left, the features need"
            f" {size / 2**20:,.0f}: free some space and start again, finished blocks are kept"
        )


def total_rows(parts: BlockFiles, keep: np.ndarray) -> int:
    """Rows of the assembled features."""
    total, done = 0, 0
    for block in range(parts.plan.blocks):
        with np.load(parts.path(block)) as arrays:
            kept = keep[done : done + len(arrays["rows"])]
            done += len(kept)
            total += int(arrays["lengths"][kept].sum() if "lengths" in arrays else kept.sum())
    return total


def create_dataset(file: Any, name: str, example: np.ndarray, compression: str, rows: int) -> None:
    """An empty dataset for `rows` rows like those of the example."""
    shape, options = (rows, *example.shape[1:]), {}
    compression, _, level = compression.partition(":")
    if compression != "none":
        chunk = max(1, min(rows, CHUNK_BYTES // max(1, example[0].nbytes)))
        options = {"chunks": (chunk, *shape[1:]), "shuffle": True, "compression": compression}
        if level:
            options["compression_opts"] = int(level)
    file.create_dataset(name, shape, example.dtype, **options)


def as_stored(values: np.ndarray) -> Any:
    """Text as HDF5's variable-length UTF-8, numbers as they are."""
    import h5py

    if values.dtype.kind in "UO":
        return values.astype(h5py.string_dtype())
    return values


# ---------------------------------------------------------------------- what is there already


def refuse_other(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether the file is there already, made as it is wanted.

    Raises:
        UserError: it was made in another way.
    """
    import h5py

    if not target.exists():
        return False
    try:
        with h5py.File(target, "r") as file:
            known = {name: files.as_json(value) for name, value in file.attrs.items()}
    except OSError:
        known = {}
    way_out = "set extract.output_filename or extract.output_dir, or remove it"
    if not wanted.keys() & known.keys():
        raise UserError(f"{target} exists and was not written by mode extract; {way_out}")
    differing = [
        difference(name, known.get(name), files.as_json(value))
        for name, value in wanted.items()
        if known.get(name) != files.as_json(value)
    ]
    if differing:
        raise UserError(
            f"{target} exists and was made otherwise: {'; '.join(differing)}; {way_out}"
        )
    return True


def difference(name: str, known: Any, wanted: Any) -> str:
    """How an attribute differs, with its values where they are short."""
    if len(f"{known}{wanted}") > LONGEST:
        return f"another {name}"
    return f"{name} {known}, now {wanted}"


def left_out(target: Path) -> list[str]:
    """Lines about the samples that a feature file lacks."""
    import h5py

    with h5py.File(target, "r") as file:
        return list(file["left_out"].asstr()[()]) if "left_out" in file else []


# ---------------------------------------------------------------------- the samples of a block


def part_to_read(split: Split, rows: np.ndarray, notes: Path, extractor: Extractor) -> Split:
    """Some rows of a split, without labels; where broken ones are to be left out, black images in
    their place and notes about them in a folder."""
    whole = split.source
    source: Source
    if isinstance(whole, ArraySource) or isinstance(extractor.inputs, ClipInputs):
        source = whole.select(rows)  # of videos as_loaded must know it
    elif extractor.spec.on_error == "skip":
        source = skipping_source(extractor.inputs, whole, rows, notes)
    else:
        source = PartSource(whole, rows)
    return Split([split.ids[row] for row in rows], None, source)


@singledispatch
def skipping_source(inputs: Inputs, whole: Source, rows: np.ndarray, notes: Path) -> Source:
    """Some samples of a source, with blank ones and notes about them for what cannot be read; of
    other samples than images the data set has left out what cannot be."""
    return PartSource(whole, rows)


@skipping_source.register
def _(inputs: ImageInputs, whole: Source, rows: np.ndarray, notes: Path) -> SkippingSource:
    return SkippingSource(whole, rows, notes, inputs.shape, inputs.bit_depth)
