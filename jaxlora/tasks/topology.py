"""TPUs that are not there: their compiler plans a program for a slice that is only described."""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxlora.errors import MissingDependencyError, ShardingError
from jaxlora.tasks.mesh import AXES

HBM = {
    "TPU v3": 16,
    "TPU v4": 16,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
    "TPU7x": 96,
}
"""{kind of device: its memory in GB}. A chip of a v3, v4 or TPU7x is described as two devices."""
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs: no lock on a device is needed
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice that is described and need not be there.

    Args:
      name: the generation and the chips along each axis of the slice: "v5e:2x4", "v5p:4x4x4",
        "v6e:8x8".

    Returns:
      Its devices, to make a mesh of. Programs compile for it, and do not run.

    Raises:
      MissingDependencyError: libtpu is not installed.
      ShardingError: there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingDependencyError(
            "Compiling for a TPU needs the package 'libtpu', which is not installed. "
            "Next: pip install 'jaxlora[topology]'."
        )
    from jax.experimental import topologies  # it imports much that nothing else needs

    for variable, value in _QUIET.items():  # it looks for a TPU's surroundings, and says so
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(name.replace("trillium", "v6e"), "tpu").devices)
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        raise ShardingError(
            f"Topology is '{name}', expected a TPU's generation and its chips along each axis, "
            f"such as v5e:2x4, v5p:4x4x4 or v6e:8x8. Its compiler says: {e}"
        ) from e


def mesh_on(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh with the axes data, fsdp and tensor on given devices.

    Raises:
      ShardingError: it has another number of devices.
    """
    needed = math.prod(sizes.values())
    if needed != len(devices):
        raise ShardingError(
            f"The mesh is {needed} devices, the topology has {len(devices)} "
            f"({devices[0].device_kind}), expected the same number."
        )
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def memory_of(devices: Sequence[Any]) -> float | None:
    """The memory of one of these devices in GB, None if it is not known."""
    return HBM.get(devices[0].device_kind)
