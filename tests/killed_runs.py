"""Runs that are stopped in training, and what must be equal after they went on."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load as tensors
from small_runs import snapshot

from glovita_lib.trainer import Trainer, TrainState

TIMES = ("seconds", "samples_per_s", "memory_mb")


# A rank that is killed before optimizer step argv[1] + 1, where argv[1] is not negative.
KILLED = """
import os, sys, time
import glovita
from glovita_lib.trainer import Trainer

stop, train_batch = int(sys.argv[1]), Trainer.train_batch

def killing(self, batch):
    if self.state.step == stop:
        time.sleep(0 if self.ranks.is_main else 1)
        os._exit(9)
    train_batch(self, batch)

Trainer.train_batch = killing
sys.exit(glovita.main(sys.argv[2:]))
"""


class Killed(BaseException):
    """Nothing catches it."""


@contextmanager
def stopped(
    monkeypatch: pytest.MonkeyPatch,
    when: Callable[[TrainState], bool],
    *,
    behind: bool = False,
    error: type[BaseException] = Killed,
) -> Iterator[None]:
    """A run inside raises `error` at the first optimizer step for whose state `when` holds: before
    the step, or `behind` it and before anything is saved. `Killed` must come out of the run."""
    step = Trainer.optimizer_step

    def stopping(self: Trainer) -> None:
        if not behind and when(self.state):
            raise error
        step(self)
        if behind and when(self.state):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", stopping)
        with pytest.raises(Killed) if error is Killed else nullcontext():
            yield


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> AbstractContextManager[None]:
    """Runs inside are stopped as by Ctrl-C behind an optimizer step, before it is saved."""
    return stopped(
        monkeypatch, lambda state: state.step == step, behind=True, error=KeyboardInterrupt
    )


def results(folder: Path) -> dict[str, Any]:
    """What must be equal, by relative path: everything but times and the story of the process."""
    content: dict[str, Any] = dict(snapshot(folder))
    for name in list(content):
        if name.endswith(("runtime_info.json", ".lock")):
            del content[name]
        elif name.endswith("metrics.jsonl"):
            records = map(json.loads, content[name].decode().splitlines())
            content[name] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
        elif name.endswith(".safetensors"):  # whose header has no fixed order
            content[name] = {k: v.tolist() for k, v in tensors(content[name]).items()}
    return content


def assert_equal_results(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All files are equal, checkpoints bit for bit."""
    assert found.keys() == expected.keys() and len(expected) > 5
    assert [name for name in expected if found[name] != expected[name]] == []


def arguments(folder: Path, spec: str, *changes: str) -> list[object]:
    """Command line of a spec whose runs lie below a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "volumes.toml").write_text(spec)
    return [folder / "volumes.toml", "--override", f"exp_dir={folder}/runs", "name=run", *changes]


def assert_killed_run_goes_on(command, tmp_path, monkeypatch, spec, said, *changes):
    """A run of four steps an epoch, which says something, that is killed after step 5 and continued
    equals one that is not."""
    calm = command("name=run", *changes, spec=spec)
    assert said in calm.out + calm.err
    expected = results(tmp_path / "runs")
    os.rename(tmp_path / "runs", tmp_path / "calm")
    with stopped(monkeypatch, lambda state: state.step == 5):
        command("name=run", *changes, spec=spec)
    again = command("name=run", *changes, spec=spec)
    assert "continuing in epoch 2 after optimizer step 5" in again.out
    assert_equal_results(results(tmp_path / "runs"), expected)
