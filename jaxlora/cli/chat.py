"""`jaxlora chat MODEL`."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax

from jaxlora.cli.generate import SAMPLING, write
from jaxlora.cli.options import parse, positional
from jaxlora.cli.speakers import BASE, Speakers
from jaxlora.errors import LoraError, optional
from jaxlora.tasks.chat import render, with_system

HELP = """/adapter NAME  let another adapter speak; without a name they are listed
/merge         fold the adapter into the model; /unmerge runs it beside the model again
/reset         forget the conversation
/quit          leave, as does Ctrl-D"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model, and switch its adapter on the way.

    Example: jaxlora chat smollm2 --adapter runs/pirate robot=runs/robot/best
    """

    model: Annotated[str, positional]
    """A run's folder, a name of `jaxlora fetch`, a folder, a GGUF file or a hub id."""
    adapter: tuple[str, ...] = ()
    """Runs or checkpoints with adapters, each as FOLDER or NAME=FOLDER."""
    merged: bool = False
    """Start with the adapter merged."""
    system: str | None = None
    """A system prompt."""
    max_new_tokens: int = 128
    """Tokens of an answer, at most."""
    temperature: float = 0.7
    """What logits are divided by; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from so many likeliest tokens."""
    top_p: float | None = 0.95
    """Draw from the likeliest tokens of so much probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.1
    """Above 1 makes tokens that were there less likely."""
    seed: int = 0
    """Seed of the draws."""


def run(argv: Sequence[str]) -> int:
    """Load and talk."""
    options = parse(Chat, argv, "jaxlora chat")
    console = optional("rich.console", "The command line", "train").Console(highlight=False)
    with console.status("loading"):
        speakers = Speakers.load(options.model, options.adapter)
    if options.merged:
        speakers.merge()
    talk(speakers, options, ask=lambda: console.input("[bold]> [/]"), say=console.print)
    return 0


def talk(
    speakers: Speakers, options: Chat, *, ask: Callable[[], str], say: Callable[..., None]
) -> list[dict[str, str]]:
    """The conversation, until `/quit` or the end of the input.

    Args:
      speakers: the model and its adapters.
      options: how to draw.
      ask: gives a line of the user; EOFError ends.
      say: prints a line; answers go to the standard output as they come.

    Returns:
      The messages.
    """
    messages: list[dict[str, str]] = []
    key, turn = jax.random.key(options.seed), 0
    say(f"{_who(speakers)} speaks; /help tells the commands", style="dim")
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return messages
        if line == "/quit":
            return messages
        if line.startswith("/"):
            try:
                _command(speakers, line, messages, say)
            except LoraError as e:
                say(str(e), style="red")
            continue
        if not line:
            continue
        asked: list[Any] = [*messages, {"role": "user", "content": line}]
        try:
            answer = _answer(speakers, options, asked, jax.random.fold_in(key, turn))
        except LoraError as e:
            say(f"{e} /reset forgets the conversation.", style="red")
            continue
        except KeyboardInterrupt:
            say("")
            continue
        turn += 1
        messages[:] = [*asked, {"role": "assistant", "content": answer}]


def _answer(speakers: Speakers, options: Chat, messages: list[Any], key: jax.Array) -> str:
    ids = render(speakers.tokenizer, with_system(messages, options.system), answer=True)
    found = speakers.speak(
        ids,
        max_new_tokens=options.max_new_tokens,
        sampling={name: getattr(options, name) for name in SAMPLING},
        key=key,
        stream=write,
        # A model without a template of its own may go on with the user's next line.
        stop=() if getattr(speakers.tokenizer, "chat_template", None) else ("\nUser:",),
    )
    print()
    return (found.text or [""])[0].strip() or "…"


def _command(
    speakers: Speakers, line: str, messages: list[dict[str, str]], say: Callable[..., None]
) -> None:
    command, _, name = line.partition(" ")
    start = time.perf_counter()
    if command == "/adapter" and name.strip():
        speakers.switch(name.strip())
    elif command == "/adapter":
        say(", ".join([BASE, *speakers.adapters]))
        return
    elif command == "/merge":
        speakers.merge()
        jax.block_until_ready(speakers.merged)
    elif command == "/unmerge":
        speakers.merged = None
    elif command == "/reset":
        messages.clear()
    else:
        say(HELP)
        return
    taken = 1e3 * (time.perf_counter() - start)
    say(f"{_who(speakers)} speaks ({taken:.1f} ms)", style="dim")


def _who(speakers: Speakers) -> str:
    merged = "" if speakers.name == BASE else ", unmerged"
    return speakers.name + (merged if speakers.merged is None else ", merged")
