"""Networks that see volumes as arrays (Z, Y, X): all that they say of a volume is what the network
says of the transposed one, back in the order x, y, z."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from small_runs import EPOCH, VOLUMES
from torch import Tensor, nn
from volume_files import blob, write_labelled

from glovita_lib.augment_patch import Volumes, WindowedVolumes, WindowGrid
from glovita_lib.encoder import build_encoder, patch_size_of
from glovita_lib.encoder_aggregation import choose_layers
from glovita_lib.encoder_volume import Origin, origin_of
from glovita_lib.errors import UserError
from glovita_lib.extraction import token_places
from glovita_lib.grad_cam import heat_values
from glovita_lib.model import build_model, logits_of
from glovita_lib.spec_encoders import NnFoundationEncoder, PrimusEncoder, ResidualEncoder
from glovita_lib.spec_model import AbmilHead, ModelSpec
from glovita_lib.spec_peft import Convpass, FullFinetuning, Lora

FACTS = {
    "features_per_stage": [4, 8],
    "kernel_sizes": [[1, 3, 3], [3, 3, 5]],
    "strides": [[1, 1, 2], [1, 2, 2]],
    "n_blocks_per_stage": [1, 2],
}
PLAN = {
    "architecture_plans": {
        "arch_class_name": "ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": 2,
            **FACTS,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "nonlin": "torch.nn.modules.activation.LeakyReLU",
        },
    },
    "recommended_downstream_patchsize": [4, 6, 16],
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
}
TOKENS = {"embed_dim": 48, "patch_embed_size": [2, 4, 4], "eva_depth": 2, "eva_numheads": 4}
TOKENS = {
    **PLAN,
    "architecture_plans": {
        "arch_class_name": "Primus",
        "arch_kwargs": {**TOKENS, "num_register_tokens": 2},
    },
    "key_to_encoder": "eva",
    "key_to_stem": "down_projection",
}
SIZE = (16, 12, 6)  # voxels along x, y and z
KINDS = ["residual", "excited", "primus", "plan", "plan of tokens"]


pytestmark = pytest.mark.usefixtures("small_primus")


def section(kind: str, order: str, folder: Path, **fields):
    """A network that is not the same along any two of its axes."""
    if kind in ("residual", "excited"):
        given = {**FACTS, "squeeze_excitation": kind == "excited", **fields}
        return msgspec.convert({**given, "array_order": order}, ResidualEncoder)
    if kind == "primus":
        given = {"patch_embed_size": (2, 4, 4), **fields}
        return msgspec.convert({**given, "array_order": order}, PrimusEncoder)
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(PLAN if kind == "plan" else TOKENS))
    given = {"checkpoint_path": str(path), "pretrained": False, **fields}
    return msgspec.convert({**given, "array_order": order}, NnFoundationEncoder)


def volumes(size=SIZE) -> Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1)).double()


def turned(x: Tensor) -> Tensor:
    return x.transpose(-3, -1)


def stirred(module: nn.Module) -> nn.Module:
    """Weights that no block begins as."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module.double().eval()


def encoders(kind: str, folder: Path, size=SIZE):
    """An encoder that sees arrays, and one with its weights that sees what it is given."""
    arguments = {"channels": 1, "load_weights": False}
    one = build_encoder(section(kind, "zyx", folder), size=size, **arguments)
    other = build_encoder(section(kind, "xyz", folder), size=size[::-1], **arguments)
    stirred(one)
    other.double().eval().load_state_dict(one.state_dict(), strict=True)
    return one, other


def models(kind: str, folder: Path, *, size=SIZE, peft=None, head=None, **fields):
    """The same of whole models."""
    made = []
    for order, sides in (("zyx", size), ("xyz", size[::-1])):
        torch.manual_seed(0)
        lift = {} if order == "zyx" or "windows" not in fields else fields["windows"]
        turned_lift = {"windows": {k: v[::-1] for k, v in lift.items()}} if lift else {}
        encoder = section(kind, order, folder, **{**fields, **turned_lift})
        heads = {} if head is None else {"head": head}
        arguments = {"outputs": 3, "channels": 1, "size": sides, "load_weights": True}
        spec = ModelSpec(encoder=encoder, **heads)
        made.append(build_model(spec, peft or FullFinetuning(), **arguments))
    one, other = made
    stirred(one)
    other.double().eval().load_state_dict(one.state_dict(), strict=True)
    return one, other


def as_map(features) -> Tensor:
    """Patch tokens as a map (B, D, X, Y, Z)."""
    return features.patches.mT.unflatten(2, features.grid)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_the_transposed_volume(kind: str, tmp_path: Path) -> None:
    """Vectors, tokens, grids and layers, also of volumes of another size."""
    one, other = encoders(kind, tmp_path)
    assert one.patch == other.patch[::-1]
    for size in (SIZE, (32, 4, 10)):
        x = volumes(size)
        found, expected = one(x), other(turned(x))
        assert found.grid == expected.grid[::-1] and len(set(found.grid)) > 1
        torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(as_map(found), turned(as_map(expected)), rtol=1e-6, atol=1e-9)
        first = found.n_prefix
        torch.testing.assert_close(found.tokens[:, :first], expected.tokens[:, :first])
        shapes = (1, 1, *SIZE), (1, 1, *SIZE[::-1])
        layers = [
            choose_layers(encoder, (0, -1), norm=False, input_shape=shape)
            for encoder, shape in zip((one, other), shapes, strict=True)
        ]
        for a, b in zip(layers[0](x), layers[1](turned(x)), strict=True):
            assert a.grid == b.grid[::-1]
            torch.testing.assert_close(as_map(a), turned(as_map(b)), rtol=1e-6, atol=1e-9)
    x = volumes((16, 12, 16))
    assert not torch.allclose(one(x).pooled, other(x).pooled)  # the order matters


@pytest.mark.parametrize("kind", ["residual", "primus", "plan of tokens"])
@torch.no_grad()
def test_files_say_by_which_call_tokens_are_made(kind: str, tmp_path: Path) -> None:
    one, _ = encoders(kind, tmp_path)
    x = volumes()
    call = one.tokens_call
    assert "x.transpose(2, 4)" in call
    made = eval(call, {"encoder": one.net, "x": x, "torch": torch})
    torch.testing.assert_close(made, one(x).tokens)
    if one.n_prefix:
        assert one.last_norm(x).startswith("net.eva.norm")


@pytest.mark.parametrize("kind", KINDS)
def test_heat_maps_are_those_of_the_transposed_volume(kind: str, tmp_path: Path) -> None:
    """Of a volume, of the windows of an evaluation, and of an encoder of windows."""
    one, other = models(kind, tmp_path)
    x = volumes()[0]
    maps = [heat_values(other, turned(x), output) for output in range(3)]
    assert max(values.max() for values in maps) > 0
    for output, values in enumerate(maps):
        np.testing.assert_allclose(heat_values(one, x, output), values.T, rtol=1e-6, atol=1e-12)
    large, stride = volumes((20, 16, 7))[0], (6, 5, 4)
    windows = [
        WindowedVolumes(Volumes((volume,)), WindowGrid(size, step), "mean", 2)
        for volume, size, step in ((large, SIZE, stride), (turned(large), SIZE[::-1], stride[::-1]))
    ]
    with torch.no_grad():
        logits = [logits_of(model, part) for model, part in zip((one, other), windows, strict=True)]
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-9)
    found = heat_values(one, large, 1, windows[0])
    expected = heat_values(other, turned(large), 1, windows[1])
    np.testing.assert_allclose(found, expected.T, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["residual", "primus"])
def test_windows_of_a_bag_are_those_of_the_transposed_volume(kind: str, tmp_path: Path) -> None:
    lift = {"windows": {"size": list(SIZE), "stride": [6, 5, 4]}, "lift": "windows"}
    large = (20, 16, 7)
    one, other = models(kind, tmp_path, size=large, head=AbmilHead(), **lift)
    x = volumes(large)[:1]
    with torch.no_grad():
        logits = one(x)["logits"], other(turned(x))["logits"]
        torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-9)
        found, expected = one.encoder(x), other.encoder(turned(x))
    tokens = {tuple(at): v for at, v in zip(expected.places[0], expected.tokens[0], strict=True)}
    for place, token in zip(found.places[0], found.tokens[0], strict=True):
        torch.testing.assert_close(token, tokens[tuple(place[::-1])], rtol=1e-6, atol=1e-9)
    heat = heat_values(other, turned(x[0]), 1)
    np.testing.assert_allclose(heat_values(one, x[0], 1), heat.T, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("peft", [Lora(rank=2), Convpass(bottleneck=2)], ids=["lora", "convpass"])
def test_adapted_networks_are_those_of_the_transposed_volume(peft, tmp_path: Path) -> None:
    one, other = models("primus", tmp_path, peft=peft)
    x = volumes()
    with torch.no_grad():
        found, expected = one.features(x), other.features(turned(x))
    torch.testing.assert_close(as_map(found), turned(as_map(expected)), rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_places_of_tokens_are_along_x_y_and_z(tmp_path: Path) -> None:
    """A bright token is where the voxels are bright."""
    one, _ = encoders("primus", tmp_path)
    one.net.eva.blocks, one.net.eva.norm, one.net.eva.pos_embed = (
        nn.ModuleList(),
        nn.Identity(),
        None,
    )
    x = torch.zeros(1, 1, *SIZE).double()
    x[0, 0, 12:16, 4:8, 2:4] = 1  # the fourth, second and second patch of 4 x 4 x 2 voxels
    features = one(x)
    brightest = int(
        (features.tokens[0] - features.tokens[0].median(0).values).abs().sum(1).argmax()
    )
    assert token_places(features, 0)[0][brightest].tolist() == [3, 1, 1]


def test_dropped_patches_have_no_grid(tmp_path: Path) -> None:
    spec = PrimusEncoder(patch_embed_size=(2, 4, 4), patch_drop_rate=0.5, array_order="zyx")
    encoder = build_encoder(spec, channels=1, size=SIZE, load_weights=False).train()
    features = encoder(volumes().float())
    assert features.grid is None and features.tokens.shape[1] == 4 * 3 * 3 // 2


# -------------------------------------------------------------------- sizes and weights


def test_sizes_are_along_x_y_and_z(tmp_path: Path) -> None:
    plan = section("plan", "zyx", tmp_path)
    assert patch_size_of(plan) == (16, 6, 4)
    assert patch_size_of(section("plan", "xyz", tmp_path)) == (4, 6, 16)
    encoder = build_encoder(plan, channels=1, size=None, load_weights=False)
    assert encoder.taken((1, 16, 6, 4))["input_shape"] == [16, 6, 4]
    primus = PrimusEncoder(patch_embed_size=(2, 4, 4), array_order="zyx")
    default = build_encoder(primus, channels=1, size=None, load_weights=False)
    assert default.input_shape[2:] == (64, 64, 32)
    for kind, size, text in (
        ("residual", (16, 12, 6), None),
        ("residual", (6, 12, 16), "6 x 12 x 16 is no multiple of 4 x 2 x 1"),
        (
            "primus",
            (6, 12, 16),
            "patches of 4 x 4 x 2 voxels, not 6 x 12 x 16; nearest 8 x 12 x 16",
        ),
    ):
        spec = section(kind, "zyx", tmp_path)
        if text is None:
            build_encoder(spec, channels=1, size=size, load_weights=False)
            continue
        with pytest.raises(UserError, match=text):
            build_encoder(spec, channels=1, size=size, load_weights=False)
    shapes = {"input_shape": (6, 12, 16), "weights_shape": (16, 12, 6)}
    problems = dict(section("primus", "zyx", tmp_path, **shapes).problems())
    assert "[6, 12, 16] is no whole number of tokens of [4, 4, 2]" in problems["input_shape"]
    assert "[16, 12, 6] is no whole number of tokens of [2, 4, 4]" in problems["weights_shape"]


def test_positions_of_files_are_in_the_order_of_the_network(tmp_path: Path) -> None:
    """nnU-Net's patch is that of its arrays, a run's that of volumes."""
    _, other = encoders("primus", tmp_path)
    weights = other.float().net.state_dict()
    stated = section("primus", "zyx", tmp_path, weights=str(tmp_path / "w.pt"))
    plans = {"plans": {"configurations": {"a": {"patch_size": [6, 12, 16]}}}, "configuration": "a"}
    network = {"array_order": "zyx", "lift": None}
    run = {"inputs": {"augmentation": {"patch_size": list(SIZE)}}}
    for content in (
        {"network_weights": weights, "init_args": plans},
        {"model": weights, "spec": {"model": {"encoder": network}}, "resolved": run},
    ):
        torch.save(content, tmp_path / "w.pt")
        for size, told in ((SIZE, True), (SIZE[::-1], False)):
            order = "zyx" if told else "xyz"
            spec = msgspec.structs.replace(stated, array_order=order)
            encoder = build_encoder(spec, channels=1, size=size, load_weights=True)
            assert encoder.taken(size)["weights_shape"] == [6, 12, 16]
            own = encoder.net.state_dict()["eva.pos_embed"]
            assert torch.equal(own, weights["eva.pos_embed"])
            assert told != any('set model.encoder.array_order = "zyx"' in n for n in encoder.notes)


@pytest.mark.parametrize("order", ["xyz", "zyx"])
def test_weights_of_arrays_are_told(order: str, tmp_path: Path) -> None:
    """Of a residual encoder too, whose file says nothing else that is read."""
    one, _ = encoders("residual", tmp_path)
    file = str(tmp_path / "u.pth")
    for beside in (
        {"init_args": {"plans": {}, "configuration": "a"}},
        {"nnssl_adaptation_plan": 1},
    ):
        torch.save({"network_weights": one.float().net.state_dict(), **beside}, file)
        spec = section("residual", order, tmp_path, weights=file)
        size = SIZE if order == "zyx" else SIZE[::-1]
        notes = build_encoder(spec, channels=1, size=size, load_weights=True).notes
        assert ("zyx" in " ".join(notes)) == (order == "xyz")


RUN = f"""{VOLUMES}
[data.augmentation]
patch_size = [16, 12, 6]
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = 1
strides = [1, [1, 2, 2]]
array_order = "zyx"
[peft]
method = "lora"
{EPOCH}"""


def test_files_of_a_run_say_order_and_patch(command, tmp_path: Path) -> None:
    """Its checkpoint, its adapter and its export."""
    write_labelled(tmp_path, [blob((16, 13, 8), seed=n) for n in range(8)])
    spec = RUN.replace("ROOT", str(tmp_path))
    run = command(spec=spec).path
    export = tmp_path / "merged.safetensors"
    command("mode=infer", "infer.merge=true", f"infer.export={export}", spec=spec)
    for file in (
        run / "checkpoints" / "best.pt",
        run / "checkpoints" / "adapter.safetensors",
        export,
    ):
        assert origin_of(str(file)) == Origin("zyx", (6, 12, 16)), file


def test_images_and_clips_have_no_such_order() -> None:
    flat = ResidualEncoder(spatial_dim=2, array_order="zyx")
    assert "array_order" in dict(flat.problems())
    spec = ResidualEncoder(array_order="zyx")
    assert not list(spec.problems()) and not list(spec.sample_problems("volumes"))
    assert "array_order" in dict(spec.sample_problems("videos"))
    assert NnFoundationEncoder(checkpoint_path="a").array_order == "zyx"
    assert ResidualEncoder().array_order == PrimusEncoder().array_order == "xyz"
