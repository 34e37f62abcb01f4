"""ViT (Dosovitskiy et al. 2020) in Flax Linen: a transformer over the patches of an image."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import ConfigError, ModelError
from jaxlora.models import layers
from jaxlora.models.config import ACTIVATIONS, ModelConfig, check_divides
from jaxlora.models.names import Names

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """The sizes of a ViT, named as in Hugging Face's config.json, and its dtypes.

    Attributes:
      hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: sizes, at least 1; the
        heads divide the hidden size.
      image_size, patch_size: height and width in pixels, or one number for both; of the image only
        whole patches are seen.
      num_channels: of the image.
      hidden_act, pooler_act: names of `ACTIVATIONS`.
      hidden_dropout_prob, attention_probs_dropout_prob: probabilities in [0, 1).
      qkv_bias: whether queries, keys and values have a bias.
      pooler_output_size: width of the pooled state; None: hidden_size.
      layer_norm_eps: added to the variance.
      initializer_range: standard deviation of fresh kernels and embeddings.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: Any = 224
    patch_size: Any = 16
    num_channels: int = 3
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    model_types: ClassVar[tuple[str, ...]] = ("vit",)
    only: ClassVar[Mapping[str, Any]] = {"pruned_heads": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "hidden_size", "num_attention_heads")
        for name in ("image_size", "patch_size"):
            given = getattr(self, name)
            pair = given if isinstance(given, (list, tuple)) else (given, given)
            if len(pair) != 2 or not all(type(size) is int and size > 0 for size in pair):
                raise ConfigError(f"{name} is {given!r}, expected pixels, or (height, width).")
            object.__setattr__(self, name, tuple(pair))
        if not all(self.patches):
            raise ConfigError(
                f"image_size is {self.image_size}, expected at least patch_size, {self.patch_size}."
            )

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> Self:
        """As `ModelConfig.from_dict`; a head must have the width that the sizes give."""
        config = super().from_dict(config_json)
        width = config.hidden_size // config.num_attention_heads
        if config_json.get("head_dim") not in (None, width):
            raise ConfigError(
                f"head_dim is {config_json['head_dim']!r} in config.json, expected {width}, which "
                "follows from hidden_size and num_attention_heads."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json; a square's side is one number."""
        fields = super().to_dict()
        for name in ("image_size", "patch_size"):
            height, width = fields[name]
            fields[name] = height if height == width else [height, width]
        return fields

    @property
    def patches(self) -> tuple[int, int]:
        """How many patches there are, down and across."""
        (height, width), (down, across) = self.image_size, self.patch_size
        return height // down, width // across

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return (*self.image_size, self.num_channels)


class _Embeddings(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, pixel_values: Array, deterministic: bool) -> Array:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        patches = nn.Conv(
            c.hidden_size,
            c.patch_size,
            c.patch_size,
            "VALID",
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=init,
            name="patches",
        )
        x = patches(pixel_values)  # (batch, down, across, hidden)
        x = x.reshape(x.shape[0], -1, c.hidden_size)  # (batch, patches, hidden)
        token = self.param("cls_token", init, (1, 1, c.hidden_size), c.param_dtype)
        token = jnp.broadcast_to(token, (x.shape[0], 1, c.hidden_size)).astype(c.dtype)
        x = jnp.concatenate([token, x], axis=1)  # (batch, 1 + patches, hidden)
        shape = (1, x.shape[1], c.hidden_size)
        x += self.param("position_embeddings", init, shape, c.param_dtype).astype(c.dtype)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic)


class _Attention(nn.Module):
    config: ViTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        heads, width = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        q, k, v = (
            layers.dense(c, c.hidden_size, name, use_bias=c.qkv_bias)(x).reshape(
                *x.shape[:2], heads, width
            )  # (batch, seq, heads, width)
            for name in ("query", "key", "value")
        )
        drop = None
        if c.attention_probs_dropout_prob and not self.deterministic:
            drop = nn.Dropout(c.attention_probs_dropout_prob, deterministic=False)
        y = layers.attend(c, q, k, v, None, drop=drop)  # (batch, seq, heads, width)
        return layers.dense(c, c.hidden_size, "out")(y.reshape(x.shape))  # (batch, seq, hidden)


class _Mlp(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        y = layers.dense(c, c.intermediate_size, "up")(x)  # (batch, seq, up)
        return layers.dense(c, c.hidden_size, "down")(ACTIVATIONS[c.hidden_act](y))


class _Layer(nn.Module):
    config: ViTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, own: None) -> tuple[Array, None]:
        c = self.config
        drop = nn.Dropout(c.hidden_dropout_prob, deterministic=self.deterministic)
        y = layers.layer_norm(c, c.layer_norm_eps, x, "norm_before")
        x = x + drop(_Attention(c, self.deterministic, name="attention")(y))  # (batch, seq, hidden)
        y = layers.layer_norm(c, c.layer_norm_eps, x, "norm_after")
        return x + drop(_Mlp(c, name="mlp")(y)), own


class _Encoder(nn.Module):
    config: ViTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, fields = self.config, {"deterministic": self.deterministic}
        return layers.run_layers(c, _Layer, "layer", x, None, **fields)[0]


class ViT(nn.Module):
    """Encode images: patches, encoder, and a pooler over the first state.

    Attributes:
      config: sizes and dtypes.
      add_pooler: whether there is a pooler.
    """

    config: ViTConfig
    add_pooler: bool = True

    @nn.compact
    def __call__(
        self, pixel_values: Array, *, deterministic: bool = True
    ) -> tuple[Array, Array | None]:
        """Encode a batch.

        Every model of this file takes these inputs.

        Args:
          pixel_values: floats (batch, height, width, channels), scaled as the checkpoint wants it.
            Channels stand last, as Flax has them; torch's stand first: transpose
            (0, 2, 3, 1).
          deterministic: False turns dropout on, and needs a "dropout" rng.

        Returns:
          The states (batch, 1 + patches, hidden) after the last norm, that of the class token
          first, and the pooled state (batch, pooler_output_size), or None without a pooler; both of
          the config's dtype.

        Raises:
          ModelError: inputs of a wrong shape or dtype.
        """
        c = self.config
        shape, dtype = jnp.shape(pixel_values), jnp.result_type(pixel_values)
        if shape[1:] != c.image_shape or not jnp.issubdtype(dtype, jnp.floating):
            raise ModelError(
                f"pixel_values is {dtype} of shape {shape}, expected floats of shape "
                f"(batch, {', '.join(map(str, c.image_shape))}): channels last."
            )
        x = _Embeddings(c, name="embeddings")(pixel_values, deterministic)
        x = _Encoder(c, deterministic, name="encoder")(x)  # (batch, 1 + patches, hidden)
        x = layers.layer_norm(c, c.layer_norm_eps, x)
        if not self.add_pooler:
            return x, None
        pooled = layers.dense(c, c.pooler_output_size or c.hidden_size, "pooler")(x[:, 0])
        return x, ACTIVATIONS[c.pooler_act](pooled)  # (batch, pooled)


class ViTForImageClassification(nn.Module):
    """Classify each image: the state of the class token, `classifier`.

    Attributes:
      config: sizes and dtypes.
      num_labels: number of logits.
    """

    config: ViTConfig
    num_labels: int = 2

    @nn.compact
    def __call__(self, pixel_values: Array, *, deterministic: bool = True) -> Array:
        """Return logits (batch, num_labels) of the config's dtype; inputs as in `ViT`."""
        vit = ViT(self.config, add_pooler=False, name="vit")
        x, _ = vit(pixel_values, deterministic=deterministic)  # (batch, 1 + patches, hidden)
        return layers.classify(self.config, x[:, 0], self.num_labels, 0.0, deterministic)


NAMES = Names(
    "vit",
    {
        "embeddings/cls_token": "embeddings.cls_token",
        "embeddings/position_embeddings": "embeddings.position_embeddings",
        "embeddings/patches": "embeddings.patch_embeddings.projection",
        "encoder/layer_{}/norm_before": "encoder.layer.{}.layernorm_before",
        "encoder/layer_{}/attention/query": "encoder.layer.{}.attention.attention.query",
        "encoder/layer_{}/attention/key": "encoder.layer.{}.attention.attention.key",
        "encoder/layer_{}/attention/value": "encoder.layer.{}.attention.attention.value",
        "encoder/layer_{}/attention/out": "encoder.layer.{}.attention.output.dense",
        "encoder/layer_{}/norm_after": "encoder.layer.{}.layernorm_after",
        "encoder/layer_{}/mlp/up": "encoder.layer.{}.intermediate.dense",
        "encoder/layer_{}/mlp/down": "encoder.layer.{}.output.dense",
        "norm": "layernorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    },
)
"""Our module paths and the names in the files, which transformers 5 calls otherwise in memory."""
