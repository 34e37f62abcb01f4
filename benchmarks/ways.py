"""The ways to train a decoder that step.py compares: a function each, in one table.

Each gives a step `(trained, state, frozen, x, key) -> (trained, state)` with its arguments. All
take the same loss and the same optimizer, and all are given their buffers back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

import jaxlora as jl
from benchmarks.decoder import Decoder, NnxDecoder, Shape
from benchmarks.programs import Program, program
from jaxlora.errors import optional

Array = jax.Array
Loss = Callable[[Any, Any, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted.

    Attributes:
      name: "q,v" or "all".
      targets: names of the adapted kernels.
      rank: of each; alpha is twice the rank.
      dropout: of the adapter's input.
    """

    name: str
    targets: tuple[str, ...]
    rank: int
    dropout: float = 0.0

    @property
    def pattern(self) -> str:
        """The modules, as a regular expression."""
        return f".*/({'|'.join(self.targets)})"


def full(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """All params are trained."""
    model = Decoder(shape)
    variables = filled(jax.eval_shape(model.init, jax.random.key(1), x))

    def loss(params: Any, frozen: Any, x: Array, key: Array) -> Array:
        return _loss(model.apply({"params": params}, x))

    return _step(loss, variables["params"], (), x)


def flat(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """All params are trained, and the Dense layers run on flattened tokens."""
    return full(dataclasses.replace(shape, flat=True), x, lora)


def ours(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """Through `jaxlora.lora_apply`."""
    assert lora is not None
    model = Decoder(shape)
    variables = filled(jax.eval_shape(model.init, jax.random.key(1), x))
    config = jl.LoraConfig(
        rank=lora.rank, alpha=2 * lora.rank, targets=lora.pattern, dropout=lora.dropout
    )
    adapter = jl.lora_init(jax.random.key(2), model, variables, config, x)

    def loss(trained: Any, frozen: Any, x: Array, key: Array) -> Array:
        whole = dataclasses.replace(adapter, params=trained)
        rngs = {"dropout": key} if lora.dropout else None
        return _loss(jl.lora_apply(model, frozen, whole, x, rngs=rngs))

    return _step(loss, filled(adapter.params), variables, x)


def ours_flat(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """The same on the model whose Dense layers run on flattened tokens."""
    return ours(dataclasses.replace(shape, flat=True), x, lora)


def qwix(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """Qwix's LoRA, which replaces the products inside the model."""
    assert lora is not None
    library = optional("qwix", "The comparison with Qwix", "bench")
    rule: dict[str, Any] = {"rank": lora.rank, "alpha": 2.0 * lora.rank, "dropout": lora.dropout}
    provider = library.LoraProvider(module_path=lora.pattern, **rule)
    model = library.apply_lora_to_model(Decoder(shape), provider)
    keys = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = filled(jax.eval_shape(model.init, keys, x))
    trained, frozen = split(variables["params"], lambda path: path[-1].endswith(("_a", "_b")))
    assert trained, f"Qwix's pattern {lora.pattern} matched nothing"

    def loss(trained: Any, frozen: Any, x: Array, key: Array) -> Array:
        rngs = {"dropout": key} if lora.dropout else None
        return _loss(model.apply({"params": joined(trained, frozen)}, x, rngs=rngs))

    return _step(loss, trained, frozen, x)


def nnx_lora(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """Flax NNX's own LoRA modules around the Linear layers."""
    assert lora is not None
    graph, trained, frozen = nnx.split(
        nnx.eval_shape(lambda: adapted(shape, lora)), nnx.LoRAParam, ...
    )
    trained, frozen = filled(trained), filled(frozen)

    def loss(trained: Any, frozen: Any, x: Array, key: Array) -> Array:
        return _loss(nnx.merge(graph, trained, frozen)(x))

    return _step(loss, trained, frozen, x)


def adapted(shape: Shape, lora: Lora) -> NnxDecoder:
    """The decoder in NNX with its layers wrapped."""
    model = NnxDecoder(shape, nnx.Rngs(1))
    for layer in model.layers:
        layer.adapt(lora.targets, lora.rank, nnx.Rngs(2))
    return model


def interceptor(shape: Shape, x: Array, lora: Lora | None) -> Program:
    """What one writes first: `(x @ A) @ B` on (batch, sequence, width), added by an interceptor."""
    assert lora is not None
    model = Decoder(shape)
    variables = filled(jax.eval_shape(model.init, jax.random.key(1), x))
    trained = plain_factors(variables["params"], lora, shape.scan)

    def loss(trained: Any, frozen: Any, x: Array, key: Array) -> Array:
        with nn.intercept_methods(plain_branch):
            return _loss(model.apply({"params": joined(trained, frozen)}, x))

    return _step(loss, trained, variables["params"], x)


def plain_branch(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Adds the product of the leaves a and b that stand beside a kernel, if there are any."""
    y = next_method(*args, **kwargs)
    if not isinstance(context.module, nn.Dense | nn.DenseGeneral):
        return y
    a, b = (context.module.get_variable("params", name) for name in ("lora_a", "lora_b"))
    if a is None:
        return y
    low = jnp.tensordot(args[0], a, a.ndim - 1)  # (batch, sequence, rank)
    return y + 2.0 * jnp.tensordot(low, b, 1)


def plain_factors(params: Any, lora: Lora, stacked: bool) -> Any:
    """Leaves a (*inputs, rank) and b (rank, *outputs) beside each kernel that is adapted."""
    leaves: dict[Any, Any] = traverse_util.flatten_dict(params)
    found = {}
    for path, leaf in leaves.items():
        if path[-1] != "kernel" or path[-2] not in lora.targets:
            continue
        stack, sizes = leaf.shape[:stacked], leaf.shape[stacked:]
        inputs = 2 if path[-2] == "out" and len(sizes) == 3 else 1
        shapes = (*stack, *sizes[:inputs], lora.rank), (*stack, lora.rank, *sizes[inputs:])
        for name, shape in zip(("lora_a", "lora_b"), shapes, strict=True):
            found[(*path[:-1], name)] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return filled(traverse_util.unflatten_dict(found))


WAYS: dict[str, Callable[[Shape, Array, Lora | None], Program]] = {
    "full": full,
    "full, flat": flat,
    "jaxlora": ours,
    "jaxlora, flat": ours_flat,
    "Qwix": qwix,
    "nnx.LoRA": nnx_lora,
    "interceptor": interceptor,
}
"""By the names in the tables; "full" is what the others are compared with."""


def fits(way: str, shape: Shape, lora: Lora | None) -> bool:
    """Whether a way can do this: nnx.LoRA and the interceptor have no dropout of their own."""
    if lora is not None and lora.dropout and way in ("nnx.LoRA", "interceptor"):
        return False
    return not (way == "nnx.LoRA" and shape.scan)


def split(params: Any, trained: Callable[[tuple[str, ...]], bool]) -> tuple[Any, Any]:
    """The leaves that are trained, and the others."""
    leaves = traverse_util.flatten_dict(params)
    parts = [{k: v for k, v in leaves.items() if trained(k) == want} for want in (True, False)]
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def joined(one: Any, other: Any) -> Any:
    """Two trees of params in one."""
    flat = traverse_util.flatten_dict
    return traverse_util.unflatten_dict({**flat(other), **flat(one)})


def filled(tree: Any) -> Any:
    """Small random numbers in the place of shapes: time does not depend on them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype)), tree
    )


def _loss(y: Any) -> Array:
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def _step(loss: Loss, trained: Any, frozen: Any, x: Array) -> Program:
    tx = optax.adam(1e-4)

    def step(trained: Any, state: Any, frozen: Any, x: Array, key: Array) -> Any:
        grads = jax.grad(loss)(trained, frozen, x, key)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    args = trained, tx.init(trained), frozen, x, jax.random.key(3)
    return program(step, *args, carried=2)
