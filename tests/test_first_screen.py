"""The figure of README's first screen: numbers are those of the results, panels those of the sheet."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import first_screen

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "generate_decode_cpu.json"
SHEET = ROOT / "docs" / "images" / "gaze.png"


@pytest.fixture
def report():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_times_are_those_of_decoding_a_batch_of_one(report):
    found = first_screen.series(report)
    assert found.keys() == {"transformers", "dense", "head", "kv_head"}
    for name, points in found.items():
        assert [tokens for tokens, *_ in points] == [576, 4608, 18432]
        for tokens, median, quartiles in points:
            rows = [r for r in report["rows"] if r["part"] == "decode" and r["tokens"] == tokens]
            assert {"median": median, "iqr": quartiles} in [r["ms"][name] for r in rows if r["batch"] == 1]


def test_the_footnote_names_model_date_and_machine(report):
    report = copy.deepcopy(report) | {"model": "m-1b", "date": "2031-01-02", "device": "an abacus"}
    for row in report["rows"]:
        row["top_k"], row["regions"] = 1, 4
    text = first_screen.footnote(report)
    assert all(part in text for part in ("m-1b", "2031-01-02", "an abacus", "25%"))


def test_panels_are_whole():
    """The outline of the selected regions lies within each panel; below it are a token and no count."""
    with Image.open(SHEET) as sheet:
        panels = first_screen.panels(sheet)
    outline = (0, 133, 202)
    for pixels in panels:
        picture, token = pixels[: first_screen.SIDE + 4], pixels[first_screen.SIDE + 6 :]
        assert (np.abs(picture.astype(int) - outline).sum(axis=-1) < 30).any()
        inner = picture[2:-2, 2:-2]
        assert max(edge.mean() for edge in (inner[0], inner[-1], inner[:, 0], inner[:, -1])) < 160, "no paper"
        assert all(edge.min(axis=-1).max() > 240 for edge in (picture[0], picture[-1], picture[:, 0])), (
            "paper"
        )
        assert token[:, :40].min() < 120 and token[:, first_screen.SIDE // 2 :].min() > 240


def test_the_figure_is_opaque_and_small(tmp_path):
    first_screen.main([f"--results={RESULTS}", f"--sheet={SHEET}", f"--out={tmp_path / 'out.png'}"])
    assert (tmp_path / "out.png").stat().st_size < 200_000
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (1600, 700) and image.convert("RGBA").getextrema()[3] == (255, 255)


def test_labels_keep_their_order_and_their_distance():
    assert first_screen.spread({"a": 85.0, "b": 77.0, "c": 275.0}, 20.0) == {"b": 77.0, "a": 97.0, "c": 275.0}
    assert first_screen.spread({"a": 3.0, "b": 3.0, "c": 4.0}, 5.0) == {"a": 3.0, "b": 8.0, "c": 13.0}
