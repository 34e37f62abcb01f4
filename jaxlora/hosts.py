"""Several processes that train as one: who writes, what all agree on, arrays on many hosts.

With one process, all of it does nothing. Every process must come to the same calls in the same
order, for all but `alone` and `is_writer` wait for the others.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlora.errors import RunError, listing

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PATIENCE = 60  # seconds that a process which ends waits for the others; then all are ended
_WIDTH = 256  # what is told is padded to multiples of it: each size is a compilation


def initialize() -> None:
    """Joins the other processes; before any device is touched, and once.

    JAX finds them by itself under SLURM and Open MPI, on a TPU pod, and in Kubernetes. Elsewhere
    the environment names them: JAX_COORDINATOR_ADDRESS, host and port of process 0,
    JAX_NUM_PROCESSES, and JAX_PROCESS_ID, from 0. Then JAX looks for nothing else.

    Raises:
      RunError: some of the three are given and not all, JAX finds no others, or they do not come.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _BY_HAND if os.environ.get(name)}
    by_hand = "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given
    if by_hand and len(given) < len(_BY_HAND):
        missing = [name for name in _BY_HAND if name not in given]
        raise RunError(
            f"The environment names {listing(given)} and lacks {listing(missing)}. Set all three, "
            "or none where JAX finds the other processes by itself."
        )
    try:
        if by_hand:
            address, count, index = (given[name] for name in _BY_HAND)
            jax.distributed.initialize(
                address,
                int(count),
                int(index),
                cluster_detection_method="deactivate",
                shutdown_timeout_seconds=_PATIENCE,
            )
        else:
            jax.distributed.initialize(shutdown_timeout_seconds=_PATIENCE)
    except (ValueError, RuntimeError) as e:
        said = str(e).strip().split("\n")[0]
        raise RunError(
            f"The other processes were not found: {said} Expected SLURM, Open MPI, a TPU pod or "
            f"Kubernetes, or {listing(_BY_HAND)} in the environment of each."
        ) from e


def alone() -> bool:
    """Whether there is one process only."""
    return jax.process_count() == 1


def is_writer() -> bool:
    """Whether this is the process that writes files, the first."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All come to its end, and where one process failed all fail: none waits for ever.

    Raises:
      RunError: another process failed; it says what that one said.

    Example:
      >>> with together():
      ...     if is_writer():
      ...         print("written once, and there for all after this")
      written once, and there for all after this
    """
    if alone():
        yield
        return
    error = None
    try:
        yield
    except Exception as e:
        error = e
    said = gathered("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, what in enumerate(said):
        if what:
            raise RunError(f"Process {number} of {len(said)} stopped all. {what}")


def gathered(text: str) -> list[str]:
    """What each process gives, in their order.

    Args:
      text: this one's.

    Returns:
      That of process 0, of process 1, …

    Example:
      >>> gathered("here")
      ['here']
    """
    if alone():
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    if not sizes.any():
        return [""] * len(sizes)
    width = -(-int(sizes.max()) // _WIDTH) * _WIDTH
    padded = np.frombuffer(data.ljust(width, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def same(value: Any) -> Any:
    """Process 0's value, of JSON types, in all processes.

    Args:
      value: this one's.

    Example:
      >>> same({"loss": 0.1})
      {'loss': 0.1}
    """
    return value if alone() else json.loads(gathered(json.dumps(value, default=float))[0])


def check_same(what: str, value: Any) -> None:
    """Raises unless all processes have the same.

    Args:
      what: what it is, for the message.
      value: this one's, of JSON types.

    Raises:
      RunError: which processes have another than process 0.
    """
    texts = gathered(json.dumps(value, sort_keys=True, default=str))
    others = [str(number) for number, text in enumerate(texts) if text != texts[0]]
    if others:
        raise RunError(
            f"Process {listing(others)} has {what} other than those of process 0, expected the "
            "same in all. Start each with the same command, on the same files."
        )


def on_host(tree: Any) -> Any:
    """Whole arrays of numpy from those whose parts lie on several hosts.

    Args:
      tree: any tree; its keys of random numbers must be plain arrays.

    Returns:
      The tree, each `jax.Array` as a numpy array; with one process the tree as it is.
    """
    return tree if alone() else jax.tree.map(_whole, tree)


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
