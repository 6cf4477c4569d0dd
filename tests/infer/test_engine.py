"""The engine: prefill, decode and extend equal one pass, single rows, and other step sizes."""

import dataclasses

import jax
import numpy as np
import pytest

from gaze_jax.compiles import compiles
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import IGNORE
from gaze_jax.data.sample import Video
from gaze_jax.errors import UserError
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.programs import STEPS, bucket
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers.engines import (
    IMAGES,
    MODEL,
    TOKENIZER,
    at_once,
    decode,
    generated_row,
    joined,
    logits,
    make_engine,
    row,
)
from tests.helpers.models import parameters

PARAMS = parameters(MODEL)["params"]
ASK, MORE = "Which digit is in row 1, column 2?\n", "Which digit is in row 2, column 1?\n"


def test_buckets_are_few_and_near():
    """Four an octave, none smaller than what it holds, none a quarter larger."""
    sizes = [bucket(n) for n in range(2000)]
    assert all(n <= size <= max(n * 1.25, 1) for n, size in enumerate(sizes))
    assert sorted(set(sizes))[:18] == [*range(9), 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert [bucket(size) for size in sizes] == sizes


@pytest.mark.parametrize(
    ("top_k", "gaze"),
    [
        (2, GazeOptions(top_k=2, full_layers=(1,))),
        pytest.param(None, GazeOptions(dense=True), marks=pytest.mark.long),
    ],
)
def test_what_is_returned_changes_no_token_and_no_count(top_k, gaze):
    """A selection is the trace without attention, also in a layer that reads everything."""
    found = {
        returns: decode(make_engine(row(0, ASK), budgets=top_k, gaze=gaze), 6, returns=returns)
        for returns in ("tokens", "selection", "trace")
    }
    assert set(found["tokens"]) == {"tokens"}
    routed = {"selected"} if top_k else set()
    assert set(found["selection"]) == {"tokens", "entries", "visual_tokens"} | routed
    assert set(found["trace"]) - set(found["selection"]) == {"probability", "attention", "dense"} | (
        {"scores"} if top_k else set()
    )
    for less, more in (("tokens", "selection"), ("selection", "trace")):
        for name, values in found[less].items():
            np.testing.assert_array_equal(values, found[more][name], err_msg=name)


def test_one_step_at_a_time_has_the_same_bits():
    """Streaming calls the same program more often."""
    chunked = decode(make_engine(row(0, ASK)), STEPS + 3, returns="trace")
    steps = decode(make_engine(row(0, ASK)), STEPS + 3, returns="trace", chunked=False)
    assert chunked["tokens"].shape == (STEPS + 3, 1)
    for name, values in chunked.items():
        np.testing.assert_array_equal(steps[name], values, strict=True, err_msg=name)


def test_a_trace_adds_up():
    """Shares of attention are a softmax: the selection's are larger than dense attention gives it."""
    found = decode(make_engine(row(0, ASK)), 2, returns="trace")
    attention, dense, selected = found["attention"], found["dense"], found["selected"]
    assert selected.sum(axis=-1).tolist() == np.full(selected.shape[:-1], 2).tolist()
    assert (attention[~selected] == 0).all() and (attention[selected] > dense[selected]).all()
    for shares in (attention, dense):
        assert (shares >= 0).all() and (shares.sum(axis=-1) < 1).all()
    assert found["visual_tokens"].tolist() == [[16], [16]]
    everything = decode(make_engine(row(0, ASK), budgets=None), 2, returns="trace")
    np.testing.assert_array_equal(everything["attention"], everything["dense"])


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_trace_holds_the_probability_that_the_model_gave_to_each_token(temperature):
    """Of its softmax, not of the hotter one that tokens are drawn from; the logits are of another program."""
    engine = make_engine(row(0, ASK))
    for _ in range(3):
        logarithms = jax.nn.log_softmax(logits(engine).astype(np.float64)[0])
        found = decode(engine, 1, returns="trace", temperature=temperature)
        assert found["probability"].shape == (1, 1) and found["probability"].dtype == np.float32
        token = int(found["tokens"][0, 0])
        assert float(found["probability"][0, 0]) == pytest.approx(np.exp(logarithms[token]), rel=1e-4)


@pytest.mark.parametrize("top_k", [2, pytest.param(None, marks=pytest.mark.long)])
def test_turns_with_the_cache_equal_one_pass(top_k):
    """Answer, then prefill text and another image: the logits of the whole sequence in one pass."""
    engine = make_engine(row(0, ASK), budgets=top_k, free_slots=4)
    begun = row(0, ASK)
    generated = generated_row(decode(engine, 5)["tokens"][:, 0], int(begun["text_order"][-1]) + 1)
    further = row(MORE, 1, MORE, order=int(engine.order[0]) + 1)
    engine.prefill([further])
    chunked = joined(begun, generated, further)
    np.testing.assert_allclose(logits(engine)[0], at_once(MODEL, PARAMS, chunked, top_k), atol=1e-4)
    assert engine.regions == 8 and engine.capacity == 8


def test_frames_appended_piece_by_piece_equal_all_at_once():
    """Cuts of a running video leave no trace in the logits."""
    config = dataclasses.replace(MODEL, gaze=dataclasses.replace(MODEL.gaze, select_per="kv_head"))
    frames = [np.array(image) for image in IMAGES]
    engine = make_engine(row(MORE, Video(0, 0, 1, False), config=config, videos=[frames]), config=config)
    for start, stop in ((1, 2), (2, 4)):
        order = int(engine.order[0]) + 1
        engine.prefill([row(Video(0, start, stop, False), config=config, order=order, videos=[frames])])
    engine.prefill([row(ASK, config=config, order=int(engine.order[0]) + 1)])
    chunked = row(MORE, Video(0), ASK, config=config, videos=[frames])
    params = parameters(config)["params"]
    np.testing.assert_allclose(logits(engine)[0], at_once(config, params, chunked, 2), atol=1e-4)


@pytest.mark.long  # test_requests.py compares a batch with single questions
def test_rows_do_not_know_each_other():
    """Unequal prompts and budgets in one batch give the answers that each gives alone."""
    rows = [row(0, ASK), row(1, MORE, 2, "Where is the only 7?\n"), row(3, MORE)]
    together = make_engine(*rows, budgets=[1, 3, 2])
    expected = [make_engine(one, budgets=[k]) for one, k in zip(rows, (1, 3, 2))]
    np.testing.assert_allclose(logits(together), np.concatenate([logits(one) for one in expected]), atol=1e-4)
    hot = {"temperature": 1.5}
    found = decode(together, 6, seeds=[4, 5, 6], **hot)["tokens"]
    alone = [decode(one, 6, seeds=[4 + b], **hot)["tokens"] for b, one in enumerate(expected)]
    np.testing.assert_array_equal(found, np.concatenate(alone, axis=1))


def test_a_row_that_ended_is_silent_and_leaves_nothing():
    """It yields -100; a later prefill equals a conversation in which only the end token is missing."""
    free = decode(make_engine(row(0, ASK), row(1, ASK)), 6)["tokens"]
    end = int(free[2, 0])
    engine = make_engine(row(0, ASK), row(1, ASK))
    found = decode(engine, 6, ends=(end,))["tokens"]
    for b in range(2):
        (at,) = np.nonzero(free[:, b] == end)
        stop = at[0] + 1 if len(at) else 6
        np.testing.assert_array_equal(found[:stop, b], free[:stop, b])
        assert (found[stop:, b] == IGNORE).all()
    engine.prefill([row(MORE, order=int(order) + 1) for order in engine.order])
    for b in range(2):
        generated = [token for token in found[:, b] if token not in (end, IGNORE)]
        begun, start = row(b, ASK), int(engine.order[b]) + 1 - len(TOKENIZER.encode(MORE)[0]) - len(generated)
        chunked = joined(begun, generated_row(generated, start), row(MORE, order=start + len(generated)))
        np.testing.assert_allclose(logits(engine)[b], at_once(MODEL, PARAMS, chunked, 2), atol=1e-4)


def test_a_budget_for_each_layer():
    """The logits are those of one pass with these budgets; equal ones are one budget, bit for bit."""
    arrays = row(0, ASK)
    passes = {
        budget: at_once(MODEL, PARAMS, arrays, np.reshape(budget, (2, 1, 1))) for budget in ((1, 3), (3, 1))
    }
    assert np.abs(np.subtract(*passes.values())).max() > 1e-3, "the layers differ"
    for budget, expected in passes.items():
        engine = make_engine(arrays, budgets=[budget])
        np.testing.assert_allclose(logits(engine)[0], expected, atol=1e-4)
        found = decode(engine, 4, returns="selection")["selected"][:, :, 0].sum(axis=-1)
        np.testing.assert_array_equal(found, np.broadcast_to(np.reshape(budget, (2, 1)), found.shape))
    one, many = (decode(make_engine(arrays, budgets=[b]), 4, returns="trace") for b in (2, (2, 2)))
    for name in one:
        np.testing.assert_array_equal(one[name], many[name], err_msg=name)
    np.testing.assert_array_equal(*(logits(make_engine(arrays, budgets=[b])) for b in (2, (2, 2))))


def test_an_answer_that_was_cut_can_go_on():
    """Decoding again without a prefill continues with the last token."""
    chunked = decode(make_engine(row(0, ASK)), 6)["tokens"]
    engine = make_engine(row(0, ASK))
    parts = [decode(engine, 2)["tokens"], decode(engine, 4)["tokens"]]
    np.testing.assert_array_equal(np.concatenate(parts), chunked)


def test_nothing_compiles_twice():
    """Another prompt of the bucket, other budgets, seeds and lengths: the programs are there."""
    gaze = GazeOptions(keep=0.3)

    def run(arrays, keep, temperature, length, seed):
        engine = make_engine(arrays, budgets=keep, gaze=gaze)
        tokens = decode(engine, length, temperature=temperature, seeds=[seed])["tokens"]
        engine.prefill([row(MORE, order=int(engine.order[0]) + 1)])
        return tokens, decode(engine, length)["tokens"]

    run(row(0, ASK), 0.5, 0.0, 3, 0)
    before = compiles()
    assert before > 0
    run(row(1, "Which digit is in row 2, column 2?\n"), 0.5, 1.0, 5, 9)
    assert compiles() == before
    run(row(1, ASK, 2, MORE), 0.5, 1.0, 5, 9)
    assert compiles() > before, "the counter counts"


@pytest.mark.long  # test_nothing_compiles_twice, test_buckets_are_few_and_near
def test_a_long_conversation_compiles_seldom():
    """The cache grows by half at least, so of many equal turns few make it grow."""
    engine = make_engine(row(0, ASK), free_slots=128)
    compiled, sizes = [], []
    for _ in range(8):
        before = compiles()
        decode(engine, 8)
        engine.prefill([row(MORE, order=int(engine.order[0]) + 1)])
        compiled.append(compiles() > before)
        sizes.append(engine._cache.text_order.shape[1])
    grew = np.diff(sizes) > 0
    assert grew.sum() == 1 and sum(compiled[2:]) <= 2  # the turn that grows, and the next one's answer


def test_a_mesh_changes_where_rows_are_and_not_what_they_say():
    """Rows are dealt to the devices, three rows to four of them; the cache stays split."""
    rows = [row(0, ASK), row(1, MORE), row(3, MORE)]
    alone, mesh = make_engine(*rows), make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    spread = make_engine(*rows, mesh=mesh)
    split = spread._cache.text_k.sharding
    assert split.spec[1] == ("data", "fsdp") and len(split.device_set) == 4
    found, expected = decode(spread, 5), decode(alone, 5)
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    assert spread._cache.text_k.sharding.spec[1] == ("data", "fsdp")
    spread.prefill([row(MORE, order=int(order) + 1) for order in spread.order])
    alone.prefill([row(MORE, order=int(order) + 1) for order in alone.order])
    with jax.set_mesh(mesh):
        got = logits(spread)
    np.testing.assert_allclose(got, logits(alone), atol=1e-4)


def test_ranks_that_share_a_conversation_say_what_one_device_says():
    """Turns that begin on any rank, and a cache that grows: the same tokens and regions, by number."""
    mesh = make_mesh(MeshConfig(data=1, context=8))
    frames = [np.array(image) for image in IMAGES]
    video = [Video(0, start, stop, False) for start, stop in ((0, 1), (1, 3))]
    answers = {}
    for name, where in (("one", None), ("ranks", mesh)):
        # Five slots free: the first answer makes the cache grow.
        engine = make_engine(*[row(MORE, 0, ASK)] * 2, free_slots=5, mesh=where)
        answers[name] = [decode(engine, 6)]
        for shown, returns in zip(video, ("tokens", "trace"), strict=True):
            orders = [int(order) + 1 for order in engine.order]
            engine.prefill([row(ASK, shown, ASK, order=order, videos=[frames]) for order in orders])
            answers[name].append(decode(engine, 3, returns=returns))
        assert engine.regions == 16
    for mine, theirs in zip(answers["ranks"], answers["one"], strict=True):
        assert set(mine) == set(theirs)
        for name, values in theirs.items():
            size = min(mine[name].shape[-1], values.shape[-1])  # free regions differ in number
            got, wanted = (a[..., :size] if a.ndim > 4 else a for a in (mine[name], values))
            if got.dtype == np.float32:
                np.testing.assert_allclose(got, wanted, atol=2e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(got, wanted, err_msg=name)


def test_a_cache_on_the_host_is_not_split_over_ranks():
    """Refused before anything is compiled."""
    away = dataclasses.replace(MODEL, gaze=dataclasses.replace(MODEL.gaze, decode_implementation="offload"))
    before = compiles()
    with pytest.raises(
        UserError, match=r"^decode_implementation='offload' keeps .* mesh\.context=8 splits it"
    ):
        make_engine(row(0, ASK), config=away, params=PARAMS, mesh=make_mesh(MeshConfig(data=1, context=8)))
    assert compiles() == before


def test_a_box_leads_to_the_same_regions_on_ranks():
    """A bias by the number of a region, of the first image and of one that follows."""
    found = {}
    for name, where in (("one", None), ("ranks", make_mesh(MeshConfig(data=1, context=8)))):
        bias = np.zeros((1, 2, 8), np.float32)
        bias[:, :, [1, 6]] = 1e3
        engine = make_engine(*[row(0, ASK)] * 2, mesh=where)
        engine._selection = lambda _, bias=bias: Selection(np.full((1, 1, 1), 2, np.int32), bias=bias)
        engine.prefill([row(1, MORE, order=int(order) + 1) for order in engine.order])
        found[name] = decode(engine, 2, returns="trace")
        assert found[name]["selected"][..., [1, 6]].all()
    np.testing.assert_array_equal(found["ranks"]["tokens"], found["one"]["tokens"])
    for name in ("probability", "attention"):  # what was selected in the prefill of the second image, too
        np.testing.assert_allclose(found["ranks"][name][..., :8], found["one"][name][..., :8], rtol=1e-4)


@pytest.mark.long  # tests/models/test_options.py and the kernels' suites have int8
def test_an_int8_cache_is_near_and_not_equal():
    """Half the bytes and less; the logits move by less than a hundredth of their spread."""
    small = dataclasses.replace(MODEL, gaze=dataclasses.replace(MODEL.gaze, visual_dtype="int8"))
    exact, rounded = make_engine(row(0, ASK)), make_engine(row(0, ASK), config=small, params=PARAMS)

    def size(engine):
        return sum(a.nbytes for a in jax.tree.leaves(engine._cache.visual))

    assert size(rounded) < 0.6 * size(exact)
    a, b = logits(exact), logits(rounded)
    assert 0 < np.abs(a - b).max() < 0.01 * a.std()


def test_a_layer_that_reads_everything_does():
    """All layers so is dense attention; one of them is neither that nor the budget."""
    arrays = row(0, ASK)
    dense = decode(make_engine(arrays, budgets=None), 4, returns="trace")
    every = decode(make_engine(arrays, gaze=GazeOptions(top_k=2, full_layers=(0, 1))), 4, returns="trace")
    np.testing.assert_array_equal(every["tokens"], dense["tokens"])
    assert every["selected"].all()
    one = decode(make_engine(arrays, gaze=GazeOptions(top_k=2, full_layers=(1,))), 4, returns="trace")
    assert one["selected"][:, 1].all() and (one["selected"][:, 0].sum(axis=-1) == 2).all()
    # The first layer selects by the same keys in both; what it is given differs after the first token only.
    some = decode(make_engine(arrays), 4, returns="trace")
    np.testing.assert_array_equal(one["selected"][0, 0], some["selected"][0, 0])
    assert not np.allclose(one["attention"][0, 1], some["attention"][0, 1])
