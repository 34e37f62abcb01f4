"""Model folders in Hugging Face's form, local or from the hub: config, weights, tokenizer."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.errors import CheckpointError, listing, optional

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")

_DOWNLOADED = (
    "config.json",
    "model*.safetensors",
    WEIGHTS_INDEX,
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(
    dir_or_hub_id: str | Path,
    revision: str | None = None,
    *,
    files: Iterable[str] = _DOWNLOADED,
    holds: str = f"config.json and {WEIGHTS}",
) -> Path:
    """Give the local folder of a model, downloading it from the Hugging Face hub if need be.

    A folder that exists is taken as it is. Of a hub repository only config.json, the safetensors
    weights and the tokenizer's files are downloaded, into huggingface_hub's own cache.

    Args:
      dir_or_hub_id: a folder, or an id such as "google-bert/bert-base-uncased".
      revision: a branch, tag or commit of the hub repository; a local folder has none.
      files: patterns of the files to download.
      holds: what such a folder holds, for messages.

    Returns:
      The folder.

    Raises:
      CheckpointError: there is no such folder, and no such model on the hub.
      MissingDependencyError: huggingface_hub is needed and not installed.
    """
    folder = Path(dir_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"Revision of {folder}: got {revision!r}, expected None: this is a local folder."
            )
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file, expected the folder that holds {holds}.")
    if isinstance(dir_or_hub_id, Path) or not _HUB_ID.fullmatch(dir_or_hub_id):
        raise CheckpointError(
            f"There is no folder {folder}. Expected a folder with {holds}, or a hub id such as "
            "'google-bert/bert-base-uncased'."
        )
    hub = optional("huggingface_hub", f"Downloading '{dir_or_hub_id}'")
    try:
        found = hub.snapshot_download(dir_or_hub_id, revision=revision, allow_patterns=list(files))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"'{dir_or_hub_id}' is no local folder, and could not be had from the hub: {e}"
        ) from e
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder.

    Raises:
      CheckpointError: there is none, or it is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json. {_what_is_in(folder)}")
    return read_json_object(file)


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a model folder by name, each read from disk when it is asked for.

    Made by `read_safetensors`. bfloat16 tensors come as ml_dtypes' bfloat16.
    """

    def __init__(self, files: Mapping[str, Any], source: Path) -> None:
        self._files = dict(files)
        self.source = source

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; nothing else of it is read."""
        return self._files[name].get_slice(name)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())


def read_safetensors(folder: Path) -> Tensors:
    """Open `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Args:
      folder: the model folder.

    Returns:
      A mapping from name to array. Only the headers have been read.

    Raises:
      CheckpointError: there are no such files, one is damaged, or a shard lacks a tensor.
      MissingDependencyError: safetensors is not installed.
    """
    if (folder / WEIGHTS).is_file():
        handle = _open(folder / WEIGHTS)
        return Tensors(dict.fromkeys(handle.keys(), handle), folder)
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}. {_what_is_in(folder)} "
            "Weights in another format must be saved as safetensors first."
        )
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) for s in shard_of.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor to file.")
    shards = {shard: _open_shard(folder, shard, index) for shard in sorted(set(shard_of.values()))}
    there = {shard: set(handle.keys()) for shard, handle in shards.items()}
    for name, shard in shard_of.items():
        if name not in there[shard]:
            raise CheckpointError(
                f"{folder / shard} lacks '{name}', which {index.name} says it has."
            )
    return Tensors({name: shards[shard] for name, shard in shard_of.items()}, folder)


def read_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder through `transformers.AutoTokenizer`.

    Returns:
      The tokenizer, or None if the folder has no tokenizer files.

    Raises:
      CheckpointError: the tokenizer's files are damaged.
      MissingDependencyError: transformers is not installed.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    transformers = optional("transformers", f"Loading the tokenizer of {folder}")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # the tokenizers package raises bare Exceptions
        raise CheckpointError(f"The tokenizer files of {folder} cannot be read: {e}") from e


def _open(file: Path) -> Any:
    safetensors = optional("safetensors", f"Reading {file}")
    try:
        return safetensors.safe_open(str(file), framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{file} is damaged or cut short ({file.stat().st_size} bytes): {e}. Fetch it again."
        ) from e


def _open_shard(folder: Path, shard: str, index: Path) -> Any:
    if "/" in shard or "\\" in shard or not (folder / shard).is_file():
        raise CheckpointError(f"{folder} lacks '{shard}', which {index.name} lists.")
    return _open(folder / shard)


def read_json_object(file: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
      CheckpointError: it is not JSON, or no object.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is not JSON: {e}.") from e
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} is a JSON {type(fields).__name__}, expected an object.")
    return fields


def _what_is_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"It holds {listing(names)}." if names else "It is empty."
