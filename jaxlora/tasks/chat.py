"""Dialogues: a causal model learns to answer, with the loss on the answers only."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.batches import Example, pack
from jaxlora.errors import ConfigError, DataError
from jaxlora.rows import Row, read_rows
from jaxlora.tasks.base import (
    Problem,
    Settings,
    check_tokens,
    held_out,
    limited,
    load_model,
)
from jaxlora.tasks.language import counted, language_problem, make_evaluate

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""

ROLES = ("system", "user", "assistant")
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The chat template of a model that has none, such as GPT-2.

What an answer starts with ends before the space: byte-level BPE puts the space to the word.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Settings):
    """Fine-tune a GPT-2 or Llama-type model on dialogues, with the loss on the answers only.

    Example: jaxlora train chat --data dialogues.jsonl --out runs/pirate
    """

    model: str = "smollm2"
    """A name of `jaxlora fetch`, a folder, a GGUF file or a hub id of a causal model."""
    data: str = ""
    """A jsonl file: {"messages": [{"role": "user", "content": …}, …]} a line."""
    system: str | None = None
    """A system prompt for the dialogues that have none."""
    packing: bool = False
    """Put several dialogues in a row, each seeing itself only."""
    max_length: int = 256
    """Tokens of a dialogue; longer ones are cut at the end."""
    out: str = "runs/chat"
    """The folder of the run."""
    valid_share: float = 0.1
    """The share of the training data that is held out where `valid` is not given."""
    learning_rate: float = 1e-3
    """The highest learning rate."""
    batch_size: int = 4
    """Rows of a step."""
    epochs: int = 3
    """Passes over the training data."""

    def load(self) -> Any:
        """The causal model."""
        return load_model(self.model, self.mesh, head="lm", **self.of_model)

    def problem(self, pretrained: Any) -> Problem:
        """The dialogues as tokens, the loss of the answers, and its perplexity."""
        model, _, tokenizer = pretrained
        parts = [self._encoded(model, tokenizer, part) for part in self._split()]
        found = language_problem(self, pretrained, *parts)
        if not self.packing:
            return found
        return dataclasses.replace(found, train=pack(found.train, self.max_length, self.seed))

    def measure(self, trained: Any, data: str | None = None) -> tuple[dict[str, float], list[Any]]:
        """The loss and perplexity of the answers."""
        rows = self._rows(data) if data else self._split()[1]
        examples, _ = self._encoded(trained.model, trained.tokenizer, rows)
        pad = {"input_ids": trained.tokenizer.pad_token_id or 0}
        evaluate = make_evaluate(trained.model, self.batch_size, pad)
        return evaluate(trained.adapter, {"params": trained.params}, examples), []

    def _split(self) -> tuple[list[Row], list[Row]]:
        rows = self._rows(self.data)
        train, valid = (rows, self._rows(self.valid)) if self.valid else held_out(rows, self)
        return limited(train, self), limited(valid, self)

    def _encoded(
        self, model: Any, tokenizer: Any, rows: Sequence[Row]
    ) -> tuple[list[Example], int]:
        examples, cut = [], 0
        for row in rows:
            messages = with_system(row.fields["messages"], self.system)
            example, shortened = encode(tokenizer, row, messages, self.max_length)
            examples.append(example)
            cut += shortened
        check_tokens(examples, model, self.max_length)
        return examples, cut

    def _rows(self, data: str) -> list[Row]:
        if not data:
            raise ConfigError("data is empty, expected a jsonl file of dialogues.")
        rows = read_rows(data, ("messages",))
        for row in rows:
            check_messages(row)
        return rows


def check_messages(row: Row) -> None:
    """Raises DataError unless the row's messages are a dialogue with an answer in it."""
    messages = row.fields["messages"]
    fits = isinstance(messages, list) and all(
        isinstance(m, dict)
        and m.get("role") in ROLES
        and isinstance(m.get("content"), str)
        and m["content"].strip()
        for m in messages
    )
    if not fits:
        raise DataError(
            f"{row.where} has messages of another form, expected a list of "
            '{"role": "system", "user" or "assistant", "content": text}.'
        )
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"{row.where} has no message of the assistant to learn from.")


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages, with a system prompt before them if they have none."""
    if system is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def render(tokenizer: Any, messages: Sequence[Message], *, answer: bool) -> list[int]:
    """The token ids of a dialogue by the tokenizer's chat template, or a plain one.

    Args:
      tokenizer: that of the model.
      messages: the dialogue.
      answer: end with what an answer starts with.

    Returns:
      The ids.
    """
    template = {} if getattr(tokenizer, "chat_template", None) else {"chat_template": PLAIN}
    found = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=answer,
        tokenize=True,
        return_dict=False,
        **template,
    )
    return list(found)


def encode(
    tokenizer: Any, row: Row, messages: Sequence[Message], max_length: int
) -> tuple[Example, bool]:
    """A dialogue as token ids, with a loss mask on what the assistant says.

    An answer counts with the token that ends it, so that the model learns to stop.

    Args:
      tokenizer: that of the model.
      row: the row, for messages of errors.
      messages: the dialogue.
      max_length: longer dialogues are cut at the end.

    Returns:
      The example with `input_ids` and `loss_mask`, and whether it was cut.

    Raises:
      DataError: no answer is left after the cut.
      ConfigError: the chat template gives other tokens for a dialogue's beginning than alone.
    """
    ids = render(tokenizer, messages, answer=False)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = render(tokenizer, messages[:i], answer=True)
        end = render(tokenizer, messages[: i + 1], answer=False)
        if ids[: len(start)] != start or ids[: len(end)] != end:
            raise ConfigError(
                f"The chat template changes what stands before the answer {i} of {row.where}, so "
                "the loss cannot be put on the answers. Give a dialogue with one answer a row."
            )
        last = len(start) + len(_stripped(tokenizer, end[len(start) :]))
        mask[len(start) : last] = [1] * (last - len(start))
    return counted(row, ids, mask, max_length)


def _stripped(tokenizer: Any, answer: list[int]) -> list[int]:
    """The answer up to the token that ends it: templates put a line feed after that."""
    ends = [i for i, token in enumerate(answer) if token == tokenizer.eos_token_id]
    return answer[: ends[-1] + 1] if ends else answer
