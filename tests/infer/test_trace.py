import dataclasses
import io
import json
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from gaze_jax.errors import UserError
from gaze_jax.infer import trace_file
from gaze_jax.infer.trace import LONGEST, Picture, most_concentrated, picture
from gaze_jax.infer.trace_file import load, rounded_down, save
from tests.helpers.traces import make_media, make_trace


def both(seed=0):
    """Media of all kinds: two views of an image, and three frames in slabs of two."""
    return make_media(np.random.default_rng(seed), views=2, frames=3, slab=2)


def equal(one, other):
    """Asserts that two traces hold the same, but for the error of float16."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("attention", "dense"):
            assert a.dtype == b.dtype == np.float32
            assert (b <= a).all() and (a - b <= np.maximum(a * 2**-10, 2**-24)).all()
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif field.name == "views":
            for first, second in zip(a, b, strict=True):
                np.testing.assert_array_equal(first.regions, second.regions)
                assert first.regions.dtype == second.regions.dtype
                bare = [dataclasses.replace(view, regions=None) for view in (first, second)]
                assert dataclasses.astuple(bare[0]) == dataclasses.astuple(bare[1])
        elif field.name == "pictures":
            assert [dataclasses.astuple(p) for p in a] == [dataclasses.astuple(p) for p in b]
        else:
            assert a == b, field.name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selectors": 2, "top_k": 3},
        {"top_k": None},
        {"top_k": (1, 3, 2)},
        {"tokens": ("é\n", "\ufffd", "</script>", "", "日"), "question": "first\nsecond"},
        {"layers": 1, "heads": 1, "top_k": 1, "tokens": ("a",)},
    ],
)
def test_what_is_saved_is_loaded(options, tmp_path):
    """Everything exactly but shares of the softmax; a second round changes nothing at all."""
    trace = make_trace(media=both(), **options)
    save(trace, tmp_path / "a.gaze")
    found = load(tmp_path / "a.gaze")
    equal(trace, found)
    save(found, tmp_path / "b.gaze")
    assert (tmp_path / "a.gaze").read_bytes() == (tmp_path / "b.gaze").read_bytes()


def test_what_was_not_recorded_stays_absent(tmp_path):
    """A trace of before version 3 has no probabilities, prompt or keys of regions; it is written as it is."""
    bare = dataclasses.replace(make_trace(), prompt=(), probabilities=None, region_keys=None)
    save(bare, tmp_path / "a.gaze")
    again = load(tmp_path / "a.gaze")
    assert (again.prompt, again.probabilities, again.region_keys) == ((), None, None)
    equal(bare, again)


def test_shares_are_rounded_towards_zero():
    """By less than the documented error, over the whole range of float32 shares."""
    rng = np.random.default_rng(0)
    shares = np.concatenate([[0, 1], 10 ** rng.uniform(-12, 0, 100_000)]).astype(np.float32)
    found = rounded_down(shares).astype(np.float32)
    assert (found <= shares).all()
    assert (shares - found < np.maximum(shares * 2**-10, 2**-24) + (shares == 0)).all()
    assert found[0] == 0 and found[1] == 1


def test_a_file_is_readable_with_numpy_alone(tmp_path):
    """As docs/viewer.md says: no pickle, ids as small as they fit, JSON in ``meta``."""
    trace = make_trace(media=both(), selectors=2)
    save(trace, tmp_path / "a.gaze")
    with np.load(tmp_path / "a.gaze", allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
        assert (meta["format"], meta["version"]) == ("gaze_jax.trace", 3)
        assert meta["shape"] == {"T": 5, "L": 3, "Hs": 2, "J": 2, "H": 4, "R": trace.regions}
        assert file["selected"].dtype == np.int16 and file["grids"].dtype == np.int16
        assert file["attention"].dtype == file["dense"].dtype == np.float16
        h, w = meta["views"][0]["grid"]
        np.testing.assert_array_equal(file["grids"][: h * w].reshape(h, w), trace.views[0].regions)
        jpeg = file["jpegs"][: meta["pictures"][0]["bytes"]].tobytes()
        np.testing.assert_array_equal(Image.open(io.BytesIO(jpeg)), trace.pictures[0].pixels())


def test_ids_that_int16_cannot_hold_are_kept(tmp_path):
    """40,000 regions."""
    media = make_media(np.random.default_rng(0))
    views = (dataclasses.replace(media[0][0], regions=np.arange(40_000, dtype=np.int32).reshape(200, 200)),)
    trace = make_trace(media=(views, media[1]), tokens=("a",), layers=1, heads=1, top_k=39_999)
    save(trace, tmp_path / "a.gaze")
    equal(trace, load(tmp_path / "a.gaze"))


def test_a_copy_is_small_and_upright():
    """The longest side is at most 640, the size that of the original."""
    pixels = np.zeros((300, 1600, 3), np.uint8)
    pixels[:, 800:] = 255
    copy = picture(pixels, video=True, index=2, frame=5, seconds=1.5)
    assert copy.size == (300, 1600) and copy.key == (True, 2, 5)
    assert copy.pixels().shape == (120, LONGEST, 3)
    assert copy.pixels()[:, :300].max() < 30 and copy.pixels()[:, 340:].min() > 225
    assert picture(pixels[:9, :7]).pixels().shape == (9, 7, 3)


def test_a_mask_holds_what_was_selected():
    """An unused slot selects nothing."""
    trace = make_trace(media=both(), selectors=2)
    mask = trace.mask()
    assert mask.shape == (5, 3, 2, trace.regions)
    for at in np.ndindex(5, 3, 2):
        assert set(np.flatnonzero(mask[at])) == set(trace.selected[at]) - {-1}


def test_the_most_concentrated_layer_is_where_heads_agree():
    """By how many regions their choices spread over; by attention where they agree equally, or dense."""
    trace = make_trace(layers=4, heads=6, top_k=3, media=both())
    selected, scores = trace.selected.copy(), np.ones_like(trace.scores)
    selected[:] = np.arange(18).reshape(6, 3)  # heads differ
    selected[:, 2, :5] = np.arange(3)  # five of six agree
    attention = np.full_like(trace.attention, 0.2)
    attention[:, 1, 1:] = 0  # all attention is of one head
    trace = dataclasses.replace(trace, selected=selected, scores=scores, attention=attention)
    assert most_concentrated(trace) == 2
    same = np.broadcast_to(np.arange(3, dtype=np.int32), selected.shape).copy()
    attention = np.full_like(trace.attention, 0.2)
    attention[:, 1] = 0.5, 0.05, 0.05
    assert most_concentrated(dataclasses.replace(trace, selected=same, attention=attention)) == 1
    assert most_concentrated(dataclasses.replace(trace, selected=same, attention=0 * attention)) == 0
    dense = np.full_like(trace.dense, 0.5 / trace.regions)
    dense[:, 3, :, 0] += 0.4
    bare = {name: getattr(trace, name)[..., :0] for name in ("selected", "scores", "attention")}
    assert most_concentrated(dataclasses.replace(trace, top_k=None, dense=dense, **bare)) == 3


def test_a_view_finds_its_picture():
    """Views of one image share one."""
    trace = make_trace(media=both())
    assert trace.picture_of(trace.views[0]) is trace.picture_of(trace.views[1]) is trace.pictures[0]
    assert trace.picture_of(trace.views[3]).frame == 1


def changed(name, at, value):
    """The array ``name`` of a trace with one element changed."""
    array = getattr(make_trace(media=both()), name).copy()
    array[at] = value
    return {name: array}


WRONG = {
    "select_per": ({"select_per": "layer"}, "select_per='layer' must be one of head, kv_head"),
    "selectors": ({"select_per": "head", "selectors": 2}, "does not fit 2 selectors of 4 heads"),
    "top_k": ({"top_k": 0}, "top_k=0 must be at least 1"),
    "layer of top_k": ({"top_k": (2, 0, 1)}, r"top_k=\(2, 0, 1\) must be at least 1"),
    "layers of top_k": ({"top_k": (2, 1)}, "top_k has 2 numbers for 3 layers; give one for each"),
    "dense": ({"top_k": None}, "top_k=None but J=2"),
    "tokens": ({"tokens": ("a",)}, "dense has 5 tokens but tokens has 1"),
    "text": ({"answer": "\ud800"}, "half a surrogate pair"),
    "shape": ({"scores": np.zeros((5, 3, 4, 3), np.float32)}, r"scores must be float32 \[5, 3, 4, 2\]"),
    "dtype": ({"visual_tokens": np.full(5, 60)}, r"visual_tokens must be int32 \[5\], got int64"),
    "axes": ({"dense": np.zeros((5, 3, 4), np.float32)}, r"dense must be \[T, L, H, R\]"),
    "none": ({"views": (), "pictures": ()}, "nothing to look at"),
    "picture": ({"pictures": both()[1][:-1]}, "for each image and frame"),
    "twice": ({"pictures": (*both()[1], both()[1][0])}, "for each image and frame"),
    "high": (changed("selected", (1, 1, 1, 0), 99), "selected must be between -1 and"),
    "low": (changed("selected", (1, 1, 1, 0), -2), "selected must be between -1 and"),
    "hole": (changed("selected", (1, 1, 1, 0), -1), "unused slot, -1, before a used"),
    "scores": (changed("scores", (1, 1, 1, 0), np.nan), "scores must be finite"),
    "unused score": (changed("scores", (0, 0, 0, 1), 1), "scores must be finite, and 0"),
    "unused share": (changed("attention", (0, 0, 0, 1), 0.1), "attention must be 0 in unused"),
    "negative": (changed("dense", (0, 0, 0, 0), -0.1), "dense must hold shares"),
    "nan": (changed("attention", (1, 0, 0, 0), np.nan), "attention must hold shares"),
    "much": (changed("dense", (0, 0, 0, 0), 1.0), "dense must hold shares"),
    "entries": (changed("entries", (0, 0, 3), -1), "at least 0"),
    "visual": (changed("entries", (0, 0, 0), 1000), "more visual keys than visual_tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_trace_that_contradicts_itself_is_refused(case):
    """One sentence each."""
    change, message = WRONG[case]
    options = {"selectors": change["selectors"]} if "selectors" in change else {}
    trace = make_trace(media=both(), **options)
    change = {name: value for name, value in change.items() if name != "selectors"}
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(trace, **change)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_region_selected_twice_is_refused():
    """By one query."""
    trace = make_trace(media=both())
    selected = trace.selected.copy()
    selected[2, 1, 3, 1] = selected[2, 1, 3, 0]
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(trace, selected=selected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": np.full((1, 1), 99, np.int32)}, "outside of 0 to"),
        ({"regions": np.full((1, 1), -1, np.int32)}, "outside of 0 to"),
        ({"regions": np.zeros(3, np.int32)}, r"regions \[h, w\]"),
        ({"corners": (0.0, 0.0, 0.0, 1.0)}, "no rectangle"),
        ({"corners": (0.0, 0.0, np.inf, 1.0)}, "no rectangle"),
    ],
)
def test_a_view_that_cannot_be_drawn_is_refused(change, message):
    """Its regions and its corners."""
    trace = make_trace(media=both())
    views = (dataclasses.replace(trace.views[0], **change), *trace.views[1:])
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trace, views=views)


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def large():
    file = io.BytesIO()
    Image.new("RGB", (LONGEST + 1, 4)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 1.0}, "an image has none"),
        ({"video": True}, "a frame has a time"),
        ({"video": True, "seconds": float("nan")}, "give a number"),
        ({"size": (0, 5)}, "at least 1"),
        ({"jpeg": b"no"}, "not a JPEG"),
        ({"jpeg": png()}, "not a JPEG"),
        ({"jpeg": large()}, "641x4 pixels"),
    ],
)
def test_a_picture_that_is_none_is_refused(change, message):
    """Also another format than the viewers are told of."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            Picture(False, 0, 0, None, (4, 4), picture(np.zeros((4, 4, 3), np.uint8)).jpeg), **change
        )


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
