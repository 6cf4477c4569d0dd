"""Gaze without training: how much routed attention changes a checkpoint's own dense answers.

Dense attention answers each prompt. A teacher-forced pass over that answer then runs once densely and once
with every setting. At each position that emits a token of the answer, the two next-token distributions are
compared by KL divergence and by whether their most likely token agrees. An oracle that routes by the true
attention is the upper limit for any descriptor; random regions are the lower limit.
"""

import datetime
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.config import to_dict
from gaze_jax.core import accounting, masks
from gaze_jax.core.regions import DESCRIPTORS
from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Kind, Streams
from gaze_jax.data.padding import pad_to
from gaze_jax.data.pipeline import Bucket, prompt_length
from gaze_jax.data.placement import Arrays
from gaze_jax.errors import UserError
from gaze_jax.evaluate.metrics import student_interval
from gaze_jax.evaluate.prompts import Prompt
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.programs import Params, free_slots_for
from gaze_jax.infer.sampler import Sampler
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.parallel.mesh import describe_devices
from gaze_jax.writing import replacing
from pallas_kernels.spec import SELECT_PER

Array = jax.Array


@dataclass(frozen=True)
class _Setting:
    """A routing setting; one compiled program serves every top_k."""

    strategy: str
    select_per: str
    descriptor: str | None = None

    def model(self, config: MLLMConfig) -> MLLMConfig:
        """``config`` with this setting's routing."""
        gaze = replace(
            config.gaze, select_per=self.select_per, descriptor=self.descriptor or config.gaze.descriptor
        )
        return replace(config, gaze=gaze)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Row:
    """A prompt followed by its dense answer, as a batch of one.

    Attributes:
      images: float32 [1, images, image_size, image_size, 3].
      streams: prompt and answer.
      sample: int32 [1], the prompt's number, the key of random routing.
      at: int32 [A], text-stream indices of the queries that emit the answer's tokens.
      counted: bool [A], False beyond the answer's end.
    """

    images: Array
    streams: Streams
    sample: Array
    at: Array
    counted: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Outcome:
    """Means over the tokens of one answer, float32 scalars."""

    kl: Array
    top1: Array
    entries: Array


def _emitted(
    model: MLLM, row: _Row, top_k: Array | None, routing: Routing
) -> tuple[Array, accounting.Entries]:
    """Log-probabilities float32 [A, V] of the tokens after ``row.at``, and what these queries attended to.

    Logits are computed at these A positions only; for a whole row they may be larger than the model.
    """
    hidden, out = model.hidden(
        row.images,
        row.streams,
        Selection(top_k),
        SelectionSpec(routing, return_trace=True),
        sample_id=row.sample,
    )
    logits = model.decoder.logits(hidden[0, row.at])
    gaze = model.config.gaze
    _, queries = masks.windows(row.streams, visual_scope=gaze.visual_scope, visual_causal=gaze.visual_causal)
    visual, text = masks.visible_keys(queries, masks.key_places(row.streams))
    selected = out["selected"][:, 0, row.at] if "selected" in out else None
    entries = accounting.entries(visual[0, row.at], text[0, row.at], row.streams.kind[0], selected=selected)
    return jax.nn.log_softmax(logits), entries


def _mean(values: Array, row: _Row) -> Array:
    """Mean of [..., A] over the counted tokens and all other axes."""
    count = jnp.sum(row.counted).astype(jnp.float32)
    return jnp.mean(jnp.sum(jnp.where(row.counted, values, 0.0), axis=-1) / count)


@functools.partial(jax.jit, static_argnums=0)
def _dense_pass(config: MLLMConfig, params: Params, row: _Row) -> tuple[Array, Array]:
    """Log-probabilities float32 [A, V] under dense attention, and visual entries per query."""
    apply: Callable[..., Any] = MLLM(config).apply
    log_probs, entries = apply({"params": params}, row, None, Routing(), method=_emitted)
    return log_probs, _mean(entries.visual, row)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _routed_pass(
    config: MLLMConfig, routing: Routing, params: Params, row: _Row, dense: Array, top_k: Array
) -> _Outcome:
    """Compare routed attention with the log-probabilities ``dense`` float32 [A, V]."""
    apply: Callable[..., Any] = MLLM(config).apply
    routed, entries = apply({"params": params}, row, top_k, routing, method=_emitted)
    kl = jnp.sum(jnp.exp(dense) * (dense - routed), axis=-1)
    agree = jnp.argmax(dense, axis=-1) == jnp.argmax(routed, axis=-1)
    return _Outcome(
        kl=_mean(jnp.maximum(kl, 0.0), row),  # rounding may make it negative
        top1=_mean(agree.astype(jnp.float32), row),
        entries=_mean(entries.visual, row),
    )


def _prompt_arrays(sampler: Sampler, prompts: Sequence[Prompt]) -> list[Arrays]:
    """Arrays of every prompt, numbered for random routing."""
    arrays = []
    for number, prompt in enumerate(prompts):
        try:
            built = sampler.prompts.question(prompt.question, [prompt.image], sample_id=number)
        except UserError as error:
            raise UserError(f"Prompt {number + 1} about {prompt.name!r}: {error}") from error
        arrays.append(built.arrays)
    return arrays


def _bucket(arrays: Sequence[Arrays]) -> Bucket:
    """The sizes that hold every prompt."""
    return Bucket(
        regions=max(len(row["visual_src"]) for row in arrays),
        text=prompt_length(max(len(row["tokens"]) for row in arrays)),
        images=max(len(row["images"]) for row in arrays),
        slots=max(row["visual_src"].shape[1] for row in arrays),
    )


def _with_answer(arrays: Arrays, answer: Sequence[int], bucket: Bucket, length: int) -> _Row:
    """Append the answer's tokens except the last, which is emitted but never an input."""
    count, read = len(arrays["tokens"]), len(answer) - 1
    batch = pad_to(arrays, **asdict(replace(bucket, text=bucket.text + length)))
    new, steps = slice(count, count + read), np.arange(1, read + 1)
    for name, values in {
        "tokens": answer[:-1],
        "kind": Kind.TEXT,
        "text_order": arrays["text_order"][-1] + steps,
        "text_positions": arrays["text_positions"][-1] + steps,
        "text_segment": 0,
    }.items():
        batch[name][new] = values
    fields = {name: jnp.asarray(value)[None] for name, value in batch.items()}
    counted = np.arange(length) < len(answer)
    return _Row(
        images=fields["images"],
        streams=Streams.from_batch(fields),
        sample=fields["sample_id"],
        at=jnp.asarray(np.where(counted, count - 1 + np.arange(length), 0), jnp.int32),
        counted=jnp.asarray(counted),
    )


def _dense_answer(sampler: Sampler, arrays: Arrays, max_tokens: int) -> list[int]:
    """The tokens of the model's dense answer, including the end token."""
    engine = Engine(sampler.model, sampler.params, [arrays], free_slots=free_slots_for(max_tokens))
    found = engine.decode(max_tokens, ends=sampler.end_ids, sampling=SamplingParams.of([0.0]))
    return [int(token) for step in found for token in step["tokens"][:, 0]]


def default_top_ks(regions: int) -> tuple[int, ...]:
    """Powers of two below R, and R itself, which equals dense attention."""
    return (*(2**i for i in range((regions - 1).bit_length())), regions)


def _chosen(name: str, values: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    values = tuple(dict.fromkeys(values))
    if not values or set(values) - set(known):
        raise UserError(f"{name}={values} must name at least one of {known} and nothing else.")
    return values


def _settings(select_per: Iterable[str], descriptors: Iterable[str]) -> list[_Setting]:
    """Every descriptor, then the oracle and random routing."""
    selectors = _chosen("select_per", select_per, SELECT_PER)
    names = _chosen("descriptors", descriptors, DESCRIPTORS)
    found = [_Setting("descriptor", each, name) for name in names for each in selectors]
    return found + [_Setting(strategy, each) for strategy in ("oracle", "random") for each in selectors]


def _check_top_ks(top_ks: Iterable[int] | None, regions: int) -> list[int]:
    """The budgets, sorted; None means :func:`default_top_ks`."""
    found = sorted(set(default_top_ks(regions) if top_ks is None else top_ks))
    if not found or not 1 <= found[0] <= found[-1] <= regions:
        raise UserError(f"top_ks={found} must lie between 1 and {regions}, the regions of an image.")
    return found


def compare(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    top_ks: Iterable[int] | None = None,
    select_per: Iterable[str] = SELECT_PER,
    descriptors: Iterable[str] = DESCRIPTORS,
    max_tokens: int = 32,
) -> dict[str, Any]:
    """Measure every descriptor, selector and top_k against dense attention, between an oracle and random.

    Args:
      sampler: the checkpoint; prompts are built as in a chat with it.
      prompts: questions about images.
      top_ks: regions per query; None means :func:`default_top_ks`.
      select_per: values of ``GazeConfig.select_per``.
      descriptors: values of ``GazeConfig.descriptor``.
      max_tokens: maximum number of tokens in a dense answer.

    Returns:
      A report that can be written as JSON: "model" (the config), "regions" and "visual_tokens" of the largest
      prompt, "prompts" with their dense answers, "answer_tokens" (total), "template", "date", "device", and
      "rows", one per setting and top_k. A row has "strategy", "descriptor" (None for oracle and random),
      "select_per", "top_k", "entries" (visual keys per query, layer and head), "entries_fraction" (of dense
      attention's entries), "kl" (of the routed from the dense distribution, in nats) and "top1" (agreement).
      These are means over prompts of means over an answer's tokens; "kl_ci" and "top1_ci" are their 95 %
      intervals over prompts, None for a single prompt. Prompts about one image are not independent, so
      intervals over few images are too narrow.

    Raises:
      UserError: there is no prompt, one does not fit the model, or an option is out of range.
    """
    if not prompts:
        raise UserError("There are no prompts; give at least one image and question.")
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1.")
    settings = _settings(select_per, descriptors)
    arrays = _prompt_arrays(sampler, prompts)
    bucket = _bucket(arrays)
    budgets = _check_top_ks(top_ks, bucket.regions)
    answers = [_dense_answer(sampler, row, max_tokens) for row in arrays]
    rows = _measure(sampler, arrays, answers, bucket, max_tokens, settings, budgets)
    tokenizer = sampler.tokenizer
    return {
        "model": to_dict(sampler.config),
        "regions": bucket.regions,
        "visual_tokens": max(int((row["visual_src"] >= 0).sum()) for row in arrays),
        "prompts": [
            {"name": p.name, "question": p.question, "answer": tokenizer.decode(a, skip_special=True)}
            for p, a in zip(prompts, answers, strict=True)
        ],
        "answer_tokens": sum(len(answer) for answer in answers),
        "rows": rows,
        "template": sampler.template.name,
        "date": datetime.date.today().isoformat(),
        "device": describe_devices(),
    }


def _measure(
    sampler: Sampler,
    arrays: Sequence[Arrays],
    answers: Sequence[Sequence[int]],
    bucket: Bucket,
    max_tokens: int,
    settings: Sequence[_Setting],
    top_ks: Sequence[int],
) -> list[dict[str, Any]]:
    """The report's rows: every setting and top_k, averaged over the prompts and their dense answers."""
    config, params = sampler.config, sampler.params
    outcomes: dict[tuple[_Setting, int], list[_Outcome]] = {(s, k): [] for s in settings for k in top_ks}
    dense_entries = []
    for prompt, answer in zip(arrays, answers, strict=True):
        row = _with_answer(prompt, answer, bucket, max_tokens)
        dense, entries = _dense_pass(config, params, row)
        dense_entries.append(float(entries))
        for (setting, top_k), measured in outcomes.items():
            routing, budget = Routing(setting.strategy), jnp.asarray(top_k, jnp.int32)
            outcome = _routed_pass(setting.model(config), routing, params, row, dense, budget)
            measured.append(jax.device_get(outcome))
    mean = float(np.mean(dense_entries))
    return [asdict(setting) | {"top_k": k} | _summary(of, mean) for (setting, k), of in outcomes.items()]


def _summary(outcomes: Sequence[_Outcome], dense_entries: float) -> dict[str, float | list[float] | None]:
    """Means over prompts, with intervals that treat prompts, not tokens, as independent."""
    kl, top1, entries = ([float(getattr(o, name)) for o in outcomes] for name in ("kl", "top1", "entries"))
    intervals = {"kl_ci": student_interval(kl, 0.0), "top1_ci": student_interval(top1, 0.0, 1.0)}
    return {
        "entries": float(np.mean(entries)),
        "entries_fraction": float(np.mean(entries)) / dense_entries,
        "kl": float(np.mean(kl)),
        "top1": float(np.mean(top1)),
        **{name: ci and list(ci) for name, ci in intervals.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as a table, one line per setting and top_k."""
    lines = [
        f"{len(report['prompts'])} prompts, {report['answer_tokens']} answer tokens, {report['regions']} "
        f"regions of {report['visual_tokens']} visual tokens; means and 95 % intervals over prompts",
        f"{'scores':8}{'selects':>9}{'top_k':>6}{'entries':>10}{'of dense':>10}"
        f"{'KL from dense, nats':>30}{'top-1 agreement':>24}",
    ]
    for row in report["rows"]:
        scores = row["descriptor"] or row["strategy"]
        kl, top1 = f"{row['kl']:.3g}", f"{row['top1']:.3f}"
        if row["kl_ci"]:
            kl += " [{:.3g}, {:.3g}]".format(*row["kl_ci"])
            top1 += " [{:.3f}, {:.3f}]".format(*row["top1_ci"])
        lines.append(
            f"{scores:8}{row['select_per']:>9}{row['top_k']:>6}{row['entries']:>10.1f}"
            f"{row['entries_fraction']:>10.1%}{kl:>30}{top1:>24}"
        )
    return "\n".join(lines)


def require_matplotlib() -> None:
    """Check that :func:`plot` can draw; call this before a long computation.

    Raises:
      UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("A plot needs matplotlib; install it with pip install 'gaze-jax[plot]'.")


_COLOURS = {"mean": "#0085ca", "minmax": "#d1495b", "oracle": "#2b2b2b", "random": "#a0a0a0"}
_LINES = {"head": "-", "kv_head": "--"}


def plot(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw KL divergence and agreement over the fraction of dense attention's visual entries.

    Raises:
      UserError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        lines.setdefault((row["descriptor"] or row["strategy"], row["select_per"]), []).append(row)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, layout="constrained")
    for (scores, select_per), rows in lines.items():
        at = [row["entries_fraction"] for row in rows]
        style = {"color": _COLOURS[scores], "linestyle": _LINES[select_per], "marker": "o", "markersize": 3.5}
        for axis, name in ((left, "kl"), (right, "top1")):
            axis.plot(at, [row[name] for row in rows], label=f"{scores}, per {select_per}", **style)
            if rows[0][f"{name}_ci"]:
                low, high = zip(*(row[f"{name}_ci"] for row in rows), strict=True)
                axis.vlines(at, low, high, color=_COLOURS[scores], alpha=0.4, linewidth=1)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.3g} %"))
    for axis in (left, right):
        axis.set_xlabel("visual keys per query, fraction of dense")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    # With all regions the KL is only rounding, and including it would flatten the other curves.
    routed = [row["kl"] for row in report["rows"] if row["top_k"] < report["regions"] and row["kl"] > 0]
    if any(row["kl"] > 0 for row in report["rows"]):
        left.set_yscale("log", nonpositive="clip")
    if routed:
        left.set_ylim(min(routed) / 2, max(routed) * 2)
    left.set_ylabel("KL from dense, nats per token")
    right.set_ylabel("top-1 agreement with dense")
    right.set_ylim(None, 1.01)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
