"""`load`: an adapter from a folder of PEFT's."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import layers, tree
from jaxlora.adapter import Adapter, Site, Spec, boxed_like
from jaxlora.apply import base_params
from jaxlora.config import LoraConfig
from jaxlora.discover import trace
from jaxlora.errors import AdapterError, CheckpointError, TargetError, listing
from jaxlora.init import init_leaves
from jaxlora.interop import factors
from jaxlora.interop.peft_export import LINEAR, ROWS, TABLE, most_common
from jaxlora.interop.peft_source import Source, adapted_modules, is_bias, open_source, row_numbers
from jaxlora.interop.tensors import PICKLE, SAFETENSORS
from jaxlora.models import hub
from jaxlora.models.names import Names
from jaxlora.plan import plan

_FILES = ("adapter_config.json", SAFETENSORS, PICKLE)


def load(
    source: str | Path,
    model: Any,
    variables: Mapping[str, Any] | None,
    *inputs: Any,
    names: Names | Mapping[str, str] | None = None,
    dtype: Any = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Adapter:
    """Loads an adapter that PEFT has saved; its outputs here are those that it has in torch.

    Args:
      source: a folder, or an id on the Hugging Face hub.
      model: the model, Linen's or NNX's; of one of `jaxlora.models` the names in torch are known.
      variables: its variables; None for an NNX module, which has its own. Their values are needed
        by adapters that say how they began from them (`init_lora_weights` "pissa" or "olora");
        others take ShapeDtypeStructs as well.
      *inputs: example inputs for `model.apply`, only traced; of a model of `jaxlora.models` not
        needed.
      names: for any other model {our module path: torch's module path}, `{}` for a layer's number.
      dtype: dtype of the leaves; default: the file's.
      revision: a branch, tag or commit on the hub.
      **kwargs: keyword arguments for `model.apply`.

    Returns:
      The adapter. Its config names the adapted layers one by one.

    Raises:
      CheckpointError: there is no such adapter, it is damaged, of another method, or does not fit
        the model: missing, unexpected and misshapen tensors are all named.
      ConfigError: the model has no table of names, or needs inputs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlora as jl, tempfile
      >>> from jaxlora.interop import peft
      >>> from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
      >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1)
      >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
      >>> ids = jnp.ones((1, 2), int)
      >>> variables = model.init(jax.random.key(0), ids)
      >>> config = jl.LoraConfig(rank=2, targets="q_proj|v_proj")
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, config, ids)
      >>> folder = peft.save(tempfile.mkdtemp() + "/adapter", adapter, model)
      >>> [site.path for site in peft.load(folder, model, variables).spec.sites]
      ['model/layers_0/self_attn/q_proj/kernel', 'model/layers_0/self_attn/v_proj/kernel']
    """
    folder = hub.resolve(source, revision, files=_FILES, holds=" and ".join(_FILES[:2]))
    linen = isinstance(model, nn.Module) or variables is not None
    params = base_params(model, variables) if linen else _params_of_nnx(model)
    found = open_source(folder, model, params, factors.names_of(model, names))
    adapted = adapted_modules(found)
    lora = _lora_config(found, adapted, dtype)
    inputs = factors.example_inputs(model, inputs)
    try:
        args: Any = (variables, lora) if linen else (lora,)
        spec = plan(model, *args, *inputs, **kwargs).spec
    except TargetError as e:
        raise CheckpointError(f"{folder} does not fit the model: {e}") from e
    if not linen:  # whether one is multiplied with as well is not looked into
        _check_tables(folder, spec, {site.path for site in spec.sites if site.lookup})
    elif factors.tied_head(model) is None:
        _check_tables(folder, spec, _attended(model, variables, inputs, kwargs))
    return _filled(found, spec, adapted, params)


def _params_of_nnx(model: Any) -> tree.Tree:
    from jaxlora.interop import nnx  # imported only where there is such a model

    return nnx.params(model)


def _attended(model: nn.Module, variables: Any, inputs: Any, kwargs: Any) -> set[str]:
    """The tables that are looked up and multiplied with as well, as a tied head does."""
    seen: dict[str, set[bool]] = {}

    def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if (rule := layers.rule_for(context.orig_method)) is not None:
            linear = rule(context.module, *args, **kwargs)
            path = "/".join((*context.module.path, linear.param))
            seen.setdefault(path, set()).add(linear.lookup)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(intercept):
        trace(lambda v, a, k: model.apply(v, *a, **k), variables, inputs, kwargs)
    return {path for path, lookups in seen.items() if len(lookups) == 2}


def _check_tables(folder: Path, spec: Spec, attended: Collection[str]) -> None:
    changed = {site.path for site in spec.sites} | {x.path for x in spec.saved if not x.rows}
    if both := sorted(changed & set(attended)):
        raise CheckpointError(
            f"{folder} changes {listing(both)}, which this model looks up and multiplies with, or "
            "may, as an NNX model's tables. In torch these are two modules and the adapter changes "
            "one of them, here it would change both. Expected one that leaves the table alone."
        )


def _lora_config(found: Source, adapted: Collection[str], dtype: Any) -> LoraConfig:
    """Our config: the layers one by one, with the rank and alpha of each."""
    config, kernels = found.config, found.kernels
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module in sorted(adapted):
        path = kernels[module].path
        if config.rank(module) > ranks.get(path, 0):  # of a stack, the highest
            ranks[path], alphas[path] = config.rank(module), float(config.alpha(module))
    biases = {n for n in found.tensors if is_bias(found, n)}
    whole = {found.base[n].path for n in set(found.tensors) & set(found.base) - biases}
    if not (ranks or whole or biases or found.tables):
        raise CheckpointError(
            f"{found.folder} holds no tensor of this model: {listing(sorted(found.tensors))}."
        )
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=_patterns(_layer_of(path) for path in ranks),
        dropout=config.get("lora_dropout", 0.0),
        modules_to_save=_patterns(whole),
        bias=config.get("bias", "none") if biases else "none",
        init=config.init,
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        rank_pattern=_by_value({p: n for p, n in ranks.items() if n != rank}),
        alpha_pattern=_by_value({p: x for p, x in alphas.items() if x != alpha}),
        token_rows={
            f"^{re.escape(_layer_of(kernels[m].path))}": sorted(row_numbers(found, m))
            for m in found.tables
            if m in kernels
        },
        param_dtype=_dtype(found) if dtype is None else dtype,
    )


def _dtype(found: Source) -> Any:
    """The dtype that holds all of the file's."""
    dtypes = {x.dtype for x in found.tensors.values()}
    return jnp.result_type(*dtypes) if len(dtypes) > 1 else next(iter(dtypes))


def _layer_of(path: str) -> str:
    """What a pattern names a kernel by: its module."""
    return path.rpartition("/")[0] or path


def _patterns(paths: Iterable[str]) -> list[str]:
    """Patterns that match just these paths, one for all layers of a kind."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(set(paths)):
        number = re.search(r"(?<![^_/])\d+(?=/)", path)
        kind = path if number is None else f"{path[: number.start()]}\0{path[number.end() :]}"
        kinds.setdefault(kind, []).append(number[0] if number else "")
    found = []
    for kind, numbers in kinds.items():
        ordered = sorted(numbers, key=lambda n: (len(n), n))
        alternatives = ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"
        found.append(
            "^" + re.escape(kind).replace("\0", alternatives).replace("\\\0", alternatives)
        )
    return found


def _by_value(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for value in set(values.values()):
        own = _patterns(_layer_of(path) for path, x in values.items() if x == value)
        found |= dict.fromkeys(own, value)
    return found


def _filled(found: Source, spec: Spec, adapted: Collection[str], params: Any) -> Adapter:
    """The adapter with the file's values, after all tensors were checked."""
    places = factors.torch_sites(spec, found.names)
    saved = factors.torch_leaves(spec, found.names)
    names = {tensor: _saved_name(found, tensor, place, adapted) for tensor, place in saved.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for module, (site, _) in places.items():
        if module in adapted:
            ends = TABLE if site.lookup else LINEAR
            shapes = factors.torch_shapes(site, found.config.rank(module))
            expected |= {f"{module}.{ends[part]}": shape for part, shape in shapes.items()}
    for tensor, place in saved.items():
        shape = place.leaf.leaf_shape if place.layer is None else place.leaf.leaf_shape[1:]
        axes = found.names.torch_axes(place.leaf.path, len(shape))
        if (name := names[tensor]) is not None:
            expected[name] = tuple(shape[i] for i in np.argsort(axes))
    _check(found, expected)

    base = tree.flat(params)
    started = spec.sites and spec.sites[0].keeps_start
    leaves = tree.values(init_leaves(jax.random.key(0), params, spec).frozen) if started else {}
    for site in spec.sites:
        layers = [m for m, place in places.items() if place.site == site]
        parts = [_parts(found, site, m, m in adapted, base) for m in layers]
        for part, leaf in factors.from_torch(site, parts).items():
            leaves[f"{site.path}_lora_{part}"] = leaf
    for leaf in spec.saved:
        own = [(tensor, p) for tensor, p in saved.items() if p.leaf == leaf]
        arrays = [_saved(found, names[tensor], place, base) for tensor, place in own]
        stacked = own[0][1].layer is not None
        leaves[leaf.leaf_path] = np.stack(arrays) if stacked else arrays[0]
    dtype = spec.config.param_dtype
    return spec.adapter(
        {path: boxed_like(base, spec, path, jnp.asarray(x, dtype)) for path, x in leaves.items()}
    )


def _check(found: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError that lists all tensors that are missing, left over or misshapen."""
    wrong = []
    if missing := sorted(set(expected) - set(found.tensors)):
        wrong.append(f"Missing ({len(missing)}): {listing(missing, 20)}.")
    if stray := sorted(set(found.tensors) - set(expected)):
        shown = [n[1:] if n.startswith("?") else n for n in stray]
        wrong.append(f"Unexpected ({len(stray)}): {listing(shown, 20)}.")
    for name, shape in expected.items():
        if name in found.tensors and found.tensors[name].shape != shape:
            wrong.append(factors.misfit(name, found.tensors[name].shape, shape))
    if wrong:
        raise CheckpointError(
            f"The tensors of {found.folder} do not fit its {found.config.file.name} and this "
            f"model. {' '.join(wrong)}"
        )


def _parts(
    found: Source, site: Site, module: str, adapted: bool, base: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """One module's tensors with the rank of its site; the zeros of one that is not adapted."""
    shapes = factors.torch_shapes(site, site.rank)
    rank = found.config.rank(module) if adapted else 0
    if (site.keeps_start and rank != site.rank) or (site.dora and not adapted):
        raise CheckpointError(
            f"{found.folder} adapts the layers of {site.path} unlike one another, which one stack "
            f"cannot hold with {'PiSSA or OLoRA' if site.keeps_start else 'DoRA'}. Expected a "
            "model without scan_layers."
        )
    if not adapted:
        return {part: np.zeros(shape, np.float32) for part, shape in shapes.items()}
    ends = TABLE if site.lookup else LINEAR
    parts = {part: found.tensors[f"{module}.{ends[part]}"] for part in shapes}
    scale = found.config.scaling(module) / site.scaling
    if rank != site.rank:
        for part, axis in (("a", 0), ("b", 1)):
            more = [(0, 0)] * parts[part].ndim
            more[axis] = (0, site.rank - rank)
            parts[part] = np.pad(parts[part], more)
    if abs(scale - 1) > 1e-12:
        parts["b"] = (parts["b"].astype(np.float64) * scale).astype(parts["b"].dtype)
    return parts


def _saved_name(
    found: Source, tensor: str, place: factors.SavedPlace, adapted: Collection[str]
) -> str | None:
    """The name of a trained leaf's tensor, or None where the base's value stands for it."""
    module, _, leaf = tensor.rpartition(".")
    if place.leaf.rows:
        return f"{module}.{ROWS}"
    if leaf == "bias" and module in adapted:
        return f"{module}.base_layer.bias"
    lora_only = found.config.get("bias", "none") == "lora_only" and place.layer is not None
    return None if leaf == "bias" and lora_only and tensor not in found.tensors else tensor


def _saved(
    found: Source, name: str | None, place: factors.SavedPlace, base: Mapping[str, Any]
) -> np.ndarray:
    """One layer of a leaf that is trained in full, or its rows in the order of their numbers."""
    path = place.leaf.path
    if name is None:
        value = tree.unboxed(base[path])
        if isinstance(value, jax.ShapeDtypeStruct):
            raise AdapterError(
                f"Some layers of {path} keep the base's values, but that is abstract, expected an "
                "array. Pass concrete variables."
            )
        return np.asarray(value[place.layer])
    x = found.tensors[name]
    if place.leaf.rows:
        return x[np.argsort(row_numbers(found, name.removesuffix(f".{ROWS}")))]
    return np.transpose(x, found.names.torch_axes(path, x.ndim))
