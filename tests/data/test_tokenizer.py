import json
import os
import pickle
import re
import string
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from gaze_jax.corpora.phrases import FAMILIES, PLACE, QUESTIONS, SPECIALS, build_tokenizer
from gaze_jax.data.tokenizer import END, Tokenizer

# Two-figure numbers too: a grid may have ten rows.
NUMBERS = (1, 9, 10)


def phrases():
    """Every question with its line end, and an answer of every family."""
    values = [{"row": r, "column": c, "digit": c % 10} for r in NUMBERS for c in NUMBERS]
    texts = {q.format(**v) + "\n" for family in FAMILIES for q in QUESTIONS[family] for v in values}
    texts |= {PLACE.format(**v) + END for v in values}
    texts |= {f"{d}{END}" for d in range(10)}
    texts.add("\n".join(f"{r}:" + "".join(f" {d}" for d in range(10)) for r in range(1, 13)) + END)
    return sorted(texts)


def backend(model, specials=(END,), splitter=None):
    """JSON of a tokenizer around another model than this project's."""
    made = tokenizers.Tokenizer(model)
    if splitter is not None:
        made.pre_tokenizer = splitter
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in specials])
    return made.to_str()


def letters(*, unknown=None):
    """A BPE model that knows a and b; without ``unknown`` it drops everything else without a word."""
    vocabulary = {"a": 0, "b": 1} | ({unknown: 2} if unknown else {})
    return tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=unknown)


@pytest.mark.parametrize("text", phrases())
def test_every_phrase_decodes_to_itself_and_each_digit_and_word_is_one_token(text):
    tokenizer = build_tokenizer()
    ids, offsets = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # A special token, a digit or a word with the space before it, or one other character.
    pieces = re.findall(r"<\|\w+\|>| ?\d| ?[A-Za-z]+|.", text, re.DOTALL)
    assert [text[start:end] for start, end in offsets] == pieces
    assert len(ids) == len(pieces)


@hypothesis.settings(max_examples=100)
@hypothesis.given(
    st.lists(st.sampled_from([*SPECIALS, "Which", " row", *string.printable[:95], "\n"])).map("".join)
)
def test_printable_text_decodes_to_itself_and_its_tokens_cover_it(text):
    tokenizer = build_tokenizer()
    ids, offsets = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(text[start:end] for start, end in offsets) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    for i, (start, end) in zip(ids, offsets, strict=True):
        assert tokenizer.decode([i]) == text[start:end]


def test_special_tokens_are_one_token_each_and_nothing_is_added():
    tokenizer = build_tokenizer()
    assert SPECIALS == ("<|pad|>", "<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("".join(SPECIALS))[0] == [0, 1, tokenizer.end_id] == [0, 1, 2]
    row = tokenizer.encode("row")[0]
    assert tokenizer.encode(f"row{END}")[0] == [*row, tokenizer.end_id]
    assert tokenizer.decode([*row, tokenizer.end_id]) == f"row{END}"
    assert tokenizer.decode([*row, tokenizer.end_id], skip_special=True) == "row"


def test_the_vocabulary_is_small_and_its_size_is_that_of_the_table_it_needs():
    tokenizer = build_tokenizer()
    pieces = json.loads(tokenizer.json)["model"]["vocab"]
    assert len(pieces) == tokenizer.vocab_size < 256
    # Added tokens may lie beyond the model's own, and a vocabulary may have holes.
    holes = Tokenizer(backend(tokenizers.models.WordLevel({"a": 0, "b": 90}, unk_token="b")))
    assert holes.vocab_size == 1 + max(90, holes.end_id)


@pytest.mark.parametrize("text", ["é", "row é", "é row", "日", "a\tb", "a\u00a0b", "row\r\n", f"😀{END}"])
def test_a_character_without_a_token_raises_and_shows_the_text(text):
    with pytest.raises(ValueError, match="no token") as error:
        build_tokenizer().encode(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["abc", "cab", "acb", "c", f"ac{END}", f"a{END}c"])
def test_a_tokenizer_that_drops_characters_silently_raises_too(text):
    tokenizer = Tokenizer(backend(letters()))
    assert tokenizer.decode(tokenizer.encode("ab")[0]).replace(" ", "") == "ab"
    with pytest.raises(ValueError, match="no token") as error:
        tokenizer.encode(text)
    assert repr(text) in str(error.value)


def test_whitespace_that_a_tokenizer_leaves_out_is_no_loss():
    tokenizer = Tokenizer(backend(letters(), splitter=tokenizers.pre_tokenizers.WhitespaceSplit()))
    ids, offsets = tokenizer.encode(" a\n b ")
    assert (len(ids), offsets) == (2, [(1, 2), (4, 5)])
    with pytest.raises(ValueError, match="no token"):
        tokenizer.encode(" a c b ")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', "not JSON"])
def test_malformed_json_raises_one_sentence(text):
    with pytest.raises(ValueError, match=r"Tokenizer JSON cannot be read .* give a whole tokenizer\.json"):
        Tokenizer(text)


def test_a_tokenizer_without_the_end_token_is_refused_by_the_tokens_name():
    with pytest.raises(ValueError, match=r"no special token <\|im_end\|>, which ends an answer"):
        Tokenizer(backend(letters(), specials=["<|pad|>", "<|im_start|>"]))


def test_a_tokenizer_needs_no_special_token_but_the_end():
    """Qwen's has no <|pad|>, and padding is no token here."""
    tokenizer = Tokenizer(backend(letters()))
    assert tokenizer.encode(f"ab{END}")[0] == [0, 1, tokenizer.end_id]


def test_a_saved_tokenizer_loads_as_the_same(tmp_path):
    file = tmp_path / "tokenizer.json"
    unusual = Tokenizer(backend(letters(unknown="ünk")))
    for tokenizer in (build_tokenizer(), unusual):
        tokenizer.save(file)
        loaded = Tokenizer.load(file)
        assert loaded == tokenizer
        assert loaded.digest == tokenizer.digest
    assert unusual.digest != build_tokenizer().digest


def test_a_file_that_is_missing_or_not_text_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8"):
        Tokenizer.load(tmp_path / "latin.json")


def test_a_tokenizer_survives_the_way_to_a_worker_process():
    tokenizer = build_tokenizer()
    received = pickle.loads(pickle.dumps(tokenizer))
    assert received == tokenizer
    assert received.encode("row 1") == tokenizer.encode("row 1")


def test_the_vocabulary_does_not_depend_on_the_hash_seed_of_the_process():
    command = "from gaze_jax.corpora.phrases import build_tokenizer; print(build_tokenizer().digest)"
    # Two seeds, because the one of this process may be either.
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        found = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == build_tokenizer().digest
