"""One token after another: the prompts in one pass, then a loop over a cache of keys and values.

Two programs, compiled once for a model, an adapter's spec and a bucket of shapes: `start` and
`run`. How many tokens, which tokens end a row and all options of sampling are traced.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.adapter import Adapter
from jaxlora.apply import lora_apply
from jaxlora.sampling import Filters, choose

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What stays the same from step to step.

    Attributes:
      filters: the options of sampling.
      eos: int32 (n,): the tokens that end a row, n at least 1; -1 is none.
      keys: a PRNG key for each row, of which each step's is folded.
    """

    filters: Filters
    eos: Array
    keys: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What a step changes.

    Attributes:
      cache: the keys and values of all tokens but the last.
      tokens: int32 (batch, most): the new tokens; after a row's end they mean nothing.
      length: int32 (batch,): how many of them there are, the ending one included.
      done: booleans (batch,): the row has ended.
      seen: booleans (batch, vocab): the tokens of prompt and output.
      step: int32: how many tokens the longest row has.
    """

    cache: Any
    tokens: Array
    length: Array
    done: Array
    seen: Array
    step: Array


@functools.partial(jax.jit, static_argnames=("model", "most"))
def start(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter | None,
    ids: Array,
    mask: Array,
    rules: Rules,
    *,
    most: int,
) -> State:
    """Runs the prompts and takes the first token of each row.

    Args:
      model: a causal model.
      variables: its variables.
      adapter: an adapter, or None.
      ids: int32 (batch, seq), padded on the left.
      mask: int32 (batch, seq), zero for padding.
      rules: what stays the same.
      most: how many new tokens there is room for.
    """
    logits, cache, seen = prefill(model, variables, adapter, ids, mask, ids.shape[1] + most)
    batch = ids.shape[0]
    state = State(
        cache=cache,
        tokens=jnp.zeros((batch, most), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        seen=seen,
        step=jnp.int32(0),
    )
    return _added(state, logits, cache, rules)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def run(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter | None,
    state: State,
    rules: Rules,
    until: Array,
) -> State:
    """Goes on until there are so many tokens in the longest row, or all rows have ended.

    To go on in several calls or in one gives the same tokens by the same program. The state's
    buffers are donated.
    """

    def unfinished(state: State) -> Array:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)  # (batch, 1)
        logits, cache = forward(model, variables, adapter, last, None, state.cache)
        return _added(state, logits, cache, rules)

    return jax.lax.while_loop(unfinished, step, state)


def prefill(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter | None,
    ids: Array,
    mask: Array,
    length: int,
) -> tuple[Array, Any, Array]:
    """The prompts' last logits (batch, vocab), a cache of `length` slots, and the tokens seen."""
    batch = ids.shape[0]
    cache = model.empty_cache(batch, length)  # type: ignore[attr-defined]
    logits, cache = forward(model, variables, adapter, ids, mask, cache)
    seen = jnp.zeros(logits.shape, bool)
    seen = seen.at[jnp.arange(batch)[:, None], ids].max(mask != 0)
    return logits, cache, seen


def forward(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter | None,
    ids: Array,
    mask: Array | None,
    cache: Any,
) -> tuple[Array, Any]:
    """The last token's logits in float32 (rows, vocab), and the cache with the tokens in it."""
    given: dict[str, Any] = {"cache": cache, "last": 1}
    if adapter is None:
        found: Any = model.apply(variables, ids, mask, **given)
    else:
        found = lora_apply(model, variables, adapter, ids, mask, **given)
    logits, cache = found
    return logits[:, -1].astype(jnp.float32), cache


def is_eos(tokens: Array, rules: Rules) -> Array:
    """Which tokens end a row."""
    return jnp.any(tokens[..., None] == rules.eos, axis=-1)


def _added(state: State, logits: Array, cache: Any, rules: Rules) -> State:
    """The state with one more token in each row that has not ended."""
    rows = jnp.arange(state.done.shape[0])
    keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, state.step)
    token = choose(logits, state.seen, rules.filters, keys)  # (batch,)
    return State(
        cache=cache,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        length=jnp.where(state.done, state.length, state.step + 1),
        done=state.done | is_eos(token, rules),
        seen=state.seen.at[rows, token].set(True),
        step=state.step + 1,
    )
