"""Writing files atomically, reading the files of users, and the lock of a folder."""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any, BinaryIO

from filelock import lock_descriptor

from glovita_lib.errors import UserError, composed, meant, refuse_controls, visible

FILE_THREADS = 8  # file systems answer several readers faster than one, whatever the cores

# ----------------------------------------------------------------------- writing and reading
#
# A file is written under a temporary name, flushed, then renamed: it is whole at any moment.

TEMPORARY = ".tmp-"  # how temporary names begin; `remove_leftovers` takes them away after a kill
HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "your quota is used up: free some space",
    errno.EFBIG: "the largest allowed file size is reached: see ulimit -f",
    errno.EIO: "the disk reports an error: write to another one",
    errno.EROFS: "set exp_dir to a folder on a disk that can be written",
    errno.EACCES: "set exp_dir to a folder that you may write to",
    errno.EPERM: "set exp_dir to a folder that you may write to",
}


def write_error(path: Path | str, error: OSError) -> UserError:
    """The one line that says why a file or folder could not be written, and what to do."""
    hint = HINTS.get(error.errno or 0, "check the path and the disk")
    return UserError(f"cannot write {path}: {error.strerror or error}; {hint}")


def make_folder(path: Path | str) -> Path:
    """Create a folder and its parents; one that exists is fine.

    Raises:
        UserError: it cannot be created.
    """
    path = Path(path)
    for left in reversed(range(ATTEMPTS)):
        try:
            path.mkdir(parents=True, exist_ok=True)
            break
        except FileExistsError as error:  # or another process has removed the folder since
            if not left or (os.path.lexists(path) and not path.is_dir()):
                raise write_error(path, error) from None
        except OSError as error:
            raise write_error(path, error) from None
    return path


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path, with the suffix of `path`, that takes the place of `path` after the block.

    For libraries that open files by name. The folder is created where it is missing.

    Raises:
        UserError: disk full, read-only ...; the previous file is as it was and no temporary file
        is left.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno in HINTS or error.filename in (str(temporary), str(path.parent)):
            raise write_error(path, error) from None
        raise  # the block met an error with a file of its own
    finally:
        with suppress(OSError):
            temporary.unlink()  # also where dst was this very file: then the renaming did nothing


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` after the block; errors as `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or, for a folder, its entries, where the system
    opens folders."""
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that a killed process left anywhere below a folder."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        with suppress(OSError):
            remove(path)


def remove_killed(results: Path) -> None:
    """Remove the temporary files of results of a name, <kind>_<name>.<suffix> in a folder that
    others write to as well, which processes left that are gone."""
    for path in results.parent.glob(f"{TEMPORARY}*[-_]{escape(results.name)}.*"):
        process = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if process.isdecimal() and not is_running(int(process)):
            with suppress(OSError):
                remove(path)


def is_running(process: int) -> bool:
    """Whether there is a process of this number; unknown on Windows, where asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; a kill leaves all of a folder or none of it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith(TEMPORARY):
        path = path.rename(path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}"))
    shutil.rmtree(path)


# ---------------------------------------------------------------------- formats


def write_bytes(path: Path | str, content: bytes | memoryview) -> None:
    """Bytes, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path | str, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Indented JSON in the order of the value; see `plain` for what becomes of its parts."""
    text = json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_csv(path: Path | str, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """CSV with a header, whole or not at all, see `write_csv_to`."""
    with atomic_write(path) as file:
        write_csv_to(file, header, rows)


def write_csv_to(file: IO[bytes], header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """CSV with a header to an open file, which is closed; floats with as many digits as it takes
    to read them back equal."""
    with io.TextIOWrapper(file, "utf-8", newline="") as text:
        writer = csv.writer(PlainLineEnds(text), lineterminator="\r\n")
        writer.writerow(header)
        writer.writerows(rows)
        text.flush()


class PlainLineEnds:
    """Lines of csv.writer with the line end of text files. It quotes the characters of its own line
    end: a carriage return in a value ends no line where it is read."""

    def __init__(self, text: io.TextIOBase) -> None:
        self.text = text

    def write(self, line: str) -> None:
        """Write a whole line."""
        self.text.write(line.removesuffix("\r\n") + "\n")


def as_json(value: Any) -> Any:
    """A value as JSON knows it: numpy and torch numbers and arrays become numbers and lists,
    paths strings, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    return value


def read_json(path: Path | str, *names: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        names: what it must have.

    Raises:
        UserError: it is missing, not JSON, something else, or lacks a name.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not valid JSON ({error})"
        raise UserError(f"cannot read {path}: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"cannot read {path}: it holds {json.dumps(content)[:40]}, not an object of names and"
            " values; it was not written by glovita"
        )
    if absent := [name for name in names if name not in content]:
        raise UserError(
            f"cannot read {path}: it lacks {', '.join(absent)}; it was not written by glovita, or"
            " cut afterwards: train again, or put the file back"
        )
    return content


# ---------------------------------------------------------------------- JSON lines


def append_jsonl(path: Path | str, record: dict[str, Any]) -> None:
    """Add one record as one line; half a line that a kill left behind is cut off first.

    Raises:
        UserError: disk full, read-only ...
    """
    line = json.dumps(as_json(record), ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with open(path, "a+b") as file:
            drop_half_line(file)
            file.write(line.encode())
    except OSError as error:
        raise write_error(path, error) from None


def drop_half_line(file: IO[bytes]) -> None:
    """Cut a file back to its last line end."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """All whole records of a file; none where there is no file.

    Raises:
        UserError: a line that is not JSON, other than a half one at the end.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {number} is not JSON: {line[:80]!r}") from None
    return records


def truncate_jsonl(path: Path | str, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the records that a resumed run does not write again."""
    records = read_jsonl(path)
    kept = [record for record in records if keep(record)]
    if len(kept) == len(records):
        return
    lines = (json.dumps(record, ensure_ascii=False) for record in kept)
    write_text(path, "".join(line + "\n" for line in lines))


# ---------------------------------------------------------------------------- files of users


def open_regular(path: str) -> BinaryIO:
    """A file to be read, but no named pipe or device, for which one may wait for ever.

    Raises:
        UserError: one of those.
    """
    mode = os.stat(path).st_mode
    if not S_ISREG(mode) and not S_ISDIR(mode):  # of a folder open says so
        raise UserError("not a file, but a pipe or a device")
    return open(path, "rb")


def on_disk(path: Path) -> Path:
    """The path as the disk spells it, where a name in it is there in the other Unicode form alone:
    archives of a Mac hold decomposed names."""
    if str(path).isascii() or path.exists():
        return path
    folder = on_disk(path.parent)
    if not folder.is_dir():
        return path
    near = [name for name in os.listdir(folder) if composed(name) == composed(path.name)]
    return folder / near[0] if len(near) == 1 else path


def name_of(path: str | Path) -> str:
    """Name of a file or folder, also of one that is given as "." or "..", which results go by."""
    return os.path.basename(os.path.abspath(path)) or "root"


def stem_of(path: str | Path) -> str:
    """Name of a folder, where a point begins no suffix, or of a file without its suffix."""
    name = name_of(path)
    return name if os.path.isdir(path) else Path(name).stem


def read_json_table(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: missing or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def read_text(path: Path, newline: str | None = None) -> str:
    """Content of a UTF-8 file, without a byte-order mark.

    Args:
        newline: of `open`: none makes all line ends line feeds, "" leaves them as they are.

    Raises:
        UserError: missing, a folder or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            text = file.read()
        if "\0" in text:
            line = len(re.findall("\r\n?|\n", text[: text.index("\0")])) + 1
            raise UserError(f"{path}, line {line}: a NUL character; save it as UTF-8 text")
        return text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def lines_of(path: Path) -> list[str]:
    """Lines of a UTF-8 file, which line feeds and carriage returns alone end: names may hold the
    other characters at which `str.splitlines` cuts. Errors as `read_text`."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def separator_of(text: str, columns: list[str]) -> str:
    """Comma, semicolon or tab, whichever makes a header with most of the columns that must be
    there, then with most columns; marks inside quotes count for nothing."""

    def header_by(mark: str) -> tuple[int, int, bool]:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=mark))
        except csv.Error:
            return 0, 0, False
        there = {composed(name.strip()) for name in header}
        return sum(composed(name) in there for name in columns), len(header), mark == ","

    return max(",;\t", key=header_by)


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV file by column, see `read_cells`.

    Raises:
        UserError: as there, or a cell of the columns that is not one line of text.
    """
    columns = dict.fromkeys(columns)
    header, cells = read_cells(path, columns)
    rows = [{name: cell.strip() for name, cell in zip(header, row, strict=True)} for row in cells]
    for column in columns:
        refuse_controls(f'{path}: cells of "{column}"', {row[column]: None for row in rows})
    return rows


def read_cells(
    path: Path, columns: Iterable[str], may_be: Iterable[str | None] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file with a header, separated by comma, semicolon or tab; empty
    lines are left out.

    Args:
        columns: those that must be there, in either Unicode form; the header has them as given
            here, and others as they stand there.
        may_be: those that may be there, likewise.

    Raises:
        UserError: missing, empty, without one of the columns, or with a row of another length.
    """
    text = read_text(path, newline="")  # line ends inside quotes belong to the cell
    if text[:1] in ("", "\r", "\n"):
        raise UserError(f"{path}: no header; the first line must hold the column names")
    columns = list(columns)
    separator = separator_of(text, columns)
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error})") from None
    spelled = {composed(column): column for column in (*columns, *may_be) if column is not None}
    header = [spelled.get(composed(name.strip()), name.strip()) for name in header]
    for column in columns:
        if column not in header:
            raise UserError(
                f'{path}: no column "{column}"{meant(column, header)}; columns are'
                f" {', '.join(map(visible, header))}"
            )
        if header.count(column) > 1:
            raise UserError(f'{path}: several columns are named "{column}"; rename all but one')
    for number, row in enumerate(rows, 2):
        if row and len(row) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(row)} cells, the header has {len(header)}"
            )
    return header, [row for row in rows if row]


# ---------------------------------------------------------------------- the lock of a folder
#
# The lock of a folder is released by the system when the process that has it ends.

ATTEMPTS, PAUSE = 5, 0.1  # a look at the lock by another process holds it for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, int] = {}  # open lock files of this process


class InUse(UserError):
    """Another process holds a lock."""


class Lock:
    """A lock on a file that says who holds it.

    The system drops it when the process ends in any way, and worker processes do not keep it. The
    file stays, unless nothing else is in a folder that was made for it: then both are removed, and
    a process that has opened the removed file notices it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None
        self.made: list[Path] = []  # folders, the innermost first

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock, at once or when it comes free; its folder is created where it is missing.

        Raises:
            InUse: another process holds it (unless waiting).
            UserError: the file cannot be written.
        """
        name = os.path.realpath(self.path)
        if name in _held:
            raise InUse(taken(self.path, "this process"))
        handle = self.opened()
        while not self.take(handle, wait):
            handle = self.opened()
        self.handle = handle
        _held[name] = handle

    def opened(self) -> int:
        """The file, open; created with its folders where they are missing."""
        folder = self.path.parent
        for _ in range(ATTEMPTS):
            missing = [part for part in (folder, *folder.parents) if not part.exists()]
            make_folder(folder)
            self.made = self.made or missing
            try:
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process has just removed the folder that it made
                continue
            except OSError as error:
                raise write_error(self.path, error) from None
        raise InUse(taken(self.path, "another process"))

    def take(self, handle: int, wait: bool) -> bool:
        """Lock an open file and say in it who has it; False, and the file is closed, where its
        name belongs to no file or another one by now."""
        try:
            self.lock(handle, wait)
            if not is_file_at(self.path, handle):
                os.close(handle)
                return False
            os.ftruncate(handle, 0)
            # Windows lets nobody else read the locked byte, the first one: it says nothing.
            os.write(handle, f"\nprocess {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(handle)
            raise
        return True

    def lock(self, handle: int, wait: bool) -> None:
        """Lock an open file."""
        try:
            if not (lock_descriptor(handle) if wait else soon_locked(handle)):
                raise InUse(taken(self.path, owner(self.path)))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise write_error(self.path, error) from None
            note = f"note: the disk of {self.path.parent} has no file locks: see to it that"
            print(f"{note} no other process uses this folder", file=sys.stderr)

    def release(self) -> None:
        """Let others have it; twice is fine."""
        if self.handle is not None:
            os.ftruncate(self.handle, 0)
            self.tidy()
            os.close(self.handle)  # which drops the lock
            self.handle = None
            _held.pop(os.path.realpath(self.path), None)

    def tidy(self) -> None:
        """Remove folders that were made for the lock and hold nothing else."""
        with suppress(
            OSError
        ):  # others have put something there, or an open file cannot be removed
            if self.made and set(os.listdir(self.path.parent)) <= {self.path.name}:
                self.path.unlink(missing_ok=True)
                for folder in self.made:
                    folder.rmdir()
        self.made = []

    def __enter__(self) -> "Lock":
        """Wait for the lock and take it."""
        self.acquire(wait=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Let others have it."""
        self.release()


def soon_locked(handle: int) -> bool:
    """Whether an open file could be locked at once, or after the look of another process."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        if lock_descriptor(handle, blocking=False):
            return True
    return False


def close_inherited() -> None:
    """Close the lock files that a forked process has got: they would keep the locks of a process
    that has ended."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):  # elsewhere processes inherit nothing
    os.register_at_fork(after_in_child=close_inherited)


def is_file_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def owner(path: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(1)
            return file.read().decode().strip() or "another process"
    except OSError:
        return "another process"


def taken(path: Path, who: str) -> str:
    """The message for the second process."""
    return (
        f"{path.parent} is in use by {who}: wait for it or stop it, or start beside it with"
        ' training.on_existing = "new"'
    )
