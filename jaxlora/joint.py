"""One tree of base and LoRA leaves, for training code that carries a single params tree.

`combine` makes it, `split` takes it apart, `lora_mask` tells the leaves from one another and
`lora_optimizer` trains the LoRA leaves alone. Leaves are told by their names, so none of them
needs the spec; give it where a base has names of the form `…_lora_a` of its own.

A joint tree is for carrying, not for applying: `model.apply` on it runs the base. Inside the loss,
`base, adapter = split(joint, spec)` and `lora_apply(model, {"params": base}, adapter, …)`.
"""

from typing import Any, overload

import jax
import jax.numpy as jnp
import optax

from jaxlora import tree
from jaxlora.adapter import Adapter, Spec, check_leaves
from jaxlora.errors import AdapterError, ConfigError, listing


def combine(params: tree.Tree, adapter: Adapter | tree.Tree) -> tree.Tree:
    """The base and the LoRA leaves in one tree; no leaf is copied or replaced.

    Args:
      params: the base.
      adapter: an adapter, or the bare tree of its leaves.

    Returns:
      A nested dict.

    Raises:
      AdapterError: a path that both hold, so the base is a joint tree already.

    Example:
      >>> import jaxlora as jl
      >>> base = {"dense": {"kernel": 1.0}}
      >>> joint = jl.combine(base, {"dense": {"kernel_lora_a": 2.0}})
      >>> joint
      {'dense': {'kernel': 1.0, 'kernel_lora_a': 2.0}}
      >>> jl.split(joint) == (base, {"dense": {"kernel_lora_a": 2.0}})
      True
    """
    if not isinstance(adapter, Adapter):
        return tree.union(params, adapter)
    return tree.union(tree.union(params, adapter.params), adapter.frozen)


@overload
def split(joint_params: tree.Tree, spec: None = None) -> tuple[tree.Tree, tree.Tree]: ...
@overload
def split(joint_params: tree.Tree, spec: Spec) -> tuple[tree.Tree, Adapter]: ...
def split(joint_params: tree.Tree, spec: Spec | None = None) -> tuple[tree.Tree, Any]:
    """The inverse of `combine`.

    Args:
      joint_params: base and LoRA leaves in one tree.
      spec: the adapter's spec. With it the second value is an `Adapter`.

    Returns:
      (base, LoRA leaves), or (base, Adapter) with a spec.

    Raises:
      AdapterError: the tree holds no LoRA leaf, or not those of the spec.
    """
    lora = _lora_paths(joint_params, spec)
    base = tree.select(lambda path: path not in lora, joint_params)
    if spec is None:
        return base, tree.select(lambda path: path in lora, joint_params)
    trained = tree.select(lambda path: path in spec.leaf_shapes, joint_params)
    adapter = Adapter(
        trained, spec, tree.select(lambda path: path in spec.frozen_shapes, joint_params)
    )
    check_leaves(adapter)
    return base, adapter


def lora_mask(joint_params: tree.Tree, spec: Spec | None = None) -> tree.Tree:
    """A tree of booleans for optax: True for trained LoRA leaves, False for all that is frozen.

    `optax.masked(tx, mask)` alone lets the gradients of the base through as updates:
    `lora_optimizer` is what trains the LoRA leaves only.

    Args:
      joint_params: base and LoRA leaves in one tree.
      spec: the adapter's spec, where names do not tell.

    Returns:
      A nested dict of booleans.

    Raises:
      AdapterError: the tree holds no LoRA leaf, or not those of the spec.
    """
    lora = _lora_paths(joint_params, spec)
    trained = {path for path in lora if tree.is_trained_name(path)}
    return tree.map_leaves(lambda path, _: path in trained, joint_params)


def lora_optimizer(
    tx: optax.GradientTransformation, spec: Spec | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of a joint tree that changes LoRA leaves only; the base stays bit for bit.

    The whole of `tx` sees the LoRA leaves only: a global norm is theirs, and so is the state.

    Args:
      tx: any optax optimizer, schedules, clipping, decay and `MultiSteps` included.
      spec: the adapter's spec, where names do not tell.

    Returns:
      An optax optimizer.

    Example:
      >>> import jax.numpy as jnp, jaxlora as jl, optax
      >>> joint = {"kernel": jnp.ones(2), "kernel_lora_a": jnp.ones(2)}
      >>> tx = jl.lora_optimizer(optax.sgd(0.5))
      >>> updates, _ = tx.update(joint, tx.init(joint), joint)
      >>> optax.apply_updates(joint, updates)["kernel_lora_a"].tolist()
      [0.5, 0.5]
    """

    def labels(params: tree.Tree) -> tree.Tree:
        return jax.tree.map(lambda lora: "lora" if lora else "base", lora_mask(params, spec))

    return optax.partition({"lora": tx, "base": _keep()}, labels)


def lora_plus(
    tx: optax.GradientTransformation, ratio: float = 16.0
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that learns B with `ratio` times the learning rate of A (Hayou et al. 2024).

    The updates of B are multiplied by the ratio, decoupled weight decay included: what optimizers
    give whose updates are in proportion to the learning rate, as Adam's, AdamW's and SGD's are.

    Args:
      tx: an optax optimizer of an adapter's params, or of a joint tree inside `lora_optimizer`.
      ratio: learning rate of B over that of A; 16 is the paper's.

    Returns:
      An optax optimizer.

    Raises:
      ConfigError: a ratio that is not above 0.

    Example:
      >>> import jax.numpy as jnp, jaxlora as jl, optax
      >>> leaves = {"kernel_lora_a": jnp.ones(2), "kernel_lora_b": jnp.ones(2)}
      >>> tx = jl.lora_plus(optax.sgd(0.5), ratio=4)
      >>> updates, _ = tx.update(leaves, tx.init(leaves), leaves)
      >>> {name: float(x[0]) for name, x in updates.items()}
      {'kernel_lora_a': -0.5, 'kernel_lora_b': -2.0}
    """
    if not ratio > 0:
        raise ConfigError(f"ratio is {ratio!r}, expected a number above 0.")

    def faster(updates: Any, params: Any = None) -> Any:
        def leaf(path: Any, x: Any) -> Any:
            names = [str(getattr(entry, "key", "")) for entry in path]
            return x * ratio if any(name.endswith("_lora_b") for name in names) else x

        return jax.tree_util.tree_map_with_path(leaf, updates)

    return optax.chain(tx, optax.stateless(faster))


def _keep() -> optax.GradientTransformation:
    # x + 0.0 turns -0.0 into 0.0; x + -0.0 is x for every x.
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _lora_paths(joint_params: tree.Tree, spec: Spec | None) -> set[str]:
    there = {path for path, _ in tree.items(joint_params)}
    named = {*spec.leaf_shapes, *spec.frozen_shapes} if spec else set()
    found = there & named if spec else {path for path in there if tree.is_lora_name(path)}
    missing = sorted(named - there)
    if missing:
        raise AdapterError(
            f"The joint params lack {listing(missing)}, which the spec names. "
            "Expected `combine(params, adapter)` with that spec's adapter."
        )
    if not found:
        raise AdapterError(
            f"None of the {len(there)} leaves is a LoRA leaf, expected names such as "
            "kernel_lora_a. Expected a joint tree: `combine(params, adapter)`."
        )
    return found
