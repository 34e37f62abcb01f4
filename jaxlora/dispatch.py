"""Which kind of model a public function got: Linen's, or one that another module serves.

Classes are told by their names, so that asking imports neither NNX nor transformers.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from jax.tree_util import all_leaves

from jaxlora import tree
from jaxlora.config import LoraConfig

KINDS = {
    ("flax.nnx", "Module"): "jaxlora.interop.nnx",
    ("flax.nnx", "GraphDef"): "jaxlora.interop.nnx",
    ("transformers", "FlaxPreTrainedModel"): "jaxlora.interop.transformers4",
}
"""{(package, class): the module that serves its instances}."""

_ANY_TREE = "jaxlora.weight_space"


def by_model(
    at: int = 0, *, trees: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has a function of Linen models pass other models on to its namesake in their module.

    Args:
      at: which positional argument is the model. One tuple deep is looked into, since an NNX model
        may come as (graphdef, state).
      trees: the argument is a tree of params; other pytrees than nested dicts are passed on.

    Returns:
      A decorator.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def dispatched(*args: Any, **kwargs: Any) -> Any:
            module = _server(args[at:], kwargs, trees) if len(args) > at else None
            if module is None:
                return function(*args, **kwargs)
            return getattr(importlib.import_module(module), function.__name__)(*args, **kwargs)

        return dispatched

    return decorate


def _server(args: tuple[Any, ...], kwargs: Mapping[str, Any], trees: bool) -> str | None:
    """The module that serves a call with the model first in its arguments; None is Linen's own."""
    model, following = args[0], args[1] if len(args) > 1 else kwargs.get("config")
    if isinstance(model, nn.Module):
        return None
    first = model[0] if isinstance(model, tuple) and model else model
    for cls in type(first).__mro__:
        for (package, name), module in KINDS.items():
            if cls.__name__ == name and f"{cls.__module__}.".startswith(f"{package}."):
                return module
    # A bare tree of params comes with the config where a model's variables would stand.
    if isinstance(following, LoraConfig) or (trees and not _nested_dict(model)):
        return _ANY_TREE
    return None


def _nested_dict(params: Any) -> bool:
    """Whether a pytree is dicts all the way down to its arrays, as Flax's params are."""
    if not isinstance(params, Mapping):
        return False
    return all(
        _nested_dict(x) if isinstance(x, Mapping) else tree.is_box(x) or all_leaves([x])
        for x in params.values()
    )
