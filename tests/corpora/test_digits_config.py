"""How long samples of digit scenes can be, and which configs of them there can be."""

import pytest

from gaze_jax.corpora.digits import DigitsConfig, make_sample, sequence_lengths
from gaze_jax.corpora.phrases import FAMILIES, PLACE, QUESTIONS, build_tokenizer
from gaze_jax.data.tokenizer import END


def texts(sample):
    return sample.parts[1:]


def sizes(config, count):
    """Text tokens of each of ``count`` training samples."""
    encode = build_tokenizer().encode
    samples = (make_sample(config, 0, "train", index) for index in range(count))
    return [sum(len(encode(text.text)[0]) for text in texts(sample)) for sample in samples]


@pytest.mark.parametrize(
    "families", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 1, 1)], ids=lambda weights: str(weights)
)
@pytest.mark.parametrize("reads", [1, 2])
def test_the_length_of_a_sample_is_an_upper_bound_that_is_reached(families, reads):
    config = DigitsConfig(augment=False, families=families, reads_per_sample=reads)
    longest = sequence_lengths(config, build_tokenizer()).sample
    assert max(sizes(config, 250)) == longest


@pytest.mark.parametrize("families", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_the_length_of_a_sample_bounds_numbers_of_two_figures(families):
    config = DigitsConfig(rows=12, cols=12, cell=8, jitter=0, augment=False, families=families)
    assert max(sizes(config, 20)) <= sequence_lengths(config, build_tokenizer()).sample


@pytest.mark.parametrize("side", [4, 9, 10])
@pytest.mark.parametrize("asked", [("transcribe",), ("read",), ("where",), FAMILIES])
def test_the_lengths_of_question_and_answer_are_those_of_the_longest_there_can_be(side, asked):
    config = DigitsConfig(
        rows=side,
        cols=side,
        cell=8,
        jitter=0,
        augment=False,
        families=tuple(float(family in asked) for family in FAMILIES),
    )
    encode = build_tokenizer().encode
    # Every figure is one token, so the last row and column are no shorter than any other.
    values = {"row": side, "column": side, "digit": 7}
    questions = [len(encode(q.format(**values) + "\n")[0]) for family in asked for q in QUESTIONS[family]]
    answers = {
        "transcribe": texts(make_sample(config, 0, "test", 0, "transcribe"))[1].text,
        "read": f"7{END}",
        "where": PLACE.format(**values) + END,
    }
    lengths = sequence_lengths(config, build_tokenizer())
    assert lengths.question == max(questions)
    assert lengths.answer == max(len(encode(answers[family])[0]) for family in asked)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rows": 0, "cols": 0}, "rows and cols"),
        ({"rows": 3, "cols": 4}, "rows and cols"),
        ({"cell": 7}, "cell"),
        ({"jitter": -1}, "jitter"),
        ({"cell": 10, "jitter": 2}, "jitter"),
        ({"cell": 20, "jitter": 3}, "jitter"),
        ({"background": "Photo"}, "background"),
        ({"families": (1.0, -0.5, 0.0)}, "families"),
        ({"families": (0.0, 0.0, 0.0)}, "families"),
        ({"families": (float("nan"), 1.0, 1.0)}, "families"),
        ({"reads_per_sample": 0}, "reads_per_sample"),
        ({"rows": 2, "cols": 2, "reads_per_sample": 5}, "reads_per_sample"),
        ({"train_scenes": 0}, "train_scenes"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"test_fraction": 1.0}, "test_fraction"),
    ],
)
def test_a_config_that_cannot_be_drawn_is_refused_by_its_field(change, name):
    with pytest.raises(ValueError, match=rf"^data\.{name} of .* must be ") as error:
        DigitsConfig(**change)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1, "cols": 1, "reads_per_sample": 1},
        {"cell": 8, "jitter": 0},
        {"cell": 20, "jitter": 2},
        {"families": (0, 0, 5)},
        {"reads_per_sample": 16},
        {"train_scenes": 1},
    ],
)
def test_the_extremes_of_a_config_are_drawn(change):
    config = DigitsConfig(**{"augment": False, **change})
    sample = make_sample(config, 0, "train", 0)
    assert sample.images[0].shape == (config.image_size, config.image_size, 3)
    assert config.image_size == config.rows * config.cell


@pytest.mark.parametrize("families", [(), (1.0,), (1.0, 1.0, 1.0, 1.0), (1.0, float("inf"), 0.0)])
def test_families_are_three_finite_weights(families):
    with pytest.raises(ValueError, match=r"^data\.families of "):
        DigitsConfig(families=families)
