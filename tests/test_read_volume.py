"""Volume files against nibabel, NumPy and blosc2: every format, orientation and part, and broken
files."""

import gzip
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from covering import covering
from volume_files import ICBM, ORIENTATIONS, PLAIN, affine_of, blob, shipped, write_nifti

from glovita_lib.errors import UserError
from glovita_lib.read_volume import Sample, open_sample, open_volume

AFFINE = affine_of((0.7, 1.1, 2.5), (-30, 12, 4))


def refused(path, how=PLAIN):
    """The one line about a file that cannot be read, at its opening or when it is read."""
    with pytest.raises(UserError) as caught:
        open_volume(str(path), how).read()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# ---------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_in_any_orientation_is_the_same_volume(tmp_path, codes, suffix):
    voxels = blob()
    path = write_nifti(tmp_path / f"a{suffix}", voxels, AFFINE, codes)
    volume = open_volume(str(path), PLAIN)
    assert volume.shape == (1, *voxels.shape)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(volume.spacing, (0.7, 1.1, 2.5), atol=1e-6)
    read = volume.read()
    assert read.dtype == np.float32 and read.flags.c_contiguous
    assert (read[0] == voxels).all()
    box = slice(2, 7), slice(0, 5), slice(3, 10)
    assert (volume.read(box)[0] == voxels[box]).all()


@pytest.mark.parametrize(
    "name",
    [
        "nibabel/tests/data/anatomical.nii",
        "nibabel/tests/data/standard.nii.gz",
        "nibabel/tests/data/reoriented_anat_moved.nii",
        "dipy/data/files/S0_10slices.nii.gz",
        "dipy/data/files/aniso_vox.nii.gz",
        ICBM.format("gm"),
    ],
)
def test_files_of_others_as_nibabel_turns_them(name):
    path = shipped(name)
    expected = nibabel.as_closest_canonical(nibabel.load(path))
    volume = open_volume(str(path), PLAIN)
    assert (volume.read()[0] == np.asarray(expected.dataobj).reshape(volume.shape[1:])).all()
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-9)
    np.testing.assert_allclose(volume.spacing, nibabel.affines.voxel_sizes(expected.affine))


@pytest.mark.parametrize("name", ["functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz"])
def test_of_four_axes_a_frame_is_chosen_and_never_guessed(name):
    path = shipped(f"nibabel/tests/data/{name}")
    image = nibabel.as_closest_canonical(nibabel.load(path))
    frames = np.asarray(image.dataobj).astype(np.float32)
    assert f"4-D, {frames.shape[3]} frames" in refused(path)
    one = open_volume(str(path), replace(PLAIN, frame=1))
    assert one.shape == (1, *frames.shape[:3]) and (one.read()[0] == frames[..., 1]).all()
    every = open_volume(str(path), replace(PLAIN, frame="channels"))
    assert (every.read() == np.moveaxis(frames, -1, 0)).all()
    box = slice(1, 9), slice(2, 11), slice(0, 3)
    assert (every.read(box) == np.moveaxis(frames, -1, 0)[(slice(None), *box)]).all()
    last = frames.shape[3]
    assert f"frames 0 to {last - 1}" in refused(path, replace(PLAIN, frame=last))


def test_a_fourth_axis_of_one_is_none(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", blob()[..., None])
    assert open_volume(str(path), PLAIN).shape == (1, 12, 14, 10)


def test_slices_as_they_are_stored(tmp_path):
    path = write_nifti(tmp_path / "a.nii", blob(), AFFINE, "PIR")
    image = nibabel.load(path)
    volume = open_volume(str(path), replace(PLAIN, canonical=False))
    assert (volume.read()[0] == np.asarray(image.dataobj)).all()
    np.testing.assert_allclose(volume.affine, image.affine)


def test_slope_and_intercept_count_and_integers_stay(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    plain = write_nifti(tmp_path / "a.nii", voxels)
    scaled = write_nifti(tmp_path / "b.nii", voxels)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.set_slope_inter(2.0, -1024.0)
    with open(scaled, "r+b") as file:  # nibabel would divide the voxels
        file.seek(112)
        file.write(np.array([2, -1024], "<f4").tobytes())
    assert open_volume(str(plain), PLAIN).read().dtype == np.int16
    read = open_volume(str(scaled), PLAIN).read()
    assert read.dtype == np.float32 and (read[0] == voxels * 2 - 1024).all()


def test_big_endian_files_and_units(tmp_path):
    voxels = np.arange(24, dtype=">f8").reshape(2, 3, 4)
    affine = np.diag([0.001, 0.002, 0.003, 1])
    affine[:3, 3] = 0.01, -0.02, 0.04
    image = nibabel.Nifti1Image(voxels, affine)
    image = nibabel.Nifti1Image(voxels, image.affine, image.header.as_byteswapped(">"))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    volume = open_volume(str(tmp_path / "a.nii"), PLAIN)
    np.testing.assert_allclose(volume.spacing, (1, 2, 3), rtol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 3], (10, -20, 40), rtol=1e-6)
    assert volume.read().dtype == np.float32 and volume.read().dtype.isnative
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "b.nii")
    np.testing.assert_allclose(
        open_volume(str(tmp_path / "b.nii"), PLAIN).spacing, (1e-6, 2e-6, 3e-6)
    )
    assert (volume.read()[0] == voxels).all()


@pytest.mark.parametrize("last", [(5, 6, 7, 1), (0, 0, 0, 2), (0, 0, 0, 0)])
def test_an_affine_with_another_last_row_is_refused(tmp_path, last):
    affine = np.eye(4)
    affine[3] = last
    np.savez(tmp_path / "a.npz", volume=blob(), affine=affine)
    assert "last row of its affine is" in refused(tmp_path / "a.npz")


def test_colours_are_channels(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), np.uint8)
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = nibabel.Nifti1Image(values.view(rgb)[..., 0], np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    volume = open_volume(str(tmp_path / "a.nii"), PLAIN)
    assert (volume.read() == np.moveaxis(values, -1, 0)).all()


# ---------------------------------------------------------------------- arrays


def write_array(path, voxels, **beside):
    if path.suffix == ".npy":
        np.save(path, voxels)
    elif path.suffix == ".npz":
        np.savez(path, data=voxels, **beside)
    else:
        blosc2 = pytest.importorskip("blosc2")
        array = blosc2.asarray(np.ascontiguousarray(voxels), urlpath=str(path), mode="w")
        for name, value in beside.items():
            array.schunk.vlmeta[name] = np.asarray(value).tolist()
    return path


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype"),
    covering(
        [".npy", ".npz", ".b2nd"], [0, 1, 3], ["uint8", "int16", "float32", "float64", "bool"]
    ),
)
def test_arrays_have_their_channels_first(tmp_path, suffix, channels, dtype):
    shape = (channels, 5, 6, 7) if channels else (5, 6, 7)
    voxels = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    path = write_array(tmp_path / f"a{suffix}", voxels)
    volume = open_volume(str(path), replace(PLAIN, array_spacing=(1, 2, 3)))
    assert volume.shape == (channels or 1, 5, 6, 7) and volume.spacing == (1, 2, 3)
    whole = voxels.reshape(volume.shape)
    assert (volume.read() == whole).all()
    assert (volume.read((slice(1, 3), slice(0, 6), slice(4, 7))) == whole[:, 1:3, :, 4:7]).all()
    assert not open_volume(str(path), PLAIN).stored.has_spacing


@pytest.mark.parametrize("suffix", [".npz", ".b2nd"])
def test_arrays_with_geometry_beside_them(tmp_path, suffix):
    voxels = blob()
    path = write_array(tmp_path / f"a{suffix}", voxels[:, ::-1], affine=turned(voxels, AFFINE))
    volume = open_volume(str(path), PLAIN)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert (volume.read()[0] == voxels).all()
    path = write_array(tmp_path / f"b{suffix}", voxels, spacing=[1.0, 2.0, 3.0])
    assert open_volume(str(path), PLAIN).spacing == (1, 2, 3)
    for number, wrong in enumerate(([1, -2, 1], [1, 0, 1], [1, np.nan, 1], [1, np.inf, 1], [1, 2])):
        path = write_array(tmp_path / f"c{number}{suffix}", voxels, spacing=[*map(float, wrong)])
        assert "must be three positive numbers, mm" in refused(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".npy", ".npz", ".b2nd"])
def test_a_file_of_two_axes_is_one_slice_in_every_type(tmp_path, suffix):
    slice_ = np.random.default_rng(0).integers(0, 900, (6, 5), np.int16)
    found = []
    for name, stored in (("flat", slice_), ("deep", slice_[:, :, None])):
        path = tmp_path / f"{name}{suffix}"
        if suffix.startswith(".nii"):
            nibabel.save(nibabel.Nifti1Image(stored, np.diag([2.0, 3, 4, 1])), path)
        else:
            write_array(path, stored)
        volume = open_volume(str(path), replace(PLAIN, array_spacing=(2, 3, 4)))
        assert volume.shape == (1, 6, 5, 1)
        assert (volume.read()[0, :, :, 0] == slice_).all()
        part = volume.read((slice(1, 4), slice(2, 5), slice(0, 1)))
        assert (part[0, :, :, 0] == slice_[1:4, 2:5]).all()
        found.append(volume)
    assert found[0].spacing == found[1].spacing == (2, 3, 4)
    assert (found[0].affine == found[1].affine).all()


def turned(voxels, affine):
    """The affine of voxels whose second axis is reversed."""
    flip = np.diag([1.0, -1, 1, 1])
    flip[1, 3] = voxels.shape[1] - 1
    return affine @ flip


def test_the_entry_of_an_npz_is_named_where_there_are_several(tmp_path):
    np.savez(tmp_path / "a.npz", data=blob(), seg=blob() > 1)
    assert "2 arrays (data, seg)" in refused(tmp_path / "a.npz")
    assert open_volume(str(tmp_path / "a.npz"), replace(PLAIN, array_key="seg")).read().max() == 1
    assert 'no entry "sag"' in refused(tmp_path / "a.npz", replace(PLAIN, array_key="sag"))


# ---------------------------------------------------------------------- broken files


def corrupt(path, suffix):
    """Broken files, and what is said about them."""
    voxels = blob()
    good = write_nifti(path / f"good{suffix}", voxels)
    for share in (0.0, 0.1, 0.5, 0.99):
        cut = path / f"cut{share}{suffix}"
        content = good.read_bytes()
        cut.write_bytes(content[: int(share * len(content))])
        yield cut, "empty file" if share == 0 else "truncated|broken"
    zeros = path / f"zeros{suffix}"
    content = bytearray(gzip.decompress(good.read_bytes()) if suffix[-2:] == "gz" else content)
    content[280:328] = bytes(48)  # srow_x, srow_y, srow_z; sform_code says that they count
    zeros.write_bytes(gzip.compress(bytes(content)) if suffix[-2:] == "gz" else bytes(content))
    yield zeros, "singular"
    nans = path / f"nan{suffix}"
    content[280:284] = np.array([np.nan], "<f4").tobytes()
    nans.write_bytes(gzip.compress(bytes(content)) if suffix[-2:] == "gz" else bytes(content))
    yield nans, "NaN or infinite"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_broken_nifti_files_are_one_line_each(tmp_path, suffix):
    for path, said in corrupt(tmp_path, suffix):
        assert any(word in refused(path) for word in said.split("|")), path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_distances_and_offsets_that_nibabel_replaces_are_refused(tmp_path, suffix, caplog, capfd):
    def changed(**fields):
        header = nibabel.Nifti1Image(blob(), np.diag([2.0, 2, 3, 1])).header
        header["magic"], header["vox_offset"] = b"n+1", 352
        for name, value in {"sform_code": 0, "qform_code": 0, **fields}.items():
            header[name] = value
        content = header.binaryblock + bytes(4) + blob().tobytes("F")
        path = tmp_path / f"a{suffix}"
        path.write_bytes(gzip.compress(content) if suffix[-2:] == "gz" else content)
        return path

    assert open_volume(str(changed()), PLAIN).spacing == (2, 2, 3)
    flat = [1, 2, 2, 0, 0, 0, 0, 0]
    assert "2 x 2 x 0 mm apart" in refused(changed(pixdim=flat))
    assert "2 x 2 x 0 mm apart" in refused(changed(pixdim=flat, qform_code=1))
    placed = {"sform_code": 1, "srow_x": [2, 0, 0, 0], "srow_y": [0, 2, 0, 0]}
    sform = changed(pixdim=flat, **placed, srow_z=[0, 0, 3, 0])  # says it too
    assert open_volume(str(sform), PLAIN).spacing == (2, 2, 3)
    assert "begin at byte 0" in refused(changed(vox_offset=0))
    assert not caplog.records and not capfd.readouterr().err


def test_a_cut_gzip_file_is_found_before_its_voxels_are_read(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", blob((30, 30, 30)))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="truncated"):
        open_volume(str(path), PLAIN)


def test_a_damaged_gzip_file_is_found_by_its_checksum(tmp_path):
    voxels = np.random.default_rng(0).normal(scale=50, size=(16, 16, 16)).astype(np.int16)
    path = write_nifti(tmp_path / "a.nii.gz", voxels)
    whole = path.read_bytes()
    for place in [-6, *range(20, len(whole) - 8, 211)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        said = refused(path)
        assert "damaged" in said or "broken" in said or "truncated" in said, place
    frames = write_nifti(tmp_path / "b.nii.gz", np.stack([voxels, voxels], -1))
    damaged = bytearray(frames.read_bytes())
    damaged[-400] ^= 1  # in the frame that is not taken
    frames.write_bytes(damaged)
    assert "damaged" in refused(frames, replace(PLAIN, frame=0))


def test_padding_behind_the_voxels_is_legal(tmp_path):
    path = write_nifti(tmp_path / "a.nii", blob())
    content = path.read_bytes() + bytes(100)
    path.write_bytes(content)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content))
    for name in ("a.nii", "b.nii.gz"):
        assert (open_volume(str(tmp_path / name), PLAIN).read()[0] == blob()).all()


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"not a volume at all" * 50)
    (tmp_path / "a.npy").write_bytes(np.lib.format.magic(1, 0) + b"rubbish")
    (tmp_path / "a.txt").write_text("text")
    np.save(tmp_path / "line.npy", np.zeros(4))
    nibabel.save(nibabel.Nifti1Image(np.zeros(4, np.int16), np.eye(4)), tmp_path / "line.nii")
    np.save(tmp_path / "names.npy", np.array(["a"] * 8).reshape(2, 2, 2))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4)))
    np.save(tmp_path / "complex.npy", np.zeros((2, 4, 4), complex))
    np.save(tmp_path / "objects.npy", np.array([[[{}]]]), allow_pickle=True)
    assert "broken volume file" in refused(tmp_path / "a.nii")
    assert "broken volume file" in refused(tmp_path / "a.npy")
    assert "suffix is none of" in refused(tmp_path / "a.txt")
    assert "no such file or folder" in refused(tmp_path / "b.nii")
    assert "1-D, 4: expected axes (X, Y, Z)" in refused(tmp_path / "line.npy")
    assert "1-D, 4: expected axes (X, Y, Z)" in refused(tmp_path / "line.nii")
    assert "no numbers" in refused(tmp_path / "names.npy")
    assert "no voxels: its shape is 1 x 0 x 4 x 4" in refused(tmp_path / "none.npy")
    assert "no numbers" in refused(tmp_path / "complex.npy")
    assert "broken volume file" in refused(tmp_path / "objects.npy")


# ---------------------------------------------------------------------- several files a sample


def sample(*paths, how=PLAIN) -> Sample:
    return open_sample([str(path) for path in paths], how)


def test_files_of_one_grid_are_channels_in_their_order(tmp_path):
    one, two = blob(seed=1), blob(seed=2)
    paths = [write_nifti(tmp_path / "a.nii", one, AFFINE, "LPS")]
    paths += [write_nifti(tmp_path / "b.nii.gz", two, AFFINE, "SRA")]
    both = sample(*paths)
    assert both.shape == (2, *one.shape) and both.files == tuple(map(str, paths))
    assert (both.read() == np.stack([one, two])).all()
    box = slice(1, 4), slice(2, 5), slice(3, 6)
    assert (both.read(box) == np.stack([one, two])[(slice(None), *box)]).all()


def test_files_of_different_grids_are_refused(tmp_path):
    first = write_nifti(tmp_path / "a.nii", blob(), AFFINE)
    other = write_nifti(tmp_path / "b.nii", blob((12, 14, 9)), AFFINE)
    moved = write_nifti(tmp_path / "c.nii", blob(), affine_of((0.7, 1.1, 2.5), (-30, 12, 5)))
    with pytest.raises(UserError, match="12 x 14 x 9 voxels, but"):
        sample(first, other)
    with pytest.raises(UserError, match="lies up to 1 mm away"):
        sample(first, moved)


@pytest.mark.parametrize("codes", ["LPS", "SRA", "RAS", "PIR"])
@pytest.mark.parametrize("canonical", [True, False])
def test_an_array_lies_on_the_grid_of_the_file_beside_it(tmp_path, codes, canonical):
    path = write_nifti(tmp_path / "a.nii.gz", blob(), AFFINE, codes)
    np.save(tmp_path / "a.npy", np.asarray(nibabel.load(path).dataobj))
    how = replace(PLAIN, canonical=canonical)
    alone = open_volume(str(path), how)
    for files in [(path, tmp_path / "a.npy"), (tmp_path / "a.npy", path)]:
        both = sample(*files, how=how)
        assert both.has_spacing
        np.testing.assert_allclose(both.affine, alone.affine)
        assert (both.read() == np.concatenate([alone.read()] * 2)).all()
        box = slice(1, 4), slice(2, 5), slice(3, 6)
        assert (both.read(box) == both.read()[(slice(None), *box)]).all()


def test_an_array_that_knows_its_spacing_alone_lies_there_too(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", blob(), AFFINE, "LPS")
    stored = np.asarray(nibabel.load(path).dataobj)
    alone = open_volume(str(path), PLAIN)
    np.savez(tmp_path / "a.npz", x=stored, spacing=alone.spacing)
    for files in [(path, tmp_path / "a.npz"), (tmp_path / "a.npz", path)]:
        both = sample(*files)
        np.testing.assert_allclose(both.affine, alone.affine)
        assert (both.read() == np.concatenate([alone.read()] * 2)).all()
    np.savez(tmp_path / "a.npz", x=stored, spacing=(0.7, 1.1, 3))
    with pytest.raises(UserError, match="a.npz: its spacing is 0.7 x 1.1 x 3 mm, but that of"):
        sample(path, tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", stored)
    assert sample(tmp_path / "b.npy", tmp_path / "a.npz").volumes[0].spacing == (0.7, 1.1, 3)
    np.savez(tmp_path / "c.npz", x=stored, spacing=(0.7, 1.1, 2))
    with pytest.raises(UserError, match="c.npz: its spacing is"):
        sample(tmp_path / "a.npz", tmp_path / "c.npz")


def test_an_array_of_another_shape_than_the_stored_one_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii", blob(), AFFINE, "SRA")
    np.save(tmp_path / "a.npy", blob())  # already turned
    with pytest.raises(UserError, match="a.npy: 12 x 14 x 10 voxels without an affine"):
        sample(path, tmp_path / "a.npy")


def test_a_frame_that_no_file_of_a_sample_has_is_refused(tmp_path):
    flat = write_nifti(tmp_path / "a.nii", blob())
    single = write_nifti(tmp_path / "b.nii", blob()[..., None])
    np.save(tmp_path / "c.npy", blob())
    several = write_nifti(tmp_path / "d.nii", np.stack([blob(), blob(seed=1)], -1))
    second = replace(PLAIN, frame=1)
    for path in (flat, single, tmp_path / "c.npy"):
        with pytest.raises(UserError, match="frame = 1 does not exist: one frame"):
            sample(path, how=second)
        assert sample(path, how=replace(PLAIN, frame=0)).shape[0] == 1
    assert (sample(flat, several, how=second).read() == [blob(), blob(seed=1)]).all()
