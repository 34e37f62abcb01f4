"""Adapters on Flax NNX modules: the same configs, adapters and checkpoints as for Linen.

A module's params are a nested dict by the paths of `nnx.state`, `layers/0/linear/kernel`, and all
that works on a params tree works on it. In place of a module every function takes (graphdef, state)
too, as `nnx.split` gives it. `jaxlora.plan`, `lora_init`, `lora_apply` and `merge` come here when
they get one. `attach` gives a module that holds its factors as variables.
"""

from typing import Any

from flax import errors as flax_errors
from flax import nnx

from jaxlora import tree
from jaxlora.adapter import Adapter, check_base, check_leaves
from jaxlora.config import LoraConfig
from jaxlora.discover import Seen, trace
from jaxlora.errors import AdapterError, ModelError, listing
from jaxlora.init import init_leaves
from jaxlora.interop.nnx_attach import attach as attach
from jaxlora.interop.nnx_attach import detach as detach
from jaxlora.interop.nnx_attach import module_of
from jaxlora.interop.nnx_attach import params as params
from jaxlora.interop.nnx_branch import Calls, bind, put_in_place
from jaxlora.interop.nnx_discover import discover, variables
from jaxlora.interop.nnx_layers import Array
from jaxlora.merge import merge as merge_params
from jaxlora.plan import Plan, plan_of

Model = nnx.Module | tuple[Any, Any]
"""A module, or the pair of (graphdef, state)."""


def plan(
    model: Model, config: LoraConfig, *args: Any, method: str = "__call__", **kwargs: Any
) -> Plan:
    """Finds what a config adapts in an NNX module.

    Args:
      model: the module, or (graphdef, state); abstract ones from `nnx.eval_shape` will do.
      config: what to adapt.
      *args: example inputs of the module's call; arrays or ShapeDtypeStructs, only traced.
      method: the name of the method to call.
      **kwargs: keyword arguments of the call.

    Returns:
      The plan.

    Raises:
      TargetError: a pattern that matches nothing, or a layer that cannot be adapted.
      ModelError: this is no NNX module, or it rejects the example inputs.

    Example:
      >>> import jax.numpy as jnp, jaxlora as jl
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: nnx.Linear(256, 512, rngs=nnx.Rngs(0)))
      >>> [site.path for site in jl.plan(model, jl.LoraConfig(rank=4), jnp.ones((8, 256))).sites]
      ['kernel']
    """
    module = module_of(model)

    def see(candidates: set[str]) -> Seen:
        return discover(module, candidates, args, kwargs, method)

    planned = plan_of(params(module), config, see)
    graphdef, state = nnx.split(module)

    def rehearse(variables: Any, args: Any, kwargs: Any) -> None:
        kwargs = {name: x for name, x in kwargs.items() if name != "mutable"}
        pair = graphdef, variables["state"]
        lora_apply(pair, variables["adapter"], *args, method=method, **kwargs)

    trace(rehearse, {"state": state, "adapter": planned.spec.abstract()}, args, kwargs)
    return planned


def lora_init(
    key: Array,
    model: Model,
    config: LoraConfig,
    *args: Any,
    method: str = "__call__",
    **kwargs: Any,
) -> Adapter:
    """Makes a fresh adapter for an NNX module: as `jaxlora.lora_init`.

    Args:
      key: a PRNG key.
      model: the module, or (graphdef, state). It is read, never changed.
      config: what to adapt and how.
      *args: example inputs, only traced.
      method: the name of the method to call.
      **kwargs: keyword arguments of the call.

    Returns:
      The adapter.

    Raises:
      LoraError: as `plan`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl
      >>> from flax import nnx
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> adapter = jl.lora_init(jax.random.key(1), model, jl.LoraConfig(rank=2), x)
      >>> jax.tree.map(jnp.shape, adapter.params)
      {'kernel_lora_a': (2, 4), 'kernel_lora_b': (2, 3)}
    """
    spec = plan(model, config, *args, method=method, **kwargs).spec
    return init_leaves(key, params(model), spec)


def lora_apply(
    model: Model,
    adapter: Adapter,
    *args: Any,
    dropout_key: Array | None = None,
    method: str = "__call__",
    mutable: bool = False,
    **kwargs: Any,
) -> Any:
    """`module(…)` with the adapter's update in each adapted layer.

    The layers of a copy run; the params of the module itself are never changed. What the call does
    to its other variables (batch statistics, counts of random numbers, caches) it does to the
    module's, as a call of the module does.

    Args:
      model: the module, or (graphdef, state).
      adapter: from `lora_init` or `load_adapter`.
      *args: the module's inputs.
      dropout_key: a PRNG key for the adapter's dropout, active exactly when it is given. Layers
        that `nnx.scan` shares between its steps draw one mask for all of them.
      method: the name of the method to call.
      mutable: for a pair, give the changed state back as well; otherwise changes are dropped.
      **kwargs: keyword arguments of the call.

    Returns:
      What the module returns; for a pair with `mutable`, (that, the new state).

    Raises:
      AdapterError: the adapter does not fit the module, or no adapted layer was run.
      ModelError: this is no NNX module, or its state belongs to an outer trace and the call
        changes it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl
      >>> from flax import nnx
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> adapter = jl.lora_init(jax.random.key(1), model, jl.LoraConfig(rank=2), x)
      >>> bool((jl.lora_apply(model, adapter, x) == model(x)).all())
      True
    """
    module = module_of(model)
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"lora_apply got a {type(adapter).__name__} where the adapter belongs, expected an "
            "Adapter. A bare tree of leaves becomes one with `Adapter(leaves, spec)`."
        )
    check_leaves(adapter)
    check_base(params(module), adapter.spec)
    own, calls = nnx.clone(module), Calls()
    put_in_place(own, adapter)
    bind(own, adapter, dropout_key, calls)
    before = {path: _raw(x) for path, x in nnx.to_flat_state(nnx.state(own, nnx.Not(nnx.Param)))}
    out = getattr(own, method)(*args, **kwargs)
    expected = [site for site in adapter.spec.sites if not site.weights]
    if expected and not calls.of:
        raise AdapterError(
            f"None of the {len(expected)} adapted layers ran, expected at least one: "
            f"the first is {expected[0].path}. Does `method` run another part?"
        )
    if isinstance(model, tuple) and not mutable:
        return out
    after = nnx.to_flat_state(nnx.state(own, nnx.Not(nnx.Param)))
    changed = [(p, x) for p, x in after if before.get(p, after) is not _raw(x)]
    if changed:
        try:
            nnx.update(module, nnx.from_flat_state(changed))
        except flax_errors.TraceContextError as e:
            raise ModelError(
                "The call changes "
                f"{listing('/'.join(map(str, p)) for p, _ in changed)}, which belong to a module "
                "outside of the function that is traced. Pass `nnx.split(module)` and "
                "`mutable=True`, or make the module an argument of that function."
            ) from e
    return (out, nnx.split(module)[1]) if isinstance(model, tuple) else out


def merge(model: Model, adapter: Adapter, **options: Any) -> Any:
    """Folds an adapter into the params of an NNX module: as `jaxlora.merge`.

    Args:
      model: the module, or (graphdef, state); it is not changed.
      adapter: the adapter.
      **options: `dtype` and `donate`, as for `jaxlora.merge`.

    Returns:
      A module of the same structure, or a pair for a pair. Variables that are no params are copies.

    Raises:
      AdapterError: as `jaxlora.merge`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl
      >>> from flax import nnx
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> adapter = jl.lora_init(jax.random.key(1), model, jl.LoraConfig(rank=2), x)
      >>> jl.merge(model, adapter)(x).shape
      (2, 3)
    """
    module = module_of(model)
    merged = tree.flat(merge_params(params(module), adapter, **options))
    own = nnx.clone(module)
    for path, variable in variables(own).items():
        variable.set_raw_value(merged[path])
    return nnx.split(own) if isinstance(model, tuple) else own


def _raw(x: Any) -> Any:
    """The value of a variable; a module may hold bare arrays too."""
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x
