"""The mesh that a setting describes, and what a run needs to train on it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlora import hosts
from jaxlora.errors import ShardingError, nearest
from jaxlora.sharding import rows_over
from jaxlora.train import TrainState

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of each axis of "data=2,fsdp=2,tensor=2"; axes that are not named have size 1.

    Raises:
      ShardingError: an unknown axis, one that is named twice, or a size that is no number.

    Example:
      >>> mesh_sizes("fsdp=8")
      {'data': 1, 'fsdp': 8, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise ShardingError(
                f"Mesh is '{text}': it has an axis '{name}', expected {', '.join(AXES)}. "
                f"Nearest: {nearest(name, AXES, 1)[0]}."
            )
        if name in sizes or not size.isdecimal() or int(size) < 1:
            raise ShardingError(
                f"Mesh is '{text}', expected each axis once with its size, such as "
                "data=2,fsdp=2,tensor=2."
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def mesh_of(text: str, batch_size: int | None = None) -> Mesh:
    """The mesh of all devices that a setting describes.

    Args:
      text: such as "data=2,fsdp=2,tensor=2".
      batch_size: rows of a batch, which lie over data and fsdp.

    Raises:
      ShardingError: as `mesh_sizes`; or it does not fit the devices or the batch.
    """
    sizes = mesh_sizes(text)
    needed, there = math.prod(sizes.values()), jax.device_count()
    if needed != there:
        raise ShardingError(
            f"Mesh is '{text}', which is {needed} devices, expected the {there} that there are "
            f"({jax.devices()[0].device_kind})."
        )
    rows = math.prod(sizes[name] for name in ROWS)
    if batch_size is not None and batch_size % rows:
        raise ShardingError(
            f"batch_size is {batch_size}, expected a multiple of {rows}: the rows lie over data "
            f"and fsdp of the mesh '{text}'."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows_stay(loss: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The loss with each row of a batch on its own devices throughout the model."""

    def run(*args: Any) -> Any:
        with rows_over(mesh, ROWS):
            return loss(*args)

    return run


def placing(mesh: Mesh, state: TrainState) -> Callable[..., tuple[Any, Any, Any]]:
    """Puts the arguments of a step on the mesh: a resumed state, and each batch.

    With several processes each has all of both, and puts its part there: nothing is sent.
    """
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    resumed = jax.jit(lambda now: now, out_shardings=state)

    def place(now: TrainState, variables: Any, batch: Any) -> tuple[Any, Any, Any]:
        if hosts.alone():
            return jax.device_put(now, state), variables, jax.device_put(batch, rows)
        if now.step.is_fully_addressable:  # read from a checkpoint, each by itself
            now = resumed(now)
        batch = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, rows, lambda index: x[index]), batch
        )
        return now, variables, batch

    return place
