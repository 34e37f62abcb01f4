"""The factors as variables of an NNX module's layers, and the hook that adds the branch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.adapter import Adapter, SavedLeaf, Site
from jaxlora.apply import Factors, adapted, key_data
from jaxlora.branch import with_rows
from jaxlora.fold import fold
from jaxlora.interop.nnx_discover import holders, variables
from jaxlora.interop.nnx_layers import Array, hook, hooked
from jaxlora.layers import Linear


class LoRAFrozen(nnx.Param):
    """A leaf that the update needs and that is never trained; sliced as the kernel beside it."""


class LoRAKey(nnx.Param):
    """The data of a layer's dropout key, one for each slice of a stacked kernel."""


class Calls:
    """How often each site has run in one call of the module."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}


@dataclasses.dataclass(frozen=True)
class Branches:
    """The hook of an adapted layer: it adds to the output what the variables beside a kernel say.

    Static, and part of the module's graph: layers that differ in scaling alone share no program.

    Attributes:
      served: (attribute, what is adapted there) of the layer's params.
      dropout: the probability of dropping an input of A, where there is a key.
      key_impl: the kind of the keys.
      calls: for a module that lives for one call, where calls are counted. A module that stays
        moves its keys on instead.
    """

    served: tuple[tuple[str, Site | SavedLeaf], ...]
    dropout: float
    key_impl: str
    calls: Calls | None = None

    def __call__(self, module: nnx.Module, linear: Linear, run: Any) -> Array:
        """The output of the layer with its update."""
        y, name = run(), linear.param
        what = dict(self.served).get(name)
        if what is None:
            return y
        if isinstance(what, SavedLeaf):
            table, values = vars(module)[name].get_value(), vars(module)[f"{name}_lora_t"]
            return with_rows(linear, y, table, values.get_value(), what.rows)
        leaves = {p: vars(module)[f"{name}_lora_{p}"][...] for p in (*what.trained, *what.frozen)}
        key, count = vars(module).get(f"{name}_lora_key"), 1
        if self.calls is not None:
            count = self.calls.of[what.path] = self.calls.of.get(what.path, 0) + 1
        elif vars(module).get("deterministic") or linear.lookup:
            key = None
        data = None if key is None else key[...]
        if key is not None and self.calls is None:
            key[...] = _next(key[...], self.key_impl)
        factors = Factors(leaves, data, what, self.dropout, self.key_impl)
        return adapted(factors, linear, y, _Held(module), count)


class _Held:
    """An NNX layer as far as the branch reads a Linen one."""

    scope = None

    def __init__(self, module: nnx.Module):
        self._module = module

    def get_variable(self, collection: str, name: str) -> Any:
        variable = vars(self._module).get(name)
        return variable if variable is None else variable[...]


def bind(
    module: nnx.Module, adapter: Adapter, key: Array | None, calls: Calls | None = None
) -> None:
    """Puts an adapter's factors beside the kernels of a module, and hooks its layers.

    Args:
      module: the module; it is changed.
      adapter: the adapter.
      key: the key of the adapter's dropout, or None.
      calls: as for `Branches`. Without it, for a module that stays, the variables are sharded over
        the mesh axes that the kernel's variable names for the axes that they share.
    """
    spec, values = adapter.spec, adapter.values()
    rate = spec.config.dropout if key is not None else 0.0
    served: dict[str, Site | SavedLeaf] = {s.path: s for s in spec.sites if not s.weights}
    served |= {leaf.path: leaf for leaf in spec.saved if leaf.rows}
    beside: dict[str, dict[str, nnx.Param]] = {}
    there, impl = variables(module), ""
    for path, what in served.items():
        if isinstance(what, SavedLeaf):
            beside[path] = {"t": nnx.LoRAParam(values[what.leaf_path])}
            continue
        shards = {} if calls else there[path].get_metadata()
        beside[path] = {
            part: (LoRAFrozen if part in what.frozen else nnx.LoRAParam)(
                x, **_sharded_like(shards, what, part)
            )
            for part, x in what.leaves(values).items()
        }
        if key is not None and rate:
            data, impl = key_data(what, key)
            beside[path]["key"] = LoRAKey(data)
    for layer, held in holders(module, served):
        if not hooked(type(layer)):
            continue
        for attr, path in held.items():
            for part, variable in beside[path].items():
                setattr(layer, f"{attr}_lora_{part}", variable)
        own = tuple((attr, served[path]) for attr, path in sorted(held.items()))
        hook(layer, Branches(own, rate, impl, calls))


def _sharded_like(metadata: Mapping[str, Any], site: Site, part: str) -> dict[str, Any]:
    """The sharding of a leaf, from the metadata of its kernel's variable."""
    names, kind = metadata.get("out_sharding"), part[0]
    if names is None:
        return {}
    axes = site.layout.leaf_axes(kind)  # type: ignore[arg-type]
    names = (*names, *[None] * (len(site.layout.shape) - len(names)))
    shared = tuple(None if axis is None else names[axis] for axis in axes)
    return {"out_sharding": shared, "mesh": metadata.get("mesh")}


def put_in_place(module: nnx.Module, adapter: Adapter) -> None:
    """Sets the params that are trained in full, or adapted in weight space, to their values."""
    values, there = adapter.values(), variables(module)
    for leaf in adapter.spec.saved:
        if not leaf.rows:
            base = there[leaf.path].get_raw_value()
            there[leaf.path].set_raw_value(leaf.put(base, values[leaf.leaf_path]))
    for site in adapter.spec.sites:
        if site.weights:
            base, leaves = there[site.path].get_raw_value(), site.leaves(values)
            folded = fold(base, leaves, site.scaling, site.layout, site.rank, base.dtype)
            there[site.path].set_raw_value(folded)


def _next(data: Array, impl: str) -> Array:
    """The data of the keys after these."""
    words = data.reshape(-1, jax.random.key_data(jax.random.key(0, impl=impl)).shape[-1])
    keys = jax.random.wrap_key_data(words, impl=impl)
    moved = jax.vmap(lambda key: jax.random.key_data(jax.random.fold_in(key, 0)))(keys)
    return jnp.reshape(moved, data.shape)
