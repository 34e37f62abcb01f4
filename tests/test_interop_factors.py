"""Factors in torch's form: their product is the update, and they come back as they were."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora.errors import AdapterError, ConfigError
from jaxlora.fold import delta
from jaxlora.interop import factors
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
from tests.zoo import CASES

METHODS = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "freeze_a": {"freeze_a": True},
    "pissa_frozen": {"init": "pissa", "freeze_a": True},
}
MODELS = ["mlp", "scan_axis_1", "scan_axis_-1", "attention", "conv", "fan_in_fan_out", "fused"]


def adapter_of(case, **options):
    """An adapter of random leaves, made without running the model."""
    options = {"rank": 2, "targets": case.targets} | case.options | options
    keys = jax.random.key(0)
    variables = jax.eval_shape(lambda k: case.model.init(k, *case.inputs), keys)
    spec = jl.plan(case.model, variables, jl.LoraConfig(**options), *case.inputs).spec
    rng = np.random.default_rng(0)
    shapes = spec.leaf_shapes | spec.frozen_shapes
    return spec.adapter({p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()})


def parts_of(adapter, site):
    layers = range(site.layout.sizes("s")[0]) if site.layout.stack else [None]
    leaves = site.leaves(adapter.values())
    return leaves, [factors.to_torch(site, leaves, n) for n in layers]


@pytest.mark.parametrize(
    ("model", "method"),
    [(x, y) for x in MODELS for y in METHODS if (x, y) != ("fused", "dora")],  # these exclude
)
def test_the_product_of_torchs_factors_is_the_update(model, method):
    adapter = adapter_of(CASES[model], **METHODS[method])
    for site in adapter.spec.sites:
        if site.kind in ("ConvTranspose", "ConvLocal"):
            continue
        leaves, layers = parts_of(adapter, site)
        whole = delta(site.layout, site.rank, leaves, jnp.float32)
        order = [axis for role in "sio" for axis in site.layout.axes(role)]
        update = np.transpose(whole, order).reshape(
            len(layers), site.layout.count("i"), site.layout.count("o")
        )
        for expected, parts in zip(update, layers, strict=True):
            assert {p: x.shape for p, x in parts.items()} == factors.torch_shapes(site)
            a = parts["a"] if parts["a"].ndim == 2 else np.moveaxis(parts["a"], 1, -1)
            got = parts["b"].reshape(len(parts["b"]), -1) @ a.reshape(len(a), -1)
            np.testing.assert_allclose(got.T, expected, rtol=1e-4, atol=1e-4)  # sums of ~100 terms


@pytest.mark.parametrize(
    ("model", "method"),
    [("embed_attend", "lora"), *((x, y) for x in MODELS[:-1] for y in ("lora", "dora"))],
)
def test_leaves_come_back_as_they_were(model, method):
    adapter = adapter_of(CASES[model], **METHODS[method])
    for site in adapter.spec.sites:
        leaves, layers = parts_of(adapter, site)
        for part, leaf in factors.from_torch(site, layers).items():
            np.testing.assert_array_equal(leaf, leaves[part])


def test_a_fused_kernel_goes_by_loralibs_grouped_b_and_back():
    adapter = adapter_of(CASES["fused"])
    for site in adapter.spec.sites:
        leaves = site.leaves(adapter.values())
        layers = range(site.layout.sizes("s")[0]) if site.layout.stack else [None]
        parts = [factors.to_torch(site, leaves, n, grouped=True) for n in layers]
        assert parts[0]["b"].shape[1] == site.rank
        for part, leaf in factors.from_torch(site, parts).items():
            np.testing.assert_array_equal(leaf, leaves[part])


def test_torch_sites_name_each_layer_of_a_scanned_stack():
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        scan_layers=True,
    )
    model = LlamaForCausalLM(config)
    ids = jnp.ones((1, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    plan = jl.plan(model, variables, jl.LoraConfig(rank=1, targets="q_proj|lm_head"), ids)
    places = factors.torch_sites(plan, factors.names_of(model))
    q, head = "model.layers.{}.self_attn.q_proj", "lm_head"
    assert {name: place.layer for name, place in places.items()} == {
        head: None,
        q.format(0): 0,
        q.format(1): 1,
    }
    assert places[head].site.path == "lm_head/kernel"


def test_sites_that_torch_cannot_have_are_all_named_with_the_reason():
    adapter = adapter_of(CASES["mlp"])
    with pytest.raises(AdapterError, match=r"down/kernel: it has no name .*up/kernel: it has no"):
        factors.torch_sites(adapter.spec, factors.names_of(None, {"other": "other"}))
    with pytest.raises(AdapterError, match=r"up/kernel: down/kernel is 'a' as well"):
        factors.torch_sites(adapter.spec, factors.names_of(None, {"up": "a", "down": "a"}))
    with pytest.raises(AdapterError, match="it is no stack, and its name in torch is"):
        factors.torch_sites(adapter.spec, factors.names_of(None, {"up_{}": "a.{}", "down": "b"}))
    experts = adapter_of(CASES["expert_params"])
    with pytest.raises(AdapterError, match="adapted in weight space"):
        factors.torch_sites(experts.spec, factors.names_of(None, {}))


def test_a_model_without_a_table_needs_names():
    with pytest.raises(ConfigError, match=r"Dense, which has no table .*names="):
        factors.names_of(nn.Dense(2))


def test_a_tensor_of_another_shape_looks_transposed():
    adapter = adapter_of(CASES["mlp"])
    site = adapter.spec.sites[0]
    _, [parts] = parts_of(adapter, site)
    with pytest.raises(AdapterError, match=r"shape \(12, 2\), expected \(2, 12\). It looks"):
        factors.from_torch(site, [parts | {"a": parts["a"].T}])
