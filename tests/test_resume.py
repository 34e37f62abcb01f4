"""The state of a run: exact, whole or not there, and refused where it does not fit."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora.checkpoint import recover
from jaxlora.errors import CheckpointError
from jaxlora.resume import load_state, save_state

MODEL, X = nn.Dense(3), jnp.ones((2, 4))
VARIABLES = MODEL.init(jax.random.key(0), X)
PARAMS = VARIABLES["params"]
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def fresh(rank=2, tx=TX, **config):
    config = jl.LoraConfig(rank=rank, **config)
    adapter = jl.lora_init(jax.random.key(1), MODEL, VARIABLES, config, X)
    return jl.TrainState.create(adapter, tx, jax.random.key(2))


def stepped(steps=3):
    def loss(adapter, variables, batch, key):
        return jnp.mean(jl.lora_apply(MODEL, variables, adapter, batch) ** 2)

    step, state = jl.make_train_step(loss, TX), fresh()
    for _ in range(steps):
        state, _ = step(state, VARIABLES, X)
    return state, step


def leaves(state):
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_every_leaf_comes_back_and_the_next_step_is_the_same(tmp_path):
    state, step = stepped()
    compiled_step: Any = step
    save_state(tmp_path / "last", state, {"data": {"next": 3}}, params=PARAMS)
    found, about = load_state(tmp_path / "last", fresh(), params=PARAMS)
    assert about == {"data": {"next": 3}}
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x, y in zip(leaves(found), leaves(state), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
    pair = [leaves(step(s, VARIABLES, X)[0]) for s in (found, state)]
    assert all(x.tobytes() == y.tobytes() for x, y in zip(*pair, strict=True))
    compiled = compiled_step._cache_size()  # a state that came back compiles nothing
    step(load_state(tmp_path / "last", fresh())[0], VARIABLES, X)
    assert compiled_step._cache_size() == compiled


def test_it_is_an_adapter_as_well(tmp_path):
    state, _ = stepped()
    save_state(tmp_path / "last", state, params=PARAMS)
    adapter = jl.load_adapter(tmp_path / "last", params=PARAMS)
    jax.tree.map(np.testing.assert_array_equal, adapter, state.adapter)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_key_keeps_its_kind(impl, tmp_path):
    state = dataclasses.replace(fresh(), key=jax.random.key(5, impl=impl))
    save_state(tmp_path / "last", state)
    found, _ = load_state(tmp_path / "last", fresh())
    assert found.key.dtype == state.key.dtype
    assert (jax.random.key_data(found.key) == jax.random.key_data(state.key)).all()


def test_a_replacement_that_was_killed_between_its_renames_is_finished(tmp_path):
    state, _ = stepped()
    save_state(tmp_path / "last", fresh())
    save_state(tmp_path / "elsewhere", state)
    aside = tmp_path / "last.replaced-x"
    aside.mkdir()
    (tmp_path / "last").rename(aside / "old")
    (tmp_path / "elsewhere").rename(aside / "new")
    assert int(load_state(tmp_path / "last", fresh())[0].step) == 3
    assert aside.exists()  # reading takes nothing away: it may be a save that is under way
    recover(tmp_path / "last", tidy=True)
    assert not aside.exists()
    assert (tmp_path / "last").is_dir()


def test_a_replacement_that_was_killed_earlier_leaves_the_old_one(tmp_path):
    save_state(tmp_path / "last", fresh())
    (tmp_path / "last.replaced-x" / "new.orbax-checkpoint-tmp").mkdir(parents=True)
    assert int(load_state(tmp_path / "last", fresh())[0].step) == 0


def test_what_does_not_fit_is_named(tmp_path):
    save_state(tmp_path / "last", fresh())
    with pytest.raises(CheckpointError, match="an adapter of another config"):
        load_state(tmp_path / "last", fresh(rank=3))
    with pytest.raises(CheckpointError, match=r"another optimizer: it lacks .*trace"):
        load_state(tmp_path / "last", fresh(tx=optax.sgd(0.1, momentum=0.9)))
    jl.save_adapter(tmp_path / "plain", fresh().adapter)
    with pytest.raises(CheckpointError, match="without the state of its run"):
        load_state(tmp_path / "plain", fresh())
    with pytest.raises(CheckpointError, match="There is no folder"):
        load_state(tmp_path / "none", fresh())


def test_damage_is_found(tmp_path):
    save_state(tmp_path / "last", fresh())
    file = tmp_path / "last" / "run" / "metadata"
    file.write_text(file.read_text().replace('"checksums": {', '"checksums": {"x": 1, ', 1))
    text = re.sub(r'"sum": \d+', '"rest": 0', file.read_text())
    number = text.split('"opt_state/1/0/count": ')[1].split(",")[0].split("}")[0]
    file.write_text(text.replace(f'"opt_state/1/0/count": {number}', '"opt_state/1/0/count": 1'))
    with pytest.raises(CheckpointError, match="opt_state/1/0/count does not have the checksum"):
        load_state(tmp_path / "last", fresh())
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(tmp_path / "last", fresh())
