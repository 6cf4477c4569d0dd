"""Names of topologies, the environment, the figures of chips, and what libtpu says."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gaze_jax.errors import UserError
from gaze_jax.parallel import topology
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers.commands import ROOT


def test_a_topology_names_its_chip():
    assert topology.chip_of("v5e:16x16") is topology.CHIPS["v5e"]
    assert topology.chip_of("v5p:4x4x8").hbm_bytes == int(95.73 * 2**30)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e", "must be a chip and its mesh of chips, such as v5e:16x16"),
        ("v5e:16", "must be a chip and its mesh of chips"),
        ("v5e:4x4x4x4", "must be a chip and its mesh of chips"),
        ("v5p:4x4x8 ", "must be a chip and its mesh of chips"),
        ("h100:2x2", "must be of one of the chips|names a chip other than v5e, v5p, v6e"),
    ],
)
def test_other_names_are_refused(name, expected):
    with pytest.raises(UserError, match=f"--topology={name} .*({expected})"):
        topology.chip_of(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install 'gaze-jax\[tpu-aot\]'"):
        topology.load_devices("v5e:2x2")


PREPARED = (
    "import {imported}; from gaze_jax.parallel import topology; topology.prepare(); import jax, os; "
    "print(jax.config.jax_platforms, os.environ['TPU_ACCELERATOR_TYPE'])"
)


@pytest.mark.parametrize(
    ("imported", "chosen", "printed"),
    [
        ("sys", {}, "cpu v5litepod-4"),
        ("jax", {}, "cpu v5litepod-4"),  # which has read the environment by then
        ("jax", {"JAX_PLATFORMS": "cuda,cpu", "TPU_ACCELERATOR_TYPE": "v4-8"}, "cuda,cpu v4-8"),
    ],
)
def test_the_environment_is_set_unless_the_user_has(imported, chosen, printed):
    left = {name: value for name, value in os.environ.items() if name not in topology.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", PREPARED.format(imported=imported)],
        cwd=ROOT, env=left | chosen, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == printed


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
         "19.25G of 15.75G hbm. Exceeded hbm capacity by 3.50G.", 19.25 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
         "(144.00G) exceeds available HBM (15.75G).", 144 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_read_from_the_message(message, needed):
    assert topology.needed_bytes(message) == needed


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "count"), [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x4", 8)])
def test_a_topology_has_a_device_for_each_chip_and_its_memory_is_that_of_the_table(name, count):
    """The compiler names the HBM that it has when a program does not fit."""
    devices = topology.load_devices(name)
    assert len(devices) == count
    mesh = jax.sharding.Mesh(devices[:1], ("one",))
    x = jax.ShapeDtypeStruct((12 << 30,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P()))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(lambda x: (x[::-1] * 2, x + 1)).lower(x).compile()
    needed = topology.needed_bytes(str(error.value))
    hbm = topology.chip_of(name).hbm_bytes
    assert needed is not None and needed > hbm
    available = re.search(r"(?:available HBM \(| of )([\d.]+)G", str(error.value))
    assert 0 <= float(available[1]) * 2**30 - hbm <= 0.011 * 2**30  # versions of libtpu differ by 0.01


@pytest.mark.tpu_aot
def test_a_topology_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="--topology=v5e:3x7 cannot be loaded"):
        topology.load_devices("v5e:3x7")


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("name", "data", "fsdp"), [("v5p:4x4x8", 2, 64), ("v5p:4x4x8", 64, 2), ("v6e:16x16", 4, 64)]
)
def test_a_mesh_axis_may_take_a_part_of_a_side(name, data, fsdp):
    devices = topology.load_devices(name)
    mesh = make_mesh(MeshConfig(data, fsdp), devices)
    assert mesh.devices.shape == (data, fsdp, 1)
    assert len({device.id for device in mesh.devices.flat}) == len(devices)
