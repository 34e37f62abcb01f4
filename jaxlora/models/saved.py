"""`save_pretrained`: a model as a folder in Hugging Face's form."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlora.errors import CheckpointError, ConfigError
from jaxlora.models import weights
from jaxlora.models.architectures import Architecture, architecture_of
from jaxlora.models.config import TOKEN_IDS


def save_pretrained(
    folder: str | Path,
    model: Any,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    labels: list[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder in Hugging Face's form, which torch's transformers loads.

    The folder appears whole or not at all.

    Args:
      folder: where; it must not exist, unless `overwrite`.
      model: a model of `jaxlora.models`.
      params: its params, without an adapter: merge it first.
      tokenizer: saved beside the weights, and its special tokens' ids in config.json: torch's
        classifiers of the last token need that of padding.
      labels: the names of the classes of a classification head.
      overwrite: replace a folder that is there.

    Returns:
      The folder's absolute path.

    Raises:
      CheckpointError: the folder exists, or a leaf is not the model's.
      ConfigError: the model has no counterpart in transformers.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from jaxlora import models
      >>> from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
      >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1)
      >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 2), int))["params"]
      >>> folder = models.save_pretrained(tempfile.mkdtemp() + "/tiny", model, params)
      >>> models.from_pretrained(folder).model == model
      True
    """
    folder = new_folder(folder, overwrite)
    arch = architecture_of(model)
    config_json = _config_json(arch, model, params, labels, tokenizer)
    state = weights.to_torch(params, arch.names, type(model).__name__)
    with written_whole(folder) as new:
        (new / "config.json").write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
        weights.write(new, state)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
    return folder


def new_folder(folder: str | Path, overwrite: bool) -> Path:
    """The absolute path of a folder that is to be written.

    Raises:
      CheckpointError: it exists, and is not to be replaced.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists, expected a new folder. Pass overwrite=True.")
    return folder


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which takes the place of `folder` when all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        shutil.move(new, folder)


def _config_json(
    arch: Architecture,
    model: Any,
    params: Mapping[str, Any],
    labels: list[str] | None,
    tokenizer: Any,
) -> dict[str, Any]:
    config = model.config
    if getattr(model, "pooling", "cls") != "cls":
        raise ConfigError(
            f"pooling is {model.pooling!r}, expected 'cls': transformers has no class for it."
        )
    fields = config.to_dict()
    begin = arch.torch_classes[fields["model_type"]]
    ours = arch.heads["none"].__name__  # type: ignore[attr-defined]
    end = type(model).__name__.removeprefix(ours)
    theirs = end.startswith("For") or end.endswith("Model")
    fields["architectures"] = [begin + (end if theirs else "Model")]
    fields["dtype"] = str(jax.tree.leaves(params)[0].dtype)
    if hasattr(model, "num_labels"):
        named = labels or [f"LABEL_{n}" for n in range(model.num_labels)]
        if len(named) != model.num_labels:
            raise ConfigError(f"labels are {len(named)} names, expected {model.num_labels}.")
        fields |= {"id2label": {str(n): label for n, label in enumerate(named)}}
        fields |= {"label2id": {label: n for n, label in enumerate(named)}}
    for name in TOKEN_IDS:
        if (found := getattr(tokenizer, name, None)) is not None:
            fields.setdefault(name, found)
    return fields
