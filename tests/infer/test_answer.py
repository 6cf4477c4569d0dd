import numpy as np
import pytest

from gaze_jax.data.phrases import build_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.infer.answer import ask
from tests.helpers.experiments import tiny_experiment
from tests.helpers.models import parameters

MODEL = tiny_experiment().model
IMAGE = np.random.default_rng(0).integers(256, size=(20, 20, 3), dtype=np.uint8)


def answer(image=IMAGE, question="Which digit is in row 1, column 2?", **options):
    options = {"top_k": 1, "max_tokens": 4} | options
    params = parameters(MODEL)["params"]
    return ask(MODEL, params, build_tokenizer(), MODEL.layout, image, question, **options)


def test_the_answer_is_its_pieces_without_the_end():
    found = answer()
    assert 1 <= len(found.pieces) <= 4
    assert "".join(found.pieces).removesuffix("<|im_end|>") == found.text
    assert found.selected.shape == (len(found.pieces), 2, 2, 4)
    assert (found.selected.sum(axis=-1) == 1).all()
    assert found.visual_entries == 4.0


def test_dense_attention_selects_nothing_and_attends_everything():
    found = answer(top_k=None)
    assert found.selected is None
    assert found.visual_entries == 16.0


def test_all_regions_say_what_dense_attention_says():
    assert answer(top_k=4).pieces == answer(top_k=None).pieces


def test_an_image_is_resized_only_when_asked():
    larger = np.kron(IMAGE, np.ones((2, 2, 1), np.uint8))
    with pytest.raises(UserError, match=r"is 40x40 pixels but the tower takes 20x20; resize it"):
        answer(image=larger)
    assert answer(image=larger, resize=True).pieces


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "top_k=0 must be between 1 and 4, the regions of the image"),
        ({"top_k": 5}, "top_k=5 must be between 1 and 4"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 not negative"),
        ({"question": "  "}, "The question is empty"),
        ({"question": "Où est le 7 ?"}, "a character has no token"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        answer(**options)
    assert "\n" not in str(error.value)
