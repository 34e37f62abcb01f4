"""A run's folder: config.yaml, metrics.jsonl, TensorBoard events, curves.png, best and last."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlora.errors import ConfigError, RunError, optional
from jaxlora.saver import earlier
from jaxlora.whole import write_whole

try:
    import fcntl
except ImportError:
    fcntl = None

CONFIG, METRICS, CURVES, EVENTS = "config.yaml", "metrics.jsonl", "curves.png", "tensorboard"
BEST, LAST = "best", "last"
_LOCK = ".lock"


class Run:
    """The folder of one training run, and the files in it.

    `metrics.jsonl` has an object a line with its `step` and no clock, so that equal runs write
    equal files; times are in the TensorBoard events.

    Args:
      folder: where it is, or is to be.
      config: the settings, plain types; None reads those that are there.
      resume: go on with the run that is there; its settings must be `config`.

    Raises:
      RunError: there is a run already and `resume` is not given, there is none to go on with, or
        its settings differ.
      MissingDependencyError: pyyaml or tensorboardX is not installed.

    Example:
      >>> import tempfile
      >>> run = Run(tempfile.mkdtemp() + "/run", {"rank": 4})
      >>> run.log(1, {"loss": 0.5})
      >>> run.history()
      [{'step': 1, 'loss': 0.5}]
      >>> run.close()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        check(folder, config, resume=resume)
        self.folder = Path(folder)
        self._writer: Any = None
        self._purge: int | None = None
        if resume:
            self.config = read_config(self.folder)
        else:
            self.config = dict(config or {})
            self.folder.mkdir(parents=True, exist_ok=True)
            text = _yaml().safe_dump(self.config, sort_keys=False)
            write_whole(self.folder / CONFIG, text.encode(), overwrite=True)

    @property
    def best(self) -> Path:
        """The checkpoint with the best score."""
        return self.folder / BEST

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints to resume from, those to prefer first: last, earlier ones, best."""
        there = [self.last, *earlier(self.last), self.best]
        return [path for path in there if path.exists()]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder while this process writes to it; the system lets go when it dies.

        Raises:
          RunError: another process is writing there.
        """
        if fcntl is None:  # Windows has no such lock
            yield
            return
        with (self.folder / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise RunError(
                    f"{self.folder} is being written by another process, expected to be the only "
                    "one. Wait for it, or choose another folder."
                ) from e
            yield

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / LAST

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends metrics of a step to `metrics.jsonl` and to the TensorBoard events.

        Raises:
          RunError: there is no room, or it may not be written.
        """
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise RunError(
                f"{self.folder / METRICS} could not be written: {e}. Make room; the run can be "
                "resumed then."
            ) from e
        if self._writer is None:
            board = optional("tensorboardX", "TensorBoard events", "train")
            self._writer = board.SummaryWriter(
                logdir=str(self.folder / EVENTS), purge_step=self._purge
            )
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def history(self) -> list[dict[str, float]]:
        """All rows of `metrics.jsonl`."""
        file = self.folder / METRICS
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as e:
            raise RunError(f"{file} is damaged: {e}. Take the broken line out.") from e

    def rewind(self, step: int, evaluated: int) -> None:
        """Takes back what was logged after a step: a run that was killed got further than `last`.

        Args:
          step: the last step whose row stays.
          evaluated: the last step whose evaluation stays.
        """
        file = self.folder / METRICS
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed while it wrote
                break
            of_evaluation = any(name.startswith(VALID) for name in row)
            if row["step"] <= (evaluated if of_evaluation else step):
                kept.append(line + "\n")
        write_whole(file, "".join(kept).encode(), overwrite=True)
        self._purge = step + 1

    def plot(self) -> Path:
        """Draws the metrics over the steps into `curves.png`."""
        matplotlib = optional("matplotlib", "The plot of the curves", "train")
        figures = optional("matplotlib.figure", "The plot of the curves", "train")
        rows = self.history()
        names = [n for n in dict.fromkeys(k for row in rows for k in row) if n != "step"]
        shared = sorted({name.removeprefix(VALID) for name in names})
        with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3}):
            figure = figures.Figure(figsize=(4 * max(1, len(shared)), 3), layout="constrained")
            axes = figure.subplots(1, max(1, len(shared)), squeeze=False)[0]
            for axis, name in zip(axes, shared, strict=False):
                for which, style in ((name, "-"), (VALID + name, "o-")):
                    points = [(row["step"], row[which]) for row in rows if which in row]
                    if points:
                        axis.plot(*zip(*points, strict=True), style, label=which, markersize=3)
                axis.set(xlabel="step", title=name)
                axis.legend()
            figure.savefig(self.folder / CURVES, dpi=120)
        return self.folder / CURVES

    def close(self) -> None:
        """Flushes the TensorBoard events."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


VALID = "valid_"
"""What the names of an evaluation's metrics start with."""


def check(
    folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None, *, resume: bool = False
) -> None:
    """Raises RunError unless a run may start in the folder, or go on there with these settings."""
    folder = Path(folder)
    there = (folder / CONFIG).is_file()
    if not resume and there and (folder / METRICS).exists():
        raise RunError(
            f"{folder} holds a run already, expected a new folder. Go on with it (`--resume`), "
            "choose another folder, or remove it."
        )
    if not resume:
        return
    if not there:
        raise RunError(f"{folder} holds no run to go on with: it has no {CONFIG}.")
    if config is not None:
        _check_same(read_config(folder), dict(config), folder)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of a run.

    Raises:
      RunError: the folder holds no run, or its config is not a mapping.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise RunError(f"{folder} holds no run: it has no {CONFIG}. Expected a folder of `train`.")
    return read_yaml(file)


def read_yaml(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file that is one mapping.

    Raises:
      ConfigError: no such file, not YAML, or no mapping.
      MissingDependencyError: pyyaml is not installed.
    """
    path, yaml = Path(file), _yaml()
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"Config file {path} cannot be read: {e.strerror}.") from e
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"Config file {path} is not YAML: {e}.") from e
    if not isinstance(fields, dict):
        raise ConfigError(
            f"Config file {path} holds a {type(fields).__name__}, expected `name: value` lines."
        )
    return fields


def _check_same(there: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    names = sorted(there.keys() | given.keys())
    differ = [name for name in names if there.get(name) != given.get(name)]
    if differ:
        changes = ", ".join(f"{n} {there.get(n)!r} -> {given.get(n)!r}" for n in differ)
        raise RunError(
            f"{folder} was started with other settings: {changes}. A resumed run keeps its own; "
            "start another one in another folder."
        )


def _yaml() -> Any:
    return optional("yaml", "Reading and writing configs", "train")
