"""Batched operations against torchvision, scipy and explicit float64 loops, on real photos."""

import math
from itertools import permutations

import msgspec
import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional as TF

from glovita_lib import augment_images
from glovita_lib.augment_crop import CropResize
from glovita_lib.augment_images import OPERATIONS, Placement
from glovita_lib.spec_augment import PLAIN, ImageOps, policy
from glovita_lib.spec_errors import extra_of

PHOTO = load_sample_image("china.jpg").transpose(2, 0, 1)
MEAN = torch.full((3,), 0.5)  # mean colour of the images


def photos(count: int, side: int = 40, channels: int = 3) -> torch.Tensor:
    """Different crops of a photo, (count, channels, side, side) in 0..1."""
    crops = [PHOTO[:, 20 * i : 20 * i + side, 30 * i : 30 * i + side] for i in range(count)]
    images = torch.from_numpy(np.stack(crops)).float() / 255
    if channels == 4:
        return torch.cat([images, images[:, :1].flip(3)], 1)
    return images[:, :channels]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- colour -----------------------------------------------------------------------------------

COLOUR = {
    "brightness": (augment_images.brightness, TF.adjust_brightness, [0.0, 0.6, 1.0, 1.7]),
    "contrast": (augment_images.contrast, TF.adjust_contrast, [0.0, 0.6, 1.0, 1.7]),
    "saturation": (augment_images.saturation, TF.adjust_saturation, [0.0, 0.6, 1.0, 1.7]),
    "hue": (augment_images.hue, TF.adjust_hue, [-0.5, -0.13, 0.0, 0.31]),
}


@pytest.mark.parametrize(
    "name, channels", [(name, 3) for name in COLOUR] + [("brightness", 1), ("contrast", 1)]
)
def test_colour_operations_equal_torchvision(name, channels):
    operation, reference, factors = COLOUR[name]
    images = photos(4, channels=channels)
    out = operation(images.clone(), torch.tensor(factors))
    for image, factor, row in zip(images, factors, out, strict=True):
        torch.testing.assert_close(row, reference(image, factor), atol=2e-4, rtol=0)


def test_hue_of_grey_black_and_white_stays():
    levels = torch.tensor([0.0, 0.25, 1.0])[None, None, None].expand(2, 3, 1, 3)
    turned = augment_images.hue(levels.clone(), torch.tensor([0.2, -0.4]))
    torch.testing.assert_close(turned, levels)


def test_brightness_contrast_formula():
    images = photos(2)
    out = augment_images.brightness_contrast(
        images.clone(), torch.tensor([0.1, -0.2]), torch.tensor([0.2, -0.1])
    )
    for image, bright, contrast, row in zip(images, (0.1, -0.2), (0.2, -0.1), out, strict=True):
        expected = (image.double() * (1 + contrast) + bright).clamp(0, 1)
        torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=0)


def test_jitter_applies_each_step_once_in_a_random_order():
    """Every sample equals the four torchvision steps in one of the 24 orders."""
    images = photos(8, side=12)
    ops = policy(PLAIN, jitter_p=1.0, jitter=(0.2, 0.3, 0.4, 0.2))
    rows = torch.arange(8)
    out = augment_images.jittered(images.clone(), rows, ops, seeded(5))
    generator = seeded(5)
    factors = [augment_images.uniform(8, 1 - s, 1 + s, generator) for s in (0.2, 0.3, 0.4)]
    factors.append(augment_images.uniform(8, -0.2, 0.2, generator))
    steps = [reference for _, reference, _ in COLOUR.values()]
    orders = set()
    for i in range(8):
        for order in permutations(range(4)):
            expected = images[i]
            for step in order:
                expected = steps[step](expected, float(factors[step][i]))
            if torch.allclose(out[i], expected, atol=2e-4):
                orders.add(order)
                break
        else:
            pytest.fail(f"sample {i} equals no order")
    assert len(orders) > 3


def test_jitter_leaves_alpha_and_other_samples_alone():
    images = photos(6, channels=4)
    ops = policy(PLAIN, jitter_p=0.5, brightness_contrast=0.2)
    out = augment_images.random_colour(images.clone(), ops, seeded(1), MEAN)
    assert torch.equal(out[:, 3], images[:, 3])
    chosen = torch.rand(6, generator=seeded(1)) < 0.5
    changed = (out != images).flatten(1).any(1)
    assert torch.equal(changed, chosen) and 0 < chosen.sum() < 6


# --- geometry ---------------------------------------------------------------------------------


def scipy_warp(image: np.ndarray, matrix: np.ndarray, mode: str, fill: float) -> np.ndarray:
    """image (H, W) under a point map in centred -1..1 coordinates (x right, y down), in float64."""
    side = image.shape[0]
    to_unit = np.array([[2 / side, 0, 1 / side - 1], [0, 2 / side, 1 / side - 1], [0, 0, 1]])
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])  # rows, columns <-> x, y
    back = swap @ np.linalg.inv(to_unit) @ np.linalg.inv(matrix) @ to_unit @ swap
    return ndimage.affine_transform(image, back, order=1, mode=mode, cval=fill)


@pytest.mark.parametrize(
    "padding, mode, fill", [("reflection", "reflect", 0.0), ("zeros", "grid-constant", 0.5)]
)
def test_warp_equals_scipy(padding, mode, fill):
    images = photos(4, side=24)
    matrices = augment_images.affine(
        torch.tensor([0.6, 1.0, 1.3, 1.0]),
        torch.tensor([[0.1, -0.2], [0.3, 0.0], [0.0, 0.05], [0.0, 0.0]]),
        torch.tensor([[10.0, 0.0], [0.0, 0.0], [5.0, -8.0], [0.0, 0.0]]),
    ) @ augment_images.rotation(torch.tensor([30.0, -100.0, 180.0, 0.0]))
    out = augment_images.warp(images, matrices, padding=padding, fill=fill)
    for image, matrix, row in zip(images.double(), matrices, out, strict=True):
        for channel, got in zip(image, row, strict=True):
            expected = scipy_warp(channel.numpy(), matrix.numpy(), mode, fill)
            np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_counter_clockwise_about_the_centre(degrees):
    images = photos(2, side=17)
    out = augment_images.warp(
        images, augment_images.rotation(torch.full((2,), float(degrees))), padding="reflection"
    )
    expected = torch.rot90(images, degrees // 90, (2, 3))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_affine_equals_torchvision_inside():
    image = photos(1, side=60)
    for zoom, shift, shear in [(0.9, (6, -3), (7.0, 0.0)), (1.2, (0, 9), (0.0, 0.0))]:
        matrix = augment_images.affine(
            torch.tensor([zoom]), torch.tensor([shift]) / 60, torch.tensor([shear])
        )
        out = augment_images.warp(image, matrix, padding="zeros")
        other_way = [-angle for angle in shear]  # torchvision's shear has the opposite sign
        expected = TF.affine(
            image, 0.0, list(shift), zoom, other_way, TF.InterpolationMode.BILINEAR
        )
        inside = (slice(None), slice(None), slice(15, 45), slice(15, 45))
        torch.testing.assert_close(out[inside], expected[inside], atol=1e-3, rtol=0)


def test_random_warp_draws_each_sample_in_range():
    ops = policy(PLAIN, rotate_p=1.0, rotate_degrees=30.0)
    ramp = torch.linspace(0, 1, 31)[None, None, None].expand(300, 1, 31, 31).contiguous()
    out = augment_images.random_warp(ramp.clone(), ops, seeded(), MEAN)
    middle = slice(12, 19)
    slope_x = (out[:, 0, middle, 13:18] - out[:, 0, middle, 12:17]).mean((1, 2)) * 30
    slope_y = (out[:, 0, 13:18, middle] - out[:, 0, 12:17, middle]).mean((1, 2)) * 30
    angle = torch.atan2(slope_y, slope_x).rad2deg()
    assert angle.abs().max() < 30.5 and angle.min() < -27 and angle.max() > 27
    assert abs(angle.mean()) < 4 and abs(angle.std() - 60 / math.sqrt(12)) < 2
    assert len(angle.unique()) == 300


def test_warp_chooses_with_its_probability():
    ops = policy(PLAIN, rotate_p=0.3, affine_p=0.2)
    images = photos(1, side=8).expand(4000, 3, 8, 8).contiguous()
    out = augment_images.random_warp(images.clone(), ops, seeded(), MEAN)
    share = (out != images).flatten(1).any(1).float().mean()
    assert abs(share - (1 - 0.7 * 0.8)) < 0.03


# --- blur, noise, dropout ---------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_blur_equals_torchvision(channels):
    images = photos(3, channels=channels)
    sides = torch.tensor([3, 7, 5])
    out = augment_images.separable(images, augment_images.gaussian_taps(sides))
    for image, side, row in zip(images, sides.tolist(), out, strict=True):
        sigma = 0.3 * ((side - 1) * 0.5 - 1) + 0.8
        expected = TF.gaussian_blur(image, [side, side], [sigma, sigma])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_motion_taps_are_straight_strokes():
    taps = augment_images.motion_taps(
        torch.tensor([5, 5, 3, 7]), torch.tensor([0.0, 1.0, 0.5, 0.25]) * math.pi
    )
    assert taps.shape == (4, 7, 7)
    torch.testing.assert_close(taps.sum((1, 2)), torch.ones(4))
    flat = torch.zeros(7, 7)
    flat[3, 1:6] = 0.2
    torch.testing.assert_close(taps[0], flat, atol=1e-6, rtol=0)
    torch.testing.assert_close(taps[1], flat, atol=1e-6, rtol=0)
    upright = torch.zeros(7, 7)
    upright[2:5, 3] = 1 / 3
    torch.testing.assert_close(taps[2], upright, atol=1e-6, rtol=0)
    rising = taps[3].flip(1).diagonal()  # 45 degrees counter-clockwise goes up to the right
    assert rising.sum() > 0.5 and taps[3].diagonal().sum() < 0.2


def test_filter_equals_an_explicit_loop():
    images = photos(2, side=9)
    kernels = torch.rand(2, 5, 3, generator=seeded())
    out = augment_images.filtered(images, kernels)
    for i in range(2):
        for c in range(3):
            expected = ndimage.correlate(
                images[i, c].double().numpy(), kernels[i].double().numpy(), mode="mirror"
            )
            np.testing.assert_allclose(out[i, c].numpy(), expected, atol=1e-5)


def test_blur_shares_and_kernel_of_tiny_images():
    ops = policy(PLAIN, blur_p=0.4, blur_kernel=(3, 7), motion_blur=True)
    images = photos(1, side=8).expand(1000, 3, 8, 8).contiguous()
    out = augment_images.random_blur(images.clone(), ops, seeded(), MEAN)
    changed = (out != images).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.4) < 0.05
    assert len(out[changed].flatten(1).unique(dim=0)) > 100  # strokes at any angle
    for side in (1, 2, 3):  # a 7-pixel kernel cannot be reflected there
        small = photos(4, side=side)
        blurred = augment_images.random_blur(small.clone(), policy(ops, blur_p=1.0), seeded(), MEAN)
        assert blurred.shape == small.shape and torch.isfinite(blurred).all()


def test_noise_has_the_drawn_deviation():
    std = torch.tensor([0.01, 0.05, 0.0])
    images = torch.full((3, 3, 64, 64), 0.5)
    noise = augment_images.noisy(images, std, seeded()) - images
    torch.testing.assert_close(noise.flatten(1).std(1), std, atol=0, rtol=0.03)
    channels = torch.corrcoef(noise[1].flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 0.06  # independent
    assert abs(torch.corrcoef(noise[:2].flatten(1))[0, 1]) < 0.04


def test_noise_stays_off_alpha():
    images = photos(3, channels=4)
    out = augment_images.random_noise(images.clone(), policy(PLAIN, noise_p=1.0), seeded(), MEAN)
    assert torch.equal(out[:, 3], images[:, 3])
    assert (out[:, :3] != images[:, :3]).float().mean() > 0.9


def test_painted_rectangles_equal_slices():
    images = photos(3)
    start = torch.tensor([[[2, 3], [10, 20]], [[0, 0], [5, 5]], [[-4, 30], [7, 7]]]).float()
    stop = torch.tensor([[[6, 9], [14, 40]], [[40, 1], [5, 9]], [[3, 50], [8, 8]]]).float()
    out = augment_images.painted(images.clone(), start, stop, 0.0)
    coloured = augment_images.painted(images.clone(), start, stop, torch.tensor([0.1, 0.2, 0.3]))
    expected, expected_colour = images.clone(), images.clone()
    for i in range(3):
        for (y0, x0), (y1, x1) in zip(start[i].int().tolist(), stop[i].int().tolist(), strict=True):
            window = (i, slice(None), slice(max(y0, 0), y1), slice(max(x0, 0), x1))
            expected[window] = 0
            expected_colour[window] = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    assert torch.equal(out, expected) and torch.equal(coloured, expected_colour)


def test_dropout_holes_have_the_drawn_number_and_size():
    ops = policy(PLAIN, dropout_p=1.0, dropout_holes=(2, 2), dropout_size=(0.1, 0.1))
    out = augment_images.random_dropout(torch.ones(400, 3, 50, 50), ops, seeded(), MEAN)
    black = (out == 0).all(1)
    assert torch.equal(black, (out == 0).any(1))
    area = black.flatten(1).sum(1)
    assert area.max() == 50 and (area == 50).float().mean() > 0.85  # 2 of 5 x 5, few overlap
    assert (area >= 25).all()
    assert black.any(0).float().mean() > 0.98  # anywhere, up to the border
    single = policy(ops, dropout_holes=(1, 4), dropout_size=(0.04, 0.2))
    holes = augment_images.random_dropout(torch.ones(500, 1, 50, 50), single, seeded(1), MEAN) == 0
    counts = torch.tensor([ndimage.label(h[0].numpy())[1] for h in holes])
    assert counts.min() == 1 and counts.max() == 4


def test_cutout_is_a_square_around_any_pixel():
    out = augment_images.cutout(
        torch.ones(3000, 1, 12, 12), policy(PLAIN, cutout_size=4), seeded(), None
    )
    area = (out == 0).flatten(1).sum(1)
    assert area.max() == 16 and area.min() == 4  # a corner leaves a quarter
    assert abs((area == 16).float().mean() - (9 / 12) ** 2) < 0.03
    hits = (out == 0).float().mean(0)[0]
    assert hits.min() > 0.02 and abs(hits[4:8, 4:8].mean() - 16 / 144) < 0.01


# --- the machinery ----------------------------------------------------------------------------


def test_on_rows_changes_the_chosen_rows_only():
    x = torch.arange(12.0).view(4, 3)
    expected = x.clone()
    expected[[1, 3]] *= 10
    assert torch.equal(
        augment_images.on_rows(x.clone(), torch.tensor([1, 3]), lambda p: p * 10), expected
    )
    assert augment_images.on_rows(x, torch.tensor([], dtype=torch.int64), None) is x
    assert torch.equal(augment_images.on_rows(x.clone(), torch.arange(4), lambda p: p + 1), x + 1)


def test_table_and_struct_have_the_same_switches_in_the_same_order():
    """A field is the switch of one operation, or part of a switch that there is."""
    fields = msgspec.inspect.type_info(ImageOps).fields
    part_of = {field.name: extra_of(field.type).get("part_of") for field in fields}
    switches = [name for each in OPERATIONS.table for name in each.switches]
    assert switches == [name for name, switch in part_of.items() if switch is None]
    assert set(part_of.values()) - {None} <= set(switches)


class Watched:
    """Parameters that note which of them are read."""

    def __init__(self, ops: ImageOps) -> None:
        self.ops, self.read = ops, set()

    def __getattr__(self, name: str):
        self.read.add(name)
        return getattr(self.ops, name)


@pytest.mark.parametrize("each", OPERATIONS.table, ids=lambda each: each.switches[0])
def test_an_operation_reads_its_switches_and_their_parts(each):
    fields = msgspec.inspect.type_info(ImageOps).fields
    parts = {f.name for f in fields if extra_of(f.type).get("part_of") in each.switches}
    everything = policy(PLAIN, **dict.fromkeys(each.switches, 1), motion_blur=True)
    read = set()
    for crop in ("random", "resized", "padded") if each.stage == "geometry" else ("center",):
        watched = Watched(policy(everything, crop=crop))
        if each.stage == "geometry":
            resizing = CropResize(
                watched if each.switches == ("crop",) else PLAIN,
                image_size=8, resize_size=9, interpolation="nearest", bit_depth=8,
                crop_mode="center", mean=(0.5,) * 3,
            )  # fmt: skip
            place = Placement(resizing, np.array([[16, 12]]))
            each.function(place, watched, seeded())
            assert (place.boxes, place.hflip, place.vflip) != (None, None, None)
        else:
            assert each.function(photos(4), watched, seeded(), MEAN).shape == (4, 3, 40, 40)
        read |= watched.read
    assert read == {*each.switches, *parts}


def test_an_operation_is_active_with_its_switch():
    assert not any(
        OPERATIONS.active(PLAIN, stage) for stage in ("geometry", "values", "normalised")
    )
    assert PLAIN.random() == []
    for each in OPERATIONS.table:
        for switch in each.switches:
            on = policy(PLAIN, **{switch: "random" if switch == "crop" else 1})
            assert OPERATIONS.active(on, each.stage) == [each]
            assert on.random() == [switch]
    assert policy(PLAIN, randaugment_ops=2, randaugment_p=0.0).random() == []
