"""Sections of a spec on learning and on the modes: task, training, optimizer, logger, infer ..."""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from glovita_lib.errors import composed, listed
from glovita_lib.metric_names import METRICS, MetricNames, metrics_of
from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_if, read_unless
from glovita_lib.spec_errors import (
    Count,
    FoldName,
    NonNegative,
    PathText,
    Positive,
    Precision,
    shown,
)

# ---------------------------------------------------------------------------------- learning

Momentum = Annotated[float, Meta(ge=0, lt=1)]
OF_NUMBERS = read_if("root.predicts_numbers", True, words="a regression")


class BaseTask(Spec):
    """What the modes ask every task."""

    built_in: ClassVar[str] = "objectives"
    learnt_by: ClassVar[str] = "run_train"
    """Module of mode train: the loop of gradient steps, or one of the task's own."""
    keeps_model: ClassVar[bool] = True
    """Whether mode train leaves a checkpoint to predict with."""

    metrics: MetricNames | None = None
    """Metrics of every evaluation."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """At least one metric, each once."""
        if self.metrics == ():
            yield (
                "metrics",
                "[] names none: leave it out for the usual ones, or name one at least",
            )
        names = self.metrics or ()
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield "metrics", f"{shown(name)} is named {names.count(name)} times: name it once"

    def target_problems(self, subtask: str) -> Iterator[tuple[str, str]]:
        """Options that have no meaning for a kind of targets."""
        for name in dict.fromkeys(self.metrics or ()):
            if name not in metrics_of(subtask):
                valid = ", ".join(metrics_of(subtask))
                yield "metrics", f"{shown(name)} is not defined for {subtask}; valid are {valid}"

    def order_problems(self, classes: str) -> Iterator[tuple[str, str]]:
        """Metrics that go by an order of the classes, where nobody has stated one."""
        for name in self.metrics or ():
            if METRICS[name].ordered:
                yield (
                    "metrics",
                    f"{shown(name)} goes by the order of the classes, which {classes} do not say:"
                    " name them in data.class_names, from the lowest to the highest",
                )


class LabelTask(BaseTask):
    """What tasks share whose model learns labels by gradient steps."""

    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes (multiclass, multilabel, framewise)."""
    focal_gamma: Annotated[float, Meta(ge=0)] = 0.0
    """Exponent of the focal loss (Lin et al., ICCV 2017), see losses; 0 is the cross-entropy."""
    class_weights: Literal["balanced"] | tuple[Positive, ...] | None = None
    """Weight per class in the training loss: inverse frequency, or one number a class."""
    result_plot: Literal["none", "val", "all"] = "val"
    """Plots of the final results: none, of the held-out splits val and test, or of train too."""
    bootstrap: Annotated[int, Meta(ge=0)] = 1000
    """Resamples behind the 95 % confidence intervals of the final metrics; 0 leaves them out."""

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        """Options that have no meaning for a kind of samples, in words."""
        yield from ()

    def class_count_problems(self, count: int, source: str) -> Iterator[tuple[str, str]]:
        """One weight a class; source is what says how many classes there are."""
        weights = self.class_weights
        if isinstance(weights, tuple) and len(weights) != count:
            numbers = f"{len(weights)} numbers, but {source} says {count} classes"
            yield "class_weights", f"{numbers}: give one number a class"


class Supervised(LabelTask, tag="supervised", tag_field="objective"):
    """Predict the labels: cross-entropy, binary cross-entropy (multilabel) or a regression loss."""

    regression_loss: Annotated[Literal["mse", "mae", "huber"], OF_NUMBERS] = "mse"
    """Loss of a regression task."""
    standardize_targets: Annotated[bool, OF_NUMBERS] = True
    """Whether a regression learns targets of mean 0 and deviation 1 over the train split; results
    are in target units either way."""
    mixup: bool = False
    """Whether pairs of samples are blended, with targets blended likewise: images, series and
    feature vectors as the encoder or the head receives them, bags by their pooled vectors, before
    the last layer."""
    mixup_alpha: Annotated[Positive, read_if("mixup", True)] = 0.2
    """Both parameters of the Beta distribution of the mixup share."""
    cutmix: bool = False
    """Whether a rectangle of one sample is pasted into another, with targets by area; with mixup
    each sample draws one."""
    cutmix_alpha: Annotated[Positive, read_if("cutmix", True)] = 1.0
    """Both parameters of the Beta distribution of the pasted area."""

    def target_problems(self, subtask: str) -> Iterator[tuple[str, str]]:
        """Metrics are those of the targets; what blends or weights classes is not for numbers."""
        if subtask == "framewise":
            yield "objective", f'"supervised" predicts whole samples, {OF_FRAMES} "framewise"'
            return
        yield from super().target_problems(subtask)
        if subtask == "regression":
            for name in ("mixup", "cutmix", "label_smoothing", "focal_gamma", "class_weights"):
                if value := getattr(self, name):
                    yield name, f"{shown(value)} is for classes, and this is a regression: drop it"

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        """Mixup mixes images, series, feature vectors and the pooled vectors of bags, CutMix
        images, and no other samples (their kind in words)."""
        features = ("features", "vectors", "bags")
        kinds = {"mixup": ("images", "series", *features), "cutmix": ("images",)}
        for name, mixed in kinds.items():
            if getattr(self, name) and samples not in mixed:
                what = "images" if name == "cutmix" else "images, series and features"
                yield name, f"it mixes {what}, and the samples are {samples}: drop it"


OF_FRAMES = "and the labels are a class of each frame: set it to"


class Framewise(LabelTask, tag="framewise", tag_field="objective"):
    """Predict a class of each frame of videos: cross-entropy over the labelled frames of a clip,
    the mean over clips. Evaluation sees every frame of every video."""

    built_in: ClassVar[str] = "framewise"

    background: tuple[str, ...] = ()
    """Classes whose segments count neither in the edit score nor in F1@k; their frames do."""

    def target_problems(self, subtask: str) -> Iterator[tuple[str, str]]:
        """There is a label a frame."""
        if subtask != "framewise":
            text = f'"framewise" predicts a class of each frame, and the targets are {subtask} of'
            yield "objective", f'{text} whole samples: set it to "supervised"'
        else:
            yield from super().target_problems(subtask)

    def class_name_problems(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Background classes are classes of the data."""
        known = set(map(composed, names))
        for name in dict.fromkeys(self.background):
            if composed(name) not in known:
                yield "background", f"{shown(name)} is no class: there are {listed(names)}"


BY_NEIGHBOURS = read_if("asks_neighbours", True, words='"knn" in task.methods')
BY_LINEAR_MODEL = read_if("asks_linear_model", True, words='"linear" in task.methods')
FEATURE_METHODS = frozenset(["knn", "linear"])
BY_KERNELS = read_if("asks_kernels", True, words="kernels of series in task.methods")


class Probe(BaseTask, tag="probe", tag_field="objective"):
    """Judge precomputed features: nearest neighbours and linear models, what they are set to chosen
    on val. Nothing is trained by gradient steps, model and optimizer are not used. Bags are
    averaged. With data.standardize both methods see features of mean 0 and deviation 1. Of time
    series: a ridge on features of random convolutional kernels, which needs no val."""

    built_in: ClassVar[str] = "run_probe"
    learnt_by: ClassVar[str] = "run_probe"
    keeps_model: ClassVar[bool] = False

    metrics: MetricNames | None = None
    """Metrics of the results; the first one chooses."""
    methods: tuple[
        Literal["knn", "linear", "minirocket", "multirocket", "hydra", "hydra_multirocket"], ...
    ] = ("knn", "linear")
    """Of features weighted vote of nearest neighbours, and logistic regression (ridge for
    regression); of time series the kernels of MiniRocket, MultiRocket, Hydra, or the last two."""
    alphas: Annotated[tuple[Positive, ...], BY_KERNELS] = (
        1e-3,
        4.641588833612782e-3,
        2.1544346900318832e-2,
        1e-1,
        4.6415888336127775e-1,
        2.154434690031882,
        10.0,
        46.41588833612773,
        215.44346900318823,
        1000.0,
    )
    """Strengths of the ridge on kernels to choose from by leave-one-out, in units of scaled
    features, as in scikit-learn's RidgeClassifierCV."""
    k: Annotated[tuple[Count, ...], BY_NEIGHBOURS] = (1, 5, 10, 20, 50, 100)
    """Numbers of neighbours to choose from; at most as many as there are train samples."""
    distance: Annotated[Literal["cosine", "euclidean"], BY_NEIGHBOURS] = "cosine"
    """Distance of neighbours."""
    temperature: Annotated[Positive, BY_NEIGHBOURS] = 0.07
    """Neighbours are weighted by exp(-distance / temperature), in units of the distance."""
    l2: Annotated[tuple[Positive, ...], BY_LINEAR_MODEL] = (
        1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0,
    )  # fmt: skip
    """Strengths of the L2 penalty to choose from, per sample: scikit-learn's C is 1 / (l2 N)."""
    standardize: Annotated[bool, BY_LINEAR_MODEL] = True
    """Whether the linear model sees features of mean 0 and deviation 1 over the train split, which
    its L2 strengths are meant for; after data.standardize vectors stay as they are."""
    max_iterations: Annotated[Count, BY_LINEAR_MODEL] = 1000
    """L-BFGS iterations of each linear model."""
    result_plot: Literal["none", "val", "all"] = "val"
    """Plots of the results: none, or of val and test."""
    bootstrap: Annotated[int, Meta(ge=0)] = 1000
    """Resamples behind the 95 % confidence intervals; 0 leaves them out."""

    @property
    def asks_neighbours(self) -> bool:
        """Whether nearest neighbours are asked."""
        return "knn" in self.methods

    @property
    def asks_linear_model(self) -> bool:
        """Whether a linear model is fitted."""
        return "linear" in self.methods

    @property
    def asks_kernels(self) -> bool:
        """Whether time series are judged by random kernels."""
        return not FEATURE_METHODS.issuperset(self.methods)

    def target_problems(self, subtask: str) -> Iterator[tuple[str, str]]:
        """Samples have a label each."""
        if subtask == "framewise":
            yield "objective", f'"probe" judges features of whole samples, {OF_FRAMES} "framewise"'
        else:
            yield from super().target_problems(subtask)

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        """Methods of features or of series, after the samples; others have none."""
        of_series = [name for name in self.methods if name not in FEATURE_METHODS]
        wrong = {"features": of_series, "series": [n for n in self.methods if n in FEATURE_METHODS]}
        if names := wrong.get(samples):
            kernels = "minirocket, multirocket, hydra, hydra_multirocket"
            valid = kernels if samples == "series" else "knn, linear"
            yield "methods", f"{shown(tuple(names))} cannot judge {samples}; valid are {valid}"

    def problems(self) -> Iterator[tuple[str, str]]:
        """There is something to choose from."""
        yield from super().problems()
        lists = {"methods": self.methods, "k": self.k, "l2": self.l2, "alphas": self.alphas}
        for name, choices in lists.items():
            if not choices:
                yield name, "[] names none: leave it out for the usual ones, or name one"


Task = Supervised | Framewise | Probe


class Training(Spec):
    """The loop."""

    epochs: Count = 20
    """Passes over the train split."""
    precision: Precision = "auto"
    """Autocast type; auto is bf16 where the device computes it natively, else float32 (no)."""
    gradient_accumulation_steps: Count = 1
    """Batches of each rank whose gradients make one optimizer step."""
    gradient_clip_val: Positive | None = None
    """Largest global gradient norm, applied once per optimizer step."""
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Decay per optimizer step of the averaged weights that are evaluated and saved; none is
    off."""
    compile: bool = False
    """Whether the model is compiled with torch.compile."""
    enable_checkpointing: bool = True
    """Whether weights are written; without them a run leaves metrics, predictions and plots of its
    best epoch, starts over where it was interrupted, and no mode can read its model."""
    best_checkpoint_metric: str | None = None
    """Metric that picks best.pt: val_ and its name in task.metrics (val_f1), or val_loss; none is
    the first of task.metrics."""
    early_stopping_patience: Count | None = None
    """Epochs without a better metric after which training ends; none is off."""
    early_stopping_min_delta: Annotated[NonNegative, read_if("early_stopping_patience")] = 0.0
    """Smallest change of the metric that counts as better for early stopping."""
    log_every: Count = 50
    """Optimizer steps between two log lines; the only steps at which the device is waited for."""
    save_every: Annotated[Count | None, read_if("enable_checkpointing", True)] = None
    """Epochs between two kept checkpoints epoch_0000.pt; none keeps last.pt and best.pt only."""
    save_every_steps: Annotated[Count | None, read_if("enable_checkpointing", True)] = None
    """Optimizer steps between two saves of last.pt within an epoch; none saves at the end of each
    epoch."""
    train_steps_per_epoch: Count | None = None
    """Optimizer steps that end an epoch early; none passes over the whole train split."""
    val_steps_per_epoch: Count | None = None
    """Batches, on each rank that the run was started on, of the evaluation after each epoch; the
    final evaluation is always whole."""
    num_sanity_val_steps: Annotated[int, Meta(ge=0)] = 0
    """Batches evaluated before training starts, so that a broken evaluation shows at once."""
    cache_frozen_features: bool = False
    """Whether a frozen encoder reads every sample once, and later epochs train the head on what it
    gave; needs a train policy that draws nothing, such as default_2d_1."""
    sync_batch_norm: bool = False
    """Whether batch norm takes mean and variance over the batches of all ranks, GPUs, instead of
    each rank's own."""
    ddp_find_unused_parameters: bool = False
    """Whether several ranks look for parameters that a step did not use."""
    on_existing: Literal["resume", "overwrite", "new"] = "resume"
    """What to do with an existing run: continue it, start over, or start a new one beside it
    (name_2, name_3 ...)."""

    def without_val(self, name: str) -> Iterator[tuple[str, str]]:
        """What a data set of that name without a val split leaves without a meaning."""
        for key in ("early_stopping_patience", "best_checkpoint_metric"):
            if (asked := getattr(self, key)) is not None:
                yield (
                    key,
                    f"{shown(asked)}, but data set {name} has no val split to judge epochs by: add"
                    " one, or leave it out",
                )


BY_WORKERS = read_unless("num_workers", 0, words="dataloading.num_workers above 0")


class Dataloading(Spec):
    """How batches are made."""

    batch_size: Count = 32
    """Samples per batch and rank; a run that goes on on other ranks keeps those of its steps."""
    eval_batch_size: Count | None = None
    """Samples per batch and rank in evaluation; none takes batch_size."""
    num_workers: Annotated[int, Meta(ge=0)] | None = None
    """Processes that decode; none is one per core of this rank, at most 12; data held in memory
    needs none."""
    pin_memory: bool = True
    """Whether batches are copied to the GPU from page-locked memory."""
    persistent_workers: Annotated[bool, BY_WORKERS] = True
    """Whether workers live through all epochs and splits of a run; else each epoch has its own."""
    prefetch_factor: Annotated[Count, BY_WORKERS] = 2
    """Batches each worker prepares ahead."""
    timeout: Annotated[NonNegative, BY_WORKERS] = 0.0
    """Seconds to wait for a batch before giving up; 0 waits for ever."""
    drop_last_train: bool = False
    """Whether an incomplete last training batch is left out."""
    shuffle_train: bool = True
    """Whether the train split is visited in a new random order each epoch."""
    in_memory_mb: Annotated[int, Meta(ge=0)] = 2048
    """Data sets whose decoded samples fit in this many MiB per rank are held in memory; 0 never."""


OF_ENCODER = read_if(
    "root.trains_encoder",
    True,
    words='an encoder that trains: images, and peft.method other than "linear_probing"',
)


class Optimizer(Spec):
    """Optimizer and learning-rate schedule, stepped per optimizer step."""

    name: Literal["SGD", "Adam", "AdamW", "RMSprop"] = "AdamW"
    """Algorithm."""
    lr: Positive = 2e-5
    """Peak learning rate."""
    weight_decay: NonNegative = 0.05
    """Weight decay, decoupled for AdamW, L2 for the others."""
    momentum: Annotated[Momentum, read_if("name", "SGD", "RMSprop")] = 0.9
    """Momentum of the gradients."""
    nesterov: Annotated[bool, read_if("name", "SGD")] = False
    """Whether momentum is Nesterov's."""
    betas: Annotated[tuple[Momentum, Momentum], read_if("name", "Adam", "AdamW")] = (0.9, 0.999)
    """Decay of the estimates of both moments."""
    layer_wise_lr_decay: Annotated[float, Meta(gt=0, lt=1), OF_ENCODER] | None = None
    """Factor of the learning rate per layer, from the head (1) down to the input; none is off.
    Layers are timm's where it counts them: the last block of a ViT has the factor once."""
    undecay_norm: Annotated[bool, read_unless("weight_decay", 0)] = False
    """Whether norms, biases, tokens, position embeddings and scales are kept from weight decay:
    what timm spares, where its network says it."""
    scheduler: Literal["CosineAnneal", "Step", "MultiStep", "None"] = "CosineAnneal"
    """Schedule after the warm-up."""
    warmup_epochs: NonNegative | None = None
    """Epochs of linear warm-up; none is a tenth of the epochs, at most 10, and 0 for schedules
    other than CosineAnneal."""
    min_lr: Annotated[NonNegative, read_if("scheduler", "CosineAnneal")] = 0.0
    """Learning rate at the end."""
    gamma: Annotated[float, Meta(gt=0, lt=1), read_if("scheduler", "Step", "MultiStep")] = 0.1
    """Factor of the learning rate at each step."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """The last learning rate is not above the first; Nesterov's step uses the momentum."""
        if self.min_lr > self.lr:
            yield "min_lr", f"{self.min_lr:g} is above optimizer.lr = {self.lr:g}"
        if self.nesterov and self.name == "SGD" and self.momentum == 0:
            yield "nesterov", "true needs optimizer.momentum above 0, e.g. 0.9"


class WandbLogger(Spec, tag="wandb", tag_field="backend"):
    """Weights & Biases; without an API key it runs offline."""

    built_in: ClassVar[str] = "loggers"

    entity: str | None = None
    """Account or team."""
    project: str | None = None
    """Project; none is the data set's name."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    group: str | None = None
    """Group of the run; none is the run's group directory."""
    name: str | None = None
    """Display name; none is group and fold."""
    offline: bool = False
    """Whether nothing is sent; wandb sync sends it later."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """W&B refuses some names of projects."""
        found = [sign for sign in "/\\#?%:" if sign in (self.project or "")]
        if found:
            yield (
                "project",
                f"{shown(self.project)} holds {' '.join(found)}: the name of a project of W&B has"
                " none of / \\ # ? % :",
            )
        if len(self.project or "") > 128:
            yield "project", f"{len(self.project or '')} characters, of at most 128"


class NoLogger(Spec, tag="none", tag_field="backend"):
    """Only metrics.jsonl, which is always written."""

    built_in: ClassVar[str] = "loggers"


Logger = WandbLogger | NoLogger


OF_OWN_RUN = read_unless(
    "checkpoint", words="the spec's own run: infer.checkpoint names its file itself"
)


class Infer(Spec):
    """What mode infer evaluates."""

    checkpoint: PathText | tuple[PathText, ...] | None = None
    """Checkpoint file, or adapter.safetensors of a PEFT run, which is laid over its base; several
    make an ensemble (mean of probabilities, mean of regression outputs); none is the spec's own
    run."""
    folds: tuple[FoldName, ...] | None = None
    """Folds of the spec's own run that make an ensemble; none is data.fold alone."""
    use: Annotated[Literal["best", "last"], OF_OWN_RUN] = "best"
    """Which checkpoint of the spec's own run."""
    split: Literal["train", "val", "test"] | None = None
    """Split to evaluate; none is test, or val where there is no test."""
    input: PathText | None = None
    """What to predict without labels, instead of a split: a folder of images, volumes, videos or
    series, one of these files, or a CSV file with a path column; for a model of features a feature
    file, or a folder of one-bag files."""
    merge: bool = False
    """Whether the change that a PEFT method has learnt is folded into the base's weights first:
    the speed of the base, equal up to rounding."""
    export: PathText | None = None
    """File (safetensors) to which the weights of the one checkpoint are written, merged where merge
    is set; another run starts from it by model.encoder.weights."""
    output_dir: PathText | None = None
    """Where predictions and metrics go; none is the folder infer below the run."""
    attention: bool = True
    """Whether heads with attention (clam, abmil, dsmil, transmil) write that of every instance to
    attention_<split>.h5."""
    attention_maps: Annotated[int, Meta(ge=0), read_if("attention", True)] = 16
    """Bags whose attention is drawn over their coordinates, the classes in turn; 0 draws none."""
    heat_maps: Annotated[int, Meta(ge=0)] = 0
    """Images, volumes or videos, the classes in turn, over which Grad-CAM is drawn: what in them
    speaks for the predicted class; of volumes as NIfTI too, of videos as GIF."""
    heat_map_class: Annotated[str | None, read_unless("heat_maps", 0)] = None
    """Class or target that the maps are of; none is the predicted class, of a regression the first
    target."""
    volume_maps: bool = False
    """Whether maps_<split> gets NIfTI files that lie over the volumes in world coordinates: the
    attention over windows, slices or patches as a density, or with data.augmentation.evaluation =
    "windows" the score of each class or target, the mean over the windows there."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """One source of weights and one of samples; folds are named once; what is exported is one
        safetensors file with the weights of one checkpoint."""
        if self.checkpoint is not None and self.folds is not None:
            yield "folds", "the folds of this spec's own run, but infer.checkpoint is set: drop one"
        if self.input is not None and self.split is not None:
            yield "split", f"{shown(self.split)} is replaced by infer.input: drop one of them"
        if self.checkpoint == ():
            yield "checkpoint", "[] names none: leave it out for this spec's own run"
        if self.folds == ():
            yield "folds", "[] names none: leave it out for data.fold alone"
        if self.folds is not None and len(set(self.folds)) < len(self.folds):
            yield "folds", f"{shown(self.folds)} names a fold twice"
        if self.export is not None:
            yield from self.export_problems(self.export)
        if self.heat_maps and self.members > 1:
            yield (
                "heat_maps",
                f"they are of one model, and infer names {self.members}: name one of them",
            )

    @property
    def members(self) -> int:
        """Checkpoints that are named, at least 1."""
        if isinstance(self.checkpoint, tuple):
            return len(self.checkpoint)
        return len(self.folds or (0,)) if self.checkpoint is None else 1

    def export_problems(self, export: str) -> Iterator[tuple[str, str]]:
        """What is wrong with the exported file."""
        if not export.endswith(".safetensors"):
            yield "export", f'{shown(export)} must end in ".safetensors", which it is'
        if self.members > 1:
            yield (
                "export",
                f"it takes one checkpoint, and infer names {self.members}: export them one after"
                " another",
            )


# ------------------------------------------------------------------------------ mode extract


ReadoutMethod = Literal["cls_token", "avg", "patch_mean", "sum", "mean_all", "joint", "pooled"]
OF_TRAINED_RUN = read_if(
    "reads_own_run", True, words='extract.source = "run" and no extract.checkpoint'
)


class Extract(Spec):
    """What mode extract writes."""

    source: Literal["run", "encoder"] = "run"
    """Model of the run that this spec trained, with its PEFT and transforms, or the encoder as the
    spec describes it."""
    checkpoint: PathText | None = None
    """Checkpoint file, or adapter.safetensors of a PEFT run, instead of the spec's own run; model,
    PEFT and transforms come from it."""
    use: Annotated[Literal["best", "last"], OF_TRAINED_RUN] = "best"
    """Which checkpoint of the spec's own run."""
    method: Annotated[ReadoutMethod | None, read_if("output", "embedding", "clips")] = None
    """How tokens become one vector; pooled is the library's own vector before the classifier (timm:
    forward_head(forward_features(x), pre_logits=True)), and so is cls_token or avg where the
    library pools so; patch_mean and sum are of the patch tokens of forward_features alone. The
    attribute equals of a file says it as a call. none is the model's own aggregation; of layers
    the CLS token where they have one, else avg."""
    output: Literal["embedding", "tokens", "map", "frames", "clips"] = "embedding"
    """One vector a sample (N, D); all patch tokens as a bag (M, D) with bag_ptr and coords; feature
    maps (N, C, H, W), of volumes (N, C, X, Y, Z); or of videos a vector of every frame, or of each
    of data.sampling.clips (M, D) with bag_ptr, frames and times."""
    layers: Annotated[tuple[int, ...], Meta(extra={"last_n": True})] = ()
    """Blocks (stages of a convolutional network of timm) whose outputs are read, from 0, negative
    from the last one, side by side along the width in this order; none is the encoder's output."""
    norm: Annotated[bool, read_if("layers")] = True
    """Whether the encoder's final norm is applied to the outputs of layers, where its width fits;
    else they are the raw residual stream."""
    prefix_tokens: Annotated[bool, read_if("output", "tokens")] = False
    """Whether CLS and register tokens are kept in front of the patches."""
    split: Literal["train", "val", "test"] | None = None
    """Split to extract; none is every split there is."""
    precision: Literal[16, 32] = 16
    """Bits of a stored number."""
    compression: Literal["none", "lzf", "gzip"] = "none"
    """Compression of the features; see benchmarks/features.py."""
    compression_level: Annotated[int, Meta(ge=0, le=9), read_if("compression", "gzip")] = 1
    """Level of gzip; more than 1 costs time and gains next to nothing on floats."""
    output_dir: PathText = "precomputed_features"
    """Folder of the files."""
    output_filename: str | None = None
    """File name with {method} {model} {dataset} {split} {imgsize} {precision} {checkpoint}; none is
    agg_{method}_{model}_{dataset}_{split}_size{imgsize}_float{precision}.h5, with the output, as
    tokens or clips_{method}, in place of agg_{method}; imgsize is the input's side, or 96x96x24."""
    use_eval_transform_for_train: bool = True
    """Whether the train split goes through the test policy; else it is augmented."""
    use_data_fraction: bool = False
    """Whether data.data_fraction cuts the train split here too."""
    bag_by: Literal["group"] | None = None
    """Samples of one group (case, slide) become one bag; none keeps a row a sample."""
    coords_file: Annotated[PathText | None, read_if("bag_by")] = None
    """CSV file with the columns id (of the sample, for images the path below images_dir), x, y
    (and z): where the samples of a bag lie."""
    on_error: Literal["stop", "skip"] = "stop"
    """What an unreadable sample does: end the extraction, or be left out and listed at the end."""
    block_samples: Count = 1024
    """Samples of a block, in whole batches, fewer where these have more than 256 MiB of features;
    finished blocks survive a kill."""

    @property
    def reads_own_run(self) -> bool:
        """Whether the model is that of the run that this spec trained."""
        return self.checkpoint is None and self.source == "run"

    @property
    def filters(self) -> str:
        """Compression with its level, such as gzip:4."""
        return f"gzip:{self.compression_level}" if self.compression == "gzip" else self.compression

    def problems(self) -> Iterator[tuple[str, str]]:
        """One source of weights; bags are made of vectors."""
        if self.checkpoint is not None and self.source == "encoder":
            yield (
                "source",
                '"encoder" is the model of the spec, but extract.checkpoint is set: drop one of'
                " them",
            )
        if self.bag_by is not None and self.output != "embedding":
            yield (
                "bag_by",
                f"bags are made of one vector a sample, not of {shown(self.output)}: set"
                ' extract.output = "embedding"',
            )


# --------------------------------------------------------------------------------- mode umap


OF_FEATURES = read_if(
    "root.maps_features", True, words='umap.input or data.dataset = "precomputed_features"'
)


class Umap(Spec):
    """What mode umap draws: features in two dimensions, as PNG, SVG, CSV and interactive HTML."""

    input: PathText | None = None
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
    min_dist: Annotated[float, Meta(ge=0, le=1), read_if("method", "umap")] = 0.1
    """How close samples may come in the plot, of its unit of length."""
    perplexity: Annotated[float, Meta(gt=0), read_if("method", "tsne")] = 30.0
    """Effective number of neighbours; at most a third of the samples."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance of features; cosine normalises every vector to length 1 first."""
    pca: Annotated[Count | None, read_if("method", "umap", "tsne")] = None
    """Principal components that features are reduced to before; none keeps them."""
    bags: Annotated[Literal["mean", "instances"], OF_FEATURES] = "mean"
    """A bag is one point, the mean of its instances, or each instance is one, with the label of its
    bag."""
    color_by: Literal["label", "prediction", "column"] = "label"
    """What the colours of the pictures mean; the HTML offers everything that is known."""
    color_file: PathText | None = None
    """CSV file with a column id and color_column, e.g. the predictions of mode infer."""
    color_column: Annotated[str | None, read_if("color_file")] = None
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
    output_dir: PathText | None = None
    """Folder of the results; none is umap below the run directory, for a file umap_plots/<name>
    beside it."""

    @property
    def color_table(self) -> tuple[str, str] | None:
        """CSV file and column of further colours."""
        if self.color_file is None or self.color_column is None:
            return None
        return self.color_file, self.color_column

    def problems(self) -> Iterator[tuple[str, str]]:
        """One source of samples, and of colours."""
        if self.input is not None and self.split is not None:
            yield (
                "split",
                f"{shown(self.split)} is a split of the spec's own data, but umap.input is set:"
                " drop one of them",
            )
        if self.color_by == "column" and self.color_file is None:
            yield "color_by", '"column" needs umap.color_file, a CSV file with the column id'
        if self.color_file is not None and self.color_column is None:
            yield "color_column", "name the column of umap.color_file"
