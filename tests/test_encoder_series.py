"""Encoders of time series: masks, layers, weights, images of series, and whole runs."""

import csv
import json
from contextlib import suppress
from typing import get_args

import h5py
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from small_networks import disturb
from test_data_series import made, write_ts

from glovita import main
from glovita_lib.encoder import any_encoder
from glovita_lib.encoder_aggregation import aggregate, served
from glovita_lib.encoder_series import FoldedEncoder, InceptionTime, MaskedNorm, keep_blocks
from glovita_lib.errors import UserError
from glovita_lib.extraction import choose_layers
from glovita_lib.peft import apply_peft
from glovita_lib.spec_encoders import TimmEncoder
from glovita_lib.spec_lift import Folding
from glovita_lib.spec_peft import Peft
from glovita_lib.spec_series import (
    InceptionTimeEncoder,
    SeriesResNetEncoder,
    SeriesTransformerEncoder,
)

SMALL = [
    InceptionTimeEncoder(filters=4, bottleneck=3, kernel_size=8),
    InceptionTimeEncoder(filters=2, bottleneck=0, kernel_size=5, depth=2),
    SeriesResNetEncoder(features=(4, 8)),
    SeriesTransformerEncoder(width=16, heads=2, depth=2, patch=4),
]
FOLDED = TimmEncoder(type="test_vit", pretrained=False, lift="fold", folding=Folding(size=32))


def build(spec, channels=2, length=30):
    torch.manual_seed(0)
    return any_encoder(spec, channels=channels, size=(length,), load_weights=False)


def batch(lengths, channels=2, seed=0):
    """Series of these lengths, and their padded batch with its last row."""
    generator = torch.Generator().manual_seed(seed)
    series = [torch.randn(channels, n, generator=generator) for n in lengths]
    padded = torch.zeros(len(series), channels + 1, max(lengths))
    for row, one in zip(padded, series, strict=True):
        row[:channels, : one.shape[1]], row[channels, : one.shape[1]] = one, 1
    return series, padded


@pytest.mark.parametrize("spec", [*SMALL, FOLDED], ids=lambda spec: spec.__struct_config__.tag)
def test_a_series_gives_the_same_alone_and_padded(spec):
    encoder = build(spec).eval()
    series, padded = batch([30, 7, 1, 18])
    for method in served(encoder):
        assert_alone_as_padded(encoder, method, series, padded, folded=spec is FOLDED)


def assert_alone_as_padded(encoder, method, series, padded, *, folded=False):
    """Each series gives the same vector by itself."""
    for one, vector in zip(series, aggregate(encoder(padded), method), strict=True):
        if folded and one.shape[1] == 1:
            continue  # an image needs two values
        alone = aggregate(encoder(one[None]), method)[0]
        torch.testing.assert_close(alone, vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "peft",
    [each for each in get_args(Peft) if each.__struct_config__.tag != "custom"],
    ids=lambda peft: peft.__struct_config__.tag,
)
def test_methods_count_no_padding(peft):
    done = 0
    for spec in SMALL:
        encoder = build(spec)
        with suppress(UserError):  # what the structure of the encoder does not allow
            apply_peft(peft(), encoder)
            done += 1
        with torch.no_grad():
            disturb(encoder, 0.3)
        series, padded = batch([30, 7, 1, 18])
        assert_alone_as_padded(encoder.eval(), "avg", series, padded)
    assert done


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.__struct_config__.tag)
def test_tokens_and_layers_have_the_mask(spec):
    encoder = build(spec).eval()
    _, padded = batch([30, 7])
    features = encoder(padded)
    assert features.tokens.shape[:2] == features.mask.shape
    step = 4 if "transformer" in encoder.name else 1
    assert features.mask.sum(1).tolist() == [-(-30 // step), -(-7 // step)]
    layers = choose_layers(encoder, (-1,), norm=False, input_shape=(1, 2, 30))
    (last,) = layers(padded)
    torch.testing.assert_close(last.mask, features.mask)
    if encoder.name != "transformer_1d":  # behind whose last block comes a norm
        torch.testing.assert_close(last.tokens, features.tokens)
    assert encoder(padded[:, :2]).mask is None


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.__struct_config__.tag)
def test_padding_has_no_gradient_and_weights_reload(spec, tmp_path):
    encoder = build(spec).train()
    _, padded = batch([30, 7, 12])
    padded[1, :2, 7:] = 1e6  # counts for nothing
    padded.requires_grad_()
    aggregate(encoder(padded), "avg").square().sum().backward()
    assert not padded.grad[1, :2, 7:].any() and padded.grad[1, :2, :7].any()
    assert all(p.grad is not None for p in encoder.parameters())
    path = tmp_path / "net.pth"
    torch.save(encoder.net.state_dict(), path)
    fields = {"weights": str(path)}
    again = any_encoder(
        type(spec)(**{k: getattr(spec, k) for k in spec.__struct_fields__} | fields),
        channels=2,
        size=(30,),
        load_weights=True,
    )
    with torch.no_grad():
        expected = encoder.eval()(padded).tokens
        torch.testing.assert_close(again.eval()(padded).tokens, expected)


def test_the_masked_norm_is_batch_norm_over_what_counts():
    torch.manual_seed(0)
    ours, theirs = MaskedNorm(3).train(), torch.nn.BatchNorm1d(3).train()
    x = torch.randn(4, 3, 6)
    mask = torch.rand(4, 6) < 0.6
    found = ours(x, mask)
    expected = theirs(x.transpose(1, 2)[mask])
    torch.testing.assert_close(found.transpose(1, 2)[mask], expected)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    assert not found.transpose(1, 2)[~mask].any()


def image_of_tivit(x, patch, stride, side):
    """Median and quartiles, rows of `patch` the share `stride` of a row apart, before the first
    value its copies, so that the last row ends with the series; 0 to 1, contrast, nearest."""
    low, middle, high = np.quantile(x, [0.25, 0.5, 0.75])
    scaled = (x - middle) / (high - low + 1e-5)
    step = max(1, int(patch * stride))
    ends = np.arange(len(x), 0, -step)[::-1]  # of rows, from the last one on
    ends = ends[np.searchsorted(ends, min(patch, len(x)), side="left") :]
    if ends[0] > patch:  # what is before the first whole row is the end of another one
        ends = np.concatenate([[ends[0] - step], ends])
    rows = scaled[np.clip(ends[:, None] - patch + np.arange(patch), 0, None)]
    rows = ((rows - rows.min()) / (np.ptp(rows) + 1e-5)) ** 0.8
    rows = rows.T if stride == 1 else rows
    place = [np.arange(side) * n // side for n in rows.shape]
    return rows[np.ix_(*place)]


@pytest.mark.parametrize("length", [2, 5, 24, 40, 401, 403])
@pytest.mark.parametrize(
    ("patch", "stride"), [(None, 0.1), (None, 0.5), (16, 0.25), (7, 0.99), (None, 1), (16, 1)]
)
def test_a_series_becomes_the_image_of_tivit(length, patch, stride):
    folding = Folding(size=32, patch=patch, stride=stride)
    encoder = build(replace(FOLDED, folding=folding), channels=1, length=length)
    assert isinstance(encoder, FoldedEncoder)
    x = np.random.default_rng(length).standard_normal(length)
    expected = image_of_tivit(x, patch or max(2, int(length**0.5)), stride, 32)
    image = encoder.rows(torch.from_numpy(x)[None].float())[0]
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_images_hold_every_time_point_of_ragged_series():
    """Also those of series that end before the longest of their batch."""
    folding = Folding(size=64, patch=16, stride=0.5)
    encoder = build(replace(FOLDED, folding=folding), channels=2, length=61).eval()
    series, padded = batch([61, 33, 19, 9])
    together = encoder.images(padded).unflatten(0, (4, 2))
    for number, one in enumerate(series):
        torch.testing.assert_close(together[number], encoder.images(one[None]))
        for place in range(one.shape[1]):
            changed = padded.clone()
            changed[number, :2, place] += 3
            assert (encoder.images(changed).unflatten(0, (4, 2))[number] != together[number]).any()


def test_inner_layers_of_a_transformer():
    whole, half = (
        build(TimmEncoder(type="test_vit", pretrained=False, lift="fold", folding=folding))
        for folding in (Folding(size=32), Folding(size=32, layer=2))
    )
    assert len(half.block_names) == 2 < len(whole.block_names)
    assert half.method == "avg" and whole.method == "cls_token"
    with pytest.raises(UserError, match="layer = 99"):
        build(
            TimmEncoder(type="test_vit", pretrained=False, lift="fold", folding=Folding(layer=99))
        )
    resnet = TimmEncoder(
        type="test_resnet", pretrained=False, lift="fold", folding=Folding(layer=1)
    )
    with pytest.raises(UserError, match="no row that keeps its width"):
        build(resnet)


def test_cut_networks_start_from_files_of_whole_and_of_cut_ones(tmp_path):
    """As a run with such an encoder exports them, before any prefix."""
    cut = replace(FOLDED, folding=Folding(size=32, layer=2))
    encoders = {1: None, 2: None, 4: None, None: None}
    x = torch.randn(2, 2, 30)
    for layer in encoders:
        encoder = build(replace(FOLDED, folding=Folding(size=32, layer=layer)))
        encoders[layer] = encoder
        for tensor in encoder.net.state_dict().values():
            tensor.normal_()
        state = {f"encoder.net.{n}": t for n, t in encoder.net.state_dict().items()}
        torch.save(state, tmp_path / f"{layer}.pth")
    for layer in (2, 4, None):
        file = replace(cut, weights=str(tmp_path / f"{layer}.pth"))
        again = any_encoder(file, channels=2, size=(30,), load_weights=True).eval()
        assert again.load_target.taken == {"weights_key": "encoder.net"}
        for name, tensor in again.net.state_dict().items():
            torch.testing.assert_close(tensor, encoders[layer].net.state_dict()[name])
        with torch.no_grad():
            assert again(x).tokens.isfinite().all()
    for options in ({}, {"weights_order": True}):
        lacking = replace(cut, weights=str(tmp_path / "1.pth"), **options)
        with pytest.raises(UserError, match=r"blocks\.1|tensors, VisionTransformer has"):
            any_encoder(lacking, channels=2, size=(30,), load_weights=True)
    in_order = replace(cut, weights=str(tmp_path / "2.pth"), weights_order=True)
    again = any_encoder(in_order, channels=2, size=(30,), load_weights=True)
    torch.testing.assert_close(again.net.state_dict(), encoders[2].net.state_dict())


def test_blocks_that_are_kept_keep_their_names():
    """torchvision's stand under names of their own in a Sequential."""
    from torchvision.models import VisionTransformer

    from glovita_lib.encoder_torchvision import VitTrunk

    sides = {"image_size": 32, "patch_size": 16, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    net = VisionTransformer(num_layers=3, **sides)
    facts = {"n_prefix": 1, "has_cls": True, "channels_last": False}
    inner = VitTrunk(net, name="vit", input_shape=(1, 3, 32, 32), **facts)
    names = inner.block_names
    keep_blocks(inner, 2)
    assert inner.block_names == names[:2] and len(inner.blocks()) == 2
    assert {n for n in net.state_dict() if ".layers." in n} == {
        n for n in net.state_dict() if n.startswith(names[:2])
    }
    assert inner(torch.randn(1, 3, 32, 32)).tokens.shape == (1, 5, 8)


def test_layers_of_a_folded_encoder_name_the_key_that_does():
    with pytest.raises(UserError, match="images that series become.*model.encoder.folding.layer"):
        choose_layers(build(FOLDED), (-1,), norm=False, input_shape=(1, 2, 30))


# ------------------------------------------------------------------------------- whole commands

SPEC = """
[data]
dataset = "generic_series_dataset"
train_file = "train.ts"
test_file = "test.ts"
[model.encoder]
encoder_type = "inception_time"
filters = 8
kernel_size = 8
depth = 3
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 6
[dataloading]
batch_size = 8
[optimizer]
lr = 5e-3
[logger]
backend = "none"
"""
TRANSFORMER = ["model.encoder.encoder_type=transformer_1d", "model.encoder.width=32"]
TRANSFORMER += ["model.encoder.heads=2", "model.encoder.depth=2", "model.encoder.patch=4"]
FOLD = ["model.encoder.encoder_type=timm", "model.encoder.type=test_vit"]
FOLD += ["model.encoder.pretrained=false", "model.encoder.lift=fold"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ragged series of two classes and a spec."""
    for name, count, seed in (("train", 24, 0), ("test", 12, 1)):
        series, labels = made(count, seed, ragged=True, channels=2), ["fast", "slow"] * (count // 2)
        write_ts(tmp_path / f"{name}.ts", series, labels)
    (tmp_path / "spec.toml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*overrides):
    """A command that must end well."""
    assert main(["spec.toml", "--override", "name=a", *overrides]) == 0


@pytest.mark.runs
def test_every_mode_on_ragged_series(folder):
    run()
    path = folder / "experiments" / "generic_series_dataset" / "a" / "0"
    found = json.loads((path / "metrics_test.json").read_text())
    assert found["metrics"]["acc"] >= 0.9
    run("mode=infer")
    first = (path / "predictions_test.csv").read_bytes()
    assert (path / "infer" / "predictions_test.csv").read_bytes() == first
    best = f"infer.checkpoint={path / 'checkpoints' / 'best.pt'}"
    alone = [best, "dataloading.eval_batch_size=1", "infer.output_dir=new"]
    run("mode=infer", "infer.input=test.ts", *alone)
    with (
        open("new/predictions_test.csv", newline="") as new,
        open(path / "predictions_test.csv", newline="") as old,
    ):
        pairs = list(zip(csv.DictReader(new), csv.DictReader(old), strict=True))
    for one, other in pairs:  # alone or in a batch
        assert one["prediction"] == other["prediction"]
        assert abs(float(one["p_fast"]) - float(other["p_fast"])) < 1e-4
    run("mode=extract", "extract.output=tokens", "extract.split=test", "extract.output_dir=t")
    (file,) = (folder / "t").glob("*.h5")
    lengths = [one.shape[1] for one in made(12, 1, ragged=True, channels=2)]
    with h5py.File(file) as tokens:
        assert np.diff(tokens["bag_ptr"]).tolist() == lengths
        np.testing.assert_array_equal(tokens["coords"][: lengths[0], 0], np.arange(lengths[0]))
        assert tokens.attrs["coords"] == "time: time point of the prepared series, from 0"
    assert main(["spec.toml", "--override", "name=a", "mode=infer", "infer.heat_maps=2"]) == 2
    run("mode=umap", "umap.method=pca", "umap.split=test", "umap.dpi=30")
    assert (path / "umap" / "pca_test.csv").is_file()


@pytest.mark.runs
@pytest.mark.parametrize("changes", [TRANSFORMER, [*FOLD, "model.encoder.folding.size=32"]])
def test_places_of_patches_are_told(changes, folder):
    """In the file of tokens and in that of the attention of heads on them."""
    text = SPEC.replace("filters = 8\nkernel_size = 8\ndepth = 3\n", "")
    (folder / "spec.toml").write_text(text)
    few = ["training.epochs=1", "model.head.head_type=abmil", *changes]
    run(*few)
    run(*few, "mode=extract", "extract.output=tokens", "extract.split=test", "extract.output_dir=t")
    run(*few, "mode=infer", "infer.attention=true")
    path = folder / "experiments" / "generic_series_dataset" / "a" / "0"
    (file,) = (folder / "t").glob("*.h5")
    with (
        h5py.File(file) as tokens,
        h5py.File(path / "infer" / "attention_test.h5") as weights,
    ):
        said, first = tokens.attrs["coords"], tokens["coords"][: tokens["bag_ptr"][1]]
        np.testing.assert_array_equal(weights["coords"][: len(first)], first)
        assert weights.attrs["coords"] == said.partition(":")[0]
    if changes == TRANSFORMER:
        assert said == "time: patch of 4 time points of the prepared series, from 0"
        assert first.tolist() == [[place] for place in range(len(first))]
    else:
        assert said.startswith("channel,row,column: ")
        grid = np.meshgrid(*map(np.arange, (2, 2, 2)), indexing="ij")
        assert first.tolist() == np.stack(grid, -1).reshape(-1, 3).tolist()


@pytest.mark.runs
def test_blends_of_ragged_series_count_no_padding(folder, monkeypatch):
    seen, forward = [], InceptionTime.forward

    def spied(net, x):
        if net.training and x.shape[1] == 3 and len(x) > 1:
            seen.append(x.detach().clone())
        return forward(net, x)

    monkeypatch.setattr(InceptionTime, "forward", spied)
    run("training.epochs=1", "task.mixup=true", "task.mixup_alpha=0.2")
    assert len(seen) >= 3
    for x in seen:
        assert set(x[:, 2].unique().tolist()) <= {0, 1}
        assert ((x[:, :2] != 0).any(1) == (x[:, 2] > 0)).all()


@pytest.mark.runs
@pytest.mark.parametrize(
    "changes",
    [
        [*TRANSFORMER, "peft.method=lora", "model.head.head_type=clam"],
        [*TRANSFORMER, "peft.method=visual_prompt_tuning", "model.head.head_type=abmil"],
        ["peft.method=lora", "data.augmentation.train_policy=default_series_3", "task.mixup=true"],
        ["peft.method=linear_probing", "training.cache_frozen_features=true"],
        [*FOLD, "model.encoder.folding.size=32", "peft.method=linear_probing"],
    ],
)
def test_heads_methods_and_policies(changes, folder):
    few = ["training.epochs=1", *changes]
    if changes[0] in (TRANSFORMER[0], FOLD[0]):
        text = SPEC.replace("filters = 8\nkernel_size = 8\ndepth = 3\n", "")
        (folder / "spec.toml").write_text(text)
    run(*few)
    run(*few, "mode=infer")
    path = folder / "experiments" / "generic_series_dataset" / "a" / "0"
    first = (path / "predictions_test.csv").read_bytes()
    assert (path / "infer" / "predictions_test.csv").read_bytes() == first
