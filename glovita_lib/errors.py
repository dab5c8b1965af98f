"""Mistakes of the user: one error type, what was meant, and functions that a spec names."""

import importlib
import inspect
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

# --------------------------------------------------------------------------------- the error


class UserError(Exception):
    """A mistake of the user: the message is shown without a traceback, exit code 2.

    The message says what was offered, what is valid and how to mend it; several mistakes are
    several lines.
    """


LONGEST_NAME = 160  # characters of a group directory; file systems allow 255 bytes


def file_name(text: str) -> str:
    """The text as a file name; where that loses something, its checksum keeps it unique."""
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[: LONGEST_NAME - 9]}-{zlib.crc32(text.encode()):08x}"


# ----------------------------------------------------------------------------- nearest words


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
    """The first names, and how many more there are.

    >>> listed("abcde", 3)
    'a, b, c and 2 more'
    """
    words = [str(name) for name in names]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return mark.join(words[:most]) + more


# ----------------------------------------------------------------- functions named in a spec
#
# Other people's code: functions named in the spec as "package.module:function", and what their
# errors say.


def find_target(key: str, target: str) -> Callable[..., Any]:
    """The function of a `target`.

    Raises:
        UserError: malformed, no such module or no such function.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise UserError(f'{key}.target = "{target}": write it as "package.module:function"')
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
            f" {', '.join(names) or 'none'}"
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
