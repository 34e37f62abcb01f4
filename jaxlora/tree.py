"""Trees of params: paths and names.

A params tree is a nested dict, and a path is its keys joined by `/`. LoRA leaves are told from
the base's by their names: beside `kernel` stand `kernel_lora_a` and `kernel_lora_b`, and
`bias_lora_w` replaces `bias`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from jaxlora.errors import AdapterError

Tree = Any
"""A nested dict of arrays, or of anything that stands for arrays."""

LORA_NAME = re.compile(r"(?P<param>.+)_lora_(?P<part>[abmwt]|[ab]0)")
"""The name of a LoRA leaf. Trained parts: the factors a and b, DoRA's m, a replacement w of the
whole leaf, or t of some of a table's rows. Frozen parts: a0 and b0, factors as at the start."""


def is_lora_name(path: str) -> bool:
    """Whether the last component of `path` names a LoRA leaf."""
    return LORA_NAME.fullmatch(path.rpartition("/")[2]) is not None


def is_trained_name(path: str) -> bool:
    """Whether the last component of `path` names a LoRA leaf that is trained."""
    return is_lora_name(path) and not path.endswith("0")


def is_box(x: Any) -> bool:
    """Whether `x` is a Flax metadata box such as `nn.Partitioned`, a leaf for our purposes."""
    return isinstance(x, meta.AxisMetadata)


def unboxed(x: Any) -> Any:
    """The array in a metadata box, or `x` itself."""
    return meta.unbox(x)


def aval(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, or of what a metadata box holds, without computing it."""
    if is_box(x):
        return jax.eval_shape(meta.unbox, x)
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) of a nested mapping in key order. Boxes are leaves."""
    for key in sorted(tree):
        path, value = f"{prefix}{key}", tree[key]
        if isinstance(value, Mapping):
            yield from items(value, f"{path}/")
        else:
            yield path, value


def flat(tree: Tree) -> dict[str, Any]:
    """The nested mapping as {path: leaf}."""
    return dict(items(tree))


def values(tree: Tree) -> dict[str, Any]:
    """The nested mapping as {path: unboxed leaf}."""
    return {path: unboxed(leaf) for path, leaf in items(tree)}


def nested(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *scopes, name = path.split("/")
        node = tree
        for scope in scopes:
            node = node.setdefault(scope, {})
        node[name] = leaf
    return tree


def abstract(tree: Tree) -> Tree:
    """The tree with a ShapeDtypeStruct for every array; other leaves are left as they are."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x

    return jax.tree.map(leaf, tree)


def is_array(x: Any) -> bool:
    """Whether `x` is an array, a tracer or a ShapeDtypeStruct."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def size(tree: Tree) -> int:
    """The number of elements in all arrays of the tree."""
    return sum(x.size for x in jax.tree.leaves(tree) if is_array(x))


def nbytes(tree: Tree) -> int:
    """The bytes of all arrays of the tree; the arrays may be abstract."""
    return sum(-(-x.size * _bits(x.dtype) // 8) for x in jax.tree.leaves(tree) if is_array(x))


def _bits(dtype: Any) -> int:
    """The bits of one element: 4 for int4, which XLA packs though numpy does not."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def path_hash(path: str) -> int:
    """A 32-bit hash of a path that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")


def map_leaves(fn: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """`fn(path, leaf)` for every leaf of a nested mapping. Boxes are leaves."""
    return {
        key: map_leaves(fn, value, f"{prefix}{key}/")
        if isinstance(value, Mapping)
        else fn(f"{prefix}{key}", value)
        for key, value in tree.items()
    }


def union(left: Tree, right: Tree, prefix: str = "") -> Tree:
    """One nested mapping with the leaves of both. A path that both hold is an AdapterError."""
    tree = {k: union(v, {}) if isinstance(v, Mapping) else v for k, v in left.items()}
    for key, value in right.items():
        here = tree.get(key, {} if isinstance(value, Mapping) else None)
        if isinstance(value, Mapping) and isinstance(here, Mapping):
            tree[key] = union(here, value, f"{prefix}{key}/")
        elif key in tree:
            raise AdapterError(
                f"Both trees hold {prefix}{key}, expected a base without LoRA leaves. "
                "`split` takes a joint tree apart."
            )
        else:
            tree[key] = value
    return tree


def select(keep: Callable[[str], bool], tree: Tree, prefix: str = "") -> Tree:
    """The leaves whose path `keep` accepts, without the scopes that this leaves empty."""
    chosen: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            below = select(keep, value, f"{prefix}{key}/")
            if below or not value:
                chosen[key] = below
        elif keep(f"{prefix}{key}"):
            chosen[key] = value
    return chosen
