"""The tensors of an adapter's folder: read with every check, and written."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.errors import CheckpointError, listing, optional

SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_FLOAT8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
"""safetensors' names of the dtypes that its numpy side does not read."""


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of `adapter_model.safetensors`, or of `adapter_model.bin` without running it.

    Args:
      folder: the adapter's folder.

    Returns:
      {name: array}, of floating dtypes.

    Raises:
      CheckpointError: there is no such file, it is damaged, cut short or lies about its size, or
        holds a tensor that is not floating.
      MissingDependencyError: safetensors is not installed.
    """
    if (folder / SAFETENSORS).is_file():
        tensors = read_safetensors(folder / SAFETENSORS)
    elif (folder / PICKLE).is_file():
        tensors = _read_pickle(folder / PICKLE)
    else:
        there = listing(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"{folder} has no {SAFETENSORS}, expected the weights of an adapter. It holds {there}."
        )
    wrong = [n for n, x in tensors.items() if not jnp.issubdtype(x.dtype, jnp.floating)]
    if wrong:
        raise CheckpointError(
            f"{folder} has tensors of dtype {tensors[wrong[0]].dtype}, expected floating ones: "
            f"{listing(wrong)}. Quantized adapters must be dequantized first."
        )
    return tensors


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, bfloat16 and float8 included.

    Raises:
      CheckpointError: the file is damaged, cut short or lies about its size.
      MissingDependencyError: safetensors is not installed.
    """
    safetensors = optional("safetensors", f"Reading {file}")
    tensors: dict[str, np.ndarray] = {}
    try:
        with safetensors.safe_open(str(file), framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118  it is no mapping
                dtype = handle.get_slice(name).get_dtype()
                float8 = dtype in _FLOAT8
                tensors[name] = _raw(file, name) if float8 else handle.get_tensor(name)
    except CheckpointError:
        raise
    except Exception as e:  # safetensors raises errors of several kinds about one damage
        raise CheckpointError(
            f"{file} is damaged or cut short ({file.stat().st_size} bytes): {e}. Fetch it again."
        ) from e
    return tensors


def write_safetensors(file: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors as PEFT does."""
    safetensors = optional("safetensors.numpy", f"Writing {file}")
    arrays = {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}
    safetensors.save_file(arrays, str(file), metadata={"format": "pt"})


def _raw(file: Path, name: str) -> np.ndarray:
    """A tensor by its place in the file, whose header safetensors has found to be true."""
    with file.open("rb") as data:
        size = int.from_bytes(data.read(8), "little")
        about = json.loads(data.read(size))[name]
        begin, end = about["data_offsets"]
        data.seek(8 + size + begin)
        flat = np.frombuffer(data.read(end - begin), _FLOAT8[about["dtype"]])
    return flat.reshape(about["shape"])


def _read_pickle(file: Path) -> dict[str, np.ndarray]:
    try:
        torch_zip = importlib.import_module("jaxlora.interop.torch_zip")
    except ModuleNotFoundError as e:
        raise CheckpointError(
            f"{file} is a pickle, which can run code. Save it as {SAFETENSORS} first."
        ) from e
    tensors = torch_zip.read(file)
    wrong = [k for k, x in tensors.items() if not isinstance(x, np.ndarray)]
    if wrong:
        raise CheckpointError(
            f"{file} holds more than tensors, expected a state dict: {listing(map(str, wrong))}."
        )
    return {str(name): x for name, x in tensors.items()}
