"""Rules between the sections of a spec: each is broken once here, and sound specs break none."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from msgspec import inspect as inspect_types

from glovita_lib import spec_check
from glovita_lib.errors import UserError
from glovita_lib.spec import load_spec
from glovita_lib.spec_check import check, load_checked
from glovita_lib.spec_errors import extra_of, structs
from glovita_lib.spec_peft import CustomPeft, Peft
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Supervised, Training

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.toml"))

GENERIC = ["data.dataset=generic_image_dataset"]
FOLDER = [*GENERIC, "data.split_source=subdirs", "data.label_source=folder"]
KFOLD = [*GENERIC, "data.split_source=kfold", "data.label_source=folder"]
CSV = [*GENERIC, "data.label_source=csv"]
VOLUMES = ["data.dataset=generic_3d_dataset", "model.encoder.encoder_type=custom"]
VOLUMES += ["model.encoder.target=a.b:c", "data.label_source=csv"]
SLICED = ["model.encoder.lift=slices", "model.encoder.type=test_vit"]
PREPARATION = "data.preparation"
REGRESSION = [*CSV, "data.subtask=regression", "model.head.head_type=regression"]
MULTILABEL = [*CSV, "data.subtask=multilabel"]
FEATURES = [
    "data.dataset=precomputed_features",
    "data.train_features_file=t.h5",
    "model.encoder.encoder_type=precomputed",
]
FOLDS_OF_FEATURES = [FEATURES[0], FEATURES[2], "data.features_file=t.h5"]
PROBE = [*FEATURES, "task.objective=probe"]
SERIES = ["data.dataset=generic_series_dataset", "task.objective=probe", 'task.methods=["hydra"]']
SERIES_MODEL = ["data.dataset=generic_series_dataset", "data.train_file=t.ts"]
CUSTOM_ENCODER = ["model.encoder.encoder_type=custom", "model.encoder.target=a.b:c"]
SERIES_FILE = [*SERIES, "data.train_file=t.ts"]
SERIES_FOLDS = [*SERIES, "data.split_source=kfold", "data.series_file=t.ts"]
VIDEOS = [
    "data.dataset=generic_video_dataset",
    "data.split_source=kfold",
    "data.label_source=csv",
    "model.encoder.encoder_type=torchvision_video",
]
TRAIN_KWARGS = "data.augmentation.train_kwargs"
INSTANCES = "model.head.instance_eval=true"
CLAM = [*FEATURES, "model.head.head_type=clam"]
CUSTOM = ["data.dataset=custom", "data.target=a.b:c"]
RESIDUAL = [*CUSTOM, "model.encoder.encoder_type=residual_encoder"]
PRIMUS = [*CUSTOM, "model.encoder.encoder_type=primus"]

WINDOWS = ["model.encoder.lift=windows", "model.encoder.windows.size=[8, 8, 8]"]

FRAMES = [*VIDEOS, "data.frames.label_level=frame"]
FRAMES_HEAD, FRAMES_TASK = "model.head.head_type=framewise_decoder_1d", "task.objective=framewise"
OF_FRAMES = [*FRAMES, FRAMES_HEAD, FRAMES_TASK]
BROKEN = [
    # a class of each frame
    ([*FRAMES, FRAMES_TASK], "model.head.head_type", 'set it to "framewise_decoder_1d"'),
    ([*FRAMES, FRAMES_HEAD], "task.objective", '"supervised" predicts whole samples'),
    ([*FRAMES, FRAMES_HEAD, "task.objective=probe"], "task.objective", '"probe" judges features'),
    ([FRAMES_HEAD], "model.head.head_type", "predicts a class of each frame, and the targets are"),
    ([FRAMES_TASK], "task.objective", '"framewise" predicts a class of each frame'),
    ([*OF_FRAMES, "data.subtask=regression"], "data.subtask", "labels of frames are classes"),
    ([*OF_FRAMES, "data.sampling.method=uniform"], "data.sampling.method", "leaves frames out"),
    ([*OF_FRAMES, "data.sampling.clips=3"], "data.sampling.clips", "clips cover a video"),
    (
        [*OF_FRAMES, "data.class_names=['a', 'b']", "task.background=['c']"],
        "task.background",
        "is no class: there are a, b",
    ),
    ([*OF_FRAMES, "model.head.kernel=4"], "model.head.kernel", "use 5"),
    ([*OF_FRAMES, "model.head.stages=['a', 'a']"], "model.head.stages", "is named twice"),
    (
        ["logger.backend=wandb", "logger.project=a/b"],
        "logger.project",
        "holds /: the name of a project of W&B has none of",
    ),
    (
        ["logger.backend=wandb", f"logger.project={'x' * 129}"],
        "logger.project",
        "129 characters, of at most 128",
    ),
    (["infer.volume_maps=true"], "infer.volume_maps", "the samples are images, not volumes"),
    (
        ["extract.output=frames"],
        "extract.output",
        '"frames" are those of videos, and samples are images',
    ),
    (
        ["extract.output=clips"],
        "extract.output",
        '"clips" are those of videos, and samples are images',
    ),
    (
        [*VIDEOS, "extract.output=frames", "extract.layers=[-1]"],
        "extract.layers",
        "what is read of frames beside the output is what model.encoder.intermediate_names",
    ),
    (
        [*VIDEOS, "extract.output=frames", "extract.use_eval_transform_for_train=false"],
        "extract.use_eval_transform_for_train",
        "false draws clips, all frames are read",
    ),
    (
        ["infer.heat_maps=2", "infer.checkpoint=['a.pt', 'b.pt']"],
        "infer.heat_maps",
        "infer names 2: name one",
    ),
    (
        [*VOLUMES, *WINDOWS, "data.augmentation.evaluation=windows"],
        "data.augmentation.evaluation",
        "leave one of them out",
    ),
    (
        [*VOLUMES, *WINDOWS, "data.augmentation.patch_size=[9, 7, 9]"],
        "model.encoder.windows.size",
        "is more than the [9, 7, 9] voxels",
    ),
    (
        [*VOLUMES, *WINDOWS, "model.encoder.windows.stride=[8, 9, 8]"],
        "model.encoder.windows.stride",
        "leaves voxels out",
    ),
    (
        [*VOLUMES, "model.encoder.lift=windows"],
        "model.encoder.windows.size",
        "name theirs, as [64, 64, 64]",
    ),
    (
        [*VOLUMES, "model.encoder.windows.size=[8, 8, 8]"],
        "model.encoder.windows",
        'would be ignored, it is read only with model.encoder.lift = "windows"',
    ),
    (
        [*RESIDUAL, "model.encoder.spatial_dim=2", "model.encoder.array_order=zyx"],
        "model.encoder.array_order",
        "spatial_dim = 2 takes images",
    ),
    (
        [*VIDEOS, *RESIDUAL[-1:], "model.encoder.array_order=zyx"],
        "model.encoder.array_order",
        "it is of volumes, and the samples are videos: leave it out",
    ),
    (
        ["model.encoder.encoder_type=residual_encoder", "model.encoder.spatial_dim=2", *WINDOWS],
        "model.encoder.lift",
        "spatial_dim = 2 takes images: leave it out",
    ),
    (
        [*VOLUMES[:1], *VOLUMES[3:], *WINDOWS],
        "model.encoder.lift",
        '"timm" is one of images: set it to "slices", or encoder_type',
    ),
    (["name=../x"], "name", "cannot name a directory"),
    (
        ["training.cache_frozen_features=true"],
        "training.cache_frozen_features",
        'the encoder trains with peft.method = "full_finetuning"',
    ),
    (["name=.."], "name", "cannot name a directory"),
    # data
    ([*GENERIC, "data.task=Regression", "data.subtask=multilabel"], "data.subtask", "contradicts"),
    (
        [*FOLDER, "data.subtask=multilabel"],
        "data.label_source",
        '"folder" gives each sample one class, not multilabel',
    ),
    ([*CSV, "data.label_column=['a','b']"], "data.label_column", "multiclass reads one"),
    ([*MULTILABEL, "data.label_column=['a','a']"], "data.label_column", "different columns"),
    ([*FOLDER, "data.num_classes=3", "data.class_names=['a','b']"], "data.class_names", "says 3"),
    (
        [*MULTILABEL, "data.num_classes=3", "data.label_column=['a','b']"],
        "data.label_column",
        "2 entries, but data.num_classes says 3",
    ),
    ([*REGRESSION, "data.num_classes=2"], "data.label_column", "1 entries"),
    ([*FOLDER, "data.class_names=['a','b','a']"], "data.class_names", '["a"] given more than once'),
    ([*KFOLD, "data.fold=5"], "data.fold", "5 does not exist: 0 to 4"),
    ([*FOLDER, "data.fold=1"], "data.fold", "0 only"),
    ([*KFOLD, "data.fold=site_b"], "data.fold", '"site_b" does not exist: 0 to 4'),
    (["data.fold=site_b"], "data.fold", "this data set has one split"),
    ([*GENERIC, 'data.fold="1"'], "data.fold", "write it without quotes"),
    ([*GENERIC, "data.fold=a/b"], "data.fold", "cannot name the directory"),
    ([*KFOLD, 'infer.folds=[0, "b"]'], "infer.folds", '["b"] do not exist'),
    (["data.fold=1"], "data.fold", "this data set has one split"),
    (["data.dataset=cifar10", "data.fold=1"], "data.fold", "this data set has one split"),
    (["data.val_fraction=0.5", "data.test_fraction=0.5"], "data.val_fraction", "below 1"),
    ([*FOLDER, "data.val_split_name=train"], "data.train_split_name", "trained on and evaluated"),
    ([*FOLDER, "data.split_source=csv"], "data.split_source", 'needs data.label_source = "csv"'),
    ([*CSV, "data.split_source=csv", "data.fold=1"], "data.fold", "0 only"),
    (FEATURES[:2], "model.encoder.encoder_type", 'set it to "precomputed"'),
    (SERIES, "data.train_file", "data.problem of an archive"),
    (
        [*SERIES_MODEL, "model.encoder.encoder_type=transformer_1d", "model.encoder.width=20"],
        "model.encoder.width",
        "must be a multiple of twice",
    ),
    ([*SERIES_MODEL, "model.encoder.encoder_type=timm"], "model.encoder.encoder_type", "fold"),
    ([*SERIES, "data.split_source=kfold"], "data.series_file", "one file or folder"),
    ([*SERIES, "data.problem=A", *SERIES_FOLDS[-2:]], "data.problem", "has a file a split"),
    ([*SERIES_FILE, "data.problem=A"], "data.train_file", "names it"),
    ([*SERIES_FILE, "data.resample=3"], "data.resample", "draws train and test anew"),
    (
        [*SERIES_FILE, "data.val_file=v.ts", "data.val_fraction=0.1"],
        "data.val_fraction",
        "data.val_file names val",
    ),
    ([*SERIES_FILE, 'task.methods=["knn"]'], "task.methods", "cannot judge series"),
    ([*PROBE, 'task.methods=["hydra"]'], "task.methods", "cannot judge features"),
    (
        [SERIES[0], "data.train_file=t.ts", *CUSTOM_ENCODER, "task.cutmix=true"],
        "task.cutmix",
        "mixes images",
    ),
    ([FEATURES[0], FEATURES[2]], "data.train_features_file", "no feature file is named"),
    (
        [FEATURES[0], FEATURES[2], "data.split_source=kfold"],
        "data.features_file",
        '"kfold" divides the samples of one file or folder',
    ),
    ([*FOLDS_OF_FEATURES, "data.split_source=csv"], "data.labels_file", "reads its split_column"),
    (FEATURES[2:], "model.encoder.encoder_type", '"precomputed" takes features'),
    (
        [*FEATURES, "data.subtask=regression", "model.head.head_type=clam", INSTANCES],
        "model.head.instance_eval",
        "this is a regression",
    ),
    (
        [*FEATURES, "model.head.head_type=transmil", "model.head.heads=7"],
        "model.head.heads",
        "7 heads cannot share model.head.hidden = 512",
    ),
    (
        [*FEATURES, "model.head.head_type=temporal_transformer", "model.head.heads=7"],
        "model.head.heads",
        "model.head.hidden = 128 must be even and a multiple of the 7 heads",
    ),
    (
        [*VIDEOS, "model.encoder.encoder_type=torchvision_video", "model.encoder.time_axis=x"],
        "model.encoder.time_axis",
        '"x" is no axis of videos, which have "t"',
    ),
    (
        [
            *VIDEOS,
            "model.encoder.encoder_type=timm",
            "model.encoder.lift=slices",
            "model.encoder.slices.axis=z",
        ],
        "model.encoder.slices.axis",
        '"z" is no axis of videos',
    ),
    (
        [*VIDEOS, "model.encoder.encoder_type=timm"],
        "model.encoder.encoder_type",
        'e.g. "torchvision_video", or set model.encoder.lift = "slices"',
    ),
    (
        [VOLUMES[0], VOLUMES[3], *VIDEOS[3:], "model.encoder.type=mvit_v2_s"],
        "model.encoder.encoder_type",
        '"torchvision_video" takes videos, and the samples are volumes',
    ),
    (
        [*VIDEOS, "model.encoder.encoder_type=pytorchvideo", "model.encoder.pathway_mode=slowfast"],
        "model.encoder.pathway_mode",
        'x3d_s takes "single": leave it out',
    ),
    (
        [
            *VIDEOS,
            "model.encoder.encoder_type=pytorchvideo",
            "model.encoder.model_kwargs={input_channel=1}",
        ],
        "model.encoder.model_kwargs.input_channel",
        "it comes from the data",
    ),
    (
        [*VIDEOS, "model.encoder.encoder_type=transformer", "model.encoder.lift=inflate"],
        "model.encoder.lift",
        '"inflate" gives kernels an axis, which a forward pass of transformers does not take',
    ),
    (
        ["model.encoder.encoder_type=transformer", "data.augmentation.patch_size=8"],
        "data.augmentation.patch_size",
        "weights are those of patches of their own size",
    ),
    (
        [
            "model.encoder.encoder_type=transformer",
            "model.encoder.pretrained=false",
            "data.augmentation.image_size=32",
            "data.augmentation.patch_size=5",
        ],
        "data.augmentation.patch_size",
        "an image of 32 pixels is no whole number of patches of 5",
    ),
    (
        ["model.encoder.slices.count=3"],
        "model.encoder.slices",
        'it would be ignored, it is read only with model.encoder.lift = "slices"',
    ),
    ([*FOLDER, "data.allowed_exts=[]"], "data.allowed_exts", "name one suffix at least"),
    (
        ["data.augmentation.image_size=64", "data.augmentation.resize_size=32"],
        "data.augmentation.resize_size",
        "at least 64",
    ),
    (
        [*VOLUMES, 'data.augmentation.mirror_axes=["x", "x"]'],
        "data.augmentation.mirror_axes",
        "names an axis twice",
    ),
    (
        [*VOLUMES, f"{TRAIN_KWARGS}.gamma_p=0.0", f"{TRAIN_KWARGS}.gamma=[0.5, 2.0]"],
        f"{TRAIN_KWARGS}.gamma",
        "[0.5, 2.0] would be ignored, it is read only with gamma_p above 0",
    ),
    *(
        (
            [*VOLUMES, f"data.augmentation.test_kwargs.{key}={value}"],
            f"data.augmentation.test_kwargs.{key}",
            'is random, and evaluation is deterministic; valid there are crop = "center"',
        )
        for key, value in {"mirror_p": 0.5, "crop": '"random"'}.items()
    ),
    (
        [f"{TRAIN_KWARGS}.crop=resized", f"{TRAIN_KWARGS}.scale=[1.0, 0.5]"],
        "data.augmentation.train_kwargs.scale",
        "write [0.5, 1.0]",
    ),
    (
        [f"{TRAIN_KWARGS}.rotate_degrees=10"],
        f"{TRAIN_KWARGS}.rotate_degrees",
        "10.0 would be ignored, it is read only with rotate_p above 0",
    ),
    (
        [f"{TRAIN_KWARGS}.blur_p=0.5", f"{TRAIN_KWARGS}.blur_kernel=[3, 4]"],
        f"{TRAIN_KWARGS}.blur_kernel",
        "odd",
    ),
    *(
        (
            [f"data.augmentation.test_kwargs.{key}={value}"],
            f"data.augmentation.test_kwargs.{key}",
            f"{value} is random, and evaluation is deterministic",
        )
        for key, value in {
            "hflip_p": 0.5,
            "crop": '"resized"',
            "randaugment_ops": 1,
            "cutout_size": 4,
        }.items()
    ),
    # head and metrics
    ([*CSV, "data.subtask=regression"], "model.head.head_type", 'set it to "regression"'),
    (["model.head.head_type=regression"], "model.head.head_type", 'set it to "classification"'),
    ([*REGRESSION, "model.head.out_dim=2"], "model.head.out_dim", "data.label_column says 1"),
    (["task.metrics=[]"], "task.metrics", "names none"),
    ([*FEATURES, "task.objective=probe", "task.k=[]"], "task.k", "names none"),
    ([*FEATURES, "task.objective=probe", "task.l2=[]"], "task.l2", "names none"),
    ([*FEATURES, "task.objective=probe", "task.methods=[]"], "task.methods", "names none"),
    ([*FEATURES, "task.cutmix=true"], "task.cutmix", "the samples are features"),
    (["task.metrics=['acc','acc']"], "task.metrics", "2 times"),
    (["task.metrics=['mse']"], "task.metrics", '"mse" is not defined for multiclass'),
    ([*REGRESSION, "task.metrics=['acc']"], "task.metrics", "not defined for regression"),
    ([*MULTILABEL, "task.metrics=['top5acc']"], "task.metrics", "not defined for multilabel"),
    (
        ["training.best_checkpoint_metric=f11"],
        "training.best_checkpoint_metric",
        "did you mean val_f1?",
    ),
    (
        ["training.best_checkpoint_metric=val_auroc"],
        "training.best_checkpoint_metric",
        'add "auroc" to task.metrics',
    ),
    (
        ["training.best_checkpoint_metric=test_f1"],
        "training.best_checkpoint_metric",
        'no metric is logged as "test_f1"; did you mean val_f1?',
    ),
    (["task.class_weights=[1, 2]"], "task.class_weights", "says 10 classes"),
    ([*REGRESSION, "task.mixup=true"], "task.mixup", "this is a regression"),
    ([*REGRESSION, "task.cutmix=true"], "task.cutmix", "this is a regression"),
    ([*REGRESSION, "task.label_smoothing=0.1"], "task.label_smoothing", "this is a regression"),
    ([*REGRESSION, "task.class_weights=balanced"], "task.class_weights", "this is a regression"),
    (
        [*CUSTOM, "model.head.head_type=regression", "task.mixup=true"],
        "task.mixup",
        "this is a regression",
    ),
    # encoder
    (
        ["data.dataset=cifar10", "model.encoder.input_channels=1"],
        "model.encoder.input_channels",
        "3 channels",
    ),
    (
        ["data.augmentation.mean=[0.5, 0.5, 0.5]"],
        "data.augmentation.mean",
        "3 numbers, but the images have 1 channels",
    ),
    (
        ["data.dataset=cifar10", "data.augmentation.std=[0.5]"],
        "data.augmentation.std",
        "1 numbers",
    ),
    (
        ["model.encoder.model_kwargs.in_chans=1"],
        "model.encoder.model_kwargs.in_chans",
        "model.encoder.input_channels",
    ),
    (
        ["model.encoder.model_kwargs.features_only=true"],
        "model.encoder.model_kwargs.features_only",
        'mode = "extract" with extract.output = "map" and extract.layers',
    ),
    (
        ["model.encoder.model_kwargs.img_size=64"],
        "model.encoder.model_kwargs.img_size",
        "data.augmentation.image_size",
    ),
    (
        [*VOLUMES[:1], *VOLUMES[3:], *SLICED, "model.encoder.model_kwargs.img_size=64"],
        "model.encoder.model_kwargs.img_size",
        "it comes from model.encoder.slices.size: set it there",
    ),
    (
        ["model.encoder.encoder_type=torchvision", "model.encoder.model_kwargs.weights=x"],
        "model.encoder.model_kwargs.weights",
        "model.encoder.weights",
    ),
    (
        ["model.encoder.type=resnet18.a1_in1k", "model.feature_aggregation_method=joint"],
        "model.feature_aggregation_method",
        "needs a class token",
    ),
    (
        [
            "model.encoder.encoder_type=torchvision",
            "model.encoder.type=swin_t",
            "model.feature_aggregation_method=cls_token",
        ],
        "model.feature_aggregation_method",
        "swin_t does not have",
    ),
    (
        ["model.head.head_type=clam", "model.feature_aggregation_method=avg"],
        "model.feature_aggregation_method",
        "unread with this head",
    ),
    (
        [*FEATURES, "model.feature_aggregation_method=avg"],
        "model.feature_aggregation_method",
        "unread with precomputed features",
    ),
    (
        ["mode=infer", "training.enable_checkpointing=false"],
        "training.enable_checkpointing",
        "keeps no model for mode infer",
    ),
    ([*SERIES_FILE, "mode=umap"], "mode", "umap reads a model out, and a probe keeps none"),
    ([*SERIES_FILE, "mode=extract"], "mode", "extract reads a model out, and a probe keeps none"),
    (
        [*SERIES_FILE, "data.augmentation.train_policy=default_series_2"],
        "data.augmentation.train_policy",
        "would be ignored, a probe augments nothing",
    ),
    (
        ["mode=extract", "training.enable_checkpointing=false"],
        "training.enable_checkpointing",
        "keeps no model for mode extract",
    ),
    (
        [*FEATURES, "model.head.head_type=dsmil", "task.mixup=true"],
        "task.mixup",
        "no one vector a bag",
    ),
    (
        [*FEATURES, "model.head.head_type=abmil", "task.mixup=true", "training.compile=true"],
        "task.mixup",
        "not compiled",
    ),
    ([*FEATURES, "task.cutmix=true"], "task.cutmix", "it mixes images"),
    (
        ["task.metrics=['f1_per_class']", "training.best_checkpoint_metric=val_f1_per_class_99"],
        "training.best_checkpoint_metric",
        "val_f1_per_class_9",
    ),
    (
        ["data.dataset=cifar10", "training.best_checkpoint_metric=F1_class_0"],
        "training.best_checkpoint_metric",
        'set it to "val_f1_per_class_airplane" and add',
    ),
    (
        ["data.dataset=cifar100", "training.best_checkpoint_metric=F1_class_8"],
        "training.best_checkpoint_metric",
        'set it to "val_f1_per_class_bicycle" and add',
    ),
    *(
        (["data.augmentation.patch_size=8", *more], "data.augmentation.patch_size", said)
        for more, said in (
            (["model.encoder.type=resnet18"], "no patch embedding of an asked size in resnet18"),
            (["model.encoder.type=convnext_tiny"], "an asked size in convnext_tiny: leave it out"),
            (["model.encoder.type=mixer_b16_224"], "an asked size in mixer_b16_224: leave it out"),
            (["model.encoder.encoder_type=torchvision"], '"torchvision" has no patch embedding'),
            (["model.encoder.model_kwargs={patch_size=4}"], "model_kwargs.patch_size = 4: leave"),
            (["data.augmentation.image_size=20"], "20 pixels is no whole number of patches of 8"),
            (["data.augmentation.patch_size=[8, 4, 2]"], "[8, 4, 2] are 3 numbers: give one"),
        )
    ),
    (
        ["data.augmentation.crop_size=40", "data.augmentation.resize_size=30"],
        "data.augmentation.resize_size",
        "30 pixels are too few for the crop of crop_size = 40",
    ),
    (
        ["data.augmentation.crop_size=40", "data.augmentation.crop_mode=squash"],
        "data.augmentation.crop_size",
        "whose shape stays",
    ),
    (
        [
            "data.augmentation.crop_size=40",
            "data.augmentation.test_kwargs.crop=none",
            "data.augmentation.train_kwargs.crop=resized",
        ],
        "data.augmentation.crop_size",
        "the policies crop resized and none, which reads no crop_size",
    ),  # fmt: skip
    (["data.dataset=custom", "data.target=a.b.c"], "data.target", "package.module:function"),
    (
        ["model.head.head_type=custom", "model.head.target=:f"],
        "model.head.target",
        "package.module:function",
    ),
    # peft
    ([*FEATURES, "peft.method=lora"], "peft.method", "precomputed features have none"),
    (["peft.method=lora", "peft.targets=[]"], "peft.targets", "names none"),
    (["peft.method=lora", "peft.targets=['a[']"], "peft.targets", "no regular expression"),
    (
        ["peft.method=loha", "peft.rank_pattern={'(' = 2}"],
        "peft.rank_pattern",
        "no regular expression",
    ),
    (["peft.method=adalora", "peft.rank=13"], "peft.rank", "above peft.init_rank = 12"),
    (["peft.method=adalora", "peft.tinit=0.8"], "peft.tinit", "must be below 1"),
    (["peft.method=rep_adapter", "peft.groups=3"], "peft.groups", "must divide"),
    (
        ["peft.method=boft", "peft.n_butterfly=2", "peft.block_size=5"],
        "peft.block_size",
        "must be even",
    ),
    (["peft.method=convpass", "peft.places=[]"], "peft.places", "each once"),
    (["peft.method=convpass", "infer.merge=true"], "infer.merge", "does not merge"),
    (["peft.method=lokr", "peft.decompose_factor=0"], "peft.decompose_factor", "no size"),
    (["infer.export=merged.pth"], "infer.export", '"merged.pth" must end in ".safetensors"'),
    (
        ["infer.export=x.safetensors", "infer.checkpoint=['a.pt', 'b.pt']"],
        "infer.export",
        "infer names 2",
    ),
    (
        [*KFOLD, "infer.export=x.safetensors", "infer.folds=[0, 1, 2]"],
        "infer.export",
        "infer names 3",
    ),
    # volumes
    ([*VOLUMES, "data.path_column=[]"], "data.path_column", "must name different ones"),
    ([*VIDEOS, "data.path_column=['a', 'b']"], "data.path_column", "files of volumes are joined"),
    (
        [*VIDEOS, "data.sampling.stride=2", "data.sampling.fps=5"],
        "data.sampling.fps",
        "says it too: drop one of them",
    ),
    ([*VOLUMES, "data.path_suffix=['a', 'a']"], "data.path_suffix", "must name different ones"),
    (
        [*VOLUMES, "data.path_column=['a', 'b']", "data.path_suffix=['c', 'd']"],
        "data.path_suffix",
        "with several path columns, one at most",
    ),
    (
        [*VOLUMES, "data.path_column=['a', 'b']", "data.reading.series=['A=1', 'A=2', 'A=3']"],
        "data.reading.series",
        "3 conditions for 2 files",
    ),
    ([*VOLUMES, "data.reading.series=['t1']"], "data.reading.series", "must read"),
    (
        [*VOLUMES, "data.channels=3", f"{PREPARATION}.normalize=['none', 'minmax']"],
        f"{PREPARATION}.normalize",
        "2 entries for 3 channels",
    ),
    ([*VOLUMES, f"{PREPARATION}.normalize=[]"], f"{PREPARATION}.normalize", "no normalisation"),
    (
        [*VOLUMES, f"{PREPARATION}.normalize=percentile", f"{PREPARATION}.percentiles=[9, 1]"],
        f"{PREPARATION}.percentiles",
        "must ascend",
    ),
    (
        [*VOLUMES, f"{PREPARATION}.normalize=ct_window", f"{PREPARATION}.ct_windows=[]"],
        f"{PREPARATION}.ct_windows",
        "has no window",
    ),
    # training
    (
        ["training.epochs=5", "optimizer.warmup_epochs=6"],
        "optimizer.warmup_epochs",
        "longer than the training",
    ),
    (["optimizer.lr=0.1", "optimizer.min_lr=0.2"], "optimizer.min_lr", "above optimizer.lr"),
    (
        ["optimizer.name=SGD", "optimizer.momentum=0", "optimizer.nesterov=true"],
        "optimizer.nesterov",
        "needs optimizer.momentum above 0",
    ),
    # infer
    ([*KFOLD, "infer.folds=[0]", "infer.checkpoint=x.pt"], "infer.folds", "drop one"),
    (["infer.split=val", "infer.input=x"], "infer.split", "replaced by infer.input"),
    (["infer.checkpoint=[]"], "infer.checkpoint", "names none"),
    ([*KFOLD, "infer.folds=[]"], "infer.folds", "names none"),
    ([*KFOLD, "infer.folds=[1, 1]"], "infer.folds", "twice"),
    ([*KFOLD, "infer.folds=[0, 7]"], "infer.folds", "[7] do not exist"),
    # encoders of volumes
    (
        ["model.encoder.encoder_type=primus"],
        "model.encoder.encoder_type",
        '"primus" takes volumes, and the samples are images: set data.dataset to'
        ' "generic_3d_dataset" or "custom_3d_dataset", or name an encoder for images',
    ),
    (
        [VOLUMES[0], VOLUMES[-1], RESIDUAL[-1], "model.encoder.spatial_dim=2"],
        "model.encoder.spatial_dim",
        "2 takes images, and the samples are volumes: set model.encoder.spatial_dim = 3",
    ),
    (
        [*VIDEOS, RESIDUAL[-1], "model.encoder.spatial_dim=2"],
        "model.encoder.spatial_dim",
        "2 takes images, and the samples are videos: set model.encoder.spatial_dim = 3",
    ),
    (
        ["model.encoder.encoder_type=residual_encoder"],
        "model.encoder.spatial_dim",
        '3 takes volumes, and the samples are images: set data.dataset to "generic_3d_dataset" or'
        ' "custom_3d_dataset", or set model.encoder.spatial_dim = 2',
    ),
    ([*RESIDUAL, "model.encoder.strides=[1, 2]"], "model.encoder.strides", "2 entries, but"),
    (
        [*RESIDUAL, "model.encoder.kernel_sizes=[[1, 3], 3, 3, 3, 3, 3]"],
        "model.encoder.kernel_sizes",
        "a number, or 3 for each stage, one per axis",
    ),
    ([*RESIDUAL, "model.encoder.kernel_sizes=4"], "model.encoder.kernel_sizes", "4 is even"),
    (
        [
            *RESIDUAL,
            "model.encoder.features_per_stage=[]",
            "model.encoder.strides=[]",
            "model.encoder.n_blocks_per_stage=1",
        ],
        "model.encoder.features_per_stage",
        "one stage at least",
    ),
    (
        [*RESIDUAL, "model.encoder.block_type=bottleneck"],
        "model.encoder.bottleneck_channels",
        '"bottleneck" needs them',
    ),
    (
        [*PRIMUS, "model.encoder.input_shape=[64, 60, 64]"],
        "model.encoder.input_shape",
        "[64, 60, 64] is no whole number of tokens of [8, 8, 8] voxels; nearest [64, 64, 64]",
    ),
    # extract
    (["extract.source=encoder", "extract.checkpoint=x.pt"], "extract.source", "drop one"),
    (["extract.bag_by=group", "extract.output=map"], "extract.bag_by", "one vector a sample"),
    # umap
    (["umap.input=t.h5", "umap.split=val"], "umap.split", "split of the spec's own data"),
    (["umap.color_by=column"], "umap.color_by", "needs umap.color_file"),
    (["umap.color_file=x.csv"], "umap.color_column", "name the column"),
    ([*FEATURES, "umap.color_by=prediction"], "umap.color_by", "feature files hold none"),
]

IGNORED = [
    ([*VIDEOS, "model.encoder.intermediate_names=['stem']"], "model.encoder.intermediate_names"),
    (
        [*VIDEOS[:3], "model.encoder.encoder_type=pytorchvideo", "model.encoder.slowfast_alpha=8"],
        "model.encoder.slowfast_alpha",
    ),
    (["extract.compression_level=4"], "extract.compression_level"),
    (["training.enable_checkpointing=false", "training.save_every=2"], "training.save_every"),
    (
        ["training.enable_checkpointing=false", "training.save_every_steps=2"],
        "training.save_every_steps",
    ),
    (["infer.attention=false", "infer.attention_maps=3"], "infer.attention_maps"),
    (["extract.norm=false"], "extract.norm"),
    (["extract.prefix_tokens=true"], "extract.prefix_tokens"),
    (["extract.output=map", "extract.method=avg"], "extract.method"),
    (["extract.coords_file=x.csv"], "extract.coords_file"),
    (["extract.source=encoder", "extract.use=last"], "extract.use"),
    ([*FOLDER, "data.split_file=x.json"], "data.split_file"),
    ([*FOLDER, "data.n_folds=4"], "data.n_folds"),
    ([*KFOLD, "data.train_split_name=x"], "data.train_split_name"),
    ([*KFOLD, "data.val_split_name=x"], "data.val_split_name"),
    ([*KFOLD, "data.test_split_name=x"], "data.test_split_name"),
    ([*FOLDER, "data.labels_file=x.csv"], "data.labels_file"),
    ([*FOLDER, "data.path_column=x"], "data.path_column"),
    ([*GENERIC, "data.label_column=x"], "data.label_column"),
    ([*GENERIC, "data.group_column=x"], "data.group_column"),
    ([*CSV, "data.label_separator=;"], "data.label_separator"),
    ([*CSV, "data.split_column=x"], "data.split_column"),
    ([*FEATURES, "data.id_column=x"], "data.id_column"),
    *(
        ([*SERIES_FOLDS, f"data.{key}={value}"], f"data.{key}")
        for key, value in {
            "train_file": "a.ts",
            "val_file": "a.ts",
            "test_file": "a.ts",
            "val_fraction": "0.1",
            "resample": "1",
        }.items()
    ),
    ([*SERIES_FILE, "data.series_file=a.ts"], "data.series_file"),
    *(
        ([*VIDEOS, *more, f"data.sampling.{key}={value}"], f"data.sampling.{key}")
        for more, key, value in (
            (["data.sampling.method=uniform"], "stride", "2"),
            (["data.sampling.method=uniform"], "fps", "5"),
            ([], "combine", "probabilities"),
            ([], "chunk", "2"),
        )
    ),
    *(
        ([*VIDEOS, f"data.frames.{key}={value}"], f"data.frames.{key}")
        for key, value in {
            "labels_file": "a.csv",
            "frame_column": "n",
            "start_column": "first",
            "end_column": "last",
            "unit": "seconds",
            "unlabelled": "['x']",
        }.items()
    ),
    ([*PROBE, "task.alphas=[1]"], "task.alphas"),
    *(
        ([*VOLUMES, f"{PREPARATION}.{key}={value}"], f"{PREPARATION}.{key}")
        for key, value in {
            "interpolation": "cubic",
            "antialias": "false",
            "anisotropy": "2",
            "crop_margin": "5",
            "ct_windows": "[[0, 100]]",
            "percentiles": "[1, 99]",
        }.items()
    ),
    (
        [*VOLUMES, f"{PREPARATION}.normalize=none", f"{PREPARATION}.statistics=foreground"],
        f"{PREPARATION}.statistics",
    ),
    (["model.encoder.weights_order=true"], "model.encoder.weights_order"),
    (["model.encoder.weights_key=ema"], "model.encoder.weights_key"),
    ([*RESIDUAL, "model.encoder.bottleneck_channels=2"], "model.encoder.bottleneck_channels"),
    (
        [*RESIDUAL, "model.encoder.squeeze_excitation_reduction_ratio=0.5"],
        "model.encoder.squeeze_excitation_reduction_ratio",
    ),
    ([*PRIMUS, "model.encoder.weights_shape=[8, 8, 8]"], "model.encoder.weights_shape"),
    ([*CLAM, "model.head.k_sample=4"], "model.head.k_sample"),
    ([*CLAM, "model.head.subtyping=true"], "model.head.subtyping"),
    ([*CLAM, "model.head.instance_loss=svm"], "model.head.instance_loss"),
    ([*CLAM, "model.head.instance_loss_weight=2"], "model.head.instance_loss_weight"),
    (
        [*CLAM, "model.head.feature_prep=false", "model.head.l2_normalize_features=false"],
        "model.head.l2_normalize_features",
    ),
    (
        [*CLAM, "model.head.feature_prep=false", "model.head.layer_norm_eps=1e-5"],
        "model.head.layer_norm_eps",
    ),
    (
        [*CLAM, "model.head.cosine_head=false", "model.head.cosine_scale=5"],
        "model.head.cosine_scale",
    ),
    ([*CLAM, "model.head.bag_weight=0.7"], "model.head.bag_weight"),
    ([*CLAM, "model.head.topk_k=4"], "model.head.topk_k"),
    ([*CLAM, "model.head.topk_tau=4"], "model.head.topk_tau"),
    ([*CLAM, "model.head.topk_noise_std=4"], "model.head.topk_noise_std"),
    ([*CLAM, "model.head.topk_consistency_weight=4"], "model.head.topk_consistency_weight"),
    ([*FEATURES, "data.features_file=x.h5"], "data.features_file"),
    *(
        ([*FOLDS_OF_FEATURES, "data.split_source=kfold", f"{key}=x.h5"], key)
        for key in (f"data.{split}_features_file" for split in ("train", "val", "test"))
    ),
    ([*FEATURES, "data.labels_file=x.csv", "data.labels_key=y"], "data.labels_key"),
    (["task.mixup_alpha=0.5"], "task.mixup_alpha"),
    (["task.cutmix_alpha=0.5"], "task.cutmix_alpha"),
    (["task.regression_loss=mae"], "task.regression_loss"),
    (["task.standardize_targets=false"], "task.standardize_targets"),
    (["training.early_stopping_min_delta=0.1"], "training.early_stopping_min_delta"),
    (["dataloading.num_workers=0", "dataloading.prefetch_factor=4"], "dataloading.prefetch_factor"),
    (
        ["dataloading.num_workers=0", "dataloading.persistent_workers=false"],
        "dataloading.persistent_workers",
    ),
    (["dataloading.num_workers=0", "dataloading.timeout=4"], "dataloading.timeout"),
    *(
        ([*PROBE, f"task.methods=['{method}']", f"task.{name}={value}"], f"task.{name}")
        for method, name, value in (
            ("linear", "k", "[3]"),
            ("linear", "distance", "euclidean"),
            ("linear", "temperature", "0.5"),
            ("knn", "l2", "[0.5]"),
            ("knn", "standardize", "false"),
            ("knn", "max_iterations", "5"),
        )
    ),
    ([*FEATURES, "optimizer.layer_wise_lr_decay=0.5"], "optimizer.layer_wise_lr_decay"),
    (["optimizer.weight_decay=0", "optimizer.undecay_norm=true"], "optimizer.undecay_norm"),
    (["optimizer.momentum=0.5"], "optimizer.momentum"),
    (["optimizer.nesterov=true"], "optimizer.nesterov"),
    (["optimizer.name=SGD", "optimizer.betas=[0.5, 0.9]"], "optimizer.betas"),
    (["optimizer.gamma=0.5"], "optimizer.gamma"),
    (["optimizer.scheduler=Step", "optimizer.min_lr=1e-6"], "optimizer.min_lr"),
    (
        ["peft.method=linear_probing", "optimizer.layer_wise_lr_decay=0.5"],
        "optimizer.layer_wise_lr_decay",
    ),
    (["infer.checkpoint=x.pt", "infer.use=last"], "infer.use"),
    (["infer.heat_map_class=a"], "infer.heat_map_class"),
    (["model.encoder.weights_key=ema"], "model.encoder.weights_key"),
    (
        [
            *(*VOLUMES, *WINDOWS, "model.encoder.windows.stride=[2, 2, 2]"),
            "model.encoder.windows.overlap=0.75",
        ],
        "model.encoder.windows.overlap",
    ),
    ([*VOLUMES, "data.augmentation.window_overlap=0.1"], "data.augmentation.window_overlap"),
    ([*VOLUMES, "data.augmentation.window_reduce=max"], "data.augmentation.window_reduce"),
    ([*VOLUMES, "data.augmentation.window_chunk=3"], "data.augmentation.window_chunk"),
    (
        ["peft.method=visual_prompt_tuning", "peft.deep=false", "peft.deep_layers=2"],
        "peft.deep_layers",
    ),
    (["peft.method=oft", "peft.eps=1e-3"], "peft.eps"),
    (["umap.method=pca", "umap.min_dist=0.2"], "umap.min_dist"),
    (["umap.perplexity=20"], "umap.perplexity"),
    (["umap.method=pca", "umap.pca=5"], "umap.pca"),
    (["umap.bags=instances"], "umap.bags"),
    (["umap.color_column=x"], "umap.color_column"),
]

SOUND = [
    [],
    [*VOLUMES, *WINDOWS, "infer.volume_maps=true", "data.augmentation.patch_size=[8, 8, 9]"],
    [*VOLUMES, "data.augmentation.evaluation=windows", "data.augmentation.window_reduce=max"],
    ["data.fold=3", *GENERIC],  # a split file may list folds
    ["data.fold=site_b", 'infer.folds=["site_a", "site b"]', *GENERIC],
    [*KFOLD, "data.fold=4", "data.n_folds=7"],
    [*GENERIC, "data.label_source=json", "data.class_names=['a','b']", "data.num_classes=2"],
    [*MULTILABEL, "data.label_separator=;"],
    [*MULTILABEL, "data.label_column=['a','b']", "task.mixup=true", "task.label_smoothing=0.1"],
    [
        *REGRESSION,
        "data.label_column=['a','b']",
        "model.head.out_dim=2",
        "task.regression_loss=mae",
    ],
    [*REGRESSION, "training.best_checkpoint_metric=val_mse"],
    ["training.best_checkpoint_metric=val_loss"],
    ["training.best_checkpoint_metric=val_f1"],
    ["task.metrics=['f1_per_class']", "training.best_checkpoint_metric=val_f1_per_class_3"],
    ["data.augmentation.patch_size=8", "model.encoder.model_kwargs={patch_size=[8, 8]}"],
    ["data.augmentation.patch_size=[8, 4]", "data.augmentation.image_size=40"],
    [*CUSTOM, "task.metrics=['mse']", "training.best_checkpoint_metric=val_mse"],
    ["model.feature_aggregation_method=joint"],  # of the default ViT
    ["model.encoder.weights=x.pth", "model.encoder.weights_order=true"],
    ["optimizer.warmup_epochs=20"],
    ["optimizer.name=SGD", "optimizer.nesterov=true"],
    [*KFOLD, "infer.folds=[0, 1, 4]"],
    ["data.dataset=cifar100", "data.augmentation.mean=[0.5, 0.5, 0.5]"],
    [f"{TRAIN_KWARGS}.crop=resized", f"{TRAIN_KWARGS}.scale=[0.5, 0.5]"],
    ["name=my run (2)"],
    [*FOLDER, "data.val_split_name=test"],  # one split is both
    VOLUMES,
    [*VOLUMES, "data.path_column=['a', 'b']", "data.reading.series=['A=1', 'B=2 & C=3*']"],
    [
        *VOLUMES,
        f"{PREPARATION}.normalize=['zscore', 'ct_window']",
        f"{PREPARATION}.ct_windows=[[9, 9]]",
    ],
    [*CSV, "data.split_source=csv", "data.split_column=x"],
    [*CLAM, INSTANCES, "model.head.k_sample=4"],
    [*FEATURES, "data.labels_file=x.csv", "data.id_column=x", "data.label_column=['a', 'b']"],
    [*FOLDS_OF_FEATURES, "data.split_source=csv", "data.labels_file=x.csv"],
    [*FOLDS_OF_FEATURES, "data.split_source=kfold", "data.fold=4"],
    [FEATURES[0], FEATURES[2], "mode=umap", "umap.input=t.h5"],  # names the datasets of t.h5
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The root Struct of overrides over the defaults."""
    path = tmp_path_factory.mktemp("specs") / "empty.toml"
    path.touch()
    return lambda overrides: load_spec(path, overrides, Root).root


def keys_of(lines):
    """Keys that the lines open with."""
    return [line.partition(": ")[0] for line in lines]


@pytest.mark.parametrize(("overrides", "key", "part"), BROKEN)
def test_a_broken_rule_is_one_line_that_opens_with_its_key(root, overrides, key, part):
    lines = check(root(overrides))
    assert keys_of(lines) == [key], lines
    assert part in lines[0]


@pytest.mark.parametrize(("overrides", "key"), IGNORED)
def test_an_option_that_nothing_reads_is_an_error(root, overrides, key):
    lines = check(root(overrides))
    assert keys_of(lines) == [key], lines
    assert "would be ignored, it is read only with " in lines[0]


@pytest.mark.parametrize("overrides", SOUND)
def test_sound_specs_break_no_rule(root, overrides):
    assert check(root(overrides)) == []


def test_every_union_member_can_be_checked(root):
    """Rules ask no section for a field that it does not have."""
    kind = inspect_types.type_info(Root)
    for key in ("data", "model.encoder", "model.head", "peft", "task", "logger"):
        field_kind = kind
        for part in key.split("."):
            (field_kind,) = [f.type for f in field_kind.fields if f.name == part]
        members = structs(field_kind)
        assert members
        for member in members:
            given = [f"{key}.{f.name}=a.b:c" for f in member.fields if f.required]
            check(root([f"{key}.{member.tag_field}={member.tag}", *given]))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_committed_specs_break_no_rule(path):
    assert load_checked(path).root == load_spec(path, [], Root).root


@pytest.mark.parametrize("kind", [k for k in get_args(Peft) if k is not CustomPeft])
def test_defaults_of_a_method_break_no_rule(root, kind):
    assert check(root([f"peft.method={kind.__struct_config__.tag}"])) == []


def test_every_rule_is_broken_here(root):
    """Each line that a rule may yield is said of one of the specs above."""
    cases = [*(overrides for overrides, *_ in BROKEN), *(overrides for overrides, _ in IGNORED)]
    said = [line for overrides in cases for line in check(root(overrides))]
    # what only the data tell, asked of the same Struct when they are read
    said += [text for _, text in Supervised(metrics=("quadratic_kappa",)).order_problems("a, b")]
    said += [text for _, text in Training(early_stopping_patience=3).without_val("a")]
    texts = [text for path in RULE_MODULES for text in yielded(path)]
    assert len(texts) > 60
    assert [text for text in texts if not any(text in line for line in said)] == []


RULE_MODULES = [
    Path(spec_check.__file__).parent / f"spec_{name}.py"
    for name in (
        "root",
        "data",
        "samples",
        "volumes",
        "series",
        "video",
        "augment",
        "model",
        "encoders",
        "peft",
        "train",
        "conditions",
        "check",
    )
]


def yielded(path):
    """The longest word for word part of each line, or of its second half, that a file's functions
    yield."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Yield):
            text = node.value.elts[1] if isinstance(node.value, ast.Tuple) else node.value
            words = [part.value for part in ast.walk(text) if isinstance(part, ast.Constant)]
            yield max((word for word in words if isinstance(word, str)), key=len, default="")


def test_every_rule_is_asked():
    rules = {
        function
        for _, function in inspect.getmembers(spec_check, inspect.isgeneratorfunction)
        if list(inspect.signature(function).parameters) == ["root"]
    }
    assert rules == set(spec_check.RULES)


def test_every_field_that_is_not_always_read_is_ignored_here():
    assert set(conditional_keys(inspect_types.type_info(Root))) == {key for _, key in IGNORED}


def conditional_keys(table, key=""):
    """Dotted keys below a table that are read under a condition."""
    for field in table.fields:
        if "read_if" in extra_of(field.type):
            yield f"{key}{field.name}"
        for member in structs(field.type):
            yield from conditional_keys(member, f"{key}{field.name}.")


@pytest.mark.processes
def test_no_torch_is_needed():
    code = "import sys, glovita_lib.spec_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_contradictions_at_once_with_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[optimizer]\nnesterov = true\n[task]\nmetrics = ['mse']\n")
    with pytest.raises(UserError) as raised:
        load_checked(path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}: ") for line in lines)
