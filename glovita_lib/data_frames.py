"""Labels of the frames of videos: of tables with a row a frame or a segment, and of files of a
label a frame.

F frames of a video.
"""

import csv
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from glovita_lib import files
from glovita_lib.data import NUMBER, Asked
from glovita_lib.data_labels import encode, is_missing, missing_words, word
from glovita_lib.data_subtask import LabelRules, Labels
from glovita_lib.data_tables import SampleFolder
from glovita_lib.errors import UserError, composed, ended, listed, with_all
from glovita_lib.files import on_disk, read_csv
from glovita_lib.read_video import VideoFacts
from glovita_lib.spec_data import VideoData
from glovita_lib.spec_samples import UNLABELLED


@dataclass(slots=True)
class FrameTable:
    """Labels of the frames of videos, by id."""

    segments: dict[str, list[tuple[float, float, str]]]
    """Start, end and label, in frames or seconds; the name of a class once it is known."""
    lengths: dict[str, range]
    """How many frames have a label, of videos with a file of labels of their own: with and without
    the empty lines at its end."""
    seconds: bool
    broken: dict[str, str] = field(default_factory=dict)
    """What is wrong with a file of labels, of videos with one of their own."""

    def most_frequent(self, name: str) -> str | None:
        """Label of most frames of a video; None where none has one."""
        time: Counter[str] = Counter()
        for start, end, label in self.segments[name]:
            time[label] += end - start  # type: ignore[assignment]  # seconds are counted too
        return max(time, key=lambda label: (time[label], label), default=None)

    def problem(self, name: str, facts: VideoFacts) -> str | None:
        """What is wrong with the labels of a video."""
        if name in self.broken:
            return self.broken[name]
        count = self.lengths.get(name)
        if count is not None and facts.frames not in count:
            text = f"{count[-1]} labels of frames, {facts.frames} frames"
            named = count[-1] == facts.frames + 1
            return text + "; name the column of a header in data.label_column" * named
        ends = [end for _, end, _ in self.segments.get(name, ())]
        last = float(facts.clock.seconds(np.array(facts.frames)) if self.seconds else facts.frames)
        slack = 1.0 if self.seconds else 0.0  # durations are rounded
        if ends and max(ends) > last + slack:
            return f"a label up to {max(ends):g}, it ends at {last:g}"
        known: list[str | None] = [None] * facts.frames
        for inside, label in self.parts(name, facts):
            if others := {*known[inside]} - {None, label}:
                frames = [frame for frame in range(*inside.indices(facts.frames)) if known[frame]]
                return f"frame {frames[0]} has the labels {listed([*others, label])}"
            known[inside] = [label] * len(known[inside])
        return None

    def parts(self, name: str, facts: VideoFacts) -> list[tuple[slice, str]]:
        """The frames of each segment of a video, and their label."""
        if not self.seconds:
            return [(slice(int(a), int(b)), label) for a, b, label in self.segments.get(name, ())]
        edges = facts.clock.seconds(np.arange(facts.frames + 1))
        middles = (edges[:-1] + edges[1:]) / 2
        return [
            (slice(*np.searchsorted(middles, [start, end]).tolist()), label)
            for start, end, label in self.segments.get(name, ())
        ]

    def targets(self, name: str, facts: VideoFacts, place: dict[str, int]) -> np.ndarray:
        """Class of every frame (F,) int64, UNLABELLED where there is none.

        Args:
            place: number of each class by name.
        """
        found = np.full(facts.frames, UNLABELLED, np.int64)
        for inside, label in self.parts(name, facts):
            found[inside] = place[label]
        return found


def read_frame_labels(spec: VideoData, folder: SampleFolder, report: list[str]) -> FrameTable:
    """Labels of frames, from a table or a folder of files.

    Args:
        report: takes a line about videos of a table that are not there.

    Raises:
        UserError: nothing there, or not such labels.
    """
    path = on_disk(Path(spec.data_root_dir) / spec.frames.labels_file)
    if path.is_dir():
        return label_files(path, spec, folder)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; see data.frames.labels_file")
    return label_rows(path, spec, folder, report)


def label_rows(path: Path, spec: VideoData, folder: SampleFolder, report: list[str]) -> FrameTable:
    """Labels of a CSV file with a row a frame or a segment."""
    of, label, (column,) = spec.frames, label_column(spec), spec.path_columns
    rows = read_csv(path, [column, label])
    header = set(rows[0]) if rows else set()
    by_segment = {of.start_column, of.end_column} <= header
    if rows and not by_segment and of.frame_column not in header:
        raise UserError(
            f'{path}: neither a column "{of.frame_column}" nor "{of.start_column}" and'
            f' "{of.end_column}"; see data.frames'
        )
    table = FrameTable({}, {}, by_segment and of.unit == "seconds")
    wrong: list[str] = []
    absent: dict[str, None] = {}
    for line, row in enumerate(rows, 2):
        identity = folder.find(row[column])
        if identity is None:
            absent[row[column] or f"no {column} in line {line}"] = None
            continue  # a table may be of more videos than are here
        try:
            start = float(row[of.start_column if by_segment else of.frame_column])
            end = float(row[of.end_column]) if by_segment else start + 1
        except ValueError:
            start, end = -1.0, -1.0
        whole = table.seconds or (start.is_integer() and end.is_integer())
        if not (0 <= start <= end and whole):
            wrong.append(f"line {line}")
        table.segments.setdefault(identity, []).append((start, end, row[label]))
    if wrong:
        what = "times" if table.seconds else "whole numbers"
        text = f"{path}: start and end must be {what}, 0 <= start <= end: {listed(wrong)}"
        raise UserError(ended(with_all(text, wrong)))
    if rows and not table.segments:
        raise UserError(
            f'{path}: no row names a video; its column "{column}" has'
            f" {listed(dict.fromkeys(row[column] for row in rows), 3)}, videos are"
            f" {listed(folder.ids, 3)}"
        )
    if absent:
        text = f"{len(absent)} videos of {path} are not there ({listed(absent, 3)}): not used"
        report.append(with_all(text, list(absent), 3))
    return table


def label_column(spec: VideoData) -> str:
    """The column of the labels of frames."""
    if not isinstance(spec.label_column, str):
        raise UserError("data.label_column: labels of frames stand in one column")
    return spec.label_column


def label_files(path: Path, spec: VideoData, folder: SampleFolder) -> FrameTable:
    """Labels of a folder with a file a video."""
    table = FrameTable({}, {}, seconds=False)
    for identity in folder.ids:
        stem = identity if (folder.folder / identity).is_dir() else os.path.splitext(identity)[0]
        there = [on_disk(path / (stem + ending)) for ending in (".npy", ".csv", ".txt")]
        found = next((file for file in there if file.is_file()), None)
        if found is None:
            continue
        try:
            frames, labels = labels_of_file(found, spec)
        except UserError as error:
            table.broken[identity] = f"{found.name}: {str(error).removeprefix(f'{found}: ')}"
            continue
        if frames is None:
            last = max((i for i, label in enumerate(labels) if label), default=-1)
            table.lengths[identity] = range(last + 1, len(labels) + 1)
        places = range(len(labels)) if frames is None else frames
        table.segments[identity] = [(i, i + 1, a) for i, a in zip(places, labels, strict=True)]
    return table


def labels_of_file(path: Path, spec: VideoData) -> tuple[list[int] | None, list[str]]:
    """Numbers of frames, none where all have a label in order, and their labels, of an array, of a
    table with the column of the labels, or of a label a line.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    column = label_column(spec)
    if path.suffix == ".npy":
        return None, labels_of_array(path)
    lines = files.lines_of(path)
    header = [cell.strip(' "') for cell in re.split("[,;\t]", lines[0])] if lines else []
    if composed(column) not in map(composed, header):
        if path.suffix != ".csv":
            return None, [line.strip() for line in lines]
        if any(re.search("[,;\t]", re.sub('"[^"]*"', "", line)) for line in lines):
            raise UserError(f'no column "{column}"; columns are {listed(header)}')
        return None, [row[0].strip() if row else "" for row in csv.reader(lines)]
    number = spec.frames.frame_column
    rows = read_csv(path, [column])
    labels = [row[column] for row in rows]
    if number not in header:
        return None, labels
    if wrong := [row[number] for row in rows if not row[number].isdecimal()]:
        raise UserError(f'"{wrong[0]}" is no number of a frame')
    return [int(row[number]) for row in rows], labels


def labels_of_array(path: Path) -> list[str]:
    """Labels of frames in a .npy file, empty where it has NaN."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError("not an array that can be read") from error
    if values.ndim == 0 or values.size != len(values):
        raise UserError(f"labels of shape {values.shape}; store one a frame, (F,)")
    flat = values.ravel().tolist()
    return ["" if is_missing(value, "multiclass") else word(value) for value in flat]


def in_one_writing(label: str) -> str:
    """A label of a frame, of numbers the shortest of their writings: tables with gaps have -1.0 for
    -1."""
    return word(float(label)) if NUMBER.fullmatch(label) else composed(label)


def refuse_missing(spec: VideoData, frames: FrameTable, words: list[str]) -> None:
    """Raise an error where some of these words, which say that there is no label, are no classes by
    the spec: of which a class would be made."""
    lines = []
    for text in missing_words(words, spec.class_names):
        own = [name for name, part in frames.segments.items() if text in {a for *_, a in part}]
        lines.append(f'"{text}" of {listed(own, 3)}')
    if lines:
        path = on_disk(Path(spec.data_root_dir) / spec.frames.labels_file)
        raise UserError(
            f"{path}: frames have no label ({'; '.join(lines)}): name it in"
            " data.frames.unlabelled, or in data.class_names where it is a class"
        )


def with_class_names(
    spec: VideoData, frames: FrameTable, asked: Asked
) -> tuple[VideoData, FrameTable]:
    """The spec with the names of all classes of frames, and the labels with these names, without
    those that count for nothing. What a label means is decided once over all videos."""
    left_out = {"", *map(in_one_writing, spec.frames.unlabelled)}
    labels = {label for part in frames.segments.values() for _, _, label in part}
    each = sorted(label for label in labels if in_one_writing(label) not in left_out)
    trained = None if asked.trained is None else asked.trained.class_names
    refuse_missing(spec, frames, [text for x in each for text in missing_words(x, trained)])
    if not each:
        why = [f"\n  {name}: {text}" for name, text in frames.broken.items()]
        raise UserError(f"no frame has a label; see data.frames{listed(why, 8, '')}")
    rules = LabelRules(
        "multiclass", spec.class_names, spec.num_classes, None, spec.label_separator, asked.trained
    )
    _, names, (targets,), _ = encode([Labels(each, each)], rules)
    means = {label: names[target] for label, target in zip(each, targets.tolist(), strict=True)}
    segments = {
        identity: [(start, end, means[label]) for start, end, label in part if label in means]
        for identity, part in frames.segments.items()
    }
    return msgspec.structs.replace(spec, class_names=names), replace(frames, segments=segments)
