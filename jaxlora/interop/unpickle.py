"""Reads a pickle as data. It builds dicts, lists, tuples, numbers and text, and runs no code.

A pickle is a program, and `pickle.Unpickler` with an allow-list of its own still lets a file ask
for gigabytes by one index into its memo, or hash one tuple for years. So the opcodes are run here:
those of a table, on a stack of plain objects, each in time and memory of the bytes it takes.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlora.errors import CheckpointError

_MOST_BYTES = 4 * 2**20  # a tensor takes about 300; every byte can be an object of its own
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


class Known(NamedTuple):
    """What a global of a pickle stands for: immutable, so that no pickle can alter it."""

    name: str
    make: Callable[..., Any] | None = None


def load(
    data: bytes,
    known: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any],
    where: str,
) -> Any:
    """Build the object that a pickle describes.

    Args:
      data: the pickle.
      known: {"module name": what makes it of its arguments, None if it is only named}.
      persistent: the object that a persistent id stands for.
      where: what the pickle is called in messages.

    Returns:
      The object.

    Raises:
      CheckpointError: a global that is not known, or an opcode that is not needed for data. What is
        broken in another way raises whatever it meets.

    Example:
      >>> import pickle
      >>> load(pickle.dumps({"rank": 4, "sizes": (2, 3)}, 2), {}, lambda key: None, "this pickle")
      {'rank': 4, 'sizes': (2, 3)}
    """
    if len(data) > _MOST_BYTES:
        raise CheckpointError(
            f"{where} is a pickle of {len(data):,} bytes, expected at most {_MOST_BYTES:,}: one of "
            "tensors is a few hundred bytes each."
        )
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        found = stack[at + 1 :]
        del stack[at:]
        return found

    def find(name: str) -> Known:
        if name not in known:
            raise CheckpointError(
                f"{where} asks for {_short(name)}, which is refused: only tensors, dicts, numbers "
                "and text are read, and no code is run. Save the tensors alone, in torch: "
                "`torch.save({name: tensor, …}, file)`."
            )
        return Known(name, known[name])

    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _LITERALS:
                stack.append(arg)
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                _list(stack[-2]).append(stack.pop())
            case "APPENDS":
                found = to_mark()
                _list(stack[-1]).extend(found)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _dict(stack[-1])[_key(key)] = value
            case "SETITEMS":
                found = to_mark()
                pairs = zip(map(_key, found[::2]), found[1::2], strict=True)
                _dict(stack[-1]).update(pairs)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(find(arg))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(find(f"{_key(module)} {_key(name)}"))
            case "REDUCE":
                args, callee = stack.pop(), stack.pop()
                if not isinstance(callee, Known) or callee.make is None:
                    raise TypeError(f"a call of a {type(callee).__name__}")
                stack.append(callee.make(*args))
            case "BUILD":  # an OrderedDict's attributes, as those of a state dict
                stack.pop()
                _dict(stack[-1])
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "STOP":
                return stack.pop()
            case name:
                raise CheckpointError(f"{where} has the opcode {name}, which no tensors need.")
    raise EOFError("no end")


def _list(x: Any) -> list[Any]:
    if type(x) is not list:
        raise TypeError(f"items for a {type(x).__name__}")
    return x


def _dict(x: Any) -> dict[Any, Any]:
    if type(x) is not dict:
        raise TypeError(f"items for a {type(x).__name__}")
    return x


def _key(x: Any) -> str | int:
    """A key of a dict: text or a number, since hashing a tuple may take forever."""
    if type(x) not in (str, int):
        raise TypeError(f"a key that is a {type(x).__name__}")
    return x


def _short(name: str) -> str:
    name = name.replace(" ", ".")
    return repr(name if len(name) <= 80 else f"{name[:80]}…")
