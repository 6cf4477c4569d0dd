"""The compiled library of ``native``: found, checked, and registered with JAX once."""

import ctypes
import functools

import jax

from pallas_kernels.gaze_decode.native import build

TARGET, ROUTED_TARGET = "gaze_decode", "gaze_route_and_decode"
"""Names of the calls in a compiled program; both are one function of the library."""

_HOW = f"install a C++17 compiler such as g++ and run `python -m {__package__}`"


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, registered; or the reason why there is none, with how to get it."""
    if not build.LIBRARY.exists():
        return f"its library was not built; {_HOW}."
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
    except OSError as error:
        return f"its library does not load ({error}); {_HOW}."
    library.gaze_sources.restype = library.gaze_kernel.restype = ctypes.c_char_p
    library.gaze_bytes_read.restype = ctypes.c_int64
    if library.gaze_sources().decode() != build.digest():
        return f"its library was built from other sources than those beside it; {_HOW}."
    handler = jax.ffi.pycapsule(library.GazeDecode)
    try:
        for name in (TARGET, ROUTED_TARGET):
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except jax.errors.JaxRuntimeError as error:  # built with the headers of a newer jaxlib
        return f"this jaxlib does not take its library ({error}); {_HOW}."
    return library


def missing() -> str | None:
    """None if the library can be called, else the reason."""
    found = load()
    return found if isinstance(found, str) else None


def instruction_set() -> str:
    """The instruction set that is used on this machine: "plain", "avx2" or "avx512"."""
    found = load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found.gaze_kernel().decode()


def bytes_read() -> int:
    """Bytes of the cache, of descriptors and of the text stream that all calls of this process have read."""
    found = load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return int(found.gaze_bytes_read())
