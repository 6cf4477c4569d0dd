"""Text as it comes: whole characters, ends, stop strings."""

import pytest

from gaze_jax.errors import UserError
from gaze_jax.infer.detokenizer import Detokenizer
from tests.helpers.chat import TOKENIZER

END = frozenset({TOKENIZER.end_id})


def detokenized(text, stop=(), limit=100):
    detokenizer = Detokenizer(TOKENIZER, END, stop, limit)
    shown = []
    for token in TOKENIZER.encode(text)[0]:
        shown.append(detokenizer.add(token))
        if detokenizer.finish_reason is not None:
            break
    return detokenizer, shown


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    """Bytes that are no character yet are held back; at the limit they are shown as broken."""
    detokenizer, shown = detokenized("öaö", limit=4)
    assert shown == ["", "ö", "a", "\ufffd"] and detokenizer.finish_reason == "length"
    detokenizer, shown = detokenized("öaö")
    assert "".join(shown) == detokenizer.text == "öaö" and detokenizer.finish_reason is None


def test_the_end_token_is_a_piece_and_no_text():
    """It is the last piece."""
    detokenizer, shown = detokenized("A cat.<|im_end|>")
    assert detokenizer.text == "".join(shown) == "A cat." and (
        detokenizer.finish_reason,
        detokenizer.stop_reason,
    ) == ("stop", detokenizer.pieces[-1])
    assert detokenizer.pieces[-1] == "<|im_end|>" and "".join(detokenizer.pieces) == "A cat.<|im_end|>"


@pytest.mark.parametrize("text", ["one, two END three", "one, two EN", "one, two E", "END"])
def test_nothing_of_a_stop_string_is_ever_shown(text):
    """What may be its beginning is held back until it is not."""
    detokenizer, shown = detokenized(text, stop=("END", "!"))
    if "END" in text:
        assert (
            detokenizer.finish_reason == "stop"
            and "".join(shown) == detokenizer.text == text[: text.index("END")]
        )
    else:
        assert detokenizer.finish_reason is None and text.startswith("".join(shown))
        assert len(text) - len("".join(shown)) == len(text) - len(text.rstrip("EN"))


def test_the_first_stop_string_counts():
    """Also when a longer one begins before it in the text."""
    assert detokenized("a b c d", stop=("d", "b"))[0].text == "a "


@pytest.mark.parametrize(
    ("sentence", "stop", "limit"),
    [
        ("A stop string is empty", ("",), 1),
        ("stop='END' must be a list of strings", "END", 1),
        ("max_tokens=0 must be at least 1", (), 0),
    ],
)
def test_limits_that_no_answer_can_have_are_refused(sentence, stop, limit):
    """A string is no list of its letters."""
    with pytest.raises(UserError, match=sentence):
        Detokenizer(TOKENIZER, END, stop, limit)


def test_held_back_text_comes_at_the_end():
    """An answer that is cut contains all that was generated."""
    detokenizer, shown = detokenized("two E", stop=("END",), limit=len(TOKENIZER.encode("two E")[0]))
    assert detokenizer.finish_reason == "length" and "".join(shown) == "two E"
