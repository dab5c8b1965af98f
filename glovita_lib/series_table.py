"""What is read of files of time series, and which columns of CSV files are what.

C channels, T time points of a series.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.errors import UserError, ended, listed, with_all
from glovita_lib.series_preparation import (
    MISSING,
    WHOLE,
    apart,
    in_one_writing,
    numbers,
    time_numbers,
    time_problem,
)

TIME_NAME = re.compile(
    r"(date(.?time)?|time(.?(stamp|step|point|index|s|sec|ms))?|t|seconds?|frame)s?(\s*[\[(].*)?",
    re.IGNORECASE,
)
"""Names of columns that hold times, which no time point of a wide table has."""
ID_NAME = re.compile(
    r"(.*[ _.-])?u?id|subject|patient|person|sample|series|case|index", re.IGNORECASE
)
"""Names of columns that hold ids."""
GROUP_NAME = re.compile(
    r"groups?|subjects?|patients?|persons?|participant|user|animal|site|cent(er|re)|cohort"
    r"|session|visit|trial|record(ing)?|fold|split"
    r"|(subject|patient|person|case|sample)[ _.-]?(no|nr|num.*)",
    re.IGNORECASE,
)
"""Names of columns that hold what several series have in common."""
NAMELESS = re.compile(r"unnamed: \d+(\.\d+)*", re.IGNORECASE)
"""What pandas calls columns without a name, as an index, when it reads a table."""
ROW_NAME = re.compile(r"index|level_0", re.IGNORECASE)
"""What pandas calls an index that it makes a column."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of CSV files."""

    id: str
    time: str
    labels: tuple[str, ...]
    group: str | None
    split: str | None
    values: tuple[str, ...]  # none: all others
    points: tuple[str, ...] = ()  # time points of wide tables that a model was trained on
    resampled: bool = False  # whether series are resampled by their times

    @property
    def others(self) -> tuple[str | None, ...]:
        """All that hold no values."""
        return (self.id, self.time, *self.labels, self.group, self.split)

    def value_columns(self, path: Path, header: Sequence[str]) -> list[int]:
        """Places of the columns of the values, in the order of the spec where it names them.

        Raises:
            UserError: one that is no value by its name: without any, as an index; that of times or
                ids, where there are no others, and of ids in any wide table; or another key's but
                for capital letters.
        """
        if self.values:
            return list(map(header.index, self.values))
        if "" in header:
            cure = "drop it (index=False), or name the others in data.value_columns"
            raise UserError(
                f"{path}: column {header.index('') + 1} has no name, as an index: {cure}"
            )
        places = [place for place, name in enumerate(header) if name not in self.others]
        for name in (header[place] for place in places):
            if NAMELESS.fullmatch(name):
                cure = "drop it (index=False), name it in data.id_column or data.time_column"
                cure += ", or name the others in data.value_columns"
                raise UserError(
                    f'{path}: column "{name}" has no name but what pandas calls it, as an index:'
                    f" {cure}"
                )
        wanted = {name.lower(): name for name in self.others if name is not None}
        for name in (header[place] for place in places):
            if (meant := wanted.get(name.lower())) is not None and meant not in header:
                cure = "write it in the spec as it stands there"
                raise UserError(f'{path}: column "{name}" is "{meant}" in the spec: {cure}')
            found, cure = None, "or the columns of the values in data.value_columns"
            if self.time not in header and TIME_NAME.fullmatch(name):
                found, cure = "times", f"data.time_column (a row a time point), {cure}"
            elif not {self.id, self.time} <= set(header) and ID_NAME.fullmatch(name):
                key = "id" if self.id not in header else "group"
                found, cure = "ids", f"data.{key}_column, {cure}"
            if found is not None:
                raise UserError(f'{path}: column "{name}" seems to hold {found}: name it in {cure}')
        return places


def refuse_unlike(path: Path, names: Sequence[str]) -> None:
    """Refuse a column among the time points of a wide table that is named as ids or groups are, or
    in another way than nearly all others, which have a number in their names: it is a fact about
    the series, and may tell the label."""
    kinds = [re.sub(r"[-+]?\d+([.,]\d+)?(e[-+]?\d+)?", "0", name.lower()) for name in names]
    most, count = Counter(kinds).most_common(1)[0]
    alike = "0" in most and count >= 0.8 * len(names)
    for name, kind in zip(names, kinds, strict=True):
        if (alike and kind != most) or GROUP_NAME.fullmatch(name):
            raise UserError(
                f'{path}: column "{name}" is named unlike time points ({listed(names, 4)}): name it'
                " in data.id_column, data.group_column or data.label_column, or drop it; else name"
                " the columns of the values in data.value_columns"
            )


@dataclass(slots=True)
class SeriesTable:
    """The series of a file or folder as they are stored."""

    where: str
    ids: list[str]
    series: list[Any]
    """Arrays (C, T), NaN where a value is missing; a line of text where it cannot be used."""
    times: list[np.ndarray] | None = None
    """(T,) of each series, where the file has them: numbers or datetime64."""
    labels: list[Any] | np.ndarray | None = None
    """See data_labels.Labels."""
    groups: list[str] | None = None
    splits: list[str] | None = None
    subtask: str | None = None
    """Kind of target that the file states."""
    named: bool = False
    """Whether the ids are names, that mean the same in other files."""
    columns: tuple[str, ...] = ()
    """Names of the channels or, with a row a series, of the time points; none where a file has
    none."""
    is_wide: bool = False
    """Whether `columns` are time points."""
    notes: list[str] = field(default_factory=list)
    """What should be known of how the files are read."""


# ---------------------------------------------------------------------------------- first lines
#
# A table without a header loses its first series to it: a line of numbers is looked at.

LOOKED_AT = 50  # rows that a first line is compared with
FORM = re.compile(r"[+-]?\d*(?:\.(\d*))?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def refuse_row(
    path: Path,
    header: list[str],
    rows: list[list[str]],
    points: tuple[str, ...],
    *,
    is_wide: bool,
) -> None:
    """Raise an error where the first line of a CSV file holds values, or may hold some: numbers or
    dates that are no time points (T,).

    Args:
        points: time points that a model was trained on.
        is_wide: whether columns may be time points, which numbers may be the names of.
    """
    if is_row(header, rows, points, is_wide=is_wide):
        raise UserError(
            f"{path}: no header, its first line holds values ({listed(header, 3)}): write the names"
            " of the columns into it, or where they are names, into data.value_columns"
        )


def is_row(
    header: list[str], rows: list[list[str]], points: tuple[str, ...], *, is_wide: bool
) -> bool:
    """Whether the first line of a CSV file holds values, see `refuse_row`, or may do so. Time
    points are numbers that rise or fall by one step, or whole numbers above others, and not written
    as what stands below them; of a model's they are the same ones."""
    there = [cell for cell in header if cell.lower() not in MISSING]
    if not there or "" in header or any(isinstance(time_numbers([c]), str) for c in there):
        return False
    when, (own, known) = time_numbers(header), in_one_writing(header, points)
    if not is_wide or isinstance(when, str):
        return True
    if points and sorted(own) == sorted(known):
        return False
    if not ((when[1:] > when[:-1]).all() or (when[1:] < when[:-1]).all()):
        return True
    if when.dtype.kind == "M" or (points and own[: len(known)] == known[: len(own)]):
        return False
    is_index = is_whole(header) and when[0] in (0, 1) and (np.diff(when) == 1).all()
    if isinstance(numbers(points), str) and not is_index:
        return True  # the time points of the model have names with letters
    below = rows[:LOOKED_AT]
    cells = [cell.strip() for row in (header, *below) for cell in row]
    (decimals, has_exponent), *others = {form_of(c) for c in cells if c.lower() not in MISSING}
    if below and not others and (decimals > 3 or has_exponent):
        return True  # in one format of many decimals, as numpy.savetxt writes them
    grids = sum(map(is_grid, below))
    if grids and 2 * grids >= len(below):
        return True
    is_step = is_index or is_grid(header)
    return not is_step and not (is_whole(header) and not whole_below(below))


def is_like_rows(header: list[str], rows: list[list[str]]) -> bool:
    """Whether numbers that are taken for time points may as well be values: whole ones above whole
    ones or others above others, in the range of these."""
    when, found = time_numbers(header), [numbers(row) for row in rows[:LOOKED_AT]]
    values = [row for row in found if isinstance(row, np.ndarray)]
    if isinstance(when, str) or when.dtype.kind == "M" or not values:
        return False
    low, high = np.nanmin(values), np.nanmax(values)
    alike = is_whole(header) == whole_below(rows[:LOOKED_AT])
    return bool(alike and when.min() <= high and when.max() >= low)


def form_of(cell: str) -> tuple[int, bool]:
    """Decimals of a number as it is written, and whether it has an exponent; (-1, False) where it
    is none."""
    found = FORM.fullmatch(cell.strip())
    return (-1, False) if found is None else (len(found[1] or ""), found[2] is not None)


def is_whole(cells: Sequence[str]) -> bool:
    """Whether all cells are whole numbers without decimals."""
    return all(WHOLE.fullmatch(cell.strip()) for cell in cells)


def whole_below(rows: list[list[str]]) -> bool:
    """Whether most numbers of rows are whole ones without decimals."""
    cells = [cell.strip() for row in rows for cell in row if cell.strip().lower() not in MISSING]
    return 2 * sum(WHOLE.fullmatch(cell) is not None for cell in cells) > len(cells)


def is_grid(cells: Sequence[str]) -> bool:
    """Whether three or more numbers rise or fall by one step, but for the rounding of their last
    decimal where it is small beside the step."""
    values = numbers(cells)
    if isinstance(values, str) or len(values) < 3 or not np.isfinite(values).all():
        return False
    step = abs(values[-1] - values[0]) / (len(values) - 1)
    decimals = max(form_of(cell)[0] for cell in cells)
    last = 0.0 if any(form_of(cell)[1] for cell in cells) else 10.0**-decimals
    rounding = max(last if decimals > 0 and 10 * last <= step else 0, 1e-9 * step)
    exact = np.linspace(values[0], values[-1], len(values))
    return bool(step > 0 and np.abs(values - exact).max() <= rounding * (1 + 1e-6))


# -------------------------------------------------------------------------- times of wide tables


def points_in_order(
    path: Path, names: Sequence[str], columns: Columns
) -> tuple[list[int], np.ndarray | None]:
    """Order of the time points of a wide table by their names, and their times (T,) in it, where
    these are numbers or dates; None where they are none, or 0, 1, 2 ... or 1, 2, 3 ..., which are
    times only where series are resampled by them.

    Raises:
        UserError: one time occurs twice; or they are irregular or have gaps, and series are not
            resampled.
    """
    when = time_numbers(names)
    order = list(range(len(names)))
    if isinstance(when, str):
        return order, None
    order = np.argsort(when, kind="stable").tolist()
    cells, when = [names[place] for place in order], when[order]
    if is_whole(cells) and when[0] in (0, 1) and (np.diff(when) == 1).all():
        return order, when if columns.resampled else None
    if is_grid(cells):  # but for rounding
        values = when.astype(np.float64)
        when = np.linspace(values[0], values[-1], len(values))
    steps = apart(when[1:], when[:-1])
    if line := time_problem(when, steps, 1.0 if columns.resampled else None):
        raise UserError(
            f"{path}: the columns are time points, {line}; or name them in data.value_columns,"
            " where they are taken as they stand"
        )
    return order, when


NUMBERED = re.compile(r"(.*?)(\d+)", re.ASCII)


def order_note(path: Path, names: Sequence[str]) -> list[str]:
    """A line about time points t0, t1, t10, t2 ... that are no times by their names, but stand in
    another order than that of their numbers, as text is sorted."""
    found = [NUMBERED.fullmatch(name) for name in names]
    parts = [(part[1], int(part[2])) for part in found if part is not None]
    if len(parts) < len(names) or len({begin for begin, _ in parts}) > 1 or parts == sorted(parts):
        return []
    return [
        f"{path}: the time points stand in the order {listed(names, 6)}, not in that of their"
        " numbers, and are taken so: data.value_columns names them in another"
    ]


def refuse_no_id(path: Path, name: str, ids: Sequence[str]) -> None:
    """Raise an error where rows of a table, or series, have no id."""
    if missing := [str(row) for row, one in enumerate(ids, 1) if one.strip().lower() in MISSING]:
        text = (
            f"{path}: no id in {name} for {len(missing)} of {len(ids)} rows (row {listed(missing)},"
            " counted from 1): fill it in, or leave these rows out"
        )
        raise UserError(ended(with_all(text, missing)))


def refuse_owner(path: Path, name: str, cells: list[str], ids: list[str] | None) -> None:
    """Raise an error where a column that is named as ids or groups are has one value in each series
    of a table with a row a time point: it tells whose the series is, and is no channel.

    Args:
        ids: of the series of each row; none: all are of one.
    """
    if not (ID_NAME.fullmatch(name) or GROUP_NAME.fullmatch(name)):
        return
    owner: dict[str, str] = {}
    of_each = ids if ids is not None else [""] * len(cells)
    if all(owner.setdefault(i, cell) == cell for i, cell in zip(of_each, cells, strict=True)):
        cure = "" if ids is None else "it in data.group_column, or "
        raise UserError(
            f'{path}: column "{name}" has one value in each series, so that it seems to hold'
            f" groups, no channel: name {cure}the columns of the values in data.value_columns"
        )


def refuse_index(path: Path, name: str, cells: list[str]) -> None:
    """Raise an error where a column that is named as an index has another whole number in each row:
    the place of a row in the table tells its id, hence its label."""
    is_other = 1 < len(set(cells)) == len(cells)
    if ROW_NAME.fullmatch(name) and is_other and all(map(str.isdecimal, cells)):
        raise UserError(
            f'{path}: column "{name}" numbers the rows: drop it, or name the columns of the values'
            " in data.value_columns"
        )


def refuse_text(path: Path, name: str, cells: Iterable[str]) -> None:
    """Raise an error where none of two or more cells of a column of values is a number."""
    shown: list[str] = []
    for cell in map(str.strip, cells):
        if cell.lower() in MISSING:
            continue
        if not isinstance(numbers([cell]), str):
            return
        shown.append(f'"{cell}"')
    if len(shown) > 1:
        raise UserError(
            f'{path}: column "{name}" holds no number ({listed(list(dict.fromkeys(shown)), 3)}):'
            " name it in data.time_column or data.id_column where it is one of these, else the"
            " columns of the values in data.value_columns"
        )
