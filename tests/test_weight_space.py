"""Any function of params: trees without a module, and the libraries that have them."""

import runpy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora.errors import AdapterError, ConfigError, ModelError, TargetError
from jaxlora.weight_space import plan, weight_space
from tests.test_properties import assert_close, assert_trees_close, assert_trees_equal, trained

EXAMPLE = Path(__file__).parent.parent / "examples" / "any_function.py"


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array


def normal(n, *shape):
    return jax.random.normal(jax.random.key(n), shape)


X = normal(0, 5, 8)
PARAMS = {
    "layers": [Layer(normal(1, 8, 6), normal(2, 6)), Layer(normal(3, 6, 4), normal(4, 4))],
    "experts": normal(5, 3, 4, 2),
    "name": "a leaf that is no array",
}


def run(params, x, scale=1.0):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer.w + layer.b)
    return scale * jnp.einsum("td,edo->eto", x, params["experts"])


def adapter_of(targets=("w", "experts"), roles=(("experts", "bio"),), **options):
    config = jl.LoraConfig(rank=2, targets=targets, roles=roles, **options)
    return jl.lora_init(jax.random.key(6), PARAMS, config)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"init": "pissa"}])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_is_w_plus_ba(options):
    adapter = adapter_of(**options)
    assert_close(weight_space(run)(PARAMS, adapter, X), run(PARAMS, X))
    adapter = trained(adapter)
    out = weight_space(run)(PARAMS, adapter, X, scale=2.0)
    merged = jl.merge(PARAMS, adapter)
    np.testing.assert_array_equal(out, run(merged, X, scale=2.0))
    assert np.abs(out - run(PARAMS, X, scale=2.0)).max() > 1e-2
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert merged["name"] is PARAMS["name"]
    assert merged["layers"][0].b is PARAMS["layers"][0].b
    if not options:
        a, b = (adapter.params["layers"]["0"][f"w_lora_{part}"] for part in "ab")
        assert_close(merged["layers"][0].w, PARAMS["layers"][0].w + 8.0 * a.T @ b)
        a, b = (adapter.params[f"experts_lora_{part}"] for part in "ab")
        assert_close(merged["experts"], PARAMS["experts"] + 8.0 * jnp.einsum("eri,ero->eio", a, b))


def test_the_gradient_is_that_of_the_function_at_the_sum():
    adapter = trained(adapter_of(targets="layers/0/w", roles=()))

    def loss(adapter):
        return jnp.mean(weight_space(run)(PARAMS, adapter, X) ** 2)

    def at_kernel(w):
        first = PARAMS["layers"][0]._replace(w=w)
        return jnp.mean(run(PARAMS | {"layers": [first, PARAMS["layers"][1]]}, X) ** 2)

    found = jax.jit(jax.grad(loss))(adapter).params["layers"]["0"]
    dense = jax.grad(at_kernel)(jl.merge(PARAMS, adapter)["layers"][0].w)
    a, b = (adapter.params["layers"]["0"][f"w_lora_{part}"] for part in "ab")
    expected = {"w_lora_a": 8.0 * b @ dense.T, "w_lora_b": 8.0 * a @ dense}
    assert_trees_close(found, expected)


def test_the_plan_says_what_is_adapted_and_how():
    text = str(jl.plan(PARAMS, jl.LoraConfig(rank=2, targets="w")))
    assert "layers/0/w  params (weights)  (8, 6)  2     8                28" in text
    transposed = {"weight": normal(1, 6, 8)}
    config = jl.LoraConfig(rank=2, targets="weight", roles={"weight": "oi"})
    adapter = jl.lora_init(jax.random.key(0), transposed, config)
    assert jax.tree.map(jnp.shape, adapter.params) == {
        "weight_lora_a": (2, 8),
        "weight_lora_b": (2, 6),
    }
    kernels = {"a": {"kernel": normal(1, 3, 4), "other": normal(2, 4, 4)}}
    assert [site.path for site in jl.plan(kernels, jl.LoraConfig(rank=2)).sites] == ["a/kernel"]


def test_leaves_are_trained_in_full_and_adapters_are_saved_as_ever(tmp_path):
    adapter = trained(adapter_of(targets="w", roles=(), modules_to_save="experts"))
    merged = jl.merge(PARAMS, adapter)
    np.testing.assert_array_equal(merged["experts"], adapter.params["experts_lora_w"])
    assert_trees_equal(jl.load_adapter(jl.save_adapter(tmp_path / "adapter", adapter)), adapter)


def test_paths_may_hold_names_that_hold_a_slash():
    params = {"mlp/~/linear_0": {"w": normal(1, 8, 6)}, "mlp": {"w": normal(2, 6, 2)}}

    def run(params, x):
        return jnp.tanh(x @ params["mlp/~/linear_0"]["w"]) @ params["mlp"]["w"]

    config = jl.LoraConfig(rank=2, targets=("mlp/w", "linear_0/w"))
    adapter = trained(jl.lora_init(jax.random.key(0), params, config))
    assert len(adapter.spec.sites) == 2
    merged = jl.merge(params, adapter)
    assert set(merged) == set(params)
    assert_close(weight_space(run)(params, adapter, X), run(merged, X))
    assert (merged["mlp/~/linear_0"]["w"] != params["mlp/~/linear_0"]["w"]).all()


def test_errors_say_what_a_tree_of_params_cannot_tell():
    with pytest.raises(TargetError, match=r"experts has 3 axes in params.*roles=\{'experts'"):
        jl.plan(PARAMS, jl.LoraConfig(targets="experts"))
    with pytest.raises(TargetError, match=r"'wq' matched none of the 3 kernels. Nearest: "):
        jl.plan(PARAMS, jl.LoraConfig(targets="wq"))
    with pytest.raises(TargetError, match="found no layer to adapt"):
        jl.plan(PARAMS, jl.LoraConfig())
    with pytest.raises(TargetError, match="there is nothing to drop"):
        jl.plan(PARAMS, jl.LoraConfig(targets="w", dropout=0.1))
    with pytest.raises(ModelError, match="The params are a function without an array"):
        jl.plan(run, jl.LoraConfig())
    with pytest.raises(AdapterError, match="params have no leaf experts"):
        jl.merge([{"w": X}], adapter_of())
    with pytest.raises(ConfigError, match="The config is a dict"):
        plan(PARAMS, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "equinox", "haiku", "keras"])
def test_the_example_fits_each_library_that_is_installed(name, capsys):
    if name != "plain" and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        if name == "keras":  # what keras warns of on import is not ours
            warnings.simplefilter("ignore")
        results = runpy.run_path(str(EXAMPLE))["main"]([name], steps=40)
    ((before, after, merged),) = results.values()
    assert after < 0.8 * before
    assert merged == pytest.approx(after, rel=1e-5)
    assert "parameters, loss" in capsys.readouterr().out
