"""`Adapter`: the trained leaves with a static description of what each one adapts."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import tree
from jaxlora.config import LoraConfig
from jaxlora.errors import AdapterError, listing, nearest
from jaxlora.layout import KernelLayout, Part

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
    """

    path: str
    kind: str
    layout: KernelLayout
    rank: int
    scaling: float
    lookup: bool = False
    dora: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The names of its leaves."""
        return ("a", "b", "m") if self.dora else ("a", "b")

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the leaves in the adapter's tree."""
        return {f"{self.path}_lora_{p}": self.layout.leaf_shape(p, self.rank) for p in self.parts}

    def wasteful(self) -> bool:
        """Whether the rank is above the kernel's smaller side, so that BA needs no such rank."""
        return self.rank > min(self.layout.count("i"), self.layout.count("o"))


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
    """A leaf of the base that is trained in full: `path` is replaced by `<path>_lora_w`."""

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
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

    @functools.cached_property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of every leaf of an adapter with this spec."""
        shapes = {p: s for site in self.sites for p, s in site.leaf_shapes().items()}
        return shapes | {f"{leaf.path}_lora_w": leaf.shape for leaf in self.saved}

    @functools.cached_property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the base's leaves that the adapter adapts or replaces."""
        shapes = {site.path: site.layout.shape for site in self.sites}
        return shapes | {leaf.path: leaf.shape for leaf in self.saved}

    def abstract(self) -> "Adapter":
        """The adapter with a ShapeDtypeStruct for every leaf."""
        dtype = self.config.param_dtype
        leaves = {p: jax.ShapeDtypeStruct(s, dtype) for p, s in self.leaf_shapes.items()}
        return Adapter(tree.nested(leaves), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A partial params tree of LoRA leaves, with its spec: a pytree like any other.

    `jax.grad`, `jax.tree.map`, optax, `vmap`, `pmap` and donation act on the leaves.

    Attributes:
      params: the leaves, nested as the base is: `kernel_lora_a` beside the place of `kernel`.
      spec: what each leaf adapts; static.
    """

    params: Any
    spec: Spec = dataclasses.field(metadata={"static": True})


def leaf_of(adapter_leaves: Mapping[str, Any], path: str) -> Any:
    """The unboxed LoRA leaf at `path`, or an AdapterError that says what there is."""
    if path not in adapter_leaves:
        raise AdapterError(
            f"The adapter has no leaf {path}, expected by its spec. "
            f"Nearest: {listing(nearest(path, adapter_leaves)) or 'it has no leaves'}."
        )
    return tree.unboxed(adapter_leaves[path])


def check_leaves(adapter: Adapter) -> None:
    """Raises AdapterError unless the leaves are those of the spec, with its shapes."""
    leaves = tree.flat(adapter.params)
    for path, shape in adapter.spec.leaf_shapes.items():
        found = jnp.shape(leaf_of(leaves, path))
        if found != shape:
            raise AdapterError(
                f"Adapter leaf {path} has shape {found}, expected {shape}. "
                "An adapter with a leading axis belongs under `jax.vmap`."
            )
    extra = sorted(set(leaves) - set(adapter.spec.leaf_shapes))
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
        found = jnp.shape(tree.unboxed(leaves[path]))
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
    if part == "w" or not hasattr(box, "names"):
        return box.replace_boxed(leaf)
    axes = next(s for s in spec.sites if s.path == adapted).layout.leaf_axes(part)  # type: ignore[arg-type]
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
    replaced = sum(math.prod(leaf.shape) for leaf in adapter.spec.saved)
    total = tree.size(params) + trainable - replaced
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
