"""Prepare a corpus: every record with its media into ArrayRecord shards, checked, in parallel, resumable.

A record's shard is decided by its index, and a shard's bytes by its records, so the result is the same on any
number of processes, however often it was interrupted.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from gaze_jax.corpora import array_records, on_ray
from gaze_jax.corpora.records import Corpus, Record
from gaze_jax.errors import UserError, first_line
from gaze_jax.media.video import FrameSampling
from gaze_jax.writing import file_crc, write_text

WRITER = "group_size:1,uncompressed"
"""Options of every shard: a record is read alone, and its media are compressed already."""
POLICIES = ("error", "skip")
ENGINES = ("local", "ray")

_DONE = ".shards"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was prepared.

    Attributes:
      records: number of records in the shards.
      shards: number of shards.
      skipped: for each record that was left out, its name and why.
    """

    records: int
    shards: int
    skipped: tuple[tuple[str, str], ...]


def prepare(
    corpus: Corpus,
    out: str,
    *,
    shards: int,
    workers: int = 1,
    bad: str = "error",
    engine: str = "local",
    ray_address: str | None = None,
    advance: Callable[[int], None] = lambda records: None,
) -> Prepared:
    """Write a corpus as shards into a folder; what is there already of the same is kept.

    Args:
      corpus: from :func:`gaze_jax.corpora.reading.open_corpus`.
      out: the folder; it may hold an interrupted run of the same.
      shards: number of shards; record i of N is in shard i * shards // N.
      workers: processes that write shards; with "ray" the shards that are written at a time.
      bad: "error": the first record that cannot be read ends the run. "skip": it is left out and listed.
      engine: "local": processes of this machine. "ray": Ray Data, see :mod:`gaze_jax.corpora.on_ray`. The
        bytes are the same, and an interrupted run can go on with the other one.
      ray_address: of the Ray cluster to join, "auto" for that of this machine; None starts Ray here.
      advance: called with the number of records of each shard that is complete.

    Raises:
      UserError: a record is bad, the folder holds something else, or it cannot be written.
    """
    if bad not in POLICIES:
        raise UserError(f"bad={bad!r} must be one of {', '.join(POLICIES)}.")
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", out):
        raise UserError(f"{out} is an address; shards are written to a local folder, which can be copied.")
    if engine not in ENGINES:
        raise UserError(f"engine={engine!r} must be one of {', '.join(ENGINES)}.")
    if ray_address is not None and engine != "ray":
        raise UserError(f"ray_address={ray_address!r} is of a Ray cluster; give engine=ray with it.")
    if not 1 <= shards <= len(corpus):
        raise UserError(f"shards={shards} must be between 1 and {len(corpus)}, the records of the corpus.")
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1.")
    plan = {"source": corpus.fingerprint(), "records": len(corpus), "shards": shards, "bad": bad}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    folder = Path(out)
    # Where media are is no part of what a corpus is, but a run that goes on must find the same ones.
    _claim(folder, hashlib.sha256(f"{digest} {corpus!r}".encode()).hexdigest())
    firsts = [-(-number * len(corpus) // shards) for number in range(shards + 1)]
    todo = [number for number in range(shards) if not _is_done(folder, number, shards)]
    advance(sum(firsts[number + 1] - firsts[number] for number in range(shards) if number not in todo))
    write = functools.partial(_write_numbered, corpus, str(folder), firsts, bad)
    if engine == "ray" and todo:
        notes = str(folder / _DONE)
        running = on_ray.written(write, todo, notes, workers=workers, address=ray_address)
    else:
        running = _written(write, todo, workers)
    with contextlib.closing(running) as written:
        for number in written:
            advance(firsts[number + 1] - firsts[number])
    done: list[dict[str, Any]] = [
        json.loads(_note(folder, number).read_text(encoding="utf-8")) for number in range(shards)
    ]
    skipped = [tuple(one) for shard in done for one in shard.pop("skipped")]
    records = sum(shard["records"] for shard in done)
    if records == 0:
        raise UserError(f"No record of the corpus could be read; the first: {skipped[0][1]}")
    listing = {
        "format": array_records.FORMAT,
        "version": array_records.VERSION,
        "digest": digest,
        **plan,
        "shards": done,
        "skipped": skipped,
    }
    write_text(folder / array_records.FILE, json.dumps(listing, indent=1, ensure_ascii=False) + "\n")
    _sweep(folder)
    for number in range(shards):
        _note(folder, number).unlink(missing_ok=True)
    (folder / _DONE / "digest").unlink(missing_ok=True)
    (folder / _DONE).rmdir()
    return Prepared(records, shards, tuple((str(name), str(why)) for name, why in skipped))


def _claim(folder: Path, digest: str) -> None:
    """Make the folder, or check that it holds an interrupted run with the same digest."""
    mark = folder / _DONE / "digest"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in folder.iterdir())
        if array_records.FILE in present:
            raise UserError(f"{folder} holds a prepared corpus already; give another folder, or remove it.")
        if mark.is_file():
            if mark.read_text(encoding="utf-8") != digest:
                raise UserError(
                    f"{folder} holds an interrupted run of another corpus, or with other options; give "
                    "another folder, or remove it."
                )
            _sweep(folder)
        elif present:
            raise UserError(f"{folder} is not empty (it has {present[0]!r}); give a new folder.")
        else:
            mark.parent.mkdir()
            write_text(mark, digest)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}).") from error


def shard_name(number: int, shards: int) -> str:
    """The file of a shard."""
    return f"corpus-{number:05}-of-{shards:05}{array_records.SUFFIX}"


def _note(folder: Path, number: int) -> Path:
    """Where a complete shard is described until all are."""
    return folder / _DONE / f"{number}.json"


def _is_done(folder: Path, number: int, shards: int) -> bool:
    """Whether a shard was completed and is still what it was."""
    note, path = _note(folder, number), folder / shard_name(number, shards)
    if not note.is_file() or not path.is_file():
        return False
    return bool(file_crc(path) == json.loads(note.read_text(encoding="utf-8"))["crc32"])


def _sweep(folder: Path) -> None:
    """Remove what processes that died have left."""
    for path in folder.glob("*.part"):
        path.unlink(missing_ok=True)
    on_ray.forget(folder / _DONE)


def _written(write: Callable[[int], None], todo: list[int], workers: int) -> Generator[int]:
    """Write shards in processes of this machine; yields the number of each when it is complete."""
    if workers == 1 or len(todo) < 2:
        for number in todo:
            write(number)
            yield number
        return
    # Not a fork: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        futures = {pool.submit(write, number): number for number in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(on_ray.DIED) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_numbered(corpus: Corpus, folder: str, firsts: list[int], bad: str, number: int) -> None:
    """Write the shard of a number."""
    _write_shard(corpus, folder, number, len(firsts) - 1, firsts[number], firsts[number + 1], bad)


def _write_shard(
    corpus: Corpus, folder: str, number: int, shards: int, first: int, stop: int, bad: str
) -> None:
    """Write one shard beside its place, check it, move it there and describe it."""
    place = Path(folder, shard_name(number, shards))
    # Of this process alone: Ray may begin a shard again while a machine that it lost still writes it.
    part = place.with_suffix(f".{uuid.uuid4().hex[:12]}.part")
    skipped: list[tuple[str, str]] = []
    records = 0
    try:
        writer = ArrayRecordWriter(str(part), WRITER)
        try:
            for index in range(first, stop):
                try:
                    record = _fetched(corpus[index])
                    check_media(record)
                    data = array_records.packed(record)
                except UserError as error:
                    if bad == "error":
                        raise
                    skipped.append((f"record {index}", str(error)))
                    continue
                writer.write(data)
                records += 1
        finally:
            writer.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if records and array_records.count(str(part)) != records:
            raise UserError(f"{place} was not written as a whole; is the disk full?")
        part.replace(place)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{place} cannot be written ({first_line(error)}).") from error
    finally:
        part.unlink(missing_ok=True)
    note = {"file": place.name, "records": records, "size": place.stat().st_size, "crc32": file_crc(place)}
    write_text(_note(Path(folder), number), json.dumps(note | {"skipped": skipped}))


def _fetched(record: Record) -> Record:
    """A record with its remote media in memory, for they are read twice: to be checked and to be written."""
    try:
        images = tuple(medium.fetched() for medium in record.images)
        videos = tuple(medium.fetched() for medium in record.videos)
    except UserError as error:
        raise UserError(f"{record.name}: {error}") from error
    return dataclasses.replace(record, images=images, videos=videos)


def check_media(record: Record) -> None:
    """Decode every image and open every video of a record.

    Raises:
      UserError: one is damaged, missing, or of a format that is not read. Names the record.
    """
    try:
        for medium in record.images:
            medium.check()
        for medium in record.videos:
            medium.video(record.cut.of(FrameSampling(max_frames=1)))
    except UserError as error:
        raise UserError(f"{record.name}: {error}") from error
