"""What an encoder expects of its input images."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The input convention of an encoder: that of its published weights, else that of its
    architecture.

    Sizes in pixels. mean and std refer to values in 0..1, one per input channel.
    """

    image_size: int | None
    """Side of the square input; none where nothing asks for a certain one."""
    resize_size: int | None
    """Shorter side before the centre crop to image_size, e.g. 256 before 224."""
    interpolation: str
    """nearest, bilinear, bicubic or lanczos."""
    mean: tuple[float, ...]
    """Subtracted from each channel."""
    std: tuple[float, ...]
    """Divides each channel after that."""
    fixed_size: bool
    """Whether the encoder must be built for its input size and accepts no other."""


def fit_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Statistics of RGB for another number of channels, as its first kernel is fitted: one channel
    takes their mean, more repeat them."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(float(values[i % len(values)]) for i in range(channels))
