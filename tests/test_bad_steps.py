"""Losses and gradients that are not finite: stopped or skipped, with the leaves named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora.errors import ConfigError, RunError
from tests import test_fit
from tests.test_fit import TX, loss_fn, train


class Two(nn.Module):
    dtype: type | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first", dtype=self.dtype)(x)
        return nn.Dense(3, name="second", dtype=self.dtype)(x)


X = jnp.ones((2, 4))
BASE = Two().init(jax.random.key(0), X)


def state_of(tx, **config):
    adapter = jl.lora_init(jax.random.key(1), Two(), BASE, jl.LoraConfig(rank=2, **config), X)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    return jl.TrainState.create(adapter, tx, jax.random.key(2))


def two_loss(adapter, variables, batch, key):
    return jnp.mean(jl.lora_apply(Two(), variables, adapter, batch) ** 2)


def broken_loss(adapter, variables, batch, key):
    """The gradient of one leaf is not finite, the loss is."""
    leaf = adapter.params["first"]["kernel_lora_b"]
    return two_loss(adapter, variables, batch, key) + jnp.sqrt(jnp.sum(jnp.abs(leaf - leaf)))


def values(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.adapter, state.opt_state))]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_step_changes_nothing_but_the_count_and_tells_the_leaf(policy):
    tx = optax.adam(0.1)
    step = jl.make_train_step(broken_loss, tx, on_bad_step=policy)
    before = values(state_of(tx))
    state, metrics = step(state_of(tx), BASE, X)
    assert values(state) == before
    assert int(state.step) == 1
    # first/kernel_lora_a, first/kernel_lora_b, second/kernel_lora_a, second/kernel_lora_b
    np.testing.assert_array_equal(metrics["bad_leaves"], [False, True, False, False])
    assert np.isfinite(metrics["loss"])
    assert ("skipped" in metrics) == (policy == "skip")


def test_good_steps_are_the_same_with_a_policy():
    tx = optax.adam(0.1)
    plain, _ = jl.make_train_step(two_loss, tx)(state_of(tx), BASE, X)
    state, metrics = jl.make_train_step(two_loss, tx, on_bad_step="skip")(state_of(tx), BASE, X)
    assert values(state) == values(plain)
    assert not metrics["skipped"]
    assert not metrics["bad_leaves"].any()


def test_an_overflow_in_bfloat16_is_a_bad_step():
    def loss(adapter, variables, batch, key):
        out = jl.lora_apply(Two(jnp.bfloat16), variables, adapter, batch)
        return jnp.mean(out.astype(jnp.float32) ** 2)

    tx = optax.sgd(0.1)
    step = jl.make_train_step(loss, tx, on_bad_step="skip")
    start = state_of(tx, param_dtype=jnp.bfloat16)
    before = values(start)
    state, metrics = step(start, BASE, X * 3e38)
    assert metrics["skipped"]
    assert values(state) == before


def test_fit_skips_and_goes_on(tmp_path):
    skipping = jl.make_train_step(loss_fn, TX, on_bad_step="skip")
    calls = []

    def step(state, variables, batch):
        calls.append(1)
        if len(calls) == 6:
            batch = batch | {"weight": batch["weight"] * np.nan}
        return skipping(state, variables, batch)

    result = train(tmp_path / "run", step=step)
    assert int(result.state.step) == 15
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.adapter))


@pytest.mark.parametrize(("policy", "number"), [("stop", 6), ("skip", 25)])
def test_fit_stops_and_names_the_leaves(policy, number, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.fit._MOST_SKIPPED", 20)
    compiled = jl.make_train_step(loss_fn, TX, on_bad_step=policy)
    calls = []

    def step(state, variables, batch):
        calls.append(1)
        if len(calls) >= 6:
            batch = batch | {"weight": batch["weight"] * np.nan}
        return compiled(state, variables, batch)

    monkeypatch.setattr(test_fit, "batches", lambda: batches_of(8))
    match = rf"of step {number} is nan.*gradients of 4 of 4 leaves, head/bias_lora_w, head"
    with pytest.raises(RunError, match=match):
        train(tmp_path / "run", step=step)


def batches_of(epochs):
    from jaxlora.batches import Batches
    from tests.test_fit import examples

    return Batches(examples(), 5, lengths=(4, 12), epochs=epochs, seed=3)


def test_debug_nans_finds_the_operation():
    def loss(adapter, variables, batch, key):
        return jnp.log(two_loss(adapter, variables, batch, key) * 0 - 1)

    step = jl.make_train_step(loss, optax.sgd(0.1))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        step(state_of(optax.sgd(0.1)), BASE, X)
    good = jl.make_train_step(two_loss, optax.sgd(0.1))
    with jax.debug_nans(True):  # and nothing of ours trips it
        good(state_of(optax.sgd(0.1)), BASE, X)


def test_a_whole_run_is_clean_under_debug_nans(tmp_path):
    with jax.debug_nans(True):
        assert not train(tmp_path / "run").stopped


def test_a_policy_that_there_is_not():
    policy: object = "ignore"
    with pytest.raises(ConfigError, match="on_bad_step is 'ignore', expected 'stop', 'skip'"):
        jl.make_train_step(two_loss, optax.sgd(0.1), on_bad_step=policy)  # type: ignore[arg-type]
