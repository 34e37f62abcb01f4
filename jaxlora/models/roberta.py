"""RoBERTa (Liu et al. 2019) in Flax Linen; XLM-RoBERTa and CamemBERT are the same.

BERT's embeddings and encoder, other positions and another classification head.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.models import bert, layers
from jaxlora.models.names import Names

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(bert.BertConfig):
    """The sizes of a RoBERTa, named as in Hugging Face's config.json, and its dtypes.

    Attributes:
      model_type: "roberta", "xlm-roberta" or "camembert".
      pad_token_id: the id of padding, which has no position; the first token's is one more.

    The others are BERT's. Of `max_position_embeddings`, pad_token_id + 1 are never used.
    """

    model_type: str = "roberta"
    vocab_size: int = 50265
    pad_token_id: int = 1

    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")

    @property
    def context(self) -> int:
        """The longest sequence that the model takes without position_ids."""
        return self.max_position_embeddings - self.pad_token_id - 1


class Roberta(nn.Module):
    """Encode tokens: embeddings, encoder, and a pooler over the first token.

    Attributes:
      config: sizes and dtypes.
      add_pooler: whether there is a pooler (dense and tanh over the first token).
    """

    config: RobertaConfig
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
          position_ids: integers (batch, seq) or (1, seq); default: counted from pad_token_id + 1
            over the ids that are not pad_token_id, which have that number for themselves.
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
            "max_position_embeddings - pad_token_id - 1",
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        mask = layers.token_mask(input_ids, attention_mask)  # (batch, seq)
        if token_type_ids is None:
            token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)  # (batch, seq)
        if position_ids is None:
            counted = jnp.asarray(input_ids) != c.pad_token_id  # (batch, seq)
            position_ids = c.pad_token_id + jnp.cumsum(counted, axis=1) * counted  # (batch, seq)

        embeddings = bert.Embeddings(c, name="embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, deterministic)
        x = bert.Encoder(c, deterministic, name="encoder")(x, mask)  # (batch, seq, hidden)
        if not self.add_pooler:
            return x, None
        pooled = nn.tanh(layers.dense(c, c.hidden_size, "pooler")(x[:, 0]))  # (batch, hidden)
        return x, pooled


class _Classifier(nn.Module):
    config: RobertaConfig
    num_labels: int

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        layers.check_num_labels(self.num_labels)
        x = nn.Dropout(c.head_dropout)(x, deterministic)  # (batch, hidden)
        x = nn.tanh(layers.dense(c, c.hidden_size, "dense")(x))  # (batch, hidden)
        x = nn.Dropout(c.head_dropout)(x, deterministic)
        return layers.dense(c, self.num_labels, "out_proj")(x)  # (batch, num_labels)


class RobertaForSequenceClassification(nn.Module):
    """Classify each sequence by its first token: dropout, dense, tanh, dropout, dense.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: RobertaConfig
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
        """Return logits (batch, num_labels) of the config's dtype; inputs as in `Roberta`."""
        roberta = Roberta(self.config, add_pooler=False, name="roberta")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        hidden, _ = roberta(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        head = _Classifier(self.config, self.num_labels, name="classifier")
        return head(hidden[:, 0], deterministic)


class RobertaForTokenClassification(nn.Module):
    """Classify each token: hidden state, dropout, `classifier`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: RobertaConfig
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
        """Return logits (batch, seq, num_labels) of the config's dtype; inputs as in `Roberta`."""
        roberta = Roberta(self.config, add_pooler=False, name="roberta")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        hidden, _ = roberta(*inputs, deterministic=deterministic)  # (batch, seq, hidden)
        p = self.config.head_dropout
        return layers.classify(self.config, hidden, self.num_labels, p, deterministic)


NAMES = Names(
    "roberta",
    {
        **bert.NAMES.modules,
        "classifier/dense": "classifier.dense",
        "classifier/out_proj": "classifier.out_proj",
    },
)
"""Our module paths and torch's module names."""
