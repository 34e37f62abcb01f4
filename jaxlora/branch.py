"""The low-rank branch: what an adapter adds to the output of one layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlora import tree
from jaxlora.adapter import Site
from jaxlora.backend import backend
from jaxlora.layers import Linear
from jaxlora.quantize import unboxing_after
from jaxlora.tokens import product

Array = jax.Array
LOW = "lora_low"
"""The name of `A x` for `jax.checkpoint_policies`: (tokens, rank), cheap to keep."""


def branch(
    site: Site,
    linear: Linear,
    a: Array,
    b: Array,
    dtype: jnp.dtype,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """`scaling * B A x` for one use of an adapted kernel (Hu et al. 2021, section 4.1).

    The scaling stands on the product with the rank, (tokens, rank), and `product` says how the two
    matrix products go back and forth.

    Args:
      site: what is adapted.
      linear: the use: the equation and its input x.
      a: (*batch, rank, *contracted).
      b: (*batch, rank, *outputs); of a fused kernel (*batch, rank, *outputs of one block).
      dtype: what to compute in: the dtype of the layer's output.
      drop: dropout of the input, done again in the backward pass: neither the mask nor what it
        leaves of the input is kept. (On CPU, XLA sees that the two are the same and keeps them.)

    Returns:
      An array of the shape and dtype of the layer's output.
    """
    a, b = a.astype(dtype), b.astype(dtype)
    if linear.run is not None:
        return _by_running(site, linear, a, site.layout.spread(b), dtype, drop)
    x, kernel, out = linear.letters()
    batch, inner, outer = (site.layout.letters(role, kernel) for role in "bio")
    rank = next(c for c in "rstuvwxyzRSTUVWXYZ" if c not in x + kernel + out)
    contracted = {c for c in x if c not in out}
    plain = set(inner) == contracted and set(batch) <= set(x)
    if linear.lookup or not plain:
        b = site.layout.spread(b)
    if linear.lookup:
        low = jnp.take(a, linear.x.ravel(), axis=a.ndim - 1)
        low = jnp.moveaxis(low, -1, 0).reshape(*linear.x.shape, *a.shape[:-1])
        low = low * jnp.asarray(site.scaling, dtype)
        return jnp.einsum(f"{x}{batch}{rank},{batch}{rank}{outer}->{out}", low, b)

    values = linear.x.astype(dtype)
    if set(outer) == contracted:  # the transposed use of a tied table: B comes first
        a, b, inner, outer = b, a, outer, inner
    if set(inner) != contracted or not set(batch) <= set(x):
        terms = f"{x},{batch}{rank}{inner},{batch}{rank}{outer}->{out}"
        values = drop(values) if drop else values
        return site.scaling * jnp.einsum(terms, values, a, b, precision=linear.precision)

    free = "".join(c for c in x if c not in batch + inner)
    sizes = dict(zip(x, values.shape, strict=True))
    batch_shape, free_shape = ([sizes[c] for c in letters] for letters in (batch, free))
    outer_shape = b.shape[len(batch) + 1 :]
    blocks = site.layout.blocks if plain else ()
    a = a.reshape(*a.shape[: len(batch) + 1], -1)
    b = b.reshape(*b.shape[: len(batch) + 1], -1)

    def lower(values: Array, a: Array) -> Array:
        values = _ordered(drop(values) if drop else values, x, batch + free + inner)
        values = values.reshape(*batch_shape, *free_shape, a.shape[-1])
        return product(len(batch), "ri", linear.precision, values, a)

    low = checkpoint_name(_again(lower, drop)(values, a), LOW)
    low = low * jnp.asarray(site.scaling, low.dtype)

    def raised(low: Array, b: Array) -> Array:
        high = product(len(batch), "ro", linear.precision, low, b)
        return high.reshape(*batch_shape, *free_shape, *outer_shape)

    if blocks:  # a product for each, and none with the zeros of the others
        lows, bs = jnp.split(low, sum(blocks), -1), jnp.split(b, sum(blocks), len(batch))
        high = site.layout.placed(map(raised, lows, bs))
    else:
        high = raised(low, b)
    return _ordered(high, batch + free + outer, out)


def _ordered(x: Array, letters: str, order: str) -> Array:
    """The array with its axes, named by letters, in another order."""
    return x if letters == order else jnp.transpose(x, [letters.index(c) for c in order])


def _by_running(
    site: Site, linear: Linear, a: Array, b: Array, dtype: jnp.dtype, drop: Any
) -> Array:
    """The branch of a convolution: one with `rank` outputs, then a 1x1 (as in PEFT)."""
    run = linear.run
    assert run is not None
    kernel = jnp.concatenate([a] * linear.groups)
    kernel = jnp.moveaxis(kernel, 0, site.layout.roles.index("o"))
    low = _again(lambda x, kernel: run(drop(x) if drop else x, kernel), drop)(
        linear.x.astype(dtype), kernel
    )
    low = checkpoint_name(low, LOW)
    low = low.reshape(*low.shape[:-1], linear.groups, a.shape[0]) * site.scaling
    b = b.reshape(b.shape[0], linear.groups, -1)
    high = jnp.einsum("...gr,rgo->...go", low, b, precision=linear.precision)
    return high.reshape(*high.shape[:-2], -1)


def _again(fn: Callable[..., Array], drop: Any) -> Callable[..., Array]:
    """With dropout, a function whose backward pass begins from its arguments."""
    return jax.checkpoint(fn) if drop else fn


def dropped(key: Array, rate: float, x: Array) -> Array:
    """`x` with each element zero with probability `rate`, the others scaled to keep the mean.

    The rate is met to 1 in 65,536. On CPU two elements share a random word, which halves the time;
    a TPU's compiler would copy both to lay their halves side by side (twice the bytes of a step on
    a v5e).
    """
    below = min(round(rate * 2**16), 2**16 - 1)
    *lead, last = x.shape
    if backend() == "cpu":
        words = jax.random.bits(key, (*lead, -(-last // 2)), jnp.uint32)
        bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*lead, -1)[..., :last]
    else:
        bits = jax.random.bits(key, x.shape, jnp.uint16)
    return jnp.where(bits >= below, x / (1 - below / 2**16), jnp.zeros_like(x))


def with_rows(
    linear: Linear, y: Array, table: Array, values: Array, rows: tuple[int, ...]
) -> Array:
    """The output of a table some of whose rows have other values; the table is not copied.

    Args:
      linear: the use: a lookup, or the products of an input with every row.
      y: the output with the table as it is.
      table: (all rows, width).
      values: (rows, width).
      rows: which rows they replace.
    """
    if linear.lookup:
        at = jnp.searchsorted(jnp.array(rows), linear.x)
        at = jnp.minimum(at, len(rows) - 1)
        hit = (jnp.array(rows)[at] == linear.x)[..., None]
        return jnp.where(hit, values.astype(y.dtype)[at], y)
    # By what they differ, so that rows that do not differ change nothing, bit for bit.
    change = values.astype(y.dtype) - table[jnp.array(rows)].astype(y.dtype)
    own = jnp.einsum("...d,nd->...n", linear.x, change, precision=linear.precision)
    return y.at[..., jnp.array(rows)].add(own.astype(y.dtype))


def with_input_gradient(linear: Linear, y: Array, box: Any) -> Array:
    """The output of a layer whose input was a constant, with the gradient of its input.

    The kernel is taken out of its box again for the backward pass, so what waits for it is the box:
    a few bits a weight, where autodiff of the layer would keep the kernel itself.

    Args:
      linear: the use.
      y: the output.
      box: the kernel in its metadata box.
    """
    x = linear.x

    @jax.custom_vjp
    def attach(y: Array, x: Array, box: Any) -> Array:
        return y

    def forward(y: Array, x: Array, box: Any) -> tuple[Array, Any]:
        return y, box

    def backward(box: Any, g: Array) -> tuple[Array, Array, None]:
        with unboxing_after(g):
            kernel = tree.unboxed(box).astype(g.dtype)
        _, transposed = jax.vjp(lambda x: _product(linear, x, kernel), jnp.zeros(x.shape, g.dtype))
        return g, transposed(g)[0].astype(x.dtype), None

    attach.defvjp(forward, backward)
    return attach(y, x, box)


def _product(linear: Linear, x: Array, kernel: Array) -> Array:
    """The layer's own product, without its bias."""
    if linear.run is not None:
        return linear.run(x, kernel)
    letters, of_kernel, out = linear.letters()
    return jnp.einsum(f"{letters},{of_kernel}->{out}", x, kernel, precision=linear.precision)
