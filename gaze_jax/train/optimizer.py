"""The optimizer: optax's Muon or AdamW, with warmup, decay and clipping by the global norm."""

import dataclasses
import math
from collections.abc import Callable, Collection

import jax
import optax
from jax.tree_util import DictKey
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from gaze_jax.train.lora import PART

Leaf = jax.Array | jax.ShapeDtypeStruct

NAMES = ("muon", "adamw")
PARTS = ("vision", "projector", "newline", "context", "decoder")
"""Parts of a model: its top-level parameters."""
DECAYS = ("linear", "cosine")

# Kernels that do not map between hidden vectors: tables and filters.
_NOT_HIDDEN = ("lm_head", "patch_embedding")
# RMS of an orthogonalised update, matched to AdamW's, so that both use the same learning rate.
_MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class PartRates:
    """Learning rate of each part of a model, as a multiple of the run's; its decay is multiplied too.

    LLaVA-OneVision trains its tower at a fifth of the rate of the rest, for example. The decoder's is also
    that of its adapters.
    """

    vision: float = 1.0
    projector: float = 1.0
    newline: float = 1.0
    context: float = 1.0
    decoder: float = 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: "muon" orthogonalises the updates of hidden weight matrices and leaves the rest (embeddings,
        head, norms, biases, positions, context tokens, patches, adapters) to Adam; "adamw" is AdamW
        throughout.
      learning_rate: peak learning rate.
      adam_learning_rate: peak learning rate of the parameters that "muon" leaves to Adam; None means
        ``learning_rate``.
      warmup_steps: steps of linear warmup from ``learning_rate / warmup_steps``.
      warmup_fraction: the same as a fraction of all steps; given instead of ``warmup_steps``.
      decay: shape of the decay from the peak, "linear" or "cosine".
      final_fraction: fraction of the peak at which the decay ends, one step after the last.
      weight_decay: weight decay of hidden matrices, multiplied by the learning rate.
      b2: decay rate of Adam's second moment.
      clip_norm: maximum global norm of the gradient; None does not clip.
      frozen: parts of the model that are not trained, of :data:`PARTS`.
      part_rates: multiples of the learning rate for parts of the model.
    """

    name: str = "muon"
    learning_rate: float = 2e-3
    adam_learning_rate: float | None = None
    warmup_steps: int = 100
    warmup_fraction: float | None = None
    decay: str = "linear"
    final_fraction: float = 0.0
    weight_decay: float = 0.01
    b2: float = 0.99
    clip_norm: float | None = 1.0
    frozen: tuple[str, ...] = ()
    part_rates: PartRates = PartRates()

    def __post_init__(self) -> None:
        for field, known in (("name", NAMES), ("decay", DECAYS)):
            if getattr(self, field) not in known:
                raise ValueError(f"optimizer.{field}={getattr(self, field)!r} must be one of {known}.")
        for field in ("learning_rate", "adam_learning_rate", "clip_norm"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"optimizer.{field}={value} must be positive.")
        if self.warmup_steps < 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} and optimizer.weight_decay={self.weight_decay} "
                "must not be negative."
            )
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"optimizer.warmup_fraction={self.warmup_fraction} must be 0 or more, below 1.")
        if self.warmup_fraction is not None and self.warmup_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} contradicts optimizer.warmup_fraction="
                f"{self.warmup_fraction}; set the steps to 0, or leave the fraction out."
            )
        if unknown := sorted(set(self.frozen) - set(PARTS)):
            raise ValueError(
                f"optimizer.frozen names {', '.join(unknown)}; the parts are {', '.join(PARTS)}."
            )
        if set(PARTS) <= set(self.frozen):
            raise ValueError("optimizer.frozen names every part, so nothing would be trained; leave one out.")
        for part, rate in dataclasses.asdict(self.part_rates).items():
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"optimizer.part_rates.{part}={rate} must be positive; to train none of it, use frozen."
                )
            if part in self.frozen and rate != 1:
                raise ValueError(f"optimizer.part_rates.{part}={rate} has no effect, since {part} is frozen.")
        if not 0 <= self.final_fraction <= 1 or not 0 < self.b2 < 1:
            raise ValueError(
                f"optimizer.final_fraction={self.final_fraction} and optimizer.b2={self.b2} must lie "
                "between 0 and 1."
            )
        if self.adam_learning_rate is not None and self.name != "muon":
            raise ValueError(
                "optimizer.adam_learning_rate has an effect only with name='muon'; adamw uses learning_rate."
            )


def _is_hidden(path: tuple[DictKey, ...]) -> bool:
    names = [key.key for key in path]
    return names[-1] == "kernel" and not set(names) & set(_NOT_HIDDEN)


def muon_dimensions(params: PyTree) -> PyTree:
    """The same tree with the two axes of each hidden matrix, which "muon" orthogonalises, else None.

    Leading axes are layers (scanned kernels are [L, in, out]); each layer is orthogonalised separately.
    """

    def dimensions(path: tuple[DictKey, ...], leaf: Leaf) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if _is_hidden(path) else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def hidden_matrices(params: PyTree) -> PyTree:
    """The same tree with True for weight matrices between hidden vectors, to which weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_hidden(path), params)


def warmup_of(config: OptimizerConfig, steps: int) -> int:
    """Steps of warmup in a run of ``steps``."""
    return config.warmup_steps if config.warmup_fraction is None else round(config.warmup_fraction * steps)


def learning_rate(peak: float, config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warmup, then decay that reaches the final fraction at step ``steps`` (one after the last)."""
    warmup_steps = warmup_of(config, steps)
    falling = max(steps - warmup_steps, 1)
    if config.decay == "linear":
        decay = optax.linear_schedule(peak, peak * config.final_fraction, falling)
    else:
        decay = optax.cosine_decay_schedule(peak, falling, alpha=config.final_fraction)
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    config: OptimizerConfig, steps: int, frozen: Collection[str] | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the update rule, and the learning rate of the hidden matrices as a function of the step.

    Args:
      config: how parameters are updated.
      steps: of the run.
      frozen: parts that are not trained; None: ``config.frozen``.
    """
    frozen = config.frozen if frozen is None else frozen
    schedule = learning_rate(config.learning_rate, config, steps)
    if config.name == "muon":
        rest = config.learning_rate if config.adam_learning_rate is None else config.adam_learning_rate
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.b2,
            adam_learning_rate=learning_rate(rest, config, steps),
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=_MUON_RMS,
        )
    else:
        update = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay, mask=hidden_matrices)
    rates = dataclasses.asdict(config.part_rates)
    rates[PART] = config.part_rates.decoder
    if set(rates.values()) != {1.0}:  # the optimizer's state would have another structure
        update = optax.chain(update, optax.stateless(lambda updates, _: _scaled(updates, rates)))
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    if frozen:

        def are(fixed: bool) -> Callable[[PyTree], dict[str, bool]]:
            return lambda params: {part: (part in frozen) == fixed for part in params}

        update = optax.chain(optax.masked(update, are(False)), optax.masked(optax.set_to_zero(), are(True)))
    return update, schedule


def _scaled(updates: dict[str, PyTree], rates: dict[str, float]) -> dict[str, PyTree]:
    """The updates of each part times its rate; a masked part has none."""
    return {
        part: jax.tree.map(lambda leaf, rate=rates[part]: leaf * rate, tree) for part, tree in updates.items()
    }
