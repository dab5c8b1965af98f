"""Rules between the sections of a spec, checked before any data is read.

A rule yields one line for each mistake, opened by the key to change. What only the data or the
built model can tell (classes that are there, tokens that an encoder has) is checked by them.
"""

import operator
import os
import sys
from collections.abc import Iterator, Sequence

from glovita_lib.errors import UserError
from glovita_lib.metric_names import check_logged, logged_names, usual_metrics
from glovita_lib.spec import Loaded, Spec, load_spec
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_conditions import own_problems, unread_options
from glovita_lib.spec_errors import one_of, shown
from glovita_lib.spec_lift import Windows
from glovita_lib.spec_model import RegressionHead
from glovita_lib.spec_root import Root
from glovita_lib.spec_samples import FileData
from glovita_lib.spec_series import SeriesAugmentation
from glovita_lib.spec_train import Framewise, LabelTask, Supervised
from glovita_lib.spec_volumes import VolumeAugmentation


def load_checked(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Loaded[Root]:
    """A spec that is free of mistakes in its keys and between its sections.

    Raises:
        UserError: one line for each mistake.
    """
    loaded = load_spec(path, overrides, Root)
    if problems := check(loaded.root):
        raise UserError("\n".join(f"{loaded.path}: {problem}" for problem in problems))
    return loaded


def check_files(paths: Sequence[str], overrides: Sequence[str]) -> int:
    """Check all specs and print a line for each good one; 2 if any has a mistake, else 0."""
    code = 0
    for path in paths:
        try:
            load_checked(path, overrides)
            print(f"{path}: ok")
        except UserError as error:
            print(error, file=sys.stderr)
            code = 2
    return code


def check(root: Root) -> list[str]:
    """All contradictions of a spec, one line each; empty if it holds together."""
    lines = [*own_problems(root), *unread_options(root, root)]
    return lines + [line for rule in RULES for line in rule(root)]


def tag(part: Spec) -> str:
    """What the spec file calls a member of a union, as it stands there."""
    return shown(part.__struct_config__.tag)


# ------------------------------------------------------------------ data, head and metrics


def files_are_named(root: Root) -> Iterator[str]:
    """There are files to read, unless mode umap reads another one."""
    if root.mode == "umap" and root.umap.input is not None:
        return
    for name, text in root.data.missing_files():
        yield f"data.{name}: {text}"


def head_fits_targets(root: Root) -> Iterator[str]:
    """Classes need a classification head, numbers a regression head; a probe has none."""
    if not root.task.keeps_model:
        return
    subtask = root.data.stated_subtask()
    if subtask is None and isinstance(root.task, Framewise):
        subtask = "framewise"
    for name, text in root.model.head.target_problems(subtask) if subtask else ():
        yield f"model.head.{name}: {text}"


def head_size(root: Root) -> Iterator[str]:
    """A stated number of outputs agrees with the stated number of targets."""
    head, stated = root.model.head, root.data.stated_outputs()
    if isinstance(head, RegressionHead) and stated:
        source, count = stated[0]
        for name, text in head.count_problems(count, source):
            yield f"model.head.{name}: {text}"


def instances_have_classes(root: Root) -> Iterator[str]:
    """Instances are labelled by the class of their bag."""
    option = root.model.head.needs_classes
    if option is not None and root.predicts_numbers:
        yield f"model.head.{option}: true needs classes, and this is a regression: drop it"


def task_fits_targets(root: Root) -> Iterator[str]:
    """Metrics and options of the task are those of its kind of targets."""
    subtask = root.data.stated_subtask() or ("regression" if root.predicts_numbers else None)
    if subtask is None and root.model.head.predicts == ("frames",):
        subtask = "framewise"
    if subtask is not None:
        for name, text in root.task.target_problems(subtask):
            yield f"task.{name}: {text}"


def task_fits_samples(root: Root) -> Iterator[str]:
    """Only images and series are mixed; a probe has methods of features and of series."""
    if root.data.samples in ("features", "series"):
        for name, text in root.task.sample_problems(root.data.samples):
            yield f"task.{name}: {text}"


def best_metric_is_logged(root: Root) -> Iterator[str]:
    """The metric that picks best.pt is the loss or one of task.metrics."""
    asked = root.training.best_checkpoint_metric
    if asked is None or not isinstance(root.task, LabelTask):
        return
    kind = root.data.stated_subtask() or ("regression" if root.predicts_numbers else "multiclass")
    kind = "framewise" if isinstance(root.task, Framewise) else kind
    names = logged_names(root.task.metrics or usual_metrics(kind), known_class_names(root))
    try:
        logged = ["val_loss", *(f"val_{name}" for name in names)]
        check_logged(asked, logged, subtask=kind, class_names=known_class_names(root))
    except UserError as error:
        yield f"training.best_checkpoint_metric: {error}"


def known_class_names(root: Root) -> tuple[str, ...] | None:
    """Class names that the spec states, or that the data set always has."""
    return root.data.class_names if isinstance(root.data, FileData) else root.data.labels


def class_weights_fit(root: Root) -> Iterator[str]:
    """One weight a class, where the spec says how many classes there are."""
    stated = root.data.stated_outputs()
    if stated and isinstance(root.task, LabelTask) and not root.predicts_numbers:
        source, count = stated[0]
        for name, text in root.task.class_count_problems(count, source):
            yield f"task.{name}: {text}"


def named_classes_exist(root: Root) -> Iterator[str]:
    """Classes that the task names are among those that the spec states."""
    names = known_class_names(root)
    if names is not None and isinstance(root.task, Framewise):
        for name, text in root.task.class_name_problems(names):
            yield f"task.{name}: {text}"


# ------------------------------------------------------------------ encoder


def encoder_takes_samples(root: Root) -> Iterator[str]:
    """Features pass by the encoder, images do not, and channels are those of the data; a probe of
    series has none."""
    if root.data.samples == "series" and not root.task.keeps_model:
        return
    encoder, samples, channels = root.model.encoder, root.data.samples, root.data.stated_channels()
    problems = list(encoder.sample_problems(samples) if samples != "either" else ())
    problems += encoder.channel_problems(channels) if channels else ()
    for name, text in problems:
        yield f"model.encoder.{name}: {text}"


def augmentation_fits(root: Root) -> Iterator[str]:
    """Mean and std have a number for each channel, and policies read their parameters."""
    augmentation = getattr(root.data, "augmentation", None)
    if root.mode == "train" and not root.task.keeps_model and augmentation is not None:
        for name in augmentation.__struct_fields__:
            if getattr(augmentation, name) != getattr(type(augmentation)(), name):
                yield f"data.augmentation.{name}: would be ignored, a probe augments nothing"
    kinds = ImageAugmentation | VolumeAugmentation | SeriesAugmentation
    if not isinstance(augmentation, kinds):
        return
    problems: list[tuple[str, str]] = []
    channels = root.data.stated_channels() or root.model.encoder.stated_channels
    if channels and isinstance(augmentation, ImageAugmentation):
        problems += augmentation.channel_problems(channels)
    if isinstance(augmentation, ImageAugmentation) and augmentation.patch_size is not None:
        problems += root.model.encoder.patch_problems(
            augmentation.patch_size, augmentation.image_size
        )
    problems += augmentation.unread_kwargs(root.data.default_policies)
    for name, text in problems:
        yield f"data.augmentation.{name}: {text}"


def method_has_an_encoder(root: Root) -> Iterator[str]:
    """Features of a file have no encoder that a method could change."""
    if root.model.encoder.takes == "features" and root.peft.needs_encoder:
        yield (
            f"peft.method: {tag(root.peft)} changes an encoder, and precomputed features have none:"
            ' use "full_finetuning", which trains the head'
        )


# ------------------------------------------------------------------ training


def cached_encoder_is_frozen(root: Root) -> Iterator[str]:
    """Vectors can be cached where the encoder does not change."""
    trains = root.peft.trains == "all" and root.data.samples != "features"
    if root.training.cache_frozen_features and trains:
        yield (
            "training.cache_frozen_features: the encoder trains with peft.method ="
            f' "{root.peft.__struct_config__.tag}"; set it to "linear_probing", or leave'
            " cache_frozen_features out"
        )


def warmup_fits(root: Root) -> Iterator[str]:
    """The warm-up ends within the training."""
    warmup, epochs = root.optimizer.warmup_epochs, root.training.epochs
    if warmup is not None and warmup > epochs:
        yield (
            f"optimizer.warmup_epochs: {warmup:g} is longer than the training"
            f" (training.epochs = {epochs}): at most {epochs}"
        )


# ------------------------------------------------------------------ infer


def folds_exist(root: Root) -> Iterator[str]:
    """The folds of an ensemble exist."""
    count = root.data.stated_folds()
    folds = root.infer.folds or ()
    known = None if count is None else range(count)
    unknown = [fold for fold in folds if known is not None and fold not in known]
    if known is not None and unknown:
        valid = one_of(known)
        yield f"infer.folds: {shown(unknown)} do not exist: this data has the folds {valid}"


def maps_are_of_volumes(root: Root) -> Iterator[str]:
    """Maps lie over volumes."""
    if root.infer.volume_maps and root.data.samples not in ("volumes", "either"):
        yield f"infer.volume_maps: the samples are {root.data.samples}, not volumes: leave it out"


def frames_are_of_videos(root: Root) -> Iterator[str]:
    """Videos have clips, and frames, which all are read, of the encoder's output and named
    stages."""
    spec, samples = root.extract, root.data.samples
    if spec.output in ("frames", "clips") and samples not in ("videos", "either"):
        yield f"extract.output: {shown(spec.output)} are those of videos, and samples are {samples}"
    if spec.output != "frames":
        return
    if spec.layers:
        yield (
            "extract.layers: what is read of frames beside the output is what"
            " model.encoder.intermediate_names names: name it there"
        )
    if not spec.use_eval_transform_for_train:
        yield "extract.use_eval_transform_for_train: false draws clips, all frames are read"


def own_run_has_weights(root: Root) -> Iterator[str]:
    """A mode reads a model only of a run that keeps one."""
    asks = {
        "infer": root.infer.checkpoint is None,
        "extract": root.extract.reads_own_run,
        "umap": root.extract.reads_own_run and not root.maps_features,
    }
    if asks.get(root.mode) and root.mode != "infer" and not root.task.keeps_model:
        yield (
            f"mode: {root.mode} reads a model out, and a probe keeps none: name a checkpoint of"
            " another run in extract.checkpoint, or read the pretrained or untrained encoder of"
            ' section model with extract.source = "encoder"'
        )
    elif asks.get(root.mode) and not root.training.enable_checkpointing:
        yield (
            f"training.enable_checkpointing: false keeps no model for mode {root.mode} to read: set"
            " it to true and train again, or name a checkpoint of another run"
        )


def bags_can_be_mixed(root: Root) -> Iterator[str]:
    """Pooled vectors are mixed by heads that have one a bag."""
    head = root.model.head
    mixes = isinstance(root.task, Supervised) and root.task.mixup
    if mixes and head.takes == "bags" and root.data.samples == "features":
        if not head.mixes:
            yield f"task.mixup: {tag(head)} has no one vector a bag that could be mixed: drop it"
        elif root.training.compile:
            yield "task.mixup: bags are mixed inside the head, which is not compiled then: drop it"


def windows_fit(root: Root) -> Iterator[str]:
    """Windows are cut once, and out of something larger."""
    aug, windows = getattr(root.data, "augmentation", None), root.model.encoder.lifting
    if not isinstance(aug, VolumeAugmentation) or not isinstance(windows, Windows):
        return
    if aug.evaluation == "windows":
        yield (
            'data.augmentation.evaluation: "windows" averages over windows that model.encoder.lift'
            ' = "windows" makes instances of: leave one of them out'
        )
    size, patch = windows.size, aug.patch_size
    if size and patch and any(map(operator.gt, size, patch)):
        yield (
            f"model.encoder.windows.size: {shown(size)} is more than the {shown(patch)} voxels of"
            " data.augmentation.patch_size: at most those, or leave patch_size out for whole"
            " volumes"
        )


def merging_is_possible(root: Root) -> Iterator[str]:
    """infer.merge has something to merge, and can; a checkpoint knows its own method."""
    if root.infer.merge and root.infer.checkpoint is None and not root.peft.merges:
        yield (
            f"infer.merge: {tag(root.peft)} computes something the base cannot, so it does not"
            " merge: leave it out"
        )


# ------------------------------------------------------------------ umap


def predictions_are_known(root: Root) -> Iterator[str]:
    """Colours of predictions are those of a model."""
    if root.umap.color_by == "prediction" and root.maps_features:
        yield (
            'umap.color_by: "prediction" needs a run on images, feature files hold none: use'
            ' "column" with umap.color_file = "<predictions of mode infer>" and umap.color_column ='
            ' "prediction"'
        )


RULES = (
    files_are_named,
    head_fits_targets,
    head_size,
    instances_have_classes,
    task_fits_targets,
    task_fits_samples,
    best_metric_is_logged,
    class_weights_fit,
    named_classes_exist,
    encoder_takes_samples,
    augmentation_fits,
    method_has_an_encoder,
    cached_encoder_is_frozen,
    warmup_fits,
    folds_exist,
    maps_are_of_volumes,
    frames_are_of_videos,
    own_run_has_weights,
    bags_can_be_mixed,
    windows_fit,
    merging_is_possible,
    predictions_are_known,
)
