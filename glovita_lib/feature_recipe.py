"""What a feature file is: its name, and the attributes that say how it was made.

Attributes of the recipe determine the content; a file with others is another file. Notes tell more.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from glovita_lib import __version__
from glovita_lib.extraction import Extractor
from glovita_lib.feature_tables import Plan
from glovita_lib.rundir import versions
from glovita_lib.samples import Data, Split
from glovita_lib.spec import UserError
from glovita_lib.spec_features import Extract
from glovita_lib.spec_root import Root


def file_name(root: Root, extractor: Extractor, split: str) -> str:
    """Name of the feature file.

    Raises:
        UserError: a placeholder that does not exist.
    """
    spec, augmentation = root.extract, extractor.experiment.facts.augmentation
    pattern = spec.output_filename
    if pattern is None:
        kind = "agg_{method}" if spec.output == "embedding" else spec.output
        pattern = kind + "_{model}_{dataset}_{split}_size{imgsize}_float{precision}.h5"
    known = {
        "method": extractor.method,
        "model": extractor.model.encoder.name.replace("/", "_"),
        "dataset": msgspec.to_builtins(root.data)["dataset"],
        "split": split,
        "imgsize": augmentation.image_size,
        "precision": spec.precision,
        "checkpoint": checkpoint_name(spec),
    }
    try:
        return pattern.format(**known)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f'extract.output_filename = "{pattern}": unknown placeholder {error}; there are'
            f" {', '.join('{' + name + '}' for name in known)}"
        ) from None


def checkpoint_name(spec: Extract) -> str:
    """What the placeholder checkpoint stands for."""
    if spec.checkpoint is not None:
        return Path(spec.checkpoint).stem
    return spec.use if spec.source == "run" else "encoder"


def recipe_of_features(
    root: Root, extractor: Extractor, data: Data, name: str, split: Split
) -> dict[str, Any]:
    """What determines the features of the samples."""
    experiment = extractor.experiment
    return {
        "dataset": data.name,
        "split": name,
        **extractor.attributes(),
        "encoder_spec": json.dumps(msgspec.to_builtins(experiment.root.model.encoder)),
        "peft_spec": json.dumps(msgspec.to_builtins(experiment.root.peft)),
        "weights_sha256": extractor.weights_sha256,
        "transform": json.dumps(msgspec.to_builtins(experiment.facts.augmentation)),
        "ids_sha256": sha256("\n".join(split.ids).encode()),
        "bag_by": root.extract.bag_by or "none",
    }


def policy_of(root: Root, plan: Plan, *, augmented: bool, batch_size: int) -> dict[str, Any]:
    """Test policy, or train policy with what its random draws follow from."""
    if not augmented:
        return {"policy": "test"}
    return {"policy": "train", "seed": root.seed, "draws": f"{plan.block} / {batch_size}"}


def recipe_of_tables(root: Root, data: Data, split: Split) -> dict[str, Any]:
    """What determines the rest: a corrected label makes another file of the same features.

    Raises:
        UserError: coords_file cannot be read.
    """
    spec, targets = root.extract, split.targets
    labels = b"" if targets is None else np.ascontiguousarray(targets).tobytes()
    try:
        coords = b"" if spec.coords_file is None else Path(spec.coords_file).read_bytes()
    except OSError as error:
        raise UserError(f"extract.coords_file {spec.coords_file}: {error.strerror}") from None
    return {
        "subtask": data.subtask,
        "class_names": list(data.class_names),
        "labels_sha256": sha256("\n".join(split.groups or ()).encode() + b"\n" + labels),
        "coords_sha256": sha256(coords) if coords else "none",
        "compression": spec.compression,
    }


def sha256(content: bytes) -> str:
    """A hash as text."""
    return hashlib.sha256(content).hexdigest()


def notes_of(root: Root, extractor: Extractor) -> dict[str, str]:
    """Where the features come from."""
    found, spec = versions(), msgspec.to_builtins(extractor.experiment.root)
    asked = {section: spec[section] for section in ("seed", "data", "model", "peft")}
    return {
        "weights": weights_text(root, extractor.experiment.checkpoint),
        "spec": json.dumps(asked),
        "glovita": __version__,
        **{package: str(found[package]) for package in ("torch", "torchvision", "timm")},
    }


def weights_text(root: Root, checkpoint: Path | None) -> str:
    """Where the weights come from, in words."""
    encoder = msgspec.to_builtins(root.model.encoder)
    if checkpoint is not None:
        return f"checkpoint {checkpoint}"
    if encoder.get("weights"):
        return f"file {encoder['weights']}"
    return "published" if encoder.get("pretrained") else f"random, seed {root.seed}"
