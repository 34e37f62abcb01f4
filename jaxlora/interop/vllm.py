"""What vLLM and SGLang load of PEFT's folders: an export that they do, and a check of any folder.

Read for this: vLLM's lora/lora_model.py (commit 0306474e) with its peft_helper.py and MaxLoRARanks,
and SGLang's srt/lora/utils.py (01235a16) and lora_config.py (0ceb81fe). Both take one rank and one
alpha for all modules, and the base as it is. What is written here was checked against these rules,
not against a running server.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.errors import AdapterError, CheckpointError
from jaxlora.interop.peft_config import ALL_LINEAR, CHANGES_BASE, FILE, INITS, NEUTRAL
from jaxlora.interop.peft_export import PREFIX, Export, Module
from jaxlora.interop.tensors import read_tensors


@dataclasses.dataclass(frozen=True)
class Server:
    """What one server loads.

    Attributes:
      name: what it is called.
      modules: the last names of modules that it can adapt; None: any linear layer of the model.
      patterns: whether `target_modules` may be a regular expression.
    """

    name: str
    modules: frozenset[str] | None = None
    patterns: bool = True


TABLES = ("embed_tokens",)
"""The last names of the tables whose adapters are loaded."""

MAX_RANK = 512
"""The highest of vLLM's `max_lora_rank`: 1, 8, 16, 32, 64, 128, 256, 320 or 512."""

SERVERS = {
    "vllm": Server("vLLM"),
    "sglang": Server(
        "SGLang",
        frozenset(
            (
                *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
                *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"),
            )
        ),
        patterns=False,
    ),
}

_NAME = re.compile(
    r"(?P<module>.+)\.(lora_(?P<part>[AB])\.weight|lora_embedding_(?P<of_table>[AB]))"
)
_COPY = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.base_layer\.weight")


def served(export: Export, profile: str = "vllm") -> Export:
    """The export with one rank and a scaling of 1, for a server that reads no more than that.

    Args:
      export: what torch needs of an adapter.
      profile: a key of `SERVERS`.

    Returns:
      The export; A has rows of zeros and B columns of them up to the highest rank, and B the
      scaling.

    Raises:
      AdapterError: what the server refuses; each site is named with the reason.
    """
    server = SERVERS[profile]
    refused = [
        f"{module.site}: {why}"
        for name, module in export.modules.items()
        if (why := _why_not(name, module, server)) is not None
    ]
    refused += [f"{name}: it is trained in full (modules_to_save)" for name in export.whole]
    refused += [f"{name}: it is a trained bias" for name in export.biases]
    refused += [f"{name}: rows of it are trained (token_rows)" for name in export.rows]
    if export.tied:
        refused.append("lm_head: it reads the table that is changed, which is one module there")
    if refused:
        raise AdapterError(
            f"{server.name} would refuse this adapter, expected plain LoRA of its layers: "
            f"{'; '.join(refused)}. `merge` it and serve the model instead."
        )
    rank = max((module.rank for module in export.modules.values()), default=1)
    if rank > MAX_RANK:
        raise AdapterError(f"The highest rank is {rank}, {server.name} takes {MAX_RANK} at most.")
    modules = {name: _folded(module, rank) for name, module in export.modules.items()}
    options = {**export.options, "use_rslora": False, "lora_dropout": 0.0}
    return dataclasses.replace(export, modules=modules, options=options)


def check(folder: str | Path, profile: str = "vllm") -> list[str]:
    """Validates an adapter's folder by the rules that a server's loader applies.

    Args:
      folder: a folder in PEFT's form, from here or from anywhere.
      profile: "vllm" or "sglang".

    Returns:
      What is wrong: what the server would refuse, and what it would ignore so that its outputs
      would be others. Empty if nothing is.

    Example:
      >>> import tempfile
      >>> check(tempfile.mkdtemp())
      ['There is no adapter_config.json.']
    """
    folder, server = Path(folder).expanduser(), SERVERS[profile]
    if not (folder / FILE).is_file():
        return [f"There is no {FILE}."]
    try:
        fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        return [f"{FILE} is not JSON: {e}."]
    if not isinstance(fields, dict):
        return [f"{FILE} is a JSON {type(fields).__name__}, expected an object."]
    problems = list(_problems_of_fields(fields, server))
    try:
        tensors = read_tensors(folder)
    except CheckpointError as e:
        return [*problems, str(e)]
    return problems + list(_problems_of_tensors(tensors, fields.get("r"), server))


def _why_not(name: str, module: Module, server: Server) -> str | None:
    end = name.rpartition(".")[2]
    if "m" in module.parts:
        return "DoRA is not supported"
    if module.parts["a"].ndim > 2:
        return "a convolution cannot be adapted"
    if module.table and end not in TABLES:
        return f"of all tables only {', '.join(TABLES)} can be adapted"
    if server.modules is not None and end not in server.modules:
        return f"'{end}' is none of the modules that can be adapted"
    return None


def _folded(module: Module, rank: int) -> Module:
    more = rank - module.rank
    a, b = module.parts["a"], module.parts["b"]
    b = (b.astype(np.promote_types(np.float32, b.dtype)) * module.scaling).astype(b.dtype)
    parts = {"a": np.pad(a, ((0, more), (0, 0))), "b": np.pad(b, ((0, 0), (0, more)))}
    return dataclasses.replace(module, parts=parts, scaling=1.0)


def _problems_of_fields(fields: Mapping[str, Any], server: Server) -> Iterator[str]:
    for name in ("r", "lora_alpha", "target_modules"):
        if fields.get(name) is None:
            yield f"{name} is missing, which {server.name} requires."
    rank = fields.get("r")
    if rank is not None and (type(rank) is not int or rank < 1):
        yield f"r is {rank!r}, expected an integer of at least 1."
    elif rank is not None and rank > MAX_RANK:
        yield f"r is {rank}, {server.name} takes {MAX_RANK} at most."
    if fields.get("peft_type") != "LORA":
        yield f"peft_type is {fields.get('peft_type')!r}, expected 'LORA'."
    target = fields.get("target_modules")
    if isinstance(target, str) and target != ALL_LINEAR and not server.patterns:
        yield f"target_modules is a pattern, {server.name} takes a list of names."
    if fields.get("modules_to_save"):
        yield f"modules_to_save is {fields['modules_to_save']!r}, which is refused."
    if fields.get("use_dora"):
        yield "use_dora is true, which is refused."
    if fields.get("bias") not in (None, "none"):
        yield f"bias is {fields['bias']!r}, which is refused."
    if fields.get("trainable_token_indices"):
        yield "trainable_token_indices is set, which is refused or ignored."
    for name, default in (("rank_pattern", rank), ("alpha_pattern", fields.get("lora_alpha"))):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, dict) or any(x != default for x in patterns.values()):
            yield f"{name} is ignored: every module would get {default!r}."
    init = str(fields.get("init_lora_weights", True))
    if init.startswith(CHANGES_BASE) or (init in INITS and init != "gaussian"):
        yield f"init_lora_weights is {init!r}: the adapter belongs to a base that it has changed."
    for name, what in NEUTRAL.items():
        if fields.get(name):
            yield f"{name} is set, which {what}, and is ignored."


def _problems_of_tensors(
    tensors: Mapping[str, np.ndarray], rank: Any, server: Server
) -> Iterator[str]:
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, x in tensors.items():
        if _COPY.fullmatch(name):  # skipped by the loaders
            continue
        found = _NAME.fullmatch(name)
        if found is None:
            yield f"'{name}' is no factor of LoRA, which is refused."
            continue
        end = found["module"].rpartition(".")[2]
        if found["of_table"] and end not in TABLES:
            yield f"'{name}': of all tables only {', '.join(TABLES)} can be adapted."
        if server.modules is not None and end not in server.modules:
            yield f"'{name}': '{end}' is none of the modules that {server.name} can adapt."
        if not name.startswith(PREFIX):
            yield f"'{name}' does not begin with '{PREFIX}'."
        modules.setdefault(found["module"], {})[found["part"] or found["of_table"]] = x
    for module, parts in modules.items():
        for part, axis in (("A", 0), ("B", 1)):
            if part not in parts:
                yield f"{module} has no lora_{part}."
            elif parts[part].ndim != 2:
                yield f"{module}: lora_{part} has shape {parts[part].shape}, expected two axes."
            elif parts[part].shape[axis] != rank:
                yield (
                    f"{module}: lora_{part} has shape {parts[part].shape}, expected {rank!r} on "
                    f"axis {axis}, which is r for all modules."
                )
    if not modules:
        yield "There is no factor of LoRA."
