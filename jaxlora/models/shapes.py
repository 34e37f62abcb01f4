"""Models without their weights: a config.json is enough to plan with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlora.errors import CheckpointError, ConfigError, listing, nearest
from jaxlora.models import hub
from jaxlora.models.architectures import architecture
from jaxlora.models.source import open_source

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"model_type": "llama"},
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "gpt3-175b": {
        "model_type": "gpt2",
        "n_embd": 12288,
        "n_layer": 96,
        "n_head": 96,
        "n_positions": 2048,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
"""{name: fields of config.json} of models to plan with, whose weights need not be had."""


class Abstract(NamedTuple):
    """A model and its params as shapes."""

    model: Any
    params: dict[str, Any]


def config_of(name: str | Path) -> dict[str, Any]:
    """The fields of a model's config.json, its weights unread and not downloaded.

    Args:
      name: a name of `SHAPES`, a folder with a config.json, a hub id, or a GGUF file.

    Returns:
      The fields.

    Raises:
      CheckpointError: there is no such model.
      MissingDependencyError: a hub id or a GGUF file, without the packages of `jaxlora[hf]`.

    Example:
      >>> config_of("gpt3-175b")["n_layer"]
      96
    """
    path = Path(name).expanduser()
    if name in SHAPES and not path.exists():
        return dict(SHAPES[str(name)])
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file()):
        return open_source(name).config
    try:
        files = {"files": ("config.json",), "holds": "config.json"}
        return hub.read_config(hub.resolve(name, **files))  # type: ignore[arg-type]
    except CheckpointError as e:
        near = nearest(str(name), SHAPES, 1)[0]
        raise CheckpointError(
            f"{str(e).rstrip('. ')}. Models that need no file: {listing(SHAPES)}. Nearest: {near}."
        ) from e


def from_config(
    fields: Mapping[str, Any], *, head: str | None = None, num_labels: int = 2, **options: Any
) -> Abstract:
    """The model that a config.json describes, and the shapes of its params. Nothing is allocated.

    Args:
      fields: those of config.json.
      head: as for `from_pretrained`; default: the first that the architecture has.
      num_labels: number of logits of a classification head.
      **options: further fields of the config: `dtype`, `param_dtype`, `scan_layers`, `remat`.

    Returns:
      The model and its params as `jax.ShapeDtypeStruct`.

    Raises:
      ConfigError: an unknown head, or a config.json that is not supported.

    Example:
      >>> from jaxlora import tree
      >>> model, params = from_config(SHAPES["llama-3.1-70b"], scan_layers=True)
      >>> f"{sum(x.size for x in tree.flat(params).values()):,}"
      '70,553,706,496'
    """
    arch = architecture(fields.get("model_type"))
    known = [f.name for f in dataclasses.fields(arch.config)]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"Option '{name}' means nothing to a config of {arch.config.__name__}. "
                f"Nearest: {', '.join(nearest(name, known))}."
            )
    config = dataclasses.replace(arch.config.from_dict(fields), **options)
    head = next(iter(arch.heads)) if head is None else head
    if head not in arch.heads:
        raise ConfigError(f"head is {head!r}, expected one of {', '.join(arch.heads)}.")
    make: Any = arch.heads[head]
    has_labels = "num_labels" in {f.name for f in dataclasses.fields(make)}
    model = make(config, **({"num_labels": num_labels} if has_labels else {}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), arch.example(config))
    return Abstract(model, shapes["params"])
