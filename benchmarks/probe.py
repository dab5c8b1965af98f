"""Probes against scikit-learn's: the same features, the same neighbours, the same penalty.

Features are random centres, one a class, with noise around them, float16 as they are stored;
scikit-learn gets them in float32 for neighbours, in float64 as ours for the linear model.
Neighbours: KNeighborsClassifier(brute), fitted and asked for probabilities. Linear:
LogisticRegression (lbfgs) to the tolerance of ours, on features standardised beforehand; ours
standardises block by block.

Prints CPU seconds on one core, which other processes do not change much (medians of runs by turns
in one process, after one of each), ratios ours / scikit-learn's (below 1 is faster), the largest
difference of the probabilities, and of one more run of each in a process of its own the peak memory
beside the features.

    python benchmarks/probe.py [--samples 10000] [--queries 2000] [--width 128] [--classes 10]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# the repository instead of this folder, where `import probe` would find this very file
sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy are imported
K, L2, ITERATIONS = 15, 1e-3, 1000


def data(asked: argparse.Namespace) -> Any:
    """Train features (M, D) float16 and classes, queries (N, D)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count, width = asked.samples + asked.queries, asked.width
    classes = torch.randint(0, asked.classes, (count,), generator=generator)
    centres = torch.randn(asked.classes, width, generator=generator)
    features = torch.empty(count, width, dtype=torch.float16)
    for rows in torch.arange(count).split(4096):
        noise = torch.randn(len(rows), width, generator=generator)
        features[rows] = (centres[classes[rows]] + 2 * noise).half()
    return features[: asked.samples], classes[: asked.samples], features[asked.samples :]


def knn_ours(train: Any, classes: Any, queries: Any) -> Any:
    """Probabilities (N, K) of the neighbours' vote."""
    from glovita_lib.neighbors import nearest
    from glovita_lib.probe_models import knn_scores

    near = nearest(queries, train, K, "euclidean", exclude_self=False)
    return knn_scores(*near, classes, outputs=int(classes.max()) + 1, temperature=1e9).numpy()


def knn_theirs(train: Any, classes: Any, queries: Any) -> Any:
    """The same by scikit-learn."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(K, algorithm="brute")
    model.fit(train.float().numpy(), classes.numpy())
    return model.predict_proba(queries.float().numpy())


def linear_ours(train: Any, classes: Any, queries: Any) -> Any:
    """Probabilities (N, K) of a logistic regression."""
    import torch

    from glovita_lib.probe_models import fit_linear

    ((_, model),) = fit_linear(
        train,
        classes,
        outputs=int(classes.max()) + 1,
        subtask="multiclass",
        l2=(L2,),
        standardize=True,
        max_iterations=ITERATIONS,
        device=torch.device("cpu"),
    )
    return model.logits(queries).softmax(1).numpy()


@cache
def tolerance(train: Any, classes: Any) -> float:
    """Largest entry of the gradient where ours stops; found before the time is taken."""
    import torch

    from glovita_lib.probe_models import TOLERANCE, Train, moments, value_and_gradient

    outputs = int(classes.max()) + 1
    given = Train(train, classes, outputs, "multiclass", *moments(train, torch.device("cpu")))
    zeros = torch.zeros(outputs, train.shape[1] + 1, dtype=torch.float64)
    return TOLERANCE * float(value_and_gradient(given, 0.0, zeros)[1].abs().max())


def linear_theirs(train: Any, classes: Any, queries: Any) -> Any:
    """The same by scikit-learn, in float64 as ours."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    model = LogisticRegression(
        C=1 / (L2 * len(train)), tol=tolerance(train, classes), max_iter=ITERATIONS
    )
    model.fit(scaler.fit_transform(train.double().numpy()), classes.numpy())
    return model.predict_proba(scaler.transform(queries.double().numpy()))


PAIRS = {"knn": (knn_ours, knn_theirs), "linear": (linear_ours, linear_theirs)}


def seconds(function: Callable[..., Any], given: Any) -> float:
    """Of one call."""
    start = time.process_time()
    function(*given)
    return time.process_time() - start


def peak_of(asked: argparse.Namespace, name: str, number: int) -> float:
    """MiB that a run takes beside the features, in a process of its own."""
    options = ("samples", "queries", "width", "classes")
    sizes = [f"--{option}={getattr(asked, option)}" for option in options]
    command = [sys.executable, __file__, *sizes, f"--memory-of={name},{number}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(asked: argparse.Namespace) -> None:
    """What `peak_of` asks for; a small run first, for the libraries."""
    name, number = asked.memory_of.split(",")
    train, classes, queries = data(asked)
    function = PAIRS[name][int(number)]
    function(train[:500], classes[:500], queries[:10])
    before = peak()
    function(train, classes, queries)
    print(peak() - before)


def peak() -> float:
    """Largest memory of this process, MiB; getrusage would give that of the starting one, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("samples", 10000), ("queries", 2000), ("width", 128), ("classes", 10)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory_of:
        print_peak(asked)
        return
    given = data(asked)
    print(f"{asked.samples} x {asked.width}, {asked.classes} classes, {asked.queries} queries")
    for name, functions in PAIRS.items():
        first, second = (function(*given) for function in functions)
        times = [[seconds(function, given) for function in functions] for _ in range(asked.runs)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        peaks = [peak_of(asked, name, number) for number in range(2)]
        print(
            f"{name:7}ours {ours:.2f} s, scikit-learn {theirs:.2f} s, ratio {ours / theirs:.2f};"
            f" probabilities differ by at most {abs(first - second).max():.1e}; peak memory"
            f" {peaks[0]:.0f} and {peaks[1]:.0f} MiB"
        )


if __name__ == "__main__":
    main()
