"""Other people's code: functions named in the spec as "package.module:function", and what their
errors say."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from glovita_lib.spec import UserError


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
