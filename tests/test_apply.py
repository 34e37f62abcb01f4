"""lora_apply: what it mirrors of model.apply, its dropout, and what it refuses."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import jaxlora as jl
from jaxlora.errors import AdapterError, LoraError, ModelError
from jaxlora.tree import nested
from tests import zoo

RATE = 0.5


def init(model, *inputs, rngs=None, rank=2, **config):
    """Variables and a fresh adapter, made once for each model, shape and config."""
    shapes = jax.tree.map(lambda x: (jnp.shape(x), x.dtype), inputs)
    asked = repr((model, shapes, sorted(rngs or ()), rank, config))
    if asked not in _MADE:
        _MADE[asked] = _init(model, inputs, rngs, jl.LoraConfig(rank=rank, **config))
    return _MADE[asked]


_MADE: dict[str, Any] = {}


def _init(model, inputs, rngs, config):
    def fresh(key, variables):
        return jl.lora_init(key, model, variables, config, *inputs, rngs=rngs)

    # Compiled as a whole: op by op takes seconds.
    variables = jax.jit(model.init)({"params": jax.random.key(0), **(rngs or {})}, *inputs)
    return variables, jax.jit(fresh)(jax.random.key(1), variables)


def lora(model, variables, adapter, *args, rngs=None, **kwargs):
    def run(variables, adapter, args, rngs):
        return jl.lora_apply(model, variables, adapter, *args, rngs=rngs, **kwargs)

    return jax.jit(run)(variables, adapter, args, rngs)


def plain(model, variables, *args, rngs=None, **kwargs):
    def run(variables, args, rngs):
        return model.apply(variables, *args, rngs=rngs, **kwargs)

    return jax.jit(run)(variables, args, rngs)


def merged(variables, adapter):
    return {**variables, "params": jax.jit(jl.merge)(variables["params"], adapter)}


@jax.jit
def trained(adapter):
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [
        x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def identity(spec):
    """Both factors the identity: the branch shows the dropped input itself."""
    leaves = {}
    for site in spec.sites:
        for part in ("a", "b"):
            core = np.broadcast_to(np.eye(8, dtype=np.float32), (*site.layout.sizes("s"), 8, 8))
            leaves[f"{site.path}_lora_{part}"] = site.layout.to_leaf(core, part, 8)
    return jl.Adapter(nested(leaves), spec)


def dropout(seed=0):
    return {"dropout": jax.random.key(seed)}


class Square(nn.Module):
    """A square Dense without a bias."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name="dense")(x)


class Layers(nn.Module):
    """Six layers that all see the same input, each with its output shown."""

    split_rngs: tuple[tuple[str, bool], ...]
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(8, use_bias=False, name="dense")(x)

        layers = nn.scan(
            Body,
            variable_axes={"params": self.axis},
            split_rngs=dict(self.split_rngs),
            length=6,
        )
        return layers(name="layers")(x, None)[1]


class Twice(nn.Module):
    def setup(self):
        self.dense = nn.Dense(8, use_bias=False)

    def __call__(self, x):
        return jnp.stack([self.dense(x), self.dense(x)])


class Cell(nn.RNNCellBase):
    """A cell whose output at each step is one Dense of the input."""

    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dense(8, use_bias=False, name="dense")(x)

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros(())

    @property
    def num_feature_axes(self):
        return 1


def masks(model, x, rngs, targets="dense"):
    """What the branch adds, with factors that are the identity, for an input of ones."""
    config = jl.LoraConfig(rank=8, alpha=8, dropout=RATE, targets=targets)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    spec = jl.plan(model, variables, config, x).spec
    zero = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    return np.asarray(lora(model, zero, identity(spec), x, rngs=rngs))


def assert_is_mask(mask):
    np.testing.assert_array_equal(np.unique(mask), [0, 1 / (1 - RATE)])


def test_dropout_is_active_exactly_when_a_dropout_rng_is_given():
    model, x = Square(), jnp.ones((16, 8))
    np.testing.assert_array_equal(masks(model, x, None), x)
    np.testing.assert_array_equal(masks(model, x, {"params": jax.random.key(0)}), x)
    np.testing.assert_array_equal(masks(model, x, jax.random.key(0)), x)
    assert_is_mask(masks(model, x, dropout()))


def test_a_rate_of_zero_drops_nothing():
    model, x = Square(), jax.random.normal(jax.random.key(5), (16, 8))
    variables, adapter = init(model, x)
    adapter = trained(adapter)
    with_rng = lora(model, variables, adapter, x, rngs=dropout())
    np.testing.assert_array_equal(with_rng, lora(model, variables, adapter, x))


def test_dropout_is_on_the_input_of_a_only():
    model, x = Square(), jax.random.normal(jax.random.key(5), (16, 8))
    variables, adapter = init(model, x, rank=8, alpha=4, dropout=RATE)
    got = lora(model, variables, identity(adapter.spec), x, rngs=dropout())
    mask = masks(model, jnp.ones((16, 8)), dropout())
    assert_is_mask(mask)
    np.testing.assert_allclose(got, plain(model, variables, x) + 0.5 * mask * x, 1e-5, 1e-5)


def test_a_mask_depends_on_its_key_and_on_nothing_else():
    model, x = Square(), jnp.ones((16, 8))
    first = masks(model, x, dropout(0))
    np.testing.assert_array_equal(first, masks(model, x, dropout(0)))
    assert (first != masks(model, x, dropout(1))).any()


def test_a_raw_key_gives_the_mask_of_the_typed_one():
    model, x = Square(), jnp.ones((16, 8))
    raw = {"dropout": jax.random.PRNGKey(0)}
    np.testing.assert_array_equal(masks(model, x, raw), masks(model, x, dropout(0)))


def test_the_mean_of_the_input_is_kept():
    mask = masks(Square(), jnp.ones((4096, 8)), dropout())
    assert_is_mask(mask)
    # The mean of 32,768 draws of 0 or 2 has a standard deviation of 0.0055.
    assert abs(mask.mean() - 1) < 0.025
    assert np.abs(mask.mean(0) - 1).max() < 0.08


def test_each_layer_has_a_mask_of_its_own():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.stack([nn.Dense(8, use_bias=False, name=name)(x) for name in "ab"])

    mask = masks(Two(), jnp.ones((16, 8)), dropout(), "a|b")
    assert_is_mask(mask)
    assert (mask[0] != mask[1]).any()


@pytest.mark.parametrize(
    ("axis", "split_rngs"),
    [
        (0, {"params": True}),
        (1, {"params": True, "dropout": False}),
        (-1, {"params": True, "dropout": True}),
    ],
    ids=["absent", "shared", "split"],
)
def test_each_layer_of_a_scan_has_a_mask_of_its_own_whatever_split_rngs(split_rngs, axis):
    model, x = Layers(tuple(split_rngs.items()), axis), jnp.ones((16, 8))
    mask = masks(model, x, dropout())
    assert_is_mask(mask)
    assert len(np.unique(mask, axis=0)) == 6


@pytest.mark.parametrize("split", [False, True])
def test_the_masks_of_the_models_own_dropout_are_unchanged_inside_a_scan(split):
    model = zoo.Scanned(rate=0.3, split_rngs={"params": True, "dropout": split})
    x = jax.random.normal(jax.random.key(5), (5, 8))
    variables, adapter = init(model, x, rngs=dropout(7), dropout=RATE)
    got = lora(model, variables, adapter, x, rngs=dropout())
    np.testing.assert_array_equal(got, plain(model, variables, x, rngs=dropout()))
    assert (got != plain(model, variables, x, rngs=dropout(1))).any()
    # The adapter's own dropout was active all the while.
    moved = trained(adapter)
    dropped = lora(model, variables, moved, x, rngs=dropout())
    kept = dataclasses.replace(
        moved,
        spec=dataclasses.replace(
            moved.spec, config=dataclasses.replace(moved.spec.config, dropout=0)
        ),
    )
    assert (dropped != lora(model, variables, kept, x, rngs=dropout())).any()


def test_the_masks_of_the_models_own_dropout_are_unchanged_outside_a_scan():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in "ab":
                x = nn.Dropout(0.4, deterministic=False)(nn.Dense(8, name=name)(x))
            return x

    model, x = Dropping(), jax.random.normal(jax.random.key(5), (5, 8))
    variables, adapter = init(model, x, rngs=dropout(7), dropout=RATE)
    got = lora(model, variables, adapter, x, rngs=dropout())
    np.testing.assert_array_equal(got, plain(model, variables, x, rngs=dropout()))
    assert (got != plain(model, variables, x, rngs=dropout(1))).any()


def test_each_call_of_a_shared_module_draws_its_own_mask():
    mask = masks(Twice(), jnp.ones((16, 8)), dropout())
    assert_is_mask(mask)
    assert (mask[0] != mask[1]).any()


@pytest.mark.parametrize("split", [True, False])
def test_the_steps_of_a_loop_over_shared_weights_differ_where_the_loop_splits_the_rng(split):
    model = nn.RNN(Cell(), split_rngs={"params": False, "dropout": split})
    mask = masks(model, jnp.ones((3, 6, 8)), dropout(), "dense")
    assert_is_mask(mask)
    assert len(np.unique(mask, axis=1).swapaxes(0, 1)) == (6 if split else 1)


def test_dropout_works_under_jit_vmap_and_remat():
    x = jax.random.normal(jax.random.key(5), (2, 5, 8))
    variables, adapter = init(zoo.Scanned(), x[0], dropout=RATE)
    adapter, keys = trained(adapter), jax.random.split(jax.random.key(0), 2)

    def gradients(model):
        def loss(adapter, x, key):
            rngs = {"dropout": key}
            return jnp.sum(jl.lora_apply(model, variables, adapter, x, rngs=rngs) ** 2)

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(adapter, x, keys)

    # The backward pass of remat runs the layers again: another mask would spoil the gradient.
    got, expected = gradients(zoo.Scanned(remat=True)), gradients(zoo.Scanned())
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, 1e-5, 1e-5 * np.abs(e).max())


def test_an_embedding_lookup_has_no_dropout():
    model, ids = zoo.TiedEmbedding(), jnp.arange(10).reshape(2, 5)
    variables, adapter = init(model, ids, targets="embed", dropout=RATE)
    adapter = trained(adapter)
    encode = {"method": "encode"}
    got = lora(model, variables, adapter, ids, rngs=dropout(), **encode)
    expected = lora(model, variables, adapter, ids, **encode)
    np.testing.assert_array_equal(got, expected)
    whole = lora(model, variables, adapter, ids, rngs=dropout())
    assert (whole != lora(model, variables, adapter, ids)).any()


class Bfloat16Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
                return x + nn.tanh(nn.Dense(8, name="dense", **kinds)(x)), None

        layers = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize(
    "model", [zoo.Mlp(jnp.bfloat16, jnp.bfloat16), Bfloat16Layers()], ids=["mlp", "scan"]
)
def test_a_bfloat16_base_with_float32_factors_keeps_its_dtype(model):
    x = jax.random.normal(jax.random.key(5), (5, 8), jnp.bfloat16)
    variables, adapter = init(model, x)
    adapter = trained(adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    got = lora(model, variables, adapter, x)
    assert got.dtype == jnp.bfloat16
    expected = plain(model, merged(variables, adapter), x)
    # bfloat16 has 8 bits, and the layers round after each product.
    np.testing.assert_allclose(got.astype(float), expected.astype(float), 0, 0.06)
    assert np.abs((got - plain(model, variables, x)).astype(float)).max() > 0.06
    loss = jax.jit(jax.grad(lambda a: jl.lora_apply(model, variables, a, x).astype(float).sum()))
    grads = loss(adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("name", "mutable"),
    [("scan", True), ("batch_norm_train", ["params"])],
)
def test_mutated_params_come_back_without_what_was_bound(name, mutable):
    case = zoo.CASES[name]
    model, args = case.model, (*case.inputs, *([False] if name == "batch_norm_train" else []))
    variables = jax.jit(model.init)(jax.random.key(0), *case.inputs)
    adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), *args)
    _, updates = jl.lora_apply(model, variables, adapter, *args, mutable=mutable)
    _, expected = model.apply(variables, *args, mutable=mutable)
    assert jax.tree.structure(updates) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_batch_statistics_are_those_of_the_merged_model():
    case = zoo.CASES["batch_norm_train"]
    variables, adapter = init(case.model, *case.inputs)
    adapter = trained(adapter)
    mutable = ["batch_stats"]
    y, updates = lora(case.model, variables, adapter, *case.inputs, mutable=mutable)
    expected_y, expected = plain(
        case.model, merged(variables, adapter), *case.inputs, mutable=mutable
    )
    np.testing.assert_allclose(y, expected_y, 1e-4, 1e-4)
    assert list(updates) == ["batch_stats"]
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, 1e-5, 1e-5), updates, expected)


@pytest.mark.parametrize("method", ["encode"])
def test_method_runs_another_part_of_the_model(method):
    model, ids = zoo.TiedEmbedding(), jnp.arange(10).reshape(2, 5)
    variables, adapter = init(model, ids, targets=["embed", "mix"])
    adapter = trained(adapter)
    got = lora(model, variables, adapter, ids, method=method)
    np.testing.assert_allclose(
        got, plain(model, merged(variables, adapter), ids, method=method), 1e-5, 1e-5
    )
    assert np.abs(got - plain(model, variables, ids, method=method)).max() > 1e-2


def test_captured_intermediates_are_those_of_the_adapted_model():
    model, x = zoo.Mlp(), jax.random.normal(jax.random.key(5), (5, 8))
    variables, adapter = init(model, x)
    adapter = trained(adapter)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    y, found = lora(model, variables, adapter, x, **capture)
    expected_y, expected = plain(model, merged(variables, adapter), x, **capture)
    np.testing.assert_allclose(y, expected_y, 1e-5, 1e-5)
    np.testing.assert_array_equal(found["intermediates"]["__call__"][0], y)
    assert list(found) == ["intermediates"]
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, 1e-5, 1e-5), found, expected)


def test_frozen_variables_are_taken_as_plain_ones():
    model, x = zoo.Mlp(), jax.random.normal(jax.random.key(5), (5, 8))
    variables, adapter = init(model, x)
    frozen = freeze(variables)
    again = jl.lora_init(jax.random.key(1), model, frozen, adapter.spec.config, x)
    assert again.spec == adapter.spec
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    adapter = trained(adapter)
    got = lora(model, frozen, adapter, x)
    np.testing.assert_array_equal(got, lora(model, variables, adapter, x))


def test_adapters_that_differ_in_alpha_alone_differ_under_nn_jit():
    model, x = zoo.Jitted(), jax.random.normal(jax.random.key(5), (5, 8))
    variables = model.init(jax.random.key(0), x)
    base = plain(model, variables, x)
    deltas = []
    for alpha in (2.0, 6.0):
        config = jl.LoraConfig(rank=2, alpha=alpha)
        adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
        deltas.append(lora(model, variables, trained(adapter), x) - base)
    assert np.abs(deltas[0]).max() > 1e-2
    np.testing.assert_allclose(deltas[1], 3 * deltas[0], 1e-4, 1e-5)


def test_pmap_on_one_device_gives_what_jit_gives():
    model, x = zoo.Mlp(), jax.random.normal(jax.random.key(5), (1, 5, 8))
    variables, adapter = init(model, x[0])
    adapter = trained(adapter)

    def run(adapter, x):
        return jl.lora_apply(model, variables, adapter, x)

    stacked = jax.tree.map(lambda leaf: leaf[None], adapter)
    got = jax.pmap(run)(stacked, x)
    np.testing.assert_allclose(got[0], jax.jit(run)(adapter, x[0]), 1e-6, 1e-6)


def test_the_base_has_no_part_in_the_gradient():
    model, x = zoo.Mlp(), jax.random.normal(jax.random.key(5), (5, 8))
    variables, adapter = init(model, x)
    grads = jax.jit(jax.grad(lambda a: jl.lora_apply(model, variables, a, x).sum()))(adapter)
    assert isinstance(grads, jl.Adapter)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)


@pytest.mark.parametrize(
    ("model", "named"), [(lambda x: x, "function"), ({"a": 1}, "dict"), (nn.Dense, "type")]
)
def test_what_is_no_module_is_a_model_error(model, named):
    variables, adapter = init(Square(), jnp.ones((2, 8)))
    with pytest.raises(ModelError, match=rf"The model is a {named}, expected a flax.linen.Module"):
        jl.lora_apply(model, variables, adapter, jnp.ones((2, 8)))


def test_bare_params_are_a_model_error():
    variables, adapter = init(zoo.Mlp(), jnp.ones((2, 8)))
    with pytest.raises(
        ModelError, match=r"variables hold 'down, norm, up', expected the collection 'params'"
    ):
        jl.lora_apply(zoo.Mlp(), variables["params"], adapter, jnp.ones((2, 8)))
    with pytest.raises(ModelError, match=r"variables hold 'NoneType', expected the collection"):
        jl.lora_apply(zoo.Mlp(), None, adapter, jnp.ones((2, 8)))  # type: ignore


def test_a_bare_tree_of_leaves_is_an_adapter_error():
    variables, adapter = init(Square(), jnp.ones((2, 8)))
    with pytest.raises(AdapterError, match=r"got a dict where the adapter belongs, expected an Ad"):
        jl.lora_apply(Square(), variables, adapter.params, jnp.ones((2, 8)))


def test_an_adapter_of_a_model_with_other_names_is_an_adapter_error():
    _, adapter = init(zoo.Mlp(), jnp.ones((2, 8)))
    variables, _ = init(Square(), jnp.ones((2, 8)))
    with pytest.raises(
        AdapterError,
        match=r"no leaf down/kernel, which the adapter adapts. Nearest: dense/kernel. The adapter "
        r"belongs to another model",
    ):
        jl.lora_apply(Square(), variables, adapter, jnp.ones((2, 8)))


def test_an_adapter_of_a_model_with_other_sizes_is_an_adapter_error():
    _, adapter = init(zoo.Mlp(), jnp.ones((2, 6)))
    variables, _ = init(zoo.Mlp(), jnp.ones((2, 8)))
    with pytest.raises(
        AdapterError, match=r"Param up/kernel has shape \(8, 12\), the adapter expects \(6, 12\)"
    ):
        jl.lora_apply(zoo.Mlp(), variables, adapter, jnp.ones((2, 8)))


def test_an_adapter_with_a_leading_axis_is_an_adapter_error():
    variables, adapter = init(Square(), jnp.ones((2, 8)))
    stacked = jax.tree.map(lambda x: x[None], adapter)
    with pytest.raises(
        AdapterError,
        match=r"dense/kernel_lora_a has shape \(1, 2, 8\), expected \(2, 8\).*under `jax.vmap`",
    ):
        jl.lora_apply(Square(), variables, stacked, jnp.ones((2, 8)))


def test_a_missing_and_an_extra_leaf_are_adapter_errors():
    variables, adapter = init(Square(), jnp.ones((2, 8)))
    leaves = adapter.params["dense"]
    missing = jl.Adapter({"dense": {"kernel_lora_a": leaves["kernel_lora_a"]}}, adapter.spec)
    with pytest.raises(
        AdapterError, match=r"no leaf dense/kernel_lora_b, expected by its spec. Nearest: dense/ker"
    ):
        jl.lora_apply(Square(), variables, missing, jnp.ones((2, 8)))
    extra = jl.Adapter({"dense": leaves, "other": leaves}, adapter.spec)
    with pytest.raises(AdapterError, match=r"holds leaves that its spec lacks: other/kernel_lora"):
        jl.lora_apply(Square(), variables, extra, jnp.ones((2, 8)))


def test_a_method_that_runs_no_adapted_layer_is_an_adapter_error():
    class Halves(nn.Module):
        def setup(self):
            self.left, self.right = nn.Dense(8), nn.Dense(8)

        def __call__(self, x):
            return self.right(self.left(x))

        def only_right(self, x):
            return self.right(x)

    model, x = Halves(), jnp.ones((2, 8))
    variables, adapter = init(model, x, targets="left")
    with pytest.raises(
        AdapterError,
        match=r"None of the 1 adapted layers ran, expected at least one: the first is left/kernel",
    ):
        jl.lora_apply(model, variables, adapter, x, method="only_right")


def test_factors_that_reach_their_layer_reshaped_are_an_error():
    class Reshaping(nn.Module):
        @nn.compact
        def __call__(self, x):
            def trans_in(variables):
                return jax.tree.map(lambda p: p[:8], variables)

            dense = nn.map_variables(nn.Dense, "params", trans_in)
            return dense(8, use_bias=False, name="dense")(x)

    x = jnp.ones((2, 8))
    variables, adapter = init(Square(), x, rank=9)
    with pytest.raises(
        LoraError, match=r"dense/kernel_lora_a reaches its layer with shape \(8, 8\), expected \(9,"
    ):
        jl.lora_apply(Reshaping(), variables, adapter, x)


def test_neither_the_leaves_nor_the_interceptor_outlive_the_call():
    model, x = Square(), jnp.ones((2, 8))
    variables, adapter = init(model, x)
    before = jax.tree.structure(variables)
    base = model.apply(variables, x)
    jl.lora_apply(model, variables, trained(adapter), x)
    assert jax.tree.structure(variables) == before
    np.testing.assert_array_equal(model.apply(variables, x), base)


class JittedCall(nn.Module):
    """As gemma's Transformer: nn.jit keeps what it has traced from one call to the next."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x)

    @nn.nowrap
    def other(self, x):
        return x


def test_a_method_under_nn_jit_is_seen_and_served_each_time():
    model, x = JittedCall(), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    config = jl.LoraConfig(rank=2)
    specs = [jl.plan(model, variables, config, x).spec for _ in range(2)]
    assert specs[0] == specs[1]
    adapter = trained(jl.lora_init(jax.random.key(1), model, variables, config, x))
    merged = {"params": jl.merge(variables["params"], adapter)}
    for _ in range(3):
        out = jl.lora_apply(model, variables, adapter, x)
        np.testing.assert_allclose(out, jnp.asarray(model.apply(merged, x)), 1e-5, 1e-5)
    with pytest.raises(AdapterError, match="None of the 1 adapted layers ran"):
        jl.lora_apply(model, variables, adapter, x, method="other")
