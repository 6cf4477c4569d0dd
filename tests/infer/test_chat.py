"""Talking to small checkpoints of each family: what is read, what is said, what is refused."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from gaze_jax.convert.load import load, one_device
from gaze_jax.core.streams import Streams
from gaze_jax.data.chat import conversation_parts, default_system
from gaze_jax.data.messages import Message
from gaze_jax.data.pipeline import stack
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.errors import UserError
from gaze_jax.infer import chat
from gaze_jax.infer.chat import Assistant, Talk, check_questions
from gaze_jax.infer.session import Emitted, Session
from gaze_jax.models import MLLM
from tests.helpers import multimodal
from tests.helpers.chat import tokenizer_json

pytestmark = pytest.mark.xdist_group("parity")

PHOTO = skimage.data.astronaut()[:60, :90]
FRAMES = np.stack([PHOTO[t : t + 40, :50] for t in range(4)])
QUESTION, FURTHER = "What is this?", "And what is the colour?"

keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def directory(family):
    keep.append(where := tempfile.TemporaryDirectory())
    return multimodal.write(family, Path(where.name))


@functools.cache
def assistant(family):
    return Assistant.load(directory(family))


def talk(family="cambrian_s", question=QUESTION, **options):
    options = {"images": [PHOTO], "top_k": 2} | options
    return Talk(assistant(family), question, **options)


EXPECTED = {
    "llava_onevision": "<|im_start|>user <image><video>\nWhat is this?<|im_end|><|im_start|>assistant\n",
    "llava_next": "<|im_start|>user\n<image><video>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
    "cambrian_s": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image><video>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
}


def prompt_of(family, monkeypatch, **options):
    """The parts of the first prompt, as text with tags."""
    seen = []
    original = chat.process_with_units

    def watch(processor, sample):
        seen.append(sample)
        return original(processor, sample)

    monkeypatch.setattr(chat, "process_with_units", watch)
    talk(family, **options)
    tags = {Image: "<image>", Video: "<video>"}
    return "".join(p.text if isinstance(p, Text) else tags[type(p)] for p in seen[0].parts)


def test_later_questions_show_no_media():
    """Nor are they empty; said before anything is loaded."""
    for wrong, sentence in (("<image> and this?", "shows media"), (" ", "is empty")):
        with pytest.raises(UserError, match=sentence):
            check_questions([QUESTION, wrong], 0, 0)
    with pytest.raises(UserError, match="There is no question"):
        check_questions([], 0, 0)


@pytest.mark.parametrize("family", multimodal.FAMILIES)
def test_the_prompt_is_the_templates(family, monkeypatch):
    """Media first, the family's system prompt, and the header of an answer."""
    got = prompt_of(family, monkeypatch, videos=[FRAMES])
    if family == "llava_next":  # its template is Qwen's, which has a system prompt of its own
        assert got.startswith("<|im_start|>system\n")
        got = got.partition("<|im_end|>\n")[2]
    assert got == EXPECTED[family]


def test_the_system_prompt_is_the_users_if_there_is_one(monkeypatch):
    """In place of the family's."""
    got = prompt_of("cambrian_s", monkeypatch, system="You are a cat.")
    assert got.startswith("<|im_start|>system\nYou are a cat.<|im_end|>\n")


@pytest.mark.parametrize("family", multimodal.FAMILIES)
def test_answers_stream_and_name_regions(family, monkeypatch):
    """The texts of the steps are the answer; each step selects two regions in every layer and head."""
    tokenizer, ends = assistant(family).tokenizer, assistant(family).end_ids
    emitted = []
    original = Session.generate

    def watch(session, *args, **options):
        for step in original(session, *args, **options):
            emitted.append(step.token)
            yield step

    monkeypatch.setattr(Session, "generate", watch)
    said = list(talk(family, videos=[FRAMES]).answer(6))
    assert 1 <= len(said) == len(emitted) <= 6
    ids = [token for token in emitted if token not in ends]
    assert "".join(step.text for step in said) == tokenizer.decode(ids) != ""
    assert [step.token for step in said] == [tokenizer.decode([token]) for token in emitted]
    for step in said:
        assert step.selected.dtype == bool and step.selected.shape[:2] == (3, 4)
        assert (step.selected.sum(axis=-1) == 2).all()


def saying(monkeypatch, family, text):
    """Sessions of this test say the tokens of ``text``; returns them."""
    ids = assistant(family).tokenizer.encode(text)[0]

    def generate(session, max_tokens, *, end_ids, **options):
        said = ids[:max_tokens]
        for i, token in enumerate(said):
            yield Emitted(token, None)
            if token not in end_ids and i + 1 < len(said):
                session.feed([token])

    monkeypatch.setattr(Session, "generate", generate)
    return ids


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(monkeypatch):
    """Bytes that are no character yet are held back; at the end of the room they are shown as broken."""
    ids = saying(monkeypatch, "cambrian_s", "öaö")
    assert len(ids) == 5, "two tokens for an ö"
    assert [step.text for step in talk(top_k=None).answer(4)] == ["", "ö", "a", "\ufffd"]


@pytest.mark.parametrize(
    ("family", "answer", "top_k"),
    [
        ("llava_onevision", "A cat.<|im_end|>", None),
        ("cambrian_s", "A cat.<|im_end|>", 2),
        ("cambrian_s", "A cat", None),
    ],
)
def test_a_further_question_equals_a_conversation_read_at_once(family, answer, top_k, monkeypatch):
    """The cache holds what the template writes around the answer, which ended or was cut."""
    one = assistant(family)
    ids = saying(monkeypatch, family, answer)
    talking = talk(family, top_k=top_k, dense=top_k is None)
    said = "".join(step.text for step in talking.answer(len(ids)))
    assert said == answer.removesuffix("<|im_end|>")
    further = f"{FURTHER} \ue000"  # a character that templates are asked with, if it is free
    talking.ask(further)
    system = default_system(one.layout.views.style)
    messages = [
        Message("user", (Image(0), QUESTION)),
        Message("assistant", said),
        Message("user", further),
    ]
    messages = [*([Message("system", system)] if system else []), *messages]
    style = one.layout.views.style
    parts = conversation_parts(one.template, messages, style=style, add_generation_prompt=True)
    if family == "llava_onevision":
        # Its template asks for an answer with other white space than it shows an old one; the cache has what
        # was read when the answer was given.
        *media, last = parts
        assert last.text.count("<|im_start|>assistant \n") == 1
        asked = last.text.replace("<|im_start|>assistant \n", "<|im_start|>assistant\n")
        parts = (*media, dataclasses.replace(last, text=asked))
    arrays = process(Processor(one.layout, one.tokenizer, ("a",)), Sample(0, (PHOTO,), parts, "a"))
    batch = {name: jnp.asarray(a) for name, a in stack([arrays]).items()}
    logits, _ = MLLM(one.config).apply(
        {"params": one.params},
        batch["images"],
        Streams.from_batch(batch),
        top_k=None if top_k is None else jnp.int32(top_k),
    )
    np.testing.assert_allclose(talking._session.logits, logits[0, -1], atol=1e-4)


def test_a_long_conversation_makes_its_cache_grow(monkeypatch):
    """Room is made as it is needed, and what was read before stays."""
    monkeypatch.setattr(chat, "_ROOM", 4)
    narrow = talk(top_k=None)
    monkeypatch.setattr(chat, "_ROOM", 200)
    wide = talk(top_k=None)
    assert narrow._session.room < 20 < 200 <= wide._session.room
    for talking in (narrow, wide):
        for _ in range(3):
            list(talking.answer(3))
            talking.ask(FURTHER)
    np.testing.assert_allclose(narrow._session.logits, wide._session.logits, atol=1e-5)
    assert [a.text for a in narrow.answer(3)] == [b.text for b in wide.answer(3)]


def test_the_configured_budget_is_at_most_all_regions():
    """And nothing where nothing is shown; one that the user names is refused instead."""
    one = assistant("cambrian_s")
    configured = one.looking(top_k=50)
    shown = Talk(configured, QUESTION, images=[PHOTO])
    assert shown.top_k == shown.regions < 50
    assert Talk(configured, QUESTION, images=[PHOTO], dense=True).top_k is None
    text = Talk(configured, QUESTION)
    assert text.regions == 0 and len(list(text.answer(2))) == 2
    assert len(list(Talk(one, QUESTION, top_k=4).answer(2))) == 2
    with pytest.raises(UserError, match=f"top_k=50 must be between 1 and {shown.regions}"):
        Talk(one, QUESTION, images=[PHOTO], top_k=50)


def test_an_empty_system_prompt_is_one(monkeypatch):
    """And not the template's own, nor the family's."""
    got = prompt_of("cambrian_s", monkeypatch, system="")
    assert got.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


def test_a_refused_answer_leaves_the_question_open():
    """Numbers are looked at first."""
    talking = talk()
    with pytest.raises(UserError, match="max_tokens=0 must be at least 1"):
        next(talking.answer(0))
    assert len(list(talking.answer(1))) == 1


def test_turns_take_turns():
    """No second answer to a question, and no question before the answer."""
    talking = talk()
    with pytest.raises(UserError, match="has no answer yet"):
        talking.ask(FURTHER)
    list(talking.answer(1))
    with pytest.raises(UserError, match="was answered; ask another"):
        list(talking.answer(1))
    for wrong, sentence in (("<image> and this?", "shows media"), ("  ", "is empty")):
        with pytest.raises(UserError, match=sentence):
            talking.ask(wrong)


@pytest.mark.parametrize(
    ("question", "images", "videos", "sentence"),
    [
        ("<image><image> What?", 1, 0, "has 2 <image> and 0 <video> tags but 1 images and 0 videos"),
        ("<image> What?", 2, 0, "has 1 <image> and 0 <video> tags but 2 images and 0 videos"),
        ("<video> What?", 1, 0, "has 0 <image> and 1 <video> tags but 1 images and 0 videos"),
        ("<image> What?", 0, 0, "has 1 <image> and 0 <video> tags but 0 images and 0 videos"),
        ("<image>", 1, 0, "The question is empty"),
    ],
)
def test_tags_that_do_not_fit_the_media_are_refused(question, images, videos, sentence):
    """Before anything is loaded."""
    with pytest.raises(UserError, match=sentence):
        check_questions([question], images, videos)


def changed(family, tmp_path, **files):
    """A copy of a checkpoint's loaded form whose files lie elsewhere, some replaced."""
    found = load(directory(family), one_device())
    for path in found.files.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content)
    return dataclasses.replace(found, files=tmp_path)


def test_checkpoints_that_cannot_be_talked_to(tmp_path):
    """One sentence each: no tower, no tokenizer, another tokenizer, no template, broken settings."""
    found = load(directory("llava_onevision"), one_device())
    tower = dataclasses.replace(found, config=found.config.vision)
    text = dataclasses.replace(found, config=dataclasses.replace(found.config, vision=None))
    larger = dataclasses.replace(found, tokenizer=tokenizer_json(vocab_size=400))
    cases = {
        "an image tower alone": tower,
        "a language model alone": text,
        "has no tokenizer.json": dataclasses.replace(found, tokenizer=None),
        "is a run of train.py": dataclasses.replace(found, files=None),
        "tokens but the model has rows for 320": larger,
        "eos_token_id='x'": changed("llava_onevision", tmp_path, generation_config='{"eos_token_id": "x"}'),
    }
    for sentence, case in cases.items():
        with pytest.raises(UserError, match=sentence) as error:
            Assistant.of(case, Path("DIR"))
        assert "\n" not in str(error.value)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        Assistant.of(dataclasses.replace(found, files=tmp_path), Path("DIR"))


def test_how_it_looks_can_be_chosen_when_it_runs():
    """Slabs of frames, routed newlines and shared selections, without another checkpoint."""
    one = assistant("cambrian_s")
    plain = Talk(one, QUESTION, videos=[FRAMES], top_k=1)
    other = one.looking(video_region=(2, 3, 3), newlines="region", share="group")
    slabs = Talk(other, QUESTION, videos=[FRAMES], top_k=1)
    assert len(plain.units) == len(slabs.units) == 4
    assert (plain.regions, slabs.regions) == (4, 2)
    (said,) = slabs.answer(1)
    assert said.selected.shape == (3, 2, 2)
    for wrong, sentence in (
        ({"share": "x"}, "gaze.share='x' must be one of"),
        ({"region": (9, 9)}, "is larger than the tower's 6x6 token grid"),
        ({"video_region": (1, 2)}, "must be three sizes"),
        ({"context_tokens": 1}, "are parameters of the checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            one.looking(**wrong)
