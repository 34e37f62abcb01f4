"""Adapters on Flax NNX modules: equal to weight space, both styles, the same checkpoints."""

import dataclasses
import doctest
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlora as jl
from jaxlora.errors import AdapterError, ModelError, TargetError
from jaxlora.interop import nnx as interop
from jaxlora.interop import nnx_attach, peft
from jaxlora.interop.nnx import attach, detach, params
from tests.test_properties import assert_close, assert_trees_close, assert_trees_equal


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.down = nnx.Linear(12, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(self.norm(nnx.gelu(self.up(x))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


class Stacked(nnx.Module):
    """Eight layers of an 8-wide kernel, run by nnx.scan: sizes tell nothing about the axes."""

    def __init__(self, rngs, axis=0, remat=False):
        self.axes, self.remat = nnx.StateAxes({nnx.Param: axis, ...: 0}), remat

        @nnx.split_rngs(splits=8)
        @nnx.vmap(in_axes=0, out_axes=self.axes)
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        def body(layer, x):
            return layer(x)

        run = nnx.remat(body) if self.remat else body
        run = nnx.scan(run, in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
        return self.head(run(self.layers, x))


class Experts(nnx.Module):
    """A stack run by nnx.vmap, in a list, each expert with kernels of three axes."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.LinearGeneral(8, (2, 3), rngs=rngs)

        self.experts = nnx.List([make(rngs), make(rngs)])

    def __call__(self, x):
        run = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None))
        return sum(run(expert, x) for expert in self.experts)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.mix = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.mix(self.embed(ids))))

    def encode(self, ids):
        return self.mix(self.embed(ids))


class Convs(nnx.Module):
    def __init__(self, rngs):
        kinds = {"strides": 2, "padding": "CIRCULAR", "feature_group_count": 2}
        self.groups = nnx.Conv(4, 6, (3, 2), rngs=rngs, **kinds)
        self.transpose = nnx.ConvTranspose(6, 4, (2, 2), strides=(2, 1), rngs=rngs)
        self.flipped = nnx.ConvTranspose(4, 3, (2, 2), transpose_kernel=True, rngs=rngs)

    def __call__(self, x):
        return self.flipped(self.transpose(jnp.tanh(self.groups(x))))


class Einsums(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Einsum("btd,dhk->bthk", (8, 2, 6), (2, 6), rngs=rngs)
        self.back = nnx.LinearGeneral((2, 6), 5, axis=(-2, -1), rngs=rngs)
        self.batched = nnx.LinearGeneral(5, 2, batch_axis={0: 2}, rngs=rngs)

    def __call__(self, x):
        return self.batched(jnp.tanh(self.back(jnp.tanh(self.out(x)))))


class Scaled(nnx.Linear):
    """A layer of the user's that calls super: the branch is added once, and scaled."""

    def __call__(self, inputs, out_sharding=None):
        return 2.0 * super().__call__(inputs, out_sharding)


class Shared(nnx.Module):
    """One layer under two names, called twice."""

    def __init__(self, rngs):
        self.first = Scaled(8, 8, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class OneKernel(nnx.Module):
    """Two layers that share a kernel's variable."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


IDS = jnp.arange(10).reshape(2, 5)
CASES = {
    "mlp": (Mlp, normal(5, 8)),
    "scan": (Stacked, normal(5, 8)),
    "scan_axis_1": (functools.partial(Stacked, axis=1), normal(5, 8)),
    "scan_axis_-1_remat": (functools.partial(Stacked, axis=-1, remat=True), normal(5, 8)),
    "experts": (Experts, normal(5, 8)),
    "tied": (Tied, IDS),
    "conv": (Convs, normal(1, 4, 4, 4)),
    "einsum": (Einsums, normal(2, 5, 8)),
    "shared": (Shared, normal(5, 8)),
    "one_kernel": (OneKernel, normal(5, 8)),
    "attention": (Attention, normal(2, 5, 8)),
    "gru": (Recurrent, normal(2, 5, 8)),
}
METHODS = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa", "rslora": True},
    "frozen_bias": {"freeze_a": True, "bias": "all"},
}
PAIRS = [(name, "lora") for name in CASES]
PAIRS += [
    (name, method) for name in ("mlp", "scan_axis_1") for method in METHODS if method != "lora"
]
PAIRS += [("tied", "pissa"), ("one_kernel", "frozen_bias")]
every_model = pytest.mark.parametrize("name", CASES)


@functools.cache
def model_of(name):
    """The model with values from numpy: biases and norms away from their neutral start."""
    draw = np.random.default_rng(0).normal

    def value(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        drawn = 0.4 * draw(size=x.shape)
        return jnp.asarray(drawn if jnp.issubdtype(x.dtype, jnp.floating) else x.size * 0, x.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: CASES[name][0](nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(value, state))


@functools.cache
def fresh(name, **options):
    targets = ("embed", "mix") if name == "tied" else "all-linear"
    config = jl.LoraConfig(rank=2, targets=targets, **options)
    init = jax.jit(lambda key: jl.lora_init(key, model_of(name), config, CASES[name][1]))
    return init(jax.random.key(2))


def trained(adapter, scale=0.1):
    """The adapter as after training: no leaf is zero."""
    draw = np.random.default_rng(3).normal
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(scale * draw(size=x.shape), x.dtype), adapter.params
    )
    return dataclasses.replace(adapter, params=moved)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_method_starts_as_the_base_and_equals_merged_and_attached(name, method):
    model, x, adapter = model_of(name), CASES[name][1], fresh(name, **METHODS[method])
    run = jax.jit(lambda model, *rest: model(*rest))
    apply = jax.jit(lambda adapter: jl.lora_apply(nnx.split(model), adapter, x))
    base = run(model, x)
    assert_close(apply(adapter), base)
    adapter = trained(adapter)
    out = apply(adapter)
    assert_close(out, run(jl.merge(model, adapter), x))
    assert_close(run(attach(model, adapter), x), out)
    assert np.abs(out - base).max() > 1e-2


@every_model
def test_the_gradient_is_that_of_weight_space(name):
    model, x, adapter = model_of(name), CASES[name][1], trained(fresh(name))

    def loss(apply):
        return jax.jit(jax.grad(lambda adapter: jnp.mean(jnp.square(apply(adapter)))))

    branch = loss(lambda adapter: jl.lora_apply(nnx.split(model), adapter, x))(adapter)
    weights = loss(lambda adapter: jl.merge(model, adapter)(x))(adapter)
    assert_trees_close(branch, weights)


def test_the_axis_of_a_stack_is_found_with_its_sign_whatever_the_sizes():
    for name, stack in {"scan": 0, "scan_axis_1": 1, "scan_axis_-1_remat": -1}.items():
        sites = {site.path: site.layout for site in fresh(name).spec.sites}
        assert sites["layers/dense/kernel"].stack == (stack,)
        assert sites["head/kernel"].stack == ()
    layouts = [site.layout for site in fresh("experts").spec.sites]
    assert [(x.shape, x.roles, x.stack) for x in layouts] == [((3, 8, 2, 3), "ioo", (0,))] * 2


def test_a_pair_and_an_abstract_module_serve_as_well():
    pair, x, adapter = nnx.split(model_of("scan")), CASES["scan"][1], trained(fresh("scan"))
    abstract = nnx.eval_shape(lambda: Stacked(nnx.Rngs(0)))
    spec = jl.plan(abstract, jl.LoraConfig(rank=2), jax.ShapeDtypeStruct((5, 8), jnp.float32)).spec
    assert spec == adapter.spec
    assert jl.plan(pair, jl.LoraConfig(rank=2), x).spec == adapter.spec
    out = jl.lora_apply(pair, adapter, x)
    np.testing.assert_array_equal(out, jl.lora_apply(model_of("scan"), adapter, x))
    assert_close(nnx.merge(*jl.merge(pair, adapter))(x), out)


def test_paths_are_those_of_nnx_state_and_checkpoints_are_the_same(tmp_path):
    model, adapter = model_of("experts"), trained(fresh("experts"))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    paths = {"/".join(map(str, path)): x[...] for path, x in flat}
    assert "experts/0/kernel" in paths
    assert_trees_equal(paths, _flat(params(model)))
    path = jl.save_adapter(tmp_path / "adapter", adapter, params=params(model))
    assert_trees_equal(jl.load_adapter(path, params=params(model)), adapter)
    assert "trainable params: 168" in jl.summary(params(model), adapter)


def _flat(tree, prefix=""):
    found = {}
    for name, x in tree.items():
        found |= _flat(x, f"{prefix}{name}/") if isinstance(x, dict) else {f"{prefix}{name}": x}
    return found


def test_an_optimizer_trains_the_attached_factors_and_nothing_else():
    base, x = model_of("scan"), CASES["scan"][1]
    adapter = fresh("scan", modules_to_save="head", init="pissa")
    model = attach(base, adapter)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        diff = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2), argnums=diff)(model)
        optimizer.update(model, grads)
        return loss

    first, *_, last = [step(model, optimizer) for _ in range(5)]
    assert last < first
    again, moved = detach(model)
    assert nnx.graphdef(again) == nnx.graphdef(base)
    assert_trees_equal(params(again), params(base))
    assert moved.spec == adapter.spec
    assert_trees_equal(moved.frozen, adapter.frozen)
    different = jax.tree.map(lambda a, b: bool((a != b).any()), moved.params, adapter.params)
    assert all(jax.tree.leaves(different))
    assert_close(model(x), jl.merge(base, moved)(x))


def test_one_step_of_either_style_is_the_same():
    base, x, adapter = model_of("mlp"), CASES["mlp"][1], trained(fresh("mlp"))
    model = attach(base, adapter)
    diff = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2), argnums=diff)(model)
    stateful = {"/".join(map(str, path)): g[...] for path, g in nnx.to_flat_state(grads)}
    functional = jax.grad(lambda a: jnp.mean(jl.lora_apply(base, a, x) ** 2))(adapter)
    assert_trees_close(stateful, _flat(functional.params))


def test_what_is_trained_in_full_keeps_its_precision_and_the_base_its_dtype():
    base = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4), jnp.bfloat16)
    config = jl.LoraConfig(rank=2, bias="all")
    adapter = trained(jl.lora_init(jax.random.key(0), base, config, x))
    model = attach(base, adapter)
    assert model(x).dtype == jl.lora_apply(base, adapter, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(model(x), jl.lora_apply(base, adapter, x))
    assert_trees_equal(detach(model)[1], adapter)


def test_rows_of_a_table_are_trained_in_both_styles():
    model = model_of("tied")
    config = jl.LoraConfig(rank=2, targets="mix", token_rows={"embed": [3, 5]})
    adapter = trained(jl.lora_init(jax.random.key(0), model, config, IDS))
    out = jl.lora_apply(model, adapter, IDS)
    assert_close(out, jl.merge(model, adapter)(IDS))
    assert_close(attach(model, adapter)(IDS), out)
    assert_trees_equal(detach(attach(model, adapter))[1], adapter)


def test_a_kernel_that_no_rule_serves_is_adapted_in_weight_space():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)
            self.w = nnx.Param(normal(3, 8, 2))

        def __call__(self, x):
            return jnp.einsum("td,edo->eto", self.dense(x), self.w[...])

    model, x = Own(nnx.Rngs(0)), normal(5, 8)
    config = jl.LoraConfig(rank=2, targets=("dense", "w"), mode="weights", roles={"w": "bio"})
    adapter = trained(jl.lora_init(jax.random.key(0), model, config, x))
    assert [site.weights for site in adapter.spec.sites] == [False, True]
    assert_close(jl.lora_apply(model, adapter, x), jl.merge(model, adapter)(x))
    with pytest.raises(AdapterError, match="w is adapted in weight space"):
        attach(model, adapter)
    with pytest.raises(TargetError, match="w is a target, but Own is no layer"):
        jl.plan(model, jl.LoraConfig(targets="w"), x)


def test_a_layer_of_the_users_own_is_one_rule():
    class Transposed(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(normal(3, 8))

        def __call__(self, x):
            return x @ self.weight[...].T

    @jl.register(Transposed)
    def transposed(module, x):
        return jl.Linear("weight", "...i,oi->...o", x)

    model, x = Transposed(), normal(5, 8)
    config = jl.LoraConfig(rank=2, targets="weight")
    adapter = trained(jl.lora_init(jax.random.key(0), model, config, x))
    assert adapter.spec.sites[0].layout.roles == "oi"
    assert_close(jl.lora_apply(model, adapter, x), jl.merge(model, adapter)(x))


def test_dropout_is_active_with_a_key_and_has_a_mask_of_its_own_for_each_slice():
    model, x = model_of("scan"), CASES["scan"][1]
    adapter = trained(fresh("scan", dropout=0.5))
    key = jax.random.key(5)
    apply = jax.jit(lambda key: jl.lora_apply(model, adapter, x, dropout_key=key))
    off, on = jl.lora_apply(model, adapter, x), apply(key)
    np.testing.assert_array_equal(on, apply(key))
    assert np.abs(on - off).max() > 1e-2
    assert np.abs(on - apply(jax.random.key(6))).max() > 1e-2
    head = jl.LoraConfig(rank=2, targets="head", dropout=0.5)
    adapter = trained(jl.lora_init(jax.random.key(2), model, head, x))
    outs = jax.vmap(lambda k: jl.lora_apply(model, adapter, x, dropout_key=k))(
        jax.random.split(key, 400)
    )
    plain = jl.lora_apply(model, adapter, x)
    error = outs.std(0) / 20  # of a mean of 400
    assert (np.abs(outs.mean(0) - plain) < 5 * error + 1e-5).all()


def test_attached_dropout_moves_on_with_each_call_and_stops_in_eval():
    model, x = model_of("scan"), CASES["scan"][1]
    adapter = trained(fresh("scan", dropout=0.5))
    attached = attach(model, adapter, rngs=nnx.Rngs(dropout=0))
    first, second = attached(x), attached(x)
    assert np.abs(first - second).max() > 1e-2
    attached.eval()
    assert_close(attached(x), jl.lora_apply(model, adapter, x))
    attached.train()
    assert np.abs(attached(x) - first).max() > 1e-2
    assert_trees_equal(detach(attached)[1], adapter)


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(self.drop(x)))


def test_what_the_call_does_to_other_variables_it_does_to_the_modules_own():
    model, same, x = Stateful(nnx.Rngs(0)), Stateful(nnx.Rngs(0)), normal(5, 8)
    adapter = jl.lora_init(jax.random.key(0), model, jl.LoraConfig(rank=2), x)
    assert_close(jl.lora_apply(model, adapter, x), same(x))
    state, expected = (nnx.state(m, nnx.Not(nnx.Param)) for m in (model, same))
    data = jax.random.key_data
    shown = [
        jax.tree.map(lambda a: data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, s)
        for s in (state, expected)
    ]
    assert_trees_close(*shown)
    assert _flat(nnx.to_pure_dict(state))["drop/rngs/count"] == 1


def test_state_of_an_outer_trace_is_refused_and_a_pair_gives_it_back():
    model, x = Stateful(nnx.Rngs(0)), normal(5, 8)
    adapter = jl.lora_init(jax.random.key(0), model, jl.LoraConfig(rank=2), x)
    with pytest.raises(ModelError, match=r"changes drop/rngs/count.*mutable=True"):
        jax.grad(lambda adapter: jl.lora_apply(model, adapter, x).sum())(adapter)
    pair = nnx.split(model)

    def loss(adapter):
        out, state = jl.lora_apply(pair, adapter, x, mutable=True)
        return jnp.sum(out**2), state

    _, state = jax.grad(loss, has_aux=True)(adapter)
    assert _flat(nnx.to_pure_dict(state))["drop/rngs/count"] == 1
    assert _flat(nnx.to_pure_dict(pair[1]))["drop/rngs/count"] == 0
    assert jax.tree.structure(nnx.merge(pair[0], state)) == jax.tree.structure(model)


def test_a_kernel_that_is_used_past_its_layer_is_refused():
    class Past(Tied):
        def __call__(self, ids):
            return self.mix(self.embed(ids)) @ self.embed.embedding.T

    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.WeightNorm(nnx.Linear(8, 4, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    for model, targets, x in (
        (Past(nnx.Rngs(0)), ("embed", "mix"), IDS),
        (Normalized(nnx.Rngs(0)), "layer_instance", normal(5, 8)),
    ):
        with pytest.raises(TargetError, match="is changed on its way to its layer"):
            jl.plan(model, jl.LoraConfig(targets=targets), x)
    assert len(jl.plan(Past(nnx.Rngs(0)), jl.LoraConfig(rank=2), IDS).sites) == 1


def test_a_method_that_cannot_serve_a_tied_table_is_refused():
    for options, message in (
        ({"dora": True}, "do not factor out"),
        ({"freeze_a": True}, "would stay there"),
    ):
        with pytest.raises(TargetError, match=message):
            fresh("tied", **options)


def test_wrong_models_targets_and_inputs_are_named():
    x, config = CASES["mlp"][1], jl.LoraConfig(rank=2)
    with pytest.raises(ModelError, match=r"The model is a function, expected an nnx\.Module"):
        interop.plan(jnp.tanh.__wrapped__, config, x)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="rejects the example inputs"):
        jl.plan(model_of("mlp"), config, jnp.ones((5, 9)))
    with pytest.raises(TargetError, match=r"'upp' matched none of the 2 kernels. Nearest: up \(1"):
        jl.plan(model_of("mlp"), jl.LoraConfig(targets="upp"), x)
    with pytest.raises(AdapterError, match="adapter belongs, expected an Adapter"):
        jl.lora_apply(model_of("mlp"), fresh("mlp").params, x)
    with pytest.raises(AdapterError, match="The params have no leaf"):
        jl.lora_apply(model_of("mlp"), fresh("scan"), x)
    attached = attach(model_of("mlp"), fresh("mlp"))
    with pytest.raises(ModelError, match="attached to this Mlp already"):
        jl.plan(attached, config, x)
    with pytest.raises(ModelError, match="No adapter is attached to this Mlp"):
        detach(model_of("mlp"))


def test_a_layer_that_never_runs_is_an_error_of_the_plan_and_none_at_all_of_the_call():
    model = model_of("tied")
    config = jl.LoraConfig(rank=2, targets=("embed", "mix"))
    adapter = jl.lora_init(jax.random.key(0), model, config, IDS)
    assert jl.lora_apply(model, adapter, IDS, method="encode").shape == (2, 5, 6)
    with pytest.raises(TargetError, match="run no layer that holds it"):
        jl.plan(Skips(nnx.Rngs(0)), config, IDS)
    only = jl.lora_init(jax.random.key(0), model, jl.LoraConfig(rank=2, targets="mix"), IDS)
    with pytest.raises(AdapterError, match="None of the 1 adapted layers ran"):
        jl.lora_apply(Skips(nnx.Rngs(0)), only, IDS)


class Skips(Tied):
    def __call__(self, ids):
        return self.embed(ids)


def test_two_adapters_share_one_program_unless_their_specs_differ():
    traces = []

    @jax.jit
    def apply(model, adapter, x):
        traces.append(1)
        return jl.lora_apply(model, adapter, x)

    model, x = model_of("scan"), CASES["scan"][1]
    outs = [apply(model, trained(fresh("scan", alpha=a)), x) for a in (4, 4, 8)]
    assert len(traces) == 2
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 1e-2


def test_an_adapter_with_an_axis_more_runs_under_vmap():
    model, x = model_of("scan"), CASES["scan"][1]
    two = [trained(fresh("scan"), scale) for scale in (0.1, 0.2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *two)
    outs = jax.vmap(lambda adapter: jl.lora_apply(model, adapter, x))(stacked)
    for out, adapter in zip(outs, two, strict=True):
        assert_close(out, jl.lora_apply(model, adapter, x))
    assert dataclasses.is_dataclass(stacked)


def test_attached_factors_are_sharded_as_the_axes_of_the_kernel_that_they_share():
    class Sharded(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
            self.dense = nnx.Linear(8, 6, kernel_init=init, rngs=rngs)
            self.head = nnx.Linear(6, 2, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.dense(x)))

    auto = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((1, 1), ("embed", "mlp"), axis_types=auto)):
        model, x = Sharded(nnx.Rngs(0)), normal(5, 8)
        config = jl.LoraConfig(rank=2, targets="dense", modules_to_save="head")
        adapter = trained(jl.lora_init(jax.random.key(0), model, config, x))
        attached = attach(model, adapter)
        assert_close(attached(x), jl.merge(model, adapter)(x))
        specs = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(attached, nnx.LoRAParam)))
        shards = {"/".join(map(str, path)): spec.get_raw_value() for path, spec in specs}
        assert shards["dense/kernel_lora_a"] == jax.P(None, "embed")
        assert shards["dense/kernel_lora_b"] == jax.P(None, "mlp")
        assert shards["head/kernel"] == jax.P("embed", "mlp")
        again = detach(attached)[0]
        assert nnx.graphdef(again) == nnx.graphdef(model)


def test_fused_kernels_and_what_is_sown_work_as_in_linen():
    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.qkv = nnx.Linear(8, 12, rngs=rngs)
            self.kept = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            y = self.qkv(x)
            self.last = nnx.Cache(y)
            return y

    model, x = Sows(nnx.Rngs(0)), normal(5, 8)
    config = jl.LoraConfig(rank=2, fused={"qkv": (True, False, True)})
    adapter = trained(jl.lora_init(jax.random.key(0), model, config, x))
    out = jl.lora_apply(model, adapter, x)
    assert_close(out, jl.merge(model, adapter)(x))
    np.testing.assert_array_equal(out[:, 4:8], model.qkv(x)[:, 4:8])
    np.testing.assert_array_equal(model.last[...], out)


@pytest.mark.parametrize("module", [interop, nnx_attach], ids=lambda module: module.__name__)
def test_every_example_in_a_docstring_runs(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted


def test_importing_jaxlora_does_not_import_nnx():
    code = "import sys, jax, orbax.checkpoint; before = 'flax.nnx' in sys.modules; import jaxlora; "
    code += "print(before or 'flax.nnx' not in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_a_step_forms_no_dense_gradient_of_a_kernel():
    model, adapter = model_of("mlp"), trained(fresh("mlp"))
    x = normal(5, 8)

    def shapes(apply):
        grad = jax.grad(lambda adapter: jnp.mean(apply(adapter) ** 2))
        text = str(jax.make_jaxpr(grad)(adapter))
        return {line.split("=")[0].strip() for line in text.splitlines() if "dot_general" in line}

    kernels = ("[8,12]", "[12,8]", "[12,4]", "[4,12]")
    branch = shapes(lambda adapter: jl.lora_apply(model, adapter, x))
    weights = shapes(lambda adapter: jl.merge(model, adapter)(x))
    assert branch
    assert not [out for out in branch if out.endswith(kernels)]
    assert [out for out in weights if out.endswith(kernels)]


def test_a_masked_convolution_is_refused():
    mask = jnp.ones((2, 4, 3))
    model = nnx.Conv(4, 3, 2, mask=mask, rngs=nnx.Rngs(0))
    with pytest.raises(TargetError, match="A Conv masks its kernel"):
        jl.plan(model, jl.LoraConfig(rank=2), normal(2, 6, 4))


def test_a_rule_that_comes_later_is_found():
    class Late(nnx.Linear):
        def __call__(self, inputs, out_sharding=None):
            return inputs @ self.kernel[...]

    model, x = Late(8, 3, use_bias=False, rngs=nnx.Rngs(0)), normal(5, 8)
    with pytest.raises(TargetError, match="Late is no layer that can be adapted"):
        jl.plan(model, jl.LoraConfig(rank=2), x)

    @jl.register(Late)
    def late(module, inputs, out_sharding=None):
        return jl.Linear("kernel", "...i,io->...o", inputs)

    adapter = trained(jl.lora_init(jax.random.key(0), model, jl.LoraConfig(rank=2), x))
    assert_close(jl.lora_apply(model, adapter, x), jl.merge(model, adapter)(x))


def test_an_adapter_of_an_nnx_module_goes_to_peft_and_comes_back(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 8, rngs=rngs)
            self.down = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    net, x, names = Net(nnx.Rngs(0)), jnp.ones((1, 4)), {"up": "fc.0", "down": "fc.2"}
    adapter = jl.lora_init(jax.random.key(1), net, jl.LoraConfig(rank=2), x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    peft.save(tmp_path / "peft", adapter, net, names)
    loaded = peft.load(tmp_path / "peft", net, None, x, names=names)
    assert sorted(loaded.values()) == sorted(adapter.values())
    for path, leaf in adapter.values().items():
        np.testing.assert_array_equal(loaded.values()[path], leaf)
    np.testing.assert_array_equal(jl.lora_apply(net, loaded, x), jl.lora_apply(net, adapter, x))
