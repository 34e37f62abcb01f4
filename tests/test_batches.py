"""Batches: each example once an epoch, few shapes, little padding, resumable; packing."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.batches import Batches, bucket_lengths, loader, pack
from jaxlora.errors import ConfigError, DataError


def examples(sizes):
    """Each example's tokens are its number, from 1."""
    return [
        {"input_ids": np.full(size, i), "label": i % 3, "loss_mask": [0] + [1] * (size - 1)}
        for i, size in enumerate(sizes, 1)
    ]


def waste(lengths, buckets):
    return sum(min(b for b in buckets if b >= n) - n for n in lengths)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 4))
def test_bucket_lengths_are_the_best_of_all_choices(lengths, most):
    chosen = bucket_lengths(lengths, most=most)
    assert len(chosen) <= most
    assert list(chosen) == sorted(set(chosen))
    top = -(-max(lengths) // 8) * 8
    choices = [
        (*below, top) for k in range(most) for below in itertools.combinations(range(8, top, 8), k)
    ]
    assert waste(lengths, chosen) == min(waste(lengths, choice) for choice in choices)


def test_bucket_lengths_stop_at_the_longest():
    assert bucket_lengths([3, 30], longest=30) == (8, 30)
    with pytest.raises(DataError, match="has 31 tokens, expected at most 30"):
        bucket_lengths([31], longest=30)
    with pytest.raises(DataError, match="no examples"):
        bucket_lengths([])
    with pytest.raises(ConfigError, match="most is 0"):
        bucket_lengths([1], most=0)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_each_example_comes_once_an_epoch_with_its_own_tokens(seed):
    sizes = np.random.default_rng(0).integers(1, 40, 103)
    batches = Batches(examples(sizes), 8, epochs=2, seed=seed, pad={"input_ids": 99})
    assert len(batches) == 2 * 13
    orders = []
    for epoch in range(2):
        seen = []
        for i in range(13):
            batch = batches[epoch * 13 + i]
            length = batch["input_ids"].shape[1]
            assert length in batches.lengths
            assert batch["input_ids"].dtype == batch["label"].dtype == np.int32
            for row, real in enumerate(batch["weight"]):
                mask = batch["attention_mask"][row]
                if not real:
                    assert not mask.any()
                    continue
                number, size = batch["input_ids"][row, 0], mask.sum()
                assert size == sizes[number - 1]
                expected = [number] * size + [99] * (length - size)
                np.testing.assert_array_equal(batch["input_ids"][row], expected)
                np.testing.assert_array_equal(mask, [1] * size + [0] * (length - size))
                assert batch["loss_mask"][row].sum() == size - 1
                assert batch["label"][row] == number % 3
                seen.append(int(number))
        assert sorted(seen) == list(range(1, 104))
        orders.append(seen)
    assert (orders[0] == orders[1]) == (seed is None)


def test_like_lengths_share_a_batch_and_little_is_padding():
    sizes = np.random.default_rng(0).integers(4, 128, 2000)
    sorted_by_length = Batches(examples(sizes), 16, seed=0)
    one_length = Batches(examples(sizes), 16, lengths=(128,), seed=0)
    assert one_length.padding() > 0.45
    assert sorted_by_length.padding() < 0.18
    assert len(Batches(examples(sizes[:100]), 16).lengths) == 2
    shapes = {b["input_ids"].shape for b in map(sorted_by_length.__getitem__, range(125))}
    assert len(shapes) <= 6


def test_the_order_is_that_of_the_seed():
    first, again, other = (
        [Batches(examples([3] * 50), 4, seed=seed)[i]["input_ids"][:, 0].tolist()
         for i in range(13)]
        for seed in (5, 5, 6)
    )  # fmt: skip
    assert first == again
    assert first != other


@pytest.mark.parametrize("steps", [0, 3, 13, 25])
def test_a_loader_goes_on_from_a_state_that_went_through_json(steps):
    batches = Batches(examples([3, 9, 20] * 17), 4, epochs=2, seed=1)
    whole = [batch["input_ids"] for batch in loader(batches)]
    first = loader(batches)
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = loader(batches)
    again.set_state(state)
    rest = [batch["input_ids"] for batch in again]
    assert len(rest) == len(whole) - steps
    for got, expected in zip(rest, whole[steps:], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_errors():
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Batches(examples([1]), 0)
    with pytest.raises(DataError, match="has 9 tokens, expected at most 8"):
        Batches(examples([9]), 2, lengths=(8,))
    with pytest.raises(DataError, match="no examples"):
        Batches([], 2)
    with pytest.raises(IndexError):
        Batches(examples([1]), 2)[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=20), st.sampled_from([None, 0, 1]))
def test_packed_rows_hold_every_example_once_and_apart(sizes, seed):
    made = [{k: e[k] for k in ("input_ids", "loss_mask")} for e in examples(sizes)]
    rows = pack(made, 10, seed)
    seen = []
    for row in rows:
        assert len(row["input_ids"]) <= 10
        segments = row["attention_mask"]
        for segment in range(1, max(segments) + 1):
            here = segments == segment
            [number] = set(row["input_ids"][here])
            assert here.sum() == sizes[number - 1]
            np.testing.assert_array_equal(row["position_ids"][here], np.arange(here.sum()))
            np.testing.assert_array_equal(row["loss_mask"][here], made[number - 1]["loss_mask"])
            seen.append(number)
    assert sorted(seen) == list(range(1, len(sizes) + 1))
    full = sum(1 for row in rows if len(row["input_ids"]) <= 5)
    assert full <= 1  # of two rows that are half empty the second would be in the first


def test_packing_is_first_fit_and_batches_keep_its_mask():
    made = [{"input_ids": np.full(size, size)} for size in (6, 7, 4, 3)]
    rows = pack(made, 10)
    assert [row["input_ids"].tolist() for row in rows] == [[6] * 6 + [4] * 4, [7] * 7 + [3] * 3]
    batch = Batches(rows[:1], 2, lengths=(12,))[0]
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [2] * 4 + [0, 0]
    assert batch["position_ids"][0].tolist() == [*range(6), *range(4), 0, 0]
    with pytest.raises(DataError, match="has 7 tokens, expected at most 6"):
        pack(made, 6)
