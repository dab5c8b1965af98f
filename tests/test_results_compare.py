"""--compare: the table says what the run directories say; what is missing is told at once."""

import json
import shutil

import pytest
from small_runs import TINY

from glovita import main
from glovita_lib.rundir import locate
from glovita_lib.spec_check import load_checked

SPECS = {
    "full": "",
    "probe": '[peft]\nmethod = "linear_probing"\n',
    "lora": '[peft]\nmethod = "lora"\nrank = 2\n',
}


def write_specs(folder):
    """Spec files whose runs lie in the folder runs beside them."""
    paths = {}
    for name, peft in SPECS.items():
        paths[name] = folder / f"{name}.toml"
        text = TINY.replace("bootstrap = 0", "bootstrap = 20")
        paths[name].write_text(f'exp_dir = "{folder / "runs"}"\n{text}{peft}')
    return paths


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with the finished runs of all specs."""
    folder = tmp_path_factory.mktemp("once")
    for path in write_specs(folder).values():
        assert main([str(path)]) == 0
    return folder


@pytest.fixture
def specs(tmp_path):
    """Specs without runs."""
    return write_specs(tmp_path)


@pytest.fixture
def trained(once, specs, tmp_path):
    """Specs with finished runs, a copy for every test."""
    shutil.copytree(once / "runs", tmp_path / "runs")
    return specs


def run_of(path):
    """The run directory of a spec."""
    return locate(load_checked(str(path))).path


def edit(path, change):
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def compared(capsys, *paths, code=0, overrides=()):
    """Rows of the table as dicts, and the lines below it; the lines of the error for code 2."""
    capsys.readouterr()
    more = ["--override", *overrides] if overrides else []
    assert main([*map(str, paths), "--compare", *more]) == code
    out, err = capsys.readouterr()
    if code:
        assert out == ""
        return err.splitlines()
    lines = out.splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert len({len(line) for line in lines if line[:1] == "|"}) == 1  # aligned
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return rows, [line for line in lines if line and line[0] != "|"]


def test_the_table_says_what_the_runs_say(trained, capsys):
    rows, notes = compared(capsys, *trained.values())
    assert {row["spec"] for row in rows} == set(SPECS)
    values = [float(row["test acc"]) for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows:
        run = run_of(trained[row["spec"]])
        report = json.loads((run / "metrics_test.json").read_text())
        assert row["test acc"] == f"{report['metrics']['acc']:.4f}"
        assert row["95 % interval"] == "{:.4f} to {:.4f}".format(*report["ci95"]["acc"])
        table = json.loads((run / "resolved_config.json").read_text())["parameters"]["all"]
        assert int(row["trainable"].replace(",", "")) == table["trainable"]
        assert row["share"] == f"{100 * table['trainable'] / table['total']:.2f}%"
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        epochs = [record for record in lines if record["event"] == "epoch"]
        speeds = [record["samples_per_s"] for record in epochs]
        assert 32000 / max(speeds) - 0.1 <= float(row["ms/step"]) <= 32000 / min(speeds) + 0.1
        memory = max(record["memory_mb"] for record in epochs)
        assert row["MiB"] == f"{memory:,.0f}"
        assert row["best epoch"] == str(epochs[-1]["best_epoch"] + 1)
        assert "device" not in row
    shares = {row["spec"]: float(row["share"].rstrip("%")) for row in rows}
    assert shares["full"] == 100 and shares["probe"] < shares["lora"] < 100
    (note,) = notes
    assert "cpu with" in note and "evaluation left out" in note


def test_one_run_and_overrides(trained, capsys):
    rows, _ = compared(capsys, trained["lora"])
    assert len(rows) == 1
    lines = compared(capsys, trained["lora"], overrides=["seed=1"], code=2)
    assert len(lines) == 1 and "seed=1" in lines[0] and "does not exist" in lines[0]


def test_missing_runs_are_listed_together(specs, capsys):
    assert main([str(specs["probe"])]) == 0
    (run_of(specs["lora"]) / "checkpoints").mkdir(parents=True)
    (run_of(specs["lora"]) / "checkpoints" / "last.pt").touch()
    lines = compared(capsys, *specs.values(), code=2)
    assert len(lines) == 2
    assert lines[0].startswith(f"{specs['full']}: ") and "does not exist" in lines[0]
    assert lines[1].startswith(f"{specs['lora']}: ") and "is not finished" in lines[1]
    assert all("train it first" in line for line in lines)


def test_best_first_also_where_less_is_better(trained, capsys):
    def errors(content, value):
        content["metrics"] = {"mae": value}
        content["ci95"] = {"mae": [None, None]}

    for name, value in zip(SPECS, (0.5, None, 0.25), strict=True):
        file = run_of(trained[name]) / "metrics_test.json"
        edit(file, lambda content, value=value: errors(content, value))
    rows, _ = compared(capsys, *trained.values())
    assert [row["spec"] for row in rows] == ["lora", "full", "probe"]
    assert rows[-1]["test mae"] == "undefined" and rows[0]["95 % interval"] == ""


def test_val_counts_without_test_and_is_not_mixed_with_it(trained, capsys):
    (run_of(trained["lora"]) / "metrics_test.json").unlink()
    rows, _ = compared(capsys, trained["lora"])
    assert "val acc" in rows[0]
    (line,) = compared(capsys, *trained.values(), code=2)
    assert "test acc, val acc" in line
    (run_of(trained["lora"]) / "metrics_val.json").unlink()
    (line,) = compared(capsys, trained["lora"], code=2)
    assert "neither a test nor a val split" in line


def test_a_spec_that_has_changed_since_is_told(trained, capsys):
    trained["lora"].write_text(trained["lora"].read_text().replace("rank = 2", "rank = 3"))
    (line,) = compared(capsys, *trained.values(), code=2)
    assert "peft.rank: 2 -> 3" in line and str(trained["lora"]) in line


def test_other_devices_and_samples_are_told(trained, capsys):
    edit(run_of(trained["full"]) / "runtime_info.json", lambda c: c.update(device="NVIDIA H200"))
    edit(run_of(trained["full"]) / "metrics_test.json", lambda c: c.update(n=100))
    rows, notes = compared(capsys, *trained.values())
    devices = {row["spec"]: row["device"] for row in rows}
    assert devices["full"] == "NVIDIA H200" and devices["lora"].startswith("cpu with ")
    assert "different samples: 100, 359" in notes[1]


def test_files_of_one_name_are_told_apart(trained, tmp_path, capsys):
    other = tmp_path / "deeper" / "lora.toml"
    other.parent.mkdir()
    other.write_text(trained["lora"].read_text())
    rows, _ = compared(capsys, trained["lora"], other, trained["probe"])
    assert {row["spec"] for row in rows} == {str(trained["lora"]), str(other), "probe"}


def test_a_probe_of_features_is_no_training(specs, capsys):
    run = run_of(specs["full"])
    run.mkdir(parents=True)
    (run / "runtime_info.json").write_text('{"finished": "now"}')
    plain = load_checked(str(specs["full"])).plain
    (run / "config.json").write_text(json.dumps(plain))
    (line,) = compared(capsys, specs["full"], code=2)
    assert "objective probe" in line
