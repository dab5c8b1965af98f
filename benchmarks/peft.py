"""LoRA against full fine-tuning and the peft library: time of a step, memory kept for the backward,
inference.

    python benchmarks/peft.py [--models vit_tiny_patch16_224 ...] [--batch 8] [--repeats 15]

The kinds take turns, step by step, so that a busy machine slows all of them; times are CPU seconds
of one thread on a CPU and wall seconds on a GPU, medians, as ratios to full fine-tuning.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file has the name of the library

from glovita_lib.adapter import merge  # noqa: E402
from glovita_lib.lora import apply_lora  # noqa: E402
from glovita_lib.spec_peft import Lora  # noqa: E402

RANK = 8


def base(name: str) -> nn.Module:
    """A vision transformer with ten classes."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10)


def ours(name: str, targets: tuple[str, ...]) -> nn.Module:
    """With LoRA of this project; the head trains."""
    model = base(name)
    apply_lora(Lora(rank=RANK, targets=targets), model)
    model.head.requires_grad_(True)
    return model


def library(name: str) -> nn.Module:
    """With LoRA of the peft library on the same layers; the head trains."""
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=["qkv", "attn.proj"], modules_to_save=["head"]
    )
    return peft.get_peft_model(base(name), config)


def probe(name: str) -> nn.Module:
    """Only the head trains."""
    model = base(name).requires_grad_(False)
    model.head.requires_grad_(True)
    return model


KINDS: dict[str, Callable[[str], nn.Module]] = {
    "full fine-tuning": base,
    "LoRA, peft library": library,
    "LoRA on qkv, proj": lambda name: ours(name, ("qkv", r"attn\.proj")),
    "LoRA on q, k, v, proj": lambda name: ours(name, ("q", "k", "v", r"attn\.proj")),
    "linear probing": probe,
}


def clock(device: str) -> float:
    """Seconds."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def kept(model: nn.Module, x: Tensor) -> float:
    """MiB of activations that autograd keeps in a forward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    """One training step."""
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def training(name: str, args: argparse.Namespace) -> None:
    """Print a line per kind."""
    x = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(10, (args.batch,), device=args.device)
    models = {kind: make(name).to(args.device).train() for kind, make in KINDS.items()}
    optimizers = {
        kind: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], fused=True)
        for kind, m in models.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(args.repeats):
        for kind, model in models.items():
            start = clock(args.device)
            step(model, optimizers[kind], x, labels)
            times[kind].append(clock(args.device) - start)
    full = median(times["full fine-tuning"][1:])
    for kind, model in models.items():
        seconds = median(times[kind][1:])
        memory = kept(model, x)
        print(f"  {kind:<24}{seconds:8.3f} s  x {seconds / full:4.2f}  {memory:8.1f} MiB kept")


@torch.no_grad()
def inference(name: str, args: argparse.Namespace) -> None:
    """Print the cost of adapters at inference."""
    x = torch.randn(args.batch, 3, 224, 224, device=args.device)
    adapted = ours(name, ("qkv", r"attn\.proj"))
    models = {
        "base": base(name),
        "LoRA, merged": merge(ours(name, ("qkv", r"attn\.proj"))),
        "LoRA, unmerged": adapted,
        "peft library, unmerged": library(name),
    }
    models = {kind: m.to(args.device).eval() for kind, m in models.items()}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(args.repeats):
        for kind, model in models.items():
            start = clock(args.device)
            model(x)
            times[kind].append(clock(args.device) - start)
    plain = median(times["base"][1:])
    for kind in models:
        seconds = median(times[kind][1:])
        print(f"  {kind:<24}{seconds:8.3f} s  x {seconds / plain:4.2f}")


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in args.models:
        print(f"{name}, batch {args.batch}, rank {RANK}, training step")
        training(name, args)
        print(f"{name}, inference")
        inference(name, args)


if __name__ == "__main__":
    main()
