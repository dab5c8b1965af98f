"""Adding a part to a copy of the source: what it takes, and that no list has to know it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import pytest
from small_runs import TINY

from glovita_lib.data import read_data_set
from glovita_lib.encoder import build_encoder
from glovita_lib.heads import build_head
from glovita_lib.loggers import build_logger
from glovita_lib.peft_base import apply_peft
from glovita_lib.spec_data import Data
from glovita_lib.spec_encoders import Encoder
from glovita_lib.spec_model import Head
from glovita_lib.spec_peft import Peft
from glovita_lib.spec_train import Logger

REPOSITORY = Path(__file__).parent.parent


def package_with(
    folder: Path, edits: Iterable[tuple[str, str, str]], new: Mapping[str, str] | None = None
) -> Path:
    """A copy of the source in `folder` with text edits (module, what stands there, what comes to
    stand in its place) and new modules."""
    shutil.copytree(REPOSITORY / "glovita_lib", folder / "glovita_lib")
    shutil.copy(REPOSITORY / "glovita.py", folder)
    for module, old, text_new in edits:
        path = folder / "glovita_lib" / f"{module}.py"
        text = path.read_text()
        assert text.count(old) == 1, (module, old)
        path.write_text(text.replace(old, text_new))
    for module, text in (new or {}).items():
        path = folder / "glovita_lib" / f"{module}.py"
        assert not path.exists()
        path.write_text(text)
    return folder


def documented(module: str) -> str:
    """The example of docs/parts.md that goes into a module, without the line that says so."""
    page = (REPOSITORY / "docs" / "parts.md").read_text()
    (text,) = re.findall(rf"^```python\n# [^\n]*{module}\.py[^\n]*\n(.*?)^```$", page, re.M | re.S)
    return text


def glovita(folder: Path, *arguments: str) -> str:
    """What a command of the copy prints."""
    return python(folder, "glovita.py", *arguments)


def python(folder: Path, *arguments: str) -> str:
    """What Python prints that finds the copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.processes
def test_a_metric_is_an_entry_and_a_formula(tmp_path: Path) -> None:
    """The share of wrong predictions: named in task.metrics, it picks the best checkpoint."""
    entry = '"error": Metric("error rate", ("multiclass",), lower_is_better=True),'
    formula = (
        '@formula("error", "multiclass")\n'
        "def error_rate(drawn: Resampled) -> Array:\n"
        '    """Share of the samples that are wrong."""\n'
        "    return 1 - accuracy(drawn)\n"
    )
    first = '@formula("balanced_acc", "multiclass", "framewise")\n'
    folder = package_with(
        tmp_path,
        [
            ("metric_names", '    "balanced_acc": ', f'    {entry}\n    "balanced_acc": '),
            ("metrics_classification", first, f"{formula}\n\n{first}"),
        ],
    )
    (folder / "tiny.toml").write_text(TINY)
    metrics = ["task.metrics=['error', 'acc']", "training.best_checkpoint_metric=val_error"]
    glovita(folder, "tiny.toml", "--override", *metrics, "optimizer.lr=0.01", "training.epochs=3")
    run = next((folder / "experiments").rglob("metrics.jsonl")).parent
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    epochs = [record for record in records if record["event"] == "epoch"]
    assert all(abs(r["val_error"] + r["val_acc"] - 1) < 1e-9 for r in epochs)
    assert epochs[-1]["best"] == min(record["val_error"] for record in epochs)
    report = json.loads((run / "metrics_test.json").read_text())["metrics"]
    assert list(report) == ["error", "acc"]
    assert '"error"' in glovita(folder, "--explain", "task.metrics")


@pytest.mark.processes
def test_an_augmentation_is_its_fields_and_a_function(tmp_path: Path) -> None:
    """The negative of an image: with probability 1 the same run trains on other pixels."""
    fields, function = documented("spec_augment"), documented("augment_images")
    before, first = (
        '    """Probability of an up-down flip."""\n',
        '@operation("rotate_p", "affine_p")\n',
    )
    folder = package_with(
        tmp_path,
        [
            ("spec_augment", before, f"{before}{fields}"),
            ("augment_images", first, f"{function}\n\n{first}"),
        ],
    )
    key = "data.augmentation.train_kwargs.negative"
    assert "read with negative_p" in glovita(folder, "--explain", f"{key}_share")
    (folder / "tiny.toml").write_text(TINY)
    found = {}
    for name, changes in {"off": [], "on": [f"{key}_p=1"]}.items():
        glovita(
            folder, "tiny.toml", "--override", f"name={name}", "training.epochs=1", *changes
        )  # fmt: skip
        (run,) = folder.glob(f"experiments/digits/{name}/0")
        resolved = json.loads((run / "resolved_config.json").read_text())
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses = [record["train_loss"] for record in records if record["event"] == "epoch"]
        found[name] = resolved["inputs"]["augmentation"]["train"], losses
    assert found["on"][0] == found["off"][0] | {"negative_p": 1.0}
    assert found["on"][0]["negative_share"] == 0.75
    assert found["on"][1] != found["off"][1]


@pytest.mark.processes
def test_a_logger_is_a_struct_and_a_module(tmp_path: Path) -> None:
    """The example of the page: every number of metrics.jsonl stands in its file."""
    struct = documented("spec_train")
    old = "Logger = WandbLogger | NoLogger\n"
    edits = [("spec_train", old, f"{struct}\n\nLogger = CsvLogger | WandbLogger | NoLogger\n")]
    folder = package_with(tmp_path, edits, {"logger_csv": documented("logger_csv")})
    (folder / "tiny.toml").write_text(TINY)
    changes = ["logger.backend=csv", "logger.file=own.csv", "training.epochs=1"]
    glovita(folder, "tiny.toml", "--override", *changes)
    run = next((folder / "experiments").rglob("metrics.jsonl")).parent
    lines = [line.split(",") for line in (run / "own.csv").read_text().splitlines()]
    (epoch,) = (
        record
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["event"] == "epoch"
    )
    found = {key: value for _, key, value in lines}
    assert float(found["val_loss"]) == epoch["val_loss"]
    assert {step for step, key, _ in lines if key == "val_loss"} == {str(epoch["step"])}


# ------------------------------------------- encoder, data set, head and PEFT method

ENCODER = '''
class PatchEncoder(BaseEncoder, tag="patches", tag_field="encoder_type"):
    """One convolution: a token for every patch of 4 x 4 pixels."""

    built_in: ClassVar[str] = "encoder_patches"

    width: Annotated[int, Meta(ge=1)] = 8
    """Width of a token."""


Encoder = PatchEncoder | '''
PATCHES = '''"""An encoder of one convolution."""

from torch import nn

from glovita_lib.encoder import Encoder, Preprocess, build_encoder, preprocess_of
from glovita_lib.spec_encoders import PatchEncoder


class Patches(Encoder):
    def forward_features(self, x):
        return self.net(x)  # (B, D, H / 4, W / 4)

    def pool(self, raw):
        return raw.mean((2, 3))


@preprocess_of.register
def _(spec: PatchEncoder, *, channels):
    half = (0.5,) * channels
    return Preprocess(8, 1.0, "bilinear", mean=half, std=half, fixed_size=False)


@build_encoder.register
def _(spec: PatchEncoder, *, channels, size, load_weights):
    return Patches(
        nn.Conv2d(channels, spec.width, 4, stride=4),
        name="patches",
        n_prefix=0,
        has_cls=False,
        channels_last=False,
        input_shape=(1, channels, *size),
    )
'''
HEAD = '''
class TopHead(BagHead, tag="top", tag_field="head_type"):
    """Scores of the patch that scores highest for each class."""

    built_in: ClassVar[str] = "head_top"


Head = (
    TopHead
    | '''
TOP = '''"""The patch that scores highest."""

from torch import nn

from glovita_lib.bags import as_bags, segment_max
from glovita_lib.heads import build_head
from glovita_lib.spec_model import TopHead


class Top(nn.Module):
    consumes = "features"

    def __init__(self, width, outputs):
        super().__init__()
        self.scores = nn.Linear(width, outputs)

    def forward(self, inputs, targets=None):
        bags = as_bags(inputs)
        return segment_max(self.scores(bags.features), bags)


@build_head.register
def _(spec: TopHead, *, width, outputs):
    return Top(width, outputs)
'''
DATA = '''
class StripesData(ImageData, tag="stripes", tag_field="dataset"):
    """Horizontal and vertical stripes, 8 x 8 pixels."""

    built_in: ClassVar[str] = "data_stripes"
    classes: ClassVar[int | None] = 2
    image_channels: ClassVar[int | None] = 1


Data = StripesData | '''
STRIPES = '''"""Stripes in noise."""

import numpy as np

from glovita_lib import data
from glovita_lib.spec_data import StripesData


@data.read_data_set.register
def _(spec: StripesData, *, seed, asked):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = rng.integers(0, 128, (120, 1, 8, 8), dtype=np.uint8)
    images[labels == 0, :, ::2] += 120
    images[labels == 1, :, :, ::2] += 120
    splits = {}
    for name, rows in {"train": slice(60), "val": slice(60, 90), "test": slice(90, 120)}.items():
        rows = np.arange(120)[rows]
        source = data.ArraySource(images, rows)
        splits[name] = data.Split([str(row) for row in rows], labels[rows], source)
    names, samples = ("horizontal", "vertical"), data.ImageSamples(channels=1, bit_depth=8)
    return data.Data("stripes", splits, "multiclass", names, samples)
'''
PEFT = '''
class OwnBias(PeftMethod, tag="own_bias", tag_field="method"):
    """The biases of the encoder train, and the head."""

    built_in: ClassVar[str] = "peft_own_bias"


Peft = (
    OwnBias
    | '''
OWN_BIAS = '''"""Biases of the encoder."""

from torch import nn

from glovita_lib.peft_base import apply_peft
from glovita_lib.spec_peft import OwnBias


@apply_peft.register
def _(spec: OwnBias, model: nn.Module):
    for name, parameter in model.encoder.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
'''
SPEC = """
[data]
dataset = "stripes"
[data.augmentation]
image_size = 8
[model.encoder]
encoder_type = "patches"
[model.head]
head_type = "top"
[peft]
method = "own_bias"
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 3
[optimizer]
lr = 0.03
[logger]
backend = "none"
"""
TRAIN_AND_INFER = """
import sys, glovita
for mode in ("train", "infer"):
    assert glovita.main(["own.toml", "--override", f"mode={mode}"]) == 0
assert glovita.main(["own.toml", "--check", "--override", "task.class_weights=[1, 2, 3]"]) == 2
assert glovita.main(["--explain", "model.head.head_type"]) == 0
"""


@pytest.mark.processes
def test_encoder_data_set_head_and_method_are_a_struct_and_a_module_each(tmp_path: Path) -> None:
    """All four in one run; what the rules of other sections ask stands at the Structs."""
    parts = {
        "encoder_patches": PATCHES,
        "head_top": TOP,
        "data_stripes": STRIPES,
        "peft_own_bias": OWN_BIAS,
    }
    folder = package_with(
        tmp_path,
        [
            ("spec_encoders", "\nEncoder = ", ENCODER),
            ("spec_model", "\nHead = (\n    ", HEAD),
            ("spec_data", "\nData = ", DATA),
            ("spec_peft", "\nPeft = (\n    ", PEFT),
        ],
        parts,
    )
    (folder / "own.toml").write_text(SPEC)
    shown = python(folder, "-c", TRAIN_AND_INFER)
    assert 'model.head.head_type = "top"' in shown
    run = next((folder / "experiments").rglob("metrics.jsonl")).parent
    assert json.loads((run / "metrics_test.json").read_text())["metrics"]["acc"] > 0.9
    counts = json.loads((run / "resolved_config.json").read_text())["parameters"]
    assert counts["base"]["trainable"] == 8 and counts["base"]["total"] == 8 * (16 + 1)
    trained, asked = run / "predictions_test.csv", run / "infer" / "predictions_test.csv"
    assert trained.read_bytes() == asked.read_bytes()
    original = {path.name: path.read_bytes() for path in (REPOSITORY / "glovita_lib").glob("*.py")}
    changed = {
        path.stem
        for path in (folder / "glovita_lib").glob("*.py")
        if original.get(path.name) != path.read_bytes()
    }
    assert changed == parts.keys() | {"spec_encoders", "spec_model", "spec_data", "spec_peft"}


BLOBS_DATA = '''
class BlobsData(BaseData, tag="blobs", tag_field="dataset"):
    """Two Gaussian clouds of vectors."""

    built_in: ClassVar[str] = "data_blobs"
    samples: ClassVar[Literal["images", "features", "either"]] = "features"
    classes: ClassVar[int | None] = 2


Data = BlobsData | '''
BLOBS = '''"""Two clouds."""

import numpy as np

from glovita_lib import data
from glovita_lib.spec_data import BlobsData


@data.read_data_set.register
def _(spec: BlobsData, *, seed, asked):
    labels = np.arange(120) % 2
    points = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    points += 4 * labels[:, None] - 2
    splits = {}
    for name, rows in {"train": slice(60), "val": slice(60, 90), "test": slice(90, 120)}.items():
        rows = np.arange(120)[rows]
        source = data.ArraySource(points, rows)
        splits[name] = data.Split([str(row) for row in rows], labels[rows], source)
    samples = data.VectorSamples(width=4)
    return data.Data("blobs", splits, "multiclass", ("left", "right"), samples)
'''
EVERY_MODE = """
import sys, glovita
for each in ("mode=train", "mode=infer", "mode=umap umap.method=pca", "task.objective=probe"):
    changes = [f"--override={change}" for change in each.split()]
    assert glovita.main(["own.toml", *changes]) == 0, each
for change in ("model.encoder.encoder_type=timm", "mode=extract"):
    assert glovita.main(["own.toml", "--override", change]) == 2
"""


@pytest.mark.processes
def test_a_data_set_of_features_is_a_struct_and_a_module(tmp_path: Path) -> None:
    """All modes that read features take it; the others refuse it in words."""
    edits = [("spec_data", "\nData = ", BLOBS_DATA)]
    folder = package_with(tmp_path, edits, {"data_blobs": BLOBS})
    encoder = "[model.encoder]\nencoder_type = 'precomputed'\n"
    (folder / "own.toml").write_text(
        f"[data]\ndataset = 'blobs'\n{encoder}[training]\nepochs = 8\n[optimizer]\nlr = 0.1\n"
        "[task]\nresult_plot = 'none'\nbootstrap = 0\n[logger]\nbackend = 'none'\n"
    )
    python(folder, "-c", EVERY_MODE)
    found = {path.name: path for path in (folder / "experiments").rglob("*.json")}
    assert json.loads(found["metrics_test.json"].read_text())["metrics"]["acc"] > 0.9
    probed = json.loads(found["metrics_probe.json"].read_text())
    assert probed["knn"]["test"]["metrics"]["acc"] > 0.9
    assert list((folder / "experiments").rglob("*.html"))


@pytest.mark.parametrize(
    ("union", "function"),
    [
        (Data, read_data_set),
        (Encoder, build_encoder),
        (Head, build_head),
        (Peft, apply_peft),
        (Logger, build_logger),
    ],
)
def test_the_module_that_a_struct_names_registers_what_is_built(union, function) -> None:
    for kind in get_args(union):
        assert function.dispatch(kind) is not function.__wrapped__, kind


# ------------------------------------------------------------------------- what a run loads

LOADED = """
import sys, glovita
assert glovita.main([sys.argv[1], "--dry-run"]) == 0
print(*(name.removeprefix("glovita_lib.") for name in sys.modules if "glovita_lib." in name))
"""


@pytest.mark.processes
def test_training_on_images_loads_only_what_it_asks_for(tmp_path: Path) -> None:
    """Modules of features, bags, probes and of other encoders, heads and methods stay away."""
    (tmp_path / "tiny.toml").write_text(TINY)
    loaded = python(REPOSITORY, "-c", LOADED, str(tmp_path / "tiny.toml")).splitlines()[-1].split()
    assert 40 < len(loaded) <= 55  # among them the Structs of every modality
    others = r"bags|attention_.*|.*_features|.*hdf5|head_.*|peft_(?!base).*|run_(?!train).*"
    others += "|data_folder|data_labels|read_.*|encoder_(?!timm|aggregation).*|neighbors|extraction"
    others += "|.*(?<!spec)_series|series_.*|.*(?<!spec)_video"
    assert [name for name in loaded if re.fullmatch(others, name)] == []
