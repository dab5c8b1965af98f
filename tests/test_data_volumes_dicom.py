"""DICOM in folders of samples: a folder of slices is one volume, a file with frames is one, and
what lies beside them counts."""

import csv
import json
import shutil
from zlib import crc32

import numpy as np
import pytest
from volume_files import blob, write_dicom, write_frames, write_nifti

from glovita_lib.data import VolumeSamples
from glovita_lib.data_volumes import open_folder, unlabelled_volumes
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.spec_data import VolumeData
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading

pydicom = pytest.importorskip("pydicom")

PREPARED = VolumePreparation(size=(6, 5, 4), workers=1, crop="none")
VOXELS = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
FRAMED = ["a.dcm", "b.DCM", "c", "d.IMA", "e.dicom", "1.2.840.7"]


def build(root, **fields):
    fields = {"preparation": PREPARED, "label_source": "folder", "split_source": "subdirs"} | fields
    return build_data(VolumeData(data_root_dir=str(root), **fields), seed=0)


def ids_of(data):
    return sorted(name for split in data.splits.values() for name in split.ids)


def new_volumes(folder, data=None, **reading):
    samples = VolumeSamples(channels=1, reading=VolumeReading(**reading), preparation=PREPARED)
    return unlabelled_volumes(str(folder), samples, data or VolumeData())


def framed(folder, names=FRAMED):
    """Files with frames, all of other voxels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        seed = crc32(str(folder / name).encode())
        voxels = np.random.default_rng(seed).integers(0, 900, VOXELS.shape, np.int16)
        write_frames(folder / name, voxels, uid=f"1.{number}")
    return folder


@pytest.fixture
def root(tmp_path):
    """Class folders of two splits with files with frames of all names, one a volume."""
    for split in ("train", "val"):
        for kind in ("dark", "bright"):
            framed(tmp_path / "images" / split / kind)
    return tmp_path


# ---------------------------------------------------------------------- files with frames


def test_files_with_frames_are_volumes_in_class_folders(root):
    data = build(root)
    wanted = [f"{s}/{k}/{n}" for s in ("train", "val") for k in ("bright", "dark") for n in FRAMED]
    assert ids_of(data) == sorted(wanted) and data.class_names == ("bright", "dark")
    volumes = data.splits["train"].source.fetch(np.arange(12))
    assert volumes.shape == (12, 1, 6, 5, 4) and not data.report
    shutil.move(root / "images" / "train" / "dark" / "a.dcm", root / "images" / "at the top.dcm")
    with pytest.raises(UserError, match="no split"):  # the others are found, this one is counted
        build(root, train_split_name="learn")
    assert len(ids_of(build(root))) == 23


def test_tables_name_files_with_frames_and_folders_of_them(root):
    folder = root / "images" / "alone"
    framed(folder, ["scan"])
    names = ["train/dark/a.dcm", "train/bright/c", "val/dark/1.2.840.7", "alone"]
    splits = ["train", "train", "val", "val"]
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label", "split"), *zip(names, "abab", splits, strict=True)]
        )
    assert ids_of(build(root, label_source="csv", split_source="csv")) == sorted(names)
    (root / "labels.json").write_text(json.dumps(dict(zip(names, "abab", strict=True))))
    (root / "splits.json").write_text(json.dumps([{"train": names[:2], "val": names[2:]}]))
    assert ids_of(build(root, label_source="json", split_source="splits_json")) == sorted(names)
    entries = [{"image": n, "label": k} for n, k in zip(names, "abab", strict=True)]
    (root / "dataset.json").write_text(json.dumps({"train": entries[:2], "val": entries[2:]}))
    found = build(root, label_source="dataset_json", split_source="dataset_json")
    assert ids_of(found) == sorted(names)


@pytest.mark.parametrize("suffix", ["MR", "ct", "img", "dcm.txt.bak"])
def test_slices_and_files_with_frames_of_any_suffix_are_found(root, suffix):
    """By their first bytes, where the names do not tell."""
    folder = root / "images" / "train" / "dark" / "patient"
    for number, file in enumerate(sorted(write_dicom(folder, VOXELS).iterdir())):
        file.rename(folder / f"E1S1I{number}.{suffix}")
    framed(root / "images" / "val" / "dark", [f"scan.{suffix}"])
    (root / "images" / f"notes.{suffix}").write_text("no image")
    assert {"train/dark/patient", f"val/dark/scan.{suffix}"} < set(ids_of(build(root)))
    assert len(ids_of(build(root))) == 26
    names = ["train/dark/patient", "train/bright/c", f"val/dark/scan.{suffix}", "val/bright/c"]
    rows = zip(names, "abab", ["train", "train", "val", "val"], strict=True)
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    assert ids_of(build(root, label_source="csv", split_source="csv")) == sorted(names)
    new = new_volumes(folder.parent)[0]
    assert len(new.ids) == 7
    first = folder / f"E1S1I0.{suffix}"
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UserError, match=f"patient: E1S1I0.{suffix} is no DICOM file but is named"):
        build(root)


def test_the_same_file_beside_all_slices_is_no_leak(tmp_path):
    for number in range(8):
        split, kind = ("train", "val")[number > 3], "ab"[number % 2]
        folder = tmp_path / "images" / split / kind / f"p{number}"
        write_dicom(folder / "series" if number % 3 else folder, VOXELS + number, uid=f"1.{number}")
        for name in ("DICOMDIR.txt", ".DS_Store", "AAA"):
            (folder / name).write_text("the same for all")
    assert len(ids_of(data := build(tmp_path))) == 8
    assert not any("leak" in line or "different" in line for line in data.report)
    shutil.copytree(folder, tmp_path / "images" / "train" / kind / "again")
    assert any("leak" in line for line in build(tmp_path).report)


@pytest.mark.parametrize("name", ["t1_{}", "IM.{}", "I{}.MR"])
def test_a_patient_whose_slices_are_all_lost_is_told(root, name):
    for split, kind in (("train", "dark"), ("val", "dark"), ("train", "bright")):
        folder = root / "images" / split / kind / "patient"
        for number, file in enumerate(sorted(write_dicom(folder, VOXELS).iterdir())):
            target = file.rename(folder / name.format(number))
            if (split, kind) == ("train", "dark"):
                target.write_bytes(bytes(200 * number))
    (root / "images" / "notes").write_text("no image")
    with pytest.raises(UserError) as caught:
        build(root)
    head, line = str(caught.value).splitlines()
    assert head.startswith("1 volume cannot be used") and "train/dark/patient/" in line


@pytest.mark.parametrize("name", ["p{}", "p{}.7", "p{}.enh", "p{}.dcm"])
def test_files_with_frames_that_are_cut_are_told(tmp_path, name):
    """Whatever is left of them, an empty one too."""
    for number in range(12):
        folder = tmp_path / "images" / ("train", "val")[number > 5] / "ab"[number % 2]
        framed(folder, [name.format(number)])
        path = folder / name.format(number)
        if number in (0, 3, 4, 5):  # the first of a folder too
            path.write_bytes(path.read_bytes()[: {0: 0, 3: 100, 4: 140, 5: 400}[number]])
    (folder / "notes").write_text("no image")
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("4 volumes cannot be used")
    assert [line.split()[0].rpartition("/")[2] for line in lines] == [
        f"{name.format(number)}:" for number in (0, 4, 3, 5)
    ]


def test_two_columns_and_suffixes_of_files_with_frames(tmp_path):
    for case in range(4):
        framed(tmp_path / "images" / f"p{case}", ["t1.dcm", "t2"])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = [(f"p{n}/t1.dcm", f"p{n}/t2", f"p{n}", n % 2, "tv"[n > 1]) for n in range(4)]
        csv.writer(file).writerows([("a", "b", "path", "label", "split"), *rows])
    of_table = {"label_source": "csv", "split_source": "csv"}
    of_table |= {"train_split_name": "t", "val_split_name": "v"}
    pairs = build(tmp_path, path_column=("a", "b"), **of_table)
    assert pairs.samples.channels == 2 and ids_of(pairs) == [f"p{n}/t1.dcm" for n in range(4)]
    names = build(tmp_path, path_suffix=("/t1.dcm", "/t2"), **of_table)
    assert names.samples.channels == 2 and ids_of(names) == [f"p{n}" for n in range(4)]


def test_a_damaged_file_with_frames_has_its_own_line(root):
    whole = (root / "images" / "train" / "dark" / "a.dcm").read_bytes()
    for name, size in (("a.dcm", len(whole) - 20), ("b.DCM", 200), ("e.dicom", 0)):
        (root / "images" / "train" / "dark" / name).write_bytes(whole[:size])
    with pytest.raises(UserError) as caught:
        build(root)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 volumes cannot be used") and len(lines) == 4
    for name in ("a.dcm: a.dcm is trunc", "b.DCM: b.DCM is trunc", "e.dicom: an empty file"):
        assert any(line.startswith(f"  train/dark/{name}") for line in lines), lines
    assert len(ids_of(build(root, strict=False))) == 21


def test_new_files_with_frames(root):
    split, notes = new_volumes(root / "images")
    assert len(split.ids) == 24 and not notes
    split, _ = new_volumes(root / "images" / "train" / "dark")
    assert split.ids == sorted(FRAMED)
    for name in FRAMED:
        assert new_volumes(root / "images" / "train" / "dark" / name)[0].ids == [name]


# ---------------------------------------------------------------------- what lies beside slices


@pytest.fixture
def cases(tmp_path):
    """Four series of slices, of each class and split one."""
    for number, case in enumerate(["train/dark/p", "train/bright/p", "val/dark/p", "val/bright/p"]):
        write_dicom(tmp_path / "images" / case, VOXELS + number, uid=f"1.{number}")
    return tmp_path


def test_other_volume_files_beside_slices_are_kept(cases):
    write_nifti(cases / "images" / "train" / "dark" / "p" / "t1.nii.gz", blob((9, 9, 9)))
    data = build(cases)
    assert "train/dark/p" in ids_of(data) and "train/dark/p/t1.nii.gz" in ids_of(data)
    assert any("1 volume files lie beside the slices" in line for line in data.report)
    split, notes = new_volumes(cases / "images" / "train" / "dark" / "p")
    assert split.ids == ["p", "t1.nii.gz"] and "beside the slices" in notes[0]
    scout = cases / "images" / "val" / "dark" / "q"
    write_dicom(scout, VOXELS[..., :1])
    write_nifti(scout / "t1.nii.gz", blob((9, 9, 9)))
    with pytest.raises(UserError, match="val/dark/q: a single slice"):
        build(cases)
    assert "val/dark/q/t1.nii.gz" in ids_of(build(cases, strict=False))


def test_a_scout_beside_a_file_with_frames(cases):
    folder = cases / "images" / "train" / "dark" / "q"
    write_dicom(folder, VOXELS[..., :1], uid="2.1", description="scout")
    write_frames(folder / "scan", VOXELS, uid="2.2", description="scan")
    with pytest.raises(UserError, match=r"train/dark/q: 2 series, choose one with .*; there are"):
        build(cases)
    assert "train/dark/q/scan" in ids_of(build(cases, strict=False))
    chosen = {"reading": VolumeReading(series=("SeriesDescription=scan",))}
    with pytest.raises(UserError) as caught:
        build(cases, **chosen)
    told = [line.partition(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert told == [
        "train/bright/p",
        "val/bright/p",
        "val/dark/p",
    ]  # p beside q may be of its study
    kept = {"reading": VolumeReading(series=("SeriesDescription=t1",))}
    shutil.rmtree(folder)
    framed(cases / "images" / "train" / "dark" / "p", ["dose"])
    for file in (cases / "images" / "train" / "dark" / "p").glob("dose"):
        write_frames(file, VOXELS, description="dose")
    data = build(cases, **kept)
    assert len(ids_of(data)) == 4
    assert any("1 other DICOM series do not meet" in line for line in data.report)


UIDS = {
    "none": lambda case, kind: "",
    "of the study": lambda case, kind: f"5.{case}",
    "of the series": lambda case, kind: f"5.{case}.{kind}",
    "the same in all": lambda case, kind: "5",
    "of some": lambda case, kind: f"5.{case}" if kind == 2 else "",
}  # StudyInstanceUID as anonymisation leaves it
LAYOUTS = ["study/{}", "study/{}/dicom", "{}/a", "study/{}.dcm", "study/{}/x"]  # two have frames
SERIES = ("SeriesDescription=t2", "SeriesDescription=t1")


def write_study(case, inside, uid, number, kinds=("scout", "t1", "t2")):
    """Series of one patient, without PatientID."""
    for order, kind in enumerate(kinds):
        path = case / inside.format(kind)
        study = uid(number, order)
        tags = {"StudyInstanceUID": study} if study else {}
        if path.suffix or path.name == "x":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_frames(path, VOXELS + number, uid=f"1.{number}.{order}", description=kind)
            image = pydicom.dcmread(path)
            if study:
                image.StudyInstanceUID = study
            image.save_as(path)
        else:
            uids = {"uid": f"1.{number}.{order}", "description": kind}
            write_dicom(path, VOXELS + number, **uids, **tags)


@pytest.mark.parametrize("uid", list(UIDS))
@pytest.mark.parametrize("inside", LAYOUTS)
def test_series_of_studies_whatever_their_uids(tmp_path, inside, uid):
    cases = ["dark/p", "dark/q", "bright/r", "bright/s"]
    for number, case in enumerate(cases):
        write_study(tmp_path / case, inside, UIDS[uid], number)

    def ids(folder, series, itself):
        found, _ = open_folder(folder, VolumeData(), series, None, itself=itself)
        return found.ids, found.notes

    one = inside.format("t1")
    found, notes = ids(tmp_path, SERIES[1:], False)
    assert found == sorted(f"{case}/{one}" for case in cases)
    assert "8 other DICOM series do not meet" in notes[0]
    assert ids(tmp_path, SERIES[1:], True)[0] == found
    assert ids(tmp_path / "dark/p", SERIES[1:], True)[0] == [one]
    if uid == "of the series":  # of studies of their own, as far as anybody can see
        return
    within = "/study" if "study" in inside else ""
    found, _ = ids(tmp_path, SERIES, False)
    assert found == sorted(f"{case}{within}" for case in cases)
    assert ids(tmp_path, SERIES, True)[0] == found
    assert ids(tmp_path / "dark/p", SERIES, True)[0] == [within[1:] or "."]


@pytest.mark.parametrize("uid", ["none", "of the study", "the same in all"])
def test_a_study_that_lacks_a_series_is_told(tmp_path, uid):
    """Whatever else there is: it is never left out with a note alone, nor joined to another."""
    for number, case in enumerate(["dark/p", "dark/q", "bright/r", "bright/s"]):
        kinds = {"dark/q": ("scout", "t1"), "bright/s": ("scout", "t2")}.get(case, ("t1", "t2"))
        write_study(tmp_path / case, "study/{}", UIDS[uid], number, kinds)
    found, _ = open_folder(tmp_path, VolumeData(), SERIES, None)
    assert {"dark/p/study", "dark/q/study/t1", "bright/r/study", "bright/s/study/t2"} <= {
        *found.ids
    }
    found, _ = open_folder(tmp_path, VolumeData(), SERIES[1:], None)
    missing = {"bright/s/study/scout", "bright/s/study/t2"}
    assert {each for each in found.ids if not each.endswith("t1")} == missing
    shutil.rmtree(tmp_path / "bright" / "r")
    (tmp_path / "bright" / "q").mkdir()
    write_study(tmp_path / "bright" / "q", "study/{}", UIDS[uid], 7, ("t1",))
    found, _ = open_folder(tmp_path, VolumeData(), SERIES, None)
    assert {"dark/p/study", "bright/q/study/t1", "bright/s/study/t2"} <= {*found.ids}


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("tags", [*UIDS, "patients"])
@pytest.mark.parametrize("inside", ["", "{}"])
def test_a_patient_who_lacks_a_series_is_told(tmp_path, inside, tags, lost):
    """Series of a patient in one folder, the layout of most archives, or each in its own."""
    patients = ["dark/p", "dark/q", "dark/r", "bright/s", "bright/t", "bright/u"]
    lacking = ["dark/q", "bright/s"][:lost]
    for number, patient in enumerate(patients):
        for order, kind in enumerate(("t1", "t2")):
            if kind == "t1" and patient in lacking:
                continue
            uid = "" if tags == "patients" else UIDS[tags](number, order)
            more = {"StudyInstanceUID": uid} if uid else {}
            more |= {"PatientID": f"case {number}"} if tags == "patients" else {}
            write_dicom(
                tmp_path / patient / inside.format(kind), VOXELS + number,
                uid=f"1.{number}.{order}", description=kind, **more,
            )  # fmt: skip
    told = {f"{patient}/t2" if inside else patient for patient in lacking}
    whole = {f"{patient}/t1" if inside else patient for patient in patients} - told
    whole -= {f"{patient}/t1" for patient in lacking}
    for itself in (False,) if tags == "the same in all" else (False, True):
        found, _ = open_folder(tmp_path, VolumeData(), SERIES[1:], None, itself=itself)
        assert {*found.ids} == whole | told
    if tags == "patients":  # also where one of a folder's patients alone has it
        found, _ = open_folder(tmp_path / "dark", VolumeData(), SERIES[1:], None, itself=True)
        assert len(found.ids) == 3
        (tmp_path / "dark" / "r").rename(tmp_path / "r")
        found, _ = open_folder(tmp_path / "dark", VolumeData(), SERIES[1:], None, itself=True)
        assert len(found.ids) == 2


def test_what_lies_beside_folders_of_several_series_is_of_a_study_that_has_its_uid(tmp_path):
    """Planes of a patient in folders of their own, and the scout beside them."""
    for number in range(3):
        tags = {"StudyInstanceUID": f"5.{number}", "PatientID": str(number)}
        for kind in ("t1", "t2"):
            for order, plane in enumerate(("axial", "sagittal")):
                uids = {"uid": f"1.{number}.{kind[1]}.{order}", "description": kind}
                write_dicom(tmp_path / f"p{number}" / plane, VOXELS, **uids, **tags)
        uids = {"uid": f"2.{number}", "description": "scout"}
        write_dicom(tmp_path / f"p{number}" / "scout", VOXELS, **uids, **tags)
    found, _ = open_folder(tmp_path, VolumeData(), SERIES[1:], None)
    assert len(found.ids) == 6 and not any("scout" in each for each in found.ids)


@pytest.fixture
def nested(tmp_path):
    """Studies of two series in folders of their own, four patients of two classes and splits."""
    for number, case in enumerate(["train/dark/p", "train/bright/q", "val/dark/r", "val/bright/s"]):
        for kind in ("t1", "t2"):
            write_dicom(
                tmp_path / "images" / case / "study" / kind, VOXELS + number,
                uid=f"1.{number}.{kind[1]}", description=kind, StudyInstanceUID=f"5.{number}",
            )  # fmt: skip
    return tmp_path


def test_a_series_of_nested_studies_is_chosen(nested):
    one = {"series": ("SeriesDescription=t1",)}
    data = build(nested, reading=VolumeReading(**one))
    assert len(ids_of(data)) == 4 and all(name.endswith("study/t1") for name in ids_of(data))
    assert any("4 other DICOM series do not meet" in line for line in data.report)
    assert len(new_volumes(nested / "images", **one)[0].ids) == 4
    patient = nested / "images" / "train" / "dark" / "p"
    assert new_volumes(patient, **one)[0].ids == ["study/t1"]
    shutil.rmtree(patient / "study" / "t1")  # a study that lacks the series is told
    with pytest.raises(UserError, match="1 volume cannot.*\n.*p/study/t2: no series with Series"):
        build(nested, reading=VolumeReading(**one))


def test_series_of_nested_studies_are_channels(nested):
    both = {"series": ("SeriesDescription=t2", "SeriesDescription=t1")}
    data = build(nested, reading=VolumeReading(**both))
    assert data.samples.channels == 2
    assert len(ids_of(data)) == 4 and all(name.endswith("/study") for name in ids_of(data))
    names = ["train/dark/p", "train/bright/q", "val/dark/r", "val/bright/s"]  # patients
    (nested / "labels.json").write_text(json.dumps({n: n.split("/")[1] for n in names}))
    (nested / "splits.json").write_text(json.dumps([{"train": names[:2], "val": names[2:]}]))
    tables = {"label_source": "json", "split_source": "splits_json"}
    data = build(nested, reading=VolumeReading(**both), **tables)
    assert ids_of(data) == sorted(names) and not data.report
    patient = nested / "images" / "train" / "dark" / "p"
    samples = VolumeSamples(channels=2, reading=VolumeReading(**both), preparation=PREPARED)

    def asked(folder):
        return unlabelled_volumes(str(folder), samples, VolumeData())[0].ids

    assert len(asked(nested / "images")) == 4
    assert asked(patient) == ["study"] and asked(patient / "study") == ["study"]
    shutil.rmtree(patient / "study" / "t1")
    with pytest.raises(UserError, match="p/study/t2: no series with SeriesDescription=t1"):
        build(nested, reading=VolumeReading(**both))


def test_frames_among_many_slices_are_never_lost(tmp_path):
    """Of a folder of slices few are looked at; what they do not show is met when it is read."""
    for split in ("train", "val"):
        for kind in ("dark", "bright"):
            write_dicom(tmp_path / "images" / split / kind / "p", np.tile(VOXELS, (1, 1, 5)))
    folder = tmp_path / "images" / "train" / "dark" / "p"
    for number, file in enumerate(sorted(folder.iterdir())):  # of any size
        with open(file, "ab") as opened:
            opened.write(b"\xfc\xff\xfc\xffOB\0\0" + (90 * number).to_bytes(4, "little"))
            opened.write(bytes(90 * number))
    file = write_frames(folder / "x.dcm", VOXELS, uid="9")
    sizes = sorted(path.stat().st_size for path in folder.iterdir())
    assert 3 < sizes.index(file.stat().st_size) < len(sizes) - 4
    with pytest.raises(UserError, match="train/dark/p: 2 series, choose one"):
        build(tmp_path)
    names = [f"{s}/{k}/p" for s in ("train", "val") for k in ("dark", "bright")]
    names[0] += "/x.dcm"
    of_table = {"label_source": "json", "split_source": "splits_json"}

    def write_tables():
        (tmp_path / "labels.json").write_text(json.dumps(dict(zip(names, "abab", strict=True))))
        splits = {"train": names[:2], "val": names[2:]}
        (tmp_path / "splits.json").write_text(json.dumps([splits]))

    write_tables()
    assert ids_of(build(tmp_path, **of_table)) == sorted(names)
    names[0] = sorted(folder.iterdir())[2].relative_to(tmp_path / "images").as_posix()
    write_tables()
    with pytest.raises(UserError, match='a slice is no volume: name the folder of its series, "tr'):
        build(tmp_path, **of_table)


def test_directories_and_reports_are_no_volumes(cases):
    """DICOMDIR above the folders of series, reports beside slices and alone."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    def other(path, uid):
        path.parent.mkdir(exist_ok=True, parents=True)
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, uid
        meta.MediaStorageSOPInstanceUID = "1.2"
        found = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
        found.SOPClassUID, found.SOPInstanceUID = uid, "1.2"
        found.save_as(path, enforce_file_format=True)

    disk, report = "1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.88.11"
    images = cases / "images" / "train" / "dark"
    other(images / "DICOMDIR", disk)
    other(images / "p" / "report.dcm", report)
    assert len(ids_of(build(cases))) == 4
    for number, file in enumerate(sorted((images / "p").glob("*[0-9]*"))):
        file.rename(images / "p" / f"IM{number:04}")
    framed(images.parent / "bright", ["VOL1"])
    for name in ("p/SE2/IM0001", "q/IM0001", "r/VOL2"):  # as images are
        other(images / name, report)
    other(images.parent / "bright" / "VOL3", report)
    assert len(ids_of(build(cases))) == 5
    other(images / "alone" / "report.dcm", report)
    data = build(cases)
    assert len(ids_of(data)) == 5
    assert any(
        "1 DICOM files are no images (train/dark/alone/report.dcm)" in n for n in data.report
    )
    new = new_volumes(cases / "images" / "train")
    assert len(new[0].ids) == 3 and any("are no images" in note for note in new[1])
    (cases / "labels.json").write_text(json.dumps({"train/dark/alone/report.dcm": "a"}))
    with pytest.raises(UserError, match="no such file; the file is there, and is DICOM of a class"):
        build(cases, label_source="json", split_source="kfold", n_folds=2)


def test_slices_at_the_top_are_named(cases):
    for number, file in enumerate(sorted((cases / "images" / "val" / "dark" / "p").iterdir())):
        shutil.copy(file, cases / "images" / f"{number}.dcm")
    data = build(cases)
    assert len(ids_of(data)) == 4
    split, notes = new_volumes(cases / "images", VolumeData(strict=False))
    assert len(split.ids) == 4 and "images: 4 series, choose one" in notes[0]
    for file in (cases / "images").glob("*.dcm"):
        (cases / "flat").mkdir(exist_ok=True)
        shutil.move(file, cases / "flat" / file.name)
    with pytest.raises(UserError, match="4 volumes cannot be used.*\n.*0.dcm: a single slice"):
        rows = {f"{number}.dcm": number % 2 for number in range(4)}
        (cases / "labels.json").write_text(json.dumps(rows))
        fields = {"label_source": "json", "split_source": "kfold", "n_folds": 2}
        build(cases, images_dir="flat", **fields)


def cached(folder):
    """Cache files below a folder."""
    return sorted(folder.rglob("volume_cache/*/*.h5"))


@pytest.mark.parametrize("kind", ["series", "study", "here"])
def test_nothing_is_written_into_a_folder_that_is_a_new_sample(nested, monkeypatch, kind):
    """Its cache lies beside it, and is found again."""
    patient = nested / "images" / "train" / "dark" / "p"
    where = patient / "study" if kind == "study" else patient / "study" / "t1"
    kinds = ("SeriesDescription=t2", "SeriesDescription=t1") if kind == "study" else ()
    samples = VolumeSamples(
        channels=len(kinds) or 1, reading=VolumeReading(series=kinds), preparation=PREPARED
    )
    before = sorted(where.rglob("*"))
    monkeypatch.chdir(where)
    for _ in range(2):
        split, _ = unlabelled_volumes("." if kind == "here" else str(where), samples, VolumeData())
        assert len(split.ids) == 1
        assert len(cached(where.parent)) == 1
    assert sorted(where.rglob("*")) == before


@pytest.mark.parametrize(("at", "path"), [(".", "."), ("t1", ".."), ("t1", "../")])
def test_a_new_sample_that_the_shell_stands_in_has_its_name(nested, monkeypatch, at, path):
    """And its cache beside it, not within."""
    sample = nested / "images" / "train" / "dark" / "p" / "study"
    monkeypatch.chdir(sample / at)
    both = {"series": ("SeriesDescription=t1", "SeriesDescription=t2")}
    samples = VolumeSamples(channels=2, reading=VolumeReading(**both), preparation=PREPARED)
    split, _ = unlabelled_volumes(path, samples, VolumeData())
    assert split.ids == ["study"]
    assert not cached(sample) and len(cached(sample.parent)) == 1


def test_a_cache_in_a_dicom_folder_is_no_part_of_it(nested):
    """Of an inference on the folder of a patient, which is a sample of a data set."""
    patient = nested / "images" / "train" / "dark" / "p"
    both = VolumeReading(series=("SeriesDescription=t2", "SeriesDescription=t1"))
    fields = {"reading": both, "label_source": "json", "split_source": "splits_json"}
    names = ["train/dark/p", "train/bright/q", "val/dark/r", "val/bright/s"]  # patients
    (nested / "labels.json").write_text(json.dumps({n: n.split("/")[1] for n in names}))
    (nested / "splits.json").write_text(json.dumps([{"train": names[:2], "val": names[2:]}]))
    assert ids_of(build(nested, **fields)) == sorted(names)
    before = cached(nested)
    assert len(before) == 4
    assert new_volumes(patient, series=("SeriesDescription=t1",))[0].ids == ["study/t1"]
    assert len(cached(patient)) == 1
    assert ids_of(build(nested, **fields)) == sorted(names)
    assert len(cached(nested)) == 5


CASES = ["train/dark/p", "train/bright/q", "val/dark/r", "val/bright/s"]


def write_parts(images, *, uid="1.{}", lost=(), scout=False):
    """Series of four patients of eight slices, each in two folders of four."""
    voxels = np.concatenate([VOXELS, VOXELS[::-1]], 2)  # (6, 5, 8)
    for number, case in enumerate(CASES):
        whole = write_dicom(images / case / "d1", voxels + number, uid=uid.format(number))
        for place, file in enumerate(sorted(whole.iterdir())):
            if place in lost:
                file.unlink()
            elif place >= 4:
                (images / case / "d2").mkdir(exist_ok=True)
                file.rename(images / case / "d2" / file.name)
        if scout:
            tags = {"uid": f"2.{number}", "description": "scout"}
            write_dicom(images / case / "scout", VOXELS, **tags)


def test_parts_of_a_series_in_folders_of_their_own_are_one_sample(tmp_path):
    """As exports write them that begin a new folder after so many files."""
    images = tmp_path / "images"
    write_parts(images)
    prepared = VolumePreparation(size=(6, 5, 8), workers=1, crop="none", normalize="none")
    data = build(tmp_path, preparation=prepared)
    assert ids_of(data) == sorted(CASES) and not data.report
    (dark,) = data.splits["val"].source.fetch(np.array([data.splits["val"].ids.index(CASES[2])]))
    stored = np.concatenate([VOXELS, VOXELS[::-1]], 2) + 2
    np.testing.assert_allclose(dark[0], stored[::-1, ::-1])  # turned to RAS
    assert new_volumes(images)[0].ids == sorted(CASES)
    assert new_volumes(images / CASES[0])[0].ids == ["p"]
    write_parts(images, scout=True)  # of another series beside them
    chosen = {"reading": VolumeReading(series=("SeriesDescription=t1",))}
    assert ids_of(build(tmp_path, **chosen)) == sorted(CASES)
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("8 volumes cannot be used")
    assert all("parts of one series (SeriesInstanceUID) lie in" in line for line in lines[1:])
    kept = build(tmp_path, strict=False)
    assert ids_of(kept) == sorted(f"{case}/scout" for case in CASES)


def write_halves_of_both(root):
    """Studies of two series, in two folders with half of the slices of each."""
    voxels = np.concatenate([VOXELS, VOXELS[::-1]], 2)  # (6, 5, 8)
    for number, case in enumerate(CASES):
        for order, kind in enumerate(("t1", "t2")):
            uids = {"uid": f"1.{number}.{order}", "description": kind}
            whole = write_dicom(root / "images" / case / kind, voxels + number, **uids)
            for place, file in enumerate(sorted(whole.iterdir())):
                half = whole.with_name(f"d{1 + place // 4}")
                half.mkdir(exist_ok=True)
                file.rename(half / f"{kind}_{file.name}")
            whole.rmdir()


def test_parts_of_both_series_of_a_study_are_one_sample(tmp_path):
    """Each folder holds half of the slices of both."""
    write_halves_of_both(tmp_path)
    both = {"reading": VolumeReading(series=("SeriesDescription=t2", "SeriesDescription=t1"))}
    data = build(tmp_path, **both)
    assert ids_of(data) == sorted(CASES) and data.samples.channels == 2
    one = build(tmp_path, reading=VolumeReading(series=("SeriesDescription=t2",)))
    assert ids_of(one) == sorted(CASES) and one.samples.channels == 1


@pytest.mark.parametrize("two", [False, True], ids=["a condition", "two conditions"])
def test_a_part_of_a_series_in_the_folder_itself_is_of_its_sample(tmp_path, two):
    images, both = tmp_path / "images", ("SeriesDescription=t1", "SeriesDescription=t2")
    write_parts(images)
    for number, case in enumerate(CASES):
        if two:  # one part beside all slices of another series
            whole = np.concatenate([VOXELS] * 2, 2)
            write_dicom(images / case / "d2" / "t2", whole, uid=f"2.{number}", description="t2")
        for file in sorted((images / case / "d1").iterdir()):
            file.rename(images / case / file.name)
        (images / case / "d1").rmdir()
    stored = VolumePreparation(workers=1, crop="none", normalize="none")
    data = build(tmp_path, reading=VolumeReading(series=both[: 1 + two]), preparation=stored)
    assert ids_of(data) == sorted(CASES)
    for each in data.splits.values():
        assert each.source.uniform == (1 + two, 6, 5, 8)
    if not two:
        assert new_volumes(images / CASES[0], series=both[:1])[0].ids == ["p"]


def test_parts_of_a_series_that_have_a_slice_in_common_are_told(tmp_path):
    """Where the UID tells series apart; time points, which have all places in common, stay."""
    images = tmp_path / "images"
    write_parts(images)
    for case in CASES[::2]:
        shutil.copy(sorted((images / case / "d1").iterdir())[-1], images / case / "d2" / "twice")
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("4 volumes cannot be used")
    assert all("d2, some slices in several: put" in line for line in lines[1:])
    assert ids_of(build(tmp_path, strict=False)) == CASES[1::2]
    for case in CASES:
        shutil.rmtree(images / case / "d2")
        shutil.copytree(images / case / "d1", images / case / "d2")
    assert len(ids_of(build(tmp_path))) == 8


HALVES = [f"{case}/{half}" for case in CASES for half in ("d1", "d2")]


def write_table(root, rows, source, splits=None):
    """Rows of names as labels and splits, and the fields that say so; each row is of the class of
    its first name, and of its split unless others are given."""
    rows = [[row] if isinstance(row, str) else row for row in rows]
    splits = splits or [row[0].split("/")[0] for row in rows]
    kinds = [row[0].split("/")[1] for row in rows]
    if source == "csv":
        columns = ["path", "more"][: len(rows[0])]
        with open(root / "labels.csv", "w") as file:
            table = csv.writer(file)
            table.writerow([*columns, "label", "split"])
            table.writerows([*r, k, s] for r, k, s in zip(rows, kinds, splits, strict=True))
        return {"label_source": "csv", "split_source": "csv", "path_column": columns}
    if source == "dataset_json":
        lists = {split: [] for split in splits}
        for row, kind, split in zip(rows, kinds, splits, strict=True):
            lists[split].append({"image": row, "label": kind})
        (root / "dataset.json").write_text(json.dumps(lists))
        return {"label_source": "dataset_json", "split_source": "dataset_json"}
    parts = {split: [] for split in ("train", "val")}
    for row, split in zip(rows, splits, strict=True):
        parts[split].append(row[0])
    (root / "splits.json").write_text(json.dumps([parts]))
    labels = {row[0]: kind for row, kind in zip(rows, kinds, strict=True)}
    (root / "labels.json").write_text(json.dumps(labels))
    return {"label_source": source, "split_source": "splits_json"}


@pytest.mark.parametrize("source", ["csv", "dataset_json", "json", "folder"])
def test_a_table_that_names_the_parts_of_a_series_is_told(tmp_path, source):
    """Else halves of a volume are samples, of both splits."""
    write_parts(tmp_path / "images")
    fields = write_table(tmp_path, HALVES, source, ["train", "val"] * 4)
    with pytest.raises(UserError) as caught:
        build(tmp_path, **fields)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("8 volumes cannot be used") and len(lines) == 8
    for half, line in zip(sorted(HALVES), sorted(lines), strict=True):
        case = half.rpartition("/")[0]
        assert line.strip() == (
            f"{half}: parts of one series (SeriesInstanceUID) lie in {case}/d1, {case}/d2: name the"
            f" folder of all its slices once, {case}"
        )
    assert ids_of(build(tmp_path, **write_table(tmp_path, CASES, source))) == sorted(CASES)


def test_a_part_alone_and_one_beside_its_whole_are_told(tmp_path):
    """With what is whole left, and no note of volumes that no row names."""
    write_parts(tmp_path / "images")
    rows = [*CASES, "train/dark/p/d2"]
    with pytest.raises(
        UserError, match="2 volumes cannot be used.*(\\n.*p.*){2}once, train/dark/p$"
    ):
        build(tmp_path, **write_table(tmp_path, rows, "csv"))
    rows = ["train/dark/p/d1", *CASES[1:]]
    with pytest.raises(UserError, match="1 volume cannot be used.*\\n.*/d1: parts of one series"):
        build(tmp_path, **write_table(tmp_path, rows, "csv"))
    rows = ["train/dark/p/d1", *CASES]
    data = build(tmp_path, strict=False, **write_table(tmp_path, rows, "csv"))
    assert ids_of(data) == sorted(CASES[1:])
    assert [line for line in data.report if "not used" in line] == []


@pytest.mark.parametrize("source", ["csv", "dataset_json"])
def test_parts_of_a_series_as_channels_are_told(tmp_path, source):
    write_parts(tmp_path / "images")
    rows = [(f"{case}/d1", f"{case}/d2") for case in CASES]
    with pytest.raises(UserError, match="4 volumes cannot be used"):
        build(tmp_path, **write_table(tmp_path, rows, source))
    (tmp_path / "labels.json").write_text(json.dumps(dict.fromkeys(CASES, "dark")))
    for suffixes in (["/d1"], ["/d1", "/d2"]):
        with pytest.raises(UserError, match="parts of one series"):
            build(tmp_path, path_suffix=suffixes, label_source="json", split_source="kfold")


def test_parts_of_the_series_that_each_column_chooses_are_told(tmp_path):
    """Each folder holds half of both; the whole series are channels."""
    write_halves_of_both(tmp_path)
    both = VolumeReading(series=("SeriesDescription=t1", "SeriesDescription=t2"))
    rows = [(half, half) for half in HALVES]
    with pytest.raises(UserError, match="8 volumes cannot be used"):
        build(tmp_path, reading=both, **write_table(tmp_path, rows, "csv"))
    rows = [(case, case) for case in CASES]
    data = build(tmp_path, reading=both, **write_table(tmp_path, rows, "csv"))
    assert ids_of(data) == sorted(CASES) and data.samples.channels == 2


def test_new_volumes_of_a_table_that_are_parts_of_a_series_are_told(tmp_path):
    images = tmp_path / "images"
    write_parts(images)
    table = tmp_path / "new.csv"
    table.write_text("\n".join(["path", *(f"images/{half}" for half in HALVES[:3])]))
    with pytest.raises(UserError, match="2 volumes of 3 cannot be read") as caught:
        new_volumes(table)
    assert str(caught.value).count("d2: put its slices into one folder, each once, and name") == 2
    split, notes = new_volumes(table, VolumeData(strict=False))
    assert split.ids == [f"images/{HALVES[2]}"] and "left out" in notes[0]
    table.write_text("\n".join(["path", *(f"images/{case}" for case in CASES)]))
    assert len(new_volumes(table)[0].ids) == 4


def test_tables_of_volumes_of_one_uid_are_as_before(tmp_path):
    """As anonymisation may write it; also where a table names some of them."""
    for number, case in enumerate(CASES):
        write_dicom(tmp_path / "images" / case, VOXELS + number, uid="1.2.3")
        write_dicom(tmp_path / "images" / case / "more", VOXELS + 9 + number, uid="1.2.4")
    rows = [(case, f"{case}/more") for case in CASES]
    chosen = {
        "reading": VolumeReading(series=("SeriesInstanceUID=1.2.3", "SeriesInstanceUID=1.2.4"))
    }
    data = build(tmp_path, **chosen, **write_table(tmp_path, rows, "csv"))
    assert ids_of(data) == sorted(CASES) and data.samples.channels == 2


def test_a_slice_that_is_missing_between_the_parts_of_a_series_is_told(tmp_path):
    write_parts(tmp_path / "images", lost=(3, 4))
    with pytest.raises(UserError, match="4 volumes cannot be used.*\\n.*2 slices missing"):
        build(tmp_path)


def test_one_series_uid_in_all_files_joins_no_patients(tmp_path):
    """As anonymisation may write it."""
    for number, case in enumerate(CASES):
        write_dicom(tmp_path / "images" / case, VOXELS + number, uid="1.2.3")
    assert ids_of(build(tmp_path)) == sorted(CASES)
    far = write_dicom(tmp_path / "images/train/dark/z", VOXELS, uid="1.2.3", origin=(0, 0, 500))
    near = write_dicom(tmp_path / "images/train/dark/y", VOXELS, uid="1.2.4")
    write_dicom(tmp_path / "images/train/dark/x", VOXELS, uid="1.2.4", origin=(0, 0, 900))
    assert far.is_dir() and near.is_dir() and len(ids_of(build(tmp_path))) == 7
