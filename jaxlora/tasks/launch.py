"""Settings to a finished run, and a run's folder back to its model and adapter."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora import hosts, runs
from jaxlora.adapter import Adapter, summary
from jaxlora.batches import Batches
from jaxlora.checkpoint import load_adapter, recover
from jaxlora.errors import ConfigError, RunError, ShardingError, nearest
from jaxlora.fit import Result, fit
from jaxlora.init import lora_init
from jaxlora.plan import plan
from jaxlora.runs import BEST, LAST, Run, read_config
from jaxlora.sharding import adapter_shardings, rows_over, state_shardings
from jaxlora.tasks.base import Problem, Settings, optimizer
from jaxlora.tasks.chat import Chat
from jaxlora.tasks.classify import Classify
from jaxlora.tasks.mesh import ROWS, mesh_of, placing, rows_stay
from jaxlora.tasks.nlg import Nlg
from jaxlora.train import TrainState, make_train_step

TASKS: dict[str, type[Settings]] = {"classify": Classify, "chat": Chat, "nlg": Nlg}
"""{name: settings}. A task of your own is a subclass of `Settings` and an entry here."""


class Trained(NamedTuple):
    """A run's settings, its pretrained model, and the adapter of one of its checkpoints."""

    settings: Any
    model: Any
    params: Any
    tokenizer: Any
    adapter: Adapter


def train(
    settings: Settings,
    *,
    resume: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Run a task by its settings: load, plan, train, evaluate, save.

    With several processes (`hosts.initialize`) all call it with the same settings, which name a
    mesh of the devices of all of them.

    Args:
      settings: those of a task.
      resume: go on with the run in `settings.out`.
      quiet: show no progress bar.
      say: what takes the lines about model, data and result.

    Returns:
      How it ended.

    Raises:
      LoraError: a setting, file, model or run that does not work, before anything is written; or
        a loss that is not finite.
    """
    with hosts.together():
        settings = settings.filled()
        mesh = None if settings.mesh is None else mesh_of(settings.mesh, settings.batch_size)
        if mesh is None and not hosts.alone():
            raise ShardingError(
                f"mesh is None with {jax.process_count()} processes, expected one of all their "
                f"{jax.device_count()} devices, such as fsdp={jax.device_count()}."
            )
        runs.check(settings.out, to_dict(settings), resume=resume)
        pretrained = settings.load()
        problem = settings.problem(pretrained)
    model, params, _ = pretrained
    variables = {"params": params}
    batches = Batches(
        problem.train,
        settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        pad=problem.pad,
    )
    if not hosts.alone():
        hosts.check_same("settings or data", [to_dict(settings), resume, _data_sum(problem)])
    steps = min(len(batches), settings.max_steps or len(batches))
    key = jax.random.key(settings.seed)
    tx, schedule = optimizer(settings, steps)

    def start(params: Any) -> TrainState:
        variables = {"params": params}
        adapter = lora_init(key, model, variables, problem.config, *problem.inputs)
        return TrainState.create(adapter, tx, jax.random.fold_in(key, 1))

    loss, place, made = problem.loss, None, None
    if mesh is None:
        state = start(params)
    else:  # each leaf is made where it lies
        spec = plan(model, variables, problem.config, *problem.inputs).spec
        made = state_shardings(tx, adapter_shardings(spec, params, mesh))
        state = jax.jit(start, out_shardings=made)(params)
        loss, place = rows_stay(loss, mesh), placing(mesh, made)
    step = make_train_step(loss, tx, shardings=made, on_bad_step="stop")
    say = say if hosts.is_writer() else lambda line: None
    say(summary(params, state.adapter))
    say(
        f"{len(problem.train):,} training and {len(problem.valid):,} validation examples, "
        f"{problem.cut} cut to {settings.max_length} tokens; padded to {batches.lengths}, "
        f"{100 * batches.padding():.0f} % of it padding; {steps} steps"
    )
    run = Run(settings.out, to_dict(settings), resume=resume)

    def evaluate(adapter: Adapter) -> dict[str, float]:
        rows = contextlib.nullcontext() if mesh is None else rows_over(mesh, ROWS)
        with rows:
            return problem.evaluate(adapter, variables, problem.valid)

    result = fit(
        run,
        state,
        step if place is None else lambda *args: step(*place(*args)),
        variables,
        batches,
        steps=steps,
        evaluate=evaluate,
        eval_every=settings.eval_every,
        metric=problem.metric,
        higher_is_better=problem.higher_is_better,
        log_every=settings.log_every,
        schedule=schedule,
        resume=resume,
        quiet=quiet,
        loss_fn=loss,
    )
    if result.stopped:
        say(f"stopped at step {int(result.state.step)} of {steps}; resume goes on from there")
    else:
        say(f"best {problem.metric} {result.best} at step {result.best_step}: {run.best}")
    return result


def _data_sum(problem: Problem) -> list[int]:
    """How many examples there are, and a checksum of all: whether two hosts have one data set."""
    total, count = 0, 0
    for example in (*problem.train, *problem.valid):
        for name, value in sorted(example.items()):
            array = np.ascontiguousarray(value)
            total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
            total = zlib.crc32(array.tobytes(), total)
        count += 1
    return [count, total]


def load_run(folder: str | Path, which: str = BEST) -> Trained:
    """Load the model of a run, and the adapter of one of its checkpoints.

    Args:
      folder: the run's folder.
      which: "best" or "last".

    Returns:
      Settings, model, params, tokenizer and adapter.

    Raises:
      RunError: no run, or no such checkpoint.
      CheckpointError: the adapter is damaged or of another base.
    """
    settings = dataclasses.replace(read_settings(folder), mesh=None)
    checkpoint = Path(folder) / which
    recover(checkpoint)
    if not checkpoint.is_dir():
        there = [name for name in (BEST, LAST) if (Path(folder) / name).is_dir()]
        raise RunError(
            f"Run {folder} has no checkpoint '{which}'. It has {', '.join(there) or 'none yet'}."
        )
    model, params, tokenizer = settings.load()
    adapter = load_adapter(checkpoint, params=params)
    return Trained(settings, model, params, tokenizer, adapter)


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain types, with the name of the task."""
    names = {kind: name for name, kind in TASKS.items()}
    if type(settings) not in names:
        raise ConfigError(
            f"{type(settings).__name__} is no task of `TASKS`. Add an entry for it there."
        )
    fields = dataclasses.asdict(settings)
    plain = {name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}
    return {"task": names[type(settings)]} | plain


def from_dict(fields: dict[str, Any]) -> Settings:
    """The settings that `to_dict` gave.

    Raises:
      ConfigError: an unknown task or field.
    """
    fields = dict(fields)
    task = fields.pop("task", None)
    if task not in TASKS:
        raise ConfigError(f"Task is {task!r}, expected one of {', '.join(TASKS)}.")
    known = [field.name for field in dataclasses.fields(TASKS[task])]
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"Task {task} has no setting '{name}'. Nearest: {', '.join(nearest(name, known))}."
            )
    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
    }
    return TASKS[task](**values)


def read_settings(folder: str | Path) -> Settings:
    """The settings of a run."""
    return from_dict(read_config(folder))
