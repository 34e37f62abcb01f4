"""Google's gemma: plan, train a step and merge a tiny config of its own modules.

It needs an environment of its own (`make test-gemma`): gemma brings TensorFlow.
"""

import importlib.util
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora.errors import MissingDependencyError, TargetError
from jaxlora.interop import gemma
from tests.test_properties import assert_close, assert_trees_close, assert_trees_equal, trained

INSTALLED = importlib.util.find_spec("gemma") is not None
needs_gemma = pytest.mark.skipif(not INSTALLED, reason="gemma is not installed: make test-gemma")


@pytest.fixture(scope="module")
def library():
    """gemma's modules; what it and TensorFlow warn of on import is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kauldron.checkpoints as checkpoints  # pyright: ignore[reportMissingImports]

        if not hasattr(checkpoints, "AbstractPartialLoader"):
            # gemma 3.3.0 names a class that kauldron 1.4.2 lacks; nothing here loads with it.
            checkpoints.AbstractPartialLoader = object
        assert "gemma.gm.nn._layers" in gemma.register()
        from gemma.gm.nn import _config, _modules, _transformer  # pyright: ignore[reportMissingImports]
    return _config, _modules, _transformer


@pytest.fixture(scope="module", params=[False, True], ids=["gemma3", "gemma2"])
def tiny(library, request):
    """(model, variables, tokens): grouped queries and a sliding window, or one fused qkv kernel."""
    configs, modules, transformer = library
    fused = request.param

    class Tiny(transformer.Transformer):
        config: Any = configs.TransformerConfig(
            num_embed=32,
            embed_dim=8,
            hidden_dim=12,
            num_heads=2,
            num_kv_heads=2 if fused else 1,
            head_dim=4,
            final_logit_softcap=30.0 if fused else None,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            use_qk_norm=not fused,
            transpose_gating_einsum=fused,
            sliding_window_size=3,
            attention_types=(
                modules.AttentionType.LOCAL_SLIDING,
                modules.AttentionType.GLOBAL,
            ),
        )

    model, tokens = Tiny(dtype=jnp.float32), jnp.array([[5, 3, 7, 1, 2], [2, 9, 9, 4, 6]])
    variables = model.init(jax.random.key(0), tokens)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return (
        model,
        jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), variables),
        tokens,
    )


@needs_gemma
def test_every_einsum_of_a_model_is_a_site(tiny):
    model, variables, tokens = tiny
    sites = jl.plan(model, variables, jl.LoraConfig(rank=2), tokens).sites
    found = {site.path.removeprefix("layer_0/"): site.layout.roles for site in sites}
    expected = {
        "attn/attn_vec_einsum/w": "iio",
        "mlp/gating_einsum": "ooi" if model.config.transpose_gating_einsum else "oio",
        "mlp/linear": "io",
    }
    if model.config.num_kv_heads == model.config.num_heads:
        expected |= {"attn/qkv_einsum/w": "ooio"}
    else:
        expected |= {"attn/q_einsum/w": "oio", "attn/kv_einsum/w": "ooio"}
    assert {k: v for k, v in found.items() if not k.startswith("layer_1")} == expected
    assert len(sites) == 2 * len(expected)


@needs_gemma
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_a_step_changes_the_adapter_alone_and_what_it_learned_merges(tiny, options):
    model, variables, tokens = tiny
    config = jl.LoraConfig(rank=2, **options)
    adapter = jl.lora_init(jax.random.key(2), model, variables, config, tokens)
    base = model.apply(variables, tokens).logits
    assert_close(jl.lora_apply(model, variables, adapter, tokens).logits, base)

    def loss_fn(adapter, variables, batch, key):
        logits = jl.lora_apply(model, variables, adapter, batch).logits
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch).mean()

    tx = optax.adam(1e-2)
    step = jl.make_train_step(loss_fn, tx)
    state = jl.TrainState.create(adapter, tx, jax.random.key(3))
    before = jax.tree.map(np.array, variables)
    losses = []
    for _ in range(5):
        state, metrics = step(state, variables, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert_trees_equal(variables, before)
    tuned = jl.lora_apply(model, variables, state.adapter, tokens).logits
    merged = {"params": jl.merge(variables["params"], state.adapter)}
    assert_close(model.apply(merged, tokens).logits, tuned)
    assert np.abs(tuned - base).max() > 1e-2


@needs_gemma
def test_the_gradient_is_that_of_weight_space(tiny):
    model, variables, tokens = tiny
    config = jl.LoraConfig(rank=2)
    adapter = trained(jl.lora_init(jax.random.key(2), model, variables, config, tokens))

    def branch(adapter):
        return jnp.mean(jl.lora_apply(model, variables, adapter, tokens).logits ** 2)

    def weights(adapter):
        merged = {"params": jl.merge(variables["params"], adapter)}
        return jnp.mean(model.apply(merged, tokens).logits ** 2)

    assert_trees_close(jax.grad(branch)(adapter), jax.grad(weights)(adapter))


@needs_gemma
def test_the_scaled_einsum_of_gemma_3n_is_served_with_its_scale(library):
    from gemma.gm.nn.gemma3n import _layers  # pyright: ignore[reportMissingImports]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return _layers.Einsum((8, 3), w_scale=0.25, name="scaled")("...d,df->...f", x)

    model, x = Model(), jax.random.normal(jax.random.key(0), (5, 8))
    variables = model.init(jax.random.key(1), x)
    config = jl.LoraConfig(rank=2)
    adapter = trained(jl.lora_init(jax.random.key(2), model, variables, config, x))
    merged = {"params": jl.merge(variables["params"], adapter)}
    assert_close(jl.lora_apply(model, variables, adapter, x), model.apply(merged, x))


@needs_gemma
def test_the_embedding_is_trained_in_full_or_in_weight_space(tiny):
    model, variables, tokens = tiny
    table = "embedder/input_embedding"
    with pytest.raises(TargetError, match=r"(?s)Embedder.*weights"):
        jl.plan(model, variables, jl.LoraConfig(targets=table), tokens)
    ways: list[dict[str, Any]] = [
        {"targets": "linear", "modules_to_save": table},
        {"targets": table, "mode": "weights"},
    ]
    for options in ways:
        config = jl.LoraConfig(rank=2, **options)
        adapter = trained(jl.lora_init(jax.random.key(2), model, variables, config, tokens))
        merged = {"params": jl.merge(variables["params"], adapter)}
        tuned = jl.lora_apply(model, variables, adapter, tokens).logits
        assert_close(tuned, model.apply(merged, tokens).logits)


@pytest.mark.skipif(INSTALLED, reason="gemma is installed")
def test_without_gemma_the_error_says_what_to_install():
    with pytest.raises(MissingDependencyError, match="pip install gemma"):
        gemma.register()
