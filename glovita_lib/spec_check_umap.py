"""Rules of the section umap, checked before any data is read; one line for each mistake."""

from collections.abc import Iterator

from glovita_lib.spec_features import PrecomputedData
from glovita_lib.spec_root import Root
from glovita_lib.spec_types import shown
from glovita_lib.spec_umap import Umap

READ_BY = {
    "min_dist": ("umap",),
    "perplexity": ("tsne",),
    "pca": ("umap", "tsne"),
}
"""Keys that only some methods read."""


def umap_options(root: Root) -> Iterator[str]:
    """Keys of the section that contradict each other or that nothing would read."""
    umap = root.umap
    for key, methods in READ_BY.items():
        value = getattr(umap, key)
        if umap.method not in methods and value != getattr(Umap(), key):
            needs = " or ".join(f'"{method}"' for method in methods)
            yield (
                f"umap.{key}: {shown(value)} would be ignored, it is read only with umap.method ="
                f" {needs}"
            )
    if umap.bags != "mean" and umap.input is None and not is_features(root):
        yield (
            f"umap.bags: {shown(umap.bags)} would be ignored, it is read only with umap.input or"
            ' data.dataset = "precomputed_features"'
        )
    if umap.input is not None and umap.split is not None:
        yield (
            f"umap.split: {shown(umap.split)} is a split of the spec's own data, but umap.input is"
            " set: drop one of them"
        )
    yield from color_options(umap, of_features=umap.input is not None or is_features(root))


def is_features(root: Root) -> bool:
    """Whether the spec's own data are features."""
    return isinstance(root.data, PrecomputedData)


def color_options(umap: Umap, *, of_features: bool) -> Iterator[str]:
    """Where the colours come from."""
    if umap.color_by == "column" and umap.color_file is None:
        yield 'umap.color_by: "column" needs umap.color_file, a CSV file with the column id'
    if umap.color_by == "prediction" and of_features:
        yield (
            'umap.color_by: "prediction" needs a run on images, feature files hold none: use'
            ' "column" with umap.color_file = "<predictions of mode infer>" and umap.color_column ='
            ' "prediction"'
        )
    if umap.color_file is not None and umap.color_column is None:
        yield "umap.color_column: name the column of umap.color_file"
    if umap.color_column is not None and umap.color_file is None:
        yield (
            f"umap.color_column: {shown(umap.color_column)} would be ignored, it is read only with"
            " umap.color_file"
        )
