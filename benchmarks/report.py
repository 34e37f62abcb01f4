"""Makes BENCHMARKS.md of the results.

    python -m benchmarks.report
    python -m benchmarks.report --results runs/bench --page BENCHMARKS.md

Every JSON file of the folder, in the form of results.py, is a section: the known ones in their
order, then the others by name, so that a result of another machine is a file beside them.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.results import cell

ORDER = ("step", "step_torch", "tpu", "inference", "merging", "memory", "growth")
INTRODUCTION = """# Benchmarks

Made by `make bench`; not edited by hand. All ways of a table run in turn within one process and
their ratios count; absolute times are the machine's and mean little. Lower is better.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("runs/bench"))
    parser.add_argument("--page", type=Path, default=Path("BENCHMARKS.md"))
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("*.json"), key=lambda path: place(path.stem))
    if not paths:
        raise SystemExit(f"{options.results} holds no results. Run `make bench`.")
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    options.page.write_text(page(found, options.page.parent))
    print(f"written to {options.page}: {', '.join(found)}")


def place(name: str) -> tuple[int, str]:
    """Where a section stands; `step-gpu` follows `step`."""
    known = name.partition("-")[0]
    return (ORDER.index(known) if known in ORDER else len(ORDER), name)


def page(found: dict[str, dict[str, Any]], folder: Path) -> str:
    """The text of the page; links to plots are seen from its folder."""
    return "\n".join([INTRODUCTION, *(section(one, folder) for one in found.values())])


def section(one: dict[str, Any], folder: Path) -> str:
    """A result as Markdown."""
    lines = [f"## {one['title']}", "", one.get("note", ""), "", measured_on(one), ""]
    for table in one.get("tables", [one]):
        if "tables" in one:
            lines += [f"### {table['title']}", ""]
            lines += [table["note"], ""] if table.get("note") else []
        head = table["columns"]
        rows = [head, ["---"] * len(head), *table["rows"]]
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows] + [""]
    for path in one.get("plots", []):
        link = Path(os.path.relpath(path, folder)).as_posix()
        lines += [f"![{Path(path).stem}]({link})", ""]
    return "\n".join(lines)


def measured_on(one: dict[str, Any]) -> str:
    """Machine, versions, date."""
    machine = dict(one.get("machine", {}))
    versions = one.get("versions") or machine.get("versions", {})
    words = [machine.get("device"), machine.get("cpu")]
    words += [f"{machine['cores']} cores"] if "cores" in machine else []
    words += [f"{name} {number}" for name, number in versions.items()]
    date = one.get("date") or machine.get("date")
    return ", ".join(str(word) for word in [*words, date] if word) + "."


if __name__ == "__main__":
    main()
