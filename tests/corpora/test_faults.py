"""A corpus of faults: each is found when and for the cause that docs/data.md says; the rest is delivered.

Records whose process hangs or is killed: test_check.py, test_workers.py and tests/train/test_corpus.py.
"""

import dataclasses
import json
import os
import re
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gaze_jax.chat.template import ChatTemplate
from gaze_jax.corpora import check, tars
from gaze_jax.corpora.check import DUPLICATE, MEANINGS, check_corpus, check_record
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.measure import measure_corpus
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.errors import UserError
from tests.corpora.test_reader_faults import WRONG, add, jsonl
from tests.helpers import corpora
from tests.helpers.corpora import (
    NOISE,
    UNSEEN,
    UPRIGHT,
    Case,
    encoded,
    good_cases,
    media_faults,
    numbered,
    odd_records,
    plain,
    record_faults,
    unseen_cases,
)
from tests.helpers.shell import ROOT
from tests.helpers.videos import write_sound, write_video
from tests.train.test_corpus import opened, taken, targets_of

CONFIG = CorpusConfig(path="x", max_frames=4)


def films(folder):
    """The bytes of videos, by the suffixes of their files."""
    codecs = {"webm": {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8"}}
    found = {
        kind: write_video(folder / f"film.{kind}", list(NOISE), gop=4, **codecs.get(kind, {})).read_bytes()
        for kind in ("mp4", "mkv", "webm", "ts", "gif")
    }
    return found | {"sound": write_sound(folder / "sound.mp4").read_bytes()}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def cases(film):
    """Good and bad in turn, the last with the id of the first."""
    found = {**good_cases(film), **unseen_cases(film), **odd_records()}
    found = [*found.items(), *media_faults(film).items(), *record_faults().items()]
    order = np.random.default_rng(1).permutation(len(found))
    twice = Case(plain().fields | {"id": "first"}, {}, "checked", DUPLICATE, "has the id 'first' of")
    return {"first": found[0][1]} | dict(found[at] for at in order) | {"twice": twice}


@pytest.fixture(scope="module")
def path(cases, tmp_path_factory):
    """A file with a byte order mark and CRLF, beside it its media."""
    folder = tmp_path_factory.mktemp("faults") / "media"
    folder.mkdir()
    for case in cases.values():
        for name, data in case.files.items():
            (folder / name).write_bytes(data)
    (folder.parent / "outside.png").write_bytes(encoded("PNG"))
    os.symlink(folder.parent / "outside.png", folder / "link.png")
    os.symlink("nowhere.png", folder / "dead.png")
    (folder / "folder.png").mkdir()
    lines = [case.line for case in cases.values()]
    records = [json.dumps(record).encode() for record in numbered(cases)]
    lines = [record if line is None else line for line, record in zip(lines, records, strict=True)]
    (folder / "all.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")
    return folder / "all.jsonl"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A cache of its own, and checks in this process: starting one takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars._index.cache_clear()

    def mapped(function, indexes, *, workers, timeout, advance):
        yield from ((index, function(index)) for index in indexes)

    monkeypatch.setattr(check, "map_records", mapped)


def indexes(cases, *when):
    return [number for number, case in enumerate(cases.values()) if case.when in when]


def assert_found(corpus, cases, name):
    """Exactly the bad records are problems, each for its cause and in one sentence that names its place."""
    report = check_corpus(corpus, corpora.conversations(config=CONFIG), CONFIG)
    names = list(cases)
    found = {names[problem.index]: problem for problem in report.problems}
    assert {key: problem.cause for key, problem in found.items()} == {
        key: case.cause for key, case in cases.items() if case.cause
    }
    assert len(found) == len(report.problems)
    for key, problem in found.items():
        place = name(names.index(key), key)
        assert re.search(rf"^{re.escape(place)}\b", problem.message), (key, problem.message)
        assert cases[key].message in problem.message, (key, problem.message)
        assert problem.message.endswith(".") and problem.message.isprintable(), (key, problem.message)
        assert "not foreseen" not in problem.message, (key, problem.message)
    bad = indexes(cases, "measured", "decoded")
    assert (report.records, report.usable, report.ok) == (len(cases), len(cases) - len(bad), False)
    return report


def test_check_finds_every_fault_and_nothing_else(path, cases):
    report = assert_found(open_corpus(path), cases, lambda number, _: f"all.jsonl line {number + 1}")
    assert sum(report.causes.values()) == len([case for case in cases.values() if case.cause])
    assert report.usable >= 12


def test_training_names_the_first_fault(path, cases):
    first, *rest = indexes(cases, "measured")
    where = rf"{1 + len(rest)} of {len(cases)} records .*The first: all\.jsonl line {first + 1}\b"
    with pytest.raises(UserError, match=where):
        opened(path, max_frames=4)
    training = opened(path, max_frames=4, bad="skip", max_bad=1.0)
    strict = dataclasses.replace(training, config=dataclasses.replace(training.config, bad="error"))
    with pytest.raises(UserError, match=r"^all\.jsonl line \d+: ") as error:
        taken(strict, training.order.epoch_batches)
    line = int(re.findall(r"line (\d+)", str(error.value))[0])
    assert line - 1 in indexes(cases, "decoded")


def pictures_of(found):
    """The images of batches or of records that are not padding, as a multiset."""
    images = (
        image for arrays in found for image in arrays["images"].reshape(-1, *arrays["images"].shape[-3:])
    )
    return sorted(image.tobytes() for image in images if image.any())


def test_training_without_the_bad_has_every_good_record_once(path, cases, tmp_path):
    training = opened(path, max_frames=4, bad="skip", max_bad=1.0)
    log = tmp_path / "skipped.jsonl"
    batches = taken(training, training.order.epoch_batches, log=log)
    good = [
        training.conversations.arrays(training.corpus[number], number)
        for number in indexes(cases, "", "checked")
    ]
    assert targets_of(batches) == sorted(tuple(one["targets"][one["targets"] >= 0].tolist()) for one in good)
    assert len({*targets_of(batches)}) == len(good) >= 12
    assert pictures_of(batches) == pictures_of(good)
    names = list(cases)
    skipped = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["record"] for line in skipped) == indexes(cases, "measured", "decoded")
    assert [*training.measurement.failures] == indexes(cases, "measured")
    for line in skipped:
        case, message = cases[names[line["record"]]], line["message"]
        assert line["cause"] == case.cause and case.message in message, (case, message)
        assert message.startswith(f"all.jsonl line {line['record'] + 1}") and "\n" not in message


def test_good_pictures_are_upright_and_of_their_colours(path, cases):
    corpus, names = open_corpus(path), list(cases)
    pixels = {
        name: np.asarray(corpus[names.index(name)].images[0].image(), int)
        for name in good_cases_of_pictures(cases)
    }
    for name, found in pixels.items():
        expected = UPRIGHT.astype(int)
        if name == "16 bits":
            expected = np.repeat(expected[..., :1], 3, axis=-1)
        if name == "palette":
            seen = (found != 255).any(axis=-1)
            assert not seen[0, 0] and seen.mean() > 0.9
            found, expected = found[seen], expected[seen]
        assert found.shape == expected.shape and np.abs(found - expected).mean() < 12, name
    for name in ("altered jpeg", "ended jpeg"):
        assert np.abs(np.asarray(corpus[names.index(name)].images[0].image(), int) - NOISE[0]).mean() > 12


def good_cases_of_pictures(cases):
    return [name for name, case in cases.items() if "image" in case.fields and not case.when and case.files
            and name not in UNSEEN]  # fmt: skip


def write_tar(folder, cases):
    """Examples with their record and their media, in the order of their names."""
    with tarfile.open(folder / "all.tar", "w") as tar:
        for number, (record, case) in enumerate(zip(numbered(cases), cases.values(), strict=True)):
            names = {name: f"{number:03}{os.path.splitext(name)[1]}" for name in case.files}
            add(tar, f"{number:03}.json", json.dumps(record | renamed(case, names)).encode())
            for name, data in case.files.items():
                add(tar, names[name], data)
    return folder / "all.tar"


def renamed(case, names):
    return {kind: names[case.fields[kind]] for kind in ("image", "video") if kind in case.fields}


def write_parquet(folder, cases):
    """Rows with the bytes of their media."""
    columns = {"id": [], "conversations": [], "image": [], "video": [], "start": []}
    for record, case in zip(numbered(cases), cases.values(), strict=True):
        ((name, data),) = case.files.items()
        for kind in ("image", "video"):
            columns[kind].append({"bytes": data, "path": name} if kind in record else None)
        for key in ("id", "conversations", "start"):
            columns[key].append(record.get(key))
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "all.parquet")
    return folder / "all.parquet"


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_media_inside_a_container_have_the_same_faults(write, film, tmp_path):
    cases = {**good_cases(film), **unseen_cases(film), **media_faults(film)}
    cases = {name: case for name, case in cases.items() if len(case.files) == 1}
    corpus = open_corpus(write(tmp_path, cases))
    kind = {write_tar: "all.tar example {:03}", write_parquet: "all.parquet row {}"}[write]
    assert_found(corpus, cases, lambda number, _: kind.format(number))
    failures = measure_corpus(corpus, corpora.conversations(config=CONFIG)).failures
    assert list(failures) == indexes(cases, "measured")


OPENED = (
    "empty", "no json", "list cut", "list of texts", "empty list", "tar out", "tar absolute", "tar link",
    "tar device", "tar twice", "tar cut", "tar cut between members", "tars joined", "tar compressed",
    "parquet cut", "parquet columns",
)  # fmt: skip
"""Of test_reader_faults.WRONG: what a corpus cannot be opened with."""


@pytest.mark.parametrize("case", OPENED)
def test_some_faults_end_the_opening(case, tmp_path):
    """By the name of the file, whether it holds records or, if it is a tar, the media of others."""
    path = WRONG[case][0](tmp_path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        open_corpus(path)
    if case.startswith("tar"):
        lines = jsonl(corpora.captioned("a.png", "n0"))(tmp_path)
        with pytest.raises(UserError, match=re.escape(str(path))):
            open_corpus(lines, media=[str(path)])


def test_a_disk_that_fails_is_a_fault_of_the_medium(tmp_path, monkeypatch):
    """Or a file that its reader may not open; a frame of a folder too."""
    corpora.write_picture(tmp_path / "a.png")
    corpora.write_picture(tmp_path / "film" / "0.png")
    film = {"id": "film", "video": "film", "conversations": corpora.turns("What?", "Noise.")}
    corpus = open_corpus(corpora.write_lines(tmp_path, [corpora.captioned("a.png", "n0"), film]))
    conversations = corpora.conversations(config=CONFIG)

    def refuse(where):
        raise PermissionError(13, "Permission denied", str(where))

    really, listed = open, os.listdir
    with monkeypatch.context() as patch:
        patch.setattr(
            "builtins.open", lambda f, *a, **k: refuse(f) if str(f).endswith("png") else really(f, *a, **k)
        )
        patch.setattr("os.listdir", lambda f: refuse(f) if str(f).endswith("film") else listed(f))
        failures = measure_corpus(corpus, conversations).failures
    assert [(error.cause, "Permission denied" in str(error)) for error in failures.values()] == [
        ("medium", True)
    ] * 2
    assert not measure_corpus(corpus, conversations).failures


def every_fault(cases):
    """(when, cause, message) of every fault here: what the documentation tells is told of these."""
    found = {(case.when, case.cause, case.message) for case in cases.values() if case.cause}
    return found | {("opened", "", WRONG[case][1].split("|")[0]) for case in OPENED}


def test_the_documentation_tells_each_fault_as_it_is(cases, tmp_path):
    """Its table has a row for every fault, and every row is of a fault."""
    section = (
        (ROOT / "docs/data.md").read_text(encoding="utf-8").split("## What is refused")[1].split("\n## ")[0]
    )
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    told = {
        (when, cause.strip().strip("`-"), words)
        for _, when, sentences, cause in rows
        for words in re.findall('"([^"]+)"', sentences)
    }
    assert {cause for _, cause, _ in told} == {"", *MEANINGS}
    of_length = {row for row in told if row[1] in ("length", "targets")}
    found = every_fault(cases)
    missing = [one for one in found if not any(one[:2] == row[:2] and row[2] in one[2] for row in told)]
    assert not missing
    assert not [
        row for row in told - of_length if not any(one[:2] == row[:2] and row[2] in one[2] for one in found)
    ]
    # These two are of settings and templates.
    source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}"
    )
    corpora.write_picture(tmp_path / "a.png")
    record = corpora.captioned("a.png", "n0")
    record["conversations"][0]["value"] = "<image>"
    corpus, conversations = open_corpus(corpora.write_lines(tmp_path, [record])), corpora.conversations()
    silent = dataclasses.replace(conversations, template=ChatTemplate(source))
    results = [
        check_record(corpus, conversations, dataclasses.replace(CONFIG, max_tokens=5), 0),
        check_record(corpus, silent, CONFIG, 0),
    ]
    for result in results:
        assert any(result.cause == row[1] and row[2] in result.message for row in of_length), result
    assert len(of_length) == len(results)
