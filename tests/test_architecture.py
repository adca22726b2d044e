"""Who may import whom: the layers of the package, held by reading the imports of every file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clue_fast"

LAYERS = (
    ("errors", "version"),
    ("deprecated",),
    ("files", "hub", "ops"),
    ("sites",),
    ("statistics",),
    ("reliability",),
    ("selection",),
    ("config", "data"),
    ("recording", "sparse", "objectives"),
    ("criteria", "evaluation"),
    ("localization", "trainer", "reporting"),
    ("unlearning",),
    ("demo", "env"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up. A module imports what stands below it, and neighbours of its own package."""

LONGEST_FILE = 500


def modules() -> dict[str, Path]:
    """Every module below clue_fast, by its name without the package's; kernels are tested for themselves."""
    files = (path for path in PACKAGE.rglob("*.py") if PACKAGE / "kernels" not in path.parents)
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(files)}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a file imports, and whether it needs them as soon as it is imported itself."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("clue_fast"):
                base = (child.module or "").removeprefix("clue_fast").lstrip(".")
                for alias in child.names:
                    whole = f"{base}.{alias.name}".lstrip(".")
                    yield (whole if is_module(whole) else base, at_once)
            elif isinstance(child, ast.Import):
                yield from ((a.name[10:], at_once) for a in child.names if a.name.startswith("clue_fast."))
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, at_once and not typing_only and not later)

    return walk(ast.parse(path.read_text(encoding="utf-8")), True)


def is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def rank(module: str) -> int:
    top = module.partition(".")[0]
    found = [number for number, layer in enumerate(LAYERS) if top in layer]
    assert found, f"{module} belongs to no layer; give it one here"
    return found[0]


@pytest.mark.parametrize("module", sorted(modules().keys() - {"__init__"}))
def test_no_import_runs_up(module: str) -> None:
    """Also none inside a function or for types only."""
    top = module.partition(".")[0]
    for imported, _ in imports(modules()[module]):
        if imported.partition(".")[0] not in (top, "", "_C", "kernels"):
            assert rank(imported) < rank(module), f"{module} imports {imported}, which stands above or beside it"


def test_no_import_runs_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        module = name.removesuffix(".__init__")
        wanted = {other for other, at_once in imports(path) if at_once and other not in ("", "_C", "kernels")}
        graph[module] = wanted - {module}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_import_torch_and_triton_alone() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = ["clue_fast.kernels"] if node.level else [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                allowed = top in ("torch", "triton", *sys.stdlib_module_names) or name.startswith("clue_fast.kernels")
                assert allowed, f"kernels/{path.name} imports {name}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_file_holds_one_subject_that_fits_on_a_few_pages(module: str) -> None:
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines; divide it by subject"
