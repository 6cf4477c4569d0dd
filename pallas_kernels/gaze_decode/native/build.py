"""Compile the library of ``native`` with any C++17 compiler; CXX names another than c++.

setup.py reads this file by itself, so it imports the standard library only.
"""

import hashlib
import importlib.util
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libgaze_decode.so"

_KERNELS = {
    "x86_64": {
        "plain": ("4",),
        "avx2": ("8", "-mavx2", "-mfma"),
        "avx512": ("16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    }
}
"""Machine -> instruction set -> floats of a vector and the compiler's flags; elsewhere only the plain one."""


def sources() -> list[Path]:
    """All files of the library, in a fixed order."""
    return sorted([*FOLDER.glob("*.cc"), *FOLDER.glob("*.h")])


def digest() -> str:
    """What identifies the sources; a library carries that of its own."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources())).hexdigest()[:16]


def headers() -> Path:
    """The folder of XLA's headers, which jaxlib has; found without importing it.

    Raises:
      FileNotFoundError: there is no jaxlib.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("jaxlib, whose headers the library needs, is not installed.")
    return Path(spec.submodule_search_locations[0]) / "include"


def compile_library(out: Path, flags: Sequence[str] = ()) -> None:
    """Compile the library.

    Args:
      out: the file to write; replaced as a whole.
      flags: for the compiler and the linker, after the usual ones.

    Raises:
      FileNotFoundError: there is no compiler, or no jaxlib.
      subprocess.CalledProcessError: it failed; ``stderr`` says why.
    """
    compiler = os.environ.get("CXX", "c++").split()
    common = [
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-fvisibility=hidden",
        "-pthread",
    ]
    common += [f"-isystem{headers()}", f'-DGAZE_SOURCES="{digest()}"', *flags]
    kernels = _KERNELS.get(platform.machine(), {"plain": ("4",)})

    def run(*arguments: str) -> None:
        subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True)

    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        objects = []
        for path in FOLDER.glob("*.cc"):
            for name, (lanes, *own) in kernels.items() if path.name == "kernel.cc" else [("", ("",))]:
                objects.append(f"{scratch}/{path.stem}{name}.o")
                named = [f"-DGAZE_LANES={lanes}", f"-DGAZE_KERNEL=kernel_{name}", *own] if name else []
                run(*common, *named, "-c", str(path), "-o", objects[-1])
        run(*common, "-shared", *objects, "-o", f"{scratch}/library.so")
        os.replace(f"{scratch}/library.so", out)
