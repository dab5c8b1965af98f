"""Checkpoints: tensors and plain values in one file, the same bytes for the same state."""

import errno
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from glovita_lib.errors import UserError, listed
from glovita_lib.files import atomic_path, atomic_write

MARK, VERSION = "glovita_checkpoint", 1
ZIP = b"PK\x03\x04"  # how a file of torch.save begins


def save(path: Path | str, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values (None, bool, int, float, str, list, tuple, dict).

    Equal states give equal bytes, whatever the file is called.

    Raises:
        UserError: disk full, read-only ...; the previous file is as it was.
        TypeError: a value of another type, by its key.
    """
    content = canonical({MARK: VERSION, **state}, "")
    with atomic_write(path) as file:
        stream = Stream(file)
        try:
            torch.save(content, stream)  # type: ignore[arg-type]  # it needs no more than write
        except RuntimeError as error:  # torch hides what went wrong with the file
            raise stream.error or error from None


class Stream:
    """A file that remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Hand on to the file."""
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand on to the file."""
        self.file.flush()


def canonical(value: Any, key: str) -> Any:
    """A copy whose pickle depends on its value alone.

    Pickle writes an object that it meets again as a reference, so equal strings must be one object
    and containers never; tensors share no memory, are on the CPU and have the strides of their
    shape.
    """
    if isinstance(value, dict):
        return {
            canonical_key(name, key): canonical(entry, f"{key}.{name}" if key else str(name))
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, list) else tuple
        return kind(canonical(entry, f"{key}[{i}]") for i, entry in enumerate(value))
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, float):  # numpy.float64
        return float(value)
    if type(value) is str:
        return sys.intern(value)
    raise TypeError(f"checkpoint key {key} is a {type(value).__name__}, not a plain value")


def canonical_key(name: Any, key: str) -> str | int:
    """A key of a dict: a string, or an integer as in an optimizer's state."""
    if type(name) not in (str, int):
        raise TypeError(f"checkpoint key {key} has an entry named by a {type(name).__name__}")
    return canonical(name, key)


def link(src: Path | str, dst: Path | str) -> None:
    """Make dst the file that src is now, without copying where the disk allows it.

    A later `save` to src replaces its name and leaves dst alone.
    """
    with atomic_path(dst) as temporary:
        try:
            os.link(src, temporary)
        except (AttributeError, OSError) as error:  # not every platform and disk has links
            own = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT)
            if getattr(error, "errno", None) in own:
                raise
            shutil.copyfile(src, temporary)


def load(
    path: Path | str, map_location: str | torch.device, *, mapped: bool = False
) -> dict[str, Any]:
    """The state that `save` wrote.

    Args:
        mapped: whether tensors are read only where they are looked at.

    Raises:
        UserError: missing, truncated, or not written by `save`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} {absence(path)}")
    damaged = UserError(
        f"checkpoint {path} is truncated or damaged ({path.stat().st_size:,} bytes): give another"
        " one, or remove the run's folder to train again"
    )
    try:
        with open(path, "rb") as file:
            start = file.read(len(ZIP))
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if start != ZIP:
        raise damaged if ZIP.startswith(start) else UserError(foreign(path, "is of another format"))
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(foreign(path, "holds other things than tensors and values")) from None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the reader meets damage with errors of many types
        raise damaged from None
    if not isinstance(state, dict) or MARK not in state:
        raise UserError(foreign(path, "was not written by glovita"))
    if state.pop(MARK) != VERSION:
        raise UserError(f"checkpoint {path} is of a newer version of glovita: update glovita")
    return state


def absence(path: Path) -> str:
    """Why a path is no file, and the checkpoints beside or below it."""
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.rglob("*.pt")) if folder.is_dir() else []
    what = "is a folder" if path.is_dir() else "does not exist"
    if found:
        return f"{what}: give one of {listed(found, 8)}"
    return f"{what}: train the spec first, or give the path of a file such as best.pt"


def foreign(path: Path, what: str) -> str:
    """The message about a file of another program."""
    return (
        f"{path} is no checkpoint of a run (it {what}): give checkpoints/best.pt of a run; weights"
        ' of other programs are read by model.encoder.weights = "<file>"'
    )


def load_model(model: nn.Module, state_dict: dict[str, Tensor], path: Path | str) -> None:
    """Load weights strictly.

    Raises:
        UserError: they are those of another architecture; the first differences are named.
    """
    own = model.state_dict()
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    differences = {
        "missing": [key for key in own if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in own],
        "of another shape": shapes,
    }
    if any(differences.values()):
        parts = [
            f"{len(keys)} {what} ({listed(keys, 3)})" for what, keys in differences.items() if keys
        ]
        raise UserError(
            f"checkpoint {path} is of another architecture than the spec's model, tensors:"
            f" {', '.join(parts)}; use the spec that it was trained with"
        )
    model.load_state_dict(state_dict)
