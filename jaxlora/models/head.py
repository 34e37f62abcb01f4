"""The head of a causal model: logits, or each token's loss without all the logits at once."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Array = jax.Array
CHUNK = 2**24
"""How many logits the losses hold at once: 64 MB of them in float32."""


def logits(head: Any, x: Array) -> Array:
    """(batch, seq, vocab) of states (batch, seq, hidden), by a Dense or a table."""
    return head.attend(x) if isinstance(head, nn.Embed) else head(x)


def losses(head: Any, x: Array, labels: Array, vocab: int, smoothing: float) -> Array:
    """The loss of each label given the state at its place, in float32.

    With label smoothing s it is (1 - s) times `-log p(label)` and s times the mean over the
    vocabulary. More than `CHUNK` logits are made in pieces of the sequence, and again in the
    backward pass: of 2,048 tokens and 50,000 words autodiff would keep 400 MB, twice.

    Args:
      head: the head's module.
      x: (batch, seq, hidden).
      labels: integers (batch, seq).
      vocab: the number of logits.
      smoothing: s, in [0, 1).

    Returns:
      (batch, seq).
    """
    batch, seq = labels.shape
    length = min(seq, max(1, CHUNK // (batch * vocab)))
    if length == seq:
        return _losses(head, x, labels, smoothing)
    pieces = -(-seq // length)
    padding = pieces * length - seq

    def cut(array: Array) -> Array:
        array = jnp.pad(array, [(0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)])
        return array.reshape(batch, pieces, length, *array.shape[2:])

    def piece(head: Any, carry: None, x: Array, labels: Array) -> tuple[None, Array]:
        return carry, _losses(head, x, labels, smoothing)

    scanned: Any = nn.scan(
        nn.remat(piece, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        in_axes=1,
        out_axes=1,
    )
    _, out = scanned(head, None, cut(x), cut(labels))
    return out.reshape(batch, -1)[:, :seq]


def _losses(head: Any, x: Array, labels: Array, smoothing: float) -> Array:
    wide = logits(head, x).astype(jnp.float32)
    out = optax.softmax_cross_entropy_with_integer_labels(wide, labels)
    if not smoothing:
        return out
    return (1 - smoothing) * out + smoothing * (jax.nn.logsumexp(wide, -1) - jnp.mean(wide, -1))
