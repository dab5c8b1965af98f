"""Nearest neighbours against scikit-learn."""

import numpy as np
import pytest
import torch
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
