"""merge and unmerge: one rounding, plain params, and nothing lost on the way."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxlora as jl
from jaxlora.errors import AdapterError
from tests import zoo

X = jax.random.normal(jax.random.key(5), (5, 8))


def made(model=None, x=X, rank=2, **config):
    """A model, its variables and an adapter in which no leaf is zero."""
    model = model or zoo.Mlp()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    config = jl.LoraConfig(rank=rank, **config)
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    moved = jax.tree.map(lambda p: p + 0.2 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), adapter)
    return model, variables, moved


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def expected_kernel(variables, adapter, name):
    """The merged Dense kernel in plain float32 numpy."""
    leaves = adapter.params[name]
    a, b = (np.asarray(leaves[f"kernel_lora_{part}"], np.float32) for part in "ab")
    kernel = np.asarray(variables["params"][name]["kernel"], np.float32)
    scaling = next(s.scaling for s in adapter.spec.sites if s.path == f"{name}/kernel")
    return kernel + np.float32(scaling) * (a.T @ b)


@pytest.mark.parametrize("name", ["mlp", "scan_axis_1", "attention"])
def test_the_compiled_program_of_the_merged_model_is_that_of_the_base(name):
    case = zoo.CASES[name]
    model, variables, adapter = made(case.model, *case.inputs)
    merged = {"params": jl.merge(variables["params"], adapter)}

    # From one line, since the text holds line numbers.
    text, expected = (
        jax.jit(model.apply).lower(v, *case.inputs).compile().as_text() for v in (merged, variables)
    )
    assert text == expected

    def unmerged(variables, x):
        return jl.lora_apply(model, variables, adapter, x)

    other = jax.jit(unmerged).lower(variables, *case.inputs).compile().as_text()
    assert str(text).count("dot(") < str(other).count("dot(")


def test_merged_params_are_the_plain_sum_and_have_no_lora_leaf():
    _, variables, adapter = made()
    merged = jl.merge(variables["params"], adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])
    for name in ("up", "down"):
        expected = expected_kernel(variables, adapter, name)
        np.testing.assert_allclose(merged[name]["kernel"], expected, 1e-6, 1e-6)
        assert (merged[name]["kernel"] != variables["params"][name]["kernel"]).any()


def test_a_bfloat16_base_is_rounded_once():
    model = zoo.Mlp(jnp.bfloat16, jnp.bfloat16)
    _, variables, adapter = made(model, X.astype(jnp.bfloat16))
    merged = jl.merge(variables["params"], adapter)
    for name in ("up", "down"):
        expected = expected_kernel(variables, adapter, name).astype(ml_dtypes.bfloat16)
        assert merged[name]["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(merged[name]["kernel"]), expected)
        leaves = adapter.params[name]
        a, b = (leaves[f"kernel_lora_{part}"].astype(jnp.bfloat16) for part in "ab")
        twice = variables["params"][name]["kernel"] + 8 * (a.T @ b)
        assert (merged[name]["kernel"] != twice).any()


def test_a_wider_dtype_is_kept_on_request_for_touched_kernels_only():
    model = zoo.Mlp(jnp.bfloat16, jnp.bfloat16)
    _, variables, adapter = made(model, X.astype(jnp.bfloat16), targets="up")
    merged = jl.merge(variables["params"], adapter, dtype=jnp.float32)
    assert merged["up"]["kernel"].dtype == jnp.float32
    expected = expected_kernel(variables, adapter, "up")
    np.testing.assert_allclose(merged["up"]["kernel"], expected, 1e-6, 1e-6)
    assert merged["down"]["kernel"].dtype == jnp.bfloat16
    assert merged["up"]["bias"].dtype == jnp.bfloat16


def test_untouched_leaves_are_the_same_objects_and_the_base_is_not_changed():
    _, variables, adapter = made(targets="up")
    before = jax.tree.map(np.array, variables)
    merged = jl.merge(variables["params"], adapter)
    for scope, name in (("up", "bias"), ("down", "kernel"), ("norm", "scale")):
        assert merged[scope][name] is variables["params"][scope][name]
    assert merged["up"]["kernel"] is not variables["params"]["up"]["kernel"]
    assert_equal(jax.tree.map(np.array, variables), before)


def test_leaves_trained_in_full_replace_the_bases_as_copies():
    _, variables, adapter = made(targets="up", modules_to_save="down")
    merged = jl.merge(variables["params"], adapter)
    trained = jax.tree.map(np.array, adapter.params["down"])
    jax.tree.map(lambda x: x.delete(), adapter)
    np.testing.assert_array_equal(merged["down"]["kernel"], trained["kernel_lora_w"])
    np.testing.assert_array_equal(merged["down"]["bias"], trained["bias_lora_w"])


def test_donation_frees_the_kernels_and_no_other_leaf():
    _, variables, adapter = made(targets="up")
    params = jax.tree.map(jnp.copy, variables["params"])
    kernel = params["up"]["kernel"]
    address = kernel.unsafe_buffer_pointer()
    merged = jl.merge(params, adapter, donate=True)
    assert kernel.is_deleted()
    assert merged["up"]["kernel"].unsafe_buffer_pointer() == address
    rest = [params["up"]["bias"], *jax.tree.leaves((params["down"], params["norm"], adapter))]
    assert not any(x.is_deleted() for x in rest)
    assert_equal(merged, jl.merge(variables["params"], adapter))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_nan_and_inf_are_errors_that_name_the_leaf(value):
    _, variables, adapter = made(modules_to_save="down", targets="up")
    leaves = adapter.params
    factor = leaves["up"]["kernel_lora_b"].at[1, 2].set(value)
    bad = jl.Adapter({**leaves, "up": {**leaves["up"], "kernel_lora_b": factor}}, adapter.spec)
    message = r"The adapter holds NaN or inf in up/kernel_lora_b, expected finite numbers"
    with pytest.raises(AdapterError, match=message):
        jl.merge(variables["params"], bad)
    with pytest.raises(AdapterError, match=message):
        jl.unmerge(variables["params"], bad, base=variables["params"])
    copy = leaves["down"]["kernel_lora_w"].at[0, 0].set(value)
    bad = jl.Adapter({**leaves, "down": {**leaves["down"], "kernel_lora_w": copy}}, adapter.spec)
    with pytest.raises(AdapterError, match=r"NaN or inf in down/kernel_lora_w"):
        jl.merge(variables["params"], bad, donate=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(variables))
    # While tracing nothing is known of the values, and they pass.
    traced = jax.jit(jl.merge)(variables["params"], bad)
    assert not np.isfinite(traced["down"]["kernel"]).all()


def test_the_wrong_base_is_an_error():
    _, variables, adapter = made()
    other = jax.jit(zoo.Mlp().init)(jax.random.key(0), jnp.ones((2, 6)))["params"]
    message = r"Param up/kernel has shape \(6, 12\), the adapter expects \(8, 12\)"
    with pytest.raises(AdapterError, match=message):
        jl.merge(other, adapter)
    with pytest.raises(AdapterError, match=message):
        jl.unmerge(other, adapter)
    lacking = {k: v for k, v in variables["params"].items() if k != "down"}
    with pytest.raises(AdapterError, match=r"have no leaf down/kernel, which the adapter adapts"):
        jl.merge(lacking, adapter)
    with pytest.raises(AdapterError, match=r"have no leaf down/kernel.*there are no params"):
        jl.merge({}, adapter)
    with pytest.raises(AdapterError, match=r"have no leaf down/kernel.*`split` them first"):
        jl.merge(jl.combine(lacking, adapter), adapter)


def test_an_adapter_whose_leaves_are_not_those_of_its_spec_is_an_error():
    _, variables, adapter = made()
    stacked = jax.tree.map(lambda x: x[None], adapter)
    with pytest.raises(AdapterError, match=r"kernel_lora_a has shape \(1, 2, 12\), expected \(2, "):
        jl.merge(variables["params"], stacked)


def test_merge_under_jit_and_grad_gives_what_it_gives_outside():
    model, variables, adapter = made()
    compiled = jax.jit(jl.merge)(variables["params"], adapter)
    eager = jl.merge(variables["params"], adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6, 1e-6), compiled, eager)

    def through_merge(adapter):
        merged = jl.merge(variables["params"], adapter)
        out: Any = model.apply({"params": merged}, X)
        return jnp.sum(jnp.sin(out))

    def through_apply(adapter):
        return jnp.sum(jnp.sin(jl.lora_apply(model, variables, adapter, X)))

    got, expected = (jax.jit(jax.grad(f))(adapter) for f in (through_merge, through_apply))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-5), got, expected)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(got))


def test_merging_twice_adds_twice():
    _, variables, adapter = made(targets="up")
    once = jl.merge(variables["params"], adapter)
    twice = jl.merge(once, adapter)
    delta = once["up"]["kernel"] - variables["params"]["up"]["kernel"]
    np.testing.assert_allclose(twice["up"]["kernel"] - once["up"]["kernel"], delta, 0, 1e-6)


def test_boxed_kernels_come_back_boxed():
    _, variables, adapter = made(zoo.Boxed())
    merged = jl.merge(variables["params"], adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])
    kernel, was = (p["layers"]["dense"]["kernel"] for p in (merged, variables["params"]))
    assert kernel.names == was.names
    assert (kernel.value != was.value).any()


def test_unmerge_needs_the_base_for_leaves_that_were_trained_in_full():
    _, variables, adapter = made(targets="up", modules_to_save="down")
    merged = jl.merge(variables["params"], adapter)
    with pytest.raises(
        AdapterError,
        match=r"cannot bring back what the merge overwrote: down/bias, down/kernel. Expected `ba",
    ):
        jl.unmerge(merged, adapter)
    back = jl.unmerge(merged, adapter, base=variables["params"])
    assert_equal(back["down"], variables["params"]["down"])
    np.testing.assert_allclose(
        back["up"]["kernel"], variables["params"]["up"]["kernel"], 1e-5, 1e-6
    )
    other = jax.jit(zoo.Mlp().init)(jax.random.key(0), jnp.ones((2, 6)))["params"]
    with pytest.raises(AdapterError, match=r"Param up/kernel has shape \(6, 12\)"):
        jl.unmerge(merged, adapter, base=other)
