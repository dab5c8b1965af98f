"""Data sets of time series: files, labels, splits, resamples; and new series without labels.

N series, C channels, T time points.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glovita_lib.data import (
    Asked,
    Data,
    SeriesSamples,
    Source,
    Split,
    names_compared,
    order_of_names,
    read_data_set,
    splits_needed,
    subset,
)
from glovita_lib.data_features import (
    Collection,
    Table,
    encode_labels,
    label_columns,
    make_split,
    read_table,
    refuse_emptied,
    refuse_equal,
    refuse_missing,
    refuse_row_numbers,
    refuse_shared,
    shared_ids,
    split_rows,
    unused,
    with_table,
)
from glovita_lib.data_labels import untrained, word
from glovita_lib.data_splits import (
    VAL,
    draw_stratified,
    in_one_form,
    refuse_shared_groups,
    resampled,
    strata,
)
from glovita_lib.data_tables import Problems
from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError, composed, listed
from glovita_lib.files import on_disk
from glovita_lib.read_series import SUFFIXES, is_one_series, read_files, read_series
from glovita_lib.series_preparation import REGULAR, PreparedSeries, prepare
from glovita_lib.series_table import Columns, SeriesTable
from glovita_lib.spec_data import SeriesData
from glovita_lib.spec_series import SeriesPreparation

if TYPE_CHECKING:
    from torch import Tensor

# ------------------------------------------------------------------------------------ source


def padded(series: Sequence[np.ndarray]) -> "Tensor":
    """Series [(C, T_i), ...] as one batch (B, C, T), zeros behind the shorter ones."""
    import torch

    longest = max(one.shape[1] for one in series)
    batch = torch.zeros(len(series), len(series[0]), longest)
    for row, one in zip(batch, series, strict=True):
        row[:, : one.shape[1]] = torch.from_numpy(one)
    return batch


@dataclass(frozen=True)
class SeriesSource(Source):
    """Prepared series in memory: arrays (C, T) where all have one length and every value is there,
    else (C + 1, T_i), whose last row is 1 where a time point counts and 0 where not."""

    series: list[PreparedSeries]

    @property
    def uniform(self) -> tuple[int, ...] | None:
        """(C, T) where all have one length and no time point is missing."""
        return self.shape

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """The same, looked at once."""
        shapes = {one.values.shape for one in self.series}
        whole = len(shapes) == 1 and all(one.there.all() for one in self.series)
        return shapes.pop() if whole else None

    @property
    def collate(self) -> Any:
        """What pads those of different lengths to the longest of a batch."""
        return padded if self.uniform is None else None

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        """Series of these rows."""
        found = [self.series[row] for row in rows]
        if self.uniform is not None:
            return np.stack([one.values for one in found])
        return [np.concatenate([one.values, one.there[None]], dtype=np.float32) for one in found]

    def nbytes(self) -> int:
        """Size in memory, bytes."""
        return sum(one.values.nbytes + one.there.nbytes for one in self.series)

    def select(self, rows: np.ndarray) -> "SeriesSource":
        """Some of the series."""
        return SeriesSource([self.series[row] for row in rows])


@dataclass(slots=True)
class SeriesCollection(Collection):
    """The series of one file or folder, as stored and, those that can be used, prepared."""

    table: SeriesTable
    prepared: dict[int, PreparedSeries]  # by their row in the table

    def source(self, rows: np.ndarray) -> SeriesSource:
        """Source of some of the series."""
        return SeriesSource([self.prepared[row] for row in self.rows[rows]])

    def without(self, broken: set[int]) -> "SeriesCollection":
        """The collection without some rows of the table."""
        kept = [place for place, row in enumerate(self.rows) if row not in broken]
        labels = self.labels
        if labels is not None:
            labels = labels[kept] if isinstance(labels, np.ndarray) else [labels[k] for k in kept]

        def some(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[k] for k in kept]

        return replace(
            self,
            ids=[self.ids[k] for k in kept],
            rows=self.rows[kept],
            labels=labels,
            groups=some(self.groups),
            split_of=some(self.split_of),
            stored=self.stored - (len(self.rows) - len(kept)),
        )


def series_of(data: Data, name: str) -> list[np.ndarray]:
    """The series (C, T_i) of a split, without the row that says what counts and without the time
    points behind their end."""
    assert isinstance(data.samples, SeriesSamples)
    split, channels, found = data.splits[name], data.samples.channels, []
    for one in split.source.fetch(np.arange(len(split))):
        if len(one) > channels:
            length = int(np.flatnonzero(one[-1])[-1]) + 1 if one[-1].any() else 1
            one = one[:channels, :length]
        found.append(np.asarray(one, np.float32))
    return found


# ------------------------------------------------------------------------------------- files


def root_of(spec: SeriesData) -> Path:
    """Folder that the files are relative to.

    Raises:
        UserError: the package is not installed.
    """
    if spec.package is None:
        return Path(spec.data_root_dir)
    found = find_spec(spec.package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"data.package: {spec.package} is not installed: pip install {spec.package}"
        )
    return Path(found.submodule_search_locations[0]) / spec.data_root_dir


def files_of(spec: SeriesData) -> dict[str, Path]:
    """The file of each split, or of "all" where the splits are drawn from one.

    Raises:
        UserError: an archive has no such data set.
    """
    base = root_of(spec)
    if spec.split_source != "files":
        assert spec.series_file is not None  # else it is among the missing files
        return {"all": on_disk(base / spec.series_file)}
    names = {"train": spec.train_file, "val": spec.val_file, "test": spec.test_file}
    files = {split: on_disk(base / name) for split, name in names.items() if name is not None}
    if spec.problem is not None:
        for split in ("train", "test"):
            files[split] = archive_file(base, spec.problem, split)
    return files


def archive_file(base: Path, problem: str, split: str) -> Path:
    """NAME/NAME_TRAIN.ts or with another suffix.

    Raises:
        UserError: there is none.
    """
    start = base / problem / f"{problem}_{split.upper()}"
    found = [path for suffix in SUFFIXES[:3] if (path := Path(f"{start}{suffix}")).is_file()]
    if found:
        return found[0]
    there = sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    raise UserError(
        f'data.problem = "{problem}": no {start}.ts (or {", ".join(SUFFIXES[1:3])}); data sets'
        f" there: {listed(there, 30)}"
    )


def columns_of(spec: SeriesData) -> Columns:
    """Columns of CSV files."""
    split = spec.split_column if spec.split_source == "csv" else None
    return Columns(
        spec.id_column,
        spec.time_column,
        label_columns(spec),
        spec.group_column,
        split,
        spec.value_columns,
        resampled=spec.preparation.step is not None,
    )


def open_file(path: Path, spec: SeriesData, table: Table | None) -> SeriesCollection:
    """The series of a file, with their labels.

    Raises:
        UserError: it cannot be read, or has no labels.
    """
    found = read_series(path, columns_of(spec))
    refuse_equal(path, found.ids, table)
    if found.labels is None and table is None:
        cure = "name a CSV file of them in data.labels_file"
        if path.suffix.lower() == ".arff":
            cure += ", or the last attribute in data.label_column where it is a number to predict"
        raise UserError(
            f'{path}: no labels in it (column or array "{listed(label_columns(spec))}"): {cure}'
        )
    if spec.split_source == "csv" and table is None and found.splits is None:
        raise UserError(f'{path}: no column "{spec.split_column}" of the splits in it')
    collection = collection_of(found)
    if table is None and spec.group_column and found.groups is None:
        raise UserError(f'{path}: no column "{spec.group_column}" of the groups in it')
    refuse_from_one(spec, collection, table)
    labelled = with_table(spec, collection, table)
    refuse_missing(labelled, spec.class_names)
    return labelled


def refuse_from_one(spec: SeriesData, whole: SeriesCollection, table: Table | None) -> None:
    """Raise an error where a table counts the rows of a file without ids from 1, by which each
    would have the label of the one before."""
    count = len(whole.ids)
    if table is not None and not whole.named and str(count) in table and "0" not in table:
        raise UserError(
            f"{spec.labels_file}: {whole.where} has {count} series without ids, which are counted"
            f" from 0, and the table has {count} and no 0: write 0 to {count - 1} into column"
            f' "{spec.id_column}"'
        )


def collection_of(found: SeriesTable) -> SeriesCollection:
    """The series of a table, none of them prepared yet."""
    return SeriesCollection(
        where=found.where,
        ids=found.ids,
        rows=np.arange(len(found.ids)),
        named=found.named,
        labels=found.labels,
        groups=found.groups,
        class_names=None,
        subtask=found.subtask,
        split_of=found.splits,
        stored=len(found.ids),
        table=found,
        prepared={},
    )


def prepare_all(
    collections: Sequence[SeriesCollection],
    spec: SeriesPreparation,
    problems: Problems,
    model: SeriesSamples | None = None,
) -> tuple[list[SeriesCollection], float | None]:
    """The collections with their series prepared and without those that cannot be used, which are
    noted; and the time from a value to the next, none where no series has times.

    Args:
        model: what a model takes: channels and step that the series must have; none: those that
            most have.
    """
    for whole in collections:
        for place, row in enumerate(whole.rows):
            stored = whole.table.series[row]
            times = None if whole.table.times is None else whole.table.times[row]
            found = stored
            if not isinstance(stored, str):
                timed = times is not None and len(times) == stored.shape[1] > 0
                if spec.step is not None and not timed:
                    raise UserError(
                        f"data.preparation.step = {spec.step:g}: {whole.where} has no times to"
                        " resample by; leave it out"
                    )
                found = prepare(stored, times if timed else None, spec)
            if isinstance(found, str):
                problems.add(sample_name(whole, place), found)
            else:
                whole.prepared[row] = found
    everyone = [one for whole in collections for one in whole.prepared.values()]
    counts = Counter(len(one.values) for one in everyone)
    wanted = min(counts, key=lambda c: (-counts[c], c), default=0)
    steps = [one.step for one in everyone if one.step is not None]
    usual = float(np.median(steps)) if steps else None
    if model is not None:
        wanted = model.channels
        usual = usual if model.step is None else model.step
    kept = []
    for whole in collections:
        for place, row in enumerate(whole.rows):
            line = odd(whole.prepared.get(row), wanted, usual, of_model=model is not None)
            if line is not None:
                problems.add(sample_name(whole, place), line)
                whole.prepared.pop(row)
        kept.append(whole.without({row for row in whole.rows if row not in whole.prepared}))
    return kept, usual


def odd(
    one: PreparedSeries | None, channels: int, step: float | None, *, of_model: bool
) -> str | None:
    """What tells a series from the others: channels or step of its times."""
    if one is None:
        return None
    others = "the model takes" if of_model else "most have"
    if len(one.values) != channels:
        return f"{len(one.values)} channels, {others} {channels}"
    if one.step is not None and step is not None and abs(one.step - step) > REGULAR * step:
        cure = "train with data.preparation.step" if of_model else "set data.preparation.step"
        return f"steps of {one.step:g} between its times, {others} {step:g}: {cure} to resample"
    return None


def sample_name(whole: Collection, place: int) -> str:
    """File and id of a sample, for messages."""
    return f"{Path(whole.where).name}: {whole.ids[place]}"


# ------------------------------------------------------------------------------ the data set


@read_data_set.register
def _(spec: SeriesData, *, seed: int, asked: Asked) -> Data:
    """Files of time series."""
    wanted = asked.wanted
    table = None if spec.labels_file is None else read_table(spec, spec.labels_file)
    files = {split: str(path) for split, path in files_of(spec).items()}
    opened = open_all(spec, files, table, splits_needed(files, wanted))
    if table is not None and spec.split_source == "csv":
        refuse_emptied(spec, table, next(iter(opened.values())), wanted)
    refuse_row_numbers(list(opened.values()), table)
    tables = [whole.table for whole in opened.values()]
    report, names, points = matched(tables, resampled=spec.preparation.step is not None)
    problems = Problems(spec.strict, "sample")
    kept, step = prepare_all(list(opened.values()), spec.preparation, problems)
    problems.settle(report)
    if empty := [whole.where for whole in kept if not whole.ids]:
        raise problems.error(f"cannot be used, which leaves none for {listed(empty)}:")
    opened = dict(zip(opened, kept, strict=True))
    forms: dict[str, str] = {}
    for whole in kept:
        whole.groups = None if whole.groups is None else in_one_form(whole.groups, forms)
    columns = None if isinstance(spec.label_column, str) else spec.label_column
    found = encode_labels(spec, kept, columns, asked)
    subtask, classes, encoded, number_names = found
    targets = dict(zip(opened, encoded, strict=True))
    if spec.split_source == "files":
        rows = {name: np.arange(len(opened[file].ids)) for name, file in files.items()}
    else:
        ((file, whole),) = opened.items()
        rows = split_rows(spec, whole, targets[file], subtask, seed, wanted)
        files = dict.fromkeys(rows, file)
    splits = {n: make_split(opened[files[n]], targets[files[n]], rows[n]) for n in rows}
    refuse_shared(opened, files, rows)
    if spec.resample:
        splits |= resample(spec, splits, opened, files, subtask)
    if spec.val_fraction and "train" in splits:
        splits |= with_val(splits["train"], spec, subtask, seed)
    refuse_divided(splits, spec.resample)
    named = {name: splits[name] for name, file in files.items() if opened[file].named}
    report += [*unused(spec, table, kept, splits), *shared_ids(named)]
    train = splits.get("train")
    if train is not None and train.targets is not None:
        report += untrained(train.targets, classes, subtask)
    series = [one for whole in kept for one in whole.prepared.values()]
    return Data(
        name="generic_series_dataset",
        splits={name: splits[name] for name in ("train", "val", "test") if name in splits},
        subtask=subtask,
        class_names=classes,
        ordered=spec.class_names is not None,
        number_names=number_names,
        samples=SeriesSamples(
            channels=len(series[0].values),
            preparation=spec.preparation,
            value_columns=names,
            time_points=points,
            step=step,
        ),
        report=report,
        size_text=size_text(series, names),
    )


def size_text(series: Sequence[PreparedSeries], names: Sequence[str] = ()) -> str:
    """Channels, with their names where they have some, and time points of series of one number of
    channels."""
    shown = f" ({listed(names, 6)})" if names else ""
    channels, counts = len(series[0].values), {one.values.shape[1] for one in series}
    points = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
    return f"{channels} channel{'s' * (channels > 1)}{shown}, {points} time points"


def match_columns(table: SeriesTable, names: tuple[str, ...], whose: str) -> str | None:
    """Put the columns of a table in the order of those of another one, where they have the same
    names; a line about it where that is another order, or where all names are others.

    Args:
        names, whose: columns of the other table, and what that is called.

    Raises:
        UserError: some names are the same and others not.
    """
    how = order_of_names(table.columns, names, is_wide=table.is_wide)
    if how == "same":
        return None
    shown = f"{table.where}: the columns are {listed(table.columns, 6)}, those of {whose}"
    shown += f" {listed(names, 6)}"
    if how == "other":
        return f"{shown}: taken in the order in which they stand"
    if how == "mixed":
        cure = cure_of_names(tuple(map(composed, table.columns)), tuple(map(composed, names)))
        raise UserError(f"{shown}, and only some are the same: {cure}")
    own, wanted = names_compared(table.columns, names, is_wide=table.is_wide)
    order = [own.index(name) for name in wanted]
    for row, one in enumerate(table.series):
        if not isinstance(one, str):
            table.series[row] = one[:, order] if table.is_wide else one[order]
    table.columns = names
    return f"{shown}: matched by name"


def cure_of_names(own: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    """What to do about columns some of which are the wanted ones."""
    both = [name for name in wanted if name in own]
    if len(both) == len(wanted):
        return f"name the values in data.value_columns ({listed(both, 6)})"
    rename = "write the same names to both files where the values are the same"
    both_said = f", or take {listed(both, 6)} alone in data.value_columns and train with it"
    return rename + (both_said if both else "")


def matched(
    tables: Sequence[SeriesTable], *, resampled: bool
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Lines about tables whose columns are put in the order of the first one, see
    `match_columns`, and the names of the channels and of the time points in that order.

    Args:
        resampled: whether series are resampled by their times, which tell time points apart then.
    """
    lines: list[str] = []
    first: dict[bool, SeriesTable] = {}
    for table in tables:
        lines += table.notes
        if table.columns and not (resampled and table.is_wide and table.times is not None):
            other = first.setdefault(table.is_wide, table)
            line = match_columns(table, other.columns, other.where)
            lines += [] if line is None else [line]
    channels, points = (first[key].columns if key in first else () for key in (False, True))
    return lines, channels, points


def open_all(
    spec: SeriesData, files: dict[str, str], table: Table | None, needed: set[str]
) -> dict[str, SeriesCollection]:
    """The files of splits; where those of splits that are not needed cannot be read, their splits
    are taken away.

    Raises:
        UserError: whatever is wrong with those that are needed, a line each.
    """
    opened: dict[str, SeriesCollection] = {}
    lines: list[str] = []
    for split, file in list(files.items()):
        if file in opened:
            continue
        try:
            opened[file] = open_file(Path(file), spec, table)
        except UserError as error:
            if split in needed or split == "all":
                lines.append(str(error))
            else:
                del files[split]
    if lines:
        raise UserError("\n".join(lines))
    return opened


def resample(
    spec: SeriesData,
    splits: dict[str, Split],
    opened: dict[str, SeriesCollection],
    files: dict[str, str],
    subtask: str,
) -> dict[str, Split]:
    """Train and test of resample data.resample.

    Raises:
        UserError: targets are no classes, or one of the splits is not there.
    """
    if subtask != "multiclass" or not {"train", "test"} <= splits.keys():
        raise UserError(
            f"data.resample = {spec.resample} keeps the number of each class in train and test: it"
            " is for classes, and for data with both splits"
        )
    labels = [opened[files[name]].labels for name in ("train", "test")]
    words = [[word(label) for label in ([] if own is None else own)] for own in labels]
    parts = resampled(words[0], words[1], spec.resample)
    whole = joined(splits["train"], splits["test"])
    return {name: subset(whole, part) for name, part in zip(("train", "test"), parts, strict=True)}


def refuse_divided(splits: dict[str, Split], number: int) -> None:
    """No group may be in two splits, also where these are drawn.

    Args:
        number: of the resample.

    Raises:
        UserError: one is.
    """
    ends = np.cumsum([0, *map(len, splits.values())])
    rows = {n: ends[i] + np.arange(len(split)) for i, (n, split) in enumerate(splits.items())}
    groups: list[str | None] = []
    for split in splits.values():
        groups += split.groups or [None] * len(split)
    ids = [name for split in splits.values() for name in split.ids]
    try:
        refuse_shared_groups(ids, groups, rows)
    except UserError:
        if not number:
            raise
        raise UserError(
            f"data.resample = {number} draws train and test sample by sample, which divides groups"
            " of data.group_column between them: leave out one of the two"
        ) from None


def joined(train: Split, test: Split) -> Split:
    """The samples of both splits; ids say which of them they are from in the files."""
    assert isinstance(train.source, SeriesSource) and isinstance(test.source, SeriesSource)
    assert train.targets is not None and test.targets is not None
    groups = None
    if train.groups is not None and test.groups is not None:
        groups = [*train.groups, *test.groups]
    ids = [f"train/{identity}" for identity in train.ids]
    return Split(
        ids=[*ids, *(f"test/{identity}" for identity in test.ids)],
        targets=np.concatenate([train.targets, test.targets]),
        source=SeriesSource([*train.source.series, *test.source.series]),
        groups=groups,
    )


def with_val(train: Split, spec: SeriesData, subtask: str, seed: int) -> dict[str, Split]:
    """Train and a val drawn from it.

    Raises:
        UserError: one of them would be empty.
    """
    assert train.targets is not None
    labels, group = strata(train.targets, subtask, kept=spec.stratified), np.arange(len(train))
    if train.groups is not None:  # which are drawn whole, each in the stratum of most of its series
        group = np.unique(train.groups, return_inverse=True)[1]
        members = [labels[group == number] for number in range(group.max() + 1)]
        labels = np.array([max(own, key=own.tolist().count) for own in members])
    count, what = round(len(labels) * spec.val_fraction), "groups" if train.groups else "series"
    if not 0 < count < len(labels):
        raise UserError(
            f"data.val_fraction = {spec.val_fraction:g} leaves train or val of {len(labels)} {what}"
            " empty: take another share"
        )
    drawn, _ = draw_stratified(labels, count, seed=hash_seed(seed, VAL), keep="rest")
    is_val = np.isin(group, drawn)
    val, rest = np.flatnonzero(is_val), np.flatnonzero(~is_val)
    return {"train": subset(train, rest), "val": subset(train, val)}


# --------------------------------------------------------------------------------- new series


def unlabelled_series(
    path: str, samples: SeriesSamples, spec: SeriesData
) -> tuple[Split, list[str]]:
    """New series without labels, of a file or a folder, prepared as a model takes them; labels in
    it are not read.

    Args:
        samples: what the model takes.
        spec: the columns of CSV files.

    Raises:
        UserError: nothing there, or series that are broken or have another number of channels.
    """
    where = on_disk(Path(path))
    if not where.exists():
        raise UserError(f"{path}: no such file or folder, expected time series")
    how = samples.preparation or SeriesPreparation()
    resampled = how.step is not None
    columns = replace(columns_of(spec), points=samples.time_points, resampled=resampled)
    channels = samples.channels // 2 if how.mask_channels else samples.channels
    if is_one_series(where, columns, channels, samples.value_columns):
        whole = collection_of(read_files(where, [where], columns))
    else:
        whole = collection_of(read_series(where, columns))
    refuse_equal(where, whole.ids, None)
    names = samples.time_points if whole.table.is_wide else samples.value_columns
    line = match_columns(whole.table, names, "the data that the model was trained on")
    report = whole.table.notes + ([] if line is None else [line])
    problems = Problems(spec.strict, "sample")
    (kept,), _ = prepare_all([whole], how, problems, samples)
    problems.settle(report)
    if not kept.ids:
        raise problems.error("cannot be used, which leaves none:")
    return Split(kept.ids, None, kept.source(np.arange(len(kept.ids)))), report
