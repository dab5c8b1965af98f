"""UMAP on neighbours found by blocked matrix products against umap-learn's own search.

Both calls make the same kind of layout (same n_neighbors, min_dist, seed, one thread for the
layout, as a seed asks for); they differ in the neighbours alone: exact ones handed over as
precomputed_knn, or approximate ones of pynndescent. With a seed umap-learn searches in one thread,
matrix products use all that torch has; OMP_NUM_THREADS=1 compares one with one. Features: random
points around random centres, because real ones of this size are not at hand; the neighbours' recall
says how alike the two searches are.

- first call: a fresh process each, imports and compilation by numba included, by turns.
- steady state: later calls in one process, by turns, after one of each.
- search alone: the neighbours without the layout, in the same process.

Prints seconds (medians) and ratios ours / umap-learn's; below 1 is faster.

    python benchmarks/umap.py [--samples 10000] [--width 128] [--runs 5] [--first-runs 5]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# the repository instead of this folder, where `import umap` would find this very file
sys.path[0] = str(Path(__file__).resolve().parents[1])
CENTRES = 50


def features(samples: int, width: int) -> Any:
    """Points around centres, (samples, width) float32."""
    import numpy as np

    generator = np.random.default_rng(0)
    centres = generator.normal(size=(CENTRES, width))
    noise = generator.normal(size=(samples, width)) * 0.7
    return (centres[generator.integers(0, CENTRES, samples)] + noise).astype(np.float32)


def ours(given: Any) -> Any:
    """The layout of mode umap."""
    import torch

    from glovita_lib.projection import umap_layout
    from glovita_lib.spec_train import Umap

    return umap_layout(torch.from_numpy(given), Umap(), 0)


def theirs(given: Any) -> Any:
    """The layout with umap-learn's own search."""
    from glovita_lib.projection import umap_learn
    from glovita_lib.spec_train import Umap

    spec = Umap()
    model = umap_learn().UMAP(
        n_neighbors=spec.n_neighbors,
        min_dist=spec.min_dist,
        random_state=0,
        n_jobs=1,
        force_approximation_algorithm=True,  # as above 4,095 samples
    )
    return model.fit_transform(given)


def search_ours(given: Any) -> Any:
    """Neighbours (N, k) by matrix products."""
    import torch

    from glovita_lib.projection import exact_neighbors
    from glovita_lib.spec_train import Umap

    return exact_neighbors(torch.from_numpy(given), Umap().n_neighbors, "euclidean")[0]


def search_theirs(given: Any) -> Any:
    """Neighbours (N, k) by pynndescent, called as umap-learn calls it."""
    import numpy as np
    from umap.umap_ import nearest_neighbors

    from glovita_lib.spec_train import Umap

    state = np.random.RandomState(0)
    count = Umap().n_neighbors
    return nearest_neighbors(given, count, "euclidean", {}, False, state, True, n_jobs=1)[0]


def seconds(call: Callable[[Any], Any], given: Any) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call(given)
    return time.perf_counter() - start


def first_call(name: str, samples: int, width: int) -> float:
    """Wall time of a whole process that makes one layout."""
    start = time.perf_counter()
    arguments = ["--samples", str(samples), "--width", str(width), "--only", name]
    subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def by_turns(first: Callable[[], float], second: Callable[[], float], runs: int) -> None:
    """Measure both by turns and print medians and their ratio."""
    pairs = [(first(), second()) for _ in range(runs)]
    own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"  ours {own:.2f} s, umap-learn {other:.2f} s, medians of {runs}")
    print(f"  ratio {own / other:.2f}")


def recall(given: Any) -> float:
    """Share of the exact neighbours that pynndescent finds too."""
    import numpy as np

    pairs = zip(search_ours(given), search_theirs(given), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs]))


def main() -> None:
    """Measure what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5, help="of the steady state; 0 leaves it out")
    parser.add_argument("--first-runs", type=int, default=5, help="of the first call; 0 likewise")
    parser.add_argument("--only", choices=("ours", "theirs"), help="one layout and nothing else")
    asked = parser.parse_args()
    given = features(asked.samples, asked.width)
    calls = {"ours": ours, "theirs": theirs}
    if asked.only:
        calls[asked.only](given)
        return
    import torch

    print(f"{asked.samples:,} x {asked.width}, {torch.get_num_threads()} threads")
    if asked.first_runs:
        size = (asked.samples, asked.width)
        print("first call, a fresh process with imports and compilation:")
        by_turns(
            lambda: first_call("ours", *size), lambda: first_call("theirs", *size), asked.first_runs
        )
    if asked.runs:
        ours(given), theirs(given)  # compilation
        print("steady state, later calls of one process:")
        by_turns(lambda: seconds(ours, given), lambda: seconds(theirs, given), asked.runs)
        print("search alone:")
        by_turns(
            lambda: seconds(search_ours, given), lambda: seconds(search_theirs, given), asked.runs
        )
        print(f"pynndescent finds {recall(given):.4f} of the exact neighbours")


if __name__ == "__main__":
    main()
