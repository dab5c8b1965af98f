"""Published figures beside ours: runs specs over seeds or resamples, and writes the README's table.

    python benchmarks/published.py                # everything; finished runs are not run again
    python benchmarks/published.py --only kernels
    python benchmarks/published.py --table README.md

A figure is a spec with its overrides and the published value, in brackets; ours is the mean over
seeds or resamples with its standard error. An ensemble is the mean of the probabilities of all runs
of a row. Only what has run stands in the table; those of videos stand in docs/benchmarks.md.

Published: MiniRocket and MultiRocket as in the results on the UCR archive (default split, or mean
of 30 resamples), InceptionTime as in aeon's `testing/example_results_files` (resample 0).
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from glovita import main as glovita
from glovita_lib.rundir import locate
from glovita_lib.spec_check import load_checked

ROOT = Path(__file__).parent.parent
QUIET = ["task.bootstrap=0", "task.result_plot=none"]
FLOOR = (  # the network of video_playback with kernels of one frame, as its header says
    "model.encoder.kernel_sizes=[[1,3,3],[1,3,3],[1,3,3]]",
    "model.encoder.strides=[[1,2,2],[1,2,2],[1,2,2]]",
    "training.epochs=8",
)
MEAN = ("model.head.head_type=mean",)  # of the vectors that the attention of the same spec reads


@dataclass(frozen=True)
class Row:
    """A figure: what is run, and what was published."""

    group: str  # the column of the table
    data: str
    spec: str
    published: str | None
    probe: str | None = None  # the method of a probe
    overrides: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ("",)  # one override each
    together: bool = False  # whether the runs are judged as one ensemble
    values: list[float] = field(default_factory=list)


def resamples(count: int) -> tuple[str, ...]:
    """The first resamples of the archive."""
    return tuple(f"data.resample={number}" for number in range(count))


TABLES = {  # by their marks in a page
    "published": {
        "kernels": "Hydra + MultiRocket (MiniRocket)",
        "resamples": "the same, mean of 30 resamples (MultiRocket)",
        "inception": "InceptionTime, one run",
        "ensemble": "InceptionTime, ensemble of five (published)",
    },
    "published videos": {
        "clips": "3-D network",
        "frames": "the same frame by frame, their mean",
        "attention": "attention over frames, frozen image encoder",
        "mean": "the mean over these",
    },
}
COLUMNS = {group: title for columns in TABLES.values() for group, title in columns.items()}


def rows() -> list[Row]:
    """All figures of the table."""
    found = []
    seeds, five = (tuple(f"seed={number}" for number in range(count)) for count in (3, 5))
    for name, single, mean, ensemble in (
        ("GunPoint", ".993", ".998", "1.000"),
        ("ItalyPowerDemand", ".969", ".965", ".966"),
        ("ArrowHead", ".863", ".895", ".863"),
        ("BasicMotions", None, None, None),
        ("JapaneseVowels", None, None, None),
    ):
        problem, kernels = (f"data.problem={name}",), "hydra_multirocket"
        found.append(Row("kernels", name, "series_kernels", single, kernels, problem))
        if mean is not None:
            repeats = resamples(30)
            found.append(Row("resamples", name, "series_kernels", mean, kernels, problem, repeats))
        own = name == "JapaneseVowels"  # has a spec of its own
        spec, overrides = ("series_ragged", ()) if own else ("series_gunpoint", problem)
        repeats = seeds if ensemble is None else five
        found.append(Row("inception", name, spec, None, None, overrides, repeats))
        if ensemble is not None:
            of = ("ensemble", name, spec, ensemble, None, overrides)
            found.append(Row(*of, five, together=True))
    found.append(Row("clips", "playback speed", "video_playback", None, None, (), seeds))
    found.append(Row("frames", "playback speed", "video_playback", None, None, FLOOR, seeds))
    frames = "video_frames_attention"
    found.append(Row("attention", "playback speed", frames, None, None, (), seeds))
    found.append(Row("mean", "playback speed", frames, None, None, MEAN, seeds))
    return found


def spec_of(row: Row) -> str:
    """The file of its spec."""
    return str(ROOT / "specs" / f"{row.spec}.toml")


def overrides_of(row: Row, repeat: str, folder: Path) -> list[str]:
    """What a run changes in the spec."""
    return [*row.overrides, *QUIET, f"exp_dir={folder}", *([repeat] if repeat else [])]


def accuracy(file: Path, method: str | None) -> float:
    """Test accuracy in a file of metrics."""
    content = json.loads(file.read_text())
    content = content if method is None else content[method]["test"]
    return float(content["metrics"]["acc"])


def run(row: Row, repeat: str, folder: Path, *, finished: bool) -> float | None:
    """Test accuracy of one run, which is made where it is not there; None where it failed, or where
    only finished ones are asked for.
    """
    overrides = overrides_of(row, repeat, folder)
    path = locate(load_checked(spec_of(row), overrides)).path
    file = path / ("metrics_test.json" if row.probe is None else "metrics_probe.json")
    made = [spec_of(row), "--override", *overrides]
    if not file.is_file() and (finished or glovita(made) != 0):
        return None
    return accuracy(file, row.probe)


def judge_together(row: Row, folder: Path, *, finished: bool) -> float | None:
    """Test accuracy of the mean of all runs of a row, which are made where they are not there."""
    checkpoints = []
    for repeat in row.repeats:
        if run(row, repeat, folder, finished=finished) is None:
            return None
        path = locate(load_checked(spec_of(row), overrides_of(row, repeat, folder))).path
        checkpoints.append(str(path / "checkpoints" / "last.pt"))
    overrides = [
        *overrides_of(row, f"name={row.spec}_{row.data}_{len(checkpoints)}", folder),
        "mode=infer",
        f"infer.checkpoint={json.dumps(checkpoints)}",
    ]
    file = locate(load_checked(spec_of(row), overrides)).path / "infer" / "metrics_test.json"
    if not file.is_file() and glovita([spec_of(row), "--override", *overrides]) != 0:
        return None
    return accuracy(file, row.probe)


def shown(value: float) -> str:
    """A share with three digits, as the published tables write it."""
    return f"{value:.3f}".removeprefix("0")


def cell(row: Row) -> str:
    """Ours, with its standard error and the number of runs, and the published value."""
    mean, count = statistics.fmean(row.values), len(row.values)
    error = f" +- {shown(statistics.stdev(row.values) / count**0.5)}" if count > 1 else ""
    return f"{shown(mean)}{error}" + ("" if row.published is None else f" ({row.published})")


def table(done: list[Row], columns: dict[str, str]) -> str:
    """A table of the figures that have run: a line a data set."""
    cells = {(row.data, row.group): cell(row) for row in done if row.group in columns}
    columns = {
        group: title for group, title in columns.items() if any(g == group for _, g in cells)
    }
    lines = [f"| data | {' | '.join(columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for data in dict.fromkeys(data for data, _ in cells):
        lines.append(f"| {data} | {' | '.join(cells.get((data, c), '') for c in columns)} |")
    return "\n".join(lines)


def write_tables(path: Path, done: list[Row]) -> None:
    """Put the tables of the figures that have run between their marks in a page."""
    page = path.read_text(encoding="utf-8")
    for name, columns in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in page and any(row.group in columns for row in done):
            start = page.index(begin) + len(begin)
            page = f"{page[:start]}\n{table(done, columns)}\n{page[page.index(end) :]}"
    path.write_text(page, encoding="utf-8")


def main() -> None:
    """Run the rows and write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("published"), help="where the runs go"
    )
    parser.add_argument("--only", choices=[*COLUMNS], help="a column")
    parser.add_argument("--finished", action="store_true", help="start nothing, read what has run")
    parser.add_argument("--table", type=Path, help="page whose table is replaced")
    asked = parser.parse_args()
    done = []
    for row in rows():
        if asked.only in (None, row.group):
            how = {"folder": asked.folder, "finished": asked.finished}
            if row.together:
                found = [judge_together(row, **how)]
            else:
                found = [run(row, repeat, **how) for repeat in row.repeats]
            row.values.extend(value for value in found if value is not None)
            if row.values:
                done.append(row)
                print(row.data, COLUMNS[row.group], cell(row), file=sys.stderr, flush=True)
    for columns in TABLES.values():
        if any(row.group in columns for row in done):
            print(table(done, columns))
    if asked.table is not None:
        write_tables(asked.table, done)


if __name__ == "__main__":
    main()
