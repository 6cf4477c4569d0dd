"""Chat templates, a tokenizer like Qwen's, and transformers with both.

The templates are those published with Qwen2.5, Qwen3 and transformers' LLaVA-OneVision, written down so that
tests download nothing, and Qwen2.5's turns with blocks around what is learnt.
"""

import functools
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gaze_jax.chat.conversation import conversation_parts
from gaze_jax.chat.messages import Message
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import IGNORE, Kind
from gaze_jax.data.processor import Processor
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.data.tokenizer import END, Tokenizer
from gaze_jax.families.llava_onevision import LLAVA_ONEVISION
from gaze_jax.families.square import SQUARE

_FOLDER = pathlib.Path(__file__).parents[1] / "chat" / "templates"

TEMPLATES = {path.stem: path.read_text() for path in sorted(_FOLDER.glob("*.jinja"))}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
# How Qwen's tokenizer cuts text before merging: line feeds join the white space and the marks before them.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SENTENCES = [
    "You are a helpful assistant.\n",
    "system\nuser\nassistant\n\nassistant \nA cat.\n\n",
    "user \nWhat is this?\n\n\nWhat is the colour of the cat?",
    "<think>\n\n</think>\n\nIt is black. <think>\nLook closely.\n</think>\n\n",
]


@functools.cache
def tokenizer_json(*, trim=False, vocab_size=420):
    """A byte-level BPE tokenizer like Qwen's, with a vocabulary of a few hundred tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trim, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 5, trainer)
    return backend.to_str()


TOKENIZER = Tokenizer(tokenizer_json())


@functools.cache
def hf(name):
    """transformers' tokenizer of the same JSON, with one of the templates."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json()),
        chat_template=TEMPLATES[name],
        eos_token=END,
        pad_token="<|endoftext|>",
    )


def template(name):
    return ChatTemplate(TEMPLATES[name], {"eos_token": END, "pad_token": "<|endoftext|>"}, name)


SYSTEM = Message("system", "You are a helpful assistant.")
QUESTION, ANSWER = Message("user", "What is this?"), Message("assistant", "A cat.")
AGAIN, BLACK = Message("user", "What is the\ncolour <&> é?"), Message("assistant", "It is black.")
SEEN = Message("user", (Image(0), "What is this?"))
THOUGHT = Message("assistant", "<think>\nLook closely.\n</think>\n\nIt is black.")
CONVERSATIONS = {
    "one turn": (QUESTION, ANSWER),
    "with a system prompt": (SYSTEM, QUESTION, ANSWER),
    "several turns": (SYSTEM, QUESTION, ANSWER, AGAIN, BLACK, QUESTION, ANSWER),
    "with reasoning": (QUESTION, ANSWER, AGAIN, THOUGHT),
    "white space": (Message("user", " a \n"), Message("assistant", "\n\n b \n\n")),
    "with an image": (SYSTEM, SEEN, ANSWER, AGAIN, BLACK),
    "with images and a video": (Message("user", (Image(1), Video(0), Image(0), "What is this?")), ANSWER),
}


def as_dicts(messages, name):
    """The conversation as one writes it for transformers, by hand where a template knows no media."""
    turns = []
    for message in messages:
        if name.startswith("llava"):
            content = [
                {"type": "text", "text": item}
                if isinstance(item, str)
                else {"type": type(item).__name__.lower()}
                for item in message.items
            ]
        else:
            tags = {Image: "<image>", Video: "<video>"}
            content = "".join(tags[type(i)] for i in message.items if not isinstance(i, str))
            content += "\n" * bool(content) + message.text
        turns.append({"role": message.role, "content": content})
    return turns


def variables_of(name):
    return [{}, {"enable_thinking": False}, {"enable_thinking": True}] if name == "qwen3" else [{}]


def supervised_text(parts):
    """What is supervised, as text."""
    return [p.text[a:b] for p in parts if isinstance(p, Text) for a, b in p.targets]


def parts_of(name, messages, family=LLAVA_ONEVISION, **more):
    return conversation_parts(template(name), messages, arrange=family.arrange, **more)


def processor(*, context=1, supervise=(), tokenizer=TOKENIZER):
    return Processor(
        VisualLayout(4, 2, (1, 2), context), tokenizer, ("chat",), SQUARE.views, supervise=supervise
    )


def sample(parts, images=2):
    pixels = tuple(np.full((4, 4, 3), i, np.uint8) for i in range(images))
    return Sample(3, pixels, tuple(parts), "chat", videos=([pixels[0]],))


def labels_of(arrays, layout):
    """(token, label or None) of every text token, in order; a label is what the token before predicts."""
    predicted = {
        order + 1: target
        for order, target in zip(arrays["text_order"].tolist(), arrays["targets"].tolist(), strict=True)
        if target != IGNORE
    }
    text = arrays["kind"] == Kind.TEXT
    orders, tokens = arrays["text_order"][text].tolist(), arrays["tokens"][text].tolist()
    assert predicted.keys() <= set(orders), "only text is predicted"
    return [(token, predicted.get(order)) for order, token in zip(orders, tokens, strict=True)]
