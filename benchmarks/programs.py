"""Compiled programs: what they cost before they run, and a way to run them again and again."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import hlo


@dataclasses.dataclass
class Program:
    """A compiled program with its arguments.

    Attributes:
      compiled: what runs.
      args: its arguments; those that are donated are replaced by the outputs of each run.
      carried: how many of the first arguments the outputs replace.
      trace_seconds: to trace and lower it.
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
    def temp_mib(self) -> float | None:
        """The peak of temporary memory, where the backend tells."""
        found = self.compiled.memory_analysis()
        return found.temp_size_in_bytes / 2**20 if found else None


def program(fn: Callable[..., Any], *args: Any, carried: int = 0) -> Program:
    """Traces and compiles a function of arrays.

    Args:
      fn: its first `carried` arguments are what it returns first, and are donated.
      *args: what to run it on. What is donated is copied before.
      carried: how many arguments go round from run to run.
    """
    kept = jax.tree.map(lambda x: x.copy(), args[:carried])
    jax.clear_caches()  # so that no way is traced with what another left behind
    start = time.perf_counter()
    lowered = jax.jit(fn, donate_argnums=tuple(range(carried))).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    return Program(
        compiled,
        (*kept, *args[carried:]),
        carried,
        traced - start,
        done - traced,
        compiled.as_text() or "",
    )
