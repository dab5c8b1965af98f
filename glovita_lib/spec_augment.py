"""Augmentation section of a spec: the policy names, the sizes and every parameter of every
operation.

A policy is one `Ops` value (see `policies.py`): naming `train_policy` picks the value, and a field
set in `train_kwargs` replaces that one parameter, so nothing about a policy is hidden in code.
"""

from typing import Annotated, Literal

from msgspec import Meta

from glovita_lib.spec import Spec

Probability = Annotated[float, Meta(ge=0, le=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Magnitude = Annotated[float, Meta(ge=0, le=10)]
Pixels = Annotated[int, Meta(ge=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]

TrainPolicy = Literal[
    "default_2d_1",
    "default_2d_2",
    "default_2d_3",
    "default_2d_4",
    "default_2d_5",
    "default_2d_randaugment",
    "baseline",
    "baseline_cutout",
    "randaugment",
]
TestPolicy = Literal["shared_default_2d", "default", "native"]


class Ops(Spec):
    """Parameters of a policy; an unset one (none) keeps the value of the named policy."""

    crop: Literal["none", "center", "random", "resized", "padded"] | None = None
    """How the image_size window is cut: whole image squashed, centre, random place, random resized,
    or padded by crop_padding then random."""
    resize: Literal["none", "image_size", "resize_size"] | None = None
    """What the shortest side is resized to before a center, random or padded crop; with "none" the
    pixels stay as they are."""
    crop_padding: Annotated[int, Meta(ge=0)] | None = None
    """Black margin on every side that a padded crop may reach into, pixels of the source image."""
    scale: tuple[Positive, Positive] | None = None
    """Area of a random resized crop as a share of the image, lowest and highest."""
    ratio: tuple[Positive, Positive] | None = None
    """Aspect ratio (width / height) of a random resized crop, lowest and highest."""
    hflip_p: Probability | None = None
    """Probability of a left-right flip."""
    vflip_p: Probability | None = None
    """Probability of an up-down flip."""
    rotate_degrees: Annotated[float, Meta(ge=0, le=180)] | None = None
    """Rotation is drawn from -this to +this, degrees; borders are reflected."""
    rotate_p: Probability | None = None
    """Probability of a rotation."""
    affine_p: Probability | None = None
    """Probability of the affine warp below."""
    affine_scale: tuple[Positive, Positive] | None = None
    """Zoom factor of the affine warp, lowest and highest."""
    affine_translate: Probability | None = None
    """Largest shift of the affine warp, share of the image side."""
    affine_shear: NonNegative | None = None
    """Largest shear of the affine warp, degrees."""
    jitter_p: Probability | None = None
    """Probability of a colour jitter."""
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] | None = None
    """Colour jitter strength: brightness, contrast, saturation (factors 1 +- value), hue (share of
    the circle)."""
    brightness_contrast: NonNegative | None = None
    """If above 0, half of the jittered samples get a brightness and contrast change of +- this
    instead of the colour jitter."""
    blur_p: Probability | None = None
    """Probability of a blur."""
    blur_kernel: tuple[Pixels, Pixels] | None = None
    """Kernel side of the blur, smallest and largest odd number of pixels."""
    motion_blur: bool | None = None
    """Whether half of the blurred samples get a motion blur instead of a Gaussian one."""
    noise_p: Probability | None = None
    """Probability of additive Gaussian noise."""
    noise_std: tuple[NonNegative, NonNegative] | None = None
    """Standard deviation of the noise, share of the value range, lowest and highest."""
    dropout_p: Probability | None = None
    """Probability of coarse dropout."""
    dropout_holes: tuple[Pixels, Pixels] | None = None
    """Number of dropped rectangles, smallest and largest."""
    dropout_size: tuple[Probability, Probability] | None = None
    """Height and width of a dropped rectangle, share of the image side, smallest and largest."""
    randaugment_ops: Annotated[int, Meta(ge=0)] | None = None
    """Number of RandAugment operations applied one after another to a sample; 0 turns it off."""
    randaugment_magnitude: tuple[Magnitude, Magnitude] | None = None
    """Strength of the RandAugment operations, lowest and highest, 0 to 10; [9, 9] fixes it."""
    randaugment_p: Probability | None = None
    """Probability with which each of the RandAugment operations is applied."""
    cutout_size: Annotated[int, Meta(ge=0)] | None = None
    """Side of the square that is painted over with the mean colour in every sample, pixels of the
    canvas; 0 turns it off. The policies with cutout take 16, at most half of image_size."""


class Augmentation(Spec):
    """Policies and sizes; what is unset is derived from the data set (policies) and the encoder
    (sizes, mean, std)."""

    train_policy: TrainPolicy | None = None
    """Policy of the training split; none takes the data set's default."""
    test_policy: TestPolicy | None = None
    """Policy of evaluation, inference and extraction; none takes the data set's default."""
    image_size: Pixels | None = None
    """Side of the square the encoder receives, pixels; none takes the encoder's."""
    resize_size: Pixels | None = None
    """Length of the shortest side before the crop, pixels; none takes the encoder's."""
    interpolation: Interpolation | None = None
    """Resampling of the resize; none takes the encoder's."""
    mean: tuple[float, ...] | None = None
    """Mean per channel subtracted from values in 0..1; none takes the encoder's."""
    std: tuple[Positive, ...] | None = None
    """Standard deviation per channel, divided by after the mean; none takes the encoder's."""
    train_kwargs: Ops = Ops()
    """Parameters that replace those of the train policy."""
    test_kwargs: Ops = Ops()
    """Parameters that replace those of the test policy."""
