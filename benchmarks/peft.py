"""Time of a step, memory kept for the backward, inference: LoRA against full fine-tuning and the
peft library, linear probing with and without a cache of features, every method of a list of specs.

    python benchmarks/peft.py [--models vit_tiny_patch16_224 vit_small_patch16_224] [--repeats 15]
    python benchmarks/peft.py --specs specs/peft/cnn_*.toml [--repeats 5]

The kinds take turns, step by step, so that a busy machine slows all of them; times are CPU seconds
of one thread on a CPU and wall seconds on a GPU, medians, as ratios to full fine-tuning (the
slowest spec). Memory is that of the tensors which autograd keeps, and on a GPU the peak of a step.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file has the name of the library

from glovita_lib.peft_base import merge  # noqa: E402
from glovita_lib.peft_lora import apply_lora  # noqa: E402
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
    """Only the head trains; autograd is on in the trunk."""
    model = base(name).requires_grad_(False)
    model.head.requires_grad_(True)
    return model


class Frozen(nn.Module):
    """A linear probe as this project runs it: the trunk in eval mode and outside autograd."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.trunk = probe(name)

    def train(self, mode: bool = True) -> nn.Module:
        """The trunk stays in eval mode."""
        self.trunk.head.train(mode)
        return self

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, D)."""
        with torch.no_grad():
            return self.trunk.forward_head(self.trunk.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images, or of vectors (B, D) from `embed`."""
        return self.trunk.head(x if x.ndim == 2 else self.embed(x))


KINDS: dict[str, Callable[[str], nn.Module]] = {
    "full fine-tuning": base,
    "LoRA, peft library": library,
    "LoRA on qkv, proj": lambda name: ours(name, ("qkv", r"attn\.proj")),
    "LoRA on q, k, v, proj": lambda name: ours(name, ("q", "k", "v", r"attn\.proj")),
    "probing, trunk in autograd": probe,
    "probing, trunk outside": Frozen,
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


Step = Callable[[], None]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    """One training step."""
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def in_turns(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each; the first round does not count."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(args.repeats + 1):
        for kind, run in steps.items():
            start = clock(args.device)
            run()
            times[kind].append(clock(args.device) - start)
    return {kind: median(seconds[1:]) for kind, seconds in times.items()}


def peak(run: Step, device: str) -> str:
    """MiB that a step needs at most beyond what is there before, on a GPU."""
    if device == "cpu":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"  {(torch.cuda.max_memory_allocated() - before) / 2**20:8.1f} MiB peak"


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def training(name: str, args: argparse.Namespace) -> None:
    """Print a line per kind."""
    x = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(10, (args.batch,), device=args.device)
    models = {kind: make(name).to(args.device).train() for kind, make in KINDS.items()}
    steps = {kind: partial(step, m, trained(m), x, labels) for kind, m in models.items()}
    times = in_turns(steps, args)
    for kind, seconds in times.items():
        ratio = seconds / times["full fine-tuning"]
        memory = f"{kept(models[kind], x):8.1f} MiB kept{peak(steps[kind], args.device)}"
        print(f"  {kind:<28}{seconds:8.3f} s  x {ratio:4.2f}  {memory}")


def probing(name: str, args: argparse.Namespace) -> None:
    """Print the time of epochs of a linear probe with and without training.cache_frozen_features:
    64 images, in the first epoch the encoder reads them."""
    model = Frozen(name).to(args.device).train()
    optimizer = trained(model)
    images = torch.randn(64, 3, 224, 224, device=args.device)
    labels = torch.randint(10, (64,), device=args.device)
    vectors = model.embed(images)

    def epoch(samples: Tensor) -> None:
        for x, y in zip(samples.split(args.batch), labels.split(args.batch), strict=True):
            step(model, optimizer, x, y)

    def first() -> None:
        epoch(torch.cat([model.embed(x) for x in images.split(args.batch)]))

    kinds: dict[str, Step] = {
        "not cached": partial(epoch, images),
        "cached, first epoch": first,
        "cached, later epochs": partial(epoch, vectors),
    }
    times = in_turns(kinds, args)
    for kind, seconds in times.items():
        print(f"  {kind:<28}{seconds:8.4f} s  1 / {times['not cached'] / seconds:,.1f}")


def methods(paths: list[str], args: argparse.Namespace) -> None:
    """Print a line per spec: one training step of its model, size and optimizer on random images;
    no weights are read."""
    from glovita_lib import dist
    from glovita_lib.experiment import assemble, read_data
    from glovita_lib.model import parameter_table
    from glovita_lib.optim import build_optimizer
    from glovita_lib.resolved import resolve_spec
    from glovita_lib.spec_check import load_checked

    models: dict[str, nn.Module] = {}
    steps: dict[str, Step] = {}
    ranks = dist.Ranks(0, 1, 0, torch.device(args.device))
    for path in paths:
        root = load_checked(path).root
        resolved = resolve_spec(root, read_data(root, ranks))
        model = assemble(root, resolved, ranks, load_weights=False).model.train()
        shape = (root.dataloading.batch_size, *resolved.inputs.shape)
        x = torch.randn(shape, device=args.device)
        labels = torch.randint(10, shape[:1], device=args.device)
        if root.training.cache_frozen_features:
            x = model.embed(x, model.aggregation)
        optimizer = build_optimizer(model, root.optimizer)

        def one(model=model, optimizer=optimizer, x=x, labels=labels) -> None:
            terms = model.auxiliary_losses().values()
            sum(terms, nn.functional.cross_entropy(model(x), labels)).backward()
            optimizer.step()
            model.after_step(1, 2)
            optimizer.zero_grad()

        name = Path(path).stem
        models[name], steps[name] = model, one
        sizes = parameter_table(model)[-1]
        print(f"  {name:<28}{kept(model, x):8.1f} MiB kept  {sizes.share:8.3%} train", flush=True)
    times = in_turns(steps, args)
    slowest = max(times.values())
    for name, seconds in sorted(times.items(), key=lambda item: item[1]):
        memory = peak(steps[name], args.device)
        print(f"  {name:<28}{1000 * seconds:8.1f} ms  x {seconds / slowest:4.2f}{memory}")


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
    steps = {kind: partial(m.to(args.device).eval(), x) for kind, m in models.items()}
    times = in_turns(steps, args)
    for kind, seconds in times.items():
        print(f"  {kind:<28}{seconds:8.3f} s  x {seconds / times['base']:4.2f}")


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--specs", nargs="+", help="measure these specs instead")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.specs:
        methods(args.specs, args)
        return
    for name in args.models:
        print(f"{name}, batch {args.batch}, rank {RANK}, training step")
        training(name, args)
        print(f"{name}, linear probing, epoch of 64 images")
        probing(name, args)
        print(f"{name}, inference")
        inference(name, args)


if __name__ == "__main__":
    main()
