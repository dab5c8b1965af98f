"""Volume files that tests write: NIfTI in any orientation, DICOM series, and where packages keep
real ones."""

from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import gaussian_filter

from glovita_lib.read_volume import Reading

PLAIN = Reading(canonical=True, frame=None, series=(), array_key=None, array_spacing=None)
ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SRA", "IPL", "ASL", "RSP"]
ICBM = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def shipped(path: str) -> Path:
    """A file inside an installed package, which is not imported; skips the test without it."""
    import pytest

    package, _, inside = path.partition("/")
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"no package {package}")
    return Path(found.origin).parent / inside


def blob(shape: tuple[int, int, int] = (12, 14, 10), seed: int = 0) -> np.ndarray:
    """A smooth volume without symmetry, float32, 0 around something bright."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = gaussian_filter(noise, 1.5, mode="constant")
    inside = np.zeros(shape)
    inside[tuple(slice(2, side - 2) if side > 4 else slice(None) for side in shape)] = 1
    return ((smooth - smooth.min() + 0.1) * inside * 100).astype(np.float32)


def affine_of(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)) -> np.ndarray:
    """A RAS affine."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def write_nifti(path, voxels, affine=None, codes="RAS", **header):
    """A NIfTI file of RAS voxels, stored in other axes; the same points in space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine_of() if affine is None else affine)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
    image = image.as_reoriented(turn)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def write_labelled(folder: Path, volumes, affine=None, shares=(4, 2, 2), codes=("RAS",)):
    """Volumes of the classes a and b in turn, stored in other axes in turn, with the table of their
    labels and splits."""
    splits = [s for s, n in zip(("train", "val", "test"), shares, strict=True) for _ in range(n)]
    rows = ["path,label,split"]
    for n, (voxels, split) in enumerate(zip(volumes, splits, strict=True)):
        write_nifti(folder / "images" / f"{n}.nii", voxels, affine, codes[n % len(codes)])
        rows.append(f"{n}.nii,{'ab'[n % 2]},{split}")
    (folder / "labels.csv").write_text("\n".join(rows))


def write_dicom(
    folder,
    voxels,
    *,
    spacing=(1.0, 1.0, 2.0),
    cosines=(1, 0, 0, 0, 1, 0),
    origin=(-10.0, 20.0, 5.0),
    slope=1.0,
    intercept=0.0,
    uid="1.2.3",
    description="t1",
    positions=None,
    **tags,
):
    """A folder of slices of int16 voxels (column, row, slice) in DICOM's axes; files are named
    against their order in space, and SliceThickness is wrong."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    cosines = np.array(cosines, float)
    normal = np.cross(cosines[:3], cosines[3:])
    count = voxels.shape[2]
    places = np.arange(count) * spacing[2] if positions is None else positions
    for number in range(count):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"{uid}.{number + 1}"
        file = folder / f"{description}_{count - number:03d}"
        image = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"{uid}.{number + 1}"
        image.SeriesInstanceUID, image.SeriesDescription, image.Modality = uid, description, "CT"
        image.Columns, image.Rows = voxels.shape[:2]
        image.PixelSpacing = [spacing[1], spacing[0]]
        image.SliceThickness = 7.0
        image.ImageOrientationPatient = [f"{value:.6f}" for value in cosines]
        place = np.array(origin) + places[number] * normal
        image.ImagePositionPatient = [f"{value:.4f}" for value in place]
        image.RescaleSlope, image.RescaleIntercept = slope, intercept
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation = 15, 1
        for keyword, value in tags.items():
            setattr(image, keyword, value)
        image.PixelData = np.ascontiguousarray(voxels[:, :, number].T.astype("<i2")).tobytes()
        image.save_as(file, enforce_file_format=True)
    return folder


def write_frames(file, voxels, *, uid="1.2.3", description="t1", order=None, slopes=None):
    """An enhanced DICOM image: one file of int16 voxels (column, row, slice), whose frames have
    their place and their slope, with intercept -1, in functional groups."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def groups(**parts):
        found = Dataset()
        for sequence, values in parts.items():
            inside = Dataset()
            for keyword, value in values.items():
                setattr(inside, keyword, value)
            setattr(found, sequence, Sequence([inside]))
        return found

    order = range(voxels.shape[2]) if order is None else order
    slopes = np.ones(voxels.shape[2]) if slopes is None else slopes
    (single,) = write_dicom(file.parent / f"{file.name}.one", voxels[..., :1], uid=uid).iterdir()
    image = pydicom.dcmread(single)
    single.unlink()
    single.parent.rmdir()
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(image, keyword)
    image.SeriesDescription, image.NumberOfFrames = description, len(order)
    image.SharedFunctionalGroupsSequence = Sequence(
        [
            groups(
                PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25]},
                PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            )
        ]
    )
    image.PerFrameFunctionalGroupsSequence = Sequence(
        [
            groups(
                PlanePositionSequence={"ImagePositionPatient": [0, 0, 1.5 * place]},
                PixelValueTransformationSequence={
                    "RescaleSlope": float(slopes[place]), "RescaleIntercept": -1.0
                },
            )
            for place in order
        ]
    )  # fmt: skip
    image.PixelData = np.stack([voxels[..., n].T for n in order]).astype("<i2").tobytes()
    image.save_as(file, enforce_file_format=True)
    return file
