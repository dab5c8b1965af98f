"""Fixtures: commands run in this process, half a second each, and tiny data sets of real images."""

import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from small_runs import FOLDERS, TINY, Result, digits, snapshot, write_png

# Tiny models are slower on several cores, and sums must not depend on their number; before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# numba gives the OpenMP of torch as many threads as it has itself, also after umap is done.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

Command = Callable[..., Result]


RUNS = {"command", "refused", "extract"}
"""Fixtures that run the program: what asks for one is marked `runs`."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all but their own tests: CPUs alone repeat numbers to the last digit."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that are whole runs."""
    for item in items:
        if RUNS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.runs)


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Runs `glovita.py SPEC --override ...` in this process, with all runs below tmp_path/runs.

    `spec` is a file or the text of one; it fails where the exit code is not `code`. Nothing waits
    for the disk, which takes as long as the rest of a tiny run.
    """
    from glovita import main

    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def run(*overrides: str, spec: str | Path = TINY, code: int = 0, flags: Iterable = ()):
        from glovita_lib.errors import UserError
        from glovita_lib.rundir import locate
        from glovita_lib.spec_check import load_checked

        if isinstance(spec, str):
            text, spec = spec, tmp_path / "tiny.toml"
            spec.write_text(text)
        changes = [f"exp_dir={tmp_path / 'runs'}", *overrides]
        capsys.readouterr()
        got = main([str(spec), "--override", *changes, *flags])
        out, err = capsys.readouterr()
        assert got == code, f"exit code {got}\n{out}\n{err}"
        try:
            path = locate(load_checked(str(spec), changes)).path
        except UserError:
            path = tmp_path / "no run"
        return Result(got, out, err, path)

    return run


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2, one line (`lines` of a list of files) and
    nothing written; returns what it says."""

    def run(*overrides: str, lines: int = 1, **options: Any) -> str:
        before = snapshot(tmp_path)
        result = command(*overrides, code=2, **options)
        assert len(result.err.splitlines()) == lines, result.err
        assert snapshot(tmp_path) == before
        return result.err

    return run


@pytest.fixture
def small_primus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest Primus has two blocks of width 48, and not twelve of 396."""
    from glovita_lib.encoder_primus import WIDTHS

    monkeypatch.setitem(WIDTHS, "S", (48, 2, 4))


# ---------------------------------------------------------------------- data


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """images/{train,val,test}/<class>/*.png of digits 0, 1 and 2, of differing sizes, and the spec
    part that reads them: see FOLDERS."""
    images, labels = digits(190)
    names = {0: "zero", 1: "one", 2: "two"}
    chosen = [i for i in range(len(labels)) if labels[i] in names]
    for place, i in enumerate(chosen):
        split = "train" if place < 30 else "val" if place < 43 else "test"
        file = tmp_path / "set" / "images" / split / names[labels[i]] / f"{i:03d}.png"
        write_png(file, images[i], side=8 + i % 5)
    return tmp_path / "set"


@pytest.fixture
def folder_spec(class_folders: Path) -> str:
    """The tiny spec on the class folders."""
    return FOLDERS.replace("ROOT", str(class_folders))


@pytest.fixture
def table_spec(tmp_path: Path) -> Callable[..., str]:
    """Writes a labels.csv over digit images and returns the tiny spec that reads it.

    Targets: "regression" (mean brightness and a constant multiple of the row sum), "multilabel"
    (odd, above four, zero). Patients of two images each; splits in a column.
    """

    def build(subtask: str, count: int = 90, **fields: str) -> str:
        images, labels = digits(count)
        folder = tmp_path / subtask
        rows = []
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            write_png(folder / "images" / f"{i:03d}.png", image)
            split = ("train", "train", "train", "val", "test")[(i // 2) % 5]
            row = {"path": f"{i:03d}.png", "split": split, "patient": f"p{i // 2}"}
            row |= {"bright": image.mean() / 16, "top": image[:4].mean() / 2}
            row |= {"odd": label % 2, "big": int(label > 4), "zero": int(label == 0)}
            rows.append(row)
        with open(folder / "labels.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        columns = ["bright", "top"] if subtask == "regression" else ["odd", "big", "zero"]
        lines = {
            "dataset": '"generic_image_dataset"',
            "data_root_dir": f'"{folder}"',
            "subtask": f'"{subtask}"',
            "split_source": '"csv"',
            "label_source": '"csv"',
            "label_column": json.dumps(columns),
            "channels": "1",
        } | fields
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        spec = TINY.replace('dataset = "digits"\ndata_fraction = 0.1\n', text)
        head = f'[model.head]\nhead_type = "{subtask}"\n' if subtask == "regression" else ""
        return spec + head

    return build
