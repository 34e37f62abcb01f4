"""`jaxlora generate MODEL`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import jax

from jaxlora.cli.options import parse, positional
from jaxlora.cli.speakers import Speakers
from jaxlora.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt, or each line of the standard input.

    Example: jaxlora generate smollm2 --adapter runs/pirate --prompt "Once upon a time"
    """

    model: Annotated[str, positional]
    """A run's folder, a name of `jaxlora fetch`, a folder, a GGUF file or a hub id."""
    prompt: str | None = None
    """The prompt; without it each line of the standard input is one."""
    adapter: tuple[str, ...] = ()
    """A run or checkpoint whose adapter is to be used."""
    merged: bool = False
    """Merge the adapter into the model first."""
    max_new_tokens: int = 64
    """Tokens of the answer, at most."""
    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from so many likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens of so much probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there less likely."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    seed: int = 0
    """Seed of the draws."""


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The options that are passed on to `Sampling`."""


def run(argv: Sequence[str]) -> int:
    """Generate, and print as it comes."""
    options = parse(Generate, argv, "jaxlora generate")
    prompts = [options.prompt] if options.prompt is not None else sys.stdin.read().splitlines()
    if not any(prompt.strip() for prompt in prompts):
        raise DataError("There is no prompt, expected --prompt or lines of the standard input.")
    speakers = Speakers.load(options.model, options.adapter)
    if options.merged:
        speakers.merge()
    for i, prompt in enumerate(prompts):
        speakers.speak(
            prompt,
            max_new_tokens=options.max_new_tokens,
            sampling={name: getattr(options, name) for name in SAMPLING},
            key=jax.random.fold_in(jax.random.key(options.seed), i),
            stop=options.stop,
            stream=write,
        )
        print()
    return 0


def write(row: int, ids: list[int], text: str) -> None:
    """Print a piece of text at once."""
    print(text, end="", flush=True)
