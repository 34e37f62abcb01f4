"""The decoder that is trained: pre-norm layers with six linear kernels each, in Linen and NNX."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder and how its layers run.

    Attributes:
      flat: Dense layers on tokens flattened to two dimensions, which XLA on CPU runs faster.
    """

    layers: int = 6
    width: int = 512
    heads: int = 8
    dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False
    flat: bool = False


class Layer(nn.Module):
    """One layer."""

    shape: Shape

    @nn.compact
    def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
        """(batch, sequence, width) to the same."""
        c = self.shape
        head = c.heads, c.width // c.heads
        y = nn.LayerNorm(name="norm_a", dtype=c.dtype)(x)
        q, k, v = (self._heads(head, name, y) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        if c.flat:
            x = x + self._flat(c.width, "out", y.reshape(x.shape))
        else:
            out = nn.DenseGeneral(c.width, axis=(-2, -1), name="out", **_dtypes(c))
            x = x + out(y)
        y = nn.LayerNorm(name="norm_b", dtype=c.dtype)(x)
        y = nn.gelu(self._dense(4 * c.width, "up", y))
        return x + self._dense(c.width, "down", y), None

    def _heads(self, head: tuple[int, int], name: str, x: Array) -> Array:
        if not self.shape.flat:
            return nn.DenseGeneral(head, name=name, **_dtypes(self.shape))(x)
        return self._flat(head[0] * head[1], name, x).reshape(*x.shape[:2], *head)

    def _dense(self, width: int, name: str, x: Array) -> Array:
        if self.shape.flat:
            return self._flat(width, name, x)
        return nn.Dense(width, name=name, **_dtypes(self.shape))(x)

    def _flat(self, width: int, name: str, x: Array) -> Array:
        y = nn.Dense(width, name=name, **_dtypes(self.shape))(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], width)


class Decoder(nn.Module):
    """The layers, unrolled or scanned."""

    shape: Shape

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(batch, sequence, width) to the same."""
        c = self.shape
        layer: Any = nn.remat(Layer, prevent_cse=not c.scan) if c.remat else Layer
        if c.scan:
            axes: Any = {"params": 0}
            splits: Any = {"params": True, "dropout": True}
            scanned = nn.scan(layer, variable_axes=axes, split_rngs=splits, length=c.layers)
            return scanned(c, name="layers")(x, None)[0]
        for i in range(c.layers):
            x, _ = layer(c, name=f"layer_{i}")(x, None)
        return x


class NnxLayer(nnx.Module):
    """The same layer in NNX; `adapt` wraps its kernels in nnx.LoRA."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        self.heads = shape.heads
        width, dtypes = shape.width, _dtypes(shape)
        self.norm_a = nnx.LayerNorm(width, dtype=shape.dtype, rngs=rngs)
        self.norm_b = nnx.LayerNorm(width, dtype=shape.dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, rngs=rngs, **dtypes) for _ in range(4)
        )
        self.up = nnx.Linear(width, 4 * width, rngs=rngs, **dtypes)
        self.down = nnx.Linear(4 * width, width, rngs=rngs, **dtypes)

    def adapt(self, names: tuple[str, ...], rank: int, rngs: nnx.Rngs) -> None:
        """Wrap the named kernels."""
        for name in names:
            base = getattr(self, name)
            sizes = base.in_features, rank, base.out_features
            lora = nnx.LoRA(
                *sizes, base_module=base, dtype=base.dtype, param_dtype=base.param_dtype, rngs=rngs
            )
            setattr(self, name, lora)

    def __call__(self, x: Array, past: tuple[Array, Array] | None = None) -> Array:
        """(batch, sequence, width) to the same; `past` is the keys and values before them."""
        y = self.norm_a(x)
        q, k, v = (
            linear(y).reshape(*x.shape[:2], self.heads, -1)
            for linear in (self.query, self.key, self.value)
        )
        if past is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, (k, v), strict=True))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nn.gelu(self.up(self.norm_b(x))))


class NnxDecoder(nnx.Module):
    """The layers in NNX, unrolled."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        self.remat = shape.remat
        self.layers = nnx.List([NnxLayer(shape, rngs) for _ in range(shape.layers)])

    def __call__(self, x: Array, past: Any = None) -> Array:
        """(batch, sequence, width) to the same."""
        for i, layer in enumerate(self.layers):
            own = None if past is None else past[i]
            x = self._again(layer, x) if self.remat else layer(x, own)
        return x

    def _again(self, layer: NnxLayer, x: Array) -> Array:
        graph, state = nnx.split(layer)
        return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def _dtypes(shape: Shape) -> dict[str, Any]:
    return {"dtype": shape.dtype, "param_dtype": shape.dtype}
