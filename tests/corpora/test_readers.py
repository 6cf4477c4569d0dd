"""Corpora in their containers: the same records whichever it is, and one sentence for what is wrong."""

import io
import json
import pickle
import tarfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image as Pillow

from gaze_jax.corpora import index, json_files, tars
from gaze_jax.corpora.prepare import prepare
from gaze_jax.corpora.reading import PROMPT, open_corpus
from gaze_jax.corpora.records import Cut, each
from gaze_jax.data.sample import Image, Video
from gaze_jax.media.video import FrameSampling
from tests.helpers.videos import write_video

COUNT = 7


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars._index.cache_clear()


def pixels(number):
    return np.random.default_rng(number).integers(256, size=(6 + number, 9, 3), dtype=np.uint8)


def png(number):
    file = io.BytesIO()
    Pillow.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


def turns(number):
    asked = '<image>\nWhat [is] {this}, "really" \\?' if number != 3 else "Why?\u2028"
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": f"Number {number}, é日本."}]


def entry(number):
    """Record ``number``; the fourth is text only."""
    image = {} if number == 3 else {"image": f"pictures/{number}.png"}
    return {"id": f"n{number}", "conversations": turns(number), **image}


ENTRIES = [entry(number) for number in range(COUNT)]


def write_pictures(folder):
    (folder / "pictures").mkdir(parents=True)
    for number in range(COUNT):
        if number != 3:
            (folder / "pictures" / f"{number}.png").write_bytes(png(number))


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def as_lines(folder, separator="\n", head=""):
    write_pictures(folder)
    text = head + separator.join(json.dumps(one, ensure_ascii=False) for one in ENTRIES) + separator
    (folder / "all.jsonl").write_text(text, encoding="utf-8", newline="")
    return folder / "all.jsonl", ()


def as_windows_lines(folder):
    return as_lines(folder, separator="\r\n\r\n", head="\ufeff\r\n")


def as_list(folder):
    write_pictures(folder)
    (folder / "all.json").write_text(json.dumps(ENTRIES, indent=2), encoding="utf-8")
    return folder / "all.json", ()


def as_dense_list(folder):
    write_pictures(folder)
    text = json.dumps(ENTRIES, separators=(",", ":"), ensure_ascii=False)
    (folder / "all.json").write_text("\ufeff " + text + "\n", encoding="utf-8")
    return folder / "all.json", ()


def as_parquet(folder):
    folder.mkdir()
    cells = [None if n == 3 else {"bytes": png(n), "path": f"{n}.png"} for n in range(COUNT)]
    columns = {"id": [one["id"] for one in ENTRIES], "image": cells}
    columns["conversations"] = [one["conversations"] for one in ENTRIES]
    for name, part in (("a", slice(0, 4)), ("b", slice(4, None))):
        table = pyarrow.table({key: values[part] for key, values in columns.items()})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=3)
    return folder, ()


def as_webdataset(folder):
    folder.mkdir()
    for name, numbers in (("0", range(4)), ("1", range(4, COUNT))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in numbers:
                bare = {key: value for key, value in ENTRIES[number].items() if key != "image"}
                if number != 3:
                    add(tar, f"part/{number}.png", png(number))
                add(tar, f"part/{number}.json", json.dumps(bare).encode())
    return folder / "*.tar", ()


def with_media_in_tars(folder):
    folder.mkdir()
    for name, numbers in (("x", (0, 1, 2)), ("y", (4, 5, 6))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            add(tar, "pictures/", b"", type=tarfile.DIRTYPE)
            for number in numbers:
                add(tar, f"./pictures/{number}.png", png(number))
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, ENTRIES)), encoding="utf-8")
    return folder / "all.jsonl", tuple(str(folder / f"{name}.tar") for name in "xy")


def elsewhere(folder):
    write_pictures(folder / "media")
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, ENTRIES)), encoding="utf-8")
    return folder / "all.jsonl", (str(folder / "media"),)


def as_shards(folder):
    folder.mkdir()
    prepare(open_corpus(as_lines(folder / "lines")[0]), str(folder / "shards"), shards=3)
    return folder / "shards", ()


CONTAINERS = (
    as_shards,
    as_lines,
    as_windows_lines,
    as_list,
    as_dense_list,
    as_parquet,
    as_webdataset,
    with_media_in_tars,
    elsewhere,
)


@pytest.mark.parametrize("write", CONTAINERS)
def test_every_container_gives_the_same_records(write, tmp_path):
    """Ids, turns, pixels, in any order of reading, and from another process."""
    path, media = write(tmp_path / "corpus")
    corpus = open_corpus(path, media=media)
    assert len(corpus) == COUNT
    for number in (*reversed(range(COUNT)), 2):
        record = corpus[number]
        assert record.id == f"n{number}" and [message.role for message in record.messages] == [
            "user",
            "assistant",
        ]
        asked = turns(number)[0]["value"].removeprefix("<image>\n")
        shown = () if number == 3 else (Image(0),)
        assert record.messages[0].items == (*shown, asked)
        assert record.messages[1].text == turns(number)[1]["value"]
        assert len(record.images) == len(shown) and record.videos == ()
        for medium in record.images:
            np.testing.assert_array_equal(medium.image(), pixels(number))
    again = pickle.loads(pickle.dumps(corpus))
    assert [record.id for record in each(again)] == [f"n{number}" for number in range(COUNT)]
    assert again.fingerprint() == corpus.fingerprint() == json.loads(json.dumps(corpus.fingerprint()))


@pytest.mark.parametrize("write", CONTAINERS)
def test_a_fingerprint_is_of_the_content(write, tmp_path):
    """An id that is changed to another of the same length, in a file of the same size, is another corpus."""
    before = open_corpus(write(tmp_path / "one")[0])
    changed = [entry | {"id": "m" + entry["id"][1:]} for entry in ENTRIES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.ENTRIES", changed)
        after, same = open_corpus(write(tmp_path / "two")[0]), before.fingerprint()
    assert len(after) == len(before)
    if write is not as_webdataset:  # of a tar, the names, places and sizes of its members
        assert after.fingerprint() != same
    assert open_corpus(write(tmp_path / "three")[0]).fingerprint() == same


def test_several_files_are_one_corpus(tmp_path):
    """In order of their names, as a folder or as a pattern."""
    for name, part in (("b", ENTRIES[4:]), ("a", ENTRIES[:4])):
        bare = [{**one, "image": ""} | {"conversations": turns(3)} for one in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, bare)), encoding="utf-8")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        corpus = open_corpus(path)
        assert [corpus[i].id for i in range(len(corpus))] == [f"n{number}" for number in range(COUNT)]
        assert len(pickle.loads(pickle.dumps(corpus))) == COUNT


def test_captions_are_answers(tmp_path):
    """Of a folder of media, and of a webdataset with .txt members."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for name in ("2", "10", "inner/a.b"):
        (folder / f"{name}.png").write_bytes(png(1))
        (folder / f"{name}.txt").write_text(f" A {name}.\n", encoding="utf-8")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("10", "2"):
            add(tar, f"{name}.txt", f" A {name}.\n".encode())
            add(tar, f"{name}.png", png(1))
    found = {}
    for path, prompt in ((folder, PROMPT), (tmp_path / "all.tar", "What?")):
        corpus = open_corpus(path, prompt=prompt)
        for record in each(corpus):
            found[record.id, prompt] = record.messages[1].text
            assert record.messages[0].items == (Image(0), prompt)
            np.testing.assert_array_equal(record.images[0].image(), pixels(1))
    assert list(found) == [
        ("2", PROMPT),
        ("10", PROMPT),
        ("inner/a.b", PROMPT),
        ("10", "What?"),
        ("2", "What?"),
    ]
    assert found["inner/a.b", PROMPT] == "A inner/a.b."


def test_videos_are_cut_where_a_record_says(tmp_path):
    """By seconds or by frames, in a file, in a folder of frames, in a tar and in a parquet cell."""
    write_video(tmp_path / "walk.mp4", frames=40, fps=10)
    data = (tmp_path / "walk.mp4").read_bytes()
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A walk."}]
    cuts = ({}, {"start": 1.0, "end": 2.5}, {"start_frame": 10, "end_frame": 25}, {"start": 3})
    lines = [{"video": "walk.mp4", "conversations": asked, **cut} for cut in cuts]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for number, cut in enumerate(cuts):
            add(tar, f"{number}.mp4", data)
            add(tar, f"{number}.json", json.dumps({"conversations": asked, **cut}).encode())
    rows = {"conversations": [asked] * 4, "video": [{"bytes": data, "path": "walk.mp4"}] * 4}
    rows |= {key: [cut.get(key) for cut in cuts] for key in ("start", "end", "start_frame", "end_frame")}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "all.parquet")
    wanted = [
        np.linspace(0, 39, 4).astype(int),
        *([np.linspace(10, 25, 4).astype(int)] * 2),
        np.linspace(30, 39, 4).astype(int),
    ]
    every = np.stack(list(open_corpus(tmp_path / "all.jsonl")[0].videos[0].video(FrameSampling())))
    for name in ("all.jsonl", "all.tar", "all.parquet"):
        for record, indices in zip(each(open_corpus(tmp_path / name)), wanted, strict=True):
            assert record.messages[0].items == (Video(0), "What?")
            frames = record.videos[0].video(record.cut.of(FrameSampling(max_frames=4)))
            np.testing.assert_array_equal(np.stack(list(frames)), every[indices])
    assert open_corpus(tmp_path / "all.jsonl")[2].cut == Cut(start_frame=10, end_frame=25)


# --- The index ---


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path, _ = as_lines(tmp_path / "corpus")
    built = []
    original = json_files.line_spans
    monkeypatch.setattr(json_files, "line_spans", lambda name: built.append(name) or original(name))
    for _ in range(3):
        assert len(open_corpus(path)) == COUNT
    assert len(built) == 1
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(ENTRIES[3]) + "\n")
    assert len(open_corpus(path)) == COUNT + 1 and len(built) == 2
    (cached,) = index.folder().iterdir()
    for damage in (b"", cached.read_bytes()[:100], b"PK" + bytes(400)):
        cached.write_bytes(damage)
        assert len(open_corpus(path)) == COUNT + 1
    assert len(built) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, so nothing can be kept there
    assert len(open_corpus(path)) == COUNT + 1 and len(built) == 6


texts = st.text(alphabet=st.sampled_from('a"\\{}[],:\n \té日\u2028'), max_size=12)
values = st.recursive(
    texts | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
objects = st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=6)


@pytest.mark.parametrize("chunk", [5, 1 << 24])
@hypothesis.given(objects, st.sampled_from([None, 1]), st.booleans())
@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_elements_of_a_list_are_found_whatever_their_texts_hold(tmp_path, chunk, many, indent, ascii_only):
    """Brackets, quotes and backslashes in texts, nested lists; also where a chunk ends between them."""
    text = json.dumps(many, indent=indent, ensure_ascii=ascii_only).encode()
    (tmp_path / "a.json").write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_CHUNK", chunk)
        spans = json_files.list_spans(str(tmp_path / "a.json"))
    found = [json.loads(text[start:stop]) for start, stop in zip(spans["start"], spans["stop"], strict=True)]
    assert found == many


@pytest.mark.parametrize("chunk", [3, 1 << 24])
@hypothesis.given(
    st.lists(st.sampled_from(["", " ", "\t\r", '{"a": 1}', ' {"b": "\u2028"}\r', "x"]), max_size=8)
)
@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_lines_are_found_whatever_is_between_them(tmp_path, chunk, lines):
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_CHUNK", chunk)
        spans = json_files.line_spans(str(tmp_path / "a.jsonl"))
    data = "\n".join(lines).encode()
    found = [data[start:stop].decode() for start, stop in zip(spans["start"], spans["stop"], strict=True)]
    assert found == [line for line in lines if line.strip()]
    assert spans["number"].tolist() == [n for n, line in enumerate(lines, start=1) if line.strip()]
