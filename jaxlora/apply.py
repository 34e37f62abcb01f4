"""`lora_apply`: run a Flax model with an adapter, the model's own code untouched.

For the length of one call the adapter's leaves stand in the params collection beside the kernels
that they adapt, where `nn.scan`, `nn.vmap` and `nn.remat` slice them as they slice the kernels,
and an interceptor adds the low-rank branch to the output of each layer. Neither outlives the
call: a joint tree without the interceptor would give the base's outputs in silence, and a jitted
function closed over an interceptor from outside would be cached with or without it.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora import dora, layers, tree
from jaxlora.adapter import Adapter, Site, check_base, check_leaves
from jaxlora.branch import branch, dropped, with_input_gradient, with_rows
from jaxlora.dispatch import by_model
from jaxlora.errors import AdapterError, LoraError, ModelError
from jaxlora.fold import Term, fold, joined, terms
from jaxlora.layers import Linear
from jaxlora.quantize import Quantized, unboxing_after

Array = jax.Array
BOUND = "_lora"
"""What follows a kernel's name where its factors stand during a call."""


_innermost: contextvars.ContextVar[object] = contextvars.ContextVar("innermost", default=None)
"""Which `lora_apply` of this thread is the one whose model is running."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Factors:
    """One site's leaves as they stand beside its kernel during a call.

    The site is static and so part of the tree's structure: two adapters that differ in scaling
    alone never share what `nn.jit` has cached, and a call with a token of its own shares nothing.
    """

    leaves: dict[str, Array]  # {part: leaf}
    key: Array | None  # the dropout key's data, one a slice; None without dropout
    site: Site = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})
    key_impl: str = dataclasses.field(metadata={"static": True})
    token: Any = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """The trained rows of a table as they stand beside it during a call."""

    values: Array
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@overload
def lora_apply(
    model: nn.Module, variables: Mapping[str, Any], adapter: Adapter, *args: Any, **kwargs: Any
) -> Any: ...
@overload
def lora_apply(model: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Any: ...
@by_model()
def lora_apply(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapter: Adapter,
    *args: Any,
    rngs: Any = None,
    mutable: Any = False,
    **kwargs: Any,
) -> Any:
    """`model.apply(variables, …)` with the adapter's update in each adapted layer.

    `h = W x + scaling * B A x` (Hu et al. 2021, section 4.1). Differentiate with respect to
    `adapter`: the base is a constant and has no gradient.

    Args:
      model: a Flax Linen module.
      variables: `{"params": base, …}` as for `model.apply`; the base holds no LoRA leaves.
      adapter: from `lora_init` or `load_adapter`.
      *args: the model's inputs.
      rngs: as for `model.apply`. Adapter dropout is active exactly when there is a "dropout" rng
        here; it leaves the masks of the model's own dropout unchanged.
      mutable: as for `model.apply`.
      **kwargs: `method`, `capture_intermediates` and the model's keyword arguments.

    Returns:
      What `model.apply` returns. Each layer keeps its output dtype.

    Raises:
      AdapterError: the adapter does not fit the params, or no adapted layer was run.
      ModelError: the model is not a Linen module, or variables lack "params".

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> bool((jl.lora_apply(model, variables, adapter, x) == model.apply(variables, x)).all())
      True
    """
    params = base_params(model, variables)
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"lora_apply got a {type(adapter).__name__} where the adapter belongs, expected an "
            "Adapter. A bare tree of leaves becomes one with `Adapter(leaves, spec)`."
        )
    check_leaves(adapter)
    check_base(params, adapter.spec)
    joint = {**variables, "params": _bind(params, adapter, _dropout_key(rngs))}

    mine = object()
    fired: dict[str, int] = {}  # how often each site has run: the calls draw their own masks

    def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        rule = layers.rule_for(context.orig_method)
        if rule is None or _innermost.get() is not mine:  # a call inside of this one has its own
            return next_method(*args, **kwargs)
        linear = rule(context.module, *args, **kwargs)
        kernel = context.module.get_variable("params", linear.param)
        if isinstance(kernel, Quantized) and not linear.lookup:
            args, kwargs = jax.tree.map(_constant, (args, kwargs))
            with unboxing_after(linear.x):
                y = next_method(*args, **kwargs)
            y = with_input_gradient(linear, y, kernel)
        else:
            y = next_method(*args, **kwargs)
        beside = context.module.get_variable("params", linear.param + BOUND)
        if isinstance(beside, Rows):
            return with_rows(linear, y, tree.unboxed(kernel), beside.values, beside.rows)
        if beside is None:
            return y
        fired[beside.site.path] = fired.get(beside.site.path, 0) + 1
        return adapted(beside, linear, y, context.module, fired[beside.site.path])

    expected = [site for site in adapter.spec.sites if not site.weights]
    token = _innermost.set(mine)
    try:
        with nn.intercept_methods(intercept):
            out = model.apply(joint, *args, rngs=rngs, mutable=mutable, **kwargs)
            if expected and not fired:  # unless nn.jit has answered from its cache
                joint["params"] = _bind(params, adapter, _dropout_key(rngs), token=object())
                again = functools.partial(model.apply, joint, rngs=rngs, mutable=mutable, **kwargs)
                jax.eval_shape(lambda: [again(*args)][1:])
    finally:
        _innermost.reset(token)
    if expected and not fired:
        raise AdapterError(
            f"None of the {len(expected)} adapted layers ran, expected at least one: "
            f"the first is {expected[0].path}. Does `method` run another part?"
        )
    if mutable is False:
        return out
    y, updates = out
    return y, _without_factors(updates)


def base_params(model: Any, variables: Any) -> tree.Tree:
    """`variables["params"]`, or a ModelError that says what was passed instead."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model is a {type(model).__name__}, expected a flax.linen.Module. Any other "
            "function of params is adapted in weight space: `apply_fn(merge(params, adapter), …)`."
        )
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        there = ", ".join(map(str, variables)) if isinstance(variables, Mapping) else ""
        raise ModelError(
            f"variables hold {there or type(variables).__name__!r}, expected the collection "
            "'params' as `model.init` returns it. Bare params go in as {'params': params}."
        )
    return variables["params"]


def _dropout_key(rngs: Any) -> Array | None:
    """The "dropout" rng; a bare key is not one, as for `model.apply`."""
    return rngs.get("dropout") if isinstance(rngs, Mapping) else None


def _constant(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if tree.is_array(x) else x


def adapted(factors: Factors, linear: Linear, y: Array, module: Any, calls: int) -> Array:
    """The output of a layer with its update."""
    site, drop = factors.site, None
    if factors.key is not None and not linear.lookup:
        mask_key = _mask_key(factors, factors.key, module, calls)
        drop = functools.partial(dropped, mask_key, factors.dropout)
    core = {part: _core(site, part, leaf) for part, leaf in factors.leaves.items()}
    found = list(terms(core))
    low, *start = (branch(site, linear, term.a, term.b, y.dtype, drop) for term in found)
    for other in start:
        low = low - other
    if not site.dora:
        return y + low
    kernel, bias = (
        tree.unboxed(module.get_variable("params", name)) for name in (linear.param, linear.bias)
    )
    spread = [Term(term.sign, term.a, site.layout.spread(term.b)) for term in found]
    a, b = joined(spread, len(site.layout.axes("b")))
    return dora.output(linear, site, y, low, dora.ratio(site, kernel, a, b, core["m"]), bias)


def _bind(params: tree.Tree, adapter: Adapter, key: Array | None, token: Any = None) -> tree.Tree:
    """The base with a `Factors` beside each adapted kernel and the trained leaves in place."""
    values, spec, rate = adapter.values(), adapter.spec, adapter.spec.config.dropout
    whole = {leaf.path: leaf for leaf in spec.saved if not leaf.rows}
    in_weights = {site.path: site for site in spec.sites if site.weights}

    def in_place(path: str, leaf: Any) -> Any:
        if path not in whole and path not in in_weights:
            return leaf
        base = tree.unboxed(leaf)
        if path in whole:
            value = whole[path].put(base, values[whole[path].leaf_path])
        else:
            site = in_weights[path]
            leaves = site.leaves(values)
            value = fold(base, leaves, site.scaling, site.layout, site.rank, base.dtype)
        return leaf.replace_boxed(value) if tree.is_box(leaf) else value

    def factors(site: Site) -> Factors:
        data, impl = (None, "") if key is None or not rate else key_data(site, key)
        return Factors(site.leaves(values), data, site, rate, impl, token)

    bound: dict[str, Any] = {s.path + BOUND: factors(s) for s in spec.sites if not s.weights}
    for leaf in spec.saved:
        if leaf.rows:
            bound[leaf.path + BOUND] = Rows(values[leaf.leaf_path], leaf.rows)
    return tree.union(tree.map_leaves(in_place, params), tree.nested(bound))


def key_data(site: Site, key: Array) -> tuple[Array, str]:
    """One dropout key for each slice of a stacked kernel, as a leaf that is sliced like it.

    `make_rng` inside `nn.scan` gives no key unless the user's scan splits "dropout", and drawing
    from the model's own stream would change the base's masks.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    key = jax.random.fold_in(key, tree.path_hash(site.path))
    data = jax.random.key_data(jax.random.split(key, site.layout.sizes("s")))
    return site.layout.to_leaf(data, "key", data.shape[-1]), str(jax.random.key_impl(key))


def _mask_key(factors: Factors, data: Array, module: Any, calls: int) -> Array:
    """The key of one call's mask: of the slice, the call and, in a loop, the step."""
    key = jax.random.wrap_key_data(data.ravel(), impl=factors.key_impl)
    key = jax.random.fold_in(key, calls)
    stream: Any = module.scope.rngs.get("dropout") if module.scope else None
    if stream is not None:  # inside a scan over shared weights only the stream tells steps apart
        words = jax.random.key_data(stream.as_jax_rng())
        key = jax.random.fold_in(key, words.ravel()[-1])
    return key


def _core(site: Site, part: str, leaf: Array) -> Array:
    """A factor as the branch wants it, from its slice as the module's scope holds it."""
    kind: Any = part[0]
    expected = site.layout.slice_shape(kind, site.rank)
    if leaf.shape != expected:
        raise LoraError(
            f"{site.path}_lora_{part} reaches its layer with shape {leaf.shape}, expected "
            f"{expected}: something between them reshapes params, such as nn.map_variables. "
            "`exclude` this layer."
        )
    return leaf.reshape(site.layout.core_shape(kind, site.rank))


def _without_factors(variables: Mapping[str, Any]) -> Any:
    """Mutated variables without what was bound for the call."""
    if "params" not in variables:
        return variables
    params = tree.select(lambda path: not path.endswith(BOUND), variables["params"])
    return {**variables, "params": params}
