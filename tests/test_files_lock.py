"""A lock that dies with its process and that worker processes do not keep."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glovita_lib import files
from glovita_lib.errors import UserError
from glovita_lib.files import InUse, Lock

HOLD = """
import os, sys, time
from pathlib import Path
from glovita_lib.files import Lock
Lock(Path(sys.argv[1])).acquire()
child = os.fork() if "fork" in sys.argv else 1  # a data loader's worker that outlives us
if child:
    print(child, flush=True)
time.sleep(60)
"""


def hold(path: Path, *arguments: str) -> tuple[subprocess.Popen, int]:
    root = str(Path(files.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *arguments],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
    )
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.processes
def test_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process, _ = hold(path)
    try:
        expected = f"in use by process {process.pid} on {socket.gethostname()}: wait"
        before = path.read_bytes()
        with pytest.raises(InUse, match=expected):
            Lock(path).acquire()
        assert path.read_bytes() == before
    finally:
        end(process)
    mine = Lock(path)
    mine.acquire()
    mine.release()
    mine.release()


@pytest.mark.processes
def test_lock_dies_with_kill_although_a_worker_lives(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process, worker = hold(path, "fork")
    try:
        with pytest.raises(UserError, match="in use"):
            Lock(path).acquire()
        end(process)
        os.kill(worker, 0)  # the worker lives
        mine = Lock(path)
        mine.acquire()
        assert path.read_text().startswith(f"\nprocess {os.getpid()} ")
        mine.release()
        assert path.read_text() == ""
    finally:
        os.kill(worker, signal.SIGKILL)


def test_same_process_twice(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    mine = Lock(path)
    mine.acquire()
    with pytest.raises(UserError, match="in use by this process"):
        Lock(tmp_path / "." / ".lock").acquire()
    probe = (
        "import sys; from pathlib import Path; from glovita_lib.files import Lock;"
        "Lock(Path(sys.argv[1])).acquire()"
    )
    env = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", probe, str(path)], env=env, capture_output=True, text=True
    )
    assert f"in use by process {os.getpid()}" in result.stderr
    mine.release()
    Lock(path).acquire()
    files._held.clear()


@pytest.mark.processes
def test_waiting(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process, _ = hold(path)
    started = time.monotonic()
    with subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"]), Lock(path):
        assert time.monotonic() - started > 0.1
    process.wait()
    process.stdout.close()


def test_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock_descriptor", refuse)
    mine = Lock(tmp_path / ".lock")
    mine.acquire()
    (said,) = capsys.readouterr().err.splitlines()
    assert "has no file locks" in said
    mine.release()


def test_folders_made_for_the_lock_go_with_it_unless_something_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / ".lock"
    mine = Lock(path)
    mine.acquire()
    mine.release()
    assert os.listdir(tmp_path) == []
    mine.acquire()
    (tmp_path / "a" / "other").touch()
    mine.release()
    assert sorted(os.listdir(tmp_path / "a")) == ["other"]
    mine.acquire()
    (path.parent / "results").touch()
    mine.release()
    assert sorted(os.listdir(path.parent)) == [".lock", "results"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        Lock(tmp_path / "file" / ".lock").acquire()


TAKE_TURNS = """
import sys, time
from pathlib import Path
from glovita_lib.files import InUse, Lock
path, end = Path(sys.argv[1]), time.monotonic() + 2
while time.monotonic() < end:
    lock = Lock(path)
    try:
        lock.acquire(wait="wait" in sys.argv)
    except InUse:
        continue
    mark = path.with_name("mark")
    mark.touch(exist_ok=False)  # fails where two have the lock
    mark.unlink()
    lock.made = [path.parent]  # also where the other one made it
    lock.release()
print("done")
"""


@pytest.mark.processes
def test_a_removed_lock_file_is_nobodys_lock(tmp_path: Path) -> None:
    """Two processes that make and remove the folder of the lock again and again, one of which
    opens the file that the other removes."""
    root = str(Path(files.__file__).parents[1])
    others = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "a" / ".lock"), *how],
            env=os.environ | {"PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for how in (["wait"], ["wait"])
    ]
    assert [other.communicate()[0] for other in others] == ["done\n"] * 2
