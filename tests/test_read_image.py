"""Readers: every kind of image file against Pillow's own conversions, and broken files."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from covering import covering
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_images

from glovita_lib import read_image as reading
from glovita_lib.errors import UserError
from glovita_lib.read_image import FileSource, read_image, refuse_narrowed

CHINA, FLOWER = (
    np.ascontiguousarray(photo[200:297, 300:371]) for photo in load_sample_images().images
)
# (97, 71, 3) uint8 parts of two photographs
WIDE = CHINA.astype(np.uint16) * 256 + FLOWER  # 16 bits, all of them used


LARGEST = 1.0  # megapixels


def read(path, channels=3, bit_depth=8, largest=LARGEST):
    return reading.read_image(
        str(path), channels=channels, bit_depth=bit_depth, max_megapixels=largest
    )


def header_of(path, largest=LARGEST):
    return reading.read_header(path, max_megapixels=largest)


def headers_of(paths, threads):
    return reading.read_headers(paths, threads=threads, max_megapixels=LARGEST)


def pillow(path, mode):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def save(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def save_png16(path, pixels, clear=()):
    """A 16-bit PNG of (H, W, c) with a transparent colour, written from its definition as Pillow
    cannot."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    colour = chunk(b"tRNS", np.array(clear, ">u2").tobytes()) if len(clear) else b""
    parts = [
        chunk(b"IHDR", header),
        colour,
        chunk(b"IDAT", zlib.compress(lines)),
        chunk(b"IEND", b""),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NO_SUCH_MODE = {("png", "CMYK"), ("bmp", "CMYK"), ("jpg", "P")}


@pytest.mark.parametrize(
    ("suffix", "channels", "stored"),
    covering(
        ["png", "jpg", "bmp", "tif"],
        [1, 3, 4],
        ["L", "RGB", "1", "P", "CMYK"],
        valid=lambda suffix, channels, stored: (suffix, stored) not in NO_SUCH_MODE,
    ),
)
def test_opaque_images_as_pillow_converts_them(tmp_path, suffix, channels, stored):
    mode = MODES[channels]
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(CHINA).convert(stored))
    image = read(path, channels)
    expected = pillow(path, mode)
    if (stored, mode) in {("P", "L"), ("CMYK", "L")}:  # by way of RGB, as every colour image
        with Image.open(path) as opened:
            expected = np.asarray(opened.convert("RGB").convert("L"))[None]
    assert image.dtype == np.uint8 and image.transpose(1, 2, 0).flags.c_contiguous
    assert (image == expected).all()
    header = header_of(str(path))
    assert (header.height, header.width, header.pages) == (97, 71, 1)


def test_transparent_colours_lie_over_white(tmp_path):
    rgba = np.dstack([CHINA, FLOWER[..., 0]])
    path = save(tmp_path / "a.png", rgba)
    alpha = rgba[..., 3:] / 255
    expected = (CHINA * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)  # float64
    assert np.abs(read(path) - expected).max() <= 0.5
    assert (read(path, 4) == rgba.transpose(2, 0, 1)).all()
    grey = save(tmp_path / "b.png", Image.fromarray(rgba).convert("LA"))
    assert read(grey, 1).shape == (1, 97, 71)
    assert (read(grey, 4)[3] == rgba[..., 3]).all()
    assert (read(grey, 3) == read(grey, 1)).all()


def test_transparent_palette_and_transparent_colour(tmp_path):
    palette = Image.fromarray(CHINA).convert("P")
    index = palette.getpixel((0, 0))
    path = save(tmp_path / "a.png", palette, transparency=index)
    assert (read(path)[:, 0, 0] == 255).all()
    assert (read(path, 4) == pillow(path, "RGBA")).all()
    assert (read(path, 4)[3] == 0).any()
    colour = tuple(int(v) for v in CHINA[0, 0])
    path = save(tmp_path / "b.png", CHINA, transparency=colour)
    assert read(path, 4)[3, 0, 0] == 0 and (read(path)[:, 0, 0] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_16_bits(tmp_path, channels):
    pixels = WIDE[..., :channels].copy()
    pixels[3, 4] = pixels[50, 60] = clear = np.array([300, 300, 700][:channels])
    pixels[9, 9] = clear + 1  # the same in 8 bits
    path = save_png16(tmp_path / "a.png", pixels, clear)
    opaque = (pixels != clear).any(-1)
    assert not opaque[3, 4] and opaque[9, 9]
    assert (read(path, 4, 16)[:3].transpose(1, 2, 0) == pixels).all()
    assert (read(path, 4, 16)[3] == opaque * 65535).all()
    assert (read(path, 4, 8)[3] == opaque * 255).all()
    expected = np.where(opaque[..., None], pixels, 65535)
    assert (read(path, 3, 16).transpose(1, 2, 0) == expected).all()
    assert (read(path, 1, 16)[0] == 65535)[~opaque].all()
    assert np.abs(read(path, 3, 8).transpose(1, 2, 0) - expected / 257).max() <= 0.5


@pytest.mark.parametrize("most", [256, 1023, 65535])
@pytest.mark.parametrize("kind", ["P3", "P6"])
def test_16_bit_colour_ppm(tmp_path, kind, most):
    pixels = WIDE.astype(np.int64) % (most + 1)
    data = pixels.astype(">u2").tobytes()
    if kind == "P3":
        data = b"# red green blue\n" + "\n".join(map(str, pixels.ravel())).encode()
    path = tmp_path / "a.ppm"
    path.write_bytes(f"{kind}\n# 71 wide\n71 97\n{most}\n".encode() + data)
    exact = pixels.transpose(2, 0, 1) * (65535 / most)  # float64
    assert np.abs(read(path, 3, 16) - exact).max() <= 0.5
    assert (read(path, 4, 16)[3] == 65535).all()
    assert np.abs(read(path, 3, 8) - exact / 257).max() <= 0.502  # rounded twice
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="a.ppm: broken image file"):
        read(path, 3, 16)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path, number, suffix):
    exif = Image.Exif()
    exif[0x0112] = number
    path = save(tmp_path / f"a.{suffix}", CHINA, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    image = read(path)
    header = header_of(str(path))
    assert image.shape == upright.shape and (image == upright).all()
    assert (header.height, header.width) == image.shape[1:]


def test_grey_16_bits(tmp_path):
    grey = WIDE[..., 0]
    for path in (
        save(tmp_path / "a.png", grey),
        save(tmp_path / "a.tif", grey),
        save(tmp_path / "b.tif", Image.fromarray(grey.astype(np.int32))),
        save_png16(tmp_path / "b.png", grey[..., None]),
    ):
        wide = read(path, 1, 16)
        assert wide.dtype == np.uint16 and (wide[0] == grey).all()
        assert (read(path, 3, 16) == grey).all()
        assert (read(path, 4, 16)[3] == 65535).all()
        narrow = read(path, 1, 8)
        assert narrow.dtype == np.uint8
        assert np.abs(narrow[0] - grey / 257).max() <= 0.5  # scaled, not clipped


def test_colour_16_bits(tmp_path):
    path = save_png16(tmp_path / "a.png", WIDE)
    assert (read(path, 3, 16) == WIDE.transpose(2, 0, 1)).all()
    assert np.abs(read(path, 3, 8) - WIDE.transpose(2, 0, 1) / 257).max() <= 0.5
    luma = WIDE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(path, 1, 16)[0] - luma).max() < 1.5
    alpha = FLOWER[..., :1].astype(np.uint16) * 257
    path = save_png16(tmp_path / "b.png", np.dstack([WIDE, alpha]))
    expected = WIDE * (alpha / 65535) + 65535 * (1 - alpha / 65535)
    assert np.abs(read(path, 3, 16) - expected.transpose(2, 0, 1)).max() <= 0.5
    assert (read(path, 4, 16) == np.dstack([WIDE, alpha]).transpose(2, 0, 1)).all()
    path = save_png16(tmp_path / "c.png", np.dstack([WIDE[..., :1], alpha]))
    expected = np.dstack([*[WIDE[..., 0]] * 3, alpha]).transpose(2, 0, 1)
    assert (read(path, 4, 16) == expected).all()


def test_8_bit_files_read_as_16_bits_keep_black_and_white(tmp_path):
    path = save(tmp_path / "a.png", CHINA)
    wide = read(path, 3, 16)
    assert wide.dtype == np.uint16
    assert (wide == CHINA.transpose(2, 0, 1).astype(np.uint16) * 257).all()


def test_images_whose_range_is_unknown_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(CHINA[..., 0] / np.float32(255)))
    with pytest.raises(UserError, match="a.tif: floating-point image: save it"):
        read(path)
    path = save(tmp_path / "b.tif", Image.fromarray(CHINA[..., 0].astype(np.int32) * 1000))
    with pytest.raises(UserError, match="b.tif: values .* do not fit into 16 bits"):
        read(path)


def write_tiff(path, order, size, bits, meaning, data):
    """A TIFF of one strip: byte order < or >, (height, width), bits of each sample, what numbers
    mean (0 white is zero, 1 black is zero, 2 RGB), bytes of the pixels."""
    height, width = size
    channels = len(bits)
    place = 8 + 2 * channels
    tags = [  # tag, type (3 short, 4 long), count, value or offset
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 8 if channels > 1 else bits[0]),
        (259, 3, 1, 1), (262, 3, 1, meaning), (273, 4, 1, place), (277, 3, 1, channels),
        (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    padded = [(tag, kind, n, v << 16 * (kind == 3 and n == 1 and order == ">"))
              for tag, kind, n, v in tags]  # fmt: skip
    directory = b"".join(struct.pack(order + "HHII", *tag) for tag in padded)
    path.write_bytes(
        struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, place + len(data))
        + struct.pack(f"{order}{channels}H", *bits)
        + data
        + struct.pack(order + "H", len(tags))
        + directory
        + bytes(4)
    )
    return path


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("packing", ["raw", "tiff_lzw"])
def test_a_signed_tiff_is_read_if_nothing_in_it_is_negative(tmp_path, bits, packing):
    grey = CHINA[..., 0] >> 1
    for least in (0, -1):
        values = grey.astype(f"i{bits // 8}")
        values[5, 7] = least
        kind = {8: "L", 16: "I;16", 32: "I"}[bits]
        image = Image.frombytes(kind, values.shape[::-1], values.tobytes())
        path = save(tmp_path / "a.tif", image, compression=packing, tiffinfo={339: 2})
        with Image.open(path) as opened:
            assert opened.tag_v2[339] == (2,) and opened.tag_v2[258] == (bits,)
        if least < 0:
            with pytest.raises(UserError, match="a.tif: values -1 to 127 do not fit into 16 bits"):
                read(path)
        else:
            assert (
                read(path, 1, 16)[0] == values.astype(np.uint16) * (257 if bits == 8 else 1)
            ).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_tiff(tmp_path, order):
    data = WIDE.astype(order + "u2").tobytes()
    path = write_tiff(tmp_path / "a.tif", order, WIDE.shape[:2], (16, 16, 16), 2, data)
    assert (read(path, 3, 16) == WIDE.transpose(2, 0, 1)).all()
    assert np.abs(read(path, 3, 8) - WIDE.transpose(2, 0, 1) / 257).max() <= 0.5


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("meaning", [0, 1])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_tiff_whose_zero_is_white_is_no_negative(tmp_path, order, meaning, bits):
    grey = WIDE[..., 1] if bits == 16 else CHINA[..., 1]
    stored = np.iinfo(grey.dtype).max - grey if meaning == 0 else grey
    data = stored.astype(f"{order}u{bits // 8}").tobytes()
    path = write_tiff(tmp_path / "a.tif", order, grey.shape, (bits,), meaning, data)
    exact = grey if bits == 16 else grey.astype(np.uint16) * 257
    assert (read(path, 1, 16)[0] == exact).all()
    assert np.abs(read(path, 1, 8)[0] - exact / 257).max() <= 0.5
    assert (read(path, 3, 8) == read(path, 1, 8)).all()
    assert header_of(str(path)).width == 71


def test_a_packed_tiff_whose_zero_is_white(tmp_path):
    grey = WIDE[..., 1]
    image = Image.fromarray(65535 - grey)
    path = save(tmp_path / "a.tif", image, compression="tiff_lzw", tiffinfo={262: 0})
    with Image.open(path) as opened:
        assert opened.tag_v2[262] == 0
    assert (read(path, 1, 16)[0] == grey).all()


def test_the_twelve_bits_of_a_tiff_reach_white(tmp_path):
    grey = WIDE[:, :70, 1] >> 4
    pairs = grey.reshape(len(grey), -1, 2).astype(np.uint32)
    packed = pairs[..., 0] << 12 | pairs[..., 1]  # 24 bits
    data = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], -1).astype(np.uint8).tobytes()
    path = write_tiff(tmp_path / "a.tif", "<", grey.shape, (12,), 1, data)
    assert (read(path, 1, 16)[0] == np.rint(grey * (65535 / 4095))).all()


def test_a_tiff_that_pillow_does_not_know_is_called_one(tmp_path):
    data = WIDE[..., 0].astype(">u2").tobytes()
    path = write_tiff(tmp_path / "a.tif", ">", WIDE.shape[:2], (13,), 1, data)
    with pytest.raises(UserError, match="a.tif: a TIFF of a kind that Pillow does not read: save"):
        read(path)


def test_the_largest_image_is_what_the_spec_says(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", CHINA)  # 6,887 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # Pillow refuses twice as many
    for largest in (0.003, 0.006):
        for reader in (header_of, read):
            with pytest.raises(
                UserError, match=f"a.png: larger than data.max_megapixels = {largest}"
            ):
                reader(str(path), largest=largest)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # above ours
    with pytest.raises(UserError, match="a.png: 71 x 97 pixels are more than data.max_megapixels"):
        header_of(str(path), 0.006)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert (read(path, largest=0.007) == CHINA.transpose(2, 0, 1)).all()
    assert header_of(str(path), 0.007).width == 71
    assert Image.MAX_IMAGE_PIXELS == 7000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # somebody took the limit away
    assert header_of(str(path), 0.007).width == 71 and Image.MAX_IMAGE_PIXELS is None


def test_first_page_of_a_tiff(tmp_path):
    first, second = Image.fromarray(CHINA), Image.fromarray(FLOWER)
    path = save(tmp_path / "a.tif", first, save_all=True, append_images=[second])
    assert header_of(str(path)).pages == 2
    assert (read(path) == CHINA.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_found_by_its_header_and_when_decoded(tmp_path, suffix, kept):
    path = save(tmp_path / f"a.{suffix}", CHINA)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    for reader in (lambda p: header_of(str(p)), read):
        with pytest.raises(UserError) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_png_whose_second_half_was_never_written(tmp_path):
    path = save(tmp_path / "a.png", np.tile(CHINA, (8, 8, 1)))
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(UserError, match="a.png: broken image file"):
        header_of(str(path))


def test_a_jpeg_with_something_behind_its_end_is_whole(tmp_path):
    path = save(tmp_path / "a.jpg", CHINA)
    before = read(path)
    path.write_bytes(path.read_bytes() + bytes(10_000))
    assert header_of(str(path)).width == 71
    assert (read(path) == before).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"", "an empty file"), (b"words, no image", "not an image file")],
)
def test_files_that_are_no_images(tmp_path, content, said):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.png: {said}"):
        read(path)
    with pytest.raises(UserError, match="a folder, expected an image file"):
        read(tmp_path)


def test_damaged_bytes_never_raise_anything_but_user_errors(tmp_path):
    generator = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "tif"):
        path = save(tmp_path / f"a.{suffix}", CHINA)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            hurt = data.copy()
            hurt[generator.integers(0, min(200, len(hurt)), 4)] = generator.integers(0, 256, 4)
            path.write_bytes(hurt.tobytes())
            try:
                header_of(str(path))
                read(path)
            except UserError as error:
                assert str(path) in str(error)
            except Image.DecompressionBombWarning:
                pass  # a size of its own making, a warning outside of tests


def test_headers_of_many_files_and_the_broken_among_them(tmp_path):
    paths = [str(save(tmp_path / f"{i}.png", CHINA[: 10 + i])) for i in range(5)]
    os.truncate(paths[3], 40)
    headers, broken = headers_of([*paths, str(tmp_path / "no.png")], threads=2)
    assert [header.height for header in headers] == [10, 11, 12, 0, 14, 0]
    assert set(broken) == {3, 5}
    assert "3.png: " in broken[3] and "no.png: no such file" in broken[5]


def source_of(paths, channels=3, bit_depth=8):
    headers, _ = headers_of(paths, threads=2)
    return FileSource(
        paths, headers, channels=channels, bit_depth=bit_depth, max_megapixels=LARGEST
    )


def test_source_of_files_of_one_size(tmp_path):
    paths = [
        str(save(tmp_path / f"bild ä{i}.png", photo)) for i, photo in enumerate((CHINA, FLOWER))
    ]
    source = source_of(paths)
    assert source.uniform == (3, 97, 71) and source.nbytes() == 2 * 3 * 97 * 71
    batch = source.fetch(np.array([1, 0, 1]))
    assert (batch == np.stack([FLOWER, CHINA, FLOWER]).transpose(0, 3, 1, 2)).all()
    assert source_of(paths, 1, 16).nbytes() == 2 * 2 * 97 * 71


def test_source_of_files_of_differing_sizes_lists_broken_ones_together(tmp_path):
    paths = [str(save(tmp_path / f"{i}.png", CHINA[: 20 + i])) for i in range(4)]
    source = source_of(paths)
    assert source.uniform is None
    assert [image.shape for image in source.fetch(np.array([2, 0]))] == [(3, 22, 71), (3, 20, 71)]
    os.truncate(paths[1], 60)
    save(paths[2], FLOWER)
    with pytest.raises(UserError) as caught:
        source.fetch(np.arange(4))
    first, second = str(caught.value).splitlines()
    assert "1.png: " in first and "2.png: its size has changed" in second


def test_the_transparent_grey_of_two_and_four_bits(tmp_path):
    """Pillow brings the pixels to 8 bits and leaves the number that is transparent as it was."""
    for depth in (1, 2, 4, 8):
        levels = 2**depth
        grey = np.arange(8) % levels
        bits = "".join(f"{level:0{depth}b}" for level in grey)
        row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
        parts = [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0)),
            (b"tRNS", struct.pack(">H", 1)),
            (b"IDAT", zlib.compress(row)),
            (b"IEND", b""),
        ]
        data = b"\x89PNG\r\n\x1a\n"
        for name, content in parts:
            sum_ = struct.pack(">I", zlib.crc32(name + content))
            data += struct.pack(">I", len(content)) + name + content + sum_
        (tmp_path / "x.png").write_bytes(data)
        found = read_image(str(tmp_path / "x.png"), channels=4, bit_depth=8, max_megapixels=1)
        assert found[0, 0].tolist() == (grey * 255 // (levels - 1)).tolist()
        assert found[3, 0].tolist() == np.where(grey == 1, 0, 255).tolist()


def sgi(pixels, *, packed=False):
    """An SGI file of 16 bits a number, as its specification has it."""
    height, width, planes = pixels.shape
    axes = 3 if planes > 1 else 2
    head = struct.pack(">HBBHHHH", 474, packed, 2, axes, width, height, planes)
    rows = pixels[::-1].transpose(2, 0, 1).astype(">u2").tobytes()
    return head.ljust(512, b"\0") + rows


@pytest.mark.parametrize("planes", [1, 3, 4])
def test_sgi_of_16_bits_keeps_them(tmp_path, planes):
    path = tmp_path / "x.sgi"
    pixels = np.arange(30 * planes, dtype=np.uint16).reshape(5, 6, planes) * 541 + 3
    path.write_bytes(sgi(pixels))
    with Image.open(path) as image:  # the upper bytes are what Pillow says
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels >> 8)
    channels = 1 if planes == 1 else planes
    found = read_image(str(path), channels=channels, bit_depth=16, max_megapixels=1)
    assert np.array_equal(found.transpose(1, 2, 0), pixels)
    path.write_bytes(sgi(pixels, packed=True))
    with pytest.raises(UserError, match="x.sgi: 16-bit SGI file with run lengths: save it"):
        read_image(str(path), channels=channels, bit_depth=16, max_megapixels=1)


@pytest.mark.parametrize(
    ("suffix", "mark", "place", "byte", "bits"),
    [
        ("j2k", b"\xff\x4f\xff\x51", 42, 11, 12),
        ("jp2", b"\xff\x4f\xff\x51", 45, 15, 16),
        ("avif", b"av1C", 6, 64, 10),
        ("avif", b"av1C", 6, 96, 12),
    ],
)
def test_deep_colours_that_pillow_narrows_are_refused(tmp_path, suffix, mark, place, byte, bits):
    """The number of bits, which no encoder here can write, is set in the header."""
    path = str(tmp_path / f"x.{suffix}")
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(path)
    assert read_image(path, channels=3, bit_depth=16, max_megapixels=1).dtype == np.uint16
    data = bytearray(Path(path).read_bytes())
    at = data.find(mark) + place
    data[at] = data[at] | byte if suffix == "avif" else byte
    with Image.open(path) as image, pytest.raises(UserError, match=f"of {bits} bits, of which"):
        refuse_narrowed(image, bytes(data))


def test_16_bit_planes_of_a_tiff_are_refused(tmp_path):
    """Pillow keeps the upper byte of compressed ones, whatever it is told of their order."""
    pixels = np.arange(3 * 4 * 5, dtype="<u2").reshape(3, 4, 5) * 1000
    strips = [zlib.compress(plane.tobytes()) for plane in pixels]
    places = np.cumsum([8, *map(len, strips)])
    end, body = int(places[3]), b"".join(strips)
    arrays = [[16] * 3, places[:3].tolist(), list(map(len, strips))]
    at = [end + 12 * number for number in range(3)]  # of three numbers of 4 bytes each
    entries = [
        (256, 4, 1, 5), (257, 4, 1, 4), (258, 4, 3, at[0]), (259, 4, 1, 8), (262, 4, 1, 2),
        (273, 4, 3, at[1]), (277, 4, 1, 3), (278, 4, 1, 4), (279, 4, 3, at[2]), (284, 4, 1, 2),
    ]  # fmt: skip
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    numbers = b"".join(struct.pack("<3I", *values) for values in arrays)
    head = b"II*\0" + struct.pack("<I", end + len(numbers))
    path = tmp_path / "planes.tif"
    path.write_bytes(head + body + numbers + table + bytes(4))
    with pytest.raises(UserError, match="a plane for each channel: save it with the channels"):
        read_image(str(path), channels=3, bit_depth=16, max_megapixels=179)
    with Image.open(path) as image:  # a sound file, of which Pillow keeps 8 bits
        np.testing.assert_array_equal(np.asarray(image), (pixels >> 8).transpose(1, 2, 0))
