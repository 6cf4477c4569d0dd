"""Scenes of digits: what is drawn, what is said about it, and that both follow the seed."""

import dataclasses
import functools
import re

import numpy as np
import pytest

from gaze_jax.corpora import backgrounds, bundled, digits, glyphs
from gaze_jax.corpora.digits import (
    DigitScenes,
    DigitsConfig,
    evaluation_samples,
    make_sample,
)
from gaze_jax.corpora.phrases import FAMILIES, PLACE, QUESTIONS
from gaze_jax.data.tokenizer import END

# Digits at their original size, in larger cells: drawn pixels can be compared with the originals.
PLAIN = DigitsConfig(augment=False)
# Hardly any training digits, so that all of them are distorted in no time.
FEW = DigitsConfig(test_fraction=0.97)
LARGE = DigitsConfig(rows=3, cols=3, cell=20, jitter=2, test_fraction=0.97)
WIDE = DigitsConfig(rows=10, cols=10, cell=8, jitter=0, augment=False)


def fingerprint(sample):
    return sample.id, sample.family, sample.parts, sample.images[0].shape, sample.images[0].tobytes()


def texts(sample):
    return sample.parts[1:]


@pytest.fixture
def in_the_dark(monkeypatch):
    """Black backgrounds, so that every pixel that is not black is ink."""

    def black(rng, kind, seed, height, width):
        return np.zeros((height, width, 3), np.float32)

    monkeypatch.setattr(digits, "cut", black)


def cells(sample, config):
    """Brightness [rows, cols, cell, cell] of the cells of a scene."""
    grey = sample.images[0].astype(np.float64).sum(-1)
    return grey.reshape(config.rows, config.cell, config.cols, config.cell).swapaxes(1, 2)


@functools.cache
def originals():
    """PlacedView vectors [1797, 64] of scikit-learn's images, and their labels."""
    from sklearn.datasets import load_digits  # takes seconds to import

    data = load_digits()
    flat = data.images.reshape(len(data.images), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True), data.target


def recognise(sample, config):
    """Which original is in each cell, int [rows, cols]; undistorted digits of 8 pixels on black only."""
    known, _ = originals()
    windows = np.lib.stride_tricks.sliding_window_view(cells(sample, config), (8, 8), axis=(2, 3))
    flat = windows.reshape(config.rows, config.cols, -1, 64)
    alike = (flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1)) @ known.T
    best = alike.max(axis=2)
    assert best.max(axis=-1).min() > 0.999, "every digit is drawn as it is"
    return best.argmax(axis=-1)


def answer_boxes(sample):
    """(text that the box speaks of, corners) of every box, answer by answer."""
    return [
        [(text.text[box.start : box.end], box.corners) for box in text.boxes]
        for text in texts(sample)
        if text.supervised
    ]


def check_box(sample, config, row, column, corners):
    """The box holds the ink of the cell, is as small as it can be and stays in the cell."""
    x0, y0, x1, y1 = corners
    assert all(value == int(value) for value in corners)
    x0, y0, x1, y1 = int(x0), int(y0), int(x1), int(y1)
    left, top = column * config.cell, row * config.cell
    assert left <= x0 < x1 <= left + config.cell
    assert top <= y0 < y1 <= top + config.cell
    ink = cells(sample, config)[row, column]
    ink = ink / ink.max()
    inside = np.zeros(ink.shape, bool)
    inside[y0 - top : y1 - top, x0 - left : x1 - left] = True
    # Ink counts from a quarter of full opacity; the brightest pixel is somewhat below or at it.
    assert not (ink[~inside] > 0.45).any()
    boxed = ink[y0 - top : y1 - top, x0 - left : x1 - left]
    for edge in (boxed[0], boxed[-1], boxed[:, 0], boxed[:, -1]):
        assert edge.max() > 0.2


def place_of(text):
    row, column = map(int, re.search(r"row (\d+), column (\d+)", text).groups())
    return row - 1, column - 1


def check_transcript(sample, grid, config):
    _, answer = texts(sample)
    rows = ["".join([f"{r + 1}:", *(f" {d}" for d in row)]) for r, row in enumerate(grid)]
    assert answer.text == "\n".join(rows) + END
    (boxes,) = answer_boxes(sample)
    assert [spoken for spoken, _ in boxes] == [f" {d}" for d in grid.ravel()]
    for cell, (_, corners) in enumerate(boxes):
        check_box(sample, config, *divmod(cell, config.cols), corners)


def check_reads(sample, grid, config):
    asked, replies = texts(sample)[::2], texts(sample)[1::2]
    places = [place_of(question.text) for question in asked]
    assert len(set(places)) == len(places), "no cell is asked for twice"
    for place, reply, boxes in zip(places, replies, answer_boxes(sample), strict=True):
        assert reply.text == f"{grid[place]}{END}"
        ((spoken, corners),) = boxes
        assert spoken == str(grid[place])
        check_box(sample, config, *place, corners)


def check_where(sample, grid, config):
    question, answer = texts(sample)
    (digit,) = map(int, re.findall(r"\d", question.text))
    row, column = place_of(answer.text)
    assert answer.text == PLACE.format(row=row + 1, column=column + 1) + END
    assert np.argwhere(grid == digit).tolist() == [[row, column]], "the digit occurs exactly once"
    (boxes,) = answer_boxes(sample)
    assert [spoken for spoken, _ in boxes] == [f" {row + 1}", f" {column + 1}"]
    for _, corners in boxes:
        check_box(sample, config, row, column, corners)


CHECKS = {"transcribe": check_transcript, "read": check_reads, "where": check_where}


@pytest.mark.parametrize("config", [PLAIN, WIDE], ids=["4x4", "10x10"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_the_dark")
def test_answers_name_what_is_drawn_and_boxes_hold_its_ink(family, split, config):
    for index in range(8):
        sample = make_sample(config, 0, split, index, family)
        grid = originals()[1][recognise(sample, config)]
        assert sample.family == family
        assert [text.supervised for text in texts(sample)] == [False, True]
        CHECKS[family](sample, grid, config)


@pytest.mark.usefixtures("in_the_dark")
def test_training_asks_several_reads_about_one_scene():
    config = DigitsConfig(augment=False, families=(0, 1, 0), reads_per_sample=5)
    for index in range(8):
        sample = make_sample(config, 0, "train", index)
        assert [text.supervised for text in texts(sample)] == [False, True] * 5
        check_reads(sample, originals()[1][recognise(sample, config)], config)
    every = DigitsConfig(augment=False, families=(0, 1, 0), reads_per_sample=16)
    places = [place_of(question.text) for question in texts(make_sample(every, 0, "train", 0))[::2]]
    assert sorted(places) == list(np.ndindex(4, 4))


@pytest.mark.parametrize("config", [FEW, LARGE], ids=["8 pixels", "16 pixels"])
@pytest.mark.usefixtures("in_the_dark")
def test_boxes_hold_the_ink_of_distorted_and_enlarged_digits(config):
    for index in range(20):
        sample = make_sample(config, 0, "train", index, "transcribe")
        (boxes,) = answer_boxes(sample)
        for cell, (_, corners) in enumerate(boxes):
            check_box(sample, config, *divmod(cell, config.cols), corners)


@pytest.mark.usefixtures("in_the_dark")
def test_digits_move_in_their_cells_by_the_jitter():
    def corner(config, index):
        """Where the square of 8 pixels of the first digit starts."""
        sample = make_sample(config, 0, "test", index)
        known, _ = originals()
        square = known[recognise(sample, config)[0, 0]].reshape(8, 8)
        windows = np.lib.stride_tricks.sliding_window_view(cells(sample, config)[0, 0], (8, 8))
        alike = np.einsum("yxab,ab->yx", windows, square) / np.linalg.norm(windows, axis=(2, 3))
        return np.unravel_index(alike.argmax(), alike.shape)

    config = DigitsConfig(rows=2, cols=2, cell=12, jitter=1)
    assert {corner(config, index) for index in range(100)} == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


@pytest.mark.parametrize("background", backgrounds.KINDS)
def test_every_digit_is_clearly_lighter_than_what_is_behind_it(background, monkeypatch):
    config = DigitsConfig(background=background)
    pool = glyphs.glyphs("test", config.test_fraction, config.glyph, False)
    invisible = dataclasses.replace(pool, alpha=np.zeros_like(pool.alpha))
    for index in range(10):
        drawn = make_sample(config, 0, "test", index)
        with monkeypatch.context() as patch:
            patch.setattr(digits, "glyphs", lambda *args: invisible)
            behind = make_sample(config, 0, "test", index)
        assert drawn.parts == behind.parts
        brightest, usual = cells(drawn, config).max(axis=(2, 3)), cells(behind, config).mean(axis=(2, 3))
        # Three channels; half of the contrast that is meant, for cells that are themselves bright and dark.
        assert (brightest - usual > 3 * 45).all()
        assert cells(behind, config).std() > 0, "there is a background"


def made(config, split, indices, seed=0):
    return {(split, index): fingerprint(make_sample(config, seed, split, index)) for index in indices}


@pytest.mark.parametrize("background", backgrounds.KINDS)
def test_a_scene_is_the_same_whatever_was_made_before(background):
    config = DigitsConfig(background=background, test_fraction=0.97)
    first = made(config, "train", range(8)) | made(config, "test", range(8))
    for cache in (backgrounds.texture_pool, backgrounds.photo_pool, glyphs.glyphs):
        cache.cache_clear()
    make_sample(DigitsConfig(rows=2, cols=2, augment=False), 7, "train", 3)
    again = made(config, "test", reversed(range(8))) | made(config, "train", (3, 1, 7, 5, 0, 2, 6, 4))
    assert again == first


def test_another_seed_split_or_index_makes_another_scene():
    samples = [
        make_sample(PLAIN, seed, split, index, "transcribe")
        for seed in (0, 1, 12345)
        for split in ("train", "test")
        for index in (0, 1, 999_999)
    ]
    assert len({sample.images[0].tobytes() for sample in samples}) == len(samples)
    # The digits too, and not only the images they are drawn with: those of the splits differ anyway.
    assert len({texts(sample)[1].text for sample in samples}) == len(samples)


@pytest.mark.usefixtures("in_the_dark")
def test_no_digit_image_is_in_training_and_test_scenes_whatever_the_seed():
    def shown(split, seed):
        return {
            int(number)
            for index in range(25)
            for number in recognise(make_sample(PLAIN, seed, split, index), PLAIN).ravel()
        }

    train, test = shown("train", 0) | shown("train", 1), shown("test", 1) | shown("test", 2)
    # Scenes of 16 digits: the check would mean little if it had met few images.
    assert len(train) > 400 and len(test) > 300
    assert not train & test


def test_what_scikit_learn_ships_is_read_as_it_reads_it():
    """Its files are opened without it."""
    from sklearn.datasets import load_digits, load_sample_images

    data, (images, labels) = load_digits(), bundled.digits()
    np.testing.assert_array_equal(images, data.images, strict=True)
    np.testing.assert_array_equal(labels, data.target, strict=True)
    for name, photo in zip(bundled.PHOTOS, load_sample_images().images, strict=True):
        np.testing.assert_array_equal(bundled.photo(name), photo, strict=True)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.97])
def test_the_split_is_disjoint_whole_and_stratified(fraction):
    _, labels = originals()
    train, test = (glyphs.split_indices(split, fraction) for split in ("train", "test"))
    assert sorted([*train, *test]) == list(range(len(labels)))
    for digit in range(10):
        mine = (labels == digit).sum()
        assert abs((labels[test] == digit).sum() - fraction * mine) <= 1


@pytest.mark.parametrize(("split", "augment"), [("train", True), ("train", False), ("test", False)])
def test_the_pool_knows_which_digit_is_which(split, augment):
    known, labels = originals()
    fraction = 0.03 if split == "test" else 0.97
    pool = glyphs.glyphs(split, fraction, 8, augment)
    assert pool.index.tolist() == glyphs.split_indices(split, fraction).tolist()
    for digit, members in enumerate(pool.of_digit):
        assert (labels[pool.index[members]] == digit).all()
    assert sorted(np.concatenate(pool.of_digit)) == list(range(len(pool.index)))
    # The mean of its distortions is more like its own original than like the other ones of the pool.
    mean = pool.alpha.mean(axis=1).reshape(len(pool.index), -1)
    nearest = (mean @ known[pool.index].T).argmax(axis=1)
    assert (nearest == np.arange(len(nearest))).mean() > 0.9
    assert pool.alpha.min() >= 0 and pool.alpha.max() <= 1


def test_augmentation_distorts_training_digits_only():
    train = glyphs.glyphs("train", 0.97, 8, True)
    assert (np.ptp(train.alpha, axis=1).max(axis=(1, 2)) > 0).all()
    plain = DigitsConfig(test_fraction=0.97, augment=False)
    assert fingerprint(make_sample(FEW, 0, "test", 0)) == fingerprint(make_sample(plain, 0, "test", 0))
    assert fingerprint(make_sample(FEW, 0, "train", 0)) != fingerprint(make_sample(plain, 0, "train", 0))


def test_photographs_are_another_background_for_the_same_digits_and_questions():
    photo = DigitsConfig(background="photo", augment=False)
    for index in range(5):
        on_photo, on_texture = (make_sample(config, 0, "test", index) for config in (photo, PLAIN))
        assert on_photo.images[0].shape == on_texture.images[0].shape
        assert on_photo.images[0].std() > 0
        assert on_photo.images[0].tobytes() != on_texture.images[0].tobytes()
    assert "Flickr" in digits.credit(photo)
    assert "Flickr" not in digits.credit(PLAIN)
    assert "UCI" in digits.credit(photo) and "UCI" in digits.credit(PLAIN)


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [
        *((kind, *size) for kind in backgrounds.KINDS for size in ((8, 8), (40, 24), (24, 40))),
        ("photo", 450, 300),  # larger than a photograph
    ],
)
def test_a_background_has_the_size_that_was_asked_for(kind, height, width):
    crops = [backgrounds.cut(np.random.default_rng(seed), kind, 0, height, width) for seed in (0, 0, 1, 2, 3)]
    assert {crop.shape for crop in crops} == {(height, width, 3)}
    assert all(crop.min() >= 0 and crop.max() <= 255 and crop.std() > 0 for crop in crops)
    np.testing.assert_array_equal(crops[0], crops[1])
    assert len({crop.tobytes() for crop in crops}) == 4


def test_textures_follow_the_seed():
    one, same, other = (
        backgrounds.cut(np.random.default_rng(0), "texture", seed, 9, 9) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_families_are_drawn_by_their_weights():
    config = DigitsConfig(augment=False, families=(3, 1, 0))
    drawn = [make_sample(config, 0, "train", index).family for index in range(400)]
    assert set(drawn) == {"transcribe", "read"}
    # Five standard deviations of 400 draws.
    assert abs(drawn.count("transcribe") / 400 - 3 / 4) < 5 * (3 / 16 / 400) ** 0.5


def test_every_phrasing_is_used():
    asked = {family: set() for family in FAMILIES}
    for family in FAMILIES:
        for sample in evaluation_samples(PLAIN, 0, family, 60):
            asked[family].add(re.sub(r"\d", "#", texts(sample)[0].text.rstrip("\n")))
        assert asked[family] == {q.format(row="#", column="#", digit="#") for q in QUESTIONS[family]}


def test_a_source_is_its_samples_by_index():
    source = DigitScenes(DigitsConfig(augment=False, train_scenes=77), 5, "train")
    assert len(source) == 77
    for index in (0, 76, np.int64(3)):
        sample = source[index]
        assert sample.id == index
        assert fingerprint(sample) == fingerprint(make_sample(source.config, 5, "train", int(index)))


def test_evaluation_samples_are_of_one_family_on_digits_of_their_split():
    for split in ("train", "test"):
        samples = evaluation_samples(FEW, 3, "where", 4, split)
        assert [fingerprint(sample) for sample in samples] == [
            fingerprint(make_sample(FEW, 3, split, index, "where")) for index in range(4)
        ]
    default = evaluation_samples(FEW, 3, "where", 4)
    assert [fingerprint(sample) for sample in default] == [fingerprint(sample) for sample in samples]


def test_few_digits_is_the_share_of_training_scenes_with_three_or_fewer():
    def kinds(split, few):
        config = DigitsConfig(few_digits=few)
        answers = [make_sample(config, 0, split, i, "transcribe").parts[-1].text for i in range(60)]
        return np.array([len(set(re.findall(r" (\d)", answer))) for answer in answers])

    assert (kinds("train", 1.0) <= 3).all()
    assert (kinds("train", 0.0) > 3).all()
    assert 15 < (kinds("train", 0.5) <= 3).sum() < 45
    assert (kinds("test", 1.0) > 3).all()
