"""Several processes that decode on one mesh: the same regions on all ranks, those of one process."""

import functools
import json
import os
import pickle

import jax
import numpy as np
import pytest

from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers import ranks
from tests.helpers.commands import finish, start, without_gloo
from tests.parallel.test_distributed import free_port

MESHES = {
    2: {
        "data": {"data": 8},
        "context": {"data": 1, "context": 8},
        "fsdp, tensor": {"data": 1, "fsdp": 4, "tensor": 2},
        "tensor, context": {"data": 2, "tensor": 2, "context": 2},
    },
    4: {
        "fsdp": {"data": 1, "fsdp": 8},
        "tensor": {"data": 4, "tensor": 2},
        "context": {"data": 1, "context": 8},
        "fsdp, context": {"data": 1, "fsdp": 2, "context": 4},
        "fsdp, tensor, context": {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    },
}
"""Of two and of four processes, which have eight devices together."""


def in_several(count, module, *words, **environment):
    """What each of ``count`` processes of a module prints, without what Gloo says of connections."""
    coordinator = f"localhost:{free_port()}"
    processes = [
        start("-m", module, coordinator, count, number, *words, **environment) for number in range(count)
    ]
    out = [finish(process)[0] for process in processes]
    return [without_gloo(each) for each in out]


def by(count, meshes, devices, folder):
    """What each of ``count`` processes, which have ``devices`` together, found on each mesh."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = {"JAX_NUM_CPU_DEVICES": str(devices // count), "XLA_FLAGS": flags}
    in_several(count, "tests.helpers.ranks", folder, json.dumps(meshes), **environment)
    files = {name: [folder / f"{name}-{number}.pickle" for number in range(count)] for name in meshes}
    return {name: [pickle.loads(file.read_bytes()) for file in paths] for name, paths in files.items()}


@functools.cache
def alone():
    """What the engine yields on one device."""
    return ranks.answers(None)[0]


def compare(mine, theirs, atol, wide):
    """Two turns' output; ``wide``: of as many free regions, and so with the places of the selected ones."""
    for out, other in zip(mine, theirs, strict=True):
        assert set(out) == set(other)
        for name in set(other) - (set() if wide else {"indices"}):
            size = min(out[name].shape[-1], other[name].shape[-1]) if other[name].ndim > 4 else None
            assert not wide or out[name].shape == other[name].shape
            got, wanted = (a[..., :size] for a in (out[name], other[name]))
            if wanted.dtype == np.float32:
                np.testing.assert_allclose(got, wanted, atol=atol, err_msg=name)
            else:
                np.testing.assert_array_equal(got, wanted, err_msg=name)


def check(sizes, processes, devices):
    """Compare the processes with each other, with one process on the same mesh, and with one device."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    together, held, specs = ranks.answers(mesh)
    wanted = {}
    for key, place, values in held:
        wanted.setdefault((key, place), values)
    seen = set()
    for found, own, own_specs in processes:
        compare(found, together, 1e-5, True)
        compare(found, alone(), 2e-4, False)
        assert len(own) * len(processes) == len(held), "each device has its part"
        for key, place, values in own:  # bit for bit, whichever rank it is on
            np.testing.assert_array_equal(values, wanted[key, place], err_msg=key)
            seen.add((key, place))
        assert own_specs == specs
    assert seen == set(wanted), "together they have all"
    assert (found[0]["indices"] >= 0).any() and found[0]["indices"].max() > 0
    for axis, names in (("tensor", ("text_k",)), ("context", ("text_k", "descriptors", "text_order"))):
        assert all((axis in specs[name]) == (mesh.shape[axis] > 1) for name in names)
    for axis in ("data", "fsdp"):
        assert all((axis in spec) == (mesh.shape[axis] > 1) for spec in specs.values())


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_of_several_processes_all_select_what_one_selects(count, tmp_path):
    for name, processes in by(count, MESHES[count], 8, tmp_path).items():
        check(MESHES[count][name], processes, 8)


def test_processes_tell_each_other_what_only_one_knows():
    """Errors end all of them with one status; what only the first does is done once; arrays are whole."""
    found = in_several(2, "tests.helpers.agreeing")
    for number, lines in enumerate(found):
        assert lines == [
            f"['of 0', 'of 1'] True {number == 0}",
            "[[4, 'Process 0 cannot.'], [4, 'Process 1 cannot.'], None]",
            "[[4, 'Process 0 cannot.'], None]",
            str(["0"] if number == 0 else []),
            f"{[[0.0, 1.0], [2.0, 3.0]] if number == 0 else [[4.0, 5.0], [6.0, 7.0]]} True",
        ]
