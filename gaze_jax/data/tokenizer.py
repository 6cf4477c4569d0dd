"""A thin, strict wrapper over ``tokenizers.Tokenizer``."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers

END = "<|im_end|>"


@functools.lru_cache(maxsize=8)
def _backend(json: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"Tokenizer JSON cannot be read ({error}); give a whole tokenizer.json.") from error
    # Saved by whoever used the tokenizer last; transformers ignores them too unless asked.
    backend.no_padding()
    backend.no_truncation()
    if backend.token_to_id(END) is None:
        raise ValueError(f"Tokenizer has no special token {END}, which ends an answer; add it to the file.")
    return backend


def _covered(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Characters of ``text`` before the first that no token covers; all if there is none."""
    covered = 0
    for start, end in (*offsets, (len(text), len(text))):
        # A gap of whitespace alone is fine: some tokenizers trim it from the offsets.
        if start > covered and text[covered:start].strip():
            return covered
        if end > covered:
            covered = end
    return covered


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Cheap to copy, compare and send to worker processes.

    Attributes:
      json: content of a ``tokenizer.json``.

    Raises:
      ValueError: ``json`` is malformed or lacks the end token.
    """

    json: str = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        _backend(self.json)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a ``tokenizer.json`` file.

        Raises:
          ValueError: the file is missing, or not a tokenizer.
        """
        try:
            return cls(pathlib.Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"Tokenizer file {path} does not exist.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"Tokenizer file {path} is not UTF-8 text.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``tokenizer.json`` file."""
        pathlib.Path(path).write_text(self.json, encoding="utf-8")

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of ``text`` and the (start, end) characters each token covers.

        Special tokens written in the text become their ids; nothing is added.

        Raises:
          ValueError: a character has no token. (Some tokenizers drop such characters silently.)
        """
        try:
            encoding = _backend(self.json).encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"Text {text!r} cannot be tokenised: a character has no token.") from error
        covered = _covered(text, encoding.offsets)
        normalizer = _backend(self.json).normalizer
        if covered < len(text) and normalizer is not None:
            # Characters that a normaliser joins or drops have no token of their own: a letter and its accent.
            plain = normalizer.normalize_str(text)
            again = _backend(self.json).encode(plain, add_special_tokens=False)
            if _covered(plain, again.offsets) == len(plain):
                covered = len(text)
        if covered < len(text):
            raise ValueError(
                f"Text {text!r} cannot be tokenised: no token for what follows character {covered}."
            )
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of token ids; special tokens are written out unless ``skip_special``."""
        return _backend(self.json).decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, the fewest rows an embedding table needs."""
        return max(_backend(self.json).get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_id(self) -> int:
        """Id of ``<|im_end|>``, which ends an answer."""
        found = _backend(self.json).token_to_id(END)
        assert found is not None, f"{END} was there when the tokenizer was made"
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON, in hex."""
        return hashlib.sha256(self.json.encode()).hexdigest()
