"""How tables of a spec are laid over others: `extends` and `--override`.

Tables merge key by key, arrays and values replace. Where the tag of a union changes, the table of
the other member is dropped, so no field of it is left behind.
"""

import tomllib
from collections.abc import Sequence
from typing import Any

from msgspec import inspect as kinds
from msgspec.inspect import StructType, Type

from glovita_lib import spec_types as types

Path = tuple[str, ...]
OVERRIDE = "--override"  # where a value comes from that is in no file


class Unset:
    """The value of an override that takes a key away."""


UNSET = Unset()


class Origins(dict[Path, str]):
    """Which file, or OVERRIDE, a key comes from."""

    def of(self, path: Path) -> str | None:
        """Origin of a key, or of the nearest table around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self:
                return self[path[:length]]
        return None

    def forget(self, path: Path) -> None:
        """Drop what is known of a table that is replaced."""
        for key in [key for key in self if key[: len(path)] == path]:
            del self[key]


class Merge:
    """Lays tables over each other and remembers where each key came from."""

    def __init__(self, root: StructType) -> None:
        self.root = root
        self.origins = Origins()

    def __call__(self, base: dict, patch: dict, source: str) -> dict:
        """`base` with the keys of `patch`, which come from `source`."""
        return self.table(base, patch, (self.root, None), (), source)

    def table(
        self, base: dict, patch: dict, kind: tuple[Type | None, Any], path: Path, source: str
    ) -> dict:
        """One table; `kind` is its type and the default of its field."""
        if changes_tag(base, patch, *kind):
            base = {}
            self.origins.forget(path)
        merged = dict(base)
        self.origins.setdefault(path, source)
        for key, value in patch.items():
            below = (*path, key)
            if value is UNSET:
                merged.pop(key, None)
            elif isinstance(value, dict):
                old = merged.get(key)
                old = old if isinstance(old, dict) else {}
                inner = field_kind(*kind, {**base, **patch}, key)
                merged[key] = self.table(old, value, inner, below, source)
            else:
                merged[key] = value
                self.origins.forget(below)
                self.origins[below] = source
        return merged


def changes_tag(base: dict, patch: dict, kind: Type | None, default: Any) -> bool:
    """Whether `patch` names another member of the union than the one that `base` is."""
    members = types.structs(kind) if kind is not None else []
    field = members[0].tag_field if members else None
    if field is None or field not in patch:
        return False
    old = types.chosen_member(kind, default, base)
    return patch[field] != (old.tag if old else base.get(field))


def field_kind(kind: Type | None, default: Any, table: dict, key: str) -> tuple[Type | None, Any]:
    """Type and default of a key in a table; (None, None) for an unknown or free key."""
    member = types.chosen_member(kind, default, table) if kind is not None else None
    if member is None:
        return tag_kind(kind, key), None
    for field in member.fields:
        if field.name == key:
            return field.type, types.default_of(field)
    return tag_kind(kind, key), None


def tag_kind(kind: Type | None, key: str) -> Type | None:
    """Type of a union's tag field: one of its tags."""
    members = types.structs(kind) if kind is not None else []
    if members and members[0].tag_field == key:
        return kinds.LiteralType(tuple(member.tag for member in members))
    return None


def override(
    base: dict, overrides: Sequence[str], merge: Merge
) -> tuple[dict, list[Path], list[str]]:
    """`base` with all overrides laid over it at once, the keys they set, and all mistakes."""
    problems: list[str] = []
    entries = [entry for text in overrides if (entry := parse(text, problems))]
    tentative = merge_quietly(base, nested(entries, []), merge.root)
    settled = []
    for path, text, value in entries:
        kind, free = kind_at(path, merge.root, tentative)
        settled.append((path, text, settle(path, text, value, kind, free, problems)))
    patch = nested(settled, problems)
    merged = merge(base, patch, OVERRIDE) if patch else base
    return merged, leaves(patch), problems


def merge_quietly(base: dict, patch: dict, root: StructType) -> dict:
    """A merge whose origins do not matter."""
    return Merge(root)(base, patch, OVERRIDE)


def parse(text: str, problems: list[str]) -> tuple[Path, str, Any] | None:
    """Key, text and value of one override; the value is TOML, else the text itself."""
    key, equals, value = (part.strip() for part in text.partition("="))
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        problems.append(f"{OVERRIDE} {text}: write it as section.key=value")
        return None
    if not value:
        problems.append(f"{OVERRIDE} {text}: no value is given; {key}=none unsets an optional key")
        return None
    if path[0] == "extends":
        problems.append(f"{OVERRIDE} {text}: extends can only be set in the file")
        return None
    try:
        tables = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        if value[0] in "[{\"'":
            problems.append(
                f"{OVERRIDE} {text}: not valid TOML; quote the strings in it, and the whole for"
                f""" the shell: '{key}=["a", "b"]'"""
            )
            return None
        return path, value, value
    return path, value, (tables["value"] if len(tables) == 1 else value)


def nested(entries: list[tuple[Path, str, Any]], problems: list[str]) -> dict:
    """The overrides as tables; of one key given twice the last counts."""
    tables: dict = {}
    for path, text, value in entries:
        table = tables
        for key in path[:-1]:
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                key = types.dotted(path)
                problems.append(f"{OVERRIDE} {key}={text}: a part of {key} is already set")
                break
            table = inner
        else:
            old = table.get(path[-1])
            both = isinstance(old, dict) and isinstance(value, dict)
            table[path[-1]] = {**old, **value} if both else value
    return tables


def kind_at(path: Path, root: StructType, table: dict) -> tuple[Type | None, bool]:
    """Type of the key at `path`, None if unknown, and whether it is below a free table."""
    kind: Type | None = root
    default: Any = None
    for key in path:
        if kind is not None and types.is_free(kind) and not types.structs(kind):
            return None, True
        kind, default = field_kind(kind, default, table, key)
        table = table.get(key) if isinstance(table.get(key), dict) else {}
    return kind, False


def settle(
    path: Path, text: str, value: Any, kind: Type | None, free: bool, problems: list[str]
) -> Any:
    """The value that an override means for a key of this type: none unsets, a word may look like
    TOML."""
    listed = types.literals(kind) if kind is not None else []
    if text in listed:
        return text
    if text in ("none", "None") and (free or kind is not None):
        if not free and not types.is_optional(kind):
            near = types.nearest(text, [word for word in listed if isinstance(word, str)])
            hint = f'; did you mean "{near}"?' if near else ""
            key, valid = types.dotted(path), types.describe(kind)
            problems.append(f"{OVERRIDE} {key}={text}: cannot be unset: it must be {valid}{hint}")
        return UNSET
    if kind is None or isinstance(value, str | list | dict):
        return value
    takes_text = any(isinstance(option, kinds.StrType) for option in types.options(kind))
    numbers = kinds.IntType | kinds.FloatType | kinds.BoolType
    takes_value = any(isinstance(option, numbers) for option in types.options(kind))
    return text if takes_text and not takes_value else value


def leaves(table: dict, path: Path = ()) -> list[Path]:
    """Paths of all values below a table; an empty table is a value."""
    found: list[Path] = []
    for key, value in table.items():
        below = (*path, key)
        found += leaves(value, below) if isinstance(value, dict) and value else [below]
    return found
