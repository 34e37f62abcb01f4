"""Adapt any function of params: a plain one, Equinox, Haiku and Keras, each if it is installed.

    pip install jaxlora equinox dm-haiku keras
    python examples/any_function.py

The same four lines for each: a config whose targets are paths in the tree of params, `lora_init`,
`weight_space`, and a loss of the adapter. The base is never changed, and what was learned merges
into params of the same kind. Runs in seconds on a CPU.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxlora as jl
from jaxlora.weight_space import weight_space

WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as a function of its params.

    Attributes:
      name: whose model it is.
      params: any pytree.
      apply: `(params, x) -> y`.
      config: what to adapt.
    """

    name: str
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    config: jl.LoraConfig


def plain(key: jax.Array) -> Case:
    """A function of lists of dicts; kernels are (in, out)."""
    keys = jax.random.split(key)
    params = [{"w": jax.random.normal(k, (WIDTH, WIDTH)) / 4} for k in keys]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params[0]["w"]) @ params[1]["w"]

    return Case("plain function", params, apply, jl.LoraConfig(rank=2, targets="w"))


def equinox(key: jax.Array) -> Case:
    """A module is a pytree of its own; kernels are (out, in)."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, depth=1, key=key)
    config = jl.LoraConfig(rank=2, targets=r"layers/\d/weight", roles={"weight": "oi"})
    return Case("equinox", model, lambda model, x: jax.vmap(model)(x), config)


def haiku(key: jax.Array) -> Case:
    """`hk.transform` gives a function of a dict; kernels are (in, out)."""
    import haiku as hk  # pyright: ignore[reportMissingImports]

    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([WIDTH, WIDTH])(x)))
    params = model.init(key, jnp.ones((1, WIDTH)))
    return Case("haiku", params, model.apply, jl.LoraConfig(rank=2, targets="w"))


def keras(key: jax.Array) -> Case:
    """`stateless_call` takes lists of arrays; a dict of their paths gives them names."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as k  # pyright: ignore[reportMissingImports]

    k.utils.set_random_seed(0)
    model = k.Sequential([k.Input((WIDTH,)), k.layers.Dense(WIDTH, "tanh"), k.layers.Dense(WIDTH)])
    params = {v.path: v.value for v in model.trainable_variables}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        trained = [params[v.path] for v in model.trainable_variables]
        fixed = [v.value for v in model.non_trainable_variables]
        return model.stateless_call(trained, fixed, x)[0]

    return Case("keras", params, apply, jl.LoraConfig(rank=2))  # all that is named `kernel`


CASES = {"plain": plain, "equinox": equinox, "haiku": haiku, "keras": keras}


def cases(names: Any = tuple(CASES)) -> Iterator[Case]:
    """Those of the models that can be made here."""
    for name in names:
        if name == "plain" or find_spec(name):
            yield CASES[name](jax.random.key(0))
        else:
            print(f"{name}: not installed")


def fit(case: Case, steps: int = 300) -> tuple[float, float, float]:
    """Trains an adapter of a case on a task that is the base's own up to an update of rank 1.

    Returns:
      (loss of the base, loss with the adapter, loss of the merged params).
    """
    adapter = jl.lora_init(jax.random.key(1), case.params, case.config)
    adapted = weight_space(case.apply)
    x = jax.random.normal(jax.random.key(2), (64, WIDTH))
    y = case.apply(case.params, x) + x.sum(1, keepdims=True) / 4

    def loss(params: Any) -> jax.Array:
        own = dataclasses.replace(adapter, params=params)
        return jnp.mean((adapted(case.params, own, x) - y) ** 2)

    tx = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = adapter.params, tx.init(adapter.params)
    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    tuned = dataclasses.replace(adapter, params=params)
    merged = case.apply(jl.merge(case.params, tuned), x)
    return losses[0], float(loss(params)), float(jnp.mean((merged - y) ** 2))


def main(names: Any = tuple(CASES), steps: int = 300) -> dict[str, tuple[float, float, float]]:
    """Runs what is installed and prints a line for each."""
    results = {}
    for case in cases(names):
        plan = jl.plan(case.params, case.config)
        before, after, merged = results[case.name] = fit(case, steps)
        print(
            f"{case.name}: {plan.num_trainable} of {plan.num_total} parameters, "
            f"loss {before:.4f} -> {after:.4f}, merged {merged:.4f}"
        )
    return results


if __name__ == "__main__":
    main()
