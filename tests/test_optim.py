"""Schedules against torch's own, parameter groups and what they leave alone."""

import math

import pytest
import torch
from torch import nn

from glovita_lib.model import Model, build_model
from glovita_lib.optim import Schedule, build_optimizer, parameter_groups, set_lr
from glovita_lib.spec_encoders import TimmEncoder
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import FullFinetuning
from glovita_lib.spec_train import Optimizer


def make() -> Model:
    """A ViT of two blocks with a linear head."""
    kwargs = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    encoder = TimmEncoder(type="test_vit", pretrained=False, model_kwargs=kwargs)
    spec = ModelSpec(encoder=encoder)
    arguments = {"outputs": 3, "channels": 1, "size": (8, 8), "load_weights": False}
    return build_model(spec, FullFinetuning(), **arguments)


def test_cosine_equals_torch() -> None:
    schedule = Schedule(
        Optimizer(lr=0.3, min_lr=0.01, warmup_epochs=0), epochs=5, steps_per_epoch=7
    )
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=35, eta_min=0.01)
    for step in range(35):
        assert schedule(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        reference.step()
        scheduler.step()


def test_warm_up_rises_linearly_to_the_peak() -> None:
    schedule = Schedule(Optimizer(lr=1.0, warmup_epochs=2), epochs=10, steps_per_epoch=5)
    assert [schedule(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert schedule(10) == 1.0
    assert schedule(49) < 0.01


def test_unset_warm_up_is_a_tenth_and_never_for_steps() -> None:
    assert Schedule(Optimizer(), epochs=20, steps_per_epoch=10).warmup == 20
    assert Schedule(Optimizer(), epochs=500, steps_per_epoch=10).warmup == 100
    assert Schedule(Optimizer(scheduler="Step"), epochs=20, steps_per_epoch=10).warmup == 0


@pytest.mark.parametrize("name", ["Step", "MultiStep"])
def test_step_schedules_equal_torch(name: str) -> None:
    schedule = Schedule(Optimizer(lr=1.0, scheduler=name), epochs=8, steps_per_epoch=4)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = (
        torch.optim.lr_scheduler.StepLR(reference, step_size=8, gamma=0.1)
        if name == "Step"
        else torch.optim.lr_scheduler.MultiStepLR(reference, milestones=[16, 24], gamma=0.1)
    )
    for step in range(32):
        assert schedule(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9), step
        reference.step()
        scheduler.step()


def test_no_schedule_is_constant() -> None:
    schedule = Schedule(Optimizer(lr=0.1, scheduler="None"), epochs=2, steps_per_epoch=3)
    assert {schedule(s) for s in range(6)} == {0.1}


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_every_trainable_parameter_is_in_one_group_and_moves(
    name: str, decay: float | None
) -> None:
    model = make()
    model.encoder.blocks()[0].requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    spec = Optimizer(name=name, lr=0.1, weight_decay=0.5, layer_wise_lr_decay=decay)
    optimizer = build_optimizer(model, spec)
    set_lr(optimizer, 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    for key, parameter in model.named_parameters():
        frozen = key.startswith("encoder.net.blocks.0.")
        assert torch.equal(parameter, before[key]) == frozen, key


def test_layer_wise_decay_gives_the_head_the_full_rate() -> None:
    model = make()
    groups = parameter_groups(model, Optimizer(layer_wise_lr_decay=0.5))
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    net = model.encoder.net
    assert scale[id(model.head.linear.weight)] == 1.0
    assert scale[id(net.norm.weight)] == scale[id(net.blocks[1].mlp.fc1.weight)] == 0.5
    assert scale[id(net.blocks[0].mlp.fc1.weight)] == 0.25
    assert scale[id(net.pos_embed)] == scale[id(net.patch_embed.proj.weight)] == 0.125


def test_undecay_norm_spares_norms_biases_tokens_and_positions_only() -> None:
    model = make()
    groups = parameter_groups(model, Optimizer(undecay_norm=True, weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        words = ("norm", "pos_embed", "cls_token")
        exempt = name.endswith("bias") or any(word in name for word in words)
        assert decay[id(parameter)] == (0.0 if exempt else 0.1), name


def test_lr_scale_of_a_parameter_multiplies() -> None:
    model = make()
    model.head.linear.weight.lr_scale = 16.0
    optimizer = build_optimizer(model, Optimizer(lr=1e-3))
    set_lr(optimizer, 1e-3)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert math.isclose(rate[id(model.head.linear.weight)], 16e-3)
    assert math.isclose(rate[id(model.head.linear.bias)], 1e-3)
