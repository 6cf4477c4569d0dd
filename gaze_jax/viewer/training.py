"""Pictures of a run while it trains: its curves, and where a held-out sample's queries look."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gaze_jax.data.placement import PlacedView
from gaze_jax.data.sample import Sample
from gaze_jax.train import evaluation, metrics
from gaze_jax.train.evaluation import Evaluated, SampleTrace
from gaze_jax.viewer.answer_sheet import view_sheets
from gaze_jax.viewer.contact_sheet import INK, MUTED, PAPER, SELECTED, TARGET, Colour
from gaze_jax.writing import replacing, write_text

CURVES = "curves.svg"

_VIEWS, _TOKENS = 4, 32
"""Most views, and most tokens, in a picture."""

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of a plot: its (step, value) pairs, and whether each of them gets a dot."""

    name: str
    colour: Colour
    points: Points
    dots: bool


def draw_evaluation(evaluated: Evaluated) -> None:
    """Write ``curves.svg`` and, if the model selects, ``evaluation/step-000500.png`` into a run's folder.

    Raises:
      UserError: a file cannot be written.
    """
    folder = evaluated.workdir
    trained, held_out = (metrics.read(folder / name) for name in (metrics.FILE, evaluation.FILE))
    write_text(folder / CURVES, curves(trained, held_out))
    if evaluated.trace is None:
        return
    sheet = evaluation_sheet(evaluated.trace, evaluated.step, evaluated.row["gaze"]["top_k"])
    path = folder / evaluation.FOLDER / f"step-{evaluated.step:06}.png"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as part:
        sheet.save(part, format="PNG")


# -- Where a sample's queries look -------------------------------------------------------------------------


def evaluation_sheet(trace: SampleTrace, step: int, top_k: float) -> Image.Image:
    """Draw what the queries of supervised tokens selected, in all layers and heads together.

    Args:
      trace: the sample; of many views four are drawn, evenly spread and always the same ones, and of many
        tokens the first 32.
      step: steps done, for the heading.
      top_k: regions per query, a mean over the evaluation, for the heading.
    """
    views = trace.views[:: -(-len(trace.views) // _VIEWS)]
    tokens, layers, heads, regions = trace.selected[:_TOKENS].shape
    titles = [f"{_name(view)} of a held-out sample" for view in views]
    titles[0] = (
        f"Step {step}: {titles[0]}\nThe supervised tokens; {top_k:.3g} of {regions} regions per query, "
        f"{layers} layers and {heads} heads together"
    )
    return view_sheets(
        [_pixels(trace.sample, view) for view in views],
        views,
        trace.pieces[:_TOKENS],
        trace.selected[:_TOKENS].reshape(tokens, layers * heads, regions),
        titles=titles,
        panel=128,
        columns=8,
        boxes=trace.boxes[:_TOKENS] if len(trace.views) == 1 else None,
        clearest=1.0,  # not that of this picture, so that those of two steps can be compared
    )


def _name(view: PlacedView) -> str:
    return f"video {view.index + 1}, frame {view.frame + 1}" if view.video else f"image {view.index + 1}"


def _pixels(sample: Sample, view: PlacedView) -> np.ndarray:
    """The image or frame of a view, uint8 [height, width, 3]."""
    if not view.video:
        return np.asarray(sample.images[view.index])
    frame = next(frame for number, frame in enumerate(sample.videos[view.index]) if number == view.frame)
    return np.asarray(frame)


# -- Curves ------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 460, 260
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 44, 16, 40


def curves(trained: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> str:
    """Loss and accuracy over the steps of a run, as an SVG picture.

    Args:
      trained: rows of metrics.jsonl.
      held_out: rows of evaluation.jsonl.
    """
    plots = []
    ways = (("dense", "held out, dense", TARGET), ("gaze", "held out, Gaze", SELECTED))
    for number, name in enumerate(("loss", "accuracy")):
        lines = [Line("training", MUTED, [(row["step"], row[name]) for row in trained if name in row], False)]
        for way, title, colour in ways:
            points = [(row["step"], row[way][name]) for row in held_out if way in row]
            lines.append(Line(title, colour, points, True))
        shown = [line for line in lines if line.points]
        plots.append(_plot(name, shown, number * (_LEFT + _WIDTH + _RIGHT), name == "loss"))
    width, height = 2 * (_LEFT + _WIDTH + _RIGHT), _TOP + _HEIGHT + _BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'
        f'<title>Loss and accuracy of a run</title><rect width="100%" height="100%" fill="{_hex(PAPER)}"/>'
        f"{''.join(plots)}</svg>\n"
    )


def _plot(name: str, lines: Sequence[Line], left: int, logarithmic: bool) -> str:
    """One of the plots; a loss that spans more than a factor of 20 has a logarithmic axis."""
    x0, y0 = left + _LEFT, _TOP
    values = [value for line in lines for _, value in line.points]
    steps = [step for line in lines for step, _ in line.points]
    least, most = min(values, default=0.0), max(values, default=1.0)
    logarithmic = logarithmic and least > 0 and most > 20 * least
    low, high = (least, most) if logarithmic else (0.0, max(most, 1e-9) if name == "loss" else 1.0)
    last = max(steps, default=1) or 1

    def x(step: float) -> float:
        return x0 + _WIDTH * step / last

    def y(value: float) -> float:
        if logarithmic:
            return y0 + _HEIGHT * (1 - math.log(value / low) / math.log(high / low))
        return y0 + _HEIGHT * (1 - (value - low) / (high - low))

    out = [_text(x0, 24, f"{name}{', logarithmic' if logarithmic else ''}", INK, 'font-weight="600"')]
    for value in log_ticks(low, high) if logarithmic else ticks(low, high):
        out.append(_rule(x0, y(value), x0 + _WIDTH, y(value)))
        out.append(_text(x0 - 8, y(value) + 4, f"{value:g}", MUTED, 'text-anchor="end"'))
    for step in ticks(0, last):
        out.append(_text(x(step), y0 + _HEIGHT + 20, f"{step:,g}", MUTED, 'text-anchor="middle"'))
    out.append(_text(x0 + _WIDTH, y0 + _HEIGHT + 36, "steps", MUTED, 'text-anchor="end"'))
    at = x0 + _WIDTH
    for line in reversed(lines):
        out.append(_text(at, 24, line.name, line.colour, 'text-anchor="end"'))
        at -= 7 * len(line.name) + 18
    for line in lines:
        places = [(x(step), y(value)) for step, value in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{_hex(line.colour)}" stroke-width="1.8"/>')
        if line.dots:
            out += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{_hex(line.colour)}"/>' for a, b in places
            ]
    return "".join(out)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    pitch = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    first = math.ceil(low / pitch - 1e-9)
    return [number * pitch for number in range(first, math.floor(high / pitch + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive numbers; over many powers only these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in every if low <= value <= high]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#dcdcd6"/>'


def _text(x: float, y: float, text: str, colour: Colour, more: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{_hex(colour)}" {more}>{html.escape(text)}</text>'
