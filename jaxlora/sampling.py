"""How the next token is chosen from the logits.

The options are traced scalars: to change one compiles nothing. Their order is Hugging Face's:
repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.errors import ConfigError

Array = jax.Array
_ALL = 2**31 - 1  # a top_k above every vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of the choice of the next token. The defaults are greedy.

    Attributes:
      temperature: what logits are divided by; 0 takes the likeliest token, and the three that
        follow change nothing.
      top_k: draw from the so many likeliest tokens; None for all. Equal ones are kept.
      top_p: draw from the fewest likeliest tokens with so much probability together, in (0, 1];
        None for all (Holtzman et al. 2020).
      min_p: draw from tokens at least so probable as this part of the likeliest one's, in [0, 1];
        None for all (Nguyen et al. 2024).
      repetition_penalty: logits of tokens of the prompt and the output so far are divided by it
        where positive and multiplied where negative, above 0; 1 does nothing (Keskar et al. 2019).

    Raises:
      ConfigError: a value outside of its range.

    Example:
      >>> Sampling(temperature=0.7, top_p=0.9).top_k is None
      True
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "of at least 0", lambda x: 0 <= x < math.inf)
        _check("top_p", self.top_p, "in (0, 1]", lambda x: 0 < x <= 1, None)
        _check("min_p", self.min_p, "in [0, 1]", lambda x: 0 <= x <= 1, None)
        _check("repetition_penalty", self.repetition_penalty, "above 0", lambda x: 0 < x < math.inf)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ConfigError(
                f"top_k is {self.top_k!r}, expected an integer of at least 1, or None for all."
            )

    @property
    def filters(self) -> "Filters":
        """The options as arrays."""
        return Filters(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(min(self.top_k or _ALL, _ALL)),
            top_p=jnp.float32(1 if self.top_p is None else self.top_p),
            min_p=jnp.float32(self.min_p or 0),
            repetition_penalty=jnp.float32(self.repetition_penalty),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """`Sampling` as scalar arrays, None as the value that keeps all."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array


def penalized(logits: Array, seen: Array, filters: Filters) -> Array:
    """Logits (rows, vocab) with the repetition penalty on the tokens `seen` (rows, vocab)."""
    penalty = filters.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Array, filters: Filters) -> Array:
    """Logits (rows, vocab) over the temperature, -inf for tokens that are not to be drawn."""
    x = logits / filters.temperature

    def top_k(x: Array) -> Array:
        return _likeliest(x, jnp.ones_like(x), filters.top_k.astype(x.dtype))

    def top_p(x: Array) -> Array:
        return _likeliest(x, jax.nn.softmax(x), filters.top_p)

    def same(x: Array) -> Array:
        return x

    x = jax.lax.cond(filters.top_k < x.shape[-1], top_k, same, x)
    x = jax.lax.cond(filters.top_p < 1, top_p, same, x)
    best = jnp.max(x, axis=-1, keepdims=True)
    return jnp.where(jnp.exp(x - best) < filters.min_p, -jnp.inf, x)


def choose(logits: Array, seen: Array, filters: Filters, keys: Array) -> Array:
    """The next token of each row.

    Args:
      logits: float32 (rows, vocab).
      seen: booleans (rows, vocab): the tokens of the row so far.
      filters: the options.
      keys: a PRNG key for each row.

    Returns:
      int32 (rows,).
    """
    logits = penalized(logits, seen, filters)

    def drawn(logits: Array) -> Array:
        return jax.vmap(jax.random.categorical)(keys, filtered(logits, filters)).astype(jnp.int32)

    def greedy(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(filters.temperature > 0, drawn, greedy, logits)


def _likeliest(x: Array, weights: Array, enough: Array) -> Array:
    """The largest values of each row whose weights together are enough; -inf for the others.

    The least value kept is found by bisection over the floats in their order: 32 sums over the
    vocabulary, where sorting takes several times as long. Values equal to it are kept too.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)  # (rows, vocab), as x is ordered
    rows = (x.shape[0], 1)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # enough from low on, not from high on
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        kept = jnp.sum(jnp.where(order >= middle, weights, 0), axis=-1, keepdims=True) >= enough
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle)

    ends = jnp.full(rows, -(2**31), jnp.int32), jnp.full(rows, 2**31 - 1, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 32, halve, ends)
    return jnp.where(order >= low, x, -jnp.inf)


def _check(name: str, value: Any, expected: str, holds: Any, *allowed: Any) -> None:
    if value in allowed:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not holds(value):
        other = ", or None for all" if allowed else ""
        raise ConfigError(f"{name} is {value!r}, expected a number {expected}{other}.")
