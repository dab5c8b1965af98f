"""Page and table of mode umap: what they hold reads back equal; the page in a real browser."""

import csv
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import browser
import h5py
import numpy as np
import pytest
from PIL import Image

import glovita
from glovita_lib.plot_projection import (
    SIDE,
    Coloring,
    Text,
    classes,
    color_numbers,
    coloring_data,
    digits_apart,
    draw_points,
    of_column,
    write_page,
)

SPEC = 'mode = "umap"\n[logger]\nbackend = "none"\n[umap]\nmethod = "pca"\ndpi = 50\n'
WORDS = [
    'a,b;"c"', "</script><script>x()</script>", "<!--", "猫 🐕", "e\u0301", "=1+1", "NA", "nan",
    "007", "1e5", "null", "true", "'", "\\", "{{title}}", "x\u2028y", "$x$", "a  b", "-", "٣",
]  # fmt: skip
NAMES = [word for word in WORDS if word not in ("NA", "nan", "007", "1e5", "٣")]
SIZES = [0.0, -0.0, 0.1, 1 / 3, 5e-324, 2.2e-308, 1.7976931348623157e308, -1e22, 20240101.5]
SIZES += [1e-7, 123456789.123456, 2.0**53, -(2.0**63), 1 + 2**-52, float(np.float32(0.1))]

JAVASCRIPT = """
const page = require("fs").readFileSync(process.argv[1], "utf8");
const data = JSON.parse(page.match(/id="data">([^]*?)<\\/script>/)[1]);
const bits = value => {
  if (value === null) return null;
  const bytes = Buffer.alloc(8);
  bytes.writeDoubleBE(value);
  return bytes.toString("hex");
};
const colorings = data.colorings.map(shown =>
  ({ ...shown, values: shown.values && shown.values.map(bits) }));
console.log(JSON.stringify({ ids: data.ids, x: data.x.map(bits), y: data.y.map(bits), colorings }));
"""


def bits(value: float | None) -> str | None:
    return None if value is None else struct.pack(">d", value).hex()


def as_javascript(page: Path) -> dict:
    """The data of a page as a JavaScript program has them, numbers as the bits of their doubles."""
    if shutil.which("node") is not None:
        command = ["node", "-e", JAVASCRIPT, str(page)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)
    text = re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1]
    data = json.loads(text, parse_int=float)  # JSON.parse knows doubles alone
    colorings = [
        shown
        | {
            "values": shown["values"] and [bits(value) for value in shown["values"]],
            "codes": shown["codes"] and [int(code) for code in shown["codes"]],
        }
        for shown in data["colorings"]
    ]
    axes = {axis: [bits(value) for value in data[axis]] for axis in "xy"}
    return {"ids": data["ids"], **axes, "colorings": colorings}


def drawn(tmp_path: Path, ids: list[str], labels: list, column: list[str]) -> Path:
    """Path without suffix of the results of mode umap for such samples."""
    rng = np.random.default_rng(len(ids))
    features, colors = tmp_path / "v.h5", tmp_path / "colors.csv"
    with h5py.File(features, "w") as file:
        file["features"] = rng.normal(size=(len(ids), 4)).astype(np.float32)
        file["ids"], file["labels"] = ids, labels
    with open(colors, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "extra"), *zip(ids, column, strict=True)])
    spec = tmp_path / "map.toml"
    spec.write_text(SPEC)
    chosen = [f"umap.input={features}", f"umap.color_file={colors}", "umap.color_column=extra"]
    assert glovita.main([str(spec), "--override", f"exp_dir={tmp_path}", *chosen]) == 0
    return tmp_path / "umap_plots" / "v" / "pca"


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def random_ids(count: int) -> list[str]:
    rng = np.random.default_rng(3)
    return [f"{WORDS[rng.integers(len(WORDS))]}{i}{WORDS[i % len(WORDS)]}" for i in range(count)]


@pytest.mark.processes
def test_ids_names_and_columns_of_numbers_read_back_equal(tmp_path: Path) -> None:
    ids = random_ids(60)
    names = [NAMES[i % len(NAMES)] for i in range(60)]
    numbers = [repr(SIZES[i % len(SIZES)]) for i in range(60)]
    numbers[7::9] = ["", "nan", "inf", "", "NaN", "-inf"]
    stem = drawn(tmp_path, ids, names, numbers)
    rows, page = table(stem.with_suffix(".csv")), as_javascript(stem.with_suffix(".html"))
    known = [text if "n" not in text.lower() else "" for text in numbers]
    assert [row["id"] for row in rows] == page["ids"] == ids
    composed = ["\u00e9" if name == "e\u0301" else name for name in names]
    label, extra = page["colorings"]
    shown = [label["names"][code] for code in label["codes"]]
    assert [row["label"] for row in rows] == shown and shown in (names, composed)
    assert [row["extra"] for row in rows] == known
    texts = extra["texts"] or known
    assert texts == known
    assert extra["values"] == [bits(float(text)) if text else None for text in known]
    for axis in "xy":  # of float32, in the digits that float32 has
        assert page[axis] == [bits(float(row[axis])) for row in rows]


@pytest.mark.processes
def test_numbers_of_regression_read_back_equal(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=40) * 10.0 ** rng.integers(-30, 30, 40)
    whole = [str(1_700_000_000_123_456_789 + 3 * i) for i in range(40)]
    stem = drawn(tmp_path, [f"{i}" for i in range(40)], values.tolist(), whole)
    rows, page = table(stem.with_suffix(".csv")), as_javascript(stem.with_suffix(".html"))
    assert [float(row["label"]) for row in rows] == values.tolist()
    assert [row["extra"] for row in rows] == whole  # also those that no float64 holds
    label, extra = page["colorings"]
    assert label["values"] == [bits(value) for value in values] and extra["texts"] == whole
    assert extra["values"] == [bits(3.0 * i) for i in range(40)]  # what the colours follow


@pytest.mark.processes
def test_pandas_reads_the_table_back_equal(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    ids, numbers = random_ids(45), [repr(SIZES[i % len(SIZES)]) for i in range(45)]
    numbers[4::11] = [""] * 4
    stem = drawn(tmp_path, ids, [WORDS[i % 3] for i in range(45)], numbers)
    texts = pandas.read_csv(stem.with_suffix(".csv"), dtype=str, keep_default_na=False)
    assert texts["id"].tolist() == ids and texts["extra"].tolist() == numbers
    precise = {"float_precision": "round_trip"} if pandas.__version__ < "3.1" else {}
    read = pandas.read_csv(stem.with_suffix(".csv"), **precise)
    expected = np.array([float(text or "nan") for text in numbers])
    np.testing.assert_array_equal(read["extra"].to_numpy(float), expected)


# ---------------------------------------------------------------------- digits and colours


@pytest.mark.parametrize(
    "values",
    [
        20240101.0 + np.arange(31),
        1.7e9 + np.arange(100),
        1e15 + np.arange(30) / 8,
        1 + np.arange(30) * 2.0**-52,
        np.arange(30) * 5e-324,
        np.linspace(-1, 1, 30) * 1.7e308,
        np.array([0.1, 0.1]),
        np.array([np.pi]),
    ],
)
def test_the_page_shows_digits_that_tell_values_apart(values: np.ndarray) -> None:
    digits = digits_apart(values, 5)
    shown = [float(f"{value:.{digits}g}") for value in values]
    assert len(set(shown)) == len(set(values.tolist())) and 5 <= digits <= 17
    half = np.ptp(values / 2)
    assert np.abs(np.array(shown) / 2 - values / 2).max() <= half / 1000
    if digits > 5:
        fewer = [float(f"{value:.{digits - 1}g}") for value in values]
        moved = np.abs(np.array(fewer) / 2 - values / 2).max()
        assert len(set(fewer)) < len(set(shown)) or moved > half / 1000


@pytest.mark.parametrize(
    ("cells", "first", "last"),
    [
        ([f"{20240101 + i}" for i in range(31)], 20240101, 20240131),
        ([f"{1_700_000_000_123_456_789 + i}" for i in range(31)], *[None] * 2),
        ([repr(1e300 * i) for i in range(31)], 0, 3e301),
        ([repr(1.1e307 * (i - 15)) for i in range(31)], -1.65e308, 1.65e308),
    ],
)
def test_colours_go_over_the_range_of_large_numbers(tmp_path: Path, cells, first, last) -> None:
    """The picture of a row of points has the whole scale from left to right, with its texts."""
    colors = tmp_path / "c.csv"
    colors.write_text("id,v\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    coloring = of_column(colors, "v", [(str(i),) for i in range(len(cells))])
    points = np.stack([np.arange(31.0), np.zeros(31)], 1)
    png, svg = tmp_path / "p.png", tmp_path / "p.svg"
    draw_points(points, coloring, Text("t", "s", ("", "")), png=png, svg=svg, dpi=80, point_size=6)
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    part = pixels[:, : int(80 * (SIDE + 0.12))]
    coloured = np.ptp(part, axis=2) > 40  # neither paper nor frame
    middle = np.bincount(np.nonzero(coloured)[0]).argmax()
    row = [tuple(part[middle, x]) for x in np.flatnonzero(coloured[middle])]
    first_dot, last_dot = np.array(row[:6]), np.array(row[-6:])  # with their soft edges
    assert first_dot[:, 1].min() < 40 and last_dot[:, 2].min() < 80  # violet, then yellow
    data = coloring_data(coloring)
    ordered = sorted(data["values"])
    assert len(set(ordered)) == 31 and data["values"] == ordered
    if first is not None:
        assert [ordered[0], ordered[-1]] == pytest.approx([first, last])


def test_few_long_integers_are_classes_with_all_digits(tmp_path: Path) -> None:
    colors = tmp_path / "c.csv"
    cells = [str(2**60 + i % 3) for i in range(9)]
    colors.write_text("id,v\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    coloring = of_column(colors, "v", [(str(i),) for i in range(9)])
    assert coloring.names == tuple(str(2**60 + i) for i in range(3)) and coloring.words() == cells


# ---------------------------------------------------------------------- in a browser

FRAMES = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r))).then(() => 1)"
COUNTED = """(() => {
  const kind = CanvasRenderingContext2D.prototype, fill = kind.fill;
  window.fills = 0;
  kind.fill = function () { window.fills += 1; return fill.call(this) };
})()"""
CARD = """[...document.querySelectorAll("#card div")].map(line => line.textContent)"""
INK = """(() => {
  const canvas = document.getElementById("NAME"), { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  let n = 0;
  for (let i = 3; i < pixels.length; i += 4) n += pixels[i] > 0;
  return n;
})()"""


def type_in(page: browser.Page, text: str) -> None:
    page.run(f"""(() => {{
        const find = document.getElementById("find");
        find.value = {json.dumps(text)};
        find.dispatchEvent(new Event("input"));
    }})()""")


@pytest.mark.processes
@pytest.mark.skipif(browser.PROGRAM is None, reason="needs Chromium or Chrome")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No complaint of the console, no request; the pointer and the search redraw few points."""
    count, rng = 3000, np.random.default_rng(0)
    points = rng.normal(size=(count, 2)).astype(np.float32)
    ids = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(count)]
    dates = 20240101.0 + rng.integers(0, 31, count)
    colorings: list[Coloring] = [
        classes("label", rng.integers(0, 3, count), WORDS[:3]),
        color_numbers("date", np.where(np.arange(count) % 50 == 0, np.nan, dates)),
    ]
    write_page(
        tmp_path / "page.html",
        points,
        ids=ids,
        colorings=colorings,
        text=Text("</title><i>", "sub", ("", "")),
        images=lambda i: np.full((1, 8, 8), i % 250, np.uint8),
        thumbnail=8,
    )
    with browser.opened(tmp_path) as page:
        page.open(tmp_path / "page.html")
        page.run(FRAMES)
        assert page.run(INK.replace("NAME", "plot")) > 1000
        assert page.run("document.title") == "</title><i>"
        page.run(COUNTED)
        cards = set()
        for k in range(40):
            page.move(300 + 8 * k, 330)
            page.run(FRAMES)
            cards.add(tuple(page.run(CARD)))
        assert page.run("fills") == 0  # the points are not drawn again
        shown = [card for card in cards if card]
        assert len(shown) > 5
        for name, label, date in shown:
            i = ids.index(name.removeprefix("id "))
            assert label == f"label {colorings[0].words()[i]}"
            assert date == f"date {'not known' if i % 50 == 0 else int(dates[i])}"
        assert page.run(INK.replace("NAME", "ring")) > 0
        type_in(page, "299")
        matches = sum("299" in name for name in ids)
        assert page.run('document.getElementById("hint").textContent') != f"{matches} found"
        page.run("new Promise(r => setTimeout(r, 300))")
        page.run(FRAMES)
        assert page.run('document.getElementById("hint").textContent') == f"{matches} found"
        assert page.run("fills") == matches
        assert page.run(INK.replace("NAME", "front")) > 20 * matches
        type_in(page, "")
        page.run("new Promise(r => setTimeout(r, 300))")
        page.run('(() => { const by = document.getElementById("by"); by.value = "1";'
                 ' by.onchange({ target: by }) })()')  # fmt: skip
        page.run(FRAMES)
        assert page.run("fills") == count + matches
        ends = page.run('document.getElementById("ends").innerText').split()
        assert ends == ["20240101", "20240131"]
        assert page.complaints() == []
