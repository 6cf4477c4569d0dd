"""A process of several that decodes on meshes, and writes down what it has itself of every step.

python -m tests.helpers.ranks COORDINATOR PROCESSES NUMBER FOLDER MESHES, with MESHES as JSON: name -> sizes.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gaze_jax.infer import engine as engines
from gaze_jax.infer import programs
from gaze_jax.models.parameters import abstract_params
from gaze_jax.parallel import rules
from gaze_jax.parallel.distributed import ProcessConfig, start
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers.engines import MODEL, decode, make_engine, row
from tests.helpers.models import changed, parameters

CONFIG = changed(MODEL, decoder={"num_heads": 4, "num_kv_heads": 2})
ASK, MORE = "Which digit is in row 1, column 2?\n", "Which digit is in row 2, column 1?\n"


def answers(mesh: Any) -> tuple[list[dict[str, Any]], list[tuple[str, str, Any]], dict[str, Any]]:
    """Two turns of three rows, each with a trace.

    Returns:
      What the engine yields of each turn; what this process's devices hold of the tokens and of the selected
      regions, each with its name, its place in the whole, and the values; the shardings of the cache.
    """
    held: list[tuple[str, str, Any]] = []
    stats, fetch = programs._selection_stats, engines.fetch

    def with_indices(cache: Any, order: Any, kind: Any, out: Any, selection: Any) -> Any:
        return {**stats(cache, order, kind, out, selection), "indices": out["indices"]}

    def noted(tree: Any, mesh: Any) -> Any:
        for name in ("indices", "tokens"):
            for shard in tree[0][name].addressable_shards:
                held.append((f"{turn} {name}", str(shard.index), np.asarray(shard.data)))
        return fetch(tree, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_selection_stats", with_indices)
        patch.setattr(engines, "fetch", noted)
        params = parameters(CONFIG)["params"]
        if mesh is not None:
            targets = abstract_params(CONFIG, mesh)
            params = jax.tree.map(lambda leaf, to: rules.put(leaf, to.sharding), params, targets)
        rows = [row(*parts, config=CONFIG) for parts in ((0, 1, ASK), (2, MORE), (3, 0, 1, ASK))]
        turn = 0
        engine = make_engine(*rows, config=CONFIG, params=params, mesh=mesh)
        found = [decode(engine, 5, returns="trace")]
        turn = 1
        orders = [int(order) + 1 for order in engine.order]
        engine.prefill([row(2, MORE, config=CONFIG, order=order) for order in orders])
        found.append(decode(engine, 4, returns="trace"))
    cache = engine._cache
    places = {name: getattr(cache, name).sharding for name in ("text_k", "descriptors", "text_order")}
    return found, held, {} if mesh is None else {name: str(place.spec) for name, place in places.items()}


def main(coordinator: str, processes: str, number: str, folder: str, meshes: str) -> None:
    start(ProcessConfig(True, coordinator, int(processes), int(number), 60), saves=False)
    for name, sizes in json.loads(meshes).items():
        found, held, specs = answers(make_mesh(MeshConfig(**sizes)))
        with Path(folder, f"{name}-{number}.pickle").open("wb") as file:
            pickle.dump((found, held, specs), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
