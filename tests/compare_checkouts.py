"""Run the same commands in two checkouts and compare what they leave, number by number.

    python tests/compare_checkouts.py OTHER_CHECKOUT [--only digits_resnet ...]

For changes of the source that must not change results: predictions and metrics have to be equal
byte by byte, feature files and attention in every dataset. Exit code 1 where something differs.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py

ROOT = Path(__file__).parents[1]
SHORT = ["training.epochs=2", "logger.backend=none"]
MOSAICS = [f"data.{split}_features_file=mosaics_{split}.h5" for split in ("train", "val", "test")]
PEFT = [
    "peft.method=lora", "peft.rank=4", "task.mixup=true",
    "model.encoder.type=test_vit", "model.encoder.small_images=false",
    "model.encoder.model_kwargs={patch_size=4, embed_dim=16, depth=2, num_heads=2}",
    "data.augmentation.image_size=8", "data.data_fraction=0.3", *SHORT,
]  # fmt: skip
COMMANDS: dict[str, list[tuple[str, list[str]]]] = {
    "digits_resnet": [("digits_resnet", SHORT), ("digits_resnet", [*SHORT, "mode=infer"])],
    "linear_probe": [("digits_vit_linear_probe", SHORT)],
    "clam_sb": [
        ("clam_sb", ["data.data_root_dir=bags", *MOSAICS, *SHORT]),
        ("clam_sb", ["data.data_root_dir=bags", *MOSAICS, *SHORT, "mode=infer"]),
    ],
    "peft": [("digits_resnet", ["name=peft", *PEFT])],
    "extract": [
        ("digits_resnet", ["name=digits_resnet", *SHORT]),
        ("extract_digits", [*SHORT, "extract.output_dir=features"]),
    ],
    "umap": [
        ("digits_resnet", ["name=digits_resnet", *SHORT]),
        ("umap_digits", [*SHORT, "umap.pca=20"]),
    ],
}
"""Specs and overrides, one after another in one folder."""


def products(checkout: Path, commands: list[tuple[str, list[str]]], folder: Path) -> dict[str, Any]:
    """What the commands leave below a folder: by file, its text or its datasets."""
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "mil_data.py", "bags"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    for spec, overrides in commands:
        command = [sys.executable, checkout / "glovita.py", checkout / "specs" / f"{spec}.toml"]
        result = subprocess.run(
            [*map(str, command), "--override", "exp_dir=runs", *overrides],
            cwd=folder, text=True, capture_output=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"{checkout}: {spec} {overrides}\n{result.stdout}{result.stderr}")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".csv" and not name.startswith("bags"):
            with open(path, newline="") as file:
                found[name] = list(csv.reader(file))
        elif path.name.startswith("metrics_") and path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".h5" and not name.startswith("bags"):
            with h5py.File(path) as file:
                found[name] = {key: (file[key].shape, file[key][()].tolist()) for key in file}
    return found


def main() -> int:
    """Compare all commands; the number of those that differ decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    asked = parser.parse_args()
    different = 0
    for name in asked.only:
        with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
            ours = products(ROOT, COMMANDS[name], Path(here))
            theirs = products(asked.other.resolve(), COMMANDS[name], Path(there))
        unequal = sorted(f for f in ours.keys() | theirs.keys() if ours.get(f) != theirs.get(f))
        print(f"{name}: {len(ours)} files", *(f"DIFFERENT {file}" for file in unequal), sep="\n  ")
        different += bool(unequal) or not ours
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
