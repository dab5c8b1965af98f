"""What the documents of GloViTa say: their commands run, or say what took their place.

The commands stand here as there; `overrides_of` writes them as overrides.
"""

import json
import re
import shlex
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from msgspec import inspect as kinds
from PIL import Image
from sklearn.datasets import load_digits

import glovita
from glovita_lib import dist, run_probe
from glovita_lib.errors import UserError
from glovita_lib.experiment import read_data
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_errors import (
    REPLACED,
    REPLACED_VALUES,
    item_type,
    options_of,
    structs,
    texts,
)
from glovita_lib.spec_root import Root, head_is_named

REPOSITORY = Path(__file__).parent.parent
RANKS = dist.Ranks(0, 1, 0, torch.device("cpu"))
X, Y = load_digits(return_X_y=True)

CIFAR = """
  --data.dataset cifar10 --data.data_root_dir ./data --model.encoder.encoder_type timm
  --model.encoder.type resnet50.a1_in1k --model.encoder.no_pretrained
  --model.head.head_type classification"""
COMMANDS = {  # the documents' own words; ... of theirs is CIFAR
    "explicit": f"{CIFAR} --peft.method full_finetuning --dataloading.batch_size 128",
    "subcommands": """
      --dataloading.batch_size 128 data:cifar10-config --data.data_root_dir ./data
      model.encoder:timm-encoder-config --model.encoder.type resnet50.a1_in1k
      --model.encoder.no_pretrained model.head:classification-head-config
      peft:full-finetuning-config""",
    "overrides": "--training.epochs 50 --optimizer.lr 3e-4 --data.augmentation.image_size 224",
    "metadata": f"""{CIFAR} --add_log.comment "scratch baseline"
      --add_log.dataset_alias CIFAR10_small --add_log.notes.phase warmup""",
    "short run": f"{CIFAR} --training.epochs 2 --dataloading.batch_size 128",
    "best": f"{CIFAR} --training.best_checkpoint_metric val_f1",
    "folder": """
      --data.dataset generic_image_dataset --data.data_root_dir /data/MyDataset
      --data.num_classes 2 --data.split_source subdirs --data.label_source folder
      --model.encoder.encoder_type timm --model.encoder.type resnet50.a1_in1k
      --model.head.head_type classification""",
    "regression": """
      --data.dataset generic_image_dataset --data.data_root_dir /data/MyDataset
      --data.split_source splits_json --data.label_source csv
      --data.task Regression --data.subtask regression --data.num_classes 1
      --model.head.head_type regression""",
}
REFUSED = {
    "chestxray14": (
        """--data.dataset chestxray14 --data.data_root_dir /data/ChestXray14
          --data.augmentation.train_policy default_2d_4
          --data.augmentation.test_policy shared_default_2d""",
        'data.dataset: "chestxray14" is unknown: it must be "digits", "cifar10"',
    ),
    "mlflow": (
        f"{CIFAR} logger:mlflow-logger-config",
        'logger.backend: "mlflow" is unknown: it must be "wandb" or "none"; metrics.jsonl of',
    ),
    "tracking_uri": (
        f"{CIFAR} logger:wandb-logger-config --logger.tracking_uri ./mlflow",
        "logger.tracking_uri: unknown key",
    ),
    "F1": (f"{CIFAR} --training.best_checkpoint_metric F1", "did you mean val_f1?"),
}


def overrides_of(command: str) -> list[str]:
    """Flags of GloViTa's command line as overrides: `--a.b c`, `--a.no_b`, `--a.b` alone, and
    `a:member-of-a-config`, whose tag field is that of the union."""
    words, found = shlex.split(command), []
    suffix = {"data": "dataset", "peft": "method", "logger": "backend"}
    kinds = {"model.encoder": "encoder", "model.head": "head", "logger": "logger"}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            section, name = word.split(":")
            kind = kinds.get(section)
            tag = name.removesuffix("-config").removesuffix(f"-{kind}").replace("-", "_")
            found.append(f"{section}.{suffix.get(section, f'{kind}_type')}={tag}")
            continue
        key = word.removeprefix("--")
        head, _, last = key.rpartition(".")
        if last.startswith("no_"):
            found.append(f"{head}.{last.removeprefix('no_')}=false")
        elif not words or words[0].startswith("--") or re.match(r"[a-z.]+:", words[0]):
            found.append(f"{key}=true")
        else:
            found.append(f"{key}={words.pop(0)}")
    return found


def checked(folder: Path, overrides):
    """The spec that overrides alone make."""
    (folder / "spec.toml").write_text("")
    return load_checked(folder / "spec.toml", overrides)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_valid(tmp_path, name):
    """Every flag has become the value of its key."""
    overrides = overrides_of(COMMANDS[name])
    plain = checked(tmp_path, overrides).plain
    for override in overrides:
        key, _, text = override.partition("=")
        value = plain
        for part in key.split("."):
            value = value[part]
        said = value if isinstance(value, str) else json.dumps(value)
        assert said == text or float(said) == float(text), override


def test_both_styles_of_the_first_command_are_one_spec(tmp_path):
    styles = [checked(tmp_path, overrides_of(COMMANDS[n])) for n in ("explicit", "subcommands")]
    assert styles[0].root == styles[1].root


@pytest.mark.parametrize("name", REFUSED)
def test_commands_that_are_refused_say_the_way(tmp_path, name):
    command, text = REFUSED[name]
    with pytest.raises(UserError) as caught:
        checked(tmp_path, overrides_of(command))
    assert text in str(caught.value)


DATA = "data_root_dir data_fraction fold stratified augmentation dataset_kwargs num_classes subtask"
POLICIES = "train_policy test_policy mean std train_kwargs test_kwargs patch_size cutout_size"
VIDEO = "type pretrained input_channels return_intermediates intermediate_names model_kwargs"
OPTIONS = {  # section, tag: the options that the documents name there
    ("", ""): "data model peft task training dataloading optimizer logger add_log exp_dir",
    ("data", "cifar10"): f"{DATA} task",
    ("data", "cifar100"): f"{DATA} task",
    ("data", "generic_image_dataset"): f"""{DATA} task images_dir split_source label_source
        split_file labels_file path_column label_column train_split_name val_split_name
        test_split_name allowed_exts class_names strict""",
    ("data", "generic_3d_dataset"): f"{DATA} task",
    ("data", "precomputed_features"): f"""{DATA} task train_features_file val_features_file
        test_features_file""",
    ("data.augmentation", ""): f"{POLICIES} image_size resize_size crop_size",
    ("model", ""): "encoder head feature_aggregation_method",
    ("model.encoder", "timm"): "type pretrained input_channels model_kwargs",
    ("model.encoder", "transformer"): "type pretrained input_channels model_kwargs",
    ("model.encoder", "torchvision"): """type pretrained input_channels dropout
        stochastic_depth_prob model_kwargs""",
    ("model.encoder", "torchvision_video"): VIDEO,
    ("model.encoder", "pytorchvideo"): f"{VIDEO} pathway_mode slowfast_alpha",
    ("model.encoder", "residual_encoder"): """input_channels spatial_dim features_per_stage
        kernel_sizes strides n_blocks_per_stage conv_bias norm dropout_p nonlinearity block_type
        bottleneck_channels stem_channels pool_type stochastic_depth_p squeeze_excitation
        squeeze_excitation_reduction_ratio""",
    ("model.encoder", "primus"): """variant input_channels input_shape patch_embed_size
        drop_path_rate patch_drop_rate""",
    ("model.encoder", "nnfoundation"): """checkpoint_path pretrained input_channels drop_path_rate
        input_shape""",
    ("model.encoder", "precomputed"): "feature_dim",
    ("model.head", "classification"): "dropout init_std",
    ("model.head", "regression"): "dropout out_dim",
    ("model.head", "clam"): """variant gate size_arg dropout k_sample subtyping feature_prep
        l2_normalize_features layer_norm_eps cosine_head cosine_scale instance_eval
        instance_loss_weight attn_drop topk_k topk_tau stochastic_topk topk_noise_std
        topk_consistency_weight""",
    ("model.head", "framewise_decoder_1d"): """num_clip_frames stem_key layer2_key layer3_key
        layer4_key""",
    ("task", ""): """metrics metric_computation_mode result_plot label_smoothing mixup
        mixup_alpha""",
    ("training", ""): """epochs precision gradient_accumulation_steps gradient_clip_val seed compile
        enable_checkpointing best_checkpoint_metric cluster_progress_bar cv_folds
        num_sanity_val_steps ddp_find_unused_parameters train_steps_per_epoch
        val_steps_per_epoch""",
    ("dataloading", ""): """batch_size eval_batch_size num_workers pin_memory persistent_workers
        prefetch_factor timeout drop_last_train drop_last_eval shuffle_train shuffle_eval
        use_worker_init_fn""",
    ("optimizer", ""): """name lr weight_decay nesterov muon_momentum ns_coefficients eps ns_steps
        adjust_lr_fn layer_wise_lr_decay undecay_norm scheduler warmup_epochs""",
    ("logger", "wandb"): "entity project tags group name offline",
    ("infer", ""): "exp_dir data dataloading metrics fold checkpoint pred_output",
    ("extract", ""): """checkpoint_path data model peft dataloading method split precision
        compression output_dir output_filename use_eval_transform_for_train""",
    ("umap", ""): """h5_path title output_path max_samples max_per_class seed dpi n_neighbors
        min_dist""",
    ("peft", "partial_finetuning"): "num_frozen_layers",
    ("peft", "lora"): "rank alpha dropout targets use_dora use_rslora init_lora_weights lora_bias",
    ("peft", "adalora"): """rank init_rank alpha dropout targets use_rslora init_lora_weights
        lora_bias orth_reg beta1 beta2 tinit deltaT""",
    ("peft", "loha"): "rank alpha dropout rank_dropout targets",
    ("peft", "lokr"): "rank alpha dropout rank_dropout decompose_factor targets",
    ("peft", "oft"): "r dropout targets coft eps bias cayley_neumann",
    ("peft", "boft"): "block_size n_butterfly dropout targets bias",
    ("peft", "vera"): "rank dropout targets projection_prng_key",
    ("peft", "fourierft"): "n_frequency scaling targets",
    ("peft", "adapt_former"): """mode bottleneck dropout init_option adapter_scalar
        adapter_layernorm_option freeze_backbone""",
    ("peft", "convpass"): "bottleneck dropout freeze_backbone",
    ("peft", "rep_adapter"): "bottleneck groups scale_init",
    ("peft", "fact"): "r",
    ("peft", "gps"): "gps_topk_per_row",
    ("peft", "visual_prompt_tuning"): "num_tokens deep project_dim dropout init_scale deep_layers",
    ("peft", "full_finetuning"): "",
    ("peft", "linear_probing"): "",
    ("peft", "bitfit"): "",
    ("peft", "ln_tuning"): "",
    ("peft", "ssf"): "",
    ("peft", "difffit"): "",
    ("peft", "ia3"): "",
}
VALUES = {  # key: the values that the documents name
    "data.dataset": """imagenet pcam rxrx1 neudet zooscannet aid chestxray14 resisc45 flowers102
        fgvc_aircraft diabetic_retina""",
    "data.augmentation.train_policy": """default_2d_1 default_2d_2 default_2d_3 default_2d_4
        default_2d_5 default_2d_randaugment default_3d_1 default_3d_2 default_3d_3 default_3d_4
        default_nnunet default_nnunet_DA5 default_nnfoundation dataset_specific baseline
        baseline_cutout autoaugment randaugment albumentations dino timm_randaugment
        randaugment_448 randaugment_224 aid_large_crop native""",
    "data.augmentation.test_policy": """shared_default_2d shared_default_3d default dino default_448
        default_224 native default_nnfoundation""",
    "model.encoder.encoder_type": """timm transformer torchvision torchvision_video pytorchvideo
        dinov2 dinov3 residual_encoder primus nnfoundation precomputed""",
    "data.split_source": "splits_json subdirs",
    "data.label_source": "folder json csv",
    "data.task": "Classification Regression",
    "data.subtask": "multiclass multilabel regression",
    "extract.split": "train val test",
    "model.feature_aggregation_method": "cls_token avg sum mean_all joint",
    "extract.method": "cls_token avg sum mean_all joint",
    "task.metrics": "acc balanced_acc f1 f1_per_class pr top5acc auroc ap mse mae",
    "task.result_plot": "val all",
    "training.precision": "no fp16 bf16",
    "optimizer.name": "SGD Adam AdamW RMSprop Madgrad Muon",
    "optimizer.scheduler": "CosineAnneal Step MultiStep None",
    "logger.backend": "wandb mlflow none",
}


def members(key: str) -> list[kinds.StructType]:
    """The Structs that may stand at a dotted key."""
    found = structs(kinds.type_info(Root))
    for part in filter(None, key.split(".")):
        fields = [field for member in found for field in member.fields if field.name == part]
        found = [struct for field in fields for struct in structs(field.type)]
    return found


def allowed(key: str) -> set[str]:
    """The texts that may stand at a dotted key, over all members: tags and literals."""
    section, _, name = key.rpartition(".")
    found = set()
    for member in members(section):
        found |= {str(member.tag)} if member.tag_field == name else set()
        for field in member.fields:
            if field.name == name:
                found |= set(literals(field.type))
    return found


def literals(kind: kinds.Type):
    """Every text of a type, inside of arrays too."""
    for option in options_of(kind):
        item = item_type(option)
        yield from texts(option) if item is None else literals(item)


@pytest.mark.parametrize(("section", "tag"), OPTIONS)
def test_an_option_of_the_documents_is_a_field_or_has_its_reason(section, tag):
    own = [member for member in members(section) if not tag or member.tag == tag]
    assert own, f"{section} has no member {tag}"
    fields = {field.name for member in own for field in member.fields}
    keys = {name: f"{section}.{name}".lstrip(".") for name in OPTIONS[section, tag].split()}
    neither = [k for name, k in keys.items() if name not in fields and k not in REPLACED]
    assert not neither


@pytest.mark.parametrize("key", VALUES)
def test_a_value_of_the_documents_is_valid_or_has_its_reason(key):
    named, valid = set(VALUES[key].split()), allowed(key)
    replaced = {name for at, names in REPLACED_VALUES if at == key for name in names}
    assert valid and named <= valid | replaced and not valid & replaced - {"native"}


def replaced_in() -> list[tuple[str, list[str]]]:
    """Each key that is not here, with the tags of a section that lacks it."""
    found = []
    for key in REPLACED:
        section, _, name = key.rpartition(".")
        found.append((key, chosen_without(section, name)))
    return found


def chosen_without(section: str, name: str) -> list[str]:
    """Overrides that choose a member of a section without a field; its own data set for images."""
    if section == "data.augmentation":
        return ["data.dataset=digits"]
    (member, *_) = [m for m in members(section) if name not in {field.name for field in m.fields}]
    return [f"{section}.{member.tag_field}={member.tag}"] if member.tag_field else []


@pytest.mark.parametrize(("key", "chosen"), replaced_in())
def test_a_key_that_was_replaced_says_by_what(tmp_path, key, chosen):
    with pytest.raises(UserError) as caught:
        checked(tmp_path, [*chosen, f"{key}=1"])
    assert f"{key}: unknown key (offered 1): {REPLACED[key]}" in str(caught.value)


@pytest.mark.parametrize(("key", "names"), REPLACED_VALUES)
def test_a_value_that_was_replaced_says_by_what(tmp_path, key, names):
    text = REPLACED_VALUES[key, names]
    for name in names:
        given = f'["{name}"]' if key == "task.metrics" else name
        with pytest.raises(UserError) as caught:
            checked(tmp_path, [f"{key}={given}"])
        assert f'"{name}" is' in str(caught.value) and str(caught.value).endswith(f"; {text}")


VECTORS = [
    "data.dataset=precomputed_features",
    "data.data_root_dir=.",
    "data.num_classes=10",
    "data.train_features_file={folder}/train.h5",
    "data.val_features_file={folder}/val.h5",
    "model.encoder.encoder_type=precomputed",
    "model.encoder.feature_dim=64",
]
RUNS = {
    "vectors": [*VECTORS, "model.head.head_type=classification", "dataloading.batch_size=512"],
    "bags": [
        *VECTORS,
        "data.test_features_file={folder}/test.h5",
        "model.head.head_type=clam",
        "model.head.variant=sb",
        "model.head.instance_eval=true",
        "dataloading.batch_size=8",
    ],
}


def write_features(path: Path, rows: slice, layout: str) -> None:
    """A feature file as the document describes it."""
    features, labels = X[rows].astype(np.float32), Y[rows]
    with h5py.File(path, "w") as file:
        file["features"] = features
        if layout == "vectors":
            file["labels"] = labels
        else:
            file["labels"] = labels[::3]
            lengths = np.full(len(labels) // 3, 3)
            file["bag_lengths"] = lengths
            if layout == "both":
                file["bag_ptr"] = np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.runs
@pytest.mark.parametrize("name", RUNS)
def test_commands_on_feature_files_run(tmp_path, monkeypatch, name):
    layouts = {"train": "vectors"} if name == "vectors" else {"train": "bags"}
    layout = layouts["train"]
    for split, rows in (("train", slice(90)), ("val", slice(90, 150)), ("test", slice(150, 210))):
        write_features(tmp_path / f"{split}.h5", rows, layout)
    (tmp_path / "spec.toml").write_text('[logger]\nbackend = "none"\n[training]\nepochs = 1\n')
    monkeypatch.chdir(tmp_path)
    overrides = [text.format(folder=tmp_path) for text in RUNS[name]]
    assert glovita.main(["spec.toml", "--override", *overrides]) == 0
    assert list(tmp_path.rglob("predictions_val.csv"))


SPLITS = {"train": range(9), "val": range(9, 12), "test": range(12, 15)}
LABELS = np.arange(15) % 3  # which the files below hold as 0.0, 1.0, 2.0


def feature_files(folder: Path, kind: str) -> list[str]:
    """Feature files with labels of a floating type."""
    for split, rows in SPLITS.items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["features"] = X[rows].astype(np.float32)
            file["labels"] = LABELS[rows].astype(kind)
    files = [f"data.{split}_features_file={folder}/{split}.h5" for split in SPLITS]
    return ["data.dataset=precomputed_features", "model.encoder.encoder_type=precomputed", *files]


def bags(folder: Path, kind: str) -> list[str]:
    """The same as bags of three instances, for a head of vectors and one of bags alike."""
    given = feature_files(folder, kind)
    for split in SPLITS:
        with h5py.File(folder / f"{split}.h5", "a") as file:
            instances = np.repeat(file["features"][()], 3, 0)
            file["bag_lengths"] = np.full(len(file["labels"]), 3)
            del file["features"]
            file["features"] = instances
    return given


def files_with_table(folder: Path, names: list[str], kind: str) -> list[str]:
    """A table of floats, CSV or JSON, and the splits of files below a folder."""
    labels = dict(zip(names, LABELS.astype(float).tolist(), strict=True))
    lines = ["path,label", *(f"{name},{label}" for name, label in labels.items())]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "labels.json").write_text(json.dumps(labels))
    splits = {split: [names[row] for row in rows] for split, rows in SPLITS.items()}
    (folder / "splits.json").write_text(json.dumps(splits))
    table = [f"data.labels_file=labels.{kind}", f"data.label_source={kind}"]
    return [f"data.data_root_dir={folder}", *table]


def images(folder: Path, kind: str) -> list[str]:
    """Images with a table."""
    (folder / "images").mkdir()
    names = [f"{row}.png" for row in range(15)]
    for name, row in zip(names, X, strict=False):
        Image.fromarray((row * 15).reshape(8, 8).astype(np.uint8)).save(folder / "images" / name)
    return ["data.dataset=generic_image_dataset", *files_with_table(folder, names, kind)]


def volumes(folder: Path, kind: str) -> list[str]:
    """Arrays of volumes with a table."""
    (folder / "images").mkdir()
    names = [f"{row}.npy" for row in range(15)]
    for name, row in zip(names, X, strict=False):
        np.save(folder / "images" / name, row.reshape(4, 4, 4).astype(np.float32))
    encoder = ["model.encoder.encoder_type=residual_encoder"]
    given = files_with_table(folder, names, kind)
    return ["data.dataset=generic_3d_dataset", "data.channels=1", *given, *encoder]


def videos(folder: Path, kind: str) -> list[str]:
    """Folders of frames with a table."""
    names = [f"v{row}" for row in range(15)]
    for name, row in zip(names, X, strict=False):
        (folder / "videos" / name).mkdir(parents=True)
        frame = Image.fromarray((row * 15).reshape(8, 8).astype(np.uint8)).convert("RGB")
        for number in range(2):
            frame.save(folder / "videos" / name / f"{number}.png")
    encoder = ["model.encoder.encoder_type=torchvision_video"]
    given = files_with_table(folder, names, kind)
    return ["data.dataset=generic_video_dataset", *given, *encoder]


def series(folder: Path, kind: str) -> list[str]:
    """Series of NumPy archives."""
    for name, rows in (("train", slice(12)), ("test", slice(12, 15))):
        labels = LABELS[rows].astype(kind)
        np.savez(folder / f"{name}.npz", series=X[:15][rows, None], labels=labels)
    files = ["data.train_file=train.npz", "data.test_file=test.npz", "data.val_fraction=0.25"]
    encoder = ["model.encoder.encoder_type=resnet_1d"]
    return ["data.dataset=generic_series_dataset", f"data.data_root_dir={folder}", *files, *encoder]


WRITERS = [
    (feature_files, "float32"), (feature_files, "float64"), (bags, "float32"), (images, "csv"),
    (images, "json"), (series, "float64"), (volumes, "csv"), (volumes, "json"), (videos, "csv"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "kind"), WRITERS)
def test_whole_floats_are_classes_where_it_is_said(tmp_path, write, kind):
    """A head that is named, num_classes or subtask says so; else it is asked for."""
    given = write(tmp_path, kind)
    saying = (
        "model.head.head_type=classification",
        "data.num_classes=3",
        "data.subtask=multiclass",
    )
    for change in saying:
        data = read(checked(tmp_path, [*given, change]))
        assert data.subtask == "multiclass"
        assert [float(name) for name in data.class_names] == [0, 1, 2]  # text stays as written
        assert data.splits["test"].targets.tolist() == [0, 1, 2]
    for change in ([], ["model.head.dropout=0.1"]):  # of the default, which says nothing
        with pytest.raises(UserError, match="may be classes or values: set data.subtask"):
            read(checked(tmp_path, [*given, *change]))


def read(loaded):
    """The data as training reads them."""
    return read_data(loaded.root, RANKS, named=head_is_named(loaded))


def test_a_probe_takes_the_word_of_a_head_too(tmp_path):
    given = [*feature_files(tmp_path, "float32"), "task.objective=probe"]
    for head, kind in (("classification", "multiclass"), ("regression", "regression")):
        data, _ = run_probe.read(checked(tmp_path, [*given, f"model.head.head_type={head}"]))
        assert data.subtask == kind
    with pytest.raises(UserError, match="may be classes or values"):
        run_probe.read(checked(tmp_path, given))


def with_halves(folder: Path) -> None:
    """Adds a half to all labels of feature files and archives."""
    for path in folder.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file["labels"][...] += 0.5
    for path in folder.glob("*.npz"):
        held = dict(np.load(path))
        np.savez(path, **(held | {"labels": held["labels"] + 0.5}))


CLASSES = ["model.head.head_type=classification"]
OF_INSTANCES = ["model.head.head_type=clam", "model.head.instance_eval=true"]
NO_NUMBERS = "cannot predict numbers, and this is a regression"


@pytest.mark.parametrize(
    ("write", "head", "text"),
    [
        (feature_files, CLASSES, NO_NUMBERS),
        (series, CLASSES, NO_NUMBERS),
        (bags, OF_INSTANCES, "instance_eval = true labels instances by the class of their bag"),
    ],
)
def test_a_head_of_classes_refuses_values(tmp_path, monkeypatch, capsys, write, head, text):
    """What labels look like, and nothing states, is checked against the head too."""
    given = write(tmp_path, "float64")
    with_halves(tmp_path)
    (tmp_path / "spec.toml").write_text('[logger]\nbackend = "none"\n')
    monkeypatch.chdir(tmp_path)
    assert glovita.main(["spec.toml", "--override", *given, *head]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("resolved_config.json"))


EXPLICIT = ["mode=extract", "extract.method=joint", "extract.output_dir={folder}/features"]
NAMED = [
    "extract.checkpoint={last}",
    "extract.output_filename={{checkpoint}}_{{dataset}}_{{split}}_{{method}}.h5",
]


@pytest.mark.runs
def test_commands_of_extraction_run(tmp_path, monkeypatch):
    """Of a model that the command describes, and of a checkpoint under a name of placeholders."""
    model = ["model.encoder.type=test_vit", "model.encoder.pretrained=false", "data.dataset=digits"]
    size = ["data.augmentation.image_size=16", "dataloading.batch_size=128"]
    (tmp_path / "spec.toml").write_text('[logger]\nbackend = "none"\n[training]\nepochs = 1\n')
    monkeypatch.chdir(tmp_path)
    explicit = [text.format(folder=tmp_path) for text in EXPLICIT]
    source = ["extract.source=encoder"]
    assert glovita.main(["spec.toml", "--override", *model, *size, *source, *explicit]) == 0
    assert len(list((tmp_path / "features").glob("agg_joint_*_digits_*_size16_float*.h5"))) == 3
    assert glovita.main(["spec.toml", "--override", *model, *size, "name=my_run"]) == 0
    last = next(tmp_path.rglob("last.pt"))
    named = [text.format(last=last, folder=tmp_path) for text in (*EXPLICIT, *NAMED)]
    assert glovita.main(["spec.toml", "--override", *named]) == 0
    names = {path.name for path in (tmp_path / "features").glob("last_*")}
    assert names == {f"last_digits_{split}_joint.h5" for split in ("train", "val", "test")}


def test_the_page_lists_them():
    page = (REPOSITORY / "docs" / "reference.md").read_text()
    lines = [
        line
        for key, text in REPLACED.items()
        for line in textwrap.wrap(f"{key}: {text}", 110, subsequent_indent="    ")
    ]
    for (key, names), text in REPLACED_VALUES.items():
        values = f"{key} = {', '.join(names)}: {text}"
        lines += textwrap.wrap(values, 110, subsequent_indent="    ")
    assert "```text\n" + "\n".join(lines) + "\n```" in page
