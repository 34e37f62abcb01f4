"""What every model's config has: dtypes, how its layers run, and checks of its fields."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeGuard

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlora.branch import LOW
from jaxlora.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""The activations by Hugging Face's names: "gelu" is exact, the other two are tanh."""
REMAT = {
    True: None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "lora": jax.checkpoint_policies.save_only_these_names(LOW),
}
"""The checkpoint policies by the values of `remat`."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The fields of config.json that tell special tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The part of a config that is ours; a model adds its fields, named as in config.json.

    Attributes:
      dtype: dtype of the computation; norms and the softmax are always in float32.
      param_dtype: dtype of the params.
      scan_layers: run the layers by `nn.scan`: one compiled layer, params stacked on axis 0 under
        the layers' name without a number.
      remat: compute each layer's activations again in the backward pass instead of keeping them:
        True, or a name of `REMAT` for what is kept all the same: "dots", the products with kernels,
        or "lora", the adapters' `A x`.
      attention: the implementation of `jax.nn.dot_product_attention`: "xla", "cudnn" (flash
        attention, on GPUs that have it) or None, which leaves the choice to jax. Dropout of the
        attention weights, and DeBERTa, need the weights themselves and are always "xla".
      bos_token_id, eos_token_id, pad_token_id: the ids of those tokens, an integer or several, or
        None; kept for config.json, and without a meaning here but for RoBERTa's padding.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool | Literal["dots", "lora"] = False
    attention: Literal["xla", "cudnn"] | None = None

    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None

    model_types: ClassVar[tuple[str, ...]] = ()
    """The values of config.json's `model_type` that this class reads."""
    only: ClassVar[Mapping[str, Any]] = {}
    """Fields of config.json that change the result, each with the one value that is supported."""

    def __post_init__(self) -> None:
        for name in TOKEN_IDS:  # several as a tuple, so that configs are hashable
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return getattr(self, "num_hidden_layers")  # noqa: B009

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes without position_ids; None: any."""
        return getattr(self, "max_position_embeddings", None)

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> Self:
        """Take the fields from Hugging Face's config.json; those without a meaning here are left.

        Args:
          config_json: the parsed file.

        Returns:
          The config, in float32. A field that the file lacks has the class's default.

        Raises:
          ConfigError: a field that changes the result has a value that is not supported.
        """
        found = config_json.get("model_type", cls.model_types[0])
        if found not in cls.model_types:
            raise ConfigError(
                f"model_type is {found!r} in config.json, expected {' or '.join(cls.model_types)}."
            )
        for name, supported in cls.only.items():
            value = config_json.get(name)
            if value is not None and value != supported:
                raise ConfigError(
                    f"{name} is {value!r} in config.json, expected {supported!r}: this "
                    f"{found} supports nothing else."
                )
        names = {f.name for f in dataclasses.fields(cls)} - _OURS
        return cls(**{name: config_json[name] for name in config_json if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json: `from_dict` gives an equal config."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields = {name: value for name, value in fields.items() if name not in _OURS}
        for name in TOKEN_IDS:
            if (value := fields.pop(name)) is not None:
                fields[name] = list(value) if isinstance(value, tuple) else value
        return {"model_type": self.model_types[0], **fields}

    def with_dropout(self, rate: float) -> Self:
        """The same with every dropout probability at `rate`."""
        names = [f.name for f in dataclasses.fields(self) if is_dropout(f.name)]
        return dataclasses.replace(self, **dict.fromkeys(names, rate))


_OURS = {f.name for f in dataclasses.fields(ModelConfig)} - set(TOKEN_IDS)


def is_dropout(name: str) -> bool:
    """Whether a field of this name is a dropout probability."""
    return "dropout" in name or "pdrop" in name


def check_field(field: dataclasses.Field[Any], value: Any) -> None:
    """Checks a field by its type and name.

    An `int` is a size, so at least 1, or a token's id, at least 0. Fields of dropout are
    probabilities. Other floats are finite and not negative. A default of None allows None.

    Raises:
      ConfigError: a value that cannot mean anything, named.
    """
    name = field.name
    if value is None and field.default is None:
        return
    if is_dropout(name):
        if not _is_number(value) or not 0 <= value < 1:
            raise ConfigError(f"{name} is {value!r}, expected a probability in [0, 1).")
    elif field.type in (int, int | None):
        least = 0 if name.endswith("_token_id") else 1
        if type(value) is not int or not least <= value < 2**31:
            raise ConfigError(
                f"{name} is {value!r}, expected an integer of at least {least}, below 2**31."
            )
    elif field.type is float:
        too_large = isinstance(value, int) and value >= 2**31
        if not _is_number(value) or too_large or not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value!r}, expected a number of at least 0.")
    elif name.endswith(("_act", "activation_function")) and (
        not isinstance(value, str) or value not in ACTIVATIONS
    ):
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(ACTIVATIONS)}.")
    elif name == "attention" and value not in (None, "xla", "cudnn"):
        raise ConfigError(f"attention is {value!r}, expected 'xla', 'cudnn' or None.")
    elif name == "remat" and value is not False and value not in REMAT:
        raise ConfigError(f"remat is {value!r}, expected True, False, 'dots' or 'lora'.")


def check_divides(config: ModelConfig, whole: str, parts: str) -> None:
    """Raises ConfigError unless the field `whole` is a multiple of the field `parts`."""
    a, b = getattr(config, whole), getattr(config, parts)
    if a % b:
        raise ConfigError(f"{whole} is {a}, expected a multiple of {parts}, {b}.")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
