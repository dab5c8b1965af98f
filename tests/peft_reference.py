"""The peft library as an independent reference: one layer, the same parameters on both sides."""

import copy
import warnings

import torch
from torch import Tensor, nn

LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "linear_no_bias": (lambda: nn.Linear(24, 40, bias=False), (3, 5, 24)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "conv2d_pointwise": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 6, 6)),
}


class OneLayer(nn.Module):
    """A network that is one layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[kind][0]()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pair(kind: str, config, apply) -> tuple[nn.Module, nn.Module]:
    """The same layer adapted by the library and by us."""
    import peft

    base = OneLayer(kind)
    ours = copy.deepcopy(base)
    apply(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config)
    return theirs, ours


def fill(parameter: Tensor, seed: int, scale: float = 0.3, shift: float = 0.0) -> None:
    """Reproducible values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))


def assert_equal_to_library(
    kind: str, theirs: nn.Module, ours: nn.Module, pairs: list[tuple[Tensor, Tensor]]
) -> None:
    """Outputs and gradients agree to 1e-5; pairs of parameters (theirs, ours) with equal values.

    A pair may differ in shape but not in order.
    """
    for their, our in pairs:
        assert torch.equal(their.flatten(), our.flatten())
    x = torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(3))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(i) for net, i in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    g = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(4))
    for out in outputs:
        (out * g).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-5, rtol=1e-5)
    for their, our in pairs:
        assert their.grad is not None
        size = their.grad.abs().max().clamp(min=1)
        difference = (their.grad.flatten() - our.grad.flatten()).abs().max()
        assert difference <= 1e-5 * size, f"{difference} of {size}"
