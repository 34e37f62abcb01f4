"""Data to text: a causal model puts a meaning representation into words (E2E)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlora.batches import Example
from jaxlora.errors import ConfigError, optional
from jaxlora.generate import generate
from jaxlora.metrics import generation_scores
from jaxlora.rows import Row, read_rows, text_of
from jaxlora.tasks.base import (
    Problem,
    Settings,
    check_tokens,
    limited,
    load_model,
)
from jaxlora.tasks.language import counted, language_problem, make_evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nlg(Settings):
    """Fine-tune GPT-2 or a Llama-type model to put data into words, by the paper's recipe.

    The recipe is that of Hu et al. 2021, appendix D.3, for E2E: queries and values, rank 4,
    alpha 32, label smoothing 0.1, AdamW with a linear schedule, and a beam of 10.

    Example: jaxlora train nlg --data train.txt --valid valid.txt --model gpt2
    """

    model: str = "smollm2"
    """A name of `jaxlora fetch`, a folder, a GGUF file or a hub id of a causal model."""
    data: str = ""
    """A file of `mr||text` lines (.txt), or a csv, tsv or jsonl file."""
    mr: str = "mr"
    """The column of the meaning representation, where the file names its columns."""
    text: str = "ref"
    """The column of the text, where the file names its columns."""
    max_length: int = 256
    """Tokens of an example; longer ones are cut at the end."""
    out: str = "runs/nlg"
    """The folder of the run."""
    rank: int = 4
    """Rank of the update of each adapted kernel."""
    alpha: float | None = 32.0
    """The update is scaled by alpha / rank."""
    targets: str = "qv"
    """default (the task's own), qv (queries and values), all-linear, or a pattern of layers."""
    dropout: float = 0.1
    """Dropout of the inputs of the update."""
    learning_rate: float = 2e-4
    """The highest learning rate."""
    decay: Any = "linear"
    """How the rate goes on after the warm-up."""
    batch_size: int = 8
    """Rows of a step."""
    epochs: int = 5
    """Passes over the training data."""
    label_smoothing: float = 0.1
    """The share of the target's probability that is spread over all tokens."""
    beams: int = 10
    """Beams of the search in `jaxlora eval`."""
    length_penalty: float = 0.9
    """Length penalty of the search."""
    max_new_tokens: int = 64
    """Tokens of a generated text, at most."""

    def load(self) -> Any:
        """The causal model."""
        return load_model(self.model, self.mesh, head="lm", **self.of_model)

    def problem(self, pretrained: Any) -> Problem:
        """The rows as tokens, the smoothed loss of the texts, and its perplexity."""
        model, _, tokenizer = pretrained
        parts = [self._encoded(model, tokenizer, part) for part in self._split()]
        return language_problem(self, pretrained, *parts)

    def measure(self, trained: Any, data: str | None = None) -> tuple[dict[str, float], list[Any]]:
        """Loss and perplexity of the texts; BLEU, chrF, NIST, ROUGE-L and CIDEr of generated ones.

        Each meaning is put into words once, by beam search, and held against all its references.
        """
        rows = self.rows(data) if data else self._split()[1]
        examples, _ = self._encoded(trained.model, trained.tokenizer, rows)
        pad = {"input_ids": trained.tokenizer.pad_token_id or 0}
        evaluate = make_evaluate(trained.model, self.batch_size, pad)
        scores = evaluate(trained.adapter, {"params": trained.params}, examples)
        groups = grouped(rows)
        texts = self.texts(trained, list(groups))
        answers = [
            {"mr": meaning, "text": text, "references": groups[meaning]}
            for meaning, text in zip(groups, texts, strict=True)
        ]
        return scores | generation_scores(texts, list(groups.values())), answers

    def texts(self, trained: Any, meanings: Sequence[str]) -> list[str]:
        """A text for each meaning, by beam search."""
        texts = []
        progress = optional("rich.progress", "Generating", "train")
        starts = range(0, len(meanings), self.batch_size)
        for start in progress.track(starts, "generating", transient=True):
            part = meanings[start : start + self.batch_size]
            found = generate(
                trained.model,
                {"params": trained.params},
                [prompt_ids(trained.tokenizer, meaning) for meaning in part],
                adapter=trained.adapter,
                max_new_tokens=self.max_new_tokens,
                num_beams=self.beams,
                length_penalty=self.length_penalty,
                tokenizer=trained.tokenizer,
            )
            texts += [text.strip() for text in found.text or []]
        return texts

    def _split(self) -> tuple[list[Row], list[Row]]:
        rows = self.rows(self.data)
        if self.valid:
            train, valid = rows, self.rows(self.valid)
        else:
            train, valid = held_out_groups(rows, self.valid_share)
        return limited(train, self), limited(valid, self)

    def _encoded(
        self, model: Any, tokenizer: Any, rows: Sequence[Row]
    ) -> tuple[list[Example], int]:
        found = [encode(tokenizer, row, self.max_length) for row in rows]
        examples = [example for example, _ in found]
        check_tokens(examples, model, self.max_length)
        return examples, sum(cut for _, cut in found)

    def rows(self, data: str) -> list[Row]:
        """The rows of a file, with columns mr and text."""
        if not data:
            raise ConfigError("data is empty, expected a file of `mr||text` lines.")
        names = ("mr", "text") if data.endswith(".txt") else (self.mr, self.text)
        return [
            Row(row.where, dict(zip(("mr", "text"), (row.fields[n] for n in names), strict=True)))
            for row in read_rows(data, names)
        ]


def grouped(rows: Sequence[Row]) -> dict[str, list[str]]:
    """{meaning representation: its references}, in the order of the rows."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(text_of(row, "mr"), []).append(text_of(row, "text"))
    return groups


def held_out_groups(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(training, validation): the last meanings held out whole, so that none is in both."""
    meanings = list(grouped(rows))
    if not 0 < share < 1 or len(meanings) < 2:
        raise ConfigError(
            f"valid_share is {share} of {len(meanings)} meanings, expected a share between 0 and 1 "
            "of two or more. Give a validation file."
        )
    last = set(meanings[-max(1, round(share * len(meanings))) :])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[text_of(row, "mr") in last].append(row)
    return parts


def prompt_ids(tokenizer: Any, meaning: str) -> list[int]:
    """The ids that a text is to follow: the meaning and a token that ends it."""
    between = tokenizer.bos_token_id
    between = tokenizer.eos_token_id if between is None else between
    return [*tokenizer(meaning, add_special_tokens=False)["input_ids"], between]


def encode(tokenizer: Any, row: Row, max_length: int) -> tuple[Example, bool]:
    """A meaning and its text as token ids, with a loss mask on the text and the token that ends it.

    Args:
      tokenizer: that of the model.
      row: a row with columns mr and text.
      max_length: longer examples are cut at the end.

    Returns:
      The example with `input_ids` and `loss_mask`, and whether it was cut.

    Raises:
      DataError: nothing of the text is left after the cut.
    """
    prompt = prompt_ids(tokenizer, text_of(row, "mr"))
    text = tokenizer(" " + text_of(row, "text"), add_special_tokens=False)["input_ids"]
    answer = [*text, tokenizer.eos_token_id]
    mask = [0] * len(prompt) + [1] * len(answer)
    return counted(row, [*prompt, *answer], mask, max_length)
