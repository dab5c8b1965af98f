"""Rules within one section of a spec, checked before any data is read."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from glovita_lib.spec_data import (
    DigitsData,
    GenericImageData,
    PrecomputedData,
)
from glovita_lib.spec_errors import shown
from glovita_lib.spec_peft import (
    Adalora,
    Boft,
    Convpass,
    Lokr,
    Oft,
    RepAdapter,
    VisualPromptTuning,
)
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Umap

# -------------------------------------------------------------------------------------- data
#
# Rules of the data section, and what a spec says of its data before any of it is read.


def is_regression(root: Root) -> bool:
    """Whether numbers are predicted; where the data section does not say, the head does."""
    subtask = root.data.stated_subtask()
    return subtask == "regression" or (
        subtask is None and "classes" not in root.model.head.predicts
    )


def outputs_agree(root: Root) -> Iterator[str]:
    """All keys that state the number of classes state the same."""
    first, *others = root.data.stated_outputs() or [("", 0)]
    for key, count in others:
        if count != first[1]:
            yield f"{key}: {count} entries, but {first[0]} says {first[1]}"


def class_names_differ(root: Root) -> Iterator[str]:
    """No class name is given twice."""
    names = getattr(root.data, "class_names", None) or ()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield f"data.class_names: {shown(twice)} given more than once"


def task_fits_subtask(root: Root) -> Iterator[str]:
    """task and subtask agree."""
    data = root.data
    if not isinstance(data, GenericImageData) or data.task is None or data.subtask is None:
        return
    if (data.task == "Regression") != (data.subtask == "regression"):
        valid = '"regression"' if data.task == "Regression" else '"multiclass" or "multilabel"'
        yield (
            f"data.subtask: {shown(data.subtask)} contradicts data.task = {shown(data.task)}:"
            f" {valid} fits"
        )


def labels_fit_subtask(root: Root) -> Iterator[str]:
    """Folder names and single columns carry only what they can."""
    data = root.data
    if not isinstance(data, GenericImageData):
        return
    subtask = data.stated_subtask()
    if data.label_source == "folder" and subtask != "multiclass":
        yield (
            f'data.label_source: "folder" gives each image one class, not {subtask} targets: use'
            ' "csv" or "json"'
        )
    if data.split_source == "csv" and data.label_source != "csv":
        yield (
            f'data.split_source: "csv" needs data.label_source = "csv", not'
            f" {shown(data.label_source)}"
        )
    columns = data.label_column
    if data.label_source == "csv" and isinstance(columns, tuple):
        if subtask == "multiclass" and len(columns) != 1:
            yield (
                f"data.label_column: {shown(columns)} are {len(columns)} columns, and multiclass"
                ' reads one: name one, or set data.subtask to "multilabel" or "regression"'
            )
        elif not columns or len(set(columns)) < len(columns):
            yield f"data.label_column: {shown(columns)} must name different columns, one at least"


def folds_exist(root: Root) -> Iterator[str]:
    """The fold is one that exists, so that no two folds train on the same split."""
    data = root.data
    fold, count = data.fold, data.stated_folds()
    if count is not None and fold >= count:
        valid = (
            f"0 to {count - 1}" if count > 1 else '0 only; data.split_source = "kfold" makes more'
        )
        if not hasattr(data, "split_source"):
            valid = "0 only: this data set has one split; another seed draws another val"
        yield f"data.fold: {fold} does not exist: {valid}"


def feature_files_are_named(root: Root) -> Iterator[str]:
    """There is a file to read, and a table where the splits are read from one."""
    data = root.data
    elsewhere = root.mode == "umap" and root.umap.input is not None
    if not isinstance(data, PrecomputedData) or elsewhere:
        return
    drawn = data.split_source != "files"
    if drawn and data.features_file is None:
        yield (
            f"data.features_file: data.split_source = {shown(data.split_source)} divides the"
            " samples of one file or folder: name it here"
        )
    split_files = (data.train_features_file, data.val_features_file, data.test_features_file)
    if not drawn and split_files == (None, None, None):
        yield (
            "data.train_features_file: no feature file is named: name one a split, or data."
            'features_file with data.split_source = "kfold", "splits_json" or "csv"'
        )
    if data.split_source == "csv" and data.labels_file is None:
        yield 'data.labels_file: data.split_source = "csv" reads its split_column: name it here'


def fractions_leave_train(root: Root) -> Iterator[str]:
    """val and test leave something to train on."""
    data = root.data
    if isinstance(data, DigitsData) and data.val_fraction + data.test_fraction >= 1:
        total = data.val_fraction + data.test_fraction
        yield f"data.val_fraction: with data.test_fraction it is {total:g}: below 1 leaves a train"


def split_names_differ(root: Root) -> Iterator[str]:
    """Nothing is trained on and evaluated; val and test may be one split."""
    data = root.data
    if isinstance(data, GenericImageData):
        held_out = (data.val_split_name, data.test_split_name)
        if data.train_split_name in held_out:
            yield (
                f"data.train_split_name: {shown(data.train_split_name)} is the name of val or test"
                " too: no sample may be trained on and evaluated"
            )


def suffixes_are_named(root: Root) -> Iterator[str]:
    """Some file suffix counts as an image."""
    if getattr(root.data, "allowed_exts", None) == ():
        yield 'data.allowed_exts: [] allows no file: name one suffix at least, e.g. ["png"]'


def crop_fits_resize(root: Root) -> Iterator[str]:
    """The crop is cut from an image that is at least as large."""
    sizes = getattr(root.data, "augmentation", None)
    resize, size = getattr(sizes, "resize_size", None), getattr(sizes, "image_size", None)
    if resize is not None and size is not None and resize < size:
        yield (
            f"data.augmentation.resize_size: {resize} pixels are too few for the crop of"
            f" data.augmentation.image_size = {size}: at least {size}"
        )


def operations_are_valid(root: Root) -> Iterator[str]:
    """Parameters of augmentations make sense together."""
    data = root.data
    if isinstance(data, PrecomputedData):
        return
    sections = {
        "train_kwargs": data.augmentation.train_kwargs,
        "test_kwargs": data.augmentation.test_kwargs,
    }
    for section, ops in sections.items():
        for name, problem in ops.problems():
            yield f"data.augmentation.{section}.{name}: {problem}"


def data_problems(data: Any) -> list[str]:
    """All that is wrong with a data section by itself, one line each: what a spec is checked for
    before it is run, asked again by whatever builds a data set."""
    root = Root(data=data)
    return [line for rule in (*DATA_RULES, ignored_options) for line in rule(root)]


DATA_RULES = (
    task_fits_subtask,
    labels_fit_subtask,
    outputs_agree,
    class_names_differ,
    folds_exist,
    feature_files_are_named,
    fractions_leave_train,
    split_names_differ,
    suffixes_are_named,
    crop_fits_resize,
    operations_are_valid,
)
"""Rules of the data section, in the order in which their lines are shown."""

# -------------------------------------------------------------------------------------- PEFT
#
# What only the built encoder can tell
# (the layers that are there) is checked by the methods.


def method_of(root: Root) -> str:
    """Tag of the method."""
    return str(type(root.peft).__struct_config__.tag)


def there_is_an_encoder(root: Root) -> Iterator[str]:
    """Features of a file have no encoder that a method could change."""
    if root.model.encoder.takes == "features" and root.peft.needs_encoder:
        yield (
            f"peft.method: {shown(method_of(root))} changes an encoder, and precomputed features"
            ' have none: use "full_finetuning", which trains the head'
        )


def expressions(root: Root) -> Iterator[str]:
    """Targets and patterns of ranks are there and are regular expressions."""
    targets = getattr(root.peft, "targets", None)
    if targets == ():
        yield "peft.targets: [] names none: leave it out for the usual ones, or name one at least"
    given = [("targets", t) for t in targets or ()]
    given += [("rank_pattern", p) for p in getattr(root.peft, "rank_pattern", ())]
    for field, pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"peft.{field}: {shown(pattern)} is no regular expression: {error}"


def budget_falls(root: Root) -> Iterator[str]:
    """AdaLoRA ends with fewer ranks than it starts with, and has steps to take them away."""
    peft = root.peft
    if not isinstance(peft, Adalora):
        return
    if peft.rank > peft.init_rank:
        yield f"peft.rank: {peft.rank} is above peft.init_rank = {peft.init_rank}, the start"
    if peft.tinit + peft.tfinal >= 1:
        yield (
            f"peft.tinit: with peft.tfinal = {peft.tfinal:g} it leaves no step in which ranks are"
            " given: their sum must be below 1"
        )


def blocks_fit(root: Root) -> Iterator[str]:
    """Sizes of groups and blocks divide."""
    peft = root.peft
    if isinstance(peft, RepAdapter) and peft.bottleneck % peft.groups:
        yield f"peft.groups: {peft.groups} must divide peft.bottleneck = {peft.bottleneck}"
    if isinstance(peft, Lokr) and peft.decompose_factor == 0:
        yield "peft.decompose_factor: 0 is no size: use -1 for the usual one, or 1 and more"
    if isinstance(peft, Boft) and peft.n_butterfly > 1 and peft.block_size % 2:
        yield (
            f"peft.block_size: {peft.block_size} must be even for peft.n_butterfly ="
            f" {peft.n_butterfly}: use {peft.block_size + 1}, or one factor"
        )


def places_named(root: Root) -> Iterator[str]:
    """Convpass stands somewhere, and once."""
    if isinstance(root.peft, Convpass):
        places = root.peft.places
        if not places or len(set(places)) < len(places):
            yield 'peft.places: name "attn", "mlp" or both, each once'


def unread(root: Root) -> Iterator[str]:
    """Options that another one leaves without effect."""
    peft = root.peft
    if isinstance(peft, VisualPromptTuning) and not peft.deep and peft.deep_layers is not None:
        yield "peft.deep_layers: it is read with peft.deep = true only: leave it out"
    if isinstance(peft, Oft) and not peft.coft and peft.eps != default(peft, "eps"):
        yield "peft.eps: it is read with peft.coft = true only: leave it out"


def default(struct: Any, name: str) -> Any:
    """Default of a field."""
    return getattr(type(struct)(), name)


def merging_is_possible(root: Root) -> Iterator[str]:
    """infer.merge has something to merge, and can."""
    if not root.infer.merge or root.infer.checkpoint is not None:  # which knows its own method
        return
    if not root.peft.merges:
        yield (
            f"infer.merge: {shown(method_of(root))} computes something the base cannot, so it does"
            " not merge: leave it out"
        )


def export_is_one_file(root: Root) -> Iterator[str]:
    """infer.export is a safetensors file with the weights of one checkpoint."""
    infer = root.infer
    if infer.export is None:
        return
    if not infer.export.endswith(".safetensors"):
        yield f'infer.export: {shown(infer.export)} must end in ".safetensors", which it is'
    members = len(infer.folds or ()) if isinstance(infer.checkpoint, str | None) else 0
    members = max(members, len(infer.checkpoint) if isinstance(infer.checkpoint, tuple) else 1)
    if members > 1:
        yield (
            f"infer.export: it takes one checkpoint, and infer names {members}: export them one"
            " after another"
        )


PEFT_RULES = (
    there_is_an_encoder,
    expressions,
    budget_falls,
    blocks_fit,
    places_named,
    unread,
    merging_is_possible,
    export_is_one_file,
)

# -------------------------------------------------------------------------------------- umap

READ_BY = {
    "min_dist": ("umap",),
    "perplexity": ("tsne",),
    "pca": ("umap", "tsne"),
}
"""Keys that only some methods read."""


def umap_options(root: Root) -> Iterator[str]:
    """Keys of the section that contradict each other or that nothing would read."""
    umap = root.umap
    for key, methods in READ_BY.items():
        value = getattr(umap, key)
        if umap.method not in methods and value != getattr(Umap(), key):
            needs = " or ".join(f'"{method}"' for method in methods)
            yield (
                f"umap.{key}: {shown(value)} would be ignored, it is read only with umap.method ="
                f" {needs}"
            )
    of_features = umap.input is not None or root.data.samples == "features"
    if umap.bags != "mean" and not of_features:
        yield (
            f"umap.bags: {shown(umap.bags)} would be ignored, it is read only with umap.input or"
            ' data.dataset = "precomputed_features"'
        )
    if umap.input is not None and umap.split is not None:
        yield (
            f"umap.split: {shown(umap.split)} is a split of the spec's own data, but umap.input is"
            " set: drop one of them"
        )
    yield from color_options(umap, of_features=of_features)


def color_options(umap: Umap, *, of_features: bool) -> Iterator[str]:
    """Where the colours come from."""
    if umap.color_by == "column" and umap.color_file is None:
        yield 'umap.color_by: "column" needs umap.color_file, a CSV file with the column id'
    if umap.color_by == "prediction" and of_features:
        yield (
            'umap.color_by: "prediction" needs a run on images, feature files hold none: use'
            ' "column" with umap.color_file = "<predictions of mode infer>" and umap.color_column ='
            ' "prediction"'
        )
    if umap.color_file is not None and umap.color_column is None:
        yield "umap.color_column: name the column of umap.color_file"
    if umap.color_column is not None and umap.color_file is None:
        yield (
            f"umap.color_column: {shown(umap.color_column)} would be ignored, it is read only with"
            " umap.color_file"
        )


# ---------------------------------------------------------------------------- unread options
#
# Options that another setting leaves unread: changing one is an error, never without effect.


class Option(NamedTuple):
    """A key that is read only under a condition."""

    key: str
    """Dotted key."""
    is_read: Callable[[Root], bool]
    """Whether anything reads it; asked only where the key exists."""
    needs: str
    """The condition in words, as the setting that fulfils it."""


def reads_table(root: Root) -> bool:
    """Whether labels come from a CSV file."""
    if isinstance(root.data, GenericImageData):
        return root.data.label_source == "csv"
    return root.data.labels_file is not None


def reads_label_file(root: Root) -> bool:
    """Whether labels come from a file of their own."""
    return getattr(root.data, "label_source", None) != "folder"


INSTANCES = "model.head.instance_eval = true"
TOP_INSTANCES = "model.head.stochastic_topk = true"
LABEL_TABLE = 'data.label_source = "csv" (features: data.labels_file)'
OPTIONS = (
    # ---- data
    Option("data.split_file", lambda r: r.data.split_source == "splits_json",
           'data.split_source = "splits_json"'),
    Option("data.n_folds", lambda r: r.data.split_source == "kfold",
           'data.split_source = "kfold"'),
    Option("data.features_file", lambda r: r.data.split_source != "files",
           'data.split_source other than "files"'),
    *(Option(f"data.{split}_features_file", lambda r: r.data.split_source == "files",
             'data.split_source = "files"') for split in ("train", "val", "test")),
    Option("data.labels_key", lambda r: r.data.labels_file is None, "no data.labels_file"),
    Option("data.train_split_name", lambda r: r.data.split_source != "kfold",
           'data.split_source other than "kfold"'),
    Option("data.val_split_name", lambda r: r.data.split_source != "kfold",
           'data.split_source other than "kfold"'),
    Option("data.test_split_name", lambda r: r.data.split_source != "kfold",
           'data.split_source other than "kfold"'),
    Option("data.labels_file", reads_label_file,
           'data.label_source = "csv" or "json"'),
    Option("data.split_column", lambda r: r.data.split_source == "csv",
           'data.split_source = "csv"'),
    Option("data.path_column", reads_table, LABEL_TABLE),
    Option("data.id_column", reads_table, LABEL_TABLE),
    Option("data.label_column", reads_table, LABEL_TABLE),
    Option("data.group_column", reads_table, LABEL_TABLE),
    Option("data.label_separator",
           lambda r: reads_table(r) and r.data.stated_subtask() == "multilabel"
           and isinstance(r.data.label_column, str),
           'data.label_source = "csv", data.subtask = "multilabel" and one data.label_column'),
    # ---- extract
    Option("extract.norm", lambda r: r.extract.layers, "extract.layers"),
    Option("extract.prefix_tokens", lambda r: r.extract.output == "tokens",
           'extract.output = "tokens"'),
    Option("extract.method", lambda r: r.extract.output == "embedding",
           'extract.output = "embedding"'),
    Option("extract.coords_file", lambda r: r.extract.bag_by is not None, "extract.bag_by"),
    Option("extract.use",
           lambda r: r.extract.checkpoint is None and r.extract.source == "run",
           'extract.source = "run" and no extract.checkpoint'),
    # ---- model
    Option("model.encoder.weights_order", lambda r: r.model.encoder.weights is not None,
           "model.encoder.weights"),
    Option("model.head.k_sample", lambda r: r.model.head.instance_eval, INSTANCES),
    Option("model.head.subtyping", lambda r: r.model.head.instance_eval, INSTANCES),
    Option("model.head.instance_loss", lambda r: r.model.head.instance_eval, INSTANCES),
    Option("model.head.bag_weight", lambda r: r.model.head.instance_eval, INSTANCES),
    Option("model.head.instance_loss_weight", lambda r: r.model.head.instance_eval, INSTANCES),
    Option("model.head.l2_normalize_features", lambda r: r.model.head.feature_prep,
           "model.head.feature_prep = true"),
    Option("model.head.layer_norm_eps", lambda r: r.model.head.feature_prep,
           "model.head.feature_prep = true"),
    Option("model.head.cosine_scale", lambda r: r.model.head.cosine_head,
           "model.head.cosine_head = true"),
    Option("model.head.topk_k", lambda r: r.model.head.stochastic_topk, TOP_INSTANCES),
    Option("model.head.topk_tau", lambda r: r.model.head.stochastic_topk, TOP_INSTANCES),
    Option("model.head.topk_noise_std", lambda r: r.model.head.stochastic_topk, TOP_INSTANCES),
    Option("model.head.topk_consistency_weight", lambda r: r.model.head.stochastic_topk,
           TOP_INSTANCES),
    # ---- task
    Option("task.mixup_alpha", lambda r: r.task.mixup, "task.mixup = true"),
    Option("task.cutmix_alpha", lambda r: r.task.cutmix, "task.cutmix = true"),
    Option("task.regression_loss", is_regression, "a regression"),
    Option("task.standardize_targets", is_regression, "a regression"),
    # ---- training and loading
    Option("training.early_stopping_min_delta",
           lambda r: r.training.early_stopping_patience is not None,
           "training.early_stopping_patience"),
    Option("dataloading.prefetch_factor", lambda r: r.dataloading.num_workers != 0,
           "dataloading.num_workers above 0"),
    Option("dataloading.timeout", lambda r: r.dataloading.num_workers != 0,
           "dataloading.num_workers above 0"),
    # ---- optimizer
    Option("optimizer.momentum", lambda r: r.optimizer.name in ("SGD", "RMSprop"),
           'optimizer.name = "SGD" or "RMSprop"'),
    Option("optimizer.nesterov", lambda r: r.optimizer.name == "SGD", 'optimizer.name = "SGD"'),
    Option("optimizer.betas", lambda r: r.optimizer.name in ("Adam", "AdamW"),
           'optimizer.name = "Adam" or "AdamW"'),
    Option("optimizer.gamma", lambda r: r.optimizer.scheduler in ("Step", "MultiStep"),
           'optimizer.scheduler = "Step" or "MultiStep"'),
    Option("optimizer.min_lr", lambda r: r.optimizer.scheduler == "CosineAnneal",
           'optimizer.scheduler = "CosineAnneal"'),
    Option("optimizer.layer_wise_lr_decay", lambda r: r.peft.trains != "head",
           'peft.method other than "linear_probing", which trains the head alone'),
    # ---- infer
    Option("infer.use", lambda r: r.infer.checkpoint is None,
           "the spec's own run: infer.checkpoint names its file itself"),
    Option("infer.attention_maps", lambda r: r.infer.attention, "infer.attention = true"),
)  # fmt: skip


def ignored_options(root: Root) -> Iterator[str]:
    """Options away from their default that nothing would read."""
    for option in OPTIONS:
        owner, name = owner_of(root, option.key)
        if owner is None or getattr(owner, name) == option_default(owner, name):
            continue
        if not option.is_read(root):
            value = shown(getattr(owner, name))
            yield f"{option.key}: {value} would be ignored, it is read only with {option.needs}"


def owner_of(root: Root, key: str) -> tuple[Any, str]:
    """The Struct that holds a dotted key, None where this spec's members have no such field."""
    *sections, name = key.split(".")
    owner: Any = root
    for section in sections:
        owner = getattr(owner, section, None)
    return (owner if hasattr(owner, name) else None), name


def option_default(owner: Any, name: str) -> Any:
    """Default of a field; fields and defaults are aligned at their ends."""
    fields, defaults = owner.__struct_fields__, owner.__struct_defaults__
    return defaults[fields.index(name) - len(fields)]
