"""Methods on whole models: modes, groups, reading features, compilation, two ranks."""

from typing import get_args

import pytest
import torch
import torch.distributed as dist
from children import run_ranks
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.optim import parameter_groups
from glovita_lib.peft_base import Insert, apply_peft, merge
from glovita_lib.spec_encoders import TimmEncoder
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import (
    Adalora,
    AdaptFormer,
    Bitfit,
    Boft,
    Convpass,
    CustomPeft,
    DiffFit,
    Fact,
    FourierFt,
    FullFinetuning,
    Gps,
    Ia3,
    LinearProbing,
    LnTuning,
    Loha,
    Lokr,
    Lora,
    Oft,
    Peft,
    RepAdapter,
    Ssf,
    Vera,
    VisualPromptTuning,
)
from glovita_lib.spec_train import Optimizer

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = TimmEncoder(type="vit_tiny_patch16_224", pretrained=False, model_kwargs=SMALL)
HYBRID = TimmEncoder(
    type="vit_tiny_r_s16_p8_224", pretrained=False, model_kwargs={"depth": 2, "embed_dim": 192}
)
RESNET = TimmEncoder(type="resnet10t", pretrained=False)
SPECS = (
    Bitfit(), LnTuning(), Ssf(), DiffFit(), Lora(), Lora(use_dora=True), Adalora(), Loha(), Lokr(),
    Oft(), Boft(), Vera(), Ia3(), FourierFt(), AdaptFormer(), Convpass(), RepAdapter(), Fact(),
    Gps(), VisualPromptTuning(), VisualPromptTuning(deep=False),
)  # fmt: skip


def make(peft, encoder=VIT, **fields):
    torch.manual_seed(0)
    spec = ModelSpec(encoder=encoder, **fields)
    return build_model(spec, peft, outputs=3, channels=3, size=(32, 32), load_weights=False)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def label(spec) -> str:
    return type(spec).__name__


def test_every_member_of_the_union_has_a_function_and_a_docstring():
    for kind in get_args(Peft):
        assert apply_peft.dispatch(kind) is not apply_peft.__wrapped__, kind
        assert kind.__doc__ and len(kind.__doc__) > 20


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_every_parameter_that_trains_has_a_gradient(spec):
    """Else training on several GPUs stops with an error about unused parameters."""
    model = make(spec)
    model.train()
    loss = model(images()).square().mean() + sum(model.auxiliary_losses().values())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_features_are_read_as_before(spec):
    model = make(spec).eval()
    features = model.features(images())
    assert features.tokens.shape == (4, 5, 32)
    assert features.n_prefix == 1 and features.grid == (2, 2)
    assert model.embed(images(), "avg").shape == (4, 32)


def test_frozen_parts_are_in_eval_mode_and_adapters_in_train_mode():
    model = make(Lora(dropout=0.5, targets=("qkv",)))
    model.train()
    block = model.encoder.net.blocks[0]
    assert block.attn.qkv.adapter.training and not block.mlp.training and not block.norm1.training
    model = make(Ssf(), RESNET)
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)


def test_nothing_before_the_first_adapter_is_kept_for_the_backward():
    """Frozen layers in front of the adapters stay outside autograd."""
    model = make(Lora(targets=(r"blocks\.1\.attn\.qkv",)))
    seen = []
    model.encoder.net.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    model.train()(images())
    assert not seen[0].requires_grad


def test_learning_rates_by_layer_and_by_lora_plus():
    model = make(Lora(lora_plus_ratio=4.0, targets=("qkv",)))
    groups = parameter_groups(model, Optimizer(layer_wise_lr_decay=0.5))
    scales = sorted(g["lr_scale"] for g in groups)
    assert scales == pytest.approx([0.25, 0.5, 1.0, 2.0])
    by_name = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    adapter = model.encoder.net.blocks[0].attn.qkv.adapter
    assert (by_name[id(adapter.A)], by_name[id(adapter.B)]) == (0.25, 1.0)


@pytest.mark.parametrize("spec", [Lora(), Vera(), Convpass(), VisualPromptTuning()], ids=label)
@pytest.mark.compiles
def test_compiled(spec):
    model, x = make(spec).eval(), images()
    y = model(x)
    keys = list(model.state_dict())
    model.compile(backend="aot_eager")
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == keys
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("spec", [Convpass(), VisualPromptTuning()], ids=label)
def test_a_convolutional_stem_is_in_front_of_the_blocks(spec):
    """The grid is that of the tokens, not of the stem's maps; prompts enter behind the stem."""
    model = make(spec, HYBRID).eval()
    plain = make(LinearProbing(), HYBRID).eval()
    added = [name for name, module in model.named_modules() if isinstance(module, Insert)]
    assert added and all(name.startswith("encoder.net.blocks.") for name in added)
    features = model.features(images())
    assert features.tokens.shape == plain.features(images()).tokens.shape
    if isinstance(spec, Convpass):  # starts as the base
        torch.testing.assert_close(model(images()), plain(images()))


def test_the_grid_is_made_in_front_of_the_blocks_that_are_used_first():
    """Twins registers the patch embeddings of all its stages before its blocks."""
    sizes = {"embed_dims": (8, 16, 32, 64), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)}
    twins = TimmEncoder(type="twins_svt_small", pretrained=False, model_kwargs=sizes)
    model, plain = make(Convpass(), twins).eval(), make(LinearProbing(), twins).eval()
    torch.testing.assert_close(model(images()), plain(images()))  # starts as the base
    recording = [n for n, m in model.named_modules() if type(m).__mro__[1].__name__ == "Recording"]
    assert recording == ["encoder.net.patch_embeds.0.proj"]


def test_merged_model_is_a_start_for_another_run():
    model, x = make(Lora()), images()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    y = model.eval()(x)
    merged = merge(model)
    second = make(Ssf())
    second.load_state_dict(merged.state_dict(), strict=False)
    torch.testing.assert_close(second.eval()(x), y, atol=1e-5, rtol=1e-5)
    plain = make(LinearProbing())
    plain.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(x), y, atol=1e-5, rtol=1e-5)


def test_a_custom_method():
    """A function of the user's own package."""
    target = "glovita_lib.peft_base:train_biases"
    model = make(CustomPeft(target="glovita_lib.peft_base:freeze"))
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="missing a required argument"):
        make(CustomPeft(target=target, options={"nonsense": 1}))


def train_rank(folder: str) -> None:
    """One of two ranks, in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for number, spec in enumerate(SPECS):
        model = make(spec).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            out = parallel(images()[2 * rank : 2 * rank + 2])
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[number] = dict(model.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
def test_two_ranks_train_as_one(tmp_path):
    done = run_ranks(
        "import sys, test_peft_model; test_peft_model.train_rank(sys.argv[1])", tmp_path
    )
    assert [one.code for one in done] == [0, 0], done
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, spec in enumerate(SPECS):
        model = make(spec).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(images()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(ranks[0][number][key], ranks[1][number][key])
            torch.testing.assert_close(
                ranks[0][number][key], value, atol=1e-4, rtol=1e-3, msg=f"{label(spec)} {key}"
            )


# ---------------------------------------------------------------------- what the loop asks


def test_a_model_without_adapters_adds_nothing_to_the_loop():
    model = make(FullFinetuning())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.calibrate(iter([]), lambda batch: batch, lambda tensor: tensor)
    model.after_step(1, 10)
    assert model.auxiliary_losses() == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gps_alone_asks_for_calibration_batches_and_chooses_by_them():
    asked = {kind for kind in get_args(Peft) if kind.calibration_batches}
    assert asked == {Gps} and Gps(calibration_batches=3).calibration_batches == 3
    model = make(Gps())
    places = {n: b.clone() for n, b in model.named_buffers() if n.endswith("places")}
    x, seen = images(), []

    def loss(batch):
        seen.append(len(batch))
        return model(batch).square().mean()

    model.calibrate([x[:2], x[2:]], loss, lambda tensor: tensor)
    assert seen == [2, 2] and places
    chosen = dict(model.named_buffers())
    assert not all(torch.equal(chosen[name], value) for name, value in places.items())


def test_a_merged_model_has_no_adapters_left():
    model = make(Adalora())
    assert model.auxiliary_losses()["orthogonality"] > 0
    merge(model).refresh()
    assert model.auxiliary_losses() == {}
