"""Points of a plane as one HTML file that needs no network: zoom, search, classes, thumbnails.

N samples.
"""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.coloring import MARKERS, STYLES, UNKNOWN, Coloring, style
from glovita_lib.files import write_text
from glovita_lib.loaders import cores
from glovita_lib.plot_projection import Text
from glovita_lib.projection_source import Images
from glovita_lib.sheets import displayed, window

PAGE = Path(__file__).with_name("projection_page.html")  # style and program, without the data
SHEET = 2048  # pixels of the longest side of a sheet of thumbnails; every browser decodes it
QUALITY = 80  # of JPEG
SCALE = 24  # colours of a scale of numbers


def write_page(
    path: Path,
    points: np.ndarray,
    *,
    ids: Sequence[str],
    colorings: Sequence[Coloring],
    text: Text,
    images: Images | None,
    thumbnail: int,
) -> None:
    """The points (N, 2) as a page with everything inside.

    Args:
        path: of the HTML file.
        ids: N ids.
        colorings: all that can be chosen; the first one is shown.
        images: image (C, H, W) of a sample, uint8 or uint16.
        thumbnail: longer side of a thumbnail, pixels; 0 makes none.
    """
    content = {
        "title": text.title,
        "axes": list(text.axes),
        "x": compact(points[:, 0]),
        "y": compact(points[:, 1]),
        "ids": list(ids),
        "colorings": [described(coloring) for coloring in colorings],
        "styles": [style(i) for i in range(STYLES)],
        "markers": list(MARKERS),
        "unknown": UNKNOWN,
        "scale": scale(),
        "thumbnails": None,
    }
    if images is not None and thumbnail and len(ids):
        content["thumbnails"] = thumbnails(images, len(ids), thumbnail)
    parts = {
        "title": escape(text.title),
        "subtitle": escape(text.subtitle),
        "data": as_script(content),
    }
    write_text(path, re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], PAGE.read_text("utf-8")))


def as_script(content: Any) -> str:
    """JSON that no text in it can break out of a script element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def compact(values: np.ndarray) -> list[float | None]:
    """Numbers with 5 digits, which is finer than a screen; None where they are not known."""
    return [None if np.isnan(value) else float(f"{value:.5g}") for value in values]


def described(coloring: Coloring) -> dict[str, Any]:
    """A property of the samples as the page reads it."""
    return {
        "title": coloring.title,
        "names": list(coloring.names),
        "codes": coloring.codes.tolist() if coloring.values is None else None,
        "values": None if coloring.values is None else compact(coloring.values),
    }


def scale() -> list[str]:
    """Colours of rising numbers, those of the picture."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 1, SCALE))]


# ---------------------------------------------------------------------- thumbnails


def thumbnails(image: Images, count: int, side: int) -> dict[str, Any]:
    """Images (C, H, W), side by side on as few sheets as a browser decodes safely.

    Images that are already small are kept exactly (PNG), others are shrunk (JPEG).
    """
    from PIL import Image

    with ThreadPoolExecutor(cores()) as pool:  # decoding and shrinking need no interpreter
        small = list(pool.map(lambda i: shrunk(image(i), side), range(count)))
    cell = max(max(picture.size) for picture, _ in small)
    columns = max(1, min(SHEET // cell, math.ceil(math.sqrt(count))))
    a_sheet = columns * (SHEET // cell)
    exact = all(whole for _, whole in small)
    sheets = []
    for first in range(0, count, a_sheet):
        part = small[first : first + a_sheet]
        sheet = Image.new("RGB", (columns * cell, -(-len(part) // columns) * cell), "white")
        for i, (picture, _) in enumerate(part):
            left = (i % columns) * cell + (cell - picture.width) // 2
            sheet.paste(picture, (left, (i // columns) * cell + (cell - picture.height) // 2))
        sheets.append(encoded(sheet, exact=exact))
    return {"sheets": sheets, "cell": cell, "columns": columns, "perSheet": a_sheet}


def shrunk(image: np.ndarray, side: int) -> tuple[Any, bool]:
    """An image as it is displayed, whole, at most `side` pixels high and wide; whether it already
    was."""
    from PIL import Image

    low, high = window(image, 8 if image.dtype == np.uint8 else 16)
    picture = Image.fromarray(displayed(image, low, high))
    if max(picture.size) <= side:
        return picture, True
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return picture, False


def encoded(sheet: Any, *, exact: bool) -> str:
    """A sheet as a data URL; grey ones without colours."""
    if exact and all(band.tobytes() == sheet.getchannel(0).tobytes() for band in sheet.split()):
        sheet = sheet.convert("L")
    content = io.BytesIO()
    if exact:
        sheet.save(content, "PNG", optimize=True)
    else:
        sheet.save(content, "JPEG", quality=QUALITY)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
