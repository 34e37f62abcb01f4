"""Flags of a command from a dataclass, with `--config file.yaml` beneath them."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxlora.errors import ConfigError, nearest, optional
from jaxlora.runs import read_yaml

T = TypeVar("T")

positional = optional("tyro", "The command line", "train").conf.Positional
"""Marks a field that is given without a flag."""


def parse(kind: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse flags into a dataclass.

    Args:
      kind: the dataclass; its docstring and those of its fields are the help.
      argv: the flags; `--config FILE` names a YAML file of fields, which the flags override.
      prog: what the help calls the command.
      default: values beneath the file's.

    Returns:
      The dataclass.

    Raises:
      ConfigError: a config file that cannot be read, or a field that is unknown or of a wrong type.
      SystemExit: flags that are wrong (status 2), or `--help`.
    """
    tyro = optional("tyro", "The command line", "train")
    file, rest = _taken(argv)
    values = {} if file is None else fields_of(kind, read_yaml(file), file)
    if default is None:
        missing = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        default = kind(**(missing | values))
    else:
        default = dataclasses.replace(default, **values)  # type: ignore[type-var]
    more = "--config FILE reads the flags from a YAML file; flags override it."
    about = f"{inspect.cleandoc(kind.__doc__ or prog)}\n\n{more}"
    return tyro.cli(kind, args=rest, default=default, prog=prog, description=about)


def fields_of(kind: type, found: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The values of a config file as the types of a dataclass's fields.

    Raises:
      ConfigError: an unknown field, or a value of another type.
    """
    hints, values = typing.get_type_hints(kind), {}
    known = [field.name for field in dataclasses.fields(kind)]
    for name, value in found.items():
        field = str(name).replace("-", "_")
        if field == "task" and field not in known:
            continue
        if field not in known:
            raise ConfigError(
                f"{file} has the field '{name}', which there is not. "
                f"Nearest: {', '.join(nearest(field, known))}."
            )
        try:
            values[field] = _typed(value, hints[field])
        except (TypeError, ValueError):
            raise ConfigError(
                f"{file}: {name} is {value!r}, expected {_called(hints[field])}."
            ) from None
    return values


def _taken(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of `--config`, and the other flags."""
    file, rest, given = None, [], iter(argv)
    for flag in given:
        if flag == "--config":
            file = next(given, None)
            if file is None:
                raise ConfigError("--config got nothing, expected a YAML file.")
        elif flag.startswith("--config="):
            file = flag.partition("=")[2]
        else:
            rest.append(flag)
    return file, rest


def _typed(value: Any, hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        return _typed(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _typed(value, next(part for part in inner if part is not type(None)))
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_typed(item, inner[0]) for item in value)
    if hint is float and isinstance(value, str):
        return float(value)  # YAML takes 5e-4 for a string
    if hint in (int, float) and isinstance(value, bool):
        raise TypeError
    if hint is float and isinstance(value, int):
        return float(value)
    if hint in (str, Path) and isinstance(value, (str, int)) and not isinstance(value, bool):
        return hint(str(value))
    if not isinstance(value, hint):
        raise TypeError
    return value


def _called(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
