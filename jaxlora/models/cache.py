"""The keys and values that a causal model has already computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a causal model keeps of the tokens it has seen.

    Attributes:
      kv: each layer's (keys, values), both (batch, length, kv_heads, width): a tuple with one pair
        a layer, or one pair stacked on axis 0 where the layers are scanned.
      segments: integers (batch, length): zero where a slot holds no token.
      index: how many slots are used: an int32 scalar, the same for all rows (pad on the left).
    """

    kv: Any
    segments: Array
    index: Array


def empty(
    num_layers: int,
    batch: int,
    length: int,
    kv_heads: int,
    width: int,
    dtype: Any,
    *,
    stacked: bool = False,
) -> Cache:
    """A cache of `length` slots with no token in it."""
    shape = (batch, length, kv_heads, width)

    def pair(shape: tuple[int, ...]) -> tuple[Array, Array]:
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    kv = pair((num_layers, *shape)) if stacked else tuple(pair(shape) for _ in range(num_layers))
    return Cache(kv, jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Who attends to whom, for one call of a causal model.

    Attributes:
      mask: (batch, 1, queries, keys), or None where only the order matters.
      positions: (batch or 1, queries): how many tokens of its own segment stand before each token.
      cache: the cache with this call's tokens counted in, its keys and values not yet.
      index: the first slot that this call writes, or None without a cache.
    """

    mask: Array | None
    positions: Array
    cache: Cache | None
    index: Array | None


def view(
    input_ids: Array, attention_mask: Array | None, cache: Cache | None, window: int | None = None
) -> View:
    """Tokens attend to themselves and to earlier tokens of their own segment.

    Args:
      input_ids: (batch, seq).
      attention_mask: integers (batch, seq): zero for padding; tokens attend to tokens of the same
        number only, so sequences packed into one row are numbered 1, 2, 3, … .
      cache: the tokens before these, or None.
      window: attend to so many tokens at most, the token itself included; None for all.
    """
    batch, seq = input_ids.shape
    if attention_mask is None and cache is None and (window is None or window >= seq):
        return View(None, jnp.arange(seq)[None], None, None)
    if attention_mask is None:
        own = jnp.ones((batch, seq), jnp.int32)
    else:
        own = jnp.asarray(attention_mask).astype(jnp.int32)  # (batch, seq)
    start = jnp.zeros((), jnp.int32) if cache is None else cache.index
    segments = own
    if cache is not None:
        segments = jax.lax.dynamic_update_slice(cache.segments, own, (0, start))
        cache = dataclasses.replace(cache, segments=segments, index=start + seq)
    query, key = start + jnp.arange(seq), jnp.arange(segments.shape[1])
    before = key[None, :] <= query[:, None]  # (seq, keys)
    same = (own[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    mask = same & before  # (batch, seq, keys)
    positions = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)  # (batch, seq)
    if window is not None:
        mask &= key[None, :] > query[:, None] - window
    return View(mask[:, None], positions, cache, None if cache is None else start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slice:
    """One layer's part of the keys and values of scanned layers.

    Attributes:
      whole: the pair (layers, batch, length, kv_heads, width).
      layer: which layer's.
    """

    whole: tuple[Array, Array]
    layer: Array


def extend(own: Any, index: Array | None, k: Array, v: Array) -> tuple[Array, Array, Any]:
    """A layer's keys and values: its own, or those of its cache with its own written in.

    Args:
      own: the layer's pair, a `Slice` of all layers', or None without a cache.
      index: the first slot to write.
      k: the keys of this call's tokens.
      v: their values.

    Returns:
      The keys and values to attend to, and what the cache keeps.
    """
    if own is None or index is None:
        return k, v, own
    if isinstance(own, Slice):
        at = (own.layer, 0, index, 0, 0)
        pairs = zip(own.whole, (k, v), strict=True)
        whole = tuple(_written(old, new[None], at) for old, new in pairs)
        k, v = (jax.lax.dynamic_index_in_dim(x, own.layer, keepdims=False) for x in whole)
        return k, v, dataclasses.replace(own, whole=whole)
    k, v = (_written(old, new, (0, index, 0, 0)) for old, new in zip(own, (k, v), strict=True))
    return k, v, (k, v)


def _written(old: Array, new: Array, at: tuple[Any, ...]) -> Array:
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
