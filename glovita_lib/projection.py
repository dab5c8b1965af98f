"""Features in two dimensions: choice of samples, layout (UMAP, PCA, t-SNE), trustworthiness.

N samples, D width, k neighbours.
"""

import atexit
import math
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch

from glovita_lib.data import column_means
from glovita_lib.data_splits import apportion
from glovita_lib.errors import UserError
from glovita_lib.neighbors import Metric, nearest, normalized
from glovita_lib.spec_train import Umap

PLANE = 3  # samples up to which a plane holds them without loss
MISSING = (
    'umap.method = "umap" needs umap-learn: pip install umap-learn, or set umap.method to "pca" or'
    ' "tsne"'
)
START = 1e-4  # standard deviation of t-SNE's first positions (Kobak and Berens, 2019)
TRUST_SAMPLES = 2000  # of which trustworthiness is computed: it needs all pairs


@dataclass(frozen=True, slots=True)
class Projection:
    """A layout and what was measured of it."""

    points: np.ndarray
    """Coordinates (N, 2) float64."""
    method: str
    """How they were made: umap, pca or tsne; pca where there is nothing to lay out."""
    axes: tuple[str, str]
    """Names of the axes; empty where they mean nothing."""
    trustworthiness: float | None
    """Of the layout, 0 to 1; None below 3 different samples."""
    trust_neighbors: int
    """Neighbours it was measured with."""
    trust_samples: int
    """Samples it was measured on."""
    notes: list[str] = field(default_factory=list)
    """Lines worth saying."""


def project(features: np.ndarray, spec: Umap, *, seed: int, device: torch.device) -> Projection:
    """Features (N, D) as points of a plane; the same seed gives the same points.

    Raises:
        UserError: umap-learn is missing.
    """
    given = torch.from_numpy(np.ascontiguousarray(features))
    largest = float(given.abs().max()) if given.numel() else 0.0
    tame = largest == 0 or 1e-12 < largest < 1e12
    unit = 1.0 if tame else 2.0 ** math.frexp(largest)[1]  # or squares of distances overflow
    given, notes = in_float32(given / unit, spec.metric)
    given = given.to(device)
    axes = ("", "")
    method = spec.method
    if method != "pca" and distinct(given) <= PLANE:
        method = "pca"
        notes.append(
            f"{len(given)} samples with at most {PLANE} different features lie in a plane:"
            " principal components show them without loss"
        )
    if method == "pca":
        points, shares = principal_components(given, 2)
        shown = [f" ({share:.1%})" if shares.any() else "" for share in shares]
        axes = (f"component 1{shown[0]}", f"component 2{shown[1]}")
    else:
        reduced = given
        if spec.pca is not None:
            points, _ = principal_components(given, min(spec.pca, *given.shape))
            reduced = torch.from_numpy(points).to(given)
        lay_out = umap_layout if method == "umap" else tsne_layout
        points = lay_out(reduced, spec, seed)
    points = np.asarray(points, dtype=np.float64)
    trust, neighbors, samples = trust_in(given, points, spec, seed)
    if method == "pca":
        points = points * unit
    return Projection(points, method, axes, trust, neighbors, samples, notes)


def in_float32(features: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, list[str]]:
    """Features (N, D) as float32 with the distances of the metric, and a note where that rounds
    different ones to the same. float64 ones are centred first, which changes no Euclidean distance
    and keeps what rounding beside a large mean would lose; for the cosine they get length 1."""
    moved = features
    if metric == "cosine":
        moved = normalized(features)
    elif features.dtype == torch.float64:
        moved = features - torch.from_numpy(column_means(features.numpy()))
    rounded = moved.float()
    if features.dtype != torch.float64 or not features.numel():
        return rounded, []
    first: dict[int, int] = {}  # by the hash of a row
    rows = (rounded + 0.0).numpy()  # without -0
    same = [first.setdefault(hash(row.tobytes()), place) for place, row in enumerate(rows)]
    size = 1.0 if metric == "cosine" else features.abs().max()
    noise = 8 * torch.finfo(torch.float64).eps * size  # of float64 itself
    lost = int(((moved - moved[same]).abs().amax(1) > noise).sum())
    if not lost:
        return rounded, []
    return rounded, [
        f"{lost} of {len(features)} samples differ from others by less than float32, in which maps"
        " are computed, can tell: they share their points"
    ]


def distinct(features: torch.Tensor) -> int:
    """Number of different rows, counted up to PLANE + 1."""
    left, count = features, 0
    while len(left) and count <= PLANE:
        left = left[(left != left[0]).any(1)]
        count += 1
    return count


# ---------------------------------------------------------------------- which samples


def choose(classes: np.ndarray | None, lengths: np.ndarray, spec: Umap, *, seed: int) -> np.ndarray:
    """Rows that are shown, sorted; samples of several rows (bags) have them one after another.

    Up to max_samples rows all of them. Else every class keeps at most max_per_class, and if these
    are still more than max_samples, every class the same share, but at least one row while there is
    room.

    Args:
        classes: (B,) class of each sample; None where there are none.
        lengths: (B,) rows of each sample.
        seed: of the choice within a class.
    """
    total = int(lengths.sum())
    if total <= spec.max_samples:
        return np.arange(total)
    members, limit = np.zeros(len(lengths), np.int64), 0
    if classes is not None:
        members, limit = np.unique(classes, return_inverse=True)[1], spec.max_per_class
    sizes = np.bincount(members, lengths).astype(np.int64)  # rows of each class
    sizes_shown = np.minimum(sizes, limit) if limit else sizes
    kept = apportion(sizes_shown, spec.max_samples, low=np.minimum(sizes, 1))
    generator = np.random.default_rng(seed)
    by_class = np.argsort(members, kind="stable")
    starts = np.cumsum(lengths) - lengths
    rows = []
    for own, size, count in zip(
        np.split(by_class, np.cumsum(np.bincount(members))[:-1]), sizes, kept, strict=True
    ):
        drawn = generator.choice(size, count, replace=False, shuffle=False)  # among its own rows
        ends = np.cumsum(lengths[own])
        which = np.searchsorted(ends, drawn, side="right")
        rows.append(starts[own[which]] + drawn - (ends[which] - lengths[own[which]]))
    return np.sort(np.concatenate(rows))


# ---------------------------------------------------------------------- layouts


def principal_components(features: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, count) along the directions of the largest variance, and its shares (count,).

    By scikit-learn from all singular values, in float64; the largest weight of a component is
    positive. Components that do not exist are zeros.
    """
    from sklearn.decomposition import PCA

    given = features.double().cpu().numpy()
    rows, width = given.shape
    kept = min(count, rows, width)
    missing = count - kept
    if (given == given[0]).all():  # scikit-learn would divide by their variance
        return np.zeros((rows, count)), np.zeros(count)
    model = PCA(kept, svd_solver="covariance_eigh" if width <= rows else "full")
    points = model.fit_transform(given - column_means(given))  # centred, or the covariance cancels
    explained = model.explained_variance_ratio_
    return np.pad(points, ((0, 0), (0, missing))), np.pad(explained, (0, missing))


def umap_layout(features: torch.Tensor, spec: Umap, seed: int) -> np.ndarray:
    """UMAP (McInnes, Healy and Melville, 2018) by umap-learn on exact neighbours."""
    umap = umap_learn()
    neighbors = min(spec.n_neighbors, len(features) - 1)
    model = umap.UMAP(
        n_neighbors=neighbors,
        min_dist=spec.min_dist,
        metric=spec.metric,
        random_state=seed,
        n_jobs=1,  # what a seed means to umap-learn
        precomputed_knn=exact_neighbors(features, neighbors, spec.metric),
    )
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        return model.fit_transform(features.cpu().numpy())


EXPECTED = (
    r"precomputed_knn\[2\] \(knn_search_index\) is not an NNDescent",  # nothing is added later
    "Spectral initialisation failed",  # it goes on from random positions
    "Graph is not fully connected",  # nor are clusters that lie apart; they are placed one by one
)
"""What umap-learn warns of and what is meant to be."""


def umap_learn() -> ModuleType:
    """The package, which takes seconds to import.

    Raises:
        UserError: it is not installed.
    """
    try:
        return imported_umap()
    except ImportError as error:
        raise UserError(f"{MISSING} ({error})") from None
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    keep_numba_cache_for_now()
    return imported_umap()


def imported_umap() -> ModuleType:
    """umap-learn, without the warnings of its optional parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import umap
    return umap


def keep_numba_cache_for_now() -> None:
    """Give numba a temporary folder for what it compiles, where neither the installation nor the
    home folder can be written, and forget what was imported without one."""
    folder = tempfile.mkdtemp(prefix="glovita-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = folder
    sys.modules["numba"].core.config.reload_config()  # umap-learn has imported it
    for name in list(sys.modules):
        if name.partition(".")[0] in ("umap", "pynndescent"):
            del sys.modules[name]
    print(
        "note: numba may write neither to its installation nor to the home folder: umap is compiled"
        " anew each time; set NUMBA_CACHE_DIR to a folder of yours to keep what it compiles",
        file=sys.stderr,
    )


def exact_neighbors(
    features: torch.Tensor, count: int, metric: Metric
) -> tuple[np.ndarray, np.ndarray]:
    """Indices int32 and distances float32 (N, count) as umap-learn takes them: the sample itself is
    its first neighbour."""
    distances, indices = nearest(features, features, count - 1, metric, exclude_self=True)
    own = torch.arange(len(features), device=indices.device).unsqueeze(1)
    indices = torch.cat([own, indices], 1)
    distances = torch.nn.functional.pad(distances, (1, 0))
    return indices.int().cpu().numpy(), distances.float().cpu().numpy()


def perplexity_of(spec: Umap, count: int) -> float:
    """The perplexity that so many points allow: at most a third of the others."""
    return min(spec.perplexity, (count - 1) / 3)


def tsne_layout(features: torch.Tensor, spec: Umap, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, 2008) by scikit-learn, begun from principal components."""
    from sklearn.manifold import TSNE

    start, _ = principal_components(features, 2)
    model = TSNE(
        perplexity=perplexity_of(spec, len(features)),
        metric=spec.metric,
        init=(start / start[:, 0].std() * START).astype(np.float32),
        random_state=seed,
    )
    return model.fit_transform(features.cpu().numpy())


# ---------------------------------------------------------------------- trust


def trust_in(
    features: torch.Tensor, points: np.ndarray, spec: Umap, seed: int
) -> tuple[float | None, int, int]:
    """Trustworthiness (Venna and Kaski, 2001), its neighbours and samples.

    1 if all k nearest points of a sample are among its k nearest features, about 0.5 if the layout
    is random. Of more than TRUST_SAMPLES samples it is that of a random choice.
    """
    from sklearn.manifold import trustworthiness

    rows = np.sort(np.random.default_rng(seed).permutation(len(points))[:TRUST_SAMPLES])
    neighbors = min(spec.n_neighbors, (len(rows) - 1) // 2)
    if neighbors < 1 or distinct(features[rows]) < 3:
        return None, 0, len(rows)
    value = trustworthiness(
        features[rows].cpu().numpy(), points[rows], n_neighbors=neighbors, metric=spec.metric
    )
    return float(value), neighbors, len(rows)
