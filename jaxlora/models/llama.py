"""Llama (Touvron et al. 2023) in Flax Linen; Mistral, Qwen2, Qwen3 and SmolLM2 by its config."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import ConfigError
from jaxlora.models import head, layers
from jaxlora.models.cache import Cache, View, empty, extend, view
from jaxlora.models.config import ACTIVATIONS, ModelConfig, check_divides
from jaxlora.models.names import Names

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """The sizes of a Llama-type model, named as in Hugging Face's config.json, and its dtypes.

    Attributes:
      model_type: "llama" (SmolLM2 as well), "mistral", "qwen2" (biases of q, k and v) or "qwen3"
        (norms of q and k).
      vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        max_position_embeddings: sizes, at least 1.
      num_key_value_heads: heads of k and v, each shared by a group of q's; None: as many.
      head_dim: width of a head; None: hidden_size / num_attention_heads.
      hidden_act: the activation of the gate.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, or {"rope_type": "linear" or "llama3", "factor": …, …}.
      sliding_window: attend to so many tokens at most; None for all.
      attention_bias, mlp_bias: whether those layers have a bias.
      attention_dropout: probability of dropping an attention weight.
      tie_word_embeddings: the head is the embedding table.
      initializer_range: standard deviation of fresh kernels and embeddings.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Any = None
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    only: ClassVar[Mapping[str, Any]] = {"pretraining_tp": 1, "partial_rotary_factor": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:
            check_divides(self, "hidden_size", "num_attention_heads")
        if self.num_key_value_heads is not None:
            check_divides(self, "num_attention_heads", "num_key_value_heads")
        # Hashable, so that models with equal configs share what jit has compiled.
        if isinstance(self.rope_scaling, Mapping):
            scaling = tuple(sorted(self.rope_scaling.items()))
            object.__setattr__(self, "rope_scaling", scaling)
        kind = self._scaling.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"rope_scaling is of type {kind!r}, expected 'default', 'linear' or 'llama3'."
            )

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> Self:
        """As `ModelConfig.from_dict`; both of Hugging Face's ways to write the rotary fields."""
        fields = dict(config_json)
        for name in ("rope_scaling", "rope_parameters"):
            if fields.get(name) is not None and not isinstance(fields[name], Mapping):
                raise ConfigError(f"{name} is {fields[name]!r}, expected an object or null.")
        rope = {**(fields.get("rope_scaling") or {}), **(fields.pop("rope_parameters", None) or {})}
        fields["rope_theta"] = rope.pop("rope_theta", fields.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        fields["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        if fields.get("model_type", "").startswith("qwen"):
            if not fields.get("use_sliding_window"):
                fields["sliding_window"] = None
            elif set(fields.get("layer_types") or ["sliding_attention"]) != {"sliding_attention"}:
                raise ConfigError(
                    "config.json has layers with and without a sliding window, expected one kind: "
                    f"layer_types is {fields['layer_types']}."
                )
        if fields.get("model_type") == "qwen3":
            fields.setdefault("head_dim", 128)
        config = super().from_dict({k: v for k, v in fields.items() if v is not None})
        # Values that are what None means: one config has one form.
        if config.head_dim and config.head_dim * config.num_attention_heads == config.hidden_size:
            config = dataclasses.replace(config, head_dim=None)
        if config.num_key_value_heads == config.num_attention_heads:
            config = dataclasses.replace(config, num_key_value_heads=None)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json."""
        fields = super().to_dict()
        del fields["rope_scaling"], fields["rope_theta"]
        rope = {"rope_type": "default", **self._scaling, "rope_theta": self.rope_theta}
        fields |= {"rope_parameters": rope, "num_key_value_heads": self.kv_heads}
        fields |= {"head_dim": self.width}
        if self.model_type.startswith("qwen"):
            fields["use_sliding_window"] = self.sliding_window is not None
            if self.sliding_window is not None:
                fields |= {"layer_types": ["sliding_attention"] * self.num_layers}
        return fields

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def _scaling(self) -> dict[str, Any]:
        return dict(self.rope_scaling or ())


class _Attention(nn.Module):
    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, own: Any, seen: View, rope: tuple[Array, Array]) -> Any:
        c = self.config
        qkv_bias = c.attention_bias or c.model_type == "qwen2"
        out_bias = c.attention_bias and c.model_type not in ("qwen2",)

        def heads(name: str, count: int) -> Array:
            y = layers.dense(c, count * c.width, name, use_bias=qkv_bias)(x)
            return y.reshape(*x.shape[:2], count, c.width)  # (batch, seq, count, width)

        q, k = heads("q_proj", c.num_attention_heads), heads("k_proj", c.kv_heads)
        v = heads("v_proj", c.kv_heads)
        if c.model_type == "qwen3":
            q = layers.rms_norm(c, c.rms_norm_eps, q, "q_norm")
            k = layers.rms_norm(c, c.rms_norm_eps, k, "k_norm")
        q, k = _rotated(q, *rope), _rotated(k, *rope)  # (batch, seq, heads or kv_heads, width)
        k, v, own = extend(own, seen.index, k, v)  # (batch, keys, kv_heads, width)
        drop = None
        if c.attention_dropout and not self.deterministic:
            drop = nn.Dropout(c.attention_dropout, deterministic=False)
        y = layers.attend(c, q, k, v, seen.mask, causal=seen.mask is None, drop=drop)
        y = y.reshape(*x.shape[:2], c.num_attention_heads * c.width)
        return layers.dense(c, c.hidden_size, "o_proj", use_bias=out_bias)(y), own


class _Mlp(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = layers.dense(c, c.intermediate_size, "gate_proj", use_bias=c.mlp_bias)(x)
        up = layers.dense(c, c.intermediate_size, "up_proj", use_bias=c.mlp_bias)(x)
        y = ACTIVATIONS[c.hidden_act](gate) * up  # (batch, seq, intermediate)
        return layers.dense(c, c.hidden_size, "down_proj", use_bias=c.mlp_bias)(y)


class _Layer(nn.Module):
    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, own: Any, seen: View, rope: tuple[Array, Array]) -> Any:
        c = self.config
        y = layers.rms_norm(c, c.rms_norm_eps, x, "input_layernorm")
        y, own = _Attention(c, self.deterministic, name="self_attn")(y, own, seen, rope)
        x = x + y  # (batch, seq, hidden)
        y = layers.rms_norm(c, c.rms_norm_eps, x, "post_attention_layernorm")
        return x + _Mlp(c, name="mlp")(y), own


class Llama(nn.Module):
    """The decoder without a head.

    Attributes:
      config: sizes and dtypes.
    """

    config: LlamaConfig

    def setup(self) -> None:  # noqa: D102 (a tied head reads the table too)
        c = self.config
        self.embed_tokens = layers.embed(c, c.vocab_size, c.hidden_size, "embed_tokens")

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

        Every model of this file takes these inputs. Ids beyond the table are the caller's to avoid:
        they cannot be seen while tracing, and give NaN.

        Args:
          input_ids: integers (batch, seq).
          attention_mask: integers (batch, seq), zero for padding. Tokens attend to earlier tokens
            of the same number: number the sequences of a packed row 1, 2, 3, … . Default: ones.
          position_ids: integers (batch or 1, seq); default: each token's place in its sequence,
            padding not counted.
          cache: what was seen before these tokens, from `empty_cache` or an earlier call.
          deterministic: False turns dropout on, and needs a "dropout" rng.

        Raises:
          ModelError: inputs of a wrong shape or dtype.
        """
        c = self.config
        layers.check_inputs(
            input_ids, None, "", attention_mask=attention_mask, position_ids=position_ids
        )
        seen = view(input_ids, attention_mask, cache, c.sliding_window)
        rope = _rope(c, seen.positions if position_ids is None else jnp.asarray(position_ids))
        x = self.embed_tokens(input_ids)  # (batch, seq, hidden)
        x, kv = layers.run_layers(
            c,
            _Layer,
            "layers",
            x,
            None if cache is None else cache.kv,
            seen,
            rope,
            deterministic=deterministic,
        )
        x = layers.rms_norm(c, c.rms_norm_eps, x, "norm")
        return x, None if seen.cache is None else dataclasses.replace(seen.cache, kv=kv)


class LlamaForCausalLM(nn.Module):
    """Predict the next token: decoder and `lm_head`, or the embedding table where it is tied.

    Attributes:
      config: sizes and dtypes.
    """

    config: LlamaConfig

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
        """Logits (batch, seq, vocab) of the config's dtype; inputs as in `Llama`.

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
        decoder = Llama(c, name="model")
        x, new = decoder(
            input_ids, attention_mask, position_ids, cache=cache, deterministic=deterministic
        )
        x = x if last is None else x[:, -last:]  # (batch, last, hidden)
        if c.tie_word_embeddings:
            read = decoder.embed_tokens
        else:
            read = layers.dense(c, c.vocab_size, "lm_head", use_bias=False)
        if labels is not None:
            return head.losses(read, x, labels, c.vocab_size, label_smoothing)
        logits = head.logits(read, x)  # (batch, last, vocab)
        return logits if cache is None else (logits, new)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in each of `batch` rows."""
        c = self.config
        return empty(
            c.num_layers, batch, length, c.kv_heads, c.width, c.dtype, stacked=c.scan_layers
        )


class LlamaForSequenceClassification(nn.Module):
    """Classify each sequence by the state of its last token: decoder and `score`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: LlamaConfig
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
        """Logits (batch, num_labels) of the config's dtype; inputs as in `Llama`."""
        layers.check_num_labels(self.num_labels)
        decoder = Llama(self.config, name="model")
        x, _ = decoder(input_ids, attention_mask, position_ids, deterministic=deterministic)
        x = layers.last_token(x, layers.token_mask(input_ids, attention_mask))  # (batch, hidden)
        return layers.dense(self.config, self.num_labels, "score", use_bias=False)(x)


NAMES = Names(
    "model",
    {
        "embed_tokens": "embed_tokens",
        "layers_{}/self_attn/q_proj": "layers.{}.self_attn.q_proj",
        "layers_{}/self_attn/k_proj": "layers.{}.self_attn.k_proj",
        "layers_{}/self_attn/v_proj": "layers.{}.self_attn.v_proj",
        "layers_{}/self_attn/o_proj": "layers.{}.self_attn.o_proj",
        "layers_{}/self_attn/q_norm": "layers.{}.self_attn.q_norm",
        "layers_{}/self_attn/k_norm": "layers.{}.self_attn.k_norm",
        "layers_{}/mlp/gate_proj": "layers.{}.mlp.gate_proj",
        "layers_{}/mlp/up_proj": "layers.{}.mlp.up_proj",
        "layers_{}/mlp/down_proj": "layers.{}.mlp.down_proj",
        "layers_{}/input_layernorm": "layers.{}.input_layernorm",
        "layers_{}/post_attention_layernorm": "layers.{}.post_attention_layernorm",
        "norm": "norm",
        "lm_head": "lm_head",
        "score": "score",
    },
)
"""Our module paths and torch's module names."""


def _rope(c: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines (batch or 1, seq, 1, width) of the rotary angles (Su et al. 2021)."""
    half = c.width // 2
    frequencies = c.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)  # (width / 2,)
    scaling = c._scaling
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        frequencies = _llama3(frequencies, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # (batch, seq, width / 2)
    angles = jnp.concatenate([angles, angles], -1)[:, :, None, :]  # (batch, seq, 1, width)
    return jnp.cos(angles).astype(c.dtype), jnp.sin(angles).astype(c.dtype)


def _llama3(frequencies: Array, scaling: Mapping[str, Any]) -> Array:
    """Llama 3.1's frequencies: slow ones divided by the factor, those between interpolated."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0, 1)  # 1: as it is, 0: divided
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin
