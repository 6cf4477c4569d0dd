import numpy as np
import pytest

from gaze_jax.core.layout import ViewConfig, VisualLayout
from gaze_jax.core.streams import IGNORE, NEWLINE
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data.packing import MIXED, pack
from gaze_jax.data.padding import PADDING, pad_to
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Box, Image, Sample, Text, Video
from gaze_jax.data.tokenizer import END
from gaze_jax.families.cambrian_s import CAMBRIAN_S
from gaze_jax.families.square import SQUARE

# 3x3 tokens in regions of 2x2: full, partial and empty slots.
PROCESSOR = Processor(VisualLayout(6, 2, (2, 2), 2), build_tokenizer(), FAMILIES, SQUARE.views)
SIDE, GRID, TOKENS = 6, 3, 9
# Fields that name something in the row, and so move when a row is shared.
MOVED = {"visual_src", "visual_view", "text_view", "target_view", "region_segment", "text_segment"}


def make(number, images, family="read"):
    """A sample with ``images`` images of noise, each asked about, and a text that its number decides."""
    rng = np.random.default_rng(number)
    pixels = tuple(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(images))
    parts = [Text("Read. " * number)]
    for index in range(images):
        box = Box(0, 1, (float(index), 0.0, 3.0, 2.0), image=index)
        parts += [Image(index), Text("Where?"), Text(f"{number}{END}", supervised=True, boxes=(box,))]
    return process(PROCESSOR, Sample(number, pixels, tuple(parts), family))


def pixels_of(arrays):
    """What each visual slot shows: the mean colours of its patch, looked up as the decoder does."""
    images = arrays["images"]
    patches = images.reshape(len(images), GRID, 2, GRID, 2, 3).mean(axis=(2, 4)).reshape(-1, 3)
    src = arrays["visual_src"]
    if not src.size:
        return np.zeros((*src.shape, 3))
    return np.where((src >= 0)[..., None], patches[src], 0)


def segment(row, number):
    """One segment cut out of a row."""
    regions, text = row["region_segment"] == number, row["text_segment"] == number
    masks = {"regions": regions, "text": text}
    return {
        name: row[name][masks[axis]] for name, (axis, _) in PADDING.items() if axis in masks and name in row
    }


def check(row, samples):
    for number, arrays in enumerate(samples):
        part = segment(row, number)
        first = sum(len(other["images"]) for other in samples[:number])
        for name, values in part.items():
            if name not in MOVED:
                np.testing.assert_array_equal(values, arrays[name], err_msg=name)
        for name in ("visual_view", "text_view", "target_view"):
            moved = np.where(arrays[name] >= 0, arrays[name] + first, -1)
            np.testing.assert_array_equal(part[name], moved, err_msg=name)
        np.testing.assert_array_equal(row["images"][first : first + len(arrays["images"])], arrays["images"])
        np.testing.assert_array_equal(pixels_of(row)[row["region_segment"] == number], pixels_of(arrays))
    for name in PADDING.keys() & samples[0].keys():
        assert len(row[name]) == sum(len(arrays[name]) for arrays in samples), name
        assert row[name].dtype == samples[0][name].dtype, name


@pytest.mark.parametrize("images", [(1, 1), (2, 1), (1, 2), (0, 1), (1, 0), (0, 0), (2, 0, 3)])
def test_a_pack_holds_every_sample_shifted(images):
    samples = [make(number, count) for number, count in enumerate(images, start=1)]
    check(pack(samples), samples)


def test_segments_share_nothing():
    samples = [make(number, images) for number, images in ((1, 2), (2, 1), (3, 1))]
    row = pack(samples)
    parts = [segment(row, number) for number in range(3)]
    for name in ("visual_src", "visual_view", "text_view", "target_view"):
        names = [set(part[name].ravel().tolist()) - {-1} for part in parts]
        assert all(names)
        assert len(set.union(*names)) == sum(map(len, names)), name
    for part in parts:
        assert set(part["text_view"].ravel()) == {-1, *part["visual_view"].ravel()}
        assert set(part["target_view"].ravel()) == {-1, *part["visual_view"].ravel()}
        both = [*part["visual_order"][part["visual_src"] >= 0], *part["text_order"]]
        assert sorted(both) == list(range(len(both))), "order restarts at 0 in every segment"
        # The last token of a segment must not be trained to predict the next sample's first.
        assert part["targets"][np.argmax(part["text_order"])] == IGNORE


def test_a_pack_of_one_is_the_sample():
    arrays = make(1, 2)
    row = pack([arrays])
    assert row.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(row[name], values, err_msg=name)


def test_a_row_is_named_by_its_first_sample_and_by_the_family_they_share():
    one, two, other = make(5, 1), make(4, 1), make(3, 1, "where")
    assert pack([one, two])["sample_id"] == 5
    assert FAMILIES[pack([one, two])["family"]] == "read"
    assert pack([one, two, other])["family"] == MIXED
    assert MIXED not in range(len(FAMILIES))


def test_packing_changes_nothing_in_the_samples():
    samples = [make(1, 1), make(2, 1)]
    before = [{name: values.copy() for name, values in arrays.items()} for arrays in samples]
    pack(samples)
    for arrays, kept in zip(samples, before, strict=True):
        for name, values in kept.items():
            np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def test_a_packed_row_can_be_padded():
    samples = [make(1, 1), make(2, 2)]
    row = pack(samples)
    padded = pad_to(row, regions=20, text=60, images=4)
    check({name: padded[name][: len(row[name])] for name in PADDING.keys() & row.keys()}, samples)
    assert (padded["region_segment"][len(row["region_segment"]) :] == -1).all()
    assert (padded["text_segment"][len(row["text_segment"]) :] == -1).all()


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("axis", ["regions", "text"])
def test_padded_samples_are_refused_by_their_position(axis, position):
    samples = [make(1, 1), make(2, 1)]
    arrays = samples[position]
    sizes = {"regions": len(arrays["visual_src"]), "text": len(arrays["tokens"]), "images": 1}
    samples[position] = pad_to(arrays, **{**sizes, axis: sizes[axis] + 1})
    with pytest.raises(ValueError, match=f"Sample {position} of the pack is padded or packed already"):
        pack(samples)


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match="Sample 1 of the pack is padded or packed already"):
        pack([make(1, 1), pack([make(2, 1), make(3, 1)])])


def test_nothing_cannot_be_packed():
    with pytest.raises(ValueError, match="Nothing to pack"):
        pack([])


def test_a_sample_padded_only_in_its_views_is_refused():
    one = make(1, 1)
    padded = pad_to(one, regions=len(one["visual_src"]), text=len(one["tokens"]), images=2)
    with pytest.raises(ValueError, match="padded"):
        pack([padded, make(2, 1)])


# Tiles, pooling and routed newlines: tokens that are sums of several tower tokens of several images.
VIEWS = ViewConfig("cambrian_s", canvases=((6, 6), (6, 12)), image_side=2, frame_side=2)
POOLED = Processor(
    VisualLayout(6, 2, (2, 2), 1, views=VIEWS, newlines="region"),
    build_tokenizer(),
    FAMILIES,
    CAMBRIAN_S.views,
    True,
)


def make_pooled(number, images):
    """As :func:`make`, with images of a shape that takes two tiles and, if ``images`` is 0, a video."""
    rng = np.random.default_rng(number)
    pixels = tuple(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8) for _ in range(images))
    video = rng.integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    parts = [
        Text("Read. " * number),
        *map(Image, range(images)),
        *([] if images else [Video(0)]),
        Text("Where?"),
    ]
    return process(POOLED, Sample(number, pixels, tuple(parts), "read", (video,)))


def pooled_pixels(arrays):
    """What each visual slot shows, newlines as -7: mean colours of patches, mixed as the decoder does."""
    images = arrays["images"]
    patches = images.reshape(len(images), GRID, 2, GRID, 2, 3).mean(axis=(2, 4)).reshape(-1, 3)
    pool_indices, pool_weights = arrays["pool_indices"], arrays["pool_weights"]
    mixed = (patches[np.maximum(pool_indices, 0)] * pool_weights[..., None]).sum(axis=-2)
    return np.where((pool_indices[..., 0] == NEWLINE)[..., None], -7, mixed)


def test_a_pack_of_pooled_samples_shows_what_each_shows():
    """Pool indices move with their images, newlines stay, and regions of all sizes share P."""
    samples = [make_pooled(1, 1), make_pooled(2, 0), make_pooled(3, 2)]
    assert len({len(arrays["images"]) for arrays in samples}) == 2
    row = pack(samples, image_tokens=TOKENS)
    for number, arrays in enumerate(samples):
        mine = row["region_segment"] == number
        valid = arrays["visual_src"] >= 0
        shown = pooled_pixels(row)[mine][:, : valid.shape[1]]
        np.testing.assert_allclose(shown[valid], pooled_pixels(arrays)[valid], atol=1e-6)
        assert (row["visual_src"][mine][:, valid.shape[1] :] == -1).all()
        assert (pooled_pixels(arrays)[valid] == -7).any()
    assert len(np.unique(row["visual_src"][row["visual_src"] >= 0])) == (row["visual_src"] >= 0).sum()
    assert row["visual_view"].max() + 1 == sum(arrays["visual_view"].max() + 1 for arrays in samples)
    padded = pad_to(row, regions=40, text=60, images=12, slots=9)
    assert padded["pool_indices"].shape == padded["pool_weights"].shape == (40, 9, 4)
    assert (padded["pool_weights"][padded["visual_src"] < 0] == 0).all()


def test_pooled_samples_are_packed_by_the_tokens_of_an_image():
    """Which they do not know themselves."""
    with pytest.raises(ValueError, match=r"give layout\.tokens"):
        pack([make_pooled(1, 1), make_pooled(2, 1)])
