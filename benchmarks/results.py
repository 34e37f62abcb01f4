"""The form of a result: tables of cells, with the machine, the versions, the date, the settings.

    {"title": ..., "note": ..., "tables": [{"title": ..., "note": ..., "columns": [...],
     "rows": [[...]]}], "plots": [...], "machine": {...}, "versions": {...}, "date": ...,
     "settings": {...}}

A cell is a string, a number or None. A page of one table may have `columns` and `rows` itself.
"""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "qwix", "torch", "peft")


def table(title: str, columns: list[str], rows: list[list[Any]], note: str = "") -> dict[str, Any]:
    """One table of a page."""
    assert all(len(row) == len(columns) for row in rows)
    return {"title": title, "note": note, "columns": columns, "rows": rows}


def write(
    path: Path,
    title: str,
    note: str,
    tables: list[dict[str, Any]],
    *,
    device: str,
    settings: dict[str, Any],
    plots: list[str] | None = None,
) -> None:
    """Prints the tables and writes them.

    Args:
      path: the JSON file.
      title: of the page.
      note: what is compared, in a sentence or two.
      tables: from `table`.
      device: what the numbers were measured on.
      settings: what the script was called with; paths as strings.
      plots: paths of plots, seen from the root of the repository.
    """
    page = {
        "title": title,
        "note": note,
        "tables": tables,
        "plots": plots or [],
        "machine": machine(device),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
    }
    _show(tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(page, indent=1) + "\n")
    print(f"written to {path}")


def _show(tables: list[dict[str, Any]]) -> None:
    """Prints tables to the terminal."""
    for one in tables:
        shown = Table(*one["columns"], title=one["title"], title_justify="left")
        for row in one["rows"]:
            shown.add_row(*map(cell, row))
        Console(width=None if Console().is_terminal else 140).print(shown)


def cell(value: Any) -> str:
    """A cell as it is read: three digits of a number."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or 0.1 <= abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
    }


def versions() -> dict[str, str]:
    """What is installed of the packages that are compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
