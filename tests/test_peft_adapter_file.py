"""The file of the trained part: small, laid over the same base, refused over another."""

import pytest
import safetensors.torch
import torch
from small_networks import build, disturb, sample
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.peft import base_hash, load_adapter, read_adapter, save_adapter
from glovita_lib.peft_base import apply_peft, base_state, trained_names
from glovita_lib.spec_peft import Adalora, Bitfit, FullFinetuning, Gps, Lora, Peft

SPECS = (Lora(init_lora_weights="pissa"), Adalora(), Bitfit(), Gps())


RUN = {"spec": {"seed": 3, "model": {"encoder": {"type": "vit", "weights": None}}}, "resolved": {}}


def model(spec: Peft, seed: int = 0) -> nn.Module:
    encoder = build("vit")
    torch.manual_seed(seed)
    both = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(32, 4)})
    apply_peft(spec, both)
    return both


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_round_trip(spec, tmp_path):
    trained, x = model(spec), sample("vit")
    disturb(trained)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, trained, run=RUN)
    whole = sum(t.numel() * t.element_size() for t in trained.state_dict().values())
    assert path.stat().st_size < whole
    save_adapter(tmp_path / "again", trained, run=dict(reversed(RUN.items())))
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    fresh = model(spec, seed=7)
    adapter = read_adapter(path)
    assert adapter.run == RUN
    load_adapter(adapter, fresh)
    expected = trained["head"](trained["encoder"](x))
    torch.testing.assert_close(fresh["head"](fresh["encoder"](x)), expected)


def test_another_base_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model(Lora()), run=RUN)
    other = model(Lora())
    with torch.no_grad():
        other["encoder"].cls_token.add_(1e-3)
    with pytest.raises(UserError, match="over another base: vit with random weights of seed 3"):
        load_adapter(read_adapter(path), other)


def test_another_method_or_file_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model(Lora(targets=("qkv",))), run=RUN)
    adapter = read_adapter(path)
    for other in (Lora(targets=("fc1",)), Lora(targets=("qkv",), rank=2), Bitfit()):
        with pytest.raises(UserError, match="does not fit this model and PEFT method"):
            load_adapter(adapter, model(other))
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="only a part"):
            read_adapter(path)
    path.write_bytes(whole.replace(b"base_hash", b"base_hush"))
    with pytest.raises(UserError, match="description of the adapter is damaged"):
        read_adapter(path)
    path.write_bytes(safetensors.torch.save({"x": torch.ones(1)}))
    with pytest.raises(UserError, match="no adapter of glovita"):
        read_adapter(path)
    with pytest.raises(UserError, match="no such file"):
        read_adapter(tmp_path / "none")


def test_the_hash_is_of_the_base_alone():
    before = model(Lora())
    after = model(Lora(), seed=3)
    disturb(after)
    assert base_hash(before) == base_hash(after)
    everything = nn.ModuleDict({"encoder": build("vit"), "head": nn.Linear(32, 4)})
    apply_peft(FullFinetuning(), everything)
    assert base_state(everything) == {}
    assert trained_names(everything) == list(everything.state_dict())
