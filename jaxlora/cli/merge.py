"""`jaxlora merge RUN --out FOLDER`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from jaxlora import models
from jaxlora.cli.options import parse, positional
from jaxlora.merge import merge
from jaxlora.tasks import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Fold a run's adapter into its model, and write that as a Hugging Face folder.

    Example: jaxlora merge runs/pirate --out models/pirate
    """

    run: Annotated[str, positional]
    """The folder of the run."""
    out: str
    """The folder to write."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint."""
    overwrite: bool = False
    """Replace a folder that is there."""


def run(argv: Sequence[str]) -> int:
    """Merge and write."""
    options = parse(Merge, argv, "jaxlora merge")
    trained = load_run(options.run, options.checkpoint)
    classes = getattr(trained.settings, "classes", ())
    folder = models.save_pretrained(
        options.out,
        trained.model,
        merge(trained.params, trained.adapter),
        tokenizer=trained.tokenizer,
        labels=list(classes) or None,
        overwrite=options.overwrite,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")
    return 0
