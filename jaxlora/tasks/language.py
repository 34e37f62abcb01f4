"""What the tasks of causal models share: the loss on chosen tokens, and its measure."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora.apply import lora_apply
from jaxlora.batches import Batches, Example
from jaxlora.errors import DataError
from jaxlora.rows import Row
from jaxlora.tasks.base import Problem, Settings, adapter_config

INPUTS = (
    jax.ShapeDtypeStruct((1, 8), jnp.int32),
    jax.ShapeDtypeStruct((1, 8), jnp.int32),
)
"""Shapes of a causal model's inputs, to plan with."""


def token_losses(
    logits: jax.Array, batch: Any, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of the tokens that count, and their number.

    A token counts where `loss_mask` is one; it is predicted from the tokens before it. With label
    smoothing s the loss is (1 - s) times that of the token and s times the mean over all tokens.

    Args:
      logits: (batch, seq, vocab).
      batch: `input_ids` and `loss_mask` of (batch, seq), and `weight` of (batch,).
      label_smoothing: s, in [0, 1).

    Returns:
      Two float32 scalars.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
    if label_smoothing:
        mean = jax.nn.logsumexp(logits, -1) - jnp.mean(logits, -1)
        losses = (1 - label_smoothing) * losses + label_smoothing * mean
    counts = batch["loss_mask"][:, 1:] * batch["weight"][:, None]
    return jnp.sum(losses * counts), jnp.sum(counts)


def logits_of(model: Any, adapter: Any, variables: Any, batch: Any, **kwargs: Any) -> jax.Array:
    """(batch, seq, vocab); an adapter of None gives the base's."""
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = [batch[name] for name in names if name in batch]
    if adapter is None:
        return model.apply(variables, *inputs, **kwargs)
    return lora_apply(model, variables, adapter, *inputs, **kwargs)


def make_loss(model: Any, label_smoothing: float) -> Any:
    """`(adapter, variables, batch, key) -> mean loss of the tokens that count`."""

    def loss(adapter: Any, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        kwargs = {"rngs": {"dropout": key}, "deterministic": False}
        logits = logits_of(model, adapter, variables, batch, **kwargs)
        total, count = token_losses(logits, batch, label_smoothing)
        return total / jnp.maximum(count, 1.0)

    return loss


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, adapter: Any, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    return token_losses(logits_of(model, adapter, variables, batch), batch)


def make_evaluate(model: Any, batch_size: int, pad: Any) -> Any:
    """`(adapter, variables, examples) -> {"loss", "perplexity"}` of the tokens that count."""

    def evaluate(adapter: Any, variables: Any, examples: Sequence[Example]) -> dict[str, float]:
        batches = Batches(sorted(examples, key=_length), batch_size, pad=pad)
        found = [jax.device_get(_sums(model, adapter, variables, batch)) for batch in batches]
        total, count = (float(np.sum([pair[i] for pair in found])) for i in (0, 1))
        mean = total / count
        return {"loss": mean, "perplexity": float(np.exp(min(mean, 80.0)))}

    return evaluate


def language_problem(
    settings: Settings,
    pretrained: Any,
    train: tuple[Sequence[Example], int],
    valid: tuple[Sequence[Example], int],
) -> Problem:
    """The problem of a causal model: the loss of the tokens that count, and its perplexity.

    Args:
      settings: those of the task.
      pretrained: (model, params, tokenizer).
      train: the examples, and how many of them were cut.
      valid: the same to validate with.
    """
    model, params, tokenizer = pretrained
    pad = {"input_ids": tokenizer.pad_token_id or 0}
    return Problem(
        train=train[0],
        valid=valid[0],
        pad=pad,
        config=adapter_config(settings, params),
        inputs=INPUTS,
        loss=make_loss(model, settings.label_smoothing),
        evaluate=make_evaluate(model, settings.batch_size, pad),
        metric="loss",
        higher_is_better=False,
        cut=train[1] + valid[1],
    )


def _length(example: Example) -> int:
    return len(example["input_ids"])


def counted(
    row: Row, ids: Sequence[int], mask: Sequence[int], max_length: int
) -> tuple[Example, bool]:
    """The example of ids with a loss mask, cut to a length, and whether it was cut.

    Raises:
      DataError: no token that counts is left.
    """
    counts = np.array(mask[:max_length], np.int32)
    counts[:1] = 0  # nothing stands before the first token to predict it from
    if not counts.any():
        raise DataError(
            f"{row.where} has {len(ids)} tokens, and none to learn within the first {max_length}. "
            "Raise max_length, or shorten the row."
        )
    return {"input_ids": np.array(ids[:max_length]), "loss_mask": counts}, len(ids) > max_length
