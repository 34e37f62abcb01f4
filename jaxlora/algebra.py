"""Algebra on adapters: they are updates of a base, so they scale, add, mix and shrink.

Every result is an ordinary adapter for the same base. Nothing is approximated but by `truncate`: a
sum concatenates the factors along the rank, since the sum of products is not the product of sums.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import fold, tree
from jaxlora.adapter import Adapter, Site, Spec, check_base, check_leaves
from jaxlora.errors import AdapterError, ConfigError, listing
from jaxlora.initializers import principal
from jaxlora.layout import KernelLayout

Array = jax.Array
_Factors = tuple[Array, Array]  # (*stack, *batch, blocks, rank, ...) each; blocks is 1 unless fused


def delta(adapter: Adapter) -> dict[str, Array]:
    """The update of each adapted kernel, `scaling * B A` in float32: {path: array of its shape}."""
    leaves = _leaves(adapter, "delta")
    return {
        site.path: site.scaling
        * fold.delta(site.layout, site.rank, site.leaves(leaves), jnp.float32)
        for site in adapter.spec.sites
    }


def scale(adapter: Adapter, by: float | Array) -> Adapter:
    """The adapter with its update multiplied by a number; the number may be traced.

    Raises:
      AdapterError: the adapter has magnitudes (DoRA) or leaves trained in full, which do not
        scale without the base.
    """
    _leaves(adapter, "scale")
    if any(site.keeps_start for site in adapter.spec.sites):
        adapter = ordinary(adapter)

    def leaf(path: str, x: Any) -> Any:
        return jax.tree.map(lambda x: x * jnp.asarray(by, x.dtype), x) if path[-1] == "b" else x

    return dataclasses.replace(adapter, params=tree.map_leaves(leaf, adapter.params))


def ordinary(adapter: Adapter) -> Adapter:
    """The same update as a LoRA that keeps no starting factors, for the same base; exact.

    What starts with a product that is not zero (PiSSA, OLoRA) has twice the rank then: the
    factors, and the starting ones taken off. The scaling is folded into B.
    """
    return add(adapter)


def add(*adapters: Adapter) -> Adapter:
    """The sum of the updates, exact: factors are concatenated along the rank.

    A site that only some of the adapters have is taken from those. The scalings are folded into B,
    so that those of the sum are 1.

    Args:
      *adapters: adapters of one base.

    Returns:
      An adapter whose ranks are the sums of the ranks.

    Raises:
      AdapterError: there is none, they have magnitudes or leaves trained in full, or they adapt
        kernels of different shapes.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> from jaxlora import algebra
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> algebra.add(adapter, adapter).spec.sites[0].rank
      4
    """
    if not adapters:
        raise AdapterError("add got no adapters, expected one or more.")
    parts: dict[str, list[tuple[Site, _Factors]]] = {}
    for adapter in adapters:
        leaves = _leaves(adapter, "add")
        for site in adapter.spec.sites:
            a, b = _factors(site, leaves)
            parts.setdefault(site.path, []).append((site, (a, b * site.scaling)))
    together = {}
    for path, found in parts.items():
        first = found[0][0]
        for site, _ in found:
            if site.layout != first.layout:
                raise AdapterError(
                    f"{path} is a kernel of layout {first.layout} for one adapter and "
                    f"{site.layout} for another, expected adapters of one base."
                )
        axis = first.layout.rank_axis + 1
        a, b = (jnp.concatenate(xs, axis) for xs in zip(*(f for _, f in found), strict=True))
        together[path] = (first, (a, b))
    return _adapter(adapters[0].spec, together)


def interpolate(left: Adapter, right: Adapter, t: float | Array) -> Adapter:
    """`(1 - t) * left + t * right`, exact; t outside [0, 1] extrapolates."""
    return add(scale(left, 1 - t), scale(right, t))


def approximate(adapter: Adapter, params: tree.Tree, goal: tree.Tree) -> Adapter:
    """The adapter of the same spec that brings a base nearest to other params of its shapes.

    With fine-tuned params as the goal, this extracts a LoRA from them. With a quantized base and
    the original as the goal, it starts training nearer to the original than the quantized base is:
    LoftQ's start (Li et al. 2023, algorithm 1 with one step), that leaves the base as it is.

    Args:
      adapter: an adapter of the base; its spec and the dtype of its leaves are taken over.
      params: the base, quantized or not.
      goal: params of the same shapes.

    Returns:
      The adapter; each update is the best of its rank in the Frobenius norm.

    Raises:
      AdapterError: the adapter has magnitudes, leaves trained in full or starting factors, or does
        not fit one of the trees.
    """
    leaves = _leaves(adapter, "approximate")
    kept = [site.path for site in adapter.spec.sites if site.frozen]
    if kept:
        raise AdapterError(
            f"approximate sets both factors, but {listing(kept)} keeps frozen ones. Expected an "
            'adapter with `init="kaiming"` and freeze_a=False.'
        )
    check_base(params, adapter.spec)
    check_base(goal, adapter.spec)
    bases, goals = tree.flat(params), tree.flat(goal)
    for site in adapter.spec.sites:
        wanted, there = (
            site.layout.matrices(tree.unboxed(x[site.path])).astype(jnp.float32)
            for x in (goals, bases)
        )
        for part, x in zip("ab", principal(site, wanted - there), strict=True):
            kind: Any = part
            old = leaves[f"{site.path}_lora_{part}"]
            core = x.reshape(site.layout.full_shape(kind, site.rank))
            leaf = site.layout.to_leaf(core, kind, site.rank).astype(old.dtype)
            leaves[f"{site.path}_lora_{part}"] = leaf
    return dataclasses.replace(adapter, params=tree.nested(leaves))


def singular_values(adapter: Adapter) -> dict[str, np.ndarray]:
    """The singular values of each update: how much of its rank a site uses.

    Computed from the factors by QR, without forming the update.

    Returns:
      {path: (*stack, *batch, blocks, rank) in falling order}, float32.
    """
    leaves = _leaves(adapter, "singular_values")
    return {
        site.path: np.asarray(_svd(site, _factors(site, leaves))[1]) for site in adapter.spec.sites
    }


def truncate(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """The best approximation of each update by a lower rank (Eckart and Young 1936).

    Args:
      adapter: the adapter.
      rank: the highest rank to keep.
      energy: keep, site by site, the lowest rank whose squared singular values make up this share
        of all; in (0, 1]. Slices of a stacked kernel keep the rank that the neediest of them needs.

    Returns:
      An adapter with scaling 1 and balanced factors.

    Raises:
      ConfigError: not exactly one of `rank` and `energy`, or one out of range.
      AdapterError: as for `add`.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"truncate got rank={rank} and energy={energy}, expected one of them.")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}, expected at least 1.")
    if energy is not None:
        check_energy(energy)
    leaves = _leaves(adapter, "truncate")
    kept = {}
    for site in adapter.spec.sites:
        u, s, v = _svd(site, _factors(site, leaves))
        most = s.shape[-1]
        keep = min(rank, most) if rank is not None else _needed(np.asarray(s), energy or 1.0)
        root = jnp.sqrt(s[..., :keep])[..., None]
        layout, lead = site.layout, s.shape[:-1]
        a = (root * v[..., :keep, :]).reshape(*lead, keep, *layout.sizes("i"))
        b = (root * u[..., :keep, :]).reshape(*lead, keep, *_own_outputs(layout))
        kept[site.path] = (site, (a, b))
    return _adapter(adapter.spec, kept)


def check_energy(energy: float) -> None:
    """Raises ConfigError unless the energy is a share in (0, 1]."""
    if not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}, expected a share in (0, 1].")


def _own_outputs(layout: KernelLayout) -> tuple[int, ...]:
    """The outputs of B: of one block where the kernel is fused."""
    return layout.core_shape("b", 1)[len(layout.axes("b")) + 1 :]


def _needed(s: np.ndarray, energy: float) -> int:
    shares = np.cumsum(s.astype(np.float64) ** 2, -1)
    total = shares[..., -1:]
    enough = shares >= energy * total * (1 - 1e-6)
    return int(np.max(np.argmax(enough, -1))) + 1


def _svd(site: Site, factors: _Factors) -> tuple[Array, Array, Array]:
    """Of each update: left vectors (…, rank, outputs), values, right vectors (…, rank, inputs)."""
    lead = site.layout.rank_axis + 2
    a, b = (x.reshape(*x.shape[:lead], -1).astype(jnp.float32) for x in factors)
    with jax.default_matmul_precision("highest"):
        qa, ra = jnp.linalg.qr(jnp.swapaxes(a, -1, -2))  # (…, inputs, k), (…, k, rank)
        qb, rb = jnp.linalg.qr(jnp.swapaxes(b * site.scaling, -1, -2))
        u, s, vt = jnp.linalg.svd(rb @ jnp.swapaxes(ra, -1, -2), full_matrices=False)
        return jnp.swapaxes(qb @ u, -1, -2), s, vt @ jnp.swapaxes(qa, -1, -2)


def _leaves(adapter: Adapter, what: str) -> dict[str, Any]:
    """The unboxed leaves of an adapter that is an update and nothing else."""
    check_leaves(adapter)
    other = [site.path for site in adapter.spec.sites if site.dora]
    other += [leaf.path for leaf in adapter.spec.saved]
    if other:
        raise AdapterError(
            f"{what} takes updates of kernels only, but the adapter also has magnitudes or leaves "
            f"trained in full: {listing(other)}. Merge it instead, or leave them out of the config."
        )
    return adapter.values()


def _factors(site: Site, leaves: Mapping[str, Array]) -> _Factors:
    """A and B as (*stack, *batch, blocks, rank, …), starting factors included."""
    layout, at = site.layout, site.layout.rank_axis

    def by_block(part: Any, leaf: Array) -> Array:
        x = layout.from_leaf(leaf, part, site.rank)
        return x.reshape(*x.shape[:at], -1, site.rank, *x.shape[at + 1 :])

    found = fold.terms(site.leaves(leaves))
    return fold.joined(
        [fold.Term(t.sign, by_block("a", t.a), by_block("b", t.b)) for t in found], at + 1
    )


def _adapter(spec: Spec, found: Mapping[str, tuple[Site, _Factors]]) -> Adapter:
    """An adapter of scaling 1 from the factors of each site."""
    sites, leaves, ranks = [], {}, {}
    dtype = spec.config.param_dtype
    for path, (site, factors) in sorted(found.items()):
        at = site.layout.rank_axis
        rank = ranks[re.escape(path)] = factors[0].shape[at + 1]
        site = dataclasses.replace(site, rank=rank, scaling=1.0, keeps_start=False, freeze_a=False)
        sites.append(site)
        for part, x in zip(("a", "b"), factors, strict=True):
            rows = x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :]).astype(dtype)
            leaves[f"{path}_lora_{part}"] = site.layout.to_leaf(rows, part, rank)
    config = dataclasses.replace(
        spec.config,
        init="kaiming",
        freeze_a=False,
        rslora=False,
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )
    return Adapter(tree.nested(leaves), Spec(config, tuple(sites)))
