"""Nearest neighbours against scikit-learn, and against differences in float64."""

import numpy as np
import pytest
import torch
from children import run
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from glovita_lib import neighbors
from glovita_lib.neighbors import nearest


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("blocks", [(1024, 16384), (100, 70)])
def test_equals_scikit_learn(metric, blocks, monkeypatch):
    monkeypatch.setattr(neighbors, "QUERIES", blocks[0])
    monkeypatch.setattr(neighbors, "REFERENCES", blocks[1])
    features = load_digits().data.astype(np.float64)
    queries, references = features[:300], features[300:1000]
    expected, _ = (
        NearestNeighbors(n_neighbors=15, metric=metric).fit(references).kneighbors(queries)
    )
    distances, indices = nearest(
        torch.tensor(queries), torch.tensor(references), 15, metric, exclude_self=False
    )
    np.testing.assert_allclose(distances, expected, atol=1e-4)
    delta = queries[:, None] - references[indices.numpy()]
    if metric == "euclidean":  # ties may be ordered either way: compare by distance
        np.testing.assert_allclose(np.linalg.norm(delta, axis=2), expected, atol=1e-4)


def test_a_sample_is_not_its_own_neighbour():
    features = torch.tensor(load_digits().data[:200])
    _, indices = nearest(features, features, 5, "euclidean", exclude_self=True)
    assert not (indices == torch.arange(200)[:, None]).any()


def test_k_is_cut_and_nothing_is_legal():
    features = torch.randn(3, 4)
    distances, indices = nearest(features, features, 10, "cosine", exclude_self=True)
    assert distances.shape == indices.shape == (3, 2)
    distances, _ = nearest(features[:0], features, 2, "cosine", exclude_self=False)
    assert distances.shape == (0, 2)


def test_far_from_the_origin_keeps_its_digits():
    features = torch.randn(50, 8, dtype=torch.float64)
    near, _ = nearest(features, features, 3, "euclidean", exclude_self=True)
    shifted, _ = nearest(features + 1e4, features + 1e4, 3, "euclidean", exclude_self=True)
    torch.testing.assert_close(near, shifted, atol=1e-2, rtol=1e-2)


# ---------------------------------------------------------------- exact


def recall(features, metric, k=10):
    """Share of the k nearest by float64 differences that are found."""
    exact = features.double()
    if metric == "cosine":
        exact = exact / exact.norm(dim=1, keepdim=True)
    far = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    expected = far.fill_diagonal_(torch.inf).topk(k, largest=False)
    distances, found = nearest(features, features, k, metric, exclude_self=True)
    wanted = expected.values.square() / 2 if metric == "cosine" else expected.values
    torch.testing.assert_close(distances, wanted, rtol=1e-10, atol=0)
    return (found[:, :, None] == expected.indices[:, None]).any(2).double().mean()


def of_mean_cosine(value):
    """Features (600, 64) in a narrow cone."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    return axis + torch.randn(600, 64, generator=generator) / 8 * (1 / value - 1) ** 0.5


def two_clusters(distance, dtype=torch.float32):
    """Features (600, 64) of spread 0.57 around two centres."""
    features = torch.randn(600, 64, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.57
    features[300:] += distance / 8
    return features


@pytest.mark.parametrize("blocks", [(1024, 16384, 16384), (100, 70, 130)])
@pytest.mark.parametrize("cosine", [0.99993, 0.999988, 0.9999992])
def test_exact_in_a_narrow_cone(cosine, blocks, monkeypatch):
    for name, size in zip(("QUERIES", "REFERENCES", "GROUP"), blocks, strict=True):
        monkeypatch.setattr(neighbors, name, size)
    assert recall(of_mean_cosine(cosine), "cosine") == 1
    assert recall(of_mean_cosine(cosine) * 1e-15, "cosine") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [115, 1222, 11034])
def test_exact_in_clusters_far_apart(distance, dtype):
    assert recall(two_clusters(distance, dtype), "euclidean") == 1


def test_exact_where_float64_products_are_not_enough():
    assert recall(two_clusters(1e9, torch.float64), "euclidean") == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_exact_where_squares_leave_the_range_of_float32(scale):
    assert recall(two_clusters(1) * scale, "euclidean") == 1


def test_an_outlier_costs_the_others_nothing(monkeypatch):
    monkeypatch.setattr(neighbors, "by_differences", None)
    monkeypatch.setattr(neighbors, "by_double", None)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 64, generator=generator)
    queries, features = features[:100], features.clone()
    features[-1] *= 1e4
    distances, _ = nearest(queries, features, 10, "euclidean", exclude_self=False)
    exact = torch.cdist(
        queries.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    torch.testing.assert_close(distances, exact.topk(10, largest=False).values)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_products_is_not_relied_on(precision, monkeypatch):
    monkeypatch.setattr(neighbors, "by_products", None)
    torch.set_float32_matmul_precision(precision)
    try:
        assert recall(two_clusters(1), "euclidean") == 1
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ordinary_features_are_proven_by_float32_products(metric, monkeypatch):
    """Else every search would be as slow as one in float64; repeated rows are no exception."""
    monkeypatch.setattr(neighbors, "by_double", None)
    features = torch.randn(600, 768, generator=torch.Generator().manual_seed(0)).half()
    nearest(features, features, 10, metric, exclude_self=True)
    repeated = features[:30].repeat(20, 1)
    distances, _ = nearest(repeated, repeated, 10, metric, exclude_self=True)
    assert not distances.any()


def test_ties_are_not_compared_with_all_others(monkeypatch):
    """Whole numbers have many equal distances, which no bound can tell apart."""
    monkeypatch.setattr(neighbors, "by_differences", None)
    features = torch.randint(0, 2, (500, 6), generator=torch.Generator().manual_seed(0)).float()
    distances, _ = nearest(
        features[:, :1] * features, features, 90, "euclidean", exclude_self=False
    )
    assert (distances[:, 1:] >= distances[:, :-1]).all()


@pytest.mark.processes
def test_no_copy_of_the_features():
    """Beside the features there are blocks, not the 195 MiB of a float32 copy."""
    code = """
import torch
from glovita_lib import neighbors
neighbors.REFERENCES = 4096
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
features = torch.zeros(200_000, 256, dtype=torch.float16)
features[:, 0] = torch.arange(len(features)) % 64
neighbors.nearest(features[:2], features[:20_000], 5, "cosine", exclude_self=False)
before = peak()
neighbors.nearest(features[:2], features, 5, "cosine", exclude_self=False)
print(peak() - before)
"""
    out = run(code).out
    assert float(out) < 50, out
