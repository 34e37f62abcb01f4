"""The memory of one device in a training step, told by compiling it without a single array."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlora import tree
from jaxlora.backend import traced_for
from jaxlora.config import LoraConfig
from jaxlora.errors import ConfigError, ShardingError, TooLargeError
from jaxlora.models.architectures import architecture_of
from jaxlora.models.sharding import default_specs
from jaxlora.plan import plan
from jaxlora.sharding import adapter_shardings, state_shardings
from jaxlora.tasks import classify, language
from jaxlora.tasks.base import Settings, optimizer
from jaxlora.tasks.mesh import ROWS, rows_stay
from jaxlora.train import TrainState, make_train_step

_ON_CPU = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""XLA for CPU makes float32 of bfloat16 kernels, and would do so for all layers before the loop
over them: accelerators have no such copy of the base."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      params: of the base.
      adapter: of the adapter's leaves.
      optimizer: of the optimizer's state.
      inputs: of the batch, the step and the key.
      activations: what the step needs beside these at its most: activations, gradients, and what
        it gathers of the base.
      other: what the compiler adds: the program, and padding of the above.
    """

    params: int
    adapter: int
    optimizer: int
    inputs: int = 0
    activations: int = 0
    other: int = 0

    @property
    def held(self) -> int:
        """What lies there between steps."""
        return self.params + self.adapter + self.optimizer

    @property
    def total(self) -> int:
        """All of it, at the most."""
        return self.held + self.inputs + self.activations + self.other


def held_memory(
    model: Any,
    params: tree.Tree,
    config: LoraConfig,
    mesh: Mesh | AbstractMesh,
    tx: optax.GradientTransformation | None = None,
) -> Memory:
    """The bytes that params, adapter and optimizer have on one device between steps, exactly.

    Args:
      model: a model of `jaxlora.models`.
      params: its params, or their shapes.
      config: what to adapt.
      mesh: with the axes data, fsdp and tensor; an `AbstractMesh` will do.
      tx: the optimizer; default: that of `jaxlora train`.

    Returns:
      The bytes; those of a step are zero.

    Raises:
      LoraError: as `plan`.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> from jaxlora.models.shapes import SHAPES, from_config
      >>> import jaxlora as jl
      >>> model, params = from_config(SHAPES["llama-3.1-8b"], scan_layers=True)
      >>> mesh = AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
      >>> found = held_memory(model, params, jl.LoraConfig(rank=8, targets="q_proj|v_proj"), mesh)
      >>> found.params // 10**6, found.adapter, found.optimizer == 2 * found.adapter + 8
      (4016, 6291456, True)
    """
    state, variables = _abstract(model, params, config, mesh, tx or default_optimizer())[:2]
    return Memory(_bytes(variables), _bytes(state.adapter), _bytes(state.opt_state))


def step_memory(
    model: Any,
    params: tree.Tree,
    config: LoraConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    length: int,
    tx: optax.GradientTransformation | None = None,
) -> Memory:
    """The bytes that a training step needs on one device of a mesh, as its compiler plans them.

    The step is that of `jaxlora train`. It is compiled and not run, so the devices may be virtual
    ones of a CPU, or those of a TPU that is not there (`jaxlora.tasks.topology`).

    Args:
      model: a model of `jaxlora.models` for language or classification.
      params: its params, or their shapes.
      config: what to adapt.
      mesh: with the axes data, fsdp and tensor, of type Auto.
      batch_size: rows of a step on all devices.
      length: tokens of a row.
      tx: the optimizer; default: that of `jaxlora train`.

    Returns:
      The bytes.

    Raises:
      TooLargeError: the compiler refuses, as a TPU's does for more than the TPU has.
      LoraError: as `plan`; or rows that the mesh does not divide.

    Example:
      >>> import jax, jaxlora as jl
      >>> from jaxlora.models.shapes import from_config
      >>> sizes = dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
      >>> model, params = from_config({"model_type": "gpt2", **sizes}, scan_layers=True)
      >>> auto = (jax.sharding.AxisType.Auto,) * 3
      >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=auto)
      >>> config = jl.LoraConfig(rank=2, targets="all-linear")
      >>> found = step_memory(model, params, config, mesh, batch_size=2, length=8)
      >>> found.activations > 0
      True
    """
    rows = math.prod(mesh.shape[name] for name in ROWS)
    if batch_size < 1 or batch_size % rows:
        raise ShardingError(
            f"batch_size is {batch_size}, expected a multiple of {rows}: the rows lie over data "
            "and fsdp of the mesh."
        )
    tx = tx or default_optimizer()
    state, variables, shardings = _abstract(model, params, config, mesh, tx)
    loss, batch = _problem(model, batch_size, length)
    over = NamedSharding(mesh, PartitionSpec(ROWS))
    batch = {name: _on(x, over) for name, x in batch.items()}
    step: Any = make_train_step(rows_stay(loss, mesh), tx, shardings=shardings, on_bad_step="stop")
    platform = next(iter(mesh.devices.flat)).platform
    try:
        with traced_for(platform):
            lowered = step.lower(state, variables, batch)
        compiled = lowered.compile(_ON_CPU if platform == "cpu" else None)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = str(e).strip().splitlines()[0].rpartition("CompileTimeHbmOom: ")[2]
        raise TooLargeError(f"The step needs more memory than a device has: {said}") from e
    found: Any = compiled.memory_analysis()
    parts = Memory(_bytes(variables), _bytes(state.adapter), _bytes(state.opt_state))
    inputs = _bytes((state.step, state.key, batch))
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    unused = parts.held + inputs - found.argument_size_in_bytes
    return dataclasses.replace(
        parts,
        inputs=inputs,
        activations=found.temp_size_in_bytes + new,
        other=found.generated_code_size_in_bytes + max(0, -unused),
    )


def default_optimizer() -> optax.GradientTransformation:
    """The optimizer of `jaxlora train`."""
    return optimizer(Settings(), 1000)[0]


def _abstract(
    model: Any, params: tree.Tree, config: LoraConfig, mesh: Any, tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Any], TrainState]:
    """(state, variables, shardings of the state): shapes, each with its sharding."""
    rule = default_specs(mesh, architecture_of(model).row_parallel)
    params = tree.map_leaves(
        lambda path, x: _on(x, NamedSharding(mesh, rule(path, x.shape))), params
    )
    variables = {"params": params}
    spec = plan(model, variables, config, *_inputs(model)).spec
    shardings = state_shardings(tx, adapter_shardings(spec, params, mesh))

    def create() -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.abstract())
        return TrainState.create(zeros, tx, jax.random.key(0))

    return jax.tree.map(_on, jax.eval_shape(create), shardings), variables, shardings


def _inputs(model: Any) -> tuple[Any, ...]:
    ids = architecture_of(model).example(model.config)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ConfigError(
            f"The model is a {type(model).__name__}, which reads no tokens, expected one for "
            "language or for the classification of texts."
        )
    return language.INPUTS[:1]


def _problem(model: Any, rows: int, length: int) -> tuple[Any, dict[str, Any]]:
    """The loss of the task that the model is for, and the shapes of its batch."""
    tokens = np.broadcast_to(np.int32(0), (rows, length))
    batch = {"input_ids": tokens, "attention_mask": tokens, "weight": np.zeros(rows, np.float32)}
    heads = architecture_of(model).heads
    if type(model) is heads.get("lm"):
        return language.make_loss(model, 0.0), batch | {"loss_mask": tokens}
    if type(model) is heads.get("classification"):
        return classify.make_loss(model, 0.0), batch | {"label": np.zeros(rows, np.int32)}
    raise ConfigError(
        f"The model is a {type(model).__name__}, expected one that is trained: with the head 'lm' "
        "or 'classification'."
    )


def _on(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _bytes(abstract: Any) -> int:
    """Bytes of one device's parts."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )
