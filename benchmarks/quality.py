"""Full fine-tuning, LoRA on query and value, LoRA on all linear layers and DoRA, compared.

    python benchmarks/quality.py --sst2 FOLDER      # train what is missing, print the table
    python benchmarks/quality.py --no-train --markdown docs/quality.md    # the page alone

The model is all-MiniLM-L6 with a fresh head of two classes, the tasks are movie reviews (fetched
through pip) and, where its folder is given, SST-2 of GLUE (Socher et al. 2013). Each method has a
sweep of learning rates of its own, judged on validation sentences; the best rate's test accuracy
is that of the end of training, over several seeds. A finished run is a line of the results file,
and what is there is not run again, so an interruption loses one run. quality_peft.py adds PEFT on
the batches that this script writes.
"""

import dataclasses
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import quality_data as qd
import quality_runs as qr
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jaxlora as jl
from jaxlora.fetch import fetch

console = Console()
WEIGHT_DECAY, MAX_NORM = 0.01, 1.0


@dataclasses.dataclass
class Options:
    """Compare full fine-tuning, LoRA and DoRA under one budget.

    Example: python benchmarks/quality.py --train-size 4000 --seeds 10
    """

    movie: bool = True
    """Movie reviews."""
    sst2: Path | None = None
    """Folder of SST-2's train.tsv and dev.tsv (label, sentence); without it, no SST-2."""
    methods: tuple[str, ...] = ("full", "lora-qv", "lora-all", "dora-all")
    """Names of `METHODS` in quality_runs.py."""
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Peak learning rates of LoRA and DoRA to try."""
    full_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    """Peak learning rates of full fine-tuning to try."""
    seeds: int = 5
    """Seeds at the best rate: of the head, the factors, the order and the dropout."""
    sweep_seeds: int = 1
    """Seeds at every rate."""
    train_size: int = 1000
    """Training sentences."""
    valid_size: int = 500
    """Validation sentences."""
    epochs: int = 2
    """Passes over the training sentences."""
    batch_size: int = 16
    """Sentences in a step."""
    results: Path = Path("benchmarks/quality.jsonl")
    """The runs, a line each."""
    data: Path = Path("runs/quality")
    """Folder for the batches and heads that quality_peft.py reads."""
    markdown: Path | None = None
    """Page to write the table into, between its markers, with a plot beside it."""
    section: str = "table"
    """The markers of the page to write between: "larger" is the table of the second budget."""
    train: bool = True
    """Train what is missing; --no-train only shows what is there."""


def main() -> None:
    options = tyro.cli(Options)
    budget = {name: getattr(options, name) for name in qr.BUDGET}
    tasks = {"movie": options.movie, "sst2": options.sst2 is not None}
    for task in (task for task, wanted in tasks.items() if wanted and options.train):
        train_missing(options, task, budget, export(options, task, budget))
    runs = [run for run in qr.load(options.results) if run["budget"] == budget]
    shown = [task for task in tasks if any(run["task"] == task for run in runs)]
    if not shown:
        raise SystemExit(f"{options.results} has no runs of this budget. Run without --no-train.")
    text = qr.tables(runs, shown, options.seeds, options.sweep_seeds)
    console.print(Markdown(text))
    if options.markdown:
        qr.write_page(options.markdown, options.section, text)
    if options.markdown and options.section == "table":
        qr.plot(options.markdown.with_suffix(".png"), runs, shown, options.seeds)


def export(options: Options, task: str, budget: dict[str, int]) -> list[Path]:
    """Write the batches of each seed, and the settings that quality_peft.py needs."""
    settings = budget | {
        "task": task,
        "rates": list(options.rates),
        "full_rates": list(options.full_rates),
        "seeds": options.seeds,
        "sweep_seeds": options.sweep_seeds,
        "lora": qr.LORA,
        "weight_decay": WEIGHT_DECAY,
        "max_norm": MAX_NORM,
        "model": str(fetch("minilm")),
    }
    paths = [options.data / f"{task}-{seed}.npz" for seed in range(options.seeds)]
    for seed, path in enumerate(paths):
        qd.export(path, settings, seed, options.sst2)
    return paths


def train_missing(options: Options, task: str, budget: dict[str, int], data: list[Path]) -> None:
    """Run what the results lack, the methods in turn, so that a slow hour hits them alike."""
    ways: dict[str, Any] = {}
    while True:
        runs, left = [r for r in qr.load(options.results) if r["budget"] == budget], {}
        for method in options.methods:
            rates = options.rates if qr.METHODS[method].config is not None else options.full_rates
            own = qr.of(runs, task, method)
            left[method] = qr.pending(own, rates, options.seeds, options.sweep_seeds)
        if not any(left.values()):
            return
        for method, pairs in left.items():
            if pairs:
                rate, seed = pairs[0]
                if method not in ways:
                    ways[method] = compiled(method)
                run = {"method": method, "task": task, "rate": rate, "seed": seed}
                run |= train(ways[method], method, data[seed], rate, seed)
                run |= {"budget": budget, "versions": versions()}
                qr.append(options.results, run)
                console.print(
                    f"{task} {method} rate {rate:g} seed {seed}: valid {run['valid']:.4f}, "
                    f"test {run['test']:.4f}, {run['step_ms']:.0f} ms a step; "
                    f"{len(pairs) - 1} or more to go",
                    highlight=False,
                )


def compiled(name: str) -> tuple[Any, Any, Any]:
    """(start, step, predict) of a method; what differs between runs is an argument."""
    method, (model, _, _) = qr.METHODS[name], qd.pretrained(0)
    adam = optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.scale_by_adam(),
        optax.add_decayed_weights(WEIGHT_DECAY),
    )
    tx = adam if method.ratio == 1 else jl.lora_plus(adam, method.ratio)

    def start(params: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        """What is trained, its optimizer's state, what is frozen."""
        if method.config is None:
            return jax.tree.map(jnp.copy, params), tx.init(params), ()
        config = jl.LoraConfig(**(qr.LORA | method.config))
        ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        adapter = jl.lora_init(key, model, {"params": params}, config, ids)
        return adapter.params, tx.init(adapter.params), (params, adapter)

    def logits(trained: Any, frozen: Any, ids: jax.Array, **kwargs: Any) -> jax.Array:
        if not frozen:
            return model.apply({"params": trained}, ids, ids != 0, **kwargs)
        params, adapter = frozen
        adapter = dataclasses.replace(adapter, params=trained)
        return jl.lora_apply(model, {"params": params}, adapter, ids, ids != 0, **kwargs)

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, rate: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            ids, labels = batch
            out = logits(trained, frozen, ids, rngs={"dropout": key}, deterministic=False)
            return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(trained, updates), state, value

    @jax.jit
    def predict(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        return jnp.argmax(logits(trained, frozen, ids), -1)

    return start, step, predict


def train(way: Any, method: str, path: Path, rate: float, seed: int) -> dict[str, Any]:
    start, step, predict = way
    with np.load(path) as file:
        data = dict(file)
    _, params, _ = qd.pretrained(seed)
    trained, state, frozen = start(params, jax.random.key(seed + 1000))
    key, losses, times = jax.random.key(seed + 2000), [], []
    lengths, common = data["train_lengths"], statistics.mode(data["train_lengths"].tolist())
    with progress() as bar:
        task = bar.add_task(f"{method} {rate:g} {seed}", total=len(lengths), loss=float("nan"))
        for n, length in enumerate(lengths):
            batch = data["train_ids"][n, :, :length], data["train_labels"][n]
            now = np.float32(rate * data["schedule"][n])
            began = time.perf_counter()
            args = batch, jax.random.fold_in(key, n), now
            trained, state, loss = step(trained, state, frozen, *args)
            losses.append(float(loss))
            if length == common:
                times.append(time.perf_counter() - began)
            bar.update(task, advance=1, loss=statistics.mean(losses[-20:]))
    accuracy = {}
    for part in ("valid", "test"):
        ids, labels = data[f"{part}_ids"], data[f"{part}_labels"]
        hits = [
            np.sum(np.asarray(predict(trained, frozen, x[:, :length])) == y)
            for x, y, length in zip(ids, labels, data[f"{part}_lengths"], strict=True)
        ]
        accuracy[part] = float(sum(hits) / np.sum(labels >= 0))
    return accuracy | {
        "loss": statistics.mean(losses[-50:]),
        "steps": len(lengths),
        "step_ms": 1e3 * statistics.median(times),
        "trained": sum(x.size for x in jax.tree.leaves(trained)),
        "checkpoint_bytes": saved_bytes(trained, frozen),
    }


def saved_bytes(trained: Any, frozen: Any) -> int:
    """The size of a checkpoint of what is trained, as Orbax writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).absolute() / "checkpoint"
        if frozen:
            params, adapter = frozen
            adapter = dataclasses.replace(adapter, params=trained)
            jl.save_adapter(path, adapter, params=params)
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, trained)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "flax", "optax")}


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


if __name__ == "__main__":
    main()
