"""`jaxlora train TASK`."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from jaxlora import hosts
from jaxlora.cli.options import fields_of, parse
from jaxlora.errors import ConfigError, RunError, nearest, optional
from jaxlora.runs import read_config
from jaxlora.tasks import TASKS, train

_SWITCHES = ("--resume", "--quiet", "--distributed")


def run(argv: Sequence[str]) -> int:
    """Train, or go on with a run."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    task, *flags = argv
    if task not in TASKS:
        raise ConfigError(
            f"Task is '{task}', expected one of {', '.join(TASKS)}. "
            f"Nearest: {nearest(task, TASKS, 1)[0]}."
        )
    resume, quiet, distributed = (flag in flags for flag in _SWITCHES)
    flags = [flag for flag in flags if flag not in _SWITCHES]
    kind, prog = _described(TASKS[task]), f"jaxlora train {task}"
    settings = parse(kind, flags, prog)
    if resume:  # the run's own settings are the defaults
        there = read_config(settings.out)
        if there.get("task") != task:
            raise RunError(f"{settings.out} holds a run of {there.get('task')}, expected {task}.")
        values = fields_of(kind, there, f"{settings.out}/config.yaml")
        settings = parse(kind, flags, prog, kind(**values))
    settings = TASKS[task](**{f.name: getattr(settings, f.name) for f in dataclasses.fields(kind)})
    if distributed:
        hosts.initialize()
    console = optional("rich.console", "The command line", "train").Console()
    result = train(
        settings,
        resume=resume,
        quiet=quiet,
        say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    return 130 if result.stopped else 0


def _described(kind: type) -> Any:
    """The settings' class with the flags that are not settings in its help."""
    more = (
        "--resume goes on with the run in --out, with its settings. --quiet shows no progress.\n"
        "--distributed joins the processes of other hosts, each started by the same command.\n"
        "Ctrl-C saves and leaves."
    )
    return type(
        kind.__name__, (kind,), {"__doc__": f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{more}"}
    )


def _help() -> str:
    lines = [f"  {name:9} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in TASKS.items()]
    return "\n".join(
        [
            "usage: jaxlora train TASK [--config FILE] [FLAGS]",
            "",
            *lines,
            "",
            "Example: jaxlora train classify --data train.tsv --text sentence --out runs/sst2",
        ]
    )
