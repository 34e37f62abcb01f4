"""`derive`: a proposal of how a model's layers are called in torch, by their names and shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxlora import tree
from jaxlora.errors import ConfigError, listing
from jaxlora.models.names import Names

_WEIGHTS = ("kernel", "embedding", "scale")
_COMMON = {"model", "module", "layer", "block", "net"}


@dataclasses.dataclass(frozen=True)
class Derived:
    """A proposed table. `print(derived)` shows it, and what it leaves open.

    Attributes:
      modules: {our module path: torch's module path}, `{}` for the layer's number of a stack.
      open: {our module path: why it has no counterpart}.
      left: torch's modules with a weight that are nobody's counterpart.
    """

    modules: Mapping[str, str]
    open: Mapping[str, str]
    left: tuple[str, ...]

    @property
    def names(self) -> Names:
        """The table, for `names=` of what loads and saves."""
        return Names("", dict(self.modules))

    def __str__(self) -> str:
        width = max(map(len, self.modules), default=0)
        lines = [f"{ours:{width}}  {theirs}" for ours, theirs in sorted(self.modules.items())]
        lines += [f"{ours}: {why}" for ours, why in sorted(self.open.items())]
        if self.left:
            lines.append(f"in torch only: {listing(self.left, 10)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Module:
    name: str
    words: frozenset[str]
    numbers: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of "weight" and "bias"
    count: int = 0  # layers, of a template of several


def derive(params: Any, tensors: Mapping[str, Any]) -> Derived:
    """Proposes which module of torch each of a model's layers is, where there is no doubt.

    Two modules are the same if their shapes agree, the numbers in their names are equal, and of all
    such pairs they share the most words, with no other pair as good.

    Args:
      params: the base's params; ShapeDtypeStructs will do.
      tensors: {name: tensor or shape} of torch's state dict, or of a safetensors file.

    Returns:
      The proposal. Look at it (`print(derived)`) before its `names` are used.

    Raises:
      ConfigError: there are no params or no tensors.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((2, 4))}, "down": {"kernel": jnp.ones((4, 3))}}
      >>> print(derive(params, {"mlp.down.weight": (3, 4), "mlp.up.weight": (4, 2)}))
      down  mlp.down
      up    mlp.up
    """
    ours = _modules({path: tree.aval(leaf).shape for path, leaf in tree.items(params)}, "/")
    shapes = {name: tuple(getattr(x, "shape", x)) for name, x in tensors.items()}
    theirs = _modules({name.replace(".", "/"): shape for name, shape in shapes.items()}, ".")
    if not ours or not theirs:
        raise ConfigError(
            f"There are {len(ours)} layers here and {len(theirs)} in torch, expected some of both."
        )
    pool = [*theirs, *_templates(theirs)]
    scores = {
        a.name: {
            b.name: len(a.words & b.words) / len(a.words | b.words) for b in pool if _fit(a, b)
        }
        for a in ours
    }
    found: dict[str, str] = {}
    while pairs := _best_pairs(scores, found):
        found |= pairs
    left_open = {a.name: _why(scores[a.name], found) for a in ours if a.name not in found}
    used = {n for name in found.values() for n in _of_template(name, theirs)}
    left = tuple(m.name for m in theirs if m.name not in used)
    return Derived(found, left_open, left)


def _modules(shapes: Mapping[str, tuple[int, ...]], joint: str) -> list[_Module]:
    """The modules that hold a weight; the names of tensors have slashes."""
    of: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        kind = "bias" if leaf == "bias" else "weight" if leaf in (*_WEIGHTS, "weight") else None
        if kind is not None:
            of.setdefault(module, {})[kind] = shape
    return [
        _Module(name.replace("/", joint), *_parts(name), own)
        for name, own in of.items()
        if "weight" in own
    ]


def _parts(name: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """The words, in the singular, and the numbers of a name: layer_3/fcOut has {fc, out} and 3."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    parts = re.findall(r"[a-z]+|\d+", split.lower())
    words = frozenset(p.rstrip("s") or p for p in parts if not p.isdecimal())
    return words - _COMMON or words, tuple(p for p in parts if p.isdecimal())


def _templates(modules: list[_Module]) -> list[_Module]:
    """The layers of a kind as one, `{}` for the first number in their names."""
    groups: dict[str, dict[int, _Module]] = {}
    for m in modules:
        if number := re.search(r"(?<![^.])\d+(?=\.|$)", m.name):
            template = f"{m.name[: number.start()]}{{}}{m.name[number.end() :]}"
            groups.setdefault(template, {})[int(number[0])] = m
    found = []
    for template, group in groups.items():
        first = group.get(0)
        same = first is not None and all(m.shapes == first.shapes for m in group.values())
        if first is not None and same and sorted(group) == list(range(len(group))):
            words, numbers = _parts(template)
            found.append(_Module(template, words, numbers, first.shapes, len(group)))
    return found


def _fit(ours: _Module, theirs: _Module) -> bool:
    """Whether the numbers and shapes agree, and the names at all."""
    mine = ours.shapes
    if theirs.count:
        if any(shape[:1] != (theirs.count,) for shape in mine.values()):
            return False
        mine = {kind: shape[1:] for kind, shape in mine.items()}
    if ours.numbers != theirs.numbers or not ours.words & theirs.words:
        return False
    biases = [math.prod(shapes.get("bias", ())) for shapes in (mine, theirs.shapes)]
    if ("bias" in mine) != ("bias" in theirs.shapes) or biases[0] != biases[1]:
        return False
    a, b = mine["weight"], theirs.shapes["weight"]
    if len(b) != 2:
        return sorted(a) == sorted(b)
    splits = [(math.prod(a[:n]), math.prod(a[n:])) for n in range(1, len(a))]
    return any(sorted(split) == sorted(b) for split in splits)


def _best_pairs(scores: Mapping[str, Mapping[str, float]], found: Mapping[str, str]) -> Any:
    """The pairs each of which is the other's best by far, of what is not yet found."""
    taken = set(found.values())
    rows = {
        a: {b: s for b, s in row.items() if b not in taken}
        for a, row in scores.items()
        if a not in found
    }
    columns: dict[str, dict[str, float]] = {}
    for a, row in rows.items():
        for b, score in row.items():
            columns.setdefault(b, {})[a] = score
    best = {a: _only_best(row) for a, row in rows.items()}
    return {a: b for a, b in best.items() if b is not None and _only_best(columns[b]) == a}


def _only_best(row: Mapping[str, float]) -> str | None:
    ranked = sorted(row, key=lambda name: -row[name])
    tie = len(ranked) > 1 and row[ranked[0]] == row[ranked[1]]
    return None if not ranked or tie else ranked[0]


def _why(row: Mapping[str, float], found: Mapping[str, str]) -> str:
    free = [name for name in row if name not in set(found.values())]
    if free:
        return f"it could be {listing(sorted(free))}"
    return "torch has no module with its shape, its numbers and a word of its name"


def _of_template(name: str, modules: list[_Module]) -> list[str]:
    pattern = re.escape(name).replace(re.escape("{}"), r"\d+")
    return [m.name for m in modules if re.fullmatch(pattern, m.name)]
