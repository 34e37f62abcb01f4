"""How an adapter and its optimizer lie on a mesh: as the kernels they belong to.

A factor shares axes with its kernel, and lies along them as the kernel does; the rank is on every
device. So the branch needs no more of the base than the layer itself: no kernel is gathered for it.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen import spmd
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlora import tree
from jaxlora.adapter import Adapter, Spec
from jaxlora.errors import ShardingError, listing, nearest
from jaxlora.plan import Plan
from jaxlora.train import TrainState

_rows = jax.make_user_context()  # a part of the key of every cache of jit


def adapter_shardings(
    plan_or_spec: Plan | Spec,
    params_or_specs: tree.Tree,
    mesh: Mesh | AbstractMesh,
    *,
    rules: Any = None,
) -> Adapter:
    """Gives each LoRA leaf the sharding of the base's leaf that it belongs to, axis by axis.

    The rank is not sharded, and neither is an axis that is shorter in the factor and that the
    devices do not divide (a block of a fused kernel, some rows of a table).

    Args:
      plan_or_spec: a plan, or the spec of an adapter or a plan.
      params_or_specs: the base's params: arrays that lie on the mesh, `nn.Partitioned` boxes
        (arrays or abstract), or a tree of `PartitionSpec` or `NamedSharding`. What has no
        sharding is on every device.
      mesh: the mesh.
      rules: for boxes with logical names, the pairs (logical name, mesh axis) of
        `nn.logical_to_mesh`; names that no rule has are not sharded. Default: Flax's own rules,
        if some are in force; else the names are those of the mesh.

    Returns:
      An adapter with a `NamedSharding` for each leaf: `out_shardings` for a jitted `lora_init`,
      and what `jax.device_put` takes.

    Raises:
      ShardingError: the base lacks a leaf that is adapted, or a name is no axis of the mesh.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> from jax.sharding import PartitionSpec as P
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> spec = jl.plan(model, variables, jl.LoraConfig(rank=2), x).spec
      >>> mesh = jax.make_mesh((1,), ("tensor",))
      >>> found = jl.adapter_shardings(spec, {"kernel": P(None, "tensor"), "bias": P()}, mesh)
      >>> found.params["kernel_lora_a"].spec, found.params["kernel_lora_b"].spec
      (P(None, None), P(None, 'tensor'))
    """
    spec = plan_or_spec.spec if isinstance(plan_or_spec, Plan) else plan_or_spec
    base = tree.flat(params_or_specs)
    missing = [path for path in spec.base_shapes if path not in base]
    if missing:
        raise ShardingError(
            f"There is no sharding of {missing[0]}, which the adapter adapts. Nearest: "
            f"{listing(nearest(missing[0], base)) or 'there are none'}."
        )
    sites = {site.path: site for site in spec.sites}
    shardings = {}
    for path, shape in (spec.leaf_shapes | spec.frozen_shapes).items():
        adapted, _, part = path.rpartition("_lora_")
        names = _axis_names(adapted, base[adapted], len(spec.base_shapes[adapted]), mesh, rules)
        if part not in "wt":
            axes = sites[adapted].layout.leaf_axes(part[0])  # type: ignore[arg-type]
            names = [None if axis is None else names[axis] for axis in axes]
        even = [
            name if size % _devices(mesh, name) == 0 else None
            for name, size in zip(names, shape, strict=True)
        ]
        shardings[path] = NamedSharding(mesh, PartitionSpec(*even))
    return spec.adapter(shardings)


def optimizer_shardings(tx: optax.GradientTransformation, shardings: Adapter) -> Any:
    """Gives the optimizer's state of each LoRA leaf the leaf's own sharding.

    Args:
      tx: an optax optimizer; what it holds beside the leaves (a count) is on every device.
      shardings: those of the adapter.

    Returns:
      A tree as `tx.init` gives, with a sharding for each array.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> spec = jl.plan(model, variables, jl.LoraConfig(rank=2), x).spec
      >>> mesh = jax.make_mesh((1,), ("tensor",))
      >>> found = jl.adapter_shardings(spec, {"kernel": P(None, "tensor")}, mesh)
      >>> jl.optimizer_shardings(optax.sgd(0.1, momentum=0.9), found)[0].trace["kernel_lora_b"].spec
      P(None, 'tensor')
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    state = jax.eval_shape(tx.init, shardings.spec.abstract().params)  # type: ignore[arg-type]
    return optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings.params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def state_shardings(tx: optax.GradientTransformation, shardings: Adapter) -> TrainState:
    """Gives the shardings of a `TrainState`: adapter, optimizer, and step and key everywhere.

    Args:
      tx: the optimizer.
      shardings: those of the adapter.

    Returns:
      A state of shardings, for `jax.device_put` and `make_train_step(…, shardings=…)`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> spec = jl.plan(model, variables, jl.LoraConfig(rank=2), x).spec
      >>> mesh = jax.make_mesh((1,), ("tensor",))
      >>> found = jl.adapter_shardings(spec, {"kernel": P(None, "tensor")}, mesh)
      >>> jl.state_shardings(optax.adam(1e-3), found).step.spec
      P()
    """
    whole: Any = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    return TrainState(whole, shardings, optimizer_shardings(tx, shardings), whole)


@contextlib.contextmanager
def rows_over(mesh: Mesh, axes: str | tuple[str, ...]) -> Iterator[None]:
    """Keeps a batch's rows on their devices through all layers of a Linen model.

    Without it XLA may move activations between devices instead of what is smaller: with kernels
    sharded as for FSDP it sums whole activations. Enter it inside the function that is jitted, or
    around its call (what is traced without it is not used then, nor the other way round), for
    models each of whose modules has the rows on the first axis of its input and its output.

    Args:
      mesh: the mesh, with axes of type Auto.
      axes: those that the rows are sharded over.

    Raises:
      ShardingError: the mesh has no such axis.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> @jax.jit
      ... def run(variables, x):
      ...     with jl.rows_over(mesh, "data"):
      ...         return model.apply(variables, x)
      >>> run(variables, x).shape
      (2, 3)
    """
    unknown = {*(axes if isinstance(axes, tuple) else (axes,))} - {*mesh.axis_names}
    if unknown:
        raise ShardingError(
            f"The rows are to lie over {listing(sorted(unknown))}, expected axes of the mesh: "
            f"{listing(mesh.axis_names)}."
        )

    def stay(x: Any) -> Any:
        floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        if not floating or x.ndim < 2 or x.shape[0] % _devices(mesh, axes):
            return x
        rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes, *rest)))

    def call(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return run(*args, **kwargs)
        y = run(*map(stay, args), **kwargs)
        return stay(y)

    with _rows((mesh, axes)), nn.intercept_methods(call):
        yield


def _axis_names(
    path: str, leaf: Any, ndim: int, mesh: Mesh | AbstractMesh, rules: Any
) -> list[Any]:
    """The mesh's axes along each axis of a leaf of the base."""
    if tree.is_box(leaf):
        leaf = nn.get_partition_spec(leaf)
        rules = rules or nn.get_logical_axis_rules()
        if rules:
            leaf = spmd.logical_to_mesh(leaf, rules)
    elif tree.is_array(leaf):
        leaf = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.sharding.Sharding):
        leaf = getattr(leaf, "spec", None)
    names = [name if isinstance(name, str | tuple) else None for name in leaf or ()]
    for name in names:
        unknown = {*(name if isinstance(name, tuple) else (name,))} - {None, *mesh.axis_names}
        if unknown:
            raise ShardingError(
                f"{path} is sharded over {listing(sorted(map(str, unknown)))}, expected axes of "
                f"the mesh: {listing(mesh.axis_names)}. Pass `rules` for logical names."
            )
    return [*names, *[None] * (ndim - len(names))]


def _devices(mesh: Mesh | AbstractMesh, name: Any) -> int:
    """The number of devices along an axis of the mesh, along several, or along none."""
    names = name if isinstance(name, tuple) else () if name is None else (name,)
    return math.prod(mesh.shape[n] for n in names)
