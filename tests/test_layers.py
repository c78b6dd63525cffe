"""The order is the architecture: strategies < callbacks < trainer. These tests read the sources and import nothing.

The face (trainer/drivetrain/__init__.py) counts as trainer, where it lies: a lower layer cannot reach a higher one through it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"drivetrain.strategies": 0, "drivetrain.callbacks": 1, "drivetrain.trainer": 2}
OPTIONAL = {"deepspeed", "transformer_engine", "torchao", "msamp", "wandb", "tensorboard", "mlflow", "torchdata", "rich"}
OPTIONAL |= {"matplotlib", "torchmetrics", "lightning", "pytorch_lightning", "accelerate", "sklearn", "torch_xla"}
RANK_VARIABLE = re.compile(r"(LOCAL_|NODE_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(SLURM|OMPI|PMI|PMIX|MV2)_\w+")


@dataclass(frozen=True)
class Import:
    """One import statement, resolved: `module` is a module of ours or the name of a foreign one."""

    module: str
    line: int
    at_import_time: bool
    """False inside functions: such an import cannot take part in a circle."""


@cache
def sources() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found: dict[str, Path] = {}
    for folder in ("strategies", "callbacks", "trainer"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts[1:] if parts[:2] == ["trainer", "drivetrain"] else ["drivetrain", *parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports_of(name: str) -> tuple[Import, ...]:
    path = sources()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_imports(ast.parse(path.read_text()), package, at_import_time=True))


def _imports(node: ast.AST, package: str, *, at_import_time: bool) -> Iterator[Import]:
    """Every import below `node`; what stands under `if TYPE_CHECKING:` is for the type checker and left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(other, package, at_import_time=at_import_time)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_import_time)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*above, *([child.module] if child.module else [])])
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in sources() else base, child.lineno, at_import_time)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, package, at_import_time=at_import_time and not is_function)


def layer_of(module: str) -> int | None:
    for prefix, layer in LAYERS.items():
        if module == prefix or module.startswith(prefix + "."):
            return layer
    return LAYERS["drivetrain.trainer"] if module.split(".")[0] == "drivetrain" else None


def test_a_lower_layer_never_imports_a_higher_one() -> None:
    """Inside functions neither, and not as a string for importlib: that is the same dependency, only later."""
    wrong = []
    for name, path in sources().items():
        mine = layer_of(name)
        assert mine is not None
        for found in imports_of(name):
            other = layer_of(found.module)
            if other is not None and other > mine:
                wrong.append(f"{path.relative_to(ROOT)}:{found.line}: imports {found.module}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = re.fullmatch(r"(drivetrain\.\w+)(\.\w+)*(:\w+)?", node.value)
                if match and LAYERS.get(match[1], mine) > mine:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: names {node.value}")
    assert not wrong, "strategies < callbacks < trainer; take it as an argument, or under TYPE_CHECKING:\n" + "\n".join(wrong)


def test_our_modules_are_imported_under_one_name() -> None:
    """`import strategies` works in the repository's root and nowhere else, and would load each module a second time."""
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line}: {found.module}"
        for name, path in sources().items()
        for found in imports_of(name)
        if found.module.split(".")[0] in ("strategies", "callbacks", "trainer")
    ]
    assert not wrong, "write a relative import:\n" + "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    edges = {
        name: sorted({i.module for i in imports_of(name) if i.at_import_time and i.module in sources()} - {name})
        for name in sources()
    }
    circles = list(find_circles(edges))
    assert not circles, "import circles:\n" + "\n".join(" -> ".join(circle) for circle in circles)


def find_circles(edges: dict[str, list[str]]) -> Iterator[list[str]]:
    """One circle for each edge that closes one (depth first)."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> Iterator[list[str]]:
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            for other in edges[name]:
                yield from visit(other, [*way, name])
            done.add(name)

    for name in edges:
        yield from visit(name, [])


def test_the_circle_finder_finds_a_circle() -> None:
    assert list(find_circles({"a": ["b"], "b": ["c"], "c": ["b"]})) == [["b", "c", "b"]]
    assert list(find_circles({"a": ["b", "c"], "b": ["c"], "c": []})) == []


def test_optional_packages_are_imported_when_they_are_used_and_not_before() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line}: {found.module}"
        for name, path in sources().items()
        for found in imports_of(name)
        if found.at_import_time and found.module.split(".")[0] in OPTIONAL
    ]
    assert not wrong, "import it inside the function that needs it:\n" + "\n".join(wrong)


def test_only_environment_py_reads_what_a_launcher_says() -> None:
    """One place knows torchrun, SLURM and MPI; everything else asks the World. Setting variables for a child is not reading."""
    wrong = []
    for name, path in sources().items():
        if name != "drivetrain.strategies.environment":
            wrong += [f"{path.relative_to(ROOT)}:{line}: {variable}" for line, variable in rank_variables_read(path)]
    assert not wrong, "strategies/environment.py reads these:\n" + "\n".join(wrong)


def rank_variables_read(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and "environ" in ast.unparse(node.value):
            key = node.slice
        elif isinstance(node, ast.Call) and node.args and re.search(r"environ\.get$|getenv$", ast.unparse(node.func)):
            key = node.args[0]
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and RANK_VARIABLE.fullmatch(key.value):
            yield key.lineno, key.value


@pytest.mark.parametrize("folder", ["strategies", "callbacks", "trainer", "tests", "examples"])
def test_no_file_is_longer_than_five_hundred_lines(folder: str) -> None:
    """A file has one subject; one that is longer has two."""
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 500}
