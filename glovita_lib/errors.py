"""Mistakes of the user: one error type, what was meant, functions that a spec names, and what a
report of an error says about software and device."""

import importlib
import inspect
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from glovita_lib import __version__

# --------------------------------------------------------------------------------- the error


class UserError(Exception):
    """A mistake of the user: the message is shown without a traceback, exit code 2.

    The message says what was offered, what is valid and how to mend it; several mistakes are
    several lines.
    """


def refuse(section: str, problems: Iterable[tuple[str, str]]) -> None:
    """Refuse the problems of a section, each a key of it and what is wrong.

    Raises:
        UserError: a line for each, if there are any.
    """
    if lines := [f"{section}.{key}: {text}" for key, text in problems]:
        raise UserError("\n".join(lines))


LONGEST_NAME = 160  # characters of a group directory; file systems allow 255 bytes


def file_name(text: str) -> str:
    """The text as a file name; where that loses something, its checksum keeps it unique."""
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[: LONGEST_NAME - 9]}-{zlib.crc32(text.encode()):08x}"


# ------------------------------------------------------------------- files inside packages

PACKAGE = "package:"  # begins a path inside an installed package, package:NAME/path


class InPackage(NamedTuple):
    """A file that a package brings."""

    path: str | None
    """Where it is; None: the package is not installed."""
    cure: str
    """What installs the package."""


def in_package(text: str) -> InPackage | None:
    """What a path package:NAME/path means; the package is found, not imported. None: another
    path."""
    if not text.startswith(PACKAGE):
        return None
    name, _, inside = text.removeprefix(PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    folder = next(iter(found.submodule_search_locations or ()), None) if found else None
    path = os.path.join(folder, inside) if folder is not None else None
    return InPackage(path, f"pip install --no-deps {name.replace('_', '-')}")


# ----------------------------------------------------------------------------- nearest words


def composed(text: str) -> str:
    """A text in Unicode's composed form (NFC), in which names are compared: a Mac writes an umlaut
    as two characters, other systems as one."""
    return unicodedata.normalize("NFC", text)


def key_of(name: str) -> str:
    """What the name of a sample is compared by: its composed form without spaces around it, which
    cells of tables have none of."""
    return composed(name).strip()


CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Line ends, other control characters, and bytes of file names that are no UTF-8."""


def visible(text: str) -> str:
    """A text whose control characters are written as their numbers."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def refuse_controls(what: str, names: Iterable[str]) -> None:
    """The gate of all names that are read: each is one line of text, which tables, logs, arrays and
    pages hold as it is.

    Raises:
        UserError: some are not; all of them are counted.
    """
    names = list(names)
    if others := {type(name).__name__ for name in names if not isinstance(name, str)}:
        raise UserError(f"{what} must be strings, not {listed(sorted(others))}")
    if not CONTROL.search("".join(names)):
        return
    bad = [f'"{visible(name)}"' for name in names if CONTROL.search(name)]
    text = f"{what} with line ends or other control characters: {listed(bad, 5)}; rename them"
    raise UserError(ended(with_all(text, bad, 5)))


def nearest_word(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that was probably meant; None if none is near."""
    from difflib import get_close_matches  # only ever needed for a message

    spelled = {entry.lower(): entry for entry in words}
    found = get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[found[0]] if found else None


def meant(word: str, words: list[str]) -> str:
    """The question after the nearest valid word; empty if none is near."""
    near = nearest_word(word, words)
    return f'; did you mean "{near}"?' if near and near != word else ""


# ---------------------------------------------------------------------------------- long lists


def listed(names: Iterable[object], most: int = 10, mark: str = ", ") -> str:
    """The first names, and how many more there are; a mark with a line break puts each, and the
    number of the others, on a line of its own.

    >>> listed("abcde", 3), listed("ab"), listed([])
    ('a, b, c and 2 more', 'a, b', 'none')
    """
    names = list(names)
    more = f"and {len(names) - most} more"
    rest = (f"{mark}... {more}" if "\n" in mark else f" {more}") if len(names) > most else ""
    return (mark.join(map(str, names[:most])) or "none") + rest


SHOWN_LINES = 20  # below a heading


def itemized(head: str, lines: Iterable[str]) -> str:
    """A heading and, below it, a line for each of what is left out or must be mended: all of them.

    >>> itemized("2 files are empty:", ["a", "b"])
    '2 files are empty:\\n  a\\n  b'
    """
    return "\n  ".join([head, *lines])


def with_all(text: str, names: Iterable[object], most: int = 10) -> str:
    """A text in which the first of some names are `listed`, with all of them below it where there
    are more."""
    names = list(names)
    return text if len(names) <= most else itemized(f"{text}; all of them:", map(str, names))


def ended(text: str) -> str:
    """An itemized text, where it has many lines with its heading once more behind them, as a
    terminal shows the end."""
    head, *lines = text.split("\n")
    again = head.removesuffix(":").removesuffix("; all of them")
    return f"{text}\n{again}" if len(lines) > SHOWN_LINES else text


def shortened(text: str, whole: str) -> str:
    """An itemized text with its first lines, for a place where many disturb.

    Args:
        whole: where all of them are.
    """
    head, *lines = text.split("\n")
    more = f"  ... and {len(lines) - SHOWN_LINES} more, all in {whole}"
    return "\n".join([head, *lines[:SHOWN_LINES], *([more] if len(lines) > SHOWN_LINES else [])])


# ----------------------------------------------------------------- functions named in a spec
#
# Other people's code: functions named in the spec as "package.module:function", and what their
# errors say.


def is_target(text: str) -> bool:
    """Whether a text names a function as package.module:function."""
    return re.fullmatch(r"\w+(\.\w+)*:\w+", text) is not None


def find_target(key: str, target: str) -> Callable[..., Any]:
    """The function of a `target`.

    Raises:
        UserError: malformed, no such module or no such function.
    """
    if not is_target(target):
        raise UserError(f'{key}.target = "{target}": write it as "package.module:function"')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command has its own folder there instead
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks something itself
        raise UserError(
            f'{key}.target = "{target}": no module {error.name}; run from the folder it lies in or'
            " install it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise UserError(
            f'{key}.target = "{target}": {module_name} has no function {name}; it has'
            f" {listed(names, 20)}"
        )
    return function


def call_target(key: str, target: str, *args: Any, **options: Any) -> Any:
    """Call the function of a `target`.

    Raises:
        UserError: as `find_target`, or arguments that the function does not take.
    """
    function = find_target(key, target)
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise UserError(
            f'{key}.target = "{target}": {error}; it is called with {", ".join(options)}'
        ) from error
    return function(*args, **options)


def reason(error: Exception) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------- what a report of an error says

PACKAGES = ("torch", "torchvision", "timm", "h5py", "numpy", "scikit-learn", "safetensors", "wandb")


def version_text() -> str:
    """What a report of an error must say, a line each; written also where a package is missing."""
    facts = environment()
    found, git = facts["versions"], facts["glovita_git"]
    changed = " with changes" if git and git["dirty"] else ""
    commit = f", commit {git['commit']}{changed}" if git else ""
    hdf5 = f" (HDF5 {found['hdf5']})" if found["hdf5"] else ""
    packages = [f"{name} {found[name] or 'not installed'}" for name in PACKAGES]
    cuda = f", CUDA {facts['cuda']}, cuDNN {facts['cudnn']}" if facts["cuda"] else ""
    return "\n".join(
        [
            f"glovita {found['glovita']}{commit}",
            f"Python {found['python']} on {facts['platform']}",
            *(f"{line}{hdf5}" if line.startswith("h5py") else line for line in packages),
            f"device {facts['device']}{cuda}, {facts['cpu_cores']} CPU cores",
        ]
    )


def environment(device: Any = None) -> dict[str, Any]:
    """Software and device that compute a result.

    Args:
        device: torch.device; none: the first that torch can use.
    """
    import platform

    torch = importable("torch")
    if device is None and torch is not None:
        mps = torch.backends.mps.is_available()
        device = torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    gpu = torch if torch is not None and device.type == "cuda" else None
    return {
        "platform": platform.platform(),
        "device": gpu.cuda.get_device_name(device) if gpu else getattr(device, "type", None),
        "cpu_cores": os.cpu_count(),
        "cuda": gpu.version.cuda if gpu else None,
        "cudnn": gpu.backends.cudnn.version() if gpu else None,
        "glovita_git": own_commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what computes the result; None: not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {"glovita": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        found[package] = None
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if (torch := importable("torch")) is not None:
        found["torch"] = torch.__version__  # with the build, e.g. +cpu
    h5py = importable("h5py")
    return found | {"hdf5": None if h5py is None else h5py.version.hdf5_version}


def importable(name: str) -> ModuleType | None:
    """A package; None where it is missing or broken."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library of it
        return None


def own_commit() -> dict[str, Any] | None:
    """`git_state` of a checkout that glovita runs from; None where it was installed."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return git_state(root) if os.path.exists(os.path.join(root, ".git")) else None


def git_state(folder: str) -> dict[str, Any] | None:
    """Commit of a folder and whether tracked files differ from it; None outside a repository."""
    commit = git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def git(folder: str, *arguments: str) -> str | None:
    """What a git command prints; None where it fails or there is no git."""
    import subprocess

    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
