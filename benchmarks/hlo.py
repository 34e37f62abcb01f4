"""What a compiled program multiplies: its dots, read from the HLO text.

`cost_analysis` counts the body of a loop once and adds elementwise work. Here a dot in a scanned
layer counts as often as it runs, and nothing but products counts.

    >>> import jax, jax.numpy as jnp
    >>> product = jax.jit(lambda x, w: jnp.tanh(x @ w))
    >>> text = product.lower(jnp.ones((48, 64)), jnp.ones((64, 32))).compile().as_text()
    >>> [(dot.shape, dot.contracted, dot.times) for dot in dots(text)]
    [((48, 32), (64,), 1)]
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-$]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-$]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"^\(?(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computation)=%?([\w.\-$]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(
    r'\blhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d",]*)\]'
)
_SOURCE = re.compile(r"\d+ |(File|Function)(Names|Locations)|StackFrames|$")
_METADATA = re.compile(r',? ?metadata=\{(?:[^{}"]|"[^"]*")*\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Dot:
    """One product of a compiled program.

    Attributes:
      shape: of the output.
      contracted: the sizes of the contracted axes.
      dtype: of the output, as HLO names it, "f32".
      times: how often it runs: more than once in a loop.
    """

    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    dtype: str
    times: int

    @property
    def flops(self) -> int:
        """Two for each multiplication and addition of one run."""
        return 2 * math.prod(self.shape) * math.prod(self.contracted)


@dataclasses.dataclass
class _Line:
    """One instruction; `rest` is what follows the opening parenthesis of its operands."""

    name: str
    type: str
    op: str
    rest: str


def dots(text: str) -> list[Dot]:
    """The products of a program, those in loops and fusions included.

    Of a conditional all the branches count. Convolutions are not counted. XLA may turn the product
    with a vector (rank 1, a batch of one) into a multiplication and a sum: that is no dot any more.

    Args:
      text: `compiled.as_text()`.

    Returns:
      The dots and the calls of cuBLAS, in the order of the program.

    Raises:
      ValueError: the text has no entry; a loop with dots in it does not say how often it runs;
        a custom call multiplies and is not known.
    """
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1))


def total(found: Iterable[Dot]) -> int:
    """The FLOPs of all the dots, each as often as it runs."""
    return sum(dot.flops * dot.times for dot in found)


def program_alone(text: str) -> str:
    """The text without what says where in the source it comes from: two that run the same agree."""
    lines = [line for line in text.splitlines() if not _SOURCE.match(line)]
    return _METADATA.sub("", "\n".join(lines))


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """{name: instructions} of a module, and the name of the entry."""
    found: dict[str, list[_Line]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            lines.append(_Line(*match.groups()))
    if not entry:
        raise ValueError("The text has no ENTRY, expected that of `compiled.as_text()`.")
    return found, entry


def _walk(computations: dict[str, list[_Line]], name: str, times: int) -> Iterator[Dot]:
    types = {line.name: line.type for line in computations[name]}
    for line in computations[name]:
        if _multiplies(line):
            yield _dot(line, types, times)
            continue
        called = [match[1] for match in _CALLED.findall(line.rest)]
        for names in _BRANCHES.findall(line.rest):
            called += [branch.strip(" %") for branch in names.split(",")]
        inner = [dot for callee in called for dot in _walk(computations, callee, times)]
        if line.op == "while" and inner:
            trips = _TRIPS.search(line.rest)
            if trips is None:
                raise ValueError(
                    f"The loop {line.name} does not say how often it runs, expected "
                    "known_trip_count: its dots cannot be counted. A scan says it."
                )
            inner = [dataclasses.replace(d, times=d.times * int(trips[1])) for d in inner]
        yield from inner


def _multiplies(line: _Line) -> bool:
    if line.op == "custom-call" and (target := _TARGET.search(line.rest)):
        return bool(re.search(r"gemm|matmul", target[1], re.IGNORECASE))
    return line.op == "dot"


def _dot(line: _Line, types: dict[str, str], times: int) -> Dot:
    axes = _CONTRACTED.search(line.rest)
    if axes is None:
        raise ValueError(
            f"{line.name} multiplies and does not say which axes it contracts, expected "
            f"lhs_contracting_dims or cuBLAS's numbers: {line.op}({line.rest[:200]}."
        )
    operand = re.split(r", %| %|\)", line.rest.lstrip("%"), maxsplit=1)[0].split(" ")[-1]
    operand_type = line.rest if _SHAPE.match(line.rest) else types[operand.rstrip(",")]
    dtype, shape = _shape(line.type)
    _, left = _shape(operand_type)
    numbers = (axes[1] or axes[2] or "").replace('"', "")
    contracted = tuple(left[int(axis)] for axis in numbers.split(",") if axis)
    return Dot(shape, contracted, dtype, times)


def _shape(type_: str) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape of an HLO type; of a tuple, those of its first part."""
    match = _SHAPE.match(type_)
    assert match, type_
    return match[1], tuple(int(size) for size in match[2].split(",") if size)
