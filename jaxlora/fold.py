"""The update of one kernel, from its leaves: what every path (branch, merge, algebra) agrees on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora import dora
from jaxlora.layout import KernelLayout

Array = jax.Array


class Term(NamedTuple):
    """One product of factors; an update is a sum of them."""

    sign: int
    a: Array
    b: Array


def terms(leaves: Mapping[str, Array]) -> list[Term]:
    """The products whose sum is the update, before scaling.

    `B A`, or `B A - B0 A0` where the factors do not start with a product of zero (PiSSA, OLoRA):
    the base stays as it is and what the factors start with is taken off. The two are computed
    alike, so a fresh adapter's update is zero bit for bit.

    Args:
      leaves: {part: leaf} of one site; frozen parts have no gradient.
    """
    frozen = {part: jax.lax.stop_gradient(x) for part, x in leaves.items() if part.endswith("0")}
    b = leaves["b"]
    if "a" not in leaves:  # A stays as it was: B A0 - B0 A0 is one product
        return [Term(1, frozen["a0"], b - frozen["b0"] if "b0" in frozen else b)]
    own = Term(1, leaves["a"], b)
    return [own, Term(-1, frozen["a0"], frozen["b0"])] if "b0" in frozen else [own]


def joined(found: list[Term], axis: int) -> tuple[Array, Array]:
    """The terms as one product of a higher rank, the signs in B.

    Args:
      found: the terms.
      axis: where the rank stands in their factors.
    """
    if len(found) == 1:
        return found[0].a, found[0].b
    a = jnp.concatenate([term.a for term in found], axis)
    return a, jnp.concatenate([term.sign * term.b for term in found], axis)


def delta(layout: KernelLayout, rank: int, leaves: Mapping[str, Array], dtype: Any) -> Array:
    """The update of a kernel leaf before scaling, in its shape."""
    return sum(term.sign * layout.delta(term.a, term.b, rank, dtype) for term in terms(leaves))  # type: ignore[return-value]


def fold(
    kernel: Array,
    leaves: Mapping[str, Array],
    scaling: float | Array,
    layout: KernelLayout,
    rank: int,
    dtype: Any,
) -> Array:
    """`W + scaling * delta`, rescaled to its magnitudes where they are trained (DoRA).

    Computed in float32 (float64 for a float64 kernel) and rounded once.

    Args:
      kernel: the leaf of the base.
      leaves: {part: leaf} of its site.
      scaling: the site's scaling, or its negative to take the update out.
      layout: the kernel's layout.
      rank: the site's rank.
      dtype: dtype of the result.
    """
    wide = jnp.promote_types(jnp.float32, kernel.dtype)
    folded = kernel.astype(wide) + scaling * delta(layout, rank, leaves, wide)
    if "m" in leaves:
        folded = dora.rescaled(layout, folded, layout.from_leaf(leaves["m"], "m", rank))
    return folded.astype(dtype)
