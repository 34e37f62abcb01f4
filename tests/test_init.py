"""lora_init: the draws, slice by slice, and what they do not depend on."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import initializers
from jaxlora.errors import AdapterError, ConfigError, TargetError
from jaxlora.tree import flat, unboxed
from tests import zoo

X = jnp.ones((2, 8))


@pytest.fixture(autouse=True)
def _initializers_as_before(monkeypatch):
    monkeypatch.setattr(initializers, "_TABLE", dict(initializers._TABLE))


def variables_of(model, *inputs):
    return jax.jit(model.init)(jax.random.key(0), *inputs)


def init(model, x=X, *, seed=1, rank=2, **config):
    config = jl.LoraConfig(rank=rank, **config)
    return jl.lora_init(jax.random.key(seed), model, variables_of(model, x), config, x)


def cores(adapter, part):
    """{kernel path: factor as (*stack, *core)}."""
    leaves = {path: unboxed(x) for path, x in flat(adapter.params).items()}
    return {
        site.path: np.asarray(
            site.layout.from_leaf(leaves[f"{site.path}_lora_{part}"], part, site.rank)
        )
        for site in adapter.spec.sites
    }


class Wide(nn.Module):
    """Four stacked layers of one DenseGeneral: the fan-in is 24, whatever the stacked axis."""

    axis: int

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.DenseGeneral(7, axis=(-2, -1), use_bias=False, name="dense")(x)
                return x, y

        layers = nn.scan(
            Body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=4
        )
        return layers(name="layers")(x, None)[1]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_kaiming_draws_each_slice_within_one_over_the_root_of_its_fan_in(axis):
    adapter = init(Wide(axis), jnp.ones((2, 4, 6)), rank=200)
    (a,) = cores(adapter, "a").values()
    assert a.shape == (4, 200, 4, 6)
    bound = 1 / math.sqrt(24)
    for slice_ in a:
        # 4,800 uniform draws come within 0.5 % of the bound on either side.
        assert bound * 0.995 < slice_.max() <= bound
        assert -bound <= slice_.min() < -bound * 0.995
        assert abs(slice_.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert all((a[i] != a[j]).all() for i in range(4) for j in range(i))


@pytest.mark.parametrize("axis", [0, -1])
def test_gaussian_draws_each_slice_with_a_deviation_of_one_over_the_rank(axis):
    adapter = init(Wide(axis), jnp.ones((2, 4, 6)), rank=200, init="gaussian")
    (a,) = cores(adapter, "a").values()
    for slice_ in a:
        # The deviation of 4,800 draws is known to one percent.
        assert abs(slice_.std() * 200 - 1) < 0.05
        assert abs(slice_.mean() * 200) < 0.06
        assert np.abs(slice_).max() * 200 > 3
    assert all((a[i] != a[j]).all() for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_b_is_zero(name):
    for b in cores(init(zoo.Mlp(), init=name), "b").values():
        np.testing.assert_array_equal(b, np.zeros_like(b))


def test_an_embedding_starts_with_a_zero_and_b_normal():
    ids = jnp.arange(10)

    class Table(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(11, 300, name="embed")(ids)

    adapter = init(Table(), ids, targets="embed", rank=16)
    (site,) = adapter.spec.sites
    assert site.lookup
    a, b = cores(adapter, "a")[site.path], cores(adapter, "b")[site.path]
    np.testing.assert_array_equal(a, np.zeros((16, 11)))
    assert b.shape == (16, 300)
    assert abs(b.std() - 1) < 0.05
    assert abs(b.mean()) < 0.06


def test_another_key_gives_other_draws_and_the_same_key_the_same():
    first, again, other = (flat(init(zoo.Mlp(), seed=seed).params) for seed in (1, 1, 2))
    for path in first:
        np.testing.assert_array_equal(first[path], again[path])
    assert (first["up/kernel_lora_a"] != other["up/kernel_lora_a"]).all()


def test_adding_a_target_leaves_the_others_factors_as_they_were():
    one, two = (flat(init(zoo.Mlp(), targets=t).params) for t in ("down", "down|up"))
    assert sorted(two) == sorted([*one, "up/kernel_lora_a", "up/kernel_lora_b"])
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path])


def test_kernels_of_one_shape_have_draws_of_their_own():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="a")(nn.Dense(8, name="b")(x))

    a = cores(init(Two()), "a")
    assert (a["a/kernel"] != a["b/kernel"]).all()


def test_leaves_have_the_configs_dtype():
    adapter = init(zoo.Mlp(), param_dtype="bfloat16", modules_to_save="down")
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.bfloat16)}


def test_an_unknown_initializer_is_an_error_with_what_there_is():
    with pytest.raises(
        ConfigError,
        match=r"init is 'kaimin', expected one of eva, gaussian, .* Nearest: kaiming",
    ):
        init(zoo.Mlp(), init="kaimin")


def test_a_registered_initializer_is_used_for_every_kernel():
    @jl.register_init("constant")
    def constant(key, site, kernel):
        return jnp.full(site.layout.leaf_shape("a", site.rank), len(site.path))

    adapter = init(zoo.Mlp(), init="constant")
    np.testing.assert_array_equal(adapter.params["up"]["kernel_lora_a"], np.full((2, 8), 9))
    np.testing.assert_array_equal(adapter.params["down"]["kernel_lora_a"], np.full((2, 12), 11))


def test_factors_of_a_boxed_kernel_are_boxed_with_the_names_of_the_axes_they_share():
    adapter = init(zoo.Boxed())
    specs = nn.get_partition_spec(adapter.params)["layers"]["dense"]
    partition = jax.sharding.PartitionSpec
    assert specs["kernel_lora_a"] == partition("layers", None, "embed")
    assert specs["kernel_lora_b"] == partition("layers", None, "mlp")
    leaf = adapter.params["layers"]["dense"]["kernel_lora_a"]
    assert isinstance(leaf, nn.Partitioned)
    assert leaf.value.shape == (3, 2, 8)


def test_a_trained_copy_of_a_boxed_leaf_keeps_its_names():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
            return nn.Dense(3, kernel_init=kernel, name="head")(nn.Dense(8, name="body")(x))

    adapter = init(Head(), modules_to_save="head")
    specs = nn.get_partition_spec(adapter.params)["head"]
    assert specs["kernel_lora_w"] == jax.sharding.PartitionSpec("embed", "mlp")


def test_modules_to_save_are_copies_that_equal_the_base_and_survive_its_donation():
    model, x = zoo.Mlp(), X
    variables = variables_of(model, x)
    config = jl.LoraConfig(rank=2, modules_to_save="down")
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    down = variables["params"]["down"]
    expected = jax.tree.map(np.array, down)
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    donate(down)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(down))
    np.testing.assert_array_equal(adapter.params["down"]["kernel_lora_w"], expected["kernel"])
    np.testing.assert_array_equal(adapter.params["down"]["bias_lora_w"], expected["bias"])


def test_the_base_survives_the_adapters_donation():
    model, x = zoo.Mlp(), X
    variables = variables_of(model, x)
    before = jax.tree.map(np.array, variables)
    config = jl.LoraConfig(rank=2, modules_to_save="down")
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    donate(adapter)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapter))
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_lora_init_gives_the_same_under_jit():
    model = zoo.Scanned()
    variables = variables_of(model, X)
    config = jl.LoraConfig(rank=2, modules_to_save="head")

    def make(key, variables):
        return jl.lora_init(key, model, variables, config, X)

    eager, compiled = (f(jax.random.key(1), variables) for f in (make, jax.jit(make)))
    assert compiled.spec == eager.spec
    assert jax.tree.structure(compiled) == jax.tree.structure(eager)
    jax.tree.map(np.testing.assert_array_equal, compiled, eager)


def test_lora_init_under_eval_shape_gives_the_plans_shapes():
    model = zoo.Scanned()
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    config = jl.LoraConfig(rank=2, modules_to_save="head", param_dtype="bfloat16")

    def make(key, variables):
        return jl.lora_init(key, model, variables, config, X)

    adapter = jax.eval_shape(make, jax.random.key(1), abstract)
    assert adapter == jl.plan(model, abstract, config, X).spec.abstract()


def test_a_trained_copy_of_an_abstract_leaf_is_an_error():
    model = zoo.Mlp()
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    config = jl.LoraConfig(rank=2, modules_to_save="down")
    with pytest.raises(
        AdapterError,
        match=r"value of down/bias, but that is a ShapeDtypeStruct, expected an array",
    ):
        jl.lora_init(jax.random.key(1), model, abstract, config, X)


@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("none", []),
        ("all", ["down/bias_lora_w", "norm/bias_lora_w", "up/bias_lora_w"]),
        ("lora_only", ["up/bias_lora_w"]),
    ],
)
def test_bias_modes_train_the_biases_they_name(mode, trained):
    adapter = init(zoo.Mlp(), bias=mode, targets="up")
    assert sorted(p for p in flat(adapter.params) if p.endswith("_w")) == trained


def test_an_initializer_that_would_change_the_model_is_an_error():
    @jl.register_init("ones")
    def ones(key, site, kernel):
        a, b = (jnp.ones(site.layout.leaf_shape(part, site.rank)) for part in ("a", "b"))
        return a, b

    with pytest.raises(ConfigError, match="starts down/kernel with factors whose product is not"):
        init(zoo.Mlp(), init="ones")


def test_pissa_takes_the_principal_part_of_the_kernel():
    variables = variables_of(zoo.Mlp(), X)
    adapter = jl.lora_init(
        jax.random.key(0), zoo.Mlp(), variables, jl.LoraConfig(rank=3, init="pissa"), X
    )
    kernel = np.asarray(variables["params"]["up"]["kernel"], np.float64)
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    leaves = adapter.params["up"]
    start = 16 / 3 * leaves["kernel_lora_a"].T @ leaves["kernel_lora_b"]
    np.testing.assert_allclose(start, u[:, :3] * s[:3] @ vt[:3], 1e-5, 1e-5)
    np.testing.assert_array_equal(adapter.frozen["up"]["kernel_lora_a0"], leaves["kernel_lora_a"])
    np.testing.assert_array_equal(adapter.frozen["up"]["kernel_lora_b0"], leaves["kernel_lora_b"])


def test_fast_pissa_is_pissa_up_to_the_randomized_decomposition():
    model, x = nn.Dense(96), jnp.ones((2, 64))
    variables = variables_of(model, x)
    products = []
    for name in ("pissa", "pissa_fast"):
        config = jl.LoraConfig(rank=4, init=name)
        leaves = jl.lora_init(jax.random.key(0), model, variables, config, x).params
        products.append(leaves["kernel_lora_a"].T @ leaves["kernel_lora_b"])
    exact, fast = products
    # A random matrix, whose spectrum hardly falls, is the hardest case there is.
    assert np.linalg.norm(exact - fast) < 0.3 * np.linalg.norm(exact)


def test_olora_takes_q_and_r():
    variables = variables_of(zoo.Mlp(), X)
    config = jl.LoraConfig(rank=3, init="olora")
    leaves = jl.lora_init(jax.random.key(0), zoo.Mlp(), variables, config, X).params["up"]
    q, r = np.linalg.qr(np.asarray(variables["params"]["up"]["kernel"]).T)
    np.testing.assert_allclose(
        leaves["kernel_lora_b"].T @ leaves["kernel_lora_a"], q[:, :3] @ r[:3], 1e-5, 1e-5
    )


def test_orthogonal_factors_are_not_zero_and_their_product_is():
    adapter = init(zoo.Mlp(), init="orthogonal", rank=4)
    leaves = adapter.params["up"]
    a, b = leaves["kernel_lora_a"], leaves["kernel_lora_b"]
    assert np.abs(a).max() > 1e-2
    assert np.abs(b).max() > 1e-2
    np.testing.assert_allclose(a.T @ b, 0, atol=1e-7)
    with pytest.raises(TargetError, match="has rank 3, expected an even one"):
        init(zoo.Mlp(), init="orthogonal", rank=3)


@pytest.mark.parametrize("name", ["pissa", "pissa_fast", "olora"])
def test_a_rank_that_no_decomposition_gives_is_an_error(name):
    with pytest.raises(TargetError, match="whose smaller side is 4, expected a rank of at most"):
        init(zoo.Mlp(), init=name, rank=6)


def test_freezing_a_trains_b_alone():
    adapter = init(zoo.Mlp(), freeze_a=True)
    assert set(adapter.params["up"]) == {"kernel_lora_b"}
    assert set(adapter.frozen["up"]) == {"kernel_lora_a0"}
    grads = jax.grad(lambda a: jnp.sum(jl.lora_apply(zoo.Mlp(), variables_of(zoo.Mlp(), X), a, X)))(
        adapter
    )
    assert all((g == 0).all() for g in jax.tree.leaves(grads.frozen))
    assert all((g != 0).any() for g in jax.tree.leaves(grads.params))


def test_freezing_the_zero_factor_of_a_table_is_an_error():
    case = zoo.CASES["embed_attend"]
    config = jl.LoraConfig(targets="embed", freeze_a=True)
    with pytest.raises(TargetError, match="freeze_a applies to the table embed/embedding"):
        jl.plan(case.model, case.variables(), config, *case.inputs)
