"""Quantized bases: int8, int4 and nf4 kernels under an adapter (QLoRA, Dettmers et al. 2023).

A quantized kernel is a metadata box in the place of the array. Flax unboxes it where the layer asks
for its param, inside the scan body or the vmapped expert, so the model's own code and a plain
`model.apply` work as they are. Under `lora_apply` each layer dequantizes its kernel in the forward
pass and again in the backward pass, and no dequantized copy is kept between the two (but for
kernels that no rule serves). Types and arithmetic are qwix's; the second quantization, of the
scales, is ours.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jaxlora import tree
from jaxlora.adapter import Spec, check_base
from jaxlora.errors import ConfigError, listing, nearest, optional
from jaxlora.layout import KernelLayout

Array = jax.Array
QTYPES = ("int8", "int4", "nf4")
_AFTER: contextvars.ContextVar[Any] = contextvars.ContextVar("after", default=None)
# The quantiles of a normal distribution (Dettmers et al. 2023, appendix E).
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
_SCALES = 256  # scales that share one scale of their own (section 3, "Double Quantization")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(meta.AxisMetadata):
    """A quantized kernel in its place in a params tree.

    Attributes:
      codes: the codes, of the kernel's shape.
      scale: a scale for each block of codes, with as many axes; quantized itself where `mean` is.
      mean: the mean of the scales, which was taken off before they were quantized, or None.
      dtype: the dtype that the kernel is dequantized to.
    """

    codes: Any
    scale: Any
    mean: Any
    qtype: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def unbox(self) -> Array:
        """The dequantized kernel."""
        codes, scale = self.codes, self.scale
        if self.mean is not None:
            scale = _qwix().dequantize(scale) + self.mean
        if (x := _AFTER.get()) is not None:  # no float is above infinity, which XLA does not know
            codes = codes | jnp.any(x.ravel()[:1] > jnp.inf).astype(codes.dtype)
        values = _nf4(codes) if self.qtype == "nf4" else codes.astype(scale.dtype)
        return _scaled(values, scale).astype(self.dtype)

    def replace_boxed(self, val: Any) -> Any:
        """The new value as it is: what is computed from a quantized kernel is not quantized."""
        return val

    def add_axis(self, index: int, params: Any) -> "Quantized":
        """The box itself: all its arrays gain the axis at the same place."""
        return self

    def remove_axis(self, index: int, params: Any) -> "Quantized":
        """The box itself: all its arrays lose the axis at the same place."""
        return self


@contextlib.contextmanager
def unboxing_after(x: Array) -> Iterator[None]:
    """Within it, a kernel cannot be dequantized before `x` is computed.

    XLA would else dequantize all kernels of a model at its start, and find in the backward pass
    that the forward pass had done the same. `optimization_barrier` does not help: on CPU it is
    dropped before XLA looks.
    """
    token = _AFTER.set(x)
    try:
        yield
    finally:
        _AFTER.reset(token)


def quantize(
    params: tree.Tree, spec: Spec, qtype: str = "nf4", *, block: int = 64, double: bool = True
) -> tree.Tree:
    """Quantizes the kernels of a base that a spec adapts, each block of inputs with its own scale.

    The usual base of QLoRA has all linear layers quantized, whatever is adapted later: pass the
    spec of a plan with `targets="all-linear"`. Works under `jax.eval_shape` and `jax.jit`.

    Args:
      params: the base. It is not changed.
      spec: which kernels to quantize: `plan(…).spec`, or an adapter's.
      qtype: "int8", "int4", or "nf4", whose 16 values suit normally distributed weights.
      block: the number of inputs that share a scale; the largest divisor of a kernel's inputs up to
        this is taken.
      double: quantize the scales to int8 as well, 256 of them to a scale of their own.

    Returns:
      Params of the same structure with a `Quantized` box for each of those kernels. They go
      wherever the params go. Merging an adapter gives arrays, dequantized.

    Raises:
      ConfigError: an unknown qtype, or a block below 1.
      AdapterError: the spec does not fit the params.
      MissingDependencyError: qwix is not installed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(128), jnp.ones((2, 256))
      >>> variables = model.init(jax.random.key(0), x)
      >>> planned = jl.plan(model, variables, jl.LoraConfig(rank=2), x)
      >>> quantized = {"params": jl.quantize(variables["params"], planned.spec)}
      >>> print(str(jl.plan(model, quantized, jl.LoraConfig(rank=2), x)).splitlines()[-1])
      0.00 MB to train on a base of 0.02 MB
      >>> model.apply(quantized, x).shape
      (2, 128)
    """
    if qtype not in QTYPES:
        raise ConfigError(
            f"qtype is {qtype!r}, expected one of {listing(QTYPES)}. "
            f"Nearest: {nearest(str(qtype), QTYPES, 1)[0]}."
        )
    if block < 1:
        raise ConfigError(f"block is {block!r}, expected a number of inputs of at least 1.")
    check_base(params, spec)
    layouts = {site.path: site.layout for site in spec.sites}

    def leaf(path: str, x: Any) -> Any:
        if path not in layouts:
            return x
        return _quantized(tree.unboxed(x), layouts[path], qtype, block, double)

    return tree.map_leaves(leaf, params)


def dequantize(params: tree.Tree) -> tree.Tree:
    """The params with arrays in the place of quantized kernels."""
    return tree.map_leaves(lambda _, x: x.unbox() if isinstance(x, Quantized) else x, params)


def _quantized(x: Array, layout: KernelLayout, qtype: str, block: int, double: bool) -> Quantized:
    axis = max(layout.axes("i"), key=lambda a: x.shape[a])
    found = _in_blocks(x.astype(jnp.float32), _qtype(qtype), {axis: _divisor(x.shape[axis], block)})
    scale, mean = found.scale, None
    if double:
        # Along own axes only, so that a stacked kernel's scales are sliced as the kernel is.
        free = [a for a in range(x.ndim) if a not in layout.axes("s")]
        along = max(free, key=lambda a: scale.shape[a])
        mean = jnp.mean(scale, axis=free, keepdims=True)
        tiles = {along: _divisor(scale.shape[along], _SCALES)}
        scale = _in_blocks(scale - mean, jnp.int8, tiles)
    return Quantized(found.qvalue, scale, mean, qtype, jnp.dtype(x.dtype))


def _nf4(codes: Array) -> Array:
    """The values of nf4 codes, chosen bit by bit.

    A lookup is a gather, for which a TPU's compiler makes the kernel in float32 in memory and reads
    30 times the bytes (v5e); choices go into the product, tile by tile, as int8 and int4 do.
    """
    bits = codes.astype(jnp.uint8)
    values: list[Any] = list(_NF4)
    for bit in range(4):
        one = (bits >> bit) & 1 == 1
        values = [jnp.where(one, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0].astype(jnp.float32)


def _scaled(values: Array, scale: Array) -> Array:
    """Each block of values times its scale."""
    split = [
        n for size, own in zip(values.shape, scale.shape, strict=True) for n in (own, size // own)
    ]
    blocks = values.reshape(split) * jnp.expand_dims(scale, range(1, 2 * scale.ndim, 2))
    return blocks.reshape(values.shape)


def _in_blocks(x: Array, qtype: Any, tiles: dict[int, int]) -> Any:
    others = [axis for axis in range(x.ndim) if axis not in tiles]
    return _qwix().quantize(x, qtype, channelwise_axes=others, tiled_axes=tiles)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of a size up to `most`."""
    return max(n for n in range(1, min(size, most) + 1) if size % n == 0)


def _qtype(name: str) -> Any:
    return name if name == "nf4" else jnp.dtype(name)


def _qwix() -> Any:
    return optional("qwix", "A quantized base", "quant")
