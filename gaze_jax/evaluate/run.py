"""Evaluation of a training run: accuracy of free-running answers, routing accuracy, and a picture."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh

from gaze_jax.core.routing import Routing
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import IGNORE
from gaze_jax.corpora.digits import DigitsConfig, credit, evaluation_samples, sequence_lengths
from gaze_jax.corpora.phrases import FAMILIES
from gaze_jax.data.padding import ANSWER_PADDING, pad_answers
from gaze_jax.data.placement import Arrays
from gaze_jax.data.processor import prompt
from gaze_jax.errors import UserError
from gaze_jax.evaluate.metrics import (
    accuracy,
    best_layer,
    routing_hits,
    target_regions,
    token_scores,
)
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import selection_capacity
from gaze_jax.infer.programs import free_slots_for
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.models import MLLM
from gaze_jax.parallel import together
from gaze_jax.parallel.mesh import MeshConfig, make_mesh
from gaze_jax.train.checkpoint import Trained, load_for_inference
from gaze_jax.train.config import Experiment
from gaze_jax.train.pipeline import make_processor
from gaze_jax.train.step import check_heads
from gaze_jax.viewer.answer_sheet import answer_sheet
from gaze_jax.writing import replacing, write_text

FILE = "eval.json"
SCENE = "scene.png"
PICTURE = "gaze.png"

# Not the seed of any training run. Every run and arm is tested on the same scenes.
_TEST_SEED = 20_260_102


def load(workdir: str | Path, mesh: Mesh | None = None) -> Trained:
    """Load the newest checkpoint of a run onto a mesh; None is one device.

    Raises:
      UserError: there is none, it is damaged, or the mesh does not divide the model's heads.
    """
    one = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    trained = load_for_inference(workdir, one if mesh is None else mesh)
    if mesh is not None:
        check_heads(trained.experiment.model, mesh)
    return trained


def _scenes(experiment: Experiment) -> DigitsConfig:
    """The digit scenes of a run, which has test scenes; a corpus has none.

    Raises:
      UserError: the run is on a corpus.
    """
    if isinstance(experiment.data, DigitsConfig):
        return experiment.data
    raise UserError(
        "The run is on a corpus, which has no test scenes; ask it with gaze-jax generate --checkpoint=..., "
        "or compare it with gaze-jax eval --checkpoint=... --compare=dense."
    )


def evaluation_prompts(trained: Trained, samples: int) -> list[Arrays]:
    """Test prompts of every question family with a training weight.

    Args:
      trained: the model.
      samples: number of prompts per family.

    Returns:
      Arrays of one row each; prompts are unpadded, answers are padded to one length.
    """
    experiment = trained.experiment
    data, processor = _scenes(experiment), make_processor(experiment)
    length = sequence_lengths(data, trained.tokenizer).answer
    return [
        pad_answers(prompt(processor, sample), length=length)
        for family, weight in zip(FAMILIES, data.families, strict=True)
        if weight
        for sample in evaluation_samples(data, _TEST_SEED, family, samples)
    ]


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model's answers to N prompts.

    Attributes:
      tokens: int32 [N, A], -100 after an answer's end.
      selected: bool [A, L, N, Hs, R], the regions selected by the query that emitted each token, all False
        after an answer's end; None under dense attention.
      visual_entries: float32 [N, A], visual keys per query, a mean over layers and heads.
    """

    tokens: np.ndarray
    selected: np.ndarray | None
    visual_entries: np.ndarray


def answer(
    trained: Trained,
    prompts: Sequence[Arrays],
    *,
    top_k: int | None,
    routing: Routing = Routing(),
    mesh: Mesh | None = None,
) -> Answers:
    """Answer every prompt greedily.

    Args:
      trained: the model.
      prompts: from :func:`evaluation_prompts`.
      top_k: regions per query; None means dense attention.
      routing: where region scores come from.
      mesh: the mesh that the model is on; None is one device.
    """
    size = trained.experiment.eval.batch_size
    found: dict[str, list[np.ndarray]] = {"tokens": [], "entries": [], "selected": []}
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        # Fill up the last batch with copies of its first row, so that it compiles no other program.
        rows = part + [part[0]] * (min(size, len(prompts)) - len(part))
        for name, values in _decode(trained, rows, top_k, routing, mesh).items():
            found[name].append(values[: len(part)] if name == "tokens" else values[:, :, : len(part)])
    entries = np.concatenate(found["entries"], axis=2)
    return Answers(
        tokens=np.concatenate(found["tokens"]),
        selected=np.concatenate(found["selected"], axis=2) if found["selected"] else None,
        visual_entries=entries[..., 0].mean(axis=1).T,
    )


def _decode(
    trained: Trained, rows: Sequence[Arrays], top_k: int | None, routing: Routing, mesh: Mesh | None
) -> dict[str, np.ndarray]:
    """One batch: "tokens" [B, A], "entries" [A, L, B, 4], and, if routed, "selected" [A, L, B, Hs, R]."""
    length = len(rows[0]["answer"])
    engine = Engine(
        MLLM(trained.experiment.model),
        trained.params,
        [{name: a for name, a in row.items() if name not in ANSWER_PADDING} for row in rows],
        free_slots=free_slots_for(length),
        selection=lambda _: Selection(None if top_k is None else jnp.asarray(top_k, jnp.int32)),
        routing=routing,
        mesh=mesh,
    )
    steps = list(
        engine.decode(
            length,
            ends=[trained.tokenizer.end_id],
            sampling=SamplingParams.of([0.0] * len(rows)),
            returns="selection",
            capacity=selection_capacity(None if top_k is None else [top_k], engine.capacity),
        )
    )
    found = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    missing = length - len(found["tokens"])  # the engine stops when every row has ended
    tokens = np.pad(found.pop("tokens"), ((0, missing), (0, 0)), constant_values=IGNORE).T
    del found["visual_tokens"]
    if "selected" in found:
        found["selected"] = found["selected"][..., : engine.regions]  # without the bucket's padding
    return {"tokens": tokens} | {
        name: np.pad(a, ((0, missing), *[(0, 0)] * (a.ndim - 1))) for name, a in found.items()
    }


def _report(experiment: Experiment, answers: Answers, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One section of eval.json."""
    layout = experiment.model.layout
    scores = token_scores(answers.tokens, rows["answer"], rows["answer_view"] >= 0)
    report: dict[str, Any] = {}
    for index, family in enumerate(FAMILIES):
        of_family = rows["family"] == index
        if of_family.any():
            found = accuracy(scores[of_family])
            report[family] = {"acc": found.acc, "ci": list(found.ci), "samples": found.samples}
    emitted = answers.tokens >= 0
    report["entries"] = float(answers.visual_entries[emitted].mean())
    if answers.selected is not None:
        targets = np.where(rows["answer_view"] >= 0, target_regions(rows["answer_box"], layout), -1)
        chance = min((experiment.model.gaze.top_k or 0) / layout.regions, 1.0)
        report["routing"] = best_layer(*routing_hits(answers.selected, targets)) | {"random": chance}
    return report


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one model.

    Attributes:
      report: the content of eval.json.
      prompts: the N prompts, from :func:`evaluation_prompts`.
      answers: the answers to all prompts, one entry per section of the report.
    """

    report: dict[str, Any]
    prompts: Sequence[Arrays]
    answers: Mapping[str, Answers]


def evaluate(trained: Trained, samples: int, mesh: Mesh | None = None) -> Evaluation:
    """Answer unseen questions as trained; a gaze model also answers densely and with random routing.

    Args:
      trained: the model.
      samples: number of questions per family.
      mesh: the mesh that the model is on; None is one device.

    Returns:
      The answers, and a report with sections "gaze", "dense" and "random_routing", all with the same weights
      (only "dense" for a dense arm). A section has an entry per family ("acc", "ci", "samples"), "entries"
      (visual keys per query, layer and head) and, if routed, "routing"
      (:func:`gaze_jax.evaluate.metrics.best_layer`).
    """
    experiment = trained.experiment
    prompts = evaluation_prompts(trained, samples)
    names = ("answer", "answer_box", "answer_view", "family")
    rows = {name: np.stack([row[name] for row in prompts]) for name in names}
    top_k = experiment.model.gaze.top_k
    ways: dict[str, tuple[int | None, Routing]] = {"dense": (None, Routing())}
    if top_k is not None:
        ways = {
            "gaze": (top_k, Routing()),
            **ways,
            "random_routing": (top_k, Routing(strategy="random")),
        }
    answers = {
        name: answer(trained, prompts, top_k=budget, routing=routing, mesh=mesh)
        for name, (budget, routing) in ways.items()
    }
    report: dict[str, Any] = {
        "arm": experiment.arm,
        "seed": experiment.seed,
        "step": trained.step,
        "top_k": top_k,
        "regions": experiment.model.layout.regions,
    }
    report |= {name: _report(experiment, found, rows) for name, found in answers.items()}
    return Evaluation(report, prompts, answers)


def table(report: Mapping[str, Any]) -> str:
    """The report as a table, one line per section."""
    families = [name for name in FAMILIES if name in report["dense"]]
    lines = ["".join([f"{'':16}", *(f"{name:>26}" for name in families), f"{'entries':>10}{'routing':>18}"])]
    for way in ("gaze", "dense", "random_routing"):
        if way not in report:
            continue
        section = report[way]
        cells = [f"{way.replace('_', ' '):16}"]
        for name in families:
            low, high = section[name]["ci"]
            cells.append(f"{section[name]['acc']:>11.3f} [{low:.3f}, {high:.3f}]".rjust(26))
        cells.append(f"{section['entries']:>10.1f}")
        if "routing" in section:
            cells.append(f"{section['routing']['best']:.3f} (layer {section['routing']['layer']})".rjust(18))
        lines.append("".join(cells))
    return "\n".join(lines)


def draw(trained: Trained, evaluation: Evaluation, workdir: Path) -> None:
    """Write the first test scene to ``scene.png`` and where its answer looked to ``gaze.png``."""
    experiment, asked, found = trained.experiment, evaluation.prompts[0], evaluation.answers["gaze"]
    assert found.selected is not None, "the gaze arm selects"
    image = np.round((asked["images"][0] + 1) * 127.5).astype(np.uint8)
    with replacing(workdir / SCENE) as part:
        PIL.Image.fromarray(image).save(part, format="PNG")
    ids = [int(token) for token in found.tokens[0] if token >= 0]
    boxes = [tuple(box) if box[0] >= 0 else None for box in asked["answer_box"].tolist()]
    layer = evaluation.report["gaze"]["routing"]["layer"]
    layout = experiment.model.layout
    question = trained.tokenizer.decode(asked["tokens"].tolist(), skip_special=True)
    sheet = answer_sheet(
        image,
        [trained.tokenizer.decode([token]) for token in ids],
        found.selected[: len(ids), layer, 0],
        layout,
        title=f"{question.strip()}\n{experiment.model.gaze.top_k} of {layout.regions} regions, layer {layer}",
        columns=_scenes(experiment).cols + 3,  # a line of the transcript: label, colon, digits, line end
        boxes=(boxes + [None] * len(ids))[: len(ids)],
        credit=credit(_scenes(experiment)),
    )
    with replacing(workdir / PICTURE) as part:
        sheet.save(part, format="PNG")


def run(workdir: str | Path, samples: int | None = None, mesh: Mesh | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run: print a table, write ``eval.json``, draw the picture.

    Of several processes that share a mesh, all call it, and the first prints and writes.

    Args:
      workdir: the run's directory.
      samples: number of questions per family; None takes the config's.
      mesh: the devices to evaluate on; None is one device.

    Returns:
      The report.

    Raises:
      UserError: there is no checkpoint, it is damaged, or a file cannot be written.
    """
    with together.agreed():
        trained = load(workdir, mesh)
    evaluation = evaluate(trained, trained.experiment.eval.samples if samples is None else samples, mesh)
    together.by_first(lambda: _show(trained, evaluation, workdir))
    return evaluation.report


def _show(trained: Trained, evaluation: Evaluation, workdir: str | Path) -> None:
    write_text(Path(workdir, FILE), json.dumps(evaluation.report, indent=2) + "\n")
    print(table(evaluation.report), flush=True)
    if "gaze" in evaluation.answers:
        draw(trained, evaluation, Path(workdir))
        print(
            f"{Path(workdir, PICTURE)} shows where the answer to {Path(workdir, SCENE)} looked.", flush=True
        )


def best_layer_of(workdir: str | Path) -> int | None:
    """The layer with the best routing accuracy in the run's ``eval.json``; None if there is none."""
    path = Path(workdir, FILE)
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(report["gaze"]["routing"]["layer"]) if "gaze" in report else None
