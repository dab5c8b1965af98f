"""Feature files in a spec: the data set of precomputed features, and how features are extracted."""

from typing import Annotated, Literal

from msgspec import Meta

from glovita_lib.spec import Spec

Subtask = Literal["multiclass", "multilabel", "regression"]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Count = Annotated[int, Meta(ge=1)]


class PrecomputedData(Spec, tag="precomputed_features", tag_field="dataset"):
    """Features in HDF5 files: vectors (N, D), bags (B, L, D), or bags of any length (M, D) with
    bag_ptr or bag_lengths; or a folder with one file (h5, pt) a bag."""

    data_root_dir: str = "."
    """Folder that the files below are relative to."""
    train_features_file: str | None = None
    """Feature file of the train split."""
    val_features_file: str | None = None
    """Feature file of the val split."""
    test_features_file: str | None = None
    """Feature file of the test split."""
    features_file: str | None = None
    """One feature file, or a folder of one-bag files, whose samples split_source distributes;
    instead of a file a split."""
    split_source: Literal["files", "kfold", "splits_json", "csv"] = "files"
    """Splits: one file each; folds drawn from the seed; ids listed in split_file; the column split
    of labels_file."""
    split_file: str = "splits.json"
    """JSON file {split: [id, ...]}, or a list of such objects, one a fold."""
    n_folds: Annotated[int, Meta(ge=3)] = 5
    """Folds of kfold; fold i is test, the next one val, the others train."""
    fold: Annotated[int, Meta(ge=0)] = 0
    """Which fold of a cross-validation this run is."""
    data_fraction: Fraction = 1.0
    """Share of the train split that is used; val and test are never cut."""
    stratified: bool = True
    """Whether folds and data_fraction keep the class proportions."""
    labels_file: str | None = None
    """CSV file with a row a sample, instead of the labels in the feature file; samples without a
    row are not used."""
    id_column: str = "id"
    """CSV column of the sample's id: its id in the feature file, or the name of the bag's file."""
    label_column: str | tuple[str, ...] = "label"
    """CSV column of the label; several for multilabel (0/1 each) and multi-target regression."""
    group_column: str | None = None
    """CSV column of the group (patient) that must stay in one split; none takes the file's
    groups, where it has some."""
    subtask: Subtask | None = None
    """Kind of target; none follows from the labels: whole numbers and names are multiclass, several
    0/1 columns multilabel, other numbers regression."""
    num_classes: Count | None = None
    """Number of classes (regression: of targets); none counts them, a number is checked."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their indices; none takes the file's."""
    features_key: str = "features"
    """Dataset of the features in the file."""
    labels_key: str = "labels"
    """Dataset of the labels."""
    bag_ptr_key: str = "bag_ptr"
    """Dataset of the B + 1 positions where bags begin and the last one ends."""
    bag_lengths_key: str = "bag_lengths"
    """Dataset of the number of instances of each bag."""
    ids_key: str = "ids"
    """Dataset of the sample ids; without it ids are row numbers."""
    groups_key: str = "groups"
    """Dataset of the groups."""
    coords_key: str = "coords"
    """Dataset of the coordinates, one row an instance."""
    standardize: bool = False
    """Whether features are brought to mean 0 and deviation 1 over the train split, for features
    that no network made; the figures are kept in every checkpoint."""
    check_values: bool = True
    """Whether all features are looked at for NaN and infinity before training."""
    window_mb: Annotated[int, Meta(ge=1)] = 256
    """Files too large for memory are read in windows of so many MiB: blocks in random order,
    rows shuffled within a window."""


class Extract(Spec):
    """What mode extract writes."""

    source: Literal["run", "encoder"] = "run"
    """Model of the run that this spec trained, with its PEFT and transforms, or the encoder as the
    spec describes it."""
    checkpoint: str | None = None
    """Checkpoint file instead of the spec's own run; model, PEFT and transforms come from it."""
    use: Literal["best", "last"] = "best"
    """Which checkpoint of the spec's own run."""
    method: Literal["cls_token", "avg", "sum", "mean_all", "joint", "pooled"] | None = None
    """How tokens become one vector; pooled is the library's own vector before the classifier. none
    is the model's own aggregation; of layers the CLS token where they have one, else avg."""
    output: Literal["embedding", "tokens", "map"] = "embedding"
    """One vector a sample (N, D); all patch tokens as a bag (M, D) with bag_ptr and coords; or
    feature maps (N, C, H, W)."""
    layers: tuple[int, ...] = ()
    """Blocks (stages of a convolutional network of timm) whose outputs are read, from 0, negative
    from the last one, side by side along the width in this order; none is the encoder's output."""
    norm: bool = True
    """Whether the encoder's final norm is applied to the outputs of layers, where its width fits;
    else they are the raw residual stream."""
    prefix_tokens: bool = False
    """Whether output tokens keeps CLS and register tokens in front of the patches."""
    split: Literal["train", "val", "test"] | None = None
    """Split to extract; none is every split there is."""
    precision: Literal[16, 32] = 16
    """Bits of a stored number."""
    compression: Literal["none", "lzf", "gzip"] = "none"
    """Compression of the features; see benchmarks/features.py."""
    output_dir: str = "precomputed_features"
    """Folder of the files."""
    output_filename: str | None = None
    """File name with {method} {model} {dataset} {split} {imgsize} {precision} {checkpoint}; none is
    agg_{method}_{model}_{dataset}_{split}_size{imgsize}_float{precision}.h5, with tokens or map
    instead of agg_{method} for those outputs."""
    use_eval_transform_for_train: bool = True
    """Whether the train split goes through the test policy; else it is augmented."""
    use_data_fraction: bool = False
    """Whether data.data_fraction cuts the train split here too."""
    bag_by: Literal["group"] | None = None
    """Samples of one group (case, slide) become one bag; none keeps a row a sample."""
    coords_file: str | None = None
    """CSV file with the columns id (of the sample, for images the path below images_dir), x, y
    (and z): where the samples of a bag lie; for bag_by."""
    on_error: Literal["stop", "skip"] = "stop"
    """What an unreadable sample does: end the extraction, or be left out and listed at the end."""
    block_samples: Count = 1024
    """Samples of a block, in whole batches, fewer where these have more than 256 MiB of features;
    finished blocks survive a kill."""
