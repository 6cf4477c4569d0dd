"""Talking to small checkpoints of each family: what is read, what is said, what is refused."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.io

from gaze_jax.convert.load import load, one_device
from gaze_jax.data.chat import conversation_parts, default_system
from gaze_jax.data.messages import Message
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.errors import UserError
from gaze_jax.infer import chat
from gaze_jax.infer.assistant import Assistant
from gaze_jax.infer.chat import check_questions
from gaze_jax.infer.look import Looking
from gaze_jax.infer.session import Session
from tests.helpers import multimodal
from tests.helpers.chat import tokenizer_json
from tests.helpers.sessions import at_once, logits, said_row

pytestmark = pytest.mark.xdist_group("parity")

PHOTO = skimage.data.astronaut()[:60, :90]
FRAMES = np.stack([PHOTO[t : t + 40, :50] for t in range(4)])
TWO, DENSE = Looking(top_k=2), Looking(dense=True)
QUESTION, FURTHER = "What is this?", "And what is the colour?"

keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def directory(family):
    keep.append(where := tempfile.TemporaryDirectory())
    return multimodal.write(family, Path(where.name))


@functools.cache
def assistant(family):
    return Assistant.load(directory(family))


def talk(family="cambrian_s", question=QUESTION, *, videos=(), looking=TWO, **options):
    """A conversation about the photograph whose first question was read."""
    talking = assistant(family).talk(looking=looking, **options)
    talking.ask(question, images=[PHOTO], videos=videos)
    return talking


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

    def watch(processor, sample, **options):
        seen.append(sample)
        return original(processor, sample, **options)

    monkeypatch.setattr(chat, "process_with_units", watch)
    talk(family, **options)
    tags = {Image: "<image>", Video: "<video>"}
    return "".join(p.text if isinstance(p, Text) else tags[type(p)] for p in seen[0].parts)


def test_later_questions_are_looked_at_too():
    """A tag without a picture, or nothing; said before anything is loaded."""
    for wrong, sentence in (("<image> and this?", "has 1 <image>"), (" ", "is empty")):
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
    original = Session.say

    def watch(session, *args, **options):
        for out in original(session, *args, **options):
            emitted.extend(out["tokens"][:, 0].tolist())
            yield out

    monkeypatch.setattr(Session, "say", watch)
    talking = talk(family, videos=[FRAMES])
    said = list(talking.answer(6, watch=True))
    assert 1 <= len(said) == len(emitted) <= 6
    ids = [token for token in emitted if token not in ends]
    assert "".join(step.text for step in said) == talking.speech.text == tokenizer.decode(ids) != ""
    assert [step.token for step in said] == [tokenizer.decode([token]) for token in emitted]
    for step in said:
        selected = step.glance.selected
        assert selected.dtype == bool and selected.shape == (3, 4, talking.regions)
        assert (selected.sum(axis=-1) == 2).all()
    trace = talking.trace()
    assert trace.tokens == tuple(step.token for step in said) and trace.answer == talking.speech.text
    np.testing.assert_array_equal(trace.mask(), np.stack([step.glance.selected for step in said]))
    assert [picture.key for picture in trace.pictures] == [(False, 0, 0), *((True, 0, t) for t in range(4))]
    # The same in one go, unwatched.
    again = talk(family, videos=[FRAMES])
    list(again.answer(6, stream=False))
    assert again.speech.pieces == talking.speech.pieces


def saying(monkeypatch, family, text):
    """Sessions of this test say the tokens of ``text``; returns them."""
    ids = assistant(family).tokenizer.encode(text)[0]

    def say(session, max_tokens, *, ends, **options):
        session._ends = frozenset(ends)
        for token in ids[:max_tokens]:
            session.read([said_row([token], int(session.order[0]) + 1)])
            done = np.full(session.batch, token in ends)
            session._turn = dataclasses.replace(session._turn, done=done)
            yield {"tokens": np.full((1, 1), token, np.int32)}

    monkeypatch.setattr(Session, "say", say)
    return ids


@pytest.mark.parametrize(
    ("family", "answer", "looking", "shown"),
    [
        ("llava_onevision", "A cat.<|im_end|>", DENSE, ()),
        ("cambrian_s", "A cat.<|im_end|>", TWO, (FRAMES,)),
        ("cambrian_s", "A cat", DENSE, ()),
    ],
)
def test_a_further_question_equals_a_conversation_read_at_once(family, answer, looking, shown, monkeypatch):
    """The cache holds what the template writes around the answer, which ended or was cut; then media."""
    one = assistant(family)
    ids = saying(monkeypatch, family, answer)
    talking = talk(family, looking=looking)
    said = "".join(step.text for step in talking.answer(len(ids)))
    assert said == answer.removesuffix("<|im_end|>")
    further = f"{FURTHER} \ue000"  # a character that templates are asked with, if it is free
    talking.ask(further, videos=shown)
    system = default_system(one.layout.views.style)
    messages = [
        Message("user", (Image(0), QUESTION)),
        Message("assistant", said),
        Message("user", (*map(Video, range(len(shown))), further)),
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
    sample = Sample(0, (PHOTO,), parts, "a", shown)
    arrays = process(Processor(one.layout, one.tokenizer, ("a",)), sample)
    expected = at_once(one.config, one.params, arrays, looking.top_k)
    np.testing.assert_allclose(logits(talking._session)[0], expected, atol=1e-4)


def test_a_long_conversation_makes_its_cache_grow(monkeypatch):
    """Room is made as it is needed, and what was read before stays."""
    monkeypatch.setattr(chat, "room_for", lambda tokens: tokens)
    narrow, wide = talk(looking=DENSE, room=4), talk(looking=DENSE, room=200)
    assert narrow._session.room < 20 < 200 <= wide._session.room
    for talking in (narrow, wide):
        for _ in range(2):
            list(talking.answer(3))
            talking.ask(FURTHER)
    np.testing.assert_allclose(logits(narrow._session), logits(wide._session), atol=1e-5)
    assert [a.text for a in narrow.answer(3)] == [b.text for b in wide.answer(3)]


@pytest.mark.parametrize("family", ["llava_onevision", "cambrian_s"])
def test_a_running_video_equals_the_whole_one(family):
    """Frames as they come, in pieces, with a question in between: the logits of the conversation at once."""
    one = assistant(family)
    keep = Looking(keep=0.5)
    running, whole = one.talk(looking=keep), one.talk(looking=keep)
    running.watch(FRAMES[:1])
    running.watch(FRAMES[1:3], last=True)
    for talking in (running, whole):
        talking.ask(QUESTION, **({} if talking is running else {"videos": [FRAMES[:3]]}))
        np.testing.assert_array_equal([u.frame for u in talking.units], [0, 1, 2])
    assert running.regions == whole.regions
    np.testing.assert_allclose(logits(running._session), logits(whole._session), atol=1e-4)
    assert [a.text for a in running.answer(3)] == [a.text for a in whole.answer(3)]
    running.watch(FRAMES[3:])
    running.ask(FURTHER)
    whole.ask(FURTHER, videos=[FRAMES[3:]])
    np.testing.assert_allclose(logits(running._session), logits(whole._session), atol=1e-4)
    for mine, theirs in zip(running.units, whole.units, strict=True):
        assert (mine.unit, mine.index, mine.frame) == (theirs.unit, theirs.index, theirs.frame)
        np.testing.assert_array_equal(mine.regions, theirs.regions)


def test_a_running_video_is_asked_about_alone():
    """One sentence for each mistake, and the conversation goes on."""
    talking = assistant("cambrian_s").talk()
    with pytest.raises(UserError, match="There are no frames"):
        talking.watch([])
    with pytest.raises(UserError, match="Frame 0 of a video"):
        talking.watch([PHOTO[0]])
    talking.watch(FRAMES[:1], last=True)
    with pytest.raises(UserError, match="The video has ended"):
        talking.watch(FRAMES[1:])
    with pytest.raises(UserError, match="shows nothing else"):
        talking.ask(QUESTION, images=[PHOTO])
    talking.ask(QUESTION)
    with pytest.raises(UserError, match="has no answer yet"):
        talking.watch(FRAMES[:1])


def test_the_configured_budget_is_at_most_all_regions():
    """And nothing where nothing is shown; one that the user names is refused instead."""
    one = assistant("cambrian_s")
    configured = one.looking(top_k=50)
    shown = configured.talk()
    shown.ask(QUESTION, images=[PHOTO])
    assert shown.top_k == shown.regions < 50
    assert configured.talk(looking=DENSE).top_k is None
    text = configured.talk()
    text.ask(QUESTION)
    assert text.regions == 0 and len(list(text.answer(2, watch=True))) == 2
    with pytest.raises(UserError, match="no watched answer about anything shown"):
        text.trace()
    with pytest.raises(UserError, match=f"top_k=50 must be between 1 and {shown.regions}"):
        one.talk(looking=Looking(top_k=50)).ask(QUESTION, images=[PHOTO])


def test_an_empty_system_prompt_is_one(monkeypatch):
    """And not the template's own, nor the family's."""
    got = prompt_of("cambrian_s", monkeypatch, system="")
    assert got.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


def test_a_question_without_pictures_leaves_their_cache_as_it_is():
    """Nobody reads empty slots of regions that the layout could have and no picture has."""
    talking = assistant("cambrian_s").talk(looking=Looking(keep=0.5))
    talking.ask(QUESTION, videos=[FRAMES[:2]])
    before = talking._session.slots, talking._session._cache.visual_order.shape
    assert before[0] < assistant("cambrian_s").layout.slots
    list(talking.answer(2))
    talking.ask(FURTHER)
    assert (talking._session.slots, talking._session._cache.visual_order.shape) == before


def test_files_can_be_asked_about_in_turns(tmp_path):
    """Named, as in generate; what is none is refused, and the conversation goes on."""
    skimage.io.imsave(tmp_path / "photo.png", PHOTO)
    talking = assistant("cambrian_s").talk(looking=TWO)
    with pytest.raises(UserError, match=r"absent\.png"):
        talking.ask(QUESTION, images=[str(tmp_path / "absent.png")])
    with pytest.raises(UserError, match=r"videos='walk\.mp4' must be a list of videos"):
        talking.ask(QUESTION, videos="walk.mp4")
    talking.ask(QUESTION, images=[tmp_path / "photo.png"])
    expected = talk()
    assert [a.text for a in talking.answer(3)] == [a.text for a in expected.answer(3)]


def test_a_running_video_may_have_fewer_regions_than_the_budget_at_first():
    """More are to come."""
    talking = assistant("cambrian_s").talk(looking=Looking(top_k=50))
    talking.watch(FRAMES[:1])
    assert talking.top_k == talking.regions < 50
    with pytest.raises(UserError, match="top_k=50 must be between"):
        assistant("cambrian_s").talk(looking=Looking(top_k=50)).watch(FRAMES[:1], last=True)


def test_a_trace_is_of_the_question_that_was_answered():
    """Also when another one, about another picture, has been read."""
    talking = talk(looking=Looking(top_k=1))
    list(talking.answer(2, watch=True))
    before = talking.trace()
    talking.ask(FURTHER, images=[PHOTO[:, ::-1]])
    after = talking.trace()
    assert after.question == QUESTION and len(after.units) == len(before.units)
    np.testing.assert_array_equal(after.selected, before.selected)
    list(talking.answer(2, watch=True))
    assert talking.trace().question == FURTHER and len(talking.trace().pictures) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"stop": "END"}, "put brackets around it"),
        ({"looking": Looking(top_k=1, dense_layers=(9,))}, r"dense_layers=\(9,\) must be"),
    ],
)
def test_what_cannot_be_answered_is_said_before_anything_is_computed(options, sentence, monkeypatch):
    """Prefill may take minutes."""
    monkeypatch.setattr(chat, "Session", None)
    with pytest.raises(UserError, match=sentence):
        assistant("cambrian_s").generate(QUESTION, images=[PHOTO], **options)


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
    for wrong, sentence in (("<image> and this?", "has 1 <image>"), ("  ", "is empty")):
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
    other = one.looking(video_region=(2, 3, 3), newlines="region", share="group")
    plain, slabs = (each.talk(looking=Looking(top_k=1)) for each in (one, other))
    for talking in (plain, slabs):
        talking.ask(QUESTION, videos=[FRAMES])
    assert len(plain.units) == len(slabs.units) == 4
    assert (plain.regions, slabs.regions) == (4, 2)
    (said,) = slabs.answer(1, watch=True)
    assert said.glance.selected.shape == (3, 2, 2)
    for wrong, sentence in (
        ({"share": "x"}, "gaze.share='x' must be one of"),
        ({"region": (9, 9)}, "is larger than the tower's 6x6 token grid"),
        ({"video_region": (1, 2)}, "must be three sizes"),
        ({"context_tokens": 1}, "are parameters of the checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            one.looking(**wrong)
