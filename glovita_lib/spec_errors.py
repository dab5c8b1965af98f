"""Every mistake in a spec's tables at once, each with what was offered and what is valid.

msgspec's own conversion stops at the first mistake and names no valid tag, so the tables are
walked here beside the types, and are converted only when nothing was found.
"""

import math
from typing import Any

import msgspec
from msgspec import inspect as kinds
from msgspec.inspect import StructType, Type

from glovita_lib import spec_types as types

Path = tuple[str, ...]


class Walk:
    """One walk over the tables of a spec; collects `problems` and returns completed tables."""

    def __init__(self, root: StructType) -> None:
        self.root = root
        self.problems: list[tuple[Path, str]] = []
        """Path of the key and what is wrong with it."""

    def table(self, table: dict, kind: Type, default: Any, path: Path) -> dict:
        """A table with its tag filled in, checked against the Struct it stands for."""
        member = types.chosen_member(kind, default, table)
        if member is None:
            self.unknown_tag(table, kind, path)
            return table
        done = {member.tag_field: member.tag} if member.tag_field else {}
        fields = {field.name: field for field in member.fields}
        for key, value in table.items():
            if key in fields:
                field = fields[key]
                done[key] = self.value(value, field.type, types.default_of(field), (*path, key))
            elif key != member.tag_field:
                self.unknown_key(key, value, member, kind, path)
        for name, field in fields.items():
            if field.required and name not in table:
                self.add((*path, name), f"missing: it must be {types.describe(field.type)}")
        return done

    def value(self, value: Any, kind: Type, default: Any, path: Path) -> Any:
        """Any value; tables and arrays are walked, the rest is compared with its type."""
        if isinstance(value, dict):
            if types.structs(kind):
                return self.table(value, kind, default, path)
            entries = [o for o in types.options(kind) if isinstance(o, kinds.DictType)]
            if entries and not types.is_free(entries[0].value_type):
                for key, entry in value.items():
                    self.value(entry, entries[0].value_type, None, (*path, key))
            elif not types.is_free(kind):
                self.mismatch(value, kind, path)
            return value
        if isinstance(value, list):
            self.array(value, kind, path)
        elif not any(fits(value, option) for option in types.options(kind)):
            self.mismatch(value, kind, path)
        return value

    def array(self, value: list, kind: Type, path: Path) -> None:
        """An array: its length and each of its entries."""
        free = any(isinstance(option, kinds.AnyType) for option in types.options(kind))
        for option in types.options(kind):
            if isinstance(option, kinds.VarTupleType):
                for index, entry in enumerate(value):
                    self.value(entry, option.item_type, None, (*path, f"[{index}]"))
                return
            if isinstance(option, kinds.TupleType) and len(value) == len(option.item_types):
                for index, (entry, item) in enumerate(zip(value, option.item_types, strict=True)):
                    self.value(entry, item, None, (*path, f"[{index}]"))
                return
        if not free:
            self.mismatch(value, kind, path)

    def add(self, path: Path, text: str) -> None:
        """Note a mistake."""
        self.problems.append((path, text))

    def mismatch(self, value: Any, kind: Type, path: Path) -> None:
        """A value of the wrong type or outside its bounds."""
        text = f"{types.shown(value)} is not valid: it must be {types.describe(kind)}"
        self.add(path, text + hint(value, kind))

    def unknown_tag(self, table: dict, kind: Type, path: Path) -> None:
        """A union's table that names no member."""
        members = types.structs(kind)
        field, tags = members[0].tag_field, [member.tag for member in members]
        if field not in table:
            self.add((*path, field), f"missing: it must be {types.one_of(tags)}")
            return
        offered = table[field]
        text = f"{types.shown(offered)} is unknown: it must be {types.one_of(tags)}"
        self.add((*path, field), text + meant(str(offered), tags))

    def unknown_key(self, key: str, value: Any, member: StructType, kind: Type, path: Path) -> None:
        """A key that the table does not have; says where it belongs if it exists elsewhere."""
        names = [field.name for field in member.fields]
        names += [member.tag_field] if member.tag_field else []
        text = f"unknown key (offered {types.shown(value)}); valid here: {', '.join(names)}"
        owners = [
            other.tag
            for other in types.structs(kind)
            if any(field.name == key for field in other.fields)
        ]
        if owners:
            text += f"; {key} belongs to {member.tag_field} = {types.one_of(owners)}"
        elif near := types.nearest(key, names, 0.75):
            text += f'; did you mean "{near}"?'
        elif places := self.places(key):
            text += f"; did you mean {' or '.join(places[:3])}?"
        elif near := types.nearest(key, names):
            text += f'; did you mean "{near}"?'
        self.add((*path, key), text)

    def places(self, key: str) -> list[str]:
        """Dotted keys of the whole spec that end in this name."""
        every = dict.fromkeys(types.all_keys(self.root))
        return [dotted for dotted in every if dotted.rpartition(".")[2] == key]


def fits(value: Any, kind: Type) -> bool:
    """Whether a value that is neither table nor array belongs to one plain type."""
    if isinstance(kind, kinds.AnyType):
        return True
    if isinstance(kind, kinds.LiteralType):
        return any(type(value) is type(entry) and value == entry for entry in kind.values)
    if isinstance(kind, kinds.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, kinds.StrType):
        return isinstance(value, str)
    if isinstance(kind, kinds.IntType):
        return type(value) is int and inside(value, kind)
    if isinstance(kind, kinds.FloatType):
        return type(value) in (int, float) and math.isfinite(value) and inside(value, kind)
    return False


def inside(value: float, kind: kinds.IntType | kinds.FloatType) -> bool:
    """Whether a number keeps the bounds of its type."""
    return (
        (kind.gt is None or value > kind.gt)
        and (kind.ge is None or value >= kind.ge)
        and (kind.lt is None or value < kind.lt)
        and (kind.le is None or value <= kind.le)
    )


def hint(value: Any, kind: Type) -> str:
    """How to mend a value of the wrong type, where that can be told."""
    options = types.options(kind)
    if isinstance(value, str) and (near := meant(value, texts(kind))):
        return near
    if isinstance(value, float) and value.is_integer() and fits(int(value), kind):
        return f"; write {int(value)}"
    entry = item_type(kind)
    if entry is not None and not isinstance(value, list | dict):
        return f"; write [{types.shown(value)}]" + meant(str(value), texts(entry))
    number = parsed(value) if isinstance(value, str) else None
    if number is not None and any(fits(number, option) for option in options):
        return f"; write {types.shown(number)} without quotes"
    return ""


def item_type(kind: Type) -> Type | None:
    """Type of the entries of an array type."""
    arrays = (option for option in types.options(kind) if isinstance(option, kinds.VarTupleType))
    return next((array.item_type for array in arrays), None)


def texts(kind: Type) -> list[str]:
    """Strings that a type lists one by one; true and false for a boolean."""
    words = [value for value in types.literals(kind) if isinstance(value, str)]
    is_bool = any(isinstance(option, kinds.BoolType) for option in types.options(kind))
    return words + (["true", "false"] if is_bool else [])


def parsed(text: str) -> bool | int | float | None:
    """The number or boolean that a string spells."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return None


def meant(word: str, words: list[str]) -> str:
    """The question after the nearest valid word; empty if none is near."""
    near = types.nearest(word, words)
    return f'; did you mean "{near}"?' if near and near != word else ""


def convert(plain: dict, root_type: type, kind: StructType) -> tuple[Any, list[tuple[Path, str]]]:
    """The Structs of a spec's tables, or None and all mistakes with the paths of their keys.

    `kind` is the type information of `root_type`.
    """
    walk = Walk(kind)
    done = walk.table(plain, kind, None, ())
    if walk.problems:
        return None, walk.problems
    try:
        return msgspec.convert(done, root_type, strict=True), []
    except msgspec.ValidationError as error:  # a bound that the walk does not know
        return None, [((), str(error))]
