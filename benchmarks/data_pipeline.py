"""How fast the data pipeline is, what memory it takes, and whether a training step waits for it.

python -m benchmarks.data_pipeline --json=benchmarks/results/data_pipeline.json

The pipeline is what a run trains on: records, read, decoded, processed, padded and stacked to batches of
numpy arrays. It is compared with loops that decode and resize the same files with the same libraries, and
with torch's DataLoader. Comparisons alternate; a ratio is the median of the rounds'. Files are in the page
cache. Nothing else may run: the workers and the process that takes their batches need the cores.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import data_files, data_rivals, timing
from gaze_jax.media.video import sample_indices
from gaze_jax.train.corpus import CorpusBatches, TrainingCorpus

SIDE, BATCH = 384, 8
SKIP = 3
"""Batches before a comparison of one core is timed; the first ones fill caches and queues."""
FLAT_MB = 1.0
"""Most growth of memory per 10,000 samples."""
STEP_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      images, videos: files.
      rounds: of a comparison.
      batches: timed in each round of the comparison with torch.
      samples: that pass while memory is measured.
      steps: of the loop that stands for training.
    """

    images: int = 200
    videos: int = 8
    rounds: int = 5
    batches: int = 40
    samples: int = 50_000
    steps: int = 100


QUICK = Sizes(images=24, videos=2, rounds=2, batches=4, samples=300, steps=8)


def row(name: str, value: float, measure: str, target: float, *, least: bool = True) -> dict[str, Any]:
    """One result; its target is one of the ratio, if it has one, and the least or the most that it may be."""
    return {
        "name": name,
        "value": value,
        "unit": measure,
        "baseline": None,
        "ratio": None,
        "target": target,
        "least": least,
    }


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """The result, and whether it meets its target."""
    found = result["value"] if result["ratio"] is None else result["ratio"]
    met = found >= result["target"] if result.pop("least") else found <= result["target"]
    return result | {"met": bool(met)}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Context in which this thread, and what it starts, has one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def paired(
    name: str, of: str, target: float, rounds: int, mine: Callable[[], float], other: Callable[[], float]
) -> dict[str, Any]:
    """The result of two functions that return a rate, called in turn."""
    pairs = []
    for number in range(rounds):
        first, second = (mine, other) if number % 2 else (other, mine)
        rates = first(), second()
        pairs.append(rates if number % 2 else rates[::-1])
    ratios = [a / b for a, b in pairs]
    found = row(name, statistics.median(a for a, _ in pairs), f"{of}/s", target)
    found |= {"baseline": statistics.median(b for _, b in pairs), "ratio": statistics.median(ratios)}
    return judged(found) | {"ratios": ratios}


def epoch_rate(training: TrainingCorpus, count: int) -> float:
    """``count`` per second of one epoch without workers, after some batches."""
    epoch = training.order.epoch_batches
    first = max(0, epoch - SKIP)
    with contextlib.closing(CorpusBatches(training, first=first, num_workers=0)) as batches:
        for _ in range(epoch - first):
            next(batches)
        start = time.perf_counter()
        for _ in range(epoch):
            next(batches)
        return count / (time.perf_counter() - start)


def timed(count: int, work: Callable[[], None]) -> float:
    """``count`` per second of ``work``."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def images(path: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Samples of one image each, packed and one per row, on one core."""
    files = [path.parent / f"{number}.jpg" for number in range(sizes.images)]
    rows = []
    for pack in (True, False):
        training = data_files.opened(path, pack=pack, batch_size=BATCH)
        with one_core():
            rows.append(
                paired(
                    f"images, {'packed' if pack else 'padded'}, one core, against a bare loop",
                    "samples",
                    0.85,
                    sizes.rounds,
                    lambda training=training: epoch_rate(training, len(files)),  # type: ignore[misc]
                    lambda: timed(len(files), lambda: data_rivals.read_images(files, SIDE)),
                )
            )
    return rows


def videos(path: Path, sizes: Sizes) -> dict[str, Any]:
    """Samples of one video each, on one core."""
    taken, frames = 32, 96
    training = data_files.opened(path, pack=False, batch_size=2, max_frames=taken)
    wanted = sample_indices(frames, 25.0, training.conversations.sampling).tolist()
    files = [path.parent / f"{number}.mp4" for number in range(sizes.videos)]
    count = taken * len(files)
    with one_core():
        return paired(
            "videos, one core, against a bare loop",
            "frames",
            0.9,
            sizes.rounds,
            lambda: epoch_rate(training, count),
            lambda: timed(count, lambda: data_rivals.read_frames(files, wanted, SIDE)),
        )


def rate_of(batches: Any, skip: int, count: int) -> float:
    """Samples per second of ``count`` batches after ``skip``, which were made ahead."""
    time.sleep(1)  # the queues fill, so that what the other one's workers do ahead is over
    for _ in range(skip):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def loaders(path: Path, sizes: Sizes) -> dict[str, Any]:
    """Two workers of the pipeline, and two of torch's DataLoader."""
    training = data_files.opened(path, pack=False, batch_size=BATCH)
    conversations = training.conversations
    system = conversations.system
    data = data_rivals.Files(
        path.parent,
        tuple(path.read_text(encoding="utf-8").splitlines()),
        conversations.template,
        () if system is None else ({"role": "system", "content": system},),
        conversations.tokenizer.json,
        SIDE,
    )
    theirs = data_rivals.torch_batches(data, BATCH, 2)
    skip = 16  # more than either makes ahead
    with contextlib.closing(CorpusBatches(training, first=0, num_workers=2)) as mine:
        for each in (mine, theirs):
            rate_of(each, skip, 1)
        return paired(
            "images, two workers, against torch's DataLoader",
            "samples",
            1.0,
            sizes.rounds,
            lambda: rate_of(mine, skip, sizes.batches),
            lambda: rate_of(theirs, skip, sizes.batches),
        )


def resident() -> float:
    """MB that this process and its children have in memory; pages that they share count for each."""
    found, total = [os.getpid()], 0
    while found:
        pid = found.pop()
        with contextlib.suppress(OSError):  # a process that has ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total / 1024


def memory(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Growth of memory while samples pass: small images, two workers, every file many times."""
    records = min(5000, sizes.samples)
    path = data_files.write_images(folder, min(500, records), (64, 64), records=records)
    training = data_files.opened(path, image_size=96, pack=False, batch_size=50)
    every, table = max(50, sizes.samples // 10), []
    with contextlib.closing(CorpusBatches(training, first=0, num_workers=2)) as batches:
        for passed in range(50, sizes.samples + 1, 50):
            next(batches)
            if not passed % every:
                table.append((passed, resident()))
                print(f"  {passed:7,} samples: {table[-1][1]:8.1f} MB", flush=True)
    late = [entry for entry in table if entry[0] >= min(10_000, sizes.samples // 2)]
    slope = statistics.linear_regression(*zip(*late)).slope * 10_000
    found = row("memory, two workers, after 10,000 samples", slope, "MB/10,000", FLAT_MB, least=False)
    return judged(found) | {"resident_mb": table}


def waiting(path: Path, sizes: Sizes) -> dict[str, Any]:
    """The part of a training loop's time in which it waits for a batch; two workers."""
    training = data_files.opened(path, pack=False, batch_size=BATCH)
    with contextlib.closing(CorpusBatches(training, first=0, num_workers=2)) as batches:
        waited = 0.0
        for step in range(5 + sizes.steps):
            if step == 5:
                begun, waited = time.perf_counter(), 0.0
            start = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - start
            time.sleep(STEP_SECONDS)
        part = 100 * waited / (time.perf_counter() - begun)
    return judged(row(f"waiting, steps of {STEP_SECONDS * 1e3:.0f} ms", part, "% of time", 2.0, least=False))


def processor_name() -> str:
    """The CPU's name, and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def show(result: dict[str, Any]) -> None:
    def number(value: float | None) -> str:
        return f"{'-':>9}" if value is None else f"{value:9.2f}"

    figures = " ".join(number(result[key]) for key in ("value", "baseline", "ratio", "target"))
    met = "met" if result["met"] else "MISSED"
    print(f"{result['name']:58} {figures} {met:7} {result['unit']}", flush=True)


def measure(folder: Path, sizes: Sizes, only: list[str]) -> list[dict[str, Any]]:
    """All results, printed as they are found."""
    path = data_files.write_images(folder / "images", sizes.images, (384, 640))
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "images": lambda: images(path, sizes),
        "torch": lambda: [loaders(path, sizes)],
        "videos": lambda: [
            videos(data_files.write_videos(folder / "videos", sizes.videos, 96, (640, 480)), sizes)
        ],
        "memory": lambda: [memory(folder / "small", sizes)],
        "waiting": lambda: [waiting(path, sizes)],
    }
    rows = []
    print(f"{'':58} {'value':>9} {'baseline':>9} {'ratio':>9} {'target':>9}")
    for name in only:
        for found in parts[name]():
            show(found)
            rows.append(found)
    return rows


PARTS = ("images", "torch", "videos", "memory", "waiting")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few files and rounds: a trial of the script")
    parser.add_argument("--samples", type=int, help="samples that pass while memory is measured")
    parser.add_argument("--only", type=timing.listed(PARTS), default=list(PARTS), help="some of the parts")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else Sizes()
    if args.samples:
        sizes = dataclasses.replace(sizes, samples=args.samples)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        rows = measure(Path(folder), sizes, args.only)
    result = timing.report("benchmarks.data_pipeline", argv, rows)
    names = ("grain", "pillow", "av", "tokenizers", "torch")
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result["versions"][name] = metadata.version(name)
    result |= {"cpu": processor_name(), "load_before": before}
    for key in ("date", "cpu", "load_before", "versions", "command"):
        print(f"{key}: {result[key]}")
    timing.write(args.json, result)


if __name__ == "__main__":
    main()
