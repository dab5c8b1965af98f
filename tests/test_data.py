"""What standardises columns, wherever they are standardised."""

import h5py
import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from glovita_lib import probe_models, read_features, run_probe, run_umap
from glovita_lib.data import (
    ArraySource,
    Data,
    ImageSamples,
    Split,
    Standardizer,
    VideoFrames,
    is_constant,
    subset,
)
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.loader_features import FeatureInputs
from glovita_lib.objectives import SupervisedObjective
from glovita_lib.projection import in_float32, principal_components
from glovita_lib.read_features import BagSource
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_samples import UNLABELLED

N = 60
DRAW = np.random.default_rng(0)
COLUMNS = {
    "constant": np.full(N, 0.1),
    "constant and large": np.full(N, 1.7e9 + 0.1),
    "constant and small": np.full(N, 1e-30),
    "negative": np.full(N, -1 / 3),
    "zero": np.zeros(N),
    "usual": DRAW.normal(3, 2, N),
    "small": DRAW.normal(0, 1e-30, N),
    "one digit": 0.1 + 1e-9 * (np.arange(N) % 2),
    "large": 1.7e9 + np.round(DRAW.normal(0, 30, N)),
    "almost constant": np.r_[np.full(N - 1, 5.0), 5.5],
}
TABLE = np.stack(list(COLUMNS.values()), 1)
KINDS = [np.float64, np.float32, np.float16]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_standardised_as_by_scikit_learn(kind):
    columns = [k for k, v in enumerate(COLUMNS) if kind != np.float16 or "large" not in v]
    table = TABLE[:, columns].astype(kind)
    blocks = torch.from_numpy(table).split(7)
    scale = Standardizer.of(lambda: blocks)
    expected = StandardScaler().fit(table.astype(np.float64))
    np.testing.assert_allclose(scale.mean, expected.mean_, rtol=1e-15)
    np.testing.assert_allclose(scale.std, expected.scale_, rtol=1e-9)
    assert (scale.std[: 3 if kind == np.float16 else 5] == 1).all()
    wanted = expected.transform(table.astype(np.float64))
    found = scale(torch.from_numpy(table))
    assert found.dtype == torch.float32
    rough = {np.float64: 1e-5, np.float32: 0.2, np.float16: 1e-3}[kind]  # of the mean in float32
    np.testing.assert_allclose(found, wanted, atol=rough)
    np.testing.assert_allclose(scale.restored(scale.standardized(table)), table, 1e-6, 1e-6)


FILLS = [1e30, 9.96921e36, -9.96920996838687e36, 1e15 / 3, 1e300]  # two are netCDF's


@pytest.mark.parametrize("rows", [60, 1001])
def test_a_constant_column_of_any_size_is_zero(rows):
    """The mean of sixty 1e30 is not 1e30 in float64; the difference must not reach a model."""
    table = np.c_[np.tile(FILLS, (rows, 1)), np.arange(rows)]
    assert (table[:, :3].mean(0) != table[0, :3]).any()
    for size in (7, rows):
        blocks = torch.from_numpy(table).split(size)
        scale = Standardizer.of(lambda blocks=blocks: blocks)
        assert scale.mean[:5].tolist() == FILLS
        assert not scale(torch.from_numpy(table))[:, :5].any()
        np.testing.assert_allclose(scale.restored(scale.standardized(table)), table, 1e-6, 1e-4)
    single = torch.from_numpy(table[:, :3].astype(np.float32))
    assert not Standardizer.of(lambda: single.split(7))(single).any()


def test_a_column_that_rounding_makes_vary_is_small():
    """The neighbours of 1e30 are 1e14 away: by scikit-learn's rule it is constant, with deviation
    1, by which a model would be given 1e14."""
    table = np.full((60, 2), 1e30)
    table[::3, 1] = np.nextafter(1e30, 2e30)
    scale = Standardizer.of_array(table)
    assert StandardScaler().fit(table).scale_[1] == 1
    assert scale.mean[1] >= 1e30 and np.abs(scale.standardized(table)).max() < 1
    # values of which no deviation can be taken are not made small: they are refused as too large
    far = np.linspace(-1, 1, 60)[:, None] * 1e300
    assert np.isinf(Standardizer.of_array(far).standardized(far)).any()


def test_means_of_bags_and_maps_keep_constants_apart_from_the_rest():
    bags = [np.c_[np.full(n, 1e30), DRAW.normal(size=(n, 2))] for n in range(1, 61)]

    class Bags(BagSource):
        def fetch(self, rows):
            return [bags[row] for row in rows]

    source = Bags(None, np.arange(60))
    found = run_probe.gather_features(source, 60, None)
    assert (found[:, 0] == 1e30).all()
    np.testing.assert_allclose(found, [bag.mean(0) for bag in bags], rtol=1e-12)
    assert np.array_equal(run_umap.vectors(source, np.arange(60)), found)
    points, _ = principal_components(found, 2)
    alone, _ = principal_components(found[:, 1:], 2)
    np.testing.assert_allclose(np.abs(points), np.abs(alone), atol=1e-9)
    rounded, _ = in_float32(found, "euclidean")
    assert not rounded[:, 0].any()


def test_whole_numbers_of_nine_digits_keep_their_last_one():
    times = 1_700_000_000.0 + np.arange(-30, 31)[:, None]
    scale = Standardizer.of_array(times)
    steps = np.diff(scale.standardized(times)[:, 0])
    np.testing.assert_allclose(steps, 1 / times.std(), rtol=1e-4)
    assert (np.round(scale.restored(scale.standardized(times))) == times).all()


def test_one_sample_and_one_constant_are_legal():
    scale = Standardizer.of_array(np.array([[0.1, 5.0]]))
    assert scale.std.tolist() == [1, 1] and scale.standardized(np.array([[0.1, 7.0]]))[0, 1] == 2
    assert is_constant(0.1, 1e-33, 60) and not is_constant(0.1, 1e-20, 60)


SPEC = """
[data]
dataset = "precomputed_features"
data_root_dir = "{folder}"
train_features_file = "train.h5"
val_features_file = "val.h5"
standardize = true
[model.encoder]
encoder_type = "precomputed"
feature_dim = 10
[model.head]
head_type = "{head}"
"""


@pytest.fixture
def features(tmp_path):
    """A spec of features and of targets that have the columns above, constant in train alone."""

    def written(head, table=TABLE):
        for name, values in (("train", table), ("val", table + 0.01)):
            with h5py.File(tmp_path / f"{name}.h5", "w") as file:
                file["features"] = values
                file["labels"] = values if head == "regression" else np.arange(N) % 2
        (tmp_path / "spec.toml").write_text(SPEC.format(folder=tmp_path, head=head))
        root = load_checked(str(tmp_path / "spec.toml"), []).root
        return root, build_data(root.data, seed=0)

    return written


def by_hand(values):
    scaler = StandardScaler().fit(TABLE)
    return scaler.transform(values)


def test_features_of_a_run_and_targets(features):
    root, data = features("regression")
    resolved = resolve_spec(root, data)
    inputs = FeatureInputs(resolved.inputs.mean, resolved.inputs.std)
    found = inputs(torch.from_numpy(TABLE + 0.01), False, 0)
    np.testing.assert_allclose(found, by_hand(TABLE + 0.01), rtol=1e-5, atol=1e-5)
    assert resolved.target_std == resolved.inputs.std
    objective = SupervisedObjective(root.task, resolved, torch.device("cpu"))
    found = objective.target_scale.standardized(TABLE + 0.01)
    np.testing.assert_allclose(found, by_hand(TABLE + 0.01), rtol=1e-5, atol=1e-5)


def test_fill_values_of_a_file_reach_nothing(features, monkeypatch):
    """Neither a model, nor a map, nor a probe; features are read in several blocks."""
    monkeypatch.setattr(read_features, "MOMENT_ROWS", 7)
    table = TABLE.copy()
    table[:, :2] = FILLS[:2]
    root, data = features("classification", table)
    resolved = resolve_spec(root, data)
    scale = run_umap.train_scale(data)
    chosen = run_umap.samples_of_features({"val": data.splits["val"]}, data, root.umap, 0, scale)
    for found in (
        FeatureInputs(resolved.inputs.mean, resolved.inputs.std)(torch.from_numpy(table), False, 0),
        run_probe.gather_features(data.splits["train"].source, N, scale),
        torch.from_numpy(np.asarray(chosen.features)),
    ):
        assert found.shape == table.shape and not found[:, :2].any()


def test_features_of_a_map_and_of_a_probe(features):
    root, data = features("classification")
    scale = run_umap.train_scale(data)
    chosen = run_umap.samples_of_features({"val": data.splits["val"]}, data, root.umap, 0, scale)
    np.testing.assert_allclose(chosen.features, by_hand(TABLE + 0.01), rtol=1e-5, atol=1e-5)
    found = run_probe.gather_features(data.splits["val"].source, N, scale)
    np.testing.assert_allclose(found, by_hand(TABLE + 0.01), rtol=1e-5, atol=1e-5)


def test_a_probe_standardises_so_itself():
    """A column that is 0.1 in train says nothing, and must not outweigh the others elsewhere."""
    generator = np.random.default_rng(0)
    labels = torch.arange(N) % 2
    table = np.c_[generator.normal(size=(N, 3)) + labels[:, None].numpy(), np.full(N, 1e6 / 3)]
    ((_, model),) = probe_models.fit_linear(
        torch.from_numpy(table),
        labels,
        outputs=2,
        subtask="multiclass",
        l2=[1e-3],
        standardize=True,
        max_iterations=100,
        device=torch.device("cpu"),
    )
    moved = torch.from_numpy(table + [0, 0, 0, 1e-3])
    assert model.scale.std[3] == 1
    assert (model.logits(moved) - model.logits(torch.from_numpy(table))).abs().max() < 1e-2


@pytest.mark.parametrize("standardize", [True, False])
def test_a_probe_is_the_same_beside_a_fill_value(standardize):
    labels = torch.arange(N) % 2
    table = torch.from_numpy(DRAW.normal(size=(N, 3)) + labels[:, None].numpy())
    filled = torch.cat([table, torch.full((N, 1), 1e30, dtype=torch.float64)], 1)
    found = []
    for features in (table, filled):
        ((_, model),) = probe_models.fit_linear(
            features,
            labels,
            outputs=2,
            subtask="multiclass",
            l2=[1e-3],
            standardize=standardize,
            max_iterations=100,
            device=torch.device("cpu"),
        )
        found.append(model.logits(features))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- frames of videos


def test_a_part_of_a_split_keeps_its_clips_and_the_labels_of_their_videos():
    """Two videos of 5 and 2 frames in clips of 3."""
    frames = VideoFrames(
        ids=["a.mp4", "b.mp4"],
        video_of=np.array([0, 0, 1]),
        numbers=np.array([[0, 1, 2], [3, 4, -1], [0, 1, -1]]),
        times=[np.arange(5) / 25, np.arange(2) / 25],
        labels=[np.array([0, 0, 1, UNLABELLED, 2]), np.array([1, 1])],
    )
    source = ArraySource(np.zeros((3, 3, 3, 2, 2), np.uint8), np.arange(3))
    split = Split(["a.mp4", "a.mp4", "b.mp4"], np.array([0, 0, 1]), source, frames=frames)
    assert frames.all_labels().tolist() == [0, 0, 1, 2, 1, 1]
    part = subset(split, np.array([2, 2]))
    assert part.ids == ["b.mp4"] * 2 and part.frames.video_of.tolist() == [1, 1]
    assert part.frames.numbers.tolist() == [[0, 1, -1]] * 2
    assert part.frames.all_labels().tolist() == [1, 1]


# ---------------------------------------------------------------------- the gate of names


BAD = ["a\0b", "a\rb", "line\nend", "\tx", "del\x7f", "no \udcff utf-8"]


@pytest.mark.parametrize("name", BAD)
def test_names_with_control_characters_reach_no_run(name: str) -> None:
    """Line ends, NUL, bytes of file names that are no UTF-8: of ids, groups and classes."""
    source = ArraySource(np.zeros((2, 1, 2, 2), np.uint8), np.arange(2))
    targets = np.zeros(2, np.int64)
    with pytest.raises(UserError, match=r"^ids of samples with line ends or other .*\\u00|udcff"):
        Split([name, "b"], targets, source)
    with pytest.raises(UserError, match="^groups of samples with line ends"):
        Split(["a", "b"], targets, source, ["b", name])
    split = Split(["a", "b"], targets, source)
    with pytest.raises(UserError, match='^data set d: names of classes with line ends.*"'):
        Data(
            "d", {"train": split}, "multiclass", ("x", name), ImageSamples(channels=1, bit_depth=8)
        )
    with pytest.raises(UserError, match="^ids of samples must be strings, not int$"):
        Split([1, 2], targets, source)


def test_names_keep_the_form_that_they_are_given_in() -> None:
    source = ArraySource(np.zeros((1, 1, 2, 2), np.uint8), np.arange(1))
    split = Split(["u\u0308"], np.zeros(1, np.int64), source)
    names = ("u\u0308", "\u732b \U0001f415", 'a, "b"')
    data = Data("d", {"train": split}, "multiclass", names, ImageSamples(channels=1, bit_depth=8))
    assert data.class_names == names and split.ids == ["u\u0308"]
