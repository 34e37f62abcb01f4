"""How a model's params are called in torch: module paths here, module names there."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_NUMBER = re.compile(r"(?<![^_/])(\d+)(?=/|$)")


@dataclasses.dataclass(frozen=True)
class Names:
    """A table of names, and the rules that hold for all of them.

    A leaf `kernel`, `embedding` or `scale` is torch's `weight`, `bias` is `bias`. Kernels are
    (…window, in, out) here and (out, in, …window) in torch.

    Attributes:
      base: the scope of the model without its head, which is also torch's prefix: "bert". Paths
        and names are known with and without it.
      modules: {our path: torch's name}, both without the base's prefix, `{}` for a layer's number;
        of a param that is no layer's, its own path and name.
      stored_in_out: pattern of our module paths whose torch weight is (in, out) as ours is (GPT-2's
        Conv1D).
    """

    base: str
    modules: Mapping[str, str]
    stored_in_out: str | None = None

    def torch_name(self, path: str) -> str | None:
        """Torch's name of a module or leaf, or None if the model has no such path.

        Of a path in a scanned stack the name keeps a `{}` for the layer's number.

        Example:
          >>> from jaxlora.models.bert import NAMES
          >>> NAMES.torch_name("bert/encoder/layer_3/attention/query/kernel")
          'bert.encoder.layer.3.attention.self.query.weight'
          >>> NAMES.torch_name("bert/encoder/layer/attention/query")
          'bert.encoder.layer.{}.attention.self.query'
        """
        bare = path.removeprefix(f"{self.base}/")
        prefix = "" if bare == path else f"{self.base}."
        if (name := self._module_name(bare)) is not None:
            return prefix + name
        module, _, leaf = bare.rpartition("/")
        name = self._module_name(module)
        if name is None or leaf not in _LEAVES:
            return None
        return f"{prefix}{name}.{_LEAVES[leaf]}"

    def bare(self, name: str) -> str:
        """A torch name without the base's prefix."""
        return name.removeprefix(f"{self.base}.")

    def bare_name(self, path: str) -> str:
        """Torch's name of a leaf without the base's prefix; the path itself if it has none."""
        return self.bare(self.torch_name(path) or path)

    def torch_axes(self, path: str, ndim: int) -> tuple[int, ...]:
        """Where each axis of a leaf stands in torch's tensor, for one layer of a stack."""
        module, _, leaf = path.removeprefix(f"{self.base}/").rpartition("/")
        stored = self.stored_in_out is not None and re.fullmatch(self.stored_in_out, module)
        if leaf != "kernel" or ndim < 2 or stored:
            return tuple(range(ndim))
        return (*range(2, ndim), 1, 0)

    def transposed(self, path: str, array: np.ndarray) -> np.ndarray:
        """A leaf, or one layer of a stack, with torch's order of axes."""
        axes = self.torch_axes(path, array.ndim)
        return np.ascontiguousarray(np.transpose(array, np.argsort(axes)))

    def _module_name(self, path: str) -> str | None:
        if path in self.modules:
            return None if "{}" in path else self.modules[path]
        for number in _NUMBER.finditer(path):  # more than one: h_0/ln_1
            start, end = number.span()
            if (name := self.modules.get(f"{path[:start]}{{}}{path[end:]}")) is not None:
                return name.format(number.group(1))
        stacked = {
            ours.replace("_{}", "").replace("/{}", ""): n
            for ours, n in self.modules.items()
            if "{}" in ours
        }
        return stacked.get(path)
