"""Data sets of volumes: labels, splits, folds and groups of every source, bad files in one report,
and whole runs on them."""

import csv
import json

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from volume_files import ORIENTATIONS, affine_of, blob, write_dicom, write_frames, write_nifti

from glovita_lib.data import VolumeSamples, subset
from glovita_lib.data_volumes import unlabelled_volumes
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.spec_data import VolumeData
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading

SHAPE = (8, 9, 7)
PREPARED = VolumePreparation(size=SHAPE, workers=1)


def write(root, names, shape=SHAPE):
    """Volumes of these names, the bright ones brighter towards one side."""
    for number, name in enumerate(names):
        voxels = blob(shape, seed=number) + 5
        if "bright" in name or number % 2:
            voxels = voxels * np.linspace(1, 4, shape[0], dtype=np.float32)[:, None, None]
        write_nifti(
            root / "images" / name, voxels, affine_of((1, 2, 1.5)), ORIENTATIONS[number % 8]
        )


def build(root, **fields):
    fields = {"preparation": PREPARED, "label_source": "csv", "split_source": "csv", **fields}
    return build_data(VolumeData(data_root_dir=str(root), **fields), seed=0)


def table(root, rows, name="labels.csv"):
    with open(root / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def unlisted(data):
    return [line for line in data.report if "not in the label file" in line]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


SPLITS = ["train", "train", "train", "train", "val", "val", "test", "test"]


@pytest.fixture
def root(tmp_path):
    """Eight volumes with a class, two numbers, two labels, a patient and a split in a table."""
    names = [f"{number}.nii.gz" for number in range(8)]
    write(tmp_path, names)
    rows = [
        {
            "path": name, "label": ["dark", "bright"][n % 2], "size": n / 2, "age": 40 + n,
            "a": n % 2, "b": int(n > 3), "who": f"p{n // 2}", "split": SPLITS[n],
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    table(tmp_path, rows)
    return tmp_path


# ---------------------------------------------------------------------- labels and splits


def test_classes_numbers_and_labels_of_a_table(root):
    data = build(root)
    assert data.class_names == ("bright", "dark") and data.subtask == "multiclass"
    assert data.samples.channels == 1 and data.samples.preparation.size == SHAPE
    assert data.samples.preparation.workers is None
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 4, "val": 2, "test": 2
    }  # fmt: skip
    train = data.splits["train"]
    assert train.ids == [f"{n}.nii.gz" for n in range(4)] and train.targets.tolist() == [1, 0, 1, 0]
    volumes = train.source.fetch(np.arange(4))
    assert volumes.shape == (4, 1, *SHAPE) and volumes.dtype == np.float16
    assert abs(volumes.astype(float).mean((1, 2, 3, 4))).max() < 1e-2  # zscore
    numbers = build(root, subtask="regression", label_column=("size", "age"))
    assert numbers.splits["val"].targets.tolist() == [[2, 44], [2.5, 45]]
    several = build(root, subtask="multilabel", label_column=("a", "b"))
    assert several.splits["test"].targets.tolist() == [[0, 1], [1, 1]]


def test_folds_keep_groups_together(root):
    tested = []
    for fold in range(4):
        data = build(root, split_source="kfold", n_folds=4, fold=fold, group_column="who")
        groups = {name: set(split.groups) for name, split in data.splits.items()}
        assert not groups["train"] & groups["test"] and not groups["train"] & groups["val"]
        tested += data.splits["test"].ids
    assert sorted(tested) == [f"{n}.nii.gz" for n in range(8)]
    with pytest.raises(UserError, match="groups are in more than one split"):
        rows = rows_of(root / "labels.csv")
        table(root, [{**row, "who": "one"} for row in rows])
        build(root, group_column="who")


def test_json_labels_and_splits_by_names_without_suffix(tmp_path):
    """Names of cases, one-hot labels, facts in dataset.json."""
    write(tmp_path, [f"case{n}.nii.gz" for n in range(6)])
    cases = [f"case{n}" for n in range(6)]
    facts = {"num_classes": 3, "subtask": "multiclass", "other": 1}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    hot = {case: [int(k == n % 2) for k in range(3)] for n, case in enumerate(cases)}
    (tmp_path / "labels.json").write_text(json.dumps(hot))
    splits = [{"train": cases[:4], "val": cases[4:]}, {"train": cases[2:], "val": cases[:2]}]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    fields = {"label_source": "json", "split_source": "splits_json", "path_suffix": (".nii.gz",)}
    data = build(tmp_path, fold=1, **fields)
    assert data.class_names == ("0", "1", "2") and data.splits["val"].ids == cases[:2]
    assert data.splits["val"].targets.tolist() == [0, 1]
    multi = {case: [n % 2, 1, 0] for n, case in enumerate(cases)}
    (tmp_path / "labels.json").write_text(json.dumps(multi))
    facts = {"subtask": "multilabel", "class_names": ["x", "y", "z"]}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    data = build(tmp_path, **fields)
    assert data.subtask == "multilabel" and data.class_names == ("x", "y", "z")
    assert data.splits["val"].targets.tolist() == [[0, 1, 0], [1, 1, 0]]
    for facts, said in (
        ({"subtask": "segmentation"}, 'subtask "segmentation": valid are'),
        ({"num_classes": "3"}, "must be a whole number"),
        ({"class_names": {"0": "x"}}, "must be a list of names"),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps(facts))
        with pytest.raises(UserError, match=said):
            build(tmp_path, **fields)


def test_lists_of_dataset_json(tmp_path):
    write(tmp_path, [f"{n}_{kind}.nii" for n in range(6) for kind in ("t1", "t2")])
    entries = [
        {"image": [f"./images/{n}_t1.nii", f"images/{n}_t2.nii"], "label": n % 2} for n in range(6)
    ]
    content = {"name": "x", "training": entries[:4], "validation": entries[4:], "test": ["x.nii"]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    fields = {
        "label_source": "dataset_json",
        "split_source": "dataset_json",
        "images_dir": ".",
        "train_split_name": "training",
        "val_split_name": "validation",
    }
    data = build(tmp_path, **fields)
    assert data.samples.channels == 2 and set(data.splits) == {"train", "val"}
    assert not unlisted(data)
    assert data.splits["val"].ids == ["images/4_t1.nii", "images/5_t1.nii"]
    with pytest.raises(UserError, match='"training".; splits there: training, validation'):
        build(tmp_path, **{**fields, "train_split_name": "train"})
    content["training"][0]["image"][1] = "images/9_t2.nii"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"/0_t1.nii: no such file beside it: images/9_t2.nii"):
        build(tmp_path, **fields)


def test_class_folders_and_dicom_folders(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
    for number in range(6):
        kind = ("dark", "bright")[number % 2]
        split = ("train", "val")[number > 3]
        write_dicom(
            tmp_path / "images" / split / kind / f"p{number}", voxels + number, uid=f"1.{number}"
        )
        write(tmp_path, [f"{split}/{kind}/{number}.nii"])
    data = build(tmp_path, label_source="folder", split_source="subdirs")
    assert len(data.splits["train"]) == 8 and data.class_names == ("bright", "dark")
    assert "train/dark/p0" in data.splits["train"].ids
    assert "train/dark/0.nii" in data.splits["train"].ids


def test_series_of_a_study_are_channels(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
    for number in range(4):
        for kind in ("t1", "t2"):
            folder = tmp_path / "images" / f"p{number}" / kind
            write_dicom(folder, voxels + number, uid=f"1.{number}.{kind[1]}", description=kind)
    rows = [{"path": f"p{n}", "label": n % 2, "split": SPLITS[n * 2]} for n in range(4)]
    table(tmp_path, rows)
    series = ("SeriesDescription=t2", "SeriesDescription=t1")
    data = build(tmp_path, reading=VolumeReading(series=series))
    assert data.samples.channels == 2 and data.splits["train"].ids == ["p0", "p1"]
    one = build(tmp_path, reading=VolumeReading(series=series[:1]))  # of each study that has a row
    assert one.samples.channels == 1 and not unlisted(data) and not unlisted(one)
    table(tmp_path, [{**row, "a": f"p{n}/t1", "b": f"p{n}/t2"} for n, row in enumerate(rows)])
    pairs = build(tmp_path, path_column=("a", "b"))
    assert pairs.samples.channels == 2 and pairs.splits["train"].ids == ["p0/t1", "p1/t1"]
    assert not unlisted(pairs)
    write(tmp_path, ["p0/mask.nii"])
    (line,) = unlisted(build(tmp_path, path_column=("a", "b")))
    assert line.startswith("1 volumes of")
    with pytest.raises(UserError, match="2 series, choose one"):
        build(tmp_path)


def test_suffixes_of_channels_as_nnunet_names_them(tmp_path):
    names = [f"case{n}_000{c}.nii.gz" for n in range(4) for c in range(2)]
    write(tmp_path, names)
    rows = [{"path": f"case{n}", "label": n % 2, "split": SPLITS[n * 2]} for n in range(4)]
    table(tmp_path, rows)
    suffixes = ("_0000.nii.gz", "_0001.nii.gz")
    data = build(tmp_path, path_suffix=suffixes)
    assert data.samples.channels == 2 and data.splits["train"].ids == ["case0", "case1"]
    (tmp_path / "images" / names[3]).unlink()
    with pytest.raises(UserError, match=r"case1: no file case1_0001.nii.gz"):
        build(tmp_path, path_suffix=suffixes)
    assert len(build(tmp_path, path_suffix=suffixes, strict=False).splits["train"]) == 1


def test_files_of_all_columns_are_in_the_label_file(tmp_path):
    """Where a row lacks one of its files, the others are in it nevertheless."""
    write(tmp_path, [f"{n}_{kind}.nii" for n in range(6) for kind in ("t1", "t2")])
    rows = [
        {"t1": f"{n}_t1.nii", "t2": f"{n}_t2.nii", "label": n % 2, "split": SPLITS[n]}
        for n in range(6)
    ]
    table(tmp_path, rows)
    fields = {"path_column": ("t1", "t2"), "strict": False}
    assert not unlisted(build(tmp_path, **fields))
    assert not unlisted(build(tmp_path, split_source="kfold", n_folds=3, **fields))
    (tmp_path / "images" / "0_t2.nii").unlink()
    assert not unlisted(build(tmp_path, **fields))
    write(tmp_path, ["more.nii", "sub/more.nii"])
    (line,) = unlisted(build(tmp_path, **fields))
    assert line.startswith("2 volumes of")
    table(tmp_path, rows[1:])
    (line,) = unlisted(build(tmp_path, **fields))
    assert line.startswith("3 volumes of")


def test_every_row_that_lacks_a_file_has_its_line(tmp_path):
    write(tmp_path, [f"{n}_{kind}.nii" for n in range(12) for kind in ("t1", "t2")])
    rows = [
        {"t1": f"{n}_t1.nii", "t2": f"{n}_t2.nii", "label": n % 2, "split": SPLITS[n // 2]}
        for n in range(12)
    ]
    for number, files in {
        1: {"t2": ""}, 3: {"t2": ""}, 5: {"t2": "0_t3.nii"}, 7: {"t2": "0_t3.nii"}, 9: {"t1": ""},
        10: {"t1": "1_t1.nii", "t2": "t2.nii"}, 11: {"t1": "gone.nii", "t2": ""},
    }.items():  # fmt: skip
        rows[number].update(files)
    table(tmp_path, rows)
    said = [
        "1_t1.nii: no such file beside it: (no t2 in row 2)",
        "3_t1.nii: no such file beside it: (no t2 in row 4)",
        "5_t1.nii: no such file beside it: 0_t3.nii",
        "7_t1.nii: no such file beside it: 0_t3.nii",
        "(no t1 in row 10): no such file",
        "1_t1.nii beside t2.nii: no such file beside it: t2.nii",
        "gone.nii: no such file",
    ]
    for split in ({}, {"split_source": "kfold", "n_folds": 3}):
        with pytest.raises(UserError) as caught:
            build(tmp_path, path_column=("t1", "t2"), **split)
        head, *lines = str(caught.value).splitlines()
        assert head.startswith("7 volumes cannot be used") and [line[2:] for line in lines] == said
    new = VolumeSamples(channels=2, reading=VolumeReading(), preparation=PREPARED)
    for row in rows:
        row.update({kind: row[kind] and f"images/{row[kind]}" for kind in ("t1", "t2")})
    table(tmp_path, rows[:10] + rows[11:])
    files = VolumeData(path_column=("t1", "t2"))
    with pytest.raises(UserError) as caught:
        unlabelled_volumes(str(tmp_path / "labels.csv"), new, files)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("6 volumes of 11 cannot be read")
    places = ["row 2", "row 4", "0_t3", "0_t3", "row 10", "gone"]
    for line, text, place in zip(lines[1:], said[:5] + said[6:], places, strict=True):
        folder = "" if text.startswith("(") else "images/"
        assert line.startswith(f"  {folder}{text.partition(': ')[0]}: ") and place in line


def test_new_samples_have_a_first_file_of_their_own(tmp_path):
    """By which results are named."""
    write(tmp_path, [f"{n}_{kind}.nii" for n in range(3) for kind in ("t1", "t2", "t3")])
    names = [(0, "t2"), (1, "t2"), (1, "t3"), (2, "t2"), (2, "t2")]
    rows = [{"t1": f"images/{n}_t1.nii", "t2": f"images/{n}_{kind}.nii"} for n, kind in names]
    table(tmp_path, rows)
    new = VolumeSamples(channels=2, reading=VolumeReading(), preparation=PREPARED)
    files = VolumeData(path_column=("t1", "t2"))
    with pytest.raises(UserError, match="1_t1.nii: stands beside images/1_t2.nii and beside imag"):
        unlabelled_volumes(str(tmp_path / "labels.csv"), new, files)
    split, notes = unlabelled_volumes(
        str(tmp_path / "labels.csv"), new, replace(files, strict=False)
    )
    assert split.ids == ["images/0_t1.nii", "images/2_t1.nii"]
    assert any("1 volume left out" in note for note in notes)
    assert any(note.startswith("1 rows of") and "used once" in note for note in notes)


# ---------------------------------------------------------------------- bad files


def test_all_bad_files_stand_in_one_report_and_are_left_out(root):
    images = root / "images"
    nan = blob(SHAPE)
    nan[3, 3, 3] = np.nan
    cut = (images / "0.nii.gz").read_bytes()
    (images / "cut.nii.gz").write_bytes(cut[:-100])
    write_nifti(images / "nan.nii", nan)
    write_nifti(images / "constant.nii", np.ones(SHAPE))
    write_nifti(images / "frames.nii", np.stack([blob(SHAPE)] * 2, -1))
    np.save(images / "two.npy", np.stack([blob(SHAPE)] * 2))
    for name, matrix in {"zeros": [0] * 12, "flat": [1, 1, 0, 0] * 2 + [0, 0, 1, 0]}.items():
        path = write_nifti(images / f"{name}.nii", blob(SHAPE))
        content = bytearray(path.read_bytes())
        content[280:328] = np.array(matrix, "<f4").tobytes()
        path.write_bytes(content)
    infinite = write_nifti(images / "scaled.nii", np.full(SHAPE, 9, np.int16) + (blob(SHAPE) > 9))
    content = bytearray(infinite.read_bytes())
    content[112:116] = np.array(1e38, "<f4").tobytes()  # scl_slope
    infinite.write_bytes(content)
    for name, shape in {"rank.npy": (12,), "none.npy": (12, 9, 0), "cut.npy": SHAPE}.items():
        np.save(images / name, np.ones(shape, np.float32))
    (images / "cut.npy").write_bytes((images / "cut.npy").read_bytes()[:-50])
    colours = np.zeros(SHAPE, [(name, np.uint8) for name in "RGB"])
    colours["R"][3] = colours["G"][4] = colours["B"][5] = 9
    write_nifti(images / "colours.nii", colours)
    write_nifti(images / "five.nii", np.ones((*SHAPE, 2, 2)))
    voxels = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
    write_dicom(images / "gap", voxels, positions=[0, 2, 4, 8])
    write_dicom(images / "twice", voxels, positions=[0, 2, 2, 4])
    write_frames(images / "frames.dcm", np.concatenate([voxels] * 2, -1), order=[3, 0, 1, 5, 4])
    mixed = write_dicom(images / "mixed", voxels)
    write_dicom(mixed, voxels, description="b", cosines=(0, 1, 0, 1, 0, 0))
    lost = lose_slices(write_dicom(images / "links", voxels), 1)
    said = {
        "links": lost,
        "cut.nii.gz": "truncated",
        "nan.nii": "1 of 504 voxels are NaN or infinite",
        "constant.nii": "constant: every voxel is 1",
        "frames.nii": "4-D, 2 frames",
        "two.npy": "2 channels, most have 1",
        "zeros.nii": "singular",
        "flat.nii": "singular",
        "scaled.nii": "are NaN or infinite",
        "rank.npy": "1-D, 12",
        "none.npy": "no voxels",
        "cut.npy": "truncated",
        "colours.nii": "3 channels, most have 1",
        "five.nii": "5-D, 4 frames",
        "twice": "4 slices at 3 places",
        "frames.dcm": "1 slice missing",
        "gap": "1 slice missing",
        "mixed": "orientations mix",
        "missing.nii": "no such file",
    }
    rows = rows_of(root / "labels.csv")
    rows += [{**rows[0], "path": name} for name in said]
    table(root, rows)
    with pytest.raises(UserError) as caught:
        build(root)
    head, *lines = str(caught.value).splitlines()
    assert head == "19 volumes cannot be used; mend them or set data.strict = false:"
    assert len(lines) == len(said)
    for name, text in said.items():
        (line,) = [line for line in lines if line.startswith(f"  {name}: ")]
        assert text in line, line
    data = build(root, strict=False)
    assert len(data.splits["train"]) == 4
    assert data.report[0].splitlines()[0] == "19 volumes left out:"
    new = VolumeSamples(channels=1, reading=VolumeReading(), preparation=PREPARED)
    with pytest.raises(UserError) as caught:  # the same files in mode infer
        unlabelled_volumes(str(images), new, VolumeData())
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("18 volumes of ")  # all but the one that a table alone can name
    assert {line.strip().partition(": ")[0] for line in lines[1:]} == {*said} - {"missing.nii"}
    foreground = replace(PREPARED, crop="foreground", foreground=1e9)
    with pytest.raises(UserError, match="cannot be used, which leaves none for train and val and"):
        build(root, preparation=foreground, strict=False)


def lose_slices(folder, count):
    """The first slices of a DICOM folder become links to what is not there; what is said of it."""
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{number}.dcm")
    for number in range(count):
        (folder / f"{number}.dcm").unlink()
        (folder / f"{number}.dcm").symlink_to(folder / "nowhere")
    return f"0.dcm is a link to {folder / 'nowhere'}, which is not there"


@pytest.mark.parametrize("count", [1, 3, 4])
def test_lost_slices_of_new_volumes_have_their_line(root, count):
    """A folder of one volume stays one: what is missing is said, not left out."""
    voxels = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
    inputs = VolumeSamples(channels=1, reading=VolumeReading(), preparation=PREPARED)
    folder = write_dicom(root / "new" / "case", voxels)
    lost = lose_slices(folder, count)
    with pytest.raises(UserError) as caught:
        unlabelled_volumes(str(folder), inputs, VolumeData())
    lines = str(caught.value).splitlines()
    if count < 4:
        assert lines[0].startswith("1 volume of 1 cannot be read") and lines[1] == f"  case: {lost}"
    else:  # nothing tells that they were slices
        assert len(lines) == 5 and all("no such file" in line for line in lines[1:])


def test_mistakes_in_labels_are_said_before_anything_is_prepared(root):
    with pytest.raises(UserError, match="label not in class list"):
        build(root, class_names=("dark", "light"))
    assert not list((root / "volume_cache").rglob("*.h5"))


def test_stated_channels_and_an_empty_folder(root):
    with pytest.raises(UserError, match=r"0.nii.gz: 1 channels, data.channels says 2"):
        build(root, channels=2)
    (root / "none").mkdir()
    with pytest.raises(UserError, match="no volume with a suffix of nii, nii.gz"):
        build(root, images_dir="none")


def test_equal_files_and_unlike_spacings_are_reported(root):
    images = root / "images"
    (images / "6.nii.gz").write_bytes((images / "0.nii.gz").read_bytes())
    write_nifti(images / "2.nii.gz", blob(SHAPE, seed=2), affine_of((1, 1, 3)))
    report = build(root).report
    assert any("leakage: 1 volumes are in several splits" in line for line in report)
    assert any("1 x 1 x 1.5 to 1 x 2 x 3 mm, are not resampled" in line for line in report)
    resampled = replace(PREPARED, spacing=(1, 1, 1))
    assert not any("spacings" in line for line in build(root, preparation=resampled).report)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path_column": ()}, "path_column: .* must name different ones"),
        ({"path_suffix": ("a", "a")}, "path_suffix: .* must name different ones"),
        (
            {"path_suffix": ("a", "b"), "reading": VolumeReading(series=("A=b",) * 3)},
            "reading.series: 3 conditions for 2 files",
        ),
        ({"reading": VolumeReading(series=("t1",))}, 'reading.series: "t1" must read "Keyword='),
        (
            {"channels": 3, "preparation": VolumePreparation(normalize=("none", "none"))},
            "preparation.normalize: 2 entries for 3 channels",
        ),
        ({"preparation": VolumePreparation(percentiles=(99, 1))}, "percentiles: .*would be ignor"),
        (
            {"preparation": VolumePreparation(normalize="percentile", percentiles=(99, 1))},
            "percentiles: .* must ascend",
        ),
        ({"preparation": VolumePreparation(antialias=False)}, "antialias: false would be ignored"),
        ({"split_source": "dataset_json"}, '"dataset_json" needs data.label_source = "dataset_j'),
        ({"allowed_exts": ()}, r'name one suffix at least, e.g. \["nii"\]'),
    ],
)
def test_specs_that_contradict_themselves(root, fields, said):
    with pytest.raises(UserError, match=said):
        build(root, **fields)


# ---------------------------------------------------------------------- whole runs


SPEC = """
[data]
dataset = "generic_3d_dataset"
data_root_dir = "{root}"
label_source = "csv"
split_source = "csv"
[data.preparation]
size = [8, 9, 7]
workers = 1
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = [1, 1]
strides = [1, 1]
kernel_sizes = [3, 3]
[training]
epochs = 2
[dataloading]
batch_size = 2
num_workers = 0
[logger]
backend = "none"
"""


def test_a_run_is_trained_asked_and_read_out(root, command):
    spec = SPEC.format(root=root)
    run = command(spec=spec).path
    resolved = json.loads((run / "resolved_config.json").read_text())
    inputs = resolved["inputs"]
    assert inputs["kind"] == "volumes" and inputs["augmentation"]["patch_size"] == [8, 9, 7]
    np.testing.assert_allclose(inputs["augmentation"]["spacing"], (1, 2, 1.5), rtol=1e-5)
    predictions = rows_of(run / "predictions_test.csv")
    assert [row["id"] for row in predictions] == ["6.nii.gz", "7.nii.gz"]
    again = command("mode=infer", spec=spec)
    assert "predictions" in again.out
    folder = root / "new"
    for number in range(2):
        write_nifti(folder / f"{number}.nii", blob((10, 9, 8), seed=number), affine_of((1, 2, 1.5)))
    asked = command("mode=infer", f"infer.input={folder}", spec=spec)
    assert "have a spacing of" not in asked.out + asked.err
    (file,) = run.rglob("predictions_new.csv")
    assert [row["id"] for row in rows_of(file)] == ["0.nii", "1.nii"]
    command("mode=extract", f"extract.output_dir={root / 'features'}", spec=spec)
    assert len(list((root / "features").glob("*.h5"))) == 3
    trained = f"infer.checkpoint={run / 'checkpoints' / 'best.pt'}"
    changed = "data.preparation.size=[9, 9, 7]"
    bad = command("mode=infer", changed, trained, spec=spec, code=2)
    assert "trained on volumes of preparation.size (8, 9, 7)" in bad.err
    write_nifti(folder / "2.nii", np.stack([blob(SHAPE)] * 2, -1))
    bad = command("mode=infer", f"infer.input={folder}", spec=spec, code=2)
    assert "2.nii: 4-D, 2 frames" in bad.err
    (folder / "far").symlink_to(folder / "not-mounted")
    lenient = "data.strict=false"  # of the files asked about, with which nothing was trained
    assert lenient.replace("=", " = ") in bad.err and "infer.checkpoint" not in bad.err
    for named in ((), ("dataloading.eval_batch_size=1", "data.preparation.workers=1"), (trained,)):
        run = command("mode=infer", f"infer.input={folder}", *named, lenient, spec=spec)
        assert "1 volume left out:" in run.out and "cannot be listed" in run.out
    bad = command("mode=infer", lenient, "name=run", spec=spec, code=2)  # its own samples
    assert "train the spec first" in bad.err or "another spec" in bad.err
    coarse = write_nifti(root / "other" / "a.nii", blob((10, 9, 8)), affine_of((6, 2, 1.5)))
    run = command("mode=infer", f"infer.input={coarse}", trained, spec=spec)
    assert "1 of 1 volumes asked about have a spacing of 6 x 2 x 1.5 to 6 x 2 x 1.5 mm" in run.out


def test_the_same_volume_in_any_orientation_has_the_same_prediction(root, command):
    spec = SPEC.format(root=root)
    command(spec=spec)
    for codes in ORIENTATIONS:
        write_nifti(root / "turned" / f"{codes}.nii", blob(SHAPE), affine_of((1, 2, 1.5)), codes)
    run = command("mode=infer", f"infer.input={root / 'turned'}", spec=spec).path
    (file,) = run.rglob("predictions_turned.csv")
    rows = [{k: v for k, v in row.items() if k != "id"} for row in rows_of(file)]
    assert len(rows) == 8 and all(row == rows[0] for row in rows)


def test_volumes_of_unlike_sizes_need_one(root, command):
    write_nifti(root / "images" / "0.nii.gz", blob((12, 9, 7)))
    spec = SPEC.format(root=root).replace("size = [8, 9, 7]\n", "")
    assert "differ in size: set it" in command(spec=spec, code=2).err


def test_patches_of_volumes_of_unlike_sizes(root, command):
    """Cut where they are read, in memory and not the same, and around the foreground."""
    write_nifti(root / "images" / "0.nii.gz", blob((12, 5, 7)))
    spec = SPEC.format(root=root).replace("size = [8, 9, 7]\n", "")
    augmentation = (
        "data.augmentation.patch_size=[6, 6, 6]", 'data.augmentation.mirror_axes=["y"]',
        "data.augmentation.train_kwargs.crop=foreground",
    )  # fmt: skip
    losses = []
    for memory in (0, 100):
        run = command(*augmentation, f"dataloading.in_memory_mb={memory}", spec=spec)
        inputs = json.loads((run.path / "resolved_config.json").read_text())["inputs"]
        assert inputs["augmentation"]["mirror_axes"] == ["y"]
        assert inputs["augmentation"]["train"]["crop"] == "foreground"
        losses.append([row["train_loss"] for row in run.records() if "train_loss" in row])
    assert losses[0]
    assert losses[0] == losses[1]


def test_an_encoder_of_images_is_refused(root, command):
    of_images = 'encoder_type = "timm"\ntype = "resnet18"\npretrained = false\n[training]'
    own = SPEC[SPEC.index("encoder_type") : SPEC.index("[training]") + len("[training]")]
    spec = SPEC.format(root=root).replace(own, of_images)
    assert "takes images, and the samples" in command(spec=spec, code=2).err


def test_a_part_of_a_split_reads_the_same_volumes(root):
    split = build(root).splits["train"]
    rows = np.array([2, 0])
    whole = split.source.fetch(np.arange(4))
    assert (subset(split, rows).source.fetch(np.arange(2)) == whole[rows]).all()
    assert torch.from_numpy(whole).dtype == torch.float16
