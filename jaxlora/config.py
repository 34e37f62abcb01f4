"""`LoraConfig`: what to adapt and how."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.errors import ConfigError, nearest

ALL_LINEAR = "all-linear"
BIAS_MODES = ("none", "all", "lora_only")
MODES = ("branch", "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how (Hu et al. 2021, section 4).

    Frozen and hashable: equal configs are equal keys of a jit cache, whatever the order in which
    their patterns were written.

    A pattern is a regular expression that must match the end of a layer's path in full, starting
    at a `/`: `"query"`, `"attention/(query|value)"` and `"layer_[0-3]/.*/query"` are patterns for
    `encoder/layer_0/attention/query`. The path of the kernel itself (`…/query/kernel`) matches
    as well.

    Attributes:
      rank: the rank r of the update BA, at least 1.
      alpha: the update is scaled by `alpha / rank`; greater than 0.
      targets: patterns of the layers to adapt, or `"all-linear"`: every layer that multiplies by
        a kernel, less embeddings and whatever `modules_to_save` names.
      exclude: patterns of layers to leave alone; a pattern that matches a scope covers all in it.
      dropout: probability in [0, 1) of dropping an input of A. Active exactly when a "dropout"
        rng is given to `lora_apply`.
      modules_to_save: patterns of modules that are trained in full beside the factors, such as a
        fresh classification head.
      bias: "none", "all" (every leaf named `bias`) or "lora_only" (those of adapted layers).
      init: the name of the initializer: "kaiming", "gaussian", "orthogonal", "zero_free", "pissa",
        "pissa_fast", "olora", "eva" (with `eva_init`), or one that was registered with
        `register_init`. None changes the base.
      rslora: scale by `alpha / sqrt(rank)` (Kalajdzievski 2023).
      rank_pattern: {pattern: rank} for layers that differ from `rank`.
      alpha_pattern: {pattern: alpha} for layers that differ from `alpha`.
      fused: {pattern: mask} for kernels that hold several layers side by side, such as GPT-2's
        `c_attn`: `{"c_attn": (True, False, True)}` adapts q and v only, each with `rank` rows of A
        of its own (loralib's MergedLinear). The blocks are an output axis of the mask's length if
        there is one, such as (in, 3, heads, dim), or else equal parts of the last.
      dora: train each kernel's magnitude beside its direction (Liu et al. 2024).
      freeze_a: train B only, A stays as it starts (LoRA-FA, Zhang et al. 2023).
      layers: the numbers of the layers to adapt, such as `range(12, 24)`; all by default. A layer's
        number is the first one that ends a name in its path: 3 in `encoder/layer_3/mlp/dense_1`.
      token_rows: {pattern: rows} of embedding tables whose given rows alone are trained in full,
        such as those of new tokens.
      mode: "branch", or "weights": kernels that no rule serves are adapted as well, by adding the
        update to the kernel before the model runs. The price is a copy of each such kernel and the
        dense gradient of it in every step, and no dropout there.
      roles: {pattern: roles} of kernels that no rule serves, under mode="weights": a letter for
        each axis as the layer sees it, `i` contracted with the input, `o` kept in the output, `b`
        both, as `"bio"` for the experts of a mixture. Kernels of two axes are (in, out) unless this
        says otherwise.
      param_dtype: dtype of the trained leaves. They are cast to the layer's dtype for computing.

    Raises:
      ConfigError: a value that cannot mean anything, named.

    Example:
      >>> import jaxlora as jl
      >>> config = jl.LoraConfig(rank=4, alpha=8, targets="attention/(query|value)")
      >>> jl.LoraConfig.from_dict(config.to_dict()) == config
      True
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | Iterable[str] = ALL_LINEAR
    exclude: str | Iterable[str] = ()
    dropout: float = 0.0
    modules_to_save: str | Iterable[str] = ()
    bias: str = "none"
    init: str = "kaiming"
    rslora: bool = False
    rank_pattern: Mapping[str, int] | Iterable[tuple[str, int]] = ()
    alpha_pattern: Mapping[str, float] | Iterable[tuple[str, float]] = ()
    fused: Mapping[str, Iterable[bool]] | Iterable[tuple[str, Iterable[bool]]] = ()
    dora: bool = False
    freeze_a: bool = False
    layers: Iterable[int] | None = None
    token_rows: Mapping[str, Iterable[int]] | Iterable[tuple[str, Iterable[int]]] = ()
    mode: str = "branch"
    roles: Mapping[str, str] | Iterable[tuple[str, str]] = ()
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        canonical = {
            "rank": _rank("rank", self.rank),
            "alpha": _alpha("alpha", self.alpha),
            "targets": _patterns("targets", self.targets),
            "exclude": _patterns("exclude", self.exclude),
            "dropout": _dropout(self.dropout),
            "modules_to_save": _patterns("modules_to_save", self.modules_to_save),
            "bias": _choice("bias", self.bias, BIAS_MODES),
            "rslora": _bool("rslora", self.rslora),
            "dora": _bool("dora", self.dora),
            "rank_pattern": _pattern_values("rank_pattern", self.rank_pattern, _rank),
            "alpha_pattern": _pattern_values("alpha_pattern", self.alpha_pattern, _alpha),
            "fused": _pattern_values("fused", self.fused, _mask),
            "freeze_a": _bool("freeze_a", self.freeze_a),
            "layers": None if self.layers is None else _indices("layers", self.layers),
            "token_rows": _pattern_values("token_rows", self.token_rows, _indices),
            "mode": _choice("mode", self.mode, MODES),
            "roles": _pattern_values("roles", self.roles, _roles),
            "param_dtype": _float_dtype(self.param_dtype),
        }
        for name, value in canonical.items():
            object.__setattr__(self, name, value)
        if not self.targets:
            raise ConfigError(
                "targets is empty, expected a pattern or 'all-linear': nothing would be adapted."
            )

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor before BA: alpha/rank, or alpha/sqrt(rank) with `rslora`."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in fields.items():
            if name in ("rank_pattern", "alpha_pattern", "roles"):
                fields[name] = dict(value)
            elif name in ("fused", "token_rows"):
                fields[name] = {pattern: list(values) for pattern, values in value}
            elif isinstance(value, tuple):
                fields[name] = list(value)
        return fields | {"param_dtype": np.dtype(self.param_dtype).name}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LoraConfig":
        """The inverse of `to_dict`; an unknown field is a ConfigError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"Unknown config field '{name}'. Nearest: {', '.join(nearest(name, known))}."
                )
        return cls(**fields)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "LoraConfig":
        """The inverse of `to_json`."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"The config is not JSON: {e}.") from e
        if not isinstance(fields, dict):
            raise ConfigError(f"The config is a JSON {type(fields).__name__}, expected an object.")
        return cls.from_dict(fields)


_LARGEST_RANK = 2**31 - 1


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` matches the end of `path` in full, starting at a `/` or at the start."""
    return re.fullmatch(f"(?:.*/)?(?:{pattern})", path) is not None


def covers(pattern: str, path: str) -> bool:
    """Whether `pattern` matches `path` or one of the scopes it lies in."""
    parts = path.split("/")
    return any(matches(pattern, "/".join(parts[: n + 1])) for n in range(len(parts)))


def _rank(name: str, value: Any) -> int:
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not number or value < 1:
        raise ConfigError(f"{name} is {value!r}, expected an integer of at least 1.")
    if value > _LARGEST_RANK:  # JSON has integers beyond every float
        raise ConfigError(f"{name} is too large, expected at most {_LARGEST_RANK}.")
    return int(value)


def _alpha(name: str, value: Any) -> float:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    try:
        alpha = float(value) if number else math.nan
    except OverflowError:  # JSON has integers beyond every float
        alpha = math.inf
    if not 0 < alpha < math.inf:
        raise ConfigError(f"{name} is {value!r}, expected a number greater than 0.")
    return alpha


def _dropout(value: Any) -> float:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ConfigError(f"dropout is {value!r}, expected a probability in [0, 1).")
    return float(value)


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{name} is {value!r}, expected True or False.")
    return bool(value)


def _choice(name: str, value: Any, choices: Iterable[str]) -> str:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")
    return value


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise ConfigError(f"{name} is {value!r}, expected a pattern or several.")
    patterns = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"{name} is {value!r}, expected a pattern or several.")
    return tuple(sorted({_pattern(name, p) for p in patterns}))


def _pattern(name: str, pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"{name} pattern {pattern!r} is no regular expression: {e}.") from e
    return pattern


def _pattern_values(name: str, value: Any, check: Any) -> tuple[tuple[str, Any], ...]:
    try:
        pairs = dict(value).items()
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}, expected a dict from pattern to value.") from None
    return tuple(sorted((_pattern(name, p), check(f"{name}[{p!r}]", v)) for p, v in pairs))


def _mask(name: str, value: Any) -> tuple[bool, ...]:
    mask = tuple(value) if isinstance(value, Iterable) else ()
    if len(mask) < 2 or not any(mask) or not all(isinstance(on, (bool, np.bool_)) for on in mask):
        raise ConfigError(
            f"{name} is {value!r}, expected a mask such as (True, False, True) of two blocks or "
            "more, one of them True."
        )
    return tuple(map(bool, mask))


def _indices(name: str, value: Any) -> tuple[int, ...]:
    found = list(value) if isinstance(value, Iterable) else []
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in found)
    if not found or not whole or min(found) < 0 or len(set(found)) < len(found):
        raise ConfigError(
            f"{name} is {value!r}, expected one or more integers from 0, each of them once."
        )
    return tuple(sorted(map(int, found)))


def _roles(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[bio]+", value) or not {*"io"} <= {*value}:
        raise ConfigError(
            f"{name} is {value!r}, expected letters i, o and b for the kernel's axes, such as 'io'."
        )
    return value


def _float_dtype(value: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(value)
    except (TypeError, ValueError):
        raise ConfigError(f"param_dtype is {value!r}, expected a floating dtype.") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"param_dtype is {dtype.name}, expected a floating dtype.")
    return dtype
