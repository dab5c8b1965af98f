"""RandAugment's operations against PIL and torchvision, its draws against their probabilities."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_image
from torchvision.transforms.v2 import functional as TF

from glovita_lib import augment_images
from glovita_lib.augment_images import warp
from glovita_lib.spec_augment import ImageOps as Parameters

PHOTO = load_sample_image("flower.jpg")


def photos(count: int = 4, side: int = 48) -> np.ndarray:
    """Crops of different brightness, (count, side, side, 3) uint8."""
    return np.stack([PHOTO[60 * i : 60 * i + side, 90 * i : 90 * i + side] for i in range(count)])


def batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255


def levels(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().numpy().astype(int).transpose(0, 2, 3, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(x: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    settings = {"count": 2, "magnitude": (1.0, 10.0), "probability": 0.5} | options
    names = {"count": "ops", "magnitude": "magnitude", "probability": "p"}
    ops = Parameters(**{f"randaugment_{names[key]}": value for key, value in settings.items()})
    return augment_images.randaugment(x.clone(), ops, seeded(seed), torch.full((x.shape[1],), 0.5))


STRENGTHS = [0.0, 0.25, 0.6, 1.0]
SIGNS = [1.0, -1.0, 1.0, -1.0]


def enhanced(kind):
    """PIL's enhancement with the factors that strength and sign stand for."""
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


PIL_OPERATIONS = {
    "invert": (lambda image, strength, sign: ImageOps.invert(image), 0),
    "auto_contrast": (lambda image, strength, sign: ImageOps.autocontrast(image), 1),
    "equalize": (lambda image, strength, sign: ImageOps.equalize(image), 0),
    "posterize": (
        lambda image, strength, sign: ImageOps.posterize(image, int(8 - round(4 * strength))),
        0,
    ),
    "solarize": (
        lambda image, strength, sign: ImageOps.solarize(image, 256 * (1 - strength)),
        0,
    ),
    "brightness": (enhanced(ImageEnhance.Brightness), 1),
    "contrast": (enhanced(ImageEnhance.Contrast), 2),  # PIL rounds the mean grey
    "saturation": (enhanced(ImageEnhance.Color), 2),  # and the grey of each pixel
    "sharpness": (enhanced(ImageEnhance.Sharpness), 2),  # and the smoothed image
}  # name -> reference and largest difference in levels


@pytest.mark.parametrize("name", augment_images.COLOUR)
def test_colour_operations_equal_pil(name):
    reference, tolerance = PIL_OPERATIONS[name]
    images = photos()
    out = levels(
        augment_images.COLOUR[name](batch(images), torch.tensor(STRENGTHS), torch.tensor(SIGNS))
    )
    for image, strength, sign, row in zip(images, STRENGTHS, SIGNS, out, strict=True):
        expected = np.asarray(reference(Image.fromarray(image), strength, sign)).astype(int)
        assert np.abs(row - expected).max() <= tolerance


def test_equalize_and_auto_contrast_of_flat_and_two_level_images():
    flat = torch.full((1, 3, 4, 4), 0.4)
    two = flat.clone()
    two[:, :, 0, 0] = 0.6
    images = torch.cat([flat, two])
    empty = torch.zeros(2)
    for name, reference in (("equalize", TF.equalize), ("auto_contrast", TF.autocontrast)):
        out = augment_images.COLOUR[name](images, empty, empty)
        expected = torch.stack([reference((i * 255).round().byte()) for i in images])
        assert np.abs(levels(out) - expected.numpy().transpose(0, 2, 3, 1)).max() <= 1


def test_sharpness_of_images_without_an_inside():
    tiny = batch(photos(2, side=2))
    assert torch.equal(augment_images.sharpness(tiny, torch.tensor([0.1, 1.9])), tiny)


def test_geometric_operations_equal_torchvision():
    """Bilinear with a grey surrounding; compared away from its border, which torchvision blends
    differently."""
    images = batch(photos(5))
    side = images.shape[2]
    amount = torch.tensor([0.5, -0.8, 0.25, -0.5, 0.7])
    out = warp(
        images,
        augment_images.moves(torch.arange(5), amount),
        padding="zeros",
        fill=augment_images.FILL,
    )
    slope = np.degrees(np.arctan(0.3 * amount[:2].numpy()))
    shift = amount * 150 / 331 * side
    calls = [  # angle, translate, shear about the upper left corner
        (0.0, [0, 0], [-slope[0], 0.0]),
        (0.0, [0, 0], [0.0, -slope[1]]),
    ]
    for i, (angle, translate, shear) in enumerate(calls):
        expected = TF.affine(
            images[i],
            angle,
            translate,
            1.0,
            [float(s) for s in shear],
            TF.InterpolationMode.BILINEAR,
            fill=[augment_images.FILL] * 3,
            center=[0, 0],
        )
        close = (out[i] - expected).abs() < 2e-3
        assert close.float().mean() > 0.95
    moved = float(shift[2])
    whole, part = int(moved), moved % 1  # to the right, between two pixels
    right = (1 - part) * images[2, :, :, 1 : side - whole] + part * images[
        2, :, :, : side - whole - 1
    ]
    torch.testing.assert_close(out[2, :, :, whole + 1 :], right, atol=1e-4, rtol=0)
    assert torch.allclose(out[2, :, :, :whole], torch.tensor(augment_images.FILL))
    assert torch.allclose(out[3, :, -10:], torch.tensor(augment_images.FILL))  # translated up
    expected = TF.rotate(
        images[4], 21.0, TF.InterpolationMode.BILINEAR, fill=[augment_images.FILL] * 3
    )
    assert ((out[4] - expected).abs() < 2e-3).float().mean() > 0.95


def marker(operation_index: int):
    """An operation that marks its samples."""
    return lambda x, strength, sign: torch.full_like(x, operation_index / 100)


def test_every_operation_is_drawn_equally_often(monkeypatch):
    monkeypatch.setattr(
        augment_images,
        "COLOUR",
        {name: marker(i) for i, name in enumerate(augment_images.COLOUR, start=1)},
    )
    out = apply(torch.full((6000, 1, 8, 8), 0.9), count=1, probability=0.5)
    values = (out[:, 0, 3, 3] * 100).round().long()
    for index in range(1, 1 + len(augment_images.COLOUR)):
        share = (values == index).float().mean()
        assert abs(share - 0.5 / 15) < 0.008


def test_number_of_operations_and_probability():
    x = batch(photos(1, side=16)).expand(1500, 3, 16, 16).contiguous()

    def changed(**options) -> float:
        return float(((apply(x, **options) - x).abs().flatten(1).amax(1) > 1e-6).float().mean())

    assert changed(count=0) == 0
    assert changed(probability=0.0) == 0
    always = changed(count=1, probability=1.0, magnitude=(9.0, 9.0))
    assert always > 0.9
    half = changed(count=1, probability=0.5, magnitude=(9.0, 9.0))
    assert abs(half - always / 2) < 0.05
    both = changed(count=2, probability=0.5, magnitude=(9.0, 9.0))
    assert abs(both - (1 - (1 - always / 2) ** 2)) < 0.05


def test_magnitude_bounds_the_strength(monkeypatch):
    seen = []

    def watch(x, strength, sign):
        seen.append(torch.stack([strength, sign]))
        return x

    monkeypatch.setattr(augment_images, "COLOUR", dict.fromkeys(augment_images.COLOUR, watch))
    apply(torch.zeros(3000, 3, 4, 4), probability=1.0, magnitude=(2.0, 6.0))
    strength, sign = torch.cat(seen, 1)
    assert 0.2 <= strength.min() < 0.21 and 0.59 < strength.max() <= 0.6
    assert abs(strength.mean() - 0.4) < 0.01 and abs(sign.mean()) < 0.06
    seen.clear()
    apply(torch.zeros(50, 3, 4, 4), probability=1.0, magnitude=(9.0, 9.0))
    assert torch.cat(seen, 1)[0].unique().tolist() == pytest.approx([0.9])


def test_cutout_has_the_given_colour_and_at_most_its_size(monkeypatch):
    monkeypatch.setattr(augment_images, "COLOUR", {})
    monkeypatch.setattr(augment_images, "GEOMETRIC", ())
    monkeypatch.setattr(augment_images, "NAMES", ("cutout",))
    x = torch.ones(300, 3, 32, 32)
    fill = torch.tensor([0.1, 0.2, 0.3])
    ops = Parameters(randaugment_ops=1, randaugment_magnitude=(10.0, 10.0), randaugment_p=1.0)
    out = augment_images.randaugment(x.clone(), ops, seeded(), fill)
    area = (out[:, 0] != 1).flatten(1).sum(1)
    assert area.max() == 400 and area.min() >= 100  # 20 x 20 of 32 x 32, a quarter in a corner
    assert all(set(out[:, c].unique().tolist()) == {1.0, float(fill[c])} for c in range(3))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_batches_of_any_channels(channels):
    x = batch(photos(6, side=32)).repeat(8, 1, 1, 1)
    x = torch.cat([x, x[:, :1]], 1)[:, :channels].contiguous()
    out = apply(x, count=3, probability=1.0)
    assert out.shape == x.shape and torch.isfinite(out).all()
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    assert len(out.flatten(1).unique(dim=0)) > 30  # of 48: samples draw for themselves


def test_alpha_goes_through_geometry_only(monkeypatch):
    monkeypatch.setattr(augment_images, "GEOMETRIC", ())
    monkeypatch.setattr(augment_images, "NAMES", (*augment_images.COLOUR, "none"))
    monkeypatch.setattr(augment_images, "painted", lambda x, *_, fill: x)
    x = torch.rand(64, 4, 8, 8, generator=seeded())
    out = apply(x, probability=1.0)
    assert torch.equal(out[:, 3], x[:, 3]) and not torch.equal(out[:, :3], x[:, :3])


def test_digits_of_eight_pixels():
    x = torch.from_numpy(load_digits().images[:64] / 16).float()[:, None]
    out = apply(x, count=2, probability=1.0)
    assert out.min() >= 0 and out.max() <= 1
    assert out.flatten(1).std(1).gt(0.05).float().mean() > 0.9  # something remains to be seen


def test_seed_decides_and_small_batches():
    x = batch(photos(4, side=16))
    assert torch.equal(apply(x, seed=1), apply(x, seed=1))
    assert any(not torch.equal(apply(x, seed=1), apply(x, seed=s)) for s in (2, 3))
    assert apply(x[:1], probability=1.0).shape == (1, 3, 16, 16)
    assert apply(x[:0]).shape == (0, 3, 16, 16)
