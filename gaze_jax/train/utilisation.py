"""Model FLOPs utilisation: what a step of the model costs, and what the chips could do at most."""

import dataclasses

import flax.linen as nn
import jax
from jax.sharding import Mesh

from gaze_jax.parallel import rules
from gaze_jax.parallel.costs import count_flops
from gaze_jax.parallel.topology import peak_flops
from gaze_jax.train.config import Experiment
from gaze_jax.train.losses import Batch
from gaze_jax.train.step import abstract_state, step_function
from gaze_jax.train.teacher import Teacher


def peak_of(mesh: Mesh) -> float | None:
    """FLOPs per second of all chips of a mesh together at their stated bfloat16 peak; None if unknown."""
    peaks = [peak_flops(device.device_kind) for device in mesh.devices.flat]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if len(known) == len(peaks) else None


def model_flops(experiment: Experiment, mesh: Mesh, batch: Batch, teacher: Teacher | None = None) -> int:
    """FLOPs of one step of the model on a batch of these shapes, padding included.

    They are counted from the step's jaxpr (:func:`gaze_jax.parallel.costs.count_flops`), traced without
    rematerialisation, whose work is not the model's, and with the XLA form of attention, which unlike a
    kernel can be looked into. Attention counts with every region, as it is computed in training; logits that
    are made chunk by chunk count once more, for the backward pass. Where attention visits only what is
    seen, with ``visual_scope="view"`` and on a CPU, one chunk of each loop counts: a lower bound.

    Args:
      experiment: the run.
      mesh: its mesh.
      batch: arrays or shapes.
      teacher: of a distillation, whose forward pass counts too.
    """
    gaze = dataclasses.replace(experiment.model.gaze, prefill_implementation="xla")
    model = dataclasses.replace(experiment.model, remat=False, remat_policy="nothing", gaze=gaze)
    plain = dataclasses.replace(experiment, model=model)
    abstract = abstract_state(plain, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.flax_rules()):
        traced = jax.jit(step_function(plain)).trace(abstract, batch, teacher)
    return count_flops(traced.jaxpr).total
