"""Any function of params: the update is added to the kernels, and the function runs on those.

Plain functions, Equinox, Haiku, Keras on JAX: whatever takes its params as a pytree. The paths of
leaves are the keys, fields and indices on the way to them, joined by `/`: `layers/0/weight`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxlora import tree
from jaxlora.adapter import Adapter
from jaxlora.config import LoraConfig
from jaxlora.discover import Seen
from jaxlora.errors import ConfigError, ModelError
from jaxlora.init import init_leaves
from jaxlora.merge import merge as merge_params
from jaxlora.plan import Plan, plan_of


def weight_space(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Has a function of params take an adapter: `apply_fn(merge(params, adapter), …)`.

    The price, which layers that are run by `lora_apply` do not pay: each call makes a copy of every
    adapted kernel, and each gradient forms the dense gradient of it before it becomes the factors'.
    A step then costs about 0.87 of full fine-tuning's where the low-rank branch costs 0.68 (a
    decoder of 6 layers, 512 wide, on a CPU). What is saved is the optimizer's state and the
    checkpoint. There is no dropout on the factors' input, since that is never seen.

    Args:
      apply_fn: `(params, …) -> anything`.

    Returns:
      `(params, adapter, …) -> anything`. Differentiate with respect to the adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl
      >>> from jaxlora.weight_space import weight_space
      >>> params, x = {"dense": {"w": jnp.ones((4, 3))}}, jnp.ones((2, 4))
      >>> adapter = jl.lora_init(jax.random.key(0), params, jl.LoraConfig(rank=2, targets="w"))
      >>> adapted = weight_space(lambda params, x: x @ params["dense"]["w"])
      >>> adapted(params, adapter, x).shape
      (2, 3)
    """

    @functools.wraps(apply_fn)
    def adapted(params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        return apply_fn(merge(params, adapter), *args, **kwargs)

    return adapted


def plan(params: Any, config: LoraConfig) -> Plan:
    """Finds what a config adapts in a tree of params without a module.

    Nothing tells what a leaf's axes are: those with two are (in, out), as plain functions, Haiku
    and Keras have them, unless `config.roles` says otherwise, such as `{"weight": "oi"}` for
    Equinox and torch's order. Others are adapted where `roles` gives a letter for each axis.
    "all-linear" means the leaves that are named `kernel`.

    Args:
      params: any pytree; leaves that are no arrays are left alone.
      config: what to adapt. Its mode is taken to be "weights".

    Returns:
      The plan.

    Raises:
      TargetError: a pattern that matches nothing, or a kernel whose roles are not given.
      ModelError: there is no array in the tree.

    Example:
      >>> import jax.numpy as jnp, jaxlora as jl
      >>> params = [{"w": jnp.ones((4, 8))}, {"w": jnp.ones((8, 2))}]
      >>> [site.path for site in jl.plan(params, jl.LoraConfig(targets="1/w")).sites]
      ['1/w']
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"The config is a {type(config).__name__}, expected a LoraConfig.")
    named = by_path(params)

    def see(candidates: set[str]) -> Seen:
        ndims = {path: len(tree.aval(named[path]).shape) for path in candidates}
        holders = dict.fromkeys(candidates, _Params)
        return Seen(holders=holders, ndims=ndims, stacks=dict.fromkeys(candidates, ()))

    return plan_of(tree.nested(named), dataclasses.replace(config, mode="weights"), see)


def lora_init(key: jax.Array, params: Any, config: LoraConfig) -> Adapter:
    """Makes a fresh adapter for a tree of params without a module: as `jaxlora.lora_init`.

    Args:
      key: a PRNG key.
      params: any pytree.
      config: what to adapt and how; see `plan`.

    Returns:
      The adapter.

    Raises:
      LoraError: as `plan`.
    """
    return init_leaves(key, tree.nested(by_path(params)), plan(params, config).spec)


def merge(params: Any, adapter: Adapter, **options: Any) -> Any:
    """Folds an adapter into any pytree of params: as `jaxlora.merge`.

    Args:
      params: the base.
      adapter: the adapter.
      **options: `dtype` and `donate`, as for `jaxlora.merge`.

    Returns:
      A tree of the same structure.

    Raises:
      AdapterError: as `jaxlora.merge`.
    """
    merged = tree.flat(merge_params(tree.nested(by_path(params)), adapter, **options))
    return jax.tree_util.tree_map_with_path(lambda at, x: merged.get(_path(at), x), params)


def by_path(params: Any) -> dict[str, Any]:
    """{path: leaf} of the arrays in a pytree.

    Raises:
      ModelError: there is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {_path(at): x for at, x in leaves if tree.is_array(x)}
    if not named:
        raise ModelError(
            f"The params are a {type(params).__name__} without an array, expected a pytree of "
            "them. A Linen module comes with its variables: `plan(model, variables, config, …)`."
        )
    return named


def _path(at: Any) -> str:
    return jax.tree_util.keystr(at, simple=True, separator="/")


class _Params:
    """What holds the kernels of a model without modules, as a plan's table names it."""


_Params.__name__ = "params"
