"""Pictures of volumes for the README, made of real data: ICBM152, the average brain that the
package nilearn holds, with planted lesions.

A small network learns to tell brains with a lesion (a bright ball in white matter) from others.
From its run come the sheet of augmented volumes, and Grad-CAM of a brain that it has not seen.

    python benchmarks/gallery.py docs        # volumes_augmented.png, volumes_grad_cam.png; minutes
"""

import argparse
import csv
import shutil
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

import glovita
from glovita_lib.data_icbm import read_brain

BRAINS = {"train": 48, "val": 12, "test": 12}
STEP = 3  # voxels of 1 mm that become one
RADIUS = 8.0  # mm
WIDTH = 860  # pixels of the pictures
MAPS = ("infer.heat_maps=12", "infer.heat_map_class=lesion", "infer.use=last")

SPEC = """
mode = "train"
exp_dir = "{folder}/runs"
[data]
dataset = "generic_3d_dataset"
data_root_dir = "{folder}"
label_source = "csv"
split_source = "csv"
[data.augmentation]
train_policy = "default_nnunet"
patch_size = [56, 72, 56]
mirror_axes = ["x"]
train_kwargs = {{ rotate_p = 0.7, scale_p = 0.5, noise_p = 0.3, low_resolution_p = 0.0 }}
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [8, 16]
n_blocks_per_stage = 1
strides = [2, 1]
norm = "batch"
[model.head]
head_type = "max"
[task]
bootstrap = 0
[training]
epochs = 8
[optimizer]
lr = 1e-2
[dataloading]
batch_size = 6
[logger]
backend = "none"
"""


def write_brains(folder: Path) -> None:
    """Brains at 3 mm, shifted at random, every second with a lesion; labels and splits."""
    brain, rng = read_brain(), np.random.default_rng(0)
    white = np.argwhere(brain.wm > 250)
    rows = []
    for split, count in BRAINS.items():
        for number in range(count):
            name, lesion = f"{split}_{number:02d}.nii.gz", number % 2
            t1 = brain.t1.astype(np.float32)
            if lesion:
                middle = white[rng.integers(len(white))]
                distance = np.linalg.norm(np.indices(t1.shape).T - middle, axis=3).T
                t1 *= 1 + 0.8 / (1 + np.exp(distance - RADIUS))
            start = rng.integers(0, 8, 3)
            part = nibabel.Nifti1Image(t1, brain.affine).slicer[
                tuple(slice(s, None) for s in start)
            ]
            voxels = part.get_fdata(dtype=np.float32)
            sides = [side // STEP for side in voxels.shape]
            voxels = voxels[tuple(slice(side * STEP) for side in sides)]
            voxels = voxels.reshape([n for side in sides for n in (side, STEP)]).mean((1, 3, 5))
            affine = part.affine @ np.diag([STEP, STEP, STEP, 1])
            affine[:3, 3] += (STEP - 1) / 2  # the middle of the joined voxels
            (folder / "images").mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / "images" / name)
            label = "lesion" if lesion else "healthy"
            rows.append({"path": name, "label": label, "split": split})
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def run(folder: Path) -> Path:
    """Train, and draw Grad-CAM of the test split; the run directory."""
    spec = folder / "lesions.toml"
    spec.write_text(SPEC.format(folder=folder), encoding="utf-8")
    for overrides in ([], ["--override", "mode=infer", *MAPS]):
        if code := glovita.main([str(spec), *overrides]):
            raise SystemExit(code)
    return folder / "runs" / "generic_3d_dataset" / "lesions" / "0"


def small(source: Path, target: Path, rows: float = 1.0) -> None:
    """A picture WIDTH pixels wide; of its upper part where rows is below 1."""
    with Image.open(source) as picture:
        upper = picture.convert("RGB").crop((0, 0, picture.width, round(rows * picture.height)))
        size = (WIDTH, round(upper.height * WIDTH / upper.width))
        upper.resize(size, Image.Resampling.LANCZOS).save(target, optimize=True)


def make(folder: Path, target: Path) -> None:
    """All pictures.

    Args:
        folder: of data and runs.
        target: folder of the pictures.
    """
    write_brains(folder)
    path = run(folder)
    small(path / "plots" / "augmented.png", target / "volumes_augmented.png", 0.347)
    with open(path / "infer" / "predictions_test.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "lesion"]
    surest = max(rows, key=lambda row: float(row["p_lesion"]))["id"]
    name = surest.removesuffix(".gz").removesuffix(".nii")
    maps = path / "infer" / "plots" / "heat_maps_test"
    small(maps / f"{name}.png", target / "volumes_grad_cam.png")


def main() -> None:
    """Read the command line and make the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", type=Path, nargs="?", default=Path("docs"), help="their folder")
    parser.add_argument("--keep", type=Path, help="folder of data and runs, which are kept")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="glovita-gallery-"))
    folder.mkdir(parents=True, exist_ok=True)
    make(folder.resolve(), arguments.target)
    if arguments.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
