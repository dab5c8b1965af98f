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
from glovita_lib.files import Lock, check_free

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
        with pytest.raises(UserError, match=expected):
            Lock(path).acquire()
        before = path.read_bytes()
        with pytest.raises(UserError, match=expected):
            check_free(path)
        assert path.read_bytes() == before
    finally:
        end(process)
    check_free(path)
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
    with pytest.raises(UserError, match="in use by this process"):
        check_free(path)
    probe = (
        "import sys; from pathlib import Path; from glovita_lib.files import check_free;"
        "check_free(Path(sys.argv[1]))"
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
    (tmp_path / "other").touch()
    check_free(tmp_path / "other")
    mine.release()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    check_free(tmp_path / "none" / ".lock")
    with pytest.raises(UserError, match="cannot write"):
        Lock(tmp_path / "none" / ".lock").acquire()
