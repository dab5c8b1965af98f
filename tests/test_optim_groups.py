"""Layer, learning-rate factor and weight decay of every parameter: against timm's own functions
over all of timm, torchvision's networks against timm's of the same name, a recipe step by step."""

import json
from collections import Counter

import pytest
import timm
import torch
from small_runs import TINY
from test_trainer import RANKS, root_of
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import _registry
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.experiment import assemble, build_trainer, read_data
from glovita_lib.model import build_model
from glovita_lib.network import block_names, is_spared
from glovita_lib.optim import build_optimizer, check_groups, group_lines, placed_parameters
from glovita_lib.peft_base import apply_peft
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_encoders import CustomEncoder, TimmEncoder, TorchvisionEncoder
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import (
    FullFinetuning,
    Lora,
    PartialFinetuning,
    Ssf,
    Vera,
    VisualPromptTuning,
)
from glovita_lib.spec_train import Optimizer
from glovita_lib.trainer import Hooks

DECAY, WEIGHT_DECAY = 0.65, 0.05
RECIPE = Optimizer(layer_wise_lr_decay=DECAY, undecay_norm=True, weight_decay=WEIGHT_DECAY)

# One model of each module of timm, the smallest.
MODELS = json.loads("""{
"beit": "beit_base_patch16_224", "byoanet": "eca_botnext26ts_256", "byobnet": "test_byobnet",
"cait": "cait_xxs24_224", "coat": "coat_tiny", "convit": "convit_tiny",
"convmixer": "convmixer_768_32", "convnext": "test_convnext", "cpubone": "cpubone_nano",
"crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
"cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m",
"deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c", "dpn": "dpn48b",
"edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
"efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet",
"efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0",
"efficientvit_msra": "efficientvit_m0", "eva": "vit_tiny_patch16_dinov3_qkvb",
"fasternet": "fasternet_t0", "fastvit": "fastvit_s12", "focalnet": "focalnet_tiny_srf",
"gcvit": "gcvit_xxtiny", "gemma4_vit": "gemma4_vit_167m", "ghostnet": "ghostnet_050",
"hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224",
"hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_s",
"inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
"inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small",
"levit": "levit_128s", "lowformer": "lowformer_b0", "mambaout": "test_mambaout",
"maxxvit": "test_coatnet", "metaformer": "poolformer_s12", "mlp_mixer": "gmixer_12_224",
"mobilenetv3": "mobilenetv3_small_050", "mobilenetv5": "mobilenetv5_base",
"mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny", "naflexvit": "naflexvit_base_patch16_gap",
"nasnet": "nasnetalarge", "nest": "nest_tiny", "nextvit": "nextvit_small", "nfnet": "test_nfnet",
"pit": "pit_xs_224", "pnasnet": "pnasnet5large", "pvt_v2": "pvt_v2_b0",
"qwen3_vit": "qwen3_vit_88m", "rdnet": "rdnet_tiny", "regnet": "regnetx_002",
"repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net": "res2net50_14w_8s",
"resnest": "resnest14d", "resnet": "test_resnet", "resnetv2": "resnetv2_18",
"rexnet": "rexnet_100", "selecsls": "selecsls42", "senet": "legacy_seresnet18",
"sequencer": "sequencer2d_s", "shvit": "shvit_s1", "sknet": "skresnet18",
"starnet": "starnet_s050", "swiftformer": "swiftformer_xs",
"swin_transformer": "swin_tiny_patch4_window7_224",
"swin_transformer_v2": "swinv2_tiny_window8_256",
"swin_transformer_v2_cr": "swinv2_cr_tiny_224", "tiny_vit": "tiny_vit_5m_224",
"tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m", "twins": "twins_svt_small",
"vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer": "test_vit",
"vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
"vision_transformer_relpos": "test_vit_relpos",
"vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224",
"volo": "volo_d1_224", "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception",
"xception_aligned": "xception41p", "xcit": "xcit_nano_12_p8_224"
}""")

# What differs from timm's functions, and why.
NO_MATCHER = {"csatv2", "metaformer", "pit"}
"""They have no group_matcher: timm cuts the list of their parameters into pieces of twelve."""
NO_LIST = {
    "byoanet": {"height_rel", "width_rel"},  # relative positions
    "edgenext": {"temperature"},
    "nfnet": {"gain"},
    "visformer": {"pos_embed1", "pos_embed2", "pos_embed3"},
}
"""They have no no_weight_decay(), so timm lets these decay, which are factors or positions."""

EVERY_DAY = {
    "beit", "coat", "convnext", "crossvit", "edgenext", "efficientnet", "eva", "hieradet_sam2",
    "levit", "mambaout", "mobilenetv3", "mvitv2", "nfnet", "pit", "resnet", "swin_transformer",
    "swin_transformer_v2", "tnt", "twins", "visformer", "vision_transformer", "xcit",
}  # fmt: skip


def swept():
    """A model of every module that this timm has; those of EVERY_DAY each time."""
    for module in sorted(_registry.list_modules()):
        names = timm.list_models(module=module)
        name = MODELS.get(module)
        if names:
            marks = () if module in EVERY_DAY else pytest.mark.slow
            yield pytest.param(module, name if name in names else names[0], marks=marks, id=module)


def built(encoder, peft=FullFinetuning(), size=None, channels=3):  # noqa: B008
    """The model of an encoder."""
    return build_model(
        ModelSpec(encoder=encoder),
        peft,
        outputs=10,
        channels=channels,
        size=size,
        load_weights=False,
    )


def of_timm(name):
    """timm's own model with a classifier; of its shapes alone where that is possible."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=10)
    except (RuntimeError, NotImplementedError, ValueError):
        return timm.create_model(name, num_classes=10)


def by_parameter(groups, what):
    return {id(p): group[what] for group in groups for p in group["params"]}


@pytest.mark.parametrize(("module", "name"), list(swept()))
def test_groups_and_frozen_layers_are_those_of_timm(module, name):
    reference = of_timm(name)
    listed = reference.no_weight_decay() if hasattr(reference, "no_weight_decay") else ()
    arguments = {"weight_decay": WEIGHT_DECAY, "no_weight_decay_list": listed}
    groups = param_groups_layer_decay(reference, layer_decay=DECAY, **arguments)
    rate = by_parameter(groups, "lr_scale")
    decays = [by_parameter(groups, "weight_decay")]
    decays += [by_parameter(param_groups_weight_decay(reference, **arguments), "weight_decay")]
    theirs = dict(reference.named_parameters())

    model = built(TimmEncoder(type=name, pretrained=False))
    ours = {one.name.removeprefix("encoder.net."): one for one in placed_parameters(model, RECIPE)}
    head = [ours.pop(one.name) for one in [*ours.values()] if one.name.startswith("head.")]
    shared = ours.keys()
    assert shared <= theirs.keys()
    of_head = {rate[id(p)] for n, p in theirs.items() if n not in shared}
    assert {one.lr_scale for one in head} == of_head

    other = {n for n in shared if ours[n].lr_scale != pytest.approx(rate[id(theirs[n])])}
    # one that matches nothing, as LeViT's in older versions, is none
    unsaid = module in NO_MATCHER or set(rate.values()) == {1.0}
    assert bool(other) == unsaid
    assert module not in NO_MATCHER or not hasattr(reference, "group_matcher")
    for decay in decays:
        other = {n for n in shared if ours[n].weight_decay != decay[id(theirs[n])]}
        assert {n.rpartition(".")[2] for n in other} == NO_LIST.get(module, set())
    assert module not in NO_LIST or not hasattr(reference, "no_weight_decay")
    if unsaid:
        return

    # timm leaves out what learns at less than a rate: a depth
    layers = model.encoder.depths().layers
    deepest = max(one.layer for one in [*head, *ours.values()])
    for count in {1, layers // 2, layers} - {0}:
        model.requires_grad_(True)
        apply_peft(PartialFinetuning(num_frozen_layers=count), model)
        reference.requires_grad_(True)
        param_groups_layer_decay(
            reference, layer_decay=DECAY, no_opt_scale=DECAY ** (deepest - count - 0.5)
        )
        for n in shared:
            assert ours[n].parameter.requires_grad == theirs[n].requires_grad, (count, n)


def test_every_module_of_timm_is_swept():
    """Models that this timm does not have yet are none of it."""
    known = {m: n for m, n in MODELS.items() if timm.is_model(n)}
    assert {m for m in _registry.list_modules() if timm.list_models(module=m)} >= set(known)
    assert {*NO_MATCHER, *NO_LIST, *EVERY_DAY} <= set(MODELS)


@pytest.mark.parametrize(
    ("name", "counterpart", "spares_alike"),
    [
        ("resnet18", "resnet18", True),
        ("regnet_y_400mf", "regnety_004", True),
        ("convnext_tiny", "convnext_tiny", True),  # layer_scale (96, 1, 1) there, (96,) here
        ("swin_t", "swin_tiny_patch4_window7_224", True),
        ("swin_v2_t", "swinv2_tiny_window8_256", False),  # timm names its position networks too
        ("vit_b_16", "vit_base_patch16_224", True),
    ],
)
def test_networks_of_torchvision_have_the_layers_of_their_counterparts(
    name, counterpart, spares_alike
):
    """Numbers of values by layer, and those that decay by layer."""
    counts = []
    for encoder in (
        TorchvisionEncoder(type=name, pretrained=False),
        TimmEncoder(type=counterpart, pretrained=False),
    ):
        size = timm.get_pretrained_cfg(counterpart).input_size[1:]
        values, decayed = Counter(), Counter()
        for one in placed_parameters(built(encoder, size=size), RECIPE):
            values[one.layer] += one.parameter.numel()
            decayed[one.layer] += one.parameter.numel() * (one.weight_decay > 0)
        counts.append((values, decayed))
    (values, decayed), (expected, also) = counts
    if name == "swin_v2_t":  # timm has three biases in a row where torchvision has one of zeros
        assert values.keys() == expected.keys()
        assert all(0 <= values[n] - expected[n] <= 0.001 * values[n] for n in values)
    else:
        assert values == expected
    if spares_alike:
        assert decayed == also


# ------------------------------------------------------------------------- networks of no library


class Block(nn.Module):
    """Two convolutions, and a part that others call too, which is none of its children."""

    def __init__(self, width, shared=()):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.shared = shared

    def forward(self, x):
        for part in self.shared:
            x = x + part(x)
        return x + self.outer(self.inner(x).relu())


class Scattered(nn.Module):
    """Two stages: norm, blocks, embeddings and positions are registered in no order of use, and the
    blocks of the second stage share a position encoding."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1))
        self.final_norm = nn.LayerNorm(8)
        self.stage2 = nn.ModuleList([Block(8, (self.shared,)) for _ in range(2)])
        self.stage1 = nn.ModuleList([Block(4) for _ in range(2)])
        self.embeds = nn.ModuleList([nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)])
        self.pos = nn.ParameterList([torch.zeros(4, 4, 4), torch.zeros(8, 2, 2)])
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.table = nn.Embedding(4, 4)
        self.mix = nn.Parameter(torch.eye(8))

    def forward(self, x):
        x = self.embeds[0](x) + self.pos[0] + self.table(torch.arange(4, device=x.device))
        for block in self.stage1:
            x = block(x)
        x = self.embeds[1](x) + self.pos[1]
        for block in self.stage2:
            x = block(x)
        x = torch.einsum("bchw,cd->bdhw", self.layer_scale * x, self.mix)
        return self.final_norm(x.movedim(1, 3)).movedim(3, 1)


def scattered(input_channels):
    return Scattered()


def test_layers_are_in_the_order_of_use_not_of_registration():
    model = built(CustomEncoder(target="tests.test_optim_groups:scattered"), size=(8, 8))
    blocks = ("stage1.0", "stage1.1", "stage2.0", "stage2.1")
    assert model.encoder.block_names == blocks
    placed = {
        one.name.removeprefix("encoder.net."): one for one in placed_parameters(model, RECIPE)
    }
    expected = {"embeds.0": 0, "pos.0": 0, "table": 0, "embeds.1": 3, "pos.1": 3, "shared": 3}
    expected |= {name: number for number, name in enumerate(blocks, 1)}
    expected |= {"layer_scale": 4, "mix": 4, "final_norm": 4, "head": 5}
    for name, one in placed.items():
        (part,) = [part for part in expected if f"{name}.".startswith(f"{part}.")]
        assert one.layer == expected[part], name
    spared = {name for name, one in placed.items() if not one.weight_decay}
    assert {name for name in spared if placed[name].parameter.ndim > 1} == {
        "pos.0", "pos.1", "layer_scale", "table.weight",
    }  # fmt: skip

    apply_peft(PartialFinetuning(num_frozen_layers=2), model)
    frozen = {n.removeprefix("encoder.net.") for n, p in model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert {n.rpartition(".")[0] for n in frozen} == {
        "embeds.0", "pos", "table", *(f"stage1.{i}.{n}" for i in (0, 1) for n in ("inner", "outer"))
    }  # fmt: skip
    assert "pos.1" not in frozen


@pytest.mark.parametrize(
    ("name", "spared"),
    [("pos_embed", True), ("posEmbed", True), ("positionEmbedding2", True), ("clsToken", True),
     ("position_bias", True), ("mix", False), ("composeEmbedder", False)],
)  # fmt: skip
def test_words_of_a_parameter_are_told_apart_in_either_spelling(name, spared):
    parameter = nn.Parameter(torch.zeros(1, 16, 16))
    assert is_spared(nn.Module(), "body", name, parameter) is spared


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_vit", num_classes=0)

    def forward(self, x):
        return self.backbone.forward_features(x)


def scripted(input_channels):
    """A network that no hook sees."""
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3)
    return torch.jit.script(nn.Sequential(*parts))


def around(input_channels):
    return Around()


def test_a_network_of_timm_inside_ones_own_class_is_asked():
    mine = built(CustomEncoder(target="tests.test_optim_groups:around"), size=(160, 160))
    plain = built(TimmEncoder(type="test_vit", pretrained=False))
    expected = {
        one.name.replace("net.", "net.backbone."): (one.layer, one.lr_scale, one.weight_decay)
        for one in placed_parameters(plain, RECIPE)
    }
    found = placed_parameters(mine, RECIPE)
    assert {one.name: (one.layer, one.lr_scale, one.weight_decay) for one in found} == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layers_of_a_scripted_network_are_in_the_order_of_registration():
    model = built(CustomEncoder(target="tests.test_optim_groups:scripted"), size=(8, 8))
    layers = {one.name: one.layer for one in placed_parameters(model, RECIPE)}
    numbers = {"0": 1, "1": 1, "3": 2}
    assert layers == {
        **{f"encoder.net.{n}.{p}": i for n, i in numbers.items() for p in ("weight", "bias")},
        **{f"head.linear.{p}": 3 for p in ("weight", "bias")},
    }


# ------------------------------------------------------------------------- added by PEFT methods

SMALL = TimmEncoder(
    type="test_vit",
    pretrained=False,
    model_kwargs={"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
)


@pytest.mark.parametrize(
    ("peft", "added"),
    [
        (Lora(targets=("qkv",)), {1, 2, 3}),
        (VisualPromptTuning(deep=True), {1, 2, 3}),
        (VisualPromptTuning(deep=False, project_dim=4), {1, 4}),  # the projection serves all
        (Ssf(), {0, 1, 2, 3}),
        (Vera(), {1, 2, 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_method_adds_is_as_deep_as_what_it_changes(peft, added):
    model = built(SMALL, peft, size=(8, 8))
    placed = [one for one in placed_parameters(model, RECIPE) if one.parameter.requires_grad]
    assert {one.layer for one in placed if one.name.startswith("encoder.")} == added
    assert {one.layer for one in placed if one.name.startswith("head.")} == {4}
    for one in placed:
        prompt = one.name.endswith(".tokens")
        spared = one.parameter.ndim <= 1 or prompt
        assert one.weight_decay == (0.0 if spared else WEIGHT_DECAY), one.name
        assert one.lr_scale == pytest.approx(DECAY ** (4 - one.layer))


# ------------------------------------------------------------------------- a recipe, step by step

RECIPE_SPEC = (
    TINY.replace(", proj_drop_rate = 0.1", "")
    .replace("embed_dim = 16, depth = 2", "embed_dim = 16, depth = 3")
    .replace("epochs = 2", "epochs = 14\nema_decay = 0.95")
    .replace("lr = 1e-3", "lr = 3e-3\nweight_decay = 0.05\nlayer_wise_lr_decay = 0.65")
    .replace("[logger]", "undecay_norm = true\nwarmup_epochs = 3\nmin_lr = 1e-5\n[logger]")
    .replace("bootstrap = 0", "bootstrap = 0\nlabel_smoothing = 0.1")
)
STEPS = 50


def test_a_vit_recipe_moves_every_parameter_as_plain_timm_code_does(tmp_path):
    root = root_of(tmp_path, RECIPE_SPEC)
    data = read_data(root, RANKS)
    experiment = assemble(root, resolve_spec(root, data), RANKS, load_weights=False)
    model = experiment.model.double()
    experiment.objective.criterion.double()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batches, states = [], []

    def take(module, arguments):
        batches.append(tuple(value.clone() for value in arguments))
        return (arguments[0].double(), *arguments[1:])

    model.register_forward_pre_hook(take)
    trainer = build_trainer(experiment, data, Hooks(*[lambda *a: None] * 3))
    trainer.val_loader = None
    step = trainer.optimizer_step

    def stepped():
        step()
        average = dict(trainer.ema.module.named_parameters())
        states.append({n: (p.detach().clone(), average[n].detach().clone())
                       for n, p in model.named_parameters()})  # fmt: skip

    trainer.optimizer_step = stepped
    trainer.fit()
    warmup, total = trainer.schedule.warmup, trainer.schedule.total
    assert len(states) == total >= STEPS and warmup == 12

    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    reference = timm.create_model("test_vit", num_classes=10, img_size=8, in_chans=1, **kwargs)
    reference = reference.double().train()
    reference.load_state_dict({in_timm(name): value for name, value in start.items()})
    optimizer = create_optimizer_v2(
        reference, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.65
    )
    # the peak is the last step of the warm-up and the first of the cosine
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=1e-5,
        warmup_t=warmup - 1,
        warmup_lr_init=3e-3 / warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    average = ModelEmaV3(reference, decay=0.95)
    loss = LabelSmoothingCrossEntropy(0.1)
    for number, (x, y) in enumerate(batches[:STEPS]):
        scheduler.step_update(number if number < warmup else number - 1)
        optimizer.zero_grad()
        loss(reference(x.double()), y).backward()
        optimizer.step()
        average.update(reference, step=number + 1)
        averaged = dict(average.module.named_parameters())
        found = {in_timm(n): values for n, values in states[number].items()}
        for name, parameter in reference.named_parameters():
            where = f"step {number + 1}, {name}"
            torch.testing.assert_close(
                found[name][0], parameter.detach(), rtol=0, atol=1e-5, msg=where
            )
            torch.testing.assert_close(
                found[name][1], averaged[name], rtol=0, atol=1e-5, msg=f"average at {where}"
            )


def in_timm(name):
    """The name of a parameter in timm's own model."""
    return name.removeprefix("encoder.net.").replace("head.linear.", "head.")


# ------------------------------------------------------------------------- the table


def test_the_table_has_every_group_from_stem_to_head():
    model = built(SMALL, size=(8, 8))
    lines = group_lines(model, RECIPE).splitlines()
    assert " ".join(lines[0].split()) == "group layers lr factor weight decay tensors values"
    rows = [line.replace(",", "").split() for line in lines[1:]]
    assert [int(row[1]) for row in rows] == sorted(int(row[1]) for row in rows)
    assert {row[1]: float(row[2]) for row in rows} == pytest.approx(
        {str(layer): round(DECAY ** (4 - layer), 5) for layer in range(5)}, rel=1e-3
    )
    assert {row[3] for row in rows} == {"0", "0.05"}
    parameters = list(model.parameters())
    assert sum(int(row[4]) for row in rows) == len(parameters)
    assert sum(int(row[5]) for row in rows) == sum(p.numel() for p in parameters)
    one = group_lines(model, Optimizer()).splitlines()[1:]
    assert len(one) == 1 and one[0].split()[1:4] == ["0", "to", "4"]


def test_a_state_of_other_groups_is_refused():
    """As of a run that another version of timm has begun."""
    model = built(SMALL, size=(8, 8))
    saved = build_optimizer(model, RECIPE).state_dict()
    check_groups(build_optimizer(model, RECIPE), saved)
    saved["param_groups"][0]["lr_scale"] *= DECAY
    with pytest.raises(UserError, match="counts layers otherwise"):
        check_groups(build_optimizer(model, RECIPE), saved)


def test_a_block_of_one_kernel_is_a_block_where_others_of_its_kind_have_more() -> None:
    """Fused blocks without expansion in torchvision's EfficientNetV2, as timm counts them."""
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.efficientnet_v2_s(weights=None)
        theirs = timm.create_model("tf_efficientnetv2_s", pretrained=False)
    names = block_names(model)
    assert names[:3] == ("features.1.0", "features.1.1", "features.2.0")
    assert len(names) == sum(map(len, theirs.blocks)) == 40
