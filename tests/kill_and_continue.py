"""Kill a training run at random moments, start it again with the same command, compare the result
with that of an undisturbed run, bit for bit.

    python tests/kill_and_continue.py [--kills 20] [--spec specs/digits_resnet.toml]
                                      [--within 20] [--override training.epochs=4 ...]

Exit code 1 if a file differs. Moments are drawn uniformly over --within seconds from each start,
half of the time that the undisturbed run took unless set, so that a run is killed several times.
Every file of the run directory must be whole after every kill.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPARED = (
    "checkpoints/best.pt",
    "checkpoints/last.pt",
    "predictions_test.csv",
    "metrics_test.json",
)


def command(spec: Path, overrides: list[str]) -> list[str]:
    """The one command that starts and continues a run."""
    fixed = ["exp_dir=experiments", "logger.backend=none"]
    return [sys.executable, str(ROOT / "glovita.py"), str(spec), "--override", *fixed, *overrides]


def run_of(folder: Path) -> Path:
    """The only run directory below a folder."""
    (config,) = folder.glob("experiments/*/*/*/config.json")
    return config.parent


def check_whole(folder: Path) -> None:
    """Every file that is there under its final name can be read."""
    import torch

    for path in folder.glob("experiments/**/*"):
        if path.suffix == ".pt" and not path.name.startswith(".tmp"):
            torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def killed(argv: list[str], folder: Path, after: float) -> bool:
    """Run a command for so many seconds, then kill -9 it; False if it ended by itself before."""
    process = subprocess.Popen(
        argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        raise SystemExit(f"the run failed by itself:\n{errors.decode()}")
    return False


def harry(argv: list[str], folder: Path, within: float, draw: random.Random, most: int) -> int:
    """Start a run and kill it at random moments until it ends by itself, or after `most` kills is
    left in peace; the number of kills."""
    for kills in range(most):
        if not killed(argv, folder, draw.uniform(0.05, 1.0) * within):
            return kills
        check_whole(folder)
        print(f"kill {kills + 1}", end=" ", flush=True)
    subprocess.run(argv, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return most


def differences(calm: Path, harried: Path) -> list[str]:
    """Files that differ between two runs."""
    pairs = [(run_of(calm) / name, run_of(harried) / name) for name in COMPARED]
    return [str(a) for a, b in pairs if a.read_bytes() != b.read_bytes()]


def main() -> int:
    """1 if a file differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--spec", type=Path, default=ROOT / "specs" / "digits_resnet.toml")
    parser.add_argument("--within", type=float, help="seconds in which a kill comes; none: half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", nargs="*", default=[])
    asked = parser.parse_args()
    argv = command(asked.spec.resolve(), asked.override)
    draw, kills, runs = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory() as calm:
        started = time.perf_counter()
        subprocess.run(argv, cwd=calm, check=True, stdout=subprocess.DEVNULL)
        duration = time.perf_counter() - started
        print(f"undisturbed run: {duration:.1f} s", flush=True)
        while kills < asked.kills:
            with tempfile.TemporaryDirectory() as harried:
                within = asked.within or duration / 2
                kills += harry(argv, Path(harried), within, draw, asked.kills - kills)
                runs += 1
                found = differences(Path(calm), Path(harried))
            print(f"| run {runs}: {', '.join(found) + ' differ' if found else 'equal'}", flush=True)
            if found:
                return 1
    print(f"{kills} kills in {runs} runs: {', '.join(COMPARED)} equal the undisturbed run's")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
