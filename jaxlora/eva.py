"""EVA: A starts with the directions in which a layer's inputs vary most (Paischer et al. 2024).

The covariance of a layer's inputs is never formed: a probe of a few rows stands beside each kernel,
and what the backward pass gives as its "gradient" is the covariance times the probe, summed over
tokens, batches and uses, and sliced by `nn.scan` like any other leaf. Some rounds of that and of
orthogonalization are subspace iteration (Halko et al. 2011, section 4.5).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import layers, tree
from jaxlora.adapter import Adapter, Site
from jaxlora.apply import BOUND
from jaxlora.config import LoraConfig
from jaxlora.errors import ConfigError, TargetError
from jaxlora.init import init_leaves
from jaxlora.layers import Linear
from jaxlora.layout import KernelLayout
from jaxlora.plan import plan

Array = jax.Array
_SPARE = 4  # directions beyond those wanted, which speed the iteration up
_SUMS = (
    3  # rows behind the probe's directions: the sum, the sum of squares and the number of inputs
)


def eva_init(
    key: Array,
    model: nn.Module,
    variables: Mapping[str, Any],
    config: LoraConfig,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    passes: int = 4,
    **kwargs: Any,
) -> Adapter:
    """Makes a fresh adapter whose A holds the principal components of each layer's inputs.

    B is zero, so the adapter starts as the identity and is an ordinary LoRA. The ranks are shared
    out anew: of all components of all layers, those that explain the largest shares of their
    layer's variance get the total of the config's ranks, at most `rho` times the rank and at least
    1 for each layer; the scaling of each stays that of the config.

    Args:
      key: a PRNG key.
      model: a Flax Linen module whose outputs can be differentiated.
      variables: its variables.
      config: what to adapt, with `init="eva"`.
      batches: the positional arguments of `model.apply`, for a few batches: tuples, or single
        inputs. All are kept and run `passes` times.
      rho: the most that a layer's rank may grow by; 1 leaves all ranks as they are.
      passes: rounds of subspace iteration.
      **kwargs: keyword arguments for `model.apply`.

    Returns:
      The adapter. Its config has a `rank_pattern` and an `alpha_pattern` of one entry a layer.

    Raises:
      ConfigError: no batches, another `init`, or `rho` below 1.
      TargetError: a layer that is no product of matrices, as a convolution or an embedding.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(3), jnp.outer(jnp.arange(4.0), jnp.array([3.0, 4.0]))
      >>> variables = model.init(jax.random.key(0), x)
      >>> config = jl.LoraConfig(rank=1, init="eva")
      >>> adapter = jl.eva_init(jax.random.key(1), model, variables, config, [x])
      >>> jnp.abs(adapter.params["kernel_lora_a"]).round(3).tolist()
      [[0.6000000238418579, 0.800000011920929]]
    """
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise ConfigError("eva_init got no batches, expected a few: it starts from activations.")
    if config.init != "eva":
        raise ConfigError(f"eva_init got a config with init={config.init!r}, expected 'eva'.")
    if rho < 1:
        raise ConfigError(f"rho is {rho!r}, expected at least 1.")
    spec = plan(model, variables, config, *batches[0], **kwargs).spec
    sites = spec.sites
    for site in sites:
        if site.lookup or site.weights:
            raise TargetError(f"EVA needs the inputs of {site.path}, which has none. `exclude` it.")
    most = {s.path: min(s.layout.count("i"), math.ceil(rho * s.rank)) for s in sites}
    found = _components(key, model, variables, sites, most, batches, passes, kwargs)
    ranks = _shared_out(sites, {path: shares for path, (_, shares) in found.items()}, most)
    given = {site.path: site.scaling for site in sites}
    config = dataclasses.replace(
        config,
        rank_pattern={re.escape(path): rank for path, rank in ranks.items()},
        alpha_pattern={
            re.escape(path): given[path] * (math.sqrt(rank) if config.rslora else rank)
            for path, rank in ranks.items()
        },
    )
    ranked = tuple(dataclasses.replace(site, rank=ranks[site.path]) for site in sites)
    spec = dataclasses.replace(spec, config=config, sites=ranked)
    start = dataclasses.replace(spec, config=dataclasses.replace(config, init="kaiming"))
    adapter = init_leaves(key, variables["params"], start)

    of_a = {f"{s.path}_lora_{p}": s for s in ranked for p in ("a", "a0")}

    def leaf(path: str, x: Any) -> Any:
        site = of_a.get(path)
        if site is None:
            return x
        layout, directions = site.layout, found[site.path][0][..., : site.rank, :]
        rows = jnp.concatenate([directions] * max(1, sum(layout.blocks)), -2)
        core = rows.reshape(layout.full_shape("a", site.rank))
        value = layout.to_leaf(core, "a", site.rank).astype(config.param_dtype)
        return x.replace_boxed(value) if tree.is_box(x) else value

    params, frozen = (tree.map_leaves(leaf, t) for t in (adapter.params, adapter.frozen))
    return Adapter(params, spec, frozen)


def _components(
    key: Array,
    model: nn.Module,
    variables: Mapping[str, Any],
    sites: tuple[Site, ...],
    most: Mapping[str, int],
    batches: list[Any],
    passes: int,
    kwargs: Any,
) -> dict[str, tuple[Array, np.ndarray]]:
    """{path: (directions (*stack, *batch, most, inputs), their mean shares of the variance)}."""
    layouts = {s.path: dataclasses.replace(s.layout, blocks=()) for s in sites}
    widths = {s.path: min(s.layout.count("i"), most[s.path] + _SPARE) for s in sites}

    def outputs(probes: dict[str, Array], args: Any) -> Array:
        bound = tree.nested({path + BOUND: probe for path, probe in probes.items()})

        def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_method(*args, **kwargs)
            rule = layers.rule_for(context.orig_method)
            linear = rule(context.module, *args, **kwargs) if rule else None
            probe = linear and context.module.get_variable("params", linear.param + BOUND)
            return y if linear is None or probe is None else _probed(linear, y, probe)

        params = tree.union(variables["params"], bound)
        with nn.intercept_methods(intercept):
            out = model.apply({**variables, "params": params}, *args, **kwargs)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x) for x in floats)  # type: ignore[return-value]

    products = jax.jit(jax.grad(outputs))
    rows = {
        path: jax.random.normal(
            jax.random.fold_in(key, tree.path_hash(path)),
            (*layout.sizes("s"), *layout.sizes("b"), widths[path], layout.count("i")),
        )
        for path, layout in layouts.items()
    }
    shares = {}
    for _ in range(passes):
        rows = {path: _orthogonal(x) for path, x in rows.items()}
        probes = {path: _to_leaf(layouts[path], x) for path, x in rows.items()}
        total = None
        for args in batches:
            one = products(probes, args)
            total = one if total is None else jax.tree.map(jnp.add, total, one)
        assert total is not None
        for path, leaf in total.items():
            rows[path], shares[path] = _centered(layouts[path], rows[path], leaf)
    return {path: (x, shares[path]) for path, x in rows.items()}


def _probed(linear: Linear, y: Array, probe: Array) -> Array:
    """The layer's output; the gradient of the probe is the inputs' second moments times it."""
    if linear.run is not None:
        raise TargetError(f"EVA needs a product of matrices, {linear.param} is none. `exclude` it.")

    @jax.custom_vjp
    def attach(y: Array, x: Array, probe: Array) -> Array:
        return y

    def forward(y: Array, x: Array, probe: Array) -> tuple[Array, Any]:
        return y, (x, probe)

    def backward(kept: Any, g: Array) -> tuple[Array, Array, Array]:
        x, probe = kept
        return g, jnp.zeros_like(x), _moments(linear, x, probe)

    attach.defvjp(forward, backward)
    return attach(y, linear.x, probe)


def _moments(linear: Linear, x: Array, probe: Array) -> Array:
    letters, kernel, out = linear.letters()
    batch = "".join(c for c in kernel if c in letters and c in out)
    inner = "".join(c for c in kernel if c in letters and c not in out)
    free = "".join(c for c in letters if c not in kernel)
    sizes = dict(zip(letters, x.shape, strict=True))
    count = math.prod(sizes[c] for c in free)
    lead, width = [sizes[c] for c in batch], math.prod(sizes[c] for c in inner)
    x = jnp.transpose(x, [letters.index(c) for c in batch + free + inner])
    x = x.reshape(*lead, count, width).astype(jnp.float32)
    rows = probe.reshape(*lead, -1, width)[..., :-_SUMS, :]
    with jax.default_matmul_precision("highest"):
        moments = jnp.swapaxes(x, -1, -2) @ (x @ jnp.swapaxes(rows, -1, -2))
    sums = [x.sum(-2), (x**2).sum(-2), jnp.full((*lead, width), count, x.dtype)]
    found = jnp.concatenate([jnp.swapaxes(moments, -1, -2), jnp.stack(sums, -2)], -2)
    return found.reshape(probe.shape)


def _centered(layout: KernelLayout, rows: Array, leaf: Array) -> tuple[Array, np.ndarray]:
    """The principal directions so far, best first, and their mean shares of the variance."""
    width = rows.shape[-2] + _SUMS
    found = layout.from_leaf(leaf, "a", width).reshape(*rows.shape[:-2], width, rows.shape[-1])
    products, (total, squares, count) = (
        found[..., :-_SUMS, :],
        jnp.moveaxis(found[..., -_SUMS:, :], -2, 0),
    )
    mean = total / count
    with jax.default_matmul_precision("highest"):
        along = jnp.sum(rows * total[..., None, :], -1, keepdims=True)
        covariance = products - along * mean[..., None, :]
        small = covariance @ jnp.swapaxes(rows, -1, -2)
        values, vectors = jnp.linalg.eigh((small + jnp.swapaxes(small, -1, -2)) / 2)
        order = vectors[..., ::-1]
        better = jnp.swapaxes(order, -1, -2) @ covariance
    variance = jnp.sum(squares - total * mean, -1, keepdims=True)
    share = np.asarray(values[..., ::-1] / jnp.maximum(variance, 1e-30))
    return _orthogonal(better), share.reshape(-1, share.shape[-1]).mean(0)


def _orthogonal(rows: Array) -> Array:
    return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(rows, -1, -2))[0], -1, -2)


def _to_leaf(layout: KernelLayout, rows: Array) -> Array:
    x = jnp.concatenate([rows, jnp.zeros((*rows.shape[:-2], _SUMS, rows.shape[-1]))], -2)
    width = x.shape[-2]
    return layout.to_leaf(x.reshape(layout.full_shape("a", width)), "a", width)


def _shared_out(
    sites: tuple[Site, ...], shares: Mapping[str, np.ndarray], most: Mapping[str, int]
) -> dict[str, int]:
    """The ranks: the first component of each site, then the largest shares of all."""
    ranks = dict.fromkeys((site.path for site in sites), 1)
    budget = sum(site.rank for site in sites) - len(sites)
    rest = sorted(
        ((-share, path, n) for path, found in shares.items() for n, share in enumerate(found) if n),
    )
    for _, path, n in rest:
        if budget and n < most[path]:
            ranks[path] += 1
            budget -= 1
    return ranks
