"""The source itself: import direction, sizes, type hints, docstrings, names, ruff, mypy."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "glovita_lib"

RUNS = r"run_.*|rundir|experiment|trainer|objectives|results|extraction|feature_writer"
MODELS = r"encoder.*|head.*|peft.*|model|attention_pool|attention_maps|checkpoint|weights"
DATA_SETS = (
    r"data_folder|data_features|data_volumes|data_dicom|data_series|data_video|datasets|loader.*"
)

MAY_NOT_KNOW = {
    r"spec.*": r"(?!(spec|errors|metric_names)).*",
    r"read_.*": rf"{RUNS}|{MODELS}|{DATA_SETS}|resolved|augment.*|plot.*",
    r"data.*": rf"{RUNS}|{MODELS}|augment.*|plot.*|metrics.*|resolved",
    r"augment.*": rf"{RUNS}|{DATA_SETS}|head.*|peft.*|model|plot.*|resolved",
    r"encoder.*": rf"{RUNS}|{DATA_SETS}|head.*|peft.*|model|plot.*|resolved",
    r"head.*": rf"{RUNS}|{DATA_SETS}|encoder.*|peft.*|model|plot.*|resolved",
    r"peft.*": rf"{RUNS}|{DATA_SETS}|head.*|model|plot.*|resolved",
    r"metric.*": rf"{RUNS}|{MODELS}|{DATA_SETS}|data.*|resolved|plot.*",
    r"plot.*|figures": rf"{RUNS}|{MODELS}|{DATA_SETS}|resolved|objectives",
    r"(?!run_).*": r"run_.*",
    r"run_(?!train).*": r"run_.*",
    r"run_train": r"run_(?!probe).*",
}
"""A module whose name matches the key imports none whose name matches the value."""

SMALL = {
    "losses": "the formula of every loss; the spine reads it on its own",
    "loader_series": "what a run on images need not load",
}
"""Modules under 150 lines with one importer, and why each is one."""

HEAVY = {
    "aeon", "blosc2", "decord", "dynamic_network_architectures", "matplotlib", "mlflow", "nibabel",
    "onnx", "onnxruntime", "pandas", "peft", "pydicom", "pytorchvideo", "scipy", "sklearn",
    "tensorboard", "timm", "torchvision", "transformers", "umap", "wandb",
}  # fmt: skip
"""Packages that are imported only inside the function that needs them."""

TORCH = {"torch", "numpy", "h5py", "tqdm", "PIL"}  # packages that no spec module imports
FORBIDDEN_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|managers?|misc|tools?)(_|$)")

MODULES_AT_MOST = 127
MODULE_LINES = 700
FUNCTION_LINES = 70
IGNORED_HINTS = 25
COLUMNS = 100

MODULES = sorted(PACKAGE.glob("*.py"))
SOURCES = [REPOSITORY / "glovita.py", *MODULES]
EVERYTHING = [
    *SOURCES,
    *sorted((REPOSITORY / "tests").glob("*.py")),
    *sorted((REPOSITORY / "benchmarks").glob("*.py")),
]


@cache
def tree(path):
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path, node):
    """File and line, for the message."""
    return f"{path.relative_to(REPOSITORY)}:{node.lineno} {getattr(node, 'name', '')}".rstrip()


def imports(path, nodes=None):
    """Names that a file imports, dotted, with the statements."""
    for node in ast.walk(tree(path)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "glovita_lib":
                yield from ((f"glovita_lib.{alias.name}", node) for alias in node.names)
            else:
                yield node.module or "", node


def own_imports(path):
    """Modules of the package that a module imports, anywhere in it."""
    names = {path.stem for path in MODULES}
    found = (name.split(".")[1] for name, _ in imports(path) if name.startswith("glovita_lib."))
    return {name for name in found if name in names}


def functions(path):
    """All functions of a file, nested ones and methods included."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def public(nodes):
    """Public classes and functions among the statements of a file or a class."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [node for node in nodes if isinstance(node, kinds) and not node.name.startswith("_")]


def public_functions(path):
    """Public functions of a file and public methods of its public classes."""
    for node in public(tree(path).body):
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            yield from (method for method in public(node.body) if not is_autograd(method))


def is_autograd(method):
    """Whether a method has the signature that torch.autograd.Function prescribes."""
    arguments = method.args.args
    return bool(arguments) and arguments[0].arg == "ctx"


def assert_none(problems):
    """Fails with all problems in one message."""
    problems = list(problems)
    assert not problems, "\n" + "\n".join(problems)


# ---------------------------------------------------------------- imports


def test_no_module_knows_what_its_family_may_not():
    assert_none(
        f"{path.stem} imports {name}, which {key} may not know"
        for path in MODULES
        for key, value in MAY_NOT_KNOW.items()
        if re.fullmatch(key, path.stem)
        for name in sorted(own_imports(path))
        if re.fullmatch(value, name)
    )


def test_every_small_module_with_one_importer_has_its_reason():
    importers = {path.stem: 0 for path in MODULES}
    for path in SOURCES:
        for name in own_imports(path) | set(
            re.findall(r'built_in\b.* = "(\w+)"', path.read_text())
        ):
            importers[name] += 1
    small = {
        path.stem
        for path in MODULES
        if importers[path.stem] == 1
        and len(path.read_text(encoding="utf-8").splitlines()) < 150
        and not path.stem.startswith("run_")
    }
    assert_none(
        f"{name}: part of its importer, or its reason in SMALL" for name in small - SMALL.keys()
    )
    assert not SMALL.keys() - small, "no such modules"


def test_no_import_goes_in_a_circle():
    graph = {path.stem: own_imports(path) for path in MODULES}
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert_none(
        f"{name} is in, or depends on, a circle with {needs}" for name, needs in left.items()
    )


def test_spec_modules_are_free_of_torch_and_numpy():
    specs = [REPOSITORY / "glovita.py", *(p for p in MODULES if p.stem.startswith("spec"))]
    specs += [PACKAGE / "metric_names.py", PACKAGE / "errors.py"]
    assert_none(
        f"{place(path, node)}: {name}"
        for path in specs
        for name, node in imports(path)
        if name.partition(".")[0] in TORCH | HEAVY
    )
    light = {path.stem for path in specs}
    assert_none(
        f"{path.stem} imports {name}"
        for path in specs[1:]
        for name in own_imports(path)
        if name not in light
    )


def test_heavy_packages_are_imported_where_they_are_needed():
    assert_none(
        f"{place(path, node)}: {name} at the top of the module"
        for path in SOURCES
        for name, node in imports(path, tree(path).body)
        if name.partition(".")[0] in HEAVY
    )


def test_no_star_imports_and_no_postponed_annotations_in_specs():
    assert_none(
        place(path, node)
        for path in EVERYTHING
        for name, node in imports(path)
        if isinstance(node, ast.ImportFrom)
        and (
            any(alias.name == "*" for alias in node.names)
            or (name == "__future__" and path.stem.startswith("spec"))
        )
    )


# ---------------------------------------------------------------- sizes and names


def test_modules_are_few_and_short_and_functions_are_short():
    assert len(MODULES) - 1 <= MODULES_AT_MOST
    long = [
        f"{path.relative_to(REPOSITORY)}: {count} lines, at most {MODULE_LINES}"
        for path in SOURCES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MODULE_LINES
    ]
    long += [
        f"{place(path, node)}: {node.end_lineno - node.lineno + 1} lines, at most {FUNCTION_LINES}"
        for path in SOURCES
        for node in functions(path)
        if node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert_none(long)


def test_lines_are_short():
    assert_none(
        f"{path.relative_to(REPOSITORY)}:{number}: {len(line)} columns"
        for path in EVERYTHING
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > COLUMNS
    )


def test_modules_are_named_after_what_they_hold():
    assert_none(path.name for path in EVERYTHING if FORBIDDEN_NAMES.search(path.stem))


def test_nothing_is_left_undone():
    marks = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    assert_none(
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    )


def test_every_test_asserts():
    """By itself, by a fixture or pytest that expects an error, or by a function named assert_..."""
    asserting = re.compile(r"(.*\.)?(assert_\w+|raises|warns|refused)")
    assert_none(
        place(path, node)
        for path in sorted((REPOSITORY / "tests").glob("test_*.py"))
        for node in functions(path)
        if node.name.startswith("test_")
        and not any(
            isinstance(part, ast.Assert)
            or (isinstance(part, ast.Call) and asserting.fullmatch(ast.unparse(part.func)))
            for part in ast.walk(node)
        )
    )


# ---------------------------------------------------------------- hints and docstrings


def test_public_functions_have_type_hints():
    problems = []
    for path in SOURCES:
        for node in public_functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [
                argument.arg
                for argument in arguments
                if argument.annotation is None and argument.arg not in ("self", "cls")
            ]
            if node.returns is None:
                bare.append("the result")
            if bare:
                problems.append(f"{place(path, node)}: {', '.join(bare)}")
    assert_none(problems)


def test_modules_and_public_functions_and_classes_have_docstrings():
    problems = [
        f"{path.relative_to(REPOSITORY)}: the module"
        for path in EVERYTHING
        if not ast.get_docstring(tree(path)) and path.stem != "__init__"
    ]
    problems += [
        place(path, node)
        for path in SOURCES
        for node in public(tree(path).body)
        if not ast.get_docstring(node)
    ]
    assert_none(problems)


def test_every_field_of_a_struct_has_a_docstring():
    classes = {
        node.name: (path, node)
        for path in MODULES
        if path.stem.startswith("spec")
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
    }
    structs = {"Spec"}
    while more := {name for name in classes.keys() - structs if bases(classes[name][1]) & structs}:
        structs |= more
    assert len(structs) > 60
    assert_none(
        f"{place(path, field)}: {name}"
        for name in structs
        for path, node in [classes[name]]
        for field in undocumented(node)
    )


def bases(node):
    """Names of the classes that a class is made from."""
    return {ast.unparse(base) for base in node.bases}


def undocumented(node):
    """Fields of a class without a string below them."""
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
            yield field


# ---------------------------------------------------------------- ruff


@pytest.mark.parametrize("command", ["check --no-cache", "format --check --no-cache"])
def test_ruff_finds_nothing(command):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", *command.split(), "."]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, "\n" + result.stdout + result.stderr


# ---------------------------------------------------------------- mypy


@pytest.mark.processes
def test_mypy_finds_nothing():
    """With the installed packages' hints; what it knows of them is kept from run to run."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, "\n" + result.stdout + result.stderr


def test_few_errors_of_types_are_ignored_and_each_for_a_reason():
    """A library's hints are wrong there."""
    ignored = [
        (f"{path.name}:{number}", line)
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "type: ignore" in line
    ]
    assert len(ignored) <= IGNORED_HINTS
    assert_none(
        f"{where} has no code or no reason"
        for where, line in ignored
        if not re.search(r"# type: ignore\[[a-z-]+\]  # \w+", line)
    )
