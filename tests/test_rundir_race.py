"""Two processes on one run directory at the same time, with data that take long to read."""

import json
import os
from pathlib import Path

import pytest
from children import Child
from small_runs import FOLDERS, TINY, snapshot

# A command whose data come when the file argv[1] is there.
SLOW = """
import sys, time
from pathlib import Path
import glovita
from glovita_lib import run_probe, run_train

def slowed(read):
    def wait(*arguments, **asked):
        print("reading", flush=True)
        while not Path(sys.argv[1]).exists():
            time.sleep(0.01)
        return read(*arguments, **asked)
    return wait

run_train.read_data, run_probe.read = slowed(run_train.read_data), slowed(run_probe.read)
sys.exit(glovita.main(sys.argv[2:]))
"""

pytestmark = pytest.mark.processes


class Race:
    """Commands on runs below a folder."""

    def __init__(self, folder: Path, spec: str) -> None:
        self.folder, self.gate = folder, folder / "gate"
        self.spec = folder / "tiny.toml"
        self.spec.write_text(spec)

    def start(self, *overrides: str, gate: Path | None = None) -> Child:
        """A process that waits for its data."""
        fixed = [f"exp_dir={self.folder / 'runs'}", "logger.backend=none"]
        return Child(SLOW, [gate or self.gate, self.spec, "--override", *fixed, *overrides])

    def run(self, *overrides: str) -> tuple[int, str]:
        """Exit code and output of a process that need not wait for its data."""
        done = self.start(*overrides, gate=self.folder).wait()
        return done.code, done.out

    def info(self, name: str = "tiny") -> dict:
        """What a run says about its processes."""
        (path,) = (self.folder / "runs").glob(f"*/{name}/0/runtime_info.json")
        return json.loads(path.read_text())


@pytest.fixture
def race(tmp_path):
    return Race(tmp_path, TINY.replace("epochs = 2", "epochs = 1"))


def probe_spec(folder: Path) -> str:
    """Probes on real digits, whose pixels are the features."""
    import h5py
    from sklearn.datasets import load_digits

    data = load_digits()
    for name, part in {"train": slice(0, 200), "val": slice(200, 260)}.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"], file["labels"] = data.data[part], data.target[part]
    return (
        f'[data]\ndataset = "precomputed_features"\ntrain_features_file = "{folder}/train.h5"\n'
        f'val_features_file = "{folder}/val.h5"\n[model.encoder]\nencoder_type = "precomputed"\n'
        '[task]\nobjective = "probe"\nbootstrap = 0\nresult_plot = "none"\nmethods = ["knn"]\n'
    )


@pytest.mark.parametrize("task", ["training", "probe"])
def test_the_second_is_told_while_the_first_still_reads(task, tmp_path):
    race = Race(tmp_path, TINY if task == "training" else probe_spec(tmp_path))
    first = race.start()
    first.says("reading")
    second = race.start().wait()
    assert second.code == 2 and f"in use by process {first.pid}" in second.out
    assert "reading" not in second.out and len(second.out.splitlines()) == 1
    race.gate.touch()
    done = first.wait()
    assert done.code == 0 and "is finished" in done.out
    assert race.info()["continued"] == [] and race.info()["pid"] == first.pid
    code, out = race.run()
    assert code == 0 and "was finished before" in out


def test_of_several_at_once_one_trains(race):
    several = [race.start() for _ in range(3)]
    race.gate.touch()
    done = [one.wait() for one in several]
    assert sorted(one.code for one in done)[:1] == [0] and {one.code for one in done} <= {0, 2}
    assert sum("is finished" in one.out for one in done) == 1
    for one in done:
        told = "in use by process", "is finished", "was finished before"
        assert sum(words in one.out for words in told) == 1
    assert race.info()["continued"] == [] and race.info()["finished"]


def test_new_runs_at_once_take_two_names(race):
    several = [race.start("training.on_existing=new", "name=tiny") for _ in range(2)]
    for one in several:
        one.says("reading")
    race.gate.touch()
    assert [one.wait().code for one in several] == [0, 0]
    assert sorted(os.listdir(race.folder / "runs" / "digits")) == ["tiny", "tiny_2"]
    assert {race.info(name)["pid"] for name in ("tiny", "tiny_2")} == {one.pid for one in several}


def test_a_run_is_replaced_only_when_the_data_of_the_next_are_there(race):
    code, out = race.run()
    assert code == 0, out
    before = snapshot(race.folder / "runs")
    second = race.start("training.on_existing=overwrite")
    second.says("reading")
    code, out = race.run("training.on_existing=overwrite")
    assert code == 2 and f"in use by process {second.pid}" in out
    second.kill()
    after = snapshot(race.folder / "runs")
    assert {name for name in before if before[name] != after[name]} <= {"digits/tiny/0/.lock"}
    code, out = race.run()
    assert code == 0 and "was finished before" in out


def test_a_mistake_that_the_data_show_leaves_nothing(tmp_path):
    race = Race(tmp_path, FOLDERS.replace("ROOT", str(tmp_path / "nowhere")))
    code, out = race.run()
    assert code == 2 and "reading" in out and "nowhere" in out
    assert not (tmp_path / "runs").exists()
