"""For which kind of device a program is traced, where the arithmetic has a choice."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_BACKEND: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


def backend() -> str:
    """The platform that a program is traced for: "cpu", "gpu" or "tpu".

    Example:
      >>> with traced_for("tpu"):
      ...     backend()
      'tpu'
    """
    return _BACKEND.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Within it programs are traced for another platform than JAX's default one.

    For those that are compiled for devices that are not there, or not the default.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Example:
      >>> with traced_for("tpu"):
      ...     pass  # jax.jit(step).lower(*shapes).compile()
    """
    token = _BACKEND.set(platform)
    try:
        yield
    finally:
        _BACKEND.reset(token)
