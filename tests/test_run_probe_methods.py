"""Probes against scikit-learn."""

import numpy as np
import pytest
import torch
from children import run
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from glovita_lib import probe_models
from glovita_lib.neighbors import nearest
from glovita_lib.probe_models import fit_linear, knn_scores

CPU = torch.device("cpu")


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

    distances, indices = nearest(features[test], features[train], 20, metric, exclude_self=False)
    for k in (1, 7, 20):
        near = distances[:, :k], indices[:, :k]
        ours = knn_scores(*near, targets[train], outputs=10, temperature=0.5)
        rows = torch.nn.functional.one_hot(targets[train], 10)
        torch.testing.assert_close(ours, knn_scores(*near, rows, outputs=10, temperature=0.5))
        reference = KNeighborsClassifier(k, metric=metric, weights=weights)
        reference.fit(features[train].double().numpy(), targets[train].numpy())
        expected = reference.predict_proba(features[test].double().numpy())
        agree = np.abs(ours.numpy() - expected).max(1) < 1e-3
        assert agree.mean() > 0.99  # all but ties at the border of the neighbourhood


def test_knn_of_more_neighbours_than_samples_is_their_mean(digits):
    features, targets = digits
    near = nearest(features[10:12], features[:4], 100, "cosine", exclude_self=False)
    scores = knn_scores(*near, targets[:4], outputs=10, temperature=1e6)
    rows = torch.nn.functional.one_hot(targets[:4], 10).float()
    torch.testing.assert_close(scores, rows.mean(0).expand(2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [16384, 100])
def test_logistic_regression_equals_scikit_learn(digits, block, monkeypatch):
    monkeypatch.setattr(probe_models, "BLOCK", block)
    features, targets = digits[0][:600], digits[1][:600]
    fits = dict(
        fit_linear(
            features.half(),
            targets,
            outputs=10,
            subtask="multiclass",
            l2=(1e-1, 1e-3),
            standardize=True,
            max_iterations=1000,
            device=CPU,
        )
    )
    scaled = StandardScaler().fit_transform(features.numpy())
    for strength, model in fits.items():
        reference = LogisticRegression(C=1 / (strength * 600), tol=1e-6, max_iter=5000)
        expected = reference.fit(scaled, targets.numpy()).predict_proba(scaled)
        np.testing.assert_allclose(
            model.logits(features.half()).softmax(1).numpy(), expected, atol=2e-3
        )
        assert model.converged


def test_multilabel_is_one_logistic_regression_a_label(digits):
    features, targets = digits[0][:400], digits[1][:400]
    labels = torch.stack([targets % 2 == 0, targets < 5], 1)
    ((_, model),) = fit_linear(
        features,
        labels.float(),
        outputs=2,
        subtask="multilabel",
        l2=(1e-2,),
        standardize=False,
        max_iterations=20000,
        device=CPU,
    )
    for column in range(2):
        reference = LogisticRegression(C=1 / (1e-2 * 400), tol=1e-7, max_iter=5000)
        expected = reference.fit(features.numpy(), labels[:, column].numpy()).predict_proba(
            features.numpy()
        )[:, 1]
        ours = model.logits(features).sigmoid()[:, column].numpy()
        np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_regression_is_ridge():
    data = load_diabetes()
    features = torch.tensor(data.data).float()
    targets = torch.tensor(data.target)[:, None].float()
    ((_, model),) = fit_linear(
        features,
        targets,
        outputs=1,
        subtask="regression",
        l2=(0.01,),
        standardize=True,
        max_iterations=1,
        device=CPU,
    )
    scaled = StandardScaler().fit_transform(data.data)
    expected = Ridge(alpha=0.01 * len(scaled)).fit(scaled, data.target).predict(scaled)
    ours = model.logits(features)[:, 0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3)


def test_a_constant_feature_and_one_sample_are_legal():
    ((_, model),) = fit_linear(
        torch.ones(1, 3),
        torch.tensor([0]),
        outputs=2,
        subtask="multiclass",
        l2=(1.0,),
        standardize=True,
        max_iterations=10,
        device=CPU,
    )
    assert torch.isfinite(model.logits(torch.zeros(2, 3))).all()


def test_linear_models_are_at_the_minimum(digits):
    """Against an L-BFGS in float64 that goes on to the last digits, from strong to weak L2."""
    features, targets = digits[0][:600], digits[1][:600]
    scaled = torch.from_numpy(StandardScaler().fit_transform(features.double().numpy()))

    def objective(weight, bias, strength):
        log_p = (scaled @ weight.T + bias).log_softmax(1)
        loss = torch.nn.functional.nll_loss(log_p, targets)
        return float(loss + strength / 2 * weight.square().sum()), log_p.exp()

    strengths = (1.0, 1e-2, 1e-4)
    fits = fit_linear(
        features,
        targets,
        outputs=10,
        subtask="multiclass",
        l2=strengths,
        standardize=True,
        max_iterations=1000,
        device=CPU,
    )
    for strength, model in fits:
        best = LogisticRegression(C=1 / (strength * 600), tol=1e-10, max_iter=10000)
        best.fit(scaled.numpy(), targets.numpy())
        expected = map(torch.from_numpy, (best.coef_, best.intercept_))
        loss, p = objective(model.weight.double(), model.bias.double(), strength)
        expected_loss, expected_p = objective(*expected, strength)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        torch.testing.assert_close(p, expected_p, atol=1e-4, rtol=0)
        assert model.converged


def test_the_scale_of_features_does_not_decide_when_a_fit_ends(digits):
    """Features a thousand times smaller, with a penalty as much weaker, give the same model."""
    options = {"outputs": 10, "subtask": "multiclass", "standardize": False, "device": CPU}
    targets = digits[1][:300]
    scores = []
    for scale in (1.0, 1e-3):
        features = digits[0][:300] / 16 * scale
        ((_, model),) = fit_linear(
            features, targets, l2=(1e-2 * scale**2,), max_iterations=10000, **options
        )
        scores.append(model.logits(features).softmax(1))
    torch.testing.assert_close(*scores, atol=2e-4, rtol=0)


@pytest.mark.processes
def test_no_dense_targets_and_no_copies():
    """Peak memory beside the features is that of a block, whatever the number of samples."""
    code = """
import torch
from glovita_lib import probe_models as probe
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
torch.manual_seed(0)
features = torch.empty(60_000, 16, dtype=torch.float16)
for block in features.split(4096):
    block.copy_(torch.randn(block.shape))
targets = torch.arange(len(features)) % 1000
def fit(rows):
    options = dict(outputs=1000, subtask="multiclass", l2=(1.0,), standardize=True)
    device = torch.device("cpu")
    return next(probe.fit_linear(features[:rows], targets[:rows], max_iterations=1, device=device,
        **options))[1]
def vote(rows):
    near = torch.zeros(8, 3), torch.zeros(8, 3, dtype=torch.int64)
    return probe.knn_scores(*near, targets[:rows], outputs=1000, temperature=1.0)
fit(6_000); vote(6_000)
before = peak()
fit(None).logits(features[:8]); vote(None)
print(peak() - before)
"""
    out = run(code).out
    assert float(out) < 40, out  # MiB; one-hot rows in float32 are 229
