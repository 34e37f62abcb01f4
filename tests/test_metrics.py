"""Scores against values worked out by hand."""

import math

import numpy as np
import pytest

from jaxlora.errors import DataError
from jaxlora.metrics import classification_scores, generation_scores


def test_two_classes():
    # true positives 2, false positives 1, false negatives 1, true negatives 4
    labels, given = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    scores = classification_scores(labels, given)
    assert scores["accuracy"] == 6 / 8
    assert scores["f1"] == pytest.approx(4 / 6)
    assert scores["mcc"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


def test_more_classes_count_alike_in_f1():
    scores = classification_scores([0, 0, 1, 2], [0, 1, 1, 0])
    assert scores["f1"] == pytest.approx(np.mean([1 / 2, 2 / 3, 0]))


def test_one_class_alone_has_no_correlation():
    assert classification_scores([1, 1], [1, 1]) == {"accuracy": 1, "f1": 1, "mcc": 0}


def test_texts_equal_to_a_reference_score_full():
    texts = ["the mill serves cheap food .", "the inn is near the river bank ."]
    references = [["it is cheap .", texts[0]], [texts[1]]]
    scores = generation_scores(texts, references)
    assert scores["bleu"] == pytest.approx(100)
    assert scores["chrf"] == pytest.approx(100)
    assert scores["rouge_l"] == 1
    assert scores["nist"] > 3
    assert scores["cider"] > 5


def test_bleu_and_rouge_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, none of 3 fours: smoothed by half of a third
    scores = generation_scores(["a b c x d e"], [["a b c d e f"]])
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / 6]
    assert scores["bleu"] == pytest.approx(100 * math.prod(precisions) ** (1 / 4))
    assert scores["rouge_l"] == pytest.approx(5 / 6)


def test_empty_and_short_texts_have_scores():
    scores = generation_scores(["", "a"], [["x"], ["y"]])
    assert all(value == 0 for value in scores.values())
    assert generation_scores([""], [["x"]])["nist"] == 0


def test_errors():
    with pytest.raises(DataError, match="got 1 answers, expected 2"):
        classification_scores([0, 1], [0])
    with pytest.raises(DataError, match="got 0 answers, expected some"):
        classification_scores([], [])
    with pytest.raises(DataError, match="no reference"):
        generation_scores(["a"], [[]])
