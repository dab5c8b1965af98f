"""Start-up: `glovita.py SPEC --check` against `python -c "import msgspec, tomllib"`.

Prints the ratio of the medians of alternating runs; target: at most 2.

    python benchmarks/startup.py [--runs 15]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TARGET = 2.0
CHECK = [str(REPOSITORY / "glovita.py"), str(REPOSITORY / "specs/digits_resnet.toml"), "--check"]
FLOOR = ["-c", "import msgspec, tomllib"]


def seconds(arguments: list[str], bytecode: str) -> float:
    """Wall time of one Python process that keeps its byte code in the folder `bytecode`."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Measure both commands by turns, so that a busy machine slows both alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15, help="runs of each command, at least 5")
    runs = max(5, parser.parse_args().runs)
    with tempfile.TemporaryDirectory() as bytecode:
        for command in (CHECK, FLOOR):  # the first run compiles and warms the file cache
            seconds(command, bytecode)
        pairs = [(seconds(CHECK, bytecode), seconds(FLOOR, bytecode)) for _ in range(runs)]
    check, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"check {1e3 * check:.1f} ms, floor {1e3 * floor:.1f} ms, medians of {runs} runs")
    print(f"ratio {check / floor:.2f} (target at most {TARGET:g})")


if __name__ == "__main__":
    main()
