"""A LoRA training step against full fine-tuning, ours and the peers', on the same decoder.

    python -m benchmarks.step                      # the default cases, below 8 minutes on 2 cores
    python -m benchmarks.step --cases dropout bf16
    python -m benchmarks.step --full               # every combination: many hours

All the ways of a case run in turn within one process and their ratios count. The FLOPs are those
of the compiled products, over the fewest that the step can do with (floor.py).
"""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import floor, results
from benchmarks.decoder import Shape
from benchmarks.measuring import Times, in_turn, progress
from benchmarks.programs import Program
from benchmarks.ways import WAYS, Lora, fits

PEERS = ("Qwix", "nnx.LoRA", "interceptor")
TARGETS = {"all": floor.ALL, "q,v": ("query", "value")}


@dataclasses.dataclass(frozen=True)
class Case:
    """One table: full fine-tuning and adapters on the same batch.

    Attributes:
      tokens: in a batch.
      sequence: tokens of one sequence.
      adapters: (targets, rank, ways) to compare.
      baselines: the ways to train everything.
    """

    tokens: int = 512
    sequence: int = 128
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False
    dropout: float = 0.0
    adapters: tuple[tuple[str, int, tuple[str, ...]], ...] = (("all", 8, ("jaxlora", "Qwix")),)
    baselines: tuple[str, ...] = ("full",)

    @property
    def title(self) -> str:
        """What differs from case to case."""
        words = [f"{self.tokens:,} tokens in sequences of {self.sequence}", self.dtype]
        words += ["scanned"] * self.scan + ["remat"] * self.remat
        return ", ".join(words + [f"adapter dropout {self.dropout}"] * bool(self.dropout))


ALL_WAYS = (("q,v", 8, ("jaxlora", *PEERS)), ("all", 8, ("jaxlora", "jaxlora, flat", *PEERS)))
BOTH = ("full", "full, flat")
CASES = {
    "512": Case(
        adapters=(
            *ALL_WAYS,
            ("all", 1, ("jaxlora",)),
            ("all", 64, ("jaxlora", "Qwix")),
            ("all", 256, ("jaxlora",)),
        ),
        baselines=BOTH,
    ),
    "2048": Case(
        tokens=2048, adapters=(("q,v", 8, ("jaxlora", "Qwix")), ("all", 8, ("jaxlora", "Qwix")))
    ),
    "long": Case(tokens=2048, sequence=512, adapters=ALL_WAYS, baselines=BOTH),
    "scan": Case(scan=True, adapters=(("all", 8, ("jaxlora", "Qwix", "interceptor")),)),
    "remat": Case(scan=True, remat=True),
    "dropout": Case(dropout=0.1),
    "bf16": Case(dtype="bfloat16"),
}
"""The default cases, by the names that --cases takes."""


def every_case() -> dict[str, Case]:
    """All combinations of the settings, targets, ranks and ways."""
    adapters = tuple(
        (name, rank, ("jaxlora", *PEERS)) for name in TARGETS for rank in (1, 8, 64, 256)
    )
    lengths = itertools.product((512, 2048, 8192), (128, 512))
    kinds = itertools.product(("float32", "bfloat16"), (False, True), (False, True), (0.0, 0.1))
    cases = [
        Case(*length, *kind, adapters=adapters, baselines=BOTH)
        for length, kind in itertools.product(lengths, kinds)
    ]
    return {case.title: case for case in cases}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--full", action="store_true", help="every combination instead")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="tokens of all the cases, for a trial")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step.json"))
    options = parser.parse_args(arguments)

    chosen = every_case() if options.full else {name: CASES[name] for name in options.cases}
    tables = []
    for case in chosen.values():
        if options.tokens:
            sequence = min(case.sequence, options.tokens)
            case = dataclasses.replace(case, tokens=options.tokens, sequence=sequence)
        tables.append(measured(case, options))
    results.write(
        options.out,
        "Training step",
        f"{options.layers} pre-norm decoder layers of width {options.width}, six linear kernels "
        "each, adam; forward, backward and update in one program whose buffers are donated. "
        "step / full is the median over the rounds, 10-90 % its spread, at best the ratio of the "
        "fastest rounds. FLOPs / floor: the compiled products over those that the arithmetic "
        "cannot do without. Memory is XLA's temporary memory.",
        tables,
        device=jax.devices()[0].device_kind,
        settings=vars(options),
    )


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The table of a case."""
    shape = Shape(
        options.layers,
        options.width,
        options.heads,
        jnp.dtype(case.dtype),
        scan=case.scan,
        remat=case.remat,
    )
    x = jax.random.normal(
        jax.random.key(0), (case.tokens // case.sequence, case.sequence, options.width), shape.dtype
    )
    wanted: list[tuple[str, Lora | None]] = [(way, None) for way in case.baselines]
    for name, rank, ways in case.adapters:
        lora = Lora(name, TARGETS[name], rank, case.dropout)
        wanted += [(way, lora) for way in ways if fits(way, shape, lora)]

    programs: dict[str, Program] = {}
    floors, labels = {}, {}
    with progress() as bar:
        for way, lora in bar.track(wanted, description=f"compiling: {case.title}"):
            key = f"{way} {lora}"
            programs[key] = WAYS[way](shape, x, lora)
            labels[key] = way if lora is None else f"{way}, {lora.name} r={lora.rank}"
            sizes = case.tokens, case.sequence
            floors[key] = (
                floor.full(shape, *sizes)
                if lora is None
                else floor.lora(shape, *sizes, lora.targets, lora.rank)
            )
    times = in_turn({k: p.__call__ for k, p in programs.items()}, options.rounds, case.title)
    return table(case.title, labels, programs, times, floors)


def table(
    title: str,
    labels: dict[str, str],
    programs: dict[str, Program],
    times: dict[str, Times],
    floors: dict[str, int],
) -> dict[str, Any]:
    """The rows, the ratios first; the first way is what the others are compared with."""
    first = next(iter(labels))
    rows = []
    for key, label in labels.items():
        program, own, base = programs[key], times[key], times[first]
        base_temp = programs[first].temp_mib
        rows.append(
            [
                label,
                own.over(base),
                own.spread(base),
                own.over_at_best(base),
                program.dot_flops / programs[first].dot_flops,
                f"{program.dot_flops / floors[key]:.3f}",
                program.temp_mib / base_temp if base_temp and program.temp_mib else None,
                program.temp_mib,
                program.trace_seconds,
                program.compile_seconds,
                own.median_ms,
            ]
        )
    columns = ["way", "step / full", "10-90 %", "at best", "FLOPs / full", "FLOPs / floor"]
    columns += ["memory / full", "memory, MiB", "trace, s", "compile, s", "ms"]
    return results.table(title, columns, rows)


if __name__ == "__main__":
    main()
