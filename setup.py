"""Builds the library of the decoding implementation `native`; everything else is in pyproject.toml.

It is optional: without a C++ compiler the package installs, and `native` says how to get it.
"""

import importlib.util
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = "pallas_kernels.gaze_decode.native"

# By its path: the package itself imports jax, which is not there while it is built.
_spec = importlib.util.spec_from_file_location("build", Path(*PACKAGE.split("."), "build.py").absolute())
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


class BuildLibrary(build_ext):
    """A shared library that Python does not import, so it has no tag of a Python version."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile_library(out)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(getattr(error, "stderr", None) or str(error)) from error


class AnyPython(bdist_wheel):
    """The wheel is for a platform, and for every Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            f"{PACKAGE}.{build.LIBRARY.stem}",
            sources=[str(path.relative_to(Path.cwd())) for path in build.sources() if path.suffix == ".cc"],
            optional=True,
        )
    ],
)
