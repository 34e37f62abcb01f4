"""The bytes that devices exchange in a step: the base alone, and with an adapter.

    python -m benchmarks.collectives
    python -m benchmarks.collectives --topology v5e:2x4  # by a TPU's compiler: needs libtpu

The base alone is its forward pass and the gradient of its input, without which no adapter of a
first layer trains. Nothing runs: the compiled programs are read, of a Llama whose layers are not
scanned, on 8 devices that are parts of a CPU, or of a TPU that need not be there.
"""

import argparse
import contextlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora as jl
from jaxlora import tree
from jaxlora.backend import traced_for
from jaxlora.models.architectures import architecture
from jaxlora.models.llama import LlamaConfig, LlamaForCausalLM
from jaxlora.models.sharding import default_specs
from jaxlora.tasks.mesh import mesh_sizes
from jaxlora.tasks.topology import mesh_on, topology_devices

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Found = dict[str, tuple[int, int]]
"""{kind: (how many, bytes of their results on one device)}."""
_OPERATION = re.compile(
    rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\((?:.*?channel_id=(\d+))?"
)
_PART = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def collectives(text: str) -> Found:
    """The collectives of `compiled.as_text()`, in which no loop is.

    A TPU's compiler shows a collective in each of the fusions that it runs beside: those of one
    channel are one.
    """
    found: Found = dict.fromkeys(KINDS, (0, 0))
    seen = set()
    for types, kind, channel in _OPERATION.findall(text):
        if channel and (kind, channel) in seen:
            continue
        seen.add((kind, channel))
        size = sum(
            int(bits) // 8 * int(np.prod([int(n) for n in shape.split(",") if n]))
            for _, bits, shape in _PART.findall(types)
        )
        found[kind] = (found[kind][0] + 1, found[kind][1] + size)
    return found


def bytes_of(found: Found, kind: str) -> int:
    """The bytes of one kind."""
    return found[kind][1]


def measured(
    mesh: Mesh,
    width: int = 64,
    rank: int = 2,
    rows: int = 8,
    length: int = 16,
    rows_stay: bool = True,
) -> tuple[Found, Found, int]:
    """(the base's collectives, those of a step with an adapter, bytes of the adapter)."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rule = default_specs(mesh, architecture("llama").row_parallel)

    def on(x: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = tree.map_leaves(lambda path, x: on(x, rule(path, x.shape)), params)
    ids = on(tokens, P(("data", "fsdp")))

    def loss_of(logits: jax.Array, ids: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    def base(added: jax.Array, params: tree.Tree, ids: jax.Array) -> jax.Array:
        def add(call, args, kwargs, context):
            y = call(*args, **kwargs)
            embeds = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
            return y + added if embeds else y

        with nn.intercept_methods(add), jl.rows_over(mesh, ("data", "fsdp")):
            return loss_of(model.apply({"params": params}, ids), ids)  # type: ignore[arg-type]

    embedded = on(jax.ShapeDtypeStruct((rows, length, width), jnp.float32), P(("data", "fsdp")))
    alone = jax.jit(jax.value_and_grad(base), out_shardings=(None, embedded.sharding))
    spec = jl.plan(
        model, {"params": params}, jl.LoraConfig(rank=rank, targets="all-linear"), tokens
    ).spec
    tx = optax.adamw(1e-3)
    shardings = jl.state_shardings(tx, jl.adapter_shardings(spec, params, mesh))

    def loss(adapter: jl.Adapter, variables: Any, ids: jax.Array, key: jax.Array) -> jax.Array:
        with jl.rows_over(mesh, ("data", "fsdp")) if rows_stay else contextlib.nullcontext():
            return loss_of(jl.lora_apply(model, variables, adapter, ids), ids)

    step = jl.make_train_step(loss, tx, shardings=shardings)
    state = jax.eval_shape(lambda: jl.TrainState.create(_zeros(spec), tx, jax.random.key(0)))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    texts = [
        alone.lower(embedded, params, ids).compile().as_text(),
        step.lower(state, {"params": params}, ids).compile().as_text(),  # type: ignore[attr-defined]
    ]
    found = [collectives(text or "") for text in texts]
    return found[0], found[1], tree.nbytes(spec.abstract())


def _zeros(spec: jl.Spec) -> jl.Adapter:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.abstract())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="a TPU slice of 8 devices, such as v5e:2x4")
    topology = parser.parse_args(arguments).topology
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    devices = jax.devices() if topology is None else topology_devices(topology)
    print("| mesh | kind | base alone | with the adapter | without `rows_over` |")
    print("|---|---|---|---|---|")
    for text in ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"):
        mesh = mesh_on(mesh_sizes(text), devices)
        with traced_for(devices[0].platform):
            base, lora, adapter = measured(mesh, width=512, rank=8, length=128)
            free = measured(mesh, width=512, rank=8, length=128, rows_stay=False)[1]
        name = text.replace("=", " ").replace(",", " x ")
        for kind in KINDS:
            if base[kind][0] or lora[kind][0] or free[kind][0]:
                cells = [f"{x[kind][0]}: {x[kind][1] / 1e3:,.0f} KB" for x in (base, lora, free)]
                print(f"| {name} | {kind} | {' | '.join(cells)} |")
    print(f"\nThe adapter has {adapter / 1e3:,.0f} KB.")


if __name__ == "__main__":
    main()
