"""A model's params from torch's tensors and back, leaf by leaf."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import tree
from jaxlora.errors import CheckpointError, listing, optional
from jaxlora.models.gguf import GgufTensors
from jaxlora.models.hub import WEIGHTS, WEIGHTS_INDEX, Tensors
from jaxlora.models.names import Names

Sharding = jax.sharding.Sharding
AnyTensors = Tensors | GgufTensors
_SHARD_BYTES = 5 * 10**9


def read_params(
    tensors: AnyTensors,
    names: Names,
    stored: Mapping[str, str],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    model: str,
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, jax.Array]:
    """Read the tensors that a model wants, and check that they are neither more nor fewer.

    Each leaf goes from the file to its dtype and its devices before the next is read; of a sharded
    leaf a process reads only the slices that its devices hold.

    Args:
      tensors: what the folder holds.
      names: how the model's params are called in torch.
      stored: {torch's name without the base's prefix: the tensor's name}, of all to be used.
      wanted: for each path the shape and dtype of its leaf.
      model: what the model is called in messages.
      shardings: for each path where its leaf goes; default: jax's default device.

    Returns:
      An array for each path of `wanted`, in the wanted dtype.

    Raises:
      CheckpointError: tensors are missing, unexpected, or of another shape or kind of dtype; each
        is named with what was found and expected.
    """
    sources = {path: _sources(names, path, leaf) for path, leaf in wanted.items()}
    used = {bare for bares in sources.values() for bare in bares}
    missing, wrong = [], []
    for path, bares in sources.items():
        if lacking := [bare for bare in bares if bare not in stored]:
            missing += [path] if len(bares) == 1 else lacking
            continue
        shape = wanted[path].shape[1 if _stacked(names, path) else 0 :]
        axes = names.torch_axes(path, len(shape))
        expected = tuple(shape[i] for i in np.argsort(axes))
        for name in (stored[bare] for bare in bares):
            if tensors.shape(name) != expected:
                wrong.append(f"'{name}' has shape {tensors.shape(name)}, expected {expected}.")
    if missing:
        wrong.append(f"Missing ({len(missing)}): {listing(missing)}.")
    if unexpected := [name for bare, name in stored.items() if bare not in used]:
        wrong.append(f"Unexpected ({len(unexpected)}): {listing(unexpected)}.")
    if wrong:
        raise CheckpointError(
            f"The weights in {tensors.source} do not fit {model} with the sizes of its "
            f"config.json. {' '.join(wrong)}"
        )
    return {
        path: _read_leaf(
            [_Slices(tensors, stored[bare], names, path) for bare in bares],
            _stacked(names, path),
            wanted[path],
            None if shardings is None else shardings[path],
        )
        for path, bares in sources.items()
    }


def to_torch(params: Mapping[str, Any], names: Names, model: str) -> dict[str, Callable[[], Any]]:
    """Torch's state dict of a model's params, each tensor made when it is called.

    Raises:
      CheckpointError: a leaf that the model does not have, such as one of an adapter.
    """
    state: dict[str, Callable[[], Any]] = {}
    for path, leaf in tree.items(params):
        name = names.torch_name(path)
        if name is None:
            raise CheckpointError(
                f"Leaf {path} has no name in a torch {model}. Expected the params of a {model} "
                "without an adapter: merge it first."
            )
        if "{}" in name:
            for n in range(leaf.shape[0]):
                state[name.format(n)] = lambda leaf=leaf, n=n, path=path: names.transposed(
                    path, np.asarray(leaf[n])
                )
        else:
            state[name] = lambda leaf=leaf, path=path: names.transposed(path, np.asarray(leaf))
    return state


def write(
    folder: Path, state: Mapping[str, Callable[[], Any]], shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index where they are large.

    No more than one shard is held in memory beside the params.
    """
    safetensors = optional("safetensors.numpy", f"Writing {folder}")
    shards: list[dict[str, Any]] = [{}]
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        file = folder / f"part-{len(files)}.safetensors"
        safetensors.save_file(shards[-1], file, metadata={"format": "pt"})
        files.append(list(shards[-1]))
        shards[-1] = {}

    for name, make in state.items():
        array = make()
        if shards[-1] and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        shards[-1][name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for n, names in enumerate(files):
        to = f"model-{n + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{n}.safetensors").rename(folder / to)
        weight_map |= dict.fromkeys(names, to)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _stacked(names: Names, path: str) -> bool:
    return "{}" in (names.torch_name(path) or "")


def _sources(names: Names, path: str, leaf: jax.ShapeDtypeStruct) -> list[str]:
    """The bare names of the tensors that a leaf is made of: one, or one a layer of a stack."""
    name = names.bare_name(path)
    return [name.format(n) for n in range(leaf.shape[0])] if "{}" in name else [name]


class _Slices:
    """One tensor as a leaf, or one layer of it, sees it: in our order of axes."""

    def __init__(self, tensors: AnyTensors, name: str, names: Names, path: str) -> None:
        self.tensors, self.name = tensors, name
        self.axes = names.torch_axes(path, len(tensors.shape(name)))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        theirs = tuple(index[i] for i in np.argsort(self.axes))
        array = self.tensors.read(self.name, theirs)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(
                f"'{self.name}' in {self.tensors.source} has dtype {array.dtype}, expected a "
                "floating dtype: quantized weights must be dequantized first."
            )
        return np.transpose(array, self.axes)


def _read_leaf(
    parts: list[_Slices], stacked: bool, leaf: jax.ShapeDtypeStruct, sharding: Sharding | None
) -> jax.Array:
    def read(index: Any) -> np.ndarray:
        if not stacked:
            return parts[0][index].astype(leaf.dtype)
        own = parts[index[0]]
        first = own[0][index[1:]]
        out = np.empty((len(own), *first.shape), leaf.dtype)
        for n, part in enumerate(own):
            out[n] = first if n == 0 else part[index[1:]]
        return out

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, read)
