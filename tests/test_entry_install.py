"""Installed: what a wheel and an sdist hold, the command `glovita`, and specs found by name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from glovita_lib.errors import UserError, find_target
from glovita_lib.rundir import locate
from glovita_lib.spec import shipped_specs
from glovita_lib.spec_check import load_checked

REPOSITORY = Path(__file__).parent.parent

BUILD = """
from setuptools import build_meta
build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


def run(*command, cwd, **env):
    """A command in a folder; fails with its output where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    """Files that git knows and that are there."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the tree is no checkout of git")
    names = run("git", "ls-files", cwd=REPOSITORY).splitlines()
    return {name for name in names if (REPOSITORY / name).is_file()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """A folder with an sdist and a wheel, built from a copy of what git knows."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, tree / name)
    run(sys.executable, "-c", BUILD, cwd=tree)
    return tree / "dist"


@pytest.mark.processes
def test_the_sdist_holds_what_git_knows(built, tracked):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = [entry.name for entry in archive.getmembers() if entry.isfile()]
    names = {name.partition("/")[2] for name in files}
    own = {name for name in names if name == "PKG-INFO" or name.startswith("glovita.egg-info/")}
    assert names - own == tracked
    assert "tests/conftest.py" in names


@pytest.mark.processes
def test_the_wheel_holds_the_program_and_the_specs(built, tracked):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    specs = {f"glovita_lib/{name}" for name in tracked if name.startswith("specs/")}
    assert len(specs) > 50 and "glovita_lib/projection_page.html" in names
    assert names == specs | {name for name in tracked if name.startswith("glovita_lib/")} | {
        "glovita.py"
    }


@pytest.mark.processes
def test_the_installed_command_runs_from_any_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "site"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", place, wheel]
    run(sys.executable, *pip, cwd=tmp_path)
    here = {"cwd": tmp_path, "PYTHONPATH": str(place)}
    said = run(place / "bin" / "glovita", "digits_resnet", "peft/vit_lora", "--check", **here)
    assert said == "digits_resnet: ok\npeft/vit_lora: ok\n"
    where = "from glovita_lib.spec import spec_file; print(spec_file('digits_resnet'))"
    file = run(sys.executable, "-c", where, **here).strip()
    assert file == str(place / "glovita_lib" / "specs" / "digits_resnet.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]


# ---------------------------------------------------------------- specs by name


@pytest.mark.parametrize("name", ["digits_resnet", "peft/vit_lora"])
def test_a_run_is_where_it_would_be_with_the_path(name, tmp_path, monkeypatch):
    by_path = locate(load_checked(str(REPOSITORY / "specs" / f"{name}.toml"), ["seed=1"]))
    monkeypatch.chdir(tmp_path)
    assert locate(load_checked(name, ["seed=1"])) == by_path


def test_every_shipped_spec_has_a_name():
    specs = REPOSITORY / "specs"
    assert set(map(Path, shipped_specs().values())) == set(specs.rglob("*.toml"))


def test_a_file_comes_before_a_shipped_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_resnet").write_text("seed = 5\n")
    assert load_checked("digits_resnet").root.seed == 5


def test_near_names_are_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_checked("digits_resnt")
    assert str(caught.value).startswith("digits_resnt: no such spec file")
    assert "there are digits_resnet" in str(caught.value)
    with pytest.raises(UserError, match="there are bags_from_tiles, .* and .* more"):
        load_checked("0")
    with pytest.raises(UserError, match=r"digits_resnet\.toml: no such spec file$"):
        load_checked("digits_resnet.toml")


def test_own_parts_lie_in_the_folder_of_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts_of_the_start.py").write_text("def f():\n    return 7\n")
    assert find_target("data", "parts_of_the_start:f")() == 7
