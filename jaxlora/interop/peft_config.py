"""PEFT's `adapter_config.json`: what each field means here, and which modules it names.

The fields are those of PEFT 0.21.2's LoraConfig, and some that earlier versions had.
"""

import dataclasses
import functools
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxlora.errors import CheckpointError, nearest
from jaxlora.models.hub import read_json_object

FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"

USED = {
    "peft_type": (str,),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (str, list, type(None)),
    "exclude_modules": (str, list, type(None)),
    "layers_to_transform": (int, list, type(None)),
    "layers_pattern": (str, list, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "bias": (str,),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "init_lora_weights": (bool, str),
    "ensure_weight_tying": (bool,),
}
"""Fields that say what the adapter is, with the types that they have in JSON."""

HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
)
"""Fields that change no output of a trained adapter: bookkeeping, how training began or ran."""

NEUTRAL = {
    "alora_invocation_string": "activates the adapter from a certain string on",
    "alora_invocation_tokens": "activates the adapter from certain tokens on",
    "arrow_config": "routes between adapters",
    "enable_lora": "adapts some blocks of fused layers",
    "kasa_config": "truncates the base and scales each rank",
    "layer_replication": "builds another model of the base's layers",
    "lora_bias": "adds a bias to B",
    "megatron_config": "names layers of Megatron",
    "monteclora_config": "samples the factors",
    "target_parameters": "adapts raw parameters",
    "use_bdlora": "cuts the factors into blocks",
    "use_qalora": "pools the input of A",
}
"""{field: what it does}: fields that change what the adapter computes, and must be off."""

INITS = {
    "gaussian": "gaussian",
    "pissa": "pissa",
    "olora": "olora",
}
"""{PEFT's init_lora_weights: ours}; any other that leaves the base alone is "kaiming" here."""

KEEPS_BASE = ("eva", "orthogonal", "mica")
CHANGES_BASE = ("corda", "loftq", "lora_ga", "pissa_niter_")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields that say what an adapter is; see `USED`.

    Attributes:
      fields: {field: value} of `adapter_config.json`, checked.
      file: where they were read.
    """

    fields: Mapping[str, Any]
    file: Path

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or the default where it is not there or null."""
        value = self.fields.get(name)
        return default if value is None else value

    @property
    def named(self) -> bool:
        """Whether the targets are named one by one, so that what they match can be checked."""
        return self.get("target_modules", ALL_LINEAR) != ALL_LINEAR

    @property
    def init(self) -> str:
        """The name of our initializer."""
        return INITS.get(str(self.get("init_lora_weights", True)), "kaiming")

    def targets(self, module: str) -> bool:
        """Whether the config names a module, by PEFT's rules."""
        target = self.fields["target_modules"]
        if self._excludes(module):
            return False
        if isinstance(target, str):
            return re.fullmatch(target, module) is not None
        if module in target:
            return True
        return _ends(module, target) and self._in_layers(module)

    def rank(self, module: str) -> int:
        """The rank of a module."""
        return self._by_pattern("rank_pattern", module, self.get("r", 8))

    def alpha(self, module: str) -> float:
        """The alpha of a module."""
        return self._by_pattern("alpha_pattern", module, self.get("lora_alpha", 8))

    def scaling(self, module: str) -> float:
        """The factor before BA of a module."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.get("use_rslora") else rank)

    def _by_pattern(self, field: str, module: str, default: Any) -> Any:
        """What a field's patterns give for a module: the first that matches its end."""
        for pattern, value in self._patterns[field]:
            if pattern.match(module):
                return value
        return default

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        return {
            field: [
                (re.compile(rf"(.*\.)?({pattern})$"), value)
                for pattern, value in self.get(field, {}).items()
            ]
            for field in ("rank_pattern", "alpha_pattern")
        }

    def _excludes(self, module: str) -> bool:
        out = self.get("exclude_modules", [])
        if isinstance(out, str):
            if re.fullmatch(out, module):
                return True
        elif module in out or _ends(module, out):
            return True
        saved = self.get("modules_to_save", [])
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)

    def _in_layers(self, module: str) -> bool:
        numbers = self.get("layers_to_transform", [])
        numbers = [numbers] if isinstance(numbers, int) else numbers
        if not numbers:
            return True
        patterns = self.get("layers_pattern", []) or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns:
            begin = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
            if found := re.match(rf"{begin}{pattern}\.(\d+)\.", module):
                return int(found[1]) in numbers
        return False


def read_config(folder: Path) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Args:
      folder: the adapter's folder.

    Returns:
      The config.

    Raises:
      CheckpointError: there is none, it is not JSON, a field has a value of a wrong type or one
        that we cannot follow. Each is named.
    """
    file = folder / FILE
    if not file.is_file():
        there = sorted(p.name for p in folder.iterdir())[:5]
        raise CheckpointError(
            f"{folder} has no {FILE}, expected a folder of PEFT's save_pretrained. It holds "
            f"{', '.join(there) or 'nothing'}."
        )
    config = PeftConfig(read_json_object(file), file)
    _check_kind(config)
    _check_types(config)
    _check_values(config)
    _check_others(config)
    return config


def _check_kind(config: PeftConfig) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{config.file}: peft_type is {kind!r}, expected 'LORA'. What works here is LoRA with "
            "its variants: rsLoRA, DoRA, PiSSA, OLoRA, EVA, LoRA-FA."
        )


def _check_types(config: PeftConfig) -> None:
    for name, types in USED.items():
        value = config.fields.get(name)
        wrong = value is not None and not isinstance(value, types)
        if wrong or (isinstance(value, bool) and bool not in types):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise CheckpointError(f"{config.file}: {name} is {value!r}, expected {expected}.")
    each = {
        "target_modules": str,
        "exclude_modules": str,
        "layers_pattern": str,
        "modules_to_save": str,
        "layers_to_transform": int,
        "trainable_token_indices": int,
    }
    for name, kind in each.items():
        value = config.get(name)
        lists = (
            [value]
            if isinstance(value, list)
            else list((value or {}).values())
            if (isinstance(value, dict))
            else []
        )
        for items in lists:
            if not isinstance(items, list) or not all(type(item) is kind for item in items):
                raise CheckpointError(
                    f"{config.file}: {name} is {value!r}, expected a list of {kind.__name__}."
                )
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        for pattern, value in config.get(name, {}).items():
            if isinstance(value, bool) or not isinstance(value, kind):
                raise CheckpointError(
                    f"{config.file}: {name}[{pattern!r}] is {value!r}, expected a number."
                )


def _check_values(config: PeftConfig) -> None:
    def wrong(name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{config.file}: {name} is {value!r}, expected {expected}.")

    ranks = {"r": config.get("r", 8)} | {
        f"rank_pattern[{p!r}]": n for p, n in config.get("rank_pattern", {}).items()
    }
    alphas = {"lora_alpha": config.get("lora_alpha", 8)} | {
        f"alpha_pattern[{p!r}]": n for p, n in config.get("alpha_pattern", {}).items()
    }
    for name, rank in ranks.items():
        if rank < 1:
            raise wrong(name, rank, "at least 1")
    for name, alpha in alphas.items():
        if not 0 < alpha <= sys.float_info.max:  # json has integers beyond it
            raise wrong(name, alpha, "a number greater than 0")
    if not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise wrong("lora_dropout", config.get("lora_dropout"), "a probability in [0, 1)")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise wrong("bias", config.get("bias"), "'none', 'all' or 'lora_only'")
    init = str(config.get("init_lora_weights", True))
    if init.startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{config.file}: init_lora_weights is {init!r}, which changed the base in a way that "
            "cannot be done again from the config. Convert it in PEFT: "
            "`save_pretrained(…, path_initial_model_for_weight_conversion=…)`."
        )
    if init not in ("True", "False", *INITS, *KEEPS_BASE):
        raise wrong("init_lora_weights", init, f"true, {', '.join((*INITS, *KEEPS_BASE))}")
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        _check_regex(config, name, config.get(name, []))
    for name in ("rank_pattern", "alpha_pattern"):
        _check_regex(config, name, list(config.get(name, {})))


def _check_regex(config: PeftConfig, name: str, patterns: str | list[str]) -> None:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise CheckpointError(
                f"{config.file}: {name} has {pattern!r}, which is no regular expression: {e}."
            ) from e


def _check_others(config: PeftConfig) -> None:
    for name, value in sorted(config.fields.items()):
        if name in USED or name in HARMLESS:
            continue
        off = value in (None, False, 0, "", "none") or value == [] or value == {}
        if name in NEUTRAL:
            if not off:
                raise CheckpointError(
                    f"{config.file}: {name} is {value!r}, which {NEUTRAL[name]}: that is not "
                    "supported here. Expected it to be off."
                )
        elif off:
            warnings.warn(
                f"{config.file} has a field that we do not know, {name}, which is off: {value!r}.",
                stacklevel=4,
            )
        else:
            near = nearest(name, (*USED, *HARMLESS, *NEUTRAL), 1)[0]
            raise CheckpointError(
                f"{config.file} has a field that we do not know, {name}, with the value {value!r}. "
                f"It may change what the adapter computes. Nearest that we know: {near}."
            )


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)
