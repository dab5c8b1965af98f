"""The named augmentation policies: every parameter of each.

A policy of the training split differs from `PLAIN` in what it lists; fields and units are those of
`Ops`. Nothing here is random or needs torch.
"""

import msgspec

from glovita_lib.spec_augment import Ops

PLAIN = Ops(
    crop="center",
    resize="resize_size",
    crop_padding=4,
    scale=(0.7, 1.0),
    ratio=(0.8, 1.25),
    hflip_p=0.0,
    vflip_p=0.0,
    rotate_degrees=20.0,
    rotate_p=0.0,
    affine_p=0.0,
    affine_scale=(0.85, 1.15),
    affine_translate=0.08,
    affine_shear=8.0,
    jitter_p=0.0,
    jitter=(0.2, 0.2, 0.2, 0.03),
    brightness_contrast=0.0,
    blur_p=0.0,
    blur_kernel=(3, 5),
    motion_blur=False,
    noise_p=0.0,
    noise_std=(0.01, 0.04),
    dropout_p=0.0,
    dropout_holes=(1, 6),
    dropout_size=(0.05, 0.18),
    randaugment_ops=0,
    randaugment_magnitude=(1.0, 10.0),
    randaugment_p=0.5,
    cutout_size=0,
)  # a centre crop and nothing else; what is off has the strength it gets when it is switched on


def policy(base: Ops, **changes: object) -> Ops:
    """A policy that differs from another one in a few parameters."""
    return msgspec.structs.replace(base, **changes)


CUTOUT = 16  # pixels; half the side of a CIFAR image, as in DeVries and Taylor 2017
SHIFTED = policy(PLAIN, crop="padded", resize="image_size", hflip_p=0.5)

TRAIN: dict[str, Ops] = {
    "default_2d_1": PLAIN,
    "default_2d_2": policy(PLAIN, crop="random", hflip_p=0.5, vflip_p=0.2, rotate_p=0.3),
    "default_2d_3": policy(
        PLAIN,
        crop="random",
        hflip_p=0.5,
        vflip_p=0.5,
        rotate_degrees=45.0,
        rotate_p=0.5,
        jitter_p=0.5,
        jitter=(0.15, 0.15, 0.10, 0.02),
    ),
    "default_2d_4": policy(
        PLAIN,
        crop="resized",
        hflip_p=0.5,
        vflip_p=0.5,
        rotate_degrees=90.0,
        rotate_p=0.5,
        jitter_p=0.6,
        blur_p=0.15,
        noise_p=0.15,
    ),
    "default_2d_5": policy(
        PLAIN,
        crop="resized",
        scale=(0.6, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip_p=0.5,
        vflip_p=0.5,
        rotate_degrees=180.0,
        rotate_p=0.6,
        affine_p=0.3,
        jitter_p=0.7,
        jitter=(0.25, 0.25, 0.2, 0.04),
        brightness_contrast=0.2,
        blur_p=0.2,
        blur_kernel=(3, 7),
        motion_blur=True,
        noise_p=0.2,
        noise_std=(0.01, 0.05),
        dropout_p=0.2,
    ),
    "default_2d_randaugment": policy(
        PLAIN, crop="random", hflip_p=0.5, randaugment_ops=2, cutout_size=CUTOUT
    ),
    "baseline": SHIFTED,
    "baseline_cutout": policy(SHIFTED, cutout_size=CUTOUT),
    "randaugment": policy(SHIFTED, randaugment_ops=2, cutout_size=CUTOUT),
}
TEST: dict[str, Ops] = {
    "shared_default_2d": PLAIN,
    "default": policy(PLAIN, resize="image_size"),
    "native": policy(PLAIN, resize="none"),
}
