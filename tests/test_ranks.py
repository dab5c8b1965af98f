"""Two gloo ranks under torchrun against one process: learning, evaluation, files, faults."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import run_ranks
from small_runs import FOLDERS, RESNET, TINY, Result, load, snapshot

REPOSITORY = Path(__file__).parent.parent

# Runs commands one after another in one process group, as starting takes longer than training.
# Each rank counts the files that it opens for writing or renames below the folder of the runs.
COMMANDS = """
import json, os, sys
from pathlib import Path
from contextlib import contextmanager
import glovita
from glovita_lib import dist

ranks = dist.start()

@contextmanager
def session():
    yield ranks

dist.session = session
folder, codes, writes = sys.argv[1], [], []

def watch(event, arguments):
    if event == "open" and arguments[1] is not None and not set("wxa+").isdisjoint(arguments[1]):
        writes.append(str(arguments[0]))
    elif event in ("os.rename", "os.mkdir", "os.link", "os.remove"):
        writes.append(str(arguments[0]))

sys.addaudithook(watch)
todo = sys.argv[2]
for arguments in json.loads(Path(todo).read_text()):
    codes.append(glovita.main(arguments))
    dist.barrier(ranks)
mine = [name for name in writes if name.startswith(folder)]
with open(f"{sys.argv[2]}.{ranks.rank}", "w") as file:
    json.dump({"codes": codes, "writes": len(mine)}, file)
dist.stop()
"""

# One command with a fault on the first rank.
FAULT = """
import os, signal, sys, time
import glovita
from glovita_lib import checkpoint, dist, run_train
from glovita_lib.errors import UserError
from glovita_lib.trainer import Trainer

save, step, saves = checkpoint.save, Trainer.optimizer_step, []

def full(path, state):
    saves.append(path)
    if len(saves) == 2:
        raise UserError(f"cannot write {path}: No space left on device; free some space")
    save(path, state)

def die(self):
    step(self)
    if self.state.step == 5 and self.ranks.is_main:
        os.kill(os.getpid(), signal.SIGKILL)

def slow(path, state):
    time.sleep(2)
    save(path, state)

if sys.argv[1] == "full":
    checkpoint.save = full
elif sys.argv[1] == "slow":
    checkpoint.save = slow
else:
    Trainer.optimizer_step = die
sys.exit(glovita.main(sys.argv[2:]))
"""


def torchrun(script, *arguments, code=0):
    """Run a script on two ranks; its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script), *map(str, arguments)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def children(script, *arguments, code=0):
    """The same without the launcher's own start; both ranks have one exit code."""
    done = run_ranks(script, *arguments)
    out = "".join(one.out for one in done)
    assert {bool(one.code) for one in done} == {bool(code)}, out
    return out


def scores(rows):
    """Probabilities (N, K) of the rows of a predictions file."""
    return np.array([[float(v) for k, v in row.items() if k.startswith("p_")] for row in rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The class folders of conftest, for all tests of this module."""
    from small_runs import digits, write_png

    folder = tmp_path_factory.mktemp("set")
    images, labels = digits(190)
    names = {0: "zero", 1: "one", 2: "two"}
    chosen = [i for i in range(len(labels)) if labels[i] in names]
    for place, i in enumerate(chosen):
        split = "train" if place < 30 else "val" if place < 43 else "test"
        file = folder / "images" / split / names[labels[i]] / f"{i:03d}.png"
        write_png(file, images[i], side=8 + i % 5)
    return folder


@pytest.fixture(scope="module")
def specs(data, tmp_path_factory):
    """Spec files: exact (no dropout, no batch norm) and rich (batch norm, augmentation, averaged
    weights, saves within an epoch)."""
    folder = tmp_path_factory.mktemp("specs")
    exact = FOLDERS.replace("ROOT", str(data)).replace(", proj_drop_rate = 0.1", "")
    (folder / "exact.toml").write_text(exact)
    changed = TINY[TINY.index("[data]") : TINY.index("[data.augmentation]")]
    wanted = exact[exact.index("[data]") : exact.index("[data.augmentation]")]
    rich = RESNET.replace(changed, wanted).replace("image_size = 16", RICH)
    rich = rich.replace("epochs = 2", "epochs = 2\nema_decay = 0.8\nsave_every_steps = 2")
    (folder / "rich.toml").write_text(rich + "\n[dataloading]\nbatch_size = 4\n")
    return folder


RICH = 'image_size = 16\ntrain_policy = "default_2d_4"'
EXACT = [
    "data.augmentation.train_policy=default_2d_1",
    "training.epochs=3",
    "optimizer.lr=0.01",
    "optimizer.name=SGD",
    "training.gradient_clip_val=0.5",
]


@pytest.fixture(scope="module")
def two_ranks(specs, tmp_path_factory):
    """What two ranks made of several commands: run directories, exit codes, output."""
    folder = tmp_path_factory.mktemp("two")
    runs, todo = folder / "runs", folder / "todo.json"
    exact, rich = str(specs / "exact.toml"), str(specs / "rich.toml")

    def command(spec, *overrides):
        return [spec, "--override", f"exp_dir={runs}", *overrides]

    few = ["dataloading.batch_size=5", *EXACT, "name=exact"]
    commands = [
        command(exact, *few),
        command(exact, *few),  # finished
        command(exact, *few, "mode=infer", "infer.split=val"),
        command(exact, *few, "mode=infer", "infer.input=nowhere"),  # a mistake
        command(rich, "name=rich"),
        command(exact, "name=one", *EXACT, "training.epochs=1", "mode=train", "seed=-1"),
        command(rich, "name=dry", "--dry-run"),
    ]
    todo.write_text(json.dumps(commands))
    out = children(COMMANDS, runs, todo)
    told = [json.loads((folder / f"todo.json.{rank}").read_text()) for rank in (0, 1)]
    return runs / "generic_image_dataset", told, out


@pytest.mark.processes
def test_exit_codes_are_the_same_on_all_ranks(two_ranks):
    _, told, out = two_ranks
    assert told[0]["codes"] == told[1]["codes"] == [0, 0, 0, 2, 0, 2, 0]
    assert "Traceback" not in out


@pytest.mark.processes
def test_the_first_rank_alone_writes_and_speaks(two_ranks):
    runs, told, out = two_ranks
    assert told[0]["writes"] > 20 and told[1]["writes"] == 0
    assert out.count("exact/0 is finished") == 1
    assert out.count("exact/0 was finished before") == 1
    assert out.count("dry run passed") == 1 and not (runs / "dry").exists()
    assert len(Result(0, "", "", runs / "exact" / "0").records()) == 3
    assert json.loads((runs / "exact" / "0" / "runtime_info.json").read_text())["world_size"] == 2


@pytest.mark.processes
def test_two_ranks_learn_what_one_with_twice_the_batch_learns(two_ranks, specs, command):
    """30 samples in 3 steps of 5 + 5, against 3 of 10."""
    two = Result(0, "", "", two_ranks[0] / "exact" / "0")
    one = command("dataloading.batch_size=10", *EXACT, "name=exact", spec=specs / "exact.toml")
    assert [r["step"] for r in two.records()] == [r["step"] for r in one.records()] == [3, 6, 9]
    for a, b in zip(two.records(), one.records(), strict=True):
        for name in ("train_loss", "val_loss"):
            assert a[name] == pytest.approx(b[name], rel=2e-6)
        for name in ("train_acc", "val_acc", "val_f1", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-12)
    for key, value in one.last["model"].items():
        np.testing.assert_allclose(two.last["model"][key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.processes
def test_evaluation_on_shards_that_do_not_divide_is_exact(two_ranks, specs, command, tmp_path):
    """13 and 17 samples on two ranks; the same checkpoint in one process."""
    two = Result(0, "", "", two_ranks[0] / "exact" / "0")
    for split, count in (("val", 13), ("test", 17)):
        command("mode=infer", f"infer.checkpoint={two.path}/checkpoints/best.pt",
                f"infer.split={split}", f"infer.output_dir={tmp_path}", "dataloading.batch_size=5",
                spec=specs / "exact.toml")  # fmt: skip
        with open(tmp_path / f"predictions_{split}.csv", newline="") as file:
            expected = list(csv.DictReader(file))
        found = two.rows(split)
        assert len(found) == len({row["id"] for row in found}) == count
        for name in ("id", "label", "prediction"):
            assert [row[name] for row in found] == [row[name] for row in expected]
        np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-5, atol=1e-7)
        report = json.loads((tmp_path / f"metrics_{split}.json").read_text())
        assert two.json(f"metrics_{split}.json")["metrics"] == report["metrics"]
        assert two.json(f"metrics_{split}.json")["loss"] == pytest.approx(report["loss"], rel=1e-6)
    for name in ("predictions_val.csv", "metrics_val.json"):  # mode infer on two ranks
        assert (two.path / "infer" / name).read_bytes() == (two.path / name).read_bytes()


@pytest.mark.processes
def test_all_ranks_wait_for_the_last_checkpoint(specs, tmp_path):
    """The only epoch's, written by a first rank with a slow disk."""
    arguments = ["--override", f"exp_dir={tmp_path}", "name=slow", "training.epochs=1"]
    out = children(FAULT, "slow", specs / "exact.toml", *arguments)
    assert "slow/0 is finished" in out


@pytest.mark.processes
def test_faults_end_all_ranks_and_the_run_goes_on(two_ranks, specs, tmp_path):
    """A full disk on the first rank, then a kill, then the plain command: bit-equal to the run
    without faults."""
    calm = two_ranks[0] / "rich" / "0"
    runs = two_ranks[0].parent  # the checkpoints carry exp_dir
    os.rename(two_ranks[0] / "rich", tmp_path / "calm")
    calm = tmp_path / "calm" / "0"
    script = tmp_path / "fault.py"
    script.write_text(FAULT)
    arguments = [specs / "rich.toml", "--override", f"exp_dir={runs}", "name=rich"]
    here = two_ranks[0] / "rich" / "0"
    out = children(FAULT, "full", *arguments, code=1)
    assert out.count("No space left on device") == 1
    assert load(here / "checkpoints" / "last.pt")["state"]["step"] == 2
    assert not any(".tmp-" in name for name in snapshot(here))
    torchrun(script, "kill", *arguments, code=1)
    assert load(here / "checkpoints" / "last.pt")["state"]["step"] == 4
    out = torchrun(REPOSITORY / "glovita.py", *arguments)
    assert "after optimizer step 4" in out and "is finished" in out
    for name in ("checkpoints/best.pt", "checkpoints/last.pt", "predictions_test.csv",
                 "predictions_val.csv", "metrics_test.json"):  # fmt: skip
        assert (here / name).read_bytes() == (calm / name).read_bytes(), name
    shutil.rmtree(here)
