"""Where a pretrained model comes from: a Hugging Face folder, or a GGUF file read as one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlora.errors import CheckpointError, listing
from jaxlora.models import gguf, gguf_tokenizer, hub
from jaxlora.models.weights import AnyTensors


@dataclasses.dataclass(frozen=True)
class Source:
    """What there is of a pretrained model; the weights and the tokenizer are read when asked for.

    Attributes:
      where: the folder or file.
      config: the fields of config.json.
      tensors: the weights by Hugging Face's names.
      read_tokenizer: gives the tokenizer, or None if there is none.
    """

    where: Path
    config: dict[str, Any]
    tensors: AnyTensors
    read_tokenizer: Callable[[], Any]


def open_source(dir_or_hub_id: str | Path, revision: str | None = None) -> Source:
    """Open a folder in Hugging Face's form, a hub id, a GGUF file, or a folder with just one.

    Args:
      dir_or_hub_id: which.
      revision: a branch, tag or commit on the hub.

    Returns:
      The source. Only headers have been read.

    Raises:
      CheckpointError: there is no such model, it is damaged, or its weights are of another format.
      MissingDependencyError: one of the packages of `jaxlora[hf]` is not installed.
    """
    file = _gguf_file(Path(dir_or_hub_id).expanduser())
    if file is not None:
        model = gguf.read_gguf(file)
        return Source(
            file, model.config, model.tensors, lambda: gguf_tokenizer.read_tokenizer(model)
        )
    folder = hub.resolve(dir_or_hub_id, revision)
    config = hub.read_config(folder)
    return Source(folder, config, hub.read_safetensors(folder), lambda: hub.read_tokenizer(folder))


def _gguf_file(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has no config.json and {len(files)} GGUF files, expected one of them: "
            f"{listing(file.name for file in files)}. Give the file."
        )
    return files[0] if files else None
