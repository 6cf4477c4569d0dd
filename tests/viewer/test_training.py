"""Curves of a run, and what a held-out sample's queries selected."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from gaze_jax.data.placement import PlacedView
from gaze_jax.data.sample import Image as ImagePart
from gaze_jax.data.sample import Sample
from gaze_jax.train.evaluation import Evaluated, SampleTrace
from gaze_jax.viewer.contact_sheet import TARGET
from gaze_jax.viewer.training import curves, draw_evaluation, evaluation_sheet, log_ticks, ticks

SVG = "{http://www.w3.org/2000/svg}"


def row(step, loss, accuracy):
    return {"step": step, "loss": loss, "accuracy": accuracy}


TRAINED = [row(10, 1.0, 0.5), row(20, 0.5, 0.75)]
HELD_OUT = [
    {"step": 0, "gaze": row(0, 2.0, 0.0), "dense": row(0, 1.5, 0.25)},
    {"step": 20, "gaze": row(20, 1.0, 0.5), "dense": row(20, 0.5, 1.0)},
]


def polylines(picture):
    found = ElementTree.fromstring(picture).iter(f"{SVG}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in found]


def test_curves_have_every_point_where_its_axes_say():
    lines = polylines(curves(TRAINED, HELD_OUT))
    assert [len(line) for line in lines] == [2] * 6
    loss, dense, gaze = lines[:3]
    bottom, top = 304.0, 44.0  # 0 and the largest loss
    assert [y for _, y in gaze] == [top, (bottom + top) / 2]
    assert [y for _, y in dense] == [bottom - 260 * 0.75, bottom - 260 * 0.25]
    assert [x for x, _ in loss] == [58 + 230, 58 + 460] and [x for x, _ in gaze] == [58, 58 + 460]
    assert [y for _, y in lines[5]] == [bottom, (bottom + top) / 2]


def test_a_loss_that_spans_much_has_a_logarithmic_axis():
    far = [row(0, 10.0, 0.0), row(10, 1.0, 0.5), row(20, 0.1, 1.0)]
    picture = curves(far, [])
    assert "loss, logarithmic" in picture and "logarithmic" not in curves(TRAINED, HELD_OUT)
    ys = [y for _, y in polylines(picture)[0]]
    assert ys == pytest.approx([44, 174, 304], abs=0.1)
    texts = [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert {"0.1", "1", "10", "training"} <= set(texts) and "held out, Gaze" not in texts


def test_ticks_are_round():
    assert ticks(0, 500) == [0, 100, 200, 300, 400, 500]
    assert ticks(0, 0.07) == pytest.approx([0, 0.02, 0.04, 0.06])
    assert log_ticks(0.06, 3) == pytest.approx([0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(1e-4, 30) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10])


def trace(views=1, tokens=3):
    """Views of 2 x 2 tokens, a region each; every query of both heads selects the first region of all."""
    images = tuple(np.full((20, 20, 3), 200, np.uint8) for _ in range(views))
    sample = Sample(0, images, tuple(ImagePart(i) for i in range(views)), "record")
    placed = tuple(
        PlacedView(i, False, i, 0, (0, 0, 20, 20), np.arange(4 * i, 4 * i + 4).reshape(2, 2))
        for i in range(views)
    )
    selected = np.zeros((tokens, 1, 2, 4 * views), bool)
    selected[..., 0] = True
    boxes = ((2.0, 2.0, 8.0, 8.0), *[None] * (tokens - 1))
    return SampleTrace(sample, placed, tuple(f" {i}" for i in range(tokens)), boxes, selected)


def test_a_sheet_shows_the_selected_region_clear_and_the_others_veiled():
    pixels = np.asarray(evaluation_sheet(trace(), 7, 1.0))
    clear = (pixels == 200).all(axis=-1)
    # A quarter of each panel of 120 pixels; in the first one the outline of what its token refers to.
    outline = (pixels == TARGET).all(axis=-1)
    assert clear.sum() + outline[:, :180].sum() == pytest.approx(3 * 60 * 60, rel=0.1)
    assert outline[:, :180].any()


def test_of_many_views_and_tokens_some_are_drawn():
    few, many = (evaluation_sheet(trace(views, 32), 7, 1.0) for views in (4, 13))
    assert many.size == few.size
    assert evaluation_sheet(trace(1, 60), 7, 1.0).size == evaluation_sheet(trace(1, 32), 7, 1.0).size


def test_both_pictures_are_written_into_the_runs_folder(tmp_path):
    lines = [json.dumps(each) for each in HELD_OUT]
    (tmp_path / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    shown = HELD_OUT[1] | {"gaze": HELD_OUT[1]["gaze"] | {"top_k": 1.0}}
    draw_evaluation(Evaluated(tmp_path, 20, shown, trace()))
    with Image.open(tmp_path / "evaluation" / "step-000020.png") as sheet:
        assert sheet.format == "PNG"
    assert (tmp_path / "curves.svg").read_text() == curves([], HELD_OUT)
    assert re.search("held out, dense", curves([], HELD_OUT))
    dense = Evaluated(tmp_path, 30, HELD_OUT[1], None)
    draw_evaluation(dense)
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["step-000020.png"]
