"""Text in and out of `generate`: prompts and chats to ids, ids to text as they come, stop strings.

A tokenizer is whatever has `encode` and `decode`: one of transformers or of tokenizers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.errors import ConfigError, ModelError

_PART = "\N{REPLACEMENT CHARACTER}"  # what a decoder puts for a character that is not complete


def to_ids(prompt: Any, row: int, tokenizer: Any) -> list[int]:
    """The ids of one prompt.

    Args:
      prompt: a string, a chat (a list of {"role": …, "content": …}), or ids.
      row: its number, for messages.
      tokenizer: a tokenizer, or None where prompts are ids.

    Raises:
      ConfigError: text without a tokenizer, or a chat without a chat template.
      ModelError: neither text nor a chat nor integers.
    """
    if isinstance(prompt, str):
        return _encoded(_needed(tokenizer, f"Prompt {row} is a string").encode(prompt))
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        tokenizer = _needed(tokenizer, f"Prompt {row} is a chat")
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"Prompt {row} is a chat, and the {type(tokenizer).__name__} has no chat_template. "
                "Set it, or write the prompt as a string."
            )
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens.
        return _encoded(tokenizer.encode(text, add_special_tokens=False))
    ids = np.asarray(prompt)
    if ids.ndim == 1 and ids.size == 0:
        return []
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ModelError(
            f"Prompt {row} is {ids.dtype} of shape {ids.shape}, expected a string, a list of "
            "messages, or integers of shape (length,). Prompts are a list with one item a row."
        )
    return [int(x) for x in ids]


def to_stops(stop: str | Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
      ConfigError: an empty one, or no tokenizer to make text with.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for each in stops:
        if not isinstance(each, str) or not each:
            raise ConfigError(f"stop has {each!r}, expected strings of at least one character.")
    if stops:
        _needed(tokenizer, "stop strings are given")
    return stops


def default_eos(tokenizer: Any) -> tuple[int, ...]:
    """The id that the tokenizer says ends a text, if it says so."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)


class Writer:
    """The text of one row as its ids come.

    What `add` and `close` give, one after another, is the text: the decoded ids, up to the first
    stop string. Characters that may be the beginning of one are held back, and so are those of
    which not all bytes have come.

    Args:
      tokenizer: a tokenizer, or None for ids alone.
      stops: the stop strings.
      live: give text as it comes; else `close` gives it all, decoded once. Stop strings need it.

    Attributes:
      ids: the ids so far; with a stop string, up to the one that completed it.
      text: the text given out so far.
      stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = (), *, live: bool = True) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stops, self._live = tokenizer, stops, live

    def add(self, token: int) -> str:
        """Takes one more id, and gives the text that is now sure."""
        self.ids.append(token)
        if self._tokenizer is None or not self._live:
            return ""
        whole = self._decoded()
        found = [at for at in map(whole.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._upto(whole, min(found))
        sure = len(whole.rstrip(_PART))
        held = (n for s in self._stops for n in range(1, len(s)) if whole.endswith(s[:n]))
        return self._upto(whole, min(sure, len(whole) - max(held, default=0)))

    def close(self) -> str:
        """Gives what was held back."""
        if self._tokenizer is None or self.stopped:
            return ""
        whole = self._decoded()
        return self._upto(whole, len(whole))

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.ids, skip_special_tokens=True)

    def _upto(self, whole: str, end: int) -> str:
        new = whole[len(self.text) : end]
        self.text += new
        return new


def to_stdout(row: int, ids: list[int], text: str) -> None:
    """Writes the text of the first row as it comes: for `generate(…, stream=to_stdout)`."""
    if row == 0:
        print(text, end="", flush=True)


def _encoded(found: Any) -> list[int]:
    return list(getattr(found, "ids", found))  # tokenizers gives an Encoding, transformers a list


def _needed(tokenizer: Any, why: str) -> Any:
    if tokenizer is None:
        raise ConfigError(f"{why}, and there is no tokenizer. Pass tokenizer=, or give ids.")
    return tokenizer
