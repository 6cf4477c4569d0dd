import json

import pytest

from gaze_jax.errors import UserError
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


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(name, value, tmp_path):
    rows = [ROW, ROW, ROW | {name: value}, ROW | {name: value}]
    with pytest.raises(UserError, match=f"stopped at step 9: {name} is {value}"):
        metrics.check_finite(rows, 10, tmp_path)
    metrics.check_finite(rows[:2], 8, tmp_path)
