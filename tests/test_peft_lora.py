"""LoRA, DoRA, rsLoRA, PiSSA, LoRA+ against the peft library, and what they cost."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft_reference import LAYERS, assert_equal_to_library, fill, pair
from small_networks import build, disturb, sample
from torch import nn

from glovita_lib.network import Depths
from glovita_lib.optim import parameter_groups
from glovita_lib.peft_base import merge
from glovita_lib.peft_lora import apply_lora
from glovita_lib.spec_peft import Lora
from glovita_lib.spec_train import Optimizer

EVERYTHING = (".*",)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_output_and_gradients_of_the_library(kind, options):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=10, target_modules=["layer"], **options)
    spec = Lora(rank=4, alpha=10, targets=EVERYTHING, **options)
    theirs, ours = pair(kind, config, lambda model: apply_lora(spec, model))
    their, our = theirs.base_model.model.layer, ours.layer.adapter
    down, up = their.lora_A["default"].weight, their.lora_B["default"].weight
    fill(down, 1)
    fill(up, 2)
    with torch.no_grad():
        our.A.copy_(down.flatten(1))
        our.B.copy_(up.flatten(1))
    pairs = [(down, our.A), (up, our.B)]
    if options.get("use_dora"):
        magnitude = their.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude.flatten(), our.m)  # |W| at the start
        fill(magnitude, 3, shift=1.0)
        with torch.no_grad():
            our.m.copy_(magnitude.flatten())
        pairs.append((magnitude, our.m))
    assert_equal_to_library(kind, theirs, ours, pairs)


@pytest.mark.parametrize("name", ["vit", "eva02", "resnet", "volume", "series", "torch_attention"])
def test_parts_of_a_fused_weight_and_the_whole_agree(name):
    """A change of q, k and v apart is the change of the fused weight by the stacked factors."""
    net, x = build(name), sample(name)
    base = net(x)
    apply_lora(Lora(rank=3), net)
    torch.testing.assert_close(net(x), base, atol=1e-6, rtol=1e-6)
    disturb(net)
    y = net(x)
    assert (y - base).abs().max() > 1e-3
    torch.testing.assert_close(merge(net)(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("torch_attention", ("q", "v")), ("volume", ("second",)), ("vit", ("qkv",))],
    ids=["a weight that is read", "grouped convolutions", "called layers"],
)
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_in_training_only(name, targets, dora):
    net, x = build(name), sample(name)
    apply_lora(Lora(rank=3, dropout=0.5, targets=targets, use_dora=dora), net)
    disturb(net)
    y = net(x)
    assert torch.equal(net(x), y)
    net.train()
    assert not torch.equal(net(x), net(x))
    torch.testing.assert_close(merge(net)(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_a_weight_that_is_read_keeps_its_mean(dora):
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}).double()
    apply_lora(Lora(rank=3, dropout=0.5, targets=("q", "v"), use_dora=dora), net)
    disturb(net)
    expected = net.eval()["attn"].in_proj_weight
    net.train()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([net["attn"].in_proj_weight for _ in range(2000)])
    error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert torch.equal(error[8:16] > 0, torch.zeros(8, 8, dtype=torch.bool))  # k has no adapter
    assert (error[:8] > 0).all() and (error[16:] > 0).all()


def test_gradients_of_parts_against_a_formula_in_float64():
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "x": nn.Linear(8, 24)})
    del net["attn"]
    layer = net["x"].double()
    layer.num_heads = 2
    wrapped = nn.Sequential(nn.ModuleDict({"qkv": layer, "proj": nn.Linear(8, 8).double()}))
    apply_lora(Lora(rank=2, alpha=3, targets=("q", "v")), wrapped)
    wrapped.double()
    disturb(wrapped)
    x = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    parts = layer.adapter
    factors = [parts.q.A, parts.q.B, parts.v.A, parts.v.B]
    y = layer(x)
    g = torch.randn_like(y)
    got = torch.autograd.grad((y * g).sum(), [x, *factors])
    weight = nn.Module.__getattr__(layer, "weight").detach()
    delta = torch.cat(
        [1.5 * factors[1] @ factors[0], torch.zeros(8, 8).double(), 1.5 * factors[3] @ factors[2]]
    )
    expected = x @ (weight + delta).T + nn.Module.__getattr__(layer, "bias")
    want = torch.autograd.grad((expected * g).sum(), [x, *factors])
    torch.testing.assert_close(y, expected)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_pissa_starts_at_the_base_and_trains_the_main_directions():
    net, x = build("vit"), sample("vit")
    base, weight = net(x), net.blocks[0].attn.proj.weight.detach().clone()
    apply_lora(Lora(rank=4, init_lora_weights="pissa", targets=("proj",)), net)
    torch.testing.assert_close(net(x), base, atol=1e-5, rtol=1e-5)
    adapter = net.blocks[0].attn.proj.adapter
    left, values, right = torch.linalg.svd(weight)
    main = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(adapter.scale * adapter.B @ adapter.A, main, atol=1e-5, rtol=1e-4)
    stored = net.state_dict()["blocks.0.attn.proj.weight"]
    assert torch.equal(stored, weight)  # the base stays what it was


def test_pissa_gradients_are_those_of_the_library():
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=4, target_modules=["layer"], init_lora_weights="pissa")
    spec = Lora(rank=4, alpha=4, targets=EVERYTHING, init_lora_weights="pissa")
    theirs, ours = pair("linear", config, lambda model: apply_lora(spec, model))
    their, our = theirs.base_model.model.layer, ours.layer.adapter
    with torch.no_grad():  # singular vectors are unique up to sign
        our.A.copy_(their.lora_A["default"].weight)
        our.B.copy_(their.lora_B["default"].weight)
        our.A_0.copy_(our.A)
        our.B_0.copy_(our.B)
    pairs = [(their.lora_A["default"].weight, our.A), (their.lora_B["default"].weight, our.B)]
    assert_equal_to_library("linear", theirs, ours, pairs)


def test_lora_plus_gives_b_its_own_learning_rate():
    net = build("vit")
    apply_lora(Lora(lora_plus_ratio=16.0, targets=("qkv",)), net)
    encoder = SimpleNamespace(depths=lambda: Depths({}, 0, 1), uses={})
    named = [(f"encoder.{name}", parameter) for name, parameter in net.named_parameters()]
    model = SimpleNamespace(encoder=encoder, named_parameters=lambda: named)
    groups = parameter_groups(model, Optimizer(lr=1e-3))
    assert sorted((g["lr_scale"], len(g["params"])) for g in groups) == [(1.0, 2), (16.0, 2)]


@pytest.mark.parametrize(
    ("name", "path"), [("vit", "blocks.0.attn.qkv"), ("resnet", "layer1.0.conv1")]
)
def test_dropout_only_in_training_and_with_the_same_mean(name, path):
    net = build(name)
    apply_lora(Lora(dropout=0.5), net)
    disturb(net)
    layer = net.get_submodule(path)
    x = torch.randn(2, 5, 32) if name == "vit" else torch.randn(2, 64, 4, 4)
    quiet = layer(x)
    assert torch.equal(layer(x), quiet)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(800)]).mean(0)
    assert (mean - quiet).abs().mean() < 0.1 * quiet.abs().mean()


def test_bias_choices():
    counts = {}
    for which in ("none", "adapted", "all"):
        net = build("vit")
        apply_lora(Lora(targets=("qkv",), lora_bias=which), net)
        counts[which] = sum(
            n.endswith("bias") for n, p in net.named_parameters() if p.requires_grad
        )
    assert counts == {"none": 0, "adapted": 2, "all": 2 * 6 + 2}


def test_a_trained_bias_gets_the_gradient_of_its_output():
    net = nn.Sequential(nn.Linear(6, 4))
    apply_lora(Lora(rank=2, targets=EVERYTHING, lora_bias="adapted"), net)
    x = torch.randn(7, 6)
    net(x).square().sum().backward()
    bias = dict(net.named_parameters())["0.bias"]
    torch.testing.assert_close(bias.grad, 2 * net(x).sum(0).detach())


def test_no_more_is_kept_for_the_backward_than_by_the_library():
    import peft

    net, x = build("vit"), sample("vit", 8)
    reference = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=8, target_modules=["qkv", "attn.proj"])
    )
    apply_lora(Lora(rank=8, targets=("qkv", r"attn\.proj")), net)
    full = build("vit")
    assert saved_bytes(net, x) <= saved_bytes(reference, x) < saved_bytes(full, x)


def saved_bytes(net: nn.Module, x: torch.Tensor) -> int:
    """Bytes of activations that autograd keeps."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net.train()(x)
    del y
    return sum(storage.nbytes() for storage in kept.values())


def test_autocast_gives_its_own_type_and_gradients_in_float32():
    net, x = build("vit"), sample("vit")
    apply_lora(Lora(), net)
    disturb(net)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.blocks[0].attn.qkv(torch.randn(2, 17, 32))
        assert y.dtype == torch.bfloat16
        low = net(x)
    low.float().square().mean().backward()
    torch.testing.assert_close(low.float(), exact, atol=0.1, rtol=0.1)
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.compiles
def test_compiled_output_is_the_same(options):
    net, x = build("vit"), sample("vit")
    apply_lora(Lora(**options), net)
    disturb(net)
    y = net(x)
    keys = set(net.state_dict())
    net.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(net(x), y, atol=1e-5, rtol=1e-5)
    assert set(net.state_dict()) == keys
