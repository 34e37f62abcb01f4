"""`plan`: what an adapter will hold, before any array of it exists."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import flax.linen as nn
import jax.numpy as jnp

from jaxlora import tree
from jaxlora.adapter import SavedLeaf, Site, Spec
from jaxlora.apply import base_params, lora_apply
from jaxlora.config import LoraConfig
from jaxlora.discover import Seen, Use, discover, trace
from jaxlora.dispatch import by_model
from jaxlora.errors import ConfigError, LoraError, TargetError, listing
from jaxlora.initializers import initializer
from jaxlora.layout import KernelLayout
from jaxlora.targets import Targets, check_patterns_used, pattern_value


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an adapter will hold. `print(plan)` shows it as a table.

    Attributes:
      spec: the sites and the leaves trained in full.
      num_base: the number of the base's parameters.
      base_nbytes: their bytes, a quantized base's as it is stored.
    """

    spec: Spec
    num_base: int
    base_nbytes: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """The kernels to adapt, sorted by path."""
        return self.spec.sites

    @property
    def num_trainable(self) -> int:
        """The number of trained parameters."""
        return sum(math.prod(shape) for shape in self.spec.leaf_shapes.values())

    @property
    def num_total(self) -> int:
        """The base's parameters and the factors'; a leaf trained in full counts once."""
        return self.spec.total(self.num_base)

    @property
    def nbytes(self) -> int:
        """The bytes of the trained leaves."""
        return self.num_trainable * jnp.dtype(self.spec.config.param_dtype).itemsize

    def __str__(self) -> str:
        head = ("path", "kind", "kernel", "rank", "scaling", "parameters")
        rows = [_row(site) for site in self.sites] + [_saved_row(leaf) for leaf in self.spec.saved]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        rule = tuple("-" * width for width in widths)
        lines = ["  ".join(_padded(row, widths)).rstrip() for row in (head, rule, *rows)]
        if any(site.wasteful() for site in self.sites):
            lines.append("* rank above the kernel's smaller side: it can give no other update")
        share = 100 * self.num_trainable / self.num_total
        lines.append(
            f"{len(self.sites)} kernels adapted, {self.num_trainable:,} of {self.num_total:,} "
            f"parameters trainable ({share:.4f}%)"
        )
        lines.append(
            f"{self.nbytes / 1e6:,.2f} MB to train on a base of {self.base_nbytes / 1e6:,.2f} MB"
        )
        return "\n".join(lines)


@overload
def plan(
    model: nn.Module, variables: Mapping[str, Any], config: LoraConfig, *args: Any, **kwargs: Any
) -> Plan: ...
@overload
def plan(model: Any, config: LoraConfig, *args: Any, **kwargs: Any) -> Plan: ...
@by_model()
def plan(
    model: nn.Module, variables: Mapping[str, Any], config: LoraConfig, *args: Any, **kwargs: Any
) -> Plan:
    """Finds what a config adapts in a model.

    The model is traced twice with `jax.eval_shape`: once to find the layers, and once under
    `lora_apply` with what was found, so that what a plan promises has been run.

    Args:
      model: a Flax Linen module.
      variables: its variables; ShapeDtypeStructs will do, as `jax.eval_shape` returns them.
      config: what to adapt.
      *args: example inputs for `model.apply`; arrays or ShapeDtypeStructs, never computed with.
      **kwargs: keyword arguments for `model.apply`: `rngs`, `method`, the model's own.

    Returns:
      The plan. No array is allocated: GPT-3 175B takes seconds.

    Raises:
      TargetError: a pattern that matches nothing, or a layer that cannot be adapted.
      ModelError: the model rejects the example inputs.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Dense(512), jax.ShapeDtypeStruct((8, 256), jnp.float32)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> print(jl.plan(model, variables, jl.LoraConfig(rank=4), x))
      path    kind   kernel      rank  scaling  parameters
      ------  -----  ----------  ----  -------  ----------
      kernel  Dense  (256, 512)  4     4             3,072
      1 kernels adapted, 3,072 of 134,656 parameters trainable (2.2814%)
      0.01 MB to train on a base of 0.53 MB
    """
    params = base_params(model, variables)

    def see(candidates: set[str]) -> Seen:
        in_weights = config.mode == "weights"
        return discover(model, variables, candidates, args, kwargs, in_weights=in_weights)

    planned = plan_of(params, config, see)

    def rehearse(variables: Any, args: Any, kwargs: Any) -> None:
        lora_apply(model, variables, variables.pop("adapter"), *args, **kwargs)

    trace(rehearse, {**variables, "adapter": planned.spec.abstract()}, args, kwargs)
    return planned


def plan_of(params: tree.Tree, config: LoraConfig, see: Callable[[set[str]], Seen]) -> Plan:
    """The plan for params of a model of any kind.

    Args:
      params: the base params.
      config: what to adapt.
      see: finds how the model uses the kernels at the paths that it is given.

    Returns:
      The plan; nothing of it has been run.

    Raises:
      LoraError: as `plan`.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"The config is a {type(config).__name__}, expected a LoraConfig.")
    lora = [path for path, _ in tree.items(params) if tree.is_lora_name(path)]
    if lora:
        raise LoraError(
            f"The params hold LoRA leaves already: {listing(lora)}. Expected a base: "
            "`split(joint_params)` takes it out of a joint tree."
        )
    leaves = {path: tree.aval(x) for path, x in tree.items(params)}
    targets = Targets(leaves, config)
    seen = see(targets.candidates | set(targets.tables))
    uses = targets.adapted(seen)
    check_patterns_used("rank_pattern", config.rank_pattern, uses)
    check_patterns_used("alpha_pattern", config.alpha_pattern, uses)
    check_patterns_used("fused", config.fused, uses)
    check_patterns_used("roles", config.roles, [path for path, use in uses.items() if use.weights])
    whole = [SavedLeaf(p, tuple(leaves[p].shape)) for p in targets.saved | targets.biases(uses)]
    spec = Spec(
        config=config,
        sites=tuple(_site(path, use, leaves[path], config) for path, use in sorted(uses.items())),
        saved=tuple(sorted([*whole, *targets.rows(seen, uses)], key=lambda leaf: leaf.path)),
    )
    return Plan(spec, num_base=tree.size(leaves), base_nbytes=tree.nbytes(params))


def _site(path: str, use: Use, leaf: Any, config: LoraConfig) -> Site:
    layout = KernelLayout(tuple(leaf.shape), use.roles, use.stack)
    blocks = pattern_value("fused", config.fused, path, ())
    if blocks:
        layout = _fused(layout, blocks, path)
        if config.dora:
            raise TargetError(
                f"fused and dora both apply to {path}, expected one: trained magnitudes would "
                "change the blocks that are left out."
            )
    rank = pattern_value("rank_pattern", config.rank_pattern, path, config.rank)
    alpha = pattern_value("alpha_pattern", config.alpha_pattern, path, config.alpha)
    if use.lookup and config.freeze_a:
        raise TargetError(
            f"freeze_a applies to the table {path}, whose A starts at zero and would stay there. "
            "`exclude` it, or use freeze_a=False."
        )
    return Site(
        path,
        use.kind,
        layout,
        rank,
        config.scaling(rank, alpha),
        lookup=use.lookup,
        dora=config.dora,
        keeps_start=initializer(config.init).keeps_start,
        freeze_a=config.freeze_a,
        weights=use.weights,
    )


def _fused(layout: KernelLayout, blocks: tuple[bool, ...], path: str) -> KernelLayout:
    outputs, sizes = layout.axes("o"), layout.sizes("o")
    axis = outputs[sizes.index(len(blocks))] if len(blocks) in sizes else outputs[-1]
    if layout.shape[axis] % len(blocks):
        raise TargetError(
            f"fused gives {path} {len(blocks)} blocks, but its outputs are {sizes}: expected an "
            f"axis of {len(blocks)}, or a last one that {len(blocks)} divides."
        )
    return dataclasses.replace(layout, blocks=blocks, block_axis=axis)


def _row(site: Site) -> tuple[str, ...]:
    count = sum(map(math.prod, site.leaf_shapes(site.trained).values()))
    rank = f"{site.rank}{' *' if site.wasteful() else ''}"
    shape, scaling = str(site.layout.shape), f"{site.scaling:.4g}"
    kind = f"{site.kind} (weights)" if site.weights else site.kind
    return site.path, kind, shape, rank, scaling, f"{count:,}"


def _saved_row(leaf: SavedLeaf) -> tuple[str, ...]:
    kind = f"{len(leaf.rows)} rows trained" if leaf.rows else "trained in full"
    return leaf.path, kind, str(leaf.shape), "", "", f"{math.prod(leaf.leaf_shape):,}"


def _padded(row: tuple[str, ...], widths: list[int]) -> list[str]:
    *left, last = zip(row, widths, strict=True)
    return [cell.ljust(width) for cell, width in left] + [last[0].rjust(last[1])]
