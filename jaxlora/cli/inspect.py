"""`jaxlora inspect PATH`."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxlora import runs
from jaxlora.adapter import Spec
from jaxlora.checkpoint import load_adapter
from jaxlora.cli.options import parse, positional
from jaxlora.errors import optional
from jaxlora.plan import plan
from jaxlora.tasks.base import Settings, adapter_config, load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show a run, an adapter's checkpoint, or what of a model would be adapted.

    Example: jaxlora inspect smollm2 --targets qv --rank 4
    """

    path: Annotated[str, positional]
    """A run's folder, a checkpoint, or a model: a name of `jaxlora fetch`, a folder, a hub id."""
    head: Literal["lm", "classification", "token", "embedding", "none"] | None = None
    """The head to give a model; default: the first that it has."""
    rank: int = 8
    """Rank to plan a model with."""
    targets: str = "default"
    """default, qv, all-linear, or a pattern of layers to plan a model with."""


def run(argv: Sequence[str]) -> int:
    """Find out what the path is, and print it."""
    options = parse(Inspect, argv, "jaxlora inspect")
    path = Path(options.path)
    if (path / runs.CONFIG).is_file():
        _run(path)
    elif (path / "adapter" / "metadata").is_file():
        _adapter(path)
    else:
        _model(options)
    return 0


def _run(path: Path) -> None:
    table = _rich("table").Table("setting", "value", title=str(path))
    for name, value in runs.read_config(path).items():
        table.add_row(name, str(value))
    _print(table)
    scores = [row for row in runs.Run(path, resume=True).history() if _is_evaluation(row)]
    if scores:
        table = _rich("table").Table(*scores[-1], title="evaluations")
        for row in scores:
            table.add_row(*(f"{value:.4g}" for value in row.values()))
        _print(table)
    there = [name for name in (runs.BEST, runs.LAST) if (path / name).is_dir()]
    if there:
        _adapter(path / there[0])


def _is_evaluation(row: dict[str, float]) -> bool:
    return any(name.startswith(runs.VALID) for name in row)


def _adapter(path: Path) -> None:
    spec = load_adapter(path).spec
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    _print(_sites(spec, str(path)))
    shapes = spec.leaf_shapes
    bytes_of = jnp.dtype(spec.config.param_dtype).itemsize
    count = sum(map(math.prod, shapes.values()))
    _print(
        f"{len(spec.sites)} kernels, {len(spec.saved)} leaves trained in full, {count:,} parameters"
        f" of {count * bytes_of / 1e6:.2f} MB; the checkpoint has {size / 1e6:.2f} MB"
    )


def _sites(spec: Spec, title: str) -> Any:
    table = _rich("table").Table(title=title)
    for name in ("path", "kind", "kernel", "rank", "scaling", "params"):
        table.add_column(name, overflow="fold")
    for site in spec.sites:
        count = sum(map(math.prod, site.leaf_shapes(site.trained).values()))
        shape = str(site.layout.shape)
        table.add_row(
            site.path, site.kind, shape, str(site.rank), f"{site.scaling:g}", f"{count:,}"
        )
    for leaf in spec.saved:
        count = math.prod(leaf.leaf_shape)
        table.add_row(leaf.path, "in full", str(leaf.shape), "", "", f"{count:,}")
    return table


def _model(options: Inspect) -> None:
    chosen = {} if options.head is None else {"head": options.head}
    model, params, _ = load_model(options.path, key=jax.random.key(0), **chosen)
    settings = Settings(rank=options.rank, targets=options.targets)
    config = adapter_config(settings, params)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    _print(str(plan(model, {"params": params}, config, example)))


def _rich(module: str) -> Any:
    return optional(f"rich.{module}", "The command line", "train")


def _print(what: Any) -> None:
    _rich("console").Console().print(what, markup=False, highlight=False, soft_wrap=True)
