"""What dynamic-network-architectures says of the residual encoder and of Primus: names and shapes
of parameters, and outputs for weights and inputs that a formula gives.

    pip install --no-deps dynamic-network-architectures "timm<1.0.23" einops
    python benchmarks/volume_reference.py --write

The package goes into an environment apart, for it needs an older timm. Written to
tests/data/volume_reference.json, with which the tests compare our networks; without
--write the file is compared with what the installed package says. Its parameters stand under two
names where a convolution and its norm also form a chain.
"""

import argparse
import hashlib
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).parent.parent
FILE = REPOSITORY / "tests" / "data" / "volume_reference.json"
SMALL = {"features_per_stage": [4, 6, 8], "strides": [1, 2, 2], "n_blocks_per_stage": [1, 2, 1]}
RESIDUAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "images": {"spatial_dim": 2},
    "batch": {"norm": "batch", "nonlinearity": "relu", "conv_bias": False},
    "max": {"nonlinearity": "gelu", "pool_type": "max"},
    "avg": {"pool_type": "avg", "strides": [1, [1, 2, 2], 2]},
    "bottleneck": {"block_type": "bottleneck", "bottleneck_channels": 3, "stem_channels": 5},
    "excited": {"squeeze_excitation": True, "squeeze_excitation_reduction_ratio": 0.9},
    "excited images": {"squeeze_excitation": True, "spatial_dim": 2},
    "dropped": {"dropout_p": 0.2, "stochastic_depth_p": 0.3},
    "thick slices": {"kernel_sizes": [[3, 3, 1], 3, 5], "strides": [1, [2, 2, 1], 2]},
}
"""Sections of the encoder, beside SMALL, on 2 channels of 16 voxels a side."""
PRIMUS: dict[str, tuple[list[int], int]] = {
    "tokens": ([16, 16, 24], 0),
    "registers": ([8, 16, 8], 3),
}
"""Voxels of the input and registers of two blocks of width 396."""
VARIANTS = ("S", "B", "M", "L")
SHOWN = 16  # numbers of an output that are kept


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a name and shape: sines of about the size that initial weights have."""
    shift = zlib.crc32(name.encode()) % 1000 / 1000
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(numbers * (1.3 + shift) + 7 * shift).reshape(shape)
    if len(shape) > 1:
        values *= math.sqrt(2 / math.prod(shape[1:]))
    elif name.endswith("weight") or "gamma" in name or name.endswith("var"):
        values = 1 + 0.2 * values
    else:
        values *= 0.1
    return values.float()


def summary(output: Tensor) -> list[float]:
    """Numbers spread over an output."""
    flat = output.detach().double().flatten()
    places = torch.linspace(0, len(flat) - 1, SHOWN).long()
    return [round(float(value), 6) for value in flat[places]]


def digest(shapes: dict[str, list[int]]) -> str:
    """SHA-256 over names and shapes in the order of the names."""
    lines = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes_of(net: nn.Module) -> dict[str, list[int]]:
    """Shapes by name in a state dict, without the decoder."""
    left_out = ("up_projection", "mask_token", "decoder")
    state = {k: v for k, v in net.state_dict().items() if not k.startswith(left_out)}
    return {name: list(tensor.shape) for name, tensor in state.items()}


def fill(net: nn.Module) -> None:
    """Give every tensor what the formula says of its first name."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and ".all_modules." not in name:
            tensor.copy_(formula(name, tuple(tensor.shape)))


# ------------------------------------------------------------------------- of the package


def residual_encoder(section: dict[str, Any], channels: int) -> nn.Module:
    """The package's residual encoder of a section."""
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    axes = section.get("spatial_dim", 3)
    bottleneck = section.get("block_type") == "bottleneck"
    activation = section.get("nonlinearity", "leaky_relu")
    norm = "BatchNorm" if section.get("norm") == "batch" else "InstanceNorm"
    dropout = section.get("dropout_p", 0.0)
    names = {"relu": "ReLU", "leaky_relu": "LeakyReLU", "gelu": "GELU"}
    defaults = {"features_per_stage": [32, 64, 128, 256, 320, 320], "strides": [1, *[2] * 5]}
    section = {**defaults, "n_blocks_per_stage": [1, 3, 4, 6, 6, 6], **section}
    return ResidualEncoder(
        channels,
        len(section["features_per_stage"]),
        section["features_per_stage"],
        getattr(nn, f"Conv{axes}d"),
        section.get("kernel_sizes", 3),
        section["strides"],
        section["n_blocks_per_stage"],
        section.get("conv_bias", True),
        getattr(nn, f"{norm}{axes}d"),
        {"eps": 1e-5, "affine": True},
        getattr(nn, f"Dropout{axes}d") if dropout else None,
        {"p": dropout},
        getattr(nn, names[activation]),
        {} if activation == "gelu" else {"inplace": True},
        BottleneckD if bottleneck else BasicBlockD,
        section.get("bottleneck_channels"),
        stem_channels=section.get("stem_channels"),
        pool_type=section.get("pool_type", "conv"),
        stochastic_depth_p=section.get("stochastic_depth_p", 0.0),
        squeeze_excitation=section.get("squeeze_excitation", False),
        squeeze_excitation_reduction_ratio=section.get(
            "squeeze_excitation_reduction_ratio", 1 / 16
        ),
    )


def residual_record(section: dict[str, Any]) -> dict[str, Any]:
    """Names, shapes and output of a small residual encoder."""
    net = residual_encoder({**SMALL, **section}, 2).eval()
    fill(net)
    x = formula("input", (2, 2, *[16] * section.get("spatial_dim", 3)))
    return {"shapes": shapes_of(net), "output": summary(net(x))}


def primus_record(size: list[int], registers: int) -> dict[str, Any]:
    """Names, shapes and tokens of a Primus of two blocks."""
    from dynamic_network_architectures.architectures.primus import Primus

    arguments = {"num_register_tokens": registers, "init_values": 0.1, "scale_attn_inner": True}
    net = Primus(2, 396, (8, 8, 8), 1, 2, 6, tuple(size), **arguments).eval()
    fill(net)
    tokens: list[Tensor] = []
    net.eva.register_forward_hook(lambda module, inputs, output: tokens.append(output[0]))
    net(formula("input", (2, 2, *size)))
    return {"shapes": shapes_of(net), "output": summary(tokens[0])}


def names_of_large_ones() -> dict[str, str]:
    """Digests of names and shapes of the networks that weights are published for."""
    from dynamic_network_architectures.architectures import primus

    with torch.device("meta"):
        found = {"ResEncL": digest(shapes_of(residual_encoder({}, 1)))}
    for variant in VARIANTS:
        net = getattr(primus, f"Primus{variant}")(1, 1, (8, 8, 8), (32, 32, 32))
        found[f"Primus{variant}"] = digest(shapes_of(net))
    return found


@torch.no_grad()
def record() -> dict[str, Any]:
    """Everything that the file holds."""
    return {
        "residual": {name: residual_record(section) for name, section in RESIDUAL.items()},
        "primus": {name: primus_record(*case) for name, case in PRIMUS.items()},
        "digests": names_of_large_ones(),
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two records differ, numbers by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{where}/{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        close = all(abs(a - b) <= 1e-4 * (1 + abs(b)) for a, b in zip(one, other, strict=True))
        return [] if close else [where]
    return [] if one == other else [where]


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the file")
    found = record() if parser.parse_args().write else None
    if found is not None:
        FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{FILE.relative_to(REPOSITORY)}: {FILE.stat().st_size:,} bytes")
        return
    different = differences(record(), json.loads(FILE.read_text(encoding="utf-8")))
    print("\n".join(different) or f"{FILE.relative_to(REPOSITORY)} is what the package says")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
