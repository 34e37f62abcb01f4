"""`from_pretrained`: a model from a folder in Hugging Face's form, the hub or a GGUF file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora import tree
from jaxlora.errors import CheckpointError, ConfigError, listing
from jaxlora.models import weights
from jaxlora.models.architectures import Architecture, architecture
from jaxlora.models.config import ModelConfig
from jaxlora.models.sharding import Specs, default_specs
from jaxlora.models.source import open_source

Array = jax.Array


class Pretrained(NamedTuple):
    """A model, its params (for `model.apply({"params": params}, …)`), and its tokenizer or None."""

    model: Any
    params: dict[str, Any]
    tokenizer: Any


def from_pretrained(
    dir_or_hub_id: str | Path,
    *,
    head: str | None = None,
    num_labels: int | None = None,
    key: Array | None = None,
    fresh_head: bool = False,
    dropout: float | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: Any = False,
    attention: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    specs: Specs | None = None,
    revision: str | None = None,
    **options: Any,
) -> Pretrained:
    """Load a model from a folder in Hugging Face's form, from the hub, or from a GGUF file.

    The architecture is that of config.json's `model_type`. The weights must be there and fit to the
    last tensor, those of other heads aside. A head that the checkpoint lacks is drawn from `key`.

    Args:
      dir_or_hub_id: a folder with config.json and safetensors weights, a hub id, a GGUF file, or a
        folder with just one.
      head: what the model is for: "classification", "token", "embedding", "lm", or "none" for the
        model itself; default: the first that the architecture has.
      num_labels: number of logits of a classification head; default: what config.json says.
      key: PRNG key for fresh params; needed only if there are any.
      fresh_head: leave the checkpoint's classification head.
      dropout: replaces all of the config's dropout probabilities; None: as in config.json.
      dtype: dtype of the computation.
      param_dtype: dtype of the params.
      scan_layers: run the layers by `nn.scan`, their params stacked.
      remat: compute each layer's activations again in the backward pass, as `ModelConfig.remat`.
      attention: implementation of the attention, as `ModelConfig.attention`.
      mesh: put the params on this mesh, whose axes are of type Auto.
      specs: how each leaf is sharded there; default: `default_specs`, over the mesh's axes "fsdp"
        and "tensor".
      revision: a branch, tag or commit on the hub.
      **options: further fields of the head's module, such as `pooling="mean"` of BERT's.

    Returns:
      The model, its params, and the tokenizer, None if there are no tokenizer files.

    Raises:
      ConfigError: an unknown head or option, a config.json that is not supported, or fresh params
        without a key.
      CheckpointError: there is no such checkpoint, or its tensors do not fit: each is named.
      MissingDependencyError: one of the packages of `jaxlora[hf]` is not installed.

    Example:
      >>> from jaxlora.fetch import fetch
      >>> from jaxlora import models
      >>> model, params, tokenizer = models.from_pretrained(fetch("minilm"), head="embedding")
      >>> batch = tokenizer(["good", "great"], return_tensors="np")
      >>> model.apply({"params": params}, **batch).shape
      (2, 384)
    """
    source = open_source(dir_or_hub_id, revision)
    arch = architecture(source.config.get("model_type"))
    config = arch.config.from_dict(source.config)
    config = dataclasses.replace(
        config,
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        remat=remat,
        attention=attention,
    )
    if dropout is not None:
        config = config.with_dropout(dropout)
    labels = _num_labels(source.config) if num_labels is None else num_labels
    tensors = source.tensors
    stored = _stored(tensors, arch)
    if fresh_head:  # a pooler is no head: it stays
        tops = {"classifier", "score"}
        stored = {bare: name for bare, name in stored.items() if _top(bare) not in tops}
    there = {_top(bare) for bare in stored}
    model = _model(arch, head, config, labels, options, has_pooler="pooler" in there)

    leaves = tree.flat(
        jax.eval_shape(model.init, jax.random.key(0), arch.example(config))["params"]
    )
    used = {_scope(arch, path) for path in leaves}
    fresh = [p for p in leaves if _scope(arch, p) in set(arch.fresh) - there]
    wanted = {path: leaf for path, leaf in leaves.items() if path not in fresh}
    heads = {*arch.fresh, "lm_head"}
    stored = {b: n for b, n in stored.items() if _top(b) in used or _top(b) not in heads}
    bares = {arch.names.bare_name(path) for path in leaves}
    stored = {b: n for b, n in stored.items() if b in bares or not re.match(arch.optional, b)}
    _check_labels(tensors, arch, stored, wanted)
    shardings = None
    if mesh is not None:
        rule = default_specs(mesh, arch.row_parallel) if specs is None else specs
        shardings = {
            path: jax.sharding.NamedSharding(mesh, rule(path, leaf.shape))
            for path, leaf in leaves.items()
        }
    params = weights.read_params(
        tensors, arch.names, stored, wanted, type(model).__name__, shardings
    )
    params |= _init_fresh(model, arch.example(config), fresh, key, source.where, shardings)
    return Pretrained(model, tree.nested(params), source.read_tokenizer())


def _model(
    arch: Architecture,
    head: str | None,
    config: ModelConfig,
    num_labels: int,
    options: dict[str, Any],
    has_pooler: bool,
) -> nn.Module:
    head = next(iter(arch.heads)) if head is None else head
    if head not in arch.heads:
        raise ConfigError(f"head is {head!r}, expected one of {', '.join(arch.heads)}.")
    make: Any = arch.heads[head]
    fields = {f.name for f in dataclasses.fields(make)} - {"config", "num_labels", "parent", "name"}
    if unknown := set(options) - fields:
        raise ConfigError(
            f"Options {listing(sorted(unknown))} mean nothing to head={head!r} of "
            f"{config.model_types[0]}. There are: {listing(sorted(fields)) or 'none'}."
        )
    if "add_pooler" in fields:
        options = {"add_pooler": has_pooler, **options}
    if "num_labels" in {f.name for f in dataclasses.fields(make)}:
        options = {"num_labels": num_labels, **options}
    return make(config, **options)


def _num_labels(config_json: Mapping[str, Any]) -> int:
    labels = config_json.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else config_json.get("num_labels", 2)


def _stored(tensors: weights.AnyTensors, arch: Architecture) -> dict[str, str]:
    """{torch's name without the base's prefix: the tensor's name}; older names are today's here."""
    stored: dict[str, str] = {}
    for name in tensors:
        if re.match(arch.other, name):
            continue
        bare = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", _today, arch.names.bare(name))
        if bare in stored:
            raise CheckpointError(
                f"Both '{stored[bare]}' and '{name}' are {bare} in {tensors.source}, expected one."
            )
        stored[bare] = name
    return stored


def _today(old: re.Match[str]) -> str:
    return {"gamma": "weight", "beta": "bias"}[old.group()]


def _top(name: str) -> str:
    return name.partition(".")[0]


def _scope(arch: Architecture, path: str) -> str:
    return _top(arch.names.bare_name(path))


def _check_labels(
    tensors: weights.AnyTensors,
    arch: Architecture,
    stored: Mapping[str, str],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """A head of another number of labels has a way out, which the error names."""
    for path, leaf in wanted.items():
        bare = arch.names.bare_name(path)
        if _top(bare) not in arch.fresh or _top(bare) == "pooler" or bare not in stored:
            continue
        found, labels = tensors.shape(stored[bare])[0], leaf.shape[-1]
        if found != labels:
            raise CheckpointError(
                f"'{stored[bare]}' in {tensors.source} has shape {tensors.shape(stored[bare])}, "
                f"expected {labels} labels. Pass num_labels={found}, the checkpoint's, or "
                "fresh_head=True for a new head."
            )


def _init_fresh(
    model: nn.Module,
    example: jax.ShapeDtypeStruct,
    paths: list[str],
    key: Array | None,
    folder: Path,
    shardings: Mapping[str, Any] | None,
) -> dict[str, Array]:
    if not paths:
        return {}
    if key is None:
        raise ConfigError(
            f"key is None, expected a PRNG key: {folder} has no {', '.join(paths)}, to be drawn "
            "from it. Pass key=jax.random.key(0)."
        )

    def init(key: Array) -> dict[str, Array]:
        leaves = tree.flat(model.init(key, jnp.zeros(example.shape, example.dtype))["params"])
        return {path: leaves[path] for path in paths}

    where = None if shardings is None else {path: shardings[path] for path in paths}
    return jax.jit(init, out_shardings=where)(key)  # compiled, it draws only what is returned
