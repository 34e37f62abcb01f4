"""EVA: against the principal components that numpy finds in the same activations."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from tests import zoo

X = (
    jax.random.normal(jax.random.key(0), (64, 8)) * jnp.array([5, 3, 2, 1, 0.5, 0.3, 0.2, 0.1])
    + 1.0
)


def components(x, rank):
    """Principal directions and their shares of the variance."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return vt[:rank], s**2 / (s**2).sum()


def assert_same_directions(found, expected):
    np.testing.assert_allclose(np.abs(np.sum(found * expected, -1)), 1, atol=1e-3)


def init(model, batches, rho=1.0, **options):
    variables: Any = model.init(jax.random.key(1), batches[0])
    config = jl.LoraConfig(**{"rank": 2, "init": "eva"} | options)
    key = jax.random.key(2)
    return variables, jl.eva_init(key, model, variables, config, batches, rho=rho, passes=12)


def test_a_holds_the_principal_components_of_the_inputs_of_all_batches():
    variables, adapter = init(zoo.Mlp(), [X[:40], X[40:]])
    assert_same_directions(adapter.params["up"]["kernel_lora_a"], components(X, 2)[0])
    hidden = nn.gelu(X @ variables["params"]["up"]["kernel"] + variables["params"]["up"]["bias"])
    hidden = nn.LayerNorm().apply({"params": variables["params"]["norm"]}, hidden)
    assert_same_directions(adapter.params["down"]["kernel_lora_a"], components(hidden, 2)[0])
    out = jl.lora_apply(zoo.Mlp(), variables, adapter, X)
    np.testing.assert_array_equal(out, zoo.Mlp().apply(variables, X))


def test_each_slice_of_a_scan_has_the_components_of_its_own_inputs():
    model = zoo.Scanned(axis=1)
    variables, adapter = init(model, [X], targets="dense")
    kernel = variables["params"]["layers"]["dense"]["kernel"]
    bias = variables["params"]["layers"]["dense"]["bias"]
    leaf = adapter.params["layers"]["dense"]["kernel_lora_a"]
    site = adapter.spec.sites[0]
    rows = site.layout.from_leaf(leaf, "a", 2)
    x = X
    for n in range(8):
        assert_same_directions(rows[n], components(x, 2)[0])
        x = x + nn.tanh(x @ kernel[:, n] + bias[:, n])


def test_ranks_go_where_the_variance_is_and_scalings_stay():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            one = x[..., :1] * jnp.ones(8)  # a single direction
            return nn.Dense(3, name="flat")(one) + nn.Dense(3, name="rich")(x)

    x = jax.random.normal(jax.random.key(0), (64, 8))
    _, adapter = init(Two(), [x], rho=2.0, alpha=6, rank=3)
    sites = {site.path: site for site in adapter.spec.sites}
    assert sites["flat/kernel"].rank == 1
    assert sites["rich/kernel"].rank == 5
    assert {site.scaling for site in sites.values()} == {2.0}
    assert adapter.params["rich"]["kernel_lora_a"].shape == (5, 8)


MODELS = ("mlp", "scan_axis_1", "attention", "einsum", "fused", "gemma_einsum", "fan_in_fan_out")


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_layer_starts_as_the_base_with_orthonormal_rows(name):
    case = zoo.CASES[name]
    variables = case.variables()
    config = jl.LoraConfig(**{"rank": 1, "init": "eva", "targets": case.targets} | case.options)
    key = jax.random.key(0)
    adapter = jl.eva_init(key, case.model, variables, config, [case.inputs], rho=1.0)
    out = jl.lora_apply(case.model, variables, adapter, *case.inputs)
    np.testing.assert_array_equal(out, case.model.apply(variables, *case.inputs))
    values = adapter.values()
    for site in adapter.spec.sites:
        rows = site.layout.from_leaf(values[f"{site.path}_lora_a"], "a", site.rank)
        rows = rows.reshape(*rows.shape[: site.layout.rank_axis + 1], -1)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-4)


@pytest.mark.parametrize("options", [{"dora": True}, {"freeze_a": True}, {"rslora": True}])
def test_other_methods_start_there_too(options):
    variables, adapter = init(zoo.Mlp(), [X], **options)
    expected: Any = zoo.Mlp().apply(variables, X)
    values = adapter.values()
    name = "up/kernel_lora_a0" if "freeze_a" in options else "up/kernel_lora_a"
    assert_same_directions(values[name], components(X, 2)[0])
    out = jl.lora_apply(zoo.Mlp(), variables, adapter, X)
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("batches", "rho", "options", "message"),
    [
        ([], 1.0, {}, "eva_init got no batches"),
        ([X], 1.0, {"init": "pissa"}, "init='pissa', expected 'eva'"),
        ([X], 0.5, {}, "rho is 0.5, expected at least 1"),
    ],
)
def test_what_eva_cannot_start_from_is_an_error(batches, rho, options, message):
    model = zoo.Mlp()
    variables = model.init(jax.random.key(1), X)
    config = jl.LoraConfig(**{"init": "eva"} | options)
    with pytest.raises(jl.LoraError, match=message):
        jl.eva_init(jax.random.key(0), model, variables, config, batches, rho=rho)


def test_eva_without_batches_names_eva_init():
    variables = zoo.Mlp().init(jax.random.key(1), X)
    with pytest.raises(jl.LoraError, match="there are no batches here"):
        jl.lora_init(jax.random.key(0), zoo.Mlp(), variables, jl.LoraConfig(init="eva"), X)


@pytest.mark.parametrize(("name", "targets"), [("conv", "line"), ("embed_attend", "embed")])
def test_layers_without_matrix_inputs_are_refused(name, targets):
    case = zoo.CASES[name]
    config = jl.LoraConfig(init="eva", targets=targets)
    with pytest.raises(jl.LoraError, match="EVA needs"):
        jl.eva_init(jax.random.key(0), case.model, case.variables(), config, [case.inputs])
