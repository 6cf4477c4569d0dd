"""The tokenizer of a Hugging Face directory, completed as transformers does.

``tokenizer.json`` may lack tokens that only ``tokenizer_config.json``, or in older directories
``special_tokens_map.json`` and ``added_tokens.json``, name. transformers adds them when it loads a directory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from gaze_jax.convert.shards import read_json, refuse_pointer
from gaze_jax.errors import UserError
from gaze_jax.models.config import MLLMConfig, VisionConfig

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = {"lstrip", "rstrip", "normalized", "single_word", "special"}
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def read_tokenizer(directory: Path, config: MLLMConfig | VisionConfig) -> str | None:
    """The content of a directory's tokenizer.json, with the tokens that its other files name.

    Args:
      directory: a Hugging Face directory with a language model.
      config: its model. Tokens for which its embedding table has no row are not added.

    Returns:
      JSON for :class:`gaze_jax.data.tokenizer.Tokenizer`, the file's own text if it lacks no token; None if
      there is no tokenizer.json.

    Raises:
      UserError: a file is not valid JSON, or a token in it is not described as transformers does.
    """
    assert isinstance(config, MLLMConfig), "a tower has no tokenizer"
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    refuse_pointer(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; download it again.") from error
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception:  # the library raises bare Exception
        return text  # weights can be loaded without it; who asks questions says what is wrong
    known = {token.content: repr(token) for token in backend.get_added_tokens_decoder().values()}
    next_id = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    missing = []
    for token in _named_tokens(directory):
        if known.get(token.content) == repr(token):
            continue
        if backend.token_to_id(token.content) is None:
            if next_id >= config.decoder.vocab_size:
                continue
            next_id += 1
        known[token.content] = repr(token)
        missing.append(token)
    if not missing:
        return text
    backend.add_tokens(missing)
    return backend.to_str()


def _named_tokens(directory: Path) -> Iterator[tokenizers.AddedToken]:
    """The tokens that files beside tokenizer.json name, in the order in which transformers adds them."""
    config = _object(directory / _CONFIG)
    where = directory / _CONFIG
    names: set[str] = set()
    if "added_tokens_decoder" in config:
        described = config["added_tokens_decoder"]
        if not isinstance(described, dict) or not all(key.isdecimal() for key in described):
            raise UserError(f"{where}: added_tokens_decoder must map ids to tokens.")
        added = [_token(described[key], where) for key in sorted(described, key=int)]
    else:
        config |= _object(directory / _SPECIAL)
        special = {token.content for token in _special(config, where)}
        added = [
            tokenizers.AddedToken(name, normalized=name not in special, special=name in special)
            for name in _object(directory / _ADDED)
        ]
    for token in (*added, *_special(config, where)):
        if token.content not in names:
            names.add(token.content)
            yield token


def _special(config: Mapping[str, Any], where: Path) -> Iterator[tokenizers.AddedToken]:
    """The special tokens that a config names, as text or described."""
    for key in _NAMED:
        if config.get(key) is not None:
            yield _token(config[key], where, special=True)
    for key in _LISTED:
        listed = config.get(key) or ()
        for value in listed.values() if isinstance(listed, dict) else listed:
            yield _token(value, where, special=True)


def _token(value: object, where: Path, *, special: bool = False) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {key: flag for key, flag in value.items() if key not in ("content", "__type")}
        if special:
            flags["special"] = True
        if set(flags) <= _FLAGS and all(isinstance(flag, bool) for flag in flags.values()):
            return tokenizers.AddedToken(value["content"], **flags)
    raise UserError(f"{where} describes a token as {value!r}, which is not understood; download it again.")


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return read_json(path) if path.is_file() else {}
