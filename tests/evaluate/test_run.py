"""Evaluation of a run from its checkpoint: the report, the table and the picture."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from gaze_jax.core.streams import IGNORE
from gaze_jax.evaluate import run as evaluation
from gaze_jax.media.images import read_image
from tests.helpers.experiments import save_untrained, tiny_experiment

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("evaluate")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a gaze and of a dense run."""
    found = {}
    with jax.numpy_dtype_promotion("standard"):
        for arm in ("gaze", "dense"):
            found[arm] = tmp_path_factory.mktemp(arm)
            save_untrained(tiny_experiment(arm=arm), found[arm])
    return found


@pytest.mark.long  # tests/test_stored_files.py evaluates a run
def test_the_report_has_every_way_of_attending_and_every_family(runs, capsys):
    report = evaluation.run(runs["gaze"])
    assert json.loads((runs["gaze"] / "eval.json").read_text()) == report
    for way in ("gaze", "dense", "random_routing"):
        for family in ("transcribe", "read"):
            section = report[way][family]
            assert section["samples"] == 6
            assert 0.0 <= section["ci"][0] <= section["acc"] <= section["ci"][1] <= 1.0
        assert "where" not in report[way]  # no weight in training, so not asked
    # One of four regions of four tokens, against all of them.
    assert (report["gaze"]["entries"], report["dense"]["entries"]) == (4.0, 16.0)
    assert report["gaze"]["routing"]["random"] == report["random_routing"]["routing"]["random"] == 0.25
    assert len(report["gaze"]["routing"]["per_layer"]) == 2
    assert "routing" not in report["dense"]
    assert evaluation.best_layer_of(runs["gaze"]) == report["gaze"]["routing"]["layer"]
    printed = capsys.readouterr().out
    assert "random routing" in printed
    assert f"{report['gaze']['transcribe']['acc']:.3f}" in printed


def test_a_dense_run_reports_itself_alone_and_draws_nothing(runs):
    report = evaluation.run(runs["dense"], samples=2)
    assert not {"gaze", "random_routing"} & set(report)
    assert report["dense"]["read"]["samples"] == 2
    assert not (runs["dense"] / "gaze.png").exists()
    assert evaluation.best_layer_of(runs["dense"]) is None


def test_the_picture_has_a_panel_per_token_and_the_scene_is_what_the_model_saw(runs):
    evaluation.run(runs["gaze"])
    scene = read_image(runs["gaze"] / "scene.png")
    trained = evaluation.load(runs["gaze"])
    first = evaluation.evaluation_prompts(trained, 6)[0]
    np.testing.assert_array_equal(scene, np.round((first["images"][0] + 1) * 127.5))
    assert read_image(runs["gaze"] / "gaze.png").shape[1] > 4 * 100


def test_answers_do_not_depend_on_the_size_of_the_batch(runs):
    """Nor on the rows that fill up the last batch: 6 prompts are one batch of 4 and 2 of the next."""
    trained = evaluation.load(runs["gaze"])
    prompts = evaluation.evaluation_prompts(trained, 3)
    assert len(prompts) == 6 and trained.experiment.eval.batch_size == 4
    whole = evaluation.answer(trained, prompts, top_k=1)
    assert len(whole.tokens) == len(whole.visual_entries) == whole.selected.shape[2] == 6
    for number in (0, 5):
        single = evaluation.answer(trained, prompts[number : number + 1], top_k=1)
        np.testing.assert_array_equal(single.tokens[0], whole.tokens[number])
        np.testing.assert_array_equal(single.selected[:, :, 0], whole.selected[:, :, number])
        np.testing.assert_allclose(single.visual_entries[0], whole.visual_entries[number])


def test_an_answer_that_ends_early_selects_nothing_more(runs):
    """There are no tokens after the end token, and every array still has the answers' length."""
    trained = evaluation.load(runs["gaze"])
    prompts = evaluation.evaluation_prompts(trained, 2)
    free = evaluation.answer(trained, prompts, top_k=1)
    end = int(free.tokens[0, 1])
    tokenizer = types.SimpleNamespace(end_id=end)
    stopped = evaluation.answer(dataclasses.replace(trained, tokenizer=tokenizer), prompts, top_k=1)
    assert stopped.tokens.shape == free.tokens.shape and stopped.selected.shape == free.selected.shape
    for row, (tokens, expected) in enumerate(zip(stopped.tokens, free.tokens, strict=True)):
        length = int(np.argmax([*(expected == end), True])) + 1
        np.testing.assert_array_equal(tokens[:length], expected[:length])
        assert (tokens[length:] == IGNORE).all()
        assert not stopped.selected[length:, :, row].any()
        np.testing.assert_array_equal(stopped.selected[:length, :, row], free.selected[:length, :, row])
    assert (stopped.tokens == IGNORE).any()


def test_questions_come_without_their_answers(runs):
    trained = evaluation.load(runs["gaze"])
    for row in evaluation.evaluation_prompts(trained, 6):
        asked = trained.tokenizer.decode(row["tokens"][row["kind"] == 1].tolist())
        generated = trained.tokenizer.decode(row["answer"][row["answer"] >= 0].tolist())
        assert asked.endswith("\n") and generated.endswith("<|im_end|>")
        assert generated not in asked


def test_test_scenes_are_the_same_for_every_arm_and_seed(runs):
    loaded = [evaluation.load(runs[arm]) for arm in ("gaze", "dense")]
    experiment = dataclasses.replace(loaded[1].experiment, seed=9)
    loaded[1] = dataclasses.replace(loaded[1], experiment=experiment)
    first, second = (evaluation.evaluation_prompts(trained, 4) for trained in loaded)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["images"], other["images"])
        np.testing.assert_array_equal(one["answer"], other["answer"])
