"""What a spec leaves open and a run takes is on disk, for every kind of samples and for probes."""

import json
import math
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from msgspec import inspect as kinds
from test_reference_documents import bags, feature_files, series, videos, volumes
from torch import nn

from glovita_lib import run_probe, run_train, spec_errors
from glovita_lib.augment import Augmenter
from glovita_lib.data import ArraySource, Data, ImageSamples, Split
from glovita_lib.dist import cores
from glovita_lib.encoder import build_encoder
from glovita_lib.resolved import data_taken
from glovita_lib.spec import flattened
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_data import ImageData, VolumeData
from glovita_lib.spec_encoders import TimmEncoder
from glovita_lib.spec_root import Root

A = "inputs.augmentation"
LEFT_OPEN = {  # keys of the spec, and where resolved_config.json says what the run took
    "data.subtask": "subtask",
    "data.task": "subtask",
    "data.num_classes": "class_names",
    "data.class_names": "class_names",
    "data.channels": "inputs.channels",
    "data.value_columns": "inputs.value_columns",
    "data.group_column": "taken.data.has_groups",
    "data.preparation.cache_dir": "taken.data.preparation.cache_dir",
    "data.preparation.workers": "taken.data.preparation.workers",
    "data.reading.index_file": "taken.data.reading.index_file",
    **{
        f"data.augmentation.{name}": f"{A}.{name}"
        for name in (
            "train_policy",
            "test_policy",
            "image_size",
            "resize_size",
            "crop_size",
            "crop_mode",
            "interpolation",
            "mean",
            "std",
            "patch_size",
            "margin",
            "evaluation",
        )
    },
    "data.augmentation.train_kwargs": f"{A}.train",
    "data.augmentation.test_kwargs": f"{A}.test",
    "model.encoder.input_channels": "taken.model.encoder.input_channels",
    "model.encoder.input_shape": "taken.model.encoder.input_shape",
    "model.encoder.feature_dim": "inputs.width",
    "model.encoder.stem_channels": "taken.model.encoder.stem_channels",
    "model.encoder.dropout": "taken.model.encoder.dropout",
    "model.encoder.stochastic_depth_prob": "taken.model.encoder.drop_path",
    "model.encoder.drop_path_rate": "taken.model.encoder.drop_path",
    "model.encoder.time_axis": "taken.model.encoder.time_axis",
    "model.encoder.pathway_mode": "taken.model.encoder.pathway_mode",
    "model.encoder.slices.axis": "taken.model.encoder.slices.axis",
    "model.encoder.slices.stride": "taken.model.encoder.slices.places",
    "model.encoder.slices.count": "taken.model.encoder.slices.places",
    "model.encoder.slices.size": "taken.model.encoder.slices.size",
    "model.encoder.slices.aggregation": "taken.model.encoder.slices.aggregation",
    "model.encoder.slices.chunk": "taken.model.encoder.slices.chunk",
    "model.encoder.windows.size": "taken.model.encoder.windows.size",
    "model.encoder.windows.stride": "taken.model.encoder.windows.stride",
    "model.encoder.windows.aggregation": "taken.model.encoder.windows.aggregation",
    "model.encoder.windows.chunk": "taken.model.encoder.windows.chunk",
    "model.encoder.inflation.axis": "taken.model.encoder.inflation.axis",
    "model.encoder.folding.patch": "taken.model.encoder.folding.patch",
    "model.encoder.folding.size": "taken.model.encoder.folding.size",
    "model.encoder.folding.layer": "taken.model.encoder.folding.layer",
    "model.encoder.folding.aggregation": "taken.model.encoder.folding.aggregation",
    "model.head.out_dim": "class_names",
    "model.head.stages": "taken.model.head.stages",
    "model.head.width": "taken.model.head.width",
    "model.feature_aggregation_method": "taken.model.feature_aggregation_method",
    "peft.targets": "taken.peft",
    "peft.deep_layers": "taken.peft",
    "task.metrics": "metrics",
    "task.class_weights": "class_weights",
    "training.precision": "taken.training.precision",
    "training.best_checkpoint_metric": "best_metric",
    "training.train_steps_per_epoch": "taken.training.steps_per_epoch",
    "training.val_steps_per_epoch": "taken.dataloading.val.batches",
    "dataloading.eval_batch_size": "eval_batch_size",
    "dataloading.num_workers": "taken.dataloading.train.num_workers",
    "optimizer.warmup_epochs": "taken.optimizer.warmup_epochs",
    "logger.project": "taken.logger.project",
    "logger.group": "taken.logger.group",
    "logger.name": "taken.logger.name",
}
OFF = {  # key: why a run takes nothing where it is unset
    r"name|extends": "the directory is the spec's own name; no file is extended",
    r"data\.labels_file": "of features and series: labels are in the files (else in LABELLED)",
    r"data\.(train|val|test)_(features_)?file|data\.(features|series)_file": "no such file",
    r"data\.(package|problem)": "the files are named",
    r"data\.reading\.(frame|array_key|array_spacing)": "what each file has, and no other is read",
    r"data\.preparation\.(spacing|size|fill_nan|step)": "nothing is resampled, cut or filled",
    r"data\.sampling\.fps": "stride says it",
    r"model\.encoder\.(lift|weights|weights_key|weights_shape)": "no lift; no file of weights",
    r"model\.encoder\.bottleneck_channels": "blocks have no bottleneck",
    r"model\.encoder\.windows\.skip_below": "no window is left out",
    r"model\.head\.init_std": "torch's own initial weights, which follow from the seed",
    r"model\.head\.bag_weight": "the losses are added up",
    r"peft\.project_dim": "prompts are as wide as tokens",
    r"training\.(gradient_clip_val|ema_decay|early_stopping_patience|save_every(_steps)?)": "off",
    r"optimizer\.layer_wise_lr_decay": "off",
    r"logger\.entity": "the account that the key of W&B belongs to, which W&B alone knows",
}
LABELLED = ("generic_image_dataset", "generic_3d_dataset", "generic_video_dataset")
LIFTS = {"slices": "slices", "inflate": "inflation", "windows": "windows", "fold": "folding"}
UNREAD = ("infer.", "extract.", "umap.")  # the sections of other modes
UNREAD_BY_PROBES = ("model.", "training.", "optimizer.", "dataloading.", "peft.", "logger.")
OFF_FOR_SERIES = ("data.augmentation.",)  # kernels see series as they are prepared


def open_keys(config: dict, *, probe: bool) -> set[str]:
    """Keys that this spec leaves open and that its run reads."""
    lift = config["model"]["encoder"].get("lift")
    unread = UNREAD + tuple(f"model.encoder.{key}." for name, key in LIFTS.items() if name != lift)
    if probe:
        unread += UNREAD_BY_PROBES + OFF_FOR_SERIES
    found = set()
    for key, value in flattened(config):
        is_open = value is None or value == "auto" or (value == [] and key in LEFT_OPEN)
        if not is_open or key.startswith(unread):
            continue
        kwargs = re.match(r"data\.augmentation\.(train|test)_kwargs", key)
        found.add(kwargs[0] if kwargs else key)
    return found


def place_of(key: str, config: dict) -> str | None:
    """Where resolved_config.json has the value of a key; None where nothing is taken."""
    if key == "data.labels_file" and config["data"]["dataset"] in LABELLED:
        return "taken.data.labels_file"
    if key.startswith("model.encoder.weights_") and config["model"]["encoder"]["weights"]:
        return f"taken.{key}"
    if any(re.fullmatch(pattern, key) for pattern in OFF):
        return None
    assert key in LEFT_OPEN, f"{key} is left open, and nothing says where its value is"
    return LEFT_OPEN[key]


def value_at(record: dict, place: str):
    for part in place.split("."):
        assert part in record, f"{place} is not in resolved_config.json"
        record = record[part]
    return record


def images(folder: Path, kind: str) -> list[str]:
    vit = "{ patch_size = 4, embed_dim = 16, depth = 2, num_heads = 2 }"
    return ["data.dataset=digits", "data.data_fraction=0.05", "data.augmentation.image_size=8",
            "model.encoder.type=test_vit", f"model.encoder.model_kwargs={vit}",
            "model.encoder.pretrained=false", "logger.backend=wandb",
            "add_log.notes.phase=warmup"]  # fmt: skip


SMALL = ["model.encoder.features_per_stage=[4, 8]", "model.encoder.kernel_sizes=3",
         "model.encoder.strides=[1, 2]", "model.encoder.n_blocks_per_stage=1"]  # fmt: skip
PLAIN = ["data.augmentation.train_policy=default_3d_1"]
OF_IMAGES = ["model.encoder.encoder_type=timm", "model.encoder.type=test_resnet",
             "model.encoder.pretrained=false"]  # fmt: skip
SQUARE = ["data.augmentation.image_size=32", "data.augmentation.train_policy=default_2d_1"]
CASES = {
    "images": (images, "", []),
    "lora": (images, "", ["peft.method=lora"]),
    "features": (feature_files, "float32", []),
    "bags": (bags, "float32", ["model.head.head_type=clam"]),
    "volumes": (volumes, "csv", [*SMALL, *PLAIN]),
    "windows": (volumes, "json", [
        *SMALL, *PLAIN, "model.encoder.lift=windows", "model.encoder.windows.size=[4, 4, 4]"]),
    "slices": (volumes, "csv", [*OF_IMAGES, *PLAIN, "model.encoder.lift=slices",
        "model.encoder.slices.size=[32, 32]", "model.head.head_type=abmil"]),
    "inflate": (volumes, "csv", [*OF_IMAGES, *PLAIN, "model.encoder.lift=inflate",
        "data.augmentation.patch_size=[32, 32, 8]"]),
    "videos": (videos, "csv", [*OF_IMAGES, *SQUARE, "model.encoder.lift=slices",
        "data.sampling.frames=2"]),
    "clips": (videos, "csv", [*SQUARE, "model.encoder.type=r3d_18", "data.sampling.frames=2",
        "model.encoder.pretrained=false", "peft.method=linear_probing"]),
    "series": (series, "float64", ["model.encoder.features=[4, 4]"]),
    "fold": (series, "float64", [*OF_IMAGES, "model.encoder.lift=fold",
        "model.encoder.folding.size=32"]),
    "probe": (feature_files, "float32", ["task.objective=probe", "task.k=[1, 5, 100]"]),
    "probe of bags": (bags, "float32", ["task.objective=probe"]),
    "probe of series": (series, "float64", [
        "task.objective=probe", 'task.methods=["minirocket"]', "data.val_fraction=0"]),
}  # fmt: skip
PLOTS = ["task.result_plot=none", "task.bootstrap=0"]


@pytest.fixture
def ran(request, tmp_path, monkeypatch):
    """A run: its case, directory, resolved_config.json, and the objects that ran."""
    from glovita import main

    write, kind, changes = CASES[request.param]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    given = write(tmp_path, kind)
    if not request.param.startswith(("images", "lora")):
        given.append("logger.backend=none")
    is_probe = request.param.startswith("probe")
    given += ["data.num_classes=3"] * (write is not images)
    given += [*changes, *PLOTS] + ["training.epochs=1"] * (not is_probe)
    objects = {}
    build, assemble = run_train.build_trainer, run_train.assemble
    monkeypatch.setattr(
        run_train, "build_trainer", lambda *a: objects.setdefault("trainer", build(*a))
    )
    monkeypatch.setattr(
        run_train, "assemble", lambda *a, **k: objects.setdefault("experiment", assemble(*a, **k))
    )
    logger = run_train.build_logger
    monkeypatch.setattr(
        run_train,
        "build_logger",
        lambda *a, **k: objects.update(names=k["names"]) or logger(*a, **k),
    )
    gather = run_probe.read
    monkeypatch.setattr(run_probe, "read", lambda *a: objects.setdefault("read", gather(*a)))
    (tmp_path / "spec.toml").write_text("")
    overrides = [f"exp_dir={tmp_path / 'runs'}", *given]
    assert main(["spec.toml", "--override", *overrides]) == 0
    (path,) = (tmp_path / "runs").rglob("resolved_config.json")
    config = load_checked("spec.toml", overrides).plain
    return request.param, config, json.loads(path.read_text()), objects


@pytest.mark.runs
@pytest.mark.parametrize("ran", CASES, indirect=True)
def test_every_key_that_is_left_open_has_its_value_on_disk(ran):
    name, config, record, objects = ran
    keys = open_keys(config, probe=name.startswith("probe"))
    assert keys
    for key in sorted(keys):
        place = place_of(key, config)
        if place is not None:
            value_at(record, place)
    taken = record["taken"]
    if name.startswith("probe"):
        check_probe(record, objects["read"], config)
    else:
        check_model(taken, objects["experiment"], objects["trainer"])
        check_resolved(record, objects["experiment"])
        check_network(taken["model"]["encoder"], objects["experiment"].model.encoder)
        check_evaluation(record, objects["experiment"])
    check_files(taken["data"], config)
    logs = name in ("images", "lora")
    assert taken["add_log"] == ({"notes": {"phase": "warmup"}} if logs else {})
    assert taken.get("logger", {}) == (objects["names"] if logs else {})
    check = CHECKS.get(name)
    if check is not None:
        check(taken, objects["experiment"].model.encoder)


def check_model(taken, experiment, trainer):
    """What is on disk is what the running objects have."""
    model, encoder = experiment.model, experiment.model.encoder
    assert taken["model"]["encoder"]["width"] == encoder.width
    pooled = model.aggregation if model.head.consumes == "pooled" else None
    assert taken["model"]["feature_aggregation_method"] == pooled
    head = getattr(model.head, "taken", dict)()
    assert taken["model"]["head"] == json.loads(json.dumps(head))
    assert (taken["device"], taken["ranks"]) == (str(next(model.parameters()).device), 1)
    assert taken["training"] == {
        "precision": trainer.precision,
        "steps": trainer.schedule.total,
        "steps_per_epoch": trainer.steps,
        "samples_per_step": trainer.order.step_size,
    }
    assert taken["optimizer"] == {
        "name": type(trainer.optimizer).__name__,
        "warmup_steps": trainer.schedule.warmup,
        "warmup_epochs": trainer.schedule.warmup_epochs,
        "groups": len(trainer.optimizer.param_groups),
    }
    assert taken["data"]["has_groups"] is False
    if "input_shape" in taken["model"]["encoder"]:
        found = taken["model"]["encoder"]
        channels, *sides = experiment.resolved.inputs.shape
        lifted = found.keys() & {"slices", "folding"}  # to images of 32 pixels
        assert found["input_shape"] == ([32, 32] if lifted else sides)
        assert found["input_channels"] == (3 if "folding" in found else channels)
        assert found["blocks"] == len(encoder.blocks())
    assert taken["dataloading"]["train"] == trainer.train_loader.facts()
    assert taken["dataloading"]["val"] == trainer.val_loader.facts()
    for kind, names in taken["peft"].items():
        assert {type(model.get_submodule(name)).__name__ for name in names} == {kind}


def check_resolved(record, experiment):
    """What is not taken but resolved is what the model was built with, and the parameters are
    those that it has."""
    resolved = json.loads(json.dumps(msgspec.to_builtins(experiment.resolved)))
    assert resolved == {key: record[key] for key in record.keys() - {"taken", "parameters"}}
    model, inputs = experiment.model, experiment.objective.train_inputs
    counts = {"all": list(model.parameters()), "head": list(model.head.parameters())}
    is_lora = bool(record["taken"]["peft"])  # of whose encoder nothing else trains
    ours = [p for p in model.encoder.parameters() if p.requires_grad and is_lora]
    counts |= {"added": ours, "base": set(model.encoder.parameters()) - set(ours)}
    for part, parameters in counts.items():
        total = sum(p.numel() for p in parameters)
        trains = sum(p.numel() for p in parameters if p.requires_grad)
        share = {"trainable": trains, "total": total, "share": trains / max(1, total)}
        assert record["parameters"][part] == share
    if isinstance(inputs, Augmenter):
        found = record["inputs"]["augmentation"]
        assert found["image_size"] == inputs.size and found["mean"] == inputs.mean.tolist()
        for name in ("train", "test"):
            ops = getattr(experiment.objective, f"{name.replace('test', 'eval')}_inputs").ops
            assert found[name] == json.loads(json.dumps(msgspec.to_builtins(ops)))


DROPPED = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d


def check_network(own, encoder):
    """What stands of the encoder is what its network has, inside of a lift of what it lifts."""
    assert own["type"] == encoder.name
    if "input_shape" not in own:
        return
    assert own["pooling"] == encoder.pooling and own["notes"] == list(encoder.notes)
    assert own["intermediates"] == list(encoder.returned)
    assert own["prefix_tokens"] == list(encoder.prefix)
    is_patchwise = encoder.layout == 3 and encoder.has_patches
    assert own["patch_size"] == (list(encoder.patch) if is_patchwise else None)
    parts = list(encoder.modules())
    parts += [part for inner in getattr(encoder, "inner", ()) for part in inner.modules()]
    parts += [part for inner in getattr(encoder, "image", ()) for part in inner.modules()]
    assert own["dropout"] == max((p.p for p in parts if isinstance(p, DROPPED)), default=None)
    paths = [p for p in parts if type(p).__name__ in ("DropPath", "StochasticDepth")]
    rates = [float(getattr(p, "drop_prob", getattr(p, "p", 0)) or 0) for p in paths]
    assert own["drop_path"] == max(rates, default=None)
    kernels = [p for p in parts if isinstance(p, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    assert own["stem_channels"] == (kernels[0].out_channels if kernels else None)


def check_evaluation(record, experiment):
    """The test split, predicted last, takes so many batches."""
    found = record["taken"]["dataloading"]["test"]
    assert found == experiment.batches
    assert found["batches"] == math.ceil(record["samples"]["test"] / record["eval_batch_size"])


def check_files(taken, config):
    """Files that are read or written by default are there; so many processes prepare volumes."""
    if config["data"]["dataset"] in LABELLED:
        assert Path(taken["labels_file"]).is_file()
    if config["data"]["dataset"] == "generic_3d_dataset":
        assert any(Path(taken["preparation"]["cache_dir"]).iterdir())
        assert taken["preparation"]["workers"] == VolumeData().preparation.processes(cores())
    if config["data"]["dataset"] == "generic_video_dataset":
        assert Path(taken["reading"]["index_file"]).is_file()


def check_probe(record, read, config):
    data, samples = read
    assert record["dataset"] == data.name and record["ordered"] == data.has_order
    assert record["inputs"] == json.loads(json.dumps(msgspec.to_builtins(data.samples)))
    assert record["taken"]["data"]["has_groups"] is False
    assert (record["taken"]["device"], record["taken"]["ranks"]) == ("cpu", 1)
    task, found = config["task"], record["taken"]["task"]
    methods = task["methods"]
    assert found["methods"] == methods and record["number_names"] == data.number_names
    assert record["metrics"] == ["acc", "f1"]
    assert found["l2"] == (sorted(task["l2"], reverse=True) if "linear" in methods else None)
    assert found["alphas"] == (task["alphas"] if "minirocket" in methods else None)
    assert record["subtask"] == data.subtask and record["class_names"] == list(data.class_names)
    assert record["samples"] == {name: len(part.ids) for name, part in samples.items()}
    k = record["taken"]["task"]["k"]
    assert k == (
        None
        if not config["task"]["k"] or "knn" not in config["task"]["methods"]
        else sorted({min(n, len(samples["train"].ids)) for n in config["task"]["k"]})
    )


def of_images(taken, encoder):
    own = taken["model"]["encoder"]
    assert own | {
        "width": 16, "blocks": 2, "input_shape": [8, 8], "input_channels": 1, "stem_channels": 16,
        "patch_size": [4, 4], "prefix_tokens": ["cls"], "dropout": 0, "drop_path": None,
    } == own  # fmt: skip


def of_slices(taken, encoder):
    own = taken["model"]["encoder"]["slices"]
    size = encoder.input_shape[2:]
    (inner,) = encoder.inner
    assert own["size"] == list(inner.input_shape[2:]) == [32, 32]
    assert own["axis"] == ("t" if encoder.axis == 0 else "xyz"[encoder.axis])
    assert own["places"] == encoder.places(size[encoder.axis]).tolist()
    assert own["aggregation"] == encoder.method == encoder.of_parts.pooling
    assert own["chunk"] == {"training": "all", "evaluation": type(encoder).at_once}


def of_windows(taken, encoder):
    own = taken["model"]["encoder"]["windows"]
    assert own["size"] == list(encoder.windows.size) == [4, 4, 4]
    assert own["stride"] == list(encoder.windows.stride) == [3, 3, 3]  # a quarter in common
    assert own["aggregation"] == encoder.method == encoder.of_parts.pooling
    assert own["chunk"] == {"training": "all", "evaluation": type(encoder).at_once}
    sides = encoder.input_shape[2:]  # one window, and one more for every step or a part of it
    assert own["count"] == math.prod(1 + math.ceil(max(0, side - 4) / 3) for side in sides)


def of_folding(taken, encoder):
    own = taken["model"]["encoder"]["folding"]
    assert own["size"] == encoder.side == 32 and own["aggregation"] == encoder.method
    assert own["patch"] == math.isqrt(64) and own["layer"] == len(encoder.block_names)


def of_videos(taken, encoder):
    of_slices(taken, encoder)
    assert taken["model"]["encoder"]["slices"]["axis"] == "t"
    assert Path(taken["data"]["reading"]["index_file"]).is_file()


def of_volumes(taken, encoder):
    folder = Path(taken["data"]["preparation"]["cache_dir"])
    assert any(folder.iterdir()) and taken["data"]["preparation"]["workers"] >= 1
    assert Path(taken["data"]["labels_file"]).name == "labels.csv"
    assert taken["model"]["encoder"]["stem_channels"] == 4


def of_inflation(taken, encoder):
    assert taken["model"]["encoder"]["inflation"] == {"axis": "z"} and encoder.axis == 2
    assert taken["model"]["encoder"]["patch_size"] is None  # maps of a CNN


def of_clips(taken, encoder):
    own = taken["model"]["encoder"]
    assert (own["time_axis"], own["pathway_mode"]) == (encoder.axis, encoder.pathways)
    assert (encoder.axis, encoder.pathways) == (0, "single")


CHECKS = {
    "images": of_images, "lora": of_images,
    "slices": of_slices, "windows": of_windows, "fold": of_folding, "videos": of_videos,
    "volumes": of_volumes, "inflate": of_inflation, "clips": of_clips,
}  # fmt: skip


def test_where_weights_stood_in_their_file_is_on_disk(command, tmp_path):
    """Of several networks the averaged one, which the spec does not name; a file of one alone has
    it at its top."""
    first = command("training.epochs=1", "name=first")
    prefix = "encoder.net."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in first.best["model"].items()
        if name.startswith(prefix)
    }
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state}, tmp_path / "two.pt")
    torch.save(state, tmp_path / "one.pt")
    for file, key in (("two", "state_dict_ema"), ("one", "")):
        weights = f"model.encoder.weights={tmp_path / file}.pt"
        run = command("training.epochs=1", f"name={file}", weights)
        assert run.json("resolved_config.json")["taken"]["model"]["encoder"]["weights_key"] == key
    assert "weights_key" not in first.json("resolved_config.json")["taken"]["model"]["encoder"]


@pytest.mark.parametrize("groups", [None, ["a", "b"]])
def test_whether_samples_come_in_groups(groups):
    source = ArraySource(np.zeros((2, 1, 2, 2), np.uint8), np.arange(2))
    split = Split(["a", "b"], np.zeros(2, np.int64), source, groups)
    samples = ImageSamples(channels=1, bit_depth=8)
    data = Data("d", {"train": split}, "multiclass", ("x",), samples)
    assert data_taken(ImageData(), data)["has_groups"] == (groups is not None)


def test_dropout_that_a_network_has_is_on_disk():
    kwargs = {"drop_rate": 0.25, "drop_path_rate": 0.125, "depth": 3}
    spec = TimmEncoder(type="test_vit", pretrained=False, model_kwargs=kwargs)
    encoder = build_encoder(spec, channels=3, size=(32, 32), load_weights=False)
    found = encoder.taken((32, 32))
    assert (found["dropout"], found["drop_path"]) == (0.25, 0.125)


def test_every_field_that_may_be_left_open_is_in_one_of_both_lists():
    """Over all sections that training reads: no field can be added without a word about it."""
    missing = []

    def walk(kind, path):
        for member in spec_errors.structs(kind):
            for field in member.fields:
                key = f"{path}.{field.name}".lstrip(".")
                default = spec_errors.default_of(field)
                if key.startswith(UNREAD) or "_kwargs." in key:
                    continue
                known = key in LEFT_OPEN or any(re.fullmatch(p, key) for p in OFF)
                if (default is None or default == "auto") and not known:
                    missing.append(key)
                walk(field.type, key)

    walk(kinds.type_info(Root), "")
    assert not set(missing)


def test_predictions_say_what_they_were_made_with(command):
    run = command("training.epochs=1")
    command("training.epochs=1", "mode=infer")
    record = run.json("infer/resolved_config_test.json")
    trained = run.json("resolved_config.json")
    taken = record.pop("taken")
    assert record == {key: trained[key] for key in record}
    assert taken["infer"] == {
        "checkpoint": [str(run.path / "checkpoints" / "best.pt")],
        "split": "test",
        "input": None,
    }
    assert taken["training"]["precision"] == trained["taken"]["training"]["precision"]
    assert taken["dataloading"]["test"]["batches"] == math.ceil(359 / record["eval_batch_size"])
