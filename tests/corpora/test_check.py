"""The check of a corpus: every cause is found, named and counted, and what is fine is counted as fine."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from benchmarks.screenshots import browser, open_page
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.corpora import check, check_page
from gaze_jax.corpora.check import Histogram, check_corpus, check_record, histogram, plain, summary_lines
from gaze_jax.corpora.check_page import FILES, report_page, write_report
from gaze_jax.corpora.config import CorpusConfig, RowConfig
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.corpora.records import CAUSES
from gaze_jax.corpora.workers import Failure
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.media.video import Animation
from tests.helpers import corpora
from tests.helpers.browsing import complaints

GOOD = (0, 1, 2, 3)
BAD_FILE = "<img src=x onerror=alert(1)>\u202e.png"
BAD_ID = '"><script>alert(2)</script>\x1b[31m'
LIMIT = CorpusConfig(path="x", max_tokens=600, max_frames=6)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def here(monkeypatch):
    """Checks in this process: starting one takes seconds."""

    def mapped(function, indexes, *, workers, timeout, advance=lambda records: None):
        for index in indexes:
            advance(1)
            yield index, function(index)

    monkeypatch.setattr(check, "map_records", mapped)


def spoilt(folder):
    """Four good records, then one of each cause that data have, and a second of the first one's id."""
    for number in range(3):
        corpora.write_picture(folder / f"{number}.png", 20 + number, 30, number)
    corpora.write_animation(folder / "walk.gif")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:900])
    film = {"id": "film", "video": "walk.gif", "conversations": corpora.turns("<video>\nWhat?", "Noise.")}
    records = [
        corpora.captioned("0.png", "n0"),
        corpora.captioned("1.png", "n1"),
        film,
        {"id": "", "conversations": corpora.turns("Why?", "Because.")},
        {"conversations": [*corpora.turns("What is this?", "Text."), {"from": "nobody", "value": "?"}]},
        corpora.captioned(BAD_FILE, BAD_ID),
        corpora.captioned("cut.png", "cut"),
        {"id": "none", "conversations": corpora.turns("What is this?")},
        corpora.captioned("2.png", "long", "x" * 700),
        corpora.captioned("2.png", "n0"),
    ]
    return open_corpus(corpora.write_lines(folder, records))


EXPECTED = {"record": 4, "missing": 5, "medium": 6, "conversation": 7, "length": 8, "duplicate": 9}


def checked(corpus, config=LIMIT, layout=corpora.SQUARE, **options):
    return check_corpus(corpus, corpora.conversations(layout, config), config, **options)


@pytest.mark.parametrize("layout", corpora.LAYOUTS)
def test_every_cause_is_found_and_named(tmp_path, here, layout):
    corpus, counts = spoilt(tmp_path), []
    report = checked(corpus, layout=corpora.LAYOUTS[layout], advance=counts.append)
    assert {problem.cause: problem.index for problem in report.problems} == EXPECTED
    assert report.causes == dict.fromkeys(EXPECTED, 1)
    assert (report.records, report.usable, report.ok) == (10, len(GOOD) + 1, False)
    assert sum(counts) == 10
    for problem in report.problems:
        line = f"all.jsonl line {problem.index + 1}"
        assert line in problem.message and problem.message.endswith(".")
        # A record that cannot be read has no name but the one in its message.
        assert problem.name == (f"record {problem.index}" if problem.index in (4, 5) else line)
        assert plain(problem.message) == problem.message
    (twice,) = [problem for problem in report.problems if problem.cause == "duplicate"]
    assert "'n0' of all.jsonl line 1;" in twice.message


def test_what_is_fine_is_fine(tmp_path, here):
    path = corpora.write_corpus(tmp_path, 5)
    report = checked(open_corpus(path))
    assert report.ok and report.problems == () and report.causes == {}
    assert report.usable == report.records == 5
    assert report.targets == 5 * len("Noise.x")  # with the end token, one more
    assert summary_lines(report)[0] == "5 of 5 records can be trained on."


def test_nothing_to_train_on_is_not_fine(tmp_path, here):
    (tmp_path / "all.jsonl").write_text(json.dumps(corpora.captioned("gone.png", "a")) + "\n")
    report = checked(open_corpus(str(tmp_path / "all.jsonl")))
    assert not report.ok and report.histograms == {}
    skipped = dataclasses.replace(report, problems=(), skipped=1)
    assert not skipped.ok and "nothing to train on" in report_page(skipped)


def test_numbers_are_those_of_the_arrays(tmp_path, here):
    corpus = spoilt(tmp_path)
    report = checked(corpus)
    conversations = corpora.conversations(config=LIMIT)
    arrays = [conversations.arrays(corpus[index], index) for index in (*GOOD, 8, 9)]
    text = [len(one["tokens"]) for one in arrays]
    visual = [int((one["visual_src"] >= 0).sum()) for one in arrays]
    expected = {
        "text": text,
        "visual": visual,
        "tokens": np.add(text, visual),
        "targets": [int((one["targets"] >= 0).sum()) for one in arrays],
        "regions": [len(one["region_segment"]) for one in arrays],
        "images": [len(one["images"]) for one in arrays],
        "frames": [6],  # of 4: max_frames repeats them
        "width": [30] * 4,
        "height": [20, 21, 22, 22],
        "megapixels": [0.0006, 0.00063, 0.00066, 0.00066],
    }
    assert list(report.histograms) == list(check.QUANTITIES)
    for name, values in expected.items():
        found = report.histograms[name]
        assert (found.smallest, found.largest) == (min(values), max(values)), name
        assert sum(found.counts) == len(values) and found.mean == pytest.approx(np.mean(values)), name
    usable = [one for index, one in zip((*GOOD, 8, 9), arrays) if index != 8]
    assert report.targets == sum(int((one["targets"] >= 0).sum()) for one in usable)


def test_too_long_as_the_settings_tell(tmp_path, here):
    corpora.write_picture(tmp_path / "0.png")
    turns = corpora.turns("<image>\nOne?", "1.", "Two?", "2" * 300, "Three?", "3.")
    records = [
        {"id": "a", "image": "0.png", "conversations": turns},
        {"id": "b", "conversations": corpora.turns("One?", "1" * 700)},
        {"id": "c", "conversations": corpora.turns("One?", "1.")},
    ]
    corpus = open_corpus(corpora.write_lines(tmp_path, records))

    def found(**settings):
        return checked(corpus, CorpusConfig(path="x", **settings))

    every = found()
    assert every.ok and every.usable == 3 and check.left_out_line(every) == ""
    error = found(max_tokens=300)
    assert error.causes == {"length": 2} and error.usable == 1 and not error.ok
    assert "more than data.max_tokens=300; raise it" in error.problems[0].message
    skip = found(max_tokens=300, too_long="skip")
    assert skip.ok and (skip.usable, skip.skipped, skip.turns) == (1, 2, 0)
    assert "2 records left out for their length" in summary_lines(skip)[1]
    truncate = found(max_tokens=300, too_long="truncate")
    # Of "a" two questions and their answers go; the first turn of "b" alone is too long.
    assert (truncate.shortened, truncate.turns, truncate.usable) == (1, 4, 2)
    assert [(p.index, p.cause) for p in truncate.problems] == [(1, "length")]
    assert "4 turns left out of 1 record." in report_page(truncate)


@pytest.mark.parametrize(
    ("row", "what"),
    [({"text": 100}, "text-stream tokens"), ({"regions": 5}, "regions"), ({"images": 1}, "im")],
)
def test_what_is_longer_than_a_row_fits_no_row(tmp_path, row, what):
    corpora.write_picture(tmp_path / "0.png")
    record = corpora.captioned("0.png", "a", "x" * 100) | {"image": ["0.png", "0.png"]}
    record["conversations"][0]["value"] = "<image><image>What?"
    corpus = open_corpus(corpora.write_lines(tmp_path, [record]))
    config = CorpusConfig(path="x", row=RowConfig(**row))
    found = check_record(corpus, corpora.conversations(config=config), config, 0)
    ((name, limit),) = row.items()
    assert found.cause == "length" and f" {what}" in found.message
    assert f"more than data.row.{name}={limit};" in found.message
    fits = CorpusConfig(path="x", row=RowConfig(**{name: 1000}))
    assert check_record(corpus, corpora.conversations(config=fits), fits, 0).cause == ""


def test_nothing_to_learn_from(tmp_path):
    """A template that supervises the question's text, and a question that is only an image."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}"
    )
    corpora.write_picture(tmp_path / "0.png")
    records = [corpora.captioned("0.png", "a"), corpora.captioned("0.png", "b")]
    records[1]["conversations"][0]["value"] = "<image>"
    corpus = open_corpus(corpora.write_lines(tmp_path, records))
    config = CorpusConfig(path="x")
    conversations = dataclasses.replace(corpora.conversations(), template=ChatTemplate(source))
    assert check_record(corpus, conversations, config, 0).cause == ""
    found = check_record(corpus, conversations, config, 1)
    assert found.cause == "targets" and found.message.startswith("all.jsonl line 2 has no token to learn")


def test_a_video_that_ends_early_is_damaged(tmp_path, monkeypatch):
    """Iterating its frames raises nothing, so they are counted."""
    corpus = spoilt(tmp_path)
    conversations = corpora.conversations(config=LIMIT)
    assert check_record(corpus, conversations, LIMIT, 2).cause == ""
    read = Animation.read
    monkeypatch.setattr(Animation, "read", lambda self, wanted: itertools.islice(read(self, wanted), 3))
    found = check_record(corpus, conversations, LIMIT, 2)
    assert found.cause == "medium" and "'walk.gif' gives 5 of the 6 frames" in found.message


@pytest.mark.parametrize(
    ("error", "what"),
    [(MemoryError(), "needs more memory than there is"), (IndexError("odd\nlines"), "(IndexError: odd)")],
)
def test_whatever_a_decoder_raises_is_a_problem_of_its_record(tmp_path, monkeypatch, error, what):
    def fail(self):
        raise error

    monkeypatch.setattr(check.Medium, "check", fail)
    found = check_record(spoilt(tmp_path), corpora.conversations(), LIMIT, 0)
    assert found.cause == "medium" and what in found.message and found.name == "all.jsonl line 1"


def test_text_without_tokens_is_a_problem_of_its_record(tmp_path, monkeypatch):
    def encode(self, text):
        raise ValueError("Text cannot be tokenised: a character has no token.")

    corpus, conversations = spoilt(tmp_path), corpora.conversations()
    monkeypatch.setattr(Tokenizer, "encode", encode)
    found = check_record(corpus, conversations, LIMIT, 3)
    assert found.cause == "conversation" and found.message.startswith("all.jsonl line 4: Text cannot be")


def test_a_long_message_is_cut_in_its_middle(tmp_path, monkeypatch):
    def encode(self, text):
        if "xxx" in text:
            raise ValueError(f"Text {text!r} cannot be tokenised: a character has no token.")
        return real(self, text)

    corpus, real = spoilt(tmp_path), Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", encode)
    found = check_record(corpus, corpora.conversations(), LIMIT, 8)
    assert found.message.startswith("all.jsonl line 9: Text") and found.message.endswith("has no token.")
    assert "xxx ... xxx" in found.message and len(found.message) < 620


def test_a_record_that_hangs_is_named_and_the_rest_is_checked(tmp_path):
    """In processes, as a user's check runs; everything else is as in this one."""
    corpus = corpora.Fatal(open_corpus(corpora.write_corpus(tmp_path, 6)), hang=(1,))
    config = CorpusConfig(path="x", timeout=2.5)
    counts, start = [], time.monotonic()
    report = checked(corpus, config, workers=1, advance=counts.append)
    assert time.monotonic() - start < 120 and sum(counts) == 6
    (problem,) = report.problems
    assert (problem.index, problem.name, problem.cause) == (1, "all.jsonl line 2", "medium")
    assert problem.message == "all.jsonl line 2 took longer than 2.5 seconds; leave it out, or repair it."
    assert report.usable == 5 and sum(report.histograms["height"].counts) == 5


def test_a_record_that_cannot_even_be_read_has_a_number(tmp_path, here, monkeypatch):
    """Reading its name again kills its process again, never the check."""
    corpus = corpora.Fatal(open_corpus(corpora.write_corpus(tmp_path, 3)), die=(0,), lost=(2,))
    mapped = check.map_records

    def failing(function, indexes, **options):
        named = function.func is check._read_names
        dead = (2,) if named else (0, 2)
        yield from mapped(
            lambda n: (
                Failure(False, "ended the process that read it (SIGSEGV)") if n in dead else function(n)
            ),
            indexes,
            **options,
        )

    monkeypatch.setattr(check, "map_records", failing)
    report = checked(corpus)
    assert [problem.name for problem in report.problems] == ["all.jsonl line 1", "record 2"]
    assert "ended the process that read it (SIGSEGV); leave it out" in report.problems[0].message
    assert report.usable == 1


def test_no_workers():
    with pytest.raises(UserError, match="workers=0 must be at least 1"):
        check_corpus([], None, LIMIT, workers=0)


@pytest.fixture
def report(tmp_path, here):
    return checked(spoilt(tmp_path / "corpus"))


def test_files_of_a_report(tmp_path, report):
    write_report(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    data = json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))
    keys = "format version ok records usable skipped shortened turns targets causes problems histograms"
    assert list(data) == keys.split()
    assert (data["format"], data["version"], data["ok"]) == ("gaze-jax check", 1, False)
    assert (data["records"], data["usable"], data["causes"]) == (10, 5, dict.fromkeys(EXPECTED, 1))
    assert data["problems"] == [dataclasses.asdict(problem) for problem in report.problems]
    assert list(data["histograms"]) == list(check.QUANTITIES)
    for found in data["histograms"].values():
        assert set(found) == {field.name for field in dataclasses.fields(Histogram)}
        assert len(found["edges"]) == len(found["counts"]) + 1
    assert (tmp_path / "out" / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_shows_it_first_and_escapes_data(report):
    page = report_page(report)
    corpora.assert_inert(page)
    body = [(tag, a, text) for tag, a, text in corpora.elements(page)]
    (title,) = [text for tag, _, text in body if tag == "h1"]
    assert title == "5 of 10 records can be trained on"
    rows = [a["class"] for tag, a, _ in body if tag == "tr" and a.get("class")]
    assert rows == list(EXPECTED)
    messages = [text for tag, a, text in body if a.get("class") == "message"]
    assert messages == [problem.message for problem in report.problems]
    missing = messages[list(EXPECTED).index("missing")]
    assert "<img src=x onerror=alert(1)>\\u202e.png" in missing and "<script>alert(2)</script>" in missing
    assert "\x1b" not in page and "\u202e" not in page
    assert len([tag for tag, _, _ in body if tag == "figure"]) == len(report.histograms)
    bars = sum(len(found.counts) for found in report.histograms.values())
    assert len([tag for tag, _, _ in body if tag == "rect"]) == bars


def test_many_problems_are_cut_on_the_page_and_the_terminal_but_not_in_the_file(report):
    one = report.problems[0]
    many = tuple(dataclasses.replace(one, index=n) for n in range(check_page._ROWS + 7))
    report = dataclasses.replace(report, problems=many)
    lines = summary_lines(report)
    assert lines[:2] == ["5 of 10 records can be trained on.", f"record (malformed): {len(many)}"]
    assert sum(line == f"  {one.message}" for line in lines) == check.SHOWN
    assert f"  and {len(many) - check.SHOWN} more, which check.json lists" in lines
    page = report_page(report)
    assert page.count('<tr class="record">') == check_page._ROWS and "check.json lists all" in page
    assert len(check_page.report_json(report)["problems"]) == len(many)


def test_without_matplotlib_the_rest_is_written(tmp_path, report, monkeypatch):
    monkeypatch.setattr(check_page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^check\.png needs matplotlib; .*pip install 'gaze-jax\[data\]'\.$"):
        write_report(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["check.html", "check.json"]


def test_a_report_that_cannot_be_written(tmp_path, report):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        write_report(report, tmp_path / "file" / "out")


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_causes_filter_the_table_in_a_browser(tmp_path, report):
    (tmp_path / "check.html").write_text(report_page(report), encoding="utf-8")
    rows = "[...document.querySelectorAll('tbody tr')]"
    script = f"return {rows}.filter((row) => row.offsetHeight).map((row) => row.className)"
    with browser() as driver:
        open_page(driver, tmp_path / "check.html")
        assert driver.execute_script(script) == list(EXPECTED)
        for cause in EXPECTED:
            driver.find_element("css selector", f"label:has(#only-{cause})").click()
            assert driver.execute_script(script) == [cause]
        driver.find_element("css selector", "label:has(#only-all)").click()
        assert driver.execute_script(script) == list(EXPECTED)
        assert complaints(driver) == []


@pytest.mark.parametrize(
    "values",
    [
        [5],
        [0, 0],
        [1, 2, 2, 3],
        list(range(1000)),
        [1, 1, 2, 1, 100_000],
        [0.0003, 0.02, 12.5],
        [0.25],
        [0, 1e6],
        [7, 7.5, 300],
        [2**31],
    ],
)
def test_a_histogram_counts_every_value_once(values):
    found = histogram(np.asarray(values, float))
    assert sum(found.counts) == len(values) and len(found.edges) == len(found.counts) + 1
    assert list(found.edges) == sorted(set(found.edges))
    for low, high, count in zip(found.edges, found.edges[1:], found.counts):
        assert count == sum(low <= value < high for value in values)
    assert len(found.counts) <= 62
    assert (found.smallest, found.largest) == (min(values), max(values))
    assert found.median in values and found.p95 in values


def test_every_cause_has_a_meaning_and_a_filter():
    assert list(check.MEANINGS) == [*CAUSES, "duplicate"]
    style = (check_page.Path(check_page.__file__).parent / "assets" / "check.css").read_text()
    assert all(f"#only-{cause}:checked" in style for cause in check.MEANINGS)


def test_plain_text_is_safe_on_a_terminal():
    assert plain("a\x1b[2J\n\u202e\ud800\x7f\u2028é日") == "a\\x1b[2J\\n\\u202e\\ud800\\x7f\\u2028é日"
    assert plain("ന്\u200d") == "ന്\u200d"
