"""Corpora in buckets: the records and pixels of local ones, and one sentence for what goes wrong."""

import json
import os
import pickle
import sys

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from gaze_jax.corpora import index, json_files, parquet, storage, tars
from gaze_jax.corpora.prepare import prepare
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.corpora.records import each
from gaze_jax.errors import UserError
from gaze_jax.media.video import FrameSampling
from tests.corpora.test_prepare import files
from tests.corpora.test_readers import (
    CONTAINERS,
    COUNT,
    as_lines,
    as_parquet,
    as_shards,
    as_webdataset,
    pixels,
    png,
)
from tests.helpers.videos import write_video

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


class Bucket(MemoryFileSystem):
    """Objects in memory that count what is read of them, and fail where a test says so."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    read: list = []  # noqa: RUF012
    failing: dict = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        if error := self.failing.get("range"):
            raise error
        self.read.append((path, start, end))
        return super().cat_file(path, start, end, **kwargs)

    def _open(self, path, *args, **kwargs):
        if error := self.failing.get("open"):
            raise error
        file = super()._open(path, *args, **kwargs)
        if error := self.failing.get("middle"):
            return Broken(file, error)
        return file


class Broken:
    """A file whose connection ends after its first bytes."""

    def __init__(self, file, error):
        self.file, self.error, self.budget = file, error, 600

    def read(self, size=-1):
        if not 0 <= size <= self.budget:
            raise self.error
        self.budget -= size
        return self.file.read(size)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """An empty bucket, and no index that another test has made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(_registry, "gs", Bucket)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("read", []), ("failing", {})):
        monkeypatch.setattr(Bucket, name, value)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    for cached in (tars._index, parquet._open, parquet._group):
        cached.cache_clear()
    return Bucket()


def upload(folder, root):
    system, place = fsspec.core.url_to_fs(root)
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{place}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("root", ["memory://b/c", "gs://b/c"])
@pytest.mark.parametrize("write", [one for one in CONTAINERS if one is not as_shards])
def test_a_remote_corpus_is_that_of_its_local_files(write, root, tmp_path):
    """Records, pixels, fingerprint; twice, for the second time reads the index from the cache."""
    path, media = write(tmp_path / "corpus")
    local = open_corpus(path, media=media)
    upload(tmp_path / "corpus", root)
    there = [one.replace(str(tmp_path / "corpus"), root) for one in (str(path), *media)]
    for _ in range(2):
        remote = pickle.loads(pickle.dumps(open_corpus(there[0], media=there[1:])))
        assert len(remote) == COUNT and remote.fingerprint() == local.fingerprint()
        for number in reversed(range(COUNT)):
            one, other = remote[number], local[number]
            assert (one.name, one.id, one.cut) == (other.name, other.id, other.cut)
            assert one.messages == other.messages
            assert len(one.images) == (number != 3)
            for medium in pickle.loads(pickle.dumps(one.images)):
                medium.check()
                np.testing.assert_array_equal(medium.image(), pixels(number))


@pytest.mark.parametrize("write", [as_lines, as_parquet, as_webdataset])
def test_what_is_prepared_of_it_has_the_same_bytes(write, tmp_path):
    """Media are fetched once."""
    path, _ = write(tmp_path / "corpus")
    upload(tmp_path / "corpus", "gs://b")
    there = str(path).replace(str(tmp_path / "corpus"), "gs://b")
    prepare(open_corpus(path), str(tmp_path / "local"), shards=2)
    prepare(open_corpus(there), str(tmp_path / "remote"), shards=2)
    assert files(tmp_path / "local") == files(tmp_path / "remote")
    pictures = [read for read in Bucket.read if read[0].endswith(".png")]
    assert len(pictures) == len(set(pictures)) == (COUNT - 1) * (write is as_lines)


def test_a_record_is_one_range_and_its_medium_another(tmp_path):
    path, _ = as_lines(tmp_path / "corpus")
    upload(tmp_path / "corpus", "gs://b")
    corpus = open_corpus("gs://b/all.jsonl")
    len(corpus)
    Bucket.read.clear()
    corpus[2].images[0].image()
    (line, start, end), (picture, *_) = Bucket.read
    assert line == "/b/all.jsonl" and json.loads(path.read_bytes()[start:end])["id"] == "n2"
    assert picture == "/b/pictures/2.png"


def test_an_object_that_is_written_again_is_indexed_again(tmp_path, bucket):
    """Also one of the same size; and without a time of writing it is indexed each time."""
    built = []

    def build(path):
        built.append(path)
        return json_files.line_spans(path)

    for text, count in ((b"{}\n{}\n", 1), (b"{}\n{}\n", 1), (b"{}  \n\n", 2)):
        if count != len(built):
            bucket.pipe_file("/b/a.jsonl", text)
        spans = index.indexed("gs://b/a.jsonl", "lines", build)
        assert len(built) == count and len(spans["start"]) == 3 - count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "info", lambda self, path, **kwargs: {"size": 6, "name": path})
        for count in (3, 4):
            index.indexed("gs://b/a.jsonl", "lines", build)
            assert len(built) == count
        patch.setattr(Bucket, "info", lambda self, path, **kwargs: {"size": 6, "etag": "x"})
        bucket.pipe_file("/b/b.jsonl", b"{}\n{}\n")
        for name, count in (("a", 5), ("b", 6), ("a", 6)):  # two objects with one stamp
            index.indexed(f"gs://b/{name}.jsonl", "lines", build)
            assert len(built) == count


def test_a_video_in_a_bucket_has_the_frames_of_its_file(tmp_path):
    (tmp_path / "c").mkdir()
    write_video(tmp_path / "c" / "walk.mp4", frames=30, fps=10)
    asked = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A walk."}]
    line = {"video": "walk.mp4", "conversations": asked, "start": 1.0}
    (tmp_path / "c" / "all.jsonl").write_text(json.dumps(line))
    upload(tmp_path / "c", "gs://b")
    found = []
    for path in (str(tmp_path / "c" / "all.jsonl"), "gs://b/all.jsonl"):
        (record,) = each(open_corpus(path))
        sampling = record.cut.of(FrameSampling(max_frames=5))
        found.append(np.stack(list(record.videos[0].video(sampling))))
    np.testing.assert_array_equal(*found)


FAILURES = {
    "connection": (
        ConnectionResetError(104, "Connection reset by peer"),
        "cannot be read .*reset",
    ),
    "library": (RuntimeError("HTTP 503\nServer: x\nmore"), r"cannot be read \(HTTP 503\)"),
    "permission": (
        PermissionError("Forbidden: b\nmore"),
        r"may not be read with your credentials \(Forb",
    ),
    "missing": (FileNotFoundError("b/all.jsonl"), "is not there; check the address"),
}


@pytest.mark.parametrize("where", ["open", "middle", "range"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("write", [as_lines, as_parquet, as_webdataset])
def test_what_fails_is_one_sentence(write, failure, where, tmp_path):
    """When it is opened, listed, read from its middle, or when the bytes of a record are asked for."""
    path, _ = write(tmp_path / "corpus")
    upload(tmp_path / "corpus", "gs://b")
    there = str(path).replace(str(tmp_path / "corpus"), "gs://b")
    error, message = FAILURES[failure]
    Bucket.failing[where] = error
    with pytest.raises(UserError, match=rf"^gs://b.*{message}") as found:
        for record in each(open_corpus(there)):
            for medium in record.images:
                medium.image()
        assert write is not as_parquet or where != "range", "nothing failed"
        open_corpus(there).fingerprint()
    assert "\n" not in str(found.value)


def test_a_copy_that_ends_early_is_refused(tmp_path, monkeypatch, bucket):
    bucket.pipe_file("/b/a.jsonl", b'{"a": 1}\n' * 9)
    monkeypatch.setattr(storage, "size_and_stamp", lambda path: (99, 1))
    with pytest.raises(UserError, match=r"gs://b/a\.jsonl ended early while it was read; start again"):
        len(open_corpus("gs://b/a.jsonl"))


@pytest.mark.parametrize("package", ["gcsfs", "fsspec"])
def test_a_package_that_is_missing_is_named(package, monkeypatch):
    monkeypatch.delitem(_registry, "gs")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^gs:// needs a package .*{package}.*'gaze-jax\[remote\]'\.$"):
        open_corpus("gs://b/all.jsonl")


def prepared(bucket):
    bucket.pipe_file("/b/corpus.json", b"{}")


def pictures(bucket):
    bucket.pipe_file("/b/a.png", png(1))


@pytest.mark.parametrize(
    ("write", "path", "media", "message"),
    [
        (
            None,
            "https://example.com/a.jsonl",
            (),
            "is an address that is not read; give a local path",
        ),
        (None, "file:///tmp/a.jsonl", (), "is an address that is not read"),
        (None, "gs://b/a.jsonl", (), "gs://b/a.jsonl is not there; check the address"),
        (None, "gs://b/*.tar", (), r"gs://b/\*.tar is not there; give a file, a folder or a pattern"),
        (prepared, "gs://b", (), "is a prepared corpus, which is read from local disks; copy it to one"),
        (
            pictures,
            "gs://b",
            (),
            "has no JSON, parquet or tar files; captioned media are",
        ),
        (pictures, "all.jsonl", ("gs://b/absent",), "gs://b/absent is not there"),
    ],
)
def test_what_is_not_read_is_refused(write, path, media, message, tmp_path, bucket, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.jsonl").write_text(json.dumps({"image": "a.png", "conversations": TURNS}))
    if write is not None:
        write(bucket)
    with pytest.raises(UserError, match=message) as error:
        list(each(open_corpus(path, media=media)))
    assert "\n" not in str(error.value)


def test_media_that_are_not_in_the_bucket_are_said_when_they_are_read(bucket, tmp_path):
    for name, message in (("x.png", "b/x.png is not there"), ("gs://b/a.png", "names 'gs://b/a.png'; media")):
        pictures(bucket)
        (tmp_path / "all.jsonl").write_text(json.dumps({"image": name, "conversations": TURNS}))
        with pytest.raises(UserError, match=message):
            prepare(open_corpus(tmp_path / "all.jsonl", media=["gs://b"]), str(tmp_path / name[:1]), shards=1)


def test_shards_are_written_to_local_folders_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus(as_lines(tmp_path / "corpus")[0])
    with pytest.raises(UserError, match="gs://b/out is an address; shards are written to a local folder"):
        prepare(corpus, "gs://b/out", shards=1)
    assert os.listdir(tmp_path) == ["corpus"] or "gs:" not in os.listdir(tmp_path)
