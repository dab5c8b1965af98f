"""Windows against torchvision, resampling against Pillow, level by level, on real photos."""

import math

import numpy as np
import pytest
import torch
from covering import covering
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from glovita_lib.augment_crop import CropResize, gather_pixels
from glovita_lib.errors import UserError
from glovita_lib.spec_augment import PLAIN, policy

PHOTO = np.ascontiguousarray(load_sample_image("flower.jpg").transpose(2, 0, 1))[:, 40:190, 30:250]


def fit(
    size: int,
    shortest: int | None = None,
    interpolation: str = "bilinear",
    crop_mode: str = "center",
    bit_depth: int = 8,
    crop_size: int | None = None,
    **changes,
) -> CropResize:
    return CropResize(
        policy(PLAIN, **changes),
        image_size=size,
        resize_size=shortest or size,
        interpolation=interpolation,
        bit_depth=bit_depth,
        crop_mode=crop_mode,
        mean=(0.485, 0.456, 0.406),
        crop_size=crop_size,
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


def pillow(image: np.ndarray, box: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """A window (2, 4) of an image (C, H, W) as Pillow makes it: pad, crop, resize, crop."""
    (y, h, tall, top), (x, w, wide, left) = box.tolist()
    margin = max(0, -y, -x, y + h - image.shape[1], x + w - image.shape[2])
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)))
    cut = padded[:, y + margin : y + margin + h, x + margin : x + margin + w]
    bands = [
        Image.fromarray(band).resize((wide, tall), Image.Resampling[interpolation.upper()])
        for band in cut
    ]
    return torch.from_numpy(np.stack(bands))[:, top : top + size, left : left + size]


def in_every_way(geometry: CropResize, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The canvas (B, C, S, S) of a batch of bytes, which is the same as whole numbers (what a GPU
    multiplies), one by one, and as they lie in memory after decoding."""
    canvas = geometry.canvas(images, boxes)
    assert canvas.dtype == torch.uint8
    wide = geometry.canvas(images.int(), boxes)
    assert wide.dtype == torch.int32 and torch.equal(wide, canvas.int())
    for image, box, row in zip(images, boxes, canvas, strict=True):
        as_decoded = np.ascontiguousarray(image.numpy().transpose(1, 2, 0)).transpose(2, 0, 1)
        as_decoded.setflags(write=False)  # as arrays from Pillow are
        for array in (image.numpy(), as_decoded):
            assert torch.equal(geometry.one(array, box), row)
    return canvas


INTERPOLATIONS = ["bilinear", "bicubic", "lanczos"]
CROPS = ["none", "center", "random", "resized", "padded"]


@pytest.mark.parametrize(
    ("crop", "interpolation", "shape", "size"),
    covering(
        CROPS,
        INTERPOLATIONS,
        [(120, 160), (160, 90), (31, 200), (64, 64), (7, 5), (150, 3)],
        [1, 24, 64, 211],
    ),
)
def test_every_way_gives_the_levels_of_pillow(crop, interpolation, shape, size):
    rng = np.random.default_rng(size)
    photo = np.asarray(Image.fromarray(PHOTO.transpose(1, 2, 0)).resize(shape[::-1]))
    photo = photo.transpose(2, 0, 1)
    noise = rng.integers(0, 256, (3, *shape), np.uint8)
    hard = (noise > 127).astype(np.uint8) * 255  # where a kernel overshoots
    images = torch.from_numpy(np.stack([photo, noise, hard, photo[::-1], hard[::-1]]))
    changes = {"resize": "resize_size", "crop_padding": 9, "scale": (0.05, 1.0), "ratio": (0.3, 3)}
    geometry = fit(size, size + size // 7, interpolation, crop=crop, **changes)
    boxes = geometry.boxes(np.tile(shape, (5, 1)), seeded(size))
    for image, box, our in zip(images, boxes, in_every_way(geometry, images, boxes), strict=True):
        assert torch.equal(our, pillow(image.numpy(), box, size, interpolation))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("shape", [(120, 160), (33, 200), (55, 55)])
def test_an_image_smaller_than_its_centre_crop_gets_the_margin_of_torchvision(shape, interpolation):
    """As the weights of volo_d5 were evaluated."""
    picture = Image.fromarray(np.maximum(PHOTO, 1).transpose(1, 2, 0)).resize(shape[::-1])
    geometry = fit(64, 55, interpolation)
    method = TF.InterpolationMode(interpolation)
    reference = TF.pil_to_tensor(TF.center_crop(TF.resize(picture, [55], method), [64, 64]))
    images = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None]
    ours = in_every_way(geometry, images, geometry.boxes(np.array([shape]), None))
    if interpolation == "bilinear":
        assert torch.equal(ours[0], reference)
    assert torch.equal(ours[0] == 0, reference == 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_are_resampled_by_themselves(channels):
    images = torch.cat([photos(3), 255 - photos(3)], 1)[:, :channels]
    geometry = fit(50, 57, "bicubic", crop="random")
    boxes = geometry.boxes(np.tile([120, 160], (3, 1)), seeded())
    for image, box, our in zip(images, boxes, in_every_way(geometry, images, boxes), strict=True):
        assert torch.equal(our, pillow(image.numpy(), box, 50, "bicubic"))


@pytest.mark.parametrize("shape", [(5000, 3), (3, 5000), (2500, 60)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_of_a_strip_only_what_is_shown_is_enlarged(shape, crop, monkeypatch):
    """The whole of it would be 224 x 373,333 pixels."""
    image = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    geometry = fit(224, 224, "bicubic", crop=crop)
    box = geometry.boxes(np.array([shape]), seeded())[0]
    resized = []
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *_: resized.append(size) or self.copy()
    )
    ours = geometry.one(image, box)
    monkeypatch.undo()
    assert not resized
    # the same by a part of it that Pillow can enlarge: whole numbers of both sizes, far from it
    axis = int(shape[1] > shape[0])
    start, length, size, offset = box[axis].tolist()
    step, steps = length // math.gcd(length, size), size // math.gcd(length, size)
    skip = max(0, offset // steps - 4)
    part, keep = box.clone(), 4 * step + -(-(offset + 224) * length // size) - skip * step
    keep = min(-(-keep // step) * step, length - skip * step)
    part[axis] = torch.tensor([skip * step, keep, keep // step * steps, offset - skip * steps])
    assert torch.equal(ours, pillow(image, part, 224, "bicubic"))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_are_exact_whatever_precision_was_allowed(precision, monkeypatch):
    """A GPU would read 11 bits of a factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        images = photos(3)
        geometry = fit(40, 45, "bicubic", crop="random")
        boxes = geometry.boxes(np.tile([120, 160], (3, 1)), seeded())
        found = in_every_way(geometry, images, boxes)
    finally:
        torch.set_float32_matmul_precision(before)
    for image, box, our in zip(images, boxes, found, strict=True):
        assert torch.equal(our, pillow(image.numpy(), box, 40, "bicubic"))


def test_more_pixels_than_float32_adds_exactly():
    image = np.random.default_rng(0).integers(0, 2, (1, 3000, 4), np.uint8) * 255
    geometry = fit(5, interpolation="lanczos", crop="none")  # 3,600 of them make one
    boxes = geometry.boxes(sizes(image), None)
    ours = in_every_way(geometry, torch.from_numpy(image)[None], boxes)
    assert torch.equal(ours[0], pillow(image, boxes[0], 5, "lanczos"))


@pytest.mark.parametrize("size", [32, 211])
@pytest.mark.parametrize("shape", [(120, 160), (33, 200), (64, 64)])
def test_nearest_equals_pillow(shape, size):
    image = np.ascontiguousarray(PHOTO[:, : shape[0], : shape[1]])
    geometry = fit(size, interpolation="nearest", crop="none")
    boxes = geometry.boxes(sizes(image), None)
    ours = in_every_way(geometry, torch.from_numpy(image)[None], boxes)[0]
    # a centre exactly between two pixels may fall either way
    assert (ours != pillow(image, boxes[0], size, "nearest")).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(120, 160), (151, 97), (33, 200), (64, 64)])
@pytest.mark.parametrize("size, resize", [(32, 36), (50, 57), (48, 48)])
def test_centre_crop_equals_the_transforms_of_torchvision(shape, size, resize):
    picture = Image.fromarray(PHOTO.transpose(1, 2, 0)).resize(shape[::-1])
    image = np.asarray(picture).transpose(2, 0, 1)
    geometry = fit(size, resize)
    reference = TF.pil_to_tensor(TF.center_crop(TF.resize(picture, [resize]), [size, size]))
    assert torch.equal(geometry.one(image, geometry.boxes(np.array([shape]), None)[0]), reference)


def test_random_crop_covers_every_offset_once_resized():
    geometry = fit(32, 34, crop="random")
    boxes = geometry.boxes(np.tile([68, 136], (4000, 1)), seeded())
    assert torch.equal(boxes[0, :, :3], torch.tensor([[0, 68, 34], [0, 136, 68]]))
    assert (boxes[:, :, :3] == boxes[0, :, :3]).all()
    offsets = boxes[:, :, 3]
    counts = torch.bincount(offsets[:, 0].long(), minlength=3)  # 0, 1, 2
    assert len(counts) == 3 and (counts > 4000 / 3 * 0.85).all()
    assert offsets[:, 1].min() == 0 and offsets[:, 1].max() == 36


def test_padded_crop_equals_torchvision_pad_and_crop():
    images = photos(30)[:, :, :32, :32]
    geometry = fit(32, crop="padded", resize="image_size", crop_padding=4)
    boxes = geometry.boxes(np.tile([32, 32], (30, 1)), seeded())
    ours = geometry.canvas(images, boxes)
    assert ours.dtype == torch.uint8
    for image, box, our in zip(images, boxes, ours, strict=True):
        (y, x), (h, w) = box[:, 0].tolist(), box[:, 1].tolist()
        assert -4 <= y <= 4 and -4 <= x <= 4
        assert torch.equal(our, TF.crop(TF.pad(image, [4]), y + 4, x + 4, h, w))
    many = geometry.boxes(np.tile([32, 32], (9000, 1)), seeded(1))[:, :, 0] + 4
    counts = torch.bincount(many[:, 0] * 9 + many[:, 1], minlength=81)
    assert counts.min() > 60 and counts.max() < 170  # 111 expected of each of 81 places


def test_resized_windows_follow_torchvision_distribution():
    """Areas and ratios as in torchvision's RandomResizedCrop, both from 3000 draws."""
    scale, ratio = (0.2, 0.9), (0.5, 2.0)
    boxes = fit(32, crop="resized", scale=scale, ratio=ratio).boxes(
        np.tile([100, 140], (3000, 1)), seeded()
    )
    y, x, h, w = boxes[:, :, :2].mT.flatten(1).T.double()
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
    (y, h, *_), (x, w, *_) = geometry.boxes(np.array([[50, 400]]), seeded())[0].tolist()
    assert (h, w) == (50, round(50 * 4 / 3)) and (y, x) == (0, (400 - w) // 2)
    (y, h, *_), (x, w, *_) = geometry.boxes(np.array([[400, 50]]), seeded())[0].tolist()
    assert (h, w) == (round(50 / 0.75), 50) and (y, x) == ((400 - h) // 2, 0)


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
    assert torch.equal(flipped, torch.stack(expected))


def test_large_batches_go_in_parts(monkeypatch):
    images = photos(5).int()
    geometry = fit(40, 45, crop="random")
    boxes = geometry.boxes(np.tile([120, 160], (5, 1)), seeded())
    whole = geometry.canvas(images, boxes)
    monkeypatch.setattr("glovita_lib.augment_crop.CHUNK", 2 * 3 * 120 * 160)
    assert torch.equal(geometry.canvas(images, boxes), whole)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(120, 160), (160, 90), (40, 40)])
def test_sixteen_bits_equal_pillow(interpolation, shape):
    """Pillow weighs them in float64 without rounding the weights, and wraps what overshoots."""
    image = np.random.default_rng(0).integers(20000, 40000, (1, *shape)).astype(np.uint16)
    geometry = fit(64, 73, interpolation, bit_depth=16)
    box = geometry.boxes(sizes(image), None)
    single = geometry.one(image, box[0])
    assert single.dtype == torch.int32 and single.max() > 255
    reference = pillow(image, box[0], 64, interpolation).int()
    off = (single - reference).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01  # halves fall either way
    assert torch.equal(
        geometry.canvas(torch.from_numpy(image.astype(np.int32))[None], box)[0], single
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_levels_stay_in_their_range(bits):
    """What a kernel overshoots is cut off along the first axis, before the second one sees it."""
    peak = 2**bits - 1
    image = np.zeros((1, 40, 40), np.uint8 if bits == 8 else np.uint16)
    image[:, 10:30, 10:30] = peak
    geometry = fit(97, 97, "bicubic", bit_depth=bits, crop="none")
    box = geometry.boxes(sizes(image), None)[0]
    ours = geometry.one(image, box)
    assert ours.min() == 0 and ours.max() == peak
    assert (ours[0, 48, 30:68] == peak).all() and (ours[0, :20] == 0).all()


def test_gather_reads_zeros_outside():
    image = torch.arange(1, 13, dtype=torch.int32).view(1, 1, 3, 4)
    rows, columns = torch.tensor([[-1, 0, 3]]), torch.tensor([[3, 4, -2, 0]])
    expected = torch.tensor([[0, 0, 0, 0], [4, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.int32)
    assert torch.equal(gather_pixels(image, rows, columns)[0, 0], expected)


def test_one_pixel_images():
    image = np.full((3, 1, 1), 200, np.uint8)
    for crop in CROPS:
        geometry = fit(4, 4, crop=crop, crop_padding=0)
        box = geometry.boxes(sizes(image), seeded())
        assert (geometry.one(image, box[0]) == 200).all()


@pytest.mark.parametrize("crop, padding", [("center", 0), ("random", 0), ("padded", 2)])
def test_image_smaller_than_the_crop_is_a_user_error(crop, padding):
    geometry = fit(64, 64, crop=crop, resize="none", crop_padding=padding)
    with pytest.raises(UserError, match=r"40x200 pixels is smaller than the 64x64 crop"):
        geometry.boxes(np.array([[100, 100], [40, 200]]), seeded())


def test_empty_batch_has_no_windows():
    for crop in CROPS:
        assert fit(8, crop=crop).boxes(np.zeros((0, 2)), seeded()).shape == (0, 2, 4)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
@pytest.mark.parametrize("shape", [(96, 64), (61, 97), (40, 40), (3, 90)])
def test_crop_modes_of_timm(crop_mode, crop_pct, shape):
    """timm's own transform of PIL images; batches, single samples, flips and 16 bits."""
    image = np.ascontiguousarray(PHOTO[:, 10 : 10 + shape[0], 20 : 20 + shape[1]])
    kinds = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": "bicubic"}
    theirs = create_transform(48, **kinds, mean=(0.485, 0.456, 0.406), normalize=False)
    expected = theirs(Image.fromarray(image.transpose(1, 2, 0)))
    geometry = fit(48, int(48 / crop_pct), "bicubic", crop_mode)
    box = geometry.boxes(sizes(image), None)
    whole = geometry.one(image, box[0])
    assert torch.equal(whole, expected)
    flip = torch.tensor([True])
    for batch in (torch.from_numpy(image)[None], torch.from_numpy(image.astype(np.int32))[None]):
        assert torch.equal(geometry.canvas(batch, box)[0], expected.to(batch.dtype))
        mirrored = geometry.canvas(batch, box, flip, flip)[0]
        assert torch.equal(mirrored.flip(1, 2), expected.to(batch.dtype))


def test_a_border_of_sixteen_bits_has_the_colour_of_the_mean():
    geometry = fit(8, 8, "nearest", "border", bit_depth=16)
    image = np.full((3, 4, 8), 7, np.uint16)
    canvas = geometry.one(image, geometry.boxes(sizes(image), None)[0])
    assert canvas[:, 0, 0].tolist() == [round(65535 * mean) for mean in (0.485, 0.456, 0.406)]
    assert (canvas[:, 2:6] == 7).all() and not (canvas[:, :2] == 7).any()


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
def test_random_crops_and_images_as_they_are_know_no_crop_mode(crop_mode):
    image = np.ascontiguousarray(PHOTO[:, :96, :64])
    for changes in ({"crop": "random"}, {"crop": "padded"}, {"resize": "none"}, {"crop": "none"}):
        boxes = [fit(48, 52, crop_mode=m, **changes).boxes(sizes(image), seeded()) for m in
                 (crop_mode, "center")]  # fmt: skip
        assert torch.equal(*boxes)


@pytest.mark.parametrize("shape", [(90, 60), (64, 64), (61, 97)])
@pytest.mark.parametrize(("shortest", "crop", "size"), [(48, 40, 16), (80, 56, 70), (33, 33, 20)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_of_another_size_than_the_canvas(shape, shortest, crop, size, interpolation):
    """Resize, crop and resize, as torchvision's transforms of Pillow's images do."""
    image = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    mode = InterpolationMode(interpolation)
    made = fit(size, shortest=shortest, crop_size=crop, interpolation=interpolation)
    (box,) = made.boxes(sizes(image), None)
    picture = TF.resize(Image.fromarray(image.transpose(1, 2, 0)), shortest, mode)
    expected = TF.resize(TF.center_crop(picture, crop), [size, size], mode)
    np.testing.assert_array_equal(made.one(image, box), np.asarray(expected).transpose(2, 0, 1))
    batch = torch.from_numpy(image)[None].expand(2, -1, -1, -1)
    flip, boxes = torch.tensor([False, True]), box.expand(2, -1, -1)
    ahead, mirrored = made.canvas(batch, boxes, hflip=flip)
    np.testing.assert_array_equal(ahead, np.asarray(expected).transpose(2, 0, 1))
    expected = TF.resize(TF.horizontal_flip(TF.center_crop(picture, crop)), [size, size], mode)
    np.testing.assert_array_equal(mirrored, np.asarray(expected).transpose(2, 0, 1))
    drawn = fit(size, shortest=shortest, crop_size=crop, interpolation=interpolation, crop="random")
    for seed in range(5):
        (box,) = drawn.boxes(sizes(image), seeded(seed))
        top, left = box[:, 3].tolist()
        cut = picture.crop((left, top, left + crop, top + crop))  # inside, else Pillow has black
        assert 0 <= top <= picture.height - crop and 0 <= left <= picture.width - crop
        expected = np.asarray(TF.resize(cut, [size, size], mode)).transpose(2, 0, 1)
        np.testing.assert_array_equal(drawn.one(image, box), expected)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_crop_of_the_size_of_the_canvas_is_the_usual_one(crop):
    image = np.random.default_rng(0).integers(0, 256, (3, 61, 97), dtype=np.uint8)
    usual, same = (fit(20, shortest=33, crop=crop, crop_size=size) for size in (None, 20))
    boxes = [made.boxes(sizes(image), seeded())[0] for made in (usual, same)]
    assert torch.equal(*boxes) and torch.equal(
        usual.one(image, boxes[0]), same.one(image, boxes[1])
    )


def test_a_crop_that_an_image_is_too_small_for_is_refused():
    with pytest.raises(UserError, match="lower data.augmentation.crop_size"):
        fit(8, resize="none", crop_size=70, crop="random").boxes(np.array([(64, 64)]), seeded())
