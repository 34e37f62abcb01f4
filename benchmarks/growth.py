"""How time and compilation grow with the layers, the rank and the number of adapted kernels.

    python -m benchmarks.growth
    python -m benchmarks.growth --layers 2 6 --ranks 1 8 --sites 10 30 --rounds 2

The width is small, so that tracing, compiling and dispatch show. Writes plots beside the table.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl

import jaxlora as jl
from benchmarks import floor, results
from benchmarks.decoder import Shape
from benchmarks.measuring import in_turn, progress
from benchmarks.programs import Program, program
from benchmarks.ways import Lora, filled, full, ours

mpl.use("svg")
import matplotlib.pyplot as plt


class Stack(nn.Module):
    """So many small Dense layers: as many kernels to adapt."""

    sites: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, width) to the same."""
        for n in range(self.sites):
            x = x + jnp.tanh(nn.Dense(x.shape[-1], name=f"dense_{n}")(x))
        return x


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6, 12, 24, 48, 96])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--width", type=int, default=64, help="of the decoder with many layers")
    parser.add_argument("--rank-width", type=int, default=512, help="of that with many ranks")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/growth.json"))
    parser.add_argument("--plots", type=Path, default=Path("docs/plots"))
    options = parser.parse_args(arguments)

    sweeps = {
        "layers": ("full", options.layers, lambda n: by_layers(options, n)),
        "rank": ("full", options.ranks, lambda n: by_rank(options, n)),
        "sites": ("base", options.sites, lambda n: by_sites(n)),
    }
    tables, plots = [], []
    for name, (base, counts, make) in sweeps.items():
        rows = swept(name, counts, make, options.rounds)
        columns = [name, f"time / {base}", f"trace / {base}", f"compile / {base}"]
        columns += [
            f"both / {base}",
            "trace, s",
            "compile, s",
            f"trace of {base}, s",
            f"compile of {base}, s",
            "ms",
        ]
        tables.append(results.table(TITLES[name].format(**vars(options)), columns, rows))
        plots.append(str(plotted(options.plots, name, base, rows)))
    results.write(
        options.out,
        "Growth",
        "Ratios to the same model without an adapter: a training step to that of full "
        "fine-tuning, a forward pass to the base's. All linear layers are adapted. Tracing is "
        "timed twice and the faster counts, compiling once. Both: tracing and compiling together.",
        tables,
        device=jax.devices()[0].device_kind,
        settings=vars(options),
        plots=plots,
    )


TITLES = {
    "layers": "Layers: a step of an unrolled decoder of width {width}, r=8, {tokens} tokens",
    "rank": "Rank: a step of 2 decoder layers of width {rank_width}, {tokens} tokens",
    "sites": "Sites: a forward pass of a stack of Dense layers of width 16, r=4",
}


def swept(
    name: str, counts: list[int], make: Callable[[int], list[Program]], rounds: int
) -> list[list[Any]]:
    """A row for each count; the second program is compared with the first."""
    rows = []
    with progress() as bar:
        pairs = [(n, make(n)) for n in bar.track(counts, description=f"compiling: {name}")]
    for n, (base, own) in pairs:
        times = in_turn({"base": base.__call__, "own": own.__call__}, rounds, f"{name} {n}")
        rows.append(
            [
                n,
                times["own"].over(times["base"]),
                own.trace_seconds / base.trace_seconds,
                own.compile_seconds / base.compile_seconds,
                (own.trace_seconds + own.compile_seconds)
                / (base.trace_seconds + base.compile_seconds),
                own.trace_seconds,
                own.compile_seconds,
                base.trace_seconds,
                base.compile_seconds,
                times["own"].median_ms,
            ]
        )
    return rows


def by_layers(options: argparse.Namespace, layers: int) -> list[Program]:
    """Full fine-tuning and LoRA of a decoder with so many layers."""
    return steps(Shape(layers, options.width), 8, options.tokens)


def by_rank(options: argparse.Namespace, rank: int) -> list[Program]:
    """Full fine-tuning and LoRA of a rank."""
    return steps(Shape(2, options.rank_width), rank, options.tokens)


def steps(shape: Shape, rank: int, tokens: int) -> list[Program]:
    """A step of full fine-tuning, and one of LoRA on all linear layers."""
    x = jax.random.normal(jax.random.key(0), (4, tokens // 4, shape.width))
    return [full(shape, x, None), ours(shape, x, Lora("all", floor.ALL, rank))]


def by_sites(sites: int) -> list[Program]:
    """The forward pass of a model of so many kernels, and that with all of them adapted."""
    model, x = Stack(sites), jnp.ones((8, 16))
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    config = jl.LoraConfig(rank=4, targets="all-linear")
    adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
    adapter = dataclasses.replace(adapter, params=filled(adapter.params))

    def base(variables: Any, x: Any) -> Any:
        return model.apply(variables, x)

    def adapted(variables: Any, adapter: Any, x: Any) -> Any:
        return jl.lora_apply(model, variables, adapter, x)

    return [program(base, variables, x), program(adapted, variables, adapter, x)]


def plotted(folder: Path, name: str, base: str, rows: list[list[Any]]) -> Path:
    """A small plot of the ratios."""
    labels = "time", "trace", "compile"
    with mpl.rc_context({"svg.hashsalt": "jaxlora", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.5, 2.8), layout="constrained")
        for column, label in enumerate(labels, 1):
            axes.plot([row[0] for row in rows], [row[column] for row in rows], "o-", label=label)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(xscale="log", xlabel=name, ylabel=f"jaxlora / {base}", ylim=(0, None))
        axes.set_xticks([row[0] for row in rows], [str(row[0]) for row in rows])
        axes.minorticks_off()
        axes.legend(frameon=False)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"growth-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


if __name__ == "__main__":
    main()
