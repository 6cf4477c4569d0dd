"""A run that is killed while it saves: what a kill is said to have hit, and the kills themselves."""

import json
import shutil

import pytest

from benchmarks import kills
from gaze_jax.train import checkpoint

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("benchmarks")]


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


ITEMS = ("params/a", "params/b/c", "train/a", "meta/metadata", "_CHECKPOINT_METADATA")


def test_what_a_kill_hit_is_read_from_what_it_left(tmp_path):
    steps = tmp_path / checkpoint.FOLDER
    for step in (3, 4):
        write(steps / str(step), ITEMS)
    whole = kills.files(steps / "4")
    assert whole == {"params": 2, "train": 1, "meta": 1, "": 1}
    assert kills.committed(tmp_path) == 4 and kills.hit(tmp_path, whole) == "no save"
    assert kills.committed(tmp_path / "none") == 0
    unfinished = steps / f"5{checkpoint.UNFINISHED}"
    write(unfinished, [f"params{checkpoint.UNFINISHED}/a", "meta/metadata"])
    assert kills.committed(tmp_path) == 4 and kills.hit(tmp_path, whole) == "writing"
    write(unfinished, [f"params{checkpoint.UNFINISHED}/b/c", "train/a"])
    assert kills.hit(tmp_path, whole) == "commit"
    unfinished.rename(steps / "5")
    assert kills.committed(tmp_path) == 5 and kills.hit(tmp_path, whole) == "deletion", (
        "three, of which two stay"
    )
    shutil.rmtree(steps / "3")
    write(steps / "5", ["_CHECKPOINT_METADATA"])
    (steps / "5" / f"params{checkpoint.UNFINISHED}").rename(steps / "5" / "params")
    assert kills.hit(tmp_path, whole) == "no save"
    (steps / "4" / "train" / "a").unlink()
    assert kills.hit(tmp_path, whole) == "deletion"


@pytest.mark.long  # twenty starts of a run, and two runs to the end
def test_no_kill_costs_a_checkpoint_or_a_bit(tmp_path):
    path = tmp_path / "kills.json"
    kills.main(["--kills=20", "--steps=110", f"--json={path}"])
    total = json.loads(path.read_text())["total"]
    assert total["kills"] == total["kept"] == 20 and total["same_bits"]
    assert sum(total["parts"].values()) == 20 and total["parts"]["writing"] > 3
