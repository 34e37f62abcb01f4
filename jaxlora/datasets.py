"""Small labelled data sets for examples and tests."""

from pathlib import Path
from typing import Literal

from jaxlora.errors import CheckpointError, ConfigError
from jaxlora.fetch import fetch

Reviews = Literal["movie", "amazon", "tweets", "nyt"]

_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


def load_reviews(
    which: Reviews = "movie", min_score: float = 0.5, cache_dir: str | Path | None = None
) -> list[tuple[str, int]]:
    """Load sentences that people rated from -4 to 4 (Hutto and Gilbert 2014), as two classes.

    Args:
      which: "movie" (10,072 sentences at the default `min_score`), "amazon" (2,985), "tweets"
        (3,432) or "nyt" (2,970).
      min_score: sentences whose mean rating is nearer to zero are dropped; at least 0. A rating of
        exactly zero has no sign and is always dropped.
      cache_dir: see `jaxlora.fetch.fetch`.

    Returns:
      (sentence, label) in the order of the file; the label is 1 for a positive rating, else 0.

    Raises:
      ConfigError: an unknown `which`, or a negative `min_score`.
      CheckpointError: the file cannot be had or read.

    Example:
      >>> from jaxlora.datasets import load_reviews
      >>> len(load_reviews("movie"))
      10072
    """
    if which not in _FILES:
        raise ConfigError(f"Reviews are {which!r}, expected one of {', '.join(_FILES)}.")
    if not min_score >= 0:
        raise ConfigError(f"min_score is {min_score!r}, expected a number of at least 0.")
    file = fetch("reviews", cache_dir) / _FILES[which]
    reviews = []
    # Split at line feeds only: some sentences hold other characters that end lines in Python.
    for number, line in enumerate(file.read_bytes().decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            _, mean, text = line.rstrip("\r").split("\t")
            score = float(mean)
        except ValueError as e:
            raise CheckpointError(
                f"{file}, line {number}: got {line!r}, expected an id, a mean score and a text "
                "between tabs. Delete the folder and fetch 'reviews' again."
            ) from e
        if abs(score) >= min_score and score != 0:
            reviews.append((text, int(score > 0)))
    return reviews
