"""FourierFT: a change with few Fourier coefficients (Gao et al., ICML 2024)."""

import torch
from torch import Tensor, nn

from glovita_lib.adapter import Adapter, attach_all
from glovita_lib.spec_lora import FourierFt
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, resolve


class FourierAdapter(Adapter):
    """scaling Re IDFT2(S), S zero but at n random places; a layer with fewer entries has them
    all."""

    def __init__(self, spec: FourierFt, weight: Tensor) -> None:
        super().__init__()
        self.scaling = spec.scaling
        entries = weight.numel()
        generator = torch.Generator().manual_seed(spec.random_loc_seed)
        places = torch.randperm(entries, generator=generator)[: spec.n_frequency]
        self.register_buffer("places", places)
        self.spectrum = nn.Parameter(torch.zeros(len(places)))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W plus the inverse transform, which is computed in float32."""
        dense = torch.zeros(weight.numel(), device=weight.device)
        dense = dense.index_put((self.places,), self.spectrum.float())
        change = torch.fft.ifft2(dense.view(len(weight), -1)).real * self.scaling
        return weight + change.view(weight.shape).to(weight.dtype)


def apply_fourierft(spec: FourierFt, model: nn.Module) -> None:
    """Freeze the encoder and put a spectrum on every target."""
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"))

    def make(target: Target, weight: Tensor) -> Adapter:
        return FourierAdapter(spec, weight)

    attach_all(root, targets, make, "none")
