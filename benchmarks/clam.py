"""CLAM: time of a training epoch and memory above the features, against three other ways.

    python benchmarks/clam.py [--bags 100] [--repeats 5] [--threads 2]

100 bags of 500 to 5,000 instances x 1,024 float32 features, batches of 8, forward and backward,
one branch (sb), gated, small, two classes, instance loss with k = 8. Variants alternate within one
process; the numbers are medians. Memory is the growth of the resident set over one batch, each
variant in a process of its own.

- floor: only the matrix products that the mathematics needs, on one bag at a time
- packed: glovita_lib.head_clam on batches of 8
- one by one: modules of torch.nn, one bag at a time, eight to an optimizer step
- padded: the same modules on batches of 8 padded to their longest bag
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glovita_lib.bags import Bags
from glovita_lib.head_clam import Clam
from glovita_lib.spec_model import ClamHead

WIDTH, HIDDEN, ATTENTION, BATCH, K = 1024, 512, 256, 8, 8
DROPOUT = 0.25


class PlainClam(nn.Module):
    """The published model in torch.nn modules, for one bag (N, D) or padded bags (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        drop = nn.Dropout(DROPOUT)
        self.project = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), drop)
        self.tanh = nn.Sequential(nn.Linear(HIDDEN, ATTENTION), nn.Tanh(), drop)
        self.sigmoid = nn.Sequential(nn.Linear(HIDDEN, ATTENTION), nn.Sigmoid(), drop)
        self.score = nn.Linear(ATTENTION, 1)
        self.classifier = nn.Linear(HIDDEN, 2)
        self.instance = nn.ModuleList(nn.Linear(HIDDEN, 2) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, attention (..., N) and h (..., N, H)."""
        h = self.project(x)
        a = self.score(self.tanh(h) * self.sigmoid(h)).squeeze(-1)
        if mask is not None:
            a = a.masked_fill(~mask, -torch.inf)
        return self.classifier((a.softmax(-1)[..., None] * h).sum(-2)), a, h

    def instance_loss(self, a: Tensor, h: Tensor, label: int) -> Tensor:
        """Of one bag: a (N,), h (N, H)."""
        rows = torch.cat((a.topk(K)[1], (-a).topk(K)[1]))
        targets = torch.tensor([1] * K + [0] * K)
        return F.cross_entropy(self.instance[label](h[rows]), targets)


def floor(bags: list[Tensor], labels: Tensor) -> Callable[[], None]:
    """y = x W1', h V' and their gradients: five products a bag."""
    project, gates = torch.randn(HIDDEN, WIDTH), torch.randn(2 * ATTENTION, HIDDEN)
    d_project, d_gates = torch.zeros_like(project), torch.zeros_like(gates)

    def run() -> None:
        for x in bags:
            h = x @ project.T
            both = h @ gates.T
            d_gates.addmm_(both.T, h)
            d_h = both @ gates
            d_project.addmm_(d_h.T, x)

    return run


def packed(bags: list[Tensor], labels: Tensor, **options: object) -> Callable[[], None]:
    """Ours; the packed layout is what the feature file gives."""
    published = {"feature_prep": False, "cosine_head": False, "dropout": DROPOUT}
    spec = ClamHead(variant="sb", instance_eval=True, k_sample=K, **(published | options))
    head = Clam(spec, width=WIDTH, outputs=2)
    batches = [
        (Bags.from_list(bags[i : i + BATCH]), labels[i : i + BATCH])
        for i in range(0, len(bags), BATCH)
    ]

    def run() -> None:
        for batch, targets in batches:
            out = head(batch, targets)
            loss = F.cross_entropy(out["logits"], targets) + out["aux"]["instance_loss"]
            loss.backward()
            head.zero_grad()

    return run


def one_by_one(bags: list[Tensor], labels: Tensor) -> Callable[[], None]:
    """As the original code trains."""
    model = PlainClam()

    def run() -> None:
        for i, (x, label) in enumerate(zip(bags, labels, strict=True)):
            logits, a, h = model(x, None)
            loss = F.cross_entropy(logits[None], label[None])
            ((loss + model.instance_loss(a, h, int(label))) / BATCH).backward()
            if (i + 1) % BATCH == 0:
                model.zero_grad()

    return run


def padded(bags: list[Tensor], labels: Tensor) -> Callable[[], None]:
    """As the reference system trains."""
    model = PlainClam()

    def run() -> None:
        for i in range(0, len(bags), BATCH):
            part, targets = bags[i : i + BATCH], labels[i : i + BATCH]
            x = nn.utils.rnn.pad_sequence(part, batch_first=True)
            lengths = torch.tensor([len(bag) for bag in part])
            logits, a, h = model(x, torch.arange(x.shape[1]) < lengths[:, None])
            instance = [
                model.instance_loss(a[b, :n], h[b, :n], int(targets[b]))
                for b, n in enumerate(lengths)
            ]
            (F.cross_entropy(logits, targets) + torch.stack(instance).mean()).backward()
            model.zero_grad()

    return run


VARIANTS = {
    "floor": floor,
    "packed": packed,
    "packed, defaults": lambda bags, labels: packed(
        bags, labels, feature_prep=True, cosine_head=True, dropout=0.0
    ),
    "one by one": one_by_one,
    "padded": padded,
}


def data(bags: int) -> tuple[list[Tensor], Tensor]:
    """Random bags and labels."""
    torch.manual_seed(0)
    lengths = torch.randint(500, 5001, (bags,)).tolist()
    return [torch.randn(n, WIDTH) for n in lengths], torch.randint(2, (bags,))


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one epoch."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def growth_mb(name: str, largest_only: bool) -> float:
    """Peak resident memory over one epoch of one batch, above the features and a warm-up, MiB."""
    code = f"import clam; print(clam.measure_memory({name!r}, {largest_only}))"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure_memory(name: str, largest_only: bool) -> float:
    """Runs in a process of its own: one batch of 8, or its largest bag alone."""
    bags, labels = data(BATCH)
    bags[0] = torch.randn(5000, WIDTH)
    small = [bag[:600].clone() for bag in bags[:1]]
    VARIANTS[name](small, labels[:1])()  # threads, kernels and weights are there now
    chosen = bags[:1] if largest_only else bags
    run = VARIANTS[name](chosen, labels[: len(chosen)])
    before = resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return peak_mb() - before


def resident_mb() -> float:
    """Resident memory now, MiB."""
    return status_mb("VmRSS")


def peak_mb() -> float:
    """Largest resident memory since the mark was reset, MiB."""
    return status_mb("VmHWM")


def status_mb(key: str) -> float:
    """A line of /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bags", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    bags, labels = data(asked.bags)
    runs = {name: build(bags, labels) for name, build in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(asked.repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if repeat:  # the first round warms up
                times[name].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = sum(map(len, bags))
    print(
        f"{asked.bags} bags, {rows} instances, {asked.threads} threads; medians of {asked.repeats}"
    )
    print(f"{'':18} {'s':>7} {'us/row':>7} {'ratio':>6}   MiB: batch of 8  largest bag alone")
    for name, value in median.items():
        memory = [f"{growth_mb(name, alone):9.0f}" for alone in (False, True)]
        ratio = value / median["floor"]
        print(
            f"{name:18} {value:7.2f} {value / rows * 1e6:7.1f} {ratio:6.2f}   {memory[0]:>15}"
            f"  {memory[1]:>17}"
        )


if __name__ == "__main__":
    main()
