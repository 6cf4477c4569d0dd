"""Evaluation during training: what it reads is never trained on, and its numbers do not depend on stops."""

import contextlib
import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from gaze_jax.core.streams import IGNORE
from gaze_jax.corpora.measure import COLUMNS
from gaze_jax.errors import UserError
from gaze_jax.parallel import rules
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train import evaluation, loop
from gaze_jax.train.config import resolve
from gaze_jax.train.evaluation import Evaluator
from gaze_jax.train.holdout import held_out, lowest
from gaze_jax.train.losses import ROW_LOSSES, next_token_loss
from gaze_jax.train.pipeline import open_data
from gaze_jax.train.step import init_state, put_batch
from gaze_jax.viewer.training import evaluation_sheet
from tests.helpers.experiments import data_of, reused_programs, tiny_experiment
from tests.train.test_loop import during_step, terminate

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("train")]

EVALUATED = {"eval_every": 3, "eval.held_out": 12}


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with reused_programs():
        yield


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / evaluation.FILE).read_text().splitlines()]


class TestHoldout:
    def test_appending_changes_nothing_for_records_that_were_there(self):
        before, after = held_out([1000, 300], 0.2), held_out([1700, 300, 50], 0.2)
        assert np.array_equal(before[:1000], after[:1000])
        assert np.array_equal(before[1000:], after[1700:2000])
        assert 0.17 < before.mean() < 0.23
        # A larger fraction holds out the same records and more.
        assert not (before & ~held_out([1000, 300], 0.3)).any()
        assert not held_out([1000], 0.0).any()

    def test_the_records_of_the_lowest_hash_are_taken(self):
        indices = np.flatnonzero(held_out([1000], 0.2))
        few = lowest(indices, 10)
        assert len(few) == 10 and (np.diff(few) > 0).all()
        assert set(few) == set(np.flatnonzero(held_out([1000], 0.2))) & set(lowest(np.arange(1000), 10))
        assert np.array_equal(lowest(indices, 10**6), indices)


def test_held_out_scenes_are_not_those_of_training():
    data = data_of(tiny_experiment(**EVALUATED))
    with contextlib.closing(data.held_out.batches()) as batches:
        held = [next(batches) for _ in range(data.held_out.count)]
    ids = np.concatenate([batch["sample_id"] for batch in held])
    assert sorted(ids.tolist()) == list(range(16))  # 12, in whole batches of 8
    with contextlib.closing(data.batches_from(0)) as batches:
        trained = np.concatenate([next(batches)["images"] for _ in range(6)])
    seen = {image.tobytes() for image in trained}
    assert not any(image.tobytes() in seen for batch in held for image in batch["images"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that evaluates before, during and after training, and what it let draw."""
    workdir, drawn = tmp_path_factory.mktemp("whole"), []
    assert loop.train(tiny_experiment(**EVALUATED), workdir, on_evaluation=drawn.append)
    return workdir, drawn


def test_a_run_evaluates_before_during_and_after_training(whole):
    workdir, drawn = whole
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [0, 3, 6] == [each.step for each in drawn]
    assert [each.row for each in drawn] == rows
    first, last = rows[0], rows[-1]
    assert first["tokens"] == last["tokens"] > 16
    assert last["dense"]["loss"] < first["dense"]["loss"]
    # Gaze has the budget of the end from the start: one region of four tokens, of four.
    for row in rows:
        assert row["gaze"]["top_k"] == 1.0 and row["gaze"]["visual_entries"] == 4.0
        assert row["dense"]["top_k"] == 4.0 and row["dense"]["visual_entries"] == 16.0
    assert last["gaze"]["loss"] != last["dense"]["loss"]


def test_training_does_not_depend_on_evaluation(whole, tmp_path):
    assert loop.train(tiny_experiment(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()
    assert not (tmp_path / evaluation.FILE).exists()


def test_a_stopped_run_has_the_same_evaluations(whole, tmp_path, monkeypatch, capsys):
    # Stopped where an evaluation is due, which the stop does not wait for.
    experiment = tiny_experiment(**EVALUATED)
    with monkeypatch.context() as patch:
        during_step(patch, 3, terminate)
        assert not loop.train(experiment, tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [0]
    assert loop.train(experiment, tmp_path)
    assert "step 3, held out (" in capsys.readouterr().out
    assert (tmp_path / evaluation.FILE).read_bytes() == (whole[0] / evaluation.FILE).read_bytes()
    # A row of a step after the newest checkpoint is not of this run.
    with (tmp_path / evaluation.FILE).open("a") as file:
        file.write('{"step": 9}\n')
    assert loop.train(experiment, tmp_path)
    assert (tmp_path / evaluation.FILE).read_bytes() == (whole[0] / evaluation.FILE).read_bytes()


def test_sums_over_batches_are_the_means_of_the_whole_and_what_is_drawn_is_what_was_selected(whole):
    """Against one batch of all held-out samples, and counted by hand from the selection."""
    experiment = tiny_experiment(**EVALUATED)
    mesh = make_mesh(experiment.mesh)
    data = data_of(experiment)
    evaluator = Evaluator(experiment, mesh, data.held_out, data.tokenizer)
    params = init_state(experiment, mesh).params
    row = evaluator.measure(params)
    assert row == evaluator.measure(params)
    with contextlib.closing(data.held_out.batches()) as batches:
        parts = [next(batches) for _ in range(data.held_out.count)]
    batch = put_batch({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, mesh)
    assert row["tokens"] == np.count_nonzero(np.asarray(batch["targets"]) != IGNORE)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        for way, keep in (("gaze", 0.25), ("dense", None)):
            want = jax.jit(lambda p, b, keep=keep: next_token_loss(p, b, keep, experiment.model)[1])
            found = want(params, batch)
            assert set(row[way]) == set(found) - {ROW_LOSSES}
            for name, value in ((name, found[name]) for name in row[way]):
                assert row[way][name] == pytest.approx(float(value), rel=1e-5)
    trace = evaluator.trace(params)
    tokens, layers, heads, regions = trace.selected.shape
    assert (layers, heads, regions) == (2, 2, 4) and tokens == len(trace.pieces) > 0
    assert (trace.selected.sum(axis=-1) == 1).all() and any(trace.boxes)
    answers = "".join(part.text for part in trace.sample.parts[1:] if part.supervised)
    assert "".join(trace.pieces) == answers


@pytest.mark.long
def test_a_dense_run_has_no_gaze(tmp_path):
    drawn = []
    experiment = tiny_experiment(**EVALUATED, arm="dense", steps=3)
    assert loop.train(experiment, tmp_path, on_evaluation=drawn.append)
    assert [set(row) for row in rows_of(tmp_path)] == [{"step", "tokens", "dense"}] * 2
    assert drawn[0].trace is None


def test_settings_that_evaluate_nothing_are_refused():
    with pytest.raises(UserError, match="eval_every=-1 must not be negative"):
        tiny_experiment(eval_every=-1)
    with pytest.raises(UserError, match=r"eval.held_out=0 must be at least 1"):
        tiny_experiment(**{"eval.held_out": 0})


def test_a_corpus_never_trains_on_what_it_holds_out(tmp_path):
    from tests.helpers.corpora import turns, write_lines, write_picture
    from tests.train.test_corpus import MODEL, START, experiment, opened

    for part in range(2):  # a folder of two files is one source
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        records = []
        for number in range(40 * part, 40 * part + 40):
            write_picture(folder / f"{number}.png", 12, 12, number)
            text = turns(f"<image> What is {number}?", "Noise.")
            records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": text})
        write_lines(folder, records)
        (folder / "all.jsonl").rename(folder / f"{part}.jsonl")
    every, some = opened(folder), opened(folder, holdout=0.2)
    held = set(some.held_out.tolist())
    assert 8 <= len(held) < 30 and len(every.held_out) == 0
    assert set(some.plan.samples.tolist()) == set(range(80)) - held
    assert some.fingerprint()["holdout"] == 0.2 and "holdout" not in every.fingerprint()
    assert f"  {len(held)} records are held out for evaluation" in some.summary()
    assert set(some.evaluation(256).plan.samples.tolist()) == held
    assert set(some.evaluation(3).plan.samples.tolist()) < held
    run = dataclasses.replace(experiment(folder, holdout=0.2), eval_every=2)
    part = open_data(run, START, tmp_path).held_out
    with contextlib.closing(part.batches()) as batches:
        targets = sum(int((next(batches)["targets"] != IGNORE).sum()) for _ in range(part.count))
    assert targets == int(some.measurement.numbers[sorted(held), COLUMNS.index("targets")].sum())
    assert part.sample().id in held and part.sample().images
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = init_state(run, mesh).params
    evaluator = Evaluator(run, mesh, part, START.tokenizer)
    row = evaluator.measure(params)
    assert row["tokens"] == targets and row["gaze"]["top_k"] < row["dense"]["top_k"]
    trace = evaluator.trace(params)
    assert trace.sample.id == part.sample().id and "Noise." in "".join(trace.pieces)
    regions = np.unique(np.concatenate([view.regions.ravel() for view in trace.views]))
    assert trace.selected.shape == (len(trace.pieces), 1, MODEL.decoder.num_heads, len(regions))
    assert trace.selected.any(axis=-1).all() and not trace.selected.all()
    assert evaluation_sheet(trace, 0, 2.0).width > 300
    with pytest.raises(UserError, match=r"data.holdout=0 holds out nothing; set it to a fraction"):
        resolve(dataclasses.replace(experiment(folder), eval_every=2))
    with pytest.raises(UserError, match=r"data.holdout=1e-09 holds out none of the 80 records; raise it"):
        opened(folder, holdout=1e-9).evaluation(256)
