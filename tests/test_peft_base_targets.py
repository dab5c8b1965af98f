"""Layers are found by structure in every kind of network; a target that matches nothing says so."""

from collections import Counter

import pytest
import timm
from small_networks import build

from glovita_lib import peft_base
from glovita_lib.errors import UserError
from glovita_lib.network import attentions, blocks, feed_forwards, layers
from glovita_lib.peft_base import by_pattern

ATTENTION = {"qkv": 2, "proj": 2, "fc1": 2, "fc2": 2}


def resolve(net, wanted):
    return peft_base.resolve_targets(net, wanted, allowed=("linear", "conv"))


def roles(net) -> Counter:
    return Counter(layer.role for layer in layers(net) if layer.role not in ("norm", "conv"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", ATTENTION),
        ("dinov3", ATTENTION),
        ("eva02", ATTENTION),
        ("swin", ATTENTION | {"qkv": 4, "proj": 4, "fc1": 4, "fc2": 4, "linear": 1}),
        ("convnext", {"fc1": 4, "fc2": 4}),
        ("resnet", {}),
        ("volume", {}),
        ("series", {"q": 2, "k": 2, "v": 2, "proj": 2, "fc1": 2, "fc2": 2}),
        ("torch_attention", ATTENTION | {"linear": 1}),
    ],
)
def test_roles(name, expected):
    net = build(name)
    assert roles(net) == expected


def test_names_tell_query_key_and_value_apart_whatever_their_order():
    found = {layer.name: layer.role for layer in layers(build("series"))}
    assert found["layer.0.core.key"] == "k"
    assert found["layer.0.core.query"] == "q"
    assert found["layer.1.core.value"] == "v"
    assert found["layer.1.merge.dense"] == "proj"


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit", 2), ("swin", 4), ("convnext", 4), ("resnet", 4), ("volume", 2), ("series", 2),
     ("torch_attention", 2)],
)  # fmt: skip
def test_blocks(name, count):
    assert len(blocks(build(name))) == count


def test_reference_defect_default_targets_skip_no_layer_of_a_plain_vit():
    names = {t.layer.name for t in resolve(build("vit"), None)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"blocks.{i}.{part}" for i in range(2) for part in parts}


def test_reference_defect_fused_qkv_of_dinov3_is_found():
    names = [t.name for t in resolve(build("dinov3"), ("q", "v"))]
    assert names == [f"blocks.{i}.attn.qkv.{part}" for i in range(2) for part in "qv"]


def test_reference_defect_renamed_projections_are_found():
    """Neither the old names of a library nor the new ones are needed."""
    series = build("series")
    for block in series.layer:
        core = block.core._modules
        block.core._modules = {f"w{role[0]}": core[role] for role in ("key", "value", "query")}
    names = [t.name for t in resolve(series, ("q", "k", "v"))]
    assert names == [f"layer.{i}.core.w{role}" for i in range(2) for role in "kvq"]


def test_fused_rows_are_thirds():
    targets = resolve(build("vit"), ("q", "k", "v"))
    assert [t.rows for t in targets[:3]] == [(0, 32), (32, 64), (64, 96)]


def test_qkv_means_three_layers_where_they_are_apart():
    assert len(resolve(build("series"), ("qkv",))) == 6
    assert len(resolve(build("vit"), ("qkv",))) == 2


def test_a_whole_layer_covers_its_parts():
    assert [t.part for t in resolve(build("vit"), ("q", "qkv"))] == [None, None]


def test_expressions():
    assert [t.name for t in resolve(build("vit"), (r"blocks\.1\.mlp",))] == [
        "blocks.1.mlp.fc1",
        "blocks.1.mlp.fc2",
    ]
    assert [t.name for t in resolve(build("vit"), (r"0\.attn\.qkv\.v$",))] == [
        "blocks.0.attn.qkv.v"
    ]


@pytest.mark.parametrize("name", ["resnet", "volume"])
def test_unset_targets_are_the_convolutions_without_linear_layers(name):
    kinds = {type(t.layer.module).__name__ for t in resolve(build(name), None)}
    assert kinds <= {"Conv2d", "Conv3d"}


def test_a_target_that_matches_nothing_lists_what_there_is():
    with pytest.raises(UserError, match=r"'fc3' matches no layer.*'fc1'|fc2.*blocks\.0\.attn\.qkv"):
        resolve(build("vit"), ("q", "fc3"))
    with pytest.raises(UserError, match="'q' matches no layer"):
        resolve(build("resnet"), ("q",))
    with pytest.raises(UserError, match="no regular expression"):
        resolve(build("vit"), ("blocks[",))


def test_rank_by_pattern():
    targets = resolve(build("vit"), ("qkv", "fc1"))
    ranks = by_pattern({"blocks.1": 16, "fc1": 2}, targets, 4)
    assert ranks == {
        "blocks.0.attn.qkv": 4,
        "blocks.0.mlp.fc1": 2,
        "blocks.1.attn.qkv": 16,
        "blocks.1.mlp.fc1": 2,
    }
    with pytest.raises(UserError, match="'block7' matches no target"):
        by_pattern({"block7": 1}, targets, 4)


@pytest.mark.parametrize(("name", "count"), [("vit", 2), ("swin", 4), ("convnext", 4)])
def test_feed_forwards(name, count):
    assert len(feed_forwards(build(name))) == count


@pytest.mark.parametrize(("name", "count"), [("vit", 2), ("swin", 4), ("torch_attention", 2)])
def test_attentions(name, count):
    assert len(attentions(build(name))) == count


def test_convolutional_mlp_but_not_squeeze_and_excitation():
    net = timm.create_model("convnext_atto", num_classes=0)
    assert roles(net) == {"fc1": 12, "fc2": 12}
    excited = timm.create_model("seresnet18", num_classes=0)
    assert not roles(excited)


def test_reference_defect_gate_and_input_of_a_gated_mlp_are_fc1():
    net = timm.create_model(
        "eva02_base_patch14_224", embed_dim=32, depth=1, num_heads=2, img_size=28, num_classes=0
    )
    found = {layer.name: layer.role for layer in layers(net) if "mlp" in layer.name}
    del found["blocks.0.mlp.norm"]
    assert found == {
        "blocks.0.mlp.fc1_g": "fc1",
        "blocks.0.mlp.fc1_x": "fc1",
        "blocks.0.mlp.fc2": "fc2",
    }


def test_layers_that_nothing_reads_are_no_targets():
    net = build("vit")
    net.blocks[1].requires_grad_(False)  # as the model builder does with unused pooling layers
    assert {t.name for t in resolve(net, ("qkv",))} == {"blocks.0.attn.qkv"}
