"""What a run writes, with random ids, names and numbers, as others read it: Python's csv and json,
pandas, h5py and JavaScript."""

import csv
import json
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from glovita_lib import files
from glovita_lib.errors import CONTROL
from glovita_lib.metrics import metrics_report
from glovita_lib.metrics_classification import Scores
from glovita_lib.prediction_files import MOST_COLUMNS, write_prediction_files

# Comma, quotes, formulas, what means missing, other scripts, surrogate pairs, byte-order marks,
# line separators of Unicode, spaces around: all that the gate of names lets pass.
PARTS = [
    ",", ";", '"', '""', "'", "\\", "/", "=1+1", "NA", "nan", "null", "true", "007", "1e5", "-",
    "\u00fc", "u\u0308", "\u732b", "\U0001f415", "\ufeff", "\u2028", "\u2029", "\x85", "\xa0",
    "\u200f", " ",
    "</script>", "<!--", "{{x}}", "$x$", "#", "%", "a", "B", "\u0663",
]  # fmt: skip
NUMBERS = [0.0, -0.0, 0.1, 1 / 3, 5e-324, 2.2e-308, 1.7976931348623157e308, -1e22, 20240101.5]
NUMBERS += [1e-7, 123456789.123456, 2.0**53 + 2, 1 + 2**-52, 1e16, 123456.7890123, -3e-5]
WIDE = [*NUMBERS, np.nan, np.inf, -np.inf]

JAVASCRIPT = r"""
const fs = require("fs");
function parse(text) {  // RFC 4180
  const rows = [[]];
  let cell = "", quoted = false;
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (quoted) {
      if (c !== '"') cell += c;
      else if (text[i + 1] === '"') { cell += c; i++; }
      else quoted = false;
    } else if (c === '"') quoted = true;
    else if (c === "," || c === "\n") {
      rows.at(-1).push(cell);
      cell = "";
      if (c === "\n") rows.push([]);
    } else cell += c;
  }
  rows.pop();
  return rows;
}
const bits = value => {
  const bytes = Buffer.alloc(8);
  bytes.writeDoubleBE(value);
  return bytes.toString("hex");
};
const numbers = value =>
  typeof value === "number" ? { bits: bits(value) }
  : Array.isArray(value) ? value.map(numbers)
  : value && typeof value === "object"
    ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, numbers(v)]))
  : value;
const found = process.argv.slice(1).map(path => {
  const text = fs.readFileSync(path, "utf8");
  return path.endsWith(".csv") ? parse(text) : numbers(JSON.parse(text));
});
console.log(JSON.stringify(found));
"""


def random_names(rng: np.random.Generator, count: int) -> list[str]:
    """Different texts of one to five parts."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(PARTS, rng.integers(1, 6)).tolist())] = None
    assert not any(map(CONTROL.search, found)) and "" not in found
    return list(found)


def javascript(*paths: Path) -> list:
    """Files as a JavaScript program has them."""
    command = ["node", "-e", JAVASCRIPT, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return json.loads(done.stdout.decode())


def bits(value: float) -> str:
    """A number as the bits of its double; all that is no number is one."""
    return "nan" if value != value else struct.pack(">d", value).hex()


def case(seed: int, subtask: str, k: int) -> SimpleNamespace:
    """Samples with random ids and names and, of a regression, numbers of all sizes."""
    rng = np.random.default_rng(seed)
    n = 12
    ids, names = random_names(rng, n), random_names(rng, k)
    if subtask == "regression":
        values, targets = rng.choice(WIDE, (n, k)), rng.choice(NUMBERS, (n, k))
        return SimpleNamespace(ids=ids, names=names, targets=targets, scores=Scores(values))
    logits = (rng.normal(size=(n, k)) * rng.choice([1, 50, 900], (n, 1))).astype(np.float32)
    targets = rng.integers(0, k, n)
    if subtask == "multilabel":
        targets = (rng.random((n, k)) < 0.5).astype(float)
    scores = Scores.of_logits(logits, subtask)
    return SimpleNamespace(ids=ids, names=names, targets=targets, scores=scores)


def expected(given: SimpleNamespace, subtask: str) -> dict[str, list]:
    """Texts and numbers by column of a table that holds all scores."""
    names, values = np.array(given.names, object), given.scores.values
    columns: dict[str, list] = {"id": given.ids}
    if subtask == "multiclass":
        columns["label"] = names[given.targets].tolist()
        columns["prediction"] = names[values.argmax(1)].tolist()
    shown = values >= 0.5 if subtask == "multilabel" else values
    for k, name in enumerate(given.names):
        if subtask != "multiclass":
            columns[f"label_{name}"] = given.targets[:, k].astype(float).tolist()
            columns[f"prediction_{name}"] = shown[:, k].astype(float).tolist()
        if subtask != "regression":
            columns[f"p_{name}"] = values[:, k].tolist()
            columns[f"logit_{name}"] = given.scores.given[:, k].astype(float).tolist()
    return columns


def equal_cells(cells: list, wanted: list) -> bool:
    """Texts as they are, numbers to the last bit."""
    if isinstance(wanted[0], str):
        return cells == wanted
    return [bits(float(cell)) for cell in cells] == [bits(value) for value in wanted]


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("seed", range(6))
def test_predictions_read_back_equal(tmp_path: Path, subtask: str, seed: int) -> None:
    given, path = case(seed, subtask, 3), tmp_path / "p.csv"
    kind = {"subtask": subtask, "class_names": given.names}
    write_prediction_files(path, ids=given.ids, targets=given.targets, scores=given.scores, **kind)
    wanted = expected(given, subtask)
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert set(header) <= wanted.keys() and len(set(header)) == len(header)
    assert {name for name in wanted if not name.startswith("logit_")} <= set(header)
    tables = [dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))]
    pandas = pytest.importorskip("pandas")
    read = pandas.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    tables.append({name: read[name].tolist() for name in header})
    numbers = [name for name in header if not isinstance(wanted[name][0], str)]
    precise = {"float_precision": "round_trip"} if pandas.__version__ < "3.1" else {}
    read = pandas.read_csv(path, usecols=numbers, **precise)
    for name in numbers:
        assert equal_cells(read[name].tolist(), wanted[name]), name
    if shutil.which("node"):
        (first, *others) = javascript(path)[0]
        assert first == header
        tables.append(dict(zip(header, map(list, zip(*others, strict=True)), strict=True)))
    for table in tables:
        assert all(equal_cells(table[name], wanted[name]) for name in header)


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_many_classes_read_back_equal(tmp_path: Path, subtask: str, seed: int) -> None:
    given, path = case(seed, subtask, MOST_COLUMNS + 1), tmp_path / "p.csv"
    kind = {"subtask": subtask, "class_names": given.names}
    write_prediction_files(path, ids=given.ids, targets=given.targets, scores=given.scores, **kind)
    with h5py.File(path.with_suffix(".h5")) as file:
        assert file["ids"].asstr()[:].tolist() == given.ids
        assert file["class_names"].asstr()[:].tolist() == given.names
        assert np.array_equal(file["logits"][:], given.scores.given)
        assert np.array_equal(file["labels"][:], given.targets)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == given.ids
    if shutil.which("node"):
        header, *others = javascript(path)[0]
        assert [dict(zip(header, row, strict=True)) for row in others] == rows
    for row, values in zip(rows, given.scores.values, strict=True):
        assert {row[f"top{place}"] for place in range(1, 6)} <= set(given.names)
        if subtask == "multiclass":
            assert row["prediction"] == given.names[values.argmax()]
            assert float(row["probability"]) == values.max()
        else:
            assert set(json.loads(row["prediction"])) <= set(given.names)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_and_logs_read_back_equal(tmp_path: Path, seed: int) -> None:
    given = case(seed, "regression", 3)
    given.scores = Scores(np.nan_to_num(given.scores.values, nan=0.5, posinf=3.0, neginf=-1.0))
    with np.errstate(all="ignore"):
        report = metrics_report(
            ("mae", "mse", "r2"),
            subtask="regression",
            targets=given.targets,
            scores=given.scores,
            class_names=tuple(given.names),
            bootstrap=5,
            seed=0,
        )
    record = {f"val_{name}": value for name, value in zip(given.names, WIDE[seed:], strict=False)}
    files.write_json(tmp_path / "metrics.json", report)
    files.append_jsonl(tmp_path / "log.jsonl", record)
    (line,) = files.read_jsonl(tmp_path / "log.jsonl")
    known = {key: value if np.isfinite(value) else None for key, value in record.items()}
    assert line == known and files.read_json(tmp_path / "metrics.json") == report
    assert report["class_names"] == given.names and report["per_class"].keys() == set(given.names)
    if not shutil.which("node"):
        return
    (tmp_path / "log.json").write_bytes((tmp_path / "log.jsonl").read_bytes())

    def as_bits(value):
        if isinstance(value, dict):
            return {key: as_bits(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [as_bits(entry) for entry in value]
        return {"bits": bits(value)} if isinstance(value, int | float) else value

    found = javascript(tmp_path / "metrics.json", tmp_path / "log.json")
    assert found == [as_bits(report), as_bits(known)]
