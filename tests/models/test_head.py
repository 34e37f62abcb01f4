"""The losses of a causal model, whole or in pieces of the sequence."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl
from jaxlora import models
from jaxlora.errors import ConfigError
from jaxlora.models import head

SMALL: Any = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
MODELS: Any = {
    "llama": models.LlamaForCausalLM(models.LlamaConfig(**SMALL, num_attention_heads=2)),
    "gpt2": models.GPT2LMHeadModel(models.GPT2Config(vocab_size=23, n_embd=8, n_layer=1, n_head=2)),
}
IDS = jax.random.randint(jax.random.key(0), (2, 7), 0, 23)
LABELS = jnp.roll(IDS, -1, 1)


def made(name):
    model = MODELS[name]
    variables = model.init(jax.random.key(1), IDS)
    where = "lm_head" if name == "llama" else "wte"
    config = jl.LoraConfig(rank=2, targets=[where, "mlp/.*"])
    adapter = jl.lora_init(jax.random.key(2), model, variables, config, IDS)
    return model, variables, jax.tree.map(lambda x: x + 0.1, adapter)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_logits(name, smoothing):
    model, variables, adapter = made(name)
    logits = jl.lora_apply(model, variables, adapter, IDS)
    logs = np.asarray(jax.nn.log_softmax(logits))
    targets = np.eye(23)[np.asarray(LABELS)] * (1 - smoothing) + smoothing / 23
    losses = jl.lora_apply(model, variables, adapter, IDS, labels=LABELS, label_smoothing=smoothing)
    np.testing.assert_allclose(losses, -(targets * logs).sum(-1), 1e-5, 1e-6)


@pytest.mark.parametrize("most", [2 * 23, 3 * 2 * 23, 1], ids=["one", "three", "below_one"])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_change_neither_losses_nor_gradients(name, most, monkeypatch):
    model, variables, adapter = made(name)

    def total(adapter):
        losses = jl.lora_apply(model, variables, adapter, IDS, labels=LABELS, label_smoothing=0.1)
        return jnp.sum(losses**2), losses

    def both():  # a function of its own, so that nothing cached is found
        return jax.value_and_grad(lambda a: total(a), has_aux=True)(adapter)

    whole = both()
    monkeypatch.setattr(head, "CHUNK", most)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), both(), whole)


def test_no_array_of_all_the_logits_is_made_or_kept(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 2 * 2 * 23)
    read = nn.Dense(23)
    x = jnp.ones((2, 8, 4))
    variables = read.init(jax.random.key(0), x)

    def loss(x):
        run = nn.apply(lambda m, x: head.losses(m, x, jnp.zeros((2, 8), int), 23, 0.0), read)
        return run(variables, x).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert "f32[2,2,23]" in text
    assert "f32[2,8,23]" not in text
    assert "f32[4,2,2,23]" not in text
    _, back = jax.vjp(loss, x)
    assert max(leaf.size for leaf in jax.tree.leaves(back)) <= max(x.size, 4 * 23)


def test_a_remat_that_is_none_is_an_error():
    bad: Any = "all"
    with pytest.raises(ConfigError, match=r"remat is 'all', expected True, False, 'dots' or"):
        models.LlamaConfig(**SMALL, num_attention_heads=2, remat=bad)
