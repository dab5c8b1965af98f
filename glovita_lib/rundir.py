"""The run directory experiments/<dataset>/<group>/<fold>/: its files, and whether an existing run
is continued, replaced or refused.

A run is finished when `finished` in runtime_info.json holds a time; it is written last.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec.structs import replace

from glovita_lib.dist import Ranks, main_decides
from glovita_lib.errors import UserError, environment, git_state, listed
from glovita_lib.files import (
    TEMPORARY,
    InUse,
    Lock,
    read_json,
    remove,
    remove_killed,
    remove_leftovers,
    write_error,
    write_json,
    write_text,
)
from glovita_lib.spec import Loaded, changed_keys, dump
from glovita_lib.spec_root import Root

Decision = Literal["start", "resume", "overwrite", "finished"]
# What a run writes, in the order in which it is removed when a run starts over: the mark of being
# finished first and config.json last, so that no kill in between leaves an apparently whole run.
OURS = (
    "runtime_info.json",
    "checkpoints",
    "metrics*.json",
    "metrics.jsonl",
    "notes.txt",
    "predictions_*.csv",
    "predictions_*.h5",
    "plots",
    "infer",
    "umap",
    "wandb",
    "resolved_config.json",
    "parameter_groups.csv",
    "spec.toml",
    "config.json",
)
LOCK = ".lock"
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """Where training stands."""
        return self.checkpoints / "last.pt"

    @property
    def best(self) -> Path:
        """The best epoch."""
        return self.checkpoints / "best.pt"

    def epoch(self, epoch: int) -> Path:
        """A kept epoch, counted from 0."""
        return self.checkpoints / f"epoch_{epoch:04d}.pt"

    @property
    def spec(self) -> Path:
        """The resolved spec, which runs again as it is."""
        return self.path / "spec.toml"

    @property
    def config(self) -> Path:
        """The resolved spec as JSON; decides whether a spec has changed."""
        return self.path / "config.json"

    @property
    def resolved_config(self) -> Path:
        """Values derived at run time."""
        return self.path / "resolved_config.json"

    @property
    def parameter_groups(self) -> Path:
        """Layer, learning-rate factor and weight decay of every parameter."""
        return self.path / "parameter_groups.csv"

    @property
    def runtime_info(self) -> Path:
        """When, where and with which versions; says whether the run is finished."""
        return self.path / "runtime_info.json"

    @property
    def metrics(self) -> Path:
        """One line per log event."""
        return self.path / "metrics.jsonl"

    @property
    def notes(self) -> Path:
        """What was noted when the data were read: samples left out, classes without samples ..."""
        return self.path / "notes.txt"

    @property
    def plots(self) -> Path:
        """Folder of the plots."""
        return self.path / "plots"

    def predictions_of(self, split: str) -> Path:
        """Predictions of a split."""
        return self.path / f"predictions_{split}.csv"

    def metrics_of(self, split: str) -> Path:
        """Metrics of a split."""
        return self.path / f"metrics_{split}.json"

    @property
    def group(self) -> Path:
        """Folder of the folds of an experiment."""
        return self.path.parent

    @property
    def lock(self) -> Path:
        """File that the running process has locked."""
        return self.path / LOCK

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.runtime_info.is_file() and bool(read_json(self.runtime_info).get("finished"))

    @property
    def kept(self) -> list[Path]:
        """Checkpoints other than last.pt, from which training can go on too: the kept epoch that is
        the newest, and the best one."""
        epochs = sorted(
            self.checkpoints.glob("epoch_*.pt"), key=lambda path: (len(path.name), path)
        )
        return [path for path in (*epochs[-1:], self.best) if path.is_file()]

    def weights(self) -> list[Path]:
        """Files that may hold weights: all checkpoints, and exports among the results."""
        found = self.checkpoints.rglob("*")
        results = (path for pattern in OURS for path in self.path.glob(f"{pattern}/**/*"))
        exports = (path for path in results if path.suffix in WEIGHTS)
        return sorted(
            {p for p in (*found, *exports) if p.is_file() and not p.name.startswith(TEMPORARY)}
        )

    def clean(self, ranks: Ranks, decision: Decision) -> None:
        """Remove what a kill left behind and, unless its run is continued, what an earlier run
        wrote; files of others stay. The lock is held.

        Raises:
            UserError: on all ranks: something cannot be removed.
        """

        def work() -> None:
            remove_leftovers(self.path)
            if decision != "resume":
                self.clear()

        main_decides(ranks, work)

    def clear(self) -> None:
        """Remove what a run wrote."""
        for pattern in OURS:
            for path in sorted(self.path.glob(pattern)):
                try:
                    remove(path)
                except OSError as error:
                    raise write_error(path, error) from None

    def write_spec(self, loaded: Loaded[Root]) -> None:
        """Write the resolved spec in both forms: run again, spec.toml finds this very run, also
        where it was started beside another one."""
        training = replace(loaded.as_written.training, on_existing="resume")
        spec = replace(loaded.as_written, name=self.group.name, mode="train", training=training)
        write_text(self.spec, dump(spec))
        write_json(self.config, loaded.plain)

    def note_start(self, info: dict[str, Any]) -> None:
        """Write runtime_info.json, or add to it where the run is continued."""
        if self.runtime_info.is_file():
            known = read_json(self.runtime_info)
            known["continued"] = [*known.get("continued", ()), info]
        else:
            known = {**info, "continued": [], "finished": None}
        write_json(self.runtime_info, known)

    def mark_finished(self) -> None:
        """Say that nothing is left to do; the last thing a run writes."""
        known = read_json(self.runtime_info)
        write_json(self.runtime_info, {**known, "finished": now()})


# ---------------------------------------------------------------------- which run


def locate(loaded: Loaded[Root]) -> RunDir:
    """The directory of a spec's run, whether it exists or not.

    Raises:
        UserError: a name that is not one folder.
    """
    group = loaded.group
    if group != os.path.basename(group) or group in ("", ".", ".."):
        raise UserError(f'name = "{group}" is not the name of a folder: leave out / and ..')
    data = loaded.plain["data"]
    return RunDir(Path(loaded.root.exp_dir) / data["dataset"] / group / str(data["fold"]))


@contextmanager
def opened(loaded: Loaded[Root], ranks: Ranks) -> Iterator[tuple[RunDir, Decision]]:
    """The directory of a spec's run and what to do there, decided under its lock. The lock is held
    to the end of the block, that of a finished run only for the decision.

    What was there stays until `RunDir.clean`; a directory in which nothing is written is removed.

    Raises:
        UserError: on all ranks: another process has it, the spec has changed, there are weights but
            nothing to continue from, or the directory cannot be written.
    """
    locks: list[Lock] = []

    def claim() -> tuple[RunDir, Decision]:
        wanted = locate(loaded)
        if loaded.plain["training"]["on_existing"] == "new":
            run, lock = beside(wanted)
            locks.append(lock)
            return run, "start"
        if is_read_only(wanted.path) and wanted.is_finished:
            return wanted, decide(wanted, loaded)
        locks.append(Lock(wanted.lock))
        locks[0].acquire()
        decision = decide(wanted, loaded)
        if decision == "finished":
            locks[0].release()
        return wanted, decision

    try:
        yield main_decides(ranks, claim)
    finally:
        for lock in locks:
            lock.release()


@contextmanager
def alone(results: Path, ranks: Ranks) -> Iterator[None]:
    """No other process writes results of this name in the block; nothing is left of the lock.

    Raises:
        UserError: another process does.
    """
    lock = Lock(results.with_name(f".{results.name}.lock"))

    def acquire() -> None:
        try:
            lock.acquire()
        except UserError as error:  # there is no starting beside it
            raise UserError(str(error).partition(", or start beside it")[0]) from None

        remove_killed(results)

    main_decides(ranks, acquire)
    try:
        yield
    finally:
        if lock.handle is not None:
            with suppress(OSError):  # an open file, which some systems do not remove
                lock.path.unlink()
        lock.release()


def is_read_only(folder: Path) -> bool:
    """Whether a folder is there and nothing can be written to it."""
    return folder.is_dir() and not os.access(folder, os.W_OK)


def decide(wanted: RunDir, loaded: Loaded[Root]) -> Decision:
    """What to do in a directory whose lock is held; reads only.

    A run that has left no weights starts over in its place.

    Raises:
        UserError: the spec has changed, or there are weights but nothing to continue from.
    """
    weights, is_finished = wanted.weights(), wanted.is_finished
    if not weights and not is_finished:
        return "start"
    if loaded.plain["training"]["on_existing"] == "overwrite":
        return "overwrite"
    changes = changed_keys(read_json(wanted.config), loaded.plain)
    if changes:
        raise UserError(
            f"{wanted.path} holds a run of another spec: {listed(changes, 8, '; ')}."
            " Undo the changes to continue it, set"
            ' training.on_existing = "overwrite" to replace it or "new" to start beside it, or'
            " give this one another name"
        )
    if is_finished:
        return "finished"
    if not wanted.last.is_file() and not wanted.kept:
        raise UserError(
            f"{wanted.path} holds weights ({listed([path.name for path in weights], 4)}) but no"
            " checkpoint to continue from: put last.pt or best.pt back into checkpoints/, move them"
            ' elsewhere, or set training.on_existing = "overwrite" to remove them or "new" to start'
            " beside them"
        )
    return "resume"


def beside(wanted: RunDir) -> tuple[RunDir, Lock]:
    """The wanted directory, or the first of <group>_2, <group>_3 ... in whose fold nothing is and
    that no other process has, with its lock."""
    run, number = wanted, 1
    while True:
        if is_empty(run):
            lock = Lock(run.lock)
            with suppress(InUse):
                lock.acquire()
                if is_empty(run):
                    return run, lock
                lock.release()
        number += 1
        group = wanted.group.with_name(f"{wanted.group.name}_{number}")
        run = RunDir(group / wanted.path.name)


def is_empty(run: RunDir) -> bool:
    """Whether a directory is not there or holds nothing, but perhaps a lock."""
    return not run.path.exists() or (run.path.is_dir() and set(os.listdir(run.path)) <= {LOCK})


# ---------------------------------------------------------------------- about the process


def now() -> str:
    """Local time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def runtime_info(ranks: Ranks, *, seed: int) -> dict[str, Any]:
    """When, where, with which command and versions a run started."""
    return {
        "started": now(),
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "seed": seed,
        "world_size": ranks.world,
        "threads": torch.get_num_threads(),
        "git": git_state(os.getcwd()),
        **environment(ranks.device),
    }
