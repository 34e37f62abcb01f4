"""`jaxlora eval RUN`."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from jaxlora.cli.options import parse, positional
from jaxlora.errors import optional
from jaxlora.merge import merge
from jaxlora.tasks import load_run
from jaxlora.whole import write_whole


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
        lines = "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
        write_whole(options.answers, lines.encode(), overwrite=True)
    return 0
