"""The stateful style: an NNX module that holds its factors as `nnx.LoRAParam` variables."""

from typing import Any

from flax import nnx

from jaxlora import tree
from jaxlora.adapter import Adapter, SavedLeaf, Spec, check_base, check_leaves
from jaxlora.errors import AdapterError, ModelError
from jaxlora.interop.nnx_branch import bind
from jaxlora.interop.nnx_discover import holders, variables
from jaxlora.interop.nnx_layers import HOOK, unhook

_SPEC = "_lora_spec"


class LoRASaved(nnx.LoRAParam):
    """A param that is trained in full, in place of the base's; it is read in the base's dtype."""

    def get_value(self, **index: Any) -> Any:
        """The value in the dtype of the base's leaf."""
        value = super().get_value(**index)  # a partition spec, in a state that holds those
        return value.astype(self.get_metadata("base_dtype")) if tree.is_array(value) else value


def module_of(model: Any) -> nnx.Module:
    """The module itself, or that of (graphdef, state).

    Raises:
      ModelError: it is neither.
    """
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nnx.GraphDef):
        return nnx.merge(*model, copy=True)  # its variables belong to the trace that we are in
    if not isinstance(model, nnx.Module):
        raise ModelError(
            f"The model is a {type(model).__name__}, expected an nnx.Module, or (graphdef, state) "
            "as `nnx.split` gives it."
        )
    return model


def params(model: Any) -> tree.Tree:
    """A module's params as a nested dict, for all that takes a params tree.

    Args:
      model: the module, or (graphdef, state).

    Returns:
      {name: …} by the paths of `nnx.state(module, nnx.Param)`, numbers as strings; arrays, or what
      stands for them in an abstract module. No leaf is copied.

    Raises:
      ModelError: it is no module, or an adapter is attached to it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxlora.interop.nnx import params
      >>> jax.tree.map(jnp.shape, params(nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
      {'bias': (3,), 'kernel': (4, 3)}
    """
    module = module_of(model)
    if hasattr(module, _SPEC):
        raise ModelError(
            f"An adapter is attached to this {type(module).__name__} already, expected a base. "
            "`detach(module)` gives base and adapter."
        )
    return tree.nested({path: x.get_raw_value() for path, x in variables(module).items()})


def attach(model: Any, adapter: Adapter, *, rngs: nnx.Rngs | None = None) -> Any:
    """A copy of a module that holds an adapter's factors as `nnx.LoRAParam` variables.

    `nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)` and
    `nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))` train them; the base is frozen, since
    its variables are of another type.

    Args:
      model: the module, or (graphdef, state). It is not changed.
      adapter: the adapter.
      rngs: for the adapter's dropout, which then runs unless `module.eval()` says otherwise. The
        keys are variables too and move on with each call.

    Returns:
      A module of the same structure.

    Raises:
      AdapterError: the adapter does not fit, or has kernels that are adapted in weight space.
      ModelError: this is no NNX module, or an adapter is attached to it already.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl, optax
      >>> from flax import nnx
      >>> from jaxlora.interop.nnx import attach, detach
      >>> base, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> adapter = jl.lora_init(jax.random.key(1), base, jl.LoraConfig(rank=2), x)
      >>> model = attach(base, adapter)
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
      >>> trained = nnx.DiffState(0, nnx.LoRAParam)
      >>> grads = nnx.grad(lambda model: model(x).sum(), argnums=trained)(model)
      >>> _ = optimizer.update(model, grads)
      >>> base, adapter = detach(model)
    """
    module = module_of(model)
    check_leaves(adapter)
    check_base(params(module), adapter.spec)
    weights = [site.path for site in adapter.spec.sites if site.weights]
    if weights:
        raise AdapterError(
            f"{weights[0]} is adapted in weight space, which a module with attached factors cannot "
            "do: the kernel would have to be made anew before each call. Use `lora_apply`."
        )
    own, values, rate = nnx.clone(module), adapter.values(), adapter.spec.config.dropout
    key = rngs.dropout() if rngs is not None and rate else None
    bind(own, adapter, key)
    saved = {leaf.path: leaf for leaf in adapter.spec.saved if not leaf.rows}
    base, trained = variables(own), {}
    for path, leaf in saved.items():
        metadata = base[path].get_metadata() | {"base_dtype": base[path].get_raw_value().dtype}
        trained[path] = LoRASaved(values[leaf.leaf_path], **metadata)
    for node, held in holders(own, saved):
        for attr, path in held.items():
            delattr(node, attr)
            setattr(node, attr, trained[path])
            setattr(node, f"{attr}_lora_base", base[path])
    for _, node in nnx.iter_graph(own):
        if key is not None and hasattr(node, HOOK) and not hasattr(node, "deterministic"):
            node.deterministic = False
    setattr(own, _SPEC, adapter.spec)
    return own


def detach(module: Any) -> tuple[Any, Adapter]:
    """Takes an attached adapter out again: the inverse of `attach`.

    Args:
      module: a module from `attach`. It is not changed.

    Returns:
      (a copy of the module without LoRA variables, the adapter as it is now).

    Raises:
      ModelError: no adapter is attached.
    """
    spec: Spec | None = getattr(module_of(module), _SPEC, None)
    if spec is None:
        raise ModelError(
            f"No adapter is attached to this {type(module).__name__}, expected a module that "
            "`attach` returned."
        )
    own, leaves = nnx.clone(module_of(module)), {}
    delattr(own, _SPEC)
    saved = {leaf.path: leaf for leaf in spec.saved if not leaf.rows}
    there = variables(own)
    for node, held in holders(own, saved):
        for attr, path in held.items():
            leaves[saved[path].leaf_path] = there[path].get_raw_value()
            base = vars(node)[f"{attr}_lora_base"]
            delattr(node, attr)
            delattr(node, f"{attr}_lora_base")
            setattr(node, attr, base)
    for _, node in list(nnx.iter_graph(own)):
        for attr, what in vars(node)[HOOK].served if HOOK in getattr(node, "__dict__", {}) else ():
            rows = isinstance(what, SavedLeaf)
            for part in ("t",) if rows else (*what.trained, *what.frozen):
                leaves[f"{what.path}_lora_{part}"] = vars(node)[
                    f"{attr}_lora_{part}"
                ].get_raw_value()
            for name in [n for n in vars(node) if n.startswith(f"{attr}_lora_")]:
                delattr(node, name)
        if HOOK in getattr(node, "__dict__", {}):
            unhook(node)
    return own, spec.adapter(leaves)
