"""A model with its adapters by name, to generate with one of them, merged or not."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlora import runs
from jaxlora.adapter import Adapter
from jaxlora.checkpoint import load_adapter
from jaxlora.errors import ConfigError, nearest
from jaxlora.generate import Generated, generate
from jaxlora.merge import merge
from jaxlora.sampling import Sampling
from jaxlora.tasks import load_run
from jaxlora.tasks.base import load_model
from jaxlora.tasks.launch import read_settings

BASE = "base"
"""The name of the model without an adapter."""


@dataclasses.dataclass
class Speakers:
    """A causal model and its adapters.

    Attributes:
      model: the model.
      params: the base, which stays as it is.
      tokenizer: its tokenizer.
      adapters: {name: adapter}.
      name: which one speaks; "base" for none.
      merged: the params with that adapter merged, or None if it runs beside the base.
    """

    model: Any
    params: Any
    tokenizer: Any
    adapters: dict[str, Adapter]
    name: str = BASE
    merged: Any = None

    @classmethod
    def load(cls, source: str, adapters: Sequence[str]) -> "Speakers":
        """Load a model or a run, and further adapters.

        Args:
          source: a run's folder, or a model as `load_model` takes it.
          adapters: `FOLDER` or `NAME=FOLDER` each: a run or a checkpoint. The last one speaks, and
            the model computes as it did in the last that is a run.

        Raises:
          LoraError: one cannot be loaded, or is of another base.
        """
        found = {}
        given = [(name, folder) for name, _, folder in (a.rpartition("=") for a in adapters)]
        if (Path(source) / runs.CONFIG).is_file():
            trained = load_run(source)
            model, params, tokenizer = trained.model, trained.params, trained.tokenizer
            found[Path(source).name] = trained.adapter
        else:
            ran = [folder for _, folder in given if (Path(folder) / runs.CONFIG).is_file()]
            how = read_settings(ran[-1]).of_model if ran else {}
            model, params, tokenizer = load_model(source, head="lm", **how)
        for name, folder in given:
            path = Path(folder)
            best = path / runs.BEST
            adapter = load_adapter(best if best.is_dir() else path, params=params)
            found[name or path.name] = adapter
        if BASE in found:
            raise ConfigError(f"An adapter is named '{BASE}', which is the model without one.")
        return cls(model, params, tokenizer, found, name=[BASE, *found][-1])

    def switch(self, name: str) -> None:
        """Let another adapter speak, or the base; merged if one was merged before.

        Raises:
          ConfigError: there is none of that name.
        """
        names = [BASE, *self.adapters]
        if name not in names:
            raise ConfigError(
                f"Adapter is '{name}', expected one of {', '.join(names)}. "
                f"Nearest: {nearest(name, names, 1)[0]}."
            )
        was_merged, self.merged, self.name = self.merged is not None, None, name
        if was_merged:
            self.merge()

    def merge(self) -> None:
        """Fold the adapter into a copy of the params."""
        self.merged = None
        if self.name != BASE:
            self.merged = merge(self.params, self.adapters[self.name])

    def speak(
        self,
        prompt: Any,
        *,
        max_new_tokens: int,
        sampling: Mapping[str, Any],
        key: jax.Array,
        stop: Sequence[str] = (),
        stream: Callable[[int, list[int], str], None] | None = None,
    ) -> Generated:
        """Continue a prompt with the adapter that speaks."""
        unmerged = self.merged is None and self.name != BASE
        return generate(
            self.model,
            {"params": self.params if self.merged is None else self.merged},
            [prompt],
            adapter=self.adapters[self.name] if unmerged else None,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
            key=key,
            stop=stop,
            tokenizer=self.tokenizer,
            stream=stream,
        )
