"""Beam search over a cache of keys and values, with Hugging Face's rules (`early_stopping=False`).

Each step keeps the best continuations of each row's beams. One that ends takes its place among the
finished by its log-probability over length ** length_penalty; a row is through when its best
running beam, so weighed at its present length, is no better than its worst finished one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.adapter import Adapter
from jaxlora.decode import Rules, forward, is_eos, prefill
from jaxlora.sampling import penalized

Array = jax.Array
_OUT = -1e9  # below every score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """What a step of beam search changes.

    Attributes:
      cache: the keys and values of the running beams, (batch * beams) rows.
      tokens: int32 (batch, beams, most): the running beams' tokens.
      scores: float32 (batch, beams): their log-probabilities, best first.
      seen: booleans (batch * beams, vocab): the tokens of prompt and output.
      best: int32 (batch, beams, most): the finished ones' tokens.
      best_scores: float32 (batch, beams): their scores, best first.
      length: int32 (batch, beams): how many tokens they have; zero for a place that is free.
      hopeful: booleans (batch,): a running beam may still beat a finished one.
      step: int32: how many tokens the running beams have.
    """

    cache: Any
    tokens: Array
    scores: Array
    seen: Array
    best: Array
    best_scores: Array
    length: Array
    hopeful: Array
    step: Array


@functools.partial(jax.jit, static_argnames=("model", "most", "beams"))
def start(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter | None,
    ids: Array,
    mask: Array,
    rules: Rules,
    length_penalty: Array,
    until: Array,
    *,
    most: int,
    beams: int,
) -> Beams:
    """Runs the prompts once a row, and takes the first token of each beam.

    Args:
      model: a causal model.
      variables: its variables.
      adapter: an adapter, or None.
      ids: int32 (batch, seq), padded on the left.
      mask: int32 (batch, seq), zero for padding.
      rules: what stays the same; its keys are not used.
      length_penalty: a float32 scalar.
      until: how many new tokens at most.
      most: how many new tokens there is room for.
      beams: beams a row.
    """
    logits, cache, seen = prefill(model, variables, adapter, ids, mask, ids.shape[1] + most)
    batch = ids.shape[0]
    rows = jnp.repeat(jnp.arange(batch), beams)
    nothing = jnp.zeros((batch, beams, most), jnp.int32)
    state = Beams(
        cache=None,
        tokens=nothing,
        scores=jnp.full((batch, beams), _OUT).at[:, 0].set(0.0),  # or all beams would be one
        seen=seen[rows],
        best=nothing,
        best_scores=jnp.full((batch, beams), _OUT),
        length=jnp.zeros((batch, beams), jnp.int32),
        hopeful=jnp.ones(batch, bool),
        step=jnp.int32(0),
    )
    return _expanded(state, logits[rows], taken(cache, rows), rules, length_penalty, until)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def run(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter | None,
    state: Beams,
    rules: Rules,
    length_penalty: Array,
    until: Array,
) -> Beams:
    """Goes on until there are `until` tokens, or no row can get better."""

    def unfinished(state: Beams) -> Array:
        return (state.step < until) & jnp.any(state.hopeful)

    def step(state: Beams) -> Beams:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=2)
        logits, cache = forward(model, variables, adapter, last.reshape(-1, 1), None, state.cache)
        return _expanded(state, logits, cache, rules, length_penalty, until)

    return jax.lax.while_loop(unfinished, step, state)


def taken(cache: Any, rows: Array) -> Any:
    """The cache with other rows: of its own, in another order, some of them several times."""

    def of(x: Array) -> Array:  # (batch, length, heads, width), the layers before it if stacked
        return jnp.take(x, rows, axis=x.ndim - 4)

    kv = jax.tree.map(of, cache.kv)
    return dataclasses.replace(cache, kv=kv, segments=jnp.take(cache.segments, rows, axis=0))


def _expanded(
    state: Beams, logits: Array, cache: Any, rules: Rules, length_penalty: Array, until: Array
) -> Beams:
    """The state with one more token in each beam."""
    (batch, beams), vocab = state.scores.shape, logits.shape[-1]
    scores = penalized(jax.nn.log_softmax(logits), state.seen, rules.filters)
    scores = scores.reshape(batch, beams, vocab) + state.scores[..., None]

    # So many that as many as there are beams go on, whichever of them end.
    count = min(1 + rules.eos.shape[0], vocab) * beams
    scores, at = jax.lax.top_k(scores.reshape(batch, -1), count)  # (batch, count)
    parent, token = at // vocab, at % vocab
    tokens = _of(state.tokens, parent)  # (batch, count, most)
    tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], (0, 0, state.step))
    step = state.step + 1
    ended = is_eos(token, rules) | (step == until)

    # The best that end, of the first `beams` only, among those that ended before.
    final = scores / step.astype(jnp.float32) ** length_penalty
    kept = ended & (jnp.arange(count) < beams) & state.hopeful[:, None]
    all_scores = jnp.concatenate([state.best_scores, jnp.where(kept, final, _OUT)], axis=1)
    best_scores, which = jax.lax.top_k(all_scores, beams)
    best = _of(jnp.concatenate([state.best, tokens], axis=1), which)
    length = jnp.concatenate([state.length, jnp.where(kept, step, 0)], axis=1)
    length = jnp.take_along_axis(length, which, axis=1)

    # The best that go on.
    scores, which = jax.lax.top_k(jnp.where(ended, scores + _OUT, scores), beams)
    parent, token = (jnp.take_along_axis(x, which, axis=1) for x in (parent, token))
    rows = (parent + beams * jnp.arange(batch)[:, None]).ravel()  # (batch * beams,)
    seen = state.seen[rows].at[jnp.arange(rows.size), token.ravel()].set(True)
    hope = scores[:, 0] / step.astype(jnp.float32) ** length_penalty
    return Beams(
        cache=taken(cache, rows),
        tokens=_of(tokens, which),
        scores=scores,
        seen=seen,
        best=best,
        best_scores=best_scores,
        length=length,
        hopeful=state.hopeful & (hope > best_scores[:, -1]),  # a free place is worst
        step=step,
    )


def _of(x: Array, which: Array) -> Array:
    """Some of each row's sequences: (batch, which, …) of (batch, all, …)."""
    return jnp.take_along_axis(x, which[..., None], axis=1)
