"""Layouts of features, the choice of samples, colours, figures: against scikit-learn, umap-learn
and counts."""

import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from sklearn.neighbors import NearestNeighbors

from glovita_lib.errors import UserError
from glovita_lib.metrics_classification import Scores
from glovita_lib.plot_projection import (
    MARKERS,
    PALETTE,
    STYLES,
    Text,
    above,
    as_script,
    classes,
    color_numbers,
    draw_points,
    of_column,
    of_mistakes,
    of_scores,
    of_targets,
    style,
    thumbnails,
)
from glovita_lib.projection import (
    choose,
    exact_neighbors,
    perplexity_of,
    principal_components,
    project,
    umap_learn,
)
from glovita_lib.spec_train import Umap

DIGITS = load_digits()
X, Y = DIGITS.data[:500].astype(np.float32), DIGITS.target[:500]
CPU = torch.device("cpu")


def test_perplexity_is_what_the_points_allow():
    assert perplexity_of(Umap(method="tsne", perplexity=500), 91) == 30
    assert perplexity_of(Umap(method="tsne", perplexity=20), 91) == 20


def lay_out(features, seed=0, **fields):
    return project(np.asarray(features), Umap(**fields), seed=seed, device=CPU)


# ---------------------------------------------------------------------- layouts


@pytest.mark.parametrize("rows", [500, 40])  # more samples than width, and fewer
def test_principal_components_are_those_of_the_singular_values(rows):
    centred = X[:rows].astype(np.float64) - X[:rows].mean(0, dtype=np.float64)
    u, values, _ = np.linalg.svd(centred, full_matrices=False)
    for offset in (0, 1e4):  # a mean that is far from 0 costs no digits of the variance
        points, shares = principal_components(torch.from_numpy(X[:rows]).double() + offset, 5)
        expected = u[:, :5] * values[:5]
        np.testing.assert_allclose(
            points * np.sign((points * expected).sum(0)), expected, atol=1e-6
        )
        np.testing.assert_allclose(shares, values[:5] ** 2 / (values**2).sum(), rtol=1e-6)


def test_pca_of_normalised_features_and_its_axes():
    result = lay_out(X, method="pca", metric="cosine")
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    expected = PCA(2, svd_solver="full").fit(unit.astype(np.float64))
    np.testing.assert_allclose(
        np.abs(result.points), np.abs(expected.transform(unit.astype(np.float64))), atol=1e-5
    )
    share = expected.explained_variance_ratio_[0]
    assert result.axes[0] == f"component 1 ({share:.1%})"


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours_handed_over_are_the_nearest(metric):
    indices, distances = exact_neighbors(torch.from_numpy(X), 10, metric)
    search = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(X)
    expected, _ = search.kneighbors(X.astype(np.float64))
    np.testing.assert_allclose(distances, expected, atol=1e-4)
    assert (indices[:, 0] == np.arange(500)).all() and (distances[:, 0] == 0).all()
    assert indices.dtype == np.int32 and distances.dtype == np.float32


def test_umap_on_exact_neighbours_is_as_good_as_its_own_search_and_deterministic():
    first, again, other = (lay_out(X, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.points, again.points)
    assert not np.allclose(first.points, other.points)
    own = umap_learn().UMAP(random_state=0, n_jobs=1).fit_transform(X)
    reference = trustworthiness(X, own, n_neighbors=15)
    assert first.trustworthiness > 0.95
    assert first.trustworthiness > reference - 0.01
    assert first.trustworthiness == trustworthiness(X, first.points, n_neighbors=15)
    assert (first.method, first.axes, first.trust_samples) == ("umap", ("", ""), 500)


def test_umap_after_pca_and_tsne_keep_neighbours():
    reduced = lay_out(X[:200], pca=20, metric="cosine")
    assert reduced.trustworthiness > 0.95
    tsne = lay_out(X[:120], method="tsne")
    own = TSNE(random_state=0).fit_transform(X[:120])
    assert tsne.trustworthiness > trustworthiness(X[:120], own, n_neighbors=15) - 0.01
    assert tsne.trustworthiness > 0.9
    np.testing.assert_array_equal(tsne.points, lay_out(X[:120], method="tsne").points)


@pytest.mark.parametrize("method", ["umap", "tsne", "pca"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_few_samples(method, count):
    result = lay_out(X[:count], method=method)
    assert result.points.shape == (count, 2) and np.isfinite(result.points).all()
    assert (result.trustworthiness is None) == (count < 3)
    if count <= 3:  # a plane holds them: all distances are kept
        assert result.method == "pca"
        given = np.linalg.norm(X[:count, None] - X[None, :count], axis=2)
        drawn = np.linalg.norm(result.points[:, None] - result.points[None], axis=2)
        np.testing.assert_allclose(drawn, given, atol=1e-3)


@pytest.mark.parametrize("method", ["umap", "tsne", "pca"])
def test_constant_repeated_and_one_dimensional_features(method):
    constant = lay_out(np.ones((30, 5)), method=method)
    assert (constant.points == 0).all() and (constant.notes != []) == (method != "pca")
    assert constant.trustworthiness is None and constant.axes == ("component 1", "component 2")
    repeated = lay_out(np.repeat(X[:5], 8, 0), method=method, n_neighbors=3)
    line = lay_out(np.arange(12.0)[:, None], method=method)
    for result in (repeated, line):
        assert np.isfinite(result.points).all() and result.method == method


def test_far_apart_clusters_give_no_warning():
    apart = np.concatenate([X[:20], X[20:40] + 1e4, X[40:60] - 1e4])
    assert np.isfinite(lay_out(apart, n_neighbors=3).points).all()


def test_new_warnings_of_umap_learn_are_shown(monkeypatch):
    class Warning_:
        def __init__(self, **arguments):
            self.fit_transform = lambda features: warnings.warn("something new", stacklevel=2)

    monkeypatch.setattr(umap_learn(), "UMAP", Warning_)
    with pytest.raises(UserWarning, match="something new"):
        lay_out(X[:60])


def test_trustworthiness_of_many_samples_is_that_of_a_choice(monkeypatch):
    monkeypatch.setattr("glovita_lib.projection.TRUST_SAMPLES", 100)
    result = lay_out(X, method="pca")
    rows = np.sort(np.random.default_rng(0).permutation(500)[:100])
    expected = trustworthiness(X[rows], result.points[rows], n_neighbors=15)
    assert (result.trustworthiness, result.trust_samples) == (pytest.approx(expected), 100)


def test_numba_gives_torch_no_more_threads():
    """Networks of later tests would wait for threads that share the cores with other workers."""
    lay_out(X[:60])
    assert torch.get_num_threads() <= int(os.environ["OMP_NUM_THREADS"])


def test_missing_umap_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match='umap.method = "umap" .*pip install umap-learn') as error:
        lay_out(X[:50])
    assert "\n" not in str(error.value)
    assert lay_out(X[:50], method="pca").method == "pca"


@pytest.mark.processes
def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, glovita_lib.run_umap; "
        "print([m for m in ('umap', 'numba', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert found.stdout.strip() == "[]"


# ---------------------------------------------------------------------- which samples


def test_up_to_max_samples_all_are_shown():
    ones = np.ones(100, np.int64)
    assert choose(np.arange(100) % 3, ones, Umap(max_samples=100), seed=0).tolist() == list(
        range(100)
    )


def test_classes_keep_their_share_or_at_most_so_many():
    labels = np.repeat([0, 1, 2, 3], [700, 200, 90, 10])
    ones = np.ones(1000, np.int64)
    rows = choose(labels, ones, Umap(max_samples=100, max_per_class=0), seed=0)
    assert np.bincount(labels[rows]).tolist() == [70, 20, 9, 1]
    rows = choose(labels, ones, Umap(max_samples=999, max_per_class=50), seed=0)
    assert np.bincount(labels[rows]).tolist() == [50, 50, 50, 10]
    again = choose(labels, ones, Umap(max_samples=999, max_per_class=50), seed=0)
    other = choose(labels, ones, Umap(max_samples=999, max_per_class=50), seed=1)
    assert (rows == again).all() and (rows != other).any()
    assert (np.diff(rows) > 0).all()


def test_regression_has_no_classes_to_limit():
    rows = choose(None, np.ones(1000, np.int64), Umap(max_samples=400), seed=0)
    assert len(set(rows.tolist())) == 400


def test_instances_are_drawn_evenly_from_the_bags_of_a_class():
    labels, lengths = np.array([0, 1, 0, 1]), np.array([1000, 50, 3000, 2000])
    rows = choose(labels, lengths, Umap(max_samples=600, max_per_class=300), seed=0)
    owner = np.searchsorted(np.cumsum(lengths), rows, side="right")
    assert np.bincount(labels[owner]).tolist() == [300, 300]
    assert np.bincount(owner)[2] == pytest.approx(225, abs=35)  # three quarters of class 0
    assert len(np.unique(rows)) == 600


def test_every_class_is_shown_while_there_is_room():
    labels = np.repeat(np.arange(12), [500, 490, *[1] * 10])
    rows = choose(labels, np.ones(1000, np.int64), Umap(max_samples=20, max_per_class=0), seed=0)
    assert np.bincount(labels[rows]).tolist() == [5, 5, *[1] * 10]


# ---------------------------------------------------------------------- colours


MACHADO = {  # Machado, Oliveira and Fernandes (2009), severity 1
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(linear):
    """CIE L*a*b* of linear sRGB."""
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    x = to_xyz @ np.clip(linear, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", [None, *MACHADO])
def test_colours_are_told_apart_with_any_vision(vision):
    seen = []
    for colour in PALETTE:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen.append(lab(linear if vision is None else np.array(MACHADO[vision]) @ linear))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 16


def test_styles_repeat_only_after_all_pairs():
    styles = [style(i) for i in range(STYLES)]
    assert len(set(styles)) == len(PALETTE) * len(MARKERS) and style(STYLES) == styles[0]


def test_classes_without_samples_are_left_out():
    coloring = classes("label", np.array([4, 0, 4]), ["a", "b", "c", "d", "e"])
    assert coloring.names == ("a", "e") and coloring.words() == ["e", "a", "e"]


def test_sets_of_labels_and_mistakes():
    labels = np.array([[1, 0], [1, 1], [0, 0], [1, 0]], np.float32)
    (truth,) = of_targets("label", labels, "multilabel", ["cat", "dog"])
    assert truth.words() == ["cat", "cat + dog", "no label", "cat"] and truth.names[0] == "cat"
    scores = np.array([[0.9, 0.1], [0.9, 0.4], [0.1, 0.2], [0.5, 0.0]], np.float32)
    (said,) = of_scores("prediction", Scores(scores), "multilabel", ["cat", "dog"])
    assert of_mistakes(truth, said).words() == ["right", "wrong", "right", "right"]


def test_several_targets_of_a_regression():
    values = np.array([[1.5, 2], [3, 4]], np.float32)
    first, second = of_targets("label", values, "regression", ["age", "size"])
    assert (first.title, second.title) == ("label age", "label size")
    assert second.values.tolist() == [2, 4] and first.words() == ["1.5", "3.0"]
    error = of_mistakes(first, color_numbers("prediction", np.array([1.0, 3.5])))
    assert error.values.tolist() == [0.5, 0.5]


def test_columns_of_a_table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("id,stain,age,grade\na,HE,61.5,1\nb,IHC,,2\nc,HE,40,1\n")
    ids = [(name, name) for name in "cabz"]
    stain, age, grade = (of_column(path, column, ids) for column in ("stain", "age", "grade"))
    assert stain.words() == ["HE", "HE", "IHC", ""] and stain.names == ("HE", "IHC")
    assert age.values.tolist()[:2] == [40, 61.5] and np.isnan(age.values[2:]).all()
    assert grade.names == ("1", "2") and grade.codes.tolist() == [0, 0, 1, -1]
    path.write_text("id,part\nbo\u0308se,1_0\nb,10\n", encoding="utf-8")
    parts = of_column(path, "part", [("b\u00f6se",), ("b",)])
    assert parts.words() == ["1_0", "10"]  # names, of an id in either Unicode form
    path.write_text("id,stain\na,HE\nb,IHC\n")
    of_instances = of_column(path, "stain", [("b#0", "b"), ("b#1", "b")])
    assert of_instances.words() == ["IHC", "IHC"]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("id,stain\na,HE\n", "stian", 'no column "stian"; did you mean'),
        ("id,stain\na,HE\na,HE\n", "stain", "twice"),
        ("id,stain\nq,HE\n", "stain", "none of the samples"),
        ("id,stain\n", "stain", "none of the samples"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, column, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        of_column(path, column, [("a", "a")])


# ---------------------------------------------------------------------- figures


def drawn(tmp_path, coloring, points=None, axes=("", ""), name="p", size=None):
    png, svg = tmp_path / f"{name}.png", tmp_path / f"{name}.svg"
    points = PCA(2).fit_transform(X) if points is None else points
    text = Text("A $title", "what it depends on", axes)
    draw_points(points, coloring, text, png=png, svg=svg, dpi=60, point_size=size)
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert svg.read_text().rstrip().endswith("</svg>")
    return pixels, png, svg


def has(pixels, colour):
    """Whether some pixels are nearly of this colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels.astype(int) - rgb).max(2) < 24).sum() >= 5


def test_classes_have_their_colours_and_the_same_bytes_each_time(tmp_path):
    coloring = classes("label", Y, DIGITS.target_names.astype(str).tolist())
    pixels, png, svg = drawn(tmp_path, coloring)
    assert all(has(pixels, colour) for colour in PALETTE)
    _, *again = drawn(tmp_path, coloring, name="q")
    assert [png.read_bytes(), svg.read_bytes()] == [path.read_bytes() for path in again]


def test_other_kinds_of_colours(tmp_path):
    many = classes("class", np.arange(500) % 120, [f"a rather long name {i}" for i in range(120)])
    pixels, *_ = drawn(tmp_path, many)
    assert has(pixels, "#C4C4C4")  # the other classes
    values = np.where(np.arange(500) % 9 == 0, np.nan, X.mean(1))
    pixels, *_ = drawn(tmp_path, color_numbers("ink", values), axes=("component 1", "component 2"))
    assert has(pixels, "#440154") or has(pixels, "#3b528b")
    assert "not known (56)" in (tmp_path / "p.svg").read_text()
    drawn(tmp_path, color_numbers("nothing", np.full(500, np.nan)))
    drawn(tmp_path, color_numbers("constant", np.ones(500)), size=3.0)
    drawn(tmp_path, classes("label", np.full(500, -1), ["a"]))
    for count in (1, 2):
        drawn(
            tmp_path, classes("label", Y[:count], list("0123456789")), points=np.zeros((count, 2))
        )


def test_names_stand_above_the_largest_cluster():
    generator = np.random.default_rng(0)
    large, tight = generator.normal(size=(90, 2)), [20, 20] + generator.normal(size=(10, 2)) / 100
    x, y = above(np.concatenate([tight, large]))
    assert abs(x) < 1.5 and 0 < y < 4


# ---------------------------------------------------------------------- the page


def test_thumbnails_are_the_images(tmp_path):
    import base64
    import io

    images = DIGITS.images[:70].astype(np.uint8)[:, None] * 15
    made = thumbnails(lambda i: images[i], 70, 48)
    assert (made["cell"], made["columns"], len(made["sheets"])) == (8, 9, 1)
    kind, _, content = made["sheets"][0].partition(",")
    assert kind == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    for i in range(70):
        row, column = divmod(i, 9)
        cell = sheet[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        np.testing.assert_array_equal(cell, images[i, 0])


def test_large_images_are_shrunk_whole_and_sheets_are_bounded():
    image = np.zeros((3, 60, 200), np.uint8)
    image[0] = 255
    made = thumbnails(lambda i: image, 2000, 48)
    assert made["cell"] == 48 and len(made["sheets"]) == 2
    assert made["sheets"][0].startswith("data:image/jpeg;base64,")
    assert made["columns"] * 48 <= 2048 and made["perSheet"] // made["columns"] * 48 <= 2048
    deep = np.linspace(0, 60000, 64 * 64).astype(np.uint16).reshape(1, 64, 64)
    assert thumbnails(lambda i: deep, 1, 32)["cell"] == 32


def test_no_text_breaks_out_of_the_script():
    hostile = {"ids": ["</script><script>alert(1)</script>", "<!--", "\u2028", 'a"b', "ä"]}
    text = as_script(hostile)
    assert "<" not in text and "\u2028" not in text and json.loads(text) == hostile


READ_ONLY = """
import os, sys
from pathlib import Path
from numba.core import caching

class Nowhere:  # as where neither the installation nor the home folder can be written
    @classmethod
    def from_function(cls, function, file):
        return None

caching.CacheImpl._locator_classes[1:] = [Nowhere]
os.environ.pop("NUMBA_CACHE_DIR", None)
from glovita_lib.projection import umap_learn
umap_learn().UMAP
folder = Path(os.environ["NUMBA_CACHE_DIR"])
print(len(list(folder.rglob("*.nbi"))) > 0, folder)
"""


@pytest.mark.slow  # numba compiles all of it
@pytest.mark.processes
def test_umap_where_numba_may_write_nowhere(tmp_path):
    """Its caches go to a temporary folder, which goes with the process."""
    environment = os.environ | {
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"True {tmp_path}") and not list(tmp_path.iterdir())
    assert "NUMBA_CACHE_DIR" in done.stderr


@pytest.mark.parametrize("size", [1e-30, 1e25, 1e200])
def test_features_of_any_size_have_the_same_map(size):
    """Squares of their distances are no numbers of float32."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5))
    kind = np.float64 if size > 1e38 else np.float32
    small, large = (lay_out((features * scale).astype(kind), method="pca") for scale in (1.0, size))
    assert large.trustworthiness == pytest.approx(small.trustworthiness, abs=1e-6)
    np.testing.assert_allclose(large.points / size, small.points, rtol=1e-4, atol=1e-6)


def test_ids_with_spaces_around_them_have_their_values(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("id,stage\n a,0.5\nb ,1.5\n c ,2.5\n")
    found = of_column(path, "stage", [[" a"], ["b "], ["c"]])
    assert found.values.tolist() == [0.5, 1.5, 2.5]
