"""Maps of features in a spec: what mode umap draws."""

from typing import Annotated, Literal

from msgspec import Meta

from glovita_lib.spec import Spec

Count = Annotated[int, Meta(ge=1)]


class Umap(Spec):
    """What mode umap draws: features in two dimensions, as PNG, SVG, CSV and interactive HTML."""

    input: str | None = None
    """Feature file (HDF5), or folder with one file (h5, pt) a bag; none is the features of this
    spec's own run or encoder, computed in memory as the section extract says."""
    split: Literal["train", "val", "test"] | None = None
    """Split of the spec's own data; none is all of them."""
    method: Literal["umap", "pca", "tsne"] = "umap"
    """How the features become two dimensional."""
    max_samples: Count = 5000
    """Samples that are drawn; more are thinned out in the proportions of their classes."""
    max_per_class: Annotated[int, Meta(ge=0)] = 200
    """Samples of a class that are drawn where there are more than max_samples samples; 0 sets no
    limit; without meaning for regression."""
    seed: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    """Seed of the choice of samples and of the layout; none is the spec's seed."""
    n_neighbors: Annotated[int, Meta(ge=2)] = 15
    """Neighbours whose distances UMAP keeps, the sample itself among them: few show detail, many
    the large shape. Trustworthiness is measured with as many."""
    min_dist: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """UMAP: how close samples may come in the plot, of its unit of length."""
    perplexity: Annotated[float, Meta(gt=0)] = 30.0
    """t-SNE: effective number of neighbours; at most a third of the samples."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance of features; cosine normalises every vector to length 1 first."""
    pca: Count | None = None
    """Principal components that features are reduced to before UMAP or t-SNE; none keeps them."""
    bags: Literal["mean", "instances"] = "mean"
    """A bag is one point, the mean of its instances, or each instance is one, with the label of its
    bag."""
    color_by: Literal["label", "prediction", "column"] = "label"
    """What the colours of the pictures mean; the HTML offers everything that is known."""
    color_file: str | None = None
    """CSV file with a column id and color_column, e.g. the predictions of mode infer."""
    color_column: str | None = None
    """Column of color_file: numbers give a continuous scale, words or at most 20 whole numbers
    classes."""
    title: str | None = None
    """Heading of the plot; none says method and data."""
    dpi: Annotated[int, Meta(ge=30, le=1200)] = 200
    """Resolution of the PNG, pixels per inch."""
    point_size: Annotated[float, Meta(gt=0, le=50)] | None = None
    """Diameter of a point, 1/72 inch; none follows from the number of points."""
    thumbnails: Annotated[int, Meta(ge=0, le=48)] = 48
    """Longer side of the images that the HTML shows beside the pointer, pixels; 0 leaves them
    out."""
    output_dir: str | None = None
    """Folder of the results; none is umap below the run directory, for a file umap_plots/<name>
    beside it."""
