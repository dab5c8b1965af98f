"""Windows and resampling against torchvision and PIL on real photos."""

import math

import numpy as np
import pytest
import torch
from covering import covering
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from glovita_lib.augment import PLAIN, policy
from glovita_lib.augment_crop import CropResize, gather_pixels
from glovita_lib.errors import UserError

PHOTO = np.ascontiguousarray(load_sample_image("flower.jpg").transpose(2, 0, 1))[:, 40:190, 30:250]
MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
    "nearest": InterpolationMode.NEAREST_EXACT,
}


def fit(
    size: int, shortest: int | None = None, interpolation: str = "bilinear", **changes
) -> CropResize:
    return CropResize(
        policy(PLAIN, **changes),
        image_size=size,
        resize_size=shortest or size,
        interpolation=interpolation,
        bit_depth=8,
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(*images: np.ndarray) -> np.ndarray:
    return np.array([image.shape[1:] for image in images])


def photos(count: int) -> torch.Tensor:
    """Different crops of one photo, (count, 3, 120, 160)."""
    return torch.stack(
        [torch.from_numpy(PHOTO[:, i : i + 120, 2 * i : 2 * i + 160].copy()) for i in range(count)]
    )


def resized(geometry: CropResize, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) and their windows (B, 4) -> (B, C, S, S) float32 in 0..1."""
    return geometry.canvas(images, boxes).float() / geometry.peak


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [24, 64, 224])
def test_resized_crop_equals_torchvision(interpolation, size):
    images = photos(6).int()  # int32 goes through the matrix products, as uint8 does off the CPU
    geometry = fit(size, interpolation=interpolation, crop="resized", scale=(0.1, 1.0))
    boxes = geometry.boxes(np.tile([120, 160], (6, 1)), seeded())
    assert len(boxes.unique(dim=0)) == 6
    ours = resized(geometry, images, boxes)
    for image, box, our in zip(images, boxes.int().tolist(), ours, strict=True):
        reference = TF.resized_crop(
            image.double() / 255,
            *box,
            size=[size, size],
            interpolation=MODES[interpolation],
            antialias=True,
        )
        # torch computes the antialias weights of float input in the input's type
        torch.testing.assert_close(our, reference.clamp(0, 1).float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("box", [(0, 0, 120, 160), (13, 21, 64, 80), (10.25, 3.5, 100.5, 70.125)])
@pytest.mark.parametrize("size", [32, 211])
def test_window_equals_pil_resize_with_box(interpolation, box, size):
    image = PHOTO[:, :120, :160]
    geometry = fit(size, interpolation=interpolation)
    windows = torch.tensor([box], dtype=torch.float64)
    our = geometry.canvas(torch.from_numpy(image.astype(np.int32))[None], windows)[0].numpy()
    y, x, h, w = box
    reference = Image.fromarray(image.transpose(1, 2, 0)).resize(
        (size, size), Image.Resampling[interpolation.upper()], box=(x, y, x + w, y + h)
    )
    difference = np.abs(our - np.asarray(reference, dtype=float).transpose(2, 0, 1))
    if interpolation == "nearest":  # a centre exactly between two pixels may fall either way
        assert (difference > 0).mean() < 0.01
    else:  # PIL rounds and clips to whole levels after each of the two axes
        assert np.quantile(difference, 0.999) < 1.2 and difference.max() < 5


@pytest.mark.parametrize("shape", [(120, 160), (151, 97), (33, 200), (64, 64)])
@pytest.mark.parametrize("size, resize", [(32, 36), (50, 57), (48, 48)])
def test_centre_crop_equals_resize_then_crop(shape, size, resize):
    image = torch.from_numpy(PHOTO[:, : shape[0], : shape[1]].copy()).float() / 255
    if image.shape[1:] != shape:
        image = TF.resize(image, list(shape), antialias=True)
    geometry = fit(size, resize)
    levels = (image * 255).round()
    reference = TF.center_crop(TF.resize(levels / 255, [resize], antialias=True), [size, size])
    our = resized(geometry, levels.to(torch.int32)[None], geometry.boxes(np.array([shape]), None))
    torch.testing.assert_close(our[0], reference, atol=1e-5, rtol=0)


def test_random_crop_covers_every_offset_once_resized():
    geometry = fit(32, 34, crop="random")
    boxes = geometry.boxes(np.tile([68, 136], (4000, 1)), seeded())
    offsets = boxes[:, :2] / 2  # 2 source pixels per resized one
    assert (offsets == offsets.floor()).all() and (boxes[:, 2:] == 64).all()
    counts = torch.bincount(offsets[:, 0].long(), minlength=3)  # 0, 1, 2
    assert len(counts) == 3 and (counts > 4000 / 3 * 0.85).all()
    assert offsets[:, 1].min() == 0 and offsets[:, 1].max() == 36


def test_padded_crop_equals_torchvision_pad_and_crop():
    images = photos(30)[:, :, :32, :32]
    geometry = fit(32, crop="padded", resize="image_size", crop_padding=4)
    boxes = geometry.boxes(np.tile([32, 32], (30, 1)), seeded())
    ours = geometry.canvas(images, boxes)
    assert ours.dtype == torch.uint8
    for image, (y, x, h, w), our in zip(images, boxes.int().tolist(), ours, strict=True):
        assert -4 <= y <= 4 and -4 <= x <= 4
        assert torch.equal(our, TF.crop(TF.pad(image, [4]), y + 4, x + 4, h, w))
    many = geometry.boxes(np.tile([32, 32], (9000, 1)), seeded(1))[:, :2] + 4
    counts = torch.bincount((many[:, 0] * 9 + many[:, 1]).long(), minlength=81)
    assert counts.min() > 60 and counts.max() < 170  # 111 expected of each of 81 places


def test_padded_crop_of_an_upsampled_image():
    images = photos(5)[:, :, :32, :32].int()
    geometry = fit(96, crop="padded", resize="image_size", crop_padding=4)
    boxes = geometry.boxes(np.tile([32, 32], (5, 1)), seeded())
    for image, (y, x, h, w), our in zip(
        images, boxes.int().tolist(), resized(geometry, images, boxes), strict=True
    ):
        reference = TF.resized_crop(
            TF.pad(image, [4]).double() / 255, y + 4, x + 4, h, w, [96, 96], antialias=True
        )
        torch.testing.assert_close(our, reference.float(), atol=1e-5, rtol=0)


def test_resized_windows_follow_torchvision_distribution():
    """Areas and ratios as in torchvision's RandomResizedCrop, both from 3000 draws."""
    scale, ratio = (0.2, 0.9), (0.5, 2.0)
    boxes = fit(32, crop="resized", scale=scale, ratio=ratio).boxes(
        np.tile([100, 140], (3000, 1)), seeded()
    )
    y, x, h, w = boxes.T
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 100).all() and (x + w <= 140).all()
    torch.manual_seed(0)
    transform = RandomResizedCrop(32, scale=scale, ratio=ratio)
    image = torch.zeros(1, 100, 140)
    drawn = [transform.make_params([image]) for _ in range(3000)]
    for ours, key in ((y, "top"), (x, "left"), (h, "height"), (w, "width")):
        theirs = torch.tensor([d[key] for d in drawn]).double()
        spread = theirs.std() * math.sqrt(2 / 3000)
        assert abs(ours.mean() - theirs.mean()) < 4 * spread, key
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        gap = (ours.quantile(quantiles) - theirs.quantile(quantiles)).abs()
        assert (gap < 0.15 * theirs.std()).all(), key


def test_resized_falls_back_to_the_largest_legal_window():
    geometry = fit(32, crop="resized", scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    y, x, h, w = geometry.boxes(np.array([[50, 400]]), seeded())[0].tolist()
    assert (h, w) == (50, round(50 * 4 / 3)) and (y, x) == (0, (400 - w) // 2)
    y, x, h, w = geometry.boxes(np.array([[400, 50]]), seeded())[0].tolist()
    assert (h, w) == (round(50 / 0.75), 50) and (y, x) == ((400 - h) // 2, 0)


def test_whole_image_is_squashed():
    geometry = fit(40, crop="none")
    boxes = geometry.boxes(sizes(PHOTO), None)
    reference = TF.resize(torch.from_numpy(PHOTO.copy()).double() / 255, [40, 40], antialias=True)
    our = resized(geometry, torch.from_numpy(PHOTO.astype(np.int32))[None], boxes)[0]
    torch.testing.assert_close(our, reference.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("crop", "interpolation", "channels", "size"),
    covering(
        ["none", "center", "random", "resized", "padded"],
        ["bilinear", "bicubic"],
        [1, 3],
        [40, 150],
    ),
)
def test_integer_code_is_within_a_level_of_the_matrix_products(crop, interpolation, channels, size):
    images = photos(4)[:, :channels]
    changes = {"crop": crop, "resize": "resize_size", "crop_padding": 9, "scale": (0.2, 1.0)}
    geometry = fit(size, size + 9, interpolation, **changes)
    boxes = geometry.boxes(np.tile([120, 160], (4, 1)), seeded())
    quick, exact = geometry.canvas(images, boxes), geometry.canvas(images.int(), boxes)
    assert quick.dtype == torch.uint8 and exact.dtype == torch.float32
    difference = (quick - exact).abs()
    assert difference.quantile(0.999) < 1.2 and difference.mean() < 0.35


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("crop", ["padded", "random", "resized"])
def test_flips_mirror_the_canvas_of_their_sample_only(crop, dtype):
    images = photos(4).to(dtype)
    geometry = fit(60, 66, crop=crop, resize="resize_size")
    boxes = geometry.boxes(np.tile([120, 160], (4, 1)), seeded())
    plain = geometry.canvas(images, boxes)
    hflip = torch.tensor([True, False, True, False])
    vflip = torch.tensor([True, True, False, False])
    flipped = geometry.canvas(images, boxes, hflip, vflip)
    expected = [plain[0].flip(1, 2), plain[1].flip(1), plain[2].flip(2), plain[3]]
    gap = (flipped.float() - torch.stack(expected).float()).abs().max()
    assert gap <= (0 if dtype == torch.uint8 else 2e-3)


def test_one_equals_batch_and_shared_windows_equal_single_ones():
    images = photos(3)
    for interpolation in ("bilinear", "lanczos", "nearest"):
        geometry = fit(40, 45, interpolation)
        boxes = geometry.boxes(np.tile([120, 160], (3, 1)), None)
        batch = resized(geometry, images, boxes)
        for image, box, row in zip(images, boxes, batch, strict=True):
            single = geometry.one(image.numpy(), box)
            assert single.dtype == torch.uint8
            image.numpy().setflags(write=False)  # as arrays from PIL are
            assert torch.equal(geometry.one(image.numpy(), box), single)
            assert (single.float() / 255 - row).abs().max() <= 0.5 / 255 + 1e-6


def test_large_batches_go_in_parts(monkeypatch):
    images = photos(5).int()
    geometry = fit(40, 45, crop="random")
    boxes = geometry.boxes(np.tile([120, 160], (5, 1)), seeded())
    whole = resized(geometry, images, boxes)
    monkeypatch.setattr("glovita_lib.augment_crop.CHUNK", 2 * 3 * 120 * 160)
    torch.testing.assert_close(resized(geometry, images, boxes), whole)


def test_sixteen_bit_keeps_its_depth():
    image = (PHOTO[:1].astype(np.uint16) << 8) + np.arange(220, dtype=np.uint16)
    geometry = CropResize(
        PLAIN, image_size=64, resize_size=64, interpolation="bilinear", bit_depth=16
    )
    box = geometry.boxes(sizes(image), None)
    single = geometry.one(image, box[0])
    assert single.dtype == torch.int32 and single.max() > 255
    wide = torch.from_numpy(image.astype(np.int32))
    reference = TF.center_crop(TF.resize(wide.double() / 65535, [64], antialias=True), [64, 64])
    torch.testing.assert_close(single.double() / 65535, reference, atol=1 / 65535, rtol=0)
    batch = resized(geometry, wide[None], box)[0]
    torch.testing.assert_close(batch, reference.float(), atol=1e-5, rtol=0)


def test_gather_reads_zeros_outside():
    image = torch.arange(1, 13, dtype=torch.int32).view(1, 1, 3, 4)
    rows, columns = torch.tensor([[-1, 0, 3]]), torch.tensor([[3, 4, -2, 0]])
    expected = torch.tensor([[0, 0, 0, 0], [4, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.int32)
    assert torch.equal(gather_pixels(image, rows, columns)[0, 0], expected)


def test_one_pixel_images():
    image = np.full((3, 1, 1), 200, np.uint8)
    for crop in ("none", "center", "random", "resized", "padded"):
        geometry = fit(4, 4, crop=crop, crop_padding=0)
        box = geometry.boxes(sizes(image), seeded())
        assert (geometry.one(image, box[0]) == 200).all()


@pytest.mark.parametrize("crop, padding", [("center", 0), ("random", 0), ("padded", 2)])
def test_image_smaller_than_the_crop_is_a_user_error(crop, padding):
    geometry = fit(64, 64, crop=crop, resize="none", crop_padding=padding)
    with pytest.raises(UserError, match=r"40x200 pixels is smaller than the 64x64 crop"):
        geometry.boxes(np.array([[100, 100], [40, 200]]), seeded())


def test_empty_batch_has_no_windows():
    for crop in ("none", "center", "random", "resized", "padded"):
        assert fit(8, crop=crop).boxes(np.zeros((0, 2)), seeded()).shape == (0, 4)
