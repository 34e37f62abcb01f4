"""Every error that jaxlora raises about what a user gave it.

Each class is a `LoraError` and the builtin that fits, so `except ValueError` keeps working.
A message says what failed, what was got and expected, what there is, and what to do next.
"""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class LoraError(Exception):
    """Base class of all jaxlora errors."""


class ConfigError(LoraError, ValueError):
    """A configuration value that cannot mean anything."""


class TargetError(LoraError, ValueError):
    """A pattern that names no layer, or one that cannot be adapted."""


class ModelError(LoraError, ValueError):
    """A model that cannot be traced with the inputs given."""


class AdapterError(LoraError, ValueError):
    """An adapter that does not fit the params, or holds values it must not."""


class ShardingError(LoraError, ValueError):
    """A mesh, or a sharding, that does not fit the devices or the params."""


class TooLargeError(LoraError, MemoryError):
    """A step that a compiler refuses, because no device that it compiles for has the memory."""


class CheckpointError(LoraError, ValueError):
    """A saved adapter or model that is damaged, foreign, or does not fit."""


class DamageError(CheckpointError):
    """A saved adapter or run whose files are broken: an earlier one may still be whole."""


class DataError(LoraError, ValueError):
    """Training data that cannot be read or used: file and line are named."""


class RunError(LoraError, RuntimeError):
    """A training run that cannot start, go on or be resumed."""


class MissingDependencyError(LoraError, ImportError):
    """An optional dependency that is not installed."""


def nearest(name: str, there: Iterable[str], n: int = 3) -> list[str]:
    """The `n` names of `there` that read most like `name`, best first."""
    there = sorted(set(there))
    return difflib.get_close_matches(name, there, n=n, cutoff=0.0)


def listing(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c and 7 more`."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def optional(module: str, what: str, extra: str = "hf") -> Any:
    """Imports a module of an optional dependency.

    Args:
      module: its name, "safetensors.numpy".
      what: what needs it, for the message.
      extra: the extra of jaxlora that installs it.

    Raises:
      MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingDependencyError(
            f"{what} needs the package '{module.partition('.')[0]}', which is not installed. "
            f"Next: pip install 'jaxlora[{extra}]'."
        ) from e
