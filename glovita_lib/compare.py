"""Finished runs side by side: what each reached, with how much, how fast."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from glovita_lib.files import read_json, read_jsonl
from glovita_lib.rundir import RunDir, locate
from glovita_lib.spec import Loaded, UserError

COLUMNS = ("spec", "result", "95 % interval", "trainable", "share", "ms/step", "MiB", "best epoch")


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in the table."""

    name: str
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    trainable: int
    share: float
    step_ms: float
    memory_mb: float
    best_epoch: int | None

    def cells(self) -> list[str]:
        """Texts of the columns."""
        low_high = "" if self.interval is None else "{:.4f} to {:.4f}".format(*self.interval)
        return [
            self.name,
            "undefined" if self.value is None else f"{self.value:.4f}",
            low_high,
            f"{self.trainable:,}",
            f"{self.share:.2%}",
            f"{self.step_ms:.1f}",
            f"{self.memory_mb:,.0f}",
            "" if self.best_epoch is None else str(self.best_epoch + 1),
        ]


def compare(specs: list[Loaded]) -> str:
    """A table of the runs of several specs, best first, as Markdown.

    Raises:
        UserError: a run that is not finished, or runs that report different metrics.
    """
    entries, missing = [], []
    for loaded in specs:
        run = locate(loaded)
        if run.is_finished and run.metrics.is_file():
            entries.append(entry_of(Path(loaded.path).stem, run))
        else:
            missing.append(f"{loaded.path}: no finished run in {run.path}; train it first")
    metrics = sorted({entry.metric for entry in entries})
    if len(metrics) > 1:
        missing.append(f"the runs report different metrics first ({', '.join(metrics)})")
    if missing:
        raise UserError("\n".join(missing))
    from glovita_lib.metric_names import lower_is_better

    name = metrics[0].partition(" ")[2]
    sign = 1 if lower_is_better(name) else -1
    entries.sort(key=lambda e: (e.value is None, sign * (e.value or 0.0)))
    header = [COLUMNS[0], metrics[0], *COLUMNS[2:]]
    return table([header, *(entry.cells() for entry in entries)])


def entry_of(name: str, run: RunDir) -> Entry:
    """What a run directory says."""
    split = "test" if run.metrics_of("test").is_file() else "val"
    report: dict[str, Any] = read_json(run.metrics_of(split))
    metric, value = next(iter(report["metrics"].items()))
    interval = report["ci95"].get(metric)
    everything = read_json(run.resolved_config)["parameters"]["all"]
    epochs = [record for record in read_jsonl(run.metrics) if record["event"] == "epoch"]
    batch = read_json(run.config)["dataloading"]["batch_size"]
    batch *= read_json(run.config)["training"]["gradient_accumulation_steps"]
    batch *= read_json(run.runtime_info)["world_size"]
    return Entry(
        name=name,
        metric=f"{split} {metric}",
        value=value,
        interval=None if interval is None or None in interval else tuple(interval),
        trainable=everything["trainable"],
        share=everything["share"],
        step_ms=1000 * batch / median(record["samples_per_s"] for record in epochs),
        memory_mb=max(record["memory_mb"] for record in epochs),
        best_epoch=epochs[-1]["best_epoch"],
    )


def table(rows: list[list[str]]) -> str:
    """Rows, the first one the header, as an aligned Markdown table; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            lines.append(f"| {' | '.join(rules)} |")
    return "\n".join(lines)
