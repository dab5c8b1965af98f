"""The entry script: what it prints, imports, dispatches to and exits with."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import glovita
import glovita_lib
from glovita_lib.errors import UserError

REPOSITORY = Path(__file__).parent.parent
SPECS = sorted((REPOSITORY / "specs").glob("*.toml"))
HEAVY = ("torch", "torchvision", "timm", "numpy", "h5py", "sklearn", "wandb", "tqdm", "PIL")


def run(*arguments, python=()):
    """Run the entry script in its own process."""
    command = [sys.executable, *python, str(REPOSITORY / "glovita.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def good(tmp_path):
    """A spec file without mistakes."""
    path = tmp_path / "good.toml"
    path.write_text('[logger]\nbackend = "none"\n')
    return path


@pytest.fixture
def bad(tmp_path):
    """A spec file with two mistakes."""
    path = tmp_path / "bad.toml"
    path.write_text("[training]\nepochs = 0\n[optimizer]\nlrr = 1\n")
    return path


@pytest.fixture
def mode(monkeypatch):
    """Replaces the mode modules; collects what they are called with."""
    calls = []

    def install(effect=None, name="run_train"):
        def run_mode(loaded, *, dry_run):
            calls.append((name, loaded, dry_run))
            if effect is not None:
                raise effect

        monkeypatch.setitem(sys.modules, f"glovita_lib.{name}", SimpleNamespace(run=run_mode))
        return calls

    return install


# ---------------------------------------------------------------- --check


@pytest.mark.processes
def test_check_of_all_specs_imports_nothing_heavy():
    result = run(*SPECS, "--check", python=["-X", "importtime"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{path}: ok" for path in SPECS]
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "msgspec" in imported  # the listing is there
    roots = {name.partition(".")[0] for name in imported}
    assert roots.isdisjoint(HEAVY)


@pytest.mark.processes
def test_check_shows_all_mistakes_of_all_files(good, bad, tmp_path):
    result = run(bad, good, tmp_path / "missing.toml", "--check")
    assert result.returncode == 2
    assert result.stdout == f"{good}: ok\n"
    lines = result.stderr.splitlines()
    opened = [f"{bad}: training.epochs: ", f"{bad}: optimizer.lrr: ", f"{tmp_path}/missing.toml: "]
    assert len(lines) == 3
    assert all(line.startswith(start) for line, start in zip(lines, opened, strict=True))
    assert "Traceback" not in result.stderr


def test_check_asks_the_rules_between_sections(good, capsys):
    assert glovita.main([str(good), "--check", "--override", "optimizer.nesterov=true"]) == 2
    assert "optimizer.nesterov: true would be ignored" in capsys.readouterr().err


def test_print_imports_nothing_heavy_and_shows_mistakes_as_check_does(good, bad):
    result = run(good, "--print", "--override", "seed=3", python=["-X", "importtime"])
    assert result.returncode == 0 and "\nseed = 3  # override\n" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert {name.partition(".")[0] for name in imported}.isdisjoint(HEAVY)
    assert run(bad, "--print").stderr == run(bad, "--check").stderr


@pytest.mark.processes
def test_a_start_imports_nothing_that_only_other_runs_need():
    """timm and torch.optim import torch._dynamo on their own; who predicts from features waits for
    none of them."""
    script = (
        "import sys; from glovita_lib import run_train, run_infer, encoder_timm, head_clam"
        "; from glovita_lib import datasets, head_mil; datasets.read_digits(); print(*sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    imported = set(result.stdout.split())
    late = ("matplotlib", "scipy", "sklearn", "umap", "wandb", "timm", "torchvision")
    assert "torch" in imported and imported.isdisjoint(
        {*late, "torch._dynamo", "glovita_lib.run_umap"}
    )


# ---------------------------------------------------------------- dispatch


def test_several_overrides_per_flag_and_several_flags(good, mode):
    calls = mode()
    overrides = ["--override", "seed=1", "training.epochs=2", "--override", "optimizer.lr=0.1"]
    assert glovita.main([str(good), *overrides]) == 0
    ((name, loaded, dry_run),) = calls
    assert (name, dry_run) == ("run_train", False)
    assert (loaded.root.seed, loaded.root.training.epochs, loaded.root.optimizer.lr) == (1, 2, 0.1)
    assert loaded.overrides == ("seed=1", "training.epochs=2", "optimizer.lr=0.1")
    assert loaded.path == str(good)


def test_mode_and_dry_run(good, mode):
    calls = mode(name="run_infer")
    assert glovita.main([str(good), "--override", "mode=infer", "--dry-run"]) == 0
    assert [(name, dry) for name, _, dry in calls] == [("run_infer", True)]


@pytest.mark.parametrize("own", [None, "0"])
def test_a_mode_has_huge_pages_unless_the_user_says_so(good, mode, monkeypatch, own):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if own is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", own)
    mode()
    assert glovita.main([str(good)]) == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (own or "1")


def test_a_task_of_its_own_has_its_own_module(good, mode):
    calls = mode(name="run_probe")
    probe = [
        "task.objective=probe",
        "data.dataset=precomputed_features",
        "data.train_features_file=t.h5",
        "model.encoder.encoder_type=precomputed",
    ]
    assert glovita.main([str(good), "--override", *probe]) == 0
    assert [name for name, *_ in calls] == ["run_probe"]


def test_every_mode_has_its_module():
    from typing import get_args, get_type_hints

    from glovita_lib.spec_root import Root

    for name in get_args(get_type_hints(Root)["mode"]):
        assert (REPOSITORY / f"glovita_lib/run_{name}.py").is_file()


def test_mistake_found_by_the_mode_has_no_traceback(good, mode, capsys):
    mode(UserError("no such folder: data"))
    assert glovita.main([str(good)]) == 2
    assert capsys.readouterr().err == "no such folder: data\n"


def test_interrupt_is_one_line(good, mode, capsys):
    mode(KeyboardInterrupt())
    assert glovita.main([str(good)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_bug_keeps_its_traceback(good, mode):
    mode(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        glovita.main([str(good)])


def test_mistake_in_the_spec_reaches_no_mode(bad, mode, capsys):
    calls = mode()
    assert glovita.main([str(bad)]) == 2
    assert calls == []
    assert len(capsys.readouterr().err.splitlines()) == 2


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a spec"),
        (["--check"], "name a spec"),
        (["a.toml", "b.toml"], "one spec a run"),
        (["a.toml", "--print", "--check"], "leave --check and --compare out"),
        (["a.toml", "--chek"], "unrecognized arguments: --chek"),
        (["a.toml", "--override"], "expected at least one argument"),
    ],
)
def test_wrong_command_line_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        glovita.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_version_says_what_a_report_needs(capsys):
    from importlib import metadata

    import h5py
    import torch

    assert glovita.main(["--version"]) == 0
    first, python, *packages, device = capsys.readouterr().out.splitlines()
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    commit = f", commit {done.stdout.strip()}" if done.returncode == 0 else ""
    assert first.removesuffix(" with changes") == f"glovita {glovita_lib.__version__}{commit}"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", glovita_lib.__version__)
    assert python.startswith(f"Python {sys.version.split()[0]} on ")
    assert (
        packages[0] == f"torch {torch.__version__}"
        and f"timm {metadata.version('timm')}" in packages
    )
    assert f"h5py {h5py.__version__} (HDF5 {h5py.version.hdf5_version})" in packages
    assert device.startswith("device ") and device.endswith(f", {os.cpu_count()} CPU cores")


def test_version_without_packages_and_without_git(capsys, monkeypatch, tmp_path):
    from importlib import metadata

    def missing(package):
        raise metadata.PackageNotFoundError(package)

    for name in ("torch", "h5py"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert glovita.main(["--version"]) == 0
    first, _, *packages, device = capsys.readouterr().out.splitlines()
    assert first == f"glovita {glovita_lib.__version__}"
    assert {line.partition(" ")[2] for line in packages} == {"not installed"}
    assert device.startswith("device None, ")


def test_schema_is_the_committed_one(capsys):
    assert glovita.main(["--schema"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "specs/schema.json").read_text()


def test_explain(capsys):
    assert glovita.main(["--explain", "optimizer.lr"]) == 0
    assert capsys.readouterr().out.startswith("optimizer.lr\n")
    assert glovita.main(["--explain", "optimizer.lrr"]) == 2
    assert "did you mean optimizer.lr?" in capsys.readouterr().err


@pytest.mark.processes
def test_script_runs_from_any_folder(tmp_path, good):
    command = [sys.executable, str(REPOSITORY / "glovita.py"), "good.toml", "--check"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "good.toml: ok\n")


def test_script_is_short():
    assert len((REPOSITORY / "glovita.py").read_text().splitlines()) <= 80


@pytest.mark.processes
def test_start_up_benchmark_prints_a_ratio():
    command = [sys.executable, str(REPOSITORY / "benchmarks/startup.py"), "--runs", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    ratio = float(re.search(r"ratio (\d+\.\d+)", result.stdout).group(1))
    assert 1 < ratio < 4  # a loose limit for a busy machine: torch alone would make it 20
