"""What every test runs under: eight fake CPU devices, checked shapes, strict dtypes, no compilation cache.

Unless ``JAX_PLATFORMS`` says otherwise the tests use the CPU, whatever the machine has:
``JAX_PLATFORMS=cuda pytest -m gpu`` runs the GPU tests.
"""

import gc
import importlib.util
import os
import pathlib

from tests.helpers import compiler

# Before the first import of jax, which reads the environment once. A value that is set already stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # libtpu compiles for topologies here: without these it looks for the machine it believes to run on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Tests compile much and run little: 6 s instead of 31 s for a training step, on one core. Code that is
    # split for several threads takes a fifth more time, where the workers have a core each.
    quick = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    quick |= compiler.fusion_emitters(False)
    flags = [f"--{name}={str(value).lower()}" for name, value in quick.items()]
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {' '.join(flags)}".strip()
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already; a thread pool per worker and library on top only makes them wait.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import hypothesis
import jax
import jaxtyping
import pytest

from benchmarks.screenshots import CHROMIUM, DRIVER
from tests.helpers import interpreting, lowering, shape_checks

interpreting.shorten_callbacks()
lowering.reuse_contexts()
# Before the first import of these packages. Processes that tests start check nothing.
jaxtyping.install_import_hook(shape_checks.PACKAGES, "tests.helpers.shape_checks.checked")

jax.config.update("jax_numpy_dtype_promotion", "strict")
# A test that passes because yesterday's program was still on disk has tested yesterday's program.
jax.config.update("jax_enable_compilation_cache", False)
# Where in the code each operation of a program was traced: nothing here reads it, and it takes time.
jax.config.update("jax_traceback_in_locations_limit", 0)

hypothesis.settings.register_profile("gaze", derandomize=True, max_examples=15, deadline=None)
hypothesis.settings.load_profile("gaze")

pytest_plugins = ["tests.helpers.skips"]

CHECKED = ("tests/core/", "tests/models/", "tests/train/")
"""Folders whose tests check the shapes in type annotations."""
SHARING = ("tests/models/",)
"""Folders in which files share compiled programs: those of tests/helpers/models.py."""


def pytest_collection_finish():
    """Lets the garbage collector look at new objects only, and seldom: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def _programs():
    """Drops compiled programs before they are too many: each maps memory, Linux allows a process 65,530 maps,
    and XLA's compiler crashes where it gets no more."""
    yield
    lowering.drop_context()
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 35_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _shapes(request):
    """Checks shapes in the tests of the packages that have them, elsewhere only with ``-m long``: it takes an
    eighth of the time."""
    checked = request.node.nodeid.startswith(CHECKED) or request.config.getoption("markexpr") == "long"
    jaxtyping.config.update("jaxtyping_disable", not checked)


@pytest.fixture(autouse=True)
def _promotion(request):
    """Relaxes dtype promotion where a test is marked so: optax raises floats to int32 step counts."""
    marked = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if marked else "strict"):
        yield


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Keeps together what shares programs, leaves to ``-m long`` what the class of a shared suite names in
    ``left``, and skips what cannot run here, saying what would run it."""
    for item in items:
        named = getattr(item.cls, "left", ()) if item.cls else ()
        if item.name in named or item.originalname in named:
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("xdist_group") is None:
            # One worker for a class, for the functions of a file, or for a folder whose files share programs:
            # the other would compile the same again.
            scope = item.nodeid.rpartition("::")[0]
            scope = next((folder for folder in SHARING if scope.startswith(folder)), scope)
            item.add_marker(pytest.mark.xdist_group(scope))
    skips = {}
    if jax.config.jax_platforms.split(",")[0] not in ("cuda", "gpu"):
        skips["gpu"] = pytest.mark.skip(reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda")
    if importlib.util.find_spec("libtpu") is None:
        skips["tpu_aot"] = pytest.mark.skip(reason="needs the tpu-aot extra (libtpu); no TPU")
    missing = [str(program) for program in (CHROMIUM, DRIVER) if not program.exists()]
    if importlib.util.find_spec("selenium") is None:
        missing.append("selenium (the dev extra)")
    if missing:
        skips["browser"] = pytest.mark.skip(reason=f"needs {' and '.join(missing)}")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)
