"""Encoders of images on volumes: slices against the encoder run by hand, PEFT, memory, and whole
runs."""

import h5py
import msgspec
import nibabel
import numpy as np
import pytest
import torch
from small_runs import VOLUMES
from torch import Tensor, nn
from torch.nn import functional as F
from volume_files import write_labelled

from glovita_lib.bags import as_bags
from glovita_lib.encoder import any_encoder, build_encoder
from glovita_lib.encoder_aggregation import aggregate
from glovita_lib.encoder_slicewise import SlicewiseEncoder, keeping_statistics
from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.peft_base import merge
from glovita_lib.spec_encoders import (
    PrimusEncoder,
    TimmEncoder,
    TorchvisionEncoder,
    TransformerEncoder,
)
from glovita_lib.spec_lift import Slices
from glovita_lib.spec_model import AbmilHead, ModelSpec
from glovita_lib.spec_peft import FullFinetuning, Peft

VIT = {
    "type": "test_vit",
    "pretrained": False,
    "model_kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
RESNET = {"type": "test_resnet", "pretrained": False}
SIZE = (8, 12, 10)


def section(network=VIT, kind=TimmEncoder, **fields):
    return msgspec.convert({**network, "lift": "slices", **fields}, kind)


def make(spec, size=SIZE, channels=2):
    torch.manual_seed(0)
    return any_encoder(spec, channels=channels, size=size, load_weights=True).eval()


def volumes(size=SIZE, channels=2, count=2) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def model_of(spec, peft=None, head=None, size=SIZE):
    torch.manual_seed(0)
    heads = {} if head is None else {"head": head}
    return build_model(
        ModelSpec(encoder=spec, **heads),
        peft or FullFinetuning(),
        outputs=3,
        channels=2,
        size=size,
        load_weights=True,
    )


# ------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("method", ["cls_token", "avg", "joint"])
@torch.no_grad()
def test_tokens_are_what_the_encoder_gives_of_every_slice(axis, method):
    sides = tuple(side for number, side in enumerate(SIZE) if number != axis)
    slices = {"axis": "xyz"[axis], "aggregation": method}
    encoder = make(section({**VIT, "model_kwargs": {**VIT["model_kwargs"], "patch_size": 2}},
                           slices=slices))  # fmt: skip
    plain = make(TimmEncoder(**{**VIT, "model_kwargs": {**VIT["model_kwargs"], "patch_size": 2}}),
                 sides)  # fmt: skip
    plain.net.load_state_dict(encoder.net.state_dict())  # the same names
    x = volumes()
    features = encoder(x)
    assert features.grid == (SIZE[axis],)
    assert [p.ravel().tolist() for p in features.places] == [list(range(SIZE[axis]))] * 2
    for place in range(SIZE[axis]):
        expected = aggregate(plain(x.select(2 + axis, place)), method)
        torch.testing.assert_close(features.tokens[:, place], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.pooled, features.tokens.mean(1))


@pytest.mark.parametrize(
    ("slices", "places"),
    [
        ({}, list(range(10))),
        ({"stride": 3}, [0, 3, 6, 9]),
        ({"stride": 4}, [0, 4, 8]),
        ({"stride": 20}, [4]),
        ({"count": 3}, [1, 5, 8]),
        ({"count": 1}, [5]),
        ({"count": 40}, list(range(10))),
        ({"stride": 2, "count": 3}, [2, 4, 6]),
        ({"stride": 3, "count": 9}, [0, 3, 6, 9]),
    ],
)
@torch.no_grad()
def test_places_of_slices(slices, places):
    """Evenly, or around the middle; in as many as there are."""
    encoder, x = make(section(RESNET, slices=slices)), volumes()
    features, whole = encoder(x), make(section(RESNET))(x)
    assert [p.ravel().tolist() for p in features.places] == [places] * 2
    torch.testing.assert_close(features.tokens, whole.tokens[:, places])


@torch.no_grad()
def test_neighbours_are_channels_and_slices_are_resized():
    encoder = make(section(slices={"adjacent": True, "size": [16, 20]}))
    seen = []
    encoder.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    first = next(m for m in encoder.net.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = volumes(count=1)
    encoder(x)
    (images,) = seen
    assert images.shape == (10, 6, 16, 20)
    for place, near in ((0, [0, 0, 1]), (4, [3, 4, 5]), (9, [8, 9, 9])):
        expected = torch.cat([x[0, c][..., near].permute(2, 0, 1) for c in range(2)])[None]
        expected = F.interpolate(expected, (16, 20), mode="bilinear", antialias=True)
        torch.testing.assert_close(images[place], expected[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TorchvisionEncoder, "mobilenet_v3_small"),
        pytest.param(TimmEncoder, "vgg11", marks=pytest.mark.slow),
    ],
)
def test_the_librarys_own_pooling_makes_vectors_of_slices(kind, name):
    """Layers trained behind it too; they are frozen where the slices do not pass them."""
    fields = {"type": name, "pretrained": False}
    plain = make(kind(**fields), (32, 32))
    encoder = make(section(fields, kind, slices={"count": 2}), (32, 32, 6))
    encoder.net.load_state_dict(plain.net.state_dict())
    x = volumes((32, 32, 6))
    with torch.no_grad():
        expected = plain(x[..., 4]).pooled
        torch.testing.assert_close(encoder(x).tokens[:, 1], expected, rtol=1e-4, atol=1e-5)
    assert encoder.width == expected.shape[1]
    mean = section(fields, kind, slices={"count": 2, "aggregation": "sum"})
    frozen = [n for n, p in make(mean, (32, 32, 6)).net.named_parameters() if not p.requires_grad]
    assert set(frozen) == plain.pooling_parameters and frozen


def norms_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_b" in k}


@pytest.mark.parametrize("network", [VIT, RESNET], ids=["vit", "batch norm"])
def test_chunks_give_the_same_gradients(network):
    """A chunk's graph is thrown away and made again; batch norms in training see a chunk once."""
    x, found = volumes((16, 16, 10)), {}
    for chunk in (None, 4):
        slices = {} if chunk is None else {"chunk": chunk}
        model = model_of(section(network, slices=slices), size=(16, 16, 10))
        model.train(network is VIT)
        model(x).square().sum().backward()
        found[chunk] = {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in found[None].items():
        torch.testing.assert_close(found[4][name], gradient, rtol=1e-3, atol=1e-5)
    if network is VIT:
        return
    model = model_of(section(network, slices={"chunk": 4}), size=(16, 16, 10)).train()
    model(x).sum().backward()
    again = model_of(section(network, slices={"chunk": 4}), size=(16, 16, 10)).train()
    with torch.no_grad():
        for part in torch.arange(20).split(4):
            again.encoder.net(again.encoder.images(x.movedim(4, 1), part // 10, part % 10))
    for name, value in norms_of(again).items():
        torch.testing.assert_close(norms_of(model)[name], value)


def test_statistics_are_left_alone_inside():
    norm = nn.BatchNorm2d(3).train()
    before = norms_of(norm)
    with keeping_statistics(norm):
        norm(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in norms_of(norm).items())
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 0


def saved_bytes(model, x):
    """Bytes that autograd keeps of a forward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    output.sum().backward()
    return sum(kept.values())


def test_chunks_bound_the_memory():
    """Of training, and without gradients by themselves."""
    x = volumes((32, 32, 40))
    whole, chunks = (
        saved_bytes(model_of(section(RESNET, slices=s), size=(32, 32, 40)).train(), x)
        for s in ({}, {"chunk": 8})
    )
    images = x.numel() * 4
    assert chunks < 2 * images < whole / 4
    encoder, seen = make(section(RESNET), (32, 32, 40)), []
    first = next(m for m in encoder.net.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        encoder(x)
    assert seen == [64, 16]


def test_heads_take_slices_for_instances():
    model = model_of(section(slices={"count": 4}), head=AbmilHead(hidden=8, attention=4)).eval()
    x = volumes()
    with torch.no_grad():
        tokens = model.encoder(x).tokens
        output = model(x)
        bags = as_bags(tokens)
        assert bags.lengths.tolist() == [4, 4]
        torch.testing.assert_close(output["logits"], model(bags)["logits"])
    output["logits"] = model(x)["logits"].sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------- PEFT

METHODS = [
    {"method": "lora", "rank": 2},
    {"method": "convpass", "bottleneck": 2},
    {"method": "visual_prompt_tuning", "num_tokens": 2, "project_dim": 4},
    {"method": "adapt_former", "bottleneck": 2},
    {"method": "ssf"},
    {"method": "bitfit"},
    {"method": "lora", "rank": 2, "use_dora": True},
    {"method": "partial_finetuning", "num_frozen_layers": 1},
]


@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: fields["method"])
def test_methods_work_on_the_encoder_of_images(fields, tmp_path):
    """They begin as the base, train, and are saved and read strictly."""
    peft, x = msgspec.convert(fields, Peft), volumes((8, 8, 6))
    spec = section(slices={"chunk": 5})
    plain, model = (model_of(spec, p, size=(8, 8, 6)) for p in (None, peft))
    if fields["method"] != "visual_prompt_tuning":  # its prompts do not begin as nothing
        with torch.no_grad():
            expected = plain.eval().encoder(x).tokens
            torch.testing.assert_close(model.eval().encoder(x).tokens, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        F.cross_entropy(model.train()(x), torch.tensor([0, 2])).backward()
        optimizer.step()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = model_of(spec, peft, size=(8, 8, 6))
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
        if peft.merges:
            torch.testing.assert_close(merge(again)(x), model(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (section(network=VIT | {"type": "vit_tiny_patch16_224", "model_kwargs": {}}), "slices"),
        (msgspec.convert({"lift": "windows", "windows": {"size": (8, 7, 8)}}, PrimusEncoder),
         "windows"),
    ],
)  # fmt: skip
def test_sizes_that_the_network_does_not_take_are_keys_of_the_lift(spec, key):
    with pytest.raises(UserError) as caught:
        make(spec)
    assert f"model.encoder.{key}.size" in str(caught.value)
    assert "data.augmentation" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"lift": "slices"}, "model.encoder.slices.size"),
        ({"lift": "fold"}, "model.encoder.folding.size"),
        ({"lift": "inflate"}, "data.augmentation.patch_size"),
        ({"lift": "inflate", "inflation": {"axis": "t"}}, "data.augmentation.image_size"),
        ({"lift": None}, "data.augmentation.image_size"),
    ],
)
def test_the_size_of_images_is_the_key_of_the_lift(fields, key):
    spec = section({"type": "test_vit", "model_kwargs": {"img_size": 16}}, **fields)
    ((_, text),) = spec.problems()
    assert text == f"it comes from {key}: set it there"


@pytest.mark.parametrize("key", ["num_frames", "frames_per_clip"])
@pytest.mark.parametrize(
    ("lift", "said"),
    [
        ("slices", "it comes from model.encoder.slices.count: set it there"),
        ("fold", "a series becomes one image, without frames: leave it out"),
        (None, "it comes from data.sampling.frames: set it there"),
    ],
)
def test_frames_of_a_model_of_clips_are_a_key_that_the_samples_have(key, lift, said):
    spec = section({"type": "vit", "model_kwargs": {key: 4}}, TransformerEncoder, lift=lift)
    ((_, text),) = spec.problems()
    assert text == said


def test_a_proposed_side_of_slices_is_that_of_both():
    text = Slices().renamed("set data.augmentation.image_size = 32")
    assert text == "set model.encoder.slices.size = [32, 32]"


def test_mistakes_are_told():
    with pytest.raises(UserError, match='slices.aggregation = "cls_token": encoder test_resnet'):
        make(section(RESNET, slices={"aggregation": "cls_token"}))
    spec = ModelSpec(encoder=section(), feature_aggregation_method="cls_token")
    ((_, text),) = spec.problems()
    assert 'which lift = "slices" does not have' in text
    assert section().takes == "volumes" and TimmEncoder().takes == "images"
    ((_, text),) = TimmEncoder().sample_problems("volumes")
    assert 'or set model.encoder.lift = "slices"' in text
    ((_, text),) = section().sample_problems("images")
    assert "leave model.encoder.lift out" in text
    assert Slices() == section().lifting
    for fields in ({"inflation": {"axis": "x"}}, {"lift": None, "slices": {"count": 3}}):
        ((key, text),) = section(**fields).problems()
        assert key in fields and "would be ignored, it is read only with" in text


def test_weights_of_a_file_are_those_of_images(tmp_path):
    plain = build_encoder(TimmEncoder(**VIT), channels=3, size=(16, 16), load_weights=False)
    torch.save(plain.net.state_dict(), tmp_path / "w.pt")
    encoder = make(section(weights=str(tmp_path / "w.pt")), (8, 12, 4))
    name = "blocks.1.mlp.fc2.weight"
    assert torch.equal(encoder.net.state_dict()[name], plain.net.state_dict()[name])
    assert encoder.net.state_dict()["pos_embed"].shape == (1, 7, 16)


# --------------------------------------------------------------------------- whole runs

RUN = f"""{VOLUMES}
size = [8, 8, 6]
[model.encoder]
type = "test_vit"
pretrained = false
model_kwargs = {{ patch_size = 4, embed_dim = 16, depth = 2, num_heads = 2 }}
lift = "slices"
[model.encoder.slices]
stride = 2
[model.head]
head_type = "abmil"
hidden = 8
attention = 4
[task]
bootstrap = 0
result_plot = "none"
[training]
epochs = 3
[optimizer]
lr = 1e-2
[dataloading]
batch_size = 4
num_workers = 0
[logger]
backend = "none"
"""


@pytest.fixture
def spec(tmp_path):
    """Twelve volumes, half of which are brighter towards one side."""
    volumes = []
    for number in range(12):
        voxels = np.random.default_rng(number).normal(5, 1, (8, 8, 6)).astype(np.float32)
        voxels[:4] += 4 * (number % 2)
        volumes.append(voxels)
    write_labelled(tmp_path / "data", volumes, shares=(6, 2, 4))
    return RUN.replace("ROOT", str(tmp_path / "data"))


def test_a_run_with_lora_is_asked_and_its_attention_written(command, spec, tmp_path):
    run = command("peft.method=lora", spec=spec)
    command("peft.method=lora", "mode=infer", "infer.volume_maps=true", spec=spec)
    (path,) = (run.path / "infer").glob("attention*.h5")
    with h5py.File(path) as file:
        name = file["ids"].asstr()[1].removesuffix(".nii")
        values = nibabel.load(run.path / "infer" / "maps_test" / f"{name}_attention.nii.gz")
        line = np.interp(np.arange(6), [0, 2, 4], file["attention"][3:6, 0])  # along z
        np.testing.assert_allclose(values.get_fdata()[3, 5], line / line.mean(), rtol=1e-5)
        assert values.shape == (8, 8, 6)
        assert file.attrs["coords"] == "slice" and file["bag_ptr"][:].tolist() == [0, 3, 6, 9, 12]
        assert file["coords"][:3, 0].tolist() == [0, 2, 4] and file["coords"].shape == (12, 1)
        sums = np.add.reduceat(file["attention"][:, 0], [0, 3, 6, 9])
        np.testing.assert_allclose(sums, 1, rtol=1e-5)
    for name in ("predictions_test.csv", "metrics_test.json"):
        assert (run.path / "infer" / name).read_bytes() == (run.path / name).read_bytes()


def test_the_map_of_a_patch_lies_in_the_middle_of_its_volume(command, spec):
    short = ["training.epochs=1", "data.augmentation.patch_size=[4,4,4]"]
    run = command(*short, spec=spec)
    command(*short, "mode=infer", "infer.volume_maps=true", spec=spec)
    for path in (run.path / "infer" / "maps_test").iterdir():
        values = nibabel.load(path).get_fdata()
        assert values.shape == (8, 8, 6) and (values[2:6, 2:6, 1:5] > 0).all()
        assert (values > 0).sum() == 4**3


@pytest.mark.parametrize("head", ["abmil", "classification", "max"])
def test_frozen_slices_are_encoded_once(command, spec, head, monkeypatch):
    """Vectors of volumes, or bags of slices: the same training."""
    seen, forward = [], SlicewiseEncoder.forward_features
    monkeypatch.setattr(
        SlicewiseEncoder,
        "forward_features",
        lambda self, x: (seen.append(len(x)), forward(self, x))[1],
    )
    spec = spec[: spec.index("[model.head]")] + spec[spec.index("[task]") :]
    frozen = [f"model.head.head_type={head}", "peft.method=linear_probing"]
    frozen.append("data.augmentation.train_policy=default_3d_1")
    plain = command(*frozen, "name=plain", spec=spec)
    often = sum(seen)
    seen.clear()
    cached = command(*frozen, "training.cache_frozen_features=true", "name=cached", spec=spec)
    assert often - sum(seen) == 2 * (6 + 2)  # epochs but the first
    for first, second in zip(plain.records(), cached.records(), strict=True):
        for name in ("train_loss", "val_loss"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    p = [[float(r[k]) for r in run.rows() for k in r if k.startswith("p_")]
         for run in (plain, cached)]  # fmt: skip
    np.testing.assert_allclose(p[1], p[0], atol=1e-4)


def test_bags_of_slices_are_read_out_and_trained_on(command, refused, spec, tmp_path):
    """Their places go with them."""
    command(spec=spec)
    out = tmp_path / "out"
    extract = ["mode=extract", f"extract.output_dir={out}", "extract.output_filename='{split}.h5'"]
    command(*extract, "extract.output=tokens", spec=spec)
    with h5py.File(out / "test.h5") as file:
        assert file["features"].shape == (12, 16)
        assert file["bag_ptr"][:].tolist() == [0, 3, 6, 9, 12]
        assert file["coords"][:3, 0].tolist() == [0, 2, 4]
        assert file.attrs["coords"].startswith("slice: voxel along the axis")
    said = refused("mode=extract", "extract.layers=[0]", "extract.output=embedding", spec=spec)
    assert "are those of slices" in said
    features = spec[spec.index("[model.head]") :]
    section = f'[data]\ndataset = "precomputed_features"\ndata_root_dir = "{out}"\n'
    section += "".join(f'{s}_features_file = "{s}.h5"\n' for s in ("train", "val", "test"))
    section += '[model.encoder]\nencoder_type = "precomputed"\n'
    run = command(spec=section + features)
    command("mode=infer", "infer.attention=true", spec=section + features)
    (path,) = (run.path / "infer").glob("attention*.h5")
    with h5py.File(path) as file:
        assert file.attrs["coords"] == "slice" and file["coords"][:3, 0].tolist() == [0, 2, 4]
