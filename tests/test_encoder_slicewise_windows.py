"""Windows of volumes against plain loops: where they lie, as instances of bags, and as what
evaluation averages over."""

import csv
import gzip
import json
from itertools import product

import h5py
import msgspec
import nibabel
import numpy as np
import pytest
import torch
from children import glovita
from nibabel.affines import apply_affine
from torch import Tensor, nn
from torch.nn import functional as F
from volume_files import ORIENTATIONS, affine_of, write_nifti

from glovita_lib.augment_patch import PatchCut, Volumes, WindowedVolumes, WindowGrid
from glovita_lib.bags import as_bags
from glovita_lib.dist import Ranks
from glovita_lib.encoder import any_encoder
from glovita_lib.encoder_aggregation import aggregate
from glovita_lib.encoder_slicewise import WindowsEncoder
from glovita_lib.experiment import read_data, restore
from glovita_lib.model import build_model, logits_of
from glovita_lib.spec_encoders import Encoder
from glovita_lib.spec_model import AbmilHead, ModelSpec
from glovita_lib.spec_peft import FullFinetuning, Peft

ONE = Ranks(0, 1, 0, torch.device("cpu"))
RESENC = {
    "encoder_type": "residual_encoder",
    "features_per_stage": [4, 6],
    "strides": [1, 2],
    "n_blocks_per_stage": 1,
}
PRIMUS = {"encoder_type": "primus", "patch_embed_size": [4, 4, 4]}
HEADS = ["abmil", "clam", "dsmil", "transmil", "temporal_transformer", "mean", "max", None]
VIDEO = {"encoder_type": "torchvision_video", "pretrained": False}
SIZES = [(10, 12, 9), (8, 8, 8), (6, 20, 8)]


class Small(nn.Module):
    """A CNN with batch norm that a `custom` encoder names."""

    def __init__(self, input_channels):
        super().__init__()
        self.conv = nn.Conv3d(input_channels, 5, 3, 2)
        self.norm = nn.BatchNorm3d(5)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


CUSTOM = {"encoder_type": "custom", "target": "test_encoder_slicewise_windows:Small"}
NETWORKS = [RESENC, PRIMUS, VIDEO, CUSTOM]


def section(network=CUSTOM, **windows):
    options = {"size": [8, 8, 8], **windows}
    return msgspec.convert({**network, "lift": "windows", "windows": options}, Encoder)


def make(spec, size=None, channels=2):
    torch.manual_seed(0)
    return any_encoder(spec, channels=channels, size=size, load_weights=True).eval()


def ragged(sizes=SIZES, channels=2) -> Volumes:
    generator = torch.Generator().manual_seed(1)
    return Volumes(tuple(torch.randn(channels, *size, generator=generator) for size in sizes))


def model_of(spec, peft=None, head=None):
    torch.manual_seed(0)
    heads = {} if head is None else {"head": head}
    return build_model(
        ModelSpec(encoder=spec, **heads),
        peft or FullFinetuning(),
        outputs=3,
        channels=2,
        size=(10, 20, 9),
        load_weights=True,
    )


# ------------------------------------------------------------------------------- where they lie


@pytest.mark.parametrize(
    ("have", "size", "stride", "starts"),
    [
        (10, 4, 2, [0, 2, 4, 6]),
        (11, 4, 2, [0, 2, 4, 6, 7]),
        (9, 4, 4, [0, 4, 5]),
        (8, 4, 4, [0, 4]),
        (5, 4, 3, [0, 1]),
        (4, 4, 1, [0]),
        (3, 4, 2, [-1]),
        (1, 4, 2, [-2]),
    ],
)
def test_windows_of_an_axis(have, size, stride, starts):
    grid = WindowGrid((size, 2, 2), (stride, 2, 2))
    found = grid.starts((have, 2, 4))
    assert found.tolist() == [[start, 0, z] for start in starts for z in (0, 2)]
    assert grid.count((have, 2, 4)) == len(found)


def test_windows_cover_every_voxel_and_fill_up_as_a_patch_does():
    generator = np.random.default_rng(0)
    for _ in range(50):
        have, size = generator.integers(1, 14, 3), generator.integers(1, 9, 3)
        grid = WindowGrid.overlapping(tuple(size.tolist()), float(generator.uniform(0, 0.9)))
        volume = torch.from_numpy(generator.normal(size=(2, *have)))
        count = torch.zeros(*have)
        for at in grid.starts(have):
            count[tuple(slice(max(0, a), a + s) for a, s in zip(at, size, strict=True))] += 1
        assert (count > 0).all() and grid.count(have) == len(grid.starts(have))
        if (have <= size).all():
            cut = PatchCut("center", 0.0, grid.size)
            (box,) = cut.boxes(have[None], None)
            (start,) = grid.starts(have).tolist()
            assert torch.equal(grid.cut(volume, start), cut.one(volume.numpy(), box))


# ---------------------------------------------------------------------------------- as instances


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network["encoder_type"])
@torch.no_grad()
def test_tokens_are_what_the_encoder_gives_of_every_window(network):
    """In volumes of different sizes, one of them smaller than a window."""
    encoder = make(section(network, overlap=0.5))
    plain = make(msgspec.convert(network, Encoder), (8, 8, 8))
    plain.net.load_state_dict(encoder.net.state_dict())  # the same names
    volumes = ragged()
    features = encoder(volumes)
    assert features.mask.sum(1).tolist() == [len(places) for places in features.places] == [8, 1, 4]
    for volume, tokens, places in zip(volumes, features.tokens, features.places, strict=True):
        low = volume.amin((1, 2, 3))[:, None, None, None]
        for token, at in zip(tokens, places, strict=False):
            patch = low.repeat(1, 8, 8, 8)
            first = [max(0, -a) for a in at]
            part = volume[(slice(None), *(slice(max(0, a), a + 8) for a in at))]
            inside = (slice(f, f + n) for f, n in zip(first, part.shape[1:], strict=True))
            patch[(slice(None), *inside)] = part
            expected = aggregate(plain(patch[None]), encoder.method)[0]
            torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-5)
    for tokens, count, pooled in zip(features.tokens, [8, 1, 4], features.pooled, strict=True):
        torch.testing.assert_close(pooled, tokens[:count].mean(0))
    same = torch.stack([ragged([(10, 12, 9)] * 2).each[row] for row in range(2)])
    assert torch.equal(encoder(same).tokens, encoder(Volumes(tuple(same))).tokens)
    assert encoder.most_tokens((10, 12, 9)) == 8


@pytest.mark.parametrize("head", HEADS)
def test_heads_take_ragged_windows_for_instances(head):
    """As bags one by one."""
    from glovita_lib.spec_model import Head

    fields = None if head is None else msgspec.convert({"head_type": head}, Head)
    model = model_of(section(overlap=0.5), head=fields).eval()
    volumes = ragged()
    with torch.no_grad():
        together = logits_of(model, volumes)
        alone = torch.cat([logits_of(model, Volumes((volume,))) for volume in volumes])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", [RESENC, CUSTOM], ids=["instance norm", "batch norm"])
def test_chunks_give_the_same_gradients(network):
    volumes, found = ragged(), {}
    for chunk in (None, 3):
        model = model_of(section(network, overlap=0.5, chunk=chunk), head=AbmilHead())
        model.train(network is RESENC)
        logits_of(model, volumes).square().sum().backward()
        found[chunk] = {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in found[None].items():
        torch.testing.assert_close(found[3][name], gradient, rtol=1e-3, atol=1e-5)
    if network is CUSTOM:  # statistics see each chunk once, though it passes twice
        model = model_of(section(network, overlap=0.5, chunk=3)).train()
        logits_of(model, volumes).sum().backward()
        assert model.encoder.net.norm.num_batches_tracked == 5


def test_empty_windows_are_left_out():
    volume = torch.full((2, 16, 8, 8), -1.0)
    volume[1, 12, 4, 4] = 3.0
    encoder = make(section(stride=[8, 8, 8], skip_below=0.0))
    features = encoder(Volumes((volume, torch.full((2, 24, 8, 8), -1.0))))
    assert [places[:, 0].tolist() for places in features.places] == [[8], [0, 8, 16]]
    assert as_bags(features).lengths.tolist() == [1, 3]


@pytest.mark.parametrize("precision", [torch.bfloat16])
@torch.no_grad()
def test_autocast(precision):
    model = model_of(section(overlap=0.5), head=AbmilHead()).eval()
    expected = logits_of(model, ragged())
    with torch.autocast("cpu", precision):
        found = logits_of(model, ragged())
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


METHODS = [
    ({"method": "lora", "rank": 2}, RESENC),
    ({"method": "lora", "rank": 2, "use_dora": True}, RESENC),
    ({"method": "ssf"}, RESENC),
    ({"method": "bitfit"}, RESENC),
    ({"method": "visual_prompt_tuning", "num_tokens": 2, "project_dim": 4}, PRIMUS),
    ({"method": "partial_finetuning", "num_frozen_layers": 1}, RESENC),
]


@pytest.mark.usefixtures("small_primus")
@pytest.mark.parametrize(("fields", "network"), METHODS)
def test_methods_work_on_the_encoder_of_windows(fields, network, tmp_path):
    """They train, and are saved and read strictly."""
    peft, volumes = msgspec.convert(fields, Peft), ragged(SIZES[:2])
    spec = section(network, chunk=3)
    model = model_of(spec, peft)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        F.cross_entropy(logits_of(model.train(), volumes), torch.tensor([0, 2])).backward()
        optimizer.step()
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = model_of(spec, peft)
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(logits_of(again.eval(), volumes), logits_of(model.eval(), volumes))


# -------------------------------------------------------------------------------- as evaluation


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@torch.no_grad()
def test_logits_are_reduced_as_a_plain_loop_does(how, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                        nn.Linear(4, 3)).to(kind)  # fmt: skip
    grid = WindowGrid((8, 6, 4), (3, 6, 2))
    volumes = Volumes(tuple(volume.to(kind) for volume in ragged()))
    heard = []
    windowed = WindowedVolumes(volumes, grid, how, 5, lambda *found: heard.append(found))
    found = logits_of(net, windowed)
    assert found.dtype == kind
    for volume, row, each, places in zip(volumes, found, *heard[0], strict=True):
        logits = torch.cat(
            [net(grid.cut(volume, at)[None]) for at in grid.starts(volume.shape[1:])]
        )
        expected = logits.mean(0) if how == "mean" else logits.amax(0)
        tolerance = 1e-12 if kind == torch.float64 else 1e-6
        torch.testing.assert_close(row, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(each, logits)
        assert places.tolist() == grid.starts(volume.shape[1:]).tolist()


def test_windows_pass_in_bounded_numbers():
    seen: list[int] = []

    def net(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.flatten(1).mean(1, keepdim=True)

    volumes = ragged([(12, 8, 8), (16, 8, 8)])
    WindowedVolumes(volumes, WindowGrid((8, 8, 8), (4, 8, 8)), "mean", 2).reduced(net)
    assert seen == [2, 2, 1]


# ------------------------------------------------------------------------------------ whole runs

RUN = """
[data]
dataset = "generic_3d_dataset"
data_root_dir = "{root}"
label_source = "csv"
split_source = "csv"
[data.preparation]
workers = 1
normalize = "none"
spacing = [1.25, 1.25, 1.25]
[data.augmentation]
train_policy = "default_3d_2"
[model.encoder]
encoder_type = "custom"
target = "test_encoder_slicewise_windows:Small"
lift = "windows"
[model.encoder.windows]
size = [8, 8, 8]
overlap = 0.5
[model.head]
head_type = "abmil"
hidden = 16
attention = 16
[task]
bootstrap = 0
result_plot = "none"
[training]
epochs = 3
[optimizer]
lr = 5e-2
[dataloading]
batch_size = 4
num_workers = 0
[logger]
backend = "none"
"""
PATCHES = (
    RUN.replace('lift = "windows"\n[model.encoder.windows]\nsize = [8, 8, 8]\noverlap = 0.5\n', "")
    .replace('head_type = "abmil"\nhidden = 16\nattention = 16\n', 'head_type = "classification"\n')
    .replace(
        'train_policy = "default_3d_2"\n',
        'train_kwargs = {{ crop = "foreground" }}\ntrain_policy = "default_3d_1"\n'
        'patch_size = [8, 8, 8]\nevaluation = "windows"\nwindow_chunk = 3\n',
    )
)
LESION = 7.5  # mm, its side


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twenty-four volumes of different sizes, spacings and orientations; half of them have a bright
    cube, whose middle in the world is in places.json."""
    root, rows, places = tmp_path_factory.mktemp("data"), [], {}
    for number in range(24):
        draw = np.random.default_rng(number)
        spacing = draw.choice([1.0, 1.25, 1.5], 3)
        shape = draw.integers(14, 20, 3)
        voxels = draw.normal(0, 0.3, shape).astype(np.float32)
        affine = affine_of(spacing, draw.uniform(-50, 50, 3))
        if number % 2:
            side = np.rint(LESION / spacing).astype(int)
            start = draw.integers(0, shape - side + 1)
            voxels[tuple(slice(a, a + s) for a, s in zip(start, side, strict=True))] += 2
            places[str(number)] = apply_affine(affine, start + (side - 1) / 2).tolist()
        write_nifti(
            root / "images" / f"{number}.nii", voxels, affine, ORIENTATIONS[number // 2 % 8]
        )
        split = "train" if number < 12 else "val" if number < 14 else "test"
        rows.append({"path": f"{number}.nii", "label": "ab"[number % 2], "split": split})
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (root / "places.json").write_text(json.dumps(places))
    return root


def hits(folder, root, branch):
    """Of the samples with a lesion, those whose map is largest inside it."""
    found = {}
    for name, lesion in json.loads((root / "places.json").read_text()).items():
        if not (path := folder / f"{name}_{branch}.nii.gz").exists():
            continue
        image = nibabel.load(path)
        values = image.get_fdata()
        top = np.argwhere(values == values.max()).mean(0)
        distance = np.abs(apply_affine(image.affine, top) - lesion).max()
        found[name] = bool(distance <= LESION / 2 + 1.25)
    return found


def test_a_bag_of_windows_finds_lesions_in_the_world(command, root):
    """Trained on volumes of different sizes; its attention is written where the lesions are."""
    spec, long = RUN.format(root=root), ["training.epochs=20"]
    run = command(*long, spec=spec)

    assert run.json("metrics_test.json")["metrics"]["acc"] >= 0.9
    command(*long, "mode=infer", "infer.volume_maps=true", "infer.attention_maps=1", spec=spec)
    maps = run.path / "infer" / "maps_test"
    assert len(list(maps.iterdir())) == 10
    found = hits(maps, root, "attention")

    assert len(found) == 5 and sum(found.values()) >= 4
    (path,) = (run.path / "infer").glob("attention*.h5")
    with h5py.File(path) as file:
        assert file.attrs["coords"] == "x,y,z"
        pointers, weights = file["bag_ptr"][:], file["attention"][:, 0]
        assert len(set(np.diff(pointers))) > 1
        np.testing.assert_allclose(np.add.reduceat(weights, pointers[:-1]), 1, rtol=1e-5)
        places = file["coords"][:]
    image = nibabel.load(maps / "14_attention.nii.gz").get_fdata()
    rows = slice(*pointers[:2])
    assert image.mean() == pytest.approx(1, rel=1e-5)
    voxels = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), -1)

    def bell(at):
        return np.exp(-((voxels - np.array(at) - 3.5) ** 2).sum(-1) / (2 * 2.0**2))

    starts = [[*range(-16, side - 8, 4), *range(side - 8, side + 9, 4)] for side in image.shape]
    total = sum(w * bell(at) for w, at in zip(weights[rows], places[rows], strict=True))
    expected = total / sum(map(bell, product(*starts)))
    np.testing.assert_allclose(image, expected / expected.mean(), rtol=1e-4, atol=1e-7)


def rows_of(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[key]) for key in row if key.startswith("p_")] for row in rows])


def logits_of_windows(run, root, splits=("test",)):
    """Of the windows of each volume, one at a time by the saved model in float64."""
    experiment = restore(run.path / "checkpoints" / "best.pt", load_checked_spec(run), ONE)
    model = experiment.model.double().eval()
    data = read_data(experiment.root, ONE)
    grid = WindowGrid((8, 8, 8), (4, 4, 4))
    found = []
    for split in (data.splits[name] for name in splits):
        for volume in split.source.windows(np.arange(len(split))):
            voxels = torch.from_numpy(volume[...]).double()
            with torch.no_grad():
                cut = [grid.cut(voxels, at)[None] for at in grid.starts(voxels.shape[1:])]
                found.append(torch.cat([model(window) for window in cut]))
    return found


def load_checked_spec(run):
    from glovita_lib.spec_check import load_checked

    return load_checked(run.path / "spec.toml").root


@pytest.mark.parametrize("how", ["mean", "max"])
def test_trained_on_patches_and_tested_by_windows(command, root, how, tmp_path):
    """Predictions of the run, of infer and of new volumes; scores in the world."""
    spec = PATCHES.format(root=root)
    changed = [f"data.augmentation.window_reduce={how}"]
    run = command(*changed, spec=spec)
    logits = logits_of_windows(run, root)
    reduced = [each.mean(0) if how == "mean" else each.amax(0) for each in logits]
    expected = torch.stack(reduced).softmax(1).numpy()
    np.testing.assert_allclose(rows_of(run.path / "predictions_test.csv"), expected, atol=2e-5)
    command(*changed, "mode=infer", "infer.volume_maps=true", spec=spec)
    folder = run.path / "infer"
    np.testing.assert_allclose(rows_of(folder / "predictions_test.csv"), expected, atol=2e-5)
    assert len(list((folder / "maps_test").iterdir())) == 2 * 10
    for branch, name in enumerate("ab"):
        image = nibabel.load(folder / "maps_test" / f"14_score_{name}.nii.gz").get_fdata()
        total, count = np.zeros(image.shape), np.zeros(image.shape)
        grid = WindowGrid((8, 8, 8), (4, 4, 4))
        for score, at in zip(
            logits[0].softmax(1)[:, branch], grid.starts(image.shape), strict=True
        ):
            part = tuple(slice(max(0, a), a + 8) for a in at)
            total[part] += float(score)
            count[part] += 1
        np.testing.assert_allclose(image, total / count, atol=2e-5)
    new = tmp_path / "new"
    new.mkdir()
    (new / "x.nii").write_bytes((root / "images" / "15.nii").read_bytes())
    command(*changed, "mode=infer", f"infer.input={new}", "infer.volume_maps=true", spec=spec)
    np.testing.assert_allclose(rows_of(folder / "predictions_new.csv")[0], expected[1], atol=2e-5)
    assert len(list((folder / "maps_new").iterdir())) == 2
    (new / "x.nii.gz").write_bytes(gzip.compress((new / "x.nii").read_bytes()))
    command(*changed, "mode=infer", f"infer.input={new}", "infer.volume_maps=true", spec=spec)
    assert {path.name for path in (folder / "maps_new").iterdir()} == {
        f"x.{suffix}_score_{name}.nii.gz" for suffix in ("nii", "nii.gz") for name in "ab"
    }


def test_a_checkpoint_is_asked_by_windows_later(command, root, tmp_path):
    """Trained and validated on patches of the centre; the spec that names it says windows."""
    spec = PATCHES.format(root=root)
    centred = spec.replace('evaluation = "windows"\nwindow_chunk = 3\n', "")
    run, out = command("name=centred", spec=centred), tmp_path / "out"
    infer = ["mode=infer", f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}"]
    infer.append(f"infer.output_dir={out}")
    command(*infer, spec=centred)
    assert (out / "predictions_test.csv").read_bytes() == run.path.joinpath(
        "predictions_test.csv"
    ).read_bytes()
    assert "has no effect" not in command(*infer, spec=spec).out
    expected = torch.stack([each.mean(0) for each in logits_of_windows(run, root)]).softmax(1)
    np.testing.assert_allclose(rows_of(out / "predictions_test.csv"), expected.numpy(), atol=2e-5)


def test_vectors_are_the_mean_of_those_of_windows(command, refused, root, tmp_path):
    """In extract, a map and the cache of a frozen encoder."""
    spec, out = PATCHES.format(root=root), tmp_path / "out"
    run = command(spec=spec)
    extract = ["mode=extract", f"extract.output_dir={out}", "extract.output_filename='{split}.h5'"]
    command(*extract, "extract.precision=32", spec=spec)
    experiment = restore(run.path / "checkpoints" / "best.pt", load_checked_spec(run), ONE)
    model, data = experiment.model.double().eval(), read_data(experiment.root, ONE)
    grid = WindowGrid((8, 8, 8), (4, 4, 4))
    with h5py.File(out / "test.h5") as file, torch.no_grad():
        for row, volume in enumerate(data.splits["test"].source.windows(np.arange(10))):
            voxels = torch.from_numpy(volume[...]).double()
            cut = torch.stack([grid.cut(voxels, at) for at in grid.starts(voxels.shape[1:])])
            expected = model.embed(cut, "avg").mean(0).numpy()
            np.testing.assert_allclose(file["features"][row], expected, rtol=1e-4, atol=1e-5)
    said = refused(*extract, "extract.output=tokens", spec=spec)
    assert "which has their mean vector alone" in said
    command("mode=umap", "umap.method=pca", "umap.color_by=prediction", spec=spec)
    frozen = ["peft.method=linear_probing", "data.augmentation.train_kwargs.crop=center"]
    plain = command(*frozen, "name=plain", spec=spec)
    cached = command(*frozen, "training.cache_frozen_features=true", "name=cached", spec=spec)
    for first, second in zip(plain.records(), cached.records(), strict=True):
        assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-4)
    said = refused(
        *frozen, "training.cache_frozen_features=true", "data.augmentation.window_reduce=max",
        spec=spec,
    )  # fmt: skip
    assert "are not those of their mean vector" in said


def test_frozen_windows_are_encoded_once(command, root, monkeypatch):
    """Bags of as many windows as each volume has: the same training."""
    seen, of_windows = [], WindowsEncoder.of_windows
    monkeypatch.setattr(
        WindowsEncoder,
        "of_windows",
        lambda self, *given: (seen.append(len(given[0])), of_windows(self, *given))[1],
    )
    spec = RUN.format(root=root)
    frozen = ["peft.method=linear_probing", "data.augmentation.train_policy=default_3d_1"]
    plain = command(*frozen, "name=plain", spec=spec)
    often = sum(seen)
    seen.clear()
    cached = command(*frozen, "training.cache_frozen_features=true", "name=cached", spec=spec)
    assert often - sum(seen) == 2 * (12 + 2)  # epochs but the first
    for first, second in zip(plain.records(), cached.records(), strict=True):
        for name in ("train_loss", "val_loss"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    np.testing.assert_allclose(
        *(rows_of(run.path / "predictions_test.csv") for run in (plain, cached)), atol=1e-4
    )


def test_bags_of_windows_are_read_out_and_trained_on(command, refused, root, tmp_path):
    """Their places go with them."""
    spec, out = RUN.format(root=root), tmp_path / "out"
    command(spec=spec)
    extract = ["mode=extract", f"extract.output_dir={out}", "extract.output_filename='{split}.h5'"]
    command(*extract, "extract.output=tokens", spec=spec)
    grid = WindowGrid((8, 8, 8), (4, 4, 4))
    with h5py.File(out / "test.h5") as file:
        pointers, coords = file["bag_ptr"][:], file["coords"][:]
        assert file["features"].shape == (pointers[-1], 5) and len(pointers) == 11
        assert file.attrs["coords"].startswith("window: its first voxel")
        last = coords[slice(*pointers[-2:])]
        have = last.max(0) + 8  # the last window ends with the volume
        assert last.tolist() == grid.starts(have).tolist()
    for output in ("map", "embedding"):
        layers = ["extract.layers=[0]"] * (output == "embedding")
        said = refused(*extract, f"extract.output={output}", *layers, spec=spec)
        assert ("tokens of this encoder are no grid" in said) or ("those of windows" in said)
    features = spec[spec.index("[model.head]") :]
    data = f'[data]\ndataset = "precomputed_features"\ndata_root_dir = "{out}"\n'
    data += "".join(f'{s}_features_file = "{s}.h5"\n' for s in ("train", "val", "test"))
    data += '[model.encoder]\nencoder_type = "precomputed"\n'
    run = command(spec=data + features)
    command("mode=infer", "infer.attention_maps=2", spec=data + features)
    (path,) = (run.path / "infer").glob("attention*.h5")
    with h5py.File(path) as file:
        assert file.attrs["coords"] == "x,y,z" and (file["coords"][:] == coords).all()


@pytest.mark.processes
def test_ranks_and_ensembles_write_the_same(command, root, tmp_path):
    """Two ranks predict and map what one does; the map of two members is their mean."""
    spec = tmp_path / "both.toml"
    spec.write_text(RUN.format(root=root))
    runs = [command(f"seed={seed}", f"name=m{seed}", spec=spec.read_text()) for seed in (1, 2)]
    infer = ["mode=infer", "infer.volume_maps=true", "infer.attention_maps=0"]
    folders = {}
    for name, members in {"one": runs[:1], "two": runs[1:], "both": runs, "ranks": runs}.items():
        folders[name] = tmp_path / name
        both = [str(run.path / "checkpoints" / "best.pt") for run in members]
        arguments = [*infer, f"infer.output_dir={folders[name]}", f"infer.checkpoint={both}"]
        if name == "ranks":
            glovita(spec, "--override", *arguments, ranks=2)
        else:
            command(*arguments, spec=spec.read_text())
    maps = {
        name: {p.name: nibabel.load(p).get_fdata() for p in (folder / "maps_test").iterdir()}
        for name, folder in folders.items()
    }
    assert len(maps["both"]) == 10 and maps["both"].keys() == maps["ranks"].keys()
    for name, values in maps["both"].items():
        np.testing.assert_allclose(values, maps["ranks"][name], rtol=1e-5, atol=1e-8)
        mean = (maps["one"][name] + maps["two"][name]) / 2
        np.testing.assert_allclose(values, mean, rtol=1e-5, atol=1e-8)
    same = [(folders[name] / "attention_test.h5") for name in ("both", "ranks")]
    with h5py.File(same[0]) as one, h5py.File(same[1]) as other:
        assert (one["coords"][:] == other["coords"][:]).all()
        np.testing.assert_allclose(one["attention"][:], other["attention"][:], rtol=1e-5)
