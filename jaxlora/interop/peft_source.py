"""What a folder of PEFT's holds of a model's adapter, before our form of it is made."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlora import tree
from jaxlora.errors import CheckpointError, listing, nearest
from jaxlora.interop import factors
from jaxlora.interop.peft_config import PeftConfig, read_config
from jaxlora.interop.peft_export import LINEAR, PREFIX, ROWS, TABLE
from jaxlora.interop.tensors import read_tensors
from jaxlora.models.names import Names

_ENDS = {f".{end}": part for ends in (LINEAR, TABLE) for part, end in ends.items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """What is loaded, and into what."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, np.ndarray]  # by their names without PEFT's prefix
    names: Names
    base: Mapping[str, factors.BaseLeaf]  # by torch's names
    values: Mapping[str, Any]  # the base's leaves by our paths

    @property
    def kernels(self) -> dict[str, factors.BaseLeaf]:
        """{torch's module path: leaf} of what could be adapted."""
        return {
            name.removesuffix(".weight"): leaf
            for name, leaf in self.base.items()
            if name.endswith(".weight") and leaf.ndim >= 2
        }

    @property
    def lora(self) -> set[str]:
        """Torch's paths of the modules that have factors in the file."""
        return {n.removesuffix(e) for n in self.tensors for e in _ENDS if n.endswith(e)}

    @property
    def tables(self) -> set[str]:
        """Torch's paths of the modules some rows of which are trained."""
        return {n.removesuffix(f".{ROWS}") for n in self.tensors if n.endswith(f".{ROWS}")}


def open_source(folder: Path, model: Any, params: Any, names: Names) -> Source:
    """Read a folder, and leave out what is there twice.

    Args:
      folder: the adapter's folder.
      model: the model.
      params: its base.
      names: its table of names.

    Returns:
      The source.

    Raises:
      CheckpointError: the folder is damaged, of another method, or says of a table that the head
        reads too what cannot be done here.
    """
    config = read_config(folder)
    tensors = {_bare(name): x for name, x in read_tensors(folder).items()}
    base = factors.base_tensors(params, names)
    found = Source(folder, config, tensors, names, base, tree.flat(params))
    return _without_copies(_without_tied_head(found, model))


def _bare(name: str) -> str:
    """A tensor's name without PEFT's prefix and wrappers; a name that lacks the prefix is kept."""
    bare = name.removeprefix(PREFIX) if name.startswith(PREFIX) else f"?{name}"
    return bare.replace(".modules_to_save.", ".").replace(
        "magnitude_vector.weight", "magnitude_vector"
    )


def adapted_modules(found: Source) -> set[str]:
    """Torch's paths of the modules that the config and the file adapt."""
    config, there = found.config, found.lora
    if not config.named:
        return there & set(found.kernels)
    adapted = {module for module in found.kernels if config.targets(module)}
    if not adapted and there:
        target = config.fields["target_modules"]
        first = target if isinstance(target, str) else sorted(target)[0] if target else ""
        ends = {module.rpartition(".")[2] for module in found.kernels}
        raise CheckpointError(
            f"{config.file}: target_modules, {target!r}, match none of the {len(found.kernels)} "
            f"modules of this model. Nearest: {listing(nearest(first, ends))}. The adapter belongs "
            "to another architecture, or `names` lacks its modules."
        )
    return adapted


def is_bias(found: Source, name: str) -> bool:
    """Whether a tensor is a bias that `bias` trains, beside the modules trained in full."""
    if name.endswith(".base_layer.bias"):
        return True
    weight = f"{name.removesuffix('bias')}weight"
    everywhere = found.config.get("bias", "none") == "all" and name.endswith(".bias")
    return everywhere and weight not in found.tensors


def row_numbers(found: Source, module: str) -> list[int]:
    """The numbers of the rows of a table that are trained, in the file's order."""
    rows = found.config.get("trainable_token_indices", [])
    if isinstance(rows, dict):
        named = [numbers for name, numbers in rows.items() if module.endswith(name)]
        rows = named[0] if named else []
    if not rows or len(set(rows)) < len(rows) or min(rows) < 0:
        raise CheckpointError(
            f"{found.config.file}: trainable_token_indices gives {rows!r} for {module}, expected "
            "one or more rows from 0, each once."
        )
    return rows


def _without_tied_head(found: Source, model: Any) -> Source:
    """The source less the tensors of a head that is the table here, where they say the same."""
    tied = factors.tied_head(model)
    if tied is None:
        return found
    table, head = tied
    own = {n: x for n, x in found.tensors.items() if n.startswith(f"{head}.")}
    ends = {f"{table}.{TABLE['a']}": f"{head}.{LINEAR['b']}"}
    ends |= {f"{table}.{TABLE['b']}": f"{head}.{LINEAR['a']}"}
    changed = [n for n in (*ends, f"{table}.weight") if n in found.tensors]
    config = found.config
    if changed and not own and not config.get("ensure_weight_tying", False):
        raise CheckpointError(
            f"{found.folder} changes {table}, which '{head}' of this model reads too: in torch the "
            f"head would keep the table as it was, here it cannot. Expected the tensors of "
            f"'{head}' as well, as `ensure_weight_tying=True` gives them in PEFT."
        )
    for of_table, of_head in ends.items():
        if of_head in own and not (
            of_table in found.tensors
            and np.array_equal(found.tensors[of_table].T, own.pop(of_head))
        ):
            raise CheckpointError(
                f"{found.folder}: '{of_head}' adapts a head that is the table {table} here, "
                f"expected '{of_table}' with the same values: they cannot differ."
            )
    same = {f"{head}.weight": f"{table}.weight", f"{head}.base_layer.weight": None}
    tensors = {n: x for n, x in found.tensors.items() if not n.startswith(f"{head}.")}
    for name in list(own):
        if name not in same:
            tensors[name] = own[name]
        elif name == f"{head}.weight" and f"{table}.weight" in found.tensors:
            if not np.array_equal(found.tensors[f"{table}.weight"], own[name]):
                raise CheckpointError(
                    f"{found.folder}: '{name}' differs from '{table}.weight', which is one table "
                    "here."
                )
        elif not _is_base(found, f"{table}.weight", own[name]):
            raise CheckpointError(
                f"{found.folder}: '{name}' differs from the table {table} of the model, which the "
                "head reads here."
            )
    return dataclasses.replace(found, tensors=tensors)


def _without_copies(found: Source) -> Source:
    """The source less what is only a copy of the base, which PEFT saves beside embeddings."""
    tensors = {}
    for name, x in found.tensors.items():
        if ".original_module." in name:
            continue
        if name.endswith(".base_layer.weight"):
            of_base = name.replace(".base_layer.", ".")
            if not _is_base(found, of_base, x):
                raise CheckpointError(
                    f"{found.folder}: '{PREFIX}{name}' is a base's weight of shape {x.shape} with "
                    "other values than this model's. Expected the base that the adapter was "
                    "trained on, with its table resized as then."
                )
            continue
        tensors[name] = x
    return dataclasses.replace(found, tensors=tensors)


def _is_base(found: Source, name: str, x: np.ndarray) -> bool:
    """Whether a tensor has the base's values; those of an abstract base are not compared."""
    if name not in found.base:
        return False
    path, layer, _ = found.base[name]
    leaf = found.values[path]
    own = tree.aval(leaf)
    shape = own.shape if layer is None else own.shape[1:]
    axes = found.names.torch_axes(path, len(shape))
    if x.shape != tuple(shape[i] for i in np.argsort(axes)):
        return False
    value = tree.unboxed(leaf)
    if isinstance(value, jax.ShapeDtypeStruct):
        return True
    value = np.asarray(value if layer is None else value[layer], np.float32)
    # The copy may be of another precision than the base here.
    return np.allclose(found.names.transposed(path, value), x.astype(np.float32), 1e-2, 1e-5)
