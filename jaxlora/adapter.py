"""`Adapter`: the trained leaves with a static description of what each one adapts."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import tree
from jaxlora.config import LoraConfig
from jaxlora.errors import AdapterError, listing, nearest
from jaxlora.layout import KernelLayout

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted kernel.

    Attributes:
      path: the kernel's path in the params tree, `encoder/layer_0/query/kernel`.
      kind: the class of the module that uses it, "Dense".
      layout: what its axes are.
      rank: the rank of its update.
      scaling: the factor before BA.
      lookup: whether it is a table indexed by integers, as an embedding is. Such a site starts
        with A zero and B random, and has no dropout (as in loralib and PEFT).
      dora: whether the kernel's magnitude is trained too, as the leaf m.
      keeps_start: whether the factors as they start are kept as frozen leaves, a0 and b0, and their
        product is taken off the update (PiSSA, OLoRA).
      freeze_a: whether A stays as it starts, a frozen leaf a0 (LoRA-FA).
      weights: whether the update is added to the kernel itself, before the model runs, since no
        rule serves the layer.
    """

    path: str
    kind: str
    layout: KernelLayout
    rank: int
    scaling: float
    lookup: bool = False
    dora: bool = False
    keeps_start: bool = False
    freeze_a: bool = False
    weights: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of its trained leaves."""
        return (*(() if self.freeze_a else ("a",)), "b", *(("m",) if self.dora else ()))

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of its frozen leaves."""
        return (
            *(("a0",) if self.freeze_a or self.keeps_start else ()),
            *(("b0",) if self.keeps_start else ()),
        )

    def leaf_shapes(self, parts: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """{path: shape} of some of its leaves."""
        return {
            f"{self.path}_lora_{p}": self.layout.leaf_shape(p[0], self.rank)  # type: ignore[arg-type]
            for p in parts
        }

    def leaves(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """{part: leaf} of this site, from {path: leaf} of the adapter."""
        return {p: values[f"{self.path}_lora_{p}"] for p in (*self.trained, *self.frozen)}

    def wasteful(self) -> bool:
        """Whether the rank is above the kernel's smaller side, so that BA needs no such rank."""
        return self.rank > min(self.layout.count("i"), self.layout.count("o"))


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
    """A leaf of the base that is trained in full, or some rows of it.

    Attributes:
      path: the leaf; `<path>_lora_w` replaces it, or `<path>_lora_t` some of its rows.
      shape: the shape of the base's leaf.
      rows: the rows of a table that are trained, all of the leaf if there are none.
      axis: the table's axis that they are rows of.
    """

    path: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    axis: int = 0

    @property
    def leaf_path(self) -> str:
        """The path of the trained leaf."""
        return f"{self.path}_lora_{'t' if self.rows else 'w'}"

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the trained leaf."""
        if not self.rows:
            return self.shape
        return (*self.shape[: self.axis], len(self.rows), *self.shape[self.axis + 1 :])

    def taken(self, base: Any) -> Any:
        """The values of the base that the trained leaf replaces."""
        return jnp.take(base, np.array(self.rows), self.axis) if self.rows else base

    def put(self, base: Any, leaf: Any) -> Any:
        """The base's leaf with the trained values in place, in the base's dtype."""
        if not self.rows:
            return leaf.astype(base.dtype)
        at = (*[slice(None)] * self.axis, np.array(self.rows))
        return jnp.asarray(base).at[at].set(leaf.astype(base.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """The static part of an adapter: it is hashable, and equal specs share one compiled program.

    Attributes:
      config: the config that the adapter was made from.
      sites: the adapted kernels, sorted by path.
      saved: the leaves trained in full, sorted by path.
    """

    config: LoraConfig
    sites: tuple[Site, ...]
    saved: tuple[SavedLeaf, ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.config, self.sites, self.saved))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Spec) or self._hash != other._hash:
            return self is other
        for name in ("config", "sites", "saved"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not theirs:
                if mine != theirs:
                    return False
                # Equal values become one, so that the next call of a jitted function is fast.
                object.__setattr__(other, name, mine)
        return True

    @functools.cached_property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of every trained leaf of an adapter with this spec."""
        shapes = {p: s for site in self.sites for p, s in site.leaf_shapes(site.trained).items()}
        return shapes | {leaf.leaf_path: leaf.leaf_shape for leaf in self.saved}

    @functools.cached_property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of every leaf that is kept and never trained."""
        return {p: s for site in self.sites for p, s in site.leaf_shapes(site.frozen).items()}

    @functools.cached_property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the base's leaves that the adapter adapts or replaces."""
        shapes = {site.path: site.layout.shape for site in self.sites}
        return shapes | {leaf.path: leaf.shape for leaf in self.saved}

    def abstract(self) -> "Adapter":
        """The adapter with a ShapeDtypeStruct for every leaf."""
        dtype, shapes = self.config.param_dtype, self.leaf_shapes | self.frozen_shapes
        return self.adapter({p: jax.ShapeDtypeStruct(s, dtype) for p, s in shapes.items()})

    def adapter(self, leaves: Mapping[str, Any]) -> "Adapter":
        """The adapter of {path: leaf}, trained and frozen ones told apart."""
        trained, frozen = (
            tree.nested({p: x for p, x in leaves.items() if p in shapes})
            for shapes in (self.leaf_shapes, self.frozen_shapes)
        )
        return Adapter(trained, self, frozen)

    def total(self, num_base: int) -> int:
        """The base's parameters and the factors'; a leaf that is trained in full counts once."""
        shapes = [*self.leaf_shapes.values(), *self.frozen_shapes.values()]
        replaced = [leaf.leaf_shape for leaf in self.saved]
        return num_base + sum(map(math.prod, shapes)) - sum(map(math.prod, replaced))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A partial params tree of LoRA leaves, with its spec: a pytree like any other.

    `jax.grad`, `jax.tree.map`, `vmap`, `pmap` and donation act on the leaves. What optax gets is
    `params`: weight decay on all of the adapter would wear the frozen leaves away.

    Attributes:
      params: the trained leaves, nested as the base is: `kernel_lora_a` beside the place of
        `kernel`.
      spec: what each leaf adapts; static.
      frozen: leaves that the update needs and that are never trained: the factors as they start
        under PiSSA and OLoRA, and A under `freeze_a`. Empty otherwise. Their gradient is zero.
    """

    params: Any
    spec: Spec = dataclasses.field(metadata={"static": True})
    frozen: Any = dataclasses.field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """{path: unboxed leaf} of all leaves, trained and frozen."""
        return tree.values(self.params) | tree.values(self.frozen)


def check_leaves(adapter: Adapter) -> None:
    """Raises AdapterError unless the leaves are those of the spec, with its shapes."""
    for what, leaves, shapes in (
        ("leaf", tree.flat(adapter.params), adapter.spec.leaf_shapes),
        ("frozen leaf", tree.flat(adapter.frozen), adapter.spec.frozen_shapes),
    ):
        for path, shape in shapes.items():
            if path not in leaves:
                raise AdapterError(
                    f"The adapter has no {what} {path}, expected by its spec. "
                    f"Nearest: {listing(nearest(path, leaves)) or 'it has no leaves'}."
                )
            found = jnp.shape(tree.unboxed(leaves[path]))
            if found != shape:
                raise AdapterError(
                    f"Adapter {what} {path} has shape {found}, expected {shape}. "
                    "An adapter with a leading axis belongs under `jax.vmap`."
                )
        extra = sorted(set(leaves) - set(shapes))
        if extra:
            raise AdapterError(f"The adapter holds leaves that its spec lacks: {listing(extra)}.")


def check_base(params: tree.Tree, spec: Spec) -> None:
    """Raises AdapterError unless the params hold, with its shape, each leaf that is adapted."""
    leaves = tree.flat(params)
    for path, shape in spec.base_shapes.items():
        if path not in leaves:
            joint = any(tree.is_lora_name(p) for p in leaves)
            raise AdapterError(
                f"The params have no leaf {path}, which the adapter adapts. "
                f"Nearest: {listing(nearest(path, leaves)) or 'there are no params'}. "
                + (
                    "They hold LoRA leaves already: `split` them first."
                    if joint
                    else "The adapter belongs to another model."
                )
            )
        found = tree.aval(leaves[path]).shape
        if found != shape:
            raise AdapterError(
                f"Param {path} has shape {found}, the adapter expects {shape}. "
                "The adapter belongs to another model."
            )


def boxed_like(base: Mapping[str, Any], spec: Spec, path: str, leaf: Any) -> Any:
    """A LoRA leaf in a box like that of the base's leaf, with the names of the axes they share.

    Args:
      base: {path: leaf} of the base.
      spec: the adapter's spec.
      path: the LoRA leaf's path.
      leaf: its array.

    Returns:
      The leaf, boxed where the base's is (`nn.Partitioned` and its kin).
    """
    adapted, _, part = path.rpartition("_lora_")
    box = base[adapted]
    if not tree.is_box(box):
        return leaf
    if part in "wt" or not hasattr(box, "names"):
        return box.replace_boxed(leaf)
    axes = next(s for s in spec.sites if s.path == adapted).layout.leaf_axes(part[0])  # type: ignore[arg-type]
    return box.replace_boxed(leaf).replace(
        names=tuple(None if axis is None else box.names[axis] for axis in axes)
    )


def summary(params: tree.Tree, adapter: Adapter) -> str:
    """The trainable share, in the form that PEFT prints.

    "all params" counts the base and the factors; a leaf that `modules_to_save` or `bias` trains in
    full replaces the base's and counts once. Works on abstract trees.

    Args:
      params: the base params.
      adapter: the adapter.

    Returns:
      `trainable params: 294,912 || all params: 109,777,154 || trainable%: 0.2686`.

    Raises:
      AdapterError: the adapter does not fit the params.
    """
    check_base(params, adapter.spec)
    trainable = tree.size(adapter.params)
    total = adapter.spec.total(sum(tree.aval(x).size for _, x in tree.items(params)))
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
