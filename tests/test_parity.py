"""Outputs equal HF PEFT's on the same weights (tests/references/make_peft.py)."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora as jl

REFERENCES = np.load(Path(__file__).parent / "references" / "peft.npz")
METHODS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
LAYERS = {
    "linear": nn.Dense(4),
    "embedding": nn.Embed(7, 5),
    "conv": nn.Conv(4, (2, 3), strides=2, padding="VALID"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_equal_pefts(kind, method):
    saved = {
        name.rpartition("/")[2]: REFERENCES[name]
        for name in REFERENCES
        if name.startswith(f"{kind}/{method}/")
    }
    x, y, weight = saved["x"], saved["y"], saved["weight"]
    if kind == "conv":  # torch is channels-first, and rows of its kernels are outputs
        x, y, weight = (
            x.transpose(0, 2, 3, 1),
            y.transpose(0, 2, 3, 1),
            weight.transpose(2, 3, 1, 0),
        )
        a, b = saved["lora_A"].transpose(0, 2, 3, 1), saved["lora_B"][..., 0, 0].T
    elif kind == "linear":
        weight, a, b = weight.T, saved["lora_A"], saved["lora_B"].T
    else:
        a, b = saved["lora_embedding_A"], saved["lora_embedding_B"].T
    name = "embedding" if kind == "embedding" else "kernel"
    params = {name: weight} | ({"bias": saved["bias"]} if "bias" in saved else {})
    leaves = {f"{name}_lora_a": a, f"{name}_lora_b": b}
    if method == "dora":
        leaves[f"{name}_lora_m"] = saved["lora_magnitude_vector"].ravel()

    model, variables = LAYERS[kind], {"params": jax.tree.map(jnp.asarray, params)}
    config = jl.LoraConfig(rank=2, alpha=3, targets=name, **METHODS[method])
    adapter = jl.lora_init(jax.random.key(0), model, variables, config, x)
    adapter = dataclasses.replace(adapter, params=jax.tree.map(jnp.asarray, leaves))
    np.testing.assert_allclose(jl.lora_apply(model, variables, adapter, x), y, 1e-5, 1e-5)
    merged = jl.merge(variables["params"], adapter)
    np.testing.assert_allclose(model.apply({"params": merged}, x), y, 1e-5, 1e-5)
