"""Time series files: CSV (wide and long), npy, npz, .ts, .arff, .tsv, and folders with a file a
series.

N series, C channels, T time points of a series, M time points of all series.
"""

import csv
import re
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glovita_lib.errors import UserError, composed, listed, reason
from glovita_lib.files import lines_of, read_cells
from glovita_lib.series_preparation import numbers, time_numbers
from glovita_lib.series_table import (
    Columns,
    SeriesTable,
    is_like_rows,
    order_note,
    points_in_order,
    refuse_index,
    refuse_no_id,
    refuse_owner,
    refuse_row,
    refuse_text,
    refuse_unlike,
)

SUFFIXES = (".ts", ".arff", ".tsv", ".csv", ".npy", ".npz")
ENTRIES = ("series", "lengths", "offsets", "times", "labels", "ids", "groups")
"""Arrays of a .npz file."""

# -------------------------------------------------------------------------------------- files


def read_series(path: Path, columns: Columns) -> SeriesTable:
    """The series of a file, or of a folder with one file a series.

    Raises:
        UserError: no such file, another kind of file, or one that is damaged as a whole.
    """
    if path.is_dir():
        return read_folder(path, columns)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: no file of time series; known are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    table = reader(path, columns)
    if not table.ids:
        raise UserError(f"{path}: the file has no series")
    return table


def read_folder(folder: Path, columns: Columns) -> SeriesTable:
    """A folder with one file a series: npy (T,) or (C, T), or CSV with a row a time point. The id
    is the name without its suffix.

    Raises:
        UserError: there is none.
    """
    known = (path for path in folder.iterdir() if path.suffix.lower() in (".npy", ".csv"))
    paths = sorted(path for path in known if path.name[0] != ".")
    if not paths:
        raise UserError(f"{folder}: no .npy or .csv file of a series in it")
    return read_files(folder, paths, columns)


def read_files(where: Path, paths: list[Path], columns: Columns) -> SeriesTable:
    """Files of one series each as a folder holds them, of which `where` is what messages name."""
    table = SeriesTable(str(where), [path.stem for path in paths], [], [], named=True)
    assert table.times is not None
    names: list[tuple[str, ...]] = []
    for path in paths:
        values, times, own = read_one(path, columns)
        table.series.append(values)
        table.times.append(times)
        names.append(own)
    match_files(table, names)
    timed = [bool(len(times)) for times in table.times]
    usable = [not isinstance(one, str) for one in table.series]
    if not any(timed):
        table.times = None
    elif 2 * sum(timed) > sum(usable):  # what cannot be used has none
        for row in np.flatnonzero(np.array(usable) & ~np.array(timed)):
            table.series[row] = f'no times (column "{columns.time}"), most files have some'
    return table


def is_one_series(path: Path, columns: Columns, channels: int, names: tuple[str, ...]) -> bool:
    """Whether a file is one of those that a folder holds: an array (T,), or (C, T) of a model's
    several channels; or a CSV file with the model's columns and none of ids."""
    if path.suffix.lower() == ".npy" and path.is_file():
        shape = load_array(path).shape
        return len(shape) == 1 or (len(shape) == 2 and shape[0] == channels > 1)
    if path.suffix.lower() != ".csv" or not path.is_file() or not names:
        return False
    header = read_cells(path, (), (*columns.others, *names))[0]
    return columns.id not in header and set(header) >= set(names)


def match_files(table: SeriesTable, names: list[tuple[str, ...]]) -> None:
    """Put the channels of files of a folder in the order of the first one with the same columns,
    `names` of each file; others than more than half of the files have are refused."""
    kinds = [tuple(sorted(own)) for own in names]
    counts = Counter(filter(None, kinds))
    usual, count = counts.most_common(1)[0] if counts else ((), 0)
    is_usual = 2 * count > counts.total()
    if counts and not is_usual and len(max(counts, key=len)) > 1:
        shown = ", ".join(f"({listed(names[kinds.index(kind)], 4)})" for kind in [*counts][:3])
        shown = f"{table.where}: the columns have different names, as {shown}"
        refuse_overlap(shown, {tuple(map(str.lower, names[kinds.index(kind)])) for kind in counts})
        table.notes.append(f"{shown}: taken in the order in which they stand")
    usual = usual if is_usual else next(filter(None, kinds), ())
    table.columns = names[kinds.index(usual)] if usual else ()
    turned = []
    for row, (own, kind) in enumerate(zip(names, kinds, strict=True)):
        first = names[kinds.index(kind)]
        if own != first:
            table.series[row] = table.series[row][[own.index(name) for name in first]]
            turned.append(table.ids[row])
        if kind in counts and kind != usual and is_usual:
            shown = listed(table.columns, 6)
            table.series[row] = f"columns {listed(first, 6)}, most files have {shown}"
    if turned:
        shown = f"{table.where}: the columns of {listed(turned, 3)} stand in another order than in"
        table.notes.append(f"{shown} the file before with the same ones: matched by name")


def refuse_overlap(shown: str, names: set[tuple[str, ...]]) -> None:
    """Raise an error where different columns of files, in small letters, share names: what has
    another name beside these is no channel that all have."""
    files_of = Counter(name for own in names for name in set(own))
    if len(names) > 1 and max(files_of.values()) > 1:
        common = [name for name, count in files_of.items() if count > 1]
        raise UserError(
            f"{shown}, of which some share {listed(sorted(common), 3)}: rename them, or name those"
            " that all files have in data.value_columns"
        )


def read_one(path: Path, columns: Columns) -> tuple[Any, np.ndarray, tuple[str, ...]]:
    """A series (C, T), or why it cannot be used; its times (T,) and the names of its channels, both
    empty where the file has none."""
    nothing = np.empty(0)
    if path.exists() and not (path.is_file() or path.is_dir()):  # for which one may wait for ever
        return "not a file, but a pipe or a device", nothing, ()
    try:
        if path.suffix.lower() == ".npy":
            values = load_array(path)
            if values.ndim not in (1, 2):
                return f"an array of shape {values.shape}, a series is (T,) or (C, T)", nothing, ()
            return (values[None] if values.ndim == 1 else values), nothing, ()
        header, rows, places = read_values(path, columns, is_wide=False)
        cells = [numbers([row[place] for row in rows]) for place in places]
        if wrong := [cell for cell in cells if isinstance(cell, str)]:
            return wrong[0], nothing, ()
        times: Any = nothing
        if columns.time in header:
            times = time_numbers([row[header.index(columns.time)] for row in rows])
        if isinstance(times, str):
            return times, nothing, ()
        return np.array(cells), times, tuple(header[place] for place in places)
    except UserError as error:
        return str(error).removeprefix(f"{path}: "), nothing, ()


# ----------------------------------------------------------------------------------------- CSV


def read_csv_series(path: Path, columns: Columns) -> SeriesTable:
    """A CSV file: with the column of times a row a time point (long), else a row a series (wide,
    one channel)."""
    header, rows, places = read_values(path, columns, is_wide=True)
    for place in places:
        refuse_text(path, header[place], (row[place] for row in rows))
    is_wide, when = columns.time not in header, None
    if is_wide and not columns.values:
        order, when = points_in_order(path, [header[place] for place in places], columns)
        turned, places = order != sorted(order), [places[place] for place in order]
    table = (read_wide if is_wide else read_long)(path, columns, header, rows, places)
    table.columns, table.is_wide = tuple(header[place] for place in places), is_wide
    if when is not None:
        table.times = [when] * len(table.ids)
    if is_wide and not columns.values and turned:
        shown = listed(table.columns, 6)
        table.notes.append(f"{path}: the time points are put in the order of time ({shown})")
    if is_wide and not columns.values and when is None:
        table.notes += order_note(path, table.columns)
    if table.is_wide and not columns.values and is_like_rows(header, rows):
        told = f"the first line ({listed(header, 3)}) is taken for the names of the time points"
        table.notes.append(f"{path}: {told}, not for a series")
    return table


def read_values(
    path: Path, columns: Columns, *, is_wide: bool
) -> tuple[list[str], list[list[str]], list[int]]:
    """Header and rows of a CSV file, and the places of the columns of values.

    Args:
        is_wide: whether columns may be time points, which numbers may be the names of.

    Raises:
        UserError: there are none, two columns of one name, no header, or see
            `Columns.value_columns`.
    """
    header, rows = read_cells(path, columns.values, columns.others)
    if not columns.values and not set(header) & set(columns.others):
        refuse_row(path, header, rows, columns.points, is_wide=is_wide)
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"{path}: two columns have the same name: {listed(twice, 3)}")
    places = columns.value_columns(path, header)
    if not places:
        raise UserError(f"{path}: no column of values beside {listed(header)}: data.value_columns")
    if not columns.values:
        wide = is_wide and columns.time not in header
        if wide:
            refuse_unlike(path, [header[place] for place in places])
        for place in places:
            cells = [row[place].strip() for row in rows]
            refuse_index(path, header[place], cells)
            if not wide and len(places) > 1:
                refuse_owner(path, header[place], cells, column(header, rows, columns.id))
    return header, rows, places


def read_wide(
    path: Path, columns: Columns, header: list[str], rows: list[list[str]], places: list[int]
) -> SeriesTable:
    """A row a series of one channel."""
    found = [numbers([row[place] for place in places]) for row in rows]
    series = [values if isinstance(values, str) else values[None] for values in found]
    ids = column(header, rows, columns.id)
    if ids is not None:
        refuse_no_id(path, f'column "{columns.id}"', ids)
    if ids is not None and len(ids) >= 2 * len(set(ids)):
        raise UserError(
            f'{path}: {len(ids)} rows for {len(set(ids))} ids and no column "{columns.time}": name'
            " that of the times in data.time_column"
        )
    table = SeriesTable(str(path), ids or list(map(str, range(len(rows)))), series)
    return with_columns(table, columns, header, rows, named=ids is not None)


def with_columns(
    table: SeriesTable, columns: Columns, header: list[str], rows: list[list[str]], *, named: bool
) -> SeriesTable:
    """A table with the labels, groups and splits of a row for each series."""
    labels = [column(header, rows, name) for name in columns.labels]
    one = labels[0] if len(labels) == 1 else list(zip(*[c or () for c in labels], strict=False))
    return replace(
        table,
        labels=None if None in labels else one,
        groups=column(header, rows, columns.group),
        splits=column(header, rows, columns.split),
        named=named,
    )


def column(header: list[str], rows: list[list[str]], name: str | None) -> list[str] | None:
    """Cells of a column; None where there is none."""
    if name is None or name not in header:
        return None
    place = header.index(name)
    return [row[place].strip() for row in rows]


def read_long(
    path: Path, columns: Columns, header: list[str], rows: list[list[str]], places: list[int]
) -> SeriesTable:
    """A row a time point: the rows of an id, which need not stand together, are a series."""
    ids = column(header, rows, columns.id)
    if ids is None:
        raise UserError(
            f'{path}: no column "{columns.id}" beside that of the times: name it in data.id_column,'
            " or put files of one series each into a folder"
        )
    refuse_no_id(path, f'column "{columns.id}"', ids)
    members: dict[str, list[int]] = {}
    for number, identity in enumerate(ids):
        members.setdefault(composed(identity), []).append(number)
    cells = [numbers([row[place] for row in rows]) for place in places]
    at = header.index(columns.time)
    times: Any = time_numbers([row[at] for row in rows])
    if isinstance(times, np.ndarray) and times.dtype.kind == "f" and np.abs(times).max() > 2**53:
        times = "of numbers that decimals elsewhere make inexact"
    table = SeriesTable(str(path), [ids[own[0]] for own in members.values()], [], [])
    assert table.times is not None
    for own in members.values():
        values, when = long_series(own, cells, times, rows, places, at)
        table.series.append(values)
        table.times.append(when)
    first = [rows[own[0]] for own in members.values()]
    names = [name for name in (*columns.labels, columns.group, columns.split) if name in header]
    for name in names:
        place = header.index(name)
        for number, own in enumerate(members.values()):
            told = dict.fromkeys(composed(rows[row][place].strip()) for row in own)
            if len(told) > 1:
                table.series[number] = f"several values of {name}: {listed(told, 3)}"
    return with_columns(table, columns, header, first, named=True)


def long_series(
    own: list[int],
    cells: list[np.ndarray | str],
    times: np.ndarray | str,
    rows: list[list[str]],
    places: list[int],
    at: int,
) -> tuple[np.ndarray | str, np.ndarray]:
    """A series (C, T) of rows of the table, in the order of its times (T,)."""
    nothing = np.empty(0)
    if isinstance(times, str):  # what is said of others is not of this one
        when = time_numbers([rows[row][at] for row in own])
        if isinstance(when, str):
            return when, nothing
    else:
        when = times[own]
    values: list[np.ndarray] = []
    for place, column_cells in zip(places, cells, strict=True):
        if isinstance(column_cells, str):
            column_cells = numbers([rows[row][place] for row in own])
            if isinstance(column_cells, str):
                return column_cells, nothing
            values.append(column_cells)
        else:
            values.append(column_cells[own])
    order = np.argsort(when, kind="stable")
    return np.array(values)[:, order], when[order]


def read_tsv(path: Path, columns: Columns) -> SeriesTable:
    """The UCR archive's tables: no header, a row a series, first its label."""
    rows = [row for row in csv.reader(lines_of(path), delimiter="\t") if row]
    found = [numbers(row[1:]) for row in rows]
    series = [values if isinstance(values, str) else values[None] for values in found]
    ids = list(map(str, range(len(rows))))
    return SeriesTable(str(path), ids, series, labels=[archive_label(row[0]) for row in rows])


WHOLE_DECIMALS = re.compile(r"[+-]?\d+(\.0*(e\+?\d+)?|e\+?\d+)", re.ASCII | re.IGNORECASE)


def archive_label(cell: str) -> str:
    """A label in a file of the UCR and UEA archives, of which one file writes 1 and another
    1.0000000e+00 for the same class: whole numbers as they are printed."""
    label = cell.strip()
    return str(int(float(label))) if WHOLE_DECIMALS.fullmatch(label) else label


# -------------------------------------------------------------------------------------- arrays


DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,  # of a header that states more than there is
    OverflowError,
    SyntaxError,
    TypeError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise of damaged files."""


def load_array(path: Path) -> np.ndarray:
    """An array of numbers in a .npy file.

    Raises:
        UserError: it is damaged, another kind of file, or holds objects or text.
    """
    try:
        with open(path, "rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except DAMAGE as error:
        raise UserError(f"{path}: not an array that can be read ({reason(error)})") from None
    return checked(path, "the array", values)


def checked(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """Numbers as float32 where they are, else as float64."""
    if values.dtype.kind not in "iufb":
        raise UserError(f"{path}: {name} holds {values.dtype}, no numbers")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def read_npy(path: Path, columns: Columns) -> SeriesTable:
    """An array (N, T) or (N, C, T); labels come from data.labels_file."""
    return SeriesTable(str(path), *listed_arrays(path, load_array(path), None, None))


def listed_arrays(
    path: Path, values: np.ndarray, lengths: np.ndarray | None, offsets: np.ndarray | None
) -> tuple[list[str], list[Any]]:
    """Ids and series of an array: (N, T) or (N, C, T) with lengths (N,), or rows (M, C) of all time
    points with offsets (N + 1,).

    Raises:
        UserError: their shapes do not fit.
    """
    if offsets is not None:
        ends = whole(path, "offsets", offsets)
        values = values[:, None] if values.ndim == 1 else values
        rising = ends.ndim == 1 and len(ends) > 1 and (np.diff(ends) >= 0).all()
        if values.ndim != 2 or not rising or ends[0] or ends[-1] != len(values):
            raise UserError(
                f"{path}: offsets must rise from 0 to the {len(values)} rows of series (M, C)"
            )
        series = [values[a:b].T for a, b in zip(ends, ends[1:], strict=False)]
        return list(map(str, range(len(series)))), series
    if values.ndim not in (2, 3):
        raise UserError(f"{path}: an array of shape {values.shape}; series are (N, T) or (N, C, T)")
    series = list(values[:, None] if values.ndim == 2 else values)
    if lengths is not None:
        counts, most = whole(path, "lengths", lengths), values.shape[-1]
        if counts.shape != (len(series),) or (counts < 0).any() or (counts > most).any():
            raise UserError(f"{path}: lengths must be {len(series)} numbers from 0 to {most}")
        series = [one[:, :count] for one, count in zip(series, counts, strict=True)]
    return list(map(str, range(len(series)))), series


def whole(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """Whole numbers as int64.

    Raises:
        UserError: they are none.
    """
    if values.dtype.kind not in "iuf" or not (values == np.floor(values)).all():
        raise UserError(f"{path}: {name} must be whole numbers, here {values.dtype}")
    return values.astype(np.int64)


def read_npz(path: Path, columns: Columns) -> SeriesTable:
    """Arrays series, and as far as they are there lengths or offsets, times, labels, ids and
    groups; times are (T,) of all, or (N, T), or (M,) beside offsets."""
    try:
        with open(path, "rb") as file:  # np.load leaves a damaged one open
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise UserError(f"{path}: one array, as in a .npy file: rename it to .npy")
            entries = {name: np.asarray(found[name]) for name in found.files}
    except DAMAGE as error:
        raise UserError(f"{path}: not arrays that can be read ({reason(error)})") from None
    unknown = entries.keys() - set(ENTRIES)
    if "series" not in entries or unknown:
        raise UserError(
            f"{path}: arrays {listed(sorted(entries))}; series must be there, and may be:"
            f" {', '.join(ENTRIES[1:])}"
        )
    values = checked(path, "series", entries["series"])
    offsets = entries.get("offsets")
    ids, series = listed_arrays(path, values, entries.get("lengths"), offsets)
    for name in ("labels", "ids", "groups"):
        if name in entries:
            entries[name] = entry_of_each(path, name, entries[name], len(series))
    table = SeriesTable(str(path), ids, series, labels=entries.get("labels"))
    if "ids" in entries:
        table.ids, table.named = list(map(str, entries["ids"].tolist())), True
        refuse_no_id(path, "array ids", table.ids)
    if "groups" in entries:
        table.groups = list(map(str, entries["groups"].tolist()))
    if "times" in entries:
        times = entries["times"]
        if times.dtype.kind not in "iufM":
            times = checked(path, "times", times)
        table.times = array_times(path, times, series, offsets)
    return table


def entry_of_each(path: Path, name: str, values: np.ndarray, count: int) -> np.ndarray:
    """An array with an entry for each of `count` series; byte strings as text, which is UTF-8.

    Raises:
        UserError: it has not, or they are not.
    """
    if not values.ndim or len(values) != count:
        found = f"{len(values)} {name}" if values.ndim else f"{name} of shape ()"
        raise UserError(f"{path}: {found} for {count} series")
    if values.dtype.kind != "S":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: {name} hold {error.object[:40]!r}, which is not UTF-8: write them as text"
        ) from None


def array_times(
    path: Path, times: np.ndarray, series: list[Any], offsets: np.ndarray | None
) -> list[np.ndarray]:
    """Times (T,) of each series."""
    if offsets is not None and times.shape == (int(offsets[-1]),):
        return np.split(times, offsets[1:-1].astype(np.int64))
    longest = max((one.shape[1] for one in series), default=0)
    if times.ndim == 1 and len(times) >= longest:
        return [times[: one.shape[1]] for one in series]
    if times.ndim == 2 and len(times) == len(series) and times.shape[1] >= longest:
        return [row[: one.shape[1]] for row, one in zip(times, series, strict=True)]
    raise UserError(f"{path}: times of shape {times.shape} for {len(series)} series")


# ----------------------------------------------------------------------------------- .ts files


def read_ts(path: Path, columns: Columns) -> SeriesTable:
    """A .ts file of aeon, sktime and tsml: a line a series, channels between colons, then the
    label; "?" is a missing value. A colon at the end of a line without label ends it."""
    lines = lines_of(path)
    header: dict[str, list[str]] = {}
    start = None
    for number, line in enumerate(map(str.strip, lines)):
        if line.lower() == "@data":
            start = number + 1
            break
        if line.startswith("@"):
            key, *words = line.split()
            header[key[1:].lower()] = words
    if start is None:
        raise UserError(f"{path}: no line @data, behind which the series stand")
    stated = {key: words[0].lower() == "true" for key, words in header.items() if words}
    has_times = stated.get("timestamps", False)
    is_number = stated.get("targetlabel", False)
    labelled = is_number or stated.get("classlabel", False)
    table = SeriesTable(str(path), [], [], [] if has_times else None, [] if labelled else None)
    table.subtask = None if not labelled else "regression" if is_number else "multiclass"
    for line in lines[start:]:
        if not line.strip() or line.startswith("#"):
            continue
        parse = with_times if has_times else without_times
        line = line.strip() if labelled else line.strip().removesuffix(":")
        values, times, label = parse(line, labelled=labelled)
        table.ids.append(str(len(table.ids)))
        table.series.append(values)
        if table.times is not None:
            table.times.append(times)
        if isinstance(table.labels, list):
            table.labels.append(archive_label(label))
    return table


class Parsed(NamedTuple):
    """A line of a .ts file."""

    values: Any
    times: np.ndarray
    label: str


def without_times(line: str, *, labelled: bool) -> Parsed:
    """Channels "1,2,?" between colons."""
    parts = line.split(":")
    label = parts.pop().strip() if labelled else ""
    return Parsed(stacked([numbers(part.split(",")) for part in parts]), np.empty(0), label)


def stacked(channels: list[np.ndarray | str]) -> np.ndarray | str:
    """Channels of one length as (C, T), else what is wrong with them."""
    if wrong := [channel for channel in channels if isinstance(channel, str)]:
        return wrong[0]
    lengths = [len(channel) for channel in channels]
    if len(set(lengths)) > 1:
        return f"channels of different lengths: {listed(lengths, 5)}"
    return np.array(channels, np.float64)


PAIR = re.compile(r"\(([^()]*),([^(),]*)\)")


def with_times(line: str, *, labelled: bool) -> Parsed:
    """Channels "(time,value),(time,value)" between colons; what one channel has at a time and
    another has not is missing there."""
    body, colon, label = line.rpartition(":")
    if not labelled or not colon or ")" in label:
        body, label = line, ""
    found = [PAIR.findall(part) for part in re.split(r"(?<=\))\s*:", body)]
    times = [time_numbers([time.strip() for time, _ in pairs]) for pairs in found]
    values = [numbers([value for _, value in pairs]) for pairs in found]
    if wrong := [part for part in (*times, *values) if isinstance(part, str)]:
        return Parsed(wrong[0], np.empty(0), label.strip())
    grid, places = np.unique(np.concatenate(times), return_inverse=True)
    series = np.full((len(found), len(grid)), np.nan)
    first = 0
    for channel, own in enumerate(values):
        where = places[first : first + len(own)]
        first += len(own)
        if len(set(where.tolist())) < len(where):
            return Parsed("a time occurs twice", np.empty(0), label.strip())
        series[channel, where] = own
    return Parsed(series, grid, label.strip())


# ---------------------------------------------------------------------------------- .arff files

ATTRIBUTE = re.compile(r"@attribute\s+('[^']*'|\"[^\"]*\"|\S+)\s+(.*)", re.IGNORECASE)
LABEL_NAMES = ("target", "class", "label")


def read_arff(path: Path, columns: Columns) -> SeriesTable:
    """An ARFF file of Weka: a row a series with its label at the end; of several channels one
    relational attribute, whose lines are the channels. Labels are classes where they are nominal or
    text, else numbers to predict."""
    lines = lines_of(path)
    attributes: list[tuple[str, str]] = []
    depth, start = 0, None
    for number, line in enumerate(map(str.strip, lines)):
        if line.lower().startswith("@data"):
            start = number + 1
            break
        if line.lower().startswith("@end"):
            depth -= 1
        elif found := ATTRIBUTE.match(line):
            name, kind = found[1].strip("'\""), found[2].strip()
            if not depth:
                attributes.append((name, kind))
            depth += kind.lower() == "relational"
    if start is None or not attributes:
        raise UserError(f"{path}: no @attribute and @data, of which an ARFF file is made")
    name, kind = attributes[-1]
    nominal = kind.startswith("{") or kind.lower().startswith("string")
    labelled = nominal or name.lower() in LABEL_NAMES or name in columns.labels
    relational = attributes[0][1].lower() == "relational"
    table = SeriesTable(str(path), [], [], labels=[] if labelled else None)
    table.subtask = None if not labelled else "multiclass" if nominal else "regression"
    for line in map(str.strip, lines[start:]):
        if not line or line.startswith("%"):
            continue
        if line.startswith("{"):
            raise UserError(f"{path}: rows in braces are sparse: save it with all values of each")
        cells = arff_cells(line)
        count = len(cells)
        label = cells.pop() if labelled else ""
        parts = ",".join(cells).split("\n") if relational else [",".join(cells)]
        values = stacked([numbers(part.split(",")) for part in parts])
        if not relational and count != len(attributes):
            values = f"{count} values, the file states {len(attributes)} attributes"
        table.ids.append(str(len(table.ids)))
        table.series.append(values)
        if isinstance(table.labels, list):
            table.labels.append(archive_label(label))
    return table


CELL = re.compile(
    r"""\s*(?:'([^'\\]*(?:\\.[^'\\]*)*)'|"([^"\\]*(?:\\.[^"\\]*)*)"|([^,]*?))\s*(,|$)"""
)
ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def arff_cells(line: str) -> list[str]:
    """Values between commas, without their quotes, which may hold commas; backslashes escape."""
    if not any(mark in line for mark in "'\"\\"):
        return list(map(str.strip, line.split(",")))
    cells, at, more = [], 0, True
    while more:
        found = CELL.match(line, at)
        assert found is not None  # whatever is no quoted cell is one without quotes
        text = next(part for part in found.group(1, 2, 3) if part is not None)
        cells.append(re.sub(r"\\(.)", lambda mark: ESCAPED.get(mark[1], mark[1]), text))
        at, more = found.end(), bool(found[4])
    return cells


READERS: dict[str, Callable[[Path, Columns], SeriesTable]] = {
    ".ts": read_ts,
    ".arff": read_arff,
    ".tsv": read_tsv,
    ".csv": read_csv_series,
    ".npy": read_npy,
    ".npz": read_npz,
}
