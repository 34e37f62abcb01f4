"""`KernelLayout`: what each axis of a kernel is, and what follows for its low-rank factors.

Every linear map is one case here. With roles `i` (contracted with the input), `o` (kept in the
output) and `b` (batch: in input and output, as the experts of a mixture), a Dense kernel is `io`,
attention's query `ioo`, its output projection `iio`, an embedding table `io`, a transposed
kernel `oi`. The factors are rank-first,

    A (*batch, rank, *contracted),  B (*batch, rank, *outputs),  delta = sum over rank of A B,

because a TPU tiles the last two axes (8, 128), so that a trailing axis of 8 would be padded
16-fold, and because the gradient of A then compiles to a dot with a wide output.

Axes added by `nn.scan` and `nn.vmap` stand in the leaf at the signed position that the transform
was given, and in the factors at the same signed position, since Flax slices every leaf of a
collection along the same axis: -1 in a kernel of three axes and -1 in a factor of two are the
same word, 2 and 1 are not. A factor with too few axes for the position gets singleton axes.
"""

import dataclasses
import math
import string
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Part = Literal["a", "b", "m", "key"]
_RANK, _PAD = "rank", "pad"


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """The axes of one kernel leaf.

    Attributes:
      shape: the shape of the leaf in the params tree, stacked axes included.
      roles: one letter of `i`, `o`, `b` for each axis of the kernel as its module sees it.
      stack: the signed axes that lifted transforms take away, outermost first.
      blocks: for a fused kernel, which of its equal blocks are adapted: loralib's MergedLinear. A
        has `rank` rows for each of them, and B the outputs of one block; the others' delta is zero.
      block_axis: the leaf's output axis that is made of the blocks.
    """

    shape: tuple[int, ...]
    roles: str
    stack: tuple[int, ...] = ()
    blocks: tuple[bool, ...] = ()
    block_axis: int = 0

    def rows(self, rank: int) -> int:
        """The rows of A and B: the rank, for each adapted block of a fused kernel."""
        return rank * sum(self.blocks) if self.blocks else rank

    def axes(self, role: str) -> tuple[int, ...]:
        """The leaf's axes that have a role; `s` asks for the stacked axes, outermost first."""
        own, stacked = self._own_and_stacked()
        return (
            tuple(stacked)
            if role == "s"
            else tuple(axis for axis, r in zip(own, self.roles, strict=True) if r == role)
        )

    def sizes(self, role: str) -> tuple[int, ...]:
        """The sizes of `axes(role)`."""
        return tuple(self.shape[axis] for axis in self.axes(role))

    @property
    def rank_axis(self) -> int:
        """Where the rank stands in a factor of shape (*stack, *batch, rank, ...)."""
        return len(self.axes("s") + self.axes("b"))

    def letters(self, role: str, of: str) -> str:
        """The letters that have a role, `of` being one letter for each of the kernel's own axes."""
        return "".join(c for c, r in zip(of, self.roles, strict=True) if r == role)

    @property
    def block_outputs(self) -> int:
        """The number of outputs of B: those of one block where the kernel is fused."""
        return self.count("o") // max(1, len(self.blocks))

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of the kernel as its module sees it."""
        return tuple(self.shape[axis] for axis in self._own_and_stacked()[0])

    def count(self, *roles: str) -> int:
        """The product of the sizes of the axes with these roles: `count("i")` is the fan-in."""
        return math.prod(size for role in roles for size in self.sizes(role))

    def leaf_axes(self, part: Part) -> tuple[int | None, ...]:
        """For each axis of a factor's leaf the kernel axis that it shares, or None.

        A sharding or a name of the kernel's axis holds for the factor's axis too.
        """
        return tuple(x if isinstance(x, int) else None for x in self._labels(part))

    def leaf_shape(self, part: Part, rank: int) -> tuple[int, ...]:
        """The shape of a factor's leaf in the params tree (for `key`: `rank` words of key data)."""
        rows = rank if part == "key" else self.rows(rank)
        return tuple(self._size(x, part, rows) for x in self._labels(part))

    def slice_shape(self, part: Part, rank: int) -> tuple[int, ...]:
        """The shape of a factor's leaf as the module sees it, stacked axes taken away."""
        stacked = set(self.axes("s"))
        labels, shape = self._labels(part), self.leaf_shape(part, rank)
        return tuple(n for x, n in zip(labels, shape, strict=True) if x not in stacked)

    def core_shape(self, part: Part, rank: int) -> tuple[int, ...]:
        """The shape of a factor by itself: batch, rows, and contracted axes or outputs."""
        rows = rank if part == "key" else self.rows(rank)
        labels = self._canonical(part)[len(self.stack) :]
        return tuple(self._size(x, part, rows) for x in labels)

    def full_shape(self, part: Part, rank: int) -> tuple[int, ...]:
        """(*stack, *core): the shape that `to_leaf` takes and `from_leaf` gives."""
        return (*self.sizes("s"), *self.core_shape(part, rank))

    def to_leaf(self, x: Array, part: Part, rank: int) -> Array:
        """From (*stack, *core) to the leaf's shape."""
        order = self._canonical(part)
        present = [label for label in self._labels(part) if label != _PAD]
        x = jnp.transpose(x, [order.index(label) for label in present])
        return x.reshape(self.leaf_shape(part, rank))

    def from_leaf(self, x: Array, part: Part, rank: int) -> Array:
        """From the leaf's shape to (*stack, *core)."""
        order = self._canonical(part)
        present = [label for label in self._labels(part) if label != _PAD]
        rows = rank if part == "key" else self.rows(rank)
        x = x.reshape([self._size(n, part, rows) for n in present])
        return jnp.transpose(x, [present.index(label) for label in order])

    def matrices(self, kernel: Array) -> Array:
        """The kernel leaf as matrices (*stack, *batch, inputs, outputs).

        Those of a fused kernel are its adapted blocks: (*stack, *batch, blocks, inputs, outputs).
        """
        order = [axis for role in "sbio" for axis in self.axes(role)]
        x = jnp.transpose(kernel, order)
        lead = [self.shape[axis] for axis in order[: self.rank_axis]]
        if not self.blocks:
            return x.reshape(*lead, self.count("i"), self.count("o"))
        at, blocks = order.index(self.block_axis), len(self.blocks)
        x = x.reshape(*x.shape[:at], blocks, x.shape[at] // blocks, *x.shape[at + 1 :])
        x = jnp.moveaxis(x, at, self.rank_axis)
        x = jnp.compress(np.array(self.blocks), x, self.rank_axis)
        return x.reshape(*lead, sum(self.blocks), self.count("i"), self.block_outputs)

    def spread(self, b: Array) -> Array:
        """B over all the outputs of a fused kernel: each row is zero outside its own block.

        Args:
          b: (..., rows, *outputs of one block).

        Returns:
          (..., rows, *outputs); `b` itself if the kernel is not fused.
        """
        if not self.blocks:
            return b
        outputs, blocks = self.axes("o"), len(self.blocks)
        at = outputs.index(self.block_axis)
        after = len(outputs) - at
        rows = b.shape[-len(outputs) - 1]
        of_row = np.repeat(np.flatnonzero(self.blocks), rows // sum(self.blocks))
        own = of_row[:, None] == np.arange(blocks)
        own = own.reshape(rows, *[1] * at, blocks, *[1] * after)
        apart = jnp.where(own, jnp.expand_dims(b, -after - 1), jnp.zeros((), b.dtype))
        return apart.reshape(*b.shape[: -len(outputs)], *self.sizes("o"))

    def placed(self, parts: Iterable[Array]) -> Array:
        """The outputs of a fused kernel from those of its adapted blocks, zero elsewhere."""
        found = iter(parts)
        placed = [next(found) if on else None for on in self.blocks]
        like = next(x for x in placed if x is not None)
        axis = self.axes("o").index(self.block_axis) - len(self.axes("o"))
        return jnp.concatenate([jnp.zeros_like(like) if x is None else x for x in placed], axis)

    def delta(self, a: Array, b: Array, rank: int, dtype: Any = jnp.float32) -> Array:
        """The update of the whole kernel leaf, `sum over rank of A B`.

        Args:
          a: the leaf of A.
          b: the leaf of B.
          rank: their rank.
          dtype: what to compute in.

        Returns:
          An array of the kernel leaf's shape.
        """
        axes = [*range(len(self.shape)), _RANK]
        letter = dict(zip(axes, string.ascii_letters, strict=False))
        left, right, kernel = (
            "".join(letter[x] for x in labels)
            for labels in (self._canonical("a"), self._canonical("b"), axes[:-1])
        )
        return jnp.einsum(
            f"{left},{right}->{kernel}",
            self.from_leaf(a, "a", rank).astype(dtype),
            self.spread(self.from_leaf(b, "b", rank)).astype(dtype),
            precision=jax.lax.Precision.HIGHEST,
        )

    def _own_and_stacked(self) -> tuple[list[int], list[int]]:
        own = list(range(len(self.shape)))
        stacked = [own.pop(axis) for axis in self.stack]
        return own, stacked

    def _size(self, label: int | str, part: Part, rows: int) -> int:
        if isinstance(label, str):
            return rows if label == _RANK else 1
        fused = self.blocks and part == "b" and label == self.block_axis
        return self.shape[label] // (len(self.blocks) if fused else 1)

    def _canonical(self, part: Part) -> list[int | str]:
        own = {"a": "i", "b": "o", "m": "o", "key": ""}[part]
        batch = () if part == "key" else self.axes("b")
        rank = [] if part == "m" else [_RANK]
        return [*self.axes("s"), *batch, *rank, *self.axes(own)]

    def _labels(self, part: Part) -> list[int | str]:
        stacked = self.axes("s")
        labels = self._canonical(part)[len(stacked) :]
        for padding in range(max([0, *map(abs, self.stack)]) + 1):
            placed = _insert([_PAD] * padding + labels, self.stack, stacked)
            if placed is not None:
                return placed
        raise AssertionError("unreachable: enough singleton axes make room for any position")


def _insert(
    labels: list[int | str], positions: tuple[int, ...], stacked: tuple[int, ...]
) -> list[int | str] | None:
    """The labels with the stacked axes at their positions, or None where one has no place."""
    labels = list(labels)
    for position, axis in reversed(list(zip(positions, stacked, strict=True))):
        at = position if position >= 0 else len(labels) + 1 + position
        if not 0 <= at <= len(labels):
            return None
        labels.insert(at, axis)
    return labels
