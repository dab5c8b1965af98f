"""Specs: loading TOML files with `extends` and overrides, their errors, and writing them back.

The Structs of the sections are in `spec_data`, `spec_model`, `spec_train` ...; nothing here knows
them.
"""

import os
import re
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect as kinds

from glovita_lib import spec_errors, spec_types
from glovita_lib.spec_merge import OVERRIDE, Merge, override


class UserError(Exception):
    """A mistake of the user: the message is shown without a traceback, exit code 2.

    The message says what was offered, what is valid and how to mend it; several mistakes are
    several lines.
    """


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the spec; every field has a default or is required, a bound and a docstring with
    its unit."""


NOT_THE_EXPERIMENT = (
    "mode",
    "name",
    "exp_dir",
    "extends",
    "logger",
    "add_log",
    "infer",
    "extract",
    "umap",
    "probe",
    "training.on_existing",
    "training.log_every",
    "dataloading.num_workers",
    "dataloading.pin_memory",
    "dataloading.persistent_workers",
    "dataloading.prefetch_factor",
    "dataloading.timeout",
    "dataloading.in_memory_mb",
    "data.fold",
)
"""Keys and sections that may change without making another experiment of a spec: they say where
and how fast it runs, what is logged, and which of its folds."""

LONGEST_NAME = 160  # characters of a group directory; file systems allow 255 bytes


@dataclass(frozen=True)
class Loaded:
    """A spec as it was asked for and as it was understood."""

    root: Any
    """The root Struct, all sections filled in."""
    path: str
    """The file, as it was given."""
    overrides: tuple[str, ...]
    """The overrides, as they were given."""
    group: str
    """Name of the run's group directory."""
    plain: dict
    """The root as builtin types, defaults filled in."""


def load(path: str | os.PathLike, overrides: Sequence[str], root_type: type[Spec]) -> Loaded:
    """Read a spec, lay it over what it extends, lay the overrides over it and check every key.

    Raises:
        UserError: one line for each mistake: file, key, what was offered, what is valid.
    """
    path = os.fspath(path)
    kind = kinds.type_info(root_type)
    merge = Merge(kind)
    problems: list[str] = []
    tables = extended(path, merge, problems, ())
    tables, keys, mistakes = override(tables, overrides, merge)
    problems += [f"{path}: {mistake}" for mistake in mistakes]
    root, found = spec_errors.convert(tables, root_type, kind)
    for key, text in found:
        place = f"{spec_types.dotted(key)}: " if key else ""
        problems.append(f"{located(merge.origins.of(key), path)}{place}{text}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    plain = to_plain(root)
    return Loaded(root, path, tuple(overrides), group_name(path, plain, keys), plain)


def located(origin: str | None, path: str) -> str:
    """Where a key comes from; for an override the file it was meant for, too."""
    return f"{path}: {OVERRIDE} " if origin == OVERRIDE else f"{origin or path}: "


def read_tables(path: str) -> dict:
    """The tables of one TOML file.

    Raises:
        UserError: the file is missing, unreadable or not TOML (with the line).
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors write a byte order mark
            return tomllib.loads(file.read())
    except FileNotFoundError:
        raise UserError(f"{path}: no such spec file{similar_file(path)}") from None
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = place.rstrip(")").split(",")[0] if place else ""
        raise UserError(f"{path}: {line + ': ' if line else ''}not TOML: {message}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.start} cannot be read") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def similar_file(path: str) -> str:
    """The question after a file of a similar name beside the missing one."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder or "."):
        return f"; there is no folder {folder}"
    near = spec_types.nearest(os.path.basename(path), os.listdir(folder or "."))
    return f"; did you mean {os.path.join(folder, near)}?" if near else ""


def extended(path: str, merge: Merge, problems: list[str], chain: tuple[str, ...]) -> dict:
    """The tables of a file, laid over those of the file that it extends."""
    if any(os.path.realpath(path) == os.path.realpath(earlier) for earlier in chain):
        raise UserError(f"{chain[0]}: extends goes in a circle: {' -> '.join([*chain, path])}")
    tables = read_tables(path)
    parent = tables.pop("extends", None)
    base = {}
    if isinstance(parent, str):
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), parent))
        if not os.path.isfile(base_path):
            raise UserError(
                f'{path}: extends: no such spec file: "{parent}" is looked for as {base_path}'
                f"{similar_file(base_path)}"
            )
        base = extended(base_path, merge, problems, (*chain, path))
    elif parent is not None:
        problems.append(
            f"{path}: extends: {spec_types.shown(parent)} is not valid: it must be a string"
        )
    return merge(base, tables, path)


def to_plain(root: Spec) -> dict:
    """A spec as dict, list, str, int, float, bool and None, with all defaults and tags."""
    return with_lists(msgspec.to_builtins(root))


def with_lists(value: Any) -> Any:
    """Tuples as lists, as JSON and TOML read them."""
    if isinstance(value, dict):
        return {key: with_lists(entry) for key, entry in value.items()}
    return [with_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def dump(root: Spec) -> str:
    """A spec as TOML that loads back to an equal one; unset keys are left out, as TOML has none.

    Every optional key has the default none, so that leaving it out says the same.
    """
    from datetime import date, datetime, time  # TOML has them, JSON does not

    import tomli_w

    plain = msgspec.to_builtins(root, builtin_types=(datetime, date, time))
    return tomli_w.dumps(without_none(plain))


def without_none(value: Any) -> Any:
    """Tables without their unset keys."""
    if isinstance(value, dict):
        return {key: without_none(v) for key, v in value.items() if v is not None}
    return value


def changes_experiment(key: str) -> bool:
    """Whether another value of a dotted key makes another experiment."""
    return not any(key == same or key.startswith(f"{same}.") for same in NOT_THE_EXPERIMENT)


def changed_keys(old: dict, new: dict) -> list[str]:
    """Differences of two plain specs that make another experiment, as "key: old -> new"."""
    before, after = dict(flattened(with_lists(old))), dict(flattened(with_lists(new)))
    return [
        f"{key}: {spec_types.shown(before.get(key))} -> {spec_types.shown(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and changes_experiment(key)
    ]


def flattened(table: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def group_name(path: str, plain: dict, overridden: Iterable[tuple[str, ...]]) -> str:
    """Group directory of a run: its name, else the file name and the overrides that matter.

    The values are those that were understood, so lr=3e-4 and lr=0.0003 are one group.
    """
    if plain.get("name"):
        return plain["name"]
    stem = os.path.splitext(os.path.basename(path))[0]
    keys = sorted({spec_types.dotted(key): key for key in overridden}.items())
    parts = [f"{key}={written(plain, at)}" for key, at in keys if changes_experiment(key)]
    return file_name(",".join([stem, *parts]))


def written(plain: dict, path: tuple[str, ...]) -> str:
    """The value at a path as it stands in a file name."""
    value: Any = plain
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, list):
        return "+".join(str(entry) for entry in value)
    return value if isinstance(value, str) else spec_types.shown(value)


def file_name(text: str) -> str:
    """The text as a file name; where that loses something, its checksum keeps it unique."""
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[: LONGEST_NAME - 9]}-{zlib.crc32(text.encode()):08x}"
