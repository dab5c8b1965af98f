"""Containers of videos: what a file is, whether it is whole, and whether its key frames are surely
those from which decoding begins anew.

By its first bytes, as a suffix tells little; the codec by its name in the header.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from glovita_lib.errors import UserError
from glovita_lib.files import open_regular

EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
TRANSPORT_PACKET = 188  # bytes of an MPEG transport stream that begin with 0x47
HEADER = 2**16  # bytes that are looked at for the name of a codec
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
ORDERED = frozenset(["mpeg", "asf", "mpeg video"])
"""Containers whose frames are wrong at random, whatever their codec."""
CODECS = {
    "mp4": {
        b"avc1": "h264", b"avc3": "h264", b"hvc1": "hevc", b"hev1": "hevc", b"mp4v": "mpeg4",
        b"vp09": "vp9", b"vp08": "vp8", b"av01": "av1", b"jpeg": "mjpeg", b"mjpg": "mjpeg",
        b"s263": "h263", b"apcn": "prores", b"apch": "prores", b"apcs": "prores",
        b"ap4h": "prores", b"ap4x": "prores",
    },
    "matroska": {
        b"V_MPEG4/ISO/AVC": "h264", b"V_MPEGH/ISO/HEVC": "hevc", b"V_VP9": "vp9", b"V_VP8": "vp8",
        b"V_AV1": "av1", b"V_MPEG4": "mpeg4", b"V_MPEG2": "mpeg2", b"V_MPEG1": "mpeg1",
        b"V_THEORA": "theora", b"V_FFV1": "ffv1", b"V_MJPEG": "mjpeg",
    },
    "avi": {
        b"MJPG": "mjpeg", b"FMP4": "mpeg4", b"XVID": "mpeg4", b"DIVX": "mpeg4", b"DX50": "mpeg4",
        b"H264": "h264", b"h264": "h264", b"FFV1": "ffv1", b"WMV2": "wmv2", b"mpg1": "mpeg1",
        b"mpg2": "mpeg2",
    },
}  # fmt: skip
"""How a codec is called in the header of a container; longer names before their beginnings."""
REFUSED = {
    "flash": "Flash (swf) is a program, no video",
    "ogg": "decord does not read Ogg (Theora)",
    "image": "decord does not read images, also not those that move",
    "transport": "of an MPEG transport stream decord loses frames and gives others for them",
}
CONVERTED = 'make it an mp4, e.g. ffmpeg -i "{}" out.mp4'


@dataclass(frozen=True, slots=True)
class FileType:
    """What a video file is."""

    container: str
    codec: str  # "" where its header does not say

    def __str__(self) -> str:
        return f"{self.container}/{self.codec}" if self.codec else self.container

    @property
    def may_be_random(self) -> bool:
        """Whether frames of such a file may be right at random; a look at the file decides."""
        return self.container not in ORDERED


def file_type(path: str) -> FileType:
    """Container and codec of a file.

    Raises:
        UserError: an empty file, no video, one that is cut off, or of a kind that cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(HEADER)
    if not start:
        raise UserError("an empty file")
    container = container_of(start)
    if container in REFUSED:
        raise UserError(f"{REFUSED[container]}; {CONVERTED.format(os.path.basename(path))}")
    if container == "unknown" and start.isascii() and b"\x00" not in start:
        raise UserError("text, no video")  # of which decord writes lines of its own
    refuse_cut(path, container)
    return FileType(container, codec_of(path, container, start))


def container_of(start: bytes) -> str:
    """Container of a file that begins so, "unknown" where its bytes do not tell."""
    if start[:4] == EBML:
        return "matroska"
    if start[4:8] in MP4_BOXES:
        return "mp4"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if start[:4] == b"\x00\x00\x01\xba":
        return "mpeg"
    if start[:4] == b"\x00\x00\x01\xb3":
        return "mpeg video"
    if start[:4] == b"\x30\x26\xb2\x75":
        return "asf"
    if start[:3] in (b"FWS", b"CWS", b"ZWS"):
        return "flash"
    for first in (0, 4):  # those of Blu-ray discs have 4 bytes before each packet
        packet = TRANSPORT_PACKET + first
        if len(start) > 2 * packet and all(start[first + i * packet] == 0x47 for i in range(3)):
            return "transport"
    names = {
        b"OggS": "ogg",
        b"FLV": "flv",
        b"GIF8": "gif",
        b"\x89PNG": "image",
        b"\xff\xd8\xff": "image",
    }
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "image"
    return next((name for mark, name in names.items() if start.startswith(mark)), "unknown")


def codec_of(path: str, container: str, start: bytes) -> str:
    """Codec of a file as its header names it."""
    known = CODECS.get(container, {})
    if container == "mp4":
        box = movie_box(path)
        handlers = (at for at in positions(box, b"hdlr") if box[at + 12 : at + 16] == b"vide")
        places = (box.find(b"stsd", at) for at in handlers)
        found = (box[at + 16 : at + 20] for at in places if at >= 0)
        return next((known.get(name, name.decode("latin-1").strip()) for name in found), "")
    return next((codec for name, codec in known.items() if name in start), "")


def positions(text: bytes, part: bytes) -> Iterator[int]:
    """Where a part begins."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


OUTER = frozenset(
    b"ftyp styp pdin moov moof mfra mdat free skip wide uuid meta meco sidx ssix prft emsg pnot"
    b" udta junk PICT".split()
)
"""Names of outer boxes of mp4 and of QuickTime."""


def boxes(path: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and end of the outer boxes of an mp4 file (ISO 14496-12)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length, name = struct.unpack(">I4s", head[:8])
            if length == 1 and len(head) == 16:
                (length,) = struct.unpack(">Q", head[8:])
            end = size if length == 0 else at + length
            yield name, at, end
            if end <= at:
                return
            at = end


def movie_box(path: str) -> bytes:
    """The box of an mp4 file that describes it."""
    for name, at, end in boxes(path):
        if name == b"moov":
            with open(path, "rb") as file:
                file.seek(at)
                return file.read(min(end - at, 2**24))
    return b""


def refuse_cut(path: str, container: str) -> None:
    """Refuse a file that is shorter than its header says, an mp4 without one, and those of which a
    part is damaged that says where the next one begins: decord gives fewer frames, or others for
    those that are missing, or writes lines of its own.

    Raises:
        UserError: it is.
    """
    size, end = os.path.getsize(path), 0
    if container == "mp4":
        # other names are bytes that a tool has put behind the file, as an ID3 tag
        found = [(name, end) for name, _, end in boxes(path) if name in OUTER]
        end = max((end for _, end in found), default=0)
        if end <= size and b"moov" not in (name for name, _ in found):
            raise UserError("its header is missing: cut off, or never closed by what recorded it")
    elif container == "avi":
        with open(path, "rb") as file:
            (length,) = struct.unpack("<I", file.read(8)[4:])
        end = length + 8 if 0 < length < 2**31 else 0
    elif container == "matroska":
        end = segment_end(path)
    if end > size:
        raise UserError(f"cut off: {size:,} bytes of {end:,}")
    damaged = {"matroska": damaged_matroska, "flv": damaged_flash, "gif": damaged_gif}
    if container in damaged and (at := damaged[container](path, size)) is not None:
        raise UserError(
            f"damaged or cut off: byte {at:,} of {size:,} begins no part of {container}"
        )


def segment_end(path: str) -> int:
    """Byte behind the only segment of a Matroska or WebM file; 0 where it is unknown."""
    with open(path, "rb") as file:
        start = file.read(HEADER)
    at = start.find(SEGMENT)
    if at < 0 or at + 5 > len(start):
        return 0
    first = start[at + 4]
    length = 9 - first.bit_length()  # of the number, bytes
    number = int.from_bytes(start[at + 4 : at + 4 + length]) & ((1 << 7 * length) - 1)
    return 0 if number == (1 << 7 * length) - 1 else at + 4 + length + number


def damaged_matroska(path: str, size: int) -> int | None:
    """First byte of a file where no element begins though one ends there; none where all follow one
    another (RFC 8794). What stands in a frame is not looked at.

    Args:
        size: of the file, bytes.
    """
    with open(path, "rb") as file:
        ends, at = [size], 0
        while ends:
            if at >= ends[-1]:
                ends.pop()
                continue
            file.seek(at)
            name, length, head = element(file.read(12))
            if name == 0 or (length is not None and at + head + length > ends[-1]):
                return at if len(ends) > 1 else None  # behind the segment may stand anything
            if length is None and name != SEGMENT_ID:
                return None  # a recording, whose clusters end where the next one begins
            if name in (SEGMENT_ID, CLUSTER_ID):
                ends.append(ends[-1] if length is None else at + head + length)
                at += head
            else:
                at += head + (length or 0)
    return None


SEGMENT_ID, CLUSTER_ID = 0x18538067, 0x1F43B675


def element(start: bytes) -> tuple[int, int | None, int]:
    """Identifier of an element of Matroska, 0 where none begins so; the length of its content, none
    where it is not known yet; and that of its head, in bytes."""
    named = 9 - start[0].bit_length() if start else 9
    if named > 4 or len(start) <= named:
        return 0, 0, 0
    counted = 9 - start[named].bit_length()
    number = start[named : named + counted]
    if counted > 8 or len(number) < counted:
        return 0, 0, 0
    most = (1 << 7 * counted) - 1
    length = int.from_bytes(number) & most
    return int.from_bytes(start[:named]), None if length == most else length, named + counted


def damaged_flash(path: str, size: int) -> int | None:
    """The same of an FLV file: tags of sound, pictures and data, each with its length."""
    with open(path, "rb") as file:
        at = int.from_bytes(file.read(9)[5:]) + 4
        while at + 4 < size:
            file.seek(at)
            head = file.read(11)
            end = at + 11 + int.from_bytes(head[1:4])
            if head[0] & 31 not in (8, 9, 18) or end > size:
                return at if any(head + file.read()) else None  # filled up
            at = end + 4
    return None


def damaged_gif(path: str, size: int) -> int | None:
    """The same of a GIF: blocks up to one that says that it is the last."""
    with open(path, "rb") as file:
        content = file.read()
    if size < 13:  # its screen
        return size
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 128 else 0)  # behind the colours
    while at < size and content[at] != 0x3B:
        block = at
        if content[at] == 0x2C and at + 10 < size:  # an image, perhaps with colours of its own
            packed = content[at + 9]
            at += 11 + (3 << (packed & 7) + 1 if packed & 128 else 0)
        elif content[at] == 0x21:
            at += 2
        else:
            return block
        while at < size and content[at]:
            at += 1 + content[at]
        at += 1
    return None if at <= size else size  # the last one is missing in some


# ------------------------------------------------------------------------------- key frames

INTRA = frozenset(["mjpeg", "prores", "ffv1"])
"""Codecs without prediction between frames, where each is a key frame."""
CLOSED = frozenset(["vp9", "av1"])
"""Codecs in which no frame behind a key frame is shown before it or needs one before it."""
BEFORE_SLICES = frozenset([6, 7, 8, 9])  # NAL units of H.264: SEI, SPS, PPS, delimiter
IDR = 5  # slice of a picture from which decoding begins anew
UNITS = 2**12  # bytes of a sample in which its first slice is looked for


def surely_closed(path: str, kind: FileType, keys: np.ndarray, frames: int) -> bool:
    """Whether decoding from any key frame surely gives the frames from it to the next one, by the
    packets alone and whatever the settings of the encoder; where it is not known, it is not sure.

    Args:
        keys: numbers of the packets of key frames.
        frames: how many packets there are.
    """
    if kind.container not in ("mp4", "matroska", "avi"):
        return False
    if kind.codec in INTRA:
        return len(keys) == frames
    if kind.codec in CLOSED:
        return kind.container != "avi"
    if kind.container == "mp4" and kind.codec == "h264":
        try:
            return keys_are_idr(path, keys, frames)
        except (struct.error, ValueError, IndexError, KeyError):  # a table that is cut or wrong
            return False
    return False


def keys_are_idr(path: str, keys: np.ndarray, frames: int) -> bool:
    """Whether all key frames of the only H.264 track of an mp4 file are IDR pictures (ITU-T H.264,
    7.4.1.2.4). Those of open groups and of gradual refresh are not."""
    tracks = [
        dict(children(body)) for name, body in children(movie_box(path)[8:]) if name == b"trak"
    ]
    media = [dict(children(track[b"mdia"])) for track in tracks]
    pictures = [each for each in media if each[b"hdlr"][8:12] == b"vide"]
    if len(pictures) != 1:
        return False
    table = dict(children(dict(children(pictures[0][b"minf"]))[b"stbl"]))
    offsets = sample_offsets(table)
    described = table[b"stsd"]
    length = (described[described.index(b"avcC") + 8] & 3) + 1  # bytes that say how long a unit is
    if len(offsets) != frames:  # in fragments, or some are hidden
        return False
    with open(path, "rb") as file:
        for key in keys:
            file.seek(int(offsets[key]))
            if first_slice(file.read(UNITS), length) != IDR:
                return False
    return True


def children(box: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the boxes in a box of an mp4 file."""
    at = 0
    while at + 8 <= len(box):
        length, name = struct.unpack_from(">I4s", box, at)
        if length < 8 or at + length > len(box):
            return
        yield name, box[at + 8 : at + length]
        at += length


def sample_offsets(table: dict[bytes, bytes]) -> np.ndarray:
    """First byte of every sample of a track in its file (S,), int64; ISO 14496-12, 8.7."""
    uniform, count = struct.unpack_from(">II", table[b"stsz"], 4)
    sizes = np.full(count, uniform, np.int64)
    if uniform == 0:
        sizes = np.frombuffer(table[b"stsz"], ">u4", count, 12).astype(np.int64)
    name, width = (b"co64", ">u8") if b"co64" in table else (b"stco", ">u4")
    chunks = np.frombuffer(table[name], width, struct.unpack_from(">I", table[name], 4)[0], 8)
    (runs,) = struct.unpack_from(">I", table[b"stsc"], 4)
    first, held, _ = np.frombuffer(table[b"stsc"], ">u4", 3 * runs, 8).reshape(-1, 3).T.astype(int)
    held = np.repeat(held, np.diff(first, append=len(chunks) + 1))  # samples of each chunk
    start = np.cumsum(sizes) - sizes
    place = np.repeat(np.cumsum(held) - held, held)  # first sample of the chunk of each sample
    offsets: np.ndarray = np.repeat(chunks.astype(np.int64), held) + start - start[place]
    return offsets


def first_slice(sample: bytes, length: int) -> int:
    """Type of the first slice of a picture of H.264; 0 where there is none in these bytes.

    Args:
        length: bytes that say how long a unit is.
    """
    at = 0
    while at + length < len(sample):
        kind = sample[at + length] & 31
        if kind not in BEFORE_SLICES:
            return kind
        at += length + int.from_bytes(sample[at : at + length])
    return 0
