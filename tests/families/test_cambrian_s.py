"""Cambrian-S: views against torch, config.json, what of a conversation it learns."""

import numpy as np
import pytest

from gaze_jax.chat import conversation
from gaze_jax.chat.messages import Message
from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.data.processor import process
from gaze_jax.data.sample import Image, Video
from gaze_jax.data.tokenizer import END
from gaze_jax.errors import UserError
from gaze_jax.families import check_views
from gaze_jax.families.cambrian_s import CAMBRIAN_S, cambrian_canvases
from gaze_jax.media.video import FrameSampling
from tests.helpers import views as helpers
from tests.helpers.chat import (
    AGAIN,
    ANSWER,
    BLACK,
    QUESTION,
    SEEN,
    SYSTEM,
    THOUGHT,
    TOKENIZER,
    as_dicts,
    labels_of,
    parts_of,
    processor,
    sample,
    supervised_text,
)
from tests.helpers.model_configs import CAMBRIAN, read
from tests.helpers.views import (
    NEARLY_WHOLE,
    NEWLINE,
    cambrian_canvas,
    cambrian_grid,
    count,
    features,
    frame_shape,
    image_shapes,
    image_views,
    layout,
    noise,
    sequence,
    shapes_of,
    sizes,
    tiny_cambrian,
    video_views,
)

# Views


def pooled(tokens: np.ndarray, side: int, tiles: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    return cambrian_grid(torch.from_numpy(tokens), side, tiles, size, torch.from_numpy(NEWLINE)).numpy()


def check_cambrian(at: VisualLayout, size: tuple[int, int]) -> int:
    """Returns the tiles of an image of this size, alone."""
    image_side, frame_side = at.views.image_side or at.grid, at.views.frame_side or at.grid
    views = image_views(at, noise(*size), alone=True)
    tiles = len(views.views[1].images)
    tokens = features(1 + tiles, at.tokens)
    snapshot = pooled(tokens[:1], image_side, (1, 1), size)
    wide, tall = cambrian_canvas(
        size, at.image_size, max(width for _, width in at.views.canvases) // at.image_size
    )
    shape = tall // at.image_size, wide // at.image_size
    both = np.concatenate([snapshot, pooled(tokens[1:], image_side, shape, size)])
    np.testing.assert_allclose(sequence(views, tokens), both, rtol=0, atol=1e-6)
    assert shapes_of(views) == image_shapes(at, *size, alone=True)

    several = image_views(at, noise(*size), alone=False)
    np.testing.assert_allclose(sequence(several, tokens[:1]), snapshot, rtol=0, atol=1e-6)
    assert shapes_of(several) == image_shapes(at, *size, alone=False)

    frame = video_views(at, [noise(*size)])
    expected = pooled(tokens[:1], frame_side, (1, 1), size)
    np.testing.assert_allclose(sequence(frame, tokens[:1]), expected, rtol=0, atol=1e-6)
    assert shapes_of(frame) == ([frame_shape(at, *size)], False)
    return tiles


@pytest.mark.parametrize(
    "size", [(427, 640), (384, 384), (70, 500), (423, 188), (147, 392), (820, 1107)], ids=str
)
def test_cambrian_features_at_real_size(size):
    """The published numbers: 27 a side for images, 8 for frames."""
    check_cambrian(layout(helpers.CAMBRIAN_S), size)


@pytest.mark.parametrize(("image_side", "frame_side", "side"), [(None, None, 24), (4, 3, 24), (3, 2, 20)])
def test_cambrian_features_of_tiny_grids(image_side, frame_side, side):
    """80 sizes; tiles are pooled one by one, before they are joined."""
    at = tiny_cambrian(image_side, frame_side, side)
    limit = min(image_side or 6, frame_side or 6)
    found = set()
    for height, width in [*sizes(80, 8, 150), *NEARLY_WHOLE[11:]]:
        if max(height, width) < limit * min(height, width):
            found.add(check_cambrian(at, (height, width)))
    assert found >= {1, 2, 4}


def test_published_numbers_of_tokens():
    """What is known of it: 72, 54 and 36 a frame."""
    at = layout(helpers.CAMBRIAN_S)
    frames = [frame_shape(at, *size) for size in [(500, 500), (480, 640), (1080, 1920)]]
    assert [count([frame], CAMBRIAN_S.views.video_end_newline) for frame in frames] == [72, 54, 36]
    assert len(helpers.CAMBRIAN_S.canvases) == 23
    assert set(cambrian_canvases(2, 3)) == {(2, 2), (2, 4), (2, 6), (4, 2), (6, 2)}
    # Several images keep the tokens of a single one; only frames have fewer.
    assert image_shapes(at, 480, 640, alone=False) == ([(21, 27, True)], False)


def test_a_number_that_it_has_no_use_for_is_refused():
    """No option is ignored."""
    with pytest.raises(UserError, match=r"'cambrian_s' shrinks no tile grid; leave views.max_tiles empty"):
        check_views(ViewConfig("cambrian_s", max_tiles=9))


# config.json


def test_cambrian_views():
    """Tiles by width first, as its code tries them, none where images are padded; sides of token counts."""
    views = read(CAMBRIAN | {"anyres_max_subimages": 3, "miv_token_len": 196}).views
    assert views == ViewConfig(
        "cambrian_s",
        ((384, 384), (768, 384), (1152, 384), (384, 768), (384, 1152)),
        image_side=27,
        frame_side=14,
    )
    padded = {name: value for name, value in CAMBRIAN.items() if name != "anyres_max_subimages"}
    assert read(padded | {"image_aspect_ratio": "pad"}).views.canvases == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "sva"}, "mm_projector_type='sva'"),
        ({"connector_only": False}, "connector_only=False"),
        ({"connector_only": None}, "connector_only=None"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"mm_use_im_newline_token": False}, "mm_use_im_newline_token=False"),
        ({"mm_vision_tower_aux_list": ["a", "b"]}, "one tower is supported"),
        ({"mm_vision_tower_aux_token_len_list": [576]}, r"mm_vision_tower_aux_token_len_list=\[576\]"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio='square'"),
        ({"anyres_max_subimages": None}, "lacks anyres_max_subimages"),
        ({"si_token_len": 700}, "si_token_len=700, which is no positive square"),
        ({"miv_token_len": 0}, "miv_token_len=0, which is no positive square"),
        ({"miv_token_len": None}, "lacks miv_token_len"),
    ],
)
def test_cambrian_refuses_what_would_compute_something_else(change, message):
    """Each by the name of its field."""
    with pytest.raises(UserError, match=message):
        read(CAMBRIAN | change)


# Conversations and videos


def test_media_come_first_in_their_own_order():
    """Images and videos as they were given, then the text."""
    assert CAMBRIAN_S.arrange(("Is ", Video(1), "like ", Image(2), "? ")) == (Video(1), Image(2), "Is like ?")


def test_it_has_a_system_prompt_and_a_frame_per_second():
    """At most 128 of them."""
    assert CAMBRIAN_S.system == SYSTEM.text
    assert CAMBRIAN_S.frames == FrameSampling(fps=1.0, max_frames=128)


def cambrian_labels(messages):
    """(token or "image", label) from the rule itself: turn by turn, text around images by itself."""
    unmasked = {TOKENIZER.encode(token)[0][0] for token in ("\n", "<|im_start|>", END)}
    sequence = []
    for message in messages:
        text = as_dicts([message], "qwen2_5")[0]["content"]
        pieces = f"<|im_start|>{message.role}\n{text}{END}\n".split("<image>")
        for i, piece in enumerate(pieces):
            if i:
                sequence.append(("image", None))
            for token in TOKENIZER.encode(piece)[0]:
                learnt = message.role == "assistant" or token in unmasked
                sequence.append((token, token if learnt else None))
    return sequence


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen2_5_generation"])
def test_whole_turns_of_answers_are_supervised(name):
    """With header and the line feed after the end token, whatever blocks a template has."""
    turns = [f"<|im_start|>assistant\nA cat.{END}\n", f"<|im_start|>assistant\n{THOUGHT.text}{END}\n"]
    parts = parts_of(name, (SYSTEM, SEEN, ANSWER, AGAIN, THOUGHT), supervision=CAMBRIAN_S.supervision)
    assert supervised_text(parts) == turns


@pytest.mark.parametrize("context", [0, 1, 3])
def test_it_learns_whole_answers_and_every_line_feed(context):
    """Exactly its labels, but for a line feed right after an image, which no text position predicts."""
    messages = (SYSTEM, SEEN, ANSWER, AGAIN, BLACK, QUESTION, Message("assistant", "A\ncat.\n"))
    expected = cambrian_labels(messages)
    # Nothing comes before the first token; without context tokens nothing dense before one after an image.
    dropped = {0} | (
        {i + 1 for i, (token, _) in enumerate(expected) if token == "image"} if context == 0 else set()
    )
    assert all(expected[i][1] is not None for i in dropped)
    expected = [(t, None if i in dropped else label) for i, (t, label) in enumerate(expected) if t != "image"]
    made = processor(context=context, supervise=CAMBRIAN_S.supervision.tokens)
    parts = parts_of("qwen2_5", messages, CAMBRIAN_S, supervision=CAMBRIAN_S.supervision)
    assert labels_of(process(made, sample(parts)), made.layout) == expected
    learnt = {token for token, label in expected if label is not None}
    assert {TOKENIZER.encode(token)[0][0] for token in ("\n", "<|im_start|>", END)} <= learnt
    assert conversation.ANSWER.tokens == ()
