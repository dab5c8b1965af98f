"""Image files: size from the header, pixels as the channels and bit depth that were declared.

C channels (1 grey, 3 RGB, 4 RGBA), H W pixels, N files.

What happens to files of another kind:

- EXIF orientation is applied; the size is that of the upright image.
- Palettes, CMYK, YCbCr and Lab become RGB; of a TIFF with several pages the first one is read.
- Grey to colour repeats the channel; colour to grey is ITU-R 601 luma, rounded as PIL does.
- RGBA to RGB or grey is laid over white; a missing alpha channel is opaque, but for
  the colour that a file calls transparent.
- 16-bit files read as 8 bits are divided by 257 and rounded, 8-bit files read as 16 bits multiplied
  by 257, 12-bit files likewise, so that black and white stay black and white.
- A TIFF whose zero is white is turned over.
- Formats of which Pillow keeps 8 of more bits are read here (PNG, TIFF, PPM, SGI), or refused where
  16 bits are asked for (JPEG 2000 in colour, AVIF).
- 32-bit and signed integer files are read if their values fit into 16 bits; floating-point files
  are refused, as nothing says what their white is.
"""

import io
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import IO, ClassVar

import numpy as np
from PIL import Image
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import OPEN_INFO, TiffImageFile

from glovita_lib.errors import UserError
from glovita_lib.files import open_regular

ORIENTATION = 0x0112  # EXIF tag
STRIP_TAGS = ((273, 279), (324, 325))  # TIFF tags: offsets and byte counts of strips, of tiles
BITS_TAG, PHOTOMETRIC_TAG = 258, 262  # TIFF tags: bits per sample, what the numbers mean
PLANES_TAG = 284  # 2: the channels of a TIFF stand one behind the other
SIGN_TAG, SIGNED = 339, 2  # TIFF tag: what kind of number a sample is, and its value of signed ones
WHITE_IS_ZERO = 0  # value of the second one
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a file begins
GREY_PPM = {b"P3": b"P2", b"P6": b"P5"}  # how a colour file begins, and the grey one
SGI, SGI_BYTES, SGI_START = b"\x01\xda", 3, 512  # how a file begins; bytes a number; the pixels
J2K_SIZE = b"\xff\x4f\xff\x51"  # how the code stream of a JPEG 2000 begins, with its size
TAIL = 4096  # bytes at the end of a JPEG where its end marker may be
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}  # EXIF orientation -> (H, W, c) to the upright image


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about its image before it is decoded."""

    height: int
    width: int
    pages: int  # more than 1 for TIFF stacks


@contextmanager
def decoding(path: str) -> Iterator[None]:
    """Turn what goes wrong with a file into one line with its path.

    Decoders raise anything on broken files, so all exceptions count as such: the block must hold
    calls of the decoder only.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, expected an image file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: {unidentified(path)}") from None
    except Exception as error:
        raise UserError(f"{path}: broken image file ({error})") from error


def unidentified(path: str) -> str:
    """What a file is that Pillow does not recognise."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start in TIFF:
        return "a TIFF of a kind that Pillow does not read: save it as 8 or 16 bits, grey or RGB"
    return "not an image file" if start else "an empty file"


def opened(file: IO[bytes], max_megapixels: float) -> Image.Image:
    """An image that is not decoded yet.

    Pillow has a limit of its own for all of a process, against files that fill the memory; it is
    raised where ours is higher, and ours is applied here.

    Raises:
        UserError: it has more pixels.
    """
    largest = math.floor(max_megapixels * 1e6)
    if Image.MAX_IMAGE_PIXELS is not None and largest > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = largest
    for order, name in ((b"II", "I;16"), (b"MM", "I;16B")):  # of the big endian Pillow lacks it
        OPEN_INFO.setdefault((order, WHITE_IS_ZERO, (1,), 1, (16,), ()), (name, name))
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"larger than data.max_megapixels = {max_megapixels:g}: raise it") from None
    if image.width * image.height > largest:
        raise UserError(
            f"{image.width} x {image.height} pixels are more than data.max_megapixels ="
            f" {max_megapixels:g}: raise it"
        )
    return image


# ---------------------------------------------------------------------- headers


def read_header(path: str, *, max_megapixels: float) -> Header:
    """Size of the upright image of a file.

    A file whose end is missing is found here too, without decoding it: its format tells where it
    should end, and only files that fall short of it are decoded to make sure.

    Raises:
        UserError: missing, unreadable or broken; one line with the path.
    """
    with decoding(path), open_regular(path) as file, opened(file, max_megapixels) as image:
        height, width = image.height, image.width
        if orientation(image) >= 5:
            height, width = width, height
        pages = image.n_frames if isinstance(image, TiffImageFile) else 1
        if is_cut(file, image):
            image.load()
            if image.format == "PNG" and not has_end(file):
                raise OSError("it has no end")  # Pillow takes what is missing for black
    return Header(height, width, pages)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of an image that is not decoded yet; 1 is upright."""
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turns these itself
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole file to look for it behind the pixels
    number = image.getexif().get(ORIENTATION, 1)
    return number if number in UPRIGHT else 1


def is_cut(file: IO[bytes], image: Image.Image) -> bool:
    """Whether the end of a file seems to be missing; leaves the position in the file as it was."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    cut = False
    if image.format in ("JPEG", "PNG"):
        file.seek(max(0, size - TAIL))
        cut = (b"\xff\xd9" if image.format == "JPEG" else b"IEND") not in file.read()
    elif image.format == "BMP":
        file.seek(2)
        cut = struct.unpack("<I", file.read(4))[0] > size
    elif isinstance(image, TiffImageFile):
        cut = end_of_tiff(image) > size
    file.seek(position)
    return cut


def has_end(file: IO[bytes]) -> bool:
    """Whether a PNG's last chunk is anywhere in the file; leaves the position at its end."""
    file.seek(0)
    return b"IEND" in file.read()


def end_of_tiff(image: TiffImageFile) -> int:
    """Byte after the last pixel of the first page."""
    ends = [0]
    for offsets, counts in STRIP_TAGS:
        pairs = zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(counts, ()), strict=False)
        ends += [offset + count for offset, count in pairs]
    return max(ends)


def read_headers(
    paths: Sequence[str], *, threads: int, max_megapixels: float
) -> tuple[list[Header], dict[int, str]]:
    """Headers of many files, read in threads.

    Returns:
        The headers, and for each number of a broken file the line that says so (its header has
        size 0).
    """

    def attempt(path: str) -> Header | str:
        try:
            return read_header(path, max_megapixels=max_megapixels)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(attempt, paths, chunksize=64))
    broken = {i: answer for i, answer in enumerate(answers) if isinstance(answer, str)}
    return [Header(0, 0, 0) if isinstance(a, str) else a for a in answers], broken


# ---------------------------------------------------------------------- pixels


def read_image(path: str, *, channels: int, bit_depth: int, max_megapixels: float) -> np.ndarray:
    """Upright image (C, H, W) of a file, uint8 or uint16 as bit_depth says; in memory the channels
    of a pixel are side by side, as Pillow resizes them.

    Raises:
        UserError: missing, unreadable, broken or floating-point; one line with the path.
    """
    with decoding(path):
        with open_regular(path) as file:
            data = file.read()
        with opened(io.BytesIO(data), max_megapixels) as image:
            turned = orientation(image)
            scale_transparency(image, data)
            if bit_depth == 16:
                refuse_narrowed(image, data)
            pixels = wide_colours(data) if has_wide_colours(image, data) else stored(image)
            pixels = with_transparency(pixels, image)
    if turned != 1:
        pixels = UPRIGHT[turned](pixels)
    pixels = to_depth(to_channels(pixels, channels), bit_depth)
    return np.ascontiguousarray(pixels).transpose(2, 0, 1)


def scale_transparency(image: Image.Image, data: bytes) -> None:
    """The grey that a PNG of 2 or 4 bits calls transparent, of the 8 bits to which Pillow has
    brought the pixels, but not this number."""
    colour = image.info.get("transparency")
    if image.format == "PNG" and data[25] == 0 and data[24] in (2, 4) and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2 ** data[24] - 1)


def has_wide_colours(image: Image.Image, data: bytes) -> bool:
    """Whether an image has 16 bits and several channels, of which Pillow keeps 8 bits."""
    if image.format == "PNG":
        return data[24] == 16 and data[25] in (2, 4, 6)  # bit depth and colour type in IHDR
    if isinstance(image, PpmImageFile):
        return image.mode == "RGB" and white_of(image) > 255
    if image.format == "SGI":
        return data[SGI_BYTES] == 2
    bits = image.tag_v2.get(BITS_TAG, ()) if isinstance(image, TiffImageFile) else ()
    return len(bits) > 1 and max(bits) == 16


def wide_colours(data: bytes) -> np.ndarray:
    """Pixels (H, W, c) uint16 of such a file, c as in `stored`.

    Pillow reads them as the upper byte of each value; told that the byte order is the other one, it
    takes the lower byte for the upper one.
    """
    if data[:4] == b"\x89PNG" and data[25] == 4:
        return wide_grey_alpha(data)
    if data[:2] in GREY_PPM:
        return wide_ppm(data)
    if data[:2] == SGI:
        return wide_sgi(data)
    halves = []
    for swapped in (False, True):
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise UserError(
                    f"16-bit image of mode {image.mode}: save it as 16-bit grey, RGB or RGBA"
                )
            if isinstance(image, TiffImageFile) and image.tag_v2.get(PLANES_TAG) == 2:
                raise UserError(
                    "16-bit TIFF with a plane for each channel: save it with the channels of a"
                    " pixel together, or as 16-bit PNG"
                )
            if swapped:
                image.tile = [tile._replace(args=other_order(tile.args)) for tile in image.tile]
            halves.append(np.asarray(image).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def other_order(args: str | tuple | None) -> str | tuple:
    """Decoder arguments with the other byte order: L little, B big, N the machine's."""
    raw_mode = str(args[0] if isinstance(args, tuple) else args)
    if raw_mode[-3:-1] != "16":
        raise UserError(f"16-bit image stored as {raw_mode}: save it as 16-bit PNG")
    order = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}[raw_mode[-1]]
    raw_mode = raw_mode[:-1] + order
    return (raw_mode, *args[1:]) if isinstance(args, tuple) else raw_mode


def white_of(image: PpmImageFile) -> int:
    """The number that a PPM which is not decoded yet has for white."""
    args = image.tile[0].args
    return int(args[1]) if isinstance(args, tuple) else 255


def wide_ppm(data: bytes) -> np.ndarray:
    """Pixels (H, W, 3) uint16 of a PPM of more than 8 bits: the same numbers declared as a grey
    image of three times the width, of which Pillow keeps 16 bits."""
    with PpmImageFile(io.BytesIO(data)) as image:
        (width, height), white, start = image.size, white_of(image), image.tile[0].offset
    head = b"%s %d %d %d\n" % (GREY_PPM[data[:2]], 3 * width, height, white)
    with PpmImageFile(io.BytesIO(head + data[start:])) as image:
        return np.asarray(image).reshape(height, width, 3).astype(np.uint16)


def wide_sgi(data: bytes) -> np.ndarray:
    """Pixels (H, W, c) uint16 of an SGI file of 16 bits, of which Pillow keeps 8: planes of rows
    from the lowest to the uppermost.

    Raises:
        UserError: they are compressed.
    """
    if data[2]:
        raise UserError("16-bit SGI file with run lengths: save it as 16-bit PNG, or without")
    axes, width, height, planes = struct.unpack_from(">HHHH", data, 4)
    planes = planes if axes == 3 else 1
    pixels = np.frombuffer(data, ">u2", planes * height * width, SGI_START)
    return pixels.reshape(planes, height, width)[:, ::-1].transpose(1, 2, 0).astype(np.uint16)


def refuse_narrowed(image: Image.Image, data: bytes) -> None:
    """Refuse more than 8 bits of which Pillow keeps 8.

    Raises:
        UserError: the file has such.
    """
    bits = 8
    if image.format == "JPEG2000" and not image.mode.startswith("I"):
        place = data.find(J2K_SIZE)  # bits less one of each component, above a bit for the sign
        count = int.from_bytes(data[place + 40 : place + 42])
        bits = max((1 + (byte & 127) for byte in data[place + 42 :][: 3 * count : 3]), default=8)
    elif image.format == "AVIF":
        flags = data[data.find(b"av1C") + 6]
        bits = (12 if flags & 32 else 10) if flags & 64 else 8
    if bits > 8:
        raise UserError(
            f"{image.format} of {bits} bits, of which Pillow reads 8: save it as 16-bit PNG or"
            " TIFF, or set data.bit_depth = 8"
        )


def wide_grey_alpha(data: bytes) -> np.ndarray:
    """Pixels (H, W, 2) uint16 of a PNG of 16-bit grey and alpha: the same bytes declared as 8-bit
    RGBA are upper and lower byte of grey and of alpha."""
    header = data[12:24] + bytes([8, 6]) + data[26:29]
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with Image.open(io.BytesIO(data)) as image:
        quarters = np.asarray(image).astype(np.uint16)
    return quarters[..., ::2] << 8 | quarters[..., 1::2]


def with_transparency(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Pixels (H, W, c) with a channel that clears those of the colour which a 16-bit PNG calls
    transparent; of 8 bits Pillow does so itself."""
    colour = image.info.get("transparency")
    wide = image.format == "PNG" and pixels.dtype == np.uint16
    if not wide or colour is None or pixels.shape[-1] in (2, 4):
        return pixels
    opaque = (pixels != np.array(colour, np.uint16)).any(-1, keepdims=True)
    return np.concatenate([pixels, opaque * np.uint16(65535)], -1)


def stored(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, c) of an image, c = 1 grey, 2 grey and alpha, 3 RGB or 4 RGBA, uint8 or uint16
    as they are stored.

    Raises:
        UserError: floating-point values or values beyond 16 bits.
    """
    if image.mode == "F":
        raise UserError("floating-point image: save it as 8 or 16 bits, scaled as it should be")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        check_range(values)
        return grey_levels(image, values.astype(np.uint16))[..., None]
    pixels = np.asarray(plain_mode(image))
    if isinstance(image, TiffImageFile) and SIGNED in image.tag_v2.get(SIGN_TAG, ()):
        check_range(pixels.view(np.int8))  # Pillow takes -1 for 255
    return pixels if pixels.ndim == 3 else pixels[..., None]


def check_range(values: np.ndarray) -> None:
    """Refuse values of a grey image that are not those of 16 bits."""
    if values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"values {values.min()} to {values.max()} do not fit into 16 bits: save it as 16"
            " bits, scaled as it should be"
        )


def grey_levels(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """Values (H, W) uint16 of a grey image, of which 0 is black and 65535 white."""
    if not isinstance(image, TiffImageFile) or not image.mode.startswith("I;16"):
        return values
    bits = image.tag_v2.get(BITS_TAG, (16,))[0]
    if bits < 16:
        peak = 2**bits - 1
        values = ((values.astype(np.uint32) * 65535 + peak // 2) // peak).astype(np.uint16)
    return 65535 - values if image.tag_v2.get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO else values


def plain_mode(image: Image.Image) -> Image.Image:
    """The image in mode L, LA, RGB or RGBA."""
    if image.mode in ("La", "RGBa", "PA") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Pixels (H, W, c) as (H, W, C) of the same type."""
    peak = np.iinfo(pixels.dtype).max
    has_alpha = pixels.shape[-1] in (2, 4)
    colours = pixels[..., :-1] if has_alpha else pixels
    alpha = pixels[..., -1:] if has_alpha else None
    if alpha is not None and channels != 4:
        colours = over_white(colours, alpha, peak)
    if channels == 1:
        return luma(colours) if colours.shape[-1] == 3 else colours
    colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    if channels == 3:
        return colours
    if alpha is None:
        alpha = np.full((*colours.shape[:2], 1), peak, colours.dtype)
    return np.concatenate([colours, alpha], -1)


def over_white(colours: np.ndarray, alpha: np.ndarray, peak: int) -> np.ndarray:
    """Colours (H, W, c) with transparency (H, W, 1) over white: c a + 1 - a, rounded."""
    if alpha.min() == peak:
        return colours
    a = alpha.astype(np.uint32)
    mixed = colours * a + peak * (peak - a)  # at most peak^2, which uint32 holds
    return ((mixed + peak // 2) // peak).astype(colours.dtype)


def luma(colours: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma (H, W, 1) of RGB (H, W, 3) in fixed point, as Pillow's mode L."""
    wide = np.uint32 if colours.dtype == np.uint8 else np.uint64
    red, green, blue = np.moveaxis(colours.astype(wide), -1, 0)
    sums = red * 19595 + green * 38470 + blue * 7471  # of 2^16
    return ((sums + 0x8000) >> 16).astype(colours.dtype)[..., None]


def to_depth(pixels: np.ndarray, bit_depth: int) -> np.ndarray:
    """uint8 or uint16 values over their whole range as bit_depth 8 or 16."""
    if pixels.dtype == np.uint8:
        return pixels if bit_depth == 8 else pixels.astype(np.uint16) * 257
    if bit_depth == 16:
        return pixels
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


# ---------------------------------------------------------------------- source


class FileSource:
    """Samples in image files, decoded when they are asked for."""

    reads_at_once: ClassVar[bool] = False
    collate: ClassVar[None] = None
    windows: ClassVar[None] = None

    def __init__(
        self,
        paths: Sequence[str],
        headers: Sequence[Header],
        *,
        channels: int,
        bit_depth: int,
        max_megapixels: float,
    ) -> None:
        # Bytes in one array: worker processes share it, while a list of strings would be copied
        # into each of them as reference counts change.
        self.paths = np.array([os.fsencode(path) for path in paths], np.bytes_)  # (N,)
        self.sizes = np.array([(h.height, h.width) for h in headers]).reshape(-1, 2)  # (N, 2)
        self.channels, self.bit_depth = channels, bit_depth
        self.max_megapixels = max_megapixels

    @property
    def uniform(self) -> tuple[int, int, int] | None:
        if not len(self.sizes) or (self.sizes != self.sizes[0]).any():
            return None
        height, width = self.sizes[0].tolist()
        return self.channels, height, width

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[np.ndarray]:
        images, errors = [], []
        for row in rows:
            try:
                images.append(self.read(int(row)))
            except UserError as error:
                errors.append(str(error))
        if errors:
            raise UserError("\n".join(errors))
        return np.stack(images) if self.uniform is not None else images

    def read(self, row: int) -> np.ndarray:
        """One image (C, H, W)."""
        path = os.fsdecode(self.paths[row])
        image = read_image(
            path,
            channels=self.channels,
            bit_depth=self.bit_depth,
            max_megapixels=self.max_megapixels,
        )
        if image.shape[1:] != tuple(self.sizes[row]):
            raise UserError(f"{path}: its size has changed since the run was started")
        return image

    def nbytes(self) -> int:
        return int(self.sizes.prod(1).sum()) * self.channels * self.bit_depth // 8

    def select(self, rows: np.ndarray) -> "FileSource":
        part = copy(self)
        part.paths, part.sizes = self.paths[rows], self.sizes[rows]
        return part
