"""What a step multiplies and keeps, read from its compiled program: the gains, without a clock.

Every size is different, so that the shape of a product tells what it is: 26 tokens, width 24,
hidden 40, rank 3.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxlora as jl
from benchmarks.hlo import dots, total
from jaxlora import tree
from jaxlora.branch import LOW

BATCH, SEQ, WIDTH, HIDDEN, HEADS, LAYERS, RANK = 2, 13, 24, 40, 2, 2, 3
TOKENS = BATCH * SEQ
X = jax.random.normal(jax.random.key(0), (BATCH, SEQ, WIDTH))
TX = optax.adam(1e-3)


class Layer(nn.Module):
    """Attention and a feed-forward part: six kernels."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        q, k, v = (
            nn.DenseGeneral((HEADS, WIDTH // HEADS), name=n)(y) for n in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(y)
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(y), None


class Decoder(nn.Module):
    scan: bool = False
    remat: Any = False  # or a policy

    @nn.compact
    def __call__(self, x):
        policy: Any = self.remat if callable(self.remat) else None
        layer: Any = nn.remat(Layer, policy=policy) if self.remat else Layer
        if not self.scan:
            for n in range(LAYERS):
                x, _ = layer(name=f"layer_{n}")(x)
            return x
        split: Any = {"params": True}
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs=split, length=LAYERS)
        return stack(name="layer")(x, None)[0]


MODELS = {
    "unrolled": Decoder(),
    "scanned": Decoder(scan=True),
    "remat": Decoder(remat=True),
    "scanned_remat": Decoder(scan=True, remat=True),
}
KERNELS = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH)}
KERNELS |= {"out": (WIDTH, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
METHODS: dict[str, dict[str, Any]] = {
    "all": {},
    "q,v": {"targets": "query|value"},
    "dropout": {"dropout": 0.1},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "lora_fa": {"freeze_a": True},
    "fused": {"targets": "up", "fused": {"up": (True, False)}},
}


def made(model, **options):
    variables = jax.jit(model.init)(jax.random.key(0), X)
    config = jl.LoraConfig(rank=RANK, **options)
    return variables, jl.lora_init(jax.random.key(1), model, variables, config, X)


def loss(model, variables, adapter):
    rngs = {"dropout": jax.random.key(2)}
    return jnp.mean(jl.lora_apply(model, variables, adapter, X, rngs=rngs) ** 2)


def compiled(model, **options):
    """The step of the adapter alone, compiled."""
    variables, adapter = made(model, **options)

    def step(adapter, state, variables):
        grads = jax.grad(lambda a: loss(model, variables, a))(adapter)
        updates, state = TX.update(grads.params, state)
        params = optax.apply_updates(adapter.params, updates)
        return dataclasses.replace(adapter, params=params), state

    return jax.jit(step).lower(adapter, TX.init(adapter.params), variables).compile()


def compiled_joint(model, **options):
    """The step of a joint tree under `lora_optimizer`, every gradient asked for, compiled."""
    variables, adapter = made(model, **options)
    joint, tx = jl.combine(variables["params"], adapter), jl.lora_optimizer(TX)

    def step(joint, state):
        def of_joint(joint):
            base, own = jl.split(joint, adapter.spec)
            return loss(model, {"params": base}, own)

        updates, state = tx.update(jax.grad(of_joint)(joint), state, joint)
        return optax.apply_updates(joint, updates), state

    return jax.jit(step).lower(joint, tx.init(joint)).compile()


def products(program):
    """The dots of a compiled program."""
    return dots(program.as_text() or "")


def frozen_gradients(step):
    """The dots that contract all tokens to as many numbers as a kernel has."""
    sizes = {math.prod(shape) for shape in KERNELS.values()}
    return [
        dot
        for dot in products(step)
        if math.prod(dot.contracted) == TOKENS and math.prod(dot.shape) in sizes
    ]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_full_fine_tuning_has_the_dots_that_lora_must_not_have(model):
    """The proof that `frozen_gradients` finds them."""
    variables = model.init(jax.random.key(0), X)
    gradient = jax.jit(jax.grad(lambda v: jnp.mean(model.apply(v, X) ** 2)))
    found = frozen_gradients(gradient.lower(variables).compile())
    assert sum(dot.times for dot in found) == len(KERNELS) * LAYERS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_no_gradient_of_a_frozen_kernel_is_computed(model, method):
    assert frozen_gradients(compiled(model, **METHODS[method])) == []


@pytest.mark.parametrize("method", ["all", "q,v", "dora"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_nor_in_a_joint_tree_under_lora_optimizer(model, method):
    assert frozen_gradients(compiled_joint(model, **METHODS[method])) == []


def floor(targets, layers=LAYERS):
    """The FLOPs of the dots that a step cannot do without."""
    attention = 2 * 2 * BATCH * SEQ * SEQ * WIDTH
    flops = 0
    for n in range(layers):
        flops += 3 * attention
        for name, (inputs, outputs) in KERNELS.items():
            below = n > 0 or name not in ("query", "key", "value")  # something trains below it
            flops += 2 * TOKENS * inputs * outputs * (1 + below)
            if name in targets:
                flops += 2 * TOKENS * RANK * ((2 + below) * inputs + 3 * outputs)
    return flops


@pytest.mark.parametrize(
    ("options", "targets"),
    [({}, tuple(KERNELS)), ({"targets": "query|value"}, ("query", "value"))],
    ids=["all", "q,v"],
)
def test_a_step_multiplies_what_the_arithmetic_says(options, targets):
    found = total(products(compiled(MODELS["unrolled"], **options)))
    # With q and v alone, no gradient of key's kernel, but that of its input, is needed above.
    assert found <= 1.02 * floor(targets)
    assert found > 0.98 * floor(targets)


def test_a_joint_tree_multiplies_no_more():
    alone, joint = (total(products(f(MODELS["unrolled"]))) for f in (compiled, compiled_joint))
    assert joint == alone


def test_layers_below_the_first_adapted_one_have_no_backward_pass():
    model = MODELS["unrolled"]
    last, every = compiled(model, layers=[LAYERS - 1]), compiled(model)
    variables, _ = made(model)
    forward = total(products(jax.jit(model.apply).lower(variables, X).compile()))
    assert total(products(last)) < forward + total(products(every)) / LAYERS


def test_unmerged_inference_is_the_base_and_the_branch():
    model = MODELS["unrolled"]
    variables, adapter = made(model)
    base = jax.jit(model.apply).lower(variables, X).compile()
    unmerged = jax.jit(lambda v, a: jl.lora_apply(model, v, a, X)).lower(variables, adapter)
    branches = LAYERS * sum(2 * TOKENS * RANK * sum(shape) for shape in KERNELS.values())
    found = total(products(unmerged.compile()))
    assert found == total(products(base)) + branches


def kept(options, rngs, x):
    """Bytes that the forward pass of one layer keeps for the backward pass."""
    model = nn.Dense(HIDDEN, use_bias=False)
    variables = model.init(jax.random.key(0), x)
    config = jl.LoraConfig(rank=RANK, **options)
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    _, back = jax.vjp(lambda a, x: jl.lora_apply(model, variables, a, x, rngs=rngs), adapter, x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(back))


def test_dropout_keeps_neither_a_mask_nor_what_it_leaves():
    x = jnp.ones((64, WIDTH))
    key = jax.random.key(2)
    without = kept({}, {}, x)
    assert without < 3 * x.nbytes + 4 * WIDTH * HIDDEN
    assert kept({"dropout": 0.1}, {"dropout": key}, x) <= without + 1000 < without + x.size


def test_a_remat_policy_can_keep_what_the_branch_names():
    policy = jax.checkpoint_policies.save_only_these_names(LOW)
    first = ".*(query|key|value|out|up|down)"

    def skinny(model):
        found = products(compiled(model, targets=first))
        return sum(
            d.times for d in found if d.shape[-1] == RANK and math.prod(d.shape) == TOKENS * RANK
        )

    assert skinny(Decoder(scan=True, remat=policy)) < skinny(Decoder(scan=True, remat=True))


def test_a_site_adds_few_operations_to_the_trace():
    model = MODELS["unrolled"]
    variables, adapter = made(model)
    base = jax.make_jaxpr(model.apply)(variables, X)
    own = jax.make_jaxpr(lambda v, a: jl.lora_apply(model, v, a, X))(variables, adapter)
    sites = len(adapter.spec.sites)
    assert sites == LAYERS * len(KERNELS)
    assert (len(own.eqns) - len(base.eqns)) / sites <= 11


def test_an_equal_spec_becomes_the_same_one_so_that_calls_are_fast():
    _, adapter = made(MODELS["unrolled"])
    spec = adapter.spec
    other = jl.Spec(jl.LoraConfig.from_json(spec.config.to_json()), tuple(spec.sites))
    assert other.config is not spec.config
    assert spec == other
    assert other.config is spec.config
    assert other.sites is spec.sites
    assert spec != dataclasses.replace(spec, sites=spec.sites[1:])


def test_merged_params_hold_no_more_than_the_base():
    variables, adapter = made(MODELS["unrolled"])
    merged = jl.merge(variables["params"], adapter)
    assert tree.size(merged) == tree.size(variables["params"])


def test_a_fused_kernel_multiplies_no_zeros():
    """q and v of a fused q, k, v: the kernel's products, and those of two adapters of WIDTH."""

    class Fused(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3 * WIDTH, name="qkv")(nn.gelu(nn.Dense(WIDTH, name="first")(x)))

    options: Any = {"targets": "qkv", "fused": {"qkv": (True, False, True)}}
    found = total(dots(compiled(Fused(), **options).as_text() or ""))
    base = 2 * TOKENS * WIDTH * (WIDTH + 3 * WIDTH)
    factors = 2 * 2 * TOKENS * RANK * (WIDTH + WIDTH)  # forward: A and B of q and of v
    back = factors + 2 * TOKENS * RANK * 2 * WIDTH  # their gradients, and that of A x
    assert found == base + factors + back
