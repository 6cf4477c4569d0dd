"""Tokenizers as transformers loads them: tokens of every file, normalisers, saved padding; Hub ids; LFS."""

import json
import unicodedata

import pytest
import tokenizers
from tokenizers import normalizers

from gaze_jax.convert import hub, shards
from gaze_jax.convert.source import commit_of
from gaze_jax.convert.tokenizer_files import read_tokenizer
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models import DUMMY
from tests.helpers import models

transformers = pytest.importorskip("transformers")

MODEL = models.changed(DUMMY, decoder={"vocab_size": 600})


@pytest.fixture
def directory(tmp_path):
    """A small byte-level BPE tokenizer with NFC, as Qwen's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["where is the café in the picture, été, 한국어"] * 9, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory, name, value):
    (directory / name).write_text(json.dumps(value), encoding="utf-8")


def both(directory):
    """Ids of a text by us and by transformers."""
    ours = Tokenizer(read_tokenizer(directory, MODEL))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)

    def ids(text):
        return ours.encode(text)[0], theirs(text, add_special_tokens=False)["input_ids"]

    return ids


TEXTS = [
    "where is the café?",
    unicodedata.normalize("NFD", "where is the café?"),
    unicodedata.normalize("NFD", "한국어 été"),
    "e\u0301\u0327 combining in another order",
    "\u212b and \u2126 are signs that NFC replaces",
    "a\u0301",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "none"])
def test_a_normaliser_gives_the_ids_of_transformers(kind, text, directory):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([]) if kind == "none" else getattr(normalizers, kind)()
    backend.save(str(directory / "tokenizer.json"))
    ours, theirs = both(directory)(text)
    assert ours == theirs


def test_a_character_without_a_token_is_refused_in_any_form():
    """A normaliser joins characters, but does not excuse one that is dropped."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "é": 1, "<|im_end|>": 2}, merges=[]))
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.encode("ae\u0301")[0] == [0, 1]
    for text in ("ab", "ae\u0301b"):
        with pytest.raises(ValueError, match="no token"):
            tokenizer.encode(text)


def test_saved_padding_and_truncation_are_ignored(directory):
    plain = Tokenizer(read_tokenizer(directory, MODEL)).encode("where is the picture?")
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    assert Tokenizer(read_tokenizer(directory, MODEL)).encode("where is the picture?") == plain


def described(content, **flags):
    """A token as tokenizer_config.json describes it."""
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": True} | off | flags


CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"added_tokens_decoder": {"400": described("<image>"), "401": described("<v>")}}},
        {CONFIG: {"added_tokens_decoder": {"400": described("<image>", lstrip=True)}}},
        {CONFIG: {"added_tokens_decoder": {"400": described("<it>", special=False, normalized=True)}}},
        {CONFIG: {}, "added_tokens.json": {"<image>": 400, "<video>": 401}},
        {CONFIG: {}, "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": described("<e>")}},
        {CONFIG: {"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]}},
        {CONFIG: {"extra_special_tokens": {"image_token": "<image>"}}},
    ],
    ids=["described", "strips", "ordinary", "added", "map", "listed", "named"],
)
def test_tokens_of_other_files_are_added_as_by_transformers(files, directory):
    for name, value in files.items():
        write(directory, name, value)
    ids = both(directory)
    for text in ("a <image> b", "a<v>b <it> c", "<pad><e><a><b>", "x <video>", "<|im_end|>"):
        ours, theirs = ids(text)
        assert ours == theirs, text


def test_a_complete_tokenizer_is_kept_byte_for_byte(directory):
    write(directory, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    assert read_tokenizer(directory, MODEL) == text


def test_tokens_without_a_row_are_not_added(directory):
    write(directory, "tokenizer_config.json", {"pad_token": "<pad>"})
    size = Tokenizer((directory / "tokenizer.json").read_text(encoding="utf-8")).vocab_size
    config = models.changed(DUMMY, decoder={"vocab_size": size})
    assert Tokenizer(read_tokenizer(directory, config)).vocab_size == size
    assert Tokenizer(read_tokenizer(directory, MODEL)).vocab_size == size + 1


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "must map ids to tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 5}}', "which is not understood"),
        ("tokenizer_config.json", '{"pad_token": {"content": "p", "odd": true}}', "which is not understood"),
    ],
)
def test_what_cannot_be_understood_is_refused(name, content, match, directory):
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=match) as error:
        read_tokenizer(directory, MODEL)
    assert str(directory / name) in str(error.value)


def test_a_tokenizer_that_cannot_be_read_does_not_keep_weights_from_loading(directory):
    (directory / "tokenizer.json").write_text("{}")
    assert read_tokenizer(directory, MODEL) == "{}"
    with pytest.raises(ValueError, match="Tokenizer JSON cannot be read"):
        Tokenizer("{}")
    (directory / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"tokenizer\.json is not UTF-8 text"):
        read_tokenizer(directory, MODEL)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(name, directory):
    (directory / name).write_text(POINTER)
    with pytest.raises(UserError, match="is a Git LFS pointer, not the file itself; run `git lfs pull`"):
        if name == "tokenizer.json":
            read_tokenizer(directory, MODEL)
        elif name == "config.json":
            shards.read_json(directory / name)
        else:
            shards.open_file(directory / name)


class Hub:
    """Stands for the Hub: what was asked of it, and a download."""

    def __init__(self, monkeypatch, folder, error=None):
        self.asked, self.folder, self.error = [], folder, error
        module = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(module, "snapshot_download", self.download)
        monkeypatch.setattr(module.HfApi, "model_info", lambda _, name, revision: self.info(name, revision))

    def info(self, name, revision):
        self.asked.append(revision)
        if self.error:
            raise self.error
        return type("Info", (), {"sha": "c" * 40})

    def download(self, name, revision, allow_patterns=None, local_files_only=False):
        if local_files_only and self.error and revision != "cached":
            raise FileNotFoundError("nothing here")
        where = (
            self.folder
            / f"models--{name.replace('/', '--')}"
            / "snapshots"
            / ("c" * 40 if len(revision) < 40 else revision)
        )
        where.mkdir(parents=True, exist_ok=True)
        return str(where)


@pytest.mark.parametrize(("suffix", "asked"), [("", ["main"]), ("@v1.0", ["v1.0"]), ("@" + "a" * 40, [])])
def test_a_branch_or_tag_becomes_its_commit(suffix, asked, monkeypatch, tmp_path):
    seen = Hub(monkeypatch, tmp_path)
    found = hub.resolve(f"Qwen/Qwen3-4B{suffix}")
    assert seen.asked == asked
    assert commit_of(found) == found.name == ("c" * 40 if asked else "a" * 40)
    assert commit_of(tmp_path) is None


def test_without_network_what_was_downloaded_is_used(monkeypatch, tmp_path):
    Hub(monkeypatch, tmp_path, ConnectionError("no network"))
    assert hub.resolve("Qwen/Qwen3-4B@cached").name == "c" * 40
    with pytest.raises(UserError, match=r"cannot be downloaded from the Hub \(no network\)"):
        hub.resolve("Qwen/Qwen3-4B@v2")
