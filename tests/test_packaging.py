"""What is installed: every package and every file beside the code. scripts/wheel.sh tries a wheel."""

import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def folders():
    """Folders that hold code to be installed -> name of the package."""
    found = {ROOT / "configs": "gaze_jax.configs"}
    for top in ("gaze_jax", "pallas_kernels"):
        for file in (ROOT / top).rglob("*.py"):
            found[file.parent] = ".".join(file.parent.relative_to(ROOT).parts)
    return found


def test_every_package_is_installed():
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders().values())
    assert SETUPTOOLS["package-dir"] == {"gaze_jax.configs": "configs"}
    for folder in folders():
        assert (folder / "__init__.py").exists(), f"{folder} is no package"


def test_files_beside_the_code_are_installed():
    data = SETUPTOOLS["package-data"]
    for package in ("gaze_jax", "pallas_kernels"):
        files = [
            path.relative_to(ROOT / package).as_posix()
            for path in (ROOT / package).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc", ".so")  # .so: compiled by setup.py
        ]
        missing = [file for file in files if not any(fnmatch.fnmatch(file, p) for p in data[package])]
        assert not missing, f"{package} leaves these out of the wheel: {missing}"
        unused = [p for p in data[package] if not fnmatch.filter(files, p.replace("**/", "*/"))]
        assert not unused, f"{package} declares files that are not there: {unused}"
