"""The training loop: progress, evaluation, best and last checkpoints, stop and resume."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxlora import hosts, tree
from jaxlora.batches import Batches, loader
from jaxlora.checkpoint import recover
from jaxlora.errors import ConfigError, RunError, listing, optional
from jaxlora.finite import first_bad
from jaxlora.runs import VALID, Run
from jaxlora.saver import Saver, load_newest
from jaxlora.stopping import Interrupted, signals, taken_away
from jaxlora.train import LossFn, StepFn, TrainState

_MOST_SKIPPED = 20  # steps in a row: then it is no single bad batch
Evaluate = Callable[[Any], Mapping[str, float]]
"""adapter -> {metric: value}."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      state: the last state.
      stopped: whether it was stopped before its last step, to be resumed.
      best: the best score, None if there was none.
      best_step: the step of it.
    """

    state: TrainState
    stopped: bool
    best: float | None
    best_step: int


@dataclasses.dataclass
class _Progress:
    """What the loop keeps beside the state; saved as JSON with it."""

    evaluated: int = -1
    best: float | None = None
    best_step: int = -1
    data: Any = None


def fit(
    run: Run,
    state: TrainState,
    step: StepFn,
    variables: Any,
    batches: Batches,
    *,
    steps: int | None = None,
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
    metric: str = "loss",
    higher_is_better: bool = False,
    log_every: int = 10,
    schedule: Callable[[int], Any] | None = None,
    keep: int = 2,
    save_every: float | None = None,
    resume: bool = False,
    quiet: bool = False,
    loss_fn: LossFn | None = None,
) -> Result:
    """Train to the last step, or until Ctrl-C, SIGTERM or SIGUSR1, which save and leave.

    With several processes all call it, each with its share of the arrays and all of the batches;
    the first alone writes. A signal to one of them, or the notice that its machine is about to be
    taken away, makes all leave after the same step.

    A resumed run does bit for bit what it would have done had it not been stopped: adapter,
    optimizer, step, key, place in the data and best score come back, and `metrics.jsonl` goes on
    as one file.

    Args:
      run: the folder.
      state: the state to start from; with a checkpoint to resume only its structure counts.
      step: what `make_train_step` compiled.
      variables: the base.
      batches: the batches, all epochs of them.
      steps: the last step; default: one for each batch.
      evaluate: adapter -> metrics, called before the first step, every `eval_every` steps and
        after the last one.
      eval_every: steps between evaluations and saves; default: an epoch.
      metric: the metric of `evaluate` that tells which checkpoint is the best.
      higher_is_better: whether more of it is better.
      log_every: steps between writes of the log, which is where the loss is waited for.
      schedule: step -> learning rate, to log it.
      keep: how many states to keep, `run.last` included: a damaged one is passed over.
      save_every: seconds after which to save between evaluations as well.
      resume: go on from `run.last`, or with a warning from the newest checkpoint that is whole; a
        run that was killed before its first checkpoint begins anew, with a warning.
      quiet: show no progress bar.
      loss_fn: what `step` was made of. Where a step made with `on_bad_step` is not finite, it runs
        once more and the module that first went bad is named (`jaxlora.finite.first_bad`), with
        the adapter as it is then. Not with several processes.

    Returns:
      The state, whether it was stopped, and the best score.

    Raises:
      RunError: a loss or gradient that is not finite, with its step, the leaves and the module,
        before anything of it is saved; or another process
        writes there.
      CheckpointError: a save failed, or no checkpoint is whole.
      ConfigError: steps beyond the data, or `evaluate` gives no such metric.
      MissingDependencyError: grain or rich is not installed.
    """
    steps = len(batches) if steps is None else steps
    every = batches.per_epoch if eval_every is None else eval_every
    if not 0 < steps <= len(batches) or min(every, log_every, keep) < 1:
        raise ConfigError(
            f"steps is {steps}, eval_every {every}, log_every {log_every} and keep {keep}, "
            f"expected at least 1, and steps at most the {len(batches)} that the data has."
        )
    data, kept = loader(batches), _Progress()
    params = variables["params"]
    if resume:
        with hosts.together():
            if hosts.is_writer():
                recover(run.last)
                recover(run.best)
        with hosts.together():
            about = {}
            if run.checkpoints:
                state, about = load_newest(run.checkpoints, state, params)
                kept = _Progress(**about)
                data.set_state(kept.data)
            else:
                warnings.warn(f"{run.folder} has no checkpoint yet: it begins anew.", stacklevel=2)
        hosts.check_same("a checkpoint", [int(state.step), about])
        with hosts.together():
            run.rewind(int(state.step), kept.evaluated)
    at = int(state.step)

    def save(saver: Saver) -> None:
        kept.data = data.get_state()
        saver.save(run.last, state, dataclasses.asdict(kept), keep)

    pending: list[tuple[int, Any, dict[str, Any]]] = []
    skipped = 0  # in a row

    def flush() -> None:
        found = jax.device_get(hosts.on_host([metrics for _, _, metrics in pending]))
        made = [(at, batch) for at, batch, _ in pending]
        pending.clear()
        with hosts.together():
            for (number, batch), metrics in zip(made, found, strict=True):
                report(number, batch, metrics)

    def report(number: int, batch: Any, metrics: dict[str, Any]) -> None:
        nonlocal skipped
        bad = metrics.pop("bad_leaves", None)
        skips = bool(metrics.get("skipped", False))
        skipped = skipped + 1 if skips else 0
        for name in ("loss", "grad_norm"):
            finite = math.isfinite(metrics.get(name, 0.0))
            if not finite and (not skips or skipped >= _MOST_SKIPPED):
                where = _named(state, bad)
                if bad is not None and loss_fn is not None and hosts.alone():
                    key = jax.random.fold_in(state.key, number - 1)
                    where += _born(name, state, loss_fn, variables, batch, key)
                raise RunError(
                    f"The {name} of step {number} is {float(metrics[name])}, expected a finite "
                    f"number{where}. Training stopped; {run.last} is from before it. Lower the "
                    "learning rate, or look at the data of that step."
                )
        rate = {} if schedule is None else {"learning_rate": float(schedule(number - 1))}
        run.log(number, {name: float(x) for name, x in metrics.items()} | rate)
        show(number, float(metrics["loss"]), None)

    def save_is_due() -> bool:  # by the clock of the first process, where all have come to a flush
        if save_every is None or (pending and not hosts.alone()):
            return False
        return hosts.same(time.monotonic() - saved >= save_every)

    saved = time.monotonic()  # a clock that is set back or forth does not matter to it
    with (
        run.locked(),
        Saver(params) as saver,
        signals() as stop,
        _bar(steps, at, quiet or not hosts.is_writer()) as show,
    ):
        try:
            while True:
                if evaluate is not None and kept.evaluated < at and _due(at, every, steps):
                    flush()
                    with stop.at_once(), hosts.together():
                        scores = evaluate(state.adapter)
                    scores = hosts.same(scores)
                    better = _better(scores, metric, kept.best, higher_is_better)
                    with hosts.together():
                        run.log(at, {VALID + name: value for name, value in scores.items()})
                    kept.evaluated = at
                    show(at, None, scores)
                    if better:
                        kept.best, kept.best_step = float(scores[metric]), at
                        kept.data = data.get_state()
                        saver.save(run.best, state, dataclasses.asdict(kept))
                    save(saver)
                    saved = time.monotonic()
                elif save_is_due():
                    flush()
                    save(saver)
                    saved = time.monotonic()
                if at >= steps or stop.asked or taken_away():
                    break
                batch = next(data)
                state, metrics = step(state, variables, batch)
                at += 1
                pending.append((at, batch if loss_fn else None, metrics))
                if len(pending) >= log_every:
                    flush()
        except Interrupted:  # in an evaluation, which a resumed run does again
            pass
        flush()
        save(saver)
        saver.wait()
        with hosts.together():
            if hosts.is_writer():
                run.plot()
            run.close()
    return Result(
        state,
        at < steps or (kept.evaluated < at and evaluate is not None),
        kept.best,
        kept.best_step,
    )


def _named(state: TrainState, bad: Any) -> str:
    """Which leaves a bad gradient belongs to."""
    if bad is None or not bad.any():
        return ""
    names = [path for path, _ in tree.items(state.adapter.params)]
    found = [name for name, wrong in zip(names, bad, strict=True) if wrong]
    return f". Not finite: the gradients of {len(found)} of {len(names)} leaves, {listing(found)}"


def _born(name: str, state: TrainState, loss_fn: LossFn, *args: Any) -> str:
    """Where a forward pass goes bad, with the adapter as it is when that is found out."""
    with_adapter = f"with the adapter after step {int(state.step)}, bad steps left out"
    try:
        bad = first_bad(loss_fn, state.adapter, *args)
    except Exception as e:  # what stopped the run is what is to be said
        return f". Which module was first is not known: {type(e).__name__}: {str(e)[:200]}"
    if bad is None:
        why = "" if name == "loss" else ": the backward pass is not"
        return f". The forward pass, {with_adapter}, is finite{why}"
    return f". First not finite, {with_adapter}: {bad}"


def _due(at: int, every: int, steps: int) -> bool:
    return at % every == 0 or at >= steps


def _better(scores: Mapping[str, float], metric: str, best: float | None, higher: bool) -> bool:
    if metric not in scores:
        raise ConfigError(
            f"The best checkpoint is chosen by '{metric}', the evaluation gives "
            f"{', '.join(scores)}."
        )
    score = float(scores[metric])
    if not math.isfinite(score):
        return False
    return best is None or (score > best if higher else score < best)


@contextlib.contextmanager
def _bar(steps: int, at: int, quiet: bool) -> Iterator[Callable[..., None]]:
    if quiet:
        yield lambda *_: None
        return
    rich = optional("rich.progress", "The progress bar", "train")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("loss {task.fields[loss]}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=at, loss="-")

        def show(at: int, loss: float | None, scores: Mapping[str, float] | None) -> None:
            progress.update(task, completed=at, **({} if loss is None else {"loss": f"{loss:.4f}"}))
            if scores:
                said = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
                progress.console.print(f"step {at}: validation {said}", highlight=False)

        yield show
