"""loralib's convolutions: the same updates, factored in another way.

Of a kernel of `k` times `k` loralib has `A (r k, in k)` and `B (out k / groups, r k)`, whose
product is read as `(out, in / groups, k, k)` in order of memory. Here and in PEFT A is a
convolution of its own, `(rank, in / groups, k, k)`, and `B (out, rank, 1, 1)`: the update of an
output is a combination of `rank` kernels.

So with `groups=1` one of ours is one of theirs of the same r, whose B is a block of zeros but where
the two rows of the kernel agree. One of theirs is in general one of ours of rank `r k k`, A once
for each pair of rows, or of rank `out`, the update itself.
"""

from typing import NamedTuple

import numpy as np

from jaxlora.adapter import Site
from jaxlora.errors import AdapterError
from jaxlora.interop.factors import Parts, misfit


class Factors(NamedTuple):
    """A convolution's factors in PEFT's form, their rank, and loralib's r."""

    parts: dict[str, np.ndarray]
    rank: int
    r: int


def why_not(site: Site) -> str | None:
    """Why loralib has no convolution like a site, or None."""
    *window, _ = site.layout.sizes("i")
    if set(window) == {1} or (len(window) == 2 and len(set(window)) == 1):
        return None
    return (
        f"loralib's factors of a window of {tuple(window)} make no kernel, expected (k, k) or ones"
    )


def from_loralib(module: str, site: Site, a: np.ndarray, b: np.ndarray) -> Factors:
    """The factors of a convolution from loralib's.

    Args:
      module: torch's name of the layer.
      site: the site, of any rank.
      a: lora_A.
      b: lora_B.

    Returns:
      The factors, exact, but for those of rank `out`, which are rounded to float32.

    Raises:
      AdapterError: factors of other sizes, or a window that loralib cannot do.
    """
    if reason := why_not(site):
        raise AdapterError(f"{module}: {reason}.")
    *window, own = site.layout.sizes("i")  # inputs of one group
    k, outputs = window[0], site.layout.count("o")
    r, inputs = a.shape[0] // k, a.shape[1] // k
    groups = inputs // own
    expected = (r * k, own * groups * k), (outputs // max(groups, 1) * k, r * k)
    for end, x, shape in zip(("lora_A", "lora_B"), (a, b), expected, strict=True):
        if x.shape != shape:
            raise AdapterError(misfit(f"{module}.{end}", x.shape, shape))
    ones, area = (1,) * len(window), tuple(window)
    if groups == 1:
        by_row = b.reshape(outputs, k, r, k)
        ours = by_row[:, 0, :, 0]
        if np.array_equal(by_row, ours[:, None, :, None] * np.eye(k, dtype=b.dtype)[:, None]):
            return Factors(
                {"a": a.reshape(r, own, *area), "b": ours.reshape(outputs, r, *ones)}, r, r
            )
        if r * k * k < outputs:
            rank = r * k * k
            spread = np.kron(np.eye(k, dtype=a.dtype), a)  # (k * r k, k * in k)
            parts = {"a": spread.reshape(rank, own, *area), "b": b.reshape(outputs, rank, *ones)}
            return Factors(parts, rank, r)
    delta = b.astype(np.float64) @ a.astype(np.float64)
    parts = {
        "a": delta.astype(np.float32).reshape(outputs, own, *area),
        "b": np.eye(outputs, dtype=np.float32).reshape(outputs, outputs, *ones),
    }
    return Factors(parts, outputs, r)


def to_loralib(parts: Parts) -> dict[str, np.ndarray]:
    """Loralib's factors, of the same r, of a convolution without groups.

    Args:
      parts: A `(r, in, k, k)` and B `(out, r, 1, 1)`, or of windows of ones.

    Returns:
      A `(r k, in k)` and B `(out k, r k)`.
    """
    a, b = np.asarray(parts["a"]), np.asarray(parts["b"])
    r, inputs, k = a.shape[:3]
    outputs = b.shape[0]
    same = np.eye(k, dtype=b.dtype)[:, None]  # (k, 1, k)
    wide = b.reshape(outputs, 1, r, 1) * same
    return {"a": a.reshape(r * k, inputs * k), "b": wide.reshape(outputs * k, r * k)}
