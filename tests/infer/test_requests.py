"""Many questions: batches of unequal samples, files of them, and what is refused."""

import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import gaze_jax
from gaze_jax.compiles import compiles
from gaze_jax.errors import UserError
from gaze_jax.infer import memory
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.requests import Request, answer_all, read_requests, record
from gaze_jax.infer.sampler import Sampler
from gaze_jax.infer.steer import LookAt
from tests.helpers import multimodal

skimage_data = pytest.importorskip("skimage.data")

pytestmark = pytest.mark.xdist_group("parity")

PHOTO = skimage_data.astronaut()[:60, :90]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    return Sampler.load(multimodal.write("cambrian_s", tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, photo in (("wide", PHOTO), ("tall", PHOTO[:, :40])):
        Image.fromarray(photo).save(folder / f"{name}.png")
    return folder


def test_a_batch_says_what_each_would_say_alone(sampler, photos):
    """Unequal pictures, questions, lengths, budgets, seeds, boxes and stops."""
    wide, tall = str(photos / "wide.png"), str(photos / "tall.png")
    requests = [
        Request(
            "What is this?",
            "a",
            (wide,),
            max_tokens=9,
            temperature=0.9,
            sample_top_k=40,
            seed=3,
            gaze_top_k=2,
        ),
        Request("<image> and <image>, which?", "b", (tall, wide), max_tokens=3, gaze_top_k=1),
        Request("Colour?", "c", (tall,), max_tokens=12, stop=("x",), look_at=("0,0,5,5",), gaze_top_k=1),
        Request("And this?", "d", (wide,), max_tokens=4, gaze_dense=True),
    ]
    found = dict(
        zip("abcd", [answer for _, answer in answer_all(sampler, requests, return_trace=True)], strict=True)
    )
    for request in (requests[0], requests[2]):  # one is drawn, the other is steered and stops
        alone = sampler.generate(
            request.question,
            images=request.images,
            gaze=request.gaze,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            sample_top_k=request.sample_top_k,
            seed=request.seed,
            stop=request.stop,
            return_trace=True,
        )
        together = found[request.id]
        assert (together.tokens, together.text, together.finish_reason) == (
            alone.tokens,
            alone.text,
            alone.finish_reason,
        )
        assert (together.regions, together.top_k) == (alone.regions, alone.top_k)
        np.testing.assert_array_equal(together.trace.selected, alone.trace.selected)
        np.testing.assert_allclose(together.trace.dense, alone.trace.dense, atol=1e-4)
        assert together.trace.prompt == alone.trace.prompt != ()
        np.testing.assert_array_equal(together.trace.region_keys, alone.trace.region_keys)
        np.testing.assert_allclose(together.trace.probabilities, alone.trace.probabilities, rtol=1e-3)
    assert found["b"].finish_reason == "length" and len(found["b"].tokens) == 3
    assert found["d"].trace.selected.size == 0 and found["d"].top_k is None
    assert record(requests[0], found["a"])["regions"] == found["a"].regions


def test_options_share_a_batch_and_its_programs(sampler, photos, monkeypatch):
    """Counts, fractions, counts per layer and boxes; each answer is that of the question alone."""
    built = []

    def engine(*arguments, **options):
        built.append(len(arguments[2]))
        return Engine(*arguments, **options)

    monkeypatch.setattr("gaze_jax.infer.requests.Engine", engine)
    file = (str(photos / "wide.png"),)
    requests = [
        Request("What?", "a", file, max_tokens=4, gaze_top_k=2),
        Request("What?", "b", file, max_tokens=4, gaze_keep=0.5, look_at=("0,0,60,60",)),
        Request("What?", "c", file, max_tokens=4, gaze_top_k=(3, 1, 2)),
    ]
    found = [answer for _, answer in answer_all(sampler, requests, return_trace=True)]
    assert built == [3]
    for request, answer in zip(requests, found, strict=True):
        alone = sampler.generate("What?", images=file, gaze=request.gaze, max_tokens=4, return_trace=True)
        assert answer.tokens == alone.tokens and answer.trace.top_k == alone.trace.top_k
        np.testing.assert_array_equal(answer.trace.selected, alone.trace.selected)
    counts = [(answer.trace.selected >= 0).sum(axis=-1).max(axis=(0, 2)).tolist() for answer in found]
    assert counts == [[2, 2, 2], [2, 2, 2], [3, 1, 2]]
    assert [(answer.top_k, answer.keep) for answer in found] == [(2, None), (None, 0.5), ((3, 1, 2), None)]
    assert json.loads(json.dumps(record(requests[2], found[2])))["gaze_top_k"] == [3, 1, 2]


class TerminalStream(io.StringIO):
    """A stderr that a person watches."""

    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_to_a_person(terminal, sampler, photos, monkeypatch):
    """Answered and refused questions count; others may turn it off, and a file gets nothing."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    good = Request("What?", "a", (str(photos / "wide.png"),), max_tokens=4, gaze_top_k=2)
    bad = Request("What?", "b", ("none.png",))
    for shown in (True, False):
        monkeypatch.setattr("sys.stderr", stderr := TerminalStream() if terminal else io.StringIO())
        refused = {}
        found = answer_all(sampler, [bad, good, bad], failed=refused.__setitem__, progress=shown)
        assert [request.id for request, _ in found] == ["a"] and list(refused) == [bad]
        if terminal and shown:
            assert "3/3 questions" in stderr.getvalue() and "\x1b[?25h" in stderr.getvalue()
        else:
            assert stderr.getvalue() == ""


def test_other_options_compile_nothing(sampler):
    """One program each of prefill and decoding, one more of decoding with full layers, two that are dense."""

    def ask(**options):
        before = compiles()
        sampler.generate("Where?", images=[PHOTO], gaze=GazeOptions(**options), max_tokens=3)
        return compiles() - before

    box, other = LookAt((0, 0, 20, 20)), LookAt((30, 10, 80, 50), layers=(1,), bias=2.0)
    first = {"top_k": {"top_k": 2}, "full": {"top_k": 2, "full_layers": (1,)}, "dense": {"dense": True}}
    needed = {name: ask(**options) for name, options in first.items()}
    more = [
        {"top_k": 3},
        {"top_k": 1, "look_at": (box,)},
        {"top_k": 2, "look_at": (box, other)},
        {"keep": 0.4, "look_at": (other,)},
        {"keep": 0.9},
        {"top_k": (3, 1, 5)},
        {"top_k": (1, 2, 4), "look_at": (LookAt((50, 0, 60, 60), bias=-1.0),)},
        {"top_k": 3, "full_layers": (0, 2)},
        {"keep": 0.4, "full_layers": (2,), "look_at": (other,)},
        {"dense": True},
        {"top_k": 2},
    ]
    assert [ask(**options) for options in more] == [0] * len(more)
    assert needed["full"] <= 1, "full layers are budgets to prefill"


def test_questions_come_from_lines_of_json(tmp_path, photos):
    """With defaults for what a line leaves out, and its number for an id."""
    path = tmp_path / "questions.jsonl"
    lines = [
        {
            "question": "<image> What?",
            "images": ["x.png"],
            "gaze_top_k": 2,
            "sample_top_k": 50,
            "temperature": 1,
            "look_at": ["0,0,5,5"],
        },
        {"question": "Where?", "gaze_top_k": [4, 2, 2]},
        {"question": "Why?", "id": "why", "stop": ["."], "gaze_keep": 0.5, "system": None},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    first, layers, second = read_requests(path, max_tokens=7, system="Be brief.")
    assert (first.id, first.images, first.max_tokens, first.system) == (
        "1",
        (str(tmp_path / "x.png"),),
        7,
        "Be brief.",
    )
    assert (first.gaze.top_k, first.sample_top_k, second.sample_top_k) == (2, 50, None)
    assert layers.gaze.top_k == (4, 2, 2)
    assert first.gaze.look_at[0].box == (0.0, 0.0, 5.0, 5.0)
    assert (second.id, second.stop, second.gaze_keep, second.system) == ("why", (".",), 0.5, None)
    path.write_text("\ufeff" + json.dumps({"question": "one\u2028two\x85"}, ensure_ascii=False) + "\r\n")
    assert [request.question for request in read_requests(path)] == ["one\u2028two\x85"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question": "a", "topk": 1}', "Line 1 of .* has an unknown field 'topk'; known are question, id"),
        (
            '{"question": "a", "gaze_top_k": "1"}',
            "has gaze_top_k='1', which should be an integer, a list of integers, or null",
        ),
        (
            '{"question": "a", "gaze_top_k": [1, true]}',
            r"has gaze_top_k=\[1, True\], which should be an integer",
        ),
        ('{"question": "a", "gaze_top_k": []}', r"Line 1 of .*: gaze_top_k=\(\) must be a whole number"),
        ('{"question": "a", "gaze_top_k": [2, 0]}', "Line 1 of .*: gaze_top_k=2,0 must be at least 1"),
        ('{"question": "a", "gaze_top_k": true}', "has gaze_top_k=True, which should be an integer"),
        ('{"question": "a", "images": "x.png"}', "has images='x.png', which should be a list of texts"),
        ('{"question": "a", "gaze_dense": 1}', "has gaze_dense=1, which should be true or false"),
        ('{"images": []}', "has no question; ask something"),
        ('{"question": "<image> a"}', "has 1 <image> and 0 <video> tags but 0 images"),
        (
            '{"question": "a", "gaze_top_k": 0}',
            "Line 1 of .*: gaze_top_k=0 must be at least 1; gaze_dense attends",
        ),
        ('{"question": "a", "gaze_keep": 2}', "Line 1 of .*: gaze_keep=2.0 must be above 0"),
        ('{"question": "a", "sample_top_k": -1}', "Line 1 of .*: sample_top_k=-1 must be at least 1"),
        (
            '{"question": "a", "sample_top_k": 0.5}',
            "has sample_top_k=0.5, which should be an integer or null",
        ),
        ('{"question": "a", "top_k": 1}', "'top_k', which is now gaze_top_k .* or sample_top_k"),
        ('{"question": "a", "keep": 0.5}', "has the field 'keep', which is now gaze_keep"),
        ('{"question": "a", "dense": true}', "has the field 'dense', which is now gaze_dense"),
        ('{"question": "a", "dense_layers": [0]}', "'dense_layers', which is now gaze_full_layers"),
        ('{"question": "a", "full_layers": [0]}', "'full_layers', which is now gaze_full_layers"),
        ('{"question": "a", "stop": [""]}', "Line 1 of .*: A stop string is empty"),
        ('{"question": "a", "top_p": 2}', "top_p=2 must be above 0 and at most 1"),
        ('{"question": "a", "look_at": ["1,2"]}', "look_at='1,2' must be x0,y0,x1,y1"),
        ("[1]", "must be a JSON object, not list"),
        ("{", "is not valid JSON"),
        ("", "is empty; write one JSON object per line"),
        ('{"question": "a", "id": "2"}\n{"question": "b"}', "has id '2' more than once"),
    ],
)
def test_a_wrong_line_is_named(line, sentence, tmp_path):
    """In one sentence, before anything is loaded."""
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=sentence) as error:
        read_requests(path)
    assert "\n" not in str(error.value)


def test_a_question_that_cannot_be_read_is_named(sampler, photos):
    """Its file is missing, its picture has fewer regions than it selects."""
    for request, sentence in (
        (Request("What?", "q7", ("none.png",)), "Question 'q7': Image 'none.png' is not a file"),
        (
            Request("What?", "q7", (str(photos / "tall.png"),), gaze_top_k=99),
            "Question 'q7': gaze_top_k=99 must be between",
        ),
        (
            Request("What?", "q7", (str(photos / "tall.png"),), gaze_top_k=(1, 2)),
            "Question 'q7': gaze_top_k=1,2 is for 2 layers but the model has 3",
        ),
        (Request("What?", "q7", gaze_top_k=1, look_at=("0,0,1,1",)), "Question 'q7': Nothing is shown"),
        (
            Request("What?", "q7", gaze_top_k=1, gaze_full_layers=(9,)),
            r"Question 'q7': gaze_full_layers=\(9,\) must be",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            list(answer_all(sampler, [request]))
    with pytest.raises(UserError, match="batch_size=0"):
        list(answer_all(sampler, [], batch_size=0))
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read \(No such file"):
        read_requests("nowhere.jsonl")


def test_too_much_for_the_cache_is_said_before_it_is_computed(sampler, monkeypatch):
    """With the numbers: of a limit, and of memory."""
    monkeypatch.setattr("gaze_jax.infer.chat_session.Engine", None)  # computing anything would fail
    small = dataclasses.replace(sampler, cache_tokens=60)
    with pytest.raises(UserError) as error:
        small.generate("What is this?", images=[PHOTO], max_tokens=200)
    tokens = [int(word) for word in re.findall(r"\b\d+\b", str(error.value))]
    visual, other, wanted = tokens[:3]
    assert visual + other == wanted > 60 and other > 200 and "cache_tokens=60" in str(error.value)
    monkeypatch.setattr("gaze_jax.infer.loaded.free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"takes 0\.\d MB on a device but 0\.0 MB are free; show less"):
        sampler.generate("What is this?", images=[PHOTO])


def test_bytes_of_a_cache_are_those_of_its_arrays(sampler):
    """Resident in float32, as int8, and without the visual part."""
    config = sampler.config
    c = config.decoder
    per = c.depth * c.num_kv_heads
    expected = per * (2 * 4 * c.head_dim * (5 * 9 + 32) + 4 * c.head_dim * 5)
    assert memory.cache_bytes(config, 1, 5, 9, 32) == expected
    assert memory.cache_bytes(config, 3, 5, 9, 32) == 3 * expected
    chat = sampler.chat(gaze=GazeOptions(top_k=1))
    chat.ask("What?", images=[PHOTO])
    cache = chat._engine._cache
    regions, slots = cache.visual_order.shape[1:]
    held = sum(
        a.nbytes for a in (*jax.tree.leaves(cache.visual), cache.descriptors, cache.text_k, cache.text_v)
    )
    assert held == memory.cache_bytes(config, 1, regions, slots, cache.text_k.shape[3])
    small = sampler.with_gaze(visual_dtype="int8").config
    saved = per * 2 * 45 * (4 * c.head_dim - c.head_dim - 4)
    assert expected - memory.cache_bytes(small, 1, 5, 9, 32) == saved
    away = sampler.with_gaze(decode_implementation="offload").config
    assert expected - memory.cache_bytes(away, 1, 5, 9, 32) == per * 2 * 45 * 4 * c.head_dim
    assert memory.cache_bytes(away, 1, 5, 9, 32, on_host=True) == expected


def test_the_package_loads_and_answers(sampler, tmp_path):
    """gaze_jax.load and generate are enough; load may set a field of GazeConfig."""
    where = multimodal.write("llava_onevision", tmp_path)
    model = gaze_jax.load(where, select_per="kv_head")
    assert model.config.gaze.select_per == "kv_head" and model.name == "source"
    heard = []
    answer = model.generate(
        "What is this?",
        images=[PHOTO],
        gaze=gaze_jax.GazeOptions(keep=0.5),
        max_tokens=5,
        on_text=heard.append,
    )
    assert isinstance(answer, gaze_jax.Answer) and "".join(heard) == answer.text
    assert (answer.top_k, answer.keep, answer.trace) == (None, 0.5, None)
    assert (
        repr(answer)
        == f"Answer({answer.text!r}, {len(answer.tokens)} tokens, finish_reason={answer.finish_reason!r})"
    )
    with pytest.raises(UserError, match="must be a list of images"):
        model.generate("What?", images="photo.png")
    with pytest.raises(UserError, match="is not a directory; give a checkpoint"):
        gaze_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gaze.select_per='x' must be one of"):
        gaze_jax.load(where, select_per="x")
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = gaze_jax.laod
