"""The whole model: every family trains a step, saves and reloads strictly; frozen parts stay."""

import inspect
import re
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.bags import Bags, as_bags
from glovita_lib.encoder import any_encoder
from glovita_lib.errors import UserError
from glovita_lib.heads import build_head
from glovita_lib.model import Model, build_model, parameter_line, parameter_table
from glovita_lib.network import eager
from glovita_lib.spec_encoders import (
    WITHOUT_PATCHES,
    PrecomputedEncoder,
    TimmEncoder,
    TorchvisionEncoder,
)
from glovita_lib.spec_model import (
    ClamHead,
    ClassificationHead,
    CustomHead,
    MeanMilHead,
    ModelSpec,
    RegressionHead,
)
from glovita_lib.spec_peft import FullFinetuning, LinearProbing


def make(encoder, *, peft=None, head=None, method=None, size=64, outputs=3, channels=3) -> Model:
    torch.manual_seed(0)
    return build_model(
        ModelSpec(
            encoder=encoder, head=head or ClassificationHead(), feature_aggregation_method=method
        ),
        peft or FullFinetuning(),
        outputs=outputs,
        channels=channels,
        size=(size, size),
        load_weights=False,
    )


def timm_spec(name: str, **model_kwargs) -> TimmEncoder:
    return TimmEncoder(type=name, pretrained=False, model_kwargs=model_kwargs)


def tv_spec(name: str, **model_kwargs) -> TorchvisionEncoder:
    return TorchvisionEncoder(type=name, pretrained=False, model_kwargs=model_kwargs)


FAMILIES = [
    tv_spec("convnext_tiny"),
    tv_spec("squeezenet1_1"),
    tv_spec("mobilenet_v3_small"),
    tv_spec("resnet18"),
    tv_spec("vit_b_16"),
    tv_spec("swin_t"),
    timm_spec("vit_tiny_patch16_224", depth=2),
    timm_spec("vit_small_patch16_dinov3", depth=2),
    timm_spec("swin_tiny_patch4_window7_224", depths=[1, 1, 1, 1]),
    timm_spec("convnext_atto"),
    timm_spec("resnet18"),
    timm_spec("vit_base_patch16_siglip_224", depth=1),
    timm_spec("mobilenetv3_small_100"),
    timm_spec("efficientnet_lite0"),
]


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda s: f"{type(s).__name__}-{s.type}")
def test_trains_a_step_saves_and_reloads_strictly(spec, tmp_path: Path) -> None:
    model = make(spec)
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "head"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(x), y).backward()
    unread = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unread  # DDP would wait for them
    optimizer.step()
    assert any(not torch.equal(before[n], p) for n, p in model.encoder.named_parameters("encoder"))
    assert not torch.equal(before["head.linear.weight"], model.head.linear.weight)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert list(model.state_dict()) == keys
    again = make(spec)
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit_base_patch16_siglip_224", "avg"),  # its attention pooling is not read
        ("convnext_atto", "sum"),  # nor its norm behind the mean
        ("vit_small_patch16_dinov3", "joint"),
        ("vit_tiny_patch16_224", "mean_all"),
    ],
)
def test_what_no_gradient_reaches_is_frozen(name: str, method: str) -> None:
    spec = timm_spec(name) if name == "convnext_atto" else timm_spec(name, depth=1)
    model = make(spec, method=method).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    flags = {n: (p.requires_grad, p.grad is not None) for n, p in model.named_parameters()}
    assert all(trains == reached for trains, reached in flags.values())
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.embed(x, "pooled").shape == (2, model.encoder.pooled_width)  # still there
    torch.testing.assert_close(model.head(model.embed(x, method)), model(x))


def test_linear_probing_leaves_the_encoder_alone() -> None:
    """BatchNorm statistics and dropout too, and nothing of it is recorded."""
    model = make(timm_spec("mobilenetv3_small_100", drop_rate=0.5), peft=LinearProbing(), size=32)
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    model.train()
    assert model.head.training and not any(m.training for m in model.encoder.modules())
    x = torch.randn(4, 3, 32, 32)
    features = model.features(x)
    assert not features.pooled.requires_grad
    loss = model(x).sum()
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(before[k], v) for k, v in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.head.linear.weight.grad is not None
    for same in (model.eval(), deepcopy(model).eval()):  # an average of the weights is a copy
        assert same.train().head.training and not same.encoder.training


def test_compiling_keeps_the_keys() -> None:
    model = make(timm_spec("test_vit"), size=32)
    keys = list(model.state_dict())
    model.compile(backend="eager")
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 3) and list(model.state_dict()) == keys


class AskingHead(nn.Module):
    """A head whose output says whether an `eager` function of its was traced."""

    consumes = "pooled"

    def forward(self, pooled: Tensor) -> Tensor:
        return self.traced(pooled.sum(1, keepdim=True)) * 1.0

    @eager
    def traced(self, x: Tensor) -> Tensor:
        return 0 * x + float(torch.compiler.is_compiling())


@pytest.mark.compiles
@torch.no_grad()
def test_eager_functions_of_a_compiled_model_are_not_traced() -> None:
    model = make(timm_spec("test_vit"), size=32)
    model.head = AskingHead()
    images = torch.randn(2, 3, 32, 32)
    assert not model(images).any()
    model.compile(backend="eager")
    assert not model(images).any()
    traced = AskingHead.traced.__wrapped__
    compiled = torch.compile(lambda x: traced(model.head, x), backend="eager")
    assert compiled(torch.zeros(2, 1)).all()  # the question is a good one


def test_initial_weights_follow_from_the_seed() -> None:
    one, two = make(timm_spec("resnet18"), size=32), make(timm_spec("resnet18"), size=48)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_counts() -> None:
    model = make(timm_spec("resnet18"), peft=LinearProbing(), size=32)
    base, added, head, whole = parameter_table(model)
    assert head.total == head.trainable == whole.trainable == 512 * 3 + 3
    assert base.total == sum(p.numel() for p in model.encoder.parameters()) and not added.total
    assert whole.total == base.total + head.total
    line = parameter_line(model)
    assert "(encoder 11,176,512, head 1,539), 1,539 of them train (0.0138 %)" in line


def test_one_channel_and_one_sample_and_one_class() -> None:
    model = make(timm_spec("test_vit"), size=32, outputs=1, channels=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1)


def test_regression_checks_its_targets() -> None:
    with pytest.raises(UserError, match="out_dim: 2 outputs"):
        make(timm_spec("test_vit"), head=RegressionHead(out_dim=2), size=32)


def test_a_method_that_the_encoder_cannot_serve() -> None:
    with pytest.raises(UserError, match="resnet18 has no CLS token; valid: avg"):
        make(timm_spec("resnet18"), method="cls_token", size=32)


class TokenHead(nn.Module):
    """Takes raw features and gives an auxiliary loss where it knows the targets."""

    consumes = "features"

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, features, targets: Tensor | None = None):
        logits = self.linear(features.tokens).amax(1)
        if targets is None:
            return logits
        return {"logits": logits, "aux": F.cross_entropy(logits, targets)}


def token_head(*, width: int, outputs: int) -> nn.Module:
    return TokenHead(width, outputs)


def test_a_head_on_raw_features() -> None:
    head = CustomHead(target="tests.test_model:token_head")
    model = make(timm_spec("mobilenetv3_small_100"), head=head)
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 3)  # token width 576, not the 1024 of the pooled vector
    out = model(x, torch.tensor([0, 1]))
    out["aux"].backward()
    flags = {n: (p.requires_grad, p.grad is not None) for n, p in model.named_parameters()}
    assert all(trains == reached for trains, reached in flags.values())


def token_class(method: str | None = None) -> ModelSpec:
    head = CustomHead(target="tests.test_model:TokenHead")
    encoder = timm_spec("mobilenetv3_small_100")
    return ModelSpec(encoder=encoder, head=head, feature_aggregation_method=method)


@pytest.mark.parametrize(
    "head",
    [
        CustomHead(target="tests.test_model:TokenHead"),  # a class that says what it consumes
        CustomHead(target="tests.test_model:token_head"),  # a function whose module does
        ClamHead(),
        MeanMilHead(),
    ],
    ids=["class", "function", "clam", "mean"],
)
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "test_vit"])
def test_a_head_on_raw_features_draws_once(head, name) -> None:
    """Its weights are those of the width of the tokens, drawn right after the encoder."""
    encoder = timm_spec(name)
    torch.manual_seed(0)
    built = any_encoder(encoder, channels=3, size=(160, 160), load_weights=False)
    expected = build_head(head, width=built.width, outputs=3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(0)
    spec = ModelSpec(encoder=encoder, head=head)
    arguments = {"outputs": 3, "channels": 3, "size": (160, 160), "load_weights": False}
    model = build_model(spec, FullFinetuning(), **arguments)
    assert torch.rand(1) == after
    for key, value in model.head.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("method", ["avg", "pooled", "joint"])
def test_an_aggregation_beside_a_head_on_raw_features_is_refused(method) -> None:
    said = f'"{method}" is unread with this head'
    for spec in (
        ModelSpec(head=ClamHead(), feature_aggregation_method=method),
        ModelSpec(
            encoder=PrecomputedEncoder(), head=MeanMilHead(), feature_aggregation_method=method
        ),
        token_class(method),
    ):
        assert [(k, said in t) for k, t in spec.problems()] == [
            ("feature_aggregation_method", True)
        ]
    assert not list(token_class().problems())
    if method != "joint":  # only its module says what the head consumes: where it is built
        head = CustomHead(target="tests.test_model:token_head")
        with pytest.raises(UserError, match=said):
            make(timm_spec("mobilenetv3_small_100"), head=head, method=method)


class PaddedMean(nn.Module):
    """The mean over instances, written on the padded form."""

    consumes = "features"

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, inputs, targets: Tensor | None = None) -> Tensor:
        features, mask = as_bags(inputs).to_padded()  # (B, N_max, D), (B, N_max)
        mask = mask[..., None].to(features)
        return self.linear((features * mask).sum(1) / mask.sum(1))


def padded_mean(*, width: int, outputs: int) -> nn.Module:
    return PaddedMean(width, outputs)


def test_a_head_written_on_padded_bags_takes_tokens_and_bags() -> None:
    head = CustomHead(target="tests.test_model:padded_mean")
    model = make(timm_spec("resnet18"), head=head, size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    bags = [torch.randn(n, model.encoder.width) for n in (3, 1, 5)]
    weight, bias = model.head.linear.weight, model.head.linear.bias
    of_tokens = model.encoder(x).tokens.mean(1) @ weight.T + bias
    of_bags = torch.stack([bag.mean(0) for bag in bags]) @ weight.T + bias
    torch.testing.assert_close(model(x), of_tokens)
    torch.testing.assert_close(model.head(Bags.from_list(bags)), of_bags)


# ------------------------------------------------------------- data.augmentation.patch_size

NARROW = {"embed_dim": 16, "depth": 1, "num_heads": 2}
STAGES = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
PATCHES = {  # name: arguments, side of the image, patch, the convolution or layer that cuts it
    "test_vit": (NARROW, 32, 8, "patch_embed.proj"),
    "deit_tiny_distilled_patch16_224": (NARROW, 32, (4, 4), "patch_embed.proj"),
    "deit3_small_patch16_224": (NARROW, 32, (8, 4), "patch_embed.proj"),
    "eva02_tiny_patch14_224": (NARROW, 32, 8, "patch_embed.proj"),
    "beit_base_patch16_224": (NARROW, 32, 8, "patch_embed.proj"),
    "swin_tiny_patch4_window7_224": (STAGES, 64, 2, "patch_embed.proj"),
    "swinv2_tiny_window8_256": (STAGES, 64, 2, "patch_embed.proj"),
    "cait_xxs24_224": (NARROW, 32, 8, "patch_embed.proj"),
    "samvit_base_patch16_224": (NARROW, 32, 8, "patch_embed.proj"),
    "vit_relpos_small_patch16_224": (NARROW, 32, 8, "patch_embed.proj"),
}


def patched(spec: TimmEncoder, size: int, patch, *, load_weights: bool = False) -> Model:
    torch.manual_seed(0)
    return build_model(
        ModelSpec(encoder=spec),
        FullFinetuning(),
        outputs=3,
        channels=3,
        size=(size, size),
        patch_size=patch,
        load_weights=load_weights,
    )


@pytest.mark.parametrize("name", PATCHES)
def test_the_patch_embedding_is_built_for_an_asked_patch(name) -> None:
    """The network is timm's with its own argument, weight by weight and in what it gives."""
    arguments, size, patch, layer = PATCHES[name]
    spec = timm_spec(name, **arguments)
    model = patched(spec, size, patch).eval()
    sides = (patch, patch) if isinstance(patch, int) else patch
    arguments = {**arguments, "patch_size": sides if sides[0] != sides[1] else sides[0]}
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=0, **arguments, **sized).eval()
    reference.load_state_dict(model.encoder.net.state_dict())
    assert reference.get_submodule(layer).kernel_size == sides
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            model.embed(x, model.aggregation), reference(x), rtol=0, atol=1e-6
        )
    own = build_model_without_patch(spec, size)
    if own is not None:
        assert own.get_submodule(layer).kernel_size != reference.get_submodule(layer).kernel_size


def build_model_without_patch(spec: TimmEncoder, size: int) -> nn.Module | None:
    """The network with its own patch, where the image is whole ones of it."""
    try:
        return patched(spec, size, None).encoder.net
    except UserError:
        return None


RESAMPLED = {
    "vit_small_patch16_224": (32, NARROW),
    "eva02_tiny_patch14_224": (28, NARROW),
    "swin_tiny_patch4_window7_224": (64, STAGES),
}


@pytest.mark.parametrize("name", RESAMPLED)
def test_weights_of_another_patch_are_resampled_as_timm_does(tmp_path, name) -> None:
    torch.manual_seed(3)
    (size, arguments), file = RESAMPLED[name], tmp_path / "w.pth"
    whole = timm.create_model(name, img_size=size, **arguments)
    torch.save(whole.state_dict(), file)
    spec = TimmEncoder(type=name, pretrained=False, model_kwargs=arguments, weights=str(file))
    side = whole.patch_embed.patch_size[0] // 2
    net = patched(spec, size, side, load_weights=True).encoder.net
    kernel = resample_patch_embed(whole.patch_embed.proj.weight.detach(), [side, side])
    torch.testing.assert_close(net.patch_embed.proj.weight.detach(), kernel)
    if getattr(whole, "pos_embed", None) is None:
        return
    grid = [size // side] * 2
    places = resample_abs_pos_embed(whole.pos_embed.detach(), grid, num_prefix_tokens=1)
    torch.testing.assert_close(net.pos_embed.detach(), places)


def test_own_weights_of_one_channel_and_another_patch_are_read_without_a_word(tmp_path, caplog):
    """timm takes every file for one of RGB and would say that it is not."""
    name, file = "vit_small_patch16_224", tmp_path / "w.pth"
    whole = timm.create_model(name, img_size=32, in_chans=1, **NARROW)
    torch.save(whole.state_dict(), file)
    spec = TimmEncoder(type=name, pretrained=False, model_kwargs=NARROW, weights=str(file))
    model = build_model(
        ModelSpec(encoder=spec), FullFinetuning(), outputs=3, channels=1, size=(32, 32),
        patch_size=8, load_weights=True,
    )  # fmt: skip
    kernel = resample_patch_embed(whole.patch_embed.proj.weight.detach(), [8, 8])
    torch.testing.assert_close(model.encoder.net.patch_embed.proj.weight.detach(), kernel)
    assert "already match" not in caplog.text


def test_weights_that_timm_does_not_resample_are_refused(tmp_path) -> None:
    name, file = "cait_xxs24_224", tmp_path / "w.pth"
    torch.save(timm.create_model(name, img_size=32, **NARROW).state_dict(), file)
    spec = TimmEncoder(type=name, pretrained=False, model_kwargs=NARROW, weights=str(file))
    with pytest.raises(UserError, match="patch_embed.proj.weight"):
        patched(spec, 32, 8, load_weights=True)


class Built(Exception):
    """The class that timm's builder of a model asks for, and what it hands it."""


def test_models_of_timm_without_a_patch_of_an_asked_size_are_known_by_name(monkeypatch) -> None:
    """Over all models: the builder accepts one and the class has a patch embedding, or the name
    says so before anything is built."""

    def put_down(kind, variant, pretrained, **arguments):
        raise Built(kind, arguments)

    for module in {timm.models._registry._model_to_module[n] for n in timm.list_models()}:
        monkeypatch.setattr(f"timm.models.{module}.build_model_with_cfg", put_down, raising=False)
    wrong = []
    for name in timm.list_models():
        takes = builds_patches(name)
        said = not re.match(WITHOUT_PATCHES, name)
        if takes != said:
            wrong.append((name, takes))
    assert not wrong and len(timm.list_models()) > 1000


def builds_patches(name: str) -> bool:
    """Whether timm builds a patch embedding of an asked size, of the image itself."""
    try:
        with torch.device("meta"):
            timm.create_model(name, patch_size=8)
    except Built as built:
        kind, arguments = built.args
    except TypeError:  # the builder states a size itself
        return False
    else:  # or builds in its own way
        return False
    takes = any("patch_size" in inspect.signature(c.__init__).parameters for c in kind.__mro__)
    behind = "HybridEmbed" in repr(arguments.get("embed_layer"))  # convolutions
    is_flexible = kind.__name__ == "NaFlexVit"  # whose builder has taken the argument
    return (takes or is_flexible) and not behind and kind.__name__ not in OTHERS


OTHERS = {"ConvNeXt": "a stem", "RDNet": "a stem", "CrossVit": "patches of two sizes"}
