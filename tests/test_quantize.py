"""Quantized bases: the arithmetic, training, merging, checkpoints, and what memory holds."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

import jaxlora as jl
from jaxlora import tree
from jaxlora.quantize import Quantized, dequantize
from tests.test_properties import (
    apply,
    assert_close,
    base,
    fresh,
    losses_of_training,
    trained,
)
from tests.zoo import CASES

QTYPES = ("int8", "int4", "nf4")
every_qtype = pytest.mark.parametrize("qtype", QTYPES)
MODELS = (
    "mlp",
    "scan_axis_-1",
    "vmap_in_scan",
    "attention",
    "einsum",
    "embed_attend",
    "conv",
    "scan_attention_axis_3",
    "fused",
    "gemma_einsum",
    "fan_in_fan_out",
    "expert_params",
)


def quantized(name, qtype="nf4", **options):
    case = CASES[name]
    variables, adapter = fresh(case)
    params = jl.quantize(variables["params"], adapter.spec, qtype, **options)
    return case, {**variables, "params": params}, adapter


def test_nf4_values_are_those_of_the_paper_without_a_lookup():
    """A gather would keep a TPU from dequantizing tile by tile: 30 times the bytes (v5e)."""
    kernel, x = jax.random.normal(jax.random.key(0), (256, 512)), jnp.ones((2, 256))
    model = nn.Dense(512, use_bias=False)
    spec = jl.plan(model, {"params": {"kernel": kernel}}, jl.LoraConfig(), x).spec
    box = jl.quantize({"kernel": kernel}, spec, "nf4", double=False)["kernel"]
    looked_up = qwix.QArray(box.codes, box.scale, None, "nf4")
    np.testing.assert_array_equal(box.unbox(), qwix.dequantize(looked_up))
    assert "gather" in str(jax.make_jaxpr(qwix.dequantize)(looked_up))
    assert "gather" not in str(jax.make_jaxpr(Quantized.unbox)(box))


@every_qtype
def test_codes_and_scales_give_the_kernel_back_up_to_the_types_step(qtype):
    kernel = jax.random.normal(jax.random.key(0), (256, 512)) * 0.02
    model, x = nn.Dense(512, use_bias=False), jnp.ones((2, 256))
    spec = jl.plan(model, {"params": {"kernel": kernel}}, jl.LoraConfig(), x).spec
    errors = {}
    for double in (False, True):
        box = jl.quantize({"kernel": kernel}, spec, qtype, double=double)["kernel"]
        assert isinstance(box, Quantized)
        error = np.asarray(box.unbox() - kernel).reshape(4, 64, 512)
        largest = np.abs(np.asarray(kernel)).reshape(4, 64, 512).max(1, keepdims=True)
        # Half of the widest gap between two values of the type, and what the scales have lost.
        step = {"int8": 1 / 255, "int4": 1 / 15, "nf4": 0.153}[qtype]
        assert (np.abs(error) <= (step + 0.02 * double) * largest + 1e-7).all()
        errors[double] = np.sqrt((error**2).mean())
    assert errors[True] < 1.25 * errors[False]


def test_nf4_blocks_are_those_of_the_paper():
    kernel = jnp.linspace(-1, 1, 64)[:, None] * jnp.array([[1.0, 0.1]])
    model, x = nn.Dense(2, use_bias=False), jnp.ones((1, 64))
    spec = jl.plan(model, {"params": {"kernel": kernel}}, jl.LoraConfig(), x).spec
    box = jl.quantize({"kernel": kernel}, spec, "nf4", double=False)["kernel"]
    np.testing.assert_allclose(box.scale, [[1.0, 0.1]])
    values = np.unique(np.asarray(box.unbox())[:, 0])
    assert len(values) == 16
    # Appendix E of Dettmers et al. 2023, three of the 16.
    np.testing.assert_allclose(values[[0, 1, 14]], [-1, -0.6961928, 0.72295684], 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_base_is_the_dequantized_one(name):
    case, variables, adapter = quantized(name)
    plain = {**variables, "params": dequantize(variables["params"])}
    assert_close(base(case, variables), base(case, plain))
    adapter = trained(adapter)
    assert_close(apply(case, variables, adapter), apply(case, plain, adapter))
    merged = jl.merge(variables["params"], adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(plain["params"])
    assert_close(base(case, variables, merged), apply(case, variables, adapter))

    def loss(adapter, variables):
        return jnp.sum(jnp.sin(apply(case, variables, adapter)))

    got, expected = (jax.grad(loss)(adapter, v).params for v in (variables, plain))
    jax.tree.map(assert_close, got, expected)


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}])
def test_methods_that_read_the_kernel_read_the_dequantized_one(options):
    case, variables, _ = quantized("mlp")
    config = jl.LoraConfig(rank=2, **options)
    adapter = jl.lora_init(jax.random.key(0), case.model, variables, config, *case.inputs)
    assert_close(apply(case, variables, adapter), base(case, variables))
    adapter = trained(adapter)
    merged = jl.merge(variables["params"], adapter)
    assert_close(apply(case, variables, adapter), base(case, variables, merged))


def test_training_lowers_the_loss_and_leaves_the_codes_as_they_were():
    case, variables, adapter = quantized("mlp", "int4")
    losses = losses_of_training(case, variables, adapter, optax.adam(1e-2), 10)
    assert losses[-1] < 0.5 * losses[0]


class Deep(nn.Module):
    scanned: bool
    depth: int

    @nn.compact
    def __call__(self, x):
        if not self.scanned:
            for n in range(self.depth):
                x = x + nn.tanh(nn.Dense(256, name=f"layer_{n}")(x))
            return x

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Dense(256, name="dense")(x)), None

        layers = nn.scan(
            Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        return layers(name="layers")(x, None)[0]


# A scan on CPU unpacks the 4-bit codes of all layers at once: a byte for each, of four.
@pytest.mark.parametrize(
    ("qtype", "scanned", "growth"),
    [("int8", False, 0.1), ("int8", True, 0.1), ("nf4", False, 0.1), ("nf4", True, 0.35)],
)
def test_no_dequantized_copy_is_kept_for_the_backward_pass(qtype, scanned, growth):
    temps = {}
    for depth in (4, 16):
        model, x = Deep(scanned, depth), jnp.ones((4, 256))
        variables = model.init(jax.random.key(0), x)
        adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
        params = jl.quantize(variables["params"], adapter.spec, qtype)

        def loss(adapter, params, model=model, x=x):
            return jnp.sum(jl.lora_apply(model, {"params": params}, adapter, x) ** 2)

        _, backward = jax.vjp(lambda adapter, p=params, f=loss: f(adapter, p), adapter)
        kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "dtype")]
        wide = [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert all(np.prod(shape[-2:]) < 256 * 256 for shape in wide)
        memory = jax.jit(jax.grad(loss)).lower(adapter, params).compile().memory_analysis()
        assert memory is not None
        temps[depth] = memory.temp_size_in_bytes
        bits = {"int8": 0.3, "nf4": 0.2}[qtype]
        assert memory.argument_size_in_bytes < bits * tree.nbytes(variables["params"])
    # Twelve more layers take the memory of their activations, not of twelve kernels.
    assert temps[16] - temps[4] < growth * 12 * 256 * 256 * 4


def test_an_adapter_of_a_quantized_base_saves_loads_and_fits_the_original(tmp_path):
    case, variables, adapter = quantized("mlp")
    adapter = trained(adapter)
    jl.save_adapter(tmp_path / "adapter", adapter, params=variables["params"])
    for params in (variables["params"], fresh(case)[0]["params"]):
        loaded = jl.load_adapter(tmp_path / "adapter", params=params)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    other = jl.quantize(case.model.init(jax.random.key(9), *case.inputs)["params"], adapter.spec)
    with pytest.raises(jl.LoraError, match="same shapes with other values"):
        jl.load_adapter(tmp_path / "adapter", params=other)


def test_a_7b_base_is_planned_at_under_4_gb():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            for name in ("q", "k", "v", "o"):
                x = nn.Dense(4096, use_bias=False, name=name, param_dtype=jnp.bfloat16)(x)
            for name in ("gate", "up"):
                h = nn.Dense(11008, use_bias=False, name=name, param_dtype=jnp.bfloat16)(x)
            return nn.Dense(4096, use_bias=False, name="down", param_dtype=jnp.bfloat16)(h), None

    class Llama(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(32000, 4096, name="embed", param_dtype=jnp.bfloat16)(ids)
            layers = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=32
            )
            x, _ = layers(name="layers")(x, None)
            return nn.Dense(32000, use_bias=False, name="head", param_dtype=jnp.bfloat16)(x)

    model, ids = Llama(), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    config = jl.LoraConfig(rank=8, exclude="head")
    spec = jl.plan(model, variables, config, ids).spec
    params = jax.eval_shape(lambda params: jl.quantize(params, spec), variables["params"])
    planned = jl.plan(model, {"params": params}, config, ids)
    assert planned.num_base == 6_738_149_376
    assert planned.base_nbytes < 4e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qtype": "nf8"}, "qtype is 'nf8', expected one of int8, int4, nf4"),
        ({"block": 0}, "block is 0, expected a number of inputs of at least 1"),
    ],
)
def test_what_cannot_be_quantized_is_an_error(options, message):
    with pytest.raises(jl.LoraError, match=message):
        quantized("mlp", **options)


def test_a_spec_of_another_model_is_an_error():
    _, adapter = fresh(CASES["scan"])
    with pytest.raises(jl.LoraError, match="The params have no leaf"):
        jl.quantize(fresh(CASES["mlp"])[0]["params"], dataclasses.replace(adapter.spec))
