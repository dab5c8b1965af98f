"""Adding a part to a copy of the source: what it takes, and that no list has to know it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from small_runs import TINY

REPOSITORY = Path(__file__).parent.parent


def package_with(folder: Path, edits: dict[str, tuple[str, str]]) -> Path:
    """A copy of the source in `folder` with one text edit a module: what stands there, what
    comes to stand in its place."""
    shutil.copytree(REPOSITORY / "glovita_lib", folder / "glovita_lib")
    shutil.copy(REPOSITORY / "glovita.py", folder)
    for module, (old, new) in edits.items():
        path = folder / "glovita_lib" / f"{module}.py"
        text = path.read_text()
        assert text.count(old) == 1, (module, old)
        path.write_text(text.replace(old, new))
    return folder


def glovita(folder: Path, *arguments: str) -> str:
    """What a command of the copy prints."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "glovita.py", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_metric_is_an_entry_and_a_formula(tmp_path: Path) -> None:
    """The share of wrong predictions: named in task.metrics, it picks the best checkpoint."""
    entry = '"error": Metric("error rate", ("multiclass",), lower_is_better=True),'
    formula = (
        '@formula("error", "multiclass")\n'
        "def error_rate(drawn: Resampled) -> Array:\n"
        '    """Share of the samples that are wrong."""\n'
        "    return 1 - accuracy(drawn)\n"
    )
    first = '@formula("balanced_acc", "multiclass")\n'
    folder = package_with(
        tmp_path,
        {
            "metric_names": ('    "balanced_acc": ', f'    {entry}\n    "balanced_acc": '),
            "metrics_classification": (first, f"{formula}\n\n{first}"),
        },
    )
    (folder / "tiny.toml").write_text(TINY)
    metrics = ["task.metrics=['error', 'acc']", "training.best_checkpoint_metric=val_error"]
    glovita(folder, "tiny.toml", "--override", *metrics, "optimizer.lr=0.01", "training.epochs=3")
    run = next((folder / "experiments").rglob("metrics.jsonl")).parent
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    epochs = [record for record in records if record["event"] == "epoch"]
    assert all(abs(r["val_error"] + r["val_acc"] - 1) < 1e-9 for r in epochs)
    assert epochs[-1]["best"] == min(record["val_error"] for record in epochs)
    report = json.loads((run / "metrics_test.json").read_text())["metrics"]
    assert list(report) == ["error", "acc"]
    assert '"error"' in glovita(folder, "--explain", "task.metrics")
