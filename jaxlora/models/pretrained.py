"""`from_pretrained` and `save_pretrained`: models in Hugging Face's form, in and out."""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import CheckpointError, ConfigError, listing, nearest
from jaxlora.models import bert, gpt2, llama, weights
from jaxlora.models.config import ModelConfig
from jaxlora.models.names import Names
from jaxlora.models.source import open_source

Array = jax.Array
Specs = Callable[[str, tuple[int, ...]], jax.sharding.PartitionSpec]
"""(path, shape) -> how a leaf is sharded."""


class Pretrained(NamedTuple):
    """A model, its params (for `model.apply({"params": params}, …)`), and its tokenizer or None."""

    model: Any
    params: dict[str, Any]
    tokenizer: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What there is to know of a model to read and write its folders.

    Attributes:
      config: the class of its config.
      names: how its params are called in torch.
      heads: {head: module}; a module takes `config`, `num_labels` where it has that field, and
        options that are its further fields.
      torch_classes: {model_type: how torch's class names begin}: "Bert" of "BertModel". They end
        as the class names here do.
      fresh: scopes of heads that a checkpoint may lack, to be drawn anew.
      other: pattern of tensors that are no params of ours: buffers, and heads that we do not have.
      row_parallel: pattern of modules whose kernel is sharded along its input under tensor
        parallelism, so that its layer sums over devices.
      example: the shapes of the inputs that a model is initialized with.
    """

    config: type[ModelConfig]
    names: Names
    heads: Mapping[str, Callable[..., nn.Module]]
    torch_classes: Mapping[str, str]
    fresh: tuple[str, ...] = ()
    other: str = r"(?!)"
    row_parallel: str = r"(?!)"
    example: Callable[[Any], jax.ShapeDtypeStruct] = lambda _: jax.ShapeDtypeStruct(
        (1, 1), jnp.int32
    )


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        config=bert.BertConfig,
        names=bert.NAMES,
        heads={
            "classification": bert.BertForSequenceClassification,
            "token": bert.BertForTokenClassification,
            "embedding": bert.BertEmbedder,
            "none": bert.Bert,
        },
        torch_classes={"bert": "Bert"},
        fresh=("pooler", "classifier"),
        other=r"cls\.|qa_outputs\.|(bert\.)?embeddings\.position_ids$",
        row_parallel=r"attention/out|mlp/down",
    ),
    "llama": Architecture(
        config=llama.LlamaConfig,
        names=llama.NAMES,
        heads={
            "lm": llama.LlamaForCausalLM,
            "classification": llama.LlamaForSequenceClassification,
            "none": llama.Llama,
        },
        torch_classes={
            "llama": "Llama",
            "mistral": "Mistral",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
        },
        fresh=("score",),
        other=r".*rotary_emb\.inv_freq$",
        row_parallel=r"self_attn/o_proj|mlp/down_proj",
    ),
    "gpt2": Architecture(
        config=gpt2.GPT2Config,
        names=gpt2.NAMES,
        heads={
            "lm": gpt2.GPT2LMHeadModel,
            "classification": gpt2.GPT2ForSequenceClassification,
            "none": gpt2.GPT2,
        },
        torch_classes={"gpt2": "GPT2"},
        fresh=("score",),
        other=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias$",
        row_parallel=r".*c_proj",
    ),
}
"""The models that there are. A further one is a file beside these and an entry here."""


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
    remat: bool = False,
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
      remat: compute each layer's activations again in the backward pass.
      attention: implementation of the attention, as `ModelConfig.attention`.
      mesh: put the params on this mesh.
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

    leaves = weights.flat(
        jax.eval_shape(model.init, jax.random.key(0), arch.example(config))["params"]
    )
    used = {_scope(arch, path) for path in leaves}
    fresh = [p for p in leaves if _scope(arch, p) in set(arch.fresh) - there]
    wanted = {path: leaf for path, leaf in leaves.items() if path not in fresh}
    heads = {*arch.fresh, "lm_head"}
    stored = {b: n for b, n in stored.items() if _top(b) in used or _top(b) not in heads}
    _check_labels(tensors, arch, stored, wanted)
    shardings = None
    if mesh is not None:
        rule = default_specs(mesh, arch) if specs is None else specs
        shardings = {
            path: jax.sharding.NamedSharding(mesh, rule(path, leaf.shape))
            for path, leaf in leaves.items()
        }
    params = weights.read_params(
        tensors, arch.names, stored, wanted, type(model).__name__, shardings
    )
    params |= _init_fresh(model, arch.example(config), fresh, key, source.where, shardings)
    return Pretrained(model, weights.nested(params), source.read_tokenizer())


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
      tokenizer: saved beside the weights.
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
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists, expected a new folder. Pass overwrite=True.")
    arch = _architecture_of(model)
    config_json = _config_json(arch, model, params, labels)
    state = weights.to_torch(params, arch.names, type(model).__name__)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        (new / "config.json").write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
        weights.write(new, state)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        shutil.move(new, folder)
    return folder


def architecture(model_type: Any) -> Architecture:
    """The architecture of a `model_type` of config.json.

    Raises:
      ConfigError: there is none; it names those there are.
    """
    types = {t: arch for arch in ARCHITECTURES.values() for t in arch.config.model_types}
    if model_type not in types:
        near = f" Nearest: {nearest(str(model_type), types, 1)[0]}." if model_type else ""
        raise ConfigError(
            f"model_type is {model_type!r} in config.json, expected one of {', '.join(types)}."
            f"{near}"
        )
    return types[model_type]


def default_specs(mesh: jax.sharding.Mesh, arch: Architecture) -> Specs:
    """Shards kernels and tables over the mesh's axes "fsdp" and "tensor", where their sizes allow.

    "tensor" takes a kernel's outputs (its inputs in a layer that ends a block, so that only there
    the devices are summed over), and a table's rows; "fsdp" takes the other axis. Vectors are on
    every device. A mesh without one of these axes does not shard along it.
    """

    def spec(path: str, shape: tuple[int, ...]) -> jax.sharding.PartitionSpec:
        scope, _, leaf = path.rpartition("/")
        if leaf not in ("kernel", "embedding") or len(shape) < 2:
            return jax.sharding.PartitionSpec()
        rows = leaf == "embedding" or re.search(rf"(^|/)({arch.row_parallel})$", scope)
        over = ("tensor", "fsdp") if rows else ("fsdp", "tensor")
        names = [
            name if mesh.shape.get(name, 0) and size % mesh.shape[name] == 0 else None
            for name, size in zip(over, shape[-2:], strict=True)
        ]
        return jax.sharding.PartitionSpec(*[None] * (len(shape) - 2), *names)

    return spec


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
    return _top(arch.names.bare(arch.names.torch_name(path) or path))


def _check_labels(
    tensors: weights.AnyTensors,
    arch: Architecture,
    stored: Mapping[str, str],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """A head of another number of labels has a way out, which the error names."""
    for path, leaf in wanted.items():
        bare = arch.names.bare(arch.names.torch_name(path) or path)
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
        leaves = weights.flat(model.init(key, jnp.zeros(example.shape, example.dtype))["params"])
        return {path: leaves[path] for path in paths}

    where = None if shardings is None else {path: shardings[path] for path in paths}
    return jax.jit(init, out_shardings=where)(key)  # compiled, it draws only what is returned


def _architecture_of(model: Any) -> Architecture:
    for arch in ARCHITECTURES.values():
        if type(model) in arch.heads.values():
            return arch
    raise ConfigError(
        f"The model is a {type(model).__name__}, expected one of jaxlora.models: "
        f"{', '.join(ARCHITECTURES)}."
    )


def _config_json(
    arch: Architecture, model: Any, params: Mapping[str, Any], labels: list[str] | None
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
    return fields
