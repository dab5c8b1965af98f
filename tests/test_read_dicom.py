"""DICOM series against nibabel's own reading of them, and series that make up no grid."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from volume_files import PLAIN, shipped, write_dicom, write_frames

from glovita_lib.errors import UserError
from glovita_lib.read_dicom import image_kind
from glovita_lib.read_volume import open_sample, open_volume

pydicom = pytest.importorskip("pydicom")

VOXELS = np.random.default_rng(0).integers(-900, 900, (6, 5, 4), np.int16)
SAGITTAL = (0, 1, 0, 0, 0, -1)
OBLIQUE = (0.8, 0.6, 0, 0, 0, -1)
STORED = replace(PLAIN, canonical=False)


def refused(folder, how=PLAIN):
    with pytest.raises(UserError) as caught:
        open_sample([str(folder)], how).read()
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(f"{folder}: ")


@pytest.mark.filterwarnings("ignore:The DICOM readers are highly experimental")
@pytest.mark.parametrize("cosines", [(1, 0, 0, 0, 1, 0), SAGITTAL, OBLIQUE])
def test_affine_and_values_are_those_of_nibabel(tmp_path, cosines):
    folder = write_dicom(
        tmp_path / "a", VOXELS, spacing=(0.5, 0.8, 3), cosines=cosines, slope=2, intercept=-10
    )
    volume = open_volume(str(folder), STORED)
    np.testing.assert_allclose(volume.spacing, (0.5, 0.8, 3), atol=1e-3)
    assert (volume.read()[0] == VOXELS * 2.0 - 10).all()
    from nibabel.nicom import dicomwrappers as wrappers

    slices = [wrappers.wrapper_from_file(file) for file in sorted(folder.iterdir(), reverse=True)]
    for number in (0, 3):  # nibabel: rows, columns, LPS
        place = slices[number].affine @ [4, 5, 0, 1]
        ours = volume.affine @ [5, 4, number, 1]
        np.testing.assert_allclose(ours, place * [-1, -1, 1, 1], atol=1e-3)


@pytest.mark.parametrize("cosines", [(1, 0, 0, 0, 1, 0), SAGITTAL])
def test_a_series_is_turned_to_ras(tmp_path, cosines):
    folder = write_dicom(tmp_path / "a", VOXELS, cosines=cosines)
    volume = open_volume(str(folder), PLAIN)
    directions = volume.affine[:3, :3] / volume.spacing
    np.testing.assert_allclose(directions, np.eye(3), atol=1e-6)
    stored = open_volume(str(folder), STORED)
    for voxel in [(0, 0, 0), (5, 4, 3), (2, 3, 1)]:
        place = stored.affine @ [*voxel, 1]
        ours = np.rint(np.linalg.inv(volume.affine) @ place).astype(int)[:3]
        assert volume.read()[0][tuple(ours)] == VOXELS[voxel]
    box = slice(1, 3), slice(0, 4), slice(1, 4)
    assert (volume.read(box) == volume.read()[(slice(None), *box)]).all()


def test_shipped_series(tmp_path):
    tests = shipped("pydicom/data/test_files/dicomdirtests")
    volume = open_volume(str(tests / "98892001" / "CT5N"), PLAIN)
    assert volume.shape == (1, 16, 16, 5)
    assert volume.spacing == pytest.approx((0.488281, 0.488281, 2.5))
    files = [pydicom.dcmread(file) for file in (tests / "98892001" / "CT5N").iterdir()]
    values = [file.pixel_array * float(file.RescaleSlope) + file.RescaleIntercept for file in files]
    assert sorted(volume.read().ravel()) == sorted(np.stack(values).ravel())
    dose = open_volume(str(shipped("pydicom/data/test_files/rtdose.dcm")), PLAIN)
    assert dose.shape == (1, 10, 10, 15) and dose.spacing == (10, 10, 5)
    assert "slices missing" in refused(tests / "77654033" / "CT2")
    assert "orientations mix" in refused(tests / "98892003" / "MR700")
    assert "3 series" in refused(tests / "98892003" / "MR1")


def test_one_file_with_frames(tmp_path):
    """An enhanced image: geometry and scale in functional groups, frames in another order."""
    for name in ("a.dcm", "a.IMA", "a", "1.2.840.17"):
        file = write_frames(tmp_path / name, VOXELS, order=[2, 0, 3, 1], slopes=1.0 + np.arange(4))
        volume = open_volume(str(file), STORED)
        assert volume.spacing == (0.25, 0.5, 1.5)
        assert (volume.read()[0] == VOXELS * (1.0 + np.arange(4)) - 1).all()


def edit(file, **tags):
    """Write a DICOM file anew with other tags; None deletes one."""
    image = pydicom.dcmread(file)
    for keyword, value in tags.items():
        delattr(image, keyword) if value is None else setattr(image, keyword, value)
    image.save_as(file)


def test_slope_and_intercept_count_alone_too(tmp_path):
    def values(**tags):
        folder = write_dicom(tmp_path / "a", VOXELS, slope=3, intercept=-10)
        for file in folder.iterdir():
            edit(file, **tags)
        return open_volume(str(folder), STORED).read()[0]

    assert (values(RescaleSlope=None) == VOXELS - 10.0).all()
    assert (values(RescaleSlope="") == VOXELS - 10.0).all()
    assert (values(RescaleIntercept=None) == VOXELS * 3.0).all()
    assert (values(RescaleIntercept="") == VOXELS * 3.0).all()
    assert (values(RescaleSlope=None, RescaleIntercept=None) == VOXELS).all()


def test_a_slope_of_zero_is_refused(tmp_path):
    folder = write_dicom(tmp_path / "a", VOXELS)
    edit(min(folder.iterdir()), RescaleSlope=0)
    assert "RescaleSlope is 0" in refused(folder)
    file = write_frames(tmp_path / "b.dcm", VOXELS, slopes=np.array([1, 0, 1, 1]))
    assert "RescaleSlope is 0" in refused(file)


def test_what_decodes_a_compressed_file_is_named(tmp_path):
    from pydicom.pixels import get_decoder

    syntax = pydicom.uid.JPEGLosslessSV1
    if get_decoder(syntax).is_available:
        pytest.skip("a decoder is installed")
    folder = write_dicom(tmp_path / "a", VOXELS)
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        image.file_meta.TransferSyntaxUID = syntax
        image.PixelData = pydicom.encaps.encapsulate([bytes(60)])
        image["PixelData"].is_undefined_length = True
        image.save_as(file)
    said = refused(folder)
    assert "is compressed (JPEG Lossless" in said and "pip install pylibjpeg" in said


def test_doses_are_scaled_and_their_frames_lie_where_offsets_say(tmp_path):
    (file,) = write_dicom(tmp_path / "a", VOXELS[..., :1], slope="", intercept="").iterdir()
    stored = np.stack([VOXELS[..., place].T for place in range(4)]).astype("<i2")
    frames = {"NumberOfFrames": 4, "PixelData": stored.tobytes(), "Modality": "RTDOSE"}
    edit(file, GridFrameOffsetVector=[0, 2.5, 5, 7.5], DoseGridScaling=0.5, **frames)
    relative = open_volume(str(tmp_path / "a"), STORED)
    assert (relative.read()[0] == VOXELS * 0.5).all()
    assert relative.spacing[2] == 2.5 and relative.affine[2, 3] == 5
    edit(file, GridFrameOffsetVector=[5, 7.5, 10, 12.5])  # places instead of offsets
    absolute = open_volume(str(tmp_path / "a"), STORED)
    np.testing.assert_allclose(absolute.affine, relative.affine)
    edit(file, DoseGridScaling=None)
    assert "RT Dose without DoseGridScaling" in refused(tmp_path / "a")


def test_a_tilted_gantry_shears_the_grid(tmp_path):
    folder = write_dicom(tmp_path / "a", VOXELS)
    for file in folder.iterdir():
        x, y, z = map(float, pydicom.dcmread(file).ImagePositionPatient)
        edit(file, ImagePositionPatient=[x, y + (z - 5) / 2, z])
    volume = open_volume(str(folder), STORED)
    np.testing.assert_allclose(volume.affine[:3, 2], (0, -1, 2))
    assert volume.spacing[2] == pytest.approx(5**0.5)


# ---------------------------------------------------------------------- choosing a series


def test_a_series_is_chosen_by_its_tags_and_several_are_channels(tmp_path):
    study = tmp_path / "study"
    write_dicom(study / "1", VOXELS, uid="1.1", description="T1 post")
    write_dicom(study / "2", VOXELS + 1, uid="1.2", description="T2", EchoNumbers=2)
    (study / "readme.txt").write_text("no image")
    line = refused(study)
    assert "2 series" in line and "SeriesDescription=T1 post" in line and "(4 files)" in line
    t1 = replace(PLAIN, series=("SeriesDescription=t1*",))
    assert (
        open_sample([str(study)], t1).read() == open_volume(str(study / "1"), PLAIN).read()
    ).all()
    both = replace(PLAIN, series=("SeriesInstanceUID=1.2 & EchoNumbers=2", "SeriesDescription=T1*"))
    found = open_sample([str(study)], both)
    assert found.shape == (2, 6, 5, 4) and len(found.files) == 8
    assert (found.read()[0] == found.read()[1] + 1).all()
    assert "no series with SeriesDescription=flair" in refused(
        study, replace(PLAIN, series=("SeriesDescription=flair",))
    )


# ---------------------------------------------------------------------- no grid


def test_slices_that_make_up_no_grid_are_one_line(tmp_path):
    def mixed(name, **other):
        folder = write_dicom(tmp_path / name, VOXELS)
        return write_dicom(folder, VOXELS, **{"description": "b", "origin": (-10, 20, 13), **other})

    turned = mixed("turned", cosines=(0, 1, 0, 1, 0, 0))
    line = refused(turned)
    assert "slices' orientations mix" in line and "0, 1, 0, 1, 0, 0 (4 slices)" in line
    assert "pixel spacings mix" in refused(mixed("px", spacing=(2, 2, 2)))
    small = write_dicom(tmp_path / "small", VOXELS)
    write_dicom(small, VOXELS[:4], description="b", origin=(-10, 20, 13))
    assert "sizes mix" in refused(small) and "5 x 4 (4 slices)" in refused(small)
    assert "gaps mix: 2 mm between 5 and 7 mm, 5 mm for most" in refused(
        mixed("gaps", origin=(-10, 20, 16), spacing=(1, 1, 5))
    )
    assert "8 slices at 4 places" in refused(mixed("time", origin=(-10, 20, 5)))
    assert "beside the line" in refused(mixed("beside", origin=(-8, 20, 13)))


@pytest.mark.parametrize(
    ("tag", "value", "said"),
    [
        (
            "ImageOrientationPatient",
            [2, 0, 0, 0, 2, 0],
            "is 2, 0, 0, 0, 2, 0: no directions",
        ),
        ("ImageOrientationPatient", [1, 0, 0, 0.3, 0.95, 0], "at right angles"),
        ("ImageOrientationPatient", [0, 0, 0, 0, 0, 0], "length 1"),
        ("PixelSpacing", [-1, 1], "is -1, 1: it must be above 0"),
        ("PixelSpacing", [1, 0], "it must be above 0"),
        ("ImageOrientationPatient", [0.71, 0.71, 0, -0.71, 0.71, 0], None),  # few decimals
    ],
)
def test_a_plane_that_is_none_is_refused(tag, value, said, tmp_path):
    folder = write_dicom(tmp_path / "a", VOXELS)
    for file in folder.iterdir():
        edit(file, **{tag: value})
    if said is None:
        assert open_volume(str(folder), PLAIN).spacing[0] == pytest.approx(1, rel=0.01)
    else:
        assert said in refused(folder)


def test_a_missing_slice_and_a_single_one(tmp_path):
    folder = write_dicom(tmp_path / "a", VOXELS, positions=[0, 2, 6, 8])
    assert "1 slice missing: the gap is 4 mm between 7 and 11 mm, 2 mm elsewhere" in refused(folder)
    rounded = write_dicom(tmp_path / "c", VOXELS, positions=[0, 0.62, 1.25, 1.87])
    assert open_volume(str(rounded), PLAIN).spacing[2] == pytest.approx(1.87 / 3, abs=1e-3)
    assert "single slice" in refused(write_dicom(tmp_path / "b", VOXELS[..., :1]))


@pytest.mark.parametrize("gap", [0.3, 0.018, 0.005, 1e-4])
def test_a_missing_slice_is_found_at_any_scale(gap, tmp_path):
    positions = [place * gap for place in (0, 1, 3, 4, 5, 6)]
    folder = write_dicom(tmp_path / "a", np.tile(VOXELS, 2)[..., :6], positions=positions)
    assert "1 slice missing" in refused(folder)
    assert "6 slices at 5 places" in refused(
        write_dicom(
            tmp_path / "b",
            np.tile(VOXELS, 2)[..., :6],
            positions=[place * gap for place in (0, 1, 1, 2, 3, 4)],
        )
    )


def test_a_copied_slice_is_named(tmp_path):
    folder = write_dicom(tmp_path / "a", VOXELS)
    one = sorted(folder.iterdir())[1]
    (folder / "b").mkdir()
    copied = shutil.copy(one, folder / "b" / one.name)
    line = refused(folder)
    assert f"5 slices at 4 places: {one.name}, b/{one.name} are one image" in line
    assert "remove the copies" in line
    edit(copied, SOPInstanceUID="1.2.3")
    assert "a series over time" in refused(folder)
    for file in (*folder.glob("*.dcm"), copied):  # an anonymiser's one number for all
        edit(file, SOPInstanceUID="1.2.3")
    assert "a series over time" in refused(folder)


def test_a_folder_that_cannot_be_listed_may_hold_slices(tmp_path, monkeypatch):
    folder, scandir = write_dicom(tmp_path / "a", VOXELS), os.scandir
    (folder / "more").mkdir()

    def refusing(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="more: cannot be listed .Permission denied"):
        open_volume(str(folder), PLAIN)


def test_other_files(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no DICOM image" in refused(empty)
    cut = write_dicom(tmp_path / "cut", VOXELS)
    last = sorted(cut.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-20])
    assert f"{last.name} is truncated" in refused(cut)
    nowhere = write_dicom(tmp_path / "nowhere", VOXELS, ImagePositionPatient=None)
    assert "no place in space" in refused(nowhere)
    assert "mosaic" in refused(
        write_dicom(tmp_path / "mosaic", VOXELS, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    )
    assert "colour image" in refused(shipped("pydicom/data/test_files/SC_rgb_small_odd.dcm"))


@pytest.mark.parametrize("name", ["{}", "{}.dcm", "1.2.840.{}", "{}.IMA"])
@pytest.mark.parametrize("syntax", ["plain", "compressed"])
def test_a_slice_that_is_cut_off_anywhere_is_named(tmp_path, name, syntax):
    folder = write_dicom(tmp_path / "a", VOXELS)
    if syntax == "compressed":
        for file in folder.iterdir():
            image = pydicom.dcmread(file)
            image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
            image.save_as(file)
    for file in list(folder.iterdir()):
        file.rename(folder / name.format(file.name[-3:]))
    (folder / "README").write_text("no image")
    (folder / "preview.jpg").write_bytes(b"no image")
    last = sorted(folder.iterdir())[0]  # the topmost in space
    assert open_volume(str(folder), PLAIN).shape == (1, *VOXELS.shape)
    whole = last.read_bytes()
    end = whole.index(b"\xe0\x7f\x10\x00")  # the element of the pixels
    for length in [0, 60, 131, 132, 140, *range(150, end + 1, 7), end]:
        last.write_bytes(whole[:length])
        assert last.name in refused(folder), length


def test_dicom_files_that_are_no_images_are_left_out(tmp_path):
    folder = write_dicom(tmp_path / "a", VOXELS)
    report = folder / "t1_009"
    report.write_bytes(sorted(folder.iterdir())[0].read_bytes())
    gone = dict.fromkeys(["Rows", "Columns", "PixelData", "BitsAllocated", "SamplesPerPixel"])
    edit(report, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", **gone)
    assert f"{report.name} is truncated" in refused(folder)  # an image by its file's head
    image = pydicom.dcmread(report)
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.save_as(report)
    assert open_volume(str(folder), PLAIN).shape == (1, *VOXELS.shape)


def test_a_cut_slice_of_another_series_does_not_matter_where_its_head_tells(tmp_path):
    study = tmp_path / "a"
    write_dicom(study, VOXELS)
    write_dicom(study, VOXELS, uid="1.9", description="scout")
    scout = sorted(study.glob("scout*"))[0]
    whole = scout.read_bytes()
    scout.write_bytes(whole[: whole.index(b"\x28\x00\x10\x00")])  # before Rows
    t1 = replace(PLAIN, series=("SeriesDescription=t1",))
    assert open_sample([str(study)], t1).shape == (1, *VOXELS.shape)
    assert scout.name in refused(study, replace(PLAIN, series=("SeriesDescription=scout",)))


def test_brackets_of_a_condition_are_themselves(tmp_path):
    for number, name in enumerate(("t1 [iso]", "t1 o", "t1 i")):
        write_dicom(tmp_path / "study", VOXELS + number, uid=f"1.{number}", description=name)
    for condition in ("SeriesDescription=t1 [iso]", "SeriesDescription=T1 [*]"):
        found = open_sample([str(tmp_path / "study")], replace(STORED, series=(condition,)))
        assert (found.read()[0] == VOXELS).all()


def test_frames_over_time_of_one_file_have_a_cure_of_their_own(tmp_path):
    """Conditions choose files."""
    file = write_frames(tmp_path / "a.dcm", VOXELS, order=[0, 0, 1, 1])
    line = refused(file)
    assert "4 slices at 2 places" in line and "convert it to NIfTI" in line
    assert "data.reading.series" not in line


def bare(file, kind):
    """A DICOM file without its preamble, as old exports write it: with the head that tells its
    encoding, or without one; with another first element; or cut off somewhere."""
    image = pydicom.dcmread(file)
    if kind == "head":
        file.write_bytes(file.read_bytes()[132:])
        return
    if kind in ("LO first", "no group 8"):
        for element in [each for each in image if each.tag.group == 8]:
            del image[element.tag]
    if kind == "LO first":
        image.Manufacturer = "Vendor"
    if kind == "big endian":
        image.PixelData = np.frombuffer(image.PixelData, "<i2").astype(">i2").tobytes()
    del image.file_meta, image.preamble
    is_implicit = kind in ("implicit", "no group 8")
    little = kind != "big endian"
    pydicom.dcmwrite(file, image, implicit_vr=is_implicit, little_endian=little)


BARE = ["head", "implicit", "explicit", "big endian", "LO first", "no group 8"]


@pytest.mark.parametrize("suffix", ["", ".dcm"])
@pytest.mark.parametrize("kind", BARE)
def test_files_without_preamble_are_read(tmp_path, kind, suffix):
    folder = write_dicom(tmp_path / "series", VOXELS, slope=2, intercept=-3)
    for number, file in enumerate(sorted(folder.iterdir())):
        bare(file, kind)
        file.rename(folder / f"{number}{suffix}")
    volume = open_volume(str(folder), STORED)
    assert (volume.read()[0] == 2.0 * VOXELS - 3).all()
    kinds = {image_kind(str(file), []) for file in folder.iterdir()}
    assert len(kinds) == 1 and kinds.pop().frames == 1
    whole = sorted(folder.iterdir())[1]
    content = whole.read_bytes()
    for length in (20, 20 + len(content) // 4, len(content) // 2, len(content) - 20):
        whole.write_bytes(content[:length])
        line = refused(folder)
        assert whole.name in line and ("truncated" in line or "cut off" in line), length


def test_a_report_without_preamble_is_no_slice(tmp_path):
    folder = write_dicom(tmp_path / "series", VOXELS)
    report = pydicom.dcmread(next(folder.iterdir()))
    for keyword in ("Rows", "Columns", "PixelData"):
        del report[keyword]
    report.SOPClassUID = pydicom.uid.BasicTextSRStorage
    del report.file_meta, report.preamble
    pydicom.dcmwrite(folder / "report", report, implicit_vr=True, little_endian=True)
    assert (open_volume(str(folder), STORED).read()[0] == VOXELS).all()
    assert image_kind(str(folder / "report"), []) is None


OTHERS = {
    "short": b"\x08\0\0",
    "text": b"\x02\0\0\0abcdefgh",
    "long first": b"\x08\0\x05\0\xff\xff\xff\xffab",
    "mask": np.array([8, 0, 1, 2, 0, 3] * 40, "<i4").tobytes(),
    "mask of 2": np.full(500, 2, "<i4").tobytes(),
    "mask of shorts": np.array([8, 0, 16, 0] * 90, "<u2").tobytes(),
    "big mask": np.array([8, 16] * 90, ">u2").tobytes(),
    "types": b"\x08\0\x05\0LOad" * 60,
    "big types": b"\0\x08\0\x05CSad" * 60,
    "zeros": bytes(400),
    "a head alone": b"\2\0\0\0UL\4\0\x10\0\0\0" + bytes(90),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", ["other.bin", "other", "mask.raw"])
def test_other_files_that_begin_alike_are_no_slices(tmp_path, content, name):
    folder = write_dicom(tmp_path / "series", VOXELS)
    (folder / name).write_bytes(content)
    assert (open_volume(str(folder), STORED).read()[0] == VOXELS).all()
    assert image_kind(str(folder / name), []) is None
