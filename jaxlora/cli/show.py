"""Tables and lines on the terminal, by rich."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxlora.errors import optional


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; long cells are folded."""
    made = _rich("table").Table(title=title)
    for name in columns:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*row)
    line(made)


def line(what: Any) -> None:
    """Print a line as it is."""
    _rich("console").Console().print(what, markup=False, highlight=False, soft_wrap=True)


def _rich(module: str) -> Any:
    return optional(f"rich.{module}", "The command line", "train")
