"""`--explain KEY`: what a key of the spec accepts, in words, from the Structs."""

from collections.abc import Iterator
from textwrap import fill

import msgspec
from msgspec import inspect as kinds
from msgspec.inspect import Field, StructType

from glovita_lib import spec_types as types
from glovita_lib.spec import UserError
from glovita_lib.spec_docs import field_docs, struct_doc
from glovita_lib.spec_root import Root

WIDTH = 100  # columns


def explain(key: str) -> str:
    """Choices, fields, types, bounds, defaults and units of a key; the name spec is the root.

    Raises:
        UserError: there is no such key.
    """
    root = kinds.type_info(Root)
    if key == "spec":
        return "\n".join(table_lines(key, root, None))
    path = key.split(".")
    found: dict[str, list[str]] = {}  # description -> the union members that it is true for
    for owner, tags in owners(path, [(root, "")]):
        for field in owner.fields:
            if field.name == path[-1]:
                found.setdefault("\n".join(field_lines(key, field, owner)), []).append(tags)
        if owner.tag_field == path[-1]:
            text = f"{key} = {types.shown(owner.tag)}\n{indented(struct_doc(owner.cls), 2)}"
            found.setdefault(text, []).append("")
    if not found:
        raise UserError(unknown(key, root))
    return "\n\n".join(with_tags(text, tags) for text, tags in found.items())


def with_tags(text: str, tags: list[str]) -> str:
    """A description under the union members that it is true for."""
    where = " or ".join(tag for tag in dict.fromkeys(tags) if tag)
    return f"{indented(f'with {where}:', 0)}\n{text}" if where else text


def unknown(key: str, root: StructType) -> str:
    """The line on a key that does not exist, with those that may be meant."""
    every = list(dict.fromkeys(types.all_keys(root)))
    name = key.rpartition(".")[2]
    near = [entry for entry in every if entry.rpartition(".")[2] == name][:5]
    near = near or [entry for entry in [types.nearest(key, every)] if entry]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    sections = ", ".join(field.name for field in root.fields)
    return (
        f"--explain {key}: no such key; spec explains the root, its sections are {sections}{hint}"
    )


def owners(
    path: list[str], tables: list[tuple[StructType, str]]
) -> Iterator[tuple[StructType, str]]:
    """Tables that hold the last key of a path, with the tags that lead there."""
    for table, tags in tables:
        if len(path) == 1:
            yield table, tags
            continue
        for field in table.fields:
            if field.name == path[0]:
                members = types.structs(field.type)
                below = [(member, tag_note(tags, member, members)) for member in members]
                yield from owners(path[1:], below)


def tag_note(tags: str, member: StructType, members: list[StructType]) -> str:
    """The tags on the way, where there was a choice."""
    if len(members) < 2:
        return tags
    return f"{tags}, {member.tag_field}={member.tag}".removeprefix(", ")


def field_lines(key: str, field: Field, owner: StructType) -> Iterator[str]:
    """Lines on one field; all that is below it where it is a table."""
    members = types.structs(field.type)
    doc = field_docs(owner.cls)[field.name]
    if not members:
        yield key
        yield indented(doc, 2)
        yield indented(f"{types.describe(field.type)}; {default_text(field)}", 2)
        return
    yield f"{key}: {doc}"
    default = types.default_member(field.type, types.default_of(field))
    for member in members:
        yield ""
        yield from table_lines(key, member, default)


def table_lines(key: str, member: StructType, default: StructType | None) -> Iterator[str]:
    """Lines on a table: its tag, what it is, its fields."""
    if member.tag_field:
        chosen = " (the default)" if default is not None and default.cls is member.cls else ""
        yield f"[{key}] {member.tag_field} = {types.shown(member.tag)}{chosen}"
        yield indented(struct_doc(member.cls), 2)
    docs = field_docs(member.cls)
    for field in member.fields:
        yield indented(f"{field.name}: {types.describe(field.type)}; {default_text(field)}", 2, 8)
        yield indented(docs[field.name], 6)


def default_text(field: Field) -> str:
    """Default of a field in words."""
    if field.required:
        return "must be given"
    value = types.default_of(field)
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        return f"default {types.shown(tag)}" if tag else "optional"
    return f"default {types.shown(value)}"


def indented(text: str, columns: int, further: int | None = None) -> str:
    """The text wrapped and indented, its further lines by more columns if given."""
    below = " " * (columns if further is None else further)
    return fill(text, WIDTH, initial_indent=" " * columns, subsequent_indent=below)
