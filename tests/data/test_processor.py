import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import IGNORE, Kind, Streams
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data.padding import pad_answers, pad_to
from gaze_jax.data.pipeline import stack
from gaze_jax.data.processor import Processor, process, prompt
from gaze_jax.data.sample import Box, Image, Sample, Text
from gaze_jax.data.tokenizer import END
from gaze_jax.errors import UserError
from gaze_jax.families.square import SQUARE

TOKENIZER = build_tokenizer()
NO_BOX = (-1.0, -1.0, -1.0, -1.0)


def processor(*, grid=2, region=(1, 2), context=1, patch=2, remainder=0, resize=False):
    layout = VisualLayout(grid * patch + remainder, patch, region, context)
    return Processor(layout, TOKENIZER, FAMILIES, SQUARE.views, resize)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(parts, **change):
    return Sample(**{"id": 3, "images": (noise(4, 4),), "parts": tuple(parts), "family": "read", **change})


QUESTION = Text("Where is 7?\n")
BOX = Box(0, 1, (1.0, 0.0, 3.0, 2.0))
ANSWER = Text(f"7{END}", supervised=True, boxes=(BOX,))
READ = (Image(0), QUESTION, ANSWER)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of the spliced sequence; its index in the list is its order."""

    kind: str
    value: int
    view: int = -1
    supervised: bool = False
    box: tuple[float, ...] = NO_BOX
    box_view: int = -1


def splice(processor, sample, parts=None):
    """The sequence, one token after the other, from the description of what a sample is."""
    layout, tokens, views, shown = processor.layout, [], 0, {}
    for part in sample.parts if parts is None else parts:
        if isinstance(part, Image):
            here = [Token("visual", raster, views) for raster in range(layout.grid**2)]
            tokens += here + [Token("context", c, views) for c in range(layout.context_tokens)]
            shown[part.index] = views
            views += 1
            continue
        start = 0
        for token in TOKENIZER.encode(part.text)[0]:
            end = start + len(TOKENIZER.decode([token]))
            box, view = NO_BOX, -1
            for candidate in part.boxes:
                if set(range(start, end)) & set(range(candidate.start, candidate.end)):
                    height, width, _ = sample.images[candidate.image].shape
                    x0, y0, x1, y1 = candidate.corners
                    side = layout.image_size
                    box = (x0 * side / width, y0 * side / height, x1 * side / width, y1 * side / height)
                    view = shown[candidate.image]
            tokens.append(Token("text", token, -1, part.supervised, box, view))
            start = end
    return tokens


def check_visual(arrays, tokens, layout):
    """Every visual token is in one slot, in the region of its view that its place on the grid belongs to."""
    seen = {}
    for r, slots in enumerate(layout.table.tolist() * (max(t.view for t in tokens) + 1 if tokens else 0)):
        view, expected = r // layout.regions, {raster for raster in slots if raster >= 0}
        here = set()
        for p in range(layout.slots):
            src, order = int(arrays["visual_src"][r, p]), int(arrays["visual_order"][r, p])
            if src < 0:
                empty = [arrays[f"visual_{name}"][r, p] for name in ("src", "order", "positions", "view")]
                assert empty == [-1, -1, 0, -1]
                continue
            assert (arrays["visual_positions"][r, p], arrays["visual_view"][r, p]) == (order, view)
            assert src // layout.tokens == view
            here.add(src % layout.tokens)
            seen[order] = (src % layout.tokens, view)
        assert here == expected
    assert seen == {i: (t.value, t.view) for i, t in enumerate(tokens) if t.kind == "visual"}
    assert (arrays["visual_src"] >= 0).sum() == len(seen), "and no token is in two slots"


def check_text(arrays, tokens):
    text_stream = [(order, token) for order, token in enumerate(tokens) if token.kind != "visual"]
    kinds = {"text": Kind.TEXT, "context": Kind.CONTEXT}
    assert arrays["tokens"].tolist() == [token.value for _, token in text_stream]
    assert arrays["kind"].tolist() == [kinds[token.kind] for _, token in text_stream]
    assert arrays["text_order"].tolist() == [order for order, _ in text_stream]
    assert arrays["text_positions"].tolist() == [order for order, _ in text_stream]
    assert arrays["text_view"].tolist() == [token.view for _, token in text_stream]
    nothing = Token("end", IGNORE)
    following = [tokens[order + 1] if order + 1 < len(tokens) else nothing for order, _ in text_stream]
    targets = [token if token.supervised else nothing for token in following]
    assert arrays["targets"].tolist() == [token.value for token in targets]
    assert arrays["target_view"].tolist() == [token.box_view for token in targets]
    np.testing.assert_allclose(arrays["target_box"], np.reshape([t.box for t in targets], (-1, 4)), rtol=1e-6)


def check(processor, sample):
    arrays, tokens = process(processor, sample), splice(processor, sample)
    check_visual(arrays, tokens, processor.layout)
    check_text(arrays, tokens)
    assert (arrays["region_segment"] == 0).all() and (arrays["text_segment"] == 0).all()
    shown = [sample.images[part.index] for part in sample.parts if isinstance(part, Image)]
    side = processor.layout.image_size
    assert arrays["images"].shape == (len(shown), side, side, 3)
    for image, pixels in zip(arrays["images"], shown, strict=True):
        if pixels.shape == image.shape:
            np.testing.assert_allclose((image + 1) * 127.5, pixels, atol=1e-4)
    assert arrays["region_segment"].shape == (len(shown) * processor.layout.regions,)
    assert (int(arrays["sample_id"]), FAMILIES[int(arrays["family"])]) == (sample.id, sample.family)
    for name, values in arrays.items():
        floating = name in ("images", "target_box")
        assert values.dtype == (np.float32 if floating else np.int32), name
    return arrays


@st.composite
def cases(draw):
    """A layout and a sequence of images and texts with boxes; some of it cannot be trained on."""
    grid = draw(st.integers(1, 5))
    made = processor(
        grid=grid,
        region=(draw(st.integers(1, grid)), draw(st.integers(1, grid))),
        context=draw(st.integers(0, 2)),
        remainder=draw(st.integers(0, 1)),
        resize=True,
    )
    side = made.layout.image_size
    images = tuple(noise(*draw(st.sampled_from([(side, side), (3, 7)])), seed) for seed in (0, 1))
    parts, shown = [], []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            parts.append(Image(draw(st.integers(0, 1))))
            shown.append(parts[-1].index)
            continue
        words = draw(st.lists(st.sampled_from(["row", "7", "zebra", "?"]), min_size=1, max_size=3))
        text, boxes = " ".join(words), []
        if shown and draw(st.booleans()):
            at = draw(st.integers(0, len(words) - 1))
            start = len(" ".join(words[:at]))
            x0, y0 = draw(st.integers(0, 2)), draw(st.integers(0, 2))
            corners = (x0, y0, x0 + 0.5, y0 + 1.0)
            boxes = [Box(start, start + len(words[at]), corners, draw(st.sampled_from(shown)))]
        parts.append(Text(text, draw(st.booleans()), tuple(boxes)))
    return made, Sample(draw(st.integers(0, 9)), images, tuple(parts), draw(st.sampled_from(FAMILIES)))


# The check of shapes samples the items of a tuple, also while a case is drawn.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@hypothesis.settings(max_examples=100)
@hypothesis.given(cases())
def test_arrays_are_those_of_the_sequence_spliced_token_by_token(case):
    made, sample = case
    tokens = splice(made, sample)
    before = [None, *tokens]
    if any(t.supervised and (b is None or b.kind == "visual") for b, t in zip(before, tokens, strict=False)):
        with pytest.raises(ValueError, match="no text position can predict its first token"):
            process(made, sample)
    else:
        check(made, sample)


@pytest.mark.parametrize("context", [0, 1, 3])
@pytest.mark.parametrize(("grid", "region"), [(2, (1, 2)), (5, (2, 2)), (3, (3, 3)), (4, (1, 1))])
def test_two_images_with_text_between_and_boxes_on_both(grid, region, context):
    made = processor(grid=grid, region=region, context=context)
    parts = (
        Image(1),
        Text("Which digit?\n", boxes=(Box(0, 5, (0.0, 0.0, 1.0, 1.0), image=1),)),
        Image(0),
        Text("Where?"),
        Text(
            f"7 8{END}",
            supervised=True,
            boxes=(Box(0, 1, (1.0, 0.0, 2.0, 1.0), image=1), Box(1, 3, (0.0, 1.0, 1.0, 2.0), image=0)),
        ),
        QUESTION,
        ANSWER,
    )
    side = made.layout.image_size
    arrays = check(made, sample(parts, images=(noise(side, side, 0), noise(side, side, 1))))
    assert [view for view in arrays["target_view"] if view >= 0] == [0, 1, 1]


def test_the_sequence_of_the_modules_example():
    """Written out by hand, so that the reference itself is held to something."""
    arrays = check(processor(), sample([Image(0), Text("?\n"), ANSWER]))
    mark, line = TOKENIZER.encode("?\n")[0]
    (seven, end), _ = TOKENIZER.encode(f"7{END}")
    assert arrays["visual_order"].tolist() == [[0, 1], [2, 3]]
    assert arrays["text_order"].tolist() == [4, 5, 6, 7, 8]
    assert arrays["tokens"].tolist() == [0, mark, line, seven, end]
    assert arrays["targets"].tolist() == [IGNORE, IGNORE, seven, end, IGNORE]
    assert arrays["target_box"].tolist() == [[-1] * 4, [-1] * 4, list(BOX.corners), [-1] * 4, [-1] * 4]


def test_a_context_token_predicts_the_first_token_of_text_that_follows_its_image():
    arrays = check(processor(context=2), sample([QUESTION, Image(0), ANSWER]))
    (seven, end), _ = TOKENIZER.encode(ANSWER.text)
    at = arrays["targets"].tolist().index(seven)
    assert arrays["kind"][at] == Kind.CONTEXT
    assert arrays["tokens"][at] == 1, "the last of the two"
    assert arrays["target_box"][at].tolist() == list(BOX.corners)
    assert arrays["targets"][at + 1] == end


def test_an_image_shown_twice_is_two_views_and_boxes_are_in_the_later_one():
    arrays = check(processor(), sample([Image(0), QUESTION, ANSWER, Image(0), QUESTION, ANSWER]))
    np.testing.assert_array_equal(*arrays["images"])
    assert [view for view in arrays["target_view"] if view >= 0] == [0, 1]


def test_text_alone_and_nothing_at_all_are_sequences_too():
    for parts in [(QUESTION,), (QUESTION, Text("7", supervised=True)), (), (Image(0),)]:
        check(processor(), sample(parts))


def test_pixels_are_scaled_to_minus_one_and_one_and_kept_in_place():
    extremes = np.zeros((4, 4, 3), np.uint8)
    extremes[1, 2] = 255
    image = process(processor(), sample(READ, images=(extremes,)))["images"][0]
    assert (image[1, 2] == 1).all()
    assert (np.delete(image.reshape(16, 3), 6, axis=0) == -1).all()


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (6, 24), (30, 30)])
def test_resize_squashes_the_image_and_its_boxes_with_it(height, width):
    pixels = np.zeros((height, width, 3), np.uint8)
    # The lower right quarter, in the image and in the box.
    pixels[height // 2 :, width // 2 :] = 200
    corners = (width / 2, height / 2, float(width), float(height))
    answer = Text(f"7{END}", supervised=True, boxes=(Box(0, 1, corners),))
    made = processor(grid=12, region=(3, 3), patch=1, resize=True)
    arrays = check(made, sample([Image(0), QUESTION, answer], images=(pixels,)))
    assert arrays["target_box"].max(axis=0).tolist() == [6, 6, 12, 12]
    bright = arrays["images"][0, ..., 0] > 100 / 127.5 - 1
    expected = np.zeros((12, 12), bool)
    expected[6:, 6:] = True
    np.testing.assert_array_equal(bright, expected)


def test_resize_leaves_an_image_that_fits_as_it_is():
    plain, resized = (process(processor(resize=resize), sample(READ)) for resize in (False, True))
    for name, values in plain.items():
        np.testing.assert_array_equal(values, resized[name], err_msg=name)


@pytest.mark.parametrize(("height", "width"), [(4, 5), (5, 4), (8, 8), (1, 1)])
def test_an_image_that_does_not_fit_the_tower_is_the_users_to_mend(height, width):
    images = (noise(4, 4), noise(height, width))
    with pytest.raises(UserError, match=f"Image 1 of sample 3 is {height}x{width} .* takes 4x4"):
        process(processor(), sample([Image(0), QUESTION, Image(1), QUESTION], images=images))


@pytest.mark.parametrize(
    ("parts", "context"),
    [
        ([ANSWER], 2),
        ([ANSWER, QUESTION], 2),
        ([Image(0), ANSWER], 0),
        ([QUESTION, Image(0), ANSWER, QUESTION], 0),
        ([QUESTION, Text("7", supervised=True), Image(0), ANSWER], 0),
    ],
    ids=["at the start", "at the start with text after", "after an image", "after text and image", "twice"],
)
def test_supervised_text_that_nothing_predicts_is_refused(parts, context):
    parts = [dataclasses.replace(p, boxes=()) if isinstance(p, Text) else p for p in parts]
    with pytest.raises(ValueError, match="no text position can predict its first token"):
        process(processor(context=context), sample(parts))


@pytest.mark.parametrize(
    ("text", "first", "second", "token"),
    [("77", (0, 2), (1, 2), "7"), ("row", (0, 1), (2, 3), "row"), ("a 7", (0, 2), (2, 3), " 7")],
)
def test_a_token_that_overlaps_two_boxes_is_refused_by_its_text(text, first, second, token):
    boxes = tuple(Box(*span, (0.0, 0.0, 1.0, 1.0)) for span in (first, second))
    with pytest.raises(ValueError, match=f"^Token {token!r} of sample 3 overlaps two boxes"):
        process(processor(), sample([Image(0), QUESTION, Text(text, supervised=True, boxes=boxes)]))


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="Family 'count' of sample 3"):
        process(processor(), sample(READ, family="count"))


def test_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token"):
        process(processor(), sample([Image(0), Text("é")]))


# Where the first answer starts and ends among the parts.
CONVERSATIONS = {
    "one answer": (READ, 2, 3),
    "two turns": ((*READ, Text("And 8?\n"), ANSWER), 2, 3),
    "an answer in two texts": ((*READ[:2], Text("7 ", supervised=True), ANSWER, QUESTION), 2, 4),
    "an image after the answer": ((*READ, Image(0), QUESTION, ANSWER), 2, 3),
    "an answer after an image": ((QUESTION, Image(0), ANSWER), 2, 3),
    "two images": ((Image(0), QUESTION, Image(0), QUESTION, ANSWER), 4, 5),
    "no image": ((QUESTION, Text(f"7{END}", supervised=True)), 1, 2),
}


@pytest.mark.parametrize(("parts", "first", "last"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_prompt_is_what_comes_before_the_first_answer_and_that_answer(parts, first, last):
    made = processor(context=2)
    arrays, whole = prompt(made, sample(parts)), process(made, sample(parts))
    prefix = process(made, sample(parts[:first]))
    assert arrays.keys() == prefix.keys() | {"answer", "answer_box", "answer_view"}
    for name, values in prefix.items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)
    assert (arrays["targets"] == IGNORE).all()
    # What a teacher would have forced is what a free run has to say.
    answer = [t for t in splice(made, sample(parts), parts[:last]) if t.supervised]
    assert arrays["answer"].tolist() == [token.value for token in answer]
    assert arrays["answer_view"].tolist() == [token.box_view for token in answer]
    np.testing.assert_array_equal(arrays["answer_box"], [token.box for token in answer])
    at = np.flatnonzero(whole["targets"] != IGNORE)[: len(answer)]
    for name, target in (("answer", "targets"), ("answer_box", "target_box"), ("answer_view", "target_view")):
        np.testing.assert_array_equal(arrays[name], whole[target][at], err_msg=name)
    assert arrays["answer"].dtype == arrays["answer_view"].dtype == np.int32


def test_a_prompt_needs_an_answer_that_ends():
    with pytest.raises(ValueError, match="Sample 3 has no supervised text"):
        prompt(processor(), sample(READ[:2]))
    with pytest.raises(ValueError, match="answer of sample 3 must end in"):
        prompt(processor(), sample([*READ[:2], Text("7", supervised=True), QUESTION, ANSWER]))


def natural(arrays):
    """The smallest bucket that holds a row."""
    sizes = (arrays["visual_src"].shape[0], arrays["tokens"].shape[0], arrays["images"].shape[0])
    return dict(zip(("regions", "text", "images"), sizes, strict=True))


PADDED = {
    "regions": {
        "visual_src": -1,
        "visual_order": -1,
        "visual_positions": 0,
        "visual_view": -1,
        "region_segment": -1,
    },
    "text": {
        "tokens": 0,
        "kind": Kind.PAD,
        "text_order": -1,
        "text_positions": 0,
        "text_segment": -1,
        "text_view": -1,
        "targets": IGNORE,
        "target_box": -1,
        "target_view": -1,
    },
    "images": {"images": 0},
}


@pytest.mark.parametrize("more", [{}, {"regions": 3}, {"text": 1}, {"images": 2}, {"regions": 1, "text": 9}])
def test_padding_keeps_what_is_there_and_marks_the_rest_as_empty(more):
    arrays = prompt(processor(), sample(READ))
    bucket = {axis: size + more.get(axis, 0) for axis, size in natural(arrays).items()}
    padded = pad_to(arrays, **bucket)
    assert padded.keys() == arrays.keys()
    fields = {name: (axis, fill) for axis, of_axis in PADDED.items() for name, fill in of_axis.items()}
    for name, values in arrays.items():
        assert padded[name].dtype == values.dtype, name
        if name not in fields:
            np.testing.assert_array_equal(padded[name], values, err_msg=name)
            continue
        axis, fill = fields[name]
        assert padded[name].shape == (bucket[axis], *values.shape[1:]), name
        np.testing.assert_array_equal(padded[name][: len(values)], values, err_msg=name)
        assert (padded[name][len(values) :] == fill).all(), name


@pytest.mark.parametrize("axis", ["regions", "text", "images"])
def test_padding_never_cuts(axis):
    arrays = process(processor(), sample(READ))
    bucket = natural(arrays)
    needs = bucket[axis]
    with pytest.raises(ValueError, match=rf"of sample 3 needs {needs} but {axis}={needs - 1}; raise {axis}"):
        pad_to(arrays, **{**bucket, axis: needs - 1})


def test_padded_rows_of_different_samples_stack_into_streams():
    made = processor(context=2)
    parts = [READ, (QUESTION,), (Image(0), Image(0), QUESTION)]
    rows = [pad_to(process(made, sample(p)), regions=4, text=16, images=2) for p in parts]
    batch = stack(rows)
    streams = Streams.from_batch(batch)
    shapes = {field.shape[:2] for field in jax.tree.leaves(streams)}
    assert shapes == {(3, 4), (3, 16)}
    assert batch["sample_id"].shape == batch["family"].shape == (3,)
    for b, row in enumerate(rows):
        np.testing.assert_array_equal(batch["tokens"][b], row["tokens"])


def test_answers_are_padded_and_never_cut():
    arrays = prompt(processor(), sample(READ))
    size = len(arrays["answer"])
    padded = pad_answers(arrays, length=size + 3)
    for name, fill in (("answer", IGNORE), ("answer_box", -1), ("answer_view", -1)):
        np.testing.assert_array_equal(padded[name][:size], arrays[name], err_msg=name)
        assert padded[name].shape == (size + 3, *arrays[name].shape[1:])
        assert (padded[name][size:] == fill).all()
        assert padded[name].dtype == arrays[name].dtype
    for name in arrays.keys() - {"answer", "answer_box", "answer_view"}:
        assert padded[name] is arrays[name], name
    assert len(pad_answers(arrays, length=size)["answer"]) == size
    with pytest.raises(ValueError, match=f"of sample 3 needs {size} but length={size - 1}"):
        pad_answers(arrays, length=size - 1)
