"""A process of several: python -m tests.helpers.agreeing COORDINATOR COUNT NUMBER."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gaze_jax.errors import NotFiniteError, UserError
from gaze_jax.parallel import rules, together
from gaze_jax.parallel.distributed import ProcessConfig, start
from gaze_jax.parallel.mesh import MeshConfig, make_mesh


def refused(number):
    """Raises in the process of that number."""
    if jax.process_index() == number:
        raise NotFiniteError(f"Process {number} cannot.")


def ending(do):
    """The status and the message of the error with which something ends."""
    try:
        do()
    except UserError as error:
        return [error.status, str(error)]
    return None


def in_agreement(number):
    with together.agreed():
        refused(number)


def main(coordinator, count, number):
    start(ProcessConfig(True, coordinator, int(count), int(number), 60), saves=False)
    print(together.exchanged(f"of {number}"), together.exchanged("")[0] == "", together.is_first())
    print([ending(lambda n=n: in_agreement(n)) for n in (0, 1, 2)])
    print([ending(lambda n=n: together.by_first(lambda: refused(n))) for n in (0, 1)])
    wrote = []
    together.by_first(lambda: wrote.append(number))
    print(wrote)
    mesh = make_mesh(MeshConfig())
    values = np.arange(8.0).reshape(4, 2)
    placed = rules.put({"a": values}, NamedSharding(mesh, PartitionSpec("data")))["a"]
    (own,) = placed.addressable_shards
    print(np.asarray(own.data).tolist(), rules.fetch(placed, mesh).tolist() == values.tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
