"""The plan of an epoch: which samples share which static row of a batch, computed once from their lengths.

A plan is a pure function of its arguments. Processes and workers read rows of it by number, so how many
there are changes nothing. Lengths of a sample are its text tokens, regions, images of the tower, and slots.

**Packed.** Entries are shuffled and taken in windows, so a row holds samples from all over the corpus. A
window opens as many empty rows as its fullest budget needs. It places its samples, largest first, each where
the least free budget of the row stays largest, so that rows fill up in all three budgets at once; best fit,
which completes rows one by one, runs out of the small samples that would even them out. What fits nowhere
goes to the next window.

**Padded.** One sample per row, in few shapes, because each shape is a compilation.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np

from gaze_jax.data.pipeline import Bucket
from gaze_jax.errors import UserError

Ints = np.ndarray
"""An array of int64."""

Budgets = tuple[int, int, int]
"""Text, regions and images of a row."""

IMAGE_TOKENS = 64
"""What an image costs, in tokens of the decoder: several hundred in a tower of a tenth of its size."""

_TEXT_MULTIPLE = 16
_WINDOW = 4096
_TRIAL = 2 * _WINDOW
_CELLS = 256
# Fixed point of the budgets while packing: every budget is about this many, so that they compare.
_ONE = 1 << 40
_NEVER = 1 << 60
# Rows in quarters of the smallest in the corpus's ratio that holds the longest sample, tried in this order.
_SCALES = (4, 5, 6, 8, 12, 16, 24, 32)
_GOAL_PERCENT = 95


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of a row, where they are given; None: chosen from the lengths.

    With one bucket a limit is the size of every row. With several, it bounds the sizes of each.

    Attributes:
      text, regions, images: S, R and the number of images.

    Raises:
      ValueError: a limit is negative.
    """

    text: int | None = None
    regions: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        for name, limit in dataclasses.asdict(self).items():
            if limit is not None and limit < 0:
                raise ValueError(f"limits.{name}={limit} must not be negative.")


@dataclasses.dataclass(frozen=True)
class Fill:
    """How well the rows of a bucket are filled.

    Attributes:
      rows, samples: how many there are.
      text, regions, images: used part of the budget over all rows, 0 to 1; 0 for a budget of 0.
    """

    rows: int
    samples: int
    text: float
    regions: float
    images: float

    @property
    def binding(self) -> float:
        """The used part of the budget that is used most, which keeps the rows from being fewer."""
        return max(self.text, self.regions, self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """Which samples each row holds. The arrays are read-only; rows are in random order.

    Attributes:
      buckets: static sizes of the rows; each has a row.
      samples: int64 [n]; positions in ``lengths`` of the samples, row after row.
      starts: int64 [rows + 1]; row i holds ``samples[starts[i]:starts[i + 1]]``, at least one.
      bucket: int32 [rows]; position in ``buckets``.
    """

    buckets: tuple[Bucket, ...]
    samples: np.ndarray
    starts: np.ndarray
    bucket: np.ndarray

    def __post_init__(self) -> None:
        for array in (self.samples, self.starts, self.bucket):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.bucket)

    def row(self, index: int) -> np.ndarray:
        """int64 [samples]: what a row holds.

        Raises:
          IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of a plan of {len(self)} rows.")
        return self.samples[self.starts[index] : self.starts[index + 1]]

    def digest(self) -> str:
        """SHA-256 of the buckets and the arrays, the same on every machine."""
        found = hashlib.sha256()
        shapes = [dataclasses.asdict(bucket) for bucket in self.buckets]
        sizes = [len(self.samples), len(self.starts), len(self.bucket)]
        found.update(json.dumps([shapes, sizes], sort_keys=True).encode())
        for array in (self.samples, self.starts, self.bucket):
            found.update(array.astype("<i8").tobytes())
        return found.hexdigest()

    def fill(self, lengths: np.ndarray) -> tuple[Fill, ...]:
        """How well each bucket is filled.

        Args:
          lengths: int [N, 4], as they were planned.
        """
        of_sample = np.repeat(self.bucket, np.diff(self.starts))
        found = []
        for index, bucket in enumerate(self.buckets):
            rows = int((self.bucket == index).sum())
            held = self.samples[of_sample == index]
            used = lengths[held, :3].sum(axis=0, dtype=np.int64).tolist()
            allocated = (rows * bucket.text, rows * bucket.regions, rows * bucket.images)
            found.append(Fill(rows, len(held), *(u / a if a else 0.0 for u, a in zip(used, allocated))))
        return tuple(found)


def make_plan(
    lengths: np.ndarray, entries: np.ndarray, *, pack: bool, limits: Limits, buckets: int, seed: int
) -> RowPlan:
    """Place every entry in a row, once.

    ``pack=False``: one sample per row, in at most ``buckets`` shapes that minimise the cost of all rows. A
    row costs ``text + regions * slots + IMAGE_TOKENS * images`` of its shape. The shapes are cut from the
    sorted lengths by dynamic programming.

    ``pack=True``: samples of several slots get up to ``buckets`` row shapes, so that regions of few slots are
    not padded to many. Samples of one size of slots have one row shape, however long they are: rows of
    several shapes are filled less well than rows in which short samples even out long ones. Budgets that
    are not given are in the ratio of the mean lengths and found by packing a part of the samples on trial:
    the shortest rows of which 0.95 are used. One very long sample makes all rows long; limits prevent it.

    In both, a shape is left out if it would save less than 1%.

    Args:
      lengths: int32 or int64 [N, 4]; text, regions, images and slots of each sample. Regions and images may
        be 0.
      entries: int64 [M]; positions in ``lengths`` of the samples to place. One may be there many times.
      pack: whether samples share rows.
      limits: sizes of a row.
      buckets: the most row shapes.
      seed: seed of the order.

    Returns:
      The plan. Its text budgets are multiples of 16 where they are not given.

    Raises:
      UserError: samples are longer than a limit.
      ValueError: an argument has another shape, type or range.
    """
    entries = _check(lengths, entries, buckets)
    _check_limits(lengths, entries, limits)
    first, second = np.random.SeedSequence(seed).spawn(2)
    entries = entries[_shuffled(len(entries), first)]
    sizes = lengths[entries].astype(np.int64)
    classes = _classes(sizes, buckets, pack=pack)
    row_of = np.zeros(len(entries), np.int64)
    shapes: list[Bucket] = []
    rows: list[int] = []
    for each in range(int(classes.max()) + 1):
        members = np.flatnonzero(classes == each)
        held = sizes[members]
        budgets = _budgets(held, limits, pack=pack, alone=buckets == 1)
        placed = _pack(held, budgets) if pack else np.arange(len(members))
        # A row can be empty only beside samples that have no length at all.
        used = np.unique(placed)
        row_of[members] = np.searchsorted(used, placed) + sum(rows)
        rows.append(len(used))
        text, regions, images = budgets
        shapes.append(Bucket(regions, text, images, max(1, int(held[:, 3].max()))))
    # The first rows of a window hold its largest samples; a batch should not.
    order = _shuffled(sum(rows), second)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row_of = rank[row_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)
    bucket = np.repeat(np.arange(len(shapes)), rows)[order].astype(np.int32)
    return RowPlan(tuple(shapes), entries[np.argsort(row_of, kind="stable")], starts, bucket)


def batches(plan: RowPlan, batch_size: int) -> np.ndarray:
    """Rows in batches of one bucket each, bucket after bucket.

    Args:
      plan: the plan.
      batch_size: rows of a batch.

    Returns:
      int64 [batches, batch_size]: numbers of rows, each once. The last batch of a bucket is filled up with
      -1, an empty row.

    Raises:
      ValueError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive.")
    found = []
    for index in range(len(plan.buckets)):
        rows = np.flatnonzero(plan.bucket == index).astype(np.int64)
        padded = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1)
        found.append(padded.reshape(-1, batch_size))
    return np.concatenate(found)


def _check(lengths: np.ndarray, entries: np.ndarray, buckets: int) -> Ints:
    """The entries as int64; refuse what is no lengths or no entries."""
    if lengths.ndim != 2 or lengths.shape[1] != 4 or lengths.dtype not in (np.int32, np.int64):
        raise ValueError(
            "lengths must be int32 or int64 [N, 4], of text, regions, images and slots; they are "
            f"{lengths.dtype} {list(lengths.shape)}."
        )
    if lengths.size and lengths.min() < 0:
        index = int(np.flatnonzero((lengths < 0).any(axis=1))[0])
        raise ValueError(f"lengths must not be negative; sample {index} has {lengths[index].tolist()}.")
    if entries.ndim != 1 or entries.dtype.kind not in "iu" or not len(entries):
        raise ValueError(
            f"entries must be integers [M], at least one; they are {entries.dtype} {list(entries.shape)}."
        )
    if entries.min() < 0 or entries.max() >= len(lengths):
        raise ValueError(
            f"entries must be positions in the {len(lengths)} lengths; they are {entries.min()} to "
            f"{entries.max()}."
        )
    if buckets < 1:
        raise ValueError(f"buckets={buckets} must be positive.")
    return entries.astype(np.int64)


def _check_limits(lengths: np.ndarray, entries: Ints, limits: Limits) -> None:
    """Refuse samples that are longer than a limit."""
    given = lengths[np.unique(entries)]
    for column, (name, limit) in enumerate(dataclasses.asdict(limits).items()):
        longer = 0 if limit is None else int((given[:, column] > limit).sum())
        if longer:
            largest = int(given[:, column].max())
            what = "text tokens" if name == "text" else name
            raise UserError(
                f"{longer} of {len(given)} samples have more {what} than a row of {limit}, the largest "
                f"{largest}; raise limits.{name} to {largest}, or shorten them or leave them out."
            )


def _shuffled(count: int, seed: np.random.SeedSequence) -> Ints:
    """A permutation; from raw bits, which are the same in every version of numpy."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _cost(sizes: Ints) -> Ints:
    """int64 [...]: the cost of rows of ``sizes`` [..., 4] in tokens."""
    text, regions, images, slots = np.moveaxis(sizes, -1, 0)
    return text + regions * np.maximum(slots, 1) + IMAGE_TOKENS * images


def _round_text(text: Any) -> Any:
    """Counts of text tokens, rounded up to a multiple of 16."""
    return -(-text // _TEXT_MULTIPLE) * _TEXT_MULTIPLE


def _apply(budgets: Budgets, limits: Limits, *, alone: bool) -> Budgets:
    """A limit in place of its budget; beside other buckets, the smaller of the two."""
    text, regions, images = (
        budget if limit is None else limit if alone else min(limit, budget)
        for budget, limit in zip(budgets, dataclasses.astuple(limits))
    )
    return text, regions, images


def _budgets(sizes: Ints, limits: Limits, *, pack: bool, alone: bool) -> Budgets:
    """Budgets of the rows of a class, whose ``sizes`` [n, 4] are in random order; limits as in ``_apply``."""
    longest = [int(value) for value in sizes[:, :3].max(axis=0)]
    totals = [int(value) for value in sizes[:, :3].sum(axis=0)]
    if not pack or not any(totals):
        return _apply((_round_text(longest[0]), longest[1], longest[2]), limits, alone=alone)
    given = {d: n for d, n in enumerate(dataclasses.astuple(limits)) if n is not None and totals[d]}
    # The budget that sets the scale; the others follow in the ratio of the totals, and sixteenths more.
    if given:
        base = min(given, key=lambda d: Fraction(given[d], totals[d]))
        scales, more = [Fraction(given[base], totals[base])], [0, 1, 2, 4]
    else:
        base = max((d for d in range(3) if totals[d]), key=lambda d: Fraction(longest[d], totals[d]))
        scales, more = [Fraction(longest[base] * scale, 4 * totals[base]) for scale in _SCALES], [0, 1]
    tried: list[tuple[int, Budgets]] = []
    for scale in scales:
        enough = []
        for sixteenths in more:
            ratios = [scale * (1 if d == base else Fraction(16 + sixteenths, 16)) for d in range(3)]
            text, regions, images = (max(longest[d], math.ceil(totals[d] * ratios[d])) for d in range(3))
            budgets = _apply((_round_text(text), regions, images), limits, alone=alone)
            cost, percent = _trial(sizes[:_TRIAL], budgets)
            tried.append((cost, budgets))
            if percent >= _GOAL_PERCENT:
                enough.append((cost, budgets))
        if enough:
            return min(enough)[1]
    return min(tried)[1]


def _trial(sizes: Ints, budgets: Budgets) -> tuple[int, int]:
    """Cost of the rows that a part of a class takes, and the percentage of it that is used."""
    rows = int(_pack(sizes, budgets).max()) + 1
    slots = sizes[:, 3].max()
    used = int(_cost(np.array([*sizes[:, :3].sum(axis=0), slots])))
    cost = rows * int(_cost(np.array([*budgets, slots])))
    return cost, 100 * used // cost


def _pack(sizes: Ints, budgets: Budgets) -> Ints:
    """int64 [n]: number of the row of each sample; the module describes the method.

    Samples of ``sizes`` [n, 3 or more] are in random order, and none exceeds a budget.
    """
    factors = np.array([max(1, _ONE // budget) if budget else 0 for budget in budgets])
    # A budget of 0 is left as it is, so that it never is the least.
    full = np.array([budget * int(f) if budget else _ONE for budget, f in zip(budgets, factors)])
    scaled = sizes[:, :3] * factors
    row_of = np.empty(len(sizes), np.int64)
    waiting, taken, rows = np.empty(0, np.int64), 0, 0
    while taken < len(sizes) or len(waiting):
        more = min(len(sizes), taken + _WINDOW - len(waiting))
        window = np.concatenate([waiting, np.arange(taken, more)])
        taken = more
        window = window[np.argsort(-scaled[window].sum(axis=1), kind="stable")]
        needed = [(int(total), int(one)) for total, one in zip(scaled[window].sum(axis=0), full)]
        # No more rows than are filled; after the last window, as many as are needed.
        last = taken == len(sizes)
        opened = max(1, *(-(-total // one) if last else total // one for total, one in needed))
        found = _place(scaled[window], np.repeat(full[:, None], opened, axis=1))
        placed = found >= 0
        row_of[window[placed]] = rows + found[placed]
        waiting = window[~placed]
        rows += opened
    return row_of


def _place(items: Ints, free: Ints) -> Ints:
    """int64 [n]: the rows where ``items`` [n, 3] leave the most of the least free budget, one after another.

    The row is -1 where none has enough. ``free`` [3, rows] changes.
    """
    found = np.full(len(items), -1, np.int64)
    after, least = np.empty_like(free), np.empty_like(free[0])
    for index, item in enumerate(items[:, :, None]):
        np.subtract(free, item, out=after)
        np.minimum.reduce(after, axis=0, out=least)
        row = int(least.argmax())
        if least[row] >= 0:
            found[index] = row
            free[:, row] = after[:, row]
    return found


def _classes(sizes: Ints, buckets: int, *, pack: bool) -> Ints:
    """int64 [n]: the class of each sample; every class has samples."""
    if buckets == 1:
        return np.zeros(len(sizes), np.int64)
    if pack:
        return _classes_of_slots(sizes, buckets)
    sizes = np.column_stack([_round_text(sizes[:, 0]), sizes[:, 1:]])
    best, total = np.zeros(len(sizes), np.int64), _NEVER
    # Neither order is the better for every corpus.
    for order in (np.argsort(_cost(sizes), kind="stable"), np.lexsort((sizes[:, 0], sizes[:, 1]))):
        shapes = _cut(sizes[order], buckets)
        shapes = shapes[np.argsort(_cost(shapes), kind="stable")]
        # A sample belongs to the cheapest shape that holds it, whatever run it was in.
        classes = np.full(len(sizes), -1)
        for index, shape in enumerate(shapes):
            classes[(classes < 0) & (sizes <= shape).all(axis=1)] = index
        cost = int(_cost(shapes)[classes].sum())
        if cost < total:
            best, total = np.searchsorted(np.unique(classes), classes), cost
    return best


def _classes_of_slots(sizes: Ints, buckets: int) -> Ints:
    """Classes whose regions, padded to the most slots of a class, have the fewest slots."""
    # Samples without regions fit anywhere; their text fills the rows of regions with many slots.
    slots = np.where(sizes[:, 1] > 0, sizes[:, 3], sizes[:, 3].max())
    values = np.unique(slots)
    regions = np.array([sizes[slots == value, 1].sum() for value in values])
    cost = np.full((len(values), len(values)), _NEVER)
    for first in range(len(values)):
        cost[first, first:] = values[first:] * np.cumsum(regions[first:])
    return np.searchsorted([values[end - 1] for _, end in _runs(cost, buckets)], slots)


def _cut(sizes: Ints, buckets: int) -> Ints:
    """int64 [classes, 4]: shapes of the runs of ``sizes`` [n, 4] whose rows cost least."""
    cells = min(len(sizes), _CELLS)
    edges = np.arange(cells + 1) * len(sizes) // cells
    largest = np.maximum.reduceat(sizes, edges[:-1])
    cost = np.full((cells, cells), _NEVER)
    for first in range(cells):
        shapes = np.maximum.accumulate(largest[first:])
        cost[first, first:] = _cost(shapes) * (edges[first + 1 :] - edges[first])
    return np.array([largest[first:end].max(axis=0) for first, end in _runs(cost, buckets)])


def _runs(cost: Ints, most: int) -> list[tuple[int, int]]:
    """First and end of the runs that a sequence is cut into: the fewest within 1% of the least cost.

    ``cost`` int64 [n, n] is of the run from i to j, both included; ``most`` is the most runs.
    """
    best = np.concatenate([[0], np.full(len(cost), _NEVER)])  # of what is before each position
    choices, costs = [], []
    for _ in range(min(most, len(cost))):
        through = best[:-1, None] + cost
        choices.append(through.argmin(axis=0))
        best = np.concatenate([[_NEVER], through.min(axis=0)])
        costs.append(int(best[-1]))
    runs = next(index for index, value in enumerate(costs) if 100 * value <= 101 * min(costs)) + 1
    ends = [len(cost)]
    for choice in reversed(choices[:runs]):
        ends.append(int(choice[ends[-1] - 1]))
    return list(itertools.pairwise(ends[::-1]))
