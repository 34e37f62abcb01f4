"""The parts that the models share: layers with a config's dtypes, attention, a stack of layers."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import ConfigError, ModelError
from jaxlora.models.cache import Slice
from jaxlora.models.config import REMAT, ModelConfig

Array = jax.Array


def dense(c: Any, features: int, name: str, *, use_bias: bool = True) -> nn.Dense:
    """A Dense layer with the config's dtypes."""
    return nn.Dense(
        features,
        use_bias,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        kernel_init=nn.initializers.normal(c.initializer_range),
        name=name,
    )


def embed(c: Any, rows: int, width: int, name: str) -> nn.Embed:
    """An embedding table (rows, width) with the config's dtypes."""
    init = nn.initializers.normal(c.initializer_range)
    return nn.Embed(
        rows, width, dtype=c.dtype, param_dtype=c.param_dtype, embedding_init=init, name=name
    )


def layer_norm(c: ModelConfig, epsilon: float, x: Array, name: str = "norm") -> Array:
    """LayerNorm in float32, its output in the config's dtype."""
    norm = nn.LayerNorm(
        epsilon,
        dtype=jnp.float32,
        param_dtype=c.param_dtype,
        use_fast_variance=False,  # E[x²] - E[x]² cancels where the mean is large
        name=name,
    )
    return norm(x).astype(c.dtype)


def rms_norm(c: ModelConfig, epsilon: float, x: Array, name: str) -> Array:
    """RMSNorm in float32, its output in the config's dtype."""
    norm = nn.RMSNorm(epsilon, dtype=jnp.float32, param_dtype=c.param_dtype, name=name)
    return norm(x).astype(c.dtype)


def attend(
    c: ModelConfig,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    *,
    causal: bool = False,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """Scaled dot-product attention, the softmax in float32.

    A query without any key to attend to gets uniform weights rather than NaN.

    Args:
      c: the model's config, for its dtype and implementation.
      q: (batch, queries, heads, width).
      k: (batch, keys, kv_heads, width); the heads are a multiple of the kv_heads.
      v: as k.
      mask: True where a query attends to a key, broadcastable to (batch, heads, queries, keys), or
        None.
      causal: query i attends to keys up to i only.
      drop: dropout of the weights, or None; it needs them one by one.

    Returns:
      (batch, queries, heads, width).
    """
    if drop is None:
        if mask is not None:
            full = (q.shape[0], mask.shape[1], q.shape[1], k.shape[1])
            mask = jnp.broadcast_to(mask, full)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, implementation=c.attention
        )
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhw,bkhw->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])  # (batch, heads, queries, keys)
    floor = jnp.finfo(jnp.float32).min
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, floor)
    if mask is not None:
        scores = jnp.where(mask, scores, floor)
    weights = drop(nn.softmax(scores, axis=-1).astype(c.dtype))  # (batch, heads, queries, keys)
    return jnp.einsum("bhqk,bkhw->bqhw", weights, v)


def run_layers(
    c: ModelConfig,
    layer: Any,
    name: str,
    x: Array,
    kv: Any,
    *shared: Any,
    each: Any = None,
    **fields: Any,
) -> tuple[Array, Any]:
    """Runs a model's layers one after another, unrolled or scanned, with remat if asked for.

    Args:
      c: the config.
      layer: a module `layer(c, **fields)(x, own, *shared) -> (x, own)`: what it has for itself is a
        pair for `cache.extend`, or its item of `each`.
      name: `{name}_0`, `{name}_1`, … are the layers' scopes; `{name}` that of the scanned one.
      x: the input of the first layer.
      kv: the layers' keys and values: a tuple with one pair a layer, or one pair stacked on axis 0
        where the layers are scanned; None for nothing.
      *shared: what all layers are given.
      each: an array with an item for each layer, where there is no `kv`.
      **fields: further fields of the module.

    Returns:
      The output of the last layer, and the layers' keys and values, tuple or stacked as they came.
    """
    if c.remat:  # inside a scan there is nothing to share with, so no barrier is needed
        layer = nn.remat(layer, prevent_cse=not c.scan_layers, policy=REMAT[c.remat])
    if not c.scan_layers:
        out = []
        for n in range(c.num_layers):
            own = kv[n] if kv is not None else None if each is None else each[n]
            x, own = layer(c, **fields, name=f"{name}_{n}")(x, own, *shared)
            out.append(own)
        return x, None if kv is None else tuple(out)

    def run(module: Any, carry: Any, own: Any, *shared: Any) -> tuple[Any, None]:
        x, kv = carry
        x, own = module(x, own if kv is None else Slice(kv, own), *shared)
        return (x, None if kv is None else own.whole), None

    axes: Any = (0, *[nn.broadcast] * len(shared))
    scanned: Any = nn.scan(
        run,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=axes,
        length=c.num_layers,
        metadata_params={nn.PARTITION_NAME: None},
    )
    # The stack is carried, so that a layer writes its few new slots and no more.
    owns = each if kv is None else jnp.arange(c.num_layers)
    carry, _ = scanned(layer(c, **fields, name=name), (x, kv), owns, *shared)
    return carry


def classify(c: Any, x: Array, num_labels: int, dropout: float, deterministic: bool) -> Array:
    """Dropout and the layer `classifier`: logits (..., num_labels)."""
    check_num_labels(num_labels)
    return dense(c, num_labels, "classifier")(nn.Dropout(dropout)(x, deterministic))


def check_num_labels(num_labels: int) -> None:
    """Raises ConfigError for fewer than one label."""
    if num_labels < 1:
        raise ConfigError(f"num_labels is {num_labels}, expected at least 1.")


def token_mask(input_ids: Array, attention_mask: Array | None) -> Array:
    """(batch, seq), True for tokens; without a mask all are."""
    if attention_mask is None:
        return jnp.ones(input_ids.shape, bool)
    return jnp.asarray(attention_mask) != 0


def masked_mean(x: Array, mask: Array) -> Array:
    """The mean over the tokens of (batch, seq, hidden) in float32; zeros without any token."""
    kept = jnp.where(mask[..., None], x.astype(jnp.float32), 0)  # (batch, seq, hidden)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)  # (batch, 1)
    return jnp.sum(kept, axis=1) / count  # (batch, hidden)


def last_token(x: Array, mask: Array) -> Array:
    """The state of each sequence's last token: (batch, hidden) of (batch, seq, hidden)."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # (batch,)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def check_inputs(input_ids: Array, length: int | None, limit: str, **others: Array | None) -> None:
    """Checks shapes and dtypes of a text model's inputs. Values cannot be seen while tracing.

    Args:
      input_ids: expected to be integers (batch, seq).
      length: the longest seq there may be, or None.
      limit: the field that says so, for the message.
      **others: arrays of the shape of input_ids; `position_ids` may be (1, seq) too.

    Raises:
      ModelError: an array of a wrong shape or dtype, or longer than there are positions.
    """
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise ModelError(
            f"input_ids is {jnp.result_type(input_ids)} of shape {shape}, expected integers of "
            "shape (batch, seq)."
        )
    for name, array in others.items():
        shapes = [shape, (1, shape[1])] if name == "position_ids" else [shape]
        if array is not None and jnp.shape(array) not in shapes:
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ModelError(f"{name} has shape {jnp.shape(array)}, expected {expected}.")
    if length is not None and shape[1] > length:
        raise ModelError(
            f"The sequence is {shape[1]} tokens long, expected at most {limit}, {length}. "
            "Truncate it, or give position_ids."
        )
