"""What every task has: its settings, and the problem that they make of a model and its data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora import models, tree
from jaxlora.batches import Example
from jaxlora.config import ALL_LINEAR, LoraConfig
from jaxlora.errors import ConfigError, DataError
from jaxlora.fetch import ASSETS, fetch
from jaxlora.tasks.mesh import mesh_of

Remat = Literal["none", "all", "dots", "lora"]


def remat_of(word: Remat) -> bool | str:
    """What `ModelConfig.remat` has for the word of a setting."""
    return {"none": False, "all": True}.get(word, word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that every task has. A task is a subclass with `load` and `problem`."""

    model: str = ""
    """A name of `jaxlora fetch`, a folder, a GGUF file or a hub id."""
    data: str = ""
    """The training data: a file."""
    valid: str | None = None
    """The validation data, a file; by default a share of the training data."""
    valid_share: float = 0.05
    """The share of the training data that is held out where `valid` is not given."""
    limit: int | None = None
    """Use only so many examples of each split, to try things out."""
    max_length: int = 128
    """Tokens of an example; longer ones are cut."""
    out: str = "runs/run"
    """The folder of the run."""
    rank: int = 8
    """Rank of the update of each adapted kernel."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; by default alpha is twice the rank."""
    targets: str = "default"
    """default (the task's own), qv (queries and values), all-linear, or a pattern of layers."""
    dropout: float = 0.0
    """Dropout of the inputs of the update."""
    init: str = "kaiming"
    """How the factors start: kaiming, pissa, olora, …"""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dora: bool = False
    """Train the magnitude of each kernel as well."""
    learning_rate: float = 5e-4
    """The highest learning rate."""
    warmup: float = 0.1
    """The share of the steps in which the rate rises from zero."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes on after that."""
    weight_decay: float = 0.01
    """Decay of AdamW, on the adapter's leaves only."""
    clip: float = 1.0
    """The highest norm of the gradient."""
    batch_size: int = 16
    """Rows of a step."""
    epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after so many steps."""
    label_smoothing: float = 0.0
    """The share of the target's probability that is spread over all classes or tokens."""
    eval_every: int | None = None
    """Steps between evaluations and checkpoints; by default an epoch."""
    log_every: int = 10
    """Steps between writes of the log."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype that the model computes in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base's params."""
    remat: Remat = "none"
    """What is computed again in the backward pass: none, all of a layer, all but its products
    (dots), or all but the adapter's A x (lora)."""
    scan_layers: bool = False
    """Run the layers in a loop: one is compiled, however many there are."""
    mesh: str | None = None
    """Devices by the axes data, fsdp and tensor: data=2,fsdp=2,tensor=2. By default one device."""
    seed: int = 0
    """Seed of the factors, fresh heads, the order and the dropout."""

    @property
    def of_model(self) -> dict[str, Any]:
        """What `from_pretrained` is told of how the model computes."""
        return {
            "dtype": jnp.dtype(self.dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
            "remat": remat_of(self.remat),
            "scan_layers": self.scan_layers,
        }

    def filled(self) -> "Settings":
        """The settings with what the data tells, such as the classes."""
        return self

    def load(self) -> Any:
        """The pretrained model: (model, params, tokenizer)."""
        raise NotImplementedError

    def problem(self, pretrained: Any) -> "Problem":
        """The data and losses for the model that `load` gave."""
        raise NotImplementedError

    def measure(self, trained: Any, data: str | None = None) -> tuple[dict[str, float], list[Any]]:
        """The scores of a trained model, and what it said for each example, as JSON types.

        Args:
          trained: what `load_run` gave, its adapter None to measure the params alone.
          data: a file; by default the validation data of the run.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with data to train on, and the measure of it.

    Attributes:
      train: the training examples.
      valid: the validation examples.
      pad: what to pad each sequence with.
      config: what to adapt.
      inputs: shapes of the model's inputs, to plan with.
      loss: `(adapter, variables, batch, key) -> scalar`.
      evaluate: `(adapter, variables, examples) -> {metric: value}`.
      metric: the metric that tells which checkpoint is the best.
      higher_is_better: whether more of it is better.
      cut: how many examples were cut to the longest length.
    """

    train: Sequence[Example]
    valid: Sequence[Example]
    pad: Mapping[str, int]
    config: LoraConfig
    inputs: tuple[Any, ...]
    loss: Callable[..., jax.Array]
    evaluate: Callable[..., dict[str, float]]
    metric: str
    higher_is_better: bool
    cut: int = 0


def load_model(name: str, mesh: str | None = None, **options: Any) -> Any:
    """Load a model with its tokenizer, as `pretrained` does, on the mesh that a setting describes.

    Raises:
      ConfigError: the name is that of data, or the model has no tokenizer.
      CheckpointError: there is no such model.
    """
    found = pretrained(name, mesh=None if mesh is None else mesh_of(mesh), **options)
    if found[2] is None:
        raise ConfigError(f"Model {name} has no tokenizer, expected one beside its weights.")
    return found


def pretrained(name: str, **options: Any) -> Any:
    """Load a model by a name of `jaxlora fetch`, a folder, a GGUF file or a hub id.

    Args:
      name: which.
      **options: of `jaxlora.models.from_pretrained`.

    Returns:
      (model, params, tokenizer), the tokenizer None if there is none.

    Raises:
      ConfigError: the name is that of data.
      CheckpointError: there is no such model.
    """
    return models.from_pretrained(source_of(name), **options)


def source_of(name: str) -> str | Path:
    """What of a model `from_pretrained` opens: a name of `jaxlora fetch` is fetched.

    Raises:
      ConfigError: the name is that of data.
    """
    if name not in ASSETS or Path(name).exists():
        return name
    if name == "reviews":
        raise ConfigError("Model is 'reviews', which is data, expected a model.")
    folder = fetch(name)
    return next(iter(sorted(folder.glob("*.gguf"))), folder)


def adapter_config(settings: Settings, params: Any, head: Sequence[str] = ()) -> LoraConfig:
    """The adapter that the settings ask for, on a model with these params.

    Args:
      settings: the settings.
      params: the base.
      head: names of modules that are trained in full, those that are there.

    Returns:
      The config. Queries and values of GPT-2's fused `c_attn` are adapted through a mask.
    """
    paths = [path for path, _ in tree.items(params)]
    parts = {part for path in paths for part in path.split("/")}
    targets: str | tuple[str, ...] = settings.targets
    fused = {}
    if settings.targets in ("default", "qv") and "c_attn" in parts:
        fused = {"c_attn": (True, False, True)}
        mlp = () if settings.targets == "qv" else ("c_fc", "c_proj")
        targets = ("c_attn", *mlp)
    elif settings.targets == "qv":
        names = parts & {"query", "value", "query_proj", "value_proj", "q_proj", "v_proj"}
        if not names:
            raise ConfigError(
                "targets is 'qv', and the model has no layers of the usual names for queries and "
                "values. Give a pattern."
            )
        targets = f"({'|'.join(sorted(names))})"
    elif settings.targets == "default":
        targets = ALL_LINEAR
    return LoraConfig(
        rank=settings.rank,
        alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        targets=targets,
        exclude=() if head or "lm_head" not in parts or targets != ALL_LINEAR else "lm_head",
        dropout=settings.dropout,
        modules_to_save=[name for name in head if name in parts],
        init=settings.init,
        rslora=settings.rslora,
        dora=settings.dora,
        fused=fused,
    )


def optimizer(settings: Settings, steps: int) -> tuple[optax.GradientTransformation, Any]:
    """AdamW with clipping, and its schedule of the learning rate."""
    rate, warmup = settings.learning_rate, int(settings.warmup * steps)
    after = max(1, steps - warmup)
    decays = {
        "cosine": optax.cosine_decay_schedule(rate, after),
        "linear": optax.linear_schedule(rate, 0.0, after),
        "constant": optax.constant_schedule(rate),
    }
    rise = optax.linear_schedule(rate / (warmup + 1), rate, max(1, warmup))
    schedule = optax.join_schedules([rise, decays[settings.decay]], [warmup])
    adamw = optax.adamw(schedule, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw), schedule


def held_out(rows: Sequence[Any], settings: Settings) -> tuple[list[Any], list[Any]]:
    """(training, validation): the validation share taken out at random by the seed."""
    if not 0 < settings.valid_share < 1:
        raise ConfigError(f"valid_share is {settings.valid_share}, expected between 0 and 1.")
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    count = max(1, round(settings.valid_share * len(rows)))
    if count >= len(rows):
        raise DataError(f"The data has {len(rows)} rows, expected enough to hold {count} out.")
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def limited(rows: Sequence[Any], settings: Settings) -> list[Any]:
    """At most `limit` of the rows, drawn by the seed: files are often sorted by label."""
    if settings.limit is None or settings.limit >= len(rows):
        return list(rows)
    if settings.limit < 1:
        raise ConfigError(f"limit is {settings.limit}, expected at least 1.")
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    return [rows[i] for i in sorted(order[: settings.limit])]


def check_tokens(examples: Sequence[Example], model: Any, max_length: int) -> None:
    """Raises unless the model has every token id and as many positions as `max_length`.

    Raises:
      DataError: a token id past the vocabulary.
      ConfigError: `max_length` past the positions.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    positions = getattr(config, "context", None)
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"max_length is {max_length}, the model has {positions} positions. Lower it."
        )
    highest = max((int(max(e["input_ids"])) for e in examples if len(e["input_ids"])), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise DataError(
            f"The tokenizer gives the token id {highest}, the model's vocabulary has {vocabulary}. "
            "The tokenizer belongs to another model."
        )
