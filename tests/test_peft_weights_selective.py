"""GPS: what it picks, that the rest stays, that all ranks pick the same; BitFit; norm tuning."""

import pytest
import torch
import torch.distributed as dist
from children import run_ranks
from small_networks import build, disturb, sample
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.peft_base import changed_weight, is_adapted
from glovita_lib.peft_weights import SelectedEntries, apply_bitfit, apply_gps, apply_ln_tuning
from glovita_lib.spec_peft import Bitfit, Gps, LnTuning


def squares(net, x):
    return net(x).square().mean()


def calibrated(name: str, x: torch.Tensor, per_row: int = 2) -> nn.Module:
    net = build(name)
    apply_gps(Gps(gps_topk_per_row=per_row), net)
    SelectedEntries.calibrate(net, [x], lambda batch: squares(net, batch), lambda t: t)
    return net


@pytest.mark.parametrize("name", ["vit", "resnet", "volume", "torch_attention"])
def test_gps_picks_the_largest_gradients_of_every_row(name):
    x, plain = sample(name), build(name)
    squares(plain, x).backward()
    net = calibrated(name, x)
    expected = plain(x)
    torch.testing.assert_close(net(x), expected, atol=1e-6, rtol=1e-6)
    checked = 0
    for key, layer in net.named_modules():
        if not is_adapted(layer):
            continue
        twin = plain.get_submodule(key)
        weight = twin.in_proj_weight if isinstance(twin, nn.MultiheadAttention) else twin.weight
        gradient = weight.grad.flatten(1).abs()
        chosen = layer.adapter.places
        picked = gradient.gather(1, chosen)
        assert torch.equal(
            picked.sort(1).values, gradient.topk(chosen.shape[1]).values.sort(1).values
        ), key
        checked += 1
    assert checked >= 4


def test_gps_of_a_part_leaves_the_other_rows():
    net, plain, x = build("vit"), build("vit"), sample("vit")
    apply_gps(Gps(gps_topk_per_row=2, targets=("q", "v")), net)
    SelectedEntries.calibrate(net, [x], lambda batch: squares(net, batch), lambda t: t)
    squares(plain, x).backward()
    adapted = plain.blocks[0].attn.qkv.weight
    layer = net.blocks[0].attn.qkv
    width = adapted.shape[1]
    for part, start in (("q", 0), ("v", 2 * width)):
        gradient = adapted.grad[start : start + width].abs()
        picked = gradient.gather(1, layer.adapter.get_submodule(part).places)
        assert torch.equal(picked.sort(1).values, gradient.topk(2).values.sort(1).values)
    disturb(net)
    moved = (changed_weight(layer) != adapted).sum(1)
    assert (moved[:width] == 2).all() and (moved[2 * width :] == 2).all()
    assert not moved[width : 2 * width].any()
    assert not is_adapted(net.blocks[0].mlp.fc1)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_reference_defect_masked_weights_do_not_move(optimizer):
    net, x = calibrated("vit", sample("vit")), sample("vit")
    start = {k: changed_weight(m).detach().clone() for k, m in net.named_modules() if is_adapted(m)}
    trainable = [p for p in net.parameters() if p.requires_grad]
    options = {"lr": 1e-2, "weight_decay": 0.05}
    if optimizer != "AdamW":
        options["momentum"] = 0.9
    stepper = getattr(torch.optim, optimizer)(trainable, **options)
    for _ in range(100):
        stepper.zero_grad()
        squares(net, x).backward()
        stepper.step()
    for key, before in start.items():
        layer = net.get_submodule(key)
        moved = (changed_weight(layer) != before).flatten(1)
        allowed = torch.zeros_like(moved).scatter(1, layer.adapter.places, True)
        assert not (moved & ~allowed).any()
        assert moved.any()


def test_calibration_may_be_repeated_and_sums_batches():
    x = sample("vit", 4)
    once = calibrated("vit", x)
    net = build("vit")
    apply_gps(Gps(gps_topk_per_row=2), net)
    SelectedEntries.calibrate(net, [x[2:]], lambda batch: squares(net, batch), lambda t: t)
    SelectedEntries.calibrate(net, [x[:2], x[2:]], lambda batch: squares(net, batch), lambda t: t)
    for a, b in zip(net.modules(), once.modules(), strict=True):
        if is_adapted(a):
            assert torch.equal(a.adapter.places.sort(1).values, b.adapter.places.sort(1).values)
    assert all(not p.requires_grad for n, p in net.named_parameters() if n.endswith("weight"))


def test_gps_trains_biases_of_its_layers_but_no_norm():
    net = calibrated("vit", sample("vit"))
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert "blocks.0.attn.qkv.bias" in trained
    assert not any("norm" in n for n in trained)


def test_more_entries_than_a_row_has_is_the_whole_row():
    net = calibrated("volume", sample("volume"), per_row=10_000)
    assert net.stem.adapter.values.shape == (8, 27)


RANK = "import sys, test_peft_weights_selective as t; t.train_rank(sys.argv[1])"


def train_rank(folder: str) -> None:
    """One of two ranks, in a process of its own."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def average(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor / 2

    net = build("vit")
    apply_gps(Gps(gps_topk_per_row=2), net)
    x = sample("vit", 4)[2 * rank : 2 * rank + 2]
    SelectedEntries.calibrate(net, [x], lambda batch: squares(net, batch), average)
    torch.save([m.adapter.places for m in net.modules() if is_adapted(m)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
def test_reference_defect_all_ranks_choose_the_same_entries(tmp_path):
    done = run_ranks(RANK, tmp_path)
    assert [one.code for one in done] == [0, 0], done
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    whole = calibrated("vit", sample("vit", 4))
    single = [m.adapter.places for m in whole.modules() if is_adapted(m)]
    for a, b in zip(first, single, strict=True):
        assert torch.equal(a.sort(1).values, b.sort(1).values)


def test_bitfit_trains_every_bias_and_nothing_else():
    net = build("eva02")
    apply_bitfit(Bitfit(), net)
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == name.endswith("bias")
    without = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(UserError, match="no bias"):
        apply_bitfit(Bitfit(), without)


@pytest.mark.parametrize("name", ["vit", "resnet", "volume", "series"])
def test_reference_defect_norm_tuning_finds_norms_by_what_they_are(name):
    net = build(name)
    apply_ln_tuning(LnTuning(), net)
    norms = (nn.LayerNorm, nn.BatchNorm2d, nn.InstanceNorm3d)
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            assert parameter.requires_grad == isinstance(module, norms)
    with pytest.raises(UserError, match="no norm layer"):
        apply_ln_tuning(LnTuning(), nn.Sequential(nn.Linear(2, 2)))


def test_unread_parameters_stay_frozen():
    for apply, spec in ((apply_bitfit, Bitfit()), (apply_ln_tuning, LnTuning())):
        net = build("vit")
        net.norm.requires_grad_(False)
        apply(spec, net)
        assert not any(p.requires_grad for p in net.norm.parameters())
        disturb(net)
