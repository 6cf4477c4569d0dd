"""A conversation token by token: the same as one compiled loop, and as one pass over everything."""

import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.streams import Kind, Streams
from gaze_jax.data.phrases import FAMILIES, build_tokenizer
from gaze_jax.data.pipeline import stack
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Text
from gaze_jax.errors import UserError
from gaze_jax.infer.generate import Generator
from gaze_jax.infer.session import Session
from gaze_jax.models import MLLM
from tests.helpers.experiments import tiny_experiment
from tests.helpers.models import forward, parameters

MODEL = tiny_experiment().model
TOKENIZER = build_tokenizer()
PARAMS = parameters(MODEL)["params"]
IMAGE = np.random.default_rng(0).integers(256, size=(20, 20, 3), dtype=np.uint8)


def arrays_of(*texts):
    processor = Processor(MODEL.layout, TOKENIZER, FAMILIES)
    parts = (Image(0), *(Text(text) for text in texts))
    return process(processor, Sample(0, (IMAGE,), parts, FAMILIES[0]))


def session(arrays, *, top_k=2, room=12):
    return Session(MODEL, PARAMS, arrays, room=room, top_k=top_k)


@pytest.mark.parametrize("top_k", [2, None])
def test_tokens_and_selections_are_those_of_the_compiled_loop(top_k):
    """Greedy: the same tokens and the same regions, whichever way they are generated."""
    arrays = arrays_of("Which digit is in row 1, column 2?\n")
    batch = {name: jnp.asarray(value) for name, value in stack([arrays]).items()}
    generator = Generator(MLLM(MODEL), 6, end_id=-7)
    expected = generator(PARAMS, batch["images"], Streams.from_batch(batch), top_k=top_k)
    found = list(session(arrays, top_k=top_k).generate(6, end_ids=()))
    assert [emitted.token for emitted in found] == expected.tokens[:, 0].tolist()
    for t, emitted in enumerate(found):
        if top_k is None:
            assert emitted.selected is None
        else:
            np.testing.assert_array_equal(emitted.selected, expected.selected[t, :, 0])


@pytest.mark.parametrize("top_k", [2, None])
def test_a_second_turn_with_the_cache_equals_one_pass(top_k):
    """Read a prompt, answer, read what follows: the logits are those of the whole sequence at once."""
    arrays = arrays_of("Which digit is in row 1, column 2?\n")
    talk = session(arrays, top_k=top_k, room=6)
    said = [emitted.token for emitted in talk.generate(5, end_ids=())]
    follow = TOKENIZER.encode("Which digit is in row 2, column 1?\n")[0]
    talk.grow(1 + len(follow))
    talk.feed([said[-1], *follow])

    more = np.asarray([*said, *follow], np.int32)
    start = int(max(arrays["dense_order"].max(), arrays["visual_order"].max())) + 1
    tail = {
        "tokens": more,
        "kind": np.full(len(more), Kind.TEXT, np.int32),
        "dense_order": start + np.arange(len(more), dtype=np.int32),
        "dense_pos": start + np.arange(len(more), dtype=np.int32),
        "dense_segment": np.zeros(len(more), np.int32),
        "dense_unit": np.full(len(more), -1, np.int32),
        "targets": np.full(len(more), -100, np.int32),
    }
    whole = arrays | {name: np.concatenate([arrays[name], values]) for name, values in tail.items()}
    batch = {name: jnp.asarray(value) for name, value in stack([whole]).items()}
    budget = None if top_k is None else jnp.int32(top_k)
    logits, _ = forward(MODEL)({"params": PARAMS}, batch["images"], Streams.from_batch(batch), budget)
    np.testing.assert_allclose(talk.logits, logits[0, -1], atol=1e-4)


def test_an_end_token_ends_the_answer():
    """It is emitted, and nothing after it."""
    arrays = arrays_of("Which digit is in row 1, column 2?\n")
    tokens = [emitted.token for emitted in session(arrays).generate(6, end_ids=())]
    stopped = [emitted.token for emitted in session(arrays).generate(6, end_ids={tokens[2]})]
    assert stopped == tokens[: tokens.index(tokens[2]) + 1]


def test_sampling_follows_its_seed():
    """The same seed, the same tokens; another seed, others."""
    arrays = arrays_of("Which digit is in row 1, column 2?\n")

    def tokens(seed):
        return [e.token for e in session(arrays).generate(8, end_ids=(), temperature=2.0, seed=seed)]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "top_k=0 must be between 1 and 4"),
        ({"top_k": 5}, "top_k=5 must be between 1 and 4"),
        ({"room": 0}, "room=0 must be at least 1"),
    ],
)
def test_a_budget_out_of_range_is_refused(options, sentence):
    """Before anything is computed."""
    with pytest.raises(UserError, match=sentence):
        session(arrays_of("Where?"), **options)


def test_tokens_that_do_not_fit_are_refused_with_the_numbers():
    """Nothing is dropped from either end."""
    talk = session(arrays_of("Where?"), room=3)
    talk.feed([1, 2])
    assert talk.room == 1
    with pytest.raises(UserError, match="2 tokens follow but the cache has room for 1"):
        talk.feed([1, 2])
    for wrong in ({"max_tokens": 0}, {"max_tokens": 1, "temperature": -1.0}, {"max_tokens": 1, "seed": -1}):
        with pytest.raises(UserError, match="must be at least 1, temperature="):
            next(talk.generate(**wrong, end_ids=()))
