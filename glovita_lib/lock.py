"""One process per folder: a lock that dies with the process that holds it."""

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from glovita_lib.files import write_error
from glovita_lib.spec import UserError

ATTEMPTS, PAUSE = 5, 0.1  # a look at the lock by another process holds it for a moment
TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[str] = set()  # of this process, for which POSIX locks never conflict


class Lock:
    """A POSIX record lock on a file that says who holds it.

    The system drops it when the process ends in any way, and worker processes do not inherit it.
    The file stays: were it removed, two processes could lock two files of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock, at once or when it comes free.

        Raises:
            UserError: another process holds it (unless waiting), or the file cannot be written.
        """
        name = os.path.realpath(self.path)
        if name in _held:
            raise UserError(taken(self.path, "this process"))
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise write_error(self.path, error) from None
        try:
            self.lock(handle, wait)
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(handle)
            raise
        self.handle = handle
        _held.add(name)

    def lock(self, handle: int, wait: bool) -> None:
        """Lock an open file."""
        for attempt in range(ATTEMPTS):
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                return
            except OSError as error:
                if error.errno in NO_LOCKS:
                    note = f"note: the disk of {self.path.parent} has no file locks: see to it that"
                    print(f"{note} no other process uses this folder", file=sys.stderr)
                    return
                if error.errno not in TAKEN:
                    raise write_error(self.path, error) from None
                if attempt == ATTEMPTS - 1:
                    raise UserError(taken(self.path, owner(self.path))) from None
            time.sleep(PAUSE)

    def release(self) -> None:
        """Let others have it; twice is fine."""
        if self.handle is not None:
            os.ftruncate(self.handle, 0)
            os.close(self.handle)  # which drops the lock
            self.handle = None
            _held.discard(os.path.realpath(self.path))

    def __enter__(self) -> "Lock":
        """Wait for the lock and take it."""
        self.acquire(wait=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Let others have it."""
        self.release()


def check_free(path: Path) -> None:
    """Look at a lock without taking it or writing anything.

    Raises:
        UserError: a process holds it.
    """
    if os.path.realpath(path) in _held:  # opening the file here would drop our own lock
        raise UserError(taken(path, "this process"))
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            raise UserError(taken(path, owner(path))) from None
    finally:
        os.close(handle)


def owner(path: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


def taken(path: Path, who: str) -> str:
    """The message for the second process."""
    return (
        f"{path.parent} is in use by {who}: wait for it or stop it, or start beside it with"
        ' training.on_existing = "new"'
    )
