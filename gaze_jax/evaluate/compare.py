"""Gaze without training: how far routed attention moves a checkpoint's own dense answers.

Dense attention answers each prompt. The answer is then read once densely and once under every setting, and
at each position that emits one of its tokens the two distributions of the next token are compared: their
KL divergence, and whether the likeliest token is the same. An oracle that routes by the true attention
shows what any descriptor could reach at best, random regions what no descriptor should fall below.
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

from gaze_jax.chat.conversation import Parts, conversation_parts
from gaze_jax.chat.messages import Message
from gaze_jax.chat.template import ChatTemplate
from gaze_jax.config import to_dict
from gaze_jax.core import accounting, masks
from gaze_jax.core.regions import DESCRIPTORS
from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection, SelectionSpec
from gaze_jax.core.streams import Kind, Streams
from gaze_jax.data.pipeline import Bucket, prompt_length, stack
from gaze_jax.data.processor import Arrays, Processor, pad_to, process
from gaze_jax.data.sample import Image, Sample, Text
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.evaluate.metrics import student_interval
from gaze_jax.evaluate.prompts import Prompt
from gaze_jax.families import get_family
from gaze_jax.infer.generate import Generator, Params
from gaze_jax.models import MLLM, MLLMConfig
from gaze_jax.parallel.mesh import describe_devices
from pallas_kernels.spec import SELECT_PER

Array = jax.Array

_FAMILY = "compare"
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_AFTER = "\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class _Setting:
    """One way to route; one program serves it at every top_k."""

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
    """A prompt with the answer that dense attention gave, as a batch of one.

    Attributes:
      images: float32 [1, images, image_size, image_size, 3].
      streams: of prompt and answer.
      sample: int32 [1], names the prompt for random routing.
      at: int32 [A] text-stream places of the queries that emit the answer's tokens.
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


def _emitted(model: MLLM, row: _Row, top_k: Array | None, route: Routing) -> tuple[Array, accounting.Entries]:
    """Log-probabilities float32 [A, V] of the tokens after ``row.at``, and what these queries attended to.

    The vocabulary meets the A places alone: logits of a whole row may be larger than the model.
    """
    hidden, out = model.hidden(
        row.images,
        row.streams,
        Selection(top_k),
        SelectionSpec(route, return_trace=True),
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
    """Mean of [..., A] over the counted tokens."""
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
    config: MLLMConfig, route: Routing, params: Params, row: _Row, dense: Array, top_k: Array
) -> _Outcome:
    """Compare routed attention with the log-probabilities ``dense`` float32 [A, V]."""
    apply: Callable[..., Any] = MLLM(config).apply
    routed, entries = apply({"params": params}, row, top_k, route, method=_emitted)
    kl = jnp.sum(jnp.exp(dense) * (dense - routed), axis=-1)
    agree = jnp.argmax(dense, axis=-1) == jnp.argmax(routed, axis=-1)
    return _Outcome(
        kl=_mean(jnp.maximum(kl, 0.0), row),  # rounding may leave less than nothing
        top1=_mean(agree.astype(jnp.float32), row),
        entries=_mean(entries.visual, row),
    )


def _prompt_arrays(
    processor: Processor, index: int, prompt: Prompt, template: ChatTemplate | None = None
) -> Arrays:
    """One prompt as a chat with the image first in the user's turn."""
    question = prompt.question.strip()
    if not question:
        raise UserError(f"The question about {prompt.name!r} is empty; ask something.")
    parts: Parts = (Text(_BEFORE), Image(0), Text(_AFTER.format(question=question)))
    if template is not None:
        family = get_family(processor.layout.views.style)
        system = family.system
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", (Image(0), question)))
        parts = conversation_parts(template, messages, arrange=family.arrange, add_generation_prompt=True)
    return process(processor, Sample(index, (prompt.image,), parts, _FAMILY))


def _bucket(arrays: Sequence[Arrays]) -> Bucket:
    """Sizes that every prompt fits."""
    return Bucket(
        regions=max(len(row["visual_src"]) for row in arrays),
        text=prompt_length(max(len(row["tokens"]) for row in arrays)),
        images=max(len(row["images"]) for row in arrays),
        slots=max(row["visual_src"].shape[1] for row in arrays),
    )


def _with_answer(arrays: Arrays, answer: Sequence[int], bucket: Bucket, length: int) -> _Row:
    """Append the answer's tokens but the last, which is emitted and never read."""
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


def _dense_answer(generator: Generator, params: Params, arrays: Arrays, bucket: Bucket) -> list[int]:
    """What the model says when it attends to everything, the end token included."""
    padded = stack([pad_to(arrays, **asdict(bucket))])
    batch = {name: jnp.asarray(value) for name, value in padded.items()}
    found = generator(params, batch["images"], Streams.from_batch(batch), top_k=None)
    return [int(token) for token in np.asarray(found.tokens)[:, 0] if token >= 0]


def default_top_ks(regions: int) -> tuple[int, ...]:
    """Powers of two below R, and R itself, which must equal dense attention."""
    return (*(2**i for i in range((regions - 1).bit_length())), regions)


def _chosen(name: str, values: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    values = tuple(dict.fromkeys(values))
    if not values or set(values) - set(known):
        raise UserError(f"{name}={values} must name at least one of {known} and nothing else.")
    return values


def _settings(shares: tuple[str, ...], descriptors: tuple[str, ...]) -> list[_Setting]:
    """Every descriptor, then the ceiling and the floor."""
    found = [_Setting("descriptor", select_per, name) for name in descriptors for select_per in shares]
    return found + [
        _Setting(strategy, select_per) for strategy in ("oracle", "random") for select_per in shares
    ]


def _check_model(config: MLLMConfig, tokenizer: Tokenizer) -> None:
    """Raise a UserError if there is nothing to route, or no embedding for a token."""
    if config.vision is None:
        raise UserError(
            "The model has no image tower, so there are no visual tokens to route; give a multimodal one."
        )
    rows = config.decoder.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} tokens but the model's embedding table only {rows} "
            "rows; give the model's own tokenizer."
        )


def compare(
    config: MLLMConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    top_ks: Iterable[int] | None = None,
    shares: Iterable[str] = SELECT_PER,
    descriptors: Iterable[str] = DESCRIPTORS,
    max_tokens: int = 32,
    resize: bool = True,
    template: ChatTemplate | None = None,
) -> dict[str, Any]:
    """Measure every descriptor, share and top_k against dense attention, between an oracle and random.

    Args:
      config, params, tokenizer: of the model.
      prompts: questions about images.
      top_ks: regions per query; None is :func:`default_top_ks`.
      shares: of ``GazeConfig.select_per``.
      descriptors: of ``GazeConfig.descriptor``.
      max_tokens: most tokens of a dense answer.
      resize: squash images to the tower's size, where the model's views do not say how they fit.
      template: how the model reads a question; None writes it in ChatML.

    Returns:
      What is JSON-ready: "model" (the config), "regions" and "visual_tokens" of the largest prompt, "prompts"
      with their dense answers, "answer_tokens" of all answers, "template", "date", "device", and "rows", one
      for every setting and top_k. A row has "strategy", "descriptor" (None for oracle and random), "share",
      "top_k", "entries" (visual keys per query, layer and head), "entries_share" of dense attention's, "kl"
      (of the routed from the dense distribution, in nats) and "top1" (agreement), means over prompts of means
      over an answer's tokens, and their 95 % intervals over prompts "kl_ci" and "top1_ci", None for a
      single prompt. Prompts about the same image are not independent either: an interval over few images
      is too narrow.

    Raises:
      UserError: the model has no image tower, there is no prompt, one does not fit the model, or an option
        is out of range.
    """
    _check_model(config, tokenizer)
    if not prompts:
        raise UserError("There are no prompts; give at least one image and question.")
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1.")
    settings = _settings(
        _chosen("shares", shares, SELECT_PER), _chosen("descriptors", descriptors, DESCRIPTORS)
    )
    views = get_family(config.views.style).views
    processor = Processor(config.layout, tokenizer, (_FAMILY,), views, resize)
    try:
        arrays = [_prompt_arrays(processor, i, prompt, template) for i, prompt in enumerate(prompts)]
    except ValueError as error:
        raise UserError(str(error)) from error
    bucket = _bucket(arrays)
    top_ks = sorted(set(default_top_ks(bucket.regions) if top_ks is None else top_ks))
    if not top_ks or not 1 <= top_ks[0] <= top_ks[-1] <= bucket.regions:
        raise UserError(f"top_ks={top_ks} must lie between 1 and {bucket.regions}, the regions of an image.")
    generator = Generator(MLLM(config), max_tokens, tokenizer.end_id)
    answers, dense_entries = [], []
    outcomes: dict[tuple[_Setting, int], list[_Outcome]] = {(s, k): [] for s in settings for k in top_ks}
    for prompt_arrays in arrays:
        answers.append(_dense_answer(generator, params, prompt_arrays, bucket))
        row = _with_answer(prompt_arrays, answers[-1], bucket, max_tokens)
        dense, entries = _dense_pass(config, params, row)
        dense_entries.append(float(entries))
        for (setting, top_k), measured in outcomes.items():
            model, route, budget = (
                setting.model(config),
                Routing(setting.strategy),
                jnp.asarray(top_k, jnp.int32),
            )
            measured.append(jax.device_get(_routed_pass(model, route, params, row, dense, budget)))
    whole = float(np.mean(dense_entries))
    rows = [asdict(setting) | {"top_k": k} | _summary(of, whole) for (setting, k), of in outcomes.items()]
    return {
        "model": to_dict(config),
        "regions": bucket.regions,
        "visual_tokens": max(int((row["visual_src"] >= 0).sum()) for row in arrays),
        "prompts": [
            {"name": p.name, "question": p.question, "answer": tokenizer.decode(a, skip_special=True)}
            for p, a in zip(prompts, answers, strict=True)
        ],
        "answer_tokens": sum(len(answer) for answer in answers),
        "rows": rows,
        "template": "ChatML" if template is None else template.name,
        "date": datetime.date.today().isoformat(),
        "device": describe_devices(),
    }


def _summary(outcomes: Sequence[_Outcome], dense_entries: float) -> dict[str, Any]:
    """Means over prompts, and intervals that take prompts and not tokens as independent."""
    kl, top1, entries = ([float(getattr(o, name)) for o in outcomes] for name in ("kl", "top1", "entries"))
    intervals = {"kl_ci": student_interval(kl, 0.0), "top1_ci": student_interval(top1, 0.0, 1.0)}
    return {
        "entries": float(np.mean(entries)),
        "entries_share": float(np.mean(entries)) / dense_entries,
        "kl": float(np.mean(kl)),
        "top1": float(np.mean(top1)),
        **{name: ci and list(ci) for name, ci in intervals.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for a person: one line per setting and top_k."""
    lines = [
        f"{len(report['prompts'])} prompts, {report['answer_tokens']} answer tokens, {report['regions']} "
        f"regions of {report['visual_tokens']} visual tokens; means and 95 % intervals over prompts",
        f"{'scores':8}{'select_per':7}{'top_k':>6}{'entries':>10}{'of dense':>10}"
        f"{'KL from dense, nats':>30}{'top-1 agreement':>24}",
    ]
    for row in report["rows"]:
        scores = row["descriptor"] or row["strategy"]
        kl, top1 = f"{row['kl']:.3g}", f"{row['top1']:.3f}"
        if row["kl_ci"]:
            kl += " [{:.3g}, {:.3g}]".format(*row["kl_ci"])
            top1 += " [{:.3f}, {:.3f}]".format(*row["top1_ci"])
        lines.append(
            f"{scores:8}{row['select_per']:7}{row['top_k']:>6}{row['entries']:>10.1f}"
            f"{row['entries_share']:>10.1%}{kl:>30}{top1:>24}"
        )
    return "\n".join(lines)


def require_matplotlib() -> None:
    """Raise a UserError if :func:`plot` could not draw; ask before what takes long."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("A plot needs matplotlib; install it with pip install 'gaze-jax[plot]'.")


_COLOURS = {"mean": "#0085ca", "minmax": "#d1495b", "oracle": "#2b2b2b", "random": "#a0a0a0"}
_LINES = {"head": "-", "kv_head": "--"}


def plot(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw KL divergence and agreement over the share of dense attention's visual entries.

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
        at = [row["entries_share"] for row in rows]
        look = {"color": _COLOURS[scores], "linestyle": _LINES[select_per], "marker": "o", "markersize": 3.5}
        for axis, name in ((left, "kl"), (right, "top1")):
            axis.plot(at, [row[name] for row in rows], label=f"{scores}, per {select_per}", **look)
            if rows[0][f"{name}_ci"]:
                low, high = zip(*(row[f"{name}_ci"] for row in rows), strict=True)
                axis.vlines(at, low, high, color=_COLOURS[scores], alpha=0.4, linewidth=1)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(FuncFormatter(lambda select_per, _: f"{100 * select_per:.3g} %"))
    for axis in (left, right):
        axis.set_xlabel("visual keys per query, share of dense")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    # All regions are dense attention: their KL is rounding, and would flatten everything else.
    routed = [row["kl"] for row in report["rows"] if row["top_k"] < report["regions"] and row["kl"] > 0]
    left.set_yscale("log", nonpositive="clip")
    if routed:
        left.set_ylim(min(routed) / 2, max(routed) * 2)
    left.set_ylabel("KL from dense, nats per token")
    right.set_ylabel("top-1 agreement with dense")
    right.set_ylim(None, 1.01)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
