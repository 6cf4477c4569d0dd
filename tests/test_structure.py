"""The layout of the code: imports run downwards, libraries stay where they belong, files are short."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gaze_jax", "pallas_kernels")
COMMANDS = ("train.py", "eval.py", "generate.py", "convert.py")

# From the bottom up. A package may import those of the rows before its own, and itself.
ROWS = (
    ("pallas_kernels",),
    ("errors", "stored", "config", "writing", "cache_folder", "compiles"),
    ("core",),
    ("parallel",),
    ("data", "chat", "media", "models"),
    ("families",),
    ("corpora",),
    ("train",),
    ("convert",),
    ("infer",),
    ("viewer", "evaluate"),
    ("commands",),
)
# Of one row: these may import those.
BESIDE = {
    ("chat", "data"),
    ("evaluate", "viewer"),
    ("config", "errors"),
    ("config", "stored"),
    ("stored", "errors"),
    ("writing", "errors"),
}
RANK = {package: row for row, packages in enumerate(ROWS) for package in packages}

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 80


def modules():
    """Dotted name -> syntax tree, of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def imported(tree):
    """Dotted names that a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def package_of(module):
    """The row's name: pallas_kernels, or the part after gaze_jax; None for gaze_jax itself."""
    first, _, rest = module.partition(".")
    if first == "pallas_kernels":
        return first
    return rest.split(".")[0] or None


def own_imports(module):
    """Modules of this project that a module imports."""
    return {name for name in imported(MODULES[module]) if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) and not m.endswith(".__main__")])
def test_imports_run_downwards(module):
    own = package_of(module)
    for other in own_imports(module):
        target = package_of(other)
        if target is None or target == own:
            assert target == own or other == "gaze_jax", f"{module} imports {other}"
            continue
        below = RANK[target] < RANK[own] or (own, target) in BESIDE
        assert below, f"{module} imports {other}, which is not below it"


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other in own_imports(name) if other != name} for name in MODULES}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_package_has_a_row():
    packages = {package_of(name) for name in MODULES} - {None, "__main__"}
    assert packages == set(RANK)


def roots(module):
    return {name.split(".")[0] for name in imported(MODULES[module])}


def test_kernels_import_jax_and_numpy_only():
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    for name in MODULES:
        if package_of(name) == "pallas_kernels":
            assert roots(name) <= allowed, name


def test_core_knows_no_model_library():
    for name in MODULES:
        if package_of(name) == "core":
            assert not roots(name) & {"flax", "optax", "orbax", "grain"}, name


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_library_of_the_originals_is_imported_in_one_module(library):
    assert [name for name in MODULES if library in roots(name)] == ["gaze_jax.convert.original"]


@pytest.mark.parametrize("script", COMMANDS)
def test_scripts_are_shims(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    assert set(imported(tree)) <= {
        f"gaze_jax.commands.{Path(script).stem}",
        "gaze_jax.commands",
        "gaze_jax.commands.cli",
    }
    statements = [node for node in tree.body if not isinstance(node, ast.Expr)]
    assert len(statements) <= 3


@pytest.mark.parametrize("module", MODULES)
def test_no_file_and_no_function_is_too_long(module):
    tree = MODULES[module]
    lines = max((node.end_lineno or 0 for node in tree.body), default=0)
    assert lines <= MOST_LINES, f"{module} has {lines} lines"
    if module.endswith(("kernel", "kernels")):
        return  # a kernel's body is one piece
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{module}.{node.name} has {length} lines"
