"""PEFT runs as a user starts them: the adapter file, other modes, merging, stacking, starting
again.

Weights are compared bit for bit, predictions of merged models within 1e-5.
"""

import csv

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from killed_runs import interrupted
from small_runs import TINY
from torch import nn

from glovita_lib import dist
from glovita_lib.experiment import assemble, read_data, restore
from glovita_lib.peft import load_adapter, read_adapter
from glovita_lib.peft_base import trained_names
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_check import load_checked

METHODS = {
    "linear_probing": [],
    "partial_finetuning": ["peft.num_frozen_layers=1"],
    "bitfit": [],
    "ln_tuning": [],
    "ssf": [],
    "difffit": [],
    "lora": ["peft.rank=2", "peft.dropout=0.1"],
    "adalora": ["peft.rank=1", "peft.init_rank=3"],
    "loha": ["peft.rank=2"],
    "lokr": ["peft.rank=2"],
    "oft": ["peft.r=4"],
    "boft": ["peft.block_size=4"],
    "vera": ["peft.rank=4"],
    "ia3": [],
    "fourierft": ["peft.n_frequency=20"],
    "adapt_former": ["peft.bottleneck=4"],
    "convpass": ["peft.bottleneck=4"],
    "rep_adapter": ["peft.bottleneck=4"],
    "fact": ["peft.r=3"],
    "gps": [],
    "visual_prompt_tuning": ["peft.num_tokens=2"],
}
ALIKE = {"ln_tuning", "difffit", "loha", "oft", "vera", "fourierft", "convpass"}
"""Those whose runs keep, merge and load what those of another method do; test_peft_methods tries
every method."""
UNMERGED = ("adapt_former", "convpass", "visual_prompt_tuning")
LEARN = ["optimizer.lr=0.02", "training.epochs=3"]


def changes(method, *more):
    """Overrides of a run of a method."""
    return [f"peft.method={method}", *METHODS.get(method, ()), *LEARN, f"name={method}", *more]


def built(tmp_path, overrides):
    """The experiment of the tiny spec as a new run would start it, and its data."""
    with dist.session() as ranks:
        root = load_checked(str(tmp_path / "tiny.toml"), overrides).root
        data = read_data(root, ranks)
        return assemble(root, resolve_spec(root, data), ranks, load_weights=True), data


def best_of(run, tmp_path, *overrides):
    """The experiment of a run's best checkpoint."""
    with dist.session() as ranks:
        root = load_checked(str(tmp_path / "tiny.toml"), overrides).root
        return restore(run.path / "checkpoints" / "best.pt", root, ranks)


def adapter_of(run):
    """Tensors of a run's adapter file."""
    return safetensors.torch.load_file(run.path / "checkpoints" / "adapter.safetensors")


def scores(folder):
    """Probabilities (N, K) in a folder's predictions of the test split."""
    with open(folder / "predictions_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("p_")]
    return np.array([[float(row[name]) for name in names] for row in rows])


# ---------------------------------------------------------------------- one run through all modes


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in ALIKE)) for m in METHODS]
)
def test_life_of_a_run(command, refused, tmp_path, method):
    run = command(*changes(method))
    state, table = run.best["model"], run.json("resolved_config.json")["parameters"]
    fresh, data = built(tmp_path, changes(method))
    start = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    adapter = adapter_of(run)

    # the file holds what the run has changed and nothing of the base; it is small
    assert set(adapter) == set(trained_names(fresh.model))
    assert all(torch.equal(adapter[name], state[name]) for name in adapter)
    rest = [name for name in state if name not in adapter and not name.endswith(transient)]
    assert rest and all(torch.equal(state[name], start[name]) for name in rest)
    trainable = {n for n, p in fresh.model.named_parameters() if p.requires_grad}
    assert trainable <= set(adapter)
    assert table["all"]["trainable"] == sum(adapter[name].numel() for name in trainable)
    assert any(not torch.equal(state[name], start[name]) for name in trainable)

    # laid over the base it predicts what the run predicted
    best = best_of(run, tmp_path, *changes(method)).predict(data.splits["test"])
    load_adapter(read_adapter(run.path / "checkpoints" / "adapter.safetensors"), fresh.model)
    again = fresh.predict(data.splits["test"])
    assert np.array_equal(again.scores.values, best.scores.values)
    np.testing.assert_allclose(scores(run.path), best.scores.values, atol=1e-6)

    # mode infer, to the last digit
    infer = run.path / "infer"
    command("mode=infer", *changes(method))
    for name in ("predictions_test.csv", "metrics_test.json"):
        assert (infer / name).read_bytes() == (run.path / name).read_bytes(), name

    # mode extract: the vectors that the head saw
    command("mode=extract", *changes(method), f"extract.output_dir={tmp_path / 'features'}",
            "extract.output_filename=x.h5", "extract.split=test",
            "extract.precision=32")  # fmt: skip
    with h5py.File(tmp_path / "features" / "x.h5") as file:
        vectors = torch.from_numpy(file["features"][:])
    with torch.no_grad():
        logits = fresh.model.head(vectors)
    np.testing.assert_allclose(logits.softmax(1).numpy(), best.scores.values, atol=1e-5)

    merged_and_stacked(command, refused, tmp_path, run, method)


class Twice(nn.Module):
    """A stem, and one block that is used twice, under two names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 4, 4)
        block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.blocks = nn.ModuleDict({"first": block, "again": block})
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # (B, N, 8)
        for block in self.blocks.values():
            tokens = tokens + block(tokens)
        return self.norm(tokens)


def twice(*, input_channels: int) -> nn.Module:
    return Twice(input_channels)


USED_TWICE = TINY.replace(
    TINY[TINY.index("[model.encoder]") : TINY.index("[task]")],
    """[model.encoder]
encoder_type = "custom"
target = "tests.test_peft_runs:twice"
""",
)


@pytest.mark.parametrize("method", ["full_finetuning", "lora", "bitfit"])
def test_a_block_that_is_used_twice(command, tmp_path, method):
    """Export and adapter file hold it under both names and give what the run has predicted."""
    asked = [*changes(method), "training.epochs=2"]
    run = command(*asked, spec=USED_TWICE)
    file = tmp_path / "export.safetensors"
    merge = [] if method == "full_finetuning" else ["infer.merge=true"]
    command("mode=infer", *asked, *merge, f"infer.export={file}", spec=USED_TWICE)
    np.testing.assert_allclose(scores(run.path / "infer"), scores(run.path), atol=1e-5)
    exported = safetensors.torch.load_file(file)
    names = [name for name in exported if ".again." in name]
    assert names
    for name in names:
        assert torch.equal(exported[name], exported[name.replace(".again.", ".first.")])
    if method != "full_finetuning":
        adapter = run.path / "checkpoints" / "adapter.safetensors"
        command("mode=infer", f"infer.checkpoint={adapter}", "name=other", spec=USED_TWICE)
        other = run.path.parent.parent / "other" / run.path.name / "infer"
        np.testing.assert_allclose(scores(other), scores(run.path), atol=1e-6)


transient = tuple(f".{kind}_{name}" for kind in "SU" for name in "PeQ")


def merged_and_stacked(command, refused, tmp_path, run, method):
    """infer.merge, infer.export and a second run that starts from the file."""
    file = tmp_path / "merged.safetensors"
    asked = ["mode=infer", *changes(method), "infer.merge=true", f"infer.export={file}"]
    if method in UNMERGED:
        assert "infer.merge" in refused(*asked) and not file.exists()
        line = refused("mode=infer", *changes(method), f"infer.export={file}")
        assert "infer.export" in line and "adapter.safetensors" in line
        return
    command(*asked)
    np.testing.assert_allclose(scores(run.path / "infer"), scores(run.path), atol=1e-5)
    merged = safetensors.torch.load_file(file)
    with dist.session():
        plain, _ = built(tmp_path, ["name=plain"])
    assert merged.keys() == plain.model.state_dict().keys()
    second = ["name=second", "peft.method=linear_probing", f"model.encoder.weights={file}"]
    start, data = built(tmp_path, second)
    for name, value in start.model.encoder.state_dict().items():
        assert torch.equal(value, merged[f"encoder.{name}"]), name
    stacked = command(*second, "training.epochs=1")
    for name, value in stacked.best["model"].items():
        if name.startswith("encoder."):
            assert torch.equal(value, merged[name]), name
    start.model.head.load_state_dict(best_of(run, tmp_path).model.head.state_dict())
    first = start.predict(data.splits["test"])
    np.testing.assert_allclose(first.scores.values, scores(run.path), atol=1e-5)


def test_an_unmerged_model_is_not_exported(command, refused, tmp_path):
    """Its weights alone are the base, and the file would not fit any encoder."""
    command(*changes("lora"))
    line = refused("mode=infer", *changes("lora"), f"infer.export={tmp_path / 'x.safetensors'}")
    assert "infer.merge = true" in line
    assert not (tmp_path / "x.safetensors").exists()


def test_export_of_what_added_nothing_needs_no_merge(command, tmp_path):
    run = command(*changes("bitfit"))
    file = tmp_path / "plain.safetensors"
    command("mode=infer", *changes("bitfit"), f"infer.export={file}")
    written, state = safetensors.torch.load_file(file), run.best["model"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    command("mode=infer", *changes("bitfit"), f"infer.export={file}")  # its own file is replaced


def test_an_export_replaces_no_file_of_others(command, refused, tmp_path):
    command(*changes("bitfit"))
    file = tmp_path / "base.safetensors"
    for content in (b"text", safetensors.torch.save({"x": torch.ones(1)})):
        file.write_bytes(content)
        line = refused("mode=infer", *changes("bitfit"), f"infer.export={file}")
        assert "is no export of glovita" in line and file.read_bytes() == content


def test_a_checkpoint_with_adapters_is_no_start(command, refused):
    run = command(*changes("lora"))
    weights = run.path / "checkpoints" / "best.pt"
    line = refused("name=second", f"model.encoder.weights={weights}")
    assert "adapter.safetensors" in line
    assert "infer.merge = true" in line and "infer.export" in line


# ---------------------------------------------------------------------- the adapter file as input


def base_file(command, tmp_path):
    """A run's export, to be the base of PEFT runs."""
    path = tmp_path / "base.safetensors"
    command("name=base", "optimizer.lr=0.02")
    command("name=base", "optimizer.lr=0.02", "mode=infer", f"infer.export={path}")
    return path


@pytest.mark.parametrize("method", ["lora", "vera", "visual_prompt_tuning", "linear_probing"])
def test_the_adapter_file_predicts_as_the_best_checkpoint(command, tmp_path, method):
    """Whatever the present spec says of model and method, and wherever the base lies now."""
    base = base_file(command, tmp_path)
    run = command(*changes(method, f"model.encoder.weights={base}", "peft.dropout=0.2"
                           if method != "linear_probing" else "seed=3"))  # fmt: skip
    adapter = run.path / "checkpoints" / "adapter.safetensors"
    asked = ["mode=infer", f"infer.checkpoint={adapter}"]
    moved = base.rename(tmp_path / "moved.safetensors")
    command(*asked, f"infer.output_dir={tmp_path / 'a'}", f"model.encoder.weights={moved}")
    command("mode=infer", f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}",
            f"infer.output_dir={tmp_path / 'b'}")  # fmt: skip
    for name in ("predictions_test.csv", "metrics_test.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    moved.rename(base)
    command("mode=extract", f"extract.checkpoint={adapter}", "extract.split=test",
            f"extract.output_dir={tmp_path / 'features'}", "extract.output_filename=x.h5",
            "extract.precision=32")  # fmt: skip
    with h5py.File(tmp_path / "features" / "x.h5") as file:
        vectors = torch.from_numpy(file["features"][:])
    with torch.no_grad():
        logits = best_of(run, tmp_path).model.head(vectors)
    np.testing.assert_allclose(logits.softmax(1).numpy(), scores(tmp_path / "b"), atol=1e-5)


def test_the_adapter_file_needs_its_base(command, refused, tmp_path):
    base = base_file(command, tmp_path)
    run = command(*changes("lora", f"model.encoder.weights={base}"))
    adapter = run.path / "checkpoints" / "adapter.safetensors"
    asked = ["mode=infer", f"infer.checkpoint={adapter}", f"infer.output_dir={tmp_path / 'a'}"]
    tensors = safetensors.torch.load_file(base)
    tensors["encoder.net.blocks.0.norm1.weight"][0] += 1e-3
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(tensors, other)
    line = refused(*asked, f"model.encoder.weights={other}")
    assert f"{adapter} was trained over another base" in line and str(base) in line
    base.unlink()
    for line in (refused(*asked), refused("name=second", f"model.encoder.weights={adapter}")):
        assert "cannot be had" in line and f'weights = "{base}": no such file' in line
    adapter.write_bytes(adapter.read_bytes()[:-8])
    assert "only a part" in refused(*asked)
    line = refused("name=second", f"model.encoder.weights={adapter}")
    assert "not a whole safetensors file" in line


def test_the_adapter_file_finds_its_base_by_a_variable(command, refused, tmp_path, monkeypatch):
    base = base_file(command, tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    run = command(*changes("lora", "model.encoder.weights=$PLACE/base.safetensors"))
    adapter = run.path / "checkpoints" / "adapter.safetensors"
    asked = ["mode=infer", f"infer.checkpoint={adapter}", f"infer.output_dir={tmp_path / 'a'}"]
    (tmp_path / "elsewhere").mkdir()
    base.rename(tmp_path / "elsewhere" / base.name)
    monkeypatch.setenv("PLACE", str(tmp_path / "elsewhere"))
    command(*asked)
    assert np.array_equal(scores(tmp_path / "a"), scores(run.path))
    monkeypatch.delenv("PLACE")
    assert "needs the environment variable PLACE" in refused(*asked)


def test_a_run_starts_from_the_adapter_file_of_another(command, tmp_path):
    """As from the merged export, also with a larger image, and again from its own file."""
    run = command(*changes("lora", "seed=5"))
    adapter, file = (
        run.path / "checkpoints" / "adapter.safetensors",
        tmp_path / "merged.safetensors",
    )
    command("mode=infer", *changes("lora", "seed=5"), "infer.merge=true", f"infer.export={file}")
    for more in ([], ["data.augmentation.image_size=12"]):
        states = []
        for weights in (adapter, file):
            second = changes("ssf", f"model.encoder.weights={weights}", *more)
            states.append(built(tmp_path, second)[0].model.state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    second = command(*changes("ssf", f"model.encoder.weights={adapter}"))
    third = second.path / "checkpoints" / "adapter.safetensors"
    command("mode=infer", f"infer.checkpoint={third}", f"infer.output_dir={tmp_path / 'a'}")
    assert np.array_equal(scores(tmp_path / "a"), scores(second.path))
    other = ["name=other", f"model.encoder.weights={third}", "model.encoder.type=test_vit2"]
    assert f'weights = "{third}" does not fit' in command(*other, code=2).err


def test_what_does_not_merge_is_no_start(command, refused):
    run = command(*changes("visual_prompt_tuning"))
    adapter = run.path / "checkpoints" / "adapter.safetensors"
    line = refused("name=second", f"model.encoder.weights={adapter}")
    assert "visual_prompt_tuning computes something beside the weights" in line
    assert "infer.checkpoint" in line


def test_the_checkpoint_says_what_merges(command):
    """Not the spec it is used with."""
    run = command(*changes("lora"))
    command("mode=infer", "peft.method=visual_prompt_tuning", "infer.merge=true",
            f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}",
            f"infer.output_dir={run.path / 'merged'}")  # fmt: skip
    np.testing.assert_allclose(scores(run.path / "merged"), scores(run.path), atol=1e-5)


# ---------------------------------------------------------------------- state of methods


@pytest.mark.parametrize(
    ("method", "more"),
    [("adalora", []), ("gps", []), ("gps", ["training.ema_decay=0.8"]),
     ("adalora", ["training.ema_decay=0.8"]), ("lora", ["peft.init_lora_weights=pissa"])],
    ids=["adalora", "gps", "gps, averaged", "adalora, averaged", "pissa"],
)  # fmt: skip
def test_an_interrupted_run_goes_on_bit_for_bit(command, monkeypatch, method, more):
    """Importance and budget of AdaLoRA, the chosen entries of GPS and the kept start of PiSSA are
    in the checkpoint; nothing of them is made anew."""
    more = [*changes(method, *more), "training.save_every_steps=1"]
    calm = command(*more)
    more[more.index(f"name={method}")] = "name=again"
    for step in (2, 7):  # in the first and in the second epoch of four steps
        with interrupted(monkeypatch, step):
            command(*more, code=130)
    again = command(*more)
    assert "continuing in epoch 2 after optimizer step 6" in again.out
    for name in ("last", "best"):
        first, second = getattr(calm, name), getattr(again, name)
        for part in ("model", "ema") if first["ema"] is not None else ("model",):
            assert first[part].keys() == second[part].keys()
            for key, value in first[part].items():
                assert torch.equal(value, second[part][key]), (name, part, key)
    assert again.rows() == calm.rows()
    files = [run.path / "checkpoints" / "adapter.safetensors" for run in (calm, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("decay", ["none", "0.8"])
def test_the_budget_of_adalora_is_spent(command, tmp_path, decay):
    """12 steps bring 3 ranks a layer down to 1 on average; averaged weights have no more."""
    run = command(*changes("adalora", f"training.ema_decay={decay}"))
    state = run.last["ema"] or run.last["model"]
    kept = {name: value for name, value in state.items() if name.endswith(".kept")}
    assert len(kept) == 12  # q, k, v, proj, fc1 and fc2 of two blocks
    assert sum(int(value.sum()) for value in kept.values()) == len(kept)
    assert len({int(value.sum()) for value in kept.values()}) > 1  # given to where it helps
    records = run.records()
    assert all(record["train_orthogonality"] > 0 for record in records)
    experiment = best_of(run, tmp_path)
    experiment.model.load_state_dict(state)
    for name, module in experiment.model.eval().named_modules():
        if type(module).__name__ == "AdaloraAdapter":
            shape = module.P.shape[0], module.Q.shape[1]
            change = module.merged_weight(torch.zeros(shape))
            assert torch.linalg.matrix_rank(change) <= kept[f"{name}.kept"].sum(), name


def test_entries_outside_the_mask_of_gps_do_not_move(command, tmp_path):
    """Nor under weight decay, nor in averaged weights; the chosen ones do."""
    run = command(*changes("gps", "training.ema_decay=0.8", "optimizer.weight_decay=0.3"))
    fresh, _ = built(tmp_path, changes("gps"))
    start = fresh.model.state_dict()
    merged = best_of(run, tmp_path, "mode=infer", "infer.merge=true").model.state_dict()
    ema = run.best["ema"]
    chosen = [name for name in ema if name.endswith(".places")]
    assert len(chosen) == 9  # qkv, proj, fc1 and fc2 of two blocks, the patch embedding
    for name in chosen:
        weight = name.replace("adapter.places", "weight")
        moved = (merged[weight] != start[weight]).flatten(1)
        allowed = torch.zeros_like(moved).scatter(1, ema[name], True)
        assert moved.any() and not (moved & ~allowed).any(), name
        assert not torch.equal(ema[name], start[name])  # calibrated
        assert torch.equal(ema[name], run.best["model"][name])


def test_full_finetuning_leaves_no_adapter_file(command):
    run = command()
    assert not (run.path / "checkpoints" / "adapter.safetensors").exists()
    assert run.json("resolved_config.json")["parameters"]["all"]["share"] == 1.0
    assert TINY.count("peft") == 0
