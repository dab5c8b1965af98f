"""What is noted about the data is shown, and stands in the files, in every mode and objective."""

import json
from functools import partial

import h5py
import numpy as np
import pytest

BROKEN = [f"broken{number}.png" for number in range(25)]
IMAGES = "25 images left out:"


@pytest.fixture
def broken_spec(folder_spec, class_folders):
    """A spec of class folders with test images that cannot be read and may be left out."""
    for name in BROKEN:
        (class_folders / "images" / "test" / "zero" / name).write_bytes(b"no image")
    strict = 'split_source = "subdirs"\n'
    return folder_spec.replace(strict, f"{strict}strict = false\n")


def check(out, text, line):
    """A line was shown as a note once, and stands in a file; of many images the first."""
    assert out.count(f"  note: {line}") == 1, out
    assert line in text
    if line == IMAGES:
        assert all(f"/{name}: " in text for name in BROKEN)
        assert sum(f"/{name}: " in out for name in BROKEN) == 20
        assert out.count("  ... and 5 more, all in ") == 1


def check_dry(out):
    """A dry run, which writes nothing, shows all images."""
    assert out.count(IMAGES) == 1 and all(f"/{name}: " in out for name in BROKEN)


def test_modes_of_a_model(command, broken_spec, tmp_path):
    broken = partial(command, spec=broken_spec)
    check_dry(broken(flags=["--dry-run"]).out)
    run = broken()
    check(run.out, (run.path / "notes.txt").read_text(), IMAGES)
    assert f"all in {run.path / 'notes.txt'}" in run.out
    asked = ["mode=infer", f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}"]
    for changes in (["mode=infer"], [*asked, f"infer.output_dir={tmp_path / 'out'}"]):
        check_dry(broken(*changes, flags=["--dry-run"]).out)
        told = broken(*changes)
        folder = tmp_path / "out" if "infer.checkpoint" in str(changes) else run.path / "infer"
        check(told.out, (folder / "notes_test.txt").read_text(), IMAGES)
        assert f"all in {folder / 'notes_test.txt'}" in told.out
    told = broken("mode=extract", "extract.split=test", f"extract.output_dir={tmp_path / 'h5'}")
    (path,) = (tmp_path / "h5").glob("*.h5")
    with h5py.File(path) as file:
        check(told.out, "\n".join(file["notes"].asstr()), IMAGES)
    umap = ["mode=umap", "umap.method=pca", "umap.split=test"]
    check_dry(broken(*umap, flags=["--dry-run"]).out)
    told = broken(*umap)
    (path,) = (run.path / "umap").glob("*.json")
    check(told.out, "\n".join(json.loads(path.read_text())["notes"]), IMAGES)


def test_notes_go_where_there_is_nothing_to_note(command, broken_spec, class_folders):
    run = command(spec=broken_spec)
    command("mode=infer", spec=broken_spec)
    for name in BROKEN:
        (class_folders / "images" / "test" / "zero" / name).unlink()
    command("mode=infer", spec=broken_spec)
    assert not list((run.path / "infer").glob("notes*"))
    command("training.on_existing=overwrite", spec=broken_spec)
    assert not (run.path / "notes.txt").exists()


@pytest.mark.parametrize("kind", ["features", "series"])
def test_probes(command, tmp_path, kind):
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    values = rng.normal(size=(30, 12)) + 3 * np.sin(np.arange(12) * (labels[:, None] + 1))
    if kind == "features":
        for name, rows in {"train": slice(0, 20), "val": slice(20, 30)}.items():
            with h5py.File(tmp_path / f"{name}.h5", "w") as file:
                file["features"], file["labels"] = values[rows], labels[rows] % 2
                file.attrs["class_names"] = ["a", "b", "c"]
        line, head = "classes without a training sample: c", 'dataset = "precomputed_features"'
        files = [f'{n}_features_file = "{tmp_path / n}.h5"' for n in ("train", "val")]
        task = 'methods = ["knn"]\nk = [1]\n[model.encoder]\nencoder_type = "precomputed"'
    else:
        for name, rows in {"train": range(20), "test": range(20, 30)}.items():
            lines = [f"{labels[i]}\t" + "\t".join(map(str, values[i])) for i in rows]
            if name == "test":
                lines.append("1\t" + "\t".join(["7"] * 12))
            (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
        line, head = "1 sample left out:", 'dataset = "generic_series_dataset"\nstrict = false'
        files = [f'{n}_file = "{tmp_path / n}.tsv"' for n in ("train", "test")]
        task = 'methods = ["minirocket"]'
    spec = "\n".join([
        "[data]", head, *files, "[task]", 'objective = "probe"', 'result_plot = "none"',
        "bootstrap = 0", task, "[logger]", 'backend = "none"',
    ])  # fmt: skip
    assert command(spec=spec, flags=["--dry-run"]).out.count(f"note: {line}") == 1
    run = command(spec=spec)
    check(run.out, (run.path / "notes.txt").read_text(), line)
