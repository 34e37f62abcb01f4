"""The Flax models of transformers 4: their call and their generation with an adapter.

They need an environment of their own (`make test-transformers4`). Tiny random configs, no network.
"""

import importlib
import importlib.metadata
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora as jl
from jaxlora.errors import AdapterError, ModelError, TargetError
from tests.test_properties import assert_close, assert_trees_close, assert_trees_equal, trained


def _version() -> str:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "none"


needs_transformers_4 = pytest.mark.skipif(
    not _version().startswith("4."),
    reason=f"transformers is {_version()}, the Flax models are in 4: make test-transformers4",
)
IDS = np.array([[5, 3, 7, 1, 2], [2, 9, 9, 4, 6]])


def make(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf: Any = importlib.import_module("transformers")

        sizes = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 16}
        bert = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "max_position_embeddings": 18,
        }
        t5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
        gpt2 = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16}
        cls, config = {
            "gpt2": ("FlaxGPT2LMHeadModel", tf.GPT2Config(**sizes, **gpt2)),
            "bert": ("FlaxBertForSequenceClassification", tf.BertConfig(**sizes, **bert)),
            "roberta": ("FlaxRobertaForMaskedLM", tf.RobertaConfig(**sizes, **bert)),
            "t5": (
                "FlaxT5ForConditionalGeneration",
                tf.T5Config(**sizes, **t5, decoder_start_token_id=0),
            ),
        }[name]
        model = getattr(tf, cls)(config, seed=0)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    model.params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), model.params
    )
    return model


@pytest.fixture(scope="module", params=["gpt2", "bert", "roberta", "t5"])
def case(request):
    """(model, keyword arguments of its call)."""
    with pytest.MonkeyPatch.context() as patch:
        clip = jnp.clip

        def with_a_max(x, *bounds, a_max=None, **named):  # FlaxT5's keyword, gone from JAX since
            return clip(x, *bounds, **named) if a_max is None else clip(x, max=a_max)

        patch.setattr(jnp, "clip", with_a_max)
        more = {"decoder_input_ids": IDS[:, ::-1].copy()} if request.param == "t5" else {}
        yield make(request.param), more


@pytest.fixture(scope="module")
def gpt2():
    return make("gpt2")


def adapter_of(model, more, **options):
    config = jl.LoraConfig(rank=2, **options)
    return jl.lora_init(jax.random.key(2), model, config, IDS, **more)


@needs_transformers_4
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"bias": "all"}], ids=str)
def test_a_model_starts_as_itself_and_equals_merged(case, options):
    model, more = case
    if more and "bias" in options:
        pytest.skip("T5 has no biases")
    adapter = adapter_of(model, more, **options)
    base = model(IDS, **more).logits
    assert_close(jl.lora_apply(model, adapter, IDS, **more).logits, base)
    adapter = trained(adapter)
    out = jl.lora_apply(model, adapter, IDS, **more)
    assert type(out) is type(model(IDS, **more))
    assert_close(out.logits, model(IDS, params=jl.merge(model, adapter), **more).logits)
    assert np.abs(out.logits - base).max() > 1e-2


@needs_transformers_4
def test_the_gradient_is_that_of_weight_space(case):
    model, more = case
    adapter = trained(adapter_of(model, more))

    def branch(adapter):
        return jnp.mean(jl.lora_apply(model, adapter, IDS, **more).logits ** 2)

    def weights(adapter):
        return jnp.mean(model(IDS, params=jl.merge(model, adapter), **more).logits ** 2)

    gradients = [jax.jit(jax.grad(loss))(adapter) for loss in (branch, weights)]
    assert_trees_close(*gradients)


@needs_transformers_4
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generation_with_an_adapter_is_that_of_the_merged_model(gpt2, how):
    from jaxlora.interop.transformers4 import generate

    model, adapter = gpt2, trained(adapter_of(gpt2, {}), 0.5)
    how = how | {"max_new_tokens": 6, "prng_key": jax.random.PRNGKey(3)}
    mask = jnp.ones_like(IDS)
    found = generate(model, adapter, IDS, attention_mask=mask, **how).sequences
    merged = jl.merge(model, adapter)
    expected = model.generate(IDS, params=merged, attention_mask=mask, **how).sequences
    np.testing.assert_array_equal(found, expected)
    assert (found != model.generate(IDS, attention_mask=mask, **how).sequences).any()


@needs_transformers_4
def test_kernels_that_are_stored_transposed_have_their_roles(gpt2):
    sites = adapter_of(gpt2, {}, targets=("c_attn", "c_fc")).spec.sites
    assert {(s.kind, s.layout.shape, s.layout.roles) for s in sites} == {
        ("FlaxConv1D", (24, 8), "oi"),
        ("FlaxConv1D", (32, 8), "oi"),
    }


@needs_transformers_4
def test_a_tied_table_is_refused_in_a_branch_and_adapted_in_weight_space(gpt2):
    with pytest.raises(TargetError, match="wte/embedding is changed on its way"):
        adapter_of(gpt2, {}, targets="wte")
    adapter = trained(adapter_of(gpt2, {}, targets="wte", mode="weights"))
    out = jl.lora_apply(gpt2, adapter, IDS).logits
    assert_close(out, gpt2(IDS, params=jl.merge(gpt2, adapter)).logits)


@needs_transformers_4
def test_a_step_trains_the_adapter_alone(gpt2, tmp_path):
    adapter = adapter_of(gpt2, {}, dropout=0.1)
    before = jax.tree.map(np.array, gpt2.params)

    def loss_fn(adapter, params, ids, key):
        rng = jax.random.key_data(key)  # transformers 4 knows raw keys only
        logits = jl.lora_apply(
            gpt2, adapter, ids, params=params, dropout_rng=rng, train=True
        ).logits
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits[:, :-1], ids[:, 1:]).mean()

    tx = optax.adam(3e-2)
    step = jl.make_train_step(loss_fn, tx)
    state = jl.TrainState.create(adapter, tx, jax.random.key(0))
    losses = []
    for _ in range(20):
        state, metrics = step(state, gpt2.params, jnp.asarray(IDS))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert_trees_equal(gpt2.params, before)
    path = jl.save_adapter(tmp_path / "adapter", state.adapter, params=gpt2.params)
    loaded = jl.load_adapter(path, params=gpt2.params)
    assert_trees_equal(loaded, state.adapter)
    out = jl.lora_apply(gpt2, loaded, IDS).logits
    assert_close(out, gpt2(IDS, params=jl.merge(gpt2, loaded)).logits)


@needs_transformers_4
def test_dropout_is_active_in_training_with_a_key_only(gpt2):
    adapter = trained(adapter_of(gpt2, {}, dropout=0.5))
    rng = jax.random.PRNGKey(0)
    plain = jl.lora_apply(gpt2, adapter, IDS).logits
    np.testing.assert_array_equal(plain, jl.lora_apply(gpt2, adapter, IDS, dropout_rng=rng).logits)
    on = jl.lora_apply(gpt2, adapter, IDS, dropout_rng=rng, train=True).logits
    assert np.abs(on - plain).max() > 1e-2


@needs_transformers_4
def test_errors_name_the_model_and_the_adapter(gpt2):
    with pytest.raises(TargetError, match=r"'c_atn' matched none.*Nearest: .*c_attn"):
        adapter_of(gpt2, {}, targets="c_atn")
    other = adapter_of(make("bert"), {})
    with pytest.raises(AdapterError, match="The params have no leaf bert/"):
        jl.lora_apply(gpt2, other, IDS)
    bare = type(gpt2)(gpt2.config, _do_init=False)
    with pytest.raises(ModelError, match="holds no params"):
        jl.plan(bare, jl.LoraConfig(), IDS)


def test_what_is_no_model_of_transformers_4_is_named():
    from jaxlora.interop import transformers4

    with pytest.raises(ModelError, match="The model is a dict, expected a FlaxPreTrainedModel"):
        transformers4.plan({}, jl.LoraConfig(), IDS)
