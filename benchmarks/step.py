"""A LoRA step against full fine-tuning, and unmerged and merged inference against the base.

    python benchmarks/step.py [--width 512] [--tokens 512] [--ranks 8 64]

All ways run in turn within one process; the ratios count, the absolute times are the machine's.
Prints a table and writes JSON with the machine and the versions.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxlora as jl


class Decoder(nn.Module):
    """Pre-norm decoder layers: six linear kernels each."""

    layers: int
    width: int
    heads: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, sequence, width) to the same."""
        for i in range(self.layers):
            y = nn.LayerNorm(name=f"norm_a_{i}")(x)
            q, k, v = (
                nn.DenseGeneral((self.heads, self.width // self.heads), name=f"{name}_{i}")(y)
                for name in ("query", "key", "value")
            )
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + nn.DenseGeneral(self.width, axis=(-2, -1), name=f"out_{i}")(y)
            y = nn.gelu(
                nn.Dense(4 * self.width, name=f"up_{i}")(nn.LayerNorm(name=f"norm_b_{i}")(x))
            )
            x = x + nn.Dense(self.width, name=f"down_{i}")(y)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step.json"))
    parser.add_argument("--markdown", type=Path, help="write the table as a page, too")
    options = parser.parse_args()

    rows = measure(options)
    table = Table("way", "ms", "of full or base", "FLOPs of full or base")
    for row in rows:
        table.add_row(row["way"], f"{row['ms']:.1f}", f"{row['time']:.2f}", f"{row['flops']:.2f}")
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "markdown")}
    options.out.write_text(
        json.dumps({"rows": rows, "settings": settings, "machine": machine()}, indent=2)
    )
    print(f"written to {options.out}")
    if options.markdown:
        options.markdown.write_text(markdown(rows, options))
        print(f"written to {options.markdown}")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = Decoder(options.layers, options.width)
    x = jax.random.normal(jax.random.key(0), (4, options.tokens // 4, options.width))
    variables = model.init(jax.random.key(1), x)
    tx = optax.adam(1e-4)

    def full_loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(jnp.asarray(model.apply({"params": params}, x))))

    def full_step(params: Any, state: Any) -> Any:
        grads = jax.grad(full_loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params = variables["params"]
    steps: dict[str, Any] = {
        "full": (compiled(full_step, params, tx.init(params)), (params, tx.init(params)))
    }
    base = compiled(lambda v: model.apply(v, x), variables)
    runs: dict[str, Any] = {"base": (base, (variables,))}
    for targets, name in (("all-linear", "all"), (r"(query|value)_\d+", "q,v")):
        for rank in options.ranks:
            config = jl.LoraConfig(rank=rank, targets=targets)
            adapter = jl.lora_init(jax.random.key(2), model, variables, config, x)

            def step(adapter: Any, state: Any, base: Any) -> Any:
                def loss(adapter: Any) -> jax.Array:
                    return jnp.mean(jl.lora_apply(model, base, adapter, x) ** 2)

                grads = jax.grad(loss)(adapter)
                updates, state = tx.update(grads.params, state)
                params = optax.apply_updates(adapter.params, updates)
                return dataclasses.replace(adapter, params=params), state

            args: Any = (adapter, tx.init(adapter.params), variables)
            steps[f"LoRA {name} r={rank}"] = (compiled(step, *args), args)
            if name == "all":
                args = (variables, adapter)
                unmerged = compiled(lambda v, a: jl.lora_apply(model, v, a, x), *args)
                runs[f"unmerged {name} r={rank}"] = (unmerged, args)
                folded = {"params": jl.merge(variables["params"], adapter)}
                runs[f"merged {name} r={rank}"] = (base, (folded,))
    rows = compare("step", steps, options.rounds) + compare("inference", runs, options.rounds)
    return rows


def compiled(fn: Any, *args: Any) -> Any:
    return jax.jit(fn).lower(*args).compile()


def compare(kind: str, ways: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Medians of the ways run in turn, and ratios to the first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run, args in ways.values():
        jax.block_until_ready(run(*args))
    for _ in range(rounds):
        for name, (run, args) in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            times[name].append(time.perf_counter() - start)
    flops = {name: run.cost_analysis()["flops"] for name, (run, _) in ways.items()}
    first = next(iter(ways))
    return [
        {
            "way": f"{kind}: {name}",
            "ms": 1e3 * statistics.median(seconds),
            "spread_ms": 1e3 * (max(seconds) - min(seconds)),
            "time": statistics.median(a / b for a, b in zip(seconds, times[first], strict=True)),
            "flops": flops[name] / flops[first],
        }
        for name, seconds in times.items()
    ]


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The page BENCHMARKS.md."""
    at = machine()
    versions = ", ".join(f"{name} {number}" for name, number in at["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`; not edited by hand. Ratios are medians within one run, all ways in",
        "turn; absolute times are the machine's and mean little.",
        "",
        f"{options.layers} decoder layers of width {options.width}, {options.tokens} tokens,",
        f"float32, all six linear kernels of a layer or query and value; {at['device']},",
        f"{at['cores']} cores ({at['platform']}); {versions}.",
        "",
        "| way | ms | of full or base | FLOPs of full or base |",
        "|---|---|---|---|",
        *(
            f"| {row['way']} | {row['ms']:.1f} | {row['time']:.2f} | {row['flops']:.2f} |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


if __name__ == "__main__":
    main()
