"""Prepared volumes: a cache file each, made once by several processes, and the source that reads
them.

C channels, X Y Z voxels, K voxels of foreground, N samples.
"""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any, ClassVar

import msgspec
import numpy as np

from glovita_lib.errors import UserError
from glovita_lib.files import Lock, make_folder, write_bytes, write_json
from glovita_lib.read_dicom import dicom_files, shape_text
from glovita_lib.read_volume import Reading, open_sample, reading, spacing_of
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading
from glovita_lib.volume_preparation import Prepared, prepare

# ------------------------------------------------------------------------------- cache files
#
# One file a sample, named by a hash of its files (path, size, time of change) and of all settings:
# it is written whole or not at all, a second start goes on where the first one ended, and nothing
# has to be looked up in a changed data set.

PREPARATION_VERSION = 3
"""Number in the name of every cache file. Raise it with each change of what is read from a file,
made of it, written here, or refused: all volumes are then prepared, and looked at, anew, and files
of older numbers stay where they are, unused."""
VOXELS, FOREGROUND = "voxels", "foreground"
CHUNK = 32  # voxels; side of the blocks that a crop is read in
WHOLE_BYTES = 2**20  # smaller volumes are one block


@dataclass(frozen=True, slots=True)
class Entry:
    """A cache file that is there."""

    path: str
    shape: tuple[int, int, int, int]
    """(C, X, Y, Z) as prepared."""
    channels: int
    """Channels of the files."""
    spacing: tuple[float, float, float]
    """Spacing of the files, mm."""


@dataclass(frozen=True, slots=True)
class Task:
    """A sample to be prepared."""

    paths: tuple[str, ...]
    reading: VolumeReading
    preparation: VolumePreparation
    target: str
    """Its cache file."""


class VolumeCache:
    """The cache files of one way to read and prepare volumes."""

    def __init__(self, folder: Path, how: VolumeReading, preparation: VolumePreparation) -> None:
        self.how, self.preparation = how, preparation
        settings = {"reading": msgspec.to_builtins(how)}
        settings["preparation"] = {
            name: value
            for name, value in msgspec.to_builtins(preparation).items()
            if name not in ("cache_dir", "workers")
        }
        self.settings = {"version": PREPARATION_VERSION, **settings}
        self.folder = folder / digest(self.settings)

    def target(self, paths: Sequence[str]) -> Path:
        """Cache file of a sample of these files.

        Raises:
            UserError: one of them is missing.
        """
        return self.folder / f"{digest([stamp(path) for path in paths])}.h5"

    def fill(
        self,
        samples: Sequence[tuple[str, ...]],
        *,
        workers: int,
        advance: Callable[[int], None],
    ) -> list[Entry | str]:
        """The cache file of each sample, prepared where it is missing; of one that cannot be
        prepared the line that says why.

        Of several programs that want the same files one makes them, the others wait.

        Args:
            samples: paths of the files of each sample.
            workers: processes.
            advance: told of samples that are done.

        Raises:
            UserError: a cache file cannot be written, or a process died.
        """
        found = [self.look(paths) for paths in samples]
        if all(found):
            advance(len(found))
            return [entry for entry in found if entry is not None]
        make_folder(self.folder)
        with Lock(self.folder / "lock"):
            found = [entry or self.look(paths) for entry, paths in zip(found, samples, strict=True)]
            missing = [number for number, entry in enumerate(found) if entry is None]
            advance(len(found) - len(missing))
            write_json(self.folder / "settings.json", self.settings)
            tasks = [self.task(samples[number]) for number in missing]
            for number, answer in zip(missing, run(tasks, workers), strict=True):
                found[number] = answer
                advance(1)
        return [entry for entry in found if entry is not None]

    def look(self, paths: tuple[str, ...]) -> Entry | str | None:
        """The cache file of a sample; None where it is still to be made; the line that says so
        where one of its files is missing."""
        try:
            return read_entry(self.target(paths))
        except UserError as error:
            return str(error)

    def task(self, paths: tuple[str, ...]) -> Task:
        """What makes the cache file of a sample."""
        return Task(paths, self.how, self.preparation, str(self.target(paths)))


def digest(value: Any) -> str:
    """A short hash of a value of JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def stamp(path: str) -> list[Any]:
    """What changes where a file, or one in a folder, is another one: path, size, time of change.

    Raises:
        UserError: it is missing.
    """
    with reading(path):
        files = dicom_files(path) if os.path.isdir(path) else [path]
        facts = [(file, os.stat(file)) for file in files]
        inside = [[os.path.relpath(f, path), s.st_size, s.st_mtime_ns] for f, s in facts]
        return [os.path.realpath(path), inside]


def read_entry(path: Path) -> Entry | None:
    """What a cache file holds; None where there is none, or it is damaged."""
    import h5py

    if not path.exists():
        return None
    with suppress(OSError, KeyError), h5py.File(path, "r") as file:
        attributes = file.attrs
        x, y, z = attributes["file_spacing"].tolist()
        channels = int(attributes["file_channels"])
        return Entry(str(path), file[VOXELS].shape, channels, (x, y, z))
    return None


def make_entry(task: Task) -> Entry | str:
    """Prepare a sample and write its cache file; of one that cannot be read or prepared the line
    that says why.

    Raises:
        UserError: the cache file cannot be written.
    """
    try:
        sample = open_sample(task.paths, reading_of(task.reading))
        voxels = sample.read()
    except UserError as error:
        return str(error)
    try:
        found = prepare(voxels, sample.affine, task.preparation, has_spacing=sample.has_spacing)
    except UserError as error:
        return f"{task.paths[0]}: {error}"
    spacing = spacing_of(sample.affine)
    facts = {"file_channels": len(voxels), "file_spacing": spacing, "files": json.dumps(task.paths)}
    write_bytes(task.target, hdf5_bytes(found, facts))
    return Entry(task.target, found.voxels.shape, len(voxels), spacing)


def hdf5_bytes(found: Prepared, facts: dict[str, Any]) -> memoryview:
    """A prepared volume as an HDF5 file: a large one in blocks, of which a crop reads a few."""
    import h5py

    whole = found.voxels.nbytes <= WHOLE_BYTES
    chunks = None if whole else (1, *(min(CHUNK, side) for side in found.voxels.shape[1:]))
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset(VOXELS, data=found.voxels, chunks=chunks)
        file[FOREGROUND] = found.foreground.astype(np.int16)  # no axis has 32,768 voxels
        fill = found.voxels.min((1, 2, 3))
        for name, value in {"affine": found.affine, "fill": fill, **facts}.items():
            file.attrs[name] = value
    return content.getbuffer()


def reading_of(spec: VolumeReading) -> Reading:
    """The Struct as the reader takes it."""
    return Reading(spec.canonical, spec.frame, spec.series, spec.array_key, spec.array_spacing)


# ---------------------------------------------------------------------- processes
#
# Workers are interpreters of their own that read tasks and write answers: they import no torch, use
# one core each, need nothing of the main module, and end when this process does.

SERVE = "from glovita_lib.volume_cache import serve; serve()"
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FEW = 2  # samples that are sooner done than a process has started


def run(tasks: list[Task], workers: int) -> Iterator[Entry | str]:
    """Answers to tasks in their order, by several processes where that pays.

    Raises:
        UserError: a cache file cannot be written, or a process died.
    """
    if workers == 1 or len(tasks) <= FEW:
        yield from map(make_entry, tasks)
        return
    own = local()
    processes: list[subprocess.Popen[bytes]] = []

    def ask(task: Task) -> Entry | str:
        if not hasattr(own, "process"):
            own.process = start()
            processes.append(own.process)
        return answer(own.process, task)

    pool = ThreadPoolExecutor(min(workers, len(tasks)))
    try:
        yield from pool.map(ask, tasks)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        raise
    finally:
        pool.shutdown()
        for process in processes:
            process.communicate()  # closes its input, at which it ends


def start() -> "subprocess.Popen[bytes]":
    """A process that answers tasks."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, **ONE_CORE, "PYTHONPATH": paths}
    command = [sys.executable, "-c", SERVE]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)


def answer(process: "subprocess.Popen[bytes]", task: Task) -> Entry | str:
    """What a process answers to a task.

    Raises:
        UserError: it died, or had not enough memory.
    """
    assert process.stdin is not None and process.stdout is not None
    cure = "lower data.preparation.workers"
    try:
        pickle.dump(task, process.stdin)
        process.stdin.flush()
        found: Entry | str | Exception = pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"a process that prepares volumes died at {task.paths[0]} (exit code {process.wait()}),"
            f" most often for want of memory: {cure}"
        ) from error
    if isinstance(found, MemoryError):
        raise UserError(f"too little memory to prepare {task.paths[0]}: {cure}") from found
    if isinstance(found, Exception):
        raise found
    return found


def serve() -> None:
    """Answer tasks until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    inlet, outlet = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what libraries print
    while True:
        try:
            task = pickle.load(inlet)
        except EOFError:
            return
        try:
            found: Entry | str | Exception = make_entry(task)
        except Exception as error:  # raised again in the main process
            found = error
        pickle.dump(found, outlet)
        outlet.flush()


# ------------------------------------------------------------------------------------ source


class PreparedVolume:
    """A prepared volume in its file or in memory; slicing it reads only that part."""

    def __init__(
        self, voxels: Any, *, affine: np.ndarray, fill: np.ndarray, foreground: np.ndarray
    ) -> None:
        self.voxels = voxels
        """(C, X, Y, Z), an array or a dataset of an open file."""
        self.affine = affine
        """(4, 4) float64, voxel to world mm."""
        self.fill = fill
        """(C,) what is put around it, the minimum of each channel."""
        self.foreground = foreground
        """(K, 3) int32, voxels drawn from its foreground."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, X, Y, Z)."""
        return self.voxels.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the voxels."""
        return self.voxels.dtype

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Spacing along X, Y, Z, mm."""
        return spacing_of(self.affine)

    def __getitem__(self, part: Any) -> np.ndarray:
        return self.voxels[part]

    def loaded(self) -> "PreparedVolume":
        """The same in memory."""
        found = copy(self)
        found.voxels = self.voxels[...]
        return found


def open_prepared(path: str) -> PreparedVolume:
    """A cache file, which stays open as long as the volume is used.

    Raises:
        UserError: it is gone or damaged.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
        return PreparedVolume(
            file[VOXELS],
            affine=file.attrs["affine"],
            fill=file.attrs["fill"],
            foreground=file[FOREGROUND][...].astype(np.int32),
        )
    except (OSError, KeyError) as error:
        raise UserError(
            f"{path}: this prepared volume is gone or damaged ({error}); start again to have it"
            " made anew"
        ) from None


class VolumeSource:
    """Prepared volumes of one split, read from their cache files."""

    reads_at_once: ClassVar[bool] = False
    collate: ClassVar[None] = None

    def __init__(self, entries: Sequence[Entry], dtype: str) -> None:
        # Bytes in one array: worker processes share it, see FileSource.
        self.paths = np.array([os.fsencode(entry.path) for entry in entries], np.bytes_)  # (N,)
        self.shapes = np.array([entry.shape for entry in entries]).reshape(-1, 4)  # (N, 4)
        self.dtype = dtype

    @property
    def uniform(self) -> tuple[int, ...] | None:
        """(C, X, Y, Z) where all volumes have one size."""
        if not len(self.shapes) or (self.shapes != self.shapes[0]).any():
            return None
        return tuple(self.shapes[0].tolist())

    @property
    def sizes(self) -> np.ndarray:
        """Voxels along X, Y, Z (N, 3)."""
        return self.shapes[:, 1:]

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        """Whole volumes (C, X, Y, Z)."""
        found = [volume[...] for volume in self.each(rows)]
        return np.stack(found) if self.uniform is not None else found

    def windows(self, rows: np.ndarray) -> list[PreparedVolume]:
        """Volumes of which only what is sliced is read."""
        return list(self.each(rows))

    def each(self, rows: np.ndarray) -> Iterator[PreparedVolume]:
        """Volumes one after another."""
        for row in rows:
            volume = open_prepared(os.fsdecode(self.paths[row]))
            if volume.shape != tuple(self.shapes[row]):
                raise UserError(
                    f"{os.fsdecode(self.paths[row])}: {shape_text(volume.shape)} voxels, other than"
                    " at the start of the run"
                )
            yield volume

    def nbytes(self) -> int:
        """Size of all volumes in memory, bytes."""
        return int(self.shapes.prod(1).sum()) * np.dtype(self.dtype).itemsize

    def select(self, rows: np.ndarray) -> "VolumeSource":
        """The volumes of these rows."""
        part = copy(self)
        part.paths, part.shapes = self.paths[rows], self.shapes[rows]
        return part
