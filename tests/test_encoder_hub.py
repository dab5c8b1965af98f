"""What the files of a Hugging Face model say of its input, against transformers' own classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from glovita_lib.encoder import preprocess_of
from glovita_lib.encoder_hub import (
    completed,
    lack_of_preprocessor,
    normalisation,
    read_preprocessor,
    resizing,
)
from glovita_lib.encoder_torchvision import IMAGENET
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import TransformerEncoder

transformers = pytest.importorskip("transformers")

CLIP_FILE = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.2, 0.3],
    "resample": 3,
}


def old(kind: str, **values: Any) -> dict[str, Any]:
    """A preprocessor_config.json as transformers 4 wrote it, its numbers not yet tables."""
    usual = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3}
    usual |= {"image_std": [0.25] * 3, "feature_extractor_type": f"{kind}FeatureExtractor"}
    return usual | values


PREPROCESSORS = {
    "vit": [old("ViT", size=48, resample=2), {"size": {"height": 40, "width": 40}}, {}],
    "deit": [old("DeiT", size=64, crop_size=48, resample=3), {"do_center_crop": False}],
    "beit": [old("Beit", size=48, crop_size=32, do_center_crop=True, resample=2),
             old("Beit", size=48, crop_size=40, do_center_crop=False, resample=2)],
    "convnext": [old("ConvNext", size=48, crop_pct=0.875, resample=3),
                 old("ConvNext", size=384, crop_pct=1.0, resample=3)],
    "dinov2": [CLIP_FILE | {"image_processor_type": "BitImageProcessor"}],
    "clip": [{"size": 48, "crop_size": 40, "do_center_crop": True}, {"size": 256}, {}],
    "siglip": [{"size": {"height": 48, "width": 48}}],
    "clip_vision_model": [old("CLIP", size=48, crop_size=48, do_center_crop=True, resample=3)],
    "siglip_vision_model": [{"image_processor_type": "SiglipImageProcessor", "resample": 3,
                             "size": {"height": 48, "width": 48}}],
    "videomae": [old("VideoMAE", size=224, do_center_crop=True),
                 old("VideoMAE", size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48},
                     do_center_crop=True)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values"), [(kind, each) for kind, all_ in PREPROCESSORS.items() for each in all_]
)
def test_images_are_prepared_as_by_the_preprocessor(
    kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """A photo through transformers' own class, and through PIL by what is read of the file."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    photo = Image.fromarray(load_sample_image("flower.jpg")[:300, :420])
    if kind in ("clip", "siglip"):  # both halves, as published
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": kind, "vision_config": {"image_size": 48}})
        )
    made = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = np.asarray(made(photo, return_tensors="np")["pixel_values"])
    expected = expected.reshape(-1, *expected.shape[-3:])[0]
    found = preprocess_of(TransformerEncoder(type=str(tmp_path)), channels=3)
    side, share, mode = resizing(completed(kind, values), 224)
    assert expected.shape[1:] == (side, side)
    assert found.crop_mode == mode and found.crop_pct == pytest.approx(share)
    edge = int(side / share + 1e-6)
    short = min(photo.size)
    wide = [edge if mode == "squash" or n == short else int(edge * n / short) for n in photo.size]
    resized = photo.resize(wide, getattr(Image.Resampling, found.interpolation.upper()))
    left, top = ((n - side) // 2 for n in wide)
    levels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float64) / 255
    ours = ((levels - found.mean) / found.std).transpose(2, 0, 1)
    assert np.abs(ours - expected).mean() < 0.01


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_processor_of_text_and_images_says_it_in_a_table(file: str, tmp_path: Path) -> None:
    """As transformers 5 writes it, and as 4 did."""
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    stated = CLIP_FILE | {"image_processor_type": "CLIPImageProcessor"}
    table = stated if file.startswith("pre") else {"image_processor": stated}
    (tmp_path / file).write_text(json.dumps(table))
    found = preprocess_of(TransformerEncoder(type=str(tmp_path)), channels=3)
    assert found.mean == pytest.approx((0.4, 0.5, 0.6)) and found.crop_mode == "center"
    if file.startswith("proc"):  # it comes before a file of images alone, as in transformers
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3}))
        again = preprocess_of(TransformerEncoder(type=str(tmp_path)), channels=3)
        assert again == found


def test_clips_have_a_table_of_their_own_in_the_file_of_processors(tmp_path: Path) -> None:
    video, image = {"image_mean": [0.1] * 3}, {"image_mean": [0.2] * 3}
    tables = {"video_processor": video, "image_processor": image}
    (tmp_path / "processor_config.json").write_text(json.dumps(tables))
    assert read_preprocessor(str(tmp_path), clips=True) == video
    assert read_preprocessor(str(tmp_path), clips=False) == image


def test_code_of_others_is_neither_run_nor_asked_about(monkeypatch) -> None:
    """And one number may be the mean of every channel."""
    monkeypatch.setattr("builtins.input", lambda *texts: pytest.fail("it asked"))
    values = {
        "auto_map": {"AutoImageProcessor": "me/repo--code.Own"},
        "size": 40,
        "image_mean": 0.5,
    }
    found = completed("vit", values)
    assert found["size"] == {"height": 40, "width": 40}
    assert normalisation(found, IMAGENET)[0] == pytest.approx([0.5] * 3)


def test_of_no_class_a_number_is_both_sides() -> None:
    assert completed("vit", {"image_processor_type": "Gone", "size": 5}) == {
        "image_processor_type": "Gone", "size": 5,
    }  # fmt: skip
    assert resizing({"size": 196}, 224) == (196, 1.0, "squash")
    assert resizing({"size": 256, "crop_size": 224}, 224) == (224, 0.875, "center")
    assert resizing({}, 160) == (160, 0.875, "center")


@pytest.mark.parametrize(
    "values",
    [
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5,
         "offset": True},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    ],
)  # fmt: skip
def test_normalisation_is_that_of_the_preprocessor(values: dict[str, Any]) -> None:
    """(r p - o - mean) / std of pixels 0..255 in float64."""
    pixels = np.arange(256.0)[:, None].repeat(3, 1)
    expected = pixels * (
        values.get("rescale_factor", 1 / 255) if values.get("do_rescale", 1) else 1
    )
    expected = expected - float(values.get("offset", False))
    if values.get("do_normalize", True):
        expected = (expected - values["image_mean"]) / values["image_std"]
    mean, std = normalisation(values, IMAGENET)
    np.testing.assert_allclose((pixels / 255 - mean) / std, expected, rtol=1e-12, atol=1e-12)


def test_without_a_network_a_repository_has_the_files_of_its_cache(tmp_path, monkeypatch) -> None:
    """As transformers has it: what a snapshot lacks beside its config.json is not there."""
    snapshot = tmp_path / "models--me--net" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--net" / "refs").mkdir()
    (tmp_path / "models--me--net" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text('{"model_type": "videomae"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_preprocessor("me/net", clips=True) is None
    assert "nobody knows" in lack_of_preprocessor("me/net")
    absent = tmp_path / "models--me--net" / ".no_exist" / "abc" / "preprocessor_config.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert "nobody knows" not in lack_of_preprocessor("me/net")
    assert "nobody knows" not in lack_of_preprocessor(str(tmp_path))
    absent.unlink()
    (snapshot / "preprocessor_config.json").write_text(json.dumps(CLIP_FILE))
    assert read_preprocessor("me/net", clips=True) == CLIP_FILE
    with pytest.raises(UserError, match="cannot be fetched"):
        read_preprocessor("me/other", clips=False)
