"""An adapter as the modules of torch that it changes, and as PEFT's config and tensors."""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jaxlora.adapter import Adapter
from jaxlora.errors import AdapterError, listing
from jaxlora.interop import factors
from jaxlora.models.names import Names

PREFIX = "base_model.model."
VERSION = "0.21.2"

LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
TABLE = {"a": "lora_embedding_A", "b": "lora_embedding_B", "m": "lora_magnitude_vector"}
ROWS = "token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class Module:
    """One adapted module of torch.

    Attributes:
      parts: {part: array} with the shapes of `factors.torch_shapes`.
      scaling: the factor before BA.
      table: whether it is an embedding.
      site: the path of the kernel here.
    """

    parts: Mapping[str, np.ndarray]
    scaling: float
    table: bool
    site: str

    @property
    def rank(self) -> int:
        """The rank of its update."""
        return len(self.parts["a"])


@dataclasses.dataclass(frozen=True)
class Export:
    """What torch needs of an adapter.

    Attributes:
      modules: {torch's module path: module}.
      whole: {torch's name: tensor} of modules that are trained in full.
      biases: {torch's name: tensor} of biases trained beside them.
      rows: {torch's module path: (row numbers, values)} of tables.
      all_tensors: the names of all tensors of the base, where they are known.
      options: fields of PEFT's config that do not follow from the others.
      tied: whether the head reads a table that is changed.
    """

    modules: Mapping[str, Module]
    whole: Mapping[str, np.ndarray]
    biases: Mapping[str, np.ndarray]
    rows: Mapping[str, tuple[tuple[int, ...], np.ndarray]]
    all_tensors: Collection[str]
    options: Mapping[str, Any]
    tied: bool = False

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors by PEFT's names."""
        out = {}
        for name, module in self.modules.items():
            ends = TABLE if module.table else LINEAR
            out |= {f"{name}.{ends[part]}": x for part, x in module.parts.items()}
        out |= dict(self.whole)
        for name, x in self.biases.items():
            module = name.removesuffix(".bias")
            out[f"{module}.base_layer.bias" if module in self.modules else name] = x
        out |= {f"{name}.{ROWS}": values for name, (_, values) in self.rows.items()}
        return {PREFIX + name: x for name, x in out.items()}

    def config(self) -> dict[str, Any]:
        """The fields of `adapter_config.json`."""
        rslora = self.options["use_rslora"]
        ranks = {name: module.rank for name, module in self.modules.items()}
        alphas = {
            name: _neat(module.scaling * (math.sqrt(module.rank) if rslora else module.rank))
            for name, module in self.modules.items()
        }
        rank, alpha = most_common(ranks.values()), most_common(alphas.values())
        return {
            "alpha_pattern": {f"^{_escaped(n)}": x for n, x in alphas.items() if x != alpha},
            "auto_mapping": None,
            "base_model_name_or_path": None,
            "bias": "none",
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": alpha,
            "lora_bias": False,
            "lora_dropout": 0.0,
            "modules_to_save": modules_of(self.whole, self.all_tensors) or None,
            "peft_type": "LORA",
            "peft_version": VERSION,
            "r": rank,
            "rank_pattern": {f"^{_escaped(n)}": x for n, x in ranks.items() if x != rank},
            "revision": None,
            "target_modules": self.targets(),
            "target_parameters": None,
            "task_type": None,
            "trainable_token_indices": {n: list(rows) for n, (rows, _) in self.rows.items()}
            or None,
            "use_dora": any("m" in module.parts for module in self.modules.values()),
            **self.options,
        }

    def targets(self) -> list[str]:
        """Module names by their ends where these name all modules that they could, else whole."""
        ends: dict[str, set[str]] = {}
        for tensor in self.all_tensors:
            module = tensor.rpartition(".")[0]
            while module:  # a module of modules may have such an end as well
                ends.setdefault(module.rpartition(".")[2], set()).add(module)
                module = module.rpartition(".")[0]
        found = set()
        for name in self.modules:
            end = name.rpartition(".")[2]
            found.add(end if ends.get(end, {""}) <= set(self.modules) else name)
        return sorted(found)


def export(adapter: Adapter, model: Any, names: Names) -> Export:
    """What torch needs of an adapter.

    Args:
      adapter: the adapter.
      model: its model.
      names: the model's table.

    Returns:
      The export, with one product of factors for each module: kept starts, fused blocks and frozen
      factors are written into it.

    Raises:
      AdapterError: what torch cannot hold; each site is named with the reason.
    """
    spec, values = adapter.spec, adapter.values()
    modules = {}
    for name, (site, layer) in factors.torch_sites(spec, names).items():
        parts = factors.to_torch(site, site.leaves(values), layer)
        modules[name] = Module(parts, site.scaling, site.lookup, site.path)
    saved, rows = {}, {}
    for name, (leaf, layer) in factors.torch_leaves(spec, names).items():
        x = np.asarray(values[leaf.leaf_path])
        x = names.transposed(leaf.path, x if layer is None else x[layer])
        if leaf.rows:
            rows[name.rpartition(".")[0]] = (leaf.rows, x)
        else:
            saved[name] = x
    params = factors.known_params(model)
    known = [] if params is None else list(factors.base_tensors(params, names))
    tied = factors.tied_head(model)
    if tied is not None:  # the head is a module of its own there
        if tied[0] in modules:
            modules[tied[1]] = transposed(modules[tied[0]])
        if f"{tied[0]}.weight" in saved:
            saved[f"{tied[1]}.weight"] = saved[f"{tied[0]}.weight"].copy()
    biases = {
        name: x
        for name, x in saved.items()
        if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in saved
    }
    whole = {name: x for name, x in saved.items() if name not in biases}
    changed = {*modules, *rows, *(name.rpartition(".")[0] for name in whole)}
    shared = tied is not None and tied[0] in changed
    config = spec.config
    options = {
        "bias": (config.bias if config.bias != "none" else "all") if biases else "none",
        # PEFT knows the tie by the table's name: with another it would drop the head.
        "ensure_weight_tying": bool(shared and tied and tied[0].endswith("embed_tokens")),
        "fan_in_fan_out": any(_stored_in_out(names, site.path) for site in spec.sites),
        "lora_dropout": config.dropout,
        "task_type": _task(model, modules_of(whole, known)),
        "use_rslora": config.rslora,
    }
    _check_whole(whole, known)
    return Export(modules, whole, biases, rows, known, options, shared)


def transposed(module: Module) -> Module:
    """The head that reads a table, as a module of its own: its weight's update is the table's."""
    a, b = module.parts["b"].T, module.parts["a"].T
    parts = {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}
    return Module(parts, module.scaling, False, module.site)


def modules_of(tensors: Iterable[str], known: Collection[str]) -> list[str]:
    """The modules that some tensors make up, each by the shortest path all of which is there."""
    there, found = set(tensors), set()
    for tensor in there:
        module = tensor.rpartition(".")[0]
        while "." in module:
            parent = module.rpartition(".")[0]
            below = {name for name in known if name.startswith(f"{parent}.")}
            if not below or not below <= there:
                break
            module = parent
        found.add(module)
    return sorted(found)


def most_common(values: Iterable[Any]) -> Any:
    """The most frequent value, the first of several; 8, PEFT's default, of none."""
    counted = Counter(values)
    return counted.most_common(1)[0][0] if counted else 8


def _check_whole(whole: Mapping[str, Any], known: Collection[str]) -> None:
    """PEFT trains and saves whole modules."""
    modules = {name.rpartition(".")[0] for name in whole}
    lacking = [t for t in known if t.rpartition(".")[0] in modules and t not in whole]
    if lacking:
        raise AdapterError(
            f"The adapter trains part of a module in full and lacks {listing(lacking)}, expected "
            "whole modules, which is what PEFT saves. Name the modules in modules_to_save."
        )


def _task(model: Any, saved: Collection[str]) -> str | None:
    """PEFT's task, which makes it look for a saved head where the task is to classify."""
    kind, heads = type(model).__name__, {"classifier", "score"} & set(saved)
    ends = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    for end, task in ends.items():
        if kind.endswith(end):
            return task if heads else None
    return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def _stored_in_out(names: Names, path: str) -> bool:
    return (
        names.stored_in_out is not None
        and names.torch_axes(path, 2) == (0, 1)
        and (path.endswith("/kernel"))
    )


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _neat(x: float) -> int | float:
    """A number without what rounding added: 16, not 15.999999999999998."""
    x = float(f"{x:.12g}")
    return int(x) if x.is_integer() else x
