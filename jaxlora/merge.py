"""`merge`: fold an adapter into plain params, after which inference costs what the base costs."""

from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora import tree
from jaxlora.adapter import Adapter, check_base, check_leaves
from jaxlora.dispatch import by_model
from jaxlora.errors import AdapterError, listing
from jaxlora.fold import fold as fold_kernel
from jaxlora.init import init_leaves

Array = jax.Array


@overload
def merge(
    params: Mapping[str, Any], adapter: Adapter, *, donate: bool = False, dtype: Any = None
) -> tree.Tree: ...
@overload
def merge(params: Any, adapter: Adapter, *, donate: bool = False, dtype: Any = None) -> Any: ...
@by_model(trees=True)
def merge(
    params: tree.Tree, adapter: Adapter, *, donate: bool = False, dtype: Any = None
) -> tree.Tree:
    """Folds `W' = W + scaling * B A` into each adapted kernel, and each leaf trained in full.

    The sum is made in float32 (float64 for a float64 base) and rounded once to the base's dtype.
    Rounding to bfloat16 loses 28 % of a delta whose norm is 0.6 % of the kernel's, and 3 % of one
    of 6 %: ask for a wider `dtype` where that matters.

    Works under `jit` and `grad`: the weight-space way for any function of params.

    A params tree does not remember what was merged into it: merging twice adds twice.

    Args:
      params: the base. Leaves that the adapter does not touch are passed on, not copied. Any
        other pytree of params will do, and an NNX module: what comes back is of the same kind.
      adapter: the adapter.
      donate: reuse the buffers of the touched kernels, leaf by leaf, so that no second copy of
        them is ever held. `params` must not be used afterwards.
      dtype: dtype of the touched kernels; the base's own by default.

    Returns:
      Params of the base's structure, without a LoRA leaf.

    Raises:
      AdapterError: the adapter does not fit the params, or holds NaN or inf (checked on
        concrete arrays, not while tracing).

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> merged = jl.merge(variables["params"], adapter)
      >>> model.apply({"params": merged}, x).shape
      (2, 3)
    """
    _check_finite(adapter)
    return _fold(params, adapter, 1.0, donate=donate, dtype=dtype)


def unmerge(params: tree.Tree, adapter: Adapter, *, base: tree.Tree | None = None) -> tree.Tree:
    """`W = W' - scaling * B A`: takes a merged adapter out again, up to rounding.

    Inexact even in float32, where 3 % of the elements come back one rounding off, and worse in
    bfloat16. The exact way back is the base itself: keep it, `merge` does not change it.

    Args:
      params: merged params.
      adapter: the adapter that was merged.
      base: params that hold the original values of leaves that the adapter trained in full
        (`modules_to_save`, `bias`) or rescaled (`dora`): no subtraction brings them back.

    Returns:
      Params of the same structure.

    Raises:
      AdapterError: the adapter does not fit, or replaced leaves and there is no `base`.
    """
    _check_finite(adapter)
    saved = [leaf.path for leaf in adapter.spec.saved]
    saved += [site.path for site in adapter.spec.sites if site.dora]
    if saved and base is None:
        raise AdapterError(
            f"unmerge cannot bring back what the merge overwrote: {listing(saved)}. Expected "
            "`base=` with their original values, or keep the base instead of unmerging."
        )
    originals = tree.flat(base) if base is not None else {}
    if base is not None:
        check_base(base, adapter.spec)
    unfolded = _fold(params, adapter, -1.0, donate=False, dtype=None)
    return tree.map_leaves(lambda path, x: originals[path] if path in saved else x, unfolded)


def reset(
    key: Array, params: tree.Tree, adapter: Adapter, *, donate: bool = False
) -> tuple[tree.Tree, Adapter]:
    """Merges an adapter and starts a fresh one of the same spec (ReLoRA, Lialin et al. 2023).

    The sum of several updates of rank r has a higher rank than one. Make a new optimizer state
    too: the moments belong to the factors that were merged.

    Args:
      key: a PRNG key for the fresh factors.
      params: the base.
      adapter: the adapter.
      donate: as for `merge`.

    Returns:
      (merged params, fresh adapter): together they are the model as it was, up to the rounding of
      the merge.

    Raises:
      AdapterError: as `merge`.
    """
    merged = merge(params, adapter, donate=donate)
    return merged, init_leaves(key, merged, adapter.spec)


def _fold(
    params: tree.Tree, adapter: Adapter, sign: float, *, donate: bool, dtype: Any
) -> tree.Tree:
    check_leaves(adapter)
    check_base(params, adapter.spec)
    values = adapter.values()
    sites = {site.path: site for site in adapter.spec.sites}
    saved = {leaf.path: leaf for leaf in adapter.spec.saved}
    add = _add_donating if donate else _add

    def fold(path: str, leaf: Any) -> Any:
        kernel = tree.unboxed(leaf)
        if path in saved:  # a copy: the merged tree must outlive the adapter's buffers
            value = jnp.array(saved[path].put(kernel, values[saved[path].leaf_path]), copy=True)
        elif path in sites:
            site = sites[path]
            to = jnp.dtype(kernel.dtype if dtype is None else dtype)
            leaves, scaling = site.leaves(values), sign * site.scaling
            value = add(kernel, leaves, scaling, site.layout, site.rank, to)
        else:
            return leaf
        return leaf.replace_boxed(value) if tree.is_box(leaf) else value

    return tree.map_leaves(fold, params)


# The scaling is traced: kernels of one layout share a program whatever their alpha.
_add = jax.jit(fold_kernel, static_argnums=(3, 4, 5))
_add_donating = jax.jit(fold_kernel, static_argnums=(3, 4, 5), donate_argnums=0)


@jax.jit
def _finite(leaves: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.isfinite(x).all() for path, x in leaves.items()}


def _check_finite(adapter: Adapter) -> None:
    values = adapter.values()
    if any(isinstance(x, Tracer) for x in values.values()):
        return
    bad = [path for path, ok in jax.device_get(_finite(values)).items() if not ok]
    if bad:
        raise AdapterError(
            f"The adapter holds NaN or inf in {listing(bad)}, expected finite numbers: "
            "merging would spoil the base. Go back to an earlier checkpoint."
        )
