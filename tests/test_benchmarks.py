"""The benchmarks of the attention ops: dry runs, and the figures that they derive."""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
    data,
    data_pipeline,
    decode,
    generate,
    generate_models,
    layouts,
    prefill,
    timing,
    tune_decode,
)
from gaze_jax.core import accounting
from gaze_jax.core.regions import slot_fill
from gaze_jax.core.streams import Kind
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Video
from gaze_jax.families import MODELS, get_family
from pallas_kernels import dispatch

pytestmark = pytest.mark.xdist_group("benchmarks")


def _run(module, folder, *flags):
    path = folder / "result.json"
    module.main(["--quick", "--impl=xla", f"--json={path}", *flags])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """One shape: each compiles all programs anew."""
    return _run(decode, tmp_path_factory.mktemp("decode"), "--shapes=71/2/1")


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory):
    return _run(prefill, tmp_path_factory.mktemp("prefill"))


def test_decode_writes_a_row_per_select_per(decoded):
    """For one shape and implementation, over eight layers, with what they were measured on."""
    rows = decoded["rows"]
    found = [(row["tokens"], row["top_k"], row["implementation"], row["select_per"]) for row in rows]
    assert found == [(71, 1, "xla", "head"), (71, 1, "xla", "kv_head")]
    assert all(row["layers"] == 8 and row["rounds"] == 3 and "note" not in row for row in rows)
    assert decoded["versions"].keys() >= {"jax", "jaxlib", "numpy", "python"} and decoded["bandwidth"] > 0
    assert decoded["bandwidth"] == pytest.approx(np.median([row["bandwidth"] for row in rows]))
    assert decoded["command"].startswith("python -m benchmarks.decode --quick")


def test_decode_figures_agree_with_each_other(decoded):
    """The union lies between top_k and G * top_k, the floor follows from it, the ratio from the floor."""
    for row in decoded["rows"]:
        heads = 2 if row["select_per"] == "head" else 1
        assert row["top_k"] <= row["union"] <= min(heads * row["top_k"], 2)
        if row["select_per"] == "kv_head":
            assert row["union"] == row["top_k"]
        # K=2, D=16, P=36, S=256, two sequences, 4 bytes: K * (bDR + 2bDPU + 2bDS) each.
        by_hand = 2 * 2 * 4 * 16 * (2 + 2 * 36 * row["union"] + 2 * 256)
        assert row["floor_bytes"] == pytest.approx(by_hand)
        assert row["floor_ms"] == pytest.approx(1e3 * by_hand / row["bandwidth"])
        assert row["times_floor"] == pytest.approx(row["ms"]["median"] / row["floor_ms"])
        assert row["dense_ms"].keys() == row["speedup"].keys() == {"einsum", "dot_product_attention"}
        for label, speedup in (*row["speedup"].items(), *row["routed_speedup"].items()):
            low, high = speedup["iqr"]
            assert 0 < low <= speedup["median"] <= high, label
        assert row["routing_ms"]["median"] > 0 and row["routed_ms"]["median"] > 0


def test_decode_has_a_row_after_its_first_round(monkeypatch):
    """Whoever stops it keeps that; later rounds refine it."""
    written = []
    monkeypatch.setattr(timing, "write", lambda path, report: written.append(report["rows"]))
    decode.main(["--quick", "--impl=xla", "--shapes=72/2/all,71/2/all", "--select_per=kv_head"])
    found = [[(row["tokens"], row["rounds"]) for row in rows] for rows in written]
    assert found[:4] == [[(72, 1)], [(72, 2)], [(72, 3)], [(72, 3), (71, 1)]]
    assert found[-1] == [(72, 3), (71, 3)]


def test_decode_without_a_list_has_no_routing(tmp_path):
    """ "all" reads every region: no descriptors in the floor and nothing to route."""
    (row,) = _run(decode, tmp_path, "--shapes=72/2/all", "--select_per=kv_head")["rows"]
    assert row["top_k"] is None and row["union"] == 2 and "routed_ms" not in row
    assert row["floor_bytes"] == 2 * 2 * 4 * 16 * 2 * (72 + 256)


def test_decode_floor_of_an_int8_cache():
    """A byte per visual element and two float32 scales per token; descriptors and text stay bfloat16."""
    shape = timing.Shape(4608, 128, 13)
    got = decode.floor_bytes(shape, (32, 8, 128), 3, "int8", 20.0)
    assert got == 3 * 8 * (2 * 128 * 128 + 2 * (128 + 4) * 36 * 20 + 2 * 2 * 128 * decode.TEXT)
    wide = decode.floor_bytes(shape, (32, 8, 128), 1, "bfloat16", 20.0)
    assert wide == accounting.decode_floor(8, 128, 2, 128, 36, 20.0, decode.TEXT).total


def test_what_does_not_fit_or_cannot_run_is_a_row_that_says_why(monkeypatch, tmp_path, capsys):
    """Too little memory, and an implementation that refuses: a row per shape with numbers and the reason."""
    with monkeypatch.context() as patch:
        patch.setattr(timing, "free_memory", lambda: 10**5)
        rows = _run(decode, tmp_path)["rows"]
    assert [row["skipped"] for row in rows] == ["one layer needs 0.0 GB in four copies, 0.0 GB are free"] * 2
    assert [(row["tokens"], row["top_k"]) for row in rows] == [(72, 1), (71, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(decode.api, "supports", lambda name, spec: f"{name} is resting.")
        rows = _run(decode, tmp_path)["rows"]
    assert [row["skipped"] for row in rows] == ["xla is resting."] * 2
    assert capsys.readouterr().out.count("skipped: ") == 4


def test_fewer_layers_are_said_in_the_row(monkeypatch, tmp_path):
    """Where eight layers do not fit, the row names how many there were."""
    monkeypatch.setattr(decode, "layers_that_fit", lambda *_: (3, 0))
    (row,) = _run(decode, tmp_path, "--shapes=72/2/all", "--select_per=kv_head")["rows"]
    assert row["layers"] == 3 and row["note"] == "8 layers do not fit in memory"


def test_dense_forms_compute_the_same_attention():
    """Every competitor attends to the same keys: the einsum forms, the library and the op without a list."""
    problem = decode.Problem(timing.Shape(71, 2, None), timing.HEADS["tiny"], 2, "float32", 2)
    args = decode.parse(["--quick"])
    found, _ = decode.competitors(problem, "xla", decode.GazeSpec(problem.scale), args)
    assert found.keys() == {*decode.EINSUMS, "dot_product_attention", "head op", "kv_head op"}
    outs = {label: np.asarray(run(np.int32(2))) for label, run in found.items()}
    for label, out in outs.items():
        assert np.abs(out - np.asarray(problem.q)).max() > 1e-4, "it ran"
        np.testing.assert_allclose(out, outs["kv_head op"], atol=1e-5, err_msg=label)


@pytest.mark.long  # tests/kernels/test_decode_gpu.py lowers the kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode_programs_of_the_gpu_kernel_lower_for_cuda(dtype):
    """What benchmarks/gpu.sh measures compiles as far as a machine without a GPU can tell."""
    problem = decode.Problem(timing.Shape(71, 2, 2), timing.HEADS["qwen3-4b"], 1, dtype, 2)
    spec = decode.GazeSpec(problem.scale, visual_dtype="int8" if dtype == "int8" else None)
    with dispatch.compile_for("gpu"):
        found, _ = decode.competitors(problem, "gpu", spec, decode.parse(["--quick"]))
        for label in ("head op", "kv_head routed"):
            text = jax.jit(found[label]).trace(np.int32(2)).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu" in text, label


@pytest.mark.long  # a tool for the developers of the GPU kernel
def test_tiles_are_tried_and_the_best_is_kept(tmp_path, monkeypatch):
    """A dry run: every candidate in one file, the best with its measurement in the table of tiles."""
    tiles, log = tmp_path / "tiles.json", tmp_path / "log.json"
    default = {"int8": {"keys": 36, "stages": 2, "blocks": 8, "measured": None}}
    tiles.write_text(json.dumps({"default": default}))
    monkeypatch.setattr(tune_decode, "_KEYS", (36,))
    tune_decode.main(["--quick", "--dtypes=int8", "--seconds=0.5", f"--json={log}", f"--tiles={tiles}"])
    rows = json.loads(log.read_text())
    assert all("failed" not in row and row["problems"][0]["error"] < 0.1 for row in rows)
    best = min(rows, key=lambda row: row["score"])
    table = json.loads(tiles.read_text())
    (kind,) = table.keys() - {"default"}
    assert table["default"] == default and table[kind]["int8"]["measured"]["problems"] == best["problems"]


def test_prefill_writes_a_row_per_implementation_select_per_and_pass(prefilled):
    """Useful FLOPs are those of selected pairs; TFLOP/s and speedups follow from the times."""
    rows = prefilled["rows"]
    labels = [(row["implementation"], row["select_per"], row["pass"]) for row in rows]
    kinds = [("xla", "head"), ("xla", "kv_head"), ("dense xla", ""), ("dense dot_product_attention", "")]
    assert labels == [(*kind, p) for p in prefill.PASSES for kind in kinds]
    for row in rows:
        seconds = row["ms"]["median"] / 1e3
        assert row["tflops"] == pytest.approx(row["flops"] / seconds / 1e12)
        assert row["speedup"].keys() == {"dense xla", "dense dot_product_attention"}
        if row["implementation"] in row["speedup"]:
            assert row["speedup"][row["implementation"]]["median"] == 1
        assert row["temporary_bytes"] >= 0
    forward = {row["implementation"]: row["flops"] for row in rows if row["pass"] == "forward"}
    # H=4, D=16, 8 queries: 4 * D * H for each pair; one region of 36 or 35 tokens against all 71, and S=256.
    assert forward["dense xla"] == 4 * 16 * 4 * 8 * (71 + 256)
    assert 4 * 16 * 4 * 8 * (35 + 256) <= forward["xla"] <= 4 * 16 * 4 * 8 * (36 + 256)
    both = {row["implementation"]: row["flops"] for row in rows if row["pass"] != "forward"}
    assert both == pytest.approx({name: 3.5 * flops for name, flops in forward.items()})


def test_paired_rounds_shuffle_and_stop():
    """Each round runs everybody, warm, in an order of its own; three rounds run however long they take."""
    log, after = [], []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    times = timing.paired(calls, rounds=9, seconds=0.0, after=lambda so_far: after.append(len(so_far["a"])))
    assert after == [1, 2, 3]
    assert "".join(log[:3]) == "abc" and len(log) == 3 + 3 * 6
    assert log[3::2] == log[4::2], "every timed call follows one of its own"
    rounds = ["".join(log[3 + 6 * r : 9 + 6 * r : 2]) for r in range(3)]
    assert all(sorted(each) == list("abc") for each in rounds) and len(set(rounds)) > 1
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(t > 0 for each in times.values() for t in each)
    got = timing.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]}, "a", "b")
    assert got == {"median": 3.0, "iqr": [2.5, 3.5]}


@pytest.mark.parametrize("text", ["72/3/1", "73/2/1"])
def test_a_shape_whose_tokens_do_not_fill_its_regions_is_refused(text):
    """A whole empty region, and a token too many."""
    with pytest.raises(ValueError, match="tokens do not fill"):
        timing.Shape.parse(text)


def test_regions_drawn_are_distinct_and_drawn_anew():
    """top_k different regions per place, another draw for each."""
    picks = timing.top_regions(np.random.default_rng(0), 5, 20, (3, 4))
    assert picks.shape == (3, 4, 5) and picks.min() >= 0 and picks.max() < 20
    assert all(len(set(row)) == 5 for row in picks.reshape(-1, 5).tolist())
    assert len({tuple(sorted(row)) for row in picks.reshape(-1, 5).tolist()}) > 6


def test_layouts_are_those_of_real_arrays_and_presets_waste_little():
    """Counts from sizes alone equal what the processor makes of pixels; the committed table is this one."""
    found = list(layouts.rows())
    committed = json.loads(Path("benchmarks/results/layouts.json").read_text())
    assert committed["rows"] == json.loads(json.dumps(found))
    assert min(row["slot_fill"] for row in found) >= layouts.LEAST_FILL
    photo, frames = np.zeros((480, 640, 3), np.uint8), np.zeros((16, *layouts.FRAME, 3), np.uint8)
    for family in ("llava-onevision", "cambrian-s"):
        for newlines in ("text", "region"):
            layout = dataclasses.replace(MODELS[layouts.FAMILIES[family]].layout, newlines=newlines)
            processor = Processor(layout, build_tokenizer(), ("a",), get_family(layout.views.style).views)
            for part, name in ((Image(0), "photo 640x480"), (Video(0), "16 frames 1280x720")):
                arrays = process(processor, Sample(0, (photo,), (part,), "a", (frames,)))
                (row,) = (
                    row
                    for row in found
                    if (row["family"], row["shown"], row["newlines_in"]) == (family, name, newlines)
                )
                valid = arrays["visual_src"] >= 0
                assert (row["tokens"], row["regions"], row["slots"]) == (valid.sum(), *valid.shape)
                assert row["slot_fill"] == pytest.approx(slot_fill(arrays["visual_src"]))
                assert row["newlines"] == (arrays["kind"] == Kind.NEWLINE).sum()
                assert row["views"] == arrays["visual_view"].max() + 1


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "result.json"
    generate.main(["--quick", "--measure=prefill,attention,decode", f"--json={path}"])
    return json.loads(path.read_text())


@pytest.mark.long  # compiles three models for one row each
def test_generate_writes_a_row_per_part_and_case(answered):
    """Every variant in every row, what the caches hold, and what it was measured with."""
    rows = answered["rows"]
    found = [(row["part"], row["tokens"], row["batch"], row["cache"].split()[0]) for row in rows]
    assert found == [
        ("prefill", 72, 1, "prefilled"),
        ("attention", 72, 1, "filled"),
        ("attention", 72, 2, "filled"),
        ("decode", 72, 1, "filled"),
        ("decode", 72, 2, "filled"),
    ]
    assert list(rows[0]["first_turn_ms"]) == list(rows[0]["second_turn_ms"]) == list(generate.VARIANTS)
    assert all(list(row["ms"]) == list(generate.OURS) for row in rows[1:3])
    assert all(list(row["ms"]) == list(generate.VARIANTS) for row in rows[3:])
    assert answered["versions"].keys() >= {"jax", "torch", "transformers"}


@pytest.mark.long
def test_generate_figures_agree_with_each_other(answered):
    """Tokens per second and the distance from the byte model follow from the times, the bytes from sizes."""
    parameters = 320 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32 + 3 * 64 * 96 + 2 * 64)
    for row in answered["rows"][3:]:
        seen = 32 + (row["steps"] + 1) / 2
        for name in generate.OURS:
            seconds, need = row["ms"][name]["median"] / 1e3, row["bytes"][name]
            assert row["tokens_per_second"][name] == pytest.approx(row["batch"] / seconds)
            assert row["times_model"][name] == pytest.approx(seconds * 1e3 / row["model_ms"][name])
            assert row["model_ms"][name] == pytest.approx(1e3 * sum(need.values()) / row["bandwidth"])
            assert need["parameters"] == 4 * parameters
        # K=2, D=16, 2 layers, 4 bytes; one region of 36 tokens and 2 descriptors, or both regions.
        each = 2 * 4 * 2 * 16 * row["batch"]
        assert row["bytes"]["kv_head"]["cache"] == pytest.approx(each * (2 + 2 * (36 + seen)))
        assert row["bytes"]["dense"]["cache"] == pytest.approx(each * 2 * (72 + seen))
        assert each * 2 * 36 < row["bytes"]["head"]["cache"] <= each * (2 + 2 * (72 + seen))


def test_generate_says_what_was_met_and_what_was_missed():
    """Each bound against the rows that it is about; what was not measured is not judged."""

    def row(part, tokens, batch, **figures):
        return {"part": part, "tokens": tokens, "batch": batch} | figures

    def ratio(**values):
        return {name.replace("_", " / ", 1): {"median": value} for name, value in values.items()}

    rows = [
        row(
            "decode",
            576,
            1,
            ratio=ratio(transformers_dense=0.9, dense_kv_head=1.0),
            times_model={"kv_head": 2.5},
        ),
        row("decode", 18432, 8, ratio=ratio(dense_kv_head=1.5), times_model={"kv_head": 1.0}),
        row("decode", 18432, 1, ratio=ratio(dense_kv_head=1.2)),
        row("attention", 18432, 1, ratio=ratio(dense_kv_head=6.0, dense_head=0.5)),
        row("prefill", 4608, 1, **{"turn_1 / turn_2": {"dense": 20.0, "transformers": 3.0}}),
        row("prefill", 576, 1, **{"turn_1 / turn_2": {"dense": 2.0}}),
    ]
    found = [(t["tokens"], t["batch"], t["bound"], t["met"], t["margin"]) for t in generate.targets(rows)]
    assert sorted(found) == [
        (576, 1, 0.95, False, pytest.approx(0.9 / 0.95)),
        (576, 1, 1.0, True, 1.0),
        (576, 1, 1.25, False, 0.5),
        (4608, 1, 10.0, True, 2.0),
        (18432, 1, 1.0, True, 1.2),
        (18432, 1, 3.0, True, 2.0),
        (18432, 8, 1.0, True, 1.5),
        (18432, 8, 1.25, True, 1.25),
        (18432, 8, 1.6, False, pytest.approx(1.5 / 1.6)),
    ]


def test_generate_compares_one_model_with_itself():
    """transformers gives the same logits after a prompt, and after a second turn the same next token."""
    case, decoder = generate.Case(72, 2), generate.TINY
    bench = generate.build(decoder, ["dense", "transformers"])
    config, visual = bench.config("dense"), generate_models.embeddings(decoder, case)
    first, second = (generate_models.question(decoder, case, turn) for turn in (1, 2))
    logits, cache = generate_models.prefill(config, None, bench.params, visual, first)
    expected, theirs = bench.theirs.prefill(visual, first)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1
    steps = first.shape[1] + 3
    where = (np.int32(72 + first.shape[1]), np.int32(first.shape[1]), np.int32(steps))
    token, last, picks = generate_models.follow(config, None, bench.params, second, *where, cache)
    for _ in range(2):  # the cache is left as it was
        wanted, expected = bench.theirs.follow(second, steps, theirs)
        np.testing.assert_array_equal(token, wanted)
        np.testing.assert_allclose(last, expected, atol=1e-4)
    assert picks is None
    token, last, _ = generate_models.ask(config, None, bench.params, second, *where[:2], cache)
    wanted, expected = bench.theirs.follow(second, second.shape[1], theirs)
    np.testing.assert_array_equal(token, wanted)
    np.testing.assert_allclose(last, expected, atol=1e-4)


def test_generate_measures_memory_in_a_process_of_its_own(monkeypatch):
    """The command that it calls itself with runs one variant and prints the two figures."""
    asked = []

    def run(command, **_):
        asked.append(command[1:])
        return subprocess.CompletedProcess(command, 0, json.dumps({"loaded": 5, "peak": len(asked)}))

    monkeypatch.setattr(subprocess, "run", run)
    args = generate.parse(["--quick", "--measure=memory", "--variants=kv_head,transformers"])
    first, second = generate.benchmark(args)
    assert first["peak_bytes"] == {"kv_head": 1, "transformers": 2} and first["cache"] == "prefilled"
    assert second["loaded_bytes"] == {"kv_head": 5, "transformers": 5} and second["batch"] == 2
    assert asked[1] == ["-m", "benchmarks.generate", "--peak=transformers/72/1/prefill", "--quick"]


def test_generate_reports_the_memory_of_one_variant(capsys):
    """A peak above what the parameters and the process took."""
    generate.main(["--peak=kv_head/72/2/decode", "--quick"])
    figures = json.loads(capsys.readouterr().out)
    assert 10**7 < figures["loaded"] <= figures["peak"] < 10**11


def test_data_opens_files_twice_and_reads_what_it_wrote(tmp_path, monkeypatch):
    """The second time with the index of the first, which is faster; every record is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines, listed = data.measure(tmp_path, 3_000_000)
    assert lines["records"] == listed["records"] >= 5000
    for row in (lines, listed):
        assert row["second_s"] < row["first_s"] and row["records_per_s"] > 100
        assert 0.003 <= row["gigabytes"] < 0.006


def test_data_pipeline_compares_with_a_bare_loop_and_measures_memory(tmp_path, monkeypatch):
    """A rate of each, whose ratio has a target; memory is read several times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "result.json"
    data_pipeline.main(["--quick", "--samples=100", "--only=images,memory", f"--json={path}"])
    packed, padded, memory = json.loads(path.read_text())["rows"]
    for row in (packed, padded):
        assert row["value"] > 1 and row["baseline"] > 1 and len(row["ratios"]) == 2
        assert row["met"] == (row["ratio"] >= 0.85)
    assert [passed for passed, _ in memory["resident_mb"]] == [50, 100]
    assert all(size > 50 for _, size in memory["resident_mb"])
