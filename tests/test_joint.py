"""One tree of base and LoRA leaves: only the LoRA leaves change, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora.errors import AdapterError
from tests import zoo


def base():
    key = jax.random.key(0)
    return {
        "up": {
            "kernel": jax.random.normal(key, (4, 6)).at[0].set(-0.0),
            "bias": jnp.array([0.0, -0.0, 1.0, -1.0, 1e-45, 3.0]),
        },
        "head": {"kernel": jax.random.normal(key, (6, 2), jnp.bfloat16).at[1].set(-0.0)},
    }


def lora():
    key = jax.random.key(1)
    return {
        "up": {
            "kernel_lora_a": jax.random.normal(key, (2, 4)),
            "kernel_lora_b": jax.random.normal(key, (2, 6)),
        },
        "head": {"kernel_lora_w": jax.random.normal(key, (6, 2))},
    }


def gradients(joint, seed):
    leaves, treedef = jax.tree.flatten(joint)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [10 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, made)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 1, 4), weight_decay=0.1),
    "multi_steps": optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), every_k_schedule=2
    ).gradient_transformation(),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_of_the_joint_tree_is_the_same_one_on_the_lora_leaves_alone(tx):
    joint, alone = jl.combine(base(), lora()), lora()
    before = bits(base())
    wrapped = jl.lora_optimizer(tx)

    def advance(optimizer):
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step)

    state, state_alone = wrapped.init(joint), tx.init(alone)
    step, step_alone = advance(wrapped), advance(tx)
    for seed in range(4):
        grads = gradients(joint, seed)
        joint, state = step(joint, state, grads)
        alone, state_alone = step_alone(alone, state_alone, jl.split(grads)[1])
        now, leaves = jl.split(joint)
        assert bits(now) == before
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6, 1e-7), leaves, alone)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), alone, lora())
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_optimizers_state_has_leaves_for_the_lora_leaves_only(tx):
    joint = jl.combine(base(), lora())
    state, alone = jl.lora_optimizer(tx).init(joint), tx.init(lora())
    shapes, expected = (sorted(map(jnp.shape, jax.tree.leaves(s))) for s in (state, alone))
    assert shapes == expected


def test_a_masked_optimizer_without_the_wrapper_would_have_changed_the_base():
    """The reason for `lora_optimizer`, and the proof that the tests above can fail."""
    joint = jl.combine(base(), lora())
    tx = optax.masked(optax.sgd(0.1), jl.lora_mask(joint))
    updates, _ = tx.update(gradients(joint, 0), tx.init(joint), joint)
    assert bits(jl.split(optax.apply_updates(joint, updates))[0]) != bits(base())


def test_the_mask_tells_lora_leaves_and_trained_copies_without_a_spec():
    assert jl.lora_mask(jl.combine(base(), lora())) == {
        "up": {"kernel": False, "bias": False, "kernel_lora_a": True, "kernel_lora_b": True},
        "head": {"kernel": False, "kernel_lora_w": True},
    }


def made(rank=2, **config):
    model, x = zoo.Mlp(), jax.random.normal(jax.random.key(5), (5, 8))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    config = jl.LoraConfig(rank=rank, **config)
    return model, x, variables, jl.lora_init(jax.random.key(1), model, variables, config, x)


def test_modules_to_save_stand_as_named_siblings_that_split_finds():
    _, _, variables, adapter = made(modules_to_save="down")
    joint = jl.combine(variables["params"], adapter)
    assert sorted(joint["down"]) == ["bias", "bias_lora_w", "kernel", "kernel_lora_w"]
    base, leaves = jl.split(joint)
    assert bits(base) == bits(variables["params"])
    assert bits(leaves) == bits(adapter.params)
    assert jl.lora_mask(joint) == jl.lora_mask(joint, adapter.spec)


def test_combine_copies_nothing_and_changes_neither_tree():
    left, right = base(), lora()
    joint = jl.combine(left, right)
    assert joint["up"]["kernel"] is left["up"]["kernel"]
    assert joint["up"]["kernel_lora_a"] is right["up"]["kernel_lora_a"]
    assert sorted(left["up"]) == ["bias", "kernel"]
    assert sorted(right["up"]) == ["kernel_lora_a", "kernel_lora_b"]
    again, leaves = jl.split(joint)
    assert again["up"]["kernel"] is left["up"]["kernel"]
    assert leaves["up"]["kernel_lora_a"] is right["up"]["kernel_lora_a"]
    assert jax.tree.structure((again, leaves)) == jax.tree.structure((left, right))


def test_combining_twice_is_an_error():
    joint = jl.combine(base(), lora())
    with pytest.raises(AdapterError, match=r"Both trees hold up/kernel_lora_a, expected a base"):
        jl.combine(joint, lora())


def test_a_tree_without_lora_leaves_is_an_error():
    for function in (jl.split, jl.lora_mask, jl.lora_optimizer(optax.sgd(0.1)).init):
        with pytest.raises(
            AdapterError, match=r"None of the 3 leaves is a LoRA leaf.*`combine\(params, adapter\)`"
        ):
            function(base())


def test_a_tree_that_lacks_a_leaf_of_the_spec_is_an_error():
    _, _, variables, adapter = made()
    joint = jl.combine(variables["params"], adapter)
    del joint["up"]["kernel_lora_b"]
    with pytest.raises(AdapterError, match=r"lack up/kernel_lora_b, which the spec names"):
        jl.split(joint, adapter.spec)
    with pytest.raises(AdapterError, match=r"lack up/kernel_lora_b, which the spec names"):
        jl.lora_mask(joint, adapter.spec)
    with pytest.raises(AdapterError, match=r"lack up/kernel_lora_b, which the spec names"):
        jl.lora_optimizer(optax.sgd(0.1), adapter.spec).init(joint)


def test_a_leaf_of_another_shape_than_the_spec_is_an_error():
    _, _, variables, adapter = made()
    joint = jl.combine(variables["params"], adapter)
    joint["up"]["kernel_lora_a"] = jnp.ones((3, 8))
    with pytest.raises(
        AdapterError, match=r"up/kernel_lora_a has shape \(3, 8\), expected \(2, 8\)"
    ):
        jl.split(joint, adapter.spec)


def test_a_spec_tells_the_leaves_where_the_base_has_such_names_of_its_own():
    _, _, variables, adapter = made()
    params = {**variables["params"], "own": {"kernel_lora_a": jnp.ones(3)}}
    joint = jl.combine(params, adapter)
    assert jl.lora_mask(joint)["own"]["kernel_lora_a"] is True
    assert jl.lora_mask(joint, adapter.spec)["own"]["kernel_lora_a"] is False
    back, found = jl.split(joint, adapter.spec)
    assert bits(back) == bits(params)
    assert bits(found.params) == bits(adapter.params)
    tx = jl.lora_optimizer(optax.sgd(0.1), adapter.spec)
    updates, _ = tx.update(joint, tx.init(joint), joint)
    stepped = jl.split(optax.apply_updates(joint, updates), adapter.spec)[0]
    assert bits(stepped) == bits(params)


def test_training_the_joint_tree_equals_training_the_adapter_alone():
    model, x, variables, adapter = made(modules_to_save="down", targets="up")
    spec = adapter.spec
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    before = bits(variables["params"])

    def loss(adapter, base):
        return jnp.mean((jl.lora_apply(model, {"params": base}, adapter, x) - 1) ** 2)

    def joint_loss(joint):
        base, adapter = jl.split(joint, spec)
        return loss(adapter, base)

    joint_tx = jl.lora_optimizer(tx)

    @jax.jit
    def joint_step(joint, state):
        updates, state = joint_tx.update(jax.grad(joint_loss)(joint), state, joint)
        return optax.apply_updates(joint, updates), state

    @jax.jit
    def step(adapter, state):
        grads = jax.grad(loss)(adapter, variables["params"])
        updates, state = tx.update(grads.params, state, adapter.params)
        params = optax.apply_updates(adapter.params, updates)
        return jl.Adapter(params, spec), state

    joint, fresh = jl.combine(variables["params"], adapter), adapter
    joint_state, state = joint_tx.init(joint), tx.init(adapter.params)
    for _ in range(3):
        joint, joint_state = joint_step(joint, joint_state)
        adapter, state = step(adapter, state)
    base, together = jl.split(joint, spec)
    assert bits(base) == before
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), together, adapter)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), adapter, fresh)
    assert all(jax.tree.leaves(moved))


def test_signed_zeros_of_the_base_survive_outside_jit_too():
    # Compiled, x + 0.0 is simplified to x; taken literally it turns -0.0 into 0.0.
    params = base()
    params["up"]["bias"] = jnp.array([0.0, -0.0, 1.0])  # XLA's own addition flushes subnormals
    joint, tx = jl.combine(params, lora()), jl.lora_optimizer(optax.sgd(0.1))
    updates, _ = tx.update(gradients(joint, 0), tx.init(joint), joint)
    after, leaves = jl.split(optax.apply_updates(joint, updates))
    assert bits(after) == bits(params)
    assert bits(leaves) != bits(lora())
