"""What a program costs, counted from itself: FLOPs of its jaxpr, bytes between chips of its HLO.

XLA's own ``cost_analysis()`` counts the body of a loop once, however often it runs, so a model whose layers
are scanned seems to cost one layer. Here loops count as often as they run. What cannot be counted is named in
``left_out``, never estimated; the counts are then lower bounds.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from gaze_jax.parallel.topology import Chip


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating point operations of matrix products and convolutions; a multiply-add is two.

    Attributes:
      total: operations of all devices together.
      left_out: what is not in ``total``, or only once, in words; empty if everything is counted.
    """

    total: int
    left_out: tuple[str, ...] = ()


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """FLOPs of ``dot_general`` and convolutions in a jaxpr, such as ``jax.jit(f).trace(x).jaxpr``.

    A scan counts its body times its length, a ``cond`` its most expensive branch, a ``shard_map`` what one
    device does times the devices of its manual axes. The inside of a Pallas kernel and a ``while`` loop of
    unknown length are in ``left_out``; such a loop is counted once. Recomputation for the backward pass
    counts, because it is in the jaxpr.
    """
    total, left_out = _count(jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr)
    return Flops(total, tuple(sorted(left_out)))


def _count(jaxpr: Jaxpr) -> tuple[int, frozenset[str]]:
    total, left_out = 0, frozenset[str]()
    for equation in jaxpr.eqns:
        found, missing = _count_equation(equation)
        total, left_out = total + found, left_out | missing
    return total, left_out


def _count_equation(equation: JaxprEqn) -> tuple[int, frozenset[str]]:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
        return _dot(equation), frozenset()
    if name == "conv_general_dilated":
        return _convolution(equation), frozenset()
    if name == "pallas_call":
        label = str(params.get("name") or params.get("name_and_src_info") or "").split(" ")[0]
        return 0, frozenset({f"the Pallas kernel {label}".rstrip()})
    inner = [_count(each) for value in params.values() for each in _jaxprs(value)]
    left_out = frozenset[str]().union(*(missing for _, missing in inner))
    if name == "cond":
        return max((total for total, _ in inner), default=0), left_out
    total = sum(total for total, _ in inner)
    if name == "scan":
        return total * params["length"], left_out
    if name == "while" and total:
        return total, left_out | {"all but one turn of a while loop"}
    if name == "shard_map":
        shape = dict(params["mesh"].shape)
        # The name of the parameter has changed between versions of JAX.
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return total * math.prod(shape[axis] for axis in axes), left_out
    return total, left_out


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _jaxprs(each)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    numbers, kernel = equation.params["dimension_numbers"], _shape(equation.invars[1])
    # The kernel's input channels are those of one group already.
    reads = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    # A transposed convolution meets the zeros between its inputs, which nobody has to multiply.
    return 2 * math.prod(_shape(equation.outvars[0])) * reads // math.prod(equation.params["lhs_dilation"])


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a chip sends to others while a program runs once.

    Attributes:
      total: the sum of ``by_kind``.
      by_kind: kind of collective -> bytes, such as "all-gather".
      left_out: what is not in ``total``, or only once, in words.
    """

    total: int
    by_kind: Mapping[str, int]
    left_out: tuple[str, ...] = ()


_SENT = {
    "all-gather": lambda size, group: size * (group - 1) // group,
    "reduce-scatter": lambda size, group: size * (group - 1),
    "all-reduce": lambda size, group: 2 * size * (group - 1) // group,
    "all-to-all": lambda size, group: size * (group - 1) // group,
    "collective-permute": lambda size, group: size,
}
"""Kind -> bytes that a chip sends in a ring, from the bytes of its result and the chips of a group."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation)=\{?([%\w.\-, ]+)")

_STARTS, _PART = 'custom_call_target="AsyncCollectiveStart"', "frontend_attributes={chain_id="
"""A TPU runs a collective in parts beside other work: a fusion that starts it, fusions that go on with it,
and one that waits for its end. Each names the whole collective."""

_Sizes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One line of an HLO text: the type of its result, its opcode, and all that follows."""

    made: str
    opcode: str
    rest: str


def collective_traffic(hlo: str) -> Traffic:
    """Bytes that each chip sends in the collectives of an optimised, partitioned HLO module.

    Args:
      hlo: ``compiled.as_text()``; shapes in it are those of one chip.

    An operation in a ``while`` loop counts as often as the loop turns; a loop whose turns the text does not
    tell is counted once and named in ``left_out``. Of the branches of a conditional, the one that sends
    most counts. The bytes are those of a ring: (n - 1) / n of the gathered array for an all-gather over n
    chips, twice that for an all-reduce.
    """
    computations, entry = _computations(hlo)
    left_out: set[str] = set()
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", _first(hlo)))

    @functools.cache
    def sent(name: str) -> tuple[tuple[str, int], ...]:
        totals: _Sizes = {}
        # A TPU reduces and scatters in a fusion of this name, which holds an all-reduce and a slice.
        scattered = name.startswith("all-reduce-scatter")
        operations = computations.get(name, ())
        starts = any(_STARTS in operation.rest for operation in operations)
        for operation in operations:
            if starts or _PART not in operation.rest:
                _add(totals, _sent_by(operation, devices, scattered, left_out))
            for called, turns in _calls(operation, computations, sent, left_out):
                _add(totals, dict(sent(called)), turns)
        return tuple(totals.items())

    by_kind = dict(sorted(sent(entry)))
    return Traffic(sum(by_kind.values()), by_kind, tuple(sorted(left_out)))


def _first(text: str) -> str:
    return text.partition("\n")[0]


def _add(totals: _Sizes, more: Mapping[str, int], times: int = 1) -> None:
    for kind, size in more.items():
        totals[kind] = totals.get(kind, 0) + size * times


def _computations(hlo: str) -> tuple[dict[str, list[_Operation]], str]:
    """Name -> operations of every computation, and the name of the one that is run."""
    found: dict[str, list[_Operation]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif current and (match := _LINE.match(line)):
            found[current].append(_Operation(match[1], match[2], match[3]))
    if not entry:
        raise ValueError("The text has no ENTRY computation; give compiled.as_text().")
    return found, entry


def _calls(
    operation: _Operation,
    computations: Mapping[str, list[_Operation]],
    sent: Any,
    left_out: set[str],
) -> Iterable[tuple[str, int]]:
    """The computations that an operation runs, each with how often."""
    if operation.opcode == "conditional":
        names = [
            name for group in _BRANCHES.findall(operation.rest) for name in re.findall(r"[\w.\-]+", group)
        ]
        return [(max(names, key=lambda name: sum(size for _, size in sent(name))), 1)] if names else []
    # The second half of an asynchronous operation names what the first half has run.
    if operation.opcode.endswith(("-done", "-update")):
        return []
    names = _CALLED.findall(operation.rest)
    turns = 1
    if operation.opcode == "while" and any(sent(name) for name in names):
        known = _turns(operation, computations)
        if known is None:
            left_out.add("all but one turn of a while loop")
        turns = 1 if known is None else known
    return [(name, turns) for name in names]


def _turns(operation: _Operation, computations: Mapping[str, list[_Operation]]) -> int | None:
    """How often a while loop turns; None if the text does not tell."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.rest):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", operation.rest)
    operations = computations.get(condition[1], []) if condition else []
    # A counter from 0 in steps of 1 is compared with the one constant of the condition.
    constants = [
        int(match[1])
        for each in operations
        if each.opcode == "constant" and (match := re.match(r"(\d+)\)", each.rest))
    ]
    below = any("direction=LT" in each.rest for each in operations)
    return constants[0] if below and len(constants) == 1 else None


def _sent_by(operation: _Operation, devices: int, scattered: bool, left_out: set[str]) -> _Sizes:
    """What one operation sends, without what it calls."""
    kind = operation.opcode.removesuffix("-start")
    if kind not in _SENT:
        return {}
    size = sum(map(_array_bytes, _results(operation, kind)))
    group = _group(operation.rest, devices) if kind != "collective-permute" else 2
    if group is None:
        left_out.add(f"{kind} operations whose groups cannot be read")
        return {}
    if scattered and kind == "all-reduce":
        return {"reduce-scatter": _SENT["reduce-scatter"](size // group, group)}
    return {kind: _SENT[kind](size, group)}


def _results(operation: _Operation, kind: str) -> list[tuple[str, str]]:
    """(dtype, sizes) of the arrays that an operation makes; the start of a pair also lists its operands."""
    parts = _parts(operation.made)
    if operation.opcode.endswith("-start") and kind != "all-reduce" and len(parts) > 1:
        parts = parts[1:2]
    return re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", " ".join(parts))


def _parts(made: str) -> list[str]:
    """The elements of a tuple type, or the type itself."""
    if not made.startswith("("):
        return [made]
    parts, depth, current = [], 0, ""
    for letter in made[1:-1]:
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and not depth:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [*parts, current]


def _array_bytes(array: tuple[str, str]) -> int:
    dtype, sizes = array
    bits = re.match(r"[a-z]+(\d+)", dtype)
    width = int(bits[1]) if bits else 8 * (dtype == "pred")
    return width * math.prod(int(size.strip("<=")) for size in sizes.split(",") if size) // 8


def _group(rest: str, devices: int) -> int | None:
    """Chips of a group, which XLA writes as lists, tiles or axes of a mesh; None if it is none of these."""
    if mesh := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"('[^']+')=(\d+)", mesh[1]))
        axes = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(tiled[2])
    return devices if re.search(r"replica_groups=\{\}", rest) else None


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a program can take on a chip; the real time is longer, by an unknown factor.

    Attributes:
      seconds: the largest of ``parts``.
      by: which of them it is.
      parts: "compute", "memory" and "interconnect" -> seconds that this alone takes at the chip's peak.
    """

    seconds: float
    by: str
    parts: Mapping[str, float]


def roofline(chip: Chip, *, flops: float, memory_bytes: float, sent_bytes: float) -> Bound:
    """The bound that peak figures of a chip set.

    Args:
      chip: the figures.
      flops: operations of one chip.
      memory_bytes: bytes that it must read from and write to its HBM at least.
      sent_bytes: bytes that it sends to other chips.
    """
    parts = {
        "compute": flops / chip.flops_per_second,
        "memory": memory_bytes / chip.hbm_bytes_per_second,
        "interconnect": sent_bytes / chip.ici_bytes_per_second,
    }
    by = max(parts, key=lambda name: parts[name])
    return Bound(parts[by], by, parts)
