"""Merge, unmerge, switch, save and load, against copying and against safetensors.

    python -m benchmarks.merging [--layers 8] [--width 2048] [--ranks 8 64]

A merge reads and writes each kernel once, as a copy does: "of a copy" is the time of copying the
same kernels over its own, so 1 is a copy's bandwidth.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from safetensors.flax import load_file, save_file

import jaxlora as jl
from benchmarks import results
from benchmarks.measuring import Times, in_turn, progress
from jaxlora import tree

IN_PLACE = "merge in the base's buffers"


class Stack(nn.Module):
    """Square layers without a bias: their kernels are all there is."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, width) to the same."""
        for n in range(self.layers):
            x = nn.Dense(self.width, use_bias=False, name=f"layer_{n}")(x)
        return x


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/merging.json"))
    options = parser.parse_args(arguments)
    model = Stack(options.layers, options.width)
    params = model.init(jax.random.key(0), jnp.ones((1, options.width)))["params"]
    tables = []
    for rank in options.ranks:
        adapters = [made(model, params, rank, seed) for seed in (1, 2)]
        tables += [merging(params, adapters, rank, options), files(params, adapters[0], options)]
    results.write(
        options.out,
        "Merge, switch, save",
        "Float32 kernels in memory, leaf by leaf.",
        tables,
        device=jax.devices()[0].device_kind,
        settings=vars(options),
    )


def made(model: nn.Module, params: Any, rank: int, seed: int) -> jl.Adapter:
    """An adapter of all kernels, no leaf of it zero."""
    config = jl.LoraConfig(rank=rank)
    x = jnp.ones((1, model.width))  # type: ignore[attr-defined]
    adapter = jl.lora_init(jax.random.key(seed), model, {"params": params}, config, x)
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    return jax.tree.map(
        lambda leaf: leaf + 0.01 * jax.random.normal(next(keys), leaf.shape), adapter
    )


def merging(params: Any, adapters: list[jl.Adapter], rank: int, options: Any) -> dict[str, Any]:
    """The table of merges of one rank."""
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    merged = jl.merge(params, adapters[0])
    spare: dict[str, Any] = {}

    def prepared(name: str, source: Any) -> None:
        spare[name] = jax.block_until_ready(copy(source))

    def switched() -> None:
        # From the kept base: what was merged is let go, and the next adapter takes its place.
        spare["switch"] = None
        spare["switch"] = jax.block_until_ready(jl.merge(params, adapters[1]))

    ways = {
        "copy": lambda: jax.block_until_ready(copy(params)),
        "merge": lambda: jax.block_until_ready(jl.merge(params, adapters[0])),
        "unmerge": lambda: jax.block_until_ready(jl.unmerge(merged, adapters[0])),
        "switch, from the kept base": switched,
        IN_PLACE: lambda: jax.block_until_ready(
            jl.merge(spare.pop("donated"), adapters[0], donate=True)
        ),
    }
    prepared("switch", merged)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with progress() as bar:
        for n in bar.track(range(-2, options.rounds), description=f"merge, rank {rank}"):
            for name, way in ways.items():
                if name == IN_PLACE:
                    prepared("donated", params)
                start = time.perf_counter()
                way()
                if n >= 0:
                    seconds[name].append(time.perf_counter() - start)
    found = {name: Times(tuple(times)) for name, times in seconds.items()}
    moved = 2 * tree.size(params) * 4
    copied = found["copy"]
    rows = [
        [name, copied.over(times), copied.over_at_best(times), moved / times.median_ms / 1e6]
        for name, times in found.items()
    ]
    title = f"Rank {rank}: {options.layers} kernels of {options.width} x {options.width}"
    columns = ["way", "of a copy's speed", "at best", "GB/s read and written"]
    return results.table(title, columns, rows)


def files(params: Any, adapter: jl.Adapter, options: Any) -> dict[str, Any]:
    """The table of saving and loading the adapter and the whole model."""
    folder = Path(tempfile.mkdtemp())
    whole = dict(tree.items(jl.merge(params, adapter)))
    leaves = adapter.values()

    adapter_dir, bare, model = folder / "adapter", folder / "leaves.st", folder / "model.st"
    ways: dict[tuple[str, Path], Any] = {
        ("save the adapter, Orbax", adapter_dir): lambda: jl.save_adapter(
            adapter_dir, adapter, params=params, overwrite=True
        ),
        ("load the adapter, Orbax", adapter_dir): lambda: jl.load_adapter(
            adapter_dir, params=params
        ),
        ("save its leaves, safetensors", bare): lambda: save_file(leaves, bare),
        ("load its leaves, safetensors", bare): lambda: load_file(bare),
        ("save the merged model, safetensors", model): lambda: save_file(whole, model),
        ("load the merged model, safetensors", model): lambda: load_file(model),
    }
    try:
        rounds = max(1, options.rounds // 3)
        for (what, _), way in ways.items():
            if what.startswith("save"):
                way()  # the loads need something to load
        named = {name: way for (name, _), way in ways.items()}
        times = in_turn(named, rounds, "files", warmup=1)
        sizes = {name: bytes_of(path) for name, path in ways}
    finally:
        shutil.rmtree(folder)
    of_leaves = 4 * sum(leaf.size for leaf in leaves.values())
    rows = [
        [
            name,
            found.over(times[f"{name.split()[0]} the merged model, safetensors"]),
            found.median_ms,
            sizes[name] / 1e6,
            sizes[name] / of_leaves,
        ]
        for name, found in times.items()
    ]
    columns = ["way", "time of the model's", "ms", "MB", "bytes over the adapter's leaves"]
    return results.table(f"Files, rank {adapter.spec.sites[0].rank}", columns, rows)


def bytes_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in found)


if __name__ == "__main__":
    main()
