"""The training loop: progress, evaluation, best and last checkpoints, stop and resume."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxlora.batches import Batches, loader
from jaxlora.errors import ConfigError, RunError, optional
from jaxlora.resume import load_state, save_state
from jaxlora.runs import VALID, Run
from jaxlora.train import StepFn, TrainState

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
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Train to the last step, or until Ctrl-C or SIGTERM, which save and leave.

    A resumed run does bit for bit what it would have done had it not been stopped: adapter,
    optimizer, step, key, place in the data and best score come back, and `metrics.jsonl` goes on
    as one file.

    Args:
      run: the folder.
      state: the state to start from; with `resume` only its structure counts.
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
      resume: go on from `run.last`.
      quiet: show no progress bar.

    Returns:
      The state, whether it was stopped, and the best score.

    Raises:
      RunError: a loss or gradient that is not finite, with its step, before anything of it is
        saved; or there is no checkpoint to resume from.
      ConfigError: steps beyond the data, or `evaluate` gives no such metric.
      MissingDependencyError: grain or rich is not installed.
    """
    steps = len(batches) if steps is None else steps
    every = batches.per_epoch if eval_every is None else eval_every
    if not 0 < steps <= len(batches) or every < 1 or log_every < 1:
        raise ConfigError(
            f"steps is {steps}, eval_every {every} and log_every {log_every}, expected at least 1, "
            f"and steps at most the {len(batches)} that the data has."
        )
    data, kept = loader(batches), _Progress()
    params = variables["params"]
    if resume:
        if not run.last.exists():
            raise RunError(f"{run.folder} has no checkpoint '{run.last.name}' to resume from.")
        state, about = load_state(run.last, state, params=params)
        kept = _Progress(**about)
        data.set_state(kept.data)
        run.rewind(int(state.step), kept.evaluated)
    at = int(state.step)

    def save() -> None:
        kept.data = data.get_state()
        save_state(run.last, state, dataclasses.asdict(kept), params=params)

    pending: list[tuple[int, dict[str, Any]]] = []

    def flush() -> None:
        for number, metrics in jax.device_get(pending):
            for name in {"loss", "grad_norm"} & metrics.keys():
                if not math.isfinite(metrics[name]):
                    raise RunError(
                        f"The {name} of step {number} is {float(metrics[name])}, expected a finite "
                        f"number. Training stopped; {run.last} is from before it. Lower the "
                        "learning rate, or look at the data of that step."
                    )
            rate = {} if schedule is None else {"learning_rate": float(schedule(number - 1))}
            run.log(number, {name: float(x) for name, x in metrics.items()} | rate)
            show(number, float(metrics["loss"]), None)
        pending.clear()

    with _signals() as stop, _bar(steps, at, quiet) as show:
        try:
            while True:
                if evaluate is not None and kept.evaluated < at and _due(at, every, steps):
                    flush()
                    with stop.at_once():
                        scores = evaluate(state.adapter)
                    better = _better(scores, metric, kept.best, higher_is_better)
                    run.log(at, {VALID + name: value for name, value in scores.items()})
                    kept.evaluated = at
                    show(at, None, scores)
                    if better:
                        kept.best, kept.best_step = float(scores[metric]), at
                        save_state(run.best, state, dataclasses.asdict(kept), params=params)
                    save()
                if at >= steps or stop.asked:
                    break
                state, metrics = step(state, variables, next(data))
                at += 1
                pending.append((at, metrics))
                if len(pending) >= log_every:
                    flush()
        except _Interrupted:  # in an evaluation, which a resumed run does again
            pass
        flush()
        save()
        run.plot()
        run.close()
    return Result(
        state,
        at < steps or (kept.evaluated < at and evaluate is not None),
        kept.best,
        kept.best_step,
    )


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


class _Interrupted(BaseException):
    """A signal came while an evaluation ran."""


class _Stop:
    """Whether a signal asked to stop; `at_once` it interrupts what runs, twice it kills."""

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        if self.asked:
            raise _Interrupted
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __call__(self, *_: Any) -> None:
        again, self.asked = self.asked, True
        if again:
            raise KeyboardInterrupt
        if self._at_once:
            raise _Interrupted


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
