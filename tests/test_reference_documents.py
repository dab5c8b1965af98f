"""What the documents of GloViTa say: their commands run, or say what took their place.

The commands are written as overrides; `--model.encoder.no_pretrained` is
`model.encoder.pretrained=false`.
"""

import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.datasets import load_digits

import glovita
from glovita_lib.errors import UserError
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_errors import REPLACED

REPOSITORY = Path(__file__).parent.parent
X, Y = load_digits(return_X_y=True)

CIFAR = [
    "data.dataset=cifar10",
    "data.data_root_dir=./data",
    "model.encoder.encoder_type=timm",
    "model.encoder.type=resnet50.a1_in1k",
    "model.encoder.pretrained=false",
    "model.head.head_type=classification",
]
COMMANDS = {
    "first": [*CIFAR, "peft.method=full_finetuning", "dataloading.batch_size=128"],
    "short run": [*CIFAR, "training.epochs=2", "dataloading.batch_size=128"],
    "overrides": ["training.epochs=50", "optimizer.lr=3e-4", "data.augmentation.image_size=224"],
    "metadata": [
        "add_log.comment=scratch baseline",
        "add_log.dataset_alias=CIFAR10_small",
        "add_log.notes.phase=warmup",
    ],
    "best": [*CIFAR, "training.best_checkpoint_metric=val_f1"],
    "folder": [
        "data.dataset=generic_image_dataset",
        "data.data_root_dir=/data/MyDataset",
        "data.num_classes=2",
        "data.split_source=subdirs",
        "data.label_source=folder",
        "model.encoder.encoder_type=timm",
        "model.encoder.type=resnet50.a1_in1k",
        "model.head.head_type=classification",
    ],
}
REFUSED = {
    "chestxray14": (
        ["data.dataset=chestxray14", "data.augmentation.train_policy=default_2d_4"],
        'data.dataset: "chestxray14" is unknown: it must be "digits", "cifar10"',
    ),
    "mlflow": (
        [*CIFAR, "logger.backend=mlflow"],
        'logger.backend: "mlflow" is unknown: it must be "wandb" or "none"',
    ),
    "F1": ([*CIFAR, "training.best_checkpoint_metric=F1"], "did you mean val_f1?"),
}


def checked(folder: Path, overrides):
    """The spec that overrides alone make."""
    (folder / "spec.toml").write_text("")
    return load_checked(folder / "spec.toml", overrides)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_valid(tmp_path, name):
    checked(tmp_path, COMMANDS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_commands_that_are_refused_say_the_way(tmp_path, name):
    overrides, text = REFUSED[name]
    with pytest.raises(UserError) as caught:
        checked(tmp_path, overrides)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", REPLACED)
def test_a_key_that_was_replaced_says_by_what(tmp_path, key):
    dataset = "generic_image_dataset" if key.startswith("data.") else "digits"
    with pytest.raises(UserError) as caught:
        checked(tmp_path, [f"data.dataset={dataset}", f"{key}=1"])
    assert f"{key}: unknown key (offered 1): {REPLACED[key]}" in str(caught.value)


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
    assert "```text\n" + "\n".join(lines) + "\n```" in page
