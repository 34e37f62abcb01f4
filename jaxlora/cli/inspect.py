"""`jaxlora inspect PATH`."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxlora import runs
from jaxlora.adapter import Spec
from jaxlora.checkpoint import load_adapter
from jaxlora.cli import show
from jaxlora.cli.options import parse, positional
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
    settings = runs.read_config(path).items()
    show.table(str(path), ("setting", "value"), [(name, str(value)) for name, value in settings])
    scores = [row for row in runs.Run(path, resume=True).history() if _is_evaluation(row)]
    if scores:
        rows = [[f"{value:.4g}" for value in row.values()] for row in scores]
        show.table("evaluations", list(scores[-1]), rows)
    there = [name for name in (runs.BEST, runs.LAST) if (path / name).is_dir()]
    if there:
        _adapter(path / there[0])


def _is_evaluation(row: dict[str, float]) -> bool:
    return any(name.startswith(runs.VALID) for name in row)


def _adapter(path: Path) -> None:
    spec = load_adapter(path).spec
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    columns = ("path", "kind", "kernel", "rank", "scaling", "params")
    show.table(str(path), columns, _sites(spec))
    shapes = spec.leaf_shapes
    bytes_of = jnp.dtype(spec.config.param_dtype).itemsize
    count = sum(map(math.prod, shapes.values()))
    show.line(
        f"{len(spec.sites)} kernels, {len(spec.saved)} leaves trained in full, {count:,} parameters"
        f" of {count * bytes_of / 1e6:.2f} MB; the checkpoint has {size / 1e6:.2f} MB"
    )


def _sites(spec: Spec) -> Iterator[tuple[str, ...]]:
    for site in spec.sites:
        count = sum(map(math.prod, site.leaf_shapes(site.trained).values()))
        shape = str(site.layout.shape)
        yield site.path, site.kind, shape, str(site.rank), f"{site.scaling:g}", f"{count:,}"
    for leaf in spec.saved:
        yield leaf.path, "in full", str(leaf.shape), "", "", f"{math.prod(leaf.leaf_shape):,}"


def _model(options: Inspect) -> None:
    chosen = {} if options.head is None else {"head": options.head}
    model, params, _ = load_model(options.path, key=jax.random.key(0), **chosen)
    settings = Settings(rank=options.rank, targets=options.targets)
    config = adapter_config(settings, params)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    show.line(str(plan(model, {"params": params}, config, example)))
