"""Adapters from and to HF PEFT: `load` and `save`.

A folder of PEFT's holds `adapter_config.json` and `adapter_model.safetensors`. What the fields of
the one mean here is a table in `peft_config`; the names of the other are in `peft_export`.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlora.adapter import Adapter, check_leaves
from jaxlora.errors import ConfigError
from jaxlora.interop import factors, vllm
from jaxlora.interop.peft_config import FILE
from jaxlora.interop.peft_export import Export, export
from jaxlora.interop.peft_load import load as load
from jaxlora.interop.tensors import SAFETENSORS, write_safetensors
from jaxlora.models.names import Names
from jaxlora.models.saved import new_folder, written_whole

PROFILES: dict[str, Callable[[Export], Export]] = {
    name: functools.partial(vllm.served, profile=name) for name in vllm.SERVERS
}
"""What is done to an export for those who serve it; a profile is one entry."""


def save(
    folder: str | Path,
    adapter: Adapter,
    model: Any,
    names: Names | Mapping[str, str] | None = None,
    *,
    base_model_name_or_path: str | None = None,
    profile: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an adapter as a folder that PEFT loads, with the same outputs.

    What PEFT has no form for is written as an equal one: a fused kernel's blocks and the starting
    factors of PiSSA and OLoRA become further rows of A, a frozen A an ordinary one. The folder
    appears whole or not at all.

    Args:
      folder: where; it must not exist, unless `overwrite`.
      adapter: the adapter.
      model: its model; of one of `jaxlora.models` the names in torch are known.
      names: for any other model {our module path: torch's module path}, `{}` for a layer's number.
      base_model_name_or_path: the base's id or folder, for those who load the adapter by itself.
      profile: "vllm" or "sglang": one rank and alpha, scales in B, and nothing that they refuse.
      overwrite: replace a folder that is there.

    Returns:
      The folder's absolute path.

    Raises:
      CheckpointError: the folder exists.
      AdapterError: what PEFT, or the profile, has no form for; each site is named with the reason.
      ConfigError: the model has no table of names, or an unknown profile.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, tempfile
      >>> from jaxlora.interop import peft
      >>> model, x = nn.Sequential([nn.Dense(2)]), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> folder = peft.save(tempfile.mkdtemp() + "/new", adapter, model, {"layers_0": "0"})
      >>> sorted(file.name for file in folder.iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = new_folder(folder, overwrite)
    if profile is not None and profile not in PROFILES:
        raise ConfigError(
            f"profile is {profile!r}, expected one of {', '.join(PROFILES)}, or None."
        )
    check_leaves(adapter)
    out = export(adapter, model, factors.names_of(model, names))
    if profile is not None:
        out = PROFILES[profile](out)
    config = out.config() | {"base_model_name_or_path": base_model_name_or_path}
    with written_whole(folder) as new:
        (new / FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_safetensors(new / SAFETENSORS, out.tensors())
    return folder
