"""Google's gemma library: the rules of its einsum modules, whose equation comes with the call.

    from jaxlora.interop import gemma
    gemma.register()

From then on `plan`, `lora_init`, `lora_apply` and `merge` serve its models: attention's `q_einsum`,
`kv_einsum`, `qkv_einsum` and `attn_vec_einsum`, and the two kernels, `gating_einsum` and `linear`,
that stand in one scope of each feed-forward block. The table `input_embedding` is read by the
embedder as it is: it can be trained in full or adapted in weight space, not in a branch.
"""

import importlib
import importlib.util
from typing import Any

import jax

from jaxlora import layers
from jaxlora.errors import LoraError, MissingDependencyError, listing
from jaxlora.layers import Linear

PLACES = ("gemma.gm.nn._layers", "gemma.gm.nn.gemma3n._layers")
"""The modules of gemma that define an `Einsum`."""


def register() -> list[str]:
    """Registers the rules of the einsum modules of the gemma that is installed.

    Returns:
      The modules of gemma whose `Einsum` is served from now on. Calling it again changes nothing.

    Raises:
      MissingDependencyError: gemma is not installed, or not all that it imports is.
      LoraError: none of the modules is where gemma 3.3 has it.
    """
    if importlib.util.find_spec("gemma") is None:
        raise MissingDependencyError(
            "Adapting Google's Gemma models needs the package 'gemma', which is not installed. "
            "Next: pip install gemma."
        )
    found = []
    for place in PLACES:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as e:
            if e.name and place.startswith(e.name):
                continue  # another version of gemma
            raise MissingDependencyError(
                f"gemma itself needs the package '{e.name}', which is not installed. "
                f"Next: pip install {e.name}."
            ) from e
        layers.register(module.Einsum)(_einsum)
        found.append(place)
    if not found:
        raise LoraError(
            f"This gemma has none of {listing(PLACES)}, expected one, as in gemma 3.3. "
            "Register its einsum module yourself: `jaxlora.register`."
        )
    return found


def _einsum(module: Any, eqn: str, x: jax.Array) -> Linear:
    scale = getattr(module, "w_scale", None)  # what gemma 3n multiplies the kernel by
    return Linear(module.weight_name, eqn, x * scale if scale else x)
