"""The initializers of the factors: a table, open to the user's own."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlora import tree
from jaxlora.adapter import Site
from jaxlora.errors import ConfigError, TargetError, nearest

Array = jax.Array
Factors = tuple[Array, Array]
Draw = Callable[[Array, Site, Array], Array | Factors]
"""(key, site, kernel leaf) -> A, or (A, B)."""


class Initializer(NamedTuple):
    """One entry of the table.

    Attributes:
      draw: makes the factors.
      keeps_start: whether they are kept beside the trained ones, to be taken off the update.
    """

    draw: Draw
    keeps_start: bool


def register_init(name: str, *, keeps_start: bool = False) -> Callable[[Draw], Draw]:
    """Registers an initializer under a name for `LoraConfig(init=name)`.

    Args:
      name: the name.
      keeps_start: the product of the factors is not zero, so the adapter keeps them as they start
        and its update is `B A - B0 A0`: it starts as the identity, and the base stays as it is.

    Returns:
      A decorator for a function `(key, site, kernel) -> A` of shape (*stack, *batch, rank, inputs),
      or of any shape with as many elements in that order; B is zero then. A function that returns
      `(A, B)`, B of (*stack, *batch, rank, outputs), needs a product of zero or `keeps_start`.
      `site.layout.matrices(kernel)` is the kernel as (*stack, *batch, inputs, outputs).

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> @jl.register_init("ones")
      ... def ones(key, site, kernel):
      ...     return jnp.ones(site.layout.leaf_shape("a", site.rank))
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = jl.LoraConfig(rank=1, init="ones")
      >>> jl.lora_init(jax.random.key(1), model, variables, config, x).params["kernel_lora_a"]
      Array([[1., 1., 1., 1.]], dtype=float32)
    """

    def decorate(draw: Draw) -> Draw:
        _TABLE[name] = Initializer(draw, keeps_start)
        return draw

    return decorate


def initializer(name: str) -> Initializer:
    """The initializer of that name, or a ConfigError with those there are."""
    if name not in _TABLE:
        raise ConfigError(
            f"init is {name!r}, expected one of {', '.join(sorted(_TABLE))}. "
            f"Nearest: {nearest(name, _TABLE, 1)[0]}."
        )
    return _TABLE[name]


_TABLE: dict[str, Initializer] = {}


@register_init("kaiming")
def kaiming(key: Array, site: Site, kernel: Array) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's kaiming_uniform_(a=sqrt(5)) as in loralib."""
    return _uniform(key, site)


@register_init("gaussian")
def gaussian(key: Array, site: Site, kernel: Array) -> Array:
    """N(0, (1/rank)^2), as in PEFT."""
    return jax.random.normal(key, site.layout.full_shape("a", site.rank)) / site.rank


@register_init("zero_free", keeps_start=True)
def zero_free(key: Array, site: Site, kernel: Array) -> Factors:
    """Both factors random, of the size that A has in "kaiming": both learn from the first step.

    With B zero the gradient of A is zero at first.
    """
    key_a, key_b = jax.random.split(key)
    bound = 1 / math.sqrt(site.rank)
    shape = site.layout.full_shape("b", site.rank)
    b = jax.random.uniform(key_b, shape, minval=-bound, maxval=bound)
    return _uniform(key_a, site), b


@register_init("orthogonal")
def orthogonal(key: Array, site: Site, kernel: Array) -> Factors:
    """Factors that are not zero but whose product is, up to rounding, as in PEFT.

    The halves of a random orthogonal matrix Q of (rank, rank) have `Q1 Q2^T = 0`; so have A and B
    that mix their rows over the one and over the other. The rank must be even.
    """
    if site.rank % 2:
        raise TargetError(
            f"init='orthogonal' splits the rank in halves, but {site.path} has rank {site.rank}, "
            "expected an even one."
        )
    half, key_q, key_a, key_b = site.rank // 2, *jax.random.split(key, 3)
    layout, blocks = site.layout, max(1, sum(site.layout.blocks))
    lead = (*layout.sizes("s"), *layout.sizes("b"), blocks)
    q = jax.random.orthogonal(key_q, site.rank, lead)
    with jax.default_matmul_precision("highest"):
        inputs, outputs = layout.count("i"), layout.block_outputs
        a = jnp.swapaxes(q[..., 0::2, :], -1, -2) @ jax.random.normal(key_a, (*lead, half, inputs))
        b = jnp.swapaxes(q[..., 1::2, :], -1, -2) @ jax.random.normal(key_b, (*lead, half, outputs))
    return a / 10, b / 10


@register_init("pissa", keeps_start=True)
def pissa(key: Array, site: Site, kernel: Array) -> Factors:
    """The principal singular values and vectors of W (Meng et al. 2024, section 3).

    `A = sqrt(S / scaling) U^T, B = sqrt(S / scaling) V^T` of the best rank-r approximation, by an
    exact singular value decomposition.
    """
    return principal(site, _matrices(site, kernel))


@register_init("pissa_fast", keeps_start=True)
def pissa_fast(key: Array, site: Site, kernel: Array) -> Factors:
    """As "pissa", by a randomized decomposition (Halko et al. 2011, algorithms 4.4 and 5.1).

    Four power iterations and 8 extra columns: a few products with W in the place of its whole
    decomposition.
    """
    w = _matrices(site, kernel)
    wt = jnp.swapaxes(w, -1, -2)
    width = min(site.rank + 8, *w.shape[-2:])
    with jax.default_matmul_precision("highest"):
        q = jnp.linalg.qr(w @ jax.random.normal(key, (*wt.shape[:-1], width)))[0]
        for _ in range(4):
            q = jnp.linalg.qr(w @ jnp.linalg.qr(wt @ q)[0])[0]
        u, s, vt = jnp.linalg.svd(jnp.swapaxes(q, -1, -2) @ w, full_matrices=False)
        return _balanced(site, q @ u, s, vt)


@register_init("olora", keeps_start=True)
def olora(key: Array, site: Site, kernel: Array) -> Factors:
    """The first r columns of Q and rows of R of W (outputs, inputs) = QR (Büyükakyüz 2024)."""
    q, r = jnp.linalg.qr(jnp.swapaxes(_matrices(site, kernel), -1, -2))
    rows = _at_most(site, q.shape[-1])
    return r[..., :rows, :], jnp.swapaxes(q[..., :rows], -1, -2)


def principal(site: Site, matrices: Array) -> Factors:
    """A and B of the best approximation of matrices (..., inputs, outputs) by `scaling * B A`."""
    return _balanced(site, *jnp.linalg.svd(matrices.astype(jnp.float32), full_matrices=False))


@register_init("eva")
def _eva(key: Array, site: Site, kernel: Array) -> Array:
    raise ConfigError(
        "init='eva' starts from the layers' inputs, and there are no batches here. Expected "
        "`jaxlora.eva_init(key, model, variables, config, batches)`."
    )


def _uniform(key: Array, site: Site) -> Array:
    bound = 1 / math.sqrt(site.layout.count("i"))
    shape = site.layout.full_shape("a", site.rank)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _balanced(site: Site, u: Array, s: Array, vt: Array) -> Factors:
    rank = _at_most(site, s.shape[-1])
    root = jnp.sqrt(s[..., :rank] / site.scaling)[..., None]
    return root * jnp.swapaxes(u[..., :rank], -1, -2), root * vt[..., :rank, :]


def _at_most(site: Site, rank: int) -> int:
    if site.rank > rank:
        raise TargetError(
            f"The initializer decomposes {site.path}, whose smaller side is {rank}, expected "
            f"a rank of at most that, not {site.rank}. `rank_pattern` sets it."
        )
    return site.rank


def _matrices(site: Site, kernel: Array) -> Array:
    return site.layout.matrices(tree.unboxed(kernel)).astype(jnp.float32)
