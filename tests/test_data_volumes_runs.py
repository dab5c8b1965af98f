"""Runs on volumes do not depend on how they are carried out: killed and continued, on two ranks, in
mode infer, with the cache made by two programs at once, with broken files left out."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from children import GLOVITA, Child, glovita, run_ranks
from killed_runs import KILLED, arguments, assert_killed_run_goes_on
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from small_runs import Result
from volume_files import ORIENTATIONS, PLAIN, affine_of, blob, write_dicom, write_nifti

from glovita_lib.extraction import Extractor
from glovita_lib.read_volume import open_sample
from glovita_lib.spec_volumes import VolumePreparation
from glovita_lib.volume_preparation import prepare

SPEC = """
[data]
dataset = "generic_3d_dataset"
data_root_dir = "ROOT"
label_source = "csv"
split_source = "csv"
strict = false
[data.preparation]
spacing = [1.0, 2.0, 1.5]
workers = 1
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 2
save_every_steps = 1
log_every = 1
[dataloading]
batch_size = 2
num_workers = 0
[logger]
backend = "none"
"""
CONVOLUTIONS = """
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = 1
strides = [1, 2]
"""
SLICES = """
[model.encoder]
encoder_type = "timm"
type = "test_vit"
pretrained = false
model_kwargs = { patch_size = 4, embed_dim = 16, depth = 2, num_heads = 2, proj_drop_rate = 0.1 }
lift = "slices"
[model.encoder.slices]
count = 3
size = [8, 8]
[model.head]
head_type = "abmil"
hidden = 8
attention = 4
[peft]
method = "lora"
"""
PATCHES = """
[data.augmentation]
patch_size = [8, 6, 8]
train_policy = "default_nnunet_DA5"
train_kwargs = { crop = "foreground", rotate_p = 0.8, noise_p = 0.8 }
"""
WINDOWS = (
    CONVOLUTIONS
    + """
lift = "windows"
[model.encoder.windows]
size = [6, 4, 6]
overlap = 0.5
[model.head]
head_type = "abmil"
hidden = 8
attention = 4
"""
)
LEFT_OUT = "3 volumes left out:"
KINDS = {"convolutions": SPEC + PATCHES + CONVOLUTIONS, "slices": SPEC + PATCHES + SLICES}
WINDOWED = {
    "evaluation": SPEC + PATCHES + 'evaluation = "windows"\nwindow_chunk = 3\n' + CONVOLUTIONS,
    "lift": SPEC + PATCHES.replace("patch_size = [8, 6, 8]\n", "") + WINDOWS,
}
PROBE = """
[data]
dataset = "precomputed_features"
{files}
[model.encoder]
encoder_type = "precomputed"
[task]
objective = "probe"
distance = "euclidean"
k = [1]
l2 = [0.1]
result_plot = "none"
bootstrap = 0
[logger]
backend = "none"
"""


def write_set(folder: Path, broken: bool = True) -> Path:
    """Fourteen volumes of unlike sizes and spacings in two classes, in three splits, and with
    `broken` three files that cannot be used."""
    rows = []
    for number in range(14):
        shape = (9 + number % 3, 8, 10 - number % 2)
        voxels = blob(shape, seed=number) + 5
        if number % 2:
            voxels = voxels * np.linspace(1, 4, shape[0], dtype=np.float32)[:, None, None]
        spacing = (1, 2, 1.5) if number % 3 else (1.25, 2, 1.5)
        write_nifti(folder / "images" / f"{number:02d}.nii.gz", voxels, affine_of(spacing))
        split = "train" if number < 7 else "val" if number < 10 else "test"
        rows.append((f"{number:02d}.nii.gz", ("dark", "bright")[number % 2], split))
    if broken:
        cut = (folder / "images" / "03.nii.gz").read_bytes()
        (folder / "images" / "cut.nii.gz").write_bytes(cut[:-60])
        write_nifti(folder / "images" / "constant.nii", np.ones((8, 8, 8)))
        rows += [("cut.nii.gz", "dark", "train"), ("constant.nii", "dark", "test")]
        rows.insert(3, ("gone.nii", "bright", "val"))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The data set of all tests of this module; the first of them makes its cache."""
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(params=KINDS)
def spec(request, root) -> str:
    """Random patches into convolutions, and slices of them into a ViT with LoRA and attention."""
    return KINDS[request.param].replace("ROOT", str(root))


@pytest.fixture(params=WINDOWED)
def windowed(request, root) -> str:
    """Patches with windows in evaluation, and whole volumes as bags of windows."""
    return WINDOWED[request.param].replace("ROOT", str(root))


# ---------------------------------------------------------------------- one process


def test_new_volumes_stored_in_another_order_are_told(command, tmp_path, root):
    """Slices along an axis of the files are others in them."""
    spec = (SPEC + PATCHES + SLICES).replace("ROOT", str(root))
    changes = ("name=run", "data.reading.canonical=false", "training.epochs=1")
    assert "slices.axis" not in command(*changes, spec=spec).out
    for number, code in enumerate(("RAS", "SPL")):
        write_nifti(tmp_path / "new" / f"{number}.nii", blob((12, 14, 16)), affine_of(), code)
    run = command("mode=infer", f"infer.input={tmp_path / 'new'}", *changes, spec=spec)
    assert "which does not run foot to head in 1 of 2 volumes asked about" in run.out + run.err


@pytest.mark.parametrize("memory", ["in memory", "by workers"])
def test_a_killed_run_goes_on_bit_for_bit(command, tmp_path, monkeypatch, spec, memory):
    """Within an epoch; patches and their augmentation follow from seed, epoch and batch."""
    changes = ["dataloading.in_memory_mb=0", "dataloading.num_workers=2"] * (memory == "by workers")
    assert_killed_run_goes_on(command, tmp_path, monkeypatch, spec, LEFT_OUT, *changes)


def test_a_killed_run_with_windows_goes_on_bit_for_bit(command, tmp_path, monkeypatch, windowed):
    assert_killed_run_goes_on(command, tmp_path, monkeypatch, windowed, LEFT_OUT)


def test_what_training_predicts_is_what_infer_predicts(command, tmp_path, spec):
    """Mode infer byte for byte, with the volumes in memory or not; batches of another size up to
    rounding."""
    run = command("name=run", spec=spec)
    place = ["data.preparation.workers=2", f"data.preparation.cache_dir={tmp_path / 'scratch'}"]
    assert "nothing to do" in command("name=run", *place, spec=spec).out
    for changes in (["dataloading.in_memory_mb=0"], ["dataloading.in_memory_mb=100", *place]):
        command("name=run", "mode=infer", *changes, spec=spec)
        for file in ("predictions_test.csv", "metrics_test.json"):
            assert (run.path / "infer" / file).read_bytes() == (run.path / file).read_bytes()
    assert [row["id"] for row in run.rows()] == [f"{number}.nii.gz" for number in range(10, 14)]
    other = (f"infer.checkpoint={run.path}/checkpoints/best.pt", f"infer.output_dir={tmp_path}")
    command(*other, "mode=infer", "dataloading.eval_batch_size=1", spec=spec)
    with open(tmp_path / "predictions_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for found, expected in zip(rows, run.rows(), strict=True):
        assert float(found["p_dark"]) == pytest.approx(float(expected["p_dark"]), abs=1e-5)


def assert_killed_extraction_goes_on(command, tmp_path, monkeypatch, spec, *changes):
    """An extraction that is stopped in its fourth block and started again equals a whole one."""
    changes += ("mode=extract", "extract.source=encoder", "extract.output_filename='{split}.h5'")
    changes += ("extract.block_samples=2", "dataloading.eval_batch_size=2")
    command(*changes, f"extract.output_dir={tmp_path / 'whole'}", spec=spec)
    calls, finish = [], Extractor.finish

    def stopping(self, running, **options):
        calls.append(running)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return finish(self, running, **options)

    again = f"extract.output_dir={tmp_path / 'again'}"
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "finish", stopping)
        command(*changes, again, spec=spec, code=130)
    assert "blocks were finished" in command(*changes, again, spec=spec).out
    for split in ("train", "val", "test"):
        found, whole = ((tmp_path / kind / f"{split}.h5") for kind in ("again", "whole"))
        assert found.read_bytes() == whole.read_bytes()


def test_a_killed_extraction_writes_what_a_whole_one_writes(command, tmp_path, monkeypatch, spec):
    changes = ["extract.output=tokens"] * ("slices" in spec)
    assert_killed_extraction_goes_on(command, tmp_path, monkeypatch, spec, *changes)


def test_a_killed_extraction_of_windows_writes_what_a_whole_one_writes(
    command, tmp_path, monkeypatch, windowed
):
    """Bags of windows with their places; the mean vector where evaluation goes by windows."""
    changes = ["extract.output=tokens"] * ("lift" in windowed)
    assert_killed_extraction_goes_on(command, tmp_path, monkeypatch, windowed, *changes)


def test_left_out_files_change_nothing(command, tmp_path, spec, root):
    """A run on the same files without the broken ones learns and predicts the same."""
    with_broken = command("name=run", spec=spec)
    clean = write_set(tmp_path / "clean", broken=False)
    other = command("name=other", spec=spec.replace(str(root), str(clean)))
    for split in ("val", "test"):
        file = f"predictions_{split}.csv"
        assert (with_broken.path / file).read_bytes() == (other.path / file).read_bytes()
    for key, value in with_broken.last["model"].items():
        assert torch.equal(other.last["model"][key], value), key


# ---------------------------------------------------------------------- several processes


def run_dir(folder: Path) -> Path:
    """The run below such a folder."""
    return folder / "runs" / "generic_3d_dataset" / "run" / "0"


@pytest.mark.processes
@pytest.mark.parametrize(
    "windowed", [pytest.param("evaluation", marks=pytest.mark.slow), "lift"], indirect=True
)
def test_two_ranks_learn(command, tmp_path, windowed):
    """Killed and continued as left alone, bit for bit; and what one process learns that accumulates
    two batches, up to the order of sums."""
    changes = ["optimizer.name=SGD", "optimizer.lr=0.01", "dataloading.batch_size=1"]
    changes += ["training.epochs=1"]
    commands = {name: arguments(tmp_path / name, windowed, *changes) for name in ("two", "killed")}
    glovita(*commands["two"], ranks=2)
    stopped = run_ranks(KILLED, 2, *commands["killed"])
    assert {one.code for one in stopped} == {9}
    assert "after optimizer step 2" in glovita(*commands["killed"], ranks=2)
    two, killed = (Result(0, "", "", run_dir(tmp_path / name)) for name in ("two", "killed"))
    for key, value in two.last["model"].items():
        assert torch.equal(killed.last["model"][key], value), key
    one = command(*changes, "training.gradient_accumulation_steps=2", spec=windowed)
    found, expected = ([r["train_loss"] for r in run.records("step")] for run in (two, one))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for key, value in one.last["model"].items():
        torch.testing.assert_close(two.last["model"][key], value, rtol=1e-3, atol=2e-5)
    for file in ("predictions_val.csv", "predictions_test.csv"):
        assert (killed.path / file).read_bytes() == (two.path / file).read_bytes()


@pytest.mark.processes
def test_two_ranks_read_out(command, tmp_path, root):
    """Predictions and features of slices are those of one process, byte for byte."""
    spec = KINDS["slices"].replace("ROOT", str(root))
    best = command("training.epochs=1", spec=spec).path / "checkpoints" / "best.pt"
    infer = ["mode=infer", f"infer.checkpoint={best}", "infer.attention=true"]
    extract = ["mode=extract", "extract.split=test", "extract.output=tokens"]
    extract += ["extract.output_filename='{split}.h5'", f"extract.checkpoint={best}"]
    one, two = tmp_path / "one", tmp_path / "two"
    for changes, key in ((infer, "infer.output_dir"), (extract, "extract.output_dir")):
        command(*changes, f"{key}={one}", spec=spec)
        glovita(*arguments(tmp_path / "ranks", spec, *changes, f"{key}={two}"), ranks=2)
    files = {"predictions_test.csv", "attention_test.h5", "test.h5"}
    assert files <= {path.name for path in one.iterdir()}
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.processes
def test_two_programs_make_one_cache(tmp_path):
    """Both start on a data set without a cache; each volume is prepared once, and both learn what a
    third one learns afterwards."""
    root = write_set(tmp_path / "set")
    spec = KINDS["convolutions"].replace("ROOT", str(root))
    started = [Child(GLOVITA, arguments(tmp_path / name, spec)) for name in ("a", "b")]
    done = [child.wait() for child in started]
    assert [each.code for each in done] == [0, 0], "".join(each.out for each in done)
    made = {path: path.stat().st_mtime_ns for path in root.rglob("*.h5")}
    assert len(made) == 14
    glovita(*arguments(tmp_path / "c", spec))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.h5")} == made
    last = [run_dir(tmp_path / name) / "checkpoints" / "best.pt" for name in "abc"]
    networks = [torch.load(path, weights_only=True)["model"] for path in last]
    for key, value in networks[2].items():
        assert torch.equal(networks[0][key], value) and torch.equal(networks[1][key], value), key


# ---------------------------------------------------------------------- how files are stored

PLACES = ((7.0, 9.0, 13.0), (15.0, 12.0, 8.0), (12.0, 16.0, 15.0))  # of what is in a phantom, mm
HEIGHTS = (1.0, 0.6, 0.3)
SPACINGS = ((1.0, 1.0, 1.0), (0.75, 1.5, 1.0), (1.5, 0.75, 2.0))
AWAY = (1e-5, 0.06, 0.2)  # of a largest value of 11.6


def phantom(spacing: tuple[float, float, float], heights: tuple[float, float, float]):
    """A cube of 24 mm with three bright balls, steeper on one side of each axis, that are smooth at
    every spacing; and its affine."""
    sides = [np.arange(round(24 / step)) * step + step / 2 for step in spacing]
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), -1)
    voxels = np.zeros(grid.shape[:3])
    for height, place in zip(heights, PLACES, strict=True):
        u = (grid - place) / (2.5, 3.0, 3.5)
        voxels += height * (np.exp(-(u**2) / 2) * (1 + 0.8 * np.tanh(u))).prod(-1)
    origin = [step / 2 for step in spacing]
    return (100 * voxels).astype(np.float32), affine_of(spacing, origin)


def changed_phantoms() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What files would be taken for, if an axis were read backwards, two were exchanged, or a
    spacing belonged to another axis or were lost."""
    voxels, affine = phantom((1.0, 1.0, 1.0), HEIGHTS)
    changed = {f"flip{axis}": np.flip(voxels, axis) for axis in range(3)}
    changed |= {f"swap{a}{b}": voxels.swapaxes(a, b) for a, b in ((0, 1), (0, 2), (1, 2))}
    found = {name: (array, affine) for name, array in changed.items()}
    stretched, _ = phantom((1.5, 0.75, 2.0), HEIGHTS)
    for name, spacing in (("order", (2.0, 1.5, 0.75)), ("lost", (1.0, 1.0, 1.0))):
        found[name] = stretched, affine_of(spacing)
    return found


def write_phantoms(folder: Path) -> None:
    """One object stored in eight orientations at three spacings, and what it would be taken for."""
    for number, spacing in enumerate(SPACINGS):
        for codes in ORIENTATIONS:
            write_nifti(folder / f"same{number}{codes}.nii", *phantom(spacing, HEIGHTS), codes)
    for name, (voxels, affine) in changed_phantoms().items():
        write_nifti(folder / f"{name}.nii", voxels, affine)


def same_and_changed(found: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest distance within the object that is stored in many ways, whose orientations are equal,
    and the smallest one between it and others."""
    of_spacings = []
    for number in range(len(SPACINGS)):
        values = [found[f"same{number}{codes}"] for codes in ORIENTATIONS]
        assert all((value == values[0]).all() for value in values)
        of_spacings.append(values[0])
    pairs = [np.linalg.norm(a - b) for a in of_spacings for b in of_spacings if a is not b]
    others = [value for name, value in found.items() if not name.startswith("same")]
    return max(pairs), min(np.linalg.norm(a - b) for a in of_spacings for b in others)


def test_orientation_and_spacing_are_undone_by_preparation(tmp_path):
    """At one spacing all orientations are the same numbers; between spacings the object is sampled
    at other places, and smoothing and interpolation flatten it by one per cent."""
    write_phantoms(tmp_path)
    sides = {"spacing": (1, 1, 1), "size": (24, 24, 24)}
    how = VolumePreparation(**sides, interpolation="cubic", dtype="float32")
    found = {}
    for path in tmp_path.iterdir():
        sample = open_sample([str(path)], PLAIN)
        prepared = prepare(sample.read(), sample.affine, how, has_spacing=True)
        found[path.stem] = prepared.voxels
        if path.name.startswith("same"):
            np.testing.assert_allclose(prepared.affine, affine_of(origin=(0.5, 0.5, 0.5)))
    exact, _ = phantom((1.0, 1.0, 1.0), HEIGHTS)
    for number in range(len(SPACINGS)):
        prepared = found[f"same{number}RAS"][0]
        away = np.abs(prepared - (exact - exact.mean()) / exact.std())
        assert away.max() < AWAY[number]
    same, changed = same_and_changed(found)
    assert same < 0.05 * changed


@pytest.mark.parametrize("kind", KINDS)
def test_orientation_and_spacing_of_a_file_do_not_count(command, tmp_path, root, kind):
    """The predictions of one object, eight numbers, however it is stored, lie close together in
    relation to those of the objects that it would be taken for; all of a network that is random,
    and so looks at everything."""
    names = [f"t{number}" for number in range(8)]
    draws = np.random.default_rng(0)
    with open(root / "numbers.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "split", *names])
        for number in range(10):
            split = "train" if number < 7 else "val"
            table.writerow([f"{number:02d}.nii.gz", split, *draws.normal(size=8).round(3)])
    spec = KINDS[kind].replace("ROOT", str(root)).replace("[1.0, 2.0, 1.5]", "[1.0, 1.0, 1.0]")
    spec = spec.replace("patch_size = [8, 6, 8]", "patch_size = [24, 24, 24]")
    wide = ("model.head.head_type=regression", "model.encoder.features_per_stage=[16,32]")
    run = command(
        *(() if kind == "slices" else wide), "data.preparation.interpolation=cubic",
        "training.epochs=1", "optimizer.lr=1e-9", "data.labels_file=numbers.csv",
        "data.subtask=regression", f"data.label_column={json.dumps(names)}", spec=spec,
    )  # fmt: skip
    write_phantoms(tmp_path / "new")
    command(
        "mode=infer", f"infer.checkpoint={run.path}/checkpoints/best.pt",
        f"infer.input={tmp_path / 'new'}", f"infer.output_dir={tmp_path}", spec=spec,
    )  # fmt: skip
    with open(tmp_path / "predictions_new.csv", newline="") as file:
        found = {
            row["id"].removesuffix(".nii"): np.array([float(row[f"prediction_{n}"]) for n in names])
            for row in csv.DictReader(file)
        }
    assert len(found) == 3 * 8 + 8
    same, changed = same_and_changed(found)
    assert 0 < same < 0.5 * changed


# ---------------------------------------------------------------------- files that are broken


def write_broken(root: Path) -> dict[str, str]:
    """A file of each kind that cannot be used, with what is said about it."""
    images = root / "images"
    good = blob((8, 8, 8))
    whole = write_nifti(images / "whole.nii", good).read_bytes()
    (images / "short.nii").write_bytes(whole[:-100])
    (images / "cut.nii.gz").write_bytes((images / "03.nii.gz").read_bytes()[:-60])
    (images / "empty.nii").write_bytes(b"")
    (images / "text.nii").write_bytes(b"no volume at all" * 40)
    (images / "zeros.nii").write_bytes(whole[:280] + bytes(48) + whole[328:])
    write_nifti(images / "nan.nii", np.where(good > good.mean(), good, np.nan))
    write_nifti(images / "constant.nii", np.full((8, 8, 8), 3.0))
    write_nifti(images / "frames.nii", np.stack([good] * 2, -1))
    write_nifti(images / "dark.nii", good - 1000)
    np.save(images / "two.npy", np.stack([good] * 2))
    np.save(images / "nothing.npy", np.zeros((8, 0, 8), np.float32))
    voxels = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
    write_dicom(images / "gap", voxels, positions=[0, 2, 4, 8])
    write_dicom(images / "mixed", voxels)
    write_dicom(images / "mixed", voxels, description="b", cosines=(0, 1, 0, 1, 0, 0))
    return {
        "short.nii": "truncated",
        "cut.nii.gz": "truncated",
        "empty.nii": "an empty file",
        "text.nii": "broken volume file",
        "zeros.nii": "singular",
        "nan.nii": "NaN or infinite",
        "constant.nii": "constant: every voxel is 3",
        "frames.nii": "4-D, 2 frames",
        "dark.nii": "no foreground",
        "two.npy": "2 channels, most have 1",
        "nothing.npy": "no voxels: its shape is 1 x 8 x 0 x 8",
        "gap": "1 slice missing",
        "mixed": "orientations mix",
        "gone.nii": "no such file",
    }


def test_broken_files_stand_in_one_report(command, tmp_path):
    """From the command line: exit code 2, one line each, nothing half-written; what is whole is
    prepared already, and with data.strict = false the run takes it."""
    root = write_set(tmp_path / "set", broken=False)
    said = write_broken(root)
    with open(root / "labels.csv", "a", newline="") as file:
        csv.writer(file).writerows((name, "dark", "train") for name in said)
    spec = KINDS["convolutions"].replace("ROOT", str(root)).replace("strict = false\n", "")
    cropped = '1.5]\ncrop = "foreground"\nforeground = 0.0'
    spec = spec.replace("1.5]", cropped) + "[data.reading]\narray_spacing = [1, 1, 1]\n"
    head, *lines = command(spec=spec, code=2).err.splitlines()
    assert head == "14 volumes cannot be used; mend them or set data.strict = false:"
    assert len(lines) == len(said) == 14
    for name, text in said.items():
        (line,) = [line for line in lines if line.startswith(f"  {name}: ")]
        assert text in line, line
    assert not list(tmp_path.glob("**/*.pt"))
    prepared = {path: path.stat().st_mtime_ns for path in root.rglob("*.h5")}
    run = command("data.strict=false", "training.epochs=1", spec=spec)
    assert "14 volumes left out:" in run.out + run.err and "train 7, val 3, test 4" in run.out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.h5")} == prepared


def test_probes_of_frozen_encoders_of_volumes(command, tmp_path, spec):
    """Vectors of whole volumes from an encoder as it is, judged as scikit-learn judges them; of the
    files that cannot be used none is lost in between."""
    files = ("extract.output_filename='{split}.h5'", "extract.precision=32")
    extract = ("mode=extract", "extract.source=encoder", f"extract.output_dir={tmp_path}", *files)
    assert "left out" in command(*extract, spec=spec).out
    assert "a probe augments nothing" in command("task.objective=probe", spec=spec, code=2).err
    refused = command("task.objective=probe", spec=spec.replace(PATCHES, ""), code=2).err
    assert 'write them with mode = "extract"' in refused
    names = "\n".join(f'{s}_features_file = "{tmp_path / s}.h5"' for s in ("train", "val", "test"))
    probe = command(spec=PROBE.format(files=names))
    vectors, labels = {}, {}
    for split in ("train", "val", "test"):
        with h5py.File(tmp_path / f"{split}.h5") as file:
            vectors[split], labels[split] = file["features"][:], file["labels"][:]
    assert len(labels["train"]) == 7 and len(labels["test"]) == 4
    nearest = KNeighborsClassifier(1).fit(vectors["train"], labels["train"])
    scale = StandardScaler().fit(vectors["train"])
    linear = LogisticRegression(C=1 / (0.1 * 7), max_iter=1000)
    linear.fit(scale.transform(vectors["train"]), labels["train"])
    expected = {
        "knn": nearest.predict(vectors["test"]),
        "linear": linear.predict(scale.transform(vectors["test"])),
    }
    for method, classes in expected.items():
        with open(probe.path / f"predictions_{method}_test.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == [f"{number}.nii.gz" for number in range(10, 14)]
        found = [["bright", "dark"].index(row["prediction"]) for row in rows]
        assert found == classes.tolist(), method
