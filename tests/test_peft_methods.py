"""Every method on every kind of network it claims: starts at the base, changes only what it says,
reloads strictly, merges; the others are refused in words."""

import copy

import pytest
import timm
import torch
from small_networks import SHAPES, after_step, auxiliary_losses, build, disturb, sample
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.model import parameter_table
from glovita_lib.peft_base import (
    apply_peft,
    load_trained,
    merge,
    trained_names,
    trained_state,
)
from glovita_lib.spec_peft import (
    Adalora,
    AdaptFormer,
    Bitfit,
    Boft,
    Convpass,
    DiffFit,
    Fact,
    FourierFt,
    Gps,
    Ia3,
    LnTuning,
    Loha,
    Lokr,
    Lora,
    Oft,
    RepAdapter,
    Ssf,
    Vera,
    VisualPromptTuning,
)

ALL = tuple(SHAPES)
TRANSFORMERS = ("vit", "dinov3", "eva02", "series", "torch_attention", "primus")
LINEAR = (*TRANSFORMERS, "swin", "convnext")
WITH_MLP = ("vit", "dinov3", "eva02", "torch_attention", "primus", "swin", "convnext")
SEQUENCES = TRANSFORMERS
UNGROUPED = tuple(n for n in ALL if n != "volume")  # its second convolutions have two groups

METHODS = {
    "bitfit": (Bitfit(), ALL),
    "ln_tuning": (LnTuning(), ALL),
    "ssf": (Ssf(), ALL),
    "difffit": (DiffFit(), ALL),
    "lora": (Lora(rank=2), ALL),
    "dora": (Lora(rank=2, use_dora=True), ALL),
    "pissa": (Lora(rank=2, init_lora_weights="pissa"), ALL),
    "lora_biases": (Lora(rank=2, lora_bias="all"), ALL),
    "adalora": (Adalora(rank=1, init_rank=2), ALL),
    "loha": (Loha(rank=2), ALL),
    "lokr": (Lokr(rank=2), ALL),
    "oft": (Oft(r=4), ALL),
    "boft": (Boft(block_size=4), ALL),
    "boft_2": (Boft(block_size=4, n_butterfly=2), LINEAR),
    "vera": (Vera(rank=4), ALL),
    "ia3": (Ia3(), ALL),
    "fourierft": (FourierFt(n_frequency=20), ALL),
    "adapt_former": (AdaptFormer(bottleneck=4), WITH_MLP),
    "adapt_former_sequential": (
        AdaptFormer(bottleneck=4, mode="sequential", adapter_layernorm_option="in"),
        WITH_MLP,
    ),
    "adapt_former_out": (
        AdaptFormer(bottleneck=4, adapter_layernorm_option="out"),
        WITH_MLP,
    ),
    "convpass": (Convpass(bottleneck=4), WITH_MLP),
    "convpass_attn": (
        Convpass(bottleneck=4, places=("attn",)),
        ("vit", "dinov3", "eva02", "torch_attention", "primus"),
    ),
    "rep_adapter": (RepAdapter(), UNGROUPED),
    "fact_tt": (Fact(r=3), LINEAR),
    "fact_tk": (Fact(r=3, decomposition="tk"), LINEAR),
    "gps": (Gps(gps_topk_per_row=2), ALL),
    "vpt_deep": (VisualPromptTuning(num_tokens=3), SEQUENCES),
    "vpt_shallow": (VisualPromptTuning(num_tokens=3, deep=False, project_dim=5), SEQUENCES),
    "vpt_first": (VisualPromptTuning(num_tokens=3, deep_layers=1), SEQUENCES),
}
PAIRS = [(method, name) for method, (_, names) in METHODS.items() for name in names]


def turn(shift: float) -> set[tuple[str, str]]:
    """Each method on one network, the networks in turn from a share of them on."""
    return {
        (method, names[(i + int(shift * len(names))) % len(names)])
        for i, (method, (_, names)) in enumerate(METHODS.items())
    }


FEW = turn(0)  # tracing takes seconds
WALKED = FEW | turn(1 / 3) | turn(2 / 3)
"""The pairs of every day; the others are marked slow."""
UNMERGED = ("adapt", "convpass", "vpt")


def adapted(method: str, name: str) -> nn.Module:
    """The network with the method on it, adapters always the same."""
    net = build(name)
    torch.manual_seed(5)
    apply_peft(METHODS[method][0], net)
    return net


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(*pair, marks=() if pair in WALKED else pytest.mark.slow) for pair in PAIRS],
)
def test_life_cycle(method, name):
    base, x = build(name), sample(name)
    net = adapted(method, name)
    expected = base(x)

    # the documented start: the base, but for prompts
    if method.startswith("vpt"):
        assert (net(x) - expected).abs().max() > 1e-4
    else:
        torch.testing.assert_close(net(x), expected, atol=2e-5, rtol=2e-5)

    # base weights keep their keys and values
    state = net.state_dict()
    assert base.state_dict().keys() <= state.keys()
    assert all(torch.equal(state[k], v) for k, v in base.state_dict().items())

    # only declared parameters change over 5 steps of AdamW with weight decay
    declared = {n for n, p in net.named_parameters() if p.requires_grad}
    before = copy.deepcopy(state)
    train(net, x, steps=5)
    after = net.state_dict()
    transient = {n for n in after if ".S_" in n or ".U_" in n or n.endswith(".kept")}
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert moved <= declared | transient
    assert moved & declared
    assert all(p.grad is None for n, p in net.named_parameters() if n not in declared)

    # the output has moved, and a fresh network of the same spec takes the state strictly
    net.eval()
    y = net(x)
    assert (y - expected).abs().max() > 1e-6
    fresh = adapted(method, name)
    fresh.load_state_dict(after, strict=True)
    assert torch.equal(fresh.eval()(x), y)

    # the trained part alone does it too, over the base
    part = trained_state(net)
    assert declared <= part.keys()
    alone = adapted(method, name)
    load_trained(alone, part, source="part")
    torch.testing.assert_close(alone.eval()(x), y, atol=1e-6, rtol=1e-6)

    # merged: the keys of the base, the same output
    if method.startswith(UNMERGED):
        with pytest.raises(UserError, match="cannot be merged"):
            merge(net)
        return
    plain = build(name)
    merged = merge(net)
    plain.load_state_dict(merged.state_dict(), strict=True)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    scale = y.abs().max().item()
    torch.testing.assert_close(plain(x), y, atol=2e-5 * max(1.0, scale), rtol=1e-4)


def train(net: nn.Module, x: torch.Tensor, steps: int) -> None:
    """Steps of AdamW with weight decay over everything that trains."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    net.train()
    for step in range(1, steps + 1):
        loss = net(x).square().mean() + sum(auxiliary_losses(net).values())
        loss.backward()
        optimizer.step()
        after_step(net, step, steps)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(*pair, marks=() if pair in FEW else pytest.mark.slow) for pair in PAIRS],
)
@pytest.mark.compiles
def test_compiled(method, name):
    """Traced without a break: the same output, the same gradients, the same keys."""
    net, x = adapted(method, name), sample(name)
    disturb(net)
    y, gradients = with_gradients(net, net, x)
    keys = list(net.state_dict())
    torch.compiler.reset()
    again, others = with_gradients(net, torch.compile(net, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(again, y, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == others.keys() and gradients
    for key, value in gradients.items():
        torch.testing.assert_close(others[key], value, atol=1e-4, rtol=1e-4, msg=key)
    assert list(net.state_dict()) == keys


def with_gradients(net, forward, x):
    """Output of a forward pass, and the gradients of its mean square."""
    net.zero_grad(set_to_none=True)
    y = forward(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m, n in PAIRS if n in ("vit", "resnet", "volume", "series")]
)
def test_copies_are_independent_and_complete(method, name):
    """Averaged weights are a deep copy."""
    net, x = adapted(method, name), sample(name)
    disturb(net)
    y = net(x)
    twin = copy.deepcopy(net)
    disturb(net)
    assert torch.equal(twin(x), y)
    assert not torch.equal(net(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_half_of_the_batch_gives_the_same_output(method):
    """Nothing depends on the other samples of a batch or on an earlier forward."""
    net, x = adapted(method, "vit"), sample("vit", 4)
    disturb(net)
    whole = net(x)
    torch.testing.assert_close(net(x[:2]), whole[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "name", "message"),
    [
        (AdaptFormer(), "resnet", "MLPs of transformers"),
        (Convpass(), "volume", "MLPs of transformers"),
        (Convpass(places=("attn",)), "swin", "windows"),
        (Convpass(places=("attn",)), "convnext", "no attention"),
        (VisualPromptTuning(), "swin", "one sequence of tokens"),
        (VisualPromptTuning(), "resnet", "one sequence of tokens"),
        (VisualPromptTuning(deep_layers=3), "vit", "has 2 blocks"),
        (RepAdapter(targets=("second",)), "volume", "2 groups"),
        (RepAdapter(bottleneck=9, groups=3), "vit", "must divide the 32 inputs"),
        (Fact(), "resnet", 'encoder has none: use another method, as "lora", which changes conv'),
        (Lora(targets=("q",)), "resnet", "'q' matches no layer of this encoder; logical names"),
        (Lora(targets=("layer1.0.conv9",)), "resnet", "did you mean 'layer1.0.conv"),
        (Lora(rank=65), "vit", "peft.rank = 65: no weight that it changes has a rank above 32"),
        (Lora(rank_pattern={"0": 99}), "vit", "peft.rank = 99: .* rank above 32"),
        (
            Boft(block_size=8, n_butterfly=4),
            "vit",
            "= 64; possible there: peft.block_size one of 2, 4 or peft.n_butterfly at most 3",
        ),
        (Lora(targets=("nonsense",)), "vit", "matches no layer"),
        (Lora(rank_pattern={"nonsense": 2}), "vit", "matches no target"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(spec, name, message):
    with pytest.raises(UserError, match=message):
        apply_peft(spec, build(name))


def test_reference_defect_frozen_batch_norm_keeps_its_statistics():
    for method in ("lora", "bitfit", "ln_tuning", "ssf"):
        net, x = adapted(method, "resnet"), sample("resnet", 4)
        before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
        net.train()
        net(x + 5)
        after = net.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_reference_defect_sequential_adapter_acts_on_every_forward():
    net, x = adapted("adapt_former_sequential", "vit"), sample("vit")
    disturb(net)
    first = net(x)
    assert torch.equal(net(x), first) and torch.equal(net(x), first)
    assert (first - build("vit")(x)).abs().max() > 1e-3


def test_reference_defect_peft_checkpoints_have_the_keys_of_a_fresh_model():
    """Before and after a forward, and in a model that never ran."""
    for method in METHODS:
        net, x = adapted(method, "vit"), sample("vit")
        keys = list(net.state_dict())
        net.train()(x).sum().backward()
        assert list(net.state_dict()) == keys == list(adapted(method, "vit").state_dict())


def test_adapt_former_against_its_formula():
    net = adapted("adapt_former", "vit")
    disturb(net)
    mlp = net.blocks[0].mlp
    z = torch.randn(2, 17, 32)
    w = {k: v.double() for k, v in mlp.added.state_dict().items()}
    low = (z.double() @ w["down.weight"].T + w["down.bias"]).clamp(min=0)
    change = low @ w["up.weight"].T + w["up.bias"]
    plain = build("vit").blocks[0].mlp(z)
    torch.testing.assert_close(mlp(z).double(), plain.double() + change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40)])
def test_convpass_mixes_neighbours_on_the_real_grid(height, width):
    """A cell's change reaches its neighbours of the grid, not those of the sequence, and no prefix
    token."""
    net = timm.models.VisionTransformer(
        img_size=(height, width), patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0,
        reg_tokens=2,
    ).eval()  # fmt: skip
    apply_peft(Convpass(bottleneck=4), net)
    disturb(net, 0.5)
    net(torch.randn(1, 3, height, width))
    rows, columns = height // 8, width // 8
    insert = net.blocks[0].mlp.added
    z = torch.randn(1, 3 + rows * columns, 32)
    moved = z.clone()
    cell = (rows // 2) * columns + columns - 1  # at the right edge
    moved[0, 3 + cell] += 1.0
    differs = (insert.change(moved) - insert.change(z)).abs().amax(-1)[0] > 1e-7
    assert not differs[:3].any()
    found = {divmod(i, columns) for i in differs[3:].nonzero().flatten().tolist()}
    y0, x0 = divmod(cell, columns)
    expected = {
        (y, x)
        for y in range(max(0, y0 - 1), min(rows, y0 + 2))
        for x in range(max(0, x0 - 1), min(columns, x0 + 2))
    }
    assert found == expected


def test_convpass_treats_prefix_tokens_as_grids_of_one():
    net = adapted("convpass", "vit")
    disturb(net)
    net(sample("vit"))
    insert = net.blocks[0].mlp.added
    token = torch.randn(2, 32)
    low = nn.functional.gelu(insert.down(token))[:, :, None, None]
    alone = insert.up(nn.functional.gelu(insert.conv(low)[:, :, 0, 0]))
    z = torch.cat([token[:, None], torch.randn(2, 16, 32)], dim=1)
    torch.testing.assert_close(insert.change(z)[:, 0], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "decomposition"), [("fact_tt", "tt"), ("fact_tk", "tk")])
def test_fact_against_its_tensor_formula(kind, decomposition):
    """Slices of the change are s V Sigma U' with the paper's Sigma."""
    net = adapted(kind, "vit")
    disturb(net)
    shared = {k: v.detach().double() for k, v in net.shared.state_dict().items()}
    u, v = shared["U_32"], shared["V_32"]
    for path, out, inside in (("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
        layer = net.get_submodule(f"blocks.1.{path}")
        weight = layer._parameters["weight"]
        delta = (layer.weight - weight).detach().double()
        sigma = layer.adapter.sigma.detach().double()
        for i, piece in enumerate(delta.chunk(out, 0) if out > 1 else delta.chunk(inside, 1)):
            core = sigma[i]
            if decomposition == "tk":
                core = sum(sigma[i, k] * shared["C"][:, :, k] for k in range(3))
            torch.testing.assert_close(piece, v @ core @ u.T, atol=1e-5, rtol=1e-4)
    assert (net.shared.U_32.shape, net.shared.V_32.shape) == ((32, 3), (32, 3))


def test_fact_cuts_the_last_slice_of_a_width_that_is_no_multiple():
    layer = nn.ModuleDict({"fc1": nn.Linear(32, 80), "fc2": nn.Linear(80, 32)})
    apply_peft(Fact(r=2), layer)
    disturb(layer)
    x = torch.randn(3, 32)
    y = layer["fc2"](layer["fc1"](x))
    merge(layer)
    torch.testing.assert_close(layer["fc2"](layer["fc1"](x)), y, atol=1e-5, rtol=1e-5)


def test_ssf_scales_and_shifts_every_layer():
    net = adapted("ssf", "vit")
    names = {n.rsplit(".adapter", 1)[0] for n, p in net.named_parameters() if p.requires_grad}
    assert "norm" in names and "patch_embed.proj" in names and "blocks.0.norm1" in names
    assert len(names) == 2 * 6 + 2
    disturb(net)
    block, z = net.blocks[0], torch.randn(2, 17, 32)
    adapter, plain = block.mlp.fc1.adapter, build("vit").blocks[0].mlp.fc1
    torch.testing.assert_close(block.mlp.fc1(z), plain(z) * adapter.gamma + adapter.beta)
    adapter, plain = block.norm1.adapter, build("vit").blocks[0].norm1
    torch.testing.assert_close(
        block.norm1(z), plain(z) * adapter.gamma + adapter.beta, atol=1e-6, rtol=1e-5
    )


def test_deep_prompts_are_new_in_every_block_and_leave_behind_it():
    net, x = adapted("vpt_deep", "vit"), sample("vit")
    plain = build("vit")
    tokens = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
    for block, mine in zip(plain.blocks, net.blocks, strict=True):
        prompts = mine.added.tokens.expand(2, -1, -1)
        with_prompts = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)  # behind CLS
        tokens = block(with_prompts)
        tokens = torch.cat([tokens[:, :1], tokens[:, 4:]], dim=1)
    torch.testing.assert_close(net(x), plain.norm(tokens)[:, 0], atol=1e-5, rtol=1e-5)


def test_shallow_prompts_pass_all_blocks():
    net, x = adapted("vpt_shallow", "vit"), sample("vit")
    plain = build("vit")
    tokens = plain._pos_embed(plain.patch_embed(x))
    prompts = net.shared.linear(net.blocks[0].added.tokens).expand(2, -1, -1)
    tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
    for block in plain.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(net(x), plain.norm(tokens)[:, 0], atol=1e-5, rtol=1e-5)


def test_prompts_are_no_part_of_the_rotary_embedding():
    """Prompts of zero keys and values at position 0 would else turn with the first patch."""
    net = adapted("vpt_deep", "dinov3")
    prefix = build("dinov3").blocks[0].attn.num_prefix_tokens
    assert net.blocks[0].attn.num_prefix_tokens == prefix + 3


def test_parameter_table():
    head = nn.Linear(32, 4)
    net = nn.ModuleDict({"encoder": build("vit"), "head": head})
    base = sum(p.numel() for p in net["encoder"].parameters())
    apply_peft(Lora(rank=2, targets=("qkv",)), net)
    rows = {row.part: row for row in parameter_table(net)}
    added = 2 * 2 * (32 + 96)
    assert (rows["base"].trainable, rows["base"].total) == (0, base)
    assert (rows["added"].trainable, rows["added"].total) == (added, added)
    assert (rows["head"].trainable, rows["head"].total) == (132, 132)
    assert (rows["all"].trainable, rows["all"].total) == (added + 132, base + added + 132)
    assert "132" in str(rows["head"])


def test_the_trained_state_is_adapters_and_head_without_what_only_continues_a_run():
    net = nn.ModuleDict({"encoder": build("vit"), "head": nn.Linear(32, 4)})
    apply_peft(Adalora(targets=("fc1",)), net)
    kinds = {name.rsplit(".", 1)[-1] for name in trained_names(net)}
    assert kinds == {"P", "e", "Q", "kept", "weight", "bias"}
    assert {n for n in trained_names(net) if "weight" in n} == {"head.weight"}


def test_an_adapter_of_another_run_is_refused():
    net = adapted("lora", "vit")
    state = trained_state(net)
    with pytest.raises(UserError, match="24 of another shape"):
        other = build("vit")
        apply_peft(Lora(rank=3), other)
        load_trained(other, state, source="file")
    del state["blocks.0.attn.proj.adapter.A"]
    with pytest.raises(UserError, match=r"1 missing \(blocks.0.attn.proj.adapter.A\)"):
        load_trained(net, state, source="file")
