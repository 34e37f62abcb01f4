"""BERT (Devlin et al. 2018) in Flax Linen."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import ConfigError
from jaxlora.models import layers
from jaxlora.models.config import ACTIVATIONS, ModelConfig, check_divides
from jaxlora.models.names import Names

Array = jax.Array
Pooling = Literal["cls", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
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

    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    only: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "pruned_heads": {},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")

    @property
    def head_dropout(self) -> float:
        """Dropout before a classification head."""
        p = self.classifier_dropout
        return self.hidden_dropout_prob if p is None else p


class Embeddings(nn.Module):
    """The sum of a token's three embeddings, normed."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array, position_ids: Array, deterministic: bool
    ) -> Array:
        """Three times (batch, seq) to (batch, seq, hidden)."""
        c, width = self.config, self.config.hidden_size
        x = layers.embed(c, c.vocab_size, width, "word")(input_ids)  # (batch, seq, hidden)
        x += layers.embed(c, c.type_vocab_size, width, "token_type")(token_type_ids)
        x += layers.embed(c, c.max_position_embeddings, width, "position")(position_ids)
        x = layers.layer_norm(c, c.layer_norm_eps, x)  # (batch, seq, hidden)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic)


class _Attention(nn.Module):
    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config
        heads, width = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        split = (*x.shape[:2], heads, width)
        q = layers.dense(c, c.hidden_size, "query")(x).reshape(split)  # (batch, seq, heads, width)
        k = layers.dense(c, c.hidden_size, "key")(x).reshape(split)  # (batch, seq, heads, width)
        v = layers.dense(c, c.hidden_size, "value")(x).reshape(split)  # (batch, seq, heads, width)
        drop = None
        if c.attention_probs_dropout_prob and not self.deterministic:
            drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=False)
        y = layers.attend(c, q, k, v, mask[:, None, None, :], drop=drop)
        y = layers.dense(c, c.hidden_size, "out")(y.reshape(x.shape))  # (batch, seq, hidden)
        y = nn.Dropout(c.hidden_dropout_prob)(y, self.deterministic)
        return layers.layer_norm(c, c.layer_norm_eps, x + y)  # (batch, seq, hidden)


class Mlp(nn.Module):
    """The feed-forward half of a layer, with its residual and norm after it."""

    config: Any
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(batch, seq, hidden) to the same."""
        c = self.config
        y = layers.dense(c, c.intermediate_size, "up")(x)  # (batch, seq, up)
        y = layers.dense(c, c.hidden_size, "down")(ACTIVATIONS[c.hidden_act](y))
        y = nn.Dropout(c.hidden_dropout_prob)(y, self.deterministic)
        return layers.layer_norm(c, c.layer_norm_eps, x + y)  # (batch, seq, hidden)


class _Layer(nn.Module):
    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, own: None, mask: Array) -> tuple[Array, None]:
        x = _Attention(self.config, self.deterministic, name="attention")(x, mask)
        return Mlp(self.config, self.deterministic, name="mlp")(x), own


class Encoder(nn.Module):
    """The layers."""

    config: BertConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """(batch, seq, hidden) and (batch, seq), True for tokens, to (batch, seq, hidden)."""
        c, fields = self.config, {"deterministic": self.deterministic}
        return layers.run_layers(c, _Layer, "layer", x, None, mask, **fields)[0]


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
        layers.check_inputs(
            input_ids,
            c.context if position_ids is None else None,
            "max_position_embeddings",
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        seq = input_ids.shape[1]
        mask = layers.token_mask(input_ids, attention_mask)  # (batch, seq)
        if token_type_ids is None:
            token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)  # (batch, seq)
        if position_ids is None:
            position_ids = jnp.arange(seq)[None]  # (1, seq)

        embeddings = Embeddings(c, name="embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, deterministic)
        x = Encoder(c, deterministic, name="encoder")(x, mask)  # (batch, seq, hidden)
        if not self.add_pooler:
            return x, None
        pooled = nn.tanh(layers.dense(c, c.hidden_size, "pooler")(x[:, 0]))  # (batch, hidden)
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
            mask = layers.token_mask(input_ids, attention_mask)  # (batch, seq)
            pooled = layers.masked_mean(hidden, mask).astype(self.config.dtype)  # (batch, hidden)
        p = self.config.head_dropout
        return layers.classify(self.config, pooled, self.num_labels, p, deterministic)


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
        p = self.config.head_dropout
        return layers.classify(self.config, hidden, self.num_labels, p, deterministic)


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
        mask = layers.token_mask(input_ids, attention_mask)  # (batch, seq)
        mean = layers.masked_mean(hidden, mask)  # (batch, hidden)
        squares = jnp.sum(mean**2, axis=-1, keepdims=True)  # (batch, 1)
        # The floor stands inside the root: the gradient of a zero row is then zero, not NaN.
        return mean * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # (batch, hidden)


NAMES = Names(
    "bert",
    {
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
    },
)
"""Our module paths and torch's module names."""


def _check_pooling(pooling: str) -> None:
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"pooling is {pooling!r}, expected 'cls' or 'mean'.")
