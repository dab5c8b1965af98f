"""Data sets of videos: files and folders of frames with labels from folder names, JSON or CSV, of
whole videos or of their frames; and new videos without labels.

A sample is known by its id: the path of its file or folder of frames below the videos folder.

N samples, F frames of a video, T frames of a clip, H W pixels.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from glovita_lib import files
from glovita_lib.data import (
    Asked,
    ClipSamples,
    Data,
    Source,
    Split,
    VideoFrames,
    read_data_set,
)
from glovita_lib.data_folder import read_folder
from glovita_lib.data_frames import FrameTable, read_frame_labels, with_class_names
from glovita_lib.data_labels import untrained
from glovita_lib.data_tables import (
    LabelTable,
    Problems,
    SampleFolder,
    csv_labels,
    datalist_labels,
    note_unlisted,
    paths_of,
    walk_folders,
)
from glovita_lib.dist import cores, number_of
from glovita_lib.errors import UserError, listed, with_all
from glovita_lib.files import name_of, on_disk, read_csv
from glovita_lib.loggers import Rate
from glovita_lib.read_container import file_type
from glovita_lib.read_video import (
    IMAGE_EXTS,
    Clock,
    LoadedVideo,
    VideoFacts,
    VideoView,
    frame_files,
    look_at,
    read_frames,
    stamp,
)
from glovita_lib.spec_data import VideoData
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_video import ClipSampling, VideoReading

# ------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class StoredVideo:
    """A video in a file or a folder of frames."""

    table: "VideoTable"
    row: int
    size: tuple[int, int] | None  # of its frames when they are decoded

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, F, H, W)."""
        facts = self.table.facts(self.row)
        return 3, facts.frames, *(self.size or (facts.height, facts.width))

    @property
    def clock(self) -> Clock:
        """When its frames are shown."""
        return self.table.clock(self.row)

    def read(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3)."""
        return read_frames(self.table.path(self.row), self.table.facts(self.row), frames, self.size)

    def loaded(self, start: int | None) -> VideoView:
        """The same in memory, where it stands once however often it is a sample."""
        with self.table.lock:
            found = self.table.memory.get((self.row, self.size))
        if found is None:
            whole, clock = self.read(np.arange(self.shape[1])), self.clock
            found = LoadedVideo(whole, clock.fps, clock.times)
            with self.table.lock:
                found = self.table.memory.setdefault((self.row, self.size), found)
        return VideoView(found, start)


class VideoTable:
    """The videos of a data set: paths and facts in arrays, which worker processes share."""

    def __init__(self, paths: Sequence[str], facts: Sequence[VideoFacts]) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths], np.bytes_)  # (N,)
        self.kinds = np.array([each.kind for each in facts], np.str_)
        self.sides = np.array([(f.frames, f.height, f.width) for f in facts]).reshape(-1, 3)
        self.rates = np.array([each.fps for each in facts], np.float64)
        self.random = np.array([each.random for each in facts], bool)
        uneven = {row: each.clock.times for row, each in enumerate(facts) if each.times is not None}
        self.times = uneven  # (F,) seconds, of variable frame rates
        self.lock, self.memory = Lock(), self.no_memory()

    @staticmethod
    def no_memory() -> "WeakValueDictionary[tuple[int, tuple[int, int] | None], LoadedVideo]":
        """No video in memory."""
        return WeakValueDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("lock", "memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock, self.memory = Lock(), self.no_memory()

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        """File or folder of a video."""
        return os.fsdecode(self.paths[row])

    def facts(self, row: int) -> VideoFacts:
        """What is known of a video."""
        frames, height, width = self.sides[row].tolist()
        return VideoFacts(
            str(self.kinds[row]),
            frames,
            height,
            width,
            float(self.rates[row]),
            bool(self.random[row]),
        )

    def clock(self, row: int) -> Clock:
        """When the frames of a video are shown."""
        return Clock(float(self.rates[row]), self.times.get(row))


class VideoSource(Source):
    """Videos that are decoded when their clips are asked for."""

    def __init__(
        self,
        table: VideoTable,
        which: np.ndarray,
        starts: np.ndarray | None = None,
        resized: Any = None,
    ) -> None:
        """Args:
        which: (N,) rows of the table.
        starts: (N,) first frame of the clip that is wanted of each; none: clips are drawn.
        resized: function of height and width, those at which frames are decoded; none keeps them.
        """
        self.table, self.which, self.starts, self.resized = table, which, starts, resized
        self.views: dict[Any, VideoSource] = {}

    @property
    def uniform(self) -> None:
        """None: clips are cut where videos are read."""

    @property
    def sizes(self) -> np.ndarray:
        """Frames, height and width (N, 3) as decoded."""
        sides = self.table.sides[self.which]
        if self.resized is None or not len(sides):
            return sides
        each = {(h, w): self.resized(h, w) for h, w in np.unique(sides[:, 1:], axis=0).tolist()}
        decoded = [each[h, w] for h, w in sides[:, 1:].tolist()]
        return np.column_stack([sides[:, 0], decoded])

    @property
    def clocks(self) -> list[Clock]:
        """When the frames of each are shown."""
        return [self.table.clock(video) for video in self.which.tolist()]

    def windows(self, rows: np.ndarray) -> list[VideoView]:
        """Videos of which only what is asked for is decoded."""
        found = []
        for row in rows.tolist():
            video = int(self.which[row])
            size = None
            if self.resized is not None:
                size = self.resized(*self.table.sides[video, 1:].tolist())
            start = None if self.starts is None else int(self.starts[row])
            found.append(VideoView(StoredVideo(self.table, video, size), start))
        return found

    def fetch(self, rows: np.ndarray) -> list[np.ndarray]:
        """Whole videos (C, F, H, W)."""
        views = self.windows(rows)
        return [view.read(np.arange(view.shape[1])).transpose(3, 0, 1, 2) for view in views]

    def nbytes(self) -> int:
        """Size in memory, where a video stands once."""
        _, first = np.unique(self.which, return_index=True)
        return int(self.sizes[first].prod(1).sum()) * 3

    def select(self, rows: np.ndarray) -> "VideoSource":
        starts = None if self.starts is None else self.starts[rows]
        return VideoSource(self.table, self.which[rows], starts, self.resized)

    def changed(self, key: Any, **changes: Any) -> "VideoSource":
        """The source with other fields; for one key always the same one, so that worker processes
        know it again."""
        if key not in self.views:
            part = copy(self)
            vars(part).update(changes, views={})
            self.views[key] = part
        return self.views[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "views": {}}


# ----------------------------------------------------------------------- what is known of videos

FORMAT = 5  # of the index; another one looks at all videos anew


class VideoFolder(SampleFolder):
    """The videos below a folder."""

    noun: ClassVar[str] = "video"

    def video(self, identity: str) -> str:
        """File of a video, or its folder of frames."""
        return str(self.folder / identity)

    def path(self, identity: str) -> str:
        """File of a video, of a folder of frames the one in the middle."""
        path = self.video(identity)
        names = frame_files(path, IMAGE_EXTS) if os.path.isdir(path) else []
        return os.path.join(path, names[len(names) // 2]) if names else path


def open_folder(folder: Path, exts: Sequence[str], report: list[str] | None) -> VideoFolder:
    """The videos below a folder: files with these suffixes, and folders that hold images and no
    video.

    Args:
        report: see `walk`.

    Raises:
        UserError: no such folder, or one that cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    endings = tuple("." + ext.lower().lstrip(".") for ext in exts)
    of_images = tuple(f".{ext}" for ext in IMAGE_EXTS)
    found: list[str] = []
    unlisted: list[str] = []
    for parent, names in walk_folders(str(folder), unlisted, endings):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        start = "" if inside == "." else f"{inside}/"
        videos = [start + name for name in names if name.lower().endswith(endings)]
        found += videos
        if start and not videos and any(name.lower().endswith(of_images) for name in names):
            found.append(inside)
    note_unlisted(unlisted, report)
    return VideoFolder(folder, sorted(found))


def known_videos(path: Path | None) -> dict[str, Any]:
    """What an index says of each video; nothing where there is none."""
    with suppress(UserError, OSError):
        if path is not None and path.is_file():
            content = files.read_json(path)
            if content.get("format") == FORMAT:
                return dict(content["videos"])
    return {}


KEPT_EVERY = 30.0  # seconds of looking at videos that an interruption may lose


def look_at_all(
    paths: dict[str, str], reading: VideoReading, index: Path | None, report: list[str]
) -> tuple[dict[str, VideoFacts], dict[str, str]]:
    """Facts of videos, and of those that cannot be used why, both by id.

    Args:
        paths: of the videos, by id.
        index: file of what was found before, which is brought up to date; none: there is none.
        report: takes lines worth showing.
    """
    known, answers = known_videos(index), {}
    stamps = {}  # before a look: a video that changes meanwhile is looked at again
    for name, path in paths.items():
        entry = known.get(name)
        with suppress(OSError):
            stamps[name] = stamp(path)
            enough = entry and (entry["check"] or reading.check == "file")
            usable = entry and not isinstance(entry["found"], str)  # why it was not may be mended
            if entry and enough and usable and entry["stamp"] == stamps[name]:
                answers[name] = entry["found"]
    fresh = {name: path for name, path in paths.items() if name not in answers}
    check, written = reading.check == "frames", time.perf_counter()
    try:
        for name, answer in looked_at(fresh, reading):
            answers[name] = answer
            if name in stamps:
                known[name] = {"stamp": stamps[name], "check": check, "found": answer}
            if index is not None and time.perf_counter() - written > KEPT_EVERY:
                write_index(index, known, [])
                written = time.perf_counter()
    finally:  # also what was found before an interruption
        if index is not None and fresh:
            write_index(index, known, report)
    facts, broken = {}, {}
    for name in paths:
        answer = answers[name]
        if isinstance(answer, str):
            broken[name] = answer
            continue
        found = msgspec.convert(answer, VideoFacts)  # what the spec says is not kept with it
        facts[name] = found if found.fps else replace(found, fps=reading.frame_rate)
        if facts[name].frames < reading.min_frames:
            asked = f"data.reading.min_frames = {reading.min_frames}"
            broken[name] = f"{facts[name].frames} frames, fewer than {asked}"
            del facts[name]
    return facts, broken


def write_index(path: Path, known: dict[str, Any], report: list[str]) -> None:
    """Keep what is known, or say that it cannot be kept."""
    if number_of("RANK", 0):
        return
    try:
        files.make_folder(path.parent)
        files.write_json(path, {"format": FORMAT, "videos": known})
    except UserError as error:
        report.append(f"what is known of the videos is not kept ({error}): data.reading.index_file")


def looked_at(paths: dict[str, str], reading: VideoReading) -> Iterator[tuple[str, Any]]:
    """Ids of videos and their facts as builtin types, or why they cannot be used; by threads, as
    decord lets others work."""
    rate = Rate("looking at videos", len(paths), shown=number_of("RANK", 0) == 0)
    check = reading.check == "frames"
    trusted: set[str] = set()

    def look(name: str) -> dict[str, Any] | str:
        try:
            kind = "" if check or os.path.isdir(paths[name]) else str(file_type(paths[name]))
            facts = look_at(paths[name], check=check, trusted=kind in trusted)
            answer: dict[str, Any] | str = asdict(facts)
            if facts.random:
                trusted.add(facts.kind)
        except UserError as error:
            answer = str(error).removeprefix(f"{paths[name]}: ")
        except OSError as error:
            answer = error.strerror or "it cannot be read"
        rate.add(1)
        return answer

    try:
        with ThreadPoolExecutor(cores() if check else 1) as pool:
            yield from zip(paths, pool.map(look, paths), strict=True)
    finally:
        rate.close()


def order_line(facts: Sequence[VideoFacts]) -> list[str]:
    """A line on the videos whose frames are read in order."""
    kinds = Counter(each.kind for each in facts if not each.random)
    if not kinds:
        return []
    counts = [f"{count} of {kind}" for kind, count in kinds.most_common()]
    return [
        f"videos whose frames decord gives right in order alone: {listed(counts)}; each of their"
        " clips decodes all that comes before it"
    ]


def rate_line(ids: Sequence[str], facts: Sequence[VideoFacts]) -> list[str]:
    """A line on the videos whose frames have no times but by the rate in the header."""
    bare = [f"{name} ({each.fps:g})" for name, each in zip(ids, facts, strict=True)
            if each.frames > 1 and not each.timed]  # fmt: skip
    if not bare:
        return []
    return [
        "videos whose timestamps decord does not give in ascending order: their frames count as"
        f" even, so many a second as the header says: {listed(bare)}"
    ]


def short_line(
    ids: Sequence[str], facts: Sequence[VideoFacts], sampling: ClipSampling
) -> list[str]:
    """A line on the videos that are shorter than a clip."""
    short = []
    for name, each in zip(ids, facts, strict=True):
        last = sampling.frames - 1
        if sampling.fps is not None:
            last = int(each.clock.frames(np.array(last / sampling.fps)))
        elif sampling.method == "dense":
            last *= sampling.stride
        if last >= each.frames:
            short.append(f"{name} ({each.frames})")
    if not short:
        return []
    text = (
        f"{len(short)} of {len(ids)} videos have fewer frames than a clip reaches over; their last"
        f" frame is repeated: {listed(short)}"
    )
    return [with_all(text, short)]


# ------------------------------------------------------------------------------- labels of frames


def split_table(spec: VideoData, folder: VideoFolder, frames: FrameTable) -> LabelTable:
    """Splits and groups of videos where a file of labels states them, and as the label of each that
    of most of its frames."""
    table = LabelTable()
    path = Path(spec.data_root_dir) / spec.label_path if spec.reads_label_file else Path()
    if spec.split_source == "dataset_json":
        table = datalist_labels(on_disk(path), folder, labelled=False)
    elif spec.label_source == "csv" and (spec.split_source == "csv" or spec.group_column):
        table = csv_labels(
            on_disk(path),
            folder,
            path_columns=spec.path_columns,
            label_column=(),
            group_column=spec.group_column,
            split_column=spec.split_column if spec.split_source == "csv" else None,
        )
    most = {name: frames.most_frequent(name) for name in frames.segments}
    table.labels = {name: label for name, label in most.items() if label is not None}
    table.labels |= dict.fromkeys(frames.broken, (spec.class_names or ("",))[0])  # to be refused
    if spec.split_source == "kfold":  # drawn of the videos with labels, whatever has their groups
        folder.named = set(table.labels)
        table.source = str(Path(spec.data_root_dir) / spec.frames.labels_file)
    return table


# -------------------------------------------------------------------------------- the data set


@read_data_set.register
def _(spec: VideoData, *, seed: int, asked: Asked) -> Data:
    """A folder of videos."""
    base, report = Path(spec.data_root_dir), []  # type: Path, list[str]
    where = on_disk(base / spec.images_dir)
    folder = open_folder(where, spec.allowed_exts, None if spec.strict else report)
    if not folder.ids:
        exts = ", ".join(spec.allowed_exts)
        raise UserError(f"{where}: no video with a suffix of {exts}; see data.images_dir")
    of_frames, ordered = spec.frames.label_level == "frame", spec.class_names is not None
    if of_frames and asked.trained is not None and asked.trained.subtask == "framewise":
        # frames are labelled as samples of one class each
        asked = replace(asked, trained=asked.trained._replace(subtask="multiclass"))
    frames = read_frame_labels(spec, folder, report) if of_frames else None
    if frames is not None:
        spec, frames = with_class_names(spec, frames, asked)
    table_of_frames = None if frames is None else split_table(spec, folder, frames)
    index = Path(spec.index_path)

    def look(ids: list[str]) -> tuple[list[Any], dict[int, str]]:
        paths = {identity: folder.video(identity) for identity in ids}
        facts, broken = look_at_all(paths, spec.reading, index, report)
        if frames is not None:
            problems = {name: frames.problem(name, each) for name, each in facts.items()}
            broken |= {name: why for name, why in problems.items() if why is not None}
        number = {identity: place for place, identity in enumerate(ids)}
        return [facts.get(i) for i in ids], {number[name]: why for name, why in broken.items()}

    found = read_folder(
        spec,
        "multiclass" if of_frames else spec.stated_subtask() or "multiclass",
        folder,
        look,
        report,
        seed=seed,
        asked=asked,
        table=table_of_frames,
    )
    report += order_line(found.found) + rate_line(found.ids, found.found)
    report += short_line(found.ids, found.found, spec.sampling)
    if frames is None:
        report += found.untrained()
    videos = VideoTable([folder.video(i) for i in found.ids], found.found)
    splits = {
        name: found.split(name, lambda rows: VideoSource(videos, rows)) for name in found.rows
    }
    if frames is not None:
        place = {name: number for number, name in enumerate(found.class_names)}
        pairs = zip(found.ids, found.found, strict=True)
        labels = [frames.targets(name, facts, place) for name, facts in pairs]
        for name, split in splits.items():
            own = [labels[row] for row in found.rows[name]]
            splits[name] = replace(split, frames=frames_of(split.ids, split.source, own))
        if "train" in splits:
            labels = [labels[row] for row in found.rows["train"]]
            known = np.concatenate(labels)
            report += untrained(known[known != UNLABELLED], found.class_names, "multiclass")
    return Data(
        name="generic_video_dataset",
        splits=splits,
        subtask="framewise" if of_frames else found.subtask,
        class_names=found.class_names,
        ordered=ordered,
        samples=ClipSamples(channels=3, label_level=spec.frames.label_level),
        report=report,
    )


def frames_of(ids: list[str], source: Any, labels: list[np.ndarray] | None) -> VideoFrames:
    """The frames of videos, of which no clips are drawn yet.

    Args:
        ids: of the videos.
        source: of them, which tells `sizes` and `clocks`.
        labels: (F,) of each video; none: there are none.
    """
    pairs = zip(source.sizes[:, 0].tolist(), source.clocks, strict=True)
    times = [clock.seconds(np.arange(count)) for count, clock in pairs]
    return VideoFrames(ids, np.arange(len(ids)), np.empty((len(ids), 0), np.int64), times, labels)


# ---------------------------------------------------------------------------------- new videos


def unlabelled_videos(path: str, samples: ClipSamples, data: VideoData) -> tuple[Split, list[str]]:
    """New videos without labels: of a folder and all below it in sorted order, of a CSV file with
    the column data.path_column (relative to the CSV file's folder) in its order, or a single file
    or folder of frames.

    Args:
        samples: what the model takes.

    Raises:
        UserError: nothing there, no video, or, unless data.strict is false, videos that are missing
            or broken, all together.
    """
    where = on_disk(Path(path))
    if where.suffix.lower() == ".csv":
        rows = read_csv(where, data.path_columns)
        ids = [path for (path,) in paths_of(rows, data.path_columns)]
        paths = {name: str(on_disk(where.parent / name)) for name in ids}
    elif where.is_dir():
        folder = open_folder(where, data.allowed_exts, None)
        paths = {identity: folder.video(identity) for identity in folder.ids}
        if not paths and any(where.iterdir()):
            paths = {name_of(where): str(where)}
    elif where.exists():
        paths = {where.name: str(where)}
    else:
        raise UserError(f"{path}: no such file or folder, expected videos, or a CSV of their paths")
    if not paths:
        raise UserError(f"{path}: no video with a suffix of {', '.join(data.allowed_exts)}")
    report: list[str] = []
    index = None if data.reading.index_file is None else Path(data.reading.index_file)
    facts, broken = look_at_all(paths, data.reading, index, report)
    problems = Problems(data.strict, "video")
    for name, why in broken.items():
        problems.add(name, why)
    problems.settle(report)
    if not facts:
        raise problems.error("cannot be used, which leaves none:")
    ids = [name for name in paths if name in facts]
    found = [facts[name] for name in ids]
    table = VideoTable([paths[name] for name in ids], found)
    report += order_line(found) + rate_line(ids, found) + short_line(ids, found, data.sampling)
    split = Split(ids, None, VideoSource(table, np.arange(len(ids))))
    if samples.label_level == "frame":
        split = replace(split, frames=frames_of(split.ids, split.source, None))
    return split, report
