"""TransMIL against its published form, built of the package nystrom-attention, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from nystrom_attention import NystromAttention
from torch import Tensor, nn

from glovita_lib.bags import Bags
from glovita_lib.head_mil import Nystrom, Transmil, pseudo_inverse
from glovita_lib.heads import build_head
from glovita_lib.spec_model import TransmilHead

WIDTH, OUTPUTS = 6, 3
SPEC = TransmilHead(hidden=16, heads=2, landmarks=5, dropout=0.0)
LENGTHS = [1, 2, 40, 5, 17, 3, 90, 25]


class Published(nn.Module):
    """The network of the publication for one bag, as its authors wrote it down: see the paper's
    algorithms 1 to 3."""

    def __init__(self, spec: TransmilHead) -> None:
        super().__init__()
        size = spec.hidden
        self.project = nn.Sequential(nn.Linear(WIDTH, size), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, 1, size))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.layers = nn.ModuleList(
            NystromAttention(
                dim=size,
                dim_head=size // spec.heads,
                heads=spec.heads,
                num_landmarks=spec.landmarks,
                pinv_iterations=6,
                residual=True,
                dropout=0.0,
            )
            for _ in range(2)
        )
        self.convolutions = nn.ModuleList(
            nn.Conv2d(size, size, side, 1, side // 2, groups=size) for side in (7, 5, 3)
        )
        self.classifier = nn.Linear(size, OUTPUTS)

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> logits (K,), attention of the class token in the second layer (N,)."""
        h = self.project(bag[None])
        side = math.ceil(math.sqrt(h.shape[1]))
        h = torch.cat([h, h[:, : side * side - h.shape[1]]], 1)
        h = torch.cat([self.token, h], 1)
        h = h + self.layers[0](self.norms[0](h))
        square = h[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
        square = square + sum(convolution(square) for convolution in self.convolutions)
        h = torch.cat([h[:, :1], square.flatten(2).transpose(1, 2)], 1)
        added, weights = self.layers[1](self.norms[1](h), return_attn=True)
        first = weights.mean(1)[0, -h.shape[1], -h.shape[1] + 1 :]
        own = first[: len(bag)].clone()
        own[: len(first) - len(bag)] += first[len(bag) :]
        return self.classifier(self.norms[2](h + added)[0, 0]), own


def pair(spec: TransmilHead = SPEC) -> tuple[Transmil, Published]:
    """Ours and the published network with the same weights, none of them at its first value."""
    torch.manual_seed(0)
    ours, theirs = build_head(spec, width=WIDTH, outputs=OUTPUTS).double(), Published(spec).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    state = ours.state_dict()
    names = {
        "project.0": "project",
        "norms.0": "first.norm",
        "norms.1": "second.norm",
        "norms.2": "norm",
        "convolutions": "square.convolutions",
        "classifier": "classifier",
        "token": "token",
        **{
            f"layers.{i}.{theirs}": f"{name}.{ours}"
            for i, name in enumerate(("first", "second"))
            for theirs, ours in (("to_qkv", "qkv"), ("res_conv", "local"), ("to_out.0", "out"))
        },
    }
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            (start,) = [known for known in names if name == known or name.startswith(known + ".")]
            parameter.copy_(state[names[start] + name[len(start) :]].view_as(parameter))
    return ours, theirs


def make_bags(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float64) -> Bags:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64)
    return Bags(features.to(dtype), torch.tensor(lengths))


@pytest.mark.parametrize("landmarks", [1, 5, 64])
def test_published_form(landmarks: int) -> None:
    """Logits, gradients and attention of a batch are those of one bag after the other."""
    spec = TransmilHead(hidden=16, heads=2, landmarks=landmarks, dropout=0.0)
    ours, theirs = pair(spec)
    bags = make_bags()
    logits, (raw, weights) = ours(bags), ours.attention(bags)
    expected, attended = zip(*[theirs(bag) for bag in bags.split(bags.features)], strict=True)
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-9, atol=1e-9)
    shares = [own.clamp(min=1e-12) / own.clamp(min=1e-12).sum() for own in attended]
    torch.testing.assert_close(weights[:, 0], torch.cat(shares), rtol=1e-6, atol=1e-9)
    for own, share in zip(bags.split(raw[:, 0]), shares, strict=True):
        torch.testing.assert_close(own.softmax(0), share, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(logits.square().sum(), ours.project.weight)
    (known,) = torch.autograd.grad(torch.stack(expected).square().sum(), theirs.project[0].weight)
    torch.testing.assert_close(gradient, known, rtol=1e-7, atol=1e-9)


def test_attention_on_landmarks_that_are_all_tokens_is_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = Nystrom(64, heads=2, landmarks=12, dropout=0.0).double()
    torch.nn.init.zeros_(layer.local.weight)
    with torch.no_grad():  # sharp attention, whose inverse the iteration reaches
        layer.qkv.weight[:128] = torch.eye(64).repeat(2, 1)
    x = torch.randn(12, 64, dtype=torch.float64)
    q, k, v = layer.split(x)
    exact = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer(x), x + layer.out(exact), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weights_of_first(x).sum(), torch.tensor(1.0).double())


def test_pseudo_inverse() -> None:
    matrices = torch.rand(3, 6, 6, dtype=torch.float64).softmax(-1) + torch.eye(6)
    torch.testing.assert_close(
        pseudo_inverse(matrices), torch.linalg.pinv(matrices), rtol=1e-4, atol=1e-5
    )


def test_dropout_and_order_matter() -> None:
    """Instances are no set: their order is their place in the square."""
    bags = make_bags([30])
    head = build_head(
        TransmilHead(hidden=16, heads=2, landmarks=4), width=WIDTH, outputs=2
    ).double()
    assert not torch.equal(head(bags), head(bags))
    head.eval()
    assert torch.equal(head(bags), head(bags))
    assert not torch.allclose(head(Bags(bags.features.flip(0), bags.lengths)), head(bags))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_half_precision(stored: torch.dtype) -> None:
    ours, _ = pair()
    bags = make_bags(dtype=stored)
    exact = ours(Bags(bags.features.double(), bags.lengths))
    with torch.autocast("cpu", torch.bfloat16):
        half = ours.float()(bags)
    assert F.cosine_similarity(half.double().flatten(), exact.flatten(), dim=0) > 0.99


def test_every_parameter_learns() -> None:
    ours, _ = pair()
    grads = torch.autograd.grad(ours(make_bags()).square().sum(), list(ours.parameters()))
    assert all(grad.abs().sum() > 0 for grad in grads)
