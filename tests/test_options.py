"""Layer ranges, trained rows of a table, weight space, LoRA+ and reset."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora import tree
from tests.test_properties import apply, assert_close, base, fresh, trained
from tests.zoo import CASES, Mlp, Unserved

IDS = CASES["embed_attend"].inputs[0] + 1


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(4):
            x = x + nn.tanh(nn.Dense(8, name=f"layer_{n}")(x))
        return nn.Dense(3, name="head")(x)


def plan(model, *inputs, **options):
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jl.plan(model, variables, jl.LoraConfig(**options), *inputs)


def test_layers_picks_by_the_number_in_the_path():
    x = jnp.ones((2, 8))
    planned = plan(Stacked(), x, layers=range(2, 4))
    assert [site.path for site in planned.sites] == ["layer_2/kernel", "layer_3/kernel"]
    config = jl.LoraConfig(layers=range(2, 4))
    assert config == jl.LoraConfig(layers=[3, 2]) == jl.LoraConfig.from_json(config.to_json())
    with pytest.raises(
        jl.LoraError, match="layers names 4, 5, but the targets lie in the layers 0"
    ):
        plan(Stacked(), x, layers=range(3, 6))
    with pytest.raises(jl.LoraError, match="are one kernel, adapted together"):
        plan(CASES["scan"].model, x, layers=[0])
    with pytest.raises(jl.LoraError, match=r"layers is \[\], expected one or more integers"):
        jl.LoraConfig(layers=[])


def rows_adapter():
    case = CASES["embed_attend"]
    variables = case.variables()
    config = jl.LoraConfig(rank=2, targets="mix", token_rows={"embed": [10, 4]})
    adapter = jl.lora_init(jax.random.key(0), case.model, variables, config, IDS)
    return case, variables, adapter


def test_token_rows_are_trained_in_lookups_and_in_the_tied_head():
    case, variables, adapter = rows_adapter()
    run = jax.jit(lambda a: jl.lora_apply(case.model, variables, a, IDS))
    np.testing.assert_array_equal(run(adapter), case.model.apply(variables, IDS))
    table = variables["params"]["embed"]["embedding"]
    np.testing.assert_array_equal(
        adapter.params["embed"]["embedding_lora_t"], table[jnp.array([4, 10])]
    )
    adapter = trained(adapter)
    merged = jl.merge(variables["params"], adapter)
    changed = np.flatnonzero(np.any(np.asarray(merged["embed"]["embedding"] != table), -1))
    np.testing.assert_array_equal(changed, [4, 10])
    assert_close(run(adapter), case.model.apply({"params": merged}, IDS))

    def through(apply):
        return jax.grad(lambda a: jnp.sum(jnp.sin(apply(a))))(adapter).params

    got = through(lambda a: jl.lora_apply(case.model, variables, a, IDS))
    expected = through(
        lambda a: case.model.apply({"params": jl.merge(variables["params"], a)}, IDS)
    )
    jax.tree.map(assert_close, got, expected)
    back = jl.unmerge(merged, adapter, base=variables["params"])
    np.testing.assert_array_equal(back["embed"]["embedding"], table)


def test_token_rows_save_and_load_and_show_in_the_plan(tmp_path):
    case, variables, adapter = rows_adapter()
    jl.save_adapter(tmp_path / "rows", adapter, params=variables["params"])
    loaded = jl.load_adapter(tmp_path / "rows", params=variables["params"])
    assert loaded.spec == adapter.spec
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    table = str(jl.plan(case.model, variables, adapter.spec.config, IDS))
    assert "embed/embedding  2 rows trained  (11, 6)" in table


def test_training_rows_forms_no_gradient_of_the_table():
    case, variables, adapter = rows_adapter()

    def tables(loss):
        text = jax.jit(jax.grad(loss)).lower(adapter, variables).as_text()
        return text.count("-> tensor<11x6xf32>")

    def branch(adapter, variables):
        return jnp.sum(apply(case, variables, adapter))

    def weights(adapter, variables):
        return jnp.sum(base(case, variables, jl.merge(variables["params"], adapter)))

    assert tables(branch) == 0
    assert tables(weights) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": "mix", "token_rows": {"embed": [11]}},
            "row 11 of embed/embedding, which has 11",
        ),
        ({"targets": "embed", "token_rows": {"embed": [1]}}, "adapted or trained in full as well"),
        ({"targets": "mix", "token_rows": {"mix": [1]}}, "no layer looks it up by integers"),
        ({"targets": "mix", "token_rows": {"emb": [1]}}, "token_rows pattern 'emb' matched none"),
        ({"targets": "mix", "token_rows": {"embed": [1, 1]}}, "each of them once"),
    ],
)
def test_rows_that_make_no_sense_are_an_error(options, message):
    with pytest.raises(jl.LoraError, match=message):
        plan(CASES["embed_attend"].model, IDS, **options)


def test_what_no_rule_serves_asks_for_weight_space_and_gets_it():
    x = CASES["unserved"].inputs[0]
    with pytest.raises(jl.LoraError, match='mode="weights"'):
        plan(Unserved(), x, targets="OptimizedLSTMCell_0/.*")
    with pytest.raises(jl.LoraError, match='mode="weights"'):
        plan(Unserved(), x, targets="dense")
    planned = plan(Unserved(), x, targets="dense", mode="weights")
    assert [(site.path, site.weights) for site in planned.sites] == [("dense/kernel", True)]
    assert "(weights)" in str(planned)
    # Layers that a rule serves keep the branch.
    assert not any(site.weights for site in plan(Mlp(), jnp.ones((2, 8)), mode="weights").sites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has 3 axes in .*, and no rule tells what they are; roles gives 'nothing'.*'bio'"),
        ({"roles": {"wi": "io"}}, "roles gives 'io'"),
        ({"roles": {"w[io]": "bio"}, "dropout": 0.1}, "nothing to drop"),
        ({"roles": {"w[io]": "bix"}}, "expected letters i, o and b"),
        ({"roles": {"w[io]": "bio", "up": "io"}}, "roles pattern 'up' matched none"),
    ],
)
def test_weight_space_says_what_it_needs(options, message):
    case = CASES["expert_params"]
    with pytest.raises(jl.LoraError, match=message):
        plan(case.model, *case.inputs, targets=("wi", "wo"), mode="weights", **options)


def test_experts_have_factors_of_their_own():
    case = CASES["expert_params"]
    _, adapter = fresh(case)
    shapes = {path: leaf.shape for path, leaf in tree.items(adapter.params)}
    # (experts, layers, rank, in) and (experts, layers, rank, out): the scan's axis is 1.
    assert shapes["layers/wi_lora_a"] == (3, 2, 2, 8)
    assert shapes["layers/wo_lora_b"] == (3, 2, 2, 8)


def test_lora_plus_is_another_learning_rate_for_b():
    _, adapter = fresh(CASES["mlp"])
    params = trained(adapter).params
    grads = jax.tree.map(jnp.sin, params)
    found, slow, fast = params, params, params
    tx = jl.lora_plus(optax.adamw(1e-2), ratio=4)
    txs = optax.adamw(1e-2), optax.adamw(4e-2)
    state, states = tx.init(params), [t.init(params) for t in txs]
    for _ in range(3):
        updates, state = tx.update(grads, state, found)
        found = optax.apply_updates(found, updates)
        updates, states[0] = txs[0].update(grads, states[0], slow)
        slow = optax.apply_updates(slow, updates)
        updates, states[1] = txs[1].update(grads, states[1], fast)
        fast = optax.apply_updates(fast, updates)
    expected = tree.nested(
        {
            p: (dict(tree.items(fast)) if p.endswith("b") else dict(tree.items(slow)))[p]
            for p, _ in tree.items(slow)
        }
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), found, expected)
    with pytest.raises(jl.LoraError, match="ratio is 0, expected a number above 0"):
        jl.lora_plus(optax.sgd(1.0), ratio=0)


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"dora": True}, {"bias": "all"}])
def test_reset_merges_and_starts_afresh(options):
    case = CASES["mlp"]
    variables, adapter = fresh(case, **options)
    adapter = trained(adapter)
    params, again = jl.reset(jax.random.key(5), variables["params"], adapter)
    assert again.spec == adapter.spec
    start = apply(case, {"params": params}, again)
    assert_close(start, apply(case, variables, adapter))
    assert_close(start, base(case, variables, params))


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"freeze_a": True}])
def test_frozen_leaves_are_saved_and_never_trained(options, tmp_path):
    variables, adapter = fresh(CASES["scan_axis_1"], **options)
    adapter = trained(adapter)
    jl.save_adapter(tmp_path / "adapter", adapter, params=variables["params"])
    loaded = jl.load_adapter(tmp_path / "adapter", params=variables["params"])
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)

    joint = jl.combine(variables["params"], adapter)
    base_again, split = jl.split(joint, adapter.spec)
    jax.tree.map(np.testing.assert_array_equal, (base_again, split), (variables["params"], adapter))
    for path, trains in tree.items(jl.lora_mask(joint)):
        assert trains == (path in adapter.spec.leaf_shapes), path
    tx = jl.lora_optimizer(optax.adamw(0.1, weight_decay=0.5))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, joint), tx.init(joint), joint)
    moved = optax.apply_updates(joint, updates)
    for path, leaf in tree.items(moved):
        same = np.array_equal(leaf, tree.flat(joint)[path])
        assert same == (not tree.is_trained_name(path)), path
