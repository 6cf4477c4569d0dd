from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from gaze_jax.viewer.contact_sheet import contact_sheet, wrapped

PAPER, SELECTED, TARGET = (250, 250, 247), (0, 133, 202), (230, 97, 0)
LUMA = np.array([0.299, 0.587, 0.114])
# Where the first panel starts under a title of one line, from the left and from the top.
LEFT, TOP = 28, 28 + 30 + 12


def tiny_image(height=12, width=12):
    """Bright noise, so that every veiled pixel is clearly darker."""
    return np.random.default_rng(0).integers(60, 256, (height, width, 3), dtype=np.uint8)


def enlarged(image, factor):
    return image.repeat(factor, 0).repeat(factor, 1)


def panel_at(sheet, left, top, width, height):
    return np.asarray(sheet)[top : top + height, left : left + width]


def quadrants(*shares, tokens=1, dtype=np.bool_):
    """[tokens, 2, 2]: the same four cells for every token."""
    return np.tile(np.array(shares, dtype).reshape(1, 2, 2), (tokens, 1, 1))


def test_selected_pixels_are_the_image_and_the_others_are_darker_and_greyer():
    image = tiny_image()
    sheet = contact_sheet(image, ["one"], quadrants(True, False, False, False), title="q", panel=96)
    source = enlarged(image, 8)
    panel = panel_at(sheet, LEFT, TOP, 96, 96)
    np.testing.assert_array_equal(panel[:48, :48], source[:48, :48])
    # Two pixels of outline lie in the veiled cells, beside the selected one.
    veiled, original = panel[50:, 50:].astype(int), source[50:, 50:].astype(int)
    assert (veiled @ LUMA < 0.5 * (original @ LUMA)).all()
    assert (np.ptp(veiled, axis=-1) <= 0.1 * np.ptp(original, axis=-1) + 1).all()


def test_outline_surrounds_what_is_selected_and_nothing_else():
    sheet = contact_sheet(
        tiny_image(),
        ["a", "b"],
        np.stack([*quadrants(1, 0, 0, 0), *quadrants(0, 0, 0, 0)]) > 0,
        title="q",
        panel=96,
    )
    first = np.asarray(sheet)[TOP - 2 : TOP + 98, LEFT - 2 : LEFT + 98]
    ring = np.zeros((100, 100), bool)
    ring[:52, :52] = True
    ring[2:50, 2:50] = False
    np.testing.assert_array_equal((first == SELECTED).all(-1), ring)
    second = np.asarray(sheet)[TOP - 2 : TOP + 98, LEFT + 96 + 18 - 2 :][:, :100]
    assert not (second == SELECTED).all(-1).any()


def test_veil_is_proportional_to_the_heads_that_did_not_select():
    image = np.full((8, 8, 3), (200, 120, 80), np.uint8)
    shares = quadrants(0.0, 0.25, 0.75, 1.0, dtype=np.float32)
    panel = panel_at(contact_sheet(image, ["a"], shares, title="q", panel=96), LEFT, TOP, 96, 96).astype(int)
    none, quarter, three_quarters, every = panel[20, 20], panel[20, 70], panel[70, 20], panel[70, 70]
    np.testing.assert_array_equal(every, (200, 120, 80))
    np.testing.assert_allclose(quarter, none + 0.25 * (every - none), atol=1)
    np.testing.assert_allclose(three_quarters, none + 0.75 * (every - none), atol=1)


def test_what_most_heads_selected_is_clear_however_few_they_are():
    """So a sheet of heads that differ is not dark all over; its legend, and a given scale, say so."""
    image = np.full((8, 8, 3), (200, 120, 80), np.uint8)
    few, many = (quadrants(0.0, 0.05, 0.15, 0.2, dtype=np.float32) * by for by in (1, 5))
    small, large = (contact_sheet(image, ["a"], shares, title="q", panel=96) for shares in (few, many))
    panels = [panel_at(sheet, LEFT, TOP, 96, 96) for sheet in (small, large)]
    np.testing.assert_allclose(*(panel.astype(int) for panel in panels), atol=1)
    assert small.tobytes() != large.tobytes(), "the legend differs"
    dark = panel_at(contact_sheet(image, ["a"], few, title="q", panel=96, clearest=1.0), LEFT, TOP, 96, 96)
    assert dark.astype(int).max() < panels[0].max() - 50
    none = contact_sheet(image, ["a"], np.zeros((1, 2, 2), np.float32), title="q", panel=96)
    assert panel_at(none, LEFT, TOP, 96, 96).max() < panels[0].max()


def test_a_bool_mask_equals_shares_of_zero_and_one():
    image, mask = tiny_image(), quadrants(True, False, False, True)
    panels = [
        panel_at(contact_sheet(image, ["a"], selected, title="q", panel=96), LEFT, TOP, 96, 96)
        for selected in (mask, mask.astype(np.float16))
    ]
    np.testing.assert_array_equal(*panels)


def test_panels_stand_in_rows_of_columns():
    image = tiny_image()
    everything = np.ones((5, 3, 3), bool)
    sheet = contact_sheet(image, list("abcde"), everything, title="q", panel=192, columns=3)
    assert sheet.width == 28 + 3 * 192 + 2 * 18 + 28
    for index in range(5):
        row, column = divmod(index, 3)
        panel = panel_at(sheet, LEFT + column * (192 + 18), TOP + row * (192 + 34 + 18), 192, 192)
        np.testing.assert_array_equal(panel, enlarged(image, 16))
    absent = panel_at(sheet, LEFT + 2 * (192 + 18), TOP + 192 + 34 + 18, 192, 192)
    assert (absent == PAPER).all()


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (28, 28, (168, 168)),  # enlarged 6 times: 7 would not fit
        (96, 48, (96, 192)),  # the longest side that is still enlarged pixel by pixel
        (97, 97, (192, 192)),  # resampled upwards
        (300, 400, (192, 144)),  # resampled downwards
        (1, 400, (192, 1)),  # never to nothing
    ],
)
def test_a_picture_keeps_its_aspect_and_fits_the_panel(height, width, size):
    image = np.full((height, width, 3), 9, np.uint8)
    sheet = contact_sheet(image, ["a"], np.ones((1, 1, 1), bool), title="q")
    rows, columns = np.nonzero((np.asarray(sheet)[TOP:, : LEFT + 192] == 9).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == size


def test_a_grid_that_does_not_divide_the_panel_covers_all_of_it():
    sheet = contact_sheet(tiny_image(), ["a"], np.ones((1, 7, 5), bool), title="q", panel=96)
    np.testing.assert_array_equal(panel_at(sheet, LEFT, TOP, 96, 96), enlarged(tiny_image(), 8))


def test_a_target_is_outlined_from_outside():
    sheet = contact_sheet(
        tiny_image(), ["a", "b"], np.ones((2, 1, 1), bool), title="q", panel=96, boxes=[None, (3, 3, 6, 9)]
    )
    pixels = np.asarray(sheet)
    first, second = (pixels[TOP : TOP + 96, left : left + 96] for left in (LEFT, LEFT + 96 + 18))
    assert not (first == TARGET).all(-1).any()
    rows, columns = np.nonzero((second == TARGET).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24 - 3, 71 + 3, 24 - 3, 47 + 3)
    np.testing.assert_array_equal(second[24:72, 24:48], enlarged(tiny_image(), 8)[24:72, 24:48])


def test_every_argument_shows():
    image, tokens, mask = tiny_image(), ["a", "b"], quadrants(True, False, False, False, tokens=2)
    plain = contact_sheet(image, tokens, mask, title="q")
    others = {
        "tokens": contact_sheet(image, ["a", "c"], mask, title="q"),
        "title": contact_sheet(image, tokens, mask, title="p"),
        "panel": contact_sheet(image, tokens, mask, title="q", panel=96),
        "columns": contact_sheet(image, tokens, mask, title="q", columns=1),
        "boxes": contact_sheet(image, tokens, mask, title="q", boxes=[(0, 0, 3, 3), None]),
        "credit": contact_sheet(image, tokens, mask, title="q", credit="somebody"),
    }
    assert contact_sheet(image, tokens, mask, title="q").tobytes() == plain.tobytes()
    for name, sheet in others.items():
        assert (sheet.size, sheet.tobytes()) != (plain.size, plain.tobytes()), name


@pytest.mark.parametrize(
    ("one", "other"),
    [("word", " word"), ("", " "), ("\n", " "), ("\n", "\n\n"), ("\t", "\n"), ("日", "月"), ("é", "e")],
)
def test_tokens_that_differ_invisibly_look_different(one, other):
    sheets = [
        contact_sheet(tiny_image(), [token], quadrants(1, 0, 0, 0) > 0, title="q") for token in (one, other)
    ]
    assert sheets[0].tobytes() != sheets[1].tobytes()


@pytest.mark.parametrize("text", ["a" * 400, "short " + "b" * 300 + " end", "\u65e5" * 90])
def test_a_line_is_never_wider_than_available(text):
    """Scripts without spaces and long words are broken; nothing is lost."""
    font = ImageFont.load_default(22)
    lines = wrapped(text, 300, font)
    assert len(lines) > 1 and all(font.getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_long_words_stay_within_the_panel_and_long_titles_within_the_sheet():
    mask = np.ones((1, 1, 1), bool)
    sheet = contact_sheet(tiny_image(), ["w" * 200], mask, title="many words " * 20 + "\nand more " * 20)
    pixels = np.asarray(sheet)
    assert (pixels[:, :26] == PAPER).all()
    assert (pixels[:, -28:] == PAPER).all()
    short = contact_sheet(tiny_image(), ["w"], mask, title="many words " * 20 + "\nand more " * 20)
    assert short.size == sheet.size


def test_the_result_is_an_rgb_picture_of_a_size_that_does_not_depend_on_the_selection():
    sheets = [contact_sheet(tiny_image(), ["a"], quadrants(*([on] * 4)), title="") for on in (True, False)]
    assert all(isinstance(sheet, Image.Image) and sheet.mode == "RGB" for sheet in sheets)
    assert sheets[0].size == sheets[1].size


VALID = {"image": tiny_image(), "tokens": ["a", "b"], "selected": np.ones((2, 2, 2), bool), "title": "q"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": tiny_image().astype(np.float32)}, r"image must be uint8 \[H, W, 3\], got float32"),
        ({"image": tiny_image()[..., 0]}, r"image must be uint8"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, r"image must be uint8"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": ["a"]}, r"selected must be \[1, h, w\]"),
        ({"selected": np.ones((2, 4), bool)}, r"selected must be \[2, h, w\]"),
        ({"selected": np.ones((2, 2, 2), np.int32)}, "bool or floating"),
        ({"selected": np.full((2, 2, 2), 1.5)}, r"lie in \[0, 1\]"),
        ({"selected": np.full((2, 2, 2), np.nan)}, r"lie in \[0, 1\]"),
        ({"panel": 47}, "panel must be at least 48"),
        ({"columns": 0}, "columns must be at least 1"),
        ({"boxes": [None]}, "one entry per token"),
        ({"boxes": [None, (0, 0, 13, 4)]}, "leaves the image of 12 x 12"),
        ({"boxes": [(4, 0, 4, 4), None]}, "is empty"),
        ({"boxes": [(-1, 0, 4, 4), None]}, "leaves the image"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message) as error:
        contact_sheet(**{**VALID, **change})
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_a_font_file_draws_what_the_built_in_font_lacks(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    args = {**VALID, "tokens": ["é", "\\xe9"]}

    def labels(sheet):
        return [panel_at(sheet, left, TOP + 192, 100, 34) for left in (LEFT, LEFT + 192 + 18)]

    np.testing.assert_array_equal(*labels(contact_sheet(**args)))
    letter, escape = labels(contact_sheet(**args, font=file))
    assert (letter != escape).any()
    with pytest.raises(OSError, match="cannot open"):
        contact_sheet(**VALID, font=tmp_path / "absent.ttf")
