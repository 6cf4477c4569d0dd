"""Gaze against a model's own dense answers: what is measured, where, and against what."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.core.routing import Routing
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.evaluate import compare as module
from gaze_jax.evaluate.compare import compare, default_top_ks, plot, require_matplotlib, table
from gaze_jax.evaluate.prompts import Prompt
from gaze_jax.infer.prompt import PLAIN
from gaze_jax.infer.sampler import Sampler
from tests.helpers import models, multimodal
from tests.helpers.experiments import tiny_experiment

pytestmark = pytest.mark.xdist_group("compare")

MODEL = tiny_experiment().model  # 4x4 tokens in 4 regions of 2x2, one context token
TOKENIZER = build_tokenizer()
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(256, size=(20, 20, 3), dtype=np.uint8) for _ in range(2)]
PROMPTS = (Prompt("one", IMAGES[0], "Where is the only 7?"), Prompt("two", IMAGES[1], "Read the digit."))
TOKENS = 5


def peaky():
    """Parameters whose queries are six times as long: attention that rests on few keys."""

    def longer(path, leaf):
        return leaf * 6 if any(getattr(key, "key", None) == "q_norm" for key in path) else leaf

    return jax.tree_util.tree_map_with_path(longer, models.parameters(MODEL)["params"])


def sampler(resize=True):
    """A run of train.py with these parameters."""
    return Sampler(MODEL, peaky(), TOKENIZER, PLAIN, frozenset({TOKENIZER.end_id}), resize=resize)


def measure(prompts=PROMPTS, resize=True, **options):
    return compare(sampler(resize), prompts, **{"max_tokens": TOKENS} | options)


@pytest.fixture(scope="module")
def measured():
    """The report, and how many programs it compiled: dense and routed passes."""
    before = module._dense_pass._cache_size(), module._routed_pass._cache_size()
    report = measure()
    after = module._dense_pass._cache_size(), module._routed_pass._cache_size()
    return report, (after[0] - before[0], after[1] - before[1])


@pytest.fixture
def report(measured):
    return measured[0]


def answered(prompt, index=0):
    """The row that is measured, and the answer in it."""
    arrays = module._prompt_arrays(sampler(), [*PROMPTS[:index], prompt])[index]
    bucket = dataclasses.replace(module._bucket([arrays]), text=160)
    answer = module._dense_answer(sampler(), arrays, TOKENS)
    return module._with_answer(arrays, answer, bucket, TOKENS), answer


def test_the_report_has_a_row_for_every_setting_and_is_json(report):
    assert json.loads(json.dumps(report)) == report
    assert (report["regions"], report["visual_tokens"]) == (4, 16)
    settings = [("descriptor", "mean"), ("descriptor", "minmax"), ("oracle", None), ("random", None)]
    expected = [
        (*s, select_per, k) for s in settings for select_per in ("head", "kv_head") for k in (1, 2, 4)
    ]
    assert [(r["strategy"], r["descriptor"], r["select_per"], r["top_k"]) for r in report["rows"]] == expected
    assert [p["name"] for p in report["prompts"]] == ["one", "two"]
    assert 2 <= report["answer_tokens"] <= 2 * TOKENS
    assert report["model"]["gaze"]["region"] == [2, 2]


def test_all_regions_are_dense_attention(report):
    """Invariant 1 for every setting; fewer regions are not dense attention, so the measure is not blind."""
    for row in report["rows"]:
        if row["top_k"] == 4:
            assert (row["entries"], row["entries_fraction"], row["top1"]) == (16.0, 1.0, 1.0)
            assert row["kl"] < 1e-5
        else:
            assert row["entries"] == 4.0 * row["top_k"] and row["kl"] > 1e-4
            assert row["entries_fraction"] == row["top_k"] / 4


def test_settings_differ_and_the_oracle_is_nearer_to_dense_than_random(report):
    kl = {(r["descriptor"] or r["strategy"], r["select_per"], r["top_k"]): r["kl"] for r in report["rows"]}
    for select_per in ("head", "kv_head"):
        for top_k in (1, 2):
            values = [kl[name, select_per, top_k] for name in ("mean", "minmax", "oracle", "random")]
            assert len(set(values)) == 4
            assert values[2] < values[3]
    assert kl["mean", "head", 1] != kl["mean", "kv_head", 1]


def test_the_compared_positions_are_those_that_emit_the_answer():
    """Greedy teacher forcing at these positions gives the generated answer, with or without an end token."""
    for index, prompt in enumerate(PROMPTS):
        row, answer = answered(prompt, index)
        log_probs, entries = module._dense_pass(MODEL, peaky(), row)
        assert np.asarray(log_probs).argmax(-1)[: len(answer)].tolist() == answer
        assert np.asarray(row.counted).tolist() == [t < len(answer) for t in range(TOKENS)]
        assert float(entries) == 16.0
        np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(("strategy", "select_per"), [("descriptor", "head"), ("random", "kv_head")])
def test_the_numbers_are_those_of_the_models_whole_logits(strategy, select_per, report):
    """KL and agreement in float64 from the public forward, mean over tokens and then over prompts."""
    config, route = models.changed(MODEL, gaze={"select_per": select_per}), Routing(strategy)
    kls, agreements = [], []
    for index, prompt in enumerate(PROMPTS):
        row, answer = answered(prompt, index)
        probs = []
        for run, top_k in ((models.forward(MODEL), None), (models.forward(config, route), jnp.int32(2))):
            logits, _ = run({"params": peaky()}, row.images, row.streams, top_k, None, row.sample)
            logits = np.asarray(logits, np.float64)[0, np.asarray(row.at)[: len(answer)]]
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            probs.append(weights / weights.sum(-1, keepdims=True))
        dense, routed = probs
        kls.append((dense * np.log(dense / routed)).sum(-1).mean())
        agreements.append((dense.argmax(-1) == routed.argmax(-1)).mean())
    (found,) = [
        r
        for r in report["rows"]
        if (r["strategy"], r["select_per"], r["top_k"]) == (strategy, select_per, 2)
        and r["descriptor"] != "minmax"
    ]
    assert found["kl"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert found["top1"] == pytest.approx(np.mean(agreements))
    half = 12.706 * abs(kls[0] - kls[1]) / 2  # Student's t of one degree of freedom
    assert found["kl_ci"] == pytest.approx([max(np.mean(kls) - half, 0), np.mean(kls) + half], rel=1e-3)


def test_a_setting_compiles_once_for_every_top_k_and_prompt(measured):
    """At most one dense program, and one per select_per for two descriptors, the oracle and random."""
    dense, routed = measured[1]  # fewer if another test has compiled them already
    assert dense <= 1 and routed <= 8


def test_tokens_beyond_the_answers_end_count_nowhere():
    """The numbers of a row with two counted tokens do not depend on its other tokens."""
    row, _ = answered(PROMPTS[0])
    short = dataclasses.replace(row, counted=jnp.arange(TOKENS) < 2)
    moved = dataclasses.replace(short, at=short.at.at[2:].set(0))
    found = []
    for each in (row, short, moved):
        dense, _ = module._dense_pass(MODEL, peaky(), each)
        outcome = module._routed_pass(MODEL, Routing(), peaky(), each, dense, jnp.int32(1))
        found.append((float(outcome.kl), float(outcome.top1), float(outcome.entries)))
    assert found[1] == found[2] != found[0]
    assert found[1][1] in (0.0, 0.5, 1.0) and found[1][2] == 4.0


def test_logits_are_computed_for_the_answer_alone():
    """No array of the program has the row's length and the vocabulary's, and one has the answer's."""
    row, _ = answered(PROMPTS[0])
    traced = str(jax.make_jaxpr(lambda p, r: module._dense_pass(MODEL, p, r))(peaky(), row))
    vocabulary = MODEL.decoder.vocab_size
    assert f"[{TOKENS},{vocabulary}]" in traced
    assert f"{row.streams.tokens.shape[1]},{vocabulary}]" not in traced


def test_one_prompt_has_no_interval_and_larger_images_are_squashed():
    larger = Prompt("one", np.kron(IMAGES[0], np.ones((2, 1, 1), np.uint8)), PROMPTS[0].question)
    options = {"top_ks": [2, 2], "select_per": ["head"], "descriptors": ["mean"]}
    report = measure([larger], **options)
    assert [row["top_k"] for row in report["rows"]] == [2, 2, 2]
    assert {(row["kl_ci"], row["top1_ci"]) for row in report["rows"]} == {(None, None)}
    assert "[" not in table(report)
    with pytest.raises(UserError, match="is 40x20 pixels but the tower takes 20x20"):
        measure([larger], resize=False, **options)


WRONG = {
    "no prompts": ({"prompts": ()}, "There are no prompts"),
    "empty question": (
        {"prompts": [Prompt("a", IMAGES[0], " ")]},
        "Prompt 1 about 'a': The question is empty",
    ),
    "no token": ({"prompts": [Prompt("a", IMAGES[0], "é")]}, "cannot be tokenised"),
    "grey image": ({"prompts": [Prompt("a", IMAGES[0][..., 0], "b")]}, "must be uint8"),
    "top_k 0": ({"top_ks": [0, 1]}, r"top_ks=\[0, 1\] must lie between 1 and 4"),
    "top_k 5": ({"top_ks": [5]}, r"top_ks=\[5\] must lie between 1 and 4"),
    "no top_k": ({"top_ks": []}, r"top_ks=\[\] must"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    "select_per": (
        {"select_per": ["head", "all"]},
        r"select_per=\('head', 'all'\) must name at least one of",
    ),
    "descriptor": ({"descriptors": []}, r"descriptors=\(\) must name at least one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compared_is_said_in_one_sentence(name):
    options, sentence = WRONG[name]
    with pytest.raises(UserError, match=sentence) as error:
        measure(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("regions", "expected"),
    [(1, (1,)), (2, (1, 2)), (9, (1, 2, 4, 8, 9)), (16, (1, 2, 4, 8, 16))],
)
def test_default_top_ks_are_powers_of_two_and_everything(regions, expected):
    assert default_top_ks(regions) == expected


def test_the_table_has_a_line_for_every_row(report):
    lines = table(report).splitlines()
    assert lines[0].startswith("2 prompts, ") and "4 regions of 16 visual tokens" in lines[0]
    assert len(lines) == 2 + len(report["rows"])
    for line, row in zip(lines[2:], report["rows"], strict=True):
        assert line.split()[:3] == [
            row["descriptor"] or row["strategy"],
            row["select_per"],
            str(row["top_k"]),
        ]
        assert f"{row['kl']:.3g} [{row['kl_ci'][0]:.3g}, " in line and f"{row['top1']:.3f} [" in line
    assert len({len(line) for line in lines[1:]}) == 1


def test_the_plot_is_drawn_with_and_without_intervals(report, tmp_path):
    plot(report, tmp_path / "with.png")
    rows = [row | {"kl_ci": None, "top1_ci": None} for row in report["rows"]]
    plot(report | {"rows": rows}, tmp_path / "without.png")
    plot(report | {"rows": rows[2:3]}, tmp_path / "dense.png")
    files = [(tmp_path / name).read_bytes() for name in ("with.png", "without.png", "dense.png")]
    assert all(file.startswith(b"\x89PNG") for file in files)
    assert len(set(files)) == 3


def test_without_matplotlib_the_plot_says_what_to_install(monkeypatch, tmp_path):
    require_matplotlib()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gaze-jax\[plot\]'"):
        plot({"rows": []}, tmp_path / "plot.png")


@pytest.mark.long  # tests/infer/test_prompt.py has the prompts, and the other tests here the comparison
def test_a_published_layout_is_compared_with_its_own_template(tmp_path):
    """Tiles and newlines: images of two sizes, and all regions equal dense attention."""
    model = Sampler.load(multimodal.write("cambrian_s", tmp_path))
    # The regions of a strip are smaller than those of a square.
    photos = [RNG.integers(256, size=(height, 90, 3), dtype=np.uint8) for height in (16, 80)]
    prompts = [Prompt(str(i), photo, "What is this?") for i, photo in enumerate(photos)]
    report = compare(
        model,
        prompts,
        select_per=("head",),
        descriptors=("mean",),
        max_tokens=3,
    )
    whole = [row for row in report["rows"] if row["top_k"] == report["regions"]]
    assert report["template"] == model.template.name
    assert report["template"].endswith("chat_template.jinja")
    assert whole and all(row["kl"] < 1e-6 and row["top1"] == 1 for row in whole)
    assert report["visual_tokens"] > 72, "tiles beside the whole image"
