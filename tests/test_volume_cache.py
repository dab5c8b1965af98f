"""Cache files of prepared volumes: made once, whole or not at all, by several processes, and read
in part."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
from msgspec.structs import replace
from volume_files import affine_of, blob, write_dicom, write_nifti

from glovita_lib import volume_cache
from glovita_lib.errors import UserError
from glovita_lib.read_volume import open_sample
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading
from glovita_lib.volume_cache import Entry, VolumeCache, VolumeSource, reading_of
from glovita_lib.volume_preparation import prepare

READING = VolumeReading()
SPEC = VolumePreparation(spacing=(1.5, 1, 2), crop="foreground", dtype="float32")


@pytest.fixture
def cache(tmp_path):
    return VolumeCache(tmp_path / "cache", READING, SPEC)


def files(tmp_path, count=4):
    return [
        (str(write_nifti(tmp_path / f"{i}.nii.gz", blob((12 + i, 14, 10), seed=i))),)
        for i in range(count)
    ]


def fill(cache, samples, workers=1):
    done = []
    found = cache.fill(samples, workers=workers, advance=done.append)
    assert sum(done) == len(samples)
    return found


def test_what_is_kept_is_what_preparation_gives(tmp_path, cache):
    samples = files(tmp_path)
    entries = fill(cache, samples)
    source = VolumeSource(entries, SPEC.dtype)
    for row, (paths, entry) in enumerate(zip(samples, entries, strict=True)):
        sample = open_sample(paths, reading_of(READING))
        expected = prepare(sample.read(), sample.affine, SPEC, has_spacing=True)
        (kept,) = source.windows(np.array([row]))
        assert entry.shape == kept.shape == expected.voxels.shape and entry.channels == 1
        assert entry.spacing == (1, 1, 1) and kept.spacing == pytest.approx((1.5, 1, 2))
        assert (kept[...] == expected.voxels).all() and (kept.affine == expected.affine).all()
        assert (kept.foreground == expected.foreground).all()
        assert (kept.fill == expected.voxels.min((1, 2, 3))).all()
        (whole,) = source.fetch(np.array([row]))
        assert (whole == expected.voxels).all()
    assert source.uniform is None and len(set(map(tuple, source.sizes))) == 3
    assert source.nbytes() == sum(4 * np.prod(entry.shape) for entry in entries)
    again = pickle.loads(pickle.dumps(source.select(np.array([2, 0]))))
    assert (again.fetch(np.array([1]))[0] == source.fetch(np.array([0]))[0]).all()


def test_volumes_of_one_size_are_one_array(tmp_path):
    cache = VolumeCache(tmp_path / "cache", READING, replace(SPEC, size=(8, 9, 10)))
    source = VolumeSource(fill(cache, files(tmp_path)), SPEC.dtype)
    assert source.uniform == (1, 8, 9, 10)
    assert source.fetch(np.array([3, 1])).shape == (2, 1, 8, 9, 10)


def test_a_second_start_makes_nothing_and_a_changed_file_or_setting_makes_it_anew(
    tmp_path, cache, monkeypatch
):
    samples = files(tmp_path)
    made = []
    real = volume_cache.make_entry
    monkeypatch.setattr(volume_cache, "make_entry", lambda task: made.append(task) or real(task))
    first = fill(cache, samples)
    assert len(made) == 4
    assert fill(cache, samples) == first and len(made) == 4
    write_nifti(Path(samples[1][0]), blob(seed=9))
    second = fill(cache, samples)
    assert len(made) == 5 and [a == b for a, b in zip(first, second, strict=True)][1] is False
    os.utime(samples[2][0], (1, 1))
    fill(cache, samples)
    assert len(made) == 6
    write_nifti(Path(samples[2][0]), blob((13, 14, 15)))
    os.utime(samples[2][0], (1, 1))  # of another size at the same time
    fill(cache, samples)
    assert len(made) == 7
    for changed in (replace(SPEC, crop_margin=1.0), replace(SPEC, dtype="float16")):
        other = fill(VolumeCache(tmp_path / "cache", READING, changed), samples)
        assert not {e.path for e in other} & {e.path for e in second}
    fill(VolumeCache(tmp_path / "cache", replace(READING, canonical=False), SPEC), samples)
    assert len(made) == 7 + 3 * 4
    fill(VolumeCache(tmp_path / "cache", READING, replace(SPEC, workers=7, cache_dir="x")), samples)
    assert len(made) == 19


def test_another_way_to_prepare_makes_new_files_and_leaves_the_old(tmp_path, cache, monkeypatch):
    """As a release of other rules does, which looks at what it made before, too."""
    samples = files(tmp_path, 2)
    old = [Path(entry.path) for entry in fill(cache, samples)]
    before = [path.read_bytes() for path in old]
    number = volume_cache.PREPARATION_VERSION
    monkeypatch.setattr(volume_cache, "PREPARATION_VERSION", number + 1)
    refused = UserError("refused by a later rule")
    monkeypatch.setattr(volume_cache, "prepare", Mock(side_effect=refused))
    later = VolumeCache(cache.folder.parent, READING, SPEC)
    assert fill(later, samples) == [f"{paths[0]}: {refused}" for paths in samples]
    assert later.folder != cache.folder and [path.read_bytes() for path in old] == before
    monkeypatch.undo()
    monkeypatch.setattr(volume_cache, "make_entry", Mock(side_effect=AssertionError))
    again = fill(VolumeCache(cache.folder.parent, READING, SPEC), samples)
    assert [Path(entry.path) for entry in again] == old


def test_a_damaged_cache_file_is_made_anew(tmp_path, cache):
    samples = files(tmp_path, 2)
    entries = fill(cache, samples)
    content = Path(entries[0].path).read_bytes()
    Path(entries[0].path).write_bytes(content[: len(content) // 2])
    Path(entries[1].path).write_bytes(b"")
    assert fill(cache, samples) == entries
    assert VolumeSource(entries, "float32").fetch(np.array([0, 1]))
    Path(entries[0].path).unlink()
    with pytest.raises(UserError, match="gone or damaged"):
        VolumeSource(entries, "float32").fetch(np.array([0]))


def test_samples_that_cannot_be_prepared_are_a_line_each(tmp_path, cache):
    """Every kind of bad file, and the good ones beside them are kept."""
    good = files(tmp_path, 1)
    nan = blob()
    nan[3, 3, 3] = np.nan
    voxels = np.random.default_rng(0).integers(0, 900, (6, 5, 4), np.int16)
    mixed = write_dicom(tmp_path / "mixed", voxels)
    write_dicom(mixed, voxels, description="b", cosines=(0, 1, 0, 1, 0, 0))
    cut = write_nifti(tmp_path / "cut.nii", blob())
    cut.write_bytes(cut.read_bytes()[:-100])
    zeros = write_nifti(tmp_path / "zeros.nii", blob())
    with open(zeros, "r+b") as file:
        file.seek(280)
        file.write(bytes(48))
    bad = {
        tmp_path / "missing.nii": "no such file",
        cut: "truncated",
        write_nifti(tmp_path / "nan.nii", nan): "NaN or infinite",
        write_nifti(tmp_path / "constant.nii", np.full((4, 4, 4), 2.0)): "constant",
        zeros: "singular",
        write_nifti(tmp_path / "frames.nii", np.stack([blob(), blob()], -1)): "4-D, 2 frames",
        mixed: "orientations mix",
        write_dicom(tmp_path / "gap", voxels, positions=[0, 2, 4, 8]): "1 slice missing",
    }
    samples = [*good, *((str(path),) for path in bad), *good]
    found = fill(cache, samples)
    assert isinstance(found[0], Entry) and found[0] == found[-1]
    for (path, said), line in zip(bad.items(), found[1:-1], strict=True):
        assert isinstance(line, str) and line.startswith(f"{path}: ") and said in line
        assert len(line.splitlines()) == 1
    assert len(list(cache.folder.glob("*.h5"))) == 1 and not list(cache.folder.glob(".tmp*"))


@pytest.mark.processes
def test_several_processes_give_the_same_files(tmp_path, cache):
    samples = [*files(tmp_path, 4), (str(tmp_path / "missing.nii"),)]
    Path(samples[2][0]).write_bytes(b"no volume")
    alone = fill(VolumeCache(tmp_path / "other", READING, SPEC), samples)
    entries = fill(cache, samples, workers=2)
    assert entries[2] == alone[2] and "broken volume file" in entries[2]
    assert entries[4] == alone[4]
    for one, other in zip(entries[:2], alone[:2], strict=True):
        with h5py.File(one.path) as first, h5py.File(other.path) as second:
            assert (first["voxels"][...] == second["voxels"][...]).all()


@pytest.mark.processes
def test_workers_know_no_torch_and_a_dead_one_is_said(tmp_path, cache, monkeypatch):
    samples = files(tmp_path, 3)
    monkeypatch.setattr(
        volume_cache,
        "SERVE",
        "import sys; import glovita_lib.volume_cache; sys.exit(40 + ('torch' in sys.modules))",
    )
    with pytest.raises(UserError, match=r"died at .*nii.gz \(exit code 40\)"):
        fill(cache, samples, workers=2)
    assert not list(cache.folder.glob("*.h5"))


SLOW = """
import sys, time
from pathlib import Path
from unittest.mock import Mock
from glovita_lib import volume_cache
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading
real = volume_cache.make_entry
def slow(task):
    found = real(task)
    print("made", flush=True)
    time.sleep(0.2)
    return found
volume_cache.make_entry = slow
spec = VolumePreparation(spacing=(1.5, 1, 2), crop="foreground", dtype="float32")
cache = volume_cache.VolumeCache(Path(sys.argv[1]), VolumeReading(), spec)
cache.fill([(path,) for path in sys.argv[2:]], workers=1, advance=lambda count: None)
"""


@pytest.mark.processes
def test_a_killed_start_is_continued(tmp_path, cache):
    samples = files(tmp_path, 6)
    arguments = [tmp_path / "cache", *(path for (path,) in samples)]
    child = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE)
    assert child.stdout.readline() == child.stdout.readline() == b"made\n"
    child.kill()
    child.communicate()
    there = len(list(cache.folder.glob("*.h5")))
    assert 2 <= there < 6
    made = []
    real = volume_cache.make_entry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volume_cache, "make_entry", lambda task: made.append(task) or real(task))
        assert all(isinstance(entry, Entry) for entry in fill(cache, samples))
    assert len(made) == 6 - there


@pytest.mark.processes
def test_a_worker_ends_with_the_program_that_started_it():
    process = volume_cache.start()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_a_crop_of_a_large_volume_reads_a_few_blocks(tmp_path):
    voxels = np.random.default_rng(0).normal(size=(120, 100, 90)).astype(np.float32)
    path = str(write_nifti(tmp_path / "a.nii", voxels, affine_of()))
    spec = VolumePreparation(normalize="none", dtype="float32")
    (entry,) = fill(VolumeCache(tmp_path / "cache", READING, spec), [(path,)])
    (volume,) = VolumeSource([entry], "float32").windows(np.array([0]))
    assert volume.voxels.chunks == (1, 32, 32, 32)
    part = volume[:, 10:42, 90:100, 5:50]
    assert (part[0] == voxels[10:42, 90:100, 5:50]).all()
    memory = volume.loaded()
    assert isinstance(memory.voxels, np.ndarray) and (memory[:, 1] == voxels[None, 1]).all()
