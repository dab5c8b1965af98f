"""Worker processes where shared memory is small, and batches that cannot be sent."""

import re
import sys

import pytest
from children import run

# An epoch of 8 batches of 768 KiB by two workers. A limit of the size of files, which is also one
# of shared memory, stands for a small /dev/shm: a full one is refused by the same call.
SCRIPT = """
import multiprocessing, resource, sys
from dataclasses import dataclass
import numpy as np, torch
from glovita_lib.bags import Bags
from glovita_lib.data import Split
from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError
from glovita_lib.loader import build_loader
from glovita_lib.spec_train import Dataloading

@dataclass(frozen=True)
class Wide:
    kind: str
    uniform = sizes = None
    reads_at_once = False

    def fetch(self, rows):
        return np.stack([np.full((3, 128, 256), row, np.uint8) for row in rows])

    @property
    def collate(self):
        return {"images": None, "bags": self.bags, "unsendable": self.broken}[self.kind]

    def bags(self, samples):
        return Bags.from_list([torch.from_numpy(s.reshape(-1, 64)).float() for s in samples])

    def broken(self, samples):
        return lambda: samples

    def nbytes(self):
        return 1 << 30

multiprocessing.set_start_method("fork", force=True)  # workers inherit the limit
kind, limit = sys.argv[1], int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
split = Split([str(i) for i in range(64)], np.arange(64), Wide(kind))
ranks = Ranks(0, 1, 0, torch.device("cpu"))
spec = Dataloading(in_memory_mb=0, num_workers=2)
loader = build_loader(split, spec, fit=None, train=True, seed=0, ranks=ranks, batch_size=8)
try:
    for epoch in (0, 1):
        seen = []
        for batch in loader.epoch(epoch):
            inputs = batch.inputs.features if kind == "bags" else batch.inputs
            assert (inputs.reshape(8, -1).float().mean(1) == batch.rows).all()
            assert (batch.targets == batch.rows).all()
            seen += batch.rows.tolist()
        assert sorted(seen) == list(range(64))
        print("whole")
except UserError as error:
    print("refused:", error)
loader.close()
"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform == "win32", reason="no limit of the size of files"),
]


@pytest.mark.parametrize("kind", ["images", "bags"])
@pytest.mark.parametrize("limit", [0, 4096, 256 * 2**10])
def test_batches_that_find_no_shared_memory_come_through_pipes(kind, limit):
    done = run(SCRIPT, kind, limit)
    assert done.code == 0 and done.out.count("whole") == 2, done.out
    notes = [line for line in done.out.splitlines() if "note" in line]
    assert len(notes) == (limit > 0)
    if limit:
        # 8 x 3 x 128 x 256 bytes or floats; 2 workers with 2 ahead, and 2 in use
        size, most = ("0.8", "5") if kind == "images" else ("3.0", "18")
        assert f"about {most} MiB of {size} MiB each" in notes[0]
        assert "docker --shm-size" in notes[0] and "dataloading.num_workers" in notes[0]


def test_a_batch_that_cannot_be_sent_ends_the_run_instead_of_being_waited_for():
    done = run(SCRIPT, "unsendable", 0)
    cannot = r"a data worker cannot send a batch: Can't (pickle|get) local object"  # 3.13: get
    assert re.search(cannot, done.out), done.out
    assert "refused: a data worker died" in done.out
