"""What the spec engine asks of a field's type: its union members, its description in words.

The types are those of `msgspec.inspect`; nothing here knows a particular section of the spec.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec import inspect as kinds
from msgspec.inspect import Field, StructType, Type

MOST_SHOWN = 60  # characters of an offered value in a message


def options(kind: Type) -> tuple[Type, ...]:
    """The types that a union allows; any other type allows itself."""
    return tuple(kind.types) if isinstance(kind, kinds.UnionType) else (kind,)


def structs(kind: Type) -> list[StructType]:
    """Tables that the type allows: the members of a tagged union, one Struct, or none."""
    return [option for option in options(kind) if isinstance(option, StructType)]


def is_optional(kind: Type) -> bool:
    """Whether the field may be unset (None)."""
    return any(isinstance(option, kinds.NoneType) for option in options(kind))


def is_free(kind: Type) -> bool:
    """Whether the type is a table with keys of the user's choice, or accepts anything."""
    return any(isinstance(option, kinds.DictType | kinds.AnyType) for option in options(kind))


def literals(kind: Type) -> list[Any]:
    """Values that the type lists one by one."""
    listed = (option for option in options(kind) if isinstance(option, kinds.LiteralType))
    return [value for option in listed for value in option.values]


def default_member(kind: Type, default: Any) -> StructType | None:
    """Member of a union that a table without a tag is: the type of the field's default."""
    members = structs(kind)
    if len(members) == 1:
        return members[0]
    return next((member for member in members if type(default) is member.cls), None)


def chosen_member(kind: Type, default: Any, table: dict) -> StructType | None:
    """Member of a union that a table names by its tag; None where the tag is unknown or missing."""
    members = structs(kind)
    tag_field = members[0].tag_field if members else None
    if tag_field is None or tag_field not in table:
        return default_member(kind, default)
    return next((member for member in members if member.tag == table[tag_field]), None)


def default_of(field: Field) -> Any:
    """Default of a field; msgspec.NODEFAULT where it must be given."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def shown(value: Any) -> str:
    """A value as TOML writes it, shortened.

    >>> shown("resnet"), shown(True), shown([1, 2.5]), shown(None)
    ('"resnet"', 'true', '[1, 2.5]', 'none')
    """
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(shown, value)) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {shown(entry)}" for key, entry in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def describe(kind: Type) -> str:
    """What a field accepts, in words; that it may be unset is left out.

    >>> from typing import Annotated
    >>> describe(kinds.type_info(Annotated[int, msgspec.Meta(ge=1)]))
    'a whole number >= 1'
    """
    tables = structs(kind)
    parts = ["a table"] if tables else []
    if len(tables) > 1:
        parts = [f"a table with {tables[0].tag_field} = {one_of(t.tag for t in tables)}"]
    for option in options(kind):
        if not isinstance(option, StructType | kinds.NoneType):
            parts.append(describe_plain(option))
    return " or ".join(parts)


def describe_plain(kind: Type) -> str:
    """Description of a type that is neither a union nor a Struct."""
    if isinstance(kind, kinds.LiteralType):
        return one_of(kind.values)
    if isinstance(kind, kinds.IntType):
        return "a whole number" + bounds(kind)
    if isinstance(kind, kinds.FloatType):
        return "a number" + bounds(kind)
    if isinstance(kind, kinds.VarTupleType | kinds.ListType):
        return f"an array, each entry {describe(kind.item_type)}"
    if isinstance(kind, kinds.TupleType):
        entries = [describe(item) for item in kind.item_types]
        each = f"each {entries[0]}" if len(set(entries)) == 1 else ", ".join(entries)
        return f"an array of {len(entries)}, {each}"
    simple = {
        kinds.BoolType: "true or false",
        kinds.StrType: "a string",
        kinds.DictType: "a table",
        kinds.AnyType: "any value",
    }
    return simple[type(kind)]


def bounds(kind: kinds.IntType | kinds.FloatType) -> str:
    """Bounds of a number, e.g. ' > 0 and <= 1'; empty where there are none."""
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    limits = [(sign, getattr(kind, name)) for name, sign in signs]
    stated = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    return (" " + " and ".join(stated)) if stated else ""


def one_of(values: Iterable[Any]) -> str:
    """Choices with commas: "a", "b" or "c"."""
    *most, last = map(shown, values)
    return f"{', '.join(most)} or {last}" if most else last


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that was probably meant; None if none is near."""
    from difflib import get_close_matches  # only ever needed for a message

    spelled = {entry.lower(): entry for entry in words}
    found = get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[found[0]] if found else None


def all_keys(kind: Type, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a type, those of all union members, tags included."""
    for member in structs(kind):
        if member.tag_field:
            yield f"{prefix}{member.tag_field}"
        for field in member.fields:
            yield f"{prefix}{field.name}"
            yield from all_keys(field.type, f"{prefix}{field.name}.")


def dotted(path: Iterable[str]) -> str:
    """A key as the user writes it; an index of an array follows its key directly.

    >>> dotted(("data", "augmentation", "mean", "[0]"))
    'data.augmentation.mean[0]'
    """
    return ".".join(path).replace(".[", "[")
