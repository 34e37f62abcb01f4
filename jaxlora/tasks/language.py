"""What the tasks of causal models share: the loss on chosen tokens, and its measure."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import hosts
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


def summed_losses(
    model: Any, adapter: Any, variables: Any, batch: Any, **kwargs: Any
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of the tokens that count, and their number.

    A token counts where `loss_mask` is one; it is predicted from the tokens before it.

    Args:
      model: a causal model.
      adapter: an adapter, or None for the base.
      variables: the base's.
      batch: `input_ids` and `loss_mask` of (batch, seq), `weight` of (batch,), and further inputs.
      **kwargs: for the model, such as `label_smoothing`.

    Returns:
      Two float32 scalars.
    """
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = [batch[name] for name in names if name in batch]
    kwargs["labels"] = jnp.roll(batch["input_ids"], -1, 1)
    if adapter is None:
        losses = model.apply(variables, *inputs, **kwargs)
    else:
        losses = lora_apply(model, variables, adapter, *inputs, **kwargs)
    counts = batch["loss_mask"][:, 1:] * batch["weight"][:, None]
    return jnp.sum(losses[:, :-1] * counts), jnp.sum(counts)


def make_loss(model: Any, label_smoothing: float) -> Any:
    """`(adapter, variables, batch, key) -> mean loss of the tokens that count`."""
    options = {"label_smoothing": label_smoothing, "deterministic": False}

    def loss(adapter: Any, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        rngs = {"dropout": key}
        total, count = summed_losses(model, adapter, variables, batch, rngs=rngs, **options)
        return total / jnp.maximum(count, 1.0)

    return loss


_sums = jax.jit(summed_losses, static_argnums=0)


def make_evaluate(model: Any, batch_size: int, pad: Any) -> Any:
    """`(adapter, variables, examples) -> {"loss", "perplexity"}` of the tokens that count."""

    def evaluate(adapter: Any, variables: Any, examples: Sequence[Example]) -> dict[str, float]:
        batches = Batches(sorted(examples, key=_length), batch_size, pad=pad)
        found = [
            jax.device_get(hosts.on_host(_sums(model, adapter, variables, batch)))
            for batch in batches
        ]
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
