"""torch and transformers are imported in one module, so that nothing else needs them."""

import ast
import pathlib

import gaze_jax

PACKAGE = pathlib.Path(gaze_jax.__file__).parent


def imported(path: pathlib.Path) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names} | {name for name in names if name.endswith(".torch")}


def test_one_module_imports_torch_and_transformers():
    """The original of a converted model, for --verify."""
    theirs = {"torch", "transformers", "safetensors.torch"}
    found = {path.relative_to(PACKAGE).as_posix(): imported(path) & theirs for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {"convert/original.py": theirs}
