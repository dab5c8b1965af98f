"""A file is the previous one or the new one, whatever happens in between."""

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glovita_lib import files
from glovita_lib.errors import UserError
from glovita_lib.read_dicom import DAMAGED, dicom_headers, image_kind
from glovita_lib.read_image import read_header, read_image


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    files.write_json(path, {"old": 1})
    return path


def test_names_of_what_is_given_as_a_folder_or_a_file(tmp_path, monkeypatch):
    inside = tmp_path / "site.1" / "day 2"
    inside.mkdir(parents=True)
    (inside / "list.csv").touch()
    monkeypatch.chdir(inside)
    names = {".": "day 2", "./": "day 2", "..": "site.1", "../day 2/": "day 2", "../": "site.1"}
    for path in (*names, f"{inside}/..", f"{inside}/"):
        name = names.get(path, "site.1" if path.endswith("..") else "day 2")
        assert files.name_of(path) == files.stem_of(Path(path)) == name
    assert files.name_of("list.csv") == "list.csv" and files.stem_of("./list.csv") == "list"
    assert files.stem_of("/")


def unchanged(file: Path) -> bool:
    return files.read_json(file) == {"old": 1} and os.listdir(file.parent) == [file.name]


def test_a_writer_that_fails_leaves_the_previous_file(file: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.atomic_write(file) as handle:
        handle.write(b"half")
        handle.flush()
        assert len(os.listdir(file.parent)) == 2
        raise ZeroDivisionError
    assert unchanged(file)


def test_full_disk(file: Path) -> None:
    """The real thing: the system refuses to write more than 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*config.json: File too large"):
            files.write_text(file, "x" * 5000)
        with pytest.raises(UserError, match=r"^cannot write .*metrics.jsonl: File too large"):
            files.append_jsonl(file.with_name("metrics.jsonl"), {"x": "y" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.with_name("metrics.jsonl").unlink()
    assert unchanged(file)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_every_step_that_can_fail(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=os.strerror(code)) as caught:
        files.write_json(file, {"new": 2})
    assert "\n" not in str(caught.value)
    assert unchanged(file)


def test_read_only_folder(file: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    file.parent.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied; set exp_dir"):
            files.write_json(file, {"new": 2})
    finally:
        file.parent.chmod(0o700)
    assert unchanged(file)


def test_a_folder_that_is_a_file(file: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        files.write_text(file / "below", "x")
    (file.parent / "folder").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        files.write_text(file.parent / "folder", "x")


def test_errors_of_the_block_itself_are_not_blamed_on_the_disk(file: Path) -> None:
    with pytest.raises(FileNotFoundError), files.atomic_path(file):
        open(file.parent / "no such sample")  # noqa: SIM115
    assert unchanged(file)


KILLED = """
import sys
from pathlib import Path
from glovita_lib import files
from glovita_lib.read_dicom import DAMAGED, dicom_headers, image_kind
from glovita_lib.read_image import read_header, read_image
print("ready", flush=True)
for i in range(1_000_000):
    files.write_text(Path(sys.argv[1]), str(i % 10) * 200_000)
    files.append_jsonl(Path(sys.argv[2]), {"step": i, "text": "x" * 5000})
"""


@pytest.mark.processes
def test_kill_at_any_moment(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole.txt", tmp_path / "lines.jsonl"
    for attempt in range(5):
        command = [sys.executable, "-c", KILLED, str(whole), str(lines)]
        root = str(Path(files.__file__).parents[1])
        with subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(0.05 + 0.013 * attempt)
            process.send_signal(signal.SIGKILL)
        text = whole.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1
        assert files.read_jsonl(lines)
        files.remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["lines.jsonl", "whole.txt"]


def test_json_of_numbers(tmp_path: Path) -> None:
    value = {
        "z": np.float32(0.5),
        "a": float("nan"),
        "inf": np.float64("inf"),
        "array": np.array([[1, 2]], dtype=np.int64),
        "tuple": (np.bool_(True), None, "é"),
        "path": tmp_path,
        3: [np.nan],
    }
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "z": 0.5,
        "a": None,
        "inf": None,
        "array": [[1, 2]],
        "tuple": [True, None, "é"],
        "path": str(tmp_path),
        "3": [None],
    }
    assert list(json.loads(text))[:2] == ["z", "a"]
    assert "é" in text


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "[" * 100_000])
def test_read_json_wants_an_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="cannot read .*x.json: ") as got:
        files.read_json(tmp_path / "x.json")
    assert "\n" not in str(got.value) and len(str(got.value)) < 1000


def test_read_json_names_what_lacks(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert files.read_json(tmp_path / "x.json", "a") == {"a": 1}
    with pytest.raises(UserError, match=r"cannot read .*x.json: it lacks b, c;"):
        files.read_json(tmp_path / "x.json", "a", "b", "c")


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.json: No such file"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json: not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_csv_reads_back_equal(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=50)
    singles = numbers.astype(np.float32)
    rows = zip(['a,"b"', "line\nend", *map(str, range(48))], numbers, singles, strict=True)
    files.write_csv(tmp_path / "x.csv", ("id", "p", "q"), rows)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["id"] for row in read[:2]] == ['a,"b"', "line\nend"]
    assert np.array_equal(np.array([float(row["p"]) for row in read]), numbers)
    assert np.array_equal(np.array([row["q"] for row in read], dtype=np.float32), singles)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert files.read_jsonl(path) == []
    for step in range(4):
        files.append_jsonl(path, {"step": step, "loss": float("nan")})
    whole = path.read_bytes()
    assert files.read_jsonl(path)[3] == {"step": 3, "loss": None}

    path.write_bytes(whole + b'{"step": 4, "lo')  # killed in the middle of a line
    assert [record["step"] for record in files.read_jsonl(path)] == [0, 1, 2, 3]
    files.append_jsonl(path, {"step": 4, "loss": None})
    assert [record["step"] for record in files.read_jsonl(path)] == [0, 1, 2, 3, 4]

    before = path.stat().st_ino
    files.truncate_jsonl(path, lambda record: record["step"] <= 4)
    assert path.stat().st_ino == before
    files.truncate_jsonl(path, lambda record: record["step"] <= 3)
    assert path.read_bytes() == whole
    path.write_bytes(b'{"step": 4, "lo')
    files.append_jsonl(path, {"step": 5})
    assert path.read_bytes() == b'{"step": 5}\n'

    path.write_bytes(b"no\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        files.read_jsonl(path)


def test_a_separator_inside_quotes_counts_for_nothing(tmp_path: Path) -> None:
    """Of other columns too, which are not asked for."""
    path = tmp_path / "t.csv"
    path.write_text('"a;b;c","id"\n1,2\n')
    assert files.read_csv(path, ["id"]) == [{"a;b;c": "1", "id": "2"}]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_ends_alone(tmp_path: Path, end: str) -> None:
    """Not at the others of `str.splitlines`, which names may hold."""
    path, names = tmp_path / "t.txt", ["a\x85b", "c\u2028d", "", "e\x1cf\u2029", " g"]
    path.write_bytes((end.join(names) + end).encode())
    assert files.lines_of(path) == names
    path.write_bytes(end.join(names).encode())
    assert files.lines_of(path) == names


def test_what_a_killed_process_left_goes_and_that_of_a_running_one_stays(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    left = [f".tmp-{child.pid}-{name}" for name in ("predictions_test.csv", "map_test.png")]
    others = [f".tmp-{child.pid}-predictions_val.csv", f".tmp-{os.getpid()}-predictions_test.csv"]
    others += ["predictions_test.csv", f".tmp-{child.pid}-predictions_my-testing.csv"]
    for name in (*left, *others):
        (tmp_path / name).write_text("half")
    files.remove_killed(tmp_path / "test")
    assert sorted(os.listdir(tmp_path)) == sorted(others)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_are_no_files_of_samples(tmp_path):
    """Nobody may ever write into them."""
    pipe = tmp_path / "1.png"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a file"):
        read_header(str(pipe), max_megapixels=1)
    with pytest.raises(UserError, match="not a file"):
        read_image(str(pipe), channels=3, bit_depth=8, max_megapixels=1)
    pipe.rename(tmp_path / "1.dcm")
    assert image_kind(str(tmp_path / "1.dcm"), []) == DAMAGED
    with pytest.raises(UserError, match="not a file"):
        dicom_headers(str(tmp_path), None)
