"""What the Structs of a spec say of themselves: when a field is read, and what is wrong with a
table by itself.

A rule of one table is the method `problems` of its Struct; rules between sections are in
`spec_check`. Both are asked before any data is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from msgspec import Meta

from glovita_lib.errors import is_target
from glovita_lib.spec import Spec
from glovita_lib.spec_errors import default_of, extra_of, shown, struct_type

# -------------------------------------------------------------------- when a field is read


@dataclass(frozen=True)
class Condition:
    """Another value of the spec that decides whether a field is read."""

    key: str
    """Field or property of the same table; behind "root." a dotted key of the whole spec."""
    values: tuple[Any, ...]
    """The values that are meant; none are named: any but unset."""
    negated: bool
    """Whether the field is read with every value but these."""
    words: str | None
    """What to set, where the key and its values do not say it."""

    def holds(self, table: Spec, root: Spec) -> bool:
        """Whether the field of a table of this spec is read."""
        owner, names = table, self.key.split(".")
        if names[0] == "root":
            owner, names = root, names[1:]
        for name in names:
            owner = getattr(owner, name)
        met = owner in self.values if self.values else owner not in (None, ())
        return met != self.negated

    def text(self, prefix: str = "") -> str:
        """The setting with which the field is read, keys of its own table behind a prefix."""
        if self.words is not None:
            return self.words
        of_root = self.key.startswith("root.")
        key = self.key.removeprefix("root.") if of_root else f"{prefix}{self.key}"
        listed = " or ".join(map(shown, self.values))
        if not self.values:
            return f"no {key}" if self.negated else key
        return f"{key} other than {listed}" if self.negated else f"{key} = {listed}"


def read_if(key: str, *values: Any, words: str | None = None) -> Meta:
    """Annotation of a field that is read only where a key has one of the values, or is set."""
    return Meta(extra={"read_if": Condition(key, values, False, words)})


def read_unless(key: str, *values: Any, words: str | None = None) -> Meta:
    """Annotation of a field that is read only where a key has none of the values, or is unset."""
    return Meta(extra={"read_if": Condition(key, values, True, words)})


def target_problems(target: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the `target` of a part of the user's own."""
    if not is_target(target):
        yield "target", f'{shown(target)} must read "package.module:function"'


@cache
def conditions(struct: type[Spec]) -> dict[str, tuple[Condition, Any]]:
    """Fields of a Struct that are not always read: when they are, and their default."""
    found = {}
    for field in struct_type(struct).fields:
        condition = extra_of(field.type).get("read_if")
        if condition is not None:
            found[field.name] = (condition, default_of(field))
    return found


# ------------------------------------------------------------------------------ the tables


def tables(table: Spec, key: str = "") -> Iterator[tuple[str, Spec]]:
    """A table and all tables in it, each with the opening of its keys, such as "data."."""
    yield key, table
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if isinstance(value, Spec):
            yield from tables(value, f"{key}{name}.")


def own_problems(table: Spec, key: str = "") -> Iterator[str]:
    """What is wrong with a table, and with those in it, by itself; one line for each mistake."""
    for prefix, inner in tables(table, key):
        for name, text in inner.problems():
            yield f"{prefix}{name}: {text}"


def unread_options(root: Spec, table: Spec, key: str = "") -> Iterator[str]:
    """Fields of a table, and of those in it, that are away from their default and that nothing
    would read: changing one is an error, never without effect."""
    for prefix, inner in tables(table, key):
        for name, (condition, default) in conditions(type(inner)).items():
            value = getattr(inner, name)
            if value != default and not condition.holds(inner, root):
                yield (
                    f"{prefix}{name}: {shown(value)} would be ignored, it is read only with"
                    f" {condition.text(prefix)}"
                )


def section_problems(section: Spec, key: str) -> list[str]:
    """All that is wrong with one section, where nothing else of its spec is known: one line for
    each mistake. What builds a part from a section that no spec check has seen asks it."""
    return [*own_problems(section, key), *unread_options(section, section, key)]
