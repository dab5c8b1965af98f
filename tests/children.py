"""Child processes that start in a tenth of a second: forks of one server that has torch imported.

A new interpreter takes four seconds to import torch and timm; a fork of the server takes none of
them. The server starts with the first child and ends with the tests.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
GLOVITA = "import sys, glovita; sys.exit(glovita.main(sys.argv[1:]))"
PRELOADED = ["timm", "torchvision", "h5py", "glovita_lib.run_train", "glovita_lib.run_extract"]

SERVER = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a lock


@dataclass(frozen=True)
class Done:
    """A child that has ended: exit code, minus the signal where one ended it, and its output."""

    code: int
    out: str


class Child:
    """A running script; standard output and errors go to one file."""

    def __init__(
        self, code: str, arguments: Sequence[object] = (), env: Mapping[str, str] | None = None
    ) -> None:
        SERVER.set_forkserver_preload(PRELOADED)
        self.folder = TemporaryDirectory()
        self.output = Path(self.folder.name) / "out.txt"
        self.output.touch()
        argv = [str(argument) for argument in arguments]
        self.process = SERVER.Process(
            target=run_script, args=(code, argv, dict(env or {}), str(self.output))
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self.process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    def says(self, word: str, timeout: float = 60) -> None:
        """Wait until it has printed a word."""
        end = time.monotonic() + timeout
        while word not in self.out:
            assert self.process.is_alive() and time.monotonic() < end, self.out
            time.sleep(0.002)

    def kill(self) -> Done:
        """SIGKILL."""
        self.process.kill()
        return self.wait()

    def wait(self, timeout: float = 150) -> Done:
        """Its end; a child that is still there after `timeout` seconds is killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still there after {timeout} s\n{self.out}")
        done = Done(self.process.exitcode, self.out)
        self.folder.cleanup()
        return done


def run_script(code: str, argv: list[str], env: dict[str, str], output: str) -> None:
    """In the child: the script, as `python -c CODE ARGUMENTS` in the repository runs it."""
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env})
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.argv = ["-c", *argv]
    try:
        exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def run(code: str, *arguments: object, env: Mapping[str, str] | None = None) -> Done:
    """A script from start to end."""
    return Child(code, arguments, env).wait()


def run_ranks(code: str, *arguments: object, world: int = 2) -> list[Done]:
    """A script as the ranks of one run; where one fails the others are ended, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    place["LOCAL_WORLD_SIZE"] = str(world)
    ranks = [
        Child(code, arguments, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    end = time.monotonic() + 150
    while any(child.process.is_alive() for child in ranks) and time.monotonic() < end:
        time.sleep(0.01)
        if any(child.process.exitcode for child in ranks):
            time.sleep(2)  # the others may have words of their own
            break
    return [child.kill() if child.process.is_alive() else child.wait() for child in ranks]


def glovita(
    *arguments: object, ranks: int = 1, code: int = 0, env: Mapping[str, str] | None = None
) -> str:
    """What `glovita.py ARGUMENTS` says as so many ranks; fails where the exit code is another.
    `env` is of one rank."""
    if ranks > 1:
        done = run_ranks(GLOVITA, *arguments, world=ranks)
    else:
        done = [run(GLOVITA, *arguments, env=env)]
    out = "".join(one.out for one in done)
    assert {one.code for one in done} == {code}, f"exit codes {[one.code for one in done]}\n{out}"
    return out
