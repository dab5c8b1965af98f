"""The root of a spec: all sections of one experiment."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta

from glovita_lib.spec import Loaded, Spec
from glovita_lib.spec_data import Data, DigitsData
from glovita_lib.spec_errors import PathText, names_a_folder, shown
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import FullFinetuning, Peft
from glovita_lib.spec_train import (
    Dataloading,
    Extract,
    Infer,
    Logger,
    Optimizer,
    Supervised,
    Task,
    Training,
    Umap,
    WandbLogger,
)


class Root(Spec):
    """One experiment."""

    mode: Literal["train", "infer", "extract", "umap"] = "train"
    """What the command does: train, evaluate the run that this spec trained, write features, or
    draw a map of features."""
    name: str | None = None
    """Group directory of the run; none is the spec's file name and the overrides that change the
    experiment."""
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    """Seed of initial weights, sample order, augmentation and random splits."""
    exp_dir: PathText = "experiments"
    """Folder of all runs."""
    extends: PathText | None = None
    """Spec file that this one changes, relative to this file."""
    data: Data = DigitsData()
    """Samples, labels and splits."""
    model: ModelSpec = ModelSpec()
    """Encoder, aggregation and head."""
    peft: Peft = FullFinetuning()
    """Which parameters train."""
    task: Task = Supervised()
    """What is learnt and how it is measured."""
    training: Training = Training()
    """The loop."""
    dataloading: Dataloading = Dataloading()
    """How batches are made."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and schedule."""
    logger: Logger = WandbLogger()
    """Where metrics are sent beside metrics.jsonl."""
    add_log: dict[str, Any] = {}
    """Free notes that are saved and logged and change nothing."""
    infer: Infer = Infer()
    """What mode infer evaluates."""
    extract: Extract = Extract()
    """What mode extract writes."""
    umap: Umap = Umap()
    """What mode umap draws."""

    @property
    def predicts_numbers(self) -> bool:
        """Whether it is a regression; where the data section does not say, the head does."""
        subtask = self.data.stated_subtask()
        if subtask is None:
            return self.model.head.only_predicts(named=False) == "numbers"
        return subtask == "regression"

    @property
    def trains_encoder(self) -> bool:
        """Whether there is an encoder of which something trains."""
        return self.peft.trains != "head" and self.data.samples != "features"

    @property
    def maps_features(self) -> bool:
        """Whether mode umap draws features of files, not those of a model."""
        return self.umap.input is not None or self.data.samples == "features"

    def problems(self) -> Iterator[tuple[str, str]]:
        """The name becomes a directory."""
        name = self.name
        if name is not None and not names_a_folder(name):
            yield (
                "name",
                f"{shown(name)} cannot name a directory: use letters, digits and . , = + - _",
            )

    @property
    def handler(self) -> str:
        """Module whose function `run` does what the mode says."""
        return self.task.learnt_by if self.mode == "train" else f"run_{self.mode}"


def head_is_named(loaded: Loaded[Root]) -> bool:
    """Whether a file or an override names the head, so that it is not the default, by which nobody
    has said anything."""
    return ("model", "head", "head_type") in loaded.origins
