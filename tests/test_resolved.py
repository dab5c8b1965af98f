"""What a run makes of the samples of its data: one Struct a modality."""

from typing import get_args

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from glovita_lib import run_infer
from glovita_lib.augment import Augmenter
from glovita_lib.data import (
    ArraySource,
    BagSamples,
    BaseSamples,
    Data,
    ImageSamples,
    Split,
    VectorSamples,
)
from glovita_lib.errors import UserError
from glovita_lib.loader_features import FeatureInputs
from glovita_lib.objectives import build_inputs
from glovita_lib.resolved import (
    ImageInputs,
    Inputs,
    Resolved,
    VectorInputs,
    check_data,
    check_unchanged,
    in_order_of,
    resolve_inputs,
    resolve_spec,
)
from glovita_lib.spec_data import GenericImageData
from glovita_lib.spec_root import Root

GREY, FEATURES = ImageSamples(channels=1, bit_depth=8), VectorSamples(width=64)
BAGS = BagSamples(width=64)


def data_of(samples: BaseSamples, shape: tuple[int, ...] = (1, 8, 8)) -> Data:
    """Six samples of a custom data set, all for training."""
    source = ArraySource(np.zeros((6, *shape), np.uint8), np.arange(6))
    split = Split([str(row) for row in range(6)], np.arange(6) % 2, source)
    return Data("mine", {"train": split}, "multiclass", ("a", "b"), samples)


def root_of(encoder_type: str, **sections: dict) -> Root:
    spec = {
        "data": {"dataset": "custom", "target": "my_data:build"},
        "model": {"encoder": {"encoder_type": encoder_type}},
        **sections,
    }
    return msgspec.convert({"mode": "train", **spec}, Root)


def test_images_have_the_shape_and_the_policies_of_the_run():
    encoder = {"type": "resnet18", "pretrained": False}
    root = root_of("timm", model={"encoder": {"encoder_type": "timm", **encoder}})
    inputs = resolve_spec(root, data_of(GREY)).inputs
    assert isinstance(inputs, ImageInputs) and inputs.kind == "images"
    assert inputs.shape == (1, 8, 8)
    assert inputs.model_arguments == {"channels": 1, "size": (8, 8), "patch_size": None}
    assert inputs.augmentation.train_policy == "default_2d_2"
    assert isinstance(build_inputs(inputs, train=True), Augmenter)


def test_the_classes_of_other_data_are_counted_as_a_model_does():
    trained = replace(resolve_spec(root_of("precomputed"), data_of(FEATURES)), samples={})
    for known, own, expected in (
        (("c", "b", "a"), ("a", "b"), [2, 1]),
        (("x", "b\u0308", "a"), ("a", "b\u0308"), [2, 1]),
        (("a",), ("a", "b"), [0, 1]),  # not all of its own: as it is
        (("a", "b"), ("a", "b"), [0, 1]),
    ):
        model = replace(trained, class_names=known)
        data = data_of(FEATURES)
        data.class_names = own
        found = in_order_of(model, data)
        assert found.splits["train"].targets.tolist() == expected * 3
        assert found.class_names == (known if set(own) <= set(known) else own)
    data.subtask, data.splits["train"].targets = "multilabel", np.eye(2, dtype=np.float32)
    for known, first in ((("b", "a"), [0, 1]), (("c", "b", "a"), [1, 0])):
        found = in_order_of(replace(trained, subtask="multilabel", class_names=known), data)
        assert found.splits["train"].targets[0].tolist() == first
    found = in_order_of(replace(trained, subtask="regression", class_names=("b", "a")), data)
    assert found is data


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("head", ["classification", "regression"])
def test_the_head_predicts_what_the_data_turn_out_to_hold(subtask: str, head: str):
    data = data_of(FEATURES)
    data.subtask = subtask
    if subtask != "multiclass":
        for split in data.splits.values():
            split.targets = np.eye(2)[split.targets % 2]
    root = root_of(
        "precomputed",
        model={"encoder": {"encoder_type": "precomputed"}, "head": {"head_type": head}},
    )
    if (subtask == "regression") == (head == "regression"):
        assert resolve_spec(root, data).subtask == subtask
        return
    with pytest.raises(UserError, match=f'^model.head.head_type: "{head}" cannot predict'):
        resolve_spec(root, data)
    resolve_spec(msgspec.structs.replace(root, mode="extract"), data)  # where no head is asked


@pytest.mark.parametrize("samples", [FEATURES, BAGS])
def test_features_have_a_width(samples):
    inputs = resolve_spec(root_of("precomputed"), data_of(samples, (64,))).inputs
    assert (inputs.kind, inputs.width, inputs.mean) == (samples.kind, 64, None)
    assert inputs.model_arguments == {"channels": 64, "size": None}
    assert isinstance(build_inputs(inputs, train=False), FeatureInputs)


@pytest.mark.parametrize("samples", [GREY, FEATURES, BAGS])
def test_what_a_checkpoint_carries_survives_json(samples):
    encoder = "timm" if samples is GREY else "precomputed"
    shape = (1, 8, 8) if samples is GREY else (64,)
    first = resolve_spec(root_of(encoder), data_of(samples, shape))
    plain = msgspec.to_builtins(first)
    assert plain["inputs"]["kind"] == samples.kind
    assert {"kind", "channels", "augmentation", "feature_mean"}.isdisjoint(plain)
    assert msgspec.convert(plain, Resolved) == first


@pytest.mark.parametrize(
    ("encoder", "samples", "words"),
    [
        ("precomputed", GREY, ["takes features", "the samples are images", "name an encoder"]),
        ("timm", FEATURES, ["encoder_type: the samples are features", '"precomputed"']),
        ("timm", BAGS, ["encoder_type: the samples are features", '"precomputed"']),
    ],
)
def test_the_encoder_takes_the_samples(encoder, samples, words):
    with pytest.raises(UserError) as error:
        resolve_spec(root_of(encoder), data_of(samples))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_only_images_are_mixed():
    with pytest.raises(
        UserError, match="task.cutmix: it mixes images, and the samples are vectors"
    ):
        resolve_spec(
            root_of("precomputed", task={"objective": "supervised", "cutmix": True}),
            data_of(FEATURES),
        )


def test_a_probe_has_no_model_to_resolve():
    with pytest.raises(UserError, match='task.objective = "probe" judges features and has no mod'):
        resolve_spec(root_of("precomputed", task={"objective": "probe"}), data_of(FEATURES))


@pytest.mark.parametrize("subtask", ["multiclass", "regression"])
def test_without_labels_nothing_is_scaled_or_weighted(subtask):
    data = data_of(FEATURES)
    data.subtask, data.splits["train"].targets = subtask, None
    weights = "balanced" if subtask == "multiclass" else None
    task = {"objective": "supervised", "class_weights": weights}
    head = {"head_type": "regression" if subtask == "regression" else "classification"}
    model = {"encoder": {"encoder_type": "precomputed"}, "head": head}
    found = resolve_spec(root_of("precomputed", task=task, model=model), data)
    assert (found.target_mean, found.target_std) == ((0.0, 0.0), (1.0, 1.0))
    assert found.class_weights is None


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (FEATURES, "the model was trained on vectors of width 32, data set mine has width 64"),
        (BAGS, "the model was trained on vectors, the samples of data set mine are bags"),
    ],
)
def test_other_features_than_those_of_training_are_refused(samples, said):
    root, data = root_of("precomputed"), data_of(VectorSamples(width=32), (32,))
    model = resolve_spec(root, data)
    with pytest.raises(UserError) as error:
        check_data(model, "the model", data_of(samples), GenericImageData())
    assert str(error.value) == said
    check_data(model, "the model", data, GenericImageData())


def test_every_modality_has_its_functions():
    for member in get_args(Inputs):
        samples = member.__base__
        assert member.__struct_config__.tag == samples.__struct_config__.tag
        assert resolve_inputs.dispatch(samples) is not resolve_inputs.dispatch(BaseSamples)
        for function in (build_inputs, run_infer.new_samples):
            assert function.dispatch(member) is not function.dispatch(BaseSamples)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": (1e9, 0.0)}, None),
        ({"mean": (1e9 + 1e-7, 1e-9)}, None),
        ({"std": (1.0 + 1e-9, 1e-3)}, None),
        (
            {"mean": (1e9 + 2, 0.0)},
            "inputs.mean[0]: 1000000000.0 -> 1000000002.0 (1 of 2 numbers differ)",
        ),
        ({"mean": (1e9, 1e-4)}, "inputs.mean[1]: 0 -> 0.0001 (1 of 2 numbers differ)"),
        ({"std": (1.0, 2e-3)}, "inputs.std[1]: 0.001 -> 0.002 (1 of 2 numbers differ)"),
        ({"mean": None}, "inputs.mean: [1000000000.0, 0.0] -> none"),
        ({"mean": (0.0,)}, "inputs.mean: [1000000000.0, 0.0] -> [0.0]"),
        ({"mean": (np.nan, 0.0)}, "inputs.mean[0]: 1e+09 -> nan"),
    ],
)
def test_rounding_alone_is_no_change(changes, said):
    """Of a mean beside the deviation of its column, however large it is."""
    resolved = resolve_spec(root_of("precomputed"), data_of(FEATURES, shape=(2,)))
    scaled = VectorInputs(width=2, mean=(1e9, 0.0), std=(1.0, 1e-3))
    first = replace(resolved, inputs=scaled)
    second = replace(resolved, inputs=replace(scaled, **changes))
    if said is None:
        check_unchanged(first, "the model", second, "the data give now")
        return
    with pytest.raises(UserError) as refusal:
        check_unchanged(first, "the model", second, "the data give now")
    assert f"the data give now: {said}" in str(refusal.value)


def test_counts_are_never_rounded():
    resolved = resolve_spec(root_of("precomputed"), data_of(FEATURES))
    many = replace(resolved, samples={"train": 20_000_000})
    more = replace(resolved, samples={"train": 20_000_001, "test": 5})
    with pytest.raises(UserError) as refusal:
        check_unchanged(many, "the model", more, "the data give now")
    assert "samples.train: 20000000 -> 20000001; samples.test: none -> 5" in str(refusal.value)
