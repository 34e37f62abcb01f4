"""Which leaves of a base a config means: its patterns, resolved against the paths there are."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlora import layers
from jaxlora.adapter import SavedLeaf
from jaxlora.config import ALL_LINEAR, LoraConfig, covers, matches
from jaxlora.discover import Seen, Use
from jaxlora.errors import TargetError, listing, nearest

_NORMS = {"LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"}  # Linen's and NNX's


class Targets:
    """The leaves of a base, sorted by what the config's patterns say of them.

    Attributes:
      candidates: paths that may be adapted, if the trace finds a layer there that can be.
      saved: paths that `modules_to_save` names.
    """

    def __init__(self, leaves: Mapping[str, Any], config: LoraConfig):
        self._leaves, self._config = leaves, config
        self._all_linear = ALL_LINEAR in config.targets
        self._patterns = [p for p in config.targets if p != ALL_LINEAR]
        excluded = self._covered("exclude", config.exclude)
        self.saved = self._covered("modules_to_save", config.modules_to_save) - excluded
        self._named = {path: [p for p in self._patterns if names(p, path)] for path in leaves}
        for pattern in self._patterns:
            self._check_target(pattern, excluded)
        for path in sorted(self.saved):
            if self._named[path]:
                raise TargetError(
                    f"{path} is named both by the target pattern {self._named[path][0]!r} and by "
                    "modules_to_save, expected one of them: it is adapted or trained in full."
                )
        asked = {path for path in leaves if self._named[path] or self._all_linear}
        self.candidates = self._in_layers(asked - excluded - self.saved)
        check_patterns_used("token_rows", config.token_rows, leaves)
        self.tables = {
            p: rows
            for p in leaves
            if (rows := pattern_value("token_rows", config.token_rows, p, ()))
        }

    def adapted(self, seen: Seen) -> dict[str, Use]:
        """The kernels to adapt, by path.

        Raises:
          TargetError: the config asks for a layer that cannot be adapted, or for none at all.
        """
        uses = {
            path: use
            for path, use in seen.uses.items()
            if path in self.candidates - seen.changed and (self._named[path] or not use.lookup)
        }
        served = {path.rpartition("/")[0] for path in uses}
        for path in sorted(self.candidates - set(seen.uses) | self.candidates & seen.changed):
            scope, _, name = path.rpartition("/")
            weight = seen.ndims.get(path, len(self._leaves[path].shape)) >= 2
            norm = not _NORMS.isdisjoint(c.__name__ for c in seen.holders.get(path, object).__mro__)
            # A pattern names a layer, and is content with its kernel, or names the leaf itself.
            own = [p for p in self._named[path] if scope not in served or matches(p, path)]
            implied = self._all_linear and name == "kernel"
            if ((own and weight) or implied) and not norm:
                if self._config.mode != "weights" or path not in seen.holders:
                    raise self._unreachable(path, seen)
                uses[path] = self._in_weights(path, seen)
        for pattern in self._patterns:
            if not any(pattern in self._named[path] for path in uses):
                raise self._unmatched("Target", pattern)
        if not uses:
            raise TargetError(
                "Targets 'all-linear' found no layer to adapt, expected at least one. The params "
                f"are: {listing(self._leaves) or 'none'}. modules_to_save and exclude were: "
                f"{listing((*self._config.modules_to_save, *self._config.exclude)) or 'empty'}."
            )
        return uses

    def rows(self, seen: Seen, adapted: Iterable[str]) -> list[SavedLeaf]:
        """The tables some of whose rows are trained.

        Raises:
          TargetError: one that is no table, is adapted or trained in full as well, or is too short.
        """
        found = []
        for path, rows in self.tables.items():
            use, shape = seen.uses.get(path), self._leaves[path].shape
            if use is None or not use.lookup or use.stack:
                raise TargetError(
                    f"token_rows names {path}, but no layer looks it up by integers as nn.Embed "
                    "does, expected an embedding table."
                )
            axis = use.roles.index("i")
            if path in self.saved or path in set(adapted):
                raise TargetError(
                    f"{path} is named by token_rows and adapted or trained in full as well, "
                    "expected one of them."
                )
            if rows[-1] >= shape[axis]:
                raise TargetError(
                    f"token_rows names row {rows[-1]} of {path}, which has {shape[axis]} rows."
                )
            found.append(SavedLeaf(path, tuple(shape), rows, axis))
        return found

    def biases(self, uses: Iterable[str]) -> set[str]:
        """The paths of the biases that the config trains."""
        mode = self._config.bias
        scopes = {path.rpartition("/")[0] for path in uses}
        biases = {
            path
            for path in self._leaves
            if path.rpartition("/")[2] == "bias"
            and (mode == "all" or path.rpartition("/")[0] in scopes)
        }
        if mode != "none" and not biases:
            raise TargetError(
                f"bias is {mode!r}, but no leaf that it covers is named 'bias'. "
                "Expected one, or bias='none'."
            )
        return biases if mode != "none" else set()

    def _in_layers(self, paths: set[str]) -> set[str]:
        """Those of the paths whose layer the config names."""
        if self._config.layers is None:
            return paths
        layers = set(self._config.layers)
        numbers = {path: _layer_number(path) for path in paths}
        there = sorted({n for n in numbers.values() if n is not None})
        absent = sorted(layers - set(there))
        if absent:
            raise TargetError(
                f"layers names {listing(map(str, absent))}, but "
                + (
                    f"the targets lie in the layers {listing(map(str, there), 30)}."
                    if there
                    else "no target has a number in its path, as encoder/layer_3/query has. Layers "
                    "stacked by nn.scan are one kernel, adapted together."
                )
            )
        return {path for path, n in numbers.items() if n in layers}

    def _in_weights(self, path: str, seen: Seen) -> Use:
        """How a kernel that no rule serves is adapted in weight space."""
        kind, ndim = seen.holders[path].__name__, seen.ndims[path]
        roles = pattern_value("roles", self._config.roles, path, "io" if ndim == 2 else "")
        if len(roles) != ndim:
            raise TargetError(
                f"{path} has {ndim} axes in {kind}, and no rule tells what they are; roles gives "
                f"{roles or 'nothing'!r}. Expected a letter for each axis, such as "
                f"roles={{{path.rpartition('/')[2]!r}: {'b' * (ndim - 2) + 'io'!r}}}."
            )
        if self._config.dropout:
            raise TargetError(
                f"{path} is adapted in weight space, which never sees the layer's input, so there "
                "is nothing to drop. Expected dropout=0, or `exclude` it."
            )
        return Use(kind, roles, seen.stacks[path], lookup=False, weights=True)

    def _check_target(self, pattern: str, excluded: set[str]) -> None:
        found = {path for path, patterns in self._named.items() if pattern in patterns}
        if not found:
            raise self._unmatched("Target", pattern)
        if found <= excluded:
            raise TargetError(
                f"All that target pattern {pattern!r} matches is excluded by "
                f"{listing(map(repr, self._config.exclude))}, expected something to adapt."
            )

    def _covered(self, field: str, patterns: Iterable[str]) -> set[str]:
        found = {p: {path for path in self._leaves if covers(p, path)} for p in patterns}
        for pattern, paths in found.items():
            if not paths:
                raise self._unmatched(field, pattern)
        return set().union(*found.values())

    def _unmatched(self, field: str, pattern: str) -> TargetError:
        kernels = [path for path, x in self._leaves.items() if len(x.shape) >= 2]
        scopes = {path.rpartition("/")[0] or path for path in kernels}
        ends = ["/".join(path.split("/")[-depth:]) for path in scopes for depth in (1, 2)]
        near = [f"{e} ({sum(matches(e, p) for p in scopes)})" for e in nearest(pattern, ends)]
        return TargetError(
            f"{field} pattern {pattern!r} matched none of the {len(kernels)} kernels. "
            f"Nearest: {', '.join(near) or 'there are no kernels'}."
        )

    def _unreachable(self, path: str, seen: Seen) -> TargetError:
        if path not in seen.holders:
            return TargetError(
                f"{path} is a target, but the example inputs run no layer that holds it. Expected "
                "inputs that run every target, or `exclude` it."
            )
        kind = seen.holders[path].__name__
        if path in seen.changed:
            return TargetError(
                f"{path} is changed on its way to its layer {kind}, as by nn.map_variables or "
                "nn.WeightNorm, and the factors beside it would be changed too. Expected a kernel "
                'that reaches its layer as it is. `exclude` it, or use `mode="weights"`.'
            )
        return TargetError(
            f"{path} is a target, but {kind} is no layer that can be adapted. There is: "
            f"{', '.join(layers.registered_types())}. `exclude` it, register a rule for it "
            '(`jaxlora.register`), or adapt it in weight space: `mode="weights"`.'
        )


def _layer_number(path: str) -> int | None:
    """The first number that ends a name in the path: 3 for `encoder/layer_3/mlp/dense_1/kernel`."""
    found = re.search(r"(\d+)/", path)
    return int(found[1]) if found else None


def names(pattern: str, path: str) -> bool:
    """Whether a pattern names the layer that holds the leaf at `path`, or the leaf itself."""
    return matches(pattern, path.rpartition("/")[0]) or matches(pattern, path)


def pattern_value(field: str, pairs: Any, path: str, default: Any) -> Any:
    """What {pattern: value} pairs give for a path, or the default.

    Raises:
      TargetError: two patterns give it different values.
    """
    found = {pattern: value for pattern, value in pairs if names(pattern, path)}
    if len(set(found.values())) > 1:
        raise TargetError(
            f"{field} gives {path} different values: {found}, expected one. "
            "Let only one of the patterns match it."
        )
    return next(iter(found.values()), default)


def check_patterns_used(field: str, pairs: Any, paths: Iterable[str]) -> None:
    """Raises TargetError if a pattern matches none of the adapted kernels."""
    paths = list(paths)
    for pattern, _ in pairs:
        if not any(names(pattern, path) for path in paths):
            raise TargetError(
                f"{field} pattern {pattern!r} matched none of the {len(paths)} kernels. "
                f"Nearest: {listing(nearest(pattern, paths), 3)}."
            )
