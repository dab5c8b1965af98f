"""Small networks of every kind that PEFT methods must find their way in; real architectures where
timm or torchvision has them at a size that runs in milliseconds."""

import timm
import torch
import torchvision
from torch import Tensor, nn

from glovita_lib.encoder_primus import PrimusNetwork, PrimusShape
from glovita_lib.encoder_volume import ResidualNetwork
from glovita_lib.peft_base import adapters_by_class
from glovita_lib.spec_encoders import ResidualEncoder

SHAPES = {
    "vit": (3, 32, 32),
    "dinov3": (3, 32, 32),
    "eva02": (3, 28, 28),
    "swin": (3, 32, 32),
    "convnext": (3, 64, 64),
    "resnet": (3, 32, 32),
    "volume": (1, 8, 8, 8),
    "residual": (1, 8, 8, 8),
    "primus": (1, 8, 8, 12),
    "series": (2, 32),
    "torch_attention": (3, 32, 32),
}


class Volume(nn.Module):
    """Two residual blocks of 3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(VolumeBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, Z, Y, X)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3, 4))


class VolumeBlock(nn.Module):
    """Convolution, norm, activation, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(8, 8, 3, padding=1)
        self.instance = nn.InstanceNorm3d(8, affine=True)
        self.second = nn.Conv3d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.leaky_relu(self.instance(self.first(x))))


class Series(nn.Module):
    """A transformer over patches of a series, with separate projections in an unusual order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(2, 16, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.ModuleList(SeriesBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, 2, T)
        x = self.embed(x).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layer:
            x = layer(x)
        return x[:, 0]


class SeriesBlock(nn.Module):
    """Attention and MLP; the output projection lies apart from the other three."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(16)
        self.core = Separate()
        self.merge = nn.ModuleDict({"dense": nn.Linear(16, 16)})
        self.middle = nn.LayerNorm(16)
        self.forth = nn.ModuleDict({"dense": nn.Linear(16, 64)})
        self.back = nn.ModuleDict({"dense": nn.Linear(64, 16)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.merge["dense"](self.core(self.before(x)))
        hidden = nn.functional.gelu(self.forth["dense"](self.middle(x)))
        return x + self.back["dense"](hidden)


class Separate(nn.Module):
    """Keys before values before queries."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, 16)
        q, k, v = (
            m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Mean(nn.Module):
    """The mean of a network's map or of its tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)  # (B, D, *grid) or (B, N, D)
        return y.mean(1) if y.ndim == 3 else y.flatten(2).mean(2)


def residual() -> nn.Module:
    """A residual encoder of volumes."""
    spec = ResidualEncoder(
        features_per_stage=(8, 16), strides=(1, 2), n_blocks_per_stage=(1, 2), norm="batch"
    )
    return Mean(ResidualNetwork(spec, 1))


def primus() -> nn.Module:
    """A transformer of volumes, of 2 x 2 x 3 patches and two registers."""
    shape = PrimusShape(48, 2, 4, (4, 4, 4), drop_path=0.0, registers=2)
    return Mean(PrimusNetwork(shape, 1, (2, 2, 3)))


def build(name: str) -> nn.Module:
    """A network without head in eval mode, always the same weights."""
    torch.manual_seed(0)
    if name in ("residual", "primus"):
        net = residual() if name == "residual" else primus()
        jitter_vectors(net)
        return net.eval()
    if name == "volume":
        return Volume().eval()
    if name == "series":
        return Series().eval()
    if name == "torch_attention":
        vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=4)
        nn.init.normal_(vit.heads.head.weight)  # torchvision starts it at zero
        return vit.eval()
    small = {"num_classes": 0}
    tokens = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    if name == "vit":
        net = timm.models.VisionTransformer(**tokens, **small)
    elif name == "dinov3":
        net = timm.create_model(
            "vit_small_patch16_dinov3", embed_dim=32, depth=2, num_heads=2, img_size=32, **small
        )
    elif name == "eva02":
        net = timm.create_model(
            "eva02_tiny_patch14_224", embed_dim=48, depth=2, num_heads=2, img_size=28, **small
        )
    elif name == "swin":
        net = timm.models.SwinTransformer(
            img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2),
            window_size=4, **small,
        )  # fmt: skip
    elif name == "convnext":
        net = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **small)
    else:
        net = timm.create_model("resnet10t", channels=(8, 8, 16, 16), **small)
    jitter_vectors(net)
    return net.eval()


@torch.no_grad()
def jitter_vectors(net: nn.Module) -> None:
    """Scales and biases away from 1 and 0, so that forgetting one shows."""
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            small = "gamma" in name or "ls" in name
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.0 if "bias" in name else 1.0))
            parameter.mul_(0.5 if small else 1.0)


def sample(name: str, batch: int = 2) -> Tensor:
    """An input batch of a network."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPES[name], generator=generator)


@torch.no_grad()
def disturb(model: nn.Module, scale: float = 0.1) -> None:
    """Move every trainable parameter, as training does."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))


# ---------------------------------------------------------------------- what `Model` does


def auxiliary_losses(net: nn.Module) -> dict[str, Tensor]:
    """Loss terms of the adapters in a network."""
    losses: dict[str, Tensor] = {}
    for kind, adapters in adapters_by_class(net).items():
        losses |= kind.auxiliary_losses(adapters)
    return losses


def after_step(net: nn.Module, step: int, total_steps: int) -> None:
    """What the adapters in a network do behind an optimizer step."""
    for kind, adapters in adapters_by_class(net).items():
        kind.after_step(adapters, step, total_steps)
