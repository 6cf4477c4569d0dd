"""A question about a picture is one prompt everywhere, down to the arrays that the engine is given."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gaze_jax.chat.template import CHATML, template_of
from gaze_jax.core.streams import Kind
from gaze_jax.corpora.digits import evaluation_samples
from gaze_jax.corpora.phrases import FAMILIES
from gaze_jax.data import padding, processor
from gaze_jax.evaluate import compare
from gaze_jax.evaluate import run as evaluation
from gaze_jax.evaluate.prompts import Prompt
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.prompt import PLAIN, user_turn
from gaze_jax.infer.requests import Request, answer_all
from gaze_jax.infer.sampler import Sampler
from gaze_jax.train.pipeline import make_processor
from tests.helpers import multimodal
from tests.helpers.experiments import save_untrained, tiny_experiment

skimage_data = pytest.importorskip("skimage.data")

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("prompt")]

QUESTION = "What is this?"
PHOTO = skimage_data.astronaut()[:60, :90]
TOKENS = 4
DENSE = GazeOptions(dense=True)
RUN, NO_TEMPLATE = "a run of train.py", "no template"
CHECKPOINTS = (RUN, *multimodal.FAMILIES, NO_TEMPLATE)

CHATML_TURN = "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
CHATML_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TEXTS = {
    RUN: "<image>What is this?\n",
    "llava_onevision": "<|im_start|>user <image>\nWhat is this?<|im_end|><|im_start|>assistant\n",
    "cambrian_s": CHATML_SYSTEM + CHATML_TURN,
    NO_TEMPLATE: CHATML_TURN,
}

keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def directory(name):
    keep.append(where := tempfile.TemporaryDirectory())
    path = Path(where.name)
    if name == RUN:
        save_untrained(tiny_experiment(), path)
        return path
    found = multimodal.write("llava_onevision" if name == NO_TEMPLATE else name, path)
    if name == NO_TEMPLATE:
        (found / "chat_template.jinja").unlink()
    return found


@functools.cache
def sampler(name):
    return Sampler.load(directory(name))


@functools.cache
def scene():
    """A sample of the corpus that the run was trained on."""
    data = tiny_experiment().data
    return evaluation_samples(data, evaluation._TEST_SEED, "transcribe", 1)[0]


def asked(name):
    """A picture that the checkpoint takes, and a question about it."""
    if name != RUN:
        return PHOTO, QUESTION
    return scene().images[0], scene().parts[1].text.removesuffix("\n")


def by_generate(one, picture, question, _):
    one.generate(question, images=[picture], gaze=DENSE, max_tokens=TOKENS)


def by_chat(one, picture, question, _):
    chat = one.chat(gaze=DENSE)
    chat.ask(question, images=[picture])
    list(chat.stream(TOKENS))


def by_batch(one, picture, question, folder):
    Image.fromarray(picture).save(folder / "picture.png")
    request = Request(question, images=(str(folder / "picture.png"),), gaze_dense=True, max_tokens=TOKENS)
    list(answer_all(one, [request, request]))


def by_compare(one, picture, question, _):
    compare.compare(one, [Prompt("picture", picture, question)], max_tokens=TOKENS)


def by_evaluation(_, picture, question, folder):
    trained = evaluation.load(directory(RUN))
    (row, *_) = evaluation.evaluation_prompts(trained, 1)
    short = row | {field: row[field][:TOKENS] for field in padding.ANSWER_PADDING}
    evaluation.answer(trained, [short], top_k=None)


@pytest.fixture
def record(monkeypatch):
    """The rows that engines are made of, and the tokens that each engine decodes."""
    rows, tokens = [], {}
    init, decode = Engine.__init__, Engine.decode

    def recorded_init(engine, model, params, given, **options):
        rows.append((engine, [dict(row) for row in given]))
        init(engine, model, params, given, **options)

    def recorded_decode(engine, *args, **options):
        for out in decode(engine, *args, **options):
            tokens.setdefault(engine, []).extend(out["tokens"].T.tolist()[0])
            yield out

    monkeypatch.setattr(Engine, "__init__", recorded_init)
    monkeypatch.setattr(Engine, "decode", recorded_decode)
    monkeypatch.setattr(compare, "_measure", lambda *_: [])  # what follows its dense answers is not asked
    return rows, tokens


# test_the_prompt_as_text has the prompt of every checkpoint.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("llava_next", "cambrian_s", RUN) else ())
        for name in CHECKPOINTS
    ],
)
def test_every_command_gives_the_engine_the_same_arrays(name, record, tmp_path):
    """And gets the same greedy answer."""
    picture, question = asked(name)
    ways = [by_generate, by_chat, by_batch, by_compare, *([by_evaluation] if name == RUN else [])]
    rows, tokens = record
    for way in ways:
        way(sampler(name), picture, question, tmp_path)
    assert len(rows) == len(ways), "one engine each"
    first = rows[0][1][0]
    for way, (engine, given) in zip(ways, rows, strict=True):
        for row in given:
            assert set(row) == set(first)
            for field in set(row) - {"sample_id", "family"}:
                np.testing.assert_array_equal(row[field], first[field], err_msg=f"{way.__name__}: {field}")
        assert tokens[engine] == tokens[rows[0][0]], way.__name__
    assert len(tokens[rows[0][0]]) >= 1 and len(first["tokens"]) > 3 and len(first["visual_src"]) > 1


@pytest.mark.parametrize("name", TEXTS)
def test_the_prompt_as_text(name):
    """The trained form, the checkpoint's template, or ChatML; each with its family's system prompt."""
    one = sampler(name)
    pixels = np.zeros((20, 20, 3), np.uint8)
    arrays = one.prompts.question(QUESTION, [pixels]).arrays
    is_text = arrays["kind"] == Kind.TEXT
    ids, order = arrays["tokens"][is_text], arrays["text_order"][is_text]
    picture = int(arrays["visual_order"][arrays["visual_order"] >= 0].min())
    before, after = (one.tokenizer.decode(ids[side].tolist()) for side in (order < picture, order > picture))
    assert f"{before}<image>{after}" == TEXTS[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_of_the_corpus_is_the_plain_form(family):
    """Evaluation's prompt of a sample equals the prompt of the same question about its image."""
    experiment = tiny_experiment()
    builder = dataclasses.replace(sampler(RUN).prompts, processor=make_processor(experiment))
    builder = dataclasses.replace(
        builder, processor=dataclasses.replace(builder.processor, families=(*FAMILIES, "prompt"))
    )
    for sample in evaluation_samples(experiment.data, 0, family, 3):
        expected = processor.prompt(make_processor(experiment), sample)
        question = sample.parts[1].text.removesuffix("\n")
        got = builder.question(question, sample.images, sample_id=sample.id).arrays
        assert set(expected) - set(got) == set(padding.ANSWER_PADDING)
        for field in set(got) - {"family"}:
            np.testing.assert_array_equal(got[field], expected[field], err_msg=field)


def test_one_rule_decides_about_the_template(tmp_path, caplog):
    """PLAIN for a run of train.py, a checkpoint's own template, or ChatML with a warning."""
    assert sampler(RUN).template is PLAIN
    own = sampler("llava_onevision").template
    assert own.name.endswith("chat_template.jinja")
    assert template_of(directory("llava_onevision")).source == own.source
    with caplog.at_level("WARNING", logger="absl"):
        assert template_of(tmp_path) is CHATML
    assert f"{tmp_path} has no chat template, so ChatML is used." in caplog.text
    assert sampler(NO_TEMPLATE).template is CHATML


@pytest.mark.parametrize("name", [RUN, "cambrian_s", NO_TEMPLATE])
def test_a_later_turn_begins_after_the_last_answer(name):
    """For any marker in place of the answers; the parts of all turns together are the whole conversation."""
    builder = sampler(name).prompts
    first, turns = builder.next_turn(builder.opening(), user_turn(QUESTION, (0,), ()))
    second, turns = builder.next_turn(turns, user_turn("And \ue000?", (), ()))
    third, turns = builder.next_turn(turns, user_turn("Why?", (), ()))
    assert [message.role for message in turns][-5:] == ["user", "assistant", "user", "assistant", "user"]
    (text,), (last,) = second, third
    begins = "<|im_end|>" if name == RUN else "<|im_end|>\n<|im_start|>user\n"
    assert text.text.startswith(f"{begins}And \ue000?") and last.text.startswith(f"{begins}Why?")
    assert len(first) >= 2
    assert builder.opening("Be brief.")[0].text == "Be brief."
