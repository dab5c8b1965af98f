"""Figures of the source: modules, imports, sizes, and what one training run loads of it.

    python benchmarks/structure.py [--root CHECKOUT] [--no-run]
    python benchmarks/structure.py --picture

Everything but the loaded files is read from the syntax trees. `--picture` writes docs/floors.svg:
every module one floor above the highest module that it imports.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).parent.parent
PICTURE = Path("docs/floors.svg")
PACKAGE = "glovita_lib"

Function = tuple[str, str]  # module and name

SPINE = (
    "spec_root", "run_train", "experiment", "trainer", "objectives", "losses", "model", "encoder",
    "heads", "loader", "data", "augment",
)  # fmt: skip
"""Modules that a newcomer reads after glovita.py, in this order."""

FAMILIES = {
    "run": "#f6c9c9", "spec": "#cfe0f7", "data": "#cfeccb", "read": "#e3f2c4",
    "augment": "#fbe3b8", "encoder": "#e0d3f5", "head": "#f3cfe9", "peft": "#c9ecec",
    "metric": "#f8efb0", "plot": "#e6d9c8",
}  # fmt: skip
"""Prefixes of module names and the colours of their boxes."""
OTHER = "#ececec"

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import glovita
code = glovita.main(sys.argv[2:])
names = [name for name in sys.modules if name.split(".")[0] in ("glovita", "glovita_lib")]
print("loaded", len(names), file=sys.stderr)
sys.exit(code)
"""
SHORT = ["training.epochs=1", "data.data_fraction=0.1", "task.bootstrap=20", "logger.backend=none"]


# ------------------------------------------------------------------------------------ source


class Source:
    """Syntax trees of a checkout's package, without __init__, and of its entry script."""

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = sorted((root / PACKAGE).glob("*.py"))
        self.texts = {p.stem: p.read_text(encoding="utf-8") for p in paths if p.stem != "__init__"}
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}
        self.entry = ast.parse((root / "glovita.py").read_text(encoding="utf-8"))

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Modules of the package that each module imports, anywhere in it."""
        return {name: imported(tree) & self.trees.keys() for name, tree in self.trees.items()}

    def reached(self, start: str) -> set[str]:
        """A module and everything that it imports, directly or through others."""
        found, left = set(), {start}
        while left:
            found |= left
            left = set().union(*(self.imports[name] for name in left)) - found
        return found

    @cached_property
    def floors(self) -> dict[str, int]:
        """1 for a module that imports none, else one more than the highest that it imports.

        Raises:
            ValueError: imports go in a circle.
        """
        floors: dict[str, int] = {}
        left = dict(self.imports)
        while left:
            free = [name for name, needs in left.items() if needs <= floors.keys()]
            if not free:
                raise ValueError(f"imports go in a circle: {', '.join(left)}")
            for name in free:
                floors[name] = 1 + max((floors[below] for below in left.pop(name)), default=0)
        return floors

    def functions(self) -> Iterator[tuple[Function, ast.FunctionDef]]:
        """Functions of modules, without methods and nested ones."""
        for module, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    yield (module, node.name), node

    def uses(self) -> tuple[Counter[Function], Counter[Function]]:
        """How often each module-level function is called, and named at all, outside itself."""
        calls: Counter[Function] = Counter()
        named: Counter[Function] = Counter()
        for module, tree in {**self.trees, "": self.entry}.items():
            names, modules = import_names(tree)
            for statement in tree.body:
                own = (module, getattr(statement, "name", ""))
                for node in ast.walk(statement):
                    wanted = target(node, module, names, modules)
                    if wanted and wanted != own:
                        named[wanted] += 1
                    wanted = isinstance(node, ast.Call) and target(
                        node.func, module, names, modules
                    )
                    if wanted and wanted != own:
                        calls[wanted] += 1
        return calls, named

    def single_calls(self) -> tuple[int, int]:
        """Module-level functions with a name, and those of them that are called in one place and
        named nowhere else; a function `_` is registered, not called by its name."""
        calls, named = self.uses()
        functions = {key for key, _ in self.functions() if key[1] != "_"}
        return len(functions), sum(calls[key] == named[key] == 1 for key in functions)


def imported(tree: ast.Module) -> set[str]:
    """Modules of the package that a file imports, and other names of its import statements."""
    names, modules = import_names(tree)
    return {module for module, _ in names.values()} | set(modules.values())


def import_names(tree: ast.Module) -> tuple[dict[str, Function], dict[str, str]]:
    """What names of a file stand for: functions of modules, and modules of the package."""
    names: dict[str, Function] = {}
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            module = node.module.partition(".")[2]
            names |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return names, modules


def target(
    node: ast.AST, module: str, names: dict[str, Function], modules: dict[str, str]
) -> Function | None:
    """The function that an expression may name: `name` or `module.name`."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return names.get(node.id, (module, node.id))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = modules.get(node.value.id)
        return (owner, node.attr) if owner else None
    return None


def loaded_files(root: Path) -> int:
    """Files of the package and the entry script that a short run of specs/digits_resnet.toml has
    imported at its end.

    Raises:
        subprocess.CalledProcessError: the run failed; its messages are printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec = root / "specs" / "digits_resnet.toml"
        command = [sys.executable, "-c", RUN, root, spec, "--override", "exp_dir=runs", *SHORT]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        result = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
        )
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        result.check_returncode()
    return int(result.stderr.rpartition("loaded ")[2])


def figures(root: Path, *, run: bool) -> dict[str, str]:
    """All figures of a checkout, by what they say."""
    source = Source(root)
    lines = [len(text.splitlines()) for text in source.texts.values()]
    lengths = [
        node.end_lineno - node.lineno + 1
        for tree in source.trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    functions, single = source.single_calls()
    found = {
        "modules": len(source.trees),
        "import arrows": sum(map(len, source.imports.values())),
        "floors": max(source.floors.values()),
        "modules that run_train reaches": len(source.reached("run_train")),
        "lines": sum(lines),
        "lines of a module, median": median(lines),
        "lines of a function or method, median": median(lengths),
        "functions at module level": functions,
        "of these with a single call site": single,
    }
    if run:
        found["files that a run of digits_resnet loads"] = loaded_files(root)
    return {name: f"{value:,.0f}" for name, value in found.items()}


# ----------------------------------------------------------------------------------- picture

WIDTH = 960  # pixels
LEFT = 44  # where boxes begin, pixels
BOX_HEIGHT, GAP, CHARACTER = 22, 6, 7.3  # pixels
FLOOR_GAP = 12  # between two floors, pixels


def family(module: str) -> str:
    """Prefix of a module's name among the ten, plurals included; empty for other names."""
    return next((p for p in FAMILIES if re.fullmatch(rf"{p}(s|sets)?(_.*)?", module)), "")


def picture(source: Source) -> str:
    """The floors as SVG: boxes of module names in the colours of their prefixes, the top floor
    first, the spine with a dark frame."""
    parts = list(legend())
    y = 44
    for floor in range(max(source.floors.values()), 0, -1):
        modules = [name for name, at in source.floors.items() if at == floor]
        modules.sort(key=lambda name: ([*FAMILIES, ""].index(family(name)), name))
        parts.append(f'<text x="30" y="{y + 15}" text-anchor="end" fill="#666">{floor}</text>')
        x = LEFT
        for name in modules:
            width = box_width(name)
            if x + width > WIDTH - GAP:
                x, y = LEFT, y + BOX_HEIGHT + GAP
            parts.append(box(x, y, name, FAMILIES.get(family(name), OTHER), spine=name in SPINE))
            x += width + GAP
        y += BOX_HEIGHT + FLOOR_GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}"'
        f' height="{y}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def legend() -> Iterator[str]:
    """The prefixes with their colours, and what the frame means."""
    x = LEFT
    for name, color in [*FAMILIES.items(), ("other", OTHER)]:
        yield box(x, 8, name, color)
        x += box_width(name) + GAP
    yield box(x, 8, "spine", "#fff", spine=True)


def box_width(text: str) -> int:
    """Pixels of a box around a name."""
    return round(len(text) * CHARACTER) + 12


def box(x: int, y: int, text: str, color: str, *, spine: bool = False) -> str:
    """A box with a name in it."""
    frame = 'stroke="#222" stroke-width="2"' if spine else 'stroke="#bbb"'
    width = box_width(text)
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="4" fill="{color}"'
        f" {frame}/>"
        f'<text x="{x + width / 2:g}" y="{y + 15}" text-anchor="middle" fill="#222">{text}</text>'
    )


def main() -> None:
    """Print the figures, or write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="checkout; default: this one")
    parser.add_argument("--no-run", action="store_true", help="leave out what a run loads")
    parser.add_argument("--picture", action="store_true", help=f"write {PICTURE} instead")
    asked = parser.parse_args()
    root = asked.root.resolve()
    if asked.picture:
        path = root / PICTURE
        path.parent.mkdir(exist_ok=True)
        path.write_text(picture(Source(root)), encoding="utf-8")
        print(path)
        return
    for name, value in figures(root, run=not asked.no_run).items():
        print(f"{name:42} {value:>8}")


if __name__ == "__main__":
    main()
