"""Rules of the PEFT section: each is broken here, and the defaults of every method break none."""

import subprocess
import sys
from typing import get_args

import pytest

from glovita_lib import spec_rules
from glovita_lib.spec import load_spec
from glovita_lib.spec_check import check
from glovita_lib.spec_peft import CustomPeft, Peft
from glovita_lib.spec_root import Root

FEATURES = ["data.dataset=precomputed_features", "model.encoder.encoder_type=precomputed"]
BROKEN = [
    ([*FEATURES, "peft.method=lora"], "peft.method", "precomputed features have none"),
    (["peft.method=lora", "peft.targets=[]"], "peft.targets", "names none"),
    (["peft.method=lora", "peft.targets=['a[']"], "peft.targets", "no regular expression"),
    (
        ["peft.method=loha", "peft.rank_pattern={'(' = 2}"],
        "peft.rank_pattern",
        "no regular expression",
    ),
    (["peft.method=adalora", "peft.rank=13"], "peft.rank", "above peft.init_rank = 12"),
    (["peft.method=adalora", "peft.tinit=0.8"], "peft.tinit", "must be below 1"),
    (["peft.method=rep_adapter", "peft.groups=3"], "peft.groups", "must divide"),
    (
        ["peft.method=boft", "peft.n_butterfly=2", "peft.block_size=5"],
        "peft.block_size",
        "must be even",
    ),
    (["peft.method=convpass", "peft.places=[]"], "peft.places", "each once"),
    (
        ["peft.method=visual_prompt_tuning", "peft.deep=false", "peft.deep_layers=2"],
        "peft.deep_layers",
        "read with peft.deep",
    ),
    (["peft.method=oft", "peft.eps=1e-3"], "peft.eps", "read with peft.coft"),
    (["peft.method=convpass", "infer.merge=true"], "infer.merge", "does not merge"),
    (["peft.method=lokr", "peft.decompose_factor=0"], "peft.decompose_factor", "no size"),
    (["infer.export=merged.pth"], "infer.export", '"merged.pth" must end in ".safetensors"'),
    (
        ["infer.export=x.safetensors", "infer.checkpoint=['a.pt', 'b.pt']"],
        "infer.export",
        "infer names 2",
    ),
    (["infer.export=x.safetensors", "infer.folds=[0, 1, 2]"], "infer.export", "infer names 3"),
]


@pytest.fixture
def root(tmp_path):
    def build(overrides):
        path = tmp_path / "a.toml"
        path.write_text("")
        return load_spec(path, overrides, Root).root

    return build


@pytest.mark.parametrize(("overrides", "key", "words"), BROKEN)
def test_broken(root, overrides, key, words):
    lines = [line for line in check(root(overrides)) if line.startswith(f"{key}: ")]
    assert len(lines) == 1 and words in lines[0]


def test_every_rule_is_broken_here_and_asked(root):
    roots = [root(overrides) for overrides, *_ in BROKEN]
    for rule in spec_rules.PEFT_RULES:
        assert any(list(rule(one)) for one in roots), rule.__name__


@pytest.mark.parametrize("kind", [k for k in get_args(Peft) if k is not CustomPeft])
def test_defaults_break_none(root, kind):
    assert check(root([f"peft.method={kind.__struct_config__.tag}"])) == []


@pytest.mark.processes
def test_no_torch_is_needed():
    code = "import sys, glovita_lib.spec_rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
