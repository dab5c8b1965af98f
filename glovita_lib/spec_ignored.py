"""Options that another setting leaves unread: changing one is an error, never without effect."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from glovita_lib.spec_check_data import is_regression, subtask_of
from glovita_lib.spec_data import GenericImageData
from glovita_lib.spec_peft import LinearProbing
from glovita_lib.spec_root import Root
from glovita_lib.spec_types import shown


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
    Option("data.split_column", lambda r: r.data.split_source == "column",
           'data.split_source = "column"'),
    Option("data.path_column", reads_table, LABEL_TABLE),
    Option("data.id_column", reads_table, LABEL_TABLE),
    Option("data.label_column", reads_table, LABEL_TABLE),
    Option("data.group_column", reads_table, LABEL_TABLE),
    Option("data.label_separator",
           lambda r: reads_table(r) and subtask_of(r.data) == "multilabel"
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
    Option("optimizer.layer_wise_lr_decay", lambda r: not isinstance(r.peft, LinearProbing),
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
        if owner is None or getattr(owner, name) == default_of(owner, name):
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


def default_of(owner: Any, name: str) -> Any:
    """Default of a field; fields and defaults are aligned at their ends."""
    fields, defaults = owner.__struct_fields__, owner.__struct_defaults__
    return defaults[fields.index(name) - len(fields)]
