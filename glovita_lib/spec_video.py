"""Videos in a spec: how their files are read, which clips are drawn, what has a label."""

from collections.abc import Iterator
from typing import Annotated, Literal

from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_if, read_unless
from glovita_lib.spec_errors import Count, PathText, Positive

OF_FRAMES = read_if("label_level", "frame")
VIDEO_EXTS = (
    "mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "vob", "wmv", "asf", "flv", "3gp",
    "m1v", "gif", "swf", "ogv", "ts",
)  # fmt: skip
"""File suffixes of videos, also of those that can only be refused in words."""


class VideoReading(Spec):
    """How video files are read."""

    check: Literal["frames", "file"] = "frames"
    """What is looked at once of every file, before training: all of its frames, so that broken ones
    are found and frames are read at random only where that gives those of reading in order; or what
    its header says, and one file of each type for all. What was found is kept in index_file."""
    index_file: PathText | None = None
    """JSON file of what is known of every video; none: video_index.json below data_root_dir."""
    frame_rate: Positive = 25.0
    """Frames a second of folders of images (a folder that holds images is a video, its frames in
    the order of the numbers in their names), and of files that do not say it."""
    min_frames: Count = 1
    """Videos with fewer frames are broken."""


class ClipSampling(Spec):
    """Which frames of a video make a clip, and how many clips a video gives."""

    frames: Count = 16
    """Frames of a clip. Of a shorter video the last frame is repeated."""
    method: Literal["dense", "uniform"] = "dense"
    """Frames from a place of the video on, one every stride or at fps (dense); or one frame of each
    of as many equal parts of the whole video (uniform; Wang et al., TSN, ECCV 2016)."""
    stride: Annotated[Count, read_if("method", "dense")] = 1
    """Frames of the video from a frame of the clip to the next."""
    fps: Annotated[Positive | None, read_if("method", "dense")] = None
    """Frames a second of the clip, whatever the video has; instead of stride."""
    train: Literal["random", "middle"] = "random"
    """Where training takes them: drawn anew in every epoch (the place of a dense clip, the frame of
    each part of a uniform one), or in the middle."""
    train_clips: Count = 1
    """Clips that an epoch takes of every video."""
    clips: Count = 1
    """Clips of a video in evaluation, inference and extraction: evenly from its start to its end;
    one is in the middle."""
    combine: Annotated[Literal["logits", "probabilities", "bag"], read_unless("clips", 1)] = (
        "logits"
    )
    """What becomes of the clips of a video: the mean of their logits, or of their probabilities
    (outputs of a regression); or one long input, of which model.encoder.lift = "windows" makes a
    bag of clips for a head that takes bags, also in training. Vectors are averaged."""
    chunk: Annotated[Count, read_unless("clips", 1)] = 8
    """Clips that pass the model at once; dataloading.eval_batch_size counts videos."""

    @property
    def is_bag(self) -> bool:
        """Whether the clips of a video are one input."""
        return self.clips > 1 and self.combine == "bag"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Stride and fps say the same thing."""
        if self.fps is not None and self.stride != 1:
            yield "fps", f"{self.fps:g}, but stride = {self.stride} says it too: drop one of them"

    def frame_problems(self) -> Iterator[tuple[str, str]]:
        """What labels of frames leave unread: evaluation sees every frame once."""
        if self.method != "dense":
            yield "method", '"uniform" leaves frames out, and labels are those of frames: drop it'
        if self.clips != 1:
            yield "clips", f"{self.clips}, but with labels of frames clips cover a video: drop it"


class FrameLabels(Spec):
    """Whether labels are those of videos or of frames, and where the latter stand."""

    label_level: Literal["video", "frame"] = "video"
    """What has a label: a video, or each of its frames."""
    labels_file: Annotated[PathText, OF_FRAMES] = "frames.csv"
    """Labels of frames below data_root_dir: a CSV file with a row a frame or a segment; or a folder
    with a file a video, named as the video but for its suffix: an array (npy), a label a line, or a
    table (csv, txt) with data.label_column and, where not all frames have a label, frame_column."""
    frame_column: Annotated[str, OF_FRAMES] = "frame"
    """CSV column of the frame's number, from 0, of a table with a row a frame."""
    start_column: Annotated[str, OF_FRAMES] = "start"
    """CSV column of the first frame of a segment, of a table with a row a segment."""
    end_column: Annotated[str, OF_FRAMES] = "end"
    """CSV column of the end of a segment, the first frame behind it."""
    unit: Annotated[Literal["frames", "seconds"], OF_FRAMES] = "frames"
    """What start and end count."""
    unlabelled: Annotated[tuple[str, ...], OF_FRAMES] = ("", "-1", "-100")
    """Labels of frames that count for nothing, as frames without one do."""


class ResolvedClips(Spec):
    """What sampling of clips a run uses, complete; saved with its checkpoints."""

    frames: int
    """Frames of a clip."""
    method: str
    """dense or uniform."""
    stride: int
    """Frames of the video from a frame of the clip to the next."""
    fps: float | None
    """Frames a second of the clip, instead."""
    train: str
    """Where training takes frames: random or middle."""
    train_clips: int
    """Clips that an epoch takes of every video."""
    clips: int
    """Clips of a video in evaluation."""
    combine: str
    """What becomes of them: logits, probabilities or bag."""
    chunk: int
    """Clips that pass the model at once."""
