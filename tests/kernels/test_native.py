"""The C++ library beyond the shared suite: routing in the same call, threads, what it reads, and refusals."""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode, timing
from pallas_kernels import GazeSpec, dispatch
from pallas_kernels.gaze_decode import api
from pallas_kernels.gaze_decode.native import build, library
from tests.helpers import cases, native_calls, native_library
from tests.helpers.routed import close, expected

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _built():
    native_library.needed()


def routed(case, descriptors, budget, visible, order, *, capacity):
    """Select and attend in one call."""
    options = {"spec": case.spec, "implementation": "native"}
    kept = (case.q, api.pack(case.k, case.v, **options), case.text_k, case.text_v, case.layer)
    selecting = (case.q, descriptors, budget, visible, order)
    return api.route_and_decode(
        *kept, case.visual_seen, case.text_seen, *selecting, capacity=capacity, **options
    )


def problem(seed, *, capacity, **sizes):
    """A case, and what selects: whole numbers, so that scores are exact and many of them tie."""
    case = cases.decode(seed=seed, capacity=capacity, **sizes)
    rng = np.random.default_rng(seed)
    batch, _, dim = case.q.shape
    layers, _, kv_heads, regions = case.k.shape[:4]
    q = jnp.asarray(rng.integers(-2, 3, size=case.q.shape), case.q.dtype)
    descriptors = jnp.asarray(rng.integers(-2, 3, size=(layers, batch, kv_heads, regions, dim)), case.q.dtype)
    budget = jnp.asarray(rng.integers(0, regions + 2, size=batch), jnp.int32)
    visible = jnp.asarray(rng.random((batch, regions)) < 0.8)
    order = jnp.asarray(np.stack([rng.permutation(regions) for _ in range(batch)]), jnp.int32)
    return dataclasses.replace(case, q=q), (descriptors, budget, visible, order)


def same(case, selecting, capacity):
    got, wanted = (
        jax.jit(functools.partial(run, capacity=capacity))(case, *selecting) for run in (routed, expected)
    )
    close(got, wanted, case.q.dtype)


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(
    ("select_per", "dtype", "capacity"),
    [("head", "float32", 4), ("kv_head", "float32", 9), ("head", "bfloat16", 9), ("kv_head", "bfloat16", 4)],
)
def test_routing_in_the_call_equals_routing_before_it(select_per, dtype, capacity):
    """Ties, hidden regions, budgets from 0 to more than all of them: the same indices, scores and output."""
    case, selecting = problem(3, capacity=capacity, regions=9, select_per=select_per, dtype=jnp.dtype(dtype))
    same(case, selecting, capacity)


@pytest.mark.long
@pytest.mark.usefixtures("_built")
def test_a_hundred_shapes_through_jit():
    rng = np.random.default_rng(0)
    for seed in range(100):
        sizes = {
            "layers": int(rng.integers(1, 4)),
            "size": int(rng.integers(1, 4)),
            "kv_heads": int(rng.integers(1, 5)),
            "group": int(rng.integers(1, 10)),
            "regions": int(rng.integers(1, 40)),
            "slots": int(rng.integers(1, 40)),
            "text": int(rng.integers(0, 700)),
            "dim": int(rng.integers(1, 140)),
            "select_per": ("head", "kv_head")[seed % 2],
            "dtype": (jnp.float32, jnp.bfloat16)[seed // 2 % 2],
        }
        capacity = int(rng.integers(1, sizes["regions"] + 3))
        same(*problem(seed, capacity=capacity, **sizes), capacity)


@pytest.mark.usefixtures("_built")
def test_routing_under_vmap():
    """Several queries of one cache: one call for each."""
    case, selecting = problem(1, capacity=3)
    queries = jnp.stack([case.q, case.q[::-1], -case.q])

    def run(q):
        return routed(dataclasses.replace(case, q=q), *selecting, capacity=3)

    for mapped, one in zip(
        jax.jit(jax.vmap(run))(queries), jax.tree.map(lambda *a: jnp.stack(a), *map(run, queries))
    ):
        np.testing.assert_array_equal(mapped, one)


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("select_per", ["head", "kv_head"])
def test_a_large_call_is_shared_by_the_threads_of_xla(select_per):
    """Enough bytes to wake helpers, and chunks of every unit: the reference's values, twice the same bits."""
    sizes = {"regions": 90, "slots": 36, "text": 1100, "dim": 64, "kv_heads": 4, "group": 4, "layers": 2}
    case, selecting = problem(5, capacity=40, select_per=select_per, **sizes)
    same(case, selecting, 40)
    run = jax.jit(lambda case, *a: routed(case, *a, capacity=40))
    first, second = run(case, *selecting), run(case, *selecting)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_random_calls(count):
    """Every instruction set of this processor, 1, 2 and 4 threads; NaN in all that may not be read."""
    found = native_calls.load(build.LIBRARY)
    for seed in range(count):
        native_calls.check(found, seed)


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(("per_head", "most"), [(0, 1.02), (1, 1.02)])
def test_it_reads_what_it_must(per_head, most):
    """By its own count: descriptors, the union of a group's lists, and the text stream, each once."""
    rng = np.random.default_rng(0)
    b, k, g, r, p, s, d, j = 1, 2, 4, 128, 36, 256, 128, 13
    heads = k * g
    shared = heads if per_head else k

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {"q": floats(b, heads, d), "keys": floats(2, b, k, r, p, d), "values": floats(2, b, k, r, p, d)}
    arrays |= {"text_keys": floats(2, b, k, s, d), "text_values": floats(2, b, k, s, d)}
    arrays |= {"visual_seen": np.ones((b, r, p), np.uint8), "text_seen": np.ones((b, s), np.uint8)}
    arrays |= {"features": arrays["q"], "descriptors": floats(2, b, k, r, d)}
    arrays |= {"budget": np.full(b, j, np.int32), "visible": np.ones((b, r), np.uint8)}
    arrays |= {"order": np.arange(r, dtype=np.int32)[None], "indices": np.zeros((b, shared, j), np.int32)}
    arrays |= {"scores": floats(b, shared, r), "out": floats(b, heads, d), "lse": floats(b, heads)}
    sizes = dict(zip(native_calls.SIZES, (b, k, g, r, p, s, d, j, d, 1)))
    flags = dict.fromkeys(native_calls.FLAGS, 0) | {"per_head": per_head, "route": 1}
    case = native_calls.Case(sizes, flags, 1.0, arrays)
    read = case.run(native_calls.load(build.LIBRARY), 1, "plain")
    union = sum(len(set(lists.ravel())) for lists in arrays["indices"].reshape(k, -1))
    floor = 4 * (k * d * r + 2 * d * p * union + 2 * k * d * s)
    assert 1.0 <= read / floor <= most


@pytest.mark.usefixtures("_built")
def test_nothing_of_the_cache_is_copied():
    """A scan over layers that writes a token into the text stream and then decodes, all donated."""
    layers, kv, regions, slots, text, dim = 4, 2, 64, 16, 64, 32
    spec = GazeSpec(0.1, select_per="kv_head")

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = array(jnp.float32, layers, 1, kv, regions, slots, dim)
    packed = jax.eval_shape(lambda k: api.pack(k, k, spec=spec, implementation="native"), keys)
    stream = array(jnp.float32, layers, 1, kv, text, dim)

    def step(q, packed, text_k, text_v, descriptors, budget, visible, order, seen, text_seen, at):
        def body(carry, layer):
            q, text_k, text_v = carry
            new = q[None, :, :kv, None]
            where = (layer, 0, 0, at, 0)
            text_k, text_v = (jax.lax.dynamic_update_slice(a, new, where) for a in (text_k, text_v))
            arguments = (
                q,
                packed,
                text_k,
                text_v,
                layer,
                seen,
                text_seen,
                q,
                descriptors,
                budget,
                visible,
                order,
            )
            found = api.route_and_decode(*arguments, capacity=4, spec=spec, implementation="native")
            return (q + found.out, text_k, text_v), found.indices

        carry, indices = jax.lax.scan(body, (q, text_k, text_v), jnp.arange(layers, dtype=jnp.int32))
        return carry, packed, descriptors, indices

    descriptors = array(jnp.float32, layers, 1, kv, regions, dim)
    selecting = (array(jnp.int32, 1), array(jnp.bool_, 1, regions), array(jnp.int32, 1, regions))
    masks = (array(jnp.bool_, 1, regions, slots), array(jnp.bool_, 1, text))
    arguments = (array(jnp.float32, 1, 2 * kv, dim), packed, stream, stream, descriptors, *selecting, *masks)
    compiled = jax.jit(step, donate_argnums=(1, 2, 3, 4)).lower(*arguments, array(jnp.int32)).compile()
    large = []
    for line in compiled.as_text().splitlines():
        found = re.search(r"= \(?\w+\[([\d,]*)\]\S* (copy|fusion|transpose|dynamic-slice)\(", line)
        if found and np.prod([int(n) for n in found[1].split(",") if n]) >= kv * text * dim:
            large.append(line.strip())
    # Writing a token is a fusion of the text stream in place.
    assert all("dynamic-update-slice" in line for line in large), large
    assert "gaze_route_and_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * kv * text * dim


@pytest.mark.usefixtures("_built")
def test_the_benchmark_prints_what_the_library_counts():
    """K * (bDR + 2bDPU + 2bDS) of every sequence and layer, and a little for masks and lists."""
    args = decode.parse(["--quick", "--impl=native", "--select_per=kv_head", "--rounds=1"])
    (row,) = decode.one_problem(timing.Shape(72, 2, 1), "tiny", 2, args, lambda rows: None)
    np.testing.assert_allclose(row["read_bytes"], row["floor_bytes"], rtol=0.05)


@pytest.mark.usefixtures("_built")
def test_refusals():
    """Each in one sentence that says what to do."""
    case, selecting = problem(0, capacity=3)
    with (
        dispatch.compile_for("tpu"),
        pytest.raises(NotImplementedError, match=r"for CPUs .* choose 'xla'\.$"),
    ):
        routed(case, *selecting, capacity=3)
    half = dataclasses.replace(case, q=case.q.astype(jnp.float16))
    with pytest.raises(
        NotImplementedError, match=r"takes float32 and bfloat16, and q is float16; choose 'xla'\.$"
    ):
        routed(half, *selecting, capacity=3)
    with pytest.raises(NotImplementedError, match=r"'native' has no gradient; use 'xla' with indices\."):
        jax.grad(lambda q: routed(dataclasses.replace(case, q=q), *selecting, capacity=3).out.sum())(case.q)
    packed = api.pack(case.k, case.v, spec=case.spec, implementation="xla")
    arguments = (
        case.q,
        packed,
        case.text_k,
        case.text_v,
        case.layer,
        case.visual_seen,
        case.text_seen,
        case.q,
    )
    with pytest.raises(NotImplementedError, match=r"'xla' does not route; native, tpu, gpu do\.$"):
        api.route_and_decode(*arguments, *selecting, capacity=3, spec=case.spec, implementation="xla")
    descriptors, *rest = selecting
    with pytest.raises(ValueError, match=r"descriptors has shape .* expected"):
        routed(case, descriptors[:, :, :, 1:], *rest, capacity=3)


def test_without_a_library_it_says_how_to_get_one(monkeypatch, tmp_path):
    """Not built, not a library, of other sources: one sentence with the command."""
    how = rf"install a C\+\+17 compiler such as g\+\+ and run `python -m {build.__package__}`\.$"
    fresh = library.load.__wrapped__
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "none.so")
    assert re.search(f"^its library was not built; {how}", fresh())
    monkeypatch.setattr(library, "load", fresh)
    with pytest.raises(
        NotImplementedError, match=f"'native' cannot run here: its library was not built; {how}"
    ):
        api.pack(*[jnp.zeros((1,) * 6)] * 2, spec=GazeSpec(1.0), implementation="native")
    (tmp_path / "none.so").write_text("no library")
    assert re.search(f"^its library does not load .*; {how}", fresh())


@pytest.mark.usefixtures("_built")
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(build, "digest", lambda: "another")
    assert "from other sources" in library.load.__wrapped__()


def test_without_a_compiler_the_package_is_built(tmp_path):
    """setup.py warns, and goes on."""
    for name in ("setup.py", "pyproject.toml", "README.md", "requirements.txt", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("configs", "gaze_jax", "pallas_kernels"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    environment = os.environ | {"CXX": "/nonexistent/c++"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nonexistent" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


SANITIZERS = {"address,undefined": ("libasan.so", "ASAN_OPTIONS"), "thread": ("libtsan.so", "TSAN_OPTIONS")}


@pytest.mark.long
@pytest.mark.parametrize("kind", SANITIZERS)
def test_random_calls_under_a_sanitizer(kind, tmp_path):
    """Addresses, undefined behaviour and data races: 1,000 calls on 1, 2 and 4 threads."""
    runtime, options = SANITIZERS[kind]
    path = _sanitized(kind, tmp_path)
    script = [sys.executable, "tests/helpers/native_calls.py", str(path), "1000", "50000"]
    _clean(script, runtime, options)


@pytest.mark.long
def test_the_shared_suite_under_sanitizers(tmp_path):
    """The same library under JAX: addresses and undefined behaviour."""
    path = _sanitized("address,undefined", tmp_path)
    program = (
        "import pathlib, sys, pytest; from pallas_kernels.gaze_decode.native import build; "
        "build.LIBRARY = pathlib.Path(sys.argv[1]); "
        "sys.exit(pytest.main(['-q', '-n0', 'tests/kernels/test_decode.py', 'tests/kernels/test_native.py', "
        "'-k', 'TestNative or routing or large']))"
    )
    _clean([sys.executable, "-c", program, str(path)], *SANITIZERS["address,undefined"])


def _sanitized(kind, folder):
    """The library compiled with a sanitizer, which must be there."""
    native_library.needed()
    path = folder / "libgaze_decode.so"
    build.compile_library(path, ("-O1", "-g", f"-fsanitize={kind}", "-fno-sanitize-recover=all"))
    return path


def _clean(command, runtime, options):
    """Run with the sanitizer's runtime in front; any report of it fails."""
    compiler = os.environ.get("CXX", "c++").split()
    # Without libstdc++ from the start the sanitizer does not find what throws in jaxlib.
    names = [[*compiler, f"-print-file-name={name}"] for name in (runtime, "libstdc++.so")]
    found = [
        subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names
    ]
    # Python's own leaks are none of ours; NumPy's threads are not instrumented.
    rules = "detect_leaks=0:halt_on_error=1:exitcode=66"
    environment = os.environ | {"LD_PRELOAD": " ".join(found), options: rules}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
