"""Scores of classes and of generated text, by scorers that others keep."""

from collections.abc import Sequence
from typing import Any

from jaxlora.errors import DataError, optional


def classification_scores(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation, by scikit-learn.

    Args:
      labels: the true class of each example.
      predictions: the class given.

    Returns:
      {"accuracy", "f1", "mcc"}. F1 is that of class 1 if there are only classes 0 and 1, else the
      mean over classes.

    Raises:
      DataError: no examples, or not as many predictions.
      MissingDependencyError: scikit-learn is not installed.

    Example:
      >>> classification_scores([0, 1, 1, 0], [0, 1, 0, 0])["accuracy"]
      0.75
    """
    _check(labels, predictions)
    sklearn = optional("sklearn.metrics", "Scoring classes", "train")
    classes = {*labels, *predictions}
    binary = classes <= {0, 1}
    average = "binary" if binary else "macro"
    return {
        "accuracy": float(sklearn.accuracy_score(labels, predictions)),
        "f1": float(sklearn.f1_score(labels, predictions, average=average, zero_division=0)),
        # Of one class alone it is undefined, and zero by convention; scikit-learn warns there.
        "mcc": float(sklearn.matthews_corrcoef(labels, predictions)) if len(classes) > 1 else 0.0,
    }


def generation_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BLEU and chrF (sacrebleu), NIST (nltk), ROUGE-L (rouge-score) and CIDEr (pycocoevalcap).

    The words of NIST and CIDEr are those of sacrebleu's 13a tokenizer, in lower case. METEOR is
    left out: it needs WordNet or Java.

    Args:
      texts: the generated texts.
      references: one or more references for each.

    Returns:
      {"bleu", "chrf", "nist", "rouge_l", "cider"}: BLEU and chrF from 0 to 100, ROUGE-L from 0 to
      1 with the best reference counted, NIST and CIDEr from 0.

    Raises:
      DataError: no texts, or not as many references.
      MissingDependencyError: a scorer is not installed.

    Example:
      >>> text = "The Mill serves cheap food by the river ."
      >>> round(generation_scores([text], [[text]])["bleu"])
      100
    """
    _check(references, texts)
    if not all(references):
        raise DataError("A text has no reference, expected at least one for each.")
    sacrebleu = optional("sacrebleu", "BLEU", "train")
    most = max(map(len, references))
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    words = _tokenizer()
    tokens = [words(text) for text in texts]
    reference_tokens = [[words(reference) for reference in refs] for refs in references]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(texts), columns, force=True).score),
        "chrf": float(sacrebleu.corpus_chrf(list(texts), columns).score),
        "nist": _nist(tokens, reference_tokens),
        "rouge_l": _rouge_l(texts, references),
        "cider": _cider(tokens, reference_tokens),
    }


def _check(expected: Sequence[Any], got: Sequence[Any]) -> None:
    if not len(expected) or len(expected) != len(got):
        raise DataError(f"Scoring got {len(got)} answers, expected {len(expected) or 'some'}.")


def _tokenizer() -> Any:
    tokenizer = optional("sacrebleu.tokenizers.tokenizer_13a", "Scoring text", "train")
    thirteen_a = tokenizer.Tokenizer13a()
    return lambda text: thirteen_a(text.lower()).split()


def _nist(tokens: list[list[str]], references: list[list[list[str]]]) -> float:
    nist = optional("nltk.translate.nist_score", "NIST", "train")
    longest = max(map(len, tokens))
    if longest == 0:
        return 0.0
    # An order that no text has is a division by zero in nltk.
    return float(nist.corpus_nist(references, tokens, n=min(5, longest)))


def _rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    rouge = optional("rouge_score.rouge_scorer", "ROUGE-L", "train")
    scorer = rouge.RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(refs, text)["rougeL"].fmeasure
        for text, refs in zip(texts, references, strict=True)
    ]
    return float(sum(scores) / len(scores))


def _cider(tokens: list[list[str]], references: list[list[list[str]]]) -> float:
    cider = optional("pycocoevalcap.cider.cider", "CIDEr", "train")
    given = {i: [" ".join(text)] for i, text in enumerate(tokens)}
    wanted = {i: [" ".join(r) for r in refs] for i, refs in enumerate(references)}
    return float(cider.Cider().compute_score(wanted, given)[0])
