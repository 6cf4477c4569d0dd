"""Streaming detokenizer: tokens to text, in complete characters, cut before a stop string."""

from collections.abc import Sequence

from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError

_BROKEN = "\ufffd"  # how a tokenizer decodes the bytes of an incomplete character


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Check an answer's limits.

    Raises:
      UserError: ``max_tokens`` is less than 1, a stop string is empty, or ``stop`` is not a list.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1.")
    if isinstance(stop, str):
        raise UserError(f"stop={stop!r} must be a list of strings; put brackets around it.")
    if not all(stop):
        raise UserError("A stop string is empty; leave it out.")


class Detokenizer:
    """The text of one answer.

    Args:
      tokenizer: the model's tokenizer.
      ends: ids of the tokens that end the answer.
      stop: strings that end the answer; its text is cut before the first of them.
      limit: maximum number of tokens.

    Attributes:
      ids: token ids so far, without the end token.
      pieces: every token as text, including the end token.
      text: the text returned so far.
      finish_reason: "stop" or "length"; None until the answer ends.
      stop_reason: the end token or stop string, as text; None if neither ended the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, ends: frozenset[int], stop: Sequence[str] = (), limit: int = 1 << 30
    ) -> None:
        check_limits(limit, stop)
        self._tokenizer, self._ends, self._stop, self._limit = tokenizer, ends, tuple(stop), limit
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None

    def add(self, token: int) -> str:
        """Add the next token; returns the text that can be shown now, possibly empty."""
        self.pieces.append(self._tokenizer.decode([token]))
        if token in self._ends:
            self.finish_reason, self.stop_reason = "stop", self.pieces[-1]
        else:
            self.ids.append(token)
            if len(self.ids) == self._limit:
                self.finish_reason = "length"
        decoded = self._tokenizer.decode(self.ids)
        # The earliest match ends the answer; of two at the same place, the one listed first.
        cuts = [(at, number) for number, at in enumerate(map(decoded.find, self._stop)) if at >= 0]
        if cuts:
            at, number = min(cuts)
            decoded, self.finish_reason, self.stop_reason = decoded[:at], "stop", self._stop[number]
        elif self.finish_reason is None:
            if decoded.endswith(_BROKEN):
                return ""
            decoded = decoded[: len(decoded) - self._partial_stop(decoded)]
        new = decoded[len(self.text) :]
        self.text += new
        return new

    def _partial_stop(self, decoded: str) -> int:
        """Length of the longest end of ``decoded`` that may be the start of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1)
        for size in range(min(longest - 1, len(decoded)), 0, -1):
            if any(stop.startswith(decoded[-size:]) for stop in self._stop):
                return size
        return 0
