"""Measuring a corpus: once, in any number of processes, and again for what could not be measured."""

import json

import numpy as np
import pytest

from gaze_jax.corpora import measure
from gaze_jax.corpora.measure import forget, measure_corpus
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.data.tokenizer import Tokenizer
from tests.helpers.corpora import captioned, conversations, turns, write_lines, write_picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def corpus_of(folder, count=6, missing=()):
    records = [captioned(f"{number}.png", f"n{number}") for number in range(count)]
    for number in set(range(count)) - set(missing):
        write_picture(folder / f"{number}.png", 10 + number, 20, number)
    return open_corpus(write_lines(folder, records))


def counted(monkeypatch):
    """How many records are measured from now on."""
    done, measured = [], measure._measured
    monkeypatch.setattr(measure, "_measured", lambda *args: done.append(args[-1]) or measured(*args))
    return done


def test_a_record_is_measured_once(tmp_path, monkeypatch):
    corpus, done = corpus_of(tmp_path), counted(monkeypatch)
    first = measure_corpus(corpus, conversations())
    assert done == [*range(6)] and not first.failures
    again = measure_corpus(corpus_of(tmp_path), conversations())
    assert len(done) == 6
    np.testing.assert_array_equal(first.numbers, again.numbers)
    text, regions, images, slots, visual, targets, left_out = first.numbers[0]
    assert (regions, images, visual, left_out) == (6, 1, 36, 0)
    assert slots == 6 and text == first.tokens[0] - 36 and 0 < targets < text


def test_what_decides_the_lengths_decides_the_cache(tmp_path, monkeypatch):
    corpus, done = corpus_of(tmp_path), counted(monkeypatch)
    measure_corpus(corpus, conversations())
    other = conversations()
    spaced = Tokenizer(json.dumps(json.loads(other.tokenizer.json), indent=1))
    for changed in ({"system": "Be brief."}, {"tokenizer": spaced}, {"truncate_to": 99}):
        before = len(done)
        measure_corpus(corpus, conversations().__class__(**(other.__getstate__() | changed)))
        assert len(done) == before + 6
    lines = (tmp_path / "all.jsonl").read_text()
    (tmp_path / "all.jsonl").write_text(lines.replace("What", "Whet"))
    measure_corpus(open_corpus(tmp_path / "all.jsonl"), other)
    assert len(done) == before + 12


def test_what_failed_is_measured_again(tmp_path, monkeypatch):
    corpus, done = corpus_of(tmp_path, missing=(2, 4)), counted(monkeypatch)
    found = measure_corpus(corpus, conversations())
    assert {number: error.cause for number, error in found.failures.items()} == {2: "missing", 4: "missing"}
    assert (found.numbers[[2, 4]] == 0).all()
    write_picture(tmp_path / "4.png")
    del done[:]
    found = measure_corpus(corpus, conversations())
    assert done == [2, 4] and list(found.failures) == [2] and found.tokens[4] > 0
    forget(corpus, conversations())
    del done[:]
    measure_corpus(corpus, conversations())
    assert done == [*range(6)]


def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK", 2)
    corpus = corpus_of(tmp_path, missing=(3,))
    one = measure_corpus(corpus, conversations())
    forget(corpus, conversations())
    seen = []
    two = measure_corpus(corpus, conversations(), workers=2, advance=seen.append)
    np.testing.assert_array_equal(one.numbers, two.numbers)
    assert list(two.failures) == [3] and str(two.failures[3]) == str(one.failures[3])
    assert two.failures[3].cause == "missing" and sum(seen) == 6


def test_every_cause_has_its_name(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    good = captioned("a.png", "x")
    records = [
        good,
        good | {"conversations": []},
        captioned("b.png", "x"),
        captioned("text.png", "x"),
        good | {"conversations": turns("<image> What?")},
    ]
    found = measure_corpus(open_corpus(write_lines(tmp_path, records)), conversations())
    causes = {number: error.cause for number, error in found.failures.items()}
    assert causes == {1: "record", 2: "missing", 3: "medium", 4: "conversation"}
    for number, error in found.failures.items():
        assert f"line {number + 1}" in str(error)
