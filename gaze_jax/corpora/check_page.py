"""The report of a check as files: JSON with everything, a page, a picture of histograms."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gaze_jax.corpora.check import MEANINGS, QUANTITIES, Histogram, Report, left_out_line
from gaze_jax.corpora.pages import filled_page
from gaze_jax.errors import UserError
from gaze_jax.writing import replacing, write_text

FORMAT, VERSION = "gaze-jax check", 1
FILES = ("check.json", "check.html", "check.png")

_ROWS = 500
"""Most problems of a cause in a page."""
_WIDTH, _HEIGHT, _LEFT, _BASE, _TOP = 320, 150, 40, 124, 10
"""Of a chart in a page: its size, the left and the lower edge of its bars, and their highest top."""


def require_matplotlib() -> None:
    """Check that :func:`write_report` can draw; call this before a long check.

    Raises:
      UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("check.png needs matplotlib; install it with pip install 'gaze-jax[data]'.")


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write ``check.json``, ``check.html`` and, last, ``check.png`` into a folder, which is made.

    Raises:
      UserError: a file cannot be written, or matplotlib is not installed.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place} cannot be made ({error.strerror}).") from error
    write_text(place / "check.json", json.dumps(report_json(report), indent=1, ensure_ascii=False) + "\n")
    write_text(place / "check.html", report_page(report))
    require_matplotlib()
    _plot(report, place / "check.png")


def report_json(report: Report) -> dict[str, Any]:
    """Everything that a report holds, JSON-ready."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "ok": report.ok,
        "records": report.records,
        "usable": report.usable,
        "skipped": report.skipped,
        "shortened": report.shortened,
        "turns": report.turns,
        "targets": report.targets,
        "causes": report.causes,
        "problems": [vars(problem) for problem in report.problems],
        "histograms": {name: vars(found) for name, found in report.histograms.items()},
    }


def report_page(report: Report) -> str:
    """A page in one file: how many records can be trained on, what is wrong, how long samples are."""
    shown = [
        problem
        for cause in report.causes
        for problem in [problem for problem in report.problems if problem.cause == cause][:_ROWS]
    ]
    shown.sort(key=lambda problem: problem.index)
    return filled_page(
        "check",
        title=f"{report.usable:,} of {report.records:,} records can be trained on",
        ok=report.ok,
        verdict=_verdict(report),
        left_out=left_out_line(report),
        causes=[
            {"name": cause, "count": f"{count:,}", "meaning": MEANINGS[cause]}
            for cause, count in report.causes.items()
        ],
        total=len(report.problems),
        most=_ROWS,
        problems=shown,
        about=f"Records whose media are fine, with {report.targets:,} tokens to learn in those that can be "
        "trained on. Those that are too long are included.",
        charts=[_chart(QUANTITIES[name], found) for name, found in report.histograms.items()],
    )


def _verdict(report: Report) -> str:
    """What the title does not tell, if nothing is wrong with a record."""
    if report.problems:
        return ""
    return "Nothing is wrong." if report.ok else "There is nothing to train on."


def _numbers(found: Histogram) -> str:
    """A histogram's numbers, in a line."""
    parts = {"least": found.smallest, "median": found.median, "95%": found.p95, "most": found.largest}
    return " · ".join(f"{name} {_short(value)}" for name, value in parts.items())


def _short(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.{digits}g}"


def _of_numbers(found: Histogram) -> bool:
    """Whether every bar is of one whole number, under whose middle it is written."""
    return bool(np.all(np.diff(found.edges) == 1))


def _chart(title: str, found: Histogram) -> dict[str, Any]:
    """A histogram as shapes of a drawing."""
    count, most = len(found.counts), max(found.counts)
    top = _round_up(most)
    step = (_WIDTH - _LEFT) / count
    edges = list(map(_short, found.edges))

    def y(value: float) -> float:
        return round(_BASE - (_BASE - _TOP) * value / top, 2)

    bars = [
        {
            "x": round(_LEFT + number * step + 0.5, 2),
            "y": y(value),
            "width": round(max(step - 1, 0.5), 2),
            "height": round(_BASE - y(value), 2),
            "text": f"{edges[number]}: {value:,}"
            if _of_numbers(found)
            else f"{edges[number]} to below {edges[number + 1]}: {value:,}",
        }
        for number, value in enumerate(found.counts)
    ]
    every, middle = -(-count // 5), step / 2 if _of_numbers(found) else 0
    return {
        "title": title[0].upper() + title[1:] + (" (log)" if found.log else ""),
        "numbers": _numbers(found),
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "base": _BASE,
        "bars": bars,
        "lines": [
            {"y": y(value), "text": _short(value)} for value in (0, top / 2, top) if value == int(value)
        ],
        "ticks": [
            {"x": round(_LEFT + number * step + middle, 2), "text": _short(found.edges[number], 2)}
            for number in range(0, count, every)
        ],
    }


def _round_up(most: int) -> int:
    """The end of an axis for counts up to ``most``, with an even first digit or two."""
    power = 10 ** max(0, len(str(most)) - 1)
    return next(int(factor * power) for factor in (1, 2, 4, 6, 8, 10) if factor * power >= most)


def _plot(report: Report, path: Path) -> None:
    """Draw the histograms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    found: Mapping[str, Histogram] = report.histograms
    columns = 2 if len(found) < 5 else 3
    rows = max(1, -(-len(found) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 2.9 * rows + 0.5), layout="constrained", squeeze=False
    )
    figure.suptitle(
        f"{report.usable:,} of {report.records:,} records can be trained on",
        fontsize=14,
        color="#1d6b3a" if report.ok else "#a8321a",
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, one) in zip(axes.flat, found.items()):
        shift = 0.5 if _of_numbers(one) else 0
        axis.stairs(one.counts, np.asarray(one.edges) - shift, fill=True, color="#2f86b7")
        axis.axvline(one.median, color="#212328", linewidth=1)
        axis.set_title(f"median {_short(one.median)}, 95% {_short(one.p95)}, most {_short(one.largest)}")
        axis.title.set_fontsize(9)
        axis.set_xlabel(QUANTITIES[name])
        axis.set_ylabel("number")
        if one.log:
            axis.set_xscale("log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=one.edges[-1] > 5))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axis.margins(x=0.01)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
