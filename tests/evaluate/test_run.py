"""Evaluation of a run from its checkpoint: the report, the table and the picture."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
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
    batch = evaluation.evaluation_batches(trained, 6)[0]
    np.testing.assert_array_equal(scene, np.round((batch["images"][0, 0] + 1) * 127.5))
    assert read_image(runs["gaze"] / "gaze.png").shape[1] > 4 * 100


def test_answers_do_not_depend_on_the_size_of_the_batch(runs):
    trained = evaluation.load(runs["gaze"])
    batches = evaluation.evaluation_batches(trained, 6)
    assert [int(batch["counted"].sum()) for batch in batches] == [4, 4, 4]
    alone = [{name: value[i : i + 1] for name, value in batches[0].items()} for i in range(2)]
    whole = evaluation.answer(trained, batches[:1], top_k=1, route=Routing())
    single = evaluation.answer(trained, alone, top_k=1, route=Routing())
    np.testing.assert_array_equal(single.tokens, whole.tokens[:2])
    np.testing.assert_array_equal(single.selected, whole.selected[:, :, :2])
    np.testing.assert_allclose(single.visual_entries, whole.visual_entries[:2])


def test_a_last_batch_that_is_not_full_counts_its_own_rows_only(runs):
    trained = evaluation.load(runs["gaze"])
    batches = evaluation.evaluation_batches(trained, 3)
    assert [int(batch["counted"].sum()) for batch in batches] == [4, 2]
    assert {batch["tokens"].shape for batch in batches} == {batches[0]["tokens"].shape}
    answers = evaluation.answer(trained, batches, top_k=1, route=Routing())
    assert len(answers.tokens) == 6


def test_questions_come_without_their_answers(runs):
    trained = evaluation.load(runs["gaze"])
    for batch in evaluation.evaluation_batches(trained, 6):
        for tokens, answer, kind in zip(batch["tokens"], batch["answer"], batch["kind"], strict=True):
            asked = trained.tokenizer.decode(tokens[kind == 1].tolist())
            generated = trained.tokenizer.decode(answer[answer >= 0].tolist())
            assert asked.endswith("\n") and generated.endswith("<|im_end|>")
            assert generated not in asked


def test_test_scenes_are_the_same_for_every_arm_and_seed(runs):
    loaded = [evaluation.load(runs[arm]) for arm in ("gaze", "dense")]
    experiment = dataclasses.replace(loaded[1].experiment, seed=9)
    loaded[1] = dataclasses.replace(loaded[1], experiment=experiment)
    first, second = (evaluation.evaluation_batches(trained, 4) for trained in loaded)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["images"], other["images"])
        np.testing.assert_array_equal(one["answer"], other["answer"])
