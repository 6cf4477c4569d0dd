"""Sessions: read, say, read on; the same as one pass, as single rows, as other ways to take steps."""

import dataclasses

import jax
import numpy as np
import pytest

from gaze_jax.core.streams import IGNORE, Streams
from gaze_jax.data.pipeline import stack
from gaze_jax.data.sample import Video
from gaze_jax.infer.compiles import compiles
from gaze_jax.infer.generate import Generator
from gaze_jax.infer.look import Looking
from gaze_jax.infer.programs import STEPS, bucket
from gaze_jax.models import MLLM
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers.models import parameters
from tests.helpers.sessions import (
    IMAGES,
    MODEL,
    TOKENIZER,
    at_once,
    joined,
    logits,
    row,
    said_row,
    say,
    session,
)

PARAMS = parameters(MODEL)["params"]
ASK, MORE = "Which digit is in row 1, column 2?\n", "Which digit is in row 2, column 1?\n"


def test_buckets_are_few_and_near():
    """Four an octave, none smaller than what it holds, none a quarter larger."""
    sizes = [bucket(n) for n in range(2000)]
    assert all(n <= size <= max(n * 1.25, 1) for n, size in enumerate(sizes))
    assert sorted(set(sizes))[:18] == [*range(9), 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert [bucket(size) for size in sizes] == sizes


@pytest.mark.parametrize("top_k", [2, None])
def test_tokens_and_selections_are_those_that_evaluation_counts(top_k):
    """Greedy: the same tokens and the same regions as of the program that prefills the whole prompt."""
    arrays = row(0, ASK)
    batch = {name: jax.numpy.asarray(value) for name, value in stack([arrays]).items()}
    expected = Generator(MLLM(MODEL), 6, -7)(PARAMS, batch["images"], Streams.from_batch(batch), top_k=top_k)
    found = say(session(arrays, budgets=top_k), 6, watch=True)
    np.testing.assert_array_equal(found["tokens"], expected.tokens)
    counts = np.stack([getattr(expected.entries, n) for n in ("visual", "newline", "context", "text")], -1)
    np.testing.assert_array_equal(found["entries"], counts)
    if top_k is None:
        assert "selected" not in found
    else:
        np.testing.assert_array_equal(found["selected"], expected.selected)


def test_one_step_at_a_time_has_the_same_bits():
    """Streaming is the same program, asked more often."""
    whole = say(session(row(0, ASK)), STEPS + 3, watch=True)
    steps = say(session(row(0, ASK)), STEPS + 3, watch=True, whole=False)
    assert whole["tokens"].shape == (STEPS + 3, 1)
    for name, values in whole.items():
        np.testing.assert_array_equal(steps[name], values, strict=True, err_msg=name)


def test_what_was_watched_adds_up():
    """Shares of attention are a softmax: the selection's are larger than dense attention gives it."""
    found = say(session(row(0, ASK)), 2, watch=True)
    attention, dense, selected = found["attention"], found["dense"], found["selected"]
    assert selected.sum(axis=-1).tolist() == np.full(selected.shape[:-1], 2).tolist()
    assert (attention[~selected] == 0).all() and (attention[selected] > dense[selected]).all()
    for shares in (attention, dense):
        assert (shares >= 0).all() and (shares.sum(axis=-1) < 1).all()
    assert found["visual_tokens"].tolist() == [[16], [16]]
    everything = say(session(row(0, ASK), budgets=None), 2, watch=True)
    np.testing.assert_array_equal(everything["attention"], everything["dense"])


@pytest.mark.parametrize("top_k", [2, None])
def test_turns_with_the_cache_equal_one_pass(top_k):
    """Answer, read on with text and another picture: the logits of the whole sequence at once."""
    talk = session(row(0, ASK), budgets=top_k, room=4)
    begun = row(0, ASK)
    said = said_row(say(talk, 5)["tokens"][:, 0], int(begun["dense_order"][-1]) + 1)
    further = row(MORE, 1, MORE, order=int(talk.order[0]) + 1)
    talk.read([further])
    whole = joined(begun, said, further)
    np.testing.assert_allclose(logits(talk)[0], at_once(MODEL, PARAMS, whole, top_k), atol=1e-4)
    assert talk.regions == 8 and talk.capacity == 8


def test_frames_appended_piece_by_piece_equal_all_at_once():
    """Cuts of a running video leave no trace in the logits."""
    config = dataclasses.replace(MODEL, gaze=dataclasses.replace(MODEL.gaze, share="group"))
    frames = [np.array(image) for image in IMAGES]
    talk = session(row(MORE, Video(0, 0, 1, False), config=config, videos=[frames]), config=config)
    for start, stop in ((1, 2), (2, 4)):
        order = int(talk.order[0]) + 1
        talk.read([row(Video(0, start, stop, False), config=config, order=order, videos=[frames])])
    talk.read([row(ASK, config=config, order=int(talk.order[0]) + 1)])
    whole = row(MORE, Video(0), ASK, config=config, videos=[frames])
    params = parameters(config)["params"]
    np.testing.assert_allclose(logits(talk)[0], at_once(config, params, whole, 2), atol=1e-4)


def test_rows_do_not_know_each_other():
    """Unequal prompts and budgets in one batch say what each says alone."""
    rows = [row(0, ASK), row(1, MORE, 2, "Where is the only 7?\n"), row(3, MORE)]
    together = session(*rows, budgets=[1, 3, 2])
    expected = [session(one, budgets=[k]) for one, k in zip(rows, (1, 3, 2))]
    np.testing.assert_allclose(logits(together), np.concatenate([logits(one) for one in expected]), atol=1e-4)
    hot = {"temperature": 1.5}
    found = say(together, 6, seeds=[4, 5, 6], **hot)["tokens"]
    alone = [say(one, 6, seeds=[4 + b], **hot)["tokens"] for b, one in enumerate(expected)]
    np.testing.assert_array_equal(found, np.concatenate(alone, axis=1))


def test_a_row_that_ended_is_silent_and_leaves_nothing():
    """It says -100; reading on after its end equals a conversation in which only the end token is missing."""
    free = say(session(row(0, ASK), row(1, ASK)), 6)["tokens"]
    end = int(free[2, 0])
    talk = session(row(0, ASK), row(1, ASK))
    found = say(talk, 6, ends=(end,))["tokens"]
    for b in range(2):
        (at,) = np.nonzero(free[:, b] == end)
        stop = at[0] + 1 if len(at) else 6
        np.testing.assert_array_equal(found[:stop, b], free[:stop, b])
        assert (found[stop:, b] == IGNORE).all()
    talk.read([row(MORE, order=int(order) + 1) for order in talk.order])
    for b in range(2):
        said = [token for token in found[:, b] if token not in (end, IGNORE)]
        begun, start = row(b, ASK), int(talk.order[b]) + 1 - len(TOKENIZER.encode(MORE)[0]) - len(said)
        whole = joined(begun, said_row(said, start), row(MORE, order=start + len(said)))
        np.testing.assert_allclose(logits(talk)[b], at_once(MODEL, PARAMS, whole, 2), atol=1e-4)


def test_an_answer_that_was_cut_can_go_on():
    """Saying more without reading anything continues with the last token."""
    whole = say(session(row(0, ASK)), 6)["tokens"]
    talk = session(row(0, ASK))
    parts = [say(talk, 2)["tokens"], say(talk, 4)["tokens"]]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_nothing_compiles_twice():
    """Another prompt of the bucket, other budgets, seeds and lengths: the programs are there."""
    looking = Looking(keep=0.3)

    def run(arrays, keep, temperature, length, seed):
        talk = session(arrays, budgets=keep, looking=looking)
        tokens = say(talk, length, temperature=temperature, seeds=[seed])["tokens"]
        talk.read([row(MORE, order=int(talk.order[0]) + 1)])
        return tokens, say(talk, length)["tokens"]

    run(row(0, ASK), 0.5, 0.0, 3, 0)
    before = compiles()
    assert before > 0
    run(row(1, "Which digit is in row 2, column 2?\n"), 0.5, 1.0, 5, 9)
    assert compiles() == before
    run(row(1, ASK, 2, MORE), 0.5, 1.0, 5, 9)
    assert compiles() > before, "the counter counts"


def test_a_long_conversation_compiles_seldom():
    """The cache grows by half at least, so of many equal turns few make it grow."""
    talk = session(row(0, ASK), room=128)
    compiled, sizes = [], []
    for _ in range(8):
        before = compiles()
        say(talk, 8)
        talk.read([row(MORE, order=int(talk.order[0]) + 1)])
        compiled.append(compiles() > before)
        sizes.append(talk._cache.dense_order.shape[1])
    grew = np.diff(sizes) > 0
    assert grew.sum() == 1 and sum(compiled[2:]) <= 2  # the turn that grows, and the next one's answer


def test_a_mesh_changes_where_rows_are_and_not_what_they_say():
    """Rows are dealt to the devices, three rows to four of them; the cache stays split."""
    rows = [row(0, ASK), row(1, MORE), row(3, MORE)]
    alone, mesh = session(*rows), make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    spread = session(*rows, mesh=mesh)
    split = spread._cache.dense_k.sharding
    assert split.spec[1] == ("data", "fsdp") and len(split.device_set) == 4
    found, expected = say(spread, 5), say(alone, 5)
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    assert spread._cache.dense_k.sharding.spec[1] == ("data", "fsdp")
    spread.read([row(MORE, order=int(order) + 1) for order in spread.order])
    alone.read([row(MORE, order=int(order) + 1) for order in alone.order])
    with jax.set_mesh(mesh):
        got = logits(spread)
    np.testing.assert_allclose(got, logits(alone), atol=1e-4)


def test_an_int8_cache_is_near_and_not_equal():
    """Half the bytes and less; the logits move by less than a hundredth of their spread."""
    small = dataclasses.replace(MODEL, gaze=dataclasses.replace(MODEL.gaze, visual_dtype="int8"))
    exact, rounded = session(row(0, ASK)), session(row(0, ASK), config=small, params=PARAMS)

    def size(talk):
        return sum(a.nbytes for a in jax.tree.leaves(talk._cache.visual))

    assert size(rounded) < 0.6 * size(exact)
    a, b = logits(exact), logits(rounded)
    assert 0 < np.abs(a - b).max() < 0.01 * a.std()


def test_a_layer_that_reads_everything_does():
    """All layers so is dense attention; one of them is neither that nor the budget."""
    arrays = row(0, ASK)
    dense = say(session(arrays, budgets=None), 4, watch=True)
    every = say(session(arrays, looking=Looking(top_k=2, dense_layers=(0, 1))), 4, watch=True)
    np.testing.assert_array_equal(every["tokens"], dense["tokens"])
    assert every["selected"].all()
    one = say(session(arrays, looking=Looking(top_k=2, dense_layers=(1,))), 4, watch=True)
    assert one["selected"][:, 1].all() and (one["selected"][:, 0].sum(axis=-1) == 2).all()
    # The first layer selects by the same keys in both; what it is given differs after the first token only.
    some = say(session(arrays), 4, watch=True)
    np.testing.assert_array_equal(one["selected"][0, 0], some["selected"][0, 0])
    assert not np.allclose(one["attention"][0, 1], some["attention"][0, 1])
