"""The benchmark of distillation: a run of it in small, and the means that it writes."""

import json

import numpy as np
import pytest

from benchmarks import gazify
from configs import digits
from gaze_jax.train.config import parse
from tests.helpers.experiments import save_untrained

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("benchmarks")]


def test_a_row_has_the_mean_of_every_teacher_with_an_interval(capsys):
    runs = [
        {step: {"kl": kl + step, "accuracy": 0.5 + kl / 100, "dense_accuracy": 0.99} for step in (0, 50)}
        for kl in (2.0, 4.0, 6.0)
    ]
    rows = gazify.gather({("distill", 2): runs, ("next_token", 1): runs[:2]})
    assert [(row["objective"], row["top_k"], row["step"]) for row in rows] == [
        ("distill", 2, 0),
        ("distill", 2, 50),
        ("next_token", 1, 0),
        ("next_token", 1, 50),
    ]
    assert rows[1]["kl"]["seeds"] == [52.0, 54.0, 56.0] and rows[1]["kl"]["mean"] == 54.0
    # Student's t for three values: 4.303 standard errors of 2 / sqrt(3).
    np.testing.assert_allclose(rows[1]["kl"]["ci"], [54 - 4.969, 54 + 4.969], rtol=1e-4)
    np.testing.assert_allclose(rows[0]["dense_accuracy"]["ci"], [0.99, 0.99])
    gazify.show(rows)
    assert "54.0000 [49.0313, 58.9687]" in capsys.readouterr().out


def test_one_teacher_gives_no_interval(capsys):
    with pytest.raises(SystemExit):
        gazify.main(["--teachers", "runs/dense-0"])
    assert "at least two teachers" in capsys.readouterr().err


@pytest.mark.long  # compiles two steps of the digits model, and what measures it
def test_students_start_from_their_teachers(tmp_path):
    """Step 0 is the same for both objectives; a student that is trained has moved."""
    teachers = [tmp_path / f"dense-{seed}" for seed in range(2)]
    for seed, teacher in enumerate(teachers):
        config = digits.get_config()
        config.arm, config.seed = "dense", seed
        save_untrained(parse(config), teacher)
    path = tmp_path / "result.json"
    small = ["--top_ks", "2", "--steps", "0", "2", "--batch_size", "2", "--test_batches", "1"]
    gazify.main(["--teachers", *map(str, teachers), *small, f"--json={path}"])
    report = json.loads(path.read_text())
    found = {(row["objective"], row["step"]): row for row in report["rows"]}
    assert list(found) == [("distill", 0), ("distill", 2), ("next_token", 0), ("next_token", 2)]
    assert found["distill", 0]["kl"] == found["next_token", 0]["kl"]
    assert found["distill", 2]["kl"]["seeds"] != found["distill", 0]["kl"]["seeds"]
    assert report["test_scenes"] == 32
