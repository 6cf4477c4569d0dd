"""A trace as an MP4 clip that steps through the answer and shows the regions that each token selected."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw

from gaze_jax.errors import UserError
from gaze_jax.infer.trace import Trace
from gaze_jax.viewer.answer_sheet import covered, most_looked_at, on_copy, selection, titles_of
from gaze_jax.viewer.contact_sheet import (
    INK,
    MUTED,
    PAPER,
    SELECTED,
    Fonts,
    drawable,
    fitted,
    paste_panel,
    wrapped,
)
from gaze_jax.writing import replacing

FPS = 10
WIDTH = 1280
_MARGIN = 32
_GAP = 16
_AVAILABLE = 640  # maximum height of all pictures together, in pixels, unless each would be smaller than
_SMALLEST = 48
_LABEL = 26  # height of the label under each picture, if there are several
_LINE = 30  # height of a caption line
_LINES = 3
_QUESTION_LINES = 2


def need_av() -> ModuleType:
    """Import PyAV and check that it has an H.264 encoder.

    Raises:
      UserError: PyAV is not installed or has no H.264 encoder.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(
            "Writing an MP4 needs PyAV, which is not installed; run: pip install 'gaze-jax[video]'."
        ) from error
    if "libx264" not in av.codecs_available:
        raise UserError("This PyAV has no H.264 encoder (libx264); run: pip install --force-reinstall av.")
    return av


def write_clip(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    layer: int | None = None,
    views: int = 8,
    seconds: float = 1.0,
    font: Path | None = None,
) -> None:
    """Write a clip: H.264, yuv420p, :data:`FPS` frames per second, :data:`WIDTH` pixels wide.

    Args:
      trace: the trace of a run with selection.
      path: the MP4 to write.
      layer: show the heads of this layer; None shows those of all layers.
      views: maximum number of views and frames to show, those selected most often.
      seconds: how long each token is shown.
      font: a TrueType file for scripts that the built-in font lacks.

    Raises:
      UserError: PyAV is missing, there is no such layer, the run was dense, ``seconds`` is too short, or the
        file cannot be written.
    """
    repeats = check_seconds(seconds)
    av = need_av()
    pages = clip_pages(trace, layer=layer, views=views, font=font)
    first = next(pages)
    with replacing(path, "The clip ") as part, av.open(os.fspath(part), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "20", "tune": "stillimage"})
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        at = 0
        for page in itertools.chain([first], pages):
            frame = av.VideoFrame.from_ndarray(np.asarray(page), format="rgb24").reformat(format="yuv420p")
            for _ in range(repeats):
                frame.pts, frame.time_base, at = at, Fraction(1, FPS), at + 1
                file.mux(stream.encode(frame))
        file.mux(stream.encode())


def check_seconds(seconds: float) -> int:
    """Number of frames per token.

    Raises:
      UserError: ``seconds`` is less than one frame or more than a minute.
    """
    if not 1 / FPS <= seconds <= 60:
        raise UserError(f"seconds={seconds:g} must be between {1 / FPS:g} and 60 for each token.")
    return round(seconds * FPS)


def clip_pages(
    trace: Trace, *, layer: int | None, views: int, font: Path | None = None
) -> Iterator[Image.Image]:
    """Yield an RGB picture per token, all of one size with even sides; arguments as in :func:`write_clip`."""
    selected = selection(trace, layer)
    fraction = selected.astype(np.float32).mean(axis=1)
    shown = most_looked_at(trace.views, selected, views)
    clearest = float(max(fraction[:, view.regions].max() for view in shown))
    titles = [title for view, title in zip(trace.views, titles_of(trace)) if view in shown]
    parts = [covered(trace.picture_of(view).pixels(), on_copy(trace, view)) for view in shown]
    label = _LABEL if len(parts) > 1 else 0
    columns, panel = _arranged([part.shape[:2] for part in parts], label)
    panels = [fitted(part, panel)[0] for part in parts]
    across, down = max(p.width for p in panels) + _GAP, max(p.height for p in panels) + label + _GAP
    fonts = Fonts.load(font)

    heading = [
        line
        for part in trace.question.splitlines()
        for line in wrapped(drawable(part, fonts.heading), WIDTH - 2 * _MARGIN, fonts.heading)
    ][:_QUESTION_LINES]
    captions_top = _MARGIN + _LINE * len(heading) + 8
    top = captions_top + _LINE * _LINES + 34
    height = top + down * -(-len(parts) // columns) - _GAP + _MARGIN
    left = (WIDTH - across * columns + _GAP) // 2
    # A line end in an earlier token breaks the line; one in the current token is shown as an escape.
    earlier = [drawable(token.replace("\n", " "), fonts.heading) for token in trace.tokens]
    current = [drawable(token, fonts.heading) or '""' for token in trace.tokens]
    breaks = ["\n" in token for token in trace.tokens]
    for token in range(len(trace.tokens)):
        page = Image.new("RGB", (WIDTH, height + height % 2), PAPER)
        draw = ImageDraw.Draw(page)
        for row, line in enumerate(heading):
            draw.text((_MARGIN, _MARGIN + _LINE * row + 20), line, INK, fonts.heading, anchor="ls")
        _draw_caption(draw, captions_top, [*earlier[:token], current[token]], breaks, fonts)
        draw.text((_MARGIN, top - 16), _counted(trace, token, layer), MUTED, fonts.body, anchor="ls")
        for number, (picture, view, title) in enumerate(zip(panels, shown, titles, strict=True)):
            row, column = divmod(number, columns)
            at = (left + across * column, top + down * row)
            paste_panel(page, at, picture, fraction[token][view.regions], clearest)
            if label:
                draw.text((at[0], at[1] + picture.height + 18), title, MUTED, fonts.small, anchor="ls")
        yield page


def _arranged(sizes: Sequence[tuple[int, int]], label: int) -> tuple[int, int]:
    """Number of columns that shows pictures of these (height, width) largest, and their longest side.

    The longest side is at least _SMALLEST; the page then grows taller.
    """
    available = WIDTH - 2 * _MARGIN + _GAP
    best = (-math.inf, 0, 1)
    for columns in range(1, min(len(sizes), available // (_SMALLEST + _GAP)) + 1):
        rows = -(-len(sizes) // columns)
        wide, high = available / columns - _GAP, (_AVAILABLE + _GAP) / rows - _GAP - label
        # All pictures have the same longest side.
        panel = min(max(size) * min(wide / size[1], high / size[0]) for size in sizes)
        best = max(best, (panel, -columns, columns))
    return best[2], max(_SMALLEST, int(best[0]))


def _draw_caption(
    draw: ImageDraw.ImageDraw, top: int, texts: Sequence[str], breaks: Sequence[bool], fonts: Fonts
) -> None:
    """Draw the last lines of ``texts`` with the last one marked; ``breaks`` tells which texts end a line."""
    lines: list[list[tuple[str, float, bool]]] = [[]]
    x, available = 0.0, WIDTH - 2 * _MARGIN
    for number, text in enumerate(texts):
        last = number == len(texts) - 1
        length = fonts.heading.getlength(text)
        if lines[-1] and x + length > available:
            lines.append([])
            x = 0.0
        lines[-1].append((text, x, last))
        x += length
        if breaks[number] and not last:
            lines.append([])
            x = 0.0
    for row, line in enumerate(lines[-_LINES:]):
        y = top + _LINE * row
        for text, x, last in line:
            if last:
                # Skip leading space, so that the mark does not cover the letter before the token.
                space = fonts.heading.getlength(text[: len(text) - len(text.lstrip())]) if text.strip() else 0
                edge = _MARGIN + x + fonts.heading.getlength(text)
                draw.rounded_rectangle((_MARGIN + x + space - 2, y - 1, edge + 2, y + 27), 5, SELECTED)
            colour = PAPER if last else INK
            draw.text((_MARGIN + x, y + 20), text, colour, fonts.heading, anchor="ls")


def _counted(trace: Trace, token: int, layer: int | None) -> str:
    """The number of visual keys that one token attended to, as text."""
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    visual, total = float(trace.entries[token, layers, 0].mean()), int(trace.visual_tokens[token])
    where = "mean of all layers" if layer is None else f"layer {layer}"
    fraction = f" ({100 * visual / total:.1f} %)" if total else ""
    return f"{visual:.0f} of {total} visual keys per query{fraction}, {where}"
