"""A train step and an eval step over an adapter, for those who have none of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxlora.adapter import Adapter
from jaxlora.errors import ConfigError

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in a run. The base is not in it: a step takes it as an argument.

    Attributes:
      step: the number of updates made, an int32 scalar.
      adapter: the adapter.
      opt_state: the optimizer's state, for the adapter's leaves only.
      key: the PRNG key that each step's own key is folded from.
    """

    step: Array
    adapter: Adapter
    opt_state: Any
    key: Array

    @classmethod
    def create(cls, adapter: Adapter, tx: optax.GradientTransformation, key: Array) -> "TrainState":
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), adapter, tx.init(adapter.params), key)  # type: ignore[arg-type]


LossFn = Callable[[Adapter, Any, Any, Array], Any]
"""(adapter, variables, batch, key) -> loss, or (loss, {name: metric})."""

StepFn = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]
"""(state, variables, batch) -> (state, {"loss": …, "grad_norm": …, …})."""


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    axis_name: str | None = None,
    shardings: TrainState | None = None,
    on_bad_step: Literal["stop", "skip"] | None = None,
) -> StepFn:
    """Compiles a step that updates the adapter and nothing else.

    Gradients are taken with respect to the adapter alone, so that no gradient of a frozen kernel
    is computed. The state's buffers are donated, the base's are not.

    Args:
      loss_fn: `(adapter, variables, batch, key) -> loss`, a scalar.
      tx: an optax optimizer of the adapter's leaves.
      has_aux: `loss_fn` returns (loss, dict of scalar metrics).
      axis_name: run under `jax.pmap` with this axis name: state and batch have a leading device
        axis, the base is shared, gradients and metrics are averaged.
      shardings: how the state lies on a mesh, from `state_shardings`: it comes back as it went in,
        and the step compiles once.
      on_bad_step: what to do where the loss or a gradient is not finite. None: nothing. "stop" and
        "skip" leave adapter and optimizer as they were, though the step counts. Metrics then hold
        "bad_leaves", True for each leaf (in the order of `jax.tree.leaves(adapter.params)`) whose
        gradient is not finite, and for "skip" whether the step was "skipped". `fit` stops at a bad
        step that was not skipped, and names the leaves.

    Returns:
      `step(state, variables, batch) -> (state, metrics)`, jitted or pmapped. Metrics hold "loss",
      "grad_norm" and what `loss_fn` adds.

    Raises:
      ConfigError: no such policy.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, optax
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> def loss_fn(adapter, variables, batch, key):
      ...     return jnp.mean(jl.lora_apply(model, variables, adapter, batch) ** 2)
      >>> tx = optax.adam(1e-2)
      >>> step = jl.make_train_step(loss_fn, tx)
      >>> state = jl.TrainState.create(adapter, tx, jax.random.key(2))
      >>> state, metrics = step(state, variables, x)
      >>> sorted(metrics)
      ['grad_norm', 'loss']
    """
    if on_bad_step not in (None, "stop", "skip"):
        raise ConfigError(f"on_bad_step is {on_bad_step!r}, expected 'stop', 'skip' or None.")

    def step(state: TrainState, variables: Any, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params = state.adapter.params

        def loss_of(params: Any) -> Any:
            adapter = dataclasses.replace(state.adapter, params=params)
            return loss_fn(adapter, variables, batch, key)

        value, grads = jax.value_and_grad(loss_of, has_aux=has_aux)(params)
        loss, metrics = value if has_aux else (value, {})
        if axis_name is not None:
            loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        adapter = dataclasses.replace(state.adapter, params=optax.apply_updates(params, updates))
        norm = optax.tree.norm(grads)
        metrics = {**metrics, "loss": loss, "grad_norm": norm}
        if on_bad_step is not None:
            bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
            adapter, opt_state = jax.tree.map(
                lambda old, new: jnp.where(bad, old, new),
                (state.adapter, state.opt_state),
                (adapter, opt_state),
            )
            finite = [jnp.isfinite(optax.tree.norm(g)) for g in jax.tree.leaves(grads)]
            metrics["bad_leaves"] = ~jnp.stack(finite)
            if on_bad_step == "skip":
                metrics["skipped"] = bad
        state = dataclasses.replace(
            state, step=state.step + 1, adapter=adapter, opt_state=opt_state
        )
        return state, metrics

    if axis_name is None:
        out = None if shardings is None else (shardings, None)
        return jax.jit(step, donate_argnums=0, out_shardings=out)
    return jax.pmap(step, axis_name, in_axes=(0, None, 0), donate_argnums=0)


def make_eval_step(
    metric_fn: Callable[..., Any], *, axis_name: str | None = None
) -> Callable[..., Any]:
    """Compiles `metric_fn(adapter, variables, batch)`, the mean over devices under `pmap`.

    Args:
      metric_fn: returns a tree of arrays. It gets no key: nothing is random in evaluation.
      axis_name: run under `jax.pmap` with this axis name; adapter and batch have a leading device
        axis.

    Returns:
      The compiled function, with the same arguments.
    """
    if axis_name is None:
        return jax.jit(metric_fn)

    def mean(adapter: Adapter, variables: Any, batch: Any) -> Any:
        return jax.lax.pmean(metric_fn(adapter, variables, batch), axis_name)

    return jax.pmap(mean, axis_name, in_axes=(0, None, 0))
