"""Probes against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from glovita_lib import probe
from glovita_lib.probe import fit_linear, knn_scores, one_hot


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.data).float(), torch.tensor(data.target)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_equals_scikit_learn(digits, metric):
    features, targets = digits
    train, test = slice(0, 1000), slice(1000, 1300)

    def weights(distances):
        return np.exp((distances[:, :1] - distances) / 0.5)

    scores = knn_scores(
        features[test],
        features[train],
        one_hot(targets[train], 10, "multiclass"),
        ks=(1, 7, 20),
        metric=metric,
        temperature=0.5,
    )
    for k, ours in scores.items():
        reference = KNeighborsClassifier(k, metric=metric, weights=weights)
        reference.fit(features[train].double().numpy(), targets[train].numpy())
        expected = reference.predict_proba(features[test].double().numpy())
        agree = np.abs(ours.numpy() - expected).max(1) < 1e-3
        assert agree.mean() > 0.99  # all but ties at the border of the neighbourhood


def test_knn_of_more_neighbours_than_samples_is_their_mean(digits):
    features, targets = digits
    rows = one_hot(targets[:4], 10, "multiclass")
    scores = knn_scores(
        features[10:12], features[:4], rows, ks=(100,), metric="cosine", temperature=1e6
    )
    torch.testing.assert_close(scores[100], rows.mean(0).expand(2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [16384, 100])
def test_logistic_regression_equals_scikit_learn(digits, block, monkeypatch):
    monkeypatch.setattr(probe, "BLOCK", block)
    features, targets = digits[0][:600], digits[1][:600]
    rows = one_hot(targets, 10, "multiclass")
    fits = dict(
        fit_linear(
            features.half(),
            rows,
            subtask="multiclass",
            l2=(1e-3, 1e-1),
            standardize=True,
            max_iterations=1000,
        )
    )
    scaled = StandardScaler().fit_transform(features.numpy())
    for strength, model in fits.items():
        reference = LogisticRegression(C=1 / (strength * 600), tol=1e-6, max_iter=5000)
        expected = reference.fit(scaled, targets.numpy()).predict_proba(scaled)
        np.testing.assert_allclose(
            model.scores(features.half(), "multiclass").numpy(), expected, atol=2e-3
        )
        assert model.converged


def test_multilabel_is_one_logistic_regression_a_label(digits):
    features, targets = digits[0][:400], digits[1][:400]
    labels = torch.stack([targets % 2 == 0, targets < 5], 1)
    ((_, model),) = fit_linear(
        features,
        labels.float(),
        subtask="multilabel",
        l2=(1e-2,),
        standardize=False,
        max_iterations=20000,
    )
    for column in range(2):
        reference = LogisticRegression(C=1 / (1e-2 * 400), tol=1e-7, max_iter=5000)
        expected = reference.fit(features.numpy(), labels[:, column].numpy()).predict_proba(
            features.numpy()
        )[:, 1]
        ours = model.scores(features, "multilabel")[:, column].numpy()
        np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_regression_is_ridge():
    data = load_diabetes()
    features = torch.tensor(data.data).float()
    targets = torch.tensor(data.target)[:, None].float()
    ((_, model),) = fit_linear(
        features, targets, subtask="regression", l2=(0.01,), standardize=True, max_iterations=1
    )
    scaled = StandardScaler().fit_transform(data.data)
    expected = Ridge(alpha=0.01 * len(scaled)).fit(scaled, data.target).predict(scaled)
    ours = model.scores(features, "regression")[:, 0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3)


def test_a_constant_feature_and_one_sample_are_legal():
    ((_, model),) = fit_linear(
        torch.ones(1, 3),
        torch.tensor([[1.0, 0.0]]),
        subtask="multiclass",
        l2=(1.0,),
        standardize=True,
        max_iterations=10,
    )
    assert torch.isfinite(model.logits(torch.zeros(2, 3))).all()
