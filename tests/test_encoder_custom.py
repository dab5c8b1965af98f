"""A user's own module on time series: which axis is time, which tokens count, and whole runs."""

import csv

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data_series import made, write_ts
from torch import Tensor, nn

from glovita import main
from glovita_lib.encoder import any_encoder
from glovita_lib.encoder_aggregation import aggregate
from glovita_lib.encoder_custom import SeriesModule, Steps
from glovita_lib.errors import UserError
from glovita_lib.extraction import choose_layers
from glovita_lib.spec_encoders import CustomEncoder

CONVOLUTIONS = {  # kernel, stride, padding
    "map": (3, 1, 1),
    "strided": (3, 2, 1),
    "valid": (5, 1, 0),
    "patch": (4, 4, 0),
    "wide": (7, 3, 0),
    "filled up": (4, 4, 0),
}
STEPS = {
    "map": Steps(1, 1),
    "strided": Steps(1, 2),
    "valid": Steps(5, 1),
    "patch": Steps(4, 4),
    "wide": Steps(7, 3),
    "filled up": Steps(1, 4),
}


class Net(nn.Module):
    """One convolution of series, whose map, tokens, or what else its kind says, it gives."""

    def __init__(self, channels: int, kind: str, as_tokens: bool) -> None:
        super().__init__()
        kernel, stride, padding = CONVOLUTIONS.get(kind, (3, 1, 1))
        self.conv = nn.Conv1d(channels, 6, kernel, stride, padding)
        self.kind, self.as_tokens = kind, as_tokens
        if kind == "cls":
            self.has_cls, self.first = True, nn.Parameter(torch.randn(1, 1, 6))
        if kind == "told":
            self.channels_last = as_tokens

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        assert mask.dtype == torch.bool and mask.shape == (len(x), x.shape[2])
        assert x.shape[1] == self.conv.in_channels and not x.transpose(1, 2)[~mask].any()
        if self.kind == "filled up":
            x = F.pad(x, (0, -x.shape[2] % 4))
        y = self.conv(x)  # (B, 6, N)
        if self.kind == "vector":
            return (y * mask[:, None]).sum(2) / mask.sum(1, keepdim=True)
        if self.kind in ("pooled", "told"):
            y = F.adaptive_avg_pool1d(y, 5)
        if self.kind == "enlarged":
            y = F.interpolate(self.conv(x[..., : x.shape[2] // 4 * 4 : 4]), scale_factor=4.0)
        if self.kind == "square":
            y = y[:, :1].transpose(1, 2) * y[:, :1]
        if self.kind == "cls":
            return torch.cat([self.first.expand(len(y), -1, -1), y.mT], 1)
        return y.mT if self.as_tokens else y


def net(*, input_channels: int, kind: str = "map", as_tokens: bool = False) -> nn.Module:
    return Net(input_channels, kind, as_tokens)


def without_mask(*, input_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(input_channels, 6, 3, padding=1), nn.ReLU())


def build(kind: str, length: int = 30, target: str = "net", **options) -> SeriesModule:
    torch.manual_seed(0)
    options = {"kind": kind, **options} if target == "net" else {}
    spec = CustomEncoder(target=f"test_encoder_custom:{target}", options=options)
    encoder = any_encoder(spec, channels=2, size=(length,), load_weights=False).eval()
    assert isinstance(encoder, SeriesModule)
    return encoder


def batch(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    """Series of these lengths, and their padded batch, with noise where nothing counts."""
    generator = torch.Generator().manual_seed(1)
    series = [torch.randn(2, n, generator=generator) for n in lengths]
    padded = torch.randn(len(series), 3, max(lengths), generator=generator)
    padded[:, 2] = 0
    for row, one in zip(padded, series, strict=True):
        row[:2, : one.shape[1]], row[2, : one.shape[1]] = one, 1
    return series, padded


@pytest.mark.parametrize("length", [30, 31, 64])
@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_the_axis_that_follows_the_length_is_time(kind: str, as_tokens: bool, length: int) -> None:
    """And each series has its own tokens in a batch, those that it has alone."""
    encoder = build(kind, length, as_tokens=as_tokens)
    assert (encoder.is_map, encoder.steps, encoder.width) == (not as_tokens, STEPS[kind], 6)
    lengths = [length, length - 1, 19, 18, 17, 8, 7]
    series, padded = batch(lengths)
    together = encoder(padded)
    assert together.grid == (together.tokens.shape[1],)
    for number, one in enumerate(series):
        alone = encoder(one[None])
        assert alone.mask is None
        assert together.mask[number].tolist() == [
            place < alone.tokens.shape[1] for place in range(together.tokens.shape[1])
        ]
        for method in ("avg", "sum", "pooled"):
            if lengths[number] % 4 == 0 or kind != "filled up":  # it fills up with zeros here
                torch.testing.assert_close(
                    aggregate(together, method)[number], aggregate(alone, method)[0]
                )


def test_the_number_of_channels_may_be_that_of_time_points() -> None:
    """As many tokens as the width: another length tells them apart."""
    encoder = build("map", 6)
    assert encoder.is_map and encoder.steps == Steps(1, 1)
    x = torch.randn(3, 2, 6)
    ones = torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(encoder(x).tokens, encoder.net(x, ones).mT)


@pytest.mark.parametrize("kind", ["patch", "filled up", "map"])
def test_a_token_counts_where_one_of_its_time_points_does(kind: str) -> None:
    encoder = build(kind, 32)
    mask = torch.rand(9, 32, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:, 31] = True
    x = torch.cat([torch.randn(9, 2, 32), mask[:, None].float()], 1)
    step = 1 if kind == "map" else 4
    expected = [[row[n : n + step].any().item() for n in range(0, 32, step)] for row in mask]
    assert encoder(x).mask.tolist() == expected


def test_class_tokens_stay_and_count() -> None:
    encoder = build("cls")
    series, padded = batch([30, 9])
    features = encoder(padded)
    assert (encoder.n_prefix, encoder.pooling, features.grid) == (1, "cls_token", (30,))
    assert features.mask.sum(1).tolist() == [31, 10]
    for number, one in enumerate(series):
        for method in ("cls_token", "avg", "mean_all", "pooled"):
            torch.testing.assert_close(
                aggregate(features, method)[number], aggregate(encoder(one[None]), method)[0]
            )


def test_vectors_stay_vectors() -> None:
    encoder = build("vector")
    series, padded = batch([30, 9])
    features = encoder(padded)
    assert features.tokens is None and features.mask is None
    torch.testing.assert_close(features.pooled[1], encoder(series[1][None]).pooled[0])


@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_module_says_what_lengths_do_not_tell(as_tokens: bool) -> None:
    encoder = build("told", as_tokens=as_tokens)
    assert encoder.is_map != as_tokens and encoder.width == 6
    _, padded = batch([30, 9])
    assert encoder(padded).mask is None  # five tokens of any length: all count
    with pytest.raises(UserError, match=r"gives \(B, \d, \d\) .* attribute channels_last, True"):
        build("pooled", as_tokens=as_tokens)


def test_outputs_that_are_neither_tokens_nor_a_map_are_one_line() -> None:
    with pytest.raises(UserError, match=r"gives \(B, 30, 30\) .* \(B, 15, 15\) for those of 15"):
        build("square")
    encoder = build("enlarged")
    x = torch.randn(2, 2, 30)
    assert encoder(x).tokens.shape == (2, 28, 6)
    with pytest.raises(UserError, match="one of every time point, or of every k"):
        encoder(torch.cat([x, torch.ones(2, 1, 30)], 1))


def test_a_module_without_a_mask_takes_series_of_one_length() -> None:
    encoder = build("", target="without_mask")
    x = torch.randn(2, 2, 25)
    torch.testing.assert_close(encoder(x).tokens, encoder.net(x).mT)
    _, padded = batch([30, 9])
    with pytest.raises(UserError, match=r"has no argument `mask`: write forward\(self, x, mask\)"):
        encoder(padded)


def test_layers_of_own_modules_are_refused() -> None:
    with pytest.raises(UserError, match="let it give that layer's output"):
        choose_layers(build("map"), (-1,), norm=False, input_shape=(1, 2, 30))


# ------------------------------------------------------------------------------- whole commands

SPEC = """
[data]
dataset = "generic_series_dataset"
train_file = "train.ts"
test_file = "test.ts"
[model.encoder]
encoder_type = "custom"
target = "test_encoder_custom:net"
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 1
[dataloading]
batch_size = 8
[logger]
backend = "none"
"""


def run(*overrides: str) -> int:
    return main(["spec.toml", "--override", "name=a", *overrides])


def predictions(path: str) -> list[float]:
    """Probabilities of the first class."""
    with open(path, newline="") as file:
        return [float(row["p_fast"]) for row in csv.DictReader(file)]


@pytest.mark.runs
def test_every_mode_with_an_own_module(tmp_path, monkeypatch, capsys) -> None:
    """Of series of different lengths, longer ones among the new."""
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 16, 0), ("test", 8, 1)):
        series, labels = made(count, seed, ragged=True, channels=2), ["fast", "slow"] * (count // 2)
        write_ts(tmp_path / f"{name}.ts", series, labels)
    new = [np.concatenate([one, one, one], 1) for one in made(4, 2, ragged=True, channels=2)]
    write_ts(tmp_path / "new.ts", new, ["fast", "slow"] * 2)
    (tmp_path / "spec.toml").write_text(SPEC)
    abmil = ["name=c", "model.head.head_type=abmil"]
    assert run(*abmil) == 0
    assert run(*abmil, "mode=infer", "infer.input=new.ts") == 0
    options = 'options={kind = "cls", as_tokens = true}'
    assert run(f"model.encoder.{options}") == 0
    found = []
    for size in (1, 8):
        batches = [f"dataloading.eval_batch_size={size}", f"infer.output_dir=new{size}"]
        assert run(f"model.encoder.{options}", "mode=infer", "infer.input=new.ts", *batches) == 0
        found.append(predictions(f"new{size}/predictions_new.csv"))
    np.testing.assert_allclose(*found, atol=1e-6)
    for keep, extra in ((False, 0), (True, 1)):
        tokens = ["mode=extract", "extract.output=tokens", "extract.split=test"]
        tokens += [f"extract.prefix_tokens={str(keep).lower()}", f"extract.output_dir=t{extra}"]
        assert run(f"model.encoder.{options}", *tokens) == 0
        (file,) = (tmp_path / f"t{extra}").glob("*.h5")
        lengths = [one.shape[1] for one in made(8, 1, ragged=True, channels=2)]
        with h5py.File(file) as written:
            assert np.diff(written["bag_ptr"]).tolist() == [n + extra for n in lengths]
            assert written["coords"][: lengths[0], 0].tolist() == list(
                range(-extra, lengths[0] - extra)
            )
    capsys.readouterr()
    assert run("model.encoder.target=test_encoder_custom:without_mask", "name=b") == 2
    assert "has no argument `mask`" in capsys.readouterr().err
