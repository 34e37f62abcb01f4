"""The runs of quality.py and quality_peft.py: their file, what is still to run, the page of it.

Needs the standard library only, but for the plot.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]
BUDGET = ("train_size", "valid_size", "epochs", "batch_size")
NAMES = {"movie": "movie reviews", "sst2": "SST-2"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      label: its name there.
      config: fields of LoraConfig that differ from `LORA`; None: full fine-tuning.
      ratio: learning rate of B over that of A (LoRA+).
      variant: it belongs to the second table, not to the comparison.
      torch: it runs in quality_peft.py.
    """

    label: str
    config: dict[str, Any] | None
    ratio: float = 1.0
    variant: bool = False
    torch: bool = False


LORA = {"rank": 16, "alpha": 32, "modules_to_save": "classifier"}
METHODS = {
    "full": Method("full fine-tuning", None),
    "lora-qv": Method("LoRA, query and value", {"targets": "attention/(query|value)"}),
    "lora-all": Method("LoRA, all linear layers", {}),
    "dora-all": Method("DoRA, all linear layers", {"dora": True}),
    "peft-all": Method("PEFT's LoRA, all linear layers", {}, torch=True),
    "torch-full": Method("full fine-tuning in torch", None, torch=True),
    "lora-all-r4": Method("rank 4", {"rank": 4, "alpha": 8}, variant=True),
    "lora-all-r64": Method("rank 64", {"rank": 64, "alpha": 128}, variant=True),
    "lora-all-alpha16": Method("alpha 16 (scaling 1)", {"alpha": 16}, variant=True),
    "lora-all-pissa": Method("PiSSA's start", {"init": "pissa"}, variant=True),
    "lora-all-plus": Method("LoRA+ (B learns 4 times faster)", {}, ratio=4.0, variant=True),
    "lora-all-dropout": Method("adapter's dropout 0.1", {"dropout": 0.1}, variant=True),
}


def load(path: Path) -> list[Run]:
    """The runs of a JSON lines file; a last line that an interruption cut is left out."""
    runs = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: skipped a line that is not JSON: {line[:60]!r}")
    return runs


def append(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.read_text()[-1:] not in ("", "\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(run) + "\n")


def of(runs: Iterable[Run], task: str, method: str) -> list[Run]:
    return [run for run in runs if (run["task"], run["method"]) == (task, method)]


def ranked(runs: Iterable[Run], seeds: int) -> list[float]:
    """Rates that have all seeds, by mean validation accuracy; of equals the lower rate first."""
    scores: dict[float, dict[int, float]] = {}
    for run in runs:
        if run["seed"] < seeds:
            scores.setdefault(run["rate"], {})[run["seed"]] = run["valid"]
    means = {r: statistics.mean(s.values()) for r, s in scores.items() if len(s) == seeds}
    return sorted(means, key=lambda rate: (-means[rate], rate))


def pending(
    runs: list[Run], rates: Sequence[float], seeds: int, sweep_seeds: int
) -> list[tuple[float, int]]:
    """(rate, seed) still to run of one task and method.

    First the sweep: every rate with few seeds. Then the two best rates with all seeds.
    """
    done = {(run["rate"], run["seed"]) for run in runs}
    sweep = [(rate, seed) for seed in range(sweep_seeds) for rate in rates]
    left = [pair for pair in sweep if pair not in done]
    final = [(rate, seed) for rate in ranked(runs, sweep_seeds)[:2] for seed in range(seeds)]
    return left or [pair for pair in final if pair not in done]


@dataclasses.dataclass(frozen=True)
class Row:
    """Test accuracies, in percent and by seed, of a method at its best rate on a task."""

    rate: float
    by_seed: dict[int, float]
    runs: list[Run]

    def __str__(self) -> str:
        values = list(self.by_seed.values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    def minus(self, other: "Row") -> str:
        """The mean difference over the seeds that both have, and its standard error."""
        seeds = sorted(self.by_seed.keys() & other.by_seed.keys())
        values = [self.by_seed[s] - other.by_seed[s] for s in seeds]
        if len(values) < 2:
            return "—"
        error = statistics.stdev(values) / math.sqrt(len(values))
        return f"{statistics.mean(values):+.2f} ± {error:.2f}"


def row(runs: list[Run], seeds: int, sweep_seeds: int) -> Row | None:
    rates = ranked(runs, seeds) or ranked(runs, sweep_seeds)
    if not rates:
        return None
    return row_at(runs, rates[0], seeds)


def row_at(runs: list[Run], rate: float, seeds: int) -> Row:
    chosen = [run for run in runs if run["rate"] == rate and run["seed"] < seeds]
    return Row(rate, {run["seed"]: 100 * run["test"] for run in chosen}, runs)


def tables(runs: list[Run], tasks: Sequence[str], seeds: int, sweep: int) -> str:
    """The page's table, the differences, and the variants of LoRA on all linear layers.

    Args:
      runs: those of one budget.
      tasks: the columns.
      seeds: of the accuracies.
      sweep: seeds at every rate.
    """
    rows = {
        (task, method): found
        for task in tasks
        for method in METHODS
        if (found := row(of(runs, task, method), seeds, sweep))
    }
    main = [m for m in METHODS if not METHODS[m].variant and any((t, m) in rows for t in tasks)]
    head = ["method", "trained", "checkpoint MB", "step, of full"]
    head += [f"{NAMES[t]}: test accuracy" for t in tasks] + ["rates"]
    lines, timed = [], [run for run in runs if run["task"] == tasks[0]]
    for method in main:
        own = [run for t in tasks if (t, method) in rows for run in rows[t, method].runs]
        base = "torch-full" if METHODS[method].torch else "full"
        cells = [METHODS[method].label, f"{own[0]['trained']:,}"]
        cells += [f"{own[0]['checkpoint_bytes'] / 1e6:.1f}", _speed(timed, base, method)]
        cells += [str(rows.get((t, method), "—")) for t in tasks]
        lines.append([*cells, ", ".join(_rate(rows, t, method) for t in tasks)])
    text = _table(head, lines)

    pairs = [(m, "full") for m in main if m not in ("full", "peft-all", "torch-full")]
    pairs += [(a, b) for a, b in (("lora-all", "peft-all"), ("full", "torch-full")) if b in main]
    lines = [
        [f"{METHODS[a].label} less {METHODS[b].label}", *(_minus(rows, t, a, b) for t in tasks)]
        for a, b in pairs
    ]
    if "peft-all" in main:
        lines += _at_equal_rates(runs, tasks, seeds, "lora-all", "peft-all")
    text += "\nThe same seeds subtracted, in points, mean ± standard error:\n\n"
    text += _table(["", *(NAMES[t] for t in tasks)], lines)

    variants = [m for m in METHODS if METHODS[m].variant and any((t, m) in rows for t in tasks)]
    lines = []
    for method in variants:
        for t in (t for t in tasks if (t, method) in rows):
            found, ours = rows[t, method], rows.get((t, "lora-all"))
            difference = found.minus(ours) if ours else "—"
            cells = [METHODS[method].label, NAMES[t], f"{found.rate:g}"]
            lines.append([*cells, f"{found} ({len(found.by_seed)} seeds)", difference])
    text += _every_rate(runs, tasks, main)
    if lines:
        text += "\nOne thing changed in LoRA on all linear layers, with a sweep of its own:\n\n"
        text += _table(["changed", "task", "rate", "test accuracy", "minus unchanged"], lines)
    return text


def _minus(rows: dict[Any, Row], task: str, a: str, b: str) -> str:
    there = (task, a) in rows and (task, b) in rows
    return rows[task, a].minus(rows[task, b]) if there else "—"


def _rate(rows: dict[Any, Row], task: str, method: str) -> str:
    return f"{rows[task, method].rate:g}" if (task, method) in rows else "—"


def _speed(runs: list[Run], base: str, method: str) -> str:
    """The median ratio of a run's step time to that of the full fine-tuning run nearest to it."""
    at = {
        name: [n for n, run in enumerate(runs) if run["method"] == name] for name in (base, method)
    }
    if not at[base]:
        return "—"
    nearest = {n: min(at[base], key=lambda m: abs(m - n)) for n in at[method]}
    ratios = [runs[n]["step_ms"] / runs[m]["step_ms"] for n, m in nearest.items()]
    return f"{statistics.median(ratios):.2f}"


def _at_equal_rates(
    runs: list[Run], tasks: Sequence[str], seeds: int, a: str, b: str
) -> list[list[str]]:
    """The differences where both have a rate with all seeds, chosen or not."""
    own = {(task, m): of(runs, task, m) for task in tasks for m in (a, b)}
    common = {t: set(ranked(own[t, a], seeds)) & set(ranked(own[t, b], seeds)) for t in tasks}
    lines = []
    for rate in sorted(set().union(*common.values())):
        cells = [
            row_at(own[t, a], rate, seeds).minus(row_at(own[t, b], rate, seeds))
            if rate in common[t]
            else "—"
            for t in tasks
        ]
        lines.append([f"the same two, both at {rate:g}", *cells])
    return lines


def _every_rate(runs: list[Run], tasks: Sequence[str], methods: list[str]) -> str:
    lines = []
    for task in tasks:
        for method in methods:
            own = of(runs, task, method)
            for rate in sorted({run["rate"] for run in own}):
                at = [run for run in own if run["rate"] == rate]
                means = [100 * statistics.mean(r[part] for r in at) for part in ("valid", "test")]
                loss = statistics.mean(run["loss"] for run in at)
                cells = [NAMES[task], METHODS[method].label, f"{rate:g}", str(len(at))]
                lines.append([*cells, *(f"{mean:.2f}" for mean in means), f"{loss:.3f}"])
    head = ["task", "method", "rate", "seeds", "validation", "test", "training loss, last 50 steps"]
    return "\nEvery rate, means over the seeds there are:\n\n" + _table(head, lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(path: Path, runs: list[Run], tasks: Sequence[str], seeds: int) -> None:
    """Validation accuracy against the learning rate: dots are runs, lines their means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5 * len(tasks), 4.2)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, method in enumerate(m for m in METHODS if not METHODS[m].variant):
            own = [run for run in of(runs, task, method) if run["seed"] < seeds]
            rates = sorted({run["rate"] for run in own})
            if len(rates) < 2:
                continue
            scores = [[100 * run["valid"] for run in own if run["rate"] == r] for r in rates]
            look = {"color": f"C{number}", "linestyle": "--" if METHODS[method].torch else "-"}
            means = [statistics.mean(s) for s in scores]
            axis.plot(rates, means, label=METHODS[method].label, **look)
            axis.plot(
                [r["rate"] for r in own],
                [100 * r["valid"] for r in own],
                ".",
                **look | {"linestyle": ""},
            )
        axis.set(xscale="log", xlabel="peak learning rate", title=NAMES[task])
    axes[0][0].set_ylabel("validation accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="x-small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_page(page: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->` on a page."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text()
    if start not in old or end not in old:
        raise SystemExit(f"{page} lacks the lines {start} and {end}, between which the table goes.")
    before, after = old.partition(start)[0], old.partition(end)[2]
    page.write_text(f"{before}{start}\n{text}{end}{after}")
