"""Docstrings of Structs and of their fields, read from the source of their modules."""

import ast
import sys
from functools import cache


@cache
def class_docs(module: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Classes of a module with their docstring and the docstrings of their fields.

    A field's docstring is the string on the line after it.
    """
    with open(sys.modules[module].__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            fields = {}
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and is_text(below):
                    fields[field.target.id] = one_line(below.value.value)
            found[node.name] = (one_line(ast.get_docstring(node) or ""), fields)
    return found


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a lone string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


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
