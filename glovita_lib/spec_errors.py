"""Types of a spec's fields in words, and all mistakes of its tables at once."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec import inspect as kinds
from msgspec.inspect import Field, StructType, Type

from glovita_lib import errors
from glovita_lib.errors import meant

Fraction = Annotated[float, Meta(gt=0, le=1)]
PathText = Annotated[str, Meta(extra={"path": True})]
"""A file or folder; ~, $VAR and ${VAR} are filled in when a spec is loaded (see spec.expand)."""
SampleKind = Literal["images", "volumes", "series", "videos", "features", "either"]
"""What a sample is; either is told by a function of the user, or any that is no feature."""

# --------------------------------------------------------------------------- bounded numbers

Count = Annotated[int, Meta(ge=1)]
CALLED_PRECISIONS = {
    **dict.fromkeys(("fp32", "float32", "32"), "no"),
    **dict.fromkeys(("float16", "half", "16"), "fp16"),
    "bfloat16": "bf16",
}
"""What precisions are called elsewhere."""
Precision = Annotated[
    Literal["auto", "no", "bf16", "fp16"], Meta(extra={"called": CALLED_PRECISIONS})
]

# --------------------------------------------------------------------------- types of fields
#
# What the spec engine asks of a field's type: its union members, its description in words.
#
# The types are those of `msgspec.inspect`; nothing here knows a particular section of the spec.

MOST_SHOWN = 60  # characters of an offered value in a message


def options_of(kind: Type) -> tuple[Type, ...]:
    """The types that a union allows, without what is noted beside them; any other type allows
    itself."""
    return tuple(o.type if isinstance(o, kinds.Metadata) else o for o in noted_options(kind))


def noted_options(kind: Type) -> tuple[Type, ...]:
    """The types that a union allows, each with what is noted beside it."""
    union = kind.type if isinstance(kind, kinds.Metadata) else kind
    return union.types if isinstance(union, kinds.UnionType) else (kind,)


def extra_of(kind: Type) -> dict[str, Any]:
    """What is noted beside a field's type, or one of the types of its union, with
    msgspec.Meta(extra=...)."""
    noted = (o.extra or {} for o in (kind, *noted_options(kind)) if isinstance(o, kinds.Metadata))
    return {key: value for notes in noted for key, value in notes.items()}


def structs(kind: Type) -> list[StructType]:
    """Tables that the type allows: the members of a tagged union, one Struct, or none."""
    return [option for option in options_of(kind) if isinstance(option, StructType)]


FOUND: dict[type, StructType] = {}
"""The type of each Struct that was met. To find that of the whole spec takes a third of what a
check takes; it holds those of all sections."""


def struct_type(struct: type[msgspec.Struct]) -> StructType:
    """The type of a Struct itself."""
    if struct not in FOUND:
        keep(kinds.type_info(struct))
    return FOUND[struct]


def keep(kind: Type) -> None:
    """Note the Structs that a type names, and those of their fields."""
    for option in structs(kind):
        if option.cls not in FOUND:
            FOUND[option.cls] = option
            for field in option.fields:
                keep(field.type)


def tag_field(kind: Type) -> str | None:
    """Name of the tag of a union's members; None where there are no members, or one without."""
    return next((member.tag_field for member in structs(kind)), None)


def is_optional(kind: Type) -> bool:
    """Whether the field may be unset (None)."""
    return any(isinstance(option, kinds.NoneType) for option in options_of(kind))


def is_free(kind: Type) -> bool:
    """Whether the type is a table with keys of the user's choice, or accepts anything."""
    return any(isinstance(option, kinds.DictType | kinds.AnyType) for option in options_of(kind))


def literals(kind: Type) -> list[Any]:
    """Values that the type lists one by one."""
    listed = (option for option in options_of(kind) if isinstance(option, kinds.LiteralType))
    return [value for option in listed for value in option.values]


def default_member(kind: Type, default: Any) -> StructType | None:
    """Member of a union that a table without a tag is: the type of the field's default."""
    members = structs(kind)
    if len(members) == 1:
        return members[0]
    return next((member for member in members if type(default) is member.cls), None)


def chosen_member(kind: Type, default: Any, table: dict) -> StructType | None:
    """Member of a union that a table names by its tag; None where the tag is unknown or missing."""
    field = tag_field(kind)
    if field is None or field not in table:
        return default_member(kind, default)
    return next((member for member in structs(kind) if member.tag == table[field]), None)


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


def describe_type(kind: Type) -> str:
    """What a field accepts, in words; that it may be unset is left out.

    >>> from typing import Annotated
    >>> describe_type(kinds.type_info(Annotated[int, msgspec.Meta(ge=1)]))
    'a whole number >= 1'
    """
    tables = structs(kind)
    parts = ["a table"] if tables else []
    if len(tables) > 1:
        parts = [f"a table with {tables[0].tag_field} = {one_of(t.tag for t in tables)}"]
    for option in noted_options(kind):
        if is_path(option):
            parts.append("a path (a string; ~ and $VAR are filled in)")
        elif not isinstance(option, StructType | kinds.NoneType):
            parts.append(describe_plain(options_of(option)[0]))
    return " or ".join(parts)


def is_path(kind: Type) -> bool:
    """Whether strings of the type are paths."""
    return bool(extra_of(kind).get("path"))


def describe_plain(kind: Type) -> str:
    """Description of a type that is neither a union nor a Struct."""
    if isinstance(kind, kinds.LiteralType):
        return one_of(kind.values)
    if isinstance(kind, kinds.IntType):
        return "a whole number" + bounds(kind)
    if isinstance(kind, kinds.FloatType):
        return "a number" + bounds(kind)
    if isinstance(kind, kinds.VarTupleType | kinds.ListType):
        return f"an array, each entry {describe_type(kind.item_type)}"
    if isinstance(kind, kinds.TupleType):
        entries = [describe_type(item) for item in kind.item_types]
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


# ---------------------------------------------------------------------------------- mistakes
#
# Each mistake says what was offered and what is valid. msgspec's own conversion stops at the first
# mistake and names no valid tag, so the tables are walked here beside the types, and are converted
# only when nothing was found.

Path = tuple[str, ...]

MUON = ("muon_momentum", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
NAMED_DATA = (
    "imagenet", "pcam", "rxrx1", "neudet", "zooscannet", "aid", "chestxray14", "resisc45",
    "flowers102", "fgvc_aircraft", "diabetic_retina",
)  # fmt: skip
NAMED_POLICIES = (
    "dataset_specific", "autoaugment", "albumentations", "timm_randaugment", "randaugment_448",
    "randaugment_224", "aid_large_crop", "native",
)  # fmt: skip
REPLACED = {
    "data.num_classes": "this data set says itself how many classes it has",
    "data.task": "the targets of this data set say it",
    "data.subtask": "the targets of this data set say it",
    "data.dataset_kwargs": "every option of a data set is a key of its section; those of your own"
    ' function (dataset = "custom") stand in data.options',
    "data.augmentation": "features are taken as they are",
    "data.augmentation.cutout_size": "it is data.augmentation.train_kwargs.cutout_size, with the"
    " policy's other parameters",
    "model.encoder.weight_dir": "model.encoder.weights names the file or folder itself",
    **dict.fromkeys(
        ("model.head.stem_key", *(f"model.head.layer{i}_key" for i in range(2, 5))),
        "model.head.stages names the encoder's stages",
    ),
    "model.head.num_clip_frames": "the head takes clips of any length; data.clip.frames sets it",
    "peft.dropout": "this method has none; --explain peft.dropout lists those that have it",
    "peft.freeze_backbone": "the method trains what it adds and the head; layers of the"
    ' encoder train with method = "partial_finetuning" or "full_finetuning"',
    "peft.init_lora_weights": "the method changes nothing at its start",
    "peft.init_option": "Up starts at zero, so that the method changes nothing at its start",
    "peft.init_scale": "prompts are drawn as in the paper of the method, by the size of a patch",
    "peft.scale_init": "peft.scale is the factor, which does not train; U starts at zero",
    "peft.orth_reg_weight": "it is peft.orth_reg",
    "peft.cayley_neumann": "it is peft.use_cayley_neumann",
    "task.metric_computation_mode": "every metric is computed once over all samples of a split",
    "training.seed": "seed stands at the top of the spec",
    "training.cv_folds": 'data.split_source = "kfold" and data.n_folds make folds; each'
    " data.fold = 0, 1 ... is a run, and summary.json covers those that are done",
    "training.cluster_progress_bar": "the progress bar gives way to lines where the output"
    " is no terminal",
    "dataloading.drop_last_eval": "evaluation counts every sample once, whatever the batch size",
    "dataloading.shuffle_eval": "evaluation does not depend on the order; predictions stand in that"
    " of the data",
    "dataloading.use_worker_init_fn": "random numbers follow from (seed, epoch, sample), whichever"
    " process draws them",
    **dict.fromkeys(
        [f"optimizer.{name}" for name in MUON],
        "it is an option of Muon, which is not here; the other optimizers keep PyTorch's",
    ),
    "logger.experiment_name": "a run's experiment is the data set, its run the group and fold",
    "extract.checkpoint_path": "it is extract.checkpoint",
    **dict.fromkeys(
        [f"extract.{name}" for name in ("data", "model", "peft", "dataloading")],
        "the section of this name at the top of the spec serves every mode",
    ),
    **dict.fromkeys(
        ("infer.data", "infer.dataloading"),
        "the section of this name at the top of the spec serves every mode",
    ),
    "infer.exp_dir": "exp_dir stands at the top of the spec; infer.checkpoint names any other file",
    "infer.fold": "it is data.fold for one run, infer.folds for the mean of several",
    "infer.metrics": "task.metrics are those of training and of evaluation",
    "infer.pred_output": "predictions are always written, as predictions_<split>.csv",
    "umap.h5_path": "it is umap.input",
    "umap.output_path": "it is umap.output_dir, the folder of the figure, page and table",
}
"""Keys of GloViTa that are not here, and what does their work. Further ones differ by name or
place alone, which "did you mean" says."""
REPLACED_VALUES = {
    ("data.dataset", NAMED_DATA): "its published files are read as generic_image_dataset, or by a"
    " function of your own (custom)",
    ("data.augmentation.train_policy", NAMED_POLICIES): "default_2d_1 to default_2d_5 and"
    " randaugment take any image size, and data.augmentation.train_kwargs sets each operation",
    ("data.augmentation.train_policy", ("dino",)): "it makes two views of an image for"
    " self-supervised training, which is not here",
    ("data.augmentation.test_policy", ("default_448", "default_224", "dino")): '"default" takes'
    " the size from data.augmentation.image_size, unset that of the encoder",
    ("model.encoder.encoder_type", ("dinov2", "dinov3")): 'timm has them: encoder_type = "timm",'
    ' type = "vit_base_patch14_dinov2" or "vit_base_patch16_dinov3"',
    ("extract.compression", tuple(f"gzip:{level}" for level in range(10))): "the level is"
    ' extract.compression_level, beside compression = "gzip"',
    ("task.metrics", ("pr",)): 'name "precision" and "recall"',
    ("optimizer.name", ("Muon", "Madgrad")): "PyTorch's AdamW, Adam, SGD and RMSprop are here",
    ("logger.backend", ("mlflow",)): "metrics.jsonl of a run holds all its numbers, and wandb can"
    " be offline",
}
"""Values of GloViTa that are not here, by key, and what does their work."""


def replaced_value(path: Path, value: Any) -> str:
    """What does the work of a value of GloViTa that is not here; empty for any other."""
    key = dotted(path).partition("[")[0]
    texts = (text for (at, names), text in REPLACED_VALUES.items() if at == key and value in names)
    return "; ".join(texts)


class Walk:
    """One walk over the tables of a spec; collects `problems` and returns completed tables."""

    def __init__(self, root: StructType) -> None:
        self.root = root
        self.problems: list[tuple[Path, str]] = []
        """Path of the key and what is wrong with it."""

    def table(self, table: dict, kind: Type, default: Any, path: Path) -> dict:
        """A table with its tag filled in, checked against the Struct it stands for."""
        member = chosen_member(kind, default, table)
        if member is None:
            self.unknown_tag(table, kind, path)
            return table
        done = {member.tag_field: member.tag} if member.tag_field else {}
        fields = {field.name: field for field in member.fields}
        for key, value in table.items():
            if key in fields:
                field = fields[key]
                done[key] = self.value(value, field.type, default_of(field), (*path, key))
            elif key != member.tag_field:
                self.unknown_key(key, value, member, kind, path)
        for name, field in fields.items():
            if field.required and name not in table:
                self.add((*path, name), f"missing: it must be {describe_type(field.type)}")
        return done

    def value(self, value: Any, kind: Type, default: Any, path: Path) -> Any:
        """Any value; tables and arrays are walked, the rest is compared with its type."""
        if isinstance(value, dict):
            if structs(kind):
                return self.table(value, kind, default, path)
            entries = [o for o in options_of(kind) if isinstance(o, kinds.DictType)]
            if entries and not is_free(entries[0].value_type):
                for key, entry in value.items():
                    self.value(entry, entries[0].value_type, None, (*path, key))
            elif not is_free(kind):
                self.mismatch(value, kind, path)
            return value
        if isinstance(value, list):
            self.array(value, kind, path)
        elif not any(value_fits(value, option) for option in options_of(kind)):
            self.mismatch(value, kind, path)
        elif isinstance(value, str) and not is_free(kind) and is_controlled(value):
            self.add(path, f'"{errors.visible(value)}" holds a control character: leave it out')
        return value

    def array(self, value: list, kind: Type, path: Path) -> None:
        """An array: its length and each of its entries."""
        free = any(isinstance(option, kinds.AnyType) for option in options_of(kind))
        for option in options_of(kind):
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
        text = f"{shown(value)} is not valid: it must be {describe_type(kind)}"
        replaced = replaced_value(path, value)
        self.add(path, text + (f"; {replaced}" if replaced else hint(value, kind)))

    def unknown_tag(self, table: dict, kind: Type, path: Path) -> None:
        """A union's table that names no member."""
        field, tags = tag_field(kind), [str(member.tag) for member in structs(kind)]
        assert field is not None  # of a table without a tag there is one kind
        if field not in table:
            self.add((*path, field), f"missing: it must be {one_of(tags)}")
            return
        offered = table[field]
        text = f"{shown(offered)} is unknown: it must be {one_of(tags)}"
        replaced = replaced_value((*path, field), offered)
        hint_of = f"; {replaced}" if replaced else meant(str(offered), tags)
        fields = {field.name for member in structs(kind) for field in member.fields}
        if not replaced and "type" in fields:  # the name of a model may be meant
            near = errors.nearest_word(str(offered), tags, 0.85)
            model = f"; the name of a model stands in {dotted((*path, 'type'))}"
            hint_of = f'; did you mean "{near}"?' if near else model
        self.add((*path, field), text + hint_of)

    def unknown_key(self, key: str, value: Any, member: StructType, kind: Type, path: Path) -> None:
        """A key that the table does not have; says where it belongs if it exists elsewhere."""
        if (replaced := REPLACED.get(dotted((*path, key)))) is not None:
            self.add((*path, key), f"unknown key (offered {shown(value)}): {replaced}")
            return
        names = [field.name for field in member.fields]
        names += [member.tag_field] if member.tag_field else []
        text = f"unknown key (offered {shown(value)}); valid here: {', '.join(names)}"
        owners = [
            other.tag for other in structs(kind) if any(field.name == key for field in other.fields)
        ]
        if owners:
            text += f"; {key} belongs to {member.tag_field} = {one_of(owners)}"
        elif near := errors.nearest_word(key, names, 0.75):
            text += f'; did you mean "{near}"?'
        elif places := self.places(key):
            text += f"; did you mean {' or '.join(places[:3])}?"
        elif near := errors.nearest_word(key, names):
            text += f'; did you mean "{near}"?'
        self.add((*path, key), text)

    def places(self, key: str) -> list[str]:
        """Dotted keys of the whole spec that end in this name."""
        every = dict.fromkeys(all_keys(self.root))
        return [dotted for dotted in every if dotted.rpartition(".")[2] == key]


def is_controlled(text: str) -> bool:
    """Whether a text holds line ends or other control characters; one tab or line feed alone is a
    separator."""
    return text not in ("\t", "\n") and errors.CONTROL.search(text) is not None


def value_fits(value: Any, kind: Type) -> bool:
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


def as_entry(value: Any, entry: Type) -> str | None:
    """How a value is written as the one entry of an array; None where it can be none of these."""
    if isinstance(value, list | dict):
        return None
    near = meant(value, texts(entry)) if isinstance(value, str) else ""
    fits = any(value_fits(value, option) for option in options_of(entry))
    return f"; write [{shown(value)}]{near}" if fits or near else None


def hint(value: Any, kind: Type) -> str:
    """How to mend a value of the wrong type, where that can be told."""
    options = options_of(kind)
    if (ours := extra_of(kind).get("called", {}).get(str(value).lower())) is not None:
        return f"; write {shown(ours)}"
    if isinstance(value, str) and (near := meant(value, texts(kind))):
        return near
    if isinstance(value, float) and value.is_integer() and value_fits(int(value), kind):
        return f"; write {int(value)}"
    if extra_of(kind).get("last_n") and value == "last":
        return "; write [-1]"
    if extra_of(kind).get("last_n") and type(value) is int and value > 0:
        last = shown(list(range(-value, 0)))
        return f"; write {last} for the last {value}, which timm means, or [{value}] for that one"
    entry = item_type(kind)
    if entry is not None and (written := as_entry(value, entry)) is not None:
        return written
    number = parsed(value) if isinstance(value, str) else None
    if number is not None and any(value_fits(number, option) for option in options):
        return f"; write {shown(number)} without quotes"
    return ""


def item_type(kind: Type) -> Type | None:
    """Type of the entries of an array type."""
    arrays = (option for option in options_of(kind) if isinstance(option, kinds.VarTupleType))
    return next((array.item_type for array in arrays), None)


def texts(kind: Type) -> list[str]:
    """Strings that a type lists one by one; true and false for a boolean."""
    words = [value for value in literals(kind) if isinstance(value, str)]
    is_bool = any(isinstance(option, kinds.BoolType) for option in options_of(kind))
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


def convert_tables(plain: dict, root: StructType) -> tuple[Any, list[tuple[Path, str]]]:
    """The Structs of a spec's tables, or None and all mistakes with the paths of their keys."""
    walk = Walk(root)
    done = walk.table(plain, root, None, ())
    if walk.problems:
        return None, walk.problems
    try:
        return msgspec.convert(done, root.cls, strict=True), []
    except msgspec.ValidationError as error:  # a bound that the walk does not know
        return None, [((), str(error))]


Dropout = Annotated[float, Meta(ge=0, lt=1)]
FoldName = Annotated[int, Meta(ge=0)] | str
"""A fold by number or, of a split file that names its folds otherwise, by name."""
NOT_IN_A_NAME = r'[/\\:*?"<>|\x00-\x1f]'
"""Characters that no folder of a run may have in its name."""


def names_a_folder(name: str) -> bool:
    """Whether a text can be the name of a folder of a run."""
    return bool(name.strip(" .")) and not re.search(NOT_IN_A_NAME, name)


NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
