"""`jaxlora eval RUN`."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from jaxlora.cli.options import parse, positional
from jaxlora.errors import optional
from jaxlora.merge import merge
from jaxlora.tasks import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Score a run on its validation data, or on a file.

    Example: jaxlora eval runs/sst2 --data dev.tsv --answers answers.jsonl
    """

    run: Annotated[str, positional]
    """The folder of the run."""
    data: str | None = None
    """A file in the form of the training data; default: the run's validation data."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint."""
    merged: bool = False
    """Merge the adapter into the model first."""
    answers: str | None = None
    """A jsonl file to write what the model said for each example."""


def run(argv: Sequence[str]) -> int:
    """Score, print a table, write the answers."""
    options = parse(Eval, argv, "jaxlora eval")
    trained = load_run(options.run, options.checkpoint)
    if options.merged:
        trained = trained._replace(params=merge(trained.params, trained.adapter), adapter=None)
    scores, answers = trained.settings.measure(trained, options.data)
    rich = optional("rich.table", "The command line", "train")
    table = rich.Table("metric", "value", title=f"{options.run} ({options.checkpoint})")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    optional("rich.console", "The command line", "train").Console().print(table)
    if options.answers:
        _write(Path(options.answers), answers)
    return 0


def _write(file: Path, answers: list[dict]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), "utf-8")
    os.replace(part, file)
