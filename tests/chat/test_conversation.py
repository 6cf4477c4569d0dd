"""Conversations as parts: their tokens against transformers', what is supervised, Cambrian-S's labels."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gaze_jax.chat import conversation
from gaze_jax.chat.conversation import conversation_parts, count_tokens, truncate
from gaze_jax.chat.messages import Message, media_first
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.processor import process, prompt
from gaze_jax.data.sample import Box, Image, Text, Video
from gaze_jax.data.tokenizer import END, Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import FAMILIES, get_family
from gaze_jax.families.cambrian_s import CAMBRIAN_S
from tests.helpers.chat import (
    AGAIN,
    ANSWER,
    BLACK,
    CONVERSATIONS,
    QUESTION,
    SEEN,
    SYSTEM,
    TEMPLATES,
    THOUGHT,
    TOKENIZER,
    as_dicts,
    hf,
    labels_of,
    parts_of,
    processor,
    sample,
    supervised_text,
    template,
    tokenizer_json,
    variables_of,
)


def ids_of(parts):
    """The sequence of a processor that has one token for an image or a video, as transformers writes it."""
    media = {Image: "<image>", Video: "<video>"}
    texts = [part.text if isinstance(part, Text) else media[type(part)] for part in parts]
    return [token for text in texts for token in TOKENIZER.encode(text)[0]]


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("turns_of", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_the_parts_are_transformers_tokens_of_the_whole(name, turns_of, prompted):
    """Tokenising each text by itself is tokenising the rendered string."""
    messages = CONVERSATIONS[turns_of]
    messages = messages[: -1 if prompted else None]
    for variables in variables_of(name):
        turns = as_dicts(messages, name)
        if not name.startswith("llava") and "images" in turns_of:
            turns[0]["content"] = "<image><image><video>\nWhat is this?"
        expected = hf(name).apply_chat_template(
            turns, add_generation_prompt=prompted, return_dict=False, **variables
        )
        for supervision in (conversation.ANSWER, CAMBRIAN_S.supervision):
            parts = parts_of(
                name, messages, supervision=supervision, add_generation_prompt=prompted, **variables
            )
            assert ids_of(parts) == expected
            assert (supervised_text(parts) == []) == prompted


def test_media_become_parts_where_each_style_reads_them():
    """In front of the text but for "square"; a template with media of its own puts them itself."""
    turn = Message("user", ("Is ", Video(1), "like ", Image(2), " or ", Image(0), "? "))

    def placed(name, style):
        parts = parts_of(name, (SYSTEM, turn, ANSWER), get_family(style))
        text = [p.text if isinstance(p, Text) else p for p in parts]
        return [text[0].rpartition("user")[2], *text[1:-1], text[-1].partition(END)[0]]

    first = [Image(2), Image(0)]
    assert placed("qwen3", "cambrian_s") == ["\n", Video(1), *first, "\nIs like  or ?"]
    for name, before in (("qwen3", "\n"), ("llava_onevision", " ")):
        assert placed(name, "llava_onevision") == [before, *first, Video(1), "\nIs like  or ?"]
    assert placed("qwen3", "square") == ["\nIs ", Video(1), "like ", Image(2), " or ", Image(0), "? "]
    for family in FAMILIES.values():  # and as in the example of the module
        parts = parts_of("qwen2_5", (SYSTEM, SEEN, ANSWER), family)
        assert parts[1] == Image(0)
        text = f"\nWhat is this?{END}\n<|im_start|>assistant\nA cat.{END}\n"
        assert parts[2] == Text(text, targets=((47, 63),))


NO_THOUGHT = "<think>\n\n</think>\n\n"
GENERATED = {
    "an answer and the token that ends it": ("qwen2_5", (QUESTION, ANSWER), {}, [f"A cat.{END}"]),
    "of every turn": (
        "qwen2_5",
        (SYSTEM, QUESTION, ANSWER, AGAIN, BLACK),
        {},
        [f"A cat.{END}", f"It is black.{END}"],
    ),
    "all that follows the prompt": (
        "qwen3",
        (QUESTION, ANSWER, AGAIN, BLACK),
        {},
        [f"A cat.{END}", f"{NO_THOUGHT}It is black.{END}"],
    ),
    "not what the prompt says": (
        "qwen3",
        (QUESTION, ANSWER, AGAIN, BLACK),
        {"enable_thinking": False},
        [f"A cat.{END}", f"It is black.{END}"],
    ),
    "reasoning of the last turn": (
        "qwen3",
        (QUESTION, ANSWER, AGAIN, THOUGHT),
        {},
        [f"A cat.{END}", THOUGHT.text + END],
    ),
    "reasoning in a template without any": (
        "qwen2_5",
        (QUESTION, THOUGHT, AGAIN, BLACK),
        {},
        [THOUGHT.text + END, f"It is black.{END}"],
    ),
    "a block and the token that ends it": (
        "qwen2_5_generation",
        (QUESTION, ANSWER, AGAIN, BLACK),
        {},
        [f"A cat.{END}", f"It is black.{END}"],
    ),
    "an answer in a template that never asks for one": (
        TEMPLATES["qwen2_5"].partition("{%- if add_generation_prompt %}")[0],
        (QUESTION, Message("assistant", " A cat. \n"), AGAIN, THOUGHT),
        {},
        [f" A cat. \n{END}", THOUGHT.text + END],
    ),
    "an answer whose header is not that of the prompt": (
        TEMPLATES["llava_onevision"].replace("{% generation %}", "").replace("{% endgeneration %}", ""),
        (SEEN, ANSWER, AGAIN, BLACK),
        {},
        [f"A cat.{END}", f"It is black.{END}"],
    ),
    "what goes on after a prompt that begins the answer": (
        TEMPLATES["qwen2_5"].replace("assistant\\n", "assistant\\nA"),
        (QUESTION, ANSWER, AGAIN, BLACK),
        {},
        [f" cat.{END}", f"It is black.{END}"],
    ),
    "answers beside blocks that hold nothing": (
        "{% for m in messages %}<|im_start|>{% generation %}{% endgeneration %}"
        "{{ m.content }}<|im_end|>{% endfor %}",
        (QUESTION, ANSWER),
        {},
        [f"A cat.{END}"],
    ),
    "what is in blocks that hold something": (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% generation %}{% endgeneration %}"
        "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
        (QUESTION, ANSWER, AGAIN, BLACK),
        {},
        [f"It is black.{END}"],
    ),
    "a block, and the token after it": (
        "llava_onevision",
        (SEEN, ANSWER, AGAIN, BLACK),
        {},
        [f"\nA cat.{END}", f"\nIt is black.{END}"],
    ),
}


@pytest.mark.parametrize(("name", "messages", "variables", "expected"), GENERATED.values(), ids=GENERATED)
def test_answers_are_supervised(name, messages, variables, expected):
    """What a model has to say after a generation prompt, and nothing else."""
    made = template(name) if name in TEMPLATES else ChatTemplate(name)
    assert supervised_text(conversation_parts(made, messages, arrange=media_first, **variables)) == expected


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
@hypothesis.given(
    st.lists(st.tuples(*[st.text("a \n.é🦋\ue000\ue001<|", max_size=6)] * 2), min_size=1, max_size=3)
)
def test_answers_of_any_text_are_found(name, turns):
    """Also those that repeat the question, look like marks, or are framed by white space."""
    messages = [m for q, a in turns for m in (Message("user", q), Message("assistant", a))]
    if any(not a.strip() for _, a in turns):
        with pytest.raises(UserError, match=r"^Answer \d of the conversation is empty"):
            parts_of(name, messages)
        return
    parts = parts_of(name, messages)
    rendered = template(name).render(as_dicts(messages, name), add_generation_prompt=False)
    assert "".join(p.text for p in parts) == rendered
    found = supervised_text(parts)
    if name == "qwen3":
        # Qwen3 puts the empty reasoning before the last answer, and takes line feeds before it out.
        found[-1] = found[-1].removeprefix(NO_THOUGHT)
        turns[-1] = ("", turns[-1][1].lstrip("\n"))
    assert found == [a + END for _, a in turns]


@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("name", ["qwen2_5_generation", "llava_onevision"])
def test_supervised_tokens_are_those_of_transformers_mask(name, context):
    """Through the processor; where a block leaves the end token out, that is learnt besides."""
    messages = (SYSTEM, SEEN, ANSWER, AGAIN, BLACK, QUESTION, ANSWER)
    expected = hf(name).apply_chat_template(
        as_dicts(messages, name), return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = expected["input_ids"], np.array(expected["assistant_masks"], bool)
    if name == "llava_onevision":
        ends = mask[:-1] & ~mask[1:]
        assert [ids[i + 1] for i in np.flatnonzero(ends)] == [TOKENIZER.end_id] * 3
        mask[1:] |= ends
    made = processor(context=context)
    labels = labels_of(process(made, sample(parts_of(name, messages))), made.layout)
    image = TOKENIZER.encode("<image>")[0][0]
    assert labels == [(i, i if on else None) for i, on in zip(ids, mask.tolist(), strict=True) if i != image]
    assert mask.sum() >= 9


def test_cutting_a_text_where_supervision_begins_would_change_its_tokens():
    """So texts carry ranges: LLaVA-OneVision's header and answer share a token of a space and a line feed."""
    (text,) = parts_of("llava_onevision", (QUESTION, ANSWER))
    ((start, end),) = text.targets
    whole, cut = (
        [i for piece in pieces for i in TOKENIZER.encode(piece)[0]]
        for pieces in (
            [text.text],
            [text.text[:start], text.text[start:end], text.text[end:]][: 3 - (end == len(text.text))],
        )
    )
    assert whole != cut
    made = processor()
    labels = labels_of(process(made, sample([text])), made.layout)
    shared = TOKENIZER.encode(" \n")[0]
    assert len(shared) == 1 and (shared[0], shared[0]) in labels


def test_tokens_that_are_always_supervised_must_be_tokens():
    """Named by what they are written as."""
    with pytest.raises(
        UserError, match=r"supervise names 'A cat', which is . tokens here; name single tokens"
    ):
        processor(supervise=("\n", "A cat"))


# Targets in the processor


def test_a_text_with_targets_is_the_same_as_its_pieces():
    """Where cutting changes no token, in training and as a prompt, with boxes."""
    box = (1.0, 0.0, 3.0, 2.0)
    question, answer = "Where is 7?\n", f"7{END}"
    whole = question + answer + question + answer
    starts = [len(question), len(question + answer + question)]
    together = Text(
        whole,
        boxes=tuple(Box(start, start + 1, box) for start in [9, *starts]),
        targets=tuple((start, start + len(answer)) for start in starts),
    )
    pieces = [
        Text(question, boxes=(Box(9, 10, box),)),
        Text(answer, supervised=True, boxes=(Box(0, 1, box),)),
        Text(question),
        Text(answer, supervised=True, boxes=(Box(0, 1, box),)),
    ]
    for make in (process, prompt):
        made = processor(tokenizer=build_tokenizer(), supervise=(END,))
        expected = make(made, sample([Image(0), *pieces]))
        got = make(made, sample([Image(0), together]))
        assert got.keys() == expected.keys()
        for field, values in expected.items():
            np.testing.assert_array_equal(got[field], values, err_msg=field)
            assert got[field].dtype == values.dtype, field


def test_a_token_of_white_space_is_supervised_though_its_offsets_leave_it_out():
    """Some tokenizers report characters without the white space around them."""
    for trim in (False, True):
        made = processor(tokenizer=Tokenizer(tokenizer_json(trim=trim)))
        for targets, expected in (((4, 6), " \n"), ((6, 7), " cat"), ((4, 7), " \n cat")):
            text = Text(f"What \n cat{END}", targets=(targets,))
            labels = labels_of(process(made, sample([Text("A"), text])), made.layout)
            assert made.tokenizer.decode([t for t, label in labels if label is not None]) == expected


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen2_5_generation"])
def test_the_prompt_of_a_conversation_asks_for_its_first_answer(name):
    """The text before an answer in training equals the rendered question; the rest is to be generated."""
    made = processor(supervise=CAMBRIAN_S.supervision.tokens)
    arrays = prompt(made, sample(parts_of(name, (SYSTEM, SEEN, ANSWER, AGAIN, BLACK))))
    asked = process(processor(), sample(parts_of(name, (SYSTEM, SEEN), add_generation_prompt=True)))
    for field, values in asked.items():
        np.testing.assert_array_equal(arrays[field], values, err_msg=field)
    assert made.tokenizer.decode(arrays["answer"]) == f"A cat.{END}"
    assert (arrays["answer_box"] == -1).all() and arrays["answer_box"].shape == (len(arrays["answer"]), 4)


def test_a_prompt_whose_answer_does_not_end_is_refused():
    """As of a text that is supervised as a whole."""
    with pytest.raises(ValueError, match="answer of sample 3 must end in"):
        prompt(processor(), sample([Text(f"What is this?{END}", targets=((0, 4),))]))


# What is refused


REFUSED = {
    "nothing at all": ("qwen3", (), {}, "has no answer to learn from"),
    "no answer": ("qwen3", (QUESTION,), {}, "has no answer to learn from"),
    "asking after the answer": (
        "qwen3",
        (QUESTION, ANSWER),
        {"add_generation_prompt": True},
        "ends in an answer",
    ),
    "an empty answer": (
        "qwen2_5",
        (QUESTION, ANSWER, QUESTION, Message("assistant", " \n")),
        {},
        "Answer 1 of .* is empty",
    ),
    "reasoning that is dropped": (
        "qwen3",
        (QUESTION, THOUGHT, AGAIN, BLACK),
        {},
        "^qwen3 rewrites or leaves out a part of an answer",
    ),
    "an answer that is dropped": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        (QUESTION, ANSWER),
        {},
        "leaves out a part of an answer",
    ),
    "an answer that is rewritten": (
        TEMPLATES["qwen2_5"].replace("message.content", "message.content | replace('cat', 'dog')"),
        (QUESTION, ANSWER),
        {},
        "rewrites or leaves out a part of an answer",
    ),
    "answers in another order": (
        "{% for m in messages[::-1] %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        (QUESTION, ANSWER, AGAIN, BLACK),
        {},
        "rewrites or leaves out a part of an answer",
    ),
    "a system prompt that is dropped": (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        (SYSTEM, QUESTION, ANSWER),
        {},
        "leaves out or rewrites text of a turn of role 'system' .'You are a helpful",
    ),
    "an answer that is measured": (
        "{% for m in messages %}<|im_start|>{{ m.content | length }} {{ m.content }}<|im_end|>{% endfor %}",
        (QUESTION, ANSWER),
        {},
        "rewrites or leaves out a part of an answer",
    ),
    "no place for images": (
        "{% for m in messages %}<|im_start|>{{ m.content | replace('<image>', '') }}<|im_end|>{% endfor %}",
        (SEEN, ANSWER),
        {},
        "writes 0 <image> tags but the conversation has 1",
    ),
    "an image too many": (
        TEMPLATES["qwen2_5"] + "<video>",
        (SEEN, ANSWER),
        {},
        "writes 1 <video> tags but the conversation has 0",
    ),
    "another form of turns": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
        (QUESTION, ANSWER),
        {},
        "does not open an answer with <.im_start.>",
    ),
    "no end of turns": (
        "{% for m in messages %}<|im_start|>{{ m.content }}</s>{% endfor %}",
        (QUESTION, ANSWER),
        {},
        "does not end an answer with <.im_end.>",
    ),
    "a failing template": ("{{ raise_exception('no') }}", (QUESTION, ANSWER), {}, "refuses the conversation"),
}


@pytest.mark.parametrize(
    "supervision", [conversation.ANSWER, CAMBRIAN_S.supervision], ids=["answer", "cambrian_s"]
)
@pytest.mark.parametrize(("name", "messages", "more", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_conversation_that_would_not_be_learnt_as_it_is_is_refused(
    name, messages, more, reason, supervision
):
    """Rather than training on something else, or on nothing."""
    made = template(name) if name in TEMPLATES else ChatTemplate(name, {"eos_token": END})
    with pytest.raises(UserError, match=reason):
        conversation_parts(made, messages, arrange=media_first, supervision=supervision, **more)


# Truncation


def test_whole_turns_are_dropped_until_the_rest_fits():
    """From the end, question with answer and media, never anything of the first."""
    messages = (
        SYSTEM,
        SEEN,
        THOUGHT,
        Message("user", (Video(0), Image(1), "And this?")),
        BLACK,
        AGAIN,
        ANSWER,
    )

    def media_tokens(part):
        return 500 if isinstance(part, Video) else 10 * (1 + part.index)

    def tokens(kept):
        return count_tokens(TOKENIZER, parts_of("qwen2_5", kept), media_tokens)

    for end, fewer in ((7, 5), (5, 3), (3, None)):
        kept = messages[:end]
        text = [p.text for p in parts_of("qwen2_5", kept) if isinstance(p, Text)]
        needed = sum(len(TOKENIZER.encode(t)[0]) for t in text) + (10 if end == 3 else 530)
        assert truncate(messages, needed, tokens) == kept
        if fewer:
            assert truncate(messages, needed - 1, tokens) == messages[:fewer]
        else:
            with pytest.raises(
                UserError, match=f"alone needs {needed} tokens but max_tokens={needed - 1}; raise it"
            ):
                truncate(messages, needed - 1, tokens)
