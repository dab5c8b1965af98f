"""Resolution of sizes, policies and statistics, and whole policies on real images."""

import pickle
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from timm.data import create_transform
from torchvision.transforms import v2

from glovita_lib import augment_images
from glovita_lib.augment import Augmenter, ResolvedImageAugmentation, resolve_augmentation
from glovita_lib.encoder import Preprocess
from glovita_lib.errors import UserError
from glovita_lib.spec_augment import (
    TEST,
    TRAIN,
    ImageAugmentation,
    ImageKwargs,
    ImageOps,
    TestPolicy,
    TrainPolicy,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT = Preprocess(224, 0.875, "bicubic", MEAN, STD, True)
CNN = Preprocess(None, 0.875, "bilinear", MEAN, STD, False)
PHOTO = np.ascontiguousarray(load_sample_image("flower.jpg").transpose(2, 0, 1))


def resolved(
    train: str | None = "default_2d_2",
    test: str | None = "shared_default_2d",
    *,
    encoder: Preprocess = CNN,
    channels: int = 3,
    native: tuple[int, int] | None = (32, 32),
    **aug,
) -> ResolvedImageAugmentation:
    return resolve_augmentation(
        ImageAugmentation(train_policy=train, test_policy=test, **aug),
        default_policies=("randaugment", "default"),
        encoder=encoder,
        channels=channels,
        native_size=native,
    )


def photos(count: int, height: int = 32, width: int = 32, channels: int = 3) -> torch.Tensor:
    starts = [(9 * i % 300, 12 * i % 500) for i in range(count)]
    crops = [PHOTO[:, y : y + height, x : x + width] for y, x in starts]
    images = torch.from_numpy(np.stack(crops))
    return torch.cat([images, images[:, :1]], 1)[:, :channels]


def augmenter(bit_depth: int = 8, **options) -> Augmenter:
    """Of the train policy."""
    return Augmenter(resolved(**options), train=True, bit_depth=bit_depth)


def evaluator(**options) -> Augmenter:
    return Augmenter(resolved(**options), train=False, bit_depth=8)


# --- resolution -------------------------------------------------------------------------------


def test_every_named_policy_exists_and_is_complete():
    for named, table in ((TrainPolicy, TRAIN), (TestPolicy, TEST)):
        assert set(named.__args__) == set(table)
        for ops in table.values():
            assert None not in msgspec.structs.astuple(ops)
            assert msgspec.convert(msgspec.to_builtins(ops), ImageOps) == ops


@pytest.mark.parametrize("name", TRAIN)
def test_resolution_survives_json(name):
    first = resolved(name, train_kwargs=ImageKwargs(hflip_p=0.25))
    again = msgspec.json.decode(msgspec.json.encode(first), type=ResolvedImageAugmentation)
    assert again == first and again.train.hflip_p == 0.25 and again.train_policy == name


def test_data_set_gives_the_policies_where_the_spec_is_silent():
    got = resolved(None, None)
    assert (got.train_policy, got.test_policy) == ("randaugment", "default")


@pytest.mark.parametrize(
    "encoder, native, aug, expected",
    [
        (CNN, (8, 8), {}, (8, 8)),  # nothing asks for a size: the images' own
        (CNN, (32, 48), {}, (32, 32)),
        (VIT, (32, 32), {}, (224, 256)),  # upsampled
        (VIT, None, {}, (224, 256)),
        (VIT, None, {"image_size": 112}, (112, 128)),  # the encoder's share
        (VIT, (96, 96), {"image_size": 96}, (96, 96)),
        (CNN, None, {"image_size": 224}, (224, 256)),
        (CNN, (64, 64), {"image_size": 48}, (48, 54)),
        (VIT, None, {"resize_size": 300}, (224, 300)),
        (Preprocess(224, 1.0, "bicubic", MEAN, STD, True), (32, 32), {}, (224, 224)),
    ],
)
def test_sizes(encoder, native, aug, expected):
    got = resolved("default_2d_1", encoder=encoder, native=native, **aug)
    assert (got.image_size, got.resize_size) == expected


def test_the_side_before_the_crop_is_that_of_timm_at_every_size():
    shares = {timm.get_pretrained_cfg(name).crop_pct for name in timm.list_pretrained()}
    assert len(shares) > 5
    for share in shares:
        encoder = Preprocess(224, share, "bilinear", MEAN, STD, False)
        for size in (32, 96, 112, 176, 224, 229, 288, 384, 448):
            config = {"input_size": (3, size, size), "crop_pct": share}
            theirs = create_transform(**config, interpolation="bilinear").transforms[0].size
            assert resolved(encoder=encoder, native=None, image_size=size).resize_size == theirs


def test_native_policy_keeps_the_size_where_the_encoder_can():
    pretrained = Preprocess(224, 0.875, "bilinear", MEAN, STD, False)
    got = resolved("baseline", "native", encoder=pretrained, native=(96, 96))
    assert (got.image_size, got.test.resize) == (96, "none")


def test_interpolation_and_statistics_come_from_the_encoder_unless_set():
    got = resolved(encoder=VIT)
    assert (got.interpolation, got.mean, got.std) == ("bicubic", MEAN, STD)
    got = resolved(encoder=VIT, interpolation="nearest", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert (got.interpolation, got.mean, got.std) == ("nearest", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


def test_statistics_follow_the_channels():
    assert resolved(channels=1).mean == pytest.approx((sum(MEAN) / 3,))
    assert resolved(channels=1).std == pytest.approx((sum(STD) / 3,))
    assert resolved(channels=4).mean == pytest.approx((*MEAN, sum(MEAN) / 3))
    single = Preprocess(None, 0.875, "bilinear", (0.3,), (0.2,), False)
    assert resolved(channels=1, encoder=single).mean == (0.3,)


def test_cutout_is_half_of_a_small_image():
    assert resolved("baseline_cutout", native=(32, 32)).train.cutout_size == 16
    assert resolved("baseline_cutout", native=(8, 8)).train.cutout_size == 4
    assert resolved("randaugment", encoder=VIT).train.cutout_size == 16
    assert resolved("baseline", train_kwargs=ImageKwargs(cutout_size=9)).train.cutout_size == 9


@pytest.mark.parametrize(
    "options, words",
    [
        ({"native": None}, ["image_size", "differ in size"]),
        ({"test": "native", "encoder": VIT}, ["32x32", "224x224"]),
        ({"train_kwargs": ImageKwargs(resize="none"), "image_size": 40}, ["32x32", "40x40"]),
        ({"image_size": 64, "resize_size": 50}, ["resize_size", "50 pixels", "64"]),
        ({"mean": (0.5,)}, ["mean: 1 numbers", "3"]),
        ({"std": (0.5, 0.5, 0.5), "channels": 1}, ["std: 3 numbers", "1 channels"]),
        ({"train_kwargs": ImageKwargs(cutout_size=32)}, ["cutout_size", "32x32"]),
    ],
)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(UserError) as error:
        resolved(**options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# --- whole policies ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", TRAIN)
def test_train_policies_on_photos(name, channels):
    augment = augmenter(train=name, native=(60, 80), image_size=48, channels=channels)
    images = photos(12, 60, 80, channels)
    original = images.clone()
    first, again, other = (
        augment(images, False, 1),
        augment(images, False, 1),
        augment(images, False, 2),
    )
    assert first.shape == (12, channels, 48, 48) and first.dtype == torch.float32
    assert torch.equal(images, original)  # the data in memory must not change
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "default_2d_1")
    mean, std = statistics(augment)
    values = first * std + mean
    assert torch.isfinite(first).all() and values.min() > -1e-5 and values.max() < 1 + 1e-5
    if name != "default_2d_1":  # the same image in every place gets its own parameters
        same = augment(images[:1].expand(12, -1, -1, -1), False, 3)
        assert len(same.flatten(1).unique(dim=0)) > 6


def statistics(augment: Augmenter) -> tuple[torch.Tensor, torch.Tensor]:
    return augment.mean[:, None, None], augment.std[:, None, None]


@pytest.mark.parametrize("name", TRAIN)
def test_train_policies_on_digits(name):
    images = torch.from_numpy(load_digits().images[:32] * 15).to(torch.uint8)[:, None]
    augment = augmenter(train=name, native=(8, 8), channels=1)
    out = augment(images, False, 5)
    assert out.shape == (32, 1, 8, 8) and torch.isfinite(out).all()
    assert out.flatten(1).std(1).gt(0.1).float().mean() > 0.8  # the digit is still visible
    assert augment(images[:1], False, 5).shape == (1, 1, 8, 8)
    assert augment(images[:0], False, 5).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", TEST)
def test_test_policies_are_deterministic_and_per_sample(name, channels):
    options = {"test": name, "native": (60, 80), "image_size": 48, "channels": channels}
    augment = evaluator(**options)
    images = photos(5, 60, 80, channels)
    out = augment(images, False, 1)
    assert torch.equal(out, augment(images, False, 2))
    single = torch.cat([augment(images[i : i + 1], False, 0) for i in range(5)])
    assert torch.equal(out, single)  # a sample's prediction cannot depend on its batch


@pytest.mark.parametrize("name, resize", [("shared_default_2d", 54), ("default", 48)])
def test_evaluation_equals_torchvision(name, resize):
    augment = evaluator(test=name, native=(60, 80), image_size=48)
    images = photos(4, 60, 80)
    pipeline = v2.Compose(
        [
            v2.ToPILImage(),
            v2.Resize(resize),
            v2.CenterCrop(48),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    expected = torch.stack([pipeline(image) for image in images])
    for inputs in (images, images.int()):  # the second is what a GPU does
        torch.testing.assert_close(augment(inputs, False, 0), expected, atol=1e-5, rtol=0)


def test_evaluation_of_a_pretrained_vit_on_small_images_equals_pil():
    augment = evaluator(encoder=VIT, test="default")
    image = photos(1)
    out = augment(image, False, 0)[0]
    large = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
    expected = torch.from_numpy(np.array(large)).permute(2, 0, 1).float() / 255
    mean, std = statistics(augment)
    assert (out * std + mean - expected).abs().max() < 1e-6


def test_native_evaluation_only_normalises():
    images = photos(3)
    out = evaluator(test="native")(images, False, 0)
    expected = v2.functional.normalize(images.float() / 255, MEAN, STD)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_fitted_batches_skip_the_geometry():
    options = {"test": "shared_default_2d", "native": None, "image_size": 48}
    augment = evaluator(**options)
    image = photos(1, 60, 80)
    box = augment.fit.boxes(np.array([[60, 80]]), None)[0]
    fitted = augment.fit.one(image[0].numpy(), box)[None]
    torch.testing.assert_close(augment(fitted, True, 0), augment(image, False, 0))


def test_fitted_train_batches_still_flip():
    augment = augmenter(train="baseline", native=None, image_size=32)
    images = photos(64)
    out = augment(images, True, 4)
    plain = v2.functional.normalize(images.float() / 255, MEAN, STD)
    straight = torch.isclose(out, plain, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(out, plain.flip(3), atol=1e-5).flatten(1).all(1)
    assert (straight | mirrored).all() and 16 < mirrored.sum() < 48


def test_baseline_equals_pad_crop_flip_with_the_documented_draws():
    """Sample i of a batch takes offsets and flip number i of the seed's stream."""
    images = photos(8)
    out = augmenter(train="baseline")(images, False, 11)
    generator = torch.Generator().manual_seed(11)
    offsets = (torch.rand(8, 2, generator=generator, dtype=torch.float64) * 9).floor().int()
    flips = torch.rand(8, generator=generator) < 0.5
    for i in range(8):
        y, x = offsets[i].tolist()
        padded = np.pad(images[i].numpy(), ((0, 0), (4, 4), (4, 4)))
        crop = padded[:, y : y + 32, x : x + 32]
        crop = crop[:, :, ::-1] if flips[i] else crop
        expected = (crop / 255.0 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(out[i].numpy(), expected, atol=1e-5)


def test_cutout_paints_the_mean_colour():
    images = photos(64)
    out = augmenter(train="baseline_cutout")(images, False, 3)
    plain = augmenter(train="baseline")(images, False, 3)
    covered = (out == 0).all(1)  # (B, H, W), 0 is the mean
    assert torch.equal(out, plain.masked_fill(covered[:, None], 0.0))
    area = covered.flatten(1).sum(1)
    assert area.min() >= 64 and area.max() <= 256 and (area == 256).any()


@pytest.mark.parametrize(
    "policy, flip, axis, share",
    [
        ("default_2d_2", "hflip_p", 3, 0.5),
        ("default_2d_2", "vflip_p", 2, 0.2),
    ],
)
def test_flip_probabilities(policy, flip, axis, share):
    others = {"hflip_p": 0.0, "vflip_p": 0.0, "rotate_p": 0.0, flip: None}
    augment = augmenter(train=policy, train_kwargs=ImageKwargs(**others))
    images = photos(1).expand(3000, -1, -1, -1)
    out = augment(images, False, 2)
    plain = v2.functional.normalize(images[:1].float() / 255, MEAN, STD)
    flipped = torch.isclose(out, plain.flip(axis), atol=1e-5).flatten(1).all(1).float().mean()
    assert abs(flipped - share) < 0.035


@pytest.mark.parametrize("name", TRAIN)
def test_sixteen_bit_equals_eight_bit_of_the_same_values(name):
    """257 v is the 16-bit level of the 8-bit level v."""
    options = {"train": name, "channels": 1, "native": (32, 32)}
    eight = photos(6, channels=1)
    out = augmenter(**options)(eight, False, 7)
    wide = augmenter(bit_depth=16, **options)(eight.int() * 257, False, 7)
    # random resized crops round to whole 8-bit levels, and sharper contrasts raise the difference
    far = (out - wide).abs() > 0.03
    assert far.float().mean() < 0.02


def test_operations_that_are_off_draw_and_compute_nothing(monkeypatch):
    for name in ("warp", "jittered", "filtered", "noisy", "painted"):
        monkeypatch.setattr(augment_images, name, None)
    for name in ("rand", "randint", "randn"):
        monkeypatch.setattr(torch, name, None)
    images = photos(3)
    plain = v2.functional.normalize(images.float() / 255, MEAN, STD)
    out = augmenter(train="default_2d_1")(images, False, 0)
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)


def test_parameters_do_not_depend_on_the_device(monkeypatch):
    """Everything but noise fields is drawn from CPU generators, whatever the device."""
    devices, real = [], torch.rand

    def watched(*args, **options):
        devices.append(options["generator"].device.type)
        return real(*args, **options)

    monkeypatch.setattr(torch, "rand", watched)
    augmenter(train="default_2d_5")(photos(4), False, 0)
    assert len(devices) > 5 and set(devices) == {"cpu"}
    quiet = ImageKwargs(noise_p=0.0, randaugment_ops=2)  # there are no generators for meta tensors
    augment = augmenter(train="default_2d_5", train_kwargs=quiet)
    out = torch.empty(1, 4, 3, 32, 32, device="meta")
    augment.write(photos(4).to("meta"), True, 0, out)  # no value is read back


def test_default_policies_have_the_parameters_of_their_description():
    five = TRAIN["default_2d_5"]
    assert (five.crop, five.scale, five.rotate_degrees, five.rotate_p) == (
        "resized",
        (0.6, 1.0),
        180.0,
        0.6,
    )
    assert (five.jitter_p, five.blur_p, five.noise_p, five.dropout_p) == (0.7, 0.2, 0.2, 0.2)
    assert TRAIN["default_2d_1"] == TEST["shared_default_2d"]


def test_extreme_settings_stay_finite():
    everything = ImageKwargs(
        rotate_p=1.0,
        affine_p=1.0,
        jitter_p=1.0,
        blur_p=1.0,
        noise_p=1.0,
        dropout_p=1.0,
        randaugment_ops=3,
        randaugment_p=1.0,
        affine_shear=89.0,
        jitter=(3.0, 3.0, 3.0, 0.5),
    )
    augment = augmenter(train="default_2d_5", train_kwargs=everything)
    out = augment(photos(16), False, 0)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["default_2d_5", "randaugment"])
def test_autocast_does_not_lower_the_precision(name):
    augment = augmenter(train=name, channels=3)
    images = photos(8).int()  # the matrix products of the GPU
    expected = augment(images, False, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, False, 1), expected)


def test_geometry_travels_to_workers():
    geometry = augmenter(train="default_2d_4").fit
    copied = pickle.loads(pickle.dumps(geometry))
    size = np.array([[60, 80]])
    box = geometry.boxes(size, torch.Generator().manual_seed(1))
    assert torch.equal(copied.boxes(size, torch.Generator().manual_seed(1)), box)
    image = photos(1, 60, 80)[0].numpy()
    assert torch.equal(copied.one(image, box[0]), geometry.one(image, box[0]))


@pytest.mark.parametrize(
    ("kwargs", "when"),
    [
        (ImageKwargs(rotate_degrees=90.0), "rotate_p above 0"),
        (ImageKwargs(crop="center", scale=(0.5, 1.0)), 'crop = "resized"'),
        (ImageKwargs(crop="resized", crop_padding=2), 'crop = "padded"'),
        (ImageKwargs(crop="none", resize="none"), 'crop = "center" or "random" or "padded"'),
        (ImageKwargs(randaugment_p=0.3), "randaugment_ops above 0"),
    ],
)
def test_parameters_that_no_operation_reads_are_refused(kwargs, when):
    with pytest.raises(UserError, match="would be ignored") as error:
        resolved("baseline", train_kwargs=kwargs)
    assert when in str(error.value)
    resolved("baseline", train_kwargs=ImageKwargs(rotate_degrees=90.0, rotate_p=0.1))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_crop_mode_is_that_of_the_published_weights(mode: str) -> None:
    """Wide images of one pixel value a column: what a mode keeps of them shows in the crop."""
    encoder = replace(CNN, crop_mode=mode)
    assert resolved(encoder=encoder).crop_mode == mode
    assert resolved(encoder=encoder, crop_mode="center").crop_mode == "center"
    images = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 3, 32, 64)
    crops = {
        kind: Augmenter(
            resolved(encoder=replace(CNN, crop_mode=kind), native=(32, 64)),
            train=False,
            bit_depth=8,
        )(images, False, 0)
        for kind in (mode, "center")
    }
    assert torch.equal(crops[mode], crops["center"]) == (mode == "center")
