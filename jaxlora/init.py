"""`lora_init` and the initializers of the factors."""

from collections.abc import Mapping
from typing import Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora import dora, tree
from jaxlora.adapter import Adapter, Site, Spec, boxed_like
from jaxlora.config import LoraConfig
from jaxlora.dispatch import by_model
from jaxlora.errors import AdapterError, ConfigError
from jaxlora.initializers import initializer
from jaxlora.plan import plan

Array = jax.Array


@overload
def lora_init(
    key: Array,
    model: nn.Module,
    variables: Mapping[str, Any],
    config: LoraConfig,
    *args: Any,
    **kwargs: Any,
) -> Adapter: ...
@overload
def lora_init(key: Array, model: Any, config: LoraConfig, *args: Any, **kwargs: Any) -> Adapter: ...
@by_model(1)
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
    base, dtype = tree.flat(params), spec.config.param_dtype
    leaves: dict[str, Any] = {}
    for site in spec.sites:
        site_key = jax.random.fold_in(key, tree.path_hash(site.path))
        a, b = (x.astype(dtype) for x in _draw(site_key, site, base[site.path], spec.config.init))
        start = {"a": a, "b": b}
        if site.dora:
            kernel = _value(site.path, base[site.path])
            start["m"] = dora.norm(site.layout, kernel).astype(dtype)
        for part in (*site.trained, *site.frozen):
            kind: Any = part[0]
            leaf = site.layout.to_leaf(start[kind], kind, site.rank)
            # A copy: the step donates what is trained, and must not take the start with it.
            leaves[f"{site.path}_lora_{part}"] = jnp.array(leaf, copy=part in site.frozen)
    for saved in spec.saved:
        value = saved.taken(_value(saved.path, base[saved.path]))
        # A copy: the step donates the adapter's buffers, and must not take the base's with them.
        leaves[saved.leaf_path] = jnp.array(value, dtype, copy=True)
    return spec.adapter({path: boxed_like(base, spec, path, x) for path, x in leaves.items()})


def _draw(key: Array, site: Site, kernel: Any, name: str) -> tuple[Array, Array]:
    """A and B as (*stack, *core)."""
    layout = site.layout
    shape_a, shape_b = (layout.full_shape(part, site.rank) for part in ("a", "b"))
    draw = initializer(name).draw
    if not site.keeps_start and site.lookup:  # the zero factor is the one that is looked up
        return jnp.zeros(shape_a), jax.random.normal(key, shape_b)
    if site.keeps_start:
        _value(site.path, kernel)
    drawn = draw(key, site, kernel)
    if not isinstance(drawn, tuple):
        return jnp.reshape(drawn, shape_a), jnp.zeros(shape_b)
    a, b = jnp.reshape(drawn[0], shape_a), jnp.reshape(drawn[1], shape_b)
    if not site.keeps_start:
        _check_identity(site, a, b, name)
    return a, b


def _check_identity(site: Site, a: Array, b: Array, name: str) -> None:
    """Raises ConfigError if concrete factors have a product that is not zero up to rounding."""
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return
    sizes = site.layout.count("i"), site.layout.block_outputs
    a, b = (x.reshape(-1, site.rank, n) for x, n in zip((a, b), sizes, strict=True))
    with jax.default_matmul_precision("highest"):
        probe = jnp.sum(a, -1)  # the low-rank values of an input of ones
        out = jnp.einsum("nr,nro->no", probe, b)
        most = jnp.einsum("nr,nro->no", jnp.abs(probe), jnp.abs(b))
    if float(jnp.abs(out).max()) > 1e-4 * float(most.max()):
        raise ConfigError(
            f"init={name!r} starts {site.path} with factors whose product is not zero, so a fresh "
            "adapter would change the model. Register it with `keeps_start=True`."
        )


def _value(path: str, base: Any) -> Any:
    value = tree.unboxed(base)
    if not isinstance(value, jax.Array) and not hasattr(value, "__array__"):
        raise AdapterError(
            f"The adapter starts from the value of {path}, but that is a {type(value).__name__}, "
            "expected an array. Pass concrete variables."
        )
    return value
