"""A sample shown as the model gets it: what is marked, linked and drawn is what the arrays hold."""

import dataclasses
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import NEWLINE, Kind
from gaze_jax.corpora import show
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.corpora.records import RecordError
from gaze_jax.corpora.show import sample_lines, sample_page, show_sample
from gaze_jax.corpora.shown import shown_sample, token_texts
from gaze_jax.data.pixels import fitted
from gaze_jax.errors import UserError
from tests.helpers import corpora
from tests.helpers.views import tiny_cambrian

EVIL = "</div><script>alert(1)</script>"
LAYOUTS = {
    **corpora.LAYOUTS,
    "cambrian_s": tiny_cambrian(3, 2),
    "routed newlines": dataclasses.replace(corpora.LAYOUTS["llava_onevision"], newlines="region"),
    "regions of frames": VisualLayout(24, 4, (2, 2), context_tokens=1, video_region=(2, 3, 3)),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    """One image, a wide one, two images, a video, and text alone."""
    corpora.write_picture(tmp_path / "a.png", 20, 30)
    corpora.write_picture(tmp_path / "<b>.png", 30, 100)
    corpora.write_animation(tmp_path / "walk.gif")
    two = corpora.turns("<image>\nThis?", "é日, one.", "And <image>?", "Two.")
    film = corpora.turns("<video>\nWhat?", "Noise.")
    records = [
        corpora.captioned("a.png", "one"),
        corpora.captioned("<b>.png", f"<i>{EVIL}", f"{EVIL} <|im_end|>\x1b[2J"),
        {"id": 7, "image": ["a.png", "<b>.png"], "conversations": two},
        {"id": "film", "video": "walk.gif", "conversations": film},
        {"conversations": corpora.turns("Why?", "Because.\nSo.")},
    ]
    return open_corpus(corpora.write_lines(tmp_path, records))


def of_class(page, name):
    return [
        (tag, attributes, text)
        for tag, attributes, text in corpora.elements(page)
        if name in attributes.get("class", "").split()
    ]


def body_of(page):
    """The page without the key above the sequence."""
    return page[page.index('<div class="sequence') : page.index("</main>")]


CASES = [(layout, index) for layout in LAYOUTS for index in range(5)]


@pytest.mark.parametrize(("layout", "index"), CASES)
def test_the_page_is_the_arrays(corpus, layout, index):
    conversations = corpora.conversations(LAYOUTS[layout], CorpusConfig(path="x", max_frames=5))
    arrays = conversations.arrays(corpus[index], index)
    page = sample_page(shown_sample(corpus, conversations, index))
    body = body_of(page)

    # Tokens of text in order, and which of them a position before them has as its target.
    order, text = np.argsort(arrays["text_order"]), arrays["kind"] == Kind.TEXT
    targets = {int(o) + 1: int(t) for o, t in zip(arrays["text_order"], arrays["targets"]) if t >= 0}
    expected = [
        (int(arrays["tokens"][at]), targets.get(int(arrays["text_order"][at]))) for at in order if text[at]
    ]
    assert all(target in (None, token) for token, target in expected)
    marks = of_class(body, "t")
    ids = [int(re.match(r"token (\d+)", attributes["title"])[1]) for _, attributes, _ in marks]
    assert ids == [token for token, _ in expected]
    assert [tag == "mark" for tag, _, _ in marks] == [target is not None for _, target in expected]
    assert sum(tag == "mark" for tag, _, _ in marks) == len(targets) > 0

    # Newlines and context tokens, each at its place between the rest.
    kinds = [a["class"].split()[0] for _, a, _ in corpora.elements(body) if a.get("class", "?")[0] in "tmv"]
    visual = arrays["visual_src"] >= 0
    views = dict(zip(arrays["visual_order"][visual].tolist(), arrays["visual_view"][visual].tolist()))
    of_text = {int(o): "t" if is_text else "m" for o, is_text in zip(arrays["text_order"], text)}
    places = []
    for place in range(len(views) + len(of_text)):
        if place in of_text:
            places.append(of_text[place])
        elif views.get(place - 1) != views[place]:
            places.append("v")
    assert kinds == places
    assert len(of_class(body, "m")) == int((arrays["kind"] >= Kind.NEWLINE).sum())

    # Visual tokens: links to their views, with their numbers.
    counts = {}
    for _, attributes, count in of_class(body, "v"):
        view = int(attributes["href"].removeprefix("#view-"))
        counts[view] = counts.get(view, 0) + int(count.rpartition(":")[2])
    assert counts == {int(v): int((arrays["visual_view"][visual] == v).sum()) for v in set(views.values())}
    assert [a["id"] for tag, a, _ in corpora.elements(body) if tag == "figure"] == [
        f"view-{v}" for v in counts
    ]


@pytest.mark.parametrize(("layout", "index"), CASES)
def test_every_region_is_drawn_where_its_tokens_are(corpus, layout, index):
    at = LAYOUTS[layout]
    conversations = corpora.conversations(at, CorpusConfig(path="x", max_frames=5))
    arrays = conversations.arrays(corpus[index], index)
    sample = shown_sample(corpus, conversations, index)
    page = sample_page(sample)
    drawn = [int(a["data-region"]) for tag, a, _ in corpora.elements(page) if tag == "rect"]
    assert set(drawn) == set(range(len(arrays["region_segment"])))
    assert len(drawn) == len(arrays["region_segment"]) or layout == "regions of frames"
    assert sample.lengths == conversations.measure(corpus[index]).lengths

    newlines = int((arrays["pool_indices"][..., 0] == NEWLINE).sum()) if "pool_indices" in arrays else 0
    assert sum(picture.newlines for picture in sample.pictures) == newlines
    assert (newlines > 0) == (layout == "routed newlines" and index < 2)
    used = 0
    for number, picture in enumerate(sample.pictures):
        rows, columns = picture.tiles
        side = at.image_size
        assert picture.pixels.shape == (rows * side, columns * side, 3)
        for tile in range(rows * columns):
            y, x = tile // columns * side, tile % columns * side
            np.testing.assert_array_equal(picture.pixels[y : y + side, x : x + side], arrays["images"][used])
            used += 1
        tokens = (arrays["visual_view"] == number) & (arrays["visual_src"] >= 0)
        for area in picture.areas:
            assert area.rows * area.columns == tokens[area.region].sum() - (
                (arrays["pool_indices"][area.region, :, 0] == NEWLINE).sum() if newlines else 0
            )
        # Together they cover a rectangle, without a gap.
        left, top = min(a.x for a in picture.areas), min(a.y for a in picture.areas)
        right = max(a.x + a.width for a in picture.areas)
        bottom = max(a.y + a.height for a in picture.areas)
        covered = sum(area.width * area.height for area in picture.areas)
        assert covered == pytest.approx((right - left) * (bottom - top))
        assert 0 <= left < right <= columns * side + 1e-6 and 0 <= top < bottom <= rows * side + 1e-6
        if picture.tiles != (1, 1):  # the picture without its padding, up to a token of the tower
            height, width = fitted(picture.size, (rows * side, columns * side))
            assert abs((right - left) - width) <= 2 * at.patch_size
            assert abs((bottom - top) - height) <= 2 * at.patch_size
            assert abs((left + right) / 2 - columns * side / 2) <= at.patch_size
    assert used == len(arrays["images"])


def test_regions_of_a_square_are_where_they_should_be(corpus):
    """6 x 6 tokens of 4 pixels; regions of 3 x 2 tokens, in raster order."""
    (picture,) = shown_sample(corpus, corpora.conversations(), 0).pictures
    places = [(area.region, area.x, area.y, area.width, area.height) for area in picture.areas]
    assert places == [(3 * y + x, 8 * x, 12 * y, 8, 12) for y in range(2) for x in range(3)]


@pytest.mark.parametrize("layout", corpora.LAYOUTS)
def test_data_cannot_become_markup(corpus, tmp_path, layout):
    conversations = corpora.conversations(corpora.LAYOUTS[layout])
    sample = show_sample(corpus, conversations, 1, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    corpora.assert_inert(page)
    assert sorted(path.name for path in tmp_path.glob("page*")) == ["page.html"]
    text = "".join(text for _, _, text in of_class(body_of(page), "t"))
    assert f"{EVIL} <|im_end|>\\x1b[2J<|im_end|>" in text
    # What the caption's writer may not have meant is seen: its end token is one.
    assert [t for _, a, t in of_class(body_of(page), "special") if "im_end" in t] == ["<|im_end|>"] * (
        3 if layout == "llava_onevision" else 4
    )
    assert f"record 1, id <i>{EVIL}" in next(text for _, _, text in of_class(page, "about"))
    assert any(text.startswith("<b>.png: 100×30 pixels as stored") for _, _, text in corpora.elements(page))
    assert "\x1b" not in page + "".join(sample_lines(sample))


def test_lines_mark_what_is_learnt(corpus):
    conversations = corpora.conversations()
    lines = sample_lines(shown_sample(corpus, conversations, 2))
    assert lines[0] == "all.jsonl line 3 (id '7')"
    sample = shown_sample(corpus, conversations, 2)
    assert lines[1] == (
        f"{sample.lengths.tokens} tokens: {sample.lengths.text} in the text stream, 72 visual in 12 regions "
        f"of 2 images; {sample.targets} to learn"
    )
    assert lines[2].startswith("image 1, view 1 of 1 (a.png): 30×20 pixels as stored, 6×6 tokens, 6 regions")
    text = "\n".join(lines[lines.index("") + 1 :])
    assert re.findall("«(.*?)»", text) == ["é日, one.<|im_end|>", "Two.<|im_end|>"]
    assert "[image 1, view 1 of 1: 38 tokens]\nThis?" in text
    video = sample_lines(shown_sample(corpus, corpora.conversations(corpora.LAYOUTS["llava_onevision"]), 3))
    assert video[2] == "video 1, 32 frames (walk.gif): 30×20 pixels as stored, 3×3 tokens, 1 region each"
    assert "\n[video 1: 288 tokens][newline: 1 token]\nWhat?" in "\n".join(video)


def test_a_long_sequence_is_cut_on_a_terminal(corpus, monkeypatch):
    monkeypatch.setattr(show, "_MOST_CHARACTERS", 30)
    text = sample_lines(shown_sample(corpus, corpora.conversations(), 4))
    assert text[-1].endswith(" characters in all)") and sum(map(len, text[3:])) < 80


def test_turns_that_are_left_out_are_told(corpus, tmp_path):
    config = CorpusConfig(path="x", max_tokens=150, too_long="truncate")
    sample = show_sample(corpus, corpora.conversations(config=config), 2, tmp_path / "page.html")
    assert sample.left_out == 2 and len(sample.pictures) == 1
    assert "2 turns left out, since it is too long" in sample_lines(sample)
    assert "turns left out" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("index", [-1, 5])
def test_a_record_that_is_not_there(corpus, tmp_path, index):
    with pytest.raises(
        UserError, match=rf"^There is no record {index}; the corpus has 5, numbered from 0\.$"
    ):
        show_sample(corpus, corpora.conversations(), index, tmp_path / "page.html")


def test_a_bad_record_is_one_sentence_and_no_page(corpus, tmp_path):
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(RecordError, match=r"^all\.jsonl line 1: Image .* damaged\.$") as error:
        show_sample(corpus, corpora.conversations(), 0, tmp_path / "page.html")
    assert error.value.cause == "medium" and not (tmp_path / "page.html").exists()


def test_a_target_that_is_not_the_next_token_is_noticed(corpus, monkeypatch):
    """The page may not guess."""
    from gaze_jax.corpora import shown

    process = shown.process_with_views

    def moved(processor, sample):
        arrays, views = process(processor, sample)
        return arrays | {"targets": np.roll(arrays["targets"], 1)}, views

    monkeypatch.setattr(shown, "process_with_views", moved)
    with pytest.raises(ValueError, match="is not the token after it"):
        shown_sample(corpus, corpora.conversations(), 0)


@hypothesis.given(st.text(max_size=40))
def test_texts_of_tokens_are_the_text(text):
    tokenizer = corpora.byte_tokenizer()
    ids, _ = tokenizer.encode(text)
    found = token_texts(tokenizer, ids)
    assert len(found) == len(ids)
    if "\ufffd" not in text:
        assert "".join(found) == text
        # A character's first byte has it.
        assert [len(piece) for piece in found] == [
            size for character in text for size in [1] + [0] * (len(character.encode()) - 1)
        ]


def test_bytes_that_are_no_character_are_shown_as_such():
    tokenizer = corpora.byte_tokenizer()
    ids = tokenizer.encode("aéb")[0]
    assert token_texts(tokenizer, [ids[0], ids[2], ids[3]]) == ["a", "\ufffd", "b"]
