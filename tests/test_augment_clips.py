"""Clips under the policies of images: what is drawn of a clip serves all its frames."""

import numpy as np
import pytest
import torch
from video_files import SIDE, resolved

from glovita_lib import augment
from glovita_lib.augment import Augmenter, ClipAugmenter, Clips, ManyClips, build_fit
from glovita_lib.spec_augment import TRAIN


def clips(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (*shape, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    numbers = torch.arange(shape[-1]).expand(shape)
    return Clips(pixels, numbers, numbers >= 0, numbers / 25)


def augmenter(policy="default_2d_1", *, train=True, combine="mean", chunk=8, **kwargs):
    return ClipAugmenter(
        resolved(policy, **kwargs), train=train, fit=None, combine=combine, chunk=chunk
    )


@pytest.mark.parametrize("policy", TRAIN)
def test_each_frame_is_what_the_same_draws_make_of_it_as_an_image(policy):
    """Frame t of the clips of a batch equals the batch of images that are frame t, augmented from
    the same seed; noise of pixels alone is each frame's own."""
    batch = clips(5, 4)
    quiet = {"noise_p": 0.0}
    images = Augmenter(resolved(policy, **quiet), train=True, bit_depth=8)
    for seed in range(3):
        found = augmenter(policy, **quiet)(batch, True, seed)
        assert found.shape == (5, 3, 4, SIDE, SIDE) and found.is_contiguous()
        for frame in range(4):
            expected = images(batch.pixels[:, frame], True, seed)
            torch.testing.assert_close(found[:, :, frame], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("policy", ["default_2d_5", "default_2d_randaugment"])
def test_a_cpu_that_takes_them_in_blocks_gives_the_same(policy, monkeypatch):
    """One frame at a time, parts of a clip, or all at once; the pixels are left as they are."""
    batch = clips(5, 7)
    before = batch.pixels.clone()
    found = {}
    for block in (1, 3 * 3 * SIDE**2, 1 << 30):
        monkeypatch.setattr(augment, "BLOCK", block)
        found[block] = augmenter(policy, noise_p=0.0)(batch, True, 3)
        assert torch.equal(batch.pixels, before)
    whole = found.pop(1 << 30)
    for each in found.values():
        torch.testing.assert_close(each, whole, rtol=0, atol=2e-6)


def test_the_window_of_a_clip_is_that_of_each_of_its_frames():
    """Resized at once, the frames are what each is by itself; video memory is not written to."""
    options = {"crop": "resized", "scale": (0.3, 0.6)}
    crop = build_fit(resolved(**options), resolved(**options).train, bit_depth=8)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 40, 52), dtype=np.uint8)
    boxes = crop.boxes(np.array([[40, 52]]), torch.Generator().manual_seed(0))
    frames = torch.from_numpy(pixels)
    found = crop.canvas(frames, boxes.expand(9, 2, 4))
    each = [crop.canvas(frame[None], boxes)[0] for frame in frames]
    assert torch.equal(found, torch.stack(each)) and len(found.unique()) > 50


def test_noise_is_drawn_for_every_frame():
    still = clips(2, 1).pixels.expand(2, 3, -1, -1, -1).contiguous()
    batch = Clips(still, *[torch.zeros(2, 3)] * 3)
    frames = augmenter(noise_p=1.0, noise_std=(0.2, 0.2))(batch, True, 0).unbind(2)
    assert not torch.equal(frames[0], frames[1])


def test_clips_of_a_batch_draw_for_themselves_and_seeds_differ():
    one = clips(1, 2).pixels.expand(8, 2, -1, -1, -1).contiguous()
    batch = Clips(one, *[torch.zeros(8, 2)] * 3)
    apply = augmenter("default_2d_5")
    found = apply(batch, True, 0)
    assert len({tuple(clip.flatten().tolist()) for clip in found}) > 6
    assert torch.equal(found, apply(batch, True, 0))
    assert not torch.equal(found, apply(batch, True, 1))


def test_several_clips_of_a_video_are_reduced():
    """The mean of logits; or of probabilities, given as logits whose softmax and sigmoid they
    are."""
    batch = clips(3, 4, 2)
    linear = torch.nn.Linear(3, 5)

    def model(x):  # (m, C, T, S, S) -> (m, K)
        assert x.shape[1:] == (3, 2, SIDE, SIDE)
        return linear(x.mean((2, 3, 4))) * 9

    single = [
        model(augmenter(train=False)(Clips(batch.pixels[:, v], *[torch.zeros(3, 2)] * 3), True, 0))
        for v in range(4)
    ]
    each = torch.stack(single, 1)  # (B, V, K)
    for combine, expected in {
        "mean": each.mean(1),
        "softmax": each.softmax(2).mean(1).log(),
        "sigmoid": each.sigmoid().mean(1).logit(),
    }.items():
        many = augmenter(train=False, combine=combine, chunk=5)(batch, True, 0)
        assert isinstance(many, ManyClips) and len(many) == 3
        found = many.reduced(model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(many.reduced(model, "mean"), each.mean(1), rtol=1e-4, atol=1e-5)


def test_a_bag_is_one_input_with_its_clips_one_after_the_other():
    batch = clips(2, 3, 4)
    found = augmenter(train=False, combine="bag")(batch, True, 0)
    assert found.shape == (2, 3, 12, SIDE, SIDE)
    whole = Clips(batch.pixels.flatten(1, 2), *[torch.zeros(2, 12)] * 3)
    assert torch.equal(found, augmenter(train=False)(whole, True, 0))
