"""LoHa, LoKr, OFT, BOFT, VeRA, (IA)^3, FourierFT and AdaLoRA: outputs and gradients of the peft
library with the same parameters."""

import numpy as np
import pytest
import torch
from peft_reference import LAYERS, assert_equal_to_library, fill, pair
from small_networks import after_step, auxiliary_losses, build, disturb, sample

from glovita_lib.errors import UserError
from glovita_lib.peft_base import changed_weight
from glovita_lib.peft_lowrank import allocate, apply_adalora, apply_vera
from glovita_lib.peft_weights import (
    apply_fourierft,
    apply_ia3,
    apply_orthogonal,
    apply_product,
    butterfly_order,
    factor_pair,
)
from glovita_lib.spec_peft import Adalora, Boft, FourierFt, Ia3, Loha, Lokr, Oft, Vera

EVERYTHING = (".*",)


def copied(theirs, ours, seed, **how):
    """Fill the library's parameter and copy it in its order."""
    fill(theirs, seed, **how)
    with torch.no_grad():
        ours.copy_(theirs.reshape(ours.shape))
    return theirs, ours


def both(kind, config, spec, apply):
    theirs, ours = pair(kind, config, lambda model: apply(spec, model))
    return theirs, ours, theirs.base_model.model.layer, ours.layer.adapter


@pytest.mark.parametrize("kind", LAYERS)
def test_loha(kind):
    from peft import LoHaConfig

    config = LoHaConfig(r=3, alpha=5, target_modules=["layer"])
    spec = Loha(rank=3, alpha=5, targets=EVERYTHING)
    theirs, ours, their, our = both(kind, config, spec, apply_product)
    names = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
    pairs = [
        copied(getattr(their, a)["default"], getattr(our, b), i)
        for i, (a, b) in enumerate(names.items())
    ]
    assert_equal_to_library(kind, theirs, ours, pairs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("factor", [-1, 2])
def test_lokr(kind, rank, factor):
    from peft import LoKrConfig

    config = LoKrConfig(r=rank, alpha=5, target_modules=["layer"], decompose_factor=factor)
    spec = Lokr(rank=rank, alpha=5, targets=EVERYTHING, decompose_factor=factor)
    theirs, ours, their, our = both(kind, config, spec, apply_product)
    names = {"lokr_w1": "W1", "lokr_w2": "W2", "lokr_w2_a": "B", "lokr_w2_b": "A"}
    names = {a: b for a, b in names.items() if "default" in getattr(their, a)}
    assert our.full == ("lokr_w2" in names)
    pairs = [
        copied(getattr(their, a)["default"], getattr(our, b), i)
        for i, (a, b) in enumerate(names.items())
    ]
    assert_equal_to_library(kind, theirs, ours, pairs)


def test_factor_pairs():
    assert factor_pair(24, -1) == (4, 6)
    assert factor_pair(192, 8) == (8, 24)
    assert factor_pair(17, -1) == (1, 17)


@pytest.mark.parametrize("kind", ["linear", "linear_no_bias", "conv2d_pointwise"])
@pytest.mark.parametrize("neumann", [True, False])
def test_oft(kind, neumann):
    from peft import OFTConfig

    config = OFTConfig(
        r=4, oft_block_size=0, target_modules=["layer"], use_cayley_neumann=neumann, bias="none"
    )
    spec = Oft(r=4, targets=EVERYTHING, use_cayley_neumann=neumann)
    theirs, ours, their, our = both(kind, config, spec, apply_orthogonal)
    pairs = [copied(their.oft_R["default"].weight, our.q, 1, scale=0.1)]
    assert_equal_to_library(kind, theirs, ours, pairs)


def test_oft_merges_a_convolution_as_the_library_does():
    """The library's own forward of larger kernels differs from its merged weight."""
    from peft import OFTConfig

    config = OFTConfig(r=4, oft_block_size=0, target_modules=["layer"], bias="none")
    spec = Oft(r=4, targets=EVERYTHING)
    theirs, ours, their, our = both("conv2d", config, spec, apply_orthogonal)
    copied(their.oft_R["default"].weight, our.q, 1, scale=0.1)
    their.merge()
    torch.testing.assert_close(changed_weight(ours.layer), their.base_layer.weight)


def test_oft_without_the_series_is_orthogonal():
    net = build("vit")
    apply_orthogonal(Oft(use_cayley_neumann=False, targets=("fc1",)), net)
    disturb(net, 1.0)
    blocks = net.blocks[0].mlp.fc1.adapter.rotation()
    product = blocks @ blocks.transpose(1, 2)
    torch.testing.assert_close(product, torch.eye(4).expand(8, 4, 4), atol=1e-5, rtol=0)


def test_reference_defect_oft_with_its_defaults_can_be_built():
    net, x = build("vit"), sample("vit")
    apply_orthogonal(Oft(), net)
    assert net(x).isfinite().all()


def test_oft_blocks_that_do_not_divide_are_an_error():
    with pytest.raises(UserError, match=r"peft.r = 7: .*reads 32 inputs.*1, 2, 4, 8, 16"):
        apply_orthogonal(Oft(r=7), build("vit"))
    with pytest.raises(UserError, match=r"peft.block_size = 5"):
        apply_orthogonal(Boft(block_size=5), build("vit"))


def test_coft_stays_near_the_identity():
    net = build("vit")
    apply_orthogonal(Oft(coft=True, eps=1e-3, targets=("qkv",)), net)
    disturb(net, 1.0)
    after_step(net, 1, 10)
    adapter = net.blocks[0].attn.qkv.adapter
    norms = adapter.q.norm(dim=1) * 2**0.5  # |Q| of a skew-symmetric matrix
    torch.testing.assert_close(norms, torch.full((8,), 1e-3 / 8**0.5))


@pytest.mark.parametrize("kind", ["linear", "linear_no_bias", "conv2d", "conv2d_pointwise"])
def test_boft(kind):
    from peft import BOFTConfig

    config = BOFTConfig(boft_block_size=4, target_modules=["layer"])
    theirs, ours, their, our = both(
        kind, config, Boft(block_size=4, targets=EVERYTHING), apply_orthogonal
    )
    pairs = [
        copied(their.boft_R["default"], our.R, 1),
        copied(their.boft_s["default"], our.s, 2, shift=1.0),
    ]
    assert_equal_to_library(kind, theirs, ours, pairs)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_butterfly_order_is_that_of_the_library(level):
    from peft import BOFTConfig

    config = BOFTConfig(boft_block_size=4, target_modules=["layer"])
    _, _, their, _ = both(
        "linear", config, Boft(block_size=4, targets=EVERYTHING), apply_orthogonal
    )
    order = their.block_butterfly_perm(32, 8 // 2**level, 2, 2)
    assert torch.equal(butterfly_order(32, level, 4), order)


def test_several_butterfly_factors_against_dense_matrices():
    net = build("vit")
    apply_orthogonal(Boft(block_size=4, n_butterfly=3, targets=("fc1",)), net)
    disturb(net)
    layer = net.blocks[0].mlp.fc1
    adapter = layer.adapter
    dense = np.eye(32)
    for level in range(3):
        blocks = [(b - b.T).detach().double().numpy() / 2 for b in adapter.R[level]]
        diagonal = np.zeros((32, 32))
        for i, q in enumerate(blocks):
            rotation = (np.eye(4) - q) @ np.linalg.inv(np.eye(4) + q)
            diagonal[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = rotation
        order = butterfly_order(32, level, 4).numpy()
        p = np.eye(32)[order]
        dense = p @ diagonal @ p.T @ dense
    weight = net.state_dict()["blocks.0.mlp.fc1.weight"].double().numpy()
    scales = adapter.s.detach().double().numpy()
    expected = scales[:, None] * (dense @ weight.T).T
    np.testing.assert_allclose(changed_weight(layer).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "linear_no_bias"])
def test_vera(kind):
    from peft import VeraConfig

    config = VeraConfig(r=6, target_modules=["layer"])
    theirs, ours, their, our = both(kind, config, Vera(rank=6, targets=EVERYTHING), apply_vera)
    with torch.no_grad():
        ours.shared.A.copy_(their.vera_A["default"])
        ours.shared.B.copy_(their.vera_B["default"])
    pairs = [
        copied(their.vera_lambda_d["default"], our.d, 1),
        copied(their.vera_lambda_b["default"], our.b, 2),
    ]
    assert_equal_to_library(kind, theirs, ours, pairs)


def test_vera_stores_its_projections_once():
    net = build("vit")
    apply_vera(Vera(), net)
    assert [k for k in net.state_dict() if k.endswith((".A", ".B"))] == ["shared.A", "shared.B"]
    assert not any(p.shape[0] == 8 and p.ndim == 2 for p in net.parameters())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("feed_forward", [False, True])
def test_ia3(kind, feed_forward):
    from peft import IA3Config

    config = IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if feed_forward else []
    )
    theirs, ours, their, our = both(kind, config, Ia3(targets=EVERYTHING), apply_ia3)
    if feed_forward:
        from glovita_lib.peft_weights import InputScale

        width = ours.layer._parameters["weight"].shape[1]
        ours.layer.adapter = our = InputScale(width)
    mine = our.l if feed_forward else our.gamma
    assert_equal_to_library(
        kind, theirs, ours, [copied(their.ia3_l["default"], mine, 1, shift=1.0)]
    )


def test_ia3_leaves_queries_alone_and_scales_the_hidden_units():
    net = build("vit")
    apply_ia3(Ia3(), net)
    disturb(net)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{i}.{n}"
        for i in range(2)
        for n in ("attn.qkv.adapter.k.gamma", "attn.qkv.adapter.v.gamma", "mlp.fc2.adapter.l")
    }
    weight = net.state_dict()["blocks.0.attn.qkv.weight"]
    changed = changed_weight(net.blocks[0].attn.qkv)
    assert torch.equal(changed[:32], weight[:32])
    assert not torch.equal(changed[32:64], weight[32:64])


def test_fourierft():
    from peft import FourierFTConfig

    config = FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=["layer"])
    spec = FourierFt(n_frequency=50, scaling=20.0, targets=EVERYTHING)
    theirs, ours, their, our = both("linear", config, spec, apply_fourierft)
    places = their.indices["default"]
    assert torch.equal(our.places, places[0] * 24 + places[1])
    assert_equal_to_library(
        "linear", theirs, ours, [copied(their.fourierft_spectrum["default"], our.spectrum, 1)]
    )


def test_fourierft_of_a_convolution_against_a_sum_of_waves():
    _, ours = pair_of_ours("conv2d", FourierFt(n_frequency=5, scaling=3.0, targets=EVERYTHING))
    adapter = ours.layer.adapter
    fill(adapter.spectrum, 1)
    height, width = 16, 8 * 9
    y, x = np.mgrid[:height, :width]
    expected = np.zeros((height, width))
    values = adapter.spectrum.detach().double().numpy()
    for value, place in zip(values, adapter.places.numpy(), strict=True):
        u, v = divmod(place, width)
        expected += value * np.cos(2 * np.pi * (u * y / height + v * x / width))
    expected *= 3.0 / (height * width)
    weight = ours.layer._parameters["weight"].detach()
    delta = (ours.layer.weight - weight).detach().numpy().reshape(height, width)
    np.testing.assert_allclose(delta, expected, atol=1e-6)


def pair_of_ours(kind, spec):
    from peft_reference import OneLayer

    net = OneLayer(kind)
    apply_fourierft(spec, net)
    return net, net


@pytest.mark.parametrize("kind", LAYERS)
def test_adalora(kind):
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=5, target_r=2, lora_alpha=7, target_modules=["layer"], total_step=10, tfinal=2
    )
    spec = Adalora(init_rank=5, rank=2, alpha=7, targets=EVERYTHING)
    theirs, ours, their, our = both(kind, config, spec, apply_adalora)
    pairs = [
        copied(their.lora_A["default"], our.Q, 1),
        copied(their.lora_B["default"], our.P, 2),
        copied(their.lora_E["default"], our.e, 3),
    ]
    assert_equal_to_library(kind, theirs, ours, pairs)


def test_adalora_follows_the_library_over_a_whole_training():
    """Same parameters, gradients and optimizer: the same triplets are kept at every step."""
    from peft import AdaLoraConfig

    steps = 20
    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=7, target_modules=["layer"], total_step=steps,
        tinit=2, tfinal=4, deltaT=2, orth_reg_weight=0.5, beta1=0.85, beta2=0.8,
    )  # fmt: skip
    spec = Adalora(
        init_rank=6, rank=2, alpha=7, targets=EVERYTHING,
        tinit=0.1, tfinal=0.2, deltaT=2, beta1=0.85, beta2=0.8,
    )  # fmt: skip
    theirs, ours, their, our = both("linear", config, spec, apply_adalora)
    pairs = [
        copied(their.lora_A["default"], our.Q, 1),
        copied(their.lora_B["default"], our.P, 2),
        copied(their.lora_E["default"], our.e, 3),
    ]
    optimizers = [
        torch.optim.AdamW([p[side] for p in pairs], lr=0.03, weight_decay=0.01) for side in (0, 1)
    ]
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 40, generator=generator)
    ranks = []
    for step in range(1, steps + 1):
        x = torch.randn(16, 24, generator=generator)
        for net, optimizer in zip((theirs, ours), optimizers, strict=True):
            loss = (net(x) - x @ target).square().mean()
            loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        after_step(ours, step, steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for left, right in pairs:
            torch.testing.assert_close(left.flatten(), right.flatten(), atol=1e-4, rtol=1e-4)
        ranks.append(int(our.kept.sum()))
    assert ranks[0] == 6 and ranks[-1] == 2
    assert sorted(ranks, reverse=True) == ranks


def test_reference_defect_adalora_prunes_its_budget_over_all_layers():
    net, x = build("vit"), sample("vit", 4)
    spec = Adalora(init_rank=4, rank=1, targets=("q", "v", "fc1"))
    apply_adalora(spec, net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    kept = []
    for step in range(1, 11):
        losses = auxiliary_losses(net)
        (net(x).square().mean() + losses["orthogonality"]).backward()
        optimizer.step()
        after_step(net, step, 10)
        optimizer.zero_grad()
        adapters = [m for m in net.modules() if hasattr(m, "kept")]
        kept.append(sum(int(a.kept.sum()) for a in adapters))
    assert kept[0] == int(6 + (24 - 6) * (7 / 8) ** 3)
    assert kept[-3:] == [6, 6, 6]
    assert all((a.e[~a.kept] == 0).all() for a in adapters)


def test_adalora_gives_the_budget_to_the_layers_that_matter():
    net = build("vit")
    apply_adalora(Adalora(init_rank=4, rank=1, targets=("fc1",)), net)
    first, second = (block.mlp.fc1.adapter for block in net.blocks)
    for adapter in (first, second):
        adapter.U_e.fill_(1.0)
    first.S_e.copy_(torch.tensor([4.0, 9.0, 1.0, 8.0]))
    second.S_e.copy_(torch.tensor([2.0, 3.0, 0.0, 7.0]))
    allocate([first, second], 4)
    assert first.kept.tolist() == [True, True, False, True]
    assert second.kept.tolist() == [False, False, False, True]


def test_adalora_orthogonality_against_a_formula():
    net = build("vit")
    apply_adalora(Adalora(init_rank=3, rank=1, orth_reg=0.5, targets=("fc1",)), net)
    disturb(net)
    total = 0.0
    for block in net.blocks:
        adapter = block.mlp.fc1.adapter
        p, q = adapter.P.detach().double().numpy(), adapter.Q.detach().double().numpy()
        total += np.linalg.norm(p.T @ p - np.eye(3)) + np.linalg.norm(q @ q.T - np.eye(3))
    loss = auxiliary_losses(net)["orthogonality"].item()
    assert loss == pytest.approx(0.5 * total / 4, rel=1e-5)
    before = build("vit")
    apply_adalora(Adalora(orth_reg=0.0), before)
    assert auxiliary_losses(before) == {}


@pytest.mark.parametrize("spec", [Loha(rank_dropout=0.5), Lokr(rank_dropout=0.5)])
def test_rank_dropout_drops_rows_in_training_only(spec):
    net = build("vit")
    apply_product(spec, net)
    disturb(net)
    layer = net.blocks[0].mlp.fc1
    weight = layer._parameters["weight"]
    full = changed_weight(layer) - weight
    layer.train()
    delta = changed_weight(layer) - weight
    dropped = (delta == 0).all(1)
    assert 0 < dropped.sum() < len(dropped)
    torch.testing.assert_close(delta[~dropped], 2 * full[~dropped], atol=1e-5, rtol=1e-5)
