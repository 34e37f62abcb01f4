"""Saves of a run in the background, in order, with earlier ones kept.

A save copies the state on its device and returns; a thread writes it. Checkpoints never change
once they are there, so an earlier one is kept as hard links, which cost no room until its files
are gone from `last`.
"""

import concurrent.futures
import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import hosts, tree
from jaxlora.errors import DamageError
from jaxlora.resume import load_state, save_state
from jaxlora.train import TrainState

_STEP = "step-"


class Saver:
    """Writes states one after the other in a thread; with several processes, at once.

    Args:
      params: the base, whose fingerprint is stored.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, optax, tempfile
      >>> model, x, tx = nn.Dense(3), jnp.ones((2, 4)), optax.adam(1e-3)
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> state = jl.TrainState.create(adapter, tx, jax.random.key(2))
      >>> last = Path(tempfile.mkdtemp()) / "last"
      >>> with Saver() as saver:
      ...     saver.save(last, state, {"epoch": 1}, keep=2)
      >>> [path.name for path in earlier(last)]
      ['step-00000000']
    """

    def __init__(self, params: tree.Tree | None = None) -> None:
        self._params = params
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxlora-saver")
        self._under_way: concurrent.futures.Future[None] | None = None

    def save(self, path: Path, state: TrainState, about: Mapping[str, Any], keep: int = 1) -> None:
        """Begin to write a state, after the one before is written.

        Args:
          path: the folder; what is there is replaced when the new one is whole.
          state: the state. Its buffers may be donated as soon as this returns.
          about: as for `save_state`; must not change any more.
          keep: how many states to have, this one included; the others are `earlier(path)`.

        Raises:
          CheckpointError: the save before failed.
        """
        self.wait()
        if not hosts.alone():  # all take part in a save, in the same order
            self._write(path, state, about, keep)
            return
        state = jax.tree.map(jnp.copy, state)
        self._under_way = self._thread.submit(self._write, path, state, about, keep)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
          CheckpointError: it could not be.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else what went wrong first is what is said
                raise
        finally:
            self._thread.shutdown()

    def _write(self, path: Path, state: TrainState, about: Mapping[str, Any], keep: int) -> None:
        save_state(path, state, about, params=self._params)
        with hosts.together():
            if keep > 1 and hosts.is_writer():
                _keep(path, int(state.step), keep)


def earlier(path: Path) -> list[Path]:
    """The states that are kept beside `path`, the newest first; that at `path` is one of them."""
    return sorted(path.parent.glob(f"{_STEP}????????"), reverse=True)


def load_newest(
    paths: Iterable[Path], like: TrainState, params: tree.Tree | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Read the first checkpoint that is whole; a warning names the damage of those before it.

    Args:
      paths: the folders, the best first.
      like: as for `load_state`.
      params: the base.

    Raises:
      CheckpointError: as `load_state`; DamageError: none is whole, and the damage of each is named.
    """
    damage: list[str] = []
    for path in paths:
        try:
            state, about = load_state(path, like, params=params)
        except DamageError as e:
            damage.append(str(e))
            continue
        if damage:
            warnings.warn(
                f"{' '.join(damage)} Went on from {path}, of step {int(state.step)}.", stacklevel=2
            )
        return state, about
    raise DamageError(f"No checkpoint is whole. {' '.join(damage)}")


def _keep(path: Path, step: int, count: int) -> None:
    """Links a checkpoint under its step's name, and removes the oldest beyond `count`."""
    to = path.with_name(f"{_STEP}{step:08d}")
    part = path.with_name(f".{to.name}.part")
    for folder in (part, to):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(path, part, copy_function=_link)
    os.rename(part, to)
    others = [p for p in earlier(path) if p != to]
    ahead = [p for p in others if p.name > to.name]  # of a run that was resumed from before them
    for old in ahead + others[len(ahead) :][count - 1 :]:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(old)


def _link(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:  # a file system without hard links
        shutil.copy2(source, to)
