"""What holds of the source as a whole: where imports point, how shapes are written, what is named and documented.

And of the tests: with what tolerances they compare.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynablocks
from dynablocks import experiments
from dynablocks.experiments import Cell
from dynablocks.fields import FIELDS

SOURCE = Path(dynablocks.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    ("__main__", "cli", "catalogue"),
    ("experiments",),
    ("fitting",),
    ("run_directory", "config", "arguments"),
    ("reporting", "training", "robustness", "testing"),
    ("models",),
    ("blocks", "composition", "reversible"),
    ("integrators",),
    ("fields", "switching"),
    ("lifting", "norms"),
    ("linear",),
    ("properties",),
    ("numerics",),
    ("data",),
    ("errors", "registry", "files", "run_files", "progress", "modes", "ball", "ensembles", "seeding"),
)
"""The source layout of CONTRIBUTING.md from top to bottom: each imports from its own layer and those below."""

HEIGHT = {room: -depth for depth, layer in enumerate(LAYERS) for room in layer}


def room_of(path: Path) -> str:
    """The module or package of ``dynablocks`` that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_when_loaded(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module does: not those of functions, nor what a type checker alone reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imported_when_loaded(ast.Module(node.orelse, []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.expr):
            yield from imported_when_loaded(node)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Absolute names; a relative import is named ``dynablocks.(relative)``, which is no room."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = "dynablocks.(relative)" if node.level else node.module
    return [f"{module}.{alias.name}" for alias in node.names]


def upward_imports(source: str, room: str) -> list[str]:
    """What a file of ``room`` imports from rooms above its own, or from none: a name that the package itself lends."""
    names = [name.split(".") for node in imported_when_loaded(ast.parse(source)) for name in imported_names(node)]
    rooms = {parts[1] for parts in names if parts[0] == "dynablocks" and len(parts) > 1}
    return sorted(other for other in rooms if HEIGHT.get(other, 1) > HEIGHT[room])


def test_every_room_has_a_place() -> None:
    assert sorted(HEIGHT) == sorted({room_of(path) for path in FILES} - {"__init__"})


def test_imports_point_downwards() -> None:
    inside = [path for path in FILES if room_of(path) != "__init__"]
    found = {str(path): upward_imports(path.read_text(encoding="utf-8"), room_of(path)) for path in inside}
    assert {path: rooms for path, rooms in found.items() if rooms} == {}


TWIN = """
import dynablocks
from typing import TYPE_CHECKING
from dynablocks import DynamicalBlock, run_files
from dynablocks.linear import Dense
if TYPE_CHECKING:
    from dynablocks.cli import main
else:
    import dynablocks.training.loop
class Field:
    from dynablocks.blocks import DynamicalBlock
try:
    from ..models import build
except ImportError:
    pass
def later():
    from dynablocks.experiments import Cell
"""


def test_upward_imports_are_seen() -> None:
    """The broken twin."""
    assert upward_imports(TWIN, "fields") == ["(relative)", "DynamicalBlock", "blocks", "training"]
    assert upward_imports(TWIN, "experiments") == ["(relative)", "DynamicalBlock"]
    assert upward_imports("from dynablocks.errors import InvalidArgument", "ball") == []


SHAPED = {"Bool", "Float", "Float32", "Float64", "Int", "Int64", "UInt8"}


def shapes(source: str) -> Iterator[str]:
    """The shapes of the jaxtyping annotations in a file."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(ast.Name(kind), ast.Tuple([_, ast.Constant(str(shape))])) if kind in SHAPED:
                yield shape


def can_be_read(dimension: str) -> bool:
    """Whether jaxtyping takes it for a dimension: a name, a number or "...", behind marks such as ``*``.

    It takes expressions of names before it, too; none is used here.
    """
    bare = dimension.lstrip("*#_?")
    return bare in ("", "...") or bare.isidentifier() or bare.isdigit()


def test_shapes_can_be_read() -> None:
    """Annotations are not evaluated, so a shape that is none would stand."""
    found = {(str(path), shape) for path in FILES for shape in shapes(path.read_text(encoding="utf-8"))}
    assert len(found) > 100
    assert {(path, shape) for path, shape in found if not all(map(can_be_read, shape.split()))} == set()


@pytest.mark.parametrize(("shape", "right"), [("batch ...", True), ("*batch n 2", True), ("batch 2n", False)])
def test_a_shape_that_is_none_is_seen(shape: str, right: bool) -> None:
    source = f'def step(x: Float64[Tensor, "{shape}"]) -> int: ...'
    assert [all(map(can_be_read, found.split())) for found in shapes(source)] == [right]


def cell_classes() -> Iterator[type[Cell]]:
    """The classes of cells that the experiments build."""
    for found in pkgutil.iter_modules(experiments.__path__):
        module = importlib.import_module(f"{experiments.__name__}.{found.name}")
        for kind in vars(module).values():
            here = isinstance(kind, type) and issubclass(kind, Cell) and kind.__module__ == module.__name__
            if here and not inspect.isabstract(kind):
                yield kind


def test_a_kind_of_cell_is_one_class() -> None:
    classes: dict[str, list[type[Cell]]] = {}
    for cell in cell_classes():
        classes.setdefault(object.__new__(cell).kind, []).append(cell)
    assert len(classes) > 20
    assert {kind: same for kind, same in classes.items() if len(same) > 1} == {}


ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "api"


def directives_of_the_reference() -> set[str]:
    """What its pages take from the docstrings."""
    pages = [page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md"))]
    return {line for page in pages for line in page.splitlines() if line.startswith(".. auto")}


def is_shown(module: str, name: str, directives: set[str]) -> bool:
    """Whether the page of a module shows one of its names, or a directive of its own."""
    if f".. autofunction:: {module}.{name}" in directives:
        return True
    public = getattr(importlib.import_module(module), "__all__", [name])
    return f".. automodule:: {module}" in directives and name in public


def undocumented(directives: set[str]) -> list[str]:
    """The public names of ``dynablocks`` that the reference does not show."""
    homes = {name: ("dynablocks", dynablocks._HOMES[name]) for name in dynablocks.__all__}
    return [name for name, home in homes.items() if not any(is_shown(module, name, directives) for module in home)]


def test_the_reference_has_every_public_name() -> None:
    directives = directives_of_the_reference()
    assert undocumented(directives) == []
    assert undocumented(directives - {".. autofunction:: dynablocks.load"}) == ["load"]
    assert undocumented(directives - {".. automodule:: dynablocks.models"}) == ["ModelConfig", "build"]


IMPORT = re.compile(r"\bfrom (dynablocks[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))")


def imports_of(text: str) -> set[tuple[str, str]]:
    """(module, name) of what a page tells its readers to import from modules of the package."""
    found = [(match[1], match[2] or match[3]) for match in IMPORT.finditer(text)]
    pairs = {(module, name.split()[0]) for module, names in found for name in names.split(",") if name.strip()}
    return {(module, name) for module, name in pairs if module != "dynablocks"}


def test_the_reference_has_what_the_pages_import() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    wanted = set().union(*(imports_of(page.read_text(encoding="utf-8")) for page in pages))
    directives = directives_of_the_reference()
    assert len(wanted) > 30
    assert {pair for pair in wanted if not is_shown(*pair, directives)} == set()
    fewer = directives - {".. autofunction:: dynablocks.cli.main", ".. automodule:: dynablocks.models.flow"}
    missing = {pair for pair in wanted if not is_shown(*pair, fewer)}
    assert missing >= {("dynablocks.cli", "main"), ("dynablocks.models.flow", "density_flow")}


def test_imports_of_pages_are_seen() -> None:
    lines = ("`from dynablocks.a import b; b()`", ">>> from dynablocks.c import d, e as f", "from dynablocks import g")
    assert imports_of("\n".join((*lines, "from dynablocks.h.i import (", "    j,", ")"))) == {
        ("dynablocks.a", "b"),
        ("dynablocks.c", "d"),
        ("dynablocks.c", "e"),
        ("dynablocks.h.i", "j"),
    }


def test_registered_fields_are_public() -> None:
    """The reference and the linter follow ``__all__``."""
    room = importlib.import_module("dynablocks.fields")
    shipped = {kind.__name__ for kind in FIELDS.values() if kind.__module__.startswith(f"{room.__name__}.")}
    assert len(shipped) > 20
    assert shipped - set(room.__all__) == set()


GLOBAL_SEED = re.compile(r"(?:torch\.(?:\w+\.)*)?(?:manual_seed|manual_seed_all)|torch\.(?:\w+\.)*seed")


def seeds_of_global_generators(source: str) -> list[int]:
    """The lines that seed a generator which is not the file's own."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call((ast.Attribute(attr=name) | ast.Name(name)) as called) if "seed" in name:
                if GLOBAL_SEED.fullmatch(ast.unparse(called)):
                    lines.append(node.lineno)
    return sorted(lines)


def test_two_files_seed_the_global_generators() -> None:
    """Elsewhere weights are drawn within ``seeded``, which leaves the generators as they were, those of GPUs too."""
    found = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    assert {path for path, source in found.items() if seeds_of_global_generators(source)} == {
        "seeding.py",
        "training/session.py",
    }


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("torch.manual_seed(0)", True),
        ("torch.random.manual_seed(0)", True),
        ("manual_seed(0)", True),
        ("torch.cuda.manual_seed_all(0)", True),
        ("torch.default_generator.manual_seed(0)", True),
        ("torch.seed()", True),
        ("torch.Generator().manual_seed(0)", False),
        ("generator.manual_seed(0)", False),
        ("mixed_seed(0)", False),
    ],
)
def test_a_seed_of_a_global_generator_is_seen(line: str, seen: bool) -> None:
    assert seeds_of_global_generators(line) == [1] * seen


COMPARISONS = ("allclose", "assert_allclose", "assert_close")


def without_tolerances(source: str) -> list[int]:
    """The lines of comparisons of tensors that leave a tolerance to the library.

    Not those behind ``not``: to differ by more than the tolerances given by default, far above rounding, is what they
    claim.
    """
    nodes = list(ast.walk(ast.parse(source)))
    refuted = {node.operand for node in nodes if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)}
    lines = []
    for node in nodes:
        match node:
            case ast.Call(ast.Attribute(attr=name) | ast.Name(name)) if name in COMPARISONS and node not in refuted:
                if not {"rtol", "atol"} <= {given.arg for given in node.keywords}:
                    lines.append(node.lineno)
    return sorted(lines)


def test_comparisons_say_both_tolerances() -> None:
    """Those given by default, 1e-5 or 1e-7 of the numbers, hide what is wrong in float64."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    found = {path.name: without_tolerances(path.read_text(encoding="utf-8")) for path in files}
    assert len(found) > 50
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("comparison", "seen"),
    [
        ("assert torch.allclose(a, b)", True),
        ("assert torch.allclose(a, b, atol=1e-12)", True),
        ("torch.testing.assert_close(a, b, rtol=1e-12)", True),
        ("assert_close(a, b, 1e-12, 1e-12)", True),
        ("torch.testing.assert_close(a, b, rtol=0, atol=1e-12)", False),
        ("assert not torch.allclose(a, b)", False),
    ],
)
def test_a_comparison_without_a_tolerance_is_seen(comparison: str, seen: bool) -> None:
    assert without_tolerances(comparison) == [1] * seen


def test_numbers_go_to_the_cpu_before_they_become_float64() -> None:
    """Devices without float64, such as Apple's, refuse the other order; rounding is bounded on CPUs and CUDA alone."""
    found = {path.name for path in FILES if ".double().cpu()" in path.read_text(encoding="utf-8")}
    assert found == set()
