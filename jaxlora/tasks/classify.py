"""Sentences, or pairs of them, to classes: an encoder with a classification head."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora import hosts
from jaxlora.apply import lora_apply
from jaxlora.batches import Batches, Example
from jaxlora.datasets import load_reviews
from jaxlora.errors import DataError
from jaxlora.metrics import classification_scores
from jaxlora.rows import Row, classes_of, label_of, read_rows, text_of
from jaxlora.tasks.base import (
    Problem,
    Settings,
    adapter_config,
    check_tokens,
    held_out,
    limited,
    load_model,
)

REVIEWS = ("movie", "amazon", "tweets", "nyt")
"""The names of data that `jaxlora.datasets.load_reviews` brings."""
HEADS = ("classifier", "pooler", "score")
"""The modules of a head, which are trained in full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Settings):
    """Fine-tune BERT, RoBERTa or DeBERTa to tell classes apart.

    Example: jaxlora train classify --data train.tsv --valid dev.tsv --text sentence
    """

    model: str = "minilm"
    """A name of `jaxlora fetch`, a folder or a hub id of an encoder."""
    data: str = "movie"
    """A tsv, csv or jsonl file; or movie, amazon, tweets or nyt, which are fetched."""
    text: str = "text"
    """The column of the text; a number from 0 if a tsv or csv has no header."""
    text_pair: str | None = None
    """The column of a second text, for tasks on pairs."""
    label: str = "label"
    """The column of the label: any strings or whole numbers."""
    classes: tuple[str, ...] = ()
    """The labels in the order of the logits; by default those of the training data, sorted."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """What the head of a BERT reads; auto is mean for minilm and what the model has otherwise."""
    metric: Literal["accuracy", "f1", "mcc", "loss"] = "accuracy"
    """What the best checkpoint is the best in."""
    max_length: int = 128
    """Tokens of an example; longer ones are cut."""
    out: str = "runs/classify"
    """The folder of the run."""
    batch_size: int = 32
    """Rows of a step."""
    epochs: int = 2
    """Passes over the training data."""

    def filled(self) -> "Classify":
        """The settings with the classes of the training data."""
        if self.classes:
            return self
        return dataclasses.replace(self, classes=tuple(classes_of(self.rows(self.data), "label")))

    def rows(self, data: str) -> list[Row]:
        """The rows of a file or of fetched reviews, with columns text, pair and label."""
        if data in REVIEWS:
            rows = load_reviews(data)  # type: ignore[arg-type]
            return [
                Row(f"{data}, row {i}", {"text": text, "label": label})
                for i, (text, label) in enumerate(rows, 1)
            ]
        names = {"text": self.text, "pair": self.text_pair, "label": self.label}
        names = {name: column for name, column in names.items() if column is not None}
        return [
            Row(row.where, {name: row.fields[column] for name, column in names.items()})
            for row in read_rows(data, list(names.values()))
        ]

    def load(self) -> Any:
        """The encoder with a fresh head for the classes."""
        pooling = "mean" if self.pooling == "auto" and self.model == "minilm" else self.pooling
        return load_model(
            self.model,
            self.mesh,
            head="classification",
            num_labels=len(self.classes),
            key=jax.random.key(self.seed),
            **self.of_model,
            **({} if pooling == "auto" else {"pooling": pooling}),
        )

    def problem(self, pretrained: Any) -> Problem:
        """The data as tokens, the loss, and accuracy, F1 and MCC."""
        model, params, tokenizer = pretrained
        sets, cut = [], 0
        for part in self._split():
            examples, shortened = encode(tokenizer, part, self.classes, self.max_length)
            check_tokens(examples, model, self.max_length)
            sets.append(examples)
            cut += shortened

        pad = {"input_ids": tokenizer.pad_token_id or 0}
        return Problem(
            train=sets[0],
            valid=sets[1],
            pad=pad,
            config=adapter_config(self, params, HEADS),
            inputs=(jax.ShapeDtypeStruct((1, 8), jnp.int32),),
            loss=make_loss(model, self.label_smoothing),
            evaluate=lambda adapter, variables, examples: score(
                model, adapter, variables, examples, pad
            )[0],
            metric=self.metric,
            higher_is_better=self.metric != "loss",
            cut=cut,
        )

    def measure(self, trained: Any, data: str | None = None) -> tuple[dict[str, float], list[Any]]:
        """Loss, accuracy, F1 and MCC, and each row's text, label and prediction."""
        rows = self.rows(data) if data else self._split()[1]
        examples, _ = encode(trained.tokenizer, rows, self.classes, self.max_length)
        check_tokens(examples, trained.model, self.max_length)
        pad = {"input_ids": trained.tokenizer.pad_token_id or 0}
        scores, given = score(
            trained.model, trained.adapter, {"params": trained.params}, examples, pad
        )
        answers = [
            {**row.fields, "predicted": self.classes[i]} for row, i in zip(rows, given, strict=True)
        ]
        return scores, answers

    def _split(self) -> tuple[list[Row], list[Row]]:
        rows = self.rows(self.data)
        train, valid = (rows, self.rows(self.valid)) if self.valid else held_out(rows, self)
        return limited(train, self), limited(valid, self)


def encode(
    tokenizer: Any, rows: Sequence[Row], classes: Sequence[str], max_length: int
) -> tuple[list[Example], int]:
    """Rows with columns text, label and perhaps pair, as token ids and the number of the class.

    Args:
      tokenizer: that of the model, called as in transformers.
      rows: the rows.
      classes: the labels in order.
      max_length: longer examples are cut.

    Returns:
      The examples, and how many of them were cut.

    Raises:
      DataError: a row without text, or with a label that is not among the classes.
    """
    number = {label: i for i, label in enumerate(classes)}
    texts = [text_of(row, "text") for row in rows]
    pairs = [text_of(row, "pair") for row in rows if "pair" in row.fields]
    labels = []
    for row in rows:
        label = label_of(row, "label")
        if label not in number:
            raise DataError(
                f"{row.where} has the label {label!r}, expected one of {', '.join(classes)}."
            )
        labels.append(number[label])
    options: dict[str, Any] = {"truncation": True, "max_length": max_length}
    encoded = tokenizer(texts, *([pairs] if pairs else []), **options)
    names = [n for n in ("input_ids", "token_type_ids") if n in encoded and (pairs or n[0] == "i")]
    examples: list[Example] = [
        {name: np.array(encoded[name][i]) for name in names} | {"label": label}
        for i, label in enumerate(labels)
    ]
    cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
    return examples, cut


def logits_of(model: Any, adapter: Any, variables: Any, batch: Any, **kwargs: Any) -> jax.Array:
    """(batch, classes); an adapter of None gives the base's."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if adapter is None:
        return model.apply(variables, **inputs, **kwargs)
    return lora_apply(model, variables, adapter, **inputs, **kwargs)


def class_loss(logits: jax.Array, batch: Any, label_smoothing: float = 0.0) -> jax.Array:
    """The mean cross entropy over the rows that are real."""
    logits = logits.astype(jnp.float32)
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
    return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])


def make_loss(model: Any, label_smoothing: float) -> Any:
    """`(adapter, variables, batch, key) -> mean loss of the rows that are real`."""

    def loss(adapter: Any, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
        kwargs = {"rngs": {"dropout": key}, "deterministic": False}
        logits = logits_of(model, adapter, variables, batch, **kwargs)
        return class_loss(logits, batch, label_smoothing)

    return loss


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Any, adapter: Any, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The class of each row, and the loss of its label."""
    logits = logits_of(model, adapter, variables, batch).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.argmax(logits, -1), losses


def score(
    model: Any, adapter: Any, variables: Any, examples: Sequence[Example], pad: Any
) -> tuple[dict[str, float], list[int]]:
    """Loss, accuracy, F1 and MCC, and the class given to each example.

    Args:
      model: the model.
      adapter: the adapter.
      variables: the base.
      examples: the examples.
      pad: what to pad each sequence with.

    Returns:
      {metric: value}, and a class for each example.
    """
    order = np.argsort([len(example["input_ids"]) for example in examples], kind="stable")
    batches = Batches([examples[i] for i in order], 64, pad=pad)
    found = []
    for batch in batches:
        real = batch["weight"] > 0
        answers = hosts.on_host(predict(model, adapter, variables, batch))
        classes, losses = jax.device_get(answers)
        found += zip(classes[real].tolist(), losses[real].tolist(), strict=True)
    given = [0] * len(examples)
    for i, (number, _) in zip(order, found, strict=True):
        given[i] = number
    scores = classification_scores([example["label"] for example in examples], given)
    return {"loss": float(np.mean([loss for _, loss in found]))} | scores, given
