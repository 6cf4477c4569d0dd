"""Train every arm of a config with several seeds, collect the results, and plot them.

python -m benchmarks.digits --config=configs/digits.py --workdir=runs/arms --seeds=3
    writes benchmarks/results/digits.json and docs/images/digits.png (the plot needs the dev extra).

Finished runs are not repeated and interrupted runs are resumed, so the command can be run again.
"""

import datetime
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import app, flags

from gaze_jax.parallel.mesh import describe_devices
from gaze_jax.train.config import ARMS

# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom: 95 % intervals of a mean over few seeds.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

_ROOT = Path(__file__).resolve().parent.parent
_CONFIG = flags.DEFINE_string("config", "configs/digits.py", "The config to train.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/arms", "Gets a folder per arm and seed.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ... of every arm.", lower_bound=2, upper_bound=10)
_ARMS = flags.DEFINE_list("arms", list(ARMS), "Which arms.")
_RESULT = flags.DEFINE_string("result", "benchmarks/results/digits.json", "The JSON file.")
_PLOT = flags.DEFINE_string("plot", "docs/images/digits.png", "The plot file; empty: no plot.")


def train(arm: str, seed: int) -> dict[str, Any]:
    """Run ``train.py`` once: its evaluation, duration in seconds and number of processor cores."""
    workdir = _ROOT / _WORKDIR.value / f"{arm}-{seed}"
    report, clock = workdir / "eval.json", workdir / "clock.json"
    if not report.exists():
        command = [sys.executable, "train.py", f"--config={_CONFIG.value}", f"--workdir={workdir}"]
        begun = datetime.datetime.now()
        subprocess.run([*command, f"--config.arm={arm}", f"--config.seed={seed}"], cwd=_ROOT, check=True)
        seconds = (datetime.datetime.now() - begun).total_seconds()
        clock.write_text(json.dumps({"seconds": seconds, "cores": len(os.sched_getaffinity(0))}))
    return json.loads(report.read_text()) | json.loads(clock.read_text())


def summary(values: Iterable[float], highest: float = 1.0) -> dict[str, Any]:
    """Mean over seeds and its 95 % interval by Student's t, clipped to [0, ``highest``]."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = _T[len(values) - 2] * deviation / math.sqrt(len(values))
    return {"mean": mean, "ci": [max(mean - half, 0.0), min(mean + half, highest)], "seeds": values}


def gather(reports: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Aggregate the results of every arm over seeds."""
    arms = {}
    for arm, runs in reports.items():
        ways = [way for way in ("gaze", "dense", "random_routing") if way in runs[0]]
        arms[arm] = {name: [run[name] for run in runs] for name in ("seconds", "cores")}
        for way in ways:
            section = runs[0][way]
            numbers = {
                family: summary(run[way][family]["acc"] for run in runs)
                for family, value in section.items()
                if isinstance(value, dict) and "acc" in value
            }
            numbers["entries"] = summary((run[way]["entries"] for run in runs), math.inf)
            if "routing" in section:
                numbers["routing"] = summary(run[way]["routing"]["best"] for run in runs)
                numbers["random_routing_share"] = section["routing"]["random"]
            arms[arm][way] = numbers
    return arms


def plot(arms: dict[str, Any], path: Path) -> None:
    """Plot the accuracy of each arm with its own attention: mean over seeds, interval, and each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "gaze": "Gaze",
        "dense_context": "dense, context tokens",
        "dense": "dense",
        "sparse_start": "Gaze, sparse from step 1",
    }
    bars = [(names[arm], arms[arm].get("gaze", arms[arm]["dense"])) for arm in names if arm in arms]
    if "gaze" in arms:
        bars.append(("Gaze weights, random regions", arms["gaze"]["random_routing"]))
    families = [name for name, value in bars[0][1].items() if name in ("transcribe", "read", "where")]
    figure, axes = plt.subplots(
        1,
        len(families),
        figsize=(4.2 * len(families) + 2.4, 0.5 * len(bars) + 1.3),
        sharey=True,
        squeeze=False,
    )
    for axis, family in zip(axes[0], families, strict=True):
        for place, (_, numbers) in enumerate(bars):
            found = numbers[family]
            low, high = found["ci"]
            axis.plot([low, high], [place, place], color="0.6", lw=2, zorder=1)
            axis.scatter(found["seeds"], [place] * len(found["seeds"]), s=14, color="#0085ca", zorder=2)
            axis.plot([found["mean"]] * 2, [place - 0.25, place + 0.25], color="black", lw=1.5, zorder=3)
        axis.set_title(family)
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("accuracy, free-running")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [f"{label} ({numbers['entries']['mean']:.0f} visual keys)" for label, numbers in bars]
    axes[0, 0].set_yticks(range(len(bars)), labels)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    del argv
    reports = {arm: [train(arm, seed) for seed in range(_SEEDS.value)] for arm in _ARMS.value}
    arms = gather(reports)
    command = shlex.join(["python", "-m", "benchmarks.digits", *sys.argv[1:]])
    result = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": describe_devices(),
        "config": _CONFIG.value,
        "samples_per_family": next(iter(reports.values()))[0]["dense"]["transcribe"]["samples"],
        "arms": arms,
    }
    path = _ROOT / _RESULT.value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    for arm, sections in arms.items():
        for way, numbers in sections.items():
            if way not in ("seconds", "cores"):
                found = {k: v for k, v in numbers.items() if isinstance(v, dict)}
                cells = (
                    f"{k} {v['mean']:.3f} [{v['ci'][0]:.3f}, {v['ci'][1]:.3f}]" for k, v in found.items()
                )
                print(f"{arm:14} {way:15} {'  '.join(cells)}")
    if _PLOT.value:
        plot(arms, _ROOT / _PLOT.value)


if __name__ == "__main__":
    app.run(main)
