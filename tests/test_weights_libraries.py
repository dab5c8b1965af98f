"""Weights from files against the libraries' own loading of them: every module of timm, every family
of torchvision, bare and behind a prefix, with another class count, size and number of channels.

`python tests/test_weights_libraries.py` prints the table of the whole sweep.
"""

import hashlib
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import timm
import torch
import torchvision
from small_runs import RESNET
from timm.models import adapt_input_conv
from torch import Tensor, nn

from glovita_lib.encoder import build_encoder
from glovita_lib.errors import UserError, listed
from glovita_lib.spec_encoders import TimmEncoder, TorchvisionEncoder

SMALLEST = (
    "beit_base_patch16_224",
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "samvit_base_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
    # heads and converters of their own
    "caformer_s18",
    "deit_tiny_distilled_patch16_224",
    "flexivit_small",
)
"""The smallest model of each module of timm, and some more."""

FEW = (1, 1, 1, 1)
SHALLOW = {
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2},
    "cait_xxs24_224": {"depth": 2},
    "sequencer2d_s": {"layers": FEW},
    "davit_tiny": {"depths": FEW},
    "swinv2_tiny_window16_256": {"depths": FEW},
    "swinv2_cr_tiny_224": {"depths": FEW},
    "twins_svt_small": {"depths": FEW},
    "tresnet_m": {"layers": FEW},
}
"""Arguments that make large ones smaller."""

FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16"),
)
"""A small model of each family of torchvision."""


@dataclass(frozen=True)
class Case:
    """How a file differs from what is built."""

    prefix: str = ""
    classes: int | None = None  # of the file; none: those of the published weights
    size: str = "own"  # of what is built; "half" or "own"
    channels: int = 3  # of what is built


CASES = (
    Case(),
    Case(prefix="module.encoder.net.", classes=7, size="half", channels=1),
    Case(prefix="teacher.backbone.", size="half"),
    Case(classes=7, channels=4),
)


def filled(net: nn.Module) -> dict[str, Tensor]:
    """A state dict of random numbers, so that nothing agrees by its initial value."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in net.state_dict().items()
    }


def outcome(reference, ours, size: int) -> str:
    """What came of loading a file with the library and with ours.

    Args:
        reference: builds the library's network from a seed.
        ours: builds our network.
        size: of the images that are built for.
    """
    theirs, taken = attempt(reference, 0), attempt(ours)
    if isinstance(theirs, Exception):
        return "refused by both" if isinstance(taken, Exception) else "taken by us alone"
    if isinstance(taken, Exception):
        if "does not take images" in str(taken) and not runs(theirs, size):
            return "refused by both"
        other = reference(1).state_dict()
        if any(not torch.equal(t, other[n]) for n, t in theirs.state_dict().items()):
            return "left random by the library, refused by us"
        return f"refused by us alone: {str(taken)[:600]}"
    own, published = (
        {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}
        for net in (taken, theirs)
    )
    wrong = [n for n, t in own.items() if n not in published or not torch.equal(t, published[n])]
    more = [n for n in published if n not in own and not n.startswith(CLASSIFIERS)]
    return f"different: {wrong} {more}" if wrong or more else "equal"


CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits.")
"""What torchvision's networks have and ours have not."""


def runs(net: nn.Module, size: int) -> bool:
    """Whether a network takes images of a size, and of the channels that it was built for."""
    channels = next(m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    try:
        net.eval()(torch.zeros(1, channels, size, size))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def attempt(build, *arguments, **options):
    """A network, or the error instead of it."""
    try:
        return build(*arguments, **options)
    except (UserError, RuntimeError, AssertionError, ValueError, TypeError, KeyError) as error:
        return error


def timm_outcome(name: str, case: Case, folder: Path) -> str:
    """A model's own file, given to timm and to us."""
    kwargs = SHALLOW.get(name, {})
    config = timm.models.get_pretrained_cfg(name)
    own = config.input_size[-1]
    size = own if case.size == "own" else max(32, own // 64 * 32)
    sized = {"img_size": size} if config.fixed_input_size and size != own else {}
    classes = {} if case.classes is None else {"num_classes": case.classes}
    state = filled(timm.create_model(name, **classes, **kwargs))
    torch.save(state, folder / "bare.pt")
    torch.save({f"{case.prefix}{n}": t for n, t in state.items()}, folder / "prefixed.pt")

    def reference(seed: int, **more) -> nn.Module:
        torch.manual_seed(seed)
        options = {"num_classes": 0, "in_chans": case.channels, **sized, **kwargs, **more}
        overlay = {"file": str(folder / "bare.pt"), "custom_load": False}
        try:
            return timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **options
            )
        except RuntimeError:  # of models without published classes timm wants files without
            if more or case.classes is None:
                raise
            return reference(seed, **classes)

    def ours() -> nn.Module:
        torch.manual_seed(2)
        spec = TimmEncoder(type=name, weights=str(folder / "prefixed.pt"), model_kwargs=kwargs)
        options = {"channels": case.channels, "size": (size, size), "load_weights": True}
        return build_encoder(spec, **options).net

    return outcome(reference, ours, size)


def torchvision_outcome(name: str, case: Case, folder: Path) -> str:
    """A model's own file, given to torchvision and to us: the file is that of the size that is
    built, and torchvision's loading is strict."""
    builder = torchvision.models.get_model_builder(name)
    size = 224 if case.size == "own" or name == "maxvit_t" else 256  # its windows have 7
    sized = {"image_size": size} if name.startswith("vit") else {}
    sized |= {"input_size": (size, size)} if name.startswith("maxvit") else {}
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    classes = {} if case.classes is None else {"num_classes": case.classes}
    torch.manual_seed(0)
    source = builder(weights=None, **classes, **sized, **more)
    state = filled(source)
    versions = source.state_dict()._metadata
    named = source.state_dict()
    for key, value in named.items():
        value.copy_(state[key])
    torch.save(named, folder / "bare.pt")
    prefixed = type(named)({f"{case.prefix}{n}": t for n, t in named.items()})
    prefixed._metadata = {f"{case.prefix}{n}".rstrip("."): v for n, v in versions.items()}
    torch.save(prefixed, folder / "prefixed.pt")

    def reference(seed: int) -> nn.Module:
        net = builder(weights=None, **classes, **sized, **more)
        net.load_state_dict(torch.load(folder / "bare.pt", weights_only=True))
        if case.channels != 3:  # torchvision has no rule for them, timm's is taken
            first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
            first.weight = nn.Parameter(adapt_input_conv(case.channels, first.weight.detach()))
        return net

    def ours() -> nn.Module:
        spec = TorchvisionEncoder(type=name, weights=str(folder / "prefixed.pt"))
        options = {"channels": case.channels, "size": (size, size), "load_weights": True}
        return build_encoder(spec, **options).net

    return outcome(reference, ours, size)


def table() -> None:
    """The sweep, printed."""
    counts: Counter[str] = Counter()
    timm.models._builder._logger.setLevel("ERROR")
    jobs = [(timm_outcome, name) for name in SMALLEST]
    jobs += [(torchvision_outcome, name) for name in FAMILIES]
    wanted = sys.argv[1:]
    for judge, name in jobs:
        for case in CASES:
            if wanted and name not in wanted:
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = judge(name, case, Path(folder))
            counts[found.partition(":")[0]] += 1
            if found != "equal":
                print(name, case, found, flush=True)
    for found, count in counts.items():
        print(f"{count:5}  {found}")


EVERYDAY = (
    *("test_byobnet", "test_convnext", "test_efficientnet", "test_resnet", "test_vit"),
    *("levit_128s", "efficientvit_b0", "mobilevit_xxs", "swin_tiny_patch4_window7_224"),
)


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_file_gives_what_timm_gives(name, tmp_path):
    case = CASES[EVERYDAY.index(name) % len(CASES)]
    assert timm_outcome(name, case, tmp_path) in AGREED, case


@pytest.mark.parametrize("name", ["densenet121", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_a_file_gives_what_torchvision_gives(name, tmp_path):
    assert torchvision_outcome(name, CASES[1], tmp_path) in AGREED


AGREED = ("equal", "refused by both", "left random by the library, refused by us")


@pytest.fixture
def files():
    """A folder that is gone after the test: those of the sweep would hold 50 GB."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning:timm")  # of torch, in timm's resampling
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_every_module_of_timm(name, case, files):
    assert timm_outcome(name, case, files) in AGREED


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning:timm")  # of torch, in timm's resampling
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision(name, case, files):
    assert torchvision_outcome(name, case, files) in AGREED


def test_the_sweep_has_every_module_of_timm_and_every_family_of_torchvision():
    entries = timm.models._registry._model_to_module
    if missing := [name for name in SMALLEST if name not in entries]:
        pytest.skip(f"timm {timm.__version__} lacks {listed(missing)}")
    assert {entries[name] for name in SMALLEST} == set(timm.models.list_modules())


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        table()


def test_torchvision_files_that_are_not_published_renormalise_nothing(tmp_path, monkeypatch):
    """GoogLeNet and Inception bring the input of the published weights alone to another mean."""
    from torchvision.models import GoogLeNet_Weights, googlenet

    torch.manual_seed(0)
    net = googlenet(weights=None, init_weights=False, aux_logits=False, num_classes=3).eval()
    path = tmp_path / "own.pth"
    torch.save(net.state_dict(), path)
    spec = TorchvisionEncoder(type="googlenet", weights=str(path))
    x = torch.rand(2, 3, 64, 64)
    net.fc = torch.nn.Identity()
    build = partial(build_encoder, channels=3, size=(64, 64), load_weights=True)
    with torch.no_grad():
        encoder = build(spec).eval()
        torch.testing.assert_close(encoder.pool(encoder.forward_features(x)), net(x))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(
            "torchvision.models.get_model_weights",
            lambda name: [SimpleNamespace(url=f"https://x/googlenet-{digest[:8]}.pth")],
        )
        monkeypatch.setattr(
            "glovita_lib.encoder_torchvision.published_torchvision",
            lambda spec: GoogLeNet_Weights.DEFAULT,
        )
        net.transform_input = True
        encoder = build(spec).eval()
        torch.testing.assert_close(encoder.pool(encoder.forward_features(x)), net(x))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("torchvision", "googlenet"),
        pytest.param("timm", "fbnetc_100", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_its_own_is_built_as_it_was(command, tmp_path, family, name):
    """The checkpoint, and its export, of a run that began without published weights give the
    features of that run, also in the runs that begin with them."""
    spec = RESNET.replace('type = "test_resnet"', f'encoder_type = "{family}"\ntype = "{name}"')
    spec = spec.replace("image_size = 16", "image_size = 32\nmean = [0.5]\nstd = [0.25]")
    small = ["data.data_fraction=0.02", "training.epochs=1"]
    run = command(*small, spec=spec)
    best = run.path / "checkpoints" / "best.pt"
    command("mode=infer", f"infer.export={tmp_path / 'e.safetensors'}", *small, spec=spec)
    asked = ["mode=extract", "extract.split=val", "extract.precision=32", *small]

    def features(*changes):
        folder = tmp_path / "out" / str(len(list((tmp_path / "out").glob("*"))))
        command(*asked, f"extract.output_dir={folder}", *changes, spec=spec)
        (path,) = folder.glob("*.h5")
        with h5py.File(path) as file:
            return file["features"][:]

    expected = features(f"extract.checkpoint={best}")
    for file in (best, tmp_path / "e.safetensors"):
        found = features("extract.source=encoder", f"model.encoder.weights={file}")
        np.testing.assert_array_equal(found, expected)
    second = ["peft.method=linear_probing", f"model.encoder.weights={best}", "name=second"]
    later = command(*small, *second, spec=spec).path / "checkpoints" / "best.pt"
    found = features(f"extract.checkpoint={later}")
    np.testing.assert_array_equal(found, expected)
