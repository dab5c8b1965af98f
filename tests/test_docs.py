"""README and docs/: commands parse, spec fragments load, keys, names, files and links exist.

Code fences say what they hold: `sh` (commands, all parsed), `toml` (spec fragments, all loaded),
`python` (run), `text`. Relative paths in commands start at the repository, in specs' `extends` at
specs/; data and checkpoint files that a command names need not exist.
"""

import argparse
import ast
import configparser
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import get_type_hints

import msgspec
import numpy as np
import pytest
import torch
import yaml
from msgspec import inspect as kinds
from test_source import assert_none

import glovita
from glovita_lib import dist
from glovita_lib.errors import UserError
from glovita_lib.experiment import assemble, read_data
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_help import explain, owners
from glovita_lib.spec_root import Root

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LANGUAGES = {"sh", "toml", "python", "text"}
ROOT = kinds.type_info(Root)
SECTIONS = {field.name for field in msgspec.structs.fields(Root)}


class Parsed(Exception):
    """Raised by a script once its command line has been parsed."""


def blocks(page, language):
    """Code fences of a language, with the number of the first line."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in found if m[1] == language]


def prose(page):
    """The text of a page without its code fences."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline(page):
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def load(path):
    """A script of the tree as a module."""
    source = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- commands


def commands():
    """Simple commands of all pages, loops unrolled, with their place."""
    for page in PAGES:
        lines = [(n + i, line) for n, text in blocks(page, "sh") for i, line in numbered(text)]
        lines += [
            (0, text) for text in inline(page) if re.match(r"(python|glovita|torchrun|for) ", text)
        ]
        for number, line in lines:
            for words in unrolled(shlex.split(line, comments=True)):
                yield f"{page.name}:{number}", words


def numbered(text):
    """Lines that are not empty."""
    return [(i, line) for i, line in enumerate(text.splitlines()) if line.strip()]


def unrolled(words):
    """The simple commands of a line: `a && b`, `a > file`, `for x in 1 2; do a $x; done`."""
    words = [part for word in words for part in ([word[:-1], ";"] if word[-1] == ";" else [word])]
    if words[:1] == ["for"]:
        name, values = words[1], words[words.index("in") + 1 : words.index(";")]
        assert words[words.index(";") + 1] == "do" and words[-2:] == [";", "done"], words
        body = words[words.index("do") + 1 : -2]
        for one in [path for value in values for path in globbed(value)]:
            yield from unrolled([word.replace(f"${name}", one) for word in body])
    elif "&&" in words:
        middle = words.index("&&")
        yield from unrolled(words[:middle])
        yield from unrolled(words[middle + 1 :])
    elif words:
        words = words[: words.index(">")] if ">" in words else words
        yield [path for word in words for path in globbed(word)]


def globbed(word):
    """A word as the shell expands it in the repository."""
    if "*" not in word:
        return [word]
    found = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob(word))
    assert found, f"nothing is named {word}"
    return found


def parse(words):
    """Raise where a command could not be started: a file, a flag, a key or a value is wrong."""
    match words:
        case ["python", "-m", "pip", "install", *rest]:
            parse_install(rest)
        case ["python", "-m", "pytest", *rest]:
            parse_pytest(rest)
        case ["python", "glovita.py", *rest] | ["glovita", *rest]:
            parse_glovita(rest)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            asked = get_args_parser().parse_args(rest)
            assert asked.training_script == "glovita.py", words
            parse_glovita(asked.training_script_args)
        case ["python", script, *rest]:
            assert re.match(r"(benchmarks|tests)/\w+\.py$", script), words
            parse_script(REPOSITORY / script, rest)
        case ["cp", source, _]:
            assert (REPOSITORY / source).is_file(), f"no file {source}"
        case _:
            raise AssertionError(f"a command of a kind that no test knows: {' '.join(words)}")


def parse_install(words):
    """The extras that are installed exist."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    for word in words:
        for extra in re.findall(r"\[(\w+)\]", word):
            assert extra in settings["options.extras_require"], f"no extra {extra}"


def parse_pytest(words):
    """Flags of pytest and its plugins, markers and test files exist."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    known = set(re.findall(r"^(\w+):", settings["tool:pytest"]["markers"], re.MULTILINE))
    config = pytest.Config.fromdictargs({}, [])
    asked = config._parser.parse_known_args(words)
    for word in re.findall(r"\w+", asked.markexpr or ""):
        assert word in known | {"not", "and", "or"}, f"no marker {word}"
    for path in asked.file_or_dir:
        assert (REPOSITORY / path.partition("::")[0]).exists(), f"no test file {path}"


def parse_glovita(words):
    """The command line parses, and every spec that it names loads with its overrides."""
    asked = glovita.arguments(words)
    if asked.explain:
        explain(asked.explain)
    for path in asked.specs:
        load_checked(path, asked.override)


def parse_script(path, words):
    """A script's own parser takes the words."""
    real = argparse.ArgumentParser.parse_args

    def stop(parser, *arguments):
        real(parser, *arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(path), *words])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        with pytest.raises(Parsed):
            load(path).main()


def test_every_command_parses(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    problems, seen = [], set()
    for place, words in commands():
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        try:
            parse(words)
        except (UserError, AssertionError, SystemExit, ValueError) as error:
            problems.append(f"{place}: {' '.join(words)}\n    {error}")
    assert_none(problems)
    assert len(seen) > 100


@pytest.mark.parametrize(
    "line",
    [
        "python glovita.py specs/no_such.toml",
        "python glovita.py specs/digits_resnet.toml --chek",
        "python glovita.py specs/digits_resnet.toml --override optimizer.lrr=1",
        "for f in 0 10; do python glovita.py specs/mil_musk1.toml --override data.fold=$f; done",
        "for s in specs/none_*.toml; do python glovita.py $s; done",
        "python glovita.py --explain optimizer.lrr",
        "torchrun --processes 2 glovita.py specs/digits_resnet.toml",
        "python benchmarks/startup.py --rounds 5",
        "python benchmarks/no_such.py",
        'python -m pip install -e ".[tests]"',
        "python -m pytest -m slower",
        "python -m pytest tests/test_nothing.py",
        "glovita digits_resnt",
        "glovit digits_resnet",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((UserError, AssertionError, SystemExit, FileNotFoundError)):
        for words in unrolled(shlex.split(line)):
            parse(words)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda p: p.stem
)
def test_every_benchmark_starts_and_is_described(path):
    """Its imports are there and its command line is read; a folder stands for what is required."""
    needed = ["folder"] if path.stem == "mil_data" else []
    parse_script(path, needed)
    assert f"`benchmarks/{path.name}`" in (REPOSITORY / "docs" / "benchmarks.md").read_text()


# ---------------------------------------------------------------- spec fragments and code


@pytest.fixture
def specs(tmp_path):
    """A copy of specs/, so that fragments may extend the shipped ones."""
    return shutil.copytree(REPOSITORY / "specs", tmp_path / "specs")


def test_every_spec_fragment_loads(specs):
    problems, seen = [], 0
    for page in PAGES:
        for number, text in blocks(page, "toml"):
            seen += 1
            path = specs / f"{page.stem}_{number}.toml"
            path.write_text(text)
            try:
                load_checked(path)
            except UserError as error:
                problems.append(f"{page.name}:{number}: {error}")
    assert_none(problems)
    assert seen >= 10


@pytest.mark.runs
@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_own_parts_run(specs, monkeypatch, capsys, number):
    """The Python blocks of docs/parts.md under the name in their first line, with their specs."""
    page = REPOSITORY / "docs" / "parts.md"
    parts = [code for _, code in blocks(page, "python") if code.startswith("# my_")]
    assert len(parts) == len(blocks(page, "toml")) == 2
    code = parts[number]
    _, spec = blocks(page, "toml")[number]
    folder = specs.parent
    (folder / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    (folder / "own.toml").write_text(spec)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    assert glovita.main(["own.toml", "--dry-run"]) == 0, capsys.readouterr().err
    if number == 0:  # its own augmentation reaches the policy, and moves images
        assert ours_are_flipped(folder / "own.toml")


def ours_are_flipped(spec):
    """Whether training of the first example flips images, by what the model gets of a batch."""
    loaded = load_checked(spec, [])
    ranks = dist.Ranks(0, 1, 0, torch.device("cpu"))
    data = read_data(loaded.root, ranks)
    resolved = resolve_spec(loaded.root, data)
    assert (resolved.inputs.augmentation.train.hflip_p, [*resolved.inputs.drawn]) == (
        0.5,
        ["hflip_p", "vflip_p"],
    )
    objective = assemble(loaded.root, resolved, ranks, load_weights=True).objective
    images = torch.from_numpy(data.splits["train"].source.fetch(np.arange(16)))
    still, drawn = objective.eval_inputs(images, False, 0), objective.train_inputs(images, False, 1)
    ways = [torch.flip(still, axes) for axes in ((), (2,), (3,), (2, 3))]
    which = [[torch.allclose(drawn[i], way[i], atol=1e-5) for way in ways] for i in range(16)]
    assert all(map(any, which))
    return not all(row[0] for row in which)


# ---------------------------------------------------------------- keys and names


@cache
def hints_of(struct):
    """Types of the fields of a Struct."""
    return get_type_hints(struct, include_extras=True)


def fields(key):
    """Structs and types of a dotted key, one for each member of a union that has it."""
    path = key.split(".")
    for owner, _ in owners(path, [(ROOT, "")]):
        hints = hints_of(owner.cls)
        if path[-1] in hints:
            yield hints[path[-1]]
        elif owner.tag_field == path[-1]:
            yield type(owner.tag) if owner.tag is None else str


def tags(key):
    """Tags of a union's tag field."""
    path = key.split(".")
    found = owners(path, [(ROOT, "")])
    return {owner.tag for owner, _ in found if owner.tag_field == path[-1]}


def value_fits(key, value):
    """Whether a value is valid for a key of any member."""
    if found := tags(key):
        return value in found
    for kind in fields(key):
        try:
            msgspec.convert(value, kind)
            return True
        except msgspec.ValidationError:
            continue
    return False


def assignments(page):
    """Keys and values of `a.b = value` in backticks; the value is None where there is none."""
    for text in inline(page):
        if re.fullmatch(r"[a-z_]+(\.\w+)+", text) and text.partition(".")[0] in SECTIONS:
            yield text, None
        elif match := re.fullmatch(r"([a-z_]+(?:\.\w+)*) = (.+)", text):
            yield match[1], tomllib.loads(f"value = {match[2]}")["value"]


def test_every_key_exists_and_every_value_is_valid():
    problems, seen = [], 0
    for page in PAGES:
        for key, value in assignments(page):
            seen += 1
            candidates = [key] if "." in key or key in SECTIONS else everywhere(key)
            if not any(has_key(candidate) for candidate in candidates):
                problems.append(f"{page.name}: there is no key {key}")
            elif value is not None and not any(value_fits(c, value) for c in candidates):
                problems.append(f"{page.name}: {key} cannot be {value!r}")
    assert_none(problems)
    assert seen > 50


@cache
def has_key(key):
    """Whether a spec may have a key."""
    try:
        explain(key)
    except UserError:
        return False
    return True


def everywhere(name):
    """Dotted keys that may be meant by a bare name."""
    places = [*SECTIONS, "model.encoder", "model.head", "data.augmentation"]
    return [name, *(f"{place}.{name}" for place in places)]


@cache
def source_text():
    """Everything that a name in backticks may come from."""
    paths = [REPOSITORY / "glovita.py", REPOSITORY / "setup.cfg"]
    for folder in ("glovita_lib", "specs", "benchmarks", "tests"):
        paths += sorted((REPOSITORY / folder).rglob("*.py"))
        paths += sorted((REPOSITORY / folder).rglob("*.toml"))
    paths.remove(Path(__file__).resolve())
    modules = [path.stem for path in paths]
    return "\n".join([*modules, *(path.read_text() for path in paths)])


def test_every_name_in_backticks_occurs_in_the_source():
    """Names of options, methods, datasets, files that a run writes ..."""
    words = set(re.findall(r"\w+", source_text()))

    def occurs(text):
        if text.endswith("_"):  # a prefix of names
            return any(word.startswith(text) for word in words)
        return text in words

    assert_none(
        f"{page.name}: {text}"
        for page in PAGES
        for text in inline(page)
        if re.fullmatch(r"[A-Za-z_]\w*", text) and not occurs(text)
    )


# ---------------------------------------------------------------- files and links


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere():
    problems, seen = [], 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
            seen += 1
            name, _, part = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                problems.append(f"{page.name}: there is no {link}")
            elif part and part not in map(anchor, re.findall(r"^#+ (.+)$", prose(target), re.M)):
                problems.append(f"{page.name}: {link} has no such heading")
    assert_none(problems)
    assert seen > 40


def test_every_file_of_the_tree_in_backticks_exists():
    folders = r"(?:specs|docs|tests|benchmarks|glovita_lib)/[\w./*]+"
    problems = [
        f"{page.name}: {text}"
        for page in PAGES
        for text in inline(page)
        if re.fullmatch(folders, text) and not list(REPOSITORY.glob(text))
    ]
    assert_none(problems)


# ---------------------------------------------------------------- what stands where


def test_code_fences_say_what_they_hold():
    problems = []
    for page in PAGES:
        fences = re.findall(r"^ *```.*$", page.read_text(), re.MULTILINE)
        problems += [f"{page.name}: {line}" for line in fences[::2] if line[3:] not in LANGUAGES]
        problems += [f"{page.name}: {line} closes a fence" for line in fences[1::2] if line[3:]]
    assert_none(problems)


def test_readme_is_short_and_leads_to_every_page_and_spec():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 150
    assert_none(
        f"no link to {page.name}" for page in PAGES[1:] if f"(docs/{page.name})" not in text
    )
    linked = re.findall(r"\((specs/[\w/.]+)\)", text)
    assert_none(
        f"no link to {path.name}"
        for path in sorted((REPOSITORY / "specs").glob("*.toml"))
        if f"specs/{path.name}" not in linked
    )


def test_the_spine_is_the_same_everywhere():
    structure = load(REPOSITORY / "benchmarks" / "structure.py")
    for name in ("README.md", "docs/code.md"):
        text = (REPOSITORY / name).read_text()
        listed = re.findall(r"\[\w+\]\((?:\.\./)?glovita_lib/(\w+)\.py\)", text)
        assert tuple(listed) == structure.SPINE, name


def test_the_picture_of_the_floors_is_made_of_todays_imports():
    structure = load(REPOSITORY / "benchmarks" / "structure.py")
    drawn = structure.picture(structure.Source(REPOSITORY))
    message = f"{structure.PICTURE} is out of date: python benchmarks/structure.py --picture"
    assert (REPOSITORY / structure.PICTURE).read_text() == drawn, message


# ---------------------------------------------------------------- continuous integration


def test_ci_runs_the_readmes_own_commands():
    """.ci/run installs and tests as README says, the workflow calls it on every Python that
    setup.cfg claims."""
    script = (REPOSITORY / ".ci" / "run").read_text()
    _, text = blocks(REPOSITORY / "README.md", "sh")[0]
    install, test = next(line for line in text.splitlines() if "[test]" in line).split(" && ")
    assert install.replace("install", "install -q") in script and f"\n{test}\n" in script
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_contributing_is_short_and_names_the_markers_and_checks():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) <= 60
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    markers = settings["tool:pytest"]["markers"].strip().splitlines()
    assert_none(m for m in markers if f"`{m.split(':')[0].strip()}`" not in text)
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0][
        "hooks"
    ]
    assert [hook["id"] for hook in hooks] == ["ruff", "format", "mypy", "schema", "specs"]
    for path in ("ISSUE_TEMPLATE/bug.md", "PULL_REQUEST_TEMPLATE.md"):
        template = (REPOSITORY / ".github" / path).read_text()
        assert "spec" in template and "`runtime_info.json`" in template


def test_every_bound_of_the_dependencies_is_installed_by_ci_oldest():
    """A requirement without a lower bound is one that nobody has tried."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    optional = settings["options.extras_require"]
    extras = "\n".join(optional[name] for name in ("volumes", "pytorchvideo", "transformers"))
    lines = f"{settings['options']['install_requires']}\n{extras}".split("\n")
    lines = [line for line in lines if line]
    of_tests = settings["options.extras_require"]["test"].splitlines()
    assert_none(
        f"{x}: not in the extra of the tests" for x in extras.splitlines() if x not in of_tests
    )
    wanted = [line for line in lines if not line.startswith("#")]
    assert_none(
        f"{line}: no lower bound" for line in wanted if not re.match(r"[\w-]+>=[\d.]+", line)
    )
    names = {re.split(r"[>;]", line)[0].replace("-", "_") for line in wanted}
    called = {"PIL": "pillow", "sklearn": "scikit_learn", "umap": "umap_learn", "decord": "decord2"}
    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / "glovita_lib").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    roots = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    # our own, a part of matplotlib, and what huggingface_hub brings where it has it
    roots -= {"glovita_lib", "mpl_toolkits", "httpx"}
    assert_none(
        f"{root}: imported, not in setup.cfg"
        for root in roots
        if called.get(root, root) not in names
    )
