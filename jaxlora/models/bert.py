"""BERT (Devlin et al. 2018) in Flax Linen, and how Hugging Face's checkpoints map onto it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlora.errors import CheckpointError, ConfigError, ModelError
from jaxlora.models import hub

Array = jax.Array
Head = Literal["classification", "token", "embedding", "none"]
Pooling = Literal["cls", "mean"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
# Fields of config.json that change the result, with the one value that is supported.
_ONLY = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes of a BERT, named as in Hugging Face's config.json, and its dtypes.

    Attributes:
      vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
        max_position_embeddings, type_vocab_size: sizes, at least 1; the heads divide the hidden
        size.
      hidden_act: "gelu" (exact), "gelu_new" or "gelu_pytorch_tanh" (tanh), "relu" or "silu".
      hidden_dropout_prob, attention_probs_dropout_prob: probabilities in [0, 1).
      classifier_dropout: dropout before a classification head; None: `hidden_dropout_prob`.
      layer_norm_eps: added to the variance.
      initializer_range: standard deviation of fresh kernels and embeddings.
      dtype: dtype of the computation; softmax and layer norm are always in float32.
      param_dtype: dtype of the params.

    Raises:
      ConfigError: a value that cannot mean anything, named.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ConfigError(f"{field.name} is {value!r}, expected an integer of at least 1.")
            if "dropout" in field.name and not (
                (field.name == "classifier_dropout" and value is None)
                or (_is_number(value) and 0 <= value < 1)
            ):
                raise ConfigError(f"{field.name} is {value!r}, expected a probability in [0, 1).")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value!r}, expected a number of at least 0.")
        if self.hidden_act not in _ACTIVATIONS:
            raise ConfigError(
                f"hidden_act is {self.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}."
            )

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> "BertConfig":
        """Take the fields from Hugging Face's config.json; those without a meaning here are left.

        Args:
          config_json: the parsed file.

        Returns:
          The config, in float32. A field that the file lacks has BERT-base's value.

        Raises:
          ConfigError: a field that changes the result has a value that is not supported.

        Example:
          >>> from jaxlora.models.bert import BertConfig
          >>> BertConfig.from_dict({"model_type": "bert", "hidden_size": 384}).hidden_size
          384
        """
        for name, supported in _ONLY.items():
            value = config_json.get(name)
            if value is not None and value != supported:
                raise ConfigError(
                    f"{name} is {value!r} in config.json, expected {supported!r}: this BERT "
                    "supports nothing else."
                )
        names = {f.name for f in dataclasses.fields(cls)} - {"dtype", "param_dtype"}
        return cls(**{name: config_json[name] for name in config_json if name in names})


class _Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array, position_ids: Array, deterministic: bool
    ) -> Array:
        c = self.config
        x = _embed(c, c.vocab_size, "word")(input_ids)  # (batch, seq, hidden)
        x += _embed(c, c.type_vocab_size, "token_type")(token_type_ids)  # (batch, seq, hidden)
        x += _embed(c, c.max_position_embeddings, "position")(position_ids)  # (1, seq, hidden)
        x = _norm(c, x)  # (batch, seq, hidden)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic)


class _Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        c = self.config
        heads, width = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        split = (*x.shape[:2], heads, width)
        q = _dense(c, c.hidden_size, "query")(x).reshape(split)  # (batch, seq, heads, width)
        k = _dense(c, c.hidden_size, "key")(x).reshape(split)  # (batch, seq, heads, width)
        v = _dense(c, c.hidden_size, "value")(x).reshape(split)  # (batch, seq, heads, width)

        scores = jnp.einsum("bqhw,bkhw->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = scores / math.sqrt(width)  # (batch, heads, seq, seq)
        # A finite floor: a row without any token gets uniform weights rather than NaN.
        floor = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None, None, :], scores, floor)  # (batch, heads, seq, seq)
        weights = nn.softmax(scores, axis=-1).astype(c.dtype)  # (batch, heads, seq, seq)
        weights = nn.Dropout(c.attention_probs_dropout_prob)(weights, deterministic)

        y = jnp.einsum("bhqk,bkhw->bqhw", weights, v)  # (batch, seq, heads, width)
        y = _dense(c, c.hidden_size, "out")(y.reshape(x.shape))  # (batch, seq, hidden)
        y = nn.Dropout(c.hidden_dropout_prob)(y, deterministic)
        return _norm(c, x + y)  # (batch, seq, hidden)


class _Mlp(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        y = _ACTIVATIONS[c.hidden_act](_dense(c, c.intermediate_size, "up")(x))  # (batch, seq, up)
        y = _dense(c, c.hidden_size, "down")(y)  # (batch, seq, hidden)
        y = nn.Dropout(c.hidden_dropout_prob)(y, deterministic)
        return _norm(c, x + y)  # (batch, seq, hidden)


class _Layer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        x = _Attention(self.config, name="attention")(x, mask, deterministic)
        return _Mlp(self.config, name="mlp")(x, deterministic)  # (batch, seq, hidden)


class _Encoder(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> Array:
        for n in range(self.config.num_hidden_layers):
            x = _Layer(self.config, name=f"layer_{n}")(x, mask, deterministic)
        return x  # (batch, seq, hidden)


class Bert(nn.Module):
    """Encode tokens: embeddings, encoder, and a pooler over the first token.

    Attributes:
      config: sizes and dtypes.
      add_pooler: whether there is a pooler (dense and tanh over the first token).
    """

    config: BertConfig
    add_pooler: bool = True

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Array, Array | None]:
        """Encode a batch.

        Every model of this file takes these inputs. Ids beyond their table are the caller's to
        avoid: they cannot be seen while tracing, and give NaN.

        Args:
          input_ids: integers (batch, seq).
          attention_mask: (batch, seq), nonzero for tokens, zero for padding; default: no padding.
          token_type_ids: integers (batch, seq); default: zeros.
          position_ids: integers (batch, seq) or (1, seq); default: 0, 1, 2, … .
          deterministic: False turns dropout on, and needs a "dropout" rng.

        Returns:
          The hidden states (batch, seq, hidden) and the pooled state (batch, hidden), or None
          without a pooler; both of the config's dtype.

        Raises:
          ModelError: inputs of a wrong shape or dtype, or longer than there are positions.
        """
        c = self.config
        _check_inputs(c, input_ids, attention_mask, token_type_ids, position_ids)
        seq = input_ids.shape[1]
        mask = _mask(input_ids, attention_mask)  # (batch, seq)
        if token_type_ids is None:
            token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)  # (batch, seq)
        if position_ids is None:
            position_ids = jnp.arange(seq)[None]  # (1, seq)

        embeddings = _Embeddings(c, name="embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, deterministic)
        x = _Encoder(c, name="encoder")(x, mask, deterministic)  # (batch, seq, hidden)
        if not self.add_pooler:
            return x, None
        pooled = nn.tanh(_dense(c, c.hidden_size, "pooler")(x[:, 0]))  # (batch, hidden)
        return x, pooled


class BertForSequenceClassification(nn.Module):
    """Classify each sequence: pooled state, dropout, `classifier`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
      pooling: "cls", the pooler's output as in Hugging Face's class of this name, or "mean", the
        mean over the unmasked tokens as in sentence-transformers, without a pooler.
    """

    config: BertConfig
    num_labels: int = 2
    pooling: Pooling = "cls"

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Return logits (batch, num_labels) of the config's dtype; inputs as in `Bert`."""
        _check_pooling(self.pooling)
        bert = Bert(self.config, add_pooler=self.pooling == "cls", name="bert")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        hidden, pooled = bert(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        if pooled is None:
            mean = _masked_mean(hidden, _mask(input_ids, attention_mask))  # (batch, hidden)
            pooled = mean.astype(self.config.dtype)
        return _classify(self.config, pooled, self.num_labels, deterministic)  # (batch, labels)


class BertForTokenClassification(nn.Module):
    """Classify each token: hidden state, dropout, `classifier`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: BertConfig
    num_labels: int = 2

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Return logits (batch, seq, num_labels) of the config's dtype; inputs as in `Bert`."""
        bert = Bert(self.config, add_pooler=False, name="bert")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        hidden, _ = bert(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        return _classify(
            self.config, hidden, self.num_labels, deterministic
        )  # (batch, seq, labels)


class BertEmbedder(nn.Module):
    """Embed each sequence on the unit sphere, as sentence-transformers does.

    The mean of the hidden states over the unmasked tokens, divided by its Euclidean norm. A
    sequence without any token gives zeros.

    Attributes:
      config: sizes and dtypes.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Return embeddings (batch, hidden) in float32; inputs as in `Bert`."""
        bert = Bert(self.config, add_pooler=False, name="bert")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        hidden, _ = bert(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        mean = _masked_mean(hidden, _mask(input_ids, attention_mask))  # (batch, hidden)
        squares = jnp.sum(mean**2, axis=-1, keepdims=True)  # (batch, 1)
        # The floor stands inside the root: the gradient of a zero row is then zero, not NaN.
        return mean * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # (batch, hidden)


def from_pretrained(
    dir_or_hub_id: str | Path,
    *,
    head: Head = "classification",
    num_labels: int = 2,
    pooling: Pooling = "cls",
    key: Array | None = None,
    fresh_head: bool = False,
    dropout: float | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    revision: str | None = None,
) -> tuple[nn.Module, dict[str, Any], Any]:
    """Load a BERT checkpoint in Hugging Face's form.

    The checkpoint's `classifier` is used if it has one; otherwise, and with `fresh_head`, a new
    one is drawn from `key`, as is the pooler where the head needs one and the checkpoint has none.
    Tensors of heads for other tasks are left.

    Args:
      dir_or_hub_id: a folder with config.json and safetensors weights, or a hub id.
      head: "classification", "token", "embedding", or "none" for `Bert` itself.
      num_labels: number of logits of a classification head.
      pooling: "cls" or "mean", for head="classification" only.
      key: PRNG key for fresh params; needed only if there are any.
      fresh_head: leave the checkpoint's classifier.
      dropout: replaces the config's dropout probabilities, all three; None: as in config.json.
      dtype: dtype of the computation.
      param_dtype: dtype of the params.
      revision: a branch, tag or commit on the hub.

    Returns:
      The model, its params (for `model.apply({"params": params}, **batch)`), and the tokenizer,
      None if there are no tokenizer files.

    Raises:
      ConfigError: an unknown head or pooling, a config.json that is not supported, or fresh params
        without a key.
      CheckpointError: there is no such checkpoint, or its tensors do not fit: each is named.
      MissingDependencyError: one of the packages of `jaxlora[hf]` is not installed.

    Example:
      >>> from jaxlora.fetch import fetch
      >>> from jaxlora.models import bert
      >>> model, params, tokenizer = bert.from_pretrained(fetch("minilm"), head="embedding")
      >>> batch = tokenizer(["good", "great"], return_tensors="np")
      >>> model.apply({"params": params}, **batch).shape
      (2, 384)
    """
    _check_pooling(pooling)
    if pooling == "mean" and head in ("token", "none"):
        raise ConfigError(
            f"pooling is 'mean' with head={head!r}, expected 'cls': this head pools nothing."
        )
    folder = hub.resolve(dir_or_hub_id, revision)
    config = BertConfig.from_dict(hub.read_config(folder))
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)
    if dropout is not None:
        fields = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        config = dataclasses.replace(config, **dict.fromkeys(fields, dropout))
    tensors = hub.read_safetensors(folder)

    # Old checkpoints lack the prefix `bert.`, Bert itself has none: compare without it.
    stored = {name: _bare(flax_path(name)) for name in tensors if not _OTHER_HEADS.match(name)}
    if fresh_head:
        stored = {n: p for n, p in stored.items() if _top(p) != "classifier"}
    scopes = {_top(path) for path in stored.values()}
    model = _model(config, head, num_labels, pooling, has_pooler="pooler" in scopes)

    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    leaves = _flat(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    used = {_top(path) for path in leaves}
    fresh = {p for p in leaves if _top(p) in {"pooler", "classifier"} - scopes}
    _check_classifier(tensors, stored, num_labels if "classifier" in used else None)
    path_of = {
        name: next((p for p in (path, f"bert/{path}") if p in leaves), None)
        for name, path in stored.items()
        if _top(path) in used or _top(path) not in ("pooler", "classifier")
    }
    wanted = {path: leaf for path, leaf in leaves.items() if path not in fresh}
    flat = hub.read_params(tensors, path_of, wanted, type(model).__name__)
    flat |= _init_fresh(model, sorted(fresh), key, folder)
    return model, unflatten_dict(flat, sep="/"), hub.read_tokenizer(folder)


MODULE_NAMES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "encoder/layer_{}/attention/query": "encoder.layer.{}.attention.self.query",
    "encoder/layer_{}/attention/key": "encoder.layer.{}.attention.self.key",
    "encoder/layer_{}/attention/value": "encoder.layer.{}.attention.self.value",
    "encoder/layer_{}/attention/out": "encoder.layer.{}.attention.output.dense",
    "encoder/layer_{}/attention/norm": "encoder.layer.{}.attention.output.LayerNorm",
    "encoder/layer_{}/mlp/up": "encoder.layer.{}.intermediate.dense",
    "encoder/layer_{}/mlp/down": "encoder.layer.{}.output.dense",
    "encoder/layer_{}/mlp/norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
}
"""Our module paths and torch's module names, `{}` for the layer's number.

A prefix `bert/` is torch's `bert.`. Leaves: `kernel` (transposed), `embedding` and `scale` are
`weight`, `bias` is `bias`; old checkpoints call a layer norm's `gamma` and `beta`.
"""

_MODULE_PATHS = {name: path for path, name in MODULE_NAMES.items()}
_OTHER_HEADS = re.compile(r"cls\.|qa_outputs\.|(bert\.)?embeddings\.position_ids$")


def torch_name(path: str) -> str | None:
    """Give torch's name of a module or leaf, or None if BERT has no such path.

    A leaf named `kernel` is the transpose of the tensor.

    Example:
      >>> from jaxlora.models.bert import torch_name
      >>> torch_name("bert/encoder/layer_3/attention/query/kernel")
      'bert.encoder.layer.3.attention.self.query.weight'
    """
    module, leaf = _split_leaf(path, "/", ("kernel", "embedding", "scale", "bias"))
    name = _translate(module, "/", MODULE_NAMES, ".")
    if name is None or leaf not in _leaves(module):
        return None
    return name if leaf is None else f"{name}.{'bias' if leaf == 'bias' else 'weight'}"


def flax_path(name: str) -> str | None:
    """Give our path of a torch module or tensor, or None if BERT has no such name.

    Example:
      >>> from jaxlora.models.bert import flax_path
      >>> flax_path("bert.encoder.layer.3.attention.self.query.weight")
      'bert/encoder/layer_3/attention/query/kernel'
      >>> flax_path("bert.encoder.layer.3.attention.self.query")
      'bert/encoder/layer_3/attention/query'
    """
    module, leaf = _split_leaf(name, ".", ("weight", "bias", "gamma", "beta"))
    path = _translate(module, ".", _MODULE_PATHS, "/")
    if path is None or leaf is None:
        return path
    _, weight, *bias = _leaves(path)
    if leaf in ("gamma", "beta") and weight != "scale":
        return None
    ours = weight if leaf in ("weight", "gamma") else "bias"
    return f"{path}/{ours}" if ours == weight or ours in bias else None


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Give the torch state dict of a BERT's params: torch's names, kernels transposed.

    Raises:
      CheckpointError: a leaf that BERT does not have, such as one of an adapter.
    """
    state = {}
    for path, leaf in _flat(params).items():
        name = torch_name(path)
        if name is None:
            raise CheckpointError(
                f"Leaf {path} has no name in a torch BERT. Expected the params of a BERT without "
                "an adapter: merge it first."
            )
        array = np.asarray(leaf)
        state[name] = np.ascontiguousarray(array.T) if path.endswith("/kernel") else array
    return state


def _dense(c: BertConfig, features: int, name: str) -> nn.Dense:
    init = nn.initializers.normal(c.initializer_range)
    return nn.Dense(features, dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=init, name=name)


def _embed(c: BertConfig, rows: int, name: str) -> nn.Embed:
    init = nn.initializers.normal(c.initializer_range)
    return nn.Embed(
        rows,
        c.hidden_size,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        embedding_init=init,
        name=name,
    )


def _norm(c: BertConfig, x: Array) -> Array:
    norm = nn.LayerNorm(
        c.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=c.param_dtype,
        use_fast_variance=False,  # E[x²] - E[x]² cancels where the mean is large
        name="norm",
    )
    return norm(x).astype(c.dtype)


def _classify(c: BertConfig, x: Array, num_labels: int, deterministic: bool) -> Array:
    if num_labels < 1:
        raise ConfigError(f"num_labels is {num_labels}, expected at least 1.")
    p = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
    return _dense(c, num_labels, "classifier")(nn.Dropout(p)(x, deterministic))  # (..., labels)


def _mask(input_ids: Array, attention_mask: Array | None) -> Array:
    if attention_mask is None:
        return jnp.ones(input_ids.shape, bool)  # (batch, seq)
    return jnp.asarray(attention_mask) != 0  # (batch, seq)


def _masked_mean(x: Array, mask: Array) -> Array:
    kept = jnp.where(mask[..., None], x.astype(jnp.float32), 0)  # (batch, seq, hidden)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)  # (batch, 1)
    return jnp.sum(kept, axis=1) / count  # (batch, hidden)


def _check_inputs(
    c: BertConfig,
    input_ids: Array,
    attention_mask: Array | None,
    token_type_ids: Array | None,
    position_ids: Array | None,
) -> None:
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise ModelError(
            f"input_ids is {jnp.result_type(input_ids)} of shape {shape}, expected integers of "
            "shape (batch, seq)."
        )
    for name, array, shapes in (
        ("attention_mask", attention_mask, [shape]),
        ("token_type_ids", token_type_ids, [shape]),
        ("position_ids", position_ids, [shape, (1, shape[1])]),
    ):
        if array is not None and jnp.shape(array) not in shapes:
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ModelError(f"{name} has shape {jnp.shape(array)}, expected {expected}.")
    if position_ids is None and shape[1] > c.max_position_embeddings:
        raise ModelError(
            f"The sequence is {shape[1]} tokens long, expected at most max_position_embeddings, "
            f"{c.max_position_embeddings}. Truncate it, or give position_ids."
        )


def _check_pooling(pooling: str) -> None:
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"pooling is {pooling!r}, expected 'cls' or 'mean'.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _model(
    config: BertConfig, head: Head, num_labels: int, pooling: Pooling, has_pooler: bool
) -> nn.Module:
    match head:
        case "classification":
            return BertForSequenceClassification(config, num_labels, pooling)
        case "token":
            return BertForTokenClassification(config, num_labels)
        case "embedding":
            return BertEmbedder(config)
        case "none":
            return Bert(config, add_pooler=has_pooler)
    raise ConfigError(
        f"head is {head!r}, expected 'classification', 'token', 'embedding' or 'none'."
    )


def _check_classifier(
    tensors: hub.Tensors, stored: Mapping[str, str | None], num_labels: int | None
) -> None:
    for name, path in stored.items():
        if num_labels is None or path != "classifier/bias":
            continue
        found = tensors.shape(name)
        if found != (num_labels,):
            raise CheckpointError(
                f"'{name}' in {tensors.source} has shape {found}, expected ({num_labels},). "
                "Pass the num_labels of the checkpoint, or fresh_head=True for a new classifier."
            )


def _init_fresh(
    model: nn.Module, paths: list[str], key: Array | None, folder: Path
) -> dict[str, Array]:
    if not paths:
        return {}
    if key is None:
        raise ConfigError(
            f"key is None, expected a PRNG key: {folder} has no {', '.join(paths)}, to be drawn "
            "from it. Pass key=jax.random.key(0)."
        )

    @jax.jit  # compiled, init draws only what is returned
    def init(key: Array) -> dict[str, Array]:
        leaves = _flat(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
        return {path: leaves[path] for path in paths}

    return init(key)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="/"))


def _bare(path: str | None) -> str | None:
    return None if path is None else path.removeprefix("bert/")


def _top(path: str | None) -> str | None:
    return None if path is None else path.removeprefix("bert/").partition("/")[0]


def _split_leaf(name: str, sep: str, leaves: tuple[str, ...]) -> tuple[str, str | None]:
    module, _, last = name.rpartition(sep)
    return (module, last) if last in leaves else (name, None)


def _translate(name: str, sep: str, table: Mapping[str, str], to_sep: str) -> str | None:
    bare = name.removeprefix(f"bert{sep}")
    number = re.search(r"(?<=layer[._])\d+", bare)
    if number is None:
        translated = table.get(bare) if "{" not in bare else None
    else:
        start, end = number.span()
        translated = table.get(f"{bare[:start]}{{}}{bare[end:]}")
    if translated is None:
        return None
    translated = translated.format(number.group() if number else "")
    return translated if bare == name else f"bert{to_sep}{translated}"


def _leaves(module: str) -> tuple[str | None, ...]:
    """What a path of this module may end in: nothing, its weight, its bias."""
    last = module.rpartition("/")[2]
    if last in ("word", "position", "token_type"):
        return (None, "embedding")
    return (None, "scale" if last == "norm" else "kernel", "bias")
