"""Freezing: which parameters train, and that what does not stays exactly as it was."""

import pytest
import torch
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.model import Model, build_model
from glovita_lib.spec_encoders import TimmEncoder, TorchvisionEncoder
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import CustomPeft, FullFinetuning, LinearProbing, PartialFinetuning


def make(peft, encoder=None) -> Model:
    torch.manual_seed(0)
    return build_model(
        ModelSpec(encoder=encoder or TimmEncoder(type="test_vit", pretrained=False)),
        peft,
        outputs=3,
        channels=3,
        size=(32, 32),
        load_weights=False,
    )


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_finetuning_trains_everything() -> None:
    model = make(FullFinetuning())
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_linear_probing_trains_the_head() -> None:
    assert trainable(make(LinearProbing())) == {"head.linear.weight", "head.linear.bias"}


def test_partial_finetuning_freezes_from_the_input() -> None:
    model = make(PartialFinetuning(num_frozen_layers=4))  # of 6
    names = trainable(model)
    blocks = {name.split(".")[3] for name in names if ".blocks." in name}
    assert blocks == {"4", "5"}
    assert "encoder.net.norm.weight" in names and "head.linear.weight" in names
    assert not names & {"encoder.net.cls_token", "encoder.net.pos_embed"}
    assert not any("patch_embed" in name for name in names)
    model.train()
    modes = [block.training for block in model.encoder.blocks()]
    assert modes == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    "encoder",
    [
        TimmEncoder(type="resnet10t", pretrained=False),
        TorchvisionEncoder(type="mobilenet_v3_small", pretrained=False),
    ],
)
def test_frozen_convolutional_blocks_keep_their_statistics(encoder) -> None:
    model = make(PartialFinetuning(num_frozen_layers=3), encoder).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    blocks = model.encoder.blocks()
    statistics = [{k: v.clone() for k, v in b.state_dict().items()} for b in blocks]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    now = dict(model.named_parameters())
    assert frozen and all(torch.equal(now[n], p) for n, p in frozen.items())
    for number, block in enumerate(blocks):
        same = all(torch.equal(statistics[number][k], v) for k, v in block.state_dict().items())
        assert same == (number < 3)


def test_none_or_all_of_the_layers() -> None:
    none = make(PartialFinetuning(num_frozen_layers=0))
    assert trainable(none) == {name for name, _ in none.named_parameters()}
    everything = trainable(make(PartialFinetuning(num_frozen_layers=6)))
    assert everything == {"head.linear.weight", "head.linear.bias"}  # the norm is of the last one


def test_more_than_there_are() -> None:
    with pytest.raises(UserError, match="num_frozen_layers = 7: .* has 6 layers; valid: 0 to 6"):
        make(PartialFinetuning(num_frozen_layers=7))


def only(model: nn.Module, *, part: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)


def test_custom_method() -> None:
    spec = CustomPeft(target="tests.test_peft:only", options={"part": "bias"})
    names = trainable(make(spec))
    assert names and all("bias" in name for name in names)
    with pytest.raises(UserError, match="prat"):
        make(CustomPeft(target="tests.test_peft:only", options={"prat": "bias"}))


@pytest.mark.parametrize(
    "peft", [FullFinetuning(), LinearProbing(), PartialFinetuning(num_frozen_layers=2)]
)
def test_keys_do_not_depend_on_the_method(peft) -> None:
    assert list(make(peft).state_dict()) == list(make(FullFinetuning()).state_dict())
