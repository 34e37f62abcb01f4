"""Four virtual CPU devices give what one gives, by pmap and by jit with shardings.

They are made in a process of their own: the number of devices is fixed when JAX starts.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SETUP = """
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_default_matmul_precision", "highest")
    import jaxlora as jl
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from tests.zoo import CASES

    case = CASES["scan_axis_1"]
    model, variables = case.model, case.variables()
    x = jax.random.normal(jax.random.key(5), (8, 8))
    y = jax.random.normal(jax.random.key(6), (8, 3))
    adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)

    def loss_fn(adapter, variables, batch, key):
        out = jl.lora_apply(model, variables, adapter, batch["x"])
        return jnp.mean((out - batch["y"]) ** 2)

    def run(step, state, variables, batch, steps=5):
        losses = []
        for _ in range(steps):
            state, metrics = step(state, variables, batch)
            losses.append(np.asarray(metrics["loss"]).ravel()[0])
        return state, np.array(losses)

    def fresh():
        return jl.TrainState.create(jax.tree.map(jnp.copy, adapter), tx, jax.random.key(2))

    def same(left, right):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), left, right)

    tx = optax.adam(1e-2)
    batch = {"x": x, "y": y}
    one, losses = run(jl.make_train_step(loss_fn, tx), fresh(), variables, batch)
    assert losses[-1] < losses[0] and len(jax.devices()) == 4
"""

PMAP = """
    rows = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), batch)
    copies = jax.tree.map(lambda a: jnp.stack([a] * 4), fresh())
    step = jl.make_train_step(loss_fn, tx, axis_name="batch")
    four, found = run(step, copies, variables, rows)
    np.testing.assert_allclose(found, losses, 1e-5, 1e-6)
    for device in range(4):
        same(jax.tree.map(lambda a: a[device], four.adapter), one.adapter)
"""

SHARDED = """
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    def put(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))
    kernels = jax.tree.map(
        lambda a: put(a, P(*[None] * (a.ndim - 1), "model") if a.shape[-1] % 2 == 0 else P()),
        variables,
    )
    four, found = run(
        jl.make_train_step(loss_fn, tx), put(fresh(), P()), kernels, put(batch, P("data"))
    )
    np.testing.assert_allclose(found, losses, 1e-5, 1e-6)
    same(four.adapter, one.adapter)
    same(jl.merge(kernels["params"], four.adapter), jl.merge(variables["params"], one.adapter))
"""

SEQUENCES = """
    import re
    import flax.linen as nn

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(x)))

    model, x = Mlp(), jax.random.normal(jax.random.key(5), (4, 32, 16))
    variables = model.init(jax.random.key(0), x)
    adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
    def gradient(adapter, variables, x):
        return jax.grad(lambda a: jnp.mean(jl.lora_apply(model, variables, a, x) ** 2))(adapter)
    mesh = jax.make_mesh((2, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data", "seq"))
    step = jax.jit(gradient, in_shardings=(whole, whole, rows), out_shardings=whole)
    text = step.lower(adapter, variables, x).compile().as_text()
    collectives = r" (all-gather|all-to-all|collective-permute|all-reduce)"
    assert set(re.findall(collectives, text)) == {"all-reduce"}, text
    found = step(adapter, variables, jax.device_put(x, rows))
    same(found, jax.jit(gradient)(adapter, variables, x))
"""

WAYS = {"pmap": PMAP, "jit_sharded": SHARDED, "sharded_sequences_stay_where_they_are": SEQUENCES}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_four_devices_train_as_one(way):
    script = textwrap.dedent(SETUP) + textwrap.dedent(way)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
