"""`lora_apply` traced by many threads at once, and inside of another `lora_apply`."""

import concurrent.futures
import threading
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxlora as jl


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.tanh(nn.Dense(8, name="inner")(x)))


X = jnp.linspace(-1, 1, 8).reshape(2, 4)
MODEL: Any = Net()
BASE: Any = MODEL.init(jax.random.key(0), X)


def adapter_of(seed, targets="all-linear"):
    config = jl.LoraConfig(rank=1 + seed % 3, targets=targets, alpha=8)
    adapter = jl.lora_init(jax.random.key(seed), MODEL, BASE, config, X)
    return jax.tree.map(lambda x: x + 0.1 * (seed + 1), adapter)


def merged(variables, adapter, x) -> Any:
    return MODEL.apply({"params": jl.merge(variables["params"], adapter)}, x)


def test_threads_that_trace_at_once_each_get_their_own():
    adapters = [adapter_of(n, ("inner", "out", "all-linear")[n % 3]) for n in range(8)]
    start = threading.Barrier(len(adapters))

    def traced(adapter):
        start.wait()
        out: Any = None
        base: Any = None
        for _ in range(2):  # a function of its own each time: it is traced anew
            apply = jax.jit(lambda a, x: jl.lora_apply(MODEL, BASE, a, x))
            out = apply(adapter, X)
            base = jax.jit(lambda v, x: MODEL.apply(v, x))(BASE, X)
        return out, base

    with concurrent.futures.ThreadPoolExecutor(len(adapters)) as pool:
        found = list(pool.map(traced, adapters))
    for adapter, (out, base) in zip(adapters, found, strict=True):
        np.testing.assert_allclose(out, merged(BASE, adapter, X), 1e-5, 1e-5)
        np.testing.assert_allclose(base, MODEL.apply(BASE, X), 1e-6, 1e-6)


class Outer(nn.Module):
    """Runs a whole adapted model inside of its own call."""

    inner: jl.Adapter

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4, name="before")(x)
        z = jl.lora_apply(MODEL, BASE, self.inner, y)
        return nn.Dense(2, name="after")(z)


def test_an_adapter_inside_of_another_ones_call_adds_its_own_and_no_more():
    inner = adapter_of(1)
    before: Any = nn.Dense(4)
    outer: Any = Outer(inner)
    variables: Any = outer.init(jax.random.key(3), X)
    adapter = jl.lora_init(jax.random.key(4), outer, variables, jl.LoraConfig(rank=2), X)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    assert {s.path for s in adapter.spec.sites} == {"before/kernel", "after/kernel"}
    params: Any = jl.merge(variables["params"], adapter)
    y = X @ params["before"]["kernel"] + params["before"]["bias"]
    z = merged(BASE, inner, y)
    expected = z @ params["after"]["kernel"] + params["after"]["bias"]
    for apply in (lambda f: f, jax.jit):
        found = apply(lambda a: jl.lora_apply(outer, variables, a, X))(adapter)
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
    np.testing.assert_allclose(
        outer.apply(variables, X),
        merged(BASE, inner, before.apply({"params": variables["params"]["before"]}, X))
        @ variables["params"]["after"]["kernel"]
        + variables["params"]["after"]["bias"],
        1e-5,
        1e-5,
    )
