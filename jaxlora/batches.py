"""Batches of like length for grain: shuffled, padded to a few lengths or packed, resumable.

The order of an epoch is a function of the seed and the epoch alone, so a position in it is one
number: grain's iterator saves and restores it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.errors import ConfigError, DataError, optional

Example = Mapping[str, Any]
"""{name: value} of one example: `input_ids` and other sequences of its length, and numbers."""

Batch = dict[str, np.ndarray]
"""{name: array}: sequences (batch, length), numbers (batch,), `attention_mask`, and `weight`."""

_WINDOW = 20  # batches that are sorted by length together
_PAYS = 25  # batches that save as much padding as a further length costs to compile


def bucket_lengths(
    lengths: Sequence[int], most: int = 6, multiple: int = 8, longest: int | None = None
) -> tuple[int, ...]:
    """The lengths to pad to that waste the fewest tokens.

    Each is a shape of its own and so a compilation: `most` bounds them.

    Args:
      lengths: the lengths of the examples, in tokens.
      most: how many lengths to choose, at least 1.
      multiple: each is a multiple of it.
      longest: a bound that none may pass, such as the model's positions; it may be chosen itself.

    Returns:
      The lengths, ascending; the last holds the longest example.

    Raises:
      ConfigError: `most` or `multiple` below 1.
      DataError: no examples, or one longer than `longest`.

    Example:
      >>> bucket_lengths([3, 5, 7, 7, 40], most=2)
      (8, 40)
    """
    if most < 1 or multiple < 1:
        raise ConfigError(f"most is {most} and multiple is {multiple}, expected at least 1.")
    if not len(lengths):
        raise DataError("There are no examples to batch, expected at least one.")
    if longest is not None and max(lengths) > longest:
        raise DataError(
            f"An example has {max(lengths)} tokens, expected at most {longest}. Cut it first."
        )
    ceilings = -(-np.maximum(lengths, 1) // multiple) * multiple
    if longest is not None:
        ceilings = np.minimum(ceilings, longest)
    sizes, counts = np.unique(ceilings, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: the fewest padded tokens of the examples in the first j sizes with k buckets.
    cost = np.concatenate([[0.0], np.full(len(sizes), np.inf)])
    cuts: list[np.ndarray] = []
    for _ in range(min(most, len(sizes))):
        table = cost[:-1, None] + sizes[None] * (below[None, 1:] - below[:-1, None])
        table = np.where(np.arange(len(sizes))[:, None] <= np.arange(len(sizes)), table, np.inf)
        cuts.append(np.argmin(table, 0))
        cost = np.concatenate([[0.0], np.min(table, 0)])
    chosen, j = [], len(sizes)
    for cut in reversed(cuts):
        if j == 0:
            break
        chosen.append(int(sizes[j - 1]))
        j = int(cut[j - 1])
    return tuple(reversed(chosen))


@dataclasses.dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """All the batches of some epochs, by number: a source for grain.

    Within an epoch each example comes once. Examples of like length share a batch; a batch that is
    not full is filled with rows of weight zero, so every batch of a length has one shape.

    Attributes:
      examples: the examples.
      batch_size: rows of a batch.
      lengths: what to pad to; by default the best ones (`bucket_lengths`), as many as pay for
        their compilation: one for each 25 batches, two to six of them.
      epochs: how often each example comes.
      seed: shuffles each epoch anew; None keeps the order given.
      pad: {name: value} to pad a sequence with; zero for those not named.

    Raises:
      ConfigError: a batch size or number of epochs below 1.
      DataError: no examples, or one longer than the longest length.

    Example:
      >>> batches = Batches([{"input_ids": [5, 6], "label": 1}], batch_size=2)
      >>> batches[0]["input_ids"].shape, batches[0]["weight"].tolist()
      ((2, 8), [1.0, 0.0])
    """

    examples: Sequence[Example]
    batch_size: int
    lengths: tuple[int, ...] = ()
    epochs: int = 1
    seed: int | None = None
    pad: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs < 1:
            raise ConfigError(
                f"batch_size is {self.batch_size} and epochs is {self.epochs}, expected at least 1."
            )
        sizes = [len(example["input_ids"]) for example in self.examples]
        most = min(6, max(2, self.epochs * self.per_epoch // _PAYS))
        lengths = tuple(sorted(self.lengths)) or bucket_lengths(sizes, most)
        if max(sizes, default=1) > lengths[-1]:
            raise DataError(
                f"An example has {max(sizes)} tokens, expected at most {lengths[-1]}, the longest "
                "length. Cut it first."
            )
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "_sizes", np.array(sizes))
        object.__setattr__(self, "_plan", functools.lru_cache(maxsize=2)(self._planned))

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, index: Any) -> Batch:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, number = divmod(index, self.per_epoch)
        chosen = self._plan(epoch)[number]  # type: ignore[attr-defined]
        return self._collated([self.examples[i] for i in chosen])

    def padding(self) -> float:
        """The share of the first epoch's tokens that is padding."""
        batches = [self._plan(0)[i] for i in range(self.per_epoch)]  # type: ignore[attr-defined]
        sizes: np.ndarray = self._sizes  # type: ignore[attr-defined]
        padded = sum(self.batch_size * self._length(sizes[rows].max()) for rows in batches)
        return 1 - int(sizes.sum()) / padded

    def _planned(self, epoch: int) -> list[np.ndarray]:
        """The example numbers of each batch of an epoch."""
        order = np.arange(len(self.examples))
        if self.seed is None:
            return self._cut(order)
        generator = np.random.default_rng((self.seed, epoch))
        generator.shuffle(order)
        sizes: np.ndarray = self._sizes  # type: ignore[attr-defined]
        window = _WINDOW * self.batch_size
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        # Short ones first in the last window would leave its longest to the batch that is not full.
        order = np.concatenate([part[np.argsort(sizes[part], kind="stable")] for part in parts])
        batches = self._cut(order)
        return [batches[i] for i in generator.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _length(self, longest: int) -> int:
        return next(length for length in self.lengths if length >= longest)

    def _collated(self, examples: Sequence[Example]) -> Batch:
        length = self._length(max(len(example["input_ids"]) for example in examples))
        batch: Batch = {}
        if "attention_mask" not in examples[0]:
            examples = [e | {"attention_mask": np.ones(len(e["input_ids"]))} for e in examples]  # type: ignore[operator]
        for name, value in examples[0].items():
            if np.ndim(value) == 0:
                batch[name] = np.zeros(self.batch_size, np.asarray(value).dtype)
                batch[name][: len(examples)] = [example[name] for example in examples]
                if batch[name].dtype == np.int64:
                    batch[name] = batch[name].astype(np.int32)
                continue
            batch[name] = np.full((self.batch_size, length), self.pad.get(name, 0), np.int32)
            for row, example in enumerate(examples):
                batch[name][row, : len(example[name])] = example[name]
        batch["weight"] = (np.arange(self.batch_size) < len(examples)).astype(np.float32)
        return batch


def loader(batches: Batches, prefetch: int = 8) -> Any:
    """A grain iterator over batches; `get_state` is JSON, and `set_state` goes on from there.

    Args:
      batches: the batches, or any sequence.
      prefetch: how many are made ahead by a thread.

    Returns:
      A `grain.DatasetIterator`.

    Raises:
      MissingDependencyError: grain is not installed.

    Example:
      >>> batches = Batches([{"input_ids": [n]} for n in range(6)], batch_size=2, seed=0)
      >>> first, again = loader(batches), loader(batches)
      >>> _ = next(first)
      >>> again.set_state(first.get_state())
      >>> bool((next(first)["input_ids"] == next(again)["input_ids"]).all())
      True
    """
    grain = optional("grain", "Loading batches", "train")
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def pack(examples: Sequence[Example], length: int, seed: int | None = None) -> list[Example]:
    """Put several sequences in each row of a length, first fit, for a causal model.

    In `attention_mask` the sequences of a row are numbered 1, 2, 3 …, which keeps each to itself,
    and `position_ids` restart with each. Other sequences, such as `loss_mask`, go along.

    Args:
      examples: sequences of at most `length` tokens.
      length: tokens of a row.
      seed: shuffles the examples first; None takes them as they come.

    Returns:
      The rows, as examples.

    Raises:
      DataError: an example longer than `length`.

    Example:
      >>> rows = pack([{"input_ids": [7, 8]}, {"input_ids": [9]}], length=4)
      >>> [int(n) for n in rows[0]["attention_mask"]], [int(n) for n in rows[0]["position_ids"]]
      ([1, 1, 2], [0, 1, 0])
    """
    order = np.arange(len(examples))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    room = np.zeros(len(examples), np.int64)
    rows: list[list[Example]] = []
    for i in order.tolist():
        size = len(examples[i]["input_ids"])
        if size > length:
            raise DataError(
                f"An example has {size} tokens, expected at most {length}. Cut it first."
            )
        fits = room[: len(rows)] >= size
        at = int(np.argmax(fits)) if fits.any() else len(rows)
        if at == len(rows):
            rows.append([])
            room[at] = length
        rows[at].append(examples[i])
        room[at] -= size
    return [_packed(row) for row in rows]


def _packed(row: Sequence[Example]) -> Example:
    sizes = [len(example["input_ids"]) for example in row]
    sequences = {name: np.concatenate([e[name] for e in row]) for name in row[0]}
    return sequences | {
        "attention_mask": np.repeat(np.arange(1, len(row) + 1), sizes),
        "position_ids": np.concatenate([np.arange(size) for size in sizes]),
    }
