"""How the layers of Flax NNX multiply by their kernels, and how one is made to do more.

NNX has no interceptor. A layer of a *copy* of the module gets a subclass of its own class instead,
whose registered methods hand their result to a hook, and the factors stand beside the kernel as
variables of the layer, where `nnx.scan`, `nnx.vmap` and `nnx.remat` slice them as they slice it.
The subclass stands right before the registered class in the order of inheritance, so that a layer
of the user's that calls `super().__call__` is served too.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from jaxlora.errors import TargetError
from jaxlora.layers import Array, Linear, general_equation, register, rule_for

HOOK = "_lora"
"""The attribute of a hooked layer that holds its hook, static."""


class Hook(Protocol):
    """What runs in place of a layer's registered method."""

    def __call__(self, module: nnx.Module, linear: Linear, run: Callable[[], Array]) -> Array:
        """The output, from the use of the kernel and the method itself."""
        ...


_HOOKED: dict[tuple[type, ...], type] = {}  # one class a layer, or no program would be shared


def hooked(cls: type) -> type | None:
    """The class that a layer of class `cls` takes on to have a hook; None if no rule serves it."""
    base = next((c for c in cls.__mro__ if any(_methods(c))), None)
    if base is None:
        return None
    own = _made((base,), base.__name__, {name: _method(m) for name, m in _methods(base)})
    return own if cls is base else _made((cls, own), cls.__name__, {})


def unhooked(cls: type) -> type:
    """The class of a layer before it got its hook."""
    return next((bases[0] for bases, made in _HOOKED.items() if made is cls), cls)


def _made(bases: tuple[type, ...], name: str, methods: dict[str, Any]) -> type:
    if bases not in _HOOKED or not set(methods) <= set(vars(_HOOKED[bases])):
        _HOOKED[bases] = type(bases[0])(name, bases, methods)
    return _HOOKED[bases]


def hook(layer: nnx.Module, run: Hook) -> None:
    """Gives a layer a hook: from now on it is of the class that `hooked` says."""
    # Not through NNX, which would keep `__class__` in its list of the module's attributes.
    object.__setattr__(layer, "__class__", hooked(type(layer)))
    setattr(layer, HOOK, run)


def unhook(layer: nnx.Module) -> None:
    """Takes the hook off again."""
    delattr(layer, HOOK)
    object.__setattr__(layer, "__class__", unhooked(type(layer)))


def _methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods that the class defines itself and that a rule serves."""
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and rule_for(method) is not None:
            yield name, method


def _method(inner: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook: Hook | None = vars(self).get(HOOK)
        rule = rule_for(inner)
        if hook is None or rule is None:
            return inner(self, *args, **kwargs)
        return hook(self, rule(self, *args, **kwargs), lambda: inner(self, *args, **kwargs))

    return method


@register(nnx.Linear)
def _linear(module: nnx.Linear, inputs: Array, out_sharding: Any = None) -> Linear:
    return Linear("kernel", "...i,io->...o", jnp.asarray(inputs), precision=module.precision)


@register(nnx.LinearGeneral)
def _linear_general(module: nnx.LinearGeneral, inputs: Array, out_sharding: Any = None) -> Linear:
    features, batch = len(module.out_features), tuple(module.batch_axis)
    equation = general_equation(inputs.ndim, features, module.axis, batch)
    return Linear("kernel", equation, inputs, precision=module.precision)


@register(nnx.Einsum)
def _einsum(
    module: nnx.Einsum, inputs: Array, einsum_str: str | None = None, out_sharding: Any = None
) -> Linear:
    equation = einsum_str if module.einsum_str is None else module.einsum_str
    return Linear("kernel", equation or "", inputs, precision=module.precision)


@register(nnx.Embed)
def _embed(module: nnx.Embed, inputs: Array, out_sharding: Any = None) -> Linear:
    # A table of one row answers with it whatever the index, as nnx.Embed does.
    ids = jnp.zeros_like(inputs) if module.num_embeddings == 1 else inputs
    return Linear("embedding", "...v,vd->...d", ids, roles="io")


@register(nnx.Embed, method="attend")
def _attend(module: nnx.Embed, query: Array, out_sharding: Any = None) -> Linear:
    return Linear("embedding", "...d,vd->...v", query, roles="io")


@register(nnx.Conv)
def _conv(module: nnx.Conv, inputs: Array, out_sharding: Any = None) -> Linear:
    roles, run = "i" * (len(module.kernel_size) + 1) + "o", _with_kernel_of(nnx.Conv, module)
    return Linear("kernel", "", inputs, roles=roles, run=run, groups=module.feature_group_count)


@register(nnx.ConvTranspose)
def _conv_transpose(module: nnx.ConvTranspose, inputs: Array) -> Linear:
    roles = "i" * len(module.kernel_size) + ("oi" if module.transpose_kernel else "io")
    run = _with_kernel_of(nnx.ConvTranspose, module)
    return Linear("kernel", "", inputs, roles=roles, run=run)


def _with_kernel_of(cls: Any, module: Any) -> Callable[[Array, Array], Array]:
    """The layer as a map of input and kernel; the kernel's last axis or `o` may have any size."""

    def run(x: Array, kernel: Array) -> Array:
        if module.mask is not None:
            raise TargetError(
                f"A {cls.__name__} masks its kernel, so an update of low rank does not keep low "
                "rank. `exclude` it."
            )
        bare = object.__new__(cls)
        own = {"kernel": nnx.Param(kernel), "bias": None, "use_bias": False}
        vars(bare).update(vars(module) | own)
        return cls.__call__(bare, x)

    return run
