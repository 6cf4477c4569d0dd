"""What readers of corpora refuse: one sentence that names the file and the place."""

import json
import struct
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from gaze_jax.corpora import tars
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.corpora.records import each, relative
from gaze_jax.errors import UserError
from tests.corpora.test_readers import add, png, turns


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars._index.cache_clear()


def jsonl(*lines):
    def write(folder):
        path = folder / "all.jsonl"
        path.write_bytes(
            b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        )
        return path

    return write


def raw(data, name="all.json"):
    def write(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return write


def tarred(*members, cut=None, name="all.tar", mode="w"):
    def write(folder):
        with tarfile.open(folder / name, mode) as tar:
            for member, data, fields in members:
                add(tar, member, data, **fields)
        if cut is not None:
            (folder / name).write_bytes((folder / name).read_bytes()[:cut])
        return folder / name

    return write


def joined_tars(folder):
    path = tarred(("a.json", b"{}", {}))(folder)
    path.write_bytes(path.read_bytes() * 2)
    return path


def parquet(**columns):
    def write(folder):
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "all.parquet")
        return folder / "all.parquet"

    return write


def pictures_without_a_caption(folder):
    (folder / "a.png").write_bytes(png(1))
    return folder


TEXT = {"conversations": turns(3)}
ASKED = {"conversations": turns(0)}
WRONG = {
    "nothing": (lambda folder: folder / "absent.json", "is not there; give a file, a folder or a pattern"),
    "empty": (raw(b" \n\r\n"), "is empty; give a file with at least one record"),
    "empty list": (raw(b"[]"), "is an empty list"),
    "no json": (raw(b"id,image\n"), "is no JSON; give a list of JSON objects"),
    "list cut": (raw(b'[{"a": 1}, {"b'), "ends inside of its list; it is cut short"),
    "list cut between": (raw(b'[{"a": 1},'), "ends inside of its list"),
    "list of null": (raw(b'[{"a": 1}, null, {"b": 2}]'), "what stands around element 1 is neither"),
    "list of texts": (raw(b'["a", "b"]'), "must be a list of JSON objects"),
    "two lists": (raw(b'[{"a": 1}][{"a": 2}]'), "what stands around element 1"),
    "behind the list": (raw(b'[{"a": 1}] x'), "what stands around element 1"),
    "nested list": (raw(b'[[1], {"a": 1}]'), "element 0 must be a JSON object, not list"),
    "line cut": (jsonl(TEXT, b'{"conversations": ['), "all.jsonl line 2 is not valid JSON"),
    "line not UTF-8": (jsonl(TEXT, b'{"a": "\xff"}'), r"all.jsonl line 2 is not UTF-8 text \(byte 7\)"),
    "key twice": (jsonl(b'{"id": 1, "id": 2}'), "the key 'id' is given twice"),
    "no turns": (jsonl({"id": 5}), r"all.jsonl line 1 \(id '5'\) has no list of turns"),
    "bad id": (jsonl(TEXT | {"id": [1]}), r"has id=\[1\]; give text or a number"),
    "tag without image": (jsonl(ASKED), "has 1 <image> and 0 <video> tags but 0 images"),
    "image that is not there": (jsonl(ASKED | {"image": "a.png"}), "names 'a.png', which is not in"),
    "out of the root": (jsonl(ASKED | {"image": "x/../../a.png"}), "is not below the media root"),
    "absolute": (jsonl(ASKED | {"image": "/etc/passwd"}), "give a path relative to the media root"),
    "drive": (jsonl(ASKED | {"image": "C:/a.png"}), "names 'C:/a.png'"),
    "backslashes": (jsonl(ASKED | {"image": "..\\a.png"}), "with forward slashes"),
    "address": (jsonl(ASKED | {"image": "http://x.y/a.png"}), "not addresses"),
    "command": (jsonl(ASKED | {"image": "pipe:cat a"}), "not addresses"),
    "the root": (jsonl(ASKED | {"image": "."}), "is not below the media root"),
    "seconds and frames": (
        jsonl(ASKED | {"video": "all.jsonl", "start": 1, "end_frame": 4}),
        "has end_frame and start; give seconds or frames, not both",
    ),
    "end before start": (jsonl(ASKED | {"video": "all.jsonl", "start": 3, "end": 2}), "end=2.0 must be"),
    "a negative frame": (
        jsonl(ASKED | {"video": "all.jsonl", "start_frame": -1}),
        "start_frame=-1; give a number",
    ),
    "half a frame": (
        jsonl(ASKED | {"video": "all.jsonl", "end_frame": 1.5}),
        "give the whole number of a frame",
    ),
    "start as text": (jsonl(ASKED | {"video": "all.jsonl", "start": "1"}), "start='1'; give a number"),
    "tar out": (tarred(("../a.json", b"{}", {})), "has a member that names '../a.json'"),
    "tar absolute": (tarred(("/a.json", b"{}", {})), "has a member that names '/a.json'"),
    "tar link": (tarred(("a", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc"})), "is no plain file"),
    "tar device": (tarred(("a", b"", {"type": tarfile.CHRTYPE})), "is no plain file"),
    "tar twice": (tarred(("a.json", b"{}", {}), ("./a.json", b"{}", {})), "has the member 'a.json' twice"),
    "tar cut": (tarred(("a.json", bytes(9000), {}), cut=3000), "cut short|no whole tar"),
    "tar header cut": (
        tarred(("a.json", bytes(600), {}), ("b.json", bytes(600), {}), cut=1600),
        "no whole tar|cut",
    ),
    "tar cut between members": (
        tarred(("a.json", bytes(600), {}), ("b.json", b"{}", {}), cut=1536),
        "has no end mark",
    ),
    "tars joined": (joined_tars, "goes on behind its end"),
    "tar compressed": (
        tarred(("a.json", b"{}", {}), name="all.tgz", mode="w:gz"),
        "is compressed, but its members",
    ),
    "tar without records": (tarred(("a.png", png(1), {})), "has neither a .json nor a .txt member"),
    "tar empty": (tarred(), "hold no files"),
    "tar foreign media": (
        tarred(
            (
                "a.json",
                json.dumps(
                    ASKED | {"image": ["a.png", "b.png"], "conversations": [*turns(0), *turns(0)]}
                ).encode(),
                {},
            ),
            ("a.png", png(1), {}),
        ),
        "names 'b.png', but its example has",
    ),
    "parquet columns": (parquet(text=["a"]), "has the columns text; it needs 'conversations'"),
    "parquet empty": (parquet(conversations=pyarrow.array([], pyarrow.string())), "have no rows"),
    "parquet without bytes": (
        parquet(conversations=[turns(0)], image=[{"bytes": None, "path": "a.png"}]),
        "has 1 <image> and 0 <video> tags but 0 images",
    ),
    "parquet of paths": (
        parquet(conversations=[turns(0)], image=["a.png"]),
        "has no bytes in column 'image'",
    ),
    "parquet cut": (raw(b"PAR1" + bytes(50), "all.parquet"), "is no whole parquet file"),
    "no caption": (pictures_without_a_caption, "a.png has no caption: a.txt is not in"),
    "a folder of nothing": (lambda folder: folder, "has no images or videos"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(case, tmp_path):
    """When the corpus is opened, or when the record is read; no other error leaves a reader."""
    write, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        list(each(open_corpus(write(tmp_path))))
    assert "\n" not in str(error.value)


def test_files_of_two_kinds_and_a_root_that_is_none_are_refused(tmp_path):
    tarred(("a.json", json.dumps(TEXT).encode(), {}))(tmp_path)
    jsonl(TEXT)(tmp_path)
    with pytest.raises(UserError, match=r"are of different kinds \(JSON, tar\)"):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match="is tar and holds its media itself"):
        open_corpus(tmp_path / "all.tar", media=[str(tmp_path)])
    with pytest.raises(UserError, match="'absent' is neither a folder nor a tar"):
        open_corpus(tmp_path / "all.jsonl", media=["absent"])
    with pytest.raises(UserError, match="which is in none of"):
        jsonl(ASKED | {"image": "a.png"})(tmp_path)
        open_corpus(tmp_path / "all.jsonl", media=[str(tmp_path / "all.tar")])[0]


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    """The index is of the file as it was."""
    path = jsonl(TEXT, TEXT)(tmp_path)
    corpus = open_corpus(path)
    assert len(corpus) == 2
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="became shorter while it was read"):
        corpus[1]
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        add(tar, "a.json", json.dumps(TEXT).encode())
    corpus = open_corpus(tmp_path / "all.tar")
    assert len(corpus) == 1
    (tmp_path / "all.tar").write_bytes(bytes(600))
    with pytest.raises(UserError, match=r"ends inside of 'a\.json'"):
        corpus[0]


def test_a_tar_declares_more_than_it_has(tmp_path):
    """A size in a header is not believed."""
    path = tarred(("a.json", json.dumps(TEXT).encode(), {}))(tmp_path)
    data = bytearray(path.read_bytes())
    data[124:136] = b"77777777777\0"  # 8 GiB
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(struct.unpack("512B", data[:512]))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cut short|no whole tar"):
        open_corpus(path)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a/b.png", "a/b.png"), ("./a//b.png", "a/b.png"), ("a/../b c.png", "b c.png"), ("..a", "..a")],
)
def test_names_of_media_become_plain(name, plain):
    assert relative(name, "It") == plain
