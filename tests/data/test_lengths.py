"""The lengths that rows are planned with are those of the arrays that the processor makes."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.corpora.stand_in import byte_tokenizer
from gaze_jax.data.lengths import Lengths, image_lengths, video_lengths
from gaze_jax.data.processor import Processor
from gaze_jax.data.sample import Image, Sample, Text, Video
from tests.helpers.views import style_of, tiny_cambrian, tiny_onevision

LAYOUTS = {
    "square": VisualLayout(24, 4, region=(3, 2), context_tokens=2),
    "onevision": tiny_onevision(9),
    "onevision, context": dataclasses.replace(tiny_onevision(2), context_tokens=3),
    "cambrian": tiny_cambrian(4, 3),
    "cambrian, newlines in regions": dataclasses.replace(tiny_cambrian(None, 5), newlines="region"),
    "cambrian, slabs": dataclasses.replace(tiny_cambrian(5, 4), video_region=(2, 2, 3), context_tokens=1),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
@hypothesis.given(
    sizes=st.lists(st.tuples(st.integers(16, 60), st.integers(16, 60)), max_size=3),
    film=st.none() | st.tuples(st.integers(16, 60), st.integers(16, 60), st.integers(1, 7)),
)
def test_lengths_are_those_of_the_arrays(name, sizes, film):
    layout = LAYOUTS[name]
    style, tokenizer = style_of(layout), byte_tokenizer()
    images = tuple(np.zeros((*size, 3), np.uint8) for size in sizes)
    videos = () if film is None else (np.zeros((film[2], film[0], film[1], 3), np.uint8),)
    parts = (Text("ab"), *map(Image, range(len(images))), *map(Video, range(len(videos))), Text("c"))
    arrays = Processor(layout, tokenizer, ("x",), style, resize=True)(Sample(0, images, parts, "x", videos))
    media = [image_lengths(style, layout, size, alone=len(sizes) == 1) for size in sizes]
    media += [] if film is None else [video_lengths(style, layout, film[:2], film[2])]
    found = sum(media, Lengths(text=3))
    regions, slots = arrays["visual_src"].shape
    assert found == Lengths(
        text=len(arrays["tokens"]),
        regions=regions,
        images=len(arrays["images"]),
        slots=slots if media else 0,
        visual=int((arrays["visual_src"] >= 0).sum()),
    )
    assert found.tokens == len({*arrays["text_order"], *arrays["visual_order"].ravel()} - {-1})
