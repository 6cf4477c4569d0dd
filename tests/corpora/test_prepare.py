"""Prepared corpora: the same bytes however they were made, and what a damaged or unfinished one says."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from gaze_jax.corpora import array_records, prepare
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.corpora.records import MediaFolder, each
from gaze_jax.errors import UserError
from gaze_jax.media.video import FrameSampling
from tests.corpora.test_reader_faults import ASKED, TEXT
from tests.corpora.test_readers import COUNT, ENTRIES, as_lines, pixels, png, turns
from tests.helpers.videos import write_video


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    return open_corpus(as_lines(tmp_path / "corpus")[0])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_writes_the_same_bytes(corpus, tmp_path):
    """A shard's records are decided by their index alone; the folder holds nothing else."""
    for workers in (1, 2):
        found = prepare.prepare(corpus, str(tmp_path / str(workers)), shards=3, workers=workers)
        assert (found.records, found.shards, found.skipped) == (COUNT, 3, ())
    one, two = files(tmp_path / "1"), files(tmp_path / "2")
    assert one == two and set(one) == {"corpus.json", *(prepare.shard_name(n, 3) for n in range(3))}
    counts = [shard["records"] for shard in json.loads(one["corpus.json"])["shards"]]
    assert counts == [3, 2, 2]


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(corpus, tmp_path, monkeypatch):
    """What is complete is kept, unless it was changed since; the number of workers may differ."""
    prepare.prepare(corpus, str(tmp_path / "whole"), shards=4)
    advanced, out = [], tmp_path / "out"

    def stop(records):
        advanced.append(records)
        if len(advanced) == 3:  # what was there before, and two shards
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(corpus, str(out), shards=4, advance=stop)
    with pytest.raises(UserError, match=r"has no corpus\.json, so its preparation has not ended"):
        open_corpus(out)
    first = out / prepare.shard_name(0, 4)
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    written = []
    original = prepare._write_shard
    monkeypatch.setattr(prepare, "_write_shard", lambda *args: written.append(args[2]) or original(*args))
    resumed = []
    prepare.prepare(corpus, str(out), shards=4, advance=resumed.append)
    assert written == [0, 2, 3] and sum(resumed) == COUNT
    assert files(out) == files(tmp_path / "whole")


def test_what_is_there_of_something_else_stays(corpus, tmp_path):
    """A prepared corpus, an interrupted run with other options, or any other file."""
    out = tmp_path / "out"

    def stop(records):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(corpus, str(out), shards=4, advance=stop)
    with pytest.raises(UserError, match="holds an interrupted run of another corpus, or with other options"):
        prepare.prepare(corpus, str(out), shards=3)
    elsewhere = dataclasses.replace(corpus, find=MediaFolder(str(tmp_path)))
    with pytest.raises(UserError, match="holds an interrupted run of another corpus, or with other options"):
        prepare.prepare(elsewhere, str(out), shards=4)
    prepare.prepare(corpus, str(out), shards=4)
    before = files(out)
    with pytest.raises(UserError, match="holds a prepared corpus already"):
        prepare.prepare(corpus, str(out), shards=4)
    assert files(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(it has 'a.txt'\)"):
        prepare.prepare(corpus, str(tmp_path / "other"), shards=1)
    with pytest.raises(UserError, match="cannot be written"):
        prepare.prepare(corpus, str(tmp_path / "other" / "a.txt"), shards=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards=0 must be between 1 and 7"),
        ({"shards": 8}, "shards=8 must be between 1 and 7"),
        ({"shards": 1, "workers": 0}, "workers=0 must be at least 1"),
        ({"shards": 1, "bad": "ignore"}, "bad='ignore' must be one of error, skip"),
    ],
)
def test_options_are_checked_first(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(corpus, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def bad_corpus(folder):
    """Good and bad records: an image that is cut, one that is not there, a line that is no JSON."""
    folder.mkdir()
    (folder / "good.png").write_bytes(png(1))
    (folder / "cut.png").write_bytes(png(1)[:-200])
    asked = {"conversations": turns(0)}
    lines = [
        json.dumps(asked | {"image": "good.png"}),
        json.dumps(asked | {"image": "cut.png"}),
        json.dumps(asked | {"image": "absent.png"}),
        '{"conversations": [',
        json.dumps(TEXT),
    ]
    (folder / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "all.jsonl"


def test_bad_records_end_the_run_or_are_left_out_by_name(tmp_path):
    """Every cause is in the listing; all good records are there."""
    corpus = open_corpus(bad_corpus(tmp_path / "corpus"))
    with pytest.raises(UserError, match=r"all.jsonl line 2: Image .*cut.png' cannot be decoded"):
        prepare.prepare(corpus, str(tmp_path / "error"), shards=2)
    found = prepare.prepare(corpus, str(tmp_path / "skip"), shards=2, workers=2, bad="skip")
    assert found.records == 2 and [name for name, _ in found.skipped] == ["record 1", "record 2", "record 3"]
    for part, (_, why) in zip(
        ("cannot be decoded", "is not in", "not valid JSON"), found.skipped, strict=True
    ):
        assert part in why
    again = open_corpus(tmp_path / "skip")
    assert [record.name for record in each(again)] == ["all.jsonl line 1", "all.jsonl line 5"]
    np.testing.assert_array_equal(again[0].images[0].image(), pixels(1))
    assert json.loads((tmp_path / "skip" / "corpus.json").read_text())["skipped"] == [
        *map(list, found.skipped)
    ]
    (tmp_path / "corpus" / "all.jsonl").write_text("{}\n{}\n")
    with pytest.raises(
        UserError, match=r"No record of the corpus could be read; the first: .*no list of turns"
    ):
        prepare.prepare(
            open_corpus(tmp_path / "corpus" / "all.jsonl"), str(tmp_path / "x"), shards=1, bad="skip"
        )


def test_videos_and_frame_folders_are_kept_with_their_cuts(tmp_path):
    """The frames are those of the files."""
    write_video(tmp_path / "walk.mp4", frames=30, fps=10)
    (tmp_path / "frames").mkdir()
    for number in range(12):
        (tmp_path / "frames" / f"{number}.png").write_bytes(png(1))
    asked = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A walk."}]
    lines = [
        {"video": name, "conversations": asked, "start_frame": 2, "end_frame": 9}
        for name in ("walk.mp4", "frames")
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    before = open_corpus(tmp_path / "all.jsonl")
    prepare.prepare(before, str(tmp_path / "out"), shards=1)
    for one, other in zip(each(before), each(open_corpus(tmp_path / "out")), strict=True):
        assert one.cut == other.cut and one.messages == other.messages
        sampling = one.cut.of(FrameSampling(max_frames=5))
        wanted = np.stack(list(one.videos[0].video(sampling)))
        np.testing.assert_array_equal(np.stack(list(other.videos[0].video(sampling))), wanted)
        assert len(wanted) == 5
    # A prepared corpus is a corpus.
    prepare.prepare(open_corpus(tmp_path / "out"), str(tmp_path / "again"), shards=1)
    frames = open_corpus(tmp_path / "again")[1].videos[0].video(FrameSampling())
    np.testing.assert_array_equal(np.stack(list(frames)), np.stack([pixels(1)] * 12))


def damaged(change):
    """A prepared corpus that ``change`` has altered: it gets the folder and its listing."""

    def made(folder, corpus):
        prepare.prepare(corpus, str(folder), shards=2)
        listing = json.loads((folder / "corpus.json").read_text())
        change(folder, listing)
        return folder

    return made


def shorten(folder, listing):
    path = folder / prepare.shard_name(1, 2)
    path.write_bytes(path.read_bytes()[:-100])


def remove(folder, listing):
    (folder / prepare.shard_name(0, 2)).unlink()


def rewrite(**changes):
    return lambda folder, listing: (folder / "corpus.json").write_text(json.dumps(listing | changes))


def spoil(folder, listing):
    """Bytes inside of the first shard."""
    path = folder / prepare.shard_name(0, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    array_records._reader.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, "is missing or has not its .* bytes; copy or prepare it again"),
        (remove, "is missing or has not its"),
        (rewrite(format="other"), "is not of a prepared corpus"),
        (rewrite(version=2), "has version 2 but this gaze_jax reads 1"),
        (lambda folder, listing: (folder / "corpus.json").write_text("{"), "is no JSON"),
        (spoil, r"is damaged|is no whole ArrayRecord"),
    ],
)
def test_a_prepared_corpus_that_was_changed_is_refused(corpus, tmp_path, change, message):
    folder = damaged(change)(tmp_path / "out", corpus)
    with pytest.raises(UserError, match=message) as error:
        list(each(open_corpus(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xff\xff\x7f{}", b"\x02\0\0\0{}", b"\x02\0\0\0[]", b"hello world"]
)
def test_an_entry_of_another_program_is_refused(data):
    with pytest.raises(UserError, match="It is no record of a prepared corpus"):
        array_records.unpacked(data, "It")


def test_a_cut_entry_is_damaged(corpus):
    entry = array_records.packed(corpus[0])
    with pytest.raises(UserError, match="It is damaged: it has not the size that it states"):
        array_records.unpacked(entry[:-1], "It")


def test_the_command_says_what_it_did_and_what_it_left_out(tmp_path):
    """Status 0, 2 and 3, as of other commands."""
    path = bad_corpus(tmp_path / "corpus")

    def command(*words):
        line = [sys.executable, "-m", "gaze_jax", "data", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True)

    refused = command("prepare", path, f"--out={tmp_path / 'out'}")
    assert refused.returncode == 2 and "line 2: Image" in refused.stderr and "Traceback" not in refused.stderr
    partly = command("prepare", path, f"--out={tmp_path / 'skip'}", "--bad=skip", "--shards=2", "--workers=2")
    assert partly.returncode == 3 and partly.stdout == f"2 records in 2 shards: {tmp_path / 'skip'}\n"
    assert [line.split(":")[1] for line in partly.stderr.splitlines()] == [
        " record 1",
        " record 2",
        " record 3",
    ]
    lines = tmp_path / "good.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"conversations": turns(3)} | {"id": one["id"]}) for one in ENTRIES)
    )
    done = command("prepare", lines, f"--out={tmp_path / 'good'}")
    assert (done.returncode, done.stderr) == (0, "") and len(open_corpus(tmp_path / "good")) == COUNT
    assert done.stdout == f"{COUNT} records in 1 shard: {tmp_path / 'good'}\n"
    lines.write_text("\n".join([json.dumps({"conversations": turns(3)}), *["{}"] * 25]))
    many = command("prepare", lines, f"--out={tmp_path / 'many'}", "--bad=skip")
    assert many.returncode == 3 and len(many.stderr.splitlines()) == 21
    assert f"left out: 5 more, which {tmp_path / 'many'}/corpus.json lists" in many.stderr
    for words, message in (
        ((), "'' is nothing that can be done with data; give one of check, show, prepare"),
        (("prepair", lines), "did you mean 'prepare'?"),
        (("prepare",), "Give one corpus to prepare, not 0"),
        (("prepare", lines), "Give --out"),
        (("prepare", tmp_path / "absent", f"--out={tmp_path / 'y'}"), "is not there; give a file"),
    ):
        found = command(*words)
        assert found.returncode == 2 and message in found.stderr


def test_a_record_that_asks_for_several_media_keeps_their_order(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    text = "<image> or <image>, or <image>?"
    record = ASKED | {"image": ["2.png", "1.png", "2.png"]}
    record["conversations"] = [{"role": "user", "content": text}, {"role": "assistant", "content": "One."}]
    (tmp_path / "all.jsonl").write_text(json.dumps(record))
    before = open_corpus(tmp_path / "all.jsonl")
    prepare.prepare(before, str(tmp_path / "out"), shards=1)
    (again,) = each(open_corpus(tmp_path / "out"))
    assert again.messages == before[0].messages
    for medium, number in zip(again.images, (2, 1, 2), strict=True):
        np.testing.assert_array_equal(medium.image(), pixels(number))
