"""Checkpoints as nnssl writes them: the network of their plan, weights, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import EPOCH, VOLUMES
from torch import Tensor
from volume_files import blob, write_labelled

from glovita_lib.encoder import Encoder, build_encoder, patch_size_of
from glovita_lib.encoder_nnfoundation import Plan
from glovita_lib.encoder_primus import PrimusNetwork, PrimusShape, resample
from glovita_lib.encoder_volume import ResidualNetwork
from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.spec_encoders import NnFoundationEncoder, ResidualEncoder
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import Lora

UNET = {  # ResidualEncoderUNet as DynamicArchitecturePlans.serialize() gives it
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 1]],
    "strides": [[1, 1, 1], [2, 2, 1]],
    "n_blocks_per_stage": [1, 2],
    "n_conv_per_stage_decoder": [1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.modules.activation.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
RESIDUAL = ResidualEncoder(
    features_per_stage=(4, 8),
    kernel_sizes=((3, 3, 3), (3, 3, 1)),
    strides=((1, 1, 1), (2, 2, 1)),
    n_blocks_per_stage=(1, 2),
)
MAE = {  # arguments of a masked autoencoder, as its trainer hands them to the plan
    "input_channels": 1,
    "embed_dim": 48,
    "patch_embed_size": [4, 4, 4],
    "output_channels": 1,
    "input_shape": [16, 16, 16],
    "encoder_eva_depth": 2,
    "encoder_eva_numheads": 4,
    "decoder_eva_depth": 1,
    "decoder_eva_numheads": 4,
    "patch_drop_rate": 0.75,
    "drop_path_rate": 0.1,
    "attn_drop_rate": 0.0,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
SHAPE = PrimusShape(48, 2, 4, (4, 4, 4), drop_path=0.1)


def plan(name: str, arguments=None, *, patch=(16, 16, 16), prefix: str = "", **fields):
    """An adaptation plan; `prefix` stands before its places."""
    residual = arguments is UNET or name.endswith("ResEncL") or name == "ResidualEncoderUNet"
    keys = ("encoder.stages", "encoder.stem") if residual else ("eva", "down_projection")
    projection = ["encoder.stem.convs.0.conv"] if residual else ["down_projection.proj"]
    return {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"] if residual else None,
        },
        "pretrain_plan": {"configurations": {"onemmiso": {"patch_size": list(patch)}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [8, 8, 12],
        "key_to_encoder": f"{prefix}{keys[0]}",
        "key_to_stem": f"{prefix}{keys[1]}",
        "keys_to_in_proj": [f"{prefix}{key}" for key in projection],
        "key_to_lpe": None if residual else f"{prefix}eva.pos_embed",
        **fields,
    }


def unet_weights() -> dict[str, Tensor]:
    """Encoder, twice named, once more in the decoder, and a decoder."""
    torch.manual_seed(1)
    weights = {"decoder.seg_layers.0.weight": torch.randn(1, 4, 1, 1, 1)}
    for name, tensor in ResidualNetwork(RESIDUAL, 1).state_dict().items():
        value = torch.randn_like(tensor)
        other = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        for place in ("encoder", "decoder.encoder"):
            weights |= {f"{place}.{name}": value, f"{place}.{other}": value}
    return weights


def mae_weights(prefix: str = "") -> dict[str, Tensor]:
    """A Primus with what pretraining adds to it."""
    torch.manual_seed(1)
    state = PrimusNetwork(SHAPE, 1, (4, 4, 4)).state_dict()
    weights = {f"{prefix}{name}": torch.randn_like(tensor) for name, tensor in state.items()}
    extra = {"mask_token": torch.zeros(1, 1, 48), "decoder.blocks.0.w": torch.randn(3, 3)}
    return weights | extra


def save(path: Path, content) -> str:
    torch.save(content, path)
    return str(path)


def checkpoint(folder: Path, weights, adaptation) -> str:
    content = {"network_weights": weights, "nnssl_adaptation_plan": adaptation, "citations": []}
    return save(folder / "checkpoint_final.pth", content)


def make(path: str, size=None, channels: int = 1, *, load: bool = True, **fields) -> Encoder:
    spec = NnFoundationEncoder(checkpoint_path=path, **fields)
    return build_encoder(spec, channels=channels, size=size, load_weights=load).eval()


def test_a_residual_unet_gives_its_encoder(tmp_path: Path) -> None:
    weights = unet_weights()
    path = checkpoint(tmp_path, weights, plan("ResidualEncoderUNet", UNET))
    assert Plan(path).architecture == RESIDUAL
    assert patch_size_of(NnFoundationEncoder(checkpoint_path=path)) == (12, 8, 8)
    encoder = make(path)
    state = encoder.net.state_dict()
    assert all(torch.equal(tensor, weights[f"encoder.{name}"]) for name, tensor in state.items())
    assert encoder(torch.randn(1, 1, 12, 8, 8)).grid == (12, 4, 4)
    spread = make(path, channels=4).net.state_dict()["stem.convs.0.conv.weight"]
    expected = weights["encoder.stem.convs.0.conv.weight"].expand(-1, 4, -1, -1, -1) / 4
    torch.testing.assert_close(spread, expected)
    untrained = make(path, pretrained=False).net.state_dict()
    assert not torch.equal(untrained["stem.convs.0.conv.weight"], spread[:, :1])


@pytest.mark.parametrize("prefix", ["", "context_encoder."])
@pytest.mark.parametrize("name", ["PrimusX", "dynamic_network_architectures.x.Primus"])
def test_a_masked_autoencoder_gives_its_encoder(name: str, prefix: str, tmp_path: Path) -> None:
    """The position embedding of 4 x 4 x 4 patches is resampled to the recommended 2 x 2 x 3."""
    weights = mae_weights(prefix)
    path = checkpoint(tmp_path, weights, plan(name, MAE, prefix=prefix))
    assert Plan(path).architecture == SHAPE
    state = make(path).net.state_dict()
    positions = state.pop("eva.pos_embed")
    expected = resample(weights[f"{prefix}eva.pos_embed"], (4, 4, 4), (2, 2, 3))
    torch.testing.assert_close(positions, expected)
    assert all(torch.equal(tensor, weights[f"{prefix}{n}"]) for n, tensor in state.items())


def test_the_patch_of_the_position_embedding_is_found(tmp_path: Path) -> None:
    """Where the plan names a wrong patch, and where there was a CLS token."""
    weights = mae_weights()
    cube = weights["eva.pos_embed"]
    wrong = plan("PrimusX", {**MAE, "input_shape": None}, patch=(24, 24, 8))
    found = make(checkpoint(tmp_path, weights, wrong)).net.state_dict()["eva.pos_embed"]
    torch.testing.assert_close(found, resample(cube, (4, 4, 4), (2, 2, 3)))
    weights["eva.cls_token"] = torch.randn(1, 1, 48)
    weights["eva.pos_embed"] = torch.cat([torch.randn(1, 1, 48), cube], 1)
    right = plan("PrimusX", MAE, pretrain_patch_size=[16, 16, 16])
    found = make(checkpoint(tmp_path, weights, right)).net.state_dict()["eva.pos_embed"]
    torch.testing.assert_close(found, resample(cube, (4, 4, 4), (2, 2, 3)))
    weights["eva.pos_embed"] = torch.randn(1, 61, 48)
    with pytest.raises(UserError, match="of 60 patches"):
        make(checkpoint(tmp_path, weights, right))


@pytest.mark.parametrize("prefix", ["", "student.", "module.net."])
def test_register_tokens_are_those_beside_the_encoder(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = PrimusNetwork(replace(SHAPE, registers=3), 1, (4, 4, 4)).state_dict()
    weights = {f"{prefix}{name}": torch.randn_like(tensor) for name, tensor in state.items()}
    adaptation = plan("Primus", {**MAE, "num_register_tokens": 3}, prefix=prefix)
    encoder = make(checkpoint(tmp_path, weights, adaptation), (16, 16, 16))
    found = encoder.net.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, weights[f"{prefix}{name}"]) for name, tensor in found.items())
    assert encoder(torch.randn(1, 1, 16, 16, 16)).n_prefix == 3
    del weights[f"{prefix}register_tokens"]
    with pytest.raises(UserError, match="register_tokens"):
        make(checkpoint(tmp_path, weights, adaptation), (16, 16, 16))


def test_a_position_embedding_of_two_grids_is_asked_about(tmp_path: Path) -> None:
    """Where the plan names a patch of another number of patches."""
    weights = mae_weights()
    other = {"patch": (24, 24, 24), "recommended_downstream_patchsize": None}
    path = checkpoint(tmp_path, weights, plan("PrimusX", {**MAE, "input_shape": None}, **other))
    size = (32, 16, 8)
    with pytest.raises(
        UserError, match="or of a cube of 4: name .* model.encoder.weights_shape"
    ) as e:
        make(path, size)
    assert "weights_order" not in str(e.value) and "this very model" not in str(e.value)
    for shape, grid in (((16, 16, 16), (4, 4, 4)), ((8, 16, 32), (2, 4, 8))):
        encoder = make(path, size, weights_shape=shape)
        expected = resample(weights["eva.pos_embed"], grid, (2, 4, 8))
        torch.testing.assert_close(encoder.net.state_dict()["eva.pos_embed"], expected)
        assert encoder.taken(size)["weights_shape"] == list(shape)
        assert "weights_key" not in encoder.taken(size)


def test_the_plan_alone_builds_the_network(tmp_path: Path) -> None:
    """For a run that is trained already, and without weights."""
    path = tmp_path / "adaptation_plan.json"
    path.write_text(json.dumps(plan("PrimusX", MAE)))
    encoder = make(str(path), load=False, drop_path_rate=0.4, input_shape=(8, 16, 8))
    assert encoder(torch.randn(1, 1, 8, 16, 8)).grid == (2, 4, 2)
    assert encoder.net.eva.blocks[1].drop_path1.drop_prob == pytest.approx(0.4)
    with pytest.raises(UserError, match="holds the plan alone: give the checkpoint itself"):
        make(str(path))


@pytest.mark.parametrize(("name", "width"), [("ResEncL", 320), ("NoSkipResEncL", 320)])
def test_presets_of_convolutions(name: str, width: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan(name, recommended_downstream_patchsize=[64, 64, 64])))
    assert Plan(str(path)).architecture == ResidualEncoder()
    assert make(str(path), load=False, pretrained=False).width == width


def test_presets_of_primus(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for variant, width in {"S": 396, "B": 792, "M": 864, "L": 1056}.items():
        path.write_text(json.dumps(plan(f"Primus{variant}")))
        shape = Plan(str(path)).architecture
        assert (shape.width, shape.patch, shape.drop_path) == (width, (8, 8, 8), 0.2)


def test_a_model_of_it_with_lora(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, mae_weights(), plan("PrimusX", MAE))
    spec = ModelSpec(encoder=NnFoundationEncoder(checkpoint_path=path))
    arguments = {"outputs": 2, "channels": 1, "size": (8, 8, 12), "load_weights": True}
    model = build_model(spec, Lora(rank=2), **arguments)
    assert model(torch.randn(2, 1, 8, 8, 12)).shape == (2, 2)
    trained = [name for name, p in model.encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all(".adapter." in name for name in trained)


RUN = f"""{VOLUMES}
[model.encoder]
encoder_type = "nnfoundation"
checkpoint_path = "PATH"
{EPOCH}"""


@pytest.mark.parametrize("name", ["PrimusX", "ResidualEncoderUNet"])
def test_a_trained_run_needs_the_file_no_more(name: str, command, tmp_path: Path) -> None:
    """Evaluation and extraction build the network from the plan that the checkpoint keeps."""
    write_labelled(tmp_path, [blob((8, 9, 12), seed=n) for n in range(8)])
    primus = name == "PrimusX"
    weights, arguments = (mae_weights(), MAE) if primus else (unet_weights(), UNET)
    file = Path(checkpoint(tmp_path, weights, plan(name, arguments)))
    spec = RUN.replace("ROOT", str(tmp_path)).replace("PATH", str(file))
    result = command(spec=spec)
    facts = result.json("resolved_config.json")["encoder_facts"]
    assert facts["architecture_plans"]["arch_class_name"] == name
    assert facts["recommended_downstream_patchsize"] == [8, 8, 12]
    before = result.rows()
    file.unlink()
    command("mode=infer", spec=spec)
    with open(result.path / "infer" / "predictions_test.csv", newline="") as table:
        assert list(csv.DictReader(table)) == before
    command("mode=extract", f"extract.output_dir={tmp_path / 'out'}", spec=spec)
    assert len(list((tmp_path / "out").glob("*.h5"))) == 3
    assert "does not exist" in command("name=other", spec=spec, code=2).err


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (plan("SwinUNETR"), 'architecture "SwinUNETR"; valid: ResEncL, NoSkipResEncL'),
        (plan("PrimusX"), "has no embed_dim, eva_depth"),
        ({"key_to_encoder": "eva"}, "has no nnssl_adaptation_plan with architecture_plans"),
        ([1, 2], "it is no file of nnssl"),
        (plan("ResidualEncoderUNet", {**UNET, "conv_op": "torch.nn.Conv2d"}), 'conv_op = "Conv2d"'),
        (plan("ResidualEncoderUNet", {**UNET, "nonlin": "os.system"}), 'nonlin = "system"; valid'),
        (
            plan("ResidualEncoderUNet", {**UNET, "norm_op_kwargs": {"eps": 1e-3}}),
            "norm_op_kwargs with eps = 0.001",
        ),
        (plan("ResidualEncoderUNet", {**UNET, "sideways": 3}), "does not know: sideways"),
        (plan("ResidualEncoderUNet", {**UNET, "strides": [1]}), "do not fit: strides: 1 entries"),
        (plan("ResidualEncoderUNet", {**UNET, "conv_bias": "no"}), "do not fit: .*bool"),
        (plan("PrimusX", {**MAE, "embed_dim": 50}), "50 channels, which 4 heads cannot share"),
        (plan("PrimusX", {**MAE, "embed_dim": 64}), "16 channels a head, of which rotary"),
        (plan("PrimusX", {**MAE, "patch_embed_size": 4}), "names a patch of 4, not of three"),
        (plan("PrimusX", {**MAE, "mlp_ratio": 4}), "has mlp_ratio = 4; valid: 8/3"),
    ],
)
def test_plans_that_are_refused(content, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        make(str(path), load=False)
    assert str(path) in str(caught.value)


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; .* adaptation_plan.json published"):
        make(str(tmp_path / "none.pth"))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="is damaged"):
        make(str(tmp_path / "cut.pth"))
    (tmp_path / "cut.json").write_text('{"key')
    with pytest.raises(UserError, match="is damaged"):
        make(str(tmp_path / "cut.json"))
    alien = save(tmp_path / "alien.pth", {"nnssl_adaptation_plan": np.random.default_rng})
    with pytest.raises(UserError, match="other things than tensors and plain values"):
        make(alien)


def test_weights_that_are_refused(tmp_path: Path) -> None:
    adaptation = plan("ResidualEncoderUNet", UNET)
    weights = unet_weights()
    with pytest.raises(UserError, match="drop_path_rate = 0.1: a Primus has it"):
        make(checkpoint(tmp_path, weights, adaptation), drop_path_rate=0.1)
    with pytest.raises(UserError, match=r"weights_shape = \[8, 8, 8\]: a Primus has it"):
        make(checkpoint(tmp_path, weights, adaptation), weights_shape=(8, 8, 8))
    with pytest.raises(UserError, match=r"input_shape = \[8, 8, 8\]: the data come in"):
        make(checkpoint(tmp_path, weights, adaptation), (8, 8, 16), input_shape=(8, 8, 8))
    moved = {**adaptation, "key_to_encoder": "net.stages", "key_to_stem": "net.stem"}
    with pytest.raises(UserError, match="holds no tensors below net.stem"):
        make(checkpoint(tmp_path, weights, moved))
    other = plan("ResidualEncoderUNet", {**UNET, "features_per_stage": [4, 6]})
    with pytest.raises(UserError, match="does not fit ResidualNetwork"):
        make(checkpoint(tmp_path, weights, other))
