"""The run directory experiments/<dataset>/<group>/<fold>/: its files, and whether an existing run
is continued, replaced or refused.

A run is finished when `finished` in runtime_info.json holds a time; it is written last.
"""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from glovita_lib.dist import Ranks, main_decides
from glovita_lib.errors import UserError, environment, git_state, listed
from glovita_lib.files import (
    Lock,
    check_free,
    make_folder,
    read_json,
    remove_leftovers,
    write_error,
    write_json,
)
from glovita_lib.spec import Loaded, changed_keys
from glovita_lib.spec_root import Root

Decision = Literal["start", "resume", "overwrite", "finished"]
# What a run writes, in the order in which it is removed when a run starts over: the mark of being
# finished first and config.json last, so that no kill in between leaves an apparently whole run.
OURS = (
    "runtime_info.json",
    "checkpoints",
    "metrics*.json",
    "metrics.jsonl",
    "predictions_*.csv",
    "plots",
    "infer",
    "umap",
    "wandb",
    "resolved_config.json",
    "spec.toml",
    "config.json",
)


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Nothing is created before `opened`."""

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
    def runtime_info(self) -> Path:
        """When, where and with which versions; says whether the run is finished."""
        return self.path / "runtime_info.json"

    @property
    def metrics(self) -> Path:
        """One line per log event."""
        return self.path / "metrics.jsonl"

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
        return self.path / ".lock"

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.runtime_info.is_file() and bool(read_json(self.runtime_info).get("finished"))

    @contextmanager
    def opened(self, ranks: Ranks, *, overwrite: bool) -> Iterator[None]:
        """Hold the directory for this run: created, locked, freed of what a kill left behind.

        With `overwrite`, or without a checkpoint to continue from, what an earlier run wrote there
        is removed first; files of others stay.

        Raises:
            UserError: on all ranks: another process has it, or it cannot be written.
        """
        lock = Lock(self.lock)

        def prepare() -> None:
            make_folder(self.path)
            lock.acquire()
            remove_leftovers(self.path)
            if overwrite or not self.last.is_file():
                self.clear()

        try:
            main_decides(ranks, prepare)
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Remove what a run wrote."""
        for pattern in OURS:
            for path in sorted(self.path.glob(pattern)):
                try:
                    remove(path)
                except OSError as error:
                    raise write_error(path, error) from None

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


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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


def decide(wanted: RunDir, loaded: Loaded[Root]) -> tuple[RunDir, Decision]:
    """Which directory to use, and what to do there; reads only.

    A run without a checkpoint starts over in its place.

    Raises:
        UserError: another process has the directory, or the spec has changed.
    """
    on_existing = loaded.plain["training"]["on_existing"]
    if on_existing == "new":
        return beside(wanted), "start"
    check_free(wanted.lock)
    if not wanted.last.is_file() and not wanted.is_finished:
        return wanted, "start"
    if on_existing == "overwrite":
        return wanted, "overwrite"
    changes = changed_keys(read_json(wanted.config), loaded.plain)
    if changes:
        raise UserError(
            f"{wanted.path} holds a run of another spec: {listed(changes, 8, '; ')}."
            " Undo the changes to continue it, set"
            ' training.on_existing = "overwrite" to replace it or "new" to start beside it, or'
            " give this one another name"
        )
    return wanted, "finished" if wanted.is_finished else "resume"


def beside(wanted: RunDir) -> RunDir:
    """The wanted directory, or the first of <group>_2, <group>_3 ... whose fold is not there."""
    run, number = wanted, 1
    while run.path.exists():
        number += 1
        group = wanted.group.with_name(f"{wanted.group.name}_{number}")
        run = RunDir(group / wanted.path.name)
    return run


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
