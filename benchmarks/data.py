"""How fast corpora are read: finding the records of a large JSON file, and then reading them in any order.

python -m benchmarks.data --json=benchmarks/results/data.json

Writes files of made-up records in LLaVA's form, opens each twice (the first time makes its index, the second
finds it), and reads records at random. One core; the files are in the page cache.
"""

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gaze_jax.corpora.json_files import JsonRecords, open_json

READS = 5000


def records() -> Iterator[str]:
    """Endless records of unequal length, as JSON."""
    number = 0
    while True:
        answer = "A long answer. " * (number * 7 % 40 + 10)
        turns = [
            {"from": "human", "value": '<image>\nWhat is [shown] in "this" picture?'},
            {"from": "gpt", "value": answer},
        ]
        image = f"coco/train2017/{number:012d}.jpg"
        yield json.dumps({"id": f"{number:09d}", "image": image, "conversations": turns})
        number += 1


def write(path: Path, size: int, *, listed: bool) -> None:
    """Write at least ``size`` bytes of records, one per line or as one list."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if listed else "")
        source, first = records(), True
        while file.tell() < size:
            block = [next(source) for _ in range(1000)]
            file.write(("" if first or not listed else ",\n") + (",\n" if listed else "\n").join(block))
            file.write("" if listed else "\n")
            first = False
        file.write("]" if listed else "")


def opened(path: Path) -> tuple[JsonRecords, float]:
    """A file's records, and the seconds until their number is known."""
    start = time.perf_counter()
    found = open_json(str(path))
    len(found)
    return found, time.perf_counter() - start


def measure(folder: Path, size: int) -> list[dict[str, Any]]:
    """One row per kind of file."""
    rows = []
    for name, listed in (("JSON Lines", False), ("JSON list", True)):
        path = folder / ("all.json" if listed else "all.jsonl")
        write(path, size, listed=listed)
        _, first = opened(path)
        found, second = opened(path)
        order = np.random.default_rng(0).integers(len(found), size=READS)
        start = time.perf_counter()
        for index in order:
            found.fields(int(index))
        rate = READS / (time.perf_counter() - start)
        row = {"file": name, "gigabytes": path.stat().st_size / 1e9, "records": len(found)}
        rows.append(row | {"first_s": first, "second_s": second, "records_per_s": rate})
        path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each file")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        rows = measure(Path(folder), int(args.gigabytes * 1e9))
    print(f"{'':10} {'GB':>5} {'records':>9} {'first':>8} {'second':>8} {'records/s':>10}")
    for row in rows:
        print(
            f"{row['file']:10} {row['gigabytes']:5.2f} {row['records']:9,} {row['first_s']:6.2f} s "
            f"{row['second_s']:6.2f} s {row['records_per_s']:10,.0f}"
        )
    if args.json:
        result = {"date": datetime.date.today().isoformat(), "reads": READS, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
