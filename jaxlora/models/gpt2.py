"""GPT-2 (Radford et al. 2019) in Flax Linen."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import ModelError
from jaxlora.models import head, layers
from jaxlora.models.cache import Cache, View, empty, extend, view
from jaxlora.models.config import ACTIVATIONS, ModelConfig, check_divides
from jaxlora.models.names import Names

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The sizes of a GPT-2, named as in Hugging Face's config.json, and its dtypes.

    Attributes:
      vocab_size, n_positions, n_embd, n_layer, n_head: sizes, at least 1; the heads divide n_embd.
      n_inner: width of the feed-forward layer; None: four times n_embd.
      activation_function: "gelu_new" (tanh), "gelu" (exact), or another of `ACTIVATIONS`.
      resid_pdrop, embd_pdrop, attn_pdrop: probabilities in [0, 1): of dropping an output of a
        block, an embedding, an attention weight.
      layer_norm_epsilon: added to the variance.
      scale_attn_weights: divide the scores by the root of the head's width.
      tie_word_embeddings: the head is the embedding table.
      initializer_range: standard deviation of fresh kernels and embeddings.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    only: ClassVar[Mapping[str, Any]] = {
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "pruned_heads": {},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "n_embd", "n_head")

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self.n_layer

    @property
    def context(self) -> int:
        """The longest sequence that the model takes."""
        return self.n_positions


class _Attention(nn.Module):
    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, own: Any, seen: View) -> Any:
        c = self.config
        width = c.n_embd // c.n_head
        qkv = layers.dense(c, 3 * c.n_embd, "c_attn")(x)  # (batch, seq, 3 * hidden)
        q, k, v = (
            part.reshape(*x.shape[:2], c.n_head, width)  # (batch, seq, heads, width)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        k, v, own = extend(own, seen.index, k, v)  # (batch, keys, heads, width)
        if not c.scale_attn_weights:  # undoes what attend divides by
            q = q * math.sqrt(width)
        drop = None
        if c.attn_pdrop and not self.deterministic:
            drop = nn.Dropout(c.attn_pdrop, deterministic=False)
        y = layers.attend(c, q, k, v, seen.mask, causal=seen.mask is None, drop=drop)
        y = layers.dense(c, c.n_embd, "c_proj")(y.reshape(x.shape))  # (batch, seq, hidden)
        return nn.Dropout(c.resid_pdrop)(y, self.deterministic), own


class _Mlp(nn.Module):
    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        y = layers.dense(c, c.n_inner or 4 * c.n_embd, "c_fc")(x)  # (batch, seq, inner)
        y = ACTIVATIONS[c.activation_function](y)
        y = layers.dense(c, c.n_embd, "c_proj")(y)  # (batch, seq, hidden)
        return nn.Dropout(c.resid_pdrop)(y, self.deterministic)


class _Layer(nn.Module):
    config: GPT2Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, own: Any, seen: View) -> Any:
        c = self.config
        y = layers.layer_norm(c, c.layer_norm_epsilon, x, "ln_1")
        y, own = _Attention(c, self.deterministic, name="attn")(y, own, seen)
        x = x + y  # (batch, seq, hidden)
        y = layers.layer_norm(c, c.layer_norm_epsilon, x, "ln_2")
        return x + _Mlp(c, self.deterministic, name="mlp")(y), own


class GPT2(nn.Module):
    """The decoder without a head.

    Attributes:
      config: sizes and dtypes.
    """

    config: GPT2Config

    def setup(self) -> None:  # noqa: D102 (a tied head reads the table too)
        c = self.config
        self.wte = layers.embed(c, c.vocab_size, c.n_embd, "wte")

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Cache | None]:
        """Hidden states (batch, seq, hidden) after the last norm, and the cache.

        Every model of this file takes these inputs. Ids and positions beyond their table are the
        caller's to avoid: they cannot be seen while tracing, and give NaN.

        Args:
          input_ids: integers (batch, seq).
          attention_mask: integers (batch, seq), zero for padding. Tokens attend to earlier tokens
            of the same number: number the sequences of a packed row 1, 2, 3, … . Default: ones.
          position_ids: integers (batch or 1, seq); default: each token's place in its sequence,
            padding not counted.
          cache: what was seen before these tokens, from `empty_cache` or an earlier call.
          deterministic: False turns dropout on, and needs a "dropout" rng.

        Raises:
          ModelError: inputs of a wrong shape or dtype, or longer than there are positions.
        """
        c = self.config
        layers.check_inputs(
            input_ids,
            c.n_positions if position_ids is None else None,
            "n_positions",
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        seen = view(input_ids, attention_mask, cache)
        positions = seen.positions if position_ids is None else jnp.asarray(position_ids)
        x = self.wte(input_ids)  # (batch, seq, hidden)
        x += layers.embed(c, c.n_positions, c.n_embd, "wpe")(positions)  # (batch, seq, hidden)
        x = nn.Dropout(c.embd_pdrop)(x, deterministic)
        own = None if cache is None else cache.kv
        x, kv = layers.run_layers(c, _Layer, "h", x, own, seen, deterministic=deterministic)
        x = layers.layer_norm(c, c.layer_norm_epsilon, x, "ln_f")
        return x, None if seen.cache is None else dataclasses.replace(seen.cache, kv=kv)


class GPT2LMHeadModel(nn.Module):
    """Predict the next token: decoder and the embedding table, or `lm_head` where it is not tied.

    Attributes:
      config: sizes and dtypes.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        cache: Cache | None = None,
        last: int | None = None,
        labels: Array | None = None,
        label_smoothing: float = 0.0,
        deterministic: bool = True,
    ) -> Any:
        """Logits (batch, seq, vocab) of the config's dtype; inputs as in `GPT2`.

        Args:
          input_ids: integers (batch, seq).
          attention_mask: integers (batch, seq) or None.
          position_ids: integers (batch or 1, seq) or None.
          cache: what was seen before, or None.
          last: give the logits of only so many tokens at the end.
          labels: integers (batch, seq): give the loss of each instead, in float32, without holding
            all the logits of a large vocabulary.
          label_smoothing: of these losses, in [0, 1).
          deterministic: False turns dropout on.

        Returns:
          The logits; with labels the losses (batch, seq); with a cache, the logits and the cache
          with these tokens in it.
        """
        c = self.config
        decoder = GPT2(c, name="transformer")
        x, new = decoder(
            input_ids, attention_mask, position_ids, cache=cache, deterministic=deterministic
        )
        x = x if last is None else x[:, -last:]  # (batch, last, hidden)
        if c.tie_word_embeddings:
            read = decoder.wte
        else:
            read = layers.dense(c, c.vocab_size, "lm_head", use_bias=False)
        if labels is not None:
            return head.losses(read, x, labels, c.vocab_size, label_smoothing)
        logits = head.logits(read, x)  # (batch, last, vocab)
        return logits if cache is None else (logits, new)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in each of `batch` rows.

        Raises:
          ModelError: it is longer than there are positions.
        """
        c = self.config
        if length > c.n_positions:
            raise ModelError(
                f"The cache is {length} tokens long, expected at most n_positions, {c.n_positions}."
            )
        width = c.n_embd // c.n_head
        return empty(c.n_layer, batch, length, c.n_head, width, c.dtype, stacked=c.scan_layers)


class GPT2ForSequenceClassification(nn.Module):
    """Classify each sequence by the state of its last token: decoder and `score`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: GPT2Config
    num_labels: int = 2

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Logits (batch, num_labels) of the config's dtype; inputs as in `GPT2`."""
        layers.check_num_labels(self.num_labels)
        decoder = GPT2(self.config, name="transformer")
        x, _ = decoder(input_ids, attention_mask, position_ids, deterministic=deterministic)
        x = layers.last_token(x, layers.token_mask(input_ids, attention_mask))  # (batch, hidden)
        return layers.dense(self.config, self.num_labels, "score", use_bias=False)(x)


NAMES = Names(
    "transformer",
    {
        "wte": "wte",
        "wpe": "wpe",
        "h_{}/ln_1": "h.{}.ln_1",
        "h_{}/attn/c_attn": "h.{}.attn.c_attn",
        "h_{}/attn/c_proj": "h.{}.attn.c_proj",
        "h_{}/ln_2": "h.{}.ln_2",
        "h_{}/mlp/c_fc": "h.{}.mlp.c_fc",
        "h_{}/mlp/c_proj": "h.{}.mlp.c_proj",
        "ln_f": "ln_f",
        "lm_head": "lm_head",
        "score": "score",
    },
    stored_in_out=r"h(_\d+)?/(attn|mlp)/c_\w+",
)
"""Our module paths and torch's module names."""
