"""The train and eval steps: one program, the base untouched, the same on a device mesh of one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from tests import zoo

TX = optax.adam(1e-2)
X = jax.random.normal(jax.random.key(5), (5, 8))
Y = jax.random.normal(jax.random.key(6), (5, 4))
MODEL = zoo.Mlp()


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), X)


def fresh(variables, **config):
    config = jl.LoraConfig(rank=2, **config)
    return jl.lora_init(jax.random.key(1), MODEL, variables, config, X)


def loss_fn(adapter, variables, batch, key):
    x, y = batch
    out = jl.lora_apply(MODEL, variables, adapter, x, rngs={"dropout": key})
    return jnp.mean((out - y) ** 2)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), left, right)


def raw(state):
    """The state with its key as plain words, which numpy can compare."""
    return {
        "step": state.step,
        "adapter": state.adapter,
        "opt_state": state.opt_state,
        "key": jax.random.key_data(state.key),
    }


def test_steps_are_those_of_optax_on_the_adapters_leaves(variables):
    adapter = fresh(variables)
    expected, opt_state = adapter.params, TX.init(adapter.params)

    def loss(params):
        return loss_fn(jl.Adapter(params, adapter.spec), variables, (X, Y), jax.random.key(0))

    losses, norms = [], []
    for _ in range(3):
        value, grads = jax.jit(jax.value_and_grad(loss))(expected)
        updates, opt_state = TX.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
        losses.append(value)
        norms.append(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))

    step = jl.make_train_step(loss_fn, TX)
    state = jl.TrainState.create(fresh(variables), TX, jax.random.key(2))
    for i in range(3):
        assert int(state.step) == i
        state, metrics = step(state, variables, (X, Y))
        np.testing.assert_allclose(metrics["loss"], losses[i], 1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norms[i], 1e-5)
        assert sorted(metrics) == ["grad_norm", "loss"]
    assert int(state.step) == 3
    assert_close(state.adapter.params, expected)
    assert_close(state.opt_state, opt_state)


def test_the_step_compiles_once_and_donates_the_state_but_not_the_base(variables):
    before = jax.tree.map(np.array, variables)
    step = jl.make_train_step(loss_fn, TX)
    state = jl.TrainState.create(fresh(variables, dropout=0.1), TX, jax.random.key(2))
    for _ in range(4):
        previous = state
        state, _ = step(state, variables, (X, Y))
        deleted = [x.is_deleted() for x in jax.tree.leaves((previous.adapter, previous.opt_state))]
        assert all(deleted)
        assert not any(x.is_deleted() for x in jax.tree.leaves((state, variables, X, Y)))
    assert_equal(jax.tree.map(np.array, variables), before)
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_the_base_survives_even_where_the_adapter_trains_copies_of_it(variables):
    before = jax.tree.map(np.array, variables)
    step = jl.make_train_step(loss_fn, TX)
    adapter = fresh(variables, modules_to_save="down", targets="up")
    state = jl.TrainState.create(adapter, TX, jax.random.key(2))
    state, _ = step(state, variables, (X, Y))
    assert_equal(jax.tree.map(np.array, variables), before)
    trained = state.adapter.params["down"]["kernel_lora_w"]
    assert (trained != variables["params"]["down"]["kernel"]).all()


def test_each_step_has_a_key_of_its_own(variables):
    def key_loss(adapter, variables, batch, key):
        words = jax.random.key_data(key).astype(jnp.uint32)
        return loss_fn(adapter, variables, batch, key), {"key": words}

    step = jl.make_train_step(key_loss, TX, has_aux=True)
    state = jl.TrainState.create(fresh(variables), TX, jax.random.key(2))
    seen = []
    for i in range(3):
        state, metrics = step(state, variables, (X, Y))
        expected = jax.random.key_data(jax.random.fold_in(jax.random.key(2), i))
        np.testing.assert_array_equal(metrics["key"], expected)
        seen.append(tuple(metrics["key"].tolist()))
    assert len(set(seen)) == 3
    assert_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(2)))


def test_auxiliary_metrics_stand_beside_loss_and_grad_norm(variables):
    def with_aux(adapter, variables, batch, key):
        loss = loss_fn(adapter, variables, batch, key)
        return loss, {"twice": 2 * loss}

    step = jl.make_train_step(with_aux, TX, has_aux=True)
    state = jl.TrainState.create(fresh(variables), TX, jax.random.key(2))
    _, metrics = step(state, variables, (X, Y))
    assert sorted(metrics) == ["grad_norm", "loss", "twice"]
    np.testing.assert_array_equal(metrics["twice"], 2 * metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_the_step_under_pmap_on_one_device_equals_the_jitted_one(variables):
    jitted = jl.make_train_step(loss_fn, TX)
    mapped = jl.make_train_step(loss_fn, TX, axis_name="devices")
    state = jl.TrainState.create(fresh(variables), TX, jax.random.key(2))
    stacked = jax.tree.map(
        lambda x: jnp.array(x)[None], jl.TrainState.create(fresh(variables), TX, jax.random.key(2))
    )
    for _ in range(3):
        state, metrics = jitted(state, variables, (X, Y))
        stacked, mapped_metrics = mapped(stacked, variables, (X[None], Y[None]))
        assert_close(jax.tree.map(lambda x: x[0], mapped_metrics), metrics)
    assert_close(raw(jax.tree.map(lambda x: x[0], stacked)), raw(state))


def test_under_pmap_each_device_folds_its_own_index_into_the_key(variables):
    def key_loss(adapter, variables, batch, key):
        return loss_fn(adapter, variables, batch, key), {"draw": jax.random.uniform(key, (3,))}

    step = jl.make_train_step(key_loss, TX, has_aux=True, axis_name="devices")
    state = jl.TrainState.create(fresh(variables), TX, jax.random.key(2))
    stacked = jax.tree.map(lambda x: jnp.array(x)[None], state)
    _, metrics = step(stacked, variables, (X[None], Y[None]))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), 0)
    np.testing.assert_array_equal(metrics["draw"][0], jax.random.uniform(key, (3,)))


def metric_fn(adapter, variables, batch):
    x, y = batch
    out = jl.lora_apply(MODEL, variables, adapter, x)
    return {"loss": jnp.mean((out - y) ** 2), "largest": jnp.max(out)}


def test_the_eval_step_gives_the_metrics_and_donates_nothing(variables):
    adapter = jax.tree.map(lambda x: x + 0.1, fresh(variables, dropout=0.5))
    evaluate = jl.make_eval_step(metric_fn)
    first = evaluate(adapter, variables, (X, Y))
    assert_close(first, metric_fn(adapter, variables, (X, Y)))
    assert_equal(evaluate(adapter, variables, (X, Y)), first)
    assert evaluate._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    assert not any(x.is_deleted() for x in jax.tree.leaves((adapter, variables)))


def test_the_eval_step_under_pmap_on_one_device_equals_the_jitted_one(variables):
    adapter = jax.tree.map(lambda x: x + 0.1, fresh(variables))
    mapped = jl.make_eval_step(metric_fn, axis_name="devices")
    stacked = jax.tree.map(lambda x: x[None], adapter)
    got = mapped(stacked, variables, (X[None], Y[None]))
    assert_close(jax.tree.map(lambda x: x[0], got), metric_fn(adapter, variables, (X, Y)))
