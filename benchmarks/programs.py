"""Compiled programs: what they cost before they run, and a way to run them again and again."""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks import hlo

TRACES = 2
_SHARDING: contextvars.ContextVar[Any] = contextvars.ContextVar("sharding", default=None)


@dataclasses.dataclass
class Program:
    """A compiled program with its arguments.

    Attributes:
      compiled: what runs.
      args: its arguments; those that are donated are replaced by the outputs of each run.
      carried: how many of the first arguments the outputs replace.
      trace_seconds: to trace and lower it, the fastest of a few times.
      compile_seconds: XLA's part.
      text: the optimized HLO.
    """

    compiled: Any
    args: tuple[Any, ...]
    carried: int
    trace_seconds: float
    compile_seconds: float
    text: str

    def __call__(self) -> None:
        """Run once and wait."""
        out = jax.block_until_ready(self.compiled(*self.args))
        if self.carried:
            self.args = (*out[: self.carried], *self.args[self.carried :])

    @property
    def dot_flops(self) -> int:
        """FLOPs of the products, loops counted as often as they run."""
        return hlo.total(hlo.dots(self.text))

    @property
    def flops(self) -> float:
        """What XLA counts: all arithmetic, but the body of a loop once."""
        return (self.compiled.cost_analysis() or {}).get("flops", 0.0)

    @property
    def bytes_accessed(self) -> float:
        """What XLA counts of bytes read from and written to memory, the body of a loop once."""
        return (self.compiled.cost_analysis() or {}).get("bytes accessed", 0.0)

    @property
    def temp_mib(self) -> float | None:
        """The peak of temporary memory, where the backend tells."""
        found = self.compiled.memory_analysis()
        return found.temp_size_in_bytes / 2**20 if found else None


@contextlib.contextmanager
def compiled_for(sharding: Any) -> Iterator[None]:
    """Within it, programs are compiled for devices that need not be there, and cannot run."""
    token = _SHARDING.set(sharding)
    try:
        yield
    finally:
        _SHARDING.reset(token)


def program(fn: Callable[..., Any], *args: Any, carried: int = 0) -> Program:
    """Traces and compiles a function of arrays.

    Args:
      fn: its first `carried` arguments are what it returns first, and are donated.
      *args: what to run it on. What is donated is copied before.
      carried: how many arguments go round from run to run.
    """
    kept = jax.tree.map(lambda x: x.copy(), args[:carried])
    sharding = _SHARDING.get()
    shapes = args
    if sharding is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
    tracing: list[float] = []
    lowered: Any = None
    for _ in range(TRACES):
        jax.clear_caches()  # so that no way is traced with what another left behind
        start = time.perf_counter()
        lowered = jax.jit(fn, donate_argnums=tuple(range(carried))).lower(*shapes)
        tracing.append(time.perf_counter() - start)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    return Program(
        compiled,
        (*kept, *args[carried:]),
        carried,
        min(tracing),
        done - traced,
        compiled.as_text() or "",
    )
