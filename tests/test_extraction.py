"""What is read out of an encoder, against timm's own pooling and the documented formulas."""

import inspect
import json
import re
from copy import deepcopy

import msgspec
import numpy as np
import pytest
import timm
import torch
from msgspec.structs import replace
from skimage import data as photos
from torch import nn

from glovita_lib import dist
from glovita_lib.data import ArraySource, Data, ImageSamples, Split
from glovita_lib.encoder import build_encoder
from glovita_lib.encoder_aggregation import served
from glovita_lib.errors import UserError
from glovita_lib.experiment import assemble
from glovita_lib.extraction import Extractor, grid_places
from glovita_lib.loader import Batch
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_encoders import TimmEncoder, TorchvisionEncoder
from glovita_lib.spec_root import Root
from glovita_lib.weights import weights_hash

IMAGES = ImageSamples(channels=3, bit_depth=8)
RANKS = dist.Ranks(0, 1, 0, torch.device("cpu"))
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "window_size": 2}

# model, its arguments, default method, number of prefix tokens
MODELS = {
    "ViT token": ("test_vit", {}, "cls_token", 1),
    "ViT avg": ("test_vit", {"global_pool": "avg"}, "avg", 1),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL, "cls_token", 5),
    "DINOv3 token": (
        "vit_small_patch16_dinov3",
        {**SMALL, "global_pool": "token"},
        "cls_token",
        5,
    ),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, "avg", 0),
    "ConvNeXt": ("test_convnext", {}, "avg", 0),
    "ResNet": ("test_resnet", {}, "avg", 0),
    "MobileNetV3": ("mobilenetv3_small_050", {}, "avg", 0),
    "no CLS, map pooling": ("vit_base_patch16_siglip_224", SMALL, "pooled", 0),
    "no CLS, avg": ("vit_base_patch16_siglip_gap_224", SMALL, "avg", 0),
    "registers, no CLS": ("test_vit4", {}, "avg", 1),
}
CLS = ("ViT token", "ViT avg", "DINOv3", "DINOv3 token")


def crops() -> np.ndarray:
    """Five crops (5, 3, 64, 64) of photographs."""
    images = [photos.chelsea(), photos.coffee(), photos.astronaut(), photos.rocket()]
    images = [image[60:188:2, 100:228:2] for image in images] + [images[0][:64, :64]]
    return np.stack(images).transpose(0, 3, 1, 2)


def extractor_of(name, model_kwargs=(), *, training=(), size=64, **extract) -> Extractor:
    """An extractor of random but generic weights, in float32 unless told otherwise."""
    encoder = {"type": name, "pretrained": False, "model_kwargs": dict(model_kwargs)}
    plain = {
        "data": {"dataset": "digits", "augmentation": {"image_size": size}},
        "model": {"encoder": {"encoder_type": "timm", **encoder}},
        "extract": {"precision": 32, **extract},
        "training": dict(training),
    }
    root = msgspec.convert(plain, Root)
    ids = ["cat", "cup", "woman", "rocket", "fur"]
    source = ArraySource(crops(), np.arange(5))
    split = Split(ids, np.arange(5) % 2, source)
    data = Data("photos", {"train": split}, "multiclass", ("a", "b"), IMAGES)
    experiment = assemble(root, resolve_spec(root, data), RANKS, load_weights=True)
    jitter(experiment.model.encoder)
    return Extractor(experiment, root.extract)


@torch.no_grad()
def jitter(module: nn.Module) -> None:
    """Norms and biases away from 1 and 0, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def batch() -> Batch:
    return Batch(torch.from_numpy(crops()), None, torch.arange(5), fitted=False)


def read(extractor: Extractor):
    return extractor(batch(), ids=["cat", "cup", "woman", "rocket", "fur"], augment=None)


def reference(extractor: Extractor, name: str, model_kwargs):
    """timm's own model with classifier and the same weights, raw features and pre-logits."""
    arguments = dict(model_kwargs)
    if name.startswith(("swin", "test_vit", "vit_base")):
        arguments["img_size"] = 64
    net = timm.create_model(name, num_classes=7, **arguments).eval()
    own = extractor.model.encoder.net.state_dict()
    missing, unexpected = net.load_state_dict(own, strict=False)
    assert not unexpected and all(
        key.startswith(("head.", "fc.", "classifier.")) for key in missing
    )
    x = extractor.experiment.objective.eval_inputs(torch.from_numpy(crops()), False, 0)
    with torch.no_grad():
        raw = net.forward_features(x)
        return net, x, raw, net.forward_head(raw, pre_logits=True)


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- pooled vectors


@pytest.mark.parametrize("row", MODELS.values(), ids=list(MODELS))
def test_the_librarys_own_pooling(row):
    name, kwargs, default, _ = row
    extractor = extractor_of(name, kwargs)
    net, x, _, own = reference(extractor, name, kwargs)
    assert extractor.method == default
    found = read(extractor).features
    own_call = "net.forward_head(net.forward_features(x), pre_logits=True)"
    is_own = extractor.attributes()["equals"] == own_call
    assert is_own == (found.shape == own.shape and np.allclose(found, own, 1e-4, 1e-4))
    assert is_own == (row is not MODELS["DINOv3"])  # timm pools by the mean, its authors by CLS
    assert own.shape[1] == net.head_hidden_size
    assert_close(read(extractor_of(name, kwargs, method="pooled")).features, own)
    if is_own:  # which is the model without its classifier
        net.reset_classifier(0)
        with torch.no_grad():
            assert_close(found, net(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_method_is_its_documented_formula(name):
    model, kwargs, _, n_prefix = MODELS[name]
    extractor = extractor_of(model, kwargs)
    net, _, raw, own = reference(extractor, model, kwargs)
    with torch.no_grad():
        tokens = net.fc_norm(raw) if name in ("ViT avg", "registers, no CLS") else raw
    if raw.ndim == 4:
        tokens = raw.flatten(1, 2) if name == "Swin" else raw.flatten(2).transpose(1, 2)
    patches = tokens[:, n_prefix:]
    avg = patches.mean(1)
    if not name.startswith(("ViT token", "DINOv3 token", "no CLS, map")):
        avg = own  # timm's avg: the mean with what is trained behind it
    expected = {"avg": avg, "sum": patches.sum(1), "mean_all": avg}
    if name in CLS:
        cls = tokens[:, 0]
        expected |= {"cls_token": cls, "joint": torch.cat([cls, avg], 1)}
        expected["mean_all"] = torch.cat([cls[:, None], patches], 1).mean(1)
    for method, formula in expected.items():
        extractor = extractor_of(model, kwargs, method=method)
        assert_close(read(extractor).features, formula)
        assert extractor.attributes()["aggregation"] == method
    for method in {"cls_token", "joint"} - set(expected):
        with pytest.raises(UserError, match=f'extract.method = "{method}": encoder {model}'):
            extractor_of(model, kwargs, method=method)


def test_the_mean_of_dinov3_leaves_registers_out():
    extractor = extractor_of("vit_small_patch16_dinov3", SMALL, method="avg")
    _, _, raw, own = reference(extractor, "vit_small_patch16_dinov3", SMALL)
    assert raw.shape == (5, 1 + 4 + 16, 32)
    found = read(extractor).features
    assert_close(found, raw[:, 5:].mean(1))
    assert_close(found, own)
    assert not np.allclose(found, raw[:, 1:].mean(1), atol=1e-2)


def evaluated(call: str, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The value of what a file says its features equal."""
    expression, _, maps = call.partition(", maps = ")
    with torch.no_grad():
        known = {"net": net, "x": x, "torch": torch}
        return eval(expression, {**known, "maps": eval(maps, known) if maps else None})


METHODS = ("avg", "patch_mean", "sum", "mean_all", "cls_token", "joint", "pooled")
FAMILIES = {  # random weights; small arguments where there are some
    "vit_tiny_patch16_224": SMALL, "deit_tiny_distilled_patch16_224": SMALL,
    "vit_medium_patch16_reg4_gap_256": SMALL,
    "eva02_tiny_patch14_224": {"embed_dim": 48, "depth": 3, "num_heads": 3},
    "beitv2_base_patch16_224": SMALL, "cait_xxs24_224": {**SMALL},
    "pit_ti_distilled_224": {}, "mobilenetv3_small_050": {}, "efficientnet_b0": {},
    "swinv2_tiny_window8_256": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    "convnext_atto": {}, "convnextv2_atto": {}, "regnetx_002": {}, "densenet121": {},
    "resnet18": {}, "vgg11": {}, "maxvit_pico_rw_256": {}, "coatnet_pico_rw_224": {},
    "pvt_v2_b0": {}, "poolformer_s12": {}, "mixer_s32_224": {}, "levit_128s": {},
    "efficientformer_l1": {}, "fastvit_t8": {}, "edgenext_xx_small": {}, "mobilevit_xxs": {},
    "repvgg_a0": {}, "ghostnet_050": {}, "hgnetv2_b0": {}, "xcit_nano_12_p16_224": {},
    "crossvit_tiny_240": {}, "davit_tiny": {}, "focalnet_tiny_srf": {}, "hiera_tiny_224": {},
    "coat_lite_tiny": {},
}  # fmt: skip


def compare_with_calls(name, kwargs, size=64):
    """Each readout of a model is, to the last digit but rounding, the call that it says it is; its
    raw tokens are timm's. Gives how many readouts there were."""
    first = extractor_of(name, kwargs, size=size, method=None)
    encoder = first.model.encoder
    asked = [{"method": m} for m in served(encoder)]
    if encoder.has_patches:
        asked += [{"output": "tokens", "prefix_tokens": keep} for keep in (False, True)]
        asked += [{"output": "map"}]
    if hasattr(encoder.net, "forward_intermediates"):
        layers = {"layers": (-1, 0)}
        asked += [{**layers, "norm": norm, "method": m} for norm in (False, True) for m in METHODS]
        asked += [{"layers": (-1,), "norm": n, "output": "map"} for n in (False, True)]
    done = 0
    for options in asked:
        try:
            extractor = Extractor(first.experiment, replace(first.spec, **options))
        except UserError:
            # this model cannot norm, has no such token, or its tokens are no grid
            assert "layers" in options or options.get("output") == "map"
            continue
        x = extractor.experiment.objective.eval_inputs(torch.from_numpy(crops()), False, 0)
        try:
            readout = read(extractor).features
        except UserError as error:
            assert "are no grid" in str(error)
            continue
        expected = evaluated(extractor.attributes()["equals"], extractor.model.encoder.net, x)
        if options.get("output") == "tokens":
            expected = expected.flatten(0, 1)
        np.testing.assert_allclose(readout, expected.numpy(), rtol=1e-5, atol=1e-5)
        done += 1
    return done


@pytest.mark.parametrize("name", MODELS)
def test_features_equal_the_calls_that_the_file_names(name):
    model, kwargs, *_ = MODELS[name]
    assert compare_with_calls(model, kwargs) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_a_family_equal_the_calls_that_the_file_names(name):
    fixed = timm.get_pretrained_cfg(name).input_size[-1]
    assert compare_with_calls(name, FAMILIES[name], size=fixed) >= 1


def assert_equal_to_features_only(name, kwargs, size=64):
    """The maps of the last layer, without a norm, are the last ones of timm's features_only with
    the same weights: no difference at all."""
    extractor = extractor_of(name, kwargs, output="map", layers=(-1,), norm=False, size=size)
    net = extractor.model.encoder.net
    takes_size = "img_size" in inspect.signature(type(net)).parameters
    arguments = {"img_size": size} if takes_size else {}
    only = timm.create_model(name, features_only=True, **(arguments | dict(kwargs))).eval()
    own = {key.replace(".", "_"): value for key, value in net.state_dict().items()}
    inner = re.compile(r"^(model|body)_")  # where timm's extractor keeps the network
    names = {key: inner.sub("", key.replace(".", "_")) for key in only.state_dict()}
    only.load_state_dict({key: own[name] for key, name in names.items()})
    x = extractor.experiment.objective.eval_inputs(torch.from_numpy(crops()), False, 0)
    with torch.no_grad():
        expected = only(x)[-1]
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        expected = expected.permute(0, 3, 1, 2)
    np.testing.assert_array_equal(read(extractor).features, expected.numpy())


@pytest.mark.parametrize("name", ["ViT token", "DINOv3", "Swin", "ConvNeXt", "ResNet"])
def test_maps_equal_those_of_features_only(name):
    assert_equal_to_features_only(*MODELS[name][:2])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_a_family_equal_those_of_features_only(name):
    fixed = timm.get_pretrained_cfg(name).input_size[-1]
    assert_equal_to_features_only(name, FAMILIES[name], size=fixed)


ENDS = {  # the layer that the tokens end in; none: an addition or activation is behind it
    ("timm", "test_vit"): "net.norm", ("timm", "swin_tiny_patch4_window7_224"): "net.norm",
    ("timm", "efficientnet_b0"): "net.bn2", ("timm", "densenet121"): "net.features.norm5",
    ("timm", "resnet18"): None, ("timm", "dla34"): None, ("timm", "convnext_atto"): None,
    ("torchvision", "resnet18"): None, ("torchvision", "swin_t"): "net.norm",
    ("torchvision", "vit_b_16"): "net.encoder.ln", ("torchvision", "convnext_tiny"): None,
}  # fmt: skip


@pytest.mark.parametrize("named", ENDS, ids=lambda row: " ".join(row))
def test_the_norm_that_a_file_names_gives_its_features(named):
    """To the last bit, as a map or as tokens; and none is named where it gives something else."""
    library, name = named
    struct = TimmEncoder if library == "timm" else TorchvisionEncoder
    size = 224 if name == "vit_b_16" else 96
    if name.startswith("swin"):
        size = 224
    spec = struct(type=name, pretrained=False)
    encoder = build_encoder(spec, channels=3, size=(size, size), load_weights=True).eval()
    jitter(encoder)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    said, outputs = encoder.last_norm(x), []
    norms = [n for n, m in encoder.named_modules() if "Norm" in type(m).__name__]
    end = ENDS[named] or norms[-1]
    hooked = encoder.get_submodule(end)
    hooked.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    with torch.no_grad():
        tokens = encoder(x).tokens
    last = outputs[-1]
    if ENDS[named] is None:
        assert said == "none at the end"
        assert last.shape != tokens.shape or not torch.equal(last, tokens)
        return
    assert said == f"{end}, the last of the forward pass"
    if last.ndim == 4:
        last = last.flatten(1, 2) if "swin" in name else last.flatten(2).transpose(1, 2)
    assert torch.equal(last, tokens)


VECTORS = {  # timm's model: size, the norms that its own vector ends in
    "test_vit": (96, "net.norm, the last of the forward pass"),
    "vit_base_patch16_clip_224": (64, "net.norm, the last of the forward pass"),
    "swin_tiny_patch4_window7_224": (224, "net.norm, the last of the forward pass"),
    "convnext_atto": (64, "net.head.norm, in the library's pooling"),
    "caformer_s18": (64, "net.head.norm, in the library's pooling"),
    "efficientnet_b0": (64, "net.bn2, the last of the forward pass"),
    "mobilevit_xxs": (64, "net.final_conv.bn, the last of the forward pass"),
    "resnet18": (64, "none at the end"),
    "mobilenetv3_small_050": (64, "none at the end"),
    "crossvit_tiny_240": (240, "net.norm.0, net.norm.1, the last of the forward pass"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_norm_of_a_vector_is_that_which_gives_it(name):
    """Not that of the tokens, where the library pools and goes on."""
    size, wanted = VECTORS[name]
    kwargs = {"depth": 1} if name.startswith("vit") else {}
    extractor = extractor_of(name, kwargs, size=size, method="pooled")
    jitter(extractor.model.encoder)
    net, outputs = extractor.model.encoder.net.eval(), {}
    said = extractor.attributes()["norm"]
    assert said == wanted
    for part, module in net.named_modules():
        module.register_forward_hook(lambda m, i, o, n=part: outputs.update({n: deepcopy(o)}))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        vector = net.forward_head(net.forward_features(x), pre_logits=True)
    if "pooling" in said:
        assert torch.equal(outputs["head.norm"].flatten(1), vector)
    elif said == "none at the end":
        assert not any(torch.equal(o.flatten(1), vector) for n, o in outputs.items() if "bn" in n)


# ---------------------------------------------------------------------- tokens, maps, layers


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["ViT token", "ViT avg", "DINOv3", "Swin", "ResNet"])
def test_tokens_are_those_of_timm(name, keep):
    model, kwargs, _, n_prefix = MODELS[name]
    extractor = extractor_of(model, kwargs, output="tokens", prefix_tokens=keep)
    net, _, raw, _ = reference(extractor, model, kwargs)
    readout = read(extractor)
    with torch.no_grad():
        raw = net.fc_norm(raw) if name == "ViT avg" else raw
    if raw.ndim == 4:
        raw = raw.flatten(1, 2) if name == "Swin" else raw.flatten(2).transpose(1, 2)
    tokens = raw if keep else raw[:, n_prefix:]
    assert_close(readout.features, tokens.flatten(0, 1))
    assert readout.instances.lengths.tolist() == [tokens.shape[1]] * 5
    side = round((raw.shape[1] - n_prefix) ** 0.5)
    grid = [(row, column) for row in range(side) for column in range(side)]
    places = [(-1, -1)] * (n_prefix * keep) + grid
    assert readout.instances.coords.tolist() == [list(place) for place in places] * 5
    says = extractor.attributes()["prefix_tokens"]
    kinds = ["cls", *["register"] * (n_prefix - 1)][:n_prefix]
    assert says == (f"in: {', '.join(kinds) or 'there are none'}" if keep else "out")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["ViT token", "DINOv3", "Swin", "ConvNeXt"])
def test_maps_are_those_of_timm(name, norm):
    model, kwargs, *_ = MODELS[name]
    asked = (-1,) if name in ("Swin", "ConvNeXt") else (2, -1, 0, 2)
    extractor = extractor_of(model, kwargs, output="map", layers=asked, norm=norm)
    net, x, _, _ = reference(extractor, model, kwargs)
    with torch.no_grad():
        own = net.forward_intermediates(x, norm=norm, intermediates_only=True)  # NCHW
    found = read(extractor).features
    assert_close(found, torch.cat([own[layer] for layer in asked], 1))
    attributes = extractor.attributes()
    assert json.loads(attributes["layers"]) == [layer % len(own) for layer in asked]
    assert (attributes["layout"], attributes["prefix_tokens"]) == ("(N, C, H, W)", "out")
    with torch.no_grad():
        raw = net.forward_intermediates(x, norm=False, intermediates_only=True)
        differs = any(not torch.equal(own[layer], raw[layer]) for layer in asked)
    assert ("final norm" in attributes["norm"]) == differs


def test_a_map_without_layers_is_the_normed_output():
    extractor = extractor_of("test_vit", output="map")
    net, x, raw, _ = reference(extractor, "test_vit", {})
    expected = raw[:, 1:].transpose(1, 2).reshape(5, 64, 4, 4)
    assert_close(read(extractor).features, expected)
    with torch.no_grad():
        (last,) = net.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert_close(read(extractor).features, last)


def test_vectors_of_layers():
    extractor = extractor_of("test_vit", layers=(-1, 1))
    net, x, raw, _ = reference(extractor, "test_vit", {})
    with torch.no_grad():
        own = net.forward_intermediates(
            x, norm=True, intermediates_only=True, return_prefix_tokens=True
        )
    cls = [prefix[:, 0] for _, prefix in own]
    assert_close(read(extractor).features, torch.cat([cls[-1], cls[1]], 1))
    assert_close(read(extractor).features[:, :64], raw[:, 0])
    mean = extractor_of("test_vit", layers=(-1, 1), method="avg", norm=False)
    with torch.no_grad():
        own = net.forward_intermediates(x, norm=False, intermediates_only=True)
    assert_close(read(mean).features, torch.cat([own[-1].mean((2, 3)), own[1].mean((2, 3))], 1))
    assert mean.attributes()["norm"] == "raw layers [5, 1]"
    assert extractor.attributes()["norm"] == "final norm on layers [1, 5]"


def test_stopping_early_does_not_leak_into_the_output():
    """timm's stop_early gives norm(block) as the final output; ours is always the whole model."""
    extractor = extractor_of("test_vit", layers=(0,))
    first = read(extractor).features
    whole = extractor.model.embed(
        extractor.experiment.objective.eval_inputs(torch.from_numpy(crops()), False, 0), "cls_token"
    )
    _, _, _, own = reference(extractor, "test_vit", {})
    assert_close(whole.detach().numpy(), own)
    assert not np.allclose(first, own, atol=0.1)


def test_layers_that_cannot_be_put_together():
    with pytest.raises(UserError, match=r"different grids \(16x16, 4x4\)"):
        extractor_of("swin_tiny_patch4_window7_224", SWIN, output="map", layers=(0, -1))
    widths = extractor_of("swin_tiny_patch4_window7_224", SWIN, layers=(0, -1))  # vectors can
    assert read(widths).features.shape == (5, 16 + 64)
    with pytest.raises(UserError, match=r'method = "joint": the layers \[1\] .* have no CLS'):
        extractor_of("xcit_nano_12_p16_224", SMALL, layers=(1,), method="joint")
    assert extractor_of("xcit_nano_12_p16_224", SMALL, layers=(1,)).method == "avg"
    with pytest.raises(
        UserError, match=r"are not pooled; valid: avg, patch_mean, sum, mean_all, c"
    ):
        extractor_of("test_vit", layers=(1,), method="pooled")


def test_output_that_an_encoder_does_not_have():
    with pytest.raises(UserError, match='output = "map": encoder pit_ti_224 gives one vector'):
        pit = {"model_kwargs": {"depth": (1, 1, 1), "base_dims": (8, 8, 8), "heads": (1, 1, 1)}}
        extractor_of("pit_ti_224", output="map", **pit)


def test_places_of_tokens():
    assert grid_places((1, 2), 2, 4).tolist() == [[-1, -1], [-1, -1], [0, 0], [0, 1]]
    assert grid_places(None, 1, 3).tolist() == [[-1, -1], [0, 0], [0, 1]]
    assert grid_places((2, 1, 2), 0, 4).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


# ---------------------------------------------------------------------- numbers


@torch.no_grad()
def scale(extractor: Extractor, factor: float) -> None:
    extractor.model.encoder.net.norm.weight.mul_(factor)


def test_float16_is_the_rounded_float32():
    wide, narrow = extractor_of("test_vit"), extractor_of("test_vit", precision=16)
    stored = read(narrow).features
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, read(wide).features.astype(np.float16))


@pytest.mark.parametrize("output", ["embedding", "tokens", "map"])
def test_an_overflow_of_float16_is_named(output):
    method = {"method": "sum"} if output == "embedding" else {}
    extractor = extractor_of("test_vit", precision=16, output=output, **method)
    read(extractor)
    largest = np.abs(read(extractor_of("test_vit", output=output, **method)).features).max()
    scale(extractor, 1e6 / largest)
    with pytest.raises(UserError, match=r"features up to .*e\+0\d overflow float16") as caught:
        read(extractor)
    text = str(caught.value)
    assert "sample cat and 4 more of its batch" in text and "extract.precision = 32" in text
    assert ("another extract.method than sum" in text) == (output == "embedding")
    with torch.no_grad():  # one sample alone
        few = Batch(batch().inputs[3:4], None, torch.tensor([3]), fitted=False)
    with pytest.raises(UserError, match=r"in sample rocket; set"):
        extractor(few, ids=["", "", "", "rocket"], augment=None)


def test_what_float32_holds_is_no_overflow():
    extractor = extractor_of("test_vit", method="sum")
    scale(extractor, 1e6)
    assert np.isfinite(read(extractor).features).all()


def test_just_below_the_limit_is_no_overflow():
    largest = np.abs(read(extractor_of("test_vit", method="sum")).features).max()
    extractor = extractor_of("test_vit", method="sum", precision=16)
    net = extractor.model.encoder.net
    with torch.no_grad():
        net.norm.bias.zero_()
        net.norm.weight.fill_(1)
    largest = float(np.abs(read(extractor).features.astype(np.float64)).max())
    scale(extractor, 65_000 / largest)
    assert np.abs(read(extractor).features).max() > 64_000


@pytest.mark.parametrize("precision", [16, 32])
def test_nan_is_never_written(precision):
    extractor = extractor_of("test_vit", precision=precision)
    scale(extractor, float("nan"))
    with pytest.raises(UserError, match="NaN or infinite features for sample cat and 4 more"):
        read(extractor)


def test_bfloat16_on_the_cpu():
    exact = read(extractor_of("test_vit")).features
    extractor = extractor_of("test_vit", training={"precision": "bf16"})
    rough = read(extractor).features
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1
    assert extractor.attributes()["compute_precision"] == "bf16"


@pytest.mark.parametrize("precision", [16, 32])
@pytest.mark.parametrize("output", ["embedding", "tokens", "map"])
@pytest.mark.parametrize("layers", [(), (0, -1)])
def test_bytes_of_a_sample(output, layers, precision):
    extractor = extractor_of("test_vit", output=output, layers=layers, precision=precision)
    assert extractor.sample_bytes * 5 == read(extractor).features.nbytes


def test_a_batch_begins_before_the_one_ahead_is_finished():
    """Nothing of a batch is waited for until then, and what is kept of it is its own memory."""
    extractor = extractor_of("test_vit")
    first, second = (extractor.start(batch(), augment=None) for _ in range(2))
    found = extractor.finish(first, ids=[""] * 5)
    np.testing.assert_array_equal(found.features, extractor.finish(second, ids=[""] * 5).features)
    np.testing.assert_array_equal(found.features, read(extractor).features)
    assert found.samples == 5
    base = found.features if found.features.base is None else found.features.base
    assert base.nbytes == found.features.nbytes  # not a view of all tokens


def test_a_hash_of_the_weights():
    first, second = extractor_of("test_vit"), extractor_of("test_vit", method="avg")
    assert first.weights_sha256 == second.weights_sha256
    with torch.no_grad():
        second.model.head.linear.weight.add_(1)
    assert weights_hash(second.model.encoder) == first.weights_sha256  # the head is not read out
    with torch.no_grad():
        second.model.encoder.net.norm.bias[0] += 1e-3
    assert weights_hash(second.model.encoder) != first.weights_sha256
