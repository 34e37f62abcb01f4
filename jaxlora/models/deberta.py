"""DeBERTa-v2 and v3 (He et al. 2020, 2021) in Flax Linen: attention to contents and positions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.errors import ConfigError
from jaxlora.models import layers
from jaxlora.models.bert import Mlp
from jaxlora.models.config import ACTIVATIONS, ModelConfig, check_divides
from jaxlora.models.names import Names

Array = jax.Array

_OFF = {
    "type_vocab_size": 0,
    "position_buckets": -1,
    "max_relative_positions": -1,
    "conv_kernel_size": 0,
}
"""What config.json has for None: anything below 1, and this is what we write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(ModelConfig):
    """The sizes of a DeBERTa-v2 or v3, named as in Hugging Face's config.json, and its dtypes.

    Attributes:
      vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
        max_position_embeddings: sizes, at least 1; the heads divide the hidden size.
      type_vocab_size: how many token types there are; None for no embedding of them.
      embedding_size: width of the embeddings, projected to hidden_size; None: hidden_size.
      hidden_act, pooler_hidden_act, conv_act: names of `ACTIVATIONS`.
      hidden_dropout_prob, attention_probs_dropout_prob, pooler_dropout: probabilities in [0, 1).
      cls_dropout: dropout before the classifier of a sequence; None: `hidden_dropout_prob`.
      position_biased_input: whether positions are added to the embeddings.
      relative_attention: whether there are embeddings of relative positions.
      pos_att_type: which scores they give: "c2p" (content to position), "p2c" or both.
      share_att_key: positions use the contents' projections instead of their own.
      max_relative_positions: distances above it count as it; None: max_position_embeddings.
      position_buckets: near distances have an embedding each, far ones share one by their
        logarithm, so many on either side; None: one each.
      norm_rel_ebd: "layer_norm" or "none": norm of the relative embeddings.
      conv_kernel_size: width, odd, of a convolution beside the first layer; None for none.
      layer_norm_eps: added to the variance.
      initializer_range: standard deviation of fresh kernels and embeddings.
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    max_position_embeddings: int = 512
    type_vocab_size: int | None = None
    embedding_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None
    position_biased_input: bool = True
    relative_attention: bool = False
    pos_att_type: Any = ()
    share_att_key: bool = False
    max_relative_positions: int | None = None
    position_buckets: int | None = None
    norm_rel_ebd: str = "none"
    conv_kernel_size: int | None = None
    conv_act: str = "tanh"
    layer_norm_eps: float = 1e-7
    initializer_range: float = 0.02

    model_types: ClassVar[tuple[str, ...]] = ("deberta-v2",)
    only: ClassVar[Mapping[str, Any]] = {"conv_groups": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")
        kinds = self.pos_att_type
        kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds or ()
        kinds = tuple(sorted(kind.strip() for kind in kinds))
        if not set(kinds) <= {"c2p", "p2c"}:
            raise ConfigError(
                f"pos_att_type is {self.pos_att_type!r}, expected 'c2p', 'p2c' or both."
            )
        object.__setattr__(self, "pos_att_type", kinds)
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            raise ConfigError(
                f"norm_rel_ebd is {self.norm_rel_ebd!r}, expected 'none' or 'layer_norm'."
            )
        if self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise ConfigError(f"conv_kernel_size is {self.conv_kernel_size}, expected an odd size.")
        if self.position_buckets is not None and self.span_of_distances <= self.near + 1:
            raise ConfigError(
                f"max_relative_positions is {self.span_of_distances}, expected more than half of "
                f"position_buckets, {self.position_buckets}, and one."
            )

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> Self:
        """As `ModelConfig.from_dict`; sizes below 1 are None."""
        fields = dict(config_json)
        for name in _OFF:
            if type(fields.get(name)) is int and fields[name] < 1:
                fields[name] = None
        config = super().from_dict(fields)
        same = {
            "attention_head_size": config.width,
            "pooler_hidden_size": config.hidden_size,
        }
        for name, supported in same.items():
            if fields.get(name) not in (None, supported):
                raise ConfigError(
                    f"{name} is {fields[name]!r} in config.json, expected {supported}, which "
                    "follows from hidden_size and num_attention_heads."
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json."""
        fields = super().to_dict()
        fields |= {name: off for name, off in _OFF.items() if fields[name] is None}
        fields["pos_att_type"] = list(self.pos_att_type)
        if self.embedding_size is None:
            del fields["embedding_size"]
        return fields

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes; None: any, by relative positions alone."""
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def near(self) -> int:
        """The distances up to this one have a bucket each."""
        return (self.position_buckets or 0) // 2

    @property
    def span_of_distances(self) -> int:
        """How many distances are told apart on either side before there are buckets."""
        return self.max_relative_positions or self.max_position_embeddings

    @property
    def span(self) -> int:
        """How many relative embeddings there are on either side."""
        return self.position_buckets or self.span_of_distances


class _Embeddings(nn.Module):
    config: DebertaConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        mask: Array,
        token_type_ids: Array,
        position_ids: Array,
        deterministic: bool,
    ) -> Array:
        c = self.config
        width = c.embedding_size or c.hidden_size
        x = layers.embed(c, c.vocab_size, width, "word")(input_ids)  # (batch, seq, width)
        if c.position_biased_input:
            x += layers.embed(c, c.max_position_embeddings, width, "position")(position_ids)
        if c.type_vocab_size is not None:
            x += layers.embed(c, c.type_vocab_size, width, "token_type")(token_type_ids)
        if width != c.hidden_size:
            x = layers.dense(c, c.hidden_size, "projection", use_bias=False)(x)
        x = layers.layer_norm(c, c.layer_norm_eps, x)  # (batch, seq, hidden)
        x = jnp.where(mask[..., None], x, 0)  # the convolution sees beyond the end
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic)


class _Attention(nn.Module):
    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array, relative: Any) -> Array:
        c = self.config

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], c.num_attention_heads, c.width)

        def scores(equation: str, a: Array, b: Array) -> Array:
            return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

        query = layers.dense(c, c.hidden_size, "query")
        key = layers.dense(c, c.hidden_size, "key")
        q, k = heads(query(x)), heads(key(x))  # (batch, seq, heads, width)
        v = heads(layers.dense(c, c.hidden_size, "value")(x))  # (batch, seq, heads, width)
        total = scores("bqhw,bkhw->bhqk", q, k)  # (batch, heads, queries, keys)
        if relative is not None:
            table, index = relative  # (2 * span, hidden), (queries, keys)
            table = nn.Dropout(c.hidden_dropout_prob)(table, self.deterministic)
            if "c2p" in c.pos_att_type:
                own = key if c.share_att_key else layers.dense(c, c.hidden_size, "pos_key")
                each = scores("bqhw,rhw->bhqr", q, heads(own(table)))  # (batch, heads, queries, r)
                total += jnp.take_along_axis(each, index[None, None], axis=-1)
            if "p2c" in c.pos_att_type:
                own = query if c.share_att_key else layers.dense(c, c.hidden_size, "pos_query")
                each = scores("bkhw,rhw->bhkr", k, heads(own(table)))  # (batch, heads, keys, r)
                each = jnp.take_along_axis(each, index.T[None, None], axis=-1)
                total += jnp.swapaxes(each, -1, -2)  # (batch, heads, queries, keys)
        total = total / math.sqrt(c.width * (1 + len(c.pos_att_type)))
        total = jnp.where(mask, total, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(total, axis=-1).astype(c.dtype)  # (batch, heads, queries, keys)
        weights = nn.Dropout(c.attention_probs_dropout_prob)(weights, self.deterministic)
        y = jnp.einsum("bhqk,bkhw->bqhw", weights, v).reshape(x.shape)
        y = layers.dense(c, c.hidden_size, "out")(y)  # (batch, seq, hidden)
        y = nn.Dropout(c.hidden_dropout_prob)(y, self.deterministic)
        return layers.layer_norm(c, c.layer_norm_eps, x + y)  # (batch, seq, hidden)


class _Layer(nn.Module):
    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, first: Any, mask: Array, relative: Any, beside: Any) -> Any:
        x = _Attention(self.config, self.deterministic, name="attention")(x, mask, relative)
        x = Mlp(self.config, self.deterministic, name="mlp")(x)  # (batch, seq, hidden)
        if beside is not None:  # all scanned layers are the same: the first is chosen by a flag
            x = jnp.where(first, beside.added(self.config, x), x)
        return x, first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beside:
    """The output of the convolution (batch, seq, hidden), and the norm of its sum with a layer's.

    The norm's scale and bias are given as arrays: a module cannot be called inside a scan. The mask
    (batch, seq, 1) is True for tokens; the others become zero.
    """

    y: Array
    scale: Array
    bias: Array
    mask: Array

    def added(self, c: DebertaConfig, x: Array) -> Array:
        x = (x + self.y).astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + c.layer_norm_eps)
        x = x * self.scale + self.bias  # (batch, seq, hidden)
        return jnp.where(self.mask, x, 0).astype(c.dtype)


class _NormParams(nn.Module):
    config: DebertaConfig

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        shape, dtype = (self.config.hidden_size,), self.config.param_dtype
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        return scale, self.param("bias", nn.initializers.zeros, shape, dtype)


class _Conv(nn.Module):
    config: DebertaConfig
    width: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool) -> _Beside:
        c = self.config
        conv = nn.Conv(
            c.hidden_size,
            (self.width,),
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=nn.initializers.normal(c.initializer_range),
            name="conv",
        )
        y = nn.Dropout(c.hidden_dropout_prob)(conv(x), deterministic)  # (batch, seq, hidden)
        return _Beside(ACTIVATIONS[c.conv_act](y), *_NormParams(c, name="norm")(), mask[..., None])


class _Encoder(nn.Module):
    config: DebertaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config
        relative = beside = first = None
        if c.relative_attention:
            table = layers.embed(c, 2 * c.span, c.hidden_size, "relative")
            table = table(jnp.arange(2 * c.span))  # (2 * span, hidden)
            if c.norm_rel_ebd == "layer_norm":
                table = layers.layer_norm(c, c.layer_norm_eps, table)
            relative = (table, _relative_index(c, x.shape[1]))
        if c.conv_kernel_size is not None:
            beside = _Conv(c, c.conv_kernel_size, name="conv")(x, mask, self.deterministic)
            first = np.arange(c.num_layers) == 0
        pairs = mask[:, None, :, None] & mask[:, None, None, :]  # (batch, 1, queries, keys)
        shared, fields = (pairs, relative, beside), {"deterministic": self.deterministic}
        return layers.run_layers(c, _Layer, "layer", x, None, *shared, each=first, **fields)[0]


class Deberta(nn.Module):
    """Encode tokens: embeddings and encoder.

    Attributes:
      config: sizes and dtypes.
    """

    config: DebertaConfig

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
        """Encode a batch.

        Every model of this file takes these inputs. Ids beyond their table are the caller's to
        avoid: they cannot be seen while tracing, and give NaN.

        Args:
          input_ids: integers (batch, seq).
          attention_mask: (batch, seq), nonzero for tokens, zero for padding; default: no padding.
          token_type_ids: integers (batch, seq); default: zeros. Without token types it is unused.
          position_ids: integers (batch, seq) or (1, seq); default: 0, 1, 2, … . Used only where
            positions are added to the embeddings; relative positions are those of the row.
          deterministic: False turns dropout on, and needs a "dropout" rng.

        Returns:
          The hidden states (batch, seq, hidden) of the config's dtype.

        Raises:
          ModelError: inputs of a wrong shape or dtype, or longer than there are positions.
        """
        c = self.config
        layers.check_inputs(
            input_ids,
            c.context if position_ids is None else None,
            "max_position_embeddings",
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        mask = layers.token_mask(input_ids, attention_mask)  # (batch, seq)
        if token_type_ids is None:
            token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)  # (batch, seq)
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]  # (1, seq)
        embeddings = _Embeddings(c, name="embeddings")
        x = embeddings(input_ids, mask, token_type_ids, position_ids, deterministic)
        return _Encoder(c, deterministic, name="encoder")(x, mask)  # (batch, seq, hidden)


class DebertaForSequenceClassification(nn.Module):
    """Classify each sequence: pooled first token, dropout, `classifier`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: DebertaConfig
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
        """Return logits (batch, num_labels) of the config's dtype; inputs as in `Deberta`."""
        c = self.config
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        x = Deberta(c, name="deberta")(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        x = nn.Dropout(c.pooler_dropout)(x[:, 0], deterministic)  # (batch, hidden)
        x = ACTIVATIONS[c.pooler_hidden_act](layers.dense(c, c.hidden_size, "pooler")(x))
        p = c.hidden_dropout_prob if c.cls_dropout is None else c.cls_dropout
        return layers.classify(c, x, self.num_labels, p, deterministic)


class DebertaForTokenClassification(nn.Module):
    """Classify each token: hidden state, dropout, `classifier`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: DebertaConfig
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
        """Return logits (batch, seq, num_labels) of the config's dtype; inputs as in `Deberta`."""
        c = self.config
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        x = Deberta(c, name="deberta")(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        return layers.classify(c, x, self.num_labels, c.hidden_dropout_prob, deterministic)


NAMES = Names(
    "deberta",
    {
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/token_type": "embeddings.token_type_embeddings",
        "embeddings/projection": "embeddings.embed_proj",
        "embeddings/norm": "embeddings.LayerNorm",
        "encoder/relative": "encoder.rel_embeddings",
        "encoder/norm": "encoder.LayerNorm",
        "encoder/conv/conv": "encoder.conv.conv",
        "encoder/conv/norm": "encoder.conv.LayerNorm",
        "encoder/layer_{}/attention/query": "encoder.layer.{}.attention.self.query_proj",
        "encoder/layer_{}/attention/key": "encoder.layer.{}.attention.self.key_proj",
        "encoder/layer_{}/attention/value": "encoder.layer.{}.attention.self.value_proj",
        "encoder/layer_{}/attention/pos_key": "encoder.layer.{}.attention.self.pos_key_proj",
        "encoder/layer_{}/attention/pos_query": "encoder.layer.{}.attention.self.pos_query_proj",
        "encoder/layer_{}/attention/out": "encoder.layer.{}.attention.output.dense",
        "encoder/layer_{}/attention/norm": "encoder.layer.{}.attention.output.LayerNorm",
        "encoder/layer_{}/mlp/up": "encoder.layer.{}.intermediate.dense",
        "encoder/layer_{}/mlp/down": "encoder.layer.{}.output.dense",
        "encoder/layer_{}/mlp/norm": "encoder.layer.{}.output.LayerNorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
)
"""Our module paths and torch's module names."""


def _relative_index(c: DebertaConfig, seq: int) -> Array:
    """The row of the table of relative embeddings for each query and key: integers (seq, seq)."""
    distance = np.arange(1 - seq, seq)  # query minus key, (2 * seq - 1,)
    if c.position_buckets is not None:
        far = np.maximum(np.abs(distance), c.near).astype(np.float32) / np.float32(c.near)
        farthest = np.float32((c.span_of_distances - 1) / c.near)
        shared = np.ceil(np.log(far) / np.log(farthest) * np.float32(c.near - 1)) + c.near
        distance = np.where(np.abs(distance) <= c.near, distance, np.sign(distance) * shared)
    rows = np.clip(distance + c.span, 0, 2 * c.span - 1).astype(np.int32)
    place = jnp.arange(seq)
    return jnp.asarray(rows)[place[:, None] - place[None, :] + seq - 1]
