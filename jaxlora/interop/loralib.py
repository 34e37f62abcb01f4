"""loralib's checkpoints: files of torch with the factors alone, read and written without torch.

A file is `{"<module>.lora_A": (rank, in), "<module>.lora_B": (out, rank)}`, and the names of heads
and biases as they are. Neither alpha nor which blocks of a fused layer are adapted is in it.
"""

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import tree
from jaxlora.adapter import Adapter, Site, Spec, boxed_like, check_leaves
from jaxlora.apply import base_params
from jaxlora.config import LoraConfig
from jaxlora.errors import AdapterError, CheckpointError, ConfigError, listing, nearest
from jaxlora.interop import loralib_conv, torch_zip
from jaxlora.interop.factors import (
    example_inputs,
    from_torch,
    is_conv,
    misfit,
    module_name,
    names_of,
    to_torch,
    torch_leaves,
    torch_sites,
)
from jaxlora.interop.loralib_state import ENDS, State, read
from jaxlora.models.architectures import architecture_of
from jaxlora.models.names import Names
from jaxlora.plan import plan
from jaxlora.targets import pattern_value


def load(
    file: str | os.PathLike[str],
    model: Any,
    variables: Mapping[str, Any],
    *inputs: Any,
    alpha: float,
    rank: int | None = None,
    fused: Mapping[str, Iterable[bool]] | Iterable[tuple[str, Iterable[bool]]] = (),
    names: Names | Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Adapter:
    """Read a file of `loralib.lora_state_dict` as an adapter of a model.

    Args:
      file: what `torch.save` wrote of it, alone or as "model_state_dict" of a dict.
      model: the model.
      variables: its variables; ShapeDtypeStructs will do.
      *inputs: example inputs, as for `plan`; not needed for a model of `jaxlora.models`.
      alpha: loralib's `lora_alpha`, which is not in the file. The update is scaled by alpha / rank.
      rank: loralib's `r`. The shapes tell it; what is given is checked.
      fused: {pattern: mask} of the layers that are a `MergedLinear`, its `enable_lora`, as in
        `LoraConfig`. Not needed where all blocks are adapted.
      names: the model's names in torch, as for `interop.factors.names_of`.
      dtype: the dtype of the leaves; default: that of the file's factors, as wide as jax allows.

    Returns:
      The adapter. A convolution keeps its rank r where its factors allow it, as those that `save`
      wrote do; else its rank here is that of the same update, at most r * k * k.

    Raises:
      CheckpointError: a file that is damaged or holds code, tensors that are missing or that the
        model has no place for (all are named), shapes that do not fit.
      ConfigError: a layer with some blocks adapted that `fused` does not name, or another rank.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl, tempfile
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((2, 4))
      >>> variables, names = model.init(jax.random.key(0), x), {"layers_0": "fc"}
      >>> config = jl.LoraConfig(rank=2, alpha=8)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, config, x)
      >>> file = save(tempfile.mkdtemp() + "/lora.pt", adapter, model, names)
      >>> load(file, model, variables, x, alpha=8, names=names).spec.sites == adapter.spec.sites
      True
    """
    table = names_of(model, names)
    base = tree.flat(base_params(model, variables))
    leaves = {path: tree.aval(x) for path, x in base.items()}
    inputs = example_inputs(model, inputs)
    found = _bare(read(file), table, _other(model), file)
    kernels, whole = _placed(leaves, table, found, file)
    dtype = _dtype(found, file) if dtype is None else dtype
    first = LoraConfig(rank=1, alpha=alpha, targets=kernels, param_dtype=dtype)
    places = torch_sites(plan(model, variables, first, *inputs), table)
    if lacking := [module for module in places if table.bare(module) not in found.factors]:
        raise CheckpointError(
            f"{file} lacks the factors of {listing(lacking, 20)}, which the stack of their layers "
            "here needs. Expected a model without scan_layers."
        )
    factors: dict[str, _Read] = {}
    wrong = []
    for module, (site, _) in places.items():
        try:
            own = found.factors[table.bare(module)]
            factors[module] = _read_as(module, site, own, dict(fused), alpha)
        except AdapterError as e:
            wrong.append(str(e))
    if wrong:
        raise CheckpointError(f"{file} does not fit the model. {' '.join(wrong)}")
    if other := [f"{module} has {x.r}" for module, x in factors.items() if rank not in (None, x.r)]:
        raise ConfigError(f"rank is {rank}, and in {file} {listing(other)}.")
    by_path: dict[str, _Read] = {}
    for module, x in factors.items():
        first_of = by_path.setdefault(places[module].site.path, x)
        if first_of[:3] != x[:3]:
            raise CheckpointError(
                f"{module} has rank {x.rank} in {file}, and an earlier layer of its stack "
                f"{first_of.rank}. Expected a model without scan_layers."
            )
    config = _config(first, by_path, whole, leaves)
    spec = plan(model, variables, config, *inputs).spec
    layers: dict[str, list[Any]] = {}
    for module, (site, _) in torch_sites(spec, table).items():
        layers.setdefault(site.path, []).append(factors[module].parts)
    values = {
        f"{site.path}_lora_{part}": x
        for site in spec.sites
        for part, x in from_torch(site, layers[site.path]).items()
    }
    values |= _whole(spec, table, found, file)
    arrays = {path: jnp.asarray(x, config.param_dtype) for path, x in values.items()}
    return spec.adapter({path: boxed_like(base, spec, path, x) for path, x in arrays.items()})


def save(
    file: str | os.PathLike[str],
    adapter: Adapter,
    model: Any,
    names: Names | Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as `torch.save(loralib.lora_state_dict(model), file)` does.

    Alpha is not in the file: make loralib's layers with the config's, and with r as the shapes are.
    What scales a site in another way (`rslora`, `alpha_pattern`) is folded into its B. Factors that
    keep their start (PiSSA) become those of twice the rank.

    Args:
      file: where.
      adapter: the adapter.
      model: its model.
      names: the model's names in torch, as for `interop.factors.names_of`.
      overwrite: replace a file that is there.

    Returns:
      The absolute path.

    Raises:
      AdapterError: a site that loralib has no layer for: each is named, with the reason.
      CheckpointError: the file is there, or a dtype is not torch's.
    """
    check_leaves(adapter)
    spec, table = adapter.spec, names_of(model, names)
    refused = [f"{s.path} trains magnitudes (DoRA)" for s in spec.sites if s.dora]
    refused += [f"of {leaf.path} some rows are trained" for leaf in spec.saved if leaf.rows]
    values, tensors, convs = adapter.values(), {}, set()
    for module, (site, layer) in torch_sites(spec, table).items():
        parts = to_torch(site, site.leaves(values), layer, grouped=True)
        rank = len(parts["a"]) // max(1, sum(site.layout.blocks))
        if is_conv(site):
            convs.add(module)
            if reason := loralib_conv.why_not(site):
                refused.append(f"{site.path}: {reason}")
                continue
            parts = loralib_conv.to_loralib(parts)
        factor = site.scaling * rank / spec.config.alpha
        if factor != 1:
            parts["b"] = (parts["b"].astype(np.float32) * factor).astype(parts["b"].dtype)
        tensors |= {f"{module}.{end}": parts[part] for end, part in ENDS.items()}
    if refused:
        raise AdapterError(f"loralib has no layer for all of this adapter: {listing(refused, 20)}.")
    for name, (leaf, layer) in torch_leaves(spec, table).items():
        x = np.asarray(values[leaf.leaf_path])
        module, _, end = name.rpartition(".")
        name = f"{module}.conv.{end}" if module in convs else name
        tensors[name] = table.transposed(leaf.path, x if layer is None else x[layer])
    return torch_zip.write(file, tensors, overwrite=overwrite)


class _Read(NamedTuple):
    """One module's factors as a site's: rank, alpha and mask, torch's parts, and loralib's r."""

    rank: int
    alpha: float
    blocks: tuple[bool, ...]
    parts: dict[str, np.ndarray]
    r: int


def _read_as(module: str, site: Site, own: Any, fused: Mapping[str, Any], alpha: float) -> _Read:
    a, b = own["a"], own["b"]
    for end, x in (("lora_A", a), ("lora_B", b)):
        if x.ndim != 2 or 0 in x.shape:
            raise AdapterError(f"'{module}.{end}' has shape {x.shape}, expected two axes.")
    if is_conv(site):
        parts, rank, r = loralib_conv.from_loralib(module, site, a, b)
        return _Read(rank, alpha * rank / r, (), parts, r)
    inputs, outputs, r = site.layout.count("i"), site.layout.count("o"), b.shape[1]
    mask = tuple(pattern_value("fused", list(fused.items()), site.path, ()))
    groups = sum(mask) or max(1, a.shape[0] // r)
    if a.shape[0] == inputs != a.shape[1]:
        raise AdapterError(misfit(f"{module}.lora_A", a.shape, a.shape[::-1]))
    if a.shape != (groups * r, inputs):
        raise AdapterError(misfit(f"{module}.lora_A", a.shape, (groups * r, inputs)))
    blocks = len(mask) or max(1, outputs * groups // b.shape[0])
    if b.shape[0] * blocks != outputs * groups:
        raise AdapterError(misfit(f"{module}.lora_B", b.shape, (outputs * groups // blocks, r)))
    if blocks == 1:
        return _Read(r, alpha, (), dict(own), r)
    if not mask and groups < blocks:
        example = tuple(n != 1 for n in range(blocks))
        raise ConfigError(
            f"'{module}' adapts {groups} of {blocks} blocks, and which ones is not in the file. "
            f"Pass fused={{{module.rpartition('.')[2]!r}: mask}}, loralib's `enable_lora`: of q, k "
            f"and v side by side, q and v are {example}."
        )
    return _Read(r, alpha, mask or (True,) * blocks, dict(own), r)


def _other(model: Any) -> str:
    """A pattern of tensors that are no params: buffers whose name has "bias" in it."""
    try:
        return architecture_of(model).other
    except ConfigError:
        return r"(?!)"


def _bare(state: State, table: Names, other: str, file: Any) -> State:
    """The state by names without the base's prefix, and without the layer within loralib's conv."""
    state = State(state.factors, {n: x for n, x in state.whole.items() if not re.match(other, n)})
    factors = {table.bare(name): x for name, x in state.factors.items()}
    whole = {table.bare(name): x for name, x in state.whole.items()}
    inner = re.compile(r"(.+)\.conv\.(weight|bias)")
    for name in list(whole):
        if (found := inner.fullmatch(name)) and found[1] in factors:
            whole[f"{found[1]}.{found[2]}"] = whole.pop(name)
    if len(factors) < len(state.factors) or len(whole) < len(state.whole):
        raise CheckpointError(f"{file} holds tensors twice, with and without '{table.base}.'.")
    return State(factors, whole)


def _placed(
    leaves: Mapping[str, Any], table: Names, found: State, file: Any
) -> tuple[set[str], set[str]]:
    """Our kernels that the factors adapt, and our leaves that the other tensors replace."""
    modules: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for path, leaf in leaves.items():
        kernel = path.rpartition("/")[2] in ("kernel", "embedding") or path in table.modules
        pairs = [(tensors, table.torch_name(path))]
        pairs += [(modules, module_name(table, path))] if kernel else []
        for known, name in pairs:
            bare = "" if name is None else table.bare(name)
            numbers = range(leaf.shape[0]) if "{}" in bare else (0,)
            known |= {bare.format(n): path for n in numbers if bare}
    base = [name for name in found.whole if name.removesuffix(".weight") in found.factors]
    if base:
        raise CheckpointError(
            f"{file} holds the base's weights as well: {listing(base)}, expected the factors, "
            "heads and biases of `loralib.lora_state_dict(model)`."
        )
    stray = [name for name in found.factors if name not in modules]
    stray += [name for name in found.whole if name not in tensors]
    if stray:
        near = nearest(stray[0], [*modules, *tensors], 1)
        raise CheckpointError(
            f"{file} holds {listing(stray, 20)}, which the model has no place for. Nearest to the "
            f"first: {listing(near) or 'nothing'}. Is it the file of another model?"
        )
    return {f"^{re.escape(modules[n])}" for n in found.factors}, {tensors[n] for n in found.whole}


def _dtype(found: State, file: Any) -> Any:
    dtypes = {x.dtype for parts in found.factors.values() for x in parts.values()}
    other = [x.name for x in dtypes if not jnp.issubdtype(x, jnp.floating)]
    if other:
        raise CheckpointError(f"{file} has factors of dtype {listing(other)}, expected floats.")
    return jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, dtypes))


def _config(
    first: LoraConfig, by_path: Mapping[str, "_Read"], whole: set[str], leaves: Mapping[str, Any]
) -> LoraConfig:
    """The config that makes such an adapter."""
    common = Counter(x.rank for x in by_path.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(path)}": x for path, x in by_path.items()}
    biases = {path for path in leaves if path.rpartition("/")[2] == "bias"}
    adapted = biases & {path.rpartition("/")[0] + "/bias" for path in by_path}
    modes = {"lora_only": adapted, "all": biases}
    mode = next((m for m, paths in modes.items() if paths and paths == whole & biases), "none")
    rest = whole - modes.get(mode, set())
    return dataclasses.replace(
        first,
        rank=common,
        rank_pattern={p: x.rank for p, x in patterns.items() if x.rank != common},
        alpha_pattern={p: x.alpha for p, x in patterns.items() if x.alpha != first.alpha},
        fused={p: x.blocks for p, x in patterns.items() if x.blocks},
        modules_to_save=[f"^{re.escape(path)}" for path in rest],
        bias=mode,
    )


def _whole(spec: Spec, table: Names, found: State, file: Any) -> dict[str, np.ndarray]:
    """The leaves that are trained in full."""
    layers: dict[str, list[np.ndarray]] = {}
    wrong = []
    for name, (leaf, layer) in torch_leaves(spec, table).items():
        x = found.whole.get(table.bare(name))
        shape = leaf.shape if layer is None else leaf.shape[1:]
        axes = table.torch_axes(leaf.path, len(shape))
        expected = tuple(shape[i] for i in np.argsort(axes))
        if x is None:
            wrong.append(f"'{name}' is not there, and other layers' are.")
        elif x.shape != expected:
            wrong.append(misfit(name, x.shape, expected))
        else:
            layers.setdefault(leaf.leaf_path, []).append(np.transpose(x, axes))
    if wrong:
        raise CheckpointError(f"{file} does not fit the model. {' '.join(wrong)}")
    return {leaf.leaf_path: np.reshape(layers[leaf.leaf_path], leaf.shape) for leaf in spec.saved}
