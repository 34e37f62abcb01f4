"""`jaxlora COMMAND`: finds the command, and turns errors into one line and an exit status."""

import importlib
import os
import sys
from collections.abc import Sequence

from jaxlora.errors import ConfigError, LoraError, nearest

COMMANDS = {
    "train": "fine-tune a model: classify, chat or nlg",
    "eval": "score a run on its validation data or a file",
    "merge": "fold a run's adapter into its model, as a Hugging Face folder",
    "generate": "continue prompts",
    "chat": "talk to a model, and switch its adapter",
    "convert": "turn an adapter into another form: PEFT, vLLM, Orbax, loralib, safetensors",
    "plan": "tell the memory that training needs on each device, and whether it fits",
    "inspect": "show a run, an adapter, or what of a model would be adapted",
    "fetch": "download the models and data that pip brings",
}
"""{name: what it does}; each is the module of its name here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the console script `jaxlora`.

    Args:
      argv: the arguments; default: those of the process.

    Returns:
      The exit status: 0, 1 for a plan that does not fit, 2 for what is wrong with arguments, data
      or files, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it only tokenizes here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if name not in COMMANDS:
            raise ConfigError(
                f"Command is '{name}', expected one of {', '.join(COMMANDS)}. "
                f"Nearest: {nearest(name, COMMANDS, 1)[0]}."
            )
        return importlib.import_module(f"jaxlora.cli.{name}").run(rest)
    except (LoraError, OSError) as e:
        line = " ".join(part.strip() for part in str(e).splitlines())
        print(f"jaxlora: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxlora COMMAND [--config FILE] [FLAGS]",
            "",
            "LoRA for JAX: fine-tune, evaluate, merge and talk to models.",
            "",
            *lines,
            "",
            "`jaxlora COMMAND --help` tells the flags of each.",
            "Example: jaxlora train classify --data train.tsv --text sentence --out runs/sst2",
        ]
    )
