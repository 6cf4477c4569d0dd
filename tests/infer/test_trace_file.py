"""Trace files that are damaged, edited, too large or not traces: one sentence, and no memory for them."""

import io
import json
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from gaze_jax.errors import UserError
from gaze_jax.infer import trace_file
from gaze_jax.infer.trace_file import load, save
from tests.helpers.traces import make_trace
from tests.infer.test_trace import both, equal


def rewritten(path, change, compression=zipfile.ZIP_DEFLATED):
    """Rewrite the file after ``change`` has altered its entries {name: bytes}."""
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    return file.getvalue()


def edit(**fields):
    """A change of the JSON; a value may be a function of the old one."""

    def change(entries):
        meta = json.loads(np.load(io.BytesIO(entries["meta.npy"])).tobytes())
        for name, value in fields.items():
            meta[name] = value(meta.get(name)) if callable(value) else value
        entries["meta.npy"] = npy(np.frombuffer(json.dumps(meta).encode(), np.uint8))

    return change


def put(name, array):
    return lambda entries: entries.update({f"{name}.npy": npy(array)})


def without(name):
    return lambda entries: entries.pop(f"{name}.npy")


def lying(entries):
    """An array and the JSON declare 111 GiB that are not there."""
    head, many = b"(5, 3, 4, 18), }", b"(5, 3, 4, 999999999), }"
    assert head in entries["dense.npy"]
    entries["dense.npy"] = entries["dense.npy"].replace(head.ljust(len(many)), many)
    edit(shape=lambda s: s | {"R": 999_999_999})(entries)


def first(items, **fields):
    return [items[0] | fields, *items[1:]]


def cut(entries):
    """The last picture lacks its end."""
    jpegs = np.load(io.BytesIO(entries["jpegs.npy"]))
    entries["jpegs.npy"] = npy(jpegs[:-200])
    edit(pictures=lambda p: [*p[:-1], p[-1] | {"bytes": p[-1]["bytes"] - 200}])(entries)


DAMAGE = {
    "no meta": (without("meta"), "has no entry 'meta'"),
    "no array": (without("dense"), "its entries must be"),
    "more": (put("more", np.zeros(1)), "its entries must be"),
    "format": (edit(format="other"), "does not say format"),
    "version": (edit(version=4), "has format_version 4 but this gaze_jax reads 1, 2 and 3"),
    "prompt": (edit(prompt=lambda p: [*p, 99]), "prompt must hold text and numbers of views"),
    "prompt item": (edit(prompt=[None]), "prompt must hold text and numbers of views"),
    "prompt bool": (edit(prompt=[True]), "prompt must hold text and numbers of views"),
    "surrogate": (edit(prompt=["\ud800"]), "half a surrogate pair"),
    "probability": (put("probabilities", np.full(5, 1.5, np.float32)), "between 0 and 1"),
    "probability nan": (put("probabilities", np.full(5, np.nan, np.float32)), "between 0 and 1"),
    "keys": (put("region_keys", np.full(18, -1, np.int32)), "region_keys must be numbers of keys"),
    "keys short": (
        put("region_keys", np.zeros(2, np.int32)),
        r"region_keys is <i4 \[2\], which does not match",
    ),
    "list": (lambda e: e.update({"meta.npy": npy(np.frombuffer(b"[]", np.uint8))}), "does not say format"),
    "json": (lambda e: e.update({"meta.npy": npy(np.frombuffer(b"{", np.uint8))}), "is damaged"),
    "deep": (lambda e: e.update({"meta.npy": npy(np.frombuffer(b"[" * 99_999, np.uint8))}), "too deeply"),
    "unknown": (edit(colour=1), "must have the fields"),
    "type": (edit(question=1), "question of meta is int"),
    "token": (edit(tokens=lambda t: [1, *t[1:]]), "tokens must be strings"),
    "count": (edit(tokens=lambda t: t[1:]), "dense has 5 tokens but tokens has 4"),
    "bool": (edit(top_k=True), "top_k of meta is bool"),
    "bools": (edit(top_k=[True, 1, 1]), "top_k must be 3 whole numbers"),
    "top_k": (edit(top_k=[1, 1]), "top_k has 2 numbers for 3 layers"),
    "T": (edit(shape=lambda s: s | {"T": 6}), "does not match its meta"),
    "negative": (edit(shape=lambda s: s | {"T": -1}), "whole numbers, 0 or more"),
    "axis": (edit(shape=lambda s: s | {"X": 1}), "shape must have the fields"),
    "view": (edit(views=lambda u: first(u, grid=[2])), "grid must be 2"),
    "grid": (edit(views=lambda u: first(u, grid=[5, 4])), "does not match its meta"),
    "corners": (edit(views=lambda u: first(u, corners=["0", 0, 1, 1])), "four numbers"),
    "far": (edit(views=lambda u: first(u, corners=[0, 0, 10**400, 1])), "is damaged"),
    "bytes": (edit(pictures=lambda p: first(p, bytes=1)), "does not match its meta"),
    "moved": (
        edit(
            pictures=lambda p: [
                p[0] | {"bytes": p[0]["bytes"] + 9},
                p[1] | {"bytes": p[1]["bytes"] - 9},
                *p[2:],
            ]
        ),
        "not a JPEG",
    ),
    "dtype": (put("scores", np.zeros((5, 3, 4, 2))), "scores is <f8"),
    "order": (put("scores", np.zeros((5, 3, 4, 2), ">f4")), "scores is no array"),
    "fortran": (put("scores", np.asfortranarray(np.zeros((5, 3, 4, 2), np.float32))), "scores is no array"),
    "objects": (
        lambda e: e.update({"scores.npy": npy(np.zeros(1, np.float32)).replace(b"<f4", b"|O8")}),
        "scores is no array",
    ),
    "text": (lambda e: e.update({"scores.npy": b"hello"}), "scores is no array"),
    "lying": (lying, "dense does not have the length that it declares"),
    "short": (lambda e: e.update({"dense.npy": e["dense.npy"][:-2]}), "not have the length"),
    "long": (lambda e: e.update({"dense.npy": e["dense.npy"] + b"\0"}), "not have the length"),
    "index": (edit(pictures=lambda p: first(p, index=-1)), "whole numbers, 0 or more"),
    "frame": (edit(pictures=lambda p: first(p, frame=1 << 40)), "whole numbers, 0 or more"),
    "outside": (edit(views=lambda u: first(u, corners=[0, 0, 1e6, 1e6])), "far outside of its picture"),
    "moment": (edit(pictures=lambda p: [*p[:-1], p[-1] | {"seconds": 10**400}]), "is damaged"),
    "cut picture": (cut, "not a JPEG file"),
    "values": (put("entries", np.full((5, 3, 4), np.nan, np.float32)), "entries and visual_tokens must be"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_is_no_trace_is_refused(case, tmp_path):
    """In one sentence that names it."""
    change, message = DAMAGE[case]
    path = tmp_path / "a.gaze"
    save(make_trace(media=both()), path)
    rewritten(path, change)
    refused(path, message)


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_file_that_is_cut_or_changed_is_refused(tmp_path):
    """At any of many places: a sentence, or (in bytes that mean nothing) the same trace."""
    path = tmp_path / "a.gaze"
    trace = make_trace()
    save(trace, path)
    whole, rng, same = path.read_bytes(), np.random.default_rng(0), 0
    for cut in range(0, len(whole), 997):
        path.write_bytes(whole[:cut])
        refused(path, "not a trace|damaged|no entry")
    for at in rng.integers(len(whole), size=300):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        try:
            found = load(path)
        except UserError as error:
            assert repr(str(path)) in str(error)
        else:
            equal(trace, found)
            same += 1
    assert same < 100


def test_a_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A small file that declares more than the limit; nothing of it but the JSON is decompressed."""
    path = tmp_path / "a.gaze"
    save(make_trace(), path)
    shape = (5, 3, 4, 100_000)
    rewritten(path, put("dense", np.zeros(shape, np.float16)))
    rewritten(path, edit(shape=lambda s: s | {"R": shape[-1]}))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(trace_file, "MAX_BYTES", 1 << 20)
    opened = []
    monkeypatch.setattr(trace_file, "_read_array", recorded(opened, trace_file._read_array))
    refused(path, "more than the limit of 1048576")
    assert opened == ["meta"]


def test_a_bomb_that_declares_little_is_read_no_further(tmp_path):
    """More compressed zeros than the headers say, and their checksum: memory for what they say is taken."""
    path, more = tmp_path / "a.gaze", bytes(64 << 20)
    save(make_trace(), path)
    shape = (5, 3, 4, 1000)
    dense = npy(np.zeros(shape, np.float16))
    rewritten(path, edit(shape=lambda s: s | {"R": shape[-1]}))
    rewritten(path, put("region_keys", np.zeros(shape[-1], np.int32)))
    rewritten(path, lambda e: e.update({"dense.npy": dense + more}))
    whole = path.read_bytes()
    for true, told in ((len(dense + more), len(dense)), (zlib.crc32(dense + more), zlib.crc32(dense))):
        assert whole.count(struct.pack("<L", true)) == 2
        whole = whole.replace(struct.pack("<L", true), struct.pack("<L", told))
    path.write_bytes(whole)
    tracemalloc.start()
    assert load(path).dense.shape == shape
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 8 << 20


@pytest.mark.parametrize("way", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(way, tmp_path):
    """Their readers do not limit the memory that they use."""
    path = tmp_path / "a.gaze"
    save(make_trace(), path)
    rewritten(path, lambda entries: None, way)
    refused(path, "compressed in a way that NumPy does not use")


def test_a_trace_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    """What could not be read again."""
    monkeypatch.setattr(trace_file, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="more than the limit of 1000"):
        save(make_trace(), tmp_path / "a.gaze")
    assert not list(tmp_path.iterdir())


def recorded(names, function):
    def wrapper(entry, name, *rest):
        names.append(name)
        return function(entry, name, *rest)

    return wrapper


def test_other_files_are_refused(tmp_path):
    """Missing, a folder, empty, another format, a zip of something else, not writable."""
    for name, message in {"absent": "No such file", ".": "directory", "empty": "not a trace"}.items():
        if name == "empty":
            (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, message)
    np.savez(tmp_path / "b.npz", a=np.zeros(3))
    refused(tmp_path / "b.npz", "has no entry 'meta'")
    with pytest.raises(UserError, match="cannot be written"):
        save(make_trace(), tmp_path / "absent" / "a.gaze")
