"""What a spec accepts: its JSON schema and `--explain`; what one says: `--print`."""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from textwrap import fill
from typing import Any

import msgspec
from msgspec import inspect as kinds
from msgspec.inspect import Field, StructType, Type

from glovita_lib import errors, spec_errors
from glovita_lib.errors import UserError
from glovita_lib.spec import OVERRIDE, Loaded, toml_tables, with_lists
from glovita_lib.spec_augment import read_with
from glovita_lib.spec_root import Root

# -------------------------------------------------------------------------------- docstrings
#
# Docstrings of Structs and of their fields, read from the source of their modules.


@cache
def class_docs(module: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Classes of a module with their docstring and the docstrings of their fields.

    A field's docstring is the string on the line after it.
    """
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            fields = {}
            for pair in zip(node.body, node.body[1:], strict=False):
                match pair:
                    case (
                        ast.AnnAssign(target=ast.Name(id=field)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        fields[field] = one_line(text)
            found[node.name] = (one_line(ast.get_docstring(node) or ""), fields)
    return found


def one_line(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def struct_doc(struct: type) -> str:
    """Docstring of a Struct."""
    return class_docs(struct.__module__)[struct.__name__][0]


def field_docs(struct: type) -> dict[str, str]:
    """Docstrings of all fields of a Struct, inherited ones included."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base.__module__.startswith("glovita_lib"):
            docs |= class_docs(base.__module__)[base.__name__][1]
    return docs


# ------------------------------------------------------------------------------------ schema
#
# JSON schema of a spec, for editors: completion, descriptions, and the wrong key underlined.
#
# Draft 7, which every TOML editor reads. A union is a table whose tag picks the one member that is
# validated (if/then), so that a mistake is reported as that member's key and not as "matches none".

BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


class Schema:
    """Collects the definitions of all Structs that a schema refers to.

    In a file that `extends` another, a tag or a required key may be left to the other: then
    `extending` definitions of the tables concerned stand beside the strict ones.
    """

    def __init__(self, definitions: dict[str, dict], *, extending: bool) -> None:
        self.definitions = definitions
        self.extending = extending

    def reference(self, member: StructType) -> dict:
        """Reference to the definition of a Struct, which is made the first time."""
        name = member.cls.__name__
        if self.extending and leaves_keys(member):
            name += "Extending"
        if name not in self.definitions:
            self.definitions[name] = {}  # keeps its place, and ends recursion
            self.definitions[name] |= self.struct(member)
        return {"$ref": f"#/definitions/{name}"}

    def struct(self, member: StructType) -> dict:
        """A table with the fields of a Struct and no other key."""
        docs = field_docs(member.cls)
        properties = {}
        if member.tag_field:
            properties[member.tag_field] = {"const": member.tag}
        for field in member.fields:
            properties[field.name] = {
                "description": " ".join([docs[field.name], *notes(field)]),
                **self.value(field.type, spec_errors.default_of(field)),
            }
        required = [field.name for field in member.fields if field.required and not self.extending]
        return {
            "description": struct_doc(member.cls),
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
            **({"required": required} if required else {}),
        }

    def value(self, kind: Type, default: Any) -> dict:
        """Schema of a field; an optional one is left out of the file to unset it."""
        members = spec_errors.structs(kind)
        if len(members) > 1 or (members and members[0].tag_field):
            return self.union(members, spec_errors.default_member(kind, default))
        if members:
            # draft 7 ignores what stands beside $ref, the field's description for one
            return {"allOf": [self.reference(members[0])]}
        plain = [
            option
            for option in spec_errors.options_of(kind)
            if not isinstance(option, kinds.NoneType)
        ]
        schemas = [self.plain(option) for option in plain]
        stated = {} if default in (None, msgspec.NODEFAULT) else {"default": with_lists(default)}
        return {**(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), **stated}

    def union(self, members: list[StructType], default: StructType | None) -> dict:
        """A table whose tag, or its absence, picks the member."""
        field = members[0].tag_field
        cases = [
            {
                "if": {"required": [field], "properties": {field: {"const": member.tag}}},
                "then": self.reference(member),
            }
            for member in members
        ]
        untagged: dict[str, Any] = {"if": {"not": {"required": [field]}}}
        if self.extending:
            names = dict.fromkeys(entry.name for member in members for entry in member.fields)
            known = {"properties": {name: {} for name in names}, "additionalProperties": False}
            cases.append({**untagged, "then": known})
        elif default is not None:
            cases.append({**untagged, "then": self.reference(default)})
        choices = "; ".join(f"{member.tag}: {struct_doc(member.cls)}" for member in members)
        tag: dict[str, Any] = {
            "description": choices,
            "type": "string",
            "enum": [member.tag for member in members],
        }
        schema: dict[str, Any] = {"type": "object", "properties": {field: tag}, "allOf": cases}
        schema["additionalProperties"] = True  # the member forbids them; said twice, Tombi warns
        if default is None:
            return schema if self.extending else {**schema, "required": [field]}
        tag["default"] = default.tag
        return schema

    def plain(self, kind: Type) -> dict:
        """Schema of a type that is neither a union nor a Struct."""
        if isinstance(kind, kinds.LiteralType):
            return {"enum": list(kind.values)}
        if isinstance(kind, kinds.IntType | kinds.FloatType):
            limits = {BOUNDS[name]: getattr(kind, name) for name in BOUNDS}
            name = "integer" if isinstance(kind, kinds.IntType) else "number"
            return {"type": name, **{k: v for k, v in limits.items() if v is not None}}
        if isinstance(kind, kinds.VarTupleType):
            return {"type": "array", "items": self.value(kind.item_type, None)}
        if isinstance(kind, kinds.TupleType):
            count = len(kind.item_types)
            items = [self.value(item, None) for item in kind.item_types]
            return {"type": "array", "items": items, "minItems": count, "maxItems": count}
        simple = {kinds.BoolType: "boolean", kinds.StrType: "string", kinds.DictType: "object"}
        return {"type": simple[type(kind)]} if type(kind) in simple else {}


def notes(field: Field) -> Iterator[str]:
    """What the type of a field says beside its docstring."""
    if spec_errors.is_path(field.type):
        yield "~, $VAR and ${VAR} are filled in."
    if meaning := spec_errors.extra_of(field.type).get("none_is"):
        yield f"None is {meaning}."
    if condition := spec_errors.extra_of(field.type).get("read_if"):
        yield f"Read only with {condition.text()}."
    if "part_of" in (extra := spec_errors.extra_of(field.type)):
        yield f"Read only with {read_with(extra)}."


def leaves_keys(member: StructType) -> bool:
    """Whether a table has a tag or a required key, here or below, that a base may give instead."""
    return any(
        field.required
        or len(spec_errors.structs(field.type)) > 1
        or any(leaves_keys(below) for below in spec_errors.structs(field.type))
        for field in member.fields
    )


def schema(root_type: type[msgspec.Struct] = Root) -> dict:
    """JSON schema of a whole spec."""
    definitions: dict[str, dict] = {}
    root = spec_errors.struct_type(root_type)
    extends = {"required": ["extends"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "glovita spec",
        "type": "object",
        "additionalProperties": True,  # as in a union
        "allOf": [
            {"if": {"not": extends}, "then": Schema(definitions, extending=False).reference(root)},
            {"if": extends, "then": Schema(definitions, extending=True).reference(root)},
        ],
        "definitions": definitions,
    }


def schema_text() -> str:
    """The schema as it stands in specs/schema.json, without the last line break."""
    return json.dumps(schema(), indent=1)


# --------------------------------------------------------------------------------- --explain
#
# `--explain KEY`: what a key of the spec accepts, in words, from the Structs.

WIDTH = 100  # columns


def explain(key: str) -> str:
    """Choices, fields, types, bounds, defaults and units of a key; the name spec is the root.

    Raises:
        UserError: there is no such key.
    """
    root = spec_errors.struct_type(Root)
    if key == "spec":
        return "\n".join(table_lines(key, root, None))
    path = key.split(".")
    found: dict[str, list[str]] = {}  # description -> the union members that it is true for
    for owner, tags in owners(path, [(root, "")]):
        for field in owner.fields:
            if field.name == path[-1]:
                found.setdefault("\n".join(field_lines(key, field, owner)), []).append(tags)
        if owner.tag_field == path[-1]:
            text = f"{key} = {spec_errors.shown(owner.tag)}\n{indented(struct_doc(owner.cls), 2)}"
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
    every = list(dict.fromkeys(spec_errors.all_keys(root)))
    name = key.rpartition(".")[2]
    near = [entry for entry in every if entry.rpartition(".")[2] == name][:5]
    near = near or [entry for entry in [errors.nearest_word(key, every)] if entry]
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
                members = spec_errors.structs(field.type)
                below = [(member, tag_note(tags, member, members)) for member in members]
                yield from owners(path[1:], below)


def tag_note(tags: str, member: StructType, members: list[StructType]) -> str:
    """The tags on the way, where there was a choice."""
    if len(members) < 2:
        return tags
    return f"{tags}, {member.tag_field}={member.tag}".removeprefix(", ")


def field_lines(key: str, field: Field, owner: StructType) -> Iterator[str]:
    """Lines on one field; all that is below it where it is a table."""
    members = spec_errors.structs(field.type)
    doc = field_docs(owner.cls)[field.name]
    if not members:
        yield key
        yield indented(doc, 2)
        yield indented(field_text(field), 2)
        return
    yield f"{key}: {doc}"
    default = spec_errors.default_member(field.type, spec_errors.default_of(field))
    for member in members:
        yield ""
        yield from table_lines(key, member, default)


def table_lines(key: str, member: StructType, default: StructType | None) -> Iterator[str]:
    """Lines on a table: its tag, what it is, its fields."""
    if member.tag_field:
        chosen = " (the default)" if default is not None and default.cls is member.cls else ""
        yield f"[{key}] {member.tag_field} = {spec_errors.shown(member.tag)}{chosen}"
        yield indented(struct_doc(member.cls), 2)
    docs = field_docs(member.cls)
    for field in member.fields:
        yield indented(f"{field.name}: {field_text(field)}", 2, 8)
        yield indented(docs[field.name], 6)


def field_text(field: Field) -> str:
    """Type and default of a field, and what it is read with, in words."""
    parts = [spec_errors.describe_type(field.type), default_text(field)]
    if "part_of" in (extra := spec_errors.extra_of(field.type)):
        parts.append(f"read with {read_with(extra)}")
    if condition := spec_errors.extra_of(field.type).get("read_if"):
        parts.append(f"read only with {condition.text()}")
    return "; ".join(parts)


def default_text(field: Field) -> str:
    """Default of a field in words."""
    if field.required:
        return "must be given"
    value = spec_errors.default_of(field)
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        return f"default {spec_errors.shown(tag)}" if tag else "optional"
    meaning = spec_errors.extra_of(field.type).get("none_is")
    return f"default {spec_errors.shown(value)}" + (f", which is {meaning}" if meaning else "")


def indented(text: str, columns: int, further: int | None = None) -> str:
    """The text wrapped and indented, its further lines by more columns if given."""
    below = " " * (columns if further is None else further)
    return fill(text, WIDTH, initial_indent=" " * columns, subsequent_indent=below)


# ----------------------------------------------------------------------------------- --print
#
# `--print`: a spec with all it extends, its overrides and every default, as TOML.


def spec_text(loaded: Loaded[Root]) -> str:
    """The spec as it was understood, as TOML that loads to the same; behind each key that its own
    file does not give stands where the value comes from."""
    title = f"# {loaded.path} with all defaults; it gives the keys that have no note itself."
    tables = toml_tables(loaded.as_written)
    del tables["extends"]  # what it names is in here
    return "\n".join([title, *toml_lines(tables, (), loaded)])


def toml_lines(table: dict, path: tuple[str, ...], loaded: Loaded[Root]) -> Iterator[str]:
    """Lines of a table: its values, the keys that are unset, then the tables in it."""
    below = {key: value for key, value in table.items() if isinstance(value, dict) and value}
    if path and len(below) < len(table):
        yield f"\n[{'.'.join(map(toml_key, path))}]"
    for key, value in table.items():
        if value is not None and key not in below:
            note = note_of(loaded, (*path, key))
            yield f"{toml_key(key)} = {toml_value(value)}{note and f'  # {note}'}"
    if unset := [key for key, value in table.items() if value is None]:
        text = f"unset: {', '.join(unset)}"
        yield fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
    for key, value in below.items():
        yield from toml_lines(value, (*path, key), loaded)


def note_of(loaded: Loaded[Root], path: tuple[str, ...]) -> str:
    """Where a key comes from; empty for the spec's own file."""
    origin = loaded.origins.get(path)
    if origin is None:
        return "default"
    return {OVERRIDE: "override", loaded.path: ""}.get(origin, f"from {origin}")


def toml_value(value: Any) -> str:
    """A value on one line."""
    import tomli_w

    if isinstance(value, dict):
        entries = ", ".join(
            f"{toml_key(key)} = {toml_value(entry)}" for key, entry in value.items()
        )
        return f"{{ {entries} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def toml_key(key: str) -> str:
    """A key, quoted where TOML wants that."""
    import tomli_w

    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
