"""Which rank each layer really used, as a table and a plot.

The singular values of an update tell how many directions it has. A site whose first two values
hold 99 % of the energy was trained with rank 2, whatever rank it was given.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from jaxlora import algebra
from jaxlora.adapter import Adapter
from jaxlora.errors import optional


@dataclasses.dataclass(frozen=True)
class UsedRank:
    """One kernel's update.

    Attributes:
      path: the kernel; a slice of a stacked one, or a block of a fused one, has its index behind.
      rank: the rank that it was given; twice the config's where starting factors are kept.
      used: the lowest rank that holds the share of the energy asked for; 0 for an update of zero.
      effective: the exponential of the entropy of the energies, a rank that is no integer.
      norm: the Frobenius norm of the update.
      values: the singular values, in falling order.
    """

    path: str
    rank: int
    used: int
    effective: float
    norm: float
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class UsedRanks:
    """What `used_ranks` found. `print(ranks)` shows it as a table."""

    rows: tuple[UsedRank, ...]
    energy: float

    def __str__(self) -> str:
        width = max(len("path"), *(len(row.path) for row in self.rows))
        most = max(row.rank for row in self.rows)
        lines = [f"{'path':{width}}  rank  used  effective       norm"]
        for row in self.rows:
            bar = "#" * round(20 * row.used / most)
            numbers = f"{row.rank:4}  {row.used:4}  {row.effective:9.2f}  {row.norm:9.3g}"
            lines.append(f"{row.path:{width}}  {numbers}  {bar}".rstrip())
        lines.append(f"used: singular values that hold {self.energy:.0%} of the energy")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws each update's singular values, over the largest of them, as a heat map.

        Args:
          path: the image to write; its suffix tells the format.

        Raises:
          MissingDependencyError: matplotlib is not installed.
        """
        figures = optional("matplotlib.figure", "A plot", "demo")
        grid = np.full((len(self.rows), max(row.rank for row in self.rows)), np.nan)
        for at, row in enumerate(self.rows):
            grid[at, : row.rank] = row.values / max(row.values.max(), np.finfo(np.float32).tiny)
        height = 1.5 + 0.22 * len(self.rows)
        figure = figures.Figure(figsize=(4 + 0.2 * grid.shape[1], height))
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_yticks(range(len(self.rows)), [row.path for row in self.rows], fontsize=7)
        used = [row.used - 0.5 for row in self.rows]
        axes.plot(
            used, range(len(used)), "r.", markersize=6, label=f"{self.energy:.0%} of the energy"
        )
        axes.set_xlabel("singular value")
        axes.legend(loc="lower right", fontsize=7)
        figure.colorbar(image, label="share of the largest")
        figure.savefig(path, bbox_inches="tight", dpi=120)
        return Path(path)


def used_ranks(adapter: Adapter, *, energy: float = 0.99) -> UsedRanks:
    """The rank that each update of a trained adapter uses.

    Args:
      adapter: the adapter.
      energy: the share of the squared singular values that counts as used, in (0, 1].

    Returns:
      A row for each kernel, each slice of a stacked one and each block of a fused one.

    Raises:
      ConfigError: an energy out of range.
      AdapterError: as `algebra.singular_values`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlora as jl
      >>> from jaxlora.ranks import used_ranks
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapter = jl.lora_init(jax.random.key(1), model, variables, jl.LoraConfig(rank=2), x)
      >>> print(used_ranks(adapter))
      path    rank  used  effective       norm
      kernel     2     0       0.00          0
      used: singular values that hold 99% of the energy
    """
    algebra.check_energy(energy)
    rows = []
    for path, found in algebra.singular_values(adapter).items():
        for index in np.ndindex(found.shape[:-1]):
            several = [str(i) for i, n in zip(index, found.shape, strict=False) if n > 1]
            name = path + (f"[{','.join(several)}]" if several else "")
            rows.append(_row(name, found[index].astype(np.float64), energy))
    return UsedRanks(tuple(rows), energy)


def _row(path: str, values: np.ndarray, energy: float) -> UsedRank:
    total = np.sum(values**2)
    if total == 0:
        return UsedRank(path, len(values), 0, 0.0, 0.0, values)
    shares = values**2 / total
    used = int(np.argmax(np.cumsum(shares) >= energy * (1 - 1e-9))) + 1
    some = shares[shares > 0]
    effective = float(np.exp(-np.sum(some * np.log(some))))
    return UsedRank(path, len(values), used, effective, float(np.sqrt(total)), values)
