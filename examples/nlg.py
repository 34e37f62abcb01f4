"""Put data into words: E2E by the recipe of the LoRA paper, and its scores.

    python examples/nlg.py                     # 48 rows of our own, SmolLM2
    python examples/nlg.py --data trainset.csv --test testset.csv --model gpt2-medium --beams 10

The recipe is that of Hu et al. 2021, appendix D: queries and values, rank 4, alpha 32, dropout 0.1,
label smoothing 0.1, AdamW with a linear schedule, a beam of 10 with length penalty 0.9. Files are
`mr||text` lines (.txt), or csv with columns mr and ref as E2E has them. Each meaning is put into
words once and held against all its references.

Measured with SmolLM2 on the rows beside this file, 25 steps of 230,400 parameters (0.17 %), on 5
meanings held out with 2 references each: BLEU 4.4 -> 56.0, NIST 0.60 -> 4.80, ROUGE-L 0.10 -> 0.77,
CIDEr 0.12 -> 4.30, perplexity 44.9 -> 2.72; 176 s of CPU time.
"""

import dataclasses
import os
import time
from pathlib import Path

import tyro

from jaxlora.tasks import Nlg, load_run, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune, and score the base and the adapter."""

    model: str = "smollm2"
    """"smollm2", which is fetched, or a folder, a GGUF file or a hub id such as gpt2-medium."""
    data: Path = Path(__file__).parent / "restaurants.txt"
    """Training data."""
    test: Path | None = None
    """Test data; by default the last meanings of the training data are held out."""
    out: Path = Path("runs/nlg-example")
    """The folder of the run; a run that is there goes on or is used."""
    epochs: int = 5
    """Passes over the rows."""
    learning_rate: float = 2e-3
    """Peak learning rate; the paper has 2e-4, for 26,000 steps."""
    batch_size: int = 8
    """Rows of a step."""
    beams: int = 10
    """Beams of the search."""
    max_new_tokens: int = 40
    """Tokens of a text, at most."""
    max_length: int = 128
    """Tokens of a row; longer ones are cut."""


def main(options: Options) -> dict[str, dict[str, float]]:
    start = time.time()
    settings = Nlg(
        model=options.model,
        data=str(options.data),
        valid=None if options.test is None else str(options.test),
        valid_share=0.2,
        out=str(options.out),
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        beams=options.beams,
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
    )
    finished = (options.out / "curves.png").is_file()
    result = None if finished else train(settings, resume=(options.out / "last").is_dir())
    if result is not None and result.stopped:
        raise SystemExit("stopped; the same command goes on")

    trained = load_run(options.out)
    scores = {}
    for name, speaker in {"base": trained._replace(adapter=None), "adapter": trained}.items():
        scores[name], answers = settings.measure(speaker)
        print(f"\n{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores[name].items()))
        for answer in answers[:3]:
            print(f"  {answer['mr']}\n    -> {answer['text']}")
    print(f"\n{time.time() - start:.0f} s in all")
    return scores


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it only tokenizes here
    main(tyro.cli(Options))
