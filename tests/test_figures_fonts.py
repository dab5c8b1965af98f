"""Fonts of figures: what the usual font lacks comes from installed ones, the rest is said."""

import logging
from pathlib import Path

import numpy as np
import pytest
from matplotlib.font_manager import findfont, get_font
from PIL import Image

from glovita_lib import figures
from glovita_lib.figures import drawing, drawn_by, families_for, installed_fonts
from glovita_lib.plots import confusion_matrix

UNASSIGNED = "\U000e1234"  # no font has it


def rare_character(family: str) -> str:
    """One that a family which comes with matplotlib has and the usual one lacks."""
    path, usual = (findfont(name) for name in (family, "DejaVu Sans"))
    codes = sorted(set(get_font(path).get_charmap()) - set(get_font(usual).get_charmap()))
    return next(c for c in map(chr, codes) if drawn_by(path, frozenset(c)))


def pixels(path: Path, text: str) -> np.ndarray:
    with drawing(path, 2, 1) as figure:
        figure.text(0.3, 0.4, text, fontsize=20)
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


@pytest.fixture(autouse=True)
def first_time(monkeypatch):
    """As in a process that has said nothing yet."""
    monkeypatch.setattr(figures, "UNDRAWN", set())
    families_for.cache_clear()
    yield
    families_for.cache_clear()


@pytest.mark.parametrize("family", ["STIXGeneral", "STIXNonUnicode"])
def test_characters_come_from_the_font_that_has_them(
    tmp_path: Path, capsys, caplog, family
) -> None:
    rare = rare_character(family)
    assert families_for(frozenset(f"a{rare}"))  # this family, or another one that is installed
    drawn, box = (pixels(tmp_path / "p.png", f"a{c}") for c in (rare, UNASSIGNED))
    assert drawn.shape != box.shape or (drawn != box).any()
    err = capsys.readouterr().err
    assert repr(rare)[1:-1] not in err.partition("no installed")[2].partition(";")[0]
    assert err.count("note") == 1  # of the other one
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_all_texts_of_a_figure_are_drawn(tmp_path: Path, capsys) -> None:
    """Names at axes, in titles and legends; also in SVG and before the layout is measured."""
    rare = rare_character("STIXGeneral")
    with drawing(tmp_path / "p.png", 3, 3) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], label=rare)
        axes.set_xticks([0, 1], [rare, "b"])
        axes.set_title(rare)
        axes.legend()
        figures.save_figure(figure, tmp_path / "p.svg", "svg", {"Date": None})
    assert capsys.readouterr().err == ""


def test_what_no_font_has_is_said_once_and_names_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(figures, "installed_fonts", list)
    names = ("猫", "犬 big", "plain")
    confusion_matrix(np.eye(3, dtype=int) * 5, names, tmp_path / "c.png")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "猫" in err and "犬 big" in err and "install" in err
    assert "plain" not in err and "Glyph" not in err
    confusion_matrix(np.eye(3, dtype=int) * 5, names, tmp_path / "again.png")
    assert capsys.readouterr().err == ""
    confusion_matrix(np.eye(2, dtype=int) * 5, ("猫", "鳥"), tmp_path / "more.png")
    assert "鳥" in capsys.readouterr().err


def test_installed_fonts_are_files_and_preferred_ones_come_first(monkeypatch, tmp_path) -> None:
    found = installed_fonts()
    assert all(Path(path).exists() for _, path in found) and dict(found)["DejaVu Sans"]
    monkeypatch.setattr(figures, "FAMILIES", ("STIXGeneral",))
    installed_fonts.cache_clear()
    try:
        assert installed_fonts()[0][0] == "STIXGeneral"
    finally:
        installed_fonts.cache_clear()
    damaged = tmp_path / "x.ttf"
    damaged.write_bytes(b"no font")
    assert drawn_by(str(damaged), frozenset("a")) == set()
