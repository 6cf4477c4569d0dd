"""A new family is one file: its values alone, entered in no table, process an image and a conversation."""

import numpy as np

from gaze_jax.chat.conversation import START, Supervision, conversation_parts, turn_spans
from gaze_jax.chat.messages import Message, media_first
from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.core.streams import IGNORE, Kind
from gaze_jax.data.pixels import GREY, Size
from gaze_jax.data.processor import Processor, process_with_views
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.data.tokenizer import END
from gaze_jax.data.views import Grid, ViewStyle, unpadded_grid, whole_grid
from gaze_jax.families import FAMILIES
from gaze_jax.families.family import Family
from gaze_jax.media.video import FrameSampling
from tests.helpers.chat import ANSWER, SYSTEM, TOKENIZER, template

# What the file of the family would hold: an image is its padded square, unpadded, then a small squashed one;
# a frame is the small one. The text of a turn comes before its media. Every line feed is learnt.


def _image_grids(layout: VisualLayout, size: Size, alone: bool) -> tuple[list[Grid], bool]:
    canvas = layout.image_size, layout.image_size
    large = unpadded_grid(layout, size, layout.grid, canvas=canvas, colour=GREY, fit="pad")
    return [large, _frame_grid(layout, size)], True


def _frame_grid(layout: VisualLayout, size: Size) -> Grid:
    return whole_grid(layout, size, layout.views.frame_side or layout.grid, "squash")


def _text_first(items):
    *media, text = media_first(items)
    return (text, *media)


TOY = Family(
    views=ViewStyle("toy", _image_grids, _frame_grid, unused={"max_tiles": "has no tiles"}),
    frames=FrameSampling(fps=2.0, max_frames=3),
    arrange=_text_first,
    system=SYSTEM.text,
    supervision=Supervision(turn_spans, ("\n",)),
)

LAYOUT = VisualLayout(8, 2, (2, 2), context_tokens=1, views=ViewConfig("toy", frame_side=2))


def test_a_family_that_is_in_no_table_reads_an_image_and_a_conversation():
    """Views, order, newlines, system prompt and targets are those of its values."""
    assert TOY.views.name not in FAMILIES
    asked = Message("user", (Image(0), Video(0), "What is this?"))
    messages = (Message("system", TOY.system), asked, ANSWER)
    parts = conversation_parts(
        template("qwen2_5"), messages, arrange=TOY.arrange, supervision=TOY.supervision
    )
    assert [type(part) for part in parts] == [Text, Image, Video, Text]
    assert parts[0].text.endswith("user\nWhat is this?") and SYSTEM.text in parts[0].text

    processor = Processor(LAYOUT, TOKENIZER, ("toy",), TOY.views, supervise=TOY.supervision.tokens)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    sample = Sample(0, (pixels,), parts, "toy", videos=([pixels, pixels],))
    arrays, views = process_with_views(processor, sample)

    # Half of the 4x4 tokens show the image, in two rows; then 2x2, and 2x2 of each frame.
    assert [(view.video, view.regions.shape) for view in views] == [
        (False, (2, 4)),
        (False, (2, 2)),
        (True, (2, 2)),
        (True, (2, 2)),
    ]
    assert arrays["images"].shape == (4, 8, 8, 3)
    assert arrays["visual_order"].max() >= 0 and (arrays["visual_src"] >= 0).sum() == 8 + 3 * 4
    kinds = arrays["kind"].tolist()
    assert kinds.count(Kind.NEWLINE) == 2 + 1 and kinds.count(Kind.CONTEXT) == 4

    text = [t for t, kind in zip(arrays["tokens"].tolist(), kinds, strict=True) if kind == Kind.TEXT]
    rendered = "".join(part.text for part in parts if isinstance(part, Text))
    assert TOKENIZER.decode(text) == rendered
    learnt = TOKENIZER.decode([t for t in arrays["targets"].tolist() if t != IGNORE])
    assert learnt.endswith(f"{START}assistant\nA cat.{END}\n") and learnt.startswith("\n")
