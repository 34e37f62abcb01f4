"""How a pretrained model's params lie on a mesh."""

import re
from collections.abc import Callable

import jax

Specs = Callable[[str, tuple[int, ...]], jax.sharding.PartitionSpec]
"""(path, shape) -> how a leaf is sharded."""


def default_specs(mesh: jax.sharding.Mesh, row_parallel: str) -> Specs:
    """Shards kernels and tables over the mesh's axes "fsdp" and "tensor", where their sizes allow.

    "tensor" takes a kernel's outputs (its inputs in a layer that ends a block, so that only there
    the devices are summed over), and a table's rows; "fsdp" takes the other axis. Vectors are on
    every device. A mesh without one of these axes does not shard along it.

    Args:
      mesh: the mesh.
      row_parallel: pattern of the modules that end a block (`Architecture.row_parallel`).
    """

    def spec(path: str, shape: tuple[int, ...]) -> jax.sharding.PartitionSpec:
        scope, _, leaf = path.rpartition("/")
        if leaf not in ("kernel", "embedding") or len(shape) < 2:
            return jax.sharding.PartitionSpec()
        rows = leaf == "embedding" or re.search(rf"(^|/)({row_parallel})$", scope)
        over = ("tensor", "fsdp") if rows else ("fsdp", "tensor")
        names = [
            name if mesh.shape.get(name, 0) and size % mesh.shape[name] == 0 else None
            for name, size in zip(over, shape[-2:], strict=True)
        ]
        return jax.sharding.PartitionSpec(*[None] * (len(shape) - 2), *names)

    return spec
