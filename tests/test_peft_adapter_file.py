"""The file of the trained part: small, laid over the same base, refused over another."""

import pytest
import torch
from small_networks import build, disturb, sample
from torch import nn

from glovita_lib.errors import UserError
from glovita_lib.peft import apply_peft, base_hash, load_adapter, save_adapter
from glovita_lib.peft_base import base_state, trained_names
from glovita_lib.spec_peft import Adalora, Bitfit, FullFinetuning, Gps, Lora, Peft

SPECS = (Lora(init_lora_weights="pissa"), Adalora(), Bitfit(), Gps())


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
    save_adapter(path, trained, base="vit")
    whole = sum(t.numel() * t.element_size() for t in trained.state_dict().values())
    assert path.stat().st_size < whole
    save_adapter(tmp_path / "again", trained, base="vit")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    fresh = model(spec, seed=7)
    load_adapter(path, fresh)
    expected = trained["head"](trained["encoder"](x))
    torch.testing.assert_close(fresh["head"](fresh["encoder"](x)), expected)


def test_another_base_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model(Lora()), base="vit")
    other = model(Lora())
    with torch.no_grad():
        other["encoder"].cls_token.add_(1e-3)
    with pytest.raises(UserError, match="trained over another base: vit with hash"):
        load_adapter(path, other)


def test_another_method_or_file_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model(Lora(targets=("qkv",))), base="vit")
    with pytest.raises(UserError, match="does not fit this model"):
        load_adapter(path, model(Lora(targets=("fc1",))))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="only a part"):
        load_adapter(path, model(Lora()))
    with pytest.raises(UserError, match="no such file"):
        load_adapter(tmp_path / "none", model(Lora()))


def test_the_hash_is_of_the_base_alone():
    before = model(Lora())
    after = model(Lora(), seed=3)
    disturb(after)
    assert base_hash(before) == base_hash(after)
    everything = nn.ModuleDict({"encoder": build("vit"), "head": nn.Linear(32, 4)})
    apply_peft(FullFinetuning(), everything)
    assert base_state(everything) == {}
    assert trained_names(everything) == list(everything.state_dict())
