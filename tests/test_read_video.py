"""Reading of videos: frames are the right ones in every container, or the file is refused."""

import gc
import os
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from video_files import number_of, numbered, write_frames, write_sound, write_video

from glovita_lib import read_video
from glovita_lib.data_video import rate_line
from glovita_lib.errors import UserError
from glovita_lib.read_container import FileType, container_of, file_type
from glovita_lib.read_video import LOOK, Clock, look_at, read_frames, timed

pytest.importorskip("av")
pytest.importorskip("decord")

CONTAINERS = {  # name: codec, container, kind, whether decord is right at random
    "a.mp4": ("libx264", None, "mp4/h264", True),
    "a.mkv": ("libx264", None, "matroska/h264", True),
    "a.mov": ("libx264", None, "mp4/h264", True),
    "a.webm": ("libvpx-vp9", None, "matroska/vp9", True),
    "h264.flv": ("libx264", None, "flv", None),
    "mpeg4.mp4": ("mpeg4", None, "mp4/mpeg4", False),
    "a.avi": ("mpeg4", None, "avi/mpeg4", False),
    "h264.avi": ("libx264", None, "avi/h264", False),
    "a.mpg": ("mpeg1video", None, "mpeg", False),
    "a.vob": ("mpeg2video", "vob", "mpeg", False),
    "mpeg2.mkv": ("mpeg2video", None, "matroska/mpeg2", False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def look(path, check=True, trusted=False):
    return look_at(str(path), check=check, trusted=trusted)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_frame_is_the_one_that_was_asked_for(folder, name):
    codec, container, kind, random = CONTAINERS[name]
    path = str(write_video(folder / name, 40, codec=codec, container=container))
    facts = look(path)
    assert (facts.kind, facts.frames, facts.height, facts.width) == (kind, 40, 64, 96)
    assert random is None or facts.random == random
    assert facts.fps == pytest.approx(25, rel=1e-3)
    rng = np.random.default_rng(0)
    for size in (None, (32, 48)):
        for wanted in ([39], rng.permutation(40)[:9], [5, 5, 0, 39, 5], np.arange(12, 20), [3, 20]):
            frames = read_frames(path, facts, wanted, size)
            assert frames.shape[1:] == (*(size or (64, 96)), 3) and frames.dtype == np.uint8
            assert [number_of(frame) for frame in frames] == list(wanted)


def scenes(ends):
    """Frames with their numbers, that change wholly at these."""
    parts = enumerate(pairwise([0, *ends]))
    return [f for n, (a, b) in parts for f in numbered(b - a, first=a, seed=n)]


OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}


@pytest.mark.parametrize("name", ["open.mp4", "open.mkv", "open.mov"])
def test_a_file_with_open_groups_among_closed_ones_is_read_in_order(folder, name):
    """Key frames at 12, 21, 36 and 42 of which all but 21 are cuts to another scene."""
    path = str(write_video(folder / name, scenes([12, 36, 42, 50]), options=OPEN_GROUPS))
    keys = read_video.open_reader(path, None).get_key_indices()
    assert list(keys) == [0, 12, 21, 36, 42]
    facts = look(path)
    assert not facts.random
    for number in np.random.default_rng(0).permutation(50).tolist():
        assert number_of(read_frames(path, facts, [number], None)[0]) == number


@pytest.mark.parametrize("wrong", [13, 19, 20, 25, 35])
def test_every_group_is_compared_to_its_end(folder, wrong):
    """A frame that comes otherwise at random, wherever it is."""
    path = str(write_video(folder / "groups.mp4", scenes([12, 20, 36])))
    sums = [zlib.crc32(x.data) for x in read_video.in_order(read_video.open_reader(path, LOOK))]
    assert read_video.agrees(path, sums)
    sums[wrong] += 1
    assert not read_video.agrees(path, sums)


@pytest.mark.parametrize("where", ["last", "behind the key frame", "middle"])
def test_frames_that_are_asked_for_directly_are_compared(folder, monkeypatch, where):
    """A group that is right from its key frame on, and of which one frame is wrong where decord
    goes to it from another place, as at the last one of a group, or in that way alone."""
    path = str(write_video(folder / "direct.mp4", scenes([12, 20, 36])))
    sums = [zlib.crc32(x.data) for x in read_video.in_order(read_video.open_reader(path, LOOK))]
    opened = read_video.open_reader
    wrong = {"last": 19, "behind the key frame": 13, "middle": 16}[where]

    class Reader:
        """decord's, wrong where it goes to a frame but not where it comes to it."""

        def __init__(self, path, size):
            self.real, self.asked = opened(path, size), None

        def __getattr__(self, name):
            return getattr(self.real, name)

        def seek_accurate(self, number):
            self.asked = number
            self.real.seek_accurate(number)

        def next(self):
            at, self.asked = self.asked, None
            if at == wrong:
                self.real.seek_accurate(at - 1)
            return self.real.next()

    assert read_video.agrees(path, sums)
    monkeypatch.setattr(read_video, "open_reader", Reader)
    assert not read_video.agrees(path, sums)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_an_avi_without_timestamps_is_read_in_order(folder, codec):
    """What comes at random changes from call to call, so a look may find it right by chance."""
    for count in (1, 5, 10):
        path = str(write_video(folder / f"{codec}{count}.avi", count, codec=codec, gop=250))
        facts = look(path)
        assert not facts.random and not look(path, check=False, trusted=True).random
        shown = read_frames(path, facts, np.arange(count)[::-2], None)
        assert [number_of(frame) for frame in shown] == list(range(count))[::-2]
    lossless = look(write_video(folder / "ffv1.avi", 8, codec="ffv1"))
    assert lossless.random  # its frames have timestamps, and none needs another one


def test_hevc_whose_groups_are_closed_is_refused_by_a_reason(folder):
    options = {"x265-params": "open-gop=0:keyint=15:bframes=4:log-level=none"}
    path = write_video(folder / "closed_hevc.mp4", 60, codec="libx265", options=options)
    with pytest.raises(UserError, match="closed groups of HEVC; make it H.264"):
        look(path)


def test_a_file_that_fails_at_random_is_read_in_order(folder, monkeypatch):
    path = str(write_video(folder / "fails.mp4", 20))
    facts, real = look(path), read_video.read_at

    def fails(reader, frames, *, random, start=0):
        if random:
            raise UserError("frames are missing")
        return real(reader, frames, random=random, start=start)

    monkeypatch.setattr(read_video, "read_at", fails)
    for wanted in ([7, 3], [9], [2]):
        shown = read_frames(path, facts, wanted, None)
        assert [number_of(frame) for frame in shown] == wanted


UNEVEN = np.array(
    [0, 20, 60, 140, 340, 360, 400, 600, 640, 660, 1000, 1040, 1100, 1140, 1500]
)  # ms


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm", "h264.flv"])
def test_times_of_a_variable_frame_rate_are_those_of_the_container(folder, name):
    """As they were written, and as PyAV reads them; the rate is their mean, whatever the header
    says. Timestamps that begin later count from the first."""
    import av

    for first in (0, 700):
        path = folder / f"uneven{first}_{name}"
        write_video(path, len(UNEVEN), codec=CONTAINERS[name][0], times=UNEVEN + first)
        facts = look(path)
        assert facts.times == pytest.approx(UNEVEN / 1000, abs=1e-3)
        assert facts.fps == pytest.approx(14 / 1.5)
        with av.open(str(path)) as file:
            stamps = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
        assert facts.times == pytest.approx(np.array(stamps) - stamps[0], abs=1e-6)
        shown = read_frames(str(path), facts, [14, 3], None)
        assert [number_of(frame) for frame in shown] == [14, 3]


def test_an_even_rate_needs_no_times_and_is_measured_where_the_header_is_wrong(folder):
    """Milliseconds round 30 frames a second; of a stream that PyAV says has 25."""
    times = np.arange(40) * 1000 / 30
    for name in ("even.mkv", "even.mp4", "even.flv"):
        facts = look(write_video(folder / name, 40, times=times.round()))
        assert facts.times is None and facts.fps == pytest.approx(30, rel=1e-3)


class Stamped:
    """A reader that gives some timestamps."""

    def __init__(self, starts):
        self.starts = np.array(starts, np.float64)

    def get_frame_timestamp(self, frames):
        return np.stack([self.starts, self.starts], 1)


@pytest.mark.parametrize(
    "starts",
    [[0.0, 0.0, 0.04], [0.0, 0.08, 0.04], [0, np.nan, 1], [3.0], [-(2.0**63) / 90000, 0, 0.04]],
)
def test_timestamps_that_do_not_ascend_count_for_nothing(starts):
    assert timed(Stamped(starts), len(starts), 25.0) == (25.0, None)


def test_a_rate_that_no_header_states_is_that_of_the_timestamps_or_none():
    assert timed(Stamped([0.0, 0.1, 0.2, 0.3]), 4, 0.0) == (pytest.approx(10), None)
    assert timed(Stamped([0.0, 0.0, 0.0]), 3, 0.0) == (0.0, None)


def test_a_video_without_timestamps_is_told(folder):
    """Of two or three frames with a varying rate decord gives none from a Matroska file."""
    write_video(folder / "bare.mkv", 3, times=[0, 40, 400])
    write_video(folder / "even.mp4", 3)
    found = ["bare.mkv", "even.mp4"]
    facts = [look(str(folder / name)) for name in found]
    (report,) = rate_line(found, facts)
    assert report.endswith("the header says: bare.mkv (25)") and "even.mp4" not in report
    assert facts[0].clock.seconds(np.arange(3)).tolist() == [0, 0.04, 0.08]


def test_a_clock_goes_by_times_or_by_a_rate():
    even, uneven = Clock(10.0), Clock(10.0, UNEVEN / 1000)
    assert even.seconds(np.array([0, 5, 20])).tolist() == [0, 0.5, 2.0]
    assert even.frames(np.array([0, 0.55, 2.0])).tolist() == [0, 5, 20]
    numbers = np.array([0, 4, 14, 16])  # the last is the second behind the end
    assert uneven.seconds(numbers) == pytest.approx([0, 0.34, 1.5, 2.22])
    assert uneven.frames(uneven.seconds(numbers)).tolist() == numbers.tolist()
    assert uneven.frames(np.array([0.339, 0.35, 1.45])).tolist() == [3, 4, 13]


def test_a_file_type_is_what_the_bytes_say_whatever_the_name(folder):
    path = write_video(folder / "hidden.avi", 8, container="mp4")
    assert file_type(str(path)) == FileType("mp4", "h264")
    assert not FileType("mpeg", "").may_be_random


@pytest.mark.parametrize(
    ("start", "container"),
    [
        (b"\x00\x00\x01\xba", "mpeg"),
        (b"\x00\x00\x01\xb3", "mpeg video"),
        (b"\x30\x26\xb2\x75\x8e\x66", "asf"),
        (b"GIF89a", "gif"),
        (b"FLV\x01", "flv"),
        (b"\x89PNG\r\n", "image"),
        (b"\xff\xd8\xff\xe0", "image"),
        (b"RIFF\x00\x01\x00\x00WEBPVP8 ", "image"),
        (b"hello", "unknown"),
    ],
)
def test_containers_by_their_first_bytes(start, container):
    assert container_of(start) == container


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.mp4", b"", "an empty file"),
        ("text.mp4", b"hello world " * 99, "text, no video"),
        ("flash.swf", b"CWS\x0a" + bytes(99), "Flash (swf)"),
        ("theora.ogv", b"OggS" + bytes(99), "does not read Ogg"),
        ("moves.webp", b"RIFF\x00\x01\x00\x00WEBP" + bytes(99), "does not read images"),
        ("zeros.mp4", bytes(9999), "no video, or its header is missing"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=text.replace("(", r"\(").replace(")", r"\)")):
        look(tmp_path / name)


def test_a_transport_stream_is_refused(tmp_path):
    """decord gives frame 24 for frame 0, and repeats the last one for those that it has lost."""
    path = write_video(tmp_path / "a.ts", 40, container="mpegts")
    with pytest.raises(UserError, match='transport stream.*ffmpeg -i "a.ts"'):
        look(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = write_video(tmp_path / name, 40, codec=codec)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match="cut off"):
        look(path)


def test_a_broken_frame_is_found_and_never_replaced(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40)
    facts = look(path)
    content = bytearray(path.read_bytes())
    middle = content.find(b"mdat") + len(content) // 3
    content[middle : middle + 900] = b"\x5a" * 900
    path.write_bytes(content)
    with pytest.raises(UserError, match="it cannot be decoded"):
        look(path)
    with pytest.raises(UserError, match=r"a\.mp4: it cannot be decoded"):
        read_frames(str(path), facts, np.arange(40), None)


def test_sound_alone_is_no_video(tmp_path):
    with pytest.raises(UserError, match="it has no picture"):
        look(write_sound(tmp_path / "a.mp4"))


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    path = write_frames(tmp_path / "v", 12)
    facts = look(path)
    assert (facts.kind, facts.frames, facts.fps, facts.random) == ("frames", 12, 0.0, True)
    frames = read_frames(str(path), facts, [11, 2, 2, 10], None)
    assert (frames == np.stack([numbered(12)[n] for n in (11, 2, 2, 10)])).all()
    assert read_frames(str(path), facts, [3], (32, 48)).shape == (1, 32, 48, 3)
    (path / "frame3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"frame3\.png: not an image file"):
        look(path)
    assert look(path, check=False).frames == 12


@pytest.mark.parametrize("form", ["png", "bmp", "tiff", "webp"])
def test_frames_of_a_folder_may_have_gaps_but_not_sizes(tmp_path, form):
    from PIL import Image

    frames = numbered(3)
    for number, frame in zip((2, 10, 101), frames, strict=True):
        options = {"lossless": True} if form == "webp" else {}
        Image.fromarray(frame).save(tmp_path / f"a {number}.{form}", **options)
    (tmp_path / "._a 1.png").write_bytes(b"of another system")
    facts = look(tmp_path)
    assert facts.frames == 3
    assert (read_frames(str(tmp_path), facts, [2, 0, 1], None) == np.stack(frames)[[2, 0, 1]]).all()
    Image.fromarray(frames[0][:-1]).save(tmp_path / f"a 3.{form}")
    with pytest.raises(UserError, match=r"frames of different sizes: \(63, 96\), \(64, 96\)"):
        look(tmp_path)


def test_a_file_without_its_pictures_or_its_length_is_said_to_be_so(tmp_path):
    """The header of one, the frames of another without a container."""
    path = write_video(tmp_path / "a.mp4", 12)
    content = path.read_bytes()
    head = content.find(b"moov") - 4
    path.write_bytes(content[:head])
    with pytest.raises(UserError, match="its header is missing: cut off, or never closed"):
        look(path)
    path.write_bytes(content[: int.from_bytes(content[:4])] + content[head:])
    with pytest.raises(UserError, match="it cannot be decoded"):
        look(path)
    stream = write_video(tmp_path / "raw.mp4", 12, container="h264")
    with pytest.raises(UserError, match="it does not say how many frames it has; ffmpeg makes"):
        look(stream)


def edited(path, name, offset, values):
    """Overwrite numbers of a box of an mp4 file, some bytes behind its name."""
    content = bytearray(path.read_bytes())
    struct.pack_into(f">{len(values)}i", content, content.find(name) + 4 + offset, *values)
    path.write_bytes(content)


def test_a_file_that_was_trimmed_by_an_edit_list_is_refused(tmp_path):
    """The list begins with frame 10 of 30: its last ten frames would be one that is repeated."""
    path = write_video(tmp_path / "a.mp4", 30, gop=30)
    first = struct.unpack_from(">i", path.read_bytes(), path.read_bytes().find(b"elst") + 16)[0]
    scale = path.read_bytes().find(b"mdhd") + 16
    (second,) = struct.unpack_from(">i", path.read_bytes(), scale)
    edited(path, b"elst", 12, [first + second * 10 // 25])
    with pytest.raises(UserError, match="cut away by an edit list"):
        look(path)


def test_a_video_that_was_held_upright_is_turned(tmp_path):
    """By the matrix in its header, also where it is resized; as an array turned clockwise."""
    path = write_video(tmp_path / "a.mp4", 12)
    still = read_frames(str(path), look(path), [7], None)[0]
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30]
    edited(path, b"tkhd", 40, quarter)
    facts = look(path)
    assert (facts.height, facts.width, facts.frames) == (96, 64, 12)
    frame = read_frames(str(path), facts, [7], None)[0]
    assert np.abs(np.rot90(frame).astype(int) - still).mean() < 1
    small = read_frames(str(path), facts, [7], (48, 32))[0]
    assert small.shape == (48, 32, 3) and number_of(np.rot90(small)) == 7


def test_the_codec_is_that_of_the_picture_where_sound_comes_first(tmp_path):
    """Also where the word for a picture stands in what an encoder writes into its frames."""
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        sound, picture = file.add_stream("aac", rate=16000), file.add_stream("libx264", rate=25)
        sound.layout, picture.pix_fmt = "mono", "yuv420p"
        picture.height, picture.width = 64, 96
        for frame in numbered(12):
            file.mux(picture.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(picture.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate, samples.pts = 16000, 0
        file.mux(sound.encode(samples)), file.mux(sound.encode(None))
    content = path.read_bytes()
    assert content.find(b"vide") < content.find(b"stsd")
    assert content.find(b"soun") < content.rfind(b"vide")
    assert file_type(str(path)) == FileType("mp4", "h264")
    assert look(path).frames == 12


@pytest.mark.parametrize("name", ["again.mp4", "again.mpg"])
def test_a_reader_that_is_kept_knows_where_it_stands(folder, name):
    codec = CONTAINERS["a" + name[5:]][0]
    path = str(write_video(folder / name, 30, codec=codec))
    facts = look(path)
    for wanted in ([5], [5], [6, 7], [7], [9], [8, 10], [11], [0]):
        shown = read_frames(path, facts, wanted, None)
        assert [number_of(frame) for frame in shown] == wanted


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", 20))
    facts = look(path)
    assert number_of(read_frames(path, facts, [7], None)[0]) == 7
    write_video(path, numbered(20, first=100))
    os.utime(path, ns=(1, 1))
    assert number_of(read_frames(path, facts, [7], None)[0]) == 107
    write_video(path, 10)
    with pytest.raises(UserError, match="10 frames, 20 when the run was started"):
        read_frames(path, facts, [7], None)


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
def test_few_files_stay_open(folder):
    paths = [str(write_video(folder / f"open{i}.mp4", 8)) for i in range(8)]
    facts = [look(path) for path in paths]
    for path, each in zip(paths, facts, strict=True):
        read_frames(path, each, [0], None)
    gc.collect()
    before = open_files()
    for _ in range(3):
        for path, each in zip(paths, facts, strict=True):
            read_frames(path, each, [5, 1], (32, 48))
    gc.collect()
    assert open_files() <= before + 2
    assert len(read_video.OPEN.readers) <= read_video.MOST_OPEN


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells both")
def test_many_files_leave_none_open_and_no_memory_behind(folder):
    """Two hundred short clips of forty files, with the readers that a thread keeps."""
    path = write_video(folder / "short.mp4", 9)
    content = path.read_bytes()
    paths = [folder / "many" / f"{i}.mp4" for i in range(40)]
    paths[0].parent.mkdir()
    for each in paths:
        each.write_bytes(content)
    facts = look(path)

    def used():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes, files = [], []
    for _ in range(5):
        for each in paths:
            read_frames(str(each), facts, np.arange(4), (32, 48))
        sizes.append(used()), files.append(len(os.listdir("/proc/self/fd")))
    assert max(files) - min(files) <= 1
    assert sizes[-1] - sizes[1] < 8 * 2**20
