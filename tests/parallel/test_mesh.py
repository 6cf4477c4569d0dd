import jax
import pytest
from jax.sharding import AxisType

from gaze_jax.errors import UserError
from gaze_jax.parallel.mesh import AXES, MeshConfig, axis_sizes, make_mesh


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((-1, 1, 1, 1), 8, (8, 1, 1, 1)),
        ((-1, 4, 1, 1), 8, (2, 4, 1, 1)),
        ((2, -1, 2, 1), 8, (2, 2, 2, 1)),
        ((2, 1, -1, 2), 8, (2, 1, 2, 2)),
        ((1, 2, 1, -1), 8, (1, 2, 1, 4)),
        ((2, 4, 1, 1), 8, (2, 4, 1, 1)),
        ((-1, 1, 1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_minus_one_is_what_the_other_axes_leave(sizes, devices, expected):
    assert tuple(axis_sizes(MeshConfig(*sizes), devices).values()) == expected


@pytest.mark.parametrize(
    "sizes",
    [
        *[(3, 1, 1, 1), (-1, 3, 1, 1), (-1, -1, 1, 1), (0, 8, 1, 1), (-2, 1, 1, 1)],
        *[(8, 2, 1, 1), (8, 1, 2, 1), (8, 1, 1, 2), (-1, 1, 1, -1)],
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_the_devices_are_named(sizes):
    written = "mesh.data={}, mesh.fsdp={}, mesh.tensor={}, mesh.context={}".format(*sizes)
    with pytest.raises(UserError, match=written):
        axis_sizes(MeshConfig(*sizes), 8)


def test_the_mesh_has_every_device_once_and_leaves_placing_to_the_compiler():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert mesh.axis_names == AXES
    assert sorted(device.id for device in mesh.devices.flat) == [device.id for device in jax.devices()]
    assert set(mesh.axis_types) == {AxisType.Auto}
