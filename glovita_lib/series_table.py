"""What is read of files of time series, and which columns of CSV files are what.

C channels, T time points of a series.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.errors import UserError

TIME_NAME = re.compile(
    r"(date(.?time)?|time(.?(stamp|step|point|index|s|sec|ms))?|t|seconds?|frame)s?(\s*[\[(].*)?",
    re.IGNORECASE,
)
"""Names of columns that hold times, which no time point of a wide table has."""
ID_NAME = re.compile(
    r"(.*[ _.-])?u?id|subject|patient|person|sample|series|case|index", re.IGNORECASE
)
"""Names of columns that hold ids."""
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
