"""A LoRA training step as a TPU's own compiler sees it, ours and the peers', without a TPU.

    pip install 'jaxlora[topology]'
    python -m benchmarks.tpu                 # a v5e, about 20 minutes on 2 cores
    python -m benchmarks.tpu --topology v6e:2x2 --cases "all r=8"

Nothing runs: each step of the decoder of step.py is compiled for one chip, and the compiler's
counts are read: FLOPs, bytes read from and written to memory, and the most that it holds.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import results
from benchmarks.decoder import Shape
from benchmarks.measuring import progress
from benchmarks.programs import Program, compiled_for
from benchmarks.step import PEERS, TARGETS
from benchmarks.ways import WAYS, Lora, fits
from jaxlora.backend import traced_for
from jaxlora.tasks.topology import topology_devices

CASES: dict[str, tuple[str, int, dict[str, Any], float]] = {
    "q,v r=8": ("q,v", 8, {}, 0.0),
    "all r=8": ("all", 8, {}, 0.0),
    "all r=64": ("all", 64, {}, 0.0),
    "all r=8, scanned, remat": ("all", 8, {"scan": True, "remat": True}, 0.0),
    "all r=8, dropout 0.1": ("all", 8, {}, 0.1),
}
"""{title: (targets, rank, how the layers run, dropout)}."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="one chip of it is compiled for")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/tpu.json"))
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    device = topology_devices(options.topology)[0]
    tables = [counted(title, *CASES[title], device, options) for title in options.cases]
    results.write(
        options.out,
        "Training step, compiled for a TPU",
        f"{options.layers} layers of width {options.width}, {options.rows} x {options.sequence} "
        f"tokens, {options.dtype}, adam, as the compiler of libtpu plans it for one chip. Nothing "
        "was run: these are its counts, not times. Bytes: read from and written to memory. Temp: "
        "what it holds beside params, adapter and optimizer.",
        tables,
        device=f"none: compiled for {device.device_kind}",
        settings=vars(options),
    )


def counted(
    title: str,
    targets: str,
    rank: int,
    how: dict[str, Any],
    dropout: float,
    device: Any,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The table of one case."""
    shape = Shape(options.layers, options.width, options.heads, jnp.dtype(options.dtype), **how)
    x = jnp.zeros((options.rows, options.sequence, options.width), shape.dtype)
    lora = Lora(targets, TARGETS[targets], rank, dropout)
    ways = ["full", "jaxlora", *PEERS]
    found: dict[str, Program] = {}
    with progress() as bar, traced_for("tpu"), compiled_for(SingleDeviceSharding(device)):
        for way in bar.track(ways, description=f"compiling: {title}"):
            own = None if way == "full" else lora
            if fits(way, shape, own):
                found[way] = WAYS[way](shape, x, own)
    base = found["full"]
    rows = [
        [
            way,
            one.flops / base.flops,
            one.bytes_accessed / base.bytes_accessed,
            one.temp_mib / base.temp_mib if one.temp_mib and base.temp_mib else None,
            one.flops / 1e9,
            one.bytes_accessed / 1e9,
            one.temp_mib,
        ]
        for way, one in found.items()
    ]
    columns = ["way", "FLOPs / full", "bytes / full", "temp / full", "GFLOPs", "GB", "temp, MiB"]
    return results.table(title, columns, rows)


if __name__ == "__main__":
    main()
