"""Safetensors: what is refused, and that what is written is what the library writes."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gaze_jax.convert import shards
from gaze_jax.errors import UserError


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "a.weight": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        "c": rng.normal(size=(7,)).astype(np.float16),
        "scalar": np.array(3, np.float32),
    }


def raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, end: int, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def test_a_file_read_and_written_is_the_same_file(tmp_path, tensors):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file(tensors, first, {"format": "pt"})
    file = shards.open_file(first)
    writer = shards.Writer(
        second, {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()}, file.metadata
    )
    for name, tensor in reversed(file.tensors.items()):
        np.testing.assert_array_equal(shards.read(tensor), tensors[name])
        writer.write(name, shards.read(tensor))
    writer.close()
    assert first.read_bytes() == second.read_bytes()


def test_the_writer_refuses_a_wrong_size_and_a_tensor_that_never_came(tmp_path):
    writer = shards.Writer(tmp_path / "x.safetensors", {"a": ("F32", (2,)), "b": ("F32", (2,))}, {})
    with pytest.raises(ValueError, match="a has 12 bytes"):
        writer.write("a", np.zeros(3, np.float32))
    writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"\['b'\]"):
        writer.close()


BAD_FILES = {
    "empty": b"",
    "short": b"\x10\x00",
    "huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x04evil\x94.",
    "not JSON": struct.pack("<Q", 4) + b"{a:1" + b"\0" * 8,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_not_safetensors(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(UserError, match=r"model\.safetensors is not a valid safetensors file"):
        shards.open_file(path)


BAD_HEADERS = {
    "truncated": ({"a": entry(0, 4), "b": entry(4, 8)}, b"\0" * 4),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"\0" * 6),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
    "trailing": ({"a": entry(0, 4)}, b"\0" * 9),
    "size": ({"a": entry(0, 4, (2,))}, b"\0" * 4),
    "duplicate": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_headers_that_lie(tmp_path, name):
    path = raw(tmp_path / "model.safetensors", *BAD_HEADERS[name])
    with pytest.raises(UserError, match="not a valid safetensors file"):
        shards.open_file(path)


def test_the_duplicate_is_named(tmp_path):
    path = raw(tmp_path / "model.safetensors", *BAD_HEADERS["duplicate"])
    with pytest.raises(UserError, match="key 'a' is given twice"):
        shards.open_file(path)


def sharded(directory: Path, files: dict[str, list[str]], weight_map: dict[str, str]) -> Path:
    for file, names in files.items():
        save_file({name: np.zeros(1, np.float32) for name in names}, directory / file)
    (directory / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_open(tmp_path):
    sharded(tmp_path, {ONE: ["a"], TWO: ["b"]}, {"a": ONE, "b": TWO})
    assert [list(file.tensors) for file in shards.open_checkpoint(tmp_path)] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("files", "weight_map", "message"),
    [
        ({ONE: ["a"], TWO: ["a", "b"]}, {"a": ONE, "b": TWO}, f"a is in both {ONE} and {TWO}"),
        ({ONE: ["a", "c"], TWO: ["b"]}, {"a": ONE, "b": TWO}, f"c is in {ONE}, the index says None"),
        ({ONE: ["a"], TWO: ["b"]}, {"a": ONE, "b": TWO, "d": TWO}, f"d is not in {TWO}"),
        ({ONE: ["a"]}, {"a": ONE, "b": TWO}, f"{TWO} does not exist"),
        ({ONE: ["a"]}, {"a": f"../{ONE}"}, "which is not a file name in this directory"),
        ({ONE: ["a"]}, {"a": f"/tmp/{ONE}"}, "which is not a file name in this directory"),
        ({ONE: ["a"]}, {"a": "pytorch_model.bin"}, "which is not a file name in this directory"),
        ({ONE: ["a"]}, {}, "has no weight_map"),
    ],
)
def test_indexes_that_do_not_fit(tmp_path, files, weight_map, message):
    sharded(tmp_path, files, weight_map)
    with pytest.raises(UserError, match=message):
        shards.open_checkpoint(tmp_path)


def test_a_directory_with_both_layouts_is_refused(tmp_path):
    sharded(tmp_path, {ONE: ["a"], shards.SINGLE: ["a"]}, {"a": ONE})
    with pytest.raises(UserError, match="unclear which is meant"):
        shards.open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.npz", "model.pt", "flax_model.msgpack"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=rf"{name}: such files can run code.*save_pretrained"):
        shards.open_checkpoint(tmp_path)


def test_an_empty_directory(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        shards.open_checkpoint(tmp_path)


def test_json_keys_are_given_once(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "qwen2", "model_type": "qwen3"}')
    with pytest.raises(UserError, match="'model_type' is given twice"):
        shards.read_json(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        shards.read_json(path)
