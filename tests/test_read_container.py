"""Containers: key frames from which decoding surely begins anew."""

import os

import numpy as np
import pytest
from video_files import write_video

from glovita_lib.errors import UserError
from glovita_lib.read_container import (
    children,
    file_type,
    first_slice,
    movie_box,
    sample_offsets,
    surely_closed,
)

av = pytest.importorskip("av")

FILES = {  # name: options of write_video, and whether its groups are surely closed
    "a.mp4": ({}, True),
    "a.mov": ({}, True),
    "one.mp4": ({"gop": 250}, True),
    "every.mp4": ({"gop": 1}, True),
    "open.mp4": ({"options": {"x264-params": "open-gop=1:bframes=3"}}, False),
    "refresh.mp4": ({"options": {"x264-params": "intra-refresh=1:bframes=0"}}, False),
    "a.mkv": ({}, False),  # its packets are not read
    "mpeg4.mp4": ({"codec": "mpeg4"}, False),
    "a.webm": ({"codec": "libvpx-vp9"}, True),
    "vp8.webm": ({"codec": "libvpx"}, False),
    "lossless.mkv": ({"codec": "ffv1", "gop": 1}, True),
    "contexts.mkv": ({"codec": "ffv1"}, False),  # kept from a frame to the next
}


def packets(path):
    """Places of the packets in a file, and the numbers of those of key frames."""
    with av.open(str(path)) as file:
        found = [packet for packet in file.demux(video=0) if packet.size]
        keys = [number for number, packet in enumerate(found) if packet.is_keyframe]
        return [packet.pos for packet in found], np.array(keys)


def closed(path):
    places, keys = packets(path)
    return surely_closed(str(path), file_type(str(path)), keys, len(places))


@pytest.mark.parametrize("name", FILES)
def test_groups_are_closed_where_packets_say_so(tmp_path, name):
    options, expected = FILES[name]
    assert closed(write_video(tmp_path / name, 40, **options)) == expected


def two_tracks(path):
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=25) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for _ in range(5):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), "rgb24")
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode(None))
    return path


def test_what_tables_do_not_say_is_not_sure(tmp_path):
    """Two pictures in one file, another number of frames, tables that are cut short."""
    assert not closed(two_tracks(tmp_path / "two.mp4"))
    path = write_video(tmp_path / "a.mp4", 24)
    places, keys = packets(path)
    kind = file_type(str(path))
    assert surely_closed(str(path), kind, keys, 24) and not surely_closed(str(path), kind, keys, 23)
    content = path.read_bytes()
    for name in (b"stbl", b"stsz", b"stsc", b"stco", b"avcC", b"hdlr"):
        path.write_bytes(content.replace(name, b"free"))
        assert not surely_closed(str(path), kind, keys, 24)
    for name, offset in ((b"stsz", 8), (b"stsc", 4), (b"stco", 4)):  # more entries than there are
        at = content.index(name) + 4 + offset
        path.write_bytes(content[:at] + b"\x00\x00\xff\xff" + content[at + 4 :])
        assert not surely_closed(str(path), kind, keys, 24)


@pytest.mark.parametrize("sound", [False, True])
def test_samples_stand_where_ffmpeg_finds_them(tmp_path, sound):
    """Also among those of sound, in chunks of different lengths."""
    path = tmp_path / "a.mp4"
    write_video(path, 40)
    if sound:
        with av.open(str(path), "w") as file:
            picture, voice = file.add_stream("libx264", rate=25), file.add_stream("aac", rate=16000)
            picture.height, picture.width, picture.pix_fmt = 64, 96, "yuv420p"
            voice.layout = "mono"
            for number in range(40):
                pixels = np.full((64, 96, 3), 5 * number, np.uint8)
                file.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
                if number % 3:
                    samples = np.zeros((1, 1024), np.float32)
                    frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
                    frame.sample_rate, frame.pts = 16000, 1024 * number
                    file.mux(voice.encode(frame))
            for stream in (picture, voice):
                file.mux(stream.encode(None))
    tracks = [dict(children(b)) for n, b in children(movie_box(str(path))[8:]) if n == b"trak"]
    media = dict(children(tracks[0][b"mdia"]))
    table = dict(children(dict(children(media[b"minf"]))[b"stbl"]))
    assert sample_offsets(table).tolist() == packets(path)[0]


def test_the_first_slice_of_a_sample_says_what_it_is():
    units = [b"\x09\x10", b"\x06" + bytes(9), b"\x65\x88"]  # delimiter, SEI, IDR
    for length in (1, 2, 4):
        sample = b"".join(len(unit).to_bytes(length) + unit for unit in units)
        assert first_slice(sample, length) == 5
        assert first_slice(sample[: length + 4], length) == 0


MARKED = {"a.mkv": "libx264", "a.webm": "libvpx", "a.flv": "libx264", "a.gif": "gif"}


@pytest.mark.parametrize("name", MARKED)
def test_a_file_with_a_damaged_part_is_refused(tmp_path, name):
    """decord goes on behind it, with fewer frames; noise within a frame leaves all of them."""
    codec, pixels = MARKED[name], "rgb8" if name == "a.gif" else "yuv420p"
    path = write_video(tmp_path / name, 40, codec=codec, pixels=pixels)
    content = path.read_bytes()
    size = len(content)
    kind = file_type(str(path))
    for start, end in ((0.5, 0.6), (0.3, 0.45), (0.8, 0.9)):
        a, b = int(start * size), int(end * size)
        noise = np.random.default_rng(0).integers(0, 256, b - a, np.uint8).tobytes()
        for part in (bytes(b - a), noise):
            path.write_bytes(content[:a] + part + content[b:])
            with pytest.raises(UserError, match="damaged or cut off: byte [0-9,]+ of"):
                file_type(str(path))
    for end in (int(0.6 * size), size - 40):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="cut off"):
            file_type(str(path))
    path.write_bytes(content + bytes(999))
    assert file_type(str(path)) == kind


def test_a_recording_whose_lengths_are_unknown_is_no_damaged_file(tmp_path):
    """Matroska as it is written to a pipe."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", format="matroska", options={"live": "1"}) as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for number in range(40):
            pixels = np.full((64, 96, 3), 5 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode(None))
    assert str(file_type(str(path))) == "matroska/h264"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="not a file"):
        file_type(str(tmp_path / "a.mp4"))


def test_bytes_behind_a_whole_file_are_no_part_of_it(tmp_path):
    path = write_video(tmp_path / "a.mp4", 12)
    whole = path.read_bytes()
    for trailer in (b"TAG" + b"title".ljust(125, b"\0"), b"<?xpacket begin?>", bytes(4096)):
        path.write_bytes(whole + trailer)
        file_type(str(path))
    for count in (len(whole) - 40, len(whole) // 2):
        path.write_bytes(whole[:count])
        with pytest.raises(UserError, match="cut off"):
            file_type(str(path))


@pytest.mark.parametrize("count", [6, 10, 12])
def test_the_beginning_of_a_gif_alone_is_refused(tmp_path, count):
    path = write_video(tmp_path / "a.gif", 4, codec="gif", pixels="rgb8")
    path.write_bytes(path.read_bytes()[:count])
    with pytest.raises(UserError, match="damaged or cut off"):
        file_type(str(path))
