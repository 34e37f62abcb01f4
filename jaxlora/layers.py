"""The registry: how each kind of module multiplies by its kernel.

A rule is a function of a module and of the arguments of its call. It returns a `Linear`, and that
is all jaxlora needs to plan, initialize, run and merge the layer. Rules are found by the method
that runs, not by the class that it runs on: a subclass that inherits `__call__` or calls `super()`
is served, once, and one that replaces the arithmetic is reported as unreachable.
"""

import dataclasses
import inspect
import string
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.errors import LoraError, TargetError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Linear:
    """One use of a kernel: `y = einsum(equation, x, kernel) + bias`.

    Attributes:
      param: the kernel's name in the module's scope.
      equation: an einsum of input and kernel. Letters are axes; the input and the output may begin
        with `...`. An input of integers indexes the kernel's contracted axis: `"...v,vd->...d"`
        with x of shape (...) is an embedding lookup.
      x: the input.
      run: for a map that is no einsum, as a convolution: the map of (x, kernel) itself, for kernels
        with any number of outputs. `roles` must be given then, and `equation` is not used.
      bias: the name of the bias in the module's scope, if there is one.
      groups: how often `run` repeats its outputs, once for each group of the input's channels.
      roles: the role of each of the kernel's axes (see `KernelLayout`), where the equation does
        not tell: a table that is looked up one way and attended to the other keeps one.
      precision: as for `jax.lax.dot_general`.
    """

    param: str
    equation: str
    x: Array
    roles: str = ""
    precision: Any = None
    run: Callable[[Array, Array], Array] | None = None
    groups: int = 1
    bias: str = "bias"

    @property
    def lookup(self) -> bool:
        """Whether the input indexes the kernel."""
        return jnp.issubdtype(self.x.dtype, jnp.integer)

    def letters(self) -> tuple[str, str, str]:
        """The letters of input, kernel and output, with the ellipsis spelled out.

        The input of a lookup has no letter for the axis that it indexes.
        """
        x, kernel, out = self._split()
        if self.lookup:
            x = "".join(c for c in x if c not in kernel or c in out)
        free = [c for c in string.ascii_letters if c not in x + kernel + out]
        batch = "".join(free[: self.x.ndim - len(x.replace("...", ""))])
        return x.replace("...", batch), kernel, out.replace("...", batch)

    def kernel_roles(self) -> str:
        """`roles`, or what the equation says of the kernel's axes."""
        if self.roles:
            return self.roles
        x, kernel, out = self._split()
        of = {(True, False): "i", (False, False): "i", (True, True): "b", (False, True): "o"}
        return "".join(of[c in x, c in out] for c in kernel)

    def _split(self) -> tuple[str, str, str]:
        operands, arrow, out = self.equation.replace(" ", "").partition("->")
        x, comma, kernel = operands.partition(",")
        if not (arrow and comma) or "." in kernel or "," in kernel:
            raise LoraError(
                f"Equation {self.equation!r} of {self.param} cannot be adapted, expected the form "
                "'...i,io->...o': one input, one kernel without '...', and an explicit output."
            )
        return x, kernel, out


Rule = Callable[..., Linear]

_RULES: dict[Callable, Rule] = {}


def register(module_type: type, method: str = "__call__") -> Callable[[Rule], Rule]:
    """Registers how a module's method multiplies by its kernel.

    Args:
      module_type: the class of the module, Linen's or NNX's.
      method: the name of the method. The class must define it itself.

    Returns:
      A decorator for the rule: a function `(module, *args, **kwargs) -> Linear`, with the
      arguments of the method. The method must return `einsum(equation, x, kernel)`, plus a bias.

    Raises:
      LoraError: the class does not define the method.

    Example:
      A layer that stores its kernel as (out, in):

      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> class Transposed(nn.Module):
      ...     features: int
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         shape = (self.features, x.shape[-1])
      ...         return x @ self.param("weight", nn.initializers.lecun_normal(), shape).T
      >>> @jl.register(Transposed)
      ... def transposed(module, x):
      ...     return jl.Linear("weight", "...i,oi->...o", x)
      >>> model, x = Transposed(3), jnp.ones((2, 5))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> adapter.spec.sites[0].layout.roles
      'oi'
    """
    if method not in vars(module_type):
        raise LoraError(
            f"{module_type.__name__} defines no method {method!r}, so no rule can be registered "
            "for it. Name the class that defines the method."
        )

    def decorate(rule: Rule) -> Rule:
        _RULES[inspect.unwrap(vars(module_type)[method])] = rule
        return rule

    return decorate


def rule_for(method: Callable) -> Rule | None:
    """The rule of a method that an interceptor sees as `context.orig_method`, or None."""
    return _RULES.get(inspect.unwrap(getattr(method, "func", method)))


def registered_types() -> list[str]:
    """The names of the registered classes, for messages."""
    return sorted({method.__qualname__.split(".")[-2].lstrip("_") for method in _RULES})


@register(nn.Dense)
def _dense(module: nn.Dense, inputs: Array) -> Linear:
    return Linear("kernel", "...i,io->...o", jnp.asarray(inputs), precision=module.precision)


@register(nn.DenseGeneral)
def _dense_general(module: nn.DenseGeneral, inputs: Array) -> Linear:
    features, axis, batch = map(_as_tuple, (module.features, module.axis, module.batch_dims))
    equation = general_equation(inputs.ndim, len(features), axis, batch)
    return Linear("kernel", equation, inputs, precision=module.precision)


def general_equation(
    ndim: int, features: int, axis: Iterable[int], batch: Iterable[int] = ()
) -> str:
    """The equation of a linear map of any axes, as DenseGeneral makes it.

    Args:
      ndim: the input's number of axes.
      features: the number of the kernel's output axes.
      axis: the axes of the input that are contracted.
      batch: the axes of the input that the kernel has too.
    """
    x = list(string.ascii_lowercase[:ndim])
    contracted = [x[i] for i in sorted(a % ndim for a in axis)]
    batched = [x[i] for i in sorted(a % ndim for a in batch)]
    out = list(string.ascii_uppercase[:features])
    free = [c for c in x if c not in contracted and c not in batched]
    kernel = batched + contracted + out
    return f"{''.join(x)},{''.join(kernel)}->{''.join(batched + free + out)}"


@register(nn.Einsum)
def _einsum(module: nn.Einsum, inputs: Array, einsum_str: str | None = None) -> Linear:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    return Linear("kernel", equation, inputs, precision=module.precision)


@register(nn.Embed)
def _embed(module: nn.Embed, inputs: Array) -> Linear:
    # A table of one row answers with it whatever the index, as nn.Embed does.
    ids = jnp.zeros_like(inputs) if module.num_embeddings == 1 else inputs
    return Linear("embedding", "...v,vd->...d", ids, roles="io")


@register(nn.Embed, method="attend")
def _attend(module: nn.Embed, query: Array) -> Linear:
    return Linear("embedding", "...d,vd->...v", query, roles="io")


@register(nn.Conv.__base__)  # type: ignore[arg-type]  Conv and ConvLocal share their __call__
def _conv(module: nn.Conv, inputs: Array) -> Linear:
    axes = len(_as_tuple(module.kernel_size)) + 1
    groups, run = module.feature_group_count, _with_kernel_of(module)
    return Linear("kernel", "", inputs, roles="i" * axes + "o", run=run, groups=groups)


@register(nn.ConvTranspose)
def _conv_transpose(module: nn.ConvTranspose, inputs: Array) -> Linear:
    spatial = "i" * len(_as_tuple(module.kernel_size))
    roles = spatial + ("oi" if module.transpose_kernel else "io")
    return Linear("kernel", "", inputs, roles=roles, run=_with_kernel_of(module))


def _with_kernel_of(module: Any) -> Callable[[Array, Array], Array]:
    """The module as a map of input and kernel; the kernel's last axis or `o` may have any size."""

    def run(x: Array, kernel: Array) -> Array:
        if module.mask is not None:
            raise TargetError(
                f"{'/'.join(module.path)} masks its kernel, so an update of low rank does not keep "
                "low rank. `exclude` it."
            )
        features = (
            kernel.shape[-2] if getattr(module, "transpose_kernel", False) else kernel.shape[-1]
        )
        bare = module.clone(features=features, use_bias=False, parent=None, name=None)
        return bare.apply({"params": {"kernel": kernel}}, x)

    return run


def _as_tuple(x: Any) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, Iterable) else (x,)
