"""Random kernels against aeon's implementations, and the ridge against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV, RidgeCV

from glovita_lib import series_kernels
from glovita_lib.probe_models import fit_ridge
from glovita_lib.series_kernels import (
    Hydra,
    MiniRocket,
    MultiRocket,
    SeriesBlock,
    SparseScale,
    count_above,
    describe_above,
    judge,
)
from glovita_lib.spec_train import Probe

ALPHAS = Probe().alphas
CPU = torch.device("cpu")


def made(count, channels, length, seed=0):
    """Random walks."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, channels, length)).cumsum(2).astype(np.float32)


@pytest.fixture(scope="module")
def aeon():
    """aeon's transforms, of the version whose features these are."""
    pytest.importorskip("aeon", minversion="1.4")
    return pytest.importorskip("aeon.transformations.collection.convolution_based")


def compiled_long(*shape):
    """Of several channels aeon's code is compiled anew, which takes a minute."""
    return pytest.param(shape, marks=pytest.mark.slow)


@pytest.mark.parametrize("shape", [(12, 1, 60), compiled_long(10, 3, 40), (9, 1, 10)])
def test_minirocket_gives_the_features_of_aeon(aeon, shape):
    x = made(*shape)
    theirs = aeon.MiniRocket(random_state=3).fit(x)
    ours = MiniRocket(SeriesBlock.of(list(x), 9), seed=3)
    expected = theirs.transform(x)
    found = ours(SeriesBlock.of(list(x), 9)).numpy()
    if shape[1] == 1:
        np.testing.assert_array_equal(ours.kernels.biases, theirs.parameters[4])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:  # aeon sums outputs over channels, which rounds in another way: a few ties differ
        np.testing.assert_allclose(ours.kernels.biases, theirs.parameters[4], rtol=1e-4, atol=1e-4)
        assert (np.abs(found - expected) > 1e-5).mean() < 1e-3


@pytest.mark.parametrize("shape", [(8, 1, 50), compiled_long(6, 3, 40)])
def test_multirocket_gives_the_features_of_aeon(aeon, shape):
    x = made(*shape)
    theirs = aeon.MultiRocket(random_state=3).fit(x).transform(x)
    ours = MultiRocket(SeriesBlock.of(list(x), 9), seed=3)(SeriesBlock.of(list(x), 9)).numpy()
    close = np.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.shape == theirs.shape == (shape[0], 49_728)
    assert close.mean() > (0.9999 if shape[1] == 1 else 0.999)


@pytest.mark.parametrize("shape", [(12, 1, 60), (10, 5, 40), (9, 2, 10)])
def test_hydra_gives_the_features_of_aeon(aeon, shape):
    x = made(*shape)
    theirs = np.asarray(aeon.HydraTransformer(random_state=3).fit_transform(x))
    ours = Hydra(SeriesBlock.of(list(x), 9), seed=3)(SeriesBlock.of(list(x), 9)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_hydras_scaling_is_that_of_aeon():
    pytest.importorskip("aeon", minversion="1.4")
    hydra = pytest.importorskip("aeon.classification.convolution_based._hydra")
    x = torch.from_numpy(made(7, 1, 20)[:, 0])
    x[:, 3] = -1
    expected = hydra._SparseScaler().fit_transform(x)
    torch.testing.assert_close(SparseScale(x)(x), expected)


@pytest.mark.parametrize("kind", [MiniRocket, MultiRocket, Hydra])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_a_series_are_its_own(kind, channels):
    """Alone, among longer ones, or in another order: the same, and finite down to one value."""
    lengths = [40, 7, 23, 40, 1, 2]
    series = [made(1, channels, n, seed=n)[0] for n in lengths]
    fitted = kind(SeriesBlock.of(series, 10), seed=0)
    together = fitted(SeriesBlock.of(series, 40))
    assert torch.isfinite(together).all()
    for number, one in enumerate(series):
        torch.testing.assert_close(fitted(SeriesBlock.of([one], 40))[0], together[number])
    back = fitted(SeriesBlock.of(series[::-1], 60))
    torch.testing.assert_close(back.flip(0), together)


def test_both_ways_of_counting_agree(monkeypatch):
    """The one by NumPy's bytes, the one of other devices, and blocks of time points."""
    out = torch.randn(300, 5, 7).round(decimals=1)
    biases = torch.randn(3, 5).round(decimals=1)
    lengths = torch.tensor([300, 300, 299, 40, 2, 1, 1])
    out = series_kernels.ended(out, lengths)
    ours = series_kernels.on_cpu(out, biases, lengths, describe_above)
    for one, other in zip(ours, series_kernels.on_device(out, biases, lengths), strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(series_kernels, "VALUES_AT_ONCE", 1)
    again = series_kernels.on_cpu(out, biases, lengths, describe_above)
    for one, other in zip(ours, again, strict=True):
        torch.testing.assert_close(one, other)
    (count,) = series_kernels.on_cpu(out, biases, lengths, count_above)
    torch.testing.assert_close(count, ours[0])


@pytest.mark.parametrize("shape", [(30, 200, 3), (200, 20, 1), (40, 39, 2), (40, 40, 4), (3, 9, 1)])
def test_the_ridge_is_scikit_learns(shape):
    count, width, outputs = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, width))
    y = x[:, :outputs] + rng.standard_normal((count, outputs))
    theirs = RidgeCV(alphas=ALPHAS).fit(x, y)
    parts = [torch.from_numpy(part) for part in (x[:, :2], x[:, 2:])]
    ours = fit_ridge(parts, torch.from_numpy(y), ALPHAS)
    assert ours.alpha == theirs.alpha_
    found = ours(parts).numpy()
    np.testing.assert_allclose(found, theirs.predict(x).reshape(count, outputs), atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_predicted_as_by_ridge_classifier(classes):
    rng = np.random.default_rng(1)
    series = {name: list(made(24, 1, 30, seed=n)) for n, name in enumerate(["train", "test"])}
    targets = rng.integers(0, classes, 24)
    targets[:classes] = range(classes)
    for one, target in zip(series["train"], targets, strict=True):
        one += target * np.sin(np.arange(30) * (1 + target))
    series["test"][:3] = [one[:, :20] for one in series["test"][:3]]
    series["train"][0] = series["train"][0][:, :25]
    options = {"outputs": classes, "seed": 0, "device": CPU}
    learnt = torch.from_numpy(targets)
    ridge, logits = judge("hydra", series, learnt, "multiclass", ALPHAS, **options)
    kernels = series_kernels.KernelFeatures("hydra", series["train"], seed=0, device=CPU)
    (train,) = kernels.train
    theirs = RidgeClassifierCV(alphas=ALPHAS).fit(train.numpy(), targets[kernels.rows])
    assert ridge.alpha == theirs.alpha_
    ((rows, (test,)),) = kernels.blocks(series["test"])
    wanted = theirs.decision_function(test.numpy())[rows.argsort()]
    wanted = np.stack([-wanted, wanted], 1) if classes == 2 else wanted
    np.testing.assert_allclose(logits["test"].numpy(), wanted, rtol=1e-3, atol=1e-5)
