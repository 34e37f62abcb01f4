"""What a checkpoint of loralib holds: pairs of factors, and tensors that are whole."""

import os
from typing import Any, NamedTuple

import numpy as np

from jaxlora.errors import CheckpointError, listing
from jaxlora.interop import torch_zip

WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Where in a larger dict the tensors may be."""

ENDS = {"lora_A": "a", "lora_B": "b"}
"""{how loralib calls a factor: how we do}."""


class State(NamedTuple):
    """What a file holds.

    Attributes:
      factors: {module: {"a": lora_A, "b": lora_B}}.
      whole: {name: tensor}, the heads and biases.
    """

    factors: dict[str, dict[str, np.ndarray]]
    whole: dict[str, np.ndarray]


def read(file: str | os.PathLike[str]) -> State:
    """Read what a file holds, whatever the model.

    Args:
      file: what `torch.save` wrote, as for `load`.

    Returns:
      Factors and whole tensors by their names in torch, less the "module." of a parallel model.

    Raises:
      CheckpointError: a file that is damaged, holds code or no factors, or one of a pair alone.
    """
    state: Any = torch_zip.read(file)
    for name in WRAPPERS:
        if isinstance(state.get(name), dict):
            state = state[name]
    other = [str(k)[:80] for k, x in state.items() if not isinstance(x, np.ndarray)]
    if other:
        raise CheckpointError(
            f"{file} holds {listing(other)}, which are no tensors, expected '<module>.lora_A' and "
            "'<module>.lora_B', alone or in a dict under 'model_state_dict'."
        )
    parallel = all(str(name).startswith("module.") for name in state)
    state = {str(n).removeprefix("module.") if parallel else str(n): x for n, x in state.items()}
    found = State({}, {})
    for name, x in state.items():
        module, _, end = name.rpartition(".")
        if end in ENDS:
            found.factors.setdefault(module, {})[ENDS[end]] = x
        else:
            found.whole[name] = x
    if not found.factors:
        raise CheckpointError(
            f"{file} holds no factors, expected '<module>.lora_A' and '<module>.lora_B'. It has "
            f"{listing(state) or 'nothing'}."
        )
    lone = [
        f"{module}.{end}"
        for module, parts in found.factors.items()
        for end, part in ENDS.items()
        if part not in parts
    ]
    if lone:
        raise CheckpointError(f"{file} lacks {listing(lone, 20)}, the other of each pair is there.")
    return found
