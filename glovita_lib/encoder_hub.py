"""Models of the Hugging Face hub, or of a folder: their files, and what preprocessor_config.json
says of the input."""

import json
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from glovita_lib.errors import UserError, reason
from glovita_lib.spec_augment import CropMode

Values = dict[str, Any]
KEY = "model.encoder.type"
CONFIG = "config.json"
VIDEO_FILE, IMAGE_FILE = "video_preprocessor_config.json", "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # of several kinds of input, a table each

# --------------------------------------------------------------------------------------- files


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises where it cannot fetch a file."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found: tuple[type[Exception], ...] = (OSError, HfHubHTTPError, HFValidationError)
    with suppress(ImportError):  # before huggingface_hub 1.0: requests, whose errors are OSErrors
        from httpx import HTTPError

        found += (HTTPError,)
    return found


@contextmanager
def cache_only_without_network() -> Iterator[None]:
    """Where the hub has no address, look into its cache alone: its own retries take 45 s and say
    so line by line. Behind a proxy addresses are the proxy's business."""
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


def place_of(model: str) -> tuple[str, str | None]:
    """A folder, or a repository of the hub and its revision, which stands behind an @."""
    if Path(model).is_dir():
        return model, None
    name, _, revision = model.partition("@")
    return name, revision or None


def read_json(model: str, name: str, hint: str = "") -> Values | None:
    """A file of a model; None where there is none.

    Args:
        hint: what may have been meant, as the end of the message that there is no such model.

    Raises:
        UserError: no such model, no network, or no table in JSON.
    """
    place, revision = place_of(model)
    path = Path(place, name) if Path(place).is_dir() else fetched(model, name, hint)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f'{KEY} = "{model}": its {name} is no JSON ({reason(error)})') from error
    if not isinstance(content, dict):
        raise UserError(f'{KEY} = "{model}": its {name} holds no table')
    return content


def fetched(model: str, name: str, hint: str) -> Path | None:
    """A file of a repository, from the cache or the hub; None where that has none.

    Raises:
        UserError: no such repository, or no network.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place, revision = place_of(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise UserError(
            f'{KEY} = "{model}": no such folder, and no repository of the hub, which is'
            f" owner/name{hint}"
        )
    try:
        with cache_only_without_network():
            return Path(hf_hub_download(place, name, revision=revision))
    except hub_errors() as error:
        unreached = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not unreached:
            return None
        snapshot = try_to_load_from_cache(place, CONFIG, revision=revision)
        if unreached and name != CONFIG and isinstance(snapshot, str):
            return None  # without a network a repository has the files of its snapshot
        raise UserError(
            f'{KEY} = "{model}": its {name} cannot be fetched from the hub'
            f" ({type(error).__name__}); offline: name a folder with config.json and"
            " model.safetensors, or, without published weights, a kind of model, e.g. type ="
            ' "vit", pretrained = false'
        ) from error


# --------------------------------------------------------------------------------------- input

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_preprocessor(model: str, *, clips: bool) -> Values | None:
    """What the files of a model say of its input; None where none does. A model of text and images
    may say it in a table of one file, which comes first, as in transformers 5, which writes it."""
    tables = read_json(model, PROCESSOR_FILE) or {}
    for kind, name in (("video", VIDEO_FILE), ("image", IMAGE_FILE))[not clips :]:
        table = tables.get(f"{kind}_processor")
        found = table if isinstance(table, dict) else read_json(model, name)
        if found is not None:
            return found
    return None


def lack_of_preprocessor(model: str) -> str:
    """Note on a model of which `read_preprocessor` finds nothing."""
    from huggingface_hub import try_to_load_from_cache

    place, revision = place_of(model)
    of_hub = not Path(place).is_dir() and "/" in place
    known = not of_hub or try_to_load_from_cache(place, IMAGE_FILE, revision=revision)
    unknown = (
        " in the hub's cache, and without a network nobody knows whether its repository has one"
    )
    return (
        f'{KEY} = "{model}" has no {IMAGE_FILE}{"" if known else unknown}: mean and deviation are'
        " ImageNet's unless data.augmentation says them"
    )


STATED = ("size", "crop_size", "crop_pct", "do_center_crop", "resample", "image_mean", "image_std",
          "do_normalize", "do_rescale", "rescale_factor", "offset")  # fmt: skip


def completed(kind: str, values: Values) -> Values:
    """What transformers' own preprocessor reads out of its file: its defaults, and sizes as tables.
    A number is both sides to one class and the shortest to another. The values as they are where
    no class takes them.

    Args:
        kind: `model_type`, by which the class is chosen where the file does not name it; that of
            the images' half of a model is chosen as the model's.
    """
    import transformers

    video = "video_processor_type" in values
    auto, name = (
        (transformers.AutoVideoProcessor, VIDEO_FILE)
        if video
        else (transformers.AutoImageProcessor, IMAGE_FILE)
    )
    stated = {each: value for each, value in values.items() if each != "auto_map"}  # code of others
    with TemporaryDirectory() as folder:
        Path(folder, name).write_text(json.dumps(stated))
        whole = {"model_type": kind.removesuffix("_vision_model")}
        Path(folder, CONFIG).write_text(json.dumps(whole))
        try:
            made = auto.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, ImportError, AttributeError, KeyError, TypeError):
            return values
    found: Values = {each: getattr(made, each, None) for each in STATED}
    found["do_center_crop"] = bool(found["do_center_crop"])
    for each in ("size", "crop_size"):
        sides = dict(found[each] or {})
        found[each] = {side: n for side, n in sides.items() if n is not None} or None
    return {each: value for each, value in found.items() if value is not None}


def interpolation(values: Values) -> str:
    """Name of PIL's number of a filter; bilinear for those that are not here."""
    return RESAMPLING.get(values.get("resample", 2), "bilinear")


def normalisation(
    values: Values, usual: tuple[Sequence[float], Sequence[float]]
) -> tuple[list[float], list[float]]:
    """Mean and deviation of values in 0..1 by those of a preprocessor: it makes (r p - o - mean) /
    std of a pixel p in 0..255, o being 1 where it brings them to -1..1 first (ViViT).

    Args:
        usual: mean and deviation where it states none.
    """
    means, stds = (values.get(f"image_{name}") for name in ("mean", "std"))
    means, stds = ([each] * 3 if isinstance(each, int | float) else each for each in (means, stds))
    if not values.get("do_normalize", True):
        means, stds = (0.0,) * 3, (1.0,) * 3
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    scale, offset = 255 * factor, float(bool(values.get("offset", False)))
    means, stds = (usual[0] if means is None else means), (usual[1] if stds is None else stds)
    return [(mean + offset) / scale for mean in means], [std / scale for std in stds]


def resizing(values: Values, default: int) -> tuple[int, float, CropMode]:
    """Side of the input, the share of the resized image that it is, and what is resized, by a
    preprocessor that is `completed`."""
    size, crop = values.get("size"), values.get("crop_size")
    crops = crop is not None and values.get("do_center_crop", True)
    cropped = side_in(crop) if crops else None
    if size is None:
        return cropped or default, 0.875, "center"
    edge = side_in(size) or default
    if values.get("crop_pct") and not crops:  # ConvNeXt's way
        return (edge, float(values["crop_pct"]), "center") if edge < 384 else (edge, 1.0, "squash")
    side = cropped or edge
    # a number, where no class takes it: the shortest side of what is cropped, else both sides
    shortest = "shortest_edge" in size if isinstance(size, dict) else crops
    return side, min(1.0, side / edge), "center" if shortest else "squash"


def side_in(value: Any) -> int | None:
    """A side as preprocessors say it: a number, or a table of height and width."""
    if isinstance(value, dict):
        value = value.get("height", value.get("shortest_edge"))
    return int(value) if isinstance(value, int | float) else None
