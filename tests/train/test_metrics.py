import json

import numpy as np
import pytest

from gaze_jax.errors import NotFiniteError
from gaze_jax.train import metrics

ROW = {"loss": 1.0, "grad_norm": 2.0, "param_norm": 3.0, "lr": 0.5}


def test_rows_after_the_checkpoint_and_unfinished_lines_go(tmp_path):
    path = tmp_path / metrics.FILE
    for step in (2, 4, 6):
        metrics.append(path, {"step": step} | ROW)
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    metrics.keep_until(path, 8)
    assert path.read_bytes() == whole
    metrics.keep_until(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    metrics.keep_until(tmp_path / "none", 5)
    assert not (tmp_path / "none").exists()


def test_a_row_is_the_mean_of_its_steps_but_for_the_learning_rate():
    later = {"loss": 3.0, "grad_norm": 4.0, "param_norm": 3.0, "lr": 0.25}
    assert metrics.mean([ROW, later]) == {"loss": 2.0, "grad_norm": 3.0, "param_norm": 3.0, "lr": 0.25}


def test_a_step_that_was_left_out_counts_for_nothing_else():
    left_out = metrics.of_step(
        dict.fromkeys(ROW, np.float32("nan")) | {"lr": 0.125, "skipped": np.float32(-1)}
    )
    assert left_out == {"skipped": 1.0, "lr": 0.125}
    done = metrics.of_step(ROW | {"skipped": np.float32(0)})
    assert done == ROW
    assert metrics.mean([done, left_out, done]) == ROW | {"skipped": 1.0}
    assert metrics.mean([left_out, left_out]) == {"skipped": 2.0, "lr": 0.125}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_made_bad_parameters_is_named(value, tmp_path):
    rows = [ROW, {"skipped": 1.0, "lr": 0.5}, ROW | {"param_norm": value}, ROW | {"param_norm": value}]
    with pytest.raises(NotFiniteError, match=f"stopped at step 9: param_norm is {value}"):
        metrics.check_finite(rows, 10, tmp_path)
    metrics.check_finite(rows[:2], 8, tmp_path)
