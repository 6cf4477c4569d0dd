"""Questions about a grid of digits, their answers, and a tokenizer for exactly this language."""

import functools

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gaze_jax.data.tokenizer import END, Tokenizer

FAMILIES = ("transcribe", "read", "where")
"""Question families; a family's id is its index."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "transcribe": (
        "Read every digit, row by row.",
        "List all the digits, row by row.",
        "Write down the digits in the image.",
        "Transcribe the digits from top to bottom.",
    ),
    "read": (
        "Which digit is in row {row}, column {column}?",
        "What is the digit in row {row}, column {column}?",
        "Read the digit at row {row}, column {column}.",
        "Name the digit at row {row}, column {column}.",
    ),
    "where": (
        "Where is the only {digit}?",
        "Find the only {digit} in the image.",
        "In which row and column is the only {digit}?",
        "Give the position of the only {digit}.",
    ),
}
PLACE = "row {row}, column {column}"
"""Answer of the family "where"; rows and columns count from 1."""

SPECIALS = ("<|pad|>", "<|im_start|>", END)
"""Special tokens: one token each, first in the vocabulary."""

# A digit or a word is one token, including a space before it; everything else is one token per character.
_PIECES = r" ?\d| ?[A-Za-z]+|[^A-Za-z\d]"


@functools.cache
def build_tokenizer() -> Tokenizer:
    """The tokenizer of the digit scenes: one token per word or digit, fewer than 256 in all.

    The vocabulary is fixed, not trained, so that it is the same everywhere. It contains all printable ASCII
    characters, so any ASCII text can be encoded and decodes to itself.
    """
    splitter = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    pieces = {str(d) for d in range(10)} | {f" {d}" for d in range(10)}
    for sentence in (*(q for family in QUESTIONS.values() for q in family), PLACE):
        filled = sentence.format(row=1, column=1, digit=1)
        pieces |= {piece for piece, _ in splitter.pre_tokenize_str(filled)}
    characters = {"\n", *map(chr, range(32, 127))}
    # A Unigram model takes the split with the highest score: prefer a known word to its letters.
    vocabulary = [(token, 0.0) for token in SPECIALS]
    vocabulary += [(piece, -1.0) for piece in sorted(pieces)]
    vocabulary += [(char, -10.0) for char in sorted(characters - pieces)]
    backend = Backend(models.Unigram(vocabulary, unk_id=None))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return Tokenizer(backend.to_str())
