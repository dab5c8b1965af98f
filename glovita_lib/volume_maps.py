"""Maps of volumes as NIfTI files, which lie over the original in any viewer.

X Y Z voxels.
"""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glovita_lib import files

# ---------------------------------------------------------------------------------- the file


def write_map(path: Path | str, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a map as a NIfTI-1 file of float32, whole or not at all; the same values and affine
    give the same bytes.

    Args:
        path: of the file, which is compressed where it ends in .gz.
        values: (X, Y, Z).
        affine: (4, 4), voxel to world mm, such as the one of a prepared volume.

    Raises:
        UserError: the file cannot be written.
    """
    import nibabel

    if values.ndim != 3 or affine.shape != (4, 4):
        raise ValueError(f"a map is (X, Y, Z), its affine (4, 4): {values.shape}, {affine.shape}")
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    image.set_sform(affine, "scanner")
    # a qform holds rotation, mirroring and scaling; of an affine with shear viewers take the sform
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    upright = np.allclose(columns.T @ columns, np.eye(3), atol=1e-5)
    image.set_qform(affine, "scanner" if upright else "unknown")
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if str(path).endswith(".gz"):
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as file:
            file.write(content)
        content = packed.getvalue()
    files.write_bytes(path, content)


def part_affine(affine: np.ndarray, starts: Sequence[float]) -> np.ndarray:
    """Affine (4, 4) of a part of a volume that begins at a voxel (3,) of it, which may lie
    outside."""
    shift = np.eye(4)
    shift[:3, 3] = starts
    return affine @ shift
