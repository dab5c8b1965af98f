"""Time series on their way to an encoder: what a run derives of them, and their augmentation.

A run on other samples does not load this module.
"""

from msgspec.structs import asdict

from glovita_lib.augment_series import SeriesAugmenter, resolve_series_augmentation
from glovita_lib.data import Data, SeriesSamples
from glovita_lib.data_series import SeriesSource
from glovita_lib.errors import UserError
from glovita_lib.objectives import build_inputs
from glovita_lib.resolved import SeriesInputs, resolve_inputs
from glovita_lib.spec_root import Root
from glovita_lib.spec_series import SeriesAugmentation


@resolve_inputs.register
def _(samples: SeriesSamples, root: Root, data: Data) -> SeriesInputs:
    section, policies = getattr(root.data, "augmentation", None), root.data.default_policies
    if not isinstance(section, SeriesAugmentation):  # a data set of the user's own
        section, policies = SeriesAugmentation(), ("default_series_1", "shared_default_series")
    longest = max(longest_of(data, name) for name in data.splits)
    augmentation = resolve_series_augmentation(section, default_policies=policies, length=longest)
    return SeriesInputs(**asdict(samples), augmentation=augmentation)


def longest_of(data: Data, name: str) -> int:
    """Time points of the longest series of a split.

    Raises:
        UserError: a source of the user's own that does not tell.
    """
    source = data.splits[name].source
    if source.uniform is not None:
        return source.uniform[-1]
    if isinstance(source, SeriesSource):
        return max((one.values.shape[1] for one in source.series), default=1)
    if source.sizes is None:
        raise UserError(
            f"data set {data.name}: its source must tell `sizes` (N, 1), the time points of its"
            " series, where they differ"
        )
    return int(source.sizes.max())


@build_inputs.register
def _(inputs: SeriesInputs, *, train: bool) -> SeriesAugmenter:
    masked = inputs.preparation is not None and inputs.preparation.mask_channels
    masks = inputs.channels // 2 if masked else 0
    return SeriesAugmenter(inputs.augmentation, inputs.channels, train=train, masks=masks)
