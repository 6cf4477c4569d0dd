"""A stand-in for a checkpoint's tokenizer, template and layout, to check a corpus before there is one."""

import functools

import tokenizers

from gaze_jax.chat.template import CHATML
from gaze_jax.core.layout import VisualLayout
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.data.tokenizer import END, Tokenizer
from gaze_jax.errors import UserError

_LAYOUT = VisualLayout(384, 16, region=(6, 6), context_tokens=0)
"""An image is 24 x 24 tokens in 16 regions, as in the paper."""


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and those of ChatML's turns."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", END])
    return Tokenizer(backend.to_str())


def stand_in(config: CorpusConfig) -> Conversations:
    """How a corpus would be read by a model whose tokens are bytes.

    Raises:
      UserError: a limit on the length of samples is set, which means nothing without the real tokenizer.
    """
    if config.max_tokens is not None or config.row.text:
        raise UserError(
            "data.max_tokens and data.row.text count tokens, so they need init_from, which has the "
            "tokenizer; give it, or leave them out."
        )
    return Conversations.of(config, _LAYOUT, byte_tokenizer(), CHATML)
