"""Grad-CAM against the formula written out with hooks in float64, maps on pixels and voxels,
planted cubes found in world coordinates, and what cannot be asked."""

import csv
from pathlib import Path

import h5py
import msgspec
import nibabel
import numpy as np
import pytest
import torch
from small_runs import VOLUMES
from torch import nn
from volume_files import ORIENTATIONS, affine_of, blob, write_nifti

from glovita_lib.augment_patch import Volumes, WindowedVolumes, WindowGrid
from glovita_lib.errors import UserError
from glovita_lib.grad_cam import HeatMap, clip_map, grad_cam, heat_values, on_input
from glovita_lib.model import build_model
from glovita_lib.objectives import HeadOutput
from glovita_lib.spec_encoders import (
    PrimusEncoder,
    ResidualEncoder,
    TimmEncoder,
    TorchvisionEncoder,
    TorchvisionVideoEncoder,
)
from glovita_lib.spec_lift import Inflation, Slices, Windows
from glovita_lib.spec_model import AbmilHead, ModelSpec
from glovita_lib.spec_peft import FullFinetuning, Peft

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def timm(name, **fields):
    return TimmEncoder(type=name, pretrained=False, **fields)


def model_of(encoder, size, *, method=None, head=None, peft=None, channels=1):
    torch.manual_seed(0)
    heads = {} if head is None else {"head": head}
    spec = ModelSpec(encoder=encoder, feature_aggregation_method=method, **heads)
    model = build_model(
        spec, peft or FullFinetuning(), outputs=3, channels=channels, size=size, load_weights=True
    )
    for part in model.modules():  # norms that have seen data, adapters that have learnt
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def sample(*size, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, channels, *size, generator=generator).double()


def by_hand(model, x, output, layer, places):
    """The formula with hooks on a layer whose output, or its first argument, is the map.

    Args:
        places: of a tensor of the layer -> (n, N, K).
    """
    kept = {}

    def keep(module, inputs, result):
        kept["map"] = result
        result.register_hook(lambda gradient: kept.__setitem__("slope", gradient))

    def keep_input(module, inputs):
        value = inputs[0].clone().requires_grad_()
        kept["map"] = value
        value.register_hook(lambda gradient: kept.__setitem__("slope", gradient))
        return (value, *inputs[1:])

    module, of_input = layer
    if model.encoder_is_frozen:  # and so outside autograd
        model.requires_grad_(True)
        model.refresh()
    handle = (
        module.register_forward_pre_hook(keep_input)
        if of_input
        else module.register_forward_hook(keep)
    )
    HeadOutput.of(model.eval()(x)).logits[0, output].backward()
    handle.remove()
    activation, slope = (places(kept[name].detach()).numpy() for name in ("map", "slope"))
    found = np.zeros(activation.shape[:2])
    for n, (a, g) in enumerate(zip(activation, slope, strict=True)):
        alpha = [g[:, k].sum() / len(g) for k in range(a.shape[1])]
        for i in range(len(a)):
            found[n, i] = max(0.0, sum(w * v for w, v in zip(alpha, a[i], strict=True)))
    return found


def of_map(x):
    return x.flatten(2).transpose(1, 2)


CASES = {
    "resnet": (timm("test_resnet"), (32, 48), {}, "layer4", of_map),
    "efficientnet": (timm("test_efficientnet"), (32, 32), {}, "bn2", of_map),
    "mobilenet": (
        TorchvisionEncoder(type="mobilenet_v3_small", pretrained=False), (64, 64), {}, "features",
        of_map,
    ),
    "vit cls": (timm("test_vit", model_kwargs=VIT), (16, 24), {}, "blocks.1 <", lambda x: x[:, 1:]),
    "vit avg": (
        timm("test_vit", model_kwargs=VIT), (16, 24), {"method": "avg"}, "norm", lambda x: x[:, 1:]
    ),
    "vit joint": (
        timm("test_vit", model_kwargs=VIT), (16, 24), {"method": "joint"}, "blocks.1 <",
        lambda x: x[:, 1:],
    ),
    "vit bag": (
        timm("test_vit", model_kwargs=VIT), (16, 24), {"head": AbmilHead()}, "norm",
        lambda x: x[:, 1:],
    ),
    "registers": (
        timm(
            "vit_small_patch16_dinov3",
            model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 2},
        ),
        (32, 48), {"method": "avg"}, "norm", lambda x: x[:, 5:],
    ),
    "swin": (
        timm("swin_tiny_patch4_window7_224",
             model_kwargs={"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}),
        (56, 56), {}, "norm", lambda x: x.flatten(1, 2),
    ),
    "residual": (
        ResidualEncoder(features_per_stage=(4, 8), strides=(1, 2), n_blocks_per_stage=1,
                        kernel_sizes=3),
        (8, 12, 10), {}, "stages.1", of_map,
    ),
    "primus": (
        PrimusEncoder(), (16, 24, 8), {}, "eva",
        lambda x: x,
    ),
    "windows": (
        ResidualEncoder(features_per_stage=(4, 8), strides=(1, 2), n_blocks_per_stage=1,
                        kernel_sizes=3, lift="windows", windows=Windows(size=(8, 6, 8))),
        (12, 10, 8), {"head": AbmilHead()}, "stages.1", of_map,
    ),
    "video": (
        TorchvisionVideoEncoder(type="r3d_18", pretrained=False), (32, 16, 16), {}, "layer4",
        lambda x: of_map(x.movedim(2, 4)),
    ),
    "inflated": (
        timm("test_resnet", lift="inflate", inflation=Inflation(axis="y")), (32, 40, 32), {},
        "layer4", lambda x: of_map(x.movedim(4, 3)),
    ),
    "slices of a CNN": (
        timm("test_resnet", lift="slices", slices=Slices(axis="x")), (4, 32, 48), {}, "layer4",
        of_map,
    ),
    "slices of a ViT": (
        timm("test_vit", model_kwargs=VIT, lift="slices", slices=Slices(stride=3)), (16, 24, 9),
        {"head": AbmilHead()}, "blocks.1 <", lambda x: x[:, 1:],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize("case", CASES)
def test_maps_are_those_of_the_formula(case):
    encoder, size, options, name, places = CASES[case]
    model, x = model_of(encoder, size, **options), sample(*size)
    trains = [p.requires_grad for p in model.parameters()]
    outputs = [grad_cam(model, x, output) for output in range(3)]
    output = max(range(3), key=lambda number: outputs[number][0].max())
    found, logit = outputs[output]
    assert abs(logit - HeadOutput.of(model(x)).logits[0, output].item()) < 1e-9
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(p.grad is None for p in model.parameters())
    name, of_input = name.removesuffix(" <"), name.endswith("<")
    expected = by_hand(model, x, output, (model.encoder.net.get_submodule(name), of_input), places)
    assert found.max() > 0
    np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=1e-9, atol=1e-12 * found.max())
    single, _ = grad_cam(model.float(), x.float(), output)
    assert abs(single - found).max() < 1e-3 * found.max()
    values = heat_values(model, x[0].float(), output)
    assert values.shape == size and values.min() >= 0 and values.max() <= single.max() * (1 + 1e-12)


# ------------------------------------------------------------------------------- methods


def test_adapters_and_frozen_encoders():
    """LoRA, shallow and deep prompts, and an encoder of which nothing trains."""
    encoder = timm("test_vit", model_kwargs=VIT)
    x = sample(16, 24)
    for peft in (
        {"method": "lora", "rank": 2},
        {"method": "visual_prompt_tuning", "num_tokens": 3, "deep": False},
        {"method": "visual_prompt_tuning", "num_tokens": 3},
        {"method": "linear_probing"},
    ):
        model = model_of(encoder, (16, 24), peft=msgspec.convert(peft, Peft))
        found, _ = grad_cam(model, x, 0)
        assert found.shape == (4, 6) and found.max() > 0
        block = model.encoder.net.get_submodule("blocks.1")
        expected = by_hand(model, x, 0, (block, True), lambda tokens: tokens[:, -24:])
        np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=1e-9)


def test_vectors_have_no_map():
    model = model_of(timm("test_vit", model_kwargs=VIT), (16, 16))
    model.encoder.has_patches = False
    with pytest.raises(UserError, match="gives one vector a sample, no map"):
        grad_cam(model, sample(16, 16), 0)


# ------------------------------------------------------------------------------- on voxels


def test_places_lie_in_the_middle_of_their_voxels():
    """Linear between them, as torch interpolates; slices at theirs."""
    model = model_of(
        ResidualEncoder(features_per_stage=(4, 8), strides=(1, 2), n_blocks_per_stage=1),
        (8, 12, 10),
    )
    cells = np.random.default_rng(0).random((4, 6, 5))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(cells)[None, None], (8, 12, 10), mode="trilinear"
    )[0, 0]
    np.testing.assert_allclose(on_input(cells, model.encoder, (8, 12, 10)), expected, rtol=1e-12)
    spec = timm("test_resnet", lift="slices", slices=Slices(axis="y", stride=4))
    model = model_of(spec, (32, 10, 32))
    cells = np.arange(3.0)[:, None, None]  # of slices 0, 4, 8: at 0, 1, 2
    found = on_input(cells[:, :1, :1], model.encoder, (32, 10, 32))
    assert model.encoder.places(10).tolist() == [0, 4, 8]
    np.testing.assert_allclose(found[3, :, 5], [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_windows_of_an_evaluation_are_put_together(how):
    """Each by its part in the mean or maximum of the logits; the mean where they overlap."""
    model = model_of(
        ResidualEncoder(features_per_stage=(4, 8), strides=(1, 2), n_blocks_per_stage=1),
        (8, 8, 8),
    )
    volume, grid = sample(12, 8, 7)[0], WindowGrid((8, 8, 8), (3, 3, 3))
    windowed = WindowedVolumes(Volumes((volume,)), grid, how, 100)
    starts = grid.starts((12, 8, 7))
    assert starts.tolist() == [[0, 0, -1], [3, 0, -1], [4, 0, -1]]
    kept = {}
    handle = model.encoder.net.get_submodule("stages.1").register_forward_hook(
        lambda module, inputs, result: kept.update(map=result.retain_grad() or result)
    )
    windowed.reduced(model)[0, 2].backward()
    handle.remove()
    alpha = kept["map"].grad.mean((2, 3, 4), keepdim=True)
    maps = (alpha * kept["map"]).sum(1, keepdim=True).clamp(min=0).detach()
    fine = torch.nn.functional.interpolate(maps, (8, 8, 8), mode="trilinear")[:, 0, :, :, : 7 + 1]
    total, count = np.zeros((12, 8, 7)), np.zeros((12, 8, 7))
    for part, (x, _, _) in zip(fine.numpy(), starts.tolist(), strict=True):
        total[x : x + 8] += part[:, :, 1:]  # the first slice lies before the volume
        count[x : x + 8] += 1
    found = heat_values(model, volume, 2, windowed)
    np.testing.assert_allclose(found, total / count, rtol=1e-9, atol=1e-12)
    assert (maps.amax((1, 2, 3, 4)) > 0).sum() == (3 if how == "mean" else 1)


# ------------------------------------------------------------------------------- whole runs

CUBES = f"""{VOLUMES}
normalize = "none"
[data.augmentation]
train_policy = "default_3d_1"
patch_size = [20, 16, 12]
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [8, 16]
n_blocks_per_stage = 1
strides = [1, 2]
norm = "batch"
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 12
[optimizer]
lr = 1e-2
[dataloading]
batch_size = 8
[logger]
backend = "none"
"""
SHAPE, SPACING, ORIGIN = (24, 20, 14), (2.0, 2.0, 3.0), (-20.0, -30.0, 10.0)


def cube(number):
    """A volume, every second with a bright cube, and where it is, mm."""
    rng = np.random.default_rng(number)
    voxels = (blob(SHAPE, seed=number) * 0.01 + 5).astype(np.float32)
    affine = affine_of(SPACING, ORIGIN)
    if number % 2 == 0:
        return voxels, affine, None
    corner = [int(rng.integers(4, side - 8)) for side in SHAPE]
    voxels[tuple(slice(start, start + 4) for start in corner)] += 3
    return voxels, affine, (affine @ [*(start + 1.5 for start in corner), 1])[:3]


@pytest.fixture
def cubes(tmp_path):
    rows = []
    for number in range(44):
        voxels, affine, _ = cube(number)
        name = f"{number}.nii"
        write_nifti(tmp_path / "images" / name, voxels, affine, ORIENTATIONS[number % 8])
        split = "train" if number < 32 else "val" if number < 38 else "test"
        label = ["plain", "cube"][number % 2]
        rows.append({"path": name, "label": label, "size": 3.0 * (number % 2), "split": split})
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return CUBES.replace("ROOT", str(tmp_path))


def highest(path):
    """World coordinates of the highest value of a map, mm."""
    image = nibabel.load(path)
    values = image.get_fdata()
    place = np.unravel_index(values.argmax(), values.shape)
    return (image.affine @ [*place, 1])[:3], values


def test_planted_cubes_are_found_in_the_world(command, refused, cubes, tmp_path):
    """The maximum lies in the cube, whatever the orientation of the file; maps are of the patch
    that was cut."""
    command(spec=cubes)
    ask = ["mode=infer", "infer.use=last", "infer.heat_map_class=cube"]
    result = command(*ask, "infer.heat_maps=4", spec=cubes)
    folder = result.path / "infer"
    for place, suffix in (("heat_maps_test", ".nii.gz"), ("plots/heat_maps_test", ".png")):
        names = sorted(path.name for path in (folder / place).iterdir())
        assert names == [f"{number}{suffix}" for number in (38, 39, 40, 41)]
    for number in (39, 41):
        place, values = highest(folder / "heat_maps_test" / f"{number}.nii.gz")
        assert values.shape == (20, 16, 12)
        assert (abs(place - cube(number)[2]) < 2.5 * np.array(SPACING)).all()
    voxels, affine, where = cube(41)
    for codes in ("LPS", "SRA"):
        write_nifti(tmp_path / "new" / f"{codes}.nii.gz", voxels, affine, codes)
    for suffix in ("nii", "nii.gz"):  # one name but for it
        write_nifti(tmp_path / "new" / f"twin.{suffix}", voxels, affine, "LPS")
    command(*ask, "infer.heat_maps=5", f"infer.input={tmp_path / 'new'}", spec=cubes)
    names = {path.name for path in (folder / "heat_maps_new").iterdir()}
    assert {"twin.nii.nii.gz", "twin.nii.gz.nii.gz"} < names and len(names) == 4
    maps = [highest(folder / "heat_maps_new" / f"{codes}.nii.gz") for codes in ("LPS", "SRA")]
    assert (maps[0][0] == maps[1][0]).all() and (maps[0][1] == maps[1][1]).all()
    assert (abs(maps[0][0] - where) < 2.5 * np.array(SPACING)).all()
    ask = ["mode=infer", f"infer.checkpoint={result.path / 'checkpoints/last.pt'}"]
    ask += ["infer.heat_map_class=cube", f"infer.output_dir={tmp_path / 'whole'}"]
    command(*ask, "infer.heat_maps=4", "data.augmentation.evaluation=windows", spec=cubes)
    place, values = highest(tmp_path / "whole" / "heat_maps_test" / "39.nii.gz")
    assert values.shape == SHAPE  # the whole volume
    assert (abs(place - cube(39)[2]) < 2.5 * np.array(SPACING)).all()
    wrong = refused("mode=infer", "infer.heat_maps=1", "infer.heat_map_class=ball", spec=cubes)
    assert 'infer.heat_map_class = "ball": the model predicts cube, plain' in wrong
    two = refused("mode=infer", "infer.heat_maps=1", "infer.checkpoint=['a', 'b']", spec=cubes)
    assert "they are of one model, and infer names 2" in two


def test_images_of_every_task(command, refused, table_spec, tmp_path):
    """Overlays of images; of a regression the map of a target in its units."""
    for subtask, output in (("regression", "top"), ("multilabel", "zero")):
        spec = f'name = "{subtask}"\n{table_spec(subtask)}'
        command(spec=spec)
        ask = ["mode=infer", "infer.heat_maps=3"]
        result = command(*ask, f"infer.heat_map_class={output}", spec=spec)
        pictures = sorted((result.path / "infer/plots/heat_maps_test").iterdir())
        assert len(pictures) == 3 and all(path.suffix == ".png" for path in pictures)
        chosen = pictures[0].read_bytes()
        command(*ask, spec=spec)
        assert pictures[0].read_bytes() != chosen  # of the first target, or the likeliest label
        command("mode=infer", "infer.heat_maps=1", spec=spec)  # those of before go
        assert len(list(pictures[0].parent.iterdir())) == 1
    assert "would be ignored" in refused("mode=infer", "infer.heat_map_class=zero", spec=spec)


def test_features_have_no_places(command, refused, tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
        file["labels"] = np.arange(30) % 2
    spec = f"""
    [data]
    dataset = "precomputed_features"
    data_root_dir = "{tmp_path}"
    train_features_file = "f.h5"
    [model.encoder]
    encoder_type = "precomputed"
    """
    spec += CUBES[CUBES.index("[task]") :]
    command("training.epochs=1", spec=spec)
    line = refused("training.epochs=1", "mode=infer", "infer.heat_maps=1", spec=spec)
    assert line.startswith("infer.heat_maps: the samples are vectors, which have no places")


@pytest.mark.parametrize("name", ["r3d_18", "mvit_v2_s", "swin3d_t"])
def test_maps_of_clips_lie_on_their_frames(name: str) -> None:
    """Of networks of clips, and frame by frame."""
    specs = [
        (TorchvisionVideoEncoder(type=name, pretrained=False, time_axis="t"), (4, 32, 48)),
        (timm("test_resnet", lift="slices", slices=Slices(axis="t", stride=2)), (5, 32, 32)),
    ]
    for spec, size in specs:
        torch.manual_seed(0)
        arguments = {"outputs": 2, "channels": 3, "size": size, "load_weights": False}
        model = build_model(ModelSpec(encoder=spec), FullFinetuning(), **arguments).eval()
        values = heat_values(model, torch.randn(3, *size), 1)
        assert values.shape == size and np.isfinite(values).all() and values.min() >= 0


@pytest.mark.parametrize("highest", [2.0, 0.0])
def test_the_map_of_a_clip_is_an_animation(tmp_path: Path, highest: float) -> None:
    """A frame of the GIF for each of the clip, which is on its left; on the right colour where the
    map is, in its frame."""
    from PIL import Image, ImageSequence

    clip = np.full((3, 96, 64, 3), 100, np.uint8)
    clip[:, 0, 0] = [[50], [60], [70]]  # equal frames of a GIF become one
    values = np.zeros((3, 96, 64))
    values[1, 20:40, 10:30] = highest
    found = HeatMap("a/b.mp4", "walk, predicted run", "run", clip, values)
    clip_map(found, clip, tmp_path / "m.gif")
    with Image.open(tmp_path / "m.gif") as file:
        frames = [np.array(f.convert("RGB")) for f in ImageSequence.Iterator(file)]
        comment = file.info["comment"].decode()
    assert comment.startswith("a/b.mp4; walk, predicted run; ") and "run" in comment
    assert len(frames) == 3 and frames[0].shape == (96 * 3, 2 * 64 * 3, 3)
    moved = [np.abs(frame[6:].astype(int) - 100).max(2) > 20 for frame in frames]
    assert not moved[0].any() and not moved[2].any()
    if not highest:
        assert "nothing in the sample speaks for it" in comment and not moved[1].any()
        return
    rows, columns = np.nonzero(moved[1])
    assert (rows.min() + 6, rows.max() + 7) == (60, 120)
    assert (columns.min() - 192, columns.max() + 1 - 192) == (30, 90)
