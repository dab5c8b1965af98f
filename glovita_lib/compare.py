"""Finished runs side by side: what each reached, with how much, how fast."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from glovita_lib.files import read_json, read_jsonl
from glovita_lib.metric_names import lower_is_better
from glovita_lib.rundir import RunDir, locate
from glovita_lib.spec import Loaded, UserError, changed_keys

NOTE = (
    "ms/step: one optimizer step, median over the epochs, evaluation left out. MiB: peak memory, on"
    " a GPU of its tensors, on a CPU of the process with its libraries."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in the table."""

    name: str
    metric: str  # split and logged name, "test Accuracy"
    value: float | None  # None: undefined on these samples
    interval: tuple[float, float] | None
    samples: int  # that were judged
    trainable: int  # parameters
    share: float  # of all parameters
    step_ms: float
    memory_mb: float
    best_epoch: int | None
    device: str

    def cells(self) -> dict[str, str]:
        """Texts of the columns."""
        low_high = "" if self.interval is None else "{:.4f} to {:.4f}".format(*self.interval)
        return {
            "spec": self.name,
            self.metric: "undefined" if self.value is None else f"{self.value:.4f}",
            "95 % interval": low_high,
            "trainable": f"{self.trainable:,}",
            "share": f"{self.share:.2%}",
            "ms/step": f"{self.step_ms:.1f}",
            "MiB": f"{self.memory_mb:,.0f}",
            "best epoch": "" if self.best_epoch is None else str(self.best_epoch + 1),
            "device": self.device,
        }


def compare(specs: list[Loaded]) -> str:
    """A table of the runs of several specs as Markdown, best first; below it what its columns mean.

    Raises:
        UserError: one line for each run that is not there, not finished or of another spec; runs
            that report different metrics.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    for loaded, name in zip(specs, names(specs), strict=True):
        run = locate(loaded)
        if problem := unfit(loaded, run):
            problems.append(f"{loaded.path}: {problem}")
        else:
            entries.append(entry_of(name, run))
    if problems:
        raise UserError("\n".join(problems))
    metrics = sorted({entry.metric for entry in entries})
    if len(metrics) > 1:
        raise UserError(
            f"the runs report different metrics first: {', '.join(metrics)}; compare those with the"
            " same task.metrics and splits"
        )
    sign = 1 if lower_is_better(metrics[0].partition(" ")[2]) else -1
    entries.sort(key=lambda e: (e.value is None, sign * (e.value or 0.0), e.trainable))
    rows = [entry.cells() for entry in entries]
    devices = sorted({entry.device for entry in entries})
    if len(devices) == 1:
        rows = [{k: v for k, v in row.items() if k != "device"} for row in rows]
    return "\n".join([table(rows), "", *notes(entries, devices)])


def names(specs: list[Loaded]) -> list[str]:
    """What the runs are called: file names, or whole paths where those are the same."""
    stems = [Path(loaded.path).stem for loaded in specs]
    many = Counter(stems)
    return [s if many[s] == 1 else o.path for s, o in zip(stems, specs, strict=True)]


def unfit(loaded: Loaded, run: RunDir) -> str | None:
    """Why a run cannot be in the table; None if it can."""
    if not run.is_finished:
        state = "is not finished" if run.last.is_file() else "does not exist"
        return f"its run {run.path} {state}; train it first"
    if changes := changed_keys(read_json(run.config), loaded.plain):
        return (
            f"{run.path} was trained with another spec: {'; '.join(changes[:8])}; undo the changes"
            " or train it again"
        )
    if not run.metrics.is_file():
        return "objective probe has no steps and no trained parameters to compare; leave it out"
    if judged_split(run) is None:
        return "its data have neither a test nor a val split; leave it out"
    return None


def judged_split(run: RunDir) -> str | None:
    """The split whose result counts: test, else val."""
    return next((name for name in ("test", "val") if run.metrics_of(name).is_file()), None)


def entry_of(name: str, run: RunDir) -> Entry:
    """What a run directory says."""
    split = judged_split(run)
    report: dict[str, Any] = read_json(run.metrics_of(split))
    metric, value = next(iter(report["metrics"].items()))
    interval = report["ci95"].get(metric)
    everything = read_json(run.resolved_config)["parameters"]["all"]
    epochs = [record for record in read_jsonl(run.metrics) if record["event"] == "epoch"]
    config, info = read_json(run.config), read_json(run.runtime_info)
    batch = config["dataloading"]["batch_size"] * info["world_size"]
    batch *= config["training"]["gradient_accumulation_steps"]
    threads = f" with {info['threads']} thread{'s'[: info['threads'] != 1]}"
    return Entry(
        name=name,
        metric=f"{split} {metric}",
        value=value,
        interval=None if interval is None or None in interval else tuple(interval),
        samples=report["n"],
        trainable=everything["trainable"],
        share=everything["share"],
        step_ms=1000 * batch / median(record["samples_per_s"] for record in epochs),
        memory_mb=max(record["memory_mb"] for record in epochs),
        best_epoch=epochs[-1]["best_epoch"],
        device=info["device"] + (threads if info["device"] == "cpu" else ""),
    )


def notes(entries: list[Entry], devices: list[str]) -> list[str]:
    """What to know about the numbers."""
    lines = [NOTE if len(devices) > 1 else f"{NOTE} Device: {devices[0]}."]
    counts = sorted({entry.samples for entry in entries})
    if len(counts) > 1:
        lines.append(f"The runs were judged on different samples: {', '.join(map(str, counts))}.")
    return lines


def table(rows: list[dict[str, str]]) -> str:
    """Rows as an aligned Markdown table; numbers to the right."""
    texts = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for cells in [texts[0], rules, *texts[1:]]:
        sides = zip(cells, widths, strict=True)
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(sides)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)
