"""Discovery in a Flax NNX module: which layers use which kernels, and which axes are stacked.

`nnx.scan` and `nnx.vmap` tell a variable nothing of the axis that they take away. So each stacked
kernel is traced a second time with probes beside it, variables of pairwise distinct prime sizes
but for the axis in question, one with as many axes as the kernel and one with one more: only the
axis and the sign that the model takes away let both arrive whole.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxlora.discover import Seen, Use, trace
from jaxlora.errors import LoraError, ModelError, TargetError
from jaxlora.interop.nnx_layers import Array, hook, hooked, unhooked
from jaxlora.layers import Linear

_DESCRIBES = ("shape", "dtype", "ndim", "size", "aval", "sharding", "weak_type")
_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149)


class _Probe(nnx.Param):
    """A variable that is sliced as the kernel beside it."""


def variables(module: nnx.Module) -> dict[str, nnx.Param]:
    """{path: variable} of a module's params; one that is shared has the path of `nnx.state`."""
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Param)
    }


def holders(module: nnx.Module, paths: Collection[str]) -> list[tuple[nnx.Module, dict[str, str]]]:
    """Each module that holds one of the params at the paths, with {attribute: path} of those."""
    names = {id(variable): path for path, variable in variables(module).items() if path in paths}
    found = []
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            held = {attr: names[id(x)] for attr, x in vars(node).items() if id(x) in names}
            found += [(node, held)] if held else []
    return found


def discover(model: nnx.Module, candidates: set[str], args: Any, kwargs: Any, method: str) -> Seen:
    """Traces a call of the module and records how the candidates are used.

    Args:
      model: the module, abstract or not.
      candidates: paths of the params that may be adapted.
      args: example inputs, abstract or not.
      kwargs: keyword arguments of the call.
      method: the name of the method to call.

    Returns:
      What was seen. A kernel that is read or set outside of its layer is among the changed.

    Raises:
      ModelError: the module rejects the inputs.
      TargetError: a candidate is used in two ways.
    """
    seen, shapes = Seen(), _Shapes()
    run = functools.partial(_trace, model, args, kwargs, method)
    try:
        run(lambda copy: _record(copy, candidates, seen, shapes, {}))
    except LoraError:
        raise
    except Exception as e:
        raise ModelError(
            f"The model rejects the example inputs: {type(e).__name__}: "
            f"{str(e).strip().splitlines()[0]} Expected inputs that the module's {method} takes."
        ) from e
    leaves = {path: tuple(x.get_raw_value().shape) for path, x in variables(model).items()}
    ways = {p: list(_ways(leaves[p], own)) for p, own in shapes.own.items()}

    def arrives(guess: Mapping[str, tuple[int, ...]]) -> set[str]:
        """The paths whose probes reach the layer whole."""
        found = _Shapes()
        probes = {p: _probe_shapes(leaves[p], stack) for p, stack in guess.items()}
        try:
            run(lambda copy: _record(copy, set(guess), Seen(), found, probes))
        except Exception:
            return set()
        return found.whole

    stacks = {p: () for p, found in ways.items() if found == [()]}
    guess = {p: found[0] for p, found in ways.items() if p not in stacks and found}
    confirmed = arrives(guess) if guess else set()
    stacks |= {p: guess[p] for p in confirmed}
    for path in sorted(set(guess) - confirmed):
        one = next((way for way in ways[path] if path in arrives({path: way})), None)
        stacks |= {path: one} if one is not None else {}
    for path, use in seen.uses.items():
        seen.uses[path] = Use(use.kind, use.roles, stacks.get(path, ()), use.lookup)
        if path not in stacks or len(use.roles) != len(shapes.own[path]):
            seen.changed.add(path)
    unserved = seen.changed - set(seen.uses)  # a module of the user's reads them, no layer does
    seen.changed -= unserved
    for node, held in holders(model, unserved):
        for path in held.values():
            seen.holders[path], seen.ndims[path] = type(node), len(leaves[path])
            seen.stacks[path] = ()
    return seen


def _trace(
    model: nnx.Module, args: Any, kwargs: Any, method: str, prepare: Callable[[nnx.Module], None]
) -> None:
    """Traces the call on a copy of the module that has been prepared for it."""
    graphdef, state = nnx.split(model)

    def run(variables: Any, args: Any, kwargs: Any) -> None:
        copy = nnx.merge(graphdef, variables["state"])
        prepare(copy)
        getattr(copy, method)(*args, **{k: v for k, v in kwargs.items() if k != "mutable"})

    trace(run, {"state": state}, args, kwargs)


@functools.cache
def _watched(cls: Any) -> Any:
    """A type of variable that tells when it is read or set."""

    class Watched(cls):
        def get_value(self, **index: Any) -> Any:
            self.get_metadata("touched")()
            return super().get_value(**index)

        def set_value(self, value: Any, **index: Any) -> None:
            self.get_metadata("touched")()
            super().set_value(value, **index)

        def __getattr__(self, name: str) -> Any:  # `kernel.T` and its kin read the value too
            found = super().__getattr__(name)
            if not (name in _DESCRIBES or name.startswith("_") or self.has_metadata(name)):
                self.get_metadata("touched")()
            return found

    return Watched


class _Shapes:
    """Shapes as the layers see them: of the kernels, and whose probes arrive whole."""

    def __init__(self) -> None:
        self.own: dict[str, tuple[int, ...]] = {}
        self.whole: set[str] = set()


def _record(
    copy: nnx.Module,
    candidates: set[str],
    seen: Seen,
    shapes: _Shapes,
    probes: Mapping[str, list[tuple[int, ...]]],
) -> None:
    """Prepares a copy to record into `seen` and `shapes` how its layers are called."""
    inside: list[str] = []

    def touched(path: str) -> None:
        if path not in inside:
            seen.changed.add(path)

    for path, variable in variables(copy).items():
        if path in candidates:
            object.__setattr__(variable, "__class__", _watched(type(variable)))
            variable.set_metadata("touched", functools.partial(touched, path))
    for node, held in holders(copy, candidates):
        if not hooked(type(node)):
            continue
        for attr, path in held.items():
            for i, shape in enumerate(probes.get(path, ())):
                setattr(node, f"{attr}_lora_probe{i}", _Probe(jnp.zeros(shape, jnp.int8)))
        hook(node, _Recorder(held, seen, shapes, inside))


class _Recorder:
    """The hook that records how a layer uses its kernels."""

    def __init__(self, held: dict[str, str], seen: Seen, shapes: _Shapes, inside: list[str]):
        self.held, self.seen, self.shapes, self.inside = held, seen, shapes, inside

    def __call__(self, module: nnx.Module, linear: Linear, run: Callable[[], Array]) -> Array:
        path = self.held.get(linear.param)
        self.inside += self.held.values()
        try:
            y = run()
        finally:
            del self.inside[len(self.inside) - len(self.held) :]
        if path is None:
            return y
        own = tuple(getattr(module, linear.param).get_raw_value().shape)
        kind = unhooked(type(module))
        use = Use(kind.__name__, linear.kernel_roles(), (), linear.lookup)
        first = self.seen.uses.setdefault(path, use)
        if first.roles != use.roles or self.shapes.own.setdefault(path, own) != own:
            raise TargetError(
                f"{path} is used in two ways, with axes {first.roles} and {use.roles}, expected "
                "one. `exclude` it, or register a rule that gives its `roles`."
            )
        if use.lookup:
            self.seen.uses[path] = use
        self.seen.holders[path], self.seen.ndims[path], self.seen.stacks[path] = kind, len(own), ()
        probes = [
            vars(module)[f"{linear.param}_lora_probe{i}"].get_raw_value().shape
            for i in range(2)
            if f"{linear.param}_lora_probe{i}" in vars(module)
        ]
        if probes == [_PRIMES[: len(own)], _PRIMES[: len(own) + 1]]:
            self.shapes.whole.add(path)
        return y


def _ways(shape: tuple[int, ...], own: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The signed axes, outermost first, that leave `own` of a shape when they are taken away."""
    if len(shape) == len(own):
        if shape == own:
            yield ()
        return
    n = len(shape)
    for axis in sorted(range(-n, n), key=lambda axis: (axis < 0, abs(axis))):
        left = shape[: axis % n] + shape[axis % n + 1 :]
        for inner in _ways(left, own):
            yield (axis, *inner)


def _probe_shapes(shape: tuple[int, ...], stack: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a kernel's two probes, if `stack` is what is taken away from it."""
    sizes, left = [], list(shape)
    for axis in stack:
        sizes.append(left.pop(axis))
    found = []
    for more in (0, 1):
        probe = list(_PRIMES[: len(left) + more])
        for axis, size in reversed(list(zip(stack, sizes, strict=True))):
            probe.insert(axis if axis >= 0 else len(probe) + 1 + axis, size)
        found.append(tuple(probe))
    return found
