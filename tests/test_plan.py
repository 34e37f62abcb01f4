"""plan: which kernels a config means, and what is wrong with it, before any array exists."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora.errors import ConfigError, LoraError, ModelError, TargetError
from tests import zoo

X = jax.ShapeDtypeStruct((2, 8), jnp.float32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(8, name=name)(x) for name in ("query", "key", "value"))
        return nn.LayerNorm(name="norm")(x + nn.tanh(nn.Dense(8, name="out")(q * k + v)))


class Encoder(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = Layer(name=f"layer_{i}")(x)
        return x


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, ids, flag=None):
        x = nn.Embed(11, 8, name="embed")(ids)
        if flag == "mean":
            x = x.mean(0, keepdims=True)
        return nn.Dense(3, name="head")(Encoder(name="encoder")(x))


IDS = jax.ShapeDtypeStruct((5,), jnp.int32)


def plan(model, *inputs, kwargs=None, rank: Any = 2, **config: Any):
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jl.plan(model, variables, jl.LoraConfig(rank=rank, **config), *inputs, **kwargs or {})


def paths(planned):
    return [site.path.removesuffix("/kernel") for site in planned.sites]


def test_the_table_shows_each_kernel_and_the_totals():
    planned = plan(
        zoo.Mlp(),
        X,
        rank=6,
        alpha=3,
        rank_pattern={"up": 2},
        alpha_pattern={"up": 8},
        bias="lora_only",
    )
    assert str(planned).splitlines() == [
        "path         kind             kernel   rank  scaling  parameters",
        "-----------  ---------------  -------  ----  -------  ----------",
        "down/kernel  Dense            (12, 4)  6 *   0.5              96",
        "up/kernel    Dense            (8, 12)  2     4                40",
        "down/bias    trained in full  (4,)                             4",
        "up/bias      trained in full  (12,)                           12",
        "* rank above the kernel's smaller side: it can give no other update",
        "2 kernels adapted, 152 of 320 parameters trainable (47.5000%)",
        "0.00 MB to train on a base of 0.00 MB",
    ]


def test_the_totals_count_what_lora_init_makes():
    model, x = Classifier(), jnp.arange(5)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    config = jl.LoraConfig(rank=2, modules_to_save="head", bias="all", param_dtype="bfloat16")
    planned = jl.plan(model, variables, config, x)
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    sizes = [leaf.size for leaf in jax.tree.leaves(adapter)]
    factors = 8 * 2 * (8 + 8)
    assert planned.num_trainable == sum(sizes) == factors + (8 * 3 + 3) + 2 * 5 * 8
    base = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert planned.num_base == base
    assert planned.num_total == base + factors
    assert planned.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    assert planned.spec == adapter.spec
    text = jl.summary(variables["params"], adapter)
    share = 100 * planned.num_trainable / planned.num_total
    assert text == (
        f"trainable params: {planned.num_trainable:,} || all params: {planned.num_total:,} || "
        f"trainable%: {share:.4f}"
    )


def test_a_rank_above_the_smaller_side_is_marked_and_no_error():
    planned = plan(zoo.Mlp(), X, rank=5)
    assert [site.wasteful() for site in planned.sites] == [True, False]
    assert "down/kernel  Dense  (12, 4)  5 * " in str(planned)
    assert "rank above" not in str(plan(zoo.Mlp(), X, rank=4))


WIDTH, DEPTH, VOCABULARY = 12_288, 96, 50_257


class GptBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        q, k, v = (nn.Dense(WIDTH, name=name)(x) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqd,bkd->bqk", q, k)
        x = x + nn.Dense(WIDTH, name="out")(jnp.einsum("bqk,bkd->bqd", nn.softmax(scores), v))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(4 * WIDTH, name="up")(x))), None


class Gpt(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embed(ids)
        if self.scanned:
            blocks = nn.scan(
                GptBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
            )
            x, _ = blocks(name="layers")(x, None)
        else:
            for i in range(DEPTH):
                x, _ = GptBlock(name=f"layer_{i}")(x)
        return embed.attend(x)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scan"])
def test_gpt3_175b_is_planned_without_allocating(scanned):
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(Gpt(scanned).init, key, ids)
    config = jl.LoraConfig(rank=4, targets=["query", "value"])
    before = {id(x) for x in jax.live_arrays()}
    planned = jl.plan(Gpt(scanned), variables, config, ids)
    made = [x for x in jax.live_arrays() if id(x) not in before]
    assert sum(x.size for x in made) < 1000
    assert planned.num_trainable == 18_874_368
    assert len(planned.sites) == (2 if scanned else 2 * DEPTH)
    assert 174e9 < planned.num_base < 176e9
    assert 9_000 < planned.num_base / planned.num_trainable < 10_000
    assert planned.nbytes == 4 * 18_874_368


PATTERNS = {
    "a name": ("query", ["layer_0/query", "layer_1/query"]),
    "a list": (["query", "out"], ["layer_0/out", "layer_0/query", "layer_1/out", "layer_1/query"]),
    "a path": ("layer_1/key", ["layer_1/key"]),
    "a regex": ("layer_[1-9]/(key|out)", ["layer_1/key", "layer_1/out"]),
    "a kernel": ("layer_0/value/kernel", ["layer_0/value"]),
    "as in PEFT": (r".*layer_0.*\.?(query|value)", ["layer_0/query", "layer_0/value"]),
}


@pytest.mark.parametrize(("targets", "expected"), PATTERNS.values(), ids=PATTERNS.keys())
def test_targets_name_layers_by_pattern(targets, expected):
    assert paths(plan(Encoder(), X, targets=targets)) == expected


def test_all_linear_leaves_out_embeddings_norms_and_what_modules_to_save_names():
    planned = plan(Classifier(), IDS, modules_to_save="head")
    expected = [f"encoder/layer_{i}/{n}" for i in (0, 1) for n in ("key", "out", "query", "value")]
    assert paths(planned) == expected
    assert [leaf.path for leaf in planned.spec.saved] == ["head/bias", "head/kernel"]
    assert paths(plan(Classifier(), IDS)) == [*expected, "head"]


def test_an_embedding_is_adapted_where_it_is_named():
    planned = plan(Classifier(), IDS, targets=["embed", "all-linear"])
    assert paths(planned)[0] == "embed/embedding"
    assert len(planned.sites) == 10


def test_exclude_covers_a_scope_or_a_layer():
    assert paths(plan(Encoder(), X, targets="query", exclude="layer_0")) == ["layer_1/query"]
    assert paths(plan(Encoder(1), X, exclude=["query", "layer_0/out"])) == [
        "layer_0/key",
        "layer_0/value",
    ]


UNMATCHED = {
    "targets": ({"targets": "quary"}, r"Target pattern 'quary' .* Nearest: query \(2\), "),
    "one of the targets": (
        {"targets": ["query", "velue"]},
        r"Target pattern 'velue' .* Nearest: value \(2\), ",
    ),
    "a path": (
        {"targets": "layer_1/kez"},
        r"Target pattern 'layer_1/kez' .* Nearest: layer_1/key \(1\), ",
    ),
    "exclude": ({"exclude": "outt"}, r"exclude pattern 'outt' .* Nearest: out \(2\), "),
    "modules_to_save": (
        {"modules_to_save": "kay"},
        r"modules_to_save pattern 'kay' .* Nearest: key \(2\), ",
    ),
}


@pytest.mark.parametrize(("config", "message"), UNMATCHED.values(), ids=UNMATCHED.keys())
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_and_counts(config, message):
    with pytest.raises(
        TargetError, match=message.replace(" .* ", " matched none of the 8 kernels. ")
    ):
        plan(Encoder(), X, **config)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_value_pattern_that_matches_no_adapted_kernel_is_an_error(field):
    with pytest.raises(
        TargetError,
        match=rf"{field} pattern 'key' matched none of the 2 kernels. Nearest: layer_\d/",
    ):
        plan(Encoder(), X, targets="query", **{field: {"key": 4}})


def test_rank_and_alpha_patterns_set_rank_and_scaling():
    planned = plan(
        Encoder(),
        X,
        targets=["query", "value"],
        rank=2,
        alpha=16,
        rank_pattern={"layer_0/query": 4, "value": 8},
        alpha_pattern={"layer_1/.*": 4},
    )
    found = {site.path: (site.rank, site.scaling) for site in planned.sites}
    assert found == {
        "layer_0/query/kernel": (4, 4.0),
        "layer_0/value/kernel": (8, 2.0),
        "layer_1/query/kernel": (2, 2.0),
        "layer_1/value/kernel": (8, 0.5),
    }


def test_rslora_scales_by_the_root_of_each_rank():
    planned = plan(
        Encoder(1), X, targets="query|key", rank=4, rslora=True, rank_pattern={"key": 16}
    )
    assert [(site.rank, site.scaling) for site in planned.sites] == [(16, 4.0), (4, 8.0)]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_value_patterns_that_disagree_are_an_error(field):
    with pytest.raises(
        TargetError, match=rf"{field} gives layer_0/query/kernel different values: .*expected one"
    ):
        plan(Encoder(), X, targets="query", **{field: {"query": 4, "layer_0/.*": 2}})
    agreed = plan(Encoder(), X, targets="query", **{field: {"query": 4, "layer_0/.*": 4}})
    assert len({(site.rank, site.scaling) for site in agreed.sites}) == 1


def test_a_module_that_is_a_target_and_saved_is_an_error():
    with pytest.raises(
        TargetError,
        match=r"head/\w+ is named both by the target pattern 'head' and by modules_to_save",
    ):
        plan(Classifier(), IDS, targets=["query", "head"], modules_to_save="head")


def test_a_target_that_is_excluded_as_a_whole_is_an_error():
    with pytest.raises(
        TargetError, match=r"All that target pattern 'query' matches is excluded by 'query'"
    ):
        plan(Encoder(), X, targets="query", exclude="query")


def test_a_model_with_nothing_to_adapt_is_an_error():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(name="norm")(x)

    with pytest.raises(
        TargetError, match=r"'all-linear' found no layer to adapt.* norm/bias, norm/scale"
    ):
        plan(Norm(), X)


def test_a_bias_mode_without_a_bias_is_an_error():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, use_bias=False, name="dense")(x)

    with pytest.raises(TargetError, match=r"bias is 'all', but no leaf that it covers is named"):
        plan(Bare(), X, bias="all")


def test_naming_a_bias_or_a_norm_as_a_target_is_an_error():
    with pytest.raises(TargetError, match=r"Target pattern 'norm' matched none of the 8 kernels"):
        plan(Encoder(), X, targets=["query", "norm"])
    with pytest.raises(TargetError, match=r"Target pattern 'query/bias' matched none of the 8"):
        plan(Encoder(), X, targets="query/bias")


class Wrapped(nn.Module):
    """A layer that the interceptor cannot reach, and one that it can."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="good")(x)
        if self.kind == "weight_norm":
            return nn.WeightNorm(nn.Dense(4, name="bad"), name="wrapper")(x)
        if self.kind == "spectral_norm":
            return nn.SpectralNorm(nn.Dense(4, name="bad"), name="wrapper")(x, update_stats=False)
        if self.kind == "lstm":
            cell = nn.OptimizedLSTMCell(4, name="bad")
            return cell(cell.initialize_carry(jax.random.key(0), x.shape), x)[1]

        def trans_in(variables):
            return jax.tree.map(lambda p: p / 2, variables)

        dense = nn.map_variables(nn.Dense, "params", trans_in, init=self.is_initializing())
        return dense(4, name="bad")(x)


UNREACHABLE = {
    "weight_norm": r"WeightNorm at wrapper reads params in a way that.*`exclude` it",
    "spectral_norm": r"SpectralNorm at wrapper reads params in a way that.*`exclude` it",
    "lstm": r"bad/\w+/kernel is a target, but \w+ is no layer that can be adapted.*`exclude` it",
    "map_variables": r"bad/kernel is changed on its way to its layer.*`exclude` it",
}


@pytest.mark.parametrize(("kind", "message"), UNREACHABLE.items(), ids=UNREACHABLE.keys())
def test_a_layer_that_cannot_be_reached_is_an_error_and_exclude_gets_past_it(kind, message):
    with pytest.raises(TargetError, match=message):
        plan(Wrapped(kind), X)
    assert paths(plan(Wrapped(kind), X, exclude="bad")) == ["good"]
    assert paths(plan(Wrapped(kind), X, targets="good")) == ["good"]


def test_an_excluded_unreachable_layer_runs_as_the_base_has_it():
    model, x = Wrapped("weight_norm"), jax.random.normal(jax.random.key(5), (2, 8))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    config = jl.LoraConfig(rank=2, exclude="bad")
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    got = jl.lora_apply(model, variables, adapter, x)
    merged = jl.merge(variables["params"], adapter)
    expected: Any = model.apply({"params": merged}, x)
    np.testing.assert_allclose(got, expected, 1e-5, 1e-5)


def test_a_kernel_used_in_two_ways_is_an_error():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Einsum((8, 8), None, use_bias=False, name="shared")
            return dense(x, "bi,io->bo") + dense(x, "bi,oi->bo")

    with pytest.raises(
        TargetError, match=r"shared/kernel is used in two ways, with axes io and oi, expected one"
    ):
        plan(Tied(), X)


class Choice(nn.Module):
    @nn.compact
    def __call__(self, x, both=True):
        y = nn.Dense(8, name="always")(x)
        other = nn.Dense(8, name="sometimes")
        return other(y) if both else y


def test_a_target_that_the_inputs_do_not_run_is_an_error():
    with pytest.raises(
        TargetError, match=r"sometimes/kernel is a target, but the example inputs run no layer that"
    ):
        plan(Choice(), X, kwargs={"both": False})
    assert paths(plan(Choice(), X, targets="always", kwargs={"both": False})) == ["always"]


def test_inputs_that_the_model_rejects_are_a_model_error():
    model = Encoder()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    for bad in ((jnp.ones((2, 7)),), (), ("text",), (None,)):
        with pytest.raises(
            ModelError, match=r"The model rejects the example inputs: \w+: .*Expected inputs that"
        ):
            jl.plan(model, variables, jl.LoraConfig(), *bad)
    with pytest.raises(ModelError, match=r"rejects the example inputs: TypeError: .*unexpected"):
        jl.plan(model, variables, jl.LoraConfig(), X, flag=1)


def test_inputs_may_be_abstract_or_not_and_flags_stay_what_they_are():
    model = Classifier()
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
    config = jl.LoraConfig(rank=2)
    abstract = jl.plan(model, variables, config, IDS, flag="mean")
    assert jl.plan(model, variables, config, jnp.arange(5), "mean") == abstract
    assert jl.plan(model, variables, config, np.arange(5), flag=None) == abstract


def test_method_and_mutable_are_taken_as_by_apply():
    model, ids = zoo.TiedEmbedding(), jnp.arange(10).reshape(2, 5)
    planned = plan(model, ids, targets=["embed", "mix"], kwargs={"method": "encode"})
    assert paths(planned) == ["embed/embedding", "mix"]
    normed = zoo.CASES["batch_norm_train"]
    assert paths(plan(normed.model, *normed.inputs)) == ["dense", "head"]
    with pytest.raises(ModelError, match=r"rejects the example inputs: ModifyScopeVariableError"):
        plan(normed.model, *normed.inputs, kwargs={"mutable": False})


def test_a_joint_tree_passed_as_base_is_an_error():
    model, x = zoo.Mlp(), jnp.ones((2, 8))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(targets="up"), x)
    joint = {"params": jl.combine(variables["params"], adapter)}
    with pytest.raises(
        LoraError, match=r"hold LoRA leaves already: up/kernel_lora_a, up/kernel_lora_b.*`split"
    ):
        jl.plan(model, joint, jl.LoraConfig(), x)


def test_what_is_no_module_no_variables_or_no_config_is_an_error():
    model = zoo.Mlp()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    with pytest.raises(ModelError, match=r"The model is a function, expected a flax.linen.Module"):
        jl.plan(lambda x: x, variables, jl.LoraConfig(), X)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match=r"expected the collection 'params'"):
        jl.plan(model, variables["params"], jl.LoraConfig(), X)
    with pytest.raises(ConfigError, match=r"The config is a dict, expected a LoraConfig"):
        jl.plan(model, variables, {"rank": 4}, X)  # pyright: ignore[reportArgumentType]


def test_a_table_that_is_transposed_past_its_layer_is_no_target_but_no_obstacle():
    class Tied(nn.Module):
        """As the Flax models of transformers 4 tie the output head."""

        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 6, name="embed")
            x = nn.tanh(nn.Dense(6, name="mix")(embed(ids)))
            return x @ embed.variables["params"]["embedding"].T

    model, ids = Tied(), jnp.arange(5)
    variables = model.init(jax.random.key(0), ids)
    found = jl.plan(model, variables, jl.LoraConfig(rank=2), ids).sites
    assert [site.path for site in found] == ["mix/kernel"]
    with pytest.raises(TargetError, match="embed/embedding is changed on its way to its layer"):
        jl.plan(model, variables, jl.LoraConfig(rank=2, targets="embed"), ids)
