"""Discovery: how a model uses each of its kernels, found by tracing it once.

Every leaf that may be adapted travels in a box that `nn.scan`, `nn.vmap` and their kin tell which
axis they take away, as they tell `nn.Partitioned`, and the registry's rules say how each layer uses
its kernel. Nothing is guessed from ranks or sizes: a kernel of three axes may be a stack of Dense
or one DenseGeneral, and 8 layers of an 8-wide kernel look the same from either side.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxlora import layers, tree
from jaxlora.errors import LoraError, ModelError, TargetError

_WAYS_OUT = '`exclude` it, or train it in weight space: `mode="weights"`.'


@dataclasses.dataclass(frozen=True)
class Use:
    """What a trace tells of one kernel: see `KernelLayout` and `Site` for the fields."""

    kind: str
    roles: str
    stack: tuple[int, ...]
    lookup: bool
    weights: bool = False


@dataclasses.dataclass
class Seen:
    """What a trace tells of a model.

    Attributes:
      uses: {path: use} of the kernels that a registered rule uses.
      holders: {path: class} of the innermost module that held a leaf.
      ndims: {path: number of axes} of the leaf as that module sees it.
      stacks: {path: signed axes} that lifted transforms took away from the leaf.
      changed: paths of kernels that are computed with on their way to a layer that uses them.
      failed_in: class and path of the innermost module that failed.
    """

    uses: dict[str, Use] = dataclasses.field(default_factory=dict)
    holders: dict[str, type] = dataclasses.field(default_factory=dict)
    ndims: dict[str, int] = dataclasses.field(default_factory=dict)
    stacks: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    changed: set[str] = dataclasses.field(default_factory=set)
    failed_in: tuple[type[nn.Module], str] | None = None


def discover(
    model: nn.Module,
    variables: Any,
    candidates: set[str],
    args: Any,
    kwargs: Any,
    *,
    in_weights: bool = False,
) -> Seen:
    """Traces `model.apply` and records how the candidates are used; no array is allocated.

    Args:
      model: a Flax Linen module.
      variables: its variables, abstract or not.
      candidates: paths of the params that may be adapted.
      args: example inputs, abstract or not.
      kwargs: keyword arguments for `model.apply`.
      in_weights: where the model does not run with boxed leaves, leave those of the failing module
        as they are, and record them as changed.

    Returns:
      What was seen.

    Raises:
      ModelError: the model rejects the inputs.
      TargetError: a candidate is used in two ways, or the model does not run with its leaf boxed.
    """
    shapes = {path: tree.aval(leaf).shape for path, leaf in tree.items(variables["params"])}
    plain: dict[str, type[nn.Module]] = {}
    while True:
        seen, boxed = Seen(), candidates - set(plain)
        try:
            _trace_boxed(seen, model, variables, boxed, args, kwargs)
            break
        except LoraError:
            raise
        except Exception as e:
            _reject_inputs(model, variables, args, kwargs)
            kind, where = seen.failed_in or (type(model), "")
            if not in_weights or not boxed:
                raise TargetError(
                    f"{kind.__name__} at {where or 'the root'} reads params in a way that the "
                    "layers below it cannot be adapted under "
                    f"({type(e).__name__}: {_first_line(e)}). Expected a layer that uses its "
                    f"params as they are. {_WAYS_OUT}"
                ) from e
            inside = {p for p in boxed if p.startswith(f"{where}/") or not where}
            plain |= dict.fromkeys(inside or boxed, kind)
    for path, kind in plain.items():
        seen.holders[path], seen.ndims[path], seen.stacks[path] = kind, len(shapes[path]), ()
        seen.changed.add(path)
    return seen


def _trace_boxed(
    seen: Seen, model: nn.Module, variables: Any, candidates: set[str], args: Any, kwargs: Any
) -> None:
    """Traces the model with each candidate in a box, and fills `seen`."""
    token = _Token(seen.changed)

    def probed(path: str, leaf: Any) -> Any:
        leaf = tree.unboxed(leaf)
        sentinel = jnp.zeros(leaf.shape, jnp.int8)
        return _Probe(leaf, sentinel, path, token) if path in candidates else leaf

    def record(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        try:
            y = next_method(*args, **kwargs)
        except Exception:
            seen.failed_in = seen.failed_in or (type(module), "/".join(map(str, module.path)))
            raise
        _record(seen, context, args, kwargs)
        return y

    def run(variables: Any, args: Any, kwargs: Any) -> None:
        params = tree.map_leaves(probed, variables["params"])
        with nn.intercept_methods(record):
            model.apply({**variables, "params": params}, *args, **kwargs)

    trace(run, variables, args, kwargs)


def trace(run: Callable[..., Any], variables: Any, args: Any, kwargs: Any) -> None:
    """`jax.eval_shape` of `run(variables, args, kwargs)`.

    Arrays are abstract, everything else (flags, names) is as it is. All collections but params are
    mutable unless `kwargs` say otherwise, so that models which update statistics run.
    """
    kwargs = {"mutable": nn.DenyList("params"), **kwargs}
    leaves, treedef = jax.tree.flatten((dict(variables), args, kwargs))
    arrays = tree.abstract([x for x in leaves if tree.is_array(x)])

    def call(arrays: list[Any]) -> None:
        left = iter(arrays)
        filled = [next(left) if tree.is_array(x) else x for x in leaves]
        run(*jax.tree.unflatten(treedef, filled))

    jax.eval_shape(call, arrays)


class _Token:
    """One trace: its probes share nothing that nn.jit has cached, and tell it of reads."""

    def __init__(self, changed: set[str]):
        self.changed = changed


@jax.tree_util.register_pytree_node_class
class _Probe(meta.AxisMetadata):
    """A leaf on its way to its layer, with the axes that were taken away from it.

    The sentinel has the leaf's shape and an integer dtype: arithmetic on the way, as weight
    normalization does, turns it into floats.
    """

    def __init__(
        self, value: Any, sentinel: Any, path: str, token: _Token, taken: tuple[int, ...] = ()
    ):
        self.value, self.sentinel, self.path, self.token = value, sentinel, path, token
        self.taken = taken

    def unbox(self) -> Any:
        return self.value

    @property
    def T(self) -> Any:
        """A table that a model transposes to attend to it, past the layer that holds it."""
        self.token.changed.add(self.path)
        return self.value.T

    def replace_boxed(self, val: Any) -> "_Probe":
        return _Probe(val, self.sentinel, self.path, self.token, self.taken)

    def add_axis(self, index: int, params: Any) -> "_Probe":
        return _Probe(self.value, self.sentinel, self.path, self.token, self.taken[:-1])

    def remove_axis(self, index: int, params: Any) -> "_Probe":
        taken = (*self.taken, index)
        return _Probe(self.value, self.sentinel, self.path, self.token, taken)

    def tree_flatten(self) -> Any:
        return (self.value, self.sentinel), (self.path, self.token, self.taken)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "_Probe":
        return cls(*children, *static)


def _record(seen: Seen, context: Any, args: Any, kwargs: Any) -> None:
    module = context.module
    held = module.variables.get("params", {})
    for leaf in held.values():
        if isinstance(leaf, _Probe):
            seen.holders[leaf.path] = type(module)
            seen.ndims[leaf.path] = len(leaf.value.shape)
            seen.stacks[leaf.path] = leaf.taken
    rule = layers.rule_for(context.orig_method)
    linear = rule(module, *args, **kwargs) if rule else None
    leaf = held.get(linear.param) if linear else None
    if linear is None or not isinstance(leaf, _Probe):
        return
    roles = linear.kernel_roles()
    if leaf.sentinel.dtype != jnp.int8 or len(roles) != len(leaf.value.shape):
        seen.changed.add(leaf.path)
        return
    use = Use(type(module).__name__, roles, leaf.taken, linear.lookup)
    first = seen.uses.setdefault(leaf.path, use)
    if (first.roles, first.stack) != (use.roles, use.stack):
        raise TargetError(
            f"{leaf.path} is used in two ways, with axes {first.roles} and {use.roles}, expected "
            "one. `exclude` it, or register a rule that gives its `roles`."
        )
    if use.lookup:
        seen.uses[leaf.path] = use


def _reject_inputs(model: nn.Module, variables: Any, args: Any, kwargs: Any) -> None:
    """Raises ModelError if the model fails without boxes as well."""
    try:
        trace(lambda v, a, k: model.apply(v, *a, **k), variables, args, kwargs)
    except Exception as e:
        raise ModelError(
            f"The model rejects the example inputs: {type(e).__name__}: {_first_line(e)} "
            "Expected inputs that `model.apply(variables, *args, **kwargs)` takes."
        ) from e


def _first_line(e: Exception) -> str:
    return str(e).strip().split("\n")[0]
