"""The sentences of quality.py: splits, batches and heads that both sides read."""

import csv
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxlora import models
from jaxlora.datasets import load_reviews
from jaxlora.fetch import fetch

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it only tokenizes here
LENGTHS = (16, 24, 32, 48)  # a batch is padded to one of these: one compile for each


def export(path: Path, settings: dict[str, Any], seed: int, sst2: Path | None) -> None:
    """Write all that the runs of a seed see: batches in order, schedule, head, settings.

    Args:
      path: the npz; one of the same settings is left as it is.
      settings: those of the comparison; `task`, `train_size`, `valid_size`, `epochs` and
        `batch_size` are read here.
      seed: seed of the head and the order.
      sst2: folder of SST-2, for that task.
    """
    settings = settings | {"seed": seed}
    if path.exists() and json.loads(str(np.load(path)["settings"])) == settings:
        return
    _, params, tokenizer = pretrained(seed)
    test, valid, train = split(settings, sst2)
    epochs, size = settings["epochs"], settings["batch_size"]
    arrays: dict[str, Any] = train_batches(encode(tokenizer, train), epochs, size, seed)
    arrays |= {f"valid_{k}": v for k, v in eval_batches(encode(tokenizer, valid)).items()}
    arrays |= {f"test_{k}": v for k, v in eval_batches(encode(tokenizer, test)).items()}
    arrays |= {f"head_{k}": np.asarray(v) for k, v in params["classifier"].items()}
    steps = len(arrays["train_ids"])
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps + 1)
    arrays["schedule"] = np.array([schedule(i + 1) for i in range(steps)], np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez_compressed(file, settings=json.dumps(settings), **arrays)
    os.replace(file.name, path)


def split(settings: dict[str, Any], sst2: Path | None) -> list[list[tuple[str, int]]]:
    """Test, validation and training sentences: none in two of them, the same for all seeds."""
    if settings["task"] == "movie":
        rows = list(load_reviews("movie"))
        random.Random(0).shuffle(rows)
        test, rest = rows[:2000], rows[2000:]
    else:
        if sst2 is None:
            raise SystemExit("SST-2 needs the folder of its train.tsv and dev.tsv: --sst2 FOLDER.")
        test, rest = (read_tsv(sst2 / f"{name}.tsv") for name in ("dev", "train"))
        random.Random(0).shuffle(rest)
    held, used = settings["valid_size"], settings["valid_size"] + settings["train_size"]
    if used > len(rest):
        raise SystemExit(
            f"{settings['task']} has {len(rest)} sentences besides the test's, expected at least "
            f"the {used} of --train-size and --valid-size."
        )
    return [test, rest[:held], rest[held:used]]


def read_tsv(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"].strip(), int(row["label"])) for row in rows]


def pretrained(seed: int) -> tuple[Any, Any, Any]:
    return models.from_pretrained(
        fetch("minilm"),
        head="classification",
        num_labels=2,
        pooling="mean",
        key=jax.random.key(seed),
    )


def encode(tokenizer: Any, rows: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTHS[-1])
    return list(zip(ids["input_ids"], [label for _, label in rows], strict=True))


def train_batches(examples: list[Any], epochs: int, size: int, seed: int) -> dict[str, np.ndarray]:
    """All epochs' batches in order, each of sentences of like length."""
    chunks = []
    for epoch in range(epochs):
        rng, order = random.Random(f"{seed}/{epoch}"), list(range(len(examples)))
        rng.shuffle(order)
        order = order[: len(order) // size * size]
        windows = [order[i : i + 20 * size] for i in range(0, len(order), 20 * size)]
        order = [i for part in windows for i in sorted(part, key=lambda i: len(examples[i][0]))]
        epoch_chunks = [order[i : i + size] for i in range(0, len(order), size)]
        rng.shuffle(epoch_chunks)
        chunks += epoch_chunks
    return {f"train_{k}": v for k, v in padded(examples, chunks, size).items()}


def eval_batches(examples: list[Any], size: int = 50) -> dict[str, np.ndarray]:
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    return padded(examples, [order[i : i + size] for i in range(0, len(order), size)], size)


def padded(examples: list[Any], chunks: list[list[int]], size: int) -> dict[str, np.ndarray]:
    """Token ids (batches, size, LENGTHS[-1]), labels (batches, size), -1 where there is none."""
    ids = np.zeros((len(chunks), size, LENGTHS[-1]), np.int32)
    labels, lengths = np.full((len(chunks), size), -1, np.int32), []
    for n, chunk in enumerate(chunks):
        for m, i in enumerate(chunk):
            ids[n, m, : len(examples[i][0])], labels[n, m] = examples[i]
        longest = max(len(examples[i][0]) for i in chunk)
        lengths.append(next(length for length in LENGTHS if length >= longest))
    return {"ids": ids, "labels": labels, "lengths": np.array(lengths)}
