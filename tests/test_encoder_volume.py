"""Encoders of volumes against dynamic-network-architectures, weights of files,
sizes, and through the model: a step of training, a strict reload."""

import importlib.util
import json
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.encoder import Encoder, build_encoder, patch_size_of, preprocess_of
from glovita_lib.encoder_aggregation import aggregate
from glovita_lib.encoder_primus import WIDTHS, PrimusNetwork, PrimusShape, build_primus, resample
from glovita_lib.encoder_volume import Block, ResidualNetwork, build_residual
from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.spec_encoders import (
    CustomEncoder,
    PrimusEncoder,
    ResidualEncoder,
)
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import FullFinetuning
from glovita_lib.weights import load_tensors

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "volume_reference.py"


def load_script():
    source = importlib.util.spec_from_file_location("volume_reference", SCRIPT)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


REFERENCE = load_script()
RECORD = json.loads(REFERENCE.FILE.read_text(encoding="utf-8"))
TINY = {"features_per_stage": (4, 8), "strides": (1, 2), "n_blocks_per_stage": 1}
TWO_BLOCKS = PrimusShape(396, 2, 6, (8, 8, 8), drop_path=0.0)


def section(**fields) -> ResidualEncoder:
    spec = msgspec.convert({**TINY, **fields}, ResidualEncoder)
    assert not list(spec.problems())
    return spec


def make(spec, size, channels: int = 1, *, weights: bool = False) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(spec, channels=channels, size=size, load_weights=weights).eval()


def volumes(*size: int, channels: int = 1) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def recorded_tensors(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights of a record, each under all the names that it has there."""
    tensors = {}
    for name, shape in shapes.items():
        first = name
        if ".all_modules." in name:
            before, _, rest = name.partition("all_modules.")
            kind = "conv" if rest.startswith("0.") else "norm"
            first = f"{before}{kind}.{rest.partition('.')[2]}"
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros((), dtype=torch.long)
        else:
            tensors[name] = REFERENCE.formula(first, tuple(shape))
    return tensors


# -------------------------------------------------------------------- the package


@pytest.mark.parametrize("name", RECORD["residual"])
def test_residual_encoders_are_those_of_the_package(name: str) -> None:
    """Strict under its names, the same output."""
    spec = section(**{**REFERENCE.SMALL, **REFERENCE.RESIDUAL[name]})
    size = (16,) * spec.spatial_dim
    encoder = build_residual(spec, name=name, channels=2, size=size).eval()
    found = RECORD["residual"][name]
    load_tensors(encoder.load_target, recorded_tensors(found["shapes"]), source=name)
    with torch.no_grad():
        output = encoder.net(REFERENCE.formula("input", (2, 2, *size)))
    torch.testing.assert_close(
        torch.tensor(REFERENCE.summary(output)), torch.tensor(found["output"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", RECORD["primus"])
def test_primus_is_that_of_the_package(name: str) -> None:
    size, registers = REFERENCE.PRIMUS[name]
    shape = PrimusShape(396, 2, 6, (8, 8, 8), drop_path=0.0, registers=registers)
    size = tuple(size)
    encoder = build_primus(
        shape, PrimusEncoder(), name=name, channels=2, size=size, stated=size
    ).eval()
    found = RECORD["primus"][name]
    load_tensors(encoder.load_target, recorded_tensors(found["shapes"]), source=name)
    with torch.no_grad():
        features = encoder(REFERENCE.formula("input", (2, 2, *size)))
    assert features.grid == tuple(side // 8 for side in size) and features.n_prefix == registers
    torch.testing.assert_close(
        torch.tensor(REFERENCE.summary(features.tokens)),
        torch.tensor(found["output"]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_names_and_shapes_of_the_published_networks() -> None:
    """The L preset, under both names that the package gives, and Primus S, B, M and L."""
    with torch.device("meta"):
        shapes = REFERENCE.shapes_of(ResidualNetwork(ResidualEncoder(), 1))
        twice = {
            name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1."): shape
            for name, shape in shapes.items()
        }
        assert REFERENCE.digest({**shapes, **twice}) == RECORD["digests"]["ResEncL"]
        for variant, (width, depth, heads) in WIDTHS.items():
            shape = PrimusShape(width, depth, heads, (8, 8, 8), drop_path=0.0)
            shapes = REFERENCE.shapes_of(PrimusNetwork(shape, 1, (4, 4, 4)))
            assert REFERENCE.digest(shapes) == RECORD["digests"][f"Primus{variant}"], variant


def test_the_record_is_what_the_installed_package_says() -> None:
    pytest.importorskip("dynamic_network_architectures")
    pytest.importorskip("einops")
    assert not REFERENCE.differences(REFERENCE.record(), RECORD)


@torch.no_grad()
def test_initial_weights_are_those_of_nnunet() -> None:
    """He's deviation for the leaky activation, blocks that begin as their skip."""
    net = ResidualNetwork(section(features_per_stage=(32, 64)), 1)
    kernel = net.stages[1].blocks[0].conv2.conv.weight  # (64, 64, 3, 3, 3)
    expected = (2 / (1 + 0.01**2) / (64 * 27)) ** 0.5
    assert abs(float(kernel.std()) / expected - 1) < 0.02
    block = net.stages[1].blocks[0]
    x = torch.randn(1, 32, 8, 8, 8)
    torch.testing.assert_close(block(x), F.leaky_relu(block.skip(x), 0.01))
    assert all(not float(m.last.norm.weight.abs().sum()) for m in net.modules() if type(m) is Block)
    eva = PrimusNetwork(PrimusShape(48, 4, 4, (4, 4, 4), drop_path=0.0), 1, (4, 4, 4)).eva
    deviations = [float(block.mlp.fc2.weight.std()) for block in eva.blocks]
    for depth, deviation in enumerate(deviations, 1):
        assert abs(deviation * (2 * depth) ** 0.5 / 0.02 - 1) < 0.05
    torch.testing.assert_close(eva.blocks[0].gamma_1, torch.full((48,), 0.1))


# -------------------------------------------------------------------- through the model

FAMILIES = {
    "residual": (section(), (8, 8, 12)),
    "bottleneck": (section(block_type="bottleneck", bottleneck_channels=2), (8, 8, 8)),
    "pooled": (section(pool_type="max", squeeze_excitation=True, norm="batch"), (9, 8, 8)),
    "images": (section(spatial_dim=2, dropout_p=0.1, stochastic_depth_p=0.1), (8, 12)),
    "primus": (PrimusEncoder(patch_drop_rate=0.3, drop_path_rate=0.1), (16, 16, 24)),
}


BLOCKS = {"residual": 2, "bottleneck": 2, "pooled": 2, "images": 2, "primus": 12}


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_a_step_saves_and_reloads_strictly(name: str, tmp_path: Path) -> None:
    spec, size = FAMILIES[name]

    def fresh():
        torch.manual_seed(0)
        arguments = {"outputs": 3, "channels": 2, "size": size, "load_weights": False}
        return build_model(ModelSpec(encoder=spec), FullFinetuning(), **arguments)

    model = fresh()
    assert len(model.encoder.blocks()) == BLOCKS[name]  # for learning rates by depth and for PEFT
    depths = list(model.encoder.depths().of.values())
    assert depths[0] == 0 and {*range(1, BLOCKS[name] + 1)} <= {*depths}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = volumes(*size, channels=2), torch.tensor([0, 2])
    for _ in range(3):  # blocks begin as their skip and pass gradients on behind the first step
        F.cross_entropy(model.train()(x), y).backward()
        unread = [n for n, p in model.named_parameters() if p.grad is None]
        assert not unread
        idle = [n for n, p in model.named_parameters() if not p.grad.any()]
        optimizer.step()
        optimizer.zero_grad()
    if name not in ("primus", "images"):  # they drop whole blocks at random
        assert all(n.endswith("conv.bias") for n in idle), idle  # a norm is behind them
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = fresh()
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
        features = model.features(x)
    assert model.aggregation == "avg" and not features.has_cls
    torch.testing.assert_close(
        aggregate(features, "avg"), model.encoder.pool(model.encoder.forward_features(x))
    )


@pytest.mark.usefixtures("small_primus")
def test_patches_are_dropped_in_training_alone() -> None:
    """A sample keeps its own share of them, each with the position it had."""
    encoder = make(PrimusEncoder(patch_drop_rate=0.5), (16, 16, 16))
    x = volumes(16, 16, 16)
    assert encoder(x).tokens.shape[1] == 8 and encoder(x).grid == (2, 2, 2)
    features = encoder.train()(x)
    assert features.tokens.shape[1] == 4 and features.grid is None
    eva = encoder.net.eva
    eva.blocks = nn.ModuleList()
    eva.norm = nn.Identity()
    whole, kept = encoder.eval().net(x), encoder.train().net(x)  # tokens with their positions
    places = (kept[:, :, None] - whole[:, None]).abs().amax(-1).argmin(-1)  # (B, 4)
    torch.testing.assert_close(kept, whole.gather(1, places[..., None].expand_as(kept)))
    assert all(len(set(row.tolist())) == 4 for row in places)


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_kept_patches_are_those_of_whole_attention_to_them_alone(registers: int) -> None:
    """Each with the rotation of its place; every sample draws its own."""
    shape = PrimusShape(
        48, 2, 4, (4, 4, 4), drop_path=0.0, patch_drop=0.5, registers=registers, layer_scale=None
    )
    torch.manual_seed(0)
    net = PrimusNetwork(shape, 1, (3, 3, 3))
    for block in net.eva.blocks:  # attention that differs from place to place
        for projection in (block.attn.q_proj, block.attn.k_proj):
            projection.weight.mul_(20)
    inner, drawn = net.eva.kept, []
    net.eva.kept = lambda x: drawn.append(inner(x)) or drawn[-1]
    x = volumes(12, 12, 12)
    found = net.train()(x)  # (2, R + 13, D)
    (kept,) = drawn
    sets = [set(row.tolist()) for row in kept]
    assert len(sets[0]) == len(sets[1]) == 13 and sets[0] != sets[1]
    tokens: list[Tensor] = []
    hook = net.eva.blocks[0].register_forward_pre_hook(lambda m, i: tokens.append(i[0]))
    net.eval()(x)
    hook.remove()
    first = torch.arange(registers).expand(2, -1)
    places = torch.cat([first, registers + kept], 1)  # (2, R + 13)
    seen = torch.zeros(2, registers + 27, dtype=torch.bool).scatter(1, places, True)
    whole = tokens[0]
    for block in net.eva.blocks:
        whole = block(whole, rope=net.eva.rope, attn_mask=seen[:, None, None])
    whole = net.eva.norm(whole)
    expected = whole.gather(1, places[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [2, 3])
@torch.no_grad()
def test_channels_are_dropped_behind_kernels_at_their_rate(axes: int) -> None:
    """In training, in the stem and the first convolution of each block; the others are scaled."""
    rate, size = 0.3, (4,) * axes
    wide = {"spatial_dim": axes, "features_per_stage": (64, 128)}
    net = make(section(dropout_p=rate, **wide), size).net
    given: dict[str, Tensor] = {}
    normed: dict[str, Tensor] = {}
    for name, part in net.named_modules():
        if name.endswith(".conv"):
            part.register_forward_hook(lambda m, i, o, n=name[:-5]: given.update({n: o}))
        elif name.endswith(".norm"):
            part.register_forward_pre_hook(lambda m, i, n=name[:-5]: normed.update({n: i[0]}))
    x = torch.randn(16, 1, *size)
    output = net(x)
    assert all(torch.equal(given[name], normed[name]) for name in given)
    without = make(section(**wide), size).net
    without.load_state_dict(net.state_dict())
    assert torch.equal(without(x), output)
    net.train()(x)
    shares = {}
    for name, maps in given.items():
        kept = normed[name].flatten(2).abs().amax(2) > 0  # (B, C)
        shape = (*kept.shape, *(1,) * axes)
        scaled = maps / (1 - rate) if not kept.all() else maps
        torch.testing.assert_close(normed[name], scaled * kept.view(shape))
        if not kept.all():
            shares[name] = 1 - kept.double().mean().item()
    firsts = [f"stages.{stage}.blocks.0.conv1" for stage in (0, 1)]
    assert list(shares) == ["stem.convs.0", *firsts]
    for share, width in zip(shares.values(), (64, 64, 128), strict=True):
        assert abs(share - rate) < 4 * (rate * (1 - rate) / (16 * width)) ** 0.5


@torch.no_grad()
def test_training_skips_blocks_of_samples_at_their_rate() -> None:
    rate, count = 0.25, 600
    (block,) = (
        make(section(stochastic_depth_p=rate, features_per_stage=(4,), strides=(1,)), (4, 4, 4))
        .net.stages[0]
        .blocks
    )
    nn.init.ones_(block.last.norm.weight)  # blocks begin as their skip
    x = torch.randn(count, 4, 4, 4, 4)
    change, skipped = block.conv2(block.conv1(x)), block.nonlin(x.clone())
    torch.testing.assert_close(block(x), block.nonlin(change + x))
    torch.manual_seed(0)
    found = block.train()(x)
    left_out = (found - skipped).flatten(1).abs().amax(1) < 1e-6
    kept = block.nonlin(change / (1 - rate) + x)
    torch.testing.assert_close(found[~left_out], kept[~left_out])
    assert abs(left_out.double().mean() - rate) < 4 * (rate * (1 - rate) / count) ** 0.5


def test_a_primus_takes_other_sizes_as_if_it_were_built_for_them() -> None:
    sizes = {(2, 2, 3): (16, 16, 24), (4, 2, 3): (32, 16, 24)}
    small, large = (
        build_primus(TWO_BLOCKS, PrimusEncoder(), name="p", channels=1, size=size).eval()
        for size in sizes.values()
    )
    state = small.net.state_dict()
    state["eva.pos_embed"] = resample(state["eva.pos_embed"], *sizes)
    large.net.load_state_dict(state)
    x = volumes(32, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(small(x).tokens, large(x).tokens)
    assert small(x).grid == (4, 2, 3)


def test_positions_are_resampled_along_each_axis() -> None:
    """A ramp stays a ramp between the outermost centres, registers stay."""
    old, new = (4, 5, 6), (8, 10, 3)
    places = torch.meshgrid(*(torch.arange(n) + 0.5 for n in old), indexing="ij")
    ramps = torch.stack([place / n for place, n in zip(places, old, strict=True)], -1)
    first = torch.randn(1, 2, 3)
    found = resample(torch.cat([first, ramps.reshape(1, -1, 3)], 1), old, new)
    assert torch.equal(found[:, :2], first)
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        centres = (torch.arange(after) + 0.5) / after
        line = found[0, 2:].reshape(*new, 3).movedim(axis, 0)[:, 0, 0, axis]
        expected = centres.clamp(0.5 / before, 1 - 0.5 / before)
        torch.testing.assert_close(line, expected)


# -------------------------------------------------------------------- weights of files


def test_a_unet_checkpoint_gives_its_encoder(tmp_path: Path) -> None:
    """As nnU-Net saves it: two names for each convolution, the encoder once more in the decoder."""
    spec = section()
    source = make(spec, (8, 8, 8)).net.state_dict()
    torch.manual_seed(1)
    weights = {}
    for name, tensor in source.items():
        alias = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        value = torch.randn_like(tensor)
        for place in ("encoder", "decoder.encoder"):
            weights |= {f"{place}.{name}": value, f"{place}.{alias}": value}
    weights["decoder.seg_layers.0.weight"] = torch.randn(2, 4, 1, 1, 1)
    torch.save({"network_weights": weights, "current_epoch": 3}, tmp_path / "u.pth")
    encoder = make(section(weights=str(tmp_path / "u.pth")), (8, 8, 8), weights=True)
    assert all(torch.equal(t, weights[f"encoder.{n}"]) for n, t in encoder.net.state_dict().items())
    del weights["encoder.stages.1.blocks.0.conv2.norm.weight"]
    del weights["decoder.encoder.stages.1.blocks.0.conv2.norm.weight"]
    torch.save(weights, tmp_path / "alias.pth")  # the other name is enough
    make(section(weights=str(tmp_path / "alias.pth")), (8, 8, 8), weights=True)
    for name in [n for n in weights if "stages.1.blocks.0.conv2" in n]:
        del weights[name]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(UserError, match="stages.1.blocks.0.conv2.conv.weight"):
        make(section(weights=str(tmp_path / "less.pth")), (8, 8, 8), weights=True)


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize("kind", ["residual", "primus"])
def test_weights_of_one_channel_are_spread(kind: str, tmp_path: Path) -> None:
    """Equal channels give what the one gave."""
    size = (16, 16, 16)

    def spec(**fields):
        return section(**fields) if kind == "residual" else PrimusEncoder(**fields)

    one = make(spec(), size)
    torch.save(one.net.state_dict(), tmp_path / "one.pt")
    three = make(spec(weights=str(tmp_path / "one.pt")), size, channels=3, weights=True)
    x = volumes(*size)
    with torch.no_grad():
        torch.testing.assert_close(three(x.expand(-1, 3, -1, -1, -1)).tokens, one(x).tokens)
    torch.save(three.net.state_dict(), tmp_path / "three.pt")
    with pytest.raises(
        UserError, match="it takes 3 channels, the input has 2; only weights of one"
    ):
        make(spec(weights=str(tmp_path / "three.pt")), size, channels=2, weights=True)


@pytest.mark.usefixtures("small_primus")
def test_position_embeddings_of_files_are_resampled(tmp_path: Path) -> None:
    file = str(tmp_path / "p.pt")
    cube = make(PrimusEncoder(), (32, 32, 32)).net.state_dict()
    torch.save(cube, file)
    read = make(PrimusEncoder(weights=file), (16, 16, 24), weights=True)
    assert read.taken((16, 16, 24))["weights_shape"] == [32, 32, 32]
    fitted = read.net.state_dict()
    expected = resample(cube["eva.pos_embed"], (4, 4, 4), (2, 2, 3))
    torch.testing.assert_close(fitted["eva.pos_embed"], expected)
    box = make(PrimusEncoder(), (16, 16, 24)).net.state_dict()
    torch.save(box, file)
    with pytest.raises(UserError, match="of 12 patches, which are no cube: name the voxels"):
        make(PrimusEncoder(weights=file), (32, 32, 32), weights=True)
    spec = PrimusEncoder(weights=file, weights_shape=(16, 16, 24))
    fitted = make(spec, (32, 32, 32), weights=True).net.state_dict()
    expected = resample(box["eva.pos_embed"], (2, 2, 3), (4, 4, 4))
    torch.testing.assert_close(fitted["eva.pos_embed"], expected)
    spec = PrimusEncoder(weights=file, weights_shape=(16, 16, 16))
    with pytest.raises(
        UserError, match="of 12 patches, and model.encoder.weights_shape has 8"
    ) as e:
        make(spec, (32, 32, 32), weights=True)
    assert "weights_order" not in str(e.value)


SMALL = {"patch_embed_size": (4, 4, 4)}
GRIDS = [  # of the file, of the input, what is asked
    ((4, 4, 4), (2, 4, 8), "of the input's 2 x 4 x 8, in this or another order, or of a cube of 4"),
    ((2, 3, 4), (4, 3, 2), "of the input's 4 x 3 x 2, in this or another order: name the voxels"),
    ((2, 3, 4), (2, 3, 4), "of the input's 2 x 3 x 4, in this or another order: name the voxels"),
]


def voxels(grid):
    return tuple(4 * side for side in grid)


def of_nnunet(grid, weights):
    """A checkpoint whose configuration inherits its patch."""
    plans = {"3d_fullres": {"patch_size": list(voxels(grid))}, "large": {"inherits_from": "base"}}
    plans["base"] = {"batch_size": 3, "inherits_from": "3d_fullres"}
    facts = {"plans": {"configurations": plans}, "configuration": "large", "fold": 0}
    return {"network_weights": weights, "init_args": {**facts, "device": torch.device("cpu")}}


def of_a_run(grid, weights, *, windows: bool):
    """A checkpoint of this program."""
    lift = {"lift": "windows", "windows": {"size": list(voxels(grid))}}
    section = {"array_order": "xyz", "lift": None, "input_shape": None} | (lift if windows else {})
    patch = [64, 64, 64] if windows else list(voxels(grid))
    resolved = {"inputs": {"augmentation": {"patch_size": patch}}}
    named = {f"encoder.net.{name}": tensor for name, tensor in weights.items()}
    return {"model": named, "spec": {"model": {"encoder": section}}, "resolved": resolved}


FILES = {
    "nnU-Net": of_nnunet,
    "run": lambda *file: of_a_run(*file, windows=False),
    "run of windows": lambda *file: of_a_run(*file, windows=True),
}


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize(("old", "new", "asked"), GRIDS)
def test_a_position_embedding_of_two_grids_is_asked_about(old, new, asked, tmp_path: Path) -> None:
    """Unless the spec, nnU-Net's plans or the run of the file say of which it is."""
    file = str(tmp_path / "p.pt")
    weights = make(PrimusEncoder(**SMALL), voxels(old)).net.state_dict()
    expected = resample(weights["eva.pos_embed"], old, new)
    torch.save(weights, file)
    beside = {"mask_token": torch.zeros(1, 1, 396), "up_projection.weight": torch.ones(3)}
    torch.save({"network_weights": weights | beside}, file)
    with pytest.raises(UserError, match=asked) as caught:
        make(PrimusEncoder(**SMALL, weights=file), voxels(new), weights=True)
    assert "mask_token" not in str(caught.value) and "\n" not in str(caught.value)
    stated = PrimusEncoder(**SMALL, weights=file, weights_shape=voxels(old))
    found = make(stated, voxels(new), weights=True)
    torch.testing.assert_close(found.net.state_dict()["eva.pos_embed"], expected)
    for kind, content in FILES.items():
        torch.save(content(old, weights), file)
        found = make(PrimusEncoder(**SMALL, weights=file), voxels(new), weights=True)
        fitted = found.net.state_dict()["eva.pos_embed"]
        torch.testing.assert_close(fitted, expected, msg=lambda text, kind=kind: f"{kind}: {text}")
        assert found.taken(voxels(new))["weights_shape"] == list(voxels(old))


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize(
    "facts",
    [
        {"init_args": {"plans": {"configurations": {"2d": {}}}, "configuration": "2d"}},
        {"init_args": {"plans": {"configurations": {"2d": {"patch_size": [8, 8]}}},
                       "configuration": "2d"}},
        {"init_args": {"plans": {"configurations": {"a": {"inherits_from": "a"}}},
                       "configuration": "a"}},
        {"init_args": None},
        {"spec": {"model": {}}, "resolved": 3},
    ],
)  # fmt: skip
def test_files_that_say_nothing_of_their_patch_are_of_cubes(facts, tmp_path: Path) -> None:
    weights = make(PrimusEncoder(**SMALL), (8, 8, 8)).net.state_dict()
    torch.save({"network_weights": weights, **facts}, tmp_path / "p.pt")
    spec = PrimusEncoder(**SMALL, weights=str(tmp_path / "p.pt"))
    assert make(spec, (8, 12, 16), weights=True).taken((8, 12, 16))["weights_shape"] == [8, 8, 8]


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize(
    "prefix",
    [
        "module._orig_mod.",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("", "module.")),
    ],
)
def test_a_primus_of_segmentation_gives_its_encoder(tmp_path: Path, prefix: str) -> None:
    """nnU-Net's checkpoint: the decoder and the token of masks beside the encoder's names."""
    net = make(PrimusEncoder(), (16, 16, 16)).net
    for parameter in net.parameters():
        parameter.data += 0.1
    beside = {"up_projection.decode.0.0.weight": torch.ones(3), "mask_token": torch.ones(1, 1, 396)}
    named = {prefix + name: tensor for name, tensor in {**net.state_dict(), **beside}.items()}
    torch.save({"network_weights": named, "current_epoch": 1}, tmp_path / "p.pth")
    spec = PrimusEncoder(weights=str(tmp_path / "p.pth"))
    loaded = make(spec, (16, 16, 16), weights=True).net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())
    torch.save({"network_weights": {**named, prefix + "stem.weight": torch.ones(1)}}, spec.weights)
    with pytest.raises(UserError, match="stem.weight"):
        make(spec, (16, 16, 16), weights=True)


# -------------------------------------------------------------------- sizes and mistakes


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (
            section(),
            (8, 9, 8),
            "8 x 9 x 8 is no multiple of 2 x 2 x 2, the product .* nearest 8 x 8 x 8",
        ),
        (section(), (2, 2, 2), 'a single place, over which norm = "instance" has nothing'),
        (section(spatial_dim=2), (9, 8), r"data.augmentation.image_size: .* nearest 8 x 8"),
        (section(), (8, 8), "spatial_dim = 3: the inputs have 2 axes"),
        (PrimusEncoder(), (16, 20, 16), "patches of 8 x 8 x 8 voxels, not 16 x 20 x 16; nearest"),
        (PrimusEncoder(input_shape=(16, 16, 16)), (16, 16, 24), "the data come in .16, 16, 24."),
        (
            PrimusEncoder(input_channels=2),
            (16, 16, 16),
            "input_channels: 2, but the samples have 1 channels",
        ),
    ],
)
def test_what_does_not_fit_is_told(spec, size, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(spec, size)


def test_poolings_make_steps_of_any_size() -> None:
    assert make(section(pool_type="avg"), (9, 11, 8))(volumes(9, 11, 8)).grid == (4, 5, 4)
    assert make(section(norm="batch"), (2, 2, 2))(volumes(2, 2, 2)).grid == (1, 1, 1)


@pytest.mark.usefixtures("small_primus")
def test_default_patches() -> None:
    assert patch_size_of(PrimusEncoder(input_shape=(16, 24, 32))) == (16, 24, 32)
    for spec in (
        PrimusEncoder(),
        section(),
        CustomEncoder(target="a:b"),
    ):
        assert patch_size_of(spec) is None
    assert preprocess_of(section(spatial_dim=2), channels=1).image_size is None
    assert make(PrimusEncoder(), None)(volumes(16, 16, 16)).grid == (2, 2, 2)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"strides": (1, 2, 2)}, "strides"),
        ({"kernel_sizes": (3, (3, 3))}, "kernel_sizes"),
        ({"kernel_sizes": (3, (3, 2, 3))}, "kernel_sizes"),
        ({"features_per_stage": ()}, "features_per_stage"),
        ({"block_type": "bottleneck"}, "bottleneck_channels"),
        ({"block_type": "bottleneck", "bottleneck_channels": (2,)}, "bottleneck_channels"),
        ({"spatial_dim": 2, "strides": (1, (2, 2, 2))}, "strides"),
    ],
)
def test_sections_that_make_no_network(fields, key: str) -> None:
    spec = msgspec.convert({**TINY, **fields}, ResidualEncoder)
    assert key in [name for name, _ in spec.problems()]
