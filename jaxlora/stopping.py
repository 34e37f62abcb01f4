"""How a run is told to stop: signals, and the notice that machines are taken away."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from jaxlora import hosts

_calls = itertools.count(1)


class Interrupted(BaseException):
    """A signal came while an evaluation ran."""


class Stop:
    """Whether a signal asked to stop; `at_once` it interrupts what runs, twice it kills.

    With several processes it is passed on as SIGTERM, which is jax's there: all are told, and agree
    on the step after which to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._again = False
        self._at_once = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises `Interrupted`, and so does one that came before."""
        if self.asked:
            raise Interrupted
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __call__(self, *_: Any) -> None:
        """Handles a signal."""
        again, self._again = self._again, True
        if again:
            raise KeyboardInterrupt
        if not hosts.alone():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.asked = True
        if self._at_once:
            raise Interrupted


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Within it SIGINT, SIGTERM and SIGUSR1 ask to stop; only in the main thread.

    Example:
      >>> with signals() as stop:
      ...     stop.asked
      False
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    names = ["SIGINT", "SIGUSR1", *(["SIGTERM"] if hosts.alone() else [])]
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def taken_away() -> bool:
    """Whether a process of several was told to leave, and all have come to the call to do so.

    All call it equally often. Jax asks for numbers that rise, and tells of a stop at the one after
    the highest that it has seen, so that of a resumed step would miss what came before it.
    """
    return not hosts.alone() and multihost_utils.reached_preemption_sync_point(next(_calls))
