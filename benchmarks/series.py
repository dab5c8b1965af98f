"""Probes by random kernels against aeon's compiled (numba) code, on one core.

    python benchmarks/series.py [--runs 5] [--methods minirocket] [--data GunPoint]

Both take the series of a data set of the package aeon in memory and give the predictions of its
test split: kernels, features of both splits, scaling, and a ridge whose strength is chosen by
leave-one-out (aeon's pipelines end in scikit-learn's RidgeClassifierCV). Ours takes series of
several lengths as they are, aeon's code the copy of the data set whose series all have one. Runs
alternate, after one that compiles; the times are medians of CPU seconds. "transforms" are kernels
and features alone, without scaling and ridge.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as glovita.py does

import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from aeon.classification.convolution_based import (
    HydraClassifier,
    MiniRocketClassifier,
    MultiRocketClassifier,
    MultiRocketHydraClassifier,
)
from aeon.transformations.collection.convolution_based import MiniRocket, MultiRocket
from aeon.transformations.collection.convolution_based._hydra import HydraTransformer

from glovita_lib.read_series import read_series
from glovita_lib.series_kernels import PARTS, SERIES_AT_ONCE, TAPS, SeriesBlock, judge
from glovita_lib.series_table import Columns, SeriesTable
from glovita_lib.spec_train import Probe

DATA = ("GunPoint", "ItalyPowerDemand", "ArrowHead", "BasicMotions", "JapaneseVowels")
REFERENCES = {  # aeon's pipeline of a method, and the transforms in it
    "minirocket": (MiniRocketClassifier, (MiniRocket,)),
    "multirocket": (MultiRocketClassifier, (MultiRocket,)),
    "hydra": (HydraClassifier, (HydraTransformer,)),
    "hydra_multirocket": (MultiRocketHydraClassifier, (HydraTransformer, MultiRocket)),
}
SPLITS = ("TRAIN", "TEST")
ALPHAS = Probe().alphas
CPU = torch.device("cpu")


def archive(name: str, kind: str = "") -> list[SeriesTable]:
    """Train and test of a data set as aeon ships them; `kind` is "_eq" for the copy of one with
    series of several lengths where all have one."""
    spec = find_spec("aeon")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data" / name
    columns = Columns("id", "time", ("label",), None, None, ())
    return [read_series(folder / f"{name}{kind}_{split}.ts", columns) for split in SPLITS]


def medians(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """CPU seconds of functions in turn, after one run of each."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if run:
                found[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def compare(name: str, method: str, runs: int) -> None:
    """One data set and method."""
    tables = archive(name)
    classes, targets = np.unique(np.concatenate([t.labels for t in tables]), return_inverse=True)
    train = len(tables[0].ids)
    series = [[one.astype(np.float32) for one in t.series] for t in tables]
    ragged = len({one.shape[1] for own in series for one in own}) > 1
    given = archive(name, "_eq" if ragged else "")
    x, new = (np.stack(t.series).astype(np.float32) for t in given)
    pipeline, transformers = REFERENCES[method]

    def ours() -> np.ndarray:
        own = dict(zip(("train", "test"), series, strict=True))
        learnt = torch.from_numpy(targets[:train])
        options = {"outputs": len(classes), "seed": 0, "device": CPU}
        _, logits = judge(method, own, learnt, "multiclass", ALPHAS, **options)
        return logits["test"].argmax(1).numpy()

    def theirs() -> np.ndarray:
        return pipeline(random_state=0).fit(x, targets[:train]).predict(new)

    def our_features() -> None:
        block = SeriesBlock.of(series[0], TAPS + 1)
        for transform, _ in PARTS[method]:
            fitted = transform(block, seed=0)
            for own in series:
                for _, part in SeriesBlock.of(own, 0).parts(CPU, SERIES_AT_ONCE):
                    fitted(part)

    def their_features() -> None:
        for transformer in transformers:
            fitted = transformer(random_state=0).fit(x)
            for own in (x, new):
                fitted.transform(own)

    calls = {"ours": ours, "theirs": theirs, "features": our_features, "numba": their_features}
    seconds = medians(calls, runs)
    scores = [float((call() == targets[train:]).mean()) for call in (ours, theirs)]
    whole, features = (
        f"{seconds[a]:.2f} s, aeon {seconds[b]:.2f} s, ratio {seconds[a] / seconds[b]:.2f}"
        for a, b in (("ours", "theirs"), ("features", "numba"))
    )
    accuracy = "accuracy {:.3f}, aeon {:.3f}".format(*scores)
    print(f"{name} {method}: {whole}; transforms {features}; {accuracy}", flush=True)


def main() -> None:
    """All data sets and methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--methods", nargs="+", choices=[*REFERENCES], default=[*REFERENCES])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter(
        "ignore"
    )  # aeon's and scikit-learn's, of matrices that are no concern here
    for name in asked.data:
        for method in asked.methods:
            compare(name, method, asked.runs)


if __name__ == "__main__":
    main()
