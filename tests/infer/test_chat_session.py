"""Chats with small checkpoints of each family: what is prefilled, generated and refused."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gaze_jax.chat.conversation import conversation_parts
from gaze_jax.chat.messages import Message
from gaze_jax.chat.template import CHATML
from gaze_jax.convert.load import load, one_device
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.errors import UserError
from gaze_jax.infer import chat_session, prompt
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.prompt import check_questions
from gaze_jax.infer.sampler import Sampler
from tests.helpers import multimodal
from tests.helpers.chat import tokenizer_json
from tests.helpers.engines import at_once, generated_row, logits

skimage_data = pytest.importorskip("skimage.data")

pytestmark = pytest.mark.xdist_group("parity")

PHOTO = skimage_data.astronaut()[:60, :90]
FRAMES = np.stack([PHOTO[t : t + 40, :50] for t in range(4)])
TWO, DENSE = GazeOptions(top_k=2), GazeOptions(dense=True)
QUESTION, FURTHER = "What is this?", "And what is the colour?"

keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def directory(family):
    keep.append(where := tempfile.TemporaryDirectory())
    return multimodal.write(family, Path(where.name))


@functools.cache
def sampler(family):
    return Sampler.load(directory(family))


def make_chat(family="cambrian_s", question=QUESTION, *, videos=(), gaze=TWO, **options):
    """A chat about the photograph, its first question prefilled."""
    session = sampler(family).chat(gaze=gaze, **options)
    session.ask(question, images=[PHOTO], videos=videos)
    return session


EXPECTED = {
    "llava_onevision": "<|im_start|>user <image><video>\nWhat is this?<|im_end|><|im_start|>assistant\n",
    "llava_next": "<|im_start|>user\n<image><video>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
    "cambrian_s": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image><video>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
}


def prompt_of(family, monkeypatch, **options):
    """The parts of the first prompt, as text with tags."""
    seen = []
    original = prompt.process_with_views

    def record(processor, sample, **options):
        seen.append(sample)
        return original(processor, sample, **options)

    monkeypatch.setattr(prompt, "process_with_views", record)
    make_chat(family, **options)
    tags = {Image: "<image>", Video: "<video>"}
    return "".join(p.text if isinstance(p, Text) else tags[type(p)] for p in seen[0].parts)


def test_later_questions_are_checked_too():
    """A tag without an image, or an empty question, is refused before anything is loaded."""
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


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == "cambrian_s" else pytest.mark.long) for f in multimodal.FAMILIES],
)
def test_answers_stream_and_name_regions(family, monkeypatch):
    """The texts of the steps are the answer; each step selects two regions in every layer and head."""
    tokenizer, ends = sampler(family).tokenizer, sampler(family).end_ids
    emitted = []
    original = Engine.decode

    def record(engine, *args, **options):
        for out in original(engine, *args, **options):
            emitted.extend(out["tokens"][:, 0].tolist())
            yield out

    monkeypatch.setattr(Engine, "decode", record)
    session = make_chat(family, videos=[FRAMES])
    generated = list(session.stream(6, return_trace=True))
    assert 1 <= len(generated) == len(emitted) <= 6
    ids = [token for token in emitted if token not in ends]
    assert "".join(step.text for step in generated) == session.answer().text == tokenizer.decode(ids) != ""
    assert [step.token for step in generated] == [tokenizer.decode([token]) for token in emitted]
    for step in generated:
        selected = step.token_trace.selected
        assert selected.dtype == bool and selected.shape == (3, 4, session.regions)
        assert (selected.sum(axis=-1) == 2).all()
    trace = session.answer().trace
    assert trace.tokens == tuple(step.token for step in generated) and trace.answer == session.answer().text
    np.testing.assert_array_equal(trace.mask(), np.stack([step.token_trace.selected for step in generated]))
    assert [picture.key for picture in trace.pictures] == [(False, 0, 0), *((True, 0, t) for t in range(4))]
    assert trace.probabilities.tolist() == [step.token_trace.probability for step in generated]
    # The keys of the regions that a query selected are those that it attended to.
    keys = np.where(trace.mask(), trace.region_keys, 0).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(keys, trace.entries[..., 0], rtol=1e-6)
    assert trace.region_keys.sum() == trace.visual_tokens[0]
    # The same answer in one call, without a trace.
    again = make_chat(family, videos=[FRAMES])
    list(again.stream(6, chunked=True))
    assert again.answer().tokens == session.answer().tokens


def generating(monkeypatch, family, text):
    """Make engines of this test generate the tokens of ``text``; returns them."""
    ids = sampler(family).tokenizer.encode(text)[0]

    def decode(engine, max_tokens, *, ends, **options):
        engine._ends = frozenset(ends)
        for token in ids[:max_tokens]:
            engine.prefill([generated_row([token], int(engine.order[0]) + 1)])
            done = np.full(engine.batch, token in ends)
            engine._state = dataclasses.replace(engine._state, done=done)
            yield {"tokens": np.full((1, 1), token, np.int32)}

    monkeypatch.setattr(Engine, "decode", decode)
    return ids


@pytest.mark.parametrize(
    ("family", "answer", "gaze", "shown"),
    [
        ("llava_onevision", "A cat.<|im_end|>", DENSE, ()),
        pytest.param("cambrian_s", "A cat.<|im_end|>", TWO, (FRAMES,), marks=pytest.mark.long),
        pytest.param("cambrian_s", "A cat", DENSE, (), marks=pytest.mark.long),
    ],
)
def test_a_further_question_equals_a_conversation_read_at_once(family, answer, gaze, shown, monkeypatch):
    """The cache holds what the template writes around the answer, which ended or was cut; then media."""
    one = sampler(family)
    ids = generating(monkeypatch, family, answer)
    session = make_chat(family, gaze=gaze)
    generated = "".join(step.text for step in session.stream(len(ids)))
    assert generated == answer.removesuffix("<|im_end|>")
    further = f"{FURTHER} \ue000"  # a character that templates are asked with, if it is free
    session.ask(further, videos=shown)
    system = one.family.system
    messages = [
        Message("user", (Image(0), QUESTION)),
        Message("assistant", generated),
        Message("user", (*map(Video, range(len(shown))), further)),
    ]
    messages = [*([Message("system", system)] if system else []), *messages]
    parts = conversation_parts(one.template, messages, arrange=one.family.arrange, add_generation_prompt=True)
    if family == "llava_onevision":
        # Its template asks for an answer with other white space than it shows an old one; the cache has what
        # was read when the answer was given.
        *media, last = parts
        assert last.text.count("<|im_start|>assistant \n") == 1
        asked = last.text.replace("<|im_start|>assistant \n", "<|im_start|>assistant\n")
        parts = (*media, dataclasses.replace(last, text=asked))
    sample = Sample(0, (PHOTO,), parts, "a", shown)
    arrays = process(Processor(one.layout, one.tokenizer, ("a",), one.family.views), sample)
    expected = at_once(one.config, one.params, arrays, gaze.top_k)
    np.testing.assert_allclose(logits(session._engine)[0], expected, atol=1e-4)


@pytest.mark.long  # test_engine.py has a cache that grows between turns
def test_a_long_conversation_makes_its_cache_grow(monkeypatch):
    """The cache grows as needed and keeps what was read before."""
    monkeypatch.setattr(chat_session, "free_slots_for", lambda tokens: tokens)
    narrow, wide = make_chat(gaze=DENSE, free_slots=4), make_chat(gaze=DENSE, free_slots=200)
    assert narrow._engine.free_slots < 20 < 200 <= wide._engine.free_slots
    for session in (narrow, wide):
        for _ in range(2):
            list(session.stream(3))
            session.ask(FURTHER)
    np.testing.assert_allclose(logits(narrow._engine), logits(wide._engine), atol=1e-5)
    assert [a.text for a in narrow.stream(3)] == [b.text for b in wide.stream(3)]


@pytest.mark.long  # test_engine.py has frames in pieces, examples/stream_video.py questions in between
@pytest.mark.parametrize("family", ["cambrian_s", "llava_onevision"])
def test_a_running_video_equals_the_whole_one(family):
    """Frames as they come, in pieces, with a question in between: the logits of the conversation at once."""
    one = sampler(family)
    keep = GazeOptions(keep=0.5)
    running, whole = one.chat(gaze=keep), one.chat(gaze=keep)
    running.append_frames(FRAMES[:1])
    running.append_frames(FRAMES[1:3], last=True)
    for session in (running, whole):
        session.ask(QUESTION, **({} if session is running else {"videos": [FRAMES[:3]]}))
        np.testing.assert_array_equal([u.frame for u in session.views], [0, 1, 2])
    assert running.regions == whole.regions
    np.testing.assert_allclose(logits(running._engine), logits(whole._engine), atol=1e-4)
    assert [a.text for a in running.stream(3)] == [a.text for a in whole.stream(3)]
    running.append_frames(FRAMES[3:])
    running.ask(FURTHER)
    whole.ask(FURTHER, videos=[FRAMES[3:]])
    np.testing.assert_allclose(logits(running._engine), logits(whole._engine), atol=1e-4)
    for mine, theirs in zip(running.views, whole.views, strict=True):
        assert (mine.view, mine.index, mine.frame) == (theirs.view, theirs.index, theirs.frame)
        np.testing.assert_array_equal(mine.regions, theirs.regions)


def test_a_running_video_is_asked_about_alone():
    """One sentence for each mistake, and the conversation goes on."""
    session = sampler("cambrian_s").chat()
    with pytest.raises(UserError, match="There are no frames"):
        session.append_frames([])
    with pytest.raises(UserError, match="Frame 0 of a video"):
        session.append_frames([PHOTO[0]])
    session.append_frames(FRAMES[:1], last=True)
    with pytest.raises(UserError, match="The video has ended"):
        session.append_frames(FRAMES[1:])
    with pytest.raises(UserError, match="takes no other media"):
        session.ask(QUESTION, images=[PHOTO])
    session.ask(QUESTION)
    with pytest.raises(UserError, match="has no answer yet"):
        session.append_frames(FRAMES[:1])


def test_the_configured_budget_is_at_most_all_regions():
    """And nothing where nothing is shown; one that the user names is refused instead."""
    one = sampler("cambrian_s")
    configured = one.with_gaze(top_k=50)
    shown = configured.chat()
    shown.ask(QUESTION, images=[PHOTO])
    assert shown.top_k == shown.regions < 50
    assert configured.chat(gaze=DENSE).top_k is None
    text = configured.chat()
    text.ask(QUESTION)
    assert text.regions == 0 and len(list(text.stream(2, return_trace=True))) == 2
    assert text.answer().trace is None
    with pytest.raises(UserError, match=f"top_k=50 must be between 1 and {shown.regions}"):
        one.chat(gaze=GazeOptions(top_k=50)).ask(QUESTION, images=[PHOTO])


def test_an_empty_system_prompt_is_one(monkeypatch):
    """And not the template's own, nor the family's."""
    got = prompt_of("cambrian_s", monkeypatch, system="")
    assert got.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


def test_a_question_without_pictures_leaves_their_cache_as_it_is():
    """The cache gets no slots for regions that the layout allows but no image has."""
    session = sampler("cambrian_s").chat(gaze=GazeOptions(keep=0.5))
    session.ask(QUESTION, videos=[FRAMES[:2]])
    before = session._engine.slots, session._engine._cache.visual_order.shape
    assert before[0] < sampler("cambrian_s").layout.slots
    list(session.stream(2))
    session.ask(FURTHER)
    assert (session._engine.slots, session._engine._cache.visual_order.shape) == before


def test_files_can_be_asked_about_in_turns(tmp_path):
    """Paths work as in generate; a file that is no image is refused, and the chat can go on."""
    PIL.Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    session = sampler("cambrian_s").chat(gaze=TWO)
    with pytest.raises(UserError, match=r"absent\.png"):
        session.ask(QUESTION, images=[str(tmp_path / "absent.png")])
    with pytest.raises(UserError, match=r"videos='walk\.mp4' must be a list of videos"):
        session.ask(QUESTION, videos="walk.mp4")
    session.ask(QUESTION, images=[tmp_path / "photo.png"])
    expected = make_chat()
    assert [a.text for a in session.stream(3)] == [a.text for a in expected.stream(3)]


def test_a_running_video_may_have_fewer_regions_than_the_budget_at_first():
    """More are to come."""
    session = sampler("cambrian_s").chat(gaze=GazeOptions(top_k=50))
    session.append_frames(FRAMES[:1])
    assert session.top_k == session.regions < 50
    with pytest.raises(UserError, match="top_k=50 must be between"):
        sampler("cambrian_s").chat(gaze=GazeOptions(top_k=50)).append_frames(FRAMES[:1], last=True)


def test_a_trace_is_of_the_question_that_was_answered():
    """Also when another one, about another picture, has been read."""
    session = make_chat(gaze=GazeOptions(top_k=1))
    list(session.stream(2, return_trace=True))
    before = session.answer().trace
    session.ask(FURTHER, images=[PHOTO[:, ::-1]])
    after = session.answer().trace
    assert after.question == QUESTION and len(after.views) == len(before.views)
    np.testing.assert_array_equal(after.selected, before.selected)
    list(session.stream(2, return_trace=True))
    trace = session.answer().trace
    assert trace.question == FURTHER and len(trace.pictures) == 2
    # What the model has read: the first prompt, the first answer, the further question.
    read = before.prompt + before.tokens
    assert trace.prompt[: len(read)] == read and after.prompt == before.prompt
    shown = [token for token in trace.prompt if isinstance(token, int)]
    assert shown == [view.view for view in trace.views] == list(range(len(shown)))
    text = "".join("<image>" if isinstance(token, int) else token for token in before.prompt)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
    )
    assert text.endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    assert FURTHER in "".join(token for token in trace.prompt[len(read) :] if isinstance(token, str))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"stop": "END"}, "put brackets around it"),
        ({"gaze": GazeOptions(top_k=1, full_layers=(9,))}, r"full_layers=\(9,\) must be"),
    ],
)
def test_what_cannot_be_answered_is_said_before_anything_is_computed(options, sentence, monkeypatch):
    """Prefill may take minutes."""
    monkeypatch.setattr(chat_session, "Engine", None)
    with pytest.raises(UserError, match=sentence):
        sampler("cambrian_s").generate(QUESTION, images=[PHOTO], **options)


def test_a_refused_answer_leaves_the_question_open():
    """Numbers are checked first."""
    session = make_chat()
    with pytest.raises(UserError, match="max_tokens=0 must be at least 1"):
        next(session.stream(0))
    with pytest.raises(UserError, match="No question was answered yet"):
        session.answer()
    steps = session.stream(2)
    next(steps)
    with pytest.raises(UserError, match="The answer is not complete"):
        session.answer()
    list(steps)
    assert len(session.answer().tokens) == 2


def test_turns_take_turns():
    """No second answer to a question, and no question before the answer."""
    session = make_chat()
    with pytest.raises(UserError, match="has no answer yet"):
        session.ask(FURTHER)
    list(session.stream(1))
    with pytest.raises(UserError, match="was answered; ask another"):
        list(session.stream(1))
    for wrong, sentence in (("<image> and this?", "has 1 <image>"), ("  ", "is empty")):
        with pytest.raises(UserError, match=sentence):
            session.ask(wrong)


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
    """One sentence each; only a chat template may be missing."""
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
            Sampler.of(case, Path("DIR"))
        assert "\n" not in str(error.value)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "generation_config.json").unlink()
    without = Sampler.of(dataclasses.replace(found, files=tmp_path), Path("DIR"))
    assert without.template is CHATML


def test_how_it_looks_can_be_chosen_when_it_runs():
    """Slabs of frames, routed newlines and shared selections, without another checkpoint."""
    one = sampler("cambrian_s")
    other = one.with_gaze(video_region=(2, 3, 3), newlines="region", select_per="kv_head")
    plain, slabs = (each.chat(gaze=GazeOptions(top_k=1)) for each in (one, other))
    for session in (plain, slabs):
        session.ask(QUESTION, videos=[FRAMES])
    assert len(plain.views) == len(slabs.views) == 4
    assert (plain.regions, slabs.regions) == (4, 2)
    (generated,) = slabs.stream(1, return_trace=True)
    assert generated.token_trace.selected.shape == (3, 2, 2)
    for wrong, sentence in (
        ({"select_per": "x"}, "gaze.select_per='x' must be one of"),
        ({"region": (9, 9)}, "is larger than the tower's 6x6 token grid"),
        ({"video_region": (1, 2)}, "must be three sizes"),
        ({"context_tokens": 1}, "are parameters of the checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            one.with_gaze(**wrong)
