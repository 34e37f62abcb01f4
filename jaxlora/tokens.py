"""The product of tokens with a factor, and how its gradient takes the axes of the tokens."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jaxlora.backend import backend
from jaxlora.errors import ConfigError

Array = jax.Array
_TOKENS: contextvars.ContextVar[str] = contextvars.ContextVar("tokens", default="auto")


@contextlib.contextmanager
def token_axes(way: str) -> Iterator[None]:
    """Within it, the gradients of factors are traced one way, for those who measure themselves.

    Args:
      way: "plain": all axes at once, as autodiff does it. "flat": tokens are flattened to one axis,
        the fastest on CPU where no axis but the first is sharded. "apart": the first axis is kept
        apart, so that a sharded sequence stays where it is. "auto": plain but on CPU; there flat on
        one device, apart on several where sequences are long beside the rank.

    Raises:
      ConfigError: another word.

    Example:
      >>> from jaxlora.tokens import token_axes
      >>> with token_axes("flat"):
      ...     pass  # trace the training step here
    """
    if way not in ("auto", "plain", "flat", "apart"):
        raise ConfigError(f"token_axes is {way!r}, expected 'auto', 'plain', 'flat' or 'apart'.")
    token = _TOKENS.set(way)
    try:
        yield
    finally:
        _TOKENS.reset(token)


def product(batch: int, kind: str, precision: Any, x: Array, w: Array) -> Array:
    """The product of tokens with a factor, with a gradient of the factor that XLA runs fast.

    Autodiff's contracts several axes of tokens at once, for which XLA for CPU copies both operands
    into another order: a 6-layer decoder's step takes 1.2 times full fine-tuning's. With the tokens
    flattened to one axis it takes 0.68, but a sharded sequence is gathered for that. So on several
    CPUs the first axis of tokens stands apart, the others are contracted, and the products are
    summed: no collective but the sum over tokens, and as fast at rank 8 (at rank 64 and 128 tokens
    a row 1.1 times the step). A TPU's compiler wants autodiff's own: flattened, a step reads and
    writes 1.15 times the bytes (v5e, bfloat16). `token_axes` chooses by hand.

    Args:
      batch: the number of leading axes that x and w share (experts).
      kind: "ri": x holds inputs i and w is A. "ro": x holds ranks r and w is B.
      precision: as for `jax.lax.dot_general`.
      x: (*batch, *tokens, inputs or rank).
      w: (*batch, rank, inputs or outputs).

    Returns:
      (*batch, *tokens, rank or outputs).
    """
    shared, tokens = x.shape[:batch], x.shape[batch:-1]
    rest = math.prod(tokens[1:])
    way = _TOKENS.get()
    if way == "auto" and backend() != "cpu":
        way = "plain"
    elif way == "auto":
        # Apart holds `rank` rows for each item of the first axis: few beside its own tokens.
        way = "apart" if jax.device_count() > 1 and rest >= 8 * w.shape[batch] else "flat"
    run, seen = _dot, tokens if way == "plain" else (math.prod(tokens),)
    if any(_names(x)[batch + 1 : -1]):  # an axis of type Explicit, which cannot be flattened
        run, seen = (_apart if len(tokens) == 2 else _dot), tokens
    elif way == "apart" and len(tokens) > 1:
        run, seen = _apart, (tokens[0], rest)
    y = run(batch, kind, precision, x.reshape(*shared, *seen, x.shape[-1]), w)
    return y.reshape(*shared, *tokens, y.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _apart(batch: int, kind: str, precision: Any, x: Array, w: Array) -> Array:
    """The product of (*batch, first, rest, …) with a factor (*batch, …, …)."""
    return _dot(batch, kind, precision, x, w)


@functools.partial(_apart.defjvp, symbolic_zeros=True)
def _apart_jvp(
    batch: int, kind: str, precision: Any, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Any]:
    (x, w), (dx, dw) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_apart(batch, kind, precision, dx, w))
    if not isinstance(dw, SymbolicZero):
        # Of a broadcast factor each slice has a gradient of its own: what is summed at the end.
        each = jnp.broadcast_to(
            jnp.expand_dims(dw, batch), (*dw.shape[:batch], x.shape[batch], *dw.shape[batch:])
        )
        terms.append(_dot(batch + 1, kind, precision, x, each))
    y = _apart(batch, kind, precision, x, w)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _dot(batch: int, kind: str, precision: Any, x: Array, w: Array) -> Array:
    contracted = ((x.ndim - 1,), (batch + (kind == "ri"),))
    shared = tuple(range(batch))
    return jax.lax.dot_general(
        x,
        w,
        (contracted, (shared, shared)),
        precision=precision,
        out_sharding=_out_sharding(batch, kind, x, w),
    )


def _names(x: Array) -> list[Any]:
    """The mesh's axes of type Explicit along each axis of an array."""
    return list(jax.typeof(x).sharding.spec)


def _out_sharding(batch: int, kind: str, x: Array, w: Array) -> PartitionSpec | None:
    """What explicit sharding asks for where both operands are sharded alike: tokens stay put."""
    of_x, of_w = _names(x), _names(w)
    last = of_w.pop(batch + (kind == "ri"))
    if not any(of_w[batch:]) and not (last and of_x[-1]):
        return None
    taken = {name for axis in of_x[:-1] for name in (axis if isinstance(axis, tuple) else (axis,))}
    free = [
        name if not taken & {*(name if isinstance(name, tuple) else (name,))} else None
        for name in of_w[batch:]
    ]
    return PartitionSpec(*of_x[:-1], *free)
