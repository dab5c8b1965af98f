"""JSON schema of a spec, for editors: completion, descriptions, and the wrong key underlined.

Draft 7, which every TOML editor reads. A union is a table whose tag picks the one member that is
validated (if/then), so that a mistake is reported as that member's key and not as "matches none".
"""

import json
from typing import Any

import msgspec
from msgspec import inspect as kinds
from msgspec.inspect import StructType, Type

from glovita_lib import spec_types as types
from glovita_lib.spec import with_lists
from glovita_lib.spec_docs import field_docs, struct_doc
from glovita_lib.spec_root import Root

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
                "description": docs[field.name],
                **self.value(field.type, types.default_of(field)),
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
        members = types.structs(kind)
        if len(members) > 1 or (members and members[0].tag_field):
            return self.union(members, types.default_member(kind, default))
        if members:
            # draft 7 ignores what stands beside $ref, the field's description for one
            return {"allOf": [self.reference(members[0])]}
        plain = [option for option in types.options(kind) if not isinstance(option, kinds.NoneType)]
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


def leaves_keys(member: StructType) -> bool:
    """Whether a table has a tag or a required key, here or below, that a base may give instead."""
    return any(
        field.required
        or len(types.structs(field.type)) > 1
        or any(leaves_keys(below) for below in types.structs(field.type))
        for field in member.fields
    )


def schema(root_type: type = Root) -> dict:
    """JSON schema of a whole spec."""
    definitions: dict[str, dict] = {}
    root = kinds.type_info(root_type)
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
