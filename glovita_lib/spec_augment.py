"""Augmentation in a spec: policies, sizes and every parameter, a Struct a modality.

The parameters of a modality are one Struct, whose defaults are the policy that changes nothing. A
policy is one value of it (see `augment`): naming `train_policy` picks the value, and a field set
in `train_kwargs` replaces that one parameter, so nothing about a policy is hidden in code.

To add an operation, add its fields to the Struct, its switch first, and one function with the
name of the switch to the table of the modality (augment_images, augment_volumes).
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta
from msgspec.structs import asdict, replace

from glovita_lib.spec import Spec
from glovita_lib.spec_errors import (
    Fraction,
    NonNegative,
    Positive,
    extra_of,
    shown,
    struct_type,
)

Probability = Annotated[float, Meta(ge=0, le=1)]
Magnitude = Annotated[float, Meta(ge=0, le=10)]
Pixels = Annotated[int, Meta(ge=1)]
HueShift = Annotated[float, Meta(ge=0, le=0.5)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
CropMode = Literal["center", "squash", "border"]
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


def part_of(switch: str, *values: str, **bounds: Any) -> Meta:
    """Annotation of a parameter that only the operation of another field, its switch, reads: at
    any value that turns it on, or at these; bounds are those of Meta."""
    return Meta(**bounds, extra={"part_of": switch, "at": values})


def read_with(extra: dict[str, Any]) -> str:
    """When a parameter of an augmentation is read, in words."""
    at = " or ".join(shown(value) for value in extra["at"])
    return f"{extra['part_of']} = {at}" if at else f"{extra['part_of']} above 0"


class BaseOps(Spec):
    """Parameters of the augmentations of one modality.

    A field is the switch of an operation (its probability; 0 turns it off), or is `part_of` one.
    The operations are applied in the order of their switches. A pair is lowest and highest.
    """

    def unread(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Those of some fields that no operation reads, each with when it would be read."""
        extras = {field.name: extra_of(field.type) for field in struct_type(type(self)).fields}
        for name in names:
            extra = extras[name]
            if (switch := extra.get("part_of")) is not None:
                at = getattr(self, switch)
                if not (at in extra["at"] if extra["at"] else at):
                    yield name, read_with(extra)

    def given(self) -> dict[str, Any]:
        """Parameters that are set, which of a Struct of replacements are those it replaces."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def draws(self, switch: str) -> bool:
        """Whether the operation of a switch does anything: its value is above 0."""
        return bool(getattr(self, switch))

    def random(self) -> list[str]:
        """Switches of the operations that are on; none where every time gives the same."""
        fields = struct_type(type(self)).fields
        switches = (each.name for each in fields if "part_of" not in extra_of(each.type))
        return [name for name in switches if self.draws(name)]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Pairs ascend."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                yield (
                    name,
                    f"{shown(value)} has its lowest value last: write {shown(value[::-1])}",
                )


# -------------------------------------------------------------------------------- operations


class ImageOps(BaseOps):
    """Parameters of the augmentations of images."""

    crop: Literal["none", "center", "random", "resized", "padded"] = "center"
    """How the image_size window is cut: whole image squashed, centre, random place, random resized,
    or padded by crop_padding then random."""
    resize: Annotated[
        Literal["none", "image_size", "resize_size"],
        part_of("crop", "center", "random", "padded"),
    ] = "resize_size"
    """What the shortest side is resized to before a center, random or padded crop; with "none" the
    pixels stay as they are."""
    crop_padding: Annotated[int, part_of("crop", "padded", ge=0)] = 4
    """Black margin on every side that a padded crop may reach into, pixels of the source image."""
    scale: Annotated[tuple[Fraction, Fraction], part_of("crop", "resized")] = (0.7, 1.0)
    """Area of a random resized crop as a share of the image, lowest and highest."""
    ratio: Annotated[tuple[Positive, Positive], part_of("crop", "resized")] = (0.8, 1.25)
    """Aspect ratio (width / height) of a random resized crop, lowest and highest."""
    hflip_p: Probability = 0.0
    """Probability of a left-right flip."""
    vflip_p: Probability = 0.0
    """Probability of an up-down flip."""
    rotate_p: Probability = 0.0
    """Probability of a rotation."""
    rotate_degrees: Annotated[float, part_of("rotate_p", ge=0, le=180)] = 20.0
    """Rotation is drawn from -this to +this, degrees; borders are reflected."""
    affine_p: Probability = 0.0
    """Probability of the affine warp below."""
    affine_scale: Annotated[tuple[Positive, Positive], part_of("affine_p")] = (0.85, 1.15)
    """Zoom factor of the affine warp, lowest and highest."""
    affine_translate: Annotated[float, part_of("affine_p", ge=0, le=1)] = 0.08
    """Largest shift of the affine warp, share of the image side."""
    affine_shear: Annotated[float, part_of("affine_p", ge=0)] = 8.0
    """Largest shear of the affine warp, degrees."""
    jitter_p: Probability = 0.0
    """Probability of a colour jitter."""
    jitter: Annotated[
        tuple[NonNegative, NonNegative, NonNegative, HueShift], part_of("jitter_p")
    ] = (0.2, 0.2, 0.2, 0.03)
    """Colour jitter strength: brightness, contrast, saturation (factors 1 +- value), hue (share of
    the circle)."""
    brightness_contrast: Annotated[float, part_of("jitter_p", ge=0)] = 0.0
    """If above 0, half of the jittered samples get a brightness and contrast change of +- this
    instead of the colour jitter."""
    blur_p: Probability = 0.0
    """Probability of a blur."""
    blur_kernel: Annotated[tuple[Pixels, Pixels], part_of("blur_p")] = (3, 5)
    """Kernel side of the blur, smallest and largest odd number of pixels."""
    motion_blur: Annotated[bool, part_of("blur_p")] = False
    """Whether half of the blurred samples get a motion blur instead of a Gaussian one."""
    noise_p: Probability = 0.0
    """Probability of additive Gaussian noise."""
    noise_std: Annotated[tuple[NonNegative, NonNegative], part_of("noise_p")] = (0.01, 0.04)
    """Standard deviation of the noise, share of the value range, lowest and highest."""
    dropout_p: Probability = 0.0
    """Probability of coarse dropout."""
    dropout_holes: Annotated[tuple[Pixels, Pixels], part_of("dropout_p")] = (1, 6)
    """Number of dropped rectangles, smallest and largest."""
    dropout_size: Annotated[tuple[Probability, Probability], part_of("dropout_p")] = (0.05, 0.18)
    """Height and width of a dropped rectangle, share of the image side, smallest and largest."""
    randaugment_ops: Annotated[int, Meta(ge=0)] = 0
    """Number of RandAugment operations applied one after another to a sample; 0 turns it off."""
    randaugment_magnitude: Annotated[tuple[Magnitude, Magnitude], part_of("randaugment_ops")] = (
        1.0,
        10.0,
    )
    """Strength of the RandAugment operations, lowest and highest, 0 to 10; [9, 9] fixes it."""
    randaugment_p: Annotated[float, part_of("randaugment_ops", ge=0, le=1)] = 0.5
    """Probability with which each of the RandAugment operations is applied."""
    cutout_size: Annotated[int, Meta(ge=0)] = 0
    """Side of the square that is painted over with the mean colour in every sample, pixels of the
    canvas; 0 turns it off. The policies with cutout take 16, at most half of image_size."""

    def draws(self, switch: str) -> bool:
        """Crops at a stated place draw nothing, and RandAugment is on with its probability."""
        if switch == "crop":
            return self.crop not in (None, "none", "center")
        return super().draws(switch) and (switch != "randaugment_ops" or self.randaugment_p != 0)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Blur kernels have a pixel in their middle."""
        yield from super().problems()
        if self.blur_kernel and any(side % 2 == 0 for side in self.blur_kernel):
            yield "blur_kernel", f"{shown(self.blur_kernel)} must be odd numbers of pixels"


Partial = TypeVar("Partial", bound=type[BaseOps])


def partial(struct: Partial) -> Partial:
    """A Struct whose inherited fields may all be unset (none), and are by default."""
    hints = get_type_hints(struct, include_extras=True)
    made: Any = msgspec.defstruct(
        struct.__name__,
        [(name, hints[name] | None, None) for name in struct.__struct_fields__],
        bases=(struct,),
        namespace={"__doc__": struct.__doc__},
        module=struct.__module__,
        frozen=True,
    )
    return made


@partial
class ImageKwargs(ImageOps):
    """Parameters that replace those of a policy for images, in the order in which its operations
    are applied; an unset one (none) keeps the value of the named policy."""


def random_problems(test_kwargs: BaseOps, valid: str) -> Iterator[tuple[str, str]]:
    """Parameters of evaluation that draw something, where it is to be the same every time; valid
    are the fields that may be set."""
    for name in test_kwargs.random():
        yield (
            f"test_kwargs.{name}",
            f"{shown(getattr(test_kwargs, name))} is random, and evaluation is deterministic;"
            f" valid there are {valid}: move it to train_kwargs",
        )


def unread_changes(where: str, preset: BaseOps, kwargs: BaseOps) -> Iterator[tuple[str, str]]:
    """Parameters set in the place of those of a policy that no operation reads."""
    changes = kwargs.given()
    for name, when in replace(preset, **changes).unread(changes):
        yield (
            f"{where}.{name}",
            f"{shown(changes[name])} would be ignored, it is read only with {when}: set that too,"
            " or leave it out",
        )


# ---------------------------------------------------------------------------- named policies
#
# The named augmentation policies for images: every parameter of each.
#
# A policy differs from `PLAIN`, the defaults of `ImageOps`, in what it lists; fields and units are
# those of `ImageOps`. Nothing here is random.

PLAIN = ImageOps()  # a centre crop; what is off has the strength it gets when it is switched on


Ops = TypeVar("Ops", bound=BaseOps)


def policy(base: Ops, **changes: object) -> Ops:
    """A policy that differs from another one in a few parameters."""
    return replace(base, **changes)


CUTOUT = 16  # pixels; half the side of a CIFAR image, as in DeVries and Taylor 2017
SHIFTED = policy(PLAIN, crop="padded", resize="image_size", hflip_p=0.5)
TRAIN: dict[str, ImageOps] = {
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
TEST: dict[str, ImageOps] = {
    "shared_default_2d": PLAIN,
    "default": policy(PLAIN, resize="image_size"),
    "native": policy(PLAIN, resize="none"),
}


class ImageAugmentation(Spec):
    """Policies and sizes for images; what is unset is derived from the data set (policies) and the
    encoder (sizes, mean, std)."""

    train_policy: TrainPolicy | None = None
    """Policy of the training split; none takes the data set's default."""
    test_policy: TestPolicy | None = None
    """Policy of evaluation, inference and extraction; none takes the data set's default."""
    image_size: Pixels | None = None
    """Side of the square the encoder receives, pixels; none takes the encoder's."""
    resize_size: Pixels | None = None
    """Length of the shortest side before the crop, pixels; none takes the encoder's."""
    crop_size: Pixels | None = None
    """Side of the square that a centre or random crop cuts from the resized image and that is then
    resized to image_size, pixels; none cuts image_size itself."""
    patch_size: Pixels | tuple[Pixels, ...] | None = None
    """Side of the patches that the encoder's patch embedding is built for, pixels, or their height
    and width; published weights are resampled to it. none takes the encoder's."""
    crop_mode: CropMode | None = None
    """What is resized before a centre crop: the shortest side (center), each side for itself
    (squash), or the longest, with a border of the mean colour around it (border); none takes the
    encoder's."""
    interpolation: Interpolation | None = None
    """Resampling of the resize; none takes the encoder's."""
    mean: tuple[float, ...] | None = None
    """Mean per channel subtracted from values in 0..1; none takes the encoder's."""
    std: tuple[Positive, ...] | None = None
    """Standard deviation per channel, divided by after the mean; none takes the encoder's."""
    train_kwargs: ImageKwargs = ImageKwargs()
    """Parameters that replace those of the train policy."""
    test_kwargs: ImageKwargs = ImageKwargs()
    """Parameters that replace those of the test policy."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Evaluation is deterministic, and the crop is cut from an image as large at least."""
        valid = 'crop = "none" or "center", and resize'
        yield from random_problems(self.test_kwargs, valid)
        if self.crop_size is not None or self.image_size is not None:
            yield from self.crop_problems(self.image_size or 0)
        if self.crop_size is not None and self.crop_mode not in (None, "center"):
            yield "crop_size", f"it is cut from an image whose shape stays, not {self.crop_mode}"
        if isinstance(self.patch_size, tuple) and len(self.patch_size) != 2:
            yield (
                "patch_size",
                f"{shown(self.patch_size)} are {len(self.patch_size)} numbers: give one, the side,"
                " or two, height and width",
            )

    def crop_problems(self, image_size: int) -> Iterator[tuple[str, str]]:
        """The crop is cut from an image that is at least as large."""
        key = "image_size" if self.crop_size is None else "crop_size"
        side = self.crop_size or image_size
        if self.resize_size is not None and self.resize_size < side:
            yield (
                "resize_size",
                f"{self.resize_size} pixels are too few for the crop of {key} = {side}: at least"
                f" {side}",
            )

    def unread_kwargs(self, default_policies: tuple[str, str]) -> Iterator[tuple[str, str]]:
        """Parameters that no operation of their policy reads, under the policies of a data set."""
        train = TRAIN[self.train_policy or default_policies[0]]
        test = TEST[self.test_policy or default_policies[1]]
        yield from unread_changes("train_kwargs", train, self.train_kwargs)
        yield from unread_changes("test_kwargs", test, self.test_kwargs)
        asked = (self.train_kwargs.crop or train.crop, self.test_kwargs.crop or test.crop)
        if self.crop_size is not None and not {"center", "random"} & set(asked):
            yield "crop_size", f"the policies crop {' and '.join(asked)}, which reads no crop_size"

    def channel_problems(self, channels: int) -> Iterator[tuple[str, str]]:
        """Mean and std have a number for each channel."""
        for name, numbers in {"mean": self.mean, "std": self.std}.items():
            if numbers is not None and len(numbers) != channels:
                yield (
                    name,
                    f"{len(numbers)} numbers, but the images have {channels} channels: give one a"
                    " channel",
                )
