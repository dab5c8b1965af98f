"""Data sets of videos: labels, splits, what is broken, labels of frames, new videos, the index."""

import csv
import io
import json
import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
from video_files import number_of, numbered, write_frames, write_sound, write_video

from glovita_lib import data_video
from glovita_lib.data import ClipSamples, Outputs, subset
from glovita_lib.data_video import unlabelled_videos
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.spec_data import VideoData
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_video import ClipSampling, FrameLabels, VideoReading

pytest.importorskip("av")
pytest.importorskip("decord")

COUNT = 12  # videos


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve videos of two classes, in files of two containers and folders of frames; the frames
    of video i are numbered from 10 i."""
    root = tmp_path_factory.mktemp("made")
    for i in range(COUNT):
        folder = root / "videos" / ("walk", "run")[i % 2]
        frames = numbered(8 + i, first=10 * i, seed=i)
        if i < 4:
            write_frames(folder / f"v{i}", frames)
        else:
            write_video(folder / f"v{i}{('.mp4', '.mpg')[i // 2 % 2]}", frames, codec=codec(i))
    return root


def codec(i):
    return ("libx264", "mpeg1video")[i // 2 % 2]


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def build(root, trained=None, **fields):
    fields = {"split_source": "kfold", "label_source": "folder"} | fields
    if fields["split_source"] == "kfold":
        fields["n_folds"] = 3
    asked = {} if trained is None else {"trained": trained}
    return build_data(VideoData(data_root_dir=str(root), **fields), seed=0, **asked)


def names(root):
    found = (path.relative_to(root / "videos") for path in (root / "videos").glob("*/*"))
    return sorted(str(path) for path in found if not path.name.startswith("."))


def table(root, rows, *columns, name="labels.csv"):
    with open(root / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


def test_files_and_folders_of_frames_are_videos(root):
    data = build(root)
    assert sorted(i for split in data.splits.values() for i in split.ids) == names(root)
    assert data.class_names == ("run", "walk") and data.samples == ClipSamples(channels=3)
    for split in data.splits.values():
        for row, (identity, view) in enumerate(
            zip(split.ids, split.source.windows(np.arange(len(split))), strict=True)
        ):
            i = int(identity.partition("/v")[2].partition(".")[0])
            assert view.shape == (3, 8 + i, 64, 96)
            first, last = view.read(np.array([0, 7 + i]))
            assert [number_of(first), number_of(last)] == [10 * i, 11 * i + 7]
            assert data.class_names[split.targets[row]] == identity.partition("/")[0]
            assert (view.loaded().read(np.array([3])) == view.read(np.array([3]))).all()
    assert any("in order alone: 4 of mpeg" in line for line in data.report)


def test_tables_and_groups(root):
    ids = names(root)
    rows = [(i, n % 3, f"p{n // 2}", ("train", "val", "test")[n % 3]) for n, i in enumerate(ids)]
    table(root, rows, "video", "action", "person", "part")
    fields = {"label_source": "csv", "label_column": "action", "path_column": "video"}
    data = build(root, **fields, split_source="csv", split_column="part")
    assert {name: split.ids for name, split in data.splits.items()} == {
        name: [row[0] for row in rows if row[3] == name] for name in ("train", "val", "test")
    }
    assert data.class_names == ("0", "1", "2")
    data = build(root, **fields, group_column="person")
    groups = [set(split.groups) for split in data.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6
    (root / "labels.json").write_text(json.dumps(dict(zip(ids, "abcabcabcabc", strict=True))))
    (root / "splits.json").write_text(
        json.dumps({"train": ids[:8], "val": ids[8:10], "test": ids[10:]})
    )
    data = build(root, label_source="json", split_source="splits_json")
    assert data.splits["test"].ids == ids[10:]


def test_everything_that_is_broken_stands_in_one_report(root):
    walk = root / "videos" / "walk"
    write_video(walk / "short.mp4", 3)
    (walk / "empty.mp4").touch()
    (walk / "text.mp4").write_text("no video")
    (walk / "flash.swf").write_bytes(b"FWS" + bytes(40))
    (walk / "theora.ogv").write_bytes(b"OggS" + bytes(40))
    write_sound(walk / "sound.mp4")
    write_video(walk / "stream.ts", 20, container="mpegts")
    cut = write_video(walk / "cut.mkv", 30).read_bytes()
    (walk / "cut.mkv").write_bytes(cut[: len(cut) // 2])
    broken = bytearray(write_video(walk / "frame.mp4", 40).read_bytes())
    middle = broken.find(b"mdat") + len(broken) // 3
    broken[middle : middle + 900] = b"\x5a" * 900
    (walk / "frame.mp4").write_bytes(broken)
    write_frames(walk / "pictures", 4)
    (walk / "pictures" / "frame2.png").write_bytes(b"\x89PNG")
    lines = {
        "empty.mp4": "an empty file",
        "text.mp4": "text, no video",
        "flash.swf": "Flash",
        "theora.ogv": "decord does not read Ogg",
        "sound.mp4": "it cannot be decoded",
        "stream.ts": "of an MPEG transport stream",
        "cut.mkv": "cut off",
        "frame.mp4": "it cannot be decoded",
        "pictures": "frame2.png",
    }
    with pytest.raises(UserError, match="9 videos cannot be used") as raised:
        build(root)
    text = str(raised.value)
    assert all(
        f"walk/{name}: {part}" in text for name, part in lines.items() if name != "flash.swf"
    )
    assert len(text.splitlines()) == 10
    data = build(root, strict=False)
    left = {i for split in data.splits.values() for i in split.ids}
    assert left == {*names(root)} - {f"walk/{name}" for name in lines}
    assert sum("9 videos left out" in line for line in data.report) == 1
    with pytest.raises(UserError, match=r"10 videos.*(.|\n)*short\.mp4: 3 frames, fewer than"):
        build(root, reading=VideoReading(min_frames=4))


def test_what_is_known_is_kept_until_a_file_changes(root, monkeypatch):
    build(root)
    looked = []
    real = data_video.look_at

    def watched(path, **options):
        looked.append(path)
        return real(path, **options)

    monkeypatch.setattr(data_video, "look_at", watched)
    build(root)
    assert not looked
    build(root, reading=VideoReading(check="file"))  # less is asked than is known
    assert not looked
    write_video(root / "videos" / "walk" / "v8.mp4", 30)
    (root / "videos" / "walk" / "v0" / "frame8.png").write_bytes(
        (root / "videos" / "walk" / "v0" / "frame0.png").read_bytes()
    )
    data = build(root)
    assert sorted(path.rpartition("/")[2] for path in looked) == ["v0", "v8.mp4"]
    sizes = {i: s for p in data.splits.values() for i, s in zip(p.ids, p.source.sizes, strict=True)}
    assert sizes["walk/v8.mp4"][0] == 30 and sizes["walk/v0"][0] == 9
    frame = root / "videos" / "walk" / "v0" / "frame3.png"
    for content in (b"no frame", frame.read_bytes()):  # in place: the folder does not change
        looked.clear()
        frame.write_bytes(content)
        if content == b"no frame":
            with pytest.raises(UserError, match="v0: frame3.png"):
                build(root)
        else:
            build(root)
        assert [path.rpartition("/")[2] for path in looked] == ["v0"]
    looked.clear()
    monkeypatch.setattr("decord.__version__", "another")  # may give other frames of files
    build(root)
    assert looked and all(path.endswith((".mp4", ".mpg")) for path in looked), looked
    (root / "video_index.json").write_text("{ broken")
    looked.clear()
    build(root)
    assert len(looked) == COUNT


def test_the_frame_rate_of_folders_is_that_of_the_spec_whatever_was_known_before(root, tmp_path):
    """Also of new videos, with an index of their own."""
    video, samples = "walk/v0", ClipSamples(channels=3)
    for rate in (25.0, 10.0, 12.5, 25.0):
        data = build(root, reading=VideoReading(frame_rate=rate))
        found = {
            identity: clock
            for split in data.splits.values()
            for identity, clock in zip(split.ids, split.source.clocks, strict=True)
        }
        assert found[video].seconds(np.array([5])) == 5 / rate
        reading = VideoReading(frame_rate=rate, index_file=str(tmp_path / "new.json"))
        spec = VideoData(data_root_dir=str(root), reading=reading)
        new, _ = unlabelled_videos(str(root / "videos" / video), samples, spec)
        assert new.source.clocks[0].fps == rate


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_what_was_found_before_an_interruption_is_kept(root, monkeypatch, every):
    """Now and then, and where the interruption is noticed."""
    looked, real, written = [], data_video.look_at, data_video.write_index

    def interrupted(path, **options):
        looked.append(path)
        if len(looked) > 5:
            raise KeyboardInterrupt
        return real(path, **options)

    def killed(path, known, report):
        if len(looked) <= 5:  # what a kill leaves
            written(path, known, report)

    monkeypatch.setattr(data_video, "cores", lambda: 1)
    monkeypatch.setattr(data_video, "KEPT_EVERY", every)
    monkeypatch.setattr(data_video, "look_at", interrupted)
    if every == 0:
        monkeypatch.setattr(data_video, "write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        build(root)
    monkeypatch.setattr(data_video, "look_at", lambda *a, **o: looked.append(a) or real(*a, **o))
    looked.clear()
    build(root)
    assert len(looked) < COUNT if every == 0 else len(looked) == COUNT - 5


def test_headers_alone_are_looked_at_where_that_is_asked(root):
    """One file of each type is compared; a broken frame shows when it is read."""
    write_video(root / "videos" / "run" / "b.mkv", 20, codec="mpeg4")
    write_video(root / "videos" / "run" / "c.mkv", 20, codec="mpeg4")
    data = build(root, reading=VideoReading(check="file"))
    assert any("2 of matroska/mpeg4" in line for line in data.report)


@pytest.mark.parametrize("first", ["closed", "open"])
def test_one_file_does_not_speak_for_those_of_other_encoders(tmp_path, first):
    """Closed and open groups in files of one type, whichever is looked at first."""
    options = {"x264-params": "open-gop=1:bframes=3"}
    second = {"closed": "open", "open": "closed"}[first]
    paths = {name: str(tmp_path / f"{name}.mp4") for name in (first, second)}
    for name, path in paths.items():
        write_video(path, 40, options=options if name == "open" else None)
    facts, broken = data_video.look_at_all(paths, VideoReading(check="file"), None, [])
    assert not broken and facts["closed"].random and not facts["open"].random


# ---------------------------------------------------------------------- labels of frames

FRAMES = FrameLabels(label_level="frame")


def labelled(data):
    """Labels of the frames of every video, by id; "" where there is none."""
    words = {**dict(enumerate(data.class_names)), UNLABELLED: ""}
    return {
        identity: [words[number] for number in split.frames.labels[video].tolist()]
        for split in data.splits.values()
        for identity, video in zip(split.ids, split.frames.video_of, strict=True)
    }


def test_segments_frames_and_files_say_the_same(root):
    ids = names(root)
    lengths = {i: 8 + int(i.partition("/v")[2].partition(".")[0]) for i in ids}
    wanted = {i: ["in"] * 3 + ["", "out"] + ["rare"] * (lengths[i] - 5) for i in ids}
    segments = [
        row for i in ids for row in ((i, 0, 3, "in"), (i, 4, 5, "out"), (i, 5, lengths[i], "rare"))
    ]
    table(root, segments, "path", "start", "end", "label", name="frames.csv")
    data = build(root, frames=FRAMES)
    assert data.subtask == "framewise" and data.class_names == ("in", "out", "rare")
    assert labelled(data) == wanted
    seconds = [(i, start / 25, end / 25, label) for i, start, end, label in segments]
    table(root, seconds, "path", "start", "end", "label", name="seconds.csv")
    unit = FrameLabels(label_level="frame", labels_file="seconds.csv", unit="seconds")
    assert labelled(build(root, frames=unit)) == wanted
    for late in (-0.4, 0.4):  # of a frame: most of it still lies within
        moved = [(i, a + late / 25, b + late / 25, label) for i, a, b, label in seconds]
        moved = [(i, max(a, 0.0), b, label) for i, a, b, label in moved]
        table(root, moved, "path", "start", "end", "label", name="seconds.csv")
        assert labelled(build(root, frames=unit)) == wanted
    rows = [(i, n, label) for i in ids for n, label in enumerate(wanted[i]) if label]
    table(root, rows, "path", "frame", "label", name="each.csv")
    each = FrameLabels(label_level="frame", labels_file="each.csv")
    assert labelled(build(root, frames=each)) == wanted
    for i in ids:
        path = root / "each" / i
        path = path if i.endswith(("v0", "v1", "v2", "v3")) else path.with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text("\n".join(wanted[i]) + "\n")
    found = build(root, frames=FrameLabels(label_level="frame", labels_file="each"))
    assert labelled(found) == wanted
    part = subset(found.splits["train"], np.array([1]))
    assert part.frames.labels[part.frames.video_of[0]].shape == (lengths[part.ids[0]],)


def test_videos_with_labels_of_frames_are_split_as_samples_are(root):
    """By every source of splits, under any names of columns, and of a share of train."""
    ids = names(root)
    rows = [(i, n, f"{n % 2}") for i in ids for n in range(8)]
    table(root, rows, "video", "frame", "state", name="frames.csv")
    columns = {"path_column": "video", "label_column": "state", "frames": FRAMES}
    parts = {"train": ids[:8], "val": ids[8:10], "test": ids[10:]}
    listed = {name: [{"image": i} for i in part] for name, part in parts.items()}
    listed["test"] = parts["test"]  # a list of paths, as Decathlon's
    (root / "dataset.json").write_text(json.dumps(listed | {"modality": {"0": "RGB"}}))
    (root / "splits.json").write_text(json.dumps(parts))
    placed = [(i, name) for name, part in parts.items() for i in part]
    table(root, placed, "video", "split")
    for labels, source in (
        ("dataset_json", "dataset_json"),
        ("csv", "csv"),
        ("json", "splits_json"),
        ("folder", "splits_json"),
        ("dataset_json", "splits_json"),
    ):
        data = build(root, label_source=labels, split_source=source, **columns)
        assert {name: split.ids for name, split in data.splits.items()} == parts
        assert data.splits["val"].frames.labels[0][:4].tolist() == [0, 1, 0, 1]
    for stratified in (True, False):
        some = build(root, **columns, data_fraction=0.5, stratified=stratified)
        assert len(some.splits["train"]) == len(some.splits["train"].frames.video_of) == 2
    with pytest.raises(UserError, match=r"data.group_column.*only with data.label_source = .csv."):
        build(root, **columns, label_source="json", group_column="video")


@pytest.mark.parametrize("labels", ["json", "folder", "csv"])
def test_folds_are_of_all_videos_with_labels_of_frames(root, labels):
    """Those without are told, whatever the file of groups says; where all have one, nothing is."""
    ids = names(root)
    table(
        root, [(i, n, "a") for i in ids for n in range(8)], "path", "frame", "label", name="f.csv"
    )
    fields = {
        "label_source": labels,
        "frames": FrameLabels(label_level="frame", labels_file="f.csv"),
    }
    if labels == "csv":
        fields["group_column"] = "of"
        group = {i: f"person {place % 6}" for place, i in enumerate(ids)}
        table(root, [*group.items()], "path", "of")
    whole = build(root, **fields)
    if labels == "csv":  # nobody is in two splits
        places = [(group[i], name) for name, split in whole.splits.items() for i in split.ids]
        assert len(set(places)) == 6 == len(set(group.values()))
        assert all(
            [*split.groups] == [group[i] for i in split.ids] for split in whole.splits.values()
        )
    assert sum(len(split.ids) for split in whole.splits.values()) == COUNT
    assert not [line for line in whole.report if "not used" in line]
    rows = [(i, n, "a") for i in ids[2:] for n in range(8)]
    table(root, rows, "path", "frame", "label", name="f.csv")
    some = build(root, **fields)
    assert sum(len(split.ids) for split in some.splits.values()) == COUNT - 2
    (line,) = [line for line in some.report if "not used" in line]
    assert line == f"2 videos of {root}/videos are not in {root}/f.csv: not used"


@pytest.mark.parametrize("missing", ["NA", "n/a", "None", "?", "null", "#N/A"])
def test_words_for_a_missing_label_are_no_class(root, missing):
    """Of a table or a JSON file; a folder may be called so."""
    ids = names(root)
    labels = {i: missing if place == 2 else "ab"[place % 2] for place, i in enumerate(ids)}
    table(root, [*labels.items()], "path", "label")
    (root / "labels.json").write_text(json.dumps(labels))
    for source in ("csv", "json"):
        with pytest.raises(UserError) as error:
            build(root, label_source=source)
        line = (
            f'  {ids[2]}: no label ("{missing}"): name it in data.class_names where it is a class'
        )
        assert str(error.value).splitlines()[1:] == [line]
        some = build(root, label_source=source, strict=False)
        assert some.class_names == ("a", "b")
        named = build(root, label_source=source, class_names=("a", "b", missing))
        assert sum(map(len, named.splits.values())) == len(ids)


@pytest.mark.parametrize("missing", ["NA", "None", "?", "NaN"])
@pytest.mark.parametrize("form", ["segments", "frames", "txt", "npy"])
def test_words_for_a_missing_label_are_no_class_of_frames(root, missing, form):
    """Unless the spec or the trained model has such a class, or the spec says that they count for
    nothing."""
    ids = names(root)
    lengths = {i: 8 + int(i.partition("/v")[2].partition(".")[0]) for i in ids}
    labels = {i: ["a"] * 4 + [missing] + ["none"] * (lengths[i] - 5) for i in ids}
    file = {"segments": "f.csv", "frames": "f.csv"}.get(form, "each")
    if form == "segments":
        rows = [
            row
            for i in ids
            for row in ((i, 0, 4, "a"), (i, 4, 5, missing), (i, 5, lengths[i], "none"))
        ]
        table(root, rows, "path", "start", "end", "label", name=file)
    elif form == "frames":
        rows = [(i, n, label) for i in ids for n, label in enumerate(labels[i])]
        table(root, rows, "path", "frame", "label", name=file)
    for i in ids if file == "each" else ():
        path = root / "each" / os.path.splitext(i)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text("\n".join(labels[i]) + "\n")
        if form == "npy":
            np.save(path.with_suffix(".npy"), np.array(labels[i]))
    frames = FrameLabels(label_level="frame", labels_file=file)
    with pytest.raises(UserError, match=re.escape(f'{file}: frames have no label ("{missing}" of')):
        build(root, frames=frames)
    nothing = FrameLabels(label_level="frame", labels_file=file, unlabelled=("", missing))
    data = build(root, frames=nothing)
    assert data.class_names == ("a", "none")
    wanted = {i: ["" if label == missing else label for label in labels[i]] for i in ids}
    assert labelled(data) == wanted
    classes = ("a", "none", missing)
    assert labelled(build(root, frames=frames, class_names=classes)) == labels
    trained = Outputs(class_names=classes, subtask="framewise")
    assert labelled(build(root, frames=frames, trained=trained)) == labels


def test_videos_that_only_the_labels_of_frames_name_are_told(root):
    rows = [(i, n, "ab"[n % 2]) for i in [*names(root), "x.mp4", "y.mp4"] for n in range(8)]
    table(root, rows, "path", "frame", "label", name="f.csv")
    data = build(root, frames=FrameLabels(label_level="frame", labels_file="f.csv"))
    (line,) = [line for line in data.report if "are not there" in line]
    assert line.startswith("2 videos of ") and line.endswith("(x.mp4, y.mp4): not used")


def test_numbers_of_frames_without_a_label_count_for_nothing_in_any_writing(root):
    """A table with gaps has decimals where it had whole numbers."""
    rows = [(i, n, f"{(n % 3) - 1:.1f}") for i in names(root) for n in range(8)]
    table(root, rows, "path", "frame", "label", name="f.csv")
    frames = FrameLabels(label_level="frame", labels_file="f.csv")
    data = build(root, frames=frames)
    assert data.class_names == ("0.0", "1.0")
    assert all(found[:3] == ["", "0.0", "1.0"] for found in labelled(data).values())


def test_a_group_of_another_name_is_one_problem_of_its_video(root):
    """Groups of names without the suffix, or with one that the video has not."""
    ids = names(root)
    table(
        root, [(i, n, "a") for i in ids for n in range(8)], "path", "frame", "label", name="f.csv"
    )
    frames = FrameLabels(label_level="frame", labels_file="f.csv")
    for change in (lambda i: i.rpartition(".")[0] or i, lambda i: f"{i.rpartition('.')[0] or i}.x"):
        table(root, [(change(i), "p") for i in ids], "path", "of")
        wrong = [i for i in ids if change(i) != i]
        with pytest.raises(UserError) as error:
            build(root, label_source="csv", frames=frames, group_column="of")
        head, *lines = str(error.value).splitlines()
        assert head.startswith(f"{len(wrong)} videos cannot be used")
        said = [f'  {i}: no group in column of; the table has "{change(i)}": write' for i in wrong]
        assert len(wrong) > 3 and all(
            any(line.startswith(start) for line in lines) for start in said
        )


@pytest.mark.parametrize(
    ("sampling", "short"),
    [
        ({"frames": 9}, "walk/v0 (8)"),
        ({"frames": 9, "method": "uniform"}, "walk/v0 (8)"),
        ({"frames": 5, "stride": 2}, "walk/v0 (8)"),
        ({"frames": 5, "fps": 12.5}, "walk/v0 (8)"),
        ({"frames": 8}, None),
        ({"frames": 4, "stride": 2}, None),
    ],
)
def test_videos_that_are_shorter_than_a_clip_are_told(root, sampling, short):
    sampling = ClipSampling(**sampling)
    _, new = unlabelled_videos(
        str(root / "videos"), ClipSamples(channels=3), VideoData(sampling=sampling)
    )
    for report in (build(root, sampling=sampling).report, new):
        told = [line for line in report if "fewer frames than a clip reaches over" in line]
        assert len(told) == (short is not None)
        assert not told or (told[0].startswith("1 of 12 videos") and told[0].endswith(short))


@pytest.mark.parametrize(("frames", "fps", "short"), [(12, 10, 0), (14, 10, 0), (15, 10, 1)])
def test_length_of_a_clip_in_videos_of_a_variable_frame_rate(tmp_path, frames, fps, short):
    """The last of eight frames is shown from 1.36 s to 1.4 s, as long as the one before."""
    times = np.array([0, 100, 200, 1200, 1240, 1280, 1320, 1360])  # ms
    for i in range(6):
        write_video(tmp_path / "videos" / "ab"[i % 2] / f"v{i}.mp4", 8, times=times)
    sampling = ClipSampling(frames=frames, fps=fps)
    _, new = unlabelled_videos(
        str(tmp_path / "videos"), ClipSamples(channels=3), VideoData(sampling=sampling)
    )
    for report in (build(tmp_path, sampling=sampling).report, new):
        told = [line for line in report if "fewer frames than a clip reaches over" in line]
        assert len(told) == short and all(line.startswith("6 of 6 videos") for line in told)


def test_what_a_label_of_a_frame_means_is_decided_as_that_of_a_sample(root):
    """Numbers are places in class_names that have no numbers, also as arrays with decimals; names
    are equal in either Unicode form, in files whose names are in either."""
    ids, kinds = names(root), (np.int64, np.float32, str)
    (root / "each" / "run").mkdir(parents=True), (root / "each" / "walk").mkdir()
    wanted = {}
    for place, identity in enumerate(ids):
        count = 8 + int(identity.partition("/v")[2].partition(".")[0])
        numbers = np.arange(count) % 4
        wanted[identity] = ["", *"abc"]
        wanted[identity] = [wanted[identity][number] for number in numbers]
        path = root / "each" / os.path.splitext(identity)[0]
        values = np.where(numbers == 0, -1, numbers - 1)
        if (kind := kinds[place % 3]) is str:
            path.with_suffix(".txt").write_text("\n".join(map(str, values)))
        elif kind is np.float32:
            np.save(path, np.where(values == -1, np.nan, values))
        else:
            np.save(path, values.astype(kind))
    each = FrameLabels(label_level="frame", labels_file="each")
    data = build(root, frames=each, class_names=("a", "b", "c"))
    assert labelled(data) == wanted and data.class_names == ("a", "b", "c")
    assert labelled(build(root, frames=each)) == {
        name: [str("abc".index(word)) if word else "" for word in words]
        for name, words in wanted.items()
    }
    with pytest.raises(UserError, match='label not in class list: "2"'):
        build(root, frames=each, class_names=("a", "b"))


def test_classes_of_frames_in_either_unicode_form(root):
    nfc, nfd = (unicodedata.normalize(form, "Rühr") for form in ("NFC", "NFD"))
    folder = root / "videos" / "walk"
    (folder / "v8.mp4").rename(folder / unicodedata.normalize("NFC", "ü8.mp4"))
    ids = names(root)
    (root / "each" / "run").mkdir(parents=True), (root / "each" / "walk").mkdir()
    for place, identity in enumerate(ids):
        digits = "".join(c for c in identity.partition(".")[0] if c.isdigit())
        words = [(nfc, nfd)[place % 2], "x"] * 20
        path = root / "each" / unicodedata.normalize("NFD", os.path.splitext(identity)[0])
        path.with_suffix(".txt").write_text("\n".join(words[: 8 + int(digits)]))
    each = FrameLabels(label_level="frame", labels_file="each")
    data = build(root, frames=each, strict=True)
    assert set(map(len, labelled(data).values())) == set(range(8, 20))
    assert data.class_names in ((nfc, "x"), (nfd, "x"))
    for words in labelled(data).values():
        assert words == [*data.class_names] * (len(words) // 2) + [data.class_names[0]] * (
            len(words) % 2
        )
    trained = Outputs("framewise", (nfd, "x"))
    cohort = build(root, frames=each, trained=trained)
    assert cohort.class_names == (nfd, "x") and "" not in sum(labelled(cohort).values(), [])


def test_seconds_are_those_of_the_container_where_the_frame_rate_varies(tmp_path):
    """Frames of a label are those most of which is shown within its times; predictions, clips and
    the index know the times, in a second start too."""
    times = np.array([0, 100, 200, 1200, 1240, 1280, 1320, 1360])  # ms
    for i in range(6):
        write_video(tmp_path / "videos" / f"v{i}.mp4", 8, times=times)
    ids = [f"v{i}.mp4" for i in range(6)]
    rows = [row for i in ids for row in ((i, 0, 1.2, "early"), (i, 1.2, 1.4, "late"))]
    table(tmp_path, rows, "path", "start", "end", "label", name="seconds.csv")
    unit = FrameLabels(label_level="frame", labels_file="seconds.csv", unit="seconds")
    for _ in range(2):
        data = build(tmp_path, frames=unit)
        split = data.splits["train"]
        assert set(map(tuple, labelled(data).values())) == {("early",) * 3 + ("late",) * 5}
        assert all(own == pytest.approx(times / 1000) for own in split.frames.times)
        (view,) = split.source.windows(np.array([0]))
        assert view.clock.seconds(np.arange(8)) == pytest.approx(times / 1000)
        assert view.loaded().clock.seconds(np.array([3])) == pytest.approx([1.2])


def test_labels_that_do_not_fit_are_refused(root):
    (first, *_) = ids = names(root)
    rows = [(i, 0, 400 if i == first else 5, "a") for i in ids]
    table(root, rows, "path", "start", "end", "label", name="frames.csv")
    with pytest.raises(UserError, match=rf"{first}: a label up to 400, it ends at"):
        build(root, frames=FRAMES)
    table(root, [(i, 0, 2.5, "a") for i in ids], "path", "start", "end", "label", name="frames.csv")
    with pytest.raises(UserError, match="must be whole numbers"):
        build(root, frames=FRAMES)
    table(root, [(i, "a") for i in ids], "path", "label", name="frames.csv")
    with pytest.raises(UserError, match='neither a column "frame"'):
        build(root, frames=FRAMES)
    (root / "frames.csv").unlink()
    with pytest.raises(UserError, match="no such file or folder"):
        build(root, frames=FRAMES)
    (root / "files" / "walk").mkdir(parents=True)
    (root / "files" / "walk" / "v8.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="2 labels of frames, 16 frames"):
        build(root, frames=FrameLabels(label_level="frame", labels_file="files"), strict=True)
    table(root, [(i[:-4], 0, 3, "a") for i in ids], "path", "start", "end", "label", name="f.csv")
    with pytest.raises(
        UserError, match=r"no row names a video; its column .path. has ru, run/v11, run/v5"
    ):
        build(root, frames=FrameLabels(label_level="frame", labels_file="f.csv"))


def test_a_frame_with_two_labels_is_refused(root):
    (first, second, *_) = ids = names(root)
    rows = [(i, 0, 5, "a") for i in ids] + [(i, 5, 8, "b") for i in ids]
    twice = [(first, 4, 6, "b"), (second, 4, 5, "a"), (second, 6, 7, "-1")]
    for unit, factor in (("frames", 1), ("seconds", 1 / 25)):
        each = [(i, a * factor, b * factor, label) for i, a, b, label in rows + twice]
        table(root, each, "path", "start", "end", "label", name="frames.csv")
        fields = FrameLabels(label_level="frame", unit=unit)
        with pytest.raises(UserError) as told:
            build(root, frames=fields)
        assert str(told.value).splitlines()[1:] == [f"  {first}: frame 4 has the labels a, b"]
        left = build(root, frames=fields, strict=False)
        assert first not in labelled(left) and second in labelled(left)


FILES = {  # of labels of the frames of a video: what it is called and holds, by the labels
    "lines": lambda words: ("txt", "\n".join(words) + "\n"),
    "an empty line at the end": lambda words: ("txt", "\n".join(words) + "\n\n"),
    "with a byte-order mark": lambda words: ("txt", "\ufeff" + "\r\n".join(words) + "\r\n"),
    "quoted": lambda words: ("csv", "label\n" + "\n".join(f'"{word}"' for word in words)),
    "one column": lambda words: ("csv", "\n".join(f'"{word}"' for word in words)),
    "numbered": lambda words: ("csv", "frame;label\n" + "\n".join(
        f'{i};"{word}"' for i, word in reversed(list(enumerate(words))))),
    "tabs": lambda words: ("txt", "frame\tlabel\n" + "\n".join(
        f"{i}\t{word}" for i, word in enumerate(words) if word)),
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_files_of_labels(root, form):
    wanted = {}
    for identity in names(root):
        count = 8 + int(identity.partition("/v")[2].partition(".")[0])
        wanted[identity] = ["a, left", "b", "b", *["c"] * (count - 4), ""]
        suffix, text = FILES[form](wanted[identity])
        path = root / "each" / f"{os.path.splitext(identity)[0]}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    each = FrameLabels(label_level="frame", labels_file="each")
    assert labelled(build(root, frames=each, strict=True)) == wanted


def test_files_of_labels_that_are_broken_are_listed(root):
    (root / "each" / "run").mkdir(parents=True), (root / "each" / "walk").mkdir()
    broken = [
        ("npy", b"no array", "not an array"),
        ("npy", saved(np.array(["a"] * 9, object)), "not an array"),
        ("npy", saved(np.eye(9)), r"labels of shape \(9, 9\)"),
        ("csv", b"0,a\n1,b\n", 'no column "label"; columns are 0, a'),
        ("csv", b"frame,label\n0,a\n-1,b\n", '"-1" is no number of a frame'),
        ("csv", b"phase\n" + b"a\n" * 40, "41 labels of frames, 19 frames$"),
        (
            "csv",
            b"phase\n" + b"a\n" * 8,
            "9 labels of frames, 8 frames; name the column of a header",
        ),
    ]
    ids = sorted(names(root), key=lambda name: -frames_in(name))
    for identity, (suffix, content, _) in zip([*ids[5::-1], ids[-1]], broken, strict=True):
        path = root / "each" / f"{os.path.splitext(identity)[0]}.{suffix}"
        path.write_bytes(content)
    for identity in (rest := ids[6:-1]):
        path = root / "each" / f"{os.path.splitext(identity)[0]}.txt"
        path.write_text("a\n" * frames_in(identity))
    each = FrameLabels(label_level="frame", labels_file="each")
    with pytest.raises(UserError) as told:
        build(root, frames=each)
    lines = str(told.value).splitlines()
    assert len(lines) == 8
    for _, _, words in broken:
        assert any(re.search(words, line) for line in lines), words
    assert set(labelled(build(root, frames=each, strict=False))) == set(rest)


def frames_in(identity):
    return 8 + int(identity.partition("/v")[2].partition(".")[0])


def saved(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def test_classes_without_a_training_frame_are_told(root):
    """Whatever most frames of a video are."""
    rows = [row for i in names(root) for row in ((i, 0, 3, "few"), (i, 3, 8, "many"))]
    table(root, rows, "path", "start", "end", "label", name="frames.csv")
    assert not any("without a training" in line for line in build(root, frames=FRAMES).report)
    train = build(root, frames=FRAMES).splits["train"].ids
    rows = [row for row in rows if row[3] == "many" or row[0] not in train]
    table(root, rows, "path", "start", "end", "label", name="frames.csv")
    assert "classes without a training sample: few" in build(root, frames=FRAMES).report


# ---------------------------------------------------------------------- new videos


def test_new_videos(root, tmp_path):
    samples, spec = ClipSamples(channels=3), VideoData()
    split, _ = unlabelled_videos(str(root / "videos"), samples, spec)
    assert split.ids == names(root) and split.targets is None and split.frames is None
    one, _ = unlabelled_videos(str(root / "videos" / "walk" / "v8.mp4"), samples, spec)
    assert one.ids == ["v8.mp4"]
    folder, _ = unlabelled_videos(str(root / "videos" / "walk" / "v0"), samples, spec)
    assert folder.ids == ["v0"] and folder.source.sizes.tolist() == [[8, 64, 96]]
    table(root, [["videos/walk/v8.mp4"], ["videos/run/v1"]], "path", name="new.csv")
    some, _ = unlabelled_videos(str(root / "new.csv"), samples, spec)
    assert some.ids == ["videos/walk/v8.mp4", "videos/run/v1"]
    frames = ClipSamples(channels=3, label_level="frame")
    with_frames, _ = unlabelled_videos(str(root / "videos"), frames, spec)
    assert with_frames.frames.labels is None and len(with_frames.frames.times) == COUNT
    assert not (tmp_path / "video_index.json").exists()
    (root / "videos" / "walk" / "bad.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 video cannot be used(.|\n)*bad\.mp4"):
        unlabelled_videos(str(root / "videos"), samples, spec)
    _, notes = unlabelled_videos(str(root / "videos"), samples, VideoData(strict=False))
    assert "1 video left out" in notes[0]
    with pytest.raises(UserError, match="no such file or folder"):
        unlabelled_videos(str(tmp_path / "none"), samples, spec)
