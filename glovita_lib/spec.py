"""Specs: loading TOML files with `extends` and overrides, and writing them back."""

import os
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch, update_wrapper
from importlib import import_module
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar

import msgspec
from msgspec import inspect as kinds
from msgspec.inspect import StructType, Type

from glovita_lib import errors, spec_errors
from glovita_lib.errors import UserError, file_name

# ------------------------------------------------------------------------ tables over tables
#
# `extends` and `--override` lay tables over tables. Tables merge key by key, arrays and values
# replace. Where the tag of a union changes, the table of the other member is dropped, so no field
# of it is left behind.

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
    if kind is None or (field := spec_errors.tag_field(kind)) not in patch:
        return False
    old = spec_errors.chosen_member(kind, default, base)
    return patch[field] != (old.tag if old else base.get(field))


def field_kind(kind: Type | None, default: Any, table: dict, key: str) -> tuple[Type | None, Any]:
    """Type and default of a key in a table; (None, None) for an unknown or free key."""
    member = spec_errors.chosen_member(kind, default, table) if kind is not None else None
    if member is None:
        return tag_kind(kind, key), None
    for field in member.fields:
        if field.name == key:
            return field.type, spec_errors.default_of(field)
    return tag_kind(kind, key), None


def tag_kind(kind: Type | None, key: str) -> Type | None:
    """Type of a union's tag field: one of its tags."""
    if kind is None or spec_errors.tag_field(kind) != key:
        return None
    return kinds.LiteralType(tuple(member.tag for member in spec_errors.structs(kind)))


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
    """Key, text and value of one override; the value is what the text is as TOML, else the text."""
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
                key = spec_errors.dotted(path)
                problems.append(f"{OVERRIDE} {key}={text}: a part of {key} is already set")
                break
            table = inner
        else:
            old = table.get(path[-1])
            if isinstance(old, dict) and isinstance(value, dict):
                value = {**old, **value}
            table[path[-1]] = value
    return tables


def kind_at(path: Path, root: StructType, table: dict) -> tuple[Type | None, bool]:
    """Type of the key at `path`, None if unknown, and whether it is below a free table."""
    kind: Type | None = root
    default: Any = None
    for key in path:
        if kind is not None and spec_errors.is_free(kind) and not spec_errors.structs(kind):
            return None, True
        kind, default = field_kind(kind, default, table, key)
        table = below if isinstance(below := table.get(key), dict) else {}
    return kind, False


WORD = '"a"'
EXAMPLES = {"[": '["a", "b"]', "{": '{ a = "b" }'}  # of TOML, by what it begins with
CLOSING = {"[": "]", "{": "}"}
ARRAYS = (kinds.VarTupleType, kinds.TupleType, kinds.ListType)
TABLES = (kinds.DictType, kinds.StructType)


def settle(
    path: Path, text: str, value: Any, kind: Type | None, free: bool, problems: list[str]
) -> Any:
    """The value that an override means for a key of this type: none unsets, a word may look like
    TOML."""
    listed = spec_errors.literals(kind) if kind is not None else []
    if text in listed:
        return text
    if text in ("none", "None") and (free or kind is not None):
        if kind is not None and not spec_errors.is_optional(kind):
            near = errors.nearest_word(text, [word for word in listed if isinstance(word, str)])
            hint = f'; did you mean "{near}"?' if near else ""
            key, valid = spec_errors.dotted(path), spec_errors.describe_type(kind)
            problems.append(f"{OVERRIDE} {key}={text}: cannot be unset: it must be {valid}{hint}")
        return UNSET
    options = spec_errors.options_of(kind) if kind is not None else []
    takes_text = any(isinstance(option, kinds.StrType) for option in options)
    only_text = takes_text and all(isinstance(o, kinds.StrType | kinds.NoneType) for o in options)
    if value == text and text[0] in "[{\"'" and not is_text(text, options, free):
        key = spec_errors.dotted(path)
        fits = (takes_text or free) and not re.search(r"['\"\\]", text)
        as_text = f"""; as one text: '{key}="{text}"'""" if fits else ""
        problems.append(
            f"{OVERRIDE} {key}={text}: not valid TOML; quote the strings in it, and the whole for"
            f" the shell: '{key}={quoted(text)}'{as_text}"
        )
        return UNSET
    if kind is None or isinstance(value, str):
        return value
    takes_value = any(
        isinstance(o, kinds.IntType | kinds.FloatType | kinds.BoolType) for o in options
    )
    if isinstance(value, list | dict):
        return text if only_text else value
    return text if takes_text and not takes_value else value


def quoted(text: str) -> str:
    """What may have been meant by what is no TOML: an array with its words quoted, else an example
    of what begins so."""
    words = text[1:-1].split(",") if text[0] == "[" and text[-1] == "]" else []
    if not words or re.search(r"""[][{}'"\\]""", text[1:-1]):
        return EXAMPLES.get(text[0], WORD)
    entries = []
    for word in filter(None, map(str.strip, words)):
        try:
            tomllib.loads(f"value = {word}")
        except tomllib.TOMLDecodeError:
            word = f'"{word}"'
        entries.append(word)
    return f"[{', '.join(entries)}]"


def is_text(text: str, options: Sequence[Type], free: bool) -> bool:
    """Whether what begins like an array or a table of TOML, and is none, is text: a key of these
    types takes text, and either nothing that begins so, or the text goes on behind it, as in
    "[x]/y"."""
    if text[0] not in CLOSING:
        return False
    nested = isinstance_of(options, ARRAYS if text[0] == "[" else TABLES) or free
    takes_text = isinstance_of(options, (kinds.StrType,)) or free
    return takes_text and not (nested and text.endswith(CLOSING[text[0]]))


def isinstance_of(options: Sequence[Type], types: tuple[type, ...]) -> bool:
    """Whether one of the types that a key takes is of these kinds."""
    return any(isinstance(option, types) for option in options)


def leaves(table: dict, path: Path = ()) -> list[Path]:
    """Paths of all values below a table; an empty table is a value."""
    found: list[Path] = []
    for key, value in table.items():
        below = (*path, key)
        found += leaves(value, below) if isinstance(value, dict) and value else [below]
    return found


# ----------------------------------------------------------------------- loading and writing
#
# The Structs of the sections are in `spec_data`, `spec_model`, `spec_train` ...; nothing here knows
# them.


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the spec; every field has a default or is required, a bound and a docstring with
    its unit."""

    built_in: ClassVar[str]
    """Module of the package that registers what is built of a union's member, see `ByStruct`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields whose value no bound of a type can refuse, and why it is not valid: the rules of
        this table by itself. Keys in the words are those of the whole spec."""
        yield from ()


Kind = TypeVar("Kind", bound=Spec)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ByStruct(Generic[Kind, Parameters, Result]):
    """A function of a Struct with one implementation for each Struct, as `functools.singledispatch`
    makes it. The implementation is registered in the module that the Struct names (`built_in`),
    which is imported when it is asked for: no list of modules is kept anywhere.
    """

    def __init__(self, function: Callable[Concatenate[Kind, Parameters], Result]) -> None:
        self.implementations = singledispatch(function)
        self.register = self.implementations.register
        update_wrapper(self, function)

    def __call__(self, spec: Kind, *args: Parameters.args, **options: Parameters.kwargs) -> Result:
        return self.dispatch(type(spec))(spec, *args, **options)

    def dispatch(self, kind: type[Spec]) -> Callable[..., Result]:
        """The implementation for a Struct; the function itself where there is none."""
        import_module(f"glovita_lib.{kind.built_in}")
        return self.implementations.dispatch(kind)


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
    "data.download",
    "data.preparation.cache_dir",
    "data.preparation.workers",
    "data.reading.index_file",
)
"""Keys and sections that may change without making another experiment of a spec: they say where
and how fast it runs, what is logged, and which of its folds."""


RootSpec = TypeVar("RootSpec", bound=Spec)


@dataclass(frozen=True)
class Loaded(Generic[RootSpec]):
    """A spec as it was asked for and as it was understood."""

    root: RootSpec
    """The root Struct, all sections filled in, ~ and $VAR expanded in its paths."""
    as_written: RootSpec
    """The same with its paths as they were given: what is kept of a run, and compared with it, so
    that a run may move between machines whose folders differ."""
    path: str
    """The file, as it was given."""
    overrides: tuple[str, ...]
    """The overrides, as they were given."""
    overridden: tuple[tuple[str, ...], ...]
    """Their keys."""
    group: str
    """Name of the run's group directory."""
    plain: dict
    """`as_written` as builtin types."""
    origins: Origins
    """Which file, or OVERRIDE, each key comes from; the others are defaults."""

    def group_but(self, free: Sequence[str]) -> str:
        """Name of the group directory without the overrides of some dotted keys."""
        keys = [key for key in self.overridden if not is_among(spec_errors.dotted(key), free)]
        return group_name(self.path, self.plain, keys)


def load_spec(
    path: str | os.PathLike, overrides: Sequence[str], root_type: type[RootSpec]
) -> Loaded[RootSpec]:
    """Read a spec, lay it over what it extends, lay the overrides over it and check every key.

    Raises:
        UserError: one line for each mistake: file, key, what was offered, what is valid.
    """
    path = spec_file(os.fspath(path))
    kind = spec_errors.struct_type(root_type)
    merge = Merge(kind)
    problems: list[str] = []
    tables = extended(path, merge, problems, ())
    tables, keys, mistakes = override(tables, overrides, merge)
    problems += [f"{path}: {mistake}" for mistake in mistakes]
    as_written, found = spec_errors.convert_tables(tables, kind)
    root = None if found else expanded(as_written, kind, (), found)
    for key, text in found:
        place = f"{spec_errors.dotted(key)}: " if key else ""
        problems.append(f"{located(merge.origins.of(key), path)}{place}{text}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    plain = to_plain(as_written)
    group = group_name(path, plain, keys)
    given = tuple(overrides), tuple(keys)
    return Loaded(root, as_written, path, *given, group, plain, merge.origins)


VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{([^}]*)\}|)")  # a lone dollar sign too
NAME = re.compile(r"[A-Za-z_]\w*")


def expand(text: str) -> str:
    """A path with ~ (at its start), $VAR and ${VAR} filled in; $$ stands for a dollar sign. What
    begins with package: is a file inside an installed package, package:NAME/path; of one that is
    not installed it stays as it is, and `errors.in_package` says so to who wants to read it.

    Raises:
        UserError: no such user, a variable that is not set, or no file of a package.
    """

    def value(found: re.Match) -> str:
        dollar, bare, braced = found.groups()
        name = bare or braced
        if dollar:
            return dollar
        if not (name and NAME.fullmatch(name)):
            raise UserError(
                f"{spec_errors.shown(text)}: {found[0]} is no environment variable; write $NAME or"
                " ${NAME}, and $$ for a dollar sign"
            )
        if filled := os.environ.get(name):
            return filled
        raise UserError(
            f"{spec_errors.shown(text)} needs the environment variable {name}, which is not set or"
            f" empty: export {name}=..., or write the path out"
        )

    if (inside := errors.in_package(text)) is not None:
        if not re.fullmatch(r"[^/:]+:[A-Za-z_]\w*/.+", text):
            raise UserError(
                f"{spec_errors.shown(text)}: write package:NAME/path, NAME as Python imports it"
            )
        return inside.path or text
    home = os.path.expanduser(text)
    if text.startswith("~") and home == text:
        raise UserError(f"{spec_errors.shown(text)}: there is no such home folder; write it out")
    return VARIABLE.sub(value, home)


def with_paths(struct: Any) -> Any:
    """A section that a file kept as it was written, with every path in it expanded.

    Raises:
        UserError: one line for each path that cannot be.
    """
    problems: list[tuple[Path, str]] = []
    table: type[Spec] = type(struct)
    found = expanded(struct, spec_errors.struct_type(table), (), problems)
    if problems:
        raise UserError("\n".join(f"{spec_errors.dotted(key)}: {text}" for key, text in problems))
    return found


def expanded(value: Any, kind: Type, path: Path, problems: list[tuple[Path, str]]) -> Any:
    """A Struct, or a value of it, with every path expanded; what cannot be is a problem of its
    key."""
    if isinstance(value, msgspec.Struct):
        member = next(m for m in spec_errors.structs(kind) if m.cls is type(value))
        changes: dict[str, Any] = {}
        for field in member.fields:
            old = getattr(value, field.name)
            new = expanded(old, field.type, (*path, field.name), problems)
            changes |= {} if new is old else {field.name: new}
        return msgspec.structs.replace(value, **changes) if changes else value
    item = spec_errors.item_type(kind) if isinstance(value, tuple) else None
    if item is not None and spec_errors.is_path(item):
        return tuple(expanded(v, item, (*path, f"[{i}]"), problems) for i, v in enumerate(value))
    if isinstance(value, str) and spec_errors.is_path(kind):
        try:
            return expand(value)
        except UserError as error:
            problems.append((path, str(error)))
    return value


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


def spec_file(path: str) -> str:
    """The file of a spec: the path as it was given, or the shipped spec of that name where there is
    nothing at the path and it has no suffix.

    Raises:
        UserError: no such spec; names that are near.
    """
    if os.path.exists(path) or os.path.splitext(path)[1]:
        return path
    from difflib import get_close_matches  # only ever needed for a message

    shipped = shipped_specs()
    if path in shipped:
        return shipped[path]
    near = get_close_matches(path, shipped, n=5) or shipped
    raise UserError(
        f"{path}: no such spec file, and none of that name comes with glovita; there are"
        f" {errors.listed(near)}"
    )


def shipped_specs() -> dict[str, str]:
    """Name, as in peft/vit_lora, and file of the specs that come with glovita."""
    package = pathlib.Path(__file__).parent
    installed, checkout = package / "specs", package.parent / "specs"
    folder = installed if installed.is_dir() else checkout
    files = sorted(folder.rglob("*.toml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): str(file) for file in files}


def similar_file(path: str) -> str:
    """The question after a file of a similar name beside the missing one."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder or "."):
        return f"; there is no folder {folder}"
    near = errors.nearest_word(os.path.basename(path), os.listdir(folder or "."))
    return f"; did you mean {os.path.join(folder, near)}?" if near else ""


def extended(path: str, merge: Merge, problems: list[str], chain: tuple[str, ...]) -> dict:
    """The tables of a file, laid over those of the file that it extends."""
    if any(os.path.realpath(path) == os.path.realpath(earlier) for earlier in chain):
        raise UserError(f"{chain[0]}: extends goes in a circle: {' -> '.join([*chain, path])}")
    tables = read_tables(path)
    parent = tables.pop("extends", None)
    base = {}
    if isinstance(parent, str):
        try:
            base_path = os.path.normpath(os.path.join(os.path.dirname(path), expand(parent)))
        except UserError as error:
            raise UserError(f"{path}: extends: {error}") from None
        if not os.path.isfile(base_path):
            raise UserError(
                f'{path}: extends: no such spec file: "{parent}" is looked for as {base_path}'
                f"{similar_file(base_path)}"
            )
        base = extended(base_path, merge, problems, (*chain, path))
    elif parent is not None:
        problems.append(
            f"{path}: extends: {spec_errors.shown(parent)} is not valid: it must be a string"
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
    import tomli_w

    return tomli_w.dumps(without_none(toml_tables(root)))


def toml_tables(root: Spec) -> dict:
    """A spec as the builtin types of TOML, which has dates and times as JSON has not; unset keys
    are None."""
    from datetime import date, datetime, time

    return msgspec.to_builtins(root, builtin_types=(datetime, date, time))


def without_none(value: Any) -> Any:
    """Tables without their unset keys."""
    if isinstance(value, dict):
        return {key: without_none(v) for key, v in value.items() if v is not None}
    return value


def changes_experiment(key: str) -> bool:
    """Whether another value of a dotted key makes another experiment."""
    return not is_among(key, NOT_THE_EXPERIMENT)


def is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of some, or stands in a section that is."""
    return any(key == same or key.startswith(f"{same}.") for same in keys)


def changed_keys(old: dict, new: dict, free: Sequence[str] = ()) -> list[str]:
    """Differences of two plain specs that make another experiment, as "key: old -> new".

    Args:
        free: keys that may differ too.
    """
    before, after = dict(flattened(with_lists(old))), dict(flattened(with_lists(new)))
    return [
        f"{key}: {spec_errors.shown(before.get(key))} -> {spec_errors.shown(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and changes_experiment(key) and not is_among(key, free)
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
    keys = sorted({spec_errors.dotted(key): key for key in overridden}.items())
    parts = [f"{key}={written(plain, at)}" for key, at in keys if changes_experiment(key)]
    return file_name(",".join([stem, *parts]))


def written(plain: dict, path: tuple[str, ...]) -> str:
    """The value at a path as it stands in a file name."""
    value: Any = plain
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, list):
        return "+".join(str(entry) for entry in value)
    return value if isinstance(value, str) else spec_errors.shown(value)
