"""Settings to a finished run, and a run's folder back to its model and adapter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlora import runs
from jaxlora.adapter import Adapter, summary
from jaxlora.batches import Batches
from jaxlora.checkpoint import load_adapter, recover
from jaxlora.errors import ConfigError, RunError, nearest
from jaxlora.fit import Result, fit
from jaxlora.init import lora_init
from jaxlora.runs import BEST, LAST, Run, read_config
from jaxlora.sharding import adapter_shardings, state_shardings
from jaxlora.tasks.base import Settings, optimizer
from jaxlora.tasks.chat import Chat
from jaxlora.tasks.classify import Classify
from jaxlora.tasks.mesh import mesh_of, placing, rows_stay
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
    settings = settings.filled()
    mesh = None if settings.mesh is None else mesh_of(settings.mesh, settings.batch_size)
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
    steps = min(len(batches), settings.max_steps or len(batches))
    key = jax.random.key(settings.seed)
    adapter = lora_init(key, model, variables, problem.config, *problem.inputs)
    tx, schedule = optimizer(settings, steps)
    state = TrainState.create(adapter, tx, jax.random.fold_in(key, 1))
    loss, place, made = problem.loss, None, None
    if mesh is not None:
        made = state_shardings(tx, adapter_shardings(adapter.spec, params, mesh))
        state = jax.device_put(state, made)
        loss, place = rows_stay(loss, mesh), placing(mesh, made)
    step = make_train_step(loss, tx, shardings=made, on_bad_step="stop")
    say(summary(params, adapter))
    say(
        f"{len(problem.train):,} training and {len(problem.valid):,} validation examples, "
        f"{problem.cut} cut to {settings.max_length} tokens; padded to {batches.lengths}, "
        f"{100 * batches.padding():.0f} % of it padding; {steps} steps"
    )
    run = Run(settings.out, to_dict(settings), resume=resume)
    result = fit(
        run,
        state,
        step if place is None else lambda *args: step(*place(*args)),
        variables,
        batches,
        steps=steps,
        evaluate=lambda adapter: problem.evaluate(adapter, variables, problem.valid),
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
