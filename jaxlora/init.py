"""`lora_init` and the initializers of the factors."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora import dora, tree
from jaxlora.adapter import Adapter, Site, Spec, boxed_like
from jaxlora.config import LoraConfig
from jaxlora.errors import AdapterError, ConfigError, nearest
from jaxlora.plan import plan

Array = jax.Array
Initializer = Callable[[Array, Site, jnp.dtype], Array]
"""(key, site, dtype) -> A as (*stack, *batch, rank, *contracted)."""


def lora_init(
    key: Array,
    model: nn.Module,
    variables: Mapping[str, Any],
    config: LoraConfig,
    *args: Any,
    **kwargs: Any,
) -> Adapter:
    """Makes a fresh adapter: A random and B zero, so that it changes nothing (Hu et al. 2021, 4.1).

    Each kernel's key comes from a hash of its path, so adding a target leaves the others' factors
    as they were. Each slice of a stacked kernel has a draw of its own.

    Args:
      key: a PRNG key.
      model: a Flax Linen module.
      variables: its variables. They are read, never changed.
      config: what to adapt and how.
      *args: example inputs for `model.apply`, only traced.
      **kwargs: keyword arguments for `model.apply`.

    Returns:
      The adapter; its leaves have dtype `config.param_dtype`. Where the base's leaf is boxed
      (`nn.Partitioned`), so are the factors, with the names of the axes that they share.

    Raises:
      LoraError: as `plan`; or an unknown `config.init`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> jax.tree.map(jnp.shape, adapter.params)
      {'kernel_lora_a': (2, 4), 'kernel_lora_b': (2, 3)}
    """
    spec = plan(model, variables, config, *args, **kwargs).spec
    return init_leaves(key, variables["params"], spec)


def init_leaves(key: Array, params: tree.Tree, spec: Spec) -> Adapter:
    """A fresh adapter for a spec that is there already: as `lora_init`, without tracing a model."""
    draw = initializer(spec.config.init)
    base, dtype = tree.flat(params), spec.config.param_dtype
    leaves: dict[str, Any] = {}
    for site in spec.sites:
        site_key = jax.random.fold_in(key, tree.path_hash(site.path))
        layout, stack = site.layout, site.layout.sizes("s")
        shape_a, shape_b = ((*stack, *layout.core_shape(p, site.rank)) for p in ("a", "b"))
        if site.lookup:
            a, b = jnp.zeros(shape_a, dtype), jax.random.normal(site_key, shape_b, dtype)
        else:
            a, b = draw(site_key, site, dtype), jnp.zeros(shape_b, dtype)
        leaves[f"{site.path}_lora_a"] = layout.to_leaf(a, "a", site.rank)
        leaves[f"{site.path}_lora_b"] = layout.to_leaf(b, "b", site.rank)
        if site.dora:
            m = dora.norm(layout, _value(site.path, base[site.path])).astype(dtype)
            leaves[f"{site.path}_lora_m"] = layout.to_leaf(m, "m", site.rank)
    for saved in spec.saved:
        leaves[f"{saved.path}_lora_w"] = _trained_copy(saved.path, base[saved.path], dtype)
    leaves = {path: boxed_like(base, spec, path, leaf) for path, leaf in leaves.items()}
    return Adapter(tree.nested(leaves), spec)


def register_init(name: str) -> Callable[[Initializer], Initializer]:
    """Registers an initializer of A under a name for `LoraConfig(init=name)`.

    Args:
      name: the name.

    Returns:
      A decorator for a function `(key, site, dtype) -> A` of shape
      `(*stack, *batch, rank, *contracted)`.
    """

    def decorate(draw: Initializer) -> Initializer:
        _INITIALIZERS[name] = draw
        return draw

    return decorate


def initializer(name: str) -> Initializer:
    """The initializer of that name, or a ConfigError with those there are."""
    if name not in _INITIALIZERS:
        raise ConfigError(
            f"init is {name!r}, expected one of {', '.join(sorted(_INITIALIZERS))}. "
            f"Nearest: {nearest(name, _INITIALIZERS, 1)[0]}."
        )
    return _INITIALIZERS[name]


_INITIALIZERS: dict[str, Initializer] = {}


@register_init("kaiming")
def _kaiming(key: Array, site: Site, dtype: jnp.dtype) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's kaiming_uniform_(a=sqrt(5)) as in loralib."""
    bound = 1 / math.sqrt(site.layout.count("i"))
    return jax.random.uniform(key, _shape(site), dtype, -bound, bound)


@register_init("gaussian")
def _gaussian(key: Array, site: Site, dtype: jnp.dtype) -> Array:
    """N(0, (1/rank)^2), as in PEFT."""
    return jax.random.normal(key, _shape(site), dtype) / site.rank


def _shape(site: Site) -> tuple[int, ...]:
    return (*site.layout.sizes("s"), *site.layout.core_shape("a", site.rank))


def _value(path: str, base: Any) -> Any:
    value = tree.unboxed(base)
    if not isinstance(value, jax.Array) and not hasattr(value, "__array__"):
        raise AdapterError(
            f"The adapter starts from the value of {path}, but that is a {type(value).__name__}, "
            "expected an array. Pass concrete variables."
        )
    return value


def _trained_copy(path: str, base: Any, dtype: Any) -> Any:
    value = _value(path, base)
    # A copy: the step donates the adapter's buffers, and must not take the base's with them.
    return jnp.array(value, dtype, copy=True)
