"""An adapter as one safetensors file: a second native form, for those without Orbax.

The leaves stand under their paths, and the header's metadata holds the same JSON as an Orbax
checkpoint: spec, checksums, and the fingerprint of the base. Files are the same byte for byte.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora import tree
from jaxlora.about import check_format, check_same_base, check_stored, check_sums, describe, spec_of
from jaxlora.adapter import Adapter, boxed_like, check_base, check_leaves
from jaxlora.errors import CheckpointError, listing, optional
from jaxlora.whole import write_whole

ABOUT = "jaxlora_adapter"
"""The name of the JSON in the header's metadata."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def save(
    file: str | os.PathLike[str],
    adapter: Adapter,
    params: tree.Tree | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as one file, whole or not at all.

    Args:
      file: where.
      adapter: the adapter.
      params: the base. Its fingerprint is stored, so that loading onto another one is an error.
      overwrite: replace a file that is there.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: the file is there, or a leaf has a dtype that safetensors has not.
      AdapterError: the leaves are not those of the spec, or do not fit `params`.
      MissingDependencyError: safetensors is not installed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, tempfile
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> file = save(tempfile.mkdtemp() + "/adapter.safetensors", adapter, variables["params"])
      >>> load(file, variables["params"]).spec == adapter.spec
      True
    """
    optional("safetensors", f"Writing {file}")
    check_leaves(adapter)
    if params is not None:
        check_base(params, adapter.spec)
    leaves = {path: np.ascontiguousarray(np.asarray(x)) for path, x in adapter.values().items()}
    if other := [f"{p} {x.dtype}" for p, x in leaves.items() if x.dtype not in _DTYPES.values()]:
        raise CheckpointError(
            f"{file} cannot hold {listing(other)}, expected one of {', '.join(_DTYPES.values())}."
        )
    about = describe(adapter, params, ("jax", "flax", "safetensors"))
    metadata = {ABOUT: json.dumps(about, sort_keys=True)}
    data = optional("safetensors.numpy", f"Writing {file}").save(leaves, metadata)
    return write_whole(file, data, overwrite=overwrite)


def load(
    file: str | os.PathLike[str], params: tree.Tree | None = None, dtype: Any = None
) -> Adapter:
    """Read an adapter that `save` wrote; every leaf is checked, and exact.

    Args:
      file: the file.
      params: the base that it will be used on. Its shapes are checked, and its fingerprint if one
        was saved. Leaves come back boxed (`nn.Partitioned`) where the base's are.
      dtype: cast the leaves to it.

    Returns:
      The adapter, on the default device.

    Raises:
      CheckpointError: no such file, one that is damaged, that is no adapter of jaxlora, of a newer
        format, or made for another base. All leaves that do not fit are named.
      MissingDependencyError: safetensors is not installed.
    """
    path = Path(file).expanduser()
    about, tensors = _opened(path)
    check_format(about, path)
    spec = spec_of(about, path)
    check_stored(path, {p: x.shape for p, x in tensors.items()}, spec)
    if params is not None:
        check_same_base(params, spec, about.get("base"), path)
    check_sums(path, tensors, about["checksums"])
    leaves = {p: jnp.asarray(x) for p, x in tensors.items()}
    narrowed = [f"{p} {tensors[p].dtype}" for p, x in leaves.items() if x.dtype != tensors[p].dtype]
    if narrowed and dtype is None:
        raise CheckpointError(
            f"{path} holds {listing(narrowed)}, which jax does not have by default. Cast them, "
            "`dtype=jnp.float32`, or enable 64 bits: `jax.config.update('jax_enable_x64', True)`."
        )
    if dtype is not None:
        config = dataclasses.replace(spec.config, param_dtype=dtype)
        spec = dataclasses.replace(spec, config=config)
        leaves = {p: x.astype(config.param_dtype) for p, x in leaves.items()}
    if params is not None:
        base = tree.flat(params)
        leaves = {p: boxed_like(base, spec, p, x) for p, x in leaves.items()}
    return spec.adapter(leaves)


def is_adapter(file: str | os.PathLike[str]) -> bool:
    """Whether a file is safetensors with an adapter's JSON in its header.

    Raises:
      CheckpointError: it is a file of that name and damaged.
    """
    path = Path(file)
    return path.is_file() and path.suffix == ".safetensors" and ABOUT in _metadata(path)


def _opened(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The JSON and the leaves of a file."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}, expected an adapter in safetensors.")
    text = _metadata(path).get(ABOUT)
    with _damage(path):
        found = sorted(optional("safetensors", "").deserialize(path.read_bytes()))
    if text is None:
        raise CheckpointError(
            f"{path} is no adapter of jaxlora: its header has no '{ABOUT}'. It holds "
            f"{listing(name for name, _ in found) or 'nothing'}. A folder of PEFT is read "
            "by `jaxlora.interop.peft.load`."
        )
    if other := [f"{name} {x['dtype']}" for name, x in found if x["dtype"] not in _DTYPES]:
        raise CheckpointError(f"{path} holds {listing(other)}, expected floats.")
    tensors = {
        name: np.frombuffer(x["data"], jnp.dtype(_DTYPES[x["dtype"]])).reshape(x["shape"])
        for name, x in found
    }
    try:
        return json.loads(text), tensors
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"The metadata of {path} are damaged: {e}.") from e


def _metadata(path: Path) -> Mapping[str, str]:
    safetensors = optional("safetensors", f"Reading {path}")
    with _damage(path), safetensors.safe_open(str(path), framework="numpy") as opened:
        return opened.metadata() or {}


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Says of what safetensors raises about a file that the file is damaged."""
    try:
        yield
    except (optional("safetensors", f"Reading {path}").SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} is damaged or cut short ({path.stat().st_size} bytes): {e}."
        ) from e
