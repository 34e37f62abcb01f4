"""Writes the adapters of this version that later ones must load: `python make_compat.py`.

They go to compat/<version>, which is never written again once the version is out.
"""

from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxlora as jl
from jaxlora.interop import loralib, peft, safetensors

MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
NAMES = {"layers_0": "first", "layers_2": "second"}
X = jnp.linspace(-1, 1, 10).reshape(2, 5)


def base():
    """The base, by a formula, so that no random generator is part of the promise."""

    def leaf(*shape):
        return jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)

    return {
        "layers_0": {"kernel": leaf(5, 4), "bias": leaf(4)},
        "layers_2": {"kernel": leaf(4, 3), "bias": leaf(3)},
    }


def main(folder: Path) -> None:
    """Writes all forms, and the output that each must give."""
    config = jl.LoraConfig(rank=2, alpha=4, rank_pattern={"layers_2": 1})
    adapter = jl.lora_init(jax.random.key(0), MODEL, {"params": base()}, config, X)
    adapter = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapter)
    jl.save_adapter(folder / "orbax", adapter, params=base())
    safetensors.save(folder / "adapter.safetensors", adapter, base())
    peft.save(folder / "peft", adapter, MODEL, NAMES)
    with jax.default_matmul_precision("highest"):
        out = jl.lora_apply(MODEL, {"params": base()}, adapter, X)
    np.save(folder / "output.npy", np.asarray(out))
    # One rank for all layers: loralib's form is told one alpha.
    even = jl.lora_init(
        jax.random.key(0), MODEL, {"params": base()}, jl.LoraConfig(rank=2, alpha=4), X
    )
    even = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), even)
    loralib.save(folder / "loralib.pt", even, MODEL, NAMES)
    with jax.default_matmul_precision("highest"):
        out = jl.lora_apply(MODEL, {"params": base()}, even, X)
    np.save(folder / "output_loralib.npy", np.asarray(out))
    for file in folder.rglob("commit_success.txt"):
        file.write_text("")  # it tells where the folder was made, and is not read


if __name__ == "__main__":
    main(Path(__file__).parent / "compat" / version("jaxlora"))
