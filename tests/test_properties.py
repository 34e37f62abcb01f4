"""What must hold for every model and every config."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from tests.zoo import CASES, DIFFERENTIABLE, every_differentiable_model, every_model

METHODS = {
    "lora": {},
    "gaussian": {"init": "gaussian", "rank": 3},
    "rslora": {"rslora": True},
    "rank_1": {"rank": 1},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa_fast": {"init": "pissa_fast"},
    "olora": {"init": "olora"},
    "orthogonal": {"init": "orthogonal"},
    "zero_free": {"init": "zero_free"},
    "freeze_a": {"freeze_a": True},
    "bias": {"bias": "all"},
    "dora_pissa_frozen": {"dora": True, "init": "pissa", "freeze_a": True},
}
"""The table of methods. Each runs on each model of the zoo, but for what is listed here."""

REFUSED = {
    ("embed_attend", "dora"): "DoRA's magnitudes do not factor out",
    ("embed_attend", "dora_pissa_frozen"): "freeze_a applies to the table",
    ("embed_attend", "freeze_a"): "freeze_a applies to the table",
    ("fused", "dora"): "fused and dora both apply",
    ("fused", "dora_pissa_frozen"): "fused and dora both apply",
}
"""{(model, method): what the error says}: combinations that make no sense."""

ROUNDED = {
    "dora": "m / n is 1 up to the rounding of two norms",
    "dora_pissa_frozen": "m / n is 1 up to the rounding of two norms",
    "orthogonal": "the product of the factors is zero up to rounding",
}
"""{method: why a fresh adapter changes nothing only up to rounding}."""

OTHER_LAYOUTS = {"scan_axis_2", "scan_attention_axis_3", "scan_attention_axis_-4"}
"""Models whose kernels XLA lays out anew beside factors of rank 1, so that the last bits differ."""

GRADIENTS = {"mlp", "scan_axis_1", "attention", "embed_attend", "expert_params"}
"""The models on which the gradient of every method is compared; that of one is on all of them."""

PAIRS = [
    pytest.param(case, method, id=f"{name}-{method}")
    for name, case in CASES.items()
    for method in METHODS
    if (name, method) not in REFUSED
]
every_pair = pytest.mark.parametrize(("case", "method"), PAIRS)


@functools.cache
def variables_of(name):
    return CASES[name].variables()


def fresh(case, **options):
    """The case's variables and a fresh adapter; a bias mode only where there are biases."""
    variables = variables_of(case.name)
    if not any("bias" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)):
        options = options | {"bias": "none"}
    return variables, _fresh(case.name, tuple(options.items()))


@functools.cache
def _fresh(name, options):
    case = CASES[name]
    config = jl.LoraConfig(**({"targets": case.targets, "rank": 2} | case.options | dict(options)))
    key = jax.random.key(2)
    return jl.lora_init(key, case.model, variables_of(name), config, *case.inputs, **case.kwargs)


def trained(adapter, scale=0.1):
    """The adapter as after training: no leaf is zero."""
    leaves, treedef = jax.tree.flatten(adapter.params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [
        x + scale * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(adapter, params=jax.tree.unflatten(treedef, moved))


def apply(case, variables, adapter):
    run = jax.jit(lambda *a: jl.lora_apply(case.model, *a, *case.inputs, **case.kwargs))
    out = run(variables, adapter)
    return out[0] if "mutable" in case.kwargs else out


def base(case, variables, params=None):
    if params is not None:
        variables = {**variables, "params": params}
    kept = case is CASES[case.name]
    out = (_compiled_base(case.name) if kept else _compile_base(case))(variables)
    return out[0] if "mutable" in case.kwargs else out


def _compile_base(case):
    return jax.jit(lambda v: case.model.apply(v, *case.inputs, **case.kwargs))


@functools.cache
def _compiled_base(name):
    return _compile_base(CASES[name])


def assert_close(left, right, tolerance=1e-5, name=""):
    """To a tolerance relative to the largest element: sums cancel in the small ones."""
    scale = max(1.0, float(np.abs(right).max(initial=0)))
    np.testing.assert_allclose(left, right, 0, tolerance * scale, err_msg=name)


def assert_trees_close(left, right, tolerance=1e-5):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    leaves = jax.tree_util.tree_leaves_with_path(left)
    for (path, x), y in zip(leaves, jax.tree.leaves(right), strict=True):
        assert_close(x, y, tolerance, jax.tree_util.keystr(path))


def assert_trees_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@every_pair
def test_every_method_starts_as_the_base_and_equals_merged(case, method):
    variables, adapter = fresh(case, **METHODS[method])
    start, expected = apply(case, variables, adapter), base(case, variables)
    if method in ROUNDED or (method == "rank_1" and case.name in OTHER_LAYOUTS):
        assert_close(start, expected)
    else:
        np.testing.assert_array_equal(start, expected)
    adapter = trained(adapter)
    unmerged = apply(case, variables, adapter)
    assert_close(unmerged, base(case, variables, jl.merge(variables["params"], adapter)))
    assert np.abs(unmerged - expected).max() > 1e-2


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_a_combination_that_makes_no_sense_is_refused(name, method):
    with pytest.raises(jl.LoraError, match=REFUSED[name, method]):
        fresh(CASES[name], **METHODS[method])


@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(case, method, id=f"{name}-{method}")
        for name, case in DIFFERENTIABLE.items()
        for method in METHODS
        if (name, method) not in REFUSED
        and (
            method == "bias" or name in ("mlp", "scan_axis_1", "attention", "conv", "embed_attend")
        )
    ],
)
def test_gradients_are_those_of_the_merged_model(case, method):
    variables, adapter = fresh(case, **METHODS[method])
    # Wide types: batch normalization in training cancels most of a kernel's gradient, so that
    # float32 leaves three digits of it, and the two ways round differently.
    with jax.enable_x64(case.wide):

        def wide(tree):
            return jax.tree.map(
                lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
            )

        adapter = trained(adapter)
        variables, adapter = wide(variables), wide(adapter)
        case = dataclasses.replace(case, inputs=wide(case.inputs))

        def through_apply(adapter):
            return jnp.sum(jnp.sin(apply(case, variables, adapter)))

        def through_merge(adapter):
            return jnp.sum(jnp.sin(base(case, variables, jl.merge(variables["params"], adapter))))

        got, expected = jax.grad(through_apply)(adapter), jax.grad(through_merge)(adapter)
    tolerance = 1e-9 if case.wide else 1e-4
    assert_trees_close(got.params, expected.params, tolerance)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(got.params))
    assert not any(np.abs(g).max() for g in jax.tree.leaves((got.frozen, expected.frozen)))


def losses_of_training(case, variables, adapter, tx, steps):
    """The losses of some steps; the base stays as it was, and the step is compiled once."""
    adapter = jax.tree.map(jnp.copy, adapter)  # the step donates it
    before = jax.tree.map(np.array, variables)
    goal = base(case, variables) + 0.1

    def loss_fn(adapter, variables, batch, key):
        return jnp.mean((apply(case, variables, adapter) - batch) ** 2)

    step = jl.make_train_step(loss_fn, tx)
    state = jl.TrainState.create(adapter, tx, jax.random.key(4))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, variables, goal)
        losses.append(float(metrics["loss"]))
    assert_trees_equal(jax.tree.map(np.array, variables), before)
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    return losses


@every_differentiable_model
def test_training_leaves_the_base_as_it_was_and_lowers_the_loss(case):
    losses = losses_of_training(case, *fresh(case), optax.adam(1e-4), 5)
    assert losses[-1] < losses[0]


@every_model
def test_save_and_load_are_exact(case, tmp_path):
    variables, adapter = fresh(case, bias="all")
    adapter = trained(adapter)
    jl.save_adapter(tmp_path / "adapter", adapter, params=variables["params"])
    loaded = jl.load_adapter(tmp_path / "adapter", params=variables["params"])
    assert loaded.spec == adapter.spec
    assert hash(loaded.spec) == hash(adapter.spec)
    assert_trees_equal(loaded, adapter)


@every_model
def test_combine_inverts_split(case):
    variables, adapter = fresh(case, bias="all")
    joint = jl.combine(variables["params"], adapter)
    assert_trees_equal(jl.split(joint), (variables["params"], adapter.params))
    assert_trees_equal(jl.split(joint, adapter.spec), (variables["params"], adapter))
    assert_trees_equal(jl.combine(*jl.split(joint)), joint)


@every_model
def test_unmerge_brings_the_base_back_up_to_rounding(case):
    variables, adapter = fresh(case)
    adapter = trained(adapter)
    back = jl.unmerge(jl.merge(variables["params"], adapter), adapter)
    assert_trees_close(back, variables["params"])


@every_model
def test_merging_with_donation_gives_the_same(case):
    variables, adapter = fresh(case, bias="all")
    adapter = trained(adapter)
    expected = jl.merge(variables["params"], adapter)
    spare = jax.tree.map(jnp.copy, variables["params"])
    assert_trees_equal(jl.merge(spare, adapter, donate=True), expected)
    donated = sum(leaf.is_deleted() for leaf in jax.tree.leaves(spare))
    assert donated == len(adapter.spec.sites)


@every_model
def test_one_trace_serves_every_equal_adapter(case, tmp_path):
    variables, adapter = fresh(case)
    jl.save_adapter(tmp_path / "adapter", adapter)
    equivalent = jl.LoraConfig(
        targets=[case.targets] if isinstance(case.targets, str) else reversed(case.targets),
        rank=2,
        **case.options,
    )
    again = jl.lora_init(
        jax.random.key(5), case.model, variables, equivalent, *case.inputs, **case.kwargs
    )
    reloaded = jl.load_adapter(tmp_path / "adapter", params=variables["params"])
    traces = []

    @jax.jit
    def run(variables, adapter):
        traces.append(1)
        return apply(case, variables, adapter)

    for one in (adapter, trained(adapter), reloaded, again):
        run(variables, one)
    assert len(traces) == 1
    assert run._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@every_model
def test_vmap_over_adapters_equals_a_loop(case):
    if case.name == "expert_params":
        pytest.skip("jax: ragged_dot has no batching rule for the dimension of its experts")
    variables, adapter = fresh(case)
    adapters = [trained(adapter, scale) for scale in (0.1, 0.2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    together = jax.vmap(lambda adapter: apply(case, variables, adapter))(stacked)
    for row, one in zip(together, adapters, strict=True):
        assert_close(row, apply(case, variables, one))


@pytest.mark.parametrize("name", ["mlp", "scan", "scan_axis_1", "vmap_experts", "attention"])
def test_the_step_has_no_dot_of_a_frozen_kernels_gradient(name):
    case = CASES[name]
    variables, adapter = fresh(case)

    def loss(adapter, variables):
        return jnp.sum(apply(case, variables, adapter) ** 2)

    def full(variables):
        return jnp.sum(base(case, variables) ** 2)

    layouts = [site.layout for site in adapter.spec.sites]
    sizes = {tuple(sorted(shape)) for at in layouts for shape in (at.own_shape, at.shape)}
    text = jax.jit(jax.grad(loss)).lower(adapter, variables).as_text()
    assert not sizes & _gradient_dot_shapes(text)
    # The same look at full fine-tuning finds them: the test can fail.
    text = jax.jit(jax.grad(full)).lower(variables).as_text()
    assert sizes & _gradient_dot_shapes(text)


def _gradient_dot_shapes(text):
    """The sorted result shapes of all dots of a lowered program."""
    found = set()
    for line in text.splitlines():
        if "dot_general" in line:
            result = line.rsplit("tensor<", 1)[1].split(">")[0]
            shape = tuple(sorted(int(n) for n in result.split("x")[:-1] if n != "1"))
            found.add(shape)
    return found
