"""DoRA: the direction of a kernel is adapted by BA, its magnitude by a vector (Liu et al. 2024).

    W' = m * (W + scaling * B A) / n,   n = norm(W + scaling * B A) over the contracted axes,

with n a constant in the gradient (section 4.3), and m = norm(W) at the start.
"""

import string

import jax
import jax.numpy as jnp

from jaxlora.adapter import Site
from jaxlora.errors import TargetError
from jaxlora.layers import Linear
from jaxlora.layout import KernelLayout

Array = jax.Array


def ratio(site: Site, kernel: Array, a: Array, b: Array, m: Array) -> Array:
    """`m / n`, without ever forming `W + scaling * B A`.

    `n^2 = |W|^2 + 2 scaling <W, BA> + scaling^2 |BA|^2`, and the last two need products with the
    rank only: A W^T and A A^T.

    Args:
      site: what is adapted.
      kernel: W as its module sees it.
      a: (*batch, rank, *contracted).
      b: (*batch, rank, *outputs).
      m: (*batch, *outputs).

    Returns:
      (*batch, *outputs), float32 or wider.
    """
    wide = jnp.promote_types(jnp.float32, kernel.dtype)
    kernel, a, b, m = (x.astype(wide) for x in (kernel, a, b, m))
    letters = string.ascii_lowercase[: kernel.ndim]
    batch, inner, outer = (site.layout.letters(role, letters) for role in "bio")

    def product(equation: str, *operands: Array) -> Array:
        return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

    to = f"{batch}{outer}"
    across = product(f"{letters},{batch}R{inner}->{batch}R{outer}", kernel, a)
    gram = product(f"{batch}R{inner},{batch}S{inner}->{batch}RS", a, a)
    cross = product(f"{batch}R{outer},{batch}R{outer}->{to}", across, b)
    own = product(f"{batch}R{outer},{batch}RS,{batch}S{outer}->{to}", b, gram, b)
    frozen = product(f"{letters},{letters}->{to}", kernel, kernel)
    norm = jnp.sqrt(frozen + 2 * site.scaling * cross + site.scaling**2 * own)
    return m / jax.lax.stop_gradient(norm)


def output(
    linear: Linear, site: Site, y: Array, low: Array, by: Array, bias: Array | None
) -> Array:
    """The layer's output: `bias + (m / n) (W x + scaling B A x)`.

    Args:
      linear: the use.
      site: what is adapted.
      y: the base's output, `W x + bias`.
      low: the branch, `scaling B A x`.
      by: m / n, (*batch, *outputs).
      bias: the layer's bias or None.

    Returns:
      An array of y's shape and dtype.

    Raises:
      TargetError: the kernel is used from its outputs, as the `attend` of a tied embedding does.
    """
    if linear.run is None:
        _, kernel, out = linear.letters()
        letters = "".join(site.layout.letters(role, kernel) for role in "bo")
        if not set(letters) <= set(out):
            raise TargetError(
                f"{site.path} is used from its outputs, as a tied embedding's `attend` does, where "
                "DoRA's magnitudes do not factor out. `exclude` it, or use dora=False."
            )
        by = _placed(by, letters, out)
        if bias is not None:
            bias = _placed(bias, "".join(c for c in out if c in letters), out)
    by = by.astype(y.dtype)
    fixed = jnp.zeros((), y.dtype) if bias is None else bias.astype(y.dtype)
    return y + (by - 1) * (y - fixed) + by * low


def norm(layout: KernelLayout, kernel: Array) -> Array:
    """The norm of a kernel leaf over its contracted axes: (*stack, *batch, *outputs)."""
    order = [axis for role in "sbo" for axis in layout.axes(role)]
    x = jnp.transpose(kernel, [*order, *layout.axes("i")]).reshape(
        *(layout.shape[axis] for axis in order), -1
    )
    return jnp.sqrt(jnp.sum(x.astype(jnp.promote_types(jnp.float32, x.dtype)) ** 2, -1))


def rescaled(layout: KernelLayout, kernel: Array, m: Array) -> Array:
    """The kernel leaf with norm m, (*stack, *batch, *outputs), over its contracted axes.

    The norm that it had is a constant in the gradient.
    """
    by = m / jax.lax.stop_gradient(norm(layout, kernel))
    order = [axis for role in "sbo" for axis in layout.axes(role)]
    by = jnp.transpose(by, [order.index(axis) for axis in sorted(order)])
    return kernel * jnp.expand_dims(by, layout.axes("i"))


def _placed(x: Array, letters: str, out: str) -> Array:
    """An array with axes `letters` as one that broadcasts to `out`."""
    order = [c for c in out if c in letters]
    x = jnp.transpose(x, [letters.index(c) for c in order])
    return jnp.expand_dims(x, [i for i, c in enumerate(out) if c not in letters])
