"""Who may import whom: the layers of the package, held by reading the imports of every file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clue_fast"

LAYERS = (
    ("errors", "version"),
    ("deprecated", "internals"),
    ("files", "hub", "ops", "tables"),
    ("sites",),
    ("statistics",),
    ("reliability",),
    ("selection",),
    ("config", "data"),
    ("recording", "sparse", "objectives"),
    ("criteria", "evaluation"),
    ("localization", "trainer", "reporting"),
    ("html_report", "planning"),
    ("run",),
    ("unlearning",),
    ("demo", "env"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up. A module imports what stands below it, and neighbours of its own package."""

LONGEST_FILE = 500

INTERNALS = "internals"
"""The one module that may use private names of torch, transformers and accelerate."""

OWN_ATTRIBUTES = ("_clue_fast", "_fields")
"""How attributes begin that this package sets on modules; what every named tuple has, which its documentation says."""


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


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_").isidentifier()


def defined(trees: Iterable[ast.AST]) -> set[str]:
    """Names that are given to functions, classes, variables and attributes in some files."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def inherited() -> set[str]:
    """Private names of classes of the libraries that classes of this package have among their bases."""
    from transformers import Trainer, TrainerCallback

    bases = (nn.Module, torch.optim.Optimizer, torch.autograd.Function, Trainer, TrainerCallback)
    return {name for base in bases for name in dir(base) if is_private(name)}


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Private names of other packages that a file imports, reads, names in a string or overrides, each with its line.

    Args:
        tree: of the file.
        own: names that the package itself defines, so that ``x._name`` is likely to be its own.
    """
    theirs = inherited()
    in_text = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("clue_fast"):
            path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in path if is_private(name))
        elif isinstance(node, ast.Import):
            path = [name for alias in node.names for name in alias.name.split(".")]
            yield from ((node.lineno, name) for name in path if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if (node.attr not in own or node.attr in theirs) and not node.attr.startswith(OWN_ATTRIBUTES):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_text:
            name = node.value
            if is_private(name) and name not in own - theirs and not name.startswith(OWN_ATTRIBUTES):
                yield node.lineno, name
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]
            yield from ((method.lineno, method.name) for method in methods if method.name in theirs)


def test_private_names_of_libraries_stand_in_one_file() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    own = defined(tree for name, tree in trees.items() if name != INTERNALS)
    found = {name: sorted(foreign_names(tree, own)) for name, tree in trees.items()}
    assert found.pop(INTERNALS)
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch._subclasses.fake_tensor import FakeTensor", "_subclasses"),
        ("from torch.utils import _pytree", "_pytree"),
        ("import torch.utils._pytree", "_pytree"),
        ("torch._foreach_norm(tensors)", "_foreach_norm"),
        ("def is_view(self, x): return x._is_view()", "_is_view"),
        ("module._parameters['weight']", "_parameters"),
        ("getattr(config, '_name_or_path', '')", "_name_or_path"),
        ("class Mine(Trainer):\n    def _save_checkpoint(self): ...", "_save_checkpoint"),
        ("class Mine(Module):\n    def go(self): super()._apply(None)", "_apply"),
    ],
)
def test_a_private_name_of_a_library_is_found(source: str, name: str) -> None:
    """Also one that a class of this package happens to define as well, as ``_apply`` is."""
    assert name in [found for _, found in foreign_names(ast.parse(source), {"_apply"})]


@pytest.mark.parametrize("source", ["self._own = 1", "from clue_fast.x import _own", "f'{name}_bias'", "x._own()"])
def test_a_private_name_of_this_package_is_none_of_a_library(source: str) -> None:
    assert list(foreign_names(ast.parse(source), {"_own"})) == []
