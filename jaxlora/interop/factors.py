"""One site's leaves as torch's tensors and back, and how torch calls its layers.

Torch's factors are those of a layer of two axes, `A (rank, in)` and `B (out, rank)`; several
axes of ours, as attention's heads and their width, are one axis there. A convolution's are
`A (rank, in, *window)` and `B (out, rank, 1, …)`, an embedding's `A (rank, vocab)` and
`B (dim, rank)`. A layer of a scanned stack is a module of its own in torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import tree
from jaxlora.adapter import SavedLeaf, Site, Spec
from jaxlora.errors import AdapterError, ConfigError, listing, nearest
from jaxlora.fold import Term, joined, terms
from jaxlora.models.architectures import architecture_of
from jaxlora.models.names import Names
from jaxlora.plan import Plan

READ_DIRECTLY = ("encoder.rel_embeddings",)
"""Ends of torch's module paths whose weight is read without calling the module, as DeBERTa does: an
adapter of PEFT's or loralib's changes nothing there until it is merged."""

Parts = Mapping[str, Any]
"""{part: array} of one module of torch: "a", "b", and "m" for DoRA's magnitudes."""


class Place(NamedTuple):
    """Where a module of torch is here: a site, and the layer's number in a scanned stack."""

    site: Site
    layer: int | None


class BaseLeaf(NamedTuple):
    """Where a tensor of torch is in the base, and how many axes it has for one layer."""

    path: str
    layer: int | None
    ndim: int


class SavedPlace(NamedTuple):
    """Where a tensor of torch that is trained in full is here."""

    leaf: SavedLeaf
    layer: int | None


def names_of(model: Any, names: Names | Mapping[str, str] | None = None) -> Names:
    """The table of a model's names in torch.

    Args:
      model: the model; one of `jaxlora.models` has its table.
      names: for any other model {our module path: torch's module path}, `{}` for a layer's number.

    Returns:
      The table.

    Raises:
      ConfigError: the model has no table, and none is given.

    Example:
      >>> import flax.linen as nn
      >>> table = names_of(nn.Dense(2), {"blocks_{}/up": "h.{}.fc"})
      >>> table.torch_name("blocks_3/up/kernel")
      'h.3.fc.weight'
    """
    if isinstance(names, Names):
        return names
    if names is not None:
        return Names("", dict(names))
    try:
        return architecture_of(model).names
    except ConfigError as e:
        raise ConfigError(
            f"The model is a {type(model).__name__}, which has no table of names in torch. Pass "
            "`names={our module path: torch's module path}`, with {} for a layer's number; "
            "`jaxlora.interop.derive.derive` proposes one."
        ) from e


def example_inputs(model: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs to trace a model with: those given, or a model of `jaxlora.models`'s own.

    Raises:
      ConfigError: none are given, and it is no such model.
    """
    if inputs:
        return inputs
    try:
        return (architecture_of(model).example(model.config),)
    except ConfigError as e:
        raise ConfigError(
            f"The model is a {type(model).__name__}, which is none of jaxlora.models, so example "
            "inputs are needed: `load(source, model, variables, x)`."
        ) from e


def torch_sites(found: Spec | Plan, names: Names) -> dict[str, Place]:
    """What torch calls each adapted layer.

    Args:
      found: the spec or the plan of an adapter.
      names: the model's table.

    Returns:
      {torch's module path: place}, in the order of our paths and of the layers' numbers.

    Raises:
      AdapterError: a site that no module of torch is: each is named, with the reason.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> model, x = nn.Sequential([nn.Dense(2)]), jnp.ones((1, 2))
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = jl.plan(model, variables, jl.LoraConfig(rank=1), x)
      >>> list(torch_sites(plan, names_of(model, {"layers_0": "0"})))
      ['0']
    """
    spec = found.spec if isinstance(found, Plan) else found
    places: dict[str, Place] = {}
    refused = []
    for site in spec.sites:
        why, name = _why_not(site), module_name(names, site.path)
        if why is None and name is None:
            near = nearest(site.path.rpartition("/")[0], names.modules, 1)
            why = f"it has no name in torch (nearest in the table: {listing(near) or 'nothing'})"
        if why is None and str(name).endswith(READ_DIRECTLY):
            why = "torch's model reads its weight without calling it, so an adapter does nothing"
        count = site.layout.sizes("s")
        if why is None and ("{}" in str(name)) != bool(count):
            why = f"it is {'a stack' if count else 'no stack'}, and its name in torch is {name!r}"
        if why is not None:
            refused.append(f"{site.path}: {why}")
            continue
        for layer in range(count[0]) if count else (None,):
            full = str(name) if layer is None else str(name).format(layer)
            if full in places:
                refused.append(f"{site.path}: {places[full].site.path} is '{full}' as well")
            places[full] = Place(site, layer)
    if refused:
        raise AdapterError(f"Not all sites are modules of torch: {listing(refused, 20)}.")
    return places


def torch_leaves(spec: Spec, names: Names) -> dict[str, SavedPlace]:
    """What torch calls each leaf that is trained in full, or some rows of it.

    Args:
      spec: the spec of an adapter.
      names: the model's table.

    Returns:
      {torch's name of the tensor: place}.

    Raises:
      AdapterError: a leaf without a name in torch.
    """
    places: dict[str, SavedPlace] = {}
    for leaf in spec.saved:
        name = names.torch_name(leaf.path)
        if name is None:
            raise AdapterError(f"The leaf {leaf.path} is trained in full and has no name in torch.")
        layers = range(leaf.shape[0]) if "{}" in name else (None,)
        for layer in layers:
            places[name if layer is None else name.format(layer)] = SavedPlace(leaf, layer)
    return places


def module_name(names: Names, path: str) -> str | None:
    """Torch's name of the module that holds a kernel, `{}` for a stack's layer, or None."""
    module = names.torch_name(path.rpartition("/")[0])
    return module if module is not None else names.modules.get(path)


def base_tensors(params: Any, names: Names) -> dict[str, BaseLeaf]:
    """The tensors that a base has in torch.

    Args:
      params: the base; ShapeDtypeStructs will do.
      names: the model's table. Leaves without a name there are left out; a stack of layers is
        taken to be along the first axis.

    Returns:
      {torch's name of the tensor: leaf}.
    """
    found: dict[str, BaseLeaf] = {}
    for path, leaf in tree.items(params):
        shape = tree.aval(leaf).shape
        name = names.torch_name(path)
        if name is None and (module := module_name(names, path)) is not None:
            name = f"{module}.weight"
        if name is None:
            continue
        if "{}" in name:
            for n in range(shape[0]):
                found[name.format(n)] = BaseLeaf(path, n, len(shape) - 1)
        else:
            found[name] = BaseLeaf(path, None, len(shape))
    return found


def known_params(model: Any) -> Any:
    """The abstract params of a model of `jaxlora.models`, or None of any other."""
    try:
        example = architecture_of(model).example(model.config)
    except ConfigError:
        return None
    return jax.eval_shape(model.init, jax.random.key(0), example)["params"]


def tied_head(model: Any) -> tuple[str, str] | None:
    """Torch's names of a table and of the head that reads it too, of a model of `jaxlora.models`.

    Torch's head is a module of its own, which shares its weight with the table and nothing else.
    """
    try:
        arch = architecture_of(model)
    except ConfigError:
        return None
    if type(model) is not arch.heads.get("lm") or not model.config.tie_word_embeddings:
        return None
    table = next(n for n in arch.names.modules.values() if n in ("wte", "embed_tokens"))
    return f"{arch.names.base}.{table}", "lm_head"


def is_conv(site: Site) -> bool:
    """Whether a site is a convolution, by the name of its class."""
    return site.kind in {c.__name__ for c in _subclasses(nn.Conv.__base__)}


def torch_shapes(site: Site, rank: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's tensors in torch.

    Args:
      site: the site.
      rank: their rank; default: that of `to_torch`, which is twice the site's where the start is
        kept, and of a fused kernel the site's for each adapted block.

    Returns:
      {part: shape} for "a", "b" and, with DoRA, "m".
    """
    layout = site.layout
    r = torch_rank(site) if rank is None else rank
    if not is_conv(site):
        shapes = {"a": (r, layout.count("i")), "b": (layout.count("o"), r)}
        return shapes | ({"m": (layout.count("o"),)} if site.dora else {})
    *window, inputs = layout.sizes("i")
    ones = (1,) * len(window)
    shapes = {"a": (r, inputs, *window), "b": (layout.count("o"), r, *ones)}
    return shapes | ({"m": (1, layout.count("o"), *ones)} if site.dora else {})


def torch_rank(site: Site) -> int:
    """The rank of a site's update as one product of torch."""
    doubled = site.keeps_start and not site.freeze_a
    return site.layout.rows(site.rank) * (2 if doubled else 1)


def to_torch(
    site: Site, leaves: Parts, layer: int | None = None, *, grouped: bool = False
) -> dict[str, np.ndarray]:
    """A site's update as torch's tensors: `scaling * B A` with the site's scaling.

    Starting factors that are kept become further rows, `B A - B0 A0 = [B, -B0] [A; A0]`. The blocks
    of a fused kernel become one B over all outputs, zero outside each row's block.

    Args:
      site: the site.
      leaves: {part: leaf} of the adapter, as `site.leaves` gives them.
      layer: which layer of a scanned stack.
      grouped: keep the B of a fused kernel as loralib has it, (adapted outputs, rank).

    Returns:
      {part: array} with the shapes of `torch_shapes`.
    """
    layout = site.layout
    core = {}
    for part, leaf in leaves.items():
        kind: Any = part[0]
        full = layout.from_leaf(jnp.asarray(leaf), kind, site.rank)
        core[part] = full if layer is None else full[layer]
    found = terms(core)
    if grouped and layout.blocks:
        blocks = (sum(layout.blocks), site.rank, -1)  # the terms' rows of a block side by side
        a, b = joined([Term(t.sign, t.a.reshape(blocks), t.b.reshape(blocks)) for t in found], 1)
        a, b = np.asarray(a), np.asarray(jnp.swapaxes(b, 1, 2))
        return {"a": a.reshape(-1, a.shape[-1]), "b": b.reshape(-1, b.shape[-1])}
    a, b = joined([Term(term.sign, term.a, layout.spread(term.b)) for term in found], 0)
    parts = {"a": np.asarray(a), "b": np.asarray(b).reshape(len(b), -1).T}
    if is_conv(site):
        parts["a"] = np.moveaxis(parts["a"], -1, 1)
    if site.dora:
        parts["m"] = np.asarray(core["m"])
    shapes = torch_shapes(site, len(a))
    return {part: np.ascontiguousarray(x.reshape(shapes[part])) for part, x in parts.items()}


def from_torch(site: Site, layers: Sequence[Parts]) -> dict[str, np.ndarray]:
    """The leaves of a site from torch's tensors.

    Args:
      site: the site, with the rank of the tensors.
      layers: {part: array} of each layer of a scanned stack in order, or of the one layer. The B of
        a fused kernel is as loralib has it, (adapted outputs, rank).

    Returns:
      {part: leaf} of its trained leaves, in the dtype of the tensors.

    Raises:
      AdapterError: a tensor of another shape; each is named by its part.
    """
    layout, leaves = site.layout, {}
    expected = torch_shapes(site, layout.rows(site.rank))
    if layout.blocks:
        expected["b"] = (sum(layout.blocks) * layout.block_outputs, site.rank)
    for part in site.trained:
        kind: Any = part
        cores = []
        for n, parts in enumerate(layers):
            x = np.asarray(parts[part])
            if x.shape != expected[part]:
                where = f" of layer {n}" if layout.stack else ""
                raise AdapterError(misfit(f"{part}{where} of {site.path}", x.shape, expected[part]))
            cores.append(_core(site, part, x))
        full = np.stack(cores) if layout.stack else cores[0]
        leaves[part] = np.asarray(layout.to_leaf(jnp.asarray(full), kind, site.rank))
    return leaves


def misfit(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The message about a tensor of another shape."""
    turned = found != expected and sorted(found) == sorted(expected)
    hint = " It looks transposed." if turned else ""
    return f"'{name}' has shape {tuple(found)}, expected {tuple(expected)}.{hint}"


def _core(site: Site, part: str, x: np.ndarray) -> np.ndarray:
    """One layer's tensor as (rank, *contracted), (rank, *outputs) or (*outputs)."""
    layout = site.layout
    if part == "b":
        x = x.reshape(x.shape[0], -1)
        blocks = sum(layout.blocks) or 1
        x = np.swapaxes(x.reshape(blocks, -1, x.shape[-1]), 1, 2)
    elif part == "a" and is_conv(site):
        x = np.moveaxis(x, 1, -1)
    kind: Any = part
    return x.reshape(layout.core_shape(kind, site.rank))


def _why_not(site: Site) -> str | None:
    """Why no module of torch can hold a site's update, or None."""
    if site.weights:
        return f"{site.kind} is adapted in weight space, a raw parameter in torch"
    if site.layout.axes("b"):
        return f"{site.kind} has a batch of kernels, as the experts of a mixture"
    if len(site.layout.stack) > 1:
        return "it is a stack of stacks"
    if site.kind in ("ConvTranspose", "ConvLocal"):
        return f"a {site.kind} cannot be adapted there"
    return None


def _subclasses(of: Any) -> Iterator[type]:
    for child in of.__subclasses__():
        yield child
        yield from _subclasses(child)
