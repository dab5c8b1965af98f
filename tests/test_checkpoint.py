"""Checkpoints: equal bytes for equal states, strict reloads, one line for every broken file."""

import errno
import os
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from glovita_lib import checkpoint
from glovita_lib.errors import UserError


def state() -> dict[str, Any]:
    """Tensors and optimizer state, reached through training."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)], nn.BatchNorm1d(6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.arange(24.0).view(4, 6).sin() + step).square().sum().backward()
        optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": {"best": None, "sums": {"loss": torch.tensor(0.5, dtype=torch.float64)}},
        "spec": {"name": "model", "betas": (0.9, 0.999), "names": ["a", "model", "Ä"]},
        "class_names": ["a", "b"],
    }


@pytest.mark.processes
def test_same_bytes_from_another_process_name_and_time(tmp_path: Path) -> None:
    """The other process reads the state: its own training may round otherwise (MKL's results
    depend on where in memory its operands lie)."""
    checkpoint.save(tmp_path / "last.pt", state())
    other = tmp_path / "another folder"
    script = (
        "import sys; from pathlib import Path; from test_checkpoint import checkpoint;"
        "checkpoint.save(Path(sys.argv[2]) / 'epoch_0007.pt', checkpoint.load(sys.argv[1], 'cpu'))"
    )
    roots = Path(checkpoint.__file__).parents[1], Path(__file__).parent
    env = os.environ | {
        "PYTHONHASHSEED": "5",
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
    }
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "last.pt"), str(other)],
        env=env,
        check=True,
    )
    first = (tmp_path / "last.pt").read_bytes()
    assert first == (other / "epoch_0007.pt").read_bytes()


def test_a_loaded_state_saves_as_the_same_bytes(tmp_path: Path) -> None:
    """What a resumed run writes is what the uninterrupted one writes."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    before = path.read_bytes()
    checkpoint.save(path, checkpoint.load(path, map_location="cpu"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = state()
    checkpoint.save(tmp_path / "last.pt", saved)
    loaded = checkpoint.load(str(tmp_path / "last.pt"), map_location="cpu")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded["model"][k], v) for k, v in saved["model"].items())
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert loaded["spec"] == saved["spec"]
    assert loaded["state"]["best"] is None
    assert loaded["state"]["sums"]["loss"].dtype == torch.float64


def test_bytes_depend_on_values_alone(tmp_path: Path) -> None:
    """Not on shared memory, strides, the type of dict or which strings are one object."""
    base = torch.arange(12.0)
    word = "word"
    one = {"a": base.view(3, 4), "b": base[:4], "s": [word, word], "w": base.view(1, 12)}
    two = {
        "a": base.view(3, 4).t().contiguous().t(),
        "b": base[:4].clone().requires_grad_(),
        "s": [word, "".join(["wo", "rd"])],
        "w": base.view(12, 1).t(),
    }
    checkpoint.save(tmp_path / "one.pt", one)
    checkpoint.save(tmp_path / "two.pt", OrderedDict(two))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    big = torch.zeros(1_000_000)
    checkpoint.save(tmp_path / "slice.pt", {"x": big[:2]})
    assert (tmp_path / "slice.pt").stat().st_size < 5000


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"a": {"b": [0, np.zeros(2)]}}, r"a\.b\[1\] is a ndarray"),
        ({"a": Path("x")}, "a is a"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": torch.float32}, "a is a dtype"),
        ({"a": {(1, 2): 3}}, "a has an entry named by a tuple"),
    ],
)
def test_other_types_are_refused_by_key(tmp_path: Path, value: dict, key: str) -> None:
    with pytest.raises(TypeError, match=key):
        checkpoint.save(tmp_path / "x.pt", value)
    assert not os.listdir(tmp_path)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"x": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="last.pt: File too large"):
            checkpoint.save(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.equal(checkpoint.load(path, "cpu")["x"], torch.zeros(10))


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_read_only_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"x": 1})

    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=os.strerror(code)):
        checkpoint.save(path, {"x": 2})
    with pytest.raises(UserError, match=os.strerror(code)):
        checkpoint.link(path, tmp_path / "best.pt")
    assert os.listdir(tmp_path) == ["last.pt"]
    assert checkpoint.load(path, "cpu") == {"x": 1}


@pytest.mark.parametrize("links", [True, False])
def test_link_keeps_what_was_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    if not links:  # exFAT, some network disks

        def refuse(*args: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(last, {"x": 1})
    for _ in range(2):  # the second time, best.pt is that file already
        checkpoint.link(last, best)
        assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]
    checkpoint.save(last, {"x": 2})
    assert checkpoint.load(best, "cpu") == {"x": 1}
    checkpoint.link(last, best)
    assert checkpoint.load(best, "cpu") == {"x": 2}


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"x": torch.arange(1000), "y": "z"})
    content = path.read_bytes()
    for size in (0, 1, 30, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"last\.pt") as caught:
            checkpoint.load(path, "cpu")
        assert "\n" not in str(caught.value), size
    assert "truncated or damaged" in str(caught.value)


def test_damaged_directory(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:60] + bytes(100) + content[160:middle])
    with pytest.raises(UserError, match="truncated or damaged"):
        checkpoint.load(path, "cpu")
    path.write_bytes(content[:100] + b"\xff" * 50 + content[150:])
    with pytest.raises(UserError, match="is"):
        checkpoint.load(path, "cpu")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: train the spec first"):
        checkpoint.load(tmp_path / "runs" / "best.pt", "cpu")
    checkpoint.save(tmp_path / "checkpoints" / "best.pt", {})
    with pytest.raises(UserError, match=r"is a folder: give one of .*checkpoints/best\.pt"):
        checkpoint.load(tmp_path, "cpu")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"model\.encoder\.weights"):
        checkpoint.load(tmp_path / "weights.pth", "cpu")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="other things than tensors"):
        checkpoint.load(tmp_path / "module.pt", "cpu")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    with pytest.raises(UserError, match="another format"):
        checkpoint.load(tmp_path / "text.pt", "cpu")
    torch.save({checkpoint.MARK: 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="newer version"):
        checkpoint.load(tmp_path / "new.pt", "cpu")


def test_another_architecture_is_one_line() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    saved = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)).state_dict()
    del saved["0.bias"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(model, saved, "best.pt")
    text = str(caught.value)
    assert "best.pt" in text
    assert "1 missing (0.bias)" in text
    assert "2 unexpected (2.weight, 2.bias)" in text
    assert "2 of another shape (1.weight (2, 3) instead of (5, 3), 1.bias" in text
    assert "\n" not in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    fitting = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).state_dict()
    checkpoint.load_model(model, fitting, "best.pt")
    assert all(torch.equal(fitting[key], value) for key, value in model.state_dict().items())
