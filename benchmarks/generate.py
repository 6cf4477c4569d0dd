"""Answering questions about 576, 4,608 and 18,432 visual tokens: dense, Gaze and transformers.

python -m benchmarks.generate --json=benchmarks/results/generate_cpu.json

Four parts. "prefill" reads visual tokens and a question of 16 tokens (turn 1), then another question on the
resulting cache (turn 2), each up to the first token of the answer. "decode" times generated tokens; its
caches hold random keys and values, because prefilling would take most of the time. "attention" is the time of
routing and attention in such a step. "memory" runs each case in its own process and reports the peak resident
memory after loading the parameters, including them. The competitors of a row alternate in one process. The
byte model divides the bytes that a step must read by the bandwidth of a large sum, measured in the same
rounds.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode, timing
from benchmarks import generate_models as models
from benchmarks.generate_models import OURS, QUESTION, Case
from gaze_jax.families import DECODERS
from gaze_jax.models.cache import decode_spec
from gaze_jax.models.config import DecoderConfig

VARIANTS = (*OURS, "transformers")
PARTS = ("memory", "prefill", "attention", "decode")
TINY = DecoderConfig(320, 64, 2, 4, 2, 16, 96, qk_norm=False, qkv_bias=True)
TARGETS = (
    # name, part, tokens, batch (None: each), (numerator, denominator) of the ratio, minimum
    ("dense against transformers", "decode", 576, None, ("transformers", "dense"), 0.95),
    ("dense against transformers", "decode", 4608, None, ("transformers", "dense"), 1.3),
    ("attention of Gaze, per kv head, against dense", "attention", 18432, None, ("dense", "kv_head"), 3.0),
    ("step of Gaze, per kv head, against dense", "decode", None, None, ("dense", "kv_head"), 1.0),
    ("step of Gaze, per kv head, against dense", "decode", 18432, 8, ("dense", "kv_head"), 1.6),
)
SLACK, SOONER, VIDEO = 1.25, 10.0, 4608
"""SLACK: maximum ratio of a step's time to the byte model. SOONER: minimum ratio of turn 1's time to that of
turn 2, for at least VIDEO visual tokens."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Models with the same weights."""

    decoder: DecoderConfig
    params: Any
    theirs: models.Theirs | None

    def config(self, variant: str) -> Any:
        return models.config_of(self.decoder, variant)


def build(decoder: DecoderConfig, variants: list[str]) -> Bench:
    drawn = models.draw(decoder)
    theirs = models.Theirs(drawn, decoder) if "transformers" in variants else None
    return Bench(decoder, models.ours(drawn) if set(variants) & set(OURS) else None, theirs)


def stats(times: Mapping[str, list[float]], per: int = 1) -> dict[str, Any]:
    """Median and quartiles of each competitor, in milliseconds."""
    return {
        name: {
            "median": 1e3 * statistics.median(each) / per,
            "iqr": [1e3 * t / per for t in timing.quartiles(each)],
        }
        for name, each in times.items()
    }


def ratios(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Time ratios by round: dense over each Gaze variant, and transformers over each of ours."""
    pairs = [("dense", name) for name in OURS[1:]] + [("transformers", name) for name in OURS]
    return {
        f"{above} / {below}": timing.ratio(times, above, below)
        for above, below in pairs
        if above in times and below in times
    }


def in_turn(competitors: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Like :func:`timing.paired` but without warm-up calls, for calls that take many seconds."""
    order, times = np.random.default_rng(0), {name: [] for name in competitors}
    for _ in range(rounds):
        for name in order.permutation(list(competitors)):
            start = time.perf_counter()
            jax.block_until_ready(competitors[name]())
            times[name].append(time.perf_counter() - start)
    return times


def turns(bench: Bench, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Both turns of a conversation about the same visual tokens."""
    visual = models.embeddings(bench.decoder, case)
    questions = [models.question(bench.decoder, case, turn) for turn in (1, 2)]
    first: dict[str, Callable[[], Any]] = {}
    second: dict[str, Callable[[], Any]] = {}
    kept: dict[str, Any] = {}

    def keep(name: str, run: Callable[[], Any]) -> Any:
        logits, kept[name] = run()
        return jnp.argmax(logits, axis=-1)

    for name in args.variants:
        if name == "transformers":
            assert bench.theirs is not None
            first[name] = functools.partial(bench.theirs.prefill, visual, questions[0])
            second[name] = lambda: bench.theirs.follow(questions[1], QUESTION, kept["transformers"])  # type: ignore[union-attr]
            continue
        config, top_k = bench.config(name), case.top_k(name)
        inputs = (bench.params, jnp.asarray(visual), jnp.asarray(questions[0]))
        read = models.prefill.lower(config, top_k, *inputs).compile()
        first[name] = functools.partial(read, *inputs)
        order, write_index = jnp.int32(case.tokens + QUESTION), jnp.int32(QUESTION)
        ask = functools.partial(
            models.ask, config, top_k, bench.params, jnp.asarray(questions[1]), order, write_index
        )
        second[name] = functools.partial(lambda name, ask: ask(kept[name]), name, ask)
    times = in_turn({n: functools.partial(keep, n, r) for n, r in first.items()}, args.prefill_rounds)
    later = timing.paired(second, rounds=args.rounds, seconds=args.seconds)
    both = {n: statistics.median(times[n]) / statistics.median(later[n]) for n in first}
    return {
        "cache": "prefilled",
        "first_turn_ms": stats(times),
        "first_turn_ratio": ratios(times),
        "second_turn_ms": stats(later),
        "turn_1 / turn_2": both,
    }


def decoded(bench: Bench, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Time generated tokens on a cache that was not prefilled."""
    steps = args.steps if case.batch == 1 else max(1, args.steps // 2)
    token = np.ones((case.batch, 1), np.int32)
    calls: dict[str, Callable[[], Any]] = {}
    cache = None
    need: dict[str, dict[str, float]] = {}
    for name in args.variants:
        if name == "transformers":
            assert bench.theirs is not None
            theirs = bench.theirs.random_cache(case)
            calls[name] = functools.partial(bench.theirs.follow, token, steps, theirs)
            continue
        config = bench.config(name)
        # On a CPU the layout of a packed cache does not depend on select_per.
        cache = models.random_cache(config, case) if cache is None else cache
        order, write_index = jnp.int32(case.tokens + models.FILLED), jnp.int32(models.FILLED)
        calls[name] = functools.partial(
            models.follow,
            config,
            case.top_k(name),
            bench.params,
            jnp.asarray(token),
            order,
            write_index,
            jnp.int32(steps),
            cache,
        )
        picks = calls[name]()[2]
        seen = models.FILLED + (steps + 1) / 2
        need[name] = models.step_bytes(config, bench.params, case, picks, seen)
    raw = timing.paired(calls | {"read": args.reader}, rounds=args.rounds, seconds=args.seconds)
    bandwidth = args.reader.bandwidth(raw.pop("read"))
    each = {name: statistics.median(times) / steps for name, times in raw.items()}
    return {
        "cache": "filled with random keys and values",
        "steps": steps,
        "rounds": len(next(iter(raw.values()))),
        "ms": stats(raw, steps),
        "tokens_per_second": {name: case.batch / seconds for name, seconds in each.items()},
        "ratio": ratios(raw),
        "bandwidth": bandwidth,
        "bytes": need,
        "model_ms": {name: 1e3 * sum(of.values()) / bandwidth for name, of in need.items()},
        "times_model": {name: each[name] * bandwidth / sum(of.values()) for name, of in need.items()},
    }


def attention(bench: Bench, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Time routing and attention of all layers, without the rest of the model."""
    decoder, calls, cache = bench.decoder, {}, None
    q = jax.random.normal(jax.random.key(2), (case.batch, decoder.num_heads, decoder.head_dim))
    for name in args.variants:
        if name == "transformers":
            continue
        config, top_k = bench.config(name), case.top_k(name)
        cache = models.random_cache(config, case) if cache is None else cache
        gaze = config.gaze
        spec = decode_spec(gaze, decoder.head_dim)
        run = decode.over_layers(gaze.decode_implementation, spec, top_k, top_k is not None, True)
        text, seen = (cache.text_k, cache.text_v), cache.visual_order >= 0
        rest = (cache.visual, text, cache.descriptors, None, seen, cache.text_order >= 0)
        calls[name] = functools.partial(run, q, jnp.int32(1), *rest)
    raw = timing.paired(calls, rounds=args.rounds, seconds=args.seconds)
    return {
        "cache": "filled with random keys and values",
        "rounds": len(next(iter(raw.values()))),
        "ms": stats(raw),
        "ratio": ratios(raw),
    }


def _resident(reset: bool) -> int:
    """Peak resident memory of this process in bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak(variant: str, case: Case, prefilled: bool, decoder: DecoderConfig) -> dict[str, int]:
    """Peak memory of one variant that decodes two tokens, after a prefill or on a random cache."""
    bench = build(decoder, [variant])
    loaded = _resident(reset=True)
    visual, question = models.embeddings(decoder, case), models.question(decoder, case, 1)
    token = np.ones((case.batch, 1), np.int32)
    if bench.theirs is not None:
        cache = bench.theirs.prefill(visual, question)[1] if prefilled else bench.theirs.random_cache(case)
        bench.theirs.follow(token, 2, cache)
    else:
        config, top_k = bench.config(variant), case.top_k(variant)
        if prefilled:
            _, cache = models.prefill(config, top_k, bench.params, jnp.asarray(visual), jnp.asarray(question))
        else:
            cache = models.random_cache(config, case)
        text = QUESTION if prefilled else models.FILLED
        where = (jnp.int32(case.tokens + text), jnp.int32(text), jnp.int32(2))
        jax.block_until_ready(models.follow(config, top_k, bench.params, jnp.asarray(token), *where, cache))
    return {"loaded": loaded, "peak": _resident(reset=False)}


def in_child(variant: str, case: Case, prefilled: bool, quick: bool) -> dict[str, int]:
    """Run :func:`peak` in its own process."""
    words = f"{variant}/{case.tokens}/{case.batch}/{'prefill' if prefilled else 'decode'}"
    command = [sys.executable, "-m", "benchmarks.generate", f"--peak={words}", *["--quick"] * quick]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def memory(case: Case, prefilled: bool, args: argparse.Namespace) -> dict[str, Any]:
    found = {name: in_child(name, case, prefilled, args.quick) for name in args.variants}
    return {
        "cache": "prefilled" if prefilled else "filled with random keys and values",
        "loaded_bytes": {name: each["loaded"] for name, each in found.items()},
        "peak_bytes": {name: each["peak"] for name, each in found.items()},
    }


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(part: str, case: Case, figures: dict[str, Any]) -> None:
        top_k = case.top_k("kv_head")
        row = {"part": part, "tokens": case.tokens, "regions": case.regions, "top_k": top_k}
        rows.append(row | {"batch": case.batch} | figures)
        print(line(rows[-1]), flush=True)

    # First, while this process uses little memory.
    if "memory" in args.measure:
        for tokens, batch, kind in args.memory:
            add("memory", case := Case(tokens, batch), memory(case, kind == "prefill", args))
    if not set(args.measure) - {"memory"}:
        return rows
    bench = build(args.decoder, args.variants)
    cases = [Case(tokens, batch) for tokens in args.tokens for batch in args.batch]
    if "prefill" in args.measure:
        for tokens in args.prefill:
            add("prefill", case := Case(tokens, 1), turns(bench, case, args))
    if "attention" in args.measure:
        for case in cases:
            if case.tokens == max(args.tokens):
                add("attention", case, attention(bench, case, args))
    if "decode" in args.measure:
        for case in cases:
            add("decode", case, decoded(bench, case, args))
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    text = f"{row['part']:10}{row['tokens']:>6} tokens B{row['batch']}"
    if "peak_bytes" in row:
        return text + "".join(f"  {n} {b / 1e9:.2f} GB" for n, b in row["peak_bytes"].items())
    if "first_turn_ms" in row:
        for name, first in row["first_turn_ms"].items():
            second, ratio = row["second_turn_ms"][name]["median"], row["turn_1 / turn_2"][name]
            text += f"  {name} {first['median'] / 1e3:.2f} s, turn 2 {second / 1e3:.2f} s ({ratio:.1f}x)"
        return text
    for name, ms in row["ms"].items():
        text += f"  {name} {ms['median']:.1f} ms"
        if name in row.get("times_model", {}):
            text += f" ({row['times_model'][name]:.2f} x model)"
    return text


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, the measured values and the margins, for the available rows."""
    found = []

    def add(name: str, row: Mapping[str, Any], got: float, least: float, margin: float) -> None:
        at = {"target": name, "tokens": row["tokens"], "batch": row["batch"]}
        found.append(at | {"bound": least, "measured": got, "met": margin >= 1, "margin": margin})

    for name, part, tokens, batch, (above, below), least in TARGETS:
        for row in rows:
            if (
                row["part"] != part
                or tokens not in (None, row["tokens"])
                or batch not in (None, row["batch"])
            ):
                continue
            if (ratio := row["ratio"].get(f"{above} / {below}")) is not None:
                add(f"{name}, at least", row, ratio["median"], least, ratio["median"] / least)
    for row in rows:
        got = row.get("times_model", {}).get("kv_head")
        if got is not None:
            add("step of Gaze, per kv head, times the byte model, at most", row, got, SLACK, SLACK / got)
        for name, ratio in row.get("turn_1 / turn_2", {}).items():
            if name in OURS and row["tokens"] >= VIDEO:
                add(f"turn 2 of {name} sooner than turn 1, at least", row, ratio, SOONER, ratio / SOONER)
    return found


def _memory_case(text: str) -> tuple[int, int, str]:
    tokens, batch, kind = text.split("/")
    if kind not in ("prefill", "decode"):
        raise argparse.ArgumentTypeError(f"{text}: {kind!r} is neither 'prefill' nor 'decode'")
    return int(tokens), int(batch), kind


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)

    def integers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    def cases(text: str) -> list[tuple[int, int, str]]:
        return [_memory_case(word) for word in text.split(",")]

    parser.add_argument("--model", choices=[*DECODERS, "tiny"], default="qwen2.5-0.5b")
    parser.add_argument("--measure", type=timing.listed(PARTS), default=list(PARTS))
    parser.add_argument("--variants", type=timing.listed(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--tokens", type=integers, default=[576, 4608, 18432], help="visual tokens to decode with"
    )
    parser.add_argument("--batch", type=integers, default=[1, 8])
    parser.add_argument("--prefill", type=integers, default=[576, 4608], help="visual tokens to prefill")
    parser.add_argument("--memory", type=cases, default="4608/1/prefill,18432/1/decode,18432/8/decode")
    parser.add_argument("--steps", type=int, default=8, help="tokens per measured call; half with a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill-rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="measuring time per row")
    parser.add_argument("--quick", action="store_true", help="a dry run at toy sizes")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    if parser.parse_known_args(argv)[0].quick:
        small = {"tokens": [72], "batch": [1, 2], "prefill": [72], "memory": "72/1/prefill,72/2/decode"}
        parser.set_defaults(model="tiny", rounds=3, prefill_rounds=1, steps=4, **small)
    args = parser.parse_args(argv)
    args.decoder = TINY if args.model == "tiny" else DECODERS[args.model]
    args.reader = timing.Reader(2**20 if args.quick else 2**29)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.peak is not None:
        variant, *case = args.peak.split("/")
        tokens, batch, kind = _memory_case("/".join(case))
        print(json.dumps(peak(variant, Case(tokens, batch), kind == "prefill", args.decoder)))
        return
    rows = benchmark(args)
    result = timing.report("benchmarks.generate", argv, rows, model=args.model, dtype="float32")
    if "transformers" in args.variants:
        result["versions"] |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    result["targets"] = targets(rows)
    for row in result["targets"]:
        verdict = "met" if row["met"] else "missed"
        at = f"{row['tokens']} tokens B{row['batch']}"
        print(f"{verdict:7}{row['target']} {row['bound']}: {row['measured']:.2f}, {at}")
    timing.write(args.json, result)


if __name__ == "__main__":
    main()
