"""`first_bad`: which module's output is the first that is not finite.

The function runs once more, forward only, with each call of a Linen module inside of it watched
from within the compiled program, so that loops, remat and jit stay as they are. It is traced anew
for that: what the training step has cached knows of no watching, and the other way round.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import tree
from jaxlora.apply import BOUND, Factors, Rows
from jaxlora.errors import listing

_watching = jax.make_user_context()  # a part of the key of every cache of jit


@dataclasses.dataclass(frozen=True)
class Bad:
    """An output that is not finite, the first one.

    Attributes:
      path: the module, as the params name it, with the method if it is not `__call__`; or the name
        of the function.
      module: whether it is a module; else every module's output is finite, the function's is not.
      call: which call of the same line of the model it is, from 1: the layer inside of `nn.scan`.
      calls: of how many.
      leaves: the module's own params that are not finite, or the function's arguments.
      inputs: whether its inputs were finite, so that it went bad right there.
      watched: how many outputs of modules were looked at.
    """

    path: str
    module: bool
    call: int
    calls: int
    leaves: tuple[str, ...]
    inputs: bool
    watched: int

    def __str__(self) -> str:
        """As a part of a sentence."""
        at = f", call {self.call} of {self.calls}" if self.calls > 1 else ""
        if not self.module:
            at += f", after {self.watched} outputs of modules that are finite"
        if self.leaves:
            why = f"not finite there: {listing(self.leaves)}"
        else:
            why = f"its inputs are {'' if self.inputs else 'not '}finite"
        return f"the output of {self.path}{at} ({why})"


def first_bad(fn: Callable[..., Any], *args: Any) -> Bad | None:
    """Run a function and name the Linen module in it whose output first was not finite.

    Of several it is the first whose inputs were finite, the innermost one.

    Args:
      fn: any function of arrays that runs Linen modules, such as a loss.
      *args: its arguments.

    Returns:
      What went bad first; None if all outputs of modules and the function's own are finite.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Sequential([nn.Dense(4), nn.Dense(3)]), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> kernel = variables["params"]["layers_1"]["kernel"]
      >>> variables["params"]["layers_1"]["kernel"] = kernel.at[0, 0].set(jnp.inf)
      >>> print(first_bad(model.apply, variables, x))
      the output of layers_1 (not finite there: kernel)
    """
    names: dict[int, tuple[str, tuple[str, ...]]] = {}
    seen: dict[int, list[np.ndarray]] = {}
    number = itertools.count()

    def report(name: str, out: Any, inputs: Any, leaves: Mapping[str, Any]) -> None:
        n = next(number)  # a module inside of another one has the lower number
        names[n] = name, tuple(leaves)
        flags = jnp.stack([_finite(out), _finite(inputs), *map(_finite, leaves.values())])
        jax.debug.callback(lambda x: seen.setdefault(n, []).append(np.asarray(x)), flags)

    def watch(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        module, method = context.module, context.method_name
        if any(map(_floating, jax.tree.leaves(out))):
            name = "/".join(module.path) or type(module).__name__
            name = name if method == "__call__" else f"{name}.{method}"
            report(name, out, (args, kwargs), _own(module))
        return out

    def run(*args: Any) -> None:
        with nn.intercept_methods(watch):
            out = fn(*args)
        arguments = inspect.signature(fn).bind(*args).arguments
        leaves, _ = jax.tree_util.tree_flatten_with_path(arguments)
        named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
        report(getattr(fn, "__name__", "the function"), out, arguments, named)

    with _watching(object()):  # no other call's, so that nothing is answered from a cache
        jax.block_until_ready(jax.jit(run)(*args))
        jax.effects_barrier()
    last = max(names)
    found = [
        (n == last, not flags[1], n, call)
        for n, calls in seen.items()
        for call, flags in enumerate(calls, 1)
        if not flags[0]
    ]
    if not found:
        return None
    _, _, n, call = min(found)
    (path, leaves), (_, inputs, *whole) = names[n], seen[n][call - 1]
    wrong = tuple(name for name, good in zip(leaves, whole, strict=True) if not good)
    watched = sum(map(len, seen.values())) - 1
    return Bad(path, n != last, call, len(seen[n]), wrong, bool(inputs), watched)


def _own(module: nn.Module) -> dict[str, Any]:
    """The params of a module itself, and the factors beside them."""
    own: dict[str, Any] = {}
    for name, value in module.variables.get("params", {}).items():
        if isinstance(value, Factors | Rows):
            parts = value.leaves if isinstance(value, Factors) else {"t": value.values}
            own |= {f"{name.removesuffix(BOUND)}_lora_{part}": x for part, x in parts.items()}
        elif not isinstance(value, Mapping):
            own[name] = value
    return own


def _floating(x: Any) -> bool:
    return tree.is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _finite(values: Any) -> jax.Array:
    """Whether all floating numbers in a tree are finite."""
    every = [jnp.isfinite(x).all() for x in jax.tree.leaves(values) if _floating(x)]
    return jnp.stack(every).all() if every else jnp.array(True)
